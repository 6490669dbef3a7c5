#!/usr/bin/env bash
# Train, evaluate or test, setting up what is missing:
#   ./run.sh [flags]              train; without shards or GPU, the demo (./run.sh --help: all flags)
#   ./run.sh fineweb|tokenize [flags]  get shards, or make them of texts (data/)
#   ./run.sh eval|sample|convert|report|bench|plan|tracks|gain [flags]  a tool of records/
#   ./run.sh test [pytest flags]  run the tests
# NPROC (processes on this machine), NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT and MAX_RESTARTS go to torchrun.
set -euo pipefail
cd "$(dirname "$0")"

satisfies() {  # does this Python have what the command needs?
    "$1" - "${2:-train}" 2>/dev/null <<'PY'
import re, sys
from importlib.metadata import version
if sys.version_info < (3, 11): sys.exit(1)
lines = [l.split("==")[0] for l in open("requirements.txt") if "==" in l]
for name in lines if sys.argv[1] == "test" else lines[:7]:
    version(name)
sys.exit(tuple(map(int, re.findall(r"\d+", version("torch"))[:2])) < (2, 11))
PY
}

python=$(command -v python || command -v python3 || true)
[ -n "$python" ] || { echo "run.sh: error: no python on the PATH; install Python 3.11 or newer" >&2; exit 2; }
if ! satisfies "$python" "${1:-}"; then
    if ! satisfies .venv/bin/python "${1:-}"; then
        "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
            { echo "run.sh: error: $python is too old; install Python 3.11 or newer" >&2; exit 2; }
        echo "run.sh: installing requirements.txt into .venv"
        "$python" -m venv .venv
        .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
    fi
    python=.venv/bin/python
fi

demo_data() {
    [ -e data/demo/dataset.json ] ||
        "$python" data/tokenize_text.py --stdlib --encoding bytes --name demo --out data/demo
}

# glibc gives large blocks back to the kernel, which clears them page by page when a step asks again: keep them.
export MALLOC_MMAP_THRESHOLD_=${MALLOC_MMAP_THRESHOLD_:-1073741824}
export MALLOC_TRIM_THRESHOLD_=${MALLOC_TRIM_THRESHOLD_:-2147483647}

case "${1:-train}" in
    test) shift; exec "$python" -m pytest -q test_skip.py "$@" ;;
    eval) shift; exec "$python" records/evaluate.py "$@" ;;
    sample|convert|report|bench|plan|tracks|gain)
        tool=$1; shift
        case "$tool ${1:-}" in "tracks run"|"tracks time"|gain*) demo_data ;; esac
        exec "$python" "records/$tool.py" "$@" ;;
    fineweb) shift; exec "$python" data/fineweb.py "$@" ;;
    tokenize) shift; exec "$python" data/tokenize_text.py "$@" ;;
    train) shift || true ;;
esac

gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())')
shards=$(compgen -G 'data/fineweb10B/fineweb_train_*.bin' >/dev/null && echo yes || echo no)
chosen=no  # did the flags choose a model or data themselves?
for flag in "$@"; do
    case "${flag%%=*}" in
        --help|-h) chosen=yes NPROC=1 ;;
        --preset|--config|--resume|--init_from|--train_files) chosen=yes ;;
    esac
done
if [ "$chosen" = no ] && [ "$gpus" -gt 0 ] && [ "$shards" = yes ]; then
    set -- --preset gated "$@"
elif [ "$chosen" = no ]; then
    [ "$gpus" -gt 0 ] || echo "run.sh: no GPU: training the demo, a small byte-level model"
    [ "$shards" = yes ] || echo "run.sh: no shards in data/fineweb10B: training the demo on Python's standard" \
        "library; get FineWeb with: ./run.sh fineweb"
    set -- --preset demo "$@"
fi
words=("${@#--*=}")
if [[ " $* " == *" --preset"[\ =]"demo "* ]] || grep -qs data/demo/ -- "${words[@]}" "${words[@]/%//config.json}"; then
    NPROC=${NPROC:-1}  # its batch is for one device
    demo_data
fi

nproc=${NPROC:-$((gpus > 0 ? gpus : 1))}
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
if [ "$nproc" -eq 1 ] && [ "${NNODES:-1}" -eq 1 ] && [ -z "${MAX_RESTARTS:-}" ]; then
    exec "$python" train_gpt_skip.py "$@"
fi
where="--standalone"
[ "${NNODES:-1}" -eq 1 ] || where="--nnodes $NNODES --node_rank ${NODE_RANK:-0} --master_addr ${MASTER_ADDR:-127.0.0.1}
    --master_port ${MASTER_PORT:-29500}"
# shellcheck disable=SC2086  # $where is several words
exec "$python" -m torch.distributed.run $where --nproc_per_node "$nproc" --max_restarts "${MAX_RESTARTS:-0}" \
    train_gpt_skip.py "$@"
