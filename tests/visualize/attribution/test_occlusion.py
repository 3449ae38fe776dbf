"""Occlusion maps: hand-computed drops, agreement with captum, coverage, and the blurred filling."""

import math

import numpy as np
import pytest
import torch
from captum.attr import Occlusion
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fastnst.errors import UserError
from fastnst.models.vgg19 import VGG19
from fastnst.visualize.attribution.occlusion import FILLS, occlusion
from fastnst.visualize.attribution.targets import Target, parse_target, score

TARGET = parse_target("relu2_1:3")


@pytest.fixture(scope="module")
def net() -> VGG19:
    return VGG19("relu2_1", generator=torch.Generator().manual_seed(3)).double()


@pytest.fixture(scope="module")
def red_sum() -> VGG19:
    """conv1_1's map 0 is red itself, in the image's own units but for a constant."""
    net = VGG19("conv1_1").double()
    net.conv1_1.weight.zero_()
    net.conv1_1.weight[0, 0, 1, 1] = 1 / net.gain[0].item()
    return net


@pytest.fixture
def images() -> Tensor:
    return torch.rand(2, 3, 11, 14, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def blurred(image: Tensor, sizes: tuple[int, int]) -> Tensor:
    """`[3, H, W]` through NumPy: mirrored without the edge, convolved line by line."""
    array = image.numpy()
    for axis, size in zip((1, 2), sizes, strict=True):
        reach = min(math.ceil(0.75 * size), array.shape[axis] - 1)
        bell = np.exp(-0.5 * (np.arange(-reach, reach + 1) / (size / 4)) ** 2)
        margins = [(0, 0)] * 3
        margins[axis] = (reach, reach)
        wide = np.pad(array, margins, mode="reflect")
        array = np.apply_along_axis(np.convolve, axis, wide, bell / bell.sum(), mode="valid")
    return torch.from_numpy(array)


def captum_heat(net: VGG19, image: Tensor, covers: Tensor, sizes: tuple[int, int], strides: tuple[int, int]) -> Tensor:
    windows = {"sliding_window_shapes": (3, *sizes), "strides": (3, *strides), "perturbations_per_eval": 8}
    peer = Occlusion(lambda batch: score(net, TARGET, batch))
    attribution = peer.attribute(image[None], baselines=covers[None], **windows)
    # An occluder covers all three colours, and so they share its drop.
    assert torch.equal(attribution[:, 0], attribution[:, 2])
    return attribution[0, 0].double()


# By hand.


def test_occlusion_by_hand(red_sum: VGG19) -> None:
    mean = red_sum.mean[0].item()
    image = torch.zeros(1, 3, 3, 3, dtype=torch.float64)
    image[0, 0] = torch.tensor([[1, 2, 3], [4, 5, 6], [7, 8, 9]], dtype=torch.float64) / 10 + mean
    found = occlusion(red_sum, image, parse_target("conv1_1:0"), size=2, stride=2)
    # The red of a window goes: 0.1+0.2+0.4+0.5 at the top left; the others are cut off by the edge.
    drops = torch.tensor([[1.2, 0.9], [1.5, 0.9]], dtype=torch.float64)
    torch.testing.assert_close(found.base, torch.tensor([4.5], dtype=torch.float64))
    torch.testing.assert_close(found.scores, 4.5 - drops[None])
    heat = [[1.2, 1.2, 0.9], [1.2, 1.2, 0.9], [1.5, 1.5, 0.9]]
    torch.testing.assert_close(found.heat, torch.tensor([heat], dtype=torch.float64))


def test_occlusion_averages_overlapping_occluders(red_sum: VGG19) -> None:
    mean = red_sum.mean[0].item()
    image = torch.zeros(1, 3, 1, 3, dtype=torch.float64)
    image[0, 0] = torch.tensor([0.3, 0.1, -0.2], dtype=torch.float64) + mean
    found = occlusion(red_sum, image, parse_target("conv1_1:0"), size=(1, 2), stride=1)
    torch.testing.assert_close(found.scores, torch.tensor([[[-0.2, 0.3]]], dtype=torch.float64))
    # The middle is covered twice, with drops 0.4 and -0.1.
    torch.testing.assert_close(found.heat, torch.tensor([[[0.4, 0.15, -0.1]]], dtype=torch.float64))


# Agreement.

GEOMETRIES = [((3, 3), (2, 2)), ((5, 5), (3, 3)), ((2, 7), (1, 6)), ((11, 14), (1, 1)), ((11, 6), (20, 5))]


@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize(("sizes", "strides"), GEOMETRIES)
def test_occlusion_agrees_with_captum(
    net: VGG19, images: Tensor, sizes: tuple[int, int], strides: tuple[int, int], fill: str
) -> None:
    found = occlusion(net, images, TARGET, size=sizes, stride=strides, fill=fill, batch_size=16)
    for image, heat in zip(images, found.heat, strict=True):
        covers = net.mean.expand_as(image) if fill == "grey" else blurred(image, sizes)
        peer = captum_heat(net, image, covers, sizes, strides)
        # Captum adds the drops up in single precision.
        assert (heat - peer).abs().max() <= 1e-6 * peer.abs().max()


# Geometry and batches.


@given(
    side=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    stride=st.tuples(st.integers(1, 9), st.integers(1, 9)),
)
def test_occlusion_covers_every_pixel_or_refuses_the_stride(
    red_sum: VGG19, side: tuple[int, int], size: tuple[int, int], stride: tuple[int, int]
) -> None:
    size = (min(size[0], side[0]), min(size[1], side[1]))
    image = torch.rand(1, 3, *side, dtype=torch.float64)
    target = parse_target("conv1_1:0")
    if any(t > s and s < whole for whole, s, t in zip(side, size, stride, strict=True)):
        with pytest.raises(UserError, match="so that each pixel is covered"):
            occlusion(red_sum, image, target, size=size, stride=stride)
        return
    found = occlusion(red_sum, image, target, size=size, stride=stride)
    red = image[0, 0] - red_sum.mean[0]
    drops, covering = torch.zeros_like(red), torch.zeros_like(red)
    for row in range(found.scores.shape[1]):
        for column in range(found.scores.shape[2]):
            top, left = row * stride[0], column * stride[1]
            window = (slice(top, top + size[0]), slice(left, left + size[1]))
            assert red[window].numel() > 0
            drops[window] += red[window].sum()
            covering[window] += 1
    assert bool((covering > 0).all())
    torch.testing.assert_close(found.heat[0], drops / covering)


@pytest.mark.parametrize("fill", FILLS)
def test_occlusion_does_not_depend_on_the_batch(net: VGG19, images: Tensor, fill: str) -> None:
    whole = occlusion(net, images, TARGET, size=4, stride=3, fill=fill, batch_size=64)
    assert whole.scores.shape == (2, 4, 5)
    assert whole.base.shape == (2,)
    assert whole.heat.shape == (2, 11, 14)
    for index in range(2):
        alone = occlusion(net, images[index : index + 1], TARGET, size=4, stride=3, fill=fill, batch_size=3)
        for name in ("scores", "base", "heat"):
            found, expected = getattr(alone, name)[0], getattr(whole, name)[index]
            torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-9)


def test_occlusion_holds_one_batch_of_copies(images: Tensor) -> None:
    seen: list[int] = []
    net = VGG19("conv1_1").double()
    net.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    calls: list[tuple[int, int]] = []
    settings = {"size": 4, "stride": 3, "batch_size": 6}
    occlusion(net, images, parse_target("conv1_1:0"), progress=lambda *now: calls.append(now), **settings)
    assert seen == [2, 6, 6, 6, 2, 6, 6, 6, 2]
    assert calls == [(6, 40), (12, 40), (18, 40), (20, 40), (26, 40), (32, 40), (38, 40), (40, 40)]


# Fillings.


def test_occlusion_of_the_fill_colour_is_zero(net: VGG19) -> None:
    mean = net.mean.expand(1, 3, 9, 9)
    assert occlusion(net, mean, TARGET, size=4, stride=4).heat.abs().max() == 0
    plain = torch.tensor([0.9, 0.1, 0.3], dtype=torch.float64).reshape(1, 3, 1, 1).expand(1, 3, 9, 9)
    found = occlusion(net, plain, TARGET, size=4, stride=4, fill="blur")
    assert found.heat.abs().max() <= 1e-12 * found.base.abs().max()
    assert occlusion(net, plain, TARGET, size=4, stride=4).heat.abs().max() > 1e-3 * found.base.abs().max()


def test_occlusion_keeps_fp32() -> None:
    net = VGG19("conv1_1")
    for fill in FILLS:
        found = occlusion(net, torch.rand(1, 3, 9, 9).double(), parse_target("conv1_1:0"), size=3, stride=3, fill=fill)
        assert {found.scores.dtype, found.base.dtype, found.heat.dtype} == {torch.float32}


# Bad input.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 12}, "occluder of 12 pixels on a side of 11; give a size of 1 … 11"),
        ({"size": (11, 15), "stride": 1}, "occluder of 15 pixels on a side of 14"),
        ({"size": 0}, "occluder of 0 pixels"),
        ({"stride": 0}, "stride 0 with an occluder of 4 pixels; give a stride of 1 … 4"),
        ({"stride": 5}, "stride 5 with an occluder of 4 pixels"),
        ({"stride": (1, 2, 3)}, r"stride is \(1, 2, 3\); give a whole number of pixels, or two"),
        ({"stride": (2,)}, r"stride is \(2,\); give"),
        ({"stride": None}, "stride is None"),
        ({"stride": 2.0}, "stride is 2.0"),
        ({"stride": True}, "stride is True"),
        ({"size": 4.0}, "size is 4.0; give a whole number of pixels, or two"),
        ({"size": (4, 4.5)}, r"size is \(4, 4.5\)"),
        ({"size": "44"}, "size is '44'"),
        ({"batch_size": 2.5}, "batch_size is 2.5; give a whole number"),
        ({"batch_size": None}, "batch_size is None"),
        ({"fill": "gray"}, "unknown fill 'gray'; did you mean 'grey'"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"target": Target("relu4_1", 0, "")}, "lies behind relu2_1"),
        ({"images": torch.zeros(11, 14, 3)}, r"\[11, 14, 3\]"),
    ],
)
def test_occlusion_refuses_bad_arguments(net: VGG19, arguments: dict[str, object], message: str) -> None:
    usual = {"images": torch.zeros(1, 3, 11, 14), "target": TARGET, "size": 4, "stride": 2}
    with pytest.raises(UserError, match=message):
        occlusion(net, **(usual | arguments))


@pytest.mark.gpu
@pytest.mark.parametrize("fill", FILLS)
def test_occlusion_on_a_gpu_agrees_with_the_cpu(net: VGG19, images: Tensor, fill: str) -> None:
    expected = occlusion(net, images, TARGET, size=4, stride=3, fill=fill)
    twin = VGG19("relu2_1").double()
    twin.load_state_dict(net.state_dict())
    found = occlusion(twin.cuda(), images, TARGET, size=4, stride=3, fill=fill)
    assert found.heat.is_cuda
    torch.testing.assert_close(found.heat.cpu(), expected.heat, rtol=1e-10, atol=1e-8)
