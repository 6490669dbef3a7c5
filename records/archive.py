"""Records, read in one way: live runs, which are folders as the trainer writes them, and packed ones.

What is committed of a comparison is packed (./run.sh tracks pack), into the folder that held its runs:

    runs.jsonl     a line a run: name, row, seed, config, env, summary, validations; `script`, the hash of its
                   script; `metrics`, that of all numbers of its metrics.jsonl but times (train_s, val_s,
                   tokens_per_s): a run that is done again to the same digits has the same one
    curves.jsonl   a line a run: of every 25th step the loss, the gradient's norm, gates and coefficients, the
                   latter a level (the mirrored blocks have the same)
    scripts/       each script once, named by its hash
    times.jsonl, bench.jsonl   a line a measurement
Every line ends in the hash of what it says. A hash is the first 16 digits of a SHA-256.
"""
import argparse
import fcntl
import hashlib
import json
import math
import os
import sys
from pathlib import Path
from statistics import fmean as mean

THINNED = 25  # steps from one point of a packed curve to the next
TIMES = {"train_s", "val_s", "tokens_per_s"}
OF_LEVELS = "gate_mean", "gate_zero", "mean_coef", "var_coef"
DAMAGE = OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError


class RecordError(Exception):
    """What a user can mend, in one line."""


class Parser(argparse.ArgumentParser):
    def __init__(self, doc: str):
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message):
        raise RecordError(f"{message} (see --help)")


def exit_status(run) -> int:
    """What run() returns; or, where it fails by what a user can mend, 2, and one line that says what."""
    try:
        return run()
    except (RecordError, OSError) as e:
        print(f"{Path(sys.argv[0]).name}: error: {' '.join(str(e).split())}", file=sys.stderr)
        return 2


# ---- counts, from a config --------------------------------------------------------------------------------

def block_weights(c: dict) -> int:
    """Of the matrices of one block."""
    kv_dim = c["n_kv_heads"] * (c["dim"] // c["n_heads"])
    return c["dim"] * (2 * c["dim"] + 2 * kv_dim + 3 * int(c["ffn_dim_multiplier"] * c["dim"]))


def n_routers(c: dict) -> int:
    return 0 if c["control"] in ("dense", "random") else c["n_layers"] // 2


def parameters(c: dict) -> int:
    d, norms = c["dim"], 4 if c["norm"] == "sandwich" else 2
    blocks = c["n_layers"] * (block_weights(c) + norms * d)
    return blocks + 2 * d * c["vocab_size"] + 2 * d + n_routers(c) * (d + 1)


def realised_flops(c: dict, gate_zero: list[float]) -> tuple[float, float]:
    """FLOPs of a forward pass a token, counted as the script does, from the share of closed gates a block: at
    least and at most. What a record lacks is the number of pairs of open tokens that attention had: fewest
    where all sequences have as many open, most where each is all open or all closed."""
    d, T = c["dim"], c["max_seq_len"]
    shares = [1.0 - zero for zero in gate_zero]
    rows = [1.0] * len(shares) if c["compute"] == "masked" else shares
    keys = [1.0] * len(shares) if c["gate_attention"] == "none" else shares
    routers = 2 * d * (1 + sum(rows[:n_routers(c) - 1])) if n_routers(c) else 0
    fixed = 2 * block_weights(c) * sum(rows) + routers + 2 * d * c["vocab_size"]
    return (fixed + 4 * d * sum(a * (a * T + 1) / 2 for a in keys),
            fixed + 4 * d * sum(a * (T + 1) / 2 for a in keys))


# ---- live runs --------------------------------------------------------------------------------------------

def read_object(path: Path) -> dict:
    value = json.loads(path.read_text())
    if not isinstance(value, dict):
        raise ValueError("not an object")
    return value


def is_run(folder: Path) -> bool:
    return (folder / "config.json").exists()


def folders(places: list[Path]) -> list[Path]:
    """The live records, of runs and measurements, among these folders and directly inside them."""
    kinds = "config.json", "times.json", "bench.json"
    return sorted({path.parent.resolve() for place in places for name in kinds
                   for path in (*place.glob(name), *place.glob(f"*/{name}"))})


def live(folder: Path) -> dict:
    """A live run in the form of a packed one, as far as its small files tell, without validations and hashes;
    and its `folder` and `state`."""
    run = {"name": folder.name, "config": {}, "env": {}, "summary": {}, "folder": folder}
    for part in ("config", "env", "summary"):
        try:
            run[part] = read_object(folder / f"{part}.json")
        except FileNotFoundError:
            return run | {"state": f"unfinished: no {part}.json"}
        except DAMAGE as e:
            return run | {"state": f"damaged: {part}.json: {e}"}
        if part == "config":
            run["seed"] = run["config"].get("seed", 0)
            name = run["config"].get("name") or folder.name[20:]  # (behind the date)
            run["row"] = str(name).removesuffix(f"_seed{run['seed']}")
    return run | {"state": "interrupted" if run["summary"].get("interrupted") else "finished"}


def read_events(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def validations_of(events: list[dict]) -> list[dict]:
    left_out = {"kind", *TIMES}
    return [{k: e[k] for k in e if k not in left_out} for e in events if e["kind"] == "val"]


def curve_of(events: list[dict], config: dict) -> dict:
    """Training events in columns; gates and coefficients if any gate ever closed a little."""
    train, levels = [e for e in events if e["kind"] == "train"], (config["n_layers"] + 1) // 2
    curve = {k: [e[k] for e in train] for k in ("step", "cross_entropy", "grad_norm")}
    if any(min(e["gate_mean"]) < 1 for e in train):
        curve |= {k: [e[k][:levels] for e in train] for k in OF_LEVELS}
    return curve


def metrics_hash(events: list[dict]) -> str:
    return digest(compact([{k: e[k] for k in sorted(e.keys() - TIMES)} for e in events]))


def complete(run: dict) -> tuple[dict, dict]:
    """A finished live run with all that is packed of it, and its curve. RecordError: what is wrong with it."""
    folder, env, steps = run["folder"], run["env"], run["summary"].get("step")
    try:
        events, every = read_events(folder), run["config"].get("metrics_every", 1)
        if env["source_sha256"][:16] not in map(file_hash, folder.glob("*.py")):
            raise RecordError("it holds no script with env.json's source_sha256, the one that ran")
        curve = curve_of(events, run["config"])
        if curve["step"] != list(range(0, steps, every)):
            raise RecordError(f"metrics.jsonl does not hold every {every} of {steps} training steps once")
        run = run | {"validations": validations_of(events), "script": env["source_sha256"][:16],
                     "metrics": metrics_hash(events)}
        if faults := [*disagreements(run, curve)]:
            raise RecordError(faults[0])
    except DAMAGE as e:
        raise RecordError(f"{type(e).__name__}: {e}")
    return run, curve


def disagreements(run: dict, curve: dict):
    """Where the numbers of a finished run, live or packed, do not agree with each other: a sentence each."""
    c, s, last = run["config"], run["summary"], run["validations"][-1]
    for key in ("step", "cross_entropy", "gate_mean", "gate_zero"):
        if s[key] != last[key]:
            yield f"summary.json has a {key} of {s[key]}, the last validation {last[key]}"
    tokens, half = s["step"] * c["batch_size"] * c["max_seq_len"], c["n_layers"] // 2
    low, high = realised_flops(c, s["gate_zero"])
    steps = [realised_flops(c, [*zero, *zero[:half][::-1]]) for zero in curve.get("gate_zero", ())]
    least, most = map(mean, zip(*steps)) if steps else (high, high)
    rate, slack = tokens / (s["train_seconds"] or math.inf), 0.02 if steps else 0  # (the curve has some steps)
    for key, low, high in (("sparsity", *[mean(s["gate_zero"])] * 2), ("parameters", *[parameters(c)] * 2),
                           ("realised_flops_per_token", low if steps else high, high),
                           ("train_flops", 3 * tokens * least * (1 - slack), 3 * tokens * most * (1 + slack)),
                           ("tokens_per_s", rate, rate)):
        if not low * (1 - 1e-5) <= s[key] <= high * (1 + 1e-5):  # (metrics have six digits)
            yield f"summary.json has a {key} of {s[key]}, the rest of the record gives {low:.9g} to {high:.9g}"


# ---- packed runs ------------------------------------------------------------------------------------------

def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def file_hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def compact(value) -> str:
    return json.dumps(value, separators=(",", ":"))


def sealed(line: dict) -> str:
    return compact(line | {"hash": digest(compact(line))})


def lines(path: Path) -> list[dict]:
    """The lines of a packed file without their hashes; none where there is no file. RecordError if one is not
    what was packed."""
    found = []
    for number, text in enumerate(path.read_text().splitlines() if path.exists() else (), 1):
        try:
            line = json.loads(text)
            del line["hash"]
            if sealed(line) != text:
                raise ValueError("its hash is another's")
        except DAMAGE as e:
            raise RecordError(f"{path}: line {number} is not what was packed ({e}): restore it with git")
        found.append(line)
    return found


def packed(parent: Path) -> list[dict]:
    return [run | {"folder": None, "state": "finished"} for run in lines(parent / "runs.jsonl")]


def runs(parent: Path) -> list[dict]:
    """The runs of a folder, packed and live, in order of their names, which begin with the date."""
    found = {run["name"]: run for run in packed(parent)}
    for folder in filter(is_run, parent.glob("*")):
        if folder.name not in found:  # (else it keeps a packed run's weights)
            found[folder.name] = live(folder)
    return [found[name] for name in sorted(found)]


def measurements(parent: Path, kind: str) -> list[dict]:
    """What was measured of a kind, times or bench, packed and live, in order of names."""
    found = lines(parent / f"{kind}.jsonl")
    found += [measurement(path) for path in parent.glob(f"*/{kind}.json")]
    return sorted(found, key=lambda line: line["name"])


def measurement(path: Path) -> dict:
    try:
        return {"name": path.parent.name, **read_object(path)}
    except DAMAGE as e:
        raise RecordError(f"{path} is damaged: {e}")


def find(path: Path) -> tuple[dict, dict]:
    """The run of a live folder, be it still running, or of PARENT/NAME, a packed run: with its validations,
    and its curve. RecordError where there is none."""
    try:
        for run in packed(path.parent):
            if run["name"] == path.name:
                (curve,) = [line for line in lines(path.parent / "curves.jsonl") if line["name"] == path.name]
                return run, curve
        run, events = live(path), read_events(path)
        return run | {"validations": validations_of(events)}, curve_of(events, run["config"])
    except DAMAGE as e:
        raise RecordError(f"{path} is neither a whole record nor the name of a packed one beside it ({e})")


# ---- packing ----------------------------------------------------------------------------------------------

def pack(folder: Path) -> str:
    """Pack a finished run or a measurement into the folder that holds it. When all is on the disk, what was
    packed is removed, and log and plot with it; what else lies in the folder stays there, and with it, since
    weights need it, the config. Says what was done. RecordError where it may not be packed."""
    parent = folder.parent
    for kind in ("times", "bench"):
        if (path := folder / f"{kind}.json").exists():
            add(parent / f"{kind}.jsonl", measurement(path))
            return removed(folder, [path])
    run = live(folder)
    known = next((line for line in packed(parent) if line["name"] == folder.name), None)
    if known and not run["summary"]:  # its removal was interrupted, or it keeps weights
        if (folder / "metrics.jsonl").exists() and metrics_hash(read_events(folder)) != known["metrics"]:
            raise RecordError("another run of this name is packed: rename its folder")
        return removed(folder, files_of(known, folder))
    if run["state"] != "finished":
        return f"{folder.name} stays: {run['state']}"
    run, curve = complete(run)
    keep_script(folder, parent / "scripts" / f"{run['script']}.py")
    thin = [i for i, step in enumerate(curve["step"]) if step % THINNED == 0]
    add(parent / "curves.jsonl", {"name": run["name"], **{k: [v[i] for i in thin] for k, v in curve.items()}})
    keys = "name", "row", "seed", "config", "env", "summary", "validations", "script", "metrics"
    add(parent / "runs.jsonl", {k: run[k] for k in keys})
    return removed(folder, files_of(run, folder))


def keep_script(folder: Path, path: Path):
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        (script,) = [p for p in folder.glob("*.py") if file_hash(p) == path.stem]
        partial = path.with_suffix(".partial")
        with open(partial, "wb") as file:
            write(file, script.read_bytes())
        os.replace(partial, path)


def write(file, data: bytes):
    file.write(data)
    file.flush()
    os.fsync(file.fileno())


def add(path: Path, line: dict):
    """Append a line, unless it is there. RecordError where another of this name is."""
    with open(path, "a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # (those who pack at once take turns)
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)  # what a kill left of a line
        found = [old for old in lines(path) if old["name"] == line["name"]]
        if not found:
            write(file, f"{sealed(line)}\n".encode())
        elif sealed(found[0]) != sealed(line):
            raise RecordError(f"{path} has another of the name {line['name']}: rename its folder")


def files_of(run: dict, folder: Path) -> list[Path]:
    """What is removed of a packed run: first what says that it is finished, last what says which it is."""
    script = [path for path in folder.glob("*.py") if file_hash(path) == run["script"]]
    names = "summary.json", "env.json", "log.txt", "plot.png"
    return [*(folder / name for name in names), *script, folder / "metrics.jsonl"]


def removed(folder: Path, paths: list[Path]) -> str:
    for path in paths:
        path.unlink(missing_ok=True)
    others = sorted(path.name for path in folder.iterdir() if path.name != "config.json")
    if others:
        return f"{folder.name} is packed; its folder keeps {', '.join(others)}"
    (folder / "config.json").unlink(missing_ok=True)
    folder.rmdir()
    return f"{folder.name} is packed"
