#!/bin/bash
# Ask one GPU what weightd must know of it, in one call that ends by itself, the most telling first.
#
#   tools/gpu_day.sh [first|second] [SECONDS]               565, or 280 for the second, which does what can wait
#   tools/gpu_day.sh --rehearse [first|second] [SECONDS]    on the test double: says that it runs, and measures nothing
#
# For a bare machine with one idle GPU and no network. It needs Python 3.11 or later, as $PYTHON or python3, with torch,
# safetensors, numpy, cuda-bindings, cuda-core, nvidia-ml-py, grpcio, protobuf, xxhash, typer, rich, pytest, pytest-xdist
# and pytest-timeout, and for parts of it transformers and gcc. Of the rest it installs what is missing from wheels in
# .whl (`make gpu-wheels` puts them there) into a temporary folder.
#
# Each stage has an end of its own, in percent of SECONDS, and what it leaves is the next one's: a stage that fails or
# hangs costs only itself. Its log and all that it writes go into $OUT/STAGE.tar.gz; $OUT/summary.txt says how each ended
# and how long it took. OUT is build/gpu-day-first or -second unless it is set. Exit code 1 where a stage did not end well.
set -u
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PYTHON=${PYTHON:-python3}
SURVIVAL="tests/systemd/test_restart.py tests/systemd/test_survival.py tests/integration/test_gpu.py
    tests/integration/test_lifetimes.py tests/contract/test_device.py tests/contract/test_segment_io.py
    tests/fault/test_clients.py tests/fault/test_loader.py tests/integration/test_loads.py tests/integration/test_torch.py"
FALLBACK="tests/integration/test_gpu.py tests/integration/test_torch.py tests/contract/test_segment_io.py"
CARRIED="grpc_health:grpcio-health-checking grpc_reflection:grpcio-reflection hypothesis:hypothesis
    sortedcontainers:sortedcontainers"

main() {
    REHEARSING=
    if [ "${1-}" = --rehearse ]; then
        REHEARSING=yes
        shift
    fi
    local part=${1:-first}
    case $part in
    first) TOTAL=${2:-565} ;;
    second) TOTAL=${2:-280} ;;
    *) sed -n '2,/^set/s/^#  *//p' "$0" && exit 2 ;;
    esac
    OUT=$(realpath -m "${OUT:-$ROOT/build/gpu-day-$part}")
    WORK=$(mktemp -d)
    trap 'rm -rf "$WORK"' EXIT
    mkdir -p "$OUT"
    set -m # or a stage, which runs in the background, would ignore interrupts
    SECONDS=0
    FAILED=0
    cd "$ROOT" || exit 1
    export PYTHON REHEARSING WORK PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PYTEST_DISABLE_PLUGIN_AUTOLOAD=1
    export PYTHONPATH=$ROOT/client:$ROOT/daemon:$WORK/site${PYTHONPATH:+:$PYTHONPATH}
    [ -z "$REHEARSING" ] || rehearse || exit 1
    say "part $part, at most $TOTAL s${REHEARSING:+; a rehearsal on the test double: nothing in it is measured}"
    "$part"
    say "ended after $SECONDS s; results in $OUT"
    exit $FAILED
}

first() {
    stage facts 6 facts
    stage smoke 13 smoke
    stage probe 43 probe
    stage survival 65 tests gpu-cuda_vmm $SURVIVAL
    stage load-attach 83 bench load,attach "$(scale 0.25)"
    stage pieces 91 pieces
    stage cuda-ipc 100 tests gpu-cuda_ipc $FALLBACK
}

second() {
    stage facts 12 facts
    stage compute 30 bench compute "$(scale 0.125)"
    stage memory 60 bench memory "$(scale 0.125)"
    stage workload 100 bench workload "$(scale 0.125)"
}

# A thousandth of the bytes will do for a rehearsal.
scale() { [ -n "$REHEARSING" ] && echo 0.001 || echo "$1"; }

say() { echo "=== $*" | tee -a "$OUT/summary.txt"; }

# Build the test double of the driver, and let every stage find it in place of one.
rehearse() {
    local variables
    mkdir "$WORK/double"
    variables=$(PYTHONPATH=tests $PYTHON - "$WORK/double" <<'END'
import shlex, sys
from pathlib import Path
from support import fakecuda
folder = Path(sys.argv[1])
fakecuda.build(folder)
for name, value in fakecuda.environment(folder, memory=64 << 30, context=300 << 20).items():
    print(f"export {name}={shlex.quote(value)}")
END
    ) && eval "$variables"
}

# stage NAME PERCENT FUNCTION [ARGUMENT…]: run it until that much of the time is over, in a shell of its own.
stage() {
    local name=$1 end=$((TOTAL * $2 / 100)) start=$SECONDS status
    shift 2
    if ((end - start < 3)); then
        say "$name: left out, no time is left"
        FAILED=1
        return
    fi
    mkdir -p "$WORK/$name"
    timeout --signal=INT --kill-after=10 $((end - start)) "$ROOT/tools/gpu_day.sh" --stage "$WORK/$name" "$@" >"$WORK/$name/log" 2>&1 &
    local pid=$!
    while kill -0 $pid 2>/dev/null && ((SECONDS < end + 12)); do sleep 0.2; done
    if kill -0 $pid 2>/dev/null; then
        status="not to be killed: left behind" # a process that waits for a driver may be so
    else
        wait $pid
        status=$?
        case $status in 124 | 137) status="$status, out of time" ;; esac
    fi
    [ "$status" = 0 ] || FAILED=1
    say "$name: rc $status, $((SECONDS - start)) s"
    tail -n 8 "$WORK/$name/log" | cut -c 1-200
    tar -czf "$OUT/$name.tar.gz" -C "$WORK" "$name"
}

# -- stages: each runs in a shell of its own, with RESULTS as the folder for what it writes ----------------------------

facts() {
    echo "Python: $($PYTHON --version), $(command -v $PYTHON)"
    install_carried
    $PYTHON - <<'END'
import importlib.metadata as metadata, importlib.util as util
for name in ("torch cuda-bindings cuda-core nvidia-ml-py grpcio grpcio-health-checking grpcio-reflection protobuf xxhash numpy "
             "safetensors transformers pytest pytest-xdist pytest-timeout hypothesis typer rich").split():
    try:
        print(f"{name} {metadata.version(name)}")
    except metadata.PackageNotFoundError:
        print(f"{name}: NOT INSTALLED")
END
    nvidia-smi -L
    nvidia-smi --format=csv --query-gpu=name,driver_version,persistence_mode,compute_mode,mig.mode.current,memory.used,ecc.mode.current,pcie.link.gen.current,pcie.link.width.current
    nvidia-smi --format=csv --query-compute-apps=pid,name,used_memory
    ls -l /dev/nvidia*
    grep nvidia /proc/devices
    cat /proc/driver/nvidia/version /proc/driver/nvidia/gpus/*/information
    pgrep -a persistenced || echo "nvidia-persistenced: no process"
    uname -r
    nproc
    free -g | head -n 2
    df -h "$WORK" | tail -n 1
    id -u
    command -v gcc cc make systemd-analyze nvidia-modprobe
    true # that a question has no answer is one
}

# Install from .whl what this Python cannot import.
install_carried() {
    local missing
    missing=$($PYTHON - $CARRIED <<'END'
import importlib.util, sys
print(*(pair.split(":")[1] for pair in sys.argv[1:] if importlib.util.find_spec(pair.split(":")[0]) is None))
END
    )
    [ -n "$missing" ] || return 0
    echo "installing $missing"
    $PYTHON -m pip install --quiet --no-index --find-links "$ROOT/.whl" --no-deps --no-compile --target "$WORK/site" $missing
}

smoke() { $PYTHON tools/gpu_smoke.py --folder "$WORK"; }

probe() {
    if [ -n "$REHEARSING" ]; then
        $PYTHON tools/gpu_probe.py # which writes no page of a double
    else
        $PYTHON tools/gpu_probe.py --write "$RESULTS/gpu-facts.md"
    fi
}

# tests BACKEND FILE…
tests() {
    local backend=$1 workers=8 gpu=hardware
    shift
    [ -z "$REHEARSING" ] || { workers=2 && gpu=double; } # which leaves out what needs torch.cuda
    $PYTHON -m pytest -p xdist -p timeout -p no:cacheprovider -v -n $workers --dist load --maxschedchunk 1 \
        --timeout 60 -m gpu --gpu=$gpu -k "$backend" "$@"
}

# bench PARTS SCALE
bench() { $PYTHON bench/gpu.py --only "$1" --scale "$2" --rounds 3 --folder "$WORK" --results "$RESULTS"; }

pieces() { $PYTHON bench/pieces.py --folder "$WORK" --size "$([ -n "$REHEARSING" ] && echo 64MiB || echo 2GiB)"; }

if [ "${1-}" = --stage ]; then
    RESULTS=$2
    shift 2
    "$@"
else
    main "$@"
fi
