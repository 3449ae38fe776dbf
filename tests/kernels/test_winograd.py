"""Winograd's convolutions: the same sums as PyTorch's, wherever tiles, bands and slabs end."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastnst_kernels.cpu import winograd
from helpers.kernel_cases import randn
from helpers.tolerances import FLOOR


def gradients(x: Tensor, weight: Tensor, dz: Tensor, padding: int) -> tuple[Tensor, Tensor]:
    """PyTorch's, of x and weight."""
    options = (None, (1, 1), (padding, padding), (1, 1), False, (0, 0), 1)
    dx, dw, _ = torch.ops.aten.convolution_backward(dz, x, weight, *options, [True, True, False])
    return dx, dw


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-11 * float(expected.abs().max()))


def test_convolve_one_pixel_gives_the_flipped_kernel() -> None:
    weight = torch.arange(1.0, 10.0, dtype=torch.float64).view(1, 1, 3, 3)
    x = torch.zeros(1, 1, 4, 4, dtype=torch.float64)
    x[0, 0, 1, 2] = 1
    turned = torch.tensor([[0, 9, 8, 7], [0, 6, 5, 4], [0, 3, 2, 1], [0, 0, 0, 0]], dtype=torch.float64)
    torch.testing.assert_close(winograd.convolve(x, weight)[0, 0], turned)
    # And backwards it is the kernel itself, around the pixel.
    upright = torch.tensor([[0, 1, 2, 3], [0, 4, 5, 6], [0, 7, 8, 9], [0, 0, 0, 0]], dtype=torch.float64)
    torch.testing.assert_close(winograd.input_gradient(x, weight)[0, 0], upright)
    # One gradient at one place: the pixels around it.
    pixels = torch.arange(16.0, dtype=torch.float64).view(1, 1, 4, 4)
    around = torch.tensor([[1, 2, 3], [5, 6, 7], [9, 10, 11]], dtype=torch.float64)
    torch.testing.assert_close(winograd.weight_gradient(pixels, x)[0, 0], around)


def test_convolve_adds_bias_then_relu() -> None:
    x, weight = torch.ones(1, 1, 6, 6), torch.ones(2, 1, 3, 3)
    y = winograd.convolve(x, weight, torch.tensor([1.0, -10.0]), padding=0, relu=True)
    torch.testing.assert_close(y[0, 0], torch.full((4, 4), 10.0))
    assert y[0, 1].eq(0).all()


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 3),
    st.integers(1, 40),
    st.integers(1, 70),
    st.integers(3, 14),
    st.integers(3, 14),
    st.sampled_from((0, 1, 2)),
    st.sampled_from((1, 20_000, 100_000, 2**24)),
    st.booleans(),
)
def test_winograd_agrees_with_torch(
    samples: int, inputs: int, outputs: int, height: int, width: int, padding: int, cache: int, planes: bool
) -> None:
    """In fp64, any sizes, with one band or many, whole filters or slabs, from either memory format."""
    x, weight = randn((samples, inputs, height, width)).double(), randn((outputs, inputs, 3, 3), seed=2).double()
    bias = randn((outputs,), seed=3).double()
    expected = F.conv2d(x, weight, bias, padding=padding)
    dz = randn(tuple(expected.shape), seed=4).double()
    dx, dw = gradients(x, weight, dz, padding)
    if not planes:
        x, weight, dz = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight, dz))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(winograd, "_BAND_BYTES", cache)
        patch.setattr(winograd, "_FILTER_BYTES", cache // 4)
        results = (
            winograd.convolve(x, weight, bias, padding=padding),
            winograd.input_gradient(dz, weight, padding=padding),
            winograd.weight_gradient(x, dz, padding=padding),
        )
        close(winograd.convolve(x, weight, bias, padding=padding, relu=True), expected.relu())
    for result, wanted in zip(results, (expected, dx, dw), strict=True):
        close(result, wanted)
        assert result.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("inputs", "outputs", "size"), [(64, 128, 34), (128, 128, 17), (512, 512, 12)])
def test_winograd_in_fp32_loses_a_few_bits_at_most(inputs: int, outputs: int, size: int) -> None:
    """Larger intermediate values cost precision: up to 8 times PyTorch's error, plus the usual floor."""
    x = randn((4, inputs, size, size)).relu()
    weight, dz = randn((outputs, inputs, 3, 3), seed=2) / (3 * math.sqrt(inputs)), randn((4, outputs, size, size))
    exact = F.conv2d(x.double(), weight.double(), padding=1), *gradients(x.double(), weight.double(), dz.double(), 1)
    peers = F.conv2d(x, weight, padding=1), *gradients(x, weight, dz, 1)
    ours = winograd.convolve(x, weight), winograd.input_gradient(dz, weight), winograd.weight_gradient(x, dz)
    for truth, peer, own in zip(exact, peers, ours, strict=True):
        error, peer_error = (float((y.double() - truth).norm()) for y in (own, peer))
        assert error <= 8 * peer_error + FLOOR[torch.float32] * float(truth.norm())


def test_winograd_gives_the_same_bits_twice() -> None:
    x, weight = randn((3, 64, 20, 24)), randn((128, 64, 3, 3), seed=2)
    assert torch.equal(winograd.convolve(x, weight), winograd.convolve(x, weight))
    dz = randn((3, 128, 20, 24), seed=3)
    assert torch.equal(winograd.weight_gradient(x, dz), winograd.weight_gradient(x, dz))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_convolve_keeps_nan_and_inf_in_their_tiles(value: float) -> None:
    x, weight = randn((2, 3, 12, 12)), randn((4, 3, 3, 3), seed=2)
    x[0, 1, 5, 5] = value
    y = winograd.convolve(x, weight, torch.zeros(4), relu=True)
    assert not y[0, :, 4:7, 4:7].isfinite().any()
    assert y[0, :, 8:].isfinite().all()
    assert y[1].isfinite().all()


@pytest.mark.parametrize(
    ("shape", "filters", "options", "expected"),
    [
        ((4, 128, 32, 32), (128, 128, 3, 3), {}, True),
        ((4, 128, 34, 34), (128, 128, 3, 3), {"padding": 0}, True),
        ((4, 64, 32, 32), (128, 64, 3, 3), {}, True),
        ((4, 64, 32, 32), (64, 64, 3, 3), {}, False),  # few channels
        ((4, 512, 8, 8), (512, 512, 3, 3), {}, False),  # few tiles
        ((16, 512, 5, 5), (512, 512, 3, 3), {}, False),  # much edge
        ((4, 128, 2, 2), (128, 128, 3, 3), {"padding": 0}, False),
        ((4, 128, 32, 32), (128, 128, 5, 5), {}, False),
        ((4, 128, 32, 32), (128, 128, 3, 3), {"stride": 2}, False),
        ((4, 128, 32, 32), (128, 128, 3, 3), {"padding": 3}, False),
    ],
)
def test_is_faster_by_shape(shape: tuple[int, ...], filters: tuple[int, ...], options: dict, expected: bool) -> None:
    assert winograd.is_faster(torch.empty(shape), torch.empty(filters), **options) is expected


def test_is_faster_in_fp32_and_fp64_on_a_cpu_only() -> None:
    shapes = (4, 128, 32, 32), (128, 128, 3, 3)
    for dtype, expected in ((torch.float64, True), (torch.bfloat16, False), (torch.float16, False)):
        assert winograd.is_faster(*(torch.empty(shape, dtype=dtype) for shape in shapes)) is expected
    assert not winograd.is_faster(torch.empty(shapes[0], dtype=torch.float64), torch.empty(shapes[1]))
    assert not winograd.is_faster(*(torch.empty(shape, device="meta") for shape in shapes))
    with torch._subclasses.FakeTensorMode():
        assert not winograd.is_faster(*(torch.empty(shape) for shape in shapes))
