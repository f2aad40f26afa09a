"""Volumes [B, C, T, H, W] in figures: a row for each slice.

Three axes need nothing else of their own: patches are cubes, target blocks cuboids, and the core is
the same. T, H, W voxels; S layers of patches, of which the middle slice is shown.
"""

import math

import torch

from masking import Masks, to_indices
from predict_and_visualize import imagine, make_gallery, mask_figure, table

SHOWN = 1  # volume in the rows of a figure, with S rows


def by_slice(pixels, grid):
    """Volumes [B, ..., T, H, W], or maps of their patches, as slices [B*S, ..., H, W], one from the
    middle of each layer of the grid; images with two axes as they are."""
    if len(grid) == 2:
        return pixels
    thickness = pixels.shape[-3] // grid[0]
    slices = pixels[..., thickness // 2 :: thickness, :, :]  # [B, ..., S, H, W]
    return slices.movedim(-3, 1).flatten(0, 1)


def masks_by_slice(masks, grid):
    """Masks of B volumes as Masks of their B*S slices, on the last two axes of the grid."""
    context, targets = masks.maps(math.prod(grid))  # [B, N], [B, M, N]
    context = context.unflatten(1, (grid[0], -1)).flatten(0, 1)  # [B*S, N/S]
    targets = targets.unflatten(2, (grid[0], -1)).transpose(1, 2).flatten(0, 1)  # [B*S, M, N/S]
    return Masks(*to_indices(context), *to_indices(targets))


def predictor_figures(run):
    """Yields (file name, Figure), as predict_and_visualize.predictor_figures for images."""
    rows, grid = min(run.rows, SHOWN), run.masking.grid
    images, pictures = run.take(range(rows))
    masks = run.masking(rows, torch.Generator().manual_seed(run.seed)).to(run.device)
    yield "masks", mask_figure(
        by_slice(pictures, grid), masks_by_slice(masks, grid), grid[1:],
        f"{run.what}, by slice: what the context encoder sees, and what is to be predicted")
    gallery = make_gallery(run.model, *run.take(range(rows, len(run.images))))
    columns = imagine(run.model, run.untrained_predictor(), images, pictures, masks, gallery)
    yield "predictor_neighbors", table(
        [(name, by_slice(part, grid)) for name, part in columns],
        f"{run.what}, by slice: hidden cubes, filled with the nearest of other volumes.\n"
        "Does 'predicted' continue what the context shows?", side=2)[0]
