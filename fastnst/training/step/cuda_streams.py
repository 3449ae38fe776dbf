"""The CUDA calls of graphed steps: streams, events and the graph.

Only these two classes touch CUDA, so that tests can replace them by a recorder on the CPU. Not run on a GPU yet.
"""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")


class CapturedGraph:
    """A captured CUDA graph."""

    def __init__(self, graph: torch.cuda.CUDAGraph, device: torch.device) -> None:
        self._graph, self._device = graph, device

    def replay(self) -> None:
        """Queue the graph on the current stream."""
        self._graph.replay()

    def drop(self) -> None:
        """Free the graph's memory; waits for the device, which may still be replaying it."""
        torch.cuda.synchronize(self._device)
        self._graph.reset()


class CudaStreams:
    """The current stream, on which training runs, a stream for captures and one that feeds batches.

    Args:
        device: cuda, with its index.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._side, self._feed = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def feeding(self) -> AbstractContextManager[Any]:
        """Queue work on the feed's stream within this block; only marks order it and the current stream."""
        return torch.cuda.stream(self._feed)

    def mark(self) -> Any:
        """Record an event in the current stream, for `wait`."""
        return torch.cuda.current_stream(self._device).record_event()

    def wait(self, mark: Any) -> None:
        """Let later work of the current stream run after all work before `mark`; the processor does not wait."""
        torch.cuda.current_stream(self._device).wait_event(mark)

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Queue a copy on the current stream."""
        target.copy_(source, non_blocking=True)

    def keep(self, tensor: Tensor) -> None:
        """Keep the memory of a tensor of the feed's stream until the current stream has used it."""
        tensor.record_stream(torch.cuda.current_stream(self._device))

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Queue work on the capture stream within this block: after all earlier work, before all later work."""
        current = torch.cuda.current_stream(self._device)
        self._side.wait_stream(current)
        with torch.cuda.stream(self._side):
            yield
        current.wait_stream(self._side)

    def capture(self, work: Callable[[], Result]) -> tuple[CapturedGraph, Result]:
        """Capture what `work` launches, without running it.

        Args:
            work: its allocations lie in the graph's private memory, which each replay overwrites.

        Returns:
            The graph, and the result of `work`; tensors in it are undefined before the first replay.

        Raises:
            RuntimeError: something in `work` cannot be captured, or there is no memory for it.
        """
        graph = torch.cuda.CUDAGraph()
        current = torch.cuda.current_stream(self._device)
        try:
            # On the stream of the warm-up steps, so that the graph uses the cuBLAS workspaces set up there.
            # thread_local: loaders may allocate in their own threads meanwhile.
            with torch.cuda.graph(graph, stream=self._side, capture_error_mode="thread_local"):
                result = work()
        except BaseException:
            # If ending a capture fails, `torch.cuda.graph` leaves its own stream current.
            torch.cuda.set_stream(current)
            raise
        return CapturedGraph(graph, self._device), result
