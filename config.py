"""Every setting of a run in one dataclass, the presets, and the command-line flags made from them.

Each field carries its own comment (unit, the paper's value, why ours differs); `--help` prints the same
comment, so that the two cannot drift apart. The paper is Assran et al., "Self-Supervised Learning from Images
with a Joint-Embedding Predictive Architecture", CVPR 2023 (arXiv:2301.08243).
"""

import argparse
import dataclasses
import difflib
import math
import os
import re
import shlex
import sys
from dataclasses import dataclass, field


class UsageError(ValueError):
    """Something the user asked for cannot be done; the message is one line that says what and what to try."""


def setting(default, comment, choices=None):
    """A dataclass field with the comment that `--help` shows and, where the values are few, the allowed ones."""
    return field(default=default, metadata={"comment": comment, "choices": choices})


LARGEST = 2**31 - 1  # of every whole number
SEEDS = f"a whole number from 0 to {LARGEST}"


@dataclass
class Config:
    # Data
    preset: str = setting("shapes", "named recipe that the other flags change")
    dataset: str = setting("shapes", "shapes, shapes3d, cifar10, cifar100, stl10, organmnist3d (or its like), an image folder, a .npz")
    split: str = setting("train", "images to pretrain on; stl10 also has unlabeled and train+unlabeled")
    data_dir: str = setting("data", "folder that holds, or receives, the downloaded archives")
    image_size: int = setting(24, "side of the training crop, pixels (paper 224)")
    crop_scale: tuple[float, float] = setting((1.0, 1.0), "random resized crop: least and most area, of the image (official .3 1.0)")
    flip: bool = setting(False, "mirror half of the images (official code: no)")
    # Masks, paper section 3
    num_targets: int = setting(4, "target blocks M in each image (paper 4)")
    target_scale: tuple[float, float] = setting((0.15, 0.2), "area of a target block, fraction of the grid (paper .15 .2)")
    target_aspect: tuple[float, float] = setting((0.75, 1.5), "height over width of a target block (paper .75 1.5)")
    context_scale: tuple[float, float] = setting((0.85, 1.0), "area of the context block before the targets are removed (paper .85 1.0)")
    context_size: int = setting(0, "keep just this many context patches, chosen at random; 0 keeps all")
    mask_mode: str = setting(
        "pad", "pad: each image has its own block sizes; truncate: one size a batch, cut to the shortest", ("pad", "truncate"))
    min_keep: int = setting(4, "least context patches an image may be left with (official code 10)")
    allow_overlap: bool = setting(False, "leave the targets' patches in the context (paper: no)")
    # Model, paper section 3 and appendix A
    encoder: str = setting("64x3x1", "named size (tiny, small, base, large, huge, giant) or width x depth x heads, as in 192x6x6")
    predictor: str = setting("32x2x1", "width x depth x heads (paper 384x6x12 for base, 384x12 for large and huge)")
    registers: int = setting(0, "learned tokens beside each image's patches, dropped at the end (paper 0)")
    stochastic_depth: float = setting(0.0, "probability that the context encoder skips its last block; less for those before (paper 0)")
    patch_size: int = setting(4, "side of a square patch, pixels (paper 14 or 16)")
    loss: str = setting("smooth_l1", "smooth_l1 (official code) or l2 (paper), both averaged over patches and width", ("smooth_l1", "l2"))
    # What is trained, and I-JEPA with a part taken away
    method: str = setting("ijepa", "what is trained: ijepa, mae, supervised, or an ablation, which stands for some of the flags below")
    targets: str = setting("features", "what is predicted: features of the target encoder (paper), or each patch's normalised pixels",
                           ("features", "pixels"))
    masks: str = setting("blocks", "blocks (paper), random: mask_ratio of all patches, raster: three quarters of the image from one",
                         ("blocks", "random", "raster"))
    mask_ratio: float = setting(0.75, "fraction of the patches that random masks, and the masked autoencoder, hide (MAE .75)")
    masked_input: bool = setting(False, "the target encoder sees one target block at a time, not the whole image (paper table 11)")
    stop_gradient: bool = setting(True, "no: the context encoder makes its own targets and gradients reach them; to see it collapse")
    target_layers: int = setting(1, "targets are the mean of the target encoder's last so many blocks (paper 1; data2vec: several)")
    vicreg: float = setting(0.0, "weight of VICReg's variance and covariance terms on the context's pooled features (C-JEPA; paper 0)")
    target_norm: bool = setting(True, "no: targets are not layer-normed, to see what that norm is for")
    # Optimisation; every schedule is counted in optimizer steps
    epochs: int = setting(10, "passes over the training images (paper 300 to 600)")
    batch_size: int = setting(128, "images in one forward pass (paper 2048 over 16 GPUs)")
    accumulation: int = setting(1, "forward passes to an optimizer step; the step sees batch_size x accumulation images")
    recompute: bool = setting(False, "compute each block's activations again in the backward pass instead of keeping them: less memory, "
                                     "about a third more time")
    compile: bool = setting(False, "run the model through torch.compile: slower to start, meant for a GPU; a CPU needs a C++ compiler")
    optimizer: str = setting("adamw", "adamw (paper), adam or sgd", ("adamw", "adam", "sgd"))
    betas: tuple[float, float] = setting((0.9, 0.999), "Adam's two decay rates; sgd takes the first as its momentum")
    schedule: str = setting("cosine", "learning rate after the warmup: cosine (paper) or constant", ("cosine", "constant"))
    lr: float = setting(1e-3, "learning rate after the warmup (paper 1e-3)")
    lr_start: float = setting(1e-4, "learning rate at the first step (paper 1e-4)")
    lr_final: float = setting(1e-6, "learning rate at the last step (paper 1e-6)")
    warmup: float = setting(0.05, "fraction of all steps spent warming up (paper 15 of 600 epochs; official code 40 of 300)")
    weight_decay: float = setting(0.04, "weight decay at the first step (paper .04)")
    weight_decay_final: float = setting(0.4, "weight decay at the last step, reached along a cosine (paper .4)")
    decay_all: bool = setting(False, "decay biases and norms too (official code: no)")
    clip_grad: float = setting(0.0, "largest gradient norm; 0 leaves gradients alone (paper: none)")
    momentum: float = setting(0.996, "EMA momentum of the target encoder at the first step (paper .996)")
    momentum_final: float = setting(1.0, "EMA momentum at the last step, reached linearly (paper 1.0)")
    # The run
    held_out: int = setting(512, "training images kept out of training, at most a tenth of all, on which the features are measured")
    measurements: int = setting(20, "times that a run measures its features; 0 is never")
    seed: int = setting(0, "seed of initialisation, data order, crops and masks")
    device: str = setting("auto", "auto takes cuda, else mps, else cpu", ("auto", "cpu", "cuda", "mps"))
    precision: str = setting("auto", "auto is bf16 autocast on cuda and fp32 elsewhere", ("auto", "fp32", "bf16"))
    deterministic: bool = setting(False, "only operations that give the same bits every time, refusing those that cannot; slower on a GPU")
    workers: int = setting(8, "processes that decode an image folder too large for memory; no more than there are cores")
    max_steps: int = setting(0, "end after this many optimizer steps, schedules fitted to them; 0 is no limit")
    max_minutes: float = setting(0.0, "end after this many minutes, schedules fitted to them; 0 is no limit")
    checkpoint_minutes: float = setting(2.0, "minutes between two checkpoints")
    tensorboard: bool = setting(False, "log to TensorBoard as well, in the run folder (pip install tensorboard)")
    wandb: str = setting("", "log to this project of Weights & Biases as well (pip install wandb)")
    out: str = setting("", "run folder; empty is runs/PRESET")


CIFAR = dict(
    dataset="cifar10", image_size=32, patch_size=4, encoder="192x6x3", predictor="96x4x2", crop_scale=(0.3, 1.0), flip=True,
    epochs=300, batch_size=256, lr=1e-3, context_size=20,
)
PRESETS = {
    # Embedded images, a laptop CPU, minutes. So short a run wants a high rate and a target that keeps up with the context encoder:
    # a momentum that rises to 1 would freeze it before the end.
    "shapes": dict(lr=4e-3, lr_start=4e-4, weight_decay_final=0.04, momentum=0.99, momentum_final=0.99, context_size=12),
    # Embedded volumes, likewise.
    "shapes3d": dict(
        dataset="shapes3d", image_size=16, epochs=25, lr=8e-3, lr_start=8e-4, weight_decay_final=0.04, momentum=0.98, momentum_final=0.98,
        context_size=20,
    ),
    # Volumes of organs, 28 voxels a side; a name of its like, as nodulemnist3d, may be given with --dataset. There are a thousand only, so
    # the epochs are many; no mirroring, for left and right organs are two classes.
    "medmnist3d": dict(
        dataset="organmnist3d", image_size=28, patch_size=7, encoder="192x6x3", predictor="96x4x2", crop_scale=(0.6, 1.0), epochs=300,
        batch_size=64, lr=1e-3, context_size=16,
    ),
    "cifar10": CIFAR,
    "cifar100": dict(CIFAR, dataset="cifar100"),
    "stl10": dict(
        dataset="stl10", split="train+unlabeled", image_size=96, patch_size=8, encoder="small", predictor="192x6x6",
        crop_scale=(0.3, 1.0), flip=True, epochs=100, batch_size=256, context_size=48,
    ),
    # A public STL-10 recipe (ViT-B/16 at 224 pixels, 50 epochs), with our cosine for its linear weight decay.
    "stl10-vit-base": dict(
        dataset="stl10", split="unlabeled", image_size=224, patch_size=16, encoder="base", predictor="384x6x12", epochs=50,
        batch_size=64, accumulation=4, lr=1e-3, warmup=0.3, betas=(0.9, 0.95), loss="l2", min_keep=10,
    ),
    # A public CIFAR-10 recipe (github.com/sombersomni/ijepa-homemade); ours averages the loss where it sums, and layer-norms targets.
    "cifar10-peer": dict(
        dataset="cifar10", image_size=32, patch_size=4, encoder="192x6x6", predictor="96x4x6", target_scale=(0.15, 0.25),
        context_scale=(0.75, 0.95), flip=True, epochs=100, batch_size=256, lr=1e-3, lr_final=1e-5, warmup=0.1,
        weight_decay=0.05, weight_decay_final=0.05, loss="l2",
    ),
    # ViT-H/14 on ImageNet-1k with the official code's schedules; one process here, so the batch of 2048 is accumulated.
    "imagenet-vit-huge": dict(
        dataset="data/imagenet", image_size=224, patch_size=14, encoder="huge", predictor="384x12x16",
        crop_scale=(0.3, 1.0), epochs=300, batch_size=64, accumulation=32, warmup=40 / 300, lr_start=2e-4, min_keep=10,
        mask_mode="truncate",
    ),
    # A few thousand small images and a few hundred steps, as arrays given to estimator.py. So few steps need a high rate, and so high a
    # rate a long warmup: without it the features of different images become alike at first, and the run ends before they part again.
    "small": dict(
        image_size=32, patch_size=8, encoder="48x2x2", predictor="32x1x2", num_targets=2, epochs=30, batch_size=64, lr=6e-3, lr_start=6e-4,
        lr_final=1e-3, warmup=0.5, betas=(0.9, 0.95), weight_decay=0.1, weight_decay_final=0.1, momentum=0.98, momentum_final=0.98,
    ),
}


# What --method stands for: settings it changes after the preset, before the other flags.
METHODS = {
    "ijepa": {},
    "mae": {},
    "supervised": {},
    "ijepa-pixels": {"targets": "pixels"},
    "ijepa-random-masks": {"masks": "random", "mask_ratio": 0.6},
    "ijepa-raster-masks": {"masks": "raster"},
    "ijepa-one-block": {"num_targets": 1},
    "ijepa-no-stop-gradient": {"stop_gradient": False},
    "ijepa-momentum-0": {"momentum": 0.0, "momentum_final": 0.0},
    "ijepa-momentum-1": {"momentum": 1.0, "momentum_final": 1.0},
    "ijepa-masked-input": {"masked_input": True},
}


def near(word, known):
    """'; nearest: X' where one of the known words is spelt nearly like this one, in whatever case; else nothing."""
    known = {name.lower(): name for name in known}
    close = difflib.get_close_matches(word.lower(), known, 1)
    return f"; nearest: {known[close[0]]}" if close else ""


def check_known(what, word, known, more=""):
    """Raise UsageError, with the nearest spelling, where a word is none of the known ones."""
    if word not in known:
        raise UsageError(f"{what} '{word}' is none of {', '.join(known)}{more}{near(word, known)}")


def need(values, condition, name, allowed):
    """Raise UsageError unless the condition holds: the flag of this name, its value among `values` (a Config, or parsed flags), what is
    allowed."""
    if not condition:
        value, flag = getattr(values, name), name.replace("_", "-")
        if isinstance(value, bool):
            raise UsageError(f"--{flag if value else f'no-{flag}'} is given: {allowed}")
        value = " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
        raise UsageError(f"--{flag} is {value or 'empty'}: {allowed}")


def need_choice(values, name, choices):
    """Raise UsageError, with the nearest spelling, unless the value of this name is one of the choices."""
    value = getattr(values, name)
    need(values, value in choices, name, f"choose one of {', '.join(choices)}{near(str(value), choices)}")


def from_preset(name="shapes", **changes):
    """The Config of a preset with some fields changed, checked. Raises UsageError for an unknown name or an impossible value."""
    method = changes.get("method", "ijepa")
    need_choice(argparse.Namespace(preset=name), "preset", PRESETS)
    need_choice(argparse.Namespace(method=method), "method", METHODS)
    unknown = set(changes) - {f.name for f in dataclasses.fields(Config)}
    if unknown:
        raise UsageError(f"no setting is called {', '.join(sorted(unknown))}; `python train.py --help` lists them")
    config = Config(**{"preset": name, **PRESETS[name], **METHODS[method], **changes})
    check(config)
    return config


def check(config):
    """Refuse what no run could use. What needs the grid or the data is checked by the masks, the model and the loaders."""
    def must(condition, name, allowed):
        need(config, condition, name, allowed)

    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if f.metadata["choices"]:
            need_choice(config, f.name, f.metadata["choices"])
        must(value != "" or f.name in ("out", "wandb"), f.name, "it needs a name")
        numbers = value if isinstance(value, tuple) else (value,)
        must(all(math.isfinite(v) for v in numbers if isinstance(v, float)), f.name, "it must be a finite number")
        must(not isinstance(value, int) or value <= LARGEST, f.name, f"it can be {LARGEST} at most")
    must(config.seed >= 0, "seed", SEEDS)
    for name in ("image_size", "patch_size", "num_targets", "target_layers", "epochs", "batch_size", "accumulation", "min_keep"):
        must(getattr(config, name) >= 1, name, "it must be 1 or more")
    for name in ("context_size", "max_steps", "max_minutes", "clip_grad", "weight_decay", "weight_decay_final", "lr_start", "lr_final",
                 "workers", "checkpoint_minutes", "held_out", "measurements", "registers", "vicreg"):
        must(getattr(config, name) >= 0, name, "it cannot be negative")
    for name in ("crop_scale", "target_scale", "context_scale"):
        low, high = getattr(config, name)
        must(0 < low <= high <= 1, name, "two fractions of an area, 0 < least <= most <= 1")
    low, high = config.target_aspect
    must(0.01 <= low <= high <= 100, "target_aspect", "two ratios, .01 <= least <= most <= 100")
    must(all(0 <= beta < 1 for beta in config.betas), "betas", "two decay rates from 0 to below 1")
    must(config.lr > 0, "lr", "it must be above 0")
    must(0 <= config.warmup <= 1, "warmup", "a fraction of the run, from 0 to 1")
    must(0 <= config.stochastic_depth < 1, "stochastic_depth", "a probability, from 0 to below 1")
    must(0 < config.mask_ratio < 1, "mask_ratio", "a fraction of the patches, above 0 and below 1")
    for name in ("momentum", "momentum_final"):
        must(0 <= getattr(config, name) <= 1, name, "a number from 0 to 1")
    must(config.image_size % config.patch_size == 0, "patch_size", f"it must divide the --image-size of {config.image_size} pixels")
    for name, value in METHODS[config.method].items():
        must(name == "mask_ratio" or getattr(config, name) == value, name,
             f"--method {config.method} stands for {value}; leave one of the two out")
    # What nobody would read is refused, lest someone believe that it was.
    must(config.mask_ratio == Config.mask_ratio or config.method == "mae" or config.masks == "random", "mask_ratio",
         "it is for --masks random and --method mae; leave it out")
    reader, unread = "", ()
    if config.method in ("mae", "supervised"):
        reader, unread = f"--method {config.method}", ("targets", "masks", "masked_input", "stop_gradient", "target_norm",
                                                      "target_layers", "vicreg")
    elif config.targets == "pixels":
        reader, unread = "--targets pixels", ("masked_input", "stop_gradient", "target_norm", "target_layers")
    elif config.masked_input:
        reader, unread = "--masked-input", ("stop_gradient", "target_layers")
    for name in unread:
        must(getattr(config, name) == getattr(Config, name), name, f"{reader} makes nothing of it; leave one of the two out")


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line that says what is allowed, with the nearest flag where one is misspelt."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, **options)
        self._negative_number_matcher = re.compile(r"-(\d|\.\d|inf|nan)")  # argparse's own takes the -1e-3 of `--lr -1e-3` for a flag

    def error(self, message):
        if wrong := re.match(r"argument (\S+): invalid (int|float) value: '(.*)'", message):
            kind = {"int": "a whole number, as 12", "float": "a number, as 0.5"}[wrong[2]]
            raise UsageError(f"{wrong[1]} is {wrong[3] or 'empty'}: it must be {kind}")
        more = ""
        if unknown := re.search(r"unrecognized arguments: (\S*)", message):
            more = near(unknown[1], self._option_string_actions) if unknown[1].startswith("--") else "; no flag takes it"
        raise UsageError(f"{message}{more} (--help lists what there is)")


def parser(description):
    """An argument parser with one flag per Config field; `--help` shows each field's comment and its value in the default preset."""
    defaults = from_preset("shapes")
    p = Parser(description=description + " Defaults, in brackets, are those of the preset shapes.", epilog=f"presets: {', '.join(PRESETS)}")
    for f in dataclasses.fields(Config):
        flag, show = "--" + f.name.replace("_", "-"), str(getattr(defaults, f.name)).strip("()").replace(",", "") or "empty"
        comment = f.metadata["comment"].replace("%", "%%") + f" [{show}]"
        if f.type is bool:
            p.add_argument(flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=comment)
        elif f.type in (int, float, str):
            p.add_argument(flag, type=f.type, default=argparse.SUPPRESS, metavar=f.type.__name__.upper(), help=comment)
        else:
            p.add_argument(flag, type=float, nargs=2, default=argparse.SUPPRESS, metavar="NUMBER", help=comment)
    return p


def given(arguments):
    """The fields that parsed flags (an argparse Namespace) set, as a dict; names that are no field are left out."""
    names = {f.name for f in dataclasses.fields(Config)}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in vars(arguments).items() if name in names}


def from_arguments(arguments):
    """The Config asked for by parsed command-line flags."""
    fields = given(arguments)
    return from_preset(fields.pop("preset", "shapes"), **fields)


def from_dict(values):
    """The Config that `dataclasses.asdict` wrote, as a JSON file or a checkpoint gives it back (tuples became lists)."""
    return from_arguments(argparse.Namespace(**values))


def command(config):
    """The command that trains with this Config: `python train.py` and a flag for each field that its preset leaves otherwise."""
    preset = Config(**{"preset": config.preset, **PRESETS[config.preset], **METHODS[config.method]})
    words = ["python train.py --preset", config.preset]
    for name, value in vars(config).items():
        flag = name.replace("_", "-")
        if value == getattr(preset, name):
            continue
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words.append(f"--{flag} {' '.join(map(str, value)) if isinstance(value, tuple) else shlex.quote(str(value))}")
    return " ".join(words)


def run(main):
    """Call `main()`; a UsageError becomes one line on stderr and exit code 2, as argparse does with a wrong flag.

    So does an OSError, which names its file (a full disk, missing rights, a file in a folder's place), and memory that is too small.
    """
    try:
        main()
    except (UsageError, OSError, MemoryError, RuntimeError) as error:
        if isinstance(error, (MemoryError, RuntimeError)):
            if not isinstance(error, MemoryError) and not re.search("out of memory|can't allocate memory", str(error)):  # torch's words
                raise
            error = "memory is too small; lower --batch-size, --image-size, --encoder or --predictor, in evaluation --train-images"
        rank = os.environ.get("RANK", "0")  # set by torchrun
        print(f"error: {error}" if rank == "0" else f"error in process {rank}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit("interrupted")
