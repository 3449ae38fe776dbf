"""`conv.convolution` on the CPU: gradients in the faster memory format, and Winograd's algorithm."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastnst_kernels import instance_norm
from fastnst_kernels.conv.convolution import _as_nchw, convolution
from fastnst_kernels.cpu import winograd
from fastnst_kernels.norm.recompute import recomputed_instance_norm
from helpers.kernel_cases import LAYOUTS, parameters, randn
from helpers.op_counter import OpCounter
from helpers.tolerances import assert_as_exact_as_torch


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("needs_input", [False, True])
def test_convolution_computes_the_weights_gradient_in_nchw(needs_input: bool, with_bias: bool) -> None:
    """A convolution behind no norm, such as that of an image, which needs no gradient itself."""
    x = LAYOUTS["channels_last"](randn((2, 3, 7, 6)))
    filters = LAYOUTS["channels_last"](randn((4, 3, 3, 3), seed=5))
    extra = [randn((4,), seed=6)] if with_bias else []
    dz = randn((2, 4, 7, 6), seed=7)

    def gradients(dtype: torch.dtype, function: Callable[..., Tensor]) -> list[Tensor | None]:
        leaves = [t.clone().to(dtype).requires_grad_(needs_input or t is not x) for t in (x, filters, *extra)]
        function(*leaves, padding=1).backward(dz.to(dtype))
        return [leaf.grad for leaf in leaves]

    with OpCounter() as ops:
        actual = gradients(torch.float32, convolution)
    assert ops.counts["convolution_backward"] == 1 + needs_input
    peer, truth = gradients(torch.float32, F.conv2d), gradients(torch.float64, F.conv2d)
    assert [grad is None for grad in actual] == [not needs_input, *[False] * (1 + with_bias)]
    for one, other, exact in zip(actual, peer, truth, strict=True):
        if one is not None:
            assert_as_exact_as_torch(one, other, exact, conditioning=4.0)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 1, 1), (2, 1, 4, 5), (3, 5, 70, 3), (1, 64, 9, 9)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_as_nchw_copies_the_same_values(shape: tuple[int, ...], layout: str) -> None:
    x = LAYOUTS[layout](randn(shape))
    planes = _as_nchw(x)
    assert planes.is_contiguous()
    assert torch.equal(planes, x)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("stride", "padding", "size"), [(1, 0, 6), (2, 0, 7), (2, 1, 6), (1, 1, 2)])
def test_convolution_after_a_recomputed_norm_agrees_with_torch(
    stride: int, padding: int, size: int, with_bias: bool
) -> None:
    """The input's gradient is computed in NHWC and the weight's in NCHW; both are returned in NHWC."""
    x = LAYOUTS["channels_last"](randn((2, 5, size, size)))
    filters = LAYOUTS["channels_last"](randn((3, 5, 3, 3), seed=5))
    bias = [randn((3,), seed=6)] if with_bias else []

    def gradients(dtype: torch.dtype, plain: bool) -> tuple[list[Tensor], OpCounter]:
        leaves = [t.detach().to(dtype).requires_grad_() for t in (x, filters, *parameters(5), *bias)]
        norm, conv = (instance_norm, F.conv2d) if plain else (recomputed_instance_norm, convolution)
        # Padded, so that the smallest image has a convolution.
        y = norm(leaves[0], *leaves[2:4], padding=1, padding_mode="zeros")
        with OpCounter() as ops:
            z = conv(y, leaves[1], *leaves[4:], stride=stride, padding=padding)
            z.backward(randn(tuple(z.shape), seed=9).to(dtype))
        return [leaf.grad for leaf in leaves if leaf.grad is not None], ops

    actual, ops = gradients(torch.float32, plain=False)
    peer, _ = gradients(torch.float32, plain=True)
    truth, _ = gradients(torch.float64, plain=True)
    assert ops.counts["convolution_backward"] == 2
    assert actual[1].stride() == filters.stride()
    assert len(actual) == len(truth) == 4 + with_bias
    for name, one, other, exact in zip(("x", "filters", "scale", "shift", "bias"), actual, peer, truth, strict=False):
        assert_as_exact_as_torch(one, other, exact, conditioning=4.0, what=name)


@pytest.mark.parametrize(("padding", "normed"), [(0, True), (1, True), (1, False)])
def test_convolution_takes_winograd(padding: int, normed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a recomputed norm and without; the gradients of all are autograd's."""
    used = []
    for name in ("convolve", "input_gradient", "weight_gradient"):
        real = getattr(winograd, name)
        monkeypatch.setattr(winograd, name, lambda *a, _f=real, _n=name, **k: used.append(_n) or _f(*a, **k))
    dtype = torch.float64 if normed else torch.float32
    x = randn((2, 64, 18, 18)).to(dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
    weight = (randn((128, 64, 3, 3), seed=2) / 24).to(dtype).requires_grad_()
    bias = randn((128,), seed=3).to(dtype).requires_grad_()
    scale, shift = (torch.ones(64, requires_grad=True), torch.zeros(64, requires_grad=True)) if normed else (None, None)

    def outcome(convolve: Callable[[Tensor], Tensor]) -> list[Tensor]:
        y = x if scale is None else recomputed_instance_norm(x, scale, shift, relu=True)
        z = convolve(y)
        return [z, *torch.autograd.grad(z.square().sum(), [x, weight, bias])]

    own = outcome(lambda y: convolution(y, weight, bias, padding=padding))
    assert used == ["convolve", "input_gradient", "weight_gradient"]
    with torch.no_grad():
        assert convolution(x, weight, bias, padding=padding).shape == own[0].shape
    assert used[3:] == ["convolve"]
    for actual, expected in zip(own, outcome(lambda y: F.conv2d(y, weight, bias, padding=padding)), strict=True):
        limit = 1e-11 if normed else 1e-4
        assert float((actual - expected).detach().norm()) <= limit * float(expected.detach().norm())


def test_convolution_under_autocast_takes_pytorchs() -> None:
    x, weight = randn((4, 64, 16, 16)).contiguous(memory_format=torch.channels_last), randn((128, 64, 3, 3), seed=2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = convolution(x, weight, padding=1)
        with torch.no_grad():
            assert torch.equal(convolution(x, weight, padding=1), z)
    assert z.dtype == torch.bfloat16
