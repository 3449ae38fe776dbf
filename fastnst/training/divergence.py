"""End a run that diverged or ran out of storage, and name the last good checkpoint.

Loss, gradients, weights and running statistics are checked in every step; a NaN or Inf stops the run and is never
checkpointed.
"""

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

import torch

from fastnst.config import TrainConfig
from fastnst.errors import DataError, DivergedError, shell_quote
from fastnst.storage import StorageError
from fastnst.training.distributed.process_group import ProcessGroup
from fastnst.training.run_dir.checkpoint import latest_checkpoint
from fastnst.training.run_dir.layout import CONFIG_NAME
from fastnst.training.step.train_step import NetTrainer


class DivergenceMonitor:
    """Stops a run whose numbers are not finite; all ranks check at the same steps."""

    def __init__(self, trainer: NetTrainer, config: TrainConfig, group: ProcessGroup, out: Path) -> None:
        self._trainer, self._config, self._group, self._out = trainer, config, group, out

    def check_steps(self, step: int) -> None:
        """Stop if any step so far went wrong on any rank.

        On a GPU this runs only when something is logged or saved, so it may be late by `train.log_every` steps. A
        series of skipped steps that begins and ends in between goes unnoticed there: training mended itself.

        Raises:
            DivergedError: a value was not finite, or too many steps in a row were skipped.
        """
        bad = self._trainer.finite_check.first_nonfinite()
        if found := self._group.all_gather_text(json.dumps(bad) if bad else ""):
            first_nonfinite, names = min(json.loads(each) for each in found if each)
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            self._raise(f"not finite since step {first_nonfinite}: {', '.join(names[:3])}{more}")
        if self._trainer.scaler.is_enabled():
            # The scaler sees gradients that are the same on all ranks.
            _, in_a_row = self._trainer.skipped_steps.read()
            limit = self._config.max_skipped_steps
            if in_a_row >= limit:
                self._raise(
                    f"the {in_a_row} steps up to step {step} were skipped, since their fp16 gradients were not finite "
                    f"at any loss scale down to {self._trainer.scaler.get_scale():.3g}; "
                    f"train.max_skipped_steps = {limit}"
                )

    def check_state(self, step: int) -> None:
        """Stop before anything that is not finite is shown or saved, even if no loss shows it yet.

        Raises:
            DivergedError: as `check_steps`, or a weight, a running statistic or a moment of Adam is not finite.
        """
        self.check_steps(step)
        for name, tensor in self._trainer.state_tensors().items():
            if not bool(torch.isfinite(tensor).all()):
                self._raise(f"{name} holds a value that is not finite after step {step}")

    def _raise(self, what: str) -> NoReturn:
        self._group.exit_unless()
        checkpoint = latest_checkpoint(self._out)
        kept = f"the last good checkpoint is {checkpoint.path}" if checkpoint else "no checkpoint was written before"
        precision = " or --precision fp32" if self._config.precision != "fp32" else ""
        raise DivergedError(
            f"training diverged: {what} (train.learning_rate = {self._config.learning_rate}); {kept}. "
            f"Start again with a lower learning rate or smaller loss weights{precision}"
        )


@contextlib.contextmanager
def explained_storage_errors(out: Path, runs: Sequence[Path]) -> Iterator[None]:
    """Add to a storage error which step is saved and how to go on.

    Args:
        out: what `--out` names.
        runs: the run directories: `out` itself, or those of several styles below it.

    Raises:
        StorageError: the same error with a longer message.
    """
    try:
        yield
    except StorageError as error:
        # The first error is the one to report, whatever the disk answers to this search.
        try:
            checkpoints = [latest_checkpoint(run) for run in runs]
        except (OSError, DataError):
            raise error from None
        steps = [checkpoint.step if checkpoint else 0 for checkpoint in checkpoints]
        of_all = " of all styles" if len(runs) > 1 else ""
        kept = f"step {min(steps)} is the last that is saved{of_all}" if min(steps) else f"no step is saved{of_all}"
        begun = any((run / CONFIG_NAME).is_file() for run in runs)
        how = f"go on with fastnst train --resume --out {shell_quote(out)}" if begun else "then start again"
        raise StorageError(f"{error}. Training stopped; {kept}; {how}") from error
