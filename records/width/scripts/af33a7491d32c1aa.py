"""Train language models that learn to skip their own middle layers, in one file.

The system of "Learning to Skip the Middle Layers of Transformers" (Lawson and Aitchison, arXiv 2506.21103),
in which a skipped token costs nothing: a block computes only the tokens whose gate is open. On two CPU cores
a training step at half sparsity takes 0.52 of the dense step's time (2026-11-23_06-54-06 in
records/bench.jsonl: float32, torch 2.13, 12 blocks, d 384). Here is what can change a run and what records
it, in the paper's order; what looks at a run, while it trains or later, is a tool in records/. Three
commands:

    ./run.sh                                                # train: the demo, or Table 2 on GPUs with shards
    ./run.sh eval --checkpoint records/X                    # loss, sparsity, FLOPs, which tokens skip
    ./run.sh sample --checkpoint records/X --prompt 'def ' --show_depth
"""
from __future__ import annotations

import argparse, copy, fcntl, glob, hashlib, itertools, json, math, os, platform, re, resource
import shlex, shutil, signal, subprocess, sys, time, traceback, warnings, zipfile
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime, timezone
from functools import cache, lru_cache, partial
from os import environ
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
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

class Control(NamedTuple):
    """How gates are controlled: a row of Table 1."""
    routers: bool = True  # that are learnt
    targets: bool = False  # mean gates to aim at
    loss: bool = True  # a term for the gates
    alpha: float = 0.0  # the initial coefficient of their mean in it
    beta: float = 0.0  # and of their variance
    gamma: float = 0.0  # by which the coefficients move; 0: never


CONTROLS = {
    "dense": Control(routers=False, loss=False),
    "none": Control(loss=False),
    "random": Control(routers=False, targets=True, loss=False),
    "sparsity": Control(alpha=0.01),
    "sparsity_variance": Control(alpha=0.01, beta=-0.01),
    "sparsity_variance_l2": Control(targets=True, alpha=0.1, beta=0.1),
    "adaptive": Control(targets=True, gamma=1e-3),
    "proportional": Control(targets=True, gamma=1e-3),
    "proportional_derivative": Control(targets=True, gamma=1e-2),
}


def flag(of, default, text, *choices, allow="above 0"):
    return field(default=default, metadata=dict(of=of, help=text, choices=choices, allow=allow))


of_size, of_model, of_gates, of_data, of_batch, of_optimizer, of_run = (
    partial(flag, of) for of in ("size", "model", "gates", "data", "batch", "optimizer", "run"))
FRACTION = "between 0 and 1"


@dataclass
class Config:
    """All settings of a run; None means that the value follows from the others. Raises UserError."""
    # sizes, which a checkpoint fixes
    dim: int = of_size(768, "width d of the residual stream")
    n_layers: int = of_size(12, "number of blocks L; even, unless dense")
    n_heads: int = of_size(12, "query heads; divides dim")
    n_kv_heads: int | None = of_size(None, "key and value heads; divides n_heads (default: n_heads)")
    vocab_size: int = of_size(50257, "number of tokens in the vocabulary")
    ffn_dim_multiplier: float = of_size(4.0, "width of the SwiGLU hidden layer, in units of dim")
    norm_eps: float = of_size(1e-5, "RMSNorm epsilon")
    rope_theta: float = of_size(10000.0, "base of the rotary frequencies")
    use_scaled_rope: bool = of_size(False, "Llama 3's scaling of the rotary frequencies")
    rope_factor: float = of_size(8.0, "by which it divides the lowest (Llama 3.1: 8, 3.2: 32)")
    max_seq_len: int = of_size(1024, "sequence length T, in tokens")
    # model
    initializer_range: float = of_model(0.02, "standard deviation of the initial weights")
    norm: str = of_model(
        "sandwich", "norm of a module's input and output, of its input, or of that but not of the embeddings",
        "sandwich", "pre", "llama")
    gate_attention: str = of_model("keys", "ln g on keys (Eq. 3), or no gate (as released)", "keys", "none")
    compute: str = of_model("packed", "skip for real, or compute all and multiply by 0", "packed", "masked")
    mask_documents: bool = of_model(False, "tokens see only their own document")
    document_token: int | None = of_model(
        None, "token that begins a document (default: dataset.json's)", allow="at least 0")
    # gates
    control: str = of_gates("proportional", "how sparsity is controlled (Table 1)", *CONTROLS)
    mean_target_start: float = of_gates(1.0, "target mean gate of the first block, 0 to 1", allow=FRACTION)
    mean_target_end: float = of_gates(0.5, "target mean gate of the middle blocks, 0 to 1", allow=FRACTION)
    mean_coef_init: float | None = of_gates(None, "initial alpha (default: Table 1's)", allow="any")
    var_coef_init: float | None = of_gates(None, "initial beta (default: Table 1's)", allow="any")
    coef_update: float | None = of_gates(
        None, "update multiplier gamma (default: Table 1's)", allow="at least 0")
    tolerance: float = of_gates(0.01, "tolerance delta: smaller deviations move nothing", allow="at least 0")
    # data
    train_files: str = of_data("data/fineweb10B/fineweb_train_*.bin", "glob of the training shards")
    val_files: str = of_data("data/fineweb10B/fineweb_val_*.bin", "glob of the validation shards")
    train_tokens: int | None = of_data(None, "use only the first so many training tokens (default: all)")
    val_tokens: int | None = of_data(None, "use only the first so many validation tokens (default: all)")
    shuffle: bool = of_data(False, "take a shard's sequences in a random order, seeded, new each pass")
    encoding: str | None = of_data(
        None, "gpt2, bytes, or the path of a tokenizer.json (default: dataset.json's, or vocab_size's)")
    # batch
    batch_size: int = of_batch(512, "sequences a step, over all devices")
    device_batch_size: int = of_batch(32, "sequences a micro-batch, on one device")
    # optimizer and schedule
    optimizer: str = of_optimizer(
        "adamw", "optimizer of the blocks' matrices; all else has AdamW", "adamw", "muon")
    lr: float = of_optimizer(1e-3, "peak learning rate")
    beta1: float = of_optimizer(0.8, "decay of AdamW's first moment", allow=FRACTION)
    beta2: float = of_optimizer(0.95, "decay of AdamW's second moment", allow=FRACTION)
    eps: float = of_optimizer(1e-10, "AdamW epsilon")
    weight_decay: float = of_optimizer(0.0, "weight decay, of both optimizers", allow="at least 0")
    max_grad_norm: float | None = of_optimizer(None, "clip the gradient norm to this (default: off)")
    num_steps: int | None = of_optimizer(
        None, "optimizer steps (default: a pass over the data)", allow="at least 0")
    warmup_fraction: float = of_optimizer(0.1, "share of the steps that warms up", allow=FRACTION)
    cooldown_fraction: float = of_optimizer(
        0.0, "share of the steps in which lr falls linearly to 0, constant before (0: a cosine)",
        allow=FRACTION)
    router_width: int | None = of_optimizer(
        None, "routers' weights begin and learn as at this width: times it / dim (default: dim)")
    start_factor: float = of_optimizer(0.1, "learning rate at step 0, in units of lr", allow="at least 0")
    # run
    preset: str | None = of_run(None, "named settings; flags override them", "demo", "gated", "dense")
    config: str | None = of_run(None, "start from the settings of a record (folder, config.json, packed)")
    name: str | None = of_run(None, "name of the record (default: the preset's, or the control's)")
    seed: int = of_run(0, "seed of the initial weights, --shuffle and --control random", allow="at least 0")
    device: str | None = of_run(None, "cpu or cuda (default: cuda where there is one)", "cpu", "cuda")
    dtype: str | None = of_run(
        None, "of matrix products (default: bfloat16 on cuda)", "bfloat16", "float32")
    compile: bool | None = of_run(None, "torch.compile the blocks (default: on cuda)")
    val_every: int = of_run(100, "steps between validations")
    save_every: int = of_run(1000, "steps between checkpoints")
    log_every: int = of_run(1, "steps between lines of the log")
    metrics_every: int = of_run(1, "steps between training events of metrics.jsonl")
    target_loss: float | None = of_run(None, "stop at this validation loss (nats a token)", allow="any")
    records_dir: str = of_run("records", "folder that holds the records")
    resume: str | None = of_run(None, "a record's folder: go on from its last checkpoint")
    init_from: str | None = of_run(None, "checkpoint (folder or file) to take sizes and weights from")

    def __post_init__(self):
        for f in fields(self):
            check_field(f, getattr(self, f.name))
        self.n_kv_heads = given(self.n_kv_heads, self.n_heads)
        self.head_dim = self.dim // self.n_heads
        self.hidden_dim = round(self.ffn_dim_multiplier * self.dim)
        self.router_scale = given(self.router_width, self.dim) / self.dim
        self.step_tokens = self.batch_size * self.max_seq_len
        self.tokeniser = self.encoding or ("bytes" if self.vocab_size == 257 else "gpt2")
        self.rule = CONTROLS[self.control]
        self.gated = self.control != "dense"
        self.n_levels = (self.n_layers + 1) // 2
        self.n_routers = self.n_levels if self.rule.routers else 0
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
        yield "/" not in (self.name or ""), f"--name {self.name} is part of a folder's name: leave out the /"
        yield self.gate_attention == "keys" or self.compute == "masked" or self.control == "dense", (
            "--gate_attention none needs --compute masked: there a skipped token is still a key, "
            "so none can be left out of the computation")
        yield self.warmup_fraction + self.cooldown_fraction <= 1, (
            f"--warmup_fraction {self.warmup_fraction} and --cooldown_fraction {self.cooldown_fraction} are "
            "more than all steps together")
        yield self.rule.loss or not (self.mean_coef_init or self.var_coef_init), (
            f"--control {self.control} has no gate loss: leave out --mean_coef_init and --var_coef_init")
        yield self.rule.gamma or not self.coef_update, (
            f"--control {self.control} never moves its coefficients: leave out --coef_update")


def given(value, default):
    return default if value is None else value


FIELDS = {f.name: f for f in fields(Config)}
def names_of(*groups):
    return [name for name, f in FIELDS.items() if f.metadata["of"] in groups]


SIZES, MODEL_FIELDS = names_of("size"), names_of("size", "model")
COEFFICIENTS = ["mean_coef_init", "var_coef_init", "coef_update"]  # which belong to their control

PRESETS = {
    "gated": dict(router_width=64, coef_update=0.03),  # (Table 2 has 768 and 0.001: README, Width)
    "dense": dict(control="dense"),
    "demo": dict(
        dim=64, n_layers=8, n_heads=2, vocab_size=257, max_seq_len=256, encoding="bytes",
        train_files="data/demo/demo_train_*.bin", val_files="data/demo/demo_val_*.bin", val_tokens=65536,
        shuffle=True, batch_size=8, device_batch_size=8, optimizer="muon", lr=3e-3, num_steps=1100,
        cooldown_fraction=0.5, val_every=100, save_every=500, log_every=10, metrics_every=10,
        control="proportional_derivative", mean_target_end=0.25, dtype="float32"),
}


TYPES = {"int": int, "float": float, "bool": bool, "str": str}
LARGEST = sys.float_info.max
RANGES = {"any": (-LARGEST, LARGEST), "above 0": (5e-324, LARGEST), "at least 0": (0, LARGEST),
          FRACTION: (0, 1)}


def check_field(f, value):
    """Type and range of one field; a JSON file can hold what a command line cannot."""
    kind, _, optional = f.type.partition(" | ")
    if value is None and optional:
        return
    if type(value) is not TYPES[kind] and (type(value), kind) != (int, "float"):
        raise UserError(f"--{f.name} {value!r} is not of type {kind}")
    if f.metadata["choices"] and value not in f.metadata["choices"]:
        raise UserError(f"--{f.name} {value!r} is not one of {', '.join(f.metadata['choices'])}")
    low, high = RANGES[f.metadata["allow"]]
    if kind in ("int", "float") and not low <= value <= high:
        raise UserError(f"--{f.name} {value} is out of range: it must be finite, {f.metadata['allow']}")


# ----------------------------------------------------------------------------------------------------------
# Runtime: where this process stands among its peers, and on which device.

class Runtime:
    """One process of torchrun's (or the only one): rank, world size R, device, precision."""

    def __init__(self, cfg):
        self.rank = int(environ.get("RANK", 0))
        self.world = int(environ.get("WORLD_SIZE", 1))
        self.main = self.rank == 0
        self.device = choose_device(cfg)
        self.cuda = self.device.type == "cuda"
        self.dtype = getattr(torch, cfg.dtype or ("bfloat16" if self.cuda else "float32"))
        self.compile = given(cfg.compile, self.cuda)
        if self.cuda:
            torch.cuda.set_device(self.device)
            properties = torch.cuda.get_device_properties(self.device)
            check_heads(cfg, self.dtype, properties.shared_memory_per_block_optin)
            # float32 stays float32: a router in TF32 may open in decoding a gate that was closed in training
            warnings.filterwarnings("ignore", "TensorFloat32 tensor cores")
        if self.world > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if self.cuda else "gloo")

    def sum(self, *tensors):
        """Each summed over ranks, in place."""
        for x in tensors if self.world > 1 else ():
            dist.all_reduce(x)

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16)


def choose_device(cfg):
    """This process's device. Raises RankError where this process has none."""
    if given(cfg.device, "cuda" if torch.cuda.is_available() else "cpu") == "cpu":
        return torch.device("cpu")
    local = int(environ.get("LOCAL_RANK", 0))
    if local >= torch.cuda.device_count():
        raise RankError(f"--device cuda: this machine has {torch.cuda.device_count()} GPUs, process {local} "
                        "has none; use --device cpu or fewer processes (NPROC)")
    return torch.device("cuda", local)


# All that is ever compiled is run as lower(function)(...), where `lower` is one of these two.

def eager(function):
    return function


@cache
def compiled(function):
    """One graph for all layers and all numbers of active tokens."""
    import torch.fx.experimental._config as shapes
    import torch._inductor.config as inductor
    try:
        shapes.use_duck_shape = False  # a number of rows that equals another size does so by chance
        # By default a norm's backward walks few rows in another way than many, which is another graph.
        inductor.triton.mix_order_reduction_non_strict_mode = True
    except AttributeError as e:
        raise UserError(f"torch {torch.__version__} lacks a setting ({e}): use 2.11 to 2.13, or --no-compile")
    return torch.compile(function, dynamic=True)


# ----------------------------------------------------------------------------------------------------------
# Norm and positions. Llama 3's: RMSNorm, and rotary embeddings on interleaved pairs (2i, 2i+1).

class RMSNorm(nn.RMSNorm):
    def forward(self, x):
        return F.rms_norm(x.float(), self.normalized_shape, self.weight, self.eps)


def normed(norm, x):
    return norm(x)


def rope_table(cfg):
    """cos and sin of every position's angles, each (max_seq_len, head_dim / 2), float32."""
    freq = cfg.rope_theta ** -(torch.arange(0, cfg.head_dim, 2, dtype=torch.float32) / cfg.head_dim)
    if cfg.use_scaled_rope:  # Llama 3: wavelengths of over 8192 positions rope_factor-fold, a blend to 2048
        smooth = ((8192 * freq / (2 * math.pi) - 1) / 3).clamp(0, 1)
        freq = freq * (smooth + (1 - smooth) / cfg.rope_factor)
    angle = torch.outer(torch.arange(cfg.max_seq_len, dtype=torch.float32), freq)
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
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
    counts: Tensor  # (sequences + 1,) tokens of each sequence that are here; the last are padding, and 0
    cos: Tensor  # (n or padded, head_dim / 2) rotary angles
    sin: Tensor
    tables: list  # of tensors: `mask_tables` (CUDA); else None


def make_layout(seq, cos, sin, n_seqs, flex):
    """The layout of n tokens, in as many rows as the angles cos and sin have, n or padded."""
    each = torch.arange(n_seqs + 1, device=seq.device)
    counts = torch.searchsorted(seq, each, right=True) - torch.searchsorted(seq, each)
    tables = mask_tables(padded(seq, len(cos), 2**30)) if flex else None  # (padding: a sequence behind all)
    return Layout(seq, counts, cos, sin, tables)


def gather(h, S, g, layout, keep, rows):
    """The tokens `keep` (n,) of h (n, d), S and g, padded, and their layout: in one graph, since the host has
    just waited for `keep` and the device with it."""
    at = padded(keep, rows, 0)
    token = torch.arange(rows, device=h.device) < len(keep)
    inner = make_layout(layout.seq[keep], layout.cos[at], layout.sin[at], len(layout.counts) - 1,
                        layout.tables is not None)
    return h.index_select(0, at), torch.where(token, S[at], 1.0), torch.where(token, g[at], 0.0), inner


def put_back(h, keep, x):
    """h with its rows `keep` (n,) replaced by the first n of x."""
    return h.index_copy(0, keep, x[:len(keep)])


def uses_flex(device):
    """FlexAttention has no backward on a CPU."""
    return device.type == "cuda"


def padded_rows(n, flex):
    """n, or what FlexAttention takes in one graph."""
    return max(2 * ROWS, -(-n // ROWS) * ROWS) if flex else n


def padded(x, rows, value):
    return F.pad(x, (0, rows - len(x)), value=value)


def mask_tables(seq):
    """Block-sparse tables of the causal same-sequence mask, without an n x n tensor, in BlockMask's order.

    seq: (n,) sorted, n a multiple of ROWS. Returns, int32: the first row of each row's sequence (n,); then of
    each query block the number of partly visible key blocks and their indices, (1, 1, nb) and (1, 1, nb, nb),
    the same of fully visible ones; and both again of each key block, whose query blocks see it.
    """
    first, last = seq[::ROWS], seq[ROWS - 1::ROWS]  # (nb,) the sequences in which a block begins and ends
    each = torch.arange(len(first), device=seq.device)
    seen = (each[:, None] >= each) & (first[:, None] <= last)  # (nb, nb), query by key blocks
    full = (each[:, None] > each) & (last[:, None] == first)

    tables = [torch.searchsorted(seq, seq).int()]
    for blocks in (seen & ~full, full, (seen & ~full).T, full.T):
        count = blocks.sum(1)
        index = blocks.int().argsort(dim=1, descending=True, stable=True)  # (those seen come first, in order)
        index = torch.where(each < count[:, None], index, 0)
        tables += [t.int()[None, None] for t in (count, index)]
    return tables


def log_gate(g):
    """ln g_j of Eq. 3, (n,) float32. A key with g = 0 is removed exactly; where all keys of a query are, the
    query itself is skipped, and its finite output is multiplied by 0."""
    return torch.where(g > 0, g.clamp(min=EPSILON).log(), REMOVED)


def attention_kernel(layout):
    """What computes Eq. 3 on this layout: causal attention within each sequence, ln g_j added to the logit of
    key j, softmax in float32. A function of q (n, heads, head_dim), k and v (n, kv_heads, head_dim), ln_g
    (n,) or None (no gate, or `carried` by q and k), and the layout; it returns (n, heads, head_dim)."""
    return attend_rows if layout.tables is None else attend_flex


def carried(q, k, ln_g):
    """q and k with CARRY further columns, which add ln g_j to the logit of key j: its high and its low part,
    so that bfloat16 rounds nothing away, and zeros, for aligned rows. Its gradient then is a column of k's,
    and not, as a captured tensor's, a sum by atomic additions, one for every pair. (The kernel rounds 72
    columns to 128: by estimate 4 ms of an 80 ms micro-batch of Table 2, for 5 to 20 of additions; neither
    ran.)"""
    unit = 2.0 ** round(math.log2(q.shape[-1]) / 2)  # near sqrt(head_dim), and exact
    value = ln_g * (math.sqrt(q.shape[-1]) / unit)
    high = (8 * value.detach()).round() / 8  # exact in bfloat16: a compiler elides a cast there and back
    parts = F.pad(torch.stack((high, value - high), -1), (0, CARRY - 2)).to(k.dtype)
    parts = parts[:, None].expand(-1, k.shape[1], -1)  # (n, kv_heads, CARRY)
    return torch.cat((q, q.new_full((*q.shape[:2], CARRY), unit)), -1), torch.cat((k, parts), -1)


def attend_flex(q, k, v, ln_g, layout):
    if ln_g is not None:
        q, k = carried(q, k, ln_g)
    # (1, heads, n, head_dim); n is a multiple of ROWS, by `padded_rows`, which IS_DIVISIBLE promises
    heads_first = [t.transpose(0, 1)[None] for t in (q, k, v)]
    lower = compiled if q.device.type == "cuda" else eager  # (eager, it would hold all n x n scores)
    start, *tables = layout.tables

    def causal_same_sequence(b, h, i, j):
        return (i >= j) & (j >= start[i])

    mask = BlockMask((len(q),) * 2, *tables, BLOCK_SIZE=(ROWS, ROWS), mask_mod=causal_same_sequence)
    out = lower(flex_attention)(*heads_first, block_mask=mask, scale=v.shape[-1]**-0.5, enable_gqa=True,
                                kernel_options=flex_options(q.shape[-1], q.dtype))
    return out[0].transpose(0, 1)


def flex_options(width, dtype):
    """Tiles for FlexAttention's kernels. In float32 or beyond 128 columns its own take more shared memory
    than most devices have; 72 columns, for which it has none, get those of 128. On 4 warps, its default, the
    forward kernel spills 576 bytes a thread on sm_90; on 8, divisible, none."""
    tiles = {}
    if dtype == torch.float32:
        tiles = dict(fwd_BLOCK_M=32, fwd_BLOCK_N=32, fwd_num_stages=1)
    elif width > 128:
        tiles = dict(fwd_BLOCK_M=64, fwd_BLOCK_N=32, fwd_num_stages=2, bwd_BLOCK_M1=32, bwd_BLOCK_N1=32,
                     bwd_BLOCK_M2=32, bwd_BLOCK_N2=32, bwd_num_stages=1)
    elif width > 64:
        tiles = dict(fwd_BLOCK_M=128, fwd_BLOCK_N=64)
    return dict(IS_DIVISIBLE=True, fwd_num_warps=8) | tiles


def check_heads(cfg, dtype, shared):
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
    """The CPU's kernel: a sequence at a time. Logits and softmax are float32; the weights multiply in v's
    type."""
    lengths, group = layout.counts.tolist(), q.shape[1] // k.shape[1]
    ln_g = q.new_zeros(len(q)) if ln_g is None else ln_g
    k, v = (t.repeat_interleave(group, 1) for t in (k, v))
    with torch.autocast("cpu", enabled=False):
        heads_first = (t.transpose(0, 1).split(lengths, 1) for t in (q.float(), k.float(), v))
        sequences = zip(*heads_first, ln_g.float().split(lengths))
        return torch.cat([rows for each in sequences for rows in attend_sequence(*each)], 1).transpose(0, 1)


CAUSAL = torch.full((QUERY_ROWS, QUERY_ROWS), REMOVED).triu(1)


def attend_sequence(q, k, v, ln_g):
    """One sequence, each (heads, n, head_dim), in about equal blocks of query rows, over the causal part
    only."""
    end = 0
    for rows in q.tensor_split(-(-q.shape[1] // QUERY_ROWS) or 1, 1):
        n = rows.shape[1]
        end += n
        logits = torch.baddbmm(ln_g[:end], rows, k[:, :end].mT, alpha=q.shape[2]**-0.5)
        logits[..., -n:] += CAUSAL[:n, :n]
        yield torch.bmm(logits.softmax(-1).to(v.dtype), v[:, :end])


# ----------------------------------------------------------------------------------------------------------
# Block (Section 2.3): sandwich norm, y = x + g Norm(Module(Norm(x))).

linear = partial(nn.Linear, bias=False)


class Attention(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.head_dim, kv_dim = cfg.head_dim, cfg.n_kv_heads * cfg.head_dim
        self.wq = linear(cfg.dim, cfg.dim)
        self.wk = linear(cfg.dim, kv_dim)
        self.wv = linear(cfg.dim, kv_dim)
        self.wo = linear(cfg.dim, cfg.dim)

    def project(self, x, cos, sin):
        """Queries, keys and values of x (n, dim): (n, heads, head_dim), and (n, kv_heads, head_dim) twice."""
        q, k, v = (w(x).unflatten(-1, (-1, self.head_dim)) for w in (self.wq, self.wk, self.wv))
        return rotate(q, cos, sin), rotate(k, cos, sin), v


class FeedForward(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.w1 = linear(cfg.dim, cfg.hidden_dim)
        self.w2 = linear(cfg.hidden_dim, cfg.dim)
        self.w3 = linear(cfg.dim, cfg.hidden_dim)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        norm = partial(RMSNorm, cfg.dim, cfg.norm_eps)
        after = norm if cfg.norm == "sandwich" else nn.Identity
        self.gate_keys = cfg.gate_attention == "keys"
        self.pre_attention_norm = norm()
        self.attention = Attention(cfg)
        self.post_attention_norm = after()
        self.pre_feed_forward_norm = norm()
        self.feed_forward = FeedForward(cfg)
        self.post_feed_forward_norm = after()

    def before(self, h, g, cos, sin, carry):
        """What attention takes: q, k, v and ln g (or q and k that carry it) of h (n, d) and g (n,) or None
        (dense)."""
        q, k, v = self.attention.project(self.pre_attention_norm(h), cos, sin)
        if g is None or not self.gate_keys:
            return q, k, v, None
        if carry:
            return *carried(q, k, log_gate(g)), v, None
        return q, k, v, log_gate(g)

    def after(self, h, g, y):
        """The block's output (n, d), from its input and what attention gave, y (n, heads, head_dim)."""
        a = gated_add(h, g, self.post_attention_norm(self.attention.wo(y.flatten(1))))
        return gated_add(a, g, self.post_feed_forward_norm(self.feed_forward(self.pre_feed_forward_norm(a))))


def gated_add(x, g, y):
    return x + y if g is None else torch.addcmul(x, g[:, None], y.float())


# ----------------------------------------------------------------------------------------------------------
# The middle-skipping transformer (Section 2.1, Eq. 1 and 2). Gates only close on the way to the middle, and
# the second half mirrors the first: active tokens are nested sets, and the forward pass is a recursion.

class Router(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.linear = nn.Linear(dim, 1)

    def forward(self, h, S):
        """Eq. 1 and 2: S (n,) with the soft mask s = ReLU(w . h + b) of h (n, d) added, and the gates g = 1 -
        clamp(S, 0, 1), (n,) each, float32; a ReLU, since its gradient at S = 1 is 0, and clamp's is not."""
        with torch.autocast(h.device.type, enabled=False):
            S = S + F.relu(self.linear(h.float())).squeeze(-1)
            return S, F.relu(1 - S)


def coin(tokens, pos, seed):
    """A number in [0, 1) a token (n,), hashed from its id, position and the seed: the same in training and
    decoding and on any number of ranks."""
    x = (seed + 1) * 0x2545F4914F6CDD1D % 2**63 ^ (tokens << 32) ^ pos
    for multiplier in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB):
        x = x * (multiplier - 2**64)  # as int64, that wraps
        x = x ^ ((x >> 31) & 0x1FFFFFFFF)
    return ((x >> 40) & 0xFFFFFF) / 2**24


class MiddleSkippingTransformer(nn.Module):
    """Decoder whose tokens skip blocks [l, L - l) once their accumulated soft mask S reaches 1."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.tok_embeddings = nn.Embedding(cfg.vocab_size, cfg.dim)
        self.input_norm = nn.Identity() if cfg.norm == "llama" else RMSNorm(cfg.dim, cfg.norm_eps)
        self.layers = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layers))
        self.masks = nn.ModuleList(Router(cfg.dim) for _ in range(cfg.n_routers))
        self.output_norm = RMSNorm(cfg.dim, cfg.norm_eps)
        self.output = linear(cfg.dim, cfg.vocab_size)
        cos, sin = rope_table(cfg)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.lower = eager  # or `compiled`
        self.caches = None  # of each layer, keys and values of earlier tokens: while decoding

    def forward(self, inputs, targets):
        """inputs, targets: (B, T). Returns the mean cross-entropy in nats and every level's `gate_sums`,
        (L/2, 4)."""
        B, T = inputs.shape
        tokens, each = inputs.flatten(), torch.arange(B * T, device=inputs.device)
        seq, pos, n_seqs = each // T, each % T, B
        if self.cfg.mask_documents:  # a document is a sequence
            seq = ((tokens == self.cfg.document_token) | (pos == 0)).cumsum(0) - 1
            n_seqs = 2 + seq[-1].item()  # (with an empty one: a single sequence would be another graph)
        h, levels = self.hidden(tokens, seq, pos, n_seqs)
        kind = h.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else h.dtype
        ce = HeadLoss.apply(h, self.output.weight, targets.flatten(), dtype, self.lower(chunk_loss),
                            torch.is_grad_enabled())
        return ce, torch.stack([self.lowered(len(layout.seq))(gate_sums)(g, layout)
                                for g, layout, _ in levels])

    def hidden(self, tokens, seq, pos, n_seqs):
        """The final residual stream of packed tokens, each argument (n,). Returns it normalised (n, d), and
        what `span` leaves."""
        n, flex = len(tokens), uses_flex(tokens.device)
        rows = padded_rows(n, flex)
        angle = padded(pos, rows, 0)
        layout = self.lower(make_layout)(seq, self.cos[angle], self.sin[angle], n_seqs, flex)
        h = self.lower(normed)(self.input_norm, self.tok_embeddings(padded(tokens, rows, 0)))
        random = self.cfg.control == "random"
        S = coin(tokens, pos, self.cfg.seed) if random else torch.zeros(n, device=tokens.device)
        h, levels = self.span(h, padded(S, rows, 1.0), layout, 0)  # (padding skips: S = 1)
        return self.lower(normed)(self.output_norm, h[:n]), levels

    def span(self, h, S, layout, l):
        """Blocks [l, L - l) on the rows of h (n, d) whose gate is open; the others pass unchanged. Returns h,
        and of each level that ran: its gates (None: dense), the layout of the tokens that it saw, and which
        these are of the level before (None: all)."""
        if l == self.cfg.n_levels:
            return h, []
        S, g = self.gates(h, S, l, layout)
        # a level's one wait for the host:
        keep = None if g is None or self.cfg.compute == "masked" else g.nonzero()[:, 0]
        if keep is None or len(keep) == len(layout.seq):
            x, keep = h, None
        elif len(keep) == 0 and self.caches:
            return h, []  # (in training blocks run on nothing: each needs a gradient)
        else:
            flex = layout.tables is not None
            rows = padded_rows(len(keep) + flex, flex)  # with and without padding would be two graphs
            x, S, g, layout = self.lowered(len(keep))(gather)(h, S, g, layout, keep, rows)
        levels = [(g, layout, keep)]
        x = self.block(l, x, g, layout)
        mirror = self.cfg.n_layers - 1 - l
        if mirror > l:  # (not in the middle of an odd dense model)
            x, deeper = self.span(x, S, layout, l + 1)
            x = self.block(mirror, x, g, layout)
            levels += deeper
        return x if keep is None else self.lowered(len(keep))(put_back)(h, keep, x), levels

    def gates(self, h, S, l, layout):
        """S and the gates of level l by Eq. 1 and 2; dense, None; with --control random, where S is a coin in
        [0, 1), 1 as often as the level's target asks, and as nested."""
        if self.cfg.control == "dense":
            return S, None
        if self.cfg.control == "random":
            return S, (S < min(mean_targets(self.cfg)[:l + 1])).float()
        return self.lowered(len(layout.seq))(Router.forward)(self.masks[l], h, S)

    def block(self, l, h, g, layout):
        block = self.layers[l]
        attend = self.caches[l].attend if self.caches else attention_kernel(layout)
        carry = layout.tables is not None and not self.caches
        lower = self.lowered(len(layout.seq))
        q, k, v, ln_g = lower(Block.before)(block, h, g, layout.cos, layout.sin, carry)
        return lower(Block.after)(block, h, g, attend(q, k, v, ln_g, layout))

    def lowered(self, n):
        """0 and 1 tokens would be graphs of their own: rare in training; in decoding 1 is what there is."""
        return eager if n < 2 and not self.caches else self.lower


def gate_sums(g, layout):
    """Of one level: sum of g, sum of g^2, active tokens, causal pairs among them; (4,) float64."""
    n = layout.counts
    each = (n, n, n) if g is None else (g, g.square(), g > 0)
    return torch.stack([*(x.sum().double() for x in each), (n * (n + 1)).sum().double() / 2])


def initialise(model, cfg):
    """Normal(0, initializer_range) for every weight (a router's: scaled), zero for router biases, one for
    norms."""
    generator = torch.Generator().manual_seed(cfg.seed)
    for name, p in model.named_parameters():
        if name.endswith("norm.weight"):
            nn.init.ones_(p)
        elif name.endswith("linear.bias"):
            nn.init.zeros_(p)
        elif p.ndim == 2:
            scale = cfg.router_scale if name.startswith("masks.") else 1.0
            nn.init.normal_(p, 0.0, cfg.initializer_range * scale, generator=generator)
        else:
            raise RuntimeError(f"no initialisation is known for parameter {name}")


class HeadLoss(torch.autograd.Function):
    """Mean cross-entropy of head and softmax without the (n, V) logits: a chunk of rows at a time, with its
    gradients, since the loss is the last thing computed. Products in `dtype`, softmax in float32."""

    @staticmethod
    def forward(ctx, h, weight, targets, dtype, chunk_loss, wanted):
        cuda, n, V = h.device.type == "cuda", len(h), len(weight)
        w = F.pad(weight.to(dtype), (0, 0, 0, -V % 128 if cuda else 0))  # a width that suits the tensor cores
        rows, total = 2**(27 if cuda else 25) // len(w), h.new_zeros(())
        if wanted:
            dh, dw = torch.empty_like(h), torch.zeros_like(w, dtype=torch.float32)
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


def add_product(total, a, b):
    """total + a @ b, summed in total's float32 whatever a and b are; total is spent."""
    if a.dtype == total.dtype:
        return total.addmm_(a, b)
    if a.device.type == "cuda":
        return torch.addmm(total, a, b, out_dtype=total.dtype)
    return total.add_(a @ b)


def chunk_loss(logits, targets, vocab_size, n):
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

def moments(stats, n):
    """Mean and population variance (Eq. 4) of the gates of n tokens: (2, L/2), from the sums of
    `gate_sums`."""
    m = stats[:, 0] / n
    return torch.stack((m, stats[:, 1] / n - m.square()))


def mirrored(x, cfg):
    """Values of the levels to those of all L layers."""
    x = x.tolist()
    return x + x[:cfg.n_layers // 2][::-1]


def gate_report(cfg, stats, n):
    """What the records say of the gates: mean, variance, and share that is exactly 0, each of L layers."""
    m, var = moments(stats, n)
    return {"gate_mean": mirrored(m, cfg), "gate_var": mirrored(var, cfg),
            "gate_zero": mirrored(1 - stats[:, 2] / n, cfg)}


def mean_targets(cfg):
    """mu_l of the first L/2 levels: linearly spaced."""
    return torch.linspace(cfg.mean_target_start, cfg.mean_target_end, cfg.n_levels,
                          dtype=torch.float64).tolist()


class GateControl(nn.Module):
    """Coefficients alpha (of the mean) and beta (of the variance) of every level, and what moves them.

    Row 0 of each (2, L/2) tensor belongs to the mean, row 1 to the variance: every rule treats them alike.
    """

    def __init__(self, cfg, device):
        super().__init__()
        self.cfg = cfg
        mu = torch.tensor(mean_targets(cfg), dtype=torch.float64, device=device)
        self.target = torch.stack((mu, mu * (1 - mu)))  # a Bernoulli variable's
        init = given(cfg.mean_coef_init, cfg.rule.alpha), given(cfg.var_coef_init, cfg.rule.beta)
        self.register_buffer("coef", mu.new_tensor(init)[:, None].repeat(1, len(mu)))
        # exponential moving average of the deviation, over 10 steps
        self.register_buffer("average", torch.full_like(self.coef, math.nan))

    def loss(self, observed):
        """Eq. 5: mean over layers of alpha mean + beta variance; observed: `moments` of a micro-batch."""
        if self.cfg.control == "sparsity_variance_l2":
            observed = (observed - self.target).square()
        return (self.coef * observed).sum() / self.coef.shape[1]

    @torch.no_grad()
    def update(self, observed):
        """Eq. 6 and Table 1; observed is `moments` of all tokens of a step."""
        deviation = observed - self.target
        average = 0.9 * self.average + 0.1 * deviation
        self.average = torch.where(average.isnan(), deviation, average)
        move = deviation.sign() if self.cfg.control == "adaptive" else deviation
        moves = deviation.abs() > self.cfg.tolerance
        if self.cfg.control == "proportional_derivative":  # while it grows; its 1-step average is itself
            moves &= deviation * (deviation - self.average) > 0
        self.coef += given(self.cfg.coef_update, self.cfg.rule.gamma) * move * moves


# ----------------------------------------------------------------------------------------------------------
# FLOPs (of a forward pass; a training step is three).

def realised_flops(cfg, stats, n):
    """Matrix-product FLOPs that a forward pass over n tokens ran, from its `gate_sums`, (L/2, 4)."""
    stats = torch.as_tensor(stats, dtype=torch.float64).cpu()
    rows = torch.full_like(stats[:, 2], n) if cfg.compute == "masked" else stats[:, 2]
    weights = cfg.dim * (2 * cfg.dim + 2 * cfg.n_kv_heads * cfg.head_dim + 3 * cfg.hidden_dim)  # of a block
    blocks = 2 * weights * sum(mirrored(rows, cfg)) + 4 * cfg.dim * sum(mirrored(stats[:, 3], cfg))
    routers = 2 * cfg.dim * (n + rows[:-1].sum().item()) if cfg.n_routers else 0.0
    return blocks + routers + 2 * n * cfg.dim * cfg.vocab_size


# ----------------------------------------------------------------------------------------------------------
# Data. A shard: 256 little-endian int32 (magic, version, number of tokens, 0 ...), then that many uint16, or
# uint32 where the vocabulary needs them.

HEADER_BYTES = 1024
FORMATS = {(20240520, 1): "<u2", (20240801, 7): "<u4"}  # (magic, version): llm.c's
SHARD_HINT = "./run.sh tokenize makes shards, ./run.sh fineweb fetches them"


def open_shard(path):
    """The tokens of a shard, memory-mapped. Raises UserError if it is not exactly a shard."""
    try:
        magic, version, count = np.fromfile(path, "<i4", 3).tolist()
        if (magic, version) not in FORMATS:
            raise ValueError(f"it begins with {magic} and {version}, not with one of {[*FORMATS]}")
        tokens = np.memmap(path, FORMATS[magic, version], "r", HEADER_BYTES)
        if not len(tokens) == count > 0:
            raise ValueError(f"its header says {count} tokens, it holds {len(tokens)}")
        return tokens
    except (OSError, ValueError) as e:
        raise UserError(f"{path} is not a whole shard ({e}); make or fetch it again: {SHARD_HINT}")


class Shards:
    """The shards of --train_files or --val_files in sorted order, cut to the first --train_tokens or
    --val_tokens. Relative globs may also start at the script's folder."""

    def __init__(self, cfg, split):
        pattern = getattr(cfg, f"{split}_files")
        limit = getattr(cfg, f"{split}_tokens")
        paths = sorted(map(Path, glob.glob(pattern) or glob.glob(str(ROOT / pattern))))
        if not paths:
            raise UserError(f"--{split}_files {pattern} matches no file: {SHARD_HINT}")
        self.paths, self.tokens, self.vocab_size = [], [], cfg.vocab_size
        for path in paths:
            tokens = open_shard(path)[:limit]
            limit = limit and limit - len(tokens)
            if len(tokens):
                self.paths.append(path)
                self.tokens.append(tokens)
        path = self.paths[0].parent / "dataset.json"
        said = read_json(path) if path.exists() else {}
        self.encoding, self.document_token = said.get("encoding", cfg.tokeniser), said.get("document_token")
        if cfg.encoding not in (None, self.encoding):
            raise UserError(f"{path} says that its tokens are {self.encoding}, not {cfg.encoding}: take "
                            "other shards, or another --encoding")

    def starts(self, shard, T):
        """Of every sequence of T (+1) tokens at stride T."""
        return np.arange((len(self.tokens[shard]) - 1) // T) * T

    def window(self, shard, start, n):
        """n tokens of a shard, int64; UserError where one lies beyond the vocabulary."""
        tokens = self.tokens[shard][start:start + n]
        if tokens.max() >= self.vocab_size:
            raise RankError(f"shard {self.paths[shard]} holds token {tokens.max()} near position {start}, "
                            f"beyond --vocab_size {self.vocab_size}; it was made with another tokeniser")
        return torch.from_numpy(tokens.astype(np.int64))

    def batch(self, places, T, rt):
        """(inputs, targets) of the sequences that begin at these (shard, start), each (B, T)."""
        windows = torch.stack([self.window(*place, T + 1) for place in places])
        if rt.cuda:
            windows = windows.pin_memory().to(rt.device, non_blocking=True)
        return windows[:, :-1], windows[:, 1:]


class TrainLoader:
    """A step takes batch_size sequences of T (+1) tokens, as they lie in a shard or (`shuffle`) in the order
    of a permutation; micro-batch a of rank r of R gets the (a R + r)-th device_batch_size of them.

    A tail too short for a step is dropped; after the last shard comes the first. `place`, the number of the
    next step, is all that a checkpoint needs. (Nothing is read ahead: a micro-batch of Table 2 takes half a
    millisecond from the page cache, and, but for a step's first, a GPU is still busy.)
    """

    def __init__(self, shards, cfg, rt):
        self.shards, self.cfg, self.rt, self.place = shards, cfg, rt, 0
        self.accumulation, rest = divmod(cfg.batch_size, cfg.device_batch_size * rt.world)
        if rest:
            raise UserError(f"--batch_size {cfg.batch_size} is not a multiple of --device_batch_size "
                            f"{cfg.device_batch_size} times {rt.world} processes (NPROC): change one of them")
        # of a pass: shard, first sequence
        self.steps = [(shard, i * cfg.batch_size) for shard, tokens in enumerate(shards.tokens)
                      for i in range((len(tokens) - 1) // cfg.step_tokens)]
        if not self.steps:
            raise UserError(f"--train_files {cfg.train_files}: no shard holds a step's {cfg.step_tokens + 1} "
                            "tokens; use a smaller --batch_size or longer shards")
        self.order = lru_cache(1)(self.permutation)

    def permutation(self, shard, turn):
        """Where a shard's sequences start, in the order of a pass."""
        starts = self.shards.starts(shard, self.cfg.max_seq_len)
        if not self.cfg.shuffle:
            return starts
        return np.random.default_rng((self.cfg.seed, turn, shard)).permutation(starts)

    def read(self, a):
        """(inputs, targets) of this rank's micro-batch a of the next step, each (device_batch_size, T)."""
        B, T = self.cfg.device_batch_size, self.cfg.max_seq_len
        turn, i = divmod(self.place, len(self.steps))
        shard, first = self.steps[i]
        first += (a * self.rt.world + self.rt.rank) * B
        starts = self.order(shard, turn)[first:first + B]
        return self.shards.batch([(shard, start) for start in starts], T, self.rt)


# ----------------------------------------------------------------------------------------------------------
# Optimizer and schedule.

def make_optimizers(model, cfg):
    """By their name in a checkpoint: AdamW, with one rate for the groups default and (scaled by their
    width) routers; and with --optimizer muon, Muon for the blocks' matrices, its updates scaled to the size
    of AdamW's, so that the same lr suits. The groups partition the parameters."""
    groups = {"default": [], "routers": [], "matrices": []}
    for name, p in model.named_parameters():
        if p.ndim == 2 and name.startswith("masks."):
            kind = "routers"
        else:
            kind = "matrices" if cfg.optimizer == "muon" and p.ndim == 2 and "layers" in name else "default"
        groups[kind].append(p)
    *rest, matrices = (
        {"params": params, "name": name, "scale": cfg.router_scale if name == "routers" else 1.0}
        for name, params in groups.items())
    common = dict(lr=cfg.lr, weight_decay=cfg.weight_decay)
    adamw = torch.optim.AdamW(rest, betas=(cfg.beta1, cfg.beta2), eps=cfg.eps, fused=True, **common)
    if cfg.optimizer == "adamw":
        return {"optimizer": adamw}
    return {"optimizer": adamw, "muon": Muon([matrices], **common)}


class Muon(torch.optim.Muon):
    """torch's, but with all matrices of a shape in one product, and in float32 on a CPU, where bfloat16 can
    be ten times slower."""

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for shape in dict.fromkeys(p.shape for p in group["params"]):
                params = [p for p in group["params"] if p.shape == shape]
                G = torch.stack([p.grad for p in params])  # (n, rows, columns); so is their momentum
                momentum = self.state[params[0]].setdefault("momentum_buffer", torch.zeros_like(G))
                momentum.lerp_(G, 1 - group["momentum"])
                G = G.lerp(momentum, group["momentum"])  # Nesterov's
                update = orthogonal(G.bfloat16() if G.is_cuda else G).to(G.dtype)
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(params, update.unbind(), alpha=-group["lr"] * 0.2 * max(shape) ** 0.5)


def orthogonal(G):
    """G (n, rows, columns) with its singular values brought near 1, the smallest least, by Muon's five
    quintic Newton-Schulz iterations (Jordan et al., 2024)."""
    tall = G.shape[1] > G.shape[2]
    X = G.mT if tall else G
    X = X / X.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        A = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=-4.775, alpha=2.0315), X, beta=3.4445)
    return X.mT if tall else X


def learning_rate(step, cfg):
    """Linear warm-up from start_factor lr over the first W steps, then a cosine to 0 (Section 3.1); or, with
    a cooldown, lr until the last C steps, over which it falls linearly to 0."""
    W, C = int(cfg.warmup_fraction * cfg.num_steps), int(cfg.cooldown_fraction * cfg.num_steps)
    if step < W:
        return cfg.lr * (cfg.start_factor + (1 - cfg.start_factor) * step / W)
    if cfg.cooldown_fraction:
        return cfg.lr * min(1.0, (cfg.num_steps - step) / max(1, C))
    return cfg.lr * (1 + math.cos(math.pi * (step - W) / (cfg.num_steps - W))) / 2


# ----------------------------------------------------------------------------------------------------------
# Validation: every full sequence of T (+1) tokens at stride T of every shard.

def sequences(shards, cfg):
    """(shard, start) of every validation sequence."""
    T = cfg.max_seq_len
    places = [(shard, start) for shard in range(len(shards.paths)) for start in shards.starts(shard, T)]
    if not places:
        raise UserError(f"--val_files {cfg.val_files}: no shard holds a sequence of {T + 1} tokens; "
                        "use a smaller --max_seq_len, more --val_tokens or longer shards")
    return places


@torch.no_grad()
def evaluate(model, cfg, rt, shards):
    """Token-weighted validation: cross-entropy (nats a token), gates and realised FLOPs, over all ranks."""
    start, B = time.perf_counter(), cfg.device_batch_size
    places = sequences(shards, cfg)
    loss = torch.zeros((), dtype=torch.float64, device=rt.device)
    stats = loss.new_zeros(cfg.n_levels, 4)
    for first in range(rt.rank * B, len(places), rt.world * B):
        inputs, targets = shards.batch(places[first:first + B], cfg.max_seq_len, rt)
        with rt.autocast():
            ce, sums = model(inputs, targets)
        loss += ce.double() * inputs.numel()
        stats += sums
    rt.sum(loss, stats)
    tokens = len(places) * cfg.max_seq_len
    return {"cross_entropy": loss.item() / tokens, **gate_report(cfg, stats, tokens), "tokens": tokens,
            "val_s": time.perf_counter() - start,
            "realised_flops_per_token": realised_flops(cfg, stats, tokens) / tokens}


# ----------------------------------------------------------------------------------------------------------
# Records: one folder a run, which a person, a tool or another program can read.

class Record:
    """The folder of a run. Only rank 0 writes, and only one process at a time: the metrics are locked."""

    def __init__(self, cfg, rt, first_step):
        self.cfg, self.rt, self.folder, self.artist = cfg, rt, None, None
        self.shut_steps = 0  # in which a level was closed to nearly all tokens, against its target
        self.bar = tqdm(total=cfg.num_steps, initial=first_step,
                        disable=not rt.main or None,  # (None: where nobody watches)
                        bar_format="step {n_fmt}/{total_fmt} |{bar}| {remaining} left{postfix}")
        if not rt.main:
            return
        self.folder = Path(cfg.resume) if cfg.resume else make_folder(
            Path(cfg.records_dir), cfg.name or cfg.preset or cfg.control)
        with writing(self.folder / "log.txt"):
            self.metrics = open(self.folder / "metrics.jsonl", "ab", buffering=0)
            self.text = open(self.folder / "log.txt", "ab", buffering=0)
        try:
            fcntl.flock(self.metrics, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RankError(f"--resume {cfg.resume}: another process writes this record; wait until it ends")
        except OSError:
            pass  # a file system without locks

    def append(self, file, line):
        """A whole line or none, through no buffer."""
        size, data = os.fstat(file.fileno()).st_size, (line + "\n").encode()
        with writing(Path(file.name), lambda: file.truncate(size)):
            while data:
                data = data[file.write(data):]

    def say(self, line, of_a_step=False):
        """A line of log.txt and of the terminal; with a progress bar, a step's line goes to the file only."""
        if not self.rt.main:
            return
        self.append(self.text, line)
        if self.bar.disable:
            print(line, flush=True)
        elif not of_a_step:
            self.bar.write(line)

    def event(self, kind, values):
        if self.rt.main:
            self.append(self.metrics, json.dumps({"kind": kind} | values))

    def step(self, event):
        """What a training step leaves: its event, its line, and its state on the progress bar."""
        cfg, step, zeros = self.cfg, event["step"], event["gate_zero"]
        speed = f"{event['tokens_per_s']:.0f} tokens/s"
        if step % cfg.metrics_every == 0:
            self.event("train", event)
        if step % cfg.log_every == 0:
            levels = " ".join(f"{z:.2f}" for z in zeros[:cfg.n_levels])
            self.say(f"step {step:>{len(str(cfg.num_steps))}}/{cfg.num_steps}  loss {event['loss']:.4f}  "
                     f"cross-entropy {event['cross_entropy']:.4f}  lr {event['lr']:.2e}  "
                     f"grad {event['grad_norm']:.3f}  {speed}  zero gates {levels}", True)
        shut = [l for l, target in enumerate(mean_targets(cfg)) if target > 0.1 and zeros[l] > 0.99]
        self.shut_steps = self.shut_steps + 1 if shut and cfg.rule.targets else 0
        if self.shut_steps == 50:
            self.say(f"WARNING: levels {shut} are closed to over 99% of the tokens, for 50 steps now, "
                     "against their targets: try --router_width 64 --coef_update 0.03")
        self.bar.set_postfix_str(
            f"loss {event['cross_entropy']:.3f}, sparsity {fmean(zeros):.2f}, {speed}", False)
        self.bar.update()

    def validation(self, event):
        self.event("val", event)
        self.say(f"step {event['step']}/{self.cfg.num_steps}  validation {event['cross_entropy']:.4f} nats  "
                 f"sparsity {fmean(event['gate_zero']):.3f}")
        self.show("--plot", wait=not self.rt.cuda)

    def show(self, *flags, wait):
        """Have records/show.py draw the record, and say what there is to say of it. A process of its own:
        GPUs do not wait for it; a CPU does, which two processes at once would take longer."""
        tool = ROOT / "records" / "show.py"
        busy = self.artist and (self.artist.wait() if wait else self.artist.poll()) is None
        if self.rt.main and tool.exists() and not busy:
            self.artist = subprocess.Popen([sys.executable, tool, self.folder, "--log", *flags],
                                           start_new_session=True)
            if wait:
                self.artist.wait()

    def write(self, name, content):
        """A whole file of JSON or none."""
        if self.rt.main:
            text = json.dumps(content, indent=1) + "\n"
            write_atomically(self.folder / name, lambda f: f.write(text.encode()))


@contextmanager
def writing(path, undo=lambda: None):
    """What cannot be written is undone, and a UserError."""
    try:
        yield
    except (OSError, RuntimeError) as e:  # torch.save turns a write's OSError into a RuntimeError
        undo()
        reason = getattr(e, "strerror", None) or f"is the disk full? {e}"
        raise UserError(f"{path} cannot be written: {reason}; what was saved before is whole: mend this, "
                        f"then go on with --resume {path.parent}")


def write_atomically(path, write):
    """The file appears whole or not at all: temporary file, fsync, rename. Raises UserError."""
    partial = path.with_name(path.name + ".partial")
    with writing(path, lambda: partial.unlink(missing_ok=True)):
        with open(partial, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(partial, path)


def rounded(event):
    """Six significant digits of every number: what a record keeps."""
    return json.loads(json.dumps(event), parse_float=lambda digits: float(f"{float(digits):.6g}"))


def make_folder(parent, name):
    """parent/YYYY-MM-DD_HH-MM-SS_NAME (UTC), new: where it exists, with a suffix."""
    stamp = datetime.now(timezone.utc).strftime("%Y-%m-%d_%H-%M-%S_") + name
    for suffix in itertools.count(1):
        folder = parent / (stamp if suffix == 1 else f"{stamp}_{suffix}")
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            continue
        except OSError as e:
            raise UserError(f"--records_dir {parent} cannot be written: {e.strerror}")


def read_json(path):
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as e:
        raise UserError(f"{path} cannot be read as JSON: {e}")
    if not isinstance(value, dict):
        raise UserError(f"{path} is not a JSON object")
    return value


def run_quietly(*command):
    """What a program prints, or None where there is no such program or it fails."""
    with suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True,
                              cwd=ROOT).stdout.strip()


def source_hash():
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()


def environment(rt, shards):
    return {
        "command": shlex.join(["python", *sys.argv]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "git_commit": run_quietly("git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"),
        "source_sha256": source_hash(), "python": platform.python_version(),
        "packages": {"torch": torch.__version__, "numpy": np.__version__},
        "device": torch.cuda.get_device_name() if rt.cuda else processor_name(), "world_size": rt.world,
        "threads": torch.get_num_threads(), "dtype": str(rt.dtype).split(".")[1],
        "compile": rt.compile, "nvidia_smi": run_quietly("nvidia-smi"),
        "shards": {split: [{"name": path.name, "tokens": len(open_shard(path))} for path in s.paths]
                   for split, s in shards.items()},
    }


def peak_memory(rt):
    """Bytes: of the CUDA allocator, or the peak resident set of the process."""
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # (as Linux counts)
    return torch.cuda.max_memory_allocated() if rt.cuda else 1024 * kilobytes


def processor_name():
    with suppress(OSError, TypeError):  # no such file, or no such line in it
        return re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[1].strip()
    return platform.machine()


def shown(value):
    """A path as the records show it: relative to the project where it lies inside it."""
    return value.removeprefix(f"{ROOT}/") if isinstance(value, str) else value


# ----------------------------------------------------------------------------------------------------------
# Checkpoints: ours to go on from, and weights. (./run.sh convert brings others' into this form.)

def checkpoints(folder):
    """Oldest first; also the authors', which have another name."""
    steps = {path: re.fullmatch(r"(?:checkpoint_|state_step)(\d+)\.pt", path.name)
             for path in folder.glob("*.pt")}
    return sorted(filter(steps.get, steps), key=lambda path: int(steps[path][1]))


def read_checkpoint(path):
    """What a .pt or .safetensors file holds, tensors and plain values: a pickle that runs code is refused."""
    try:
        if path.suffix == ".safetensors":
            return load_safetensors(path)
        with zipfile.ZipFile(path) as z:
            if damaged := z.testzip():
                raise ValueError(f"{damaged} fails its checksum")
        return dict(torch.load(path, map_location="cpu", weights_only=True, mmap=True))
    except Exception as e:  # torch.load raises many kinds
        reason = str(e).strip().split("\n")[0][:160]
        raise UserError(f"checkpoint {path} is damaged or not a checkpoint ({reason}); use an earlier one")


def read_weights(source):
    """(settings, tensors by name) of a record, a folder with config.json and model.safetensors, or a file
    beside its config.json. Either may lie under "model", as in the authors' plain layout."""
    path = Path(source)
    folder = path if path.is_dir() else path.parent
    if path.is_dir():
        path = [path, *path.glob("model.safetensors"), *checkpoints(path)][-1]
    if not path.is_file():
        raise UserError(f"checkpoint {source} does not exist, or has no checkpoint_*.pt or "
                        "model.safetensors; fetch one from a hub with ./run.sh convert")
    settings, state = (x.get("model", x) for x in (read_json(folder / "config.json"), read_checkpoint(path)))
    if not (isinstance(settings, dict) and isinstance(state, dict)):
        raise UserError(f"checkpoint {path} or its config.json is not a dictionary by names; is it one of a "
                        "model?")
    # The authors store a dense model with routers that are all zero, from which nothing would ever learn.
    return settings, {k: v for k, v in state.items() if not str(k).startswith("masks.") or v.any()}


def checkpoint_settings(settings, explicit, source):
    """The Config fields that a checkpoint fixes. UserError where a flag disagrees."""
    fixed = {k: settings[k] for k in (*MODEL_FIELDS, "encoding") if settings.get(k) is not None}
    if missing := {"dim", "n_layers", "n_heads", "vocab_size"} - fixed.keys():
        raise UserError(f"checkpoint {source}: its config.json does not say {min(missing)}")
    for k in SIZES:
        if k in fixed and explicit.get(k, fixed[k]) != fixed[k]:
            raise UserError(f"--{k} {explicit[k]} disagrees with checkpoint {source}, which has {fixed[k]}: "
                            "leave the flag out")
    return fixed


def load_weights(model, state, source):
    """Load tensors of any float type; UserError where names or shapes are not the model's. Beside a dense
    model's weights new routers begin without a preference, and so nearly open that it runs as it did."""
    for p in model.masks.parameters():
        nn.init.zeros_(p)
    try:
        model.load_state_dict(model.masks.state_dict(prefix="masks.") | state)
    except (AttributeError, TypeError, RuntimeError) as e:
        reason = " ".join(str(e).split())[:300]
        raise UserError(f"checkpoint {source} does not fit ({reason}); are --control and --norm those that "
                        "it was trained with?")
    for router in model.masks:
        if not router.linear.weight.any():
            nn.init.constant_(router.linear.bias, 0.01)


def export_weights(model, path):
    write_atomically(path, lambda f: f.write(safetensors_bytes(model.state_dict())))


# ----------------------------------------------------------------------------------------------------------
# Training.

def build_model(cfg, rt, state=None, source=""):
    model = MiddleSkippingTransformer(cfg)
    initialise(model, cfg)
    if state is not None:
        load_weights(model, state, source)
    model.to(rt.device)
    model.lower = compiled if rt.compile else eager
    return model


class Trainer:
    """A run: model, optimizer, control, loader and clock, and what a step does to them."""

    def __init__(self, cfg, weights):
        self.cfg = cfg
        self.rt = rt = Runtime(cfg)
        self.shards = {split: Shards(cfg, split) for split in ("train", "val")}
        shards = self.shards["train"]
        self.loader = TrainLoader(shards, cfg, rt)
        sequences(self.shards["val"], cfg)  # (which checks that there are some)
        cfg.num_steps = given(cfg.num_steps, len(self.loader.steps))
        cfg.encoding, cfg.document_token = shards.encoding, given(cfg.document_token, shards.document_token)
        if cfg.mask_documents and given(cfg.document_token, math.inf) >= cfg.vocab_size:
            raise UserError(f"--mask_documents: which of {cfg.vocab_size} tokens begins a document? Name it "
                            "with --document_token")
        self.model = build_model(cfg, rt, weights, cfg.init_from)
        self.optimizers, self.control = make_optimizers(self.model, cfg), GateControl(cfg, rt.device)
        self.parts = {"model": self.model, "control": self.control} | self.optimizers  # of a checkpoint
        self.first_step, self.train_s, self.train_flops = 0, 0.0, 0.0
        self.signals = 0  # that this rank got
        self.parallel = self.model
        self.compile_s = self.warm_up() if rt.compile else 0.0
        if rt.world > 1:
            self.parallel = nn.parallel.DistributedDataParallel(
                self.model, gradient_as_bucket_view=True, broadcast_buffers=False)  # (which never change)

    def warm_up(self):
        """Compile before the clock starts: a training micro-batch and a validation one, with gates that close
        and as they come. Seconds."""
        start, batch = time.perf_counter(), self.loader.read(0)
        state = copy.deepcopy(self.model.masks.state_dict())
        for bias in (1.0, 0.0):
            with self.rt.autocast(), torch.no_grad():
                for router in self.model.masks:
                    router.linear.bias += bias
                self.model(*batch)
            self.micro_step(*batch)
            self.model.masks.load_state_dict(state)
        self.model.zero_grad(set_to_none=True)
        return time.perf_counter() - start

    def micro_step(self, x, y):
        """Forward and backward of one micro-batch: (loss, cross-entropy, gate statistics)."""
        with self.rt.autocast():
            ce, stats = self.parallel(x, y)
        loss = ce + self.control.loss(moments(stats, x.numel()))
        (loss / self.loader.accumulation).backward()
        return loss.detach(), ce.detach(), stats.detach()

    def gradients(self):
        """Those of a step's micro-batches. Returns, of all ranks: their mean loss, cross-entropy and active
        tokens a micro-batch, (R, 3); the gate statistics (L/2, 4); and the signals that came."""
        rt, A = self.rt, self.loader.accumulation
        ranks = torch.zeros(rt.world, 3, dtype=torch.float64, device=rt.device)
        stats = ranks.new_zeros(self.cfg.n_levels, 4)
        for a in range(A):
            alone = rt.world > 1 and a + 1 < A  # gradients are averaged over ranks once a step
            with self.parallel.no_sync() if alone else nullcontext():
                loss, ce, sums = self.micro_step(*self.loader.read(a))
            ranks[rt.rank] += torch.stack((loss, ce, sums[:, 2].sum())) / A
            stats += sums
        signals = ranks.new_full((), self.signals)
        rt.sum(ranks, stats, signals)
        return ranks, stats, signals

    def train_step(self, step):
        """One optimizer step and one of the controller's; returns the record's event."""
        start, cfg, lr = time.perf_counter(), self.cfg, learning_rate(step, self.cfg)
        ranks, stats, signals = self.gradients()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), cfg.max_grad_norm or math.inf)
        losses, entropies, active = ranks.T.tolist()  # the host waits here
        check_finite(step, loss=sum(losses), gradient=norm.item())
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = lr * group["scale"]
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.control.update(moments(stats, cfg.step_tokens))
        self.loader.place += 1
        self.stopping = signals.item() > 0  # (and a GPU is waited for)
        seconds = time.perf_counter() - start
        self.train_s += seconds
        self.train_flops += 3 * realised_flops(cfg, stats, cfg.step_tokens)
        alpha, beta = (mirrored(x, cfg) for x in self.control.coef)
        event = {
            "step": step, "tokens": (step + 1) * cfg.step_tokens, "train_s": self.train_s,
            "loss": fmean(losses), "cross_entropy": fmean(entropies), "lr": lr, "grad_norm": norm.item(),
            "tokens_per_s": cfg.step_tokens / seconds, **gate_report(cfg, stats.cpu(), cfg.step_tokens),
            "mean_coef": alpha, "var_coef": beta}
        if len(active) > 1:  # tokens of the busiest rank, in units of the mean over ranks
            event["rank_imbalance"] = max(active) / max(fmean(active), 1.0)
        return rounded(event)

    def interrupt(self, number, frame):
        """The first SIGTERM or SIGINT ends the run after this step; a second one ends it at once."""
        self.signals += 1
        if self.signals > 1:
            os._exit(128 + number)

    def save(self, step, record):
        if not self.rt.main:
            return
        with writing(record.folder / "metrics.jsonl"):
            os.fsync(record.metrics.fileno())
        state = {name: part.state_dict() for name, part in self.parts.items()} | {
            "step": step, "place": self.loader.place, "train_s": self.train_s,
            "train_flops": self.train_flops, "rng": torch.get_rng_state(),
            "record_bytes": os.fstat(record.metrics.fileno()).st_size}
        write_atomically(record.folder / f"checkpoint_{step}.pt", lambda f: torch.save(state, f))
        for path in checkpoints(record.folder)[:-2]:
            path.unlink()

    def restore(self, state, source):
        try:
            for name, part in self.parts.items():
                part.load_state_dict(state[name])
            self.loader.place = int(state["place"])
            torch.set_rng_state(state["rng"])
            self.train_s, self.train_flops = float(state["train_s"]), float(state["train_flops"])
            self.first_step = range(self.cfg.num_steps + 1)[state["step"]]
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as e:
            raise UserError(f"checkpoint {source} is not one of this run ({type(e).__name__}: {e}); remove "
                            "it to go on from an earlier one")


def check_finite(step, **values):
    for what, value in values.items():
        if not math.isfinite(value):
            raise Divergence(f"the {what} is not finite at step {step}; the weights are as before it")


def train(cfg, weights):
    """The run of a configuration; returns the exit status."""
    state, source = latest_checkpoint(Path(cfg.resume)) if cfg.resume else (None, None)
    trainer = Trainer(cfg, weights)
    if state:
        trainer.restore(state, source)
    first, rt = trainer.first_step, trainer.rt
    rt.sum(total := torch.tensor(first, device=rt.device))
    if total != rt.world * first:
        raise RankError(f"--resume {cfg.resume}: here its last checkpoint is of step {first}, elsewhere of "
                        "another: copy the record to every machine")
    record = Record(cfg, rt, first)
    if rt.main:
        open_record(trainer, record, state)
    for number in signal.SIGTERM, signal.SIGINT:
        signal.signal(number, trainer.interrupt)
    return run(trainer, record)


def run(trainer, record):
    """From the trainer's first step to the last, or until a signal or --target_loss ends it. Returns the exit
    status."""
    cfg = trainer.cfg
    for step in range(trainer.first_step, cfg.num_steps + 1):
        last = step == cfg.num_steps
        if step > trainer.first_step and (last or step % cfg.save_every == 0):
            trainer.save(step, record)
        if last or step % cfg.val_every == 0:
            event = rounded({"step": step, **evaluate(trainer.model, cfg, trainer.rt, trainer.shards["val"])})
            check_finite(step, validation_loss=event["cross_entropy"])
            reached = event["cross_entropy"] <= given(cfg.target_loss, -math.inf)
            if reached:
                trainer.save(step, record)
            record.validation(event)
            if last or reached:
                return finish(trainer, record, event)
        record.step(trainer.train_step(step))
        if trainer.stopping:
            trainer.save(step + 1, record)
            record.write("summary.json", {
                "interrupted": True, "step": step + 1, "train_seconds": trainer.train_s})
            record.say(f"interrupted after step {step + 1}; go on with: ./run.sh --resume {record.folder}")
            return 0


def latest_checkpoint(folder):
    """The newest checkpoint of a record that is whole, and its path; (None, None) where there is none yet."""
    found = checkpoints(folder)
    for path in reversed(found):
        try:
            state, size = read_checkpoint(path), (folder / "metrics.jsonl").stat().st_size
            if size < state["record_bytes"]:
                raise UserError(f"metrics.jsonl has {size} bytes, fewer than when {path} was written")
            return state, path
        except (UserError, OSError, LookupError, TypeError) as e:
            tell("WARNING", f"{path} cannot be used ({e}); trying the checkpoint before")
    if found:
        raise UserError(f"--resume {folder}: none of its checkpoints can be used; remove them to start at "
                        "step 0")
    done = folder / "summary.json"
    if done.exists() and not read_json(done).get("interrupted"):
        raise UserError(f"--resume {folder}: it is finished and has no checkpoint; run its settings again "
                        f"with --config {folder}")
    return None, None


def open_record(trainer, record, state):
    """Write what is known at the start; or, on resume, cut the metrics back to the checkpoint."""
    cfg, env = trainer.cfg, environment(trainer.rt, trainer.shards)
    if cfg.resume:
        record.metrics.truncate(state["record_bytes"] if state else 0)
        for path in checkpoints(record.folder):
            if int(path.stem.split("_")[1]) > trainer.first_step:
                path.unlink()  # it could not be read
        record.say(f"resumed at step {trainer.first_step} on {env['device']} by script "
                   f"{env['source_sha256'][:16]} (it began with the one in env.json)")
        return
    record.write("env.json", env)
    with writing(record.folder / "log.txt"):
        shutil.copy(__file__, record.folder)
    record.write("config.json", {k: shown(v) for k, v in asdict(cfg).items()})
    record.show("--opening", wait=True)


def finish(trainer, record, last):
    """Weights, summary, and the closing lines; last: the last validation."""
    rt, step, seconds = trainer.rt, last["step"], trainer.train_s
    if not rt.main:
        return 0
    export_weights(trainer.model, record.folder / "model.safetensors")
    speed = step * trainer.cfg.step_tokens / max(seconds, 1e-9)
    record.write("summary.json", last | {
        "interrupted": False, "sparsity": fmean(last["gate_zero"]),
        "train_flops": trainer.train_flops,  # realised, exact
        "train_seconds": seconds, "compile_seconds": trainer.compile_s, "tokens_per_s": speed,
        "peak_memory_bytes": peak_memory(rt),
        # with nanoseconds of computing, of averaging gradients, and of both at once
        "ddp": getattr(trainer.parallel, "_get_ddp_logging_data", dict)()})
    record.bar.close()
    record.say(f"\nvalidation loss {last['cross_entropy']:.4f} nats a token, {step} steps in {seconds:.0f} "
               f"s, {speed:.0f} tokens/s; record: {record.folder}")
    record.show(wait=True)
    return 0


# ----------------------------------------------------------------------------------------------------------
# Command line.

def parse_settings(parser, argv, names=FIELDS):
    """All arguments, with a flag for each of these fields of Config beside the parser's own; and the fields
    given. (A tool's names are other than all, and so are its defaults.)"""
    groups = {}
    for name in names:
        f = FIELDS[name]
        kind, of = f.type.split(" | ")[0], f.metadata["of"]
        if of not in groups:
            groups[of] = parser.add_argument_group(of)
        how = {"action": argparse.BooleanOptionalAction} if kind == "bool" else {
            "type": TYPES[kind], "choices": f.metadata["choices"] or None}
        default = "" if names is not FIELDS or f.default is None else f" (default: {f.default})"
        groups[of].add_argument(f"--{name}", default=argparse.SUPPRESS, help=f.metadata["help"] + default,
                                **how)
    args = parser.parse_args(argv)
    return args, {name: value for name, value in vars(args).items() if name in names}


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message} (--help lists all flags)")


def resolve(explicit):
    """Defaults, then a preset, a record's settings or a checkpoint's sizes, then flags; and the checkpoint's
    weights, if there is one."""
    settings, weights = PRESETS.get(explicit.get("preset"), {}), None
    if "config" in explicit:
        if "preset" in explicit:
            raise UserError("--preset and --config both choose the settings: leave one out")
        settings = recorded_settings(explicit["config"])
    resume = explicit.get("resume")
    if resume:
        settings = recorded_settings(resume)
        for k in explicit.keys() - RESUME_MAY_CHANGE:
            if settings.get(k) != shown(explicit[k]):
                raise UserError(f"--{k} {explicit[k]} disagrees with the record {resume}, which has "
                                f"{settings.get(k)}: leave the flag out")
    elif "control" in explicit:  # another rule's coefficients are its own
        settings = {k: v for k, v in settings.items() if k not in COEFFICIENTS}
    source = (settings | explicit).get("init_from")
    if source and not (resume and checkpoints(Path(resume))):
        stored, weights = read_weights(source)
        fixed = checkpoint_settings(stored, explicit, source)
        named = "init_from" in explicit and not resume  # (else a record names it, whose settings are its own)
        settings = settings | fixed if named else fixed | settings
    return Config(**settings | explicit), weights


RESUME_MAY_CHANGE = {"resume", "init_from", "device", "compile", "log_every", "save_every", "records_dir",
                     "name", "device_batch_size"}


def recorded_settings(source):
    """Of a record's folder, its config.json, or a run PARENT/NAME that is packed into PARENT/runs.jsonl."""
    path = Path(source)
    archive = path.parent / "runs.jsonl"
    if not path.exists() and archive.exists():
        found = [line for line in open(archive) if line.startswith(f'{{"name":"{path.name}"')]
        if not found:
            raise UserError(f"{archive} holds no run {path.name}")
        run = json.loads(found[-1])
        settings = run["config"]
        if not source_hash().startswith(run["script"]):
            tell("note", f"{path.name} was trained by {archive.parent}/scripts/{run['script']}.py")
    else:
        settings = read_json(path / "config.json" if path.is_dir() else path)
    if unknown := sorted(settings.keys() - FIELDS.keys()):
        raise UserError(f"{path} has an unknown key: {unknown[0]}; is it a record's config.json?")
    return settings


def tell(kind, what, own=False):
    """One line on standard error: of what only this rank may see, or, once a machine, of what all see."""
    if own or environ.get("LOCAL_RANK", "0") == "0":
        rank = f"rank {environ.get('RANK', 0)}: " if own else ""
        print(f"{Path(sys.argv[0]).name}: {kind}: {rank}{' '.join(str(what).split())}", file=sys.stderr)


def exit_status(run):
    """What run() returns; or, where it fails by what a user can mend, one line and a status. What nobody
    expected keeps its traceback."""
    try:
        status = run()
        if dist.is_initialized():
            dist.destroy_process_group()  # (not after a failure: nccl might wait for the others)
        return status
    except UserError as e:
        tell("error", e, isinstance(e, RankError))
        return 2
    except Divergence as e:
        tell("stopped", f"{e}; try a lower --lr, --max_grad_norm 1 or --norm sandwich")
        return 3
    except KeyboardInterrupt:
        tell("stopped", "interrupted")
        return 130
    except (RuntimeError, MemoryError) as e:
        if isinstance(e, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(e):
            tell("error", f"out of memory: use a smaller --device_batch_size ({str(e)[:100]})", own=True)
            return 2
        if isinstance(e, dist.DistError) or "gloo/transport" in str(e):
            tell("stopped", f"lost the other processes ({str(e)[:100]}); go on with --resume")
            return 1
        raise


def main(argv=None):
    parser = Parser(usage="%(prog)s [--FLAG VALUE]...", description="Train a model and write a record.",
                    allow_abbrev=False)
    return exit_status(lambda: train(*resolve(parse_settings(parser, argv)[1])))


if __name__ == "__main__":
    try:
        status = main()
    except Exception:
        traceback.print_exc()
        status = 1
    if "RANK" in environ:
        # Of several processes one ends at once: DDP leaves gloo's threads behind, which abort the process if
        # they drop a tensor while Python shuts down, and a rank that failed must not wait for the others.
        os._exit(status)
    sys.exit(status)
