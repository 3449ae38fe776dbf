#!/usr/bin/env bash
# Test and measure on a GPU, in less than nine minutes and without a network: kernel tests, kernel benchmarks, training
# steps beside plain PyTorch, loaders; tables, a plot, one page.
#
#   scripts/gpu_report.sh [--all] [--smoke] [--dry-run]
#
#   --all       every batch size and torch.compile's max-autotune, without a time limit
#   --smoke     a few small cases, to try this script, also without a GPU
#   --dry-run   print the commands, run none
#
#   OUT=/folder/for/results          default: benchmarks/results/gpu_DATE
#   PHOTOS=/folder/of/photos         read by the loaders, for example COCO's train2017; without it they are skipped
#   PYTHON=/path/to/python           default: the project's environment, else python3; the project need not be installed
#   FASTNST_REVISION=COMMIT          the revision to report where there is no git history
#
# A step that fails is reported, the others run, and the exit code is 1. A step without its photos or packages is skipped
# with a line, which is no failure. Results: report.md (all tables), kernels, end_to_end and, with PHOTOS, data_pipeline
# as .json; kernels.png, environment.txt, log.txt.
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

# Seconds for all steps together; each has its own limit, so that one that hangs leaves time for the others.
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

# skip NAME REASON
skip() {
    if [[ -n $dry ]]; then
        printf '%s: left out: %s\n' "$1" "$2"
    else
        printf '\n== %s: left out: %s\n' "$1" "$2" | tee -a "$out/log.txt"
    fi
}

# lacks PACKAGE…: prints the names of those that cannot be imported
lacks() {
    local package
    for package in "$@"; do
        "$python" -c "import $package" >/dev/null 2>&1 || printf '%s ' "$package"
    done
}

environment() {
    "$python" -m kernel_bench.environment
    if command -v nvidia-smi >/dev/null; then
        nvidia-smi --format=csv --query-gpu=name,driver_version,memory.total,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit,temperature.gpu
    fi
}

# benchmarks NAME SECONDS SELECTION: in one process each, so that a kernel that hangs loses no other's results. They start
# no new case shortly before their limit, because an aborted process writes no results.
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
    environment 2>&1 | tee "$out/environment.txt" || failed+=("environment")
fi

# Compilation dominates the time before measuring: use all cores if pytest-xdist is installed.
parallel=()
if [[ -z $smoke ]] && "$python" -c 'import xdist' 2>/dev/null; then parallel=(-n "$(($(nproc) < 12 ? $(nproc) : 12))" --dist loadgroup); fi
# pytest-benchmark would warn about parallel processes.
tests=tests/kernels
[[ -z $smoke ]] || tests=tests/kernels/test_max_pool.py
step "kernel tests on the GPU" 75 "$python" -m pytest $tests -m gpu -q -p no:cacheprovider -p no:benchmark \
    ${parallel[@]+"${parallel[@]}"}
if [[ -n $smoke ]]; then
    benchmarks smoke 300 "2x16x16x16 or 2x32x16x16 or 2x3x48x48"
else
    if ((${#parallel[@]})); then
        step "check of every provider" 45 "$python" -m pytest benchmarks/ -q -p no:cacheprovider --benchmark-disable \
            --kernel-batch 16 --kernel-providers fastnst,eager,compile "${parallel[@]}"
    fi
    benchmarks instance_norm 50 instance_norm
    benchmarks gram 35 "style_loss or gram_matrix"
    benchmarks pool 35 "max_pool2d or max_unpool2d or uint8_to_input or output_to_vgg_input"
    benchmarks loss_relu 35 loss_relu_backward
    benchmarks batch_norm 45 batch_norm
fi

# Training steps and loaders. Autotuning compiled steps takes minutes with a cold cache, so they have their own process;
# the largest batch comes first, and results are written batch by batch.
photos=${PHOTOS:-}
missing=$(lacks pydantic)
if [[ -n $missing ]]; then
    skip "training steps" "no ${missing% }"
elif [[ -n $smoke ]]; then
    step "training steps" 60 "$python" benchmarks/end_to_end.py --preset johnson --image-size 16 --batch-size 1 --steps 2 \
        --providers fastnst,eager_fp32 --json "$out/end_to_end.json" --markdown "$parts/end_to_end.md"
else
    steps=50 compiled=32
    [[ -z $all ]] || steps=200 compiled=32,16,4
    step "training steps" 60 "$python" benchmarks/end_to_end.py --image-size 256 --batch-size 32,16,4 --steps $steps \
        --providers fastnst,eager_fp32,eager_channels_last,eager_amp --json "$out/end_to_end.json" \
        --markdown "$parts/end_to_end.md"
    step "training steps, compiled" 75 "$python" benchmarks/end_to_end.py --image-size 256 --batch-size $compiled \
        --steps $steps --providers fastnst,compile --json "$out/end_to_end_compiled.json" \
        --markdown "$parts/end_to_end_compiled.md"
fi
missing=$(lacks pydantic click nvidia.dali)
if [[ -z $photos ]]; then
    skip "data pipeline" "PHOTOS names no folder of photographs"
    skip "training steps fed by the loader" "PHOTOS names no folder of photographs"
elif [[ -n $missing ]]; then
    skip "data pipeline" "no ${missing% }"
    skip "training steps fed by the loader" "no ${missing% }"
else
    step "data pipeline" 20 "$python" benchmarks/data_pipeline.py --folder "$photos" --device auto --batch-size 32 \
        --batches 50 --repeats 1 --workers "$(nproc)" --json "$out/data_pipeline.json"
    step "training steps fed by the loader" 25 "$python" benchmarks/end_to_end.py --image-size 256 --batch-size 32 \
        --steps 200 --providers fastnst --folder "$photos" --json "$out/end_to_end_fed.json" \
        --markdown "$parts/end_to_end_fed.md"
fi
found=("$parts/…")
if [[ -z $dry ]]; then
    found=()
    for file in "$parts"/*.json; do
        [[ ! -s $file ]] || found+=("$file") # a killed process leaves an empty one
    done
fi
step "report" 20 "$python" benchmarks/report.py ${found[@]+"${found[@]}"} --merge "$out/kernels.json" \
    --markdown "$out/kernels.md" --plot "$out/kernels.png"
[[ -z $dry ]] || exit 0

# One page with all results.
for page in "$parts"/end_to_end.md "$parts"/end_to_end_compiled.md "$parts"/end_to_end_fed.md "$out"/kernels.md; do
    [[ ! -s $page ]] || { cat -- "$page" && printf '\n'; }
done >"$out/report.md"
if [[ -s $out/data_pipeline.json ]]; then
    {
        printf '# Loaders\n\n```\n'
        sed -n '/^== data pipeline$/,/^== data pipeline: exit/p' "$out/log.txt" | grep 'images/s' || true
        printf '```\n'
    } >>"$out/report.md"
fi
if [[ -s $out/kernels.json ]]; then rm -r -- "$parts"; fi
if ((${#failed[@]})); then
    printf 'gpu_report: failed: %s; see %s\n' "$(printf '%s, ' "${failed[@]}" | sed 's/, $//')" "$out/log.txt" >&2
    exit 1
fi
printf 'gpu_report: results in %s\n' "$out"
