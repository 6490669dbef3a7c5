"""The specification of train_gpt_skip.py as tests: each name is a sentence of it, groups follow the script.

The oracle is a transcription of the paper's equations in float64, with loops, that shares no code with the
script.
"""
import copy
import dataclasses
import errno
import fcntl
import functools
import hashlib
import importlib
import importlib.util
import json
import math
import os
import pickle
import pty
import random
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import sysconfig
import tempfile
import termios
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from statistics import fmean as mean
from types import SimpleNamespace

import numpy as np
import pytest
import tiktoken
import torch
from hypothesis import HealthCheck, given, settings, strategies as st

import train_gpt_skip as tgs
from train_gpt_skip import Config, MiddleSkippingTransformer, UserError

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "data"))
sys.path.insert(0, str(ROOT / "records"))
import bench
import convert
import evaluate
import sample
import show
import tokenize_text
import tool

TINY = dict(
    dim=16,
    n_layers=4,
    n_heads=2,
    vocab_size=11,
    max_seq_len=8,
    batch_size=4,
    device_batch_size=2,
    num_steps=3,
)
MASKED_DOCUMENTS = dict(mask_documents=True, document_token=4)
torch.set_num_threads(1)  # the cases are tiny
os.environ["OMP_NUM_THREADS"] = "1"
few = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


# ----------------------------------------------------------------------------------------------------------
# The oracle: Eq. 1-5 and Llama 3's modules, a token at a time.

def oracle_norm(x, w, eps):
    return x / torch.sqrt((x * x).mean() + eps) * w


def oracle_rope(x, i, cfg):
    y = x.clone()
    for p in range(0, len(x), 2):
        angle = i * cfg.rope_theta ** (-p / len(x))
        c = math.cos(angle)
        s = math.sin(angle)
        y[p] = x[p] * c - x[p + 1] * s
        y[p + 1] = x[p] * s + x[p + 1] * c
    return y


def oracle_attention(x, g, P, p, cfg):
    """Eq. 3 for every head; x: normalised inputs of one sequence; g: the gates of its keys."""
    D = cfg.dim // cfg.n_heads
    group = cfg.n_heads // cfg.n_kv_heads
    q = [(P[p + "wq.weight"] @ v).view(-1, D) for v in x]
    k = [(P[p + "wk.weight"] @ v).view(-1, D) for v in x]
    v = [(P[p + "wv.weight"] @ v).view(-1, D) for v in x]
    out = []
    for i in range(len(x)):
        heads = []
        for h in range(cfg.n_heads):
            query = oracle_rope(q[i][h], i, cfg)
            top = bottom = 0
            for j in range(i + 1):
                key = oracle_rope(k[j][h // group], j, cfg)
                weight = torch.exp(query @ key / math.sqrt(D))
                weight = weight * (torch.clamp(g[j], min=1e-6) if g[j] > 0 else 0)
                top = top + weight * v[j][h // group]
                bottom = bottom + weight
            heads.append(top / bottom if bottom > 0 else top)
        out.append(P[p + "wo.weight"] @ torch.cat(heads))
    return out


def oracle_block(h, g, P, l, cfg):
    p = f"layers.{l}."

    def norm(v, name):
        return oracle_norm(v, P[f"{p}{name}_norm.weight"], cfg.norm_eps)

    def after(v, name):
        return norm(v, "post_" + name) if cfg.norm == "sandwich" else v

    x = [norm(v, "pre_attention") for v in h]
    keys = g if cfg.gate_attention == "keys" else torch.ones(len(g))
    out = []
    for v, w, y in zip(h, g, oracle_attention(x, keys, P, p + "attention.", cfg)):
        a = v + w * after(y, "attention")
        x = norm(a, "pre_feed_forward")
        u = P[p + "feed_forward.w1.weight"] @ x
        y = u / (1 + torch.exp(-u)) * (P[p + "feed_forward.w3.weight"] @ x)
        out.append(a + w * after(P[p + "feed_forward.w2.weight"] @ y, "feed_forward"))
    return out


def oracle_sequence(tokens, P, cfg):
    """Logits (T, V) and gates (L, T) of one sequence."""
    L = cfg.n_layers
    h = [P["tok_embeddings.weight"][t] for t in tokens]
    if cfg.norm != "llama":
        h = [oracle_norm(v, P["input_norm.weight"], cfg.norm_eps) for v in h]
    S = torch.zeros(len(h), dtype=torch.float64)
    gates = [torch.ones_like(S) for _ in range(L)]
    for l in range(L):
        if cfg.gated and l < L // 2:
            w = P[f"masks.{l}.linear.weight"][0]
            b = P[f"masks.{l}.linear.bias"][0]
            S = [s + torch.relu(w @ v + b) for s, v in zip(S, h)]  # Eq. 1
            gates[l] = torch.stack([1 - s if s < 1 else torch.zeros_like(s) for s in S])  # Eq. 2
            gates[L - 1 - l] = gates[l]
        h = oracle_block(h, gates[l], P, l, cfg)
    h = [oracle_norm(v, P["output_norm.weight"], cfg.norm_eps) for v in h]
    return torch.stack([P["output.weight"] @ v for v in h]), torch.stack(gates)


def oracle_forward(tokens, P, cfg):
    """(logits (B, T, V), gates (L, B, T)) of tokens (B, T), from parameters P by released name, float64."""
    parts = [oracle_sequence(part, P, cfg) for row in tokens for part in seen_apart(row, cfg)]
    logits, gates = torch.cat([x for x, _ in parts]), torch.cat([g for _, g in parts], 1)
    return logits.view(*tokens.shape, -1), gates.view(-1, *tokens.shape)


def seen_apart(row, cfg):
    """What sees nothing of the others in a row of tokens: with --mask_documents its documents."""
    begin = cfg.document_token if cfg.mask_documents else None
    return row.tensor_split([i for i in range(1, len(row)) if row[i] == begin])


def oracle_loss(logits, gates, targets, alpha, beta):
    """Cross-entropy plus Eq. 5, with alpha and beta of all L layers."""
    rows = zip(logits.flatten(0, 1), targets.flatten())
    loss = sum(torch.logsumexp(row, 0) - row[t] for row, t in rows) / targets.numel()
    for g, a, b in zip(gates.flatten(1), alpha, beta):
        m = g.sum() / len(g)
        variance = ((g - m) ** 2).sum() / len(g)
        loss = loss + (a * m + b * variance) / len(gates)
    return loss


def random_model(seed=0, closing=0.0, **kw):
    """A model whose gates close more the larger `closing` is (about 0.5: half of the tokens)."""
    cfg = Config(**(TINY | kw))
    model = MiddleSkippingTransformer(cfg)
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        torch.nn.init.normal_(p, 1.0 if "norm" in name else 0.0, 0.3, generator=generator)
        if name.endswith("linear.bias"):
            p.data = p.data * 0.1 + closing
    return model, cfg


def random_tokens(cfg, B=2, T=6, seed=0):
    x = torch.randint(cfg.vocab_size, (B, T + 1), generator=torch.Generator().manual_seed(seed))
    return x[:, :-1], x[:, 1:]


def model_logits(model, tokens):
    """Logits (B, T, V) and depths (B, T)."""
    B, T = tokens.shape
    lengths = torch.tensor([len(part) for row in tokens.cpu() for part in seen_apart(row, model.cfg)])
    seq = torch.arange(len(lengths)).repeat_interleave(lengths)
    h, levels = model.hidden(tokens.flatten(), seq, torch.arange(T).repeat(B), len(lengths))
    depth = tool.blocks_run(levels, B * T, model.cfg.n_layers)
    return model.output(h).view(B, T, -1), depth.view(B, T)


def backward(model, ce, stats, n):
    """Of a loss that every gate has a part in: what it is made of, and every parameter's gradient."""
    model.zero_grad()
    (ce + 0.3 * tgs.moments(stats, n).sum()).backward()
    return [ce, stats[:, :3], *(p.grad for p in model.parameters())]


def close(a, b, rtol=1e-4, atol=1e-5):
    torch.testing.assert_close(a.double(), b.double(), rtol=rtol, atol=atol)


# ----------------------------------------------------------------------------------------------------------
# Model

@pytest.mark.parametrize("kw", [
    dict(),
    dict(closing=0.6, n_layers=6),
    dict(closing=1.5),
    dict(closing=0.3, n_kv_heads=1),
    dict(closing=0.3, norm="pre"),
    dict(closing=0.3, norm="llama"),
    dict(closing=0.3, n_layers=2),
    dict(closing=0.3, gate_attention="none", compute="masked"),
    dict(control="dense"),
    dict(control="dense", n_layers=3),
    dict(control="dense", n_layers=1),
    dict(closing=0.3, **MASKED_DOCUMENTS),
    dict(control="dense", **MASKED_DOCUMENTS),
], ids=str)
def test_outputs_loss_and_every_gradient_are_those_of_the_paper_equations(kw):
    model, cfg = random_model(1, **kw)
    inputs, targets = random_tokens(cfg)
    control = tgs.GateControl(cfg, "cpu")
    level = torch.arange(cfg.n_levels, dtype=torch.float64)
    if cfg.gated:
        control.coef = torch.stack((0.7 + 0.1 * level, 0.3 - 0.4 * level))
    P = {name: p.detach().double().requires_grad_() for name, p in model.named_parameters()}
    logits, gates = oracle_forward(inputs, P, cfg)
    want = oracle_loss(logits, gates, targets, *torch.cat((control.coef, control.coef.flip(1)), 1))
    gradients = torch.autograd.grad(want, list(P.values()), allow_unused=True, materialize_grads=True)

    ce, stats = model(inputs, targets)
    loss = ce + control.loss(tgs.moments(stats, inputs.numel()))
    loss.backward()
    close(model_logits(model, inputs)[0], logits)
    close(loss, want, 1e-5, 1e-6)
    report = tgs.gate_report(cfg, stats.detach(), inputs.numel())
    close(torch.tensor(report["gate_mean"]), gates.mean((1, 2)))
    close(torch.tensor(report["gate_zero"]), (gates == 0).double().mean((1, 2)))
    for p, exact in zip(model.parameters(), gradients):
        scale = exact.abs().max() + 1e-3
        close(p.grad / scale, exact / scale, 1e-3, 1e-4)


@few
@given(
    seed=st.integers(0, 99),
    closing=st.floats(0, 2),
    n_layers=st.sampled_from([2, 4, 8]),
    B=st.integers(1, 4),
    T=st.integers(1, 8),
    heads=st.sampled_from([(1, 1), (2, 1), (4, 2), (4, 4)]),
    documents=st.sampled_from([{}, MASKED_DOCUMENTS]),
)
def test_packed_and_masked_agree_in_the_loss_and_in_every_gradient(
        seed, closing, n_layers, B, T, heads, documents):
    model, cfg = random_model(seed, closing, n_layers=n_layers, n_heads=heads[0], n_kv_heads=heads[1],
                              **documents)
    inputs, targets = random_tokens(cfg, B, T, seed)
    packed = backward(model, *model(inputs, targets), B * T)
    model.cfg.compute = "masked"
    masked = backward(model, *model(inputs, targets), B * T)
    for a, b in zip(packed, masked):  # float32 sums in another order: to 1e-4 of a tensor's largest number
        close(a, b, atol=1e-4 * max(0.1, b.abs().max().item()))


@pytest.mark.parametrize("gate_attention", ["keys", "none"])
def test_a_skipped_position_changes_nothing_that_other_positions_see(gate_attention):
    """Tokens 0 and 1 skip at the first router; one for the other leaves all other logits the same, bit for
    bit. With the released code's attention (no gate on keys) it does not."""
    model, _ = random_model(2, gate_attention=gate_attention, compute="masked")
    with torch.no_grad():
        model.masks[0].linear.weight.zero_()[0, 0] = 10.0
        model.masks[0].linear.bias.fill_(-5.0)
        model.masks[1].linear.bias.fill_(-100.0)
        model.tok_embeddings.weight[:, 0] = 0.0
        model.tok_embeddings.weight[:2, 0] = 3.0
    a, depth = model_logits(model, torch.tensor([[5, 0, 3, 4, 0, 6]]))
    b, _ = model_logits(model, torch.tensor([[5, 1, 3, 4, 0, 6]]))
    assert depth.tolist() == [[4, 0, 4, 4, 0, 4]]
    others = [0, 2, 3, 4, 5]
    assert torch.equal(a[:, others], b[:, others]) == (gate_attention == "keys")


def test_the_released_bias_on_query_rows_changes_nothing():
    """Why its gate masks nothing: a constant added to a row of logits cancels in the softmax."""
    logits = torch.randn(6, 6)
    ln_g = torch.rand(6).clamp(min=1e-6).log()
    close((logits + ln_g[:, None]).softmax(-1), logits.softmax(-1))
    assert not torch.allclose((logits + ln_g).softmax(-1), logits.softmax(-1), atol=1e-3)


@pytest.mark.parametrize("compute", ["packed", "masked"])
def test_no_position_sees_a_later_one(compute):
    """Also in sequences of several blocks of queries."""
    T = 2 * tgs.QUERY_ROWS + 1
    model, cfg = random_model(4, closing=0.3, compute=compute, max_seq_len=T)
    inputs, _ = random_tokens(cfg, 1, T)
    a, _ = model_logits(model, inputs)
    inputs[0, 200] = (inputs[0, 200] + 1) % cfg.vocab_size
    b, _ = model_logits(model, inputs)
    close(a[:, :200], b[:, :200])
    assert not torch.allclose(a[:, 200:], b[:, 200:])


def test_random_gates_are_open_as_often_as_their_targets_ask_nested_and_the_same_in_decoding():
    model, cfg = random_model(5, control="random", n_layers=6, mean_target_start=0.9, mean_target_end=0.2,
                              vocab_size=257, max_seq_len=64)
    inputs, targets = random_tokens(cfg, 64, 64)
    with torch.no_grad():
        _, stats = model(inputs, targets)
        _, depth = model_logits(model, inputs)
        check_decoding(model, [[1, 2, 3], [4]], 12)
        model.cfg.compute = "masked"
        _, masked = model(inputs, targets)
        model.cfg.seed = 1
        _, other_depth = model_logits(model, inputs)
    assert not model.masks
    close(stats[:, 2] / inputs.numel(), torch.tensor([0.9, 0.55, 0.2]), 0, 0.03)
    assert torch.equal(stats[:, 0], stats[:, 2])
    assert torch.equal(stats[:, :3], masked[:, :3])
    assert not torch.equal(depth, other_depth)


def test_a_gate_that_has_reached_zero_passes_no_gradient():
    S = torch.tensor([0.0, 0.5, 1.0, 1.5], requires_grad=True)
    router = tgs.Router(16)
    torch.nn.init.zeros_(router.linear.bias)
    _, g = router(torch.zeros(4, 16), S)
    g.sum().backward()
    assert g.tolist() == [1, 0.5, 0, 0]
    assert S.grad.tolist() == [-1, -1, 0, 0]


def test_a_batch_in_which_no_token_runs_any_block_still_gives_every_parameter_a_gradient():
    model, cfg = random_model(5, closing=99.0)
    ce, stats = model(*random_tokens(cfg))
    ce.backward()
    assert stats[:, 2].tolist() == [0, 0]
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("factor", [8, 32])
def test_scaled_rope_is_llama_3s(factor):
    cfg = Config(**TINY | dict(use_scaled_rope=True, dim=64, rope_theta=500000.0, rope_factor=factor))
    cos, _ = tgs.rope_table(cfg)
    for p in range(cfg.head_dim // 2):
        f = cfg.rope_theta ** (-2 * p / cfg.head_dim)
        wavelength = 2 * math.pi / f
        smooth = (8192 / wavelength - 1) / 3
        if wavelength > 8192:
            f = f / factor
        elif wavelength > 2048:
            f = (1 - smooth) * f / factor + smooth * f
        assert cos[5, p].item() == pytest.approx(math.cos(5 * f), abs=1e-5)


def test_initial_weights_are_normal_norms_one_and_router_biases_zero():
    cfg = Config(**TINY | dict(dim=128))
    model = MiddleSkippingTransformer(cfg)
    tgs.initialise(model, cfg)
    for name, p in model.named_parameters():
        if "norm" in name:
            assert (p == 1).all()
        elif name.endswith("bias"):
            assert (p == 0).all()
        else:
            assert p.std().item() == pytest.approx(0.02, rel=0.3), name
    model.extra = torch.nn.Linear(2, 2)
    with pytest.raises(RuntimeError, match="extra"):
        tgs.initialise(model, cfg)


# ----------------------------------------------------------------------------------------------------------
# FlexAttention's tables and kernel (CUDA's path), as far as a CPU can show them

@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(1, 300), min_size=1, max_size=8))
def test_mask_tables_are_those_of_the_dense_mask(lengths):
    padding = -sum(lengths) % tgs.ROWS
    lengths = torch.tensor(lengths + [padding])
    seq = torch.arange(len(lengths)).repeat_interleave(lengths)
    i = torch.arange(len(seq))
    causal = i[:, None] >= i
    dense = causal & (seq[:, None] == seq)
    blocks = dense.unflatten(1, (-1, tgs.ROWS)).unflatten(0, (-1, tgs.ROWS)).transpose(1, 2)
    full = blocks.all(-1).all(-1)
    part = blocks.any(-1).any(-1) & ~full
    start, *tables = tgs.mask_tables(seq)
    assert torch.equal(causal & (i >= start[:, None]), dense)
    # both kinds by query block, then by key block
    for (counts, indices), want in zip(zip(tables[::2], tables[1::2]), (part, full, part.T, full.T)):
        for count, index, row in zip(counts[0, 0], indices[0, 0], want):
            assert sorted(index[:count].tolist()) == row.nonzero()[:, 0].tolist()


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("kw", [
    dict(closing=0.3, n_heads=4, n_kv_heads=2),
    dict(closing=1.5, n_kv_heads=1),
    dict(closing=0.3, compute="masked"),
    dict(control="dense"),
    dict(closing=0.3, **MASKED_DOCUMENTS),
], ids=str)
def test_the_padded_flex_path_computes_what_the_row_path_does(kw, monkeypatch):
    """The whole forward pass as on CUDA: rows padded to blocks, block masks, FlexAttention; also prompts and
    decoding."""
    model, cfg = random_model(9, max_seq_len=200, **kw)
    inputs, targets = random_tokens(cfg, 3, 200)
    results = []
    for flex in (False, True):
        monkeypatch.setattr(tgs, "uses_flex", lambda device: flex)
        with torch.no_grad():
            last, cached, _ = decoded(model, [[1, 2, 3], [4, 5]], 3)
            loss, stats = model(inputs, targets)
            results.append((cached, [loss, stats, last, *model_logits(model, inputs)]))
    (row_cached, rows), (flex_cached, padded) = results
    assert row_cached == flex_cached
    for a, b in zip(rows, padded):
        close(a, b)


def test_the_columns_that_carry_ln_g_give_eq_3_and_its_gradients():
    generator = torch.Generator().manual_seed(0)
    q, k, v, dy = torch.randn(4, 12, 2, 8, generator=generator, dtype=torch.float64)
    g = torch.rand(12, generator=generator, dtype=torch.float64).clamp(min=1e-6)
    g[::3] *= 1e-5
    j = torch.arange(12)
    i = j[:, None]

    def by_columns(q, k, v, ln_g):
        logits = torch.einsum("ihd,jhd->hij", *tgs.carried(q, k, ln_g)) / math.sqrt(8)
        return torch.einsum("hij,jhd->ihd", logits.masked_fill(j > i, -math.inf).softmax(-1), v)

    def eq_3(q, k, v, ln_g):
        weight = (torch.einsum("ihd,jhd->hij", q, k) / math.sqrt(8)).exp() * ln_g.exp() * (j <= i)
        return torch.einsum("hij,jhd->ihd", weight / weight.sum(-1, keepdim=True), v)

    def with_gradients(attention):
        leaves = [t.clone().requires_grad_() for t in (q, k, v, g.log())]
        y = attention(*leaves)
        return [y, *torch.autograd.grad(y, leaves, dy)]

    for a, b in zip(with_gradients(by_columns), with_gradients(eq_3)):
        close(a, b, 1e-9, 1e-12)


@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("lower", [tgs.eager, torch.compile])
def test_bfloat16_columns_carry_ln_g_to_2e_4_also_compiled(head_dim, lower):
    """(Inductor elides a cast to bfloat16 and back, and with it what the cast would round away.)"""
    g = torch.linspace(0, 1, 1000).square()
    x = torch.ones(len(g), 1, head_dim, dtype=torch.bfloat16)
    q, k = lower(tgs.carried)(x, x, tgs.log_gate(g))
    added = (q * k.double())[:, 0, head_dim:].sum(-1) / math.sqrt(head_dim)
    close(added[1:], g[1:].clamp(min=1e-6).log(), 0, 2e-4)
    assert added[0] < -1e30


@pytest.mark.parametrize("head_dim, dtype, control, shared, starts", [
    (64, "bfloat16", "none", 101376, True),
    (64, "bfloat16", "none", 65536, False),
    (256, "bfloat16", "dense", 101376, True),
    (256, "bfloat16", "none", 101376, False),
    (256, "float32", "none", 166912, True),
    (8, "bfloat16", "none", 232448, False),
])
def test_heads_that_no_kernel_fits_in_a_gpus_shared_memory_are_refused_at_the_start(
        head_dim, dtype, control, shared, starts, monkeypatch):
    gpu = SimpleNamespace(shared_memory_per_block_optin=shared)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    cfg = Config(dim=2 * head_dim, n_heads=2, control=control, dtype=dtype, device="cuda")
    if starts:
        assert tgs.Runtime(cfg).device.type == "cuda"
    else:
        with pytest.raises(UserError, match=f"n_heads is {head_dim}: FlexAttention"):
            tgs.Runtime(cfg)


@pytest.mark.parametrize("n, V, padding", [(30, 11, 0), (30, 11, 117), (40, 2**20, 0)])
def test_the_head_in_chunks_is_cross_entropy_and_padding_columns_do_not_show(n, V, padding):
    """(The largest vocabulary takes two chunks.)"""
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(n, 2, generator=generator, requires_grad=True)
    w = torch.randn(V, 2, generator=generator, requires_grad=True)
    targets = torch.randint(V, (n,), generator=generator)

    def padded_loss(logits, *rest):
        loss, gradient = tgs.chunk_loss(torch.nn.functional.pad(logits, (0, padding), value=7.0), *rest)
        return loss, gradient[:, :V]

    got = tgs.HeadLoss.apply(h, w, targets, torch.float32, padded_loss, True)
    want = torch.nn.functional.cross_entropy(h @ w.T, targets)
    close(got, want)
    for a, b in zip(torch.autograd.grad(2 * got, (h, w)), torch.autograd.grad(2 * want, (h, w))):
        close(a, b)


def graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def compile_quickly(monkeypatch):
    """Graphs are found as ever, and run by autograd's own kernels."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    monkeypatch.setattr(tgs, "compiled", functools.cache(tgs.compiled.__wrapped__))


def graphs_of_warm_up(monkeypatch):
    """A list of how many graphs there were after each run's warm-up."""
    found = []
    warm_up = tgs.Trainer.warm_up

    def counted(trainer):
        seconds = warm_up(trainer)
        found.append(graphs())
        return seconds

    monkeypatch.setattr(tgs.Trainer, "warm_up", counted)
    return found


@pytest.mark.parametrize("flex", [False, True])
def test_nothing_recompiles_as_the_numbers_of_active_tokens_and_of_sequences_change(flex, monkeypatch):
    """As in a run, every gate is open at first. With FlexAttention (here without a backward) every call
    brings another mask, and tokens that fill their blocks are no case of their own."""
    compile_quickly(monkeypatch)
    monkeypatch.setattr(tgs, "uses_flex", lambda device: flex)
    monkeypatch.setattr(tgs, "flex_attention", tgs.compiled(tgs.flex_attention))
    T = 256 if flex else 32
    model, cfg = random_model(10, closing=-99.0, max_seq_len=T)
    model.lower = tgs.compiled
    routed = model.gates
    counts = []
    for B, share in ((4, 1), (4, 0.3), (3, 1 / 3), (4, 0.5), (2, 0.75), (5, 0.9), (1, 0.51), (1, 1)):
        def gates(h, S, l, layout):
            S, g = routed(h, S, l, layout)
            return S, g * (torch.arange(len(g)) < B * T * share ** (l + 1))

        monkeypatch.setattr(model, "gates", gates)
        inputs, targets = random_tokens(cfg, B, T)
        with torch.no_grad():
            model(inputs, targets)
        if not flex:
            backward(model, *model(inputs, targets), B * T)
        counts.append(graphs())
    assert counts[1] == counts[-1] > counts[0]


def test_a_compiled_run_has_all_its_graphs_before_the_first_step_although_no_gate_is_closed_yet(
        tmp_path, corpus, monkeypatch):
    compile_quickly(monkeypatch)
    warm = graphs_of_warm_up(monkeypatch)
    argv = flags(corpus, tmp_path, num_steps=16, lr=0.05, mean_coef_init=20.0)
    assert tgs.main([*argv, "--compile"]) == 0
    closed = [max(e["gate_zero"]) for e in events(only_record(tmp_path), "train")]
    assert closed[0] < 0.05
    assert max(closed) > 0.2
    assert warm == [graphs()]


@cuda
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-2), (torch.bfloat16, 0.15)])
@pytest.mark.parametrize("kw", [
    dict(),
    dict(n_kv_heads=2),
    dict(compute="masked"),
    dict(control="dense"),
    dict(n_heads=8),
    dict(n_heads=2),
    dict(n_heads=2, control="dense"),
    MASKED_DOCUMENTS,
], ids=str)
def test_gpu_loss_and_gradients_are_those_of_the_cpu(kw, dtype, tolerance):
    size = dict(dim=256, n_heads=4, n_layers=4, vocab_size=300, max_seq_len=256, closing=0.3)
    model, cfg = random_model(11, **size | kw)
    tokens = random_tokens(cfg, 4, 256)
    torch.set_float32_matmul_precision("highest")
    results = []
    for device, lower in (("cpu", tgs.eager), ("cuda", tgs.compiled)):
        model.to(device)
        model.lower = lower
        with torch.autocast(device, torch.bfloat16, enabled=dtype == torch.bfloat16):
            ce, stats = model(*(t.to(device) for t in tokens))
        ce, _, *gradients = backward(model, ce, stats, tokens[0].numel())
        results.append([t.detach().cpu() for t in (ce, *gradients)])
    for a, b in zip(*results):
        assert (a - b).norm() <= tolerance * (a.norm() + 1e-6)


@cuda
def test_gpu_bfloat16_training_compiles_once_and_resumes(tmp_path, corpus, monkeypatch):
    kw = dict(
        device="cuda",
        dtype="bfloat16",
        dim=128,
        max_seq_len=64,
        batch_size=8,
        device_batch_size=4,
        num_steps=8,
        save_every=4,
        coef_update=0.5,
        mean_target_end=0.2,
    )
    warm = graphs_of_warm_up(monkeypatch)
    assert tgs.main(flags(corpus, tmp_path, **kw)) == 0
    assert warm == [graphs()]
    record = only_record(tmp_path)
    last = events(record)[-1]["cross_entropy"]
    (record / "checkpoint_8.pt").unlink()
    assert tgs.main(["--resume", str(record)]) == 0
    assert events(record)[-1]["cross_entropy"] == pytest.approx(last, abs=2e-3)


@cuda
def test_gpu_decoding_gives_the_full_forward_pass():
    model, _ = random_model(12, dim=64, n_heads=2, n_layers=4, closing=0.3, max_seq_len=32)
    model.to("cuda")
    check_decoding(model, [[1, 2, 3], [4], [5, 6]], 10)


# ----------------------------------------------------------------------------------------------------------
# Decoding and sampling

def decoded(model, prompts, steps, as_compiled=False):
    """Greedy decoding with the cache: final logits, sequences with depths, and the decoder."""
    decoder = sample.Decoder(model, len(prompts))
    if as_compiled:
        for cache in decoder.cache:
            cache.attend_some = sample.attend_some
    rows = [list(prompt) for prompt in prompts]
    depths = [[] for _ in prompts]
    new = dict(enumerate(prompts))
    for _ in range(steps):
        logits, depth = decoder.append(new)
        depth = iter(depth.tolist())
        for b, t in enumerate(logits.argmax(-1).tolist()):
            depths[b] += [next(depth) for _ in new[b]]
            new[b] = [t]
            rows[b].append(t)
    return logits, (rows, depths), decoder


def check_decoding(model, prompts, steps, as_compiled=False):
    """Every token, depth and the last logits are those of the full forward pass over each sequence by
    itself."""
    logits, (rows, depths), decoder = decoded(model, prompts, steps, as_compiled)
    for b, row in enumerate(rows):
        full, depth = model_logits(model, torch.tensor([row[:-1]]).to(logits.device))
        close(full[0, -1], logits[b], 1e-3, 1e-4)
        start = len(prompts[b])
        assert row[start:] == full[0].argmax(-1)[start - 1:].tolist()
        assert depths[b] == depth[0].tolist()
    return decoder, rows, depths


def generated(model, prompts, length, **kw):
    """Token ids."""
    rows, _ = sample.generate(model, prompts, length, **kw)
    return [[token.id for token in row] for row in rows]


@few
@given(
    seed=st.integers(0, 99),
    closing=st.floats(0, 2),
    n_layers=st.sampled_from([2, 4, 6]),
    kv_heads=st.sampled_from([1, 2]),
    lengths=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    steps=st.integers(1, 5),
    as_compiled=st.booleans(),
    documents=st.sampled_from([{}, MASKED_DOCUMENTS | dict(vocab_size=6)]),
)
def test_greedy_decoding_with_the_cache_is_the_full_forward_pass(
        seed, closing, n_layers, kv_heads, lengths, steps, as_compiled, documents):
    model, cfg = random_model(seed, closing, n_layers=n_layers, n_kv_heads=kv_heads, max_seq_len=16,
                              **documents)
    prompts = [random_tokens(cfg, 1, n, seed + i)[0][0].tolist() for i, n in enumerate(lengths)]
    with torch.no_grad():
        decoder, rows, depths = check_decoding(model, prompts, steps, as_compiled)
    per_token = 2 * kv_heads * cfg.head_dim * 4 + 4  # keys, values, ln g
    seen = [len(seen_apart(torch.tensor(row[:-1]), cfg)[-1]) for row in rows]  # (the last is not run yet)
    assert decoder.bytes() == per_token * sum(sum(each[-n:]) for each, n in zip(depths, seen))


def test_sampling_is_repeatable_by_seed_and_greedy_at_temperature_zero():
    model, _ = random_model(13, closing=0.2, max_seq_len=64)
    one, two, other = (generated(model, [[1, 2]] * 3, 20, seed=seed) for seed in (5, 5, 6))
    assert one == two != other
    _, (greedy, _), _ = decoded(model, [[1, 2]], 5)
    for options in (dict(temperature=0), dict(temperature=3.0, top_k=1), dict(top_p=1e-6)):
        assert generated(model, [[1, 2]], 5, **options) == greedy


def test_a_sample_ends_at_the_end_of_document_or_the_models_length():
    model, _ = random_model(14, max_seq_len=16)
    [row] = generated(model, [[1, 2]], 99, temperature=0)
    assert len(row) == 16
    [stopped] = generated(model, [[1, 2]], 99, temperature=0, stop=row[4])
    assert stopped == row[:row.index(row[4], 2) + 1]


def test_a_padded_vocabularys_further_tokens_are_never_drawn():
    model, _ = random_model(15, max_seq_len=64)
    drawn = generated(model, [[1, 2]] * 4, 60, temperature=9.0, n_vocab=5)
    assert set(sum(drawn, [])) == {0, 1, 2, 3, 4}


@pytest.mark.parametrize("top_k, top_p, drawn", [
    (2, 1.0, {0, 1}),
    (None, 0.9, {0, 1, 2}),
    (None, 1.0, {0, 1, 2, 3}),
])
def test_top_k_and_top_p_draw_from_the_likeliest_tokens(top_k, top_p, drawn):
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().repeat(400, 1)
    generator = torch.Generator().manual_seed(0)
    assert set(sample.choose(logits, 1.0, top_k, top_p, generator).tolist()) == drawn


def test_pieces_join_the_bytes_of_a_character_and_lose_nothing():
    encoding = tokenize_text.get_encoding("bytes")

    def pieces(tokens):
        return [text for text, _ in sample.pieces([sample.Token(t, 2, 0.5) for t in tokens], encoding)]

    assert pieces("aé😀\n".encode()) == ["a", "é", "😀", "\n"]
    assert "".join(pieces([0xC3, 0x41, 0xFF, 0x42, 0xE2])) == "\ufffdA\ufffdB\ufffd"


def test_the_page_of_a_sample_says_token_depth_and_probability_and_needs_no_other_file():
    text = [("<a>", sample.Token(1, 0, None)), ("b", sample.Token(2, 4, 0.25))]
    page = sample.html_page([text], 4, "title & more")
    assert page.partition("<pre>")[2].count("class=prompt") == 1
    for part in ("&lt;a&gt;", "4 of 4 blocks, p = 0.250", "title &amp; more", "prefers-color-scheme"):
        assert part in page
    assert "http" not in page


def test_eval_tables_the_mean_depth_of_each_token_of_the_validation_text(tmp_path, corpus, capsys):
    model, cfg = random_model(3, vocab_size=257, closing=0.4)
    shard = corpus / "c_val_000000.bin"
    checkpoint = exported(model, tmp_path / "m")
    assert evaluate.main(["--checkpoint", str(checkpoint), "--val_files", str(shard)]) == 0
    said = [line.split() for line in capsys.readouterr().out.partition("by token\n")[2].splitlines()]
    T = cfg.max_seq_len
    tokens = torch.from_numpy(np.fromfile(shard, "<u2", offset=1024).astype(int))[:499 // T * T].view(-1, T)
    depth = model_logits(model, tokens)[1].double()
    means = {token: depth[tokens == token].mean() for token in range(11)}
    assert sorted(said) == sorted([repr(chr(token)), f"{mean:.2f}", f"({(tokens == token).sum()}", "tokens)"]
                                  for token, mean in means.items())
    depths = [float(depth) for _, depth, *_ in said]
    assert depths == sorted(depths) != depths[::-1]


# ----------------------------------------------------------------------------------------------------------
# Control (Table 1)

def controlled(rule, **kw):
    cfg = Config(**TINY | dict(control=rule, mean_target_start=0.9, mean_target_end=0.5) | kw)
    return tgs.GateControl(cfg, "cpu")


def deviate(control, of_mean, of_variance):
    """A step in which all gates are so far from their targets."""
    control.update(control.target + torch.tensor([[of_mean], [of_variance]], dtype=torch.float64))


def test_targets_are_linearly_spaced_means_and_bernoulli_variances():
    means, variances = controlled("proportional", n_layers=6).target.tolist()
    assert means == pytest.approx([0.9, 0.7, 0.5])
    assert variances == pytest.approx([0.09, 0.21, 0.25])


@pytest.mark.parametrize("rule, gamma, move", [
    ("adaptive", 1e-3, lambda d: math.copysign(1e-3, d)),
    ("proportional", 1e-3, lambda d: 1e-3 * d),
    ("proportional", 0.5, lambda d: 0.5 * d),
    ("sparsity", None, lambda d: 0),
    ("none", None, lambda d: 0),
    ("sparsity_variance", None, lambda d: 0),
    ("sparsity_variance_l2", None, lambda d: 0),
])
def test_each_rule_moves_alpha_and_beta_by_its_law_and_rests_within_the_tolerance(rule, gamma, move):
    for deviations in ((0.2, -0.1), (-0.3, 0.05), (0.009, 0.2), (-0.009, -0.009), (0.0, 0.0)):
        control = controlled(rule, coef_update=gamma)
        before = control.coef.clone()
        deviate(control, *deviations)
        for d, moved in zip(deviations, control.coef - before):
            want = move(d) if abs(d) > 0.01 else 0.0
            assert moved.tolist() == pytest.approx([want, want])


def test_proportional_derivative_moves_only_while_the_deviation_grows():
    control = controlled("proportional_derivative")
    average = 0.1
    want = 0.0
    for d in (0.1, 0.2, 0.3, 0.1, 0.02, -0.2, -0.35, -0.008, 0.005):
        average = 0.9 * average + 0.1 * d
        if d * (d - average) > 1e-9 and abs(d) > 0.01:
            want += 1e-2 * d
        deviate(control, d, d)
        assert control.coef.flatten().tolist() == pytest.approx([want] * 4)
    assert want != 0


@pytest.mark.parametrize("rule, want", [
    ("sparsity", lambda m, v, mu, s2: 0.01 * m),
    ("sparsity_variance", lambda m, v, mu, s2: 0.01 * m - 0.01 * v),
    ("sparsity_variance_l2", lambda m, v, mu, s2: 0.1 * (m - mu) ** 2 + 0.1 * (v - s2) ** 2),
    ("adaptive", lambda m, v, mu, s2: 0.0),
    ("none", lambda m, v, mu, s2: 0.0),
])
def test_the_gate_loss_of_each_rule_is_table_1s(rule, want):
    control = controlled(rule)
    seen = torch.tensor([[0.8, 0.3], [0.1, 0.2]], dtype=torch.float64)
    levels = [want(*level) for level in zip(*seen.tolist(), *control.target.tolist())]
    assert control.loss(seen).item() == pytest.approx(mean(levels))  # (as over all layers, which mirror them)


def test_variance_is_over_the_population_of_all_tokens_skipped_ones_included():
    model, cfg = random_model(6, closing=0.3)
    inputs, targets = random_tokens(cfg)
    _, stats = model(inputs, targets)
    _, gates = oracle_forward(inputs, {k: p.detach().double() for k, p in model.named_parameters()}, cfg)
    report = tgs.gate_report(cfg, stats.detach(), inputs.numel())
    close(torch.tensor(report["gate_var"]), gates.flatten(1).var(1, unbiased=False))


# ----------------------------------------------------------------------------------------------------------
# FLOPs

@pytest.mark.parametrize("kw", [
    dict(),
    dict(closing=0.4),
    dict(closing=0.3, n_kv_heads=1),
    dict(control="dense"),
    dict(control="dense", n_layers=3),
    dict(closing=0.3, **MASKED_DOCUMENTS),
], ids=str)
def test_realised_flops_are_those_that_torch_counts(kw, monkeypatch):
    from torch.utils.flop_counter import FlopCounterMode
    model, cfg = random_model(7, **kw)
    inputs, targets = random_tokens(cfg)
    monkeypatch.setattr(tgs, "QUERY_ROWS", 1)  # a row at a time: exactly the causal pairs
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        _, stats = model(inputs, targets)
    assert tgs.realised_flops(cfg, stats, inputs.numel()) == counter.get_total_flops()


# ----------------------------------------------------------------------------------------------------------
# Data

def write_shard(path, tokens, magic=20240520, version=1, count=None, dtype="<u2"):
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(tokens) if count is None else count
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(header.tobytes() + np.asarray(tokens, dtype).tobytes())
    return path


def shards_of(files, vocab_size=1000):
    return tgs.Shards(Config(train_files=str(files), vocab_size=vocab_size), "train")


def read_steps(shards, count, world=1, place=0, **kw):
    """The sequences (B, T) of steps from `place` on, in the order of micro-batches, and of ranks in each."""
    cfg = Config(**TINY | kw)
    ranks = [SimpleNamespace(rank=r, world=world, cuda=False) for r in range(world)]
    loaders = [tgs.TrainLoader(shards, cfg, rank) for rank in ranks]
    steps = []
    for _ in range(count):
        steps.append([])
        for a in range(loaders[0].accumulation):
            for loader in loaders:
                loader.place = place
                inputs, targets = loader.read(a)
                assert torch.equal(inputs[:, 1:], targets[:, :-1])
                steps[-1] += inputs.tolist()
        place += 1
    return steps


@pytest.mark.parametrize("world", [1, 2, 4])
def test_any_number_of_ranks_reads_the_same_windows_at_every_step(tmp_path, world):
    """Two shards of 100 and 75 tokens, blocks of 4 x 8: three steps, then two, then from the start again."""
    write_shard(tmp_path / "a_1.bin", range(100))
    write_shard(tmp_path / "a_2.bin", range(100, 175))
    steps = read_steps(shards_of(tmp_path / "a_*.bin"), 7, world, device_batch_size=1)
    for start, rows in zip((0, 32, 64, 100, 132, 0, 32), steps):
        assert sum(rows, []) == list(range(start, start + 32))


def test_a_shuffled_pass_takes_every_sequence_once_in_an_order_that_seed_and_pass_decide(tmp_path):
    """Whatever the number of ranks; from any place that a checkpoint holds it goes on; the next pass has
    another order."""
    for i, n in enumerate((8 * 12 + 1, 8 * 9 + 5)):
        write_shard(tmp_path / f"s{i}.bin", np.arange(n) // 8 + 20 * i)  # a sequence is 8 times its number
    shards = shards_of(tmp_path / "*.bin")

    def order(count, seed=1, **kw):
        return [[row[0] for row in rows] for rows in read_steps(shards, count, shuffle=True, seed=seed, **kw)]

    both = order(10)
    first, second, again = (sum(both[a:b], []) for a, b in ((0, 3), (3, 5), (5, 8)))
    assert sorted(first) == sorted(again) == list(range(12))
    assert first != sorted(first)
    assert first != again
    assert len(set(second)) == 8
    assert set(second) <= set(range(20, 29))
    assert second != sorted(second)
    assert order(10, world=2) == both
    assert order(10, seed=2) != both
    for k in range(1, 10):
        assert order(10 - k, place=k) == both[k:]


def test_train_tokens_limits_the_training_set_and_val_tokens_the_validation_set(tmp_path):
    write_shard(tmp_path / "a_1.bin", range(100))
    write_shard(tmp_path / "a_2.bin", range(100))
    files = str(tmp_path / "a_*.bin")
    cfg = Config(train_files=files, train_tokens=130, val_files=files, val_tokens=40)
    assert [len(tokens) for tokens in tgs.Shards(cfg, "train").tokens] == [100, 30]
    assert [len(tokens) for tokens in tgs.Shards(cfg, "val").tokens] == [40]


def test_tokens_of_16_and_of_32_bits_are_read_alike(tmp_path):
    write_shard(tmp_path / "a_1.bin", [5, 65535])
    write_shard(tmp_path / "a_2.bin", [5, 65536, 128255], magic=20240801, version=7, dtype="<u4")
    shards = shards_of(tmp_path / "a_*.bin", vocab_size=128256)
    assert shards.window(0, 0, 2).tolist() == [5, 65535]
    assert shards.window(1, 0, 3).tolist() == [5, 65536, 128255]


def test_validation_takes_every_full_sequence_of_every_shard(tmp_path):
    write_shard(tmp_path / "v_1.bin", [1] * 33)
    write_shard(tmp_path / "v_2.bin", [2] * 24)
    shards = shards_of(tmp_path / "v_*.bin")
    model, cfg = random_model(8)
    assert tgs.sequences(shards, cfg) == [(0, 0), (0, 8), (0, 16), (0, 24), (1, 0), (1, 8)]
    result = tgs.evaluate(model, cfg, tgs.Runtime(cfg), shards)
    inputs = torch.tensor([[1] * 8] * 4 + [[2] * 8] * 2)
    logits, _ = model_logits(model, inputs)
    want = torch.nn.functional.cross_entropy(logits.flatten(0, 1), inputs.flatten())
    assert result["tokens"] == 48
    assert result["cross_entropy"] == pytest.approx(want.item(), rel=1e-5)


# ----------------------------------------------------------------------------------------------------------
# Optimizer and schedule

def rates(steps, **kw):
    """The learning rate before every step and after the last."""
    cfg = Config(num_steps=steps, lr=2.0, **kw)
    return [tgs.learning_rate(i, cfg) for i in range(steps + 1)]


def test_the_learning_rate_warms_up_linearly_then_follows_a_cosine_to_zero():
    lr = rates(100)
    assert lr[:11] == pytest.approx([0.2 + 0.18 * i for i in range(11)])
    assert lr[10:] == pytest.approx([1 + math.cos(math.pi * i / 90) for i in range(91)])
    assert rates(3, warmup_fraction=0.0)[0] == 2.0


def test_with_a_cooldown_the_learning_rate_stays_constant_and_then_falls_linearly_to_zero():
    lr = rates(100, cooldown_fraction=0.4)
    assert lr[:10] == rates(100)[:10]
    assert lr[10:61] == [2.0] * 51
    assert lr[60:] == pytest.approx([2.0 * (100 - i) / 40 for i in range(60, 101)])
    assert rates(10, cooldown_fraction=0.05)[9] == 2.0  # less than a step: no cosine


def test_routers_begin_and_learn_as_at_the_width_that_router_width_names():
    """Their weights' spread and rate are those of this width times it over dim; all else is as without."""
    cfg = Config(**TINY | dict(dim=256, router_width=64))
    plain = Config(**TINY | dict(dim=256))
    model, other = MiddleSkippingTransformer(cfg), MiddleSkippingTransformer(plain)
    tgs.initialise(model, cfg)
    tgs.initialise(other, plain)
    for (name, p), q in zip(model.named_parameters(), other.parameters()):
        scale = 0.25 if name.startswith("masks.") else 1.0
        torch.testing.assert_close(p, scale * q)
    groups = tgs.make_optimizers(model, cfg)["optimizer"].param_groups
    scales = {group["name"]: group["scale"] for group in groups}
    assert scales.pop("routers") == 0.25 and set(scales.values()) == {1.0}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_optimizers_groups_partition_the_parameters(optimizer):
    model, cfg = random_model(optimizer=optimizer)
    optimizers = tgs.make_optimizers(model, cfg).values()
    groups = {g["name"]: g["params"] for o in optimizers for g in o.param_groups}
    assert ("matrices" in groups) == (optimizer == "muon")
    assert groups["routers"] == [router.linear.weight for router in model.masks]
    grouped = sum(groups.values(), [])
    assert len(grouped) == len(set(grouped)) == len(list(model.parameters()))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=cuda)])
def test_muon_is_torchs_for_the_blocks_matrices_and_the_rest_moves_as_adamws(device):
    """Up to torch's bfloat16 in making an update orthogonal, over steps with momentum, decay and a rate that
    changes; of gradients that are well conditioned."""
    model, cfg = random_model(optimizer="muon", weight_decay=0.1)
    twin = copy.deepcopy(model.to(device))
    groups = {True: [], False: []}
    for name, p in twin.named_parameters():
        groups[name.startswith("layers.") and p.ndim == 2].append(p)
    common = dict(lr=cfg.lr, weight_decay=cfg.weight_decay)
    adamw = torch.optim.AdamW(groups[False], betas=(cfg.beta1, cfg.beta2), eps=cfg.eps, **common)
    muon = torch.optim.Muon(groups[True], adjust_lr_fn="match_rms_adamw", **common)
    optimizers = [*tgs.make_optimizers(model, cfg).values(), adamw, muon]
    pairs = list(zip(model.parameters(), twin.parameters()))
    for i, lr in enumerate((1e-2, 2e-2, 1e-2)):
        torch.manual_seed(i)
        before = [q.detach().clone() for _, q in pairs]
        for p, q in pairs:
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
        for (p, q), start in zip(pairs, before):
            tolerance = 0.05 if any(q is m for m in groups[True]) else 1e-4
            assert (p - q).norm() < tolerance * (q - start).norm()
            q.data.copy_(p.data)


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 12, 5), (1, 5, 12)])
def test_an_orthogonal_update_keeps_the_singular_vectors_and_brings_the_values_near_one(shape):
    """In float64, against the quintic polynomial of Muon applied five times to the singular values."""
    G = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    U, s, Vt = torch.linalg.svd(G, full_matrices=False)
    s = s / s.norm(dim=1, keepdim=True)
    for _ in range(5):
        s = 3.4445 * s - 4.775 * s**3 + 2.0315 * s**5
    close(tgs.orthogonal(G), U * s[:, None] @ Vt, 0, 1e-12)
    assert 0.3 < s.min()
    assert s.max() < 1.3


# ----------------------------------------------------------------------------------------------------------
# The script, end to end

@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Shards of a text with structure: a counter with noise, 11 tokens."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    for name, n in (("c_train_000001.bin", 3000), ("c_train_000002.bin", 2000), ("c_val_000000.bin", 500)):
        write_shard(folder / name, (np.arange(n) + (rng.random(n) < 0.1)) % 11)
    return folder


def flags(corpus, records, **kw):
    settings = TINY | dict(train_files=corpus / "c_train_*.bin", val_files=corpus / "c_val_*.bin",
                           device="cpu", dtype="float32", records_dir=records) | kw
    return [part for k, v in settings.items() if v is not None for part in (f"--{k}", str(v))]


def events(folder, kind=None):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [r for r in rows if kind in (None, r["kind"])]


def only_record(folder):
    (record,) = [p for p in folder.iterdir() if p.is_dir()]
    return record


def summary_of(record):
    return json.loads((record / "summary.json").read_text())


def refused_in_one_line(capsys, argv, *words, status=2, main=tgs.main):
    capsys.readouterr()
    assert main([str(a) for a in argv]) == status
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    assert all(word in error for word in words), error


@pytest.fixture
def no_plot(monkeypatch):
    monkeypatch.setattr(tgs.Record, "show", lambda *args, **kw: None)  # a second a run


@dataclasses.dataclass
class Lab:
    """Runs of the script on the corpus, none of which is drawn, each in a named folder."""
    corpus: Path
    folder: Path
    capsys: pytest.CaptureFixture

    def flags(self, name, **kw):
        return flags(self.corpus, self.folder / name, **kw)

    def record(self, name):
        return only_record(self.folder / name)

    def launch(self, name, world=1, before=lambda rank: None, **kw):
        return Ranks(self.folder, self.flags(name, **kw), world, before)

    def train(self, name, *launch, **kw):
        """In this process, or launched as others."""
        if launch:
            run = self.launch(name, *launch, **kw)
            assert set(run.wait()) == {0}, run.text()
        else:
            assert tgs.main(self.flags(name, **kw)) == 0
        return self.record(name)

    def resume(self, record, *argv):
        self.capsys.readouterr()
        assert tgs.main(["--resume", str(record), *argv]) == 0
        return self.capsys.readouterr()

    def refuses(self, *words, name="refused", status=2, **kw):
        refused_in_one_line(self.capsys, self.flags(name, **kw), *words, status=status)


@pytest.fixture
def lab(corpus, tmp_path, capsys, no_plot):
    return Lab(corpus, tmp_path, capsys)


def run_script(script, *argv, **kw):
    return subprocess.run([sys.executable, script, *map(str, argv)], capture_output=True, text=True,
                          timeout=120, **kw)


FILES = set("log.txt metrics.jsonl config.json env.json summary.json model.safetensors".split())


def test_a_run_of_the_script_leaves_a_record_that_says_everything(tmp_path, corpus):
    argv = flags(corpus, tmp_path, num_steps=6, val_every=4, name="trial")
    done = run_script(ROOT / "train_gpt_skip.py", *argv)
    assert done.returncode == 0, done.stderr
    record = only_record(tmp_path)
    assert re.fullmatch(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d_trial", record.name)
    assert {p.name for p in record.iterdir()} == FILES | {"train_gpt_skip.py", "plot.png", "checkpoint_6.pt"}
    train = events(record, "train")
    val = events(record, "val")
    assert [e["step"] for e in train] == list(range(6))
    assert [e["step"] for e in val] == [0, 4, 6]
    assert " ".join(train[0]) == ("kind step tokens train_s loss cross_entropy lr grad_norm tokens_per_s "
                                  "gate_mean gate_var gate_zero mean_coef var_coef")
    assert " ".join(val[0]) == ("kind step cross_entropy gate_mean gate_var gate_zero tokens val_s "
                                "realised_flops_per_token")
    assert len(train[0]["gate_mean"]) == len(train[0]["var_coef"]) == 4
    assert tgs.read_json(record / "config.json")["dim"] == 16
    env = tgs.read_json(record / "env.json")
    assert env["source_sha256"] == tgs.source_hash()
    assert env["shards"]["train"][1] == {"name": "c_train_000002.bin", "tokens": 2000}
    assert summary_of(record)["cross_entropy"] == val[-1]["cross_entropy"]
    assert "sparsity" in done.stdout and "eval --checkpoint" in done.stdout
    assert (record / "log.txt").read_text() in done.stdout + "\n"

    again = run_script(ROOT / "records" / "evaluate.py", "--checkpoint", record, "--device", "cpu")
    loss = float(re.search(r"cross_entropy (\d+\.\d{4,})", again.stdout)[1])
    assert loss == pytest.approx(val[-1]["cross_entropy"], abs=1e-5)


def test_a_copy_of_the_script_alone_in_a_folder_trains_and_writes_its_record(tmp_path, corpus):
    """All but the plot and what records/show.py tells. The project's tools read the record."""
    script = shutil.copy(ROOT / "train_gpt_skip.py", tmp_path / "fork.py")
    done = run_script(script, *flags(corpus, "records", num_steps=4, batch_size=6, device_batch_size=6),
                      cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    record = only_record(tmp_path / "records")
    assert {p.name for p in record.iterdir()} == FILES | {"fork.py", "checkpoint_4.pt"}
    assert f"validation loss {summary_of(record)['cross_entropy']:.4f}" in done.stdout
    assert evaluate.main(["--checkpoint", str(record), "--device_batch_size", "5"]) == 0


def test_the_first_steps_of_a_run_are_those_of_the_equations(lab):
    """Loss, gate statistics and coefficients of two steps of two micro-batches, by oracle and AdamW in
    float64."""
    kw = dict(num_steps=2, mean_target_end=0.2, coef_update=0.5, initializer_range=0.3)
    seen = events(lab.train("run", **kw), "train")
    cfg = Config(**TINY | kw)
    model = MiddleSkippingTransformer(cfg)
    tgs.initialise(model, cfg)
    P = {k: v.detach().double().requires_grad_() for k, v in model.named_parameters()}
    adam = torch.optim.AdamW(P.values(), betas=(0.8, 0.95), eps=1e-10, weight_decay=0)
    tokens = torch.from_numpy(np.fromfile(lab.corpus / "c_train_000001.bin", "<u2", offset=1024).astype(int))
    alpha = torch.zeros(4).double()
    beta = torch.zeros(4).double()
    mu = torch.tensor([1.0, 0.2, 0.2, 1.0]).double()
    for step, lr in enumerate((1e-3, 0.5e-3)):
        losses, gates = [], []
        for first in range(step * 32, step * 32 + 32, 16):
            logits, g = oracle_forward(tokens[first:first + 16].view(2, 8), P, cfg)
            targets = tokens[first + 1:first + 17].view(2, 8)
            losses.append(oracle_loss(logits, g, targets, alpha, beta))
            gates.append(g.detach().flatten(1))
        loss = sum(losses) / 2
        loss.backward()
        adam.param_groups[0]["lr"] = lr
        adam.step()
        adam.zero_grad()
        m = torch.cat(gates, 1).mean(1)
        v = torch.cat(gates, 1).var(1, unbiased=False)
        for coef, deviation in ((alpha, m - mu), (beta, v - mu * (1 - mu))):
            coef += 0.5 * deviation * (deviation.abs() > 0.01)
        assert seen[step]["lr"] == pytest.approx(lr)
        want = dict(loss=loss, gate_mean=m, gate_var=v, mean_coef=alpha, var_coef=beta)
        for name, value in want.items():
            assert seen[step][name] == pytest.approx(value.tolist(), abs=1e-4), name


def test_a_target_loss_stops_the_run_which_is_saved_as_it_is_then_and_resumes_there(lab):
    kw = dict(num_steps=20, val_every=1, save_every=100, lr=0.01)
    losses = [e["cross_entropy"] for e in events(lab.train("whole", **kw), "val")]
    at = next(i for i in range(2, 20) if losses[i] < min(losses[:i]))
    record = lab.train("cut", target_loss=(losses[at] + min(losses[:at])) / 2, **kw)
    assert summary_of(record)["step"] == at
    assert tgs.checkpoints(record)[-1].name == f"checkpoint_{at}.pt"
    before = timeless(record)
    lab.resume(record)
    assert timeless(record) == before


def test_a_run_with_muon_learns_and_resumes_as_if_nothing_had_happened(lab):
    record = lab.train("run", optimizer="muon", num_steps=20, save_every=10, val_every=20, lr=1e-2)
    first, last = events(record, "val")
    assert last["cross_entropy"] < first["cross_entropy"] - 0.1
    whole = end_of(record)
    (record / "checkpoint_20.pt").unlink()
    lab.resume(record)
    assert end_of(record) == whole


def test_training_learns_and_reaches_the_targets_of_the_gates(lab):
    """A language of period 11: the loss falls below half, and the middle gates come near their target."""
    record = lab.train("run", num_steps=150, dim=32, lr=1e-2, coef_update=0.1, mean_target_end=0.4,
                       val_every=150, batch_size=8)
    first, last = events(record, "val")
    assert last["cross_entropy"] < 0.5 * first["cross_entropy"]
    assert last["gate_zero"][1] > 0.3
    assert last["gate_mean"][1] == pytest.approx(0.4, abs=0.2)


def exported(model, folder):
    hub_model = convert.HubModel(model.cfg)
    hub_model.load_state_dict(model.state_dict())
    hub_model.save_pretrained(folder)
    return folder


def converted(source, *argv):
    """The new folder beside the source."""
    out = source.with_name(f"{source.name} converted")
    assert convert.main(["--checkpoint", str(source), "--out", str(out), *argv]) == 0
    return out


def same_logits(a, b):
    inputs, _ = random_tokens(a.cfg)
    return torch.equal(model_logits(a, inputs)[0], model_logits(b, inputs)[0])


@pytest.mark.parametrize("kw", [dict(closing=0.3), dict(closing=0.3, n_kv_heads=1), dict(control="dense")],
                         ids=str)
@pytest.mark.parametrize("layout", ["ours", "released", "hub"])
def test_a_checkpoint_goes_out_and_comes_back_in_every_layout(tmp_path, kw, layout):
    """Ours; the authors', in which a dense model has routers that are all zero; and their hub's, whose names
    begin with `model.`."""
    model, cfg = random_model(15, **kw)
    out = converted(exported(model, tmp_path / "a"), "--to", layout)
    settings = tgs.read_json(out / "config.json")
    state = tgs.read_checkpoint(next(out.glob("[ms]*")))
    if layout == "released":
        settings = settings["model"]
        state = state["model"]
    if layout == "ours":
        assert set(state) == set(model.state_dict())
    else:
        assert settings["zero_init_masks"] == (cfg.control == "dense")
        router = "model.masks.1.linear.weight" if layout == "hub" else "masks.1.linear.weight"
        assert state[router].any() == (cfg.control != "dense")
    back = convert.HubModel.from_pretrained(out)
    assert back.cfg.control == cfg.control
    assert same_logits(back, model)


def test_a_hub_model_saves_and_loads_itself_also_from_bfloat16(tmp_path):
    model, _ = random_model(15, closing=0.3, norm="pre")
    back = convert.HubModel.from_pretrained(exported(model, tmp_path / "m"), seed=7)
    assert same_logits(back, model) and back.cfg.seed == 7
    settings, state = convert.ours(model)
    half = {k: v.bfloat16() for k, v in state.items()}
    convert.write(tmp_path / "m", "ours", settings, half)
    for name, w in convert.HubModel.from_pretrained(tmp_path / "m").state_dict().items():
        assert torch.equal(w, half[name].float())


def test_blocks_are_dropped_and_the_others_are_kept_in_order(tmp_path):
    model, cfg = random_model(15, control="dense")
    cut = converted(exported(model, tmp_path / "m"), "--drop_blocks", "1", "2")
    model.layers = torch.nn.ModuleList([model.layers[0], model.layers[3]])
    model.cfg = dataclasses.replace(cfg, n_layers=2)
    assert same_logits(convert.HubModel.from_pretrained(cut), model)


# Llamas: config.json as transformers 5.24.0 (torch 2.13.0) writes it, less what nobody reads, and the logits
# of its LlamaForCausalLM with the weights of `llama_weights` for the tokens (i i + 3 i) % 24, i < 200:
# positions 0, 99 and 199, the first four of the vocabulary. One has three heads a key head and tied
# embeddings; the other, the rotary scaling of Llama 3.2.
COMMON = """{
 "architectures": ["LlamaForCausalLM"], "attention_bias": false, "hidden_act": "silu", "mlp_bias": false,
 "model_type": "llama", "num_hidden_layers": 2, "num_key_value_heads": 2, "rms_norm_eps": 1e-6,
 "initializer_range": 0.02, "vocab_size": 24, "transformers_version": "5.24.0",
"""
TIED = json.loads(COMMON + """
 "head_dim": 8, "hidden_size": 48, "intermediate_size": 56, "max_position_embeddings": 256,
 "num_attention_heads": 6, "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
 "tie_word_embeddings": true
}""")
SCALED = json.loads(COMMON + """
 "head_dim": 16, "hidden_size": 32, "intermediate_size": 80, "max_position_embeddings": 131072,
 "num_attention_heads": 2, "rope_parameters": {"factor": 32.0, "high_freq_factor": 4.0,
 "low_freq_factor": 1.0, "original_max_position_embeddings": 8192, "rope_theta": 500000.0,
 "rope_type": "llama3"}, "tie_word_embeddings": false
}""")
LLAMAS = {
    "tied": (TIED, """
 0.622537  1.16189   0.752294 -2.278407
-0.239451  0.319022 -0.114167 -1.088219
 0.176662 -0.241893  0.939908 -0.087055
"""), "scaled": (SCALED, """
-0.9994   -0.073996 -0.961125 -0.411619
-0.872417 -1.680605  1.595738  0.08712
-0.330246 -0.272609  1.324307 -0.515666
""")}


def llama_weights(config):
    d, m, V = (config[k] for k in ("hidden_size", "intermediate_size", "vocab_size"))
    kv = d // config["num_attention_heads"] * config["num_key_value_heads"]
    block = {"input_layernorm": [d], "self_attn.q_proj": [d, d], "self_attn.k_proj": [kv, d],
             "self_attn.v_proj": [kv, d], "self_attn.o_proj": [d, d], "post_attention_layernorm": [d],
             "mlp.gate_proj": [m, d], "mlp.up_proj": [m, d], "mlp.down_proj": [d, m]}
    shapes = {f"model.layers.{l}.{k}": size for l in range(2) for k, size in block.items()}
    shapes |= {"model.embed_tokens": [V, d], "model.norm": [d], "lm_head": [V, d]}
    weights = {}
    for i, (name, size) in enumerate(shapes.items()):
        k = torch.arange(math.prod(size), dtype=torch.float64)
        w = (len(size) == 1) + 0.2 * torch.sin(k * k * 0.013 + k + i)
        weights[f"{name}.weight"] = w.view(size).float()
    return weights


def write_llama(folder, config, weights=None, shards=1):
    weights = weights or llama_weights(config)
    if config["tie_word_embeddings"]:
        weights.pop("lm_head.weight")
    files = {name: f"model-{i % shards}.safetensors" for i, name in enumerate(weights)}
    if shards == 1:
        files = dict.fromkeys(files, "model.safetensors")
    folder.mkdir()
    for file in set(files.values()):
        part = {k: w for k, w in weights.items() if files[k] == file}
        (folder / file).write_bytes(convert.save(part))
    if shards > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("config, want", LLAMAS.values(), ids=LLAMAS)
def test_a_llama_comes_in_with_the_logits_of_transformers_and_goes_out_as_it_came(tmp_path, config, want,
                                                                                  shards):
    ours = converted(write_llama(tmp_path / "hf", config, shards=shards), "--max_seq_len", "200")
    model = convert.HubModel.from_pretrained(ours)
    i = torch.arange(200)
    logits, _ = model_logits(model, ((i * i + 3 * i) % 24)[None])
    got = logits[0, [0, 99, 199], :4].flatten().tolist()
    assert got == pytest.approx([*map(float, want.split())], abs=1e-5)
    back = converted(ours, "--to", "llama")
    weights = llama_weights(config)
    if config["tie_word_embeddings"]:  # the trainer has no tied ones
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    written = tgs.read_checkpoint(back / "model.safetensors")
    assert written.keys() == weights.keys()
    assert all(torch.equal(written[k], weights[k]) for k in weights)
    again = tgs.read_json(back / "config.json")
    assert convert.llama_settings(again) == convert.llama_settings(config) | dict(max_seq_len=200)
    assert again["architectures"] == ["LlamaForCausalLM"] and again["tie_word_embeddings"] is False


def test_the_rotary_settings_of_older_versions_are_read_too():
    new = "rope_parameters", "head_dim", "num_key_value_heads"
    older = {k: v for k, v in SCALED.items() if k not in new}
    rope = dict(SCALED["rope_parameters"])
    theta = rope.pop("rope_theta")
    kind = rope.pop("rope_type")
    for name in "rope_type", "type":
        read = convert.llama_settings(older | dict(rope_theta=theta, rope_scaling=rope | {name: kind}))
        assert read == convert.llama_settings(SCALED) | dict(n_kv_heads=None)


def test_a_llamas_tokeniser_comes_with_it_and_continues_prompts_and_scores_texts(tmp_path, capsys):
    source = write_llama(tmp_path / "hf", TIED | dict(vocab_size=265))
    tokenizer_json(source / "tokenizer.json", "pieces")
    model = converted(source)
    assert tgs.read_json(model / "config.json")["encoding"] == str(model / "tokenizer.json")
    (source / "tokenizer.json").unlink()
    (tmp_path / "a.txt").write_text("ab ab é")
    capsys.readouterr()
    assert evaluate.main(["--checkpoint", str(model), "--text", str(tmp_path / "a.txt")]) == 0
    assert "5 tokens" in capsys.readouterr().out
    argv = ["--checkpoint", str(model), "--prompt", "ab é", "--max_new_tokens", "5"]
    assert sample.main(argv) == 0
    assert capsys.readouterr().out.startswith("ab é")
    (model / "tokenizer.json").unlink()
    tokenize_text.get_encoding.cache_clear()
    assert sample.main(argv) == 2
    assert "tokenizer.json" in capsys.readouterr().err


@pytest.mark.parametrize("change, word", [
    ('{"model_type": "qwen3"}', "model_type qwen3"), ('{"attention_bias": true}', "attention_bias"),
    ('{"mlp_bias": true}', "mlp_bias"), ('{"hidden_act": "gelu"}', "hidden_act"),
    ('{"head_dim": 32}', "head_dim"), ('{"sliding_window": 128}', "sliding_window"),
    ('{"rope_parameters": {"rope_type": "yarn"}}', "yarn"),
    ('{"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": null}', "linear"),
    ('{"rope_parameters": {"rope_type": "llama3", "low_freq_factor": 2.0}}', "low_freq_factor"),
    ('{"rope_parameters": {"rope_type": "llama3", "original_max_position_embeddings": 4096}}', "4096"),
    ('{"hidden_size": null}', "config.json"), ('{"num_attention_heads": 0}', "config.json"),
    ('{"num_hidden_layers": null}', "config.json"), ('{"rope_parameters": [1]}', "config.json"),
    ('{"num_hidden_layers": 3}', "layers.2."), ('{"num_hidden_layers": 1}', "model.layers.1."),
    ('{"intermediate_size": 57}', "57"), ('{"num_key_value_heads": 3}', "[24, 48]")])
def test_what_the_script_has_not_is_refused_by_name_before_anything_is_written(tmp_path, capsys, change,
                                                                               word):
    source = write_llama(tmp_path / "hf", TIED | json.loads(change), llama_weights(TIED))
    argv = ["--checkpoint", source, "--out", tmp_path / "out"]
    refused_in_one_line(capsys, argv, word, main=convert.main)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name, status", [("q_norm.weight", 2), ("k_proj.bias", 2),
                                          ("rotary_emb.inv_freq", 0)])
def test_a_llama_with_further_weights_is_refused_but_for_the_rotary_frequencies(tmp_path, capsys, name,
                                                                                status):
    name = f"model.layers.0.self_attn.{name}"
    source = write_llama(tmp_path / "hf", TIED, llama_weights(TIED) | {name: torch.ones(8)})
    assert convert.main(["--checkpoint", str(source), "--out", str(tmp_path / "out")]) == status
    assert (name in capsys.readouterr().err) == (status == 2)


DENSE = dict(control="dense")


@pytest.mark.parametrize("kw, flags, words", [
    (dict(), "--to llama", "--control proportional"), (DENSE, "--to llama", "--norm sandwich"),
    (dict(control="dense", n_layers=3), "--to released", "even number of blocks"),
    (dict(norm="llama"), "--to hub", "sandwich"), (dict(control="random"), "--to released", "coin"),
    (dict(), "--drop_blocks 1", "proportional"), (DENSE, "--drop_blocks 4", "0 to 3"),
    (DENSE, "--drop_blocks 1 1", "each once"), (DENSE, "--drop_blocks 0 1 2 3", "some of"),
    (dict(), "--out m", "m: File exists")], ids=str)
def test_what_cannot_be_written_is_refused_in_one_line(tmp_path, capsys, monkeypatch, kw, flags, words):
    monkeypatch.chdir(tmp_path)
    exported(random_model(15, **kw)[0], tmp_path / "m")
    argv = ["--checkpoint", "m", "--out", "new", *flags.split()]
    refused_in_one_line(capsys, argv, words, main=convert.main)
    assert not Path("new").exists()


@pytest.mark.parametrize("layout", ["ours", "released"])
def test_a_dense_checkpoint_is_retrofitted_with_new_routers_that_then_learn(lab, layout):
    """It begins as the dense model, with routers that prefer nothing but can learn (not the zeros of the
    authors' layout, from which nothing would ever). Trained on under --control dense it stays dense."""
    source = lab.train("source", control="dense", num_steps=4)
    want = tgs.read_weights(str(source))[1]
    if layout == "released":
        source = converted(source, "--to", "released")
    cfg, weights = tgs.resolve(dict(init_from=str(source), seed=3))
    trained = tgs.build_model(cfg, tgs.Runtime(cfg), weights)
    for key, value in trained.state_dict().items():
        if key.startswith("masks."):
            assert (value == (0.01 if key.endswith("bias") else 0.0)).all()
        else:
            assert torch.equal(value, want[key]), key
    dense = lab.train("dense", init_from=source, control="dense", num_steps=0)
    assert tgs.read_weights(str(dense))[1].keys() == want.keys()
    gated = lab.train("gated", init_from=source, num_steps=30, mean_target_end=0.2, coef_update=0.3, lr=1e-2)
    first, last = events(gated, "val")
    assert first["gate_zero"][1] == 0.0 and last["gate_zero"][1] > 0.3
    assert first["cross_entropy"] == pytest.approx(events(dense, "val")[0]["cross_entropy"], abs=0.02)


@pytest.mark.parametrize("given", [{}, dict(gate_attention="keys", compute="packed")])
def test_a_record_that_began_from_a_checkpoint_is_run_again_and_resumed_with_its_own_settings(lab, given):
    masked = dict(gate_attention="none", compute="masked")
    source = lab.train("source", num_steps=0, **masked)
    record = lab.train("run", num_steps=0, init_from=source, **given)
    for path in tgs.checkpoints(record):
        path.unlink()  # as if it had died before its first
    for again in dict(config=str(record)), dict(resume=str(record)):
        cfg, weights = tgs.resolve(again)
        assert weights
        assert masked | given == dict(gate_attention=cfg.gate_attention, compute=cfg.compute)


def test_the_encoding_and_the_token_that_begins_a_document_are_those_of_the_dataset_json(tmp_path):
    files = str(write_shard(tmp_path / "d_1.bin", [1, 2, 3] * 40))
    dataset = tmp_path / "dataset.json"
    settings = TINY | dict(train_files=files, val_files=files, device="cpu", mask_documents=True)

    def trained(**kw):
        cfg = tgs.Trainer(Config(**settings | kw), None).cfg
        return cfg.encoding, cfg.document_token

    for unknown in dict(), dict(document_token=11):
        with pytest.raises(UserError, match="--document_token"):
            trained(**unknown)
    dataset.write_text('{"encoding": "a.json", "document_token": 7}')
    assert trained() == ("a.json", 7)
    assert trained(document_token=3) == ("a.json", 3)
    with pytest.raises(UserError, match="its tokens are a.json, not bytes"):
        trained(encoding="bytes")


@pytest.fixture
def harness(monkeypatch):
    """records/harness.py, over a stand-in for what it takes of lm-evaluation-harness."""
    parts = {"": dict(simple_evaluate=None), ".api.model": dict(TemplateLM=object),
             ".config.evaluate_config": dict(EvaluatorConfig=None),
             ".models.utils": dict(normalize_gen_kwargs=lambda how: dict(until=[], max_gen_toks=256) | how),
             ".utils": dict(make_table=None, get_rolling_token_windows=one_window)}
    for name, content in parts.items():
        monkeypatch.setitem(sys.modules, f"lm_eval{name}", SimpleNamespace(**content))
    monkeypatch.delitem(sys.modules, "harness", raising=False)
    return importlib.import_module("harness")


def one_window(tokens, begin, T, context):
    yield [begin, *tokens[:-1]], tokens


def asked(*args):
    return SimpleNamespace(args=args)


def test_texts_and_tasks_are_scored_by_log_probability_and_continued_by_the_cache(tmp_path, capsys, harness):
    model, cfg = random_model(17, vocab_size=257, closing=0.2, max_seq_len=32)
    exported(model, tmp_path / "m")
    text = tmp_path / "a.txt"
    text.write_bytes("\ufeffThe middle\r\nof a text, é.".encode())

    def nll(text):
        tokens = torch.tensor([256, *text.encode()])
        logits = model_logits(model, tokens[None, :-1])[0][0]
        return torch.nn.functional.cross_entropy(logits, tokens[1:], reduction="none")

    argv = ["--checkpoint", str(tmp_path / "m"), "--text", str(text)]
    assert evaluate.main(argv) == 0
    nats, bits = re.search(r"cross_entropy (\S+) nats a token, (\S+) bits a byte",
                           capsys.readouterr().out).groups()
    want = nll("The middle\r\nof a text, é.").sum().item() / 26
    assert float(nats) == pytest.approx(want, abs=1e-4)
    assert float(bits) == pytest.approx(want / math.log(2), abs=1e-3)

    checkpoint = harness.Checkpoint(model, tgs.Runtime(cfg))
    context, ends = checkpoint.tok_encode("a b "), ["c", "dd", "eee", "a long one, é"]
    pairs = [((), context, checkpoint.tok_encode(end, add_special_tokens=False)) for end in ends]
    with torch.no_grad():
        greedy = generated(model, [context], 1, temperature=0)[0]
        *scores, likeliest = checkpoint._loglikelihood_tokens([*pairs, ((), context, greedy[-1:])])
        want = [(-nll(f"a b {end}")[4:].sum().item(), False) for end in ends]
        assert [*sum(scores, ())] == pytest.approx([*sum(want, ())], abs=1e-3)
        assert likeliest[1]
        assert checkpoint.loglikelihood_rolling([asked("short")]) == pytest.approx([-nll("short").sum().item()])
        how = dict(max_gen_toks=9, do_sample=False)
        rows = generated(model, [[256], [256, 97]], 9, temperature=0, stop=256)
        first, second = (bytes(t for t in row[1:] if t < 256).decode("utf-8", "replace") for row in rows)
        stop = how | dict(until=["", first[3]])
        asks = [asked("", how), asked("a", how), asked("", stop)]
        assert checkpoint.generate_until(asks) == [first, second[1:], first.split(first[3])[0]]
    small = exported(random_model(17, vocab_size=99)[0], tmp_path / "small")
    refused_in_one_line(capsys, ["--checkpoint", small, "--encoding", "bytes", "--text", text],
                        "is not the model's", main=evaluate.main)


def test_tasks_without_lm_evaluation_harness_are_one_line_that_says_how_to_install_it(tmp_path, capsys,
                                                                                      monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "harness", raising=False)
    model = exported(random_model(17)[0], tmp_path / "m")
    refused_in_one_line(capsys, ["--checkpoint", model, "--tasks", "hellaswag"],
                        "pip install 'lm_eval>=0.4.13'", main=evaluate.main)


def test_memory_does_not_grow_as_a_run_goes_on(tmp_path, corpus):
    """500 steps with sparsity that changes from step to step, in a process of its own."""
    argv = flags(corpus, tmp_path, num_steps=501, coef_update=0.5, mean_target_end=0.3, log_every=500,
                 val_every=501)
    code = f"""
import os, torch, train_gpt_skip as tgs
real, seen = tgs.Trainer.train_step, []
def step(trainer, i):
    seen.append(int(open('/proc/self/statm').read().split()[1]) * os.sysconf('SC_PAGE_SIZE'))
    return real(trainer, i)
tgs.Trainer.train_step = step
assert tgs.main({argv}) == 0
print('grown', seen[500] - seen[50])
"""
    done = run_script("-c", code, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert int(re.search(r"grown (-?\d+)", done.stdout)[1]) < 8 * 2**20


def test_a_run_on_a_terminal_shows_loss_sparsity_speed_and_time_left_in_one_line(tmp_path, corpus):
    terminal, stderr = pty.openpty()
    fcntl.ioctl(stderr, termios.TIOCSWINSZ, struct.pack("4H", 24, 90, 0, 0))
    run = subprocess.run([sys.executable, ROOT / "train_gpt_skip.py", *flags(corpus, tmp_path)],
                         stdout=subprocess.PIPE, stderr=stderr, timeout=60)
    os.close(stderr)
    shown = os.read(terminal, 1 << 16).decode()
    os.close(terminal)
    assert run.returncode == 0 and b"cross-entropy" not in run.stdout  # steps are lines of the file only
    assert re.search(r"step 3/3 \|.*\| 00:00 left, loss \d\.\d+, sparsity 0\.\d+, \d+ tokens/s", shown)


def test_the_record_is_shown_by_a_process_of_its_own_at_the_start_at_each_validation_and_at_the_end(
        tmp_path, corpus, monkeypatch):
    """A CPU waits for it; where a GPU computes, the run goes on, and one that still draws is not started
    twice."""
    real, calls, waits = subprocess.Popen, [], []

    def start(command, **kw):
        if ROOT / "records" / "show.py" not in command:
            return real(command, **kw)
        calls.append(command[2:])
        return SimpleNamespace(poll=lambda: None, wait=lambda: waits.append(1) or 0)

    monkeypatch.setattr(subprocess, "Popen", start)
    assert tgs.main(flags(corpus, tmp_path, num_steps=5, val_every=2)) == 0
    record = only_record(tmp_path)
    assert calls == [[record, "--log", "--opening"], *[[record, "--log", "--plot"]] * 4, [record, "--log"]]
    assert len(waits) == 6 + 5  # for each, and for the one before it
    record = tgs.Record(Config(records_dir=str(tmp_path)), SimpleNamespace(main=True, cuda=True), 0)
    for _ in range(3):
        record.validation(dict(step=0, cross_entropy=1.0, gate_zero=[0.0]))
    assert len(calls) == 7 and len(waits) == 6 + 5


def test_a_level_that_stays_closed_against_its_target_is_named_in_the_log_at_once(tmp_path):
    cfg = Config(**TINY, records_dir=str(tmp_path), mean_target_end=0.3)
    record = tgs.Record(cfg, tgs.Runtime(cfg), 0)
    event = dict(loss=1.0, cross_entropy=1.0, lr=0.1, grad_norm=1.0, tokens_per_s=1.0)
    for step, zero in enumerate([0.995] * 49 + [0.98] + [0.995] * 51):
        record.step(event | dict(step=step, gate_zero=[0.0, zero, zero, 0.0]))
    lines = (record.folder / "log.txt").read_text().splitlines()
    (at,) = [i for i, line in enumerate(lines) if line.startswith("WARNING")]
    assert lines[at - 1].startswith("step 99/")
    assert "levels [1]" in lines[at] and "--router_width" in lines[at]


def test_a_control_keeps_its_own_coefficients_of_a_preset_and_not_anothers():
    for control, gamma in ("proportional", 0.03), ("adaptive", None):
        cfg, _ = tgs.resolve(dict(preset="gated", control=control))
        assert cfg.coef_update == gamma


def test_a_terminal_that_is_gone_stops_nothing(tmp_path, corpus, monkeypatch, no_plot):
    monkeypatch.setattr("builtins.print", lambda *text, **kw: throw(BrokenPipeError()))
    assert tgs.main(flags(corpus, tmp_path, num_steps=2)) == 0
    assert "validation loss" in (only_record(tmp_path) / "log.txt").read_text()


def test_importing_the_script_does_no_work():
    code = ("import sys, train_gpt_skip; assert 'matplotlib' not in sys.modules; "
            "import torch.distributed as d; assert not d.is_initialized(); print('done')")
    done = run_script("-c", code, cwd=ROOT)
    assert done.stdout == "done\n" and done.stderr == ""


@pytest.mark.parametrize("argv, words", [
    ("--no_such_flag 1", "--no_such_flag"), ("--n_layers 3", "--n_layers 3 must be even"),
    ("--dim 100", "--n_heads"), ("--dim ten", "--dim"), ("--lr -1", "--lr"), ("--lr nan", "--lr"),
    ("--n_kv_heads 5", "--n_kv_heads"), ("--n_kv_heads 0", "--n_kv_heads"), ("--name a/b", "--name a/b"),
    ("--preset gated --config x.json", "leave one out"), ("--gate_attention none", "still a key"),
    ("--control magic", "--control"), ("--control sparsity --coef_update 1", "--coef_update"),
    ("--mean_target_end 1.5", "between 0 and 1"),
    ("--warmup_fraction 0.3 --cooldown_fraction 0.8", "more than all steps"),
    ("--train_files nowhere/*.bin", "matches no file"), ("--resume nowhere", "nowhere"),
    ("--init_from nowhere", "does not exist"), ("--init_from=", "does not exist"), ("--resume=", "config.json"),
    ("--beta2 1", "from 0 to below 1"), ("eval", "eval")])
def test_a_mistake_on_the_command_line_is_one_line_that_names_it_and_exit_status_2(argv, words, tmp_path,
                                                                                   capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused_in_one_line(capsys, argv.split(), words)
    assert not list(tmp_path.iterdir())


# ----------------------------------------------------------------------------------------------------------
# Nothing lost: resume, faults, bad input, several processes

@pytest.fixture(autouse=True)
def signal_handlers_of_a_run_end_with_its_test():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def throw(e):
    raise e


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


class Ranks:
    """The script as `world` processes (forked: nothing to import again), each with its output in a file.

    `before(rank)` runs in each first, to plant a fault."""

    def __init__(self, folder, argv, world, before):
        port = free_port()
        self.outputs = [folder / f"rank_{rank}.txt" for rank in range(world)]
        self.processes = []
        for rank in range(world):
            place = dict(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), MASTER_PORT=port,
                         MASTER_ADDR="127.0.0.1")
            process = torch.multiprocessing.get_context("fork").Process(
                target=self.work, args=(rank, place, before, argv), daemon=True)
            process.start()
            self.processes.append(process)

    def work(self, rank, place, before, argv):
        with open(self.outputs[rank], "w") as out:
            os.dup2(out.fileno(), 1)
            os.dup2(out.fileno(), 2)
        sys.stdout = open(1, "w", closefd=False)
        sys.stderr = open(2, "w", closefd=False)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.environ |= place
        before(rank)
        sys.exit(tgs.main(argv))

    def statuses(self):
        return [process.exitcode for process in self.processes]

    def kill(self):
        for process in self.processes:
            process.kill()

    def wait(self, timeout=60):
        """Exit statuses; None: still running then."""
        end = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0, end - time.monotonic()))
        statuses = self.statuses()
        self.kill()
        return statuses

    def text(self):
        return "".join(path.read_text() for path in self.outputs if path.exists())

    def errors(self):
        return [line for line in self.text().splitlines() if re.match(r"\S+\.py: ", line)]


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.003)


def timeless(record):
    """What a run measured, without what the clock says."""
    return [{k: v for k, v in e.items() if k not in ("train_s", "tokens_per_s", "val_s")}
            for e in events(record)]


def names_of_checkpoints(record):
    assert not list(record.glob("*.partial"))
    return [path.name for path in tgs.checkpoints(record)]


def end_of(record):
    """All that a run must end with: its events, its weights byte for byte, its two last checkpoints."""
    names = names_of_checkpoints(record)
    state = tgs.read_checkpoint(record / names[-1])
    data = [(record / "model.safetensors").read_bytes()]
    for optimizer in state.keys() & {"optimizer", "muon"}:
        for moments in state[optimizer]["state"].values():
            data += [t.numpy().tobytes() for t in moments.values()]
    return timeless(record), names, state["place"], hashlib.sha256(b"".join(data)).hexdigest()


DRIVEN = dict(control="proportional_derivative", coef_update=0.5, mean_target_end=0.2, initializer_range=0.3)


def dies_at(module, name, call, after=False):
    """before(rank): SIGKILL before or after the call-th call of this function."""
    def before(rank):
        real = getattr(module, name)
        calls = []

        def fatal(*args, **kwargs):
            calls.append(1)
            if len(calls) == call and not after:
                die()
            done = real(*args, **kwargs)
            if len(calls) == call:
                die()
            return done

        setattr(module, name, fatal)
    return before


def test_a_run_killed_at_any_moment_and_resumed_ends_as_if_nothing_had_happened(lab):
    """SIGKILL at random moments, and where it hurts most: amid a write, before and after a rename."""
    kw = dict(num_steps=40, save_every=2, val_every=5, **DRIVEN)
    whole = end_of(lab.train("whole", **kw))

    def killed(before=lambda rank: None, delay=None):
        run = lab.launch("cut", before=before, **kw)
        if delay:
            metrics = kw["resume"] / "metrics.jsonl"
            then = metrics.stat().st_mtime_ns
            wait_for(lambda: metrics.stat().st_mtime_ns != then)
            time.sleep(delay)
            run.kill()
        assert run.wait() == [-signal.SIGKILL], run.text()
        kw["resume"] = lab.record("cut")

    killed(dies_at(os, "fsync", 9))
    killed(dies_at(os, "replace", 3))
    killed(dies_at(os, "replace", 2, after=True))
    killed(dies_at(torch, "save", 3, after=True))
    rng = random.Random(0)
    for _ in range(4):
        killed(delay=rng.uniform(0, 0.15))
    assert end_of(lab.train("cut", **kw)) == whole


def test_resume_takes_the_same_flags_again_and_the_last_checkpoint_that_is_whole(lab):
    kw = dict(num_steps=6, save_every=2, val_every=2, **DRIVEN)
    record = lab.train("run", **kw)
    whole = end_of(record)
    metrics = record / "metrics.jsonl"
    last = record / "checkpoint_6.pt"
    assert whole[1] == ["checkpoint_4.pt", "checkpoint_6.pt"]

    def resumes(step, warnings=0):
        seen = lab.resume(record, *lab.flags("run", **kw))
        assert seen.err.count("WARNING") == seen.err.count("\n") == warnings
        assert f"resumed at step {step} on " in seen.out
        assert f"script {tgs.source_hash()[:16]}" in seen.out
        assert end_of(record) == whole
        return seen.err

    resumes(6)  # a finished run ends once more, and loses nothing
    for damage in (lambda b: b[:len(b) // 2], flipped, lambda b: b""):
        last.write_bytes(damage(last.read_bytes()))
        (record / "checkpoint_6.pt.partial").write_bytes(b"torn")
        with open(metrics, "a") as f:
            f.write('{"kind": "train", "st')
        assert str(last) in resumes(4, warnings=1)
    metrics.write_bytes(metrics.read_bytes()[:-900])
    assert "fewer than" in resumes(4, warnings=1)
    for path in tgs.checkpoints(record):
        path.write_bytes(b"damaged")
    assert tgs.main(["--resume", str(record)]) == 2
    assert "remove them to start at step 0" in lab.capsys.readouterr().err
    for path in tgs.checkpoints(record):
        path.unlink()
    lab.refuses("it is finished and has no checkpoint", resume=record, **kw)
    (record / "summary.json").unlink()
    mine = record / "checkpoint_best_500.pt"  # a name that is not ours: left alone
    mine.write_bytes(b"mine")
    resumes(0)
    assert mine.read_bytes() == b"mine"
    lab.resume(record, "--log_every", "2")
    assert lab.record("run") == record and end_of(record) == whole


def test_a_resumed_run_changes_neither_its_settings_nor_anything_that_is_not_its_own(lab):
    kw = dict(num_steps=4, save_every=2)
    record = lab.train("run", **kw)
    before = timeless(record)
    again = kw | dict(resume=record)
    for change in (dict(lr=0.5), dict(seed=3), dict(control="none"), dict(train_files="other_*.bin"),
                   dict(preset="demo")):
        ((name, value),) = change.items()
        lab.refuses(f"--{name} {value} disagrees", "leave the flag out", **again | change)
    with open(record / "metrics.jsonl", "ab") as elsewhere:
        fcntl.flock(elsewhere, fcntl.LOCK_EX)
        lab.refuses("another process writes this record", **again)
    last = record / "checkpoint_4.pt"
    state = torch.load(last)  # whole, but not of this run
    coefficient = dict(coef=torch.zeros(1))
    for change in (dict(model={}), dict(optimizer=3), dict(control={}), dict(control=coefficient),
                   dict(step="six"), dict(step=700), dict(place=None), dict(rng=1), dict(train_s="long")):
        torch.save(state | change, last)
        lab.refuses(str(last), **again)
    assert timeless(record) == before


def test_a_run_from_a_config_or_from_weights_resumes_too_even_before_its_first_checkpoint(lab):
    first = lab.train("first", num_steps=1)
    argv = ["--records_dir", str(lab.folder / "run"), "--config", str(first / "config.json"), "--init_from",
            str(first)]
    assert tgs.main(argv) == 0
    record = lab.record("run")
    whole = end_of(record)
    for path in [*tgs.checkpoints(record), record / "summary.json"]:
        path.unlink()
    lab.resume(record, *argv)
    assert end_of(record) == whole
    # they began from its weights
    assert timeless(record)[0]["cross_entropy"] == timeless(first)[-1]["cross_entropy"]


def test_runs_that_start_in_the_same_second_write_records_of_their_own(tmp_path):
    threads = [threading.Thread(target=tgs.make_folder, args=(tmp_path, "x")) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(list(tmp_path.iterdir())) == 20


# Signals

@pytest.mark.parametrize("number, world", [(signal.SIGTERM, 1), (signal.SIGINT, 1), (signal.SIGTERM, 2)])
def test_a_signal_ends_a_run_after_its_step_with_a_checkpoint_and_the_command_that_resumes(lab, number,
                                                                                           world):
    """Of two ranks one gets the signal; both end after the same step."""
    run = lab.launch("run", world, num_steps=9999, val_every=9999, **DRIVEN)
    wait_for(lambda: list(lab.folder.glob("run/*/metrics.jsonl")))
    record = lab.record("run")
    wait_for(lambda: len(events(record, "train")) > 3)
    os.kill(run.processes[-1].pid, number)
    assert run.wait(20) == [0] * world and not run.errors(), run.text()
    step = len(events(record, "train"))
    summary = summary_of(record)
    assert summary["interrupted"] and summary["step"] == step
    assert names_of_checkpoints(record) == [f"checkpoint_{step}.pt"]
    assert run.text().splitlines()[-1].endswith(f"go on with: ./run.sh --resume {record}")


def test_a_second_signal_ends_a_run_at_once(lab):
    def slow(rank):
        tgs.learning_rate = lambda step, cfg: time.sleep(60)

    run = lab.launch("run", before=slow)
    wait_for(lambda: "step 0/3" in run.text())
    time.sleep(0.1)
    os.kill(run.processes[0].pid, signal.SIGTERM)
    time.sleep(0.1)
    assert run.statuses() == [None]
    os.kill(run.processes[0].pid, signal.SIGTERM)
    assert run.wait(5) == [128 + signal.SIGTERM]


def test_an_interrupt_before_the_first_step_is_one_line_too(lab, monkeypatch):
    monkeypatch.setattr(tgs, "build_model", lambda *args, **kw: throw(KeyboardInterrupt))
    lab.refuses("interrupted", status=130)
    assert not (lab.folder / "refused").exists()


# Divergence

def test_a_loss_or_gradient_that_is_not_finite_stops_the_run_before_it_reaches_the_weights(lab, monkeypatch):
    real, seen = tgs.Trainer.micro_step, []

    def poisoned(trainer, x, y):
        out = real(trainer, x, y)
        if trainer.loader.place == 3:
            seen.append((trainer.model, copy.deepcopy(trainer.model.state_dict())))
            trainer.model.output.weight.grad[0, 0] = math.inf
        return out

    with monkeypatch.context() as patched:
        patched.setattr(tgs.Trainer, "micro_step", poisoned)
        lab.refuses("gradient", "step 3", "--lr", name="a", status=3, num_steps=6, save_every=2)
    model, weights = seen[-1]
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    assert names_of_checkpoints(lab.record("a")) == ["checkpoint_2.pt"]
    huge = dict(status=3, lr=1e38, warmup_fraction=0)
    lab.refuses("loss", "step 1", **huge)
    lab.refuses("validation", "step 1", name="b", num_steps=1, **huge)
    assert not (lab.record("b") / "summary.json").exists()


# Bad input

def flipped(data):
    return data[:3000] + bytes([data[3000] ^ 1]) + data[3001:]


def test_every_malformed_shard_is_one_line_that_names_it_before_a_record_is_made(lab):
    path = lab.folder / "bad.bin"
    tokens = np.arange(200) % 11
    for magic, version, word in [
            (20240521, 1, "begins with 20240521"), (20240520, 2, "20240520 and 2"),
            (20240801, 1, "20240801 and 1"), (20240801, 7, "holds 100")]:
        write_shard(path, tokens, magic, version)
        lab.refuses(str(path), word, train_files=path)
    for count in 201, 199, -1, 0, 2**31 - 1:
        write_shard(path, tokens, count=count)
        lab.refuses(str(path), f"says {count} tokens, it holds 200", train_files=path)
    good = write_shard(path, tokens).read_bytes()
    for content, word in [
            (b"", "not a whole shard"), (good[:1000], "not a whole shard"),
            (good[:1024], "not a whole shard"), (good[:-2], "holds 199"), (good + b"x", "not a multiple")]:
        path.write_bytes(content)
        lab.refuses(str(path), word, train_files=path)
    write_shard(path, tokens[:20])
    lab.refuses(str(path), "smaller --batch_size", train_files=path)
    write_shard(path, tokens[:8])
    lab.refuses("--val_files", "--max_seq_len", val_files=path)
    (lab.folder / "dataset.json").write_text('{"encoding": "bytes"}')  # and training shards without one
    lab.refuses("dataset.json says that its tokens are bytes, not gpt2", val_files=path)
    path.unlink()
    lab.refuses("matches no file", train_files=path)
    path.mkdir()
    lab.refuses(str(path), "directory", train_files=path)
    assert not (lab.folder / "refused").exists()


def test_a_token_beyond_the_vocabulary_is_found_before_it_reaches_the_model(lab):
    tokens = np.arange(200) % 11
    tokens[3 * 32 + 20] = 60000
    path = write_shard(lab.folder / "bad.bin", tokens)
    words = [str(path), "token 60000", "--vocab_size 11"]
    lab.refuses(*words, name="run", train_files=path, num_steps=5)
    assert [e["step"] for e in events(lab.record("run"), "train")] == [0, 1, 2]
    lab.refuses(*words, val_files=path)


def test_every_malformed_checkpoint_is_one_line_that_names_it_before_a_record_is_made(lab):
    """And a pickle that would run code is refused, and nothing of it runs."""
    good = lab.train("good", num_steps=1)
    bad = lab.folder / "bad"
    ran = lab.folder / "ran"
    said = (good / "config.json").read_text()
    data = (good / "checkpoint_1.pt").read_bytes()
    weights = (good / "model.safetensors").read_bytes()
    model = torch.load(good / "checkpoint_1.pt")["model"]
    weight = "layers.0.attention.wq.weight"

    class Evil:
        def __reduce__(self):
            return Path.touch, (ran,)

    def refuses(content, *words, config=said, name="checkpoint_1.pt"):
        shutil.rmtree(bad, ignore_errors=True)
        bad.mkdir()
        if config is not None:
            (bad / "config.json").write_text(config)
        if isinstance(content, bytes):
            (bad / name).write_bytes(content)
        else:
            torch.save(content, bad / name)
        for source in bad, bad / name:
            lab.refuses(str(bad), *words, init_from=source, dim=None, n_layers=None)

    for content in (data[:len(data) // 2], b"", b"not a checkpoint", flipped(data), pickle.dumps(Evil()),
                    {"model": Evil()}, Evil(), [1]):
        refuses(content, "damaged or not a checkpoint")
    for content in weights[:-100], b"{":
        refuses(content, "damaged", name="model.safetensors")
    for content in [1], model | {"masks.0.linear.weight": 3}:
        refuses({"model": content}, "not a dictionary")
    refuses({"model": {}}, "does not fit", "Missing key")
    for name, value in (("more", torch.zeros(3)), (weight, torch.zeros(3)), (weight, "text")):
        refuses({"model": model | {name: value}}, "does not fit", name)
    refuses({"model": {3: "text"}}, "does not fit")
    for config, word in ((None, "cannot be read"), (said[:50], "cannot be read as JSON"),
                         ("[" * 100_000, "cannot be read as JSON"), ("[1]", "not a JSON object"),
                         ('{"n_layers": 4}', "does not say dim"), ('{"model": 3}', "not a dictionary")):
        refuses(data, word, config=config)
    (bad / "checkpoint_1.pt").unlink()
    lab.refuses("has no checkpoint", init_from=bad)
    lab.refuses(str(good), "--dim 32 disagrees", init_from=good, dim=32)
    assert not ran.exists() and not (lab.folder / "refused").exists()


@settings(few, max_examples=60)
@given(head=st.lists(st.integers(-2**31, 2**31 - 1) | st.sampled_from([20240520, 1, 0, 5]), max_size=4),
       size=st.integers(0, 12), real=st.integers(0, 3))
def test_no_header_of_a_shard_is_more_than_accepted_or_refused(tmp_path_factory, head, size, real):
    path = tmp_path_factory.getbasetemp() / "fuzzed.bin"
    values = (20240520, 1, size)[:real] + tuple(head)
    padding = (0,) * (256 - len(values))
    path.write_bytes(np.array(values + padding, "<i4").tobytes() + bytes(2 * size))
    try:
        assert len(tgs.open_shard(path)) == size > 0
        assert values[:3] == (20240520, 1, size)
    except UserError as e:
        assert str(path) in str(e) and "\n" not in str(e)


@settings(few, max_examples=150)
@given(at=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=3),
       cut=st.just(1) | st.floats(0, 1))
def test_no_damage_to_a_checkpoint_changes_what_is_read_from_it(tmp_path_factory, at, cut):
    """Read whole and the same, or refused in one line."""
    path = tmp_path_factory.getbasetemp() / "fuzzed.pt"
    w = torch.arange(40.0)
    torch.save({"model": {"w": w}, "step": 3}, path)
    data = bytearray(path.read_bytes())
    for place, value in at:
        data[int(place * (len(data) - 1))] = value
    path.write_bytes(data[:int(cut * len(data))])
    try:
        state = tgs.read_checkpoint(path)
        assert state["step"] == 3 and torch.equal(state["model"]["w"], w)
    except UserError as e:
        assert str(path) in str(e) and "\n" not in str(e)


# Disk

@pytest.mark.parametrize("fault", [lambda: OSError(errno.ENOSPC, "No space left"),
                                   lambda: RuntimeError("No space left")], ids=["system", "torch.save"])
def test_a_full_disk_stops_the_run_in_one_line_with_the_checkpoint_before_intact_and_nothing_half_written(
        lab, monkeypatch, fault):
    kw = dict(num_steps=6, save_every=2, **DRIVEN)
    whole = end_of(lab.train("whole", **kw))

    def fsync(descriptor):
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith("checkpoint_4.pt.partial"):
            raise fault()

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", fsync)
        lab.refuses("checkpoint_4.pt cannot be written", "No space left", "--resume", name="run", **kw)
    record = lab.record("run")
    assert names_of_checkpoints(record) == ["checkpoint_2.pt"]
    lab.resume(record)
    assert end_of(record) == whole


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("mount"), reason="needs the right to mount")
def test_a_run_on_a_full_file_system_says_so_and_goes_on_when_there_is_room(lab):
    disk = lab.folder / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", disk]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("cannot mount a tmpfs here")
    try:
        kw = dict(num_steps=6, save_every=2, dim=32)
        lab.refuses("cannot be written", "--resume", name="disk", **kw)
        record = lab.record("disk")
        names_of_checkpoints(record)
        with open(disk / "lines", "ab", buffering=0) as f, pytest.raises(UserError, match="No space left"):
            tgs.Record.append(None, f, "fits")
            tgs.Record.append(None, f, "y" * 600_000)
        assert (disk / "lines").read_text() == "fits\n"
        subprocess.run(["mount", "-o", "remount,size=9m", disk], check=True)
        lab.resume(record)
        assert end_of(record) == end_of(lab.train("whole", **kw))
    finally:
        subprocess.run(["umount", disk], check=True)


# Several processes

def losses(record):
    """All numbers of a run that do not depend on how many ranks there are."""
    names = "loss", "cross_entropy", "gate_mean", "gate_var", "gate_zero", "mean_coef", "var_coef"
    return np.concatenate([np.ravel(e[k]) for e in events(record) for k in names if k in e])


def same_losses(a, b):
    return losses(a) == pytest.approx(losses(b), rel=1e-3, abs=2e-5)


def test_any_number_of_ranks_gives_the_same_losses_gates_and_coefficients_also_when_it_changes_on_resume(lab):
    """And gradients synchronise once a step, not on the micro-batches of an accumulation."""
    kw = dict(num_steps=6, save_every=3, val_every=3, device_batch_size=1, **DRIVEN)

    def counting(rank):
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
        real = torch.nn.parallel.DistributedDataParallel

        def hook(group, bucket):
            with open(lab.folder / f"calls_{rank}", "a") as calls:
                calls.write(".")
            return allreduce_hook(group, bucket)

        def counted(*args, **kwargs):
            model = real(*args, **kwargs)
            model.register_comm_hook(None, hook)
            return model

        torch.nn.parallel.DistributedDataParallel = counted

    def interrupted(rank):
        real = tgs.Trainer.train_step

        def step(trainer, i):
            trainer.signals += i == 3
            return real(trainer, i)

        tgs.Trainer.train_step = step

    one = lab.train("1", **kw)
    two = lab.train("2", 2, counting, **kw)
    four = lab.train("4", 4, **kw)
    assert any(0 < z < 1 for e in events(one) for z in e["gate_zero"])  # some skip, some not
    assert same_losses(one, two) and same_losses(one, four)
    # one bucket: 6 steps of two micro-batches
    assert [(lab.folder / f"calls_{rank}").read_text() for rank in (0, 1)] == ["......"] * 2
    assert all(1 <= e["rank_imbalance"] <= 2 for e in events(two, "train"))
    assert summary_of(four)["ddp"]["avg_backward_comm_time"] > 0
    for first, then in ((1, 2), (4, 1)):
        name = f"{first} then {then}"
        cut = lab.train(name, first, interrupted, **kw)
        assert len(events(cut, "train")) == 4
        lab.train(name, then, resume=cut, **kw)
        assert same_losses(one, cut)


@pytest.mark.parametrize("share, imbalance", [(0.5, 2), (1.0, 0)])
def test_ranks_on_which_no_token_is_active_and_steps_in_which_none_is_anywhere_train(lab, share, imbalance):
    """Token 3 skips at the first router, and is all that rank 1 sees; then no token runs any block."""
    model, cfg = random_model(2)
    h = model.input_norm(model.tok_embeddings.weight[3]).detach()
    router = model.masks[0].linear
    router.weight.data = 60 * h[None] / h.square().sum()
    router.bias.data.fill_(-57 if share < 1 else 999)
    source = exported(model, lab.folder / "source")
    tokens = np.where(np.arange(200) // 16 % 2, 3, np.arange(200) % 3)
    kw = dict(init_from=source, train_files=write_shard(lab.folder / "x.bin", tokens), val_tokens=100)
    one = lab.train("1", **kw)
    two = lab.train("2", 2, **kw)
    first = events(two, "train")[0]
    assert first["gate_zero"][0] == pytest.approx(share, abs=0.04)
    assert first["rank_imbalance"] == pytest.approx(imbalance, abs=0.1)
    assert same_losses(one, two)


def not_finite(step):
    loss, *rest = step()
    return loss * math.nan, *rest


@pytest.mark.parametrize("fault, statuses, words", [
    (lambda step: die(), [1, -9], "lost the other processes"),
    (not_finite, [3, 3], "loss is not finite"),
    # what nobody expected keeps its traceback
    (lambda step: throw(RuntimeError("a closure was reset")), [1, 1], "\nRuntimeError: a closure was reset")])
def test_the_failure_of_one_rank_ends_all_and_its_cause_is_said_once(lab, fault, statuses, words):
    def plant(rank):
        real = tgs.Trainer.micro_step

        def step(trainer, x, y):
            run = functools.partial(real, trainer, x, y)
            return fault(run) if rank == 1 and trainer.loader.place else run()

        tgs.Trainer.micro_step = step

    run = lab.launch("run", 2, plant)
    assert run.wait(30) == statuses, run.text()
    assert len(run.errors()) == 1 and words in run.text(), run.text()


def test_what_one_rank_sees_it_says_with_its_number_and_what_all_see_is_said_once(lab):
    tokens = np.arange(400) % 11
    tokens[2 * 32 + 20] = 60000  # step 2, the window of rank 1
    run = lab.launch("run", 2, train_files=write_shard(lab.folder / "bad.bin", tokens))
    assert run.wait(30) == [1, 2] and "Traceback" not in run.text(), run.text()
    lost, cause = run.errors()
    assert "lost the other processes" in lost
    assert "error: rank 1: shard" in cause and "token 60000" in cause
    for wrong in dict(dim=15), dict(train_files="none_*.bin"), dict(batch_size=2):
        run = lab.launch("none", 2, **wrong)
        assert run.wait(30) == [2, 2], run.text()
        (error,) = run.errors()
        assert f"--{min(wrong)}" in error
    assert not (lab.folder / "none").exists()


def test_a_run_that_is_restarted_goes_on_from_its_last_checkpoint(tmp_path, corpus):
    """One of two processes is killed; run.sh starts both again, in the same record."""
    kw = dict(num_steps=80, save_every=10, val_every=80, **DRIVEN)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = os.environ | dict(NPROC="2", MAX_RESTARTS="1", PATH=path)
    output = tmp_path / "out"
    argv = ["bash", ROOT / "run.sh", *flags(corpus, tmp_path / "r", **kw)]
    with open(output, "w") as out, subprocess.Popen(argv, stdout=out, stderr=out, env=env) as run:
        wait_for(lambda: list(tmp_path.glob("r/*/checkpoint_10.pt")) or run.poll() is not None)
        found = subprocess.run(["pgrep", "-f", f"train_gpt_skip.py.*{tmp_path}"], capture_output=True)
        os.kill(max(map(int, found.stdout.split())), signal.SIGKILL)
        try:
            assert run.wait(90) == 0, output.read_text()
        finally:
            run.terminate()
    record = only_record(tmp_path / "r")
    assert [e["step"] for e in events(record, "train")] == list(range(80))
    assert int(re.search(r"resumed at step (\d+)", output.read_text())[1]) >= 10
    assert not summary_of(record)["interrupted"]


def test_two_torchrun_agents_act_as_two_machines(lab):
    kw = dict(device_batch_size=1, **DRIVEN)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1",
                "--master_addr", "127.0.0.1", "--master_port", free_port(), "--node_rank"]
    agents = [subprocess.Popen([*torchrun, node, ROOT / "train_gpt_skip.py", *lab.flags("two", **kw)],
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for node in "01"]
    outputs = [agent.communicate(timeout=90)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], outputs
    assert "step" in outputs[0] and "step" not in outputs[1]
    assert same_losses(lab.train("one", **kw), lab.record("two"))


# ----------------------------------------------------------------------------------------------------------
# data/tokenize_text.py: helpers


def tokenize(source, out, flags=""):
    flags = f"--encoding bytes --workers 1 --val_fraction 0 {flags}"  # the last of two counts
    tokenize_text.main([str(source), "--out", str(out), *flags.split()])
    return out


def tokenize_texts(texts, out, flags=""):
    """By way of a .jsonl beside `out`."""
    source = out.with_suffix(".jsonl")
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return tokenize(source, out, flags)


def some_texts(count):
    """Documents of 0 to 400 characters of 1 to 4 bytes."""
    draw = random.Random(0)
    return ["".join(draw.choices("ab c\n\0é中😀", k=draw.randrange(400))) for _ in range(count)]


def contents(folder, pattern="*"):
    return {str(path.relative_to(folder)): path.is_file() and path.read_bytes()
            for path in Path(folder).glob(pattern)}


def read_tokens(folder, split="train"):
    shards = sorted(folder.glob(f"*_{split}_*.bin"))
    return np.concatenate([np.fromfile(path, "<u2", offset=1024) for path in shards])


def read_documents(folder, split="train"):
    """The texts in shards of bytes, where token 256 begins a document."""
    before, *texts = "".join(map(chr, read_tokens(folder, split))).split(chr(256))
    assert not before
    return [text.encode("latin1").decode() for text in texts]


def read_dataset(folder):
    return tgs.read_json(folder / "dataset.json")


# ----------------------------------------------------------------------------------------------------------
# data/tokenize_text.py: encodings


@few
@given(st.text())
def test_the_bytes_encoding_gives_the_utf8_bytes_of_any_text(text):
    encoding = tokenize_text.get_encoding("bytes")
    data = text.encode()
    assert encoding.encode_ordinary(text) == list(data)
    assert tokenize_text.encode_text(encoding, data).tolist() == list(data)


def toy_encoding():
    """GPT-2's pattern with a few merges, which need no download."""
    from tiktoken_ext.openai_public import r50k_pat_str

    merges = "  | a|ab|\n\n| \n|'s|   | ab|12|!!|abab|é".encode().split(b"|")
    ranks = {token: rank for rank, token in enumerate([*(bytes([i]) for i in range(256)), *merges])}
    special = {"<|endoftext|>": len(ranks)}
    return tiktoken.Encoding("toy", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens=special)


def test_special_tokens_in_a_text_are_ordinary_text():
    tokens = tokenize_text.encode_text(toy_encoding(), b"a<|endoftext|>b")
    assert bytes(tokens.tolist()) == b"a<|endoftext|>b"


def cut(blocks, chars):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenize_text, "PIECE_CHARS", chars)
        return list(tokenize_text.cut(blocks))


@settings(deadline=None)
@given(st.text("ab'12! \n\té\x1c\u2003", max_size=80), st.integers(1, 30))
def test_pieces_of_a_document_do_not_depend_on_the_blocks_that_it_is_read_in(text, size):
    blocks = [text[start : start + size] for start in range(0, len(text), size)]
    assert cut(blocks, chars=5) == cut([text], chars=5)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text("ab'12! \n\té\x1c\u2003", max_size=9)), st.sampled_from("a'2!é"))
def test_cutting_a_document_between_words_changes_no_token(words, end):
    text = "".join(f"{word}{end} " for word in words)
    pieces = cut([text], chars=20)
    assert max(map(len, pieces)) <= 40
    encode = toy_encoding().encode_ordinary
    assert sum(map(encode, pieces), []) == encode(text)


def tokenizer_json(path, kind):
    """A small tokeniser: of pieces with a fall-back to bytes, as Llama 2 and TinyLlama have; or byte-level,
    as GPT-2, Llama 3 and SmolLM, and "large" with tokens that no text has."""
    tokenizers = pytest.importorskip("tokenizers")
    if kind == "pieces":
        space, special = "▁", ["<unk>", "<s>", "</s>"]
        names = [*(f"<0x{i:02X}>" for i in range(256)), *"▁abé"]
        options = dict(unk_token="<unk>", byte_fallback=True)
    else:
        space, special = "Ġ", ["<|endoftext|>"]
        names = tokenizers.pre_tokenizers.ByteLevel.alphabet()
        options = {}
    unused = [f"none{i}" for i in range(70_000)] if kind == "large" else []
    vocab = {name: i for i, name in enumerate([*special, *sorted(names), "ab", f"{space}a", *unused])}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [("a", "b"), (space, "a")], **options))
    made.add_special_tokens(special)
    if kind == "pieces":
        made.normalizer = tokenizers.normalizers.Replace(" ", "▁")
        made.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    else:
        made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = tokenizers.decoders.ByteLevel()
    made.enable_truncation(5)  # a file's own, which is not for us
    made.enable_padding(length=9)
    made.save(str(path))
    return str(path)


@pytest.fixture(params=["gpt2", "pieces", "byte-level", "large"])
def encoding(request, tmp_path):
    name = request.param
    if name != "gpt2":
        return tokenize_text.get_encoding(tokenizer_json(tmp_path / "tokenizer.json", name))
    cache = Path(os.environ.get("TIKTOKEN_CACHE_DIR") or f"{tempfile.gettempdir()}/data-gym-cache")
    if not (cache / "6d1cbeee0f20b3d9449abfede4726ed8212e3aee").exists():  # tiktoken's name for vocab.bpe
        pytest.skip("the GPT-2 vocabulary is not at hand")
    return tokenize_text.get_encoding(name)


def test_the_tokens_of_a_text_are_its_bytes_and_none_begins_a_document(encoding):
    to_bytes = encoding.decode_single_token_bytes
    begin = to_bytes(encoding.eot_token)
    assert begin in (b"<|endoftext|>", b"<s>")
    for text in ["", f"{begin.decode()}a<unk>", "".join(map(chr, range(2048))), *some_texts(20)]:
        tokens = encoding.encode_ordinary(text)
        assert b"".join(map(to_bytes, tokens)) == text.encode()
        assert encoding.eot_token not in tokens
    with pytest.raises(KeyError):
        to_bytes(encoding.n_vocab)


def test_a_shard_is_256_int32_and_of_each_document_a_first_token_and_those_of_its_text(tmp_path, encoding):
    texts = ["Hello, world. " * 40_000, *some_texts(20)]  # the first is encoded in pieces
    out = tokenize_texts(texts, tmp_path / "out", f"--encoding {encoding.name} --workers 2")
    path = out / "text_train_000001.bin"
    dtype, *head = ("<u4", 20240801, 7) if encoding.n_vocab > 1 << 16 else ("<u2", 20240520, 1)
    tokens = np.fromfile(path, dtype, offset=1024).tolist()
    assert tokens == [t for text in texts for t in [encoding.eot_token, *encoding.encode_ordinary(text)]]
    assert tokens == tgs.open_shard(path).tolist()
    assert np.fromfile(path, "<i4", 256).tolist() == [*head, len(tokens), *253 * [0]]
    dataset = read_dataset(out)
    assert (dataset["encoding"], dataset["vocab_size"]) == (encoding.name, encoding.n_vocab)
    assert dataset["train"]["bytes"] == len("".join(texts).encode())


# ----------------------------------------------------------------------------------------------------------
# data/tokenize_text.py: shards


@few
@given(st.lists(st.text(), min_size=1), st.integers(1, 4))
def test_shards_decode_to_the_documents_in_their_order(texts, items):
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenize_text, "CHUNK_ITEMS", items)
        patch.setattr(tokenize_text, "PIECE_CHARS", 3)
        out = tokenize_texts(texts, Path(folder, "out"))
        assert read_documents(out) == texts and not list(out.glob("*val*"))


def test_shards_are_the_same_for_any_number_of_workers_and_any_kind_of_input(tmp_path, monkeypatch):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    texts = [*some_texts(300), "".join(some_texts(3000))]  # the last is read in blocks
    texts = [text.replace("\0", "-") for text in texts]  # a file with NUL would be skipped
    flags = "--shard_tokens 10_000 --val_fraction 0.1"
    expected = contents(tokenize_texts(texts, tmp_path / "lines", flags))
    table = pyarrow.table({"id": range(301), "text": texts})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=70)
    for number, text in enumerate(texts):
        path = tmp_path / "texts" / f"{number // 100}" / f"{number:03d}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())
    monkeypatch.setattr(tokenize_text, "CHUNK_ITEMS", 7)
    for workers, source in ((2, "lines.jsonl"), (3, "lines.jsonl"), (1, "a.parquet"), (2, "texts")):
        out = tokenize(tmp_path / source, tmp_path / f"out{workers}{source}", f"{flags} --workers {workers}")
        assert contents(out) == expected


def test_what_a_worker_gets_is_bounded_in_bytes_and_in_number():
    sizes = [10] * 3000 + [1 << 19] * 5 + [10]
    items = [(b"x" * size, 0.5, True) for size in sizes]
    chunks = list(tokenize_text.chunks(items, SimpleNamespace(update=str)))
    assert [len(chunk) for chunk in chunks] == [1024, 1024, 954, 2, 2]


@pytest.mark.parametrize("extra, sizes", [(-1, [1024, 1023]), (0, [1024, 1024]), (1, [1024, 1024, 1])])
def test_every_shard_but_the_last_is_full_and_none_is_empty(tmp_path, extra, sizes):
    texts = ["x" * 999, "y" * (1047 + extra)]  # with the tokens that begin them, 2048 and `extra`
    out = tokenize_texts(texts, tmp_path / "out", "--shard_tokens 1024 --name my-name")
    shards = read_dataset(out)["shards"]
    assert list(shards) == [f"my-name_train_{i:06d}.bin" for i in range(1, len(sizes) + 1)]
    assert [shard["tokens"] for shard in shards.values()] == sizes
    assert read_documents(out) == texts


def test_dataset_json_holds_what_the_shards_hold(tmp_path):
    def counts(tokens):
        return {"tokens": tokens.size, "bytes": (tokens < 256).sum(), "documents": (tokens == 256).sum()}

    out = tokenize_texts(some_texts(200), tmp_path / "out", "--shard_tokens 5000 --val_fraction 0.3")
    shards = {}
    for name, data in contents(out, "*.bin").items():
        sha256 = hashlib.sha256(data).hexdigest()
        shards[name] = counts(np.frombuffer(data, "<u2", offset=1024)) | {"sha256": sha256}
    assert {"text_val_000000.bin", "text_val_000001.bin", "text_train_000001.bin"} < set(shards)
    totals = {split: counts(read_tokens(out, split)) for split in ("train", "val")}
    about = {"encoding": "bytes", "vocab_size": 257, "document_token": 256, "val_fraction": 0.3}
    assert read_dataset(out) == about | totals | {"shards": shards}


def test_max_tokens_keeps_exactly_the_first_tokens(tmp_path):
    every = tokenize_texts(some_texts(50), tmp_path / "all")
    part = tokenize_texts(some_texts(50), tmp_path / "part", "--max_tokens 1_234 --workers 2")
    assert read_tokens(part).tolist() == read_tokens(every)[:1234].tolist()


# ----------------------------------------------------------------------------------------------------------
# data/tokenize_text.py: validation split


def test_a_documents_split_depends_on_its_text_alone(tmp_path):
    texts = [f"document {number}" for number in range(400)]
    part = texts[::-2]
    val = read_documents(tokenize_texts(texts, tmp_path / "all", "--val_fraction 0.2"), "val")
    val_of_part = read_documents(tokenize_texts(part, tmp_path / "part", "--val_fraction 0.2"), "val")
    assert 50 < len(val) < 110
    assert val_of_part == [text for text in part if text in val]


@pytest.mark.parametrize("fraction", [1e-9, 0.05, 0.95, 0.999999999])
def test_two_documents_are_one_for_each_split_whatever_the_fraction(tmp_path, capsys, fraction):
    for texts in (["one", "two"], ["two", "one"]):
        out = tokenize_texts(texts, tmp_path / texts[0], f"--val_fraction {fraction}")
        assert "left a split empty" in capsys.readouterr().out
    for split in ("train", "val"):
        [one] = read_documents(tmp_path / "one", split)
        assert read_documents(tmp_path / "two", split) == [one]


# ----------------------------------------------------------------------------------------------------------
# data/tokenize_text.py: input


def test_a_text_file_is_one_document_read_as_utf8(tmp_path, capsys):
    folder = tmp_path / "texts"
    (folder / ".git").mkdir(parents=True)
    files = {".git/a.txt": b"hidden", ".hidden": b"hidden", "b.bin": b"binary\0", "d.txt": b""}
    files |= {"a.md": b"\xef\xbb\xbfone\r\ntwo\n", "c": b"caf\xe9"}  # the byte order mark is no text
    for name, data in files.items():
        (folder / name).write_bytes(data)
    assert read_documents(tokenize(folder, tmp_path / "out")) == ["one\r\ntwo\n", "caf\ufffd", ""]
    assert "1 binary file" in capsys.readouterr().out


def test_byte_order_mark_blank_lines_and_other_fields_of_jsonl_are_passed_over(tmp_path):
    lines = [b'\xef\xbb\xbf{"id": 1, "text": "a\\ud800"}', b"", b" \r", b'{"text": "\xc3\xa9"}']
    (tmp_path / "a.JSONL").write_bytes(b"\n".join(lines))
    found = read_documents(tokenize(tmp_path / "a.JSONL", tmp_path / "out"))
    assert found == ["a?", "é"]  # UTF-8 has no lone surrogates


def test_the_standard_library_is_its_sources_without_tests_and_installed_packages():
    folder = Path(sysconfig.get_path("stdlib"))
    files = [path.relative_to(folder) for path in tokenize_text.input_files([], stdlib=True)]
    assert {Path("argparse.py"), Path("json/decoder.py")} < set(files)
    assert {path.suffix for path in files} == {".py"}
    assert not {part for path in files for part in path.parts} & {"test", "tests", "site-packages", "idlelib"}


def test_the_standard_library_becomes_shards_and_the_next_command_is_shown(tmp_path):
    out = tmp_path / "a" / "b c"
    flags = "--stdlib --encoding bytes --max_tokens 2_000_000 --workers 2 --out"
    command = [sys.executable, ROOT / "data" / "tokenize_text.py", *flags.split(), out]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (run.returncode, run.stderr) == (0, "")
    assert f"--train_files '{out}/text_train_*.bin'" in run.stdout
    dataset = read_dataset(out)
    assert dataset["train"]["tokens"] + dataset["val"]["tokens"] == 2_000_000
    assert any("def " in text for text in read_documents(out, "val"))


# ----------------------------------------------------------------------------------------------------------
# data/tokenize_text.py: refusals

BAD_INPUTS = {
    "not_json.jsonl": b'{"text": "a"}\n\nnot JSON\n',
    "deep.jsonl": b"[" * 100_000,
    "latin1.jsonl": b'{"text": "\xff"}\n',
    "no_text.jsonl": b'{"body": "a"}\n',
    "number.jsonl": b'{"text": 1}\n',
    "list.jsonl": b'["text"]\n',
    "list.json": b'["text"]\n',
    "bad.parquet": b"PAR0",
    "only.bin": b"\0",
    "good.txt": b"good",
}
BAD_COMMANDS = {
    "": "no input",
    "nowhere.txt": "nowhere.txt: no such file or folder",
    "nothing": "no documents",
    "only.bin": "no documents",
    "not_json.jsonl": "not_json.jsonl:3: not JSON",
    "good.txt not_json.jsonl --workers 2": "not_json.jsonl:3: not JSON",
    "latin1.jsonl": "latin1.jsonl:1: not JSON",
    "deep.jsonl": "deep.jsonl:1: not JSON",
    "no_text.jsonl": "no_text.jsonl:1: no `text`",
    "number.jsonl": "number.jsonl:1: no `text`",
    "list.jsonl": "list.jsonl:1: no `text`",
    "bad.parquet": "bad.parquet: ",
    "other.parquet": "no column `text`, but body",
    "null.parquet": "null.parquet: row 2: no `text`",
    "good.txt --val_fraction 0.5": "give --val_fraction 0",
    "good.txt --val_fraction 1": "--val_fraction",
    "good.txt --val_fraction nan": "--val_fraction",
    "good.txt --val_fraction -0.1": "--val_fraction",
    "good.txt --shard_tokens 1023": "--shard_tokens",
    "good.txt --shard_tokens 1e6": "--shard_tokens",
    "good.txt --max_tokens 0": "--max_tokens",
    "good.txt --workers 0": "--workers",
    "good.txt --name a/b": "--name",
    "good.txt --encoding gpt3": "--encoding gpt3 is not gpt2, bytes or the path",
    "good.txt --encoding nowhere.json": "--encoding nowhere.json",
    "good.txt --encoding list.json": "--encoding list.json",
    "good.txt --typo": "--typo",
    "good.txt --out good.txt": "good.txt: ",
    "good.txt --out good.txt/below": "good.txt/below",
}


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """Runs, in a folder of bad inputs, what must end in a line on standard error and leave all as it was."""
    monkeypatch.chdir(tmp_path)
    Path("nothing").mkdir()
    for name, data in BAD_INPUTS.items():
        Path(name).write_bytes(data)

    def run(command, status=2):
        before = contents(tmp_path, "**/*")
        argv = f"--encoding bytes --workers 1 --val_fraction 0 --out new/out {command}".split()
        with pytest.raises(SystemExit) as stop:
            tokenize_text.main(argv)
        output, line = capsys.readouterr()
        assert (stop.value.code, output) == (status, "")
        assert re.fullmatch("tokenize_text.py: .+\n", line)
        assert contents(tmp_path, "**/*") == before
        return line

    return run


@pytest.mark.parametrize("command", BAD_COMMANDS)
def test_what_the_user_can_put_right_is_one_line_and_leaves_nothing(refused, command):
    if "parquet" in command:
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.table({"body": ["a"]}), "other.parquet")
        parquet.write_table(pyarrow.table({"text": ["a", None]}), "null.parquet")
    assert BAD_COMMANDS[command] in refused(command)


def test_a_worker_that_dies_is_one_line_and_leaves_nothing(refused, monkeypatch):
    monkeypatch.setattr(sys, "executable", shutil.which("true"))
    assert "fewer --workers" in refused("good.txt --workers 2")


def test_parquet_without_pyarrow_and_gpt2_without_network_name_the_remedy(refused, monkeypatch):
    def no_network(name):
        raise ConnectionError

    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setattr(tiktoken, "get_encoding", no_network)
    tokenize_text.get_encoding.cache_clear()
    assert "pip install pyarrow" in refused("bad.parquet")
    assert "use --encoding bytes, or set TIKTOKEN_CACHE_DIR" in refused("good.txt --encoding gpt2")


@pytest.mark.parametrize("name", ["dataset.json", "text_train_000007.bin", "text_val_000000.bin"])
def test_an_existing_file_is_never_overwritten(refused, name):
    Path("out").mkdir()
    Path("out", name).write_text("precious")
    line = refused("good.txt no_text.jsonl --out out")  # before the input is read
    assert f"out/{name} exists: remove it, or choose another --out" in line


@pytest.mark.parametrize("call, fault, status, words", [
    ("fsync", OSError(errno.ENOSPC, "Disk full"), 2, "out: Disk full"),
    ("rename", KeyboardInterrupt(), 130, "interrupted")])
def test_files_are_moved_into_place_all_or_none(refused, monkeypatch, call, fault, status, words):
    real = getattr(os, call)
    calls = []

    def fail_at_dataset_json(*args):
        calls.append(args)
        if len(calls) == 2:
            raise fault
        return real(*args)

    Path("out").mkdir()
    Path("out", "mine.txt").write_text("mine")
    monkeypatch.setattr(os, call, fail_at_dataset_json)
    assert words in refused("good.txt --out out", status)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_says_so_in_one_line_and_leaves_nothing(tmp_path, number):
    (tmp_path / "big.txt").write_text("word " * 200_000)
    command = [sys.executable, ROOT / "data" / "tokenize_text.py", *["big.txt"] * 2000]
    command += "--encoding bytes --workers 2 --out new/out".split()
    run = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, start_new_session=True,
                           preexec_fn=lambda: signal.signal(number, signal.SIG_DFL))  # (`&` ignores SIGINT)
    while not list(tmp_path.glob("new/out/.tokenize_*/*.bin")):
        assert run.poll() is None
        time.sleep(0.01)
    os.killpg(run.pid, number)  # as a terminal does
    _, errors = run.communicate(timeout=30)
    assert (run.returncode, errors) == (130, "tokenize_text.py: interrupted, nothing was written\n")
    assert not (tmp_path / "new").exists()


# ----------------------------------------------------------------------------------------------------------
# data/fineweb.py

FINEWEB = ROOT / "data" / "fineweb.py"
REPO, COMMIT = "kjj0/fineweb10B-gpt2", "c0ffee" + 34 * "0"
VAL, TRAIN1, TRAIN2 = "fineweb_val_000000.bin", "fineweb_train_000001.bin", "fineweb_train_000002.bin"


def make_shard(tokens, magic=20240520, claims=None):
    return struct.pack("<256i", magic, 1, claims or tokens, *253 * [0]) + os.urandom(2 * tokens)


class HubRequest(BaseHTTPRequestHandler):
    """What the hub's client asks for: a repo's files, then HEAD and GET (with Range) of each."""

    def do_GET(self):
        hub = self.server
        name = self.path.rsplit("/", 1)[-1]
        wanted = self.headers.get("Range", "bytes=0-")
        hub.requests.append((self.command, name, wanted))
        if hub.says:
            self.answer(*hub.says)
        elif self.path.startswith(f"/api/datasets/{hub.repo}?"):
            files = [{"rfilename": name, "size": len(data)} for name, data in hub.files.items()]
            self.answer(200, json.dumps({"id": hub.repo, "sha": COMMIT, "siblings": files}).encode())
        else:
            assert self.path == f"/datasets/{hub.repo}/resolve/{COMMIT}/{name}"
            self.answer_file(name, int(wanted[len("bytes=") : -1]))

    do_HEAD = do_GET

    def answer_file(self, name, start):
        data = self.server.files[name]
        rest = data[start:]
        headers = {"ETag": name, "Content-Length": len(rest),
                   "Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"}
        body = self.server.once.pop(name, rest) if self.command == "GET" else b""
        self.answer(206 if start else 200, body, headers)
        if self.command == "GET" and len(body) < len(rest):
            self.server.cut()

    def answer(self, status, body, headers={}):
        self.send_response(status)
        for key, value in {"X-Repo-Commit": COMMIT, "Content-Length": len(body), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub with one repo. once: what a file's next GET gives instead; cut: what happens when that is too
    short; says: the one answer to everything."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), HubRequest)
    server.repo, server.requests, server.once, server.says = REPO, [], {}, None
    server.cut = lambda: None
    server.files = {VAL: make_shard(500), TRAIN1: make_shard(1001), TRAIN2: make_shard(1002)}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_HOME", "home")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("NO_PROXY", "*")
    threading.Thread(target=server.serve_forever, args=[0.02], daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def run_fineweb(flags, status=0, script=FINEWEB):
    """Its standard output or, where it must fail, its line on standard error."""
    run = subprocess.run([sys.executable, script, *flags.split()], capture_output=True, text=True, timeout=60)
    assert run.returncode == status, run
    assert re.fullmatch("fineweb.py: .+\n" if status else "", run.stderr), run
    return run.stderr or run.stdout


def test_fineweb_fetches_the_validation_shard_and_the_first_n_next_to_the_script(hub):
    Path("data").mkdir()
    output = run_fineweb("1", script=shutil.copy(FINEWEB, "data"))
    assert f"{TRAIN1}: 1,001 tokens\n" in output
    assert output.endswith("fineweb10B: 2 shards, 1,501 tokens\n")
    folder = Path("data/fineweb10B")
    assert contents(folder, "*.bin") == {name: hub.files[name] for name in (VAL, TRAIN1)}
    assert read_dataset(folder) == {"encoding": "gpt2", "vocab_size": 50257, "document_token": 50256, "source": REPO,
                                    "shards": {TRAIN1: {"tokens": 1001}, VAL: {"tokens": 500}}}


def test_fineweb_asks_nothing_of_the_hub_for_shards_that_are_whole(hub):
    run_fineweb("0 --out d")
    assert set(contents("d")) == {VAL, "dataset.json"}
    hub.requests.clear()
    run_fineweb("0 --out d")
    assert not hub.requests
    run_fineweb("1 --out d")
    assert set(contents("d", "*.bin")) == {VAL, TRAIN1}
    assert not any(VAL in request for request in hub.requests)


def test_fineweb_continues_a_shard_where_the_connection_dropped(hub):
    hub.files[VAL] = make_shard(6_000_000)  # the hub's client reads 10 MiB at a time
    hub.once = {VAL: hub.files[VAL][: 11 << 20]}
    run_fineweb("0 --out d")
    assert contents("d", "*.bin") == {VAL: hub.files[VAL]}
    assert ("GET", VAL, f"bytes={10 << 20}-") in hub.requests


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT])
def test_fineweb_killed_midway_leaves_no_partial_shard_and_the_next_run_finishes(hub, end):
    command = [sys.executable, FINEWEB, *"1 --out d --workers 1".split()]
    hub.once = {TRAIN1: hub.files[TRAIN1][:1500]}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    hub.cut = lambda: process.send_signal(end)
    assert process.communicate(timeout=20)[1] == b"" and process.returncode == -end
    assert set(contents("d")) == {VAL, ".incoming"}
    hub.requests.clear()
    run_fineweb("1 --out d")
    assert contents("d", "*.bin") == {name: hub.files[name] for name in (VAL, TRAIN1)}
    assert not any(VAL in request for request in hub.requests)


@pytest.mark.parametrize("wrong", [make_shard(900, claims=1001), make_shard(1001, magic=20240521), b"<html>"])
def test_fineweb_removes_and_reports_a_file_that_is_no_whole_shard_after_one_more_try(hub, wrong):
    hub.files[TRAIN1] = wrong
    line = run_fineweb("2 --out d", status=2)
    assert TRAIN1 in line and "twice" in line
    assert set(contents("d")) <= {VAL, TRAIN2}
    assert [request[:2] for request in hub.requests].count(("GET", TRAIN1)) == 2


def test_fineweb_replaces_wrong_shards_whether_they_came_now_or_were_there(hub):
    Path("d").mkdir()
    Path("d", VAL).write_bytes(hub.files[VAL][:-2])
    hub.once = {VAL: make_shard(500, claims=501)}
    assert f"{VAL} has 2,022 bytes where its header says 2,024: fetch" in run_fineweb("0 --out d")
    assert contents("d", "*.bin") == {VAL: hub.files[VAL]}


def test_fineweb_without_network_says_so_at_once_and_leaves_nothing(hub):
    hub.shutdown()
    hub.server_close()
    start = time.monotonic()
    line = run_fineweb("1 --out d", status=2)
    assert "cannot reach http://127.0.0.1" in line and "check the network" in line
    assert time.monotonic() - start < 10 and not Path("d").exists()


@pytest.mark.parametrize("flags, says, words", [
    ("", (500, b""), "answered 500"),
    ("", (200, b"<html>"), "cannot reach"),
    ("", (404, b"", {"X-Error-Code": "RepoNotFound"}), f"has no dataset {REPO}"),
    ("3", None, f"{REPO} has no file fineweb_train_000003.bin"),
    ("104", None, "N is 104, but must be 0 to 103"),
    ("-1", None, "0 to 103"),
    ("x", None, "argument N"),
    ("--workers 0", None, "argument --workers"),
    ("--dataset fineweb", None, "OWNER/NAME-gpt2"),
    ("--dataset me/../x-gpt2", None, "OWNER/NAME-gpt2"),
    ("--dataset ../x-gpt2", None, "Repo id")])
def test_fineweb_says_in_one_line_what_is_wrong_and_leaves_nothing(hub, flags, says, words):
    hub.says = says
    assert words in run_fineweb(f"{flags} --out d", status=2)
    assert not Path("d").exists()


def test_fineweb_counts_the_shards_of_a_repo_it_does_not_know(hub):
    hub.repo = "me/slim-pajama6B-gpt2"
    shards = {name.replace("fineweb", "slim-pajama"): data for name, data in hub.files.items()}
    hub.files = shards | {"README.md": b"#"}
    run_fineweb(f"--dataset {hub.repo} --out d")
    assert contents("d", "slim*") == shards


def test_fineweb_does_not_write_into_the_folder_of_another_dataset(hub):
    Path("d").mkdir()
    Path("d", "dataset.json").write_text('{"encoding": "bytes", "vocab_size": 256}')
    before = contents("d")
    assert "dataset.json does not describe" in run_fineweb("0 --out d", status=2)
    assert contents("d") == before and not hub.requests


def test_fineweb_shows_its_progress_as_a_bar_on_a_terminal(hub):
    terminal, stderr = pty.openpty()
    fcntl.ioctl(stderr, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
    command = [sys.executable, FINEWEB, *"1 --out d".split()]
    run = subprocess.run(command, stdout=subprocess.PIPE, stderr=stderr, timeout=60)
    os.close(stderr)
    assert run.returncode == 0 and run.stdout.count(b"\n") == 1  # the summary
    assert b"100%|" in os.read(terminal, 1 << 16)
    os.close(terminal)


def test_fineweb_knows_the_layouts():
    module = importlib.import_module("fineweb")
    assert [module.layout(repo) for repo in module.TRAIN_SHARDS] == [
        ("fineweb10B", "fineweb"), ("fineweb100B", "fineweb"), ("finewebedu10B", "finewebedu")]
    names = module.shard_names("kjj0/finewebedu10B-gpt2", "finewebedu", None)
    train = [f"finewebedu_train_{i:06d}.bin" for i in range(1, 100)]
    assert names == ["finewebedu_val_000000.bin", *train]


# ----------------------------------------------------------------------------------------------------------
# records/bench.py and records/dry_run.py

dry_run = importlib.import_module("dry_run")


def ran(program, *argv):
    """The exit status of a tool."""
    return program.main([*map(str, argv)])


def refusal(capsys, program, *argv):
    """The one line in which a tool says why it does nothing."""
    capsys.readouterr()
    assert ran(program, *argv) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


@pytest.mark.parametrize("kw", [dict(control="dense"), dict(n_kv_heads=1, norm="llama"),
                                dict(ffn_dim_multiplier=2.5, n_layers=6)])
def test_a_config_tells_the_number_of_parameters(kw):
    cfg = Config(**TINY | kw)
    parameters = MiddleSkippingTransformer(cfg).parameters()
    assert archive.parameters(vars(cfg)) == sum(p.numel() for p in parameters)


def test_the_benchmark_measures_every_mode_and_variant_and_writes_a_record(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "DECODE_BATCHES", (1, 3))
    sizes = """--dim 32 --n_heads 2 --n_layers 4 --max_seq_len 64 --vocab_size 64 --device_batch_size 2
        --device cpu --rounds 1 --no-compile --records_dir"""
    assert ran(bench, *sizes.split(), tmp_path) == 0
    record = json.loads(next(tmp_path.glob("*_bench/bench.json")).read_text())
    rows = {(r["mode"], r["batch"], r["variant"], r["sparsity"]): r for r in record["rows"]}
    variants = [("eager", 0), ("dense", 0), *bench.GATED]
    want = [(mode, 2, *v) for mode in ("train", "prefill") for v in variants]
    assert [*rows] == want + [("decode", batch, *v) for batch in (1, 3) for v in variants[1:]]
    for (mode, batch, _, sparsity), row in rows.items():
        dense = rows[mode, batch, "dense", 0]
        flops = row["flops_per_token"] / dense["flops_per_token"]
        assert row["efficiency"] == pytest.approx(dense["seconds"] / row["seconds"] * flops)
        assert row["mfu"] > 0
        # all but the routers, the head and the pairs scale with the active tokens
        assert (1 - sparsity) * 0.9 < flops < 1 - sparsity + 0.26


def test_the_benchmarks_eager_variant_and_flops_are_the_models():
    cfg = Config(**TINY | dict(max_seq_len=64, n_kv_heads=1))
    measured = bench.Bench(cfg, tgs.Runtime(cfg))
    model = measured.model
    tokens = measured.x
    measured.use("dense", 0.0)
    torch.testing.assert_close(bench.eager_loss(model, tokens), model(tokens, tokens)[0])
    measured.use("gated", 0.5)
    _, stats = model(tokens, tokens)
    row = measured.row("train", "gated", 0.5, 2, 1.0, 128, 63 / 2)
    assert row["flops_per_token"] == pytest.approx(3 * tgs.realised_flops(cfg, stats, 128) / 128, rel=0.02)


@pytest.mark.parametrize("wrong", ["--preset demo", "--rounds 0", "--dim 7", "--gpu_report --device cpu"])
def test_the_benchmark_refuses_what_it_cannot_measure_in_one_line(wrong, capsys):
    assert wrong.split()[0] in refusal(capsys, bench, *wrong.split())


def test_a_dry_run_says_what_a_run_would_need_and_writes_nothing(tmp_path, corpus, capsys, monkeypatch):
    argv = flags(corpus, tmp_path / "r", control="dense", num_steps=5)
    assert ran(dry_run, *argv) == 0
    assert not [*tmp_path.iterdir()]
    said = capsys.readouterr().out
    assert tgs.main(argv) == 0
    record = only_record(tmp_path / "r")
    summary = json.loads((record / "summary.json").read_text())
    parameters = archive.parameters(vars(Config(**TINY | dict(control="dense"))))
    for words in (f"{parameters:,} parameters", f"work:  {summary['train_flops']:.3g} training",
                  "5,000 tokens in 2 shards", "5 of 4 x 8 tokens, 160 in all", "each with 2 x 2 sequences"):
        assert words in said
    assert ran(dry_run, "--resume", record) == 0 and "0 of 4 x 8" in capsys.readouterr().out
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    assert "room for 0.0 MB, checkpoints need" in refusal(capsys, dry_run, *argv)


# ----------------------------------------------------------------------------------------------------------
# Records: live and packed ones (archive.py), tracks, report and show

archive, report, tracks = map(importlib.import_module, ("archive", "report", "tracks"))
LINE = ["dense_8", "dense_4", "b2_dense_6", "b2_dense_4"]
TRACK = dict(title="a track", base="", line=LINE, unit="dense_8", seeds=4, p=0.01, target=1.4, tried={},
             regimes=[{"is": "", "prefix": "", "flags": ""}],
             settings={name: ("dense", f"--control dense --n_layers {name[-1]}") for name in LINE})

ENV = json.loads("""{
    "command": "python it", "device": "a CPU", "world_size": 1, "threads": 1, "dtype": "float32",
    "packages": {"torch": "2.13"}, "compile": true,
    "shards": {"train": [{"tokens": 5000}], "val": [{"tokens": 500}]}}""")


def live_run(parent, row, seed=0, loss=1.0, flops=None, zero=0.5, **settings):
    """The folder of a finished run, as the trainer leaves it: a consistent one, unless flops are given."""
    cfg = Config(**TINY | dict(
        n_layers=8, num_steps=30, metrics_every=5, seed=seed, name=f"{row}_seed{seed}", mean_target_end=0.25,
        control="dense" if "dense" in row else "proportional") | settings)
    c = dataclasses.asdict(cfg)
    script = f"a script of {row}\n"
    zeros = [zero if cfg.gated else 0.0] * cfg.n_layers
    event = dict(cross_entropy=2.5, gate_mean=[1 - z for z in zeros], gate_zero=zeros, train_s=1.0,
                 tokens_per_s=9.0, grad_norm=0.5, mean_coef=zeros, var_coef=zeros)
    found = [dict(kind="train", step=step, **event) for step in range(0, 30, 5)]
    found.append(dict(kind="val", step=0, **event))
    found.append(event | dict(kind="val", step=30, cross_entropy=loss))
    flops = flops or archive.realised_flops(c, zeros)[1]
    tokens = 30 * cfg.step_tokens
    summary = found[-1] | dict(
        interrupted=False, sparsity=mean(zeros), realised_flops_per_token=flops, train_seconds=2.0,
        train_flops=3 * flops * tokens, tokens_per_s=tokens / 2)
    env = ENV | dict(source_sha256=hashlib.sha256(script.encode()).hexdigest())
    folder = parent / f"2026-01-01_00-00-{seed:02d}_{cfg.name}"
    folder.mkdir(parents=True)
    for name, text in {
            "train_gpt_skip.py": script, "log.txt": "text\n", "plot.png": "picture",
            "metrics.jsonl": "".join(json.dumps(e) + "\n" for e in found)}.items():
        (folder / name).write_text(text)
    for name, content in ("config", c), ("summary", summary), ("env", env):
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def packed(parent):
    assert ran(tracks, "pack", parent) == 0
    return parent


def files(*folders):
    return {path: path.read_bytes() for folder in folders for path in folder.rglob("*") if path.is_file()}


def change(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.fixture
def one_track(monkeypatch):
    monkeypatch.setattr(archive, "TRACKS", {"track": TRACK})


@few
@given(st.sampled_from([dict(closing=0.4, n_layers=6), dict(control="dense", n_layers=3),
                        dict(closing=0.4, gate_attention="none", compute="masked")]), st.integers(0, 99))
def test_a_records_flops_are_the_scripts_where_no_gate_closes_and_else_bound_them(kw, seed):
    model, cfg = random_model(seed, **kw)
    inputs, targets = random_tokens(cfg, B=3, T=cfg.max_seq_len, seed=seed)
    _, stats = model(inputs, targets)
    n = inputs.numel()
    zeros = tgs.gate_report(cfg, stats, n)["gate_zero"]
    low, high = archive.realised_flops(dataclasses.asdict(cfg), zeros)
    flops = tgs.realised_flops(cfg, stats, n) / n
    assert low * (1 - 1e-5) <= flops <= high * (1 + 1e-5)
    assert flops == pytest.approx(high) or max(zeros) > 0


# ---- packing

def test_packing_loses_no_number_and_removes_only_what_it_packed(tmp_path):
    gated, dense, unfinished = (live_run(tmp_path, row) for row in ("gated", "dense_8", "unfinished"))
    before = {folder: archive.complete(archive.live(folder)) for folder in (gated, dense)}
    (gated / "model.safetensors").write_bytes(b"weights")
    (unfinished / "summary.json").write_text('{"interrupted": true}')
    kept = files(unfinished)
    packed(tmp_path)
    for folder, (run, curve) in before.items():
        line, thin = archive.find(folder)
        assert line == {k: run[k] for k in archive.KEPT}
        assert thin == {"name": folder.name} | {k: [v[0], v[5]] for k, v in curve.items()}  # steps 0 and 25
    assert {p.name for p in gated.iterdir()} == {"config.json", "model.safetensors"}
    assert not dense.exists() and files(unfinished) == kept


def test_packing_that_is_killed_at_any_point_loses_nothing_and_is_finished_by_the_next(tmp_path, monkeypatch):
    def dying(call, left):
        def dies(*args, **kw):
            if next(left, None) is None:
                raise KeyboardInterrupt
            return call(*args, **kw)
        return dies

    packings, status = [], 130
    while status == 130:
        left, folder = iter(range(len(packings))), tmp_path / str(len(packings))
        names = [live_run(folder, row).name for row in ("gated", "dense_8")]
        with monkeypatch.context() as patch:
            for of, name in (os, "fsync"), (os, "replace"), (Path, "unlink"), (Path, "rmdir"):
                patch.setattr(of, name, dying(getattr(of, name), left))
            status = ran(tracks, "pack", folder)
        for path in sorted(folder.glob("*.jsonl"))[:status]:
            path.open("a").write('{"name": "a part of a li')
        ran(tracks, "pack", folder)
        assert not list(folder.glob("*/*.json*"))
        packings.append([archive.find(folder / name) for name in names])
    assert len(packings) > 20 and packings == [packings[-1]] * len(packings)


def test_packing_refuses_a_damaged_run_and_another_of_the_same_name_in_one_line_each(tmp_path, capsys):
    """But not the same one, done again to the same digits in another time."""
    live_run(tmp_path, "gated")
    packed(tmp_path)
    change(live_run(tmp_path, "gated") / "metrics.jsonl", '"train_s": 1.0', '"train_s": 7.0')
    packed(tmp_path)
    refused = live_run(tmp_path, "gated", loss=1.5), live_run(tmp_path, "dense_8")
    change(refused[1] / "summary.json", '"cross_entropy": 1.0', '"cross_entropy": 1.1')
    whole = live_run(tmp_path, "whole")
    before = files(*refused)
    assert ran(tracks, "pack", tmp_path) == 2
    damaged, another = capsys.readouterr().err.splitlines()
    assert "cross_entropy of 1.1" in damaged and "another run of this name" in another
    assert files(*refused) == before
    assert [*archive.by_name(tmp_path / "runs.jsonl")] == [refused[0].name, whole.name]


# ---- what decides

@pytest.mark.parametrize("t, df, p", [(6.314, 1, 0.05), (-2.764, 10, 0.99), (2.326, 1e5, 0.01)])
def test_the_tails_of_students_t_are_those_of_the_tables(t, df, p):
    assert report.survival(t, df) == pytest.approx(p, rel=2e-3)


def compared(folder):
    return report.Comparison(report.results(folder, TRACK), TRACK)


def test_a_row_beats_its_regimes_dense_line_only_with_seeds_enough_a_side_and_p_under_the_tracks(tmp_path):
    """A regime is batch, steps, length, optimizer and cooldown, as the configs, not the names, have them."""
    for line in """dense_8      1.00  0.001  1      adamw  4
                   dense_4      2.00 -0.001  0.5    adamw  4
                   pre_dense_8  1.55  0.001  0.75   adamw  4
                   good         1.45  0.001  0.75   adamw  4
                   wide         1.45  0.1    0.75   adamw  4
                   few          1.45  0.001  0.75   adamw  3
                   b2_dense_6   1.20  0      0.75   muon   4
                   b2_dense_4   1.60  0      0.5    muon   4
                   there        1.30  0.001  0.625  muon   4""".splitlines():
        row, loss, slope, flops, optimizer, seeds = line.split()
        for seed in range(int(seeds)):
            live_run(tmp_path, row, seed, float(loss) + float(slope) * (seed - 1.5), float(flops),
                     optimizer=optimizer)
    live_run(tmp_path, "nowhere", max_seq_len=4)  # no line of its own
    c = compared(tmp_path)
    # the variances add: of the row, and of half of each neighbour
    sd = c.rows["good"].sd / 2 * math.sqrt(1 + 0.25 + 0.25)
    p = report.survival(0.05 / sd, 1.5**2 / (1 + 2 * 0.25**2) * 3)
    assert c.against["forward FLOPs"]["good"] == pytest.approx((-0.05, p, 4, sd))
    said = {row: c.verdict(x, "beat").split(": ")[-1] for row, x in c.against["training FLOPs"].items()}
    assert said == dict(good="beats", pre_dense_8="does not beat", wide="does not beat", there="beats",
                        few="too few seeds")
    assert c.against["forward FLOPs"]["there"][0] == pytest.approx(-0.1)
    dense = c.dense_line(c.rows["good"].line, "forward FLOPs")
    assert report.shares(1.04, dense) == pytest.approx({"dense_4": -0.08, "dense_8": 1.08})
    assert report.shares(1.06, dense) is None


def write_times(folder, day, **times):
    (place := folder / f"2026-11-0{day}_00-00-00_times").mkdir()
    ratios = {name: {"forward": t, "train": t} for name, t in times.items()}
    (place / "times.json").write_text(json.dumps({"ratios": ratios}))


def test_a_seed_costs_its_newest_time_or_its_rows_mean_against_the_dense_models_of_that_measurement(tmp_path):
    for seed in range(2):
        live_run(tmp_path, "dense_8", seed, 1.0 + 0.1 * seed, 1.0)
        live_run(tmp_path, "dense_4", seed, 2.0 - 0.1 * seed, 0.5, n_layers=4)
    first, _, third = (live_run(tmp_path, "good", seed, 1.5, 0.75).name for seed in range(3))
    write_times(tmp_path, 1, dense_8=1.0, good=9.0)
    write_times(tmp_path, 2, dense_8=1.0, dense_4=0.5, **{first: 0.75, third: 0.9})
    write_times(tmp_path, 3, dense_8=1.0, dense_4=0.6, **{third: 0.8})
    c = compared(tmp_path)
    for cost in "forward time", "training time":
        # 0 and 2 are half way between the dense models, 1 a sixteenth of their difference below the line
        assert c.against[cost]["good"][0] == pytest.approx(-0.9 / 16 / 3)


# ---- tracks

def test_every_packed_run_is_one_that_its_rows_flags_make():
    track = archive.TRACKS["frontier"]
    settings_of = functools.cache(tracks.settings_of)
    rows = archive.rows_of(track)
    for run in archive.runs(ROOT / "records" / "frontier"):
        assert run["row"] in rows
        flags = rows[run["row"]].flags
        asked = settings_of((*track["base"].split(), *flags)) if flags else {}
        for key in run["config"].keys() & asked.keys() - {"seed"}:
            assert run["config"][key] == asked[key], (run["name"], key)


def test_tracks_run_what_is_not_recorded_with_these_flags_and_resume_what_was_interrupted(
        tmp_path, monkeypatch, capsys, one_track):
    from unittest.mock import Mock
    base = TINY | dict(num_steps=30, mean_target_end=0.25, metrics_every=5)
    monkeypatch.setitem(TRACK, "base", " ".join(f"--{k} {v}" for k, v in base.items()))
    live_run(tmp_path, "dense_4", n_layers=4)
    packed(tmp_path)
    (live_run(tmp_path, "dense_8", 1) / "summary.json").write_text('{"interrupted": true}')
    calls, wait = [], Mock(side_effect=[0, 3, 0, 0, 0, 0, 0, KeyboardInterrupt, 0])

    def start(command, **how):
        calls.append(" ".join(command))
        return SimpleNamespace(wait=wait)

    monkeypatch.setattr(tracks.subprocess, "Popen", start)
    command = *"run track --seeds 2 --rows dense_8 dense_4 --records_dir".split(), tmp_path
    assert ran(tracks, *command) == 2  # one of them failed; the others ran
    for call, words in zip(calls, ("--seed 0 --name dense_8_seed0", "--resume", "--n_layers 4 --seed 1")):
        assert call.startswith("bash run.sh --") and words in call
    assert "failed, see above: dense_8, seed 1" in capsys.readouterr().err
    assert ran(tracks, *command, "--", "--lr", 0.5) == 0  # other flags: other runs
    assert len(calls) == 7 and "--lr 0.5" in calls[3]
    assert ran(tracks, *command) == 130  # Ctrl-C: the run saves, and is waited for
    assert wait.call_count == 9


def test_tracks_time_dense_rows_and_every_seed_whose_weights_are_there(tmp_path, corpus, monkeypatch, capsys,
                                                                       one_track):
    base = flags(corpus, tmp_path, device_batch_size=1, batch_size=1)
    gated = {name: (name, "--mean_target_end 0.25") for name in ("gated", "other")}
    monkeypatch.setitem(TRACK, "base", " ".join(base))
    monkeypatch.setitem(TRACK, "settings", TRACK["settings"] | gated)
    for seed in 0, 1:
        assert ran(tgs, *base, "--mean_target_end", 0.25, "--seed", seed, "--name", f"gated_seed{seed}") == 0
    packed(tmp_path)  # the weights stay
    command = "time track --rounds 1 --rows gated dense_4 other --records_dir"
    assert ran(tracks, *command.split(), tmp_path) == 0
    assert "other is left out" in capsys.readouterr().out
    (content,) = archive.times(tmp_path)
    assert content["ratios"].keys() == {"dense_4", "dense_8", *(p.name for p in tmp_path.glob("*_seed?"))}


@pytest.mark.parametrize("wrong, said", [
    ("run nowhere", "no track"), ("run --rows x", "no row"), ("time figure2", "no row"), ("", "required"),
    ("run -- --nonsense 1", "--nonsense"), ("pack nowhere", "no live record")])
def test_tracks_name_a_mistake_in_one_line(wrong, said, capsys):
    assert said in refusal(capsys, tracks, *wrong.split())


# ---- report

@pytest.fixture
def reported(tmp_path, one_track):
    """Of a report on live runs: its folder."""
    for row, n_layers, loss in ("dense_8", 8, 1.0), ("dense_4", 4, 2.0), ("gated", 8, 1.3):
        for seed in range(4):
            live_run(tmp_path / "track", row, seed, loss + 0.001 * seed, zero=0.25, n_layers=n_layers)
    write_times(tmp_path / "track", 1, dense_8=1.0, dense_4=0.625, gated=0.8125)
    assert ran(report, tmp_path) == ran(report, "--verify", tmp_path) == 0
    return tmp_path


def test_live_and_packed_runs_give_the_same_report(reported):
    text = (reported / "README.md").read_text()
    packed(reported / "track")
    assert ran(report, reported) == ran(report, "--verify", reported) == 0
    assert (reported / "README.md").read_text() == text
    assert "| gated | - | 1.3015 ± 0.0013 (4) |" in text
    assert (reported / "track.png").read_bytes().startswith(b"\x89PNG")


@few
@given(st.sampled_from(["runs.jsonl", "curves.jsonl", "times.jsonl", "../README.md"]), st.integers(0, 10**9),
       st.sampled_from("0123456789"))
def test_verify_notices_a_changed_digit_of_any_packed_number_or_table(reported, name, place, digit):
    path = reported / "track" / name
    if not (reported / "track" / "runs.jsonl").exists():
        packed(reported / "track")
    before = path.read_text()
    digits = [m.start() for m in re.finditer(r"\d", before)]
    place = digits[place % len(digits)]
    path.write_text(before[:place] + digit + before[place + 1:])
    assert ran(report, "--verify", reported) == (0 if path.read_text() == before else 2)
    path.write_text(before)


@pytest.mark.parametrize("file, old, new, said", [
    ("train_gpt_skip.py", "a script", "b script", "source_sha256"),
    ("summary.json", '"step": 30', '"step": 31', "every 5 of 31"),
    ("summary.json", '"cross_entropy": 1.0', '"cross_entropy": 1.5', "cross_entropy of 1.5"),
    ("summary.json", '_token": ', '_token": 9', "realised_flops_per_token"),
    ("metrics.jsonl", '"step": 5', '"step": 6', "training steps once"),
    ("metrics.jsonl", '"mean_coef": [0.5', '"mean_coef": [0.4', "other gates in the second half"),
    ("config.json", '"dim": 16', '"dim": "x"', "TypeError"),
    ("env.json", "}", "", "damaged: env.json")])
def test_verify_holds_a_live_run_against_itself_and_names_what_disagrees(tmp_path, file, old, new, said,
                                                                         capsys):
    run = live_run(tmp_path, "gated")
    assert ran(report, "--verify", tmp_path) == 0
    change(run / file, old, new)
    error = refusal(capsys, report, "--verify", tmp_path)
    assert run.name in error and said in error


def test_verify_finds_nothing_wrong_in_the_projects_own_records():
    assert ran(report, "--verify") == 0


def test_report_rewrites_the_readme_between_its_markers_only(tmp_path, one_track, capsys):
    readme, before, after = tmp_path / "README.md", b"# Mine\r\n\xc3\xa9 | text  \n", b"\n\nBelow\r\n no end"
    readme.write_bytes(before + f"{report.BEGIN}\nold table\n{report.END}".encode() + after)
    live_run(tmp_path / "track", "dense", loss=1.25)  # without the unit: a plain table
    for what, more in ("| dense | - | 30 | 1.2500 (1) |", {"zero": 0.5}), ("| gated |", {"zero": 0.0, "seed": 1}):
        assert ran(report, tmp_path) == 0
        text = readme.read_bytes()
        assert text.startswith(before) and text.endswith(after) and b"old table" not in text
        assert what.encode() in text and (tmp_path / "track.png").exists()
        live_run(tmp_path / "track", "gated", **more)
    assert ran(report, tmp_path) == 0  # one seed's gates never closed
    readme.write_text(f"{report.BEGIN}\nmy text")  # whose end is missing: left alone
    assert ran(report, tmp_path) == 2 and readme.read_text().endswith("my text")
    readme.unlink()
    live_run(tmp_path / "track", "gated", 2, lr=0.5)
    assert "has another --lr" in refusal(capsys, report, tmp_path)


def test_report_shows_25_rows_of_a_table_and_folds_the_others_away():
    text = report.markdown("many", [dict(row=f"row {i}") for i in range(30)], ["row"])
    shown, folded = text.split("<details>")
    assert shown.count("row ") == 26
    assert folded.count("row ") == 6 and "many, the rest" in folded


@pytest.mark.parametrize("file, content, said", [
    ("summary.json", "[]", "damaged: summary.json: not an object"),
    ("summary.json", '{"interrupted": true, "step": 3}', "interrupted"),
    ("config.json", "{", "damaged: config.json")])
def test_report_names_a_damaged_or_unfinished_record_in_one_line(tmp_path, capsys, file, content, said):
    assert ran(report, tmp_path) == 0 and "no records yet" in capsys.readouterr().out
    path = live_run(tmp_path, "other") / file
    path.write_text(content)
    assert ran(report, tmp_path) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if path.parent.name in line]
    assert len(lines) == 1 and said in lines[0]


# ---- show

def test_show_draws_and_tells_of_a_running_a_finished_and_a_packed_run(tmp_path, capsys):
    run = live_run(tmp_path, "gated")
    summary = (run / "summary.json").rename(tmp_path / "summary.json")
    (run / "metrics.jsonl").open("a").write('{"kind": "tr')  # being written
    assert ran(show, run, "--plot") == ran(show, run) == 0
    assert "is not finished" in capsys.readouterr().out
    summary.rename(run / "summary.json")
    for next_step, plot in ("./run.sh sample", run / "plot.png"), ("./run.sh --config", Path(f"{run}.png")):
        assert ran(show, run) == ran(show, run, "--plot") == 0
        text = capsys.readouterr().out
        assert text.count("|████████████            |  50.0%") == 8 and "dense (0." in text
        assert next_step in text and plot.read_bytes().startswith(b"\x89PNG")
        if run.exists():
            packed(tmp_path)
    assert "neither a whole record" in refusal(capsys, show, tmp_path / "nothing")


def test_show_says_at_the_start_where_on_what_and_of_what_a_run_is_in_its_log_too(tmp_path, capsys):
    run = live_run(tmp_path, "gated", train_tokens=4000, n_layers=2)
    (run / "metrics.jsonl").write_text("")
    assert ran(show, run, "--opening", "--log") == 0
    said = capsys.readouterr().out
    assert (run / "log.txt").read_text() == f"text\n{said}"
    for words in (run.name, "a CPU, processes: 1", "torch 2.13", "2 blocks", "control proportional",
                  "--mean_target_start", "weights: new", "train: 4,000 tokens", "steps: 30 of 4 x 8"):
        assert words in said


@pytest.mark.parametrize("loss, zero, said", [
    (1.0, 0.0, "gates stay open"), (2.7, 0.5, "divergence"), (1.0, 0.5, None)])
def test_the_papers_ways_to_fail_are_warned_of_once(tmp_path, capsys, loss, zero, said):
    run = live_run(tmp_path, "gated", loss=loss, zero=zero)
    for expected in said, None:
        assert ran(show, run, "--plot", "--log") == 0
        text = capsys.readouterr().out
        assert text.startswith(f"WARNING: {expected}") if expected else text == ""


def test_show_tells_of_ranks_that_waited(tmp_path, capsys):
    run = live_run(tmp_path, "gated")
    event = archive.read_events(run)[0] | dict(rank_imbalance=1.5)
    (run / "metrics.jsonl").write_text(json.dumps(event) + "\n")
    ddp = dict(avg_backward_comm_time=4e6, avg_backward_compute_comm_overlap_time=3e6)
    change(run / "summary.json", '"interrupted"', f'"ddp": {json.dumps(ddp)}, "interrupted"')
    assert ran(show, run) == 0
    said = capsys.readouterr().out
    assert "4.0 ms a step, of which 3.0 ms are hidden" in said and "busiest rank has 1.500" in said


def test_show_needs_neither_torch_nor_the_script():
    code = "import sys, show; assert not {'torch', 'matplotlib', 'train_gpt_skip'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT / "records", check=True)
