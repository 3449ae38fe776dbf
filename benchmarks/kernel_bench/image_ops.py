"""Images at the ends of networks: uint8 to the first convolution, output to VGG's input and back."""

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
    """`like` gives the result's dtype."""
    images = draw.images(shape, mean=128.0, deviation=50.0).clamp_(0, 255).to(torch.uint8)
    return Inputs({}, {"images": images, **_vectors(draw), "like": draw.images((1, 3, 1, 1))})


def _vectors(draw: Draw) -> dict[str, Tensor]:
    return {"mean": draw.vector((3,), mean=0.45, deviation=0.03), "gain": draw.vector((3,), mean=4.4, deviation=0.1)}


def _eager_input(images: Tensor, mean: Tensor, gain: Tensor, like: Tensor, *, padding: int) -> Tensor:
    x = images.to(mean.dtype) / 255
    x = (x - mean.view(3, 1, 1)) * gain.view(3, 1, 1)
    return F.pad(x.to(like.dtype), (padding,) * 4, mode="reflect") if padding else x.to(like.dtype)


def _fastnst_input(images: Tensor, mean: Tensor, gain: Tensor, like: Tensor, *, padding: int) -> Tensor:
    return fk.uint8_to_input(images, 1 / 255, gain, -mean * gain, padding=padding, dtype=like.dtype)


def _input(padding: int) -> Op:
    return Op(
        f"uint8_to_input+padding{padding}" if padding else "uint8_to_input",
        SIZES,
        SMALL_SIZES,
        _bytes,
        partial(_fastnst_input, padding=padding),
        partial(_eager_input, padding=padding),
        lambda shape, dtype: {FORWARD: cost.uint8_to_input(shape, dtype, padding)},
        image_gradient,
    )


def _raw(draw: Draw, shape: Shape) -> Inputs:
    """A call writes the sums of total variation, its second result, into `sums`."""
    return Inputs({}, {"z": draw.images(shape), **_vectors(draw), "sums": draw.vector((shape[0], 2))})


def _eager_forward(z: Tensor, mean: Tensor, gain: Tensor, sums: Tensor) -> Tensor:
    s = _FACTOR * z.to(mean.dtype).tanh() + _OFFSET
    vertical, horizontal = s[:, :, 1:] - s[:, :, :-1], s[..., 1:] - s[..., :-1]
    sums.copy_(torch.stack([vertical.square().sum((1, 2, 3)), horizontal.square().sum((1, 2, 3))], 1))
    return ((s - mean.view(3, 1, 1)) * gain.view(3, 1, 1)).to(z.dtype)


def _fastnst_forward(z: Tensor, mean: Tensor, gain: Tensor, sums: Tensor) -> Tensor:
    window = (0, 0, *z.shape[2:])
    u, made = fk.output_to_vgg_input(
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
    return fk.output_to_vgg_input_backward(z, du, gain, window=window, tanh=True, factor=_FACTOR, variation=_VARIATION)


def _forward_costs(shape: Shape, dtype: torch.dtype) -> dict[str, Cost]:
    return {FORWARD: cost.output_to_vgg_input(shape, dtype)}


def _backward_costs(shape: Shape, dtype: torch.dtype) -> dict[str, Cost]:
    return {FORWARD: cost.output_to_vgg_input_backward(shape, dtype)}


# Without padding, for the loss network's content images, and with that of two of the transform nets.
UINT8_TO_INPUTS = tuple(_input(padding) for padding in (0, 4, 40))
OUTPUT_TO_VGG_INPUT = Op(
    "output_to_vgg_input",
    SIZES,
    SMALL_SIZES,
    _raw,
    _fastnst_forward,
    _eager_forward,
    _forward_costs,
    image_gradient,
)
OUTPUT_TO_VGG_INPUT_BACKWARD = Op(
    "output_to_vgg_input_backward",
    SIZES,
    SMALL_SIZES,
    _raw_and_gradient,
    _fastnst_backward,
    _eager_backward,
    _backward_costs,
    image_gradient,
)
