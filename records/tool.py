"""What the tools for one checkpoint share: their command line, and the tokeniser."""
import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "data")]
import tokenize_text  # noqa: E402
import train_gpt_skip as tgs  # noqa: E402
from train_gpt_skip import Config, UserError  # noqa: E402

FROM_CHECKPOINT = *tgs.GATE_FIELDS, "val_files", "val_tokens", "device_batch_size", "dtype"


def main(run, doc: str, options: dict, argv: list[str] | None = None) -> int:
    """run(cfg, weights, args) on the checkpoint that the command line names: the exit status. `options` are
    the tool's flags beside --checkpoint and Config's; `doc` is its docstring."""
    def body():
        parser = tgs.Parser(description=doc, allow_abbrev=False,
                            formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--checkpoint", required=True,
                            help="record, checkpoint file or folder, or hub repo")
        for name, option in options.items():
            parser.add_argument(f"--{name}", **option)
        args, explicit = tgs.parse_settings(parser, argv)
        cfg, weights = tgs.resolve(explicit | {"init_from": args.checkpoint}, FROM_CHECKPOINT)
        return run(cfg, weights, args)

    return tgs.exit_status(body)


def get_encoding(cfg: Config):
    """The model's tiktoken.Encoding. UserError where its vocabulary cannot be had."""
    try:
        return tokenize_text.get_encoding(cfg.tokeniser)
    except tokenize_text.InputError as e:
        raise UserError(e)


def encode(cfg: Config, text: str) -> list[int]:
    """The tokens of a text, after one that begins a document. UserError where the model lacks any of them."""
    encoding = get_encoding(cfg)
    tokens = [encoding.eot_token] + encoding.encode_ordinary(text)
    if max(tokens) >= cfg.vocab_size:
        raise UserError(f"the {encoding.name} tokeniser is not the model's, which knows {cfg.vocab_size} "
                        "tokens; name its own with --encoding")
    return tokens


def new_file(path: str, name: str, text: str):
    try:
        with open(path, "x", encoding="utf-8") as f:
            f.write(text)
    except OSError as e:
        raise UserError(f"{name} {path} cannot be written: {e.strerror}; name another file")
