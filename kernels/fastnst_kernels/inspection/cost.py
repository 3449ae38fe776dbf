"""The minimum cost of each op: bytes that must move and floating-point operations that must be done.

Both follow from shapes and dtypes alone and give a lower bound for a measured time on any GPU: bytes over the bandwidth
of a plain copy, operations over the rate of the arithmetic units.

Bytes: each input of the op is read once and each output written once, per-channel vectors and statistics included;
nothing is read again, and values that stay on chip between two steps cost nothing. A backward is an op of its own: its
inputs are the upstream gradient and the tensors of the forward that its formula needs, its outputs the gradients.
Statistics and Gram matrices are float32 (float64 for float64); parameters are `parameter_dtype`.

Operations: an addition, a subtraction, a multiplication, a comparison, a division and a square root count one each, a
fused multiply-add therefore two. Matrix products are counted in full, 2·M·N·K, although a Gram matrix is symmetric:
matrix units cannot skip half of a tile.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Cost:
    """Floating-point operations, and the fewest bytes read and written together."""

    flops: int
    minimum_bytes: int

    def __add__(self, other: Cost) -> Cost:
        """One op after the other; nothing stays on chip between them."""
        return Cost(self.flops + other.flops, self.minimum_bytes + other.minimum_bytes)


def _elements(shape: Sequence[int]) -> int:
    n, c, h, w = shape
    return n * c * h * w


def _statistics_size(dtype: torch.dtype) -> int:
    return max(4, dtype.itemsize)


def padded_elements(shape: Sequence[int], upsample: int = 1, padding: int = 0) -> int:
    """Elements of `[N, C, upsample·H + 2·padding, upsample·W + 2·padding]` for `shape` `[N, C, H, W]`."""
    n, c, h, w = shape
    return n * c * (upsample * h + 2 * padding) * (upsample * w + 2 * padding)


def instance_norm(shape: Sequence[int], dtype: torch.dtype, **options: Any) -> Cost:
    """`relu?((x − μ)·r·w + b + residual)`, μ and r per sample and channel, then upsampled and padded.

    Bytes: x and the residual in, y out at its own size; w and b in, μ and r out for the backward.
    Operations per element: mean 1, variance 3, one multiply-add with folded scale and shift, residual 1, ReLU 1; per
    group of one μ and r: 8 to compute and fold them. Upsampling and padding copy.

    `shape` is x's, `dtype` that of x, residual and y; the options are `residual` and `relu` (booleans), `upsample`,
    `padding` at each side, and `parameter_dtype` of weight and bias.
    """
    return _norm(shape, dtype, groups=shape[0] * shape[1], **options)


def batch_norm(shape: Sequence[int], dtype: torch.dtype, *, training: bool, **options: Any) -> Cost:
    """As `instance_norm`, with μ and r per channel.

    Training also reads and writes both running statistics (float32). Inference reads them; it computes neither mean and
    variance (4 operations per element) nor their divisions, and saves no statistics.
    """
    vectors = 4 if training else 2
    return _norm(shape, dtype, groups=shape[1], training=training, running_vectors=vectors, **options)


def _norm(
    shape: Sequence[int],
    dtype: torch.dtype,
    *,
    groups: int,
    training: bool = True,
    running_vectors: int = 0,
    residual: bool = False,
    relu: bool = False,
    upsample: int = 1,
    padding: int = 0,
    parameter_dtype: torch.dtype = torch.float32,
) -> Cost:
    elements, statistics = _elements(shape), _statistics_size(dtype)
    moved = (elements * (1 + residual) + padded_elements(shape, upsample, padding)) * dtype.itemsize
    moved += 2 * shape[1] * parameter_dtype.itemsize + running_vectors * shape[1] * statistics
    moved += 2 * groups * statistics if training else 0
    # r = 1/√(σ² + ε) is 3, scale w·r and shift b − μ·w·r are 3, the two divisions by M 2
    per_group = 8 if training else 6
    per_element = (4 if training else 0) + 2 + residual + relu
    return Cost(elements * per_element + groups * per_group, moved)


def instance_norm_backward(shape: Sequence[int], dtype: torch.dtype, **options: Any) -> Cost:
    """`dx = w·r·(g − Σg/M − x̂·Σ(g·x̂)/M)`, `d_weight`, `d_bias` and, if there was one, `d_residual = g`.

    Bytes: dy (of y's size) and x in, dx out; w, μ, r in, `d_weight` and `d_bias` out. The ReLU's mask follows from x,
    w, b, μ, r, unless a residual was added: then one more tensor of x's size gives the sign. `d_residual` is written
    if it differs from dy: behind a ReLU, padding or upsampling.
    Operations per element: x̂ 2, Σg 1, Σg·x̂ 2, dx 4; the mask 1, and 2 to recompute what it tests. The adjoint of
    upsampling adds upsample² − 1 values per element, that of padding one per element of the padding.
    """
    return _norm_backward(shape, dtype, groups=shape[0] * shape[1], **options)


def batch_norm_backward(shape: Sequence[int], dtype: torch.dtype, *, training: bool, **options: Any) -> Cost:
    """As `instance_norm_backward`. In inference dx = w·r·g, one operation; `d_weight` still needs x."""
    return _norm_backward(shape, dtype, groups=shape[1], training=training, **options)


def _norm_backward(
    shape: Sequence[int],
    dtype: torch.dtype,
    *,
    groups: int,
    training: bool = True,
    residual: bool = False,
    relu: bool = False,
    upsample: int = 1,
    padding: int = 0,
    parameter_dtype: torch.dtype = torch.float32,
) -> Cost:
    n, c, h, w = shape
    elements, padded = _elements(shape), padded_elements(shape, upsample, padding)
    sign_from_elsewhere = residual and relu
    own_residual_gradient = residual and (relu or upsample > 1 or padding > 0)
    moved = (padded + elements * (2 + sign_from_elsewhere + own_residual_gradient)) * dtype.itemsize
    moved += 2 * groups * _statistics_size(dtype)
    needs_bias = relu and not residual
    moved += (3 + needs_bias) * c * parameter_dtype.itemsize  # weight and perhaps bias in, both gradients out
    mask = 0 if not relu else 1 if residual else 3
    per_element = 2 + 1 + 2 + (4 if training else 1) + mask
    border = padded - n * c * h * w * upsample**2
    adjoint = elements * (upsample**2 - 1) + border
    # per group: w·r, and the division by M of each sum that enters dx
    return Cost(elements * per_element + adjoint + groups * (3 if training else 1), moved)


def gram_matrix(shape: Sequence[int], dtype: torch.dtype) -> Cost:
    """`G = FᵀF / (C·H·W)`: F in, `[N, C, C]` float32 out; a product with K = H·W, and a scaling."""
    n, c, h, w = shape
    grams = n * c * c
    return Cost(2 * grams * h * w + grams, _elements(shape) * dtype.itemsize + grams * _statistics_size(dtype))


def gram_matrix_backward(shape: Sequence[int], dtype: torch.dtype) -> Cost:
    """`dF = F(dG + dGᵀ) / (C·H·W)`: F and dG in, dF out; a sum, a scaling and a product with K = C."""
    n, c, h, w = shape
    grams = n * c * c
    moved = 2 * _elements(shape) * dtype.itemsize + grams * _statistics_size(dtype)
    return Cost(2 * grams * h * w + 2 * grams, moved)


def style_loss(shape: Sequence[int], dtype: torch.dtype, *, shared_target: bool = True) -> Cost:
    """`‖D‖²_F`, D = G − T, per sample: F and T in; the loss and D + Dᵀ with its scale out.

    D + Dᵀ is written in the features' dtype, an operand of the backward's product. Operations on C × C beside the
    product: scaling, difference, square, sum, and the sum of D and Dᵀ.

    `shared_target` says that T is one `[C, C]` for all samples.
    """
    n, c, h, w = shape
    grams = n * c * c
    statistics = ((c * c if shared_target else grams) + 2 * n) * _statistics_size(dtype)
    return Cost(2 * grams * h * w + 5 * grams, (_elements(shape) + grams) * dtype.itemsize + statistics)


def style_loss_backward(shape: Sequence[int], dtype: torch.dtype) -> Cost:
    """`dF = 2·dl·F(D + Dᵀ) / (C·H·W)`: F, D + Dᵀ, its scale and dl in, dF out; T is a constant.

    A product with K = C, and one multiplication per element of C × C or of dF, whichever are fewer.
    """
    n, c, h, w = shape
    grams = n * c * c
    moved = (2 * _elements(shape) + grams) * dtype.itemsize + 2 * n * _statistics_size(dtype)
    return Cost(2 * grams * h * w + min(grams, _elements(shape)), moved)


def loss_relu_backward(
    shape: Sequence[int], dtype: torch.dtype, *, incoming: bool = True, style: bool = False, content: bool = False
) -> Cost:
    """`[F > 0]·(I + s·F(D + Dᵀ)/(C·H·W) + c·(F − X))`: F and the operands of the terms in, the result out.

    Bytes: I and X are of F's size; the style adds D + Dᵀ in F's dtype, its scale and s, the content c.
    Operations per element: the mask 1, the content 3 with its sum, I and the style one addition each, beside the
    style's product and scaling as in `style_loss_backward`. The first term needs no addition.

    `incoming`, `style` and `content` say which terms there are.
    """
    n, c, h, w = shape
    elements, grams = _elements(shape), n * c * c
    tensors = 2 + incoming + content
    vectors = (2 * style + content) * n * _statistics_size(dtype)
    product = 2 * grams * h * w + min(grams, elements) if style else 0
    additions = incoming + style + content - 1
    flops = elements * (1 + additions + 2 * content) + product
    return Cost(flops, (elements * tensors + grams * style) * dtype.itemsize + vectors)


def _windows(shape: Sequence[int], kernel_size: int, stride: int) -> int:
    n, c, h, w = shape
    return n * c * ((h - kernel_size) // stride + 1) * ((w - kernel_size) // stride + 1)


def _covered(shape: Sequence[int], kernel_size: int, stride: int) -> int:
    """Elements in at least one window: not an odd last row, nor those that a wide stride skips."""
    n, c, *sides = shape
    covered = n * c
    for side in sides:
        count = (side - kernel_size) // stride + 1
        covered *= count * kernel_size if stride >= kernel_size else (count - 1) * stride + kernel_size
    return covered


def max_pool2d_switches(shape: Sequence[int], dtype: torch.dtype, kernel_size: int = 2, stride: int = 2) -> Cost:
    """The covered part of x in, y and a byte per window out; kernel_size² − 1 comparisons per window."""
    windows = _windows(shape, kernel_size, stride)
    moved = (_covered(shape, kernel_size, stride) + windows) * dtype.itemsize + windows
    return Cost(windows * (kernel_size**2 - 1), moved)


def max_unpool2d_switches(shape: Sequence[int], dtype: torch.dtype, kernel_size: int = 2, stride: int = 2) -> Cost:
    """y and one byte per window in, the whole of `shape` `[N, C, H, W]` out. Also the pool's backward.

    One addition per window if windows overlap; else values are only copied.
    """
    windows = _windows(shape, kernel_size, stride)
    moved = (_elements(shape) + windows) * dtype.itemsize + windows
    return Cost(windows if stride < kernel_size else 0, moved)


def max_unpool2d_switches_backward(
    shape: Sequence[int], dtype: torch.dtype, kernel_size: int = 2, stride: int = 2
) -> Cost:
    """The covered part of the gradient and the switches in, one value per window out; no arithmetic.

    Only one element per window is needed. But memory moves in sectors of 32 bytes, and with adjacent 16-bit channels a
    sector that no switch points at is rare (0.75¹⁶ = 1%), so the covered part counts as read.
    """
    windows = _windows(shape, kernel_size, stride)
    return Cost(0, (_covered(shape, kernel_size, stride) + windows) * dtype.itemsize + windows)


def uint8_to_input(shape: Sequence[int], dtype: torch.dtype, padding: int = 0) -> Cost:
    """`[N, 3, H, W]` bytes in, the padded image in `dtype` out; a multiplication and an addition each.

    Scale and shift count as given; padding copies.
    """
    moved = _elements(shape) + padded_elements(shape, 1, padding) * dtype.itemsize + 2 * 3 * _statistics_size(dtype)
    return Cost(2 * _elements(shape), moved)


def _neighbours(shape: Sequence[int]) -> int:
    n, c, h, w = shape
    return n * c * ((h - 1) * w + h * (w - 1))


def output_to_vgg_input(shape: Sequence[int], dtype: torch.dtype) -> Cost:
    """z in, u out, both `shape` `[N, 3, H, W]` in `dtype`; mean and gain in, three sums per image out.

    Operations: per element tanh 1, factor and offset 2, mean and gain 2; per pair of neighbours difference, square and
    sum.
    """
    vectors = (2 * 3 + 3 * shape[0]) * _statistics_size(dtype)
    return Cost(5 * _elements(shape) + 3 * _neighbours(shape), 2 * _elements(shape) * dtype.itemsize + vectors)


def output_to_vgg_input_backward(shape: Sequence[int], dtype: torch.dtype) -> Cost:
    """z and ∂L/∂u in, ∂L/∂z out, all of `shape` `[N, 3, H, W]` in `dtype`; gain in.

    Operations: per element tanh 1, its slope 2, gain, factor and slope 3; per pair of neighbours difference 1, its
    weight 1, and the addition to both 2.
    """
    moved = 3 * _elements(shape) * dtype.itemsize + 3 * _statistics_size(dtype)
    return Cost(6 * _elements(shape) + 4 * _neighbours(shape), moved)
