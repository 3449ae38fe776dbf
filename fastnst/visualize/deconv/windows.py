"""Square windows of maps, one per neuron: cut out, put back, and cleared outside the map.

Legend: K windows of s×s; `corners` `[K, 2]` int64 holds the row and column of the map where each begins, which may be
negative, as windows may reach beyond the map on every side.
"""

from collections.abc import Iterator

import torch
from torch import Tensor


def clear_outside(windows: Tensor, corners: Tensor, size: tuple[int, int]) -> Tensor:
    """Zero, in place, the parts of `[K, C, s, s]` outside a map of `size` (H, W)."""
    rows, columns = _coordinates(corners, windows.shape[-1])
    inside_rows = (rows >= 0) & (rows < size[0])
    inside_columns = (columns >= 0) & (columns < size[1])
    inside = inside_rows[:, None, :, None] & inside_columns[:, None, None, :]
    return windows.masked_fill_(~inside, 0)


def cut_clamped(maps: Tensor, rows_of: Tensor, channels_of: Tensor | None, corners: Tensor, side: int) -> Tensor:
    """Cut windows out of `[N, C, H, W]`; outside the map they repeat its border.

    Args:
        rows_of, channels_of: `[K]`, row in the batch and only channel of each window; None takes all channels.

    Returns:
        `[K, C, s, s]` channels_last, or `[K, 1, s, s]`.
    """
    rows, columns = _coordinates(corners, side)
    rows, columns = rows.clamp_(0, maps.shape[2] - 1)[:, :, None], columns.clamp_(0, maps.shape[3] - 1)[:, None, :]
    images = rows_of[:, None, None]
    if channels_of is None:
        # Whole pixels are copied, all channels of one at once.
        return maps.permute(0, 2, 3, 1)[images, rows, columns].permute(0, 3, 1, 2)
    return maps[images, channels_of[:, None, None], rows, columns].unsqueeze(1)


def put_back(windows: Tensor, corners: Tensor, whole: Tensor) -> None:
    """Write `[K, C, s, s]` into `whole` `[K, C, H, W]`; parts outside are dropped."""
    for index, inner, outer in _overlaps(corners, windows.shape[-1], whole.shape):
        whole[(index, slice(None), *outer)] = windows[(index, slice(None), *inner)]


def cut(maps: Tensor, corners: Tensor, side: int, *, rows: Tensor | None = None, fill: float = 0.0) -> Tensor:
    """Cut windows `[K, C, s, s]` out of `[N, C, H, W]`.

    Args:
        rows: `[K]`, row in the batch of each window; None: the k-th window of the k-th row.
        fill: value outside the map.
    """
    chosen = range(len(corners)) if rows is None else rows.tolist()
    windows = maps.new_full((len(corners), maps.shape[1], side, side), fill)
    for index, inner, outer in _overlaps(corners, side, maps.shape):
        windows[(index, slice(None), *inner)] = maps[(chosen[index], slice(None), *outer)]
    return windows


def _coordinates(corners: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Return the rows and columns `[K, s]` of the windows."""
    steps = torch.arange(side, device=corners.device)
    return corners[:, :1] + steps, corners[:, 1:] + steps


def _overlaps(
    corners: Tensor, side: int, shape: torch.Size
) -> Iterator[tuple[int, tuple[slice, slice], tuple[slice, slice]]]:
    """Yield, per window, its index, its part inside the map, and the same part of the map."""
    # Copying rectangles one by one is far faster than index arithmetic for every pixel of every map.
    height, width = shape[-2:]
    for index, (top, left) in enumerate(corners.tolist()):
        rows, columns = _clamped(top, side, height), _clamped(left, side, width)
        inner = slice(rows[0] - top, rows[1] - top), slice(columns[0] - left, columns[1] - left)
        yield index, inner, (slice(*rows), slice(*columns))


def _clamped(first: int, side: int, length: int) -> tuple[int, int]:
    return min(max(first, 0), length), min(max(first + side, 0), length)
