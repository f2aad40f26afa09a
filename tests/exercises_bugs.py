"""The exercise "Broken on purpose": which bug is which case, and a test that settles each.

Notation as in models.py.
"""

import statistics
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch

import config as settings
import diagnostics
import models
import train
from exercises import NotAttempted, exercise
from extras import bugs

# --- the exercise ---------------------------------------------------------------------------------

# What each bug does to the curves, a clause; and where its case differs most from the sound code.
SIGNS = {
    "sum for mean": (
        "the loss and the gradient norm are tens of thousands of times the sound run's, and all "
        "else stays as it is (AdamW divides by the gradient's size)",
        "the size of the loss and of the gradient norm"),
    "schedule in batches": (
        "loss, gradient norm and rank leave the sound run's, because the warmup is four times too "
        "long and the learning rate never falls; kNN is not worse for it",
        "the gradient norm, higher at the end, and the first dip of the loss"),
    "EMA before the step": (
        "all curves stay close to the sound run's: the target is one step late",
        "the tests: no curve shows it"),
    "targets not layer-normed": (
        "all curves stay close to the sound run's: the encoder ends with a norm of its own",
        "the tests: no curve shows it"),
    "gradient into the target": (
        "deviation and rank are near their least after the first hundred steps, and both cosines "
        "near 1, although kNN rises at first",
        "deviation, rank and loss at the first measurements"),
    "inverted mask": (
        "the predictor is never better than the mean of the place, for it sees nothing of the "
        "image, and kNN stays where it began",
        "the two cosines, which stay together from first to last, and kNN"),
    "leaking patches": (
        "the predictor leaves the mean of the place early, because it is shown some of the "
        "answers; later the loss falls far below the sound run's, and deviation and rank with it",
        "the gap between the cosines after a few hundred steps, and deviation and rank at the end"),
    "no positions in the predictor": (
        "the predictor stays *below* the mean of the place: it cannot know which place it is asked "
        "about",
        "the two cosines: the dotted line is above"),
    "decayed norms": (
        "all curves stay close to the sound run's: a weak decay hardly moves the norms in so few "
        "steps",
        "the tests: no curve shows it"),
    "test set selects": (
        "only kNN differs, and every other curve equals the sound run's to the last digit",
        "kNN: it alone differs"),
}


@exercise
def check_diagnosis(diagnosis):
    """The name of every case's bug; for a wrong one, the symptom that speaks against it."""
    given = diagnosis()
    named = {letter: name for letter, name in given.items() if name not in (None, ..., "")}
    if not named:
        raise NotAttempted
    yield ("the letters are A to J",
           given.keys() <= bugs.CASES.keys(),
           "a dict from letter to name, such as {'A': 'sum for mean'}")
    unknown = [name for name in named.values() if name not in bugs.BUGS]
    yield ("every name is one of the ten",
           not unknown,
           f"unknown: {unknown}; the names are {', '.join(bugs.BUGS)}")
    right = [letter for letter, name in named.items() if bugs.CASES[letter] == name]
    said = [f"named rightly: {', '.join(right) or 'none yet'}"]
    if left := bugs.CASES.keys() - named.keys():
        said.append(f"not named: {', '.join(sorted(left))}")
    for letter, name in named.items():
        if letter not in right:
            there = SIGNS[bugs.CASES[letter]][1]
            said.append(f"{letter} is not '{name}': with that bug {SIGNS[name][0]}. In {letter} "
                        f"look at {there}")
    yield "every case has the name of its bug", len(right) == len(bugs.CASES), "\n".join(said)


# --- a test that settles each ---------------------------------------------------------------------

SMALL = settings.from_preset("shapes", encoder="16x2x1", predictor="8x1x1", context_size=0,
                             merge_targets=False, precision="fp32", device="cpu")


def drawn(masking, B=8):
    """Images, and masks with padding."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(B, 3, 24, 24, generator=generator), masking(B, generator)


def loss_of_ones(model, masking):
    ones = torch.ones(2, 3, 4, 16)
    return models.prediction_loss(ones, 0 * ones, ones[..., 0] > 0)


def last_rate(model, masking):
    return train.schedules(SMALL, 99, 100)["lr"]


def lag_of_the_target(model, masking):
    at_once = replace(SMALL, momentum=0.0, momentum_final=0.0)
    optimizer = train.build_optimizer(at_once, model)
    train.train_step(at_once, model, optimizer, torch.amp.GradScaler("cpu", enabled=False),
                     [drawn(masking)], 5, 10)
    pairs = zip(model.target_encoder.parameters(), model.context_encoder.parameters())
    return max((target - context).abs().max() for target, context in pairs)


def scale_of_targets(model, masking):
    with torch.no_grad():
        model.target_encoder.norm.weight.mul_(3)  # a scale that training may well learn
    return model(*drawn(masking)).targets.std(-1, correction=0).mean()


def gradient_of_the_target(model, masking):
    model(*drawn(masking)).loss.backward()
    return sum(p.grad.norm() for p in model.target_encoder.parameters() if p.grad is not None)


def influence_of_padding(model, masking):
    images, masks = drawn(masking)
    moved = replace(masks, context=masks.context.where(masks.context_valid, torch.tensor(7)))
    return model(images, masks).loss - model(images, moved).loss


def patches_in_both(model, masking):
    context, targets = drawn(masking)[1].maps(masking.N)
    return (context & targets.any(1)).sum()


def same_answer_everywhere(model, masking):
    images, masks = drawn(masking)
    first, second = model(images, masks).predictions[:, 0, :2].unbind(1)  # of one block [B, D]
    return torch.equal(first, second)


def vectors_decayed(model, masking):
    groups = train.build_optimizer(SMALL, model).param_groups
    return sum(p.ndim < 2 for group in groups if group["decayed"] for p in group["params"])


def knn_of_noise(model, masking):
    generator, found = torch.Generator().manual_seed(0), []
    for _ in range(15):
        x, y = torch.randn(300, 8, generator=generator), torch.arange(300) % 2
        found.append(diagnostics.knn(x[:200], y[:200], x[200:], y[200:]))
    return statistics.fmean(found)


class Check(NamedTuple):
    """A test that settles whether a bug is there: what is measured, and what is right."""

    what: str
    measured: Callable  # of the model and the mask sampler
    right: float
    tolerance: float = 1e-6


CHECKS = {
    "sum for mean": Check("loss where every number is off by 1", loss_of_ones, 0.5),
    "schedule in batches": Check("learning rate at the last step", last_rate, SMALL.lr_final),
    "EMA before the step": Check("momentum 0: target minus context after a step",
                                 lag_of_the_target, 0),
    "targets not layer-normed": Check("deviation of a target over its width", scale_of_targets, 1,
                                      1e-3),
    "gradient into the target": Check("gradient norm in the target encoder",
                                      gradient_of_the_target, 0),
    "inverted mask": Check("change of the loss when padding is changed", influence_of_padding, 0),
    "leaking patches": Check("patches that are both context and target", patches_in_both, 0),
    "no positions in the predictor": Check("one answer for two places (1: yes)",
                                           same_answer_everywhere, 0),
    "decayed norms": Check("norms and biases that are decayed", vectors_decayed, 0),
    "test set selects": Check("accuracy of kNN on noise of two classes", knn_of_noise, 0.5, 0.03),
}


def settle(bug):
    """What every test finds on a planted Bug: rows (what is measured, found, right, passed)."""
    rows = []
    for check in CHECKS.values():
        with bugs.planted(bug, SMALL) as (model, masking):
            found = torch.as_tensor(check.measured(model, masking)).item()
        rows.append((check.what, found, check.right, abs(found - check.right) <= check.tolerance))
    return rows


def print_tests(case):
    """Run the ten tests on a case, a letter or "sound": what each finds, and what it should."""
    bug = bugs.SOUND if case == "sound" else bugs.BUGS[bugs.CASES[case]]
    for what, found, right, passed in settle(bug):
        print(f"{'ok  ' if passed else 'FAIL'}  {what}: {found:.4g}, should be {right:.4g}")
