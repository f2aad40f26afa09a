"""Claims about volumes, from the embedded solids to the figures: a third axis changes no rule, and nothing is lost on it."""

import json

import numpy as np
import pytest
import torch

import data
import evaluate
from extras import figures
import predict_and_visualize as viz
from extras import pretrained
from support import solids
import train
from config import UsageError, from_preset
from masking import MultiBlockMasking
from models import IJEPA, patchify, unpatchify
from test_readme import snippets


@pytest.fixture(scope="module")
def drawn():
    labels = torch.arange(1000) % 10
    return solids.draw(labels, torch.Generator().manual_seed(5)).float() / 255, labels


@pytest.fixture(scope="module")
def toy():
    torch.manual_seed(0)
    model = IJEPA("32x2x2", "16x1x2", image_size=20, patch_size=5, channels=1, axes=3).eval()
    volumes = torch.rand(8, 1, 20, 20, 20, generator=torch.Generator().manual_seed(1))
    return model, volumes.expand(-1, 3, -1, -1, -1), volumes * 2 - 1, model.masking(2, torch.Generator().manual_seed(2))


# --- the embedded solids


def test_volumes_are_determined_by_the_seed_alone_and_the_splits_share_none(drawn, monkeypatch):
    assert torch.equal(drawn[0], solids.draw(drawn[1], torch.Generator().manual_seed(5)).float() / 255)
    monkeypatch.setattr("support.solids.COUNT", {"train": 200, "test": 200})
    train_split, test_split = (solids.make(split, chunk=200)[0].flatten(1).float() for split in ("train", "test"))
    assert torch.cdist(train_split, test_split).min() > 100  # 16 x 16 x 16 voxels of 0..255


def test_no_kind_is_told_by_its_mean_grey_or_its_mean_volume(drawn):
    """Within 4 standard errors of all kinds' mean (10 comparisons), and for no voxel off by 5.5 (41,000 comparisons)."""
    volumes, labels = drawn
    greys = volumes.flatten(1).mean(1)  # [n]
    for kind in range(10):
        assert (greys[labels == kind].mean() - greys.mean()).abs() < 4 * greys.std() / 100**0.5
        assert ((volumes[labels == kind].mean(0) - volumes.mean(0)).abs() < 5.5 * volumes.std(0) / 100**0.5).all()


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


# --- patches, masks, model


def test_patches_of_volumes_put_together_again_are_the_volumes():
    volumes = torch.arange(2 * 3 * 4 * 6 * 8.0).view(2, 3, 4, 6, 8)
    assert torch.equal(unpatchify(patchify(volumes, 2), (2, 3, 4), 2), volumes)


def test_cuboids_draw_the_aspect_of_each_axis_anew_and_keep_their_volume():
    """On a fine grid: the ratios to the last axis fill .5 to 2 each and are independent, while the volume stays that of the scale."""
    masking = MultiBlockMasking((64, 64, 64), num_targets=1, target_scale=(0.1, 0.1), target_aspect=(0.5, 2.0))
    sides = masking._sizes((4000, 1), (0.1, 0.1), (0.5, 2.0), torch.Generator().manual_seed(0), "cpu")[:, 0].float()  # [B, 3]
    assert (sides.prod(1) / 64**3 - 0.1).abs().max() < 0.01  # sides are whole patches
    deep, down = sides[:, 0] / sides[:, 2], sides[:, 1] / sides[:, 2]
    for ratio in (deep, down):
        assert ratio.min() < 0.55 and ratio.max() > 1.9 and abs(ratio.mean() - 1.25) < 0.05
    assert torch.corrcoef(torch.stack([deep, down]))[0, 1].abs() < 0.1


def test_the_presets_of_volumes_build_and_predict_every_axis():
    for name, sides in (("shapes3d", 16), ("medmnist3d", 28)):
        config = from_preset(name)
        channels, axes = data.NAMES[config.dataset]
        model = train.methods.build(config, channels, axes)
        output = model(torch.randn(2, channels, *[sides] * axes), generator=torch.Generator().manual_seed(0))
        assert axes == 3 and len(model.context_encoder.grid) == 3 and output.loss.isfinite()


# --- data


def test_medmnist_volumes_are_read_by_name_from_the_data_folder_and_asked_for_where_missing(tmp_path, monkeypatch):
    volumes = np.random.default_rng(0).integers(0, 256, (12, 28, 28, 28), dtype=np.uint8)
    np.savez(tmp_path / "organmnist3d.npz", train_images=volumes, train_labels=np.arange(12)[:, None] % 3)
    dataset = data.load("organmnist3d", "train", tmp_path)
    assert dataset.name == "organmnist3d" and dataset.images.shape == (12, 1, 28, 28, 28) and dataset.labels.tolist() == [0, 1, 2] * 4
    asked = []
    monkeypatch.setattr("support.download.receive", lambda url, part: asked.append(url) or part.write_bytes(b"not it"))
    with pytest.raises(UsageError, match="nodulemnist3d.npz came damaged twice.* put nodulemnist3d.npz into"):
        data.load("nodulemnist3d", "train", tmp_path)
    assert set(asked) == {"https://zenodo.org/record/6496656/files/nodulemnist3d.npz"}


def test_an_encoder_of_volumes_is_taken_up_again_with_what_is_known_of_its_images(tmp_path, monkeypatch):
    """Of the embedded solids the statistics are known; those of an .npz, also one with a name, are measured where it is read."""
    monkeypatch.setattr("support.solids.COUNT", {"train": 100, "test": 100})
    monkeypatch.setattr("support.solids.make.__defaults__", (100,))
    volumes = np.random.default_rng(0).integers(0, 256, (40, 28, 28, 28), dtype=np.uint8)
    np.savez(tmp_path / "organmnist3d.npz", train_images=volumes)
    for preset, statistics in (("shapes3d", data.STATISTICS["shapes3d"]), ("medmnist3d", (None, None))):
        train.train(from_preset(preset, encoder="24x1x2", predictor="8x1x1", batch_size=16, max_steps=1, measurements=0,
                                data_dir=str(tmp_path), out=str(tmp_path / preset)))
        found = pretrained.load(str(tmp_path / preset / "encoder.pt"))
        assert (found.mean, found.std) == statistics and found.shape["axes"] == 3 and len(found.encoder.grid) == 3


# --- figures by slice


def test_slices_are_the_middle_of_each_layer():
    volumes = torch.arange(2 * 3 * 20).view(2, 3, 20, 1, 1).expand(-1, -1, -1, 4, 4)
    slices = figures.by_slice(volumes, (4, 4, 4))
    assert slices.shape == (2 * 4, 3, 4, 4)
    assert slices[:4, 0, 0, 0].tolist() == [2, 7, 12, 17] and torch.equal(slices[5], volumes[1, :, 7])
    assert torch.equal(figures.by_slice(volumes[:, :, :4], (4, 4, 4))[4:, 0, 0, 0], volumes[1, 0, :4, 0, 0])  # a map of patches
    flat = torch.rand(2, 3, 8, 8)
    assert figures.by_slice(flat, (4, 4)) is flat


def test_masks_of_volumes_are_drawn_where_they_are(toy):
    model, pictures, _, masks = toy
    figure = figures.mask_figure(pictures[:2], masks, (4, 4, 4))
    context = masks.maps(64)[0].view(2, 4, 4, 4)
    for row in range(8):  # two volumes of four slices; a row of figure.axes has image, context and four targets
        shown = torch.tensor(figure.axes[6 * row + 1].images[0].get_array())  # [H, W, 3]
        white = (shown == 1).all(-1).view(4, 5, 4, 5).permute(0, 2, 1, 3).flatten(2).all(-1)  # [4, 4]
        assert torch.equal(~white, context[row // 4, row % 4])


def test_volumes_filled_from_true_features_and_a_gallery_with_themselves_are_themselves(toy):
    model, pictures, images, masks = toy
    _, true = viz.block_features(model, images[:2], masks, model.predictor)
    filled = viz.fill(torch.zeros_like(pictures[:2]), masks, true, viz.make_gallery(model, images, pictures), (4, 4, 4))
    hidden = figures.to_pixels(masks.maps(64)[1].any(1), 20, (4, 4, 4))[:, None].expand_as(filled)
    assert torch.equal(filled[hidden], pictures[:2][hidden]) and not filled[~hidden].any()


def test_a_block_slides_through_every_place_of_a_volume():
    context, targets = viz.slide((3, 4, 2), (2, 3, 1)).maps(24)
    assert targets.shape == (2 * 2 * 2, 1, 24) and torch.equal(context, ~targets[:, 0])
    assert len(targets[:, 0].unique(dim=0)) == 8
    deep, down, across = targets[7, 0].view(3, 4, 2).nonzero().unbind(1)
    assert (deep.min(), deep.max(), down.min(), down.max(), across.min(), across.max()) == (1, 2, 1, 3, 1, 1)


def test_a_run_on_volumes_is_trained_evaluated_and_drawn(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("support.solids.COUNT", {"train": 400, "test": 300})
    monkeypatch.setattr("support.solids.make.__defaults__", (100,))
    out = str(tmp_path / "run")
    train.train(from_preset("shapes3d", encoder="24x1x2", predictor="8x1x1", batch_size=16, max_steps=2, device="cpu", out=out))
    evaluate.main([out, "--device", "cpu", "--train-images", "200", "--test-images", "100"])
    results = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert results["class_names"][0] == "ball" and {"target", "context", "random", "pixels"} <= set(results["features"])
    capsys.readouterr()
    run, generator = viz.load(viz.arguments([out, "--images", "250", "--tsne-images", "100"])), torch.Generator().manual_seed(0)
    drawn = dict([*viz.predictor_figures(run, run.model.predictor, generator), *viz.encoder_figures(run), *viz.recorded_figures(run)])
    assert set(drawn) >= {"masks", "coverage", "predictor_neighbours", "moving_block", "prediction_error", "tokens", "attention",
                          "nearest_images", "tsne", "comparison", "confusion"}
    assert len(drawn["masks"].axes) == 2 * 4 * 6 and len(drawn["nearest_images"].axes) == 6 * 8  # by slice, and by the middle slice
    assert "left out" not in capsys.readouterr().out


def test_a_masked_autoencoder_of_volumes_shows_what_it_reconstructs(tmp_path, monkeypatch):
    monkeypatch.setattr("support.solids.COUNT", {"train": 400, "test": 300})
    monkeypatch.setattr("support.solids.make.__defaults__", (100,))
    out = str(tmp_path / "run")
    train.train(from_preset("shapes3d", method="mae", encoder="24x1x2", predictor="8x1x1", batch_size=16, max_steps=2, out=out))
    run = viz.load(viz.arguments([out, "--images", "250"]))
    ((name, figure),) = viz.decoder_figures(run, torch.Generator().manual_seed(0))
    assert name == "reconstruction" and len(figure.axes) == 3 * 2 * run.model.masking.grid[0]


def test_the_five_lines_of_volumes_run_as_they_are_worded(monkeypatch):
    monkeypatch.setattr("support.solids.COUNT", {"train": 100, "test": 100})
    monkeypatch.setattr("support.solids.make.__defaults__", (100,))
    (code,), names = snippets("Volumes"), {}
    exec(code, names)
    assert names["loss"].isfinite() and names["features"].shape == (64, 96) and names["model"].context_encoder.grid == (4, 4, 4)
