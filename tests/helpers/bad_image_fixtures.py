"""Files that break loaders, each made by code, with the verdict that the check must reach.

`place_specimens` puts them into a folder. The files of `FASTNST_TEST_DATA/awkward` belong beside them; `AWKWARD` holds
their verdicts.
"""

import functools
import io
import os
import shutil
import struct
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

ACCEPTED = ""
"""The check accepts it."""
IGNORED = "ignored"
"""No image by its name: neither accepted nor rejected."""
EITHER = "either"
"""Damage that may or may not be found; only that both loaders agree matters."""
SIZE = (96, 72)
"""Width and height of most specimens."""

AWKWARD = {
    "icc_after_sof_tiny.jpg": "10 × 10 px is too small",
    "lossless_cat-3449999_640_grayscale_12bit.jpg": "lossless, 12-bit",
    "misnamed_bmp.jpg": "a BMP",
    "tiny_jfif.jpg": "1 × 1 px is too small",
    "truncated_pillow.jpg": "cut short",
}
"""The awkward files that are rejected, and a part of the reason."""


@dataclass(frozen=True)
class Specimen:
    """A file, link, pipe or folder."""

    name: str
    verdict: str
    """ACCEPTED, IGNORED, EITHER, or a part of the reason for its rejection."""
    make: Callable[[Path], object]

    def __repr__(self) -> str:
        return ascii(self.name[:40])


def place_specimens(folder: Path, specimens: Iterable[Specimen]) -> None:
    """Make the specimens."""
    for specimen in specimens:
        (folder / specimen.name).parent.mkdir(parents=True, exist_ok=True)
        specimen.make(folder / specimen.name)


def place_good(folder: Path, photos: Path, count: int) -> None:
    """Add `count` links to intact images, with names between those of the specimens."""
    files = sorted(photos.iterdir())
    for index in range(count):
        source = files[index % len(files)]
        letter = "abcdefghijklmnopqrstuvwxyz"[index * 7 % 26]
        os.link(source, folder / f"{letter}_good_{index:05d}{source.suffix}")


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def png(width: int, height: int, depth: int, colour: int, rows: bytes, *extra: bytes) -> bytes:
    """A PNG from its compressed rows; `extra` are chunks between header and rows."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join(extra) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def zeros(count: int) -> bytes:
    """Compress `count` zero bytes, without holding them."""
    packer = zlib.compressobj(1)
    block = bytes(1 << 16)
    parts = [packer.compress(block[: min(len(block), count - at)]) for at in range(0, count, len(block))]
    return b"".join(parts) + packer.flush()


def _rows(count: int, length: int) -> bytes:
    """`count` compressed rows of a PNG of `length` bytes each, filter byte included: half black, half white."""
    black, white = bytes(length), b"\0" + b"\xff" * (length - 1)
    return zlib.compress(black * (count // 2) + white * (count - count // 2))


def _segment(marker: int, body: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body


def _behind_start(jpeg: bytes, *segments: bytes) -> bytes:
    return jpeg[:2] + b"".join(segments) + jpeg[2:]


def _resized_frame(jpeg: bytes, height: int, width: int) -> bytes:
    """A JPEG that claims another size."""
    at = jpeg.index(b"\xff\xc0") + 5
    return jpeg[:at] + struct.pack(">HH", height, width) + jpeg[at + 4 :]


def _flipped(data: bytes, count: int, seed: int, start: int) -> bytes:
    changed = bytearray(data)
    rng = np.random.default_rng(seed)
    for bit in rng.integers(start * 8, len(data) * 8, count):
        changed[bit // 8] ^= 1 << (bit % 8)
    return bytes(changed)


def _exif(orientation: int, description: str = "") -> bytes:
    tags = Image.Exif()
    tags[0x0112] = orientation
    if description:
        tags[0x010E] = description
    return tags.tobytes()


def _tag(order: str, value: int, kind: str) -> bytes:
    """An EXIF block with nothing but an orientation; the standard says SHORT, but some write LONG."""
    sign, head = (">", b"MM\0*\0\0\0\x08") if order == "MM" else ("<", b"II*\0\x08\0\0\0")
    layout, number = ("HHHIHxxI", 3) if kind == "short" else ("HHHIII", 4)
    return b"Exif\0\0" + head + struct.pack(sign + layout, 1, 0x0112, number, 1, value, 0)


def _make_sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate((1 << 30) + 1)


def _make_locked(path: Path) -> None:
    path.write_bytes(_JPEG)
    path.chmod(0)


def _linked(content: bytes) -> Callable[[Path], object]:
    def make(path: Path) -> None:
        target = path.with_name(f".{path.name}.target")
        target.write_bytes(content)
        path.symlink_to(target.name)

    return make


def _folder_of(content: bytes) -> Callable[[Path], object]:
    def make(path: Path) -> None:
        path.mkdir()
        (path / "inside.jpg").write_bytes(content)

    return make


_Y, _X = np.mgrid[0 : SIZE[1], 0 : SIZE[0]]
_COLOUR = Image.fromarray(np.stack([_X * 2, _Y * 3, _X + _Y], -1).astype(np.uint8))
_GRAY = _COLOUR.convert("L")
_CLEAR = _COLOUR.copy()
_CLEAR.putalpha(Image.fromarray((_X * 2).astype(np.uint8)))
_PALETTE = _COLOUR.quantize(32)
_DEEP = Image.fromarray((_X * 600).astype(np.uint16))
_JPEG = encoded(_COLOUR, "JPEG", quality=92)
_PNG = encoded(_COLOUR, "PNG")
_WEBP = encoded(_COLOUR, "WEBP", quality=92)
_FRAMES: dict[str, Any] = {"save_all": True, "append_images": [_COLOUR.transpose(Image.Transpose.ROTATE_180)]}
_XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/" tiff:Orientation="6"/>'
_HTML = b"<!DOCTYPE html>\n<html><head><title>404 Not Found</title></head><body>Not Found</body></html>\n"
_EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 96 72\n96 72 scale\n" + b"00 " * 400 + b"\nshowpage\n"


@functools.cache
def specimens() -> list[Specimen]:
    """Return all specimens that can be made on this machine and by this user."""
    found = [
        Specimen(name, verdict, lambda path, content=content: path.write_bytes(content))
        for name, verdict, content in _contents()
    ]
    found += [
        Specimen("link.jpg", ACCEPTED, _linked(_JPEG)),
        Specimen("link_to_text.jpg", "text", _linked(b"A letter.\n" * 9)),
        Specimen("dangling.jpg", "no such file", lambda path: path.symlink_to("nowhere.jpg")),
        Specimen("loop.jpg", "symbolic links", lambda path: path.symlink_to(path.name)),
        Specimen("up.jpg", IGNORED, lambda path: path.symlink_to(".")),
        Specimen("pipe.jpg", "not a regular file", os.mkfifo),
        Specimen("device.jpg", "not a regular file", lambda path: path.symlink_to("/dev/zero")),
        Specimen("folder.jpg", IGNORED, _folder_of(_HTML)),
        Specimen("sparse.jpg", "above 1 GiB", _make_sparse),
    ]
    if os.geteuid() != 0:
        found.append(Specimen("locked.jpg", "permission denied", _make_locked))
    return found


def _contents() -> list[tuple[str, str, bytes]]:
    """Return name, verdict and bytes of the regular files."""
    half_png = _PNG.index(b"IDAT") + (len(_PNG) - _PNG.index(b"IDAT")) // 2
    bad_header = _PNG[:29] + bytes([_PNG[29] ^ 1]) + _PNG[30:]
    bad_rows = _PNG[:-14] + bytes([_PNG[-14] ^ 1]) + _PNG[-13:]
    note = chunk(b"tEXt", b"Title\0zoo")
    rows = _rows(32, 97)
    return [
        *((f"cut_{keep:05d}.jpg", "; ", _JPEG[:keep]) for keep in (1, 2, 20, 100, 300)),
        *((f"cut_{part:02d}_percent.jpg", "cut short", _JPEG[: len(_JPEG) * part // 100]) for part in (50, 75, 99)),
        ("cut_last_byte.jpg", EITHER, _JPEG[:-1]),
        ("cut_end.jpg", "cut short", _JPEG[:-2]),
        *((f"cut_{keep:02d}.png", "; ", _PNG[:keep]) for keep in (8, 20, 33, 40)),
        ("cut_half.png", "cut short", _PNG[:half_png]),
        ("cut_end.png", "cut short", _PNG[:-12]),
        *((f"cut_{keep:02d}.webp", "; ", _WEBP[:keep]) for keep in (12, 30)),
        ("cut_half.webp", "cut short", _WEBP[: len(_WEBP) // 2]),
        ("empty.jpg", "empty", b""),
        ("empty.png", "empty", b""),
        ("zeros.jpg", "no image", bytes(5000)),
        ("letter.jpg", "text", b"This is a letter.\n" * 20),
        ("page.jpg", "text", _HTML),
        ("drawing.jpg", "text", _EPS),
        ("drawing.eps", IGNORED, _EPS),
        ("paper.jpg", "a PDF", b"%PDF-1.7\n\xff" + bytes(100)),
        ("archive.png", "a zip archive, not an image", b"PK\x03\x04" + bytes(range(256))),
        ("image.gif", "a GIF", encoded(_PALETTE, "GIF")),
        ("gif.jpg", "a GIF", encoded(_PALETTE, "GIF")),
        ("moving.gif", "a GIF", encoded(_COLOUR, "GIF", **_FRAMES)),
        ("image.bmp", "a BMP", encoded(_COLOUR, "BMP")),
        ("bmp.jpg", "a BMP", encoded(_COLOUR, "BMP")),
        ("tiff.jpg", "a TIFF", encoded(_COLOUR, "TIFF")),
        ("jpeg2000.jpg", "a JPEG 2000", b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(50)),
        ("phone.heic", "HEIF", b"\0\0\0\x18ftypheic\0\0\0\0" + bytes(50)),
        ("avif.jpg", "an AVIF", b"\0\0\0\x18ftypavif\0\0\0\0" + bytes(50)),
        ("jpeg.png", ACCEPTED, _JPEG),
        ("png.jpg", ACCEPTED, _PNG),
        ("webp.jpg", ACCEPTED, _WEBP),
        ("jpeg.gif", ACCEPTED, _JPEG),
        ("LOUD.JPG", ACCEPTED, _JPEG),
        ("no_suffix", IGNORED, _JPEG),
        (".hidden.jpg", IGNORED, _JPEG),
        ("moving.webp", ACCEPTED, encoded(_COLOUR, "WEBP", **_FRAMES)),
        ("moving.png", ACCEPTED, encoded(_COLOUR, "PNG", **_FRAMES)),
        ("lossless.webp", ACCEPTED, encoded(_COLOUR, "WEBP", lossless=True)),
        ("clear.webp", ACCEPTED, encoded(_CLEAR, "WEBP")),
        ("clear_exact.webp", ACCEPTED, encoded(_CLEAR, "WEBP", lossless=True, exact=True)),
        ("cmyk.jpg", ACCEPTED, encoded(_COLOUR.convert("CMYK"), "JPEG")),
        ("gray.jpg", ACCEPTED, encoded(_GRAY, "JPEG")),
        ("progressive.jpg", ACCEPTED, encoded(_COLOUR, "JPEG", progressive=True)),
        ("restart.jpg", ACCEPTED, encoded(_COLOUR, "JPEG", restart_marker_blocks=2)),
        *((f"sampling{index}.jpg", ACCEPTED, encoded(_COLOUR, "JPEG", subsampling=index)) for index in range(3)),
        ("two.jpg", ACCEPTED, encoded(_COLOUR, "MPO", **_FRAMES)),
        ("rgb.jpg", ACCEPTED, encoded(_COLOUR, "JPEG", keep_rgb=True)),
        ("gray.png", ACCEPTED, encoded(_GRAY, "PNG")),
        ("gray_alpha.png", ACCEPTED, encoded(_CLEAR.convert("LA"), "PNG")),
        ("alpha.png", ACCEPTED, encoded(_CLEAR, "PNG")),
        ("palette.png", ACCEPTED, encoded(_PALETTE, "PNG")),
        ("palette_alpha.png", ACCEPTED, encoded(_PALETTE, "PNG", transparency=bytes(range(0, 256, 8)))),
        ("palette_key.png", ACCEPTED, encoded(_PALETTE, "PNG", transparency=3)),
        ("colour_key.png", ACCEPTED, encoded(_COLOUR, "PNG", transparency=(0, 0, 0))),
        ("bits.png", ACCEPTED, encoded(_COLOUR.convert("1"), "PNG")),
        ("deep.png", ACCEPTED, encoded(_DEEP, "PNG")),
        ("deep_colour.png", ACCEPTED, png(32, 32, 16, 2, zlib.compress((b"\0" + bytes(range(192))) * 32))),
        *(
            (f"{order}_{value}_{kind}.jpg", ACCEPTED, encoded(_COLOUR, "JPEG", exif=_tag(order, value, kind)))
            for order in ("II", "MM")
            for value in (*range(10), 77)
            for kind in ("short", "long")
        ),
        ("turned.png", ACCEPTED, encoded(_COLOUR, "PNG", exif=_exif(6))),
        ("turned.webp", ACCEPTED, encoded(_COLOUR, "WEBP", exif=_exif(8))),
        ("xmp.jpg", ACCEPTED, encoded(_COLOUR, "JPEG", xmp=_XMP)),
        ("huge_exif.jpg", ACCEPTED, encoded(_COLOUR, "JPEG", exif=_exif(6, "x" * 60_000))),
        ("bad_exif.jpg", ACCEPTED, _behind_start(_JPEG, _segment(0xE1, b"Exif\0\0II*\0\xff\xff\xff\xff" + bytes(40)))),
        ("many_segments.jpg", ACCEPTED, _behind_start(_JPEG, *[_segment(0xEC, bytes(65_000))] * 20)),
        ("comment.jpg", ACCEPTED, _behind_start(_JPEG, _segment(0xFE, b"\x1b[31m" + bytes(60_000)))),
        ("trailing.jpg", ACCEPTED, _JPEG + bytes(range(256)) * 20),
        ("two_in_one.jpg", ACCEPTED, _JPEG + _JPEG),
        ("trailing.png", ACCEPTED, _PNG + bytes(range(256)) * 20),
        ("leading.jpg", "no image", b"\0\0" + _JPEG),
        ("bad_header_sum.png", "; ", bad_header),
        ("bad_rows_sum.png", "checksum of its IDAT", bad_rows),
        ("bad_note_sum.png", "; ", png(32, 32, 8, 2, rows, note[:-1] + bytes([note[-1] ^ 1]))),
        ("text_bomb.png", "; ", png(32, 32, 8, 2, rows, chunk(b"zTXt", b"Title\0\0" + zeros(8 << 20)))),
        ("profile_bomb.png", EITHER, png(32, 32, 8, 2, rows, chunk(b"iCCP", b"name\0\0" + zeros(8 << 20)))),
        ("few_rows.png", EITHER, png(32, 32, 8, 2, _rows(16, 97))),
        ("many_rows.png", EITHER, png(32, 32, 8, 2, _rows(64, 97))),
        ("no_width.png", "; ", png(0, 32, 8, 2, rows)),
        ("bomb.png", "400 million pixels", png(20_000, 20_000, 1, 0, zeros(1 << 20))),
        ("bomb_of_colour.png", "million pixels", png(20_000, 20_000, 8, 2, zeros(1 << 20))),
        # Pillow itself only warns of this one.
        ("large.png", "10000 × 9500 px", png(10_000, 9_500, 8, 2, b"")),
        ("beyond_count.png", "; ", png(2**31 - 1, 2**31 - 1, 8, 2, rows)),
        ("bomb.jpg", "million pixels", _resized_frame(_JPEG, 65_500, 65_500)),
        ("no_height.jpg", "; ", _resized_frame(_JPEG, 0, 96)),
        ("claims_more.jpg", EITHER, _resized_frame(_JPEG, 144, 96)),
        ("claims_less.jpg", EITHER, _resized_frame(_JPEG, 36, 48)),
        ("big.png", ACCEPTED, png(2_000, 2_000, 1, 0, _rows(2_000, 251))),
        ("black.png", "one colour", png(64, 48, 8, 2, zeros(193 * 48))),
        ("flat.jpg", "one colour", encoded(Image.new("RGB", (64, 48), (9, 99, 199)), "JPEG")),
        ("pixel.png", "1 × 1 px is too small", png(1, 1, 8, 2, zlib.compress(bytes(4)))),
        ("fifteen.png", "too small", png(400, 15, 8, 0, _rows(15, 401))),
        ("sixteen.png", ACCEPTED, png(16, 16, 8, 0, _rows(16, 17))),
        ("wide.png", ACCEPTED, png(6_000, 16, 8, 0, _rows(16, 6_001))),
        ("tall.jpg", ACCEPTED, encoded(_COLOUR.resize((16, 6_000)), "JPEG")),
        *((f"flips_{seed}.jpg", EITHER, _flipped(_JPEG, 3, seed, 0)) for seed in range(8)),
        *((f"flips_in_pixels_{seed}.jpg", EITHER, _flipped(_JPEG, 3, seed, 700)) for seed in range(4)),
        *((f"flips_{seed}.webp", EITHER, _flipped(_WEBP, 3, seed, 0)) for seed in range(4)),
        *((f"flips_{seed}.png", "; ", _flipped(_PNG, 3, seed, 8)) for seed in range(4)),
        (os.fsdecode(b"caf\xe9.jpg"), ACCEPTED, _JPEG),
        (os.fsdecode(b"\xff\xfe.jpg"), "text", _HTML),
        ("new\nline.png", ACCEPTED, _PNG),
        ("new\nline.jpg", "text", _HTML),
        (" leading and trailing .jpg", ACCEPTED, _JPEG),
        ("--steps=9.jpg", ACCEPTED, _JPEG),
        ("per%cent 'quote\" \\back.jpg", ACCEPTED, _JPEG),
        ("\x1b[2Jclear.jpg", "text", _HTML),
        ("猫.jpg", ACCEPTED, _JPEG),
        ("n" * 251 + ".jpg", ACCEPTED, _JPEG),
        ("m" * 251 + ".jpg", "text", _HTML),
        ("deep/" * 30 + "down.jpg", ACCEPTED, _JPEG),
    ]


def place_awkward(folder: Path, awkward: Path) -> list[Specimen]:
    """Copy the awkward files; return them as specimens."""
    for file in awkward.iterdir():
        shutil.copyfile(file, folder / file.name)
    return [Specimen(file.name, AWKWARD.get(file.name, ACCEPTED), lambda _: None) for file in awkward.iterdir()]
