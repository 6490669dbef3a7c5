"""Continue a prompt from a checkpoint, and show how deep each token went.

    ./run.sh sample --checkpoint records/X --prompt 'def ' --show_depth
    ./run.sh sample --checkpoint records/X --num_samples 4 --html depth.html

A layer's cache holds only the tokens that ran it, since nobody attends to the others: its size and the cost
of a token fall with sparsity. Greedy decoding equals the full forward pass, token by token.
"""
import sys
import time
from html import escape
from pathlib import Path
from statistics import fmean as mean
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))
import tool  # noqa: E402
from tool import Config, UserError, encode, get_encoding, tgs  # noqa: E402
from train_gpt_skip import MiddleSkippingTransformer  # noqa: E402

OPTIONS = {
    "prompt": dict(default="", help="text to continue; without it, the start of a document"),
    "max_new_tokens": dict(type=int, default=200, help="tokens to add to each sample (default: 200)"),
    "num_samples": dict(type=int, default=1, help="samples, decoded together (default: 1)"),
    "temperature": dict(type=float, default=0.8, help="0 takes the likeliest token (default: 0.8)"),
    "top_k": dict(type=int, help="draw from the k likeliest tokens"),
    "top_p": dict(type=float, default=1.0, help="draw from the likeliest that reach this (default: 1)"),
    "show_depth": dict(action="store_true", help="shade each token by the number of blocks it ran"),
    "html": dict(help="write the shaded text as a page to this file"),
}


class LayerCache:
    """Keys, values and ln g of one layer: row b holds the first counts[b] columns, in order of position."""

    def __init__(self, rows: int, device, attend_some=None):
        self.attend_some = attend_some  # the compiled function of that name
        self.counts = torch.zeros(rows, dtype=torch.int64, device=device)
        self.k = self.v = self.ln_g = None  # (rows, kv_heads, columns, head_dim) twice, (rows, columns)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, ln_g: Tensor | None, layout: tgs.Layout) -> Tensor:
        """An attention_kernel, of rows that may follow cached ones: a whole prompt, or a token a sequence."""
        first = self.k is None
        seq, n = layout.seq, len(layout.seq)
        start = layout.counts.cumsum(0) - layout.counts
        column = self.counts[seq] + torch.arange(n, device=seq.device) - start[seq]
        self.counts += layout.counts[:-1]
        m = int(self.counts.max())
        self.reserve(m, k)
        self.k[seq, :, column], self.v[seq, :, column] = k[:n], v[:n]
        self.ln_g[seq, column] = 0.0 if ln_g is None else ln_g[:n]
        if first:
            layout = layout._replace(cache=None)
            return tgs.attention_kernel(layout)(q, k, v, ln_g, layout)
        return F.pad(self.attend_new(q[:n], seq, m), (0, 0, 0, 0, 0, len(q) - n))

    def attend_new(self, q: Tensor, seq: Tensor, m: int) -> Tensor:
        """One query of each of the sequences seq, q (n, heads, head_dim), to all that is cached of it, in m
        columns. Every row of the cache attends, in one call: cheaper than to copy the rows that ask, not than
        to read only those."""
        groups = q.unflatten(1, (self.k.shape[1], -1))  # (n, kv_heads, heads of a group, head_dim)
        if self.attend_some and 1 < len(seq) < len(self.counts):
            return self.attend_some(groups, self.k, self.v, self.ln_g, seq, m).view(q.shape)
        asked = groups.new_zeros(len(self.counts), *groups.shape[1:]).index_copy(0, seq, groups)
        out = F.scaled_dot_product_attention(asked, self.k[:, :, :m], self.v[:, :, :m],
                                             attn_mask=self.ln_g[:, None, None, :m].to(q.dtype))
        return out.index_select(0, seq).view(q.shape)

    def reserve(self, columns: int, like: Tensor):
        """Room for that many columns; empty ones have a logit that gives them no weight."""
        if self.k is None:
            self.k = self.v = like.new_zeros(len(self.counts), like.shape[1], 0, like.shape[2])
            self.ln_g = torch.zeros(len(self.counts), 0, device=like.device)
        if (more := columns - self.k.shape[2]) > 0:
            self.k, self.v = (F.pad(t, (0, 0, 0, more + 64)) for t in (self.k, self.v))
            self.ln_g = F.pad(self.ln_g, (0, more + 64), value=tgs.REMOVED)

    def bytes(self) -> int:
        """Of the tokens held: keys, values, and ln g in float32."""
        if self.k is None:
            return 0
        return int(self.counts.sum()) * (2 * self.k.shape[1] * self.k.shape[3] * self.k.element_size() + 4)


def attend_some(q: Tensor, k: Tensor, v: Tensor, ln_g: Tensor, rows: Tensor, m: int) -> Tensor:
    """Eq. 3 for one query of each of these rows of a cache, written out, so that compiled it reads only them.
    q, and the result: (n, kv_heads, heads of a group, head_dim)."""
    k, v, ln_g = k[rows][:, :, None, :m], v[rows][:, :, None, :m], ln_g[rows][:, None, None, :m]
    # (n, kv_heads, group, m)
    p = ((q.float()[:, :, :, None] * k).sum(-1) * q.shape[-1]**-0.5 + ln_g).softmax(-1)
    return (p[..., None] * v).sum(3).to(q.dtype)


class Decoder:
    """Sequences that grow together: their caches and lengths."""

    def __init__(self, model: MiddleSkippingTransformer, rows: int):
        self.model, self.device = model, model.cos.device
        some = None if model.lower is tgs.eager else model.lower(attend_some)
        self.cache = [LayerCache(rows, self.device, some) for _ in range(model.cfg.n_layers)]
        self.lengths = torch.zeros(rows, dtype=torch.int64)

    @torch.no_grad()
    def append(self, tokens: dict[int, list[int]]) -> tuple[Tensor, Tensor]:
        """Run new tokens of some rows, by row. Returns logits of the last of each row (rows, V), float32, and
        the depth of every token, row after row."""
        rows, new = torch.tensor(list(tokens)), torch.tensor([len(row) for row in tokens.values()])
        ends, ids = new.cumsum(0), torch.tensor([t for row in tokens.values() for t in row])
        pos = torch.arange(len(ids)) + (self.lengths[rows] - ends + new).repeat_interleave(new)
        self.lengths[rows] += new
        ids, seq, pos, last = (t.to(self.device) for t in (ids, rows.repeat_interleave(new), pos, ends - 1))
        depth = torch.zeros_like(ids)
        h, _ = self.model.hidden(ids, seq, pos, len(self.lengths), depth, self.cache)
        return self.model.output(h[last]).float(), depth

    def bytes(self) -> int:
        return sum(c.bytes() for c in self.cache)


class Token(NamedTuple):
    id: int
    depth: int  # blocks that it ran
    p: float | None  # probability that the model gave it; None in a prompt


def choose(logits: Tensor, temperature: float, top_k: int | None, top_p: float, generator) -> Tensor:
    """One token a row of logits (n, V): the likeliest at temperature 0, else drawn from the top k of the
    likeliest that together reach probability top_p."""
    if temperature == 0:
        return logits.argmax(-1)
    logits, order = (logits / temperature).sort(-1, descending=True)
    p = logits.softmax(-1)
    p = torch.where(p.cumsum(-1) - p < top_p, p, 0)
    p = p if top_k is None else F.pad(p[:, :top_k], (0, max(0, p.shape[1] - top_k)))
    return order.gather(1, torch.multinomial(p.cpu(), 1, generator=generator).to(order.device))[:, 0]


def generate(model: MiddleSkippingTransformer, prompts: list[list[int]], max_new_tokens: int, temperature=1.0,
             top_k=None, top_p=1.0, seed=0, stop: int | None = None,
             n_vocab: int | None = None) -> tuple[list[list[Token]], int]:
    """Continue prompts (of different lengths) together by the first n_vocab tokens of the vocabulary (which
    may be padded), each until `stop`, max_new_tokens or max_seq_len. Returns every sequence, prompt included,
    and the bytes of the cache at the end."""
    decoder, generator = Decoder(model, len(prompts)), torch.Generator().manual_seed(seed)
    out, new, p_of = [[] for _ in prompts], dict(enumerate(prompts)), {}
    limit = [min(len(p) + max_new_tokens, model.cfg.max_seq_len) for p in prompts]
    while True:
        logits, depth = decoder.append(new)
        for (b, row), d in zip(new.items(), depth.split([len(row) for row in new.values()])):
            out[b] += [Token(t, n, p_of.get(b)) for t, n in zip(row, d.tolist())]
        logits = logits[:, :n_vocab]
        picked = choose(logits, temperature, top_k, top_p, generator)
        p_of = dict(zip(new, logits.softmax(-1).gather(1, picked[:, None])[:, 0].tolist()))
        new = {b: [t] for b, t in zip(new, picked.tolist())
               if len(out[b]) < limit[b] and not (out[b][-1].id == stop and out[b][-1].p is not None)}
        if not new:
            break
    return out, decoder.bytes()


def pieces(tokens: list[Token], encoding) -> list[tuple[str, Token]]:
    """Text and the token that it shows: bytes of one character, from several tokens, are joined."""
    out, pending = [], b""
    for token in tokens:
        pending += encoding.decode_single_token_bytes(token.id)
        try:
            out.append((pending.decode(), token))
        except UnicodeDecodeError as e:
            if e.end < len(pending) or len(pending) > 3:  # not merely unfinished
                out.append((pending.decode(errors="replace"), token))
            else:
                continue
        pending = b""
    return out + ([(pending.decode(errors="replace"), tokens[-1])] if pending else [])


def shade(fraction: float) -> tuple[tuple[int, ...], bool]:
    """Colour of a share of the blocks, pale yellow (none) over green to deep blue (all); is it dark?"""
    stops = [(253, 231, 140), (122, 205, 140), (38, 145, 160), (50, 80, 160), (48, 22, 100)]
    return tuple(round(np.interp(4 * fraction, range(5), c)) for c in zip(*stops)), fraction > 0.45


def terminal_text(text: list[tuple[str, Token]], n_layers: int) -> str:
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
.prompt {{ border-bottom: 2px solid var(--soft); }}
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


def html_page(samples: list[tuple[list[tuple[str, Token]], int]], n_layers: int, title: str) -> str:
    """A self-contained page: each sample's text shaded by depth; samples are (pieces, prompt tokens)."""
    def span(piece, token, prompt=False):
        color, dark = shade(token.depth / n_layers)
        p = "" if token.p is None else f", p = {token.p:.3f}"
        label = escape(f"{piece!r}: {token.depth} of {n_layers} blocks{p}", quote=True)
        return (f'<span{" class=prompt" * prompt} style="background:rgb{color};'
                f'color:{"#fff" if dark else "#222"}" data-is="{label}">{escape(piece)}</span>')

    legend = "".join(span(str(d), Token(0, d, None)) for d in range(0, n_layers + 1, 2))
    body = [f"<pre>{''.join(span(*t, i < n) for i, t in enumerate(text))}</pre>" for text, n in samples]
    return PAGE.format(title=escape(title), legend=legend, n_layers=n_layers, samples="\n".join(body))


def run(cfg: Config, weights: dict, args) -> int:
    if not (args.temperature >= 0 and 0 < args.top_p <= 1 and (args.top_k is None or args.top_k > 0)):
        raise UserError("sampling needs --temperature of at least 0, --top_p above 0 and at "
                        "most 1, --top_k above 0")
    if args.max_new_tokens < 0 or args.num_samples < 1:
        raise UserError("sampling needs --max_new_tokens of at least 0 and --num_samples of at least 1")
    rt, encoding = tgs.Runtime(cfg), get_encoding(cfg)
    prompt = encode(cfg, args.prompt)
    if len(prompt) >= cfg.max_seq_len:
        raise UserError(f"--prompt has {len(prompt)} tokens, the model's sequences at most {cfg.max_seq_len}")
    model = tgs.build_model(cfg, rt, weights, args.checkpoint)
    for new_tokens in ([2] if rt.compile else []) + [args.max_new_tokens]:  # the first compiles
        start = time.perf_counter()
        with rt.autocast():
            out, cache_bytes = generate(model, [prompt] * args.num_samples, new_tokens, args.temperature,
                                        args.top_k, args.top_p, cfg.seed, encoding.eot_token,
                                        encoding.n_vocab)
    seconds, new = time.perf_counter() - start, sum(len(row) - len(prompt) for row in out)
    samples = [(pieces(row[1:], encoding), len(pieces(row[1:len(prompt)], encoding))) for row in out]
    for text, _ in samples:
        print(terminal_text(text, cfg.n_layers) if args.show_depth else "".join(s for s, _ in text))
    if args.show_depth:
        print("blocks run: " + " ".join(terminal_text([(f" {d} ", Token(0, d, 1.0))], cfg.n_layers)
                                        for d in range(0, cfg.n_layers + 1, 2)))
    depth = mean([t.depth for row in out for t in row])
    note = f"{new} new tokens, {new / seconds:.0f} tokens/s, {depth:.1f} of {cfg.n_layers} blocks a token, " \
           f"cache {cache_bytes:,} bytes"
    print(note, file=sys.stderr)
    if args.html:
        title = f"{Path(args.checkpoint).name}: {note}"
        tool.new_file(args.html, "--html", html_page(samples, cfg.n_layers, title))
    return 0


def main(argv: list[str] | None = None) -> int:
    return tool.main(run, __doc__, OPTIONS, argv)


if __name__ == "__main__":
    sys.exit(main())
