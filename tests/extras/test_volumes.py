"""Claims about volumes, from the synthetic solids to the figures: a third axis changes no rule."""

import numpy as np
import pytest
import torch
from test_readme import snippets

import data
import predict_and_visualize as viz
import train
from config import UsageError, from_preset
from extras import figures, volumes
from masking import MultiBlockMasking
from models import IJEPA, Encoder, Predictor, patchify
from support import solids


@pytest.fixture(scope="module")
def drawn():
    labels = torch.arange(1000) % 10
    return solids.draw(labels, torch.Generator().manual_seed(5)).float() / 255, labels


@pytest.fixture(scope="module")
def toy():
    """A model of 4 x 4 x 4 patches, 8 volumes as pictures and normalized, masks of the first 2."""
    torch.manual_seed(0)
    encoder = Encoder(32, 2, 2, image_size=(20, 20, 20), patch_size=5, channels=1)
    model = IJEPA(encoder, Predictor(32, encoder.grid, 16, 1, 2)).eval()
    scans = torch.rand(8, 1, 20, 20, 20)
    masks = MultiBlockMasking((4, 4, 4))(2, torch.Generator().manual_seed(2))
    return model, scans.expand(-1, 3, -1, -1, -1), scans * 2 - 1, masks


# --- the synthetic solids -------------------------------------------------------------------------


def test_volumes_are_determined_by_the_seed_alone_and_the_splits_share_none(drawn, monkeypatch):
    again = solids.draw(drawn[1], torch.Generator().manual_seed(5)).float() / 255
    assert torch.equal(drawn[0], again)
    monkeypatch.setattr("support.solids.COUNT", {"train": 200, "test": 200})
    train_split, test_split = (solids.make(split, chunk=200)[0].flatten(1).float()
                               for split in ("train", "test"))
    assert torch.cdist(train_split, test_split).min() > 100  # 16 x 16 x 16 voxels of 0..255


def test_no_kind_is_told_by_its_mean_gray_or_its_mean_volume(drawn):
    """Within 4 standard errors of all kinds' mean (10 comparisons), and no voxel off by 5.5 (41,000
    comparisons)."""
    scans, labels = drawn
    grays = scans.flatten(1).mean(1)  # [n]
    for kind in range(10):
        assert (grays[labels == kind].mean() - grays.mean()).abs() < 4 * grays.std() / 100**0.5
        off = (scans[labels == kind].mean(0) - scans.mean(0)).abs()
        assert (off < 5.5 * scans.std(0) / 100**0.5).all()


def test_all_kinds_take_up_about_the_same_room():
    line = torch.linspace(-2, 2, 120)
    places = torch.meshgrid(line, line, line, indexing="ij")
    rooms = torch.stack([(surface(*places) < 0).float().mean() * 64 for surface in solids.KINDS])
    assert rooms.min() > 4.0 and rooms.max() < 4.5  # the ball has 4.19


def test_rotations_are_rotations_and_prefer_no_direction():
    turns = solids.rotations(20_000, torch.Generator().manual_seed(0))
    assert torch.allclose(turns @ turns.mT, torch.eye(3).expand_as(turns), atol=1e-5)
    assert torch.allclose(torch.linalg.det(turns), torch.ones(len(turns)), atol=1e-5)
    assert turns.mean(0).abs().max() < 5 * (1 / 3 / 20_000) ** 0.5  # each entry has variance 1/3


# --- patches, masks, model ------------------------------------------------------------------------


def test_patches_are_cubes_and_put_together_again_the_volumes():
    scans = torch.arange(2 * 3 * 4 * 6 * 8.0).view(2, 3, 4, 6, 8)
    patches = patchify(scans, 2)  # a grid of 2 x 3 x 4
    assert torch.equal(patches[0, 23], scans[0, :, 2:, 4:, 6:].flatten())
    assert torch.equal(viz.unpatchify(patches, (3, 4, 6, 8), 2), scans)


def test_cuboids_draw_the_aspect_of_each_axis_anew_and_keep_their_volume():
    """On a fine grid: the ratios to the last axis fill .5 to 2 each and are independent, while the
    volume stays that of the scale."""
    masking = MultiBlockMasking((64, 64, 64), num_targets=1, target_scale=(0.1, 0.1),
                                target_aspect=(0.5, 2.0))
    aspects = 0.5 + 1.5 * torch.rand(4000, 2, generator=torch.Generator().manual_seed(0))
    sides = masking.sides(torch.full((4000, 1), 0.1), aspects).float()  # [B, 3]
    assert (sides.prod(1) / 64**3 - 0.1).abs().max() < 0.01  # sides are whole patches
    ratios = sides[:, :2] / sides[:, 2:]
    assert (ratios - aspects).abs().max() < 0.15  # the last side is 20 patches or more
    coarse = MultiBlockMasking((32, 32, 32), 1, (0.1, 0.1), (0.5, 2.0))
    _, targets = coarse(500, torch.Generator().manual_seed(0)).maps(32**3)
    cuboids = targets.view(500, 32, 32, 32)
    found = torch.stack([cuboids.flatten(2).any(2).sum(1), cuboids.any(1).any(2).sum(1),
                         cuboids.any(1).any(1).sum(1)], dim=1).float()  # [B, 3], sides
    assert torch.equal(found.prod(1), cuboids.flatten(1).sum(1).float())  # they are cuboids
    deep, down = (found[:, axis] / found[:, 2] for axis in (0, 1))
    for ratio in (deep, down):
        assert ratio.min() < 0.6 and ratio.max() > 1.85
    # Independent: a correlation has a standard error of 1 / sqrt(500).
    assert torch.corrcoef(torch.stack([deep, down]))[0, 1].abs() < 4 / 500**0.5


@pytest.mark.parametrize("preset,channels", [("shapes3d", 1), ("medmnist3d", 1), ("shapes3d", 3)])
def test_the_presets_of_volumes_build_and_predict_every_axis(preset, channels):
    config = from_preset(preset)
    model, masking = train.build(config, channels, axes=3)
    scans = torch.randn(2, channels, *[config.image_size] * 3)
    output = model(scans, masking(2, torch.Generator().manual_seed(0)))
    assert len(model.context_encoder.grid) == 3 and output.loss.isfinite()


# --- data -----------------------------------------------------------------------------------------


def test_medmnist_volumes_are_read_by_name_and_asked_for_if_missing(tmp_path, monkeypatch):
    scans = np.random.default_rng(0).integers(0, 256, (12, 28, 28, 28), dtype=np.uint8)
    labels = np.arange(12)[:, None] % 3
    np.savez(tmp_path / "organmnist3d.npz", train_images=scans, train_labels=labels)
    dataset = data.load("organmnist3d", "train", tmp_path)
    assert dataset.name == "organmnist3d" and dataset.shape == (1, 3)
    assert np.array_equal(dataset.images[:, 0], scans)
    assert dataset.labels.tolist() == [0, 1, 2] * 4
    asked = []
    monkeypatch.setattr("support.download.receive",
                        lambda url, part: asked.append(url) or part.write_bytes(b"not it"))
    with pytest.raises(UsageError, match="put nodulemnist3d.npz into"):
        data.load("nodulemnist3d", "train", tmp_path)
    assert set(asked) == {"https://zenodo.org/records/10519652/files/nodulemnist3d.npz"}


# --- figures by slice -----------------------------------------------------------------------------


def test_slices_are_the_middle_of_each_layer():
    scans = torch.arange(2 * 3 * 20).view(2, 3, 20, 1, 1).expand(-1, -1, -1, 4, 4)
    slices = volumes.by_slice(scans, (4, 4, 4))
    assert slices.shape == (2 * 4, 3, 4, 4)
    assert slices[:4, 0, 0, 0].tolist() == [2, 7, 12, 17]
    assert torch.equal(slices[5], scans[1, :, 7])
    patches = scans[:, :, :4]  # a map of the patches: every layer
    assert torch.equal(volumes.by_slice(patches, (4, 4, 4))[4:, 0, 0, 0], patches[1, 0, :, 0, 0])
    flat = torch.rand(2, 3, 8, 8)
    assert volumes.by_slice(flat, (4, 4)) is flat


def test_masks_by_slice_are_the_slices_of_the_masks():
    masks = MultiBlockMasking((2, 3, 4), 2)(5, torch.Generator().manual_seed(0))
    context, targets = masks.maps(24)
    by_slice = volumes.masks_by_slice(masks, (2, 3, 4)).maps(12)
    for volume in range(5):
        for layer in range(2):
            cut = slice(12 * layer, 12 * layer + 12)
            assert torch.equal(by_slice[0][2 * volume + layer], context[volume, cut])
            assert torch.equal(by_slice[1][2 * volume + layer], targets[volume, :, cut])


def test_volumes_filled_from_true_features_and_a_gallery_with_themselves_are_themselves(toy):
    model, pictures, images, masks = toy
    gallery = viz.make_gallery(model, images, pictures)
    columns = viz.imagine(model, model.predictor, images[:2], pictures[:2], masks, gallery)
    true = dict(columns)["true features"]
    context, targets = masks.maps(64)
    shown = viz.to_pixels(context | targets.any(1), (4, 4, 4), 5)[:, None].expand_as(true)
    assert torch.equal(true[shown], pictures[:2][shown]) and (true[~shown] == 1).all()


def test_a_run_on_volumes_is_trained_and_drawn_by_slice(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("support.solids.COUNT", {"train": 200, "test": 100})
    monkeypatch.setattr("support.solids.make.__defaults__", (100,))
    out = str(tmp_path)
    train.train(from_preset("shapes3d", encoder="24x1x2", predictor="8x1x1", batch_size=16,
                            max_steps=2, device="cpu", out=out))
    viz.main([out, "--device", "cpu"])
    assert f"for volumes run python -m extras.figures {out}" in capsys.readouterr().out
    run = viz.load(viz.parse([out, "--device", "cpu"], ""))
    drawn = dict(volumes.predictor_figures(run))
    assert len(drawn["masks"].axes) == 4 * 3  # one volume, four slices; image, context, targets
    assert len(drawn["predictor_neighbors"].axes) == 4 * 5
    figures.main([out, "--device", "cpu"])
    names = {path.stem for path in (tmp_path / "figures").glob("*.png")}
    assert names == {"masks", "coverage", "predictor_neighbors", "prediction_error", "curves",
                     "tsne", "tokens", "attention", "nearest_images"}
    assert "left out moving_block: it is drawn for images" in capsys.readouterr().out


def test_the_five_lines_of_volumes_run_as_they_are_worded(monkeypatch):
    monkeypatch.setattr("support.solids.COUNT", {"train": 100, "test": 100})
    monkeypatch.setattr("support.solids.make.__defaults__", (100,))
    (code,), names = snippets("Volumes"), {}
    exec(code, names)
    assert names["loss"].isfinite() and names["features"].shape == (64, 96)
    assert names["model"].context_encoder.grid == (4, 4, 4)
