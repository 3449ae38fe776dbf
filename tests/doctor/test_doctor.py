"""`fastnst doctor`: the report, the worker processes, the command."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastnst import doctor
from fastnst.doctor import CHECKS, WORKERS
from fastnst.doctor.report import Report, report
from fastnst.doctor.verdict import DEVICE, INSTALLATION, STORAGE, Check, Verdict, failed, passed
from fastnst.doctor.workers import Probe, Results, run_probes
from helpers.doctor.machines import DAMAGED, GIB, NO_GPU, machine


def test_report_of_a_healthy_machine() -> None:
    healthy = report(machine(), CHECKS)
    assert [row.name for row in healthy.rows if row.status != "PASS"] == []
    assert len(healthy.rows) == len(CHECKS) == 19
    assert healthy.exit_code == 0
    said = {row.name: row.found for row in healthy.rows}
    assert said["GPU"] == "NVIDIA H200, compute capability 9.0, 139.0 GiB of 140.0 GiB free, cooperative launch"
    assert said["NVIDIA driver"] == "580.65.06, for CUDA up to 13.0; torch uses 13.0"
    assert said["JPEG decoder"] == "7 engines in the GPU"
    assert said["kernels"] == "Triton paths run on the GPU, 2e-04 off the reference"
    assert said["DALI"] == "2.4.0, decodes a JPEG on the CPU and the GPU"


@pytest.mark.parametrize("probe", [probe.name for probes in WORKERS for probe in probes])
def test_report_with_a_failed_probe_keeps_all_other_checks(probe: str) -> None:
    all_rows = report(machine(**{probe: "no answer within 60 s"}), CHECKS).rows
    lost = [row for row in all_rows if row.status == "FAIL"]
    assert len(all_rows) == len(CHECKS)
    assert 1 <= len(lost) <= 4
    for row in lost:
        assert "no answer within 60 s" in row.found
        assert row.fix
        assert "the check itself failed" not in row.found


def test_report_turns_an_error_in_a_check_into_a_row() -> None:
    def broken(_: Results) -> Verdict:
        raise KeyError("unforeseen")

    whole = report(machine(), [Check("odd", broken, DEVICE, "report it"), CHECKS[0]])
    assert [row.status for row in whole.rows] == ["FAIL", "PASS"]
    assert whole.rows[0].found == "the check itself failed: KeyError: 'unforeseen'"
    assert whole.rows[0].fix == "report it"


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({}, 0),
        ({"host": {"available": 3 * GIB}}, 0),
        ({"torch__": {"broken": "gone"}}, INSTALLATION),
        ({"weights": {"files": [DAMAGED]}}, STORAGE),
        ({"driver": {"cuda": [12, 4]}, "gpus__": NO_GPU}, DEVICE),
        ({"host": {"available": 0}, "weights": {"files": [DAMAGED]}}, DEVICE),
    ],
)
def test_report_exit_code_is_that_of_the_first_failure(changes: dict[str, Any], code: int) -> None:
    assert (INSTALLATION, STORAGE, DEVICE) == (1, 3, 5)
    whole = report(machine(**changes), CHECKS)
    assert whole.exit_code == code
    assert whole.as_json()["ok"] is (code == 0)


def test_report_hides_names_of_user_and_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/alice")
    monkeypatch.setattr("getpass.getuser", lambda: "alice")
    monkeypatch.setattr("socket.gethostname", lambda: "atlas7")

    def said(text: str) -> str:
        (row,) = report(machine(), [Check("x", lambda _: failed(text, text), DEVICE, "")]).rows
        assert row.fix == row.found
        return str(row.found)

    assert said("/home/alice/.cache/fastnst") == "~/.cache/fastnst"
    assert said("see /home/alice, on atlas7: 1") == "see ~, on HOST: 1"
    assert said("/scratch/alice/cache and /scratch/alice") == "/scratch/$USER/cache and /scratch/$USER"
    assert said("/home/alices/x /srv/home/alice-2 malice") == "/home/alices/x /srv/home/alice-2 malice"


# Worker processes.


def probe(name: str, limit: float = 60.0) -> Probe:
    return Probe(name, f"helpers.doctor.probes:{name}", limit)


def test_run_probes_survives_probes_that_raise_crash_or_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCTOR_TEST_FILE", str(tmp_path / "processes"))
    names = ["raises", "exits", "is_no_json", "crashes", "leaves", "is_not_there"]
    failing = [probe(name) for name in [*names, "answers"]]
    checks = [Check(name, lambda results, name=name: passed(str(results[name])), DEVICE, "") for name in names]
    started = time.monotonic()
    # The limit includes the start of the process, which takes a while on a busy machine.
    hanging = [probe("hangs", 4.0), Probe("after", "helpers.doctor.probes:answers", 60.0)]
    results = run_probes([failing, hanging])
    assert time.monotonic() - started < 60
    assert results["answers"]["process"] > 0
    assert results["after"]["process"] > 0
    said = {row.name: row.found for row in report(results, checks).rows}
    assert said.pop("is_no_json").startswith("TypeError: ")
    assert said.pop("is_not_there").startswith("AttributeError: ")
    assert said == {
        **{"raises": "RuntimeError: the cable", "exits": "SystemExit: 3"},
        **{"crashes": "its process crashed (SIGSEGV)", "leaves": "its process ended with code 7"},
    }
    with pytest.raises(Exception, match=r"^no answer within 4 s$"):
        results["hangs"]
    for process in (tmp_path / "processes").read_text().split():
        assert gone(int(process))


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGKILL])
def test_run_probes_leaves_no_hanging_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, signum: signal.Signals
) -> None:
    file = tmp_path / "processes"
    monkeypatch.setenv("DOCTOR_TEST_FILE", str(file))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
    code = "from fastnst.doctor.workers import Probe, run_probes; "
    code += "run_probes([[Probe('x', 'helpers.doctor.probes:hangs', 600)]])"
    parent = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (file.exists() and " " in file.read_text()):
        assert parent.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    parent.send_signal(signum)
    parent.wait(timeout=60)
    hanging, its_child = map(int, file.read_text().split())
    try:
        assert gone(hanging)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(its_child, signal.SIGKILL)


def gone(process: int) -> bool:
    """Return whether it ends within ten seconds."""
    deadline = time.monotonic() + 10
    state = ""
    while state != "Z" and time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        time.sleep(0.05)
    return state == "Z"


def test_run_probes_imports_nothing_from_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "json.py").write_text("raise SystemExit('imported from the working directory')")
    monkeypatch.chdir(tmp_path)
    found = run_probes([[probe("where_modules_come_from")]])["where_modules_come_from"]
    assert [path for path in sys.path if path and path not in found] == []
    assert "" not in found
    assert str(tmp_path) not in found


# The command.


def run_doctor(*options: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "fastnst", "doctor", *options]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)


def test_doctor_command_on_this_machine(tmp_path: Path) -> None:
    done = run_doctor(FASTNST_CACHE=str(tmp_path / "cache"))
    assert done.stderr == ""
    *lines, blank, summary = done.stdout.splitlines()
    assert "\x1b" not in done.stdout
    assert blank == ""
    firsts = [line for line in lines if not line.startswith(" ")]
    statuses = [line[:4] for line in firsts]
    counts = [statuses.count(status) for status in ("PASS", "WARN", "FAIL")]
    assert summary == "{} passed, {} warned, {} failed".format(*counts)
    assert len(firsts) >= len(CHECKS)
    assert {line[6:21].strip() for line in firsts} >= {check.name for check in CHECKS if check.name != "GPU"}
    assert all(line[5] == " " and line[20] == " " and line[21] != " " for line in firsts)
    assert not any(line.strip() == "" for line in lines)
    assert counts[2] == 0, done.stdout
    assert done.returncode == 0
    assert "curl" in done.stdout or "SHA-256 right" in done.stdout
    assert not (tmp_path / "cache").exists()


SHADOWS = {
    "nvidia/__init__.py": "",
    "tensorboard.py": "raise ImportError('tensorboard is shadowed')",
    "triton.py": "raise ImportError('triton is shadowed')",
    "tensorboard_data_server.py": "raise ImportError('its server, too')",
}


def test_doctor_command_without_dali_triton_and_tensorboard(tmp_path: Path) -> None:
    for name, text in SHADOWS.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    search = os.pathsep.join([str(tmp_path), *(path for path in sys.path if path)])
    done = run_doctor("--json", PYTHONPATH=search)
    assert done.stderr == ""
    result = json.loads(done.stdout)
    assert set(result) == {"ok", "checks", "versions"}
    checks = {check["name"]: check for check in result["checks"]}
    assert all(set(check) == {"name", "status", "found", "fix"} for check in result["checks"])
    assert "No module named 'nvidia.dali'" in checks["DALI"]["found"]
    assert "--loader pillow" in checks["DALI"]["fix"]
    assert "tensorboard is shadowed" in checks["TensorBoard"]["found"]
    assert "triton is shadowed" in checks["Triton"]["found"]
    assert [checks[name]["status"] for name in ("TensorBoard", "Triton", "torch")] == ["FAIL", "WARN", "PASS"]
    assert checks["kernels"]["status"] in ("PASS", "WARN"), checks["kernels"]
    assert result["ok"] is False
    assert done.returncode == INSTALLATION
    assert result["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))


def test_doctor_command_prints_the_report(
    fastnst: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = report(machine(driver={"cuda": [12, 4]}, gpus__=NO_GPU), CHECKS)
    monkeypatch.setattr(doctor, "examine", lambda: broken)
    code, text, _ = fastnst("doctor")
    assert code == DEVICE
    assert text.splitlines()[8:11] == [
        "FAIL  NVIDIA driver  580.65.06, for CUDA up to 12.4; this torch needs 13.0",
        "                     fix: install a driver for CUDA 13.0, or torch's build for CUDA 12",
        "FAIL  GPU            the driver has one, torch cannot use it: training runs on the CPU, far slower",
    ]
    assert text.endswith("\n\n17 passed, 0 warned, 2 failed\n")
    code, text, _ = fastnst("doctor", "--json")
    assert (code, json.loads(text)) == (DEVICE, broken.as_json())
    assert json.loads(text)["versions"]["nvidia-driver"] == "580.65.06"


def test_report_lines_wrap_text_but_not_commands() -> None:
    long = "word " * 40
    (row,) = report(machine(), [Check("x", lambda _: failed(long, f"{long}\n  {long}"), DEVICE, "")]).rows
    lines = [line for _, line in Report([row], {}).lines()]
    assert max(len(line) for line in lines[:4]) <= 110
    assert " " * 23 + long.rstrip() in [line.rstrip() for line in lines]
