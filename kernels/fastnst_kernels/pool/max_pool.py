"""Max pooling that records the position of each maximum in a byte, the switch; and unpooling.

Source: the switches of Zeiler, Fergus 2014, "Visualizing and Understanding Convolutional Networks", §2.1.

Legend: k window, s stride, no padding; H, W input, OH = ⌊(H − k)/s⌋ + 1 output, OW likewise; [P, H, W, Q] a dense
tensor as `runtime` describes it.

    y[o] = max over the window of x       switch[o] = row·k + column of the first maximum
    A NaN counts as the maximum, the last one if there are several: PyTorch's rule.

Pooling picks elements, y = S x with a 0/1 matrix S given by the switches, so

    pool backward: dx = Sᵀ dy       unpool: Sᵀ y (overlaps add)       unpool backward: S dx, a gather; and so on

The three ops below, pool, unpool (Sᵀ) and gather (S), are each other's derivatives to any order.

A switch of k² or more is out of range. On the CPU and in PyTorch's path it is an error; the kernels on a GPU, which
would have to be waited for, drop its value, or gather 0, and never touch memory outside the tensors. The environment
variable `FASTNST_KERNELS_CHECK=1`, read at every call, makes it an error there, too, and the host wait for the GPU
before each unpooling.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from fastnst_kernels import runtime
from fastnst_kernels.pool import kernels as max_pool_kernels


def max_pool2d_switches_reference(x: Tensor, kernel_size: int = 2, stride: int = 2) -> tuple[Tensor, Tensor]:
    """`(y, switches)` through PyTorch's own pooling, differentiable; arguments of `max_pool2d_switches`."""
    y, index = torch.nn.functional.max_pool2d(x, kernel_size, stride, return_indices=True)
    # `index` counts within the H × W plane; from the window's corner it is row·W + column.
    width = x.shape[3]
    offset = (index - _corners(y, width, stride)).to(torch.int32)
    if kernel_size == 2:
        row = (offset >= width).to(torch.int32)  # the result of the division below, without its cost
    else:
        row = torch.div(offset, width, rounding_mode="floor")
    return y, offset.sub_(row, alpha=width - kernel_size).to(torch.uint8)


def max_unpool2d_switches_reference(
    y: Tensor, switches: Tensor, output_size: tuple[int, int], kernel_size: int = 2, stride: int = 2
) -> Tensor:
    """Sᵀy through PyTorch's scatter, differentiable; same arguments as `max_unpool2d_switches`."""
    n, c = y.shape[:2]
    height, width = output_size
    index = _plane_index(switches, width, kernel_size, stride).flatten(2)
    flat = y.new_zeros((n, c, height * width)).scatter_add(2, index, y.flatten(2))
    return runtime.dense(flat.view(n, c, height, width), like=switches)


def gather_switches_reference(x: Tensor, switches: Tensor, kernel_size: int = 2, stride: int = 2) -> Tensor:
    """S x, differentiable. x `[N, C, H, W]`, switches and result `[N, C, OH, OW]`."""
    index = _plane_index(switches, x.shape[3], kernel_size, stride).flatten(2)
    picked = x.flatten(2).gather(2, index).view(switches.shape)
    return runtime.dense(picked, like=switches)


def _corners(pooled: Tensor, width: int, stride: int) -> Tensor:
    """`[OH, OW]`: the index of each window's corner in a plane `width` wide, in int32 if possible."""
    oh, ow = pooled.shape[2:]
    dtype = torch.int32 if (oh + 1) * stride * width < 2**31 else torch.int64
    rows = torch.arange(oh, dtype=dtype, device=pooled.device) * (stride * width)
    return rows[:, None] + torch.arange(ow, dtype=dtype, device=pooled.device) * stride


def _plane_index(switches: Tensor, width: int, kernel_size: int, stride: int) -> Tensor:
    """`[N, C, OH, OW]` int64: the switches as positions in a plane; ValueError if out of range."""
    _check_range(switches, kernel_size)
    if kernel_size & (kernel_size - 1) == 0:
        row = switches >> (kernel_size.bit_length() - 1)  # the division below is several times slower
    else:
        row = torch.div(switches, kernel_size, rounding_mode="floor")
    corners = _corners(switches, width, stride)
    index = switches.to(corners.dtype).add_(row, alpha=width - kernel_size)
    return index.add_(corners).to(torch.int64)


def _check_range(switches: Tensor, kernel_size: int) -> None:
    largest = int(switches.amax())
    if largest >= kernel_size**2:
        raise ValueError(
            f"switches reach {largest}, but a window of {kernel_size}×{kernel_size} has 0 to {kernel_size**2 - 1}: "
            "pass what max_pool2d_switches returned for the same kernel_size"
        )


def _check_range_unless_slow(switches: Tensor, kernel_size: int) -> None:
    if not switches.is_cuda or os.environ.get("FASTNST_KERNELS_CHECK") == "1":
        _check_range(switches, kernel_size)


def _pooled_shape(x: Tensor, kernel_size: int, stride: int) -> tuple[int, int, int, int]:
    n, c, h, w = x.shape
    return n, c, (h - kernel_size) // stride + 1, (w - kernel_size) // stride + 1


@torch.library.custom_op("fastnst::max_pool2d_switches", mutates_args=())
def _max_pool(x: Tensor, kernel_size: int, stride: int) -> tuple[Tensor, Tensor]:
    x = runtime.dense(x)
    if runtime.implementation(x) == "reference":
        y, switches = max_pool2d_switches_reference(x, kernel_size, stride)
        return runtime.dense(y, like=x), runtime.dense(switches, like=x)
    shape = _pooled_shape(x, kernel_size, stride)
    y, switches = runtime.allocate_like(x, shape), runtime.allocate_like(x, shape, torch.uint8)
    max_pool_kernels.pool(x, y, switches, kernel_size, stride)
    return y, switches


@_max_pool.register_fake
def _(x: Tensor, kernel_size: int, stride: int) -> tuple[Tensor, Tensor]:
    shape = _pooled_shape(x, kernel_size, stride)
    return runtime.allocate_like(x, shape), runtime.allocate_like(x, shape, torch.uint8)


@torch.library.custom_op("fastnst::max_unpool2d_switches", mutates_args=())
def _max_unpool(y: Tensor, switches: Tensor, height: int, width: int, kernel_size: int, stride: int) -> Tensor:
    switches = runtime.dense(switches)  # in the format of the pooled image, unlike perhaps dy
    y = runtime.dense(y, like=switches)
    x = runtime.allocate_like(switches, (*y.shape[:2], height, width), y.dtype)
    if runtime.implementation(y) == "triton":
        _check_range_unless_slow(switches, kernel_size)
        max_pool_kernels.unpool(y, switches, x, kernel_size, stride)
        return x
    index = _plane_index(switches, width, kernel_size, stride)
    # ATen's pooling backward adds where windows overlap, in the dtype that it is given. ATen's unpool overwrites, and
    # takes longer. Only x's shape and format matter.
    dtype = y.dtype if stride >= kernel_size else runtime.statistics_dtype(y)
    placed: Tensor = torch.ops.aten.max_pool2d_with_indices_backward(
        y.to(dtype), x.to(dtype), [kernel_size] * 2, [stride] * 2, [0, 0], [1, 1], False, index
    )
    return placed.to(y.dtype)


@_max_unpool.register_fake
def _(y: Tensor, switches: Tensor, height: int, width: int, kernel_size: int, stride: int) -> Tensor:
    return runtime.allocate_like(switches, (*y.shape[:2], height, width), y.dtype)


@torch.library.custom_op("fastnst::gather_switches", mutates_args=())
def _gather(x: Tensor, switches: Tensor, kernel_size: int, stride: int) -> Tensor:
    switches = runtime.dense(switches)
    x = runtime.dense(x, like=switches)
    if runtime.implementation(x) == "reference":
        return gather_switches_reference(x, switches, kernel_size, stride)
    _check_range_unless_slow(switches, kernel_size)
    y = runtime.allocate_like(switches, dtype=x.dtype)
    max_pool_kernels.gather(x, switches, y, kernel_size, stride)
    return y


@_gather.register_fake
def _(x: Tensor, switches: Tensor, kernel_size: int, stride: int) -> Tensor:
    return runtime.allocate_like(switches, dtype=x.dtype)


def _setup_pool_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _save(ctx, inputs[0], output[1], *inputs[1:])
    ctx.mark_non_differentiable(output[1])


def _setup_unpool_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _save(ctx, output, inputs[1], *inputs[-2:])


def _setup_gather_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _save(ctx, *inputs)


def _save(ctx: Any, x: Tensor, switches: Tensor, kernel_size: int, stride: int) -> None:
    ctx.size, ctx.window = x.shape[2:], (kernel_size, stride)
    ctx.save_for_backward(switches)


def _pool_autograd(ctx: Any, dy: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    runtime.check_tensor("the gradient", dy)
    dx = torch.ops.fastnst.max_unpool2d_switches(dy, *ctx.saved_tensors, *ctx.size, *ctx.window)
    return dx, None, None


def _unpool_autograd(ctx: Any, dx: Tensor) -> tuple[Tensor | None, ...]:
    runtime.check_tensor("the gradient", dx)
    dy = torch.ops.fastnst.gather_switches(dx, *ctx.saved_tensors, *ctx.window)
    return dy, None, None, None, None, None


def _gather_autograd(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    return *_pool_autograd(ctx, dy), None


torch.library.register_autograd("fastnst::max_pool2d_switches", _pool_autograd, setup_context=_setup_pool_context)
torch.library.register_autograd("fastnst::max_unpool2d_switches", _unpool_autograd, setup_context=_setup_unpool_context)
torch.library.register_autograd("fastnst::gather_switches", _gather_autograd, setup_context=_setup_gather_context)


def max_pool2d_switches(x: Tensor, kernel_size: int = 2, stride: int = 2) -> tuple[Tensor, Tensor]:
    """Max pooling without padding, and the position of each maximum in its window.

    Args:
        x: `[N, C, H, W]`, float32, float16, bfloat16 (float64 on the reference path); any memory format.
        kernel_size: side of the square window; at most 16, so that a switch fits a byte.
        stride: step between windows; less than `kernel_size` makes them overlap.

    Returns:
        y: `[N, C, ⌊(H − kernel_size)/stride⌋ + 1, likewise W]` in x's dtype and memory format.
        switches: the same shape, uint8: row·kernel_size + column of the first maximum within the window; a NaN counts
            as the maximum, the last one if there are several (PyTorch's rule).

    Raises:
        ValueError: the window does not fit x, or sizes are out of range.
    """
    runtime.check_images("x", x)
    _check_window(kernel_size, stride)
    if min(x.shape[2:]) < kernel_size:
        raise ValueError(f"x has shape {tuple(x.shape)}: a window of {kernel_size} does not fit its height and width")
    y, switches = torch.ops.fastnst.max_pool2d_switches(x, kernel_size, stride)
    return y, switches


def max_unpool2d_switches(
    y: Tensor, switches: Tensor, output_size: tuple[int, int], kernel_size: int = 2, stride: int = 2
) -> Tensor:
    """The adjoint of `max_pool2d_switches`: values at the positions of their switches; overlaps add.

    Zeiler & Fergus 2014, §2.1; also the gradient of the pooling. Differentiable in `y`.

    Args:
        y: `[N, C, OH, OW]`, float32, float16, bfloat16 (float64 on the reference path); any memory format.
        switches: `[N, C, OH, OW]` uint8, from `max_pool2d_switches`. On a GPU a switch out of range is not an error:
            its value is dropped; see `FASTNST_KERNELS_CHECK` at the head of this file.
        output_size: `(H, W)` of the pooling's input.
        kernel_size: as in the pooling.
        stride: as in the pooling.

    Returns:
        `[N, C, H, W]` in y's dtype and the switches' memory format, which is that of the pooling's input.

    Raises:
        ValueError: shapes, dtypes or devices do not match, pooling `output_size` would not give `y`, or (not on a
            GPU) a switch is out of range.
    """
    runtime.check_images("y", y)
    _check_window(kernel_size, stride)
    runtime.check_tensor("switches", switches)
    if switches.shape != y.shape:
        raise ValueError(f"switches have shape {tuple(switches.shape)}, expected y's {tuple(y.shape)}")
    if switches.dtype != torch.uint8:
        raise ValueError(f"switches are {switches.dtype}, expected torch.uint8")
    runtime.check_same_device("switches", switches, "y", y)
    if len(output_size) != 2 or not all(map(runtime.is_integer, output_size)):
        raise ValueError(f"output_size is {tuple(output_size)}, expected (height, width)")
    height, width = output_size
    pooled = tuple((side - kernel_size) // stride + 1 for side in (height, width))
    if pooled != tuple(y.shape[2:]):
        raise ValueError(
            f"output_size {(height, width)} with window {kernel_size} and stride {stride} pools to {pooled}, "
            f"but y has shape {tuple(y.shape)}: give the size of the pooling's input"
        )
    x: Tensor = torch.ops.fastnst.max_unpool2d_switches(y, switches, height, width, kernel_size, stride)
    return x


def _check_window(kernel_size: int, stride: int) -> None:
    for name, value in (("kernel_size", kernel_size), ("stride", stride)):
        if not runtime.is_integer(value):
            raise ValueError(f"{name} is {value!r}, expected one whole number: windows are square")
    if kernel_size < 1 or kernel_size * kernel_size > 256:
        raise ValueError(f"kernel_size is {kernel_size}, expected 1 to 16: a switch must fit a byte")
    if stride < 1:
        raise ValueError(f"stride is {stride}, expected at least 1")
