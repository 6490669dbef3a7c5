#!/usr/bin/env bash
# The grid of the paper's Figure 2, then the report. Flags go on to every run:
#   records/sweep.sh [flags]
#   records/sweep.sh --preset demo --num_steps 100      a small grid
#   LAYERS="2 4 6" TARGETS="0.0 0.5" records/sweep.sh   fewer runs
# Dense baselines of each depth of LAYERS; at the last of them, gated models without control and with each of TARGETS
# (mean_target_end). What is recorded with the same flags is skipped; what was interrupted goes on. Records lie in
# RECORDS_DIR (or --records_dir), by default records; their names are sweep-DEPTH-dense, -none or -TARGET.
set -euo pipefail
cd "$(dirname "$0")/.."
run=${RUN:-./run.sh}
records=${RECORDS_DIR:-records}
layers="2 4 6 8 10 12"
flags=()
while [ $# -gt 0 ]; do
    case "$1" in
        -h|--help) sed -n '2,/^set/s/^# \{0,1\}//p' records/sweep.sh; exit 0 ;;
        --records_dir) records=${2:?--records_dir needs a folder}; shift ;;
        --records_dir=*) records=${1#*=} ;;
        *) flags+=("$1") ;;
    esac
    shift
done
case " ${flags[*]-} " in *"--preset demo "*|*"--preset=demo "*) layers="2 4 6 8" ;; esac
read -ra layers <<<"${LAYERS:-$layers}"
read -ra targets <<<"${TARGETS:-0.0 0.25 0.5 0.75 1.0}"
depth=${layers[-1]}
for python in ${PYTHON:-python python3 .venv/bin/python}; do  # for the report: the first that has matplotlib
    "$python" -c "import importlib.util as u, sys; sys.exit(not u.find_spec('matplotlib'))" 2>/dev/null && break
done
trap 'echo "sweep.sh: stopped; the same command goes on" >&2; exit 130' INT TERM  # a run ends tidily, with status 0
mkdir -p "$records"
failed=()

recorded() {  # name: "STATE FOLDER" of the newest record of that name and these flags, if any
    "$python" -IS - "$records" "$@" <<'PY'
import json, pathlib, shlex, sys
records, name, *flags = sys.argv[1:]
free = {"name", "device", "device_batch_size", "compile", "log_every", "save_every"}  # may differ, as on resume
def parse(flags):
    words = [w for f in flags for w in (f.split("=", 1) if f.startswith("--") else [f])]
    found = {a[2:].removeprefix("no-"): a[:5] != "--no-" if b[:2] == "--" else b
             for a, b in zip(words, [*words[1:], "--"]) if a[:2] == "--"}
    return {k: v for k, v in found.items() if k not in free}
want = parse(flags)
def value(x):
    try: return float(x)
    except (TypeError, ValueError): return x
def load(path):
    try: return json.loads(path.read_text())
    except (OSError, ValueError): return None
for folder in sorted(pathlib.Path(records).glob("????-??-??_??-??-??_" + name), reverse=True):
    config, summary = load(folder / "config.json"), load(folder / "summary.json")
    given = parse(shlex.split((load(folder / "env.json") or {}).get("command", ""))).keys()
    if config and summary and given <= want.keys() | {"preset", "records_dir"} and all(
            value(config.get(k)) == value(v) for k, v in want.items()):
        print("interrupted" if summary.get("interrupted") else "finished", folder)
        break
PY
}

one() {  # name, its own flags (after the others: the last one wins)
    local name=$1 found
    shift
    found=$(recorded "$name" ${flags[@]+"${flags[@]}"} "$@")
    echo "sweep.sh: $name ${found:-(new)}"
    case "$found" in
        finished*) return ;;
        interrupted*) set -- --resume "${found#* }" ;;
        *) set -- ${flags[@]+"${flags[@]}"} "$@" --name "$name" --records_dir "$records" ;;
    esac
    "$run" "$@" || failed+=("$name")
}

for L in "${layers[@]}"; do  # without control nothing moves, whatever a preset or the flags say
    one "sweep-$L-dense" --control dense --coef_update 0 --n_layers "$L"
done
one "sweep-$depth-none" --control none --coef_update 0 --n_layers "$depth"
for target in "${targets[@]}"; do
    one "sweep-$depth-$target" --control proportional --mean_target_end "$target" --n_layers "$depth"
done
"$python" records/report.py "$records" --out "$records"
[ ${#failed[@]} -eq 0 ] || { echo "sweep.sh: error: failed: ${failed[*]}; see above" >&2; exit 1; }
