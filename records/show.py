"""What train_gpt_skip.py shows of a run and what changes nothing in it: the plan that --dry_run prints, the
plot, and, at the end, what a step costs beside a dense one and the closing lines.

The script finds it here beside itself; a copy of the script without this file trains too, and shows less.
"""
import math
import os
import shutil
import sys
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_gpt_skip as tgs  # noqa: E402 (the running script, where that is what imports this)


# ---- before: the plan -------------------------------------------------------------------------------------

def print_plan(trainer: tgs.Trainer):
    """What --dry_run says of a run that could start. UserError where the disk has no room for checkpoints."""
    cfg, rt, loader, T = trainer.cfg, trainer.rt, trainer.loader, trainer.cfg.max_seq_len
    parameters, steps = trainer.parameters, cfg.num_steps - trainer.first_step
    weights = 4 * parameters  # bytes; AdamW's two moments are as many each
    folder = Path(cfg.resume or cfg.records_dir).resolve()
    folder = next(p for p in (folder, *folder.parents) if p.exists())
    free, need = shutil.disk_usage(folder).free, 10 * weights  # two checkpoints, a new one, model.safetensors
    if not os.access(folder, os.W_OK):
        raise tgs.UserError(f"--records_dir {cfg.records_dir} cannot be written: name another folder")
    if need > free:
        raise tgs.UserError(f"--records_dir {cfg.records_dir} has room for {size(free)}, checkpoints need "
                            f"{size(need)}: make room, or name another folder")

    def flops(shares):  # of a run in which levels see these shares of the tokens
        stats = [[a * T, a * T, a * T, a * T * (a * T + 1) / 2] for a in shares]
        return 3 * steps * cfg.batch_size * tgs.realised_flops(cfg, stats, T)

    lines = [
        f"{name + ':':6s} {sum(map(len, shards.tokens)):,} tokens in {len(shards.paths)} shards, "
        f"{shards.paths[0]} to {shards.paths[-1].name}" for name, shards in trainer.shards.items()]
    lines += [
        f"model: {parameters:,} parameters in {cfg.n_layers} blocks, control {cfg.control}, {trainer.origin}",
        f"steps: {steps:,} of {cfg.batch_size} x {T} tokens, {steps * cfg.step_tokens:,} in all, "
        f"{steps / loader.steps_per_pass:.3g} passes; ranks: {rt.world}, each with {loader.accumulation} x "
        f"{cfg.device_batch_size} sequences a step",
        f"work:  {flops([1.0] * cfg.n_levels):.3g} training FLOPs if no gate closes"
        + f", {flops(tgs.mean_targets(cfg)):.3g} at the targets" * (cfg.gated and cfg.compute == "packed"),
        f"bytes: a rank holds weights of {size(weights)}, gradients of {size(weights)}, moments of "
        f"{size(2 * weights)}, and activations",
        f"disk:  checkpoints of {size(3 * weights)}, {size(need)} at most; {size(free)} are free in {folder}",
        f"{rt.device}, {str(rt.dtype).split('.')[1]}; nothing was written: start it without --dry_run"]
    if rt.main:
        print(*lines, sep="\n")


def size(n: float) -> str:
    """Bytes as a person reads them."""
    power = min(4, int(math.log10(max(n, 1)) / 3))
    return f"{n / 1000**power:.3g} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"


# ---- at each validation: the plot -------------------------------------------------------------------------

def plot(events: list[dict], cfg: tgs.Config, path: Path):
    """Loss, sparsity and coefficients over steps, as one picture."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    train, val = ([e for e in events if e["kind"] == kind] for kind in ("train", "val"))
    steps, levels = [e["step"] for e in train], range(cfg.n_levels)
    fig, axes = plt.subplots(1, 3 if cfg.gated else 1, figsize=(15 if cfg.gated else 6, 4.2), squeeze=False)
    axes, colors = axes[0], plt.cm.viridis(np.linspace(0.05, 0.9, cfg.n_levels))
    axes[0].plot(steps, [e["cross_entropy"] for e in train], color="0.7", lw=1, label="training")
    axes[0].plot([e["step"] for e in val], [e["cross_entropy"] for e in val], "o-", ms=3, color="C3",
                 label="validation")
    axes[0].set(title="Loss", ylabel="cross-entropy (nats a token)")
    axes[0].legend(frameon=False)
    if cfg.gated:
        target = tgs.mean_targets(cfg)
        for l in levels:
            label = f"{l} and {cfg.n_layers - 1 - l}"
            axes[1].plot(steps, [e["gate_mean"][l] for e in train], color=colors[l], lw=1.2, label=label)
            axes[1].axhline(target[l], color=colors[l], lw=0.8, ls=":")
            axes[2].plot(steps, [e["mean_coef"][l] for e in train], color=colors[l], lw=1.2)
            axes[2].plot(steps, [e["var_coef"][l] for e in train], color=colors[l], lw=1.2, ls="--")
        axes[1].set(title="Mean gate (dotted: its target)", ylim=(-0.02, 1.02), ylabel="mean gate")
        axes[2].set(title="Coefficients (solid: mean, dashed: variance)", ylabel="alpha, beta")
        axes[2].legend(*axes[1].get_legend_handles_labels(), title="blocks", loc="center left",
                       bbox_to_anchor=(1, 0.5), frameon=False)
    for ax in axes:
        ax.set_xlabel("step")
        ax.spines[["top", "right"]].set_visible(False)
    fig.tight_layout()
    tgs.write_atomically(path, lambda f: fig.savefig(f, dpi=120, format="png"))
    plt.close(fig)


# ---- at the end -------------------------------------------------------------------------------------------

def step_seconds(trainer: tgs.Trainer, rounds: int = 5) -> dict:
    """Seconds of forward and backward on one micro-batch, medians: as trained, and with every gate taken out;
    among several ranks also with the gradients averaged, and of averaging as many numbers by itself."""
    cfg, rt, model, parallel = trainer.cfg, trainer.rt, trainer.model, trainer.parallel
    batch = [t.to(rt.device) for t in trainer.loader.pending.result()]
    gradients = torch.zeros(trainer.parameters, device=rt.device)
    variants = {"gated": (cfg, model), "dense": (cfg.dense(), model)}
    variants |= {"averaged": (cfg, parallel), "all_reduce": (cfg, parallel)} if rt.world > 1 else {}
    seconds = {name: [] for name in variants}
    for _ in range(rounds + 1):
        for name, (model.cfg, trainer.parallel) in variants.items():
            rt.synchronize()
            start = time.perf_counter()
            if name == "all_reduce":
                rt.sum(gradients)
            else:
                trainer.micro_step(*batch)
            rt.synchronize()
            seconds[name].append(time.perf_counter() - start)
    model.cfg, trainer.parallel = cfg, parallel
    model.zero_grad(set_to_none=True)
    return {name: median(s[1:]) for name, s in seconds.items()}  # (the first warms up)


def closing_lines(s: dict, cfg: tgs.Config, record: Path):
    """What summary.json, s, says to a person; and what to do next with the record."""
    if cfg.gated:
        full = tgs.realised_flops(cfg.dense(), [[1, 1, 1, (cfg.max_seq_len + 1) / 2]] * cfg.n_levels, 1)
        yield f"sparsity {s['sparsity']:.1%}: the share of tokens that skipped each block, in validation"
        yield from bars(s["gate_zero"])
        yield (f"FLOPs a token, forward: {s['realised_flops_per_token']:.3g} realised, {full:.3g} dense "
               f"({s['realised_flops_per_token'] / full:.2f} of it)")
        yield (f"step time: {s['gated_step_seconds'] / s['dense_step_seconds']:.2f} of a dense step of "
               "the same size (forward and backward of one micro-batch, medians, measured now)")
    else:
        yield f"FLOPs a token, forward: {s['realised_flops_per_token']:.3g}"
    if s["ranks"] > 1:
        longer = s["averaged_step_seconds"] - s["gated_step_seconds"]
        yield (f"{s['ranks']} ranks: averaging the gradients takes {1e3 * s['all_reduce_seconds']:.1f} ms "
               f"alone and lengthens a step by {1e3 * longer:.1f} ms; the busiest rank has "
               f"{s['rank_imbalance']:.3f} of the mean number of active tokens")
    yield (f"record: {record} (look at plot.png)\nnext:\n"
           f"  ./run.sh eval --checkpoint {record}\n"
           f"  ./run.sh sample --checkpoint {record} --prompt 'def ' --show_depth\n"
           f"  ./run.sh report")


def bars(values: list[float], width: int = 24) -> list[str]:
    """A line a layer: its number, a bar, the value between 0 and 1."""
    return [f"  block {l:2d} |{'█' * round(v * width):{width}s}| {v:6.1%}" for l, v in enumerate(values)]
