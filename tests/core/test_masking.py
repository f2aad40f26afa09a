"""Claims about the masks (paper section 3): what is context, what is target, and that drawing them always ends."""

import math
import random
import zlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from config import UsageError
from extras.fast_masking import FastMultiBlockMasking
from masking import MultiBlockMasking

GRIDS = [(4, 4), (6, 6), (8, 8), (12, 12), (14, 14), (6, 10), (4, 6, 6)]
MODES = ["pad", "truncate"]


def draw(grid, B=256, seed=0, **settings):
    masking = MultiBlockMasking(grid, **settings)
    masks = masking(B, torch.Generator().manual_seed(seed))
    return masking, masks, *masks.maps(masking.N)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("grid", GRIDS)
def test_no_context_patch_lies_in_a_target_block(grid, mode):
    _, _, context, targets = draw(grid, mode=mode)
    assert not (context & targets.any(dim=1)).any()


def test_with_allow_overlap_the_context_keeps_the_targets_patches():
    _, _, context, targets = draw((8, 8), allow_overlap=True)
    assert (context & targets.any(dim=1)).any(dim=1).float().mean() > 0.99


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("grid", GRIDS)
def test_every_cell_is_reached_by_context_and_by_targets(grid, mode):
    """The official sampler never uses the last row and column: 15 of 64 cells on an 8x8 grid. Ours uses every cell."""
    masking = MultiBlockMasking(grid, mode=mode)
    generator = torch.Generator().manual_seed(0)
    maps = [masking(64, generator).maps(masking.N) for _ in range(64)]
    for part in (torch.cat([context for context, _ in maps]), torch.cat([targets.any(1) for _, targets in maps])):
        used = part.float().mean(dim=0)  # [N], how often each cell is in the block
        assert used.min() > 0.005 and used.min() > used.max() / 50


def test_coverage_is_symmetric():
    """Top and bottom, left and right are alike: within 5 standard errors of each other over 8,192 images."""
    _, _, context, targets = draw((8, 8), B=8192)
    for part in (context, targets.any(dim=1)):
        used = part.float().mean(dim=0).view(8, 8)
        error = 5 * math.sqrt(2 * 0.25 / 8192)
        assert (used - used.flip(0)).abs().max() < error
        assert (used - used.flip(1)).abs().max() < error
        assert (used - used.T).abs().max() < 0.1  # aspect .75 to 1.5 is not symmetric: slightly more tall blocks than wide ones


@pytest.mark.parametrize("grid", [(8, 8), (14, 14), (6, 10), (4, 6, 6)])
def test_target_blocks_are_solid_boxes_listed_in_raster_order(grid):
    _, masks, _, targets = draw(grid, B=32)
    for block, indices, valid in zip(targets.flatten(0, 1), masks.targets.flatten(0, 1), masks.targets_valid.flatten(0, 1)):
        places = block.view(grid).nonzero()  # [count, axes]
        sides = places.max(dim=0).values - places.min(dim=0).values + 1
        assert sides.prod() == len(places) == valid.sum()  # solid, and no patch is listed twice
        assert indices[valid].tolist() == sorted(indices[valid].tolist())


def test_mean_target_area_is_the_scale_asked_for():
    """On a fine grid rounding to whole patches averages out: the mean area is the middle of the scale, within 2%."""
    _, _, _, targets = draw((40, 40), B=2000)
    assert targets.float().mean() == pytest.approx(0.175, rel=0.02)


def test_scale_and_aspect_are_independent():
    """The official code draws both from one number (correlation 1); ours are uncorrelated (within 4 standard errors)."""
    masking = MultiBlockMasking((100, 100), num_targets=1)
    sizes = masking._sizes((4000, 1), (0.15, 0.2), (0.75, 1.5), torch.Generator().manual_seed(0), "cpu")[:, 0].double()
    area, aspect = sizes.prod(dim=1), sizes[:, 0] / sizes[:, 1]
    assert abs(torch.corrcoef(torch.stack([area, aspect]))[0, 1]) < 4 / math.sqrt(4000)


def test_images_of_a_batch_have_their_own_sizes_and_places():
    _, masks, _, targets = draw((14, 14))
    assert len({tuple(m.flatten().tolist()) for m in targets}) == 256
    assert len(masks.targets_valid.sum(-1).unique()) > 5  # many block sizes
    assert len(masks.context_valid.sum(-1).unique()) > 20  # many context lengths


def test_truncation_cuts_at_random_not_to_the_first_rows():
    """The official code keeps the topmost patches: on 8x8 its last row is never context. Ours keeps every row alike."""
    masking = MultiBlockMasking((8, 8), mode="truncate")
    generator = torch.Generator().manual_seed(0)
    rows = torch.stack([masking(256, generator).maps(64)[0].float().view(256, 8, 8).mean((0, 2)) for _ in range(50)]).mean(0)
    assert rows[-1] > 0.8 * rows[0]


@pytest.mark.parametrize("mode", MODES)
def test_exact_context_size(mode):
    _, masks, context, _ = draw((6, 6), context_size=12, mode=mode)
    assert masks.context.shape == (256, 12) and masks.context_valid is None
    assert (context.sum(dim=1) == 12).all()


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("min_keep", [4, 8])
def test_sampling_ends_with_enough_context(grid, min_keep):
    """The official sampler loops for ever in 8 of 20 batches on 8x8 with min_keep=10."""
    _, _, context, targets = draw(grid, B=4096, min_keep=min_keep)
    assert context.sum(dim=1).min() >= min_keep
    assert (targets.sum(dim=2) >= 1).all()


def test_eight_targets_that_cannot_all_fit_are_stacked_rather_than_retried():
    _, _, context, targets = draw((8, 8), B=1024, num_targets=8, target_scale=(0.3, 0.4), min_keep=16)
    assert context.sum(dim=1).min() >= 16
    assert not (context & targets.any(dim=1)).any()


def test_maps_ignore_padding():
    """Padding repeats index 0; cell 0 may only count where it is real."""
    masking, masks, context, _ = draw((8, 8))
    assert (context.sum(dim=1) == masks.context_valid.sum(dim=1)).all()


def test_the_same_generator_draws_the_same_masks():
    first, second, other = (draw((8, 8), seed=seed)[1] for seed in (1, 1, 2))
    assert torch.equal(first.context, second.context) and torch.equal(first.targets, second.targets)
    assert first.context.shape != other.context.shape or not torch.equal(first.context, other.context)


@pytest.mark.parametrize("settings, checksum", [
    (dict(grid=(14, 14), min_keep=10), 1080377195), (dict(grid=(8, 8), mode="truncate"), 152109383),
    (dict(grid=(4, 6, 6), context_size=12), 38008607),
    (dict(grid=(8, 8), num_targets=8, target_scale=(0.3, 0.4), min_keep=16), 2950780495),
])
def test_a_seed_gives_the_masks_that_it_has_always_given(settings, checksum):
    """Results are tied to seeds: who changes what is drawn, or in which order, changes what every seed means, and must say so."""
    _, masks, _, _ = draw(B=16, **settings)
    parts = [part for part in vars(masks).values() if part is not None]
    assert zlib.crc32(b"".join(part.contiguous().numpy().tobytes() for part in parts)) == checksum


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("grid", GRIDS)
def test_what_training_draws_are_these_masks_to_the_bit_only_faster(grid, mode):
    """Settings drawn at random, those that no grid allows left out; batches of 1 and more; and what the generator draws next."""
    rng, tried = random.Random(str((grid, mode))), 0
    while tried < 20:
        low, shallow, aspect = rng.uniform(0.02, 0.3), rng.uniform(0.1, 1), rng.uniform(0.2, 1)
        settings = dict(num_targets=rng.randint(1, 6), target_scale=(low, low * rng.uniform(1, 2)), target_aspect=(aspect, 1 / aspect),
                        context_scale=(shallow, rng.uniform(shallow, 1)), context_size=rng.choice((0, 0, 2, 5)), mode=mode,
                        min_keep=rng.randint(1, 6), allow_overlap=rng.random() < 0.2)
        try:
            plain = MultiBlockMasking(grid, **settings)
        except UsageError:
            continue
        fast, B, tried = FastMultiBlockMasking(grid, **settings), rng.choice((1, 7, 64)), tried + 1
        generators = [torch.Generator().manual_seed(tried) for _ in range(2)]
        first, second = (vars(masking(B, generator)) for masking, generator in zip((plain, fast), generators))
        assert torch.equal(generators[0].get_state(), generators[1].get_state())
        for name, part in first.items():
            assert second[name] is None if part is None else part.dtype == second[name].dtype and torch.equal(part, second[name]), settings


def test_masks_drawn_under_autocast_are_the_same():
    """A model draws them in its forward pass, under bf16, whose whole numbers end at 256: 24 x 24 patches are more."""
    masking = FastMultiBlockMasking((24, 24))
    plain = masking(8, torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        cast = masking(8, torch.Generator().manual_seed(0))
    assert all(map(torch.equal, vars(plain).values(), vars(cast).values()))


class Unread(TorchDispatchMode):
    """Within it no operation may hand a tensor's value to Python, or give it a shape that depends on values: both would wait for a GPU."""

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        assert not {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(function.tags), f"{function} waits"
        return function(*arguments, **(keywords or {}))


@pytest.mark.parametrize("settings", [
    dict(grid=(14, 14), context_size=48), dict(grid=(6, 6), context_size=12), dict(grid=(4, 6, 6), context_size=12),
    dict(grid=(8, 8), context_size=16, num_targets=8, target_scale=(0.1, 0.4), target_aspect=(0.3, 3.0)),
    dict(grid=(8, 8), context_size=16, context_scale=(0.1, 0.4), allow_overlap=True),
])
def test_a_gpu_that_is_not_waited_for_draws_the_same_masks_in_shapes_that_never_change(settings, monkeypatch):
    masking = FastMultiBlockMasking(**settings)

    def batches():
        return [masking(64, torch.Generator().manual_seed(seed)) for seed in range(8)]

    asked = batches()
    with pytest.raises(AssertionError, match="waits"), Unread():
        batches()
    monkeypatch.setattr("extras.fast_masking.ASKED", ())  # all devices are treated as a GPU is
    with Unread():
        unasked = batches()
    assert len({masks.targets.shape for masks in unasked}) == 1
    for one, other in zip(asked, unasked):
        Nt = one.targets.shape[2]
        assert torch.equal(one.context, other.context) and torch.equal(one.targets, other.targets[..., :Nt])
        assert torch.equal(one.targets_valid, other.targets_valid[..., :Nt]) and not other.targets_valid[..., Nt:].any()


@pytest.mark.parametrize("settings", [
    dict(grid=(1, 1)), dict(grid=(2, 2)), dict(grid=(4, 4), min_keep=13), dict(grid=(8, 8), target_scale=(0.15, 1.0)),
    dict(grid=(6, 6), context_size=30), dict(grid=(8, 8), min_keep=65, allow_overlap=True),
])
def test_impossible_settings_are_refused_when_built_naming_the_grid(settings):
    with pytest.raises(UsageError, match="x".join(map(str, settings["grid"])) + " grid"):
        MultiBlockMasking(**settings)
