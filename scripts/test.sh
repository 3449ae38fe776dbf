#!/usr/bin/env bash
# Set up the environment if need be, then run the tests in one process per core, at most four.
#
#   scripts/test.sh [--quick] [PYTEST ARGUMENT…]      for example: scripts/test.sh tests/config/test_config.py -k preset
#
# --quick, as the first argument, leaves out slow tests, for each commit: lint, types, imports, unit tests of every area,
# and a few tiny runs remain. tests/conftest.py says which are slow.
# Paths are relative to the project's root. FASTNST_VENV and PYTHON: see setup.sh. `-n 0` uses one process.
set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
venv=${FASTNST_VENV:-$root/.venv}
[[ $venv == /* ]] || venv=$PWD/$venv
FASTNST_VENV=$venv "$root/scripts/setup.sh" test demo
cd -- "$root"
selection=()
if [[ ${1:-} == --quick ]]; then
    shift
    selection=(-m "not slow and not campaign")
fi
cores=$(env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc) # without them, for it counts as OpenMP does
# More processes would compete for a GPU's memory. pytest-benchmark cannot measure beside other tests: those that need
# it start processes of their own.
exec "$venv/bin/python" -m pytest -n "$((cores < 4 ? cores : 4))" --benchmark-disable ${selection[@]+"${selection[@]}"} "$@"
