#!/usr/bin/env bash
# Make the environment if need be, then run the tests.
#
#   scripts/test.sh [PYTEST ARGUMENT…]      for example: scripts/test.sh tests/test_config.py -k preset
#
# Paths are relative to the project's root. FASTNST_VENV and PYTHON: see setup.sh.
set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
venv=${FASTNST_VENV:-$root/.venv}
[[ $venv == /* ]] || venv=$PWD/$venv
FASTNST_VENV=$venv "$root/scripts/setup.sh" test demo
cd -- "$root"
exec "$venv/bin/python" -m pytest "$@"
