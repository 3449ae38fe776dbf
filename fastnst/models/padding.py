"""Reflection padding in channels_last, with a deterministic backward.

PyTorch's reflection padding loses channels_last on CUDA and under torch.compile (pytorch#179442), and its CUDA backward
adds floats in no fixed order. Only images are padded here; between layers the norms write the padding.
"""

from typing import Any

import torch
from torch import Tensor

from fastnst_kernels.norm.upsample_pad import UpsamplePad, upsample_pad, upsample_pad_adjoint


def reflect_pad(x: Tensor, pad: int) -> Tensor:
    """Pad `[N, C, H, W]` → `[N, C, H + 2·pad, W + 2·pad]`, mirrored about the border pixel, which is not repeated.

    Beyond H - 1 or W - 1 the reflection repeats, as in `numpy.pad(mode="reflect")`.
    """
    x = x.contiguous(memory_format=torch.channels_last)
    if pad < min(x.shape[2:]):
        return _mirror(x, pad, pad) if pad else x
    for axis in (2, 3):
        left = pad
        while left > 0:
            # The repeated reflection of n pixels has a mirror point every n - 1, hence steps of n - 1.
            step = min(left, x.shape[axis] - 1)
            x = _mirror(x, step, 0) if axis == 2 else _mirror(x, 0, step)
            left -= step
    return x


# A custom op, not an autograd.Function: torch.compile would turn each strip written in place into a copy of the whole.
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
