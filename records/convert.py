"""Bring a model in from elsewhere, cut blocks out of it, or write it for elsewhere.

    ./run.sh convert --checkpoint HuggingFaceTB/SmolLM2-135M --out models/smol --max_seq_len 1024
    ./run.sh convert --checkpoint models/smol --out models/cut --drop_blocks 14 15
    ./run.sh convert --checkpoint models/smol --out models/llama --to llama
    ./run.sh convert --checkpoint tim-lawson/fineweb-gated-target-end-0.5 --out models/authors \\
        --gate_attention none --compute masked

    from records.convert import HubModel
    model = HubModel.from_pretrained("records/X")

--checkpoint is a record, a checkpoint file or folder, the authors' folder, a folder in Hugging Face's Llama
layout, or a hub repo of any of them. What is written is `ours`, which --init_from and all tools read
(config.json, model.safetensors); `llama`, for transformers and what reads the same; `released`, what the
authors' code trains from; or `hub`, their folder for the hub. Weights are float32.
"""
import dataclasses
import re
import shutil
import sys
from pathlib import Path

import torch
from huggingface_hub import PyTorchModelHubMixin, snapshot_download
from safetensors.torch import save

sys.path.insert(0, str(Path(__file__).resolve().parent))
import tool  # noqa: E402
from tool import Config, UserError, tgs  # noqa: E402

def table(text):
    return dict(line.split() for line in text.strip().splitlines())


# The script's names and Llama's: of sizes, and of tensors
SIZES = table("""
dim                hidden_size
n_layers           num_hidden_layers
n_heads            num_attention_heads
n_kv_heads         num_key_value_heads
vocab_size         vocab_size
norm_eps           rms_norm_eps
rope_theta         rope_theta
max_seq_len        max_position_embeddings
initializer_range  initializer_range
""")
TENSORS = table("""
tok_embeddings.weight                   model.embed_tokens.weight
layers.{}.pre_attention_norm.weight     model.layers.{}.input_layernorm.weight
layers.{}.attention.wq.weight           model.layers.{}.self_attn.q_proj.weight
layers.{}.attention.wk.weight           model.layers.{}.self_attn.k_proj.weight
layers.{}.attention.wv.weight           model.layers.{}.self_attn.v_proj.weight
layers.{}.attention.wo.weight           model.layers.{}.self_attn.o_proj.weight
layers.{}.pre_feed_forward_norm.weight  model.layers.{}.post_attention_layernorm.weight
layers.{}.feed_forward.w1.weight        model.layers.{}.mlp.gate_proj.weight
layers.{}.feed_forward.w2.weight        model.layers.{}.mlp.down_proj.weight
layers.{}.feed_forward.w3.weight        model.layers.{}.mlp.up_proj.weight
output_norm.weight                      model.norm.weight
output.weight                           lm_head.weight
""")
# What a config.json may say that is not a size; and of rotary scaling
PLAIN = {"model_type": "llama", "hidden_act": "silu", "attention_bias": False, "mlp_bias": False,
         "sliding_window": None}
SCALED = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192}


class HubModel(tgs.MiddleSkippingTransformer, PyTorchModelHubMixin):
    """The model with huggingface_hub's save_pretrained, from_pretrained and push_to_hub. from_pretrained
    reads what --checkpoint reads, and takes Config's fields."""

    def _save_pretrained(self, save_directory):
        write(Path(save_directory), "ours", *ours(self))

    @classmethod
    def _from_pretrained(cls, *, model_id, revision=None, **given):
        explicit = {k: v for k, v in given.items() if k in tgs.FIELDS}
        settings, state = read(str(model_id), revision)
        # which no weight fixes:
        settings["max_seq_len"] = explicit.get("max_seq_len", settings.get("max_seq_len"))
        fixed = tgs.checkpoint_settings(settings, explicit, model_id)
        gates = {k: settings[k] for k in tool.GATES if k in settings}
        model = cls(Config(**gates | fixed | explicit))
        tgs.load_weights(model, state, model_id)
        return model


# ---- in ---------------------------------------------------------------------------------------------------

def read(source, revision):
    """Settings and tensors, by the script's names."""
    path = Path(source)
    if not path.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        path = fetch(source, revision)
    config = path / "config.json"
    if config.exists() and tgs.read_json(config).get("model_type"):
        return read_llama(path, tgs.read_json(config))
    settings, state = tgs.read_weights(str(path))
    state = {name.removeprefix("model."): w for name, w in state.items()}
    zero = [torch.is_tensor(w) and not w.any() for name, w in state.items() if name.startswith("masks.")]
    if "control" not in settings and all(zero):  # as the authors store dense models
        settings["control"] = "dense"
        state = {name: w for name, w in state.items() if not name.startswith("masks.")}
    return settings, state


def fetch(repo, revision):
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=[
            "config.json", "model*.safetensors", "model.safetensors.index.json", "tokenizer.json"]))
    except Exception as e:  # offline, no such repo, no right to it
        raise UserError(f"checkpoint {repo}: no such folder, and it cannot be fetched from the hub ({e})")


def read_llama(folder, config):
    index, tokenizer = folder / "model.safetensors.index.json", folder / "tokenizer.json"
    try:
        settings = llama_settings(config)
        names = {theirs: ours for ours, theirs in llama_names(settings["n_layers"]).items()}
        files = tgs.read_json(index)["weight_map"].values() if index.exists() else ["model.safetensors"]
    except (LookupError, TypeError, AttributeError, ZeroDivisionError) as e:
        raise UserError(f"{folder} is no Llama's: its config.json or index lacks what they have ({e!r})")
    tensors = {}
    for file in sorted(set(files)):
        tensors |= tgs.read_checkpoint(folder / file)
    if config.get("tie_word_embeddings"):
        tensors["lm_head.weight"] = tensors.get("model.embed_tokens.weight")
    state = {names.get(k, k): w for k, w in tensors.items() if not k.endswith("rotary_emb.inv_freq")}
    reorder(state, settings, (2, -1))
    if tokenizer.exists():
        settings["encoding"] = str(tokenizer)
    return settings, state


def llama_settings(config):
    """Config's fields. UserError where a Llama's config.json asks for what the script has not."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    asked = {"rms_norm_eps": 1e-6, "rope_theta": 10000.0, "rope_type": rope.get("type", "default")}
    asked |= config | rope
    dim, wide, heads = asked["hidden_size"], asked["intermediate_size"], asked["num_attention_heads"]
    scaled = asked["rope_type"] == "llama3"
    plain = PLAIN | {"head_dim": dim // heads} | (SCALED if scaled else {"rope_type": "default"})
    for name, value in plain.items():
        if asked.get(name) not in (None, value):
            raise UserError(f"a Llama with {name} {asked[name]} cannot be read; only with {value}")
    return {ours: asked.get(theirs) for ours, theirs in SIZES.items()} | {
        "ffn_dim_multiplier": wide / dim, "use_scaled_rope": scaled, "rope_factor": asked.get("factor"),
        "norm": "llama", "control": "dense"}


def llama_names(n_layers):
    """Llama's name of every tensor, by the script's."""
    return {ours.format(l): theirs.format(l) for l in range(n_layers) for ours, theirs in TENSORS.items()}


def reorder(state, settings, split):
    """Rows of queries and keys, in place: (2, -1) makes neighbouring rotary pairs of a head's halves, (-1, 2)
    halves of pairs."""
    for name, w in state.items():
        if ".wq." in name or ".wk." in name:
            heads = settings["n_heads"] if ".wq." in name else settings["n_kv_heads"] or settings["n_heads"]
            if len(w) % (2 * heads) == 0:  # (else load_weights says what is wrong)
                state[name] = w.unflatten(0, (heads, *split)).transpose(1, 2).flatten(0, 2)


# ---- out: settings and tensors of a layout ----------------------------------------------------------------

def ours(model):
    settings = {k: getattr(model.cfg, k) for k in [*tgs.MODEL_FIELDS, *tool.GATES, "encoding"]}
    return settings, model.state_dict()


def released(model):
    cfg, state = model.cfg, model.state_dict()
    if cfg.n_layers % 2 or cfg.norm != "sandwich" or cfg.control == "random" or cfg.mask_documents:
        raise UserError("the authors' layouts have an even number of blocks, --norm sandwich, no coin for a router "
                        f"and --no-mask_documents, not {cfg.n_layers}, {cfg.norm}, --control {cfg.control}"
                        f"{' and --mask_documents' * cfg.mask_documents}")
    if not cfg.n_routers:  # a dense model has routers that are all zero
        for l in range(cfg.n_levels):
            state[f"masks.{l}.linear.weight"] = torch.zeros(1, cfg.dim)
            state[f"masks.{l}.linear.bias"] = torch.zeros(1)
    settings = {k: getattr(cfg, k) for k in tgs.SIZES}
    return settings | {"multiple_of": 256, "zero_init_masks": not cfg.n_routers}, state


def llama(model):
    cfg, state = model.cfg, model.state_dict()
    if cfg.gated or cfg.norm != "llama":
        raise UserError(f"--to llama: a Llama is dense and has --norm llama, not --control {cfg.control} and "
                        f"--norm {cfg.norm}")
    reorder(state, vars(cfg), (-1, 2))
    settings = {theirs: getattr(cfg, ours) for ours, theirs in SIZES.items()} | PLAIN | {
        "architectures": ["LlamaForCausalLM"], "intermediate_size": cfg.hidden_dim,
        "tie_word_embeddings": False, "bos_token_id": None, "eos_token_id": None,
        "rope_scaling": SCALED | {"factor": cfg.rope_factor} if cfg.use_scaled_rope else None}
    return settings, {theirs: state[ours] for ours, theirs in llama_names(cfg.n_layers).items()}


LAYOUTS = {"ours": ours, "released": released, "hub": released, "llama": llama}


def write(folder, to, settings, state):
    """Weights first: a folder without config.json is no checkpoint."""
    if to == "released":
        step = {"step": 0, "model": state}
        tgs.write_atomically(folder / "state_step0.pt", lambda f: torch.save(step, f))
        settings = {"model": settings}
    else:
        if to == "hub":
            state = {f"model.{name}": w for name, w in state.items()}
        data = save(state, metadata={"format": "pt"})
        tgs.write_atomically(folder / "model.safetensors", lambda f: f.write(data))
    tool.write_json(folder / "config.json", settings)


# ---- command line -----------------------------------------------------------------------------------------

OPTIONS = tool.SOURCE | {
    "out": dict(required=True, type=Path, help="new folder to write"),
    "to": dict(default="ours", choices=LAYOUTS, help="layout (default: ours)"),
    "drop_blocks": dict(nargs="+", type=int, default=[], help="leave out these blocks of a dense model"),
}
FIELDS = ["norm", "gate_attention", "compute", "mask_documents", "encoding", "max_seq_len"]


def run(args, explicit):
    model = HubModel._from_pretrained(model_id=args.checkpoint, **explicit)
    cfg = model.cfg
    if args.drop_blocks:
        kept = [block for l, block in enumerate(model.layers) if l not in args.drop_blocks]
        if cfg.gated or not 0 < len(kept) == cfg.n_layers - len(args.drop_blocks):
            raise UserError(f"--drop_blocks takes some of the blocks 0 to {cfg.n_layers - 1}, each once, of "
                            f"a model with --control dense; this one's is {cfg.control}")
        model.layers = torch.nn.ModuleList(kept)
        cfg = model.cfg = dataclasses.replace(cfg, n_layers=len(kept))
    settings, state = LAYOUTS[args.to](model)
    args.out.mkdir(parents=True)
    if Path(cfg.tokeniser).is_file():
        settings["encoding"] = str(shutil.copy(cfg.tokeniser, args.out / "tokenizer.json"))
    write(args.out, args.to, settings, state)
    print(f"wrote {args.out}")


main = tool.command(__name__, run, __doc__, OPTIONS, FIELDS)
