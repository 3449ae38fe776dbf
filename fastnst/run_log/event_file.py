"""TensorBoard event files, written synchronously.

PyTorch's `SummaryWriter` writes in a thread of its own: a full disk is reported one call later, or only as a traceback.
Here TensorBoard's own `RecordWriter` writes the records of PyTorch's summaries, and each is handed to the operating
system before the call returns.
"""

import contextlib
import itertools
import os
import socket
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    import numpy as np
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary


class EventFile:
    """A new `events.out.tfevents.*` file in a run directory.

    Args:
        run: the run directory.
        purge_step: TensorBoard drops what earlier files hold of this step and later ones; None: nothing.
        suffix: end of the file name.

    Raises:
        OSError: from any method: the storage refuses.
    """

    def __init__(self, run: Path, *, purge_step: int | None = None, suffix: str = "") -> None:
        # TensorBoard is slow to import, and only needed by programs that log.
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog, SourceMetadata
        from tensorboard.summary.writer.record_writer import RecordWriter

        with contextlib.ExitStack() as on_error:
            self._file = on_error.enter_context(_create(run, suffix))
            self._records = RecordWriter(self._file)
            self.add_event(Event(file_version="brain.Event:2", source_metadata=SourceMetadata(writer=__name__)))
            if purge_step is not None:
                self.add_event(Event(session_log=SessionLog(status=SessionLog.START)), purge_step)
            on_error.pop_all()

    def add_event(self, event: "Event", step: int = 0) -> None:
        """Write one record."""
        event.wall_time, event.step = time.time(), step
        self._records.write(event.SerializeToString())
        # The file is buffered and flushed here: without a buffer, a full disk would cut a record silently.
        self._records.flush()

    def add_summary(self, summary: "Summary", step: int = 0) -> None:
        """Write a summary, such as protos.py makes."""
        from tensorboard.compat.proto.event_pb2 import Event

        self.add_event(Event(summary=summary), step)

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        """Write one point of a chart."""
        self.add_summary(_summaries().scalar(tag, value), step)

    def add_histogram(self, tag: str, histogram: Mapping[str, Any], step: int) -> None:
        """Write a histogram: see `protos.histogram`."""
        self.add_summary(_summaries().histogram_raw(tag, **histogram), step)

    def add_image(self, tag: str, image: "np.ndarray", step: int) -> None:
        """Write an image, uint8 `[H, W, 3]`."""
        self.add_summary(_summaries().image(tag, image, dataformats="HWC"), step)

    def add_text(self, tag: str, text: str, step: int) -> None:
        """Write a Markdown text."""
        self.add_summary(_summaries().text(tag, text), step)

    def add_chart_layout(self, layout: Mapping[str, Mapping[str, Any]]) -> None:
        """Write the custom-scalars page: see `protos.chart_layout`."""
        self.add_summary(_summaries().custom_scalars(layout))

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _create(run: Path, suffix: str) -> BinaryIO:
    """Create a file under the name that TensorBoard looks for and sorts by: time, host, process, number."""
    stem = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}"
    for number in itertools.count():
        # Exclusively: an existing file is not overwritten, and a link is not followed.
        with contextlib.suppress(FileExistsError):
            return (run / f"{stem}.{number}{suffix}").open("xb")
    raise AssertionError


def _summaries() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        from torch.utils.tensorboard import summary
    return summary
