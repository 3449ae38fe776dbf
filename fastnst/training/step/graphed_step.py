"""Training steps as one CUDA graph: captured once, replayed from then on, so that a step is one launch.

The first steps of a run are launched one by one on a side stream, as PyTorch's recipe for CUDA graphs demands:
algorithms are chosen in them, kernels compiled, Adam's moments and all counters allocated. They count as steps of the
run. Then one step of all styles is captured, which computes nothing, and replayed for each batch: networks, loss,
backward, gradient scaler, Adam, loss terms, finite checks. Scaler and fused Adam decide on the device whether to skip a
step, so fp16 is captured whole.

A graph repeats launches with the addresses and numbers of its capture. Hence:

- Images are copied into a tensor of the graph. Copies and replays are queued on one stream: a copy runs after the
  replay that reads what it overwrites, and before its own.
- The step's number, which `FiniteCheck` records, is counted in the graph; the processor sets it where counts differ.
- The loss terms lie in one tensor that the next replay overwrites, so each step returns a copy of it.
- Gradients are None when the capture begins, so that they lie in the graph's memory. Where a launched step has put
  others in their place, a replay puts them back.
- Whatever replaces a tensor that a step changes (`NetTrainer.state_version`) ends the graph; another is captured.

Graph memory is private: samples and launched steps in between allocate from PyTorch's ordinary memory.

The tests capture and replay PyTorch's operations on a CPU by the same rules.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastnst.config import TrainConfig
from fastnst.losses.perceptual import LossTerms
from fastnst.training.monitoring.profiler import record_span
from fastnst.training.step.cuda_streams import CudaStreams
from fastnst.training.step.train_step import NetTrainer, train_step

log = logging.getLogger(__name__)

WARM_UP = 3
"""Launched steps before a capture, as many as `torch.cuda.make_graphed_callables` makes."""


def wants_capture(config: TrainConfig, device: torch.device) -> bool:
    """Return whether a user may expect CUDA graphs: on a GPU, unless `train.capture` is off."""
    return device.type == "cuda" and config.capture != "off"


def capture_unsupported_reason(config: TrainConfig, *, processes: int = 1) -> str | None:
    """Return why the steps of such a run cannot be captured; None if they can."""
    if processes > 1:
        return f"{processes} processes share each step"
    if config.compile:
        return "train.compile is set"
    if config.engine != "fused":
        return f"train.engine is {config.engine!r}"
    if config.deterministic:
        # A replay should have the bits of its capture, which is not verified yet.
        return "train.deterministic is set"
    return None


class GraphedStep:
    """`train_step`, captured as a CUDA graph where that is supported; otherwise it just calls `train_step`."""

    def __init__(self, config: TrainConfig, device: torch.device, *, processes: int = 1) -> None:
        self._streams: CudaStreams | None = None
        self._feed: _Feed | None = None
        self._captured: _Captured | None = None
        self._captured_state: object = None
        self._num_warm_up = 0
        self._has_logged_shape = False
        if not wants_capture(config, device):
            return
        if reason := capture_unsupported_reason(config, processes=processes):
            _log_launched(reason)
            return
        self._streams = CudaStreams(device)
        self._feed = _Feed(self._streams)

    @property
    def captured(self) -> bool:
        """Whether steps are replayed now."""
        return self._captured is not None

    def fetch(self, batches: Iterator[Tensor]) -> Tensor:
        """Return the next batch; it is valid for one step, the next call of this object."""
        return next(batches) if self._feed is None else self._feed.fetch(batches)

    def __call__(self, step: int, batch: Tensor, trainers: Sequence[NetTrainer]) -> list[LossTerms]:
        """Train each net on a batch; see `train_step`. Later steps do not change the returned terms."""
        if self._streams is None:
            return train_step(step, batch, trainers)
        state = tuple((trainer, trainer.state_version) for trainer in trainers)
        if state != self._captured_state:
            self._drop()
            self._captured_state = state
        if self._captured is None and self._num_warm_up < WARM_UP:
            self._num_warm_up += 1
            with self._streams.aside():
                return train_step(step, batch, trainers)
        if self._captured is None:
            self._captured = self._capture(self._streams, batch, trainers)
        if self._captured is None or not self._fits(self._captured, batch):
            return train_step(step, batch, trainers)
        with record_span("captured step"):
            return self._captured.replay(step, batch)

    def _capture(self, streams: CudaStreams, batch: Tensor, trainers: Sequence[NetTrainer]) -> "_Captured | None":
        try:
            return _Captured(streams, batch, trainers)
        except RuntimeError as error:
            # Nothing was computed: this step is still to be made, from the state after the last one.
            for trainer in trainers:
                trainer.discard_step()
            self._streams = None
            # Ending a failed capture fails, too; the first error says why.
            reason = str(error.__context__ or error).strip().partition("\n")[0][:200]
            _log_launched(f"the capture failed ({reason})")
            return None

    def _fits(self, captured: "_Captured", batch: Tensor) -> bool:
        own = captured.images
        fits = (batch.shape, batch.dtype, batch.device) == (own.shape, own.dtype, own.device)
        if not fits and not self._has_logged_shape:
            self._has_logged_shape = True
            log.info(
                "train.capture: a batch of shape %s is trained without the graph, which takes %s",
                list(batch.shape),
                list(own.shape),
            )
        return fits

    def _drop(self) -> None:
        if self._captured is not None:
            self._captured.drop()
        self._captured, self._num_warm_up = None, 0


def _log_launched(reason: str) -> None:
    log.info("train.capture: steps are launched one operation at a time, since %s", reason)


class _Captured:
    """A graph of one step for batches like `batch`, and the tensors by which it is fed and read.

    Raises:
        RuntimeError: the capture failed.
    """

    def __init__(self, streams: CudaStreams, batch: Tensor, trainers: Sequence[NetTrainer]) -> None:
        self._streams = streams
        self.images = torch.empty_like(batch)
        self._step = torch.zeros((), dtype=torch.int64, device=batch.device)
        self._last_step = 0
        """The step's number on the device, once all queued work has run."""

        def work() -> tuple[Tensor, list[LossTerms]]:
            self._step.add_(1)
            terms = train_step(self._step, self.images, trainers)
            return torch.stack([value for each in terms for value in _values(each)]), terms

        for trainer in trainers:
            trainer.optimizer.zero_grad(set_to_none=True)  # as the step does; now their memory can become the graph's
        self._graph, (self._packed, terms) = streams.capture(work)
        self._layers = [list(each.layers) for each in terms]
        parameters = [parameter for trainer in trainers for parameter in trainer.net.parameters()]
        self._gradients = [(parameter, parameter.grad) for parameter in parameters if parameter.grad is not None]

    def replay(self, step: int, batch: Tensor) -> list[LossTerms]:
        """Make step `step`, all on the current stream."""
        self._streams.copy(self.images, batch)
        if step != self._last_step + 1:
            self._step.fill_(step - 1)
        self._last_step = step
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
    """Rebuild the terms from their `_values`."""
    total, content, style, tv = (next(values) for _ in range(4))
    return LossTerms(total, content, style, tv, {layer: next(values) for layer in layers})


@dataclass
class _Slot:
    images: Tensor
    free: Any = None
    """Marks the end of the step that reads the images."""


class _Feed:
    """Brings batches to the current stream, so that a loader's transfers overlap with the previous step.

    The loader works on the feed's stream, where its batch is copied into one of two slots, in turns. Nothing is read
    too early: the current stream waits for the mark after the copy. Nothing is overwritten too early: before a copy the
    feed's stream waits for the mark after the step that read the slot. That is the step before the last one, so the
    last one may still be running. The loader's own tensor never leaves the feed's stream, whose order governs the reuse
    of its memory. However far the processor runs ahead, there are two slots and one batch.
    """

    def __init__(self, streams: CudaStreams) -> None:
        self._streams = streams
        self._slots: list[_Slot] = []
        self._lent: _Slot | None = None

    def fetch(self, batches: Iterator[Tensor]) -> Tensor:
        streams = self._streams
        if self._lent is not None:
            # All its readers are queued by now.
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
        """Return the slot that was lent longer ago; None for a batch of another shape than the first."""
        if not self._slots:
            self._slots = [_Slot(torch.empty_like(batch)) for _ in range(2)]
        self._slots.reverse()
        own = self._slots[0].images
        return self._slots[0] if (batch.shape, batch.dtype) == (own.shape, own.dtype) else None
