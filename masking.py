"""Multi-block masks: which patches are context and which are targets (paper section 3, figure 4).

Four *target blocks* are drawn on the patch grid, then one large *context block*, from which the
target blocks' patches are removed. All images of a batch are drawn at once.

Notation: B images, N patches in the grid, M target blocks, Nc context patches kept (padded), Nt
patches in a target block (padded), axes: of the grid, 2 for images, 3 for volumes. A patch is named
by its raster index, row * width + column.

Differs: the official code never reaches the grid's last row and column, draws scale and aspect from
one random number, cuts all contexts of a batch to its shortest by dropping their last patches, and
may search forever on a small grid. Here every patch is reachable, every image has sizes of its own,
shorter lists are padded, and sampling always ends.
"""

import math
from dataclasses import dataclass

import torch

from config import UsageError, check, check_range


@dataclass
class Masks:
    """Raster indices of the patches that are seen (context) and predicted (targets).

    Lists are padded to the longest of the batch with index 0; the `_valid` fields are False there.

    context int64 [B, Nc], context_valid bool [B, Nc];
    targets int64 [B, M, Nt], targets_valid bool [B, M, Nt].
    """

    context: torch.Tensor
    context_valid: torch.Tensor
    targets: torch.Tensor
    targets_valid: torch.Tensor

    def to(self, device):
        """The same masks on another device."""
        wait = torch.device(device).type == "mps"  # an MPS copy may read a freed source
        return Masks(*(part.to(device, non_blocking=not wait) for part in vars(self).values()))

    def __len__(self):
        """The number of images, B."""
        return len(self.context)

    def __getitem__(self, rows):
        """The masks of some of the images, such as masks[:4]."""
        return Masks(*(part[rows] for part in vars(self).values()))

    def maps(self, N):
        """The masks as boolean maps of the grid: context [B, N] and targets [B, M, N]."""
        return (to_maps(self.context, self.context_valid, N),
                to_maps(self.targets, self.targets_valid, N))


def to_indices(maps):
    """Boolean maps [..., N] -> raster indices [..., longest], padded with 0, and which are real."""
    count = maps.sum(dim=-1)  # [...]
    order = maps.int().sort(dim=-1, descending=True, stable=True).indices  # [..., N], True first
    longest = int(count.max())
    valid = torch.arange(longest, device=maps.device) < count[..., None]  # [..., longest]
    return order[..., :longest] * valid, valid


def to_maps(indices, valid, N):
    """`to_indices` undone: raster indices [..., K] and which are real -> boolean maps [..., N]."""
    hits = torch.zeros(*indices.shape[:-1], N, dtype=torch.int64, device=indices.device)
    return hits.scatter_add(-1, indices, valid.long()) > 0  # [..., N]


class MultiBlockMasking:
    """Draws the context and target blocks of a batch; call it with B and a torch.Generator.

    grid: patches along each axis, (rows, columns). Scales are a block's area as a fraction of the
    grid's, drawn uniformly for each block. target_aspect is the height / width of a target block,
    relative to the grid's, drawn independently; the context block has the grid's shape.
    context_size: keep exactly this many context patches, chosen at random; 0 keeps all of them.
    min_keep: least context patches of any image, no fewer than context_size. Where the targets
    would leave fewer, the last target blocks become copies of the first: see `make_room`.
    merge_targets: give the union of an image's target blocks as its only block, M = 1, so that the
    predictor answers for all of them in one pass; a patch of two blocks then counts once.
    Raises UsageError for settings that cannot give a mask.
    """

    def __init__(self, grid, num_targets=4, target_scale=(0.15, 0.2), target_aspect=(0.75, 1.5),
                 context_scale=(0.85, 1.0), context_size=0, min_keep=4, merge_targets=False):
        self.grid, self.N, self.num_targets = tuple(grid), math.prod(grid), num_targets
        self.target_scale, self.target_aspect = target_scale, target_aspect
        self.context_scale, self.context_size = context_scale, context_size
        self.merge_targets = merge_targets
        self.min_keep = max(min_keep, context_size)
        whole = range(1, self.N + 1)
        check(num_targets in whole, "num_targets", num_targets, f"from 1 to {self.N}")
        check_range("target_scale", target_scale, 1e-6, 1)
        check_range("context_scale", context_scale, 1e-6, 1)
        check_range("target_aspect", target_aspect, 0.01, 100)
        check(context_size >= 0, "context_size", context_size, "0 or more")
        check(min_keep >= 1, "min_keep", min_keep, "1 or more")
        if (room := self.N - self.largest_target()) < self.min_keep:
            raise UsageError(
                f"on a grid of {'x'.join(map(str, self.grid))} patches the largest target block "
                f"leaves {room} for the context, fewer than {self.min_keep}: lower --context-size, "
                "--target-scale or --patch-size")

    def __call__(self, B, generator=None):
        """Draw masks for B images on the generator's device (None: the CPU) -> Masks."""
        device = generator.device if generator is not None else "cpu"

        def uniform(*shape, low=0.0, high=1.0):
            return low + (high - low) * torch.rand(*shape, generator=generator, device=device)

        M = self.num_targets
        targets = self.draw_blocks(B, M, self.target_scale, self.target_aspect, uniform)
        context = self.draw_blocks(B, 1, self.context_scale, (1.0, 1.0), uniform)[:, 0]  # [B, N]
        targets, context = self.make_room(targets, context)  # [B, M, N], [B, N]
        context = context & ~targets.any(dim=1)
        if self.merge_targets:
            targets = targets.any(dim=1, keepdim=True)  # [B, 1, N]
        if self.context_size:
            key = uniform(B, self.N).masked_fill(~context, -1.0)
            kept = key.topk(self.context_size, dim=1).indices  # [B, context_size]
            context &= torch.zeros_like(context).scatter(1, kept, True)  # [B, N]
        return Masks(*to_indices(context), *to_indices(targets))

    def draw_blocks(self, B, M, scale, aspect, uniform):
        """Boolean maps [B, M, N] of M blocks an image; area, aspect and place are independent."""
        area = uniform(B, M, 1, low=scale[0], high=scale[1])
        ratio = uniform(B, M, len(self.grid) - 1, low=aspect[0], high=aspect[1])
        sides = self.sides(area, ratio)  # [B, M, axes]
        places = torch.tensor(self.grid, device=sides.device) - sides + 1  # the last one included
        corners = (uniform(*sides.shape) * places).long().minimum(places - 1)  # [B, M, axes]
        maps = torch.ones(B, M, 1, dtype=torch.bool, device=sides.device)
        for axis, length in enumerate(self.grid):  # rows, then columns
            line = torch.arange(length, device=sides.device)
            start = corners[..., axis, None]
            inside = (line >= start) & (line < start + sides[..., axis, None])  # [B, M, length]
            maps = (maps[..., :, None] & inside[..., None, :]).flatten(2)  # [B, M, rows], [B, M, N]
        return maps

    def sides(self, area, ratio):
        """Sides of blocks in patches, int64 [..., axes].

        area [..., 1]: a fraction of the grid's. ratio [..., axes - 1]: height / width, where 1
        means the grid's own shape. So on a grid of 8 x 8 patches, area 1/4 and ratio 1 give 4 x 4.
        """
        ratio = torch.cat([ratio, torch.ones_like(area)], dim=-1)  # [..., axes]
        axes = len(self.grid)
        stretch = ratio / ratio.prod(dim=-1, keepdim=True) ** (1 / axes)  # the area stays as it is
        grid = torch.tensor(self.grid, device=area.device)
        return (grid * area ** (1 / axes) * stretch).round().long().clamp(min=1).minimum(grid)

    def largest_target(self):
        """Patches in the largest target block that can be drawn."""
        line = torch.linspace(*self.target_aspect, 300)
        ratios = torch.cartesian_prod(*[line] * (len(self.grid) - 1)).view(-1, len(self.grid) - 1)
        sides = self.sides(torch.full((len(ratios), 1), self.target_scale[1]), ratios)
        return int(sides.prod(dim=-1).max())

    def make_room(self, targets, context):
        """Leave min_keep context patches: targets [B, M, N] and context [B, N] -> the same.

        Where all M targets leave fewer, only the first few that leave enough stay as they are, and
        the others become copies of the first, whose patches then count more than once in the loss.
        Where even the first target leaves fewer, the context block becomes the whole grid.
        """
        union = targets.cumsum(dim=1) > 0  # [B, M, N]: the first target, the first two, ...
        enough = (context[:, None] & ~union).sum(dim=-1) >= self.min_keep  # [B, M]
        targets = torch.where(enough[..., None], targets, targets[:, :1])
        return targets, context | ~enough[:, :1]
