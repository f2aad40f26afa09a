"""Everything that the one training loop can train: I-JEPA, I-JEPA with a part taken away, the masked autoencoder, and supervision.

`build` makes the model that `--method` names, with what goes beyond the paper where that is asked for: targets of several layers, VICReg's
terms, registers, stochastic depth. Each has what the loop, the diagnostics and the probes use: `forward(images, generator=...)`
with a loss, `update_target`, and the `target_encoder` whose features are kept.
"""

import functools
import math
import os

import torch
import torch.nn.functional as F
from torch import nn

import config as settings
from extras import mae
from config import UsageError
from extras.fast_masking import FastMultiBlockMasking
from masking import RandomMasking, RasterMasking
from models import IJEPA, Encoder, Output, Predictor, initialise, parse_size, take


def variance_and_covariance(features):
    """How far features float [B, D] are from telling images apart in every direction, a scalar (VICReg, arXiv:2105.04906, eq. 1 to 4).

    The mean over the width of what a feature's deviation lacks of 1, and, a 25th as heavy, the squared covariances of different features,
    summed and divided by the width.
    """
    centred = features.float() - features.float().mean(0)  # [B, D]
    with torch.autocast(features.device.type, enabled=False):  # which would square in bfloat16
        covariance = centred.T @ centred / max(len(features) - 1, 1)  # [D, D]
    deviation = (covariance.diagonal() + 1e-4).sqrt()  # [D]
    off_diagonal = covariance.square().sum() - covariance.diagonal().square().sum()
    return F.relu(1 - deviation).mean() + off_diagonal / features.shape[1] / 25


class AblatedIJEPA(IJEPA):
    """I-JEPA with a part taken away, changed or added, to see what it is for; with these defaults nothing is.

    stop_gradient=False: the context encoder makes its own targets, and gradients reach them. target_norm=False: targets as they come.
    target_layers=K: targets are the mean of the last K blocks' layer-normed outputs (data2vec, arXiv:2202.03555). vicreg=weight: the loss
    has `variance_and_covariance` of the context's pooled features as well (C-JEPA, arXiv:2410.19560). pixels=True: the targets
    are normalised pixels. masked_input=True: the target encoder sees one target block at a time and nothing else (paper table 11). With
    one of the last two no encoder sees the whole image in a step, and Output.tokens is None.
    """

    def __init__(self, encoder, predictor, masking, loss, stop_gradient=True, target_norm=True, pixels=False, masked_input=False,
                 target_layers=1, vicreg=0.0):
        super().__init__(encoder, predictor, masking, loss)
        self.target_layers, self.vicreg = target_layers, vicreg
        self.stop_gradient, self.target_norm, self.pixels, self.masked_input = stop_gradient, target_norm, pixels, masked_input
        if not stop_gradient:
            self.target_encoder = self.context_encoder
        if pixels:
            mae.predict_pixels(self.predictor, encoder.patch_embed.project.in_features)

    def forward(self, images, masks=None, generator=None):
        self.pooled = []  # what `predict` sees of the images: all of them at once, or in groups
        output = super().forward(images, masks, generator)
        pooled, self.pooled = self.pooled, []  # kept no longer: a model that holds tensors of a graph cannot be copied
        if not pooled:
            return output
        return output._replace(loss=output.loss + self.vicreg * variance_and_covariance(torch.cat(pooled)))

    def predict(self, images, masks):
        context = self.context_encoder(images, masks.context, masks.context_valid)  # [B, Nc, D]
        if self.vicreg:
            real = masks.valid()[0][..., None]  # [B, Nc, 1]
            self.pooled.append((context * real).sum(1) / real.sum(1))  # [B, D]
        return self.predictor(context, masks)  # [B, M, Nt, D]

    def normalise(self, tokens):
        """Layer norm without affine parameters, or nothing: tokens [..., D] -> [..., D]."""
        return super().normalise(tokens) if self.target_norm else tokens

    def encode_whole(self, images):
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.stop_gradient):
            layers = self.target_encoder(images, return_layers=self.target_layers)  # K of [B, N, D]
            wanted = torch.stack([self.normalise(layer) for layer in layers]).mean(0)  # [B, N, D]
            return (self.normalise(wanted) if self.target_layers > 1 else wanted), layers[-1]

    def targets_and_tokens(self, images, masks):
        if self.pixels:
            return take(mae.pixel_targets(images, self.context_encoder.patch_size), masks.targets), None  # [B, M, Nt, P]
        if not self.masked_input:
            return super().targets_and_tokens(images, masks)  # [B, M, Nt, D], [B, N, D]
        (B, M), valid = masks.targets.shape[:2], masks.targets_valid
        valid = None if valid is None else valid.flatten(0, 1)  # [B*M, Nt]
        with torch.no_grad():
            tokens = self.target_encoder(images.repeat_interleave(M, 0), masks.targets.flatten(0, 1), valid)  # [B*M, Nt, D]
            return self.normalise(tokens).unflatten(0, (B, M)), None  # [B, M, Nt, D]


class Supervised(nn.Module):
    """The same encoder trained on the labels, average-pooled with a linear head: what labels alone teach this architecture."""

    def __init__(self, encoder, classes):
        super().__init__()
        self.context_encoder, self.head = encoder, nn.Linear(encoder.width, classes)
        initialise(self.head)

    @property
    def target_encoder(self):
        """The encoder whose features are kept."""
        return self.context_encoder

    def forward(self, images, labels=None, generator=None):
        """images float [B, C, H, W] with labels int64 [B] -> Output(loss, logits [B, K], labels, tokens [B, N, D]); without
        labels -> the tokens alone.

        There is no mask to draw from the loop's generator.
        """
        tokens = self.context_encoder(images)  # [B, N, D]
        if labels is None:
            return tokens
        logits = self.head(tokens.mean(1))  # [B, K]
        return Output(F.cross_entropy(logits, labels), logits, labels, tokens.detach())

    def update_target(self, momentum):
        """Nothing: there is no target encoder that follows."""


def drop(module, inputs, output, rate):
    """A forward hook: in training, output [B, N, D] of a residual branch is 0 for some of the images, and for the others as much larger."""
    if not module.training:
        return output
    kept = torch.rand(len(output), 1, 1, device=output.device) >= rate  # [B, 1, 1]
    return output * kept / (1 - rate)


def stochastic_depth(encoder, rate):
    """Have an Encoder skip, while it trains, attention and MLP of its blocks at random, image by image: with a probability that rises over
    the depth to `rate` (Huang et al. 2016, arXiv:1603.09382).
    """
    for number, block in enumerate(encoder.blocks, 1):
        for branch in (block.attention, block.mlp):
            branch.register_forward_hook(functools.partial(drop, rate=rate * number / len(encoder.blocks)))


def masking(config, grid):
    """The sampler of masks that a Config describes, on a grid."""
    if config.masks == "random":
        return RandomMasking(grid, config.mask_ratio)
    if config.masks == "raster":
        return RasterMasking(grid)
    return FastMultiBlockMasking(grid, config.num_targets, config.target_scale, config.target_aspect, config.context_scale,
                                 config.context_size, config.mask_mode, config.min_keep, config.allow_overlap)


def least_memory(config, channels=1, axes=2):
    """Bytes that training with a Config takes at the very least, on images or, with 3 axes, volumes, of so many channels.

    Counted are the weights of layers, with their gradients, the optimizer's moments and the target encoder; a batch of images, and their
    patches' tokens. A machine with less cannot train; one with as much needs several times more.
    """
    width, depth, _, ratio = parse_size(config.encoder, "--encoder", axes)
    narrow, shallow, _, _ = parse_size(config.predictor, "--predictor", axes)
    N, values = (config.image_size // config.patch_size) ** axes, channels * config.patch_size**axes  # patches, pixels in each
    encoder = width * (values + config.registers) + depth * width**2 * (4 + 2 * ratio)  # patch embedding; attention and MLP of each block
    predictor = 0 if config.method == "supervised" else 2 * width * narrow + shallow * narrow**2 * 12
    target = encoder if config.method.startswith("ijepa") and config.stop_gradient else 0
    copies = 3 if config.optimizer == "sgd" else 4
    tokens = config.batch_size * (N * (4 * values + 2 * width) + config.registers * 2 * width)  # which may be bf16
    return 4 * (copies * (encoder + predictor) + target) + tokens


def check_memory(config, device, channels=1, axes=2):
    """Raise UsageError for sizes that this machine's memory cannot hold; with no more known of the data, those of one channel, two axes."""
    if device.type == "cuda":
        there = torch.cuda.mem_get_info(device)[1]
    else:
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else math.inf  # Windows says nothing
    needed = least_memory(config, channels, axes)
    if needed > there:
        sizes = " ".join(f"--{name.replace('_', '-')} {getattr(config, name)}"
                         for name in ("batch_size", "image_size", "patch_size", "encoder", "predictor")
                         + ("registers",) * (config.registers > 0))
        raise UsageError(f"{sizes}: training would take {needed / 1e9:,.0f} GB of memory or more, {device} has {there / 1e9:,.0f}; "
                         "lower the largest")


def build(config, channels=3, axes=2, classes=0):
    """The model that a Config describes; `classes` is read by supervision only. Raises UsageError where settings do not go together."""
    model = assemble(config, channels, axes, classes)
    for part in model.modules():
        if isinstance(part, (Encoder, Predictor)):
            part.recompute = config.recompute
    if config.stochastic_depth:  # the target encoder, a copy made before, always goes through all of its blocks
        stochastic_depth(model.context_encoder, config.stochastic_depth)
    return model


def assemble(config, channels, axes, classes):
    """The parts that a Config names, put together; as `build`, but for what does not change the model."""
    encoder = Encoder(config.encoder, config.image_size, config.patch_size, channels, axes, config.registers)
    if config.method == "mae":
        return mae.MAE(encoder, config.predictor, config.mask_ratio)
    if config.method == "supervised":
        return Supervised(encoder, classes)
    parts = encoder, config.predictor, masking(config, encoder.grid), config.loss
    changed = {"stop_gradient": config.stop_gradient, "target_norm": config.target_norm, "pixels": config.targets == "pixels",
               "masked_input": config.masked_input, "target_layers": config.target_layers, "vicreg": config.vicreg}
    settings.need(config, config.target_layers <= len(encoder.blocks), "target_layers", f"--encoder {config.encoder} has "
                  f"{len(encoder.blocks)} blocks")
    if all(changed[name] == whole for name, whole in WHOLE.items()):
        return IJEPA(*parts)
    return AblatedIJEPA(*parts, **changed)


WHOLE = {"stop_gradient": True, "target_norm": True, "pixels": False, "masked_input": False, "target_layers": 1, "vicreg": 0.0}
