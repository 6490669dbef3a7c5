"""The specification of train_gpt_skip.py as tests: each name is a sentence of it, groups follow the script.

The oracle is a transcription of the paper's equations in float64, with loops, that shares no code with the
script.
"""
import copy, dataclasses, errno, fcntl, functools, hashlib, importlib, importlib.util, json, math, os, pickle
import pty, random, re, shutil, signal, socket, struct, subprocess, sys, sysconfig, tempfile, termios
import threading, time
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
tokenize_text, tool, sample, evaluate, convert, bench, plan, show = map(importlib.import_module, (
    "tokenize_text", "tool", "sample", "evaluate", "convert", "bench", "plan", "show"))
TINY = dict(dim=16, n_layers=4, n_heads=2, vocab_size=11, max_seq_len=8, batch_size=4, device_batch_size=2,
            num_steps=3)
torch.set_num_threads(1)  # the cases are tiny
os.environ["OMP_NUM_THREADS"] = "1"
few = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))


# ----------------------------------------------------------------------------------------------------------
# The oracle: Eq. 1-5 and Llama 3's modules, a token at a time.

def oracle_norm(x, w, eps):
    return x / torch.sqrt((x * x).mean() + eps) * w


def oracle_rope(x, i, cfg):
    y = x.clone()
    for p in range(len(x) // 2):
        angle = i * cfg.rope_theta ** (-2 * p / len(x))
        c, s = math.cos(angle), math.sin(angle)
        y[2 * p], y[2 * p + 1] = x[2 * p] * c - x[2 * p + 1] * s, x[2 * p] * s + x[2 * p + 1] * c
    return y


def oracle_attention(x, g, P, p, cfg):
    """Eq. 3 for every head; x: normalised inputs of one sequence; g: its gates at this block, or None."""
    D, out = cfg.dim // cfg.n_heads, []
    q = [(P[p + "wq.weight"] @ v).view(-1, D) for v in x]
    k = [(P[p + "wk.weight"] @ v).view(-1, D) for v in x]
    v = [(P[p + "wv.weight"] @ v).view(-1, D) for v in x]
    for i in range(len(x)):
        heads = []
        for h in range(cfg.n_heads):
            kv = h // (cfg.n_heads // cfg.n_kv_heads)
            top, bottom = torch.zeros(D, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
            for j in range(i + 1):
                logit = oracle_rope(q[i][h], i, cfg) @ oracle_rope(k[j][kv], j, cfg) / math.sqrt(D)
                weight = torch.exp(logit)
                if g is not None:
                    weight = weight * (torch.clamp(g[j], min=1e-6) if g[j] > 0 else 0.0)
                top, bottom = top + weight * v[j][kv], bottom + weight
            heads.append(top / bottom if bottom > 0 else top)
        out.append(P[p + "wo.weight"] @ torch.cat(heads))
    return out


def oracle_block(h, g, P, l, cfg):
    p, eps, one = f"layers.{l}.", cfg.norm_eps, [1.0] * len(h)
    post = (lambda y, name: oracle_norm(y, P[p + name], eps) if cfg.norm == "sandwich" else y)
    x = [oracle_norm(v, P[p + "pre_attention_norm.weight"], eps) for v in h]
    o = oracle_attention(x, g if cfg.gate_attention == "keys" else None, P, p + "attention.", cfg)
    a = [v + w * post(y, "post_attention_norm.weight") for v, y, w in zip(h, o, g or one)]
    out = []
    for v, w in zip(a, g or one):
        x = oracle_norm(v, P[p + "pre_feed_forward_norm.weight"], eps)
        u = P[p + "feed_forward.w1.weight"] @ x
        gated = u / (1 + torch.exp(-u)) * (P[p + "feed_forward.w3.weight"] @ x)
        y = P[p + "feed_forward.w2.weight"] @ gated
        out.append(v + w * post(y, "post_feed_forward_norm.weight"))
    return out


def oracle_forward(tokens, P, cfg):
    """(logits (B, T, V), gates (L, B, T)) of tokens (B, T), from parameters P by released name, float64."""
    logits, gates = [], []
    for sequence in tokens:
        h = [P["tok_embeddings.weight"][t] for t in sequence]
        if cfg.norm != "llama":
            h = [oracle_norm(v, P["input_norm.weight"], cfg.norm_eps) for v in h]
        S, g_of = [torch.zeros((), dtype=torch.float64)] * len(h), {}
        for l in range(cfg.n_layers):
            if not cfg.gated:
                g_of[l] = None
            elif l < cfg.n_layers // 2:
                w, b = P[f"masks.{l}.linear.weight"][0], P[f"masks.{l}.linear.bias"][0]
                S = [s + torch.relu(w @ v + b) for s, v in zip(S, h)]  # Eq. 1
                g_of[l] = [1 - s if s < 1 else torch.zeros_like(s) for s in S]  # Eq. 2
            else:
                g_of[l] = g_of[cfg.n_layers - 1 - l]
            h = oracle_block(h, g_of[l], P, l, cfg)
        h = [oracle_norm(v, P["output_norm.weight"], cfg.norm_eps) for v in h]
        logits.append(torch.stack([P["output.weight"] @ v for v in h]))
        gates.append(torch.stack([torch.stack(g_of[l]) for l in range(cfg.n_layers)]) if cfg.gated else
                     torch.ones(cfg.n_layers, len(h), dtype=torch.float64))
    return torch.stack(logits), torch.stack(gates, 1)


def oracle_loss(logits, gates, targets, alpha, beta):
    """Cross-entropy plus Eq. 5, with alpha and beta of all L layers."""
    ce = torch.stack([torch.logsumexp(row, 0) - row[t]
                      for row, t in zip(logits.flatten(0, 1), targets.flatten())])
    loss, N = ce.mean(), gates[0].numel()
    for l in range(len(gates)):
        g = gates[l].flatten()
        m = g.sum() / N
        loss = loss + (alpha[l] * m + beta[l] * ((g - m) ** 2).sum() / N) / len(gates)
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
    B, T = tokens.shape
    h, levels = model.hidden(tokens.flatten(), torch.arange(B).repeat_interleave(T), torch.arange(T).repeat(B), B)
    return model.output(h).view(B, T, -1), tool.blocks_run(levels, B * T, model.cfg.n_layers).view(B, T)


# ----------------------------------------------------------------------------------------------------------
# Model

@pytest.mark.parametrize("kw", [
    dict(), dict(closing=0.3), dict(closing=0.6, n_layers=6), dict(closing=1.5),
    dict(closing=0.3, n_kv_heads=1),
    dict(closing=0.3, norm="pre"), dict(closing=0.3, norm="llama"), dict(control="dense"),
    dict(control="dense", norm="llama"), dict(control="dense", n_layers=3),
    dict(control="dense", n_layers=1), dict(closing=0.3, gate_attention="none", compute="masked"),
    dict(n_layers=2, closing=0.3), dict(closing=0.4, compute="masked")], ids=str)
def test_outputs_loss_and_every_gradient_are_those_of_the_paper_equations(kw):
    model, cfg = random_model(1, **kw)
    inputs, targets = random_tokens(cfg)
    P = {k: v.detach().double().requires_grad_() for k, v in model.named_parameters()}
    logits, gates = oracle_forward(inputs, P, cfg)
    alpha, beta = [0.7 + 0.1 * l for l in range(cfg.n_levels)], [0.3 - 0.4 * l for l in range(cfg.n_levels)]
    if cfg.n_layers % 2:  # dense; coefficients, which are 0 there, are for pairs
        alpha = beta = [0.0] * cfg.n_levels
    want = oracle_loss(logits, gates, targets, alpha + alpha[::-1], beta + beta[::-1])
    want.backward()

    ce, stats = model(inputs, targets)
    control = tgs.GateControl(cfg, "cpu")
    control.coef = torch.tensor([alpha, beta], dtype=torch.float64)
    loss = ce + control.loss(tgs.moments(stats, inputs.numel()))
    loss.backward()
    torch.testing.assert_close(model_logits(model, inputs)[0].double(), logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-6)
    report = tgs.gate_report(cfg, stats.detach(), inputs.numel())
    torch.testing.assert_close(torch.tensor(report["gate_mean"]), gates.mean((1, 2)).float(), rtol=1e-4,
                               atol=1e-5)
    assert report["gate_zero"] == pytest.approx((gates == 0).double().mean((1, 2)).tolist())
    for name, p in model.named_parameters():
        # None: no token reached it
        exact = torch.zeros_like(P[name]) if P[name].grad is None else P[name].grad
        scale = exact.abs().max() + 1e-3
        torch.testing.assert_close(p.grad.double() / scale, exact / scale, rtol=1e-3, atol=1e-4, msg=name)


@few
@given(seed=st.integers(0, 99), closing=st.floats(0, 2), n_layers=st.sampled_from([2, 4, 8]),
       B=st.integers(1, 4), T=st.integers(1, 8), heads=st.sampled_from([(1, 1), (2, 1), (4, 2), (4, 4)]))
def test_packed_and_masked_agree_in_the_loss_and_in_every_gradient(seed, closing, n_layers, B, T, heads):
    model, cfg = random_model(seed, closing, n_layers=n_layers, n_heads=heads[0], n_kv_heads=heads[1])
    inputs, targets = random_tokens(cfg, B, T, seed)
    results = []
    for compute in ("packed", "masked"):
        model.cfg.compute = compute
        model.zero_grad()
        ce, stats = model(inputs, targets)
        (ce + 0.3 * tgs.moments(stats, B * T).sum()).backward()
        results.append([ce, stats[:, :3], *(p.grad for p in model.parameters())])
    for a, b in zip(*results):  # float32 sums in another order: to 1e-4 of a tensor's largest number
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * max(0.1, b.abs().max().item()))


def test_a_skipped_position_changes_nothing_that_other_positions_see():
    """Tokens 0 and 1 skip at the first router; one for the other leaves all other logits the same, bit for
    bit. With the released code's attention (no gate on keys) it does not."""
    for gate_attention in ("keys", "none"):
        model, cfg = random_model(2, gate_attention=gate_attention, compute="masked")
        with torch.no_grad():
            model.masks[0].linear.weight.zero_()[0, 0] = 10.0
            model.masks[0].linear.bias.fill_(-5.0)
            model.masks[1].linear.bias.fill_(-100.0)
            model.tok_embeddings.weight[:, 0] = 0.0
            model.tok_embeddings.weight[:2, 0] = 3.0
        a = torch.tensor([[5, 0, 3, 4, 0, 6]])
        b = torch.tensor([[5, 1, 3, 4, 0, 6]])
        (la, depth), (lb, _) = model_logits(model, a), model_logits(model, b)
        assert depth.tolist() == [[4, 0, 4, 4, 0, 4]]
        others = [0, 2, 3, 4, 5]
        assert torch.equal(la[:, others], lb[:, others]) == (gate_attention == "keys")


def test_the_released_bias_on_query_rows_changes_nothing():
    """Why its gate masks nothing: a constant added to a row of logits cancels in the softmax."""
    logits, g = torch.randn(6, 6, dtype=torch.float64), torch.rand(6, dtype=torch.float64)
    rows = (logits + g.clamp(min=1e-6).log()[:, None]).softmax(-1)
    torch.testing.assert_close(rows, logits.softmax(-1))
    assert not torch.allclose((logits + g.log()[None, :]).softmax(-1), logits.softmax(-1), atol=1e-3)


def test_gates_of_one_give_the_dense_model():
    dense, _ = random_model(3, control="dense")
    gated = MiddleSkippingTransformer(Config(**TINY))
    gated.load_state_dict(dense.state_dict(), strict=False)
    for router in gated.masks:
        torch.nn.init.zeros_(router.linear.weight), torch.nn.init.zeros_(router.linear.bias)
    inputs, _ = random_tokens(dense.cfg)
    assert torch.equal(model_logits(gated, inputs)[0], model_logits(dense, inputs)[0])


@pytest.mark.parametrize("compute", ["packed", "masked"])
def test_no_position_sees_a_later_one(compute):
    model, cfg = random_model(4, closing=0.3, compute=compute)
    inputs, _ = random_tokens(cfg, 1, 8)
    changed = inputs.clone()
    changed[0, 5] = (changed[0, 5] + 1) % cfg.vocab_size
    a, b = model_logits(model, inputs)[0], model_logits(model, changed)[0]
    torch.testing.assert_close(a[:, :5], b[:, :5])
    assert not torch.allclose(a[:, 5:], b[:, 5:])


def test_random_gates_are_open_as_often_as_their_targets_ask_nested_and_the_same_in_decoding():
    model, cfg = random_model(5, control="random", n_layers=6, mean_target_start=0.9, mean_target_end=0.2,
                              vocab_size=257, max_seq_len=64)
    inputs, targets = random_tokens(cfg, 64, 64)
    with torch.no_grad():
        depth = model_logits(model, inputs)[1]
        _, stats = model(inputs, targets)
        torch.testing.assert_close(stats[:, 2] / inputs.numel(), torch.tensor([0.9, 0.55, 0.2]).double(),
                                   rtol=0, atol=0.03)
        assert torch.equal(stats[:, 0], stats[:, 2]) and not model.masks
        check_decoding(model, [[1, 2, 3], [4]], 12)
        model.cfg.compute = "masked"
        torch.testing.assert_close(model(inputs, targets)[1][:, :3], stats[:, :3])
    model.cfg = Config(**TINY | dict(control="random", n_layers=6, seed=1, max_seq_len=64, vocab_size=257))
    assert not torch.equal(model_logits(model, inputs)[1], depth)


def test_a_gate_that_has_reached_zero_passes_no_gradient():
    S = torch.tensor([0.0, 0.5, 1.0, 1.5], requires_grad=True)
    _, g = tgs.accumulate(torch.nn.Identity(), S, torch.zeros(4))
    g.sum().backward()
    assert g.tolist() == [1, 0.5, 0, 0] and S.grad.tolist() == [-1, -1, 0, 0]


def test_a_batch_in_which_no_token_runs_any_block_still_gives_every_parameter_a_gradient():
    model, cfg = random_model(5)
    torch.nn.init.constant_(model.masks[0].linear.bias, 1e3)
    ce, stats = model(*random_tokens(cfg))
    ce.backward()
    assert stats[:, 2].tolist() == [0, 0]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("factor", [8, 32])
def test_scaled_rope_is_llama_3s(factor):
    cfg = Config(**TINY | dict(use_scaled_rope=True, dim=64, rope_theta=500000.0, rope_factor=factor))
    cos, _ = tgs.rope_table(cfg)
    for p in range(cfg.head_dim // 2):
        f = cfg.rope_theta ** (-2 * p / cfg.head_dim)
        wavelength = 2 * math.pi / f
        smooth = (8192 / wavelength - 1) / 3
        if wavelength > 2048:
            f = f / factor if wavelength > 8192 else (1 - smooth) * f / factor + smooth * f
        assert cos[5, p].item() == pytest.approx(math.cos(5 * f), abs=1e-5)


def test_initial_weights_are_normal_norms_one_and_router_biases_zero():
    cfg = Config(**TINY | dict(dim=128))
    model = MiddleSkippingTransformer(cfg)
    tgs.initialise(model, cfg)
    for name, p in model.named_parameters():
        if "norm" in name or name.endswith("bias"):
            assert (p == (1 if "norm" in name else 0)).all()
        else:
            assert p.std().item() == pytest.approx(0.02, rel=0.3), name
    model.extra = torch.nn.Linear(2, 2)
    with pytest.raises(RuntimeError, match="extra"):
        tgs.initialise(model, cfg)


# ----------------------------------------------------------------------------------------------------------
# FlexAttention's tables and kernel (CUDA's path), as far as a CPU can show them

def packing(lengths, total):
    seq = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)])
    return torch.cat((seq, torch.full((total - len(seq),), len(lengths))))


lengths_of_sequences = st.lists(st.integers(1, 300), min_size=1, max_size=8)


@settings(max_examples=150, deadline=None)
@given(lengths_of_sequences)
def test_mask_tables_are_those_of_the_dense_mask(lengths):
    n = -(-sum(lengths) // tgs.ROWS) * tgs.ROWS
    seq = packing(lengths, n)
    i = torch.arange(n)
    dense = (i[:, None] >= i) & (seq[:, None] == seq)
    blocks = dense.view(n // tgs.ROWS, tgs.ROWS, n // tgs.ROWS, tgs.ROWS).transpose(1, 2)
    some, every = blocks.any(-1).any(-1), blocks.all(-1).all(-1)
    start, *tables = tgs.mask_tables(seq)
    assert torch.equal((i[:, None] >= i) & (i >= start[:, None]), dense)
    for side in (0, 4):  # by query block, and by key block
        n_part, part, n_full, full = (t[0, 0] for t in tables[side:side + 4])
        for q in range(len(some)):
            assert sorted(part[q, :n_part[q]].tolist()) == (some[q] & ~every[q]).nonzero().flatten().tolist()
            assert sorted(full[q, :n_full[q]].tolist()) == every[q].nonzero().flatten().tolist()
        some, every = some.T, every.T


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("gated", [True, False])
def test_flex_attention_gives_what_the_cpu_kernel_gives(kv_heads, gated):
    lengths, n, D = [130, 1, 200, 40], 384, 16
    seq = packing(lengths, n)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(n, h, D, generator=generator) for h in (4, kv_heads, kv_heads))
    g = torch.rand(n, generator=generator)
    g[::7] = 0
    ln_g = tgs.log_gate(g) if gated else None
    with torch.no_grad():
        layout = tgs.make_layout(seq, torch.arange(n), torch.ones(n, 8), torch.ones(n, 8), 1 + len(lengths), True)
        rows = tgs.attend_rows(q, k, v, ln_g, layout)
        flex = tgs.attend_flex(q, k, v, ln_g, layout)
    seen = slice(None) if not gated else torch.tensor([(g[(seq == seq[i]).nonzero()[0, 0]:i + 1] > 0).any()
                                                       for i in range(n)])
    torch.testing.assert_close(rows[seen], flex[seen], rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("kw", [dict(closing=0.3), dict(closing=1.5, n_kv_heads=1),
                                dict(closing=0.3, compute="masked"), dict(control="dense")], ids=str)
def test_the_padded_flex_path_computes_what_the_row_path_does(kw, monkeypatch):
    """The whole forward pass as on CUDA: rows padded to blocks, block masks, FlexAttention; also prompts and
    decoding."""
    model, cfg = random_model(9, **kw)
    inputs, targets = random_tokens(cfg, 3, 7)
    with torch.no_grad():
        want, stats = model(inputs, targets)
        depth = model_logits(model, inputs)[1]
        logits, cached, _ = decoded(model, [[1, 2, 3], [4, 5]], 3)
        monkeypatch.setattr(tgs, "uses_flex", lambda device: True)
        loss, flex_stats = model(inputs, targets)
        flex_depth = model_logits(model, inputs)[1]
        flex_logits, flex_cached, _ = decoded(model, [[1, 2, 3], [4, 5]], 3)
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(flex_stats, stats, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(flex_logits, logits, rtol=1e-4, atol=1e-5)
    assert torch.equal(depth, flex_depth) and cached == flex_cached


@pytest.mark.parametrize("carry", ["carry_bias", "carry_key_columns", "carry_value_column"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_whatever_carries_ln_g_gives_eq_3_and_its_gradients(carry, dtype):
    """Also from float32 products with ln g in float64: the columns' low part keeps what the high part rounds
    away."""
    H, n, D = 2, 12, 8
    generator = torch.Generator().manual_seed(0)
    q, k, v, dy = (torch.randn(n, H, D, generator=generator, dtype=torch.float64) for _ in range(4))
    g = torch.rand(n, generator=generator, dtype=torch.float64).clamp(min=1e-6)
    g[::3] *= 1e-5
    i, j = torch.arange(n)[:, None], torch.arange(n)

    def attend(q, k, v, score_mod=lambda score, *_: score):
        logits = score_mod(torch.einsum("ihd,jhd->hij", q, k) / math.sqrt(D), 0, 0, i, j)
        weight = logits.masked_fill(j > i, -math.inf).softmax(-1)
        return torch.einsum("hij,jhd->ihd", weight.to(v.dtype), v)

    leaves = [t.to(dtype).requires_grad_() for t in (q, k, v)] + [g.log().requires_grad_()]
    got = getattr(bench, carry)(attend, *leaves)
    want_leaves = [t.requires_grad_() for t in (q, k, v)] + [g.log().requires_grad_()]
    q, k, v, ln_g = want_leaves
    weight = (torch.einsum("ihd,jhd->hij", q, k) / math.sqrt(D)).exp() * ln_g.exp() * (j <= i)  # Eq. 3
    want = torch.einsum("hij,jhd->ihd", weight / weight.sum(-1, keepdim=True), v)
    tolerance = dict(rtol=1e-9, atol=1e-12) if dtype == torch.float64 else dict(rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(got.double(), want, **tolerance)
    for a, b in zip(torch.autograd.grad(got, leaves, dy.to(got.dtype)),
                    torch.autograd.grad(want, want_leaves, dy)):
        torch.testing.assert_close(a.double(), b, **tolerance)


@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
@pytest.mark.parametrize("head_dim", [64, 128])
def test_bfloat16_columns_carry_ln_g_to_2e_4_also_compiled(head_dim):
    """(Inductor elides a cast to bfloat16 and back, and with it what the cast would round away.)"""
    g = torch.linspace(0, 1, 1000).square()
    q, k = (torch.ones(len(g), 1, head_dim, dtype=torch.bfloat16) for _ in "qk")
    for carried in (tgs.carried, torch.compile(tgs.carried)):
        q_columns, k_columns = (t[:, 0, head_dim:].double() for t in carried(q, k, tgs.log_gate(g)))
        added = (q_columns * k_columns).sum(-1) / math.sqrt(head_dim)
        torch.testing.assert_close(added[1:], g[1:].double().clamp(min=1e-6).log(), rtol=0, atol=2e-4)
        assert added[0] < -1e30


@pytest.mark.parametrize("head_dim, dtype, control, shared, starts", [
    (64, "bfloat16", "none", 101376, True), (128, "bfloat16", "none", 101376, True),
    (64, "float32", "none", 101376, True), (128, "float32", "none", 101376, True),
    (256, "bfloat16", "dense", 101376, True), (256, "bfloat16", "none", 101376, False),
    (256, "float32", "none", 166912, True), (512, "float32", "none", 232448, False),
    (64, "bfloat16", "none", 65536, False), (8, "bfloat16", "none", 232448, False)])
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


@pytest.mark.parametrize("padded_to", [11, 128])
def test_the_head_in_chunks_is_cross_entropy_and_padding_columns_do_not_show(padded_to):
    generator = torch.Generator().manual_seed(0)
    h, w = (torch.randn(n, 16, generator=generator).requires_grad_() for n in (30, 11))
    targets = torch.randint(11, (30,), generator=generator)

    def in_chunks(logits, t, V, n):
        return tgs.chunk_loss(torch.nn.functional.pad(logits, (0, padded_to - 11), value=7.0), t, V, n)[0], \
            tgs.chunk_loss(torch.nn.functional.pad(logits, (0, padded_to - 11), value=7.0),
                           t, V, n)[1][:, :11]

    loss = tgs.HeadLoss.apply(h, w, targets, torch.float32, in_chunks, True)
    got = torch.autograd.grad(2 * loss, (h, w))
    want_loss = torch.nn.functional.cross_entropy(h @ w.T, targets)
    torch.testing.assert_close(loss, want_loss)
    for a, b in zip(got, torch.autograd.grad(2 * want_loss, (h, w))):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_nothing_recompiles_as_the_numbers_of_active_tokens_and_of_sequences_change(monkeypatch):
    from torch._dynamo.utils import counters
    model, cfg = random_model(10, n_layers=8, max_seq_len=32)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    model.lower = functools.cache(tgs.compiled.__wrapped__)
    graphs = []  # (the first two as a run warms up: every gate open, then closing)
    for B, closing in ((4, -99.0), (4, 1.0), (4, 0.2), (3, 0.1), (4, 0.5), (2, 0.8), (5, 0.05), (1, 0.1)):
        for router in model.masks:
            torch.nn.init.constant_(router.linear.bias, closing)
        inputs, targets = random_tokens(cfg, B, 32)
        ce, stats = model(inputs, targets)
        (ce + tgs.moments(stats, inputs.numel()).sum()).backward()
        with torch.no_grad():
            model(inputs, targets)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[1] == graphs[-1] > graphs[0]


def test_flex_attention_keeps_one_graph_as_layouts_and_captured_gates_change(monkeypatch):
    """Compiled by itself, as on CUDA: each call brings a new mask and another n, which at first is as many
    blocks as there are sizes of heads. A run begins with every gate open, and a validation may end with a
    batch of one sequence."""
    from torch._dynamo.utils import counters
    monkeypatch.setattr(tgs, "uses_flex", lambda device: True)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    monkeypatch.setattr(tgs, "flex_attention", tgs.compiled.__wrapped__(tgs.flex_attention))
    model, cfg = random_model(10, n_layers=4, max_seq_len=256)
    seen, after_warm_up = set(), None
    for B, closing in ((4, -99.0), (4, 0.3), (3, 0.1), (4, 0.5), (2, 0.8), (1, 0.05), (1, -99.0)):
        for router in model.masks:
            torch.nn.init.constant_(router.linear.bias, closing)
        inputs, targets = random_tokens(cfg, B, 256)
        with torch.no_grad():
            _, stats = model(inputs, targets)
        seen |= set(stats[:, 2].tolist())
        after_warm_up = after_warm_up or counters["stats"]["unique_graphs"]
    assert counters["stats"]["unique_graphs"] == after_warm_up and len({-(-n // tgs.ROWS) for n in seen}) > 2


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_no_number_of_active_tokens_adds_a_graph_on_the_padded_path_also_where_they_fill_their_blocks(
        monkeypatch):
    from torch._dynamo.utils import counters
    monkeypatch.setattr(tgs, "uses_flex", lambda device: True)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    model, cfg = random_model(10, n_layers=2, max_seq_len=256)
    model.lower, inputs, graphs = functools.cache(tgs.compiled.__wrapped__), random_tokens(cfg, 2, 256), []
    for active in (300, 256, 384, 511, 129, 512, 2):
        def first(h, S, l, cache):
            return S, (torch.arange(len(S)) < active).float()

        monkeypatch.setattr(model, "gates", first)
        with torch.no_grad():
            assert model(*inputs)[1][0, 2] == active
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[-1]


def test_a_compiled_run_has_all_its_graphs_before_the_first_step_although_no_gate_is_closed_yet(
        tmp_path, corpus, monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    monkeypatch.setattr(tgs, "compiled", functools.cache(tgs.compiled.__wrapped__))
    argv = flags(corpus, tmp_path, num_steps=16, lr=0.05, mean_coef_init=20.0, coef_update=0.0)
    assert tgs.main([*argv, "--compile"]) == 0
    record = only_record(tmp_path)
    closed = [max(e["gate_zero"]) for e in events(record, "train")]
    assert closed[0] < 0.05 and max(closed) > 0.2
    assert json.loads((record / "summary.json").read_text())["recompiles_after_warm_up"] == 0


cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kw", [dict(), dict(n_kv_heads=2), dict(compute="masked"), dict(control="dense"),
                                dict(n_heads=8), dict(n_heads=2), dict(n_heads=2, control="dense")], ids=str)
def test_gpu_loss_and_gradients_are_those_of_the_cpu(kw, dtype):
    size = dict(dim=256, n_heads=4, n_layers=4, vocab_size=300, max_seq_len=256, closing=0.3)
    model, cfg = random_model(11, **size | kw)
    inputs, targets = random_tokens(cfg, 4, 256)
    results = []
    for device in ("cpu", "cuda"):
        model.to(device).zero_grad()
        if device == "cuda":
            torch.set_float32_matmul_precision("highest")
            model.lower = tgs.compiled
        with torch.autocast(device, torch.bfloat16, enabled=dtype == torch.bfloat16):
            ce, stats = model(inputs.to(device), targets.to(device))
        (ce + tgs.moments(stats, inputs.numel()).sum()).backward()
        results.append([ce.cpu(), *(p.grad.cpu() for p in model.parameters())])
    for a, b in zip(*results):
        assert (a - b).norm() <= (1e-2 if dtype == torch.float32 else 0.15) * (a.norm() + 1e-6)


@cuda
def test_gpu_bfloat16_training_compiles_once_and_resumes(tmp_path, corpus):
    kw = dict(device="cuda", dtype="bfloat16", dim=128, max_seq_len=64, batch_size=8, device_batch_size=4,
              num_steps=8, save_every=4, coef_update=0.5, mean_target_end=0.2)
    assert tgs.main(flags(corpus, tmp_path, **kw)) == 0
    record = only_record(tmp_path)
    assert json.loads((record / "summary.json").read_text())["recompiles_after_warm_up"] == 0
    last = events(record)[-1]["cross_entropy"]
    (record / "checkpoint_8.pt").unlink()
    assert tgs.main(["--resume", str(record)]) == 0
    assert events(record)[-1]["cross_entropy"] == pytest.approx(last, abs=2e-3)


@cuda
def test_gpu_whatever_carries_ln_g_is_timed():
    cfg = Config(dim=128, n_heads=2, n_layers=2, max_seq_len=512, device_batch_size=2, vocab_size=128)
    seconds = bench.carriers(bench.Bench(cfg, tgs.Runtime(cfg)))
    assert set(seconds) == {"carry_bias", "carry_key_columns", "carry_value_column"} and all(seconds.values())


@cuda
def test_gpu_decoding_gives_the_full_forward_pass():
    model, cfg = random_model(12, dim=64, n_heads=2, n_layers=4, closing=0.3, max_seq_len=32)
    model.to("cuda")
    check_decoding(model, [[1, 2, 3], [4], [5, 6]], 10)


# ----------------------------------------------------------------------------------------------------------
# Decoding and sampling

def decoded(model, prompts, steps, as_compiled=False):
    """Greedy decoding with the cache: final logits, sequences with depths, and the decoder."""
    decoder = sample.Decoder(model, len(prompts))
    for cache in decoder.cache if as_compiled else ():
        cache.attend_some = sample.attend_some
    rows, depths = [list(p) for p in prompts], [[] for _ in prompts]
    new = dict(enumerate(prompts))
    for _ in range(steps):
        logits, depth = decoder.append(new)
        for b, d in enumerate(depth.split([len(t) for t in new.values()])):
            depths[b] += d.tolist()
        new = {b: [t] for b, t in enumerate(logits.argmax(-1).tolist())}
        for b, t in new.items():
            rows[b] += t
    return logits, (rows, depths), decoder


def check_decoding(model, prompts, steps, as_compiled=False):
    """Every token, depth and the last logits are those of the full forward pass over each sequence by
    itself."""
    logits, (rows, depths), decoder = decoded(model, prompts, steps, as_compiled)
    for b, row in enumerate(rows):
        full, depth = model_logits(model, torch.tensor([row[:-1]]).to(logits.device))
        torch.testing.assert_close(full[0, -1], logits[b], rtol=1e-3, atol=1e-4)
        greedy = full[0].argmax(-1).tolist()
        assert row[len(prompts[b]):] == greedy[len(prompts[b]) - 1:] and depth[0].tolist() == depths[b]
    return decoder, depths


@few
@given(seed=st.integers(0, 99), closing=st.floats(0, 2), n_layers=st.sampled_from([2, 4, 6]),
       kv_heads=st.sampled_from([1, 2]), lengths=st.lists(st.integers(1, 4), min_size=1, max_size=4),
       steps=st.integers(1, 5), as_compiled=st.booleans())
def test_greedy_decoding_with_the_cache_is_the_full_forward_pass(seed, closing, n_layers, kv_heads, lengths,
                                                                 steps, as_compiled):
    model, cfg = random_model(seed, closing, n_layers=n_layers, n_kv_heads=kv_heads, max_seq_len=16)
    prompts = [random_tokens(cfg, 1, n, seed + i)[0][0].tolist() for i, n in enumerate(lengths)]
    with torch.no_grad():
        decoder, depths = check_decoding(model, prompts, steps, as_compiled)
    per_token = 2 * kv_heads * cfg.head_dim * 4 + 4  # keys, values, ln g
    assert decoder.bytes() == per_token * sum(map(sum, depths))


def test_sampling_is_repeatable_by_seed_and_greedy_at_temperature_zero():
    model, cfg = random_model(13, closing=0.2, max_seq_len=64)
    one, two, other = (sample.generate(model, [[1, 2]] * 3, 20, seed=s)[0] for s in (5, 5, 6))
    assert one == two != other and [len(row) for row in one] == [22] * 3
    greedy = sample.generate(model, [[1, 2]], 5, temperature=0)[0][0]
    assert [t.id for t in greedy] == decoded(model, [[1, 2]], 5)[1][0][0]
    assert [t.id for t in sample.generate(model, [[1, 2]], 5, temperature=3.0,
                                       top_k=1)[0][0]] == [t.id for t in greedy]
    assert [t.id for t in sample.generate(model, [[1, 2]], 5, temperature=1.0,
                                       top_p=1e-6)[0][0]] == [t.id for t in greedy]


def test_a_sample_ends_at_the_end_of_document_or_the_models_length():
    model, cfg = random_model(14, max_seq_len=16)
    row = sample.generate(model, [[1, 2]], 99, temperature=0)[0][0]
    assert len(row) == 16
    stop = row[4].id
    assert [t.id for t in sample.generate(model, [[1, 2]], 99, temperature=0, stop=stop)[0][0]][-1] == stop


def test_a_padded_vocabularys_further_tokens_are_never_drawn():
    model, cfg = random_model(15, max_seq_len=64)
    drawn = sample.generate(model, [[1, 2]] * 4, 60, temperature=9.0, n_vocab=5)[0]
    assert {t.id for row in drawn for t in row} == {0, 1, 2, 3, 4}


def test_top_k_and_top_p_draw_from_the_likeliest_tokens():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().repeat(400, 1)
    generator = torch.Generator().manual_seed(0)
    assert set(sample.choose(logits, 1.0, 2, 1.0, generator).tolist()) == {0, 1}
    assert set(sample.choose(logits, 1.0, None, 0.9, generator).tolist()) == {0, 1, 2}
    assert set(sample.choose(logits, 1.0, None, 1.0, generator).tolist()) == {0, 1, 2, 3}


def test_pieces_join_the_bytes_of_a_character_and_lose_nothing():
    encoding = tokenize_text.get_encoding("bytes")
    assert encoding.encode_ordinary("aé😀") == list("aé😀".encode()) and encoding.eot_token == 256
    tokens = [sample.Token(t, 2, 0.5) for t in encoding.encode_ordinary("aé😀\n")]
    assert [text for text, _ in sample.pieces(tokens, encoding)] == ["a", "é", "😀", "\n"]
    broken = [sample.Token(t, 2, 0.5) for t in (0xC3, 0x41, 0xFF, 0x42, 0xE2)]
    assert "".join(text for text, _ in sample.pieces(broken, encoding)).count("\ufffd") >= 3


def test_the_page_of_a_sample_says_token_depth_and_probability_and_needs_no_other_file():
    text = [("<a>", sample.Token(1, 0, None)), ("b", sample.Token(2, 4, 0.25))]
    page = sample.html_page([text], 4, "title & more")
    assert page.partition("<pre>")[2].count("class=prompt") == 1
    assert "&lt;a&gt;" in page and "4 of 4 blocks, p = 0.250" in page and "title &amp; more" in page
    assert "http" not in page and "prefers-color-scheme" in page


def test_depth_is_tabled_by_token_and_by_position_in_the_word_and_in_what_is_seen():
    cfg = Config(**TINY | dict(vocab_size=257))
    table = evaluate.DepthTable(cfg)
    inputs = torch.tensor([[256, *b"ab c"], [*b"d\nee "]])
    table.add(inputs, torch.tensor([[4, 2, 4, 0, 2], [2, 4, 4, 2, 0]]))
    tables = table.tables(at_least=1)
    assert dict((name, (depth, n)) for name, depth, n in tables["token"])["'e'"] == (3.0, 2)
    # a word's first token follows white space or the end of text, or is one of them: only b and the second e
    # do not
    assert tables["position in the word"] == [("0", 18 / 8, 8), ("1", 6 / 2, 2)]
    assert sum(n for _, _, n in tables["position in what the model sees"]) == 10


# ----------------------------------------------------------------------------------------------------------
# Control (Table 1)

def controlled(rule, **kw):
    cfg = Config(**TINY | dict(control=rule, mean_target_start=0.9, mean_target_end=0.5) | kw)
    return tgs.GateControl(cfg, "cpu")


def observed(control, mean_deviation, var_deviation):
    return control.target + torch.tensor([[mean_deviation], [var_deviation]], dtype=torch.float64)


def test_targets_are_linearly_spaced_means_and_bernoulli_variances():
    control = controlled("proportional", n_layers=6)
    assert control.target.tolist() == [pytest.approx([0.9, 0.7, 0.5]), pytest.approx([0.09, 0.21, 0.25])]


@pytest.mark.parametrize("rule, gamma, move", [
    ("adaptive", 1e-3, lambda d: math.copysign(1e-3, d)), ("proportional", 1e-3, lambda d: 1e-3 * d),
    ("proportional", 0.5, lambda d: 0.5 * d), ("sparsity", None, lambda d: 0), ("none", None, lambda d: 0),
    ("sparsity_variance", None, lambda d: 0), ("sparsity_variance_l2", None, lambda d: 0)])
def test_each_rule_moves_alpha_and_beta_by_its_law_and_rests_within_the_tolerance(rule, gamma, move):
    for mean_dev, var_dev in ((0.2, -0.1), (-0.3, 0.05), (0.009, 0.2), (-0.009, -0.009), (0.0, 0.0)):
        control = controlled(rule, coef_update=gamma)
        before = control.coef.clone()
        control.update(observed(control, mean_dev, var_dev))
        for row, d in enumerate((mean_dev, var_dev)):
            want = move(d) if abs(d) > 0.01 else 0.0
            assert (control.coef - before)[row].tolist() == pytest.approx([want, want])


def test_proportional_derivative_moves_only_while_the_deviation_grows():
    control, average, want = controlled("proportional_derivative"), None, 0.0
    for d in (0.1, 0.2, 0.3, 0.1, 0.02, -0.2, -0.35, -0.008, 0.005):
        average = d if average is None else 0.9 * average + 0.1 * d
        if d * (d - average) > 0 and abs(d) > 0.01:
            want += 1e-2 * d
        control.update(observed(control, d, d))
        assert control.coef.flatten().tolist() == pytest.approx([want] * 4)
    assert want != 0


@pytest.mark.parametrize("rule, want", [
    ("sparsity", lambda m, v, mu, s2: 0.01 * m),
    ("sparsity_variance", lambda m, v, mu, s2: 0.01 * m - 0.01 * v),
    ("sparsity_variance_l2", lambda m, v, mu, s2: 0.1 * (m - mu) ** 2 + 0.1 * (v - s2) ** 2),
    ("adaptive", lambda m, v, mu, s2: 0.0), ("none", lambda m, v, mu, s2: 0.0)])
def test_the_gate_loss_of_each_rule_is_table_1s(rule, want):
    control = controlled(rule)
    seen = torch.tensor([[0.8, 0.3], [0.1, 0.2]], dtype=torch.float64)
    layers = [want(m, v, mu, s2) for m, v, mu, s2 in zip(*seen.tolist(), *control.target.tolist())]
    assert control.loss(seen).item() == pytest.approx(sum(2 * x for x in layers) / 4)


def test_variance_is_over_the_population_of_all_tokens_skipped_ones_included():
    model, cfg = random_model(6, closing=0.3)
    inputs, targets = random_tokens(cfg)
    _, stats = model(inputs, targets)
    _, gates = oracle_forward(inputs, {k: v.detach().double() for k, v in model.named_parameters()}, cfg)
    want = gates.flatten(1).var(1, unbiased=False)
    assert tgs.gate_report(cfg, stats.detach(), inputs.numel())["gate_var"] == pytest.approx(want.tolist(),
                                                                                        abs=1e-5)


# ----------------------------------------------------------------------------------------------------------
# FLOPs

@pytest.mark.parametrize("kw", [dict(), dict(closing=0.4), dict(control="dense"),
                                dict(control="dense", n_layers=3),
                                dict(closing=0.3, n_kv_heads=1)], ids=str)
def test_realised_flops_are_those_that_torch_counts(kw, monkeypatch):
    from torch.utils.flop_counter import FlopCounterMode
    model, cfg = random_model(7, **kw)
    inputs, targets = random_tokens(cfg)
    monkeypatch.setattr(tgs, "QUERY_ROWS", 1)  # a row at a time: exactly the causal pairs
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        _, stats = model(inputs, targets)
    assert tgs.realised_flops(cfg, stats, inputs.numel()) == counter.get_total_flops()


def test_estimated_flops_count_each_block_once_and_scale_with_sparsity():
    cfg, half = Config(), Config(n_layers=6)
    full, none, middle = (show.estimated_flops(cfg, s) for s in (0.0, 1.0, 0.5))
    assert middle == pytest.approx((full + none) / 2)
    assert (full - none) / (show.estimated_flops(half) - show.estimated_flops(half, 1.0)) == pytest.approx(2)
    block = 2 * 1024 * 12 * 768**2 + 2 * 1024 * 4 * 768**2 + 4 * 1024**2 * 768
    products = 12 * block + 2 * 1024 * 768 * 50257
    assert products < full < 1.1 * products


# ----------------------------------------------------------------------------------------------------------
# Data

def write_shard(path, tokens, magic=20240520, version=1, count=None, dtype="<u2"):
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(tokens) if count is None else count
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(header.tobytes() + np.asarray(tokens, dtype).tobytes())
    return path


class Rank:
    def __init__(self, rank, world):
        self.rank, self.world, self.device, self.main = rank, world, torch.device("cpu"), rank == 0
        self.sum = lambda x: x


def shards_of(files, vocab_size):
    return tgs.Shards(Config(train_files=str(files), vocab_size=vocab_size), "train")


@pytest.mark.parametrize("world", [1, 2, 4])
def test_any_number_of_ranks_reads_the_same_windows_at_every_step(tmp_path, world):
    """Two shards of 100 and 75 tokens, blocks of 4 x 8: three steps, then two, then from the start again."""
    write_shard(tmp_path / "a_1.bin", range(100)), write_shard(tmp_path / "a_2.bin", range(100, 175))
    shards = shards_of(tmp_path / "a_*.bin", vocab_size=1000)
    cfg = Config(**TINY | dict(device_batch_size=1))
    loaders = [tgs.TrainLoader(shards, cfg, Rank(r, world)) for r in range(world)]
    assert loaders[0].steps_per_pass == 5
    for start in (0, 32, 64, 100, 132, 0, 32):
        assert len({loader.place for loader in loaders}) == 1
        batches = [list(loader.micro_batches()) for loader in loaders]
        for a in range(4 // world):
            for r in range(world):
                first = start + 8 * (a * world + r)
                x, y = batches[r][a]
                assert x.flatten().tolist() == list(range(first, first + 8))
                assert y.flatten().tolist() == list(range(first + 1, first + 9))


def test_a_loader_goes_on_from_the_place_that_a_checkpoint_holds(tmp_path):
    shards = shards_of(write_shard(tmp_path / "a.bin", range(200)), vocab_size=1000)
    cfg = Config(**TINY)
    loader = tgs.TrainLoader(shards, cfg, Rank(0, 1))
    list(loader.micro_batches())
    other = tgs.TrainLoader(shards, cfg, Rank(0, 1))
    other.place = loader.place
    for (a, _), (b, _) in zip(loader.micro_batches(), other.micro_batches()):
        assert torch.equal(a, b)


def test_a_shuffled_pass_takes_every_sequence_once_in_an_order_that_seed_and_pass_decide(tmp_path):
    """Whatever the number of ranks; from any place it goes on; the next pass has another order."""
    for i, n in enumerate((8 * 12 + 1, 8 * 9 + 5)):
        write_shard(tmp_path / f"s{i}.bin", np.arange(n) // 8 + 20 * i)  # a sequence is 8 times its number

    def steps(count, world=1, place=(0, 0, 0), seed=1):
        cfg = Config(**TINY | dict(vocab_size=99, shuffle=True, seed=seed))
        loaders = [tgs.TrainLoader(shards_of(tmp_path / "*.bin", vocab_size=99), cfg, Rank(r, world))
                   for r in range(world)]
        out = []
        for loader in loaders:
            loader.place = place
        for _ in range(count):
            batches = [list(loader.micro_batches()) for loader in loaders]
            out.append([batches[r][a][0][b, 0].item() for a in range(len(batches[0])) for r in range(world)
                        for b in range(len(batches[0][0][0]))])
        return out, loaders[0].place

    once, _ = steps(5)
    first, second = sum(once[:3], []), sum(once[3:], [])
    assert sorted(first) == list(range(12)) and first != sorted(first)
    assert len(set(second)) == 8 and set(second) <= set(range(20, 29)) and second != sorted(second)
    both, _ = steps(10)
    assert both[:5] == once and sorted(sum(both[5:8], [])) == list(range(12)) and both[5:8] != once[:3]
    assert steps(10, world=2)[0] == both != steps(10, seed=2)[0]
    for k in range(1, 10):
        _, place = steps(k)
        assert steps(10 - k, place=place)[0] == both[k:]


def test_train_tokens_limits_the_training_set_and_val_tokens_the_validation_set(tmp_path):
    write_shard(tmp_path / "a_1.bin", range(100)), write_shard(tmp_path / "a_2.bin", range(100))
    cfg = Config(train_files=str(tmp_path / "a_*.bin"), train_tokens=130, val_files=str(tmp_path / "a_*.bin"),
                 val_tokens=40)
    assert [len(t) for t in tgs.Shards(cfg, "train").tokens] == [100, 30]
    assert [len(t) for t in tgs.Shards(cfg, "val").tokens] == [40]


def test_tokens_of_16_and_of_32_bits_are_read_alike(tmp_path):
    write_shard(tmp_path / "a_1.bin", [5, 65535])
    write_shard(tmp_path / "a_2.bin", [5, 65536, 128255], magic=20240801, version=7, dtype="<u4")
    shards = shards_of(tmp_path / "a_*.bin", vocab_size=128256)
    assert shards.window(0, 0, 2).tolist() == [5, 65535]
    assert shards.window(1, 0, 3).tolist() == [5, 65536, 128255]


def test_validation_takes_every_full_sequence_of_every_shard(tmp_path):
    write_shard(tmp_path / "v_1.bin", [1] * 33), write_shard(tmp_path / "v_2.bin", [2] * 24)
    cfg = Config(**TINY)
    shards = shards_of(tmp_path / "v_*.bin", vocab_size=11)
    assert tgs.sequences(shards, cfg) == [(0, 0), (0, 8), (0, 16), (0, 24), (1, 0), (1, 8)]
    model, _ = random_model(8)
    rt = tgs.Runtime(cfg)
    result = tgs.evaluate(model, cfg, rt, shards)
    inputs = torch.tensor([[1] * 8] * 4 + [[2] * 8] * 2)
    want = torch.nn.functional.cross_entropy(model_logits(model, inputs)[0].flatten(0, 1), inputs.flatten())
    assert result["tokens"] == 48 and result["cross_entropy"] == pytest.approx(want.item(), rel=1e-5)


# ----------------------------------------------------------------------------------------------------------
# Optimizer and schedule

def test_the_learning_rate_warms_up_linearly_then_follows_a_cosine_to_zero():
    cfg = Config(**TINY | dict(num_steps=100, lr=2.0))
    lr = [tgs.learning_rate(i, cfg) for i in range(101)]
    assert lr[0] == pytest.approx(0.2) and lr[5] == pytest.approx(1.1) and lr[10] == 2.0
    assert lr[55] == pytest.approx(1.0) and lr[100] == pytest.approx(0.0)
    assert tgs.learning_rate(0, Config(**TINY | dict(lr=2.0, warmup_fraction=0.0))) == 2.0


def test_with_a_cooldown_the_learning_rate_stays_constant_and_then_falls_linearly_to_zero():
    cfg = Config(**TINY | dict(num_steps=100, lr=2.0, cooldown_fraction=0.4))
    lr = [tgs.learning_rate(i, cfg) for i in range(101)]
    assert lr[:10] == [tgs.learning_rate(i, Config(**TINY | dict(num_steps=100, lr=2.0))) for i in range(10)]
    assert lr[10:61] == [2.0] * 51
    assert lr[60:] == pytest.approx([2.0 * (100 - i) / 40 for i in range(60, 101)])
    short = Config(**TINY | dict(num_steps=10, lr=2.0, cooldown_fraction=0.05))  # less than a step: no cosine
    assert tgs.learning_rate(9, short) == 2.0


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_optimizers_groups_partition_the_parameters(optimizer):
    model, cfg = random_model(optimizer=optimizer)
    optimizers = tgs.make_optimizers(model, cfg).values()
    groups = {g["name"]: g["params"] for o in optimizers for g in o.param_groups}
    assert set(groups) - {"matrices"} == {"default", "norms", "routers"}
    assert ("matrices" in groups) == (optimizer == "muon")
    assert len(groups["routers"]) == 4
    assert sum(map(len, groups.values())) == len(set().union(*groups.values())) == len(
        list(model.parameters()))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=cuda)])
def test_muon_is_torchs_for_the_blocks_matrices_and_the_rest_moves_as_adamws(device):
    """Up to torch's bfloat16 in making an update orthogonal, over steps with momentum, decay and a rate that
    changes; of gradients that are well conditioned."""
    model, cfg = random_model(optimizer="muon", weight_decay=0.1)
    twin = copy.deepcopy(model.to(device))
    matrix = {n for n, p in model.named_parameters() if n.startswith("layers.") and p.ndim == 2}
    ours, its = tgs.make_optimizers(model, cfg), dict(lr=cfg.lr, weight_decay=cfg.weight_decay)
    theirs = [torch.optim.Muon([p for n, p in twin.named_parameters() if n in matrix],
                               adjust_lr_fn="match_rms_adamw", **its),
              torch.optim.AdamW([p for n, p in twin.named_parameters() if n not in matrix],
                                betas=(cfg.beta1, cfg.beta2), eps=cfg.eps, **its)]
    for i, lr in enumerate((1e-2, 2e-2, 1e-2)):
        torch.manual_seed(i)
        before = {name: p.detach().clone() for name, p in twin.named_parameters()}
        for p, q in zip(model.parameters(), twin.parameters()):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        for optimizer in (*ours.values(), *theirs):
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
        for (name, p), q in zip(model.named_parameters(), twin.parameters()):
            off, step = (p - q).norm().item(), (q - before[name]).norm().item()
            assert off < (0.05 if name in matrix else 1e-4) * step, (name, off, step)
            q.data.copy_(p.data)


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 12, 5), (1, 5, 12)])
def test_an_orthogonal_update_keeps_the_singular_vectors_and_brings_the_values_near_one(shape):
    """In float64, against the quintic polynomial of Muon applied five times to the singular values."""
    G = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    U, s, Vt = torch.linalg.svd(G, full_matrices=False)
    s = s / s.norm(dim=1, keepdim=True)
    for _ in range(5):
        s = 3.4445 * s - 4.775 * s**3 + 2.0315 * s**5
    got = tgs.orthogonal(G)
    assert torch.allclose(got, U * s[:, None] @ Vt, atol=1e-12)
    assert 0.3 < s.min() and s.max() < 1.3


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
    found = [p for p in folder.iterdir() if p.is_dir()]
    assert len(found) == 1
    return found[0]


def run_script(*argv, script="train_gpt_skip.py", **kw):
    return subprocess.run([sys.executable, ROOT / script, *map(str, argv)], capture_output=True, text=True,
                          timeout=120, **kw)


def test_a_run_of_the_script_leaves_a_record_that_says_everything(tmp_path, corpus):
    done = run_script(*flags(corpus, tmp_path, num_steps=6, val_every=4, name="trial"))
    assert done.returncode == 0, done.stderr
    record = only_record(tmp_path)
    assert re.fullmatch(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d_trial", record.name)
    names = {p.name for p in record.iterdir()}
    assert names == {"log.txt", "metrics.jsonl", "config.json", "env.json", "train_gpt_skip.py",
                     "summary.json", "plot.png", "checkpoint_6.pt", "model.safetensors"}
    train, val = events(record, "train"), events(record, "val")
    assert [e["step"] for e in train] == list(range(6)) and [e["step"] for e in val] == [0, 4, 6]
    assert set(train[0]) == {"kind", "step", "tokens", "train_s", "loss", "cross_entropy", "lr", "grad_norm",
                             "tokens_per_s", "gate_mean", "gate_var", "gate_zero", "mean_coef", "var_coef"}
    assert set(val[0]) == {"kind", "step", "cross_entropy", "gate_mean", "gate_var", "gate_zero", "tokens",
                           "val_s"}
    assert all(len(train[0][k]) == 4 for k in ("gate_mean", "gate_var", "gate_zero", "mean_coef", "var_coef"))
    config, env = (json.loads((record / f).read_text()) for f in ("config.json", "env.json"))
    assert config["dim"] == 16 and config["coef_update"] == 1e-3 and len(env["source_sha256"]) == 64
    assert env["shards"]["train"][1] == {"name": "c_train_000002.bin", "bytes": 5024, "tokens": 2000}
    summary = json.loads((record / "summary.json").read_text())
    assert summary["cross_entropy"] == val[-1]["cross_entropy"] and summary["step"] == 6
    assert "sparsity" in done.stdout and "of a dense step" in done.stdout
    assert "eval --checkpoint" in done.stdout
    assert (record / "log.txt").read_text() in done.stdout + "\n"

    again = run_script("--checkpoint", record, "--val_files", corpus / "c_val_*.bin", "--device", "cpu",
                       script="records/evaluate.py")
    assert again.returncode == 0, again.stderr
    loss = float(re.search(r"cross_entropy (\d+\.\d{4,})", again.stdout)[1])
    assert loss == pytest.approx(val[-1]["cross_entropy"], abs=1e-5)


def test_the_first_steps_of_a_run_are_those_of_the_equations(tmp_path, corpus):
    """Loss, gate statistics and coefficients of two steps of two micro-batches, by oracle and AdamW in
    float64."""
    cfg = Config(**TINY | dict(num_steps=2, mean_target_end=0.2, coef_update=0.5, initializer_range=0.3))
    assert tgs.main(flags(corpus, tmp_path, num_steps=2, mean_target_end=0.2, coef_update=0.5,
                          initializer_range=0.3)) == 0
    seen = events(only_record(tmp_path), "train")
    model = MiddleSkippingTransformer(cfg)
    tgs.initialise(model, cfg)
    P = {k: v.detach().double().requires_grad_() for k, v in model.named_parameters()}
    adam = torch.optim.AdamW(P.values(), lr=0, betas=(0.8, 0.95), eps=1e-10, weight_decay=0)
    tokens = torch.from_numpy(np.fromfile(corpus / "c_train_000001.bin", "<u2", offset=1024).astype(np.int64))
    alpha, beta = torch.zeros(4).double(), torch.zeros(4).double()
    mu = torch.tensor([1.0, 0.2, 0.2, 1.0]).double()
    for step, lr in enumerate((1e-3, 1e-3 * 0.5)):
        losses, gates = [], []
        for a in range(2):
            first = step * 32 + a * 16
            x, y = tokens[first:first + 16].view(2, 8), tokens[first + 1:first + 17].view(2, 8)
            logits, g = oracle_forward(x, P, cfg)
            losses.append(oracle_loss(logits, g, y, alpha, beta))
            gates.append(g.detach().flatten(1))
        sum(losses).div(2).backward()
        adam.param_groups[0]["lr"] = lr
        adam.step(), adam.zero_grad()
        g = torch.cat(gates, 1)
        m, v = g.mean(1), g.var(1, unbiased=False)
        for coef, deviation in ((alpha, m - mu), (beta, v - mu * (1 - mu))):
            coef += 0.5 * deviation * (deviation.abs() > 0.01)
        event = seen[step]
        assert event["lr"] == pytest.approx(lr) and event["loss"] == pytest.approx(sum(losses).item() / 2,
                                                                                   rel=1e-4)
        assert event["gate_mean"] == pytest.approx(m.tolist(), abs=1e-4)
        assert event["gate_var"] == pytest.approx(v.tolist(), abs=1e-4)
        assert event["mean_coef"] == pytest.approx(alpha.tolist(), abs=1e-4)
        assert event["var_coef"] == pytest.approx(beta.tolist(), abs=1e-4)


def test_a_target_loss_stops_the_run_and_the_summary_says_when(tmp_path, corpus):
    assert tgs.main(flags(corpus, tmp_path, num_steps=20, val_every=2, target_loss=99.0)) == 0
    summary = json.loads((only_record(tmp_path) / "summary.json").read_text())
    assert summary["target_reached"] and summary["step"] == 0


def test_what_stops_at_a_target_loss_is_saved_as_it_is_then_and_resumes_there(tmp_path, corpus, no_plot):
    argv = flags(corpus, tmp_path, num_steps=20, val_every=1, save_every=100, lr=0.01)
    assert tgs.main(argv) == 0
    record = only_record(tmp_path)
    losses = [e["cross_entropy"] for e in events(record, "val")]
    at = next(i for i in range(2, 20) if losses[i] < min(losses[:i]))
    target = (losses[at] + min(losses[:at])) / 2
    assert tgs.main(argv + ["--records_dir", str(tmp_path / "b"), "--target_loss", str(target)]) == 0
    stopped = only_record(tmp_path / "b")
    assert tgs.checkpoints(stopped)[-1].name == f"checkpoint_{at}.pt"
    before = timeless(stopped)
    assert tgs.main(["--resume", str(stopped)]) == 0 and timeless(stopped) == before


def test_a_run_with_muon_learns_and_resumes_as_if_nothing_had_happened(tmp_path, corpus, no_plot):
    kw = dict(optimizer="muon", num_steps=20, save_every=10, val_every=10, lr=1e-2)
    assert tgs.main(flags(corpus, tmp_path / "a", **kw)) == 0
    whole = only_record(tmp_path / "a")
    first, *_, last = events(whole, "val")
    assert last["cross_entropy"] < first["cross_entropy"] - 0.1
    cut = tmp_path / "cut"
    shutil.copytree(whole, cut)
    (cut / "checkpoint_20.pt").unlink()
    assert tgs.main(["--resume", str(cut)]) == 0
    assert same_end(end_of(whole), end_of(cut))
    state = torch.load(cut / "checkpoint_10.pt")
    torch.save(state | dict(muon=state["optimizer"]), cut / "checkpoint_10.pt")
    (cut / "checkpoint_20.pt").unlink()
    assert tgs.main(["--resume", str(cut)]) == 2


def test_training_learns_and_reaches_the_targets_of_the_gates(tmp_path, corpus):
    """A language of period 11: the loss falls below half, and the middle gates come near their target."""
    kw = dict(num_steps=150, dim=32, lr=1e-2, coef_update=0.1, mean_target_end=0.4, val_every=150,
              batch_size=8)
    assert tgs.main(flags(corpus, tmp_path, **kw)) == 0
    first, last = events(only_record(tmp_path), "val")
    assert last["cross_entropy"] < 0.5 * first["cross_entropy"]
    assert last["gate_zero"][1] > 0.3 and last["gate_mean"][1] == pytest.approx(0.4, abs=0.2)


def exported(model, folder):
    folder.mkdir()
    convert.write(folder, "ours", *convert.ours(model))


@pytest.mark.parametrize("kw", [dict(closing=0.3), dict(closing=0.3, n_kv_heads=1), dict(control="dense")],
                         ids=str)
@pytest.mark.parametrize("layout", ["ours", "released", "hub"])
def test_a_checkpoint_goes_out_and_comes_back_in_every_layout(tmp_path, kw, layout):
    """Ours; the authors', in which a dense model has routers that are all zero; and their hub's, whose names
    begin with `model.`."""
    model, cfg = random_model(15, **kw)
    exported(model, tmp_path / "a")
    argv = ["--checkpoint", str(tmp_path / "a"), "--out", str(tmp_path / "b"), "--to", layout]
    assert convert.main(argv) == 0
    stored = tgs.read_json(tmp_path / "b" / "config.json")
    file = tgs.read_checkpoint(next((tmp_path / "b").glob("[ms]*")))
    if layout == "ours":
        assert stored["dim"] == 16 and set(file) == set(model.state_dict())
    else:
        sizes, names = (stored["model"], file["model"]) if layout == "released" else (stored, file)
        assert sizes["zero_init_masks"] == (cfg.control == "dense") and sizes["multiple_of"] == 256
        prefix = "model." if layout == "hub" else ""
        assert names[f"{prefix}masks.1.linear.weight"].any() == (cfg.control != "dense")
    back = convert.HubModel.from_pretrained(tmp_path / "b")
    assert back.cfg.control == cfg.control
    inputs = random_tokens(cfg)[0]
    assert torch.equal(model_logits(back, inputs)[0], model_logits(model, inputs)[0])


def test_a_hub_model_saves_and_loads_itself_also_from_bfloat16(tmp_path):
    model, cfg = random_model(15, closing=0.3, norm="pre")
    hub_model, inputs = convert.HubModel(cfg), random_tokens(cfg)[0]
    hub_model.load_state_dict(model.state_dict())
    hub_model.save_pretrained(tmp_path / "m")
    back = convert.HubModel.from_pretrained(tmp_path / "m")
    assert torch.equal(model_logits(back, inputs)[0], model_logits(model, inputs)[0])
    assert convert.HubModel.from_pretrained(tmp_path / "m", seed=7).cfg.seed == 7
    half = {k: v.bfloat16() for k, v in model.state_dict().items()}
    convert.write(tmp_path / "m", "ours", convert.ours(model)[0], half)
    for name, w in convert.HubModel.from_pretrained(tmp_path / "m").state_dict().items():
        assert torch.equal(w, half[name].float())


# Llamas: config.json as transformers 5.24.0 (torch 2.13.0) writes it, less what nobody reads, and the logits
# of its LlamaForCausalLM with the weights of `llama_weights` for the tokens (i i + 3 i) % 24, i < 200:
# positions 0, 99 and 199, the first four of the vocabulary.
COMMON = dict(architectures=["LlamaForCausalLM"], attention_bias=False, hidden_act="silu", mlp_bias=False,
              model_type="llama", num_hidden_layers=2, num_key_value_heads=2, rms_norm_eps=1e-6,
              initializer_range=0.02, vocab_size=24, transformers_version="5.24.0")
LLAMAS = {
    "tied, three heads a key head": (COMMON | dict(
        head_dim=8, hidden_size=48, intermediate_size=56, max_position_embeddings=256, num_attention_heads=6,
        rope_parameters={"rope_theta": 10000.0, "rope_type": "default"}, tie_word_embeddings=True),
        [[0.622537, 1.16189, 0.752294, -2.278407], [-0.239451, 0.319022, -0.114167, -1.088219],
         [0.176662, -0.241893, 0.939908, -0.087055]]),
    "rotary scaling of Llama 3.2": (COMMON | dict(
        head_dim=16, hidden_size=32, intermediate_size=80, max_position_embeddings=131072,
        rope_parameters={"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                         "original_max_position_embeddings": 8192, "rope_theta": 500000.0,
                         "rope_type": "llama3"}, num_attention_heads=2, tie_word_embeddings=False),
        [[-0.9994, -0.073996, -0.961125, -0.411619], [-0.872417, -1.680605, 1.595738, 0.08712],
         [-0.330246, -0.272609, 1.324307, -0.515666]])}


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
    from safetensors.torch import save_file
    weights = llama_weights(config) if weights is None else weights
    if config["tie_word_embeddings"]:
        weights.pop("lm_head.weight", None)
    files = {name: f"model-{i % shards + 1:05d}-of-{shards:05d}.safetensors"
             for i, name in enumerate(weights)}
    if shards == 1:
        files = dict.fromkeys(files, "model.safetensors")
    else:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    for file in set(files.values()):
        save_file({k: w for k, w in weights.items() if files[k] == file}, folder / file)
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.mark.parametrize("kind, shards", [(kind, shards) for kind in LLAMAS for shards in (1, 3)])
def test_a_llama_comes_in_with_the_logits_of_transformers_and_goes_out_as_it_came(tmp_path, kind, shards):
    config, want = LLAMAS[kind]
    (tmp_path / "hf").mkdir()
    source, ours, back = tmp_path / "hf", tmp_path / "ours", tmp_path / "back"
    write_llama(source, config, shards=shards)
    assert convert.main(["--checkpoint", str(source), "--out", str(ours), "--max_seq_len", "200"]) == 0
    model, i = convert.HubModel.from_pretrained(ours), torch.arange(200)
    logits = model_logits(model, ((i * i + 3 * i) % 24)[None])[0][0, [0, 99, 199], :4]
    torch.testing.assert_close(logits, torch.tensor(want), rtol=0, atol=1e-5)
    assert convert.main(["--checkpoint", str(ours), "--out", str(back), "--to", "llama"]) == 0
    weights, written = llama_weights(config), tgs.read_checkpoint(back / "model.safetensors")
    if config["tie_word_embeddings"]:  # the trainer has no tied ones
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    assert written.keys() == weights.keys() and all(torch.equal(written[k], weights[k]) for k in weights)
    again = tgs.read_json(back / "config.json")
    assert convert.llama_settings(again) == convert.llama_settings(config) | dict(max_seq_len=200)
    assert again["architectures"] == ["LlamaForCausalLM"] and again["tie_word_embeddings"] is False


def test_the_rotary_settings_of_older_versions_are_read_too():
    config = LLAMAS["rotary scaling of Llama 3.2"][0]
    new = "rope_parameters", "head_dim", "num_key_value_heads"
    older = {k: v for k, v in config.items() if k not in new}
    rope = {k: v for k, v in config["rope_parameters"].items() if k != "rope_theta"}
    for rope in (rope, {"type": "llama3"} | {k: v for k, v in rope.items() if k != "rope_type"}):
        read = convert.llama_settings(older | dict(rope_theta=500000.0, rope_scaling=rope))
        assert read == convert.llama_settings(config) | dict(n_kv_heads=None)


def test_a_llamas_tokeniser_comes_with_it_and_continues_prompts_and_scores_texts(tmp_path, capsys):
    config = LLAMAS["tied, three heads a key head"][0] | dict(vocab_size=265)
    (tmp_path / "hf").mkdir()
    tokenizer_json(tmp_path / "hf" / "tokenizer.json", "pieces")
    argv = ["--checkpoint", write_llama(tmp_path / "hf", config), "--out", str(tmp_path / "m")]
    assert convert.main(argv) == 0
    assert tgs.read_json(tmp_path / "m" / "config.json")["encoding"] == str(tmp_path / "m" / "tokenizer.json")
    (tmp_path / "a.txt").write_text("ab ab é")
    (tmp_path / "hf" / "tokenizer.json").unlink()
    capsys.readouterr()
    assert evaluate.main(["--checkpoint", str(tmp_path / "m"), "--text", str(tmp_path / "a.txt")]) == 0
    assert "5 tokens" in capsys.readouterr().out
    argv = ["--checkpoint", str(tmp_path / "m"), "--prompt", "ab é", "--max_new_tokens", "5"]
    assert sample.main(argv) == 0 and capsys.readouterr().out.startswith("ab é")
    assert sample.main([*argv, "--encoding", "bytes"]) == 0
    (tmp_path / "m" / "tokenizer.json").unlink()
    tokenize_text.get_encoding.cache_clear()
    assert sample.main(argv) == 2 and "tokenizer.json" in capsys.readouterr().err


@pytest.mark.parametrize("change, word", [
    (dict(model_type="qwen3"), "model_type qwen3"), (dict(attention_bias=True), "attention_bias"),
    (dict(mlp_bias=True), "mlp_bias"), (dict(hidden_act="gelu"), "hidden_act"),
    (dict(head_dim=32), "head_dim"), (dict(sliding_window=128), "sliding_window"),
    (dict(rope_parameters={"rope_type": "yarn"}), "yarn"),
    (dict(rope_scaling={"type": "linear", "factor": 2.0}, rope_parameters=None), "linear"),
    (dict(rope_parameters={"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 2.0}), "low_freq_factor"),
    (dict(rope_parameters={"rope_type": "llama3", "original_max_position_embeddings": 4096}), "4096"),
    (dict(hidden_size=None), "config.json"), (dict(num_attention_heads=0), "config.json"),
    (dict(num_hidden_layers=None), "config.json"), (dict(rope_parameters=[1]), "config.json"),
    (dict(num_hidden_layers=3), "lacks layers.2"), (dict(num_hidden_layers=1), "also has model.layers.1"),
    (dict(intermediate_size=57), "57"), (dict(num_key_value_heads=3), "[24, 48]")], ids=str)
def test_what_the_script_has_not_is_refused_by_name_before_anything_is_written(tmp_path, capsys, change,
                                                                               word):
    config = LLAMAS["tied, three heads a key head"][0]
    (tmp_path / "hf").mkdir()
    argv = ["--checkpoint", write_llama(tmp_path / "hf", config | change, llama_weights(config)),
            "--out", str(tmp_path / "out")]
    assert convert.main(argv) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and word in error and not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["self_attn.q_norm.weight", "self_attn.k_proj.bias",
                                  "self_attn.rotary_emb.inv_freq"])
def test_a_llama_with_further_weights_is_refused_but_for_the_rotary_frequencies(tmp_path, capsys, name):
    config = LLAMAS["tied, three heads a key head"][0]
    (tmp_path / "hf").mkdir()
    weights = llama_weights(config) | {f"model.layers.0.{name}": torch.ones(8)}
    argv = ["--checkpoint", write_llama(tmp_path / "hf", config, weights), "--out", str(tmp_path / "out")]
    known = name.endswith("inv_freq")
    assert convert.main(argv) == (0 if known else 2)
    assert known or f"also has model.layers.0.{name}" in capsys.readouterr().err


def test_blocks_are_dropped_and_the_others_are_kept_in_order(tmp_path):
    model, cfg = random_model(15, control="dense")
    exported(model, tmp_path / "m")
    argv = ["--checkpoint", str(tmp_path / "m"), "--out", str(tmp_path / "cut"), "--drop_blocks", "1", "2"]
    assert convert.main(argv) == 0
    model.layers = torch.nn.ModuleList([model.layers[0], model.layers[3]])
    model.cfg = dataclasses.replace(cfg, n_layers=2)
    inputs, cut = random_tokens(cfg)[0], convert.HubModel.from_pretrained(tmp_path / "cut")
    assert torch.equal(model_logits(cut, inputs)[0], model_logits(model, inputs)[0])


@pytest.mark.parametrize("kw, flags, words", [
    (dict(), "--to llama", "--control proportional"),
    (dict(control="dense"), "--to llama", "--norm sandwich"),
    (dict(control="dense", n_layers=3), "--to released", "even number of blocks"),
    (dict(norm="llama"), "--to hub", "sandwich"), (dict(control="random"), "--to released", "coin"),
    (dict(), "--drop_blocks 1", "proportional"), (dict(control="dense"), "--drop_blocks 4", "0 to 3"),
    (dict(control="dense"), "--drop_blocks 1 1", "each once"), (dict(), "--out m", "m: File exists"),
    (dict(control="dense"), "--drop_blocks 0 1 2 3", "some of")], ids=str)
def test_what_cannot_be_written_is_refused_in_one_line(tmp_path, capsys, monkeypatch, kw, flags, words):
    monkeypatch.chdir(tmp_path)
    exported(random_model(15, **kw)[0], tmp_path / "m")
    assert convert.main(["--checkpoint", "m", "--out", "new", *flags.split()]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and words in error and not Path("new").exists()


def test_bits_a_byte_come_from_the_dataset_json_beside_the_shards_which_is_checked(tmp_path, capsys):
    write_shard(tmp_path / "d" / "d_val_000000.bin", [1, 2, 3] * 20)
    model, _ = random_model(18)
    exported(model, tmp_path / "m")
    args = ["--checkpoint", str(tmp_path / "m"), "--val_files", str(tmp_path / "d" / "*.bin"),
            "--device_batch_size", "2", "--encoding", "bytes"]
    assert evaluate.main(args) == 0 and "bits" not in capsys.readouterr().out
    dataset = {"encoding": "bytes", "shards": {"d_val_000000.bin": {"tokens": 60, "bytes": 240}}}
    (tmp_path / "d" / "dataset.json").write_text(json.dumps(dataset))
    assert evaluate.main(args) == 0
    out = capsys.readouterr().out
    nats = float(re.search(r"cross_entropy (\S+)", out)[1])
    assert float(re.search(r"bits a byte (\S+)", out)[1]) == pytest.approx(nats / math.log(2) / 4, abs=1e-3)
    dataset["shards"]["d_val_000000.bin"]["tokens"] = 61
    (tmp_path / "d" / "dataset.json").write_text(json.dumps(dataset))
    assert evaluate.main(args) == 2 and "says 61 tokens" in capsys.readouterr().err
    argv = flags(tmp_path, tmp_path / "r", train_files=args[3], val_files=args[3])
    (tmp_path / "d" / "dataset.json").write_text('{"shards": {"d_val_000000.bin": 7}}')
    refused_in_one_line(capsys, argv, "says 7 tokens")
    (tmp_path / "d" / "dataset.json").write_text('{"encoding": "gpt2"}')
    refused_in_one_line(capsys, [*argv, "--encoding", "bytes"], "its tokens are gpt2, not bytes")
    assert evaluate.main(args) == 2 and "its tokens are gpt2" in capsys.readouterr().err
    (tmp_path / "d" / "dataset.json").write_text('{"shards": [1]}')  # not ours
    assert tgs.main(argv) == 0


def test_memory_does_not_grow_as_a_run_goes_on(tmp_path, corpus):
    """500 steps with sparsity that changes from step to step, in a process of its own."""
    code = f"""
import os, torch, train_gpt_skip as tgs
def resident():
    return int(open('/proc/self/statm').read().split()[1]) * os.sysconf('SC_PAGE_SIZE')
step, seen = tgs.Trainer.train_step, []
tgs.Trainer.train_step = lambda self, i: (seen.append(resident()), step(self, i))[1]
assert tgs.main({flags(corpus, tmp_path, num_steps=501, coef_update=0.5, mean_target_end=0.3,
                       log_every=500, val_every=501)}) == 0
print('grown', seen[500] - seen[50])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert int(re.search(r"grown (-?\d+)", done.stdout)[1]) < 8 * 2**20


def test_a_size_flag_that_disagrees_with_the_checkpoint_is_named(tmp_path, corpus, capsys):
    model, _ = random_model(16)
    exported(model, tmp_path / "hub")
    assert tgs.main(flags(corpus, tmp_path, init_from=tmp_path / "hub", n_heads=4)) == 2
    assert "--n_heads 4 disagrees" in capsys.readouterr().err


def test_texts_and_hellaswag_are_scored_by_log_probability(tmp_path, capsys):
    model, cfg = random_model(17, vocab_size=257, closing=0.2, max_seq_len=32)
    exported(model, tmp_path / "m")
    (tmp_path / "a.txt").write_text("The middle of a text, é.")
    question = {"ctx": "a b", "endings": ["c", "dd", "eee", "f"], "label": 2, "ind": 1, "split": "val"}
    (tmp_path / "h.jsonl").write_text((json.dumps(question) + "\n") * 3)
    def nll(tokens):
        logits = model_logits(model, torch.tensor([tokens[:-1]]))[0][0]
        return torch.nn.functional.cross_entropy(logits, torch.tensor(tokens[1:]), reduction="none")

    args = ["--checkpoint", str(tmp_path / "m"), "--text", str(tmp_path / "a.txt"), "--hellaswag",
            str(tmp_path / "h.jsonl")]
    assert evaluate.main(args) == 0
    out = capsys.readouterr().out
    total = nll([256, *"The middle of a text, é.".encode()]).sum().item()
    assert float(re.search(r"cross_entropy (\S+)", out)[1]) == pytest.approx(total / 25, abs=1e-4)
    assert float(re.search(r"(\S+) bits a byte", out)[1]) == pytest.approx(total / 25 / math.log(2), abs=1e-3)
    scores = [nll([256, *b"a b", *(" " + e).encode()])[-1 - len(e):].mean().item()
              for e in question["endings"]]
    assert f"acc_norm {float(scores.index(min(scores)) == 2):.4f}" in out and "3 questions" in out
    for bad in ("{}", json.dumps(question | {"endings": []})):
        (tmp_path / "h.jsonl").write_text(bad + "\n")
        assert evaluate.main(args) == 2 and "line 1" in capsys.readouterr().err
    exported(random_model(17, vocab_size=99)[0], tmp_path / "n")
    assert evaluate.main(["--checkpoint", str(tmp_path / "n"), "--encoding", "bytes", "--text",
                     str(tmp_path / "a.txt")]) == 2 and "is not the model's" in capsys.readouterr().err


def test_a_record_of_any_batch_size_is_evaluated(tmp_path, corpus):
    argv = flags(corpus, tmp_path, control="dense", num_steps=1, batch_size=6, device_batch_size=6)
    assert tgs.main(argv) == 0
    record = only_record(tmp_path)
    assert evaluate.main(["--checkpoint", str(record)]) == 0
    assert evaluate.main(["--checkpoint", str(record), "--device_batch_size", "5"]) == 0


@pytest.mark.parametrize("layout", ["a record", "released"])
def test_a_dense_checkpoint_is_retrofitted_with_new_routers_that_then_learn(tmp_path, corpus, layout):
    """Its weights are loaded, the routers are those of a new run with the seed; the log says so. Trained on
    under --control dense it stays dense."""
    assert tgs.main(flags(corpus, tmp_path / "a", control="dense", num_steps=4)) == 0
    source = only_record(tmp_path / "a")
    want = tgs.read_weights(str(source))[1]
    if layout == "released":  # with routers that are all zero, from which nothing would ever learn
        released = tmp_path / "released"
        assert convert.main(["--checkpoint", str(source), "--to", "released", "--out", str(released)]) == 0
        source = released
    for name, kw in (("gated", dict(num_steps=30, mean_target_end=0.2, coef_update=0.3, lr=1e-2)),
                     ("dense", dict(control="dense", num_steps=0))):
        argv = flags(corpus, tmp_path / name, init_from=source, save_every=30, seed=3, **kw)
        assert tgs.main(argv) == 0
        record = only_record(tmp_path / name)
        log, first = (record / "log.txt").read_text(), events(record, "val")[0]
        assert f"weights: from {source}" in log and ("2 routers are new" in log) == (name == "gated")
        assert ("masks.0.linear.weight" in tgs.read_weights(str(record))[1]) == (name == "gated")
    last = events(only_record(tmp_path / "gated"), "val")[-1]
    assert last["gate_zero"][1] > 0.3 > first["gate_zero"][1]
    trainer = tgs.Trainer(*tgs.resolve(dict(init_from=str(source), train_files=str(corpus / "c_train_*.bin"),
                                            val_files=str(corpus / "c_val_*.bin"), num_steps=1, seed=3,
                                            batch_size=4, device_batch_size=4, device="cpu")))
    new = MiddleSkippingTransformer(trainer.cfg)
    tgs.initialise(new, trainer.cfg)
    for key, value in trainer.model.state_dict().items():
        assert torch.equal(value, new.state_dict()[key] if key.startswith("masks.") else want[key]), key


def test_a_record_that_began_from_a_checkpoint_is_run_again_and_resumed_with_its_own_settings(
        tmp_path, corpus, no_plot):
    masked = dict(gate_attention="none", compute="masked")
    assert tgs.main(flags(corpus, tmp_path / "a", num_steps=0, **masked)) == 0
    argv = flags(corpus, tmp_path / "b", num_steps=0, init_from=only_record(tmp_path / "a"))
    for given, want in (([], masked), (["--gate_attention", "keys", "--compute", "packed"],
                                       dict(gate_attention="keys", compute="packed"))):
        assert tgs.main([*argv, *given]) == 0
        record = max((tmp_path / "b").iterdir(), key=lambda path: path.stat().st_mtime_ns)
        for path in tgs.checkpoints(record):
            path.unlink()  # as if it had died before its first
        for again in ({"config": str(record / "config.json")}, {"resume": str(record)}):
            cfg, weights = tgs.resolve(again)
            assert weights and {k: getattr(cfg, k) for k in want} == want


def test_a_dry_run_checks_what_a_run_would_prints_the_plan_and_writes_nothing(tmp_path, corpus, capsys,
                                                                              monkeypatch):
    """Its parameters, bytes and FLOPs are those that the run then has."""
    argv = flags(corpus, tmp_path / "r", control="dense", num_steps=5)
    before = sorted(tmp_path.rglob("*"))
    assert tgs.main([*argv, "--dry_run"]) == 0 and sorted(tmp_path.rglob("*")) == before
    plan = capsys.readouterr().out
    assert tgs.main(argv) == 0
    record = only_record(tmp_path / "r")
    summary = json.loads((record / "summary.json").read_text())
    assert f"{summary['parameters']:,} parameters" in plan and "5,000 tokens in 2 shards" in plan
    assert float(re.search(r"work: +(\S+)", plan)[1]) == pytest.approx(summary["train_flops"], rel=1e-2)
    checkpoint = float(re.search(r"checkpoints of (\S+) kB", plan)[1])
    assert 1e3 * checkpoint == pytest.approx((record / "checkpoint_5.pt").stat().st_size, rel=0.5)
    assert "5 of 4 x 8 tokens, 160 in all" in plan and "ranks: 1, each with 2 x 2 sequences" in plan

    assert tgs.main(["--resume", str(record), "--dry_run"]) == 0 and "0 of 4 x 8" in capsys.readouterr().out
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    refused_in_one_line(capsys, [*argv, "--dry_run"], "room for 1 kB", "checkpoints need")
    bad = tmp_path / "bad.bin"
    bad.write_bytes((corpus / "c_val_000000.bin").read_bytes()[:-2])
    refused_in_one_line(capsys, [*argv, "--val_files", bad, "--dry_run"], "says 500 tokens")


def test_a_run_on_a_terminal_shows_loss_sparsity_speed_and_time_left_in_one_line(tmp_path, corpus):
    terminal, stderr = pty.openpty()
    fcntl.ioctl(stderr, termios.TIOCSWINSZ, struct.pack("4H", 24, 90, 0, 0))
    run = subprocess.run([sys.executable, ROOT / "train_gpt_skip.py", *map(str, flags(corpus, tmp_path))],
                         stdout=subprocess.PIPE, stderr=stderr, timeout=60)
    os.close(stderr)
    shown = os.read(terminal, 1 << 16).decode()
    os.close(terminal)
    assert run.returncode == 0 and b"cross-entropy" not in run.stdout  # steps are lines of the file only
    assert re.search(r"step 3/3 \|.*\| 00:00 left, loss \d\.\d+, sparsity 0\.\d+, \d+ tokens/s", shown)


def test_the_plot_is_drawn_at_each_validation(tmp_path, corpus, monkeypatch):
    drawn = []
    monkeypatch.setattr(show, "plot", lambda events, cfg, path: drawn.append(events[-1]))
    assert tgs.main(flags(corpus, tmp_path, num_steps=5, val_every=2)) == 0
    assert [e["step"] for e in drawn] == [0, 2, 4, 5] and {e["kind"] for e in drawn} == {"val"}


@pytest.mark.parametrize("losses, closed, said", [
    ([2.0, 1.0], 0.0, "collapse to dense"), ([2.0, 1.0], 0.3, None), ([2.0, 2.2], 0.3, "divergence"),
    ([2.0, 1.0, 1.3], 0.3, "collapse of performance"), ([2.0, 1.0, 1.1], 0.3, None)])
def test_the_papers_ways_to_fail_are_named_in_the_log(losses, closed, said):
    history = [dict(step=i, cross_entropy=ce, gate_zero=[0.0, closed]) for i, ce in enumerate(losses)]
    warning = show.failure_signature(Config(**TINY | dict(num_steps=len(losses) - 1)), history)
    assert warning is None if said is None else warning.startswith(said)


def test_a_copy_of_the_script_alone_in_a_folder_trains_and_writes_its_record(tmp_path, corpus):
    """All but the plot, the step's times and the plan of --dry_run, which records/show.py makes: that is said
    in one line. The project's tools read the record."""
    script = shutil.copy(ROOT / "train_gpt_skip.py", tmp_path / "fork.py")
    argv = [sys.executable, script, *flags(corpus, "records", num_steps=4, val_every=2)]
    def start(*more):
        return subprocess.run([*argv, *more], capture_output=True, text=True, cwd=tmp_path, timeout=120)

    done = start()
    assert done.returncode == 0 and done.stderr == "", done.stderr
    record = only_record(tmp_path / "records")
    assert {p.name for p in record.iterdir()} == {
        "log.txt", "metrics.jsonl", "config.json", "env.json", "fork.py", "summary.json", "checkpoint_4.pt",
        "model.safetensors"}
    assert [line for line in done.stdout.splitlines() if "no plot" in line and "show.py" in line] != []
    summary = json.loads((record / "summary.json").read_text())
    assert summary["step"] == 4 and "gated_step_seconds" not in summary
    assert f"validation loss {summary['cross_entropy']:.4f}" in done.stdout
    assert evaluate.main(["--checkpoint", str(record)]) == 0
    planned = start("--dry_run")
    assert planned.returncode == 2 and planned.stderr.count("\n") == 1 and "show.py" in planned.stderr


def test_importing_the_script_does_no_work():
    code = ("import sys, train_gpt_skip; assert 'matplotlib' not in sys.modules; "
            "import torch.distributed as d; assert not d.is_initialized(); print('done')")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "done\n" and done.stderr == ""


@pytest.mark.parametrize("argv, words", [
    (["--no_such_flag", "1"], "--no_such_flag"), (["--n_layers", "3"], "--n_layers 3 must be even"),
    (["--dim", "100"], "--n_heads"), (["--dim", "ten"], "--dim"), (["--lr", "-1"], "--lr"),
    (["--lr", "nan"], "--lr"),
    (["--n_kv_heads", "5"], "--n_kv_heads"), (["--n_kv_heads", "0"], "--n_kv_heads"),
    (["--name", "a/b"], "--name 'a/b'"), (["--name", "a" * 300], "--name"), (["--seed", "1" * 20], "63 bits"),
    (["--preset", "gated", "--config", "x.json"], "leave one out"),
    (["--batch_size", "7"], "--device_batch_size"),
    (["--gate_attention", "none"], "still a key"), (["--control", "magic"], "--control"),
    (["--control", "sparsity", "--coef_update", "1"], "--coef_update"),
    (["--mean_target_end", "1.5"], "between 0 and 1"),
    (["--warmup_fraction", "0.3", "--cooldown_fraction", "0.8"], "more than all steps"),
    (["--train_files", "nowhere/*.bin"], "matches no file"), (["--resume", "nowhere"], "not a record"),
    (["--init_from", "nowhere"], "does not exist"), (["eval"], "eval"),
    (["--preset", "huge"], "--preset")])
def test_a_mistake_on_the_command_line_is_one_line_that_names_it_and_exit_status_2(argv, words, tmp_path,
                                                                                   capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert tgs.main([*argv]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and words in error
    assert not list(tmp_path.iterdir())


# ----------------------------------------------------------------------------------------------------------
# Nothing lost: resume, faults, bad input, several processes

@pytest.fixture
def no_plot(monkeypatch):
    monkeypatch.setattr(show, "plot", lambda *args: None)  # a second a run


@pytest.fixture(autouse=True)
def signal_handlers_of_a_run_end_with_its_test():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def throw(e):
    raise e


class Ranks:
    """The script as `world` processes (forked: nothing to import again), each with its output in a file.

    `before(rank)` runs in each first, to plant a fault."""

    def __init__(self, folder, argv, world=1, before=lambda rank: None):
        folder.mkdir(exist_ok=True, parents=True)
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        sys.stdout.flush(), sys.stderr.flush()
        self.outputs = [folder / f"rank_{r}.txt" for r in range(world)]
        self.pids, self.statuses = [], [None] * world
        for rank in range(world):
            if pid := os.fork():
                self.pids.append(pid)
                continue
            status = 99
            try:
                with open(self.outputs[rank], "w") as out:
                    os.dup2(out.fileno(), 1), os.dup2(out.fileno(), 2)
                sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                signal.signal(signal.SIGINT, signal.default_int_handler)
                if world > 1:
                    os.environ |= dict(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank),
                                       MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
                before(rank)
                status = tgs.main([str(a) for a in argv])
                sys.stdout.flush()
            except BaseException:
                import traceback
                traceback.print_exc(file=sys.stderr)
            finally:
                sys.stderr.flush()
                os._exit(status)

    def poll(self):
        for i, pid in enumerate(self.pids):
            if self.statuses[i] is None and (found := os.waitpid(pid, os.WNOHANG)) != (0, 0):
                self.statuses[i] = os.waitstatus_to_exitcode(found[1])
        return self.statuses

    def wait(self, timeout=60):
        end = time.monotonic() + timeout
        while None in self.poll():
            if time.monotonic() > end:
                self.kill()
                raise AssertionError(f"still running after {timeout} s: {self.statuses}\n{self.text()}")
            time.sleep(0.005)
        return self.statuses

    def kill(self):
        for i, pid in enumerate(self.pids):
            if self.poll()[i] is None:
                os.kill(pid, signal.SIGKILL)

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


def end_of(record):
    """All that a run must end with: its events, its weights byte for byte, its two last checkpoints."""
    names = [p.name for p in tgs.checkpoints(record)]
    assert not list(record.glob("*.partial")) and len(names) <= 2
    state = tgs.read_checkpoint(record / names[-1])
    moments = [t.clone() for name in ("optimizer", "muon") if name in state
               for s in state[name]["state"].values() for t in s.values()]
    return timeless(record), (record / "model.safetensors").read_bytes(), names, state["place"], moments


def same_end(a, b):
    return a[:4] == b[:4] and len(a[4]) == len(b[4]) and all(map(torch.equal, a[4], b[4]))


def refused_in_one_line(capsys, argv, *words, status=2):
    capsys.readouterr()
    assert tgs.main([str(a) for a in argv]) == status
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and all(w in error for w in words), error


DRIVEN = dict(control="proportional_derivative", coef_update=0.5, mean_target_end=0.2, initializer_range=0.3)


def test_a_run_killed_at_any_moment_and_resumed_ends_as_if_nothing_had_happened(tmp_path, corpus, no_plot):
    """SIGKILL at random moments, and where it hurts most: amid a write, before and after a rename."""
    kw = dict(num_steps=40, save_every=2, val_every=5, **DRIVEN)
    assert Ranks(tmp_path, flags(corpus, tmp_path / "whole", **kw)).wait() == [0]
    rng = random.Random(0)

    def dies_at(module, name, call, after=False):
        def before(rank, calls=[0]):
            real = getattr(module, name)

            def fatal(*args, **kwargs):
                calls[0] += 1
                done = real(*args, **kwargs) if after and calls[0] == call else None
                if calls[0] == call:
                    os.kill(os.getpid(), signal.SIGKILL)
                return done or real(*args, **kwargs)
            setattr(module, name, fatal)
        return before

    argv, metrics = flags(corpus, tmp_path / "cut", **kw), None
    plans = [(dies_at(os, "fsync", 9), None), (dies_at(os, "replace", 3), None),
             (dies_at(os, "replace", 2, True), None),
             (dies_at(torch, "save", 3, True), None)] + [(lambda rank: None, rng.uniform(0, 0.15))
                                                         for _ in range(4)]
    for before, delay in plans:
        run = Ranks(tmp_path, argv, before=before)
        if delay is not None:
            size = metrics.stat().st_mtime_ns
            wait_for(lambda: metrics.stat().st_mtime_ns != size or None not in run.poll())
            time.sleep(delay)
            run.kill()
        assert run.wait() == [-signal.SIGKILL], run.text()
        record = only_record(tmp_path / "cut")
        argv, metrics = flags(corpus, tmp_path / "cut", **kw, resume=record), record / "metrics.jsonl"
    assert 0 < len(events(record)) < 49
    assert Ranks(tmp_path, argv).wait() == [0]
    assert same_end(end_of(record), end_of(only_record(tmp_path / "whole")))


def test_resume_takes_the_same_flags_again_and_the_last_checkpoint_that_is_whole(tmp_path, corpus, capsys,
                                                                                 no_plot):
    argv = flags(corpus, tmp_path, num_steps=6, save_every=2, val_every=2, **DRIVEN)
    assert tgs.main(argv) == 0
    record, argv = only_record(tmp_path), argv + ["--resume", str(only_record(tmp_path))]
    whole, last = end_of(record), record / "checkpoint_6.pt"
    assert whole[2] == ["checkpoint_4.pt", "checkpoint_6.pt"]

    def resumes(step, warnings=0):
        capsys.readouterr()
        assert tgs.main(argv) == 0
        seen = capsys.readouterr()
        assert seen.err.count("WARNING") == seen.err.count("\n") == warnings
        assert f"resumed at step {step} on " in seen.out
        assert same_end(end_of(record), whole)
        return seen.err

    resumes(6)  # a finished run ends once more, and loses nothing
    with open(record / "metrics.jsonl", "ab") as elsewhere:
        fcntl.flock(elsewhere, fcntl.LOCK_EX)
        refused_in_one_line(capsys, argv, "another process writes this record")
    (record / "train_gpt_skip.py").write_text("# another script")
    resumes(6)
    assert "WARNING: this is not the script that began" in (record / "log.txt").read_text()
    for damage in (lambda b: b[:len(b) // 2], lambda b: b[:3000] + bytes([b[3000] ^ 1]) + b[3001:],
                   lambda b: b""):
        last.write_bytes(damage(last.read_bytes()))
        (record / "checkpoint_8.pt.partial").write_bytes(b"torn")
        (record / "checkpoint_best_500.pt").write_bytes(b"mine")  # not of ours: left alone
        with open(record / "metrics.jsonl", "a") as f:
            f.write('{"kind": "train", "st')
        assert str(last) in resumes(4, warnings=1)
        assert (record / "checkpoint_best_500.pt").read_bytes() == b"mine"
    (record / "checkpoint_best_500.pt").unlink()

    events_then = (record / "metrics.jsonl").read_bytes()
    (record / "metrics.jsonl").write_bytes(events_then[:-900])
    assert "fewer than" in resumes(4, warnings=1)
    for path in tgs.checkpoints(record):
        path.write_bytes(b"damaged")
    assert tgs.main(argv) == 2 and "remove them to start at step 0" in capsys.readouterr().err
    for path in tgs.checkpoints(record):
        path.unlink()
    refused_in_one_line(capsys, argv, "it is finished and has no checkpoint")
    (record / "summary.json").unlink()
    resumes(0)
    for name, value in (("lr", 0.5), ("seed", 3), ("control", "none"), ("train_files", "other_*.bin"),
                        ("preset", "demo")):
        refused_in_one_line(capsys, argv + [f"--{name}", str(value)], f"--{name} {value} disagrees",
                            "leave the flag out")
    assert tgs.main(["--resume", str(record), "--log_every", "2"]) == 0 and same_end(end_of(record), whole)
    assert len(list(tmp_path.iterdir())) == 1

    state = torch.load(last)  # whole, but not of this run
    for change in (dict(model={}), dict(optimizer=3), dict(control={}), dict(step="six"), dict(step=700),
                   dict(place=None),
                   dict(place=(9, 0)), dict(rng=1), dict(train_s="long"),
                   dict(control=dict(coef=torch.zeros(1), average=None))):
        torch.save(state | change, last)
        refused_in_one_line(capsys, argv, str(last))
    assert timeless(record) == whole[0]


def test_a_run_from_a_config_or_from_weights_resumes_too_even_before_its_first_checkpoint(tmp_path, corpus,
                                                                                          no_plot):
    assert tgs.main(flags(corpus, tmp_path / "a", num_steps=1)) == 0
    first = only_record(tmp_path / "a")
    argv = ["--records_dir", str(tmp_path / "b"), "--config", str(first / "config.json"), "--init_from",
            str(first)]
    assert tgs.main(argv) == 0
    record = only_record(tmp_path / "b")
    whole = end_of(record)
    for path in [*tgs.checkpoints(record), record / "summary.json"]:
        path.unlink()
    assert tgs.main(argv + ["--resume", str(record)]) == 0
    assert same_end(end_of(record), whole)
    # they began from its weights
    assert timeless(record)[0]["cross_entropy"] == timeless(first)[-1]["cross_entropy"]


def test_runs_that_start_in_the_same_second_write_records_of_their_own(tmp_path, corpus, no_plot):
    runs = [Ranks(tmp_path / f"out_{i}", flags(corpus, tmp_path / "records", num_steps=1, name="twin"))
            for i in (0, 1)]
    assert [run.wait() for run in runs] == [[0], [0]]
    stamp = lambda: tgs.make_folder(tmp_path / "folders", "x")
    threads = [threading.Thread(target=stamp) for _ in range(20)]
    [t.start() for t in threads], [t.join() for t in threads]
    assert len(list((tmp_path / "records").iterdir())) == 2
    assert len(list((tmp_path / "folders").iterdir())) == 20


# Signals

@pytest.mark.parametrize("number, world", [(signal.SIGTERM, 1), (signal.SIGINT, 1), (signal.SIGTERM, 2)])
def test_a_signal_ends_a_run_after_its_step_with_a_checkpoint_and_the_command_that_resumes(tmp_path, corpus,
                                                                                           number, world):
    """Of two ranks one gets the signal; both end after the same step."""
    argv = flags(corpus, tmp_path / "r", num_steps=9999, val_every=9999, **DRIVEN)
    run = Ranks(tmp_path, argv, world)
    wait_for(lambda: list((tmp_path / "r").glob("*/metrics.jsonl")))
    record = only_record(tmp_path / "r")
    wait_for(lambda: len(events(record, "train")) > 3)
    os.kill(run.pids[-1], number)
    assert run.wait(20) == [0] * world and not run.errors(), run.text()
    summary, step = json.loads((record / "summary.json").read_text()), len(events(record, "train"))
    assert summary["interrupted"] and summary["step"] == step
    assert [p.name for p in tgs.checkpoints(record)] == [f"checkpoint_{step}.pt"]
    command = run.text().splitlines()[-1].split("go on with: ")[1].split()
    assert command == ["./run.sh", "--resume", str(record)]


def test_a_second_signal_ends_a_run_at_once(tmp_path, corpus):
    def slow(rank):
        tgs.learning_rate = lambda step, cfg: time.sleep(60)
    run = Ranks(tmp_path, flags(corpus, tmp_path / "r"), before=slow)
    wait_for(lambda: "step 0/3" in run.text())
    time.sleep(0.1), os.kill(run.pids[0], signal.SIGTERM), time.sleep(0.1)
    assert run.poll() == [None]
    os.kill(run.pids[0], signal.SIGTERM)
    assert run.wait(5) == [128 + signal.SIGTERM]


def test_an_interrupt_before_the_first_step_is_one_line_too(tmp_path, corpus, capsys, monkeypatch):
    monkeypatch.setattr(tgs, "build_model", lambda *args, **kw: throw(KeyboardInterrupt))
    refused_in_one_line(capsys, flags(corpus, tmp_path / "r"), "interrupted", status=130)
    assert not (tmp_path / "r").exists()


# Divergence

def test_a_loss_or_gradient_that_is_not_finite_stops_the_run_before_it_reaches_the_weights(tmp_path, corpus,
                                                                                           capsys,
                                                                                           monkeypatch):
    real, seen = tgs.Trainer.micro_step, []

    def poisoned(trainer, x, y):
        out = real(trainer, x, y)
        if trainer.loader.place[1] == 3 * 32:  # in step 3
            seen.append((trainer, {k: v.clone() for k, v in trainer.model.state_dict().items()}))
            trainer.model.output.weight.grad[0, 0] = math.inf
        return out

    monkeypatch.setattr(tgs.Trainer, "micro_step", poisoned)
    argv = flags(corpus, tmp_path / "a", num_steps=6, save_every=2)
    refused_in_one_line(capsys, argv, "gradient", "step 3", "c_train_000001.bin", "token 96", "--lr",
                        status=3)
    trainer, weights = seen[-1]
    assert all(torch.equal(v, weights[k]) for k, v in trainer.model.state_dict().items())
    checkpoint, = tgs.checkpoints(only_record(tmp_path / "a"))
    assert checkpoint.name == "checkpoint_2.pt" and tgs.read_checkpoint(checkpoint)["step"] == 2

    monkeypatch.setattr(tgs.Trainer, "micro_step", real)
    huge = ["--lr", "1e38", "--warmup_fraction", "0"]
    refused_in_one_line(capsys, flags(corpus, tmp_path / "b") + huge, "loss on rank 0", "step 1", "token 32",
                        status=3)
    refused_in_one_line(capsys, flags(corpus, tmp_path / "c", num_steps=1) + huge, "validation loss",
                        "step 1", status=3)
    assert not (only_record(tmp_path / "c") / "summary.json").exists()


# Bad input

def shard_header(*values):
    return np.array(values + (0,) * (256 - len(values)), "<i4").tobytes()


def test_every_malformed_shard_is_one_line_that_names_it_before_a_record_is_made(tmp_path, corpus, capsys):
    path, tokens = tmp_path / "bad.bin", np.arange(200, dtype="<u2").__mod__(11).tobytes()
    good = shard_header(20240520, 1, 200)
    for content, word in [
            (b"", "too short"), (good[:1000], "too short"),
            (shard_header(20240521, 1, 200) + tokens, "begins with 20240521"),
            (shard_header(20240520, 2, 200) + tokens, "version 2, not 1"),
            (shard_header(20240801, 1, 200) + tokens, "version 1, not 7"),
            (shard_header(20240801, 7, 200) + tokens, "holds 100"),
            (np.frombuffer(good, "<i4").byteswap().tobytes() + tokens, "big-endian"),
            *[(shard_header(20240520, 1, n) + tokens, f"says {n} tokens but holds 200")
              for n in (201, 199, -1, 0, 2**31 - 1)],
            (good + tokens + b"x", "holds 200.5"), (good + tokens[:-2], "holds 199"), (good, "holds 0"),
            (shard_header(20240520, 1, 20) + tokens[:40], "smaller --batch_size")]:
        path.write_bytes(content)
        refused_in_one_line(capsys, flags(corpus, tmp_path / "r", train_files=path), word, str(path))
    path.write_bytes(shard_header(20240520, 1, 8) + tokens[:16])
    refused_in_one_line(capsys, flags(corpus, tmp_path / "r", val_files=path), "--val_files", "--max_seq_len")
    refused_in_one_line(capsys, flags(corpus, tmp_path / "r", train_files=tmp_path / "none_*.bin"),
                        "matches no file")
    path.unlink(), path.mkdir()
    refused_in_one_line(capsys, flags(corpus, tmp_path / "r", train_files=path), str(path), "directory")
    path.rmdir()
    write_shard(path, [1] * 200).chmod(0)
    if not os.access(path, os.R_OK):  # root reads everything
        refused_in_one_line(capsys, flags(corpus, tmp_path / "r", train_files=path), str(path),
                            "Permission denied")
    assert not (tmp_path / "r").exists()


def test_a_token_beyond_the_vocabulary_is_found_before_it_reaches_the_model(tmp_path, corpus, capsys):
    tokens = np.arange(200) % 11
    tokens[3 * 32 + 20] = 60000
    path = write_shard(tmp_path / "bad.bin", tokens)
    words = (str(path), "token 60000", "position 116", "--vocab_size 11")
    refused_in_one_line(capsys, flags(corpus, tmp_path / "r", train_files=path, num_steps=5), *words)
    assert [e["step"] for e in events(only_record(tmp_path / "r"), "train")] == [0, 1, 2]
    refused_in_one_line(capsys, flags(corpus, tmp_path / "v", val_files=path), *words)


def test_every_malformed_checkpoint_is_one_line_that_names_it_before_a_record_is_made(tmp_path, corpus,
                                                                                      capsys):
    """And a pickle that would run code is refused, and nothing of it runs."""
    assert tgs.main(flags(corpus, tmp_path / "good", num_steps=1)) == 0
    good, bad, ran = only_record(tmp_path / "good"), tmp_path / "bad", tmp_path / "ran"
    state, config = torch.load(good / "checkpoint_1.pt"), (good / "config.json").read_text()
    model, weight = state["model"], "layers.0.attention.wq.weight"
    data = (good / "checkpoint_1.pt").read_bytes()
    bad.mkdir()

    class Evil:
        def __reduce__(self):
            return Path.touch, (ran,)

    def refuses(content, *words, config=config, name="checkpoint_1.pt"):
        for path in bad.iterdir():
            path.unlink()
        if config is not None:
            (bad / "config.json").write_text(config)
        if isinstance(content, bytes):
            (bad / name).write_bytes(content)
        elif content is not None:
            torch.save(content, bad / name)
        for source in (bad, bad / name) if content is not None else (bad,):
            refused_in_one_line(capsys, flags(corpus, tmp_path / "r", init_from=source, dim=None,
                                              n_layers=None), str(bad), *words)

    refuses(data[:len(data) // 2], "damaged"), refuses(b"", "damaged"), refuses(b"not a checkpoint",
                                                                                "damaged")
    refuses(data[:3000] + bytes([data[3000] ^ 1]) + data[3001:], "damaged")
    refuses(pickle.dumps(Evil()), "damaged"), refuses({"model": Evil()}, "damaged"), refuses(Evil(),
                                                                                             "damaged")
    refuses([1], "not a dictionary"), refuses({"model": [1]},
                                              "not a dictionary"), refuses({"model": {3: model[weight]}},
                                                                           "not a dictionary")
    refuses({"model": {}}, "lacks"), refuses({"model": model | {"more": model[weight]}}, "also has more")
    refuses({"model": model | {weight: torch.zeros(3)}}, weight,
            "[3]"), refuses({"model": model | {weight: "text"}}, weight, "str")
    refuses({"model": model | {weight: model[weight].long()}}, weight, "int64"), refuses(None,
                                                                                         "has no checkpoint")
    refuses(data, "no config.json", config=None), refuses(data, "cannot be read as JSON", config=config[:50])
    refuses(data, "not a JSON object", config="[1]"), refuses(data, "does not say dim",
                                                              config='{"n_layers": 4}')
    refuses(data, "not a dictionary", config='{"model": 3}'), refuses(data, "cannot be read as JSON",
                                                                      config="[" * 100_000)
    weights = (good / "model.safetensors").read_bytes()
    refuses(weights[:-100], "damaged", name="model.safetensors"), refuses(b"{", "damaged",
                                                                          name="model.safetensors")
    refused_in_one_line(capsys, flags(corpus, tmp_path / "r", init_from=good, dim=32), "--dim 32 disagrees",
                        str(good))
    assert not ran.exists() and not (tmp_path / "r").exists()


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(head=st.lists(st.integers(-2**31, 2**31 - 1) | st.sampled_from([20240520, 1, 0, 5]), max_size=4),
       cut=st.integers(0, 1100), size=st.integers(0, 12), real=st.integers(0, 3))
def test_no_header_of_a_shard_is_more_than_accepted_or_refused(tmp_path_factory, head, cut, size, real):
    path = tmp_path_factory.getbasetemp() / "fuzzed.bin"
    values = ((20240520, 1, size)[:real] + tuple(head))[:256]
    path.write_bytes((shard_header(*values) + bytes(2 * size))[:1024 + 2 * size if real else cut])
    try:
        assert len(tgs.open_shard(path)) == size > 0 and values[:3] == (20240520, 1, size)
    except UserError as e:
        assert str(path) in str(e) and "\n" not in str(e)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(at=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=3),
       cut=st.none() | st.floats(0, 1), seed=st.integers(0, 9))
def test_no_damage_to_a_checkpoint_changes_what_is_read_from_it(tmp_path_factory, at, cut, seed):
    """Read whole and the same, or refused in one line."""
    path, content = tmp_path_factory.getbasetemp() / "fuzzed.pt", {"model": {"w": torch.arange(40.0)},
                                                                   "step": 3}
    torch.save(content, path)
    data = bytearray(path.read_bytes())
    for place, value in at:
        data[int(place * (len(data) - 1))] = value
    path.write_bytes(data if cut is None else data[:int(cut * len(data))])
    try:
        state = tgs.read_checkpoint(path)
        assert state["step"] == 3 and torch.equal(state["model"]["w"], content["model"]["w"])
    except UserError as e:
        assert str(path) in str(e) and "\n" not in str(e)


# Disk

def test_a_full_disk_stops_the_run_in_one_line_with_the_checkpoint_before_intact_and_nothing_half_written(
        tmp_path, corpus, capsys, monkeypatch, no_plot):
    kw = dict(num_steps=6, save_every=2, **DRIVEN)
    assert tgs.main(flags(corpus, tmp_path / "whole", **kw)) == 0
    whole = end_of(only_record(tmp_path / "whole"))
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fsync(descriptor, calls=[]):
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith("checkpoint_4.pt.partial"):
            raise full
    for i, (module, name, fault) in enumerate([
            (os, "fsync", fsync),
            (torch, "save", lambda s, f, real=torch.save: real(s, f) if s["step"] < 4 else throw(full))]):
        with monkeypatch.context() as m:
            m.setattr(module, name, fault)
            refused_in_one_line(capsys, flags(corpus, tmp_path / f"r{i}", **kw),
                                "checkpoint_4.pt cannot be written", "No space left", "--resume")
        record = only_record(tmp_path / f"r{i}")
        assert [p.name for p in tgs.checkpoints(record)] == ["checkpoint_2.pt"]
        assert not list(record.glob("*.partial"))
        assert tgs.main(["--resume", str(record)]) == 0 and same_end(end_of(record), whole)


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("mount"), reason="needs the right to mount")
def test_a_run_on_a_full_file_system_says_so_and_goes_on_when_there_is_room(tmp_path, corpus, capsys):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", disk],
                      capture_output=True).returncode:
        pytest.skip("cannot mount a tmpfs here")
    try:
        kw = dict(num_steps=6, save_every=2, dim=32)
        refused_in_one_line(capsys, flags(corpus, disk, **kw), "cannot be written", "--resume")
        record = only_record(disk)
        assert not list(record.glob("*.partial"))
        step = max([tgs.read_checkpoint(p)["step"] for p in tgs.checkpoints(record)], default=0)
        assert len(events(record, "train")) >= step
        with open(disk / "lines", "ab", buffering=0) as f, pytest.raises(UserError, match="No space left"):
            tgs.Record.append(None, f, "fits")
            tgs.Record.append(None, f, "y" * 600_000)
        assert (disk / "lines").read_text() == "fits\n"
        subprocess.run(["mount", "-o", "remount,size=9m", disk], check=True)
        assert tgs.main(["--resume", str(record)]) == 0
        assert tgs.main(flags(corpus, tmp_path / "whole", **kw)) == 0
        assert same_end(end_of(record), end_of(only_record(tmp_path / "whole")))
    finally:
        subprocess.run(["umount", disk], check=True)


# Several processes

def losses(record):
    return [[e[k] for k in ("loss", "cross_entropy", "gate_mean", "gate_var", "gate_zero", "mean_coef",
                            "var_coef") if k in e]
            for e in events(record)]


def assert_same_losses(a, b):
    flat = [[x for v in e for x in (v if isinstance(v, list) else [v])] for e in a], [
        [x for v in e for x in (v if isinstance(v, list) else [v])] for e in b]
    assert len(a) == len(b) and all(x == pytest.approx(y, rel=1e-3, abs=2e-5) for x, y in zip(*flat))


def test_any_number_of_ranks_gives_the_same_losses_gates_and_coefficients_also_when_it_changes_on_resume(
        tmp_path, corpus, no_plot):
    """And gradients synchronise once a step, not on the micro-batches of an accumulation."""
    kw = dict(num_steps=6, save_every=3, val_every=3, device_batch_size=1, **DRIVEN)

    def counting(rank):
        real, calls = torch.nn.parallel.DistributedDataParallel, []
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

        def counted(*args, **kwargs):
            model = real(*args, **kwargs)

            def hook(group, bucket):
                calls.append(1)
                (tmp_path / f"calls_{rank}").write_text(str(len(calls)))
                return allreduce_hook(group, bucket)
            model.register_comm_hook(None, hook)
            return model
        torch.nn.parallel.DistributedDataParallel = counted

    def interrupted(rank):
        real = tgs.Trainer.train_step

        def step(trainer, i):
            trainer.stop += i == 3
            return real(trainer, i)
        tgs.Trainer.train_step = step

    for world, before in ((1, lambda rank: None), (2, counting), (4, lambda rank: None)):
        run = Ranks(tmp_path, flags(corpus, tmp_path / str(world), **kw), world, before)
        assert run.wait() == [0] * world, run.text()
    one, two, four = (losses(only_record(tmp_path / w)) for w in "124")
    assert_same_losses(one, two), assert_same_losses(one, four)
    # some skip, some not
    assert any(0 < z < 1 for e in events(only_record(tmp_path / "1")) for z in e["gate_zero"])
    # one bucket: 6 steps of two micro-batches, and 6 to time it
    assert [(tmp_path / f"calls_{r}").read_text() for r in (0, 1)] == ["12", "12"]
    summary = json.loads((only_record(tmp_path / "2") / "summary.json").read_text())
    assert summary["ranks"] == 2 and 1 <= summary["rank_imbalance"] <= 2
    assert summary["all_reduce_seconds"] > 0 and summary["averaged_step_seconds"] > 0
    assert "2 ranks: averaging the gradients takes" in (only_record(tmp_path / "2") / "log.txt").read_text()
    for first, then in ((1, 2), (4, 1)):
        folder = tmp_path / f"{first}_then_{then}"
        assert Ranks(tmp_path, flags(corpus, folder, **kw), first, interrupted).wait() == [0] * first
        assert len(events(only_record(folder), "train")) == 4
        assert Ranks(tmp_path, ["--resume", only_record(folder)], then).wait() == [0] * then
        assert_same_losses(one, losses(only_record(folder)))


def test_ranks_on_which_no_token_is_active_and_steps_in_which_none_is_anywhere_train(tmp_path, corpus,
                                                                                     no_plot):
    """Token 3 skips at the first router, and is all that rank 1 sees; then no token runs any block."""
    model, cfg = random_model(2, **TINY)
    h = model.input_norm(model.tok_embeddings.weight[3]).detach()
    data = np.where(np.arange(200) // 16 % 2, 3, np.arange(200) % 3)
    shard = write_shard(tmp_path / "x.bin", data)
    for name, weight, bias, share in (("some", 60 * h / h.square().sum(), -57, 0.5), ("none", 0 * h, 9, 1.0)):
        source = tmp_path / name
        source.mkdir()
        with torch.no_grad():
            model.masks[0].linear.weight.copy_(weight), model.masks[0].linear.bias.fill_(bias)
        tgs.export_weights(model, source / "model.safetensors")
        (source / "config.json").write_text(json.dumps({k: getattr(cfg, k) for k in tgs.MODEL_FIELDS}))
        for world in (1, 2):
            run = Ranks(tmp_path, flags(corpus, source / str(world), init_from=source, train_files=shard,
                                        val_tokens=100), world)
            assert run.wait() == [0] * world, run.text()
        one, two = (only_record(source / w) for w in "12")
        assert events(two, "train")[0]["gate_zero"][0] == pytest.approx(share, abs=0.04)
        assert events(two, "train")[0]["rank_imbalance"] == pytest.approx(2 if name == "some" else 1, abs=0.1)
        assert_same_losses(losses(one), losses(two))


def test_the_failure_of_one_rank_ends_all_and_its_cause_is_said_once(tmp_path, corpus, no_plot):
    tokens = np.arange(400) % 11
    tokens[2 * 32 + 20] = 60000  # step 2, the window of rank 1
    shard = write_shard(tmp_path / "bad.bin", tokens)
    run = Ranks(tmp_path, flags(corpus, tmp_path / "r", train_files=shard), 2)
    assert run.wait(30) == [1, 2] and "Traceback" not in run.text(), run.text()
    assert sum("token 60000" in line and "error: rank 1: shard" in line for line in run.errors()) == 1
    assert len(run.errors()) == 2 and "another process is gone" in run.errors()[0]

    def dies(rank):
        real = tgs.Trainer.micro_step
        tgs.Trainer.micro_step = lambda self, x, y: (
            os.kill(os.getpid(), 9) if rank == 1 and self.loader.place[1] else real(self, x, y))
    run = Ranks(tmp_path, flags(corpus, tmp_path / "s"), 2, dies)
    assert run.wait(30) == [1, -9] and len(run.errors()) == 1, run.text()

    def poisons(rank):
        real = tgs.Trainer.micro_step

        def step(self, x, y):
            loss, ce, stats = real(self, x, y)
            return loss * (math.nan if rank == 1 and self.loader.place[1] else 1), ce, stats
        tgs.Trainer.micro_step = step
    run = Ranks(tmp_path, flags(corpus, tmp_path / "t"), 2, poisons)
    assert run.wait(30) == [3,
                            3] and len(run.errors()) == 1 and "loss on rank 1" in run.errors()[0], run.text()
    # the same on all: said once
    for wrong in (["--dim", "15"], ["--train_files", "none_*.bin"], ["--batch_size", "2"]):
        run = Ranks(tmp_path, flags(corpus, tmp_path / "u") + wrong, 2)
        assert run.wait(30) == [2, 2] and len(run.errors()) == 1 and wrong[0] in run.text(), run.text()
    assert not (tmp_path / "u").exists()


def test_torchruns_restarts_go_on_from_the_last_checkpoint(tmp_path, corpus):
    """One of two processes is killed; torchrun starts both again, in the same record."""
    kw = dict(num_steps=80, save_every=10, val_every=80, **DRIVEN)
    argv = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
            "--max_restarts", "1",
            "--monitor_interval", "0.2", str(ROOT / "train_gpt_skip.py"),
            *flags(corpus, tmp_path / "r", **kw)]
    with open(tmp_path / "out", "w") as out, subprocess.Popen(argv, stdout=out, stderr=out) as run:
        wait_for(lambda: list((tmp_path / "r").glob("*/checkpoint_10.pt")) or run.poll() is not None)
        workers = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
        os.kill(int(workers[-1]), signal.SIGKILL)
        try:
            status = run.wait(60)
        finally:
            run.terminate()
        assert status == 0, (tmp_path / "out").read_text()
    record, text = only_record(tmp_path / "r"), (tmp_path / "out").read_text()
    assert [e["step"] for e in events(record, "train")] == list(range(80))
    assert int(re.search(r"resumed at step (\d+)", text)[1]) >= 10
    assert not json.loads((record / "summary.json").read_text())["interrupted"]


def test_two_torchrun_agents_act_as_two_machines(tmp_path, corpus, no_plot):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    kw = dict(num_steps=3, device_batch_size=1, **DRIVEN)
    agents = [subprocess.Popen([
        sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node_rank", str(n),
        "--master_addr", "127.0.0.1",
        "--master_port", port, "--nproc_per_node", "1", str(ROOT / "train_gpt_skip.py"),
        *flags(corpus, tmp_path / "two", **kw)], env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for n in (0, 1)]
    outputs = [agent.communicate(timeout=90)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], outputs
    assert "2 processes" in outputs[0] and "step" not in outputs[1]
    assert tgs.main(flags(corpus, tmp_path / "one", **kw)) == 0
    assert_same_losses(losses(only_record(tmp_path / "one")), losses(only_record(tmp_path / "two")))


# ----------------------------------------------------------------------------------------------------------
# data/tokenize_text.py: helpers


def tokenize(*argv, encoding="bytes", workers=1):
    tokenize_text.main([*map(str, argv), "--encoding", encoding, "--workers", str(workers)])


def write_jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def some_texts(count, seed=0):
    """Documents of 0 to 400 characters of 1 to 4 bytes."""
    draw = random.Random(seed)
    return ["".join(draw.choices("ab c\n\0é中😀", k=draw.randrange(400))) for _ in range(count)]


def read_tokens(folder, split):
    """The split's tokens, its shards one after the other."""
    shards = [np.fromfile(path, "<u2")[512:] for path in sorted(folder.glob(f"*_{split}_*.bin"))]
    return np.concatenate([np.empty(0, "<u2"), *shards])


def read_documents(folder, split, encoding="bytes"):
    encoding = tokenize_text.get_encoding(encoding)
    tokens = read_tokens(folder, split)
    starts = np.flatnonzero(tokens == encoding.eot_token)
    assert tokens.size == 0 or starts[0] == 0
    return [encoding.decode(part[1:].tolist()) for part in np.split(tokens, starts)[1:]]


def read_dataset(folder):
    return json.loads((folder / "dataset.json").read_text())


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def refused(capsys, *argv, status=2, **options):
    """Run what must fail; return its line on standard error."""
    with pytest.raises(SystemExit) as stop:
        tokenize(*argv, **options)
    output, line = capsys.readouterr()
    assert stop.value.code == status and output == ""
    assert line.startswith("tokenize_text.py: ") and line.count("\n") == 1 and line.endswith("\n")
    return line


# ----------------------------------------------------------------------------------------------------------
# data/tokenize_text.py: encodings


@settings(deadline=None)
@given(st.text())
def test_the_bytes_encoding_gives_the_utf8_bytes_of_any_text(text):
    encoding, data = tokenize_text.get_encoding("bytes"), text.encode()
    assert encoding.encode_ordinary(text) == list(data)
    assert tokenize_text.encode_text(encoding, data).tolist() == list(data)
    assert encoding.decode(list(data)) == text


def test_the_bytes_encoding_has_257_tokens_the_last_of_which_is_end_of_text():
    encoding = tokenize_text.get_encoding("bytes")
    assert (encoding.n_vocab, encoding.eot_token) == (257, 256)
    assert tokenize_text.token_lengths(encoding).tolist() == [1] * 256 + [0]


def toy_encoding():
    """GPT-2's pattern with a few merges, which need no download."""
    from tiktoken_ext.openai_public import r50k_pat_str

    merges = [b"  ", b" a", b"ab", b"\n\n", b" \n", b"'s", b"   ", b" ab", b"12", b"!!", b"abab", b"\xc3\xa9"]
    ranks = {token: rank for rank, token in enumerate([bytes([i]) for i in range(256)] + merges)}
    special = {"<|endoftext|>": len(ranks)}
    return tiktoken.Encoding("toy", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens=special)


def test_special_tokens_in_a_text_are_ordinary_text():
    tokens = tokenize_text.encode_text(toy_encoding(), b"a<|endoftext|>b")
    assert bytes(tokens.tolist()) == b"a<|endoftext|>b"


@settings(deadline=None)
@given(st.text("ab'12! \n\té\x1c\u2003", max_size=80), st.integers(1, 30))
def test_pieces_of_a_document_do_not_depend_on_the_blocks_that_it_is_read_in(text, size):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenize_text, "PIECE_CHARS", 5)
        blocks = [text[start : start + size] for start in range(0, len(text), size)]
        assert list(tokenize_text.cut(blocks)) == list(tokenize_text.cut([text]))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text("ab'12! \n\té\x1c\u2003", max_size=9)), st.sampled_from("a'2!é"))
def test_cutting_a_document_between_words_changes_no_token(words, end):
    encoding, text = toy_encoding(), "".join(f"{word}{end} " for word in words)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenize_text, "PIECE_CHARS", 20)
        pieces = list(tokenize_text.cut([text]))
    assert "".join(pieces) == text
    assert sum(map(encoding.encode_ordinary, pieces), []) == encoding.encode_ordinary(text)
    assert all(len(piece) <= 40 for piece in pieces)


def tokenizer_json(path, kind, extra=0):
    """A small tokeniser: byte-level, as GPT-2, Llama 3 and SmolLM have it; or of pieces with a fall-back to
    bytes, as Llama 2 and TinyLlama. `extra`: further tokens that no text has."""
    tokenizers = pytest.importorskip("tokenizers")
    if kind == "byte-level":
        alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
        names = ["<|endoftext|>", *alphabet, "Ġa", "ab", "é", *(f"none{i}" for i in range(extra))]
        names = list(dict.fromkeys(names))
        made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={name: i for i, name in enumerate(names)},
                                                          merges=[("Ġ", "a"), ("a", "b")]))
        made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = tokenizers.decoders.ByteLevel()
        made.add_special_tokens(["<|endoftext|>"])
    else:
        names = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *"▁abé", "ab", "▁a"]
        made = tokenizers.Tokenizer(tokenizers.models.BPE(
            vocab={name: i for i, name in enumerate(names)}, merges=[("a", "b"), ("▁", "a")],
            unk_token="<unk>", byte_fallback=True))
        made.normalizer = tokenizers.normalizers.Replace(" ", "▁")
        made.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
        made.add_special_tokens(["<unk>", "<s>", "</s>"])
    made.save(str(path))
    return str(path)


@pytest.mark.parametrize("kind, begin", [("byte-level", "<|endoftext|>"), ("pieces", "<s>")])
def test_the_tokens_of_a_tokenizer_json_are_the_bytes_of_the_text(tmp_path, kind, begin):
    encoding = tokenize_text.get_encoding(tokenizer_json(tmp_path / "tokenizer.json", kind))
    assert encoding.decode_single_token_bytes(encoding.eot_token) == begin.encode()
    for text in ["", "ab ab\n", " aé中😀\x00", f"{begin}a<unk>", *some_texts(20)]:
        tokens = encoding.encode_ordinary(text)
        assert b"".join(map(encoding.decode_single_token_bytes, tokens)) == text.encode()
        assert not {encoding.eot_token, encoding.n_vocab} & set(tokens)
    assert len(encoding.encode_ordinary("ab ab")) < 5
    with pytest.raises(KeyError):
        encoding.decode_single_token_bytes(encoding.n_vocab)
    lengths = tokenize_text.token_lengths(encoding)
    assert lengths[encoding.eot_token] == 0 and len(lengths) == encoding.n_vocab


@pytest.mark.parametrize("extra, dtype, head", [(0, "<u2", [20240520, 1]), (70_000, "<u4", [20240801, 7])])
def test_shards_of_a_tokenizer_json_have_the_bits_that_its_vocabulary_needs(tmp_path, extra, dtype, head):
    name = tokenizer_json(tmp_path / "tokenizer.json", "byte-level", extra)
    texts = some_texts(40)
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    tokenize(source, "--out", tmp_path / "out", "--val_fraction", 0, encoding=name, workers=2)
    dataset, encoding = read_dataset(tmp_path / "out"), tokenize_text.get_encoding(name)
    assert dataset["encoding"] == name and dataset["vocab_size"] == encoding.n_vocab > extra
    path = tmp_path / "out" / "text_train_000001.bin"
    assert np.fromfile(path, "<i4", 2).tolist() == head
    found = np.fromfile(path, dtype, offset=1024).tolist()
    assert found == tgs.open_shard(path).tolist()
    assert found == [t for text in texts for t in [encoding.eot_token, *encoding.encode_ordinary(text)]]
    assert dataset["train"]["bytes"] == sum(len(text.encode()) for text in texts)


def test_gpt2_shards_decode_to_the_documents(tmp_path):
    cache = Path(os.environ.get("TIKTOKEN_CACHE_DIR") or Path(tempfile.gettempdir(), "data-gym-cache"))
    base = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
    names = [hashlib.sha1(f"{base}{name}".encode()).hexdigest() for name in ("vocab.bpe", "encoder.json")]
    if not all((cache / name).exists() for name in names):
        pytest.skip("the GPT-2 vocabulary is not at hand")
    texts = [*some_texts(20), "<|endoftext|>", "Hello, world. " * 60_000]
    tokenize(write_jsonl(tmp_path / "a.jsonl", texts), "--out", tmp_path / "out", encoding="gpt2", workers=2)
    encoding, found = tokenize_text.get_encoding("gpt2"), read_tokens(tmp_path / "out", "train")
    train = read_documents(tmp_path / "out", "train", "gpt2")
    assert sorted(train + read_documents(tmp_path / "out", "val", "gpt2")) == sorted(texts)
    assert found.tolist() == [t for text in train for t in [50256, *encoding.encode_ordinary(text)]]
    assert read_dataset(tmp_path / "out")["train"]["bytes"] == sum(len(text.encode()) for text in train)


# ----------------------------------------------------------------------------------------------------------
# data/tokenize_text.py: shards


@settings(max_examples=25, deadline=None)
@given(st.lists(st.text(), min_size=1), st.integers(1, 4))
def test_shards_decode_to_the_documents_in_their_order(texts, items):
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenize_text, "CHUNK_ITEMS", items)
        patch.setattr(tokenize_text, "PIECE_CHARS", 3)
        source, out = write_jsonl(Path(folder, "a.jsonl"), texts), Path(folder, "out")
        tokenize(source, "--out", out, "--val_fraction", 0)
        assert read_documents(out, "train") == texts and not list(out.glob("*val*"))


def test_shards_are_the_same_for_any_number_of_workers_and_any_kind_of_input(tmp_path, monkeypatch):
    parquet, pyarrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    texts = [text.replace("\0", "-") for text in some_texts(300)]  # a file with NUL would be skipped
    jsonl, folder = write_jsonl(tmp_path / "a.jsonl", texts), tmp_path / "texts"
    table = pyarrow.table({"id": range(300), "text": texts})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=70)
    for number, text in enumerate(texts):
        path = folder / f"{number // 100}" / f"{number:03d}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())
    tokenize(jsonl, "--out", tmp_path / "expected", "--shard_tokens", 10_000)
    monkeypatch.setattr(tokenize_text, "CHUNK_ITEMS", 7)
    for workers, source in ((2, jsonl), (3, jsonl), (1, tmp_path / "a.parquet"), (2, folder)):
        out = tmp_path / f"{workers}_{source.name}"
        tokenize(source, "--out", out, "--shard_tokens", 10_000, workers=workers)
        assert contents(out) == contents(tmp_path / "expected")


def test_what_a_worker_gets_is_bounded_in_bytes_and_in_number():
    sizes = [10] * 3000 + [1 << 19] * 5 + [10]
    items = [(b"x" * size, 0.5, True) for size in sizes]
    chunks = list(tokenize_text.chunks(items, SimpleNamespace(update=str)))
    assert [len(chunk) for chunk in chunks] == [1024, 1024, 954, 2, 2]


def test_a_shard_is_256_int32_of_header_and_uint16_tokens(tmp_path):
    tokenize(write_jsonl(tmp_path / "a.jsonl", ["é\0"]), "--out", tmp_path / "out", "--val_fraction", 0)
    data = (tmp_path / "out" / "text_train_000001.bin").read_bytes()
    header = np.frombuffer(data[:1024], "<i4")
    assert header[:3].tolist() == [20240520, 1, 4] and not header[3:].any()
    assert data[1024:] == b"\x00\x01\xc3\x00\xa9\x00\x00\x00"


@pytest.mark.parametrize("extra", [-1, 0, 1])
def test_every_shard_but_the_last_is_full_and_none_is_empty(tmp_path, extra):
    texts = ["x" * 999, "y" * (2 * 1024 - 1001 + extra)]  # two shards' worth of tokens, and `extra`
    tokenize(write_jsonl(tmp_path / "a.jsonl", texts), "--out", tmp_path / "out", "--shard_tokens", 1024,
             "--val_fraction", 0, "--name", "my-name")  # fmt: skip
    shards = read_dataset(tmp_path / "out")["shards"]
    sizes = {-1: [1024, 1023], 0: [1024, 1024], 1: [1024, 1024, 1]}[extra]
    assert list(shards) == [f"my-name_train_{i:06d}.bin" for i in range(1, len(sizes) + 1)]
    assert [shard["tokens"] for shard in shards.values()] == sizes
    assert [shard["documents"] for shard in shards.values()] == [2, 0, 0][: len(sizes)]
    assert read_documents(tmp_path / "out", "train") == texts


def test_dataset_json_holds_what_the_shards_hold(tmp_path):
    texts = some_texts(200)
    source, out = write_jsonl(tmp_path / "a.jsonl", texts), tmp_path / "out"
    tokenize(source, "--out", out, "--shard_tokens", 5000, "--val_fraction", 0.3)
    dataset = read_dataset(out)
    assert (dataset["encoding"], dataset["vocab_size"], dataset["val_fraction"]) == ("bytes", 257, 0.3)
    assert sorted([*dataset["shards"], "dataset.json"]) == sorted(contents(out))
    assert {"text_val_000000.bin", "text_val_000001.bin", "text_train_000001.bin"} < set(dataset["shards"])
    for name, shard in dataset["shards"].items():
        data = (out / name).read_bytes()
        tokens = np.frombuffer(data, "<u2")[512:]
        counts = {"tokens": tokens.size, "bytes": (tokens < 256).sum(), "documents": (tokens == 256).sum()}
        assert shard == {**counts, "sha256": hashlib.sha256(data).hexdigest()}
    for split in ("train", "val"):
        documents = read_documents(out, split)
        size = sum(len(text.encode()) for text in documents)
        assert dataset[split] == {"tokens": size + len(documents), "bytes": size, "documents": len(documents)}


def test_max_tokens_keeps_exactly_the_first_tokens(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", some_texts(50))
    tokenize(source, "--out", tmp_path / "all", "--val_fraction", 0)
    tokenize(source, "--out", tmp_path / "part", "--val_fraction", 0, "--max_tokens", "1_234", workers=2)
    expected = read_tokens(tmp_path / "all", "train")[:1234]
    assert read_tokens(tmp_path / "part", "train").tolist() == expected.tolist()


# ----------------------------------------------------------------------------------------------------------
# data/tokenize_text.py: validation split


def test_a_documents_split_depends_on_its_text_alone(tmp_path):
    texts = [f"document {number}" for number in range(400)]
    for name, part in (("all", texts), ("reversed", texts[::-1]), ("half", texts[::2])):
        tokenize(write_jsonl(tmp_path / "a.jsonl", part), "--out", tmp_path / name, "--val_fraction", 0.2)
    val = read_documents(tmp_path / "all", "val")
    assert 50 < len(val) < 110
    assert read_documents(tmp_path / "reversed", "val") == val[::-1]
    assert read_documents(tmp_path / "half", "val") == [text for text in val if text in texts[::2]]


@pytest.mark.parametrize("fraction", [1e-9, 0.05, 0.95, 0.999999999])
def test_two_documents_are_one_for_each_split_whatever_the_fraction(tmp_path, capsys, fraction):
    for texts in (["one", "two"], ["two", "one"]):
        out = tmp_path / texts[0]
        tokenize(write_jsonl(tmp_path / "a.jsonl", texts), "--out", out, "--val_fraction", fraction)
        counts = [read_dataset(out)[split]["documents"] for split in ("train", "val")]
        assert counts == [1, 1] and "left a split empty" in capsys.readouterr().out
    assert read_documents(tmp_path / "one", "val") == read_documents(tmp_path / "two", "val")


def test_a_single_document_is_refused_unless_no_validation_is_asked_for(tmp_path, capsys):
    source = write_jsonl(tmp_path / "a.jsonl", ["alone"])
    assert "--val_fraction 0" in refused(capsys, source, "--out", tmp_path / "out")
    tokenize(source, "--out", tmp_path / "out", "--val_fraction", 0)
    assert read_documents(tmp_path / "out", "train") == ["alone"]


# ----------------------------------------------------------------------------------------------------------
# data/tokenize_text.py: input


def test_a_text_file_is_one_document_read_as_utf8(tmp_path, capsys):
    folder = tmp_path / "texts"
    (folder / ".git").mkdir(parents=True)
    (folder / ".git" / "hidden.txt").write_text("hidden")
    (folder / ".hidden").write_text("hidden")
    (folder / "a.md").write_bytes(b"\xef\xbb\xbfone\r\ntwo\n")  # the byte order mark is no text
    (folder / "b.bin").write_bytes(b"binary\0")
    (folder / "c").write_bytes(b"caf\xe9")
    (folder / "d.txt").write_bytes(b"")
    tokenize(folder, "--out", tmp_path / "out", "--val_fraction", 0)
    assert read_documents(tmp_path / "out", "train") == ["one\r\ntwo\n", "caf\ufffd", ""]
    assert "1 binary file" in capsys.readouterr().out


def test_a_text_file_of_many_blocks_is_one_document(tmp_path):
    text = "".join(some_texts(3000)).replace("\0", "")
    assert len(text) > 2 * tokenize_text.PIECE_CHARS
    (tmp_path / "a.txt").write_bytes(text.encode())
    (tmp_path / "b.txt").write_bytes(b"b")
    tokenize(tmp_path / "a.txt", tmp_path / "b.txt", "--out", tmp_path / "file", "--val_fraction", 0.5)
    source = write_jsonl(tmp_path / "a.jsonl", [text, "b"])
    tokenize(source, "--out", tmp_path / "line", "--val_fraction", 0.5)
    assert contents(tmp_path / "file") == contents(tmp_path / "line")


def test_byte_order_mark_blank_lines_and_other_fields_of_jsonl_are_passed_over(tmp_path):
    lines = [b'\xef\xbb\xbf{"id": 1, "text": "a\\ud800"}', b"", b" \r", b'{"text": "\xc3\xa9"}']
    (tmp_path / "a.JSONL").write_bytes(b"\n".join(lines))
    tokenize(tmp_path / "a.JSONL", "--out", tmp_path / "out", "--val_fraction", 0)
    assert read_documents(tmp_path / "out", "train") == ["a?", "é"]  # UTF-8 has no lone surrogates


def test_the_standard_library_is_its_sources_without_tests_and_installed_packages():
    folder = Path(sysconfig.get_path("stdlib"))
    files = [path.relative_to(folder) for path in tokenize_text.input_files([], stdlib=True)]
    assert Path("argparse.py") in files and Path("json/decoder.py") in files
    assert all(path.suffix == ".py" for path in files)
    assert not {part for path in files for part in path.parts} & {"test", "tests", "site-packages", "idlelib"}


def test_the_standard_library_becomes_shards_and_the_next_command_is_shown(tmp_path):
    command = [sys.executable, ROOT / "data" / "tokenize_text.py", "--stdlib", "--encoding", "bytes"]
    command += ["--out", tmp_path / "a" / "b c", "--max_tokens", "2_000_000", "--workers", "2"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (run.returncode, run.stderr) == (0, "")
    assert f"--train_files '{tmp_path}/a/b c/text_train_*.bin'" in run.stdout
    dataset = read_dataset(tmp_path / "a" / "b c")
    assert dataset["train"]["tokens"] + dataset["val"]["tokens"] == 2_000_000
    assert dataset["val"]["documents"] > 0
    assert any("def " in text for text in read_documents(tmp_path / "a" / "b c", "train"))


# ----------------------------------------------------------------------------------------------------------
# data/tokenize_text.py: refusals

LINES = {
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
    "latin1.jsonl": "latin1.jsonl:1: not JSON",
    "deep.jsonl": "deep.jsonl:1: not JSON",
    "no_text.jsonl": "no_text.jsonl:1: no `text`",
    "number.jsonl": "number.jsonl:1: no `text`",
    "list.jsonl": "list.jsonl:1: no `text`",
    "bad.parquet": "bad.parquet: ",
    "other.parquet": "no column `text`, but body",
    "null.parquet": "null.parquet: row 2: no `text`",
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
def bad_inputs(tmp_path, monkeypatch):
    for name, data in LINES.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "nothing").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("command", BAD_COMMANDS)
def test_what_the_user_can_put_right_is_one_line_and_leaves_nothing(bad_inputs, capsys, command):
    if "parquet" in command:
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.table({"body": ["a"]}), "other.parquet")
        parquet.write_table(pyarrow.table({"text": ["a", None]}), "null.parquet")
    before = sorted(bad_inputs.rglob("*"))
    encoding = command.partition(" --encoding ")[2] or "bytes"  # the last of two options wins
    argv = ["--out", "new/out", *command.split()]
    assert BAD_COMMANDS[command] in refused(capsys, *argv, encoding=encoding)
    assert sorted(bad_inputs.rglob("*")) == before


def test_an_error_in_a_worker_process_is_one_line_and_leaves_nothing(bad_inputs, capsys):
    line = refused(capsys, "good.txt", "not_json.jsonl", "--out", "new/out", workers=2)
    assert "not_json.jsonl:3: not JSON" in line and not Path("new").exists()


def test_a_worker_that_dies_is_one_line_and_leaves_nothing(bad_inputs, capsys, monkeypatch):
    monkeypatch.setattr(sys, "executable", shutil.which("true"))
    line = refused(capsys, "good.txt", "--out", "new/out", workers=2)
    assert "fewer --workers" in line and not Path("new").exists()


def test_parquet_without_pyarrow_and_gpt2_without_network_name_the_remedy(bad_inputs, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "pip install pyarrow" in refused(capsys, "bad.parquet", "--out", "new/out")

    def no_network(name):
        raise ConnectionError("a\nlong\nstory")

    monkeypatch.setattr(tiktoken, "get_encoding", no_network)
    tokenize_text.get_encoding.cache_clear()
    line = refused(capsys, "good.txt", "--out", "new/out", encoding="gpt2")
    assert "--encoding bytes" in line and "TIKTOKEN_CACHE_DIR" in line and not Path("new").exists()


@pytest.mark.parametrize("name", ["dataset.json", "text_train_000007.bin", "text_val_000000.bin"])
def test_an_existing_file_is_never_overwritten(bad_inputs, capsys, name):
    Path("out").mkdir()
    Path("out", name).write_text("precious")
    line = refused(capsys, "good.txt", "no_text.jsonl", "--out", "out")  # refused before the input is read
    assert f"out/{name} exists" in line and "another --out" in line
    assert contents(Path("out")) == {name: b"precious"}


def test_a_full_disk_is_one_line_and_leaves_what_was_there(bad_inputs, capsys, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    Path("out").mkdir()
    Path("out", "mine.txt").write_text("mine")
    monkeypatch.setattr(os, "fsync", full)
    line = refused(capsys, "good.txt", "--out", "out", "--val_fraction", 0)
    assert "out: No space left on device" in line and contents(Path("out")) == {"mine.txt": b"mine"}


def test_files_are_moved_into_place_all_or_none(bad_inputs, capsys, monkeypatch):
    def rename(source, target, rename=os.rename):
        if Path(target).name == "dataset.json":
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(os, "rename", rename)
    line = refused(capsys, "good.txt", "--out", "new/out", "--val_fraction", 0, status=130)
    assert "interrupted" in line and not Path("new").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_says_so_in_one_line_and_leaves_nothing(bad_inputs, number):
    Path("big.txt").write_text("word " * 200_000)
    command = [sys.executable, ROOT / "data" / "tokenize_text.py", *["big.txt"] * 2000]
    command += ["--encoding", "bytes", "--out", "new/out", "--workers", "2"]
    run = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True,
                           preexec_fn=lambda: signal.signal(number, signal.SIG_DFL))  # (`&` ignores SIGINT)
    while not list(Path().glob("new/out/.tokenize_*/*.bin")):
        assert run.poll() is None
        time.sleep(0.01)
    os.killpg(run.pid, number)  # as a terminal does
    _, errors = run.communicate(timeout=30)
    assert (run.returncode, errors) == (130, "tokenize_text.py: interrupted, nothing was written\n")
    assert not Path("new").exists()


# ----------------------------------------------------------------------------------------------------------
# data/fineweb.py

FINEWEB = Path(__file__).parent / "data" / "fineweb.py"
REPO, COMMIT = "kjj0/fineweb10B-gpt2", "c0ffee" + 34 * "0"
VAL, TRAIN1, TRAIN2 = "fineweb_val_000000.bin", "fineweb_train_000001.bin", "fineweb_train_000002.bin"


def make_shard(tokens, magic=20240520, version=1, claims=None):
    header = struct.pack("<256i", magic, version, tokens if claims is None else claims, *253 * [0])
    return header + bytes(i % 251 for i in range(2 * tokens))


def make_shards(prefix="fineweb", train=3):
    shards = {f"{prefix}_train_{i:06d}.bin": make_shard(1000 + i) for i in range(1, train + 1)}
    return {f"{prefix}_val_000000.bin": make_shard(500)} | shards


class HubRequest(BaseHTTPRequestHandler):
    """What the hub's client asks for: a repo's files, then HEAD and GET (with Range) of each."""
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        hub, name = self.server, self.path.rsplit("/", 1)[-1]
        hub.requests.append((self.command, name, self.headers["Range"]))
        if hub.says:
            self.send(*hub.says)
        elif self.path.startswith(f"/api/datasets/{hub.repo}?"):
            files = [{"rfilename": name, "size": len(data)} for name, data in hub.files.items()]
            self.send(200, json.dumps({"id": hub.repo, "sha": COMMIT, "siblings": files}).encode())
        elif self.path == f"/datasets/{hub.repo}/resolve/{COMMIT}/{name}" and name in hub.files:
            self.send_file(name)
        else:
            self.send(404, b"", {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET

    def send_file(self, name):
        data, start = self.server.files[name], int((self.headers["Range"] or "bytes=0-")[len("bytes="):-1])
        headers = {"ETag": f'"{name}"', "Accept-Ranges": "bytes"}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        self.send(206 if start else 200, data[start:], headers)
        if self.command == "GET" and name in self.server.then:
            self.server.files[name] = self.server.then.pop(name)

    def send(self, status, body, headers={}):
        self.send_response(status)
        for key, value in {"X-Repo-Commit": COMMIT, "Content-Length": len(body), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        cut = self.server.cuts.pop(self.path.rsplit("/", 1)[-1], None) if self.command == "GET" else None
        self.wfile.write(b"" if self.command == "HEAD" else body[:cut])
        if cut:  # the connection stays silent while hub.go is not set, and ends
            self.server.cut.set()
            self.server.go.wait(20)
            self.close_connection = True

    def log_message(self, *args):
        pass


@pytest.fixture
def hub():
    """A hub with one repo. cuts: where a file's next answer ends early; then: what replaces a file when
    it was sent; says: the one answer to everything."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), HubRequest)
    server.repo, server.files, server.requests = REPO, make_shards(), []
    server.cuts, server.then, server.says = {}, {}, None
    server.cut, server.go = threading.Event(), threading.Event()
    server.go.set()
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=[0.02], daemon=True).start()
    yield server
    server.go.set()
    server.shutdown()
    server.server_close()


def fineweb_module():
    spec = importlib.util.spec_from_file_location("fineweb", FINEWEB)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fineweb_command(tmp_path, url, *args, script=FINEWEB):
    env = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "TQDM_"))}
    env |= {"HF_ENDPOINT": url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "*"}
    return dict(args=[sys.executable, str(script), *map(str, args)], env=env, cwd=tmp_path)


def fineweb(tmp_path, url, *args, **options):
    command = fineweb_command(tmp_path, url, *args, **options)
    return subprocess.run(**command, capture_output=True, text=True, timeout=60)


def assert_one_line(run, *words):
    assert run.returncode == 2 and run.stderr.count("\n") == 1 and run.stderr.startswith("fineweb.py: "), run
    assert all(word in run.stderr for word in words), run.stderr


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".json"}


def closed_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


def test_fineweb_fetches_the_validation_shard_and_the_first_n_next_to_the_script(hub, tmp_path):
    script = Path(shutil.copy(FINEWEB, (tmp_path / "data").mkdir() or tmp_path / "data"))
    run = fineweb(tmp_path, hub.url, 2, script=script)
    assert run.returncode == 0 and not run.stderr, run.stderr
    assert f"{TRAIN2}: 1,002 tokens\n" in run.stdout
    assert run.stdout.endswith("fineweb10B: 3 shards, 2,503 tokens\n")
    folder = tmp_path / "data" / "fineweb10B"
    assert files_of(folder) == {name: hub.files[name] for name in (VAL, TRAIN1, TRAIN2)}
    assert json.loads((folder / "dataset.json").read_text()) == {
        "encoding": "gpt2", "vocab_size": 50257, "source": REPO,
        "shards": {TRAIN1: {"tokens": 1001}, TRAIN2: {"tokens": 1002}, VAL: {"tokens": 500}}}


def test_fineweb_asks_nothing_of_the_hub_for_shards_that_are_whole(hub, tmp_path):
    assert fineweb(tmp_path, hub.url, 1, "--out", "d").returncode == 0
    hub.requests.clear()
    assert fineweb(tmp_path, hub.url, 1, "--out", "d").returncode == 0 and not hub.requests
    assert fineweb(tmp_path, hub.url, 2, "--out", "d").returncode == 0
    assert {name for _, name, _ in hub.requests if name.endswith(".bin")} == {TRAIN2}


def test_fineweb_with_n_0_fetches_the_validation_shard_alone(hub, tmp_path):
    assert fineweb(tmp_path, hub.url, 0, "--out", "d").returncode == 0
    assert set(files_of(tmp_path / "d")) == {VAL}


def test_fineweb_continues_a_shard_where_the_connection_dropped(hub, tmp_path):
    hub.files[VAL] = make_shard(6_000_000)  # the hub's client reads 10 MiB at a time
    hub.cuts = {VAL: 11 << 20}
    run = fineweb(tmp_path, hub.url, 0, "--out", "d")
    assert run.returncode == 0 and not run.stderr, run.stderr
    assert files_of(tmp_path / "d") == {VAL: hub.files[VAL]}
    assert ("GET", VAL, f"bytes={10 << 20}-") in hub.requests


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT])
def test_fineweb_killed_midway_leaves_no_partial_shard_and_the_next_run_finishes(hub, tmp_path, end):
    hub.go.clear()
    hub.cuts = {TRAIN1: 1500}
    process = subprocess.Popen(**fineweb_command(tmp_path, hub.url, 1, "--out", "d"), stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)
    assert process.stdout.readline() == f"{VAL}: 500 tokens\n".encode() and hub.cut.wait(20)
    process.send_signal(end)
    assert process.communicate(timeout=5) == (b"", b"") and process.returncode == -end
    assert {path.name for path in (tmp_path / "d").iterdir()} == {VAL, ".incoming"}
    hub.requests.clear()
    assert fineweb(tmp_path, hub.url, 1, "--out", "d").returncode == 0
    assert files_of(tmp_path / "d") == {name: hub.files[name] for name in (VAL, TRAIN1)}
    assert VAL not in {name for _, name, _ in hub.requests}


@pytest.mark.parametrize("wrong", [make_shard(900, claims=1001), make_shard(1001, magic=20240521), b"<html>"])
def test_fineweb_removes_and_reports_a_file_that_is_no_whole_shard_after_one_more_try(hub, tmp_path, wrong):
    hub.files[TRAIN1] = wrong
    assert_one_line(fineweb(tmp_path, hub.url, 2, "--out", "d"), TRAIN1, "twice")
    assert set(files_of(tmp_path / "d")) <= {VAL, TRAIN2}
    assert [(command, name) for command, name, _ in hub.requests].count(("GET", TRAIN1)) == 2


def test_fineweb_replaces_wrong_shards_whether_they_came_now_or_were_there(hub, tmp_path):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / VAL).write_bytes(hub.files[VAL][:-2])
    hub.then = {VAL: hub.files[VAL]}
    hub.files[VAL] = make_shard(500, claims=501)
    run = fineweb(tmp_path, hub.url, 0, "--out", "d")
    assert run.returncode == 0 and f"{VAL} has 2,022 bytes where its header says 2,024: fetch" in run.stdout
    assert files_of(tmp_path / "d") == {VAL: hub.files[VAL]}


def test_fineweb_without_network_says_so_at_once_and_leaves_nothing(tmp_path):
    start = time.monotonic()
    run = fineweb(tmp_path, closed_port(), 1, "--out", "d")
    assert_one_line(run, "cannot reach http://127.0.0.1", "check the network")
    assert time.monotonic() - start < 10 and not (tmp_path / "d").exists()


@pytest.mark.parametrize("says, words", [
    ((500, b""), "answered 500"), ((200, b"<html>"), "cannot reach"),
    ((404, b"", {"X-Error-Code": "RepoNotFound"}), f"has no dataset {REPO}")])
def test_fineweb_reports_a_hub_that_does_not_answer_as_it_should(hub, tmp_path, says, words):
    hub.says = says
    assert_one_line(fineweb(tmp_path, hub.url, "--out", "d"), words)
    assert not (tmp_path / "d").exists()


def test_fineweb_names_the_file_that_the_repo_lacks(hub, tmp_path):
    assert_one_line(fineweb(tmp_path, hub.url, 4, "--out", "d"), REPO, "has no file fineweb_train_000004.bin")
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize("args, words", [(["104"], "N is 104, but must be 0 to 103"), (["-1"], "0 to 103"),
                                         (["x"], "argument N"), (["--workers", "0"], "argument --workers"),
                                         (["--dataset", "fineweb"], "OWNER/NAME-gpt2"),
                                         (["--dataset", "me/../x-gpt2"], "OWNER/NAME-gpt2"),
                                         (["--dataset", "../x-gpt2"], "Repo id")])
def test_fineweb_refuses_arguments_that_make_no_sense_in_one_line(tmp_path, capsys, args, words):
    assert fineweb_module().main([*args, "--out", str(tmp_path / "d")]) == 2
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1 and not (tmp_path / "d").exists()


def test_fineweb_counts_the_shards_of_a_repo_it_does_not_know(hub, tmp_path):
    hub.repo, hub.files = "me/slim-pajama6B-gpt2", make_shards("slim-pajama", train=2) | {"README.md": b"#"}
    assert fineweb(tmp_path, hub.url, "--dataset", hub.repo, "--out", "d").returncode == 0
    assert files_of(tmp_path / "d") == {name: data for name, data in hub.files.items() if name != "README.md"}


def test_fineweb_does_not_write_into_the_folder_of_another_dataset(hub, tmp_path):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "dataset.json").write_text('{"encoding": "bytes", "vocab_size": 256}')
    assert_one_line(fineweb(tmp_path, hub.url, 0, "--out", "d"), "dataset.json", "--out")
    assert not hub.requests and not files_of(tmp_path / "d")


def test_fineweb_shows_its_progress_as_a_bar_on_a_terminal(hub, tmp_path):
    terminal, stderr = pty.openpty()
    fcntl.ioctl(stderr, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
    command = fineweb_command(tmp_path, hub.url, 1, "--out", "d")
    run = subprocess.run(**command, stdout=subprocess.PIPE, stderr=stderr, timeout=60)
    os.close(stderr)
    assert run.returncode == 0 and run.stdout.count(b"\n") == 1  # the summary
    assert b"100%|" in os.read(terminal, 1 << 16)
    os.close(terminal)


def test_fineweb_imports_without_side_effects_and_knows_the_layouts():
    module = fineweb_module()
    assert [module.layout(repo) for repo in module.TRAIN_SHARDS] == [
        ("fineweb10B", "fineweb"), ("fineweb100B", "fineweb"), ("finewebedu10B", "finewebedu")]
    val, *train = module.shard_names("kjj0/finewebedu10B-gpt2", "finewebedu", None)
    assert val == "finewebedu_val_000000.bin" and len(train) == 99
    assert (train[0], train[-1]) == ("finewebedu_train_000001.bin", "finewebedu_train_000099.bin")


# ----------------------------------------------------------------------------------------------------------
# records/plan.py, records/bench.py and records/dry_run.py

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


PLANNED = dict(dim=64, n_heads=4, n_layers=4, max_seq_len=256, vocab_size=512, device_batch_size=2,
               batch_size=2)


@pytest.mark.parametrize("kw", [dict(control="dense"), dict(n_kv_heads=2, norm="llama"),
                                dict(ffn_dim_multiplier=2.5, n_layers=6)])
def test_the_plans_flops_and_parameters_are_those_that_torch_counts(kw):
    from torch.utils.flop_counter import FlopCounterMode
    cfg = Config(**PLANNED | kw)
    model = MiddleSkippingTransformer(cfg)
    tgs.initialise(model, cfg)
    for router in model.masks:
        torch.nn.init.constant_(router.linear.bias, -9.0)  # all gates open
    inputs = torch.randint(512, (2, 256))
    into = {torch.ops.aten.addmm_: lambda total, a, b, **_: 2 * a[0] * a[1] * b[1]}  # shapes
    with FlopCounterMode(display=False, custom_mapping=into) as counter:
        model(inputs, inputs)[0].backward()
    counted = counter.get_flop_counts()["Global"].items()
    products = sum(v for k, v in counted if str(k) in ("aten.mm", "aten.addmm", "aten.addmm_"))
    counts = plan.counts(cfg)
    parameters = sum(p.numel() for p in model.parameters())
    assert counts["parameters"] == archive.parameters(vars(cfg)) == parameters
    routers = 8 * inputs.numel() * cfg.dim * cfg.n_routers
    assert counts["products"] + counts["head"] == pytest.approx(products, abs=routers)
    pairs = 12 * cfg.n_layers * cfg.dim * 2 * 256 * 257 / 2
    assert counts["model_flops"] == pytest.approx(products + pairs, abs=routers)
    whole = cfg.n_layers * cfg.dim * 2 * 3 * 128**2  # 3 of 4 blocks
    assert counts["attention"] == whole * (22 if cfg.gated else 14)  # columns for ln g


def test_the_plans_bytes_are_those_that_inductor_counts_of_a_blocks_kernels(monkeypatch):
    """Per row, of so many that weights do not count; matrix products, which are counted as FLOPs, left out.
    The plan's are those of kernels for sm_90; a CPU's fuse less, and walk the rows again for a norm's
    weight."""
    from torch._inductor import metrics, scheduler
    monkeypatch.setattr(torch._inductor.config, "force_disable_caches", True)
    cfg, n = Config(**PLANNED | dict(dim=128)), 4096
    block, D = MiddleSkippingTransformer(cfg).layers[0], cfg.head_dim
    metrics.reset()
    h = torch.randn(n, 128, requires_grad=True)
    g = torch.rand(n, requires_grad=True)
    y = torch.randn(n, 4, D, dtype=torch.bfloat16, requires_grad=True)
    angles = torch.rand(2, n, D // 2)
    torch._logging.set_logs(inductor_metrics=True)
    with torch.autocast("cpu", torch.bfloat16):
        outs = torch.compile(tgs.Block.before, dynamic=False)(block, h, g, *angles, True)[:3]
        outs += torch.compile(tgs.Block.after, dynamic=False)(block, h, g, y),
    torch.autograd.backward(outs, [x.detach() for x in outs])
    torch._logging.set_logs()
    per_row = sum(4 * elements for node, elements in metrics.nodes_num_elem
                  if not isinstance(node, scheduler.ExternKernelSchedulerNode)) / n
    planned = plan.counts(cfg)["pointwise"] / cfg.n_layers / 512
    assert 0.7 * per_row < planned <= per_row


def test_the_plan_prints_estimates_that_say_so_and_refuses_what_cannot_be(capsys):
    assert ran(plan, "--sparsity", 0, 0.75, "--tokens", 1e9) == 0
    text = capsys.readouterr().out
    assert text.startswith("ESTIMATE") and "assumed" in text and "2 x 8" in text
    for wrong in "--sparsity 1", "--tokens 0", "--dim 7", "--lr 1":
        assert wrong.split()[0] in refusal(capsys, plan, *wrong.split())


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
    assert ran(dry_run, *argv, "--dry_run") == 0
    assert not [*tmp_path.iterdir()]
    said = capsys.readouterr().out
    assert tgs.main(argv) == 0
    record = only_record(tmp_path / "r")
    summary = json.loads((record / "summary.json").read_text())
    for words in (f"{summary['parameters']:,} parameters", f"work:  {summary['train_flops']:.3g} training",
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
    c = report.Comparison(tmp_path, TRACK)
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
    c = report.Comparison(tmp_path, TRACK)
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


def test_report_rewrites_the_readme_between_its_markers_only(tmp_path, one_track):
    readme, before, after = tmp_path / "README.md", b"# Mine\r\n\xc3\xa9 | text  \n", b"\n\nBelow\r\n no end"
    readme.write_bytes(before + f"{report.BEGIN}\nold table\n{report.END}".encode() + after)
    folder = live_run(tmp_path / "track", "gated")  # without the unit: a plain table
    for _ in range(2):
        assert ran(report, tmp_path) == 0
        text = readme.read_bytes()
        assert text.startswith(before) and text.endswith(after) and b"old table" not in text
        assert f"| {folder.name} | finished | 8 | 1.0000 | 0.5000 |".encode() in text
    readme.write_text(f"{report.BEGIN}\nmy text")  # whose end is missing: left alone
    assert ran(report, tmp_path) == 2 and readme.read_text().endswith("my text")


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
    (1.0, 0.0, "collapse to dense"), (2.7, 0.5, "divergence"), (1.0, 0.5, None)])
def test_the_papers_ways_to_fail_are_warned_of_once(tmp_path, capsys, loss, zero, said):
    run = live_run(tmp_path, "gated", loss=loss, zero=zero)
    for expected in said, None:
        assert ran(show, run, "--plot", "--log") == 0
        text = capsys.readouterr().out
        assert text.startswith(f"WARNING: {expected}") if expected else text == ""


def test_show_tells_what_closed_gates_saved_within_a_run_and_of_ranks_that_waited(tmp_path, capsys):
    run = live_run(tmp_path, "gated")
    first = archive.read_events(run)[0] | dict(rank_imbalance=1.5)
    last = first | dict(tokens_per_s=11.25, gate_zero=[0.75] * 8)
    (run / "metrics.jsonl").write_text((json.dumps(first) + "\n") * 18 + (json.dumps(last) + "\n") * 2)
    ddp = dict(avg_backward_comm_time=4e6, avg_backward_compute_comm_overlap_time=3e6)
    change(run / "summary.json", '"interrupted"', f'"ddp": {json.dumps(ddp)}, "interrupted"')
    assert ran(show, run) == 0
    said = capsys.readouterr().out
    assert "0.80 of its first time: 75% of the gates are closed in the last tenth of the steps, 50%" in said
    assert "4.0 ms a step, of which 3.0 ms are hidden" in said and "busiest rank has 1.500" in said


def test_show_needs_neither_torch_nor_the_script():
    code = "import sys, show; assert not {'torch', 'matplotlib', 'train_gpt_skip'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT / "records", check=True)
