"""The repository: lint, types, imports, sizes, names, packaging, scripts."""

import ast
import io
import os
import re
import shutil
import subprocess
import sys
import tokenize
import tomllib
import zipfile
from collections import Counter
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import fastnst

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
PACKAGES = {"fastnst": ROOT / "fastnst", "fastnst_kernels": ROOT / "kernels" / "fastnst_kernels"}
PRODUCT = sorted(file for folder in PACKAGES.values() for file in folder.rglob("*.py"))

# Imports run downward only; parts of one layer import each other only as MAY_IMPORT_NEIGHBOURS says.
LAYERS = (
    {"cli", "__main__", "demo"},
    {"training"},
    {"run_log"},
    {"visualize"},
    {"losses", "data"},
    {"inference", "doctor", "config", "config_text", "presets"},
    {"models", "images"},
    {"storage", "device", "memory", "file_kind"},
    {"errors", "progress"},
)
MAY_IMPORT_NEIGHBOURS = {"cli": {"demo"}, "__main__": {"cli"}, "config": {"config_text"}}

TOP_LEVEL = {
    *(".ci", ".github", ".gitignore", ".pre-commit-config.yaml", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE"),
    *("README.md", "benchmarks", "fastnst", "kernels", "pyproject.toml", "scripts", "tests"),
}
# Names that the glossary of CONTRIBUTING.md replaces.
OLD_NAMES = {
    *("RunOrder", "Team", "Pulse", "Guard", "Health", "Looks", "Steps", "Placing", "Painted", "Taps"),
    *("Replacements", "LateFailure", "StyleFolder", "Facts", "judge", "obstacle", "abandon", "notify", "leads"),
    *("of_leader", "first_on_each_machine", "leave_to", "launched", "of_one_process", "check_shareable", "first_bad"),
    *("read_square", "origin_of", "changes_since", "named_styles", "prepare_runs", "train_styles", "through_relu"),
}


def run(*command: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command],
        cwd=ROOT,
        env=os.environ | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )


def python(code: str, *arguments: str) -> str:
    """Return the stdout of `code` in a new interpreter that finds both packages."""
    done = run(sys.executable, "-c", code, *arguments, PYTHONPATH=f"{ROOT}{os.pathsep}{ROOT / 'kernels'}")
    assert done.returncode == 0, done.stderr
    return done.stdout


# Lint and types.


@pytest.mark.parametrize("command", ["ruff check .", "ruff format --check .", "mypy"])
def test_is_clean(command: str) -> None:
    done = run(sys.executable, "-m", *command.split())
    assert done.returncode == 0, done.stdout + done.stderr


# Imports.


def modules_imported_by(file: Path) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}:{node.lineno}: imports are absolute here"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def part_of(module: str) -> str:
    """`fastnst.models.vgg19.VGG19` → `models`."""
    return module.split(".")[1]


def layer_of(part: str) -> int:
    for height, layer in enumerate(reversed(LAYERS)):
        if part in layer:
            return height
    raise AssertionError(f"fastnst.{part} has no layer; give it one in {Path(__file__).name}")


def wrong_imports(file: Path) -> list[str]:
    own = file.relative_to(PACKAGES["fastnst"]).parts[0].removesuffix(".py")
    wrong = []
    for line, module in modules_imported_by(file):
        if not module.startswith("fastnst.") or module == "fastnst.__version__":
            continue
        other = part_of(module)
        neighbours = layer_of(other) == layer_of(own) and other not in MAY_IMPORT_NEIGHBOURS.get(own, set())
        if other != own and (layer_of(other) > layer_of(own) or neighbours):
            wrong.append(f"{file.relative_to(ROOT)}:{line}: {own} must not import {other}")
    return wrong


def test_imports_run_downward() -> None:
    files = [file for file in PACKAGES["fastnst"].rglob("*.py") if file != PACKAGES["fastnst"] / "__init__.py"]
    assert [line for file in files for line in wrong_imports(file)] == []


def test_kernels_do_not_import_fastnst() -> None:
    for file in PACKAGES["fastnst_kernels"].rglob("*.py"):
        names = {module.split(".")[0] for _, module in modules_imported_by(file)}
        assert "fastnst" not in names, file


IMPORT_ALL_WATCHING_CUDA = """
import importlib, pkgutil, sys, traceback
import torch

touched = []

def watch(owner, name, harmless_for_others):
    def watched(*args, **kwargs):
        caller = traceback.extract_stack()[-2].filename
        if not harmless_for_others or caller.startswith(sys.argv[1]):
            touched.append((name, caller))
        return original(*args, **kwargs)
    original = getattr(owner, name)
    setattr(owner, name, watched)

# Nobody may initialize CUDA; only torch itself may ask about it.
watch(torch.cuda, "_lazy_init", False)
for name in ("is_available", "device_count", "current_device", "get_device_properties", "get_device_capability"):
    watch(torch.cuda, name, True)

count = 0
for root in ("fastnst_kernels", "fastnst"):
    assert "fastnst" not in sys.modules or root == "fastnst"
    package = importlib.import_module(root)
    for module in pkgutil.walk_packages(package.__path__, root + "."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
            count += 1
print(count, torch.cuda.is_initialized(), touched)
"""


def test_no_import_touches_cuda() -> None:
    count, initialized, touched = python(IMPORT_ALL_WATCHING_CUDA, str(ROOT)).strip().split(" ", 2)
    assert int(count) >= 20
    assert (initialized, touched) == ("False", "[]")


HEAVY = ("torch", "triton", "nvidia", "tensorboard", "numpy", "PIL", "safetensors")


@pytest.mark.parametrize(
    "code",
    [
        "import fastnst; fastnst.__version__",
        "import fastnst.config; fastnst.config.load_config(environment={})",
        "from fastnst.cli.main import cli; cli.main(['--help'], standalone_mode=False)",
        "from fastnst.cli.main import cli; cli.main(['train', '--help'], standalone_mode=False)",
        "from fastnst.cli.main import cli; cli.main(['stylize', '--help'], standalone_mode=False)",
        "from fastnst.cli.visualize import visualize; visualize.main(['saliency', '--help'], standalone_mode=False)",
    ],
)
def test_help_version_and_configuration_import_nothing_heavy(code: str) -> None:
    printed = python(f"import sys\n{code}\nprint('loaded', [name for name in {HEAVY!r} if name in sys.modules])")
    assert printed.splitlines()[-1] == "loaded []"


def test_public_names_are_lazy_and_hide_no_module() -> None:
    assert [name for name in fastnst.__all__ if getattr(fastnst, name) is None] == []
    assert set(fastnst.__all__) <= set(dir(fastnst))
    assert callable(fastnst.stylize)
    modules = {path.stem for path in PACKAGES["fastnst"].iterdir()}
    assert modules & set(fastnst.__all__) == set()
    with pytest.raises(AttributeError, match="has no attribute 'Deconvolver'"):
        fastnst.Deconvolver  # noqa: B018


# Sizes and names.


def test_top_level_holds_what_the_design_names() -> None:
    listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard")
    if listed.returncode:
        pytest.skip(f"not a git checkout: {listed.stderr.strip()}")
    assert {line.partition("/")[0] for line in listed.stdout.splitlines()} - TOP_LEVEL == set()


@pytest.mark.parametrize(("roots", "limit"), [(tuple(PACKAGES.values()), 12), ((ROOT / "tests",), 25)])
def test_folders_hold_few_files(roots: tuple[Path, ...], limit: int) -> None:
    counts = Counter(file.parent.relative_to(ROOT) for root in roots for file in root.rglob("*.py"))
    assert {str(folder): count for folder, count in counts.items() if count > limit} == {}


def test_files_are_short() -> None:
    lengths = {str(file.relative_to(ROOT)): len(file.read_text("utf-8").splitlines()) for file in PRODUCT}
    assert {file: length for file, length in lengths.items() if length > 400} == {}


def test_functions_are_short() -> None:
    lengths = {
        f"{file.relative_to(ROOT)}:{node.lineno} {node.name}": node.end_lineno - node.lineno + 1
        for file in PRODUCT
        for node in ast.walk(ast.parse(file.read_text("utf-8")))
        if isinstance(node, ast.FunctionDef) and node.end_lineno
    }
    long = {name: length for name, length in lengths.items() if length > 60}
    assert len(long) <= 0.01 * len(lengths), long


def test_old_names_stay_gone() -> None:
    found = [
        f"{file.relative_to(ROOT)}:{token.start[0]} {token.string}"
        for file in PRODUCT
        for token in tokenize.generate_tokens(io.StringIO(file.read_text("utf-8")).readline)
        if token.type == tokenize.NAME and token.string in OLD_NAMES
    ]
    assert found == []


def test_no_file_is_unfinished() -> None:
    word = re.compile(r"\b(TODO|FIXME|XXX|HACK|NotImplementedError)\b")
    assert [str(file.relative_to(ROOT)) for file in PRODUCT if word.search(file.read_text("utf-8"))] == []


# Packaging.


def test_versions_agree() -> None:
    assert PYPROJECT["project"]["version"] == fastnst.__version__
    try:
        installed = metadata.version("fastnst")
    except metadata.PackageNotFoundError:
        return  # the tests run from the source tree
    assert installed == fastnst.__version__


def test_each_dependency_is_pinned_within_its_range() -> None:
    project = PYPROJECT["project"]
    wanted = [Requirement(line) for line in project["dependencies"]]
    wanted += [Requirement(line) for extra in project["optional-dependencies"].values() for line in extra]
    lines = (ROOT / "scripts" / "constraints.txt").read_text("utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    pinned: dict[str, str] = {}
    for pin in pins:
        (specifier,) = pin.specifier
        assert specifier.operator == "==", f"{pin} is no exact version"
        pinned[pin.name] = specifier.version
    for requirement in wanted:
        assert requirement.name in pinned, f"{requirement.name} has no reference version"
        assert requirement.specifier.contains(pinned[requirement.name]), f"{requirement} excludes its reference version"
    assert {requirement.name for requirement in wanted} == set(pinned)


def test_wheel_holds_both_packages_and_nothing_else(tmp_path: Path) -> None:
    done = run(sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        entry_points = archive.read(next(name for name in names if name.endswith("entry_points.txt"))).decode()
    held = {name for name in names if ".dist-info/" not in name}
    files = {
        f"{package}/{file.relative_to(folder).as_posix()}"
        for package, folder in PACKAGES.items()
        for file in folder.rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    assert held == files
    assert {f"fastnst/presets/{name}.toml" for name in ("hwalsuklee", "johnson", "lengstrom", "vgg-conv3")} <= held
    assert {"fastnst/py.typed", "fastnst_kernels/py.typed"} <= held
    assert "fastnst = fastnst.cli.main:main" in entry_points
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert PYPROJECT["project"]["license"] == "Apache-2.0"
    assert "Version 2.0, January 2004" in (ROOT / "LICENSE").read_text("utf-8")


# Scripts.

SCRIPTS = sorted([*(ROOT / "scripts").glob("*.sh"), ROOT / ".ci" / "run"])


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_scripts_are_executable_and_stop_at_the_first_error(script: Path) -> None:
    assert os.access(script, os.X_OK)
    text = script.read_text("utf-8")
    assert text.startswith("#!/usr/bin/env bash\n")
    assert "\nset -euo pipefail\n" in text
    done = run("bash", "-n", script)
    assert done.returncode == 0, done.stderr


def test_ci_runs_the_whole_tests() -> None:
    assert (ROOT / ".ci" / "run").read_text("utf-8").splitlines()[-1] == "exec ./scripts/test.sh"
    assert "\n      - run: .ci/run\n" in (ROOT / ".github" / "workflows" / "ci.yml").read_text("utf-8")


def test_pre_commit_hooks_run_each_part_of_lint() -> None:
    text = (ROOT / ".pre-commit-config.yaml").read_text("utf-8")
    assert re.findall(r"entry: (.*)", text) == [f"scripts/lint.sh {part}" for part in ("check", "format", "types")]


def test_list_of_slow_tests_names_files(pytestconfig: pytest.Config) -> None:
    conftest = pytestconfig.pluginmanager.get_plugin(str(ROOT / "tests" / "conftest.py"))
    files = {conftest.slow_name(path) for path in (ROOT / "tests").rglob("test_*.py")}
    assert set(conftest._SLOW) - files == set()


def setup_error(*extras: str, **environment: str) -> str:
    done = run(ROOT / "scripts" / "setup.sh", *extras, **environment)
    assert done.returncode == 1
    assert done.stdout == ""
    return done.stderr


def test_setup_names_what_is_missing(tmp_path: Path) -> None:
    venv = str(tmp_path / "venv")
    assert "unknown extra 'tests'; extras: test, demo" in setup_error("tests", FASTNST_VENV=venv)
    assert "PYTHON=/nowhere/python does not run" in setup_error(FASTNST_VENV=venv, PYTHON="/nowhere/python")
    old = tmp_path / "python3"
    old.write_text('#!/bin/sh\ncase "$2" in *print*) echo 3.8 ;; *) exit 1 ;; esac\n')
    old.chmod(0o755)
    assert "is Python 3.8; 3.11 or newer is needed" in setup_error(FASTNST_VENV=venv, PYTHON=str(old))
    assert not Path(venv).exists()


def test_setup_without_a_usable_python(tmp_path: Path) -> None:
    for tool in ("bash", "dirname", "sha256sum", "cut", "cat", "ls", "flock"):
        if found := shutil.which(tool):
            (tmp_path / tool).symlink_to(found)
    shim = tmp_path / "python3"
    shim.write_text("#!/bin/sh\necho 'python3: no version is set' >&2\nexit 127\n")
    shim.chmod(0o755)
    text = setup_error(PATH=str(tmp_path), FASTNST_VENV=str(tmp_path / "venv"), PYTHON="")
    assert "no usable Python found; python3 does not run" in text
    assert "install Python 3.11 or newer with its venv module" in text


def test_setup_keeps_a_folder_that_is_no_environment(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("data")
    assert "exists and is not a virtual environment" in setup_error(FASTNST_VENV=str(tmp_path))
    assert (tmp_path / "precious").read_text() == "data"
