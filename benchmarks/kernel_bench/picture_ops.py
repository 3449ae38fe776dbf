"""Pictures at the ends of networks: bytes into the first convolution, and from one network into the next and back."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import fastnst_kernels as fk
from fastnst_kernels.inspection import cost
from fastnst_kernels.inspection.cost import Cost
from kernel_bench.ops import FORWARD, Draw, Inputs, Op, Shape, Size, image_gradient

SIZES: tuple[Size, ...] = ((3, 256, 256),)
SMALL_SIZES: tuple[Size, ...] = ((3, 48, 48),)
_FACTOR, _OFFSET = 150 / 255, 0.5
_VARIATION = (0.25, 0.5)


def _bytes(draw: Draw, shape: Shape) -> Inputs:
    """`like` gives the result's type."""
    pictures = draw.images(shape, mean=128.0, deviation=50.0).clamp_(0, 255).to(torch.uint8)
    return Inputs({}, {"pictures": pictures, **_vectors(draw), "like": draw.images((1, 3, 1, 1))})


def _vectors(draw: Draw) -> dict[str, Tensor]:
    return {"mean": draw.vector((3,), mean=0.45, deviation=0.03), "gain": draw.vector((3,), mean=4.4, deviation=0.1)}


def _eager_input(pictures: Tensor, mean: Tensor, gain: Tensor, like: Tensor, *, padding: int) -> Tensor:
    x = pictures.to(mean.dtype) / 255
    x = (x - mean.view(3, 1, 1)) * gain.view(3, 1, 1)
    return F.pad(x.to(like.dtype), (padding,) * 4, mode="reflect") if padding else x.to(like.dtype)


def _fastnst_input(pictures: Tensor, mean: Tensor, gain: Tensor, like: Tensor, *, padding: int) -> Tensor:
    return fk.picture_input(pictures, 1 / 255, gain, -mean * gain, padding=padding, dtype=like.dtype)


def _input(padding: int) -> Op:
    return Op(
        f"picture_input+padding{padding}" if padding else "picture_input",
        SIZES,
        SMALL_SIZES,
        _bytes,
        partial(_fastnst_input, padding=padding),
        partial(_eager_input, padding=padding),
        lambda shape, dtype: {FORWARD: cost.picture_input(shape, dtype, padding)},
        image_gradient,
    )


def _raw(draw: Draw, shape: Shape) -> Inputs:
    """`sums` is where a call leaves the sums of total variation, its second result."""
    return Inputs({}, {"z": draw.images(shape), **_vectors(draw), "sums": draw.vector((shape[0], 2))})


def _eager_boundary(z: Tensor, mean: Tensor, gain: Tensor, sums: Tensor) -> Tensor:
    s = _FACTOR * z.to(mean.dtype).tanh() + _OFFSET
    vertical, horizontal = s[:, :, 1:] - s[:, :, :-1], s[..., 1:] - s[..., :-1]
    sums.copy_(torch.stack([vertical.square().sum((1, 2, 3)), horizontal.square().sum((1, 2, 3))], 1))
    return ((s - mean.view(3, 1, 1)) * gain.view(3, 1, 1)).to(z.dtype)


def _fastnst_boundary(z: Tensor, mean: Tensor, gain: Tensor, sums: Tensor) -> Tensor:
    window = (0, 0, *z.shape[2:])
    u, made = fk.network_boundary(
        z, mean, gain, window=window, tanh=True, factor=_FACTOR, offset=_OFFSET, dtype=z.dtype
    )
    sums.copy_(made[:, :2])
    return u


def _raw_and_gradient(draw: Draw, shape: Shape) -> Inputs:
    return Inputs({}, {"z": draw.images(shape), "du": draw.images(shape), "gain": _vectors(draw)["gain"]})


def _eager_backward(z: Tensor, du: Tensor, gain: Tensor) -> Tensor:
    t = z.to(gain.dtype).tanh()
    vertical, horizontal = t[:, :, 1:] - t[:, :, :-1], t[..., 1:] - t[..., :-1]
    along = F.pad(vertical, (0, 0, 1, 0)) - F.pad(vertical, (0, 0, 0, 1))
    across = F.pad(horizontal, (1, 0)) - F.pad(horizontal, (0, 1))
    d_s = gain.view(3, 1, 1) * du.to(gain.dtype)
    d_s = d_s + 2 * _FACTOR * (_VARIATION[0] * along + _VARIATION[1] * across)
    return (_FACTOR * (1 - t * t) * d_s).to(z.dtype)


def _fastnst_backward(z: Tensor, du: Tensor, gain: Tensor) -> Tensor:
    window = (0, 0, *z.shape[2:])
    return fk.network_boundary_backward(z, du, gain, window=window, tanh=True, factor=_FACTOR, variation=_VARIATION)


def _boundary_costs(shape: Shape, dtype: torch.dtype) -> dict[str, Cost]:
    return {FORWARD: cost.network_boundary(shape, dtype)}


def _backward_costs(shape: Shape, dtype: torch.dtype) -> dict[str, Cost]:
    return {FORWARD: cost.network_boundary_backward(shape, dtype)}


# Without a border, as the loss network takes its content, and with those of two of the transform nets.
PICTURE_INPUTS = tuple(_input(padding) for padding in (0, 4, 40))
BOUNDARY = Op(
    "network_boundary",
    SIZES,
    SMALL_SIZES,
    _raw,
    _fastnst_boundary,
    _eager_boundary,
    _boundary_costs,
    image_gradient,
)
BOUNDARY_BACKWARD = Op(
    "network_boundary_backward",
    SIZES,
    SMALL_SIZES,
    _raw_and_gradient,
    _fastnst_backward,
    _eager_backward,
    _backward_costs,
    image_gradient,
)
