"""Busy processes beside a measurement end with it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import end_to_end
import pytest
from neighbours import busy


def is_running(pid: int) -> bool:
    file = Path(f"/proc/{pid}/stat")
    return file.exists() and file.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def test_busy_processes_work_and_end_also_after_an_error() -> None:
    def fail() -> None:
        with busy(2) as pids:
            started.extend(pids)
            assert all(map(is_running, pids))
            raise RuntimeError("measured nothing")

    started: list[int] = []
    with pytest.raises(RuntimeError, match="measured nothing"):
        fail()
    assert len(set(started)) == 2
    assert not any(map(is_running, started))
    with busy(0) as pids:
        assert pids == []


def test_busy_processes_end_when_the_measurement_is_killed() -> None:
    code = "from neighbours import busy\nwith busy(1) as pids:\n print(*pids, flush=True)\n input()"
    environment = os.environ | {"PYTHONPATH": str(Path(end_to_end.__file__).parent)}
    with subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as measurement:
        assert measurement.stdout is not None
        pid = int(measurement.stdout.readline())
        measurement.send_signal(signal.SIGKILL)
        measurement.wait()
    end = time.monotonic() + 10
    while is_running(pid) and time.monotonic() < end:
        time.sleep(0.02)
    assert not is_running(pid)


def test_end_to_end_rejects_a_negative_number_of_busy_processes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        end_to_end.main(["--busy", "-1"])
    assert stop.value.code == 2
    assert "-1; expected at least 0" in capsys.readouterr().err
