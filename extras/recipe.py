"""Ways to learn more in the same time, none of them in the paper. Their worth: docs/recipe.md.

    python -m extras.recipe --preset cifar10 --masks-per-image 4 --batch-size 32
    python -m extras.recipe --preset cifar10 --target-blocks 2 4 6
    python -m extras.recipe --preset cifar10 --teacher runs/cifar10-mae

Several masks of an image share one pass of the target encoder, half of a step's cost. Targets
concatenated from several transformer blocks ask for more than the last block's output. A frozen
teacher, an encoder that is already trained, needs no bootstrap. Loop, data and probes stay the
same. Notation as in models.py; K masks per image, L transformer blocks that give the targets.
"""

import copy
import shlex

import torch
import torch.nn.functional as F
from torch import nn

import data
import evaluate
import train
from config import UsageError, check
from models import IJEPA, Output, initialize, prediction_loss, take
from support import command_line


class SeveralMasks:
    """Draws K masks for each of B images -> Masks of K * B rows; row k * B + b is of image b."""

    def __init__(self, masking, K):
        self.masking, self.K, self.grid, self.N = masking, K, masking.grid, masking.N

    def __call__(self, B, generator=None):
        return self.masking(self.K * B, generator)


class Recipe(IJEPA):
    """I-JEPA with several masks an image, targets of several blocks, and perhaps a frozen teacher.

    blocks: numbers, from 1, of the target encoder's transformer blocks (not of target blocks in the
    grid); their outputs, each layer-normed and then concatenated, are the targets. If empty, the
    encoder's output is. teacher: an Encoder that makes the targets and never changes; the target
    encoder, which is kept, only follows.
    """

    def __init__(self, encoder, predictor, loss="smooth_l1", blocks=(), teacher=None):
        super().__init__(encoder, predictor, loss)
        self.blocks, self.teacher = blocks, None
        if teacher is not None:
            self.teacher = copy.deepcopy(teacher).requires_grad_(False)
        maker = encoder if teacher is None else teacher
        D = maker.width * max(len(blocks), 1)
        if D != predictor.project.out_features:
            predictor.project = nn.Linear(predictor.project.in_features, D)
            initialize(predictor.project)

    def forward(self, images, masks):
        K = len(masks) // len(images)
        targets, tokens = self.make_targets(images, masks)  # [K*B, M, Nt, L*D], [B, N, D]
        images = images.repeat(K, *[1] * (images.ndim - 1))  # [K*B, C, H, W]
        context = self.context_encoder(images, masks.context, masks.context_valid)  # [K*B, Nc, D]
        predictions = self.predictor(context, masks)  # [K*B, M, Nt, L*D]
        loss = prediction_loss(predictions, targets, masks.targets_valid, self.loss)
        return Output(loss, predictions, targets, tokens)

    @torch.no_grad()
    def make_targets(self, images, masks):
        outputs, maker = [], self.target_encoder if self.teacher is None else self.teacher
        hooks = [maker.blocks[number - 1].register_forward_hook(
            lambda block, given, output: outputs.append(output)) for number in self.blocks]
        tokens = maker(images)  # [B, N, D]
        for hook in hooks:
            hook.remove()
        outputs = [F.layer_norm(x, x.shape[-1:]) for x in outputs or [tokens]]  # L of [B, N, D]
        targets = torch.cat(outputs, dim=-1).repeat(len(masks) // len(images), 1, 1)
        return take(targets, masks.targets), tokens  # [K*B, M, Nt, L*D]


def build(config, channels=3, axes=2, K=1, blocks=(), teacher=None):
    """The model and the mask sampler that a Config and the flags describe."""
    model, masking = train.build(config, channels, axes)
    depth = len((teacher or model.context_encoder).blocks)
    check(all(1 <= number <= depth for number in blocks), "target_blocks", tuple(blocks),
          f"numbers from 1 to {depth}")
    check(K >= 1, "masks_per_image", K, "1 or more")
    model = Recipe(model.context_encoder, model.predictor, config.loss, tuple(blocks), teacher)
    return model, SeveralMasks(masking, K)


def parser(description):
    """train.py's flags and those of the recipe."""
    p = command_line.parser(description)
    p.add_argument("--masks-per-image", type=int, default=1, metavar="K",
                   help="masks of each image in a step [1]")
    p.add_argument("--target-blocks", type=int, nargs="+", default=[], metavar="NUMBER",
                   help="transformer blocks whose outputs are the targets, from 1 [the last]")
    p.add_argument("--teacher", default="", metavar="RUN",
                   help="a run whose target encoder, frozen, makes the targets [none]")
    return p


def main(argv=None):
    """The command line: as train.py's."""
    arguments = command_line.parse(argv, "Pretrain I-JEPA by a recipe.", parser, "-recipe")
    config, K, blocks = arguments.config, arguments.masks_per_image, arguments.target_blocks
    words, teacher = ["-m", "extras.recipe", "--masks-per-image", str(K)], None
    if blocks:
        words += ["--target-blocks", *map(str, blocks)]
    if arguments.teacher:
        words += ["--teacher", arguments.teacher]
        encoders, given, _ = evaluate.load_encoders(arguments.teacher)
        teacher = encoders["target"]
        if (given.image_size, given.patch_size) != (config.image_size, config.patch_size):
            raise UsageError(f"--teacher {arguments.teacher} has other images or patches: "
                             f"{given.image_size} and {given.patch_size} pixels")
    dataset = data.load(config.dataset, config.split, config.data_dir, config.image_size)
    model, masking = build(config, *dataset.shape, K, blocks, teacher)
    train.train(config, model, masking, dataset, arguments.resume, arguments.override,
                shlex.join(words))


if __name__ == "__main__":
    command_line.run(main)
