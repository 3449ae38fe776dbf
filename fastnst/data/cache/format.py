"""The files of a cache: images decoded and resized once, for runs that read them at memory speed.

    CACHE/
        shard_0000.u8   concatenated images, each uint8 [rows, columns, 3]
        …
        manifest.json   images and their offsets, the shards' SHA-256, and their source; written last

An image is stored as a run with the cache's `fit` needs it. `random_crop`: the whole image, its short side resized to
`size`; the run still draws crop and flip. `center_crop` and `squash`: the final square. A batch from a cache equals the
Pillow loader's batch from the folder bit for bit, except for `random_crop` with a `size` that is not a power of two:
Pillow takes crop boxes in fp32, so some values then differ by 1 of 255.

Shards are read with `pread`, which copies from the page cache as a memory map would; but a truncated file or a failing
disk raises an error, where a memory map kills the process with SIGBUS.

A cache may come from someone else, so its manifest is untrusted. Names, shapes and offsets are computed from the rest
and only compared, so that nothing outside the shards is read.
"""

import errno
import hashlib
import json
import os
import stat
from collections.abc import Iterable
from dataclasses import astuple, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args
from urllib.parse import unquote_to_bytes

import PIL

from fastnst.data.crop import resized_length
from fastnst.data.manifest import ImageEntry, Manifest, Rejection, compute_fingerprint, quote_path, unquote_path
from fastnst.data.sampler import Fit
from fastnst.errors import DataError, shell_quote
from fastnst.images import READABLE_FORMATS, printable
from fastnst.storage import open_nonblocking, read_regular_file

MANIFEST = "manifest.json"
KIND = "fastnst cache"
FORMAT = 1
SHARD_BYTES = 1 << 30
"""Maximum size of a shard. Finished shards survive a killed process."""
MAX_ASPECT_RATIO = 32
"""Limit on long side : short side. An elongated image could take gigabytes once its short side is enlarged."""
MAX_MANIFEST_BYTES = 1 << 28
"""An image takes about 100 bytes in it."""

_READER = b" colours 2"
"""How images that are not DALI-safe are read; another value where their pixels change. Without it: before profiles."""
_SIZES = (16, 2048)
_MAX_INT = 1 << 62
_HEAD_BYTES, _HEAD_LINES = 1 << 15, 6  # up to `source`: see `manifest_bytes`
_PREFIX = b'{\n"kind": "fastnst cache"'


@dataclass(frozen=True, slots=True)
class CachedImage:
    """An image in a shard."""

    entry: ImageEntry
    """Its source file."""
    shard: int
    offset: int
    """Position in the shard, in bytes."""
    rows: int
    columns: int

    @property
    def bytes(self) -> int:
        return self.rows * self.columns * 3


@dataclass(frozen=True, slots=True)
class Shard:
    """A file of images, as listed in the manifest."""

    name: str
    size: int
    sha256: str
    inputs_sha256: str
    """SHA-256 of all that determines its bytes (`plan` in the files); see `inputs_digest`."""


@dataclass(frozen=True)
class Cache:
    """The content of `manifest.json`."""

    folder: Path
    size: int
    fit: Fit
    source: str
    """The folder of the source images, for messages."""
    shards: tuple[Shard, ...]
    images: list[CachedImage]
    """Ordered as in the folder's manifest."""
    rejected: list[Rejection]

    @property
    def bytes(self) -> int:
        return sum(shard.size for shard in self.shards)

    def rebuild_hint(self) -> str:
        """Return the advice for damaged shards."""
        return f"rebuild what is damaged with: {cache_command(self.source, self.size, self.fit, self.folder)} --rebuild"


class ShardError(DataError):
    """A shard is missing or damaged."""


@dataclass(frozen=True)
class CachedManifest(Manifest):
    """The images of a cache as the manifest of a run; `folder` is the cache."""

    cache: Cache = field(kw_only=True)


def is_cache(folder: Path) -> bool:
    """Whether a folder is a cache, even unfinished or damaged; a foreign `manifest.json` does not count."""
    try:
        with open(folder / MANIFEST, "rb", opener=open_nonblocking) as file:
            if file.read(len(_PREFIX)) == _PREFIX:
                return True
    except OSError:
        pass
    return os.path.lexists(folder / shard_name(0))


def as_manifest(cache: Cache) -> CachedManifest:
    """Return the manifest of a run on a cache; its fingerprint covers the stored bytes."""
    images = [image.entry for image in cache.images]
    digest = hashlib.sha256(f"{cache.size} {cache.fit} {compute_fingerprint(images)}".encode())
    for shard in cache.shards:
        digest.update(shard.sha256.encode())
    return CachedManifest(cache.folder, images, cache.rejected, digest.hexdigest(), cache=cache)


def read_head(folder: Path) -> Cache | None:
    """Read what a cache was made for, without its images; None if it is unfinished or damaged: `read_cache` says how.

    The manifest of many images is long, and its first lines suffice.
    """
    try:
        with open(folder / MANIFEST, "rb", opener=open_nonblocking) as file:
            lines = file.read(_HEAD_BYTES).splitlines()[1 : 1 + _HEAD_LINES]
        head = json.loads(b"{" + b"".join(lines).rstrip(b",") + b"}")
        size, fit = _checked_int(head["size"], *_SIZES), head["fit"]
        source = os.fsdecode(unquote_to_bytes(head["source"]))
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None
    return Cache(folder, size, fit, source, (), [], []) if fit in get_args(Fit) else None


def check_matches(cache: Cache, *, size: int, fit: Fit) -> None:
    """Check that a cache has the run's size and fit.

    Raises:
        DataError: names both values and the command that makes a matching cache.
    """
    differences = [
        f"{name} is {wanted}, and {printable(cache.folder)} was made for {found}"
        for name, wanted, found in (("data.image_size", size, cache.size), ("data.fit", fit, cache.fit))
        if wanted != found
    ]
    if differences:
        keys = f"--set data.image_size={cache.size} --set data.fit={cache.fit}"
        make = cache_command(cache.source, size, fit, cache.folder.with_name(f"{cache.folder.name}-{size}-{fit}"))
        raise DataError(f"{'; '.join(differences)}; make a matching one with: {make}, or train with {keys}")


def cache_command(source: Path | str, size: int, fit: Fit, out: Path) -> str:
    """Return the command line that makes a cache."""
    return f"fastnst data cache {shell_quote(source)} --size {size} --fit {fit} --out {shell_quote(out)}"


def shard_name(index: int) -> str:
    return f"shard_{index:04d}.u8"


def cached_shape(width: int, height: int, fit: Fit, size: int) -> tuple[int, int]:
    """Return rows and columns of an image in the cache."""
    if fit != "random_crop":
        return size, size
    side = min(width, height)
    return resized_length(height, side, size), resized_length(width, side, size)


def layout(entries: Iterable[ImageEntry], fit: Fit, size: int) -> list[CachedImage]:
    """Assign each image its shard and offset, starting a new shard where one would exceed `SHARD_BYTES`."""
    images: list[CachedImage] = []
    shard = offset = 0
    for entry in entries:
        rows, columns = cached_shape(entry.width, entry.height, fit, size)
        image = CachedImage(entry, shard, offset, rows, columns)
        if offset + image.bytes > SHARD_BYTES and offset:
            shard, offset = shard + 1, 0
            image = CachedImage(entry, shard, offset, rows, columns)
        images.append(image)
        offset += image.bytes
    return images


def group_by_shard(images: list[CachedImage]) -> list[list[CachedImage]]:
    """Split the images by shard."""
    starts = [index for index, image in enumerate(images) if not image.offset]
    return [images[start:end] for start, end in pairwise([*starts, len(images)])]


def inputs_digest(images: list[CachedImage], fit: Fit, size: int, pillow: str = PIL.__version__) -> str:
    """Return the SHA-256 of what determines a shard's bytes: files, size, fit and Pillow's version."""
    digest = hashlib.sha256(f"{FORMAT} {fit} {size} {pillow}".encode())
    if not all(image.entry.dali_safe for image in images):
        digest.update(_READER)
    for image in images:
        digest.update(json.dumps(_row(image)).encode())
    return digest.hexdigest()


def open_shard(folder: Path, name: str, size: int) -> int:
    """Open a shard of `size` bytes; return its file descriptor, which the caller closes.

    Raises:
        ShardError: it is missing, not a regular file, or of another size. The message lacks advice: the caller adds it.
    """
    path = folder / name
    try:
        descriptor = open_nonblocking(str(path), os.O_RDONLY | os.O_NOFOLLOW)
    except OSError as error:
        known = {errno.ENOENT: "is missing", errno.ELOOP: "is a symbolic link, which a cache never holds"}
        reason = known.get(error.errno or 0, f"cannot be read: {error.strerror}")
        raise ShardError(f"{printable(path)} {reason}") from error
    status = os.fstat(descriptor)
    if stat.S_ISREG(status.st_mode) and status.st_size == size:
        return descriptor
    os.close(descriptor)
    kind = f"has {status.st_size} bytes instead of {size}" if stat.S_ISREG(status.st_mode) else "is no regular file"
    raise ShardError(f"{printable(path)} is damaged: it {kind}")


def read_cache(folder: Path) -> Cache:
    """Read the manifest of a cache, without examining the shards.

    Raises:
        DataError: the manifest is missing, damaged, or not a cache's.
    """
    path = folder / MANIFEST
    anew = f"fastnst data cache FOLDER --size SIZE --out {shell_quote(folder)}"
    try:
        data = read_regular_file(path, MAX_MANIFEST_BYTES)
    except FileNotFoundError as error:
        raise DataError(
            f"{printable(folder)} is an unfinished cache ({MANIFEST} is missing); finish it with: {anew}"
        ) from error
    except OSError as error:
        raise DataError(
            f"cannot read {printable(path)}: {error.strerror}; check it, or use {anew} --rebuild"
        ) from error
    try:
        value = json.loads(data)
        newer = value["format"] if value["kind"] == KIND else 0
        if type(newer) is int and newer > FORMAT:
            raise DataError(
                f"{printable(path)} has format {newer}, this fastnst reads {FORMAT}; use a newer fastnst, or make the "
                f"cache again with: {anew} --rebuild"
            )
        return _parse(folder, value)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
        if isinstance(error, DataError):
            raise
        reason = str(error)[:200] or type(error).__name__
        raise DataError(
            f"{printable(path)} is damaged, or not a cache's ({reason}); make the cache again with: {anew} --rebuild"
        ) from error


def manifest_bytes(cache: Cache) -> bytes:
    """Serialize a cache's manifest; `read_cache` parses it."""
    groups = group_by_shard(cache.images)
    shards = [
        {
            "name": shard.name,
            "size": shard.size,
            "sha256": shard.sha256,
            "plan": shard.inputs_sha256,
            "pictures": [_row(image) for image in group],
        }
        for shard, group in zip(cache.shards, groups, strict=True)
    ]
    head = {
        "format": FORMAT,
        "size": cache.size,
        "fit": cache.fit,
        "pillow": PIL.__version__,
        "source": quote_path(cache.source),
        "fingerprint": compute_fingerprint(image.entry for image in cache.images),
        "columns": _COLUMNS,
        "rejected": [[quote_path(item.path), item.reason] for item in cache.rejected],
    }
    # One line per key and shard, for readability; `is_cache` relies on the first.
    lines = [f'"kind": "{KIND}"', *(f'"{key}": {json.dumps(value)}' for key, value in head.items())]
    rows = ",\n".join(json.dumps(shard) for shard in shards)
    return ("{\n" + ",\n".join([*lines, f'"shards": [\n{rows}\n]']) + "\n}\n").encode("ascii")


_COLUMNS = ["path", "bytes", "width", "height", "format", "plain", "mtime_ns", "offset", "rows", "columns"]


def _row(image: CachedImage) -> list[Any]:
    """Return an image's row in the manifest; see `_COLUMNS`."""
    path, *rest = astuple(image.entry)
    return [quote_path(path), *rest, image.offset, image.rows, image.columns]


def _parse(folder: Path, value: dict[str, Any]) -> Cache:
    """Parse untrusted JSON; `read_cache` turns the various exceptions that it may raise into a DataError."""
    if value["kind"] != KIND or type(value["format"]) is not int or value["format"] != FORMAT:
        raise ValueError("unknown kind or format")
    size, fit, pillow = _checked_int(value["size"], *_SIZES), value["fit"], value["pillow"]
    if fit not in get_args(Fit) or not isinstance(pillow, str):
        raise ValueError("unknown fit or Pillow version")
    images: list[CachedImage] = []
    shards: list[Shard] = []
    for index, shard in enumerate(value["shards"]):
        group = _parse_rows(index, shard["pictures"], fit, size)
        total = sum(image.bytes for image in group)
        parsed = Shard(
            shard["name"], _checked_int(shard["size"], 1, SHARD_BYTES), _checked_sha256(shard["sha256"]), shard["plan"]
        )
        expected = Shard(shard_name(index), total, parsed.sha256, inputs_digest(group, fit, size, pillow))
        if parsed != expected:
            raise ValueError(f"shard {index} does not match its images")
        images += group
        shards.append(parsed)
    paths = [os.fsencode(image.entry.path) for image in images]
    if not paths or any(before >= after for before, after in pairwise(paths)):
        raise ValueError("the images are not sorted")
    if value["fingerprint"] != compute_fingerprint(image.entry for image in images):
        raise ValueError("the fingerprint does not match")
    rejected = [Rejection(os.fsdecode(unquote_to_bytes(path)), str(reason)) for path, reason in value["rejected"]]
    source = os.fsdecode(unquote_to_bytes(value["source"]))
    return Cache(folder, size, fit, source, tuple(shards), images, rejected)


def _parse_rows(index: int, rows: list[Any], fit: Fit, size: int) -> list[CachedImage]:
    """Parse the images of a shard; shapes and offsets are computed, and the manifest's must equal them."""
    group: list[CachedImage] = []
    offset = 0
    for row in rows:
        path, length, width, height, image_format, dali_safe, mtime, *place = row
        path = unquote_path(path)
        width, height = _checked_int(width, 1, _MAX_INT), _checked_int(height, 1, _MAX_INT)
        if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
            raise ValueError(f"an image of {width} × {height} px")
        if image_format not in READABLE_FORMATS or type(dali_safe) is not bool:
            raise ValueError("not an image that passed the check")
        length, mtime = _checked_int(length, 1, _MAX_INT), _checked_int(mtime, -_MAX_INT, _MAX_INT)
        entry = ImageEntry(path, length, width, height, image_format, dali_safe, mtime)
        image = CachedImage(entry, index, offset, *cached_shape(width, height, fit, size))
        if [_checked_int(number, 0, _MAX_INT) for number in place] != [offset, image.rows, image.columns]:
            raise ValueError(f"wrong offset or shape of image {len(group)} of shard {index}")
        group.append(image)
        offset += image.bytes
    return group


def _checked_int(number: object, low: int, high: int) -> int:
    if type(number) is not int or not low <= number <= high:
        raise ValueError(f"expected an integer from {low} to {high}")
    return number


def _checked_sha256(text: object) -> str:
    if not isinstance(text, str) or len(text) != 64 or set(text) - set("0123456789abcdef"):
        raise ValueError("expected a SHA-256")
    return text
