"""Drawing: numbers as colours, and images on contact sheets with captions.

Projections and heat maps have no colours of their own. Zero is always the same colour (mid-grey, black or white),
images to be compared share one scale, and the caller prints it on the sheet.
"""

import bisect
import functools
import math
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from fastnst.images import to_array

# Nine colours of matplotlib's "inferno" (CC0), evenly spaced: lightness grows evenly from black to pale yellow.
_HEAT = ("000004", "210c4a", "57106e", "8a226a", "bc3754", "e45a31", "f98e09", "f9cb35", "fcffa4")
_SIGNED = ("0b2a6b", "2f6fb7", "9cc3e3", "ffffff", "f3b296", "cb4335", "7a1020")

_TILE_SIDES = (96, 512)  # pixels of a tile's longer side: below it is enlarged, above reduced, by whole factors
_MOSAIC_LARGEST = 128
_MARGIN, _GAP, _LINE_GAP = 24, 10, 3
_NARROWEST = 320  # pixels within the margins, so that the title above one small image is not a column of words
_CAPTION_LINES = 3
_INK, _FAINT = (28, 28, 30), (104, 104, 110)
# Replacements for characters that Pillow's own font lacks.
_REPLACEMENTS = str.maketrans(
    {"×": "x", "−": "-", "–": "-", "—": "-", "→": "->", "ß": "ss", "ø": "o", "Ø": "O", "ł": "l", "Ł": "L", "æ": "ae"}
)

_Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@dataclass(frozen=True)
class Row:
    """One row of a contact sheet."""

    images: Sequence[Tensor]
    """Each `[3, H, W]` or `[1, 3, H, W]`, RGB in [0, 1]; sizes may differ."""
    captions: Sequence[str]
    """One for each image; may be empty."""
    label: str = ""
    """A line above the row."""


def colour_scale(projections: Tensor) -> float:
    """Return the value drawn as black and white: the 99.9th percentile of |x| over nonzero entries, or 1.

    So neither a few outliers nor the many exact zeros of a projection decide. Pass images to be compared together.
    """
    magnitudes = projections.detach().flatten().abs()
    magnitudes = magnitudes[magnitudes > 0]
    if not magnitudes.numel():
        return 1.0
    rank = math.ceil(0.999 * magnitudes.numel())
    return float(magnitudes.double().kthvalue(rank).values)


def about_grey(projections: Tensor, scale: float) -> Tensor:
    """Map projections to images: 0 to mid-grey, −scale to black and +scale to white, per colour channel.

    Args:
        projections: `[..., 3, H, W]`, in any unit.
        scale: in the same unit, above 0; `colour_scale` finds it.

    Returns:
        The same shape, in [0, 1]; 0 becomes exactly 0.5.
    """
    assert scale > 0, scale
    return (0.5 + projections / (2 * scale)).clamp(0, 1)


def heat_map(values: Tensor, *, signed: bool = False, scale: float | None = None) -> Tensor:
    """Map values to colours.

    Args:
        values: `[N, H, W]`, in any unit.
        signed: blue for −scale, white for 0, dark red for +scale. Otherwise black for 0 and below, then violet, red and
            orange to pale yellow for the scale, lighter by even steps.
        scale: the value of the last colour, in the unit of the values; None: `colour_scale(values)`.

    Returns:
        RGB in [0, 1], `[N, 3, H, W]`.
    """
    scale = colour_scale(values) if scale is None else scale
    ramp = torch.tensor(
        [[int(colour[i : i + 2], 16) / 255 for i in (0, 2, 4)] for colour in (_SIGNED if signed else _HEAT)]
    )
    ramp = ramp.to(values.device, values.dtype)
    position = values / scale
    position = (0.5 + 0.5 * position).clamp(0, 1) if signed else position.clamp(0, 1)
    position = position * (len(ramp) - 1)
    # NaN is kept: writing the image refuses it.
    below = position.nan_to_num(0).floor().clamp(max=len(ramp) - 2)
    weight = (position - below).unsqueeze(-1)
    index = below.long()
    return (ramp[index] * (1 - weight) + ramp[index + 1] * weight).permute(0, 3, 1, 2)


def overlay(images: Tensor, heat: Tensor, *, opacity: float = 0.6) -> Tensor:
    """Blend a heat map over the grey version of a photo.

    Args:
        images: RGB in [0, 1], `[N, 3, H, W]`.
        heat: from `heat_map`, the same shape.
        opacity: of the heat map.

    Returns:
        RGB in [0, 1], `[N, 3, H, W]`.
    """
    luma = torch.tensor([0.299, 0.587, 0.114], device=images.device, dtype=images.dtype).reshape(3, 1, 1)
    grey = (images * luma).sum(1, keepdim=True)
    return grey * (1 - opacity) + heat * opacity


def mosaic(images: Tensor, columns: int = 3, *, smallest: int = 64) -> Tensor:
    """Join small images in rows, enlarged to a visible size.

    Args:
        images: RGB in [0, 1], `[K, 3, h, w]`.
        columns: images in a row; the last row is filled with white.
        smallest: pixels of a longer side below which the images are enlarged.

    Returns:
        RGB in [0, 1], `[3, H, W]`, with white lines between the images.
    """
    tiles = [_sized(image, smallest, _MOSAIC_LARGEST) for image in images]
    height, width = tiles[0].shape[1:]
    rows, line = -(-len(tiles) // columns), 3
    whole = tiles[0].new_ones(3, rows * (height + line) - line, columns * (width + line) - line)
    for index, tile in enumerate(tiles):
        top, left = index // columns * (height + line), index % columns * (width + line)
        whole[:, top : top + height, left : left + width] = tile
    return whole


def contact_sheet(
    rows: Sequence[Row],
    *,
    title: str = "",
    note: str = "",
    captions_on_top: bool = False,
    largest: int = _TILE_SIDES[1],
    gap: int = 10,
) -> np.ndarray:
    """Draw images in rows and columns on white, with captions.

    Small images are enlarged by a whole factor, pixel by pixel; large ones reduced by averaging. Captions are wrapped
    to at most three lines of their column's width, and shortened in the middle if longer. Letters that Pillow's own
    font lacks lose their accents, or become question marks.

    Args:
        rows: at least one, each with at least one image.
        title: at the top, in larger type.
        note: at the bottom, in smaller type: what the colours mean.
        captions_on_top: put captions above their images instead of below.
        largest: reduce images with a longer side above so many pixels.
        gap: pixels between columns.

    Returns:
        uint8 `[H, W, 3]`.

    Raises:
        DataError: an image holds NaN.
    """
    tiles = [[to_array(_sized(_one(image), _TILE_SIDES[0], largest)) for image in row.images] for row in rows]
    count = max(len(row) for row in tiles)
    narrowest = min(_TILE_SIDES[0], max(tile.shape[1] for row in tiles for tile in row))
    widths = [max([narrowest, *(row[c].shape[1] for row in tiles if len(row) > c)]) for c in range(count)]
    inner = max(sum(widths) + gap * (count - 1), _NARROWEST)
    canvas = _Canvas(inner, gap)
    canvas.paragraph(title, 18, _INK, after=_GAP)
    for row, row_tiles in zip(rows, tiles, strict=True):
        canvas.paragraph(row.label, 14, _INK, after=4)
        cells = list(zip(widths, row_tiles, row.captions, strict=False))
        assert len(cells) == len(row.captions) == len(row.images), "one caption for each image"
        canvas.row(cells, captions_on_top)
    canvas.paragraph(note, 12, _FAINT, after=0)
    return canvas.draw()


class _Canvas:
    """Collects images and texts from top to bottom, then draws them: the height is known only at the end."""

    def __init__(self, inner: int, gap: int) -> None:
        self.inner, self.gap, self.y = inner, gap, _MARGIN
        self.texts: list[tuple[tuple[int, int], str, str, int, tuple[int, int, int]]] = []
        self.images: list[tuple[tuple[int, int], np.ndarray]] = []

    def paragraph(self, text: str, size: int, ink: tuple[int, int, int], *, after: int) -> None:
        lines = list(_wrapped(drawable(text), size, self.inner))
        for line in lines:
            self.texts.append(((_MARGIN, self.y), "la", line, size, ink))
            self.y += _line_height(size)
        self.y += after if lines else 0

    def row(self, cells: Sequence[tuple[int, np.ndarray, str]], captions_on_top: bool) -> None:
        captions = [_caption(caption, 13, width) for width, _, caption in cells]
        text_height = max(len(lines) for lines in captions) * _line_height(13)
        image_height = max(tile.shape[0] for _, tile, _ in cells)
        x = _MARGIN
        for (width, tile, _), lines in zip(cells, captions, strict=True):
            top = self.y + (text_height + 4 if captions_on_top and text_height else 0)
            top += image_height - tile.shape[0] if captions_on_top else 0
            self.images.append(((x + (width - tile.shape[1]) // 2, top), tile))
            # Shorter captions stay next to their image.
            first = self.y + text_height - len(lines) * _line_height(13) if captions_on_top else top + tile.shape[0] + 4
            for index, line in enumerate(lines):
                place = (x + width // 2, first + index * _line_height(13))
                self.texts.append((place, "ma", line, 13, _INK))
            x += width + self.gap
        self.y += image_height + (text_height + 4 if text_height else 0) + _GAP + 2

    def draw(self) -> np.ndarray:
        sheet = Image.new("RGB", (self.inner + 2 * _MARGIN, self.y + _MARGIN), "white")
        for place, tile in self.images:
            sheet.paste(Image.fromarray(tile), place)
        pen = ImageDraw.Draw(sheet)
        for place, anchor, line, size, ink in self.texts:
            pen.text(place, line, fill=ink, font=_font(size), anchor=anchor)
        return np.array(sheet)


def number(value: float) -> str:
    """Format with three digits: 0.0123, 12.3, 9010, 1.1e5."""
    if value and not 1e-3 <= abs(value) < 99_950:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    digits = max(0, 2 - math.floor(math.log10(abs(value)))) if value else 0
    return f"{float(f'{value:.3g}'):.{digits}f}" if digits == 0 else f"{float(f'{value:.{digits}f}'):g}"


def drawable(text: str) -> str:
    """Replace letters that Pillow's own font lacks."""
    plain = unicodedata.normalize("NFKC", text).translate(_REPLACEMENTS)
    return "".join(_drawable_letter(letter) for letter in plain)


def _one(image: Tensor) -> Tensor:
    return image[0] if image.ndim == 4 else image


def _sized(image: Tensor, smallest: int, largest: int) -> Tensor:
    """Scale `[3, H, W]` by a whole factor, to bring the longer side within the bounds if possible."""
    side = max(image.shape[1:])
    if side < smallest:
        factor = -(-smallest // side)
        return image.repeat_interleave(factor, 1).repeat_interleave(factor, 2)
    if side > largest:
        factor = -(-side // largest)
        return F.avg_pool2d(image[None], factor, ceil_mode=True)[0]
    return image


def _caption(text: str, size: int, width: int) -> list[str]:
    """Wrap to at most `_CAPTION_LINES` lines of `width` pixels, with an ellipsis in the middle if longer."""
    text = drawable(text)

    def shortened(left_out: int) -> list[str]:
        kept = len(text) - left_out
        return list(_wrapped(f"{text[: -(-kept // 2)]}…{text[len(text) - kept // 2 :]}", size, width))

    lines = list(_wrapped(text, size, width))
    if len(lines) <= _CAPTION_LINES:
        return lines
    few_enough = range(1, len(text) + 1)
    return shortened(
        few_enough[bisect.bisect_left(few_enough, True, key=lambda n: len(shortened(n)) <= _CAPTION_LINES)]
    )


def _wrapped(text: str, size: int, width: int) -> Iterator[str]:
    """Yield lines of whole words, at most `width` pixels wide; break wider words."""
    font, line = _font(size), ""
    for word in text.split():
        longer = f"{line} {word}" if line else word
        if font.getlength(longer) <= width:
            line = longer
            continue
        if line:
            yield line
        while len(word) > 1 and font.getlength(word) > width:
            end = _fitting(font, word, width)
            yield word[:end]
            word = word[end:]
        line = word
    if line:
        yield line


def _fitting(font: _Font, word: str, width: int) -> int:
    """Count the leading letters of a word, at least one, that fit in `width` pixels."""
    lengths = range(2, len(word) + 1)
    return 1 + bisect.bisect_left(lengths, True, key=lambda length: font.getlength(word[:length]) > width)


def _line_height(size: int) -> int:
    return size + 1 + _LINE_GAP


@functools.cache
def _font(size: int) -> _Font:
    return ImageFont.load_default(size=size)


@functools.cache
def _drawable_letter(letter: str) -> str:
    font = _font(13)
    missing = bytes(font.getmask("\uffff"))
    if letter.isspace():
        return " "
    # Decomposed, an accented letter begins with the plain one.
    base = unicodedata.normalize("NFKD", letter)[:1]
    choices = (letter, base)
    return next((found for found in choices if found.isprintable() and bytes(font.getmask(found)) != missing), "?")
