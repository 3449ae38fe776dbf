"""Failing storage: whichever call of a save fails, earlier saves stay, and no part of a file is taken for a whole.

A failed write ends `fastnst` with one message and exit code 3. This holds for a line of the log, too: a run that went
on would leave a gap, and would find no room for its checkpoint. Only failures to remove files are ignored.
"""

import errno
import itertools
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastnst.config import load_config
from fastnst.models.style_model import read_style_metadata
from fastnst.storage import StorageError, write_atomic
from fastnst.training.run_dir.checkpoint import load_checkpoint, save_checkpoint
from helpers.run_comparison import assert_same_outcome
from helpers.storage_faults import REMOVALS, Call, StorageFaults
from helpers.tiny_runs import make_small, newest, small_arguments

Fastnst = Callable[..., tuple[int, str, str]]

CODES = (errno.ENOSPC, errno.EIO, errno.EROFS)
REASONS = {errno.ENOSPC: "No space left", errno.EIO: "Input/output error", errno.EROFS: "Read-only file system"}


def is_tidying(call: Call) -> bool:
    """A call that only removes: a file, a folder, or the name of a checkpoint that goes."""
    return call.name in REMOVALS or call.target.endswith(".old.part")


# One checkpoint.


def save(run: Path, step: int, keep: int = 1) -> Path:
    tensors = {"model.weight": torch.full((3,), float(step))}
    return save_checkpoint(run, step, tensors=tensors, state={"step": step}, keep=keep)


def failure_of_a_save(run: Path, step: int) -> StorageError | None:
    try:
        save(run, step)
    except StorageError as error:
        return error
    return None


def calls_of_a_save(run: Path, step: int) -> list[Call]:
    with StorageFaults(run).installed() as layer:
        save(run, step)
    return layer.calls


def test_save_checkpoint_writes_content_then_name_and_then_removes_old(tmp_path: Path) -> None:
    save(tmp_path, 1)
    calls = calls_of_a_save(tmp_path, 2)
    folder, part = "checkpoints", "checkpoints/.step_00000002.part"
    assert calls[:2] == [Call("fsync", ""), Call("mkdir", part)]
    at = 2
    for name in ("state.safetensors", "state.json", "manifest.json"):
        temporary = f"{part}/.{name}.part"
        expected = [
            *(Call("open", temporary), Call("write", temporary), Call("fsync", temporary)),
            *(Call("rename", temporary, f"{part}/{name}"), Call("fsync", part), Call("unlink", temporary)),
        ]
        assert calls[at : at + len(expected)] == expected
        at += len(expected)
    assert calls[at : at + 2] == [Call("rename", part, f"{folder}/step_00000002"), Call("fsync", folder)]
    old = [call for call in calls if "step_00000001" in call.path]
    assert old[0] == Call("rename", f"{folder}/step_00000001", f"{folder}/.step_00000001.old.part")
    assert calls.index(old[0]) > at + 1
    assert not [call for call in calls[at + 2 :] if not is_tidying(call)]


def test_save_checkpoint_makes_its_folders_durable(tmp_path: Path) -> None:
    with StorageFaults(tmp_path).installed() as layer:
        save(tmp_path / "runs" / "wave", 1)
    for made, above in (("runs", ""), ("runs/wave", "runs"), ("runs/wave/checkpoints", "runs/wave")):
        at = layer.calls.index(Call("mkdir", made))
        assert layer.calls[at + 1] == Call("fsync", above)


@pytest.mark.parametrize("for_good", [False, True], ids=["once", "for good"])
@pytest.mark.parametrize("step", [2, 1], ids=["a new step", "the same step again"])
def test_save_checkpoint_where_any_call_fails(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, step: int, for_good: bool
) -> None:
    """`step` 1 replaces the only checkpoint there is."""
    save(tmp_path / "count", 1)
    calls = calls_of_a_save(tmp_path / "count", step)
    assert len(calls) > 25
    essential = [at for at, call in enumerate(calls) if not is_tidying(call)]
    stopped = []
    for at in range(len(calls)):
        run, code = tmp_path / f"run{at}", CODES[at % 3]
        save(run, 1)
        with StorageFaults(run, at, code, for_good).installed():
            error = failure_of_a_save(run, step)
        if error is not None:
            stopped.append(at)
            assert REASONS[code] in str(error)
            assert error.exit_code == 3
        checkpoint = newest(run)
        assert checkpoint.step in (1, step)
        assert checkpoint.tensors["model.weight"].tolist() == [float(checkpoint.step)] * 3
        for path in (run / "checkpoints").glob("step_*"):
            load_checkpoint(path)
        # The next save succeeds, and removes what was left.
        save(run, 3)
        assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_00000003"]
    assert stopped == (list(range(essential[-1] + 1)) if for_good else essential)
    assert caplog.messages == []


def test_latest_checkpoint_restores_one_that_was_moved_aside(tmp_path: Path) -> None:
    """A process was killed between the two renames that replace a checkpoint."""
    save(tmp_path, 1)
    folder = tmp_path / "checkpoints"
    (folder / "step_00000001").rename(folder / ".step_00000001.replaced")
    (folder / ".step_00000001.part").mkdir()
    assert newest(tmp_path).path == folder / "step_00000001"


def test_write_atomic_where_any_call_fails(tmp_path: Path) -> None:
    for at, for_good in itertools.product(range(6), (False, True)):
        path = tmp_path / f"{at}{for_good}" / "file"
        path.parent.mkdir()
        path.write_bytes(b"old")
        with StorageFaults(path.parent, at, CODES[at % 3], for_good).installed() as layer:
            try:
                write_atomic(path, b"new and longer")
            except StorageError:
                assert not is_tidying(layer.calls[at])
            else:
                assert layer.calls[at].name == "unlink"
        assert path.read_bytes() in (b"old", b"new and longer")
    assert [call.name for call in layer.calls] == ["open", "write", "fsync", "rename", "fsync", "unlink"]


# A whole run, through the command line.


@pytest.fixture
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    make_small(monkeypatch)


def check_files(run: Path) -> None:
    """Nothing half-written has a final name."""
    if (run / "config.toml").exists():
        load_config(file=run / "config.toml", environment={})
    if (run / "model.safetensors").exists():
        assert read_style_metadata(run)["steps"] in ("2", "4", "5")
        load_file(run / "model.safetensors")
    for path in (run / "checkpoints").glob("step_*"):
        load_checkpoint(path)


def fail_everywhere(photos: Path, folder: Path, fastnst: Fastnst, *, every: int) -> set[str]:
    """Fail each `every`th call of a run, once or for good, with each code in turn; returns what was hit."""
    whole = folder / "whole"
    with StorageFaults(whole).installed() as layer:
        assert fastnst(*small_arguments(photos, whole, "train.keep_checkpoints=1"))[0] == 0
    hit: set[str] = set()
    for at in range(0, len(layer.calls), every):
        run = folder / f"run{at}"
        code, for_good = CODES[at // every % 3], at // every % 2 == 1
        arguments = small_arguments(photos, run, "train.keep_checkpoints=1")
        faults = StorageFaults(run, at, code, for_good)
        with faults.installed():
            ended, _, err = fastnst(*arguments)
        assert faults.failed is not None
        hit.add(re.sub(r"\d{5,}.*", "", Path(faults.failed.path).name))
        check_files(run)
        if ended:
            messages = [line for line in err.splitlines() if line.startswith("fastnst: ")]
            assert ended == 3, err
            assert len(messages) == 1, err
            assert f"cannot write {run}" in messages[0]
            assert REASONS[code] in messages[0]
        else:
            assert is_tidying(faults.failed), faults.failed
        assert "Traceback" not in err
        begun = (run / "config.toml").exists()
        again = ["train", "--resume", "--out", str(run)] if begun else arguments
        assert fastnst(*again)[0] == 0
        assert_same_outcome(run, whole)
        shutil.rmtree(run)
    return hit


@pytest.mark.usefixtures("_small")
def test_train_where_calls_fail(generated_photos: Path, tmp_path: Path, fastnst: Fastnst) -> None:
    """A part of them: `-m campaign` fails every one."""
    hit = fail_everywhere(generated_photos, tmp_path, fastnst, every=29)
    assert "events.out.tfevents." in hit


@pytest.mark.campaign
@pytest.mark.usefixtures("_small")
def test_train_where_every_call_fails(generated_photos: Path, tmp_path: Path, fastnst: Fastnst) -> None:
    """`pytest -m campaign tests/training/test_io_faults.py`: about ten minutes on one core."""
    hit = fail_everywhere(generated_photos, tmp_path, fastnst, every=1)
    assert {".lock", ".config.toml.part", "metrics.jsonl", ".model.safetensors.part", "checkpoints"} <= hit
    assert {".state.safetensors.part", ".state.json.part", ".manifest.json.part", ".step_"} <= hit
