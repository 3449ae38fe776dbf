"""From bytes through the transform net into the loss network and back, against autograd."""

import math

import pytest
import torch
from torch import Tensor

from fastnst.config import LossConfig, load_config
from fastnst.losses.fused import FusedPerceptualLoss
from fastnst.losses.perceptual import LossTerms, PerceptualLoss
from fastnst.models.architectures import ARCHITECTURES
from fastnst.models.transform_net import TransformNet
from fastnst.models.vgg19 import VGG19
from fastnst.training.step.train_step import NetTrainer, as_images, to_unit
from helpers.random_inputs import seeded
from helpers.tolerances import FLOOR

SIZES = [(16, 16), (17, 22)]  # odd sides move the image within the larger output of TF "SAME"
LOSS = LossConfig(content_layers=("relu1_2",), style_layers=("relu1_1", "relu2_1"), tv_weight=0.5)


def batch_of(height: int, width: int) -> Tensor:
    return torch.randint(0, 256, (2, height, width, 3), dtype=torch.uint8, generator=seeded())


def loss_in(dtype: torch.dtype, flavour: str, **changes: object) -> PerceptualLoss:
    vgg = VGG19("relu2_1", flavour, generator=seeded())
    loss = PerceptualLoss(vgg, LOSS.model_copy(update=changes)).to(dtype)
    loss.set_style(torch.rand(1, 3, 32, 32, generator=seeded(1)).to(dtype))
    return loss


def numbers(terms: LossTerms) -> list[float]:
    return [float(term) for term in (terms.total, terms.content, terms.style, terms.tv, *terms.layers.values())]


@pytest.mark.parametrize(
    ("reduction", "flavour", "size"),
    [("mean", "caffe", (17, 22)), ("sum", "torchvision", (17, 22)), ("mean", "torchvision", (16, 16))],
)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_loss_and_grad_is_autograd(architecture: str, reduction: str, flavour: str, size: tuple[int, int]) -> None:
    """In fp64, to 1e-10: the terms, and the gradient at the last layer."""
    net = TransformNet(architecture, generator=seeded()).double()
    loss = loss_in(torch.float64, flavour, tv_reduction=reduction)
    batch = batch_of(*size)
    content = batch.permute(0, 3, 1, 2).double() / 255
    last: list[Tensor] = []
    hook = net.out.register_forward_hook(lambda _, __, made: last.append(made))
    expected = loss(net(content), content)
    hook.remove()
    (wanted,) = torch.autograd.grad(expected.total, last)
    images = as_images(batch)
    pre_activation = net(images, pre_activation=True)
    assert pre_activation.dtype == torch.float64
    fused_loss = FusedPerceptualLoss(loss)
    mapping = net.output_mapping(pre_activation.shape[2:], size)
    terms, gradient = fused_loss.loss_and_grad(pre_activation.detach(), mapping, fused_loss.content_targets(images))
    assert numbers(terms) == pytest.approx(numbers(expected.detach()), rel=1e-10)
    assert gradient.shape == pre_activation.shape
    assert float((gradient - wanted).abs().max()) <= 1e-10 * float(wanted.abs().max())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_loss_and_grad_errs_no_more_than_autograd(architecture: str, dtype: torch.dtype) -> None:
    """By the rule of `tolerances.py`, in the norm, from one pre-activation in 16 bits."""
    net = TransformNet(architecture, generator=seeded())
    exact, loss = (loss_in(wide, "caffe") for wide in (torch.float64, torch.float32))
    batch = batch_of(17, 22)
    images, content = as_images(batch), to_unit(batch)
    with torch.autocast("cpu", dtype=dtype), torch.no_grad():
        pre_activation = net(images, pre_activation=True)
    assert pre_activation.dtype == dtype
    mapping = net.output_mapping(pre_activation.shape[2:], images.shape[2:])
    (top, left, height, width), tanh, factor, offset = mapping

    def plain(of: PerceptualLoss, kind: torch.dtype, autocast: bool) -> tuple[list[float], Tensor]:
        leaf = pre_activation.to(pre_activation.dtype if autocast else kind).requires_grad_()
        inner = leaf[:, :, top : top + height, left : left + width].to(kind)
        stylized = factor * (inner.tanh() if tanh else inner) + offset
        with torch.autocast("cpu", dtype=dtype, enabled=autocast):
            terms = of(stylized, content.to(kind))
        (gradient,) = torch.autograd.grad(terms.total, leaf)
        return numbers(terms.detach()), gradient.double()

    (truths, truth), (peers, peer) = plain(exact, torch.float64, False), plain(loss, torch.float32, True)
    fused_loss = FusedPerceptualLoss(loss, dtype)
    terms, gradient = fused_loss.loss_and_grad(pre_activation, mapping, fused_loss.content_targets(images))
    assert gradient.dtype == dtype
    error, peer_error = (float((g.double() - truth).norm()) for g in (gradient, peer))
    assert error <= 2 * peer_error + FLOOR[dtype] * float(truth.norm())
    for own, theirs, true in zip(numbers(terms), peers, truths, strict=True):
        assert abs(own - true) <= 2 * abs(theirs - true) + FLOOR[dtype] * abs(true)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_forward_of_bytes_is_that_of_floating_images(architecture: str, size: tuple[int, int]) -> None:
    net, batch = TransformNet(architecture, generator=seeded()), batch_of(*size)
    with torch.no_grad():
        floating, direct = net(to_unit(batch)), net(as_images(batch))
        exact = net.double()(to_unit(batch).double())
    assert direct.dtype == torch.float32
    assert direct.is_contiguous(memory_format=torch.channels_last)
    error, floats = (float((made.double() - exact).abs().max()) for made in (direct, floating))
    assert error <= 2 * floats + FLOOR[torch.float32]


def test_forward_casts_bytes_to_the_type_of_convolutions() -> None:
    seen: list[torch.dtype] = []
    net = TransformNet("johnson", generator=seeded())
    net.conv1.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
    images = as_images(batch_of(16, 16))
    with torch.no_grad():
        net(images)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            net(images)
        net.double()(images)
    assert seen == [torch.float32, torch.bfloat16, torch.float64]


def test_forward_of_floating_images_has_a_gradient() -> None:
    for architecture in ARCHITECTURES:
        net = TransformNet(architecture, generator=seeded())
        x = torch.rand(1, 3, 17, 16, generator=seeded(2)).requires_grad_()
        (gradient,) = torch.autograd.grad(net(x).square().sum(), x)
        assert gradient.isfinite().all()
        assert gradient.any()


def test_training_step_makes_no_floating_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the two networks are only the pre-activation and φ's input."""
    config = load_config(preset="johnson", assignments=["train.precision=bf16"], environment={})
    net, loss = TransformNet("johnson", generator=seeded()).train(), loss_in(torch.float32, "torchvision")
    seen: list[tuple[torch.dtype, bool]] = []
    forward = TransformNet.forward

    def noted(self: TransformNet, x: Tensor, *, pre_activation: bool = False) -> Tensor:
        made = forward(self, x, pre_activation=pre_activation)
        seen.extend(((x.dtype, x.requires_grad), (made.dtype, made.requires_grad)))
        return made

    monkeypatch.setattr(TransformNet, "forward", noted)
    monkeypatch.setattr(
        "fastnst.training.step.train_step.to_unit", lambda _: pytest.fail("the images were made floating")
    )
    terms = NetTrainer(net, loss, config.train, torch.device("cpu")).train_step(1, batch_of(16, 16))
    assert math.isfinite(float(terms.total))
    assert seen == [(torch.uint8, False), (torch.bfloat16, True)]


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_loss_and_grad_of_nonfinite_values(architecture: str, value: float) -> None:
    """A tanh hides an infinity, as in autograd; nothing hides a NaN."""
    net, loss = TransformNet(architecture), loss_in(torch.float32, "caffe", tv_weight=0.0)
    fused_loss, content = FusedPerceptualLoss(loss), as_images(batch_of(16, 16))
    pre_activation = torch.rand(2, 3, 16, 16, generator=seeded()).contiguous(memory_format=torch.channels_last)
    pre_activation[1, 2, 3, 4] = value
    targets = fused_loss.content_targets(content)
    terms, gradient = fused_loss.loss_and_grad(pre_activation, net.output_mapping((16, 16), (16, 16)), targets)
    hidden = ARCHITECTURES[architecture].tanh and value == math.inf
    assert math.isfinite(float(terms.total)) == hidden
    assert bool(gradient.isfinite().all()) == bool(gradient.isfinite().any()) == hidden
