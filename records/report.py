"""Tables of all records, and the paper's Figure 2 of them.

    ./run.sh report                     # every record beside this script
    ./run.sh report DIR... --out DIR    # of records, or of folders that hold records
    ./run.sh report --verify            # re-read every record; exit 2 if one is off

Prints a line a record (and benchmarks' rows), writes the same between two markers of OUT/README.md, whose
other text stays as it is, and draws OUT/pareto.png: validation loss against estimated FLOPs, measured time
and sparsity. Only runs of the same data, batch, steps, width and vocabulary share a row of the figure; times
are compared on one machine only.
"""
import argparse
import hashlib
import json
import math
import os
import re
import sys
from collections import Counter
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
import archive  # noqa: E402
import tracks  # noqa: E402

BEGIN, END = "<!-- records/report.py: begin -->", "<!-- records/report.py: end -->"
FOLDER, FILES = re.compile(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d_."), ("config.json", "summary.json", "bench.json")
GPU = re.compile("NVIDIA|Tesla|GeForce|Quadro|Instinct")
WITH_TARGET = ("sparsity_variance_l2", "random", "adaptive", "proportional", "proportional_derivative")
MARKERS = dict(none="D", sparsity="v", sparsity_variance="^", sparsity_variance_l2="P", adaptive="*",
               proportional="o", proportional_derivative="h", random="X")
TYPES = dict(control=str, train_files=str, val_files=str, mean_target_end=(int, float), batch_size=int,
             max_seq_len=int)
MAX_ROWS = 3  # of the figure


# ---- reading ----------------------------------------------------------------------------------------------

def is_record(folder: Path) -> bool:
    return folder.is_dir() and bool(FOLDER.match(folder.name) or any((folder / f).exists() for f in FILES))


def is_run(folder: Path) -> bool:
    """A training run's record, not one of a measurement."""
    return not any((folder / f).exists() for f in ("bench.json", "times.json", "gain.json"))


def find_records(folders: list[Path]) -> list[Path]:
    """The records among these folders and directly inside them, in order of name."""
    found = {p.resolve() for f in folders for p in ([f] if is_record(f) else f.iterdir()) if is_record(p)}
    return sorted(found, key=lambda p: (p.name, p))


def read(path: Path) -> dict:
    value = json.loads(path.read_text())
    if not isinstance(value, dict):
        raise ValueError("not an object")
    return value


def read_run(folder: Path) -> dict:
    """A training run, flat: `state`, and as much as its files tell. Raises nothing for a damaged file."""
    run, name = dict(name=folder.name), "config.json"
    try:
        if not (folder / name).exists() and not (folder / "summary.json").exists():
            return run | dict(state="unfinished: no config.json")
        cfg = read(folder / name)
        keys = ("control", "n_layers", "mean_target_end", "train_files", "val_files", "val_tokens",
                "batch_size", "max_seq_len", "num_steps", "dim", "vocab_size")
        if wrong := [k for k in keys if not isinstance(cfg[k], TYPES.get(k, (int, float, type(None))))]:
            raise ValueError(f"{wrong[0]} is {cfg[wrong[0]]!r}")
        run |= {k: cfg[k] for k in keys}
        run["recipe"] = tuple(cfg.get(k) for k in ("optimizer", "lr", "cooldown_fraction", "shuffle", "norm"))
        step_tokens = cfg["batch_size"] * cfg["max_seq_len"]
        name = "env.json"
        env = read(folder / name)
        run["hardware"] = f"{env['world_size']} x " * (env["world_size"] > 1) + env["device"]
        run["commit"] = env["git_commit"][:7] + "+" * env["git_dirty"] if env["git_commit"] else None
        name = "summary.json"
        if not (folder / name).exists():
            return run | dict(state="unfinished: no summary.json (running, or ended early)")
        summary = read(folder / name)
        run |= dict(step=int(summary["step"]), tokens=summary["step"] * step_tokens, state="interrupted",
                    train_s=float(summary["train_seconds"]))
        if summary["interrupted"]:
            return run
        run |= dict(parameters=int(summary["parameters"]), loss=float(summary["cross_entropy"]),
                    sparsity=float(summary["sparsity"]),
                    estimated=(e := summary.get("estimated_flops_per_token")) and float(e),  # show.py's
                    realised=float(summary["realised_flops_per_token"]), rate=float(summary["tokens_per_s"]))
        return run | dict(state="finished")
    except KeyError as e:
        return run | dict(state=f"damaged: {name} has no {e.args[0]}")
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as e:
        return run | dict(state=f"damaged: {name}: {e}".replace("\n", " "))


def verify(folder: Path) -> str | None:
    """What is wrong with a finished run's record, or None: its files are there, the script is the one that
    ran, metrics go to the end, and the summary's loss is their last."""
    if not (folder / "summary.json").exists():
        return None
    try:
        config, env, summary = (read(folder / f) for f in ("config.json", "env.json", "summary.json"))
        if summary["interrupted"]:
            return None
        scripts = [hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.py")]
        if env["source_sha256"] not in scripts:
            return "it holds no script with env.json's source_sha256, the one that ran"
        events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        steps, val = ([e["step"] for e in events if e["kind"] == kind] for kind in ("train", "val"))
        every = config.get("metrics_every", 1)
        if steps != list(range(0, summary["step"], every)):
            return f"metrics.jsonl does not hold every {every} of {summary['step']} training steps once"
        last = next(e for e in reversed(events) if e["kind"] == "val")
        if last["step"] != summary["step"] or last["cross_entropy"] != summary["cross_entropy"]:
            return (f"summary.json has a loss of {summary['cross_entropy']} at step {summary['step']}, "
                    f"metrics.jsonl {last['cross_entropy']} at {last['step']}")
        missing = {"gate_mean", "gate_zero", "train_seconds", "parameters"} - summary.keys()
        return f"summary.json has no {min(missing)}" if missing else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StopIteration) as e:
        return f"{type(e).__name__}: {e}"


# ---- tables -----------------------------------------------------------------------------------------------

def short(x: float) -> str:
    """Three digits and a unit: 2.17M."""
    power = min(max(int(math.log10(abs(x)) // 3), 0), 5) if x and math.isfinite(x) else 0
    return f"{x / 1000**power:.3g}" + ("", "k", "M", "G", "T", "P")[power]


def control_of(run: dict) -> str:
    """proportional 0.25: a control with a target, and the target of the middle blocks."""
    return run["control"] + (f" {run['mean_target_end']}" if run["control"] in WITH_TARGET else "")


RUN_COLUMNS = {  # heading: (key, format)
    "record": ("name", str), "control": ("control", str), "blocks": ("n_layers", str),
    "parameters": ("parameters", short), "steps": ("step", str), "train tokens": ("tokens", short),
    "val. loss (nats)": ("loss", "{:.4f}".format), "sparsity": ("sparsity", "{:.3f}".format),
    "FLOPs/token, estimated": ("estimated", short),
    "realised": ("realised", short), "train s": ("train_s", "{:.0f}".format),
    "tokens/s": ("rate", "{:.0f}".format),
    "hardware": ("hardware", str), "commit": ("commit", str), "state": ("state", str),
}
BENCH_COLUMNS = {
    "mode": ("mode", str), "variant": ("variant", str), "sparsity": ("sparsity", "{:.2f}".format),
    "batch": ("batch", str), "ms": ("seconds", lambda s: f"{1e3 * s:.2f}"),
    "speed-up": ("speedup", "{:.2f}".format),
    "FLOPs speed-up": ("flops_speedup", "{:.2f}".format), "efficiency": ("efficiency", "{:.2f}".format),
    "MFU": ("mfu", "{:.2f}".format),
}


GROWTH_COLUMNS = {
    "grows": ("grows", str), "size": ("size", str), "variant": ("variant", str),
    "training FLOPs a token": ("flops_per_token", short),
    "time over what FLOPs predict": ("over_flops", "{:.2f}".format),
}


def cells(rows: list[dict], columns: dict) -> list[list[str]]:
    """Headings, then a line a row; what a row does not have is a dash."""
    return [list(columns)] + [[form(row[key]) if row.get(key) is not None else "-"
                               for key, form in columns.values()]
                              for row in rows]


def bench_table(bench: dict) -> tuple[str, list[list[str]]]:
    """Caption and cells; without cells where the file is damaged. Milliseconds say something on a GPU only:
    CPUs are shared, and their ratios hold because variants alternate."""
    try:
        cfg, columns = bench["config"], dict(BENCH_COLUMNS)
        if "growth" in bench:
            return (f"{bench['name']}: {bench['device']}, {bench['dtype']}; how the time of a training step "
                    "grows, at a constant number of tokens"), cells(bench["growth"], GROWTH_COLUMNS)
        if not GPU.search(bench["device"]):
            del columns["ms"]
        caption = (f"{bench['name']}: {bench['device']}, {bench['dtype']}, {cfg['n_layers']} blocks, d "
                   f"{cfg['dim']}, T {cfg['max_seq_len']}; speed-up over dense, MFU of this machine's own "
                   f"{short(bench['matmul_flops_per_s'])}FLOP/s")
        return caption, cells(bench["rows"], columns)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as e:
        return f"{bench['name']}: damaged: bench.json: {type(e).__name__}: {e}".replace("\n", " "), []


def numeric(table: list[list[str]]) -> list[bool]:
    return [all(re.match(r"-$|[\d.]+[kMGTP]?$", c) for c in column[1:]) for column in zip(*table)]


def aligned(table: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*table)]
    return "\n".join("  ".join(c.rjust(w) if right else c.ljust(w)
                               for c, w, right in zip(line, widths, numeric(table)))
                     .rstrip() for line in table)


def markdown(table: list[list[str]], links: dict[str, str]) -> str:
    rule = ["---:" if right else "---" for right in numeric(table)]
    rows = [[links.get(c, c.replace("|", "\\|")) for c in line] for line in table]
    return "\n".join("| " + " | ".join(line) + " |" for line in (rows[0], rule, *rows[1:]))


def write_readme(path: Path, text: str):
    """Put text between the markers; everything else in the file stays, byte for byte."""
    old = path.read_bytes().decode() if path.exists() else "# Records\n\n"
    before, begin, rest = old.partition(BEGIN)
    _, end, after = rest.partition(END)
    if begin and not end:
        raise SystemExit(f"report.py: error: {path} has the line '{BEGIN}' but not '{END}': put it back")
    if not begin:
        before, after = old + "\n" * (not old.endswith("\n")), "\n"
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(f"{before}{BEGIN}\n{text}\n{END}{after}".encode())
    os.replace(partial, path)


# ---- the figure -------------------------------------------------------------------------------------------

def group_key(run: dict) -> tuple:
    """What two runs must share for their losses to be compared."""
    data = [os.path.basename(run[k]) for k in ("train_files", "val_files")]
    return (*data, run["val_tokens"], run["num_steps"], run["step"], run["batch_size"], run["max_seq_len"],
            run["dim"], run["vocab_size"], run["recipe"])


def group_title(run: dict) -> str:
    data = re.sub(r"(_train)?[_*]*(\.bin)?$", "", os.path.basename(run["train_files"]))
    return (f"{data}: {run['step']} steps of {run['batch_size']} x {run['max_seq_len']} tokens, d "
            f"{run['dim']}, vocabulary {run['vocab_size']}")


def draw_runs(ax, runs: list[dict], x: str, cmap):
    """Dense baselines, labelled and joined by a line through the mean of each depth; gated runs by target."""
    depths = {}
    for run in runs:
        if run["control"] == "dense":
            depths.setdefault(run["n_layers"], []).append((run[x], run["loss"]))
    if depths:
        points = [[sum(v) / len(v) for v in zip(*depths[L])] for L in sorted(depths)]
        ax.plot(*zip(*points), ls="-" if x != "sparsity" else "none", color="0.6", lw=1, zorder=1)
        ax.plot(*zip(*[p for ps in depths.values() for p in ps]), "s", color="0.25", ms=5,
                label="dense, blocks labelled")
        for L, point in zip(sorted(depths), points):
            ax.annotate(str(L), point, (6, 4) if x != "sparsity" else (-6, -3), textcoords="offset points",
                        fontsize=8, color="0.25", ha="left" if x != "sparsity" else "right")
    gated = [r for r in runs if r["control"] != "dense"]
    for run in sorted(gated, key=lambda r: (r["control"] != "none", r["control"], r["mean_target_end"],
                                            r["n_layers"])):
        color = cmap(0.05 + 0.87 * run["mean_target_end"]) if run["control"] in WITH_TARGET else "C3"
        ax.plot(run[x], run["loss"], MARKERS.get(run["control"], "o"), color=color, mec="white", mew=0.6,
                zorder=3, ms=12 if run["control"] == "adaptive" else 7,
                label=f"{run['n_layers']} blocks, "
                + ("no control" if run["control"] == "none" else control_of(run)))


def figure(runs: list[dict], path: Path) -> list[str]:
    """Draw finished runs that can be compared, a row a group, the largest first; returns lines on what was
    drawn and what left out."""
    groups = {}
    for run in runs:
        if all(run[k] is not None and math.isfinite(run[k])
               for k in ("loss", "estimated", "sparsity")) and run["tokens"] and run["train_s"]:
            groups.setdefault(group_key(run),
                              []).append(run | dict(time=1e6 * run["train_s"] / run["tokens"]))
    if not any(len(group) > 1 for group in groups.values()):
        return ["no figure: no two finished records can be compared"]
    try:
        import matplotlib
    except ImportError:
        return [f"{path} not drawn: matplotlib is missing (python -m pip install -r requirements.txt)"]
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import EngFormatter

    ranked, lines = sorted(groups.values(), key=len, reverse=True), []
    drawn = [group for group in ranked[:MAX_ROWS] if len(group) > 1]
    for group in ranked[len(drawn):]:
        lines.append(f"left out of the figure: {', '.join(r['name'] for r in group)} "
                     f"({group_title(group[0])})")
    fig, axes = plt.subplots(len(drawn), 3, figsize=(14, 0.4 + 3.9 * len(drawn)), sharey="row", squeeze=False,
                             layout="constrained")
    for row, group in zip(axes, drawn):
        machine = Counter(r["hardware"] for r in group).most_common(1)[0][0]
        timed = [r for r in group if r["hardware"] == machine]
        elsewhere = f"; {len(group) - len(timed)} run(s) elsewhere left out" * (len(timed) < len(group))
        row[0].set_title(group_title(group[0]), loc="left", fontsize=10, fontweight="bold")
        row[0].set(xlabel="estimated FLOPs a token, forward", ylabel="validation loss (nats a token)")
        row[1].set(xlabel=f"measured training time, µs a token\n({machine}{elsewhere})")
        row[2].set(xlabel="sparsity: share of gates that are zero")
        for ax, x in zip(row, ("estimated", "time", "sparsity")):
            draw_runs(ax, timed if x == "time" else group, x, plt.cm.viridis)
            ax.spines[["top", "right"]].set_visible(False)
            ax.grid(color="0.93", lw=0.8)
            ax.set_axisbelow(True)
            ax.margins(0.1)
            lone = len({r[x] for r in group}) == 1 and x != "sparsity"
            ax.set_xlim(*((0, 2 * group[0][x]) if lone else ()))
        row[0].xaxis.set_major_formatter(EngFormatter(sep=""))
        row[2].set_xlim(-0.05, max(0.5, 1.1 * max(r["sparsity"] for r in group)))
        entries = dict(zip(*reversed(row[0].get_legend_handles_labels())))
        row[2].legend(entries.values(), entries, frameon=False, fontsize=8, loc="center left",
                      bbox_to_anchor=(1, 0.5))
    fig.savefig(path, dpi=120)
    plt.close(fig)
    return lines + [f"figure: {path}"]


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path, help="records, or folders "
                                                              f"of records (default: {HERE})")
    parser.add_argument("--out", type=Path, default=HERE, help="where README.md and "
                                                               f"pareto.png go (default: {HERE})")
    parser.add_argument("--verify", action="store_true", help="only re-read records and say what disagrees")
    args = parser.parse_args(argv)
    for folder in [*args.folders, args.out]:
        if not folder.is_dir():
            parser.error(f"{folder} is not a folder")
    found = find_records(args.folders or [HERE])
    if args.verify:
        frontier = [f for f in args.folders or [HERE] if (f / "frontier").is_dir()]
        runs = [*filter(is_run, [*found, *find_records([f / "frontier" for f in frontier])])]
        wrong = {f: said for f in runs if (said := verify(f))}
        unfinished = sum(not (f / "summary.json").exists() for f in runs)
        for f, said in wrong.items():
            print(f"report.py: error: {f.name}: {said}", file=sys.stderr)
        print(f"{len(runs)} records read, {len(wrong)} wrong"
              + f", {unfinished} unfinished" * (unfinished > 0))
        return 2 if wrong else 0
    if not found:
        print("no records yet: make one with ./run.sh, or the grid of the paper's Figure 2 with "
              "records/sweep.sh")
        return 0
    out = args.out.resolve()
    runs = [*map(read_run, filter(is_run, found))]
    benches = [bench_table(bench) for bench in archive.measurements(out, "bench")]
    table = cells([r | (dict(control=control_of(r)) if "control" in r else {}) for r in runs], RUN_COLUMNS)
    links = {f.name: f"[{f.name}]({f.name})" for f in found if f.parent == out}
    lines = figure([r for r in runs if r["state"] == "finished"], args.out / "pareto.png")
    text, page = [], []
    if runs:
        text, page = [aligned(table)], [markdown(table, links) + "\n\nA + after the commit: with "
                                                                 "uncommitted changes."]
    if lines[-1].startswith("figure"):
        page.append("![validation loss against estimated FLOPs, measured time and sparsity](pareto.png)")
    if decided := tracks.gather(args.out / "frontier"):
        tracks.figure(decided, args.out / "frontier.png")
        frontier, speedrun = tracks.table(decided), tracks.speedrun(decided)
        text += [aligned(frontier), aligned(speedrun)]
        page = ["![the frontier: validation loss against cost](frontier.png)", markdown(frontier, {}),
                "The speedrun:", markdown(speedrun, {}), *page]
    for caption, rows in benches:
        text.append(caption + ("\n" + aligned(rows) if rows else ""))
        page.append(caption + ("\n\n" + markdown(rows, {}) if rows else ""))
    print("\n\n".join(text + ["\n".join(lines)]))
    write_readme(args.out / "README.md", "\n\n".join(page))
    return 0


if __name__ == "__main__":
    sys.exit(main())
