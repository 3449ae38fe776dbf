"""The kernel benchmarks as a whole, without a GPU: one run of the script, its files, and its errors."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_bench.ops.catalogue import OPS
from kernel_bench.providers import COPY
from PIL import Image
from step_bench.providers import PROVIDERS

ROOT = Path(__file__).resolve().parents[2]


def run(*command: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command],
        cwd=ROOT,
        # A worker of pytest-xdist must not look like one to the child: pytest-benchmark measures nothing there.
        env={key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")} | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


# A whole run: the script, on a few small shapes.


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder that `gpu_report.sh --smoke` leaves, and what it printed."""
    out = tmp_path_factory.mktemp("report")
    done = run(ROOT / "scripts" / "gpu_report.sh", "--smoke", OUT=str(out), PYTHON=sys.executable, PHOTOS="")
    assert done.returncode == 0, done.stdout + done.stderr
    return out, done.stdout


@pytest.fixture(scope="module")
def benches(report: tuple[Path, str]) -> list[dict[str, Any]]:
    return json.loads((report[0] / "kernels.json").read_text("utf-8"))["benchmarks"]


def test_gpu_report_times_every_op_direction_and_provider(benches: list[dict[str, Any]]) -> None:
    found = {(b["extra_info"]["op"], b["extra_info"]["direction"], b["extra_info"]["provider"]) for b in benches}
    assert found == {
        (name, direction, provider)
        for name, op in OPS.items()
        for direction in op.directions()
        for provider in ("fastnst", "eager", "copy")
    }
    assert len(benches) == len(found)


def test_gpu_report_figures_follow_from_the_times(benches: list[dict[str, Any]]) -> None:
    for bench in benches:
        info, stats = bench["extra_info"], bench["stats"]
        assert bench["group"] == f"{info['op']} {info['shape']} {info['direction']}"
        assert stats["rounds"] == len(stats["data"]) == 3
        assert info["p50_us"] == pytest.approx(stats["median"] * 1e6, rel=1e-6)
        assert min(stats["data"]) * 1e6 <= info["p20_us"] <= info["p50_us"] <= info["p80_us"]
        op, shape = OPS[info["op"]], tuple(info["shape"])
        cost = op.cost(shape, torch.bfloat16, info["direction"])
        assert info["minimum_bytes"] == cost.minimum_bytes
        assert info["gb_per_s"] == pytest.approx(cost.minimum_bytes / stats["median"] / 1e9, rel=1e-6)
        assert info["percent_of_copy"] == pytest.approx(100 * info["gb_per_s"] / info["copy_gb_per_s"])
        flops = 0 if info["provider"] == COPY else cost.flops
        assert info["flops"] == flops
        assert info["tflop_per_s"] == pytest.approx(flops / stats["median"] / 1e12, rel=1e-6)


def test_gpu_report_rows_have_their_conditions(benches: list[dict[str, Any]], report: tuple[Path, str]) -> None:
    keys = {
        *("op", "direction", "provider", "implementation", "shape", "dtype", "layout", "minimum_bytes", "moved_bytes"),
        *("flops", "p20_us", "p50_us", "p80_us", "gb_per_s", "tflop_per_s", "percent_of_copy", "copy_gb_per_s"),
        *("peak_memory_bytes", "launches", "drift", "launch_overhead_included", "timer_overhead_us"),
        *("device", "device_type", "driver", "cuda", "torch", "triton", "cudnn", "revision", "date", "python"),
        *("multiprocessors", "l2_bytes", "compute_capability", "threads"),
    }
    assert all(set(bench["extra_info"]) == keys for bench in benches)
    content = json.loads((report[0] / "kernels.json").read_text("utf-8"))
    assert content["machine_info"]["kernels"]["torch"] == torch.__version__
    assert "node" not in content["machine_info"]
    assert all(ends["begin"] > 0 and ends["end"] > 0 for ends in content["copy_gb_per_s"])
    assert json.loads((report[0] / "environment.txt").read_text("utf-8").split("\n}")[0] + "}")["device"]


def test_gpu_report_has_a_table_and_a_plot(report: tuple[Path, str]) -> None:
    out, printed = report
    assert {file.name for file in out.iterdir()} == {
        "environment.txt", "log.txt", "kernels.json", "kernels.md", "kernels.png", "end_to_end.json", "report.md",
    }  # fmt: skip
    text = (out / "kernels.md").read_text("utf-8")
    for name in OPS:
        assert f"| {name} |" in text
    assert "| instance_norm forward | ≥ 3.6 TB/s |  | not measured |" in text
    with Image.open(out / "kernels.png") as image:
        assert min(image.size) >= 1000
        assert len(image.convert("RGB").getcolors(1 << 20) or []) > 20
    assert "== report: exit code 0" in printed
    page = (out / "report.md").read_text("utf-8")
    assert text in page
    for row in json.loads((out / "end_to_end.json").read_text("utf-8")):
        assert f"| {row['provider']} | {row['precision']} | 1 | 0 | {row['images_per_second']:.2f} |" in page
    assert "== data pipeline: left out: PHOTOS names no folder of photographs" in printed
    if not torch.cuda.is_available():
        assert "**Measured on a CPU with PyTorch's own code: this says nothing about the kernels.**" in text


def test_gpu_report_takes_less_than_nine_minutes(tmp_path: Path) -> None:
    script = ROOT / "scripts" / "gpu_report.sh"
    done = run(script, "--dry-run", PYTHON=sys.executable, OUT="/nowhere", PHOTOS=str(tmp_path))
    assert done.returncode == 0, done.stderr
    limits = [int(limit) for limit in re.findall(r"\(at most (\d+) s\)", done.stdout)]
    assert len(limits) >= 9
    deadline = int(re.search(r"^deadline=(\d+)$", script.read_text("utf-8"), flags=re.MULTILINE)[1])  # type: ignore[index]
    assert sum(limits) <= deadline < 9 * 60 - 10
    steps = done.stdout.splitlines()
    assert "pytest tests/kernels -m gpu" in steps[0]
    assert "report.py" in steps[-1]
    selections = re.findall(r"-k (.+?) --kernel-batch 16", done.stdout)
    words = {word for selection in selections for word in selection.split(" or ")}
    assert all(any(word in name for word in words) for name in OPS)
    assert f"data_pipeline.py --folder {tmp_path}" in done.stdout
    assert f"--providers fastnst --folder {tmp_path}" in done.stdout
    compared = re.findall(r"end_to_end.py .*--providers (\S+)", done.stdout)
    assert {name for names in compared for name in names.split(",")} == set(PROVIDERS)
    assert not Path("/nowhere").exists()


def test_gpu_report_skips_steps_with_the_reason(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\ncase "$*" in *"import pydantic"*|*"import nvidia.dali"*) exit 1 ;; esac\nexit 0\n')
    python.chmod(0o755)
    script = ROOT / "scripts" / "gpu_report.sh"
    done = run(script, "--dry-run", PYTHON=str(python), OUT="/nowhere", PHOTOS=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "\ntraining steps: left out: no pydantic\n" in done.stdout
    assert "\ndata pipeline: left out: no pydantic nvidia.dali\n" in done.stdout


def test_gpu_report_continues_after_a_failure(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "called with $*"\nexit 7\n')
    python.chmod(0o755)
    done = run(ROOT / "scripts" / "gpu_report.sh", PYTHON=str(python), OUT=str(tmp_path / "out"))
    assert done.returncode == 1
    for step in ("kernel tests on the GPU", "benchmarks of instance_norm", "benchmarks of batch_norm", "report"):
        assert re.search(rf"== {step}: exit code 7", done.stdout), step
        assert re.search(rf"failed: .*{step}", done.stderr), step


def test_gpu_report_refuses_unknown_arguments() -> None:
    done = run(ROOT / "scripts" / "gpu_report.sh", "--al")
    assert done.returncode == 2
    assert "unknown argument '--al'; known: --all, --smoke, --dry-run" in done.stderr


# Wrong results are not timed.

WRONG_PROVIDER = """
from kernel_bench.providers import PROVIDERS, Provider
PROVIDERS["wrong"] = Provider("wrong", lambda op: lambda *tensors: 1.1 * op.eager(*tensors))
"""


def test_benchmarks_fail_a_wrong_provider_without_a_row(tmp_path: Path) -> None:
    (tmp_path / "wrong_provider.py").write_text(WRONG_PROVIDER)
    file = tmp_path / "out.json"
    done = run(
        *(sys.executable, "-m", "pytest", "benchmarks/", "-q", "-p", "wrong_provider", "-p", "no:cacheprovider"),
        *("-k", "max_pool2d_switches-2x32x16x16", "--kernel-providers", "wrong,eager", "--benchmark-json", file),
        *("--kernel-rounds", "2", "--kernel-sizes", "small", "--kernel-batch", "2"),
        PYTHONPATH=os.pathsep.join(map(str, (tmp_path, ROOT / "kernels", ROOT / "benchmarks"))),
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "3 failed, 3 passed" in done.stdout
    assert re.search(r"WrongResult: the result errs by \S+ of its norm, allowed", done.stdout)
    rows = [bench["extra_info"] for bench in json.loads(file.read_text("utf-8"))["benchmarks"]]
    assert {(row["provider"], row["direction"]) for row in rows} == {
        ("eager", "forward"), ("eager", "backward"), ("eager", "forward+backward"),
    }  # fmt: skip
