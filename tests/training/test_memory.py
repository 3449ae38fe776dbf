"""Memory: what is available, which batch or image size fits, and what a run says when it runs out."""

import contextlib
import functools
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

from fastnst.config import Config, load_config
from fastnst.errors import DeviceError
from fastnst.memory import available_memory
from fastnst.training.memory import advice
from fastnst.training.memory.advice import RESERVE_BYTES, largest_that_fits, required_memory
from fastnst.training.memory.estimate import Estimate, estimate
from fastnst.training.step.train_step import NetTrainer
from fastnst.training.train import train
from helpers.tiny_runs import make_small, small_arguments, small_config

GPU_ERROR = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
CPU_ERROR = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes.")
Configure = Callable[..., Config]


def config_of(*assignments: str, preset: str = "vgg-conv3") -> Config:
    settings = ["data.image_size=96", "train.batch_size=8", "train.precision=fp32", *assignments]
    return load_config(preset=preset, assignments=settings, environment={})


@functools.cache
def need(batch_size: int, side: int, precision: str = "fp32") -> int:
    sizes = (f"train.batch_size={batch_size}", f"data.image_size={side}", f"train.precision={precision}")
    return required_memory(estimate(config_of(*sizes), device_type="cpu"))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_largest_that_fits_names_a_batch_size(precision: str) -> None:
    config = config_of(f"train.precision={precision}")
    five, six = need(5, 96, precision), need(6, 96, precision)
    for room, fitting in ((five + 1000, 5), (six - 1000, 5), (100 * six, 8)):
        assert largest_that_fits(config, room, device_type="cpu") == (fitting, 96)


def round_numbers(config: Config, *, device_type: str, styles: int = 1) -> Estimate:
    """Replace the estimate: 1 GiB, and 100 MiB with reserve for each image of 100 px."""
    assert (device_type, styles) == ("cpu", 1)
    images = config.train.batch_size * config.data.image_size**2 / 100**2
    return Estimate(weights=2**30, activations=int(80 * 2**20 * images), disk=1000)


def test_largest_that_fits_names_an_image_size_for_a_single_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(advice, "estimate", round_numbers)
    config = config_of("data.image_size=100")
    fits, does_not = (
        required_memory(round_numbers(config_of(f"data.image_size={side}", "train.batch_size=1"), device_type="cpu"))
        for side in (48, 64)
    )
    for room in (fits, does_not - 1):
        assert largest_that_fits(config, room, device_type="cpu") == (1, 48)
    assert largest_that_fits(config, 2**30 + RESERVE_BYTES + 1000, device_type="cpu") is None


def test_largest_that_fits_names_no_image_too_small_for_the_networks() -> None:
    deep = config_of(
        "loss.style_layers=['relu5_1']", "loss.style_layer_weights=[]", "data.image_size=32", "train.batch_size=1"
    )
    assert largest_that_fits(deep, 10_000_000, device_type="cpu") is None
    # 16 px do for relu5_1; the next size up is the one that was asked for.
    enough = required_memory(estimate(deep, device_type="cpu")) - 1000
    assert largest_that_fits(deep, enough, device_type="cpu") == (1, 16)


@pytest.fixture
def configure(generated_photos: Path, monkeypatch: pytest.MonkeyPatch) -> Configure:
    make_small(monkeypatch)
    return functools.partial(small_config, generated_photos, "data.image_size=100", "train.batch_size=8")


@pytest.fixture
def failure(configure: Configure, tmp_path: Path) -> Callable[..., str]:
    """Return the message of a run whose first step raises `error`, with `room` bytes available at its start."""

    def failure(error: BaseException, room: int, *assignments: str, estimate: Any = round_numbers) -> str:
        with (
            mock.patch.object(advice, "available_memory", return_value=room),
            mock.patch.object(advice, "estimate", estimate),
            mock.patch.object(NetTrainer, "train_step", side_effect=error),
            pytest.raises(DeviceError) as raised,
        ):
            train(configure(*assignments), tmp_path / f"{room}{assignments}")
        assert raised.value.exit_code == 5
        assert raised.value.__cause__ is error
        return str(raised.value)

    return failure


@pytest.mark.parametrize("error", [GPU_ERROR, CPU_ERROR, MemoryError()], ids=["cuda", "cpu", "python"])
def test_train_out_of_memory_names_the_batch_size_that_fits(failure: Callable[..., str], error: BaseException) -> None:
    assert failure(error, int(2.55 * 2**30)) == (
        "out of memory with train.batch_size = 8 at data.image_size = 100; it needs about 2.8 GiB, reserve included, "
        "and 2.5 GiB are there: set train.batch_size = 5, the largest that should fit"
    )


def test_train_out_of_memory_for_one_image_names_the_size_that_fits(failure: Callable[..., str]) -> None:
    message = failure(GPU_ERROR, 2**31 + 50 * 2**20)
    assert "not even train.batch_size = 1 should fit; with it set data.image_size = 64, the largest" in message
    message = failure(GPU_ERROR, 2**20)
    assert "1.0 MiB are there: no train.batch_size or data.image_size should fit; use a device with more" in message


def test_train_out_of_memory_that_was_there_at_the_start_blames_something_else(failure: Callable[..., str]) -> None:
    message = failure(GPU_ERROR, 2**40)
    assert "1.0 TiB were there when the run began" in message
    assert message.endswith("so something else has taken memory since: free it, or set train.batch_size = 4")
    message = failure(GPU_ERROR, 2**40, "train.batch_size=1")
    assert message.endswith("free it, or set a data.image_size below 100")


@pytest.mark.parametrize(("setting", "named"), [("train.capture=auto", True), ("train.capture=off", False)])
def test_explained_memory_errors_names_the_captured_graph(
    configure: Configure, monkeypatch: pytest.MonkeyPatch, setting: str, named: bool
) -> None:
    monkeypatch.setattr(advice, "available_memory", lambda _: 2**40)
    monkeypatch.setattr(advice, "estimate", lambda config, **_: round_numbers(config, device_type="cpu"))
    config = configure("train.precision=bf16", setting)
    with pytest.raises(DeviceError) as raised, advice.explained_memory_errors(config, torch.device("cuda")):
        raise GPU_ERROR
    assert ("train.capture=off, which frees a step's memory between steps" in str(raised.value)) is named


def test_train_out_of_memory_for_the_estimate_too_gives_plain_advice(failure: Callable[..., str]) -> None:
    message = failure(GPU_ERROR, 2**30, estimate=mock.Mock(side_effect=CPU_ERROR))
    assert message == "out of memory with train.batch_size = 8 at data.image_size = 100; lower one of them"


def test_explained_memory_errors_passes_other_errors(configure: Configure) -> None:
    with (
        pytest.raises(RuntimeError, match="a mistake"),
        advice.explained_memory_errors(configure(), torch.device("cpu")),
    ):
        raise RuntimeError("a mistake")


def test_dry_run_warns_of_too_little_memory(
    generated_photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fastnst: Callable[..., tuple[int, str, str]],
) -> None:
    monkeypatch.setattr(advice, "estimate", round_numbers)
    monkeypatch.setattr("fastnst.training.memory.estimate.estimate", round_numbers)
    arguments = small_arguments(generated_photos, tmp_path / "run", "data.image_size=100", "train.batch_size=8")
    for room, warning in (
        (2**32, ""),
        (int(2.25 * 2**30), "2.2 GiB are there: set train.batch_size = 2, the largest that should fit"),
        (2**31 + 50 * 2**20, "not even train.batch_size = 1 should fit; with it set data.image_size = 64"),
    ):
        monkeypatch.setattr(advice, "available_memory", lambda _, room=room: room)
        code, out, _ = fastnst(*arguments, "--dry-run")
        assert code == 0
        warnings = [line for line in out.splitlines() if line.startswith("# warning")]
        assert len(warnings) == bool(warning)
        assert all(warning in line for line in warnings)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("room", "warned"), [(2**40, None), (2**32, None), (int(2.25 * 2**30), "train.batch_size = 2")]
)
def test_train_warns_before_it_starts_of_too_little_memory(
    configure: Configure,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    room: int,
    warned: str | None,
) -> None:
    monkeypatch.setattr(advice, "available_memory", lambda _: room)
    estimated = mock.Mock(side_effect=round_numbers)
    monkeypatch.setattr(advice, "estimate", estimated)
    monkeypatch.setattr(NetTrainer, "train_step", mock.Mock(side_effect=StopIteration))
    with contextlib.suppress(StopIteration, RuntimeError):
        train(configure(), tmp_path / "run")
    warnings = [record.getMessage() for record in caplog.records if record.getMessage().startswith("memory: ")]
    assert bool(estimated.call_count) is (room < 2**32)
    assert len(warnings) == bool(warned)
    assert all(warned in line for line in warnings)


def test_train_refuses_a_style_image_that_cannot_fit(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(advice, "available_memory", lambda _: 2**20)
    image = tmp_path / "style.png"
    Image.fromarray(np.arange(96 * 64 * 3, dtype=np.uint8).reshape(64, 96, 3)).save(image)
    with pytest.raises(DeviceError) as raised:
        train(configure(f"style.image={image}", "style.size=96"), tmp_path / "run")
    assert str(raised.value) == (
        "the style image of 96 × 64 px needs 3.0 MiB or more for its features, and 1.0 MiB are there; "
        "set style.size = 48"
    )
    assert not (tmp_path / "run").exists()


def test_memory_that_is_plenty_is_more_than_any_estimate() -> None:
    for preset in ("hwalsuklee", "johnson", "lengstrom", "vgg-conv3"):
        for batch_size, side, precision in ((1, 64, "fp32"), (4, 256, "fp32"), (4, 256, "bf16")):
            sizes = (f"train.batch_size={batch_size}", f"data.image_size={side}", f"train.precision={precision}")
            config = config_of(*sizes, preset=preset)
            assert advice.plenty(config, styles=1) >= required_memory(estimate(config, device_type="cpu")), preset


def test_available_memory_of_a_gpu_is_what_is_free_or_reserved_and_unused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (5000, 9000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 700)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 300)
    assert available_memory(torch.device("cuda")) == 5400


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_available_memory_of_a_cpu_is_bounded_by_system_and_cgroups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = dict.fromkeys((resource.RLIMIT_AS, resource.RLIMIT_DATA), resource.RLIM_INFINITY)
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (limits[kind], resource.RLIM_INFINITY))
    cpu = torch.device("cpu")
    write(tmp_path, {"proc/meminfo": "MemTotal: 4000 kB\nMemAvailable: 3000 kB\n"})
    assert available_memory(cpu, tmp_path) == 3000 * 1024
    group = "sys/fs/cgroup/slice/job"
    write(tmp_path, {"proc/self/cgroup": "0::/slice/job\n", f"{group}/memory.max": "max\n"})
    assert available_memory(cpu, tmp_path) == 3000 * 1024
    # The group's own limit is none; that of the group around it is what counts.
    around = {"memory.max": "100000\n", "memory.current": "60000\n", "memory.stat": "anon 5\ninactive_file 10000\n"}
    write(tmp_path, {f"sys/fs/cgroup/slice/{name}": text for name, text in around.items()})
    assert available_memory(cpu, tmp_path) == 50_000
    # What is read again and again is reclaimed, too, unless it is mapped, as code is.
    stat = "sys/fs/cgroup/slice/memory.stat"
    write(tmp_path, {stat: around["memory.stat"] + "active_file 9000\nfile_mapped 2000\n"})
    assert available_memory(cpu, tmp_path) == 57_000
    write(tmp_path, {"sys/fs/cgroup/slice/memory.high": "65000\n"})
    assert available_memory(cpu, tmp_path) == 22_000
    first = {"limit_in_bytes": "80000\n", "usage_in_bytes": "50000\n", "stat": "total_inactive_file 1000\n"}
    write(tmp_path, {"proc/self/cgroup": "5:cpu:/a\n4:memory:/on/the/host\n0::/\n"})
    write(tmp_path, {f"sys/fs/cgroup/memory/memory.{name}": text for name, text in first.items()})
    write(tmp_path, {"sys/fs/cgroup/slice/memory.high": "max\n"})
    assert available_memory(cpu, tmp_path) == 31_000
    # An address space of 10 pages, of which 7 are in use, and data of 4, of which 2 are.
    page = resource.getpagesize()
    write(tmp_path, {"proc/self/statm": "7 3 1 1 0 2 0\n"})
    limits[resource.RLIMIT_AS] = 10 * page
    assert available_memory(cpu, tmp_path) == 3 * page
    limits[resource.RLIMIT_DATA] = 4 * page
    assert available_memory(cpu, tmp_path) == 2 * page


def test_available_memory_of_this_machine() -> None:
    assert 0 < available_memory(torch.device("cpu")) < 2**50


UNDER_A_LIMIT = """
import resource, sys
from fastnst.cli.main import main
import fastnst.training.train
from fastnst.memory import _read
from pathlib import Path
used = int(_read(Path("/proc/self/statm")).split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + int(sys.argv.pop(1)),) * 2)
main()
"""


@pytest.mark.campaign
def test_train_fits_with_the_batch_size_advised_after_a_real_failure(photo_folder: Path, tmp_path: Path) -> None:
    """pytest -m campaign tests/training/test_memory.py"""
    room = required_memory(estimate(config_of("data.image_size=128"), device_type="cpu"))
    for path in list(photo_folder.iterdir()):
        for copy in range(5):
            shutil.copy2(path, photo_folder / f"{path.stem}_{copy}{path.suffix}")

    def train_with(batch_size: int) -> subprocess.CompletedProcess[str]:
        small = {"data.image_size": 128, "train.batch_size": batch_size, "data.workers": 1, "data.loader": "pillow"}
        quiet = {"train.samples": 0, "visualize.every": 0, "style.size": 32, "train.steps": 2, "train.device": "cpu"}
        command = [sys.executable, "-c", UNDER_A_LIMIT, room, "train", "--style", photo_folder / "image_00.jpg"]
        command += ["--data", photo_folder, "--preset", "vgg-conv3", "--vgg", "random"]
        for key, value in (small | quiet).items():
            command += ["--set", f"{key}={value}"]
        command += ["--out", tmp_path / str(batch_size)]
        return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)

    failed = train_with(64)
    assert failed.returncode == 5, failed.stderr
    assert "set train.batch_size = " in failed.stderr
    advised = int(failed.stderr.split("set train.batch_size = ")[1].split(",")[0])
    assert 6 <= advised <= 9
    assert train_with(advised).returncode == 0
