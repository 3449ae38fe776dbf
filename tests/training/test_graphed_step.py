"""Captured steps give the bits of launched ones: on a CPU with a fake CUDA graph, on a GPU with a real one."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from test_divergence import GENTLE, NoValueIsRead
from torch import Tensor

from fastnst.config import TrainConfig, load_config
from fastnst.inference import stylize
from fastnst.losses.perceptual import LossTerms, PerceptualLoss
from fastnst.models.transform_net import TransformNet
from fastnst.models.vgg19 import VGG19
from fastnst.training.step import graphed_step
from fastnst.training.step.graphed_step import WARM_UP, GraphedStep
from fastnst.training.step.train_step import NetTrainer, train_step
from fastnst.training.train import train
from helpers.fake_cuda_graph import CpuStreams
from helpers.tiny_runs import SmallNet, leave_out_graph, newest, real_config

CPU = torch.device("cpu")
LAST = WARM_UP + 4


def new_trainer(
    precision: str = "fp32",
    *,
    norm: str | None = None,
    style: int = 0,
    device: torch.device = CPU,
    shared_vgg: NetTrainer | None = None,
) -> NetTrainer:
    """The same whenever it is called: a transform net where `norm` is given, else one convolution, with a small φ.

    `style` is the seed of the style image.
    """
    layers = () if norm else ('loss.content_layers=["relu2_1"]', 'loss.style_layers=["relu1_1", "relu2_1"]')
    assignments = [f"train.precision={precision}", "loss.style_layer_weights=[]", *GENTLE, *layers]
    config = load_config(preset="vgg-conv3", assignments=assignments, environment={})
    torch.manual_seed(1)
    net = TransformNet("johnson", norm) if norm else SmallNet("small", "instance")
    net.to(device=device, memory_format=torch.channels_last).train()
    depth = "relu3_4" if norm else "relu2_1"
    vgg = shared_vgg._loss.vgg if shared_vgg is not None else VGG19(depth, generator=torch.Generator().manual_seed(2))
    loss = PerceptualLoss(vgg, config.loss).to(device)
    loss.set_style(torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(3 + style)).to(device))
    return NetTrainer(net, loss, config.train, device, shared_vgg=shared_vgg)


def new_group(precision: str = "fp32", styles: int = 2) -> list[NetTrainer]:
    """Trainers of styles that share one VGG19."""
    first = new_trainer(precision)
    return [first, *(new_trainer(precision, style=style, shared_vgg=first) for style in range(1, styles))]


def new_batch(number: int, images: int = 1, device: torch.device = CPU) -> Tensor:
    draw = torch.Generator().manual_seed(100 + number)
    return torch.randint(0, 256, (images, 16, 16, 3), dtype=torch.uint8, generator=draw).to(device)


def seen(terms: LossTerms) -> dict[str, Tensor]:
    return {"total": terms.total, "content": terms.content, "style": terms.style, "tv": terms.tv, **terms.layers}


@dataclass
class Outcome:
    """What steps have left: all terms, read at the end, and all state."""

    terms: list[dict[str, Tensor]] = field(default_factory=list)
    state: dict[str, Any] = field(default_factory=dict)

    def of(self, *steps: NetTrainer) -> "Outcome":
        for index, step in enumerate(steps):
            tensors = {name: tensor.detach().clone() for name, tensor in step.state_tensors().items()}
            gradients = {f"gradient.{name}": p.grad.clone() for name, p in step.net.named_parameters()}
            self.state[f"{index}"] = tensors | gradients
            self.state[f"{index} in numbers"] = (step.state_values(), step.finite_check.first_nonfinite())
        return self


def assert_same(one: Outcome, other: Outcome) -> None:
    torch.testing.assert_close(one.terms, other.terms, rtol=0, atol=0, equal_nan=True)
    assert one.state.keys() == other.state.keys()
    for name, value in one.state.items():
        if name.endswith("in numbers"):
            assert value == other.state[name]
        else:
            torch.testing.assert_close(value, other.state[name], rtol=0, atol=0, equal_nan=True)


Before = Callable[[int, list[NetTrainer]], object]


def nothing(*_: object) -> None:
    pass


def launched(steps: list[NetTrainer], numbers: range, before: Before = nothing, batch: Any = new_batch) -> Outcome:
    outcome = Outcome()
    for number in numbers:
        before(number, steps)
        outcome.terms += map(seen, train_step(number, batch(number), steps))
    return outcome.of(*steps)


def capture_on_cpu(patches: pytest.MonkeyPatch, streams: CpuStreams) -> None:
    """Let steps on a CPU be captured."""
    patches.setattr(graphed_step, "CudaStreams", lambda _: streams)
    patches.setattr(graphed_step, "wants_capture", lambda *_: True)


class Maker:
    """A `GraphedStep` on a CPU's fake streams, and what it logged."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, **options: Any) -> None:
        caplog.set_level("INFO", "fastnst")
        self.streams = CpuStreams(**options)
        self._caplog = caplog
        with monkeypatch.context() as patches:
            capture_on_cpu(patches, self.streams)
            self.graphed_step = GraphedStep(TrainConfig(), CPU)

    @property
    def logged(self) -> list[str]:
        return self._caplog.messages

    def make(
        self, steps: list[NetTrainer], numbers: range, before: Before = nothing, batch: Any = new_batch
    ) -> Outcome:
        outcome = Outcome()
        batches = (batch(number) for number in numbers)
        for number in numbers:
            before(number, steps)
            outcome.terms += map(seen, self.graphed_step(number, self.graphed_step.fetch(batches), steps))
        return outcome.of(*steps)

    @property
    def replays(self) -> list[int]:
        return [graph.replays for graph in self.streams.graphs]


@pytest.fixture
def maker(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Maker:
    return Maker(monkeypatch, caplog)


# When.


@pytest.mark.parametrize(
    ("device", "settings", "processes", "reason"),
    [
        ("cuda", {"capture": "off"}, 1, None),
        ("cpu", {"engine": "autograd"}, 2, None),
        ("cuda", {}, 2, "2 processes share each step"),
        ("cuda", {"compile": True}, 1, "train.compile is set"),
        ("cuda", {"engine": "autograd"}, 1, "train.engine is 'autograd'"),
        ("cuda", {"deterministic": True}, 1, "train.deterministic is set"),
    ],
)
def test_graphed_step_says_why_a_cuda_run_is_not_captured(
    device: str, settings: dict[str, Any], processes: int, reason: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "fastnst")
    made = GraphedStep(TrainConfig(**settings), torch.device(device), processes=processes)
    assert made._streams is None
    said = [f"train.capture: steps are launched one operation at a time, since {reason}"]
    assert caplog.messages == (said if reason else [])


def test_graphed_step_captures_on_cuda(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "fastnst")
    monkeypatch.setattr(graphed_step, "CudaStreams", CpuStreams)
    assert GraphedStep(TrainConfig(), torch.device("cuda"))._streams is not None
    assert caplog.messages == []


# A replay is the step.


@pytest.mark.parametrize(
    ("precision", "norm"),
    [
        ("fp32", "instance"),
        ("fp32", "batch"),
        ("bf16", None),
        ("fp16", None),
        # A CPU without instructions for it takes long.
        pytest.param("bf16", "instance", marks=pytest.mark.campaign),
        pytest.param("fp16", "instance", marks=pytest.mark.campaign),
    ],
)
def test_graphed_step_equals_launched_steps(maker: Maker, precision: str, norm: str | None) -> None:
    numbers = range(1, LAST + 1)
    found = maker.make([new_trainer(precision, norm=norm)], numbers)
    assert_same(found, launched([new_trainer(precision, norm=norm)], numbers))
    assert (maker.streams.asides, maker.replays, maker.logged) == (WARM_UP, [4], [])


def test_graphed_step_captures_several_styles_in_one_graph(maker: Maker) -> None:
    numbers = range(1, LAST + 1)
    assert_same(maker.make(new_group(), numbers), launched(new_group(), numbers))
    assert maker.replays == [4]


def test_graphed_step_captures_anew_when_a_style_joins(maker: Maker) -> None:
    outcomes = []
    for make in (maker.make, launched):
        group = new_group()
        make(group[:1], range(1, LAST + 1))
        outcomes.append(make(group, range(LAST + 1, 2 * LAST + 1)))
    assert_same(*outcomes)
    assert maker.replays == [4, 4]


@pytest.mark.parametrize("odd", [(2,), (WARM_UP + 1,), (WARM_UP + 2, WARM_UP + 3), (LAST,)])
def test_graphed_step_launches_a_batch_of_another_shape_and_goes_on(maker: Maker, odd: tuple[int, ...]) -> None:
    def batch(number: int) -> Tensor:
        return new_batch(number, 3 if number in odd else 2)

    numbers = range(1, LAST + 1)
    assert_same(maker.make([new_trainer()], numbers, batch=batch), launched([new_trainer()], numbers, batch=batch))
    assert maker.streams.kept == len(odd)
    if odd[0] > WARM_UP + 1:
        assert maker.replays == [4 - len(odd)]
        assert maker.logged == [
            "train.capture: a batch of shape [3, 16, 16, 3] is trained without the graph, which takes [2, 16, 16, 3]"
        ]


def test_graphed_step_with_samples_in_between_changes_nothing(maker: Maker) -> None:
    samples: list[Tensor] = []

    def log_samples(_: int, steps: list[NetTrainer]) -> None:
        samples.append(stylize(steps[0].net, new_batch(0).permute(0, 3, 1, 2).float() / 255))

    outcomes = [make([new_trainer(norm="batch")], range(1, LAST + 1), log_samples) for make in (maker.make, launched)]
    assert_same(*outcomes)
    torch.testing.assert_close(samples[:LAST], samples[LAST:], rtol=0, atol=0)
    assert not torch.equal(samples[-1], samples[-2])


def test_graphed_step_with_projections_in_between_changes_nothing(
    photo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave_out_graph(monkeypatch)
    watched = ("visualize.images=1", 'visualize.transform_maps=["conv2:0"]', 'visualize.vgg_maps=["relu1_1:0"]')
    steps = (f"train.steps={WARM_UP + 2}", f"visualize.every={WARM_UP + 1}")
    config = real_config(photo_folder, *steps, *watched)
    train(config, tmp_path / "launched")
    streams = CpuStreams()
    capture_on_cpu(monkeypatch, streams)
    train(config, tmp_path / "captured")
    assert [graph.replays for graph in streams.graphs] == [2]
    one, other = (newest(tmp_path / name) for name in ("launched", "captured"))
    torch.testing.assert_close(one.tensors, other.tensors, rtol=0, atol=0)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_graphed_step_never_waits_for_the_device(maker: Maker, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    step = new_trainer(precision)
    with monkeypatch.context() as patches, NoValueIsRead():
        patches.setattr(Tensor, "tolist", lambda _: pytest.fail("values are read"))
        batches = iter([new_batch(number) for number in range(LAST)])
        for number in range(1, LAST + 1):
            maker.graphed_step(number, maker.graphed_step.fetch(batches), [step])
    assert maker.replays == [4]


# What is taken down.


def poison(step: int) -> Before:
    """Makes one weight NaN before `step`."""

    def poison(number: int, steps: list[NetTrainer]) -> None:
        if number == step:
            steps[0].net.get_parameter("conv1.weight").data[1, 2, 0, 1] = math.nan

    return poison


@pytest.mark.parametrize(("first", "bad"), [(1, 1), (1, WARM_UP + 1), (41, WARM_UP), (41, WARM_UP + 2), (41, LAST)])
def test_graphed_step_names_the_first_bad_step(maker: Maker, first: int, bad: int) -> None:
    numbers, bad_step = range(first, first + LAST), first + bad - 1
    found = maker.make([new_trainer()], numbers, poison(bad_step))
    assert_same(found, launched([new_trainer()], numbers, poison(bad_step)))
    step, names = found.state["0 in numbers"][1]
    assert step == bad_step
    assert "model.conv1.weight" in names


def test_graphed_step_names_the_bad_step_after_launched_ones(maker: Maker) -> None:
    def batch(number: int) -> Tensor:
        return new_batch(number, 2 if number == LAST - 1 else 1)

    found = maker.make([new_trainer()], range(1, LAST + 1), poison(LAST), batch)
    assert maker.replays == [3]
    assert found.state["0 in numbers"][1][0] == LAST


def test_graphed_step_counts_skipped_steps_in_replays(maker: Maker) -> None:
    outcomes = []
    for make in (maker.make, launched):
        step = new_trainer("fp16")
        # So large that even the first replays are skipped; each halves it.
        step.scaler.load_state_dict({**step.scaler.state_dict(), "scale": 2.0**50})
        outcomes.append(make([step], range(1, 41)))
    assert_same(*outcomes)
    numbers, bad = outcomes[0].state["0 in numbers"]
    assert bad is None
    assert WARM_UP + 1 < numbers["skipped_steps"] < 40
    assert numbers["skipped_in_a_row"] == 0
    assert numbers["scale"] == 2.0 ** (50 - numbers["skipped_steps"])


# What replaces tensors, and what fails.


@pytest.mark.parametrize(
    ("precision", "at"),
    [("fp32", 1), ("fp32", WARM_UP), ("fp32", WARM_UP + 1), ("fp16", WARM_UP + 2), ("fp32", LAST - 1)],
)
def test_graphed_step_goes_on_from_a_loaded_state(maker: Maker, precision: str, at: int) -> None:
    whole = launched([new_trainer(precision)], range(1, 2 * LAST))
    step = new_trainer(precision)
    begun = maker.make([step], range(1, at + 1))
    saved = {name: tensor.clone() for name, tensor in step.state_tensors().items()}, step.state_values()
    maker.make([step], range(at + 1, LAST + 1))  # what it comes to is thrown away
    step.load_state(*saved)
    found = maker.make([step], range(at + 1, 2 * LAST))
    found.terms[:0] = begun.terms
    assert_same(found, whole)
    assert len(maker.replays) == 2


@pytest.mark.parametrize(
    ("precision", "fails_at", "styles"),
    [
        ("fp32", "aten._to_copy", 1),
        ("fp32", "convolution_backward", 2),
        ("fp32", "_fused_adam_", 1),
        ("fp32", "_foreach_norm", 1),
        ("fp16", "_amp_foreach_non_finite_check_and_unscale_", 1),
        ("fp16", "_fused_adam_", 2),
        ("fp16", "_amp_update_scale_", 1),
    ],
)
def test_graphed_step_launches_steps_where_a_capture_fails(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, precision: str, fails_at: str, styles: int
) -> None:
    maker = Maker(monkeypatch, caplog, fails_at=fails_at)
    numbers = range(1, LAST + 1)
    found = maker.make(new_group(precision, styles), numbers)
    assert_same(found, launched(new_group(precision, styles), numbers))
    reason = f"since the capture failed (cannot capture {fails_at})"
    assert maker.logged == [f"train.capture: steps are launched one operation at a time, {reason}"]
    assert maker.replays == []


def test_graphed_step_capture_fails_where_a_value_is_read(maker: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    original = NetTrainer._record_findings
    monkeypatch.setattr(
        NetTrainer, "_record_findings", lambda *args, **more: (args[2].total.item(), original(*args, **more))
    )
    assert_same(maker.make([new_trainer()], range(1, LAST + 1)), launched([new_trainer()], range(1, LAST + 1)))
    assert "operation not permitted when stream is capturing: aten._local_scalar_dense" in maker.logged[0]
