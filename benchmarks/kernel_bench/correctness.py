"""Check each provider's result and gradients against fp64, on the same inputs, before it is timed.

The truth is the PyTorch formulation in fp64 (fp32 if memory is short) on the inputs, rounded to their dtype. Two
rules, both of which NaN breaks:

    ‖a − t‖ / ‖t‖ ≤ NORM[dtype]         and for every element        |a − t| ≤ ELEMENT[dtype]·(|t| + rms(t))

They are wide enough for a few successive roundings to the dtype, as in eager PyTorch between ops, and far too narrow
for a wrong formula, a missed border or an unwritten element. Where x is so near a ReLU's kink that rounding decides on
the side, its gradient may be either value and is not compared; the gradients of weight and bias, sums over it, hardly
change. The tests of the kernels (`tests/kernels`) are stricter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernel_bench.ops import BACKWARD, Inputs, Op

NORM = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 2e-2}
ELEMENT = {torch.float32: 2e-3, torch.float16: 2e-2, torch.bfloat16: 8e-2}

_MEMORY_SHARE = 0.5  # of the free memory, for an fp64 computation of the truth
_COPIES = 8  # tensors of the larger of input and output that such a computation holds at once, about


class WrongResult(AssertionError):
    """A provider's result is not the truth."""


@dataclass(frozen=True)
class Truth:
    """Output, gradients and fixed tensors after one call, in high precision; where x is undecided."""

    output: Tensor
    gradients: dict[str, Tensor]
    fixed: dict[str, Tensor]
    undecided: Tensor | None


def truth_of(op: Op, inputs: Inputs, dy: Tensor, dtype: torch.dtype) -> Truth:
    """The results of `op` for `inputs` in `dtype` and the upstream gradient `dy`."""
    high = _precision(inputs, dy)
    leaves = {name: leaf.detach().to(high) for name, leaf in inputs.leaves.items()}
    fixed = {name: value.to(high) if value.is_floating_point() else value for name, value in inputs.fixed.items()}
    fixed = {name: value.clone() for name, value in fixed.items()}
    epsilon = max(torch.finfo(dtype).eps, 2.0**-16)
    with torch.no_grad():
        undecided = op.undecided(Inputs(leaves, fixed), epsilon) if op.undecided else None
    if BACKWARD not in op.directions():
        with torch.no_grad():
            return Truth(op.eager(*leaves.values(), *fixed.values()), {}, fixed, undecided)
    wanted = [leaf.requires_grad_() for leaf in leaves.values()]
    output = op.eager(*wanted, *fixed.values())
    gradients = torch.autograd.grad(output, wanted, dy.to(output.dtype))
    return Truth(output.detach(), dict(zip(leaves, gradients, strict=True)), fixed, undecided)


def check(
    truth: Truth, dtype: torch.dtype, output: Tensor, gradients: dict[str, Tensor], fixed: dict[str, Tensor]
) -> None:
    """Compare all results of a provider with the truth.

    Raises:
        WrongResult: names the result, its error and the allowed one.
    """
    faults = list(_faults("the result", output, truth.output, None, dtype))
    for name, gradient in gradients.items():
        expected = truth.gradients[name]
        undecided = truth.undecided if truth.undecided is not None and expected.dim() == 4 else None
        faults += _faults(f"the gradient of {name}", gradient, expected, undecided, dtype)
    for name, value in fixed.items():
        if value.is_floating_point():
            faults += _faults(f"{name} after the call", value, truth.fixed[name], None, dtype)
    if faults:
        raise WrongResult("; ".join(faults))


def _faults(what: str, actual: Tensor, truth: Tensor, undecided: Tensor | None, dtype: torch.dtype) -> Iterator[str]:
    assert actual.shape == truth.shape  # the result's was checked, autograd checks the gradients'
    error = (actual.detach().to(truth.dtype) - truth).abs()
    if undecided is not None:
        error = error.masked_fill(undecided, 0.0)
    rms = truth.square().mean().sqrt()
    relative = (error.square().mean().sqrt() / rms).item()
    if not relative <= NORM[dtype]:
        yield f"{what} errs by {relative:.2e} of its norm, allowed {NORM[dtype]:.0e}"
    worst = (error / (truth.abs() + rms)).max().item()
    if not worst <= ELEMENT[dtype]:
        yield f"one element of {what} errs by {worst:.2e} of its size, allowed {ELEMENT[dtype]:.0e}"


def _precision(inputs: Inputs, dy: Tensor) -> torch.dtype:
    """fp64 if its temporaries fit into memory."""
    if dy.device.type != "cuda":
        return torch.float64
    elements = max(tensor.numel() for tensor in (*inputs.all(), dy))
    free, _ = torch.cuda.mem_get_info(dy.device)
    return torch.float64 if _COPIES * 8 * elements <= _MEMORY_SHARE * free else torch.float32


Function = Callable[..., Tensor]


def run(op: Op, function: Function, inputs: Inputs, dy: Tensor) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Output, gradients, and `dy` in the memory format of the output, as autograd would pass it.

    Raises:
        WrongResult: the output is not of `dy`'s shape.
    """
    names, leaves = list(inputs.leaves), list(inputs.leaves.values())
    output = function(*leaves, *inputs.fixed.values())
    if output.shape != dy.shape:
        raise WrongResult(f"the result has shape {tuple(output.shape)}, expected {tuple(dy.shape)}")
    own_dy = torch.empty_like(output.detach()).copy_(dy)
    if BACKWARD not in op.directions():
        return output.detach(), {}, own_dy
    gradients: Sequence[Tensor] = torch.autograd.grad(output, leaves, own_dy)
    return output.detach(), dict(zip(names, gradients, strict=True)), own_dy
