"""The transform net: every architecture against plain PyTorch, any size, layout, and a published model's image."""

from collections import Counter
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastnst.config import ModelConfig
from fastnst.errors import DataError, UserError
from fastnst.models import transform_net
from fastnst.models.architectures import ARCHITECTURES
from fastnst.models.pretrained import load_lengstrom_npz
from fastnst.models.transform_net import ConvLayer, TransformNet, UpLayer
from fastnst_kernels.cpu import winograd
from helpers.random_inputs import images, seeded

CHANNELS_LAST = torch.channels_last


def _net(architecture: str, norm: str = "instance") -> TransformNet:
    return TransformNet(architecture, norm, generator=seeded())


def _gradients(net: TransformNet, y: Tensor) -> tuple[Tensor, ...]:
    dy = torch.randn(y.shape, generator=seeded(3), dtype=y.dtype)
    return torch.autograd.grad(y, list(net.parameters()), dy)


def _same(size: int) -> tuple[int, int]:
    return (1, 1) if size % 2 else (0, 1)


def _plain_forward(net: TransformNet, x: Tensor) -> Tensor:
    """The same network from PyTorch's own functions, as in the published codes."""
    johnson, hwalsuklee = net.architecture == "johnson", net.architecture == "hwalsuklee"
    eps = 1e-5 if johnson else 1e-3
    height, width = x.shape[2:]

    def conv(layer: Any, y: Tensor, stride: int = 1, *, padding: str = "") -> Tensor:
        half = layer.weight.shape[-1] // 2
        if johnson:
            y = F.pad(y, (half,) * 4, mode="reflect")
        elif stride == 2:
            y = F.pad(y, (*_same(y.shape[3]), *_same(y.shape[2])))
        elif padding != "valid":
            y = F.pad(y, (half,) * 4)
        return F.conv2d(y, layer.weight, layer.bias, stride)

    def norm(layer: Any, y: Tensor) -> Tensor:
        # Written out: in PyTorch 2.13 the gradient of F.instance_norm is wrong where input and dy differ in layout.
        centred = y - y.mean((2, 3), keepdim=True)
        y = centred / (centred.square().mean((2, 3), keepdim=True) + eps).sqrt()
        return y * layer.scale[:, None, None] + layer.shift[:, None, None]

    def up(layer: Any, y: Tensor) -> Tensor:
        if johnson:
            return conv(layer, F.interpolate(y, scale_factor=2, mode="nearest"))
        return F.conv_transpose2d(y, layer.weight, stride=2)[:, :, :-1, :-1]

    x = F.pad(x, (40,) * 4, mode="reflect") if hwalsuklee else x * 255 if johnson else x
    for name, stride in (("conv1", 1), ("conv2", 2), ("conv3", 2)):
        layer = net.get_submodule(name)
        x = F.relu(norm(layer, conv(layer, x, stride)))
    for index in range(1, 6):
        block: Any = net.get_submodule(f"res{index}")
        padding = "valid" if hwalsuklee else ""
        y = F.relu(norm(block.conv1, conv(block.conv1, x, padding=padding)))
        y = norm(block.conv2, conv(block.conv2, y, padding=padding))
        x = y + (x[:, :, 2:-2, 2:-2] if hwalsuklee else x)
    for name in ("up1", "up2"):
        layer = net.get_submodule(name)
        x = F.relu(norm(layer, up(layer, x)))
    x = conv(net.out, x)
    if johnson:
        return x[:, :, :height, :width] / 255
    x = norm(net.out, x)[:, :, -height:, -width:].tanh()
    return (127.5 * (x + 1) if hwalsuklee else 150 * x + 127.5) / 255


def test_architectures_are_those_of_the_configuration() -> None:
    assert get_args(ModelConfig.model_fields["architecture"].annotation) == tuple(ARCHITECTURES)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_transform_net_is_the_published_architecture(architecture: str) -> None:
    """With its gradients, on an odd height and an even width."""
    net = _net(architecture).double()
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.ndim == 1:
                # Scale 1 and shift 0 would hide an exchange of the two.
                parameter.add_(torch.randn(parameter.shape, generator=seeded(2), dtype=torch.float64), alpha=0.2)
    x = images(1, 3, 45, 42, dtype=torch.float64)
    actual, expected = net(x), _plain_forward(net, x)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)
    for got, wanted in zip(_gradients(net, actual), _gradients(net, expected), strict=True):
        # Some are zero but for rounding: a later norm cancels a constant.
        torch.testing.assert_close(got, wanted, rtol=1e-7, atol=1e-9)


@settings(max_examples=6)
@given(st.sampled_from(sorted(ARCHITECTURES)), st.integers(16, 50), st.integers(16, 50))
def test_forward_keeps_any_size(architecture: str, height: int, width: int) -> None:
    with torch.no_grad():
        y = _net(architecture)(images(1, 3, height, width))
    assert y.shape == (1, 3, height, width)
    assert bool(torch.isfinite(y).all())
    assert y.is_contiguous(memory_format=CHANNELS_LAST)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_parameter_names_and_shapes(architecture: str) -> None:
    shapes = {name: tuple(parameter.shape) for name, parameter in _net(architecture).named_parameters()}
    johnson = architecture == "johnson"
    convs = ["conv1", "conv2", "conv3", *(f"res{i}.conv{j}" for i in range(1, 6) for j in (1, 2)), "up1", "up2", "out"]
    names = [f"{layer}.{kind}" for layer in convs for kind in ("weight", "scale", "shift")]
    if johnson:
        names[-2:] = ["out.bias"]
    assert sorted(shapes) == sorted(names)
    assert shapes["conv1.weight"] == (32, 3, 9, 9)
    assert shapes["conv3.scale"] == (128,)
    assert shapes["up1.weight"] == ((64, 128, 3, 3) if johnson else (128, 64, 3, 3))
    assert shapes["out.weight"] == (3, 32, 9, 9)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_forward_keeps_every_layer_channels_last(architecture: str) -> None:
    net = _net(architecture)
    seen: dict[str, Tensor] = {}
    for name in net.layer_names:
        net.get_submodule(name).register_forward_hook(lambda _m, _i, output, name=name: seen.update({name: output}))
    x = images(2, 3, 17, 20)
    assert torch.equal(net(x.contiguous()), net(x))
    assert tuple(seen) == net.layer_names
    for name, tensor in [*seen.items(), *((n, p) for n, p in net.named_parameters() if p.ndim == 4)]:
        assert tensor.is_contiguous(memory_format=CHANNELS_LAST), name


@pytest.mark.parametrize("norm", ["instance", "batch"])
def test_upsampling_on_a_gpu_is_the_same_network(norm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The GPU's norm that upsamples and reflects, then a plain convolution, against the CPU's computation."""
    net = _net("johnson", norm).double()
    x = images(2, 3, 20, 24, dtype=torch.float64)
    outcomes = []
    for on_gpu in (False, True):
        monkeypatch.setattr(transform_net, "_upsamples_in_norm", lambda _, on_gpu=on_gpu: on_gpu)
        y = net(x)
        outcomes.append((y, *_gradients(net, y)))
    for one, other in zip(*outcomes, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


class _FeatureMapOps(TorchDispatchMode):
    """Counts the operators that write a feature map: more channels than an image."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        first = result[0] if isinstance(result, tuple | list) else result
        if isinstance(first, Tensor) and first.ndim == 4 and first.shape[1] > 3 and not func.is_view:
            self.names[func.overloadpacket.__name__] += 1
        return result


@pytest.mark.parametrize(
    ("architecture", "cut"),
    [("johnson", 0), ("hwalsuklee", 2)],  # transposed convolutions are cropped
)
def test_forward_runs_nothing_but_convolutions_and_norms(
    architecture: str, cut: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No pad, addition, ReLU or upsampling; the backward adds the gradients of a fork once per block."""
    monkeypatch.setattr(transform_net, "_upsamples_in_norm", lambda _: True)
    monkeypatch.setattr(winograd, "is_faster", lambda *_: False)  # Winograd consists of many operators
    net = _net(architecture)
    x = images(1, 3, 32, 32)
    with _FeatureMapOps() as forward:
        y = net(x)
    copies = {"clone": cut} if cut else {}
    # The first is counted with them, the last, which makes an image, is not.
    assert forward.names == {"convolution": 15, "norm": 15, **copies}
    with _FeatureMapOps() as backward:
        y.sum().backward()
    assert backward.names["norm_backward"] == 15
    assert backward.names["convolution_backward"] == 15
    others = set(backward.names) - {"norm_backward", "convolution_backward", "add"}
    assert not others & {"constant_pad_nd", "reflection_pad2d_backward", "threshold_backward", "upsample_nearest2d"}
    assert backward.names["add"] <= 5
    # The inputs of convolutions after a norm are computed again, each once.
    assert backward.names["norm"] == 15


@pytest.mark.parametrize(
    ("architecture", "norm"), [*((name, "instance") for name in ARCHITECTURES), ("johnson", "batch")]
)
def test_training_saves_only_the_results_of_convolutions(architecture: str, norm: str) -> None:
    """Evaluation, which saves what autograd does, gives the same gradients if the statistics are the same."""
    net = _net(architecture, norm)
    x = images(2, 3, 17, 20)
    made: list[int] = []
    for module in net.modules():
        if isinstance(module, ConvLayer | UpLayer) and module.norm is not None:
            normalise = module.normalise

            def measured(x: Tensor, *arguments: Any, normalise: Any = normalise) -> Tensor:
                made.append(x.nbytes)
                result: Tensor = normalise(x, *arguments)
                return result

            vars(module)["normalise"] = measured
    saved: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        saved.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = net(x)
    feature_maps = [t for t in saved.values() if t.ndim == 4 and t.shape[0] == 2 and t.shape[1] > 3]
    if net.spec.norm_on_output:
        made.pop()  # the last convolution makes images
    assert len(feature_maps) == len(made) == 15
    assert sum(t.untyped_storage().nbytes() for t in feature_maps) == sum(made)
    gradients = _gradients(net, y)
    if norm == "instance":
        net.eval()
        for again, kept in zip(gradients, _gradients(net, net(x)), strict=True):
            assert torch.equal(again, kept)


@pytest.mark.parametrize(
    ("architecture", "layer", "std"),
    [
        ("lengstrom", "res1.conv1", 0.1 * 0.8796),
        ("hwalsuklee", "res1.conv1", (2.6 / (128 * 9)) ** 0.5 * 0.8796),
        ("hwalsuklee", "up1", (2.6 / (64 * 9)) ** 0.5 * 0.8796),
        ("johnson", "res1.conv1", (1 / (128 * 9)) ** 0.5 / 3**0.5),
    ],
)
def test_initial_weights_have_their_deviation(architecture: str, layer: str, std: float) -> None:
    """0.8796 is the standard deviation of a unit normal cut at ±2."""
    module: Any = _net(architecture).get_submodule(layer)
    assert float(module.weight.detach().std()) == pytest.approx(std, rel=0.02)
    assert bool((module.scale == 1).all())
    assert bool((module.shift == 0).all())


def test_initial_weights_come_from_the_generator() -> None:
    before = torch.get_rng_state()
    first, second, other = (TransformNet("johnson", generator=seeded(seed)).conv1.weight for seed in (5, 5, 6))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_batch_norm_has_running_statistics() -> None:
    net = _net("johnson", "batch")
    buffers = dict(net.named_buffers())
    assert "conv1.running_mean" in buffers
    assert "out.running_mean" not in buffers
    x = images(3, 3, 20, 20)
    net(x)
    assert float(buffers["res3.conv2.running_mean"].abs().sum()) > 0
    net.eval()
    with torch.no_grad():
        # With fixed statistics an image's result does not depend on its neighbours in the batch.
        torch.testing.assert_close(net(x)[:1], net(x[:1]), rtol=1e-4, atol=1e-4)


def test_net_refuses_wrong_arguments() -> None:
    for metadata in ({}, {"architecture": "lengstrom"}, {"architecture": "gatys", "norm": "instance"}):
        with pytest.raises(DataError, match="metadata"):
            TransformNet.from_metadata(metadata)
    with pytest.raises(UserError, match="hwalsuklee, lengstrom, johnson"):
        TransformNet("gatys")
    with pytest.raises(UserError, match="instance, batch"):
        TransformNet("johnson", "layer")
    net = _net("johnson")
    for shape in ((1, 3, 15, 40), (1, 3, 40, 15), (1, 4, 32, 32), (3, 32, 32)):
        with pytest.raises(UserError, match="16 pixels"):
            net(torch.zeros(shape))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_autocast_runs_convolutions_in_bf16_and_returns_fp32(architecture: str) -> None:
    net = _net(architecture)
    x = images(1, 3, 24, 28)
    kinds = []
    net.res1.register_forward_hook(lambda _module, _inputs, output: kinds.append(output.dtype))
    with torch.no_grad():
        exact = net(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mixed = net(x)
    assert kinds == [torch.float32, torch.bfloat16]
    assert mixed.dtype == torch.float32
    # Sixteen convolutions, each rounded to 8 bits; johnson's untrained output has no norm to bound it.
    assert float((mixed - exact).abs().mean()) < 0.05 * float(exact.std())


@pytest.mark.parametrize("architecture", ["hwalsuklee", "johnson"])
def test_net_compiles_without_graph_breaks(architecture: str) -> None:
    net = _net(architecture)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True, dynamic=False)
    x = images(1, 3, 16, 18)
    expected, actual = net(x), compiled(x)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    for got, wanted in zip(_gradients(net, actual), _gradients(net, expected), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-2, atol=1e-3 * max(1.0, float(wanted.abs().max())))


def test_load_lengstrom_npz_gives_the_published_image(weights: Path, content: Path) -> None:
    """lengstrom's udnie on Chicago: the difference, 1.29 grey levels on average, is the published JPEG's rounding."""
    net = load_lengstrom_npz(weights / "transform_lengstrom_udnie.npz")
    photo = np.array(Image.open(content / "content_chicago.jpg").convert("RGB"))
    published = np.array(Image.open(weights / "ref_chicago_udnie.jpg").convert("RGB")).astype(np.float32)
    with torch.no_grad():
        y = net(torch.from_numpy(photo).permute(2, 0, 1)[None] / 255.0)
    ours = (y[0].permute(1, 2, 0).clamp(0, 1) * 255).numpy()
    difference = np.abs(ours - published)
    assert float(difference.mean()) < 1.35
    # Padding decides the border: it is as close as the rest.
    border = np.concatenate([difference[:8].ravel(), difference[-8:].ravel(), difference[:, :8].ravel()])
    assert float(border.mean()) < 1.35


def test_load_lengstrom_npz_refuses_other_files(tmp_path: Path) -> None:
    path = tmp_path / "model.npz"
    with pytest.raises(DataError, match="cannot read the model"):
        load_lengstrom_npz(path)
    path.write_bytes(b"not a zip file")
    with pytest.raises(DataError, match="not a lengstrom transform net"):
        load_lengstrom_npz(path)
    for array, reason in (
        (np.zeros((9, 9, 3, 32), np.float32), "Variable_1"),
        (np.zeros((3, 3, 3, 32), np.float32), r"\(3, 3, 3, 32\), needed: \(9, 9, 3, 32\)"),
        (np.full((9, 9, 3, 32), np.nan, np.float32), "not finite"),
    ):
        np.savez(path, Variable=array)
        with pytest.raises(DataError, match=reason):
            load_lengstrom_npz(path)
