"""Images that were decoded and resized once, for runs that read them at the speed of memory.

    CACHE/
        shard_0000.u8   images one behind the other, each uint8 [rows, columns, 3]
        …
        manifest.json   what is where, the shards' SHA-256, and from what they were made; written last

Of each image it holds all that a run with the cache's `fit` may see. For `random_crop` the whole of it, the short
side resized to `size`; where the crop lies and the mirroring stay the run's. For `center_crop` and `squash`, which
leave nothing to choose, the square itself. So a batch from a cache is the one that the Pillow loader makes of the
folder: always to the bit for `center_crop` and `squash`, and for `random_crop` where `size` is a power of two. For
other sizes Pillow, which takes windows in fp32, rounds some values the other way, by 1 of 255.

Shards are read by position (`pread`), which copies from the page cache as reading from a mapping would. But a file
that is cut short, or a disk that fails, is then an error with a name, where a mapping ends the process by SIGBUS.

Whoever hands on a cache may have made its manifest. Names, shapes and offsets follow from the rest and are only
compared, so that nothing is read elsewhere, or beyond a shard's end.
"""

import errno
import hashlib
import json
import os
import shlex
import stat
from collections.abc import Iterable
from dataclasses import astuple, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args
from urllib.parse import quote_from_bytes, unquote_to_bytes

import PIL

from fastnst.data.crop import resized_length
from fastnst.data.manifest import Entry, Manifest, Rejection, fingerprint_of
from fastnst.data.sampler import Fit
from fastnst.errors import DataError
from fastnst.images import TRAINING_FORMATS, printable
from fastnst.storage import read_regular_file

MANIFEST = "manifest.json"
KIND = "fastnst cache"
FORMAT = 1
SHARD_BYTES = 1 << 30
"""No shard is larger. Those that are finished outlive a process that is killed."""
LARGEST_RATIO = 32
"""Of an image's sides; the long one of a thin image could have gigabytes once the short one is enlarged."""
LARGEST_MANIFEST = 1 << 28
"""Bytes; an image takes some 100."""

_SIZES = (16, 2048)
_LARGEST_NUMBER = 1 << 62
_BEGINNING = b'{\n"kind": "fastnst cache"'


@dataclass(frozen=True, slots=True)
class Stored:
    """An image in a shard."""

    entry: Entry
    """The file that it was made from."""
    shard: int
    offset: int
    """Bytes before it in the shard."""
    rows: int
    columns: int

    @property
    def bytes(self) -> int:
        return self.rows * self.columns * 3


@dataclass(frozen=True, slots=True)
class Shard:
    """A file of images."""

    name: str
    size: int
    sha256: str
    plan: str
    """SHA-256 of all that decides its bytes; see `plan_of`."""


@dataclass(frozen=True)
class Cache:
    """What `manifest.json` says."""

    folder: Path
    size: int
    fit: Fit
    source: str
    """The folder that it was made of, for messages."""
    shards: tuple[Shard, ...]
    images: list[Stored]
    """In the order of the folder's manifest."""
    rejected: list[Rejection]

    @property
    def bytes(self) -> int:
        return sum(shard.size for shard in self.shards)

    def remedy(self) -> str:
        """What makes damaged shards again."""
        return f"make what is damaged again with: {command(self.source, self.size, self.fit, self.folder)} --rebuild"


class ShardError(DataError):
    """A shard is missing or not as it was written."""


@dataclass(frozen=True)
class CachedManifest(Manifest):
    """The images of a cache, for a run; `folder` is the cache's own."""

    cache: Cache = field(kw_only=True)


def is_cache(folder: Path) -> bool:
    """Whether a folder is a cache, also one that is unfinished or damaged; a foreign `manifest.json` makes it none."""
    try:
        with open(folder / MANIFEST, "rb", opener=_without_waiting) as file:
            if file.read(len(_BEGINNING)) == _BEGINNING:
                return True
    except OSError:
        pass
    return os.path.lexists(folder / shard_name(0))


def as_manifest(cache: Cache) -> CachedManifest:
    """A cache as the manifest of a run. Its fingerprint is that of the stored bytes: equal caches train alike."""
    images = [stored.entry for stored in cache.images]
    digest = hashlib.sha256(f"{cache.size} {cache.fit} {fingerprint_of(images)}".encode())
    for shard in cache.shards:
        digest.update(shard.sha256.encode())
    return CachedManifest(cache.folder, images, cache.rejected, digest.hexdigest(), cache=cache)


def check_use(cache: Cache, *, size: int, fit: Fit) -> None:
    """Refuse a cache that was made for another kind of run.

    Raises:
        DataError: naming both values, and the command that makes a cache that fits.
    """
    differences = [
        f"{name} is {wanted}, and {printable(cache.folder)} was made for {found}"
        for name, wanted, found in (("data.image_size", size, cache.size), ("data.fit", fit, cache.fit))
        if wanted != found
    ]
    if differences:
        keys = f"--set data.image_size={cache.size} --set data.fit={cache.fit}"
        make = command(cache.source, size, fit, cache.folder.with_name(f"{cache.folder.name}-{size}-{fit}"))
        raise DataError(f"{'; '.join(differences)}; make one that fits with: {make}, or train with {keys}")


def command(source: Path | str, size: int, fit: Fit, out: Path) -> str:
    """The command line that makes a cache."""
    option = "" if fit == "random_crop" else f" --fit {fit}"
    folder, target = (shlex.quote(printable(path)) for path in (source, out))
    return f"fastnst data cache {folder} --size {size}{option} --out {target}"


def shard_name(index: int) -> str:
    return f"shard_{index:04d}.u8"


def stored_shape(width: int, height: int, fit: Fit, size: int) -> tuple[int, int]:
    """Rows and columns of what is kept of an image."""
    if fit != "random_crop":
        return size, size
    side = min(width, height)
    return resized_length(height, side, size), resized_length(width, side, size)


def layout(entries: Iterable[Entry], fit: Fit, size: int) -> list[Stored]:
    """Where each image lies: one behind the other, and a new shard where one would become too large."""
    images: list[Stored] = []
    shard = offset = 0
    for entry in entries:
        rows, columns = stored_shape(entry.width, entry.height, fit, size)
        stored = Stored(entry, shard, offset, rows, columns)
        if offset + stored.bytes > SHARD_BYTES and offset:
            shard, offset = shard + 1, 0
            stored = Stored(entry, shard, offset, rows, columns)
        images.append(stored)
        offset += stored.bytes
    return images


def in_shards(images: list[Stored]) -> list[list[Stored]]:
    """The images of each shard."""
    starts = [index for index, stored in enumerate(images) if not stored.offset]
    return [images[start:end] for start, end in pairwise([*starts, len(images)])]


def plan_of(images: list[Stored], fit: Fit, size: int, pillow: str = PIL.__version__) -> str:
    """SHA-256 of what decides a shard's bytes: its files, as their check found them, size, fit, and what decodes."""
    digest = hashlib.sha256(f"{FORMAT} {fit} {size} {pillow}".encode())
    for stored in images:
        digest.update(json.dumps(_row(stored)).encode())
    return digest.hexdigest()


def open_shard(folder: Path, name: str, size: int) -> int:
    """A descriptor of a shard, which is a file of `size` bytes; whoever asks for it closes it.

    Raises:
        ShardError: it is missing, is not a file of its own, or has another size; without what to do, which depends.
    """
    path = folder / name
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        known = {errno.ENOENT: "is missing", errno.ELOOP: "is a link, and a cache holds files"}
        reason = known.get(error.errno or 0, f"cannot be read: {error.strerror}")
        raise ShardError(f"{printable(path)} {reason}") from error
    status = os.fstat(descriptor)
    if stat.S_ISREG(status.st_mode) and status.st_size == size:
        return descriptor
    os.close(descriptor)
    kind = f"has {status.st_size} bytes, {size} were written" if stat.S_ISREG(status.st_mode) else "is no regular file"
    raise ShardError(f"{printable(path)} is damaged: it {kind}")


def read_cache(folder: Path) -> Cache:
    """A cache's manifest; the shards are not looked at.

    Raises:
        DataError: it is missing, damaged, or not a cache's.
    """
    path = folder / MANIFEST
    anew = f"fastnst data cache FOLDER --size SIZE --out {shlex.quote(printable(folder))}"
    try:
        data = read_regular_file(path, LARGEST_MANIFEST)
    except FileNotFoundError as error:
        raise DataError(
            f"{printable(folder)} is a cache that was not finished ({MANIFEST} is missing); finish it with: {anew}"
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
    """The content of `manifest.json`, as `read_cache` takes it."""
    groups = in_shards(cache.images)
    shards = [
        {
            "name": shard.name,
            "size": shard.size,
            "sha256": shard.sha256,
            "plan": shard.plan,
            "pictures": [_row(stored) for stored in group],
        }
        for shard, group in zip(cache.shards, groups, strict=True)
    ]
    head = {
        "format": FORMAT,
        "size": cache.size,
        "fit": cache.fit,
        "pillow": PIL.__version__,
        "source": quote_from_bytes(os.fsencode(cache.source)),
        "fingerprint": fingerprint_of(stored.entry for stored in cache.images),
        "columns": _COLUMNS,
        "rejected": [[quote_from_bytes(os.fsencode(item.path)), item.reason] for item in cache.rejected],
    }
    # A line for each shard and key: for people who look, and for `is_cache`.
    lines = [f'"kind": "{KIND}"', *(f'"{key}": {json.dumps(value)}' for key, value in head.items())]
    rows = ",\n".join(json.dumps(shard) for shard in shards)
    return ("{\n" + ",\n".join([*lines, f'"shards": [\n{rows}\n]']) + "\n}\n").encode("ascii")


_COLUMNS = ["path", "bytes", "width", "height", "format", "plain", "mtime_ns", "offset", "rows", "columns"]


def _row(stored: Stored) -> list[Any]:
    """An image's line in the manifest."""
    path, *rest = astuple(stored.entry)
    # A name that is not UTF-8 cannot stand in JSON, and must come back exactly.
    return [quote_from_bytes(os.fsencode(path)), *rest, stored.offset, stored.rows, stored.columns]


def _parse(folder: Path, value: dict[str, Any]) -> Cache:
    """Raises what a manifest of any content may lead to; `read_cache` says it in words."""
    if value["kind"] != KIND or type(value["format"]) is not int or value["format"] != FORMAT:
        raise ValueError("it does not say that it is one")
    size, fit, pillow = _whole(value["size"], *_SIZES), value["fit"], value["pillow"]
    if fit not in get_args(Fit) or not isinstance(pillow, str):
        raise ValueError("another fit than there are")
    images: list[Stored] = []
    shards: list[Shard] = []
    for index, shard in enumerate(value["shards"]):
        group = _group(index, shard["pictures"], fit, size)
        total = sum(stored.bytes for stored in group)
        found = Shard(shard["name"], _whole(shard["size"], 1, SHARD_BYTES), _digest(shard["sha256"]), shard["plan"])
        # Exactly these: a manifest must not make anyone read elsewhere.
        if (found.name, found.size, found.plan) != (shard_name(index), total, plan_of(group, fit, size, pillow)):
            raise ValueError(f"shard {index} does not fit its images")
        images += group
        shards.append(found)
    paths = [os.fsencode(stored.entry.path) for stored in images]
    if not paths or any(before >= after for before, after in pairwise(paths)):
        raise ValueError("the images are not in order")
    if value["fingerprint"] != fingerprint_of(stored.entry for stored in images):
        raise ValueError("the fingerprint is another")
    rejected = [Rejection(os.fsdecode(unquote_to_bytes(path)), str(reason)) for path, reason in value["rejected"]]
    source = os.fsdecode(unquote_to_bytes(value["source"]))
    return Cache(folder, size, fit, source, tuple(shards), images, rejected)


def _group(index: int, rows: list[Any], fit: Fit, size: int) -> list[Stored]:
    """The images of a shard; shapes and offsets are computed, and those of the manifest have to be equal."""
    group: list[Stored] = []
    offset = 0
    for row in rows:
        path, length, width, height, image_format, plain, mtime, *place = row
        name = unquote_to_bytes(path)
        if not name or name.startswith(b"/") or b".." in name.split(b"/") or b"\0" in name:
            raise ValueError("a path leads out of the folder")
        width, height = _whole(width, 1, _LARGEST_NUMBER), _whole(height, 1, _LARGEST_NUMBER)
        if max(width, height) > LARGEST_RATIO * min(width, height):
            raise ValueError(f"an image of {width} × {height} px")
        if image_format not in TRAINING_FORMATS or type(plain) is not bool:
            raise ValueError("not an image that a check accepted")
        length, mtime = _whole(length, 1, _LARGEST_NUMBER), _whole(mtime, -_LARGEST_NUMBER, _LARGEST_NUMBER)
        entry = Entry(os.fsdecode(name), length, width, height, image_format, plain, mtime)
        stored = Stored(entry, index, offset, *stored_shape(width, height, fit, size))
        if [_whole(number, 0, _LARGEST_NUMBER) for number in place] != [offset, stored.rows, stored.columns]:
            raise ValueError(f"image {len(group)} of shard {index} lies elsewhere")
        group.append(stored)
        offset += stored.bytes
    return group


def _whole(number: object, least: int, most: int) -> int:
    if type(number) is not int or not least <= number <= most:
        raise ValueError(f"a number from {least} to {most} is something else")
    return number


def _digest(text: object) -> str:
    if not isinstance(text, str) or len(text) != 64 or set(text) - set("0123456789abcdef"):
        raise ValueError("a SHA-256 is something else")
    return text


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)
