"""Weights from elsewhere: official I-JEPA checkpoints, Hugging Face folders, encoders of runs.

    python -m extras.pretrained cifar10-ijepa --out runs/cifar10   ships with this code
    python -m extras.pretrained IN1K-vit.h.14-300e --out runs/huge --dataset stl10
    python evaluate.py runs/huge

    encoder = load("cifar10-ijepa").encoder        also official weights, a folder, an encoder.pt
    model = from_official("IN1K-vit.h.14-300e")    both encoders and the predictor
    encoder = from_huggingface(folder)             what transformers' IJepaModel saved
    to_official(model, path), to_huggingface(encoder, folder, mean, std)

They all compute the same: pre-norm blocks, exact GELU, positions with the columns' half first. So
weights are only renamed and reshaped. Notation as in models.py.
"""

import copy
import json
import math
import re
import shutil
import zipfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import data
import train
from config import SIZES, Config, UsageError, from_preset, parse_size
from models import IJEPA, Encoder, Predictor, sincos_positions
from support import checkpoint, command_line
from support.checkpoint import one_line
from support.download import VOLUMES, download, only_one

ADDRESS = "https://dl.fbaipublicfiles.com/ijepa"
# ViT-Huge/14, ViT-Huge/16 at 448 pixels, ViT-Huge/14 and ViT-giant/16 (its README).
OFFICIAL = ("IN1K-vit.h.14-300e", "IN1K-vit.h.16-448px-300e", "IN22K-vit.h.14-900e",
            "IN22K-vit.g.16-600e")
# Runs that ship with this code, written by `pack`; next to each is how it was evaluated.
FOLDER = Path(__file__).parents[1] / "encoders"
SHIPPED = {path.stem: path for path in sorted(FOLDER.glob("*.pt"))
           if not path.stem.endswith("-sketcher")}
# The weights do not tell the number of heads; in the official code the width does.
HEADS = {width: heads for width, _, heads in SIZES.values()} | {1408: 16}  # the last is ViT-giant
# Blocks of the official code's sizes from ViT-Base on: fewer are what is left of a damaged file.
DEPTHS = {SIZES[name][0]: SIZES[name][1] for name in ("base", "large", "huge")} | {1408: 40}

# Our names -> theirs, patterns that are replaced in turn. Positions are parameters there.
BLOCKS = ((r"attention\.qkv", "attn.qkv"), (r"attention\.project", "attn.proj"),
          (r"mlp\.0", "mlp.fc1"), (r"mlp\.2", "mlp.fc2"))
OFFICIAL_ENCODER = (*BLOCKS, (r"patch_embed\.project", "patch_embed.proj"),
                    ("^positions", "pos_embed"))
OFFICIAL_PREDICTOR = (*BLOCKS, (r"^(embed|blocks|norm)\.", r"predictor_\1."),
                      (r"^project", "predictor_proj"), ("^positions", "predictor_pos_embed"))
HUGGINGFACE = (
    ("^norm", "layernorm"), (r"^blocks\.", "encoder.layer."),
    ("norm1", "layernorm_before"), ("norm2", "layernorm_after"),
    (r"attention\.qkv", "attention.attention.qkv"),
    (r"attention\.project", "attention.output.dense"),
    (r"mlp\.0", "intermediate.dense"), (r"mlp\.2", "output.dense"),
    (r"patch_embed\.project", "embeddings.patch_embeddings.projection"),
    ("^positions", "embeddings.position_embeddings"))
# What transformers' ViTImageProcessor does if a folder does not say; two steps that others have.
SWITCHES = ("do_rescale", "do_normalize", "do_flip_channel_order", "rescale_offset")
VIT_PROCESSOR = {"rescale_factor": 1 / 255, "image_mean": 0.5, "image_std": 0.5,
                 **dict(zip(SWITCHES, (True, True, False, False)))}
# transformers 5 uses other names in memory than in its files.
IN_MEMORY = (
    (r"^ijepa\.", ""), (r"^layers\.", "encoder.layer."),
    (r"attention\.q_proj", "attention.attention.query"),
    (r"attention\.k_proj", "attention.attention.key"),
    (r"attention\.v_proj", "attention.attention.value"),
    (r"attention\.o_proj", "attention.output.dense"),
    (r"mlp\.fc1", "intermediate.dense"), (r"mlp\.fc2", "output.dense"))


# --- renaming -------------------------------------------------------------------------------------


def rename(key, names):
    """A parameter's name with every (pattern, replacement) of `names` applied."""
    for pattern, replacement in names:
        key = re.sub(pattern, replacement, key)
    return key


def first_of(words):
    """How many words there are and the first three, such as '40: a, b, c, ...'."""
    words = sorted(words)
    return f"{len(words)}: {', '.join(words[:3])}" + (", ..." if len(words) > 3 else "")


def load_weights(module, state, names, grid, where):
    """Copy a foreign state dict (their name -> tensor) into an Encoder or a Predictor.

    Positions [1, N, D] that are not the sine-cosine ones become part of the module's state dict.
    Raises UsageError with the names that are missing or unexpected, whose shapes do not fit, or
    whose values are no finite floats: integers are quantized, and their scale is stored elsewhere.
    """
    wanted = {rename(key, names): key for key in [*module.state_dict(), "positions"]}
    wrong = [f"{what} {first_of(keys)}" for what, keys in (
        ("missing", wanted.keys() - state.keys()), ("unexpected", state.keys() - wanted.keys()))
        if keys]
    if wrong:
        raise UsageError(f"the weights in {where} do not fit: {'; '.join(wrong)}")
    for what, good in (("whole numbers (quantized)", torch.is_floating_point),
                       ("NaN or infinite", lambda value: value.isfinite().all())):
        if keys := [key for key, value in state.items() if not good(value)]:
            raise UsageError(f"the weights in {where} are {what} in {first_of(keys)}; expected "
                             "finite floats: get the file again, or another")
    ours = {wanted[key]: value for key, value in state.items()}
    for key in ("patch_embed.project.weight", "mask_token"):
        if key in ours:  # [D, C, p, p] -> [D, C*p*p]; [1, 1, Dp] -> [Dp]
            ours[key] = ours[key].flatten(1 if "." in key else 0)
    positions = ours.pop("positions").squeeze(0).float()  # [N, D]
    checkpoint.load_weights(module, ours, where)
    fixed = sincos_positions(grid, positions.shape[1])  # [N, D]
    if positions.shape != fixed.shape:
        raise UsageError(f"the weights in {where} do not fit: positions of {len(positions)} patches"
                         f", expected {len(fixed)}")
    learned = not torch.allclose(positions, fixed, atol=1e-6)  # float32's rounding
    module.register_buffer("positions", positions.clone() if learned else fixed, persistent=learned)


def foreign_weights(module, names, patch_size=None, prefix=""):
    """`load_weights` undone: the weights under their names, in their shapes, copied to the CPU."""
    state = {**module.state_dict(), "positions": module.positions[None]}  # [1, N, D]
    state = {key: value.detach().cpu().clone() for key, value in state.items()}
    if patch_size:  # [D, C*p*p] -> [D, C, p, p]
        weight = state["patch_embed.project.weight"]
        state["patch_embed.project.weight"] = weight.unflatten(1, (-1, patch_size, patch_size))
    if "mask_token" in state:
        state["mask_token"] = state["mask_token"][None, None]  # [1, 1, Dp]
    return {prefix + rename(key, names): value for key, value in state.items()}


def check_square(encoder):
    """Raise UsageError for what neither format can hold: volumes and images that are not square."""
    if len(encoder.grid) != 2 or encoder.grid[0] != encoder.grid[1]:
        raise UsageError("only encoders of square images can be written, not of "
                         f"{'x'.join(map(str, encoder.image_size))} pixels")


def empty_encoder(*shape):
    """An Encoder(*shape) in eval mode, its weights uninitialized: drawing a huge one takes long."""
    with torch.device("meta"):
        encoder = Encoder(*shape)
    return encoder.to_empty(device="cpu").eval()


def resize(encoder, image_size):
    """A copy of an encoder for another image size (pixels), its positions interpolated.

    image_size: one number, or one for each axis. Bicubic as in transformers; volumes trilinear.
    Raises UsageError if patches do not divide the image.
    """
    axes, p = len(encoder.grid), encoder.patch_size
    sides = (image_size,) * axes if isinstance(image_size, int) else tuple(image_size)
    if any(side < 1 or side % p for side in sides):
        raise UsageError(f"patches of {p} pixels do not divide an image of {sides}")
    other = copy.deepcopy(encoder)
    other.image_size, other.grid = sides, tuple(side // p for side in sides)
    if other.grid != encoder.grid:
        image = encoder.positions.unflatten(0, encoder.grid).movedim(-1, 0)  # [D, *grid]
        mode = "bicubic" if axes == 2 else "trilinear"
        image = F.interpolate(image[None], other.grid, mode=mode)[0]  # [D, *other.grid]
        other.register_buffer("positions", image.flatten(1).T.contiguous())  # [N, D]
    return other


def read(path):
    """The dict in a file of torch.save, memory-mapped: what is not used costs no memory."""
    try:
        return dict(torch.load(path, map_location="cpu", mmap=zipfile.is_zipfile(path),
                               weights_only=True))
    except Exception as error:  # torch raises many kinds for a damaged or an unsafe file
        raise UsageError(f"{path} cannot be read ({one_line(error)[:200]})") from None


# --- the official code's checkpoints --------------------------------------------------------------


def locate(source, data_dir="data"):
    """The path of a name in SHIPPED or OFFICIAL, or of a file or folder.

    Official weights (10 to 17 GB) are downloaded into data_dir if they are not there. Raises
    UsageError if there is no such file.
    """
    path = SHIPPED.get(source, Path(source).expanduser())
    if source in OFFICIAL:
        path = Path(data_dir) / f"{source}.pth.tar"
        with only_one(path):
            if not path.is_file():
                download(f"{ADDRESS}/{path.name}", path, f"put {path.name} into {path.parent}")
    if not path.exists():
        names = ", ".join([*SHIPPED, *OFFICIAL])
        raise UsageError(f"{source} does not exist; expected one of {names}, a .pth.tar, a Hugging "
                         "Face folder, or a run's encoder.pt")
    return path


def part(stored, name, needed, where):
    """One state dict of an official checkpoint, without the prefix of its distributed wrapper."""
    found = stored.get(name) or {}
    state = {key.removeprefix("module."): value for key, value in found.items()}
    for key in needed:
        if key not in state:
            raise UsageError(f"{where} is not an official I-JEPA checkpoint: {name} has no {key}")
    return state


def depth_of(state, blocks):
    """How many transformer blocks a state dict has whose names start with `blocks`."""
    return sum(re.fullmatch(rf"{blocks}\.\d+\.norm1\.weight", key) is not None for key in state)


def check_depth(stored, name, width, where):
    """Raise UsageError if an encoder has fewer or more blocks than the file's other encoder, or
    than the official code gives to its width: a checkpoint that lost its last blocks."""
    other = "encoder" if name == "target_encoder" else "target_encoder"
    depths = {}  # what should have as many blocks
    if other in stored:
        depths[f"its {other}"] = depth_of(part(stored, other, (), where), "blocks")
    if width in DEPTHS and "heads" not in stored:  # `to_official` writes any size
        depths[f"the official size of width {width}"] = DEPTHS[width]
    depth = depth_of(part(stored, name, (), where), "blocks")
    for what, expected in depths.items():
        if depth != expected:
            raise UsageError(f"{where} is incomplete: its {name} has {depth} blocks, {what} has "
                             f"{expected}; get the file again")


def heads_of(stored, width, where):
    """Attention heads of (encoder, predictor): as `to_official` stored them, or by the width."""
    if "heads" not in stored and width not in HEADS:
        raise UsageError(f"{where}: no encoder of the official code is {width} wide, so its number "
                         "of heads is unknown")
    return stored.get("heads") or (HEADS[width],) * 2


def official_encoder(stored, name, where):
    """The Encoder under 'encoder' or 'target_encoder' of an official checkpoint."""
    needed = ("patch_embed.proj.weight", "pos_embed", "blocks.0.mlp.fc1.weight")
    state = part(stored, name, needed, where)
    width, channels, patch_size, _ = state["patch_embed.proj.weight"].shape  # [D, C, p, p]
    side = round(state["pos_embed"].shape[1] ** 0.5) * patch_size  # its images are square
    mlp_ratio = len(state["blocks.0.mlp.fc1.weight"]) / width
    heads, _ = heads_of(stored, width, where)
    check_depth(stored, name, width, where)
    encoder = empty_encoder(width, depth_of(state, "blocks"), heads, side, patch_size, channels,
                            mlp_ratio)
    load_weights(encoder, state, OFFICIAL_ENCODER, encoder.grid, f"{where}, {name}")
    return encoder


def from_official(source, data_dir="data"):
    """A checkpoint of the official code as an IJEPA in eval mode: both encoders and the predictor.

    source: one of OFFICIAL, which is downloaded into data_dir once, or the path of a .pth.tar.
    Raises UsageError if the file cannot be downloaded or read, or its weights do not fit.
    """
    path = locate(source, data_dir)
    stored = read(path)
    encoder, target = (official_encoder(stored, name, path)
                       for name in ("encoder", "target_encoder"))
    needed = ("mask_token", "predictor_blocks.0.norm1.weight")
    state = part(stored, "predictor", needed, path)
    width = state["mask_token"].shape[-1]
    predictor = Predictor(encoder.width, encoder.grid, width, depth_of(state, "predictor_blocks"),
                          heads_of(stored, encoder.width, path)[1])
    load_weights(predictor, state, OFFICIAL_PREDICTOR, encoder.grid, f"{path}, predictor")
    model = IJEPA(encoder, predictor).eval()
    model.target_encoder = target.requires_grad_(False)
    return model


def to_official(model, path):
    """Write an IJEPA as a checkpoint of the official code: its entries and names, no optimizer.

    One more entry, `heads`, stores what the weights do not tell. Raises UsageError for volumes and
    images that are not square.
    """
    encoder, predictor = model.context_encoder, model.predictor
    check_square(encoder)
    encoders = {"encoder": encoder, "target_encoder": model.target_encoder}
    stored = {name: foreign_weights(module, OFFICIAL_ENCODER, encoder.patch_size, "module.")
              for name, module in encoders.items()}
    stored["predictor"] = foreign_weights(predictor, OFFICIAL_PREDICTOR, prefix="module.")
    stored |= {"opt": None, "scaler": None, "epoch": 0,
               "heads": [module.blocks[0].attention.heads for module in (encoder, predictor)]}
    checkpoint.write(path, lambda temporary: torch.save(stored, temporary))


# --- Hugging Face ---------------------------------------------------------------------------------


def safetensors():
    """The package's module for torch; UsageError if it is not installed."""
    try:
        import safetensors.torch
    except ImportError:
        raise UsageError("Hugging Face folders need the package safetensors: "
                         "python -m pip install safetensors") from None
    return safetensors.torch


def read_json(path):
    """The dict in a JSON file; UsageError if it is missing or damaged."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(f"{path.parent} is not a Hugging Face folder: {path.name} cannot be read "
                         f"({one_line(error)})") from None


def huggingface_shape(config, where):
    """The arguments of Encoder for an IJepaConfig, a dict; UsageError if there are none."""
    try:
        for key, value in {"model_type": "ijepa", "hidden_act": "gelu", "qkv_bias": True}.items():
            if config[key] != value:
                raise UsageError(f"{where}: {key} is {config[key]}, expected {value}")
        for key in ("image_size", "patch_size"):
            if not isinstance(config[key], int):
                raise UsageError(f"{where}: {key} is {config[key]}, expected one number")
        width, depth, heads, hidden, *shape = (config[key] for key in (
            "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
            "image_size", "patch_size", "num_channels"))
    except KeyError as error:
        raise UsageError(f"{where} lacks {error.args[0]}; expected the config.json of an "
                         "IJepaModel") from None
    return width, depth, heads, *shape, hidden / width


def read_folder(folder):
    """The config, a dict, and the state dict of a Hugging Face folder."""
    folder = Path(folder)
    config, state, loader = read_json(folder / "config.json"), {}, safetensors()
    files = sorted(folder.glob("*.safetensors"))  # large models are split into several
    if not files:
        pickled = [path.name for path in sorted(folder.glob("pytorch_model*.bin"))]
        only = f"only {', '.join(pickled[:3])}" if pickled else "no weights"
        raise UsageError(f"{folder} has {only}, expected *.safetensors: with transformers, "
                         "IJepaModel.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER) writes it")
    for file in files:
        try:
            found = loader.load_file(file)
        except Exception as error:  # the package's own type, among others
            raise UsageError(f"{file} cannot be read ({one_line(error)[:200]})") from None
        if twice := state.keys() & found.keys():
            raise UsageError(f"{folder} holds weights twice ({first_of(twice)}): move away the "
                             f"*.safetensors that are not part of the model, such as {file.name}")
        state |= found
    return config, state


def numbers(said, name, channels, where, least=-math.inf):
    """A setting of an image processor as a float for each channel, finite and above `least`.

    As in transformers, one number stands for all channels. Raises UsageError for anything else.
    """
    value = said[name]
    values = value if isinstance(value, list) else [value] * channels
    if len(values) != channels or not all(
            type(one) in (int, float) and math.isfinite(one) and one > least for one in values):
        expected = f"one finite number, or {channels}, one a channel"
        more = "" if least < 0 else f", each more than {least}"
        raise UsageError(f"{where}: {name} is {value}, expected {expected}{more}")
    return tuple(map(float, values))


def normalization(folder, channels):
    """How a Hugging Face folder's images are normalized: mean and std, pixels scaled to 0..1.

    Its image processor computes (rescale_factor * pixel - image_mean) / image_std of pixels from 0
    to 255, and either step can be switched off; this is the same in our units. What the folder does
    not say has the values of transformers' ViTImageProcessor. How images are resized and cropped is
    left to the caller. Raises UsageError for what is not a rescaling of each channel.
    """
    path = Path(folder) / "preprocessor_config.json"
    said = read_json(path) if path.exists() else {}
    said = {name: value for name, value in said.items() if value is not None}
    kind = str(said.get("image_processor_type", said.get("feature_extractor_type", "ViT")))
    if not kind.startswith("ViT") and not {"image_mean", "image_std"} <= said.keys():
        raise UsageError(f"{path} lacks image_mean or image_std, and the defaults of {kind} are "
                         "unknown here: add both to the file")
    said = {**VIT_PROCESSOR, **said}
    for name in SWITCHES:
        if type(said[name]) is not bool:
            raise UsageError(f"{path}: {name} is {said[name]}, expected true or false")
    for name in ("do_flip_channel_order", "rescale_offset"):
        if said[name]:
            raise UsageError(f"{path}: {name} is true, expected false: this code only rescales and "
                             "normalizes")
    if not said["do_rescale"]:
        said["rescale_factor"] = 1.0
    if not said["do_normalize"]:
        said |= {"image_mean": 0.0, "image_std": 1.0}
    scale = 255 * numbers(said, "rescale_factor", 1, path, 0)[0]
    mean = numbers(said, "image_mean", channels, path)
    std = numbers(said, "image_std", channels, path, 0)
    return tuple(value / scale for value in mean), tuple(value / scale for value in std)


def describe(folder, config, channels):
    """One line on what a Hugging Face folder holds and how its images are normalized."""
    which = config.get("ijepa_encoder")
    which = (f"the {one_line(which)[:40]} encoder" if which else
             "an encoder, unknown whether target or context (what transformers' own script makes "
             "of official files is the context encoder)")
    mean, std = (" ".join(f"{value:.4g}" for value in part)
                 for part in normalization(folder, channels))
    line = f"{folder} holds {which}; its images have mean {mean}, deviation {std}"
    if not (Path(folder) / "preprocessor_config.json").exists():
        line += " (transformers' default: there is no preprocessor_config.json)"
    return line


def from_huggingface(source, config=None):
    """An Encoder in eval mode from what transformers' IJepaModel saved, or its classifier.

    source: a folder with config.json and *.safetensors; or a state dict, with `config` as
    `model.config.to_dict()` gives it. A classifier, a pooler or a mask token is left out, which is
    printed, and so is which encoder a folder holds and how its images are normalized (`load` gives
    that too). Raises UsageError if safetensors is not installed, for another kind of model, and if
    weights are missing or unexpected.
    """
    where, state = "the state dict", source
    if config is None:
        where, (config, state) = source, read_folder(source)
    shape = huggingface_shape(config, where)
    state = {rename(key, IN_MEMORY): value for key, value in state.items()}
    extra = [key for key in state if re.match(r"classifier|pooler|embeddings\.mask_token", key)]
    if extra:
        print(f"{where}: left out what is not part of the encoder ({', '.join(extra)})")
    for key in [key for key in state if ".query." in key]:
        parts = [key.replace("query", name) for name in ("query", "key", "value")]
        if set(parts) <= state.keys():  # three of [D, D] -> [3*D, D]
            state[key.replace("query", "qkv")] = torch.cat([state.pop(name) for name in parts])
    encoder = empty_encoder(*shape)
    load_weights(encoder, {key: value for key, value in state.items() if key not in extra},
                 HUGGINGFACE, encoder.grid, where)
    for module in encoder.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = config.get("layer_norm_eps", 1e-12)  # their default
    if where is source:
        print(describe(source, config, channels_of(encoder)))
    return encoder


def to_huggingface(encoder, folder, mean, std, which=""):
    """Write config.json, model.safetensors, preprocessor_config.json: an IJepaModel.

    mean, std: of each channel, pixels scaled to 0..1, by which the encoder's images were normalized
    (data.STATISTICS, or a dataset's). which: target or context, which `from_huggingface` then says;
    empty if unknown. Raises UsageError if safetensors is not installed, and for
    volumes and images that are not square.
    """
    check_square(encoder)
    tensors, folder, state = safetensors(), Path(folder), {}
    for key, value in foreign_weights(encoder, HUGGINGFACE, encoder.patch_size).items():
        if ".qkv." in key:  # [3*D, D] -> three of [D, D]
            for name, third in zip(("query", "key", "value"), value.chunk(3)):
                state[key.replace("qkv", name)] = third.clone()
        else:
            state[key] = value
    block, size = encoder.blocks[0], encoder.image_size[0]
    config = {
        "architectures": ["IJepaModel"], "model_type": "ijepa", "hidden_size": encoder.width,
        "num_hidden_layers": len(encoder.blocks), "num_attention_heads": block.attention.heads,
        "intermediate_size": block.mlp[0].out_features, "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": encoder.norm.eps, "image_size": size, "patch_size": encoder.patch_size,
        "qkv_bias": True, "num_channels": channels_of(encoder)}
    if which:
        config["ijepa_encoder"] = which
    preprocessor = {
        "image_processor_type": "ViTImageProcessor", "size": {"height": size, "width": size},
        "do_resize": True, "resample": 2,  # bilinear, as data.resize
        "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
        "image_mean": list(mean), "image_std": list(std)}
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint.write(folder / "model.safetensors",
                     lambda path: tensors.save_file(state, path, metadata={"format": "pt"}))
    for name, content in (("config.json", config), ("preprocessor_config.json", preprocessor)):
        text = json.dumps(content, indent=2) + "\n"
        checkpoint.write(folder / name, lambda path, text=text: path.write_text(text))


# --- any of them ----------------------------------------------------------------------------------


@dataclass
class Pretrained:
    """An encoder in eval mode, and how its images were normalized.

    mean, std: one float a channel, None if only the data can tell; config: of the run that trained
    it, or None.
    """

    encoder: Encoder
    mean: "tuple | None"
    std: "tuple | None"
    config: "Config | None" = None


def channels_of(encoder):
    """Channels of an encoder's images."""
    return encoder.patch_embed.project.in_features // encoder.patch_size ** len(encoder.grid)


def statistics(dataset):
    """Mean and deviation by which data.load normalizes; None, None if it measures the data set."""
    if dataset in VOLUMES or dataset.lower().endswith(".npz"):
        return None, None
    return data.STATISTICS.get(dataset, data.STATISTICS["folder"])


def run_encoder(stored, path):
    """The encoder in a run's encoder.pt, as Pretrained; UsageError if its weights do not fit."""
    config, about = checkpoint.config_from(stored["config"], path), stored["data"]
    encoder = Encoder(*parse_size(config.encoder), (config.image_size,) * about["axes"],
                      config.patch_size, about["channels"]).eval()
    checkpoint.load_weights(encoder, stored["encoder"], path)
    return Pretrained(encoder, *statistics(config.dataset), config)


def pack(folder, path):
    """Write a run's networks with float16 weights: half the size, right to three digits.

    The target encoder as `encoder`, as in encoder.pt; context encoder and predictor by their names.
    If the run has a sketcher, it is written likewise, as NAME-sketcher.pt next to NAME.pt.
    """
    path, (config, _, state) = Path(path), checkpoint.load(folder)
    stored = {"config": asdict(config), "data": state["data"]}
    for key, value in state["model"].items():
        module, name = key.replace("target_encoder", "encoder", 1).split(".", 1)
        stored.setdefault(module, {})[name] = value.half()
    checkpoint.write(path, lambda temporary: torch.save(stored, temporary))
    if (sketcher := Path(folder) / "sketcher.pt").exists():
        drawn = checkpoint.read(sketcher)
        drawn["sketcher"] = {name: value.half() if value.is_floating_point() else value
                             for name, value in drawn["sketcher"].items()}
        checkpoint.write(path.with_name(f"{path.stem}-sketcher.pt"),
                         lambda temporary: torch.save(drawn, temporary))


def load(source, data_dir="data"):
    """Any encoder, as Pretrained.

    source: one of SHIPPED; one of OFFICIAL, downloaded into data_dir once; an official .pth.tar; a
    Hugging Face folder; a run folder or its encoder.pt. Of a run and an official checkpoint it is
    the target encoder, which the paper evaluates. Raises UsageError if it cannot be read.
    """
    path, (mean, std) = locate(source, data_dir), data.STATISTICS["folder"]  # the official code's
    if (path / "encoder.pt").exists():
        path = path / "encoder.pt"
    if path.is_dir():
        encoder = from_huggingface(path)
        return Pretrained(encoder, *normalization(path, channels_of(encoder)))
    stored = read(path)
    if {"config", "data", "encoder"} <= stored.keys():
        return run_encoder(stored, path)
    return Pretrained(official_encoder(stored, "target_encoder", path), mean, std)


# --- a run folder ---------------------------------------------------------------------------------


def renormalize(encoder, old, new):
    """Change an encoder so that it computes the same from images normalized differently.

    old, new: (mean, std), one float a channel. Both normalizations are linear, and so is the patch
    embedding: the difference can be folded into its weights.
    """
    (mean, std), (new_mean, new_std) = (torch.tensor(pair) for pair in (old, new))  # each [C]
    project = encoder.patch_embed.project
    with torch.no_grad():
        weight = project.weight.unflatten(1, (len(mean), -1))  # [D, C, pixels of a patch]
        project.bias += (weight.sum(-1) * (new_mean - mean) / std).sum(-1)
        project.weight.copy_((weight * (new_std / std)[:, None]).flatten(1))


def size_of(module):
    """'width x depth x heads' of an Encoder or a Predictor, as in --encoder.

    Raises UsageError for what these settings do not express.
    """
    block, width = module.blocks[0], module.norm.normalized_shape[0]
    hidden = block.mlp[0].out_features
    why = None
    if hidden != 4 * width:
        why = f"its MLPs are {hidden} wide, not 4 x {width}"
    elif "positions" in module.state_dict():
        why = "its positions are learned or interpolated, not sines and cosines"
    elif block.norm1.eps != 1e-6:
        why = f"its layer norms add {block.norm1.eps:g}, not 1e-06"
    if why:
        raise UsageError(f"a run folder cannot hold this encoder: {why}; in Python, "
                         "extras.pretrained.load can use it")
    return f"{width}x{len(module.blocks)}x{block.attention.heads}"


def find_modules(source, data_dir):
    """What of a model a source has, by its name in a checkpoint, and the encoder as Pretrained."""
    path = locate(source, data_dir)
    if path.is_file() and "target_encoder" in read(path):
        model = from_official(path)
        return (dict(model.named_children()),
                Pretrained(model.target_encoder, *data.STATISTICS["folder"]))
    found = load(path)
    modules = {"target_encoder": found.encoder}
    if path.is_file() and "predictor" in (stored := read(path)):  # what `pack` wrote
        model, _ = train.build(found.config, channels_of(found.encoder), len(found.encoder.grid))
        for name in ("context_encoder", "predictor"):
            modules[name] = getattr(model, name)
            checkpoint.load_weights(modules[name], stored[name], path)
    return modules, found


def run_config(modules, found, out, dataset, data_dir):
    """The Config of a run folder that holds these modules."""
    config, encoder = found.config, found.encoder
    if config is None:
        sizes = {"encoder": size_of(encoder)}
        if "predictor" in modules:
            sizes["predictor"] = size_of(modules["predictor"])
        config = from_preset("imagenet-vit-huge", image_size=encoder.image_size[0],
                             patch_size=encoder.patch_size, **sizes)
    return replace(config, out=str(out), data_dir=data_dir, dataset=dataset or config.dataset)


def adapt(modules, found, dataset, data_dir):
    """Renormalize the encoders among the modules for a data set, if it is normalized differently.

    Raises UsageError if its images have a different number of channels.
    """
    new = statistics(dataset)
    if new[0] is None:
        measured = data.load(dataset, data_dir=data_dir)
        new = tuple(measured.mean), tuple(measured.std)
    if len(new[0]) != channels_of(found.encoder):
        raise UsageError(f"--dataset {dataset} has images of {len(new[0])} channels, the encoder "
                         f"takes {channels_of(found.encoder)}")
    old = found.mean, found.std
    if found.mean is None or old == new:
        return
    for module in modules.values():
        if isinstance(module, Encoder):
            renormalize(module, old, new)


def write_run(source, out, dataset="", data_dir="data"):
    """Make a run folder of any weights that `load` takes, for evaluate.py; returns its modules.

    Of an official checkpoint it holds both encoders and the predictor, of others the encoder; of a
    run that ships with this code, all three, and its sketcher.
    dataset: what it will be evaluated on, by default what it was trained on; a difference in how
    the two are normalized is folded into the patch embedding. Raises UsageError if out holds a run,
    or if a run folder cannot hold the encoder.
    """
    modules, found = find_modules(source, data_dir)
    config = run_config(modules, found, out, dataset, data_dir)
    if dataset:
        adapt(modules, found, dataset, data_dir)
    encoder = found.encoder
    about = {"name": config.dataset, "images": 0, "channels": channels_of(encoder),
             "axes": len(encoder.grid), "classes": 0, "fingerprint": ""}
    weights = {f"{name}.{key}": value for name, module in modules.items()
               for key, value in module.state_dict().items()}
    progress = {"step": 0, "total": 0, "seconds": 0.0}
    state = checkpoint.finished(config, about, progress, weights)
    small = {"config": state["config"], "data": about, "encoder": encoder.state_dict()}
    sketcher = FOLDER / f"{source}-sketcher.pt"
    with checkpoint.open_folder(config, resume=False) as folder:
        checkpoint.write(folder / "checkpoint.pt", lambda path: torch.save(state, path))
        checkpoint.write(folder / "encoder.pt", lambda path: torch.save(small, path))
        if sketcher.exists() and not dataset:  # it draws images normalized as in training
            shutil.copy(sketcher, folder / "sketcher.pt")
    return modules


def main(argv=None):
    """The command line: weights from elsewhere become a run folder."""
    p = command_line.Parser(description="Make a run folder of weights from elsewhere.")
    p.add_argument("source", metavar="NAME_OR_PATH",
                   help=f"{', '.join(SHIPPED)}, which ships with this code; official weights, "
                        f"downloaded once (10 to 17 GB): {', '.join(OFFICIAL)}; a .pth.tar, a "
                        "Hugging Face folder, or a run's encoder.pt")
    p.add_argument("--out", required=True, help="the run folder")
    p.add_argument("--dataset", default="", help="data set to evaluate on; the encoder is adapted "
                                                 "to its normalization (default: as trained)")
    p.add_argument("--data-dir", default="data", help="folder that holds, or receives, downloads")
    args = p.parse_args(argv)
    modules = write_run(args.source, args.out, args.dataset, args.data_dir)
    names = ", ".join(name.replace("_", " ") for name in modules)
    print(f"{args.out} holds: {names}; next: python evaluate.py {args.out}")


if __name__ == "__main__":
    command_line.run(main)
