"""Check a run and start none: ./run.sh --dry_run, with the flags of the run. It reads and builds what the run
would, holds the disk against its checkpoints, says what it found, and writes nothing.
"""
import os
import shutil
from pathlib import Path

import tool
from tool import UserError, tgs


def lines(trainer):
    cfg, rt, loader, T = trainer.cfg, trainer.rt, trainer.loader, trainer.cfg.max_seq_len
    parameters = sum(p.numel() for p in trainer.model.parameters())
    weights, steps = 4e-6 * parameters, cfg.num_steps - trainer.first_step  # MB
    need = 10 * weights  # two checkpoints and a new one, of weights and AdamW's moments; and the export
    folder = Path(cfg.resume or cfg.records_dir).resolve()
    folder = next(p for p in (folder, *folder.parents) if p.exists())
    free = shutil.disk_usage(folder).free / 1e6 if os.access(folder, os.W_OK) else 0.0
    if need > free:
        raise UserError(f"--records_dir {cfg.records_dir} has room for {free:,.1f} MB, checkpoints need "
                        f"{need:,.1f} MB: make room, or name another folder")

    def flops(shares):
        """Of a run in which levels see these shares of the tokens."""
        stats = [[0, 0, a * T, a * T * (a * T + 1) / 2] for a in shares]
        return f"{3 * steps * cfg.batch_size * tgs.realised_flops(cfg, stats, T):.3g}"

    for name, shards in trainer.shards.items():
        yield (f"{name + ':':6s} {sum(map(len, shards.tokens)):,} tokens in {len(shards.paths)} shards, "
               f"{shards.paths[0]} to {shards.paths[-1].name}")
    yield (f"model: {parameters:,} parameters in {cfg.n_layers} blocks, control {cfg.control}, "
           f"weights {cfg.init_from or 'new'}")
    yield (f"steps: {steps:,} of {cfg.batch_size} x {T} tokens, {steps * cfg.step_tokens:,} in all, "
           f"{steps / len(loader.steps):.3g} passes; ranks: {rt.world}, each with {loader.accumulation} x "
           f"{cfg.device_batch_size} sequences a step")
    yield f"work:  {flops([1.0] * cfg.n_levels)} training FLOPs at most, if no gate closes"
    if cfg.rule.targets:
        yield f"       {flops(tgs.mean_targets(cfg))} at the targets"
    yield (f"bytes: a rank holds weights of {weights:,.1f} MB, gradients of as much, moments of at most "
           "twice as much, and activations")
    yield (f"disk:  checkpoints of at most {3 * weights:,.1f} MB, {need:,.1f} MB in all; {free:,.1f} MB are "
           f"free in {folder}")
    yield f"{rt.device}, {rt.dtype}; nothing was written: start it without --dry_run"


def run(args, explicit):
    trainer = tgs.Trainer(*tgs.resolve(explicit | {"compile": False}))
    if trainer.cfg.resume:
        state, source = tgs.latest_checkpoint(Path(trainer.cfg.resume))
        if state:
            trainer.restore(state, source)
    if trainer.rt.main:
        print(*lines(trainer), sep="\n")


main = tool.command(__name__, run, __doc__, {}, tgs.FIELDS)
