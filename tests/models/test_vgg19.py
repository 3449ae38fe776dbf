"""VGG19: layer names, agreement with torchvision's layout in plain PyTorch, preprocessing, cutting, errors."""

from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from fastnst.config import LOSS_LAYERS
from fastnst.errors import UserError
from fastnst.models.vgg19 import LAYERS, VGG19, WEIGHT_SHAPES, deepest_layer
from fastnst.models.weights import load_vgg19, torchvision_key

CHANNELS_LAST = torch.channels_last


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _images(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=_generator(1)).contiguous(memory_format=CHANNELS_LAST)


def _features(last: int) -> nn.Sequential:
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


def test_loss_layers_of_the_configuration_are_vgg19s() -> None:
    assert tuple(layer for layer in LAYERS if not layer.startswith(("fc", "relu6", "relu7"))) == _in_order(LOSS_LAYERS)
    assert LAYERS[0] == "conv1_1"
    assert LAYERS[-6:] == ("pool5", "fc6", "relu6", "fc7", "relu7", "fc8")
    assert len(LAYERS) == 16 * 2 + 5 + 5


def _in_order(names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(sorted(names, key=LAYERS.index))


def test_it_has_as_many_parameters_as_the_paper_says() -> None:
    with torch.device("meta"):
        net = VGG19("fc8")
    assert sum(parameter.numel() for parameter in net.parameters()) == 143_667_240
    assert not any(parameter.requires_grad for parameter in net.parameters())
    assert not net.training


def test_features_agree_with_torchvisions_layout() -> None:
    net = VGG19("pool4", generator=_generator())
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.ndim == 1:
                parameter.normal_(0, 0.1, generator=_generator(2))
    plain = _features(27)
    state = OrderedDict(
        (name.replace(layer, torchvision_key(layer).removeprefix("features.")), tensor)
        for name, tensor in net.state_dict().items()
        for layer in [name.partition(".")[0]]
    )
    plain.load_state_dict(state)
    x = _images(2, 3, 37, 50)
    normal = (x - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    outputs = net(x, net.layers)
    assert tuple(outputs) == net.layers
    y = normal
    for module, name in zip(plain, net.layers, strict=True):
        y = module(y)
        torch.testing.assert_close(outputs[name], y, rtol=1e-3, atol=1e-4)
        assert outputs[name].is_contiguous(memory_format=CHANNELS_LAST), name


def test_the_classifier_flattens_as_torchvision_does() -> None:
    net = VGG19("fc6", generator=_generator())
    seen: list[Tensor] = []
    with torch.no_grad():
        outputs = net(_images(1, 3, 224, 224), ["pool5", "fc6"])
        pooled = outputs["pool5"]
        assert pooled.shape == (1, 512, 7, 7)
        # Channel 3, row 2, column 5 of [512, 7, 7].
        seen.append(net.fc6.weight[:, 3 * 49 + 2 * 7 + 5].clone())
        pooled[0, 3, 2, 5] += 1.0
        changed = net.fc6(pooled.contiguous())
    torch.testing.assert_close(changed - outputs["fc6"], seen[0][None], rtol=1e-3, atol=1e-4)


def test_preprocessing_by_flavour() -> None:
    red_is_one = torch.tensor([1.0, 0.0, 0.5]).view(1, 3, 1, 1)
    caffe = VGG19("conv1_1", "caffe").preprocess(red_is_one).flatten()
    torch.testing.assert_close(caffe, torch.tensor([127.5 - 103.939, -116.779, 255 - 123.68]), rtol=1e-6, atol=1e-4)
    torchvision = VGG19("conv1_1").preprocess(red_is_one).flatten()
    expected = torch.tensor([(1 - 0.485) / 0.229, -0.456 / 0.224, (0.5 - 0.406) / 0.225])
    torch.testing.assert_close(torchvision, expected)


def test_nothing_behind_the_deepest_asked_layer_runs() -> None:
    net = VGG19("relu2_2", generator=_generator())
    ran: list[str] = []
    for name, module in net.named_children():
        module.register_forward_hook(lambda _module, _inputs, _output, name=name: ran.append(name))
    assert tuple(dict(net.named_children())) == net.layers == LAYERS[: LAYERS.index("relu2_2") + 1]
    assert list(net(_images(1, 3, 16, 16), ["relu1_2", "relu1_1"])) == ["relu1_1", "relu1_2"]
    assert ran == ["conv1_1", "relu1_1", "conv1_2", "relu1_2"]


def test_a_convolutions_output_survives_its_relu() -> None:
    net = VGG19("relu1_2", generator=_generator())
    x = _images(1, 3, 16, 16)
    both = net(x, ["conv1_1", "relu1_1", "relu1_2"])
    assert float(both["conv1_1"].min()) < 0
    assert torch.equal(both["conv1_1"].relu(), both["relu1_1"])
    alone = net(x, ["relu1_2"])["relu1_2"]
    assert torch.equal(alone, both["relu1_2"])


def test_the_gradient_reaches_the_image_and_stops_at_the_weights() -> None:
    net = VGG19("relu2_1", generator=_generator())
    x = _images(1, 3, 12, 14).requires_grad_()
    dy = torch.randn(1, 128, 6, 7, generator=_generator(3))
    (net(x, ["relu2_1"])["relu2_1"] * dy).sum().backward()
    assert x.grad is not None
    assert x.grad.is_contiguous(memory_format=CHANNELS_LAST)
    assert float(x.grad.abs().sum()) > 0
    assert all(parameter.grad is None for parameter in net.parameters())
    step = torch.randn(x.shape, generator=_generator(4))
    with torch.no_grad():
        double = VGG19("relu2_1", generator=_generator()).double()

        def value(image: Tensor) -> float:
            return float((double(image.double(), ["relu2_1"])["relu2_1"] * dy).sum())

        numeric = (value(x + 1e-5 * step) - value(x - 1e-5 * step)) / 2e-5
    assert float((x.grad * step).sum()) == pytest.approx(numeric, rel=1e-2)


def test_a_shallower_net_has_the_same_first_layers() -> None:
    shallow, deep = VGG19("relu1_2", generator=_generator()), VGG19("relu3_1", generator=_generator())
    for name, parameter in shallow.named_parameters():
        assert torch.equal(parameter, deep.get_parameter(name))
    std = float(deep.conv3_1.weight.std())
    assert std == pytest.approx((2 / (128 * 9)) ** 0.5, rel=0.02)


def test_weights_are_channels_last() -> None:
    for name, parameter in VGG19("relu2_2").named_parameters():
        if parameter.ndim == 4:
            assert parameter.is_contiguous(memory_format=CHANNELS_LAST), name
            assert tuple(parameter.shape) == WEIGHT_SHAPES[name.partition(".")[0]]


@pytest.mark.parametrize(
    ("layers", "deepest"),
    [(["relu1_1"], "relu1_1"), (["relu4_2", "relu1_1"], "relu4_2"), (["pool5", "conv5_4", "fc8"], "fc8")],
)
def test_deepest_layer(layers: list[str], deepest: str) -> None:
    assert deepest_layer(layers) == deepest


def test_bad_layers() -> None:
    with pytest.raises(UserError, match="did you mean 'relu4_2'"):
        VGG19("relu42")
    with pytest.raises(UserError, match="torchvision, caffe"):
        VGG19("relu1_1", "tensorflow")
    net = VGG19("relu1_2")
    with pytest.raises(UserError, match=r"relu2_1 lies behind relu1_2"):
        net(_images(1, 3, 16, 16), ["relu2_1"])
    with pytest.raises(UserError, match="no VGG19 layer is named 'relu1_3'"):
        net(_images(1, 3, 16, 16), ["relu1_3"])
    with pytest.raises(UserError, match="at least one"):
        net(_images(1, 3, 16, 16), [])


@pytest.mark.parametrize(("layer", "smallest"), [("relu1_2", 1), ("pool1", 2), ("relu2_1", 2), ("relu3_1", 4)])
def test_a_image_too_small_for_the_deepest_layer(layer: str, smallest: int) -> None:
    net = VGG19(layer)
    assert net(_images(1, 3, smallest, 9), [layer])[layer].shape[2] == 1
    if smallest > 1:
        with pytest.raises(UserError, match=f"9×{smallest - 1} pixels is too small for {layer}.*{smallest}×{smallest}"):
            net(_images(1, 3, smallest - 1, 9), [layer])
    with pytest.raises(UserError, match=r"\[N, 3, H, W\]"):
        net(torch.zeros(1, 1, 9, 9), [layer])


def test_it_compiles_without_graph_breaks() -> None:
    net = VGG19("relu2_1", generator=_generator())
    x = _images(1, 3, 16, 18)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True, dynamic=False)
    torch.testing.assert_close(compiled(x, ("relu1_1", "relu2_1")), net(x, ("relu1_1", "relu2_1")))


def test_real_weights_see_a_real_photo(weights: Path, content: Path) -> None:
    """Caffe's features of a photo lie in the hundreds and grow with depth; torchvision's would stay below ten."""
    net = load_vgg19(
        str(weights / "vgg19_caffe_conv1_1-conv3_4.pth"), last_layer="relu3_4", notify=lambda _message: None
    )
    assert net.flavour == "caffe"
    photo = Image.open(content / "content_chicago.jpg").convert("RGB").resize((96, 64))
    x = torch.from_numpy(np.array(photo)).permute(2, 0, 1)[None] / 255.0
    outputs = net(x, ["relu1_1", "relu3_4"])
    for activation in outputs.values():
        assert bool(torch.isfinite(activation).all())
    assert 10 < float(outputs["relu1_1"].mean()) < 100
    assert 200 < float(outputs["relu3_4"].mean()) < 2000
    assert 0.2 < float((outputs["relu3_4"] == 0).float().mean()) < 0.6
