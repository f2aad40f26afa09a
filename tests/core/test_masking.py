"""Claims about the masks (paper section 3): what is context, what is target, and that it ends."""

import math
import zlib

import pytest
import torch

from config import UsageError
from masking import Masks, MultiBlockMasking, to_indices, to_maps

GRIDS = [(4, 4), (6, 6), (8, 8), (12, 12), (14, 14), (6, 10), (4, 6, 6)]


def draw(grid, B=256, seed=0, **settings):
    masking = MultiBlockMasking(grid, **settings)
    masks = masking(B, torch.Generator().manual_seed(seed))
    return masks, *masks.maps(masking.N)


@pytest.mark.parametrize("grid", GRIDS)
def test_no_context_patch_lies_in_a_target_block(grid):
    _, context, targets = draw(grid)
    assert not (context & targets.any(dim=1)).any()


@pytest.mark.parametrize("grid", GRIDS)
def test_every_patch_is_reached_by_context_and_by_targets(grid):
    """The official sampler never uses the last row and column: 15 of 64 patches on 8x8."""
    _, context, targets = draw(grid, B=4096)
    for part in (context, targets.any(dim=1)):
        used = part.float().mean(dim=0)  # [N], how often each patch is in the block
        assert used.min() > 0.005 and used.min() > used.max() / 50


def test_coverage_is_symmetric():
    """Top and bottom, left and right are alike, within 5 standard errors over 8,192 images."""
    _, context, targets = draw((8, 8), B=8192)
    for part in (context, targets.any(dim=1)):
        used = part.float().mean(dim=0).view(8, 8)
        error = 5 * math.sqrt(2 * 0.25 / 8192)
        assert (used - used.flip(0)).abs().max() < error
        assert (used - used.flip(1)).abs().max() < error


@pytest.mark.parametrize("grid", [(6, 6), (8, 8)])
def test_merged_targets_are_the_union_of_the_blocks_and_leave_the_context_as_it_is(grid):
    apart, context, blocks = draw(grid, context_size=12)
    merged, same_context, union = draw(grid, context_size=12, merge_targets=True)
    assert union.shape[1] == 1 and torch.equal(union[:, 0], blocks.any(dim=1))
    assert torch.equal(context, same_context)
    listed = merged.targets[0, 0][merged.targets_valid[0, 0]]
    assert torch.equal(listed, listed.unique())  # a patch of two blocks is asked about once


@pytest.mark.parametrize("grid", [(8, 8), (14, 14), (6, 10), (4, 6, 6)])
def test_target_blocks_are_solid_boxes_listed_in_raster_order(grid):
    masks, _, targets = draw(grid, B=32)
    for block, indices, valid in zip(targets.flatten(0, 1), masks.targets.flatten(0, 1),
                                     masks.targets_valid.flatten(0, 1)):
        places = block.view(grid).nonzero()  # [count, axes]
        sides = places.max(dim=0).values - places.min(dim=0).values + 1
        assert sides.prod() == len(places) == valid.sum()  # solid, and no patch is listed twice
        assert indices[valid].tolist() == sorted(indices[valid].tolist())


def sides_of(targets, grid):
    """Rows and columns of blocks: maps [B, M, N] -> [B, M, 2]."""
    maps = targets.unflatten(2, grid)
    return torch.stack([maps.any(3).sum(2), maps.any(2).sum(2)], dim=-1)


def test_mean_target_area_is_the_scale_asked_for():
    """On a fine grid rounding averages out: the mean area is the middle of the scale, within 2%."""
    _, _, targets = draw((40, 40), B=2000)
    assert targets.float().mean() == pytest.approx(0.175, rel=0.02)


def test_scale_and_aspect_are_independent_and_span_their_ranges():
    """The official code draws both from one number (correlation 1); 4 standard errors allowed."""
    _, _, targets = draw((60, 60), B=1000)
    sides = sides_of(targets, (60, 60)).flatten(0, 1).double()
    area, aspect = sides.prod(dim=1) / 3600, sides[:, 0] / sides[:, 1]
    assert abs(torch.corrcoef(torch.stack([area, aspect]))[0, 1]) < 4 / math.sqrt(4000)
    assert area.min() == pytest.approx(0.15, abs=0.01)
    assert area.max() == pytest.approx(0.2, abs=0.01)
    assert aspect.min() == pytest.approx(0.75, abs=0.05)
    assert aspect.max() == pytest.approx(1.5, abs=0.05)


def test_images_of_a_batch_have_sizes_and_places_of_their_own():
    masks, _, targets = draw((14, 14))
    assert len({tuple(m.flatten().tolist()) for m in targets}) == 256
    assert len(masks.targets_valid.sum(-1).unique()) > 5  # many block sizes
    assert len(masks.context_valid.sum(-1).unique()) > 20  # many context lengths


def test_a_context_size_keeps_exactly_so_many_patches_chosen_at_random():
    """The official code cuts contexts to their first patches: it hardly ever sees the last rows."""
    masks, context, _ = draw((8, 8), B=4096, context_size=12)
    assert masks.context.shape == (4096, 12) and masks.context_valid.all()
    assert (context.sum(dim=1) == 12).all()
    rows = context.float().view(-1, 8, 8).mean(dim=(0, 2))
    assert rows[-1] > 0.9 * rows[0]


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("min_keep", [4, 8])
def test_sampling_ends_with_enough_context(grid, min_keep):
    """The official sampler loops forever in 8 of 20 batches on 8x8 with min_keep=10."""
    _, context, targets = draw(grid, B=4096, min_keep=min_keep)
    assert context.sum(dim=1).min() >= min_keep
    assert (targets.sum(dim=2) >= 1).all()


def test_targets_that_leave_too_little_context_are_laid_onto_the_first_as_few_as_possible():
    masking = MultiBlockMasking((8, 8), num_targets=8, target_scale=(0.3, 0.4), min_keep=16)
    generator = torch.Generator().manual_seed(0)

    def uniform(*shape, low=0.0, high=1.0):
        return low + (high - low) * torch.rand(*shape, generator=generator)

    drawn = masking.draw_blocks(1024, 8, (0.3, 0.4), (0.75, 1.5), uniform)  # [B, M, N]
    block = torch.ones(1024, 64, dtype=torch.bool)
    targets, context = masking.make_room(drawn, block)
    for image in range(1024):
        stay = 1 + max(m for m in range(8) if (~drawn[image, : m + 1].any(0)).sum() >= 16)
        assert torch.equal(targets[image, :stay], drawn[image, :stay])
        assert (targets[image, stay:] == drawn[image, 0]).all()
    assert (context & ~targets.any(1)).sum(1).min() >= 16


def test_indices_and_maps_are_each_others_inverse_and_padding_is_not_counted():
    """Padding repeats index 0; patch 0 may only count where it is real."""
    maps = torch.rand(50, 36, generator=torch.Generator().manual_seed(0)) < 0.3
    indices, valid = to_indices(maps)
    assert indices.shape[1] == maps.sum(1).max() and torch.equal(valid.sum(1), maps.sum(1))
    assert torch.equal(to_maps(indices, valid, 36), maps) and not indices[~valid].any()


def test_masks_of_some_images_are_their_rows():
    masks, context, targets = draw((8, 8))
    some = masks[10:20]
    assert isinstance(some, Masks) and torch.equal(some.maps(64)[0], context[10:20])
    assert torch.equal(some.maps(64)[1], targets[10:20])


def test_the_same_generator_draws_the_same_masks():
    first, second, other = (draw((8, 8), seed=seed)[0] for seed in (1, 1, 2))
    assert all(map(torch.equal, vars(first).values(), vars(second).values()))
    assert not torch.equal(first.maps(64)[0], other.maps(64)[0])


@pytest.mark.parametrize("settings, checksum", [
    (dict(grid=(14, 14), min_keep=10), 1080377195),
    (dict(grid=(8, 8), context_size=16), 1671404593),
    (dict(grid=(4, 6, 6), context_size=12), 1659592637),
])
def test_a_seed_gives_the_masks_that_it_has_always_given(settings, checksum):
    """Results are tied to seeds: whoever changes what is drawn changes what every seed means."""
    masks, _, _ = draw(B=16, **settings)
    parts = [part.contiguous().numpy().tobytes() for part in vars(masks).values()]
    assert zlib.crc32(b"".join(parts)) == checksum


@pytest.mark.parametrize("settings", [
    dict(grid=(1, 1), num_targets=1), dict(grid=(2, 2)), dict(grid=(4, 4), min_keep=13),
    dict(grid=(8, 8), target_scale=(0.15, 1.0)), dict(grid=(6, 6), context_size=30),
])
def test_a_grid_with_no_room_for_the_context_is_refused_when_the_sampler_is_built(settings):
    grid = "x".join(map(str, settings["grid"]))
    with pytest.raises(UsageError, match=f"on a grid of {grid} patches"):
        MultiBlockMasking(**settings)


@pytest.mark.parametrize("name, value", [
    ("num_targets", 0), ("num_targets", -1), ("num_targets", 197), ("context_size", -1),
    ("min_keep", 0), ("min_keep", -3), ("target_scale", (0.5, 0.3)), ("target_scale", (-0.1, 0.3)),
    ("target_scale", (0.0, 0.0)), ("target_scale", (0.5, 1.5)), ("target_scale", (math.nan, 0.2)),
    ("context_scale", (0.9, 0.5)), ("context_scale", (0.0, 0.5)), ("context_scale", (1.0, 2.0)),
    ("context_scale", (-1.0, -0.5)), ("target_aspect", (2.0, 1.0)), ("target_aspect", (-1.0, 1.0)),
    ("target_aspect", (0.0, 0.0)), ("target_aspect", (0.5, math.inf)), ("target_scale", 0.2),
])
def test_the_class_refuses_what_the_command_line_refuses(name, value):
    with pytest.raises(UsageError, match=f"--{name.replace('_', '-')} is .*expected"):
        MultiBlockMasking((14, 14), **{name: value})
