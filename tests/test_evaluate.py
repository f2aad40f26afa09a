"""Claims about the measurement itself: it finds what is there, nothing where there is nothing, and never looks at the test labels."""

import json

import pytest
import torch
from torch import nn

import data
import evaluate
from config import UsageError


def blobs(n=300, classes=3, distance=4.0, seed=0):
    """`classes` round clouds, far enough apart that a line separates them: float32 [n, 8], int64 [n]."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    return torch.randn(n, 8, generator=generator) + distance * torch.eye(classes, 8)[labels] * 2, labels


def images(n=40, classes=4, seed=0):
    """A small dataset of noise: uint8 [n, 3, 8, 8]."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randint(0, 256, (n, 3, 8, 8), generator=generator, dtype=torch.uint8)
    return data.ImageDataset("noise", noise, torch.arange(n) % classes, [str(c) for c in range(classes)], (0.5,) * 3, (0.25,) * 3)


class Patches(nn.Module):
    """A stand-in encoder: the tokens are the 4x4 patches' pixels, dropped half the time while training, [B, 4, 48]."""

    def forward(self, x):
        tokens = x.unflatten(2, (2, 4)).unflatten(4, (2, 4)).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        return nn.functional.dropout(tokens, 0.5, self.training)


def test_probe_separates_what_is_separable():
    assert evaluate.linear_probe(*blobs(), *blobs(seed=1))["accuracy"] > 0.98


def test_probe_is_at_chance_on_random_labels():
    x, y = blobs(2000, classes=4, distance=0.0)
    test_x, test_y = blobs(2000, classes=4, distance=0.0, seed=1)
    assert 0.2 < evaluate.linear_probe(x, y, test_x, test_y)["accuracy"] < 0.3


def test_test_labels_do_not_choose_the_strength():
    train, (test_x, test_y) = blobs(distance=0.5), blobs(distance=0.5, seed=1)
    honest, permuted = evaluate.linear_probe(*train, test_x, test_y), evaluate.linear_probe(*train, test_x, test_y.roll(1))
    assert honest["accuracy"] != permuted["accuracy"]
    assert {**honest, "accuracy": 0} == {**permuted, "accuracy": 0}


def test_probe_does_not_depend_on_the_features_scale():
    (x, y), (test_x, test_y) = blobs(distance=0.5), blobs(distance=0.5, seed=1)
    stretch = torch.logspace(-3, 3, 8)
    stretched = evaluate.linear_probe(x * stretch + 1, y, test_x * stretch + 1, test_y)
    assert evaluate.linear_probe(x, y, test_x, test_y) == pytest.approx(stretched, abs=0.02)


@pytest.mark.parametrize("constant", (0.0, 0.1, 1e6))
def test_a_constant_feature_becomes_zero_not_nan(constant):
    (x, y), (test_x, test_y) = blobs(), blobs(seed=1)
    x[:, 3] = test_x[:, 3] = constant
    for standardised in evaluate.standardise(x, test_x):
        assert standardised.isfinite().all() and (standardised[:, 3] == 0).all()
    assert evaluate.linear_probe(x, y, test_x, test_y)["accuracy"] > 0.98


def test_probe_says_when_the_strength_is_at_the_grids_edge():
    (x, y), test = blobs(distance=0.5), blobs(distance=0.5, seed=1)
    assert evaluate.linear_probe(x, y, *test, strengths=(1.0,))["at_edge"]
    assert not evaluate.linear_probe(x, y, *test, strengths=(1e4, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5))["at_edge"]  # 1e4 is chance


def test_every_class_keeps_an_image_to_learn_from():
    (x, y), (test_x, test_y) = blobs(6, distance=20.0), blobs(distance=20.0, seed=1)  # two images a class
    assert evaluate.linear_probe(x[:, :3], y, test_x[:, :3], test_y)["accuracy"] > 0.98
    with pytest.raises(ValueError, match="two images"):
        evaluate.linear_probe(x[:3], y[:3], test_x, test_y)


def test_knn_is_the_vote_written_out():
    generator = torch.Generator().manual_seed(0)
    train_x, test_x = torch.randn(30, 5, generator=generator), torch.randn(1500, 5, generator=generator)  # more than one chunk
    train_y, test_y = torch.randint(0, 3, (30,), generator=generator), torch.randint(0, 3, (1500,), generator=generator)
    correct = 0
    for x, y in zip(test_x, test_y):
        cosines = [(float(x @ t / (x.norm() * t.norm())), int(label)) for t, label in zip(train_x, train_y)]
        votes = [0.0, 0.0, 0.0]
        for cosine, label in sorted(cosines, reverse=True)[:7]:
            votes[label] += 2.718281828459045 ** (cosine / 0.5)
        correct += votes.index(max(votes)) == int(y)
    assert evaluate.knn(train_x, train_y, test_x, test_y, k=7, temperature=0.5) == correct / 1500


def test_knn_weighs_a_close_neighbour_above_two_far_ones():
    train_x, train_y = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]), torch.tensor([0, 1, 1])
    nearly = torch.tensor([[1.0, 0.1]])
    assert evaluate.knn(train_x, train_y, nearly, torch.tensor([0]), k=100) == 1  # all three vote, though k is larger
    assert evaluate.knn(train_x, train_y, nearly, torch.tensor([1]), k=100, temperature=100) == 1  # the majority, once distance is ignored


@pytest.mark.parametrize("training", (True, False))
def test_features_are_the_mean_token_in_eval_mode(training):
    encoder, dataset = Patches().train(training), images()
    x = evaluate.features(encoder, dataset, 8, "cpu", batch_size=7)
    normalised = (dataset.images.float() / 255 - 0.5) / 0.25
    expected = normalised.unflatten(2, (2, 4)).unflatten(4, (2, 4)).mean((2, 4)).flatten(1)  # average of the four patches
    assert x.dtype == torch.float32 and not x.requires_grad
    torch.testing.assert_close(x, expected)
    assert encoder.training == training
    torch.testing.assert_close(evaluate.pixels(dataset, 8), normalised.flatten(1))


def test_subsample_is_deterministic_and_balanced():
    dataset = images(400)
    taken = evaluate.subsample(dataset, 42, seed=3)
    assert torch.equal(taken.images, evaluate.subsample(dataset, 42, seed=3).images)
    assert not torch.equal(taken.images, evaluate.subsample(dataset, 42, seed=4).images)
    assert sorted(taken.labels.bincount().tolist()) == [10, 10, 11, 11]
    assert len(evaluate.subsample(dataset, 0, 0)) == len(evaluate.subsample(dataset, 999, 0)) == 400


def result(target_knn, pixels_knn):
    """What `main` writes, as far as the table reads it."""
    score = {"linear": 0.5, "knn": 0.25}
    names = {"target": {**score, "knn": target_knn}, "context": score, "random": score, "pixels": {**score, "knn": pixels_knn}}
    probe = {name: {"strength": 1.0, "held_out_accuracy": 0.5, "at_edge": name == "context"} for name in names}
    return {"dataset": "toy", "split_sizes": {"train": 1000, "test": 10}, "chance": 0.1, "features": names, "probe": probe}


def test_table_admits_it_only_when_the_pixels_win():
    assert "pixels' kNN beats" in evaluate.table(result(0.30, 0.35))
    text = evaluate.table(result(0.40, 0.35))
    assert "pixels' kNN beats" not in text
    assert "10.0% by chance" in text and "strongest regularisation for: context encoder" in text
    target = next(line for line in text.splitlines() if line.startswith("target encoder"))
    assert target.split()[2:] == ["50.0", "+0.0", "+0.0", "40.0", "+15.0", "+5.0"]  # points over random, over pixels


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run folder whose encoders are the stand-in above, and labelled noise for data."""
    import config

    model = nn.Module()
    model.target_encoder, model.context_encoder = Patches(), Patches()
    settings = config.from_preset("shapes", image_size=8, encoder="16x1x2", predictor="16x1x2", context_size=0, min_keep=1)
    about = {"channels": 3, "axes": 2, "progress": {"step": 1}}
    monkeypatch.setattr(evaluate.train, "load_run", lambda folder, device: (model, settings, about))
    monkeypatch.setattr(evaluate, "random_encoder", lambda *_: Patches())
    monkeypatch.setattr(evaluate.data, "load", lambda name, split, data_dir, image_size: images(200, seed=len(split)))
    return tmp_path


def test_main_prints_the_table_and_writes_the_numbers(run, capsys):
    evaluate.main([str(run), "--train-images", "100", "--device", "cpu"])
    written = json.loads((run / "evaluation.json").read_text())
    assert evaluate.table(written) in capsys.readouterr().out
    assert written["split_sizes"] == {"train": 100, "test": 200} and written["chance"] == 0.25
    assert set(written["features"]) == {"target", "context", "random", "pixels"}
    assert all(0 <= score[measure] <= 1 for score in written["features"].values() for measure in ("linear", "knn"))
    assert written["features"]["target"] == written["features"]["random"]  # the same stand-in: no difference may appear
    assert "--train-images 100" in written["commands"][1] and written["config"]["image_size"] == 8
    assert [path.name for path in run.iterdir()] == ["evaluation.json"]  # no temporary file is left


def test_user_errors_are_one_line(run, monkeypatch, tmp_path_factory):
    unlabelled = images()
    unlabelled.labels = None
    monkeypatch.setattr(evaluate.data, "load", lambda *_: unlabelled)
    with pytest.raises(UsageError, match="needs labels"):
        evaluate.main([str(run)])
    with pytest.raises(UsageError, match="0 .all. or more"):
        evaluate.main([str(run), "--train-images", "-1"])
    monkeypatch.undo()
    with pytest.raises(UsageError, match="checkpoint") as error:
        evaluate.main([str(tmp_path_factory.mktemp("empty"))])
    assert "\n" not in str(error.value)
