"""Replace images that passed the check but cannot be read during training.

The rule: from the step in which an image cannot be read, the sampler's index is replaced by the next index (modulo the
number of images) that has not failed by that step; crop and flip stay.

So a batch depends on the sampler, the list of failures with their steps, and the files; not on the loader or on how
far it reads ahead. The list itself depends only on when a file became unreadable.
"""

import dataclasses
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastnst.data.crop import read_checked
from fastnst.data.manifest import ImageEntry, Manifest, compute_fingerprint, quote_path, unquote_path
from fastnst.errors import DataError
from fastnst.images import READABLE_FORMATS, UnusableImageError, explain_os_error, printable

REJECTED_NAME = "rejected.jsonl"
"""A run's list of images that were refused or failed later."""
ALWAYS_ALLOWED = 3
"""Failures allowed in a folder of any size unless `max_percent` is 0: 1 % of a small folder is less than one image."""
_MAX_NAMED = 3
_UNKNOWN_MTIME = -1


@dataclass(frozen=True, slots=True)
class ReadFailure:
    """An image that passed the check and could not be read later."""

    entry: ImageEntry
    """As checked; restores the manifest even if the file is gone."""
    reason: str
    """What is wrong with it, and what to do."""
    step: int
    """First step of the run, counted from 1, that replaces it."""


class ImageReplacer:
    """Records images that failed since the check, and replaces them from the step of their failure.

    Args:
        manifest: images of the run.
        max_percent: percentage of the images that may fail (`data.max_failed_percent`); 0: none.
        earlier: failures from before a resume.
        on_failure: called with each new failure, in the thread that iterates the loader; if it raises, training ends.
    """

    def __init__(
        self,
        manifest: Manifest,
        *,
        max_percent: float = 0.0,
        earlier: Iterable[ReadFailure] = (),
        on_failure: Callable[[ReadFailure], None] = lambda _: None,
    ) -> None:
        self._manifest, self._max_percent, self._on_failure = manifest, max_percent, on_failure
        self._allowed = max_failures(len(manifest.images), max_percent)
        index_of = {entry.path: index for index, entry in enumerate(manifest.images)}
        self._failed = {index_of[each.entry.path]: each for each in earlier if each.entry.path in index_of}
        self._check_count()

    def replace(self, step: int, indices: np.ndarray) -> np.ndarray:
        """Replace failed images among the sampler's indices, int64 `[B]`, of `step` (from 0)."""
        if not self._failed:
            return indices
        return np.array([self._replacement(step, int(index)) for index in indices], dtype=np.int64)

    def fail(self, step: int, reasons: Sequence[tuple[int, str]]) -> None:
        """Record the index and reason of images that could not be read in `step` (from 0).

        Raises:
            DataError: more images failed than allowed.
        """
        for index, reason in dict(reversed(reasons)).items():
            if self._has_failed(step, index):
                continue
            failure = ReadFailure(self._manifest.images[index], reason, step + 1)
            self._failed[index] = failure
            self._on_failure(failure)
        self._check_count()

    def _has_failed(self, step: int, index: int) -> bool:
        failure = self._failed.get(index)
        return failure is not None and failure.step <= step + 1

    def _replacement(self, step: int, index: int) -> int:
        # Terminates: `_check_count` raises before the last image fails.
        while self._has_failed(step, index):
            index = (index + 1) % len(self._manifest.images)
        return index

    def _check_count(self) -> None:
        failed, total = len(self._failed), len(self._manifest.images)
        if failed <= self._allowed:
            return
        first = list(self._failed.values())[:_MAX_NAMED]
        if not self._max_percent:
            path = os.path.join(self._manifest.folder, first[0].entry.path)  # noqa: PTH118
            raise DataError(f"cannot read {printable(path)}: {first[0].reason}")
        names = "; ".join(f"{printable(failure.entry.path)}: {failure.reason}" for failure in first)
        raise DataError(
            f"{failed} of {total} images in {printable(self._manifest.folder)} failed since they were checked; "
            f"data.max_failed_percent = {self._max_percent:g} allows {self._allowed}. The first: {names}. Restore them "
            "and go on with --resume, or allow more with --set data.max_failed_percent=PERCENT"
        )


def max_failures(images: int, max_percent: float) -> int:
    """Return how many images may fail during a run: the percentage, but at least 3 and never all."""
    if not max_percent:
        return 0
    return min(max(ALWAYS_ALLOWED, int(images * max_percent / 100)), images - 1)


def with_failed(manifest: Manifest, failures: Iterable[ReadFailure]) -> Manifest:
    """Restore the manifest as of the run's start, by putting back images that failed since.

    The sampler draws indices into the manifest, so they must not shift when a file is gone.
    """
    recorded = {failure.entry.path: failure.entry for failure in failures}
    if not recorded:
        return manifest
    images = [recorded.pop(entry.path) if _changed(entry, recorded) else entry for entry in manifest.images]
    present = {entry.path for entry in images}
    images += [entry for path, entry in recorded.items() if path not in present]
    images.sort(key=lambda entry: os.fsencode(entry.path))
    paths = {entry.path for entry in images}
    rejected = [rejection for rejection in manifest.rejected if rejection.path not in paths]
    return dataclasses.replace(manifest, images=images, rejected=rejected, fingerprint=compute_fingerprint(images))


def still_failed(folder: Path, failures: Iterable[ReadFailure], done: int) -> list[ReadFailure]:
    """Return the failures that remain in force when a run resumes after `done` steps.

    An image that failed in a completed step stays replaced, as in an uninterrupted run. One that failed in a step to be
    repeated is read again if its file is readable now.
    """
    return [failure for failure in failures if failure.step <= done or not _readable(folder, failure.entry)]


def failure_row(failure: ReadFailure) -> str:
    """Format a failure as a line of `rejected.jsonl`, with all that `read_failures` needs."""
    entry = failure.entry
    row = {
        "path": printable(entry.path),
        "reason": failure.reason,
        "step": failure.step,
        "checked": {
            "name": quote_path(entry.path),
            "size": entry.size,
            "width": entry.width,
            "height": entry.height,
            "format": entry.format,
            "plain": entry.dali_safe,
        },
    }
    return json.dumps(row, ensure_ascii=False) + "\n"


def read_failures(path: Path) -> list[ReadFailure]:
    """Read the failures in a `rejected.jsonl`, in order.

    An image listed twice counts from its earlier step. An incomplete last line, left by a killed process, is ignored.

    Raises:
        DataError: the file is damaged or cannot be read.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise DataError(f"cannot read {printable(path)}: {explain_os_error(error)}") from error
    return parse_failures(content, path)


def parse_failures(content: bytes, path: Path) -> list[ReadFailure]:
    """Parse the content of a `rejected.jsonl`; `path` is for error messages. See `read_failures`."""
    found: dict[str, ReadFailure] = {}
    for number, line in enumerate(content.split(b"\n")[:-1], start=1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise TypeError("not an object")
            failure = _from_row(row) if "step" in row else None
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise DataError(
                f"line {number} of {printable(path)} is damaged; remove that line to resume without it"
            ) from error
        if failure is not None:
            known = found.get(failure.entry.path)
            if known is None or failure.step < known.step:
                found[failure.entry.path] = failure
    return list(found.values())


def append_row(path: Path, row: str) -> None:
    """Append a line to a file and make it durable (fsync).

    Raises:
        OSError: the file cannot be written.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        data = row.encode()
        while data:
            data = data[os.write(descriptor, data) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _changed(entry: ImageEntry, recorded: dict[str, ImageEntry]) -> bool:
    """Whether an image differs now from the one that failed under its name."""
    then = recorded.get(entry.path)
    return then is not None and dataclasses.replace(entry, mtime=_UNKNOWN_MTIME) != then


def _readable(folder: Path, entry: ImageEntry) -> bool:
    try:
        read_checked(os.path.join(folder, entry.path), dataclasses.replace(entry, mtime=_UNKNOWN_MTIME))  # noqa: PTH118
    except UnusableImageError:
        return False
    return True


def _from_row(row: dict[str, Any]) -> ReadFailure:
    checked, reason = row["checked"], row["reason"]
    path = unquote_path(checked["name"])
    numbers = [checked["size"], checked["width"], checked["height"], row["step"]]
    if not all(type(number) is int and number > 0 for number in numbers):
        raise TypeError("sizes and steps must be positive integers")
    if not isinstance(reason, str) or checked["format"] not in READABLE_FORMATS or type(checked["plain"]) is not bool:
        raise TypeError("not an image that passed the check")
    # No file has this mtime, so reading the image checks it again.
    size, width, height, step = numbers
    entry = ImageEntry(path, size, width, height, checked["format"], checked["plain"], _UNKNOWN_MTIME)
    return ReadFailure(entry, reason, step)
