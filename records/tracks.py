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
import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import fmean as mean

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "records")]
import archive  # noqa: E402
import tool  # noqa: E402
import train_gpt_skip as tgs  # noqa: E402
from archive import RecordError, Row  # noqa: E402

MAY_DIFFER = {"name", "preset", "config", "device", "device_batch_size", "compile", "log_every", "save_every",
              "records_dir"}  # of runs that count as the same


# ---- running ----------------------------------------------------------------------------------------------

def settings_of(flags: list[str]) -> dict:
    """All settings that these flags of the trainer make, but for those that a run finds out itself."""
    _, given = tgs.parse_settings(tgs.Parser(), flags)
    settings = dataclasses.asdict(tgs.resolve(given)[0])
    return {k: v for k, v in settings.items() if v is not None and k not in MAY_DIFFER}


def missing(track: dict, rows: dict[str, Row], seeds: int, folder: Path, more: list[str]):
    """(what, flags) of each run that is not recorded, seed by seed."""
    found, place = archive.runs(folder), os.path.relpath(folder, ROOT)
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


def run(track: dict, todo: list[tuple[str, list[str]]]) -> int:
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

def models(track: dict, rows: dict[str, Row], folder: Path):
    """(name, model, optimizers) of what is timed: a model without routers by its row's name, with new weights
    (they do not matter), and by its own name each other run, the last of its seed, whose weights are here."""
    for row, (_, flags, _) in (rows | {track["unit"]: archive.rows_of(track)[track["unit"]]}).items():
        _, given = tgs.parse_settings(tgs.Parser(), [*track["base"].split(), *flags])
        names = [run["name"] for (of, _), run in archive.newest(folder).items()
                 if of == row and (folder / run["name"] / "model.safetensors").exists()]
        if tgs.resolve(given)[0].control == "dense":
            names = [row]
        elif not names:
            print(f"tracks.py: {row} is left out: no weights of it are here")
        for name in names:
            new = name == row
            cfg, weights = tgs.resolve(given) if new else tool.of_checkpoint(str(folder / name), given)
            model = tgs.build_model(cfg, tgs.Runtime(cfg), weights, name)
            optimizers = tgs.make_optimizers(model, cfg).values()
            for group in (group for optimizer in optimizers for group in optimizer.param_groups):
                group["lr"] = 0.0
            yield name, model, optimizers


def measure(track: dict, rows: dict[str, Row], rounds: int, folder: Path) -> int:
    """Seconds of a forward pass and of a training step (forward, backward, optimizer), compiled, on the same
    validation text, in turn in this process: medians, and the medians of the rounds' ratios to the unit's (a
    machine that drifts moves both sides of a round)."""
    torch.set_num_threads(1)
    torch._dynamo.config.recompile_limit = 64  # rows share functions: each kind of gate and norm is a graph
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    sides, times = {name: side for name, *side in models(track, rows, folder)}, []
    tokens = max(model.cfg.device_batch_size * model.cfg.max_seq_len for model, _ in sides.values())
    for i in range(rounds + 2):
        times.append([])
        for model, optimizers in sides.values():
            B, T = model.cfg.device_batch_size, model.cfg.max_seq_len
            shards = tgs.Shards(model.cfg, "val")
            places = tgs.sequences(shards, model.cfg)
            first = i * tokens // T % (len(places) - B)
            batch = torch.stack([shards.window(*place, T + 1) for place in places[first:first + B]])
            start = time.perf_counter()
            with torch.no_grad():
                model(batch[:, :-1], batch[:, 1:])
            middle = time.perf_counter()
            model(batch[:, :-1], batch[:, 1:])[0].backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            end = time.perf_counter()
            times[i].append([(middle - start) * tokens / B / T, end - middle])  # forward: of as many tokens

    def medians(each: Tensor) -> dict:
        found = each.quantile(0.5, 0).tolist()
        return {name: {"forward": forward, "train": train} for name, (forward, train) in zip(sides, found)}

    each = torch.tensor(times[2:], dtype=torch.float64)  # (rounds, models, 2); the first two compile
    unit = each[:, [[*sides].index(track["unit"])]]
    content = {"env": tgs.environment(tgs.Runtime(model.cfg), {"val": shards}), "rounds": rounds,
               "seconds": medians(each), "ratios": medians(each / unit)}
    path = tgs.make_folder(folder, "times") / "times.json"
    tgs.write_atomically(path, lambda f: f.write((json.dumps(content, indent=1) + "\n").encode()))
    for name, ratio in content["ratios"].items():
        print(f"{name:60s}  forward {ratio['forward']:.3f}, train {ratio['train']:.3f} of {track['unit']}'s")
    print(f"record: {path.parent}")
    return 0


# ---- the command ------------------------------------------------------------------------------------------

def pack(parent: Path) -> int:
    status = 0
    kinds = "config.json", "times.json", "bench.json"
    folders = {path.parent for kind in kinds for path in parent.glob(f"*/{kind}")}
    if not folders:
        raise RecordError(f"{parent} holds no live record")
    for folder in sorted(folders):
        try:
            print(archive.pack(folder), flush=True)
        except RecordError as e:
            print(f"tracks.py: error: {folder.name} is not packed: {e}", file=sys.stderr)
            status = 2
    return status


def main(argv: list[str] | None = None) -> int:
    def body():
        given = sys.argv[1:] if argv is None else argv
        cut = given.index("--") if "--" in given else len(given)
        parser = archive.Parser(__doc__)
        parser.add_argument("what", choices=("run", "time", "pack"))
        parser.add_argument("of", nargs="?", default=next(iter(archive.TRACKS)), metavar="TRACK",
                            help=f"{', '.join(archive.TRACKS)} (default: the first); to pack, also a folder")
        parser.add_argument("--seeds", type=int, help="seeds of each row (default: the track's)")
        parser.add_argument("--rounds", type=int, default=9, help="measurements of each row (default: 9)")
        parser.add_argument("--rows", nargs="+", metavar="ROW", help="rows of the track (default: all)")
        parser.add_argument("--records_dir", type=Path, help="where its runs lie (default: records/TRACK)")
        args = parser.parse_args(given[:cut])
        if args.what == "pack":
            return pack(ROOT / "records" / args.of if args.of in archive.TRACKS else Path(args.of))
        if args.of not in archive.TRACKS:
            parser.error(f"{args.of} is no track of records/tracks.toml")
        track, folder = archive.TRACKS[args.of], args.records_dir or ROOT / "records" / args.of
        rows = {name: row for name, row in archive.rows_of(track).items() if row.flags is not None}
        if unknown := set(args.rows or ()) - set(rows):
            parser.error(f"{min(unknown)} is no row of {args.of} in records/tracks.toml")
        rows = {name: rows[name] for name in args.rows or rows}
        if args.what == "time":
            return measure(track, rows, args.rounds, folder)
        return run(track, [*missing(track, rows, args.seeds or track["seeds"], folder, given[cut + 1:])])

    return tgs.exit_status(lambda: archive.exit_status(body))


if __name__ == "__main__":
    sys.exit(main())
