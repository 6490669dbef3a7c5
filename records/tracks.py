"""Tracks: comparisons that decide, by seeds and significance. records/tracks.toml holds their rows, and
records/README.md the rules.

    ./run.sh tracks run  [TRACK] [--seeds 4] [--rows dense_8 muon_none_8]   # what is not recorded yet
    ./run.sh tracks run  figure2_demo -- --num_steps 100      # the grid of the paper's Figure 2, with flags
    ./run.sh tracks time [TRACK] [--rounds 9]                 # what the rows cost, timed in turn
    ./run.sh tracks pack [TRACK or FOLDER]                    # finished runs, into the archive
    ./run.sh report                                           # tables and figures of what is recorded

`run` records a row once a seed, and goes on with what was interrupted; flags behind -- go to every run. All
sides of a comparison are run seed by seed, on one thread: different rows may run at once, since losses do not
depend on what else runs, and costs are taken not from these runs but from `time` and from exact FLOPs. `time`
needs the weights of gated rows, which git ignores: a seed without weights counts with the mean of its row's
others. `pack` takes of a folder what records/archive.py says, and leaves weights where they are.
"""
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import fmean as mean

import torch

import archive
import tool
from archive import RecordError, Row
from tool import ROOT, tgs

# ---- running ----------------------------------------------------------------------------------------------

def resolved(flags):
    """The Config that these flags of the trainer make, and the fields that they give."""
    _, given = tgs.parse_settings(tgs.Parser(), flags)
    return tgs.resolve(given)[0], given


def settings_of(flags):
    """All settings that these flags make, but for those that a run finds out itself."""
    settings = vars(resolved(flags)[0])
    return {k: v for k, v in settings.items() if v is not None and k not in archive.MAY_DIFFER}


def missing(track, rows, seeds, folder, more):
    """(what, flags) of each run that is not recorded, seed by seed."""
    found = archive.runs(folder)
    place = os.path.relpath(folder, ROOT)
    for seed in range(seeds):
        for name, row in rows.items():
            flags = [*track["base"].split(), *more, *row.flags, "--seed", str(seed)]
            asked = settings_of(flags).items()
            same = [run for run in found if (run.get("row"), run.get("seed")) == (name, seed)
                    and all(run["config"].get(k, v) == v for k, v in asked)]
            if not same:
                yield f"{name}, seed {seed}", [*flags, "--name", f"{name}_seed{seed}", "--records_dir", place]
            elif same[-1]["state"] != "finished":
                yield f"{name}, seed {seed}", ["--resume", f"{place}/{same[-1]['name']}"]


def run(track, todo):
    seconds, failed = [], []
    for i, (what, flags) in enumerate(todo):
        left = f", about {mean(seconds) * (len(todo) - i) / 60:.0f} minutes left" if seconds else ""
        print(f"tracks.py: {what}: run {i + 1} of {len(todo)}{left}", flush=True)
        start = time.perf_counter()
        child = subprocess.Popen(["bash", "run.sh", *flags], cwd=ROOT, stdout=subprocess.DEVNULL,
                                 env=os.environ | track.get("environment", {}))
        try:
            if child.wait():
                failed.append(what)
        except KeyboardInterrupt:
            child.wait()  # it too was interrupted, and saves
            return 130
        seconds.append(time.perf_counter() - start)
    if failed:
        raise RecordError(f"failed, see above: {'; '.join(failed)}")
    return 0


# ---- timing -----------------------------------------------------------------------------------------------

def models(track, rows, folder):
    """(name, model, optimizers) of what is timed: a model without routers by its row's name, with new weights
    (they do not matter), and by its own name each other run, the last of its seed, whose weights are here."""
    runs = archive.newest(folder)
    for row, (_, flags, _) in rows.items():
        flags = [*track["base"].split(), *flags, "--lr", "1e-30"]  # with which nothing changes
        cfg, given = resolved(flags)
        found = {run["name"]: folder / run["name"] for (of, _), run in runs.items() if of == row}
        sides = {name: tool.of_checkpoint(str(place), given) for name, place in found.items()
                 if cfg.n_routers and (place / "model.safetensors").exists()}
        if not cfg.n_routers:
            sides[row] = cfg, None
        if not sides:
            print(f"tracks.py: {row} is left out: no weights of it are here")
        for name, (of_model, weights) in sides.items():
            model = tgs.build_model(of_model, tgs.Runtime(cfg), weights, name)
            yield name, model, tgs.make_optimizers(model, cfg).values()


def measure(track, rows, rounds, folder):
    """Seconds of a forward pass and of a training step (forward, backward, optimizer), compiled, on the same
    validation text, in turn in this process: medians, and the medians of the rounds' ratios to the unit's (a
    machine that drifts moves both sides of a round)."""
    torch.set_num_threads(1)
    torch._dynamo.config.recompile_limit = 64  # rows share functions: each kind of gate and norm is a graph
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    sides = {name: side for name, *side in models(track, rows, folder)}
    configs = [model.cfg for model, _ in sides.values()]
    tokens = max(cfg.device_batch_size * cfg.max_seq_len for cfg in configs)
    shards = tgs.Shards(configs[0], "val")
    times = [[timed(*side, shards, i * tokens, tokens) for side in sides.values()] for i in range(rounds + 2)]
    each = torch.tensor(times[2:], dtype=torch.float64)  # (rounds, models, 2); the first two compile
    unit = each[:, [[*sides].index(track["unit"])]]

    def medians(each):
        found = each.quantile(0.5, 0).tolist()
        return {name: {"forward": forward, "train": train} for name, (forward, train) in zip(sides, found)}

    content = {"env": tgs.environment(tgs.Runtime(configs[0]), {"val": shards}), "rounds": rounds,
               "seconds": medians(each), "ratios": medians(each / unit)}
    path = tgs.make_folder(folder, "times") / "times.json"
    tool.write_json(path, content)
    for name, ratio in content["ratios"].items():
        print(f"{name:60s}  forward {ratio['forward']:.3f}, train {ratio['train']:.3f} of {track['unit']}'s")
    print(f"record: {path.parent}")


def timed(model, optimizers, shards, at, tokens):
    """Seconds of a forward pass, over so many tokens, and of a step, of a batch of the text from `at` on."""
    B, T = model.cfg.device_batch_size, model.cfg.max_seq_len
    places = tgs.sequences(shards, model.cfg)
    first = at // T % (len(places) - B)
    x, y = shards.batch(places[first:first + B], T, tgs.Runtime(model.cfg))
    start = time.perf_counter()
    with torch.no_grad():
        model(x, y)
    middle = time.perf_counter()
    model(x, y)[0].backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return (middle - start) * tokens / B / T, time.perf_counter() - middle


# ---- the command ------------------------------------------------------------------------------------------

def pack(parent):
    status = 0
    folders = {path.parent for kind in ("config", "times", "bench") for path in parent.glob(f"*/{kind}.json")}
    if not folders:
        raise RecordError(f"{parent} holds no live record")
    for folder in sorted(folders):
        try:
            print(archive.pack(folder), flush=True)
        except RecordError as e:
            print(f"tracks.py: error: {folder.name} is not packed: {e}", file=sys.stderr)
            status = 2
    return status


def main(argv=None):
    given = [*(sys.argv[1:] if argv is None else argv), "--"]
    cut = given.index("--")
    further = given[cut + 1:-1]

    def act(args):
        folder = args.records_dir or ROOT / "records" / args.of
        if args.what == "pack":
            return pack(folder if args.of in archive.TRACKS else Path(args.of))
        if args.of not in archive.TRACKS:
            raise RecordError(f"{args.of} is no track of records/tracks.toml")
        track = archive.TRACKS[args.of]
        rows = {name: row for name, row in archive.rows_of(track).items() if row.flags is not None}
        names = args.rows or [*rows]
        if args.what == "time":
            names = {*names, track["unit"]}
        if unknown := {*names} - {*rows}:
            raise RecordError(f"'{min(unknown)}' is no row of {args.of} in records/tracks.toml")
        rows = {name: rows[name] for name in names}
        if args.what == "run":
            return run(track, [*missing(track, rows, args.seeds or track["seeds"], folder, further)])
        measure(track, rows, args.rounds, folder)
        return 0

    return tgs.exit_status(lambda: archive.command("", act, __doc__, ARGUMENTS)(given[:cut]))


ARGUMENTS = {
    "what": dict(choices=("run", "time", "pack")),
    "of": dict(nargs="?", default=[*archive.TRACKS][0], metavar="TRACK",
               help=f"{', '.join(archive.TRACKS)} (default: the first); to pack, also a folder"),
    "--seeds": dict(type=int, help="seeds of each row (default: the track's)"),
    "--rounds": dict(type=tool.between(int, 1, 1000), default=9, help="measurements of each row (default: 9)"),
    "--rows": dict(nargs="+", metavar="ROW", help="rows of the track (default: all)"),
    "--records_dir": dict(type=Path, help="where its runs lie (default: records/TRACK)")}

if __name__ == "__main__":
    sys.exit(main())
