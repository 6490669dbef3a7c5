"""Show one run: its plot, and what it came to. The trainer starts this beside a run at each validation, and
at its end; it reads the record alone, and needs neither torch nor the trainer.

    ./run.sh show records/X                         # what a live or packed run came to, and what to do next
    ./run.sh show records/X --plot                  # draw records/X/plot.png
    ./run.sh show records/frontier/NAME --plot      # of a packed run: records/frontier/NAME.png
"""
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import archive  # noqa: E402

WITHOUT_TARGET = "dense", "none", "sparsity", "sparsity_variance"


def estimated_flops(config, sparsity: float = 0.0) -> float:
    """The released code's count for one sequence, for Figure 2: full T x T attention, norms and activations
    included, blocks times (1 - sparsity), where sparsity is the mean share of gates that are 0. Of a Config
    or a record's config."""
    c = config if isinstance(config, dict) else vars(config)
    T, d, H, Hkv, L = c["max_seq_len"], c["dim"], c["n_heads"], c["n_kv_heads"], c["n_layers"]
    D, m, routers = d // H, int(c["ffn_dim_multiplier"] * d), archive.n_routers(c)
    sqrt, exp = 8, 10
    norm = T * (4 * d + 2 + sqrt)
    rotary = 6 * T * (H + Hkv) * D // 2
    projections = 2 * T * d * (2 * d + 2 * Hkv * D)
    scores = 4 * T * T * d + H * T * T * (2 + exp + 2)  # two products; scale, mask, softmax
    ffn = 6 * T * d * m + T * m * (exp + 4 + 1)  # three products; SiLU, gating
    block = projections + rotary + scores + ffn + (4 if c["norm"] == "sandwich" else 2) * norm + 4 * T * d
    masks = L * T * d + (routers - 1) * T if routers else 0
    return 2 * norm + masks + (1 - sparsity) * L * block + 2 * T * d * c["vocab_size"]


def targets(c: dict) -> list[float]:
    """Of the mean gate of each level; none where the control has none."""
    start, end, levels = c["mean_target_start"], c["mean_target_end"], c["n_layers"] // 2
    if c["control"] in WITHOUT_TARGET:
        return []
    return [start + (end - start) * level / max(levels - 1, 1) for level in range(levels)]


def plot(run: dict, curve: dict, path: Path):
    """Loss, mean gates and coefficients over steps, as one picture."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    gated = "gate_mean" in curve
    fig, axes = plt.subplots(1, 3 if gated else 1, figsize=(15 if gated else 6, 4.2), squeeze=False)
    loss, *panels = axes[0]
    loss.plot(curve["step"], curve["cross_entropy"], color="0.7", lw=1, label="training")
    loss.plot([v["step"] for v in run["validations"]], [v["cross_entropy"] for v in run["validations"]], "o-",
              ms=3, color="C3", label="validation")
    loss.set(title="Loss", ylabel="cross-entropy (nats a token)")
    loss.legend(frameon=False)
    if gated:
        (gates, coefs), L = panels, run["config"]["n_layers"]
        colors, aims = plt.cm.viridis([1.7 * l / L + 0.05 for l in range(L // 2)]), targets(run["config"])
        gates.set_prop_cycle(color=colors)
        coefs.set_prop_cycle(color=colors)
        blocks = [f"{l} and {L - 1 - l}" for l in range(L // 2)]
        gates.plot(curve["step"], curve["gate_mean"], lw=1.2, label=blocks)
        gates.hlines(aims, 0, 1, colors[:len(aims)], ":", lw=0.8, transform=gates.get_yaxis_transform())
        coefs.plot(curve["step"], curve["mean_coef"], lw=1.2)
        coefs.plot(curve["step"], curve["var_coef"], "--", lw=1.2)
        gates.set(title="Mean gate (dotted: its target)" if aims else "Mean gate", ylim=(-0.02, 1.02))
        coefs.set(title="Coefficients (solid: mean, dashed: variance)", ylabel="alpha, beta")
        coefs.legend(handles=gates.lines, title="blocks", loc="center left", bbox_to_anchor=(1, 0.5),
                     frameon=False)
    for ax in axes[0]:
        ax.set_xlabel("step")
        ax.spines[["top", "right"]].set_visible(False)
    fig.tight_layout()
    fig.savefig(f"{path}.partial", dpi=100, format="png")
    os.replace(f"{path}.partial", path)  # whole, or as it was


def bars(values: list[float], width: int = 24) -> list[str]:
    """A line a layer: its number, a bar, the value between 0 and 1."""
    return [f"  block {l:2d} |{'█' * round(v * width):{width}s}| {v:6.1%}" for l, v in enumerate(values)]


def closing_lines(run: dict, place: Path):
    """What a run came to, and what to do next with it."""
    c, s = run["config"], run["summary"]
    if s.get("interrupted", True):
        yield f"{place} is not finished"
        return
    flops = s["realised_flops_per_token"]
    if c["control"] == "dense":
        yield f"FLOPs a token, forward: {flops:.3g}"
    else:
        _, full = archive.realised_flops(c | {"control": "dense"}, [0.0] * c["n_layers"])
        yield f"sparsity {s['sparsity']:.1%}: the share of tokens that skipped each block, in validation"
        yield from bars(s["gate_zero"])
        yield f"FLOPs a token, forward: {flops:.3g} realised, {full:.3g} dense ({flops / full:.2f} of it)"
        if s.get("dense_step_seconds"):
            yield (f"step time: {s['gated_step_seconds'] / s['dense_step_seconds']:.2f} of a dense step of "
                   "the same size (forward and backward of one micro-batch, medians, measured at the end)")
    if s["ranks"] > 1:
        longer = s["averaged_step_seconds"] - s["gated_step_seconds"]
        yield (f"{s['ranks']} ranks: averaging the gradients takes {1e3 * s['all_reduce_seconds']:.1f} ms "
               f"alone and lengthens a step by {1e3 * longer:.1f} ms; the busiest rank has "
               f"{s['rank_imbalance']:.3f} of the mean number of active tokens")
    if "folder" in run:
        yield (f"record: {place} (look at plot.png)\nnext:\n  ./run.sh eval --checkpoint {place}\n"
               f"  ./run.sh sample --checkpoint {place} --prompt 'def ' --show_depth\n  ./run.sh report")
    else:
        yield f"packed: ./run.sh --config {place} runs it again, ./run.sh show {place} --plot draws it"


def main(argv: list[str] | None = None) -> int:
    def body():
        parser = archive.Parser(__doc__)
        parser.add_argument("record", type=Path, help="a run's folder, or PARENT/NAME of a packed one")
        parser.add_argument("--plot", action="store_true", help="draw it, instead")
        args = parser.parse_args(argv)
        run, curve = archive.find(args.record)
        if args.plot:
            plot(run, curve, args.record / "plot.png" if "folder" in run else Path(f"{args.record}.png"))
        else:
            print(*closing_lines(run, args.record), sep="\n")
        return 0

    return archive.exit_status(body)


if __name__ == "__main__":
    sys.exit(main())
