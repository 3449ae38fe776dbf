"""Images that somebody made to fill the memory or to take for ever; each is small on the disk."""

import io
import struct
import zlib
from pathlib import Path

from PIL import Image

LARGE = 9400
"""Pixels a side: just within Pillow's limit on their number."""


def hostile_images(folder: Path) -> list[tuple[Path, bool]]:
    """Files, and whether each may be read: what it attempts comes to nothing."""
    folder.mkdir()
    refused = {
        "png_of_400_million_pixels.png": png(20_000, 20_000, zlib.compress(bytes(1 << 20))),
        "png_of_2_to_62_pixels.png": png((1 << 31) - 1, (1 << 31) - 1, b""),
        "png_with_negative_sides.png": png(0xFFFFFFFF, 0xFFFFFFFF, b""),
        "png_without_pixels.png": png(0, 0, b""),
        "png_of_empty_chunks.png": png(64, 64, b"", more=b"".join(chunk(b"IDAT", b"") for _ in range(50_000))),
        "png_text_bomb.png": png(64, 64, _pixels(64), more=chunk(b"zTXt", b"k\0\0" + _packed(100 << 20))),
        "png_text_bombs.png": png(64, 64, _pixels(64), more=chunk(b"zTXt", b"k\0\0" + _packed(1 << 20)) * 100),
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
        "png_profile_bomb.png": png(64, 64, _pixels(64), before=chunk(b"iCCP", b"p\0\0" + _packed(200 << 20))),
        "png_pixels_bomb.png": png(64, 64, _pixels(64) + _packed(200 << 20)),
        "png_pixels_bomb_in_one.png": png(64, 64, _packed(200 << 20)),
        "tiff_chain_without_end.tif": _chained_tiff(),
        "webp_of_many_frames.webp": _frames(),
        "jpeg_with_a_large_profile.jpg": _jpeg_with_profile(),
    }
    for name, data in (refused | harmless).items():
        (folder / name).write_bytes(data)
    return [(folder / name, name in harmless) for name in refused | harmless]


def largest_images(folder: Path, *, all_modes: bool) -> list[Path]:
    """Sound images of 88 million pixels, in modes that are converted: that must not take many copies.

    Args:
        folder: to be made.
        all_modes: also those that take some seconds each to make and to read.
    """
    folder.mkdir()
    files = {
        "gray_16_bits.png": png(LARGE, LARGE, _rows(2 * LARGE + 1), bits=16, colour=0),
        "colour.png": png(LARGE, LARGE, _rows(3 * LARGE + 1)),
    }
    if all_modes:
        files["transparent.png"] = png(LARGE, LARGE, _rows(4 * LARGE + 1), colour=6)
        files["gray_and_transparent.png"] = png(LARGE, LARGE, _rows(2 * LARGE + 1), colour=4)
        files["black_and_white.tif"] = _saved("1", "TIFF", compression="group4")
        files["32_bits.tif"] = _saved("I", "TIFF", compression="tiff_adobe_deflate")
        files["ink_turned.tif"] = _saved("CMYK", "TIFF", compression="tiff_adobe_deflate", tiffinfo={274: 6})
        files["ink.jpg"] = _saved("CMYK", "JPEG", progressive=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return [folder / name for name in files]


def png(
    width: int,
    height: int,
    pixels: bytes,
    *,
    bits: int = 8,
    colour: int = 2,
    before: bytes = b"",
    more: bytes = b"",
) -> bytes:
    """A PNG, of RGB unless `colour` says otherwise; `pixels` as they are, compressed or not."""
    header = chunk(b"IHDR", struct.pack(">2L5B", width, height, bits, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + before + more + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def chunk(name: bytes, data: bytes) -> bytes:
    """One chunk of a PNG, its checksum right."""
    return struct.pack(">L", len(data)) + name + data + struct.pack(">L", zlib.crc32(name + data))


def tiff(tags: list[tuple[int, int, int, int]], *, following: int = 0, pixels: bytes = b"") -> bytes:
    """One directory of (tag, type, count, value), at byte 8, and where the next one lies."""
    entries = b"".join(struct.pack("<2H2L", *tag) for tag in sorted(tags))
    return b"II*\0" + struct.pack("<LH", 8, len(tags)) + entries + struct.pack("<L", following) + pixels


def _plain_tags(side: int) -> list[tuple[int, int, int, int]]:
    return [(256, 4, 1, side), (257, 4, 1, side), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (277, 3, 1, 1)]


def _chained_tiff() -> bytes:
    """The next directory is this one."""
    place = [(273, 4, 1, 8 + 2 + 12 * 9 + 4), (278, 4, 1, 64), (279, 4, 1, 64 * 64)]
    return tiff([*_plain_tags(64), *place], following=8, pixels=bytes(64 * 64))


def _packed(size: int) -> bytes:
    packer = zlib.compressobj(9)
    block = bytes(1 << 20)
    return b"".join(packer.compress(block) for _ in range(size >> 20)) + packer.flush()


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
