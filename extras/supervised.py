"""The upper bound: the same encoder trained on the labels, with a linear head on pooled tokens.

    python -m extras.supervised --preset shapes            into runs/shapes-supervised

What labels alone teach this architecture in the same loop. Masks and predictor are gone.
"""

import torch
import torch.nn.functional as F
from torch import nn

import data
import train
from config import UsageError, parse_size
from models import Encoder, Output, initialize
from support import command_line


class Supervised(nn.Module):
    """An Encoder whose average-pooled tokens a linear head sorts into K classes."""

    def __init__(self, encoder, classes):
        super().__init__()
        self.context_encoder, self.head = encoder, nn.Linear(encoder.width, classes)
        initialize(self.head)

    @property
    def target_encoder(self):
        """The encoder whose features are kept."""
        return self.context_encoder

    def forward(self, images, labels):
        """Images float [B, C, H, W], labels int64 [B] -> Output(loss, logits [B, K], labels,
        tokens [B, N, D])."""
        tokens = self.context_encoder(images)  # [B, N, D]
        logits = self.head(tokens.mean(dim=1))  # [B, K]
        return Output(F.cross_entropy(logits, labels), logits, labels, tokens.detach())

    def update_target(self, momentum):
        """Nothing: no target encoder follows."""


def build(config, channels=3, axes=2, classes=10):
    """The model that a Config describes, for images with so many channels, and no mask sampler."""
    torch.manual_seed(config.seed)
    encoder = Encoder(*parse_size(config.encoder), (config.image_size,) * axes, config.patch_size,
                      channels)
    return Supervised(encoder, classes), None


def main(argv=None):
    """The command line: train.py's flags. Raises UsageError for data without labels."""
    arguments = command_line.parse(argv, "Train an encoder on labels. Flags of masks, predictor, "
                                   "loss and momentum have no effect.", suffix="-supervised")
    config = arguments.config
    dataset = data.load(config.dataset, config.split, config.data_dir, config.image_size)
    if dataset.labels is None:
        raise UsageError(f"--dataset {config.dataset} --split {config.split} has no labels")
    model, masking = build(config, *dataset.shape, dataset.describe()["classes"])
    train.train(config, model, masking, dataset, arguments.resume, arguments.override,
                "-m extras.supervised")


if __name__ == "__main__":
    command_line.run(main)
