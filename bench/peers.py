"""Our masks and training step next to those of two public codes, in one run on one machine.

    python bench/peers.py --official ../ijepa --homemade ../ijepa-homemade --json results/peers.json

--official is a checkout of github.com/facebookresearch/ijepa (CC BY-NC), --homemade one of
github.com/sombersomni/ijepa-homemade. Nothing of either is kept here: their public classes are
imported from those folders and called, in steps that do what their training loops do.

The codes take turns, round after round, and a ratio is the median over the rounds: whatever else
the machine does slows all of them alike. On CIFAR's geometry all have an encoder 192 wide, 6 deep,
with 6 heads, and a predictor 96 wide, 4 deep, with 6 heads. Each code's step gets its own sampler's
masks, drawn before, and ours the same ones, so that both compute on the same tokens. The homemade
code has one mask for a whole batch: next to it there is also our step as it trains, with masks of
its own for each image, drawn in the step and padded. Ours compute in the peer's precision, and
once more in the one that a run here would pick, if that is another.
"""

import contextlib
import copy
import datetime
import functools
import importlib
import importlib.util
import itertools
import json
import logging
import pathlib
import random
import sys
import warnings

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.benchmark.utils.timer import timer as clock  # seconds, once the GPU has finished

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import config as settings  # noqa: E402
import train  # noqa: E402
from config import UsageError, check  # noqa: E402
from extras import benchmark  # noqa: E402
from masking import Masks, MultiBlockMasking  # noqa: E402
from support import checkpoint, command_line  # noqa: E402

PRESETS = {"official": "cifar10", "homemade": "cifar10-peer"}  # ours next to each
MARKS = {"official": "src/models/vision_transformer.py",  # a file that such a checkout holds
         "homemade": "ijepa/models/ijepa.py"}
POOL = 8  # batches of a code's masks, used in turn
CPU = torch.device("cpu")


# --- their masks in our form ----------------------------------------------------------------------


def from_official(context, targets):
    """Masks of the official collator's lists: context, one int64 [B, Nc]; targets, M of [B, Nt]."""
    targets = torch.stack(targets, dim=1)  # [B, M, Nt]
    return Masks(context[0], torch.ones_like(context[0], dtype=torch.bool),
                 targets, torch.ones_like(targets, dtype=torch.bool))


def from_homemade(context, targets, B):
    """Masks of B images that share one: context, a list of patches; targets, a list of lists."""
    blocks = [torch.tensor(block) for block in targets]
    blocks = nn.utils.rnn.pad_sequence(blocks, batch_first=True)  # [M, Nt]
    lengths = torch.tensor(list(map(len, targets)))
    valid = torch.arange(blocks.shape[1]) < lengths[:, None]  # [M, Nt]
    context = torch.tensor(context).expand(B, -1)  # [B, Nc]
    return Masks(context, torch.ones_like(context, dtype=torch.bool),
                 blocks.expand(B, -1, -1), valid.expand(B, -1, -1))


# --- timing ---------------------------------------------------------------------------------------


def in_turn(calls, rounds, count=1):
    """Time each of a dict of calls `count` times in a row, round after round.

    Returns the seconds of one call: name -> a list with one number for each round.
    """
    for call in calls.values():  # warm up
        call()
        call()
    found = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = clock()
            for _ in range(count):
                call()
            found[name].append((clock() - start) / count)
    return found


def compare(seconds, images, peer):
    """Images/s of each name, and how many times the peer's: the median of the rounds' ratios."""
    found = {name: benchmark.rate(images, times) for name, times in seconds.items()}
    for name in found.keys() - {peer}:
        ratios = torch.tensor(seconds[peer]) / torch.tensor(seconds[name])
        found[name][f"times_{peer}"] = ratios.median().item()
    return found


# --- ours -----------------------------------------------------------------------------------------


def our_step(preset, images, masks=None, precision="auto"):
    """A function that makes one of our training steps, on a list of Masks in turn.

    Without masks it draws them in the step, as train.py does.
    """
    config = settings.from_preset(preset, encoder="192x6x6", predictor="96x4x6", context_size=0,
                                  merge_targets=False, batch_size=len(images), precision=precision)
    model, masking = train.build(config)
    model.to(images.device).train()
    optimizer, generator = train.build_optimizer(config, model), torch.Generator().manual_seed(0)
    precision = train.pick_precision(config, images.device)
    scaler = torch.amp.GradScaler(images.device.type, enabled=precision == torch.float16)
    turn = itertools.cycle(masks or [None])

    def step():
        drawn = next(turn) or masking(len(images), generator).to(images.device)
        train.train_step(config, model, optimizer, scaler, [(images, drawn)], 1, 1000)

    return step


def our_steps(preset, images, masks, theirs=torch.float32):
    """Our step on a peer's masks, in its precision and in the one a run would pick: functions."""
    names = {torch.float32: "fp32", torch.bfloat16: "bf16"}
    steps = {"ours, same masks": our_step(preset, images, masks, names[theirs])}
    picked = train.pick_precision(settings.Config(), images.device)
    if picked != theirs:
        name = f"ours, same masks, {str(picked).removeprefix('torch.')}"
        steps[name] = our_step(preset, images, masks)
    return steps


def tokens(masks):
    """Mean real tokens of a list of Masks: of the context, and of a target block."""
    context = torch.cat([part.context_valid.sum(-1) for part in masks])
    targets = torch.cat([part.targets_valid.sum(-1).flatten() for part in masks])
    return {"context": context.double().mean().item(),
            "target_block": targets.double().mean().item()}


# --- the official code ----------------------------------------------------------------------------


def official_collator(side, patch, min_keep):
    """Its mask collator with the paper's scales, on square images of so many pixels."""
    return importlib.import_module("src.masks.multiblock").MaskCollator(
        (side, side), patch, enc_mask_scale=(0.85, 1.0), pred_mask_scale=(0.15, 0.2),
        aspect_ratio=(0.75, 1.5), nenc=1, npred=4, min_keep=min_keep)


def official_masks(rounds, B):
    """Image masks per second on a 14 x 14 grid, one core: the official collator's and ours."""
    batch = [0] * B  # numbers for images: collating them costs next to nothing
    calls = {"official": functools.partial(official_collator(224, 16, 10), batch),
             "ours": functools.partial(MultiBlockMasking((14, 14), min_keep=10), B,
                                       torch.Generator().manual_seed(0))}
    return compare(in_turn(calls, rounds, 5), B, "official")


def official_parts(device):
    """Its encoder and predictor, and the optimizer, loss scaler and schedules of its loop."""
    vit, helper = (importlib.import_module(f"src.{name}")
                   for name in ("models.vision_transformer", "helper"))
    encoder = vit.VisionTransformer(
        [32], 4, embed_dim=192, depth=6, num_heads=6, qkv_bias=True,
        norm_layer=functools.partial(nn.LayerNorm, eps=1e-6)).to(device)
    predictor = vit.vit_predictor(num_patches=64, embed_dim=192, predictor_embed_dim=96, depth=4,
                                  num_heads=6).to(device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its loss scaler has another name by now
        more = helper.init_opt(encoder, predictor, iterations_per_epoch=1000, start_lr=2e-4,
                               ref_lr=1e-3, warmup=40, num_epochs=300, wd=0.04, final_wd=0.4,
                               final_lr=1e-6, use_bfloat16=device.type == "cuda")
    return encoder, predictor, *more


def official_step(images, masks):
    """A function that makes one training step as the official loop does, on its masks in turn.

    On a GPU with autocast and loss scaling, as published.
    """
    encoder, predictor, optimizer, scaler, rates, decays = official_parts(images.device)
    target_encoder = copy.deepcopy(encoder).requires_grad_(False)
    take = importlib.import_module("src.masks.utils").apply_masks
    repeat = importlib.import_module("src.utils.tensors").repeat_interleave_batch
    gradients = importlib.import_module("src.utils.logging").grad_logger
    momenta = (0.996 + i * 0.004 / 300_000 for i in range(300_000))
    half, turn = images.device.type == "cuda", itertools.cycle(masks)

    def step():
        rates.step()
        decays.step()
        context, targets = next(turn)
        with torch.autocast("cuda", torch.bfloat16) if half else contextlib.nullcontext():
            with torch.no_grad():
                wanted = target_encoder(images)  # [B, N, D]
                wanted = take(F.layer_norm(wanted, wanted.shape[-1:]), targets)  # [M*B, Nt, D]
                wanted = repeat(wanted, len(images), repeat=len(context))
            loss = F.smooth_l1_loss(predictor(encoder(images, context), context, targets), wanted)
        if half:
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        else:
            loss.backward()
            optimizer.step()
        gradients(encoder.named_parameters())
        optimizer.zero_grad()
        with torch.no_grad():
            m = next(momenta)
            for learned, followed in zip(encoder.parameters(), target_encoder.parameters()):
                followed.data.mul_(m).add_((1 - m) * learned.detach().data)
        return loss.item()

    return step


def next_to_official(images, rounds, count):
    """The official step and ours on the same masks, on 8 x 8 patches.

    (There the official collator hangs unless min_keep is below 9.)
    """
    torch.manual_seed(0)  # it draws from the global generator
    collator = official_collator(32, 4, 4)
    drawn = [collator([0] * len(images))[1:] for _ in range(POOL)]
    theirs = [tuple([part.to(images.device) for part in parts] for parts in lists)
              for lists in drawn]
    ours = [from_official(*lists) for lists in theirs]
    calls = {"official": official_step(images, theirs),
             **our_steps(PRESETS["official"], images, ours,
                         torch.bfloat16 if images.device.type == "cuda" else torch.float32)}
    return {**compare(in_turn(calls, rounds, count), len(images), "official"),
            "tokens": tokens(ours)}


# --- the homemade code ----------------------------------------------------------------------------


def homemade_masks(folder):
    """Some of its masks on 8 x 8 patches: pairs of a list of patches and a list of such lists."""
    # The file is loaded by itself: its package would ask for torchvision.
    found = importlib.util.spec_from_file_location(
        "homemade_masking", pathlib.Path(folder) / "ijepa/data/masking.py")
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    random.seed(0)  # it draws from Python's global generator
    sampler = module.MultiBlockMaskGenerator((8, 8))
    drawn = (sampler() for _ in itertools.count())
    return list(itertools.islice(  # its model needs a context
        ((context, targets) for context, targets in drawn if context), POOL))


def homemade_step(images, masks):
    """A function that makes one training step as the homemade loop does, on its masks in turn."""
    model = importlib.import_module("ijepa.models").IJEPA(32, 4, 3, 192, 6, 6, 96, 4, 6)
    model.to(images.device).train()
    trained = [*model.context_encoder.parameters(), *model.predictor.parameters()]
    optimizer, turn = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.05), itertools.cycle(masks)

    def step():
        predictions, targets = model(images, *next(turn))
        distances = [(predicted - target).square().sum(-1)  # M of [B, Nt]
                     for predicted, target in zip(predictions, targets)]
        patches = sum(distance.numel() for distance in distances)
        loss = sum(distance.sum() for distance in distances) / patches
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.update_target_encoder(0.996)
        return loss.item()

    return step


def next_to_homemade(folder, images, rounds, count):
    """The homemade step; ours on the same masks; and ours with a mask for each image, padded."""
    theirs = homemade_masks(folder)
    same = [from_homemade(*lists, len(images)).to(images.device) for lists in theirs]
    preset = PRESETS["homemade"]
    calls = {"homemade": homemade_step(images, theirs), **our_steps(preset, images, same),
             "ours, padded": our_step(preset, images, precision="fp32")}
    masking = train.build(settings.from_preset(preset, merge_targets=False))[1]
    drawn = [masking(len(images), torch.Generator().manual_seed(i)) for i in range(POOL)]
    return {**compare(in_turn(calls, rounds, count), len(images), "homemade"),
            "tokens": {"homemade": tokens(same), "ours, padded": tokens(drawn)}}


# --- all of it ------------------------------------------------------------------------------------


def find_peers(args):
    """The peers whose folders are given, their packages importable after our own modules."""
    found = [name for name in MARKS if getattr(args, name)]
    if not found:
        raise UsageError("nothing to compare with: give --official FOLDER or --homemade FOLDER")
    for name in found:
        folder = pathlib.Path(getattr(args, name))
        check((folder / MARKS[name]).is_file(), name, str(folder),
              f"a checkout of that code, which holds {MARKS[name]}")
        sys.path.append(str(folder.resolve()))
    return found


def show(what, found):
    """Print a comparison, a line for each of its names."""
    for name, row in found.items():
        if name != "tokens":
            ratios = [f"{value:8.2f} x {key.removeprefix('times_')}" for key, value in row.items()
                      if key.startswith("times_")]
            print(f"{what:38}{name:20}{row['images_per_second']:12,.1f} images/s", *ratios,
                  flush=True)


def parser():
    """The command line."""
    p = command_line.Parser(description="Our masks and training step next to two public codes'.")
    p.add_argument("--official", metavar="FOLDER", help="of github.com/facebookresearch/ijepa")
    p.add_argument("--homemade", metavar="FOLDER", help="of github.com/sombersomni/ijepa-homemade")
    p.add_argument("--json", metavar="FILE", help="write all that was measured to this file")
    p.add_argument("--batch-size", type=int, default=256, help="images in a step (default 256)")
    p.add_argument("--rounds", type=int, default=9, help="rounds of each comparison (default 9)")
    p.add_argument("--steps", type=int, default=2,
                   help="steps in a row in each round (default 2; on a GPU better 20)")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default auto)")
    return p


def main(argv=None):
    """Compare with the codes whose folders are given."""
    args = parser().parse_args(argv)
    found, device = find_peers(args), train.pick_device(args.device)
    threads = torch.get_num_threads()
    images = torch.randn(args.batch_size, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    images = images.to(device)
    words = ["python bench/peers.py", *(sys.argv[1:] if argv is None else argv)]
    content = {"command": " ".join(words), "date": datetime.date.today().isoformat(),
               "hardware": benchmark.hardware(device), "batch_size": args.batch_size,
               "rounds": args.rounds, "steps_a_round": args.steps}
    if "official" in found:
        importlib.import_module("src.helper")  # sets up logging: its sampler complains a lot
        logging.getLogger().setLevel(logging.ERROR)
        torch.set_num_threads(1)
        content["masks"] = {B: official_masks(args.rounds, B) for B in (128, 1024)}
        torch.set_num_threads(threads)
        for B, row in content["masks"].items():
            show(f"masks, 14 x 14, one core, {B} a call", row)
        content["official"] = next_to_official(images, args.rounds, args.steps)
    if "homemade" in found:
        content["homemade"] = next_to_homemade(args.homemade, images, args.rounds, args.steps)
    for name in found:
        show(f"step next to {name}, {threads} thread(s)", content[name])
    if args.json:
        checkpoint.write(args.json, lambda path: path.write_text(json.dumps(content, indent=2)))


if __name__ == "__main__":
    command_line.run(main)
