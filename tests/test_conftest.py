"""tests/conftest.py: which settings reach the tests."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

PROBE = """
import os
from pathlib import Path

def test_settings(test_data: Path, photos: Path) -> None:
    assert test_data == Path({folder!r})
    assert photos == test_data / "photos"
    assert sorted(name for name in os.environ if name.startswith("FASTNST_")) == ["FASTNST_CACHE", "FASTNST_TEST_DATA"]
    assert os.environ["TRITON_INTERPRET"] == "1"
"""


def test_test_data_reaches_the_workers_and_settings_do_not(tmp_path: Path) -> None:
    (tmp_path / "data" / "photos").mkdir(parents=True)
    probe = tmp_path / "test_probe.py"
    probe.write_text(PROBE.format(folder=str(tmp_path / "data")))
    settings = {"FASTNST_TEST_DATA": str(tmp_path / "data"), "FASTNST_TRAIN__STEPS": "3", "FASTNST_KERNELS": "triton"}
    settings |= {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT / "tests")}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "conftest", "-n", "1", "--rootdir", str(tmp_path)]
    done = subprocess.run(
        [*command, str(probe)],
        cwd=tmp_path,
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "1 passed" in done.stdout, done.stdout + done.stderr
