"""Claims about few images, odd class names and odd sizes: a figure or one line, no traceback."""

import json
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
import predict_and_visualize as core
import train
from config import UsageError
from extras import charts, figures, mae
from masking import MultiBlockMasking
from models import IJEPA, Encoder, Predictor

ODD = ["$5 and $10", "$$", "x$\\frac$", "_hidden", "a_b^c", "{a}", "100%", "日本", "猫", "",
       "bad \udcff bytes", "two\nlines"]


def refused(match, function, *arguments, **settings):
    """The function raises UsageError with these words, in one line."""
    with pytest.raises(UsageError, match=match) as error:
        function(*arguments, **settings)
    assert "\n" not in str(error.value)


def results_of(names):
    """What evaluation.json holds for classes of these names, made up."""
    K = len(names)
    score = {"linear": 0.5, "knn": 0.4, "per_class": [0.5] * K,
             "confusion": (np.ones((K, K), int) + np.eye(K, dtype=int)).tolist()}
    return {"dataset": "_$odd_$", "class_names": names, "chance": 1 / K,
            "config": {"out": "runs/$_a^$"}, "features": {
                name: score for name in ("target", "random", "pixels")}}


# --- class names ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ODD, ids=ascii)
def test_every_figure_with_names_is_drawn_and_says_what_the_font_lacks_in_one_line(
        name, tmp_path, capsys):
    results, features = results_of([name, "b"]), {name: torch.randn(12, 8)}
    row = {"runs": [{"seed": 0, "linear": 0.5, "knn": 0.4}]}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for figure in (core.tsne_figure(features, torch.arange(12) % 2, [name, "b"], name),
                       charts.comparison_figure(results), charts.confusion_figure(results),
                       charts.per_class_figure(results),
                       charts.ablations_figure({name: row, f"{name}, too": row}, name)):
            core.save_figure(figure, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 1000
    printed = capsys.readouterr().out.splitlines()
    assert all("the font lacks" in line and "font.family" in line for line in printed)
    assert bool(printed) == (name in ("日本", "猫"))


def test_a_legend_shows_names_that_begin_with_an_underscore():
    figure = core.tsne_figure({"x": torch.randn(9, 4)}, torch.arange(9) % 2, ["_hidden", "$5"])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["_hidden", r"\$5"]


def test_classes_without_a_name_are_numbered():
    results = {**results_of(["a", "b", "c"]), "class_names": ["a", "b"]}
    assert charts.class_names(results, 3) == ["a", "b", "2"]
    charts.confusion_figure(results)
    charts.per_class_figure(results)


@pytest.mark.parametrize("draw", [charts.comparison_figure, charts.confusion_figure,
                                  charts.per_class_figure])
def test_one_class_is_drawn(draw, tmp_path):
    core.save_figure(draw(results_of(["only"])), tmp_path / "figure.png")


# --- few images -----------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 3, 4, 5])
@pytest.mark.parametrize("alike", [False, True])
def test_tsne_of_few_images_places_each_at_finite_coordinates(n, alike):
    x = torch.ones(n, 8) if alike else torch.randn(n, 8, generator=torch.Generator().manual_seed(n))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="invalid value", category=RuntimeWarning)
        figure = core.tsne_figure({"x": x}, torch.zeros(n, dtype=torch.int64), ["only"])
    places = figure.axes[0].collections[0].get_offsets()
    assert places.shape == (n, 2) and np.isfinite(places).all()


def test_tsne_of_one_image_is_refused():
    refused("t-SNE .* needs two or more, got 1", core.tsne_figure, {"x": torch.randn(1, 8)},
            torch.zeros(1, dtype=torch.int64), ["only"])


@pytest.fixture
def run_of(tmp_path):
    """A function from images a class of the training and the test split to a trained run."""

    def make(*per_class, names=("$5 note", "_日本")):
        rng = np.random.default_rng(0)
        for split, n in zip(("train", "test"), per_class):
            for label, name in enumerate(names):
                folder = tmp_path / "_$images" / split / name
                folder.mkdir(parents=True)
                for i in range(n):
                    pixels = rng.integers(0, 60, (16, 16, 3)) + 150 * (label % 2)
                    Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
        out = tmp_path / "run_$1_$2"
        train.main([
            "--dataset", str(tmp_path / "_$images"), "--out", str(out), "--image-size", "16",
            "--encoder", "16x1x2", "--predictor", "16x1x2", "--device", "cpu", "--max-steps", "2",
            "--batch-size", str(min(4, len(names) * per_class[0]))])
        return out

    return make


def test_few_images_of_odd_names_are_evaluated_and_drawn(run_of, capsys):
    out = run_of(2, 1)
    evaluate.main([str(out)])
    found = json.loads((out / "evaluation.json").read_text(), parse_constant=pytest.fail)  # no NaN
    assert found["class_names"] == ["$5 note", "_日本"]
    figures.main([str(out)])  # the core's figures and all others
    drawn = {path.stem for path in (out / "figures").glob("*.png")}
    assert drawn >= {"masks", "predictor_neighbors", "curves", "tsne", "tokens", "attention",
                     "nearest_images", "comparison", "confusion", "per_class", "moving_block"}
    assert "Glyph" not in capsys.readouterr().err


def test_too_few_images_and_one_class_are_refused_by_the_probe(run_of):
    out = run_of(1, 2)
    refused("two classes and two images of one of them", evaluate.main, [str(out)])
    refused("needs two test images or more, .* has 1", evaluate.main,
            [str(out), "--test-images", "1"])


@pytest.mark.parametrize("per_class", [(2, 2), (4, 3)], ids=str)
def test_one_class_is_refused_by_the_probe_and_drawn_by_the_figures(run_of, per_class):
    out = run_of(*per_class, names=("only",))
    refused("two classes and two images", evaluate.main, [str(out)])
    core.main([str(out)])
    assert (out / "figures" / "tsne.png").exists()


def test_one_image_is_refused_by_the_figures(run_of):
    out = run_of(4, 1, names=("only",))
    refused("needs? two", core.main, [str(out)])


# --- what the command line refuses, the classes refuse --------------------------------------------


@pytest.mark.parametrize("settings", [
    {"num_targets": 0}, {"num_targets": 197}, {"target_scale": (0.5, 0.3)},
    {"target_scale": (-0.1, 0.3)}, {"target_scale": (float("nan"), 0.2)},
    {"target_scale": (0.5, 1.5)}, {"target_aspect": (2.0, 1.0)}, {"target_aspect": (0.0, 0.0)},
    {"context_scale": (0.0, 0.5)}, {"context_scale": (1.0, 2.0)}, {"min_keep": 0},
    {"context_size": -1}, {"context_size": 190}], ids=str)
def test_masks_that_cannot_be_drawn_are_refused(settings):
    refused("--|largest target block", MultiBlockMasking, (14, 14), **settings)


@pytest.mark.parametrize("hidden", [0, 1, -1, 2, 0.001])
def test_a_ratio_that_hides_nothing_or_all_is_refused(hidden):
    refused("mask-ratio is", mae.RandomMasking, (6, 6), hidden)


def test_an_unknown_loss_is_refused():
    encoder = Encoder(16, 1, 2, 8, 4)
    for loss in ("l1", "L2", "", None):
        refused("loss is .*, expected one of smooth_l1, l2", IJEPA, encoder,
                Predictor(16, encoder.grid, 16, 1, 2), loss)


@pytest.mark.parametrize("size", [(30, 1, 4), (18, 1, 2), (0, 1, 1), (16, 0, 1), (16, 1, 0),
                                  (-16, 1, 2), (16, 1.5, 2)], ids=str)
def test_sizes_without_whole_heads_are_refused(size):
    refused("--encoder is", Encoder, *size)
    refused("--predictor is", Predictor, 16, (4, 4), *size)


@pytest.mark.parametrize("image_size, patch_size", [
    (16, 5), (16, 0), (16, -4), (0, 4), (-16, 4), ((16, 0), 4)], ids=str)
def test_patches_that_do_not_divide_the_image_are_refused(image_size, patch_size):
    refused("do not divide an image", Encoder, 16, 1, 2, image_size, patch_size)
