"""The masks of masking.py, bit for bit, several times faster: what training draws. Read that one first.

The same draws in the same order, but what follows from them is looked up or multiplied instead of computed patch by patch. The lines
that a block covers on each axis come from a table. An image's context is its context block's map minus its target blocks'; each map is
the product of two lines, so the whole sum is one small matrix product. The patches of a block are those of its size in the grid's corner,
moved. On a GPU, with a context_size, nothing waits for the device and no shape depends on what was drawn, as torch.compile wants it.
"""

import math
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from masking import Masks, MultiBlockMasking

ASKED = ("cpu",)  # devices asked what they drew where that decides what is done next: a GPU would have to be waited for


class FastMultiBlockMasking(MultiBlockMasking):
    """MultiBlockMasking, whose settings, masks and errors are the same."""

    def __init__(self, *settings, **named):
        super().__init__(*settings, **named)
        self._tables = {}  # by device

    def __call__(self, B, generator=None):
        """Draw masks for B images on the generator's device (without one, on the CPU from the global generator) -> Masks.

        With a context_size, mode 'pad' never waits for a GPU, and there Nt is always that of the longest block that can be drawn.
        """
        device = torch.device("cpu") if generator is None else generator.device
        tables, asked, one = self._tables.get(device) or self._make_tables(device), device.type in ASKED, self.mode == "truncate"
        sizes, places = [], []
        for M, scale, aspect in (self.num_targets, self.target_scale, self.target_aspect), (1, self.context_scale, (1.0, 1.0)):
            size = self._quick_sizes((1, 1) if one else (B, M), scale, aspect, generator, tables.grid)  # truncate: one for the whole batch
            sizes.append(size.expand(-1, B, M))
            places.append(torch.rand(B, M, len(self.grid), generator=generator, device=device))
        sizes, places = torch.cat(sizes, dim=2), torch.cat(places, dim=1).movedim(2, 0)  # [axes, B, M+1]: the context block is last
        corners = ((tables.grid + 1 - sizes) * places).floor_()  # [axes, B, M+1], uniform over all places, the last included
        stretches = torch.add(sizes, corners, alpha=max(self.grid) + 1).int()  # [axes, B, M+1]
        lines = [F.embedding(stretch, table) for stretch, table in zip(stretches, tables.lines)]  # of each axis [B, M+1, side]
        lines[0][:, :-1] *= 0 if self.allow_overlap else -1  # what targets add to the context block
        context = self._sum_maps(lines).clamp_(min=0)  # [B, N], 1 or 0
        sizes, corners, count = sizes[..., :-1], corners[..., :-1], context.sum(1)  # [axes, B, M], [axes, B, M], [B]
        if not asked or int(count.min()) < self.min_keep:
            context, moved = self._move(lines, tables.stages)  # [B, N], [B, M]
            sizes, corners = (torch.where(moved, part[..., :1], part) for part in (sizes, corners))  # onto the first block
            count = context.sum(1)
        targets, targets_valid = self._look_up_blocks(corners, sizes, tables, asked or one or not self.context_size)
        context, context_valid = self._pack_context(context, count, generator, tables)
        return Masks(context, context_valid, targets, None if one else targets_valid)

    def _make_tables(self, device):
        """What is looked up on a device, for copying rows is faster than computing them; int16 on the CPU, for fewer bytes to move."""
        grid, M, dtype = self.grid, self.num_targets, torch.int16 if device.type == "cpu" and self.N < 2**15 else torch.int64
        longest = self._largest_sides(1 + 1e-6)  # float32 may round an area up
        for axis in range(1, len(grid)):
            longest = longest.unfold(axis, 2, 1).amax(-1)  # between two ratios no side is longer than at the one or the other
        with device:
            start, length = torch.arange(max(grid))[:, None, None], torch.arange(max(grid) + 1)[:, None]
            places = torch.cartesian_prod(*map(torch.arange, grid)).view(self.N, -1)  # [N, axes]
            last = places[: self.N // grid[0], None]  # [sizes, 1, axes]: of a block in the corner, for each size but along the first axis
            order = (places > last)[..., 1:].any(-1).byte().argsort(stable=True)  # [sizes, N]: a block's patches come first
            real = torch.arange(2 * self.N) < self.N
            return self._tables.setdefault(device, SimpleNamespace(
                grid=torch.tensor(grid, dtype=torch.float32)[:, None, None],
                strides=torch.tensor([float(math.prod(grid[axis + 1 :])) for axis in range(len(grid))])[:, None, None],
                # Of each axis [first patch x length, side]: 1 where the block lies.
                lines=[((line >= start) & (line < start + length)).flatten(0, 1).float() for line in map(torch.arange, grid)],
                stages=torch.cat([torch.ones(M, M).triu(), torch.ones(1, M)])[..., None],  # [M+1, M, 1]: the first m blocks and the context
                offsets=order[:, : int(longest.prod(0).max())].to(dtype).contiguous(),  # [sizes, Nt], from a block's first patch
                # [N+1, N], windows of 2 N numbers: row N - i has i times True, then False; and the same as 1 and 0.
                real=real.unfold(0, self.N, 1), ones=real.to(dtype).unfold(0, self.N, 1)))

    def _quick_sizes(self, shape, scale, aspect, generator, grid):
        """Block sides in patches, float32 [axes, *shape]: area and aspect ratio are independent uniform draws."""
        area = scale[0] + (scale[1] - scale[0]) * torch.rand(*shape, generator=generator, device=grid.device)
        ratio = torch.rand(*shape, len(grid) - 1, generator=generator, device=grid.device).movedim(-1, 0)  # [axes - 1, *shape]
        return self._quick_sides(area, None if aspect == (1.0, 1.0) else aspect[0] + (aspect[1] - aspect[0]) * ratio, grid)

    @staticmethod
    def _quick_sides(area, ratio, grid):
        """Sides in patches, float32 [axes, ...], of blocks of `area` [...] (of the grid) and `ratio` [axes - 1, ...] to the last axis."""
        sides = grid * area ** (1 / len(grid))
        if ratio is not None:  # None: all are 1
            root = ratio.prod(0) ** (1 / len(grid))
            sides = sides * (torch.cat([ratio, torch.ones_like(area)[None]]) / root)  # product 1, so that the area stays as drawn
        return sides.round_().clamp_(min=1).minimum(grid)

    def _largest_sides(self, times=1.0):
        """Sides in patches, float32 [axes, 200, ...], of target blocks of the largest area, at 200 ratios of each axis to the last."""
        line = torch.linspace(*self.target_aspect, 200, device="cpu")  # not on "meta", where a model may be tried out
        ratio = torch.stack(torch.meshgrid(*[line] * (len(self.grid) - 1), indexing="ij"))  # [axes - 1, 200, ...]
        grid = torch.tensor(self.grid, device="cpu").view(-1, *[1] * len(ratio))
        return self._quick_sides(torch.full_like(ratio[0], self.target_scale[1] * times), ratio, grid)

    @staticmethod
    def _sum_maps(lines):
        """The sum of the maps of an image's blocks, each the product of the block's lines: float32 [B, N]."""
        first, *others, last = lines  # [B, M+1, side]
        for line in others:
            first = (first[..., :, None] * line[..., None, :]).flatten(2)  # [B, M+1, patches so far]
        return (first.mT @ last).flatten(1).float()  # whatever autocast made of it

    def _move(self, lines, stages):
        """Maps of the context [B, N] that have enough patches, and which blocks, bool [B, M], must move onto the first one for it."""
        first = (lines[0][:, :, None] * stages).flatten(2)  # [B, M+1, M * side]
        left = self._sum_maps([first, *lines[1:]]).unflatten(1, (-1, self.N)).clamp_(min=0)  # [B, M, N], had only m blocks been kept
        enough = left.sum(-1) >= self.min_keep  # [B, M]; once False it stays False
        keep = enough.sum(1).clamp(min=1)  # [B]: how many blocks may stay where they are
        left = left.gather(1, (keep - 1)[:, None, None].expand(-1, 1, self.N))[:, 0]  # [B, N]
        # Where even one block leaves too little of a small context block, the context block becomes the whole grid.
        left = torch.where(enough[:, :1], left, 1 + self._sum_maps([line[:, :1] for line in lines]))
        return left, (torch.arange(self.num_targets, device=keep.device) >= keep[:, None]) & (not self.allow_overlap)

    def _look_up_blocks(self, corners, sizes, tables, ask):
        """Patch indices of rectangular blocks, int64 [B, M, Nt], and which are real, bool [B, M, Nt]; no search is needed."""
        count = sizes.prod(0)  # [B, M]
        Nt = int(count.max()) if ask else tables.offsets.shape[1]
        size, row = ((sizes - 1) * tables.strides)[1:].sum(0).int(), (self.N - count).int()  # [B, M]
        indices = F.embedding(size, tables.offsets[:, :Nt])  # [B, M, Nt]
        indices += (corners * tables.strides).sum(0)[..., None].to(indices.dtype)
        indices *= F.embedding(row, tables.ones[:, :Nt])
        return indices.long(), F.embedding(row, tables.real[:, :Nt])

    def _pack_context(self, context, count, generator, tables):
        """Patch indices of maps [B, N]: all of them, padded, or cut at random to context_size or the batch's shortest."""
        cut = self.context_size or (int(count.min()) if self.mode == "truncate" else 0)
        if cut:
            key = torch.rand(context.shape, generator=generator, device=context.device) * context + (context - 1)  # -1 outside
            chosen = key.view(torch.int32).topk(cut, dim=1, sorted=False).indices  # [B, cut]; as integers: the same order, faster
            context = torch.zeros_like(context).scatter_(1, chosen, 1.0)
        Nc, kept = cut or int(count.max()), context.to(tables.ones.dtype)
        place = kept.cumsum(1, dtype=kept.dtype).mul_(kept)  # [B, N]: 1, 2, 3, ... at what is kept, 0 elsewhere
        indices = kept.new_zeros(len(kept), 1 + Nc)  # column 0 takes what is not kept
        indices.scatter_(1, place.long(), torch.arange(self.N, dtype=kept.dtype, device=kept.device).expand_as(place))
        return indices[:, 1:].long().contiguous(), None if cut else F.embedding((self.N - count).int(), tables.real[:, :Nc])
