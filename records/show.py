"""What train_gpt_skip.py shows of a run and what changes nothing in it: the plan that --dry_run prints, the
opening lines, the plot and warnings; and, at the end, the closing lines and those numbers of summary.json
that are measured then, or estimated.

The script finds it here beside itself; a copy of the script without this file trains too, and shows less.
"""
import dataclasses
import math
import os
import shutil
import sys
import time
from pathlib import Path
from statistics import fmean as mean, median

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_gpt_skip as tgs  # noqa: E402 (the running script, where that is what imports this)


def dense(cfg: tgs.Config) -> tgs.Config:
    """The same model without routers."""
    return dataclasses.replace(cfg, control="dense", **dict.fromkeys(tgs.OF_CONTROL))


def aims(cfg: tgs.Config) -> bool:
    """Has the control targets?"""
    return cfg.control not in ("dense", "none", "sparsity", "sparsity_variance")


# ---- before: the plan, and the log's first lines ----------------------------------------------------------

def print_plan(trainer: tgs.Trainer):
    """What --dry_run says of a run that could start. UserError where the disk has no room for checkpoints."""
    cfg, rt, loader, T = trainer.cfg, trainer.rt, trainer.loader, trainer.cfg.max_seq_len
    parameters, steps = trainer.parameters, cfg.num_steps - trainer.first_step
    weights = 4 * parameters  # bytes; AdamW's moments are twice, Muon's momenta once as many as what has them
    moments = 4 * sum((1 if name == "muon" else 2) * p.numel() for name, optimizer in
                      trainer.optimizers.items() for group in optimizer.param_groups for p in group["params"])
    checkpoint = weights + moments
    folder = Path(cfg.resume or cfg.records_dir).resolve()
    folder = next(p for p in (folder, *folder.parents) if p.exists())
    free, need = shutil.disk_usage(folder).free, 3 * checkpoint + weights  # (two and a new one)
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
        + f", {flops(tgs.mean_targets(cfg)):.3g} at the targets" * (aims(cfg) and cfg.compute == "packed"),
        f"bytes: a rank holds weights of {size(weights)}, gradients of {size(weights)}, moments of "
        f"{size(moments)}, and activations",
        f"disk:  checkpoints of {size(checkpoint)}, {size(need)} at most; {size(free)} are free in {folder}",
        f"{rt.device}, {str(rt.dtype).split('.')[1]}; nothing was written: start it without --dry_run"]
    if rt.main:
        print(*lines, sep="\n")


def size(n: float) -> str:
    """Bytes as a person reads them."""
    power = min(4, int(math.log10(max(n, 1)) / 3))
    return f"{n / 1000**power:.3g} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"


def opening_lines(trainer: tgs.Trainer, env: dict, record: Path):
    """What the log says first: where, on what, of which model and data."""
    cfg, rt = trainer.cfg, trainer.rt
    tokens = {split: sum(map(len, shards.tokens)) for split, shards in trainer.shards.items()}
    yield f"{record}  ({env['command']})"
    yield (f"{env['device']}, {rt.world} process{'es' * (rt.world > 1)}, {env['threads']} threads, torch "
           f"{torch.__version__}, {env['dtype']}" + f", compiled in {trainer.compile_s:.0f} s" * rt.compile)
    yield (f"model: {cfg.n_layers} blocks, d {cfg.dim}, {cfg.n_heads} heads, {trainer.parameters:,} "
           f"parameters, control {cfg.control}"
           + f" to a mean gate of {cfg.mean_target_end} in the middle" * aims(cfg))
    yield f"weights: {trainer.origin}"
    yield (f"data: {tokens['train']:,} training tokens, {tokens['val']:,} for validation; {cfg.num_steps} "
           f"steps of {cfg.batch_size} x {cfg.max_seq_len} tokens, {trainer.loader.accumulation} "
           "micro-batches each")
    if aims(cfg) and cfg.n_levels == 1:
        yield "with 2 blocks there is one level, whose target is --mean_target_start"


# ---- at each validation: the plot, and a warning ----------------------------------------------------------

def plot(events: list[dict], cfg: tgs.Config, path: Path):
    """Loss, sparsity and coefficients over steps, as one picture, where matplotlib is there to draw it."""
    try:
        import matplotlib
    except ImportError:
        return
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
            if aims(cfg):
                axes[1].axhline(target[l], color=colors[l], lw=0.8, ls=":")
            axes[2].plot(steps, [e["mean_coef"][l] for e in train], color=colors[l], lw=1.2)
            axes[2].plot(steps, [e["var_coef"][l] for e in train], color=colors[l], lw=1.2, ls="--")
        axes[1].set(title="Mean gate" + " (dotted: its target)" * aims(cfg), ylim=(-0.02, 1.02),
                    ylabel="mean gate")
        axes[2].set(title="Coefficients (solid: mean, dashed: variance)", ylabel="alpha, beta")
        axes[2].legend(*axes[1].get_legend_handles_labels(), title="blocks", loc="center left",
                       bbox_to_anchor=(1, 0.5), frameon=False)
    for ax in axes:
        ax.set_xlabel("step")
        ax.spines[["top", "right"]].set_visible(False)
    fig.tight_layout()
    tgs.write_atomically(path, lambda f: fig.savefig(f, dpi=100, format="png",
                                                     pil_kwargs=dict(optimize=True)))
    plt.close(fig)


def failure_signature(cfg: tgs.Config, history: list[dict]) -> str | None:
    """The paper's ways to fail, as a sentence, if the last of the validations shows one."""
    event, step, ce = history[-1], history[-1]["step"], history[-1]["cross_entropy"]
    first, best = history[0]["cross_entropy"], min(e["cross_entropy"] for e in history)
    asked = tgs.CONTROLS[cfg.control][2] > 0 and cfg.mean_target_end < 0.95
    if asked and 2 * step >= cfg.num_steps and max(event["gate_zero"]) < 0.01:
        return ("collapse to dense: no gate is closed although the targets ask for it; try a larger "
                "--coef_update")
    if step and ce > first + 0.1:
        return "divergence: validation loss is above where it began; try a lower --lr or --norm sandwich"
    if ce > best + 0.2:
        return f"collapse of performance: validation loss was {best:.4f}; try a smaller --coef_update"
    return None


# ---- at the end -------------------------------------------------------------------------------------------

PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "B200": 2250e12}  # data sheets, dense bfloat16


def further(trainer: tgs.Trainer, last: dict) -> dict:
    """What summary.json holds beside what the run itself knows; `last` is its last validation. All ranks call
    this."""
    cfg, rt = trainer.cfg, trainer.rt
    memory = peak_memory(rt)
    name = torch.cuda.get_device_name() if rt.device.type == "cuda" else ""
    peak = next((v * rt.world for k, v in PEAK_FLOPS.items() if k in name), None)
    return {"estimated_flops_per_token": estimated_flops(cfg, mean(last["gate_zero"])) / cfg.max_seq_len,
            "mfu": peak and trainer.train_s and trainer.train_flops / trainer.train_s / peak,
            "peak_memory_bytes": memory, **{f"{k}_seconds": v for k, v in step_seconds(trainer).items()}}


def peak_memory(rt: tgs.Runtime) -> int:
    """Bytes: of the CUDA allocator, or the peak resident set of the process."""
    if rt.device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def estimated_flops(cfg: tgs.Config, sparsity: float = 0.0) -> float:
    """The released code's count for one sequence, for Figure 2: full T x T attention, norms and activations
    included, blocks times (1 - sparsity), where sparsity is the mean share of gates that are 0."""
    T, d, D, H, Hkv, m = cfg.max_seq_len, cfg.dim, cfg.head_dim, cfg.n_heads, cfg.n_kv_heads, cfg.hidden_dim
    sqrt, exp = 8, 10
    norm = T * (4 * d + 2 + sqrt)
    rotary = 6 * T * (H + Hkv) * D // 2
    projections = 2 * T * d * (2 * d + 2 * Hkv * D)
    scores = 4 * T * T * d + H * T * T * (2 + exp + 2)  # two products; scale, mask, softmax
    ffn = 6 * T * d * m + T * m * (exp + 4 + 1)  # three products; SiLU, gating
    block = projections + rotary + scores + ffn + (4 if cfg.norm == "sandwich" else 2) * norm + 4 * T * d
    routers = cfg.n_layers * T * d + (cfg.n_levels - 1) * T if cfg.n_routers else 0
    return 2 * norm + routers + (1 - sparsity) * cfg.n_layers * block + 2 * T * d * cfg.vocab_size


def step_seconds(trainer: tgs.Trainer, rounds: int = 5) -> dict:
    """Seconds of forward and backward on one micro-batch, medians: as trained, and with every gate taken out;
    among several ranks also with the gradients averaged, and of averaging as many numbers by itself (one
    rank: None)."""
    cfg, rt, model, parallel = trainer.cfg, trainer.rt, trainer.model, trainer.parallel
    batch = trainer.loader.read(0)
    gradients = torch.zeros(trainer.parameters, device=rt.device)
    variants = {"gated_step": (cfg, model), "dense_step": (dense(cfg), model)}
    among_ranks = {"averaged_step": (cfg, parallel), "all_reduce": (cfg, parallel)}
    variants |= among_ranks if rt.world > 1 else {}
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
    return dict.fromkeys(among_ranks) | {k: median(s[1:]) for k, s in seconds.items()}  # (the first warms up)


def closing_lines(s: dict, cfg: tgs.Config, record: Path):
    """What summary.json, s, says to a person; and what to do next with the record."""
    if cfg.gated:
        full = tgs.realised_flops(dense(cfg), [[1, 1, 1, (cfg.max_seq_len + 1) / 2]] * cfg.n_levels, 1)
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
