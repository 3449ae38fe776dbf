"""What went wrong in a training step, recorded on the device and read only when someone asks.

Reading a number from a GPU makes the processor wait until all that was asked of the GPU is done; nothing here does so
in a step. What is read late still names the step in which it happened.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


class FiniteCheck:
    """The first step, by name, whose value was not finite."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._names: tuple[str, ...] = ()
        self._first_bad_steps = torch.zeros(0, dtype=torch.int64, device=device)

    def record(self, step: int | Tensor, names: Sequence[str], bad: Tensor) -> None:
        """Take down a step's findings.

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
        """The first step with something that was not finite, and all that was not in it; waits for the device."""
        steps = self._first_bad_steps.tolist()
        first = min((step for step in steps if step), default=0)
        if not first:
            return None
        return first, [name for name, step in zip(self._names, steps, strict=True) if step == first]


class SkippedSteps:
    """Steps whose fp16 gradients overflowed, which the gradient scaler therefore left out: in all, and in a row."""

    def __init__(self, device: torch.device) -> None:
        self._counts = torch.zeros(2, dtype=torch.int64, device=device)

    def record(self, skipped: Tensor) -> None:
        """Count one step; `skipped` is a 0-d bool on the device."""
        total, in_a_row = self._counts.unbind()
        # In place: what a CUDA graph replays writes to where it wrote when it was captured.
        self._counts.copy_(torch.stack([total + skipped, (in_a_row + 1) * skipped]))

    def read(self) -> tuple[int, int]:
        """How many in all, and how many the newest steps make in a row; waits for the device."""
        total, in_a_row = self._counts.tolist()
        return total, in_a_row

    def restore(self, total: int, in_a_row: int) -> None:
        """Go on from what `read` gave."""
        self._counts.copy_(torch.tensor([total, in_a_row]))


def not_finite(tensors: Sequence[Tensor]) -> Tensor:
    """Whether each of some tensors holds a NaN or an infinity, bool `[len(tensors)]`.

    One pass over the values in a few launches, whatever the number of tensors. The sum of magnitudes, unlike their
    maximum, is fast on a CPU, too; it overflows only where a tensor is about to (above 3e38 in fp32).
    """
    return ~torch.isfinite(torch.stack(torch._foreach_norm(list(tensors), 1)))
