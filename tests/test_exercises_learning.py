"""Each check of Self_Supervised_Learning.ipynb passes the notebook's solution, leaves a stub alone,
and names the property that a wrong answer violates."""

import math
import re

import pytest
import torch

import config as settings
import diagnostics
import exercises_learning
from tests.notebooks import LEARNING, exercises, read

CHECKS = {name: check for name, check in vars(exercises_learning).items()
          if name.startswith("check_")}


def fifth(changes, prediction="up"):
    return lambda _: (settings.from_preset("shapes", **changes), prediction)


def padded(kept):
    context = torch.zeros(len(kept), max(map(len, kept)), dtype=torch.int64)
    valid = torch.zeros(context.shape, dtype=torch.bool)
    for b, indices in enumerate(kept):
        context[b, : len(indices)], valid[b, : len(indices)] = torch.tensor(indices), True
    return context, valid


def padded_in_front(kept):
    return tuple(part.flip(1) for part in padded([indices[::-1] for indices in kept]))


def padded_with(kept, value):
    context, valid = padded(kept)
    return context.masked_fill(~valid, value), valid


def scores(query, keys, valid, scale=True):
    width = len(query) if scale else 1
    return (keys @ query / math.sqrt(width)).masked_fill(~valid, -math.inf)


def unmasked(query, keys, values, valid):
    return scores(query, keys, torch.ones_like(valid)).softmax(0) @ values


def multiplied_into_scores(query, keys, values, valid):
    return (scores(query, keys, valid | True) * valid).softmax(0) @ values


def only_the_first_three(query, keys, values, valid):
    valid = valid if valid.all() else valid & (torch.arange(len(valid)) < 3)
    return scores(query, keys, valid).softmax(0) @ values


def leaks_large_values(query, keys, values, valid):
    return scores(query, keys, valid).softmax(0) @ values + (values.max() > 1e5)


def cuts_its_argument(context, targets):
    for block in targets:
        context -= block
    return len(context)


def moved(start, followed, m, n):
    return m**n * start + (1 - m**n) * followed


def mean_of_blocks(distances, valid):
    return ((distances * valid).sum(-1) / valid.sum(-1)).mean()


# For each check wrong answers, and words of the property that each of them violates.
WRONG = {
    "check_patch_of_pixel": [
        (lambda y, x, p, columns: 1 + y // p * columns + x // p, "first pixel"),
        (lambda y, x, p, columns: x // p * columns + y // p, "step to the right"),
        (lambda y, x, p, columns: y // p * 4 + x // p, "step down by a whole row"),
        (lambda y, x, p, columns: min(y // p * columns + x // p, 10), "every pixel"),
    ],
    "check_count_context_patches": [
        (lambda context, targets: len(context) - sum(map(len, targets)), "taken away once"),
        (lambda context, targets: len(context) - len(set().union(*targets)), "outside"),
        (lambda context, targets: len(context), "taken away"),
        (lambda context, targets: max(1, len(context.difference(*targets))), "nothing remains"),
        (cuts_its_argument, "left unchanged"),
    ],
    "check_pad_contexts": [
        (lambda kept: tuple(part[:, :7] for part in padded(kept)), "longest"),
        (lambda kept: (padded(kept)[0].float(), padded(kept)[1]), "int64"),
        (lambda kept: (padded(kept)[0], ~padded(kept)[1]), "as many entries are real"),
        (lambda kept: padded([indices[::-1] for indices in kept]), "in their order"),
        (padded_in_front, "real entries come first"),
        (lambda kept: padded_with(kept, -1), "legal"),
    ],
    "check_attend": [
        (lambda q, k, v, valid: scores(q, k, ~valid).softmax(0) @ v, "True in `valid` means"),
        (unmasked, "padding gets no weight"),
        (multiplied_into_scores, "padding gets no weight"),
        (lambda q, k, v, valid: (scores(q, k, valid | True).softmax(0) * valid) @ v, "sum to one"),
        (lambda q, k, v, valid: v[valid].mean(0), "with all keys valid"),
        (lambda q, k, v, valid: v[valid].max(0).values, "plain average"),
        (lambda q, k, v, valid: scores(q, k, valid, False).softmax(0) @ v, "softmax attention"),
        (only_the_first_three, "over the valid keys"),
        (leaks_large_values, "padding has no influence"),
    ],
    "check_ema_after": [
        (lambda start, followed, m, n: moved(followed, start, m, n), "after no step"),
        (lambda start, followed, m, n: moved(start, followed, 1 - m, n), "one step"),
        (lambda start, followed, m, n: start + n * (1 - m) * (followed - start), "five steps"),
        (lambda start, followed, m, n: moved(start, followed, min(m, 0.95), n), "never moves"),
    ],
    "check_mean_over_real": [
        (lambda distances, valid: distances.mean(0), "plain mean"),
        (lambda distances, valid: distances.mean(), "padding has no influence"),
        (lambda distances, valid: (distances * valid).mean(), "number of real patches"),
        (mean_of_blocks, "counts the same"),
    ],
    "check_optimizer_steps": [
        (lambda images, batch, accumulation, epochs: images, "no accumulation"),
        (lambda images, batch, accumulation, epochs: epochs * (images // batch),
         "four forward passes"),
        (lambda images, batch, accumulation, epochs: -(-epochs * images // batch // accumulation),
         "dropped"),
        (lambda images, batch, accumulation, epochs: epochs * images // (batch * accumulation),
         "every epoch"),
    ],
    "check_has_collapsed": [
        (lambda x: False, "one vector for all"),
        (lambda x: bool((x.std(0) == 0).all()), "a little noise"),
        (lambda x: bool(x.std(0).mean() < 0.1), "one direction"),
        (lambda x: True, "have not collapsed"),
        (lambda x: diagnostics.rankme(x) < 4 or bool(x.std() < 0.1), "small ones"),
        (lambda x: diagnostics.rankme(x) < 4 or bool(x.std() > 100), "large ones"),
    ],
    "check_fifth_block": [
        (fifth({"out": "runs/five"}), "five target blocks"),
        (fifth({"num_targets": 5, "context_size": 10, "out": "runs/five"}), "nothing else"),
        (fifth({"num_targets": 5}), "folder of its own"),
        (fifth({"num_targets": 5, "out": "runs/five"}, "maybe"), "predicted"),
    ],
}


def solution_of(name):
    """The function that the notebook's folded solution for one check defines."""
    notebook = read(LEARNING)
    names = {"torch": torch, "math": math, "diagnostics": diagnostics, "settings": settings}
    for exercise in exercises(notebook):
        called = re.search(r"\.(check_\w+)\((\w+)", notebook.cells[exercise.check].source)
        if called[1] == name:
            exec(exercise.solution, names)
            return names[called[2]]


def test_every_check_has_wrong_answers_here():
    assert set(WRONG) == set(CHECKS)


@pytest.mark.parametrize("name", WRONG)
def test_a_check_passes_the_solution_and_leaves_the_stub_unattempted(name):
    assert CHECKS[name](solution_of(name))
    for stub in (lambda *arguments: None, lambda *arguments: ...):
        assert repr(CHECKS[name](stub)) == "not attempted"


@pytest.mark.parametrize(
    "name, number", [(name, i) for name, wrong in WRONG.items() for i in range(len(wrong))])
def test_a_check_names_the_property_that_a_wrong_answer_violates(name, number):
    answer, words = WRONG[name][number]
    result = CHECKS[name](answer)
    first, second = repr(result).splitlines()[:2]
    assert not result and first.startswith("failed: ") and words in first
    assert second.startswith("you returned ") and "; " in second  # and what is right
