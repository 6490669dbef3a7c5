"""Where does depth pay? How much of what further blocks gain lies in the tokens that a router could choose.

    ./run.sh gain --shallow muon_b8_1600_wsd_dense_4 --deep muon_b8_1600_wsd_dense_8

Both are rows of records/tracks.py, trained on the same data; their seeds are those whose weights are here
(git ignores them). A token's gain is its loss in the shallow model minus that in the deep one, each the mean
over its seeds, on validation text. For every share of the tokens the answer is the share of the whole gain
that lies in those which a rule ranks first:

    token     by the token itself: the mean gain of its equals (what routers were seen to learn)
    states    by a linear function of the deep model's states where routers would be that can close its
              middle (behind its first L/2 - 1 blocks, normalised): the best that such routers could do
    entropy   by the deep model's uncertainty about the next token (known only after its last block)

The first two are fitted on one half of the text and measured on the other, in turn, a deep model at a time;
the curves are the means over the models. Beside them stand the dense models in between and the gated rows of
the same line, at their share of the further FLOPs and of the gain (of the mean losses of all seeds): where a
rule's curve passes through the dense points, a router that follows it is a draw with fewer blocks. It is an
estimate: further blocks also serve other tokens, as keys, and gates that are trained change the states.
"""
import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))
import tracks  # noqa: E402
from tool import UserError, tgs  # noqa: E402

SHARES = np.arange(0, 1.0001, 0.05)


@torch.no_grad()
def per_token(record: Path) -> dict[str, Tensor]:
    """Of every validation token (n): itself, the loss of the next (nats), the entropy of its prediction, and
    the states behind each of the first L/2 - 1 blocks, normalised, side by side (n, (L/2 - 1) d)."""
    cfg, weights = tgs.resolve({"init_from": str(record)},
                               (*tgs.GATE_FIELDS, "val_files", "val_tokens", "device_batch_size"))
    rt = tgs.Runtime(cfg)
    model, shards, T = tgs.build_model(cfg, rt, weights, record.name), tgs.Shards(cfg, "val"), cfg.max_seq_len
    places, found = tgs.sequences(shards, cfg), {"token": [], "loss": [], "entropy": [], "states": []}
    run, states = model.block, []

    def block(l, *args):
        h = run(l, *args)
        if l < cfg.n_layers // 2 - 1:
            states.append(F.rms_norm(h, h.shape[-1:]))
        return h

    model.block = block
    for first in range(0, len(places), cfg.device_batch_size):
        windows = torch.stack([shards.window(*place, T + 1)
                               for place in places[first:first + cfg.device_batch_size]]).to(rt.device)
        tokens, n = windows[:, :-1].flatten(), windows[:, :-1].numel()
        each = torch.arange(n, device=rt.device)
        last, _ = model.hidden(tokens, each // T, each % T, len(windows))
        log_p = model.output(last).float().log_softmax(-1)
        for name, value in (("token", tokens), ("entropy", -(log_p.exp() * log_p).sum(-1)),
                            ("states", torch.cat(states, 1) if states else last[:, :0]),
                            ("loss", F.nll_loss(log_p, windows[:, 1:].flatten(), reduction="none"))):
            found[name].append(value.cpu())
        states.clear()
    return {name: torch.cat(values) for name, values in found.items()}


def captured(score: Tensor, gain: Tensor) -> np.ndarray:
    """Share of the whole gain (n,) that lies in each of SHARES of the tokens, those of the highest score
    (n,); among equals, in the order of the text."""
    order = score.argsort(descending=True, stable=True)
    sums = torch.cat([torch.zeros(1, dtype=torch.float64), gain[order].double().cumsum(0)])
    return (sums[torch.from_numpy(SHARES * len(gain)).round().long()] / sums[-1]).numpy()


def by_token(fit: Tensor, tokens: Tensor, gain: Tensor) -> Tensor:
    """The mean gain of a token's equals among those that `fit` selects, drawn to the mean of all as by 20
    more of them."""
    size = int(tokens.max()) + 1
    sums = torch.zeros(size, dtype=torch.float64).index_add_(0, tokens[fit], gain[fit].double())
    count = torch.bincount(tokens[fit], minlength=size)
    return ((sums + 20 * gain[fit].double().mean()) / (count + 20))[tokens]


def by_states(fit: Tensor, states: Tensor, gain: Tensor) -> Tensor:
    """The least-squares fit of the gain by a linear function of states (n, d), on what `fit` selects."""
    x = torch.cat([states, torch.ones(len(states), 1)], 1).double()
    A = x[fit].T @ x[fit] + 1e-3 * fit.sum() * torch.eye(x.shape[1], dtype=torch.float64)
    return x @ torch.linalg.solve(A, x[fit].T @ gain[fit].double())


def curves(gain: Tensor, deep: list[dict[str, Tensor]]) -> dict[str, list[float]]:
    """The share of the gain (n,) at each of SHARES, by rule."""
    half, found = torch.arange(len(gain)) < len(gain) // 2, {}
    for name, rule in (("token", lambda fit, m: by_token(fit, m["token"], gain)),
                       ("states", lambda fit, m: by_states(fit, m["states"], gain)),
                       ("entropy", lambda fit, m: m["entropy"])):
        each = [captured(rule(fit, m)[~fit], gain[~fit]) for m in deep for fit in (half, ~half)]
        found[name] = [round(float(y), 4) for y in np.mean(each, 0)]
    return found


def neighbours(shallow: str, deep: str, rows: dict[str, dict]) -> dict[str, tuple[float, float, float]]:
    """(share of the further FLOPs, share of the gain, its standard error, to which all three rows add) of the
    rows of the same line with at least 4 seeds."""
    a, b, cost, found = rows[shallow], rows[deep], "forward FLOPs", {}
    flops, gain = b["costs"][cost] - a["costs"][cost], a["mean"] - b["mean"]
    for name, r in rows.items():
        if r["line"] == a["line"] and r["n"] >= 4:
            share = (a["mean"] - r["mean"]) / gain
            sides = ((1 - share, a), (1.0, r), (share, b)) if name not in (shallow, deep) else ()
            error = sum(w * w * row["sd"]**2 / row["n"] for w, row in sides) ** 0.5 / abs(gain)
            found[name] = (r["costs"][cost] - a["costs"][cost]) / flops, share, error
    return found


def weights_of(args, rows: dict[str, dict]) -> list[list[Path]]:
    """Records of the two rows whose weights are here. Raises UserError where the rows cannot be compared."""
    found = tracks.recorded(args.records_dir)
    for row in (args.shallow, args.deep, "dense_8"):  # (the unit of costs)
        if row not in rows:
            raise UserError(f"no finished record of the row {row} is in {args.records_dir}: ./run.sh tracks "
                            f"run --rows {row}")
        if not rows[row]["dense"]:
            raise UserError(f"{row} is not a row of dense models, which this tool compares")
    if rows[args.shallow]["line"] != rows[args.deep]["line"]:
        raise UserError(f"{args.shallow} and {args.deep} are not of one regime: name two rows of one line")
    if rows[args.shallow]["n_layers"] >= rows[args.deep]["n_layers"]:
        raise UserError(f"--deep {args.deep} is not deeper than {args.shallow}: name a row of more blocks")
    each = [[path for (name, _), path in found.items() if name == row] for row in (args.shallow, args.deep)]
    here = [[path for path in paths if (path / "model.safetensors").exists()] for paths in each]
    for row, paths, kept in zip((args.shallow, args.deep), each, here):
        if not kept:
            raise UserError(f"the row {row} has no weights here: train a seed again with ./run.sh --config "
                            f"{tracks.relative(paths[0])}/config.json")
    return here


def figure(content: dict, path: Path):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, ax = plt.subplots(figsize=(7, 4.6), layout="constrained")
    ax.plot([0, 1], [0, 1], color="0.8", lw=1, label="any tokens")
    for name, label, color in (("token", "the token itself", "C0"),
                               ("states", "a linear function of the states", "C2"),
                               ("entropy", "the uncertainty (known at the end)", "C4")):
        ax.plot(SHARES, content["curves"][name], color=color, label=f"tokens chosen by {label}")
    for name, (x, y, error) in content["rows"].items():
        dense = tracks.on_line(name)
        ax.errorbar(x, y, error, fmt="s" if dense else "D", color="0.25" if dense else "C3", capsize=3, ms=6,
                    label=None if dense else f"gated: {tracks.parts(name)[2]}")
        if dense:
            ax.annotate(f"dense, {content['blocks'][name]} blocks", (x, y), (8, -12),
                        textcoords="offset points", fontsize=9, color="0.25")
    ax.set(xlabel="share of the tokens that run the further blocks (dense, gated: of these blocks' FLOPs)",
           ylabel="share of what they gain", xlim=(-0.03, 1.2), xticks=np.arange(0, 1.01, 0.2))
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(color="0.93", lw=0.8)
    ax.set_axisbelow(True)
    ax.legend(frameon=False, fontsize=9, loc="lower right")
    fig.savefig(path, dpi=100)
    plt.close(fig)


def main(argv=None) -> int:
    def body():
        parser = tgs.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--shallow", required=True, help="a row of dense models")
        parser.add_argument("--deep", required=True, help="a row of dense models with more blocks")
        parser.add_argument("--records_dir", type=Path, default=tracks.FRONTIER,
                            help=f"(default: {tracks.FRONTIER.name})")
        args = parser.parse_args(argv)
        rows = tracks.gather(args.records_dir)
        models = [[per_token(path) for path in paths] for paths in weights_of(args, rows)]
        losses = [sum(m["loss"] for m in side) / len(side) for side in models]
        gain = losses[0] - losses[1]
        content = {"shallow": args.shallow, "deep": args.deep, "seeds": [len(m) for m in models],
                   "tokens": len(gain), "gain": round(float(gain.mean()), 5),
                   "shares": [round(float(x), 2) for x in SHARES], "curves": curves(gain, models[1]),
                   "rows": neighbours(args.shallow, args.deep, rows)}
        content["blocks"] = {name: rows[name]["n_layers"] for name in content["rows"]}
        folder = tgs.make_folder(args.records_dir, "gain")
        tgs.write_atomically(folder / "gain.json", lambda f: f.write((json.dumps(content) + "\n").encode()))
        figure(content, folder / "gain.png")
        print(f"the gain: {content['gain']:.4f} nats a token")
        for share in (0.1, 0.25, 0.5, 0.75):
            at = {name: curve[round(share / 0.05)] for name, curve in content["curves"].items()}
            print(f"{share:.2f} of the tokens: " + ", ".join(f"by {name} {y:.2f}" for name, y in at.items()))
        for name, (x, y, error) in content["rows"].items():
            print(f"{name}: {x:.2f} of the further FLOPs, {y:.2f} ± {error:.2f} of the gain")
        print(f"record: {folder}")
        return 0

    return tgs.exit_status(body)


if __name__ == "__main__":
    sys.exit(main())
