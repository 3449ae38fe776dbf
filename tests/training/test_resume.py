"""`train --resume`: all state comes back, each step is logged once, the style model follows its checkpoint."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fastnst.errors import DataError, StoppedBySignal, UserError
from fastnst.models.style_model import read_style_metadata
from fastnst.run_log.writer import RunLog
from fastnst.training import train as training
from fastnst.training.run_dir.checkpoint import load_checkpoint, save_checkpoint
from fastnst.training.signals import StopRequest
from helpers.run_comparison import assert_same_outcome
from helpers.tiny_runs import (
    SmallNet,
    before_each_step,
    logged,
    make_small,
    newest,
    small_config,
    train_killed_at,
    train_small,
)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    make_small(monkeypatch)


@pytest.mark.parametrize(("step", "saved"), [(2, 0), (4, 2), (5, 4)])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_train_resume_equals_an_undisturbed_run(
    generated_photos: Path, tmp_path: Path, step: int, saved: int, precision: str
) -> None:
    config = small_config(generated_photos, f"train.precision={precision}")
    train_small(config, tmp_path / "whole")
    train_killed_at(step, config, tmp_path / "parts")
    assert logged(tmp_path / "parts")[-1]["step"] == step  # more was logged than was saved
    messages = train_small(config, tmp_path / "parts", resume=True)
    assert any(message.startswith(f"resuming at step {saved}" if saved else "training: ") for message in messages)
    assert any(message.endswith("holds no checkpoint yet; starting at step 0") for message in messages) is (not saved)
    assert_same_outcome(tmp_path / "parts", tmp_path / "whole")


class NetWithStatistics(SmallNet):
    """With statistics that no training step reads, and the style model needs."""

    def __init__(self, architecture: str, norm: str) -> None:
        super().__init__(architecture, norm)
        self.register_buffer("running_mean", torch.zeros(3))

    def forward(self, x: torch.Tensor, **how: bool) -> torch.Tensor:
        y = super().forward(x, **how)
        self.get_buffer("running_mean").lerp_(y.detach().mean((0, 2, 3)), 0.1)
        return y


def test_train_resume_restores_random_states_and_running_statistics(
    generated_photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No step draws numbers today; one that did would draw the same ones."""
    drawn: dict[int, float] = {}
    before_each_step(monkeypatch, lambda _, step: drawn.update({step: float(torch.rand(()))}))
    monkeypatch.setattr("fastnst.training.style_run.TransformNet", NetWithStatistics)
    config = small_config(generated_photos)
    train_small(config, tmp_path / "whole")
    expected = dict(drawn)
    assert len(set(expected.values())) == 5
    drawn.clear()
    train_killed_at(4, config, tmp_path / "parts", "_save_model")
    torch.manual_seed(99)
    train_small(config, tmp_path / "parts", resume=True)
    assert drawn == expected
    assert "model.running_mean" in newest(tmp_path / "whole").tensors
    assert_same_outcome(tmp_path / "parts", tmp_path / "whole")


# The style model is written behind the checkpoint.


@pytest.mark.parametrize("step", [4, 5])
def test_train_resume_writes_a_style_model_that_lags_behind_its_checkpoint(
    generated_photos: Path, tmp_path: Path, step: int
) -> None:
    config = small_config(generated_photos)
    train_small(config, tmp_path / "whole")
    train_killed_at(step, config, tmp_path / "parts", "_save_model")
    assert newest(tmp_path / "parts").step == step
    assert read_style_metadata(tmp_path / "parts")["steps"] != str(step)
    messages = train_small(config, tmp_path / "parts", resume=True)
    if step == 5:
        assert messages[-1].startswith("nothing to do: 5 of 5 steps are done")
    assert_same_outcome(tmp_path / "parts", tmp_path / "whole")


@pytest.mark.parametrize("length", [None, 0, -1])
def test_train_resume_writes_a_style_model_that_is_missing_or_cut_short(
    generated_photos: Path, tmp_path: Path, length: int | None
) -> None:
    config = small_config(generated_photos)
    train_small(config, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    model = tmp_path / "parts" / "model.safetensors"
    content = model.read_bytes()
    model.unlink()
    if length is not None:
        model.write_bytes(content[:length])
    train_small(config, tmp_path / "parts", resume=True)
    assert_same_outcome(tmp_path / "parts", tmp_path / "whole")


# Damaged checkpoints.


def test_train_resume_takes_the_checkpoint_before_a_damaged_one(generated_photos: Path, tmp_path: Path) -> None:
    config = small_config(generated_photos)
    train_small(config, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    damaged = tmp_path / "parts" / "checkpoints" / "step_00000005" / "state.json"
    damaged.write_bytes(damaged.read_bytes().replace(b"world_size", b"worldsize_"))
    messages = train_small(config, tmp_path / "parts", resume=True)
    assert any(message.startswith(f"checkpoint passed over: {damaged} is damaged") for message in messages)
    assert any(message.startswith("resuming at step 4") for message in messages)
    assert_same_outcome(tmp_path / "parts", tmp_path / "whole")


def test_train_resume_does_not_restart_when_all_checkpoints_are_damaged(generated_photos: Path, tmp_path: Path) -> None:
    config = small_config(generated_photos)
    train_small(config, tmp_path)
    for file in (tmp_path / "checkpoints").rglob("state.safetensors"):
        file.write_bytes(b"")
    metrics = (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(DataError, match=r"no checkpoint of .* is valid, of 3 \(steps 2, 4, 5\); restore one"):
        train_small(config, tmp_path, resume=True)
    assert (tmp_path / "metrics.jsonl").read_bytes() == metrics


@pytest.mark.parametrize(
    ("name", "tensor", "reason"),
    [
        ("model.conv1.weight", torch.zeros(4, 3, 3, 3), r"is \[4, 3, 3, 3\] in it, and \[3, 3, 3, 3\] here"),
        ("optimizer.exp_avg.conv1.bias", None, r"is missing in it, and \[3\] here"),
        ("rng.cpu", None, "is missing in it"),
    ],
)
def test_train_resume_names_a_tensor_that_does_not_fit(
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


def test_train_resume_removes_what_a_killed_process_left(generated_photos: Path, tmp_path: Path) -> None:
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


def test_train_does_not_restart_a_run_that_another_process_finished_meanwhile(
    generated_photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the first check of the directory and the lock, while images are checked."""
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


def test_train_stopped_by_a_signal_saves_log_checkpoint_and_style_model(
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
