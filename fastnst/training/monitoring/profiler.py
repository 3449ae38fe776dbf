"""`fastnst train --profile N`: trace N training steps for Perfetto or TensorBoard."""

import contextlib
import logging
import warnings
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch.profiler import ProfilerActivity

from fastnst.errors import UserError
from fastnst.storage import make_folder, storage_error

log = logging.getLogger(__name__)

FOLDER_NAME = "profile"
WAIT_STEPS, WARM_UP_STEPS = 10, 3

_annotating = False


def record_span(name: str) -> AbstractContextManager[Any]:
    """Name a part of the step in the trace; does nothing in a run without a profile.

    On a GPU the span covers the host's work and the kernels launched from it. A replayed CUDA graph shows as one piece.
    """
    return torch.profiler.record_function(name) if _annotating else contextlib.nullcontext()


def check_steps(steps: int | None) -> None:
    """Raise UserError unless `steps` is None or at least 1."""
    if steps is not None and steps < 1:
        raise UserError(f"a profile of {steps} steps was asked for; give --profile 1 or more")


class StepProfile:
    """Traces some steps of a run; a context manager around the training loop, which calls `step` after each step.

    The first 10 steps are left out, since they choose algorithms and allocate memory; the next 3 warm the profiler up.
    A short run shortens the wait first, then the warm-up; one with fewer steps than `steps` is traced whole.

    Args:
        out: the run directory; the trace goes to `out/profile/steps_FIRST_to_LAST.pt.trace.json.gz`, the name that
            TensorBoard's plugin (torch-tb-profiler) looks for.
        steps: how many to trace, at least 1; None: none.
        done: steps that an earlier process made.
        last: number of the last step.
        device: where training runs.
    """

    def __init__(self, out: Path, steps: int | None, *, done: int, last: int, device: torch.device) -> None:
        self._profiler: torch.profiler.profile | None = None
        self._message = ""
        if steps is None:
            return
        assert steps >= 1, steps
        left = max(last - done, 1)
        active = min(steps, left)
        warm_up = min(WARM_UP_STEPS, left - active)
        wait = min(WAIT_STEPS, left - active - warm_up)
        self._out, self._asked = out, steps
        self._before = done + wait + warm_up
        self._made = done
        self._message = (
            f"profile: no trace, since the run ended at or before step {self._before}, after which it would have begun"
        )
        activities = [ProfilerActivity.CPU]
        if device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Profiler won't be using warmup")
            schedule = torch.profiler.schedule(wait=wait, warmup=warm_up, active=active, repeat=1)
        self._profiler = torch.profiler.profile(
            activities=activities, schedule=schedule, on_trace_ready=self._write, record_shapes=True
        )

    def __enter__(self) -> Self:
        global _annotating
        if self._profiler is not None:
            _annotating = True
            self._profiler.__enter__()
        return self

    def step(self) -> None:
        """Tell the profiler that a training step has ended."""
        if self._profiler is not None:
            self._made += 1
            self._profiler.step()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _annotating
        if self._profiler is not None:
            _annotating = False
            self._profiler.__exit__(kind, error, trace)
            log.info("%s", self._message)

    def _write(self, profiler: torch.profiler.profile) -> None:
        if self._made == self._before:
            return  # the run ended in the first traced step, which is incomplete
        path = self._out / FOLDER_NAME / f"steps_{self._before + 1}_to_{self._made}.pt.trace.json.gz"
        # Written under another name first; a failure to write does not end training.
        partial = path.with_name(f".{path.name}")
        try:
            make_folder(path.parent)
            profiler.export_chrome_trace(str(partial))
            partial.replace(path)
        except OSError as error:
            self._message = f"profile: no trace: {storage_error(path, error)}"
            return
        finally:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
        count = self._made - self._before
        fewer = f" ({self._asked} were asked for)" if count < self._asked else ""
        self._message = (
            f"profile: a trace of {count} step{'s'[: count > 1]}{fewer} is in {path}; open it at "
            "https://ui.perfetto.dev, or in TensorBoard with its plugin torch-tb-profiler"
        )
