"""The contrast: a masked autoencoder (He et al., CVPR 2022, arXiv:2111.06377), a few changes away.

    python -m extras.mae --preset shapes                   into runs/shapes-mae
    python -m extras.mae --preset cifar10 --mask-ratio .6 --out runs/mae

I-JEPA predicts the target encoder's features of four hidden blocks; a masked autoencoder predicts
the *pixels* of three quarters of the patches, hidden at random. There is no target encoder and
nothing that could collapse: the targets are the image's own. Encoder, predictor (here "decoder"),
loop and probes are I-JEPA's. Notation as in models.py; P values in a patch (C * p * p).
"""

import math

import torch
from torch import nn

import data
import train
from config import UsageError, check, parse_size
from masking import Masks
from models import Encoder, Output, Predictor, initialize, patchify, prediction_loss, take
from predict_and_visualize import unpatchify
from support import checkpoint, command_line

PROGRAM = "-m extras.mae --mask-ratio"  # what resumes a run, followed by its ratio


class RandomMasking:
    """Hides a fraction of the patches at random, as one target block; the others are the context.

    grid: patches along each axis; hidden: the fraction hidden. Raises UsageError if none is hidden,
    or all are.
    """

    def __init__(self, grid, hidden=0.75):
        self.grid, self.N = tuple(grid), math.prod(grid)
        self.count = round(self.N * hidden) if 0 < hidden < 1 else 0  # round(NaN) raises
        check(0 < self.count < self.N, "mask_ratio", hidden,
              f"a fraction that hides at least 1 of {self.N} patches and leaves at least 1")

    def __call__(self, B, generator=None):
        """Draw masks for B images -> Masks with M = 1 and without padding."""
        order = torch.rand(B, self.N, generator=generator).argsort(dim=1)  # [B, N]
        hidden = order[:, : self.count].sort(dim=1).values  # [B, Nt]
        seen = order[:, self.count :].sort(dim=1).values  # [B, Nc]
        real = torch.ones(B, self.N, dtype=torch.bool)
        return Masks(seen, real[:, self.count :], hidden[:, None], real[:, None, : self.count])


def pixel_targets(images, patch_size):
    """Every patch's pixels, standardized within the patch: images [B, C, H, W] -> [B, N, P].

    That asks for structure and not for brightness, and gives better features (table 1d).
    """
    patches = patchify(images, patch_size)  # [B, N, P]
    std, mean = torch.std_mean(patches, dim=-1, keepdim=True)  # [B, N, 1]
    return (patches - mean) / (std.square() + 1e-6).sqrt()


def predict_pixels(predictor, values):
    """Replace a Predictor's last layer by one that gives `values` numbers a patch; returns it."""
    predictor.project = nn.Linear(predictor.project.in_features, values)
    initialize(predictor.project)
    return predictor


class MAE(nn.Module):
    """An encoder of the visible patches, and a decoder that predicts the hidden patches' pixels."""

    def __init__(self, encoder, decoder):
        super().__init__()
        self.context_encoder = encoder
        self.predictor = predict_pixels(decoder, encoder.patch_embed.project.in_features)

    @property
    def target_encoder(self):
        """The encoder whose features are kept."""
        return self.context_encoder

    def forward(self, images, masks):
        """Images float [B, C, H, W] and their Masks -> Output; its tokens are None, because no
        encoder sees the whole image in a step. Predictions and targets are [B, 1, Nt, P]."""
        context = self.context_encoder(images, masks.context, masks.context_valid)  # [B, Nc, D]
        predictions = self.predictor(context, masks)  # [B, 1, Nt, P]
        targets = self.make_targets(images, masks)  # [B, 1, Nt, P]
        loss = prediction_loss(predictions, targets, masks.targets_valid, "l2")
        return Output(loss, predictions, targets, None)

    def make_targets(self, images, masks):
        """What is to be predicted [B, 1, Nt, P]: the hidden patches' pixels."""
        return take(pixel_targets(images, self.context_encoder.patch_size), masks.targets)

    def update_target(self, momentum):
        """Nothing: no target encoder follows."""


def build(config, channels=3, axes=2, mask_ratio=0.75):
    """The MAE and the mask sampler that a Config describes, for images with so many channels."""
    torch.manual_seed(config.seed)
    encoder = Encoder(*parse_size(config.encoder), (config.image_size,) * axes, config.patch_size,
                      channels)
    decoder = Predictor(encoder.width, encoder.grid, *parse_size(config.predictor, "predictor"))
    return MAE(encoder, decoder), RandomMasking(encoder.grid, mask_ratio)


# --- what it sees and what it answers -------------------------------------------------------------


@torch.no_grad()
def reconstruct(model, images, masks):
    """What an MAE sees, hidden patches 0, and its answer in their place: two [B, C, H, W].

    Predicted patches are standardized; they get the true patch's mean and deviation, as in the
    paper's figures.
    """
    encoder, hidden = model.context_encoder, masks.targets[:, 0]  # [B, Nt]
    patches = patchify(images, encoder.patch_size)  # [B, N, P]
    std, mean = torch.std_mean(patches, dim=-1, keepdim=True)  # [B, N, 1]
    answer = model(images, masks).predictions[:, 0] * take(std, hidden) + take(mean, hidden)
    index = hidden[..., None].expand_as(answer)  # [B, Nt, P]
    parts = patches.scatter(1, index, 0.0), patches.scatter(1, index, answer)
    return tuple(unpatchify(part, images.shape[1:], encoder.patch_size) for part in parts)


def load_run(folder, device="cpu"):
    """A run of this program, as train.load_run: its MAE in eval mode, its mask sampler, its Config
    and a dict about its data. Raises UsageError if it is no MAE."""
    config, about, state = checkpoint.load(folder)
    program = about.get("program", "train.py")
    if not program.startswith(PROGRAM):
        raise UsageError(f"{folder} holds a run of {program}, not a masked autoencoder")
    ratio = float(program.split()[-1])
    model, masking = build(config, about["channels"], about["axes"], ratio)
    checkpoint.load_weights(model, state["model"], folder)
    return model.to(device).eval(), masking, config, about


# --- the program ----------------------------------------------------------------------------------


def parser(description):
    """train.py's flags and --mask-ratio."""
    p = command_line.parser(description)
    p.add_argument("--mask-ratio", type=float, default=0.75, help="fraction hidden [0.75]")
    return p


def main(argv=None):
    """The command line: as train.py's."""
    arguments = command_line.parse(argv, "Pretrain a masked autoencoder. Flags of target blocks, "
                                   "context, loss and momentum have no effect.", parser, "-mae")
    config, ratio = arguments.config, arguments.mask_ratio
    dataset = data.load(config.dataset, config.split, config.data_dir, config.image_size)
    model, masking = build(config, *dataset.shape, ratio)
    train.train(config, model, masking, dataset, arguments.resume, arguments.override,
                f"{PROGRAM} {ratio}")


if __name__ == "__main__":
    command_line.run(main)
