"""Which encoded images DALI decodes exactly as Pillow does, and which are damaged.

A file that DALI cannot read breaks its whole pipeline; and DALI and Pillow disagree wherever formats are ambiguous
(orientation tags of the wrong type, CMYK, 16 bits, junk between segments). DALI also ignores colour profiles, drops
transparency, and reads fewer formats. Files without such oddities are DALI-safe, and DALI gets no others: Pillow
decodes the rest for both loaders, so they cannot differ.
"""

import struct
import zlib

from PIL import Image

from fastnst.images import UnusableImageError, is_transparent, png_chunks

_HUFFMAN_FRAMES = (0xC0, 0xC1, 0xC2)  # baseline, extended, progressive
_OTHER_FRAMES = (0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF)
_EXIF = b"Exif\0\0"
_TAG_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8}


def check_integrity(data: bytes, image: Image.Image) -> None:
    """Raise UnusableImageError for damage that Pillow ignores: a PNG with a wrong checksum or no end."""
    if image.format == "PNG":
        _check_png(data)


def is_dali_safe(data: bytes, image: Image.Image, orientation: int) -> bool:
    """Whether DALI and Pillow decode these bytes to the same pixels.

    Args:
        data: the whole file.
        image: the same file, loaded by Pillow; a JPEG at any scale.
        orientation: EXIF orientation that Pillow found, 1 to 8.
    """
    if image.format in ("JPEG", "MPO"):
        return _is_safe_jpeg(data, orientation)
    if orientation != 1 or (image.mode in ("LA", "RGBA") and is_transparent(image)):
        return False
    if image.format == "PNG":
        return _is_safe_png(data)
    # A WebP file with animation, metadata or a separate alpha plane starts with VP8X.
    return image.format == "WEBP" and data[12:16] in (b"VP8 ", b"VP8L")


def _is_safe_jpeg(data: bytes, orientation: int) -> bool:
    """Accept 8-bit Huffman-coded grayscale or YCbCr, clean segments, and an unambiguous orientation."""
    at, frame, adobe_transform, tags = 2, None, None, []
    while True:
        if len(data) < at + 4 or data[at] != 0xFF:
            return False
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        body = data[at + 4 : at + 2 + length]
        if length < 2 or len(body) != length - 2 or marker in _OTHER_FRAMES or not 0xC0 <= marker <= 0xFE:
            return False
        if marker in _HUFFMAN_FRAMES:
            frame = body
        elif marker == 0xE1 and body.startswith(_EXIF):
            tags.append(body[len(_EXIF) :])
        elif marker == 0xEE and body.startswith(b"Adobe") and len(body) >= 12:
            adobe_transform = body[11]
        elif marker == 0xDA:
            break
        at += 2 + length
    if frame is None or len(tags) > 1 or (_orientation(tags[0]) if tags else 1) != orientation:
        return False
    return _is_safe_frame(frame, adobe_transform)


def _is_safe_frame(frame: bytes, adobe_transform: int | None) -> bool:
    """Check precision, height, width; then identifier, sampling factors and table per component."""
    if len(frame) < 6 or frame[0] != 8 or len(frame) != 6 + 3 * frame[5]:
        return False
    identifiers, sampling = frame[6::3], frame[7::3]
    if len(identifiers) == 1:
        return True
    if len(identifiers) != 3 or identifiers == b"RGB" or adobe_transform not in (None, 1):
        return False
    return sampling[0] in (0x11, 0x21, 0x22, 0x12) and sampling[1:] == b"\x11\x11"


def _orientation(tags: bytes) -> int | None:
    """Return the orientation in a TIFF block: 1 if absent, None if its first directory is malformed.

    Decoders differ on a directory with one bad entry, so all its entries must be valid.
    """
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tags[:4])
    if order is None or len(tags) < 8:
        return None
    (start,) = struct.unpack_from(order + "I", tags, 4)
    if start < 8 or start + 2 > len(tags):
        return None
    (count,) = struct.unpack_from(order + "H", tags, start)
    if start + 2 + 12 * count > len(tags):
        return None
    found = []
    for at in range(start + 2, start + 2 + 12 * count, 12):
        tag, kind, length, offset = struct.unpack_from(order + "HHII", tags, at)
        size = length * _TAG_BYTES.get(kind, len(tags))
        if size > 4 and offset + size > len(tags):
            return None
        if tag == 0x0112:
            found.append((kind, length, *struct.unpack_from(order + "H", tags, at + 8)))
    if not found:
        return 1
    kind, length, value = found[0]
    return value if len(found) == 1 and (kind, length) == (3, 1) and 1 <= value <= 8 else None


def _is_safe_png(data: bytes) -> bool:
    """Accept 8 bits per sample, not interlaced, not animated, without colour-key or palette transparency."""
    depth, interlace = data[24], data[28]
    names = {name for name, _, _ in png_chunks(data)}
    return depth == 8 and interlace == 0 and not names & {b"acTL", b"tRNS", b"eXIf"}


def _check_png(data: bytes) -> None:
    for name, start, end in png_chunks(data):
        (expected,) = struct.unpack_from(">I", data, end - 4)
        if zlib.crc32(memoryview(data)[start : end - 4]) != expected:
            raise UnusableImageError(f"the checksum of its {name.decode('latin-1')} chunk does not fit; fetch it again")
        if name == b"IEND":
            return
    raise UnusableImageError("it is cut short; fetch it again")
