"""Padding by mirroring, in channels_last, with a deterministic backward.

PyTorch's own reflection and replication padding give up channels_last on CUDA and under torch.compile
(pytorch#179442), and their CUDA backward adds floats in no fixed order. This one writes the mirrored strips into one
output buffer, and its backward, the adjoint, folds the strips of the gradient back.
"""

from typing import Any

import torch
from torch import Tensor


def reflect_pad(x: Tensor, pad: int) -> Tensor:
    """`[N, C, H, W]` → `[N, C, H + 2·pad, W + 2·pad]`, mirrored about the border pixel, which is not repeated.

    Where `pad` exceeds H - 1 or W - 1 the reflection is repeated, as in `numpy.pad(mode="reflect")`.
    """
    height, width = x.shape[-2:]
    if pad < min(height, width):
        return _mirror(x, pad, pad, 1)
    # The extension of a side of n pixels has a mirror point every n - 1: steps of n - 1 continue it, others would not.
    return _reflect_direction(_reflect_direction(x, pad, vertical=True), pad, vertical=False)


def replicate_pad_one(x: Tensor) -> Tensor:
    """`[N, C, H, W]` → `[N, C, H + 2, W + 2]`: the border pixel, once more."""
    return _mirror(x, 1, 1, 0)


def _reflect_direction(x: Tensor, pad: int, *, vertical: bool) -> Tensor:
    while pad > 0:
        step = min(pad, x.shape[-2 if vertical else -1] - 1)
        x = _mirror(x, step if vertical else 0, 0 if vertical else step, 1)
        pad -= step
    return x


# An op of its own, not an autograd.Function, so that torch.compile takes it as one node instead of turning each strip
# that is written in place into a copy of the whole.
@torch.library.custom_op("fastnst::mirror_pad", mutates_args=())
def _mirror(x: Tensor, rows: int, columns: int, skip: int) -> Tensor:
    """Mirrored strips of `rows` and `columns` pixels; `skip` of them at the border are left out of the mirror image."""
    height, width = x.shape[-2:]
    padded = _allocate(x, 2 * rows, 2 * columns)
    middle = padded[:, :, rows : rows + height]
    middle[..., columns : columns + width] = x
    if columns:
        middle[..., :columns] = x[..., skip : skip + columns].flip(3)
        middle[..., columns + width :] = x[..., width - skip - columns : width - skip].flip(3)
    if rows:
        padded[:, :, :rows] = middle[:, :, skip : skip + rows].flip(2)
        padded[:, :, rows + height :] = middle[:, :, height - skip - rows : height - skip].flip(2)
    return padded


@torch.library.custom_op("fastnst::mirror_pad_backward", mutates_args=())
def _mirror_backward(grad: Tensor, rows: int, columns: int, skip: int) -> Tensor:
    height = grad.shape[2] - 2 * rows
    folded = _fold_columns(grad[:, :, rows : rows + height], columns, skip)
    if rows:
        top = _fold_columns(grad[:, :, :rows], columns, skip)
        bottom = _fold_columns(grad[:, :, rows + height :], columns, skip)
        folded[:, :, skip : skip + rows] += top.flip(2)
        folded[:, :, height - skip - rows : height - skip] += bottom.flip(2)
    return folded


def _fold_columns(grad: Tensor, columns: int, skip: int) -> Tensor:
    width = grad.shape[3] - 2 * columns
    folded = grad[..., columns : columns + width].clone(memory_format=torch.channels_last)
    if columns:
        folded[..., skip : skip + columns] += grad[..., :columns].flip(3)
        folded[..., width - skip - columns : width - skip] += grad[..., columns + width :].flip(3)
    return folded


def _allocate(x: Tensor, more_rows: int, more_columns: int) -> Tensor:
    batch, channels, height, width = x.shape
    shape = (batch, channels, height + more_rows, width + more_columns)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


@_mirror.register_fake
def _(x: Tensor, rows: int, columns: int, skip: int) -> Tensor:  # noqa: ARG001
    return _allocate(x, 2 * rows, 2 * columns)


@_mirror_backward.register_fake
def _(grad: Tensor, rows: int, columns: int, skip: int) -> Tensor:  # noqa: ARG001
    return _allocate(grad, -2 * rows, -2 * columns)


def _setup_context(ctx: Any, inputs: tuple[Tensor, int, int, int], output: Tensor) -> None:  # noqa: ARG001
    _, ctx.rows, ctx.columns, ctx.skip = inputs


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    return _mirror_backward(grad, ctx.rows, ctx.columns, ctx.skip), None, None, None


_mirror.register_autograd(_backward, setup_context=_setup_context)
