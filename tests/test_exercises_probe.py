"""Each check of Linear_Probe.ipynb passes what is right, leaves a stub alone, and names the
property that a wrong answer lacks."""

import math

import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression

import evaluate
import exercises_probe as checks


@torch.no_grad()
def pooled(encoder, images):
    return encoder(images).mean(1)


@torch.no_grad()
def first_token(encoder, images):
    return encoder(images)[:, 0]


@torch.no_grad()
def mean_of_the_batch(encoder, images):
    return encoder(images).mean((0, 1)).expand(len(images), -1)


def standardized(train_x, test_x):
    deviation, mean = torch.std_mean(train_x, 0)
    deviation[deviation < 1e-6 * mean.abs()] = torch.inf
    return (train_x - mean) / deviation, (test_x - mean) / deviation


def standardized_together(train_x, test_x):
    both = torch.cat([train_x, test_x])
    return standardized(both, both)[0].split([len(train_x), len(test_x)])


def constant_blows_up(train_x, test_x):
    deviation, mean = torch.std_mean(train_x, 0)
    return (train_x - mean) / deviation, (test_x - mean) / deviation


def one_deviation_for_all(train_x, test_x):
    mean, deviation = train_x.mean(0), train_x.std()
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


def fitted(x, y, test_x, strength):
    """Classes of test_x by scikit-learn's optimum for standardized x."""
    model = evaluate.fit(LogisticRegression(max_iter=10_000), x.numpy(), y.numpy(), strength)
    return torch.from_numpy(model.predict(test_x.numpy()))


def probe(train_x, train_y, test_x, test_y, held, strengths, x=None, test=None, choose=None,
          refit=True):
    x = evaluate.standardize(train_x, test_x)[0] if x is None else x
    test = evaluate.standardize(train_x, test_x)[1] if test is None else test
    judges = x[held], train_y[held]
    if choose == "fitted":
        judges = x[~held], train_y[~held]
    if choose == "test":
        judges = test, test_y
    first = ~held if choose != "remembered" else held | True
    scores = {strength: (fitted(x[first], train_y[first], judges[0], strength) == judges[1]).sum()
              for strength in strengths}
    best = max(scores, key=scores.get)
    last = torch.ones_like(held) if refit else ~held
    return (fitted(x[last], train_y[last], test, best) == test_y).double().mean().item(), best


def probe_with_test_statistics(train_x, train_y, test_x, *others):
    test = evaluate.standardize(test_x, test_x)[0]
    return probe(train_x, train_y, test_x, *others, test=test)


def probe_not_standardized(train_x, train_y, test_x, *others):
    return probe(train_x, train_y, test_x, *others, x=train_x, test=test_x)


def probe_without_choice(train_x, train_y, test_x, test_y, held, strengths):
    return probe(train_x, train_y, test_x, test_y, held, strengths[:1])


def knn_classes(train_x, train_y, test_x, k, temperature):
    return knn(F.normalize(train_x, dim=1), train_y, F.normalize(test_x, dim=1), k, temperature)


def knn(train_x, train_y, test_x, k, temperature, over=1):
    cosine, nearest = (test_x @ train_x.T).topk(k, dim=1)
    votes = torch.zeros(len(test_x), int(train_y.max()) + 1)
    votes.scatter_add_(1, train_y[nearest], (cosine / temperature).exp())
    return votes.argmax(over)


def knn_over_images(train_x, train_y, test_x, k, temperature):
    return knn(F.normalize(train_x, dim=1), train_y, F.normalize(test_x, dim=1), k, temperature, 0)


def knn_of_long_queries(train_x, train_y, test_x, k, temperature):
    return knn(F.normalize(train_x, dim=1), train_y, test_x, k, temperature)


def knn_unweighted(train_x, train_y, test_x, k, temperature):
    return knn_classes(train_x, train_y, test_x, k, 1e6)


def knn_of_all(train_x, train_y, test_x, k, temperature):
    return knn_classes(train_x, train_y, test_x, len(train_x), temperature)


def knn_of_the_batch(train_x, train_y, test_x, k, temperature):
    moved = test_x - test_x.mean(0)
    return knn_classes(train_x, train_y, moved, k, temperature)


def choose_k(x, y, ks, itself=-math.inf, normalize=True, temperature=0.07):
    unit = F.normalize(x, dim=1) if normalize else x
    cosine = unit @ unit.T
    cosine.fill_diagonal_(itself)
    right = {}
    for k in ks:
        near, who = cosine.topk(k, dim=1)
        votes = torch.zeros(len(x), int(y.max()) + 1)
        votes.scatter_add_(1, y[who], (near / temperature).exp())
        right[k] = (votes.argmax(1) == y).sum().item()
    return max(right, key=right.get)


def attentive_pool(tokens, query):
    return pool(tokens, (tokens @ query / len(query) ** 0.5).softmax(1))


def pool(tokens, weights):
    return (weights[..., None] * tokens).sum(1)


def needed(counts, accuracies, wanted):
    return first(counts, [accuracy >= wanted for accuracy in accuracies], math.inf)


def needed_strictly(counts, accuracies, wanted):
    return first(counts, [accuracy > wanted for accuracy in accuracies], math.inf)


def needed_or_last(counts, accuracies, wanted):
    return first(counts, [accuracy >= wanted for accuracy in accuracies], counts[-1])


def first(counts, enough, otherwise):
    return next((count for count, holds in zip(counts, enough) if holds), otherwise)


def confused(labels, predictions, K):
    return (labels * K + predictions).bincount(minlength=K * K).view(K, K)


def confused_without_empty_classes(labels, predictions, K):
    present = labels.bincount(minlength=K) > 0
    return confused(labels, predictions, K)[present][:, present]


def split(table, methods, protocols):
    method = table["I-JEPA"][methods] - table["MAE"][methods]
    return method, table[protocols]["frozen"] - table[protocols]["fine-tuned"]


def parts(table):
    return split(table, "frozen", "MAE")


def parts_with_the_sign_lost(table):
    method, protocol = parts(table)
    return method, -protocol


RIGHT = [pooled, standardized, set_aside, probe, optimism, knn_classes, choose_k, needed, confused,
         parts, attentive_pool]
WRONG = [
    ("pooled", lambda encoder, images: encoder(images).mean(1), "no gradient"),
    ("pooled", lambda encoder, images: encoder(images).mean(2).detach(), "one feature of 16"),
    ("pooled", first_token, "mean over the N patch tokens"),
    ("pooled", mean_of_the_batch, "others in its batch"),
    ("standardized", lambda x, y: (standardized(x, x)[0], y - y.mean(0)), "other test images"),
    ("standardized", standardized_together, "mean 0"),
    ("standardized", one_deviation_for_all, "each divided by its own"),
    ("standardized", lambda x, y: (standardized(x, y)[0], y - x.mean(0)), "*training* mean and"),
    ("standardized", constant_blows_up, "never changes"),
    ("set_aside", not_stratified, "a tenth of every class"),
    ("set_aside", first_ones, "drawn, not the first"),
    ("set_aside", lambda labels, generator: ~set_aside(labels, generator), "a tenth of every"),
    ("set_aside", lambda labels, generator: set_aside(labels, None), "the same generator"),
    ("set_aside", lambda labels, generator: set_aside(labels, generator).nonzero(), "one bool"),
    ("optimism", optimism_of_mean, "scores above"),
    ("optimism", optimism_not_subtracted, "one head alone"),
    ("optimism", optimism_shared, "deviation / sqrt(pi)"),
    ("probe", lambda *arguments: probe(*arguments)[::-1], "two numbers"),
    ("probe", probe_with_test_statistics, "other test images"),
    ("probe", lambda *arguments: probe(*arguments, choose="test"), "test labels"),
    ("probe", lambda *arguments: probe(*arguments, choose="fitted"), "not fitted while"),
    ("probe", probe_not_standardized, "small scale"),
    ("probe", lambda *arguments: probe(*arguments, choose="remembered"), "not fitted while"),
    ("probe", probe_without_choice, "a weak penalty is chosen"),
    ("probe", lambda *arguments: probe(*arguments, refit=False), "all training images"),
    ("knn_classes", knn_over_images, "one class each"),
    ("knn_classes", knn, "length of a training feature"),
    ("knn_classes", knn_of_long_queries, "length of a test feature"),
    ("knn_classes", knn_of_the_batch, "the other test images"),
    ("knn_classes", knn_unweighted, "a nearer neighbor weighs more"),
    ("knn_classes", knn_of_all, "only the k nearest vote"),
    ("choose_k", lambda x, y, ks: choose_k(x, y, ks, itself=1.0), "15 neighbors are better"),
    ("choose_k", lambda x, y, ks: max(ks), "one neighbor is best"),
    ("choose_k", lambda x, y, ks: 0.9, "one of the ks"),
    ("choose_k", lambda x, y, ks: choose_k(x, y, ks, normalize=False), "length"),
    ("choose_k", lambda x, y, ks: choose_k(x, y, ks, temperature=1e6), "weigh more"),
    ("choose_k", lambda x, y, ks: choose_k(x, y, ks, temperature=1.0), "weigh more"),
    ("choose_k", lambda x, y, ks: ks.index(choose_k(x, y, ks)), "one of the ks"),
    ("attentive_pool", lambda tokens, query: tokens @ query, "[3, 4]"),
    ("attentive_pool", lambda tokens, query: pool(tokens, (tokens @ query / 2).softmax(0)),
     "alike"),
    ("attentive_pool", lambda tokens, query: attentive_pool(tokens, query) / 9, "alike"),
    ("attentive_pool", lambda tokens, query: attentive_pool(tokens, query + 1), "query of zeros"),
    ("attentive_pool", lambda tokens, query: pool(tokens, tokens @ query / 9 + 1 / 9), "alike"),
    ("attentive_pool", lambda tokens, query: tokens.mean(1), "great length"),
    ("attentive_pool", lambda tokens, query: pool(tokens, (tokens @ query).softmax(1)), "divided"),
    ("attentive_pool", lambda tokens, query: attentive_pool(tokens, query.detach()), "gradient"),
    ("needed", lambda counts, accuracies, wanted: max(counts), "exactly reached"),
    ("needed", needed_strictly, "exactly reached"),
    ("needed", lambda counts, accuracies, wanted: [*counts, math.inf][
        max(i for i, a in enumerate([0, *accuracies]) if a < wanted)],
     "the *smallest* count"),
    ("needed", needed_or_last, "math.inf"),
    ("confused", lambda labels, predictions, K: confused(predictions, labels, K), "a row is"),
    ("confused", confused_without_empty_classes, "K x K"),
    ("confused", lambda *arguments: confused(*arguments).bool(), "counted once"),
    ("confused", lambda labels, predictions, K: confused(labels, labels, K), "a column is an"),
    ("parts", lambda table: parts(table)[::-1], "the first compares"),
    ("parts", lambda table: split(table, "fine-tuned", "I-JEPA"), "the first compares"),
    ("parts", parts_with_the_sign_lost, "add up"),
]


@pytest.mark.parametrize("answer", RIGHT, ids=lambda answer: answer.__name__)
def test_what_is_right_passes_and_a_stub_is_not_attempted(answer):
    check = getattr(checks, f"check_{answer.__name__}")
    assert check(answer)
    assert repr(check(lambda *_: None)) == "not attempted"


@pytest.mark.parametrize("name, answer, words", WRONG,
                         ids=lambda part: part if isinstance(part, str) else "")
def test_what_is_wrong_is_told_which_property_fails(name, answer, words):
    result = getattr(checks, f"check_{name}")(answer)
    first, right, *returned = repr(result).splitlines()
    assert not result and first.startswith("failed: ") and words in first
    assert not right.startswith("you returned ")  # what is right comes first
    assert returned[-1].startswith("you returned ")


def test_the_modules_own_standardize_passes():
    assert checks.check_standardized(evaluate.standardize)
