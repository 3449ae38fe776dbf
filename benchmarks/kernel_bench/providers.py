"""The implementations of an op. To add one, put it into `PROVIDERS`.

cuDNN's Python front end is not among them: it fuses none of these ops with its epilogue, its graphs cannot be built or
checked without a GPU, and eager batch norm in channels_last on CUDA is cuDNN's already.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kernel_bench.ops import Op

Function = Callable[..., Tensor]

FASTNST, EAGER, COMPILE, MAX_AUTOTUNE = "fastnst", "eager", "compile", "compile-max-autotune"
COPY = "copy"  # of the op's minimum bytes: no provider, but the ceiling, timed in the same rounds


@dataclass(frozen=True)
class Provider:
    """A name for the tables, the function that computes an op, and the ops that it suits."""

    name: str
    function: Callable[[Op], Function]
    suits: Callable[[Op], bool] = lambda _: True


def _compiled(op: Op, mode: str | None) -> Function:
    torch.compiler.reset()  # every shape starts fresh: no recompilation limit, no dynamic shapes
    return torch.compile(op.eager, mode=mode, dynamic=False, fullgraph=True)


PROVIDERS: dict[str, Provider] = {
    FASTNST: Provider(FASTNST, lambda op: op.fastnst),
    EAGER: Provider(EAGER, lambda op: op.eager),
    COMPILE: Provider(COMPILE, lambda op: _compiled(op, None)),
    # Without CUDA graphs: those would copy the inputs, and launch overhead is not in the time anyway.
    MAX_AUTOTUNE: Provider(
        MAX_AUTOTUNE, lambda op: _compiled(op, "max-autotune-no-cudagraphs"), lambda op: op.has_matrix_product
    ),
}
