"""Claims about the other figures: what they compute is right, what is drawn is what was computed,
and a run gets all that it allows."""

import base64
import json
import re

import numpy as np
import pytest
import torch

import data
import train
from config import UsageError, from_preset
from extras import charts, figures, mae
from masking import MultiBlockMasking
from models import IJEPA, Encoder, Predictor
from predict_and_visualize import make_gallery


@pytest.fixture(scope="module")
def toy():
    """A model of 6 x 6 patches, 12 images as pictures and normalized, and masks of the first 4."""
    torch.manual_seed(0)
    encoder = Encoder(32, 2, 2, image_size=24, patch_size=4)
    model = IJEPA(encoder, Predictor(32, encoder.grid, 16, 1, 2)).eval()
    pictures = torch.rand(12, 3, 24, 24)
    masks = MultiBlockMasking((6, 6))(4, torch.Generator().manual_seed(2))
    return model, pictures, pictures * 2 - 1, masks


def evaluation(K=3):
    """What evaluation.json holds, of K classes: the target encoder gets class k right k times in K,
    and says class 0 otherwise."""
    right = np.arange(1, K + 1) * 10
    confusion = np.diag(right)
    confusion[:, 0] += 10 * K - right
    scores = {name: {"linear": 0.5, "knn": 0.4, "per_class": (right / (10 * K)).tolist(),
                     "confusion": confusion.tolist()}
              for name in ("target", "context", "random", "pixels")}
    gains = {"target": 0.1, "random": 0.0, "pixels": 0.05}
    curves = {name: {"mean": [0.2 + gain, 0.4 + gain], "std": [0.1, 0.05]}
              for name, gain in gains.items()}
    return {"dataset": "toys", "chance": 1 / K, "class_names": [f"kind {k}" for k in range(K)],
            "features": scores, "low_shot": {"per_class": [2, 10], "full": 500, "scores": curves}}


# --- coverage -------------------------------------------------------------------------------------


def test_the_official_rules_never_use_15_of_64_cells_and_ours_use_all():
    """The last row and column: the number that the official collator itself gave."""
    official = figures.official_coverage((8, 8), 32, 40, torch.Generator().manual_seed(0))
    never = (official == 0).all(dim=0).view(8, 8)
    assert never.sum() == 15 and never[-1].all() and never[:, -1].all()
    context, targets = MultiBlockMasking((8, 8))(1280, torch.Generator().manual_seed(0)).maps(64)
    assert (context | targets.any(dim=1)).any(dim=0).all()


def test_official_truncation_starves_the_lower_rows():
    generator = torch.Generator().manual_seed(0)
    rows = figures.official_coverage((8, 8), 64, 20, generator)[0].view(8, 8).mean(dim=1)
    assert rows[0] > 3 * rows[4]


# --- what the predictor knows ---------------------------------------------------------------------


def test_a_predictor_that_knows_the_answer_has_rank_one(toy):
    """Every patch is found at once, and by an untrained predictor few."""
    model, _, images, masks = toy

    class Oracle(torch.nn.Module):
        def forward(self, context, masks):
            return model.make_targets(images[:4], masks)[0]

    knowing = IJEPA(model.context_encoder, Oracle())
    knowing.target_encoder = model.target_encoder
    labels = torch.arange(12)
    found = figures.retrieval(knowing, model.predictor, images[:4], labels[:4], masks, images[4:],
                              labels[4:])
    assert found["trained"]["recall@1"] == 1.0 and found["trained"]["median_rank"] == 1
    assert found["untrained"]["recall@1"] < 0.5 and found["gallery_size"] == 12 * 36
    # The gallery has no image of the queries' classes.
    assert found["trained"]["class_agreement"] == 0.0


def test_a_sliding_block_visits_every_place_once_and_its_context_is_all_the_rest():
    context, targets = figures.slide((5, 4), (2, 3)).maps(20)
    assert targets.shape == (4 * 2, 1, 20) and torch.equal(context, ~targets[:, 0])
    place = targets[3, 0].view(5, 4).nonzero().tolist()
    assert place == [[row, column] for row in (1, 2) for column in (1, 2, 3)]
    assert len(targets[:, 0].unique(dim=0)) == 8


def test_a_moving_block_is_filled_where_it_is_framed_and_below_from_the_true_features(toy):
    model, pictures, images, _ = toy
    figure = figures.moving_block_figure(model, images[:2], pictures[:2],
                                         make_gallery(model, images, pictures), sides=(2, 3))
    original, *places = (axes.images[0].get_array() for axes in figure.axes[:5])
    # A block 3 wide has 4 places in 6 columns; the middle one of its 5 rows is row 2.
    for column, shown in enumerate(places):
        rows, columns = np.nonzero((shown != original).any(-1))
        assert (rows.min(), rows.max() + 1) == (8, 16)
        assert (columns.min(), columns.max() + 1) == (4 * column, 4 * column + 12)
        (framed,) = figure.axes[column + 1].patches
        assert framed.get_bbox().bounds == (4 * column - 0.5, 7.5, 12, 8)
    assert [figure.axes[5 * row].get_ylabel() for row in range(4)] == [
        "predicted", "true features"] * 2
    # This gallery has the true patches.
    assert all(np.array_equal(axes.images[0].get_array(), original) for axes in figure.axes[5:10])


def test_the_error_of_a_patch_is_the_mean_over_the_blocks_that_hide_it(toy):
    model, pictures, images, _ = toy
    masking = MultiBlockMasking((6, 6))
    figure = figures.error_figure(model, masking, images[:2], pictures[:2],
                                  torch.Generator().manual_seed(3), draws=1)
    masks = masking(2, torch.Generator().manual_seed(3))
    output = model(images[:2], masks)
    total, count = torch.zeros(36), torch.zeros(36)
    for m in range(4):
        real = masks.targets_valid[0, m]
        places = masks.targets[0, m, real]
        predicted, true = output.predictions[0, m, real], output.targets[0, m, real]
        total[places] += 1 - torch.cosine_similarity(predicted, true, dim=-1).detach()
        count[places] += 1
    drawn = figure.axes[2].images[0].get_array()  # two columns: below the first image
    assert np.allclose(drawn, (total / count.clamp(min=1)).view(6, 6), atol=1e-6)
    errors = np.stack([axes.images[0].get_array().data for axes in figure.axes[2:4]])
    hardest = {(i, *place) for i, *place in np.argwhere(errors >= np.quantile(errors, 0.9))}
    framed = {(i, (box.get_y() + 0.5) / 4, (box.get_x() + 0.5) / 4)
              for i, axes in enumerate(figure.axes[:2]) for box in axes.patches}
    assert framed == hardest


def test_what_is_reconstructed_is_drawn_between_what_is_seen_and_the_image():
    torch.manual_seed(0)
    model, masking = mae.build(from_preset("shapes", encoder="16x1x2", predictor="8x1x2"))
    stored = torch.randint(0, 256, (2, 3, 24, 24), dtype=torch.uint8)
    dataset = data.ImageDataset("toys", stored, None, None, (0.5,) * 3, (0.25,) * 3)
    images, masks = data.normalize(stored, dataset.mean, dataset.std), masking(2)
    figure = figures.reconstruction_figure(model.eval(), images, masks, dataset)
    seen, answer, image = (axes.images[0].get_array() for axes in figure.axes[:3])
    context = figures.core.to_pixels(masks.maps(36)[0], (6, 6), 4)[0].numpy()  # [H, W]
    assert np.allclose(seen[~context], 0.5, atol=1e-6) and not np.allclose(answer[~context], 0.5)
    assert np.allclose(image, stored[0].movedim(0, -1) / 255, atol=1e-6)
    for part in (seen, answer):
        assert np.array_equal(part[context], image[context])


# --- what the encoder sees ------------------------------------------------------------------------


def test_attention_weights_sum_to_one_and_give_what_the_attention_module_gives(toy):
    model, _, images, _ = toy
    seen = {}
    attention = model.target_encoder.blocks[-1].attention
    hook = attention.register_forward_hook(
        lambda module, inputs, output: seen.update(x=inputs[0], output=output))
    weights = figures.attention_weights(model.target_encoder, images)
    hook.remove()
    assert weights.shape == (12, 2, 36, 36)
    assert torch.allclose(weights.sum(-1), torch.ones(12, 2, 36))
    v = attention.qkv(seen["x"]).chunk(3, dim=-1)[2].unflatten(-1, (2, -1)).transpose(1, 2)
    output = attention.project((weights @ v).transpose(1, 2).flatten(2))
    assert (output - seen["output"]).abs().max() < 1e-5


def test_attention_is_drawn_for_the_patch_that_is_framed(toy):
    model, pictures, images, _ = toy
    encoder = model.target_encoder
    figure = figures.attention_figure(encoder, images[:2], pictures[:2], queries=[8, 27])
    weights = 36 * figures.attention_weights(encoder, images[:2]).mean(1)  # [B, N, N]
    image, first, second = figure.axes[:3]
    assert np.allclose(first.images[0].get_array(), weights[0, 8].view(6, 6))
    assert np.allclose(second.images[0].get_array(), weights[0, 27].view(6, 6))
    assert second.patches[0].get_xy() == (2.5, 3.5)  # patch 27: row 4, column 3
    assert image.patches[1].get_xy() == (11.5, 15.5)


def test_tokens_that_know_only_their_place_have_the_same_colors_in_all_images():
    place, pictures = torch.randn(36, 8), torch.rand(2, 3, 24, 24)
    tokens = {"place": place.expand(9, 36, 8), "image": torch.randn(9, 1, 8).expand(9, 36, 8)}
    figure = figures.token_figure(tokens, (6, 6), pictures)
    first, second, *by_image = (axes.images[0].get_array() for axes in figure.axes[2:6])
    assert np.allclose(first, second, atol=1e-6) and first.std((0, 1)).min() > 0.1
    assert all(np.allclose(shown, shown[0, 0], atol=1e-6) for shown in by_image)
    labels = [figure.axes[row].get_ylabel() for row in (2, 4)]
    assert [label.split()[-1] for label in labels] == ["100%", "0%"]


def test_neighbors_of_the_query_s_class_are_framed():
    same = torch.tensor([[True, False, True], [False, False, True]])
    figure = figures.nearest_images_figure(torch.rand(2, 3, 4, 4), torch.rand(2, 3, 3, 4, 4), "",
                                           same)
    wide = [axes.spines["left"].get_linewidth() > 2 for axes in figure.axes]
    assert wide == [False, *same[0], False, *same[1]]


# --- charts ---------------------------------------------------------------------------------------


def test_confusion_is_in_percent_of_the_true_class_and_the_worst_is_named():
    axes = charts.confusion_figure(evaluation()).axes[0]
    hits, wrong = (image.get_array().filled(0) for image in axes.images)
    assert np.allclose((hits + wrong).sum(1), 100)
    assert np.allclose(hits.diagonal(), [100, 200 / 3, 100])
    # Row by row; zeros are not written.
    assert [text.get_text() for text in axes.texts] == ["100", "33", "67", "100"]
    title = axes.figure.get_suptitle()
    assert "Largest confusions: kind 1 as kind 0 33%" in title
    assert "as" not in title.split("kind 1 as kind 0 33%")[1]  # there is only one


def test_classes_without_test_images_do_not_break_the_confusion():
    results = evaluation()
    results["features"]["target"]["confusion"][1] = [0, 0, 0]
    title = charts.confusion_figure(results).get_suptitle()
    assert "Largest confusions: none" in title


def test_classes_are_sorted_by_the_target_encoder_and_of_many_only_the_ends_are_shown():
    axes = charts.per_class_figure(evaluation(40)).axes[0]
    names = [label.get_text() for label in axes.get_xticklabels()]
    assert names == [f"kind {k}" for k in (*range(39, 24, -1), *range(14, -1, -1))]
    heights = [bar.get_height() for bar in axes.containers[0]]
    assert len(axes.containers) == 3
    assert np.allclose(heights, [2.5 * (int(name[5:]) + 1) for name in names])


def test_the_low_shot_curve_plots_the_means_and_marks_one_and_ten_percent():
    axes = charts.low_shot_figure(evaluation()).axes[0]
    assert [line.get_label() for line in axes.lines[:3]] == ["target encoder", "untrained encoder",
                                                             "raw pixels"]
    assert np.allclose([line.get_ydata() for line in axes.lines[:3]],
                       [[30, 50], [20, 40], [25, 45]])
    assert [text.get_text() for text in axes.texts] == ["1% of all", "10% of all"]
    assert [line.get_xdata()[0] for line in axes.lines[3:5]] == [5, 50]
    band = axes.collections[0].get_paths()[0].vertices  # [points, 2]
    assert band[:, 1].min() == pytest.approx(20) and band[:, 1].max() == pytest.approx(55)


def test_bars_of_the_comparison_are_the_accuracies_and_a_line_is_the_untrained_encoder():
    results = evaluation()
    results["features"]["other"] = {"linear": 0.7, "knn": 0.6}
    results["features"]["random"] = {"linear": 0.3, "knn": 0.2}
    figure = charts.comparison_figure(results)
    for axes, expected in zip(figure.axes, ([50, 50, 30, 50, 70], [40, 40, 20, 40, 60])):
        assert [bar.get_width() for bar in axes.containers[0]] == pytest.approx(expected)
        assert axes.lines[0].get_xdata()[0] == pytest.approx(expected[2])
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert names[2:] == ["untrained encoder", "raw pixels", "other"]
    assert figure.axes[0].yaxis_inverted()  # the first on top


def test_ablations_are_differences_to_the_first_row_seed_by_seed():
    rows = {"as it is": [0.5, 0.7], "no stop-gradient": [0.1, 0.2], "one seed": [0.8],
            "another seed, too": [0.6, 0.6, 0.9]}
    rows = {name: {"runs": [{"seed": seed, "linear": value, "knn": value - 0.1}
                            for seed, value in enumerate(values)]} for name, values in rows.items()}
    figure = charts.ablations_figure(rows)
    for axes in figure.axes:
        dots = [line.get_xdata() for line in axes.lines[1:]]
        assert np.allclose(np.concatenate(dots), [-40, -50, 30, 10, -10])  # no third first row
        assert [bar.get_width() for bars in axes.containers for bar in bars] == pytest.approx(
            [-45, 30, 0])
        assert [text.get_text() for text in axes.texts] == ["-45.0", "+30.0", "+0.0"]
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert names == list(rows)[1:] and "as it is (60.0%)" in figure.axes[0].get_xlabel()


def test_the_diagram_fades_all_parts_but_those_named_and_changes_no_other_picture_on_its_page():
    whole, part = (figures.Diagram(*parts).text for parts in ((), ("loss", "targets")))
    ids, faded = (set(re.findall(r'<g class="part" id="([\w-]+)"' + end, part))
                  for end in ("", ' opacity="0.25"'))
    assert faded == ids - {"loss", "targets"} and len(ids) == 12
    assert whole == figures.Diagram.FILE.read_text("utf-8") == part.replace(' opacity="0.25"', "")
    style = re.search("<style>(.*)</style>", whole, re.S)[1]
    rules = re.findall(r"(?:^|[{}])\s*([^{}@]+?)\s*\{", style)
    assert len(rules) > 10 and all(rule.startswith(".ijepa") for rule in rules)
    assert "<script" not in whole and len(whole) < 10_000
    with pytest.raises(UsageError, match="predictor"):
        figures.Diagram("predicter")


def test_a_notebook_shows_the_diagram_as_an_image_with_a_text_for_those_who_cannot_see_it():
    diagram = figures.Diagram("loss")
    alt, data = re.fullmatch(
        r'<img alt="([^"]+)" width="\d+" src="data:image/svg\+xml;base64,(.+)">',
        diagram._repr_html_()).groups()
    assert alt == "diagram of I-JEPA: loss" and base64.b64decode(data).decode() == diagram.text


def test_names_of_classes_are_shown_as_they_are(tmp_path):
    r"""Between two dollar signs matplotlib reads a formula; `$\x$` is none, and raises."""
    results = evaluation()
    results["class_names"], results["dataset"] = [r"$\x$", "_b", "US$ to C$"], r"$\y$"
    for draw in (charts.confusion_figure, charts.per_class_figure, charts.comparison_figure):
        figure = draw(results)
        figure.savefig(tmp_path / "figure.png")
        shown = [label.get_text().replace(r"\$", "$") for label in figure.axes[0].get_xticklabels()]
        assert set(shown) == set(results["class_names"]) or draw is charts.comparison_figure
        assert r"\$\y\$" in figure.get_suptitle() and r"\\" not in figure.get_suptitle()


# --- the figures of a run -------------------------------------------------------------------------

TINY = {"encoder": "16x1x2", "predictor": "8x1x2", "batch_size": 16, "max_steps": 2,
        "device": "cpu"}
ENCODER = {"tsne", "tokens", "attention", "nearest_images"}
PREDICTOR = {"masks", "coverage", "predictor_neighbors", "moving_block", "prediction_error"}
EVALUATED = {"comparison", "confusion", "per_class", "low_shot"}


@pytest.fixture(autouse=True)
def few_shapes(monkeypatch):
    monkeypatch.setattr("support.shapes.COUNT", {"train": 64, "test": 64})
    monkeypatch.setattr("support.shapes.make.__defaults__", (64,))


@pytest.fixture
def run(tmp_path):
    """A run of two steps on few shapes."""
    train.train(from_preset("shapes", **TINY, out=str(tmp_path)))
    return tmp_path


def draw(folder, *flags):
    """The names of the figures that the command line writes."""
    figures.main([str(folder), "--device", "cpu", *flags])
    return {path.stem for path in (folder / "figures").glob("*.png")}


def test_every_figure_of_a_run_is_written_and_named(run, capsys):
    (run / "evaluation.json").write_text(json.dumps(evaluation()))
    names = PREDICTOR | ENCODER | EVALUATED | {"curves"}
    assert draw(run) == names
    printed = capsys.readouterr().out
    assert all(f"{run / 'figures' / name}.png" in printed for name in names)
    assert "left out" not in printed
    found = json.loads((run / "figures" / "retrieval.json").read_text())
    assert set(found) == {"gallery_size", "queries", "trained", "untrained"}


def test_what_is_left_out_is_said_and_a_few_images_are_enough(run, capsys):
    assert draw(run, "--images", "3") == PREDICTOR | ENCODER | {"curves"}
    printed = capsys.readouterr().out
    assert f"comparison, confusion and per_class: first run python evaluate.py {run}\n" in printed
    assert f"left out low_shot: first run python -m extras.probes {run}\n" in printed


def test_a_masked_autoencoder_is_drawn_with_what_it_reconstructs(tmp_path, capsys):
    config = from_preset("shapes", **TINY, out=str(tmp_path))
    train.train(config, *mae.build(config), program=f"{mae.PROGRAM} 0.75")
    assert draw(tmp_path) == ENCODER | {"curves", "reconstruction"}
    printed = capsys.readouterr().out
    assert "only I-JEPA predicts features" in printed and all(name in printed for name in PREDICTOR)
