"""How what the networks see is drawn: numbers to colours, and images to sheets with captions.

A projection or a heat map has no colours of its own. Here zero is always the same colour (mid-grey, black or white),
one scale holds for all images that are to be compared, and the caller states it on the sheet.
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
_NARROWEST = 320  # of the part within the margins, so that a title over one small image need not be a column
_CAPTION_LINES = 3
_INK, _FAINT = (28, 28, 30), (104, 104, 110)
# Signs that Pillow's own font lacks, and what is read in their place.
_IN_PLACE = str.maketrans(
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
    """The value that black and white stand for: the 99.9th percentile of |x| over the entries that are not 0.

    A few outliers would make everything else grey, and most of a projection is exactly 0: neither shall decide. What
    is to be compared goes in together. Where everything is 0 the scale is 1.
    """
    magnitudes = projections.detach().flatten().abs()
    magnitudes = magnitudes[magnitudes > 0]
    if not magnitudes.numel():
        return 1.0
    rank = math.ceil(0.999 * magnitudes.numel())
    return float(magnitudes.double().kthvalue(rank).values)


def about_grey(projections: Tensor, scale: float) -> Tensor:
    """Projections as images: 0 is mid-grey, −scale black and +scale white, per colour channel.

    Args:
        projections: `[..., 3, H, W]`, in any unit.
        scale: in the same unit, above 0; `colour_scale` finds it.

    Returns:
        The same shape, in [0, 1]; 0 becomes exactly 0.5.
    """
    assert scale > 0, scale
    return (0.5 + projections / (2 * scale)).clamp(0, 1)


def heat_map(values: Tensor, *, signed: bool = False, scale: float | None = None) -> Tensor:
    """Values as colours.

    Args:
        values: `[N, H, W]`, in any unit.
        signed: blue for −scale, white for 0, dark red for +scale. Otherwise black for 0 and below, then violet, red and
            orange to pale yellow for the scale, lighter by even steps.
        scale: the value of the last colour, in the unit of the values; None: `colour_scale(values)`.

    Returns:
        RGB in [0, 1], `[N, 3, H, W]`.
    """
    scale = colour_scale(values) if scale is None else scale
    ramp = torch.tensor([[int(colour[i : i + 2], 16) / 255 for i in (0, 2, 4)] for colour in _ramp(signed)])
    ramp = ramp.to(values.device, values.dtype)
    position = values / scale
    position = (0.5 + 0.5 * position).clamp(0, 1) if signed else position.clamp(0, 1)
    position = position * (len(ramp) - 1)
    # A NaN has no colour; it is kept, for whoever writes the image to refuse.
    below = position.nan_to_num(0).floor().clamp(max=len(ramp) - 2)
    share = (position - below).unsqueeze(-1)
    index = below.long()
    return (ramp[index] * (1 - share) + ramp[index + 1] * share).permute(0, 3, 1, 2)


def overlay(images: Tensor, heat: Tensor, *, opacity: float = 0.6) -> Tensor:
    """Heat over the grey version of a photo.

    Args:
        images: RGB in [0, 1], `[N, 3, H, W]`.
        heat: `heat_map`'s result, the same shape.
        opacity: share of the heat in the result.

    Returns:
        RGB in [0, 1], `[N, 3, H, W]`.
    """
    luma = torch.tensor([0.299, 0.587, 0.114], device=images.device, dtype=images.dtype).reshape(3, 1, 1)
    grey = (images * luma).sum(1, keepdim=True)
    return grey * (1 - opacity) + heat * opacity


def mosaic(images: Tensor, columns: int = 3, *, smallest: int = 64) -> Tensor:
    """Small images as one, in rows, brought to a size at which they can be seen.

    Args:
        images: RGB in [0, 1], `[K, 3, h, w]`.
        columns: images in a row; the last row is filled up with white.
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


def strip(images: Sequence[Tensor], captions: Sequence[str], *, title: str = "", note: str = "") -> np.ndarray:
    """Images in one row with their names on top, as in the paper's Figure 2; arguments as in `contact_sheet`."""
    return contact_sheet([Row(images, captions)], title=title, note=note, captions_on_top=True)


def contact_sheet(
    rows: Sequence[Row],
    *,
    title: str = "",
    note: str = "",
    captions_on_top: bool = False,
    largest: int = _TILE_SIDES[1],
    gap: int = 10,
) -> np.ndarray:
    """Images in rows and columns on white, with captions.

    Small images are enlarged by a whole factor, pixel by pixel; large ones reduced by averaging. Captions are broken
    into up to three lines as wide as their column, and shortened in the middle where that is too little. Letters that
    Pillow's own font lacks lose their accents, or become question marks.

    Args:
        rows: at least one, each with at least one image.
        title: above all, in larger type.
        note: below all, in smaller type: what the colours stand for.
        captions_on_top: above their images instead of below.
        largest: pixels of a longer side above which an image is reduced.
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
    """Collects what is to be drawn from top to bottom; the height is known when all is placed."""

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
            # A caption stays with its image: the shorter ones lean towards it.
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
    """Three digits for people: 0.0123, 12.3, 9010, 1.1e5."""
    if value and not 1e-3 <= abs(value) < 99_950:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    digits = max(0, 2 - math.floor(math.log10(abs(value)))) if value else 0
    return f"{float(f'{value:.3g}'):.{digits}f}" if digits == 0 else f"{float(f'{value:.{digits}f}'):g}"


def drawable(text: str) -> str:
    """`text` in letters that Pillow's own font has."""
    plain = unicodedata.normalize("NFKC", text).translate(_IN_PLACE)
    return "".join(_drawable_sign(sign) for sign in plain)


def _ramp(signed: bool) -> tuple[str, ...]:
    return _SIGNED if signed else _HEAT


def _one(image: Tensor) -> Tensor:
    return image[0] if image.ndim == 4 else image


def _sized(image: Tensor, smallest: int, largest: int) -> Tensor:
    """`[3, H, W]`, enlarged or reduced by a whole factor so that the longer side lies within the bounds, if it can."""
    side = max(image.shape[1:])
    if side < smallest:
        factor = -(-smallest // side)
        return image.repeat_interleave(factor, 1).repeat_interleave(factor, 2)
    if side > largest:
        factor = -(-side // largest)
        return F.avg_pool2d(image[None], factor, ceil_mode=True)[0]
    return image


def _caption(text: str, size: int, width: int) -> list[str]:
    """At most `_CAPTION_LINES` lines, at most `width` pixels wide; the middle gives way to an ellipsis."""
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
    """Lines of whole words, each at most `width` pixels wide; a word that is wider is broken."""
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
    """How many of a word's signs, at least one, are at most `width` pixels wide."""
    lengths = range(2, len(word) + 1)
    return 1 + bisect.bisect_left(lengths, True, key=lambda length: font.getlength(word[:length]) > width)


def _line_height(size: int) -> int:
    return size + 1 + _LINE_GAP


@functools.cache
def _font(size: int) -> _Font:
    return ImageFont.load_default(size=size)


@functools.cache
def _drawable_sign(sign: str) -> str:
    font = _font(13)
    missing = bytes(font.getmask("\uffff"))
    if sign.isspace():
        return " "
    # An accented letter is its letter, then accents of its own, which are let go.
    base = unicodedata.normalize("NFKD", sign)[:1]
    return next((found for found in (sign, base) if found.isprintable() and bytes(font.getmask(found)) != missing), "?")
