#!/usr/bin/env bash
# Make the environment if need be, then run the tests, one process per core up to four.
#
#   scripts/test.sh [PYTEST ARGUMENT…]      for example: scripts/test.sh tests/config/test_config.py -k preset
#
# Paths are relative to the project's root. FASTNST_VENV and PYTHON: see setup.sh. `-n 0` keeps to one process.
set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
venv=${FASTNST_VENV:-$root/.venv}
[[ $venv == /* ]] || venv=$PWD/$venv
FASTNST_VENV=$venv "$root/scripts/setup.sh" test demo
cd -- "$root"
cores=$(nproc)
# More processes than that would fight for a GPU's memory. Tests of benchmarks run pytest-benchmark in processes of their
# own; in these it could measure nothing.
exec "$venv/bin/python" -m pytest -n "$((cores < 4 ? cores : 4))" --benchmark-disable "$@"
