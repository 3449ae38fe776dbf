"""The product's syntax trees: nothing turns bytes into running code, and one module uses the network."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PRODUCT = sorted([*(ROOT / "fastnst").rglob("*.py"), *(ROOT / "kernels" / "fastnst_kernels").rglob("*.py")])

_MODULES = {"pickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "code", "codeop", "pty", "yaml"}
_CALLS = {
    *("eval", "exec", "compile", "__import__", "builtins.eval", "builtins.exec", "os.system", "os.popen"),
    *("subprocess.getoutput", "subprocess.getstatusoutput", "asyncio.create_subprocess_shell", "tempfile.mktemp"),
    *("torch.hub.load", "torch.hub.load_state_dict_from_url", "torch.jit.load", "shutil.unpack_archive"),
    *("torch.serialization.add_safe_globals", "torch.serialization.safe_globals", "ssl._create_unverified_context"),
}
_METHODS = {"extractall"}
_NETWORK = {
    *("socket", "socketserver", "ssl", "urllib.request", "http", "ftplib", "smtplib", "requests", "httpx", "aiohttp")
}


def dangers(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield line and description of each call that runs code or follows links, and of what hides such a call."""
    names = _imported_names(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from (
                (node.lineno, f"imports {name}")
                for name in _modules(node)
                if name.split(".")[0] in _MODULES or name in _CALLS
            )
        elif isinstance(node, ast.Constant) and node.value == "0.0.0.0":
            yield node.lineno, "an address that every machine reaches"
        elif isinstance(node, ast.Call):
            yield from ((node.lineno, danger) for danger in _dangers_of_call(node, names))
        # A function passed on is called out of sight.
        elif isinstance(node, ast.Attribute | ast.Name) and _full_name(node, names) in _CALLS - {"compile"}:
            yield node.lineno, f"uses {_full_name(node, names)}"


def _dangers_of_call(node: ast.Call, names: dict[str, str]) -> Iterator[str]:
    called = _full_name(node.func, names)
    keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
    if called in _CALLS:
        yield f"calls {called}"
    if isinstance(node.func, ast.Attribute) and node.func.attr in _METHODS:
        yield f"calls {node.func.attr}"
    if called in ("torch.load", "torch.serialization.load") and keywords.get("weights_only") != "True":
        yield "torch.load without weights_only=True"
    if keywords.get("weights_only", "True") != "True":
        yield "weights_only is not True"
    if keywords.get("allow_pickle", "False") != "False":
        yield "NumPy with pickles"
    if called.startswith("numpy") and called.endswith(".load") and "allow_pickle" not in keywords:
        yield "numpy.load that does not say allow_pickle=False"
    if keywords.get("shell", "False") != "False":
        yield "a shell"


def _modules(node: ast.Import | ast.ImportFrom) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)]


def _imported_names(tree: ast.AST) -> dict[str, str]:
    """Map imported names to full ones: `np` → `numpy`."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return names


def _full_name(node: ast.AST, names: dict[str, str]) -> str:
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name):
        return ""
    return ".".join([names.get(node.id, node.id), *reversed(parts)])


def test_no_file_runs_what_it_reads() -> None:
    found = {file: list(dangers(ast.parse(file.read_text("utf-8")))) for file in PRODUCT}
    assert {file: lines for file, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from pickle import loads",
        "from _pickle import Unpickler",
        "eval(text)",
        "exec(text)",
        "run = exec",
        "map(eval, texts)",
        "import builtins; builtins.exec(text)",
        "__import__('os')",
        "compile(text, '', 'exec')",
        "import torch; torch.load(file)",
        "import torch; torch.load(file, weights_only=False)",
        "import torch; torch.load(file, weights_only=trusted)",
        "import torch as t; t.load(file)",
        "from torch import load; load(file)",
        "from torch.serialization import load; load(file)",
        "from torch.serialization import add_safe_globals; add_safe_globals([x])",
        "from functools import partial; partial(anything, weights_only=False)",
        "import torch; torch.hub.load('a', 'b')",
        "import numpy as np; np.load(file)",
        "import numpy as np; np.load(file, allow_pickle=True)",
        "from numpy import load; load(file)",
        "import subprocess; subprocess.run(text, shell=True)",
        "import os; os.system(text)",
        "from os import system",
        "import tempfile; tempfile.mktemp()",
        "archive.extractall(folder)",
        "server.bind(('0.0.0.0', 80))",
    ],
)
def test_dangers_finds(code: str) -> None:
    assert list(dangers(ast.parse(code))) != []


@pytest.mark.parametrize(
    "code",
    [
        "net.eval(); model.compile(); re.compile('a')",
        "import torch; torch.load(f, weights_only=True); torch.compile(net)",
        "import numpy as np; np.load(f, allow_pickle=False); np.save(f, x, allow_pickle=False)",
        "import json; json.load(file)",
        "import subprocess; subprocess.run(['ls']); os.execv(a, b)",
        "import pickletools",
    ],
)
def test_dangers_ignores(code: str) -> None:
    assert list(dangers(ast.parse(code))) == []


def network_imports(tree: ast.AST) -> set[str]:
    """Return the imported modules that open connections; `socket` does not if only `socket.gethostname` is used."""
    imported = {
        name for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom) for name in _modules(node)
    }
    names = _imported_names(tree)
    uses = {_full_name(node, names) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    if {use for use in uses if use.startswith("socket.")} == {"socket.gethostname"}:
        imported.discard("socket")
    return {name for name in imported for used in _NETWORK if name == used or name.startswith(used + ".")}


def test_only_models_download_uses_the_network() -> None:
    users = {file.relative_to(ROOT) for file in PRODUCT if network_imports(ast.parse(file.read_text("utf-8")))}
    assert users == {Path("fastnst/models/files/download.py")}
    assert network_imports(ast.parse("import urllib.error, json, socketfoo")) == set()
    assert network_imports(ast.parse("from urllib import request")) == {"urllib.request"}
    assert network_imports(ast.parse("import socket; socket.gethostname(); socket.socket()")) == {"socket"}
    assert network_imports(ast.parse("from socket import socket")) == {"socket", "socket.socket"}
