"""Claims about the measures of collapse: each gives the number it should where that is known, and a run says so when it collapses."""

import csv

import pytest
import torch
from torch import nn

import data
import diagnostics
from extras import methods
import train
from config import from_preset


@pytest.fixture(autouse=True)
def few_shapes(monkeypatch):
    monkeypatch.setattr("support.shapes.COUNT", {"train": 640, "test": 64})
    monkeypatch.setattr("support.shapes.make.__defaults__", (64,))


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_deviation_is_zero_for_an_encoder_that_ignores_the_image():
    """Features that depend on the place alone have collapsed, however different the places are."""
    model, images = methods.build(from_preset("shapes")), normal(8, 3, 24, 24)
    assert diagnostics.deviation(model.target_tokens(images)) > 0.5
    nn.init.zeros_(model.target_encoder.patch_embed.project.weight)
    assert diagnostics.deviation(model.target_tokens(images)) < 1e-5


def test_deviation_is_one_for_independent_layer_normed_tokens():
    tokens = nn.functional.layer_norm(normal(2000, 4, 64), (64,))
    assert diagnostics.deviation(tokens) == pytest.approx(1, abs=0.02)


def test_rankme_counts_directions_of_equal_strength():
    orthogonal = torch.linalg.qr(normal(100, 16))[0]  # [100, 16], 16 equal singular values
    assert diagnostics.rankme(orthogonal) == pytest.approx(16, rel=1e-3)
    assert diagnostics.rankme(orthogonal[:, :5] @ normal(5, 64).div(100) + 1) == pytest.approx(1, abs=0.1)  # hardly off their mean


def test_pairwise_cosine_is_the_mean_over_all_pairs():
    x = normal(7, 5) + 0.5
    pairs = [nn.functional.cosine_similarity(x[i], x[j], dim=0).item() for i in range(7) for j in range(7) if i != j]
    assert diagnostics.pairwise_cosine(x) == pytest.approx(sum(pairs) / len(pairs), abs=1e-6)


def test_lidar_counts_the_directions_that_tell_images_apart_and_not_those_that_tell_views_apart():
    """Four directions belong to the image, twelve, ten times as strong, to the view: RankMe sees the twelve, LiDAR the four."""
    views = torch.cat([normal(500, 1, 4).expand(-1, 8, -1), 10 * normal(500, 8, 12, seed=1)], dim=2) + 0.01 * normal(500, 8, 16, seed=2)
    assert diagnostics.rankme(views.flatten(0, 1)) > 11
    assert 3.5 < diagnostics.lidar(views) < 4.5


class MeanTarget(nn.Module):
    """A predictor that ignores the context and answers the mean target of the place, given as [N, D]."""

    def __init__(self, mean):
        super().__init__()
        self.mean = mean

    def forward(self, context, masks):
        return self.mean[masks.targets]


def test_a_predictor_of_the_mean_target_scores_exactly_the_baseline():
    model, images = methods.build(from_preset("shapes")), normal(40, 3, 24, 24)
    _, targets, places = diagnostics.predictions(model.eval(), images, 16)
    model.train().predictor = MeanTarget(torch.stack([targets[places == place].mean(0) for place in range(36)]))
    found = diagnostics.measure(model, images, batch_size=16)
    assert found["held_out_loss"] == pytest.approx(found["mean_loss"]) and found["cosine"] == pytest.approx(found["mean_cosine"])
    assert model.training and "knn" not in found


def test_measuring_twice_gives_the_same_and_leaves_no_trace():
    model, images = methods.build(from_preset("shapes")), normal(40, 3, 24, 24)
    labels, state = torch.arange(40) % 4, torch.get_rng_state()
    first = diagnostics.measure(model, images, (images, labels, images, labels))
    assert first == diagnostics.measure(model, images, (images, labels, images, labels)) and set(first) == set(diagnostics.MEASURES)
    assert torch.equal(state, torch.get_rng_state())


def run(tmp_path, capsys, **changes):
    """60 steps of the default preset on 576 images: what it warned of, and its last row of metrics.csv as floats."""
    train.train(from_preset("shapes", device="cpu", epochs=15, held_out=64, measurements=4, out=str(tmp_path), **changes))
    rows = list(csv.DictReader(open(tmp_path / "metrics.csv")))
    return capsys.readouterr().err, {name: float(rows[-1][name]) for name in diagnostics.MEASURES}


def test_the_healthy_preset_is_not_warned_of(tmp_path, capsys):
    said, last = run(tmp_path, capsys)
    assert "warning" not in said and last["target_std"] > 0.7 and last["held_out_loss"] < last["mean_loss"]


@pytest.mark.parametrize("changes", (
    dict(stop_gradient=False),
    dict(stop_gradient=False, target_norm=False, momentum=0.0, momentum_final=0.0),
))
def test_without_stop_gradient_the_features_collapse_while_the_loss_falls_and_the_run_says_so(tmp_path, capsys, changes):
    said, last = run(tmp_path, capsys, **changes)
    assert last["target_std"] < 0.2 and last["held_out_loss"] < 0.05  # a loss that a healthy run never reaches
    assert said.count("hardly differ") == 1 and "lower --lr" in said  # once, though it stays collapsed


def test_a_target_that_never_moves_is_learnt_but_a_dead_predictor_is_noticed():
    model, images = methods.build(from_preset("shapes")), normal(40, 3, 24, 24)
    watch = diagnostics.Monitor(images)
    _, early = watch(model, 0.0)
    _, late = watch(model, 0.5)
    assert not early and len(late) == 1 and "no better than the mean target" in late[0]  # the predictor is still untrained
    assert watch(model, 0.9)[1] == []  # said once


def test_small_data_sets_are_not_split_and_larger_ones_never_train_on_what_is_held_out():
    assert len(train.hold_out(from_preset("shapes"), 200)[1]) == 0
    kept, held = train.hold_out(from_preset("shapes"), 4000)
    assert len(held) == 400 and torch.equal(torch.cat([kept, held]).sort().values, torch.arange(4000))


def test_unlabelled_images_are_watched_by_knn_on_the_labelled_split_of_their_data_set(monkeypatch):
    """STL-10: 100,000 images without labels, and 5,000 with. A folder without labels has no such split and gets no kNN."""
    def load(name, split, *_):
        labels = torch.arange(2000) % 10 if split == "train" else None
        return data.ImageDataset(name, torch.zeros(2000, 3, 24, 24, dtype=torch.uint8), labels, None, (0.5,) * 3, (0.25,) * 3)

    monkeypatch.setattr(data, "load", load)
    config = from_preset("shapes")
    watch = train.monitor(config, load("stl10", "unlabeled"), torch.device("cpu"))
    bank, bank_labels, queries, labels = watch.labelled
    assert len(watch.images) == 200 and len(bank) == len(bank_labels) == 1000 and len(queries) == len(labels) == 500
    assert train.monitor(config, load("photos", "unlabeled"), torch.device("cpu")).labelled is None
    assert train.monitor(from_preset("shapes", measurements=0), load("stl10", "train"), torch.device("cpu")) is None
