"""Colours for the pixels that cannot be seen.

The colour under full transparency is whatever a program left there, and must not reach a network or a statistic. A
pixel of opacity α and colour c becomes

    out = w · c + (1 - w) · fill,    w = 3t² - 2t³,  t = min(2α, 1)

so that it keeps its colour from α = 1/2 on, does not count at α = 0, and in between changes smoothly. The fill
continues the visible pixels (pull-push: Gortler et al. 1996, The Lumigraph, §3.4.2). Pulling halves the image until one
pixel is left, each the mean of its four weighted by w, with the highest of their weights: with their sum, as in the
paper, a wide area of nearly invisible pixels would pass for a visible one. Pushing goes back: each coarser level,
enlarged bilinearly, is the fill of the finer one. Integers only, so the same on every machine. Where nothing is visible
at all, the ground is white.
"""

from collections.abc import Iterator

import numpy as np
from PIL import Image

GROUND = (255, 255, 255)
"""Colour of an image without a visible pixel."""

_STRIP_PIXELS = 1 << 18
_T = np.minimum(np.arange(256) / 127.5, 1)
_WEIGHTS = np.rint(255 * (3 - 2 * _T) * _T**2).astype(np.uint8)
"""w · 255 by α · 255."""


def is_transparent(image: Image.Image) -> bool:
    """Whether any pixel of an RGBA or LA image is not opaque."""
    lowest, _ = image.getchannel("A").getextrema()
    return lowest != 255


def fill_hidden(image: Image.Image) -> None:
    """Replace the hidden colours of an RGBA image, in place; its opacities stay."""
    levels = [_pull_image(image)]
    if not levels[0][1].any():
        alpha = image.getchannel("A")
        image.paste((*GROUND, 0), (0, 0, image.width, image.height))
        image.putalpha(alpha)
        return
    while levels[-1][1].size > 1:
        levels.append(_pull(*levels[-1]))
    fill = levels.pop()[0]
    while levels:
        colors, weights = levels.pop()
        for rows in _strips(*weights.shape):
            colors[rows] = _blend(colors[rows], weights[rows], _enlarge(fill, rows, weights.shape[1]))
        fill = colors
    for rows in _strips(image.height, image.width):
        pixels = _rows_of(image, rows)
        weights = _WEIGHTS[pixels[..., 3]]
        if weights.min() < 255:
            pixels[..., :3] = _blend(pixels[..., :3], weights, _enlarge(fill, rows, image.width))
            image.paste(Image.fromarray(pixels), (0, rows.start))


_Level = tuple[np.ndarray, np.ndarray]
"""Colours, uint8 `[H, W, 3]`, and weights w · 255, uint8 `[H, W]`."""


def _pull_image(image: Image.Image) -> _Level:
    """Halve an image, strip by strip: a copy of the largest would take gigabytes."""
    height, width = -(-image.height // 2), -(-image.width // 2)
    colors, weights = np.empty((height, width, 3), np.uint8), np.empty((height, width), np.uint8)
    for rows in _strips(image.height, image.width):
        pixels = _rows_of(image, rows)
        half = slice(rows.start // 2, -(-rows.stop // 2))
        colors[half], weights[half] = _pull(pixels[..., :3], _WEIGHTS[pixels[..., 3]])
    return colors, weights


def _pull(colors: np.ndarray, weights: np.ndarray) -> _Level:
    """Halve a level; an odd side is extended by pixels without weight."""
    odd = [(0, side % 2) for side in weights.shape]
    fine = np.pad(weights, odd).astype(np.uint32)
    total = _sum_of_four(fine)
    divisor, half = np.maximum(total, 1), total >> 1
    result = np.empty((*total.shape, 3), np.uint8)
    for channel in range(3):
        result[..., channel] = (_sum_of_four(np.pad(colors[..., channel], odd) * fine) + half) // divisor
    rows = np.maximum(fine[::2], fine[1::2])
    return result, np.maximum(rows[:, ::2], rows[:, 1::2]).astype(np.uint8)


def _sum_of_four(fine: np.ndarray) -> np.ndarray:
    rows = fine[::2] + fine[1::2]
    total: np.ndarray = rows[:, ::2] + rows[:, 1::2]
    return total


def _enlarge(coarse: np.ndarray, rows: slice, width: int) -> np.ndarray:
    """Return rows of a level twice as large, uint8 `[rows, width, 3]`, interpolated bilinearly."""
    fine = np.arange(rows.start, rows.stop)
    near, far = fine // 2, np.clip(fine // 2 + np.where(fine % 2, 1, -1), 0, len(coarse) - 1)
    mixed = coarse[near] * np.uint16(3) + coarse[far]
    enlarged = np.empty((len(fine), 2 * coarse.shape[1], 3), np.uint8)
    left, right = np.concatenate([mixed[:, :1], mixed[:, :-1]], 1), np.concatenate([mixed[:, 1:], mixed[:, -1:]], 1)
    mixed *= 3
    mixed += 8
    enlarged[:, ::2] = (mixed + left) >> 4
    enlarged[:, 1::2] = (mixed + right) >> 4
    return enlarged[:, :width]


def _blend(colors: np.ndarray, weights: np.ndarray, fill: np.ndarray) -> np.ndarray:
    """Return `weights / 255 · colors + (1 - weights / 255) · fill`, rounded."""
    share = weights[..., None].astype(np.uint16)
    blended: np.ndarray = (colors * share + fill * (np.uint16(255) - share) + np.uint16(127)) // np.uint16(255)
    return blended.astype(np.uint8)


def _rows_of(image: Image.Image, rows: slice) -> np.ndarray:
    return np.array(image.crop((0, rows.start, image.width, rows.stop)))


def _strips(height: int, width: int) -> Iterator[slice]:
    """Yield ranges of rows, each an even number but the last."""
    count = max(2, _STRIP_PIXELS // width // 2 * 2)
    for top in range(0, height, count):
        yield slice(top, min(top + count, height))
