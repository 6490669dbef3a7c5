"""Time this machine: a training step, a prefill and decoding, plain, dense and gated at several sparsities.

    ./run.sh bench                      # the CPU's size: 12 blocks, d 384; Table 2's on a GPU
    ./run.sh bench --dtype bfloat16
    ./run.sh bench --modes train --rounds 9 --dim 768
    ./run.sh bench --growth             # how a token's cost grows with T, L, width and processes

Variants alternate within one process and rows are medians, so that ratios hold on a machine whose speed
drifts. `eager` is plain PyTorch, how the released code runs: separate projections, a materialised (B, 1, T,
T) mask, float32 softmax by hand, full logits. `gated` skips a given share of the tokens at the first router,
so sparsity is exact. MFU is the share of the machine's own matrix-product rate, measured in turn with them on
the products of a training step. Speed-up is against `dense`; efficiency is the measured speed-up over the
FLOPs' own. Last come the kernels that take most of a training step at 75% sparsity. Writes
records_dir/..._bench/bench.json.
"""
import argparse
import ctypes
import dataclasses
import json
import os
import re
import socket
import sys
import time
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent))
import plan  # noqa: E402
import sample  # noqa: E402
import show  # noqa: E402
from sample import tgs  # noqa: E402

CPU_SIZE = dict(dim=384, n_layers=12, n_heads=6, vocab_size=4096, max_seq_len=512, device_batch_size=4,
                batch_size=4)
SPARSITIES = (0.0, 0.25, 0.5, 0.75)
DECODE_STEPS = 16


# ---- the variants -----------------------------------------------------------------------------------------

class ForcedRouter(torch.nn.Module):
    """The first router, at its full cost, with an answer that is given: skip[i] of the i-th token."""

    def __init__(self, router):
        super().__init__()
        self.router, self.skip = router, None

    def forward(self, h):
        s = self.router(h)
        return s + F.pad(2.0 * self.skip, (0, len(s) - len(self.skip)))


def eager_forward(model, inputs, targets):
    """The gated model as plain PyTorch computes it: every token, all pairs, in rectangles."""
    B, T = inputs.shape
    mask = torch.full((B, 1, T, T), float("-inf"), device=inputs.device).triu(1)
    h = model.input_norm(model.tok_embeddings(inputs))
    for block in model.layers:
        y = eager_attention(block.attention, block.pre_attention_norm(h), mask, model)
        h = h + block.post_attention_norm(y)
        h = h + block.post_feed_forward_norm(block.feed_forward(block.pre_feed_forward_norm(h)))
    logits = model.output(model.output_norm(h)).float()
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten()) if targets is not None else logits


def eager_attention(attention, x, mask, model):
    (B, T, d), D = x.shape, attention.head_dim
    angles = torch.complex(model.cos[:T], model.sin[:T])[:, None]

    def rotate(t):
        pairs = torch.view_as_complex(t.float().unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * angles).flatten(3).to(t.dtype)

    q = rotate(attention.wq(x).view(B, T, -1, D)).transpose(1, 2)
    k = rotate(attention.wk(x).view(B, T, -1, D)).transpose(1, 2)
    v = attention.wv(x).view(B, T, -1, D).transpose(1, 2)
    k, v = (t.repeat_interleave(attention.heads // attention.kv_heads, 1) for t in (k, v))
    scores = (q @ k.transpose(2, 3)).float() / D**0.5 + mask
    return attention.wo((scores.softmax(-1).to(v.dtype) @ v).transpose(1, 2).reshape(B, T, d))


class Bench:
    def __init__(self, cfg, rt):
        self.cfg, self.rt, self.cuda = cfg, rt, rt.device.type == "cuda"
        self.dense_cfg = show.dense(cfg)
        self.model = tgs.build_model(cfg, rt)
        for router in self.model.masks:
            torch.nn.init.zeros_(router.linear.weight)
        self.forced = self.model.masks[0] = ForcedRouter(self.model.masks[0])
        self.parallel = self.model if rt.world == 1 else torch.nn.parallel.DistributedDataParallel(
            self.model, gradient_as_bucket_view=True)
        self.control = tgs.GateControl(cfg, rt.device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.0, fused=True)
        self.generator = torch.Generator().manual_seed(0)
        shape = (cfg.device_batch_size, cfg.max_seq_len + 1)
        tokens = torch.randint(cfg.vocab_size, shape, generator=self.generator).to(rt.device)
        self.x, self.y = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def skip(self, sparsity, n):
        """A random choice of exactly that share of n tokens."""
        order = torch.randperm(n, generator=self.generator)
        return (order < round(sparsity * n)).float().to(self.rt.device)

    def use(self, variant, sparsity):
        self.model.cfg = self.cfg if variant == "gated" else self.dense_cfg
        self.forced.skip = self.skip(sparsity or 0.0, self.x.numel())

    def train(self, variant, sparsity):
        """Forward, backward and AdamW: FLOPs of the forward pass."""
        with self.rt.autocast():
            if variant == "eager":
                loss, stats = eager_forward(self.model, self.x, self.y), None
            else:
                loss, stats = self.parallel(self.x, self.y)
                if variant == "gated":
                    loss = loss + self.control.loss(tgs.moments(stats, self.x.numel()))
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return stats

    @torch.no_grad()
    def prefill(self, variant, sparsity):
        """A batch of prompts of T tokens into an empty cache, logits of the last token of each."""
        with self.rt.autocast():
            if variant == "eager":
                eager_forward(self.model, self.x, None)
                return None
            decoder = sample.Decoder(self.model, len(self.x))
            decoder.append(dict(enumerate(self.rows)))
            return decoder

    @torch.no_grad()
    def decode(self, decoder, skips):
        with self.rt.autocast():
            for skip in skips:
                self.forced.skip = skip
                decoder.append({b: [1] for b in range(len(decoder.lengths))})


# ---- measuring --------------------------------------------------------------------------------------------

def clock(rt, run):
    rt.synchronize()
    start = time.perf_counter()
    result = run()
    rt.synchronize()
    return time.perf_counter() - start, result


def reset_peak(rt):
    """Start the peak of the CUDA allocator, or (Linux) of the process's resident memory, anew."""
    if rt.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(rt):
    """Bytes since reset_peak. (getrusage's peak never falls; Linux tells the one that was reset.)"""
    if rt.device.type == "cuda" or sys.platform != "linux":
        return show.peak_memory(rt)
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


class Products:
    """The matrix products of a training step alone, on the model's shapes and preallocated results: the
    machine's own rate, measured in turn with the variants that are held against it."""

    def __init__(self, cfg, rt):
        n, d, m = cfg.device_batch_size * cfg.max_seq_len, cfg.dim, cfg.hidden_dim
        kv, L = cfg.n_kv_heads * cfg.head_dim, cfg.n_layers
        self.work, self.seconds, self.flops = [], [], 0
        for a, b, times in ((d, d, 2 * L), (d, kv, 2 * L), (d, m, 2 * L), (m, d, L), (d, cfg.vocab_size, 1)):
            x, w, y = (torch.randn(s, device=rt.device, dtype=rt.dtype) for s in ((n, a), (b, a), (n, b)))
            self.work += [(x, w, y, torch.empty_like(x), torch.empty_like(w))] * times
            self.flops += times * 6 * n * a * b

    def run(self):
        for x, w, y, dx, dw in self.work:
            torch.mm(x, w.t(), out=y)
            torch.mm(y, w, out=dx)
            torch.mm(y.t(), x, out=dw)

    def time(self, rt):
        self.seconds.append(clock(rt, self.run)[0])

    @property
    def rate(self):
        """FLOP/s."""
        return self.flops / median(self.seconds)


def measure_batches(bench, mode, rounds, report, products):
    """Rows of training steps or prefills: eager, dense, and gated at every sparsity, in turn."""
    cfg, rt = bench.cfg, bench.rt
    bench.rows = bench.x.tolist()
    variants = [("eager", None), ("dense", None)] + [("gated", s) for s in SPARSITIES]
    seconds, flops, peak = {v: [] for v in variants}, {}, {}
    n, heads = bench.x.numel(), len(bench.x) if mode == "prefill" else None
    # warm up and compile; then once more, for the peak: its reset also gives freed memory back
    for v in variants:
        bench.use(*v)
        getattr(bench, mode)(*v)
        reset_peak(rt)
        getattr(bench, mode)(*v)
        peak[v] = peak_memory(rt)
        with torch.no_grad(), rt.autocast():
            flops[v] = tgs.realised_flops(bench.model.cfg, bench.model(bench.x, bench.y)[1], n, heads)
    for _ in range(rounds):
        products.time(rt)
        for v in variants:
            bench.use(*v)
            seconds[v].append(clock(rt, lambda: getattr(bench, mode)(*v))[0])
    scale = 3 if mode == "train" else 1
    for v in variants:
        report.row(mode, *v, cfg.device_batch_size, n, median(seconds[v]), scale * flops[v] / n, peak[v])


def measure_decoding(bench, batch, rounds, report, products):
    """Rows of decoding after a context of T / 2 tokens: seconds of a step, one token a sequence."""
    cfg, rt = bench.cfg, bench.rt
    context = cfg.max_seq_len // 2
    variants = [("dense", None)] + [("gated", s) for s in SPARSITIES]
    seconds, flops, peak = {v: [] for v in variants}, {}, {}
    for i in range(rounds + 1):
        products.time(rt)
        for v in variants:
            bench.use(*v)
            decoder = sample.Decoder(bench.model, batch)
            bench.forced.skip = bench.skip(v[1] or 0.0, batch * context)
            with rt.autocast():
                decoder.append({b: [1] * context for b in range(batch)})
            skips = list(bench.skip(v[1] or 0.0, batch * DECODE_STEPS).view(DECODE_STEPS, batch))
            held = decoder.bytes()
            t, _ = clock(rt, lambda: bench.decode(decoder, skips))
            # of a row, at the end
            keys = sum(int(c.counts.sum()) for c in decoder.cache) / cfg.n_layers / batch
            active = 1 - (v[1] or 0.0)
            stats = [[1, 1, active, active * (keys - active * DECODE_STEPS / 2)]] * cfg.n_levels
            flops[v] = tgs.realised_flops(bench.model.cfg, stats, 1)
            seconds[v] += [t / DECODE_STEPS] if i else []
            peak[v] = held
    for v in variants:
        report.row("decode", *v, batch, batch, median(seconds[v]), flops[v], peak[v])


# ---- growth -----------------------------------------------------------------------------------------------

GROWTH_TOKENS = 4096  # of every step
GROWTH_BASE = dict(dim=128, n_layers=6, n_heads=2, vocab_size=1024, max_seq_len=256)
GROWTH = {  # what grows, and its sizes
    "T": [dict(max_seq_len=T) for T in (256, 512, 1024, 2048, 4096)],
    "L": [dict(n_layers=L) for L in (6, 12, 24, 48)],
    "d": [dict(dim=d, n_heads=d // 64) for d in (128, 256, 384, 512)],
    "processes": [dict(processes=P) for P in (1, 2)],
}


def growth_step(rank, world, cfg, port, threads, rounds, queue):
    """A process of a run of `world`: seconds of a step in which no token and in which half of them skip, and
    the FLOPs of each, all processes together."""
    os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1",
                       MASTER_PORT=str(port))
    torch.set_num_threads(threads)
    bench = Bench(cfg, rt := tgs.Runtime(cfg))
    variants, out = (("dense", None) if world == 1 else ("gated", 0.0), ("gated", 0.5)), []
    seconds = {v: [] for v in variants}
    for i in range(rounds + 2):  # the first compile and warm up
        for v in variants:
            bench.use(*v)
            t, _ = clock(rt, lambda: bench.train(*v))
            seconds[v] += [t] if i > 1 else []
    for v in variants:
        bench.use(*v)
        with torch.no_grad():
            stats = bench.model(bench.x, bench.y)[1]
        flops = tgs.realised_flops(bench.model.cfg, stats, bench.x.numel())
        out.append((median(seconds[v]), 3 * world * flops))
    if rank == 0:
        queue.put(out)
    if world > 1:
        torch.distributed.destroy_process_group()


def measure_growth(base, rounds):
    """Rows (what grows, size, variant, seconds and FLOPs a token, time over what FLOPs predict) at a constant
    number of tokens a step. The prediction starts from a row's first size; P processes do P times the work in
    the same time, each with a P-th of the threads that two processes have in all."""
    import torch.multiprocessing as mp
    rows, spawn = [], mp.get_context("spawn")
    for name, sizes in GROWTH.items():
        first = None
        for size in sizes:
            world = size.get("processes", 1)
            settings = base | {k: v for k, v in size.items() if k != "processes"}
            batch = GROWTH_TOKENS // settings["max_seq_len"]
            cfg = tgs.Config(**settings | dict(batch_size=batch, device_batch_size=batch // world))
            with socket.socket() as s:
                s.bind(("127.0.0.1", 0))
                port = s.getsockname()[1]
            queue, threads = spawn.Queue(), 1 if name == "processes" else torch.get_num_threads()
            workers = [spawn.Process(target=growth_step, args=(r, world, cfg, port, threads, rounds, queue))
                       for r in range(world)]
            for w in workers:
                w.start()
            for w in workers:
                w.join()
                if w.exitcode:
                    raise tgs.UserError(f"a process of --growth ended with status {w.exitcode}; see above")
            out = queue.get()
            first = first or [world * t / f for t, f in out]
            for variant, (seconds, flops), rate in zip(("dense", "gated 50%"), out, first):
                rows.append(dict(
                    grows=name, size=next(iter(size.values())), variant=variant,
                    seconds_per_token=seconds / GROWTH_TOKENS, flops_per_token=flops / GROWTH_TOKENS,
                    over_flops=seconds * world / flops / rate))
                print(growth_line(rows[-1]), flush=True)
    return rows


def growth_line(r):
    return (f"{r['grows']:10s}{r['size']:6d}  {r['variant']:10s}{1e6 * r['seconds_per_token']:9.1f} us and "
            f"{r['flops_per_token'] / 1e6:7.1f} MFLOP a token: {r['over_flops']:5.2f} of what FLOPs predict")


def profile(bench, variant, sparsity):
    """One training step: its seconds, and the profiler's events."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    bench.use(variant, sparsity)
    bench.train(variant, sparsity)
    with torch.profiler.profile(activities=activities[:1 + bench.cuda], with_flops=True) as record:
        wall, _ = clock(bench.rt, lambda: bench.train(variant, sparsity))
    return wall, record.key_averages()


def by_kernel(events, cuda):
    """Calls, seconds and FLOPs by name. Compiled element-wise kernels, whose names differ between variants,
    count as one."""
    kernels = {}
    for e in events:
        if e.device_type != torch.autograd.DeviceType.CPU:
            continue  # counted with the operator that launched it
        name = "compiled kernels" if re.match("## Call CompiledFxGraph|triton_", e.key) else e.key
        seconds = 1e-6 * (e.self_device_time_total if cuda else e.self_cpu_time_total)
        kernels[name] = tuple(map(sum, zip(kernels.get(name, (0, 0.0, 0)), (e.count, seconds, e.flops))))
    return kernels


def slowest_kernels(bench, rate, flops_speedup, sparsity=0.75, top=12):
    """What the time of a gated training step goes to: the kernels that take most of it, their share, what
    they take beyond the dense step's over the FLOPs' speed-up (what keeps the step from its full gain), and
    for matrix products their part of the machine's own rate. With it, on a GPU, how often and how long the
    host waits, and the share of the step that the device stands idle."""
    dense = by_kernel(profile(bench, "dense", None)[1], bench.cuda)
    wall, events = profile(bench, "gated", sparsity)
    kernels = by_kernel(events, bench.cuda)
    total = sum(t for _, t, _ in kernels.values()) or 1.0
    waits = [e for e in events if "StreamSynchronize" in e.key]
    host = {"waits": sum(e.count for e in waits),
            "milliseconds": 1e-3 * sum(e.self_cpu_time_total for e in waits),
            "device_idle": max(0.0, 1 - total / wall)} if bench.cuda else None
    return host, [{"kernel": name, "calls": n, "milliseconds": 1e3 * t, "share": t / total,
                   "excess_milliseconds": 1e3 * (t - dense.get(name, (0, 0.0))[1] / flops_speedup),
                   "of_matmul_rate": flops / t / rate if flops and t else None}
                  for name, (n, t, flops) in sorted(kernels.items(), key=lambda k: -k[1][1])[:top]]


def kernel_line(k):
    rate = "" if k["of_matmul_rate"] is None else f"  {k['of_matmul_rate']:.2f} of the products' rate"
    return (f"{k['share']:6.1%}{k['milliseconds']:9.2f} ms, excess {k['excess_milliseconds']:7.2f} ms "
            f"{k['calls']:5d} x {k['kernel'][:50]}{rate}")


# What may carry ln g_j to the logits of Eq. 3. attend(q, k, v, bias, scale), heads first: bias (n,) is added
# to the logits of key j. The results are the same; what they cost, and what bfloat16 leaves of ln g, is not.

def carry_bias(attend, q, k, v, ln_g):
    """A captured tensor; its gradient is summed by atomic adds."""
    return attend(q, k, v, ln_g, q.shape[-1]**-0.5)


def carry_key_columns(attend, q, k, v, ln_g):
    """Further columns of q and k: the script's own."""
    q, k = (t.transpose(0, 1) for t in tgs.carried(q.transpose(0, 1), k.transpose(0, 1), ln_g))
    return attend(q, k, v, None, v.shape[-1]**-0.5)


def carry_value_column(attend, q, k, v, ln_g):
    """Values [g v, g] under ungated weights, and the quotient."""
    g = ln_g.exp().to(v.dtype)[:, None].expand(*v.shape[:-1], 1)
    y = attend(q, k, F.pad(torch.cat((g * v, g), -1), (0, 15)), None, q.shape[-1]**-0.5)
    D = v.shape[-1]
    return y[..., :D] / y[..., D:D + 1]


def measure_carriers(bench, rounds):
    """Seconds of FlexAttention, forward and backward, on a batch half of whose tokens skip, by what carries
    ln g."""
    cfg, rt = bench.cfg, bench.rt
    seq = torch.arange(cfg.device_batch_size, device=rt.device).repeat_interleave(cfg.max_seq_len // 2)
    seq = tgs.padded(seq, tgs.padded_rows(len(seq), True), cfg.device_batch_size)
    mask, shape = tgs.block_mask(*tgs.mask_tables(seq)), (cfg.n_heads, len(seq), cfg.head_dim)
    q, k, v = (torch.randn(shape, device=rt.device, dtype=rt.dtype, requires_grad=True) for _ in range(3))
    ln_g = torch.rand(len(seq), device=rt.device).clamp(min=1e-6).log().requires_grad_()
    torch._dynamo.reset()  # the model's graphs count towards the same limit; beyond it Flex would run eagerly
    flex = torch.compile(tgs.flex_attention, dynamic=True)

    def attend(q, k, v, bias, scale):
        score_mod = None if bias is None else lambda score, b, h, i, j: score + bias[j]
        return flex(q[None], k[None], v[None], score_mod=score_mod, block_mask=mask, scale=scale,
                    kernel_options=tgs.flex_options(q.shape[-1], q.dtype))[0]

    def run(carry):
        carry(attend, q, k, v, ln_g).float().square().mean().backward()

    seconds = {carry: [] for carry in (carry_bias, carry_key_columns, carry_value_column)}
    for i in range(rounds + 3):
        for carry in seconds:
            t, _ = clock(rt, lambda: run(carry))
            seconds[carry] += [t] if i > 2 else []
    return {carry.__name__: median(t) for carry, t in seconds.items()}


def gpu_tests():
    """What pytest says of the tests that need a GPU, in its last line."""
    import subprocess
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "test_skip.py", "-k", "gpu"], cwd=tgs.ROOT,
                          capture_output=True, text=True)
    return (done.stdout.strip() or done.stderr.strip()).splitlines()[-1]


def beside_estimates(cfg, rows, name=None):
    """A line for each training row: its measured time beside plan.py's estimate for this GPU."""
    name = name or torch.cuda.get_device_name()
    sheet = next((known for known in plan.DEVICES if known in name), "H100")
    yield f"training step of one micro-batch, ms: measured here ({name}), and estimated by plan.py ({sheet})"
    for r in rows:
        if r["mode"] == "train" and r["variant"] != "eager":
            side = show.dense(cfg) if r["variant"] == "dense" else cfg
            estimate = plan.micro_batch(side, r["sparsity"] or 0.0, sheet)
            estimate["update"] = plan.step(side, r["sparsity"] or 0.0, sheet, 1, 1)["update"]
            total = estimate.pop("total") + estimate["update"]
            parts = ", ".join(f"{k} {1e3 * v:.1f}" for k, v in estimate.items() if v)
            yield (f"{r['variant']:6s}" + ("" if r["sparsity"] is None else f" {r['sparsity']:.0%}")
                   + f": measured {1e3 * r['seconds']:.1f}, estimated {1e3 * total:.1f} ({parts})")


class Report:
    COLUMNS = ("mode", "variant", "sparsity", "batch", "seconds", "tokens_per_s", "flops_per_token",
               "speedup", "flops_speedup", "efficiency", "mfu", "peak_bytes")

    def __init__(self):
        self.rows = []

    def row(self, mode, variant, sparsity, batch, tokens, seconds, flops, peak):
        self.rows.append(dict(mode=mode, variant=variant, sparsity=sparsity, batch=batch, seconds=seconds,
                              tokens_per_s=tokens / seconds, flops_per_token=flops, peak_bytes=peak))

    def compare(self, rate):
        for row in self.rows:
            row["mfu"] = row["tokens_per_s"] * row["flops_per_token"] / rate
            dense = next(r for r in self.rows if r["variant"] == "dense"
                         and (r["mode"], r["batch"]) == (row["mode"], row["batch"]))
            row["speedup"] = dense["seconds"] / row["seconds"]
            row["flops_speedup"] = dense["flops_per_token"] / row["flops_per_token"]
            row["efficiency"] = row["speedup"] / row["flops_speedup"]

    def text(self):
        heads = ("mode", "variant", "sparsity", "batch", "ms", "tokens/s", "speed-up", "of FLOPs",
                 "efficiency", "MFU", "MiB")
        lines = ["{:8s}{:9s}{:>9s}{:>7s}{:>10s}{:>11s}{:>10s}{:>10s}{:>12s}{:>7s}{:>8s}".format(*heads)]
        for r in self.rows:
            sparsity = "" if r["sparsity"] is None else f"{r['sparsity']:.2f}"
            lines.append(f"{r['mode']:8s}{r['variant']:9s}{sparsity:>9s}{r['batch']:7d}"
                         f"{1e3 * r['seconds']:10.2f}{r['tokens_per_s']:11.0f}{r['speedup']:10.2f}"
                         f"{r['flops_speedup']:10.2f}{r['efficiency']:12.2f}{r['mfu']:7.2f}"
                         f"{r['peak_bytes'] / 2**20:8.0f}")
        return "\n".join(lines)


def measure(args, cfg, rt):
    """Run what the command line asks for, print it, and write the record."""
    bench, report, products = Bench(cfg, rt), Report(), Products(cfg, rt)
    products.run()
    for mode in args.modes:
        if mode == "decode":
            for batch in args.decode_batches or ((1, 64) if bench.cuda else (1, 128)):
                measure_decoding(bench, batch, args.rounds, report, products)
        else:
            measure_batches(bench, mode, args.rounds, report, products)
    report.compare(products.rate)
    print(f"matrix products alone: {products.rate / 1e9:.1f} GFLOP/s in {str(rt.dtype).split('.')[1]}")
    print(report.text())
    host, kernels = None, []
    if "train" in args.modes:
        sparsest = next(r for r in report.rows if (r["mode"], r["sparsity"]) == ("train", SPARSITIES[-1]))
        host, kernels = slowest_kernels(bench, products.rate, sparsest["flops_speedup"], SPARSITIES[-1])
        print("of a training step at 75% sparsity (excess: beyond the dense step's over the FLOPs' speed-up)")
        print(*map(kernel_line, kernels), sep="\n")
    rows = [{k: r[k] for k in Report.COLUMNS} for r in report.rows]
    save = write_record(cfg, rt, matmul_flops_per_s=products.rate, rows=rows, host=host, kernels=kernels,
                        gpu_tests=None, carriers=None)
    if args.gpu_report:  # what was measured before is kept, should these fail
        print(*beside_estimates(cfg, report.rows), sep="\n")
        tests = gpu_tests()
        save(gpu_tests=tests)
        carriers = measure_carriers(bench, args.rounds)
        save(gpu_tests=tests, carriers=carriers)
        print(f"host: {host}\nln g carried by, seconds: {carriers}\n{tests}")


def write_record(cfg, rt, **content):
    """A new record; returns what writes it again, with more in it."""
    env, folder = tgs.environment(rt, {}), tgs.make_folder(Path(cfg.records_dir), cfg.name)
    head = {"device": env["device"], "dtype": env["dtype"], "config": dataclasses.asdict(cfg), "env": env}

    def save(**more):
        text = json.dumps(head | content | more, indent=1) + "\n"
        tgs.write_atomically(folder / "bench.json", lambda f: f.write(text.encode()))

    save()
    print(f"record: {folder}")
    return save


def main(argv=None):
    parser = tgs.Parser(prog="bench.py", description=__doc__, allow_abbrev=False,
                        formatter_class=argparse.RawDescriptionHelpFormatter)
    modes = ("train", "prefill", "decode")
    parser.add_argument("--modes", nargs="+", choices=modes, default=modes)
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each variant (default: 5)")
    parser.add_argument("--gpu_report", action="store_true", help="also run the tests that need a GPU")
    parser.add_argument("--decode_batches", type=int, nargs="+", default=None,
                        help="(default: 1 128, on a GPU 1 64)")
    parser.add_argument("--growth", action="store_true",
                        help="only this: how a token's time grows with T, L, width and processes, on the CPU")

    def run():
        args, explicit = tgs.parse_settings(parser, argv)
        cuda = torch.cuda.is_available() and explicit.get("device") != "cpu"
        size = dict(batch_size=32) if cuda else CPU_SIZE
        size = GROWTH_BASE | dict(batch_size=1, device_batch_size=1, device="cpu") if args.growth else size
        size = size | dict(batch_size=explicit.get("device_batch_size", size["batch_size"]))
        cfg = tgs.Config(**(size | dict(name="bench", compile=True) | explicit))
        if unused := [k for k in ("preset", "config", "init_from", "resume") if k in explicit]:
            raise tgs.UserError(f"--{unused[0]} is not for the benchmark: give sizes as flags")
        if not cfg.gated or args.rounds < 1:
            raise tgs.UserError("the benchmark needs a --control with routers, and --rounds of at least 1")
        if args.gpu_report and not cuda:
            raise tgs.UserError("--gpu_report needs a GPU: leave it out")
        if args.growth:
            rows = measure_growth(size | dict(compile=True) | explicit, args.rounds)
            write_record(cfg, tgs.Runtime(cfg), growth=rows)
        else:
            measure(args, cfg, tgs.Runtime(cfg))
        return 0

    return tgs.exit_status(run)


if __name__ == "__main__":
    sys.exit(main())
