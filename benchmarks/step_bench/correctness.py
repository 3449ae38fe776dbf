"""Check a provider's loss, gradients and update before it is timed.

The reference is the baseline in float32, contiguous, without TF32. It agrees with float64
(`tests/benchmarks/test_end_to_end.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from step_bench.providers import Baseline, Provider, Task

# Relative errors, of the loss and of all gradients as one vector, that rounding explains. Measured at 64² and 128²
# pixels: fp32 2e-7 and 7e-4, bf16 2e-3 and 0.10; a wrong formula is far beyond.
TOLERANCES = {"fp32": (1e-4, 1e-2), "tf32": (2e-3, 0.1), "fp16": (2e-2, 0.3), "bf16": (2e-2, 0.3)}


class WrongResult(Exception):
    """A provider's result is wrong."""


@dataclass(frozen=True)
class Reference:
    """Loss and gradients of the first step."""

    loss: Tensor
    gradients: dict[str, Tensor]


def reference_step(task: Task, batch: Tensor) -> Reference:
    with _without_tf32():
        baseline = Baseline(task, "fp32", channels_last=False)
        loss = baseline(batch)
    return Reference(loss.double(), _gradients(baseline))


def check(
    provider: Provider, task: Task, reference: Reference, batch: Tensor, *, first: bool = False
) -> dict[str, float]:
    """Run a step from the initial weights and compare it with the reference; return the relative errors.

    Args:
        provider: its weights are one step further afterwards.
        task: has the initial weights.
        reference: of the same batch.
        batch: uint8 `[N, S, S, 3]`.
        first: whether this is the provider's first step, in which Adam moves by the learning rate.

    Raises:
        WrongResult: with the error and the tolerance.
    """
    parameters = provider.parameters()
    initial = {name: task.transform[name].to(parameter) for name, parameter in parameters.items()}
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(initial[name])
    loss = provider(batch).double()
    loss_error = float((loss - reference.loss).abs() / reference.loss.abs())
    found = _gradients(provider)
    if missing := reference.gradients.keys() ^ found.keys():
        raise WrongResult(f"has gradients of other parameters: {', '.join(sorted(missing)[:3])}")
    difference = sum((found[name] - wanted).square().sum() for name, wanted in reference.gradients.items())
    size = sum(wanted.square().sum() for wanted in reference.gradients.values())
    gradient_error = float((difference / size) ** 0.5)
    precision = provider.precision
    if precision == "fp32" and batch.is_cuda and torch.backends.cudnn.allow_tf32:
        precision = "tf32"
    for name, error, allowed in zip(
        ("loss", "gradient"), (loss_error, gradient_error), TOLERANCES[precision], strict=True
    ):
        if not error <= allowed:  # also for NaN
            raise WrongResult(f"the {name} errs by {error:.2g} of its size, allowed in {precision} {allowed:.2g}")
    if first and precision != "fp16":  # the fp16 scaler may skip the first steps
        rate = task.config.train.learning_rate
        moved = max(float((parameters[name] - initial[name]).detach().abs().max()) for name in initial)
        if not 0.9 * rate <= moved <= 1.1 * rate:
            raise WrongResult(f"Adam's first step moves a weight by {moved:.2g}, not by the learning rate {rate:.2g}")
    return {"loss_error": loss_error, "gradient_error": gradient_error}


def _gradients(provider: Provider) -> dict[str, Tensor]:
    parameters = provider.parameters().items()
    return {name: parameter.grad.double() for name, parameter in parameters if parameter.grad is not None}


@contextmanager
def _without_tf32() -> Iterator[None]:
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before
