"""`train.deterministic`: fresh processes come to the same bits.

Five processes of 300 steps each:

    python -m pytest -m campaign tests/training/test_determinism.py
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastnst.config import TrainConfig
from fastnst.training import determinism
from helpers.fork_server import arguments
from helpers.run_comparison import assert_same_outcome
from helpers.tiny_runs import before_each_step, make_small, small_config, train_small


def train_in_fresh_processes(processes: int, steps: int, photos: Path, tmp_path: Path, *settings: str) -> None:
    started = []
    for number in range(processes):
        argv = arguments(photos, tmp_path / str(number), steps=steps, settings=("train.deterministic=true", *settings))
        # Whatever depends on the order of a set or on an address differs between these.
        environment = os.environ | {"PYTHONHASHSEED": str(number), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "fastnst", *argv]
        started.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
    for number, process in enumerate(started):
        printed, _ = process.communicate(timeout=3000)
        assert process.returncode == 0, printed
        if number:
            assert_same_outcome(tmp_path / str(number), tmp_path / "0")


def test_train_deterministic_gives_the_same_bits_in_two_fresh_processes(few_photos: Path, tmp_path: Path) -> None:
    train_in_fresh_processes(2, 4, few_photos, tmp_path)


@pytest.mark.campaign
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_train_deterministic_gives_the_same_bits_in_five_processes_of_300_steps(
    few_photos: Path, tmp_path: Path, precision: str
) -> None:
    settings = ("train.batch_size=2", "train.checkpoint_every=100", "train.sample_every=100")
    train_in_fresh_processes(5, 300, few_photos, tmp_path, *settings, f"train.precision={precision}")


@pytest.mark.parametrize("deterministic", [False, True])
def test_algorithms_are_deterministic_only_if_asked_for(deterministic: bool) -> None:
    with determinism.algorithms(TrainConfig(deterministic=deterministic)):
        assert torch.are_deterministic_algorithms_enabled() is deterministic
        assert torch.backends.cudnn.benchmark is not deterministic
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize(("chosen", "expected"), [(None, ":4096:8"), (":16:8", ":16:8")])
def test_algorithms_set_the_cublas_workspace_unless_the_user_did(
    monkeypatch: pytest.MonkeyPatch, chosen: str | None, expected: str
) -> None:
    """Without a workspace of fixed size every matrix product on CUDA would be an error."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", chosen or "")
    if chosen is None:
        monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    with determinism.algorithms(TrainConfig(deterministic=True)):
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == expected


@pytest.mark.parametrize("deterministic", [False, True])
def test_train_makes_its_steps_in_the_configured_mode(
    generated_photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, deterministic: bool
) -> None:
    seen: list[bool] = []
    make_small(monkeypatch)
    before_each_step(monkeypatch, lambda *_: seen.append(torch.are_deterministic_algorithms_enabled()))
    train_small(small_config(generated_photos, f"train.deterministic={str(deterministic).lower()}"), tmp_path)
    assert seen == [deterministic] * 5
    assert not torch.are_deterministic_algorithms_enabled()
