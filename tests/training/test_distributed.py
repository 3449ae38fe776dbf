"""Runs shared by several processes: the same as one process, whatever happens to one of them.

With fifty steps, on three ranks, and below real torchruns:

    python -m pytest -m campaign tests/training/test_distributed.py
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fastnst.config import load_config
from fastnst.errors import DataError, DeviceError, UserError
from fastnst.training.distributed.environment import DistEnv, check_divisible, local_config
from fastnst.training.distributed.process_group import check_equal, choose_device
from fastnst.training.memory.advice import describe_shortage, required_memory
from fastnst.training.memory.estimate import estimate
from fastnst.training.run_dir.checkpoint import checkpoint_steps
from helpers.fork_server import ForkServer, arguments, next_command
from helpers.run_comparison import assert_same_outcome, leftovers, metrics_of
from helpers.torchrun_helpers import codes, messages, run_ranks

ROOT = Path(__file__).resolve().parents[2]
STEPS = 4
SETTINGS = ("train.batch_size=4", "train.checkpoint_every=2", "train.keep_checkpoints=5")


@pytest.fixture(scope="module")
def shared(fork_server: ForkServer, few_photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two processes that nothing disturbs; also the folder of what they printed."""
    folder = tmp_path_factory.mktemp("shared")
    argv = arguments(few_photos, folder / "run", steps=STEPS, settings=SETTINGS)
    assert codes(run_ranks(fork_server, argv, folder)) == [0, 0]
    return folder / "run"


@pytest.fixture
def argv(few_photos: Path, tmp_path: Path) -> tuple[str, ...]:
    return arguments(few_photos, tmp_path / "run", steps=STEPS, settings=SETTINGS)


def assert_close(run: Path, reference: Path, tolerance: float) -> None:
    """Losses at each logged step, and all trained weights, relative to their norm."""
    rows, expected = metrics_of(run), metrics_of(reference)
    assert [row["step"] for row in rows] == [row["step"] for row in expected]
    for row, other in zip(rows, expected, strict=True):
        # These are logged as what fp32 makes of them.
        assert row == pytest.approx(other, rel=max(tolerance, 2.0**-22), abs=0)
    weights, others = load_file(run / "model.safetensors"), load_file(reference / "model.safetensors")
    assert weights.keys() == others.keys()
    errors = {name: float((weights[name] - tensor).norm() / tensor.norm()) for name, tensor in others.items()}
    assert max(errors.values()) <= tolerance, errors


# One run.


@pytest.mark.parametrize(("steps", "tolerance"), [(3, 1e-9), pytest.param(50, 1e-5, marks=pytest.mark.campaign)])
def test_train_distributed_equals_one_process(
    fork_server: ForkServer, few_photos: Path, tmp_path: Path, steps: int, tolerance: float
) -> None:
    """In fp64. In fp32 a rounding error soon makes a ReLU or a pool decide otherwise, and Adam a step of it.

    Adam's weights alone would not show gradients of another scale; its moments do.
    """
    settings = (*SETTINGS, "train.samples=0", "train.keep_checkpoints=1")
    for world_size in (1, 2):
        argv = arguments(few_photos, tmp_path / f"{world_size}" / "run", steps=steps, settings=settings)
        in_double = dict.fromkeys(range(world_size), True)
        ended = run_ranks(fork_server, argv, tmp_path / f"{world_size}", world_size=world_size, in_double=in_double)
        assert codes(ended) == [0] * world_size
    assert_close(tmp_path / "2" / "run", tmp_path / "1" / "run", tolerance)
    moments, others = (
        load_file(tmp_path / name / "run" / "checkpoints" / f"step_{steps:08d}" / "state.safetensors") for name in "21"
    )
    for name, tensor in others.items():
        if name.startswith("optimizer.exp_avg"):
            assert (moments[name] - tensor).norm() <= 10 * tolerance * tensor.norm(), name


def test_train_distributed_writes_and_prints_on_rank_zero_only(shared: Path) -> None:
    assert len(list(shared.glob("events.out*"))) == 1
    assert (shared.parent / "rank1" / "printed").read_text() == ""
    printed = (shared.parent / "rank0" / "printed").read_text()
    assert printed.count("training: 4 steps of 4 images") == 1
    assert printed.count("style model") == 1


def test_train_distributed_stops_all_ranks_at_the_same_step(
    fork_server: ForkServer, shared: Path, argv: tuple[str, ...], tmp_path: Path
) -> None:
    """The signal is sent to rank 1; the resumed run equals an undisturbed one to the last bit."""
    ended = run_ranks(
        fork_server, argv, tmp_path, point={1: "after-backward"}, occurrence={1: 4}, signals={1: (signal.SIGTERM,)}
    )
    # The first backward belongs to no step (it settles the order of the sums), so that the fourth is that of step 3.
    assert codes(ended) == [143, 143]
    assert messages(ended) == [
        (0, "stopped at step 3 of 4, which is saved; go on with: the same torchrun command and --resume")
    ]
    assert leftovers(tmp_path) == []
    last = run_ranks(fork_server, next_command(argv), tmp_path)
    assert codes(last) == [0, 0], last
    assert [each.steps for each in last] == [[4], [4]]
    # The additional checkpoint is that of the signal.
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_00000003")
    assert_same_outcome(tmp_path / "run", shared)


@pytest.mark.parametrize(("killed", "agent"), [(1, True), (0, False)])
def test_train_distributed_ends_and_resumes_if_a_process_is_killed(
    fork_server: ForkServer, shared: Path, argv: tuple[str, ...], tmp_path: Path, killed: int, agent: bool
) -> None:
    struck = {"point": {killed: "after-backward"}, "occurrence": {killed: 4}}
    ended = run_ranks(fork_server, argv, tmp_path, agent=agent, **struck)
    survivor = ended[1 - killed]
    assert ended[killed].killed
    assert survivor.code == 5, survivor.printed
    ((_, message),) = messages([survivor])
    assert re.match(rf"rank {killed} of 2 \(process \d+ on .*\) ended without a word", message)
    assert "step 2 is the last that is saved" in message
    assert survivor.seconds - ended[killed].seconds < 30
    if agent:
        last = run_ranks(fork_server, next_command(argv), tmp_path)
        assert codes(last) == [0, 0], last
        assert_same_outcome(tmp_path / "run", shared)


@pytest.mark.campaign
@pytest.mark.parametrize("killed", [0, 1, 2])
def test_train_distributed_on_three_ranks_resumes_to_the_same_bits(
    fork_server: ForkServer, few_photos: Path, tmp_path: Path, killed: int
) -> None:
    """With more than two, the order in which gradients are summed counts."""
    settings = (*SETTINGS, "train.batch_size=3")
    whole = arguments(few_photos, tmp_path / "whole" / "run", steps=STEPS, settings=settings)
    assert codes(run_ranks(fork_server, whole, tmp_path / "whole", world_size=3)) == [0, 0, 0]
    argv = arguments(few_photos, tmp_path / "run", steps=STEPS, settings=settings)
    struck = {"point": {killed: "after-backward"}, "occurrence": {killed: 4}}
    ended = run_ranks(fork_server, argv, tmp_path, world_size=3, **struck)
    survivors = [each for rank, each in enumerate(ended) if rank != killed]
    assert [each.code for each in survivors] == [5, 5]
    ((_, message),) = messages(survivors)
    assert message.startswith(f"rank {killed} of 3 ")
    assert max(each.seconds for each in survivors) - ended[killed].seconds < 30
    assert codes(run_ranks(fork_server, next_command(argv), tmp_path, world_size=3)) == [0, 0, 0]
    assert_same_outcome(tmp_path / "run", tmp_path / "whole" / "run")


def test_train_distributed_stops_all_ranks_if_one_has_nan(
    fork_server: ForkServer, argv: tuple[str, ...], tmp_path: Path
) -> None:
    ended = run_ranks(fork_server, argv, tmp_path, poisoned_step={1: 3})
    assert codes(ended) == [4, 4]
    ((rank, message),) = messages(ended)
    assert rank == 0
    assert message.startswith("training diverged: not finite since step 3: ")
    assert checkpoint_steps(tmp_path / "run") == [2]
    for tensor in load_file(tmp_path / "run" / "model.safetensors").values():
        assert torch.isfinite(tensor).all()


def test_train_distributed_replaces_failed_images_as_one_process(
    fork_server: ForkServer, photo_folder: Path, tmp_path: Path
) -> None:
    settings = (*SETTINGS, "data.max_failed_percent=50", "data.prefetch=2")
    outcomes = []
    for world_size in (1, 2):
        folder = tmp_path / str(world_size)
        photos = Path(shutil.copytree(photo_folder, folder / "photos"))
        argv = arguments(photos, folder / "run", steps=6, settings=settings)
        gone = {0: tuple(str(path) for path in sorted(photos.iterdir())[4:6])}
        ended = run_ranks(fork_server, argv, folder, world_size=world_size, removed=gone)
        assert codes(ended) == [0] * world_size
        outcomes.append([(row["path"], row["step"]) for row in rejected(folder / "run")])
    assert len(outcomes[0]) == 2
    assert outcomes[0] == outcomes[1]
    losses = [[row["loss/total"] for row in metrics_of(tmp_path / name / "run")] for name in "12"]
    # Other images would have other losses, by some percent at least.
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)


def test_train_distributed_prints_one_message_if_too_many_images_fail(
    fork_server: ForkServer, photo_folder: Path, tmp_path: Path
) -> None:
    argv = arguments(photo_folder, tmp_path / "run", steps=9, settings=(*SETTINGS, "data.prefetch=1"))
    gone = {0: tuple(str(path) for path in photo_folder.iterdir())}
    ended = run_ranks(fork_server, argv, tmp_path, removed=gone)
    assert codes(ended) == [3, 3]
    ((rank, message),) = messages(ended)
    assert rank == 0
    assert "of 12 images" in message
    assert len(rejected(tmp_path / "run")) > 3


# What is refused.


@pytest.mark.parametrize(("then", "now"), [(2, 1), pytest.param(1, 2, marks=pytest.mark.campaign)])
def test_train_resume_names_another_number_of_processes(
    fork_server: ForkServer, shared: Path, few_photos: Path, tmp_path: Path, then: int, now: int
) -> None:
    if then == 2:
        shutil.copytree(shared, tmp_path / "run")
    else:
        argv = arguments(few_photos, tmp_path / "run", steps=2, settings=SETTINGS)
        assert codes(run_ranks(fork_server, argv, tmp_path, world_size=1)) == [0]
    command = ("train", "--resume", "--out", str(tmp_path / "run"), "--steps", "6")
    ended = run_ranks(fork_server, command, tmp_path, world_size=now)
    assert codes(ended) == [2] * now
    ((rank, message),) = messages(ended)
    assert rank == 0
    assert f"the processes that share a step were {then}, are now {now}" in message


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("train.batch_size=3", "train.batch_size 3 cannot be shared evenly by 2 processes; choose a multiple of 2"),
        ("train.batch_size=no", "train.batch_size"),
    ],
)
def test_train_distributed_prints_a_usage_error_once(
    fork_server: ForkServer, argv: tuple[str, ...], tmp_path: Path, setting: str, message: str
) -> None:
    ended = run_ranks(fork_server, (*argv, "--set", setting), tmp_path)
    assert codes(ended) == [2, 2]
    ((_, text),) = messages(ended)
    assert message in text
    assert not (tmp_path / "run").exists()


def test_train_dry_run_is_printed_once(fork_server: ForkServer, argv: tuple[str, ...], tmp_path: Path) -> None:
    ended = run_ranks(fork_server, (*argv, "--dry-run"), tmp_path)
    assert codes(ended) == [0, 0]
    assert "# processes  2, 2 images of a step in each" in ended[0].printed
    assert ended[1].printed == ""


ENVIRONMENT = {"WORLD_SIZE": "4", "RANK": "3", "MASTER_ADDR": "here", "MASTER_PORT": "1"}


def test_dist_env_reads_the_variables_of_torchrun() -> None:
    assert DistEnv.from_environ({}) == DistEnv.from_environ({"RANK": "0", "WORLD_SIZE": "1"}) == DistEnv(0, 1, 0, 1)
    assert DistEnv.from_environ(ENVIRONMENT) == DistEnv(3, 4, 3, 4)
    assert DistEnv.from_environ(ENVIRONMENT | {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}) == DistEnv(3, 4, 1, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"WORLD_SIZE": "many"}, "WORLD_SIZE is 'many'"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0'"),
        ({"RANK": "4"}, "RANK is 4 and WORLD_SIZE 4"),
        ({"LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "2"}, "LOCAL_RANK is 3 and LOCAL_WORLD_SIZE 2"),
        ({"RANK": "", "MASTER_PORT": ""}, "WORLD_SIZE is 4, but RANK, MASTER_PORT is not set"),
    ],
)
def test_dist_env_refuses_contradictory_variables(change: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        DistEnv.from_environ(ENVIRONMENT | change)


def test_local_config_shares_the_batch_and_the_cores() -> None:
    config = load_config(assignments=["train.batch_size=8"], environment={})
    check_divisible(config, DistEnv(1, 4, 1, 4))
    share = local_config(config, DistEnv(1, 4, 1, 1000))
    assert (share.train.batch_size, share.data.workers) == (2, 1)
    assert local_config(config, DistEnv()) == config
    of_batches = load_config(assignments=["train.batch_size=8", "model.norm=batch"], environment={})
    with pytest.raises(UserError, match=r"model\.norm is 'batch', whose statistics are those of a whole batch"):
        check_divisible(of_batches, DistEnv(1, 4, 1, 4))


def test_choose_device_needs_nccl_and_a_gpu_for_each_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    with pytest.raises(DeviceError, match=r"4 processes on this machine share 2 GPUs.*--nproc-per-node 2"):
        choose_device("auto", DistEnv(1, 4, 1, 4))
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    with pytest.raises(DeviceError, match=r"2 processes on GPUs need NCCL, and torch .* is built without it"):
        choose_device("cuda", DistEnv(1, 2, 1, 2))
    choose_device("cpu", DistEnv(1, 2, 1, 2))
    choose_device("cuda", DistEnv())
    assert chosen == []
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    choose_device("cuda", DistEnv(3, 4, 1, 2))
    assert chosen == [1]


def test_describe_shortage_counts_all_processes() -> None:
    settings = ["train.batch_size=16", "train.precision=fp32"]
    config = load_config(preset="vgg-conv3", assignments=settings, environment={})
    share = local_config(config, DistEnv(0, 4, 0, 4))
    need = estimate(share, device_type="cpu")
    text = describe_shortage(share, need, int(0.8 * required_memory(need)), device_type="cpu", processes=4)
    assert text is not None
    assert "in each of 4 processes" in text
    assert int(re.findall(r"train.batch_size = (\d+)", text)[0]) in (4, 8, 12)


class _TwoThatDiffer:
    """A process group whose rank 1 has other values."""

    def __init__(self, other: dict[str, Any]) -> None:
        self._other = json.dumps(other)

    def all_gather_text(self, text: str) -> list[str]:
        return [text, self._other]

    def exit_unless(self) -> None:
        pass


def test_check_equal_names_the_first_difference() -> None:
    what = {"world_size": 2, "configuration": {"train.seed": "1", "train.batch_size": "4"}}
    same = {"world_size": 2, "configuration.train.seed": "1", "configuration.train.batch_size": "4"}
    check_equal(_TwoThatDiffer(same), what)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"rank 0 has configuration.train.seed = 1, and rank 1 has 2; give all"):
        check_equal(_TwoThatDiffer(same | {"configuration.train.seed": "2"}), what)  # type: ignore[arg-type]


# Below torchrun itself.


@pytest.mark.campaign
@pytest.mark.parametrize("signum", [None, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGKILL])
def test_train_below_torchrun(few_photos: Path, tmp_path: Path, signum: signal.Signals | None) -> None:
    """Undisturbed, with a signal to torchrun, and with one of its processes killed."""
    settings = (*SETTINGS, "train.log_every=1")
    argv = arguments(few_photos, tmp_path / "run", steps=6 if signum is None else 100000, settings=settings)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--signals-to-handle", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1", "-m", "fastnst"]
    path = [str(ROOT), str(ROOT / "kernels"), *filter(None, sys.path)]
    variables = os.environ | {"PYTHONPATH": os.pathsep.join(path), "FASTNST_CACHE": str(tmp_path / "cache")}
    with (
        (tmp_path / "printed").open("w") as printed,
        subprocess.Popen([*command, *argv], stdout=printed, stderr=printed, env=variables) as process,
    ):
        begin = time.monotonic()
        if signum is not None:
            while not (tmp_path / "run" / "checkpoints").exists():
                assert time.monotonic() - begin < 300
                assert process.poll() is None, (tmp_path / "printed").read_text()
                time.sleep(0.1)
            target = process.pid if signum != signal.SIGKILL else children(process.pid)[1]
            struck = time.monotonic()
            os.kill(target, signum)
        process.wait(timeout=300)
        if signum is not None:
            assert time.monotonic() - struck < 30
    text = (tmp_path / "printed").read_text()
    ends = [line for line in text.splitlines() if line.startswith("fastnst: ")]
    if signum is None:
        assert (process.returncode, ends) == (0, [])
        assert text.count("style model") == 1
        return
    assert len(ends) == 1, text
    if signum == signal.SIGKILL:
        assert "ended without a word" in ends[0]
    else:
        assert "which is saved" in ends[0]
    steps = checkpoint_steps(tmp_path / "run")
    resumed = [*command, "train", "--resume", "--out", str(tmp_path / "run"), "--steps", str(max(steps) + 1)]
    subprocess.run(resumed, env=variables, check=True, timeout=300, capture_output=True)
    assert checkpoint_steps(tmp_path / "run")[-1] == max(steps) + 1


def children(pid: int) -> list[int]:
    """The worker processes of a torchrun, by rank."""
    ranks = {}
    for child in map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()):
        variables = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        ranks |= {int(text[5:]): child for text in variables if text.startswith(b"RANK=")}
    return [ranks[rank] for rank in sorted(ranks)]


def rejected(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "rejected.jsonl").read_text().splitlines()]
