"""What stands in for an image that fails during training, though the check had accepted it.

The rule: from the step in which an image cannot be read on, each of its places in the run takes the next image of
the manifest (after the last comes the first) that has not failed by that step, with the place's own crop and flip.

So what a batch holds follows from the run's order, the list of failures with their steps, and the files; not from the
loader, nor from how far it reads ahead. The list itself depends on one thing only: when a file went bad.
"""

import dataclasses
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote_from_bytes, unquote_to_bytes

import numpy as np

from fastnst.data.crop import read_image
from fastnst.data.manifest import Entry, Manifest, fingerprint_of
from fastnst.errors import DataError
from fastnst.images import TRAINING_FORMATS, UnusableImageError, explain_os_error, printable

ALWAYS_ALLOWED = 3
"""Images that may fail in a folder of any size, unless none may: one percent of a small folder is no image."""
_NAMED = 3
_NEVER = -1


@dataclass(frozen=True, slots=True)
class ReadFailure:
    """An image that the check accepted and that could not be read later."""

    entry: Entry
    """As it was accepted: with it the manifest can be restored though the file is gone."""
    reason: str
    """What is wrong with it, and what to do."""
    step: int
    """The first step of the run, counted from 1, that does without it."""


class ImageReplacer:
    """Which images failed since the check, from which step on, and which take their places.

    Args:
        manifest: of the folder.
        max_percent: of the manifest's images that may fail (`data.max_failed_percent`); 0: none.
        earlier: failures that this run knows already.
        on_failure: told of each new one, at once, in the thread that iterates the loader; what it raises ends training.
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
        self._allowed = most_failures(len(manifest.images), max_percent)
        self._failed: dict[int, ReadFailure] = {}
        earlier = list(earlier)
        positions = {entry.path: index for index, entry in enumerate(manifest.images)} if earlier else {}
        for failure in earlier:
            if failure.entry.path in positions:
                self._failed[positions[failure.entry.path]] = failure
        if earlier:
            self._check_count()

    def indices(self, step: int, indices: np.ndarray) -> np.ndarray:
        """What to read in `step` (from 0, as loaders count) where the order says `indices`; both int64 `[B]`."""
        if not self._failed:
            return indices
        return np.array([self._stand_in(step, int(index)) for index in indices], dtype=np.int64)

    def fail(self, step: int, reasons: Sequence[tuple[int, str]]) -> None:
        """Note that in `step` (from 0) images could not be read: index and reason of each.

        Raises:
            DataError: more failed than may fail.
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

    def _stand_in(self, step: int, index: int) -> int:
        # Ends, because `_check_count` ends the run when the last image has failed.
        while self._has_failed(step, index):
            index = (index + 1) % len(self._manifest.images)
        return index

    def _check_count(self) -> None:
        failed, total = len(self._failed), len(self._manifest.images)
        if failed <= self._allowed:
            return
        first = list(self._failed.values())[:_NAMED]
        if not self._max_percent:
            path = os.path.join(self._manifest.folder, first[0].entry.path)  # noqa: PTH118
            raise DataError(f"cannot read {printable(path)}: {first[0].reason}")
        names = "; ".join(f"{printable(failure.entry.path)}: {failure.reason}" for failure in first)
        raise DataError(
            f"{failed} of {total} images in {printable(self._manifest.folder)} failed since they were checked; "
            f"data.max_failed_percent = {self._max_percent:g} allows {self._allowed}. The first: {names}. Restore them "
            "and go on with --resume, or allow more with --set data.max_failed_percent=PERCENT"
        )


def most_failures(images: int, max_percent: float) -> int:
    """How many of a folder's images may fail during a run: the percentage, but at least 3, and never all."""
    if not max_percent:
        return 0
    return min(max(ALWAYS_ALLOWED, int(images * max_percent / 100)), images - 1)


def with_failed(manifest: Manifest, failures: Iterable[ReadFailure]) -> Manifest:
    """The manifest of a folder as it was when the run began: images that failed since are put back into it.

    Positions in the manifest are what the order of a run consists of, so they must not shift when a file is gone.
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
    return dataclasses.replace(manifest, images=images, rejected=rejected, fingerprint=fingerprint_of(images))


def still_failed(folder: Path, failures: Iterable[ReadFailure], done: int) -> list[ReadFailure]:
    """Those failures that still hold when a run is resumed after `done` steps.

    What failed in a step that is done stays out, as it would have without the interruption. What failed in a step that
    is to be repeated is tried again if the file has come back.
    """
    return [failure for failure in failures if failure.step <= done or not _readable(folder, failure.entry)]


def late_row(failure: ReadFailure) -> str:
    """The line of `rejected.jsonl`; beside path and reason it holds what `read_failures` needs."""
    entry = failure.entry
    row = {
        "path": printable(entry.path),
        "reason": failure.reason,
        "step": failure.step,
        "checked": {
            # A name that is not UTF-8 cannot stand in JSON, and must come back exactly.
            "name": quote_from_bytes(os.fsencode(entry.path)),
            "size": entry.size,
            "width": entry.width,
            "height": entry.height,
            "format": entry.format,
            "plain": entry.plain,
        },
    }
    return json.dumps(row, ensure_ascii=False) + "\n"


def read_failures(path: Path) -> list[ReadFailure]:
    """The failures noted in a `rejected.jsonl`, in their order; of an image noted twice, the earlier step counts.

    A last line that was not finished, because the process was killed in the middle, does not count.

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
    """The same from the content of the file, which is that of `path`."""
    found: dict[str, ReadFailure] = {}
    for number, line in enumerate(content.split(b"\n")[:-1], start=1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise TypeError("not an object")
            failure = _from_row(row) if "step" in row else None
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise DataError(
                f"line {number} of {printable(path)} is damaged; remove that line to resume without what it says"
            ) from error
        if failure is not None:
            known = found.get(failure.entry.path)
            if known is None or failure.step < known.step:
                found[failure.entry.path] = failure
    return list(found.values())


def append_row(path: Path, row: str) -> None:
    """Add a line to a file, whole and durable.

    Raises:
        OSError: the storage refuses.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        data = row.encode()
        while data:
            data = data[os.write(descriptor, data) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _changed(entry: Entry, recorded: dict[str, Entry]) -> bool:
    """Whether an image is another now than the one that failed under its name."""
    then = recorded.get(entry.path)
    return then is not None and dataclasses.replace(entry, mtime=_NEVER) != then


def _readable(folder: Path, entry: Entry) -> bool:
    try:
        read_image(os.path.join(folder, entry.path), dataclasses.replace(entry, mtime=_NEVER))  # noqa: PTH118
    except UnusableImageError:
        return False
    return True


def _from_row(row: dict[str, Any]) -> ReadFailure:
    checked, reason = row["checked"], row["reason"]
    name = unquote_to_bytes(checked["name"])
    numbers = [checked["size"], checked["width"], checked["height"], row["step"]]
    if not all(type(number) is int and number > 0 for number in numbers):
        raise TypeError("sizes and steps are whole numbers above 0")
    if not isinstance(reason, str) or checked["format"] not in TRAINING_FORMATS or type(checked["plain"]) is not bool:
        raise TypeError("not an image that a check accepted")
    if not name or name.startswith(b"/") or b".." in name.split(b"/") or b"\0" in name:
        raise ValueError("not a path inside the folder")
    # No file has this time: whoever reads the image checks it again first.
    size, width, height, step = numbers
    entry = Entry(os.fsdecode(name), size, width, height, checked["format"], checked["plain"], _NEVER)
    return ReadFailure(entry, reason, step)
