"""The project as a whole: lint, types, the direction of imports, what an import may do, what a wheel holds."""

import ast
import hashlib
import os
import re
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from filelock import FileLock
from packaging.requirements import Requirement

import fastnst

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
PACKAGES = {"fastnst": ROOT / "fastnst", "fastnst_kernels": ROOT / "kernels" / "fastnst_kernels"}
PRODUCT = sorted(file for folder in PACKAGES.values() for file in folder.rglob("*.py"))

# Imports run downward only. Parts of one floor import one another only where it is named here.
LAYERS = (
    {"cli", "__main__", "demo"},
    {"training"},
    {"run_log"},
    {"visualize"},
    {"losses", "data"},
    {"inference", "doctor", "config", "config_text", "presets"},
    {"models", "images"},
    {"storage", "device"},
    {"errors", "progress"},
)
MAY_IMPORT_NEIGHBOURS = {"cli": {"demo"}, "__main__": {"cli"}, "config": {"config_text"}}


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
    """What `code` prints in a new interpreter that finds both packages."""
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
            # `from fastnst import config` names a module, `from fastnst import __version__` does not: keep both.
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def part_of(module: str) -> str:
    """`fastnst.models.vgg19.VGG19` → `models`."""
    return module.split(".")[1]


def layer_of(part: str) -> int:
    for height, layer in enumerate(reversed(LAYERS)):
        if part in layer:
            return height
    raise AssertionError(f"fastnst.{part} has no layer; give it one in {Path(__file__).name} and in the design")


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


def test_the_kernels_know_nothing_of_fastnst() -> None:
    files = list(PACKAGES["fastnst_kernels"].rglob("*.py"))
    assert files
    for file in files:
        names = {module.split(".")[0] for _, module in modules_imported_by(file)}
        assert "fastnst" not in names, file
    assert python("import sys, fastnst_kernels; print('fastnst' in sys.modules)").strip() == "False"


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

# Starting CUDA is forbidden to all; asking about it, which torch itself does, to this project.
watch(torch.cuda, "_lazy_init", False)
for name in ("is_available", "device_count", "current_device", "get_device_properties", "get_device_capability"):
    watch(torch.cuda, name, True)

count = 0
for root in ("fastnst", "fastnst_kernels"):
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
    ],
)
def test_what_only_tells_or_configures_imports_nothing_heavy(code: str) -> None:
    printed = python(f"import sys\n{code}\nprint('loaded', [name for name in {HEAVY!r} if name in sys.modules])")
    assert printed.splitlines()[-1] == "loaded []"


@pytest.mark.parametrize("first", ["import fastnst.inference", "from fastnst import stylize", "import fastnst"])
def test_public_names_come_whatever_is_imported_first(first: str) -> None:
    code = f"""
{first}
import fastnst
from fastnst import *
import fastnst.inference
print([type(getattr(fastnst, name)).__name__ for name in ("TransformNet", "VGG19", "PerceptualLoss")])
print([type(value).__name__ for value in (stylize, load_style_model, load_config, train)])
print(sorted(set(fastnst.__all__) - set(dir(fastnst))))
"""
    assert python(code).splitlines() == ["['type', 'type', 'type']", str(["function"] * 4), "[]"]


def test_an_unknown_public_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'Deconvolver'"):
        fastnst.Deconvolver  # noqa: B018


# The code itself.


@pytest.mark.parametrize("file", PRODUCT, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_file_is_too_long_to_read(file: Path) -> None:
    assert len(file.read_text("utf-8").splitlines()) <= 400


def dangers(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """What turns bytes from elsewhere into running code."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            yield from (
                (node.lineno, f"imports {name}")
                for name in names
                if name.split(".")[0] in {"pickle", "dill", "marshal"}
            )
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if called in {"eval", "exec", "os.system", "os.popen", "__import__"}:
            yield node.lineno, f"calls {called}"
        if called == "torch.load" and keywords.get("weights_only") != "True":
            yield node.lineno, "torch.load without weights_only=True"
        if called in {"np.load", "numpy.load"} and keywords.get("allow_pickle", "False") != "False":
            yield node.lineno, "numpy.load with pickle"
        if keywords.get("shell", "False") != "False":
            yield node.lineno, "a shell"


@pytest.mark.parametrize("file", PRODUCT, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_file_runs_what_it_reads(file: Path) -> None:
    assert list(dangers(ast.parse(file.read_text("utf-8")))) == []


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from pickle import loads",
        "eval(text)",
        "exec(text)",
        "torch.load(file)",
        "torch.load(file, weights_only=False)",
        "np.load(file, allow_pickle=True)",
        "subprocess.run(text, shell=True)",
        "os.system(text)",
    ],
)
def test_the_search_for_dangers_finds_them(code: str) -> None:
    assert len(list(dangers(ast.parse(code)))) >= 1
    assert list(dangers(ast.parse("net.eval(); torch.load(f, weights_only=True); np.load(f); run(a)"))) == []


@pytest.mark.parametrize("file", PRODUCT, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_file_is_unfinished(file: Path) -> None:
    found = re.search(r"\b(TODO|FIXME|XXX|HACK|NotImplementedError)\b", file.read_text("utf-8"))
    assert found is None, found


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


def test_a_wheel_holds_both_packages_whole_and_nothing_else(tmp_path: Path) -> None:
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
    assert "fastnst = fastnst.cli.main:main" in entry_points
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_license_is_the_one_that_is_named() -> None:
    text = (ROOT / "LICENSE").read_text("utf-8")
    assert PYPROJECT["project"]["license"] == "Apache-2.0"
    assert "Apache License" in text
    assert "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text


# Scripts.

SCRIPTS = sorted([*(ROOT / "scripts").glob("*.sh"), ROOT / ".ci" / "run"])


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_scripts_can_be_run_and_stop_at_the_first_error(script: Path) -> None:
    assert os.access(script, os.X_OK)
    text = script.read_text("utf-8")
    assert text.startswith("#!/usr/bin/env bash\n")
    assert "\nset -euo pipefail\n" in text
    done = run("bash", "-n", script)
    assert done.returncode == 0, done.stderr


def test_continuous_integration_runs_the_tests() -> None:
    assert "./scripts/test.sh" in (ROOT / ".ci" / "run").read_text("utf-8")


def setup_error(*extras: str, **environment: str) -> str:
    # One at a time, whichever process has these tests: a second set-up would say that it waits for the first.
    with FileLock(Path(tempfile.gettempdir()) / f"fastnst-setup-{hashlib.sha256(bytes(ROOT)).hexdigest()[:16]}.lock"):
        done = run(ROOT / "scripts" / "setup.sh", *extras, **environment)
    assert done.returncode == 1
    assert done.stdout == ""
    return done.stderr


def test_setup_says_what_it_lacks(tmp_path: Path) -> None:
    venv = str(tmp_path / "venv")
    assert "unknown extra 'tests'; extras: test, demo" in setup_error("tests", FASTNST_VENV=venv)
    assert "PYTHON=/nowhere/python does not run" in setup_error(FASTNST_VENV=venv, PYTHON="/nowhere/python")
    old = tmp_path / "python3"
    old.write_text('#!/bin/sh\ncase "$2" in *print*) echo 3.8 ;; *) exit 1 ;; esac\n')
    old.chmod(0o755)
    assert "is Python 3.8; 3.11 or newer is needed" in setup_error(FASTNST_VENV=venv, PYTHON=str(old))
    assert not Path(venv).exists()


def test_setup_finds_no_python_that_will_do(tmp_path: Path) -> None:
    tools = ("bash", "dirname", "sha256sum", "cut", "cat", "ls", "flock")
    for tool in tools:
        found = run("bash", "-c", f"command -v {tool}").stdout.strip()
        if found:
            (tmp_path / tool).symlink_to(found)
    shim = tmp_path / "python3"
    shim.write_text("#!/bin/sh\necho 'python3: no version is set' >&2\nexit 127\n")
    shim.chmod(0o755)
    text = setup_error(PATH=str(tmp_path), FASTNST_VENV=str(tmp_path / "venv"), PYTHON="")
    assert "no usable Python found; python3 does not run" in text
    assert "install Python 3.11 or newer with its venv module" in text


def test_setup_leaves_a_folder_alone_that_is_no_environment(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("data")
    assert "exists and is not a virtual environment" in setup_error(FASTNST_VENV=str(tmp_path))
    assert (tmp_path / "precious").read_text() == "data"
