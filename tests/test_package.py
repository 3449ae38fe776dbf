"""What `import fastnst` does: little, and nothing that torch must be loaded for."""

import os
import subprocess
import sys

import pytest

_SPIN = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
_SHOW = "import os, fastnst; print(os.environ.get('GOMP_SPINCOUNT'), os.environ.get('OMP_WAIT_POLICY'))"


def shown(code: str, **variables: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name not in _SPIN} | variables
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()


def test_import_bounds_the_spin_of_threads_before_torch_is_loaded() -> None:
    count, policy = shown(_SHOW).split()
    assert 1000 <= int(count) <= 10_000
    assert policy == "None"
    assert shown("import fastnst, sys; print('torch' in sys.modules)") == "False"


@pytest.mark.parametrize(("name", "value"), [("GOMP_SPINCOUNT", "7"), ("GOMP_SPINCOUNT", ""), ("OMP_WAIT_POLICY", "A")])
def test_import_leaves_a_chosen_spin_alone(name: str, value: str) -> None:
    code = f"import os, fastnst; print([os.environ.get(name) for name in {_SPIN}])"
    assert shown(code, **{name: value}) == str([value if each == name else None for each in _SPIN])


def test_import_sets_nothing_that_a_loaded_torch_would_not_read() -> None:
    loaded = "import sys, types; sys.modules['torch'] = types.ModuleType('torch'); "
    assert shown(loaded + _SHOW) == "None None"
