"""Saliency maps: hand-computed gradients, agreement with captum and autograd, what the methods promise."""

import warnings
from collections.abc import Callable

import pytest
import torch
from captum.attr import GuidedBackprop, Saliency
from torch import Tensor, nn

from fastnst.errors import UserError
from fastnst.models.vgg19 import FLAVOURS, LAYERS, VGG19
from fastnst.visualize.attribution.saliency import METHODS, saliency
from fastnst.visualize.attribution.targets import Target, parse_target, score

TARGETS = ("conv1_1:5", "relu1_1:5", "relu1_2:60", "pool1:0", "conv2_2:127", "relu2_2:3")


class AsSequential(nn.Module):
    """VGG19 up to a layer out of PyTorch's own modules, as captum wants it; each map's sum is an output."""

    def __init__(self, net: VGG19, last_layer: str) -> None:
        super().__init__()
        self.prepare = net.preprocess
        layers: list[nn.Module] = []
        for name in LAYERS[: LAYERS.index(last_layer) + 1]:
            if name.startswith("relu"):
                layers.append(nn.ReLU())
            elif name.startswith("pool"):
                layers.append(nn.MaxPool2d(2))
            else:
                ours = net.get_submodule(name)
                conv = nn.Conv2d(ours.in_channels, ours.out_channels, 3, padding=1).to(ours.weight.dtype)
                conv.load_state_dict(ours.state_dict())
                layers.append(conv)
        self.layers = nn.Sequential(*layers).requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(self.prepare(images)).sum(dim=(2, 3))


@pytest.fixture(scope="module", params=FLAVOURS)
def net(request: pytest.FixtureRequest) -> VGG19:
    net = VGG19("relu2_2", request.param, generator=torch.Generator().manual_seed(3)).double()
    for name, parameter in net.named_parameters():
        if name.endswith("bias"):
            # Biases of either sign, so that ReLUs close for that reason, too.
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4)))
    return net


@pytest.fixture
def images() -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.rand(3, 3, 13, 18, generator=generator, dtype=torch.float64)


def captum_map(method: Callable[..., Tensor], images: Tensor, target: Target) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Setting backward hooks on ReLU")
        attribution = method(images.clone().requires_grad_(), target=target.map)
    return attribution.detach().abs().amax(dim=1)


def assert_near(actual: Tensor, expected: Tensor, relative: float) -> None:
    assert actual.shape == expected.shape
    largest = expected.abs().max().item()
    assert largest > 0
    assert (actual - expected).abs().max().item() <= relative * largest


# By hand.


@pytest.fixture
def two_colours() -> VGG19:
    """conv1_1 copies red to map 0 and twice green to map 1; conv1_2's map 0 is their difference, plus a bias."""
    net = VGG19("relu1_2").double()
    for conv in (net.conv1_1, net.conv1_2):
        conv.weight.zero_()
    net.conv1_1.weight[0, 0, 1, 1] = 1
    net.conv1_1.weight[1, 1, 1, 1] = 2
    net.conv1_1.bias[:2] = 10
    net.conv1_2.weight[0, :2, 1, 1] = torch.tensor([1.0, -1.0], dtype=torch.float64)
    net.conv1_2.bias[0] = 30
    return net


def test_saliency_plain_by_hand(two_colours: VGG19) -> None:
    red, green = two_colours.gain[0].item(), two_colours.gain[1].item()
    images = torch.rand(1, 3, 4, 5, dtype=torch.float64)
    found = saliency(two_colours, images, parse_target("relu1_2:0"))
    assert 2 * green > red
    torch.testing.assert_close(found, torch.full((1, 4, 5), 2 * green, dtype=torch.float64))


def test_saliency_guided_stops_negative_gradients(two_colours: VGG19) -> None:
    images = torch.rand(1, 3, 4, 5, dtype=torch.float64)
    found = saliency(two_colours, images, parse_target("relu1_2:0"), method="guided")
    # Green's gradient is negative at relu1_1 and ends there; red's remains.
    torch.testing.assert_close(found, torch.full((1, 4, 5), two_colours.gain[0].item(), dtype=torch.float64))


def test_saliency_guided_is_zero_behind_a_closed_relu(two_colours: VGG19) -> None:
    two_colours.conv1_1.bias[0] = 0
    dark_left = torch.zeros(1, 3, 2, 4, dtype=torch.float64)
    dark_left[:, :, :, 2:] = 1
    found = saliency(two_colours, dark_left, parse_target("relu1_1:0"), method="guided")
    red = two_colours.gain[0].item()
    assert found.tolist() == [[[0, 0, red, red]] * 2]


# Agreement.


@pytest.mark.parametrize(("method", "peer"), [("plain", Saliency), ("guided", GuidedBackprop)], ids=["plain", "guided"])
@pytest.mark.parametrize("target", [parse_target(text) for text in TARGETS], ids=TARGETS)
def test_saliency_agrees_with_captum(
    net: VGG19, images: Tensor, target: Target, method: str, peer: type[Saliency] | type[GuidedBackprop]
) -> None:
    found = saliency(net, images, target, method=method)
    assert_near(found, captum_map(peer(AsSequential(net, target.layer)).attribute, images, target), 1e-12)
    if method == "guided" and target.layer not in ("conv1_1", "relu1_1"):
        assert not torch.allclose(found, saliency(net, images, target), rtol=0.1)


def test_saliency_smoothgrad_is_the_mean_over_noisy_copies(net: VGG19, images: Tensor) -> None:
    target = parse_target("relu2_2:3")
    expected = []
    for image in images:
        generator = torch.Generator().manual_seed(11)
        total = torch.zeros_like(image)
        for _ in range(5):
            grain = torch.randn(image.shape, generator=generator).double()
            noisy = (image + 0.2 * (image.max() - image.min()) * grain)[None].requires_grad_()
            total += torch.autograd.grad(score(net, target, noisy).sum(), noisy)[0][0]
        expected.append((total / 5).abs().amax(dim=0))
    settings = {"method": "smoothgrad", "samples": 5, "noise": 0.2, "seed": 11}
    for batch_size in (1, 2, 16):
        found = saliency(net, images, target, batch_size=batch_size, **settings)
        assert_near(found, torch.stack(expected), 1e-12)


def test_saliency_smoothgrad_follows_the_seed(net: VGG19, images: Tensor) -> None:
    settings = {"target": parse_target("relu2_2:3"), "method": "smoothgrad", "samples": 2}
    one, again, other = (saliency(net, images[:1], seed=seed, **settings) for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


# What every method promises.


@pytest.mark.parametrize("method", METHODS)
def test_saliency_does_not_depend_on_the_batch(net: VGG19, images: Tensor, method: str) -> None:
    target = parse_target("relu2_2:3")
    together = saliency(net, images, target, method=method, samples=3, batch_size=2)
    assert together.shape == (3, 13, 18)
    assert bool((together >= 0).all())
    for image, expected in zip(images.split(1), together.split(1), strict=True):
        assert_near(saliency(net, image, target, method=method, samples=3), expected, 1e-12)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode], ids=lambda context: context.__name__)
def test_saliency_works_with_gradients_off(
    net: VGG19, images: Tensor, method: str, context: Callable[[], torch.no_grad]
) -> None:
    settings = {"target": parse_target("relu2_2:3"), "method": method, "samples": 2}
    expected = saliency(net, images, **settings)
    with context():
        assert torch.equal(saliency(net, images + 0, **settings), expected)
        assert not torch.is_grad_enabled()


@pytest.mark.parametrize("method", METHODS)
def test_saliency_changes_neither_net_nor_inputs_nor_random_state(net: VGG19, images: Tensor, method: str) -> None:
    target = parse_target("relu2_2:3")
    net.conv1_2.weight.requires_grad_()
    wanted = images.clone().requires_grad_()
    state = {name: value.clone() for name, value in net.state_dict().items()}
    random = torch.get_rng_state()
    try:
        found = saliency(net, wanted, target, method=method, samples=2)
        assert not found.requires_grad
        assert wanted.grad is None
        assert net.conv1_2.weight.grad is None
        assert net.conv1_2.weight.requires_grad
        assert not net.conv1_1.weight.requires_grad
    finally:
        net.conv1_2.weight.requires_grad_(False)
    assert torch.equal(wanted, images)
    assert torch.equal(torch.get_rng_state(), random)
    assert not net.training
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    # Guided passes leave no hook behind: the next plain gradient is PyTorch's own.
    (plain,) = torch.autograd.grad(score(net, target, wanted).sum(), wanted)
    assert torch.equal(saliency(net, images, target), plain.abs().amax(dim=1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "giuded"}, "unknown saliency method 'giuded'; did you mean 'guided'"),
        ({"samples": 0}, "samples is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"noise": -0.1}, "noise is -0.1"),
        ({"noise": float("nan")}, "noise is nan"),
        ({"noise": None}, "noise is None"),
        ({"noise": "0.1"}, "noise is 0.1"),
        ({"samples": 2.5}, "samples is 2.5; give a whole number"),
        ({"batch_size": "4"}, "batch_size is '4'"),
        ({"seed": 0.5}, "seed is 0.5; give a whole number"),
        ({"target": Target("relu3_1", 0, "")}, "lies behind relu2_2"),
        ({"images": torch.zeros(3, 8, 8)}, r"got torch.float32 \[3, 8, 8\]"),
    ],
)
def test_saliency_refuses_bad_arguments(net: VGG19, arguments: dict[str, object], message: str) -> None:
    usual = {"images": torch.zeros(1, 3, 8, 8), "target": parse_target("relu2_2:0")}
    with pytest.raises(UserError, match=message):
        saliency(net, **(usual | arguments))


@pytest.mark.gpu
@pytest.mark.parametrize("method", METHODS)
def test_saliency_on_a_gpu_agrees_with_the_cpu(net: VGG19, images: Tensor, method: str) -> None:
    target = parse_target("relu2_2:3")
    expected = saliency(net, images, target, method=method, samples=3)
    twin = VGG19("relu2_2", net.flavour).double()
    twin.load_state_dict(net.state_dict())
    found = saliency(twin.cuda(), images, target, method=method, samples=3)
    assert found.is_cuda
    assert_near(found.cpu(), expected, 1e-10)
