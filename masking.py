"""Which patches are context and which are targets: I-JEPA's multi-block masks (paper section 3, figure 4).

Four *target blocks* are drawn on the patch grid, then one large *context block*, from which the targets' patches are
removed. All images of a batch are drawn at once with tensor operations from a `torch.Generator`.

Alphabet: B images, N patches in the grid, M target blocks, Nc context patches kept (padded), Nt patches in a target
block (padded). A patch is named by its index in raster order: row * width + column.

Differs from the official code, which can loop for ever on a small grid, never uses the last row and column, draws
scale and aspect ratio from one random number, and cuts every context to its first, that is topmost, patches.
"""

import math
from dataclasses import dataclass

import torch

from config import UsageError


@dataclass
class Masks:
    """Patch indices to keep, raster order within each block; padding repeats index 0 and is False in the `valid` tensors.

    context [B, Nc] int64; context_valid [B, Nc] bool, or None where nothing is padded;
    targets [B, M, Nt] int64; targets_valid [B, M, Nt] bool, or None where nothing is padded.
    """

    context: torch.Tensor
    context_valid: torch.Tensor | None
    targets: torch.Tensor
    targets_valid: torch.Tensor | None

    def to(self, device):
        """The same masks on another device."""
        return Masks(*(None if part is None else part.to(device) for part in vars(self).values()))

    def share(self, rank, world):
        """The masks of one process's images: part number `rank` of `world` equal parts of the batch."""
        rows = slice(rank * len(self.context) // world, (rank + 1) * len(self.context) // world)
        return Masks(*(None if part is None else part[rows] for part in vars(self).values()))

    def valid(self):
        """context_valid [B, Nc] and targets_valid [B, M, Nt], bool, with None written out as all True."""
        context = torch.ones_like(self.context, dtype=torch.bool) if self.context_valid is None else self.context_valid
        targets = torch.ones_like(self.targets, dtype=torch.bool) if self.targets_valid is None else self.targets_valid
        return context, targets

    def maps(self, N):
        """Boolean maps of the grid: context [B, N] and targets [B, M, N], True at the patches of the block."""

        def to_map(indices, valid):
            found = torch.zeros(*indices.shape[:-1], N, dtype=torch.int64, device=indices.device)
            return found.scatter_add_(-1, indices, valid.long()) > 0  # [..., N]

        context_valid, targets_valid = self.valid()
        return to_map(self.context, context_valid), to_map(self.targets, targets_valid)


class MultiBlockMasking:
    """Draws context and target blocks for a batch (paper section 3: M = 4, scales (.15, .2) and (.85, 1), aspect (.75, 1.5)).

    grid: patches along each axis, (rows, columns) or (frames, rows, columns).
    target_scale, context_scale: area of a block as a fraction of the grid, drawn uniformly per block.
    target_aspect: height over width of a target block *relative to the grid's own*, drawn independently of the scale; on a
        3-D grid every axis draws its own ratio to the last one. The context block has the grid's aspect.
    context_size: keep exactly this many context patches, chosen at random; 0 keeps all of them.
    mode: 'pad' draws a size for every block of every image and pads the batch to its longest; 'truncate' draws one target
        size and one context size a batch and cuts every context, at random places, to the batch's shortest.
    min_keep: least context patches of any image. Where the targets leave fewer, target blocks are moved on to the first
        one (the paper lets blocks overlap), as few as will do, so sampling always ends.
    Raises UsageError where these settings cannot give a mask, naming the grid and the scales.
    """

    def __init__(self, grid, num_targets=4, target_scale=(0.15, 0.2), target_aspect=(0.75, 1.5), context_scale=(0.85, 1.0),
                 context_size=0, mode="pad", min_keep=4, allow_overlap=False):
        self.grid, self.num_targets, self.mode = tuple(grid), num_targets, mode
        self.target_scale, self.target_aspect, self.context_scale = target_scale, target_aspect, context_scale
        self.context_size, self.min_keep, self.allow_overlap = context_size, max(min_keep, context_size), allow_overlap
        self.N = math.prod(self.grid)
        largest = self._largest_block()
        where = f"a {'x'.join(map(str, self.grid))} grid of {self.N} patches"
        free = self.N if allow_overlap else self.N - math.prod(largest)
        if free < self.min_keep:
            name = "--min-keep" if min_keep > context_size else "--context-size"
            taken = "" if allow_overlap else f" where a target block of --target-scale {target_scale[1]} takes {math.prod(largest)}"
            raise UsageError(f"{name} is {self.min_keep}: there is room for {free} context patches at most on {where}{taken}; "
                             "lower it, --target-scale or --patch-size")
        if num_targets > self.N:
            raise UsageError(f"--num-targets is {num_targets}: there is room for {self.N} at most on {where}")

    def __call__(self, B, generator=None):
        """Draw masks for B images on the generator's device (without one, on the CPU from the global generator) -> Masks."""
        device = "cpu" if generator is None else generator.device
        one = self.mode == "truncate"  # one size for the whole batch
        sizes = self._sizes((1, 1) if one else (B, self.num_targets), self.target_scale, self.target_aspect, generator, device)
        sizes = sizes.expand(B, self.num_targets, -1)  # [B, M, axes]
        corners = self._corners(sizes, generator)  # [B, M, axes]
        context_sizes = self._sizes((1, 1) if one else (B, 1), self.context_scale, (1.0, 1.0), generator, device).expand(B, 1, -1)
        context = self._cover(self._corners(context_sizes, generator), context_sizes)[:, 0]  # [B, N]
        if not self.allow_overlap:
            context, moved = self._remove(context, self._cover(corners, sizes))  # [B, N], [B, M]
            corners = torch.where(moved[..., None], corners[:, :1], corners)  # a moved block lies on the first block
            sizes = torch.where(moved[..., None], sizes[:, :1], sizes)
        else:
            context = context | (context.sum(-1, keepdim=True) < self.min_keep)  # too small a block: the whole grid
        targets, targets_valid = self._list_blocks(corners, sizes)
        context, context_valid = self._list_context(context, generator)
        return Masks(context, context_valid, targets, None if one else targets_valid)

    def _sizes(self, shape, scale, aspect, generator, device):
        """Block sides in patches, int64 [*shape, axes]: area and aspect ratio are independent uniform draws."""
        area = scale[0] + (scale[1] - scale[0]) * torch.rand(*shape, 1, generator=generator, device=device)
        ratio = aspect[0] + (aspect[1] - aspect[0]) * torch.rand(*shape, len(self.grid) - 1, generator=generator, device=device)
        return self._sides(area, ratio)

    def _sides(self, area, ratio):
        """Sides in patches, int64 [..., axes], of blocks of `area` [..., 1] (of the grid) and `ratio` [..., axes - 1] to the last axis."""
        axes = len(self.grid)
        ratio = torch.cat([ratio, torch.ones_like(area)], dim=-1)  # [..., axes], relative to the last axis
        ratio = ratio / ratio.prod(-1, keepdim=True) ** (1 / axes)  # product 1, so that the area stays as drawn
        grid = torch.tensor(self.grid, device=area.device)
        return (grid * area ** (1 / axes) * ratio).round().long().clamp(min=1).minimum(grid)  # [..., axes]

    def _largest_block(self):
        """Sides of the target block with the most patches that a draw can give, a list: the largest area at many ratios."""
        line = torch.linspace(*self.target_aspect, 200, device="cpu")  # not on "meta", where a model may be tried out
        ratio = torch.cartesian_prod(*[line] * (len(self.grid) - 1)).view(-1, len(self.grid) - 1)  # [ratios, axes - 1]
        sides = self._sides(torch.full((len(ratio), 1), self.target_scale[1], device="cpu"), ratio)  # [ratios, axes]
        return sides[sides.prod(-1).argmax()].tolist()

    def _corners(self, sizes, generator):
        """First row and column of each block, int64 [B, M, axes], uniform over all places, the last included."""
        places = torch.tensor(self.grid, device=sizes.device) - sizes + 1
        draw = torch.rand(sizes.shape, generator=generator, device=sizes.device)
        return (draw * places).long().minimum(places - 1)  # minimum: float32 rounding may reach `places` itself

    def _cover(self, corners, sizes):
        """Boolean maps [B, M, N], True where the block lies."""
        covered = torch.ones(*corners.shape[:2], 1, dtype=torch.bool, device=corners.device)
        for axis, side in enumerate(self.grid):
            line = torch.arange(side, device=corners.device)
            start, length = corners[..., axis, None], sizes[..., axis, None]
            inside = (line >= start) & (line < start + length)  # [B, M, side]
            covered = (covered[..., :, None] & inside[..., None, :]).flatten(2)  # [B, M, patches so far]
        return covered

    def _remove(self, context, targets):
        """Take target maps [B, M, N] out of context maps [B, N]; say which blocks [B, M] must move on to the first to leave enough."""
        union = targets.cumsum(1) > 0  # [B, M, N]: the first block, the first two, ...
        left = context[:, None] & ~union  # [B, M, N]: the context, had only the first m blocks been kept
        enough = left.sum(-1) >= self.min_keep  # [B, M]; once False it stays False
        keep = enough.sum(1).clamp(min=1)  # [B]: how many blocks may stay where they are
        left = left.gather(1, (keep - 1)[:, None, None].expand(-1, 1, self.N))[:, 0]  # [B, N]
        # Where even one block leaves too little of a small context block, the context block becomes the whole grid.
        left = torch.where(enough[:, :1], left, ~targets[:, 0])
        return left, torch.arange(self.num_targets, device=keep.device) >= keep[:, None]

    def _list_blocks(self, corners, sizes):
        """Patch indices of rectangular blocks, int64 [B, M, Nt], and which are real, bool [B, M, Nt]; no search is needed."""
        count = sizes.prod(-1)  # [B, M]
        k = torch.arange(int(count.max()), device=sizes.device).expand(*count.shape, -1)  # [B, M, Nt]
        valid = k < count[..., None]
        indices, stride = torch.zeros_like(k), 1
        for axis in reversed(range(len(self.grid))):
            size = sizes[..., axis, None]
            indices = indices + (corners[..., axis, None] + k % size) * stride
            k, stride = k // size, stride * self.grid[axis]
        return indices.where(valid, 0), valid

    def _list_context(self, context, generator):
        """Patch indices of boolean maps [B, N]: all of them, padded, or cut at random to context_size or the batch's shortest."""
        count = context.sum(1)  # [B]
        cut = self.context_size or (int(count.min()) if self.mode == "truncate" else 0)
        if cut:
            key = torch.rand(context.shape, generator=generator, device=context.device)
            chosen = key.where(context, -1.0).topk(cut, dim=1).indices  # [B, cut]
            return chosen.sort(dim=1).values, None
        Nc = int(count.max())
        place = torch.where(context, context.cumsum(1) - 1, Nc)  # a column past the end takes what is not kept
        indices = torch.zeros(len(context), Nc + 1, dtype=torch.int64, device=context.device)
        indices.scatter_(1, place, torch.arange(self.N, device=context.device).expand_as(place))
        valid = torch.arange(Nc, device=context.device) < count[:, None]
        return indices[:, :Nc].where(valid, 0), valid  # [B, Nc]


class RandomMasking:
    """Hides a fraction of the patches at random, as one target (MAE, section 3; the paper's table 6 calls it "random").

    grid: patches along each axis; hidden: the fraction hidden, the rest is the context. Raises UsageError where either would be empty.
    """

    def __init__(self, grid, hidden=0.75):
        self.grid, self.N = tuple(grid), math.prod(grid)
        self.count = round(self.N * hidden)
        if not 0 < self.count < self.N:
            raise UsageError(f"--mask-ratio is {hidden}: of {self.N} patches it leaves {self.N - self.count} to see and {self.count} to "
                             "predict, and there must be some of each")

    def __call__(self, B, generator=None):
        """Draw masks for B images on the generator's device -> Masks with one target "block" (M = 1), nothing padded."""
        order = torch.rand(B, self.N, generator=generator, device="cpu" if generator is None else generator.device).argsort(1)  # [B, N]
        hidden, seen = order[:, : self.count].sort(1).values, order[:, self.count :].sort(1).values  # [B, Nt], [B, Nc]
        return Masks(seen, None, hidden[:, None], None)


class RasterMasking:
    """Cuts the grid into quarters: one, drawn at random, is the context, the others are three targets (the paper's table 6, "rasterized").

    grid: two even numbers of patches. Raises UsageError for any other.
    """

    def __init__(self, grid):
        if len(grid) != 2 or any(side % 2 for side in grid):
            raise UsageError(f"--masks is raster: it needs a grid of two even sides, got {'x'.join(map(str, grid))}; "
                             "choose another --patch-size or --image-size")
        self.grid, self.N = tuple(grid), math.prod(grid)

    def __call__(self, B, generator=None):
        """Draw masks for B images on the generator's device -> Masks with M = 3, nothing padded."""
        device = "cpu" if generator is None else generator.device
        H, W = self.grid
        quarters = torch.arange(self.N, device=device).view(2, H // 2, 2, W // 2).transpose(1, 2).reshape(4, -1)  # [4, N/4]
        order = torch.rand(B, 4, generator=generator, device=device).argsort(1)  # [B, 4]
        parts = quarters[order]  # [B, 4, N/4]
        return Masks(parts[:, 0], None, parts[:, 1:], None)
