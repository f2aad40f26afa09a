"""Claims about the measurement itself: it finds what is there, nothing where there is nothing, and never looks at the test labels."""

import json

import pytest
import torch
from torch import nn

import data
import evaluate
from extras import methods
import models
from config import UsageError


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


def test_layers_are_each_blocks_mean_token_and_the_last_is_the_feature():
    encoder, dataset = models.Encoder("16x3x2", 8, 4), images()
    x = evaluate.features(encoder, dataset, 8, "cpu", layers=4)  # four asked for, three there
    assert x.shape == (40, 3, 16)
    torch.testing.assert_close(x[:, -1], evaluate.features(encoder, dataset, 8, "cpu"))


def test_features_are_extracted_once_and_again_only_for_other_weights_or_images(tmp_path, monkeypatch):
    calls, extract = [], evaluate.features
    monkeypatch.setattr(evaluate, "features", lambda *args, **kw: calls.append(1) or extract(*args, **kw))
    encoder = models.Encoder("16x3x2", 8, 4)

    def ask(dataset):
        return evaluate.cached_features(tmp_path, encoder, dataset, 8, "cpu")

    assert torch.equal(ask(images()), ask(images())) and len(calls) == 1
    ask(images(seed=1))
    assert len(calls) == 2
    with torch.no_grad():
        encoder.blocks[0].norm1.bias[3] += 1e-3
    assert not torch.equal(ask(images()), ask(images(seed=1))) and len(calls) == 4


def result(target_knn, pixels_knn):
    """What `main` writes, as far as the table reads it."""
    def score(at_edge=False, **changes):
        heads = {"last+bn": {"at_edge": at_edge}}
        return {"linear": 0.5, "knn": 0.25, "macro_f1": 0.4, "precision@5": 0.3, "best": 0.6, "head": "last4", "heads": heads, **changes}

    names = {"target": score(knn=target_knn), "context": score(at_edge=True), "random": score(), "pixels": score(knn=pixels_knn)}
    return {"dataset": "toy", "split_sizes": {"train": 1000, "test": 10}, "chance": 0.1, "features": names, "width": 8, "warnings": [],
            "low_shot": {"per_class": [2, 5], "full": 100, "scores": {"target": {"mean": [0.2, 0.35], "std": [0.01, 0.01]}}},
            "measures": {"target_std": 0.8, "rank": 3.0, "cosine": 0.9, "mean_cosine": 0.5}}


def test_table_admits_it_only_when_the_pixels_win():
    assert "pixels' kNN beats" in evaluate.table(result(0.30, 0.35))
    text = evaluate.table(result(0.40, 0.35))
    assert "pixels' kNN beats" not in text and "2: 20.0   5: 35.0" in text
    assert "10.0% by chance" in text and "strongest regularisation for: context encoder" in text
    target = next(line for line in text.splitlines() if line.startswith("target encoder"))
    assert target.split()[2:8] == ["50.0", "+0.0", "+0.0", "40.0", "+15.0", "+5.0"]  # points over random, over pixels


def test_several_runs_are_summed_up_as_mean_and_deviation():
    text = evaluate.summary([result(0.30, 0.35), result(0.40, 0.35)])
    target = next(line for line in text.splitlines() if line.startswith("target encoder"))
    assert "50.0 ± 0.0" in target and "35.0 ± 7.1" in target


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run folder whose encoders are all the same untrained one, and labelled noise for data."""
    import config

    settings = config.from_preset("shapes", image_size=8, encoder="16x2x2", predictor="16x1x2", num_targets=1, context_size=0, min_keep=1)
    model, about = methods.build(settings).eval(), {"channels": 3, "axes": 2, "progress": {"step": 1}}
    monkeypatch.setattr(evaluate.checkpoint, "load_run", lambda folder, device: (model, settings, about))
    monkeypatch.setattr(evaluate, "random_encoder", lambda *_: model.target_encoder)
    monkeypatch.setattr(evaluate.data, "load", lambda name, split, data_dir, image_size: images(200, seed=len(split)))
    return tmp_path


def test_main_prints_the_table_and_writes_the_numbers(run, capsys):
    evaluate.main([str(run), "--train-images", "100", "--device", "cpu"])
    written = json.loads((run / "evaluation.json").read_text())
    assert evaluate.table(written) in capsys.readouterr().out
    assert written["split_sizes"] == {"train": 100, "test": 200} and written["chance"] == 0.25
    assert set(written["features"]) == {"target", "context", "random", "pixels"}
    assert all(0 <= score[measure] <= 1 for score in written["features"].values() for measure in ("linear", "knn"))
    assert written["features"]["target"] == written["features"]["random"]  # the same encoder: no difference may appear
    assert written["low_shot"]["per_class"] == [2, 5, 10, 20] and written["low_shot"]["full"] == 50
    target = written["features"]["target"]
    assert sum(map(sum, target["confusion"])) == 200 and len(target["per_class"]) == len(written["class_names"]) == 4
    assert target["best"] == target["heads"][target["head"]]["accuracy"]
    assert "--train-images 100" in written["commands"][1] and written["config"]["image_size"] == 8
    assert sorted(path.name for path in run.iterdir()) == ["evaluation.json", "features"]  # no temporary file is left


def test_attentive_probe_and_fine_tuning_are_asked_for_by_flag(run, capsys):
    evaluate.main([str(run), "--train-images", "60", "--attentive", "1", "--finetune", "1", "--device", "cpu"])
    written = json.loads((run / "evaluation.json").read_text())
    assert set(written["attentive"]) == set(written["fine_tuned"]) == {"target", "random"}
    printed = capsys.readouterr().out
    assert "attentive probe" in printed and "fine-tuned" in printed


def test_a_run_without_labels_gets_the_measures_that_need_none_and_a_line_on_what_is_left_out(run, monkeypatch, capsys):
    unlabelled = images(400)
    unlabelled.labels = None
    monkeypatch.setattr(evaluate.data, "load", lambda *_: unlabelled)
    evaluate.main([str(run), "--device", "cpu"])
    written, printed = json.loads((run / "evaluation.json").read_text()), capsys.readouterr().out
    assert written["features"] == {} and written["measures"]["rank"] > 1
    assert "effective rank" in printed and printed.count("left out") == 1


def test_comparing_a_run_with_itself_gives_one(run, capsys):
    evaluate.main([str(run), "--compare", str(run), "--device", "cpu"])
    written = json.loads((run / "compare.json").read_text())
    assert written[str(run)]["cka"] == pytest.approx(1) and written[str(run)]["neighbour_overlap"] == pytest.approx(1, abs=0.01)




def test_user_errors_are_one_line(run, monkeypatch, tmp_path_factory):
    unlabelled = images()
    unlabelled.labels = None
    monkeypatch.setattr(evaluate.data, "load", lambda *_: unlabelled)
    with pytest.raises(UsageError, match="too few images"):
        evaluate.main([str(run)])
    with pytest.raises(UsageError, match="needs labels"):
        evaluate.main([str(run), "--dataset", "elsewhere"])
    with pytest.raises(UsageError, match="--layer-decay"):
        evaluate.main([str(run), "--layer-decay", "2"])
    with pytest.raises(UsageError, match="0 .all. or more"):
        evaluate.main([str(run), "--train-images", "-1"])
    monkeypatch.undo()
    with pytest.raises(UsageError, match="checkpoint") as error:
        evaluate.main([str(tmp_path_factory.mktemp("empty"))])
    assert "\n" not in str(error.value)
