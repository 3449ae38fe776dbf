"""`rejected.jsonl` of a run: which images were refused by the check, and which failed later."""

from collections.abc import Callable, Sequence
from pathlib import Path

from fastnst.data.manifest import Manifest, write_rejections
from fastnst.data.replacements import ReadFailure, append_row, failure_row
from fastnst.images import printable
from fastnst.storage import storage_error
from fastnst.training.run_dir.layout import REJECTED_NAME

MOST_MESSAGES = 10


class RejectedImages:
    """Writes a run's list of images that are not used, and tells the user of each that failed after the check.

    Args:
        run: the run directory.
        manifest: what the check found.
        late: images that are known to have failed later.
        notify: receives a line for each further one, up to ten; the list goes on.

    Raises:
        DataError: the storage refuses.
    """

    def __init__(
        self, run: Path, manifest: Manifest, late: Sequence[ReadFailure], notify: Callable[[str], None]
    ) -> None:
        self._path, self._notify, self._told = run / REJECTED_NAME, notify, 0
        write_rejections(manifest, self._path, more=map(failure_row, late))

    def add(self, failure: ReadFailure) -> None:
        """Note an image that failed, durably: a run that is resumed has to do without it from the same step on.

        Raises:
            DataError: the storage refuses.
        """
        try:
            append_row(self._path, failure_row(failure))
        except OSError as error:
            raise storage_error(self._path, error) from error
        self._told += 1
        if self._told <= MOST_MESSAGES:
            self._notify(
                f"{printable(failure.entry.path)} failed in step {failure.step}: {failure.reason}; the next image "
                f"stands in for it, see {REJECTED_NAME}"
            )
        if self._told == MOST_MESSAGES:
            self._notify(f"further images that fail are only listed in {REJECTED_NAME}")
