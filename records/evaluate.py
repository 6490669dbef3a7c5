"""Validation loss, sparsity, FLOPs and throughput of a checkpoint, and which tokens skip.

    ./run.sh eval --checkpoint records/X
    ./run.sh eval --checkpoint records/X --text a.txt --tasks hellaswag,arc_easy

Sizes come from the checkpoint, data and gates from its record, unless a flag says otherwise.
"""
import contextlib
import dataclasses
import math
import sys
from pathlib import Path
from statistics import fmean as mean

import torch

import tool
from show import bars
from tool import UserError, encode, get_encoding, tgs

OPTIONS = tool.SOURCE | {
    "text": dict(type=Path, nargs="+", default=[],
                 help="score these texts instead: loss, bits a byte, sparsity"),
    "tasks": dict(help="instead, tasks of lm-evaluation-harness: names or YAML files, commas between"),
    "num_fewshot": dict(type=int, help="examples before each question (default: the task's)"),
    "limit": dict(type=int, help="only the first so many questions of each task"),
}
FIELDS = [*tool.FIELDS, "val_files", "val_tokens", "device_batch_size"]


def evaluate_text(model, rt, path):
    """Loss, bits a byte and sparsity of a text file, as a line: windows of T tokens, each begun anew."""
    cfg, text = model.cfg, path.read_bytes().decode("utf-8-sig", "replace")
    T, tokens = cfg.max_seq_len, encode(cfg, text)
    n, nats, stats = len(tokens) - 1, 0.0, 0
    if n == 0:
        raise UserError(f"--text {path} is empty")
    for start in range(0, n, T):
        row = tokens[start:start + T + 1]
        [losses], _, sums = tool.scores(model, rt, [(row, len(row) - 1)])
        nats += losses.sum().item()
        stats += sums
    sparsity = mean(tgs.gate_report(cfg, stats, n)["gate_zero"])
    return (f"{path}: cross_entropy {nats / n:.6f} nats a token, "
            f"{nats / math.log(2) / len(text.encode()):.4f} bits a byte, sparsity {sparsity:.4f}, {n} tokens")


def evaluate_tasks(model, rt, args):
    try:
        import harness
    except ImportError as e:
        raise UserError(f"--tasks needs lm-evaluation-harness ({e}): {sys.executable} -m pip install "
                        "'lm_eval>=0.4.13'")
    return harness.evaluate(model, rt, args.tasks, num_fewshot=args.num_fewshot, limit=args.limit)


def token_text(encoding, token):
    """Its number where it has none: a vocabulary may be padded."""
    with contextlib.suppress(KeyError):
        return repr(encoding.decode_single_token_bytes(token).decode("utf-8", "backslashreplace"))
    return f"<{token}>"


def run(args, explicit):
    cfg, weights = tool.of_checkpoint(args.checkpoint, explicit)
    rt = tgs.Runtime(cfg)
    model = tgs.build_model(cfg, rt, weights, args.checkpoint)
    for path in args.text:
        print(evaluate_text(model, rt, path))
    if args.tasks:
        print(evaluate_tasks(model, rt, args))
    elif not args.text:
        evaluate_shards(model, rt)


def evaluate_shards(model, rt):
    cfg, shards = model.cfg, tgs.Shards(model.cfg, "val")
    variants = [cfg] + [tool.dense(cfg)] * cfg.gated
    if rt.compile:  # before the clock starts
        first = dataclasses.replace(cfg, val_tokens=cfg.device_batch_size * cfg.max_seq_len + 1)
        for model.cfg in variants:
            tgs.evaluate(model, cfg, rt, tgs.Shards(first, "val"))
    results = []
    for model.cfg in variants:
        results.append(tgs.evaluate(model, cfg, rt, shards))
    model.cfg, result = cfg, results[0]
    nats, sparsity = result["cross_entropy"], mean(result["gate_zero"])
    print(f"cross_entropy {nats:.6f} nats a token over {result['tokens']} tokens")
    print(f"sparsity {sparsity:.4f}", *bars(result["gate_zero"]), sep="\n")
    print(f"FLOPs a token: {result['realised_flops_per_token']:.4g}")
    print(f"{result['tokens'] / result['val_s']:.0f} tokens/s")
    if cfg.gated:
        print(f"the same with no gate takes {results[1]['val_s'] / result['val_s']:.2f} times as long (measured "
              "now, once)")
        print_depths(model, rt, shards)


def print_depths(model, rt, shards, at_least=20):
    """Mean depth by token, but of rarer ones."""
    cfg, hidden = model.cfg, model.hidden
    sums = torch.zeros(2, cfg.vocab_size, dtype=torch.float64)  # of depths, and of ones
    try:
        encoding = get_encoding(cfg)
    except UserError as e:
        print(f"WARNING: no table of depths: {e}", file=sys.stderr)
        return

    def watched(tokens, *where):
        h, levels = hidden(tokens, *where)
        depth = tool.blocks_run(levels, len(tokens), cfg.n_layers)
        sums.index_add_(1, tokens.cpu(), torch.stack((depth, torch.ones_like(depth))).double())
        return h, levels

    model.hidden = watched
    tgs.evaluate(model, cfg, rt, shards)
    rows = sorted((d / n, int(n), i) for i, (d, n) in enumerate(sums.T.tolist()) if n >= at_least)
    print(f"mean depth of {cfg.n_layers} blocks, by token")
    for depth, n, token in rows[:10] + rows[10:][-10:]:
        print(f"  {token_text(encoding, token):16s} {depth:6.2f}  ({n} tokens)")


main = tool.command(__name__, run, __doc__, OPTIONS, FIELDS)
