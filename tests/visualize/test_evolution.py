"""ProjectionMonitor: which maps it projects, that it follows the weights, and that it changes nothing."""

import pytest
import torch
from torch import Tensor

from fastnst.config import VisualizeConfig
from fastnst.errors import UserError
from fastnst.models.transform_net import LAYER_NAMES, TransformNet
from fastnst.models.vgg19 import VGG19
from fastnst.visualize.deconv.neurons import Neurons
from fastnst.visualize.deconv.transform_net import TransformDeconvnet
from fastnst.visualize.deconv.vgg import Deconvnet
from fastnst.visualize.evolution import ProjectionMonitor
from fastnst.visualize.sheets.render import about_grey, colour_scale

LOSS_LAYERS = ("relu2_1", "relu1_1")


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def net() -> TransformNet:
    return TransformNet("johnson", generator=_generator(0)).train()


@pytest.fixture(scope="module")
def vgg() -> VGG19:
    return VGG19("relu2_2", generator=_generator(1))


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.rand(2, 3, 24, 20, generator=_generator(2))


def _monitor(net: TransformNet, vgg: VGG19, images: Tensor, **keys: tuple[str, ...]) -> ProjectionMonitor:
    config = VisualizeConfig(**keys)
    return ProjectionMonitor(net, vgg, config, loss_layers=LOSS_LAYERS, images=images, names=["cat", "cup"])


def test_projections_of_every_monitored_map_and_image(net: TransformNet, vgg: VGG19, images: Tensor) -> None:
    monitored = {"vgg_maps": ("relu1_2:3", "relu2_2"), "transform_maps": ("conv2:5", "up2")}
    seen = dict(_monitor(net, vgg, images, **monitored).projections())
    tags = ("transform_net/conv2_map5", "transform_net/up2", "vgg_transformed/relu1_2_map3", "vgg_transformed/relu2_2")
    projections = {f"evolution/{tag}/{name}" for tag in tags for name in ("cat", "cup")}
    assert set(seen) == projections | {"strip/transform_net/cat", "strip/transform_net/cup"}
    for tag in projections:
        assert seen[tag].shape == (3, 24, 20)
        assert 0 <= float(seen[tag].min()) < 0.5 < float(seen[tag].max()) <= 1

    deconvnet = TransformDeconvnet(net)
    recording = deconvnet.record(images[1:], ["conv2"])
    expected = deconvnet.project(recording, "conv2", Neurons.every_position([0], [5]), renormalise=True)
    assert torch.equal(seen["evolution/transform_net/conv2_map5/cup"], about_grey(expected, colour_scale(expected))[0])


def test_projections_of_vgg_are_of_the_output(net: TransformNet, vgg: VGG19, images: Tensor) -> None:
    seen = dict(_monitor(net, vgg, images, vgg_maps=("relu1_2:3",), transform_maps=()).projections())
    net.eval()
    with torch.no_grad():
        output = net(images[:1]).clamp(0, 1)
    raw = Deconvnet(vgg)(output, "relu1_2", [3])[0]
    assert torch.equal(seen["evolution/vgg_transformed/relu1_2_map3/cat"], about_grey(raw, colour_scale(raw))[0])


def test_projections_default_to_the_strongest_map_of_each_loss_layer(
    net: TransformNet, vgg: VGG19, images: Tensor
) -> None:
    tags = [tag for tag, _ in _monitor(net, vgg, images, transform_maps=()).projections() if tag.endswith("/cat")]
    expected = []
    for layer, activations in vgg(images[:1], ["relu1_1", "relu2_1"]).items():
        strongest = int((activations == activations.max()).nonzero()[0, 1])
        expected.append(f"evolution/vgg_transformed/{layer}_map{strongest}/cat")
    assert tags == ["strip/transform_net/cat", *expected]


def test_projections_follow_the_weights(net: TransformNet, vgg: VGG19, images: Tensor) -> None:
    monitor = _monitor(net, vgg, images)
    before = dict(monitor.projections())
    assert all(torch.equal(image, before[tag]) for tag, image in monitor.projections())
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=_generator(3)))
    after = dict(monitor.projections())
    # An activation of relu1_1 is its filter times a number, which the scale takes away again.
    same = {tag for tag in before if torch.equal(before[tag], after[tag])}
    assert all("relu1_1" in tag for tag in same)


def test_projection_monitor_changes_no_net_and_no_random_state(net: TransformNet, vgg: VGG19, images: Tensor) -> None:
    batch_norm = TransformNet("lengstrom", "batch", generator=_generator(4)).train()
    for some_net in (net, batch_norm):
        state = {name: tensor.clone() for name, tensor in some_net.state_dict().items()}
        torch.manual_seed(5)
        monitor = _monitor(some_net, vgg, images)
        list(monitor.projections())
        list(monitor.content_strips())
        assert torch.initial_seed() == 5
        assert torch.equal(torch.rand(3), torch.rand(3, generator=_generator(5)))
        assert some_net.training
        assert all(parameter.requires_grad and parameter.grad is None for parameter in some_net.parameters())
        assert all(torch.equal(tensor, state[name]) for name, tensor in some_net.state_dict().items())


def test_projection_monitor_strips_show_photo_and_all_layers(net: TransformNet, vgg: VGG19, images: Tensor) -> None:
    monitor = _monitor(net, vgg, images)
    transform = dict(monitor.projections())["strip/transform_net/cat"]
    content = dict(monitor.content_strips())["strip/vgg_content/cat"]
    # Tiles of 24 × 20 pixels are enlarged to about a hundred: photo, layers and output; photo and two layers.
    assert transform.shape[2] > (len(LAYER_NAMES) + 2) * 80 > content.shape[2] > 3 * 80
    assert len(dict(monitor.content_strips())) == 2


def test_projection_monitor_refuses_unknown_maps(net: TransformNet, vgg: VGG19, images: Tensor) -> None:
    for keys, message in (
        ({"vgg_maps": ("relu3_1:0",)}, "relu3_1"),
        ({"vgg_maps": ("relu1_1:64",)}, "relu1_1 has no map 64; its maps are 0 … 63"),
        ({"transform_maps": ("res3:128",)}, "res3 has no map 128; its maps are 0 … 127"),
    ):
        with pytest.raises(UserError, match=message):
            _monitor(net, vgg, images, **keys)
