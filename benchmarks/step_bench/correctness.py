"""Whether a provider computes what it is timed for: loss, gradients and the update of a step, before anything is timed.

The measure is the plain formulation in float32, contiguous, without TF32. It agrees with float64 itself
(`tests/benchmarks/test_end_to_end.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from step_bench.providers import Plain, Provider, Task

# Of the loss, and of all gradients together as one vector: relative errors that rounding explains. Seen, at 64² and
# 128² pixels: fp32 2e-7 and 7e-4, bf16 2e-3 and 0.10; a wrong formula is far beyond.
TOLERANCES = {"fp32": (1e-4, 1e-2), "tf32": (2e-3, 0.1), "fp16": (2e-2, 0.3), "bf16": (2e-2, 0.3)}


class WrongResult(Exception):
    """A provider computes something else."""


@dataclass(frozen=True)
class Truth:
    """Loss and gradients of the first step."""

    loss: Tensor
    gradients: dict[str, Tensor]


def truth_of(task: Task, batch: Tensor) -> Truth:
    with _without_tf32():
        plain = Plain(task, "fp32", channels_last=False)
        loss = plain(batch)
    return Truth(loss.double(), _gradients(plain))


def check(provider: Provider, task: Task, truth: Truth, batch: Tensor, *, first: bool = False) -> dict[str, float]:
    """Make a step from the initial weights and compare it; returns the relative errors.

    Args:
        provider: after it, its weights are changed by one step.
        task: has the initial weights.
        truth: from the same batch.
        batch: uint8 `[N, S, S, 3]`.
        first: nobody has made a step yet, so that Adam moves by the learning rate.

    Raises:
        WrongResult: with what errs by how much, and what is allowed.
    """
    parameters = provider.parameters()
    initial = {name: task.transform[name].to(parameter) for name, parameter in parameters.items()}
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(initial[name])
    loss = provider(batch).double()
    loss_error = float((loss - truth.loss).abs() / truth.loss.abs())
    found = _gradients(provider)
    if missing := truth.gradients.keys() ^ found.keys():
        raise WrongResult(f"has gradients of other parameters: {', '.join(sorted(missing)[:3])}")
    difference = sum((found[name] - wanted).square().sum() for name, wanted in truth.gradients.items())
    size = sum(wanted.square().sum() for wanted in truth.gradients.values())
    gradient_error = float((difference / size) ** 0.5)
    precision = provider.precision
    if precision == "fp32" and batch.is_cuda and torch.backends.cudnn.allow_tf32:
        precision = "tf32"
    for what, error, allowed in zip(
        ("loss", "gradient"), (loss_error, gradient_error), TOLERANCES[precision], strict=True
    ):
        if not error <= allowed:  # NaN is no agreement
            raise WrongResult(f"the {what} errs by {error:.2g} of its size, allowed in {precision} {allowed:.2g}")
    if first and precision != "fp16":  # whose scaler may leave the first steps out
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
