"""Count the library's own launches and the bytes of their operands."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


class Traffic:
    """Launches within a `count_launches` block.

    Attributes:
        launches: kernels of the library that were launched.
        operand_bytes: of all their tensors: moved if each launch reads or writes each of its tensors once.
    """

    def __init__(self) -> None:
        self.launches = self.operand_bytes = 0


class _Counted:
    """Replaces a kernel; counts and calls it."""

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
    """Count within the block; kernels are the modules' attributes that end in `_kernel`."""
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
