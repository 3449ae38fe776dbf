"""Say what a file is by its first bytes, for messages about files that cannot be used.

A name alone says little: downloads save a web page as `vgg19.pth`, and cameras a HEIC as `photo.jpg`.
"""

import codecs
import errno
import os
import re
import stat
from pathlib import Path
from typing import Literal

Group = Literal["image", "video", "network", "archive", "document", "text"]

HEAD_BYTES = 512
"""First bytes that suffice."""

SAFETENSORS = "a safetensors file"
TORCH_ZIP = "a zip file of torch.save"
TORCH_PICKLE = "an older file of torch.save"
EMPTY = "an empty file"
WEB_PAGE = "a web page"
LFS_POINTER = "a pointer of Git LFS"

# (offset, bytes, name) by group; the first that fits decides.
_SIGNATURES: dict[Group, tuple[tuple[int, bytes, str], ...]] = {
    "image": (
        (0, b"\xff\xd8", "a JPEG"),
        (0, b"\x89PNG\r\n\x1a\n", "a PNG"),
        (8, b"WEBP", "a WebP"),
        (0, b"GIF8", "a GIF"),
        (0, b"BM", "a BMP"),
        (0, b"II*\0", "a TIFF"),
        (0, b"MM\0*", "a TIFF"),
        (0, b"II+\0", "a TIFF"),
        (0, b"MM\0+", "a TIFF"),
        (0, b"\0\0\0\x0cjP  ", "a JPEG 2000"),
        (0, b"\xff\x4f\xff\x51", "a JPEG 2000"),
        (0, b"\0\0\0\x0cJXL ", "a JPEG XL"),
        (0, b"\xff\x0a", "a JPEG XL"),
        (0, b"8BPS", "a Photoshop file"),
        (0, b"\x76\x2f\x31\x01", "an OpenEXR image"),
        (0, b"\0\0\1\0", "an icon"),
        (0, b"FUJIFILMCCD-RAW", "a camera's raw file"),
        (128, b"DICM", "a DICOM image"),
        (0, b"P4\n", "a PNM image"),
        (0, b"P5\n", "a PNM image"),
        (0, b"P6\n", "a PNM image"),
    ),
    "video": (
        (8, b"AVI ", "an AVI video"),
        (4, b"moov", "a QuickTime video"),
        (4, b"mdat", "a QuickTime video"),
        (0, b"FLV\1", "a Flash video"),
        (0, b"\0\0\1\xba", "an MPEG video"),
    ),
    "network": (
        (0, b"MATLAB 5.0 MAT-file", "a MATLAB file"),
        (0, b"MATLAB 7.3 MAT-file", "a MATLAB file (version 7.3)"),
        (0, b"\x89HDF\r\n\x1a\n", "an HDF5 file, as Keras writes"),
        (0, b"\x93NUMPY", "a NumPy array"),
        (0, b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", TORCH_PICKLE),
        (0, b"\x04\0\0\0\x01\0\0\0\x03\0\0\0V 1", "a file of Torch7"),
        (0, b"4\n1\n3\nV 1\n", "a file of Torch7"),
        (0, b"model_checkpoint_path:", "TensorFlow's list of checkpoints"),
        (0, b"GGUF", "a GGUF file"),
        (4, b"TFL3", "a TensorFlow Lite file"),
    ),
    "archive": (
        (0, b"\x1f\x8b", "a gzip archive"),
        (0, b"BZh", "a bzip2 archive"),
        (0, b"\xfd7zXZ\0", "an xz archive"),
        (0, b"\x28\xb5\x2f\xfd", "a zstd archive"),
        (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
        (0, b"Rar!\x1a\x07", "a RAR archive"),
        (257, b"ustar", "a tar archive"),
        (0, b"PK\5\6", "an empty zip archive"),
    ),
    "document": ((0, b"%PDF", "a PDF"), (0, b"\x7fELF", "a program")),
    "text": ((0, b"version https://git-lfs.github.com/spec/", LFS_POINTER), (0, b"%!PS", "a PostScript file")),
}
# By the brand of ISO media files (ISO/IEC 14496-12).
_BRANDS: dict[bytes, tuple[str, Group]] = {
    **dict.fromkeys((b"avif", b"avis"), ("an AVIF", "image")),
    **dict.fromkeys(
        (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"), ("a HEIF image (HEIC)", "image")
    ),
    b"crx ": ("a camera's raw file", "image"),
    b"qt  ": ("a QuickTime video", "video"),
}
# The end of a table of LevelDB: the index of a TensorFlow checkpoint, or the whole of an older one.
_TABLE_END = bytes.fromhex("57fb808b247547db")
_TEXT_BYTES = frozenset({*range(32, 256), *b"\t\r\n\f"} - {127})


def file_kind(beginning: bytes, end: bytes = b"") -> str | None:
    """Name the kind of a file with its article, such as `a TIFF`; None if it is unknown.

    Args:
        beginning: its first bytes; `HEAD_BYTES` suffice.
        end: its last 8 bytes, where they are at hand: TensorFlow's checkpoints are told by them.
    """
    return _kind_and_group(beginning, end)[0]


def file_group(beginning: bytes, end: bytes = b"") -> Group | None:
    """Say what a file is for, with the arguments of `file_kind`; None if it is unknown or empty."""
    return _kind_and_group(beginning, end)[1]


def read_ends(path: Path) -> tuple[bytes, bytes]:
    """Read the first bytes and the last 8 of a regular file, as `file_kind` takes them; OSError if that fails."""
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK | os.O_CLOEXEC)) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "it is not a regular file")
        beginning = file.read(HEAD_BYTES)
        if len(beginning) < HEAD_BYTES:
            return beginning, beginning[-8:]
        file.seek(-8, os.SEEK_END)
        return beginning, file.read(8)


def _kind_and_group(beginning: bytes, end: bytes) -> tuple[str | None, Group | None]:
    if not beginning:
        return EMPTY, None
    if beginning[4:8] == b"ftyp":
        return _media_kind(beginning)
    if beginning.startswith(b"\x1a\x45\xdf\xa3"):
        return ("a WebM video" if b"webm" in beginning[:64] else "a Matroska video"), "video"
    for group, signatures in _SIGNATURES.items():
        for offset, start, name in signatures:
            if beginning.startswith(start, offset):
                return name, group
    if beginning.startswith(b"PK\3\4"):
        return _zip_kind(beginning)
    if (network := _network_kind(beginning, end)) is not None:
        return network, "network"
    return _text_kind(beginning)


def _media_kind(beginning: bytes) -> tuple[str, Group]:
    size = min(max(int.from_bytes(beginning[:4], "big"), 16), 64)
    brands = [beginning[8:12], *(beginning[at : at + 4] for at in range(16, size, 4))]
    # `mif1` says nothing of the codec: an AVIF may begin with it, and lists its own brand later.
    if brands[0] in (b"mif1", b"msf1") and b"avif" in brands:
        return "an AVIF", "image"
    return _BRANDS.get(brands[0], ("an MP4 video", "video"))


def _zip_kind(beginning: bytes) -> tuple[str, Group]:
    """Tell the zip archive by the name of its first record."""
    name = beginning[30 : 30 + int.from_bytes(beginning[26:28], "little")]
    if name.endswith((b"/data.pkl", b"/.format_version", b"/.data/serialization_id", b"/byteorder")):
        return TORCH_ZIP, "network"
    if name.endswith(b".npy"):
        return "a NumPy archive (.npz)", "network"
    if name in (b"metadata.json", b"config.json", b"model.weights.h5"):
        return "a file of Keras", "network"
    if name.startswith((b"[Content_Types].xml", b"_rels/", b"mimetype")):
        return "an office document", "document"
    return "a zip archive", "archive"


def _network_kind(beginning: bytes, end: bytes) -> str | None:
    """Tell formats without a signature by how they begin."""
    if beginning[8:9] == b"{" and 2 <= int.from_bytes(beginning[:8], "little") < 1 << 27:
        return SAFETENSORS
    if end == _TABLE_END:
        return "a checkpoint of TensorFlow"
    # Protocol buffers: the tag of the first field, then what it holds.
    if beginning.startswith(b"\x08\x01\x12"):
        return "a SavedModel of TensorFlow"
    if re.match(rb"\x08[\x03-\x14](\x12.[\x20-\x7e]{2}|\x3a)", beginning, re.DOTALL):
        return "an ONNX model"
    if re.match(rb"\x0a[\x01-\x7f][\w.\- ]{3,127}(\x12|\x1a|\xa2\x06)", beginning):
        return "a Caffe model"
    if re.match(rb"\x0a(?:[\x80-\xff]{0,4}[\0-\x7f])\x0a[\x01-\x7f][\w.\-/]{1,127}\x12", beginning):
        return "a frozen graph of TensorFlow"
    if re.match(rb"\x80[\x02-\x05]", beginning):
        return "a pickle of Python"
    return None


def _text_kind(beginning: bytes) -> tuple[str | None, Group | None]:
    text = beginning[:HEAD_BYTES].removeprefix(b"\xef\xbb\xbf").strip()
    if not text or not _TEXT_BYTES.issuperset(text):
        return None, None
    if sum(byte > 127 for byte in text) > len(text) / 3 and not _is_utf8(text):
        return None, None
    lowered = text.lower()
    if lowered.startswith((b"<!doctype html", b"<html")) or b"<html" in lowered:
        return WEB_PAGE, "text"
    if b"<svg" in lowered:
        return "an SVG drawing", "text"
    return "a text", "text"


def _is_utf8(text: bytes) -> bool:
    try:
        codecs.getincrementaldecoder("utf-8")().decode(text)  # the last character may be cut off
    except UnicodeDecodeError:
        return False
    return True
