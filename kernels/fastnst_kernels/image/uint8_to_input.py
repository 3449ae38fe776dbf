"""uint8 images to a network's floating input, scaled, shifted and reflection-padded in one pass.

Legend: x `[N, 3, H, W]` uint8, c a channel, p the padding in pixels; all images are channels_last.

    y[:, c] = reflect(factor·scale[c]·x[:, c] + shift[c], p)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastnst_kernels import runtime
from fastnst_kernels.image import kernels


def uint8_to_input_reference(
    images: Tensor,
    factor: float = 1.0,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    padding: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The formula in PyTorch, in fp32 (fp64 for fp64); same arguments as `uint8_to_input`."""
    rows = images.permute(0, 2, 3, 1)
    if padding:
        for dimension in (1, 2):
            rows = rows.index_select(dimension, _mirrored(rows.shape[dimension], padding, rows.device))
    y = rows.permute(0, 3, 1, 2).to(torch.promote_types(dtype, torch.float32))
    y = y * (factor if scale is None else (factor * scale.to(y.dtype)).view(3, 1, 1))
    y = y if shift is None else y.add_(shift.to(y.dtype).view(3, 1, 1))
    return y.to(dtype)


def _mirrored(side: int, padding: int, device: torch.device) -> Tensor:
    """The index of the pixel at each position of a padded row of `side` pixels; reflections repeat."""
    period = 2 * (side - 1)
    position = torch.arange(-padding, side + padding, device=device).abs() % period
    return torch.minimum(position, period - position)


@torch.library.custom_op("fastnst::uint8_to_input", mutates_args=())
def _uint8_to_input(
    images: Tensor, factor: float, scale: Tensor | None, shift: Tensor | None, padding: int, dtype: torch.dtype
) -> Tensor:
    images = images.contiguous(memory_format=torch.channels_last)
    y = _allocate(images, padding, dtype)
    if runtime.implementation(y) == "reference":
        return y.copy_(uint8_to_input_reference(images, factor, scale, shift, padding=padding, dtype=dtype))
    scale, shift = (None if vector is None else vector.contiguous() for vector in (scale, shift))
    kernels.uint8_to_input(images, factor, scale, shift, y, padding)
    return y


@_uint8_to_input.register_fake
def _(images: Tensor, *rest: Any) -> Tensor:
    return _allocate(images, *rest[-2:])


def _allocate(images: Tensor, padding: int, dtype: torch.dtype) -> Tensor:
    n, _, height, width = images.shape
    return kernels.allocate(n, height + 2 * padding, width + 2 * padding, images, dtype)


def uint8_to_input(
    images: Tensor,
    factor: float = 1.0,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    padding: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """`factor·scale[c]·images[:, c] + shift[c]`, reflection-padded, in one pass over the bytes.

    It has no gradient; images that need one are floating and take PyTorch's own operations.

    Args:
        images: `[N, 3, H, W]` uint8; channels_last, as a permuted batch `[N, H, W, 3]`, is not copied.
        factor: of all channels.
        scale: `[3]`, floating; None: 1.
        shift: `[3]`, floating; None: 0.
        padding: pixels at each side, mirrored about the border pixel, which is not repeated; if it is wider than what
            it mirrors, the reflection repeats, as in `numpy.pad(mode="reflect")`.
        dtype: of the result: float32, float16, bfloat16 or, on the reference path, float64.

    Returns:
        `[N, 3, H + 2·padding, W + 2·padding]`, channels_last, computed in float32 (float64 for float64).

    Raises:
        ValueError: another shape or dtype, negative padding, or padding of a single row or column.
    """
    kernels.check_three_channels("images", images)
    if images.dtype != torch.uint8:
        raise ValueError(f"images are {images.dtype}, expected torch.uint8")
    if not runtime.is_integer(padding):
        raise ValueError(f"padding is {padding!r}, expected one whole number")
    runtime.check_number("factor", factor)
    if padding < 0 or (padding and min(images.shape[2:]) < 2):
        raise ValueError(
            f"padding is {padding} for images {tuple(images.shape)}: expected 0 or more, "
            "and 0 if a side has one pixel, which mirrors nothing"
        )
    kernels.check_dtype(dtype)
    for name, vector in (("scale", scale), ("shift", shift)):
        if vector is not None:
            runtime.check_per_channel(name, vector, images)
    y: Tensor = torch.ops.fastnst.uint8_to_input(images, factor, scale, shift, padding, dtype)
    return y
