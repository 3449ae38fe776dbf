"""stylize: its result, side effects and refusals; stylize_files: formats, folders, clashing names, failures."""

import errno
import os
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fastnst import stylize
from fastnst.errors import DataError, DeviceError, UserError
from fastnst.images import read_image, to_array, to_tensor, write_image
from fastnst.inference import stylize_files
from fastnst.models.style_model import load_style_model, save_style_model
from fastnst.models.transform_net import TransformNet

ORIENTATION = 0x0112


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with a style model of random weights."""
    run = tmp_path_factory.mktemp("run")
    net = TransformNet("johnson", generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        net.out.weight.mul_(40)  # new weights give nearly black images, which hide errors
        net.out.bias.fill_(127.0)
    save_style_model(run / "model.safetensors", net, metadata={})
    return run


@pytest.fixture(scope="module")
def net(model: Path) -> TransformNet:
    return load_style_model(model)


def image(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def write(path: Path, array: np.ndarray, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)
    return path


def run(model: Path, *images: Path, out: Path, **options: object) -> list[Path]:
    return stylize_files(model, images, out, device="cpu", **options)


def expected(net: TransformNet, array: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return to_array(net(to_tensor(array)))


# Tensors.


@pytest.mark.parametrize(("height", "width"), [(16, 16), (17, 23), (31, 64)])
def test_stylize_keeps_shape_and_range(net: TransformNet, height: int, width: int) -> None:
    images = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(0))
    stylized = stylize(net, images)
    assert stylized.shape == images.shape
    assert stylized.dtype == torch.float32
    assert stylized.is_contiguous(memory_format=torch.channels_last)
    assert stylized.std() > 0.05
    with torch.no_grad():
        assert torch.equal(stylized, net(images).clamp(0, 1))


def test_stylize_clamps() -> None:
    class Loud(TransformNet):
        def forward(self, x: Tensor) -> Tensor:
            return torch.full_like(x, -3.0).index_fill(1, torch.tensor([0]), 5.0)

    stylized = stylize(Loud("johnson"), torch.rand(1, 3, 16, 16))
    assert (stylized[:, 0] == 1).all()
    assert (stylized[:, 1:] == 0).all()


def test_stylize_changes_neither_model_nor_images() -> None:
    net = TransformNet("johnson", "batch", generator=torch.Generator().manual_seed(0)).train()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    images = torch.rand(2, 3, 16, 16, requires_grad=True)
    kept = images.detach().clone()
    stylized = stylize(net, images)
    assert net.training
    assert not stylized.requires_grad
    assert torch.equal(images, kept)
    for name, tensor in net.state_dict().items():  # the running statistics above all
        assert torch.equal(tensor, before[name]), name
    assert torch.equal(stylized, stylize(net.eval(), kept))
    assert not net.training


def test_stylize_in_bf16_is_near_fp32(net: TransformNet) -> None:
    images = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    exact, rough = stylize(net, images), stylize(net, images, precision="bf16")
    assert rough.dtype == torch.float32
    assert not torch.equal(rough, exact)
    assert (rough - exact).abs().mean() < 0.02


@pytest.mark.parametrize(
    ("images", "options", "reason"),
    [
        (torch.rand(3, 16, 16), {}, r"\[3, 16, 16\]"),
        (torch.rand(1, 1, 16, 16), {}, r"\[1, 1, 16, 16\]"),
        (torch.rand(1, 3, 15, 40), {}, "16 pixels or more"),
        (torch.zeros(1, 3, 16, 16, dtype=torch.uint8), {}, "got torch.uint8; divide by 255"),
        (torch.rand(1, 3, 16, 16), {"precision": "fp8"}, "unknown precision 'fp8'"),
    ],
)
def test_stylize_refuses_wrong_arguments(
    net: TransformNet, images: Tensor, options: dict[str, str], reason: str
) -> None:
    with pytest.raises(UserError, match=reason):
        stylize(net, images, **options)


CPU_FULL = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 4000000000000000 bytes."


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), RuntimeError(CPU_FULL)])
def test_stylize_explains_out_of_memory_only(
    net: TransformNet, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr(TransformNet, "forward", mock.Mock(side_effect=error))
    with pytest.raises(DeviceError, match=r"cpu has too little memory for 2 images of 40 × 30 px"):
        stylize(net, torch.rand(2, 3, 30, 40))
    monkeypatch.setattr(TransformNet, "forward", mock.Mock(side_effect=RuntimeError("something else")))
    with pytest.raises(RuntimeError, match="something else"):
        stylize(net, torch.rand(1, 3, 16, 16))


# Files.


def test_stylize_files_writes_an_image_into_a_new_folder(model: Path, net: TransformNet, tmp_path: Path) -> None:
    array = image(37, 53)
    out = tmp_path / "new folder" / "out.png"
    assert run(model, write(tmp_path / "in.png", array), out=out) == [out]
    assert np.array_equal(read_image(out), expected(net, array))


def test_stylize_files_writes_the_format_of_the_suffix(model: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "in.png", image(20, 24))
    for name, image_format in (("a.jpg", "JPEG"), ("a.JPEG", "JPEG"), ("a.png", "PNG"), ("a.webp", "WEBP")):
        run(model, source, out=tmp_path / name)
        with Image.open(tmp_path / name) as stylized:
            assert (stylized.format, stylized.size) == (image_format, (24, 20))


def test_stylize_files_keeps_transparency(model: Path, net: TransformNet, tmp_path: Path) -> None:
    array = image(33, 40, 4)
    source = write(tmp_path / "in.png", array)
    for name in ("out.png", "out.webp"):
        run(model, source, out=tmp_path / name)
        with Image.open(tmp_path / name) as stylized:
            assert stylized.mode == "RGBA"
            assert np.array_equal(np.asarray(stylized)[..., 3], array[..., 3])
    with Image.open(tmp_path / "out.png") as stylized:
        assert np.array_equal(np.asarray(stylized)[..., :3], expected(net, read_image(source)))


def test_stylize_files_applies_orientation_tags(model: Path, net: TransformNet, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    source = write(tmp_path / "in.png", image(20, 36), exif=exif)
    upright = read_image(source)
    assert upright.shape[:2] == (36, 20)
    run(model, source, out=tmp_path / "out.png")
    with Image.open(tmp_path / "out.png") as stylized:
        assert stylized.getexif().get(ORIENTATION, 1) == 1
        assert np.array_equal(np.asarray(stylized), expected(net, upright))


def test_stylize_files_keeps_the_names_of_several_images(model: Path, net: TransformNet, tmp_path: Path) -> None:
    sources = [write(tmp_path / name, image(18 + seed, 20, seed=seed)) for seed, name in enumerate(("b.png", "a.png"))]
    done: list[Path] = []
    results = run(model, *sources, out=tmp_path / "out", written=done.append)
    assert results == [tmp_path / "out" / "b.png", tmp_path / "out" / "a.png"]
    assert done == results
    for source, result in zip(sources, results, strict=True):
        assert np.array_equal(read_image(result), expected(net, read_image(source)))


def test_stylize_files_takes_the_images_of_a_folder(model: Path, photo_folder: Path, tmp_path: Path) -> None:
    write(photo_folder / "scan.TIF", image(20, 20))
    write(photo_folder / "screen.bmp", image(20, 20))
    write(photo_folder / "camera.jpe", image(20, 20), format="JPEG")
    write(photo_folder / ".hidden.png", image(20, 20))
    write(photo_folder / "below" / "deeper.png", image(20, 20))
    (photo_folder / "notes.txt").write_text("no image")
    results = run(model, photo_folder, out=tmp_path / "out")
    names = [path.name for path in photo_folder.glob("image_*")] + ["scan.png", "screen.png", "camera.jpg"]
    assert sorted(path.name for path in results) == sorted(names)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(names)


def test_stylize_files_chooses_the_output_path(model: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "in" / "a.png", image(20, 20))
    (tmp_path / "v1.0").mkdir()
    old = tmp_path / "old.png"
    write_image(old, image(8, 8))
    for out, result in (
        (tmp_path / "v1.0", tmp_path / "v1.0" / "a.png"),
        (tmp_path / "new", tmp_path / "new" / "a.png"),
        (old, old),
    ):
        assert run(model / "model.safetensors", source, out=out) == [result]
        assert read_image(result).shape == (20, 20, 3)
    # A folder of one image gives a folder; an image named twice is stylized once.
    assert run(model, source.parent, out=tmp_path / "of-folder") == [tmp_path / "of-folder" / "a.png"]
    assert run(model, source, source.parent, out=tmp_path / "twice") == [tmp_path / "twice" / "a.png"]


# Names that clash: nothing is written at all.


def refused(model: Path, *images: Path, out: Path) -> str:
    with pytest.raises(UserError) as caught:
        run(model, *images, out=out)
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_stylize_files_never_replaces_an_input(model: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "a.png", image(20, 20))
    other = write(tmp_path / "b.png", image(20, 20))
    link = tmp_path / "link.png"
    link.symlink_to(source)
    before = source.read_bytes()
    (tmp_path / "sub").mkdir()
    for out in (source, tmp_path / "sub" / ".." / "a.png", link):
        assert f"would replace the input {source}" in refused(model, source, out=out)
    assert "would replace the input" in refused(model, source, other, out=tmp_path)
    assert "would replace the input" in refused(model, tmp_path, out=tmp_path)
    assert source.read_bytes() == before


def test_stylize_files_needs_a_folder_for_several_images(model: Path, photo_folder: Path, tmp_path: Path) -> None:
    assert "there are 12 to write; name a folder" in refused(model, photo_folder, out=tmp_path / "out.png")
    (tmp_path / "file").write_text("in the way")
    assert "is a file" in refused(model, photo_folder, out=tmp_path / "file")
    assert "no image was named" in refused(model, out=tmp_path / "out")


def test_stylize_files_refuses_wrong_arguments_before_reading_the_model(tmp_path: Path) -> None:
    source, model, out = write(tmp_path / "a.png", image(20, 20)), tmp_path / "no model", tmp_path / "out.png"
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("no image")
    with pytest.raises(DataError, match=r"\.gif is not a supported format"):
        run(model, source, out=tmp_path / "out.gif")
    with pytest.raises(DataError, match="holds no image"):
        run(model, tmp_path / "empty", out=tmp_path / "out")
    with pytest.raises(UserError, match="unknown device 'tpu'; choose auto, cuda or cpu"):
        stylize_files(model, [source], out, device="tpu")
    with pytest.raises(UserError, match="unknown precision 'fp8'; choose auto, bf16, fp16, fp32"):
        run(model, source, out=out, precision="fp8")


# Failures.


def test_stylize_files_names_an_unusable_image(model: Path, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no image")
    write(tmp_path / "small.png", image(15, 40))
    for name, reason in (("absent.png", "no such file"), ("text.png", "holds text"), ("small.png", "too small")):
        with pytest.raises(DataError, match=reason) as caught:
            run(model, tmp_path / name, out=tmp_path / "out.png")
        assert str(tmp_path / name) in str(caught.value)
        assert not (tmp_path / "out.png").exists()


def test_stylize_files_goes_on_after_a_bad_image(
    model: Path, photo_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (photo_folder / "image_00a.png").write_text("no image")
    (photo_folder / "image_02a.jpg").write_bytes(b"")
    done: list[Path] = []
    with pytest.raises(DataError, match="2 of 14 images could not be stylized, see above; the others are") as caught:
        stylize_files(model, [photo_folder], tmp_path / "out", device="cpu", written=done.append)
    assert caught.value.exit_code == 3
    assert [name in note for name, note in zip(("00a.png", "02a.jpg"), caplog.messages, strict=True)] == [True, True]
    assert len(done) == 12
    assert sorted(done) == sorted((tmp_path / "out").iterdir())


def test_stylize_files_stops_when_the_disk_is_full(
    model: Path, photo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match="No space left on device; free some space"):
        run(model, photo_folder, out=tmp_path / "out")
    assert len(calls) == 1
    assert list((tmp_path / "out").iterdir()) == []


def test_stylize_files_names_the_image_of_nonfinite_results(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TransformNet, "forward", lambda _, x: torch.full_like(x, float("nan")))
    source = write(tmp_path / "a.png", image(20, 20))
    with pytest.raises(DataError, match=f"cannot stylize {source}: "):
        run(model, source, out=tmp_path / "out.png")
    assert not (tmp_path / "out.png").exists()


def test_stylize_files_checks_memory_and_names_a_size_that_fits(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastnst.inference.tensors.available_memory", lambda _: 150 * 2**20)
    large, small = write(tmp_path / "large.png", image(1000, 1400)), write(tmp_path / "small.png", image(20, 20))
    message = r"large.png: cpu has too little memory for 1400 × 1000 px, 150.0 MiB; about \d\d\d × \d\d\d px would fit"
    with pytest.raises(DeviceError, match=message) as caught:
        run(model, large, out=tmp_path / "out.png")
    assert caught.value.exit_code == 5
    assert "scale it down" in str(caught.value)
    with pytest.raises(DeviceError, match="1 of 2 images"):
        run(model, large, small, out=tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["small.png"]


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_stylize_files_on_a_gpu_agrees_with_the_cpu(model: Path, tmp_path: Path, precision: str) -> None:
    source = write(tmp_path / "a.png", np.asarray(Image.fromarray(image(8, 8)).resize((97, 70))))
    cpu, gpu = tmp_path / "cpu.png", tmp_path / "gpu.png"
    run(model, source, out=cpu)
    stylize_files(model, [source], gpu, device="cuda", precision=precision)
    difference = np.abs(read_image(cpu).astype(int) - read_image(gpu).astype(int))
    assert difference.mean() < (0.5 if precision == "fp32" else 4)
