"""Training steps as one CUDA graph: captured once, replayed from then on, so that a step is one launch.

The first steps of a run are launched as they are, on a side stream, as PyTorch's recipe for graphs wants it: algorithms
are chosen in them, kernels compiled, Adam's moments and all counts made. They are steps of the run like any other.
Then one step of all styles is captured, which computes nothing, and replayed for each batch: networks, loss, backward,
gradient scaler, Adam, terms, health. Scaler and fused Adam decide on the device whether a step is skipped, so that fp16
is captured whole.

A graph repeats launches with the addresses and numbers that they had. Hence:

- Images are copied into a tensor of the graph's. Copies and replays are queued on one stream: a copy runs behind the
  replay that reads what it overwrites, and before its own.
- The step's number, which `FiniteCheck` takes down, is counted in the graph; the processor sets it where counts differ.
- The terms lie in one tensor that the next replay overwrites, so each step hands out a copy of it.
- Gradients are None when the capture begins, so that they lie in the graph's memory. Where a launched step has put
  others in their place, a replay puts them back.
- Whatever replaces a tensor that a step changes (`TrainingStep.loads`) ends the graph; another is captured.

Looks and launched steps in between allocate from PyTorch's ordinary memory. The graph's own is nobody else's.

Not run on a GPU yet; the tests capture and replay PyTorch's operations on a CPU by the same rules.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastnst.config import TrainConfig
from fastnst.losses.perceptual import LossTerms
from fastnst.training.monitoring.profiler import record_span
from fastnst.training.step.cuda_streams import CudaStreams, Graph, Streams
from fastnst.training.step.train_step import TrainingStep

WARM_UP = 3
"""Launched steps before a capture, as many as `torch.cuda.make_graphed_callables` makes."""


def capture_unsupported_reason(config: TrainConfig, device: torch.device, *, processes: int = 1) -> str | None:
    """Why a run's steps are launched and not captured; empty where nobody expects it, None where they are captured.

    Args:
        config: of the run.
        device: where it trains.
        processes: that share each step.
    """
    if device.type != "cuda" or config.capture == "off":
        return ""
    if processes > 1:
        return f"{processes} processes share each step"
    if config.compile:
        return "train.compile is set"
    if config.engine != "fused":
        return f"train.engine is {config.engine!r}"
    if config.deterministic:
        # A replay should have the bits of what it was captured from. Nobody has looked at them yet.
        return "train.deterministic is set"
    return None


class GraphedStep:
    """Makes the steps of a run, captured where `capture_unsupported_reason` sees none.

    Args:
        config: of the run.
        device: where it trains.
        processes: that share each step.
        notify: told in one line where steps are launched though a user may expect a graph.
    """

    def __init__(
        self, config: TrainConfig, device: torch.device, *, processes: int = 1, notify: Callable[[str], None]
    ) -> None:
        self._notify = notify
        self._streams: Streams | None = None
        self._feed: _Feed | None = None
        self._captured: _Captured | None = None
        self._kind: object = None
        self._warm = 0
        self._told_of_shape = False
        why = capture_unsupported_reason(config, device, processes=processes)
        if why is None:
            self._streams = CudaStreams(device)
            self._feed = _Feed(self._streams)
        elif why:
            self._tell(why)

    @property
    def captured(self) -> bool:
        """Whether steps are replayed now."""
        return self._captured is not None

    def fetch(self, batches: Iterator[Tensor]) -> Tensor:
        """The next batch: good for one step, which is the next call of this object."""
        return next(batches) if self._feed is None else self._feed.fetch(batches)

    def __call__(self, number: int, batch: Tensor, steps: Sequence[TrainingStep]) -> list[LossTerms]:
        """Train all of `steps` on a batch.

        Args:
            number: of the step, counted from 1.
            batch: uint8 `[N, H, W, 3]` on the device.
            steps: one per style, all beside the first.

        Returns:
            The detached terms of each, on the device; they stay as they are.
        """
        if self._streams is None:
            return make_steps(number, batch, steps)
        kind = tuple((step, step.loads) for step in steps)
        if kind != self._kind:
            self._forget()
            self._kind = kind
        if self._captured is None and self._warm < WARM_UP:
            self._warm += 1
            with self._streams.aside():
                return make_steps(number, batch, steps)
        if self._captured is None:
            self._captured = self._capture(self._streams, batch, steps)
        if self._captured is None or not self._captured.takes(batch):
            return make_steps(number, batch, steps)
        with record_span("captured step"):
            return self._captured.replay(number, batch)

    def _capture(self, streams: Streams, batch: Tensor, steps: Sequence[TrainingStep]) -> "_Captured | None":
        try:
            return _Captured(streams, batch, steps, self._tell_of_shape)
        except RuntimeError as error:
            # Nothing was computed: the step is still to be made, and the state is that of the one before.
            for step in steps:
                step.discard_step()
            self._streams = None
            # The end of a capture that has failed fails, too; what was first says why.
            reason = str(error.__context__ or error).strip().partition("\n")[0][:200]
            self._tell(f"the capture failed ({reason})")
            return None

    def _forget(self) -> None:
        if self._captured is not None:
            self._captured.drop()
        self._captured, self._warm = None, 0

    def _tell(self, why: str) -> None:
        self._notify(f"train.capture: steps are launched one operation at a time, since {why}")

    def _tell_of_shape(self, shape: list[int], own: list[int]) -> None:
        if not self._told_of_shape:
            self._told_of_shape = True
            self._notify(f"train.capture: a batch of shape {shape} is trained without the graph, which takes {own}")


def make_steps(number: int | Tensor, batch: Tensor, steps: Sequence[TrainingStep]) -> list[LossTerms]:
    """A step of each style, launched; arguments as of `Steps`, or of `TrainingStep`."""
    if len(steps) == 1:
        return [steps[0](number, batch)]
    content = steps[0].content_of(batch)
    return [step(number, batch, content) for step in steps]


class _Captured:
    """A graph of one step, and the tensors by which it is fed and read.

    Args:
        streams: on which it is captured.
        batch: of the shape and type that it will take.
        steps: have been made before.
        tell_of_shape: told of the shape of another batch, and of the graph's.

    Raises:
        RuntimeError: the capture failed.
    """

    def __init__(
        self,
        streams: Streams,
        batch: Tensor,
        steps: Sequence[TrainingStep],
        tell_of_shape: Callable[[list[int], list[int]], None],
    ) -> None:
        self._streams, self._tell_of_shape = streams, tell_of_shape
        self._images = torch.empty_like(batch)
        self._number = torch.zeros((), dtype=torch.int64, device=batch.device)
        self._made = 0
        """The number on the device, once all that is queued has run."""

        def work() -> tuple[Tensor, list[LossTerms]]:
            self._number.add_(1)
            terms = make_steps(self._number, self._images, steps)
            return torch.stack([value for each in terms for value in _values(each)]), terms

        for step in steps:
            step.optimizer.zero_grad(set_to_none=True)  # as the step does; now their memory can become the graph's
        self._graph: Graph
        self._graph, (self._packed, terms) = streams.capture(work)
        self._layers = [list(each.layers) for each in terms]
        parameters = [parameter for step in steps for parameter in step.net.parameters()]
        self._gradients = [(parameter, parameter.grad) for parameter in parameters if parameter.grad is not None]

    def takes(self, batch: Tensor) -> bool:
        """Whether a batch fits; tells if not."""
        own = self._images
        fits = (batch.shape, batch.dtype, batch.device) == (own.shape, own.dtype, own.device)
        if not fits:
            self._tell_of_shape(list(batch.shape), list(own.shape))
        return fits

    def replay(self, number: int, batch: Tensor) -> list[LossTerms]:
        """Make step `number`, all on the current stream."""
        self._streams.copy(self._images, batch)
        if number != self._made + 1:
            self._number.fill_(number - 1)
        self._made = number
        self._graph.replay()
        parameter, gradient = self._gradients[0]
        if parameter.grad is not gradient:  # a launched step has put its own there
            for parameter, gradient in self._gradients:
                parameter.grad = gradient
        values = iter(self._packed.clone().unbind())
        return [_terms(values, layers) for layers in self._layers]

    def drop(self) -> None:
        """Give back the graph's memory; the parameters have no gradients then."""
        for parameter, _ in self._gradients:
            parameter.grad = None
        self._graph.drop()


def _values(terms: LossTerms) -> list[Tensor]:
    return [terms.total, terms.content, terms.style, terms.tv, *terms.layers.values()]


def _terms(values: Iterator[Tensor], layers: Sequence[str]) -> LossTerms:
    """The terms whose `_values` come next."""
    total, content, style, tv = (next(values) for _ in range(4))
    return LossTerms(total, content, style, tv, {layer: next(values) for layer in layers})


@dataclass
class _Slot:
    images: Tensor
    free: Any = None
    """Behind the step that reads the images."""


class _Feed:
    """Brings batches to the current stream: a loader's transfers run while the step before does.

    The loader works on the feed's stream, and its batch is copied there into one of two slots, in turns. Nothing is
    read too early: the current stream waits for the mark behind the copy. Nothing is overwritten too early: before a
    copy the feed's stream waits for the mark behind the step that read the slot, which is the step before the last, so
    that the last may still be running. The loader's own tensor never leaves the feed's stream, in whose order its
    memory is used again. So however far the processor runs ahead, there are two slots, and one batch.
    """

    def __init__(self, streams: Streams) -> None:
        self._streams = streams
        self._slots: list[_Slot] = []
        self._lent: _Slot | None = None

    def fetch(self, batches: Iterator[Tensor]) -> Tensor:
        streams = self._streams
        if self._lent is not None:
            # All that reads it is queued by now.
            self._lent.free = streams.mark()
            self._lent = None
        with streams.feeding():
            batch = next(batches)
            slot = self._slot_for(batch)
            if slot is not None:
                if slot.free is not None:
                    streams.wait(slot.free)
                streams.copy(slot.images, batch)
            ready = streams.mark()
        streams.wait(ready)
        if slot is None:
            streams.keep(batch)
            return batch
        self._lent = slot
        return slot.images

    def _slot_for(self, batch: Tensor) -> _Slot | None:
        """The slot that was lent longer ago; None for a batch of another shape than the first."""
        if not self._slots:
            self._slots = [_Slot(torch.empty_like(batch)) for _ in range(2)]
        self._slots.reverse()
        own = self._slots[0].images
        return self._slots[0] if (batch.shape, batch.dtype) == (own.shape, own.dtype) else None
