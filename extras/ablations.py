"""I-JEPA with one part taken away, changed or added, to see what it is for.

    python -m extras.ablations --list                          their names
    python -m extras.ablations raster-masks --preset shapes    into runs/shapes-raster-masks

Each is a mask sampler, a subclass of IJEPA that overrides one method, or only flags of train.py;
loop, data and probes stay the same. "Table" is a table of the I-JEPA paper. Notation as in
models.py.
"""

import sys
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

import data
import train
from config import UsageError
from extras.mae import RandomMasking, pixel_targets, predict_pixels
from masking import Masks, MultiBlockMasking
from models import IJEPA, Output, prediction_loss, take
from support import command_line, distributed

# --- other masks ----------------------------------------------------------------------------------


class RasterMasking:
    """Cuts the grid into quarters: one, chosen at random, is the context, the others are targets.

    grid: (rows, columns), both even. Raises UsageError for any other.
    """

    def __init__(self, grid):
        if len(grid) != 2 or any(side % 2 for side in grid):
            raise UsageError(f"raster masks need a grid of two even sides, not {grid}: change "
                             "--patch-size or --image-size")
        self.grid, self.N = tuple(grid), grid[0] * grid[1]
        halves = torch.arange(self.N).view(2, grid[0] // 2, 2, grid[1] // 2)
        self.quarters = halves.transpose(1, 2).reshape(4, -1)  # [4, N/4]

    def __call__(self, B, generator=None):
        """Draw masks for B images -> Masks with M = 3 and without padding."""
        parts = self.quarters[torch.rand(B, 4, generator=generator).argsort(dim=1)]  # [B, 4, N/4]
        real = torch.ones_like(parts, dtype=torch.bool)
        return Masks(parts[:, 0], real[:, 0], parts[:, 1:], real[:, 1:])


class TruncatedMasking(MultiBlockMasking):
    """One block size a batch, and all contexts cut to its shortest, as in the official code.

    Nothing is padded. Differs: the patches that are cut are random, in the official code the last.
    """

    def draw_blocks(self, B, M, scale, aspect, uniform):
        area = uniform(1, low=scale[0], high=scale[1]).item()
        ratio = uniform(1, low=aspect[0], high=aspect[1]).item()
        return super().draw_blocks(B, M, (area, area), (ratio, ratio), uniform)

    def __call__(self, B, generator=None):
        masks = super().__call__(B, generator)
        shortest = int(masks.context_valid.sum(dim=1).min())
        key = torch.rand(masks.context.shape, generator=generator)  # [B, Nc]
        kept = key.masked_fill(~masks.context_valid, -1.0).topk(shortest, dim=1).indices
        kept = kept.sort(dim=1).values  # [B, shortest]
        return Masks(masks.context.gather(1, kept), masks.context_valid.gather(1, kept),
                     masks.targets, masks.targets_valid)


def truncated(config, grid):
    """The TruncatedMasking that a Config describes, on a grid; it never merges targets."""
    return TruncatedMasking(grid, config.num_targets, config.target_scale, config.target_aspect,
                            config.context_scale, config.context_size)


# --- other targets --------------------------------------------------------------------------------


class NoStopGradient(IJEPA):
    """The context encoder makes its own targets, and gradients reach them."""

    def __init__(self, encoder, predictor, loss="smooth_l1"):
        super().__init__(encoder, predictor, loss)
        self.target_encoder = self.context_encoder

    def make_targets(self, images, masks):
        tokens = self.target_encoder(images)  # [B, N, D]
        return take(F.layer_norm(tokens, tokens.shape[-1:]), masks.targets), tokens.detach()


class NoTargetNorm(IJEPA):
    """Targets as the target encoder gives them, not layer-normed."""

    @torch.no_grad()
    def make_targets(self, images, masks):
        tokens = self.target_encoder(images)  # [B, N, D]
        return take(tokens, masks.targets), tokens


class NoSafeguards(NoStopGradient):
    """Neither stop-gradient nor EMA nor layer norm: nothing prevents collapse."""

    def make_targets(self, images, masks):
        tokens = self.target_encoder(images)  # [B, N, D]
        return take(tokens, masks.targets), tokens.detach()


class PixelTargets(IJEPA):
    """The targets are standardized pixels, as in a masked autoencoder; Output.tokens is None."""

    def __init__(self, encoder, predictor, loss="smooth_l1"):
        predictor = predict_pixels(predictor, encoder.patch_embed.project.in_features)
        super().__init__(encoder, predictor, loss)

    def make_targets(self, images, masks):
        return take(pixel_targets(images, self.context_encoder.patch_size), masks.targets), None


class MaskedTargetInput(IJEPA):
    """The target encoder sees what is to be predicted, nothing else; Output.tokens is None."""

    @torch.no_grad()
    def make_targets(self, images, masks):
        B, M, _ = masks.targets.shape
        images = images.repeat_interleave(M, dim=0)  # [B*M, C, H, W]
        tokens = self.target_encoder(images, masks.targets.flatten(0, 1),
                                     masks.targets_valid.flatten(0, 1))  # [B*M, Nt, D]
        return F.layer_norm(tokens, tokens.shape[-1:]).unflatten(0, (B, M)), None


class SeveralLayers(IJEPA):
    """Targets are the mean of the last blocks' outputs, layer-normed before and after (data2vec,
    arXiv:2202.03555)."""

    LAYERS = 3

    @torch.no_grad()
    def make_targets(self, images, masks):
        layers = []  # LAYERS of [B, N, D]
        hooks = [block.register_forward_hook(lambda block, given, output: layers.append(output))
                 for block in self.target_encoder.blocks[-self.LAYERS:]]
        tokens = self.target_encoder(images)  # [B, N, D]
        for hook in hooks:
            hook.remove()
        mean = torch.stack([F.layer_norm(x, x.shape[-1:]) for x in layers]).mean(dim=0)
        return take(F.layer_norm(mean, mean.shape[-1:]), masks.targets), tokens


# --- another loss ---------------------------------------------------------------------------------


def variance_and_covariance(features):
    """How far features float [B, D] are from varying in every direction, a scalar (VICReg,
    arXiv:2105.04906, equations 1 to 4).

    The mean over the width of what a deviation lacks of 1, and, weighted 1/25, the squared
    covariances of different features, summed and divided by the width.
    """
    with torch.autocast(features.device.type, enabled=False):  # which would square in bfloat16
        covariance = torch.cov(features.float().T)  # [D, D]
    deviation = (covariance.diagonal() + 1e-4).sqrt()  # [D]
    off_diagonal = covariance.square().sum() - covariance.diagonal().square().sum()
    return F.relu(1 - deviation).mean() + off_diagonal / features.shape[1] / 25


class VICReg(IJEPA):
    """The loss also has VICReg's terms of the pooled context (C-JEPA, arXiv:2410.19560).

    Raises UsageError under torchrun: the terms of a whole batch are not the mean of its parts'.
    """

    WEIGHT = 0.02

    def forward(self, images, masks):
        if distributed.place()[1] > 1:
            raise UsageError("VICReg's terms need the whole batch in one process, not torchrun")
        targets, tokens = self.make_targets(images, masks)  # [B, M, Nt, D], [B, N, D]
        context = self.context_encoder(images, masks.context, masks.context_valid)  # [B, Nc, D]
        predictions = self.predictor(context, masks)  # [B, M, Nt, D]
        loss = prediction_loss(predictions, targets, masks.targets_valid, self.loss)
        real = masks.context_valid[..., None]  # [B, Nc, 1]
        pooled = (context * real).sum(dim=1) / real.sum(dim=1)  # [B, D]
        loss = loss + self.WEIGHT * variance_and_covariance(pooled)
        return Output(loss, predictions, targets, tokens)


# --- the program ----------------------------------------------------------------------------------


class Ablation(NamedTuple):
    """What differs from I-JEPA: flags of train.py, the model, the sampler of a Config and grid."""

    comment: str
    flags: str = ""
    model: type = IJEPA
    masking: Callable | None = None


WHOLE = "--context-size 0"  # cut to a size, contexts of all masks would become alike
ABLATIONS = {
    "raster-masks": Ablation("a quarter of the grid predicts the others (table 6)", WHOLE,
                             masking=lambda config, grid: RasterMasking(grid)),
    "random-masks": Ablation("60% of the patches hidden at random (table 6)", WHOLE,
                             masking=lambda config, grid: RandomMasking(grid, 0.6)),
    "one-block": Ablation("one target block of 60% of the grid (table 6)", f"{WHOLE} --num-targets"
                          " 1 --target-scale .6 .6 --context-scale 1 1"),
    "truncated-masks": Ablation("one block size a batch, contexts cut to the shortest", WHOLE,
                                masking=truncated),
    "pixel-targets": Ablation("targets are pixels (table 7)", model=PixelTargets),
    "masked-target-input": Ablation("the target encoder sees what is to be predicted (table 11)",
                                    model=MaskedTargetInput),
    "several-layers": Ablation("targets are the mean of the last 3 blocks' outputs (data2vec)",
                               model=SeveralLayers),
    "no-stop-gradient": Ablation("gradients reach the targets", model=NoStopGradient),
    "no-target-norm": Ablation("targets are not layer-normed", model=NoTargetNorm),
    "no-safeguards": Ablation("neither stop-gradient nor EMA nor layer norm", model=NoSafeguards),
    "momentum-0": Ablation("the target encoder is the context encoder, gradients stopped",
                           "--momentum 0 --momentum-final 0"),
    "momentum-1": Ablation("the target encoder stays untrained",
                           "--momentum 1 --momentum-final 1"),
    "vicreg": Ablation("VICReg's terms of the context join the loss (C-JEPA)", model=VICReg),
}


def build(name, config, channels=3, axes=2):
    """The model and the mask sampler of an ablation, as train.build, from the same weights."""
    ablation = ABLATIONS[name]
    model, masking = train.build(config, channels, axes)
    return (ablation.model(model.context_encoder, model.predictor, config.loss),
            ablation.masking(config, masking.grid) if ablation.masking else masking)


def parser(description):
    """train.py's flags, the ablation's name and --list."""
    p = command_line.parser(description)
    p.add_argument("name", nargs="?", choices=ABLATIONS, help="what is changed; see --list")
    p.add_argument("--list", action="store_true", help="list the names and exit")
    return p


def main(argv=None):
    """The command line: an ablation's flags come before those given, which may change them."""
    argv, description = sys.argv[1:] if argv is None else argv, "Pretrain I-JEPA with a change."
    asked = parser(description).parse_args(argv)
    if asked.list or not asked.name:
        print("\n".join(f"{name:20} {ablation.comment}" for name, ablation in ABLATIONS.items()))
        return
    flags = [] if asked.resume else ABLATIONS[asked.name].flags.split()
    arguments = command_line.parse([*flags, *argv], description, parser, f"-{asked.name}")
    config = arguments.config
    dataset = data.load(config.dataset, config.split, config.data_dir, config.image_size)
    model, masking = build(asked.name, config, *dataset.shape)
    train.train(config, model, masking, dataset, arguments.resume, arguments.override,
                f"-m extras.ablations {asked.name}")


if __name__ == "__main__":
    command_line.run(main)
