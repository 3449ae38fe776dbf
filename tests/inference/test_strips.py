"""stylize_pixels and Strips: the result of the whole image, within a limit of memory, or a size that fits."""

import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fastnst import stylize
from fastnst.errors import DataError, DeviceError, UserError
from fastnst.images import to_array, to_tensor
from fastnst.inference import stylize_pixels, tensors
from fastnst.inference.strips import Strips, _Moments
from fastnst.models.architectures import ARCHITECTURES
from fastnst.models.pretrained import load_lengstrom_npz
from fastnst.models.style_model import save_style_model
from fastnst.models.transform_net import NORMS, TransformNet
from helpers.random_inputs import seeded
from helpers.tiny_transform_nets import small_net

MIB = 2**20
CASES = [(16, 17, 2), (17, 23, 3), (61, 38, 2000), (90, 31, 8), (16, 201, 7)]
"""Height, width, rows of a strip."""


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def gradient(height: int, width: int) -> np.ndarray:
    """Smooth colours with some waves, like a photo."""
    y, x = np.mgrid[:height, :width] / (height, width)[0]
    waves = np.stack([np.sin(9 * x + 4 * y), np.cos(7 * y - 3 * x), np.sin(23 * x * y)], axis=2)
    return np.rint(127.5 + 120 * waves).astype(np.uint8)


def joined(strips: Strips, like: Tensor) -> Tensor:
    result, steps = torch.full_like(like, torch.nan), 0
    for strip in strips:
        steps += 1
        if strip is not None:
            first, rows = strip
            result[:, :, first : first + rows.shape[2]] = rows
    assert steps == len(strips)
    return result


def never_whole(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """Let `stylize_pixels` take strips of about this many rows for images of 200 pixels in width."""
    monkeypatch.setattr(tensors, "_WHOLE_ON_CPU_BYTES", 0)
    monkeypatch.setitem(tensors._STRIP_PIXELS, "cpu", rows * 280)


def trained_net(architecture: str, norm: str = "instance") -> TransformNet:
    """Seeded weights whose images use the whole range, and running statistics other than 0 and 1."""
    net = TransformNet(architecture, norm, generator=seeded(0)).eval()
    with torch.no_grad():
        if not net.spec.norm_on_output:
            net.out.weight.mul_(40)
            net.out.bias.fill_(127.0)
        if norm == "batch":
            for name, buffer in net.named_buffers():
                buffer.fill_(2.5 if name.endswith("running_var") else 0.1)
    return net


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("height", "width", "rows"), CASES)
def test_strips_give_the_whole_image(architecture: str, norm: str, height: int, width: int, rows: int) -> None:
    net, pixels = small_net(architecture, norm).eval(), noise(height, width)
    with torch.no_grad():
        whole = net(torch.tensor(pixels).permute(2, 0, 1)[None].double() / 255)
    strips = Strips(net, pixels, rows=rows, dtype=torch.float64)
    torch.testing.assert_close(joined(strips, whole), whole, rtol=0, atol=1e-12)


def test_strips_need_the_memory_of_two_maps_of_a_block() -> None:
    for architecture, spec in ARCHITECTURES.items():
        strips = Strips(TransformNet(architecture), noise(400, 600), rows=8, dtype=torch.float32)
        a_map = 4 * 128 * (400 + 2 * spec.border) * (600 + 2 * spec.border) / 16
        assert 2 * a_map <= strips.workspace_bytes <= 2.1 * a_map


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_stylize_pixels_in_strips_is_within_a_level_of_the_whole_image(
    architecture: str, norm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, pixels = trained_net(architecture, norm), gradient(150, 203)
    whole = stylize_pixels(net, pixels)
    assert whole.std() > 2
    never_whole(monkeypatch, rows=20)
    seen: list[tuple[int, int]] = []
    strips = stylize_pixels(net, pixels, progress=lambda *step: seen.append(step))
    assert np.abs(strips.astype(int) - whole).max() <= 1
    assert np.array_equal(stylize_pixels(net, pixels), strips)
    assert seen == [(done, len(seen) - 1) for done in range(len(seen))]
    assert len(seen) > 20


def test_stylize_pixels_takes_a_small_image_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensors, "Strips", None)
    net, pixels = trained_net("lengstrom"), gradient(40, 50)
    assert np.array_equal(stylize_pixels(net, pixels), to_array(stylize(net, to_tensor(pixels))))


def test_strips_of_a_published_model_give_the_whole_image(weights: Path) -> None:
    net, pixels = load_lengstrom_npz(weights / "transform_lengstrom_udnie.npz").eval(), gradient(200, 300)
    with torch.no_grad():
        whole = net(to_tensor(pixels))
    strips = joined(Strips(net, pixels, rows=24, dtype=torch.float32), whole)
    assert (strips.clamp(0, 1) - whole.clamp(0, 1)).abs().max() < 1e-3


def test_moments_are_exact_for_a_constant_and_accurate_for_a_large_mean() -> None:
    x = torch.randn(1, 3, 60, 50, generator=seeded(0)).contiguous(memory_format=torch.channels_last)
    x[:, 0], x[:, 1] = 12345.678, 3000 + x[:, 1]
    for rows in (1, 7, 60):
        moments = _Moments()
        for strip in x.split(rows, dim=2):
            moments.add(strip)
        mean, var = moments.statistics(x)
        exact = x.double()
        assert (mean[0], var[0]) == (x[0, 0, 0, 0], 0)
        torch.testing.assert_close(mean.double(), exact.mean((0, 2, 3)), rtol=1e-7, atol=1e-7)
        torch.testing.assert_close(var.double(), exact.var((0, 2, 3), correction=0), rtol=1e-5, atol=0)


def test_stylize_pixels_in_bf16_is_near_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    never_whole(monkeypatch, rows=20)
    net, pixels = trained_net("johnson"), gradient(40, 50)
    exact, rough = stylize_pixels(net, pixels), stylize_pixels(net, pixels, precision="bf16")
    assert not np.array_equal(rough, exact)
    assert np.abs(rough.astype(int) - exact).mean() < 4


def test_stylize_pixels_changes_neither_model_nor_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    never_whole(monkeypatch, rows=20)
    net = trained_net("hwalsuklee", "batch").train()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    stylize_pixels(net, gradient(90, 103))
    assert net.training
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize(
    ("height", "width", "memory"), [(3000, 4000, 330), (20, 70000, 500), (500, 700, 115), (99, 99, 5)]
)
def test_stylize_pixels_names_a_size_that_fits(height: int, width: int, memory: int) -> None:
    net, pixels = TransformNet("hwalsuklee"), np.zeros((height, width, 3), np.uint8)
    with pytest.raises(DeviceError) as caught:
        stylize_pixels(net, pixels, memory=memory * MIB)
    message = str(caught.value)
    assert f"cpu has too little memory for {width} × {height} px, {memory}.0 MiB" in message
    if (height, width) in ((20, 70000), (99, 99)):
        assert "would fit" not in message  # below 16 pixels, or nothing at all
        return
    fitting = message.split("about ")[1].split(" px")[0].split(" × ")
    smaller = np.zeros((int(fitting[1]), int(fitting[0]), 3), np.uint8)
    assert smaller.size > 0.1 * pixels.size
    tensors._strips_that_fit(net, smaller, torch.device("cpu"), torch.float32, memory * MIB)


def test_stylize_pixels_refuses_wrong_arguments() -> None:
    net = TransformNet("lengstrom")
    for pixels in (np.zeros((15, 40, 3), np.uint8), np.zeros((40, 40, 4), np.uint8), np.zeros((40, 40, 3), np.float32)):
        with pytest.raises(UserError, match=rf"got {pixels.dtype} \[{pixels.shape[0]}, 40, {pixels.shape[2]}\]"):
            stylize_pixels(net, pixels)
    with pytest.raises(UserError, match="unknown precision 'fp8'"):
        stylize_pixels(net, gradient(20, 20), precision="fp8")


def test_stylize_pixels_explains_what_fails_in_a_strip(monkeypatch: pytest.MonkeyPatch) -> None:
    never_whole(monkeypatch, rows=20)
    net, pixels = trained_net("lengstrom"), gradient(90, 103)
    with torch.no_grad():
        net.up2.scale.fill_(torch.nan)
    with pytest.raises(DataError, match="holds NaN"):
        stylize_pixels(net, pixels)
    monkeypatch.setattr("fastnst.inference.strips.convolution", lambda *_, **__: (_ for _ in ()).throw(MemoryError))
    with pytest.raises(DeviceError, match=r"ran out of memory for 103 × 90 px, although .* were there"):
        stylize_pixels(net, pixels)


UNDER_A_LIMIT = """
import resource, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
import fastnst.inference.files, fastnst.cli.main
torch.nn.functional.conv2d(torch.ones(1, 8, 64, 64), torch.ones(8, 8, 3, 3))
limit, used = getattr(resource, sys.argv.pop(1)), Path("/proc/self/statm").read_text().split()
used = int(used[0 if limit == resource.RLIMIT_AS else 5]) * resource.getpagesize()
resource.setrlimit(limit, (used + int(sys.argv.pop(1)),) * 2)
fastnst.cli.main.main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("limit", ["RLIMIT_AS", "RLIMIT_DATA"])
def test_stylize_under_a_limit_works_in_strips_or_says_what_fits(limit: str, tmp_path: Path) -> None:
    save_style_model(tmp_path / "model.safetensors", trained_net("lengstrom"), metadata={})
    Image.fromarray(gradient(600, 700)).save(tmp_path / "in.png")

    def stylize_within(room: int) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", UNDER_A_LIMIT, limit, room, "stylize", tmp_path / "model.safetensors"]
        command += [tmp_path / "in.png", "--out", tmp_path / "out.png", "--device", "cpu"]
        return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)

    assert resource.getrlimit(getattr(resource, limit))[0] == resource.RLIM_INFINITY
    refused = stylize_within(110 * MIB)
    assert refused.returncode == 5, refused.stderr
    assert "cpu has too little memory for 700 × 600 px" in refused.stderr
    assert not (tmp_path / "out.png").exists()
    done = stylize_within(240 * MIB)  # as a whole it would take 260
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out.png").exists()
