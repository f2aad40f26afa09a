"""Claims about the evaluation: it finds what is there, nothing where there is nothing, and the test
labels choose nothing."""

import json
import math
import types

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import nn

import data
import evaluate
import train
from config import UsageError, from_preset
from extras import supervised


def noise(n=40, classes=4, seed=0, channels=3):
    """A small labeled data set of noise: uint8 [n, C, 8, 8]."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (n, channels, 8, 8), generator=generator, dtype=torch.uint8)
    names = [str(c) for c in range(classes)]
    return data.ImageDataset("noise", images, torch.arange(n) % classes, names, (0.5,) * channels,
                             (0.25,) * channels)


def blobs(n=300, classes=3, distance=8.0, seed=0):
    """Round clouds, float32 [n, 8], and their labels; by default a line separates them."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    return torch.randn(n, 8, generator=generator) + distance * torch.eye(classes, 8)[labels], labels


# --- features and images --------------------------------------------------------------------------


class Patches(nn.Module):
    """A stand-in encoder: tokens are the 4x4 patches' pixels, dropped half the time in training."""

    def forward(self, x):
        tokens = x.unflatten(2, (2, 4)).unflatten(4, (2, 4)).permute(0, 2, 4, 1, 3, 5)
        return nn.functional.dropout(tokens.flatten(3).flatten(1, 2), 0.5, self.training)


@pytest.mark.parametrize("training", (True, False))
def test_features_are_the_mean_token_in_eval_mode(training):
    encoder, dataset = Patches().train(training), noise()
    x = evaluate.features(encoder, dataset, 8, "cpu", batch_size=7)
    normalized = (dataset.images.float() / 255 - 0.5) / 0.25
    patches = normalized.unflatten(2, (2, 4)).unflatten(4, (2, 4))
    assert x.dtype == torch.float32 and not x.requires_grad
    torch.testing.assert_close(x, patches.mean((2, 4)).flatten(1))
    assert encoder.training == training
    torch.testing.assert_close(evaluate.pixels(dataset, 8), normalized.flatten(1))


def test_large_images_and_volumes_are_shrunk_for_the_raw_pixels():
    large = torch.zeros(2, 3, 64, 64, dtype=torch.uint8), torch.zeros(2, 1, 20, 20, 20)
    for images, features in zip(large, (3 * 32**2, 16**3)):
        C = images.shape[1]
        dataset = data.ImageDataset("large", images.byte(), None, None, (0.5,) * C, (0.25,) * C)
        assert evaluate.pixels(dataset, images.shape[-1]).shape == (2, features)


def test_a_subsample_is_balanced_and_depends_on_the_seed_alone():
    dataset = noise(400)
    taken = evaluate.subsample(dataset, 42, seed=3)
    assert torch.equal(taken.images, evaluate.subsample(dataset, 42, seed=3).images)
    assert not torch.equal(taken.images, evaluate.subsample(dataset, 42, seed=4).images)
    assert sorted(taken.labels.bincount().tolist()) == [10, 10, 11, 11]
    assert len(evaluate.subsample(dataset, 0, 0)) == len(evaluate.subsample(dataset, 999, 0)) == 400


# --- the linear probe -----------------------------------------------------------------------------


def test_the_probe_separates_what_is_separable():
    assert evaluate.linear_probe(*blobs(), *blobs(seed=1))["accuracy"] > 0.98


def test_the_probe_is_at_chance_on_random_labels():
    train_set, test_set = (blobs(2000, classes=4, distance=0.0, seed=seed) for seed in (0, 1))
    assert 0.2 < evaluate.linear_probe(*train_set, *test_set)["accuracy"] < 0.3


def test_test_labels_do_not_choose_the_strength():
    train_set, (test_x, test_y) = blobs(distance=1.0), blobs(distance=1.0, seed=1)
    honest = evaluate.linear_probe(*train_set, test_x, test_y)
    permuted = evaluate.linear_probe(*train_set, test_x, test_y.roll(1))
    assert honest["accuracy"] != permuted["accuracy"]
    assert torch.equal(honest.pop("predictions"), permuted.pop("predictions"))
    assert {**honest, "accuracy": 0} == {**permuted, "accuracy": 0}


def test_the_probe_does_not_depend_on_the_features_scale_and_origin():
    (x, y), (test_x, test_y) = blobs(distance=1.0), blobs(distance=1.0, seed=1)
    stretch = torch.logspace(-3, 3, 8)
    plain = evaluate.linear_probe(x, y, test_x, test_y)
    stretched = evaluate.linear_probe(x * stretch + 1, y, test_x * stretch + 1, test_y)
    assert plain["accuracy"] == pytest.approx(stretched["accuracy"], abs=0.01)


@pytest.mark.parametrize("constant", (0.0, 0.1, 1e6))
def test_a_constant_feature_becomes_zero_not_nan(constant):
    (x, y), (test_x, test_y) = blobs(), blobs(seed=1)
    x[:, 3] = test_x[:, 3] = constant
    for standardized in evaluate.standardize(x, test_x):
        assert standardized.isfinite().all() and (standardized[:, 3] == 0).all()
    assert evaluate.linear_probe(x, y, test_x, test_y)["accuracy"] > 0.98


@pytest.mark.parametrize("n, D", [(400, 16), (60, 200)])
@pytest.mark.parametrize("strength", (1.0, 1e-2, 1e-5))
def test_the_probe_is_at_its_optimum_also_with_fewer_images_than_features(n, D, strength):
    """Compared with scikit-learn at a tolerance 10,000 times finer: the objective is the same to
    a thousandth, and so are all but 1% of the answers. Features are correlated, as an encoder's."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(D, D, generator=generator) * torch.logspace(0, -3, D)[:, None]
    x = torch.randn(n + 500, D, generator=generator) @ mixing  # [n + 500, D]
    y = (x @ torch.randn(D, 5, generator=generator) + 2 * torch.randn(n + 500, 5,
                                                                     generator=generator)).argmax(1)
    y[:10] = torch.arange(10) % 5  # every class is there
    found = evaluate.linear_probe(x[:n], y[:n], x[n:], y[n:], strengths=(strength,))
    scaled, test_x = (part.double().numpy() for part in evaluate.standardize(x[:n], x[n:]))
    tight = LogisticRegression(C=1 / (strength * n), tol=strength * 1e-7, max_iter=100_000)
    tight.fit(scaled, y[:n])
    ours = evaluate.fit(LogisticRegression(max_iter=10_000), scaled, y[:n], strength)

    def objective(model):
        loss = -model.predict_log_proba(scaled)[range(n), y[:n]].mean()
        return loss + strength / 2 * (model.coef_**2).sum()

    assert found["converged"]
    assert objective(ours) == pytest.approx(objective(tight), rel=1e-3)
    assert (found["predictions"].numpy() == tight.predict(test_x)).mean() >= 0.99


def test_a_probe_that_does_not_converge_says_so(monkeypatch):
    monkeypatch.setattr(evaluate, "LogisticRegression",
                        lambda **options: LogisticRegression(**{**options, "max_iter": 1}))
    with pytest.warns(UserWarning, match="failed to converge"):
        probe = evaluate.linear_probe(*blobs(distance=1.0), *blobs(distance=1.0, seed=1))
    assert not probe["converged"]


def test_the_strength_with_the_best_held_out_accuracy_is_chosen():
    """One feature tells two classes apart, 399 are noise: a weak penalty fits the noise."""
    x = torch.randn(2000, 400, generator=torch.Generator().manual_seed(0))
    y = torch.arange(2000) % 2
    x[:, 0] += 2 * y
    halves = x[:1000], y[:1000], x[1000:], y[1000:]
    one_by_one = [evaluate.linear_probe(*halves, strengths=(s,)) for s in evaluate.STRENGTHS]
    best = max(one_by_one, key=lambda probe: probe["held_out_accuracy"])  # the first, so strongest
    found = evaluate.linear_probe(*halves)
    assert found["strength"] == best["strength"]
    assert found["held_out_accuracy"] == best["held_out_accuracy"]
    assert found["accuracy"] > one_by_one[-1]["accuracy"] + 0.03


def test_every_class_keeps_an_image_to_learn_from():
    (x, y), (test_x, test_y) = blobs(6, distance=40.0), blobs(distance=40.0, seed=1)
    found = evaluate.linear_probe(x[:, :3], y, test_x[:, :3], test_y)  # two images of each class
    assert found["accuracy"] > 0.98
    with pytest.raises(UsageError, match="two images"):
        evaluate.linear_probe(x[:3], y[:3], test_x, test_y)


def test_per_class_accuracy_and_confusion_of_a_case_done_by_hand(monkeypatch):
    answers = torch.tensor([0, 0, 1, 1, 1, 2])
    probe = {"accuracy": 0.0, "predictions": answers, "strength": 1.0, "converged": True}
    monkeypatch.setattr(evaluate, "linear_probe", lambda *_: probe)
    labels = torch.tensor([0, 0, 0, 1, 1, 1])
    found = evaluate.score(torch.eye(4), torch.arange(4), torch.eye(6, 4), labels)
    rows_are_true_classes = [[2, 1, 0, 0], [0, 2, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert found["confusion"] == rows_are_true_classes
    assert found["per_class"] == pytest.approx([2 / 3, 2 / 3, 0, 0])


# --- a run ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two run folders trained for two steps on noise: I-JEPA, and an encoder trained on labels."""
    folders = {}
    for name in ("ijepa", "supervised"):
        out = tmp_path_factory.mktemp("runs") / name
        config = from_preset(image_size=8, patch_size=2, encoder="16x2x2", predictor="16x1x2",
                             context_size=0, batch_size=32, max_steps=2, device="cpu", out=str(out))
        model = supervised.build(config, classes=4) if name == "supervised" else (None, None)
        train.train(config, *model, noise(200), program="-m extras.supervised"
                    if name == "supervised" else "train.py")
        folders[name] = out
    return folders


@pytest.fixture
def run(trained, monkeypatch):
    """The run folder of I-JEPA; whatever is loaded is labeled noise."""
    (trained["ijepa"] / "evaluation.json").unlink(missing_ok=True)
    monkeypatch.setattr(data, "load", lambda name, split, *where: noise(200, seed=len(split)))
    return trained["ijepa"]


def test_load_encoders_gives_those_of_the_run(trained):
    encoders, config, about = evaluate.load_encoders(trained["ijepa"])
    model, *_ = train.load_run(trained["ijepa"])
    images = torch.randn(2, 3, 8, 8)
    for name, encoder in encoders.items():
        assert not encoder.training
        assert torch.equal(encoder(images), getattr(model, f"{name}_encoder")(images))
    assert list(encoders) == ["target", "context"] and config.image_size == 8
    assert about["channels"] == 3


def test_an_untrained_encoder_is_that_of_a_run_with_this_seed_before_its_first_step(trained):
    encoders, config, about = evaluate.load_encoders(trained["ijepa"])
    state = torch.random.get_rng_state()
    untrained = evaluate.untrained_encoder(config, about, config.seed)
    assert torch.equal(torch.random.get_rng_state(), state)  # no other random number moves
    before = train.build(config)[0].target_encoder
    images = torch.randn(2, 3, 8, 8)
    assert torch.equal(untrained(images), before(images))
    assert not torch.equal(untrained(images), encoders["target"](images))


def test_main_prints_the_table_and_writes_the_numbers(run, capsys):
    evaluate.main([str(run), "--train-images", "100", "--device", "cpu", "--seed", "3"])
    written = json.loads((run / "evaluation.json").read_text())
    assert evaluate.table(written) in capsys.readouterr().out
    assert written["split_sizes"] == {"train": 100, "test": 200} and written["chance"] == 0.25
    assert list(written["features"]) == ["target", "context", "random", "pixels"]
    for row in written["features"].values():
        assert 0 <= row["linear"] <= 1 and 0 <= row["knn"] <= 1 and len(row["per_class"]) == 4
        assert sum(map(sum, row["confusion"])) == 200
    assert written["commands"] == [
        written["commands"][0],
        f"python evaluate.py {run} --train-images 100 --device cpu --seed 3"]
    assert written["commands"][0].startswith("python train.py --preset")
    assert written["config"]["image_size"] == 8 and written["training"]["step"] == 2
    assert written["seed"] == 3 and written["class_names"] == ["0", "1", "2", "3"]
    assert {"torch", "scikit-learn"} <= written["versions"].keys()
    assert written["measures"].keys() == {"target_std", "rank", "cosine", "mean_cosine"}
    assert {"hardware", "date", "warnings", "dataset", "seconds", "width"} <= written.keys()


def test_the_numbers_are_on_disk_before_they_are_printed(run, monkeypatch):
    def broken(results):
        raise RuntimeError

    monkeypatch.setattr(evaluate, "table", broken)
    with pytest.raises(RuntimeError):
        evaluate.main([str(run), "--train-images", "100"])
    assert (run / "evaluation.json").exists()


def test_the_same_encoder_in_every_row_shows_no_difference(run, monkeypatch):
    encoder = evaluate.load_encoders(run)[0]["target"]
    found = evaluate.compare({"target": encoder, "random": encoder}, noise(100), noise(50), 8)
    assert found["target"] == found["random"] != found["pixels"]


def test_a_run_of_another_method_has_one_encoder_and_no_predictions(trained, run, capsys):
    evaluate.main([str(trained["supervised"]), "--train-images", "100"])
    written = json.loads((trained["supervised"] / "evaluation.json").read_text())
    assert list(written["features"]) == ["target", "random", "pixels"]
    assert written["measures"].keys() == {"target_std", "rank"}
    assert written["commands"][0].startswith("python -m extras.supervised --preset")
    assert "cosine" not in capsys.readouterr().out


def test_several_runs_end_in_their_mean_and_deviation(trained, run, capsys):
    evaluate.main([*map(str, trained.values()), "--train-images", "100", "--dataset", "shapes"])
    last = capsys.readouterr().out.split("2 runs, mean")[1]
    runs = [json.loads((folder / "evaluation.json").read_text()) for folder in trained.values()]
    values = [100 * run["features"]["target"]["linear"] for run in runs]
    deviation = abs(values[0] - values[1]) / math.sqrt(2)
    assert f"{sum(values) / 2:.1f} ± {deviation:.1f}" in last.split("target encoder")[1]


def test_runs_of_different_data_have_no_mean(run, monkeypatch):
    configs = iter(["shapes", "cifar10"])
    monkeypatch.setattr(evaluate.checkpoint, "load", lambda folder: (
        types.SimpleNamespace(dataset=next(configs)), None, None))
    with pytest.raises(UsageError, match="cifar10 and shapes is meaningless"):
        evaluate.main(["one", "two"])


def test_a_run_without_labels_gets_the_measures_that_need_none(run, monkeypatch, capsys):
    unlabeled = noise(400)
    unlabeled.labels = None
    monkeypatch.setattr(data, "load", lambda *_: unlabeled)
    evaluate.main([str(run), "--device", "cpu"])
    written, printed = json.loads((run / "evaluation.json").read_text()), capsys.readouterr().out
    assert written["features"] == {} and written["measures"]["rank"] > 1
    assert "effective rank" in printed and "no labels" in printed


def result(target_knn, converged=True, target_linear=0.5):
    """What evaluation.json holds, as far as the table reads it."""
    rows = {name: {"linear": 0.4, "knn": 0.35, "converged": converged}
            for name in ("target", "context", "random", "pixels")}
    rows["target"] |= {"knn": target_knn, "linear": target_linear}
    return {"dataset": "toy", "split_sizes": {"train": 1000, "test": 10}, "chance": 0.1,
            "features": rows, "width": 8, "warnings": [],
            "measures": {"target_std": 0.8, "rank": 3.0, "cosine": 0.9, "mean_cosine": 0.5}}


def test_the_table_says_so_if_a_baseline_wins_and_only_then():
    assert "kNN on raw pixels beats kNN on the features" in evaluate.table(result(0.30))
    early = evaluate.table(result(0.30, target_linear=0.4))
    assert "no better than the untrained encoder and the raw pixels" in early
    text = evaluate.table(result(0.40))
    assert "beats" not in text and "no better" not in text and "chance 10.0%" in text
    target = next(line for line in text.splitlines() if line.startswith("target encoder"))
    assert target.split() == ["target", "encoder", "50.0", "40.0"]


def test_user_errors_are_one_line(run, monkeypatch, tmp_path):
    def load(name, split, *where):
        if name == "no-test" and split == "test":
            raise UsageError("--split is test")
        dataset = noise(40, channels=1 if name == "gray" else 3)
        if name == "no-labels":
            dataset.labels = None
        return dataset

    def says(words, *flags):
        with pytest.raises(UsageError, match=words) as error:
            evaluate.main([str(run), *flags])
        assert "\n" not in str(error.value)

    monkeypatch.setattr(data, "load", load)
    says("needs test images", "--dataset", "no-test")
    says("needs labels", "--dataset", "no-labels")
    says("1 channels and 2 axes, the encoder takes 3 and 2", "--dataset", "gray")
    says("two images of one", "--train-images", "4")
    says("--train-images is -1", "--train-images", "-1")
    monkeypatch.setattr(data, "load", lambda *_: data.ImageDataset(
        "few", noise(5).images, None, None, (0.5,) * 3, (0.5,) * 3))
    says("too few images")
    with pytest.raises(UsageError, match="no checkpoint"):
        evaluate.main([str(tmp_path)])
