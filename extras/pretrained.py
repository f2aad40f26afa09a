"""Weights from elsewhere: the official I-JEPA checkpoints and Hugging Face folders, read and written.

    model = from_official("IN1K-vit.h.14-300e")       both encoders and the predictor, downloaded once
    encoder = from_huggingface(folder)                what transformers' IJepaModel or IJepaForImageClassification saved
    to_official(model, path), to_huggingface(encoder, folder, mean, std)      the way back

Nothing is computed differently there: the same pre-norm blocks, exact GELU, and positions with the columns' share first, so weights are
only renamed and reshaped. `load` takes any of them, or a run's encoder.pt, for `python evaluate.py --pretrained`. Alphabet as in models.py.
"""

import hashlib
import json
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from support import checkpoint
import config as settings
import data
from config import UsageError
from support.download import VOLUMES, download, one_line, only_one
from models import IJEPA, SIZES, Encoder, sincos_positions

ADDRESS = "https://dl.fbaipublicfiles.com/ijepa"
# ViT-Huge/14, ViT-Huge/16 at 448 pixels, ViT-Huge/14 and ViT-giant/16 (README of github.com/facebookresearch/ijepa).
OFFICIAL = ("IN1K-vit.h.14-300e", "IN1K-vit.h.16-448px-300e", "IN22K-vit.h.14-900e", "IN22K-vit.g.16-600e")
# Small encoders that come with this code, as `pack` writes them; what each was measured at lies beside it.
SHIPPED = {path.stem: path for path in sorted((Path(__file__).parents[1] / "encoders").glob("*.pt"))}
HEADS = {width: heads for width, _, heads, _ in SIZES.values()}  # heads leave no trace in the weights; the official widths imply them

# Our names -> theirs, as patterns replaced one after the other. Positions are no parameter of ours, but of theirs.
BLOCKS = ((r"attention\.qkv", "attn.qkv"), (r"attention\.project", "attn.proj"), (r"mlp\.0", "mlp.fc1"), (r"mlp\.2", "mlp.fc2"))
OFFICIAL_ENCODER = (*BLOCKS, (r"patch_embed\.project", "patch_embed.proj"), ("^positions", "pos_embed"))
OFFICIAL_PREDICTOR = (*BLOCKS, (r"^(embed|blocks|norm)\.", r"predictor_\1."), (r"^project", "predictor_proj"),
                      ("^positions", "predictor_pos_embed"))
HUGGINGFACE = (
    ("^norm", "layernorm"), (r"^blocks\.", "encoder.layer."), ("norm1", "layernorm_before"), ("norm2", "layernorm_after"),
    (r"attention\.qkv", "attention.attention.qkv"), (r"attention\.project", "attention.output.dense"),
    (r"mlp\.0", "intermediate.dense"), (r"mlp\.2", "output.dense"), (r"patch_embed\.project", "embeddings.patch_embeddings.projection"),
    ("^positions", "embeddings.position_embeddings"),
)
# transformers 5 renames in memory what its files still call as before.
IN_MEMORY = ((r"^ijepa\.", ""), (r"^layers\.", "encoder.layer."), (r"attention\.q_proj", "attention.attention.query"),
             (r"attention\.k_proj", "attention.attention.key"), (r"attention\.v_proj", "attention.attention.value"),
             (r"attention\.o_proj", "attention.output.dense"), (r"mlp\.fc1", "intermediate.dense"), (r"mlp\.fc2", "output.dense"))


# --- renaming ------------------------------------------------------------------------------------------------------------


def rename(key, names):
    """A parameter's name with every (pattern, replacement) of `names` applied."""
    for pattern, replacement in names:
        key = re.sub(pattern, replacement, key)
    return key


def listed(words):
    """The first three of some words and how many there are, as '40: a, b, c, ...'."""
    words = sorted(words)
    return f"{len(words)}: {', '.join(words[:3])}" + (", ..." if len(words) > 3 else "")


def load_weights(module, state, names, grid, where):
    """Copy a foreign state dict (their name -> tensor, any float dtype) into an Encoder or a Predictor, its positions included.

    Positions [1, N, D] that are not the sine-cosine ones (learned ones, say) become part of the module's state dict.
    Raises UsageError listing the names that are missing or unexpected, or whose shapes do not fit.
    """
    wanted = {rename(key, names): key for key in [*module.state_dict(), "positions"]}
    wrong = [f"{what} {listed(keys)}" for what, keys in (("missing", set(wanted) - set(state)), ("unexpected", set(state) - set(wanted)))
             if keys]
    if wrong:
        raise UsageError(f"the weights of {where} do not fit: {'; '.join(wrong)}")
    ours = {wanted[key]: value for key, value in state.items()}
    for key in ("patch_embed.project.weight", "mask_token"):
        if key in ours:
            ours[key] = ours[key].flatten(1 if "." in key else 0)  # [D, C, p, p] -> [D, C*p*p]; [1, 1, Dp] -> [Dp]
    positions = ours.pop("positions").squeeze(0).float()  # [N, D]
    try:
        module.load_state_dict(ours)
        fixed = sincos_positions(grid, positions.shape[1])  # [N, D]
        learned = not torch.allclose(positions, fixed, atol=1e-6)  # theirs were made in float64 too, to the same formula
    except RuntimeError as error:
        raise UsageError(f"the weights of {where} do not fit ({one_line(error)[:200]})") from None
    module.register_buffer("positions", positions.clone() if learned else fixed, persistent=learned)


def foreign_weights(module, names, patch_size=None, prefix=""):
    """`load_weights` undone: the module's weights under their names and in their shapes, copies on the CPU."""
    state = {key: value.detach().cpu().clone() for key, value in {**module.state_dict(), "positions": module.positions}.items()}
    state["positions"] = state["positions"][None]  # [1, N, D]
    if patch_size:
        state["patch_embed.project.weight"] = state["patch_embed.project.weight"].unflatten(1, (-1, patch_size, patch_size))  # [D, C, p, p]
    if "mask_token" in state:
        state["mask_token"] = state["mask_token"][None, None]  # [1, 1, Dp]
    return {prefix + rename(key, names): value for key, value in state.items()}


def check_square(encoder):
    """Refuse what neither format can hold: registers, volumes, and images that are not square."""
    if encoder.registers is not None:
        raise UsageError(f"only encoders without registers can be written, this one has {len(encoder.registers)}")
    if len(encoder.grid) != 2 or encoder.grid[0] != encoder.grid[1]:
        raise UsageError(f"only encoders of square images can be written, not of {'x'.join(map(str, encoder.image_size))} pixels")


def empty_encoder(shape):
    """An Encoder(**shape) in eval mode whose weights hold nothing yet: a huge one need not be drawn at random to be overwritten."""
    with torch.device("meta"):
        encoder = Encoder(**shape)
    return encoder.to_empty(device="cpu").eval()


def read(path):
    """The dict in a file of torch.save, memory-mapped, so that what is not read (optimizer state) costs no memory; it cannot run code."""
    try:
        found = torch.load(path, map_location="cpu", mmap=zipfile.is_zipfile(path), weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged or an unsafe file
        raise UsageError(f"{path} cannot be read ({one_line(error)[:200]})") from None
    if not isinstance(found, dict):
        raise UsageError(f"{path} holds a {type(found).__name__}, expected a dict of weights")
    return found


# --- the official code's checkpoints -------------------------------------------------------------------------------------


def check_sha256(path, record):
    """Compare a file with the SHA-256 recorded beside it, in sha256sum's format; with `record`, write that down where there is none.

    No checksum is published: what is recorded at the first download tells later damage, not a wrong download. Raises UsageError.
    """
    beside = path.with_name(path.name + ".sha256")
    if not (record or beside.exists()):
        return
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    if not beside.exists():
        checkpoint.write(beside, lambda temporary: temporary.write_text(f"{digest.hexdigest()}  {path.name}\n"))
    elif beside.read_text().split()[:1] != [digest.hexdigest()]:
        raise UsageError(f"{path} is not what it was when {beside.name} was written; delete both to download it again")


def locate(source, data_dir):
    """The path that `source` names: one of SHIPPED; one of OFFICIAL, in data_dir, downloaded (10 to 17 GB) where it is not there; a path.

    Raises UsageError where there is none, or where it has changed since its SHA-256 was recorded.
    """
    path = Path(data_dir) / f"{source}.pth.tar" if source in OFFICIAL else SHIPPED.get(source, Path(source).expanduser())
    if source in OFFICIAL and not path.is_file():
        with only_one(path):
            if not path.is_file():  # else another process fetched it while this one waited
                download(f"{ADDRESS}/{path.name}", path, f"put {path.name} into {path.parent}")
    if not path.exists():
        raise UsageError(f"'{source}' is none of {', '.join([*SHIPPED, *OFFICIAL])}, nor a .pth.tar, a Hugging Face folder or a run's "
                         "encoder.pt")
    if path.is_file():
        check_sha256(path, record=source in OFFICIAL)
    return path


def part(stored, name, needed, where):
    """One state dict of an official checkpoint, without the `module.` that its distributed wrapper adds to every name."""
    state = {key.removeprefix("module."): value for key, value in (stored.get(name) or {}).items()}
    if missing := [key for key in needed if key not in state]:
        raise UsageError(f"{where} is no official I-JEPA checkpoint: {name} has no {missing[0]}")
    return state


def size_of(state, blocks, width, heads):
    """'width x depth x heads x MLP width', as models.parse_size reads it, of the blocks whose names start with `blocks`."""
    depth = len([key for key in state if re.fullmatch(rf"{blocks}\.\d+\.norm1\.weight", key)])
    return f"{width}x{depth}x{heads}x{len(state[f'{blocks}.0.mlp.fc1.weight'])}"


def heads_of(stored, width, heads, where):
    """(encoder's, predictor's) attention heads: as given, else as `to_official` recorded, else the official code's for the width."""
    heads = heads or stored.get("heads") or (HEADS.get(width),) * 2
    if None in heads:
        raise UsageError(f"{where}: no encoder of the official code is {width} wide, so its number of heads is not known; "
                         "from_official(..., heads=(encoder's, predictor's)) tells it")
    return heads


def official_encoder(stored, name, heads, where):
    """One of an official checkpoint's two encoders ('encoder' or 'target_encoder'): an Encoder, and the shape Encoder(**shape) it has."""
    state = part(stored, name, ("patch_embed.proj.weight", "pos_embed", "blocks.0.mlp.fc1.weight"), where)
    width, channels, patch_size, _ = state["patch_embed.proj.weight"].shape  # [D, C, p, p]
    side = round(state["pos_embed"].shape[1] ** 0.5)  # patches; the official code knows square images only
    size = size_of(state, "blocks", width, heads_of(stored, width, heads, where)[0])
    shape = {"size": size, "image_size": side * patch_size, "patch_size": patch_size, "channels": channels}
    encoder = empty_encoder(shape)
    load_weights(encoder, state, OFFICIAL_ENCODER, encoder.grid, f"{where}, {name}")
    return encoder, shape


def from_official(source, data_dir="data", heads=None):
    """A checkpoint of the official code as an IJEPA in eval mode: both encoders and the predictor.

    source: one of OFFICIAL, which is downloaded into `data_dir` once, or the path of a .pth.tar. Everything but the number of heads
    is told from the weights' shapes; `heads` (encoder's, predictor's) is for widths that the official code does not know.
    Raises UsageError where it cannot be fetched or read, or its weights do not fit.
    """
    path = locate(source, data_dir)
    stored = read(path)
    encoder, target = (official_encoder(stored, name, heads, path)[0] for name in ("encoder", "target_encoder"))
    state = part(stored, "predictor", ("mask_token", "predictor_blocks.0.mlp.fc1.weight"), path)
    size = size_of(state, "predictor_blocks", state["mask_token"].shape[-1], heads_of(stored, encoder.width, heads, path)[1])
    model = IJEPA(encoder, size).eval()
    model.target_encoder = target.requires_grad_(False)
    load_weights(model.predictor, state, OFFICIAL_PREDICTOR, encoder.grid, f"{path}, predictor")
    return model


def to_official(model, path):
    """Write an IJEPA as a checkpoint of the official code: its entries and names, the optimizer's empty.

    One entry more, `heads`, records what the weights do not tell. Raises UsageError for models that the format cannot hold.
    """
    encoder, predictor = model.context_encoder, getattr(model, "predictor", None)
    if predictor is None or predictor.project.out_features != encoder.width:
        raise UsageError("the official format holds an I-JEPA with a predictor of features, which this model is not")
    check_square(encoder)
    stored = {name: foreign_weights(module, OFFICIAL_ENCODER, encoder.patch_size, "module.")
              for name, module in (("encoder", encoder), ("target_encoder", model.target_encoder))}
    stored |= {"predictor": foreign_weights(predictor, OFFICIAL_PREDICTOR, prefix="module."), "opt": None, "scaler": None, "epoch": 0,
               "heads": [module.blocks[0].attention.heads for module in (encoder, predictor)]}
    checkpoint.write(path, lambda temporary: torch.save(stored, temporary))


# --- Hugging Face --------------------------------------------------------------------------------------------------------


def safetensors():
    """The package's module for torch; UsageError where it is not installed, since nothing else here needs it."""
    try:
        import safetensors.torch
    except ImportError:
        raise UsageError("Hugging Face folders need the package safetensors: python -m pip install safetensors") from None
    return safetensors.torch


def read_json(path):
    """The dict in a JSON file; UsageError where it is missing or damaged."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        hint = "; a run's encoder is its file encoder.pt" if (path.parent / "encoder.pt").exists() else ""
        raise UsageError(f"{path.parent} is no Hugging Face folder: {path.name} cannot be read ({one_line(error)}){hint}") from None


def huggingface_shape(config, where):
    """The arguments of Encoder that an IJepaConfig, as a dict, asks for. Raises UsageError for what our Encoder does not do."""
    try:
        allowed = {"model_type": ("ijepa",), "hidden_act": ("gelu",), "qkv_bias": (True,)}
        for key, values in allowed.items():
            if config[key] not in values:
                raise UsageError(f"{where}: {key} is {config[key]}, expected {values[0]}")
        sides = {}
        for key in ("image_size", "patch_size"):
            height, sides[key] = (config[key],) * 2 if isinstance(config[key], int) else config[key]
            if height != sides[key]:
                raise UsageError(f"{where}: {key} is {config[key]}, expected a square")
        words = (config[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"))
        return {"size": "x".join(map(str, words)), "channels": config["num_channels"], **sides}
    except KeyError as error:
        raise UsageError(f"{where} lacks {error.args[0]}; expected the config.json of an IJepaModel") from None


def from_huggingface(source, config=None):
    """An Encoder in eval mode from what transformers' IJepaModel or IJepaForImageClassification saved.

    source: a folder with config.json and *.safetensors; or a state dict, with `config` as `model.config.to_dict()` gives it. Positions
    may be learned ones, and at other image sizes both sides interpolate them bicubically. A classifier, a pooler or a mask token is
    left out, which a line says. Differs: an image that the patches do not divide is refused; transformers drops the rest of it.
    Raises UsageError where safetensors is not installed, the model is another one, or weights are missing or unexpected.
    """
    where, state = "the state dict", source
    if config is None:
        where, state, config = source, {}, read_json(Path(source) / "config.json")
        loader = safetensors()
        for file in sorted(Path(source).glob("*.safetensors")):  # large models are cut into several
            try:
                state |= loader.load_file(file)
            except Exception as error:  # the package's own type, among others
                raise UsageError(f"{file} cannot be read ({one_line(error)[:200]})") from None
    shape = huggingface_shape(config, where)
    state = {rename(key, IN_MEMORY): value for key, value in state.items()}
    extra = [key for key in state if re.match(r"classifier|pooler|embeddings\.mask_token", key)]
    if extra:
        print(f"{where}: left out what is no part of the encoder ({', '.join(extra)})")
    for key in [key for key in state if ".query." in key]:
        parts = [key.replace("query", name) for name in ("query", "key", "value")]
        if set(parts) <= set(state):
            state[key.replace("query", "qkv")] = torch.cat([state.pop(name) for name in parts])  # three of [D, D] -> [3*D, D]
    encoder = empty_encoder(shape)
    load_weights(encoder, {key: value for key, value in state.items() if key not in extra}, HUGGINGFACE, encoder.grid, where)
    for module in encoder.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = config.get("layer_norm_eps", 1e-12)  # their default
    return encoder


def to_huggingface(encoder, folder, mean, std):
    """Write config.json, model.safetensors and preprocessor_config.json, which transformers opens as an IJepaModel.

    mean, std: one float a channel, pixels scaled to 0..1, by which the encoder's images were normalised (data.STATISTICS, or a dataset's
    `mean` and `std`). Raises UsageError where safetensors is not installed, and for volumes and images that are not square.
    """
    check_square(encoder)
    tensors, folder, state = safetensors(), Path(folder), {}
    for key, value in foreign_weights(encoder, HUGGINGFACE, encoder.patch_size).items():
        if ".qkv." in key:  # [3*D, D] -> three of [D, D]
            state |= {key.replace("qkv", name): third.clone() for name, third in zip(("query", "key", "value"), value.chunk(3))}
        else:
            state[key] = value
    config = {
        "architectures": ["IJepaModel"], "model_type": "ijepa", "hidden_size": encoder.width, "num_hidden_layers": len(encoder.blocks),
        "num_attention_heads": encoder.blocks[0].attention.heads, "intermediate_size": encoder.blocks[0].mlp[0].out_features,
        "hidden_act": "gelu", "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "layer_norm_eps": encoder.norm.eps,
        "image_size": encoder.image_size[0], "patch_size": encoder.patch_size, "qkv_bias": True,
        "num_channels": encoder.patch_embed.project.in_features // encoder.patch_size**2,
    }
    preprocessor = {
        "image_processor_type": "ViTImageProcessor", "size": dict.fromkeys(("height", "width"), encoder.image_size[0]),
        "do_resize": True, "resample": 2,  # bilinear, as data.resize
        "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": list(mean), "image_std": list(std),
    }
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint.write(folder / "model.safetensors", lambda path: tensors.save_file(state, path, metadata={"format": "pt"}))
    for name, content in (("config.json", config), ("preprocessor_config.json", preprocessor)):
        checkpoint.write(folder / name, lambda path, content=content: path.write_text(json.dumps(content, indent=2) + "\n"))


# --- any of them ---------------------------------------------------------------------------------------------------------


@dataclass
class Pretrained:
    """An encoder in eval mode with what is needed to use it: `shape`, of which Encoder(**shape) is the same untrained; `mean` and `std`
    of its images, one float a channel, or None where only the data can tell; `kind`, what it is in words; `command`, what trained it, if
    that is known."""

    encoder: Encoder
    shape: dict
    mean: "tuple | None"
    std: "tuple | None"
    kind: str
    command: str = ""


def run_encoder(stored, path):
    """What is in a run's encoder.pt, as Pretrained. Raises UsageError where the weights do not fit the settings."""
    run, about = settings.from_dict(stored["config"]), stored["data"]
    shape = {"size": run.encoder, "image_size": run.image_size, "patch_size": run.patch_size, "channels": about["channels"],
             "axes": about["axes"], "registers": run.registers}
    encoder = Encoder(**shape).eval()
    try:
        encoder.load_state_dict(stored["encoder"])
    except RuntimeError as error:
        raise UsageError(f"the weights of {path} do not fit its settings ({one_line(error)[:200]})") from None
    npz = run.dataset in VOLUMES or Path(run.dataset).suffix.lower() == ".npz"  # normalised by its own training images
    statistics = (None, None) if npz else data.STATISTICS.get(run.dataset, data.STATISTICS["folder"])
    return Pretrained(encoder, shape, *statistics, "target encoder of a run", settings.command(run))


def pack(source, path):
    """Write a run's encoder.pt again with its weights in float16: half the size, right to three digits. `load` gives float32."""
    stored = read(source)
    half = {**stored, "encoder": {name: weights.half() for name, weights in stored["encoder"].items()}}
    checkpoint.write(Path(path), lambda temporary: torch.save(half, temporary))


def load(source, data_dir="data"):
    """Whatever `source` names, as Pretrained: one of SHIPPED, one of OFFICIAL (downloaded into data_dir once), a .pth.tar of the official
    code, a Hugging Face folder, or a run's encoder.pt. Of an official checkpoint the target encoder is kept, which the paper evaluates.

    Raises UsageError where there is none, or it cannot be read.
    """
    path, (mean, std) = locate(source, data_dir), data.STATISTICS["folder"]  # the official code's
    if path.is_dir():
        encoder, shape = from_huggingface(path), huggingface_shape(read_json(path / "config.json"), path)
        if (path / "preprocessor_config.json").exists():
            about = read_json(path / "preprocessor_config.json")
            mean, std = (tuple(about.get(key, usual)) for key, usual in (("image_mean", mean), ("image_std", std)))
        return Pretrained(encoder, shape, mean, std, "Hugging Face folder")
    stored = read(path)
    if {"config", "data", "encoder"} <= set(stored):
        return run_encoder(stored, path)
    return Pretrained(*official_encoder(stored, "target_encoder", None, path), mean, std, "target encoder of an official checkpoint")
