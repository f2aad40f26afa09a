"""Broken on purpose: ten bugs planted in I-JEPA, what each does to the curves, the test for each.

    python -m extras.bugs                  train what results/bugs.json lacks (CPU, an hour)
    python -m extras.bugs --seeds 0 1 2    with more seeds

Each is a few lines: a subclass, a sampler, or a function that takes the place of one of the
modules'. Everything else stays the same, data, their order, and the weights at the start included.
Notation as in models.py.
"""

import argparse
import contextlib
import csv
import math
import random
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullFormatter

import config as settings
import data
import diagnostics
import models
import train
from extras.ablations import NoStopGradient, NoTargetNorm
from masking import Masks
from models import IJEPA
from support import command_line, results
from support.plots import COLORS

STEPS, MEASUREMENTS, SEEDS = 1000, 10, (0, 1)
PLACE = Path(__file__).parents[1] / "results/bugs.json"

# --- the bugs -------------------------------------------------------------------------------------


def summed_loss(predictions, targets, valid, kind="smooth_l1"):
    """The sum over patches and width, where prediction_loss takes the mean."""
    distance = F.smooth_l1_loss(predictions.float(), targets.float(), reduction="none")
    return (distance.sum(-1) * valid).sum()


def schedules_in_batches(config, step, total, schedules=train.schedules):
    """Steps are counted, but the total is that of batches, of which four would make a step."""
    return schedules(config, step, 4 * total)


class EMABeforeStep(IJEPA):
    """The target encoder is moved before the optimizer's step: towards weights of the step before.
    """

    def forward(self, images, masks):
        self.old = [p.detach().clone() for p in self.context_encoder.parameters()]
        return super().forward(images, masks)

    @torch.no_grad()
    def update_target(self, momentum):
        for target, context in zip(self.target_encoder.parameters(), self.old):
            target.lerp_(context, 1 - momentum)


class GradientIntoTarget(IJEPA):
    """No `requires_grad_(False)` and no `no_grad`: the target encoder learns to be predictable."""

    def __init__(self, encoder, predictor, loss="smooth_l1"):
        super().__init__(encoder, predictor, loss)
        self.target_encoder.requires_grad_(True)

    make_targets = NoStopGradient.make_targets


def inverted_attention(q, k, v, mask=None):
    """Attends where the mask is False. Filled with -1e9, as is common, it raises no error and gives
    no NaN, as -infinity would where nothing is left to attend to."""
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])  # [B, nh, N, N]
    if mask is not None:
        scores = scores.masked_fill(mask, -1e9)
    return scores.softmax(dim=-1) @ v


class LeakingMasks:
    """The context is drawn from all patches: those of the targets are not removed from it."""

    def __init__(self, masking):
        self.masking, self.N, self.grid = masking, masking.N, masking.grid

    def __call__(self, B, generator=None):
        masks = self.masking(B, generator)
        drawn = torch.rand(B, self.N, generator=generator).argsort(1)  # [B, N]
        context = drawn[:, : masks.context.shape[1]].sort(1).values  # [B, Nc]
        return Masks(context, masks.context_valid, masks.targets, masks.targets_valid)


class NoPredictorPositions(IJEPA):
    """The predictor's tokens have no positions: every question is the same."""

    def __init__(self, encoder, predictor, loss="smooth_l1"):
        predictor.positions.zero_()
        super().__init__(encoder, predictor, loss)


def optimizer_that_decays_all(config, model):
    """One group for all parameters: norms, biases and the mask token are decayed, too."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW([{"params": trained, "decayed": True}], lr=config.lr,
                             betas=config.betas)


def best_knn(train_x, train_y, test_x, test_y, knn=diagnostics.knn):
    """The accuracy of the k and temperature that are best *on the test images*."""
    return max(knn(train_x, train_y, test_x, test_y, k, temperature)
               for k in (1, 2, 3, 5, 7, 10, 15, 20, 30, 50) for temperature in (0.02, 0.07, 0.5))


class Bug(NamedTuple):
    """What differs from I-JEPA: the model, the masks, a function (module, its name, another)."""

    model: type = IJEPA
    masking: Callable = lambda masking: masking
    replaced: tuple = ()


SOUND = Bug()
BUGS = {
    "sum for mean": Bug(replaced=(models, "prediction_loss", summed_loss)),
    "schedule in batches": Bug(replaced=(train, "schedules", schedules_in_batches)),
    "EMA before the step": Bug(EMABeforeStep),
    "targets not layer-normed": Bug(NoTargetNorm),
    "gradient into the target": Bug(GradientIntoTarget),
    "inverted mask": Bug(replaced=(models, "explicit_attention", inverted_attention)),
    "leaking patches": Bug(masking=LeakingMasks),
    "no positions in the predictor": Bug(NoPredictorPositions),
    "decayed norms": Bug(replaced=(train, "build_optimizer", optimizer_that_decays_all)),
    "test set selects": Bug(replaced=(diagnostics, "knn", best_knn)),
}
# The letters under which the reader meets them, in an order that tells nothing.
CASES = dict(zip("ABCDEFGHIJ", random.Random(21).sample(list(BUGS), len(BUGS))))


@contextlib.contextmanager
def planted(bug, config):
    """The model and the mask sampler of a Bug, as train.build; within, its function is in place."""
    with mock.patch.object(*bug.replaced) if bug.replaced else contextlib.nullcontext():
        model, masking = train.build(config)
        yield (bug.model(model.context_encoder, model.predictor, config.loss),
               bug.masking(masking))


# --- the runs -------------------------------------------------------------------------------------


def curves(folder):
    """What a run measured: a dict of lists, one value for each measurement.

    Loss and gradient norm are noisy: they are means over the steps logged since the one before.
    """
    with open(Path(folder) / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    found = {name: [] for name in ("step", *NOISY, *diagnostics.MEASURES)}
    since = []
    for row in rows:
        since.append(row)
        if row["target_std"]:
            for name in ("step", *diagnostics.MEASURES):
                found[name].append(float(row[name]))
            for name in NOISY:
                values = [float(one[name]) for one in since if one[name]]
                found[name].append(float(f"{statistics.fmean(values):.5g}") if values else None)
            since = []
    return found


NOISY = ("loss", "grad_norm")


def train_one(bug, seed, dataset, steps=STEPS, measurements=MEASUREMENTS, **changes):
    """Train a Bug, or SOUND, for a short time, and return its curves."""
    with tempfile.TemporaryDirectory() as folder:
        config = settings.from_preset("shapes", seed=seed, max_steps=steps, device="cpu",
                                      measurements=measurements, out=folder, **changes)
        with planted(bug, config) as (model, masking):
            train.train(config, model, masking, dataset)
        return curves(folder)


def main(argv=None):
    """The command line: trains what results/bugs.json lacks, one run after the other."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    seeds = p.parse_args(argv).seeds
    found = results.read_json(PLACE) if PLACE.exists() else {"runs": {}}
    dataset = data.load("shapes")
    for seed in seeds:
        for name, bug in {"sound": SOUND, **BUGS}.items():
            runs = found["runs"].setdefault(name, {})
            if str(seed) not in runs:
                print(f"{name}, seed {seed}", file=sys.stderr)
                runs[str(seed)] = train_one(bug, seed, dataset)
                found |= {"what": f"{STEPS} steps of the preset shapes, sound and with each bug",
                          "command": "python -m extras.bugs",
                          **results.provenance(torch.device("cpu"))}
                results.write_json(PLACE, found)


# --- what the reader sees -------------------------------------------------------------------------

# Title, what is drawn, and the limits of the axis; a logarithmic one has whole decades.
PANELS = [("loss", ["loss"], None), ("gradient norm", ["grad_norm"], None),
          ("kNN accuracy", ["knn"], (0, 0.5)), ("deviation", ["target_std"], (0, 1)),
          ("effective rank", ["rank"], (0, 32)),
          ("cosine; dotted: mean", ["cosine", "mean_cosine"], (0, 1))]


def figure(found, letters):
    """Curves of cases over those of the sound run, a row each; found: what results/bugs.json holds.

    The line of the first seed is thick, those of the others are thin.
    """
    size = 1.75 * len(PANELS), 1.2 * len(letters) + 0.8
    drawn = Figure(figsize=size, layout="constrained")
    axes = drawn.subplots(len(letters), len(PANELS), squeeze=False, sharex=True)
    for letter, row in zip(letters, axes):
        for panel, (_, names, limits) in zip(row, PANELS):
            values = []
            for case, color in (("sound", COLORS[7]), (CASES[letter], COLORS[5])):
                for number, seed in enumerate(found["runs"][CASES[letter]]):
                    run, width = found["runs"][case][seed], 0.8 if number else 1.6
                    for name, style in zip(names, ("-", ":")):
                        panel.plot(run["step"], run[name], style, color=color, linewidth=width)
                        values += [value for value in run[name] if value]
            if limits is None:
                panel.set_yscale("log")
                panel.yaxis.set_minor_formatter(NullFormatter())
                limits = [10 ** math.floor(math.log10(min(values))),
                          10 ** math.ceil(math.log10(max(values)))]
            panel.set_ylim(*limits)
            panel.grid(alpha=0.3)
        row[0].set_ylabel(f"case {letter}", fontsize=11, fontweight="bold")
    for (title, _, _), top, bottom in zip(PANELS, axes[0], axes[-1]):
        top.set_title(title, fontsize=10)
        bottom.set_xlabel("optimizer step")
    lines = [Line2D([], [], color=color) for color in (COLORS[7], COLORS[5])]
    drawn.legend(lines, ["sound", "with a bug"], loc="outside lower center", ncols=2,
                 frameon=False)
    return drawn


if __name__ == "__main__":
    command_line.run(main)
