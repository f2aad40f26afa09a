"""The contrast: a masked autoencoder (He et al., CVPR 2022) on the same patch embedding, blocks and positions as I-JEPA.

What differs from I-JEPA is what is predicted, and for which patches. I-JEPA predicts the target encoder's features of four hidden
blocks; a masked autoencoder predicts the *pixels* of three quarters of the patches, hidden at random. There is no target encoder,
and nothing that could collapse: the targets are the image's own. Alphabet as in models.py; `P` values in a patch (C * p**2).
"""

import torch
from torch import nn

from config import UsageError
from masking import RandomMasking
from models import Output, Predictor, initialise, patchify, prediction_loss, take, unpatchify


def pixel_targets(images, patch_size):
    """Each patch's pixels with the patch's own mean removed and divided by its own deviation: images [B, C, H, W] -> [B, N, P].

    (He et al., table 1d: predicting normalised pixels gives better features, for it asks for structure and not for brightness.)
    """
    patches = patchify(images, patch_size)  # [B, N, P]
    std, mean = torch.std_mean(patches, dim=-1, keepdim=True)  # [B, N, 1]
    return (patches - mean) / (std.square() + 1e-6).sqrt()


def predict_pixels(predictor, values):
    """Give a Predictor a last layer that answers with `values` numbers a patch instead of a feature; returns the predictor.

    Raises UsageError for one value a patch, which has no deviation to be divided by.
    """
    if values < 2:
        raise UsageError("--patch-size is 1: a patch of one grey pixel has no contrast to predict; it must be 2 or more")
    predictor.project = nn.Linear(predictor.project.in_features, values)
    initialise(predictor.project)
    return predictor


class MAE(nn.Module):
    """Encoder of the visible patches, and a decoder that predicts the pixels of the hidden ones.

    encoder: an Encoder; decoder: 'width x depth x heads'; hidden: the fraction of patches hidden (paper .75). The decoder is I-JEPA's
    Predictor: context and mask tokens with positions, blocks, a linear layer, here to pixels. It has the names that training,
    diagnostics and probes look for: `context_encoder`, `target_encoder` (the same one), `predictor`, `masking`.
    """

    def __init__(self, encoder, decoder="512x8x16", hidden=0.75):
        super().__init__()
        self.context_encoder = encoder
        self.predictor = predict_pixels(Predictor(decoder, encoder.width, encoder.grid), encoder.patch_embed.project.in_features)
        self.masking = RandomMasking(encoder.grid, hidden)
        self.loss = "l2"

    @property
    def target_encoder(self):
        """The encoder whose features are kept."""
        return self.context_encoder

    def forward(self, images, masks=None, generator=None):
        """images float [B, C, H, W]. In train mode, or given Masks -> Output(loss, predictions [B, 1, Nt, P], targets, the same); masks not
        given are drawn from `generator`. In eval mode without masks -> the tokens of every patch [B, N, D].

        Output.tokens is None: no encoder sees the whole image in a step.
        """
        if masks is None and not self.training:
            return self.context_encoder(images)  # [B, N, D]
        masks = (masks or self.masking(len(images), generator)).to(images.device)
        context = self.context_encoder(images, masks.context)  # [B, Nc, D]
        predictions = self.predictor(context, masks)  # [B, 1, Nt, P]
        targets = self.targets(images, masks)
        return Output(prediction_loss(predictions, targets, kind="l2"), predictions, targets)

    def targets(self, images, masks):
        """What is to be predicted [B, 1, Nt, P]: the hidden patches' pixels, each patch normalised."""
        return take(pixel_targets(images, self.context_encoder.patch_size), masks.targets)

    def update_target(self, momentum):
        """Nothing: there is no target encoder that follows."""


@torch.no_grad()
def reconstruct(model, images, masks):
    """(masked, reconstructed) images [B, C, H, W]: what the MAE sees (hidden patches 0, the mean colour), and its answer in their place.

    The predicted patches are normalised; they are given the true patch's mean and deviation, as the paper's figures are.
    """
    patch = model.context_encoder.patch_size
    patches = patchify(images, patch)  # [B, N, P]
    std, mean = torch.std_mean(patches, dim=-1, keepdim=True)  # [B, N, 1]
    predictions = model(images, masks).predictions[:, 0]  # [B, Nt, P]
    hidden = masks.targets[:, 0]  # [B, Nt]
    masked, answered = patches.clone(), patches.clone()
    rows = torch.arange(len(images), device=images.device)[:, None]  # [B, 1]
    masked[rows, hidden] = 0.0
    answered[rows, hidden] = predictions * take(std, hidden) + take(mean, hidden)
    return tuple(unpatchify(part, model.context_encoder.grid, patch) for part in (masked, answered))
