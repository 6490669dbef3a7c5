"""Records, read in one way: live runs, which are folders as the trainer writes them, and packed ones.

What is committed of a comparison is packed (./run.sh tracks pack), into the folder that held its runs:

    runs.jsonl     a line a run: name, row, seed, config, env, summary, validations; `script`, the hash of its
                   script; `metrics`, that of all numbers of its metrics.jsonl but times (train_s, val_s,
                   tokens_per_s): a run that is done again to the same digits has the same one
    curves.jsonl   a line a run: of every 25th step the loss, the gradient's norm, gates and coefficients, the
                   latter a level (the mirrored blocks have the same), where any gate ever closed a little
    scripts/       each script once, named by its hash
    times.jsonl, bench.jsonl   a line a measurement
Every line ends in the hash of what it says. A hash is the first 16 digits of a SHA-256.

And the rows of records/tracks.toml, by which runs are made, and told apart.
"""
import argparse
import fcntl
import hashlib
import json
import math
import os
import sys
import tomllib
from pathlib import Path
from statistics import fmean as mean
from typing import NamedTuple

TRACKS = tomllib.loads(Path(__file__).with_name("tracks.toml").read_text())
THINNED = 25  # steps from one point of a packed curve to the next
TIMES = {"train_s", "val_s", "tokens_per_s"}
KEPT = "name", "row", "seed", "config", "env", "summary", "validations", "script", "metrics"
MAY_DIFFER = {"name", "preset", "config", "seed", "device", "device_batch_size", "compile", "log_every",
              "save_every", "records_dir", "resume"}  # of runs of a row
DAMAGE = OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError


class RecordError(Exception):
    """What a user can mend, in one line."""


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise RecordError(f"{message} (see --help)")


def command(module, run, doc, arguments):
    """A tool's main(argv), which returns the exit status: what run(args) returns; or, where it fails by what
    a user can mend, 2, and one line says what. Where `module` is the program, it runs."""
    def main(argv=None):
        parser = Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
        for name, how in arguments.items():
            parser.add_argument(name, **how)
        try:
            return run(parser.parse_args(argv))
        except (RecordError, OSError) as e:
            print(f"{Path(sys.argv[0]).name}: error: {' '.join(str(e).split())}", file=sys.stderr)
            return 2

    if module == "__main__":
        sys.exit(main())
    return main


class Row(NamedTuple):
    what: str
    flags: list[str] | None  # beside the track's base; None: it was tried, with another script
    on_line: bool  # is it a point of a dense line?


def rows_of(track):
    """The rows of a track by name."""
    rows = {name: Row(what, None, False) for name, what in track["tried"].items()}
    for regime in track["regimes"]:
        for setting in regime.get("settings", track["settings"]):
            what, flags = track["settings"][setting]
            flags = f"{regime['flags']} {flags}".split()
            rows[regime["prefix"] + setting] = Row(regime["is"] + what, flags, setting in track["line"])
    return rows


# ---- counts, from a config --------------------------------------------------------------------------------

def block_weights(c):
    """Of the matrices of one block."""
    d, kv_dim = c["dim"], c["n_kv_heads"] * (c["dim"] // c["n_heads"])
    return d * (2 * d + 2 * kv_dim + 3 * round(c["ffn_dim_multiplier"] * d))


def parameters(c):
    """Of the whole model: blocks, embeddings and head, routers, norms."""
    d, L = c["dim"], c["n_layers"]
    norms = {"sandwich": 4 * L + 2, "pre": 2 * L + 2, "llama": 2 * L + 1}[c["norm"]]
    return L * block_weights(c) + d * (2 * c["vocab_size"] + norms) + n_routers(c) * (d + 1)


def n_routers(c):
    return 0 if c["control"] in ("dense", "random") else c["n_layers"] // 2


def realised_flops(c, gate_zero):
    """FLOPs of a forward pass a token, counted as the script does, from the share of closed gates a block: at
    least and at most. What a record lacks is the number of pairs of open tokens that attention had: fewest
    where all sequences have as many open (or documents are masked and have a token each), most where each is
    all open or all closed."""
    d, T, everyone = c["dim"], c["max_seq_len"], [1.0] * len(gate_zero)
    fewest = 1 if c.get("mask_documents") else T
    shares = [1.0 - zero for zero in gate_zero]
    rows = everyone if c["compute"] == "masked" else shares
    keys = everyone if c["gate_attention"] == "none" else shares
    routers = 1 + sum(rows[:n_routers(c) - 1]) if n_routers(c) else 0
    fixed = 2 * block_weights(c) * sum(rows) + 2 * d * (routers + c["vocab_size"])
    return (fixed + 2 * d * sum(a * (a * fewest + 1) for a in keys), fixed + 2 * d * sum(keys) * (T + 1))


# ---- live runs --------------------------------------------------------------------------------------------

def read_object(path):
    value = json.loads(path.read_text())
    if not isinstance(value, dict):
        raise ValueError("not an object")
    return value


def live(folder):
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


def read_events(folder):
    whole, _, _ = (folder / "metrics.jsonl").read_text().rpartition("\n")  # (a line may be being written)
    return [json.loads(line) for line in whole.splitlines()]


def metrics_hash(events):
    return digest(compact([{k: e[k] for k in sorted(e.keys() - TIMES)} for e in events]).encode())


def course(events, config):
    """The validations, and the training steps in columns."""
    steps, validations = ([e for e in events if e["kind"] == kind] for kind in ("train", "val"))
    curve = {k: [e[k] for e in steps] for k in ("step", "cross_entropy", "grad_norm")}
    if any(min(e["gate_mean"]) < 1 for e in steps):
        levels = (config["n_layers"] + 1) // 2
        for k in ("gate_mean", "gate_zero", "mean_coef", "var_coef"):
            curve[k] = [e[k][:levels] for e in steps]
    return [{k: e[k] for k in e if k != "kind" and k not in TIMES} for e in validations], curve


def complete(run):
    """A finished live run with all that is packed of it, and its curve. RecordError: what is wrong."""
    try:
        events, script = read_events(run["folder"]), run["env"]["source_sha256"][:16]
        validations, curve = course(events, run["config"])
        whole = run | {"validations": validations, "script": script, "metrics": metrics_hash(events)}
        steps, every = run["summary"]["step"], run["config"].get("metrics_every", 1)
        if not scripts(run["folder"], script):
            raise RecordError("it holds no script with env.json's source_sha256, the one that ran")
        for event in events:
            if any(value != value[::-1] for value in event.values() if isinstance(value, list)):
                raise RecordError(f"metrics.jsonl: step {event['step']} has other gates in the second half")
        if curve["step"] != list(range(0, steps, every)):
            raise RecordError(f"metrics.jsonl does not hold every {every} of {steps} training steps once")
        check(whole, curve)
    except DAMAGE as e:
        raise RecordError(f"{type(e).__name__}: {e}")
    return whole, curve


def scripts(folder, hash_):
    """The script of this hash in a live run's folder."""
    return [path for path in folder.glob("*.py") if digest(path.read_bytes()) == hash_]


def check(run, curve):
    """RecordError where the numbers of a finished run, live or packed, do not agree with each other."""
    c, s, last = run["config"], run["summary"], run["validations"][-1]
    tokens, half = s["step"] * c["batch_size"] * c["max_seq_len"], c["n_layers"] // 2
    at_end, closed = realised_flops(c, s["gate_zero"]), curve.get("gate_zero", [])
    steps = [realised_flops(c, [*zero, *zero[:half][::-1]]) for zero in closed] or [at_end]
    least, most = (3 * tokens * mean(side) for side in zip(*steps))
    slack = max(0.03, 2 / len(closed)) if closed else 0.0  # (a curve has some of the steps)
    bounds = {"sparsity": [mean(s["gate_zero"])] * 2, "realised_flops_per_token": at_end,
              "tokens_per_s": [tokens / (s["train_seconds"] or math.inf)] * 2,
              "train_flops": [least * (1 - slack), most * (1 + slack)]}
    for key, value in last.items():
        if s.get(key, value) != value:
            raise RecordError(f"summary.json has a {key} of {s[key]}, the rest of the record {value}")
    for key, (low, high) in bounds.items():
        if not low * (1 - 1e-5) <= s[key] <= high * (1 + 1e-5):  # (metrics have six digits)
            raise RecordError(f"summary.json has a {key} of {s[key]}, the rest of the record gives {low:.9g} "
                              f"to {high:.9g}")


# ---- packed runs ------------------------------------------------------------------------------------------

def digest(data):
    return hashlib.sha256(data).hexdigest()[:16]


def compact(value):
    return json.dumps(value, separators=(",", ":"))


def sealed(line):
    return compact(line | {"hash": digest(compact(line).encode())})


def lines(path):
    """The lines of a packed file without their hashes; none where there is no file. RecordError if one is not
    what was packed, but for a last one that is not at its end: its run is there still."""
    found, content = [], path.read_text() if path.exists() else ""
    for number, text in enumerate(content.splitlines(), 1):
        try:
            line = json.loads(text)
            del line["hash"]
            if sealed(line) != text:
                raise ValueError("its hash is another's")
        except DAMAGE as e:
            if number > content.count("\n"):
                break
            raise RecordError(f"{path}: line {number} is not what was packed ({e}): restore it with git")
        found.append(line)
    return found


def by_name(path):
    return {line["name"]: line for line in lines(path)}


def runs(parent):
    """The runs of a folder, packed and live, in order of their names, which begin with the date."""
    found = by_name(parent / "runs.jsonl")
    for path in parent.glob("*/config.json"):
        if path.parent.name not in found:  # (else it lies by a packed run's weights)
            found[path.parent.name] = live(path.parent)
    return [{"state": "finished"} | found[name] for name in sorted(found)]


def newest(parent):
    """The finished runs of a folder by row and seed, of each the last."""
    return {(run["row"], run["seed"]): run for run in runs(parent) if run["state"] == "finished"}


def times(parent):
    """What ./run.sh tracks time measured, packed and live, in order of names."""
    found = lines(parent / "times.jsonl") + [*map(measurement, parent.glob("*/times.json"))]
    return sorted(found, key=lambda line: line["name"])


def measurement(path):
    try:
        return {"name": path.parent.name, **read_object(path)}
    except DAMAGE as e:
        raise RecordError(f"{path} is damaged: {e}")


def find(path):
    """The run of a live folder, be it still running, or of PARENT/NAME, a packed run: with its validations,
    and its curve. RecordError where there is none."""
    if run := by_name(path.parent / "runs.jsonl").get(path.name):
        return run, by_name(path.parent / "curves.jsonl")[path.name]
    try:
        run = live(path)
        validations, curve = course(read_events(path), run["config"])
        return run | {"validations": validations}, curve
    except DAMAGE as e:
        raise RecordError(f"{path} is neither a whole record nor the name of a packed one beside it ({e})")


# ---- packing ----------------------------------------------------------------------------------------------

def pack(folder):
    """Pack a finished run or a measurement into the folder that holds it. When all is on the disk, what was
    packed is removed, and log and plot with it; what else lies in the folder stays there, and with it, since
    weights need it, the config. Says what was done. RecordError where it may not be packed."""
    parent, name = folder.parent, folder.name
    for kind in ("times", "bench"):
        if (folder / f"{kind}.json").exists():
            add(parent / f"{kind}.jsonl", measurement(folder / f"{kind}.json"))
            return removed(folder, [folder / f"{kind}.json"])
    run = by_name(parent / "runs.jsonl").get(name)
    if run is None:
        run = live(folder)
        if run["state"] != "finished":
            return f"{name} stays: {run['state']}"
        run, curve = complete(run)
        thin = [i for i, step in enumerate(curve["step"]) if step % THINNED == 0]
        keep(scripts(folder, run["script"])[0], parent / "scripts" / f"{run['script']}.py")
        add(parent / "curves.jsonl", {"name": name} | {k: [v[i] for i in thin] for k, v in curve.items()})
        add(parent / "runs.jsonl", {k: run[k] for k in KEPT})
    elif (folder / "metrics.jsonl").exists() and metrics_hash(read_events(folder)) != run["metrics"]:
        raise RecordError("another run of this name is packed: rename its folder")
    files = "summary.json", "env.json", "log.txt", "plot.png", "metrics.jsonl"  # (last what tells runs apart)
    return removed(folder, [*scripts(folder, run["script"]), *(folder / file for file in files)])


def keep(script, path):
    path.parent.mkdir(exist_ok=True)
    with open(path.with_suffix(".partial"), "wb") as file:
        write(file, script.read_bytes())
    os.replace(file.name, path)


def write(file, data):
    file.write(data)
    file.flush()
    os.fsync(file.fileno())


def add(path, line):
    """Append a line, unless it is there. RecordError where another of this name is."""
    with open(path, "a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # (those who pack at once take turns)
        found, content = by_name(path), path.read_bytes()
        if len(found) > content.count(b"\n"):
            write(file, b"\n")
        else:
            file.truncate(content.rfind(b"\n") + 1)  # what a kill left of a line
        same = found.get(line["name"])
        if same is None:
            write(file, f"{sealed(line)}\n".encode())
        elif sealed(same) != sealed(line):
            raise RecordError(f"{path} has another of the name {line['name']}: rename its folder")


def removed(folder, paths):
    for path in paths:
        path.unlink(missing_ok=True)
    others = {path.name for path in folder.iterdir()} - {"config.json"}
    if others:
        return f"{folder.name} is packed; its folder keeps {', '.join(sorted(others))}"
    (folder / "config.json").unlink(missing_ok=True)
    folder.rmdir()
    return f"{folder.name} is packed"
