#!/usr/bin/env bash
# Train, or look at what was trained, setting up what is missing:
#   ./run.sh [--flags]             train; without shards or GPU, the demo (the flags are below)
#   ./run.sh test                  run the tests (further flags go to pytest)
# Commands, each with flags of its own (--help):
#   fineweb, tokenize              get shards, or make them of texts
#   eval, sample, convert          take a checkpoint: its loss and who skips; text; other layouts
#   show, report, tracks           one run; all records; comparisons by seeds
#   bench                          time this machine
# ./run.sh --dry_run [--flags] checks all that a run needs, prints its plan and writes nothing.
# NPROC (processes on this machine), NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT go to torchrun. MAX_RESTARTS=3
# starts a run again from its last checkpoint where it fails (one machine; on several, relaunch with --resume).
set -euo pipefail
cd "$(dirname "$0")"

fail() { echo "run.sh: error: $*" >&2; exit 2; }

case "${1:---}" in
    --help|-h) sed -n '2,/^set/s/^# \{0,1\}//p' run.sh ;;
    -*|test|fineweb|tokenize|eval|sample|convert|show|report|tracks|bench) ;;
    *) fail "there is no command $1; there are test, fineweb, tokenize, eval, sample, convert, show, report," \
            "tracks and bench, and without any ./run.sh trains (--help)" ;;
esac

satisfies() {  # has this Python what the command needs?
    "$1" - "${2:-train}" 2>/dev/null <<'PY'
import re, sys
from importlib.metadata import version
runtime, _, further = open("requirements.txt").read().partition("# only for")
names = re.findall(r"^([\w-]+)==", runtime + further * (sys.argv[1] == "test"), re.M)
versions = {name: version(name) for name in names}
sys.exit(sys.version_info < (3, 11) or tuple(map(int, re.findall(r"\d+", versions["torch"])[:2])) < (2, 11))
PY
}

python=$(command -v python || command -v python3 || true)
[ -n "$python" ] || fail "no python on the PATH; install Python 3.11 or newer"
if ! satisfies "$python" "${1:-}"; then
    if ! satisfies .venv/bin/python "${1:-}"; then
        "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
            fail "$python is too old; install Python 3.11 or newer"
        echo "run.sh: installing requirements.txt into .venv"
        "$python" -m venv .venv
        .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
    fi
    python=.venv/bin/python
fi

demo_data() {
    [ -e data/demo/dataset.json ] ||
        "$python" data/tokenize_text.py --stdlib --encoding bytes --name demo --out data/demo |
            sed '/^next:/d'  # (this run is)
}

# glibc gives large blocks back to the kernel, which clears them page by page when a step asks again: keep them.
export MALLOC_MMAP_THRESHOLD_=${MALLOC_MMAP_THRESHOLD_:-1073741824}
export MALLOC_TRIM_THRESHOLD_=${MALLOC_TRIM_THRESHOLD_:-2147483647}

case "${1:-}" in
    test) shift; exec "$python" -m pytest -q test_skip.py "$@" ;;
    fineweb) shift; exec "$python" data/fineweb.py "$@" ;;
    tokenize) shift; exec "$python" data/tokenize_text.py "$@" ;;
    eval) shift; exec "$python" records/evaluate.py "$@" ;;
    sample|convert|show|report|tracks|bench)
        [ "$1 ${2:-}" != "tracks time" ] || demo_data
        tool=$1; shift
        exec "$python" "records/$tool.py" "$@" ;;
esac

gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())')
shards=$(compgen -G 'data/fineweb10B/fineweb_train_*.bin' >/dev/null && echo yes || echo no)
chosen=no  # did the flags choose a model or data themselves?
program=train_gpt_skip.py records=records
args=() previous=
for word in "$@"; do
    case "${word%%=*}" in
        --help|-h) chosen=yes NPROC=1 ;;
        --dry_run) program=records/dry_run.py; continue ;;
        --preset|--config|--resume|--init_from|--train_files) chosen=yes ;;
    esac
    case "$previous $word" in "--records_dir "*|*" --records_dir="*) records=${word#--*=} ;; esac
    args+=("$word") previous=$word
done
if [ "$chosen" = no ] && [ "$gpus" -gt 0 ] && [ "$shards" = yes ]; then
    args=(--preset gated ${args[@]+"${args[@]}"})
elif [ "$chosen" = no ]; then
    [ "$gpus" -gt 0 ] || echo "run.sh: no GPU: training the demo, a small byte-level model"
    [ "$shards" = yes ] || echo "run.sh: no shards in data/fineweb10B: training the demo on Python's standard" \
        "library; get FineWeb with: ./run.sh fineweb"
    args=(--preset demo ${args[@]+"${args[@]}"})
fi

on_demo_data() {  # by the preset, or by the record that a flag names, live or packed
    for value in "${@#--*=}"; do
        grep -qs data/demo/ -- "$value" "$value/config.json" && return
        grep -s "\"name\":\"${value##*/}\"" -- "${value%/*}/runs.jsonl" | grep -q data/demo/ && return
    done
    [[ " $* " == *" --preset"[\ =]"demo "* ]]
}
if on_demo_data "${args[@]}"; then
    NPROC=${NPROC:-1}  # its batch is for one device
    demo_data
fi

nproc=${NPROC:-$((gpus > 0 ? gpus : 1))}
# A SIGTERM ends a run after its next step, which a validation may keep waiting: torchrun gives it ten minutes.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
launch=("$python")
if [ "$nproc" -gt 1 ] || [ "${NNODES:-1}" -gt 1 ]; then
    launch+=(-m torch.distributed.run --nproc_per_node "$nproc")
    if [ "${NNODES:-1}" -gt 1 ]; then
        launch+=(--nnodes "$NNODES" --node_rank "${NODE_RANK:-0}" --master_addr "${MASTER_ADDR:-127.0.0.1}"
                 --master_port "${MASTER_PORT:-29500}")
    else
        launch+=(--standalone)
    fi
fi
[ -n "${MAX_RESTARTS:-}" ] || exec "${launch[@]}" "$program" "${args[@]}"

resumed=no
case " ${args[*]} " in *" --resume"[\ =]*) resumed=yes ;; esac
began=$(mktemp)
trap 'rm -f "$began"' EXIT
set -m  # the run is a group of its own, so that it hears of Ctrl-C once, from here
for ((left = MAX_RESTARTS; ; left--)); do
    "${launch[@]}" "$program" "${args[@]}" &
    child=$! stopped=no
    trap 'stopped=yes; kill -TERM "$child" 2>/dev/null' TERM INT
    status=0
    wait "$child" || status=$?
    while kill -0 "$child" 2>/dev/null; do  # a signal ended the wait, not the run
        status=0
        wait "$child" || status=$?
    done
    [ "$status" -gt 3 ] || [ "$status" -eq 1 ] || exit "$status"  # done, or nothing that a restart mends
    [ "$stopped" = no ] && [ "$left" -gt 0 ] || exit "$status"
    if [ "$resumed" = no ]; then
        record=
        while IFS= read -r config; do
            flock -n "${config%config.json}metrics.jsonl" true && record=${config%/config.json}  # nobody else's
        done < <(find "$records" -path "*/*/config.json" -newer "$began" 2>/dev/null | sort)
        [ -n "$record" ] || exit "$status"
        args+=(--resume "$record") resumed=yes
    fi
    echo "run.sh: ended with status $status; starting again, $((left - 1)) restarts left"
done
