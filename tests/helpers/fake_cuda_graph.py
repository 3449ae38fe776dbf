"""Stands for CUDA's streams and graphs on a CPU, with their rules.

`CpuStreams.capture` takes down PyTorch's operations below autograd, with the tensors and numbers that they are called
with, and a replay runs these operations again and nothing of the code that called them. As with a real graph

- a capture changes no tensor that was there before;
- an operation that reads a value back, or brings one from Python's memory, makes the capture fail;
- a number that Python passes is that of the capture for ever, and a tensor that Python puts in another's place is never
  seen;
- what was allocated in the capture is the graph's, holds nothing until the replay writes it, and is written again by
  each: it is filled with NaN before.

`QueuedStreams` runs nothing until it is asked to, and then in any order that waits and marks allow.
"""

import contextlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastnst.training.step.cuda_streams import CapturedGraph, CudaStreams, Result

aten = torch.ops.aten
# For these a GPU would have to finish, or to be fed from memory that it cannot reach.
FORBIDDEN = (aten._local_scalar_dense, aten.lift_fresh, aten.nonzero, aten.equal)
# They launch nothing; nor do the profiler's notes.
ALLOCATE_ONLY = (aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided)


def tensors_of(tree: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class Recorder(TorchDispatchMode):
    """Takes down what is called within, and undoes at its end what was written to memory from before."""

    def __init__(self, fails_at: str | None) -> None:
        super().__init__()
        self._fails_at = fails_at
        self.launches: list[tuple[Any, tuple[Any, ...], dict[str, Any], object]] = []
        self.own: dict[int, Tensor] = {}
        self.addresses: dict[int, tuple[Tensor, int]] = {}
        self._before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, op: Any, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        kwargs = kwargs or {}
        if op.overloadpacket in FORBIDDEN:
            raise RuntimeError(f"operation not permitted when stream is capturing: {op}\nand more")
        if self._fails_at is not None and self._fails_at in str(op):
            raise RuntimeError(f"cannot capture {self._fails_at}\nand more")
        for argument, value in [*zip(op._schema.arguments, args, strict=False), *self._named(op, kwargs)]:
            for tensor in tensors_of(value):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    self._save(tensor)
                if storage(tensor) not in self.own:
                    self.addresses[id(tensor)] = tensor, tensor.data_ptr()
        result = op(*args, **kwargs)
        given = {storage(tensor) for tensor in tensors_of((args, kwargs))}
        for tensor in tensors_of(result):
            if storage(tensor) not in given:
                self.own[storage(tensor)] = tensor
        if op.overloadpacket not in ALLOCATE_ONLY and op.namespace != "profiler":
            self.launches.append((op, args, kwargs, result))
        return result

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        for memory, before in self._before.values():
            memory.copy_(before)

    @staticmethod
    def _named(op: Any, kwargs: dict[str, Any]) -> list[tuple[Any, Any]]:
        return [(argument, kwargs[argument.name]) for argument in op._schema.arguments if argument.name in kwargs]

    def _save(self, tensor: Tensor) -> None:
        memory = tensor.untyped_storage()
        if memory.data_ptr() not in self.own and memory.data_ptr() not in self._before:
            self._before[memory.data_ptr()] = memory, memory.clone()


class CpuGraph(CapturedGraph):
    def __init__(self, recorded: Recorder) -> None:
        self._recorded: Recorder | None = recorded
        self.replays = 0

    @torch.no_grad()
    def replay(self) -> None:
        assert self._recorded is not None, "replayed though it was dropped"
        self.replays += 1
        self.poison()
        assert all(tensor.data_ptr() == address for tensor, address in self._recorded.addresses.values())
        for op, args, kwargs, result in self._recorded.launches:
            for old, new in zip(tensors_of(result), tensors_of(op(*args, **kwargs)), strict=True):
                if storage(old) != storage(new):
                    old.copy_(new)

    def poison(self) -> None:
        assert self._recorded is not None
        for tensor in self._recorded.own.values():
            tensor.fill_(torch.nan if tensor.is_floating_point() else 77)

    @torch.no_grad()
    def drop(self) -> None:
        self.poison()  # whoever still reads it finds out
        self._recorded = None


class CpuStreams(CudaStreams):
    """Stands for `CudaStreams`.

    Args:
        fails_at: name of an operation; a capture fails at it.
    """

    def __init__(self, _device: object = None, *, fails_at: str | None = None) -> None:
        self._fails_at = fails_at
        self.graphs: list[CpuGraph] = []
        self.kept = self.asides = 0

    def feeding(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def mark(self) -> None:
        pass

    def wait(self, mark: object) -> None:
        pass

    def copy(self, target: Tensor, source: Tensor) -> None:
        target.copy_(source)

    def keep(self, _: Tensor) -> None:
        self.kept += 1

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        self.asides += 1
        yield

    def capture(self, work: Callable[[], Result]) -> tuple[CapturedGraph, Result]:
        with Recorder(self._fails_at) as recorded:
            result = work()
        self.graphs.append(CpuGraph(recorded))
        with torch.no_grad():
            self.graphs[-1].poison()
        return self.graphs[-1], result


@dataclass
class _Queue:
    waiting: list[tuple[str, Any]] = field(default_factory=list)
    """In order: ("run", function), ("mark", object), ("wait", object)."""


class QueuedStreams(CpuStreams):
    """Two streams whose work runs when `run_all` says so, in a random one of the orders that are allowed.

    Args:
        draw: chooses the order.
    """

    def __init__(self, draw: random.Random) -> None:
        super().__init__()
        self._draw = draw
        self._main, self._fed = _Queue(), _Queue()
        self._current = self._main
        self._passed: set[int] = set()
        self._marks: list[object] = []
        self.order: list[str] = []

    @contextlib.contextmanager
    def feeding(self) -> Iterator[Self]:
        self._current = self._fed
        try:
            yield self
        finally:
            self._current = self._main

    def queue(self, act: Callable[[], object]) -> None:
        self._current.waiting.append(("run", act))

    def mark(self) -> Any:
        self._marks.append(object())
        self._current.waiting.append(("mark", self._marks[-1]))
        return self._marks[-1]

    def wait(self, mark: Any) -> None:
        assert mark is not None
        self._current.waiting.append(("wait", mark))

    def copy(self, target: Tensor, source: Tensor) -> None:
        self.queue(lambda: target.copy_(source))

    def run_all(self) -> None:
        """The device catches up."""
        queues = {"main": self._main, "feed": self._fed}
        while any(queue.waiting for queue in queues.values()):
            ready = [
                name
                for name, queue in queues.items()
                if queue.waiting and not (queue.waiting[0][0] == "wait" and id(queue.waiting[0][1]) not in self._passed)
            ]
            assert ready, "each stream waits for the other"
            name = self._draw.choice(ready)
            kind, what = queues[name].waiting.pop(0)
            if kind == "mark":
                self._passed.add(id(what))
            elif kind == "run":
                self.order.append(name)
                what()
