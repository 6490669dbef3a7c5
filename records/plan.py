"""What a run should cost on GPUs: a roofline on paper. Every time it prints is an ESTIMATE, none is measured.

    ./run.sh plan                                         # Table 2 on H100s
    ./run.sh plan --dim 1024 --n_layers 24 --device_name A100 --sparsity 0 0.5

A micro-batch is counted part by part: FLOPs of the weights' products, of attention (whole 128 x 128 blocks,
as FlexAttention computes them) and of the head; bytes that pointwise kernels, optimizer and gradients move;
kernels launched and waits for the host; and bytes of gradients between devices. Counts over the data sheet's
rates, of which SHARES says how much is assumed, are seconds. FLOPs, parameters and bytes of a block are
tested against torch's own counts; the shares are assumptions, printed with the result, and `./run.sh bench
--gpu_report` prints measured beside estimated. A sparsity is the benchmark's: this share of the tokens is
skipped at the first router. MFU counts the model's own FLOPs (no masked pairs, no recomputation).
"""
import argparse
import math
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
import show  # noqa: E402
import train_gpt_skip as tgs  # noqa: E402

DEVICES = {  # data sheets: dense bfloat16 FLOP/s, bytes/s, NVLink bytes/s in one direction, bytes of memory
    "A100": (312e12, 2.04e12, 300e9, 80e9), "H100": (989e12, 3.35e12, 450e9, 80e9),
    "H200": (989e12, 4.8e12, 450e9, 141e9), "B200": (2250e12, 8.0e12, 900e9, 180e9)}
NETWORK = 50e9  # bytes/s of a machine's 400 Gb/s network
SHARES = {"products": 0.65, "attention": 0.35, "memory": 0.8, "network": 0.8}  # assumed, of the above
LAUNCH_S, WAIT_S = 4e-6, 100e-6  # assumed: host time of a launch; device idle at each wait for the host
# Launches, forward and backward, as torch 2.13 lowers them for sm_90: of a bfloat16 block, of what a level
# does beside its blocks (router, gather and tables, sums, put back), and of the rest.
LAUNCHES_BLOCK, LAUNCHES_LEVEL, LAUNCHES_REST = 52, 45, 60


def counts(cfg: tgs.Config, sparsity: float = 0.0) -> dict:
    """FLOPs, bytes, launches and waits of a training micro-batch of device_batch_size sequences, and bytes
    that one device holds. Pointwise kernels have in float32 the residual stream and its gradient, in bfloat16
    all else."""
    d, kv, m, V, T = cfg.dim, cfg.n_kv_heads * cfg.head_dim, cfg.hidden_dim, cfg.vocab_size, cfg.max_seq_len
    L, D, n = cfg.n_layers, cfg.head_dim, cfg.device_batch_size * cfg.max_seq_len
    rows, length = n * (1 - sparsity), T * (1 - sparsity)  # that a block computes, in all and of a sequence
    blocks = math.ceil(length / tgs.ROWS)
    pairs = cfg.device_batch_size * tgs.ROWS**2 * blocks * (blocks + 1) / 2
    weights = d * (2 * d + 2 * kv + 3 * m)
    parameters = L * (weights + (4 if cfg.norm == "sandwich" else 2) * d) + 2 * V * d + 2 * d
    parameters += cfg.n_routers * (d + 1)
    # bytes a row: norms with their sums, rotary embedding (q, k; cos, sin), SwiGLU, ln g as columns of q and
    # k; kept for backward
    carry = 16 * (d + kv) // D if cfg.gated and cfg.gate_attention == "keys" else 0
    wide = 2**math.ceil(math.log2(D + 8)) / 2**math.ceil(math.log2(D)) if carry else 1  # as the kernels round
    forward = 28 * d + 4 * (d + kv) + 4 * D + 6 * m + carry
    backward = 56 * d + 4 * (d + kv) + 4 * D + 10 * m + carry
    saved = 20 * d + 4 * kv + 6 * m
    return {
        "parameters": parameters, "model_flops": 3 * tgs.realised_flops(
            cfg, [[0, 0, rows, cfg.device_batch_size * length * (length + 1) / 2]] * cfg.n_levels, n),
        "products": 6.0 * L * rows * weights, "head": 6.0 * n * d * V,
        # 7 products of 2 d FLOPs a pair, 2 forward; as wide as q and k are q k, in both passes, dq and dk
        "attention": 2.0 * L * d * pairs * (3 + 4 * wide),
        "pointwise": L * rows * float(forward + backward), "head_bytes": n * (6.0 * V + 36.0 * d),
        "gather": 0.0 if sparsity == 0 else 24.0 * rows * d,  # rows out and back, forward and backward
        "accumulate": 12.0 * parameters, "cast": 6.0 * parameters,
        "update": 32.0 * parameters,  # AdamW reads four numbers and writes three; the norm reads one
        "launches": L * LAUNCHES_BLOCK + (cfg.n_levels * LAUNCHES_LEVEL if cfg.gated else 0) + LAUNCHES_REST,
        "waits": cfg.n_levels if cfg.gated else 0,
        "memory": 18.0 * parameters + rows * L * float(saved) + 3 * 2.0**28 + 20.0 * n * d}


def micro_batch(cfg: tgs.Config, sparsity: float, device: str) -> dict:
    """Estimated seconds of a training micro-batch by part; "host" is what launching takes meanwhile."""
    (flops, bandwidth, *_), c = DEVICES[device], counts(cfg, sparsity)
    product, memory = flops * SHARES["products"], bandwidth * SHARES["memory"]
    parts = {"products": c["products"] / product, "head": c["head"] / product + c["head_bytes"] / memory,
             "attention": c["attention"] / (flops * SHARES["attention"]),
             "pointwise": c["pointwise"] / memory, "gather": c["gather"] / memory,
             "gradients": (c["accumulate"] + c["cast"]) / memory, "waits": c["waits"] * WAIT_S}
    return parts | {"total": max(sum(parts.values()), c["launches"] * LAUNCH_S),
                    "host": c["launches"] * LAUNCH_S}


def step(cfg: tgs.Config, sparsity: float, device: str, devices: int, machines: int) -> dict:
    """Estimated seconds of an optimizer step on `machines` of `devices` each, and tokens a second. Averaging
    hides behind the backward pass (two thirds) of the last micro-batch."""
    one, c, world = micro_batch(cfg, sparsity, device), counts(cfg, sparsity), devices * machines
    accumulation = cfg.batch_size // (cfg.device_batch_size * world)
    gradients = 8.0 * c["parameters"]  # a ring sends each twice
    average = gradients * (devices - 1) / devices / (DEVICES[device][2] * SHARES["network"])
    average += gradients * (machines - 1) / machines / (NETWORK * SHARES["network"])
    update = c["update"] / (DEVICES[device][1] * SHARES["memory"])
    seconds = accumulation * one["total"] + max(0.0, average - one["total"] * 2 / 3) + update
    return {"seconds": seconds, "average": average, "update": update, "accumulation": accumulation,
            "tokens_per_s": cfg.step_tokens / seconds}


def lines(cfg: tgs.Config, sparsities, device: str, tokens: float):
    flops, bandwidth, link, memory = DEVICES[device]
    dense = counts(show.dense(cfg))
    yield (f"ESTIMATE, nothing here is measured: {dense['parameters']:,} parameters, {cfg.n_layers} blocks, "
           f"d {cfg.dim}, {cfg.device_batch_size} x {cfg.max_seq_len} tokens a micro-batch, bfloat16, "
           f"{device}")
    yield (f"data sheet: {flops / 1e12:.0f} TFLOP/s, {bandwidth / 1e12:.2f} TB/s, {link / 1e9:.0f} GB/s a "
           f"device between devices, {NETWORK / 1e9:.0f} GB/s a machine between machines; assumed of it: "
           + ", ".join(f"{k} {v:.0%}" for k, v in SHARES.items()))
    yield "\na micro-batch, forward and backward, ms by part"
    parts = [k for k in micro_batch(cfg, 0.0, device) if k not in ("total", "host")]
    yield (f"{'sparsity':>8s}{'TFLOP':>8s}{'GB':>7s}{'launches':>9s}{'waits':>6s}" + "".join(
        f"{p:>11s}" for p in parts) + f"{'total':>8s}{'host':>7s}{'MFU':>6s}{'GB held':>9s}")
    for label, c, s in [("dense", show.dense(cfg), 0.0)] + [(f"{s:.0%}", cfg, s) for s in sparsities]:
        t, k = micro_batch(c, s, device), counts(c, s)
        moved = sum(k[p] for p in ("pointwise", "head_bytes", "gather", "accumulate", "cast"))
        yield (f"{label:>8s}{k['model_flops'] / 1e12:8.1f}{moved / 1e9:7.1f}{k['launches']:9d}"
               f"{k['waits']:6d}" + "".join(f"{1e3 * t[p]:11.2f}" for p in parts)
               + f"{1e3 * t['total']:8.1f}{1e3 * t['host']:7.1f}"
            f"{k['model_flops'] / t['total'] / flops:6.2f}{k['memory'] / 1e9:9.1f}"
            + " more than it has" * (k["memory"] > memory))
    yield f"\na step of {cfg.batch_size} sequences, and hours for {tokens:.3g} tokens"
    yield (f"{'devices':>9s}{'sparsity':>9s}{'micro-batches':>14s}{'step ms':>9s}{'averaging ms':>13s}"
           f"{'tokens/s':>11s}{'hours':>8s}")
    for machines, devices in ((1, 1), (1, 4), (1, 8), (2, 8), (4, 8)):
        if cfg.batch_size % (cfg.device_batch_size * devices * machines):
            continue
        for label, c, s in [("dense", show.dense(cfg), 0.0)] + [(f"{s:.0%}", cfg, s) for s in sparsities]:
            t = step(c, s, device, devices, machines)
            where = f"{machines} x {devices}" if machines > 1 else str(devices)
            yield (f"{where:>9s}{label:>9s}{t['accumulation']:14d}{1e3 * t['seconds']:9.1f}"
                   f"{1e3 * t['average']:13.2f}{t['tokens_per_s']:11,.0f}"
                   f"{tokens / t['tokens_per_s'] / 3600:8.2f}")


def main(argv=None) -> int:
    parser = tgs.Parser(prog="plan.py", description=__doc__, allow_abbrev=False,
                        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device_name", choices=DEVICES, default="H100", help="(default: H100)")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.0, 0.25, 0.5, 0.75],
                        help="shares of tokens skipped (default: 0 0.25 0.5 0.75)")
    parser.add_argument("--tokens", type=float, default=1e10, help="of a run (default: 1e10, FineWeb-10B)")

    def run():
        args, explicit = tgs.parse_settings(parser, argv)
        if bad := [s for s in args.sparsity if not 0 <= s < 1]:
            raise tgs.UserError(f"--sparsity {bad[0]} is out of range: a share from 0 to below 1")
        if not args.tokens > 0:
            raise tgs.UserError(f"--tokens {args.tokens} is out of range: it must be above 0")
        cfg, _ = tgs.resolve(explicit)
        print(*lines(cfg, args.sparsity if cfg.gated else [], args.device_name, args.tokens), sep="\n")
        return 0

    return tgs.exit_status(run)


if __name__ == "__main__":
    sys.exit(main())
