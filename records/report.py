"""Tables, figures and decisions from all records, live and packed.

    ./run.sh report [FOLDER]     # of FOLDER, which holds records (default: this one)
    ./run.sh report --verify     # read every number again; exit 2 if one is off

It prints the tables of all records. Those of packed benchmarks and of the tracks of records/tracks.toml,
whose runs lie in FOLDER/TRACK, it writes between two markers of FOLDER/README.md too, whose other text stays
as it is; and it draws FOLDER/TRACK.png: a track's rows against their dense lines or, where a track decides
nothing, losses against FLOPs, and closed gates against steps.

--verify notices any changed number of a packed run, of a measurement, of a script or of the README's tables;
and of a finished live run what its other files tell: its script, and the summary's loss, gates, sparsity,
rate and FLOPs. These are exact where no gate closed, else within what the gates allow, since a record lacks
the number of pairs that attention had.
"""
import math
import os
import sys
from pathlib import Path
from statistics import fmean as mean, stdev

import numpy as np

import archive
import show
from archive import RecordError

BEGIN, END = "<!-- records/report.py: begin -->", "<!-- records/report.py: end -->"
SHOWN = 25  # rows of a table that are not folded away
TIMED = {"forward time": "forward", "training time": "train"}  # what a line of times.jsonl calls them
COSTS = ["forward FLOPs", "training FLOPs", *TIMED]


# ---- a track's rows, and what decides ---------------------------------------------------------------------

def survival(t, df):
    """P(T > t) of Student's t with df degrees of freedom: where T = sqrt(df) tan(a), a has a density that is
    proportional to cos(a)^(df - 1)."""
    def area(low):
        a = np.linspace(low, math.pi / 2, 100_001)
        return np.trapezoid(np.cos(a).clip(0) ** (df - 1), a)

    return area(math.atan(t / math.sqrt(df))) / area(-math.pi / 2)


def spread(values):
    return stdev(values) if len(values) > 1 else math.nan


def welch(differences, sides):
    """(mean, p, least seeds of a side, standard error) of a row's differences by seed; p, one-sided, that
    they lie as far below 0 by chance. Welch's t: to the variance of their mean comes that of what they are
    differences to, the sum over sides (weight, standard deviation, seeds) of weight^2 variance / seeds."""
    sides = [(1.0, spread(differences), len(differences)), *sides]
    seeds, difference = min(n for *_, n in sides), mean(differences)
    if seeds < 2:
        return difference, math.nan, seeds, math.nan
    variance = [w * w * sd * sd / n for w, sd, n in sides]
    df = sum(variance) ** 2 / sum(v * v / (n - 1) for v, (*_, n) in zip(variance, sides))
    error = math.sqrt(sum(variance))
    return difference, survival(-difference / error, df), seeds, error


class Result:
    """The finished seeds of a setting, by seed."""

    def __init__(self, name, known, runs, timed):
        c = runs[0]["config"]
        for run in runs:
            for k in c.keys() & run["config"].keys() - archive.MAY_DIFFER:
                if run["config"][k] != c[k]:
                    raise RecordError(f"{run['name']} has another --{k} than {runs[0]['name']}: move it away")
        # rows of the same share a dense line:
        self.line = (f"{c.get('optimizer', 'adamw')}, {c['num_steps']:,} steps of {c['batch_size']} x "
                     f"{c['max_seq_len']}{', wsd' if c.get('cooldown_fraction') else ''}")
        self.name = name
        self.what, _, self.dense = known or ("-", None, False)
        self.steps, self.config, self.runs = c["num_steps"], c, runs
        self.losses = [run["summary"]["cross_entropy"] for run in runs]
        self.n = len(runs)
        self.mean = mean(self.losses)
        self.sd = spread(self.losses)
        found = [timed.get(run["name"], timed.get(name, ({}, {}))) for run in runs]
        self.measured = [measured for _, measured in found]  # all times of the measurement that has it
        costs = [costs_of(run, times) for run, (times, _) in zip(runs, found)]
        self.each = {cost: [of[cost] for of in costs] for cost in COSTS}  # (Comparison: over the unit's)

    def cost(self, name):
        return mean(self.each[name])


def costs_of(run, times):
    """NaN: not known."""
    s, c = run["summary"], run["config"]
    step = 3 * s["realised_flops_per_token"] * c["batch_size"] * c["max_seq_len"]  # of the trained gates
    return {"forward FLOPs": s["realised_flops_per_token"], "training FLOPs": s["train_flops"],
            "forward time": times.get("forward", math.nan),
            "training time": times.get("train", math.nan) * s["train_flops"] / step}


def times_of(folder, of_rows):
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


def results(folder, track):
    """What was run of a track, by row."""
    known = archive.rows_of(track)
    of_rows = {name: [] for name in known}
    for (name, _), run in sorted(archive.newest(folder).items()):
        of_rows.setdefault(name, []).append(run)
    timed = times_of(folder, of_rows)
    try:
        return {name: Result(name, known.get(name), runs, timed) for name, runs in of_rows.items() if runs}
    except archive.DAMAGE as e:
        raise RecordError(f"a record in {folder} is damaged ({e!r}): ./run.sh report --verify names it")


class Comparison:
    """The rows of a track, and what decides: `against`, by cost and row, what against_line says."""

    def __init__(self, rows, track):
        self.track, self.rows = track, rows
        for cost in COSTS:
            one = self.rows[track["unit"]].cost(cost)
            for row in self.rows.values():
                row.each[cost] = [x / one for x in row.each[cost]]
        self.against = {cost: {r.name: found for r in self.rows.values() if not r.dense
                               and (found := self.against_line(r, cost))} for cost in COSTS}
        found = self.against["forward FLOPs"]
        enough = [name for name in found if found[name][2] >= track["seeds"]]
        self.decided = [self.rows[name] for name in sorted(enough, key=found.get)]  # the best first

    def dense_line(self, line, cost, measured={}):
        """(cost, row) of the dense rows of a line, the cheapest first; their times those of a measurement, if
        it has several of them."""
        found = [r for r in self.rows.values() if r.dense and r.line == line]
        costs = {r: r.cost(cost) for r in found if r.cost(cost) > 0}
        here = [r for r in found if r.name in measured]
        if cost in TIMED and len(here) > 1:
            costs = {r: measured[r.name][TIMED[cost]] for r in here}
            if cost == "training time":  # measured is a step's
                costs = {r: costs[r] * r.steps / self.rows[self.track["unit"]].steps for r in here}
        return sorted(zip(costs.values(), costs), key=lambda point: point[0])

    def against_line(self, row, cost):
        """What `welch` says of a row and the line through the dense rows of its regime, each seed at its own
        cost and, for a time, against the line of its own measurement. None outside the line's range."""
        lines = [shares(x, self.dense_line(row.line, cost, measured))
                 for x, measured in zip(row.each[cost], row.measured)]
        if None in lines:
            return None
        differences = [loss - sum(w * self.rows[name].mean for name, w in line.items())
                       for loss, line in zip(row.losses, lines)]
        sides = []
        for dense in map(self.rows.get, sorted({name for line in lines for name, w in line.items() if w})):
            sides.append((mean(line.get(dense.name, 0.0) for line in lines), dense.sd, dense.n))
        return welch(differences, sides)

    def verdict(self, found, verb):
        if not found:
            return "-"
        difference, p, seeds, *_ = found
        if seeds < self.track["seeds"]:
            return f"{difference:+.4f}: too few seeds"
        return f"{difference:+.4f}, p {p:.2g}: {f'{verb}s' if p < self.track['p'] else f'does not {verb}'}"


def shares(x, dense):
    """The line through the dense rows at cost x, as their weights in it by name; None beyond their range, but
    for a twentieth above it, where the last segment goes on (below the convex curve: this favours dense)."""
    for (low, a), (high, b) in zip(dense, dense[1:]):
        if low <= x <= high * (1.05 if b is dense[-1][1] else 1):
            w = (x - low) / (high - low)
            return {a.name: 1 - w, b.name: w}
    return None


# ---- tables -----------------------------------------------------------------------------------------------

def cell(x):
    if x is None or x != x:
        return "-"
    text = str(x)
    if isinstance(x, float):
        text = f"{x:.4f}" if abs(x) < 1000 else f"{x:.4g}"
    return " ".join(text.replace("|", "\\|").split())


def markdown(caption, rows, columns, shown=SHOWN):
    """A table whose first rows are shown and whose others are folded away."""
    head = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    lines = ["| " + " | ".join(cell(row.get(k)) for k in columns) + " |" for row in rows]
    text, summary = [], caption
    if shown:
        text = [f"**{caption}**", "", *head, *lines[:shown], ""]
        summary = f"{caption}, the rest"
    if lines[shown:]:
        text += [f"<details><summary>{summary}</summary>", "", *head, *lines[shown:], "", "</details>", ""]
    return "\n".join(text)


def described(rows):
    """What a table can say of each row by itself, the best first."""
    return {r: {"row": r.name, "what": r.what, "steps": r.steps, "val. loss (seeds)":
                f"{r.mean:.4f} ± {r.sd:.4f} ({r.n})".replace(" ± nan", "")} | {k: r.cost(k) for k in COSTS}
            for r in sorted(rows, key=lambda r: (r.config["dim"], r.mean))}


def plain_tables(rows, track):
    """Of a track that decides nothing."""
    columns = ["row", "what", "steps", "val. loss (seeds)", "forward FLOPs"]
    return [markdown(track["title"], described(rows).values(), columns)]


def track_tables(c, track):
    """What is decided, then, folded away, everything else; and, if there is a target, the race to it."""
    rows, target = described(c.rows.values()), track.get("target")
    for r in rows:
        for cost in COSTS:
            rows[r][f"at equal {cost}"] = c.verdict(c.against[cost].get(r.name), "beat")
    gated = [r for r in rows if not r.dense]
    setting = ["row", "what", "val. loss (seeds)", "forward FLOPs", "at equal forward FLOPs",
               "at equal forward time"]
    training = ["training FLOPs", "training time"]
    tables = [
        markdown(track["title"], [rows[r] for r in c.decided], setting),
        markdown("Rows of fewer seeds, or outside of their dense line",
                 [rows[r] for r in gated if r not in c.decided], setting, 0),
        markdown("The dense lines", [rows[r] for r in rows if r.dense], ["row", "val. loss (seeds)", *COSTS],
                 0),
        markdown("By the cost of training", [rows[r] for r in gated],
                 ["row", "training FLOPs", *TIMED, *(f"at equal {cost}" for cost in training)], 0)]
    if target:
        near = [r for r in rows if r.mean < target + 0.03 and r.cost("training FLOPs") <= 1]
        for r in near:
            found = welch([loss - target for loss in r.losses], [])
            rows[r]["against the target"] = c.verdict(found, "meet")
        near.sort(key=lambda r: r.cost("training FLOPs"))
        tables += [markdown(f"The speedrun: to {target} nats", [rows[r] for r in near],
                            ["row", "steps", "val. loss (seeds)", *training, "against the target"])]
    return tables


def run_table(caption, runs):
    """One, or none where there are no runs."""
    rows = [{"record": run["name"], "state": run["state"]} | run["config"] | run["summary"] for run in runs]
    columns = ["record", "state", "n_layers", "cross_entropy", "sparsity", "realised_flops_per_token"]
    return [markdown(caption, rows, columns)] if rows else []


def bench_table(bench):
    """Ratios to dense, which hold on a shared machine too, since variants alternate."""
    rows = bench.get("growth") or bench["rows"]
    keys = ["mode", "batch", "variant", "sparsity", "speedup", "efficiency", "grows", "size", "over_flops"]
    return markdown(f"{bench['name']}: {bench['env']['device']}, {bench['env']['dtype']}", rows,
                    [k for k in keys if k in rows[0]], 0)


# ---- the figure --------------------------------------------------------------------------------------------

def draw_track(c, path):
    """Each decided row against its dense line, with standard errors, filled where it beats the line."""
    fig, [[ax]] = show.canvas(1, (8, 2 + 0.27 * len(c.decided)))
    for cost, fmt, color in ("forward FLOPs", "o", "C3"), ("forward time", "D", "C0"):
        ax.plot([], [], fmt, color=color, label=f"at equal {cost}")
        for i, row in enumerate(c.decided):
            if found := c.against[cost].get(row.name):
                difference, p, _, error = found
                fill = color if p < c.track["p"] else "white"
                ax.errorbar(difference, i, xerr=error, fmt=fmt, color=color, ms=5, lw=1, mfc=fill)
    ax.axvline(0, color="0.4", lw=1)
    ax.set_yticks(range(len(c.decided)), [f"{r.name}, n {r.n}" for r in c.decided], fontsize=8)
    ax.invert_yaxis()
    ax.legend(frameon=False)
    ax.set(title=f"Against the dense line (filled: p < {c.track['p']})", xlabel="nats a token")
    show.save(fig, path)


def draw_plain(rows, path):
    """Of a track that decides nothing, a column a width: losses (nats a token) against FLOPs a token; and, a
    panel a setting with its color as title, the share of closed gates against steps, of each seed and, from
    the first below to the middle one, of each level."""
    widths = sorted({r.config["dim"] for r in rows})
    kinds = ["loss", *dict.fromkeys(r.what for r in rows if archive.n_routers(r.config))]
    fig, axes = show.canvas(len(widths), (1 + 2.8 * len(widths), 2.4 * len(kinds)), len(kinds))
    for r in rows:
        panels = dict(zip(kinds, axes[:, widths.index(r.config["dim"])]))
        color = f"C{kinds.index(r.what)}" if r.what in kinds else "0.4"
        panels["loss"].plot(r.each["forward FLOPs"], r.losses, "o", color=color)
        panels["loss"].set(title=f"d {r.config['dim']} (grey: dense)", xlabel="FLOPs",
                           ylabel="validation loss")
        for run in r.runs * (r.what in kinds):
            _, curve = archive.find(path.with_suffix("") / run["name"])
            closed = np.transpose(curve.get("gate_zero", [[0.0]] * len(curve["step"])))
            levels = run["seed"] + np.linspace(-0.45, 0.45, len(closed) + 1)
            mesh = panels[r.what].pcolormesh([*curve["step"], r.steps], levels, closed, vmin=0, vmax=1)
            panels[r.what].set_title(r.what, color=color)
            panels[r.what].set(xlabel="step", ylabel="seed", yticks=range(r.n))
    for ax in axes.flat:
        ax.set_visible(ax.has_data())
    if len(kinds) > 1:
        fig.colorbar(mesh, ax=axes[1:], label="share of closed gates")
    show.save(fig, path)


# ---- the command ------------------------------------------------------------------------------------------

def faults(folder):
    """What is wrong with the records of a folder, a sentence each."""
    curves = archive.by_name(folder / "curves.jsonl")
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


def page(folder, draw):
    """What the README says between its markers; with `draw`, figures too."""
    parts = []
    for name, track in archive.TRACKS.items():
        rows = results(folder / name, track)
        if track["unit"] in rows:
            of, tables, figure = Comparison(rows, track), track_tables, draw_track
        else:
            of, tables, figure = [*rows.values()], plain_tables, draw_plain
        if rows:
            parts += [f"![{track['title']}]({name}.png)\n", *tables(of, track)]
            if draw:
                figure(of, folder / f"{name}.png")
    return "\n".join([*parts, *map(bench_table, archive.lines(folder / "bench.jsonl"))])


def split(path):
    """A README before, between and behind the markers."""
    text = path.read_bytes().decode() if path.exists() else "# Records"
    if BEGIN not in text:
        text = f"{text.rstrip()}\n\n{BEGIN}{END}\n"
    before, _, rest = text.partition(BEGIN)
    old, end, after = rest.partition(END)
    if not end:
        raise RecordError(f"{path} has the line '{BEGIN}' but not '{END}': put it back")
    return before, old, after


def verify(folder):
    places = [folder, *(folder / name for name in archive.TRACKS)]
    wrong = [sentence for place in places for sentence in faults(place)]
    _, tables, _ = split(folder / "README.md")
    if tables and not wrong and tables != f"\n{page(folder, draw=False)}":
        wrong.append("README.md: its tables are not those of the records, which ./run.sh report would write")
    for sentence in wrong:
        print(f"report.py: error: {sentence}", file=sys.stderr)
    print(f"{sum(len(archive.runs(place)) for place in places)} runs read, {len(wrong)} wrong")
    return 2 if wrong else 0


def run(args):
    folder = args.folder
    if not folder.is_dir():
        raise RecordError(f"{folder} is not a folder")
    if args.verify:
        return verify(folder)
    readme = folder / "README.md"
    before, _, after = split(readme)
    if tables := page(folder, draw=True):
        partial = folder / "README.md.partial"
        partial.write_bytes(f"{before}{BEGIN}\n{tables}{END}{after}".encode())
        os.replace(partial, readme)
    parts = [tables, *run_table("Runs by themselves", archive.runs(folder))]
    parts += [bench_table(archive.measurement(path)) for path in sorted(folder.glob("*/bench.json"))]
    print(*filter(None, parts), sep="\n", end="")
    if not any(parts):
        print("no records yet: make one with ./run.sh, or those of a track with ./run.sh tracks run")
    return 0


main = archive.command(__name__, run, __doc__, {
    "folder": dict(nargs="?", type=Path, default=Path(__file__).parent, help="(default: records)"),
    "--verify": dict(action="store_true", help="only check, and say what disagrees")})
