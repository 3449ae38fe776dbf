"""Count the bytes that kernels load and store in Triton's interpreter.

A lane that the mask switches off moves nothing, and none of the interpreter's accesses meets a cache, so the counts are
what a kernel asks for; the unique counts are what must come from memory at least once.
"""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch


class Traffic:
    """What the kernels moved within a `count_bytes` block.

    Attributes:
        launches: kernels launched.
        loaded: bytes loaded, as often as they were.
        stored: bytes stored, likewise.
    """

    def __init__(self) -> None:
        self.launches = self.loaded = self.stored = 0
        # By the size of the elements, the addresses of each access's active lanes.
        self._read: dict[int, list[np.ndarray]] = defaultdict(list)
        self._written: dict[int, list[np.ndarray]] = defaultdict(list)

    @property
    def total(self) -> int:
        return self.loaded + self.stored

    @property
    def unique_loaded(self) -> int:
        """Bytes loaded, each once however often it was."""
        return _unique(self._read)

    @property
    def unique_stored(self) -> int:
        """Bytes stored, likewise."""
        return _unique(self._written)

    def add(self, other: "Traffic") -> None:
        """Counts the loads and stores of `other`, too: of a process that ran a part of a launch."""
        self.loaded += other.loaded
        self.stored += other.stored
        for mine, theirs in ((self._read, other._read), (self._written, other._written)):
            for size, found in theirs.items():
                mine[size].extend(found)

    def loaded_within(self, tensor: torch.Tensor) -> int:
        """Of the bytes loaded, those in `tensor`'s memory."""
        start, end = tensor.data_ptr(), tensor.data_ptr() + tensor.untyped_storage().nbytes()
        return sum(
            size * int(((addresses >= start) & (addresses < end)).sum())
            for size, found in self._read.items()
            for addresses in found
        )

    def _load(self, pointers: Any, mask: Any) -> None:
        active, size = _active(pointers, mask)
        self.loaded += active.size * size
        self._read[size].append(active)

    def _store(self, pointers: Any, mask: Any) -> None:
        active, size = _active(pointers, mask)
        self.stored += active.size * size
        self._written[size].append(active)


def _active(pointers: Any, mask: Any) -> tuple[np.ndarray, int]:
    """Addresses of the lanes that `mask` leaves on, and the bytes at each."""
    addresses, on = np.broadcast_arrays(pointers.data, np.asarray(mask.data, dtype=bool))
    return addresses[on], max(1, pointers.get_element_ty().primitive_bitwidth // 8)


def _unique(accesses: dict[int, list[np.ndarray]]) -> int:
    return sum(size * np.unique(np.concatenate(found)).size for size, found in accesses.items())


@contextmanager
def count_bytes() -> Iterator[Traffic]:
    """Counts what the kernels in the block move; for the interpreter's tier only.

    Block-pointer and descriptor accesses are counted, too, as the interpreter carries them out with masked ones.
    """
    from triton.runtime import interpreter

    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store, launch = builder.create_masked_load, builder.create_masked_store, executor.__call__
    traffic = Traffic()

    def counted_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        traffic._load(pointers, mask)
        return load(self, pointers, mask, *rest)

    def counted_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        traffic._store(pointers, mask)
        return store(self, pointers, value, mask, *rest)

    def counted_launch(self: Any, *args: Any, **kwargs: Any) -> Any:
        traffic.launches += 1
        return launch(self, *args, **kwargs)

    with (
        mock.patch.object(builder, "create_masked_load", counted_load),
        mock.patch.object(builder, "create_masked_store", counted_store),
        mock.patch.object(executor, "__call__", counted_launch),
    ):
        yield traffic
