"""What a run should cost on GPUs: a roofline on paper. Every time it prints is an ESTIMATE, none is measured.

    ./run.sh plan                                         # Table 2 on H100s
    ./run.sh plan --dim 1024 --n_layers 24 --device_name A100 --sparsity 0 0.5

A micro-batch is counted part by part: FLOPs of the weights' products, of attention (whole 128 x 128 blocks,
as FlexAttention computes them) and of the head; bytes that pointwise kernels and gradients move; kernels
launched and waits for the host. Counts over the data sheet's rates, of which SHARES says how much is assumed,
are seconds; what happens once a step, the optimizer and the averaging of gradients, is left out. FLOPs and
parameters are tested against torch's own counts; the shares are assumptions, printed with the result, and `./run.sh bench --gpu_report` prints this below what it measured. A sparsity is the
benchmark's: this share of the tokens is skipped at the first router. MFU counts the model's own FLOPs (no
masked pairs, no recomputation).
"""
import math

import torch

import tool
from tool import between, dense, tgs

DEVICES = {  # data sheets: dense bfloat16 FLOP/s, bytes/s, bytes of memory
    "A100": (312e12, 2.04e12, 80e9), "H100": (989e12, 3.35e12, 80e9), "H200": (989e12, 4.8e12, 141e9),
    "B200": (2250e12, 8.0e12, 180e9)}
SHARES = {"products": 0.65, "attention": 0.35, "memory": 0.8}  # assumed, of the above
LAUNCH_S, WAIT_S = 4e-6, 100e-6  # assumed: host time of a launch; device idle at each wait for the host
# Launches, forward and backward, as torch 2.13 lowers them for sm_90: of a bfloat16 block, of what a level
# does beside its blocks (router, gather and tables, sums, put back), and of the rest.
LAUNCHES_BLOCK, LAUNCHES_LEVEL, LAUNCHES_REST = 52, 45, 60


def counts(cfg, sparsity=0.0):
    """FLOPs, bytes, launches and waits of a training micro-batch of device_batch_size sequences, and bytes
    that one device holds. Pointwise kernels have in float32 the residual stream and its gradient, in bfloat16
    all else."""
    L, B, T, D = cfg.n_layers, cfg.device_batch_size, cfg.max_seq_len, cfg.head_dim
    d, kv, m, n = cfg.dim, cfg.n_kv_heads * D, cfg.hidden_dim, B * T
    rows, length = n * (1 - sparsity), T * (1 - sparsity)  # that a block computes, in all and of a sequence
    stats = [[0, 0, rows, B * length * (length + 1) / 2]] * cfg.n_levels
    blocks = math.ceil(length / tgs.ROWS)
    pairs = B * tgs.ROWS**2 * blocks * (blocks + 1) / 2
    with torch.device("meta"):
        parameters = sum(p.numel() for p in tgs.MiddleSkippingTransformer(cfg).parameters())
    # bytes a row: norms with their sums, rotary embedding (q, k; cos, sin), SwiGLU, and, as columns of q and
    # k, ln g; with which the kernels round q and k to a wider power of 2
    carry, wide = 0, 1
    if cfg.gated and cfg.gate_attention == "keys":
        carry = 16 * (d + kv) // D
        wide = 2**(D + 7).bit_length() / 2**(D - 1).bit_length()
    moved = 92 * d + 8 * kv + 8 * D + 16 * m + 2 * carry  # forward and backward
    saved = 20 * d + 4 * kv + 6 * m
    levels = cfg.n_levels if cfg.gated else 0
    return {
        "parameters": parameters, "model_flops": 3 * tgs.realised_flops(cfg, stats, n),
        "products": 6 * L * rows * d * (2 * d + 2 * kv + 3 * m), "head": 6 * n * d * cfg.vocab_size,
        # 7 products of 2 d FLOPs a pair, 2 forward; as wide as q and k are q k, in both passes, dq and dk
        "attention": 2 * L * d * pairs * (3 + 4 * wide),
        "pointwise": L * rows * moved, "head_bytes": n * (6 * cfg.vocab_size + 36 * d),
        "gather": 24 * rows * d if sparsity else 0,  # rows out and back, forward and backward
        "gradients": 18 * parameters,  # accumulated, and weights cast
        "launches": L * LAUNCHES_BLOCK + levels * LAUNCHES_LEVEL + LAUNCHES_REST, "waits": levels,
        "memory": 18 * parameters + rows * L * saved + 3 * 2**28 + 20 * n * d}


def micro_batch(cfg, sparsity, device):
    """Estimated seconds of a training micro-batch by part; "host" is what launching takes meanwhile."""
    c = counts(cfg, sparsity)
    flops, memory = DEVICES[device][0], DEVICES[device][1] * SHARES["memory"]
    products = flops * SHARES["products"]
    parts = {"products": c["products"] / products, "head": c["head"] / products + c["head_bytes"] / memory,
             "attention": c["attention"] / flops / SHARES["attention"]}
    parts |= {part: c[part] / memory for part in ("pointwise", "gather", "gradients")}
    parts["waits"] = c["waits"] * WAIT_S
    host = c["launches"] * LAUNCH_S
    return parts | {"total": max(sum(parts.values()), host), "host": host}


def lines(cfg, sparsities, device, tokens):
    flops, bandwidth, held = DEVICES[device]
    variants = [("dense", dense(cfg), 0.0)] + [(f"{s:.0%}", cfg, s) for s in sparsities]
    yield (f"ESTIMATE, nothing here is measured: {counts(dense(cfg))['parameters']:,} parameters, "
           f"{cfg.n_layers} blocks, d {cfg.dim}, {cfg.device_batch_size} x {cfg.max_seq_len} tokens a "
           f"micro-batch, bfloat16, {device}")
    yield (f"data sheet: {flops / 1e12:.0f} TFLOP/s, {bandwidth / 1e12:.2f} TB/s; assumed of it: "
           + ", ".join(f"{k} {v:.0%}" for k, v in SHARES.items()))
    yield f"\na micro-batch, forward and backward, ms by part; and GPU hours for {tokens:.3g} tokens"
    heads = "".join(f"{part:>11s}" for part in micro_batch(cfg, 0.0, device))
    yield f"sparsity   TFLOP     GB launches waits{heads}   MFU   hours  GB held"
    for label, c, s in variants:
        t, k = micro_batch(c, s, device), counts(c, s)
        moved = k["pointwise"] + k["head_bytes"] + k["gather"] + k["gradients"]
        parts = "".join(f"{1e3 * seconds:11.2f}" for seconds in t.values())
        hours = t["total"] * tokens / (c.device_batch_size * c.max_seq_len) / 3600
        yield (f"{label:>8s}{k['model_flops'] / 1e12:8.1f}{moved / 1e9:7.1f}{k['launches']:9d}{k['waits']:6d}"
               f"{parts}{k['model_flops'] / t['total'] / flops:6.2f}{hours:8.1f}{k['memory'] / 1e9:9.1f}"
               f"{' more than it has' if k['memory'] > held else ''}")


OPTIONS = {
    "device_name": dict(choices=DEVICES, default="H100", help="(default: H100)"),
    "sparsity": dict(type=between(float, 0, 1), nargs="+", default=[0.0, 0.25, 0.5, 0.75],
                     help="shares of tokens skipped (default: 0 0.25 0.5 0.75)"),
    "tokens": dict(type=between(float, 1, 1e18), default=1e10, help="of a run (default: 1e10, FineWeb-10B)"),
}
FIELDS = [*tgs.SIZES, "norm", "gate_attention", "control", "device_batch_size", "preset", "config"]


def run(args, explicit):
    cfg, _ = tgs.resolve(explicit)
    print(*lines(cfg, args.sparsity if cfg.gated else [], args.device_name, args.tokens), sep="\n")


main = tool.command(__name__, run, __doc__, OPTIONS, FIELDS)
