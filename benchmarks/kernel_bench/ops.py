"""An op: inputs, the library's call, a good PyTorch user's formulation, the minimum cost.

The PyTorch formulation has four uses: as the eager provider, as the input of torch.compile, in fp64 as the truth that
every provider is compared with, and as documentation of the op. It keeps channels_last wherever PyTorch's own ops do.

A call takes the leaves (tensors that want a gradient) and then the fixed tensors, in the order of `Inputs`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastnst_kernels.inspection.cost import Cost

Shape = tuple[int, int, int, int]
Size = tuple[int, int, int]  # C, H, W

FORWARD, BACKWARD, BOTH = "forward", "backward", "forward+backward"


@dataclass(frozen=True)
class Inputs:
    """Named tensors; `leaves` want gradients, `fixed` do not (a training batch norm moves some of them)."""

    leaves: Mapping[str, Tensor]
    fixed: Mapping[str, Tensor] = field(default_factory=dict)

    def all(self) -> tuple[Tensor, ...]:
        return (*self.leaves.values(), *self.fixed.values())


class Draw:
    """Seeded random tensors on one device, in one dtype and memory format."""

    def __init__(self, device: torch.device, dtype: torch.dtype, memory_format: torch.memory_format) -> None:
        self.device, self.dtype, self.memory_format = device, dtype, memory_format
        self._generator = torch.Generator(device).manual_seed(20160327)

    def images(self, shape: Shape, mean: float = 0.0, deviation: float = 1.0) -> Tensor:
        """`[N, C, H, W]`, normal."""
        values = self.vector(shape, mean, deviation).to(self.dtype)
        return values.contiguous(memory_format=self.memory_format)

    def vector(self, shape: tuple[int, ...], mean: float = 0.0, deviation: float = 1.0) -> Tensor:
        """Normal values in fp32."""
        return torch.randn(shape, generator=self._generator, device=self.device).mul_(deviation).add_(mean)


@dataclass(frozen=True)
class Op:
    """One op with one set of options.

    Attributes:
        name: in tables, and to select tests.
        sizes: C, H, W of the main input (for unpooling, of the output).
        small_sizes: likewise, to try the harness.
        inputs: draws them for a shape.
        fastnst: the library's call.
        eager: the PyTorch formulation.
        costs: the minimum cost per direction that exists.
        upstream: the gradient of the output, given the output and the shape; fp32.
        undecided: where x is so near a kink that rounding decides on its gradient, from fp64 inputs.
        has_matrix_product: whether torch.compile's max-autotune has something to choose.
    """

    name: str
    sizes: tuple[Size, ...]
    small_sizes: tuple[Size, ...]
    inputs: Callable[[Draw, Shape], Inputs]
    fastnst: Callable[..., Tensor]
    eager: Callable[..., Tensor]
    costs: Callable[[Shape, torch.dtype], dict[str, Cost]]
    upstream: Callable[[Draw, Tensor, Shape], Tensor]
    undecided: Callable[[Inputs, float], Tensor] | None = None
    has_matrix_product: bool = False

    def cost(self, shape: Shape, dtype: torch.dtype, direction: str) -> Cost:
        """The minimum cost of one direction; forward and backward together are the sum."""
        costs = self.costs(shape, dtype)
        return costs[FORWARD] + costs[BACKWARD] if direction == BOTH else costs[direction]

    def directions(self) -> tuple[str, ...]:
        present = tuple(self.costs((1, 16, 16, 16), torch.float32))
        return (*present, BOTH) if len(present) == 2 else present


def image_gradient(draw: Draw, y: Tensor, _: Shape) -> Tensor:
    """Neither centred nor independent of `y`: else the gradients of weight and bias would be rounding."""
    return draw.vector(tuple(y.shape), mean=0.5).add_(y, alpha=0.5)
