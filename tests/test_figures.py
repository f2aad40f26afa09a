"""Claims about the figures: what they compute is right, and each one draws."""

import json

import pytest
import torch
from matplotlib.figure import Figure

import predict_and_visualize as viz
import train
from config import UsageError, from_preset
from masking import MultiBlockMasking
from models import IJEPA


@pytest.fixture(scope="module")
def toy():
    torch.manual_seed(0)
    model = IJEPA("32x2x2", "16x1x2", image_size=24, patch_size=4).eval()
    pictures = torch.rand(12, 3, 24, 24, generator=torch.Generator().manual_seed(1))
    return model, pictures, pictures * 2 - 1, model.masking(4, torch.Generator().manual_seed(2))


def test_the_official_rules_never_use_15_of_64_cells_and_ours_use_all():
    """The last row and column: the number that an independent run of the official collator gave."""
    official = viz.official_coverage((8, 8), 32, 40, torch.Generator().manual_seed(0))
    never = (official == 0).all(dim=0).view(8, 8)
    assert never.sum() == 15 and never[-1].all() and never[:, -1].all()
    context, targets = MultiBlockMasking((8, 8))(1280, torch.Generator().manual_seed(0)).maps(64)
    assert (context | targets.any(dim=1)).any(dim=0).all()


def test_official_truncation_starves_the_lower_rows():
    rows = viz.official_coverage((8, 8), 64, 20, torch.Generator().manual_seed(0))[0].view(8, 8).mean(dim=1)
    assert rows[0] > 3 * rows[4]


def test_nearest_finds_the_highest_cosine_whatever_the_length():
    gallery = torch.tensor([[1.0, 0.0], [0.0, 5.0], [3.0, 3.0]])
    assert viz.nearest(torch.tensor([[9.0, 8.0], [0.1, 1.0]]), gallery, 2).tolist() == [[2, 0], [1, 2]]


def test_a_predictor_that_knows_the_answer_has_rank_one(toy):
    """Stand in for the predictor with the true features: every patch is found at once, and the untrained one finds few."""
    model, _, images, masks = toy

    class Oracle(torch.nn.Module):
        def forward(self, context, masks):
            return model.targets(images[:4], masks)

    knowing = IJEPA(model.context_encoder, "16x1x2", model.masking)
    knowing.target_encoder, knowing.predictor = model.target_encoder, Oracle()
    labels = torch.arange(12)
    found = viz.retrieval(knowing, model.predictor, images[:4], labels[:4], masks, images[4:], labels[4:])
    assert found["trained"]["recall@1"] == 1.0 and found["trained"]["median_rank"] == 1
    assert found["untrained"]["recall@1"] < 0.5 and found["gallery_size"] == 12 * 36
    assert found["trained"]["class_agreement"] == 0.0  # the gallery has no image of the queries' classes


def test_patches_filled_from_true_features_and_a_gallery_with_the_image_itself_give_the_image_back(toy):
    model, pictures, images, masks = toy
    figure = viz.neighbours_figure(model, model.predictor, images[:4], pictures[:4], masks, images, pictures)
    original, context, *_, true, _ = [axes.images[0].get_array() for axes in figure.axes[:9]]
    shown = (context != 1).any(-1) | (torch.tensor(true) != 1).any(-1).numpy()
    assert shown.sum() > context[(context != 1).any(-1)].shape[0]
    assert abs(true[shown] - original[shown]).max() < 1e-6


def test_masks_are_drawn_where_they_are(toy):
    model, pictures, _, masks = toy
    figure = viz.mask_figure(pictures[:4], masks, (6, 6))
    context = torch.tensor(figure.axes[1].images[0].get_array())  # [H, W, 3]
    white = (context == 1).all(-1).view(6, 4, 6, 4).permute(0, 2, 1, 3).flatten(2).all(-1).flatten()  # [N]
    assert torch.equal(~white, masks.maps(36)[0][0])


def test_every_figure_of_a_run_is_written_and_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("shapes.COUNT", {"train": 64, "test": 400})
    monkeypatch.setattr("shapes.make.__defaults__", (64,))
    train.train(from_preset("shapes", encoder="16x1x2", predictor="8x1x2", batch_size=16, max_steps=2, device="cpu", out=str(tmp_path)))
    viz.main([str(tmp_path), "--images", "250"])
    names = {"masks", "coverage", "curves", "predictor_neighbours", "prediction_error", "tokens", "nearest_images", "tsne"}
    assert {path.stem for path in (tmp_path / "figures").glob("*.png")} == names  # no comparison: it was not evaluated
    printed = capsys.readouterr().out
    assert all(str(tmp_path / "figures" / name) in printed for name in names)
    assert set(json.loads((tmp_path / "figures" / "retrieval.json").read_text())) == {"gallery_size", "queries", "trained", "untrained"}
    with pytest.raises(UsageError, match="--images is 3"):
        viz.main([str(tmp_path), "--images", "3"])


def test_figures_are_figures(toy):
    model, pictures, images, _ = toy
    results = {"dataset": "x", "chance": 0.1, "features": {name: {"linear": 0.5, "knn": 0.4} for name in ("target", "random", "pixels")}}
    assert isinstance(viz.comparison_figure(results), Figure)
    assert isinstance(viz.token_figure(model.target_encoder, images, pictures), Figure)
