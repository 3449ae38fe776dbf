"""The fused loss and its gradient against autograd of `PerceptualLoss`, and its memory."""

import math
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastnst.config import LossConfig, load_config
from fastnst.errors import UserError
from fastnst.losses import conv_ops
from fastnst.losses import fused as fused_module
from fastnst.losses.conv_ops import convolve_relu
from fastnst.losses.fused import FusedPerceptualLoss
from fastnst.losses.perceptual import LossTerms, PerceptualLoss
from fastnst.models.transform_net import TransformNet
from fastnst.models.vgg19 import VGG19, deepest_layer
from fastnst.training.memory.estimate import estimate
from fastnst.training.step.train_step import NetTrainer
from fastnst_kernels.cpu import winograd
from helpers.random_inputs import seeded
from helpers.tiny_runs import logged, make_small, small_config, train_small
from helpers.tolerances import FLOOR

PRESETS = ("hwalsuklee", "lengstrom", "johnson", "vgg-conv3")
# Losses before ReLUs, on ReLUs and on poolings, several on one layer, and layers with one kind of loss only.
ANYWHERE = LossConfig(
    content_layers=("conv1_2", "pool1", "relu2_1", "conv3_1"),
    style_layers=("pool2", "relu1_2", "conv1_2", "pool1", "relu2_2", "conv3_1"),
    style_layer_weights=(1.0, 2.0, 0.5, 1.0, 0.0, 3.0),
    style_weight=0.01,
    style_reduction="sum",
    tv_reduction="sum",
    tv_weight=1e-5,
)
SHALLOW = LossConfig(content_layers=("relu2_2",), style_layers=("relu1_1", "relu2_1"), tv_weight=1.0)


def images(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    made = torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
    return made.contiguous(memory_format=torch.channels_last)


def bytes_of(n: int, height: int, width: int) -> Tensor:
    """A loader's batch as `[N, 3, H, W]`."""
    return torch.randint(0, 256, (n, height, width, 3), dtype=torch.uint8, generator=seeded()).permute(0, 3, 1, 2)


def make_loss(
    config: LossConfig = SHALLOW, dtype: torch.dtype = torch.float32, flavour: str = "caffe"
) -> PerceptualLoss:
    vgg = VGG19(deepest_layer((*config.content_layers, *config.style_layers)), flavour, generator=seeded())
    loss = PerceptualLoss(vgg, config).to(dtype)
    loss.set_style(images(1, 3, 32, 40, seed=5, dtype=dtype))
    return loss


def by_autograd(
    loss: PerceptualLoss, stylized: Tensor, content: Tensor, dtype: torch.dtype | None = None
) -> tuple[LossTerms, Tensor]:
    """Autograd of the plain formula."""
    stylized = stylized.detach().requires_grad_()
    with torch.autocast(stylized.device.type, dtype=dtype, enabled=dtype is not None):
        terms = loss(stylized, content)
    (gradient,) = torch.autograd.grad(terms.total, stylized)
    return terms.detach(), gradient


def fused(
    loss: PerceptualLoss, stylized: Tensor, content: Tensor, dtype: torch.dtype | None = None
) -> tuple[LossTerms, Tensor]:
    fused_loss = FusedPerceptualLoss(loss, dtype)
    return fused_loss(stylized, fused_loss.content_targets(content))


def numbers(terms: LossTerms) -> dict[str, float]:
    named = {"total": terms.total, "content": terms.content, "style": terms.style, "tv": terms.tv} | terms.layers
    return {name: float(term) for name, term in named.items()}


CONFIGS = [pytest.param(load_config(preset=preset, environment={}).loss, id=preset) for preset in PRESETS]
CONTENT_ONLY = LossConfig(content_layers=("relu1_2",), style_layers=(), tv_weight=0)
STYLE_ONLY = SHALLOW.model_copy(update={"content_layers": ()})
CONFIGS += [pytest.param(ANYWHERE, id="anywhere")]
PARTIAL = [pytest.param(CONTENT_ONLY, id="content"), pytest.param(STYLE_ONLY, id="style")]


def assert_is_autograd(loss: PerceptualLoss, height: int, width: int) -> None:
    """In fp64, to 1e-10."""
    stylized, content = (images(2, 3, height, width, seed=seed, dtype=torch.float64) for seed in (1, 2))
    expected, wanted = by_autograd(loss, stylized, content)
    terms, gradient = fused(loss, stylized, content)
    assert list(terms.layers) == list(expected.layers)
    assert numbers(terms) == pytest.approx(numbers(expected), rel=1e-10)
    assert gradient.dtype == torch.float64
    assert float((gradient - wanted).abs().max()) <= 1e-10 * float(wanted.abs().max())


@pytest.mark.parametrize("config", [*CONFIGS, *PARTIAL])
def test_fused_loss_is_autograd_of_perceptual_loss(config: LossConfig) -> None:
    """On odd sides, and one of the two flavours each."""
    flavour = "caffe" if config.feature_scale == "0-255" else "torchvision"
    assert_is_autograd(make_loss(config, torch.float64, flavour), 17, 19)


def test_fused_loss_with_winograd_is_autograd_of_perceptual_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """Larger images, for which convolutions use Winograd: before a loss on z, on y, and before none."""
    shapes = set()
    for name in ("convolve", "input_gradient"):
        real = getattr(winograd, name)

        def noted(x: Tensor, weight: Tensor, *rest: Any, real: Any = real, name: str = name, **options: Any) -> Tensor:
            shapes.add((name, *weight.shape[:2]))
            return real(x, weight, *rest, **options)

        monkeypatch.setattr(winograd, name, noted)
    config = LossConfig(content_layers=("relu3_2",), style_layers=("relu1_1", "relu2_1", "conv3_1"), tv_weight=1.0)
    assert_is_autograd(make_loss(config, torch.float64), 62, 67)
    layers = {(128, 64), (128, 128), (256, 128), (256, 256)}
    assert shapes == {(name, *layer) for name in ("convolve", "input_gradient") for layer in layers}


DTYPES = pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])


@DTYPES
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_fused_loss_errs_no_more_than_autograd(dtype: torch.dtype | None, device: str) -> None:
    """The rule of `tolerances.py` in the norm: rounding decides which of two nearly equal values a pooling takes."""
    exact, loss = (make_loss(ANYWHERE, wide, "torchvision").to(device) for wide in (torch.float64, torch.float32))
    stylized, content = (images(2, 3, 21, 34, seed=seed).to(device) for seed in (1, 2))
    truths, truth = by_autograd(exact, stylized.double(), content.double())
    peers, peer = by_autograd(loss, stylized, content, dtype)
    terms, gradient = fused(loss, stylized, content, dtype)
    assert all(term.dtype == torch.float32 for term in (terms.total, terms.content, terms.style, terms.tv))
    assert gradient.dtype == torch.float32
    assert gradient.is_contiguous(memory_format=torch.channels_last)
    floor = FLOOR[dtype or torch.float32]
    error, peer_error = (float((g.double() - truth).norm()) for g in (gradient, peer))
    assert error <= 2 * peer_error + floor * float(truth.norm())
    for name, true in numbers(truths).items():
        error, peer_error = (abs(numbers(of)[name] - true) for of in (terms, peers))
        assert error <= 2 * peer_error + floor * abs(true), name


def test_grad_output_multiplies_the_gradient_only() -> None:
    loss = make_loss()
    stylized, content = images(1, 3, 16, 16, seed=1), images(1, 3, 16, 16, seed=2)
    fused_loss = FusedPerceptualLoss(loss)
    targets = fused_loss.content_targets(content)
    terms, gradient = fused_loss(stylized, targets)
    scaled_terms, scaled = fused_loss(stylized, targets, torch.tensor(1024.0))
    assert numbers(scaled_terms) == numbers(terms)
    torch.testing.assert_close(scaled, 1024 * gradient)


@pytest.mark.parametrize(("dtype", "value"), [(None, math.nan), (torch.bfloat16, math.inf), (torch.float16, math.nan)])
def test_nonfinite_image_shows_in_total_and_gradient(dtype: torch.dtype | None, value: float) -> None:
    """Even without total variation, and though oneDNN's ReLU turns NaN into 0."""
    loss = make_loss(SHALLOW.model_copy(update={"tv_weight": 0.0}))
    stylized, content = images(2, 3, 16, 16, seed=1), images(2, 3, 16, 16, seed=2)
    stylized[0, 1, 5, 7] = value
    terms, gradient = fused(loss, stylized, content, dtype)
    assert not math.isfinite(float(terms.total))
    assert not gradient.isfinite().any()


def test_convolve_relu_propagates_overflow_in_fp16() -> None:
    weight, bias = torch.full((4, 4, 3, 3), 300.0, dtype=torch.float16), torch.zeros(4, dtype=torch.float16)
    x = torch.full((1, 4, 4, 4), 100.0, dtype=torch.float16)
    first = convolve_relu(x, weight, bias)
    assert first.isinf().any()
    weight[0] = -1.0
    weight[0, 0] = 1.0
    assert convolve_relu(first, weight, bias)[:, 0].isnan().any()


class MemoryWatch(TorchDispatchMode):
    """Records the operations, and the bytes of their results that are alive."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, op: Any, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        result = op(*args, **(kwargs or {}))
        self.names.append(str(op))
        for made in tree_leaves(result) if not op.is_view else []:  # a view has no memory
            if not isinstance(made, Tensor):
                continue
            storage = made.untyped_storage()
            if storage._cdata not in self._sizes:
                self._sizes[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._free, storage._cdata)
        return result

    def _free(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


def test_fused_loss_builds_no_graph_and_no_weight_gradient() -> None:
    loss = make_loss()
    content = images(1, 3, 16, 16, seed=2)
    stylized = images(1, 3, 16, 16, seed=1).requires_grad_()
    fused_loss = FusedPerceptualLoss(loss)
    kept = fused_loss.forward(stylized)
    assert all(x.grad_fn is None and not x.requires_grad for stage in kept for x in stage.outputs().values())
    with MemoryWatch() as watching:
        targets = fused_loss.content_targets(content)
        terms, gradient = fused_loss(stylized, targets)
    assert not any(x.requires_grad for x in (terms.total, gradient, *targets.values()))
    assert not any("convolution_backward" in name for name in watching.names)
    assert all(parameter.grad is None for parameter in loss.parameters())


def test_convolve_relu_uses_cudnns_fused_call_by_type_and_determinism(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    assert [dtype for dtype in FLOOR if conv_ops._fuses_on_cuda(dtype)] == [torch.float32, torch.bfloat16]
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert not conv_ops._fuses_on_cuda(torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cudnns_fused_call_ignores_uninitialised_memory(dtype: torch.dtype) -> None:
    """PyTorch passes the uninitialised output to cuDNN as a summand, times 0."""
    x = images(2, 64, 32, 32, seed=1).to("cuda", dtype)
    weight = images(64, 64, 3, 3, seed=2).sub_(0.5).to("cuda", dtype)
    bias = torch.linspace(-1, 1, 64, device="cuda", dtype=dtype)
    wanted = torch.nn.functional.conv2d(x.double(), weight.double(), bias.double(), padding=1).relu()
    for _ in range(3):
        poison = torch.full_like(x, math.nan)
        del poison  # the allocator gives the same memory again
        error = (convolve_relu(x, weight, bias).double() - wanted).abs().max() / wanted.max()
        assert float(error) < 0.01


def test_backward_frees_each_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    """relu1_2 is pooled: its maxima and their positions are saved, a quarter of it each, and nothing of its size."""
    fused_loss = FusedPerceptualLoss(make_loss(SHALLOW.model_copy(update={"style_layers": ("relu1_1", "relu3_2")})))
    kept = fused_loss.forward(images(1, 3, 16, 16, seed=1))
    names = [sorted(stage.outputs()) for stage in kept]
    assert names == [["relu1_1"], ["pool1"], ["relu2_1"], ["relu2_2"], ["relu3_1"], ["relu3_2"]]
    assert [stage.switches is not None for stage in kept] == [False, True, False, True, False, False]
    del kept
    storages: list[weakref.ref] = []
    alive: list[int] = []

    def counting(*args: Any, **kwargs: Any) -> Tensor:
        alive.append(sum(reference() is not None for reference in storages))
        return conv_transpose(*args, **kwargs)

    conv_transpose = torch.nn.functional.conv_transpose2d
    forward = fused_loss.forward

    def remembering(stylized: Tensor) -> list[Any]:
        made = forward(stylized)
        storages.extend(weakref.ref(x.untyped_storage()) for stage in made for x in stage.outputs().values())
        return made

    monkeypatch.setattr(fused_loss, "forward", remembering)
    monkeypatch.setattr(fused_module.F, "conv_transpose2d", counting)
    fused_loss(images(1, 3, 16, 16, seed=1), fused_loss.content_targets(images(1, 3, 16, 16, seed=2)))
    assert alive == [5, 4, 3, 2, 1, 0]


@pytest.mark.parametrize("config", CONFIGS)
def test_fused_loss_needs_less_memory_than_autograd(config: LossConfig) -> None:
    loss = make_loss(config)
    stylized, content = images(1, 3, 32, 32, seed=1), images(1, 3, 32, 32, seed=2)
    with MemoryWatch() as autograds:
        by_autograd(loss, stylized, content)
    with MemoryWatch() as own:
        fused(loss, stylized, content)
    assert own.peak < 0.8 * autograds.peak


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_estimate_counts_the_tensors_between_forward_and_backward(precision: str) -> None:
    settings = ["data.image_size=32", "train.batch_size=2", f"train.precision={precision}"]
    config = load_config(preset="vgg-conv3", assignments=settings, environment={})
    dtype = torch.float16 if precision == "fp16" else None
    loss, net = make_loss(config.loss), TransformNet("johnson", generator=seeded()).train()
    fused_loss, batch = FusedPerceptualLoss(loss, dtype), bytes_of(2, 32, 32)
    with MemoryWatch() as watching:
        targets = fused_loss.content_targets(batch)
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            pre_activation = net(batch, pre_activation=True)
        mapping = net.output_mapping(pre_activation.shape[2:], batch.shape[2:])
        kept = fused_loss.forward(fused_loss.preprocess(pre_activation.detach(), mapping)[0])
        alive = watching.now
    assert targets
    assert kept
    need = estimate(config, device_type="cpu")
    assert need.activations == pytest.approx(alive, rel=0.1)
    trained, frozen = (sum(p.nbytes for p in module.parameters()) for module in (net, loss))
    assert need.weights == 4 * trained + frozen * (1.5 if precision == "fp16" else 1)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_training_step_is_the_same_with_either_engine(precision: str) -> None:
    gentle = SHALLOW.model_copy(update={"content_weight": 1e-4, "style_weight": 1e-4, "tv_weight": 1e-4})
    loss, batch = make_loss(gentle), torch.randint(0, 256, (1, 16, 16, 3), dtype=torch.uint8, generator=seeded())
    terms, gradients = {}, {}
    for engine in ("fused", "autograd"):
        settings = [f"train.engine={engine}", f"train.precision={precision}"]
        config = load_config(preset="vgg-conv3", assignments=settings, environment={})
        net = TransformNet("johnson", generator=seeded()).train()
        terms[engine] = numbers(NetTrainer(net, loss, config.train, torch.device("cpu")).train_step(1, batch))
        gradients[engine] = torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])
    assert terms["fused"] == pytest.approx(terms["autograd"], rel=1e-5 if precision == "fp32" else 1e-2)
    difference = (gradients["fused"] - gradients["autograd"]).norm() / gradients["autograd"].norm()
    assert float(difference) < (1e-4 if precision == "fp32" else 0.05)


def test_train_resume_with_the_other_engine(few_photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_small(monkeypatch)
    out = tmp_path / "run"
    train_small(small_config(few_photos, "train.steps=2"), out)
    other = small_config(few_photos, "train.steps=3", "train.engine=autograd")
    with pytest.raises(UserError, match=r'train.engine was "fused", is now "autograd"'):
        train_small(other, out, resume=True)
    messages = train_small(other, out, resume=True, allow_changes=True)
    assert 'goes on, though train.engine was "fused", is now "autograd"' in messages
    assert [row["step"] for row in logged(out)] == [1, 2, 3]


def test_fused_loss_has_deterministic_algorithms() -> None:
    loss = make_loss(ANYWHERE)
    stylized, content = images(1, 3, 16, 16, seed=1), images(1, 3, 16, 16, seed=2)
    torch.use_deterministic_algorithms(True)
    try:
        first, again = (fused(loss, stylized, content) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert numbers(first[0]) == numbers(again[0])
    assert torch.equal(first[1], again[1])


def test_fused_loss_refuses_wrong_arguments() -> None:
    loss = PerceptualLoss(VGG19("relu2_2", generator=seeded()), SHALLOW)
    fused_loss = FusedPerceptualLoss(loss)
    targets = fused_loss.content_targets(images(1, 3, 16, 16, seed=2))
    with pytest.raises(ValueError, match="call set_style"):
        fused_loss(images(1, 3, 16, 16, seed=1), targets)
    loss.set_style(images(1, 3, 16, 16, seed=5))
    with pytest.raises(ValueError, match=r"relu2_2 of the stylized images is \[1, 128, 8, 10\]"):
        fused_loss(images(1, 3, 16, 20, seed=1), targets)
    for call in (fused_loss.content_targets, lambda small: fused_loss(small, targets)):
        with pytest.raises(UserError, match="3×1 pixels is too small for relu2_2"):
            call(images(1, 3, 1, 3, seed=1))
