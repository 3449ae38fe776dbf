"""What stands for CUDA in the tests of captured steps is as strict as CUDA, and batches come in time."""

import random
from collections.abc import Iterator

import pytest
import torch
from graph_on_cpu import CpuStreams, QueuedStreams
from torch import Tensor

from fastnst.training import captured
from fastnst.training.captured import _Feed

# The graph of the tests is as strict as a real one.


def test_what_stands_for_a_graph_repeats_operations_and_not_code() -> None:
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


def test_each_step_reads_its_batch_in_whatever_order_the_streams_run() -> None:
    overlaps = 0
    for seed in range(200):
        streams = QueuedStreams(random.Random(seed))
        assert read_in_order(streams, _Feed(streams), random.Random(-seed)) == list(range(1, 21)), seed
        # Of each batch the feed makes two launches: to fetch and to copy. One that is copied before the last is read:
        order = streams.order
        overlaps += any(order[: i + 1].count("feed") // 2 - order[: i + 1].count("main") > 1 for i in range(len(order)))
    assert overlaps > 100


@pytest.mark.parametrize("forgotten", ["wait", "mark"])
def test_a_wait_or_a_mark_that_is_forgotten_would_be_found(forgotten: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = 0
    for seed in range(50):
        streams = QueuedStreams(random.Random(seed))
        feed = _Feed(streams)
        if forgotten == "wait":
            monkeypatch.setattr(streams, "wait", lambda _: None)
        else:
            monkeypatch.setattr(captured._Slot, "free", property(lambda _: None, lambda *_: None))
        wrong += read_in_order(streams, feed, random.Random(-seed)) != list(range(1, 21))
        monkeypatch.undo()
    assert wrong > 25
