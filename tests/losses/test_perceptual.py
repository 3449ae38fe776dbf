"""The perceptual loss against its equations in plain PyTorch, the presets' published formulas, finite differences."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fastnst.config import LossConfig, load_config
from fastnst.errors import UserError
from fastnst.losses.perceptual import UNIT_TO_255, PerceptualLoss, total_variation
from fastnst.models.vgg19 import VGG19
from fastnst.models.weights import load_vgg19
from helpers.random_inputs import images, seeded

SHALLOW = LossConfig(
    content_layers=("relu2_2", "relu1_2"),
    style_layers=("relu1_1", "relu3_1"),
    style_layer_weights=(0.5, 2.0),
    content_weight=3.0,
    style_weight=7.0,
    tv_weight=0.25,
)


def _vgg(last_layer: str = "relu3_1", flavour: str = "caffe") -> VGG19:
    return VGG19(last_layer, flavour, generator=seeded())


def _loss(config: LossConfig = SHALLOW, flavour: str = "caffe") -> PerceptualLoss:
    loss = PerceptualLoss(_vgg("relu3_1", flavour), config)
    loss.set_style(images(1, 3, 21, 30, seed=5))
    return loss


def _gram(activation: Tensor) -> Tensor:
    """Equation 3, entry by entry of the sum: [N, C, H, W] → [N, C, C]."""
    _, channels, height, width = activation.shape
    return torch.einsum("nchw,ndhw->ncd", activation, activation) / (channels * height * width)


@pytest.mark.parametrize(("style_reduction", "tv_reduction"), [("sum", "mean"), ("mean", "sum")])
def test_perceptual_loss_is_equations_2_to_4(style_reduction: str, tv_reduction: str) -> None:
    config = SHALLOW.model_copy(update={"style_reduction": style_reduction, "tv_reduction": tv_reduction})
    vgg = _vgg()
    loss = PerceptualLoss(vgg, config)
    style, stylized, content = images(1, 3, 21, 30, seed=5), images(2, 3, 16, 20), images(2, 3, 16, 20, seed=2)
    loss.set_style(style)
    terms = loss(stylized, content)

    exact = _vgg().double()
    layers = ("relu1_1", "relu1_2", "relu2_2", "relu3_1")
    y, x, s = (exact(image.double(), layers) for image in (stylized, content, style))
    expected: dict[str, float] = {}
    for layer in ("relu2_2", "relu1_2"):
        size = math.prod(y[layer].shape[1:])
        per_image = (y[layer] - x[layer]).square().sum((1, 2, 3)) / size
        expected[f"content/{layer}"] = 3.0 * float(per_image.mean())
    for layer, weight in (("relu1_1", 0.5), ("relu3_1", 2.0)):
        per_image = (_gram(y[layer]) - _gram(s[layer])).square().sum((1, 2))
        channels = y[layer].shape[1]
        scale = 1.0 if style_reduction == "sum" else 1.0 / channels**2
        expected[f"style/{layer}"] = 7.0 * weight * scale * float(per_image.mean())
    pixels = stylized.double() * 255
    down, right = pixels[:, :, 1:] - pixels[:, :, :-1], pixels[..., 1:] - pixels[..., :-1]
    if tv_reduction == "sum":
        tv = 0.25 * float(down.square().sum() + right.square().sum()) / 2
    else:
        tv = 0.25 * float(down.square().mean() + right.square().mean())

    assert list(terms.layers) == ["content/relu2_2", "content/relu1_2", "style/relu1_1", "style/relu3_1"]
    for name, value in expected.items():
        assert float(terms.layers[name]) == pytest.approx(value, rel=1e-4), name
    assert float(terms.tv) == pytest.approx(tv, rel=1e-5)
    content_sum = sum(value for name, value in expected.items() if name.startswith("content"))
    style_sum = sum(value for name, value in expected.items() if name.startswith("style"))
    assert float(terms.content) == pytest.approx(content_sum, rel=1e-4)
    assert float(terms.style) == pytest.approx(style_sum, rel=1e-4)
    assert float(terms.total) == pytest.approx(content_sum + style_sum + tv, rel=1e-4)
    for term in (terms.total, terms.content, terms.style, terms.tv, *terms.layers.values()):
        assert term.shape == ()
        assert term.dtype == torch.float32


def test_total_variation_by_hand() -> None:
    image = torch.tensor([[[[0.0, 1.0, 3.0], [0.0, 0.0, 0.0]]]])
    # Down: 0, 1, 9. Right: 1, 4, 0, 0.
    assert float(total_variation(image, "sum")) == pytest.approx(10 + 5)
    assert float(total_variation(image)) == pytest.approx(10 / 3 + 5 / 4)
    assert float(total_variation(torch.cat([image, 0 * image]), "sum")) == pytest.approx(15 / 2)


def test_forward_runs_vgg_only_as_deep_as_needed() -> None:
    """One pass of the stylized batch to relu3_1; one without gradient of the content to relu2_2."""
    loss = _loss()
    passes: list[tuple[str, bool]] = []
    for name, module in loss.vgg.named_children():
        module.register_forward_hook(
            lambda _module, _inputs, output, name=name: passes.append((name, output.requires_grad))
        )
    stylized = images(1, 3, 16, 16).requires_grad_()
    content = images(1, 3, 16, 16, seed=2).requires_grad_()
    loss(stylized, content).total.backward()
    assert content.grad is None
    assert stylized.grad is not None
    assert all(parameter.grad is None for parameter in loss.parameters())
    names = ["conv1_1", "conv1_2", "conv2_1", "conv2_2"]
    convolutions = [(name, graph) for name, graph in passes if name.startswith("conv")]
    assert convolutions == [(name, True) for name in [*names, "conv3_1"]] + [(name, False) for name in names]


def _lengstrom_formula(vgg: VGG19, config: LossConfig, y: Tensor, x: Tensor, s: Tensor) -> list[float]:
    """The terms of lengstrom and hwalsuklee, on 0-255 pixels; their `l2_loss` is half a sum of squares."""

    def l2_loss(difference: Tensor) -> float:
        return float(difference.square().sum()) / 2

    batch = y.shape[0]
    layers = (*config.content_layers, *config.style_layers)
    of_y, of_x, of_s = vgg(y, layers), vgg(x, layers), vgg(s, layers)
    layer = config.content_layers[0]
    content = config.content_weight * 2 * l2_loss(of_y[layer] - of_x[layer]) / of_x[layer].numel()
    style = 0.0
    for layer, weight in zip(config.style_layers, config.style_layer_weights or (1.0,) * 9, strict=False):
        grams = []
        for activation in (of_y[layer], of_s[layer]):
            count, channels, height, width = activation.shape
            flat = activation.permute(0, 2, 3, 1).reshape(count, height * width, channels)
            grams.append(flat.transpose(1, 2) @ flat / (height * width * channels))
        style += weight * 2 * l2_loss(grams[0] - grams[1]) / grams[1].numel()
    style = config.style_weight * style / batch
    pixels = y * 255
    down, right = pixels[:, :, 1:] - pixels[:, :, :-1], pixels[..., 1:] - pixels[..., :-1]
    tv = 2 * (l2_loss(down) / down[0].numel() + l2_loss(right) / right[0].numel()) / batch
    return [content, style, config.tv_weight * tv]


@pytest.mark.parametrize("preset", ["hwalsuklee", "lengstrom"])
def test_perceptual_loss_of_the_tensorflow_presets(preset: str) -> None:
    config = load_config(preset=preset, environment={}).loss
    stylized, content, style = (images(2, 3, 32, 36), images(2, 3, 32, 36, seed=2), images(1, 3, 40, 33, seed=5))
    loss = PerceptualLoss(_vgg("relu5_1"), config)
    loss.set_style(style)
    terms = loss(stylized, content)
    exact = _lengstrom_formula(_vgg("relu5_1").double(), config, stylized.double(), content.double(), style.double())
    for actual, expected in zip((terms.content, terms.style, terms.tv), exact, strict=True):
        assert float(actual) == pytest.approx(expected, rel=1e-3)


def test_perceptual_loss_of_the_johnson_preset() -> None:
    """Mean squared errors of features and of Grams, in torchvision's scale."""
    config = load_config(preset="johnson", environment={}).loss
    stylized, content, style = (images(2, 3, 24, 28), images(2, 3, 24, 28, seed=2), images(1, 3, 30, 26, seed=5))
    vgg = _vgg("relu4_3", "torchvision")
    loss = PerceptualLoss(vgg, config)
    loss.set_style(style)
    terms = loss(stylized, content)
    y, x, s = (vgg(image, config.style_layers) for image in (stylized, content, style))
    mse = torch.nn.functional.mse_loss
    assert float(terms.content) == pytest.approx(1e5 * float(mse(y["relu2_2"], x["relu2_2"])), rel=1e-4)
    grams = [(_gram(y[layer]), _gram(s[layer]).expand(2, -1, -1)) for layer in config.style_layers]
    assert float(terms.style) == pytest.approx(1e10 * sum(float(mse(a, b)) for a, b in grams), rel=1e-3)
    assert float(terms.tv) == 0.0


def test_feature_scale_makes_weights_apply_to_either_flavour() -> None:
    """One φ without biases, as Caffe's net and as torchvision's, whose inputs then differ by the factor s alone."""
    stylized, content = images(1, 3, 16, 20), images(1, 3, 16, 20, seed=2)
    results: dict[tuple[str, str], list[float]] = {}
    for flavour in ("caffe", "torchvision"):
        for scale in ("0-255", "unit"):
            vgg = _vgg("relu3_1", flavour)
            if flavour == "torchvision":
                with torch.no_grad():
                    vgg.mean.copy_(VGG19("conv1_1", "caffe").mean)
                    vgg.gain.fill_(255 / UNIT_TO_255)
                    vgg.conv1_1.weight.copy_(_vgg("relu3_1").conv1_1.weight.flip(1))
            loss = PerceptualLoss(vgg, SHALLOW.model_copy(update={"feature_scale": scale}))
            loss.set_style(images(1, 3, 21, 30, seed=5))
            terms = loss(stylized, content)
            results[flavour, scale] = [float(terms.content), float(terms.style), float(terms.tv)]
    assert pytest.approx(57.63, abs=0.01) == UNIT_TO_255
    for scale in ("0-255", "unit"):
        assert results["caffe", scale] == pytest.approx(results["torchvision", scale], rel=1e-3)
    content_ratio, style_ratio, tv_ratio = (
        large / small for large, small in zip(results["caffe", "0-255"], results["caffe", "unit"], strict=True)
    )
    assert content_ratio == pytest.approx(UNIT_TO_255**2, rel=1e-4)
    assert style_ratio == pytest.approx(UNIT_TO_255**4, rel=1e-4)
    assert tv_ratio == pytest.approx(255**2, rel=1e-5)


def test_autocast_keeps_sums_and_style_grams_in_fp32() -> None:
    stylized, content = images(2, 3, 32, 32), images(2, 3, 32, 32, seed=2)
    exact = _loss()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = _loss()
        terms = mixed(stylized, content)
    assert torch.equal(mixed.get_buffer("style.relu3_1.gram"), exact.get_buffer("style.relu3_1.gram"))
    reference = exact(stylized, content)
    for term in (terms.total, terms.content, terms.style, terms.tv, *terms.layers.values()):
        assert term.dtype == torch.float32
    assert float(terms.total) != float(reference.total)
    assert float(terms.total) == pytest.approx(float(reference.total), rel=0.05)


def test_perceptual_loss_refuses_wrong_arguments() -> None:
    with pytest.raises(UserError, match="needs layer relu3_1, but the loaded VGG19 ends at relu2_2"):
        PerceptualLoss(_vgg("relu2_2"), SHALLOW)
    loss = PerceptualLoss(_vgg(), SHALLOW)
    with pytest.raises(ValueError, match="call set_style"):
        loss(images(1, 3, 16, 16), images(1, 3, 16, 16))
    with pytest.raises(UserError, match="one image"):
        loss.set_style(images(2, 3, 16, 16))
    with pytest.raises(UserError, match="3×16 pixels is too small for relu3_1"):
        loss.set_style(images(1, 3, 16, 3))
    loss.set_style(images(1, 3, 16, 16))
    with pytest.raises(ValueError, match=r"\[1, 3, 16, 16\].*\[1, 3, 16, 20\]"):
        loss(images(1, 3, 16, 16), images(1, 3, 16, 20))


def test_style_buffers_move_and_are_not_saved() -> None:
    loss = _loss()
    assert "style.relu1_1.gram" in dict(loss.named_buffers())
    assert not any("gram" in name for name in loss.state_dict())
    assert loss.to(torch.float64).get_buffer("style.relu1_1.gram").dtype == torch.float64


def test_perceptual_loss_compiles_without_graph_breaks() -> None:
    loss = _loss()
    stylized, content = images(1, 3, 16, 16).requires_grad_(), images(1, 3, 16, 16, seed=2)
    compiled = torch.compile(lambda y, x: loss(y, x).total, backend="aot_eager", fullgraph=True, dynamic=False)
    expected = loss(stylized, content).total
    actual = compiled(stylized, content)
    torch.testing.assert_close(actual, expected)
    (wanted,) = torch.autograd.grad(expected, stylized)
    (got,) = torch.autograd.grad(actual, stylized)
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))


def test_perceptual_loss_with_real_weights_gives_an_image_the_style(weights: Path, styles: Path, content: Path) -> None:
    """Ten Adam steps on the pixels with the real conv1_1 … conv3_4 reduce the style loss to a fraction."""

    def read(path: Path) -> Tensor:
        image = Image.open(path).convert("RGB").resize((64, 64))
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255.0

    config = load_config(preset="vgg-conv3", environment={}).loss
    path = weights / "vgg19_caffe_conv1_1-conv3_4.pth"
    loss = PerceptualLoss(load_vgg19(str(path), last_layer="relu3_4"), config)
    loss.set_style(read(styles / "wave_crop.jpg"))
    photo = read(content / "content_chicago.jpg")
    image = photo.clone().requires_grad_()
    optimizer = torch.optim.Adam([image], lr=0.02)
    history = []
    for _ in range(10):
        optimizer.zero_grad()
        terms = loss(image, photo)
        terms.total.backward()
        optimizer.step()
        history.append(terms)
    assert all(math.isfinite(float(terms.total.detach())) for terms in history)
    assert float(history[-1].style.detach()) < 0.3 * float(history[0].style.detach())
    assert float(history[-1].total.detach()) < 0.5 * float(history[0].total.detach())
