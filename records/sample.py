"""Continue a prompt from a checkpoint, and show how deep each token went.

    ./run.sh sample --checkpoint records/X --prompt 'def ' --show_depth
    ./run.sh sample --checkpoint records/X --num_samples 4 --html depth.html

A layer's cache holds only the tokens that ran it, since nobody attends to the others: its size and the cost
of a token fall with sparsity. Greedy decoding equals the full forward pass, token by token.
"""
import codecs
import sys
import time
from html import escape
from pathlib import Path
from statistics import fmean as mean
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

import tool
from tool import UserError, between, encode, get_encoding, tgs

LARGE = 2**31
OPTIONS = tool.SOURCE | {
    "prompt": dict(default="", help="text to continue; without it, the start of a document"),
    "max_new_tokens": dict(type=between(int, 0, LARGE), default=200, help="of each sample (default: 200)"),
    "num_samples": dict(type=between(int, 1, LARGE), default=1, help="decoded together (default: 1)"),
    "temperature": dict(type=between(float, 0, LARGE), default=0.8,
                        help="0 takes the likeliest token (default: 0.8)"),
    "top_k": dict(type=between(int, 1, LARGE), help="draw from the k likeliest tokens (default: all)"),
    "top_p": dict(type=between(float, 1e-6, 2), default=1.0,
                  help="draw from the likeliest that together reach this (default: 1)"),
    "show_depth": dict(action="store_true", help="shade each token by the number of blocks it ran"),
    "html": dict(help="write the shaded text as a page to this file"),
}


class LayerCache:
    """Keys, values and ln g of one layer: row b holds the first counts[b] columns, in order of position."""

    def __init__(self, cfg, rows, device, attend_some):
        self.attend_some = attend_some  # the compiled function of that name, or None
        self.prefill = True
        self.counts = torch.zeros(rows, dtype=torch.int64, device=device)
        self.kv = torch.zeros(2, rows, cfg.n_kv_heads, 0, cfg.head_dim, device=device)  # 0 columns
        self.ln_g = torch.zeros(rows, 0, device=device)

    def attend(self, q, k, v, ln_g, layout):
        """An attention_kernel, of rows that may follow cached ones: a whole prompt (`prefill`), or a token a
        sequence."""
        seq, held = layout.seq, self.kv.shape[3]
        n, start = len(seq), layout.counts.cumsum(0) - layout.counts
        column = self.counts[seq] + torch.arange(n, device=seq.device) - start[seq]
        self.counts += layout.counts[:-1]
        m = int(self.counts.max())
        if m > held:  # empty columns have a logit that gives them no weight
            self.kv = F.pad(self.kv.to(k.dtype), (0, 0, 0, m + 64 - held))
            self.ln_g = F.pad(self.ln_g, (0, m + 64 - held), value=tgs.REMOVED)
        self.kv[:, seq, :, column] = torch.stack((k[:n], v[:n]), 1)
        self.ln_g[seq, column] = 0.0 if ln_g is None else ln_g[:n]
        if self.prefill:
            return tgs.attention_kernel(layout)(q, k, v, ln_g, layout)
        return F.pad(self.attend_new(q[:n], seq, m), (0, 0, 0, 0, 0, len(q) - n))

    def attend_new(self, q, seq, m):
        """One query of each of the sequences seq, q (n, heads, head_dim), to all that is cached of it, in m
        columns. Every row of the cache attends, in one call: cheaper than to copy the rows that ask, not than
        to read only those."""
        groups = q.unflatten(1, (self.kv.shape[2], -1))  # (n, kv_heads, heads of a group, head_dim)
        if self.attend_some and 1 < len(seq) < len(self.counts):
            return self.attend_some(groups, *self.kv, self.ln_g, seq, m).view(q.shape)
        asked = groups.new_zeros(len(self.counts), *groups.shape[1:]).index_copy(0, seq, groups)
        bias = self.ln_g[:, None, None, :m].to(q.dtype)
        return F.scaled_dot_product_attention(asked, *self.kv[:, :, :, :m], bias)[seq].view(q.shape)

    def forget(self, rows):
        self.counts[rows] = 0
        self.ln_g[rows] = tgs.REMOVED

    def bytes(self):
        """Of the tokens held: keys, values, and ln g in float32."""
        return int(self.counts.sum()) * (self.kv[:, 0, :, :1].nbytes + 4)


def attend_some(q, k, v, ln_g, rows, m):
    """Eq. 3 for one query of each of these rows of a cache, written out, so that compiled it reads only them.
    q, and the result: (n, kv_heads, heads of a group, head_dim)."""
    logits = (q.float()[:, :, :, None] * k[rows][:, :, None, :m]).sum(-1) * q.shape[-1]**-0.5
    p = (logits + ln_g[rows][:, None, None, :m]).softmax(-1)  # (n, kv_heads, group, m)
    return (p[..., None] * v[rows][:, :, None, :m]).sum(3).to(q.dtype)


class Decoder:
    """Sequences that grow together: their caches and lengths."""

    def __init__(self, model, rows):
        some = None if model.lower is tgs.eager else model.lower(attend_some)
        self.model = model
        self.cache = [LayerCache(model.cfg, rows, model.cos.device, some) for _ in model.layers]
        self.lengths = [0] * rows
        self.begin = model.cfg.document_token if model.cfg.mask_documents else None

    def append(self, tokens):
        """Run new tokens of some rows, lists by row. Returns logits of the last of each (rows, V), float32,
        and the depth of every token, row after row."""
        documents = {row: self.documents(ids) for row, ids in tokens.items()}
        depths = {row: [] for row in tokens}
        for left in range(max(map(len, documents.values())), 0, -1):  # last the last of all rows
            part = {row: parts[-left] for row, parts in documents.items() if left <= len(parts)}
            logits, depth = self.run(part)
            for row, each in zip(part, depth.split([*map(len, part.values())])):
                depths[row].append(each)
        return logits, torch.cat(sum(depths.values(), []))

    def documents(self, ids):
        """A row's new tokens cut where a document begins that sees no earlier one."""
        cuts = [i for i, token in enumerate(ids) if i and token == self.begin]
        return [ids[i:j] for i, j in zip([0, *cuts], [*cuts, len(ids)])]

    @torch.no_grad()
    def run(self, tokens):
        packed, last = [], []
        for row, ids in tokens.items():
            packed += [(t, row, self.lengths[row] + i) for i, t in enumerate(ids)]
            last.append(len(packed) - 1)
            self.lengths[row] += len(ids)
        anew = [row for row, ids in tokens.items() if ids[0] == self.begin]
        for cache in self.cache:
            cache.prefill = len(packed) > len(tokens)
            if anew:
                cache.forget(anew)
        ids, seq, pos = torch.tensor(packed, device=self.model.cos.device).T.contiguous()
        self.model.caches = self.cache
        h, levels = self.model.hidden(ids, seq, pos, len(self.lengths))
        self.model.caches = None
        return self.model.output(h[last]).float(), tool.blocks_run(levels, len(ids), self.model.cfg.n_layers)

    def bytes(self):
        return sum(c.bytes() for c in self.cache)


class Token(NamedTuple):
    id: int
    depth: int  # blocks that it ran
    p: float | None  # probability that the model gave it; None in a prompt


def choose(logits, temperature, top_k, top_p, generator):
    """One token a row of logits (n, V): the likeliest at temperature 0, else drawn from the top k of the
    likeliest that together reach probability top_p."""
    if temperature == 0:
        return logits.argmax(-1)
    p, order = (logits / temperature).softmax(-1).sort(-1, descending=True)
    p[p.cumsum(-1) - p >= top_p] = 0
    drawn = torch.multinomial(p[:, :top_k].cpu(), 1, generator=generator)
    return order.gather(1, drawn.to(order.device))[:, 0]


def generate(model, prompts, max_new_tokens, temperature=1.0, top_k=None, top_p=1.0, seed=0, stop=None,
             n_vocab=None):
    """Continue prompts (lists of different lengths) together by the first n_vocab tokens of the vocabulary
    (which may be padded), each until `stop`, max_new_tokens or max_seq_len. Returns every sequence, prompt
    included, a list of Tokens, and the bytes of the cache at the end."""
    decoder, generator = Decoder(model, len(prompts)), torch.Generator().manual_seed(seed % 2**64)
    limit = [min(len(prompt) + max_new_tokens, model.cfg.max_seq_len) for prompt in prompts]
    out = [[] for _ in prompts]
    new = dict(enumerate(prompts))  # tokens of the rows that go on
    p = dict.fromkeys(new)
    while new:
        logits, depth = decoder.append(new)
        depth = iter(depth.tolist())
        for b, row in new.items():
            out[b] += [Token(t, next(depth), p[b]) for t in row]
        logits = logits[:, :n_vocab]
        picked = choose(logits, temperature, top_k, top_p, generator)
        p = dict(zip(new, logits.softmax(-1).gather(1, picked[:, None])[:, 0].tolist()))
        new = {b: [t] for b, t in zip(new, picked.tolist())
               if len(out[b]) < limit[b] and (out[b][-1].p is None or out[b][-1].id != stop)}
    return out, decoder.bytes()


def pieces(tokens, encoding):
    """What the Tokens say, as (text, Token): a character of several tokens is one piece."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    text = [(decoder.decode(encoding.decode_single_token_bytes(token.id)), token) for token in tokens]
    text += [(decoder.decode(b"", final=True), token) for token in tokens[-1:]]
    return [(piece, token) for piece, token in text if piece]


def legend(n_layers):
    return [(f" {d} ", Token(0, d, None)) for d in range(0, n_layers + 1, 2)]


def shade(fraction):
    """Colour of a share of the blocks, pale yellow (none) over green to deep blue (all); is it dark?"""
    stops = [(253, 231, 140), (38, 145, 160), (48, 22, 100)]
    return tuple(round(np.interp(2 * fraction, range(3), c)) for c in zip(*stops)), fraction > 0.45


def terminal_text(text, n_layers):
    out = []
    for piece, token in text:
        color, dark = shade(token.depth / n_layers)
        start = f"\x1b[48;2;{';'.join(map(str, color))};38;5;{231 if dark else 16}m"
        out.append("\x1b[0m\n".join(start + line if line else "" for line in piece.split("\n")))
    return "".join(out) + "\x1b[0m"


PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Depth of each token</title>
<style>
:root {{ color-scheme: light dark; --back: #fff; --text: #222; --soft: #777; }}
@media (prefers-color-scheme: dark) {{ :root {{ --back: #15171c; --text: #ddd; --soft: #999; }} }}
body {{ background: var(--back); color: var(--text); font: 15px/1.9 ui-monospace, monospace; max-width: 60rem;
  margin: 2.5rem auto; padding: 0 1.2rem; }}
h1 {{ font: 600 1.25rem/1.3 system-ui, sans-serif; margin: 0 0 .3rem; }}
p, figcaption {{ font: .9rem/1.5 system-ui, sans-serif; color: var(--soft); margin: 0 0 1.2rem; }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere; margin: 0 0 2rem; font: inherit; }}
pre span {{ padding: .15em 0; }}
pre span:hover {{ outline: 2px solid var(--text); }}
pre span:hover::after {{ content: attr(data-is); position: fixed; left: 0; right: 0; bottom: 0;
  color: var(--back); background: var(--text); padding: .3rem 1.2rem; white-space: pre; }}
pre .prompt {{ border-bottom: 2px solid var(--soft); }}
.legend {{ display: flex; gap: 1px; margin: 0 0 .4rem; font: .8rem/1.8 system-ui, sans-serif; }}
.legend span {{ padding: 0 .7em; }}
</style>
<h1>How deep each token went</h1>
<p>{title}</p>
<div class="legend" aria-label="blocks run">{legend}</div>
<p>blocks run, of {n_layers}; the others were skipped. Hover for the token, its depth and its probability.</p>
{samples}
</html>
"""


def html_page(samples, n_layers, title):
    """A self-contained page: the pieces of each sample shaded by depth, its prompt underlined."""
    def span(piece, token):
        color, dark = shade(token.depth / n_layers)
        label, kind = f"{piece!r}: {token.depth} of {n_layers} blocks", " class=prompt"
        if token.p is not None:
            label, kind = f"{label}, p = {token.p:.3f}", ""
        return (f'<span{kind} style="background:rgb{color};color:{"#fff" if dark else "#222"}" '
                f'data-is="{escape(label)}">{escape(piece)}</span>')

    scale = "".join(span(*t) for t in legend(n_layers))
    body = ["".join(span(*t) for t in text) for text in samples]
    return PAGE.format(title=escape(title), legend=scale, n_layers=n_layers,
                       samples="\n".join(f"<pre>{text}</pre>" for text in body))


def run(args, explicit):
    cfg, weights = tool.of_checkpoint(args.checkpoint, explicit)
    rt, encoding, prompt = tgs.Runtime(cfg), get_encoding(cfg), encode(cfg, args.prompt)
    if len(prompt) >= cfg.max_seq_len:
        raise UserError(f"--prompt has {len(prompt)} tokens, the model's sequences at most {cfg.max_seq_len}")
    model = tgs.build_model(cfg, rt, weights, args.checkpoint)
    prompts = [prompt] * args.num_samples
    with rt.autocast():
        if rt.compile:  # before the clock starts
            generate(model, prompts, 2)
        start = time.perf_counter()
        out, held = generate(model, prompts, args.max_new_tokens, args.temperature, args.top_k, args.top_p,
                             cfg.seed, encoding.eot_token, encoding.n_vocab)
    seconds, new = time.perf_counter() - start, sum(map(len, out)) - len(out) * len(prompt)
    samples = [pieces(row[1:], encoding) for row in out]
    for text in samples:
        print(terminal_text(text, cfg.n_layers) if args.show_depth else "".join(piece for piece, _ in text))
    if args.show_depth:
        print(f"blocks run: {terminal_text(legend(cfg.n_layers), cfg.n_layers)}")
    note = (f"{new} new tokens, {new / seconds:.0f} tokens/s, "
            f"{mean(t.depth for row in out for t in row):.1f} of {cfg.n_layers} blocks a token, "
            f"cache {held:,} bytes")
    print(note, file=sys.stderr)
    if args.html:
        page = html_page(samples, cfg.n_layers, f"{Path(args.checkpoint).name}: {note}")
        with open(args.html, "x", encoding="utf-8") as f:
            f.write(page)


main = tool.command(__name__, run, __doc__, OPTIONS, tool.FIELDS)
