"""The few CUDA calls of captured steps, in one place: streams, events, a graph.

`captured` is written against `Streams`, so that its tests can put something in their place that runs on a CPU.
"""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")


class Graph(Protocol):
    """What was captured."""

    def replay(self) -> None:
        """Queue all of it on the current stream, with the memory that it was captured with."""

    def drop(self) -> None:
        """Give back its memory; waits for the device, which may still be replaying it."""


class Streams(Protocol):
    """The current stream, on which training runs, and two beside it."""

    def feeding(self) -> AbstractContextManager[Any]:
        """What is queued within runs beside the current stream; nothing but marks orders the two."""

    def mark(self) -> Any:
        """A place in the stream that is current now, for `wait`."""

    def wait(self, mark: Any) -> None:
        """What is queued from now on, on the stream that is current now, runs after all that was queued before `mark`.
        The processor does not wait."""

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Queue a copy, on the stream that is current now."""

    def keep(self, tensor: Tensor) -> None:
        """The memory of a tensor of the feed's stream is used on the current one, and is given to nobody before."""

    def aside(self) -> AbstractContextManager[None]:
        """What is queued within runs on the stream that graphs are captured on: after all that was queued before, and
        before all that is queued later."""

    def capture(self, work: Callable[[], Result]) -> tuple[Graph, Result]:
        """Take down what `work` launches, and run none of it.

        Args:
            work: what it allocates lies in memory of the graph's own, which the next replay writes to again.

        Returns:
            The graph, and what `work` has returned; tensors in it hold nothing before the first replay.

        Raises:
            RuntimeError: something in `work` cannot be captured, or there is no memory for it.
        """


class CudaStreams(Streams):
    """`Streams` of a GPU. Not run on one yet.

    Args:
        device: cuda, with its index.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._side, self._feed = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def feeding(self) -> AbstractContextManager[Any]:
        return torch.cuda.stream(self._feed)

    def mark(self) -> torch.cuda.Event:
        return torch.cuda.current_stream(self._device).record_event()

    def wait(self, mark: Any) -> None:
        torch.cuda.current_stream(self._device).wait_event(mark)

    def copy(self, target: Tensor, source: Tensor) -> None:
        target.copy_(source, non_blocking=True)

    def keep(self, tensor: Tensor) -> None:
        tensor.record_stream(torch.cuda.current_stream(self._device))

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        current = torch.cuda.current_stream(self._device)
        self._side.wait_stream(current)
        with torch.cuda.stream(self._side):
            yield
        current.wait_stream(self._side)

    def capture(self, work: Callable[[], Result]) -> tuple[Graph, Result]:
        graph = torch.cuda.CUDAGraph()
        current = torch.cuda.current_stream(self._device)
        try:
            # On the stream of the steps before: what cuBLAS set up for them there serves the graph, too. Loaders go on
            # in threads of their own, which may allocate while this thread captures.
            with torch.cuda.graph(graph, stream=self._side, capture_error_mode="thread_local"):
                result = work()
        except BaseException:
            # Where the end of a capture fails, `torch.cuda.graph` leaves its stream the current one.
            torch.cuda.set_stream(current)
            raise
        return _CudaGraph(graph, self._device), result


class _CudaGraph(Graph):
    def __init__(self, graph: torch.cuda.CUDAGraph, device: torch.device) -> None:
        self._graph, self._device = graph, device

    def replay(self) -> None:
        self._graph.replay()

    def drop(self) -> None:
        torch.cuda.synchronize(self._device)
        self._graph.reset()
