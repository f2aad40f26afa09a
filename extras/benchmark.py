"""How fast a preset trains here, how much of that is useful work, and how near it is to what this machine can do.

    python -m extras.benchmark --preset cifar10
    python -m extras.benchmark --preset stl10-vit-base --synthetic --json speed.json     random images, nothing is downloaded
    python -m extras.benchmark --preset stl10 --synthetic --batch-size 64 --mask-mode truncate     any flag of train.py

The train step is timed with its batches already on the device, and the data path and the masks by themselves. FLOPs are counted from the
shapes, a multiplication and its addition as two. *Useful* ones are those at the tokens that images really have; *spent* ones those at the
tokens that are computed, and the difference is the padding's waste. Utilisation is FLOPs an image x images a second, divided by what
a large matrix multiplication reaches here in the same precision: a limit that no model reaches, for it does more than to multiply.
"""

import datetime
import json
import math
import os
import platform
import sys
import time
from pathlib import Path

import torch

from support import checkpoint
import config as settings
import data
from extras import methods
from support import distributed as parallel
import train
from config import UsageError
from support.download import VOLUMES
from models import groups, parse_size, worth_grouping

# Side of the images of a data set, pixels; others: --image-size.
STORED = {"shapes": 24, "shapes3d": 16, "cifar10": 32, "cifar100": 32, "stl10": 96, **dict.fromkeys(VOLUMES, 28)}
MATRICES = {"cuda": (2048, 4096, 8192), "mps": (1024, 2048, 4096), "cpu": (512, 1024, 2048)}  # sides of the square matrices multiplied

# ---- time


def wait(device):
    """Return when the device has done all that was asked of it; a CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def time_calls(call, device, count):
    """Seconds of each of `count` calls in a row, float64 [count].

    A CUDA device is waited for once, in the end, as in training: it notes the time itself between one call's work and the next's.
    """
    wait(device)
    if device.type == "cuda":
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
        marks[0].record()
        for mark in marks[1:]:
            call()
            mark.record()
        wait(device)
        return torch.tensor([start.elapsed_time(end) / 1000 for start, end in zip(marks, marks[1:])], dtype=torch.float64)
    marks = [time.perf_counter()]
    for _ in range(count):
        call()
        wait(device)
        marks.append(time.perf_counter())
    return torch.tensor(marks, dtype=torch.float64).diff()


def time_for(seconds, call, device):
    """Seconds of each call, float64 [calls]: after three to warm up as many as fit into some seconds, but 5 to 1000."""
    each = time_calls(call, device, 3).min().item()
    return time_calls(call, device, min(max(int(seconds / max(each, 1e-9)), 5), 1000))


def rate(images, seconds):
    """Images a second of calls that took `seconds` [calls] for so many images each: median and, as the spread, quartiles."""
    low, middle, high = (images / seconds).quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)).tolist()
    return {"images_per_second": middle, "quartiles": [low, high], "calls": len(seconds)}


def matmul_rate(device, dtype, seconds):
    """What multiplying two square matrices reaches on a device, the best of a few sizes: a dict with FLOP/s, side and precision."""
    found = []
    for side in MATRICES[device.type]:
        a, b = torch.randn(2, side, side, device=device).to(dtype)
        found.append((2 * side**3 / time_for(seconds / 3, lambda a=a, b=b: a @ b, device).median().item(), side))
    flops_per_second, side = max(found)
    return {"flops_per_second": flops_per_second, "side": side, "precision": str(dtype).removeprefix("torch.")}


# ---- work


def blocks_flops(size, tokens, asked=None):
    """FLOPs of one forward pass of all blocks of a size (width, depth, heads, MLP ratio) over `tokens` tokens, a number or a tensor; of the
    last block only those of so many `asked`, by default of all."""
    width, depth, _, ratio = size

    def block(asked):
        linear = 2 * width * (tokens * 3 * width + asked * (width + 2 * round(width * ratio)))  # queries, keys, values; projection, MLP
        attention = 2 * tokens * asked * width * 2  # queries times keys, and the result times values, all heads together
        return linear + attention

    return (depth - 1) * block(tokens) + block(tokens if asked is None else asked)


def step_flops(config, about, context=None, targets=None):
    """Mean FLOPs an image of a training step's matrix multiplications, forward and backward, a float.

    about: what train.describe says of the data; context [n], targets [n, M]: tokens of n images, float64; supervision has neither.
    What is trained costs three forward passes (the gradients of weights and of inputs are one each), the target encoder one. The patch
    embedding costs two, for nobody asks for the gradient of the images, and embeds all N patches: hidden ones leave after it. Norms,
    softmax, loss and optimizer are not counted, nor what --recompute computes twice.
    """
    axes, N = about["axes"], (config.image_size // config.patch_size) ** about["axes"]
    encoder, predictor = parse_size(config.encoder, "--encoder", axes), parse_size(config.predictor, "--predictor", axes)
    D, Dp, values = encoder[0], predictor[0], about["channels"] * config.patch_size**axes
    embed = 2 * N * values * D
    seen = N + config.registers  # tokens of a whole image
    if config.method == "supervised":
        return float(2 * embed + 3 * (blocks_flops(encoder, seen) + 2 * D * about["classes"]))
    answer = D if config.method != "mae" and config.targets == "features" else values  # numbers predicted for a patch
    predicting = 2 * context * D * Dp + blocks_flops(predictor, context[:, None] + targets, targets).sum(1)  # [n]
    predicting = predicting + 2 * targets.sum(1) * Dp * answer
    flops = 2 * embed + 3 * blocks_flops(encoder, context + config.registers) + 3 * predicting  # [n]
    if config.method == "mae" or config.targets == "pixels":
        pass  # no target encoder
    elif config.masked_input:  # it sees one target block at a time
        flops = flops + targets.shape[1] * embed + blocks_flops(encoder, targets + config.registers).sum(1)
    elif config.stop_gradient:
        flops = flops + embed + blocks_flops(encoder, seen)
    else:
        flops = flops + 2 * embed + 3 * blocks_flops(encoder, seen)
    return flops.mean().item()


def count_tokens(masking, B, generator, batches=8):
    """Tokens of the images of a few batches, as (context [n], targets [n, M]), float64: twice, the real ones and with the padding."""
    real, padded = [], []
    for masks in (masking(B, generator) for _ in range(batches)):
        for part in [part for _, part in groups(masks)] if worth_grouping(masks) else [masks]:
            context, targets = (valid.cpu().double() for valid in part.valid())  # [b, Nc], [b, M, Nt]
            real.append((context.sum(-1), targets.sum(-1)))
            padded.append((torch.ones_like(context).sum(-1), torch.ones_like(targets).sum(-1)))
    return [tuple(map(torch.cat, zip(*counts))) for counts in (real, padded)]


def work(config, about, model, generator):
    """FLOPs an image and the mean number of tokens behind them, a dict."""
    if config.method == "supervised":
        flops = step_flops(config, about)
        return {"useful": flops, "spent": flops, "padding_waste": 0.0, "tokens": None}
    counts = dict(zip(("real", "padded"), count_tokens(model.masking, config.batch_size, generator)))
    useful, spent = (step_flops(config, about, *tokens) for tokens in counts.values())
    means = {name: dict(zip(("context", "target_block"), (part.mean().item() for part in tokens))) for name, tokens in counts.items()}
    return {"useful": useful, "spent": spent, "padding_waste": 1 - useful / spent, "tokens": means}


# ---- the machine


def hardware(device):
    """What the numbers were measured on, a dict."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {"device": device.type, "name": name, "cpus": os.cpu_count(), "threads": torch.get_num_threads(), "torch": torch.__version__,
            "system": platform.system()}


def peak_memory(device):
    """The most memory held so far, a dict of bytes and what they are; bytes are None where the system does not say."""
    if device.type == "cuda":
        return {"bytes": torch.cuda.max_memory_allocated(device), "what": "tensors on the GPU"}
    try:
        import resource  # not on Windows
    except ImportError:
        return {"bytes": None, "what": "unknown on this system"}
    if device.type == "mps":
        return {"bytes": None, "what": "unknown on this device"}
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"bytes": size * (1 if sys.platform == "darwin" else 1024), "what": "the process: Python, torch, all images, training"}


def synthetic(config):
    """Random uint8 images with random labels of ten classes, with the channels, axes and sides of the Config's data set."""
    side, generator = STORED.get(config.dataset, config.image_size), torch.Generator().manual_seed(0)
    channels, axes = data.NAMES.get(config.dataset, (3, 2))
    n = max(2000, 5 * config.batch_size * config.accumulation // 4)  # a step's, and the images held out
    images = torch.randint(0, 256, (n, channels, *[side] * axes), dtype=torch.uint8, generator=generator)  # [n, C, H, W]
    labels = torch.randint(0, 10, (n,), generator=generator)
    return data.ImageDataset(f"{n:,} random images of {side} pixels", images, labels, None, *data.measure(images))


# ---- all of it


def say(text):
    """Tell on stderr what is being measured."""
    print(text, file=sys.stderr, flush=True)


def measure(config, dataset, device, seconds):
    """Measure the training of a Config on a data set, each part for some seconds, and return a dict (the keys of --json).

    Raises UsageError where a batch does not fit in memory.
    """
    model, optimizer, generator, about = train.prepare(config, dataset, device)
    learner = parallel.wrap(model, config.compile)
    train.time_step(config, learner, dataset, device)  # refuses a batch that is too large
    stream = train.image_stream(config, dataset, device, generator, 0)
    images = config.batch_size * config.accumulation
    batches = [next(stream) for _ in range(config.accumulation)]

    def step():
        train.train_step(config, learner, optimizer, batches, 1, 1000, generator)

    bf16 = isinstance(train.autocast(config, device), torch.autocast)
    found = {"hardware": hardware(device), "data": dataset.name, "precision": "bf16 autocast" if bf16 else "fp32", "images_a_step": images}
    say("train steps ...")
    found["train_step"], found["memory"] = rate(images, time_for(seconds, step, device)), peak_memory(device)
    say("data path ...")
    passes = time_for(seconds, lambda: next(stream), device)  # a loader's batches come in gusts, so only their mean says something
    found["data_path"] = {"images_per_second": config.batch_size * len(passes) / passes.sum().item(), "calls": len(passes)}
    say("masks ...")
    found["masks"] = None
    if config.method != "supervised":
        found["masks"] = rate(config.batch_size, time_for(seconds, lambda: model.masking(config.batch_size, generator), device))
    found["flops_an_image"] = work(config, about, model, generator)
    say("matrix multiplication ...")
    found["matmul"] = matmul_rate(device, torch.bfloat16 if bf16 else torch.float32, seconds)
    share = found["train_step"]["images_per_second"] / found["matmul"]["flops_per_second"]
    found["utilisation"] = {name: share * found["flops_an_image"][name] for name in ("useful", "spent")}
    return found


def table(found):
    """The lines to print of what `measure` found."""
    machine, step, flops, matmul = (found[name] for name in ("hardware", "train_step", "flops_an_image", "matmul"))
    lines = [f"{found['data']} · {found['precision']} · {machine['name']} ({machine['device']}), {machine['threads']} threads, "
             f"torch {machine['torch']}"]

    def line(what, number, more=""):
        lines.append(f"{what:28}{number:>14}  {more}".rstrip())

    line("train step, images/s", f"{step['images_per_second']:,.1f}",
         f"quartiles {step['quartiles'][0]:,.1f} to {step['quartiles'][1]:,.1f}; {step['calls']} steps of {found['images_a_step']} images")
    line("data path alone, images/s", f"{found['data_path']['images_per_second']:,.1f}")
    if found["masks"]:
        line("masks alone, images/s", f"{found['masks']['images_per_second']:,.1f}")
    if found["memory"]["bytes"] is not None:
        line("peak memory, GB", f"{found['memory']['bytes'] / 1e9:.2f}", found["memory"]["what"])
    line("GFLOP an image, useful", f"{flops['useful'] / 1e9:.4g}", "at the tokens that images have")
    line("GFLOP an image, spent", f"{flops['spent'] / 1e9:.4g}", f"with the padding, which wastes {flops['padding_waste']:.1%}")
    if flops["tokens"]:
        for name, tokens in flops["tokens"].items():
            line(f"tokens, {name}", f"{tokens['context']:.1f}", f"of context, {tokens['target_block']:.1f} of a target block, mean")
    line("matmul alone, TFLOP/s", f"{matmul['flops_per_second'] / 1e12:.3g}", f"{matmul['side']} x {matmul['side']}, {matmul['precision']}")
    for name, value in found["utilisation"].items():
        line(f"utilisation, {name} FLOPs", f"{value:.1%}", "of that matmul rate")
    return "\n".join(lines)


def main(argv=None):
    """Measure a preset, with any flag of train.py, and print a table; raises UsageError for what the user can put right."""
    parser = settings.Parser(prog="benchmark.py", description="How fast a preset trains here. Other flags are train.py's.")
    parser.add_argument("--preset", default="shapes", help="preset to measure (default shapes)")
    parser.add_argument("--json", metavar="FILE", help="write all that was measured to this file")
    parser.add_argument("--synthetic", action="store_true", help="random images in place of the data set, of the same size")
    parser.add_argument("--seconds", type=float, default=10.0, help="seconds that each measurement takes, about (default 10)")
    args, flags = parser.parse_known_args(argv)
    settings.need(args, 0 < args.seconds < math.inf, "seconds", "it must be above 0")
    if args.json and not Path(args.json).absolute().parent.is_dir():
        raise UsageError(f"--json is {args.json}: there is no folder {Path(args.json).parent}")
    config = settings.from_arguments(settings.parser("").parse_args(["--preset", args.preset, *flags]))
    device = train.pick_device(config.device)
    train.keep_memory()  # as train.py does
    methods.check_memory(config, device)
    dataset = synthetic(config) if args.synthetic else parallel.load(config.dataset, config.split, config.data_dir, config.image_size)
    found = measure(config, dataset, device, args.seconds)
    print(table(found))
    if args.json:
        words = ["python -m extras.benchmark", *(sys.argv[1:] if argv is None else argv)]
        content = {"command": " ".join(words), "date": datetime.date.today().isoformat(), "settings": settings.command(config), **found}
        checkpoint.write(args.json, lambda path: path.write_text(json.dumps(content, indent=2)))


if __name__ == "__main__":
    settings.run(main)
