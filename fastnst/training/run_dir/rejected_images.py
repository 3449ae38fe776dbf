"""`rejected.jsonl` of a run: images refused by the check, and images that failed later."""

import logging
from collections.abc import Sequence
from pathlib import Path

from fastnst.data.manifest import Manifest, write_rejections
from fastnst.data.replacements import REJECTED_NAME, ReadFailure, append_row, failure_row
from fastnst.images import printable
from fastnst.storage import storage_error

log = logging.getLogger(__name__)

MAX_MESSAGES = 10


class RejectedImages:
    """Write a run's `rejected.jsonl`, and log the first ten images that fail during training.

    Args:
        run: the run directory.
        manifest: result of the check.
        late: known failures of earlier processes of this run.
        quiet: log nothing; another style of the run does.
    """

    def __init__(self, run: Path, manifest: Manifest, late: Sequence[ReadFailure], *, quiet: bool = False) -> None:
        self._path, self._messages_left = run / REJECTED_NAME, 0 if quiet else MAX_MESSAGES
        write_rejections(manifest, self._path, more=map(failure_row, late))

    def add(self, failure: ReadFailure) -> None:
        """Append a failed image durably: a resumed run must skip it from the same step on.

        Raises:
            DataError: writing failed.
        """
        try:
            append_row(self._path, failure_row(failure))
        except OSError as error:
            raise storage_error(self._path, error) from error
        if not self._messages_left:
            return
        self._messages_left -= 1
        path = printable(failure.entry.path)
        log.warning(
            "%s failed in step %d: %s; replaced by the next image, see %s",
            *(path, failure.step, failure.reason, REJECTED_NAME),
        )
        if not self._messages_left:
            log.warning("further images that fail are only listed in %s", REJECTED_NAME)
