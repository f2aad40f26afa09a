"""Our masks and training step beside those of two public codes, in one run on one machine:

    python bench/peers.py --official ../ijepa --homemade ../ijepa-homemade --json results/peers.json

--official is a checkout of github.com/facebookresearch/ijepa (CC BY-NC), --homemade one of github.com/sombersomni/ijepa-homemade. Nothing
of either is kept here: their public classes are imported from those folders and called, in steps that do what their training loops do.

Everything is timed in turn, round after round, and a ratio is the median over the rounds: whatever else the machine does meets all alike.
On CIFAR's geometry all have an encoder 192 wide, 6 deep, with 6 heads, and a predictor 96 wide, 4 deep, with 6 heads. Each code's step is
given its own sampler's masks, drawn before, and ours the very same ones, so that both compute on the same tokens. The homemade code has one
mask for a whole batch: beside it stands also our step as it trains, with masks of its own for each image, drawn in the step and padded.
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

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from extras import benchmark  # noqa: E402
from support import checkpoint  # noqa: E402
import config as settings  # noqa: E402
from extras import methods  # noqa: E402
import train  # noqa: E402
from config import UsageError  # noqa: E402
from extras.fast_masking import FastMultiBlockMasking  # noqa: E402
from masking import Masks  # noqa: E402

PRESETS = {"official": "cifar10", "homemade": "cifar10-peer"}  # whose mask scales, loss and schedules ours has beside each
MARKS = {"official": "src/models/vision_transformer.py", "homemade": "ijepa/models/ijepa.py"}  # a file that such a checkout holds
POOL = 8  # batches of a code's masks, used in turn


# --- their masks in our form --------------------------------------------------------------------------------------------------


def from_official(context, targets):
    """Masks of the official collator's two lists: context, one int64 tensor [B, Nc]; targets, M of [B, Nt]. Nothing is padded."""
    return Masks(context[0], None, torch.stack(targets, dim=1), None)  # [B, Nc], [B, M, Nt]


def from_homemade(context, targets, B):
    """Masks of B images that have the same: context, a list of patches; targets, a list of lists, the shorter ones padded."""
    blocks = nn.utils.rnn.pad_sequence([torch.tensor(block) for block in targets], batch_first=True)  # [M, Nt]
    valid = torch.arange(blocks.shape[1]) < torch.tensor([len(block) for block in targets])[:, None]  # [M, Nt]
    return Masks(torch.tensor(context).expand(B, -1), None, blocks.expand(B, -1, -1), valid.expand(B, -1, -1))


# --- timing -------------------------------------------------------------------------------------------------------------------


def in_turn(calls, device, rounds, count=1):
    """Time each of a dict of calls `count` times in a row, round after round -> seconds of one call, name -> float64 [rounds]."""
    for call in calls.values():  # warm up
        call()
        call()
    found = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            found[name].append(benchmark.time_calls(call, device, count).mean())
    return {name: torch.stack(seconds) for name, seconds in found.items()}


def compare(seconds, images, peer):
    """Images a second of each name, and how many times a peer's they are: median over the rounds of the ratio within a round."""
    found = {name: benchmark.rate(images, times) for name, times in seconds.items()}
    for name, times in seconds.items():
        if name != peer:
            found[name][f"times_{peer}"] = (seconds[peer] / times).median().item()
    return found


# --- ours ---------------------------------------------------------------------------------------------------------------------


def our_model(preset, images):
    """A preset at the sizes that are compared, for these images: its Config, and the model."""
    config = settings.from_preset(preset, encoder="192x6x6", predictor="96x4x6", context_size=0, batch_size=len(images))
    return config, methods.build(config).to(images.device).train()


def our_step(config, model, images, masks=None):
    """A function that makes one of our training steps, on a list of Masks in turn, or, without, drawing them in the step."""
    optimizer, generator = train.build_optimizer(config, model), torch.Generator(images.device).manual_seed(0)
    turn = itertools.cycle(masks or [None])

    def step():
        batch = (images, next(turn)) if masks else (images,)
        train.train_step(config, model, optimizer, [batch], 1, 1000, generator)

    return step


def tokens(masks):
    """Mean real tokens of a list of Masks: of the context, and of a target block."""
    context, targets = zip(*(part.valid() for part in masks))
    return {"context": torch.cat([valid.sum(-1).flatten() for valid in context]).double().mean().item(),
            "target_block": torch.cat([valid.sum(-1).flatten() for valid in targets]).double().mean().item()}


# --- the official code --------------------------------------------------------------------------------------------------------


def official_masks(rounds, B=128):
    """Image masks a second on a 14 x 14 grid with the official scales, one core: the official collator's, and ours in both modes."""
    torch.empty(31 * 2**20, dtype=torch.uint8)  # from then on malloc keeps what is freed, as in training; else each call pays for its pages
    collator = importlib.import_module("src.masks.multiblock").MaskCollator(
        (224, 224), 16, enc_mask_scale=(0.85, 1.0), pred_mask_scale=(0.15, 0.2), aspect_ratio=(0.75, 1.5), nenc=1, npred=4, min_keep=10)
    generator, batch = torch.Generator().manual_seed(0), [0] * B  # numbers for images: collating them costs it next to nothing
    calls = {"official": lambda: collator(batch)}
    for mode in ("pad", "truncate"):
        calls[mode] = functools.partial(FastMultiBlockMasking((14, 14), mode=mode, min_keep=10), B, generator)
    return compare(in_turn(calls, torch.device("cpu"), rounds, 5), B, "official")


def official_step(images, masks):
    """A function that makes one training step as the official loop does, on a list of its masks in turn; on a GPU with autocast and loss
    scaling, as published."""
    vit, helper = (importlib.import_module(f"src.{name}") for name in ("models.vision_transformer", "helper"))
    take = importlib.import_module("src.masks.utils").apply_masks
    repeat = importlib.import_module("src.utils.tensors").repeat_interleave_batch
    gradients = importlib.import_module("src.utils.logging").grad_logger
    device, half = images.device, images.device.type == "cuda"
    encoder = vit.VisionTransformer([32], 4, embed_dim=192, depth=6, num_heads=6, qkv_bias=True,
                                    norm_layer=functools.partial(nn.LayerNorm, eps=1e-6)).to(device)
    predictor = vit.vit_predictor(num_patches=64, embed_dim=192, predictor_embed_dim=96, depth=4, num_heads=6).to(device)
    target_encoder = copy.deepcopy(encoder).requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its loss scaler has another name by now
        optimizer, scaler, rates, decays = helper.init_opt(
            encoder, predictor, iterations_per_epoch=1000, start_lr=2e-4, ref_lr=1e-3, warmup=40, num_epochs=300, wd=0.04, final_wd=0.4,
            final_lr=1e-6, use_bfloat16=half)
    momenta, turn = (0.996 + i * 0.004 / 300_000 for i in range(300_000)), itertools.cycle(masks)

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


def beside_official(images, rounds, count):
    """The official step and ours on the same masks, on 8 x 8 patches, where the official collator hangs unless min_keep is below 9."""
    collator = importlib.import_module("src.masks.multiblock").MaskCollator(
        (32, 32), 4, enc_mask_scale=(0.85, 1.0), pred_mask_scale=(0.15, 0.2), aspect_ratio=(0.75, 1.5), nenc=1, npred=4, min_keep=4)
    torch.manual_seed(0)  # it draws from the global generator
    drawn = [collator([0] * len(images))[1:] for _ in range(POOL)]
    theirs = [tuple([part.to(images.device) for part in parts] for parts in lists) for lists in drawn]
    ours = [from_official(*lists) for lists in theirs]
    calls = {"official": official_step(images, theirs), "ours, same masks": our_step(*our_model(PRESETS["official"], images), images, ours)}
    return {**compare(in_turn(calls, images.device, rounds, count), len(images), "official"), "tokens": tokens(ours)}


# --- the homemade code --------------------------------------------------------------------------------------------------------


def homemade_masks(folder):
    """Some of its masks on 8 x 8 patches, each (context, targets), lists of patches and of lists."""
    # The file is loaded by itself, for its package would ask for torchvision.
    found = importlib.util.spec_from_file_location("homemade_masking", pathlib.Path(folder) / "ijepa/data/masking.py")
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    random.seed(0)  # it draws from Python's global generator
    sampler = module.MultiBlockMaskGenerator((8, 8))
    drawn = (sampler() for _ in itertools.count())
    return list(itertools.islice(((context, targets) for context, targets in drawn if context), POOL))  # its model needs a context


def homemade_step(images, masks):
    """A function that makes one training step as the homemade loop does, on a list of its masks in turn, in float32 on a GPU too."""
    model = importlib.import_module("ijepa.models").IJEPA(32, 4, 3, 192, 6, 6, 96, 4, 6).to(images.device).train()
    optimizer = torch.optim.AdamW([*model.context_encoder.parameters(), *model.predictor.parameters()], lr=1e-3, weight_decay=0.05)
    turn = itertools.cycle(masks)

    def step():
        predictions, targets = model(images, *next(turn))
        distances = [(predicted - target).square().sum(-1) for predicted, target in zip(predictions, targets)]  # M of [B, Nt]
        loss = sum(distance.sum() for distance in distances) / sum(distance.numel() for distance in distances)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.update_target_encoder(0.996)
        return loss.item()

    return step


def beside_homemade(folder, images, rounds, count):
    """The homemade step, with one mask for its batch; ours on the same; and ours with masks of its own for each image, padded."""
    theirs = homemade_masks(folder)
    same = [from_homemade(*lists, len(images)).to(images.device) for lists in theirs]
    config, model = our_model(PRESETS["homemade"], images)
    calls = {"homemade": homemade_step(images, theirs), "ours, same masks": our_step(*our_model(PRESETS["homemade"], images), images, same),
             "ours, padded": our_step(config, model, images)}
    drawn = {"homemade": same, "ours, padded": [model.masking(len(images)) for _ in range(POOL)]}
    return {**compare(in_turn(calls, images.device, rounds, count), len(images), "homemade"),
            "tokens": {name: tokens(masks) for name, masks in drawn.items()}}


# --- all of it ------------------------------------------------------------------------------------------------------------------


def check(args):
    """The peers that are given, their packages importable after our own modules. Raises UsageError for what cannot be measured."""
    for name in ("batch_size", "rounds", "steps"):
        settings.need(args, getattr(args, name) > 0, name, "it must be 1 or more")
    settings.need(args, min(args.threads) > 0, "threads", "each must be 1 or more")
    if args.json and not pathlib.Path(args.json).absolute().parent.is_dir():
        raise UsageError(f"--json is {args.json}: there is no folder {pathlib.Path(args.json).parent}")
    given = [name for name in MARKS if getattr(args, name)]
    if not given:
        raise UsageError("there is nobody to compare with: give --official FOLDER or --homemade FOLDER")
    for name in given:
        folder = pathlib.Path(getattr(args, name))
        settings.need(args, (folder / MARKS[name]).is_file(), name, f"it holds no {MARKS[name]}, so it is no checkout of that code")
        sys.path.append(str(folder.resolve()))
    return given


def show(what, found):
    """Print a comparison, a line for each of its names."""
    for name, row in found.items():
        if name != "tokens":
            ratio = next((f"{value:8.2f} x {key.removeprefix('times_')}" for key, value in row.items() if key.startswith("times_")), "")
            print(f"{what:38}{name:26}{row['images_per_second']:12,.1f} images/s{ratio}", flush=True)


def main(argv=None):
    """Compare with the codes whose folders are given; raises UsageError for what the user can put right."""
    parser = settings.Parser(prog="bench/peers.py", description="Our masks and training step beside those of two public codes.")
    parser.add_argument("--official", metavar="FOLDER", help="a checkout of github.com/facebookresearch/ijepa")
    parser.add_argument("--homemade", metavar="FOLDER", help="a checkout of github.com/sombersomni/ijepa-homemade")
    parser.add_argument("--json", metavar="FILE", help="write all that was measured to this file")
    parser.add_argument("--batch-size", type=int, default=256, help="images in a training step (default 256)")
    parser.add_argument("--rounds", type=int, default=9, help="rounds that each comparison takes (default 9)")
    parser.add_argument("--steps", type=int, default=2, help="training steps in a row in each round (default 2; on a GPU better 20)")
    parser.add_argument("--threads", type=int, nargs="+", default=[torch.get_num_threads()],
                        help="threads of the steps, one after the other (default: torch's)")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"), help="where the steps run (default auto)")
    args = parser.parse_args(argv)
    given = check(args)
    device = train.pick_device(args.device)
    images = torch.randn(args.batch_size, 3, 32, 32, generator=torch.Generator().manual_seed(0)).to(device)
    content = {"command": " ".join(["python bench/peers.py", *(sys.argv[1:] if argv is None else argv)]),
               "date": datetime.date.today().isoformat(), "hardware": benchmark.hardware(device), "batch_size": args.batch_size,
               "rounds": args.rounds, "steps_a_round": args.steps}
    if "official" in given:
        importlib.import_module("src.helper")  # sets up logging, which is then quietened: its sampler complains of nearly every batch
        logging.getLogger().setLevel(logging.ERROR)
        torch.set_num_threads(1)
        content["masks"] = {B: official_masks(args.rounds, B) for B in (128, 1024)}  # ours take as many operations for either
        for B, found in content["masks"].items():
            show(f"masks, 14 x 14, one core, {B} a call", found)
    content["steps"] = []
    for threads in args.threads:
        torch.set_num_threads(threads)
        row = {"threads": threads}
        if "official" in given:
            row["official"] = beside_official(images, args.rounds, args.steps)
        if "homemade" in given:
            row["homemade"] = beside_homemade(args.homemade, images, args.rounds, args.steps)
        for name in given:
            show(f"step beside {name}, {threads} thread(s)", row[name])
        content["steps"].append(row)
    if args.json:
        checkpoint.write(args.json, lambda path: path.write_text(json.dumps(content, indent=2)))


if __name__ == "__main__":
    settings.run(main)
