"""Small files that try to fill the memory or to take for ever."""

import io
import struct
import zlib
from pathlib import Path

from PIL import Image

from helpers.bad_image_fixtures import chunk, png, zeros

LARGE = 9400
"""Pixels a side: just within Pillow's limit on their number."""


def malformed_images(folder: Path) -> list[tuple[Path, bool]]:
    """Make malformed files; return each with whether it may be read after all, harmlessly."""
    folder.mkdir()
    refused = {
        "png_of_400_million_pixels.png": png(20_000, 20_000, 8, 2, zlib.compress(bytes(1 << 20))),
        "png_of_2_to_62_pixels.png": png((1 << 31) - 1, (1 << 31) - 1, 8, 2, b""),
        "png_with_negative_sides.png": png(0xFFFFFFFF, 0xFFFFFFFF, 8, 2, b""),
        "png_without_pixels.png": png(0, 0, 8, 2, b""),
        "png_of_empty_chunks.png": png(64, 64, 8, 2, b"", *[chunk(b"IDAT", b"")] * 50_000),
        "png_text_bomb.png": png(64, 64, 8, 2, _pixels(64), chunk(b"zTXt", b"k\0\0" + zeros(100 << 20))),
        "png_text_bombs.png": png(64, 64, 8, 2, _pixels(64), *[chunk(b"zTXt", b"k\0\0" + zeros(1 << 20))] * 100),
        "jpeg_of_65500_squared.jpg": _jpeg_of(65_500, 65_500),
        "tiff_of_2_to_62_pixels.tif": tiff([(256, 4, 1, (1 << 31) - 1), (257, 4, 1, (1 << 31) - 1)]),
        "tiff_with_a_tag_of_4_gib.tif": tiff([(256, 4, 1, 64), (257, 4, 1, 64), (270, 2, 0xFFFFFFF0, 8)]),
        "tiff_with_strips_elsewhere.tif": tiff([*_plain_tags(64), (273, 4, 1 << 20, 0x7FFFFFFF), (279, 4, 1, 1 << 30)]),
        "bmp_of_2_to_62_pixels.bmp": _bmp((1 << 31) - 1, (1 << 31) - 1),
        "bmp_with_negative_height.bmp": _bmp(1 << 20, -(1 << 31)),
        "webp_of_16383_squared.webp": _webp(16_383),
        "webp_of_9400_squared.webp": _webp(LARGE),
        "webp_that_lies.webp": b"RIFF\xff\xff\xff\xffWEBPVP8X\n\0\0\0\x12\0\0\0\xff\xff\xff\xff\xff\xff",
        "eps.jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99999 99999\n(/etc/passwd) run\n",
        "svg.png": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
        "gif_bomb.png": b"GIF89a\xff\xff\xff\xff\x80\0\0" + bytes(64),
    }
    harmless = {
        "png_profile_bomb.png": png(64, 64, 8, 2, _pixels(64), chunk(b"iCCP", b"p\0\0" + zeros(200 << 20))),
        "png_pixels_bomb.png": png(64, 64, 8, 2, _pixels(64) + zeros(200 << 20)),
        "png_pixels_bomb_in_one.png": png(64, 64, 8, 2, zeros(200 << 20)),
        "tiff_chain_without_end.tif": _chained_tiff(),
        "webp_of_many_frames.webp": _frames(),
        "jpeg_with_a_large_profile.jpg": _jpeg_with_profile(),
    }
    for name, data in (refused | harmless).items():
        (folder / name).write_bytes(data)
    return [(folder / name, name in harmless) for name in refused | harmless]


def largest_images(folder: Path, *, all_modes: bool) -> list[Path]:
    """Make valid images of 88 million pixels in modes that are converted, which must not take many copies.

    Args:
        folder: created.
        all_modes: include the modes that take seconds each to make and to read.
    """
    folder.mkdir()
    files = {
        "gray_16_bits.png": png(LARGE, LARGE, 16, 0, _rows(2 * LARGE + 1)),
        "colour.png": png(LARGE, LARGE, 8, 2, _rows(3 * LARGE + 1)),
    }
    if all_modes:
        files["transparent.png"] = png(LARGE, LARGE, 8, 6, _rows(4 * LARGE + 1))
        files["gray_and_transparent.png"] = png(LARGE, LARGE, 8, 4, _rows(2 * LARGE + 1))
        files["black_and_white.tif"] = _saved("1", "TIFF", compression="group4")
        files["16_bits.tif"] = _saved("I;16", "TIFF", compression="tiff_adobe_deflate")
        files["ink_turned.tif"] = _saved("CMYK", "TIFF", compression="tiff_adobe_deflate", tiffinfo={274: 6})
        files["ink.jpg"] = _saved("CMYK", "JPEG", progressive=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return [folder / name for name in files]


def tiff(tags: list[tuple[int, int, int, int]], *, following: int = 0, pixels: bytes = b"") -> bytes:
    """A TIFF with one directory of (tag, type, count, value), at byte 8, and the offset of the next one."""
    entries = b"".join(struct.pack("<2H2L", *tag) for tag in sorted(tags))
    return b"II*\0" + struct.pack("<LH", 8, len(tags)) + entries + struct.pack("<L", following) + pixels


def _plain_tags(side: int) -> list[tuple[int, int, int, int]]:
    return [(256, 4, 1, side), (257, 4, 1, side), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (277, 3, 1, 1)]


def _chained_tiff() -> bytes:
    """The next directory is this one."""
    place = [(273, 4, 1, 8 + 2 + 12 * 9 + 4), (278, 4, 1, 64), (279, 4, 1, 64 * 64)]
    return tiff([*_plain_tags(64), *place], following=8, pixels=bytes(64 * 64))


def _pixels(side: int) -> bytes:
    return zlib.compress(bytes((3 * side + 1) * side))


def _rows(bytes_per_row: int) -> bytes:
    packer = zlib.compressobj(1)
    block = bytes(bytes_per_row * 10)
    return b"".join(packer.compress(block) for _ in range(LARGE // 10)) + packer.flush()


def _saved(mode: str, image_format: str, **options: object) -> bytes:
    stream = io.BytesIO()
    Image.new(mode, (LARGE, LARGE)).save(stream, image_format, **options)
    return stream.getvalue()


def _jpeg_of(width: int, height: int) -> bytes:
    data = bytearray(_small("JPEG"))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">2H", height, width)
    return bytes(data)


def _jpeg_with_profile() -> bytes:
    """255 segments, 16 MB: as large as a profile gets."""
    data = _small("JPEG")
    segments = [b"ICC_PROFILE\0" + bytes([n + 1, 255]) + bytes(65_000) for n in range(255)]
    return data[:2] + b"".join(b"\xff\xe2" + struct.pack(">H", len(s) + 2) + s for s in segments) + data[2:]


def _small(image_format: str) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (64, 64)).save(stream, image_format)
    return stream.getvalue()


def _bmp(width: int, height: int) -> bytes:
    header = struct.pack("<L2l2H6L", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<L2HL", 1 << 20, 0, 0, 54) + header + bytes(1024)


def _webp(side: int) -> bytes:
    """A lossless stream of one colour: 34 bytes for as many pixels as one likes."""
    size = (side - 1) | (side - 1) << 14
    # Signature, size, version, no transform, no cache, and five codes of one symbol each.
    data = b"\x2f" + size.to_bytes(4, "little") + bytes.fromhex("0788888888fe07") + b"\0"
    body = b"WEBPVP8L" + struct.pack("<L", len(data)) + data + bytes(len(data) % 2)
    return b"RIFF" + struct.pack("<L", len(body)) + body


def _frames() -> bytes:
    stream = io.BytesIO()
    frames = [Image.new("RGB", (64, 64), (n, 255 - n, 0)) for n in range(100)]
    frames[0].save(stream, "WEBP", save_all=True, append_images=frames[1:])
    return stream.getvalue()
