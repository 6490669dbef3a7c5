"""What the tools share: their command line, the model of --checkpoint, its tokeniser, and files."""
import argparse
import dataclasses
import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "data")]
import tokenize_text  # noqa: E402
import train_gpt_skip as tgs  # noqa: E402
from tokenize_text import between  # noqa: E402, F401
from train_gpt_skip import Config, UserError  # noqa: E402

SOURCE = {"checkpoint": dict(required=True, help="record, checkpoint file, or folder of one")}
GATES = ["control", "mean_target_start", "mean_target_end", "seed"]  # which decide the gates of given weights
# which model a checkpoint becomes, and where it runs
FIELDS = [*GATES, "norm", "gate_attention", "compute", "mask_documents", "document_token", "encoding", "device",
          "dtype", "compile"]


def command(module, run, doc, options, fields):
    """A tool's main(argv), which returns the exit status; where its `module` is the program, it runs.
    run(args, explicit) gets the tool's own flags, of `options`, and those of Config's `fields` that were
    given; `doc` is its docstring."""
    def main(argv=None):
        def body():
            parser = tgs.Parser(description=doc, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
            for name, option in options.items():
                parser.add_argument(f"--{name}", **option)
            try:
                run(*tgs.parse_settings(parser, argv, fields))
            except OSError as e:
                if not e.filename:
                    raise
                raise UserError(f"{e.filename}: {e.strerror}; name another")
            return 0

        return tgs.exit_status(body)

    if module == "__main__":
        sys.exit(main())
    return main


def of_checkpoint(source, explicit):
    """Settings and weights of --checkpoint; data and gates are its record's unless a flag says otherwise."""
    stored, weights = tgs.read_weights(source)
    also = [*GATES, "val_files", "val_tokens", "device_batch_size", "dtype"]
    settings = {k: stored[k] for k in also if stored.get(k) is not None}
    settings |= tgs.checkpoint_settings(stored, explicit, source)
    cfg = Config(**settings | explicit)
    if cfg.mask_documents and cfg.document_token is None:
        cfg.document_token = get_encoding(cfg).eot_token
    return cfg, weights


def dense(cfg):
    """The same model without routers."""
    return dataclasses.replace(cfg, control="dense", **dict.fromkeys(tgs.COEFFICIENTS))


def blocks_run(levels, n, n_layers):
    """How many blocks each of n tokens ran (n,), from what the model's `span` leaves."""
    depth, at = torch.zeros(n, dtype=torch.int64), torch.arange(n)
    for l, (g, layout, keep) in enumerate(levels):
        at = at if keep is None else at[keep.cpu()]
        ran = 1 if g is None else (g[:len(at)] > 0).cpu()
        depth[at] += ran * (1 if 2 * l + 1 == n_layers else 2)
    return depth


@torch.no_grad()
def scores(model, rt, rows):
    """Of rows (tokens, n), packed, each of at most max_seq_len + 1 tokens of which the last n count: by row,
    their cross-entropy in nats and whether each is the likeliest, (n,); and every level's `gate_sums`."""
    ids = [torch.tensor(tokens, device=rt.device) for tokens, _ in rows]
    each = [torch.arange(len(x) - 1, device=rt.device) for x in ids]
    seq = torch.cat([torch.full_like(pos, i) for i, pos in enumerate(each)])
    counts = [n for _, n in rows]
    last = torch.cat([pos >= len(pos) - n for pos, n in zip(each, counts)])
    wanted = torch.cat([x[len(x) - n:] for x, n in zip(ids, counts)])
    with rt.autocast():
        h, levels = model.hidden(torch.cat([x[:-1] for x in ids]), seq, torch.cat(each), len(rows))
        logits = model.output(h[last]).float()
    losses, greedy = F.cross_entropy(logits, wanted, reduction="none"), logits.argmax(1) == wanted
    return losses.split(counts), greedy.split(counts), torch.stack(
        [tgs.gate_sums(g, layout) for g, layout, _ in levels])


def get_encoding(cfg):
    """The model's tokeniser. UserError where its vocabulary cannot be had."""
    try:
        return tokenize_text.get_encoding(cfg.tokeniser)
    except tokenize_text.InputError as e:
        raise UserError(e)


def encode(cfg, text):
    """The tokens of a text, a list, after one that begins a document. UserError where the model lacks any."""
    encoding = get_encoding(cfg)
    tokens = [encoding.eot_token, *encoding.encode_ordinary(text)]
    if max(tokens) >= cfg.vocab_size:
        raise UserError(f"the {encoding.name} tokeniser is not the model's, which knows {cfg.vocab_size} "
                        "tokens; name its own with --encoding")
    return tokens


def write_json(path, content):
    text = json.dumps(content, indent=1) + "\n"
    tgs.write_atomically(path, lambda f: f.write(text.encode()))
