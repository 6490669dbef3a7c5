"""Tracks: comparisons that decide, by seeds and significance. records/README.md states the rules.

    ./run.sh tracks run  [--seeds 4] [--rows dense_8 gated_8_0.25]    # what is not recorded yet
    ./run.sh tracks time [--rounds 9]                                 # the rows' cost, timed in turn
    ./run.sh report                                                   # tables and figure of what is recorded

A row is a setting, recorded once a seed under records/frontier; interrupted runs go on. All sides of a
comparison are run seed by seed, on one thread: different rows may run at once, since losses do not depend on
what else runs, and costs are not taken from these runs but from `time` and from exact FLOPs. `time` needs the
weights of gated rows, which git ignores: a seed without weights counts with the mean of its row's others.

Two tracks are read from the same rows. *Frontier*: loss at equal cost, against the line through the dense
models of the same regime. *Speedrun*: the least training cost to reach TARGET, what the dense model of 8
blocks reaches; rows whose regime has no dense line belong to it alone.
"""
import argparse
import json
import math
import os
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from statistics import fmean as mean, median, stdev

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
import archive  # noqa: E402

HERE = Path(__file__).resolve().parent
FRONTIER = HERE / "frontier"
BASE = ["--preset", "demo", "--num_steps", "1000", "--batch_size", "16", "--device_batch_size", "16",
        "--cooldown_fraction", "0", "--val_tokens", "262144", "--val_every", "250", "--save_every", "1000",
        "--log_every", "50", "--metrics_every", "5", "--compile", "--device", "cpu"]
TARGET = 1.432  # nats, a fixed threshold: the mean of dense_8
DENSE, GATED = "dense", "proportional control (gamma 0.03), Eq. 3 on keys, a quarter in the middle"
PAPER = "--control proportional --coef_update 0.03"
ROWS = {  # name: (what it is, flags)
    "dense_8": (DENSE, "--control dense"),
    "gated_8_0.25": (GATED, f"{PAPER} --mean_target_end 0.25"),
    "dense_4": (DENSE, "--control dense --n_layers 4"),
    "dense_6": (DENSE, "--control dense --n_layers 6"),
    "dense_2": (DENSE, "--control dense --n_layers 2"),
    "gated_8_0.25_gamma0.003": ("gated_8_0.25 with a tenth of the coefficient update",
                                "--control proportional --coef_update 0.003 --mean_target_end 0.25"),
    "random_8_0.25": ("the targets of gated_8_0.25 met by a coin instead of a router",
                      "--control random --mean_target_end 0.25"),
}
MUON = {  # the same with Muon for the blocks' matrices, and more of them
    **ROWS,
    "gated_8_0.5": ("half of the tokens in the middle", f"{PAPER} --mean_target_end 0.5"),
    "gated_8_0.125": ("an eighth of the tokens in the middle", f"{PAPER} --mean_target_end 0.125"),
    "gated_8_0.125_gamma0.003": ("an eighth of the tokens in the middle, a tenth of the coefficient update",
                                 "--control proportional --coef_update 0.003 --mean_target_end 0.125"),
    "gated_12_0.25": ("12 blocks, a quarter in the middle", f"{PAPER} --n_layers 12 --mean_target_end 0.25"),
    "released_8_0.25": ("gated_8_0.25 with keys that no gate masks, as the authors' code has it (which "
                        "computes all tokens: FLOPs are of that)",
                        f"{PAPER} --mean_target_end 0.25 --gate_attention none --compute masked"),
    "pre_8_0.25": ("gated_8_0.25 with pre-norm", f"{PAPER} --mean_target_end 0.25 --norm pre"),
    "pre_dense_8": ("dense with pre-norm", "--control dense --norm pre"),
    "adaptive_8_0.25": ("Table 1's adaptive control", "--mean_target_end 0.25 --control adaptive"),
    "derivative_8_0.25": ("Table 1's proportional-derivative control",
                          "--mean_target_end 0.25 --control proportional_derivative"),
    **{f"derivative_{L}_{target}": (
        f"{L} blocks, {share} of the tokens in the middle, Table 1's proportional-derivative control",
        f"--n_layers {L} --mean_target_end {target} --control proportional_derivative")
       for L in (4, 6) for target, share in ((0.25, "a quarter"), (0.5, "half"))},
    "gated_4_0.5": ("4 blocks, half of the tokens in the middle, proportional control",
                    f"{PAPER} --n_layers 4 --mean_target_end 0.5"),
    "dense_3": (DENSE, "--control dense --n_layers 3"),
    "dense_5": (DENSE, "--control dense --n_layers 5"),
    "none_8": ("gates that nothing closes", "--control none"),
    "sparsity_8": ("Table 1's fixed coefficient of the mean", "--control sparsity"),
    "sparsity_variance_8": ("Table 1's fixed coefficients of mean and variance",
                            "--control sparsity_variance"),
    "sparsity_variance_l2_8_0.25": ("Table 1's squared deviations from the targets",
                                    "--mean_target_end 0.25 --control sparsity_variance_l2"),
    "sparsity_variance_l2_8_0.25_coef3": (
        "the same with coefficients of 3 for 0.1",
        "--mean_target_end 0.25 --control sparsity_variance_l2 --mean_coef_init 3 --var_coef_init 3"),
}
ROWS = {name: (it_is, f"{flags} --optimizer adamw") for name, (it_is, flags) in ROWS.items()} | {
    f"muon_{name}": (f"Muon: {it_is}", f"{flags} --optimizer muon") for name, (it_is, flags) in MUON.items()}
WSD = "--cooldown_fraction 0.5"  # warm-up, a stable rate, decay
B8, T1024 = "--batch_size 8 --device_batch_size 8", "--max_seq_len 1024 --batch_size 2 --device_batch_size 2"
REGIMES = {  # other numbers of tokens, lengths and schedules, each with a dense line of its own
    "b8": ("1,300 steps of 8", f"{B8} --num_steps 1300"),
    "b8_1600": ("1,600 steps of 8", f"{B8} --num_steps 1600"),
    "b8_wsd": ("1,300 steps of 8, wsd", f"{B8} --num_steps 1300 {WSD}"),
    "b8_1600_wsd": ("1,600 steps of 8, wsd", f"{B8} --num_steps 1600 {WSD}"),
    "t1024_wsd": ("1,600 steps of 2 x 1024, wsd", f"{T1024} --num_steps 1600 {WSD}"),
}
ROWS |= {f"muon_{regime}_{name}": (f"Muon: {MUON[name][0]}, {differs}",
                                   f"{MUON[name][1]} --optimizer muon {flags}")
         for regime, (differs, flags) in REGIMES.items()
         for name in ("dense_4", "dense_5", "dense_6", "dense_8", "derivative_8_0.25")}
TRIED = {  # settings that are no flag, most because they were no gain: the script in their record has them
    "muon_prop_w0.5": "Muon: a quarter in the middle, targets falling from 1 over the first half, a "
                      "third of the coefficient update (few gates reach 0)",
    "muon_bias_w0.5": "Muon: targets as in muon_prop_w0.5, met by moving the routers' biases, without a "
                      "gate loss",
    "muon_quantile_w0.5": "Muon: targets as in muon_prop_w0.5, a running quantile of the scores as "
                          "threshold, gates linear over a quarter of the open tokens",
    "muon_quantile_w0.1": "Muon: muon_quantile_w0.5, targets falling over the first tenth",
    "muon_late_dense_8": "Muon: dense, the 4 middle blocks run by nobody for the first 0.4 of the steps, "
                         "then opened as the identity (their output norms start at 0)",
    "muon_late_gated_8_0.25": "Muon: gated_8_0.25_gamma0.003, the middle opened as in muon_late_dense_8",
    "muon_leak1_8_0.25": "Muon: derivative_8_0.25, fully open gates too teach the router (straight through "
                         "its ReLU)",
    "muon_slow_4_0.5": "Muon: derivative_4_0.5, the routers at a tenth of the rate",
    "muon_noise_8_0.25": "Muon: gated_8_0.25_gamma0.003, normal noise of 0.5 on the routers' scores in "
                         "training, falling with the rate",
    "muon_b8_1600_zero_8_0.25": "Muon: derivative_8_0.25, routers that start without a preference (weights "
                                "0, bias 0.05), 1600 steps of 8 sequences",
    "muon_b8_1600_wsd_late": "Muon: derivative_8_0.25, 1,600 steps of 8, wsd, uncontrolled for a fifth of "
                             "the steps, then targets falling from 1 until half of them; open gates too "
                             "teach the router, straight through its ReLU",
    "muon_b8_1600_wsd_sharp": "Muon: muon_b8_1600_wsd_late, the gates' slope in S growing to 10 meanwhile",
    "muon_b8_1600_wsd_reopen": "Muon: derivative_8_0.25, 1,600 steps of 8, wsd, closed gates too feel the "
                               "mean's coefficient",
    "muon_b8_1600_wsd_reopen_leak": "Muon: muon_b8_1600_wsd_reopen, open gates too teach the router",
    "muon_b8_1600_wsd_reopen_slow": "Muon: muon_b8_1600_wsd_reopen_leak, the routers at a tenth of the rate",
    "muon_b8_1600_wsd_slow": "Muon: derivative_8_0.25, 1,600 steps of 8, wsd, the routers at a tenth of the "
                             "rate",
    "muon_b8_1600_wsd_slow_open": "Muon: muon_b8_1600_wsd_slow, the controller observes the share of open "
                                  "gates instead of their mean",
    "muon_b8_1600_topk_bin": "Muon: the highest scores of a batch are open (in validation, those above a "
                             "running threshold) with gates of 1, the target's share from a fifth of the "
                             "steps on, closed tokens teach nothing, 1600 steps of 8 sequences",
    "muon_b8_1600_topk_sig": "Muon: muon_b8_1600_topk_bin, gates a sigmoid of the score above the threshold",
    "muon_b8_1600_topk_sig_late": "Muon: muon_b8_1600_topk_sig, the shares falling from a fifth to half of "
                                  "the steps",
}

# ---- running ----------------------------------------------------------------------------------------------

def parts(row: str) -> tuple[str | None, str | None, str]:
    """(optimizer, regime, setting) of a row's name."""
    regimes = "|".join(sorted(REGIMES, key=len, reverse=True))
    return re.fullmatch(rf"(?:(muon)_)?(?:({regimes})_)?(.+)", row).groups()


def on_line(row: str) -> bool:
    """Is it a point of a dense line?"""
    return re.fullmatch(r"dense_\d+", parts(row)[2]) is not None


def recorded(folder: Path) -> dict[tuple[str, int], dict]:
    """Runs by (row, seed); the newest of each."""
    return {(run["row"], run["seed"]): run for run in archive.runs(folder) if "row" in run}


def relative(path: Path) -> str:
    """As records show it: relative to the project where it lies inside."""
    path = path.resolve()
    return str(path.relative_to(HERE.parent) if path.is_relative_to(HERE.parent) else path)


def run(rows: list[str], seeds: int, folder: Path) -> int:
    found, seconds = recorded(folder), []
    todo = [(row, seed) for seed in range(seeds) for row in rows
            if (row, seed) not in found or found[row, seed]["state"] != "finished"]
    for i, (row, seed) in enumerate(todo):
        left = f", about {mean(seconds) * (len(todo) - i) / 60:.0f} minutes left" if seconds else ""
        print(f"tracks.py: {row}, seed {seed}: run {i + 1} of {len(todo)}{left}", flush=True)
        flags = [*BASE, *ROWS[row][1].split(), "--seed", str(seed), "--name", f"{row}_seed{seed}",
                 "--records_dir", relative(folder)]
        if (row, seed) in found:
            flags = ["--resume", relative(found[row, seed]["folder"])]
        start = time.perf_counter()
        child = subprocess.Popen([sys.executable, "train_gpt_skip.py", *flags], cwd=HERE.parent,
                                 env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
        try:
            if status := child.wait():
                return status
        except KeyboardInterrupt:
            child.wait()  # it too was interrupted, and saves
            return 130
        seconds.append(time.perf_counter() - start)
    return 0


def pack(folders: list[Path]) -> int:
    """Pack each finished record among these folders and inside them; 2 if one may not be packed."""
    status = 0
    for folder in archive.folders(folders):
        try:
            print(archive.pack(folder), flush=True)
        except archive.RecordError as e:
            print(f"tracks.py: error: {folder.name}: {e}", file=sys.stderr)
            status = 2
    return status


# ---- timing -----------------------------------------------------------------------------------------------

def measure(rows: list[str], rounds: int, folder: Path) -> int:
    """Seconds of a forward pass and of a training step (forward, backward, optimizer), compiled, of each
    dense model, by row (with new weights: they do not matter), and of each other seed whose weights are here,
    by record; on the same validation text, in turn in this process: medians, and the medians of the rounds'
    ratios to dense_8's (a machine that drifts moves both sides of a round)."""
    import torch
    import train_gpt_skip as tgs
    torch.set_num_threads(1)
    torch._dynamo.config.recompile_limit = 64  # rows share functions: each kind of gate and norm is a graph
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    todo, sides = {row: row for row in [*filter(on_line, rows), "dense_8"]}, {}
    todo |= {run["name"]: row for (row, _), run in recorded(folder).items()
             if row in rows and not on_line(row) and (folder / run["name"] / "model.safetensors").exists()}
    for row in sorted(set(rows) - set(todo.values())):
        print(f"tracks.py: {row} is left out: no weights of it are here")
    for name, row in todo.items():
        _, given = tgs.parse_settings(tgs.Parser(), [*BASE, *ROWS[row][1].split()])
        record = {} if name == row else {"init_from": str(folder / name)}
        cfg, weights = tgs.resolve(given | record, tgs.GATE_FIELDS)
        rt = tgs.Runtime(cfg)
        model = tgs.build_model(cfg, rt, weights, name)
        optimizers = tgs.make_optimizers(model, cfg).values()
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = 0.0
        sides[name] = model, optimizers
    shards, seconds = tgs.Shards(cfg, "val"), {name: ([], []) for name in sides}
    tokens = max(model.cfg.device_batch_size * model.cfg.max_seq_len for model, _ in sides.values())
    for i in range(rounds + 2):
        for name, (model, optimizers) in sides.items():
            B, T = model.cfg.device_batch_size, model.cfg.max_seq_len
            places = tgs.sequences(shards, model.cfg)
            first = i * tokens // T % (len(places) - B)
            batch = torch.stack([shards.window(*place, T + 1) for place in places[first:first + B]])

            def forward():
                with torch.no_grad():
                    model(batch[:, :-1], batch[:, 1:])

            def step():
                model(batch[:, :-1], batch[:, 1:])[0].backward()
                for optimizer in optimizers:
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)

            for into, what in zip(seconds[name], (forward, step)):
                start = time.perf_counter()
                what()
                of = tokens / B / T if what is forward else 1  # a forward pass of as many tokens for all
                into.append((time.perf_counter() - start) * of)
    kept = {name: {"forward": forward[2:], "train": train[2:]}  # (the first two compile)
            for name, (forward, train) in seconds.items()}
    ratios = {name: {k: median(a / b for a, b in zip(s[k], kept["dense_8"][k])) for k in s}
              for name, s in kept.items()}
    content = {"env": tgs.environment(rt, {"val": shards}), "rounds": rounds, "ratios": ratios,
               "seconds": {name: {k: median(s[k]) for k in s} for name, s in kept.items()}}
    path = tgs.make_folder(folder, "times") / "times.json"
    tgs.write_atomically(path, lambda f: f.write((json.dumps(content, indent=1) + "\n").encode()))
    for name, r in ratios.items():
        print(f"{name:60s}" + "".join(f"  {k} {r[k]:.3f} of dense_8's" for k in r))
    print(f"record: {path.parent}")
    return 0


# ---- deciding ---------------------------------------------------------------------------------------------

COSTS = {  # of a row, as ratios to the dense model of 8 blocks
    "forward FLOPs": "FLOPs of a forward pass, realised", "training FLOPs": "FLOPs of training, realised",
    "forward time": "time of a forward pass, measured",
    "training time": "time of training, measured (a step's, times the FLOPs of training over its)"}


def survival(t: float, df: float) -> float:
    """P(T > t) of Student's t with df degrees of freedom: where T = sqrt(df) tan(a), a has a density that is
    proportional to cos(a)^(df - 1)."""
    def area(low):
        a = np.linspace(low, math.pi / 2, 100_001)
        return np.trapezoid(np.cos(a).clip(0) ** (df - 1), a)

    return area(math.atan(t / math.sqrt(df))) / area(-math.pi / 2)


def quantile(p: float, df: float) -> float:
    """The t that Student's T exceeds with probability p."""
    low, high = 0.0, 1e3
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if survival(middle, df) > p else (low, middle)
    return low


def gather(folder: Path) -> dict[str, dict]:
    """Rows by name: losses of the finished seeds, mean costs, blocks, date, `measured`: of each seed, all
    times of the measurement that has it, `dense`: is it a point of a dense line?, `line`: which one is its
    own, by optimizer and regime, and `full`: is there one?"""
    rows, timed, seeds = {}, {}, {}  # timed: by name its newest times over dense_8's, and all of that record
    found = recorded(folder)
    row_of = {run["name"]: row for (row, _), run in found.items()}
    for content in archive.measurements(folder, "times"):
        seconds = content["seconds"]  # the first records have no ratios
        measured = content.get("ratios") or {
            name: {k: t[k] / seconds["dense_8"][k] for k in t} for name, t in seconds.items()}
        timed |= {name: (t, measured) for name, t in measured.items()}
    for name in filter(row_of.__contains__, timed):
        seeds.setdefault(row_of[name], []).append(timed[name])
    for row, of_seeds in seeds.items():  # for seeds whose weights were not there
        timed[row] = {k: mean(t[k] for t, _ in of_seeds) for k in of_seeds[0][0]}, of_seeds[-1][1]
    for (name, seed), run in sorted(found.items()):
        if run["state"] == "finished":
            s = run["summary"]
            row = rows.setdefault(name, dict(name=name, losses=[], costs={}, measured=[]))
            row["losses"].append(s["cross_entropy"])
            row |= dict(dense=on_line(name), n_layers=s["n_layers"], steps=s["step"],
                        date=run["name"][:10])
            times, measured = timed.get(run["name"], timed.get(name, ({}, {})))
            row["measured"].append(measured)
            if times:
                step_tokens = s["tokens_per_s"] * s["train_seconds"] / s["step"]
                steps = s["train_flops"] / (3 * s["realised_flops_per_token"] * step_tokens)  # as timed
            for cost, value in (("forward FLOPs", s["realised_flops_per_token"]),
                                ("training FLOPs", s["train_flops"]), ("forward time", times.get("forward")),
                                ("training time", times and times["train"] * steps or None)):
                row["costs"].setdefault(cost, []).append(value)
    for row in rows.values():
        row["each"] = {k: v for k, v in row["costs"].items() if None not in v}  # seed by seed
        row["costs"] = {k: mean(v) for k, v in row["each"].items()}
    unit = rows.get("dense_8", {}).get("costs", {})
    for row in rows.values():
        row["each"] = {k: [x / unit[k] for x in v] for k, v in row["each"].items() if k in unit}
        row["costs"] = {k: v / unit[k] for k, v in row["costs"].items() if k in unit}
        row["mean"], row["n"] = mean(row["losses"]), len(row["losses"])
        optimizer, regime, _ = parts(row["name"])
        row["line"] = ("Muon" if optimizer else "AdamW") + (f", {REGIMES[regime][0]}" if regime else "")
        row["sd"] = stdev(row["losses"]) if row["n"] > 1 else math.nan
    lines = Counter(row["line"] for row in rows.values() if row["dense"])
    for row in rows.values():
        row["full"] = "," not in row["line"] or lines[row["line"]] > 1
    return rows


def dense_line(rows: dict[str, dict], line: str, cost: str, measured={}) -> list[tuple[float, dict]]:
    """(cost, row) of the dense rows of a line, the cheapest first; their times those of a measurement, if it
    has several of them."""
    found = [r for r in rows.values() if r["dense"] and r["line"] == line and cost in r["costs"]]
    points = [(r["costs"][cost], r) for r in found]
    if "time" in cost and len(here := [r for r in found if r["name"] in measured]) > 1:
        steps = rows["dense_8"]["steps"]
        points = [(measured[r["name"]]["forward"] if cost == "forward time" else
                   measured[r["name"]]["train"] * r["steps"] / steps, r) for r in here]
    return sorted(points, key=lambda point: point[0])


def shares(x: float, dense: list[tuple[float, dict]]) -> dict[str, float] | None:
    """The line through the dense rows at cost x, as their weights in it by name; None beyond their range, but
    for a twentieth above it, where the last segment goes on (below the convex curve: this favours dense)."""
    for (low, a), (high, b) in zip(dense, dense[1:]):
        if low <= x <= high * (1.05 if b is dense[-1][1] else 1):
            w = (x - low) / (high - low)
            return {a["name"]: 1 - w, b["name"]: w}
    return None


def against_line(row: dict, rows: dict[str, dict], cost: str) -> tuple | None:
    """(difference, p, least seeds of a side, standard error, degrees of freedom) of a row to the line through
    the dense rows of its optimizer, each seed at its own cost and, for a time, against the line of its own
    measurement; p, one-sided, that the row lies as far below by chance. Welch's t: to the variance of the
    mean difference comes that of the line, the sum over dense rows of weight^2 variance / seeds. None outside
    the line's range."""
    lines = [shares(x, dense_line(rows, row["line"], cost, measured))
             for x, measured in zip(row["each"].get(cost, []), row["measured"])]
    if not lines or None in lines:
        return None
    differences = [loss - sum(w * rows[name]["mean"] for name, w in line.items())
                   for loss, line in zip(row["losses"], lines)]
    sides = [(1.0, stdev(differences) if row["n"] > 1 else math.nan, row["n"])]
    sides += [(mean(line.get(name, 0.0) for line in lines), rows[name]["sd"], rows[name]["n"])
              for name in sorted({name for line in lines for name, w in line.items() if w})]
    seeds = min(n for _, _, n in sides)
    if seeds < 2:
        return mean(differences), math.nan, seeds, math.nan, math.nan
    variance = [w * w * sd * sd / n for w, sd, n in sides]
    df = sum(variance) ** 2 / sum(v * v / (n - 1) for v, (_, _, n) in zip(variance, sides))
    error = math.sqrt(sum(variance))
    return mean(differences), survival(-mean(differences) / error, df), seeds, error, df


def what(name: str) -> str:
    return ROWS[name][0] if name in ROWS else TRIED.get(name, "-")


def verdict(row: dict, rows: dict[str, dict], cost: str) -> str:
    if row["dense"] or (found := against_line(row, rows, cost)) is None:
        return "-"
    difference, p, seeds, *_ = found
    if seeds < 4:
        return f"{difference:+.4f}: too few seeds" + " of the line" * (row["n"] >= 4)
    return f"{difference:+.4f}, p {p:.2g}: {'beats' if p < 0.01 else 'does not beat'}"


def table(rows: dict[str, dict]) -> list[list[str]]:
    """The frontier: headings, and a line a row, the best first."""
    lines = [["row", "what", "seeds", "val. loss (nats)", *COSTS.values(),
              *(f"against the dense line by {c}" for c in COSTS), "date"]]
    for r in sorted((r for r in rows.values() if r["full"]), key=lambda r: r["mean"]):
        lines.append([r["name"], what(r["name"]), str(r["n"]),
                      f"{r['mean']:.4f}" + f" ± {r['sd']:.4f}" * (r["n"] > 1),
                      *(f"{r['costs'][c]:.3f}" if c in r["costs"] else "-" for c in COSTS),
                      *(verdict(r, rows, c) for c in COSTS), r["date"]])
    return lines


def reaches(row: dict) -> str:
    """Is the row's mean loss below TARGET? One-sided, by Student's t."""
    difference = row["mean"] - TARGET
    if row["n"] < 4:
        return f"{difference:+.4f}: too few seeds"
    p = survival(-difference / (row["sd"] / math.sqrt(row["n"])), row["n"] - 1)
    return f"{difference:+.4f}, p {p:.2g}: {'reaches' if p < 0.01 else 'does not reach'}"


def speedrun(rows: dict[str, dict]) -> list[list[str]]:
    """The speedrun: headings, and a line for each row that comes near the target at no more training FLOPs
    than dense_8's, the cheapest first."""
    costs = "training FLOPs", "training time"
    lines = [["row", "what", "steps", "seeds", "val. loss (nats)", *(COSTS[c] for c in costs),
              f"against the target of {TARGET}", "date"]]
    near = [r for r in rows.values() if r["mean"] < TARGET + 0.03 and r["costs"].get(costs[0], 9) <= 1]
    for r in sorted(near, key=lambda r: r["costs"][costs[0]]):
        lines.append([r["name"], what(r["name"]), str(r["steps"]), str(r["n"]),
                      f"{r['mean']:.4f}" + f" ± {r['sd']:.4f}" * (r["n"] > 1),
                      *(f"{r['costs'][c]:.3f}" if c in r["costs"] else "-" for c in costs), reaches(r),
                      r["date"]])
    return lines


def figure(rows: dict[str, dict], path: Path):
    """Every row of 4 and more seeds against its dense line, by the cost of a forward pass; a bar of t's
    quantile that ends left of 0 is a p under 0.01. And, of the regime with most rows, the line itself."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    found = {r["name"]: {cost: against_line(r, rows, cost) for cost in ("forward FLOPs", "forward time")}
             for r in rows.values() if not r["dense"] and r["n"] >= 4}
    found = {name: {cost: x for cost, x in by.items() if x and x[2] >= 4} for name, by in found.items()}
    found = {name: by for name, by in found.items() if "forward FLOPs" in by}
    names = sorted(found, key=lambda name: found[name]["forward FLOPs"][0])
    line = Counter(r["line"] for r in rows.values()).most_common(1)[0][0]
    fig, (left, right) = plt.subplots(1, 2, figsize=(13, 2 + 0.27 * max(12, len(names))),
                                      width_ratios=(1, 1.2), layout="constrained")
    points = dense_line(rows, line, "forward FLOPs")
    left.errorbar([x for x, _ in points], [r["mean"] for _, r in points], [r["sd"] for _, r in points],
                  fmt="s-", color="0.4", ms=5, lw=1, capsize=3)
    for x, r in points:
        left.annotate(f"{r['n_layers']} blocks", (x, r["mean"]), (5, 5), textcoords="offset points",
                      fontsize=8, color="0.4")
    for i, name in enumerate(names):
        if (r := rows[name])["line"] == line:
            at = r["costs"]["forward FLOPs"], r["mean"]
            left.plot(*at, "o", color="C3", ms=5)
            left.annotate(str(i + 1), at, (0, -12), textcoords="offset points", fontsize=8, color="C3",
                          ha="center")
    left.set(title=f"The line of {line}; numbers as on the right", ylabel="validation loss (nats a token)",
             xlabel="FLOPs of a forward pass, realised (dense model of 8 blocks = 1)")
    for cost, shift, fmt, color in (("forward FLOPs", -0.15, "o", "C3"), ("forward time", 0.15, "D", "C0")):
        at = [(i + shift, *found[name][cost]) for i, name in enumerate(names) if cost in found[name]]
        right.errorbar([difference for _, difference, *_ in at], [y for y, *_ in at], fmt=fmt, ms=5, lw=1,
                       xerr=[quantile(0.01, df) * error for *_, error, df in at], color=color,
                       label=f"at equal {COSTS[cost].split(',')[0]}")
    right.axvline(0, color="0.4", lw=1)
    labels = [f"{name}, n {rows[name]['n']}  ({i})" for i, name in enumerate(names, 1)]
    right.set_yticks(range(len(names)), labels, fontsize=8)
    right.invert_yaxis()
    right.legend(frameon=False, loc="upper right")
    right.set(title="Against the dense line (a bar left of 0: p < 0.01)",
              xlabel="nats a token")
    for ax in (left, right):
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(color="0.93", lw=0.8)
        ax.set_axisbelow(True)
    fig.savefig(path, dpi=100)
    plt.close(fig)


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "time", "pack"))
    parser.add_argument("folders", nargs="*", type=Path, help="pack: records, or folders of records")
    parser.add_argument("--seeds", type=int, default=4, help="seeds of each row (default: 4)")
    parser.add_argument("--rounds", type=int, default=9, help="measurements of each row (default: 9)")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW",
                        help="of ROWS in this file (default: all)")
    parser.add_argument("--records_dir", type=Path, default=FRONTIER, help=f"(default: {FRONTIER.name})")
    args = parser.parse_args(argv)
    if args.what == "pack":
        return archive.exit_status(lambda: pack(args.folders or [args.records_dir]))
    if args.what == "run":
        return run(args.rows, args.seeds, args.records_dir)
    sys.path.insert(0, str(HERE.parent))
    from train_gpt_skip import exit_status
    return exit_status(lambda: measure(args.rows, args.rounds, args.records_dir))


if __name__ == "__main__":
    sys.exit(main())
