"""Claims about the figures: what they compute is right, what is drawn is what was computed, and a run gets all that its data allow."""

import csv
import json

import numpy as np
import pytest
import torch

from extras import figures
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


def evaluation(K=3):
    """What evaluation.json holds, of K classes: the target encoder gets class k right k times in K, and says class 0 otherwise."""
    right = np.arange(1, K + 1) * 10
    confusion = np.diag(right)
    confusion[:, 0] += 10 * K - right
    scores = {name: {"linear": 0.5, "knn": 0.4, "per_class": (right / (10 * K)).tolist(), "confusion": confusion.tolist()}
              for name in ("target", "context", "random", "pixels")}
    gains = {"target": 0.1, "random": 0.0, "pixels": 0.05}
    curves = {name: {"mean": [0.2 + gain, 0.4 + gain], "std": [0.1, 0.05]} for name, gain in gains.items()}
    return {"dataset": "toys", "chance": 1 / K, "class_names": [f"kind {k}" for k in range(K)], "features": scores,
            "low_shot": {"per_class": [2, 10], "full": 500, "scores": curves}}


def test_the_official_rules_never_use_15_of_64_cells_and_ours_use_all():
    """The last row and column: the number that an independent run of the official collator gave."""
    official = figures.official_coverage((8, 8), 32, 40, torch.Generator().manual_seed(0))
    never = (official == 0).all(dim=0).view(8, 8)
    assert never.sum() == 15 and never[-1].all() and never[:, -1].all()
    context, targets = MultiBlockMasking((8, 8))(1280, torch.Generator().manual_seed(0)).maps(64)
    assert (context | targets.any(dim=1)).any(dim=0).all()


def test_official_truncation_starves_the_lower_rows():
    rows = figures.official_coverage((8, 8), 64, 20, torch.Generator().manual_seed(0))[0].view(8, 8).mean(dim=1)
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
    figure = viz.neighbours_figure(model, model.predictor, images[:4], pictures[:4], masks, viz.make_gallery(model, images, pictures))
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


def test_a_sliding_block_visits_every_place_once_and_its_context_is_all_the_rest():
    context, targets = viz.slide((5, 4), (2, 3)).maps(20)
    assert targets.shape == (4 * 2, 1, 20) and torch.equal(context, ~targets[:, 0])
    assert targets[3, 0].view(5, 4).nonzero().tolist() == [[row, column] for row in (1, 2) for column in (1, 2, 3)]
    assert len(targets[:, 0].unique(dim=0)) == 8


def test_only_the_framed_block_of_a_moving_block_figure_is_filled_and_the_error_lies_at_its_centre(toy):
    model, pictures, images, _ = toy
    gallery = viz.make_gallery(model, images[2:], pictures[2:])
    figure = viz.moving_block_figure(model, images[:2], pictures[:2], gallery, sides=(2, 3), places=4)
    original, *places, error = figure.axes[:6]
    for column, axes in enumerate(places):  # a block 3 wide has 4 places in 6 columns; the middle one of 5 rows is row 2
        changed = (axes.images[0].get_array() != original.images[0].get_array()).any(-1)  # [H, W]
        rows, columns = np.nonzero(changed)
        assert (rows.min(), rows.max() + 1, columns.min(), columns.max() + 1) == (8, 16, 4 * column, 4 * column + 12)
        assert axes.patches[0].get_bbox().bounds == (4 * column - 0.5, 7.5, 12, 8)
    heat = error.images[-1]
    assert heat.get_array().shape == (5, 4) and heat.get_extent() == [3.5, 19.5, 21.5, 1.5]


def test_attention_weights_sum_to_one_and_give_what_the_attention_module_gives(toy):
    model, _, images, _ = toy
    seen = {}
    attention = model.target_encoder.blocks[-1].attention
    hook = attention.register_forward_hook(lambda module, inputs, output: seen.update(x=inputs[0], output=output))
    weights = viz.attention_weights(model.target_encoder, images)
    hook.remove()
    assert weights.shape == (12, 2, 36, 36) and torch.allclose(weights.sum(-1), torch.ones(12, 2, 36))
    v = attention.qkv(seen["x"]).chunk(3, dim=-1)[2].unflatten(-1, (2, -1)).transpose(1, 2)  # [B, nh, N, D/nh]
    assert (attention.project((weights @ v).transpose(1, 2).flatten(2)) - seen["output"]).abs().max() < 1e-5


def test_attention_is_drawn_for_the_patch_that_is_framed(toy):
    model, pictures, images, _ = toy
    figure = viz.attention_figure(model.target_encoder, images[:2], pictures[:2], queries=[8, 27])
    weights = 36 * viz.attention_weights(model.target_encoder, images[:2]).mean(1)  # [B, N, N]
    picture, mean, first, second = figure.axes[:4]
    assert np.allclose(mean.images[0].get_array(), weights[0].mean(0).view(6, 6))
    assert np.allclose(second.images[0].get_array(), weights[0, 27].view(6, 6))
    assert second.patches[0].get_xy() == (2.5, 3.5) and picture.patches[1].get_xy() == (11.5, 15.5)  # patch 27: row 4, column 3


def titles(figure):
    return [axes.get_title().splitlines()[0] for axes in figure.axes]


def test_curves_leave_out_what_was_not_measured_and_draw_blanks_as_gaps():
    rows = [{"step": str(step), "loss": "0.5", "lr": "0.1", "target_std": "", "knn": "0.25" if step % 20 == 0 else ""}
            for step in range(0, 50, 10)]
    figure = figures.curves_figure(rows)
    assert titles(figure) == ["loss", "kNN accuracy, %", "learning rate"]
    knn = figure.axes[1].lines[0]
    assert knn.get_xdata().tolist() == [0, 20, 40] and knn.get_ydata().tolist() == [25, 25, 25]
    full = [{**row, "held_out_loss": "0.6", "mean_loss": "0.9"} for row in rows]
    assert [line.get_label() for line in figures.curves_figure(full).axes[0].lines] == ["training", "held out", "mean of that place"]


def test_confusion_is_in_percent_of_the_true_class_and_the_worst_is_named():
    axes = figures.confusion_figure(evaluation()).axes[0]
    hits, wrong = (image.get_array().filled(0) for image in axes.images)
    assert np.allclose((hits + wrong).sum(1), 100) and np.allclose(hits.diagonal(), [100, 200 / 3, 100])
    assert [text.get_text() for text in axes.texts] == ["100", "33", "67", "100"]  # row by row; zeros are not written
    assert "largest confusions: kind 1 as kind 0 33%" in axes.figure.get_suptitle()
    assert "as" not in axes.figure.get_suptitle().split("kind 1 as kind 0 33%")[1]  # there is only one


def test_classes_without_test_images_do_not_break_the_confusion():
    results = evaluation()
    results["features"]["target"]["confusion"][1] = [0, 0, 0]
    assert "largest confusions: none" in figures.confusion_figure(results).axes[0].figure.get_suptitle()


def test_classes_are_sorted_by_the_target_encoder_and_of_many_only_the_ends_are_shown():
    axes = figures.per_class_figure(evaluation(40)).axes[0]
    names = [label.get_text() for label in axes.get_xticklabels()]
    assert names == [f"kind {k}" for k in (*range(39, 24, -1), *range(14, -1, -1))]
    bars = axes.containers[0]
    assert len(axes.containers) == 3 and np.allclose([bar.get_height() for bar in bars], [2.5 * (int(name[5:]) + 1) for name in names])


def test_the_low_shot_curve_plots_the_means_and_marks_one_and_ten_percent():
    axes = figures.low_shot_figure(evaluation()).axes[0]
    assert [line.get_label() for line in axes.lines[:3]] == ["target encoder", "random encoder", "raw pixels"]
    assert np.allclose([line.get_ydata() for line in axes.lines[:3]], [[30, 50], [20, 40], [25, 45]])
    assert [text.get_text() for text in axes.texts] == ["1% of all", "10% of all"]
    assert [line.get_xdata()[0] for line in axes.lines[3:5]] == [5, 50]
    band = axes.collections[0].get_paths()[0].vertices  # [points, 2]
    assert band[:, 1].min() == pytest.approx(20) and band[:, 1].max() == pytest.approx(55)
    unknown = evaluation()
    unknown["low_shot"]["full"] = None
    assert not figures.low_shot_figure(unknown).axes[0].texts


def test_bars_of_the_comparison_are_the_accuracies_and_features_unknown_here_keep_their_name():
    results = evaluation()
    results["features"]["other"] = {"linear": 0.7, "knn": 0.6}
    axes = figures.comparison_figure(results).axes[0]
    assert [bar.get_height() for bar in axes.containers[0]] == pytest.approx([50, 50, 50, 50, 70])
    assert [label.get_text() for label in axes.get_xticklabels()][2:] == ["random encoder", "raw pixels", "other"]


def test_tsne_draws_every_image_and_names_no_more_classes_than_there_are_colours():
    x, labels = {"a": torch.randn(60, 8), "b": torch.randn(60, 70)}, torch.arange(60) % 12
    figure = figures.tsne_figure(x, labels, [str(k) for k in range(12)])
    assert [len(axes.collections[0].get_offsets()) for axes in figure.axes] == [60, 60] and not figure.legends
    named = figures.tsne_figure({"a": x["a"]}, labels % 3, ["p", "q", "r"])
    assert [text.get_text() for text in named.legends[0].get_texts()] == ["p", "q", "r"]


# ---- the figures of a run


@pytest.fixture
def run_folder(tmp_path, monkeypatch):
    """A run of two steps on few shapes."""
    monkeypatch.setattr("support.shapes.COUNT", {"train": 64, "test": 400})
    monkeypatch.setattr("support.shapes.make.__defaults__", (64,))
    train.train(from_preset("shapes", encoder="16x1x2", predictor="8x1x2", batch_size=16, max_steps=2, device="cpu", out=str(tmp_path)))
    return tmp_path


ALWAYS = {
    "masks", "coverage", "curves", "predictor_neighbours", "moving_block", "prediction_error", "tokens", "attention", "nearest_images"}
EVALUATED = {"comparison", "confusion", "per_class", "low_shot"}


def draw(folder):
    """The names of the figures that the command line writes."""
    viz.main([str(folder), "--images", "250", "--tsne-images", "100"])
    return {path.stem for path in (folder / "figures").glob("*.png")}


def test_every_figure_of_a_run_is_written_and_named(run_folder, capsys):
    (run_folder / "evaluation.json").write_text(json.dumps(evaluation()))
    names = ALWAYS | EVALUATED | {"tsne"}
    assert draw(run_folder) == names
    printed = capsys.readouterr().out
    assert all(f"{run_folder / 'figures' / name}.png" in printed for name in names) and "left out" not in printed
    assert set(json.loads((run_folder / "figures" / "retrieval.json").read_text())) == {"gallery_size", "queries", "trained", "untrained"}


def test_what_an_evaluation_lacks_is_said_in_one_line_with_the_command(run_folder, capsys):
    """Not evaluated yet, and evaluated before there were confusions and low-shot curves."""
    run, path = viz.load(viz.arguments([str(run_folder)])), run_folder / "evaluation.json"
    capsys.readouterr()
    assert set(dict(viz.recorded_figures(run))) == {"curves"}
    assert capsys.readouterr().out == (f"left out comparison, confusion, per_class, low_shot: {path} is not there; "
                                       f"run python evaluate.py {run_folder}\n")
    old = evaluation()
    old["features"] = {name: {"linear": score["linear"], "knn": score["knn"]} for name, score in old["features"].items()}
    del old["low_shot"]
    path.write_text(json.dumps(old))
    assert set(dict(viz.recorded_figures(run))) == {"curves", "comparison"}
    assert capsys.readouterr().out == (f"left out confusion, per_class, low_shot: {path} does not hold them; "
                                       f"run python evaluate.py {run_folder}\n")


def test_a_run_without_labels_gets_all_figures_that_need_none(run_folder, monkeypatch, capsys):
    load = viz.data.load

    def unlabelled(*args):
        dataset = load(*args)
        dataset.labels = None
        return dataset

    monkeypatch.setattr(viz.data, "load", unlabelled)
    (run_folder / "metrics.csv").write_text(",".join(csv.DictReader(open(run_folder / "metrics.csv")).fieldnames) + "\n")
    assert draw(run_folder) == ALWAYS - {"curves"}
    printed = capsys.readouterr().out
    assert "left out tsne" in printed and "--dataset NAME" in printed and "left out curves" in printed
    assert "class_agreement" not in printed


def test_too_few_images_are_refused(tmp_path):
    with pytest.raises(UsageError, match="--images is 3"):
        viz.main([str(tmp_path), "--images", "3"])
    with pytest.raises(UsageError, match="--tsne-images is 30"):
        viz.main([str(tmp_path), "--tsne-images", "30"])
