"""Going on with a run: all state comes back, each line is logged once, the style model follows its checkpoint."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer.event_file_writer import AtomicCounter

from fastnst.errors import DataError, StoppedBySignal, UserError
from fastnst.models.style_model import read_style_metadata
from fastnst.run_log.writer import RunLog
from fastnst.training import train as training
from fastnst.training.run_dir.checkpoint import Checkpoint, latest_checkpoint, load_checkpoint, save_checkpoint
from fastnst.training.signals import StopRequest
from fastnst.training.step.train_step import NetTrainer
from fastnst.training.style_run import StyleRun
from helpers.tiny_runs import SmallNet, logged, make_small, small_config, train_small


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    make_small(monkeypatch)
    # Two event files of one process and second are told apart, and sorted, by a number without leading zeros: a tenth
    # one would be read before the ninth. Real runs go on in another process.
    monkeypatch.setattr("tensorboard.summary.writer.event_file_writer._global_uid", AtomicCounter(0))


class Killed(Exception):
    """Ends a run as SIGKILL would: nothing is saved on the way out."""


def kill_at(monkeypatch: pytest.MonkeyPatch, step: int, name: str = "_save_checkpoint", *, after: bool = False) -> None:
    """The next run dies just before, or just after, it does `name` for `step`."""
    original = getattr(StyleRun, name)

    def die(run: Any, *arguments: Any) -> None:
        if after:
            original(run, *arguments)
        if arguments[-1] == step:
            monkeypatch.setattr(StyleRun, name, original)
            raise Killed
        if not after:
            original(run, *arguments)

    monkeypatch.setattr(StyleRun, name, die)


def newest(run: Path) -> Checkpoint:
    checkpoint = latest_checkpoint(run)
    assert checkpoint is not None
    return checkpoint


def assert_same_run(whole: Path, parts: Path) -> None:
    """Weights, optimiser, random states, all else that is kept, the metrics and the style model: bit for bit."""
    one, other = newest(whole), newest(parts)
    assert one.step == other.step
    assert one.state == other.state
    assert one.tensors.keys() == other.tensors.keys()
    for name, tensor in one.tensors.items():
        assert torch.equal(tensor, other.tensors[name]), name
    assert logged(whole) == logged(parts)
    assert_same_model(whole, parts)


def assert_same_model(one: Path, other: Path) -> None:
    assert read_style_metadata(one) == read_style_metadata(other)
    weights, others = (load_file(run / "model.safetensors") for run in (one, other))
    assert weights.keys() == others.keys()
    assert all(torch.equal(tensor, others[name]) for name, tensor in weights.items())


def charted(run: Path, tag: str = "loss/total") -> list[tuple[int, float]]:
    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


@pytest.mark.parametrize("step", [2, 4, 5])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_killed_run_ends_like_one_that_was_not(
    generated_photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int, precision: str
) -> None:
    config = small_config(generated_photos, f"train.precision={precision}")
    train_small(config, tmp_path / "whole")
    kill_at(monkeypatch, step)
    with pytest.raises(Killed):
        train_small(config, tmp_path / "parts")
    assert logged(tmp_path / "parts")[-1]["step"] == step  # more was logged than was saved
    messages = train_small(config, tmp_path / "parts", resume=True)
    saved = {2: 0, 4: 2, 5: 4}[step]
    assert any(message.startswith(f"resuming at step {saved}" if saved else "training: ") for message in messages)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize("step", [2, 4])
def test_tensorboard_shows_each_step_once(
    generated_photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """Also where the run was killed before its first checkpoint, and begins again."""
    config = small_config(generated_photos)
    kill_at(monkeypatch, step)
    with pytest.raises(Killed):
        train_small(config, tmp_path)
    train_small(config, tmp_path, resume=True)
    points = charted(tmp_path)
    assert [step for step, _ in points] == [1, 2, 3, 4, 5]
    assert points == [(row["step"], pytest.approx(row["loss/total"], rel=1e-6)) for row in logged(tmp_path)]
    events = EventAccumulator(str(tmp_path), size_guidance={"histograms": 0})
    events.Reload()
    assert [event.step for event in events.Histograms("conv1/weight")] == [0, 2, 4, 5]


def test_random_numbers_go_on_where_they_were(
    generated_photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No step draws any today; one that did would draw what it would have drawn."""
    drawn: dict[int, float] = {}
    original = NetTrainer.train_step

    def draw(self: NetTrainer, step: int, batch: torch.Tensor) -> object:
        drawn[step] = float(torch.rand(()))
        return original(self, step, batch)

    monkeypatch.setattr(NetTrainer, "train_step", draw)
    config = small_config(generated_photos)
    train_small(config, tmp_path / "whole")
    expected = dict(drawn)
    assert len(set(expected.values())) == 5
    drawn.clear()
    kill_at(monkeypatch, 4, "_save_model")
    with pytest.raises(Killed):
        train_small(config, tmp_path / "parts")
    torch.manual_seed(99)
    train_small(config, tmp_path / "parts", resume=True)
    assert drawn == expected
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_the_order_goes_on_at_the_next_place(
    generated_photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[torch.Tensor] = []
    original = NetTrainer.train_step

    def keep(self: NetTrainer, step: int, batch: torch.Tensor) -> object:
        read.append(batch.clone())
        return original(self, step, batch)

    monkeypatch.setattr(NetTrainer, "train_step", keep)
    config = small_config(generated_photos)
    train_small(config, tmp_path / "whole")
    whole, read[:] = list(read), []
    kill_at(monkeypatch, 4, after=True)
    with pytest.raises(Killed):
        train_small(config, tmp_path / "parts")
    assert len(read) == 4
    train_small(config, tmp_path / "parts", resume=True)
    assert len(read) == len(whole) == 5
    for batch, expected in zip(read, whole, strict=True):
        assert torch.equal(batch, expected)


def test_the_scaler_goes_on_with_its_scale(
    generated_photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config(generated_photos, "train.precision=fp16")
    kill_at(monkeypatch, 4)
    with pytest.raises(Killed):
        train_small(config, tmp_path)
    before = newest(tmp_path)
    scaler = before.state["scaler"] | {"scale": 512.0, "_growth_tracker": 17}
    save_checkpoint(tmp_path, 2, tensors=before.tensors, state=before.state | {"scaler": scaler}, keep=1)
    train_small(config, tmp_path, resume=True)
    after = newest(tmp_path).state["scaler"]
    assert (after["scale"], after["_growth_tracker"]) == (512.0, 20)


def test_adam_goes_on_with_its_moments(generated_photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small_config(generated_photos)
    seen: list[dict[str, torch.Tensor]] = []
    original = NetTrainer.train_step

    def look(self: NetTrainer, step: int, batch: torch.Tensor) -> object:
        seen.append({name: tensor.clone() for name, tensor in self.state_tensors().items()})
        return original(self, step, batch)

    kill_at(monkeypatch, 4)
    with pytest.raises(Killed):
        train_small(config, tmp_path)
    saved = newest(tmp_path).tensors
    monkeypatch.setattr(NetTrainer, "train_step", look)
    train_small(config, tmp_path, resume=True)
    assert {"optimizer.step.conv1.weight", "optimizer.exp_avg.conv1.bias", "optimizer.exp_avg_sq.conv1.weight"} < set(
        seen[0]
    )
    assert seen[0].keys() | {"rng.cpu"} == saved.keys()
    for name, tensor in seen[0].items():
        assert torch.equal(tensor, saved[name]), name
    assert float(seen[0]["optimizer.step.conv1.weight"]) == 2


class NetWithStatistics(SmallNet):
    """With statistics that no step of training reads, and the style model needs."""

    def __init__(self, architecture: str, norm: str) -> None:
        super().__init__(architecture, norm)
        self.register_buffer("running_mean", torch.zeros(3))

    def forward(self, x: torch.Tensor, **how: bool) -> torch.Tensor:
        y = super().forward(x, **how)
        self.get_buffer("running_mean").lerp_(y.detach().mean((0, 2, 3)), 0.1)
        return y


def test_running_statistics_come_back(generated_photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastnst.training.style_run.TransformNet", NetWithStatistics)
    config = small_config(generated_photos)
    train_small(config, tmp_path / "whole")
    kill_at(monkeypatch, 4)
    with pytest.raises(Killed):
        train_small(config, tmp_path / "parts")
    train_small(config, tmp_path / "parts", resume=True)
    assert "model.running_mean" in newest(tmp_path / "whole").tensors
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


# The style model is written behind the checkpoint.


@pytest.mark.parametrize("step", [4, 5])
def test_the_style_model_catches_up_with_its_checkpoint(
    generated_photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    config = small_config(generated_photos)
    train_small(config, tmp_path / "whole")
    kill_at(monkeypatch, step, "_save_model")
    with pytest.raises(Killed):
        train_small(config, tmp_path / "parts")
    assert newest(tmp_path / "parts").step == step
    assert read_style_metadata(tmp_path / "parts")["steps"] != str(step)
    messages = train_small(config, tmp_path / "parts", resume=True)
    if step == 5:
        assert messages[-1].startswith("nothing to do: 5 of 5 steps are done")
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_a_style_model_that_is_gone_or_cut_short_is_written_again(generated_photos: Path, tmp_path: Path) -> None:
    config = small_config(generated_photos)
    train_small(config, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    model = tmp_path / "parts" / "model.safetensors"
    for content in (None, b"", model.read_bytes()[:-1]):
        model.unlink()
        if content is not None:
            model.write_bytes(content)
        train_small(config, tmp_path / "parts", resume=True)
        assert_same_model(tmp_path / "whole", tmp_path / "parts")


# Damaged checkpoints.


def test_a_damaged_newest_one_is_named_and_the_run_ends_the_same(generated_photos: Path, tmp_path: Path) -> None:
    config = small_config(generated_photos)
    train_small(config, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    damaged = tmp_path / "parts" / "checkpoints" / "step_00000005" / "state.json"
    damaged.write_bytes(damaged.read_bytes().replace(b"world_size", b"worldsize_"))
    messages = train_small(config, tmp_path / "parts", resume=True)
    assert any(message.startswith(f"checkpoint passed over: {damaged} is damaged") for message in messages)
    assert any(message.startswith("resuming at step 4") for message in messages)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_a_run_whose_checkpoints_are_all_damaged_is_not_begun_again(generated_photos: Path, tmp_path: Path) -> None:
    config = small_config(generated_photos)
    train_small(config, tmp_path)
    for file in (tmp_path / "checkpoints").rglob("state.safetensors"):
        file.write_bytes(b"")
    metrics = (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(DataError, match=r"no checkpoint of .* is valid, of 3 \(steps 2, 4, 5\); restore one"):
        train_small(config, tmp_path, resume=True)
    assert (tmp_path / "metrics.jsonl").read_bytes() == metrics


def test_a_run_killed_before_its_first_checkpoint_begins_again(
    generated_photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config(generated_photos)
    kill_at(monkeypatch, 2)
    with pytest.raises(Killed):
        train_small(config, tmp_path / "parts")
    messages = train_small(config, tmp_path / "parts", resume=True)
    assert any(message.endswith("holds no checkpoint yet; starting at step 0") for message in messages)
    train_small(config, tmp_path / "whole")
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize(
    ("name", "tensor", "reason"),
    [
        ("model.conv1.weight", torch.zeros(4, 3, 3, 3), r"is \[4, 3, 3, 3\] in it, and \[3, 3, 3, 3\] here"),
        ("optimizer.exp_avg.conv1.bias", None, r"is missing in it, and \[3\] here"),
        ("rng.cpu", None, "is missing in it"),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    generated_photos: Path, tmp_path: Path, name: str, tensor: torch.Tensor | None, reason: str
) -> None:
    config = small_config(generated_photos)
    train_small(config, tmp_path)
    checkpoint = newest(tmp_path)
    tensors = {key: value for key, value in checkpoint.tensors.items() if key != name}
    if tensor is not None:
        tensors[name] = tensor
    save_checkpoint(tmp_path, 5, tensors=tensors, state=checkpoint.state, keep=1)
    with pytest.raises(DataError, match=f"does not fit this network: {name} {reason}"):
        train_small(config, tmp_path, resume=True, allow_changes=True)


# What a killed process leaves.


def test_leftovers_of_a_killed_process_go_with_the_next_save(generated_photos: Path, tmp_path: Path) -> None:
    config = small_config(generated_photos)
    train_small(config, tmp_path)
    names = ("config.toml", "metrics.jsonl", "rejected.jsonl", "model.safetensors")
    leftovers = [tmp_path / f".{name}.abcd1234.part" for name in names]
    leftovers += [tmp_path / "checkpoints" / ".step_00000006.part"]
    others = [tmp_path / ".mine.abcd1234.part", tmp_path / "config.toml.bak"]
    for path in (*leftovers[:-1], *others):
        path.write_bytes(b"half")
    leftovers[-1].mkdir()
    train_small(small_config(generated_photos, "train.steps=6"), tmp_path, resume=True)
    assert [path.name for path in leftovers if path.exists()] == []
    assert all(path.exists() for path in others)


def test_a_start_that_was_killed_leaves_nothing_in_the_way_of_the_next(generated_photos: Path, tmp_path: Path) -> None:
    (tmp_path / ".lock").touch()
    (tmp_path / ".config.toml.abcd1234.part").write_text('preset = "vg')
    train_small(small_config(generated_photos), tmp_path)
    assert not list(tmp_path.glob(".config*"))


def test_a_run_that_another_process_finished_meanwhile_is_not_begun_again(
    generated_photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes between the first look at the directory and the lock, while images are checked."""
    config = small_config(generated_photos)
    original = training.read_inputs

    def meanwhile(*arguments: Any) -> Any:
        monkeypatch.setattr(training, "read_inputs", original)
        train_small(config, tmp_path)
        return original(*arguments)

    monkeypatch.setattr(training, "read_inputs", meanwhile)
    with pytest.raises(UserError, match="holds another run; go on with it by --resume"):
        train_small(config, tmp_path)
    assert newest(tmp_path).step == len(logged(tmp_path)) == 5


def test_a_signal_in_the_last_step_is_told_though_all_is_done(
    generated_photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop = StopRequest()
    original = RunLog.close

    def close(self: RunLog) -> None:
        original(self)
        stop.signum = 15

    monkeypatch.setattr(RunLog, "close", close)
    with pytest.raises(StoppedBySignal, match="stopped by SIGTERM; all 5 steps are done and saved") as stopped:
        train_small(small_config(generated_photos), tmp_path, stop=stop)
    assert stopped.value.exit_code == 143


def test_a_stopped_run_has_its_style_model_and_its_log(
    generated_photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop = StopRequest()
    flushed: list[tuple[bool, bool]] = []
    original = RunLog.flush

    def flush(self: RunLog) -> None:
        original(self)
        folder = tmp_path / "checkpoints"
        flushed.append((folder.exists(), (tmp_path / "model.safetensors").exists()))
        stop.signum = 15

    monkeypatch.setattr(RunLog, "flush", flush)
    with pytest.raises(StoppedBySignal, match="stopped at step 3 of 5"):
        train_small(small_config(generated_photos), tmp_path, stop=stop)
    # Log, checkpoint, style model: in this order.
    assert flushed == [(False, False), (True, True)]
    assert read_style_metadata(tmp_path)["steps"] == str(newest(tmp_path).step) == "3"
    weights = load_file(tmp_path / "model.safetensors")
    for name, tensor in load_checkpoint(tmp_path / "checkpoints" / "step_00000003").tensors.items():
        if name.startswith("model."):
            assert torch.equal(weights[name.removeprefix("model.")], tensor)
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 3
    assert SmallNet("a", "b").state_dict().keys() == weights.keys()
