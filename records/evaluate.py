"""Validation loss, sparsity, FLOPs and throughput of a checkpoint, and which tokens skip.

    ./run.sh eval --checkpoint records/X
    ./run.sh eval --checkpoint records/X --depth depth.json        # which tokens skip, as a file
    ./run.sh eval --checkpoint records/X --text a.txt --hellaswag hellaswag_val.jsonl

Sizes come from the checkpoint, data and gates from its record, unless a flag says otherwise.
"""
import contextlib
import dataclasses
import json
import math
import sys
from pathlib import Path
from statistics import fmean as mean

import torch
import torch.nn.functional as F

import tool
from show import bars
from tool import UserError, encode, get_encoding, tgs

OPTIONS = tool.SOURCE | {
    "depth": dict(help="write the depth of tokens, by token and by position, to this JSON file"),
    "text": dict(type=Path, nargs="+", default=[],
                 help="score these texts instead: loss, bits a byte, sparsity"),
    "hellaswag": dict(type=Path, help="score a file like hellaswag_val.jsonl instead"),
}
FIELDS = [*tool.FIELDS, "val_files", "val_tokens", "device_batch_size"]


@torch.no_grad()
def token_losses(model, rt, row):
    """Cross-entropy in nats of every token but the first of a row of at most max_seq_len + 1, and every
    level's `gate_sums`."""
    tokens = torch.tensor(row, device=rt.device)
    pos = torch.arange(len(row) - 1, device=rt.device)
    with rt.autocast():
        h, levels = model.hidden(tokens[:-1], torch.zeros_like(pos), pos, 1)
        losses = F.cross_entropy(model.output(h).float(), tokens[1:], reduction="none")
    return losses, torch.stack([tgs.gate_sums(g, layout) for g, layout, _ in levels])


def evaluate_text(model, rt, path):
    """Loss, bits a byte and sparsity of a text file, as a line: windows of T tokens, each begun anew."""
    cfg, text = model.cfg, path.read_text("utf-8", "replace")
    tokens = encode(cfg, text)
    n, nats, stats = len(tokens) - 1, 0.0, 0
    if n == 0:
        raise UserError(f"--text {path} is empty")
    for start in range(0, n, cfg.max_seq_len):
        losses, sums = token_losses(model, rt, tokens[start:start + cfg.max_seq_len + 1])
        nats += losses.sum().item()
        stats += sums
    sparsity = mean(tgs.gate_report(cfg, stats, n)["gate_zero"])
    return (f"{path}: cross_entropy {nats / n:.6f} nats a token, "
            f"{nats / math.log(2) / len(text.encode()):.4f} bits a byte, sparsity {sparsity:.4f}, {n} tokens")


def evaluate_hellaswag(model, rt, path):
    """Accuracy on a file in the format of hellaswag_val.jsonl, as a line: by the ending whose log-probability
    given the context is largest, a token (acc_norm) or in all (acc)."""
    cfg, right = model.cfg, []
    for number, line in enumerate(path.read_text("utf-8", "replace").splitlines(), 1):
        try:
            item = json.loads(line)
            context, endings, label = item["ctx"], item["endings"], int(item["label"])
            endings[label]
        except (ValueError, LookupError, TypeError):
            raise UserError(f"--hellaswag {path}: line {number} is not a question (ctx, endings, label)")
        scores = []
        for end in endings:
            end = encode(cfg, f" {end}")[1:]
            row = encode(cfg, context) + end
            scores.append(token_losses(model, rt, row[-cfg.max_seq_len - 1:])[0][-len(end):])
        right.append([torch.stack([f(x) for x in scores]).argmin().item() == label
                      for f in (torch.mean, torch.sum)])
    if not right:
        raise UserError(f"--hellaswag {path} holds no question")
    acc_norm, acc = map(mean, zip(*right))
    return f"hellaswag: acc_norm {acc_norm:.4f}, acc {acc:.4f}, {len(right)} questions"


class DepthTable:
    """Mean depth over a corpus, by token, by position in the word and in the text that the model sees: do the
    tokens that skip form a hierarchy? A word begins after white space; what is seen, with the sequence or, if
    it holds an end-of-text token, there."""

    WORD, SEEN = 8, 12  # later positions in a word count as the last; in what is seen, powers of two

    def __init__(self, cfg):
        encoding = get_encoding(cfg)
        self.end = encoding.eot_token
        text = [token_text(encoding, i) for i in range(cfg.vocab_size)]
        self.names = {
            "token": [repr(t) for t in text],
            "position in the word": [*map(str, range(self.WORD - 1)), "later"],
            "position in what the model sees": [f"{2**i - 1}-{2**(i + 1) - 2}" for i in range(self.SEEN)]}
        text[self.end:self.end + 1] = [" "]  # (a model may lack it)
        self.begins_word = torch.tensor([t[:1].isspace() for t in text])
        self.ends_word = torch.tensor([t[-1:].isspace() for t in text])
        self.sums = {k: torch.zeros(2, len(names), dtype=torch.float64) for k, names in self.names.items()}

    def add(self, inputs, depth):
        """A batch of tokens (B, T), and how many blocks each ran."""
        depth, inputs = depth.flatten(), inputs.cpu()
        begins = self.begins_word[inputs]
        begins[:, 1:] |= self.ends_word[inputs[:, :-1]]
        word = since(begins).clamp(max=self.WORD - 1)
        seen = since(inputs == self.end).add(1).log2().long().clamp(max=self.SEEN - 1)
        of = torch.stack((depth, torch.ones_like(depth))).double()
        for sums, index in zip(self.sums.values(), (inputs, word, seen)):
            sums.index_add_(1, index.flatten(), of)

    def tables(self, at_least=20):
        """Lists of (what, mean depth, occurrences), by title; tokens that are rarer than at_least are left
        out."""
        rows = {title: [(name, d / n, int(n)) for name, d, n in zip(self.names[title], *sums.tolist()) if n]
                for title, sums in self.sums.items()}
        rows["token"] = sorted((r for r in rows["token"] if r[2] >= at_least), key=lambda r: r[1])
        return rows


def token_text(encoding, token):
    """Its number where it has none: a vocabulary may be padded."""
    with contextlib.suppress(KeyError):
        return encoding.decode_single_token_bytes(token).decode("utf-8", "backslashreplace")
    return f"<{token}>"


def since(marks):
    """Columns since the last mark of each row (B, T), or since the row's start."""
    at = torch.arange(marks.shape[1]).expand_as(marks)
    return at - torch.where(marks, at, 0).cummax(1).values


def bytes_per_token(shards):
    """Mean UTF-8 bytes of text a token, where dataset.json tells; NaN: it does not."""
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        said = json.loads(shards.paths[0].with_name("dataset.json").read_text())["shards"]
        said = [said[path.name] for path in shards.paths]
        return sum(s["bytes"] for s in said) / sum(s["tokens"] for s in said)
    return math.nan


def run(args, explicit):
    cfg, weights = tool.of_checkpoint(args.checkpoint, explicit)
    rt = tgs.Runtime(cfg)
    model = tgs.build_model(cfg, rt, weights, args.checkpoint)
    for path in args.text:
        print(evaluate_text(model, rt, path))
    if args.hellaswag:
        print(evaluate_hellaswag(model, rt, args.hellaswag))
    elif not args.text:
        evaluate_shards(model, rt, args.depth)


def evaluate_shards(model, rt, depth_file):
    cfg, shards = model.cfg, tgs.Shards(model.cfg, "val")
    if rt.compile:  # before the clock starts
        first = dataclasses.replace(cfg, val_tokens=cfg.device_batch_size * cfg.max_seq_len + 1)
        tgs.evaluate(model, cfg, rt, tgs.Shards(first, "val"))
    try:
        depths = DepthTable(cfg) if cfg.gated else None
    except UserError as e:
        print(f"WARNING: no table of depths: {e}", file=sys.stderr)
        depths = None
    def watch(inputs, levels):
        if depths:
            depths.add(inputs, tool.blocks_run(levels, inputs.numel(), cfg.n_layers))

    result = tgs.evaluate(model, cfg, rt, shards, watch)
    nats, sparsity = result["cross_entropy"], mean(result["gate_zero"])
    print(f"cross_entropy {nats:.6f} nats a token over {result['tokens']} tokens")
    bits = nats / math.log(2) / bytes_per_token(shards)
    if math.isfinite(bits):
        print(f"bits a byte {bits:.4f}")
    print(f"sparsity {sparsity:.4f}", *bars(result["gate_zero"]), sep="\n")
    print(f"FLOPs a token: {result['realised_flops_per_token']:.4g}")
    print(f"{result['tokens'] / result['val_s']:.0f} tokens/s")
    if cfg.gated:
        model.cfg = tool.dense(cfg)
        whole = tgs.evaluate(model, cfg, rt, shards)["val_s"]
        print(f"the same with no gate takes {whole / result['val_s']:.2f} times as long (measured now, once)")
    tables = depths.tables() if depths else {}
    for title, rows in tables.items():
        print(f"mean depth of {cfg.n_layers} blocks, by {title}")
        for name, depth, n in rows[:10] + rows[10:][-10:]:
            print(f"  {name:16s} {depth:6.2f}  ({n} tokens)")
    if depth_file:
        with open(depth_file, "x") as f:
            json.dump(tables, f, indent=1)


main = tool.command(__name__, run, __doc__, OPTIONS, FIELDS)
