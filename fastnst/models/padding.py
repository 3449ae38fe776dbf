"""Padding of pictures by mirroring, in channels_last, with a deterministic backward.

PyTorch's own reflection padding gives up channels_last on CUDA and under torch.compile (pytorch#179442), and its CUDA
backward adds floats in no fixed order. Between layers no padding runs by itself: the norms write it.
"""

from typing import Any

import torch
from torch import Tensor

from fastnst_kernels.norm.upsample_pad import UpsamplePad, upsample_pad, upsample_pad_adjoint


def reflect_pad(x: Tensor, pad: int) -> Tensor:
    """`[N, C, H, W]` → `[N, C, H + 2·pad, W + 2·pad]`, mirrored about the border pixel, which is not repeated.

    Where `pad` exceeds H - 1 or W - 1 the reflection is repeated, as in `numpy.pad(mode="reflect")`.
    """
    height, width = x.shape[-2:]
    if pad == 0:
        return x.contiguous(memory_format=torch.channels_last)
    if pad < min(height, width):
        return _mirror(x, pad, pad)
    # The extension of a side of n pixels has a mirror point every n - 1: steps of n - 1 continue it, others would not.
    return _reflect_direction(_reflect_direction(x, pad, vertical=True), pad, vertical=False)


def _reflect_direction(x: Tensor, pad: int, *, vertical: bool) -> Tensor:
    while pad > 0:
        step = min(pad, x.shape[-2 if vertical else -1] - 1)
        x = _mirror(x, step if vertical else 0, 0 if vertical else step)
        pad -= step
    return x


# An op of its own, not an autograd.Function, so that torch.compile takes it as one node instead of turning each strip
# that is written in place into a copy of the whole.
@torch.library.custom_op("fastnst::mirror_pad", mutates_args=())
def _mirror(x: Tensor, rows: int, columns: int) -> Tensor:
    return upsample_pad(x.contiguous(memory_format=torch.channels_last), _border(rows, columns))


@torch.library.custom_op("fastnst::mirror_pad_backward", mutates_args=())
def _mirror_backward(grad: Tensor, rows: int, columns: int) -> Tensor:
    return upsample_pad_adjoint(grad.contiguous(memory_format=torch.channels_last), _border(rows, columns))


def _border(rows: int, columns: int) -> UpsamplePad:
    return UpsamplePad(1, (columns, columns, rows, rows), "reflect")


def _allocate(x: Tensor, more_rows: int, more_columns: int) -> Tensor:
    batch, channels, height, width = x.shape
    shape = (batch, channels, height + more_rows, width + more_columns)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


@_mirror.register_fake
def _(x: Tensor, rows: int, columns: int) -> Tensor:
    return _allocate(x, 2 * rows, 2 * columns)


@_mirror_backward.register_fake
def _(grad: Tensor, rows: int, columns: int) -> Tensor:
    return _allocate(grad, -2 * rows, -2 * columns)


def _setup_context(ctx: Any, inputs: tuple[Tensor, int, int], output: Tensor) -> None:  # noqa: ARG001
    _, ctx.rows, ctx.columns = inputs


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return _mirror_backward(grad, ctx.rows, ctx.columns), None, None


_mirror.register_autograd(_backward, setup_context=_setup_context)
