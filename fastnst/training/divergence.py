"""What ends a run that has gone wrong, and what of it is safe: values that are not finite, storage that refuses."""

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn

import torch

from fastnst.config import TrainConfig
from fastnst.errors import DataError, DivergedError
from fastnst.storage import StorageError
from fastnst.training.distributed.process_group import ProcessGroup
from fastnst.training.run_dir.checkpoint import latest_checkpoint
from fastnst.training.run_dir.layout import CONFIG_NAME
from fastnst.training.step.train_step import TrainingStep


class DivergenceMonitor:
    """Looks whether training is still sound; all processes of a run ask at the same steps.

    Args:
        step: what is watched.
        config: limits, and what the message names.
        group: the processes that share the run.
        out: the run directory.
        notify: told of checkpoints that are passed over in search of the last good one.
    """

    def __init__(
        self, step: TrainingStep, config: TrainConfig, group: ProcessGroup, out: Path, notify: Callable[[str], None]
    ) -> None:
        self._step, self._config, self._group, self._out, self._notify = step, config, group, out, notify

    def check_health(self, step: int) -> None:
        """Stop if a step went wrong. On a GPU asked only when something is logged or saved: late by `train.log_every`.

        So many skipped steps in a row that all were between two of these moments go unnoticed there: training mended
        itself.

        Raises:
            DivergedError: something was not finite in any process, or too many steps in a row were skipped.
        """
        found = self._group.all_gather_text(json.dumps(bad) if (bad := self._step.health.first_nonfinite()) else "")
        if found:
            first_nonfinite, names = min(json.loads(each) for each in found if each)
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            self._diverged(f"not finite since step {first_nonfinite}: {', '.join(names[:3])}{more}")
        if self._step.scaler.is_enabled():
            # The scaler sees gradients that are the same in all processes.
            _, in_a_row = self._step.skipped.read()
            limit = self._config.max_skipped_steps
            if in_a_row >= limit:
                self._diverged(
                    f"the {in_a_row} steps up to step {step} were skipped, since their fp16 gradients were not finite "
                    f"at any loss scale down to {self._step.scaler.get_scale():.3g}; train.max_skipped_steps = {limit}"
                )

    def check_weights(self, step: int) -> None:
        """Nothing that is not finite is shown or saved, even where the loss has not shown it yet.

        Raises:
            DivergedError: as `check_health`, or a weight, a statistic or a moment of Adam is not finite.
        """
        self.check_health(step)
        for name, tensor in self._step.state_tensors().items():
            if not bool(torch.isfinite(tensor).all()):
                self._diverged(f"{name} holds a value that is not finite after step {step}")

    def _diverged(self, what: str) -> NoReturn:
        self._group.exit_unless()
        checkpoint = latest_checkpoint(self._out)
        kept = f"the last good checkpoint is {checkpoint.path}" if checkpoint else "no checkpoint was written before"
        precision = " or --precision fp32" if self._config.precision != "fp32" else ""
        raise DivergedError(
            f"training diverged: {what} (train.learning_rate = {self._config.learning_rate}); {kept}. "
            f"Start again with a lower learning rate or smaller loss weights{precision}"
        )


@contextlib.contextmanager
def explained_storage_errors(out: Path, runs: Sequence[Path], notify: Callable[[str], None]) -> Iterator[None]:
    """Where the storage refuses, say how much of the run is safe.

    Args:
        out: what `--out` names.
        runs: the run directories: `out` itself, or of several styles those below it.
        notify: told of checkpoints that are passed over.

    Raises:
        StorageError: the same, with what is saved and how to go on.
    """
    try:
        yield
    except StorageError as error:
        # Whatever the disk says to this search, the first error is the one to tell.
        try:
            checkpoints = [latest_checkpoint(run) for run in runs]
        except (OSError, DataError):
            raise error from None
        steps = [checkpoint.step if checkpoint else 0 for checkpoint in checkpoints]
        of_all = " of all styles" if len(runs) > 1 else ""
        kept = f"step {min(steps)} is the last that is saved{of_all}" if min(steps) else f"no step is saved{of_all}"
        begun = any((run / CONFIG_NAME).is_file() for run in runs)
        how = f"go on with fastnst train --resume --out {out}" if begun else "then start again"
        raise StorageError(f"{error}. Training stopped; {kept}; {how}") from error
