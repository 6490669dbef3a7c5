"""Time this machine: a training step, a prefill and decoding, plain, dense and gated at several sparsities.

    ./run.sh bench                      # the CPU's size: 12 blocks, d 384; Table 2's on a GPU
    ./run.sh bench --dtype bfloat16
    ./run.sh bench --modes train --rounds 9 --dim 768
    ./run.sh bench --gpu_report         # and, on a GPU, all that nobody has seen on one yet

Variants alternate within one process and rows are medians, so that ratios hold on a machine whose speed
drifts. `eager` is plain PyTorch, how the released code runs: separate projections, a materialised (B, 1, T,
T) mask, float32 softmax by hand, full logits. `gated` skips a given share of the tokens at the first router,
so sparsity is exact. FLOPs are those that are run; MFU is their share of the rate of a block's matrix
products alone, measured in turn with them. Speed-up is against `dense`; efficiency is the measured speed-up
over the FLOPs' own. Writes records_dir/..._bench/bench.json.
"""
import dataclasses
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F

import sample
import tool
from tool import UserError, between, dense, tgs

CPU_SIZE = dict(dim=384, n_layers=12, n_heads=6, vocab_size=4096, max_seq_len=512, device_batch_size=4)
MODES = "train", "prefill", "decode"
GATED = [("gated", s) for s in (0.0, 0.25, 0.5, 0.75)]
DECODE_BATCHES = 1, 128
DECODE_STEPS = 16


# ---- the variants -----------------------------------------------------------------------------------------

def eager_loss(model, tokens):
    """The gated model as plain PyTorch computes it: every token, all pairs, in rectangles."""
    B, T = tokens.shape
    mask = torch.full((B, 1, T, T), -torch.inf, device=tokens.device).triu(1)
    angles = model.cos.repeat(B, 1), model.sin.repeat(B, 1)
    h = model.input_norm(model.tok_embeddings(tokens.flatten()))
    for block in model.layers:
        qkv = block.before(h, None, *angles, False)[:3]
        q, k, v = (t.unflatten(0, (B, T)).transpose(1, 2) for t in qkv)  # (B, heads, T, head_dim)
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
        p = ((q @ k.mT).float() / q.shape[-1]**0.5 + mask).softmax(-1)
        h = block.after(h, None, (p.to(v.dtype) @ v).transpose(1, 2).flatten(0, 1))
    return F.cross_entropy(model.output(model.output_norm(h)).float(), tokens.flatten())


class Bench:
    """A model of random weights whose first router is told what skips, and a batch of random tokens."""

    def __init__(self, cfg, rt):
        self.cfg, self.rt = cfg, rt
        self.model = tgs.build_model(cfg, rt)
        for router in self.model.masks:
            router.linear.weight.data.zero_()
        self.real_gates, self.model.gates = self.model.gates, self.gates
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.0, fused=True)
        self.x = torch.randint(cfg.vocab_size, (cfg.device_batch_size, cfg.max_seq_len), device=rt.device)
        self.prompts = dict(enumerate(self.x.tolist()))
        self.weights = [p.detach().to(rt.dtype) for p in self.model.layers[0].parameters() if p.ndim == 2]
        self.rates = []  # FLOP/s of a block's matrix products alone

    def gates(self, h, S, l, layout):
        """The first router at its full cost, with an answer that is given: skipped[i] of the i-th token."""
        S, g = self.real_gates(h, S, l, layout)
        if l == 0 and g is not None:
            S = S + F.pad(2.0 * self.skipped, (0, len(S) - len(self.skipped)))
            g = F.relu(1 - S)
        return S, g

    def skip(self, sparsity, n):
        """A random choice of exactly that share of n tokens."""
        return (torch.randperm(n) < round(sparsity * n)).float().to(self.rt.device)

    def use(self, variant, sparsity):
        self.model.cfg = self.cfg if variant == "gated" else dense(self.cfg)
        self.skipped = self.skip(sparsity, self.x.numel())

    def train(self, variant):
        """Forward, backward and AdamW."""
        with self.rt.autocast():
            if variant == "eager":
                loss = eager_loss(self.model, self.x)
            else:
                loss, stats = self.model(self.x, self.x)
                loss = loss + stats[:, :2].sum()  # as a gate loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def prefill(self, variant):
        """A batch of prompts of T tokens into an empty cache, logits of the last token of each."""
        with self.rt.autocast():
            if variant == "eager":
                eager_loss(self.model, self.x)
            else:
                sample.Decoder(self.model, len(self.x)).append(self.prompts)

    def time_products(self):
        n = self.x.numel()
        inputs = [w.new_ones(n, w.shape[1]) for w in self.weights]
        seconds = clock(self.rt, lambda: [x @ w.T for x, w in zip(inputs, self.weights)])
        self.rates.append(2 * n * sum(w.numel() for w in self.weights) / seconds)

    def row(self, mode, variant, sparsity, batch, seconds, tokens, seen):
        """A row of bench.json: of a pass in which each of `tokens` sees `seen` others, unless they skip."""
        cfg, active = self.model.cfg, 1 - sparsity
        stats = [[0, 0, active * tokens, active * tokens * (1 + active * seen)]] * cfg.n_levels
        heads = tokens if mode == "train" else batch  # tokens whose logits are computed
        unseen = 2 * (tokens - heads) * cfg.dim * cfg.vocab_size
        flops = (tgs.realised_flops(cfg, stats, tokens) - unseen) / tokens
        return {"mode": mode, "variant": variant, "sparsity": sparsity,
                "batch": batch, "seconds": seconds, "tokens_per_s": tokens / seconds,
                "flops_per_token": 3 * flops if mode == "train" else flops,
                "peak_bytes": torch.cuda.max_memory_allocated()}  # (0 on a CPU)


# ---- measuring --------------------------------------------------------------------------------------------

def clock(rt, run):
    """Seconds."""
    synchronize = torch.cuda.synchronize if rt.cuda else int
    synchronize()
    start = time.perf_counter()
    run()
    synchronize()
    return time.perf_counter() - start


def in_turn(bench, rounds, variants, prepare):
    """Each variant, in use, and its median seconds; prepare(*variant) gives what is timed."""
    seconds = {v: [] for v in variants}
    for _ in range(rounds + 1):
        bench.time_products()
        for v in variants:
            bench.use(*v)
            seconds[v].append(clock(bench.rt, prepare(*v)))
    for v in variants:
        bench.use(*v)
        yield v, median(seconds[v][1:])  # (the first warms up)


def measure_batches(bench, mode, rounds):
    """Rows of training steps or prefills: eager, dense, and gated at every sparsity, in turn."""
    B, T = bench.x.shape
    variants = [("eager", 0.0), ("dense", 0.0), *GATED]
    for v, seconds in in_turn(bench, rounds, variants, lambda *v: lambda: getattr(bench, mode)(v[0])):
        yield bench.row(mode, *v, B, seconds, B * T, (T - 1) / 2)


def measure_decoding(bench, batch, rounds):
    """Rows of decoding after a context of T / 2 tokens: seconds of a step, one token a sequence."""
    context = bench.cfg.max_seq_len // 2

    def prepare(*v):
        decoder = sample.Decoder(bench.model, batch)
        append(decoder, context, [bench.skip(v[1], batch * context)])
        skips = bench.skip(v[1], batch * DECODE_STEPS).view(DECODE_STEPS, batch)
        return lambda: append(decoder, 1, skips)

    def append(decoder, n, skips):
        for bench.skipped in skips:
            with bench.rt.autocast():
                decoder.append(dict.fromkeys(range(batch), [1] * n))

    seen = context + (DECODE_STEPS - 1) / 2
    for v, seconds in in_turn(bench, rounds, [("dense", 0.0), *GATED], prepare):
        yield bench.row("decode", *v, batch, seconds / DECODE_STEPS, batch, seen)


def compare(rows, rate):
    """Add to each row what it is against the dense one, and against the machine's own rate."""
    against = {(r["mode"], r["batch"]): r for r in rows if r["variant"] == "dense"}
    for r in rows:
        side = against[r["mode"], r["batch"]]
        r["speedup"] = side["seconds"] / r["seconds"]
        r["flops_speedup"] = side["flops_per_token"] / r["flops_per_token"]
        r["efficiency"] = r["speedup"] / r["flops_speedup"]
        r["mfu"] = r["tokens_per_s"] * r["flops_per_token"] / rate


def table(rows):
    yield "mode    variant   sparsity  batch        ms   tokens/s    MFU  speed-up  of FLOPs  efficiency"
    for r in rows:
        yield (f"{r['mode']:8s}{r['variant']:9s}{r['sparsity']:9.2f}{r['batch']:7d}{1e3 * r['seconds']:10.2f}"
               f"{r['tokens_per_s']:11.0f}{r['mfu']:7.2f}{r['speedup']:10.2f}{r['flops_speedup']:10.2f}"
               f"{r['efficiency']:12.2f}")


# ---- what is asked of a GPU -------------------------------------------------------------------------------

def host_waits(bench):
    """How often the host waits for the device in a training step at the highest sparsity, and seconds."""
    bench.use(*GATED[-1])
    with torch.profiler.profile() as record:
        clock(bench.rt, lambda: bench.train("gated"))
    waits = [e for e in record.key_averages() if "StreamSynchronize" in e.key]
    return sum(e.count for e in waits), 1e-6 * sum(e.self_cpu_time_total for e in waits)


def gpu_tests(bench):
    """What the tests that need a GPU say, in their last line."""
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "test_skip.py", "-k", "gpu"], cwd=tgs.ROOT,
                          capture_output=True, text=True)
    return (done.stdout + done.stderr).splitlines()[-1]


# ---- command line -----------------------------------------------------------------------------------------

OPTIONS = {
    "modes": dict(nargs="+", choices=MODES, default=MODES, help="(default: all)"),
    "rounds": dict(type=between(int, 1, 1000), default=5, help="of measurements (default: 5)"),
    "gpu_report": dict(action="store_true", help="also: waits for the host, and the tests that need a GPU"),
}
FIELDS = [*tgs.SIZES, "norm", "device_batch_size", "device", "dtype", "compile", "records_dir"]


def run(args, explicit):
    cuda = torch.cuda.is_available() and explicit.get("device") != "cpu"
    cfg = tgs.Config(**({} if cuda else CPU_SIZE) | {"compile": True} | explicit)
    cfg.batch_size = cfg.device_batch_size
    if args.gpu_report and not cuda:
        raise UserError("--gpu_report needs a GPU: leave it out")
    bench, rows = Bench(cfg, tgs.Runtime(cfg)), []
    for mode in args.modes:
        if mode == "decode":
            for batch in DECODE_BATCHES:
                rows += measure_decoding(bench, batch, args.rounds)
        else:
            rows += measure_batches(bench, mode, args.rounds)
    rate = median(bench.rates)
    compare(rows, rate)
    env = tgs.environment(bench.rt, {})
    content = {"device": env["device"], "dtype": env["dtype"], "config": dataclasses.asdict(cfg), "env": env,
               "matmul_flops_per_s": rate, "rows": rows}
    path = tgs.make_folder(Path(cfg.records_dir), "bench") / "bench.json"
    tool.write_json(path, content)
    print(*table(rows), sep="\n")
    if args.gpu_report:  # what was measured is kept, should one of these fail
        for ask in host_waits, gpu_tests:
            content[ask.__name__] = ask(bench)
            tool.write_json(path, content)
            print(f"{ask.__name__}: {content[ask.__name__]}")
    print(f"record: {path.parent}")


main = tool.command(__name__, run, __doc__, OPTIONS, FIELDS)
