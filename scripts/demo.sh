#!/usr/bin/env bash
# Set up the environment if need be, then train a small style and stylize a photo with it.
#
#   scripts/demo.sh [DEMO ARGUMENT…]      for example: scripts/demo.sh --out runs/second --vgg random
#
# Paths are relative to the project's root. FASTNST_VENV and PYTHON: see setup.sh.
set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
venv=${FASTNST_VENV:-$root/.venv}
[[ $venv == /* ]] || venv=$PWD/$venv
FASTNST_VENV=$venv "$root/scripts/setup.sh" demo
cd -- "$root"
exec "$venv/bin/fastnst" demo "$@"
