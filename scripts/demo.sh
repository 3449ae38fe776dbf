#!/usr/bin/env bash
# Set up, then train a small style and paint a picture with it. Arguments go to `fastnst demo`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
./scripts/setup.sh demo
exec "${FASTNST_VENV:-.venv}/bin/fastnst" demo "$@"
