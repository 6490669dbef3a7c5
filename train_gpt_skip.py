"""Train language models that learn to skip their own middle layers, in one file.

The system of "Learning to Skip the Middle Layers of Transformers" (Lawson and Aitchison, arXiv 2506.21103),
in which a skipped token costs nothing: a block computes only the tokens whose gate is open. On two CPU cores
a training step at half sparsity takes 0.52 of the dense step's time (records/2026-11-23_06-54-06_bench:
float32, torch 2.13, 12 blocks, d 384). Here is what can change a run and what records it, in the paper's
order; what draws, prints and measures it (records/show.py, which a copy of this file can do without) and what
looks at a finished run is in records/. Three commands:

    ./run.sh                                                # train: the demo, or Table 2 on GPUs with shards
    ./run.sh eval --checkpoint records/X                    # loss, sparsity, FLOPs, which tokens skip
    ./run.sh sample --checkpoint records/X --prompt 'def ' --show_depth
"""
from __future__ import annotations

import argparse, contextlib, dataclasses, datetime, fcntl, functools, glob, hashlib, importlib.metadata
import itertools, json, math, os, platform, re, shlex, signal, subprocess, sys, time, traceback, warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean as mean
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from huggingface_hub import snapshot_download
from safetensors.torch import load_file as load_safetensors, save as safetensors_bytes
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent


class UserError(Exception):
    """Something that the user can mend: one line that says what, where, and how. Exit status 2."""


class RankError(UserError):
    """What one rank may see alone: that rank says it. (What all ranks see is said once a machine.)"""


class Divergence(Exception):
    """A loss or gradient that is not finite. Exit status 3."""


# ----------------------------------------------------------------------------------------------------------
# Configuration (Table 2). Every field is a flag of the same name.

OF_CONTROL = "mean_coef_init", "var_coef_init", "coef_update"
CONTROLS = {  # name: initial alpha, initial beta, gamma (Table 1; gamma 0: the coefficients never move)
    "dense": (0.0, 0.0, 0.0), "none": (0.0, 0.0, 0.0), "sparsity": (0.01, 0.0, 0.0),
    "sparsity_variance": (0.01, -0.01, 0.0), "sparsity_variance_l2": (0.1, 0.1, 0.0),
    "random": (0.0, 0.0, 0.0), "adaptive": (0.0, 0.0, 1e-3), "proportional": (0.0, 0.0, 1e-3),
    "proportional_derivative": (0.0, 0.0, 1e-2),
}


def flag(default, text, *choices, allow="above 0"):
    return dataclasses.field(default=default, metadata=dict(help=text, choices=choices or None, allow=allow))


fraction = functools.partial(flag, allow="between 0 and 1")


@dataclass
class Config:
    """All settings of a run; None means that the value follows from the others. Raises UserError."""
    # model
    dim: int = flag(768, "width d of the residual stream")
    n_layers: int = flag(12, "number of blocks L; even, unless dense")
    n_heads: int = flag(12, "query heads; divides dim")
    n_kv_heads: int | None = flag(None, "key and value heads; divides n_heads (default: n_heads)")
    vocab_size: int = flag(50257, "number of tokens in the vocabulary")
    ffn_dim_multiplier: float = flag(4.0, "width of the SwiGLU hidden layer, in units of dim")
    norm_eps: float = flag(1e-5, "RMSNorm epsilon")
    rope_theta: float = flag(10000.0, "base of the rotary frequencies")
    use_scaled_rope: bool = flag(False, "Llama 3's scaling of the rotary frequencies")
    max_seq_len: int = flag(1024, "sequence length T, in tokens")
    initializer_range: float = flag(0.02, "standard deviation of the initial weights")
    norm: str = flag("sandwich", "norm of a module's input and output, or only its input", "sandwich", "pre")
    gate_attention: str = flag("keys", "ln g on keys (Eq. 3), or no gate (as released)", "keys", "none")
    compute: str = flag("packed", "skip for real, or compute all and multiply by 0", "packed", "masked")
    # gates
    control: str = flag("proportional", "how sparsity is controlled (Table 1)", *CONTROLS)
    mean_target_start: float = fraction(1.0, "target mean gate of the first block, 0 to 1")
    mean_target_end: float = fraction(0.5, "target mean gate of the middle blocks, 0 to 1")
    mean_coef_init: float | None = flag(None, "initial alpha (default: Table 1's)", allow="any")
    var_coef_init: float | None = flag(None, "initial beta (default: Table 1's)", allow="any")
    coef_update: float | None = flag(None, "update multiplier gamma (default: Table 1's)", allow="at least 0")
    tolerance: float = flag(0.01, "tolerance delta: smaller deviations move nothing", allow="at least 0")
    # data
    train_files: str = flag("data/fineweb10B/fineweb_train_*.bin", "glob of the training shards")
    val_files: str = flag("data/fineweb10B/fineweb_val_*.bin", "glob of the validation shards")
    train_tokens: int | None = flag(None, "use only the first so many training tokens (default: all)")
    val_tokens: int | None = flag(None, "use only the first so many validation tokens (default: all)")
    shuffle: bool = flag(False, "take a shard's sequences in a random order, seeded, new each pass")
    encoding: str | None = flag(None, "tokeniser (default: dataset.json's, or vocab_size's)", "gpt2", "bytes")
    # batch
    batch_size: int = flag(512, "sequences a step, over all devices")
    device_batch_size: int = flag(32, "sequences a micro-batch, on one device")
    # optimizer and schedule
    optimizer: str = flag("adamw", "optimizer of the blocks' matrices; all else has AdamW", "adamw", "muon")
    lr: float = flag(1e-3, "peak learning rate")
    beta1: float = fraction(0.8, "decay of AdamW's first moment")
    beta2: float = fraction(0.95, "decay of AdamW's second moment")
    eps: float = flag(1e-10, "AdamW epsilon")
    weight_decay: float = flag(0.0, "weight decay, of both optimizers", allow="at least 0")
    max_grad_norm: float | None = flag(None, "clip the gradient norm to this (default: off)")
    num_steps: int | None = flag(None, "optimizer steps (default: a pass over the data)", allow="at least 0")
    warmup_fraction: float = fraction(0.1, "share of the steps that warms up")
    cooldown_fraction: float = fraction(
        0.0, "share of the steps in which lr falls linearly to 0, constant before (0: a cosine)")
    start_factor: float = flag(0.1, "learning rate at step 0, in units of lr", allow="at least 0")
    # run
    preset: str | None = flag(None, "named settings; flags override them", "demo", "gated", "dense")
    config: str | None = flag(None, "start from the settings of a record's config.json (a file)")
    name: str | None = flag(None, "name of the record (default: the preset's, or the control's)")
    seed: int = flag(0, "seed of the initial weights, --shuffle and --control random", allow="at least 0")
    device: str | None = flag(None, "cpu or cuda (default: cuda where there is one)", "cpu", "cuda")
    dtype: str | None = flag(None, "of matrix products (default: bfloat16 on cuda)", "bfloat16", "float32")
    compile: bool | None = flag(None, "torch.compile the blocks (default: on cuda)")
    val_every: int = flag(100, "steps between validations")
    save_every: int = flag(1000, "steps between checkpoints")
    log_every: int = flag(1, "steps between lines of the log")
    metrics_every: int = flag(1, "steps between training events of metrics.jsonl")
    target_loss: float | None = flag(None, "stop at this validation loss (nats a token)", allow="any")
    records_dir: str = flag("records", "folder that holds the records")
    resume: str | None = flag(None, "a record's folder: go on from its last checkpoint")
    init_from: str | None = flag(None, "checkpoint (folder, file or hub repo) to take sizes and weights from")
    # what follows from them
    head_dim = property(lambda self: self.dim // self.n_heads)
    hidden_dim = property(lambda self: int(self.ffn_dim_multiplier * self.dim))
    n_levels = property(lambda self: (self.n_layers + 1) // 2)
    n_routers = property(lambda self: 0 if self.control in ("dense", "random") else self.n_levels)
    gated = property(lambda self: self.control != "dense")
    step_tokens = property(lambda self: self.batch_size * self.max_seq_len)
    tokeniser = property(lambda self: self.encoding or ("bytes" if self.vocab_size == 257 else "gpt2"))

    def __post_init__(self):
        self.n_kv_heads = self.n_heads if self.n_kv_heads is None else self.n_kv_heads
        for name, value in zip(OF_CONTROL, CONTROLS.get(self.control, ())):
            if getattr(self, name) is None:
                setattr(self, name, value)
        for f in dataclasses.fields(self):
            check_field(f, getattr(self, f.name))
        for ok, message in self.rules():
            if not ok:
                raise UserError(message)

    def rules(self):
        L, d, H = self.n_layers, self.dim, self.n_heads
        yield L % 2 == 0 or self.control == "dense", (
            f"--n_layers {L} must be even: blocks are gated in opposing pairs; try {L + 1}")
        yield d % H == 0, f"--dim {d} is not a multiple of --n_heads {H}; try --dim {-(-d // H) * H}"
        yield d // H % 2 == 0, f"--dim / --n_heads is {d // H}, but rotary pairs need an even head size"
        yield H % self.n_kv_heads == 0, f"--n_heads {H} is not a multiple of --n_kv_heads {self.n_kv_heads}"
        yield self.vocab_size <= 2**16, f"--vocab_size {self.vocab_size}: tokens have 16 bits, at most 65536"
        yield self.seed < 2**63, f"--seed {self.seed} has more than 63 bits"
        yield re.fullmatch("[^/\0]{1,200}", self.name or "-"), (
            f"--name {self.name!r} cannot be part of a folder's name: at most 200 characters, no /")
        yield self.gate_attention == "keys" or self.compute == "masked" or self.control == "dense", (
            "--gate_attention none needs --compute masked: there a skipped token is still a key, "
            "so none can be left out of the computation")
        yield self.warmup_fraction + self.cooldown_fraction <= 1, (
            f"--warmup_fraction {self.warmup_fraction} and --cooldown_fraction {self.cooldown_fraction} are "
            "more than all steps together")
        lossless = self.control in ("dense", "none", "random")
        yield not (lossless and (self.mean_coef_init or self.var_coef_init)), (
            f"--control {self.control} has no gate loss: leave out --mean_coef_init and --var_coef_init")
        yield CONTROLS[self.control][2] or not self.coef_update, (
            f"--control {self.control} never moves its coefficients: leave out --coef_update")


MODEL_FIELDS = [f.name for f in dataclasses.fields(Config)][:14]
SIZES = MODEL_FIELDS[:10]  # what a checkpoint fixes
GATE_FIELDS = ["control", "mean_target_start", "mean_target_end", "seed"]  # what its gates follow from

PRESETS = {
    "gated": dict(),
    "dense": dict(control="dense"),
    "demo": dict(
        dim=64, n_layers=8, n_heads=2, vocab_size=257, max_seq_len=256, encoding="bytes",
        train_files="data/demo/demo_train_*.bin", val_files="data/demo/demo_val_*.bin", val_tokens=65536,
        shuffle=True, batch_size=8, device_batch_size=8, optimizer="muon", lr=3e-3, num_steps=1100,
        cooldown_fraction=0.5, val_every=100, save_every=500, log_every=10, metrics_every=10,
        control="proportional_derivative", mean_target_end=0.25, dtype="float32"),
}


def check_field(f, value):
    """Type and range of one field; a JSON file can hold what a command line cannot."""
    kind, optional = f.type.split(" | ")[0], "None" in f.type
    if value is None and optional:
        return
    want = {"int": int, "float": (int, float), "bool": bool, "str": str}[kind]
    if not isinstance(value, want) or (kind != "bool" and isinstance(value, bool)):
        raise UserError(f"--{f.name} {value!r} is not {'a number' if kind == 'float' else 'of type ' + kind}")
    if f.metadata["choices"] and value not in f.metadata["choices"]:
        raise UserError(f"--{f.name} {value!r} is not one of {', '.join(f.metadata['choices'])}")
    if kind in ("int", "float"):
        allow = f.metadata["allow"]
        fits = {"above 0": value > 0, "at least 0": value >= 0, "between 0 and 1": 0 <= value <= 1,
                "any": True}
        if not (fits[allow] and math.isfinite(value)):
            raise UserError(f"--{f.name} {value} is out of range: it must be a finite number"
                            + f", {allow}" * (allow != "any"))


# ----------------------------------------------------------------------------------------------------------
# Runtime: where this process stands among its peers, and on which device.

class Runtime:
    """One process of torchrun's (or the only one): rank, world size R, device, precision."""

    def __init__(self, cfg: Config):
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.main, local = self.rank == 0, int(os.environ.get("LOCAL_RANK", 0))
        cuda = torch.cuda.is_available() if cfg.device is None else cfg.device == "cuda"
        if cuda and local >= torch.cuda.device_count():
            raise RankError(f"--device cuda: this machine has {torch.cuda.device_count()} GPUs, process "
                            f"{local} has none; use --device cpu or fewer processes (NPROC)")
        self.device = torch.device("cuda", local) if cuda else torch.device("cpu")
        self.dtype = getattr(torch, cfg.dtype or ("bfloat16" if cuda else "float32"))
        self.compile = cuda if cfg.compile is None else cfg.compile
        if cuda:
            torch.cuda.set_device(self.device)
            properties = torch.cuda.get_device_properties(self.device)
            check_heads(cfg, self.dtype, properties.shared_memory_per_block_optin)
            # float32 stays float32: a router in TF32 may open in decoding a gate that was closed in training
            warnings.filterwarnings("ignore", "TensorFloat32 tensor cores")
        if self.world > 1 and not dist.is_initialized():
            store, timeout = next(dist.rendezvous("env://"))[0], datetime.timedelta(minutes=10)
            # torchrun's restarts share a store: hide old addresses
            if os.environ.get("GROUP_WORLD_SIZE") == "1":
                store = dist.PrefixStore(f"restart_{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
            dist.init_process_group("nccl" if cuda else "gloo", store=store, rank=self.rank,
                                    world_size=self.world, timeout=timeout)

    def sum(self, x: Tensor) -> Tensor:
        """x summed over ranks, in place."""
        if self.world > 1:
            dist.all_reduce(x)
        return x

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    def synchronize(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()


# All that is ever compiled is run as lower(function)(...), where `lower` is one of these two.

def eager(function):
    return function


@functools.cache
def compiled(function):
    """One graph for all layers and all numbers of active tokens."""
    import torch.fx.experimental._config as shapes
    import torch._inductor.config as inductor
    shapes.use_duck_shape = False  # a number of rows that equals another size does so by chance
    # By default a norm's backward walks few rows in another way than many, which is another graph.
    inductor.triton.mix_order_reduction_non_strict_mode = True
    return torch.compile(function, dynamic=True)


# ----------------------------------------------------------------------------------------------------------
# Norm and positions. Llama 3's: RMSNorm, and rotary embeddings on interleaved pairs (2i, 2i+1).

class RMSNorm(nn.RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.normalized_shape, self.weight, self.eps)


def rope_table(cfg: Config) -> tuple[Tensor, Tensor]:
    """cos and sin of every position's angles, each (max_seq_len, head_dim / 2), float32."""
    freq = cfg.rope_theta ** -(torch.arange(0, cfg.head_dim, 2, dtype=torch.float32) / cfg.head_dim)
    if cfg.use_scaled_rope:  # Llama 3.1: wavelengths of over 8192 positions 8-fold, a blend to 2048
        smooth = ((8192 * freq / (2 * math.pi) - 1) / 3).clamp(0, 1)
        freq = freq * (smooth + (1 - smooth) / 8)
    angle = torch.outer(torch.arange(cfg.max_seq_len, dtype=torch.float32), freq)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE of x (n, heads, head_dim) by the angles (n, head_dim / 2) of each row's position."""
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2).to(x.dtype)


# ----------------------------------------------------------------------------------------------------------
# Gated attention (Section 2.2, Eq. 3), on packed tokens: only rows that take part are there at all.

EPSILON = 1e-6  # lower bound of g before ln
REMOVED = -2.0**100  # the logit of a key whose gate is 0: weight exactly 0, also by fused multiply-adds
ROWS = 128  # block size of FlexAttention
CARRY = 8  # columns by which q and k carry ln g there
QUERY_ROWS = 192  # most rows of a block of queries on a CPU


class Layout(NamedTuple):
    """Which tokens the rows of a packed tensor are: sequences ascend, positions in each too. Where a GPU
    computes, further rows pad them to `padded_rows`: a sequence of their own, which nobody sees."""
    seq: Tensor  # (n,) sequence of each token
    pos: Tensor  # (n,) its position there
    row: Tensor  # (n,) the row of the micro-batch that it came from
    counts: Tensor  # (sequences + 1,) tokens of each sequence that are here; the last are padding, and 0
    cos: Tensor  # (n or padded, head_dim / 2) rotary angles
    sin: Tensor
    tables: list[Tensor] | None  # `mask_tables` (CUDA)
    cache: object = None  # keys and values of earlier tokens (decoding)


def make_layout(seq: Tensor, pos: Tensor, row: Tensor, n_seqs: int, rope: tuple[Tensor, Tensor],
                rows: int, flex: bool) -> Layout:
    """The layout of n tokens in so many rows, n or padded."""
    each = torch.arange(n_seqs + 1, device=seq.device)
    counts = torch.searchsorted(seq, each, right=True) - torch.searchsorted(seq, each)
    angle = padded(pos, rows, 0)
    return Layout(seq, pos, row, counts, rope[0][angle], rope[1][angle],
                  mask_tables(padded(seq, rows, n_seqs)) if flex else None)


def gather(h: Tensor, S: Tensor, g: Tensor, layout: Layout, keep: Tensor, rope: tuple[Tensor, Tensor],
           rows: int) -> tuple[Tensor, Tensor, Tensor, Layout]:
    """The tokens `keep` (n,) of h (n, d), S and g, padded, and their layout: in one graph, since the host has
    just waited for `keep` and the device with it."""
    at, token = padded(keep, rows, 0), torch.arange(rows, device=h.device) < len(keep)
    S, g = torch.where(token, S[at], 1.0), torch.where(token, g[at], 0.0)
    return h.index_select(0, at), S, g, make_layout(
        layout.seq[keep], layout.pos[keep], layout.row[keep], len(layout.counts) - 1, rope, rows,
        layout.tables is not None)


def put_back(h: Tensor, keep: Tensor, x: Tensor) -> Tensor:
    """h with its rows `keep` (n,) replaced by the first n of x."""
    return h.index_copy(0, keep, x[:len(keep)])


def uses_flex(device: torch.device) -> bool:
    """FlexAttention has no backward on a CPU."""
    return device.type == "cuda"


def padded_rows(n: int, flex: bool) -> int:
    """n, or what FlexAttention takes in one graph."""
    return max(2 * ROWS, -(-n // ROWS) * ROWS) if flex else n


def padded(x: Tensor, rows: int, value) -> Tensor:
    return x if rows == len(x) else F.pad(x, (0, rows - len(x)), value=value)


def mask_tables(seq: Tensor) -> list[Tensor]:
    """Block-sparse tables of the causal same-sequence mask, without an n x n tensor, in BlockMask's order.

    seq: (n,) sorted, n a multiple of ROWS. Returns, int32: the first row of each row's sequence (n,); then of
    each query block the number of partly visible key blocks and their indices, (1, 1, nb) and (1, 1, nb, nb),
    the same of fully visible ones; and both again of each key block, whose query blocks see it.
    """
    start, end = torch.searchsorted(seq, seq), torch.searchsorted(seq, seq, right=True)
    b = torch.arange(len(seq) // ROWS, device=seq.device)
    lo, full_lo = start[::ROWS] // ROWS, (start[::ROWS] + ROWS - 1) // ROWS
    hi, full_hi = (end[ROWS - 1::ROWS] - 1) // ROWS, end[ROWS - 1::ROWS] // ROWS
    one = seq[::ROWS] == seq[ROWS - 1::ROWS]  # the block lies in one sequence
    head, tail = (lo < full_lo) & (lo < b), (full_hi <= hi) & (b < hi)  # which begins, ends, inside another

    def tables(first, last, cut, far, full_first, n_full):
        k, (f, own, other) = b[None], (t[:, None] for t in (first, b, far))
        n_part, n_full = torch.where(one, 1 + cut, last - first + 1), torch.where(one, n_full.clamp(min=0), 0)
        part = torch.where(one[:, None], torch.where(k == 0, own, other), f + k)
        part = torch.where(k < n_part[:, None], part, 0)
        full = torch.where(k < n_full[:, None], full_first[:, None] + k, 0)
        return [t.int()[None, None] for t in (n_part, part, n_full, full)]

    return [start.int(), *tables(lo, b, head, lo, full_lo, b - full_lo),
            *tables(b, hi, tail, hi, b + 1, full_hi - 1 - b)]


def block_mask(start: Tensor, *tables: Tensor) -> BlockMask:
    def causal_same_sequence(b, h, q, k):
        return (q >= k) & (k >= start[q])

    return BlockMask((len(start),) * 2, *tables, BLOCK_SIZE=(ROWS, ROWS), mask_mod=causal_same_sequence)


def log_gate(g: Tensor) -> Tensor:
    """ln g_j of Eq. 3, (n,) float32. A key with g = 0 is removed exactly; where all keys of a query are, the
    query itself is skipped, and its finite output is multiplied by 0."""
    return torch.where(g > 0, g.clamp(min=EPSILON).log(), REMOVED)


def attention_kernel(layout: Layout):
    """What computes Eq. 3 on this layout: causal attention within each sequence, ln g_j added to the logit of
    key j, softmax in float32. A function of q (n, heads, head_dim), k and v (n, kv_heads, head_dim), ln_g
    (n,) or None (no gate, or `carried` by q and k), and the layout; it returns (n, heads, head_dim)."""
    if layout.cache is not None:
        return layout.cache.attend
    return attend_rows if layout.tables is None else attend_flex


def carried(q: Tensor, k: Tensor, ln_g: Tensor) -> tuple[Tensor, Tensor]:
    """q and k with CARRY further columns, which add ln g_j to the logit of key j: its high and its low part,
    so that bfloat16 rounds nothing away, and zeros, for aligned rows. Its gradient then is a column of k's,
    and not, as a captured tensor's, a sum by atomic additions, one for every pair. (The kernel rounds 72
    columns to 128: by estimate 4 ms of an 80 ms micro-batch of Table 2, for 5 to 20 of additions; neither
    ran.)"""
    unit = 2.0 ** round(math.log2(q.shape[-1]) / 2)  # near sqrt(head_dim), and exact
    value = ln_g * (math.sqrt(q.shape[-1]) / unit)
    high = (8 * value.detach()).round() / 8  # exact in bfloat16: a compiler elides a cast there and back
    parts = torch.stack((high, value - high), -1).to(k.dtype)[:, None].expand(-1, k.shape[1], -1)
    ones = q.new_full((*q.shape[:2], 2), unit)
    return tuple(F.pad(torch.cat(both, -1), (0, CARRY - 2)) for both in ((q, ones), (k, parts)))


def attend_flex(q, k, v, ln_g, layout):
    if ln_g is not None:
        q, k = carried(q, k, ln_g)
    assert len(q) == len(k) and len(q) % ROWS == 0  # `padded_rows`: what IS_DIVISIBLE promises
    heads_first = [t.transpose(0, 1)[None] for t in (q, k, v)]  # (1, heads, n, head_dim)
    lower = compiled if q.device.type == "cuda" else eager  # (eager, it would hold all n x n scores)
    out = lower(flex_attention)(*heads_first, block_mask=block_mask(*layout.tables), scale=v.shape[-1]**-0.5,
                                enable_gqa=k.shape[1] != q.shape[1],
                                kernel_options=flex_options(q.shape[-1], q.dtype))
    return out[0].transpose(0, 1)


def flex_options(width: int, dtype: torch.dtype) -> dict:
    """Tiles for FlexAttention's kernels. In float32 or beyond 128 columns its own take more shared memory
    than most devices have; 72 columns, for which it has none, get those of 128. On 4 warps, its default, the
    forward kernel spills 576 bytes a thread on sm_90; on 8, divisible, none."""
    if dtype == torch.float32:
        tiles = dict(fwd_BLOCK_M=32, fwd_BLOCK_N=32, fwd_num_stages=1)
    elif width > 128:
        tiles = dict(fwd_BLOCK_M=64, fwd_BLOCK_N=32, fwd_num_stages=2, bwd_BLOCK_M1=32, bwd_BLOCK_N1=32,
                     bwd_BLOCK_M2=32, bwd_BLOCK_N2=32, bwd_num_stages=1)
    else:
        tiles = dict(fwd_BLOCK_M=128, fwd_BLOCK_N=64) if width > 64 else {}
    return dict(IS_DIVISIBLE=True, fwd_num_warps=8) | tiles


def check_heads(cfg: Config, dtype: torch.dtype, shared: int):
    """UserError where FlexAttention's kernels cannot start: a block of threads may take `shared` bytes."""
    if cfg.head_dim < 16:
        raise UserError(f"--dim / --n_heads is {cfg.head_dim}: FlexAttention needs at least 16 on cuda")
    width = cfg.head_dim + CARRY * (cfg.gated and cfg.gate_attention == "keys")
    columns = 2**math.ceil(math.log2(width))  # as the kernels round
    needed = columns * (272 if dtype == torch.float32 or width > 128 else 768)  # measured
    if needed > shared:
        raise UserError(f"--dim / --n_heads is {cfg.head_dim}: FlexAttention takes {needed} bytes of shared "
                        f"memory for it in {dtype}, and this GPU has {shared}; use more --n_heads")


def attend_rows(q, k, v, ln_g, layout):
    with torch.autocast("cpu", enabled=False):
        return RowBlockAttention.apply(q, k, v, ln_g, layout.counts.tolist(), torch.is_grad_enabled())


class RowBlockAttention(torch.autograd.Function):
    """The CPU's kernel: a sequence at a time, in blocks of query rows, over the causal part only.

    Inside, heads come first; query heads that share a key head are stacked as its further rows. Logits and
    softmax are float32, with their gradients; the weights multiply in the type of q.
    """

    @staticmethod
    def blocks(lengths):
        """(query rows, their keys) of every block, as slices; the blocks of a sequence are about equal."""
        first = 0
        for n in filter(None, lengths):
            count = -(-n // QUERY_ROWS)
            ends = [first + n * (i + 1) // count for i in range(count)]
            yield from ((slice(i, end), slice(first, end)) for i, end in zip([first, *ends], ends))
            first += n

    @staticmethod
    def forward(ctx, q, k, v, ln_g, lengths, wanted):
        H, D, out, weights = q.shape[1], q.shape[2], torch.empty_like(q), []
        qh, kh, vh, oh = (t.transpose(0, 1) for t in (q.float(), k.float(), v, out))
        causal = torch.full((QUERY_ROWS, QUERY_ROWS), REMOVED).triu(1)
        for rows, keys in RowBlockAttention.blocks(lengths):
            n, m = rows.stop - rows.start, keys.stop - keys.start
            q_rows = qh[:, rows].reshape(len(kh), -1, D)  # (kv_heads, group * n, head_dim)
            bias, beta = (causal[0, :1], 0) if ln_g is None else (ln_g[keys], 1)
            p = torch.baddbmm(bias, q_rows, kh[:, keys].mT, beta=beta, alpha=D**-0.5).view(H, n, m)
            p[..., m - n:] += causal[:n, :n]
            p = torch.softmax(p, -1, out=p).to(v.dtype)
            oh[:, rows] = torch.bmm(p.view(len(kh), -1, m), vh[:, keys]).view(H, n, D)
            weights += [p] if wanted else []
        if wanted:
            ctx.save_for_backward(q, k, v, *weights)
            ctx.lengths, ctx.gated = lengths, ln_g is not None
        return out

    @staticmethod
    def backward(ctx, d_out):
        q, k, v, *weights = ctx.saved_tensors
        H, D = q.shape[1:]
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        qh, kh, vh, d_oh, dqh, dkh, dvh = (t.transpose(0, 1) for t in (q, k, v.float(), d_out, dq, dk, dv))
        d_ln_g = torch.zeros(len(q)) if ctx.gated else None
        for (rows, keys), p in zip(RowBlockAttention.blocks(ctx.lengths), weights):
            p = p.view(len(kh), -1, p.shape[-1])
            q_rows, do = (t[:, rows].reshape(len(kh), -1, D) for t in (qh, d_oh))
            dp = torch.bmm(do.float(), vh[:, keys].mT)
            ds = torch._softmax_backward_data(dp, p.float(), -1, torch.float32)
            if ctx.gated:
                d_ln_g[keys] += ds.sum((0, 1))
            ds = ds.to(q.dtype)
            dvh[:, keys] += torch.bmm(p.mT, do)
            dkh[:, keys] += torch.bmm(ds.mT, q_rows)
            dqh[:, rows] = torch.bmm(ds, kh[:, keys]).view(H, -1, D)
        return dq.mul_(D**-0.5), dk.mul_(D**-0.5), dv, d_ln_g, None, None


# ----------------------------------------------------------------------------------------------------------
# Block (Section 2.3): sandwich norm, y = x + g Norm(Module(Norm(x))).

class Attention(nn.Module):
    def __init__(self, cfg: Config):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = cfg.n_heads, cfg.n_kv_heads, cfg.head_dim
        self.wq = nn.Linear(cfg.dim, cfg.dim, bias=False)
        self.wk = nn.Linear(cfg.dim, cfg.n_kv_heads * cfg.head_dim, bias=False)
        self.wv = nn.Linear(cfg.dim, cfg.n_kv_heads * cfg.head_dim, bias=False)
        self.wo = nn.Linear(cfg.dim, cfg.dim, bias=False)

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of x (n, dim): (n, heads, head_dim), and (n, kv_heads, head_dim) twice."""
        q = rotate(self.wq(x).view(-1, self.heads, self.head_dim), cos, sin)
        k = rotate(self.wk(x).view(-1, self.kv_heads, self.head_dim), cos, sin)
        return q, k, self.wv(x).view(-1, self.kv_heads, self.head_dim)


class FeedForward(nn.Module):
    def __init__(self, cfg: Config):
        super().__init__()
        self.w1 = nn.Linear(cfg.dim, cfg.hidden_dim, bias=False)
        self.w2 = nn.Linear(cfg.hidden_dim, cfg.dim, bias=False)
        self.w3 = nn.Linear(cfg.dim, cfg.hidden_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    def __init__(self, cfg: Config):
        super().__init__()
        post = cfg.norm == "sandwich"
        self.gate_keys = cfg.gate_attention == "keys"
        self.pre_attention_norm = RMSNorm(cfg.dim, cfg.norm_eps)
        self.attention = Attention(cfg)
        self.post_attention_norm = RMSNorm(cfg.dim, cfg.norm_eps) if post else nn.Identity()
        self.pre_feed_forward_norm = RMSNorm(cfg.dim, cfg.norm_eps)
        self.feed_forward = FeedForward(cfg)
        self.post_feed_forward_norm = RMSNorm(cfg.dim, cfg.norm_eps) if post else nn.Identity()

    def before(self, h: Tensor, g: Tensor | None, cos: Tensor, sin: Tensor, carry: bool):
        """What attention takes: q, k, v and ln g (or q and k that carry it) of h (n, d) and g (n,) or None
        (dense)."""
        ln_g = log_gate(g) if g is not None and self.gate_keys else None
        q, k, v = self.attention.project(self.pre_attention_norm(h), cos, sin)
        return (*carried(q, k, ln_g), v, None) if carry and ln_g is not None else (q, k, v, ln_g)

    def after(self, h: Tensor, g: Tensor | None, y: Tensor) -> Tensor:
        """The block's output (n, d), from its input and what attention gave, y (n, heads, head_dim)."""
        a = gated_add(h, g, self.post_attention_norm(self.attention.wo(y.flatten(1))))
        return gated_add(a, g, self.post_feed_forward_norm(self.feed_forward(self.pre_feed_forward_norm(a))))


def gated_add(x: Tensor, g: Tensor | None, y: Tensor) -> Tensor:
    return x + y if g is None else torch.addcmul(x, g[:, None], y.float())


# ----------------------------------------------------------------------------------------------------------
# The middle-skipping transformer (Section 2.1, Eq. 1 and 2). Gates only close on the way to the middle, and
# the second half mirrors the first: active tokens are nested sets, and the forward pass is a recursion.

class Router(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.linear = nn.Linear(dim, 1)

    def forward(self, h: Tensor) -> Tensor:
        """Soft mask s = ReLU(w . h + b) of Eq. 1: (n, d) to (n,), float32."""
        with torch.autocast(h.device.type, enabled=False):
            return F.relu(F.linear(h.float(), self.linear.weight, self.linear.bias)).squeeze(-1)


def accumulate(router: Router, h: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
    """Eq. 1 and 2: S with the soft mask of h (n, d) added, and the gates g = 1 - clamp(S, 0, 1), (n,) each; a
    ReLU, since its gradient at S = 1 is 0, and clamp's is not."""
    S = S + router(h)
    return S, F.relu(1 - S)


def gate_sums(g: Tensor | None, layout: Layout) -> Tensor:
    """Of one level: sum of g, sum of g^2, active tokens, causal pairs among them; (4,) float64."""
    n = layout.counts
    each = (n, n, n) if g is None else (g, g.square(), g > 0)
    return torch.stack([*(x.sum().double() for x in each), (n * (n + 1)).sum().double() / 2])


def coin(tokens: Tensor, pos: Tensor, seed: int) -> Tensor:
    """A number in [0, 1) a token (n,), hashed from its id, position and the seed: the same in training and
    decoding and on any number of ranks."""
    x = (tokens << 32) + (pos << 12) + seed + 1
    for multiplier in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB):
        x = x * (multiplier - 2**64)  # as int64, that wraps
        x = x ^ ((x >> 31) & 0x1FFFFFFFF)
    return ((x >> 40) & 0xFFFFFF) / 2**24


class MiddleSkippingTransformer(nn.Module):
    """Decoder whose tokens skip blocks [l, L - l) once their accumulated soft mask S reaches 1."""

    def __init__(self, cfg: Config):
        super().__init__()
        self.cfg = cfg
        self.tok_embeddings = nn.Embedding(cfg.vocab_size, cfg.dim)
        self.input_norm = RMSNorm(cfg.dim, cfg.norm_eps)
        self.layers = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layers))
        self.masks = nn.ModuleList(Router(cfg.dim) for _ in range(cfg.n_routers))
        self.output_norm = RMSNorm(cfg.dim, cfg.norm_eps)
        self.output = nn.Linear(cfg.dim, cfg.vocab_size, bias=False)
        for name, table in zip(("cos", "sin"), rope_table(cfg)):
            self.register_buffer(name, table, persistent=False)
        self.lower = eager

    def forward(self, inputs: Tensor, targets: Tensor, depth: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """inputs, targets: (B, T). Returns the mean cross-entropy in nats and the gate statistics of `span`
        (L/2, 4). To depth (B, T), where it is given, the number of blocks that each token ran is added."""
        B, T = inputs.shape
        each = torch.arange(B * T, device=inputs.device)
        depth = None if depth is None else depth.view(-1)
        h, stats = self.hidden(inputs.flatten(), each // T, each % T, B, depth)
        autocast = torch.is_autocast_enabled(h.device.type)
        dtype = torch.get_autocast_dtype(h.device.type) if autocast else h.dtype
        ce = HeadLoss.apply(h, self.output.weight, targets.flatten(), dtype, self.lower(chunk_loss),
                            torch.is_grad_enabled())
        return ce, stats

    def hidden(self, tokens: Tensor, seq: Tensor, pos: Tensor, n_seqs: int, depth=None, cache=None):
        """The final residual stream of packed tokens, each argument (n,). Returns it normalised (n, d), and
        the statistics of `span` (L/2, 4; None with a cache)."""
        n, stats, flex = len(tokens), [] if cache is None else None, uses_flex(tokens.device)
        rows, here = padded_rows(n, flex), torch.arange(n, device=tokens.device)
        layout = self.lower(make_layout)(seq, pos, here, n_seqs, (self.cos, self.sin), rows, flex)
        h = self.lower(RMSNorm.forward)(self.input_norm, self.tok_embeddings(padded(tokens, rows, 0)))
        random = self.cfg.control == "random"
        S = coin(tokens, pos, self.cfg.seed) if random else torch.zeros(n, device=tokens.device)
        h = self.span(h, padded(S, rows, 1.0), layout, 0, depth, stats, cache)  # (padding skips: S = 1)
        h = self.lower(RMSNorm.forward)(self.output_norm, h[:n])
        return h, None if stats is None else torch.stack(stats)

    def span(self, h, S, layout, l, depth, stats, cache):
        """Blocks [l, L - l) on the rows of h (n, d) whose gate is open; the others pass unchanged. To stats,
        unless it is None, the level's `gate_sums` are appended."""
        if l == self.cfg.n_levels:
            return h
        S, g = self.gates(h, S, l, cache)
        # a level's one wait for the host:
        keep = None if g is None or self.cfg.compute == "masked" else g.nonzero()[:, 0]
        if keep is None or len(keep) == len(layout.seq):
            x, keep = h, None
        elif len(keep) == 0 and cache is not None:
            return h  # (in training blocks run on nothing: each needs a gradient)
        else:
            flex = layout.tables is not None
            rows = padded_rows(len(keep) + flex, flex)  # with and without padding would be two graphs
            x, S, g, layout = self.lowered(keep, cache)(gather)(h, S, g, layout, keep, (self.cos, self.sin),
                                                                rows)
        x = self.block(l, x, g, layout, cache)
        if stats is not None:
            stats.append(self.lowered(x, cache)(gate_sums)(g, layout))
        mirror = self.cfg.n_layers - 1 - l  # (the block itself in the middle of an odd dense model)
        if depth is not None:
            depth[layout.row] += (1 + (mirror > l)) * (1 if g is None else g[:len(layout.row)] > 0)
        if mirror > l:
            x = self.span(x, S, layout, l + 1, depth, stats, cache)
            x = self.block(mirror, x, g, layout, cache)
        return x if keep is None else self.lowered(keep, cache)(put_back)(h, keep, x)

    def gates(self, h: Tensor, S: Tensor, l: int, cache) -> tuple[Tensor, Tensor | None]:
        """S and the gates of level l by Eq. 1 and 2; dense, None; with --control random, where S is a coin in
        [0, 1), 1 as often as the level's target asks, and as nested."""
        if self.cfg.control == "dense":
            return S, None
        if self.masks:
            return self.lowered(h, cache)(accumulate)(self.masks[l], h, S)
        return S, (S < min(mean_targets(self.cfg)[:l + 1])).float()

    def block(self, l, h, g, layout, cache):
        block, lower = self.layers[l], self.lowered(h, cache)
        layout = layout if cache is None else layout._replace(cache=cache[l])
        carry = layout.tables is not None and cache is None
        q, k, v, ln_g = lower(Block.before)(block, h, g, layout.cos, layout.sin, carry)
        return lower(Block.after)(block, h, g, attention_kernel(layout)(q, k, v, ln_g, layout))

    def lowered(self, rows: Tensor, cache):
        """0 and 1 rows would be graphs of their own: rare in training; in decoding 1 row is what there is."""
        return eager if cache is None and len(rows) < 2 else self.lower


def initialise(model: nn.Module, cfg: Config):
    """Normal(0, initializer_range) for every weight, zero for router biases, one for norms."""
    generator = torch.Generator().manual_seed(cfg.seed)
    for name, p in model.named_parameters():
        if re.search(r"norm\.weight$", name):
            nn.init.ones_(p)
        elif re.fullmatch(r"masks\.\d+\.linear\.bias", name):
            nn.init.zeros_(p)
        elif re.search(r"(tok_embeddings|output|w[qkvo123]|masks\.\d+\.linear)\.weight$", name):
            nn.init.normal_(p, 0.0, cfg.initializer_range, generator=generator)
        else:
            raise RuntimeError(f"no initialisation is known for parameter {name}")


class HeadLoss(torch.autograd.Function):
    """Mean cross-entropy of head and softmax without the (n, V) logits: a chunk of rows at a time, with its
    gradients, since the loss is the last thing computed. Products in `dtype`, softmax in float32."""

    @staticmethod
    def forward(ctx, h, weight, targets, dtype, chunk_loss, wanted):
        cuda, (n, d), V = h.device.type == "cuda", h.shape, len(weight)
        w = F.pad(weight.to(dtype), (0, 0, 0, -V % 128 if cuda else 0))  # a width that suits the tensor cores
        rows = max(1, 2**(27 if cuda else 25) // len(w))
        total, dh = torch.zeros((), device=h.device), torch.empty_like(h) if wanted else None
        dw = torch.zeros(len(w), d, device=h.device) if wanted else None
        with torch.autocast(h.device.type, enabled=False):
            for i in range(0, n, rows):
                x = h[i:i + rows].to(dtype)
                loss, dz = chunk_loss(x @ w.t(), targets[i:i + rows].clone(), V, n)
                total += loss
                if wanted:
                    dh[i:i + rows] = dz @ w
                    dw = add_product(dw, dz.t(), x)
        if wanted:
            ctx.save_for_backward(dh, dw[:V])
        return total

    @staticmethod
    def backward(ctx, grad):
        dh, dw = ctx.saved_tensors
        return dh * grad, dw * grad, None, None, None, None


def add_product(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """total + a @ b, summed in total's float32 whatever a and b are; total is spent."""
    if a.dtype == total.dtype:
        return total.addmm_(a, b)
    if a.device.type == "cuda":
        return torch.addmm(total, a, b, out_dtype=total.dtype)
    return total.add_(a @ b)


def chunk_loss(logits: Tensor, targets: Tensor, vocab_size: int, n: int) -> tuple[Tensor, Tensor]:
    """Share of the mean loss over n rows, of logits (rows, V or more) and targets (rows,); and its gradient
    by the logits. Columns beyond the vocabulary are padding, outside the softmax."""
    column, targets = torch.arange(logits.shape[1], device=logits.device), targets[:, None]
    z = logits.float()
    z = z if len(column) == vocab_size else torch.where(column < vocab_size, z, REMOVED)
    top = z.amax(1, keepdim=True)
    p = (z - top).exp_()
    total = p.sum(1, keepdim=True)
    loss = (total.log() + top - z.gather(1, targets)).sum() / n
    p = p.div_(total * n).add_(column == targets, alpha=-1 / n)  # (unlike a scatter this fuses)
    return loss, p.to(logits.dtype)


# ----------------------------------------------------------------------------------------------------------
# Gate statistics and control (Section 2.4, Eq. 4-6, Table 1) of levels l < L/2; block L-1-l mirrors block l.

def moments(stats: Tensor, n: int) -> Tensor:
    """Mean and population variance (Eq. 4) of the gates of n tokens: (2, L/2), from the sums of `span`."""
    mean = stats[:, 0] / n
    return torch.stack((mean, stats[:, 1] / n - mean.square()))


def mirrored(x: Tensor, cfg: Config) -> list[float]:
    """Values of the levels to those of all L layers."""
    x = x.tolist()
    return x + x[:cfg.n_layers // 2][::-1]


def gate_report(cfg: Config, stats: Tensor, n: int) -> dict:
    """What the records say of the gates: mean, variance, and share that is exactly 0, each of L layers."""
    mean, var = moments(stats, n)
    return {"gate_mean": mirrored(mean, cfg), "gate_var": mirrored(var, cfg),
            "gate_zero": mirrored(1 - stats[:, 2] / n, cfg)}


def mean_targets(cfg: Config) -> list[float]:
    """mu_l of the first L/2 levels: linearly spaced."""
    return torch.linspace(cfg.mean_target_start, cfg.mean_target_end, cfg.n_levels,
                          dtype=torch.float64).tolist()


class GateControl:
    """Coefficients alpha (of the mean) and beta (of the variance) of every level, and what moves them.

    Row 0 of each (2, L/2) tensor belongs to the mean, row 1 to the variance: every rule treats them alike.
    """

    def __init__(self, cfg: Config, device):
        mu = torch.tensor(mean_targets(cfg), dtype=torch.float64)
        self.rule, self.gamma, self.delta = cfg.control, cfg.coef_update, cfg.tolerance
        self.target = torch.stack((mu, mu * (1 - mu))).to(device)  # a Bernoulli variable's
        init = torch.tensor([[cfg.mean_coef_init], [cfg.var_coef_init]], dtype=torch.float64, device=device)
        self.coef = init.expand_as(self.target).clone()
        self.average = None  # exponential moving average of the deviation, over 10 steps

    def loss(self, observed: Tensor) -> Tensor:
        """Eq. 5: mean over layers of alpha mean + beta variance; observed: `moments` of a micro-batch."""
        if self.rule == "sparsity_variance_l2":
            observed = (observed - self.target).square()
        return (self.coef * observed).sum() / self.coef.shape[1]

    @torch.no_grad()
    def update(self, observed: Tensor):
        """Eq. 6 and Table 1; observed is `moments` of all tokens of a step."""
        deviation = observed - self.target
        self.average = deviation if self.average is None else 0.9 * self.average + 0.1 * deviation
        move = deviation.sign() if self.rule == "adaptive" else deviation
        moves = deviation.abs() > self.delta
        if self.rule == "proportional_derivative":  # while the deviation grows; its 1-step average is itself
            moves &= deviation * (deviation - self.average) > 0
        self.coef += self.gamma * move * moves

    def state_dict(self):
        return {"coef": self.coef, "average": self.average}

    def load_state_dict(self, state):
        self.coef, average = state["coef"].to(self.coef), state["average"]
        self.average = average if average is None else average.to(self.coef)


# ----------------------------------------------------------------------------------------------------------
# FLOPs (of a forward pass; a training step is three).

def realised_flops(cfg: Config, stats, n: int, heads: int | None = None) -> float:
    """Matrix-product FLOPs that a forward pass over n tokens ran, from the sums of `span` (L/2, 4); the head
    ran on `heads` of them (default: all)."""
    stats = torch.as_tensor(stats, dtype=torch.float64).cpu()
    rows = torch.full((cfg.n_levels,), float(n)) if cfg.compute == "masked" else stats[:, 2]
    weights = cfg.dim * (2 * cfg.dim + 2 * cfg.n_kv_heads * cfg.head_dim + 3 * cfg.hidden_dim)  # of a block
    times = torch.tensor([2.0] * (cfg.n_layers // 2) + [1.0] * (cfg.n_layers % 2))  # level l and its mirror
    blocks = (times * (2 * rows * weights + 4 * cfg.dim * stats[:, 3])).sum()
    routers = 2 * cfg.dim * (n + rows[:-1].sum()) if cfg.n_routers else 0.0
    return float(blocks + routers + 2 * (n if heads is None else heads) * cfg.dim * cfg.vocab_size)


# ----------------------------------------------------------------------------------------------------------
# Data. A shard: 256 little-endian int32 (magic, version, number of tokens, 0 ...), then that many uint16.

MAGIC, VERSION, HEADER_BYTES = 20240520, 1, 1024
SHARD_HINT = "make shards with data/tokenize_text.py or fetch them with data/fineweb.py"


def open_shard(path: Path) -> np.ndarray:
    """The tokens of a shard, memory-mapped (uint16). Raises UserError if it is not exactly a shard."""
    try:
        size = path.stat().st_size
        header = np.fromfile(path, "<i4", 256)
    except OSError as e:
        raise UserError(f"shard {path} cannot be read: {e.strerror}; {SHARD_HINT}")
    if len(header) < 256:
        raise UserError(f"shard {path} is too short for a header ({size} bytes); {SHARD_HINT}")
    if header[0] != MAGIC:
        other = " (it is big-endian)" if header.byteswap()[0] == MAGIC else ""
        raise UserError(f"shard {path} begins with {header[0]}, not {MAGIC}{other}; {SHARD_HINT}")
    if header[1] != VERSION:
        raise UserError(f"shard {path} has version {header[1]}, not {VERSION}; {SHARD_HINT}")
    if header[2] < 1 or size != HEADER_BYTES + 2 * int(header[2]):
        raise UserError(f"shard {path} says {header[2]} tokens but holds {(size - HEADER_BYTES) / 2:g}; "
                        "it is damaged or incomplete: make or fetch it again")
    return np.memmap(path, "<u2", "r", HEADER_BYTES)


class Shards:
    """The shards of --train_files or --val_files in sorted order, cut to the first --train_tokens or
    --val_tokens. Relative globs may also start at the script's folder."""

    def __init__(self, cfg: Config, split: str):
        pattern, limit = getattr(cfg, f"{split}_files"), getattr(cfg, f"{split}_tokens")
        paths = sorted(map(Path, glob.glob(pattern) or glob.glob(str(ROOT / pattern))), key=lambda p: p.name)
        if not paths:
            raise UserError(f"--{split}_files {pattern} matches no file; {SHARD_HINT}")
        self.paths, self.tokens, self.vocab_size, self.encoding = [], [], cfg.vocab_size, cfg.encoding
        for path in paths:
            tokens = open_shard(path)
            if limit is not None:
                tokens, limit = tokens[:limit], limit - min(limit, len(tokens))
            if len(tokens):
                self.paths.append(path)
                self.tokens.append(tokens)

    def window(self, shard: int, start: int, n: int) -> Tensor:
        """n tokens of a shard, int64; UserError where one lies beyond the vocabulary."""
        tokens = self.tokens[shard][start:start + n]
        if tokens.max() >= self.vocab_size:
            at = start + int(tokens.argmax())
            raise RankError(f"shard {self.paths[shard]} holds token {tokens.max()} at position {at}, beyond "
                            f"--vocab_size {self.vocab_size}; it was made with another tokeniser")
        return torch.from_numpy(tokens.astype(np.int64))

    def describe(self) -> list[dict]:
        return [{"name": p.name, "bytes": p.stat().st_size, "tokens": int(np.fromfile(p, "<i4", 3)[2])}
                for p in self.paths]

    def dataset(self) -> dict:
        """The dataset.json that lies beside the shards, or {}; UserError where it speaks of other shards or
        another tokeniser."""
        path = self.paths[0].parent / "dataset.json"
        dataset = read_json(path) if path.exists() else {}
        if self.encoding and dataset.get("encoding", self.encoding) != self.encoding:
            raise UserError(f"{path} says that its tokens are {dataset['encoding']}, not {self.encoding}: "
                            "take other shards, or another --encoding")
        said = dataset["shards"] if isinstance(dataset.get("shards"), dict) else {}
        for shard in self.describe():
            entry = said.get(shard["name"], shard)
            count = entry.get("tokens") if isinstance(entry, dict) else entry
            if count != shard["tokens"]:
                raise UserError(f"{path} says {count} tokens of {shard['name']}, "
                                f"which has {shard['tokens']}: one of the two is from another dataset; make "
                                "or fetch both again")
        return dataset


class TrainLoader:
    """A step takes batch_size sequences of T (+1) tokens, as they lie in a shard or (`shuffle`) in the order
    of a permutation; micro-batch a of rank r of R gets the (a R + r)-th device_batch_size of them.

    A tail too short for a step is dropped; after the last shard comes the first. `place`, the (shard,
    position, pass) of the next step, is all that a checkpoint needs. (Nothing is read ahead: a micro-batch of
    Table 2 takes half a millisecond from the page cache, and, but for a step's first, a GPU is still busy.)
    """

    def __init__(self, shards: Shards, cfg: Config, rt: Runtime):
        self.shards, self.cfg, self.rt, self.block = shards, cfg, rt, cfg.step_tokens
        self.accumulation = cfg.batch_size // (cfg.device_batch_size * rt.world)
        self.steps_per_pass = sum((len(t) - 1) // self.block for t in shards.tokens)
        if not self.steps_per_pass:
            raise UserError(f"--train_files {cfg.train_files}: no shard holds a step's {self.block + 1} "
                            "tokens; use a smaller --batch_size or longer shards")
        self.order, self.place = functools.lru_cache(1)(self.permutation), self.fit(0, 0)

    def permutation(self, shard: int, turn: int) -> np.ndarray:
        """Where a shard's sequences start, in the order of a pass."""
        T, shuffle = self.cfg.max_seq_len, np.random.default_rng((self.cfg.seed, turn, shard)).permutation
        starts = np.arange((len(self.shards.tokens[shard]) - 1) // T) * T
        return shuffle(starts) if self.cfg.shuffle else starts

    def fit(self, shard: int, position: int, turn: int = 0) -> tuple[int, int, int]:
        """The first place from here on that holds a whole step."""
        while position + self.block + 1 > len(self.shards.tokens[shard]):
            shard, position = shard + 1, 0
            if shard == len(self.shards.tokens):
                shard, turn = 0, turn + 1
        return shard, position, turn

    def read(self, a: int) -> tuple[Tensor, Tensor]:
        """(inputs, targets) of this rank's micro-batch a of the next step, each (device_batch_size, T)."""
        B, T, (shard, position, turn) = self.cfg.device_batch_size, self.cfg.max_seq_len, self.place
        first = position // T + (a * self.rt.world + self.rt.rank) * B
        starts = self.order(shard, turn)[first:first + B]
        batch = torch.stack([self.shards.window(shard, start, T + 1) for start in starts])  # (B, T + 1)
        batch = batch.pin_memory() if self.rt.device.type == "cuda" else batch
        batch = batch.to(self.rt.device, non_blocking=True)
        return batch[:, :-1], batch[:, 1:]

    def micro_batches(self):
        """All that this rank has to `read` for the next step."""
        yield from map(self.read, range(self.accumulation))
        shard, position, turn = self.place
        self.place = self.fit(shard, position + self.block, turn)


# ----------------------------------------------------------------------------------------------------------
# Optimizer and schedule.

def make_optimizers(model: nn.Module, cfg: Config) -> dict[str, torch.optim.Optimizer]:
    """By their name in a checkpoint: AdamW, with one rate for the groups default, norms and routers; and with
    --optimizer muon, Muon for the blocks' matrices, its updates scaled to the size of AdamW's, so that the
    same lr suits. The groups partition the parameters."""
    groups = {"default": [], "norms": [], "routers": [], "matrices": []}
    for name, p in model.named_parameters():
        matrix = cfg.optimizer == "muon" and name.startswith("layers.") and p.ndim == 2
        groups["matrices" if matrix else "norms" if "norm" in name else
               "routers" if name.startswith("masks.") else "default"].append(p)
    matrices, common = groups.pop("matrices"), dict(lr=cfg.lr, weight_decay=cfg.weight_decay)
    adamw = torch.optim.AdamW([{"params": p, "name": name} for name, p in groups.items() if p],
                              betas=(cfg.beta1, cfg.beta2), eps=cfg.eps, fused=True, **common)
    if not matrices:
        return {"optimizer": adamw}
    muon = Muon([{"params": matrices, "name": "matrices"}], **common)
    return {"optimizer": adamw, "muon": muon}


class Muon(torch.optim.Muon):
    """torch's, but with all matrices of a shape in one product, and in float32 on a CPU, where bfloat16 can
    be ten times slower."""

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for shape in dict.fromkeys(p.shape for p in group["params"]):
                params = [p for p in group["params"] if p.shape == shape]
                grads = [p.grad for p in params]
                for p in params:
                    if not self.state[p]:
                        self.state[p]["momentum_buffer"] = torch.zeros_like(p.grad)
                momenta = [self.state[p]["momentum_buffer"] for p in params]
                torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
                G = torch.stack(torch._foreach_lerp(grads, momenta, group["momentum"]))  # Nesterov's
                update = orthogonal(G.bfloat16() if G.is_cuda else G).to(G.dtype)
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(params, update.unbind(), alpha=-group["lr"] * 0.2 * max(shape) ** 0.5)


def orthogonal(G: Tensor) -> Tensor:
    """G (n, rows, columns) with its singular values brought near 1, the smallest least, by Muon's five
    quintic Newton-Schulz iterations (Jordan et al., 2024)."""
    X = G.mT if G.shape[1] > G.shape[2] else G
    X = X / X.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        A = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=-4.775, alpha=2.0315), X, beta=3.4445)
    return X.mT if G.shape[1] > G.shape[2] else X


def learning_rate(step: int, cfg: Config) -> float:
    """Linear warm-up from start_factor lr over the first W steps, then a cosine to 0 (Section 3.1); or, with
    a cooldown, lr until the last C steps, over which it falls linearly to 0."""
    W, C = (int(f * cfg.num_steps) for f in (cfg.warmup_fraction, cfg.cooldown_fraction))
    if step < W:
        return cfg.lr * (cfg.start_factor + (1 - cfg.start_factor) * step / W)
    if cfg.cooldown_fraction:
        return cfg.lr * min(1.0, (cfg.num_steps - step) / max(1, C))
    return cfg.lr * (1 + math.cos(math.pi * (step - W) / (cfg.num_steps - W))) / 2


# ----------------------------------------------------------------------------------------------------------
# Validation: every full sequence of T (+1) tokens at stride T of every shard.

def sequences(shards: Shards, cfg: Config) -> list[tuple[int, int]]:
    """(shard, start) of every validation sequence."""
    T = cfg.max_seq_len
    places = [(s, i * T) for s, t in enumerate(shards.tokens) for i in range((len(t) - 1) // T)]
    if not places:
        raise UserError(f"--val_files {cfg.val_files}: no shard holds a sequence of {T + 1} tokens; "
                        "use a smaller --max_seq_len, more --val_tokens or longer shards")
    return places


@torch.no_grad()
def evaluate(model: MiddleSkippingTransformer, cfg: Config, rt: Runtime, shards: Shards, watch=None) -> dict:
    """Token-weighted validation: cross-entropy (nats a token), gates and realised FLOPs, over all ranks.
    watch(inputs, depth), each (B, T), is called on every batch of this rank."""
    start, T, B = time.perf_counter(), cfg.max_seq_len, cfg.device_batch_size
    places = sequences(shards, cfg)
    totals = torch.zeros(cfg.n_levels * 4 + 1, dtype=torch.float64, device=rt.device)
    for first in range(rt.rank * B, len(places), rt.world * B):
        windows = torch.stack([shards.window(s, i, T + 1) for s, i in places[first:first + B]]).to(rt.device)
        with rt.autocast():
            depth = torch.zeros_like(windows[:, :-1]) if watch else None
            ce, stats = model(windows[:, :-1], windows[:, 1:], depth)
        totals += torch.cat(((ce.double() * len(windows) * T)[None], stats.flatten()))
        if watch:
            watch(windows[:, :-1], depth)
    rt.sum(totals)
    tokens, stats = len(places) * T, totals[1:].view(-1, 4).cpu()
    return {"cross_entropy": totals[0].item() / tokens, **gate_report(cfg, stats, tokens), "tokens": tokens,
            "val_s": time.perf_counter() - start,
            "flops_per_token": realised_flops(cfg, stats, tokens) / tokens}


# ----------------------------------------------------------------------------------------------------------
# Records: one folder a run, which a person, a plot or another program can read.

@functools.cache
def show():
    """records/show.py, which draws and prints a run, and measures it when it is done, but changes nothing in
    it; None where this script was copied away alone."""
    if not (ROOT / "records" / "show.py").exists():
        return None
    sys.modules.setdefault("train_gpt_skip", sys.modules[__name__])  # which it imports
    sys.path.insert(0, str(ROOT / "records"))
    return importlib.import_module("show")


class Record:
    """The folder of a run. Only rank 0 writes, and only one process at a time: the metrics are locked."""

    def __init__(self, cfg: Config, rt: Runtime, first_step: int):
        self.cfg, self.rt, self.folder = cfg, rt, None
        self.bar = tqdm(total=cfg.num_steps, initial=first_step, dynamic_ncols=True,
                        disable=None if rt.main else True,  # (None: where nobody watches)
                        bar_format="step {n_fmt}/{total_fmt} |{bar}| {remaining} left{postfix}")
        if not rt.main:
            return
        name = cfg.name or cfg.preset or cfg.control
        self.folder = Path(cfg.resume) if cfg.resume else make_folder(Path(cfg.records_dir), name)
        self.metrics = open(self.folder / "metrics.jsonl", "ab", buffering=0)
        self.text = open(self.folder / "log.txt", "ab", buffering=0)
        try:
            fcntl.flock(self.metrics, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RankError(f"--resume {cfg.resume}: another process writes this record; wait until it ends")
        except OSError:
            pass  # a file system without locks

    def append(self, file, line: str):
        """A whole line or none, through no buffer."""
        size, data = os.fstat(file.fileno()).st_size, (line + "\n").encode()
        try:
            while data:
                data = data[file.write(data):]
        except OSError as e:
            file.truncate(size)
            raise unwritable(Path(file.name), e)

    def say(self, line: str, of_a_step: bool = False):
        """A line of log.txt and of the terminal; with a progress bar, a step's line goes to the file only."""
        if not self.rt.main:
            return
        self.append(self.text, line)
        if self.bar.disable:
            print(line, flush=True)
        elif not of_a_step:
            self.bar.write(line)

    def event(self, kind: str, **values):
        if self.rt.main:
            self.append(self.metrics, json.dumps({"kind": kind, **values}))

    def step(self, event: dict):
        """What a training step leaves: its event, its line, and its state on the progress bar."""
        cfg, step, sparsity = self.cfg, event["step"], mean(event["gate_zero"])
        if step % cfg.metrics_every == 0:
            self.event("train", **event)
        if step % cfg.log_every == 0:
            zeros = " ".join(f"{z:.2f}" for z in event["gate_zero"][:cfg.n_levels])
            self.say(f"step {step:>{len(str(cfg.num_steps))}}/{cfg.num_steps}  loss {event['loss']:.4f}  "
                     f"cross-entropy {event['cross_entropy']:.4f}  lr {event['lr']:.2e}  "
                     f"grad {event['grad_norm']:.3f}  {event['tokens_per_s']:.0f} tokens/s"
                     + f"  zero gates {zeros}" * cfg.gated, of_a_step=True)
        self.bar.set_postfix_str(f"loss {event['cross_entropy']:.3f}, sparsity {sparsity:.2f}, "
                                 f"{event['tokens_per_s']:.0f} tokens/s", refresh=False)
        self.bar.update()

    def close(self):
        self.bar.close()
        if self.rt.main:
            self.metrics.close(), self.text.close()

    def events(self) -> list[dict]:
        with open(self.folder / "metrics.jsonl") as f:
            return [json.loads(line) for line in f]

    def write(self, name: str, content):
        """A whole file or none: JSON of a dict, else text."""
        if self.rt.main:
            text = content if isinstance(content, str) else json.dumps(content, indent=1) + "\n"
            write_atomically(self.folder / name, lambda f: f.write(text.encode()))


def rounded(event: dict) -> dict:
    """Six significant digits of every number: what a record keeps."""
    return json.loads(json.dumps(event), parse_float=lambda digits: float(f"{float(digits):.6g}"))


def make_folder(parent: Path, name: str) -> Path:
    """parent/YYYY-MM-DD_HH-MM-SS_NAME (UTC), new: where it exists, with a suffix."""
    stamp = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d_%H-%M-%S_") + name
    try:
        parent.mkdir(parents=True, exist_ok=True)
        for suffix in itertools.count(1):
            with contextlib.suppress(FileExistsError):
                folder = parent / (stamp if suffix == 1 else f"{stamp}_{suffix}")
                folder.mkdir()
                return folder
    except OSError as e:
        reason = "it is not a folder" if isinstance(e, FileExistsError) else e.strerror
        raise UserError(f"--records_dir {parent} cannot be written: {reason}")


def write_atomically(path: Path, write):
    """The file appears whole or not at all: temporary file, fsync, rename. Raises UserError."""
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(partial, path)
    except (OSError, RuntimeError) as e:  # torch.save turns a write's OSError into a RuntimeError
        partial.unlink(missing_ok=True)
        raise unwritable(path, e)


def unwritable(path: Path, e: Exception) -> UserError:
    return UserError(f"{path} cannot be written: {getattr(e, 'strerror', None) or f'is the disk full? {e}'}; "
                     f"what was saved before is whole: mend this, then go on with --resume {path.parent}")


def read_json(path: Path) -> dict:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as e:
        raise UserError(f"{path} cannot be read as JSON: {e}")
    if not isinstance(value, dict):
        raise UserError(f"{path} is not a JSON object")
    return value


def run_quietly(*command) -> str | None:
    """What a program prints, or None where there is no such program or it fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True,
                              cwd=ROOT).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def environment(rt: Runtime, shards: dict[str, Shards]) -> dict:
    packages = {}
    for name in ("torch", "numpy", "tiktoken", "huggingface-hub", "safetensors", "triton"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            packages[name] = importlib.metadata.version(name)
    cuda = rt.device.type == "cuda"
    return {
        "command": shlex.join(["python", *sys.argv]),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "git_commit": run_quietly("git", "rev-parse", "HEAD"),
        "git_dirty": bool(run_quietly("git", "status", "--porcelain", "--untracked-files=no")),
        "source_sha256": hashlib.sha256(Path(__file__).read_bytes()).hexdigest(),
        "python": platform.python_version(), "packages": packages, "cuda": torch.version.cuda,
        "device": torch.cuda.get_device_name() if cuda else processor_name(), "world_size": rt.world,
        "threads": torch.get_num_threads(), "cores": os.cpu_count(), "dtype": str(rt.dtype).split(".")[1],
        "compile": rt.compile, "platform": platform.platform(),
        "nvidia_smi": run_quietly("nvidia-smi"), "torchrun": os.environ.get("TORCHELASTIC_RUN_ID"),
        "shards": {name: s.describe() for name, s in shards.items()},
    }


def processor_name() -> str:
    with contextlib.suppress(OSError, TypeError):  # no such file, or no such line in it
        return re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[1].strip()
    return platform.processor() or platform.machine()


def relative(value):
    """A path as the records show it: relative to the project where it lies inside it."""
    inside = isinstance(value, str) and Path(value).is_relative_to(ROOT)
    return str(Path(value).relative_to(ROOT)) if inside else value


# ----------------------------------------------------------------------------------------------------------
# Checkpoints: ours to go on from, and weights from ours, the authors' or a hub's folder.

def checkpoints(folder: Path, prefix: str = "checkpoint_") -> list[Path]:
    """Oldest first."""
    steps = {path: re.fullmatch(prefix + r"(\d+)\.pt", path.name) for path in folder.glob(f"{prefix}*.pt")}
    return sorted(filter(steps.get, steps), key=lambda path: int(steps[path][1]))


def read_checkpoint(path: Path) -> dict:
    """What a .pt or .safetensors file holds, tensors and plain values: a pickle that runs code is refused."""
    try:
        if path.suffix == ".safetensors":
            return load_safetensors(path)
        with zipfile.ZipFile(path) as z:
            if damaged := z.testzip():
                raise ValueError(f"{damaged} fails its checksum")
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as e:  # torch.load raises many kinds
        reason = str(e).strip().split("\n")[0][:160]
        raise UserError(f"checkpoint {path} is damaged or not a checkpoint ({reason}); use an earlier one")


def read_weights(source: str, revision: str | None = None) -> tuple[dict, dict]:
    """(settings, tensors by name) of a checkpoint: a record, a .pt file, a folder in the authors' layout
    (state_step*.pt, settings under "model"), or a hub folder or repo id (model.safetensors)."""
    path = Path(source)
    if not path.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        path = fetch_repo(source, revision)
    if not path.exists():
        raise UserError(f"checkpoint {source} does not exist")
    folder = path if path.is_dir() else path.parent
    if not (folder / "config.json").exists():
        raise UserError(f"checkpoint {source} has no config.json beside it, which says the model's sizes")
    if path.is_dir():
        found = [*path.glob("model.safetensors"), *checkpoints(path), *checkpoints(path, "state_step")]
        if not found:
            raise UserError(f"checkpoint {source} has no checkpoint_*.pt, state_step*.pt or "
                            "model.safetensors")
        path = found[-1]
    settings, state = (x.get("model", x) if isinstance(x, dict) else x
                       for x in (read_json(folder / "config.json"), read_checkpoint(path)))
    named = isinstance(settings, dict) and isinstance(state, dict) and all(isinstance(k, str) for k in state)
    if not named:
        raise UserError(f"checkpoint {path} or its config.json is not a dictionary by names; is it "
                        "one of a model?")
    return settings, {k.removeprefix("model."): v for k, v in state.items()}


def fetch_repo(repo: str, revision: str | None) -> Path:
    try:
        return Path(snapshot_download(repo, revision=revision,
                                      allow_patterns=["config.json", "model.safetensors"]))
    except Exception as e:  # offline, no such repo, no right to it
        raise UserError(f"checkpoint {repo}: no such folder, and it cannot be fetched from the hub "
                        f"({str(e).strip().splitlines()[0][:160]})")


def checkpoint_settings(settings: dict, explicit: dict, source: str, also=()) -> dict:
    """The Config fields that a checkpoint fixes (and `also` others). UserError where a flag disagrees."""
    fixed = {k: settings[k] for k in (*MODEL_FIELDS, "encoding", *also) if settings.get(k) is not None}
    if missing := [k for k in ("dim", "n_layers", "n_heads", "vocab_size") if k not in fixed]:
        raise UserError(f"checkpoint {source}: its config.json does not say {', '.join(missing)}")
    for k in SIZES:
        if k in fixed and explicit.get(k, fixed[k]) != fixed[k]:
            raise UserError(f"--{k} {explicit[k]} disagrees with checkpoint {source}, which has {fixed[k]}: "
                            "leave the flag out")
    return fixed


def is_dense(state: dict) -> bool:
    """Has it no routers, or only such as are all zero, as the authors store dense models?"""
    routers = [v for k, v in state.items() if k.startswith("masks.")]
    return not any(v.any() if isinstance(v, Tensor) else True for v in routers)


def load_weights(model: MiddleSkippingTransformer, state: dict, source: str, retrofit=False):
    """Load tensors of any float type; UserError where names or shapes are not the model's. To retrofit is to
    leave the model's routers as they are if the checkpoint is dense."""
    own = model.state_dict()
    if is_dense(state) and (retrofit or not model.masks):
        routers = {k: v for k, v in own.items() if k.startswith("masks.")}
        state = {k: v for k, v in state.items() if not k.startswith("masks.")} | routers
    if wrong := sorted(own.keys() ^ state.keys()):
        lacks, hint = wrong[0] in own, ""
        if lacks and wrong[0].startswith("masks."):
            hint = "; try --control dense"
        elif "post" in wrong[0]:
            hint = "; is --norm the one it was trained with?"
        raise UserError(f"checkpoint {source} does not fit: it {'lacks' if lacks else 'also has'} {wrong[0]} "
                        f"({len(wrong)} such names){hint}")
    for k, v in state.items():
        if not isinstance(v, Tensor) or v.shape != own[k].shape or not v.is_floating_point():
            found = f"{v.dtype} {list(v.shape)}" if isinstance(v, Tensor) else type(v).__name__
            raise UserError(f"checkpoint {source} does not fit: {k} is {found}, the model's is "
                            f"{own[k].dtype} {list(own[k].shape)}")
    model.load_state_dict(state)


def export_weights(model: MiddleSkippingTransformer, path: Path):
    tensors = {k: v.detach().contiguous().cpu() for k, v in model.state_dict().items()}
    write_atomically(path, lambda f: f.write(safetensors_bytes(tensors)))


# ----------------------------------------------------------------------------------------------------------
# Training.

def build_model(cfg: Config, rt: Runtime, state: dict | None = None, source: str = "",
                retrofit=False) -> MiddleSkippingTransformer:
    model = MiddleSkippingTransformer(cfg)
    initialise(model, cfg)
    if state is not None:
        load_weights(model, state, source, retrofit)
    model.to(rt.device)
    model.lower = compiled if rt.compile else eager
    return model


class Trainer:
    """A run: model, optimizer, control, loader and clock, and what a step does to them."""

    def __init__(self, cfg: Config, weights: dict | None):
        self.cfg, self.rt = cfg, (rt := Runtime(cfg))
        if cfg.batch_size % (cfg.device_batch_size * rt.world):
            raise UserError(f"--batch_size {cfg.batch_size} is not a multiple of --device_batch_size "
                            f"{cfg.device_batch_size} times {rt.world} processes (NPROC): change one of them")
        self.shards = {split: Shards(cfg, split) for split in ("train", "val")}
        sequences(self.shards["val"], cfg)
        self.loader = TrainLoader(self.shards["train"], cfg, rt)
        cfg.num_steps = self.loader.steps_per_pass if cfg.num_steps is None else cfg.num_steps
        _, dataset = self.shards["val"].dataset(), self.shards["train"].dataset()  # (which check themselves)
        cfg.encoding = cfg.encoding or dataset.get("encoding", cfg.tokeniser)
        check_field(Config.__dataclass_fields__["encoding"], cfg.encoding)
        self.model = build_model(cfg, rt, weights, cfg.init_from or "", retrofit=True)
        self.origin = f"from {cfg.init_from}" if weights else "new"
        if weights and cfg.n_routers and is_dense(weights):
            self.origin += f", which is dense: {cfg.n_routers} routers are new"
        self.parameters = sum(p.numel() for p in self.model.parameters())
        self.optimizers, self.control = make_optimizers(self.model, cfg), GateControl(cfg, rt.device)
        self.parallel, self.train_s, self.train_flops, self.first_step = self.model, 0.0, 0.0, 0
        self.stop, self.stopping = 0, False  # signals that this rank got; what all ranks agreed on
        self.compile_s = self.warm_up() if rt.compile else 0.0
        self.graphs = graphs_compiled()
        if rt.world > 1:
            self.parallel = nn.parallel.DistributedDataParallel(
                self.model, gradient_as_bucket_view=True, broadcast_buffers=False)  # (which never change)

    def warm_up(self) -> float:
        """Compile before the clock starts: a training micro-batch and a validation one, as they come and with
        gates that close. Seconds."""
        start, batch = time.perf_counter(), self.loader.read(0)
        biases = [(r.linear.bias, r.linear.bias.detach().clone()) for r in self.model.masks]
        for shift in (1.0, 0.0):
            with self.rt.autocast(), torch.no_grad():
                for bias, was in biases:
                    bias.copy_(was + shift)
                self.model(*batch)
            self.micro_step(*batch)
        self.model.zero_grad(set_to_none=True)
        self.rt.synchronize()
        return time.perf_counter() - start

    def micro_step(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Forward and backward of one micro-batch: (loss, cross-entropy, gate statistics)."""
        with self.rt.autocast():
            ce, stats = self.parallel(x, y)
        loss = ce + self.control.loss(moments(stats, x.numel()))
        (loss / self.loader.accumulation).backward()
        return loss.detach(), ce.detach(), stats.detach()

    def train_step(self, step: int) -> dict:
        """One optimizer step and one of the controller's; returns the record's event."""
        start, cfg, rt, A = time.perf_counter(), self.cfg, self.rt, self.loader.accumulation
        place, lr = self.loader.place, learning_rate(step, cfg)
        totals = torch.zeros(3 + 2 * rt.world + 4 * cfg.n_levels, dtype=torch.float64, device=rt.device)
        sums, ranks, gates = totals.split((3, 2 * rt.world, 4 * cfg.n_levels))
        bad, active = ranks.view(2, rt.world)  # each rank writes its own
        for a, batch in enumerate(self.loader.micro_batches()):
            alone = rt.world > 1 and a + 1 < A  # gradients are averaged over ranks once a step
            with self.parallel.no_sync() if alone else contextlib.nullcontext():
                loss, ce, stats = self.micro_step(*batch)
            sums[0] += loss
            sums[1] += ce
            bad[rt.rank] += ~loss.isfinite()
            active[rt.rank] += stats[:, 2].sum()
            gates += stats.flatten()
        sums[2] = float(self.stop > 0)
        rt.sum(totals)
        norm = nn.utils.get_total_norm([p.grad for p in self.model.parameters()])
        host, grad_norm = sums.tolist(), norm.item()  # the host waits here
        self.check_finite(step, place, bad.tolist(), grad_norm)
        if cfg.max_grad_norm:
            nn.utils.clip_grads_with_norm_(self.model.parameters(), cfg.max_grad_norm, norm)
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        stats = gates.view(-1, 4)
        self.control.update(moments(stats, cfg.step_tokens))
        rt.synchronize()
        self.stopping = host[2] > 0
        self.train_s += (seconds := time.perf_counter() - start)
        self.train_flops += 3 * realised_flops(cfg, stats, cfg.step_tokens)
        event = {
            "step": step, "tokens": (step + 1) * cfg.step_tokens, "train_s": self.train_s,
            "loss": host[0] / A / rt.world, "cross_entropy": host[1] / A / rt.world, "lr": lr,
            "grad_norm": grad_norm, "tokens_per_s": cfg.step_tokens / seconds,
            **gate_report(cfg, stats.cpu(), cfg.step_tokens),
            "mean_coef": mirrored(self.control.coef[0], cfg),
            "var_coef": mirrored(self.control.coef[1], cfg)}
        if rt.world > 1:  # active tokens of the busiest rank, in units of the mean over ranks
            event["rank_imbalance"] = (active.max() / active.mean()).item() if active.any() else 1.0
        return rounded(event)

    def check_finite(self, step, place, bad_ranks, grad_norm):
        if any(bad_ranks) or not math.isfinite(grad_norm):
            what = next((f"loss on rank {r}" for r, bad in enumerate(bad_ranks) if bad), "gradient")
            shard = self.shards["train"].paths[place[0]].name
            raise Divergence(f"the {what} is not finite at step {step} (shard {shard}, token {place[1]}); "
                             "the weights are as before this step")

    def validate(self, step: int) -> dict:
        event = evaluate(self.model, self.cfg, self.rt, self.shards["val"])
        if not math.isfinite(event["cross_entropy"]):
            raise Divergence(f"the validation loss is not finite at step {step}")
        return rounded({"step": step, **event})

    def save(self, step: int, record: Record):
        if not self.rt.main:
            return
        os.fsync(record.metrics.fileno())
        state = {"step": step, "model": self.model.state_dict(),
                 **{name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
                 "control": self.control.state_dict(), "place": self.loader.place, "train_s": self.train_s,
                 "train_flops": self.train_flops,
                 "record_bytes": os.fstat(record.metrics.fileno()).st_size, "rng": torch.get_rng_state()}
        write_atomically(record.folder / f"checkpoint_{step}.pt", lambda f: torch.save(state, f))
        for path in checkpoints(record.folder)[:-2]:
            path.unlink()

    def restore(self, state: dict, source: Path):
        try:
            load_weights(self.model, state["model"], source)
            for name, optimizer in self.optimizers.items():
                optimizer.load_state_dict(state[name])
            self.control.load_state_dict(state["control"])
            self.loader.place = self.loader.fit(*state["place"])
            torch.set_rng_state(state["rng"])
            self.train_s, self.train_flops = float(state["train_s"]), float(state["train_flops"])
            self.first_step = range(self.cfg.num_steps + 1)[state["step"]]
            buffers = {"optimizer": ("exp_avg", "exp_avg_sq"), "muon": ("momentum_buffer",)}
            if self.control.coef.shape != self.control.target.shape or any(
                    optimizer.state[p][k].shape != p.shape for name, optimizer in self.optimizers.items()
                    for group in optimizer.param_groups for p in group["params"] for k in buffers[name]):
                raise ValueError("moments or coefficients of other sizes")
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as e:
            raise UserError(f"checkpoint {source} is not one of this run ({type(e).__name__}: {e}); remove "
                            "it to go on from an earlier one")


def graphs_compiled() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"] if "torch._dynamo" in sys.modules else 0


def train(cfg: Config, weights: dict | None, dry_run=False) -> int:
    """The run of a configuration, or with dry_run only what it would be; returns the exit status."""
    state, source = latest_checkpoint(Path(cfg.resume)) if cfg.resume else (None, None)
    trainer = Trainer(dataclasses.replace(cfg, compile=False) if dry_run else cfg, weights)
    rt, cfg = trainer.rt, trainer.cfg
    if state:
        trainer.restore(state, source)
    if rt.sum(torch.tensor(trainer.first_step, device=rt.device)) != rt.world * trainer.first_step:
        raise RankError(f"--resume {cfg.resume}: here its last checkpoint is of step {trainer.first_step}, "
                        "elsewhere of another: copy the record to every machine")
    if dry_run:
        if not show():
            raise UserError(f"--dry_run needs {ROOT}/records/show.py, which this script was copied without")
        show().print_plan(trainer)
        return 0
    with contextlib.closing(Record(cfg, rt, trainer.first_step)) as record:
        history = open_record(trainer, record, state)
        install_signals(trainer)
        return run(trainer, record, history)


def run(trainer: Trainer, record: Record, history: list[dict]) -> int:
    """From the trainer's first step to the last, or until a signal or --target_loss ends it; history: the
    validations so far. Returns the exit status."""
    cfg, rt = trainer.cfg, trainer.rt
    for step in range(trainer.first_step, cfg.num_steps + 1):
        last = step == cfg.num_steps
        if step != trainer.first_step and (last or step % cfg.save_every == 0):
            trainer.save(step, record)
        if last or step % cfg.val_every == 0:
            event = trainer.validate(step)
            reached = cfg.target_loss is not None and event["cross_entropy"] <= cfg.target_loss
            if reached and step:
                trainer.save(step, record)
            record.event("val", **{k: event[k] for k in event if k != "flops_per_token"})
            history.append(event)
            record.say(f"step {step:>{len(str(cfg.num_steps))}}/{cfg.num_steps}  validation "
                       f"{event['cross_entropy']:.4f} nats  sparsity {mean(event['gate_zero']):.3f}")
            if show() and rt.main:
                show().plot(record.events(), cfg, record.folder / "plot.png")
                if warning := show().failure_signature(cfg, history):
                    record.say(f"WARNING: {warning}")
            if reached:
                record.say(f"target loss {cfg.target_loss} reached at step {step}")
                break
        if not last:
            record.step(trainer.train_step(step))
        if trainer.stopping:
            trainer.save(step + 1, record)
            break
    record.bar.close()
    if not trainer.stopping:
        return finish(trainer, record, step, history)
    record.write("summary.json", {"interrupted": True, "step": step + 1, "train_seconds": trainer.train_s})
    record.say(f"interrupted after step {step + 1}; go on with: "
               f"./run.sh --resume {shlex.quote(str(record.folder))}")
    return 0


def latest_checkpoint(folder: Path) -> tuple[dict | None, Path | None]:
    """The newest checkpoint of a record that is whole, and its path; (None, None) where there is none yet."""
    for path in reversed(found := checkpoints(folder)):
        try:
            state, size = read_checkpoint(path), (folder / "metrics.jsonl").stat().st_size
            if size >= state["record_bytes"]:
                return state, path
            wrong = f"metrics.jsonl has {size} bytes, fewer than when {path} was written"
        except UserError as e:
            wrong = e
        except (OSError, LookupError, TypeError) as e:
            wrong = f"{path} does not fit the record ({e})"
        report("WARNING", f"{wrong}; trying the checkpoint before")
    if found:
        raise UserError(f"--resume {folder}: none of its checkpoints can be used; remove them to start at "
                        "step 0")
    if (done := folder / "summary.json").exists() and not read_json(done).get("interrupted"):
        raise UserError(f"--resume {folder}: it is finished and has no checkpoint; run its settings again "
                        f"with --config {folder}/config.json")
    return None, None


def open_record(trainer: Trainer, record: Record, state: dict | None) -> list[dict]:
    """Write what is known at the start (or, on resume, cut the metrics back to the checkpoint). Returns the
    validations so far."""
    if not trainer.rt.main:
        return []
    cfg, env, script = trainer.cfg, environment(trainer.rt, trainer.shards), Path(__file__).read_text()
    if cfg.resume:
        record.metrics.truncate(state["record_bytes"] if state else 0)
        for path in [*record.folder.glob("*.partial"), *checkpoints(record.folder)]:
            if path.suffix == ".partial" or int(path.stem.split("_")[1]) > trainer.first_step:
                path.unlink()  # what a kill left, and what could not be read
        record.say(f"resumed at step {trainer.first_step} on {env['device']}, commit {env['git_commit']}")
        copy = record.folder / Path(__file__).name
        if not copy.exists() or copy.read_text() != script:
            record.say("WARNING: this is not the script that began this record, of which it has a copy")
        return [e for e in record.events() if e["kind"] == "val"]
    record.write("env.json", env)
    record.write(Path(__file__).name, script)
    record.write("config.json", {k: relative(v) for k, v in dataclasses.asdict(cfg).items()})
    record.say("\n".join(show().opening_lines(trainer, env, record.folder)) if show() else
               f"{record.folder}; weights: {trainer.origin}")
    return []


def install_signals(trainer: Trainer):
    """The first SIGTERM or SIGINT ends the run after this step; a second one ends it at once."""
    def handle(number, frame):
        trainer.stop += 1
        if trainer.stop > 1:
            os._exit(128 + number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handle)


def finish(trainer: Trainer, record: Record, step: int, history: list[dict]) -> int:
    """Weights, summary, and the closing lines."""
    cfg, rt, last, recompiles = trainer.cfg, trainer.rt, history[-1], graphs_compiled() - trainer.graphs
    if rt.main:
        export_weights(trainer.model, record.folder / "model.safetensors")
    further = show().further(trainer, last) if show() else {}  # on all ranks
    if not rt.main:
        return 0
    imbalance = [e["rank_imbalance"] for e in record.events() if "rank_imbalance" in e]
    summary = {
        "interrupted": False, "step": step,
        "target_reached": cfg.target_loss is not None and last["cross_entropy"] <= cfg.target_loss,
        "cross_entropy": last["cross_entropy"], "gate_mean": last["gate_mean"],
        "gate_zero": last["gate_zero"], "sparsity": mean(last["gate_zero"]),
        "parameters": trainer.parameters, "realised_flops_per_token": last["flops_per_token"],
        "train_flops": trainer.train_flops,  # realised, exact
        "train_seconds": trainer.train_s, "compile_seconds": trainer.compile_s,
        "tokens_per_s": step * cfg.step_tokens / trainer.train_s if trainer.train_s else 0.0,
        "rank_imbalance": mean(imbalance or [1.0]), "ranks": rt.world, "control": cfg.control,
        "n_layers": cfg.n_layers, "recompiles_after_warm_up": recompiles} | further
    record.write("summary.json", summary)
    record.say(f"\nvalidation loss {last['cross_entropy']:.4f} nats a token (at the start "
               f"{history[0]['cross_entropy']:.4f}), {step} steps in {trainer.train_s:.0f} s, "
               f"{summary['tokens_per_s']:.0f} tokens/s")
    record.say("\n".join(show().closing_lines(summary, cfg, record.folder)) if show() else
               f"record: {record.folder} (no plot, no step time: this script was copied without "
               "records/show.py)")
    return 0


# ----------------------------------------------------------------------------------------------------------
# Command line.

def parse_settings(parser: argparse.ArgumentParser, argv) -> tuple[argparse.Namespace, dict]:
    """All arguments, with a flag for every field of Config beside the parser's own; and the fields given."""
    for f in dataclasses.fields(Config):
        kind = f.type.split(" | ")[0]
        how = dict(action=argparse.BooleanOptionalAction) if kind == "bool" else dict(
            type={"int": int, "float": float, "str": str}[kind], choices=f.metadata["choices"])
        parser.add_argument(f"--{f.name}", default=argparse.SUPPRESS,
                            help=f.metadata["help"] + f" (default: {f.default})" * (f.default is not None),
                            **how)
    args = parser.parse_args(argv)
    return args, {f.name: getattr(args, f.name) for f in dataclasses.fields(Config) if f.name in args}


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message} (--help lists all flags)")


def resolve(explicit: dict, also=()) -> tuple[Config, dict | None]:
    """Defaults, then a preset, a record's config or a checkpoint's sizes (and `also` other fields of it),
    then flags; and the checkpoint's weights, if there is one."""
    settings, weights = dict(PRESETS.get(explicit.get("preset"), {})), None
    if explicit.get("config"):
        if explicit.get("preset"):
            raise UserError("--preset and --config both choose the settings: leave one out")
        settings |= recorded_settings(Path(explicit["config"]))
    explicit = restarted_record(settings | explicit) | explicit
    if resume := explicit.get("resume"):
        path = Path(resume) / "config.json"
        if not path.exists():
            raise UserError(f"--resume {resume} is not a record: it has no config.json")
        settings = recorded_settings(path)
        fixed = {k: v for k, v in explicit.items() if k not in RESUME_MAY_CHANGE}
        if wrong := [k for k, v in fixed.items() if settings.get(k) != relative(v)]:
            raise UserError(f"--{wrong[0]} {explicit[wrong[0]]} disagrees with the record {resume}, which "
                            f"has {settings.get(wrong[0])}: leave the flag out")
    elif "control" in explicit or "control" in also:  # another rule's coefficients are its own
        settings = {k: v for k, v in settings.items() if k not in OF_CONTROL}
    source = explicit.get("init_from", settings.get("init_from"))
    if source and not (resume and checkpoints(Path(resume))):
        stored, weights = read_weights(source)
        fixed = checkpoint_settings(stored, explicit, source, also)
        given = "init_from" in explicit and not resume  # (else a record names it, whose settings are its own)
        settings = settings | fixed if given else fixed | settings
    return Config(**(settings | explicit)), weights


RESUME_MAY_CHANGE = {"resume", "init_from", "device", "compile", "log_every", "save_every", "records_dir",
                     "name", "device_batch_size"}


def restarted_record(settings: dict) -> dict:
    """--resume of the record that this torchrun began before it restarted its processes, or {}; of several
    machines they share a name, "none", with all others."""
    run = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0" or run == "none":
        return {}
    begun = sorted(Path(settings.get("records_dir", Config.records_dir)).glob("*/env.json"))
    mine = [p for p in begun if read_json(p).get("torchrun") == run]
    return {"resume": str(mine[-1].parent)} if mine else {}


def recorded_settings(path: Path) -> dict:
    settings = read_json(path)
    if unknown := sorted(settings.keys() - {f.name for f in dataclasses.fields(Config)}):
        raise UserError(f"{path} has an unknown key: {unknown[0]}; is it a record's config.json?")
    return settings


# what gloo and the store say of a lost peer; nccl raises DistBackendError
LOST_PEER = re.compile("closed|closure|reset|refused|[Bb]roken pipe|[Tt]imed out|remote process")


def report(kind: str, what, own: bool = False):
    """One line on standard error: of what only this rank may see, or, once a machine, of what all see."""
    if own or os.environ.get("LOCAL_RANK", "0") == "0":
        rank = f"rank {os.environ['RANK']}: " if own and "RANK" in os.environ else ""
        print(f"{Path(sys.argv[0]).name}: {kind}: {rank}{' '.join(str(what).split())}", file=sys.stderr)


def exit_status(run: Callable[[], int]) -> int:
    """What run() returns; or, where it fails by what a user can mend, one line and a status."""
    try:
        status = run()
        if dist.is_initialized():
            dist.destroy_process_group()  # (not after a failure: nccl might wait for the others)
        return status
    except (UserError, OSError) as e:
        report("error", e, isinstance(e, (RankError, OSError)))
        return 2
    except Divergence as e:
        report("stopped", f"{e}; try a lower --lr, --max_grad_norm 1 or --norm sandwich")
        return 3
    except KeyboardInterrupt:
        report("stopped", "interrupted")
        return 130
    except (RuntimeError, MemoryError) as e:
        if isinstance(e, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(e):
            report("error", f"out of memory: use a smaller --device_batch_size ({str(e)[:100]})", own=True)
            return 2
        lost = isinstance(e, dist.DistBackendError) or LOST_PEER.search(str(e))
        if os.environ.get("WORLD_SIZE", "1") == "1" or not lost:
            raise
        report("stopped", "another process is gone; go on from the last checkpoint with --resume")
        return 1


def main(argv: list[str] | None = None) -> int:
    def start():
        parser = Parser("train_gpt_skip.py", usage="%(prog)s [--FLAG VALUE]...", allow_abbrev=False,
                        description="Train a model and write a record.",
                        epilog="A finished run is looked at with ./run.sh eval, sample and export (--help).")
        parser.add_argument("--dry_run", action="store_true", help="check all, print the plan, write nothing")
        args, explicit = parse_settings(parser, argv)
        return train(*resolve(explicit), args.dry_run)

    return exit_status(start)


def leave(status: int):
    """Of several processes one ends at once: DDP leaves gloo's threads behind, which abort the process if
    they drop a tensor while Python shuts down, and a rank that failed must not wait for the others."""
    if "RANK" in os.environ:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


if __name__ == "__main__":
    try:
        leave(main())
    except Exception:
        traceback.print_exc()
        leave(1)
