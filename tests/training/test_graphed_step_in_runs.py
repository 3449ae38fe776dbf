"""Runs with captured steps leave the same logs, checkpoints and models as runs with launched ones.

On a CPU with a fake CUDA graph; the last tests are for a GPU.
"""

import copy
import functools
import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_graphed_step import Outcome, assert_same, launched, new_batch, new_trainer, seen

from fastnst.config import TrainConfig
from fastnst.data.sampler import Sampler
from fastnst.errors import DivergedError
from fastnst.training.step import graphed_step
from fastnst.training.step.graphed_step import WARM_UP, GraphedStep
from fastnst.training.step.train_step import NetTrainer
from helpers.fake_cuda_graph import CpuStreams
from helpers.run_comparison import assert_same_outcome
from helpers.tiny_runs import logged, make_small, newest, small_config, train_small
from helpers.tolerances import assert_as_exact_as_torch

LAST = WARM_UP + 4
SETTINGS = (f"train.steps={LAST}", "train.log_every=2", "train.samples=1", "train.keep_checkpoints=1")


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    make_small(monkeypatch)


class Made(list[CpuStreams]):
    """The streams of each run that was begun since."""

    @property
    def replays(self) -> list[int]:
        return [sum(graph.replays for graph in streams.graphs) for streams in self]


Capture = Callable[[], Made]


@pytest.fixture
def capture(monkeypatch: pytest.MonkeyPatch) -> Capture:
    """From now on, runs are captured."""

    def capture() -> Made:
        made = Made()

        def open_streams(_: torch.device) -> CpuStreams:
            made.append(CpuStreams())
            return made[-1]

        monkeypatch.setattr(graphed_step, "CudaStreams", open_streams)
        monkeypatch.setattr(graphed_step, "wants_capture", lambda config, _: config.capture != "off")
        return made

    return capture


def assert_same_end(run: Path, reference: Path) -> None:
    """Metrics of all steps and the newest checkpoint are equal; a run in parts has logged more samples."""
    assert logged(run) == logged(reference)
    torch.testing.assert_close(newest(run).tensors, newest(reference).tensors, rtol=0, atol=0)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_train_captured_leaves_what_launched_steps_leave(
    generated_photos: Path, tmp_path: Path, capture: Capture, precision: str
) -> None:
    config = small_config(generated_photos, *SETTINGS, f"train.precision={precision}")
    messages = [train_small(config, tmp_path / "launched")]
    made = capture()
    messages.append(train_small(config, tmp_path / "captured"))
    assert made.replays == [4]
    assert_same_outcome(tmp_path / "captured", tmp_path / "launched")
    assert [text.replace(str(tmp_path / "captured"), str(tmp_path / "launched")) for text in messages[1]] == messages[0]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_train_captured_resumes_after_each_step(
    generated_photos: Path, tmp_path: Path, capture: Capture, precision: str
) -> None:
    config = small_config(generated_photos, *SETTINGS, f"train.precision={precision}", "train.log_every=1")
    train_small(config, tmp_path / "launched")
    made = capture()
    stops = (1, WARM_UP, WARM_UP + 1, LAST - 1)
    for step in stops:
        parts = tmp_path / f"ended_at_{step}"
        first = config.model_copy(update={"train": config.train.model_copy(update={"steps": step})})
        train_small(first, parts)
        train_small(config, parts, resume=True)
        assert_same_end(parts, tmp_path / "launched")
    replays = [[max(0, step - WARM_UP), max(0, LAST - step - WARM_UP)] for step in stops]
    assert made.replays == [count for pair in replays for count in pair]


def test_train_captured_resumes_without_capture(generated_photos: Path, tmp_path: Path, capture: Capture) -> None:
    train_small(small_config(generated_photos, *SETTINGS, "train.log_every=1"), tmp_path / "launched")
    made = capture()
    parts = tmp_path / "parts"
    train_small(small_config(generated_photos, *SETTINGS, "train.log_every=1", "train.steps=5"), parts)
    train_small(small_config(generated_photos, *SETTINGS, "train.log_every=1", "train.capture=off"), parts, resume=True)
    assert made.replays == [2]
    assert_same_end(parts, tmp_path / "launched")


def test_train_captures_several_styles_together(generated_photos: Path, tmp_path: Path, capture: Capture) -> None:
    config = small_config(generated_photos, *SETTINGS)
    styles = {name: next(generated_photos.glob(f"{name}.*")) for name in ("image_00", "image_01")}
    train_small(config, tmp_path / "launched", styles=styles)
    made = capture()
    train_small(config, tmp_path / "captured", styles=styles)
    assert made.replays == [4]
    for name in styles:
        assert_same_outcome(tmp_path / "captured" / name, tmp_path / "launched" / name)


def test_train_captured_stops_at_nan_and_names_it(
    generated_photos: Path, tmp_path: Path, capture: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = GraphedStep.__call__

    def poisoned(steps: GraphedStep, number: int, batch: torch.Tensor, of: list[NetTrainer]) -> object:
        if number == LAST - 1:
            of[0].net.get_parameter("conv1.weight").data[0] = torch.nan
        return original(steps, number, batch, of)

    monkeypatch.setattr(GraphedStep, "__call__", poisoned)
    made = capture()
    with pytest.raises(DivergedError, match=rf"not finite since step {LAST - 1}: .*step_0000000{LAST - 3}"):
        train_small(small_config(generated_photos, *SETTINGS), tmp_path / "run")
    assert made.replays == [3]


def test_train_profile_shows_replays_as_one_piece(generated_photos: Path, tmp_path: Path, capture: Capture) -> None:
    made = capture()
    train_small(small_config(generated_photos, "train.steps=18"), tmp_path / "run", profile=3)
    assert made.replays == [15]
    (file,) = (tmp_path / "run").glob("profile/*")
    with gzip.open(file, "rt", encoding="utf-8") as text:
        names = [event.get("name", "") for event in json.load(text)["traceEvents"]]
    assert names.count("captured step") == 3
    assert names.count("data wait") == 3
    assert "backward" not in names


def test_train_captured_loads_on_the_feed_stream(
    generated_photos: Path, tmp_path: Path, capture: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where on a GPU its copies are queued beside the step; an image that fails takes the same way."""
    within: list[bool] = []
    feeding = [False]

    class Watched(CpuStreams):
        def feeding(self) -> "Watched":
            return self

        def __enter__(self) -> None:
            feeding[0] = True

        def __exit__(self, *_: object) -> None:
            feeding[0] = False

    original = Sampler.batch

    def watched(order: Sampler, *args: object, **options: object) -> object:
        within.append(feeding[0])
        return original(order, *args, **options)

    capture()
    monkeypatch.setattr(graphed_step, "CudaStreams", Watched)
    monkeypatch.setattr(Sampler, "batch", watched)
    train_small(small_config(generated_photos), tmp_path / "run")
    assert within
    assert all(within)


# On a GPU.

GPU = torch.device("cuda", 0)
exact_cudnn = functools.partial(torch.backends.cudnn.flags, enabled=True, benchmark=False, deterministic=True)


@pytest.fixture
def steps() -> GraphedStep:
    return GraphedStep(TrainConfig(), GPU)


def trainer_on_gpu(precision: str = "fp32") -> NetTrainer:
    return new_trainer(precision, norm="instance", device=GPU)


def batch_on_gpu(number: int, images: int = 1) -> torch.Tensor:
    return new_batch(number, images, GPU)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_graphed_step_on_cuda_equals_launched_steps(steps: GraphedStep, precision: str) -> None:
    """Bit for bit where cuDNN takes the same algorithms, as `exact_cudnn` makes it."""
    step = trainer_on_gpu(precision)
    terms = []
    batches = (batch_on_gpu(number) for number in range(1, LAST + 1))
    with exact_cudnn():
        for number in range(1, LAST + 1):
            terms.append(seen(steps(number, steps.fetch(batches), [step])[0]))
        expected = launched([trainer_on_gpu(precision)], range(1, LAST + 1), batch=batch_on_gpu)
    assert steps.captured
    assert_same(Outcome(terms).of(step), expected)


@pytest.mark.gpu
def test_graphed_step_on_cuda_is_as_exact_as_a_launched_step(steps: GraphedStep) -> None:
    one, other = (trainer_on_gpu() for _ in range(2))
    truth = new_trainer("fp32", norm="instance")
    for number in range(1, WARM_UP + 1):
        steps(number, batch_on_gpu(number), [one])
    for step in (other, truth):
        step.load_state({name: tensor.to(step.device) for name, tensor in one.state_tensors().items()}, {})
    steps(WARM_UP + 1, batch_on_gpu(0), [one])
    for step in (other, truth):
        step.train_step(WARM_UP + 1, new_batch(0, device=step.device))
    assert steps.captured
    for name, parameter in truth.net.named_parameters():
        found, peer = (step.net.get_parameter(name).grad for step in (one, other))
        # Sums over all places of an image, the largest of which has 256 of them, and as many channels.
        assert_as_exact_as_torch(found, peer, parameter.grad, conditioning=256.0, what=name)


@pytest.mark.gpu
def test_graphed_step_on_cuda_never_waits_and_names_a_fault(steps: GraphedStep) -> None:
    step = trainer_on_gpu()
    batches = iter([batch_on_gpu(number) for number in range(2 * LAST)])
    for number in range(1, LAST + 1):
        steps(number, steps.fetch(batches), [step])
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for number in range(LAST + 1, 2 * LAST):
            steps(number, steps.fetch(batches), [step])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert step.finite_check.first_nonfinite() is None
    step.net.get_parameter("conv1.weight").data[0] = torch.nan
    steps(2 * LAST, steps.fetch(batches), [step])
    bad = step.finite_check.first_nonfinite()
    assert bad is not None
    assert bad[0] == 2 * LAST


@pytest.mark.gpu
def test_graphed_step_on_cuda_takes_odd_batches_samples_and_loaded_states(steps: GraphedStep) -> None:
    step, plain = (trainer_on_gpu() for _ in range(2))
    with exact_cudnn():
        for number in range(1, 3 * LAST):
            batch = batch_on_gpu(number, 2 if number == LAST else 1)
            if number == 2 * LAST:
                saved = copy.deepcopy((step.state_tensors(), step.state_values()))
                step.load_state(*saved)
            steps(number, batch, [step])
            plain.train_step(number, batch)
            del batch
            with torch.no_grad():
                step.net(torch.rand(1, 3, 48, 48, device=GPU))
    assert steps.captured
    torch.testing.assert_close(step.state_tensors(), plain.state_tensors(), rtol=0, atol=0)


@pytest.mark.gpu
def test_graphed_step_on_cuda_goes_on_where_a_capture_fails(
    steps: GraphedStep, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "fastnst")
    step, plain = (trainer_on_gpu() for _ in range(2))
    original = NetTrainer._record_findings

    def reads(self: NetTrainer, *args: object, **options: object) -> None:
        args[1].total.item()  # type: ignore[attr-defined]
        original(self, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(NetTrainer, "_record_findings", reads)
    with exact_cudnn():
        for number in range(1, LAST + 1):
            steps(number, batch_on_gpu(number), [step])
            plain.train_step(number, batch_on_gpu(number))
    assert not steps.captured
    assert "the capture failed" in caplog.messages[0]
    torch.testing.assert_close(step.state_tensors(), plain.state_tensors(), rtol=0, atol=0)
