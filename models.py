"""I-JEPA from patch embedding to loss (Assran et al., CVPR 2023), every part written out.

Alphabet: B images, C H W channels and pixels, N patches in the grid, Nc context patches kept (padded), M target blocks,
Nt patches in a target block (padded), D encoder width, Dp predictor width, nh heads. Batch first. Patch indices are in
raster order. A boolean mask is True at real patches and False at padding, which is also what
`scaled_dot_product_attention` means by True: "may be attended to".
"""

import copy
import math
from collections import namedtuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from config import UsageError, check_known, near
from masking import Masks, MultiBlockMasking

# loss []; predictions and targets [B, M, Nt, D]; tokens [B, N, D] of the whole image, detached: what an online probe reads, or None.
Output = namedtuple("Output", "loss predictions targets tokens", defaults=(None,))

# Named encoders: width, depth, heads, MLP ratio (ViT papers; huge and giant as in I-JEPA's appendix A.1).
SIZES = {
    "tiny": (192, 12, 3, 4.0),
    "small": (384, 12, 6, 4.0),
    "base": (768, 12, 12, 4.0),
    "large": (1024, 24, 16, 4.0),
    "huge": (1280, 32, 16, 4.0),
    "giant": (1408, 40, 16, 48 / 11),
}
DEEPEST = 1000  # blocks; the paper's deepest has 40


def parse_size(name, flag="--encoder", axes=2):
    """(width, depth, heads, MLP ratio) of a named size, of 'width x depth x heads', as '192x6x6', where the ratio is 4, or of
    'width x depth x heads x MLP width', as '1408x40x16x6144'.

    Raises UsageError, naming the flag, where it is none of these, or where the width does not hold positions on so many axes.
    """
    if name in SIZES:
        return SIZES[name]
    try:
        width, depth, heads, *hidden = (int(part) for part in name.split("x"))
        (hidden,) = hidden or [4 * width]
    except ValueError:
        raise UsageError(f"{flag} is {name}: neither one of {', '.join(SIZES)} nor width x depth x heads, as in 192x6x6"
                         f"{near(name, SIZES)}") from None
    if min(width, depth, heads, hidden) < 1 or width % heads or width % 4:
        raise UsageError(f"{flag} is {name}: width must be a multiple of 4 and of the number of heads, and all of them at least 1")
    if width < 2 * axes or depth > DEEPEST:
        raise UsageError(f"{flag} is {name}: width must be {2 * axes} or more on {axes} axes, depth {DEEPEST} or less")
    return width, depth, heads, hidden / width


# --- from pixels to tokens ---------------------------------------------------------------------------------------------


def patchify(images, patch_size):
    """Cut images into patches, listed in raster order.

    images [B, C, H, W] (or [B, C, T, H, W]) -> [B, N, C * patch_size**2], each patch flattened channel first, then rows.
    """
    B, C, *sides = images.shape
    for axis, side in enumerate(sides):  # every side becomes (patches, pixels in a patch)
        images = images.unflatten(2 + 2 * axis, (side // patch_size, patch_size))  # [B, C, H/p, p, W/p, p]
    grid_axes = range(2, 2 + 2 * len(sides), 2)
    images = images.permute(0, *grid_axes, 1, *(axis + 1 for axis in grid_axes))  # [B, H/p, W/p, C, p, p]
    return images.flatten(1 + len(sides)).flatten(1, len(sides))  # [B, N, C*p*p]


def unpatchify(patches, grid, patch_size):
    """`patchify` undone: [B, N, C * patch_size**2] with N = rows * columns of the grid -> [B, C, H, W], in three axes likewise."""
    axes = len(grid)
    tiles = patches.unflatten(1, grid).unflatten(-1, (-1, *[patch_size] * axes))  # [B, H/p, W/p, C, p, p]
    pairs = [axis for i in range(axes) for axis in (1 + i, 2 + axes + i)]  # each axis of the grid beside its pixels
    images = tiles.permute(0, 1 + axes, *pairs)  # [B, C, H/p, p, W/p, p]
    return images.reshape(*images.shape[:2], *(side * patch_size for side in grid))  # [B, C, H, W]


class PatchEmbed(nn.Module):
    """One linear map from a patch's pixels to a token: images [B, C, H, W] -> [B, N, D]. (The same as a strided convolution.)"""

    def __init__(self, patch_size, channels, width, axes=2):
        super().__init__()
        self.patch_size = patch_size
        self.project = nn.Linear(channels * patch_size**axes, width)

    def forward(self, images):
        return self.project(patchify(images, self.patch_size))  # [B, N, D]


def sincos_positions(grid, width):
    """Fixed sine-cosine positions of a 2-D or 3-D grid, float32 [N, width] (MAE and the official code; paper appendix A.1).

    Each axis has an equal share of the channels, the last axis (columns) first; within a share, first the sines then the
    cosines of coordinate / 10000**(i / share). Channels left over (width not divisible) are 0.
    """
    axes = len(grid)
    share = width // (2 * axes)  # frequencies for each axis
    frequency = 10000.0 ** -(torch.arange(share, dtype=torch.float64) / share)
    coordinates = torch.meshgrid(*(torch.arange(side, dtype=torch.float64) for side in grid), indexing="ij")
    parts = []
    for coordinate in reversed(coordinates):
        angle = coordinate.reshape(-1, 1) * frequency  # [N, share]
        parts += [angle.sin(), angle.cos()]
    return F.pad(torch.cat(parts, dim=1), (0, width - 2 * axes * share)).float()  # [N, width]


def resize_positions(positions, old_grid, new_grid):
    """Interpolate positions [N, D] to another grid: bicubic in 2-D, trilinear in 3-D -> [N', D]."""
    image = positions.reshape(1, *old_grid, -1).movedim(-1, 1)  # [1, D, rows, columns]
    image = F.interpolate(image, size=new_grid, mode="bicubic" if len(old_grid) == 2 else "trilinear", align_corners=False)
    return image.flatten(2)[0].T  # [N', D]


def take(tokens, indices):
    """Pick tokens [B, N, D] at patch indices [B, ...] -> [B, ..., D]."""
    flat = indices.flatten(1)[..., None].expand(-1, -1, tokens.shape[-1])  # [B, K, D]
    return tokens.gather(1, flat).unflatten(1, indices.shape[1:])  # [B, ..., D]


# --- the transformer ---------------------------------------------------------------------------------------------------


def explicit_attention(q, k, v, attn_mask=None):
    """Softmax attention as the formula says it; the tests prove the fused kernel equal to it.

    q, k, v [B, nh, N, D/nh]; attn_mask bool, broadcast to [B, nh, N, N], True where a key may be attended to.
    """
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])  # [B, nh, N, N]
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -math.inf)
    return scores.softmax(dim=-1) @ v  # [B, nh, N, D/nh]


def attend(q, k, v, mask):
    """Softmax attention by the faster of two ways to compute the same, [B, nh, N, D/nh]; arguments as of explicit_attention.

    torch's fused kernel holds no N x N scores and is the faster one on a GPU and for long sequences. On a CPU the formula is: for the few
    tokens of small images, by a little; in bfloat16, at any length, by twice and more (results/speed_cpu.json).
    """
    if q.device.type == "cpu" and (k.shape[2] <= 128 or q.dtype == torch.bfloat16):
        return explicit_attention(q, k, v, mask)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class Attention(nn.Module):
    """Multi-head self-attention over a padded batch: x [B, N, D], valid [B, N] bool (True = real token) -> [B, N, D].

    With `first`, only the tokens from that number on ask, of all of them -> [B, N - first, D].
    """

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)

    def forward(self, x, valid=None, first=0):
        # Cut first, then seen as heads: the gradients of the three then come back together in one copy.
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))  # each [B, nh, N, D/nh]
        # Every query may look at the real tokens only; what padding itself computes is never read.
        mask = None if valid is None else valid[:, None, None, :]  # [B, 1, 1, N]
        x = attend(q[:, :, first:], k, v, mask)  # [B, nh, N - first, D/nh]
        return self.project(x.transpose(1, 2).flatten(2))  # [B, N - first, D]


class Block(nn.Module):
    """Pre-norm transformer block: x + attention(norm(x)), then x + MLP(norm(x)); with `first` of the tokens from that number on alone."""

    def __init__(self, width, heads, mlp_ratio=4.0):
        super().__init__()
        hidden = round(width * mlp_ratio)
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x, valid=None, first=0):
        x = x[:, first:] + self.attention(self.norm1(x), valid, first)  # [B, N - first, D]
        return x + self.mlp(self.norm2(x))


def apply_block(block, x, valid, recompute, first=0):
    """block(x, valid, first): x [B, N, D], valid bool [B, N] or None -> [B, N - first, D].

    With `recompute`, what a training block computes on the way is not kept for the backward pass: only x is, and the rest is computed
    a second time when its gradient is wanted (Chen et al. 2016, arXiv:1604.06174). The gradients are the same.
    """
    if recompute and block.training and torch.is_grad_enabled():
        return checkpoint(block, x, valid, first, use_reentrant=False)
    return block(x, valid, first)


def initialise(module):
    """Linear weights Xavier-uniform, biases 0, as in MAE.

    Differs: the official code ends with a normal of deviation .02, which is about Xavier's at width 1024 but far below it at
    the widths of small models, where the positions (of size 1) then drown the patches and learning starts late.
    """
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


class Encoder(nn.Module):
    """A vision transformer without class token, which can be given a part of the patches (paper section 3).

    image_size: pixels of the square (or cubic) image, or one number an axis; patch_size: pixels, the same on every axis;
    size: a name of SIZES or 'width x depth x heads'; registers: learned tokens that every image gets beside its patches, to compute with,
    and that are dropped at the end (Darcet et al. 2024, arXiv:2309.16588). Has `.width` (D), `.grid` and `.image_size`.
    Raises UsageError where the patch does not divide the image.
    """

    def __init__(self, size="base", image_size=224, patch_size=16, channels=3, axes=2, registers=0):
        super().__init__()
        sides = (image_size,) * axes if isinstance(image_size, int) else tuple(image_size)
        self.width, depth, heads, mlp_ratio = parse_size(size, "--encoder", len(sides))
        self.image_size, self.patch_size, self.grid = sides, patch_size, self._grid(sides, patch_size)
        self.patch_embed = PatchEmbed(patch_size, channels, self.width, len(sides))
        self.register_buffer("positions", sincos_positions(self.grid, self.width), persistent=False)
        self.blocks = nn.ModuleList(Block(self.width, heads, mlp_ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(self.width, eps=1e-6)
        self.registers = nn.Parameter(0.02 * torch.randn(registers, self.width)) if registers else None
        self.recompute = False  # methods.build sets it
        self.apply(initialise)
        with torch.no_grad():  # twice Xavier's, so that a patch's content counts for more than its position from the first step
            self.patch_embed.project.weight.mul_(2.0)

    @staticmethod
    def _grid(sides, patch_size):
        if any(side % patch_size or side < patch_size for side in sides):
            raise UsageError(f"patches of {patch_size} pixels do not divide an image of {'x'.join(map(str, sides))} pixels")
        return tuple(side // patch_size for side in sides)

    def forward(self, images, indices=None, valid=None, return_layers=None):
        """Encode all patches, or only those listed.

        images float [B, C, H, W], normalised; indices int64 [B, Nc] patches *kept*, or None for all N; valid bool [B, Nc],
        True at real entries, or None where nothing is padded. Returns [B, Nc, D] (or [B, N, D]), layer-normed; with
        return_layers=k a list of the last k blocks' outputs, each passed through the same last norm.
        """
        grid = self._grid(images.shape[2:], self.patch_size)
        x = self.patch_embed(images)  # [B, N, D]
        x = x + (self.positions if grid == self.grid else resize_positions(self.positions, self.grid, grid))  # [B, N, D]
        if indices is not None:
            x = take(x, indices)  # [B, Nc, D]: hidden patches leave before the first block, so nothing can leak from them
        Nc = x.shape[1]
        if self.registers is not None:  # R of them
            x = torch.cat([x, self.registers.expand(len(x), -1, -1)], dim=1)  # [B, Nc + R, D]
            valid = None if valid is None else F.pad(valid, (0, len(self.registers)), value=True)  # [B, Nc + R]
        layers = []
        for block in self.blocks:
            x = apply_block(block, x, valid, self.recompute)
            layers.append(x[:, :Nc])  # [B, Nc, D]
        return self.norm(layers[-1]) if return_layers is None else [self.norm(layer) for layer in layers[-return_layers:]]


# --- I-JEPA ------------------------------------------------------------------------------------------------------------


class Predictor(nn.Module):
    """A narrow transformer that answers "what is the representation at this place?" (paper section 3, "Prediction").

    size: 'width x depth x heads' (Dp may differ from D); encoder_width: D; grid: the encoder's.
    """

    def __init__(self, size, encoder_width, grid):
        super().__init__()
        width, depth, heads, mlp_ratio = parse_size(size, "--predictor", len(grid))
        self.embed = nn.Linear(encoder_width, width)
        self.mask_token = nn.Parameter(torch.zeros(width))
        self.register_buffer("positions", sincos_positions(grid, width), persistent=False)
        self.blocks = nn.ModuleList(Block(width, heads, mlp_ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.project = nn.Linear(width, encoder_width)
        self.recompute = False  # methods.build sets it
        self.apply(initialise)
        nn.init.trunc_normal_(self.mask_token, std=0.02)

    def forward(self, context, masks):
        """context [B, Nc, D] and its Masks -> predictions [B, M, Nt, D] at the target places; blocks do not see each other."""
        B, M, Nt = masks.targets.shape
        Nc = context.shape[1]
        context = self.embed(context) + self.positions[masks.context]  # [B, Nc, Dp]
        questions = self.mask_token + self.positions[masks.targets]  # [B, M, Nt, Dp]
        # One target block at a time: each of the M blocks gets its own copy of the context and its own row of the batch.
        x = torch.cat([context[:, None].expand(-1, M, -1, -1), questions], dim=2).flatten(0, 1)  # [B*M, Nc+Nt, Dp]
        valid = self._valid(masks)
        for block in self.blocks[:-1]:
            x = apply_block(block, x, valid, self.recompute)
        x = apply_block(self.blocks[-1], x, valid, self.recompute, Nc)  # [B*M, Nt, Dp]: nobody reads the context's own answers
        return self.project(self.norm(x)).unflatten(0, (B, M))  # [B, M, Nt, D]

    @staticmethod
    def _valid(masks):
        """Which of the Nc+Nt tokens are real, bool [B*M, Nc+Nt], or None where nothing is padded."""
        if masks.context_valid is None and masks.targets_valid is None:
            return None
        context, targets = masks.valid()  # [B, Nc], [B, M, Nt]
        return torch.cat([context[:, None].expand(-1, targets.shape[1], -1), targets], dim=2).flatten(0, 1)  # [B*M, Nc+Nt]


# --- padding that is not computed --------------------------------------------------------------------------------------


def worth_grouping(masks):
    """Whether `in_groups` saves work: contexts are padded, and on a CPU.

    A GPU would have to tell the host how long the contexts are, and meet new shapes at every step, as a compiled model would: both cost
    more than padding does. There --context-size keeps padding out of the context.
    """
    return masks.context_valid is not None and masks.context.device.type == "cpu" and not torch.compiler.is_compiling()


def groups(masks, size=32):
    """Images with contexts of like length together, `size` at a time: yields (rows int64 [b], their Masks, padded to their own longest)."""
    places = torch.arange(1, masks.context.shape[1] + 1)  # [Nc]
    lengths = (masks.context_valid * places).amax(1)  # [B]: places up to the last real patch
    for rows in lengths.argsort(stable=True).split(size):
        Nc = int(lengths[rows[-1]])
        targets_valid = None if masks.targets_valid is None else masks.targets_valid[rows]
        yield rows, Masks(masks.context[rows, :Nc], masks.context_valid[rows, :Nc], masks.targets[rows], targets_valid)


def in_groups(predict, images, masks):
    """predict(images, masks), float [B, M, Nt, D], group by group: the same numbers, and less padding to compute."""
    order, predictions = zip(*((rows, predict(images[rows], part)) for rows, part in groups(masks)))
    return torch.cat(predictions)[torch.cat(order).argsort()]  # [B, M, Nt, D], in the batch's order


# --- the method --------------------------------------------------------------------------------------------------------


def prediction_loss(predictions, targets, valid=None, kind="smooth_l1"):
    """Mean distance over the real target patches and the width, a scalar (paper section 3, "Loss").

    predictions, targets [B, M, Nt, D]; valid bool [B, M, Nt] or None; kind 'smooth_l1' (official code) or 'l2' (paper).
    """
    distance = F.smooth_l1_loss if kind == "smooth_l1" else F.mse_loss
    loss = distance(predictions.float(), targets.float(), reduction="none").mean(dim=-1)  # [B, M, Nt]
    return loss.mean() if valid is None else (loss * valid).sum() / valid.sum()


class IJEPA(nn.Module):
    """The whole method: context encoder, predictor, and target encoder (an EMA of the context encoder).

    encoder: an Encoder, a size name, or any module with `.width` (D), `.grid` (patches along each axis) and the call
    `encoder(images, indices=None, valid=None)` of `Encoder.forward`; predictor: 'width x depth x heads'; masking: a MultiBlockMasking,
    by default the paper's on the encoder's grid; loss: 'smooth_l1' or 'l2'; probe: the encoder whose tokens Output carries, 'target', or
    'context', which then encodes each whole image once more. `shape` (image_size, patch_size, channels, axes) goes to Encoder where
    `encoder` is a name. Raises UsageError for another probe, and for sizes that do not go together.
    """

    def __init__(self, encoder="base", predictor="384x6x12", masking=None, loss="smooth_l1", probe="target", **shape):
        super().__init__()
        check_known("probe", probe, ("target", "context"))
        self.context_encoder = Encoder(encoder, **shape) if isinstance(encoder, str) else encoder
        self.target_encoder = copy.deepcopy(self.context_encoder).requires_grad_(False)
        self.predictor = Predictor(predictor, self.context_encoder.width, self.context_encoder.grid)
        self.masking = masking or MultiBlockMasking(self.context_encoder.grid)
        self.loss, self.probe = loss, probe

    def forward(self, images, masks=None, generator=None):
        """images float [B, C, H, W]. In train mode, or given Masks -> Output(loss, predictions, targets, tokens); masks not given are
        drawn from `generator`. In eval mode without masks -> the target encoder's tokens of every patch [B, N, D].

        The mean of Output.tokens over the patches is the image's feature, as evaluate.features gives it.
        """
        if masks is None and not self.training:
            return self.target_encoder(images)  # [B, N, D]
        if hasattr(self.context_encoder, "image_size") and tuple(images.shape[2:]) != self.context_encoder.image_size:
            raise UsageError(f"the model was built for images of {self.context_encoder.image_size} pixels, got {tuple(images.shape[2:])}")
        masks = (masks or self.masking(len(images), generator)).to(images.device)
        targets, tokens = self.targets_and_tokens(images, masks)  # [B, M, Nt, D], [B, N, D]
        predictions = in_groups(self.predict, images, masks) if worth_grouping(masks) else self.predict(images, masks)  # [B, M, Nt, D]
        if self.probe == "context":
            # After the pass that needs gradients: older torch's autocast would hand it the weights cast here (PyTorch issue 158232).
            with torch.no_grad():
                tokens = self.context_encoder(images)  # [B, N, D]
        return Output(prediction_loss(predictions, targets, masks.targets_valid, self.loss), predictions, targets, tokens)

    def predict(self, images, masks):
        """What is predicted of the target blocks [B, M, Nt, D], from the context patches alone."""
        context = self.context_encoder(images, masks.context, masks.context_valid)  # [B, Nc, D]
        return self.predictor(context, masks)  # [B, M, Nt, D]

    @torch.no_grad()
    def encode_whole(self, images):
        """What the target encoder makes of the whole image, layer-normed for the targets and as it is, each [B, N, D]; no gradient
        reaches it."""
        tokens = self.target_encoder(images)  # [B, N, D]
        return self.normalise(tokens), tokens

    def normalise(self, tokens):
        """Layer norm without affine parameters: tokens [..., D] -> [..., D]."""
        return F.layer_norm(tokens, tokens.shape[-1:])

    def target_tokens(self, images):
        """The target encoder's tokens of the whole image, layer-normed [B, N, D]: what targets are cut out of."""
        return self.encode_whole(images)[0]

    def targets(self, images, masks):
        """What is to be predicted [B, M, Nt, D]: the whole image is encoded, and only then are the blocks cut out (paper table 11:
        masking the target encoder's output beats masking its input)."""
        return self.targets_and_tokens(images, masks)[0]

    def targets_and_tokens(self, images, masks):
        """What is to be predicted [B, M, Nt, D], and the tokens it is cut out of as the target encoder gives them, detached [B, N, D]."""
        wanted, tokens = self.encode_whole(images)  # [B, N, D]
        return take(wanted, masks.targets), tokens.detach()

    @torch.no_grad()
    def update_target(self, momentum):
        """target <- momentum * target + (1 - momentum) * context, for every parameter (paper section 3); call after the optimizer."""
        target, context = list(self.target_encoder.parameters()), list(self.context_encoder.parameters())
        torch._foreach_lerp_(target, [p.to(t.dtype) for p, t in zip(context, target)], 1.0 - momentum)
