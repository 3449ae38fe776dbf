"""Tests of tests: a fault in the product's own code makes the test fail that guards against it.

Each fault of `planted_faults.py` is planted alone into a copy of the project, in which its test must fail; without the
fault the same test passes.

    python -m pytest -m campaign tests/test_planted_faults.py -rA
"""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.planted_faults import FAULTS, Fault

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("fastnst", "kernels", "tests", "benchmarks", "pyproject.toml")
LONGEST_S = 300


def test_every_fault_can_be_planted() -> None:
    assert len({fault.name for fault in FAULTS}) == len(FAULTS) >= 40
    for fault in FAULTS:
        code = (ROOT / fault.file).read_text("utf-8")
        assert code.count(fault.old) == 1, f"{fault.name}: {fault.file} has {fault.old!r} {code.count(fault.old)} times"
        assert ast.dump(ast.parse(code.replace(fault.old, fault.new))) != ast.dump(ast.parse(code)), fault.name


def test_every_fault_has_a_test_in_ci() -> None:
    for fault in FAULTS:
        file, _, name = fault.test.partition("::")
        tree = ast.parse((ROOT / file).read_text("utf-8"))
        tests = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
        function = name.partition("[")[0]
        assert function in tests, f"{fault.name}: {file} has no {function}"
        marks = map(ast.unparse, tests[function].decorator_list)
        assert "pytest.mark.campaign" not in marks, f"{fault.name}: nothing that runs in CI catches it"


def copy_project(root: Path) -> Path:
    root.mkdir()
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("results", "__pycache__"))
        else:
            shutil.copy2(ROOT / name, root / name)
    return root


def run_test(root: Path, test: str) -> set[str]:
    """Run a test in a copy; return `PASSED`, `FAILED` and `ERROR` of its cases, nothing if it is skipped."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join((str(root), str(root / "kernels")))
    options = ("-q", "-n", "0", "-p", "no:cacheprovider", "--benchmark-disable", "--tb=short", "-rA")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, f"--basetemp={root.with_name('temporary')}", test],
        **{"cwd": root, "env": environment, "stdin": subprocess.DEVNULL},
        **{"capture_output": True, "text": True, "check": False, "timeout": LONGEST_S},
    )
    print(done.stdout + done.stderr)
    assert done.returncode in (0, 1)
    return set(re.findall(r"^(PASSED|FAILED|ERROR) tests/", done.stdout, re.MULTILINE))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_project(tmp_path_factory.mktemp("undisturbed") / "project")


@pytest.mark.campaign
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_planted_fault_is_caught(fault: Fault, tmp_path: Path, undisturbed: Path) -> None:
    """python -m pytest -m campaign tests/test_planted_faults.py"""
    usual = run_test(undisturbed, fault.test)
    if not usual:
        pytest.skip(f"{fault.test} is skipped on this machine")
    assert usual == {"PASSED"}
    root = copy_project(tmp_path / "project")
    file = root / fault.file
    file.write_text(file.read_text("utf-8").replace(fault.old, fault.new), "utf-8")
    found = run_test(root, fault.test)
    assert "FAILED" in found
    assert "ERROR" not in found
