"""`train.deterministic`: fresh processes come to the same bits, and a run says what that costs.

Five processes of 300 steps each:

    python -m pytest -m campaign tests/training/test_determinism.py
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastnst.config import load_config
from fastnst.losses.perceptual import LossTerms, PerceptualLoss
from fastnst.models.transform_net import TransformNet
from fastnst.models.weights import load_vgg19
from fastnst.training import determinism
from fastnst.training.step.train_step import TrainingStep
from helpers.fork_server import arguments
from helpers.run_comparison import assert_same_outcome
from helpers.tiny_runs import make_small, small_config, train_small

CPU = torch.device("cpu")
ANNOUNCED = r"train\.deterministic: a step of 1 image takes [0-9.]+ ms here, and [0-9.]+ ms without \([+-][0-9]+%\)"


def train_in_fresh_processes(processes: int, steps: int, photos: Path, tmp_path: Path, *settings: str) -> None:
    for number in range(processes):
        argv = arguments(photos, tmp_path / str(number), steps=steps, settings=("train.deterministic=true", *settings))
        # Whatever hangs on the order of a set or on an address differs between these.
        environment = os.environ | {"PYTHONHASHSEED": str(number), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "fastnst", *argv]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=3000)
        assert done.returncode == 0, done.stderr
        assert len(re.findall(ANNOUNCED, done.stderr)) == 1
        if number:
            assert_same_outcome(tmp_path / str(number), tmp_path / "0")


def test_two_fresh_processes_come_to_the_same_bits(few_photos: Path, tmp_path: Path) -> None:
    train_in_fresh_processes(2, 10, few_photos, tmp_path)


@pytest.mark.campaign
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_five_fresh_processes_come_to_the_same_bits_after_300_steps(
    few_photos: Path, tmp_path: Path, precision: str
) -> None:
    """python -m pytest -m campaign tests/training/test_determinism.py"""
    settings = ("train.batch_size=2", "train.checkpoint_every=100", "train.sample_every=100")
    train_in_fresh_processes(5, 300, few_photos, tmp_path, *settings, f"train.precision={precision}")


def small_loss() -> PerceptualLoss:
    config = load_config(preset="vgg-conv3", environment={})
    loss = PerceptualLoss(load_vgg19("random", last_layer="relu3_4"), config.loss)
    loss.set_style(torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1)))
    return loss


@pytest.mark.parametrize("norm", ["instance", "batch"])
def test_measuring_the_cost_changes_nothing(norm: str) -> None:
    torch.manual_seed(0)
    net = TransformNet("lengstrom", norm)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    random_state = torch.get_rng_state()
    settings = ["data.image_size=32", "train.device=cpu", "train.deterministic=true", "train.precision=fp32"]
    said = determinism.cost(net, small_loss(), load_config(assignments=settings, environment={}), CPU)
    assert re.fullmatch(ANNOUNCED, said)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not torch.are_deterministic_algorithms_enabled()
    assert all(parameter.grad is None for parameter in net.parameters())
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_an_operation_without_a_deterministic_algorithm_is_an_error_only_then() -> None:
    for deterministic in (False, True):
        config = load_config(assignments=[f"train.deterministic={str(deterministic).lower()}"], environment={}).train
        with determinism.algorithms(config):
            assert torch.are_deterministic_algorithms_enabled() is deterministic
            assert torch.backends.cudnn.benchmark is not deterministic
        assert not torch.are_deterministic_algorithms_enabled()


def test_cublas_is_told_before_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a workspace of fixed size every matrix product on CUDA would be an error."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    with determinism.algorithms(load_config(assignments=["train.deterministic=true"], environment={}).train):
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


def test_what_the_user_chose_for_cublas_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    with determinism.algorithms(load_config(assignments=["train.deterministic=true"], environment={}).train):
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


@pytest.mark.parametrize("deterministic", [False, True])
def test_the_steps_of_a_run_are_made_in_its_mode(
    generated_photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, deterministic: bool
) -> None:
    seen: list[bool] = []

    class Watched(TrainingStep):
        def __call__(self, step: int, batch: torch.Tensor) -> LossTerms:
            seen.append(torch.are_deterministic_algorithms_enabled())
            return super().__call__(step, batch)

    make_small(monkeypatch)
    monkeypatch.setattr("fastnst.training.style_run.TrainingStep", Watched)
    config = small_config(generated_photos, f"train.deterministic={str(deterministic).lower()}")
    said = train_small(config, tmp_path)
    assert seen == [deterministic] * 5
    assert sum(re.fullmatch(ANNOUNCED, line) is not None for line in said) == deterministic
    assert not torch.are_deterministic_algorithms_enabled()
