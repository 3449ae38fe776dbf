"""NaN and Inf, injected into each place that a training step computes: none is ever saved, and each is named."""

import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastnst.config import Config, load_config
from fastnst.errors import DivergedError
from fastnst.losses import perceptual
from fastnst.losses.perceptual import PerceptualLoss
from fastnst.models.transform_net import TransformNet
from fastnst.models.vgg19 import VGG19
from fastnst.run_log.writer import read_metrics
from fastnst.training.monitoring.snapshots import SampleLogger
from fastnst.training.step import train_step
from fastnst.training.step.finite_checks import not_finite
from fastnst.training.step.train_step import NetTrainer
from fastnst.training.train import train
from helpers.tiny_runs import log_messages, make_small, newest, real_config, small_config

Configure = Callable[..., Config]

BAD_STEP = 2
SPOT = (2, 1, 1, 2)
# Random VGG19 weights answer strongly; with these no fp16 gradient overflows at the first loss scale.
GENTLE = ("loss.content_weight=1e-4", "loss.style_weight=1e-4", "loss.tv_weight=1e-4")


@pytest.fixture
def configure(photo_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Configure:
    """Three steps of one 16 px image, a checkpoint after each; without graph, samples and histograms."""
    monkeypatch.setattr(SampleLogger, "log_start", lambda *_: None)
    monkeypatch.setattr(SampleLogger, "log_samples", lambda *_: None)
    steps = ("train.steps=3", "train.log_every=3", "train.checkpoint_every=1")
    return functools.partial(real_config, photo_folder, *steps, *GENTLE)


def run(config: Config, out: Path, *, resume: bool = False) -> list[str]:
    """Train; return what was logged."""
    with log_messages() as messages:
        train(config, out, resume=resume)
    return messages


class Injection:
    """Calls `poison` before the steps it is due in, and `after` behind them; what `poison` arms ends with the step."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.poison: Callable[[NetTrainer], None] = lambda _: None
        self.after: Callable[[NetTrainer], None] = lambda _: None
        self.due: Callable[[int], bool] = lambda step: step == BAD_STEP
        self.parameter = "res3.conv1.weight"
        original = NetTrainer.train_step

        def injected(trainer: NetTrainer, step: int, batch: Tensor) -> object:
            with monkeypatch.context() as self.patches:
                self.hooks: list[torch.utils.hooks.RemovableHandle] = []
                if self.due(step):
                    self.poison(trainer)
                terms = original(trainer, step, batch)
                if self.due(step):
                    self.after(trainer)
                for hook in self.hooks:
                    hook.remove()
                return terms

        monkeypatch.setattr(NetTrainer, "train_step", injected)

    def image(self, _: NetTrainer, value: float) -> None:
        """In place of the bytes, which hold no such value, floating images that do."""

        def poisoned(batch: Tensor) -> Tensor:
            images = train_step.to_unit(batch)
            images[0, 1, 5, 7] = value
            return images

        self.patches.setattr(train_step, "as_images", poisoned)

    def total(self, _: NetTrainer, value: float) -> None:
        """The loss alone: its gradient stays finite."""
        original = perceptual.Total.forward
        self.patches.setattr(perceptual.Total, "forward", lambda *terms: original(*terms) + value)

    def style_term(self, trainer: NetTrainer, value: float) -> None:
        layer = trainer._loss.style["relu2_1"]
        self.patches.setitem(layer._buffers, "gram", layer.target * value)

    def gradient(self, trainer: NetTrainer, value: float) -> None:
        """One value of one parameter: the loss stays finite."""

        def poisoned(gradient: Tensor) -> Tensor:
            gradient = gradient.clone()
            gradient[SPOT] = value
            return gradient

        self.hooks.append(trainer.net.get_parameter(self.parameter).register_hook(poisoned))

    def weight(self, trainer: NetTrainer, value: float) -> None:
        trainer.net.get_parameter(self.parameter).data[SPOT] = value

    def moment(self, trainer: NetTrainer, value: float, name: str = "exp_avg") -> None:
        trainer.optimizer.state[trainer.net.get_parameter(self.parameter)][name][SPOT] = value

    def second_moment(self, trainer: NetTrainer, value: float) -> None:
        self.moment(trainer, value, "exp_avg_sq")

    def running_mean(self, trainer: NetTrainer, value: float) -> None:
        trainer.net.get_buffer("conv2.running_mean")[3] = value


@pytest.fixture
def injection(monkeypatch: pytest.MonkeyPatch) -> Injection:
    return Injection(monkeypatch)


@pytest.fixture
def tiny(generated_photos: Path, monkeypatch: pytest.MonkeyPatch, injection: Injection) -> Configure:
    """Three steps of one convolution in fp16, a checkpoint and a row of metrics after each."""
    make_small(monkeypatch)
    injection.parameter = "conv1.weight"
    settings = ("train.precision=fp16", "train.steps=3", "train.checkpoint_every=1", "train.keep_checkpoints=9")
    return functools.partial(small_config, generated_photos, *settings)


def assert_all_that_is_published_is_finite(out: Path) -> None:
    files = [*(out / "checkpoints").glob("*/*.safetensors"), *out.glob("*.safetensors")]
    assert len(files) >= 2
    for file in files:
        for name, tensor in load_file(file).items():
            assert torch.isfinite(tensor).all(), (file, name)
    for line in (out / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def new_trainer(precision: str = "fp32", device: str = "cpu") -> tuple[NetTrainer, Tensor]:
    config = load_config(preset="vgg-conv3", assignments=[f"train.precision={precision}", *GENTLE], environment={})
    net = TransformNet("johnson").to(device).train()
    loss = PerceptualLoss(VGG19(last_layer="relu3_4"), config.loss).to(device)
    loss.set_style(torch.rand(1, 3, 16, 16, device=device))
    batch = torch.randint(0, 256, (1, 16, 16, 3), dtype=torch.uint8, device=device)
    return NetTrainer(net, loss, config.train, torch.device(device)), batch


# In fp16 the scaler leaves a step out whose gradients are not finite; what stays behind it cannot mend.
SKIPPED_IN_FP16 = {"image", "style_term", "gradient"}
NAMED = {
    "image": "loss/total, ",
    "total": "loss/total ",
    "style_term": "loss/style/relu2_1",
    "gradient": "the gradient of res3.conv1.weight, model.res3.conv1.weight ",
    "weight": "loss/total, ",
    "moment": "model.res3.conv1.weight ",
    "second_moment": "model.res3.conv1.weight ",
    "running_mean": "model.conv2.running_mean ",
}
# What each precision does in a way of its own; all other pairs are a campaign: pytest -m campaign.
EVERY_TIME = {
    *((place, "fp32", math.nan) for place in NAMED),
    *((place, "fp32", math.inf) for place in ("total", "gradient", "second_moment")),
    *((place, "fp16", math.nan) for place in ("gradient", "weight")),
    ("gradient", "fp16", math.inf),
    ("total", "bf16", math.nan),
}
CASES = [
    pytest.param(*case, marks=() if case in EVERY_TIME else pytest.mark.campaign)
    for precision in ("fp32", "bf16", "fp16")
    for place in NAMED
    for value in (math.nan, math.inf)
    for case in [(place, precision, value)]
]


@pytest.mark.parametrize(("place", "precision", "value"), CASES)
def test_train_names_what_is_not_finite_and_never_saves_it(
    configure: Configure, tmp_path: Path, injection: Injection, place: str, precision: str, value: float
) -> None:
    out = tmp_path / "run"
    injection.poison = lambda trainer: getattr(injection, place)(trainer, value)
    norm = "batch" if place == "running_mean" else "instance"
    config = configure(f"train.precision={precision}", f"model.norm={norm}")
    if precision == "fp16" and place in SKIPPED_IN_FP16:
        messages = run(config, out)
        assert any("fp16: 1 of 3 steps skipped" in message for message in messages)
        assert newest(out).step == 3
    else:
        with pytest.raises(DivergedError) as raised:
            run(config, out)
        assert raised.value.exit_code == 4
        message = str(raised.value)
        if place == "second_moment" and value == math.inf:
            # Adam divides by it: the weight stands still, and only the moment itself shows why.
            assert "optimizer.exp_avg_sq.res3.conv1.weight holds a value that is not finite after step 2" in message
        else:
            assert "not finite since step 2: " in message
            # The loss of a skipped step is passed over: there the weight is named that made it so.
            assert NAMED["moment" if (place, precision) == ("weight", "fp16") else place] in message
        assert f"the last good checkpoint is {out / 'checkpoints/step_00000001'}" in message
        assert newest(out).step == 1
    assert_all_that_is_published_is_finite(out)


@pytest.mark.parametrize("place", ["weight", "second_moment", "running_mean"])
def test_train_does_not_save_what_goes_wrong_after_the_check_of_a_step(
    configure: Configure, tmp_path: Path, injection: Injection, place: str
) -> None:
    out = tmp_path / "run"
    injection.after = lambda trainer: getattr(injection, place)(trainer, math.nan)
    with pytest.raises(DivergedError, match=r"(conv2.running_mean|res3.conv1.weight) holds a value .* after step 2"):
        run(configure("model.norm=batch"), out)
    assert newest(out).step == 1
    assert_all_that_is_published_is_finite(out)


def test_finite_check_read_late_names_the_step_and_the_value(injection: Injection) -> None:
    injection.poison = lambda trainer: injection.gradient(trainer, math.inf)
    trainer, batch = new_trainer()
    for step in range(1, 5):
        trainer.train_step(step, batch)
    names = ["the gradient of res3.conv1.weight", "model.res3.conv1.weight"]
    assert trainer.finite_check.first_nonfinite() == (2, names)


def test_train_stops_a_run_that_diverges_by_itself(
    generated_photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_small(monkeypatch)
    run(small_config(generated_photos, "train.steps=2"), tmp_path)
    # Adam's first step moves each weight by the learning rate: this one overflows fp32 within a few.
    wild = small_config(generated_photos, "train.steps=9", "train.learning_rate=1e38")
    with pytest.raises(DivergedError, match=r"not finite.*step_00000002.*lower learning rate"):
        train(wild, tmp_path, resume=True, allow_changes=True)
    assert newest(tmp_path).step == 2
    assert_all_that_is_published_is_finite(tmp_path)


def test_train_fp16_counts_skipped_steps_and_changes_no_weight(
    tiny: Configure, tmp_path: Path, injection: Injection, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    injection.poison = lambda trainer: injection.gradient(trainer, math.nan)
    injection.due = lambda step: step in (2, 3)
    messages = run(tiny("train.steps=4"), out)
    rows = read_metrics(out)
    assert [row["train/skipped_steps"] for row in rows] == [0, 1, 2, 2]
    assert [row["train/loss_scale"] for row in rows] == [65536, 32768, 16384, 16384]
    events = EventAccumulator(str(out))
    events.Reload()
    assert [event.value for event in events.Scalars("train/skipped_steps")] == [0, 1, 2, 2]
    assert ", 2 skipped" in capsys.readouterr().err
    (said,) = [message for message in messages if message.startswith("fp16: ")]
    assert "2 of 4 steps skipped" in said
    assert "the loss scale is now 16384" in said
    saved = [load_file(out / f"checkpoints/step_0000000{step}/state.safetensors") for step in (1, 3, 4)]
    trained = [name for name in saved[0] if name.startswith(("model.", "optimizer."))]
    assert all(torch.equal(saved[0][name], saved[1][name]) for name in trained)
    assert not torch.equal(saved[1]["model.conv1.weight"], saved[2]["model.conv1.weight"])


def test_train_fp16_stops_after_too_many_skipped_steps_in_a_row(
    tiny: Configure, tmp_path: Path, injection: Injection
) -> None:
    injection.poison = lambda trainer: injection.gradient(trainer, math.nan)
    # Two, one that is good, and three: a limit of three is for those in a row.
    injection.due = lambda step: step in (1, 2, 4, 5, 6)
    config = tiny("train.max_skipped_steps=3", "train.steps=9", "train.log_every=9")
    with pytest.raises(DivergedError, match=r"the 3 steps up to step 6 were skipped") as raised:
        run(config, tmp_path)
    assert raised.value.exit_code == 4
    said = ("down to 2.05e+03; train.max_skipped_steps = 3", "checkpoints/step_00000005", "--precision fp32")
    assert all(text in str(raised.value) for text in said)
    assert_all_that_is_published_is_finite(tmp_path)


def test_train_resume_restores_the_counts_of_skipped_steps(
    tiny: Configure, tmp_path: Path, injection: Injection
) -> None:
    injection.poison = lambda trainer: injection.gradient(trainer, math.inf)
    injection.due = lambda step: step in (1, 3, 4)
    run(tiny("train.max_skipped_steps=2"), tmp_path)
    with pytest.raises(DivergedError, match=r"the 2 steps up to step 4 were skipped.*step_00000003"):
        run(tiny("train.max_skipped_steps=2", "train.steps=6"), tmp_path, resume=True)
    messages = run(tiny("train.max_skipped_steps=3", "train.steps=5"), tmp_path, resume=True)
    assert [row["train/skipped_steps"] for row in read_metrics(tmp_path)] == [1, 1, 2, 3, 3]
    assert any("fp16: 3 of 5 steps skipped" in message for message in messages)


def test_load_state_of_another_precision_brings_no_loss_scale() -> None:
    before, batch = new_trainer()
    before.train_step(1, batch)
    after, _ = new_trainer("fp16")
    after.load_state(before.state_tensors(), before.state_values())
    after.train_step(2, batch)
    assert after.skipped_steps.read() == (0, 0)


class NoValueIsRead(TorchDispatchMode):
    """Fails where Python asks a tensor for its value, for which a GPU would have to finish all its work."""

    def __torch_dispatch__(self, op: Any, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        assert op is not torch.ops.aten._local_scalar_dense.default, "a value is read"
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_train_step_reads_nothing_back(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, batch = new_trainer(precision)
    trainer.train_step(1, batch)
    with monkeypatch.context() as patches, NoValueIsRead():
        for name in ("tolist", "numpy"):
            patches.setattr(Tensor, name, lambda _: pytest.fail("values are read"))
        trainer.train_step(2, batch)
        trainer.train_step(3, batch)
    with pytest.raises(AssertionError, match="a value is read"), NoValueIsRead():
        bool(trainer.state_tensors()["model.conv1.weight"].sum() > 0)
    assert trainer.finite_check.first_nonfinite() is None


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_train_step_never_waits_for_the_gpu(precision: str) -> None:
    trainer, batch = new_trainer(precision, "cuda")
    for step in (1, 2):
        trainer.train_step(step, batch)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in (3, 4, 5):
            trainer.train_step(step, batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert trainer.finite_check.first_nonfinite() is None


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_not_finite_finds_one_value_among_many(value: float) -> None:
    tensors = [torch.randn(64, 3, 9, 9), torch.randn(7), torch.full((), 3e38), -torch.randn(130, 130).t()]
    assert not_finite(tensors).tolist() == [False] * 4
    for index, tensor in enumerate(tensors):
        for place in (0.0, 0.5, 1.0):
            poisoned = [tensor.clone() for tensor in tensors]
            poisoned[index][tuple(int(place * (side - 1)) for side in tensor.shape)] = value
            assert not_finite(poisoned).tolist() == [other == index for other in range(4)]
