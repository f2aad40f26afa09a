"""Claims about the core's figures: what is drawn is what was computed, and every run gets some."""

import numpy as np
import pytest
import torch
from PIL import Image

import data
import predict_and_visualize as viz
import train
from config import UsageError, from_preset
from masking import MultiBlockMasking
from models import IJEPA, Encoder, Predictor, patchify
from support import plots


@pytest.fixture(scope="module")
def toy():
    """A model of 6 x 6 patches, 12 images as pictures and normalized, and masks of the first 4."""
    torch.manual_seed(0)
    encoder = Encoder(32, 2, 2, image_size=24, patch_size=4)
    model = IJEPA(encoder, Predictor(32, encoder.grid, 16, 1, 2)).eval()
    pictures = torch.rand(12, 3, 24, 24)
    masks = MultiBlockMasking((6, 6))(4, torch.Generator().manual_seed(2))
    return model, pictures, pictures * 2 - 1, masks


# --- pieces ---------------------------------------------------------------------------------------


def test_normalized_images_look_as_the_stored_ones():
    stored = torch.randint(0, 256, (5, 1, 8, 8), dtype=torch.uint8)
    dataset = data.ImageDataset("toys", stored, None, None, (0.4,), (0.2,))
    pictures = viz.rgb(viz.normalized(dataset, 8), dataset)
    assert pictures.shape == (5, 3, 8, 8) and (pictures - stored / 255).abs().max() < 1e-6


def test_patches_put_together_again_are_the_image():
    images = torch.rand(2, 3, 8, 12)
    assert torch.equal(viz.unpatchify(patchify(images, 4), (3, 8, 12), 4), images)


def test_nearest_finds_the_highest_cosine_whatever_the_length():
    rows = torch.tensor([[1.0, 0.0], [0.0, 5.0], [3.0, 3.0]])
    queries = torch.tensor([[9.0, 8.0], [0.1, 1.0]])
    assert viz.nearest(queries, rows, 2).tolist() == [[2, 0], [1, 2]]


def test_masks_are_drawn_where_they_are(toy):
    _, pictures, _, masks = toy
    figure = viz.mask_figure(pictures[:4], masks, (6, 6))
    context, targets = masks.maps(36)
    for axes, part in zip(figure.axes[1:6], (context[0], *targets[0])):
        shown = torch.tensor(axes.images[0].get_array())  # [H, W, 3]
        white = patchify((shown == 1).all(-1)[None, None], 4)[0].all(-1)  # [N]
        assert torch.equal(~white, part)


# --- what the predictor imagines ------------------------------------------------------------------


def test_true_features_and_a_gallery_with_the_image_itself_give_the_image_back(toy):
    model, pictures, images, masks = toy
    gallery = viz.make_gallery(model, images, pictures)
    columns = dict(viz.imagine(model, model.predictor, images[:4], pictures[:4], masks, gallery))
    context, targets = masks.maps(36)
    target, seen = (viz.to_pixels(part, (6, 6), 4)[:, None].expand(-1, 3, -1, -1)
                    for part in (targets.any(1), context))
    true = columns["true features"]
    assert torch.equal(true[target | seen], pictures[:4][target | seen])
    assert (true[~(target | seen)] == 1).all()  # neither seen nor predicted: white
    assert not torch.equal(columns["predicted"][target], pictures[:4][target])
    assert torch.equal(columns["predicted"][seen], pictures[:4][seen])


def test_a_predictor_that_knows_the_answer_fills_in_what_the_true_features_do(toy):
    model, pictures, images, masks = toy

    class Oracle(torch.nn.Module):
        def forward(self, context, masks):
            return model.make_targets(images[:4], masks)[0]

    gallery = viz.make_gallery(model, images[4:], pictures[4:])
    figure = viz.neighbors_figure(model, Oracle(), images[:4], pictures[:4], masks, gallery)
    assert [axes.get_title() for axes in figure.axes[:5]] == [
        "image", "context", "predicted", "true features", "untrained predictor"]
    predicted, true, oracle = (axes.images[0].get_array() for axes in figure.axes[2:5])
    assert np.array_equal(true, oracle) and not np.array_equal(true, predicted)


# --- curves and features --------------------------------------------------------------------------


def test_curves_leave_out_what_was_not_measured_and_skip_blanks():
    rows = [{"step": str(step), "loss": "0.5", "lr": "0.1", "target_std": "",
             "knn": "0.25" if step % 20 == 0 else ""} for step in range(0, 50, 10)]
    figure = viz.curves_figure(rows)
    titles = [axes.get_title().splitlines()[0] for axes in figure.axes]
    assert titles == ["loss", "kNN accuracy", "learning rate"]
    knn = figure.axes[1].lines[0]
    assert knn.get_xdata().tolist() == [0, 20, 40] and knn.get_ydata().tolist() == [0.25] * 3
    full = [{**row, "cosine": "0.8", "mean_cosine": "0.5"} for row in rows]
    lines = viz.curves_figure(full).axes[1].lines
    assert [line.get_label() for line in lines] == ["predictor", "mean of that place"]


def test_a_momentum_above_one_cannot_be_drawn_and_a_constant_one_is_not():
    rows = [{"step": str(step), "momentum": str(1 - 0.004 / 2**step), "weight_decay": "0.04"}
            for step in range(20)]
    (axes,) = viz.curves_figure(rows).axes
    assert axes.get_title().startswith("momentum") and axes.get_ylim()[1] == 1
    assert len(viz.curves_figure([{**row, "momentum": "1", "lr": "1"} for row in rows]).axes) == 1


def test_tsne_draws_every_image_and_says_how_often_the_nearest_has_its_class():
    x, labels = {"a": torch.randn(60, 8), "b": torch.eye(3)[torch.arange(60) % 3]}, torch.arange(60)
    figure = viz.tsne_figure(x, labels % 3, ["p", "q", "r"])
    assert [len(axes.collections[0].get_offsets()) for axes in figure.axes] == [60, 60]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["p", "q", "r"]
    unit = torch.nn.functional.normalize(x["a"], dim=1)
    nearest = (unit @ unit.T).fill_diagonal_(-1).argmax(1)
    share = ((nearest - labels) % 3 == 0).float().mean()
    titles = [axes.get_title().splitlines()[1] for axes in figure.axes]
    assert titles == [f"nearest image has the same class: {p:.0%}" for p in (share, 1)]


def test_ten_classes_have_a_color_and_a_marker_each_and_all_others_are_gray():
    figure = viz.tsne_figure({"a": torch.randn(60, 8)}, torch.arange(60) % 12,
                             [f"kind {k}" for k in range(12)])
    dots = figure.axes[0].collections[0]
    colors = [tuple(color) for color in dots.get_facecolors()]
    shapes = [path.vertices.tobytes() for path in dots.get_paths()]
    assert len(set(colors[:10])) == len(set(shapes[:10])) == 10
    assert colors[10] == colors[11] and len(set(colors[10])) == 2  # gray, and opaque
    assert colors[:12] == colors[12:24] and shapes[:12] == shapes[12:24]
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == [f"kind {k}" for k in range(10)] + ["2 other classes"]


@pytest.mark.parametrize("x", [torch.ones(5, 8), torch.rand(2, 8)], ids=["collapsed", "two images"])
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # PCA's shares of no variance
def test_tsne_bears_collapsed_features_and_two_images(x):
    figure = viz.tsne_figure({"a": x}, torch.zeros(len(x), dtype=torch.int64), ["p"])
    assert len(figure.axes[0].collections[0].get_offsets()) == len(x)


def test_names_are_shown_as_they_are(tmp_path):
    r"""Between two dollar signs matplotlib reads a formula; `$\x$` is none, and raises."""
    names = [r"$\x$", "_hidden", "US$ to C$"]
    x, labels = {r"$\y$": torch.randn(12, 8)}, torch.arange(12) % 3
    figure = viz.tsne_figure(x, labels, names, r"runs/$\z$")
    figure.savefig(tmp_path / "tsne.png")
    shown = [text.get_text() for text in figure.legends[0].get_texts()]
    assert [text.replace(r"\$", "$") for text in shown] == names
    plots.table([(r"$\x$", torch.rand(1, 3, 4, 4))])[0].savefig(tmp_path / "table.png")


# --- the figures of a run -------------------------------------------------------------------------

TINY = {"encoder": "16x1x2", "predictor": "8x1x2", "batch_size": 16, "max_steps": 2,
        "device": "cpu"}
PREDICTOR = {"masks", "predictor_neighbors"}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run of two steps on few shapes."""
    monkeypatch.setattr("support.shapes.COUNT", {"train": 64, "test": 64})
    monkeypatch.setattr("support.shapes.make.__defaults__", (64,))
    train.train(from_preset("shapes", **TINY, out=str(tmp_path / "run")))
    return tmp_path / "run"


def draw(folder, *flags):
    """The names of the figures that the command line writes."""
    viz.main([str(folder), "--device", "cpu", *flags])
    return {path.stem for path in (folder / "figures").glob("*.png")}


def test_every_figure_of_a_run_is_written_and_named(run, capsys):
    names = PREDICTOR | {"curves", "tsne"}
    assert draw(run) == names
    printed = capsys.readouterr().out
    assert all(f"{run / 'figures' / name}.png" in printed for name in names)
    assert "left out" not in printed


def test_the_untrained_predictor_is_the_one_the_run_began_with(run):
    before, _ = train.build(from_preset("shapes", **TINY))
    loaded = viz.load(viz.parse([str(run)], ""))
    assert all(map(torch.equal, loaded.untrained_predictor().parameters(),
                   before.predictor.parameters()))
    assert not all(map(torch.equal, loaded.model.predictor.parameters(),
                       before.predictor.parameters()))


def test_without_labels_and_rows_what_is_left_out_is_said(run, monkeypatch, capsys):
    load = data.load

    def unlabeled(*args):
        dataset = load(*args)
        dataset.labels = None
        return dataset

    monkeypatch.setattr(data, "load", unlabeled)
    (run / "metrics.csv").unlink()
    assert draw(run) == PREDICTOR
    printed = capsys.readouterr().out
    assert "left out tsne: the images of shapes have no labels" in printed
    assert "left out curves" in printed


class Plain(torch.nn.Module):
    """Any method that is no I-JEPA: it learns to answer 0."""

    def __init__(self, encoder):
        super().__init__()
        self.context_encoder = self.target_encoder = encoder

    def forward(self, images, labels):
        tokens = self.context_encoder(images)
        return type("Output", (), {"loss": tokens.square().mean(), "tokens": tokens})

    def update_target(self, momentum):
        pass


def test_a_run_that_predicts_no_features_gets_the_figures_of_its_encoder(tmp_path, monkeypatch,
                                                                         capsys):
    monkeypatch.setattr("support.shapes.COUNT", {"train": 64, "test": 64})
    monkeypatch.setattr("support.shapes.make.__defaults__", (64,))
    train.train(from_preset("shapes", **TINY, out=str(tmp_path)), Plain(Encoder(16, 1, 2, 24)))
    assert draw(tmp_path) == {"curves", "tsne"}
    assert "left out masks and predictor_neighbors: only I-JEPA" in capsys.readouterr().out


def test_three_images_of_one_class_are_enough(tmp_path):
    for split, n in (("train", 24), ("test", 3)):
        (tmp_path / split / r"$\x$").mkdir(parents=True)
        for i in range(n):
            pixels = np.random.default_rng(i).integers(0, 256, (24, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / split / r"$\x$" / f"{i}.png")
    train.train(from_preset("shapes", **TINY, dataset=str(tmp_path), out=str(tmp_path / "run")))
    assert draw(tmp_path / "run") == PREDICTOR | {"curves", "tsne"}


def test_data_without_a_test_split_shows_images_held_out(tmp_path, capsys):
    images = np.random.default_rng(0).integers(0, 256, (200, 24, 24, 3), dtype=np.uint8)
    for n, kind in ((200, "held out of training"), (40, "trained on")):
        np.savez(tmp_path / "toys.npz", train_images=images[:n])
        config = from_preset("shapes", dataset=str(tmp_path / "toys.npz"))
        shown = viz.images_to_show(config, "data").images
        held = train.hold_out(config, n)[1] if n == 200 else torch.arange(n)
        expected = torch.from_numpy(images[:n]).movedim(-1, 1)[held]
        assert torch.equal(shown, expected)
        assert f"images {kind}" in capsys.readouterr().out


def test_one_image_is_refused(run):
    with pytest.raises(UsageError, match="--images is 1, expected 2 or more"):
        draw(run, "--images", "1")
