"""Validation loss, sparsity, FLOPs and throughput of a checkpoint, and which tokens skip.

    ./run.sh eval --checkpoint records/X
    ./run.sh eval --checkpoint records/X --depth depth.json        # which tokens skip, as a file
    ./run.sh eval --checkpoint records/X --text a.txt --hellaswag hellaswag_val.jsonl

Every setting of the trainer is a flag here too; sizes come from the checkpoint, data from its record.
"""
import contextlib
import json
import math
import sys
from pathlib import Path
from statistics import fmean as mean

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))
import tool  # noqa: E402
from show import bars, estimated_flops  # noqa: E402
from tool import Config, UserError, encode, get_encoding, tgs  # noqa: E402
from train_gpt_skip import MiddleSkippingTransformer  # noqa: E402

OPTIONS = {
    "depth": dict(help="write the depth of tokens, by token and by position, to this JSON file"),
    "text": dict(nargs="+", default=[], help="score these texts instead: loss, bits a byte, sparsity"),
    "hellaswag": dict(help="score a file like hellaswag_val.jsonl instead"),
}


@torch.no_grad()
def token_losses(model: MiddleSkippingTransformer, rt: tgs.Runtime, rows: list[list[int]]):
    """Cross-entropy in nats of every token but the first of each row (at most max_seq_len + 1 tokens): a list
    of tensors; and the summed statistics of `span`. Rows of any lengths are packed together."""
    out, totals, room = [], 0, model.cfg.device_batch_size * model.cfg.max_seq_len
    while len(out) < len(rows):
        batch, n = [], 0
        for row in rows[len(out):]:
            if batch and n + len(row) - 1 > room:
                break
            batch.append(torch.tensor(row))
            n += len(row) - 1
        inputs, targets = (torch.cat([t[a:len(t) - 1 + a] for t in batch]).to(rt.device) for a in (0, 1))
        seq = torch.cat([torch.full((len(t) - 1,), i) for i, t in enumerate(batch)]).to(rt.device)
        pos = torch.cat([torch.arange(len(t) - 1) for t in batch]).to(rt.device)
        with rt.autocast():
            h, stats = model.hidden(inputs, seq, pos, len(batch))
            losses = torch.cat([F.cross_entropy(model.output(x).float(), y, reduction="none")
                                for x, y in zip(h.split(1024), targets.split(1024))])
        out += losses.cpu().split([len(t) - 1 for t in batch])
        totals = totals + stats
    return out, totals.cpu()


def evaluate_text(model: MiddleSkippingTransformer, rt: tgs.Runtime, path: str) -> str:
    """Loss, bits a byte and sparsity of a text file, as a line: windows of T tokens, each begun anew."""
    cfg, text = model.cfg, read_text(path)
    tokens = encode(cfg, text)
    rows = [tokens[i:i + cfg.max_seq_len + 1] for i in range(0, len(tokens) - 1, cfg.max_seq_len)]
    if not rows:
        raise UserError(f"--text {path} is empty")
    losses, stats = token_losses(model, rt, rows)
    nats, n = sum(x.sum().item() for x in losses), len(tokens) - 1
    sparsity = mean(tgs.gate_report(cfg, stats, n)["gate_zero"])
    bits = nats / math.log(2) / len(text.encode())
    return (f"{path}: cross_entropy {nats / n:.6f} nats a token, {bits:.4f} bits a byte, "
            f"sparsity {sparsity:.4f}, {n} tokens")


def read_text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError as e:
        raise UserError(f"{path} cannot be read: {e.strerror}")


def evaluate_hellaswag(model: MiddleSkippingTransformer, rt: tgs.Runtime, path: str) -> str:
    """Accuracy on a file in the format of hellaswag_val.jsonl, as a line: by the ending whose log-probability
    given the context is largest, a token (acc_norm) or in all (acc)."""
    cfg, right = model.cfg, []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        try:
            item = json.loads(line)
            context, endings, label = item["ctx"], item["endings"], int(item["label"])
            endings[label]
        except (ValueError, LookupError, TypeError):
            raise UserError(f"--hellaswag {path}: line {number} is not a question (ctx, endings, label)")
        start, ends = encode(cfg, context), [encode(cfg, " " + e)[1:] for e in endings]
        losses, _ = token_losses(model, rt, [(start + e)[-cfg.max_seq_len - 1:] for e in ends])
        scores = [x[-len(e):] for x, e in zip(losses, ends)]
        right.append([torch.stack([f(x) for x in scores]).argmin().item() == label
                      for f in (torch.mean, torch.sum)])
    if not right:
        raise UserError(f"--hellaswag {path} holds no question")
    acc_norm, acc = np.mean(right, 0)
    return f"hellaswag: acc_norm {acc_norm:.4f}, acc {acc:.4f}, {len(right)} questions"


class DepthTable:
    """Mean depth over a corpus, by token, by position in the word and in the text that the model sees: do the
    tokens that skip form a hierarchy? A word begins after white space; what is seen, with the sequence or, if
    it holds an end-of-text token, there."""

    WORD, SEEN = 8, 12  # later positions in a word count as the last; in what is seen, powers of two

    def __init__(self, cfg: Config, rt: tgs.Runtime):
        self.rt, self.end, text = rt, 256 if cfg.tokeniser == "bytes" else 50256, token_texts(cfg)
        self.ends_word = torch.tensor([t[-1:].isspace() or i == self.end for i, t in enumerate(text)])
        self.begins_word = torch.tensor([t[:1].isspace() or i == self.end for i, t in enumerate(text)])
        self.names = {
            "token": [repr(t) for t in text],
            "position in the word": [*map(str, range(self.WORD - 1)), "later"],
            "position in what the model sees": [f"{2**i - 1}-{2**(i + 1) - 2}" for i in range(self.SEEN)]}
        self.sums = {k: torch.zeros(2, len(names), dtype=torch.float64) for k, names in self.names.items()}

    def add(self, inputs: Tensor, depth: Tensor):
        inputs, depth = inputs.cpu(), depth.cpu()
        begins = self.begins_word[inputs]
        begins[:, 1:] |= self.ends_word[inputs[:, :-1]]
        word = since(begins).clamp(max=self.WORD - 1)
        seen = since(inputs == self.end).add(1).log2().long().clamp(max=self.SEEN - 1)
        for sums, index in zip(self.sums.values(), (inputs, word, seen)):
            sums[0].index_add_(0, index.flatten(), depth.flatten().double())
            sums[1].index_add_(0, index.flatten(), torch.ones(index.numel(), dtype=torch.float64))

    def tables(self, at_least: int = 20) -> dict[str, list[tuple[str, float, int]]]:
        """(what, mean depth, occurrences), by title; tokens that are rarer than at_least are left out."""
        rows = {}
        for title, sums in self.sums.items():
            totals = zip(self.names[title], *self.rt.sum(sums.to(self.rt.device)).tolist())
            rows[title] = [(name, d / n, int(n)) for name, d, n in totals if n]
        rows["token"] = sorted((r for r in rows["token"] if r[2] >= at_least), key=lambda r: r[1])
        return rows


def token_texts(cfg: Config) -> list[str]:
    """The text of every token of the vocabulary; its number where there is no text or no tokeniser."""
    def text(encoding, i):
        with contextlib.suppress(KeyError):
            return encoding.decode_single_token_bytes(i).decode("utf-8", "backslashreplace")
        return f"<{i}>"

    try:
        encoding = get_encoding(cfg)
    except UserError as e:
        print(f"WARNING: tokens are shown by number: {e}", file=sys.stderr)
        return [f"<{i}>" for i in range(cfg.vocab_size)]
    return [text(encoding, i) for i in range(cfg.vocab_size)]


def since(marks: Tensor) -> Tensor:
    """Columns since the last mark of each row (B, T), or since the row's start."""
    at = torch.arange(marks.shape[1]).expand_as(marks)
    return at - torch.where(marks, at, 0).cummax(1).values


def bytes_per_token(shards: tgs.Shards) -> float | None:
    """Mean UTF-8 bytes of text a token, where dataset.json tells."""
    dataset = shards.dataset().get("shards")
    said = [dataset.get(p.name) if isinstance(dataset, dict) else None for p in shards.paths]
    if not all(isinstance(s, dict) and "bytes" in s for s in said):
        return None
    return sum(s["bytes"] for s in said) / sum(s["tokens"] for s in said)


def run(cfg: Config, weights: dict, args) -> int:
    rt = tgs.Runtime(cfg)
    if args.text or args.hellaswag:
        model = tgs.build_model(cfg, rt, weights, args.checkpoint)
        lines = [evaluate_text(model, rt, path) for path in args.text]
        print(*lines, *([evaluate_hellaswag(model, rt, args.hellaswag)] if args.hellaswag else []), sep="\n")
        return 0
    shards = tgs.Shards(cfg, "val")
    per_token = bytes_per_token(shards)
    model, depths = tgs.build_model(cfg, rt, weights, args.checkpoint), DepthTable(cfg, rt)
    if rt.compile:  # before the clock starts
        first = tgs.sequences(shards, cfg)[:cfg.device_batch_size]
        batch = torch.stack([shards.window(*place, cfg.max_seq_len + 1) for place in first]).to(rt.device)
        with torch.no_grad(), rt.autocast():
            model(batch[:, :-1], batch[:, 1:])
    result = tgs.evaluate(model, cfg, rt, shards, watch=depths.add if cfg.gated else None)
    tables = depths.tables() if cfg.gated else {}
    if rt.main:
        sparsity = mean(result["gate_zero"])
        print(f"cross_entropy {result['cross_entropy']:.6f} nats a token over {result['tokens']} tokens")
        if per_token:
            print(f"bits a byte {result['cross_entropy'] / math.log(2) / per_token:.4f}")
        print(f"sparsity {sparsity:.4f}", *bars(result["gate_zero"]), sep="\n")
        print(f"FLOPs a token: {result['flops_per_token']:.4g} realised, "
              f"{estimated_flops(cfg, sparsity) / cfg.max_seq_len:.4g} estimated")
        print(f"{result['tokens'] / result['val_s']:.0f} tokens/s" + ", the tables included" * cfg.gated)
        for title, rows in tables.items():
            print(f"mean depth of {cfg.n_layers} blocks, by {title}")
            shown = rows if len(rows) < 20 else rows[:10] + rows[-10:]
            print(*(f"  {name:16s} {depth:6.2f}  ({n} tokens)" for name, depth, n in shown), sep="\n")
        if args.depth:
            tool.new_file(args.depth, "--depth", json.dumps(tables, indent=1))
    return 0


def main(argv: list[str] | None = None) -> int:
    return tool.main(run, __doc__, OPTIONS, argv)


if __name__ == "__main__":
    sys.exit(main())
