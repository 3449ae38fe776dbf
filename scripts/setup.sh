#!/usr/bin/env bash
# Set up a virtual environment with fastnst, installed in place, and its dependencies.
#
#   scripts/setup.sh [EXTRA…]          extras: test (tests, benchmarks, lint), demo
#
#   PYTHON=/path/to/python             interpreter to use; default: the first of python3, python3.13, … that is usable
#   FASTNST_VENV=/path/to/environment  default: .venv in the project
#
# Returns at once if pyproject.toml, the constraints and the extras have not changed since the last call.
set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
venv=${FASTNST_VENV:-$root/.venv}
[[ $venv == /* ]] || venv=$PWD/$venv
stamp=$venv/fastnst-setup.txt

say() { printf 'setup: %s\n' "$*"; }
fail() {
    printf 'setup: %s\n' "$@" >&2
    exit 1
}

# Prints what is wrong with an interpreter, or nothing. It must be run: a name on the PATH may be a shim without a Python.
fault_of() {
    local version
    version=$("$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || { echo "does not run"; return; }
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "is Python $version; 3.11 or newer is needed"; return; }
    "$1" -c 'import venv, ensurepip' 2>/dev/null ||
        echo "is Python $version without its venv module (Debian and Ubuntu: apt install python$version-venv)"
}

find_python() {
    local candidate fault found=""
    if [[ -n ${PYTHON:-} ]]; then
        fault=$(fault_of "$PYTHON")
        [[ -z $fault ]] || fail "PYTHON=$PYTHON $fault"
        python=$PYTHON
        return
    fi
    for candidate in python3 python3.13 python3.12 python3.11 python3.14 python; do
        command -v "$candidate" >/dev/null || continue
        fault=$(fault_of "$candidate")
        if [[ -z $fault ]]; then
            python=$candidate
            return
        fi
        found+="; $candidate $fault"
    done
    fail "no usable Python found${found}" "install Python 3.11 or newer with its venv module, or name one: PYTHON=/path/to/python"
}

make_venv() {
    local fault="" options=()
    if [[ -e $venv/pyvenv.cfg ]]; then
        fault=$(fault_of "$venv/bin/python")
        [[ -n $fault ]] || return 0
        # Its interpreter is gone, or it was never finished.
        say "$venv/bin/python $fault; making the environment again"
        options=(--clear)
    elif [[ -e $venv && -n $(ls -A -- "$venv" 2>/dev/null || echo "a file") ]]; then
        fail "$venv exists and is not a virtual environment; remove it, or choose another with FASTNST_VENV"
    fi
    find_python
    say "making the environment $venv with $("$python" --version)"
    "$python" -m venv ${options[@]+"${options[@]}"} "$venv" || fail "cannot make the environment $venv; see the message above"
}

# Hash of everything that the installation depends on, the folder included: an installation in place points to it.
fingerprint() {
    { printf '%s\n' "$root" && cat -- "$root/pyproject.toml" "$root/scripts/constraints.txt"; } | sha256sum | cut -d ' ' -f 1
}

wanted=("$@")
for extra in ${wanted[@]+"${wanted[@]}"}; do
    [[ $extra == test || $extra == demo ]] || fail "unknown extra '$extra'; extras: test, demo"
done

# One setup at a time per project; a second one waits and finds the work done.
if command -v flock >/dev/null; then
    exec 9<"${BASH_SOURCE[0]}"
    flock --nonblock 9 || { say "waiting for another setup of this project"; flock 9; }
fi

current=$(fingerprint)
installed_fingerprint="" installed_extras=""
if [[ -r $stamp && -x $venv/bin/python ]]; then
    { read -r installed_fingerprint && read -r installed_extras; } <"$stamp" || true
fi
missing=""
for extra in ${wanted[@]+"${wanted[@]}"}; do
    [[ " $installed_extras " == *" $extra "* ]] || missing+=" $extra"
done
if [[ $installed_fingerprint == "$current" && -z $missing && -z $(fault_of "$venv/bin/python") ]]; then
    exit 0
fi

make_venv
# Keep installed extras, so that demo and tests do not undo each other's work.
extras=$(printf '%s\n' $installed_extras ${wanted[@]+"${wanted[@]}"} | sort -u | paste -s -d ' ')
target="$root"
[[ -z $extras ]] || target="${root}[${extras// /,}]"
say "installing fastnst${extras:+ (${extras// /, })} and its dependencies into $venv; the first time takes minutes"
rm -f -- "$stamp"
quiet=(--quiet)
[[ ! -t 1 ]] || quiet=()  # on a terminal, show pip's progress bars
"$venv/bin/python" -m pip install ${quiet[@]+"${quiet[@]}"} --disable-pip-version-check \
    --constraint "$root/scripts/constraints.txt" --editable "$target" ||
    fail "the installation failed; pip's message above says why (no network? no space left?)" "fix that and run this again"
printf '%s\n%s\n' "$current" "$extras" >"$stamp"
say "ready: $venv/bin/fastnst --help"
