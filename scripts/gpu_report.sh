#!/usr/bin/env bash
# Everything that only a GPU can tell, in less than nine minutes and without a network: the kernel tests on it, the
# kernel benchmarks, their table and picture.
#
#   scripts/gpu_report.sh [--all] [--smoke] [--dry-run]
#
#   --all       every batch size and torch.compile's max-autotune, too, and as long as that takes
#   --smoke     a few small cases, to try this script; the only thing it is good for without a GPU
#   --dry-run   print the commands, run none
#
#   OUT=/folder/for/results          default: benchmarks/results/gpu_DATE
#   PYTHON=/path/to/python           default: the project's environment, else python3; the project need not be installed
#   FASTNST_REVISION=COMMIT          what to call the code where the tree travelled without its history
#
# What fails is reported and the rest goes on; the exit code is then 1. It leaves environment.txt, log.txt, kernels.json,
# kernels.md and kernels.png.
set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
all="" smoke="" dry=""
for argument in "$@"; do
    case $argument in
        --all) all=1 ;;
        --smoke) smoke=1 ;;
        --dry-run) dry=1 ;;
        *)
            echo "gpu_report: unknown argument '$argument'; known: --all, --smoke, --dry-run" >&2
            exit 2
            ;;
    esac
done

python=${PYTHON:-}
if [[ -z $python ]]; then
    python=python3
    [[ ! -x $root/.venv/bin/python ]] || python=$root/.venv/bin/python
fi
out=${OUT:-$root/benchmarks/results/gpu_$(date -u +%Y-%m-%d)}
[[ $out == /* ]] || out=$PWD/$out
cd -- "$root"
export PYTHONPATH=$root:$root/kernels:$root/benchmarks${PYTHONPATH:+:$PYTHONPATH}
export PYTHONUNBUFFERED=1

# What the steps together may take; each has a limit of its own, so that one that hangs leaves time for the others.
deadline=525
[[ -z $all ]] || deadline=1000000
failed=()

# step NAME SECONDS COMMAND…
step() {
    local name=$1 limit=$2 status=0
    shift 2
    if [[ -n $all ]]; then limit=7200; fi
    local left=$((deadline - SECONDS))
    ((limit <= left)) || limit=$left
    if [[ -n $dry ]]; then
        printf '%s (at most %d s): %s\n' "$name" "$limit" "$*"
        return
    fi
    if ((limit < 10)); then
        printf 'gpu_report: no time is left for %s\n' "$name" | tee -a "$out/log.txt"
        failed+=("$name")
        return
    fi
    printf '\n== %s\n' "$name" | tee -a "$out/log.txt"
    local began=$SECONDS
    timeout --kill-after=5 "$limit" "$@" 2>&1 | tee -a "$out/log.txt" || status=${PIPESTATUS[0]}
    printf '== %s: exit code %d after %d s\n' "$name" "$status" $((SECONDS - began)) | tee -a "$out/log.txt"
    ((status == 0)) || failed+=("$name")
}

facts() {
    "$python" -m kernel_bench.environment
    if command -v nvidia-smi >/dev/null; then
        nvidia-smi --format=csv --query-gpu=name,driver_version,memory.total,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit,temperature.gpu
    fi
}

# benchmarks NAME SECONDS SELECTION: in a process of their own, so that a kernel that hangs takes no other's figures along.
# They stop beginning new cases well before their limit, because what is cut off leaves no figures at all.
benchmarks() {
    local options=(--kernel-batch 16 --kernel-providers fastnst,eager,compile,copy --kernel-seconds $(($2 - 20)))
    [[ -z $all ]] || options=(--kernel-batch 4,16,32)
    [[ -z $smoke ]] || options=(--kernel-sizes small --kernel-batch 2 --kernel-rounds 3 --kernel-providers fastnst,eager,copy)
    step "benchmarks of $1" "$2" "$python" -m pytest benchmarks/ -q -p no:cacheprovider --benchmark-quiet \
        -k "$3" "${options[@]}" --benchmark-json "$parts/$1.json"
}

parts=$out/parts
if [[ -z $dry ]]; then
    mkdir -p -- "$parts"
    : >"$out/log.txt"
    facts 2>&1 | tee "$out/environment.txt" || failed+=("environment")
fi

# Compiling is most of the work before anything can be timed, and goes to all cores where pytest-xdist is at hand.
parallel=()
if "$python" -c 'import xdist' 2>/dev/null; then parallel=(-n "$(($(nproc) < 12 ? $(nproc) : 12))" --dist loadgroup); fi
# pytest-benchmark has no part in the tests, and would remark on the parallel processes.
tests=tests/kernels
[[ -z $smoke ]] || tests=tests/kernels/test_max_pool.py
step "kernel tests on the GPU" 120 "$python" -m pytest $tests -m gpu -q -p no:cacheprovider -p no:benchmark \
    ${parallel[@]+"${parallel[@]}"}
if [[ -n $smoke ]]; then
    benchmarks smoke 300 "2x16x16x16 or 2x32x16x16"
else
    if ((${#parallel[@]})); then
        step "check of every provider" 55 "$python" -m pytest benchmarks/ -q -p no:cacheprovider --benchmark-disable \
            --kernel-batch 16 --kernel-providers fastnst,eager,compile "${parallel[@]}"
    fi
    benchmarks instance_norm 80 instance_norm
    benchmarks gram 50 "style_loss or gram_matrix"
    benchmarks pool 50 "max_pool2d or max_unpool2d"
    benchmarks tap 40 tap_backward
    benchmarks batch_norm 80 batch_norm
fi
found=("$parts/…")
if [[ -z $dry ]]; then
    found=()
    for file in "$parts"/*.json; do
        [[ ! -s $file ]] || found+=("$file") # what was killed may have left an empty one
    done
fi
step "report" 60 "$python" benchmarks/report.py ${found[@]+"${found[@]}"} --merge "$out/kernels.json" \
    --markdown "$out/kernels.md" --plot "$out/kernels.png"
[[ -z $dry ]] || exit 0

if [[ -s $out/kernels.json ]]; then rm -r -- "$parts"; fi
if ((${#failed[@]})); then
    printf 'gpu_report: failed: %s; see %s\n' "$(printf '%s, ' "${failed[@]}" | sed 's/, $//')" "$out/log.txt" >&2
    exit 1
fi
printf 'gpu_report: all is in %s\n' "$out"
