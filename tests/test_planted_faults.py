"""Tests of tests: a fault in the product's own code makes the test fail that guards against it.

Each fault of `planted_faults.py` is planted alone into a copy of the project, where its test must fail; without the
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


def run_tests(root: Path, *tests: str) -> str:
    """Run tests in the copy, with the copy's code; return what pytest prints."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join((str(root), str(root / "kernels")))
    options = ("-q", "-n", "0", "-p", "no:cacheprovider", "--benchmark-disable", "--tb=short", "-rA")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, f"--basetemp={root.with_name('temporary')}", *tests],
        **{"cwd": root, "env": environment, "stdin": subprocess.DEVNULL},
        **{"capture_output": True, "text": True, "check": False, "timeout": LONGEST_S * len(tests)},
    )
    assert done.returncode in (0, 1), done.stdout + done.stderr
    return done.stdout


def outcomes(printed: str, test: str) -> set[str]:
    """Return `PASSED`, `FAILED` or `ERROR` of a test's cases; nothing if it was skipped."""
    lines = re.findall(r"^(PASSED|FAILED|ERROR) (.+)$", printed, re.MULTILINE)
    return {word for word, rest in lines if rest == test or rest.startswith((f"{test}[", f"{test} - "))}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("faults") / "project"
    root.mkdir()
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("results", "__pycache__"))
        else:
            shutil.copy2(ROOT / name, root / name)
    return root


@pytest.fixture(scope="module")
def undisturbed(request: pytest.FixtureRequest, project: Path) -> str:
    """All tests that are to catch a fault, once, in the copy without faults."""
    faults = [item.callspec.params["fault"] for item in request.session.items if hasattr(item, "callspec")]
    return run_tests(project, *sorted({fault.test for fault in faults}))


@pytest.mark.campaign
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_planted_fault_is_caught(fault: Fault, project: Path, undisturbed: str) -> None:
    """python -m pytest -m campaign tests/test_planted_faults.py"""
    usual = outcomes(undisturbed, fault.test)
    if not usual:
        pytest.skip(f"{fault.test} is skipped on this machine")
    assert usual == {"PASSED"}, undisturbed
    file = project / fault.file
    code = file.read_text("utf-8")
    file.write_text(code.replace(fault.old, fault.new), "utf-8")
    try:
        printed = run_tests(project, fault.test)
    finally:
        file.write_text(code, "utf-8")
    found = outcomes(printed, fault.test)
    assert "FAILED" in found, printed
    assert "ERROR" not in found, printed
