"""The settings of a run, one comment each, and the presets.

`python train.py --help` shows the same comments; every setting is a flag. "Paper" is Assran et al.,
"Self-Supervised Learning from Images with a Joint-Embedding Predictive Architecture", CVPR 2023
(arXiv:2301.08243).
"""

import math
from dataclasses import dataclass, field, fields

from support.checks import UsageError, check, check_choice, check_range, nearest  # noqa: F401

Pair = tuple[float, float]


def setting(default, comment, choices=None):
    """A field with the comment that `--help` shows and, if only a few values are allowed, those."""
    return field(default=default, metadata={"comment": comment, "choices": choices})


@dataclass
class Config:
    # Data
    dataset: str = setting(
        "shapes", "shapes, shapes3d, cifar10, cifar100, stl10, organmnist3d, a folder, or a .npz")
    split: str = setting("train", "pretraining images; stl10 also has unlabeled, train+unlabeled")
    data_dir: str = setting("data", "folder that holds, or receives, the downloaded data sets")
    image_size: int = setting(24, "side of the training crop in pixels (paper 224)")
    crop_scale: Pair = setting((1.0, 1.0), "range of the random crop's area (official code .3 1)")
    flip: bool = setting(False, "mirror half of the images (official code: no)")
    workers: int = setting(8, "processes that decode an image folder too large for memory")
    # Masks (paper section 3)
    num_targets: int = setting(4, "target blocks M in each image (paper 4)")
    target_scale: Pair = setting((0.15, 0.2), "area of a target block / grid (paper .15 .2)")
    target_aspect: Pair = setting((0.75, 1.5), "height / width of a target block (paper .75 1.5)")
    context_scale: Pair = setting((0.85, 1.0), "area of the context block / grid (paper .85 1)")
    context_size: int = setting(12, "context patches kept, chosen at random; 0 keeps all (paper)")
    merge_targets: bool = setting(
        True, "predict all target blocks in one pass, not one pass for each (paper: each)")
    # Model (paper section 3 and appendix A)
    patch_size: int = setting(4, "side of a square patch in pixels (paper 14 or 16)")
    encoder: str = setting(
        "64x3x1", "tiny, small, base, large, huge, or width x depth x heads, such as 192x6x3")
    predictor: str = setting("32x2x1", "width x depth x heads (paper 384x6x12 for base)")
    loss: str = setting("smooth_l1", "smooth_l1 (official code) or l2 (paper)", ("smooth_l1", "l2"))
    # Optimization: every schedule counts optimizer steps
    epochs: int = setting(10, "passes over the training images (paper 300 to 600)")
    max_steps: int = setting(0, "stop after this many steps, which the schedules span; 0: no limit")
    batch_size: int = setting(64, "images in a forward pass (paper 2048 over 16 GPUs)")
    accumulation: int = setting(1, "forward passes per optimizer step")
    lr: float = setting(3e-3, "learning rate after the warmup (paper 1e-3)")
    lr_start: float = setting(3e-4, "learning rate at the first step (paper 1e-4)")
    lr_final: float = setting(1e-6, "learning rate at the last step, along a cosine (paper 1e-6)")
    warmup: float = setting(0.05, "fraction of the steps that warm up (paper 15 of 600 epochs)")
    betas: Pair = setting((0.9, 0.95), "AdamW's decay rates (official code .9 .999)")
    weight_decay: float = setting(0.04, "weight decay at the first step (paper .04)")
    weight_decay_final: float = setting(
        0.04, "weight decay at the last step, along a cosine (paper .4)")
    clip_grad: float = setting(0.0, "largest gradient norm; 0 does not clip (paper)")
    momentum: float = setting(0.995, "EMA momentum at the first step (paper .996)")
    momentum_final: float = setting(0.995, "EMA momentum at the last step, linearly (paper 1)")
    # The run
    held_out: int = setting(
        512, "training images held out to measure the features on, at most a tenth of all")
    measurements: int = setting(20, "how many times a run measures its features; 0 is never")
    seed: int = setting(0, "seed of the initial weights, data order, crops and masks")
    device: str = setting(
        "auto", "auto is cuda where there is one, else cpu", ("auto", "cpu", "cuda", "mps"))
    precision: str = setting(
        "auto", "auto is bf16 if the GPU or CPU has units for it, fp16 on an older GPU, else fp32",
        ("auto", "fp32", "bf16", "fp16"))
    compile: bool = setting(False, "use torch.compile: slower to start; a CPU needs a C++ compiler")
    checkpoint_minutes: float = setting(2.0, "minutes between two checkpoints")
    log_to: str = setting("", "besides metrics.csv: tensorboard, or wandb:PROJECT")
    out: str = setting("", "run folder; empty is runs/PRESET")


# To keep 20 of 64 patches, a target block has to be replaced by a copy of the first one in 7.5% of
# the images (shapes, 12 of 36: 1.2%; docs/differences.md).
CIFAR = dict(
    dataset="cifar10", image_size=32, encoder="192x6x3", predictor="96x4x2", crop_scale=(0.3, 1.0),
    flip=True, context_size=20, epochs=300, batch_size=256, lr=1e-3, lr_start=1e-4,
    weight_decay_final=0.4, momentum=0.996, momentum_final=1.0)
# As in the paper and in other code: all of the context, one pass of the predictor for each block.
WHOLE = dict(CIFAR, crop_scale=(1.0, 1.0), flip=False, context_size=0, merge_targets=False,
             betas=(0.9, 0.999))
PRESETS = {
    # Synthetic images, minutes on a laptop's CPU: the defaults above. A short run needs many steps
    # and a target encoder that keeps up; a momentum that rises to 1 would freeze it before the end.
    "shapes": {},
    # Synthetic volumes, likewise. There are fewer of them, so each is cropped anew in every epoch.
    "shapes3d": dict(
        dataset="shapes3d", image_size=16, crop_scale=(0.6, 1.0), context_size=20, epochs=40),
    # Volumes of organs, 28 voxels a side; --dataset takes its relatives, such as nodulemnist3d. Not
    # mirrored, for the left and the right kidney are two classes.
    "medmnist3d": dict(
        CIFAR, dataset="organmnist3d", image_size=28, patch_size=7, crop_scale=(0.6, 1.0),
        flip=False, batch_size=64, context_size=16),
    "cifar10": CIFAR,
    "cifar100": dict(CIFAR, dataset="cifar100"),
    "stl10": dict(
        CIFAR, dataset="stl10", split="train+unlabeled", image_size=96, patch_size=8,
        encoder="small", predictor="192x6x6", epochs=100, context_size=48),
    # A public STL-10 recipe: ViT-B/16 at 224 pixels. Differs: weight decay follows a cosine.
    "stl10-vit-base": dict(
        WHOLE, dataset="stl10", split="unlabeled", image_size=224, patch_size=16, encoder="base",
        predictor="384x6x12", epochs=50, batch_size=64, accumulation=4, warmup=0.3,
        betas=(0.9, 0.95), loss="l2"),
    # A public CIFAR-10 recipe (github.com/sombersomni/ijepa-homemade). Differs: the loss is a mean,
    # there a sum, and targets are layer-normed.
    "cifar10-peer": dict(
        WHOLE, encoder="192x6x6", predictor="96x4x6", target_scale=(0.15, 0.25), flip=True,
        context_scale=(0.75, 0.95), epochs=100, lr_final=1e-5, warmup=0.1, weight_decay=0.05,
        weight_decay_final=0.05, loss="l2"),
    # The paper's ViT-H/14 on ImageNet-1k with the official code's schedules; its batch of 2048 is
    # accumulated.
    "imagenet-vit-huge": dict(
        WHOLE, dataset="data/imagenet", image_size=224, patch_size=14, crop_scale=(0.3, 1.0),
        encoder="huge", predictor="384x12x16", batch_size=64, accumulation=32, warmup=40 / 300,
        lr_start=2e-4),
    # A few thousand images and a few hundred steps (extras/estimator.py). So high a rate needs a
    # long warmup: without it the features of different images first become alike.
    "small": dict(
        image_size=32, patch_size=8, encoder="48x2x2", predictor="32x1x2", num_targets=2,
        context_size=0, merge_targets=False, epochs=30, batch_size=64, lr=6e-3, lr_start=6e-4,
        lr_final=1e-3, warmup=0.5, weight_decay=0.1, weight_decay_final=0.1, momentum=0.98,
        momentum_final=0.98),
}
# Named encoders: width, depth, heads (the ViT papers; huge as in I-JEPA's appendix A.1).
SIZES = {"tiny": (192, 12, 3), "small": (384, 12, 6), "base": (768, 12, 12),
         "large": (1024, 24, 16), "huge": (1280, 32, 16)}


def parse_size(size, name="encoder"):
    """(width, depth, heads) of a name in SIZES or of 'width x depth x heads', such as 192x6x3."""
    if size in SIZES:
        return SIZES[size]
    parts = size.split("x")
    check(len(parts) == 3 and all(part.isdecimal() and 0 < int(part) < 10_000 for part in parts),
          name, size, f"width x depth x heads, such as 192x6x3, or {', '.join(SIZES)}")
    width, depth, heads = map(int, parts)
    check(width % heads == 0 and width % 4 == 0, name, size,
          "a width divisible by 4 and by the number of heads")
    return width, depth, heads


def from_preset(name="shapes", **changes):
    """The Config of a preset with some settings changed; UsageError for what no run could use."""
    check_choice("--preset", name, PRESETS)
    for unknown in changes.keys() - Config.__dataclass_fields__.keys():
        check_choice("the setting's name", unknown, Config.__dataclass_fields__)
    config = Config(**{"out": f"runs/{name}", **PRESETS[name], **changes})
    validate(config)
    return config


KINDS = {int: "a whole number from 0 to 2147483647", float: "a finite number, 0 or more",
         bool: "True or False", str: "a string", Pair: "two finite numbers, 0 or more"}
POSITIVE = ("image_size", "patch_size", "num_targets", "epochs", "batch_size", "accumulation", "lr")


def is_number(value, whole=False):
    """Whether a value is a number that a run can use: finite, not negative, and no bool."""
    kinds, limit = (int, 2**31) if whole else ((int, float), math.inf)
    return isinstance(value, kinds) and not isinstance(value, bool) and 0 <= value < limit


def validate(config):
    """Raise UsageError for a setting of the wrong type or with a value that no run could use."""
    for f in fields(Config):
        value = getattr(config, f.name)
        if f.type is Pair:
            right = isinstance(value, tuple) and len(value) == 2 and all(map(is_number, value))
        elif f.type in (int, float):
            right = is_number(value, whole=f.type is int)
        else:
            right = isinstance(value, f.type)
        check(right, f.name, value, KINDS[f.type])
        if f.metadata["choices"]:
            check_choice("--" + f.name.replace("_", "-"), value, f.metadata["choices"])
    check(config.dataset, "dataset", config.dataset, "a name, a folder or a .npz file")
    for name in POSITIVE:
        check(getattr(config, name) > 0, name, getattr(config, name), "more than 0")
    check_range("crop_scale", config.crop_scale, 1e-6, 1)
    check(max(config.betas) < 1, "betas", config.betas, "two numbers below 1")
    for name in ("warmup", "momentum", "momentum_final"):
        check(getattr(config, name) <= 1, name, getattr(config, name), "a number from 0 to 1")
    check(config.image_size % config.patch_size == 0, "patch_size", config.patch_size,
          f"a divisor of the image size, {config.image_size} pixels")
    parse_size(config.encoder)
    parse_size(config.predictor, "predictor")
