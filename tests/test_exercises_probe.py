"""The notebook's checks: each passes what is right, leaves a stub alone, and names the property that a wrong answer lacks."""

import math

import pytest
import torch
import torch.nn.functional as F

import exercises_probe as checks
from extras import probes


@torch.no_grad()
def pooled(encoder, images):
    return encoder(images).mean(1)


def standardised(train_x, test_x):
    deviation, mean = torch.std_mean(train_x, 0)
    deviation[deviation < 1e-6 * mean.abs()] = torch.inf
    return (train_x - mean) / deviation, (test_x - mean) / deviation


def constant_blows_up(train_x, test_x):
    deviation, mean = torch.std_mean(train_x, 0)
    return (train_x - mean) / deviation, (test_x - mean) / deviation


def set_aside(labels, generator):
    held = torch.zeros(len(labels), dtype=torch.bool)
    for k in labels.unique():
        members = (labels == k).nonzero()[:, 0]
        chosen = torch.randperm(len(members), generator=generator)[: len(members) // 10]
        held[members[chosen]] = True
    return held


def not_stratified(labels, generator):
    held = torch.zeros(len(labels), dtype=torch.bool)
    held[torch.randperm(len(labels), generator=generator)[: len(labels) // 10]] = True
    return held


def first_ones(labels, generator):
    held = torch.zeros(len(labels), dtype=torch.bool)
    for k in labels.unique():
        held[(labels == k).nonzero()[: (labels == k).sum() // 10, 0]] = True
    return held


def optimism(heads, images, accuracy, draws, generator):
    right = torch.rand(draws, heads, images, generator=generator) < accuracy
    return right.float().mean(2).max(1).values.mean().item() - accuracy


def optimism_of_mean(heads, images, accuracy, draws, generator):
    right = torch.rand(draws, heads, images, generator=generator) < accuracy
    return right.float().mean(2).mean().item() - accuracy


def optimism_not_subtracted(heads, images, accuracy, draws, generator):
    return optimism(heads, images, accuracy, draws, generator) + accuracy


def optimism_shared(heads, images, accuracy, draws, generator):
    return heads**0.5 / images**0.5 if heads > 1 else 0.0


def vote(train_x, train_y, x, k, temperature):
    cosine, nearest = (F.normalize(train_x, dim=1) @ F.normalize(x, dim=0)).topk(k)
    votes = torch.zeros(int(train_y.max()) + 1)
    votes.index_add_(0, train_y[nearest], (cosine / temperature).exp())
    return votes.argmax()


def vote_by_dot(train_x, train_y, x, k, temperature):
    cosine, nearest = (train_x @ x).topk(k)
    return F.one_hot(train_y[nearest]).sum(0).argmax()


def vote_unweighted(train_x, train_y, x, k, temperature):
    nearest = (F.normalize(train_x, dim=1) @ F.normalize(x, dim=0)).topk(k).indices
    return F.one_hot(train_y[nearest]).sum(0).argmax()


def vote_of_all(train_x, train_y, x, k, temperature):
    return vote(train_x, train_y, x, k if k == 1 else len(train_x), temperature)


def needed(counts, accuracies, wanted):
    return next((count for count, accuracy in zip(counts, accuracies) if accuracy >= wanted), math.inf)


def confused(labels, predictions, K):
    return (labels * K + predictions).bincount(minlength=K * K).view(K, K)


def parts(table):
    return (table["I-JEPA"]["frozen"] - table["MAE"]["frozen"], table["MAE"]["frozen"] - table["MAE"]["fine-tuned"])


RIGHT = [pooled, standardised, set_aside, optimism, vote, needed, confused, parts]
WRONG = [
    ("pooled", lambda encoder, images: encoder(images).mean(1), "no gradient"),
    ("pooled", lambda encoder, images: encoder(images).mean(2).detach(), "one feature of 16 numbers"),
    ("pooled", torch.no_grad()(lambda encoder, images: encoder(images)[:, 0]), "mean over the N patch tokens"),
    ("pooled", torch.no_grad()(lambda encoder, images: encoder(images).mean((0, 1)).expand(len(images), -1)), "others in its batch"),
    ("standardised", lambda x, y: (standardised(x, x)[0], y - y.mean(0)), "does not depend on the other test images"),
    ("standardised", lambda x, y: standardised(torch.cat([x, y]), y)[0].split([len(x), len(y)]), "mean 0"),
    ("standardised", lambda x, y: ((x - x.mean(0)) / x.std(), (y - x.mean(0)) / x.std()), "each divided by its own"),
    ("standardised", lambda x, y: (standardised(x, y)[0], y - x.mean(0)), "*training* mean and deviation"),
    ("standardised", constant_blows_up, "becomes 0"),
    ("set_aside", not_stratified, "a tenth of every class"),
    ("set_aside", first_ones, "drawn, not the first"),
    ("set_aside", lambda labels, generator: ~set_aside(labels, generator), "a tenth of every class"),
    ("set_aside", lambda labels, generator: set_aside(labels, None), "the same generator"),
    ("set_aside", lambda labels, generator: set_aside(labels, generator).nonzero()[:, 0], "one bool for each image"),
    ("optimism", optimism_of_mean, "scores above"),
    ("optimism", optimism_not_subtracted, "one head alone"),
    ("optimism", optimism_shared, "deviation / sqrt(pi)"),
    ("vote", vote_by_dot, "cosine"),
    ("vote", vote_unweighted, "a nearer neighbour weighs more"),
    ("vote", vote_of_all, "only the k nearest vote"),
    ("needed", lambda counts, accuracies, wanted: max(counts), "the *smallest* count"),
    ("needed", lambda counts, accuracies, wanted: next((c for c, a in zip(counts, accuracies) if a > wanted), math.inf), "exactly reached"),
    ("needed", lambda counts, accuracies, wanted: next((c for c, a in zip(counts, accuracies) if a >= wanted), counts[-1]), "math.inf"),
    ("confused", lambda labels, predictions, K: confused(predictions, labels, K), "a row is a *true* class"),
    ("confused", lambda labels, predictions, K: confused(labels, predictions, 4)[[0, 1, 3]][:, [0, 1, 3]], "K x K"),
    ("confused", lambda labels, predictions, K: confused(labels, predictions, K).bool(), "counted once"),
    ("confused", lambda labels, predictions, K: confused(labels, labels, K), "a column is an answer"),
    ("parts", lambda table: parts(table)[::-1], "the first compares"),
    ("parts", lambda table: (table["I-JEPA"]["fine-tuned"] - table["MAE"]["fine-tuned"],
                             table["I-JEPA"]["frozen"] - table["I-JEPA"]["fine-tuned"]), "the first compares"),
    ("parts", lambda table: (table["I-JEPA"]["frozen"] - table["MAE"]["frozen"],
                             table["MAE"]["fine-tuned"] - table["MAE"]["frozen"]), "add up"),
]


def said(check, answer, capsys):
    check(answer)
    return capsys.readouterr().out.strip()


@pytest.mark.parametrize("answer", RIGHT, ids=lambda answer: answer.__name__)
def test_what_is_right_passes(answer, capsys):
    name = answer.__name__
    assert said(getattr(checks, f"check_{name}"), answer, capsys) == f"exercise {name}: passed"


@pytest.mark.parametrize("name, answer, property", WRONG, ids=lambda part: part if isinstance(part, str) else "")
def test_what_is_wrong_is_told_which_property_fails(name, answer, property, capsys):
    text = said(getattr(checks, f"check_{name}"), answer, capsys)
    assert text.startswith(f"exercise {name}: not yet. This should hold: ") and property in text.split("(got")[0]


@pytest.mark.parametrize("answer", RIGHT, ids=lambda answer: answer.__name__)
def test_a_stub_is_not_attempted(answer, capsys):
    name = answer.__name__
    assert said(getattr(checks, f"check_{name}"), lambda *_: None, capsys) == f"exercise {name}: not attempted"


def test_the_modules_own_standardise_passes(capsys):
    assert said(checks.check_standardised, probes.standardise, capsys).endswith("passed")


def test_an_answer_that_raises_does_not_end_the_notebook(capsys):
    assert "It raised ZeroDivisionError" in said(checks.check_needed, lambda *_: 1 / 0, capsys)
