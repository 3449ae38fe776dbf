"""The fake CUDA graph of the tests is as strict as CUDA; batches come in time; which CUDA calls are made."""

import contextlib
import random
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from fastnst.training.step import graphed_step
from fastnst.training.step.cuda_streams import CudaStreams
from fastnst.training.step.graphed_step import _Feed
from helpers.fake_cuda_graph import CpuStreams, QueuedStreams

# The graph of the tests is as strict as a real one.


def test_cpu_streams_replay_operations_and_not_code() -> None:
    streams = CpuStreams()
    kept, counted = torch.zeros(3), torch.zeros(())
    calls: list[int] = []

    def work() -> tuple[Tensor, Tensor]:
        calls.append(1)
        counted.add_(1)
        kept.add_(len(calls))
        return kept * 2, torch.where(kept > 0, len(calls), counted)

    work()
    graph, (doubled, number) = streams.capture(work)
    assert (kept.tolist(), counted.item()) == ([1, 1, 1], 1)
    assert doubled.isnan().all()
    for round_ in (1, 2):
        graph.replay()
        assert kept.tolist() == [1 + 2 * round_] * 3  # the number of calls in the capture, for ever
        assert doubled.tolist() == [2 + 4 * round_] * 3
        assert number.tolist() == [2] * 3
        assert counted.item() == 1 + round_
    assert len(calls) == 2
    graph.drop()
    assert doubled.isnan().all()


# Batches come in time.


def loader(streams: QueuedStreams, count: int) -> Iterator[Tensor]:
    """Batches in one and the same memory, as an allocator gives it again in a stream's order."""
    memory = torch.zeros(1, dtype=torch.int64)
    for number in range(1, count + 1):
        streams.queue(lambda number=number: memory.fill_(number))
        yield memory


def read_in_order(streams: QueuedStreams, feed: _Feed, catch_up: random.Random) -> list[int]:
    found: list[int] = []
    batches = loader(streams, 20)
    for _ in range(20):
        batch = feed.fetch(batches)
        streams.queue(lambda batch=batch: found.append(int(batch)))
        if catch_up.random() < 0.2:
            streams.run_all()
    streams.run_all()
    return found


def test_feed_gives_each_step_its_batch_in_any_order_of_the_streams() -> None:
    overlaps = 0
    for seed in range(100):
        streams = QueuedStreams(random.Random(seed))
        assert read_in_order(streams, _Feed(streams), random.Random(-seed)) == list(range(1, 21)), seed
        # Of each batch the feed makes two launches: to fetch and to copy. One that is copied before the last is read:
        order = streams.order
        overlaps += any(order[: i + 1].count("feed") // 2 - order[: i + 1].count("main") > 1 for i in range(len(order)))
    assert overlaps > 50


@pytest.mark.parametrize("forgotten", ["wait", "mark"])
def test_feed_without_a_wait_or_a_mark_is_found(forgotten: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = 0
    for seed in range(50):
        streams = QueuedStreams(random.Random(seed))
        feed = _Feed(streams)
        if forgotten == "wait":
            monkeypatch.setattr(streams, "wait", lambda _: None)
        else:
            monkeypatch.setattr(graphed_step._Slot, "free", property(lambda _: None, lambda *_: None))
        wrong += read_in_order(streams, feed, random.Random(-seed)) != list(range(1, 21))
        monkeypatch.undo()
    assert wrong > 25


# What is asked of CUDA.


class FakeStream:
    """Notes what waits for what."""

    def __init__(self, name: str, notes: list[str]) -> None:
        self.name, self._notes = name, notes

    def wait_stream(self, other: "FakeStream") -> None:
        self._notes.append(f"{self.name} waits for {other.name}")


class FakeCuda:
    """Stands for `torch.cuda` as far as `CudaStreams` goes; the end of a capture fails where `fails` is set, and, like
    PyTorch's, leaves its stream the current one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, fails: bool = False) -> None:
        self.notes: list[str] = []
        self.current = FakeStream("main", self.notes)
        self._names = iter(("side", "feed"))
        self._fails = fails
        for name in ("Stream", "CUDAGraph", "stream", "graph", "current_stream", "set_stream", "synchronize"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))

    def Stream(self, _: torch.device) -> FakeStream:  # noqa: N802
        return FakeStream(next(self._names), self.notes)

    def CUDAGraph(self) -> "FakeCuda":  # noqa: N802
        return self

    @contextlib.contextmanager
    def stream(self, stream: FakeStream) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before

    @contextlib.contextmanager
    def graph(self, graph: "FakeCuda", *, stream: FakeStream, capture_error_mode: str) -> Iterator[None]:
        assert graph is self
        before, self.current = self.current, stream
        self.notes.append(f"{stream.name} is captured, {capture_error_mode}")
        try:
            yield
        finally:
            if self._fails:
                raise RuntimeError("the end fails, too")
            self.current = before

    def current_stream(self, _: torch.device) -> FakeStream:
        return self.current

    def set_stream(self, stream: FakeStream) -> None:
        self.current = stream

    def synchronize(self, _: torch.device) -> None:
        self.notes.append("the processor waits")

    def replay(self) -> None:
        self.notes.append(f"replay on {self.current.name}")

    def reset(self) -> None:
        self.notes.append("reset")


def test_cuda_streams_capture_on_a_side_stream_that_waits_both_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(monkeypatch)
    streams = CudaStreams(torch.device("cuda", 0))
    with streams.aside():
        cuda.notes.append(f"steps on {cuda.current.name}")
    graph, result = streams.capture(lambda: cuda.current.name)
    graph.replay()
    graph.drop()
    assert result == "side"
    assert cuda.notes == [
        *("side waits for main", "steps on side", "main waits for side"),
        # Loaders' threads may allocate meanwhile.
        *("side is captured, thread_local", "replay on main", "the processor waits", "reset"),
    ]


def test_cuda_streams_restore_the_stream_after_a_failed_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(monkeypatch, fails=True)
    streams = CudaStreams(torch.device("cuda", 0))
    with pytest.raises(RuntimeError, match="the end fails, too") as raised:
        streams.capture(lambda: torch.zeros(2).view(3))
    assert "invalid for input of size" in str(raised.value.__context__)
    assert cuda.current.name == "main"
