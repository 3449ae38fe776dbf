"""What the library's own launches are given: how many there are, and how large their operands are together."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


class Traffic:
    """Launches within a `count_launches` block.

    Attributes:
        launches: how many kernels of the library were launched.
        operand_bytes: of all their tensors together: what they move if each reads or writes each of its tensors once.
    """

    def __init__(self) -> None:
        self.launches = self.operand_bytes = 0


class _Counted:
    """Stands where a kernel stood, and hands everything on to it."""

    def __init__(self, kernel: Any, traffic: Traffic) -> None:
        self._kernel, self._traffic = kernel, traffic

    def __getattr__(self, name: str) -> Any:
        return getattr(self._kernel, name)

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        def launch(*args: Any, **kwargs: Any) -> Any:
            self._traffic.launches += 1
            for value in (*args, *kwargs.values()):
                if isinstance(value, torch.Tensor):
                    self._traffic.operand_bytes += value.numel() * value.element_size()
            return self._kernel[grid](*args, **kwargs)

        return launch


@contextmanager
def count_launches() -> Iterator[Traffic]:
    """Counts within the block. Kernels are modules' attributes that end in `_kernel`; that is where it gets in."""
    traffic = Traffic()
    replaced = []
    modules = [module for name, module in sys.modules.items() if name.partition(".")[0] == "fastnst_kernels"]
    for module in modules:
        for name, kernel in list(vars(module).items()):
            if name.endswith("_kernel"):
                replaced.append((module, name, kernel))
                setattr(module, name, _Counted(kernel, traffic))
    try:
        yield traffic
    finally:
        for module, name, kernel in replaced:
            setattr(module, name, kernel)
