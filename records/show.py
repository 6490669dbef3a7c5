"""Show one run: its plot, and what it came to. The trainer starts this beside a run at its start, at each
validation and at its end; it reads the record alone, and needs neither torch nor the trainer.

    ./run.sh show records/X                         # what a live or packed run came to, and what to do next
    ./run.sh show records/X --plot                  # draw records/X/plot.png, and warn of a run that fails
    ./run.sh show records/frontier/NAME --plot      # of a packed run: records/frontier/NAME.png
"""
import math
import os
from pathlib import Path
from statistics import fmean as mean

import archive

WITHOUT_TARGET = "dense", "none", "sparsity", "sparsity_variance"
MOVING = "adaptive", "proportional", "proportional_derivative"  # controls that move coefficients


def targets(c):
    """Of the mean gate of each level; none where the control has none."""
    start, end, levels = c["mean_target_start"], c["mean_target_end"], c["n_layers"] // 2
    if c["control"] in WITHOUT_TARGET:
        return []
    return [start + (end - start) * level / max(levels - 1, 1) for level in range(levels)]


# ---- the picture ------------------------------------------------------------------------------------------

def canvas(columns, size, rows=1):
    """A figure and its rows of axes."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
    return fig, axes


def save(fig, path):
    """Whole, or as it was."""
    fig.savefig(f"{path}.partial", dpi=100, format="png")
    os.replace(f"{path}.partial", path)


def plot(run, curve, path):
    """Loss, mean gates and coefficients over steps, as one picture."""
    panels = 3 if "gate_mean" in curve else 1
    fig, [[loss, *rest]] = canvas(panels, (1 + 5 * panels, 4.2))
    loss.plot(curve["step"], curve["cross_entropy"], color="0.7", lw=1, label="training")
    at, losses = ([v[k] for v in run["validations"]] for k in ("step", "cross_entropy"))
    loss.plot(at, losses, "o-", ms=3, color="C3", label="validation")
    loss.set(title="Loss", xlabel="step", ylabel="cross-entropy (nats a token)")
    loss.legend(frameon=False)
    if rest:
        draw_gates(*rest, run["config"], curve)
    save(fig, path)


def draw_gates(gates, coefs, config, curve):
    from matplotlib import cm
    L, aims = config["n_layers"], targets(config)
    colors = cm.viridis([1.7 * l / L + 0.05 for l in range(L // 2)])
    for ax in gates, coefs:
        ax.set_prop_cycle(color=colors)
        ax.set_xlabel("step")
    gates.plot(curve["step"], curve["gate_mean"], label=[f"{l} and {L - 1 - l}" for l in range(L // 2)])
    gates.hlines(aims, 0, 1, colors[:len(aims)], ":", transform=gates.get_yaxis_transform())
    gates.set(title=f"Mean gate{' (dotted: its target)' if aims else ''}", ylim=(-0.02, 1.02))
    coefs.plot(curve["step"], curve["mean_coef"])
    coefs.plot(curve["step"], curve["var_coef"], "--")
    coefs.set(title="Coefficients (solid: mean, dashed: variance)", ylabel="alpha, beta")
    coefs.legend(handles=gates.lines, title="blocks", loc="center left", bbox_to_anchor=(1, 0.5),
                 frameon=False)


# ---- what there is to say ---------------------------------------------------------------------------------

def opening_lines(run):
    """Where, on what, and of which model and data."""
    c, env = run["config"], run["env"]
    yield f"{run['place']}  ({env['command']})"
    yield (f"{env['device']}, processes: {env['world_size']}, threads: {env['threads']}, torch "
           f"{env['packages']['torch']}, {env['dtype']}{', compiled' if env['compile'] else ''}")
    aims = targets(c)
    yield (f"model: {c['n_layers']} blocks, d {c['dim']}, {c['n_heads']} heads, {archive.parameters(c):,} "
           f"parameters, control {c['control']}"
           f"{f' to a mean gate of {aims[-1]} in the middle' if aims else ''}")
    if len(aims) == 1:
        yield "with 2 blocks there is one level, whose target is --mean_target_start"
    source = Path(c["init_from"] or "") / "config.json"
    dense = source.exists() and archive.read_object(source).get("control") == "dense"
    routers = ", which is dense: the routers are new" if dense and archive.n_routers(c) else ""
    yield f"weights: {c['init_from'] or 'new'}{routers}"
    for split, shards in env["shards"].items():
        tokens = min(sum(shard["tokens"] for shard in shards), c[f"{split}_tokens"] or math.inf)
        yield f"{split}: {tokens:,} tokens"
    yield f"steps: {c['num_steps']} of {c['batch_size']} x {c['max_seq_len']} tokens"


def warnings(run):
    """(the paper's way to fail, what to do) where the last of the validations shows one."""
    losses = [v["cross_entropy"] for v in run["validations"]]
    if not losses:
        return
    c, last = run["config"], run["validations"][-1]
    aim, closed = 1 - mean(targets(c) or [1.0]), mean(last["gate_zero"])
    if c["control"] in MOVING and 2 * last["step"] >= c["num_steps"] and closed < aim / 2:
        yield "gates stay open", (f"{closed:.1%} of the tokens skip, the targets ask for {aim:.1%}; try a larger "
                                  "--coef_update, such as 0.3 for weights that --init_from brings")
    if losses[-1] > losses[0] + 0.1:
        yield "divergence", "validation loss is above where it began; try a lower --lr or --norm sandwich"
    elif losses[-1] > min(losses) + 0.2:
        yield "collapse of performance", (f"validation loss was {min(losses):.4f}; try a smaller "
                                          "--coef_update")


def closing_lines(run):
    """What a run came to, and what to do next with it."""
    c, s, place = run["config"], run["summary"], run["place"]
    if s.get("interrupted", True):
        yield f"{place} is not finished"
        return
    flops = s["realised_flops_per_token"]
    if c["control"] == "dense":
        yield f"FLOPs a token, forward: {flops:.3g}"
    else:
        _, full = archive.realised_flops(c | {"control": "dense"}, [0.0] * c["n_layers"])
        yield f"sparsity {s['sparsity']:.1%}: the share of tokens that skipped each block, in validation"
        yield from bars(s["gate_zero"])
        part = "" if c.get("mask_documents") else f", {full:.3g} dense ({flops / full:.2f} of it)"
        yield f"FLOPs a token, forward: {flops:.3g} realised{part}"
    ddp = s.get("ddp") or {}  # (which few steps leave without times)
    if total := ddp.get("avg_backward_comm_time"):
        hidden = ddp["avg_backward_compute_comm_overlap_time"]
        yield (f"averaging the gradients takes {total / 1e6:.1f} ms a step, of which {hidden / 1e6:.1f} ms "
               "are hidden behind the backward pass")
    if "folder" in run:
        events = archive.read_events(run["folder"])
        if uneven := [e["rank_imbalance"] for e in events if "rank_imbalance" in e]:
            yield f"the busiest rank has {mean(uneven):.3f} of the mean number of active tokens"
        yield (f"record: {place} (look at plot.png)\nnext:\n  ./run.sh eval --checkpoint {place}\n"
               f"  ./run.sh sample --checkpoint {place} --prompt 'def ' --show_depth\n  ./run.sh report")
    else:
        yield f"packed: ./run.sh --config {place} runs it again, ./run.sh show {place} --plot draws it"


def bars(values, width=24):
    """A line a layer: its number, a bar, the value between 0 and 1."""
    return [f"  block {l:2d} |{'█' * round(v * width):{width}s}| {v:6.1%}" for l, v in enumerate(values)]


def show(args):
    run, curve = archive.find(args.record)
    run["place"], log = args.record, args.record / "log.txt"
    lines = closing_lines(run)
    if args.opening:
        lines = opening_lines(run)
    if args.plot:
        plot(run, curve, log.with_name("plot.png") if "folder" in run else Path(f"{args.record}.png"))
        said = log.read_text() if log.exists() else ""
        lines = [f"WARNING: {way}: {advice}" for way, advice in warnings(run)
                 if f"WARNING: {way}" not in said]
    for line in lines:
        print(line)
        if args.log:
            with open(log, "a") as file:
                print(line, file=file)
    return 0


main = archive.command(__name__, show, __doc__, {
    "record": dict(type=Path, help="a run's folder, or PARENT/NAME of a packed one"),
    "--plot": dict(action="store_true", help="draw it, and warn of a run that fails, instead"),
    "--opening": dict(action="store_true", help="where, on what and of what it is, instead"),
    "--log": dict(action="store_true", help="append what is said to its log.txt, too")})
