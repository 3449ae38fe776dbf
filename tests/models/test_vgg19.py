"""VGG19: layer names, agreement with torchvision's layout in plain PyTorch, preprocessing, depth, errors."""

import math
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from fastnst.config import LOSS_LAYERS
from fastnst.errors import UserError
from fastnst.models.vgg19 import LAYERS, VGG19, WEIGHT_SHAPES, FirstLinear, deepest_layer
from fastnst.models.weights import load_vgg19, torchvision_key
from helpers.random_inputs import images, seeded

CHANNELS_LAST = torch.channels_last


def _torchvision_features(last: int) -> nn.Sequential:
    """torchvision's `vgg19().features`, from its published configuration E, without torchvision."""
    modules: list[nn.Module] = []
    channels = 3
    for entry in (64, 64, "M", 128, 128, "M", *([256] * 4), "M", *([512] * 4), "M", *([512] * 4), "M"):
        if isinstance(entry, int):
            modules += [nn.Conv2d(channels, entry, 3, padding=1), nn.ReLU()]
            channels = entry
        else:
            modules.append(nn.MaxPool2d(2))
    return nn.Sequential(*modules[: last + 1])


def test_layers_are_those_of_the_paper_and_the_configuration() -> None:
    loss_layers = [layer for layer in LAYERS if not layer.startswith(("fc", "relu6", "relu7"))]
    assert loss_layers == sorted(LOSS_LAYERS, key=LAYERS.index)
    assert LAYERS[0] == "conv1_1"
    assert LAYERS[-6:] == ("pool5", "fc6", "relu6", "fc7", "relu7", "fc8")
    assert len(LAYERS) == 16 * 2 + 5 + 5
    assert sum(math.prod(shape) + shape[0] for shape in WEIGHT_SHAPES.values()) == 143_667_240


def test_vgg19_agrees_with_torchvisions_layout() -> None:
    net = VGG19("pool4", generator=seeded())
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.ndim == 1:
                parameter.normal_(0, 0.1, generator=seeded(2))
    plain = _torchvision_features(27)
    state = OrderedDict(
        (name.replace(layer, torchvision_key(layer).removeprefix("features.")), tensor)
        for name, tensor in net.state_dict().items()
        for layer in [name.partition(".")[0]]
    )
    plain.load_state_dict(state)
    x = images(2, 3, 21, 34)
    y = (x - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    outputs = net(x, net.layers)
    assert tuple(outputs) == net.layers
    for module, name in zip(plain, net.layers, strict=True):
        y = module(y)
        torch.testing.assert_close(outputs[name], y, rtol=1e-3, atol=1e-4)
        assert outputs[name].is_contiguous(memory_format=CHANNELS_LAST), name


def test_first_linear_flattens_as_torchvision() -> None:
    """[C, H, W] in this order, whatever the memory layout."""
    layer = FirstLinear(512 * 49, 3)
    pooled = images(2, 512, 7, 7)
    expected = torch.einsum("nchw,kchw->nk", pooled, layer.weight.view(3, 512, 7, 7)) + layer.bias
    torch.testing.assert_close(layer(pooled), expected, rtol=1e-4, atol=1e-5)


def test_preprocess_by_flavour() -> None:
    red_is_one = torch.tensor([1.0, 0.0, 0.5]).view(1, 3, 1, 1)
    caffe = VGG19("conv1_1", "caffe").preprocess(red_is_one).flatten()
    torch.testing.assert_close(caffe, torch.tensor([127.5 - 103.939, -116.779, 255 - 123.68]), rtol=1e-6, atol=1e-4)
    torchvision = VGG19("conv1_1").preprocess(red_is_one).flatten()
    expected = torch.tensor([(1 - 0.485) / 0.229, -0.456 / 0.224, (0.5 - 0.406) / 0.225])
    torch.testing.assert_close(torchvision, expected)


def test_forward_runs_nothing_beyond_the_deepest_layer() -> None:
    net = VGG19("relu2_2", generator=seeded())
    ran: list[str] = []
    for name, module in net.named_children():
        module.register_forward_hook(lambda _module, _inputs, _output, name=name: ran.append(name))
    assert tuple(dict(net.named_children())) == net.layers == LAYERS[: LAYERS.index("relu2_2") + 1]
    assert list(net(images(1, 3, 16, 16), ["relu1_2", "relu1_1"])) == ["relu1_1", "relu1_2"]
    assert ran == ["conv1_1", "relu1_1", "conv1_2", "relu1_2"]


def test_gradient_reaches_the_image_and_not_the_weights() -> None:
    net = VGG19("relu2_1", generator=seeded())
    assert not net.training
    x = images(1, 3, 12, 14).requires_grad_()
    dy = torch.randn(1, 128, 6, 7, generator=seeded(3))
    (net(x, ["relu2_1"])["relu2_1"] * dy).sum().backward()
    assert x.grad is not None
    assert x.grad.is_contiguous(memory_format=CHANNELS_LAST)
    assert all(not parameter.requires_grad and parameter.grad is None for parameter in net.parameters())
    step = torch.randn(x.shape, generator=seeded(4))
    with torch.no_grad():
        double = VGG19("relu2_1", generator=seeded()).double()

        def value(image: Tensor) -> float:
            return float((double(image.double(), ["relu2_1"])["relu2_1"] * dy).sum())

        numeric = (value(x + 1e-5 * step) - value(x - 1e-5 * step)) / 2e-5
    assert float((x.grad * step).sum()) == pytest.approx(numeric, rel=1e-2)


def test_initial_weights_do_not_depend_on_depth() -> None:
    shallow, deep = VGG19("relu1_2", generator=seeded()), VGG19("relu3_1", generator=seeded())
    for name, parameter in shallow.named_parameters():
        assert torch.equal(parameter, deep.get_parameter(name))
    assert float(deep.conv3_1.weight.std()) == pytest.approx((2 / (128 * 9)) ** 0.5, rel=0.02)
    for name, parameter in deep.named_parameters():
        if parameter.ndim == 4:
            assert parameter.is_contiguous(memory_format=CHANNELS_LAST), name
            assert tuple(parameter.shape) == WEIGHT_SHAPES[name.partition(".")[0]]


def test_deepest_layer() -> None:
    assert deepest_layer(["relu4_2", "relu1_1"]) == "relu4_2"
    assert deepest_layer(["pool5", "conv5_4", "fc8"]) == "fc8"


def test_vgg19_names_unknown_and_missing_layers() -> None:
    with pytest.raises(UserError, match="did you mean 'relu4_2'"):
        VGG19("relu42")
    with pytest.raises(UserError, match="torchvision, caffe"):
        VGG19("relu1_1", "tensorflow")
    net = VGG19("relu1_2")
    for layers, message in (
        (["relu2_1"], "relu2_1 lies behind relu1_2"),
        (["relu1_3"], "no VGG19 layer is named 'relu1_3'"),
        ([], "at least one"),
    ):
        with pytest.raises(UserError, match=message):
            net(images(1, 3, 16, 16), layers)
    with pytest.raises(UserError, match=r"\[N, 3, H, W\]"):
        net(torch.zeros(1, 1, 9, 9), ["relu1_2"])


@pytest.mark.parametrize(("layer", "smallest"), [("relu1_2", 1), ("pool1", 2), ("relu2_1", 2), ("relu3_1", 4)])
def test_forward_refuses_images_too_small_for_the_layer(layer: str, smallest: int) -> None:
    net = VGG19(layer)
    assert net(images(1, 3, smallest, 9), [layer])[layer].shape[2] == 1
    if smallest > 1:
        with pytest.raises(UserError, match=f"9×{smallest - 1} pixels is too small for {layer}.*{smallest}×{smallest}"):
            net(images(1, 3, smallest - 1, 9), [layer])


def test_vgg19_real_weights_on_a_photo(weights: Path, content: Path) -> None:
    """Caffe's features of a photo are in the hundreds and grow with depth; torchvision's would stay below ten."""
    net = load_vgg19(str(weights / "vgg19_caffe_conv1_1-conv3_4.pth"), last_layer="relu3_4")
    assert net.flavour == "caffe"
    photo = Image.open(content / "content_chicago.jpg").convert("RGB").resize((96, 64))
    x = torch.from_numpy(np.array(photo)).permute(2, 0, 1)[None] / 255.0
    outputs = net(x, ["relu1_1", "relu3_4"])
    for activation in outputs.values():
        assert bool(torch.isfinite(activation).all())
    assert 10 < float(outputs["relu1_1"].mean()) < 100
    assert 200 < float(outputs["relu3_4"].mean()) < 2000
    assert 0.2 < float((outputs["relu3_4"] == 0).float().mean()) < 0.6
