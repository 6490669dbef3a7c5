"""Tables, figures and decisions from all records, live and packed.

    ./run.sh report [FOLDER]     # of FOLDER, which holds records (default: this one)
    ./run.sh report --verify     # read every number again; exit 2 if one is off

It prints the tables of all records. Those of packed benchmarks and of the tracks of records/tracks.toml, whose
runs lie in FOLDER/TRACK, it writes between two markers of FOLDER/README.md too, whose other text stays as it
is; and it draws FOLDER/TRACK.png: a track's rows against their dense lines, or, where it decides nothing, the
paper's Figure 2.

--verify notices any changed number of a packed run, of a measurement, of a script or of the README's tables;
and of a finished live run what its other files tell: its script, and the summary's loss, gates, sparsity,
rate and FLOPs. These are exact where no gate closed, else within what the gates allow, since a record lacks
the number of pairs that attention had.
"""
import math
import os
import sys
from collections import Counter
from pathlib import Path
from statistics import fmean as mean, stdev

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
import archive  # noqa: E402
from archive import RecordError  # noqa: E402
from show import estimated_flops, targets  # noqa: E402

BEGIN, END = "<!-- records/report.py: begin -->", "<!-- records/report.py: end -->"
SHOWN = 25  # rows of a table that are not folded away
TIMED = {"forward time": "forward", "training time": "train"}  # what a line of times.jsonl calls them
COSTS = ["forward FLOPs", "training FLOPs", *TIMED]


# ---- a track's rows, and what decides ---------------------------------------------------------------------

def survival(t: float, df: float) -> float:
    """P(T > t) of Student's t with df degrees of freedom: where T = sqrt(df) tan(a), a has a density that is
    proportional to cos(a)^(df - 1)."""
    def area(low):
        a = np.linspace(low, math.pi / 2, 100_001)
        return np.trapezoid(np.cos(a).clip(0) ** (df - 1), a)

    return area(math.atan(t / math.sqrt(df))) / area(-math.pi / 2)


class Result:
    """The finished seeds of a setting, by seed."""

    def __init__(self, name: str, known: archive.Row | None, runs: list[dict], timed: dict):
        c = runs[0]["config"]
        wsd = ", wsd" if c.get("cooldown_fraction") else ""
        self.line = (f"{c.get('optimizer', 'adamw')}, {c['num_steps']:,} steps of {c['batch_size']} x "
                     f"{c['max_seq_len']}{wsd}")  # rows of the same share a dense line
        self.name, (self.what, _, self.dense) = name, known or ("-", None, False)
        self.n_layers, self.steps, self.n = c["n_layers"], c["num_steps"], len(runs)
        self.losses = [run["summary"]["cross_entropy"] for run in runs]
        self.mean, self.sd = mean(self.losses), stdev(self.losses) if self.n > 1 else math.nan
        found = [timed.get(run["name"], timed.get(name, ({}, {}))) for run in runs]
        self.measured = [measured for _, measured in found]  # all times of the measurement that has it
        costs = [costs_of(run, times) for run, (times, _) in zip(runs, found)]
        self.each = {cost: [of[cost] for of in costs] for cost in COSTS}  # (Comparison: over the unit's)

    def cost(self, name: str) -> float:
        return mean(self.each[name])


def costs_of(run: dict, times: dict) -> dict[str, float]:
    """NaN: not known."""
    s, c = run["summary"], run["config"]
    step = 3 * s["realised_flops_per_token"] * c["batch_size"] * c["max_seq_len"]  # of the trained gates
    return {"forward FLOPs": s["realised_flops_per_token"], "training FLOPs": s["train_flops"],
            "forward time": times.get("forward", math.nan),
            "training time": times.get("train", math.nan) * s["train_flops"] / step}


def times_of(folder: Path, of_rows: dict[str, list[dict]]) -> dict[str, tuple[dict, dict]]:
    """By the name of a row or run: its newest times over the unit's, and all of that measurement. A row has
    the mean of its runs', for seeds whose weights were not there."""
    timed = {}
    for line in archive.times(folder):
        timed |= {name: (times, line["ratios"]) for name, times in line["ratios"].items()}
    for row, runs in of_rows.items():
        names = {run["name"] for run in runs}
        if found := [timed[name] for name in timed if name in names]:
            timed[row] = {k: mean(times[k] for times, _ in found) for k in found[0][0]}, found[-1][1]
    return timed


class Comparison:
    """The rows of a track, and what decides: `against`, by cost and row, what against_line says."""

    def __init__(self, folder: Path, track: dict):
        self.track, known, of_rows = track, archive.rows_of(track), {}
        for (name, _), run in sorted(archive.newest(folder).items()):
            of_rows.setdefault(name, []).append(run)
        timed = times_of(folder, of_rows)
        try:
            self.rows = {name: Result(name, known.get(name), runs, timed) for name, runs in of_rows.items()}
        except archive.DAMAGE as e:
            raise RecordError(f"a record in {folder} is damaged ({e!r}): ./run.sh report --verify names it")
        for cost in COSTS:
            one = self.rows[track["unit"]].cost(cost)
            for row in self.rows.values():
                row.each[cost] = [x / one for x in row.each[cost]]
        self.against = {cost: {r.name: found for r in self.rows.values() if not r.dense
                               and (found := self.against_line(r, cost))} for cost in COSTS}
        enough = {name: found for name, found in self.against["forward FLOPs"].items()
                  if found[2] >= track["seeds"]}
        self.decided = [self.rows[name] for name in sorted(enough, key=enough.get)]  # the best first

    def dense_line(self, line: str, cost: str, measured={}) -> list[tuple[float, Result]]:
        """(cost, row) of the dense rows of a line, the cheapest first; their times those of a measurement, if
        it has several of them."""
        found = [r for r in self.rows.values() if r.dense and r.line == line and r.cost(cost) > 0]
        here, timed = [r for r in found if r.name in measured], TIMED.get(cost)
        if not timed or len(here) < 2:
            return sorted(((r.cost(cost), r) for r in found), key=lambda point: point[0])
        steps = self.rows[self.track["unit"]].steps
        return sorted(((measured[r.name][timed] * (r.steps / steps if timed == "train" else 1), r)
                       for r in here), key=lambda point: point[0])

    def against_line(self, row: Result, cost: str) -> tuple | None:
        """(difference, p, least seeds of a side, standard error, degrees of freedom) of a row to the line
        through the dense rows of its regime, each seed at its own cost and, for a time, against the line of
        its own measurement; p, one-sided, that the row lies as far below by chance. Welch's t: to the
        variance of the mean difference comes that of the line, the sum over dense rows of weight^2 variance /
        seeds. None outside the line's range."""
        lines = [shares(x, self.dense_line(row.line, cost, measured))
                 for x, measured in zip(row.each[cost], row.measured)]
        if not lines or None in lines:
            return None
        differences = [loss - sum(w * self.rows[name].mean for name, w in line.items())
                       for loss, line in zip(row.losses, lines)]
        sides = [(1.0, stdev(differences) if row.n > 1 else math.nan, row.n)]
        for dense in map(self.rows.get, sorted({name for line in lines for name, w in line.items() if w})):
            sides.append((mean(line.get(dense.name, 0.0) for line in lines), dense.sd, dense.n))
        seeds = min(n for *_, n in sides)
        if seeds < 2:
            return mean(differences), math.nan, seeds, math.nan, math.nan
        variance = [w * w * sd * sd / n for w, sd, n in sides]
        df = sum(variance) ** 2 / sum(v * v / (n - 1) for v, (*_, n) in zip(variance, sides))
        error = math.sqrt(sum(variance))
        return mean(differences), survival(-mean(differences) / error, df), seeds, error, df

    def against_target(self, row: Result) -> tuple:
        """(difference, p, seeds) of the row's mean loss to the track's target; one-sided, by Student's t."""
        difference, p = row.mean - self.track["target"], math.nan
        if row.n > 1:
            p = survival(-difference / (row.sd / math.sqrt(row.n)), row.n - 1)
        return difference, p, row.n

    def verdict(self, found: tuple | None, verb: str) -> str:
        if not found:
            return "-"
        difference, p, seeds, *_ = found
        if seeds < self.track["seeds"]:
            return f"{difference:+.4f}: too few seeds"
        return f"{difference:+.4f}, p {p:.2g}: {verb + 's' if p < self.track['p'] else 'does not ' + verb}"


def shares(x: float, dense: list[tuple[float, Result]]) -> dict[str, float] | None:
    """The line through the dense rows at cost x, as their weights in it by name; None beyond their range, but
    for a twentieth above it, where the last segment goes on (below the convex curve: this favours dense)."""
    for (low, a), (high, b) in zip(dense, dense[1:]):
        if low <= x <= high * (1.05 if b is dense[-1][1] else 1):
            w = (x - low) / (high - low)
            return {a.name: 1 - w, b.name: w}
    return None


# ---- tables -----------------------------------------------------------------------------------------------

def cell(x) -> str:
    text = "-" if x is None or x != x else f"{x:.4f}" if isinstance(x, float) else str(x)
    return " ".join(text.replace("|", "\\|").split())


def markdown(caption: str, rows: list[dict], columns: list[str], shown: int = SHOWN) -> str:
    """A table whose first rows are shown and whose others are folded away."""
    head = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    lines = ["| " + " | ".join(cell(row[k]) for k in columns) + " |" for row in rows]
    text = [f"**{caption}**", "", *head, *lines[:shown], ""] if shown else []
    if lines[shown:]:
        text += [f"<details><summary>{caption}{', the rest' if shown else ''}</summary>", "", *head,
                 *lines[shown:], "", "</details>", ""]
    return "\n".join(text)


def track_tables(c: Comparison) -> list[str]:
    """What is decided, then, folded away, everything else."""
    rows = {}
    for r in sorted(c.rows.values(), key=lambda r: r.mean):
        rows[r] = {"row": r.name, "what": r.what, "steps": r.steps, **{cost: r.cost(cost) for cost in COSTS},
                   "val. loss (seeds)": f"{r.mean:.4f} ± {r.sd:.4f} ({r.n})".replace(" ± nan", "")}
        for cost in COSTS:
            rows[r][f"at equal {cost}"] = c.verdict(c.against[cost].get(r.name), "beat")
        if "target" in c.track:
            rows[r]["against the target"] = c.verdict(c.against_target(r), "meet")
    gated = [r for r in rows if not r.dense]
    setting = ["row", "what", "val. loss (seeds)", "forward FLOPs", "at equal forward FLOPs",
               "at equal forward time"]
    tables = [markdown(c.track["title"], [rows[r] for r in c.decided], setting),
              markdown("Rows of fewer seeds, or outside of their dense line",
                       [rows[r] for r in gated if r not in c.decided], setting, 0),
              markdown("The dense lines", [rows[r] for r in rows if r.dense],
                       ["row", "val. loss (seeds)", *COSTS], 0),
              markdown("By the cost of training", [rows[r] for r in gated],
                       ["row", "training FLOPs", *TIMED, "at equal training FLOPs",
                        "at equal training time"], 0)]
    if "target" in c.track:
        near = [row for r, row in rows.items()
                if r.mean < c.track["target"] + 0.03 and r.cost("training FLOPs") <= 1]
        tables.append(markdown(
            f"The speedrun: to {c.track['target']} nats", sorted(near, key=lambda row: row["training FLOPs"]),
            ["row", "steps", "val. loss (seeds)", "training FLOPs", "training time", "against the target"]))
    return tables


def run_table(caption: str, runs: list[dict]) -> str:
    rows = []
    for run in runs:
        c, s, finished = run["config"], run["summary"], run["state"] == "finished"
        rows.append({"record": run["name"], "control": c.get("control"), "blocks": c.get("n_layers"),
                     "steps": s.get("step") if finished else run["state"],
                     "val. loss (nats)": s.get("cross_entropy"), "sparsity": s.get("sparsity")})
    return markdown(caption, rows, list(rows[0])) if rows else ""


def bench_table(bench: dict) -> str:
    """Ratios to dense, which hold on a shared machine too, since variants alternate."""
    rows = bench.get("growth") or bench["rows"]
    keys = ["mode", "batch", "variant", "sparsity", "speedup", "efficiency", "grows", "size", "over_flops"]
    return markdown(f"{bench['name']}: {bench['device']}, {bench['dtype']}", rows,
                    [k for k in keys if k in rows[0]], 0)


# ---- figures ----------------------------------------------------------------------------------------------

def canvas(columns: int, **how):
    """A figure and its axes, side by side."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, axes = plt.subplots(1, columns, layout="constrained", **how)
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(color="0.93", lw=0.8)
        ax.set_axisbelow(True)
    return fig, axes


def draw_track(c: Comparison, path: Path):
    """The longest dense line; and each decided row against its own line, with standard errors, filled where
    it beats the line."""
    fig, (left, right) = canvas(2, figsize=(13, 2 + 0.27 * max(12, len(c.decided))), width_ratios=(1, 1.2))
    line = Counter(r.line for r in c.rows.values() if r.dense).most_common(1)[0][0]
    points = [(x, r.mean, r.sd) for x, r in c.dense_line(line, "forward FLOPs")]
    left.errorbar(*zip(*points), fmt="s-", color="0.4", ms=5, lw=1, capsize=3, label="dense")
    for i, row in enumerate(c.decided):
        if row.line == line:
            left.plot(row.cost("forward FLOPs"), row.mean, "o", color="C3", ms=5)
            left.annotate(f" {i}", (row.cost("forward FLOPs"), row.mean), color="C3", fontsize=8)
    left.set(title=line, xlabel=f"FLOPs of a forward pass ({c.track['unit']} = 1); numbers as on the right",
             ylabel="validation loss (nats a token)")
    for cost, fmt, color in (("forward FLOPs", "o", "C3"), ("forward time", "D", "C0")):
        right.plot([], [], fmt, color=color, label=f"at equal {cost}")
        for i, row in enumerate(c.decided):
            if found := c.against[cost].get(row.name):
                difference, p, _, error, _ = found
                right.errorbar(difference, i, xerr=error, fmt=fmt, color=color, ms=5, lw=1,
                               mfc=color if p < c.track["p"] else "white")
    right.axvline(0, color="0.4", lw=1)
    right.set_yticks(range(len(c.decided)), [f"{r.name}, n {r.n}  ({i})" for i, r in enumerate(c.decided)],
                     fontsize=8)
    right.invert_yaxis()
    right.legend(frameon=False)
    right.set(title=f"Against the dense line (filled: p < {c.track['p']})", xlabel="nats a token")
    fig.savefig(path, dpi=100)


def draw_figure2(runs: list[dict], path: Path):
    """The paper's Figure 2: loss against FLOPs, time and sparsity."""
    fig, axes = canvas(3, figsize=(14, 4.3), sharey=True)
    for run in sorted(runs, key=lambda run: (run["config"]["control"] != "dense", run["row"])):
        c, s = run["config"], run["summary"]
        xs = estimated_flops(c, s["sparsity"]) / c["max_seq_len"], 1e6 / s["tokens_per_s"], s["sparsity"]
        for ax, x in zip(axes, xs):
            ax.plot(x, s["cross_entropy"], "o" if targets(c) else "s", label=run["row"])
    for ax, label in zip(axes, ("estimated FLOPs a token", "training time, µs a token", "sparsity")):
        ax.set_xlabel(label)
    axes[0].set_ylabel("validation loss (nats a token)")
    axes[2].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    fig.savefig(path, dpi=100)


# ---- the command ------------------------------------------------------------------------------------------

def faults(folder: Path):
    """What is wrong with the records of a folder, a sentence each."""
    curves = {line["name"]: line for line in archive.lines(folder / "curves.jsonl")}
    for run in archive.runs(folder):
        try:
            if run["state"].startswith("damaged"):
                raise RecordError(run["state"])
            if "folder" not in run:
                archive.check(run, curves[run["name"]])
                if archive.digest((folder / "scripts" / f"{run['script']}.py").read_bytes()) != run["script"]:
                    raise RecordError(f"scripts/{run['script']}.py is not the script that ran")
            elif run["state"] == "finished":
                archive.complete(run)
        except (RecordError, *archive.DAMAGE) as e:
            yield f"{run['name']}: {e}"


def page(folder: Path, draw: bool) -> str:
    """What the README says between its markers; with `draw`, figures too."""
    parts = []
    for name, track in archive.TRACKS.items():
        found, figure = archive.newest(folder / name), folder / f"{name}.png"
        if not found:
            continue
        parts.append(f"![{track['title']}]({name}.png)\n")
        if track.get("unit") in {row for row, _ in found}:
            comparison = Comparison(folder / name, track)
            parts += track_tables(comparison)
            if draw:
                draw_track(comparison, figure)
        else:
            parts.append(run_table(track["title"], [*found.values()]))
            if draw:
                draw_figure2([*found.values()], figure)
    return "\n".join([*parts, *map(bench_table, archive.lines(folder / "bench.jsonl"))])


def split(path: Path) -> tuple[str, str, str]:
    """A README before, between and behind the markers."""
    text = path.read_bytes().decode() if path.exists() else "# Records"
    if BEGIN not in text:
        text = f"{text.rstrip()}\n\n{BEGIN}{END}\n"
    before, _, rest = text.partition(BEGIN)
    old, end, after = rest.partition(END)
    if not end:
        raise RecordError(f"{path} has the line '{BEGIN}' but not '{END}': put it back")
    return before, old, after


def verify(folder: Path) -> int:
    wrong, places = [], [folder, *(folder / name for name in archive.TRACKS)]
    for place in places:
        wrong += faults(place)
    _, tables, _ = split(folder / "README.md")
    if tables and not wrong and tables != f"\n{page(folder, draw=False)}":
        wrong.append("README.md: its tables are not those of the records, which ./run.sh report would write")
    for sentence in wrong:
        print(f"report.py: error: {sentence}", file=sys.stderr)
    print(f"{sum(len(archive.runs(place)) for place in places)} runs read, {len(wrong)} wrong")
    return 2 if wrong else 0


def main(argv: list[str] | None = None) -> int:
    def body():
        parser = archive.Parser(__doc__)
        parser.add_argument("folder", nargs="?", type=Path, default=HERE, help=f"(default: {HERE.name})")
        parser.add_argument("--verify", action="store_true", help="only check, and say what disagrees")
        args = parser.parse_args(argv)
        if not args.folder.is_dir():
            parser.error(f"{args.folder} is not a folder")
        if args.verify:
            return verify(args.folder)
        readme, runs = args.folder / "README.md", archive.runs(args.folder)
        before, _, after = split(readme)
        if tables := page(args.folder, draw=True):
            partial = readme.with_name("README.md.partial")
            partial.write_bytes(f"{before}{BEGIN}\n{tables}{END}{after}".encode())
            os.replace(partial, readme)
        parts = [tables, run_table("Runs by themselves", runs)]
        parts += [bench_table(archive.measurement(path)) for path in sorted(args.folder.glob("*/bench.json"))]
        print(*filter(None, parts), sep="\n", end="")
        if not any(parts):
            print("no records yet: make one with ./run.sh, or those of a track with ./run.sh tracks run")
        return 0

    return archive.exit_status(body)


if __name__ == "__main__":
    sys.exit(main())
