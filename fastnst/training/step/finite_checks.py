"""Find NaN and Inf in training steps without waiting for the device.

Each step records its findings in tensors on the device. Reading a number from a GPU makes the processor wait for all
queued work, so nothing here reads one within a step; a late reading still names the step in which a value went bad.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


class FiniteCheck:
    """Keeps, for each named value, the first step in which it was not finite."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._names: tuple[str, ...] = ()
        self._first_bad_steps = torch.zeros(0, dtype=torch.int64, device=device)

    def record(self, step: int | Tensor, names: Sequence[str], bad: Tensor) -> None:
        """Record a step's findings.

        Args:
            step: counted from 1; 0-d int64 on the device where a CUDA graph counts.
            names: of the values, the same for each step.
            bad: bool `[len(names)]` on the device, whether each was not finite.
        """
        if not self._names:
            self._names = tuple(names)
            self._first_bad_steps = torch.zeros(len(names), dtype=torch.int64, device=self._device)
        assert len(names) == len(self._names)
        is_first = bad & (self._first_bad_steps == 0)
        self._first_bad_steps.copy_(torch.where(is_first, step, self._first_bad_steps))

    def first_nonfinite(self) -> tuple[int, list[str]] | None:
        """Return the first bad step and the names of its bad values, or None; waits for the device."""
        steps = self._first_bad_steps.tolist()
        first = min((step for step in steps if step), default=0)
        if not first:
            return None
        return first, [name for name, step in zip(self._names, steps, strict=True) if step == first]


class SkippedSteps:
    """Counts the steps that the fp16 gradient scaler skipped because gradients overflowed: in all, and in a row."""

    def __init__(self, device: torch.device) -> None:
        self._counts = torch.zeros(2, dtype=torch.int64, device=device)

    def record(self, skipped: Tensor) -> None:
        """Count one step; `skipped` is a 0-d bool on the device."""
        total, in_a_row = self._counts.unbind()
        # In place: a CUDA graph's replay writes to the address that it was captured with.
        self._counts.copy_(torch.stack([total + skipped, (in_a_row + 1) * skipped]))

    def read(self) -> tuple[int, int]:
        """Return the skipped steps in all, and the newest in a row; waits for the device."""
        total, in_a_row = self._counts.tolist()
        return total, in_a_row

    def restore(self, total: int, in_a_row: int) -> None:
        """Continue from what `read` returned."""
        self._counts.copy_(torch.tensor([total, in_a_row]))


def not_finite(tensors: Sequence[Tensor]) -> Tensor:
    """Return whether each tensor holds a NaN or an Inf, bool `[len(tensors)]`.

    One pass over the values in a few launches, whatever the number of tensors. The sum of magnitudes, unlike their
    maximum, is fast on a CPU, too; it overflows only where a tensor is about to (above 3e38 in fp32).
    """
    return ~torch.isfinite(torch.stack(torch._foreach_norm(list(tensors), 1)))
