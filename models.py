"""I-JEPA from patches to loss (Assran et al., CVPR 2023), from small to large.

Notation: B images, C H W channels and pixels, p pixels along a side of a patch, N patches in the
grid, Nc context patches kept (padded), M target blocks, Nt patches in a target block (padded),
D encoder width, Dp predictor width, nh heads, axes: 2 for images, 3 for volumes. Patch indices are
in raster order. A boolean mask is True at real patches and False at padding, which is also what
scaled_dot_product_attention means by True: attend to it.
"""

import copy
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from config import UsageError, check_choice, parse_size

# --- from pixels to tokens ------------------------------------------------------------------------


def patchify(images, p):
    """Cut images [B, C, H, W] into patches [B, N, C*p*p], in raster order.

    Within a patch: channel by channel, each row by row.
    """
    axes = images.ndim - 2
    for axis in range(2, 2 + axes):  # rows, then columns
        images = images.unfold(axis, p, p)  # [B, C, H/p, W, p], then [B, C, H/p, W/p, p, p]
    patches = images.movedim(1, 1 + axes)  # [B, H/p, W/p, C, p, p]
    return patches.flatten(1 + axes).flatten(1, axes)  # [B, N, C*p*p]


class PatchEmbed(nn.Module):
    """One linear map from a patch's pixels to a token (the same as a strided convolution)."""

    def __init__(self, patch_size, channels, width, axes=2):
        super().__init__()
        self.patch_size = patch_size
        self.project = nn.Linear(channels * patch_size**axes, width)

    def forward(self, images):
        return self.project(patchify(images, self.patch_size))  # [B, C, H, W] -> [B, N, D]


def sincos_positions(grid, width):
    """Fixed sine-cosine positions of the patches, float32 [N, width] (paper appendix A.1).

    As in the official code, half of the width encodes the column and half the row: in each half
    first the sines, then the cosines of coordinate / 10000**(i / K) for i = 0 ... K - 1, with
    K = width // 4. Each of three axes has a third, with K = width // 6. Numbers left over are 0.
    """
    K = width // (2 * len(grid))
    frequency = 10000.0 ** -(torch.arange(K, dtype=torch.float64) / K)  # [K]
    lines = [torch.arange(side, dtype=torch.float64) for side in grid]
    coordinates = torch.meshgrid(*lines, indexing="ij")  # the row and the column of every patch
    parts = []
    for coordinate in reversed(coordinates):
        angle = coordinate.reshape(-1, 1) * frequency  # [N, K]
        parts += [angle.sin(), angle.cos()]
    positions = torch.cat(parts, dim=1).float()  # [N, 4K]
    return F.pad(positions, (0, width - positions.shape[1]))  # [N, width]


def take(tokens, indices):
    """Pick tokens [B, N, D] at patch indices [B, ...] -> [B, ..., D]."""
    flat = indices.flatten(1)[..., None].expand(-1, -1, tokens.shape[-1])  # [B, K, D]
    return tokens.gather(1, flat).unflatten(1, indices.shape[1:])  # [B, ..., D]


# --- the transformer ------------------------------------------------------------------------------


def explicit_attention(q, k, v, mask=None):
    """Softmax attention written out: q, k, v [B, nh, N, D/nh] -> [B, nh, N, D/nh].

    mask: bool, broadcast to [B, nh, N, N], True where a query may attend to a key. The model uses
    this on a CPU, where in bfloat16 it is faster than the fused kernel, and the kernel elsewhere;
    the tests check that both give the same result.
    """
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])  # [B, nh, N, N]
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    return scores.softmax(dim=-1) @ v  # [B, nh, N, D/nh]


class Attention(nn.Module):
    """Multi-head self-attention over a padded batch: x [B, N, D], valid bool [B, N] -> [B, N, D].

    Every token attends to the valid tokens only; what padding itself computes is never read.
    """

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)

    def forward(self, x, valid=None):
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))  # [B, N, 3, nh, D/nh]
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, nh, N, D/nh]
        mask = None if valid is None else valid[:, None, None, :]  # [B, 1, 1, N]
        attend = explicit_attention if x.device.type == "cpu" else F.scaled_dot_product_attention
        x = attend(q, k, v, mask)  # [B, nh, N, D/nh]
        return self.project(x.transpose(1, 2).flatten(2))  # [B, N, D]


class Block(nn.Module):
    """Pre-norm transformer block: x + attention(norm(x)), then x + MLP(norm(x)); [B, N, D]."""

    def __init__(self, width, heads, mlp_ratio=4.0):
        super().__init__()
        hidden = round(width * mlp_ratio)
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x, valid=None):
        x = x + self.attention(self.norm1(x), valid)
        return x + self.mlp(self.norm2(x))


def initialize(module):
    """Linear weights Xavier-uniform, biases 0, as in MAE.

    Differs: the official code draws from a normal of deviation .02. At the widths of small models
    that is far below Xavier's, and the positions, sines and cosines, would drown the patches. For
    the same reason Encoder doubles the weights of its patch embedding.
    """
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


class Encoder(nn.Module):
    """A vision transformer without class token that can be given some of the patches (section 3).

    image_size and patch_size in pixels; image_size is one number for a square image, or (H, W).
    Attributes: width (D), grid (patches along each axis), image_size.
    Raises UsageError unless the patch size divides the image size, and 4 and the heads the width.
    """

    def __init__(self, width=192, depth=6, heads=3, image_size=32, patch_size=4, channels=3,
                 mlp_ratio=4.0):
        super().__init__()
        sides = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        parse_size(f"{width}x{depth}x{heads}")  # refuses what the command line refuses
        if patch_size < 1 or any(side < 1 or side % patch_size for side in sides):
            raise UsageError(f"patches of {patch_size} pixels do not divide an image of {sides}")
        self.width, self.image_size, self.patch_size = width, sides, patch_size
        self.grid = tuple(side // patch_size for side in sides)
        self.patch_embed = PatchEmbed(patch_size, channels, width, len(sides))
        self.register_buffer("positions", sincos_positions(self.grid, width), persistent=False)
        self.blocks = nn.ModuleList(Block(width, heads, mlp_ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.apply(initialize)
        with torch.no_grad():
            self.patch_embed.project.weight.mul_(2.0)

    def forward(self, images, indices=None, valid=None):
        """Encode all patches of float images [B, C, H, W] -> [B, N, D], or only those listed.

        indices: int64 [B, Nc], the patches *kept*; valid: bool [B, Nc], True at real entries.
        With indices the result is [B, Nc, D].
        """
        if images.shape[2:] != self.image_size:
            raise UsageError(f"expected images of {self.image_size}, got {tuple(images.shape[2:])}")
        x = self.patch_embed(images) + self.positions  # [B, N, D]
        if indices is not None:
            # Hidden patches leave before the first block; padding, patch 0, is shut out by `valid`.
            x = take(x, indices)  # [B, Nc, D]
        for block in self.blocks:
            x = block(x, valid)
        return self.norm(x)


# --- I-JEPA ---------------------------------------------------------------------------------------


class Predictor(nn.Module):
    """A narrow transformer: "what is the representation at this place?" (section 3, Prediction).

    encoder_width: D; grid: the encoder's; width: Dp.
    """

    def __init__(self, encoder_width, grid, width=96, depth=4, heads=2):
        super().__init__()
        parse_size(f"{width}x{depth}x{heads}", "predictor")
        self.embed = nn.Linear(encoder_width, width)
        self.mask_token = nn.Parameter(torch.zeros(width))
        self.register_buffer("positions", sincos_positions(grid, width), persistent=False)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.project = nn.Linear(width, encoder_width)
        self.apply(initialize)
        nn.init.trunc_normal_(self.mask_token, std=0.02)

    def forward(self, context, masks):
        """Context tokens [B, Nc, D] -> predictions [B, M, Nt, D] at the target patches.

        Target blocks do not see each other: each becomes a row of the batch of its own, with its
        own copy of the context.
        """
        B, M, Nt = masks.targets.shape
        context = self.embed(context) + self.positions[masks.context]  # [B, Nc, Dp]
        queries = self.mask_token + self.positions[masks.targets]  # [B, M, Nt, Dp]
        context = context[:, None].expand(-1, M, -1, -1)  # [B, M, Nc, Dp]
        context_valid = masks.context_valid[:, None].expand(-1, M, -1)  # [B, M, Nc]
        x = torch.cat([context, queries], dim=2).flatten(0, 1)  # [B*M, Nc+Nt, Dp]
        valid = torch.cat([context_valid, masks.targets_valid], dim=2).flatten(0, 1)  # [B*M, Nc+Nt]
        for block in self.blocks:
            x = block(x, valid)
        return self.project(self.norm(x[:, -Nt:])).unflatten(0, (B, M))  # [B, M, Nt, D]


def prediction_loss(predictions, targets, valid, kind="smooth_l1"):
    """Mean distance over the real target patches and the width, a scalar (section 3, Loss).

    predictions, targets [B, M, Nt, D]; valid bool [B, M, Nt]; kind: smooth_l1, as in the official
    code, or l2, as in the paper.
    """
    distance = F.smooth_l1_loss if kind == "smooth_l1" else F.mse_loss
    loss = distance(predictions.float(), targets.float(), reduction="none").mean(-1)  # [B, M, Nt]
    return (loss * valid).sum() / valid.sum()


class Output(NamedTuple):
    """What one forward pass gives."""

    loss: torch.Tensor  # []
    predictions: torch.Tensor  # [B, M, Nt, D]
    targets: torch.Tensor  # [B, M, Nt, D]
    tokens: torch.Tensor  # [B, N, D]: the target encoder's, of the whole image


class IJEPA(nn.Module):
    """Context encoder, predictor, and target encoder, an EMA of the context encoder.

    Context encoder and predictor could agree on a constant, which is easy to predict: collapse. Two
    things prevent it. No gradient reaches the targets, and the encoder that makes them follows
    slowly. After training only the target encoder is kept.

    encoder: an Encoder, or a module that is called as encoder(images, indices=None, valid=None) and
    attends to valid patches only. It must have no buffers that change: the EMA updates only
    parameters.
    """

    def __init__(self, encoder, predictor, loss="smooth_l1"):
        super().__init__()
        check_choice("loss", loss, ("smooth_l1", "l2"))
        self.context_encoder, self.predictor, self.loss = encoder, predictor, loss
        self.target_encoder = copy.deepcopy(encoder).requires_grad_(False)

    def forward(self, images, masks):
        """Normalized images float [B, C, H, W] and their Masks -> Output."""
        targets, tokens = self.make_targets(images, masks)  # [B, M, Nt, D], [B, N, D]
        context = self.context_encoder(images, masks.context, masks.context_valid)  # [B, Nc, D]
        predictions = self.predictor(context, masks)  # [B, M, Nt, D]
        loss = prediction_loss(predictions, targets, masks.targets_valid, self.loss)
        return Output(loss, predictions, targets, tokens)

    @torch.no_grad()
    def make_targets(self, images, masks):
        """What is to be predicted [B, M, Nt, D], and the tokens [B, N, D] that it is taken from.

        The target encoder sees the whole image; its tokens are layer-normed (without weights, so
        that targets keep one scale), and only then are the target blocks cut out (paper table 11:
        masking its output beats masking its input).
        """
        tokens = self.target_encoder(images)  # [B, N, D]
        return take(F.layer_norm(tokens, tokens.shape[-1:]), masks.targets), tokens

    @torch.no_grad()
    def update_target(self, momentum):
        """target <- momentum * target + (1 - momentum) * context, for every weight (section 3)."""
        pairs = zip(self.target_encoder.parameters(), self.context_encoder.parameters())
        for target, context in pairs:
            target.lerp_(context, 1 - momentum)
