"""Check which files of a folder training can read, and why it rejects the others.

Every image is decoded once before training, so that a damaged one does not end a run hours later. Results are kept in
the cache folder and reused for each file with the same size and modification time.
"""

import contextlib
import hashlib
import json
import logging
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import quote_from_bytes, unquote_to_bytes

import PIL
from PIL import Image

from fastnst.data.dali_safe import check_integrity, is_dali_safe
from fastnst.data.image_files import ImageFile, list_image_files
from fastnst.errors import DataError
from fastnst.images import (
    MIN_SIDE,
    READABLE_FORMATS,
    UnusableImageError,
    check_size,
    decode,
    load,
    open_image,
    orientation_of,
    prepare,
    printable,
    read_bytes,
)
from fastnst.memory import MemoryBudget, available_host_memory
from fastnst.progress import byte_count
from fastnst.storage import cache_folder, write_atomic, write_cached

_CACHE_VERSION = 3
"""Raised whenever the check finds something else: 3 since colour profiles, transparency and further formats."""
_CHUNK = 16
DECODED_BYTES_PER_PIXEL = 12
"""Three images of Pillow's, four bytes per pixel: as it is stored, converted, and turned or filled."""


log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ImageEntry:
    """An image that passed the check."""

    path: str
    """Relative to the folder; decoded by `os.fsdecode`, so a name that is not UTF-8 holds surrogates."""
    size: int
    """Bytes."""
    width: int
    """Pixels of the upright image."""
    height: int
    format: str
    """One of `READABLE_FORMATS`, by content."""
    dali_safe: bool
    """Whether DALI may decode the file; if not, Pillow decodes it for both loaders. See `fastnst.data.dali_safe`."""
    mtime: int
    """Modification time in ns; a file with another one is checked again before it is used."""


@dataclass(frozen=True, slots=True)
class Rejection:
    """A file that failed the check."""

    path: str
    """Relative to the folder."""
    reason: str
    """What is wrong with it, and what to do."""


@dataclass(frozen=True)
class Manifest:
    """The checked images of a folder."""

    folder: Path
    images: list[ImageEntry]
    """Sorted by the bytes of their path, independent of file system and locale."""
    rejected: list[Rejection]
    fingerprint: str
    """SHA-256 over path, size and dimensions of `images`; the same for equal folders."""
    ignored: int = 0
    """Number of files that are hidden or lack an image suffix."""


def build_manifest(
    folder: Path | str,
    *,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    cache: bool = True,
    min_side: int = MIN_SIDE,
    allow_uniform: bool = True,
) -> Manifest:
    """Check every image of a folder and its subfolders.

    Links are followed; hidden files and folders are skipped.

    Args:
        folder: folder of images.
        workers: decoding threads; default: one per core available to this process.
        progress: called with (files done, files in total) after each file.
        cache: reuse and store results of earlier checks.
        min_side: minimum of the short side, in pixels.
        allow_uniform: accept images of a single colour. Training must not: with zero variance, each instance norm
            multiplies the gradient by 1/√ε, and sixteen of them in a row overflow fp32.

    Raises:
        DataError: the folder is missing, unreadable or empty, or none of its images can be used.
    """
    folder = Path(folder)
    unlisted, candidates, ignored = list_image_files(folder)
    unreadable = [Rejection(*each) for each in unlisted]
    if not candidates and not unreadable:
        raise DataError(f"{printable(folder)} holds no images, only {ignored} other files; give a folder of photos")
    rules = _Rules(min_side, allow_uniform)
    ordered = _check_all(folder, candidates, rules, workers or len(os.sched_getaffinity(0)), progress, cache)
    images = [checked.entry for checked in ordered if checked.entry is not None]
    _log_ignored_profiles([checked for checked in ordered if checked.entry is not None and checked.reason])
    rejected = [Rejection(checked.path, checked.reason) for checked in ordered if checked.entry is None]
    rejected = sorted([*rejected, *unreadable], key=lambda rejection: os.fsencode(rejection.path))
    if not images:
        first = rejected[0]
        raise DataError(
            f"none of the {len(rejected)} images in {printable(folder)} can be used; "
            f"the first, {printable(first.path)}: {first.reason}"
        )
    return Manifest(folder, images, rejected, compute_fingerprint(images), ignored)


def write_rejections(manifest: Manifest, path: Path, more: Iterable[str] = ()) -> None:
    """Write one JSON object per rejected file, `{"path": …, "reason": …}`, atomically.

    Args:
        manifest: result of the check.
        path: file to write; empty if nothing was rejected.
        more: further lines to append, each with its newline.

    Raises:
        DataError: the file cannot be written.
    """
    rows = (
        json.dumps({"path": printable(rejection.path), "reason": rejection.reason}, ensure_ascii=False) + "\n"
        for rejection in manifest.rejected
    )
    write_atomic(path, "".join([*rows, *more]).encode())


def check_image(
    path: str,
    data: bytes,
    *,
    mtime: int,
    min_side: int = 1,
    allow_uniform: bool = True,
    reserve: Callable[[int], object] = lambda _: None,
) -> tuple[ImageEntry, str]:
    """Check one image completely; return its description, and why its colour profile is ignored, or nothing.

    Args:
        path: relative to the folder; only copied into the entry.
        data: all bytes of the file.
        mtime: modification time in ns; only copied into the entry.
        min_side, allow_uniform: see `build_manifest`.
        reserve: called with the bytes that decoding takes, before it begins; it may wait, or raise.

    Raises:
        UnusableImageError: the image fails the check.
    """
    image = open_image(data)
    width, height = image.size
    check_size(width, height, min_side)
    reserve(DECODED_BYTES_PER_PIXEL * width * height)
    check_integrity(data, image)
    space = prepare(image, data)
    # Damage shows in JPEG's entropy decoding. Scale 1/8 does that in full and skips most of the inverse transform.
    image.draft("L", (1, 1))
    load(image)
    orientation = orientation_of(image)
    if orientation >= 5:
        width, height = height, width
    is_plain = is_dali_safe(data, image, orientation)
    decoded = None if is_plain else decode(data)
    if not allow_uniform and _is_uniform(image, decoded, data):
        raise UnusableImageError("all of it has one colour, which makes gradients overflow; remove it")
    dali_safe = is_plain and space.profile is None
    image_format = "JPEG" if image.format in ("JPEG", "MPO") else str(image.format)
    return ImageEntry(path, len(data), width, height, image_format, dali_safe, mtime), space.ignored


def compute_fingerprint(images: Iterable[ImageEntry]) -> str:
    """Return `Manifest.fingerprint` for these images."""
    digest = hashlib.sha256()
    for entry in images:
        digest.update(os.fsencode(entry.path) + f"\0{entry.size} {entry.width} {entry.height}\0".encode())
    return digest.hexdigest()


def quote_path(path: str) -> str:
    """Percent-encode a path, since JSON cannot hold names that are not UTF-8."""
    return quote_from_bytes(os.fsencode(path))


def unquote_path(quoted: str) -> str:
    """Undo `quote_path`.

    Raises:
        ValueError: the path leads out of its folder, or is none.
    """
    name = unquote_to_bytes(quoted)
    if not name or name.startswith(b"/") or b".." in name.split(b"/") or b"\0" in name:
        raise ValueError("not a path inside the folder")
    return os.fsdecode(name)


@dataclass(frozen=True, slots=True)
class _Rules:
    """Options that decide the result of a check; see `build_manifest`."""

    min_side: int
    allow_uniform: bool


@dataclass(frozen=True, slots=True)
class _Checked:
    """Result of checking one file."""

    path: str
    size: int
    mtime: int
    entry: ImageEntry | None
    reason: str = ""
    """Why it is rejected; of an accepted image, why its colour profile is ignored."""
    cacheable: bool = True
    """Whether the result depends on the file's content alone."""


def _check_all(
    folder: Path,
    candidates: list[ImageFile],
    rules: _Rules,
    workers: int,
    progress: Callable[[int, int], None] | None,
    cache: bool,
) -> list[_Checked]:
    """Check the candidates, in order, reusing cached results."""
    cache_file = _cache_file(folder)
    known = _read_cache(cache_file, rules) if cache else {}
    results: dict[str, _Checked] = {}
    pending: list[ImageFile] = []
    for path, size, mtime in candidates:
        earlier = known.get(path)
        if earlier is not None and (earlier.size, earlier.mtime) == (size, mtime):
            results[path] = earlier
        else:
            pending.append((path, size, mtime))
    report = progress or (lambda _done, _total: None)
    report(len(results), len(candidates))
    try:
        for checked in _check_in_threads(folder, pending, rules, workers):
            results[checked.path] = checked
            report(len(results), len(candidates))
    finally:
        # Also when interrupted: the next check continues from here.
        if cache and pending:
            _write_cache(cache_file, rules, results.values())
    return [results[path] for path, _, _ in candidates]


def _check_in_threads(folder: Path, pending: list[ImageFile], rules: _Rules, workers: int) -> Iterator[_Checked]:
    """Check files in threads, which suffice: reading and decoding release the GIL."""
    rest = iter(pending)
    running: deque[Future[list[_Checked]]] = deque()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="check")
    budget = MemoryBudget(available_host_memory())

    def check(files: list[ImageFile]) -> list[_Checked]:
        return [_check(folder, *file, rules, budget) for file in files]

    try:
        while True:
            while len(running) < 2 * workers and (chunk := list(islice(rest, _CHUNK))):
                running.append(pool.submit(check, chunk))
            if not running:
                return
            yield from running.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


class _TooLittleMemoryError(Exception):
    """Decoding an image would take more memory than there is."""


def _check(folder: Path, path: str, size: int, mtime: int, rules: _Rules, budget: MemoryBudget) -> _Checked:
    def reserve(count: int) -> None:
        if count > budget.total:
            available = byte_count(budget.total)
            raise _TooLittleMemoryError(f"decoding takes {byte_count(count)}, and {available} are there; scale it down")
        held.enter_context(budget.reserved(count))

    try:
        data = read_bytes(os.path.join(folder, path))  # noqa: PTH118
    except UnusableImageError as error:
        return _Checked(path, size, mtime, None, str(error), cacheable=False)
    try:
        with contextlib.ExitStack() as held:
            entry, ignored = check_image(path, data, mtime=mtime, reserve=reserve, **asdict(rules))
        return _Checked(path, size, mtime, entry, ignored)
    except _TooLittleMemoryError as error:
        return _Checked(path, size, mtime, None, str(error), cacheable=False)
    except UnusableImageError as error:
        return _Checked(path, size, mtime, None, str(error))


def _is_uniform(image: Image.Image, decoded: Image.Image | None, data: bytes) -> bool:
    """Whether all pixels have the same colour.

    Args:
        image: loaded, possibly at reduced scale.
        decoded: the same as `decode` returns it; None if both have the same pixels.
        data: the whole file.
    """
    extrema: Any = (decoded or image).getextrema()
    low, high = extrema[0] if isinstance(extrema[0], tuple) else extrema
    if low != high:
        return False
    return all(low == high for low, high in (decoded or decode(data)).getextrema())  # type: ignore[misc]


def _log_ignored_profiles(found: list[_Checked]) -> None:
    if found:
        first = f"{printable(found[0].path)}: {found[0].reason}"
        number = f"{len(found)} image{'s' if len(found) > 1 else ''}"
        log.warning("%s read as sRGB, without a colour profile; the first, %s", number, first)


def _cache_file(folder: Path) -> Path:
    name = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:32]
    return cache_folder() / "manifests" / f"{name}.json"


def _cache_key(rules: _Rules) -> list[Any]:
    """Return all that decides the result of a check, besides the file."""
    return [_CACHE_VERSION, PIL.__version__, *asdict(rules).values()]


def _read_cache(file: Path, rules: _Rules) -> dict[str, _Checked]:
    """Return earlier results by path; empty if the cache file is absent, damaged or of another version."""
    try:
        content = json.loads(file.read_bytes())
        if content["key"] != _cache_key(rules):
            return {}
        return {row[0]: _from_row(row) for row in content["files"]}
    except (OSError, ValueError, TypeError, KeyError, IndexError, RecursionError):
        return {}


def _write_cache(file: Path, rules: _Rules, results: Iterable[_Checked]) -> None:
    # ASCII, since names that are not UTF-8 hold lone surrogates.
    content = json.dumps(
        {"key": _cache_key(rules), "files": [_to_row(checked) for checked in results if checked.cacheable]}
    )
    write_cached(file, content.encode("ascii"))


def _to_row(checked: _Checked) -> list[Any]:
    entry = None if checked.entry is None else list(asdict(checked.entry).values())[1:-1]
    return [checked.path, checked.size, checked.mtime, entry, checked.reason]


def _from_row(row: list[Any]) -> _Checked:
    path, size, mtime, entry, reason = row
    if not (isinstance(path, str) and isinstance(size, int) and isinstance(mtime, int) and isinstance(reason, str)):
        raise TypeError(f"not a row of a manifest: {row!r}")
    return _Checked(path, size, mtime, None if entry is None else _to_entry(path, mtime, *entry), reason)


def _to_entry(
    path: str, mtime: int, size: int, width: int, height: int, image_format: str, dali_safe: bool
) -> ImageEntry:
    positive = all(isinstance(number, int) and number > 0 for number in (size, width, height))
    if not positive or image_format not in READABLE_FORMATS or not isinstance(dali_safe, bool):
        raise TypeError(f"not an entry of a manifest: {path!r}")
    return ImageEntry(path, size, width, height, image_format, dali_safe, mtime)
