"""Which files of a folder training may read, and why not the others.

Every candidate is decoded once, before training, because a damaged image must not end a run hours later. The
outcome is kept in the cache folder and used again for each file whose size and modification time still stand.
"""

import hashlib
import json
import os
import stat
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import PIL
from PIL import Image

from fastnst.data.dali_safe import check_whole, is_dali_safe
from fastnst.errors import DataError
from fastnst.images import (
    MIN_SIDE,
    TRAINING_FORMATS,
    UnusableImageError,
    check_size,
    decode,
    explain_os_error,
    load,
    open_image,
    orientation_of,
    printable,
    read_bytes,
)
from fastnst.storage import cache_folder, write_atomic

TRAINING_SUFFIXES = frozenset([".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp"])
OTHER_SUFFIXES = frozenset(
    [".gif", ".bmp", ".tif", ".tiff", ".heic", ".heif", ".avif", ".jp2", ".j2k", ".jxl", ".ppm", ".pgm", ".tga", ".psd"]
)
"""Images that training does not read: named as refused, unless their content is a JPEG, PNG or WebP after all. Files
with any further suffix are passed over."""

_CACHE_VERSION = 2
_CHUNK = 16


@dataclass(frozen=True, slots=True)
class Entry:
    """An image that training reads."""

    path: str
    """Relative to the folder; a name that is not UTF-8 holds surrogates, as `os.fsdecode` makes them."""
    size: int
    """Bytes."""
    width: int
    """Pixels of the upright image."""
    height: int
    format: str
    """`JPEG`, `PNG` or `WEBP`, by content."""
    plain: bool
    """Whether DALI decodes the file itself; the other images are decoded by Pillow for both loaders."""
    mtime: int
    """Modification time in ns; a file that has another one is checked again before it is used."""


@dataclass(frozen=True, slots=True)
class Rejection:
    """A file that was refused."""

    path: str
    """Relative to the folder."""
    reason: str
    """What is wrong with it, and what to do."""


@dataclass(frozen=True)
class Manifest:
    """What `build_manifest` found."""

    folder: Path
    images: list[Entry]
    """Sorted by the bytes of their path, so that the order does not depend on the file system or the locale."""
    rejected: list[Rejection]
    fingerprint: str
    """SHA-256 over path, size and dimensions of the accepted images: equal folders train alike."""
    passed_over: int = 0
    """Files without an image's suffix, and hidden ones."""


def build_manifest(
    folder: Path | str,
    *,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    cache: bool = True,
    min_side: int = MIN_SIDE,
    flat: bool = True,
) -> Manifest:
    """Check every image of a folder and its subfolders; links are followed, hidden files and folders are not entered.

    Args:
        folder: where the images are.
        workers: threads that decode; default: one for each core that this process may use.
        progress: receives the number of files done and of all files, again and again.
        cache: use, and write, the outcome of earlier checks.
        min_side: pixels that the short side must have.
        flat: take images of one colour, too. Training must not: where nothing varies, each instance norm multiplies
            the gradient by 1/√ε, and sixteen of them in a row are beyond fp32.

    Raises:
        DataError: the folder is missing, unreadable or empty, or not one of its images can be used.
    """
    folder = Path(folder)
    unreadable, candidates, passed_over = _walk(folder)
    if not candidates and not unreadable:
        raise DataError(
            f"{printable(folder)} holds no images, only {passed_over} other files; give a folder of JPEG, PNG or WebP"
        )
    cache_file = _cache_file(folder)
    rules = _Rules(min_side, flat)
    known = _read_cache(cache_file, rules) if cache else {}
    results: dict[str, _Checked] = {}
    pending: list[tuple[str, int, int]] = []
    for path, size, mtime in candidates:
        earlier = known.get(path)
        if earlier is not None and (earlier.size, earlier.mtime) == (size, mtime):
            results[path] = earlier
        else:
            pending.append((path, size, mtime))
    report = progress or (lambda _done, _total: None)
    report(len(results), len(candidates))
    try:
        for checked in _check_all(folder, pending, rules, workers or _cores()):
            results[checked.path] = checked
            report(len(results), len(candidates))
    finally:
        # Also when interrupted: the next start goes on from here.
        if cache and pending:
            _write_cache(cache_file, rules, results.values())
    ordered = [results[path] for path, _, _ in candidates]
    images = [checked.entry for checked in ordered if checked.entry is not None]
    rejected = [Rejection(checked.path, checked.reason) for checked in ordered if checked.entry is None]
    rejected = sorted([*rejected, *unreadable], key=lambda rejection: os.fsencode(rejection.path))
    if not images:
        first = rejected[0]
        raise DataError(
            f"not one of the {len(rejected)} images in {printable(folder)} can be used; "
            f"the first, {printable(first.path)}: {first.reason}"
        )
    return Manifest(folder, images, rejected, fingerprint_of(images), passed_over)


def write_rejections(manifest: Manifest, path: Path, more: Iterable[str] = ()) -> None:
    """Write one JSON object per refused file, `{"path": …, "reason": …}`, atomically; no lines if none was refused.

    Args:
        manifest: what the check found.
        path: the file.
        more: further lines, with their ends.

    Raises:
        DataError: the storage refuses.
    """
    rows = (
        json.dumps({"path": printable(rejection.path), "reason": rejection.reason}, ensure_ascii=False) + "\n"
        for rejection in manifest.rejected
    )
    write_atomic(path, "".join([*rows, *more]).encode())


def examine(path: str, data: bytes, *, mtime: int, min_side: int = 1, flat: bool = True) -> Entry:
    """Check one image, wholly.

    Args:
        path: relative to its folder; only put into the entry, like `mtime`.
        data: all bytes of its file.
        mtime: of the file, in ns.
        min_side: pixels that the short side must have.
        flat: take an image of one colour, too.

    Raises:
        UnusableImageError: it cannot serve.
    """
    image = open_image(data, formats=TRAINING_FORMATS)
    width, height = image.size
    check_size(width, height, min_side)
    check_whole(data, image)
    # Entropy decoding is what finds damage; the rest of JPEG's inverse transform, which scale 1/8 skips, finds none.
    image.draft("L", (1, 1))
    load(image)
    if not flat and _is_flat(image, data):
        raise UnusableImageError("all of it has one colour, which makes gradients overflow; remove it")
    orientation = orientation_of(image)
    if orientation >= 5:
        width, height = height, width
    plain = is_dali_safe(data, image, orientation)
    if not plain:
        decode(data, formats=TRAINING_FORMATS)
    image_format = "JPEG" if image.format in ("JPEG", "MPO") else str(image.format)
    return Entry(path, len(data), width, height, image_format, plain, mtime)


def fingerprint_of(images: Iterable[Entry]) -> str:
    """`Manifest.fingerprint` of these images."""
    digest = hashlib.sha256()
    for entry in images:
        digest.update(os.fsencode(entry.path) + f"\0{entry.size} {entry.width} {entry.height}\0".encode())
    return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class _Rules:
    """What a check asks for; see `build_manifest`."""

    min_side: int
    flat: bool


@dataclass(frozen=True, slots=True)
class _Checked:
    path: str
    size: int
    mtime: int
    entry: Entry | None
    reason: str = ""
    lasting: bool = True
    """Whether the outcome follows from the file's content alone."""


def _walk(folder: Path) -> tuple[list[Rejection], list[tuple[str, int, int]], int]:
    """Files that cannot be looked at; path, size and modification time in ns of the candidates, sorted; other files."""
    try:
        next(folder.iterdir(), None)
    except NotADirectoryError as error:
        raise DataError(f"{printable(folder)} is a file; give the folder that the images are in") from error
    except OSError as error:
        raise DataError(f"cannot read the folder {printable(folder)}: {explain_os_error(error)}") from error
    unreadable: list[Rejection] = []
    candidates: list[tuple[str, int, int]] = []
    suffixes = TRAINING_SUFFIXES | OTHER_SUFFIXES
    passed_over = 0
    visited: set[tuple[int, int]] = set()

    def refuse(error: OSError) -> None:
        unreadable.append(Rejection(os.path.relpath(error.filename, folder), explain_os_error(error)))

    for directory, subfolders, names in os.walk(folder, onerror=refuse, followlinks=True):
        status = Path(directory).stat()
        if (status.st_dev, status.st_ino) in visited:  # A link led back; its files have been seen.
            subfolders.clear()
            continue
        visited.add((status.st_dev, status.st_ino))
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in names:
            if name.startswith(".") or os.path.splitext(name)[1].lower() not in suffixes:  # noqa: PTH122
                passed_over += 1
                continue
            path = os.path.join(directory, name)  # noqa: PTH118
            try:
                file = os.stat(path)  # noqa: PTH116
            except OSError as error:
                refuse(error)
                continue
            relative = os.path.relpath(path, folder)
            if stat.S_ISREG(file.st_mode):
                candidates.append((relative, file.st_size, file.st_mtime_ns))
            else:
                unreadable.append(Rejection(relative, "it is not a regular file; remove it"))
    candidates.sort(key=lambda candidate: os.fsencode(candidate[0]))
    return unreadable, candidates, passed_over


def _check_all(folder: Path, pending: list[tuple[str, int, int]], rules: _Rules, workers: int) -> Iterator[_Checked]:
    """Threads, not processes: decoding and reading release the interpreter's lock, and nothing has to be started."""
    rest = iter(pending)
    running: deque[Future[list[_Checked]]] = deque()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="check")
    try:
        while True:
            while len(running) < 2 * workers and (chunk := list(islice(rest, _CHUNK))):
                running.append(pool.submit(lambda files: [_check(folder, *file, rules) for file in files], chunk))
            if not running:
                return
            yield from running.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _check(folder: Path, path: str, size: int, mtime: int, rules: _Rules) -> _Checked:
    try:
        data = read_bytes(os.path.join(folder, path))  # noqa: PTH118
    except UnusableImageError as error:
        return _Checked(path, size, mtime, None, str(error), lasting=False)
    try:
        return _Checked(path, size, mtime, examine(path, data, mtime=mtime, **asdict(rules)))
    except UnusableImageError as error:
        return _Checked(path, size, mtime, None, str(error))


def _is_flat(image: Image.Image, data: bytes) -> bool:
    """Whether all pixels have one colour; `image` is loaded, perhaps in a coarser version."""
    extrema: Any = image.getextrema()
    low, high = extrema if len(image.getbands()) == 1 else extrema[0]
    if low != high:
        return False
    return all(low == high for low, high in decode(data, formats=TRAINING_FORMATS).getextrema())  # type: ignore[misc]


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cache_file(folder: Path) -> Path:
    name = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:32]
    return cache_folder() / "manifests" / f"{name}.json"


def _cache_key(rules: _Rules) -> list[Any]:
    """What else decides the outcome of a check."""
    return [_CACHE_VERSION, PIL.__version__, rules.min_side, rules.flat]


def _read_cache(file: Path, rules: _Rules) -> dict[str, _Checked]:
    """Earlier outcomes by path; nothing if the file is absent, damaged or of another version."""
    try:
        content = json.loads(file.read_bytes())
        if content["key"] != _cache_key(rules):
            return {}
        return {row[0]: _from_row(row) for row in content["files"]}
    except (OSError, ValueError, TypeError, KeyError, IndexError, RecursionError):
        return {}


def _write_cache(file: Path, rules: _Rules, results: Iterable[_Checked]) -> None:
    # ASCII, because names that are not UTF-8 hold lone surrogates.
    content = json.dumps(
        {"key": _cache_key(rules), "files": [_to_row(checked) for checked in results if checked.lasting]}
    )
    try:
        write_atomic(file, content.encode("ascii"))
    except DataError:
        # A full or read-only home folder costs the next start some time, and this one nothing.
        return


def _to_row(checked: _Checked) -> list[Any]:
    entry = None if checked.entry is None else list(asdict(checked.entry).values())[1:-1]
    return [checked.path, checked.size, checked.mtime, entry, checked.reason]


def _from_row(row: list[Any]) -> _Checked:
    path, size, mtime, entry, reason = row
    if not (isinstance(path, str) and isinstance(size, int) and isinstance(mtime, int) and isinstance(reason, str)):
        raise TypeError(f"not a row of a manifest: {row!r}")
    return _Checked(path, size, mtime, None if entry is None else _to_entry(path, mtime, *entry), reason)


def _to_entry(path: str, mtime: int, size: int, width: int, height: int, image_format: str, plain: bool) -> Entry:
    whole = all(isinstance(number, int) and number > 0 for number in (size, width, height))
    if not whole or image_format not in TRAINING_FORMATS or not isinstance(plain, bool):
        raise TypeError(f"not an entry of a manifest: {path!r}")
    return Entry(path, size, width, height, image_format, plain, mtime)
