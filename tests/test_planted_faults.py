"""Tests that are tested: a fault in the product's own code makes the one fail that watches over it.

Each fault of `planted_faults.py` is planted alone into a copy of the project, in which its test must fail; in a copy
without it the same test passes.

    python -m pytest -m campaign tests/test_planted_faults.py -rA
"""

import ast
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest

from helpers.planted_faults import FAULTS, Fault

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("fastnst", "kernels", "tests", "benchmarks", "pyproject.toml")
LONGEST_S = 300


def test_every_fault_can_still_be_planted() -> None:
    """Where the code has changed, what the fault is has to be found out again."""
    for fault in FAULTS:
        code = (ROOT / fault.file).read_text("utf-8")
        assert code.count(fault.old) == 1, f"{fault.name}: {fault.file} has {fault.old!r} {code.count(fault.old)} times"
        planted = code.replace(fault.old, fault.new)
        assert ast.dump(ast.parse(planted)) != ast.dump(ast.parse(code)), fault.name
        compile(planted, fault.file, "exec")


def test_every_fault_has_a_test() -> None:
    for fault in FAULTS:
        file, _, name = fault.test.partition("::")
        tree = ast.parse((ROOT / file).read_text("utf-8"))
        tests = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
        function = name.partition("[")[0]
        assert function.startswith("test_"), fault.name
        assert function in tests, f"{fault.name}: {file} has no {function}"
        marks = " ".join(map(ast.unparse, tests[function].decorator_list))
        assert "mark.campaign" not in marks, f"{fault.name}: nothing that runs on each change catches it"


def test_there_are_many_and_each_is_another() -> None:
    assert len(FAULTS) >= 24
    for names in ([fault.name for fault in FAULTS], [(fault.file, fault.old, fault.new) for fault in FAULTS]):
        assert Counter(names).most_common(1)[0][1] == 1


def copied(folder: Path, fault: Fault | None = None) -> Path:
    """A copy of the project, with the fault or without one."""
    root = folder / "project"
    root.mkdir(parents=True)
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("results"))
        else:
            shutil.copy2(ROOT / name, root / name)
    if fault is not None:
        file = root / fault.file
        code = file.read_text("utf-8")
        assert code.count(fault.old) == 1
        file.write_text(code.replace(fault.old, fault.new), "utf-8")
    return root


def run_tests(root: Path, tests: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Some tests, in a copy and with the copy's code."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join((str(root), str(root / "kernels")))
    options = ("-q", "-n", "0", "-p", "no:cacheprovider", "--benchmark-disable", "--tb=short", "-rA")
    return subprocess.run(
        [sys.executable, "-m", "pytest", *options, f"--basetemp={root.with_name('temporary')}", *tests],
        cwd=root,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=LONGEST_S * len(tests),
        preexec_fn=heed_signals,
    )


def heed_signals() -> None:
    """Also where the campaign itself runs below nohup: some of the tests send these to themselves."""
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, signal.SIG_DFL)


def outcomes(done: subprocess.CompletedProcess[str], test: str) -> set[str]:
    """How a test ended, each of its cases if it has several: of `PASSED`, `FAILED` and `ERROR`; none if skipped."""
    lines = re.findall(r"^(PASSED|FAILED|ERROR) (.+)$", done.stdout, re.MULTILINE)
    return {word for word, rest in lines if rest == test or rest.startswith((f"{test}[", f"{test} - "))}


@pytest.fixture(scope="module")
def undisturbed(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> subprocess.CompletedProcess[str]:
    """All tests that are to catch a fault, once, in a copy that has none."""
    faults = [item.callspec.params.get("fault") for item in request.session.items if hasattr(item, "callspec")]
    tests = sorted({fault.test for fault in faults if isinstance(fault, Fault)})
    done = run_tests(copied(tmp_path_factory.mktemp("undisturbed")), tests)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    return done


@pytest.mark.campaign
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_planted_fault_is_caught(fault: Fault, tmp_path: Path, undisturbed: subprocess.CompletedProcess[str]) -> None:
    """python -m pytest -m campaign tests/test_planted_faults.py"""
    usual = outcomes(undisturbed, fault.test)
    if not usual:
        pytest.skip(f"{fault.test} is skipped on this machine")
    assert usual == {"PASSED"}, undisturbed.stdout
    done = run_tests(copied(tmp_path, fault), [fault.test])
    found = outcomes(done, fault.test)
    assert (done.returncode, "FAILED" in found, "ERROR" in found) == (1, True, False), done.stdout + done.stderr
    print(f"{fault.name} ({fault.file}): {fault.test}")
