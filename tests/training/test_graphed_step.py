"""Captured steps are the launched ones: on a CPU by a graph that stands for CUDA's, on a GPU by CUDA's own."""

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
from fastnst.training.run_dir.checkpoint import latest_checkpoint
from fastnst.training.step import graphed_step
from fastnst.training.step.graphed_step import WARM_UP, GraphedStep, capture_unsupported_reason, make_steps
from fastnst.training.step.train_step import TrainingStep
from fastnst.training.trainer import train
from helpers.fake_cuda_graph import CpuStreams
from helpers.tiny_runs import SmallNet

CPU = torch.device("cpu")
LAST = WARM_UP + 4


def new_step(
    precision: str = "fp32",
    *,
    norm: str | None = None,
    style: int = 0,
    device: torch.device = CPU,
    beside: TrainingStep | None = None,
) -> TrainingStep:
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
    vgg = beside._loss.vgg if beside is not None else VGG19(depth, generator=torch.Generator().manual_seed(2))
    loss = PerceptualLoss(vgg, config.loss).to(device)
    loss.set_style(torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(3 + style)).to(device))
    return TrainingStep(net, loss, config.train, device, beside=beside)


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

    def of(self, *steps: TrainingStep) -> "Outcome":
        for index, step in enumerate(steps):
            tensors = {name: tensor.detach().clone() for name, tensor in step.state_tensors().items()}
            gradients = {f"gradient.{name}": p.grad.clone() for name, p in step.net.named_parameters()}
            self.state[f"{index}"] = tensors | gradients
            self.state[f"{index} in numbers"] = (step.state_values(), step.health.first_nonfinite())
        return self


def assert_same(one: Outcome, other: Outcome) -> None:
    torch.testing.assert_close(one.terms, other.terms, rtol=0, atol=0, equal_nan=True)
    assert one.state.keys() == other.state.keys()
    for name, value in one.state.items():
        if name.endswith("in numbers"):
            assert value == other.state[name]
        else:
            torch.testing.assert_close(value, other.state[name], rtol=0, atol=0, equal_nan=True)


Before = Callable[[int, list[TrainingStep]], object]


def nothing(*_: object) -> None:
    pass


def launched(steps: list[TrainingStep], numbers: range, before: Before = nothing, batch: Any = new_batch) -> Outcome:
    outcome = Outcome()
    for number in numbers:
        before(number, steps)
        outcome.terms += map(seen, make_steps(number, batch(number), steps))
    return outcome.of(*steps)


class Maker:
    """`Steps` on streams of a CPU, and what it told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
        self.streams = CpuStreams(**options)
        self.told: list[str] = []
        with monkeypatch.context() as patches:
            patches.setattr(graphed_step, "CudaStreams", lambda _: self.streams)
            patches.setattr(graphed_step, "capture_unsupported_reason", lambda *_, **__: None)
            self.steps = GraphedStep(TrainConfig(), CPU, notify=self.told.append)

    def make(
        self, steps: list[TrainingStep], numbers: range, before: Before = nothing, batch: Any = new_batch
    ) -> Outcome:
        outcome = Outcome()
        batches = (batch(number) for number in numbers)
        for number in numbers:
            before(number, steps)
            outcome.terms += map(seen, self.steps(number, self.steps.fetch(batches), steps))
        return outcome.of(*steps)

    @property
    def replays(self) -> list[int]:
        return [graph.replays for graph in self.streams.graphs]


@pytest.fixture
def maker(monkeypatch: pytest.MonkeyPatch) -> Maker:
    return Maker(monkeypatch)


# When.


@pytest.mark.parametrize(
    ("device", "settings", "processes", "why"),
    [
        ("cuda", {}, 1, None),
        ("cuda", {"capture": "off"}, 1, ""),
        ("cpu", {"engine": "autograd"}, 2, ""),
        ("cuda", {}, 2, "2 processes share each step"),
        ("cuda", {"compile": True}, 1, "train.compile is set"),
        ("cuda", {"engine": "autograd"}, 1, "train.engine is 'autograd'"),
        ("cuda", {"deterministic": True}, 1, "train.deterministic is set"),
    ],
)
def test_what_is_not_captured_is_told_unless_nobody_expects_it(
    device: str, settings: dict[str, Any], processes: int, why: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TrainConfig(**settings)
    assert capture_unsupported_reason(config, torch.device(device), processes=processes) == why
    monkeypatch.setattr(graphed_step, "CudaStreams", CpuStreams)
    told: list[str] = []
    steps = GraphedStep(config, torch.device(device), processes=processes, notify=told.append)
    assert (steps._streams is not None) == (why is None)
    assert told == ([f"train.capture: steps are launched one operation at a time, since {why}"] if why else [])


# A replay is the step.


@pytest.mark.parametrize(
    ("precision", "norm"), [("fp32", "instance"), ("fp32", "batch"), ("bf16", "instance"), ("fp16", "instance")]
)
def test_captured_steps_are_launched_ones(maker: Maker, precision: str, norm: str) -> None:
    numbers = range(1, LAST + 1)
    found = maker.make([new_step(precision, norm=norm)], numbers)
    assert_same(found, launched([new_step(precision, norm=norm)], numbers))
    assert (maker.streams.asides, maker.replays, maker.told) == (WARM_UP, [4], [])


def test_the_steps_of_several_styles_are_one_graph(maker: Maker) -> None:
    groups = []
    for _ in range(2):
        first = new_step()
        groups.append([first, new_step(style=1, beside=first)])
    numbers = range(1, LAST + 1)
    assert_same(maker.make(groups[0], numbers), launched(groups[1], numbers))
    assert maker.replays == [4]


def test_a_style_that_joins_has_a_graph_of_all_captured(maker: Maker) -> None:
    groups = []
    for _ in range(2):
        first = new_step()
        groups.append([first, new_step(style=1, beside=first)])
    for kind, make in enumerate((maker.make, launched)):
        make(groups[kind][:1], range(1, LAST + 1))
    more = range(LAST + 1, 2 * LAST + 1)
    assert_same(maker.make(groups[0], more), launched(groups[1], more))
    assert maker.replays == [4, 4]


@pytest.mark.parametrize("odd", [(2,), (WARM_UP + 1,), (WARM_UP + 2,), (WARM_UP + 2, WARM_UP + 3), (LAST,)])
def test_a_batch_of_another_shape_is_trained_on_and_later_ones_are_replayed(maker: Maker, odd: tuple[int, ...]) -> None:
    def batch(number: int) -> Tensor:
        return new_batch(number, 3 if number in odd else 2)

    numbers = range(1, LAST + 1)
    assert_same(maker.make([new_step()], numbers, batch=batch), launched([new_step()], numbers, batch=batch))
    assert maker.streams.kept == len(odd)
    if odd[0] > WARM_UP + 1:
        assert maker.replays == [4 - len(odd)]
        assert maker.told == [
            "train.capture: a batch of shape [3, 16, 16, 3] is trained without the graph, which takes [2, 16, 16, 3]"
        ]


def test_looks_between_replays_change_nothing_and_see_the_newest_weights(maker: Maker) -> None:
    images: tuple[list[Tensor], list[Tensor]] = ([], [])
    outcomes = []
    for make, painted in zip((maker.make, launched), images, strict=True):

        def look(_: int, steps: list[TrainingStep], painted: list[Tensor] = painted) -> None:
            painted.append(stylize(steps[0].net, new_batch(0).permute(0, 3, 1, 2).float() / 255))

        outcomes.append(make([new_step(norm="batch")], range(1, LAST + 1), look))
    assert_same(*outcomes)
    torch.testing.assert_close(*images, rtol=0, atol=0)
    assert not torch.equal(images[0][-1], images[0][-2])


def test_projections_between_replays_change_nothing(
    photo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = ("data.image_size=32", "data.workers=1", "data.loader=pillow", "train.batch_size=1", "style.size=32")
    others = (f"train.steps={WARM_UP + 2}", "train.device=cpu", "train.samples=0", "visualize.every=1")
    watched = ("visualize.images=1", 'visualize.transform_maps=["conv2:0"]', "visualize.max_percent=100")
    options = {"data.folder": photo_folder, "style.image": photo_folder / "image_00.jpg", "loss.vgg": "random"}
    config = load_config(preset="vgg-conv3", assignments=[*sizes, *others, *watched], options=options, environment={})
    train(config, tmp_path / "launched", notify=nothing)
    streams = CpuStreams()
    monkeypatch.setattr(graphed_step, "CudaStreams", lambda _: streams)
    monkeypatch.setattr(graphed_step, "capture_unsupported_reason", lambda *_, **__: None)
    told: list[str] = []
    train(config, tmp_path / "captured", notify=told.append)
    assert [graph.replays for graph in streams.graphs] == [2]
    assert any(text.startswith(f"projections: {WARM_UP + 3} sets in ") for text in told)
    one, other = (latest_checkpoint(tmp_path / name) for name in ("launched", "captured"))
    torch.testing.assert_close(one.tensors, other.tensors, rtol=0, atol=0)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_nothing_waits_for_the_device(maker: Maker, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    step = new_step(precision)
    with monkeypatch.context() as patches, NoValueIsRead():
        patches.setattr(Tensor, "tolist", lambda _: pytest.fail("values are read"))
        batches = iter([new_batch(number) for number in range(LAST)])
        for number in range(1, LAST + 1):
            maker.steps(number, maker.steps.fetch(batches), [step])
    assert maker.replays == [4]


# What is taken down.


@pytest.mark.parametrize("first", [1, 41])
@pytest.mark.parametrize("bad", [1, WARM_UP, WARM_UP + 1, WARM_UP + 2, LAST])
def test_the_first_bad_step_is_named(maker: Maker, first: int, bad: int) -> None:
    def poison(number: int, steps: list[TrainingStep]) -> None:
        if number == first + bad - 1:
            steps[0].net.get_parameter("conv1.weight").data[1, 2, 0, 1] = math.nan

    numbers = range(first, first + LAST)
    found = maker.make([new_step()], numbers, poison)
    assert_same(found, launched([new_step()], numbers, poison))
    step, names = found.state["0 in numbers"][1]
    assert step == first + bad - 1
    assert "model.conv1.weight" in names


def test_the_step_is_named_though_launched_ones_came_between(maker: Maker) -> None:
    def poison(number: int, steps: list[TrainingStep]) -> None:
        if number == LAST:
            steps[0].net.get_parameter("conv1.weight").data[1, 2, 0, 1] = math.nan

    def batch(number: int) -> Tensor:
        return new_batch(number, 2 if number == LAST - 1 else 1)

    found = maker.make([new_step()], range(1, LAST + 1), poison, batch)
    assert maker.replays == [3]
    assert found.state["0 in numbers"][1][0] == LAST


def test_skipped_steps_are_counted_in_replays(maker: Maker) -> None:
    outcomes = []
    for make in (maker.make, launched):
        step = new_step("fp16")
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


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("at", range(1, LAST))
def test_a_state_that_is_loaded_goes_on_wherever_it_was_saved(maker: Maker, precision: str, at: int) -> None:
    whole = launched([new_step(precision)], range(1, 2 * LAST))
    step = new_step(precision)
    begun = maker.make([step], range(1, at + 1))
    saved = {name: tensor.clone() for name, tensor in step.state_tensors().items()}, step.state_values()
    maker.make([step], range(at + 1, LAST + 1))  # what it comes to is thrown away
    step.load_state(*saved)
    found = maker.make([step], range(at + 1, 2 * LAST))
    found.terms[:0] = begun.terms
    assert_same(found, whole)
    assert len(maker.replays) == 2


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize(
    ("precision", "fails_at"),
    [
        ("fp32", "aten.uint8_first"),  # nothing has that name: the capture does not fail
        ("fp32", "aten._to_copy"),
        ("fp32", "convolution_backward"),
        ("fp32", "_fused_adam_"),
        ("fp32", "_foreach_norm"),
        ("fp16", "_amp_foreach_non_finite_check_and_unscale_"),
        ("fp16", "_fused_adam_"),
        ("fp16", "_amp_update_scale_"),
    ],
)
def test_where_a_capture_fails_launched_steps_go_on(
    monkeypatch: pytest.MonkeyPatch, precision: str, fails_at: str, several: bool
) -> None:
    maker = Maker(monkeypatch, fails_at=fails_at)
    groups = []
    for _ in range(2):
        first = new_step(precision)
        groups.append([first, *([new_step(precision, style=1, beside=first)] if several else [])])
    numbers = range(1, LAST + 1)
    assert_same(maker.make(groups[0], numbers), launched(groups[1], numbers))
    if fails_at == "aten.uint8_first":
        assert (maker.replays, maker.told) == ([4], [])
    else:
        why = f"since the capture failed (cannot capture {fails_at})"
        assert maker.told == [f"train.capture: steps are launched one operation at a time, {why}"]
        assert maker.replays == []


def test_a_value_that_is_read_makes_the_capture_fail(maker: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    original = TrainingStep._record
    monkeypatch.setattr(TrainingStep, "_record", lambda *args, **more: (args[2].total.item(), original(*args, **more)))
    assert_same(maker.make([new_step()], range(1, LAST + 1)), launched([new_step()], range(1, LAST + 1)))
    assert "operation not permitted when stream is capturing: aten._local_scalar_dense" in maker.told[0]
