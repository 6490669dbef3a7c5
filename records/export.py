"""Write a checkpoint as a hub folder or in the authors' layout; and, from Python, the model of the hub.

    ./run.sh export --checkpoint records/X --out folder                   # model.safetensors and config.json
    ./run.sh export --checkpoint records/X --to released --out folder     # state_step0.pt and config.json

    from records.export import HubModel
    model = HubModel.from_pretrained("records/X")
"""
import dataclasses
import json
import sys
from pathlib import Path

import torch
from huggingface_hub import PyTorchModelHubMixin

sys.path.insert(0, str(Path(__file__).resolve().parent))
import tool  # noqa: E402
from tool import Config, UserError, tgs  # noqa: E402
from train_gpt_skip import MiddleSkippingTransformer  # noqa: E402

OPTIONS = {
    "to": dict(default="hub", choices=("hub", "released"), help="layout (default: hub)"),
    "out": dict(required=True, help="new folder to write"),
}


class HubModel(MiddleSkippingTransformer, PyTorchModelHubMixin):
    """The model with huggingface_hub's save_pretrained, from_pretrained and push_to_hub. from_pretrained
    reads what --checkpoint reads, and takes Config's fields."""

    def _save_pretrained(self, save_directory: Path):
        export_hub(self, Path(save_directory))

    @classmethod
    def _from_pretrained(cls, *, model_id: str, revision=None, **settings):
        stored, state = tgs.read_weights(str(model_id), revision)
        flags = {f.name: settings[f.name] for f in dataclasses.fields(Config) if f.name in settings}
        model = cls(Config(**tgs.checkpoint_settings(stored, flags, model_id, tgs.GATE_FIELDS) | flags))
        tgs.load_weights(model, state, model_id)
        return model


def export_hub(model: MiddleSkippingTransformer, folder: Path):
    """A hub's layout, as `HubModel` and --checkpoint read it: model.safetensors and config.json."""
    settings = {k: getattr(model.cfg, k) for k in [*tgs.MODEL_FIELDS, *tgs.GATE_FIELDS]}
    write_json(settings | {"encoding": model.cfg.tokeniser}, folder)
    tgs.export_weights(model, folder / "model.safetensors")


def export_released(model: MiddleSkippingTransformer, folder: Path):
    """The authors' layout: state_step0.pt and config.json; a dense model with routers that are all zero."""
    cfg, state = model.cfg, dict(model.state_dict())
    if not cfg.gated:
        for l in range(cfg.n_levels):
            state[f"masks.{l}.linear.weight"] = torch.zeros(1, cfg.dim)
            state[f"masks.{l}.linear.bias"] = torch.zeros(1)
    settings = {k: getattr(cfg, k) for k in tgs.SIZES} | {
        "multiple_of": 256, "initializer_range": cfg.initializer_range, "zero_init_masks": not cfg.gated}
    write_json({"model": settings}, folder)
    tgs.write_atomically(folder / "state_step0.pt", lambda f: torch.save({"step": 0, "model": state}, f))


def write_json(settings: dict, folder: Path):
    text = json.dumps(settings, indent=1) + "\n"
    tgs.write_atomically(folder / "config.json", lambda f: f.write(text.encode()))


def run(cfg: Config, weights: dict, args) -> int:
    folder = Path(args.out)
    if args.to == "released" and cfg.n_layers % 2:
        raise UserError(f"--to released: the authors' layout has even numbers of blocks, not {cfg.n_layers}")
    model = HubModel(cfg)
    tgs.load_weights(model, weights, args.checkpoint)
    try:
        folder.mkdir(parents=True)
    except OSError as e:
        raise UserError(f"--out {folder} cannot be made: {e.strerror}; name a new folder")
    export_released(model, folder) if args.to == "released" else model.save_pretrained(folder)
    print(f"wrote {folder}")
    return 0


def main(argv: list[str] | None = None) -> int:
    return tool.main(run, __doc__, OPTIONS, argv)


if __name__ == "__main__":
    sys.exit(main())
