#!/usr/bin/env bash
# Set up the environment if need be, then check style, format and types: ruff check, ruff format, mypy.
#
#   scripts/lint.sh [--fix] [CHECK…]      checks: check, format, types; default: all. --fix mends what ruff can mend.
set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
venv=${FASTNST_VENV:-$root/.venv}
[[ $venv == /* ]] || venv=$PWD/$venv
FASTNST_VENV=$venv "$root/scripts/setup.sh" test demo
cd -- "$root"

fix="" checks=()
for argument in "$@"; do
    case $argument in
        --fix) fix=1 ;;
        check | format | types) checks+=("$argument") ;;
        *)
            echo "lint: unknown argument '$argument'; known: --fix, check, format, types" >&2
            exit 2
            ;;
    esac
done
((${#checks[@]})) || checks=(check format types)

failed=0
for check in "${checks[@]}"; do
    case $check in
        check) "$venv/bin/python" -m ruff check ${fix:+--fix} . || failed=1 ;;
        format)
            mode=(--check)
            [[ -z $fix ]] || mode=()
            "$venv/bin/python" -m ruff format ${mode[@]+"${mode[@]}"} . || failed=1
            ;;
        types) "$venv/bin/python" -m mypy || failed=1 ;;
    esac
done
exit "$failed"
