"""How fast a preset trains on this machine, and how much of what the machine can do that is.

    python -m extras.benchmark --preset cifar10
    python -m extras.benchmark --preset stl10-vit-base --synthetic --json speed.json
    python -m extras.benchmark --preset stl10 --batch-size 64         any flag of train.py

--synthetic measures on random images: nothing is downloaded. The train step is timed with its
batches already on the device, the data path (images and masks) and the masks on their own.

FLOPs are counted from the shapes, a multiplication and its addition as two. *Useful* FLOPs are
those at the tokens that images really have, *spent* those at all tokens computed; the difference is
padding. Utilization is FLOPs per image x images/s, divided by the FLOP/s of a large matrix
multiplication in the same precision. No model reaches that: it does more than multiply.
"""

import datetime
import json
import os
import platform
import sys
from pathlib import Path

import torch
from torch.utils.benchmark import Timer

import data
import train
from config import UsageError, check, parse_size
from support import checkpoint, command_line, distributed
from support.download import VOLUMES

# Side of a data set's stored images in pixels; others: --image-size.
STORED = {"shapes": 24, "shapes3d": 16, "cifar10": 32, "cifar100": 32, "stl10": 96,
          **dict.fromkeys(VOLUMES, 28)}
# Sides of the square matrices that are multiplied.
MATRICES = {"cuda": (2048, 4096, 8192), "mps": (1024, 2048, 4096), "cpu": (512, 1024, 2048)}

# --- time -----------------------------------------------------------------------------------------


def timer(call):
    """A torch.utils.benchmark.Timer of a call: it waits for the GPU only before and after a block.

    (By itself it would use one thread.)
    """
    return Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())


def rate(images, seconds):
    """Images per second of blocks of calls: a dict with the median and, as the spread, quartiles.

    images: that one call processes; seconds: of one call, a list with the mean of each block.
    """
    points = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    low, middle, high = (images / torch.tensor(seconds).double()).quantile(points).tolist()
    return {"images_per_second": middle, "quartiles": [low, high], "blocks": len(seconds)}


def measure_rate(images, call, seconds):
    """The `rate` of a call that processes so many images, measured for some seconds."""
    return rate(images, timer(call).blocked_autorange(min_run_time=seconds).times)


def matmul_rate(device, dtype, seconds):
    """What a product of two square matrices reaches, best of a few sizes: a dict with FLOP/s."""
    found = []
    for side in MATRICES[device.type]:
        a, b = torch.randn(2, side, side, device=device).to(dtype)
        time = timer(lambda a=a, b=b: a @ b).blocked_autorange(min_run_time=seconds / 3).median
        found.append((2 * side**3 / time, side))
    flops_per_second, side = max(found)
    return {"flops_per_second": flops_per_second, "side": side, "precision": name_of(dtype)}


# --- work -----------------------------------------------------------------------------------------


def blocks_flops(width, depth, tokens, mlp_ratio=4):
    """FLOPs of one forward pass of transformer blocks; tokens: how many, a number or a tensor."""
    linear = 2 * tokens * (3 + 1 + 2 * mlp_ratio) * width**2  # q, k, v; projection; MLP
    attention = 2 * 2 * tokens**2 * width  # queries times keys, scores times values, all heads
    return depth * (linear + attention)


def step_flops(config, channels, axes, context, targets):
    """Mean FLOPs per image of a training step's matrix products, forward and backward, a float.

    context [n], targets [n, M]: tokens of n images, float64. What is trained costs three forward
    passes (the gradients of the weights and of the inputs cost one each), the target encoder one.
    The patch embedding, which embeds all N patches, costs two: images need no gradient. Norms,
    softmax, loss and optimizer are not counted.
    """
    (D, depth, _), (Dp, shallow, _) = (parse_size(config.encoder), parse_size(config.predictor))
    N = (config.image_size // config.patch_size) ** axes
    embed = 2 * N * channels * config.patch_size**axes * D
    encode = blocks_flops(D, depth, context)  # [n]
    predict = 2 * context * D * Dp + 2 * targets.sum(1) * Dp * D  # into the predictor and out: [n]
    predict = predict + blocks_flops(Dp, shallow, context[:, None] + targets).sum(1)
    target = embed + blocks_flops(D, depth, N)
    return (2 * embed + 3 * (encode + predict) + target).mean().item()


def count_tokens(masking, B, batches=8):
    """Tokens of a few batches' images: {"useful": (context [n], targets [n, M]), "spent": ...}.

    Useful are the real ones, spent those with padding; float64.
    """
    generator, useful, spent = torch.Generator().manual_seed(0), [], []
    for masks in (masking(B, generator) for _ in range(batches)):
        valid = masks.context_valid.double(), masks.targets_valid.double()  # [B, Nc], [B, M, Nt]
        useful.append([part.sum(-1) for part in valid])
        spent.append([torch.ones_like(part).sum(-1) for part in valid])
    return {name: tuple(map(torch.cat, zip(*counts)))
            for name, counts in (("useful", useful), ("spent", spent))}


def work(config, dataset, masking):
    """FLOPs per image, useful and spent, and the mean number of tokens behind them, a dict."""
    counts = count_tokens(masking, config.batch_size)
    flops = {name: step_flops(config, *dataset.shape, *tokens) for name, tokens in counts.items()}
    tokens = {name: {"context": context.mean().item(), "target_block": targets.mean().item()}
              for name, (context, targets) in counts.items()}
    return {**flops, "padding": 1 - flops["useful"] / flops["spent"], "tokens": tokens}


# --- the machine ----------------------------------------------------------------------------------


def name_of(dtype):
    """'float32', without torch's name."""
    return str(dtype).removeprefix("torch.")


def hardware(device):
    """What the numbers were measured on, a dict."""
    name = platform.processor() or platform.machine()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    return {"device": device.type, "name": name, "cpus": os.cpu_count(),
            "threads": torch.get_num_threads(), "torch": torch.__version__,
            "system": platform.system()}


def peak_memory(device):
    """Most memory in use so far: a dict of bytes, None if the system does not tell, and of what."""
    if device.type == "cuda":
        return {"bytes": torch.cuda.max_memory_allocated(device), "what": "tensors on the GPU"}
    try:
        import resource  # not on Windows
    except ImportError:
        return {"bytes": None, "what": "unknown on this system"}
    unit = 1 if sys.platform == "darwin" else 1024
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {"bytes": size, "what": "the process: Python, torch, all images, training"}


def synthetic(config):
    """Random images with the channels, axes and side of the Config's data set; no labels."""
    side = STORED.get(config.dataset, config.image_size)
    channels, axes = (1, 3) if config.dataset in ("shapes3d", *VOLUMES) else (3, 2)
    n = max(2000, 5 * config.batch_size * config.accumulation // 4)  # a step's, and those held out
    images = torch.randint(0, 256, (n, channels, *(side,) * axes), dtype=torch.uint8,
                           generator=torch.Generator().manual_seed(0))  # [n, C, H, W]
    name = f"{n:,} random images of {side} pixels"
    return data.ImageDataset(name, images, None, None, (0.5,) * channels, (0.29,) * channels)


# --- all of it ------------------------------------------------------------------------------------


def measure(config, dataset, device, seconds):
    """Measure how a Config trains on a data set, each part for some seconds -> the dict of --json.

    Raises UsageError if the data set has too few images for a step.
    """
    model, masking = train.build(config, *dataset.shape)
    model.to(device).train()
    learner = distributed.wrap(model, config.compile)
    optimizer = train.build_optimizer(config, model)
    dtype = train.pick_precision(config, device)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    kept, _ = train.hold_out(config, len(dataset))
    images = config.batch_size * config.accumulation
    check(len(kept) >= images, "batch_size", config.batch_size,
          f"times --accumulation at most {len(kept)}, the images to train on")
    generator = torch.Generator().manual_seed(config.seed)
    stream = train.batches_of(config, dataset, masking, kept, device, generator, 0)
    batches = [next(stream) for _ in range(config.accumulation)]

    def step():
        train.train_step(config, learner, optimizer, scaler, batches, 1, 1000)

    step()  # compiles and allocates
    found = {"hardware": hardware(device), "data": dataset.name, "precision": name_of(dtype),
             "images_a_step": images, "train_step": measure_rate(images, step, seconds),
             "memory": peak_memory(device)}
    found["data_path"] = measure_rate(config.batch_size, lambda: next(stream), seconds)
    found["masks"] = measure_rate(config.batch_size,
                                  lambda: masking(config.batch_size, generator), seconds)
    found["flops_an_image"] = work(config, dataset, masking)
    found["matmul"] = matmul_rate(device, dtype, seconds)
    share = found["train_step"]["images_per_second"] / found["matmul"]["flops_per_second"]
    found["utilization"] = {name: share * found["flops_an_image"][name]
                            for name in ("useful", "spent")}
    return found


def table(found):
    """What `measure` found, as text."""
    machine, step = found["hardware"], found["train_step"]
    flops, matmul, memory = found["flops_an_image"], found["matmul"], found["memory"]["bytes"]
    low, high = step["quartiles"]
    rows = [
        ("train step, images/s", f"{step['images_per_second']:,.1f}",
         f"quartiles {low:,.1f} to {high:,.1f}; {found['images_a_step']} images a step"),
        ("data and masks, images/s", f"{found['data_path']['images_per_second']:,.1f}", ""),
        ("masks alone, images/s", f"{found['masks']['images_per_second']:,.1f}", ""),
        ("peak memory, GB", f"{memory / 1e9:.2f}" if memory else "-", found["memory"]["what"]),
        ("GFLOP per image, useful", f"{flops['useful'] / 1e9:.4g}", "at the real tokens"),
        ("GFLOP per image, spent", f"{flops['spent'] / 1e9:.4g}",
         f"{flops['padding']:.1%} of them on padding")]
    rows += [(f"tokens, {name}", f"{tokens['context']:.1f}",
              f"of context, {tokens['target_block']:.1f} in a target block, mean")
             for name, tokens in flops["tokens"].items()]
    rows += [("matmul alone, TFLOP/s", f"{matmul['flops_per_second'] / 1e12:.3g}",
              f"{matmul['side']} x {matmul['side']}, {matmul['precision']}")]
    rows += [(f"utilization, {name} FLOPs", f"{value:.1%}", "of that matmul rate")
             for name, value in found["utilization"].items()]
    title = (f"{found['data']} · {found['precision']} · {machine['name']} ({machine['device']}), "
             f"{machine['threads']} threads, torch {machine['torch']}")
    return "\n".join([title, *(f"{what:28}{number:>14}  {more}".rstrip()
                               for what, number, more in rows)])


def parser(description):
    """The flags of train.py and a few more."""
    p = command_line.parser(description)
    p.add_argument("--json", metavar="FILE", help="write all that was measured to this file")
    p.add_argument("--synthetic", action="store_true",
                   help="random images of the same size instead of the data set")
    p.add_argument("--seconds", type=float, default=10.0,
                   help="about how long each measurement takes (default 10)")
    return p


def main(argv=None):
    """Measure a preset, with any flag of train.py, and print a table."""
    args = command_line.parse(argv, "How fast a preset trains on this machine.", parser)
    config = args.config
    check(0 < args.seconds < 1e6, "seconds", args.seconds, "more than 0")
    if args.json and not Path(args.json).absolute().parent.is_dir():
        raise UsageError(f"--json is {args.json}: there is no folder {Path(args.json).parent}")
    device = train.pick_device(config.device)
    dataset = synthetic(config) if args.synthetic else data.load(
        config.dataset, config.split, config.data_dir, config.image_size)
    found = measure(config, dataset, device, args.seconds)
    print(table(found))
    if args.json:
        words = ["python -m extras.benchmark", *(sys.argv[1:] if argv is None else argv)]
        content = {"command": " ".join(words), "date": datetime.date.today().isoformat(),
                   "settings": command_line.command(config), **found}
        checkpoint.write(args.json, lambda path: path.write_text(json.dumps(content, indent=2)))


if __name__ == "__main__":
    command_line.run(main)
