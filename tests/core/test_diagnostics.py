"""Claims about the measures of collapse: right where the answer is known, reported in time."""

import csv

import pytest
import torch
from torch import nn

import data
import diagnostics
import train
from config import from_preset
from models import IJEPA



@pytest.fixture(autouse=True)
def few_shapes(monkeypatch):
    monkeypatch.setattr("support.shapes.COUNT", {"train": 640, "test": 64})
    monkeypatch.setattr("support.shapes.make.__defaults__", (64,))


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_deviation_is_zero_for_an_encoder_that_ignores_the_image():
    """Features that depend on the place alone have collapsed, however different the places are."""
    model, _ = train.build(from_preset("shapes"))

    def deviation():
        tokens = model.target_encoder(normal(8, 3, 24, 24))
        return diagnostics.deviation(nn.functional.layer_norm(tokens, tokens.shape[-1:]))

    assert deviation() > 0.5
    nn.init.zeros_(model.target_encoder.patch_embed.project.weight)
    assert deviation() < 1e-5


def test_deviation_is_one_for_independent_layer_normed_tokens():
    tokens = nn.functional.layer_norm(normal(2000, 4, 64), (64,))
    assert diagnostics.deviation(tokens) == pytest.approx(1, abs=0.02)


def test_rankme_counts_directions_of_equal_strength():
    orthogonal = torch.linalg.qr(normal(100, 16))[0]  # [100, 16], 16 equal singular values
    assert diagnostics.rankme(orthogonal) == pytest.approx(16, rel=1e-3)
    assert diagnostics.rankme(torch.ones(500, 768)) == pytest.approx(1, abs=0.01)  # float32's rank
    hardly_off_their_mean = orthogonal[:, :5] @ normal(5, 64).div(100) + 1
    assert diagnostics.rankme(hardly_off_their_mean) == pytest.approx(1, abs=0.1)


def test_knn_by_hand():
    """Two neighbors at cosine .6 outvote one at .7, unless the temperature is low."""
    bank = torch.tensor([[0.6, 0.8], [0.6, -0.8], [0.7, 0.51**0.5]])
    labels, query = torch.tensor([0, 0, 1]), torch.tensor([[1.0, 0.0]])
    assert diagnostics.knn(bank, labels, query, torch.tensor([0]), k=3, temperature=1.0) == 1.0
    assert diagnostics.knn(bank, labels, query, torch.tensor([1]), k=1) == 1.0
    assert diagnostics.knn(bank, labels, query, torch.tensor([1]), k=3, temperature=0.01) == 1.0


class MeanTarget(nn.Module):
    """A predictor that ignores the context and answers a direction for each place, [N, D]."""

    def __init__(self, mean):
        super().__init__()
        self.mean = mean

    def forward(self, context, masks):
        return self.mean[masks.targets]


def test_a_predictor_of_the_mean_target_scores_exactly_the_baseline():
    model, masking = train.build(from_preset("shapes"))
    images, total = normal(40, 3, 24, 24), torch.zeros(36, 64)
    generator = torch.Generator().manual_seed(0)
    for part in images.split(128):
        masks = masking(len(part), generator)
        targets, real = model.make_targets(part, masks)[0], masks.targets_valid
        total.index_add_(0, masks.targets[real], targets[real])
    model.train().predictor = MeanTarget(total)
    found = diagnostics.measure(model, masking, images)
    assert found["cosine"] == pytest.approx(found["mean_cosine"], abs=1e-6)
    assert model.training and "knn" not in found


def test_measuring_twice_gives_the_same_and_leaves_no_trace():
    model, masking = train.build(from_preset("shapes"))
    images, labels = normal(40, 3, 24, 24), torch.arange(40) % 4
    state, labeled = torch.get_rng_state(), (images, labels, images, labels)
    first = diagnostics.measure(model, masking, images, labeled)
    assert first == diagnostics.measure(model, masking, images, labeled)
    assert set(first) == set(diagnostics.MEASURES)
    assert torch.equal(state, torch.get_rng_state())


class NoStopGradient(IJEPA):
    """The context encoder makes its own targets, and gradients reach them."""

    def make_targets(self, images, masks):
        self.target_encoder = self.context_encoder
        return IJEPA.make_targets.__wrapped__(self, images, masks)


def run(tmp_path, capsys, model=None, masking=None):
    """180 steps of the default preset on 576 images: warnings, and the last row's measures."""
    config = from_preset("shapes", device="cpu", epochs=20, held_out=64, measurements=4,
                         out=str(tmp_path))
    train.train(config, model, masking)
    last = list(csv.DictReader(open(tmp_path / "metrics.csv")))[-1]
    return capsys.readouterr().err, {name: float(last[name]) for name in diagnostics.MEASURES}


def test_without_the_stop_gradient_features_collapse_and_the_run_says_so(tmp_path, capsys):
    model, masking = train.build(from_preset("shapes"))
    said, last = run(tmp_path, capsys, NoStopGradient(model.context_encoder, model.predictor),
                     masking)
    assert last["target_std"] < 0.2
    assert said.count("hardly differ") == 1 and "lower --lr" in said  # once, though it stays so


def test_a_predictor_that_has_learned_nothing_is_noticed_once():
    model, masking = train.build(from_preset("shapes"))
    dataset, device = data.load("shapes"), torch.device("cpu")
    watch = diagnostics.Monitor(dataset, torch.arange(100, 640), torch.arange(100), 24)
    assert watch(model, masking, 0.0, device)[1] == []
    assert watch.held.images.dtype == watch.bank.images.dtype == torch.uint8  # a quarter of float
    late = watch(model, masking, 0.5, device)[1]
    assert len(late) == 1 and "no better than the mean target" in late[0]
    assert watch(model, masking, 0.9, device)[1] == []


def test_stl10s_unlabeled_images_are_judged_by_knn_on_its_labeled_split(monkeypatch):
    """A folder without labels has no such split, and gets no kNN."""

    def load(name, split, *_):
        labels = torch.arange(2000) % 10 if split == "train" else None
        images = torch.zeros(2000, 3, 24, 24, dtype=torch.uint8)
        return data.ImageDataset(name, images, labels, None, (0.5,) * 3, (0.25,) * 3)

    monkeypatch.setattr(data, "load", load)
    kept, held = torch.arange(1800), torch.arange(1800, 2000)
    watch = train.monitor(from_preset("stl10"), load("stl10", "unlabeled"), kept, held)
    assert len(watch.held) == 200 and len(watch.bank) == 1000 and len(watch.queries) == 500
    folder = train.monitor(from_preset("shapes"), load("photos", "unlabeled"), kept, held)
    assert folder.bank is None
    never = from_preset("stl10", measurements=0)
    assert train.monitor(never, load("stl10", "train"), kept, held) is None
