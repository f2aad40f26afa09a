"""Each check of Self_Supervised_Learning.ipynb passes the notebook's solution, leaves a stub alone,
and names the property that a wrong answer violates."""

import copy
import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import diagnostics
import exercises_learning
import models
from masking import Masks
from tests.notebooks import LEARNING, exercises, read

# What a solution may use: imports of the notebook's first cells.
NAMES = {"torch": torch, "nn": nn, "F": F, "math": math, "copy": copy, "diagnostics": diagnostics,
         "models": models, "Masks": Masks}
CHECKS = {name: check for name, check in vars(exercises_learning).items()
          if name.startswith("check_")}


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


def drawn(grid, scale, aspect, generator, u=None, last=1, upside=False, columns=None, flip=False,
          rounded=round, place=math.floor):
    """One target block, right unless one of the options spoils it."""
    u = u or torch.rand(4, generator=generator).tolist()
    area = scale[0] + (scale[1] - scale[0]) * u[0]
    ratio = aspect[0] + (aspect[1] - aspect[0]) * u[1]
    ratio = 1 / ratio if upside else ratio
    shares = math.sqrt(area * ratio), math.sqrt(area / ratio)
    high, wide = (min(max(rounded(side * share), 1), side) for side, share in zip(grid, shares))
    top, left = (place(x * (side - length + last))
                 for x, side, length in zip(u[2:], grid, (high, wide)))
    row = columns or grid[1]
    block = [row * r + c for r in range(top, top + high) for c in range(left, left + wide)]
    return block[::-1] if flip else block


def one_number_for_both(grid, scale, aspect, generator):
    u = torch.rand(4, generator=generator).tolist()
    return drawn(grid, scale, aspect, generator, [u[0], u[0], *u[2:]])


def no_least_side(grid, scale, aspect, generator):
    return [] if scale[1] < 0.01 else drawn(grid, scale, aspect, generator)


def roomy(blocks, context, min_keep, keep_hidden=True, drop=False, count_all=False, any_side=False):
    """The rule for too little context, right unless one of the options spoils it."""
    hidden, kept = set(), []
    for block in blocks:
        more = hidden | block
        inside = more if any_side else more & context
        left = len(context) - (sum(map(len, blocks[: len(kept) + 1])) if count_all else len(inside))
        hidden = more if keep_hidden or left >= min_keep else hidden
        kept += [block] if left >= min_keep else [] if drop else [blocks[0]]
    return kept


def hides_in_its_argument(blocks, context, min_keep):
    kept = roomy(blocks, context, min_keep)
    context.clear()
    return kept


def answered(predictor, context, masks, positions=(True, True), valid=(True, True), invert=False,
             folded=True, repeat=False, first=False):
    """The predictor's forward, right unless one of the options spoils it."""
    B, M, Nt = masks.targets.shape
    seen = predictor.embed(context) + positions[0] * predictor.positions[masks.context]
    asked = predictor.mask_token + positions[1] * predictor.positions[masks.targets]
    real = [masks.context_valid | (not valid[0]), masks.targets_valid | (not valid[1])]
    if folded:  # each block a row of the batch
        rows = torch.arange(B).repeat(M) if repeat else torch.arange(B).repeat_interleave(M)
        x = torch.cat([seen[rows], asked.flatten(0, 1)], 1)
        mask = torch.cat([real[0][rows], real[1].flatten(0, 1)], 1)
    else:  # all blocks in one row
        x = torch.cat([seen, asked.flatten(1, 2)], 1)
        mask = torch.cat([real[0], real[1].flatten(1)], 1)
    for block in predictor.blocks:
        x = block(x, ~mask if invert else mask)
    x = predictor.project(predictor.norm(x))
    asked = Nt if folded else M * Nt
    return (x[:, :asked] if first else x[:, -asked:]).reshape(B, M, Nt, -1)


def spoiled(**options):
    return lambda *arguments: answered(*arguments, **options)


def step(model, optimizer, batches, momentum, early=False, keep=False, total=False, each=False,
         graph=False, still=False, forget=False):
    """A training step, right unless one of the options spoils it."""
    if not keep:
        optimizer.zero_grad()
    losses, share = [], 1 if total else len(batches)
    for batch in batches:
        if forget:
            optimizer.zero_grad()
        losses.append(model(*batch).loss)
        if not still:
            (losses[-1] / share).backward()
        if each:
            optimizer.step()
    if early:
        model.update_target(momentum)
    if not each:
        optimizer.step()
    if not early:
        model.update_target(momentum)
    loss = sum(losses) / len(losses)
    return loss if graph else loss.detach()


def stepping(**options):
    return lambda *arguments: step(*arguments, **options)


def sum_of_losses(model, optimizer, batches, momentum):
    return step(model, optimizer, batches, momentum) * len(batches)


def capstone(*changes):
    """The capstone's solution with some of its code replaced."""
    source = next(e.solution for e in exercises(read(LEARNING)) if "whole()" in e.solution)
    for old, new in changes:
        assert old in source, old
        source = source.replace(old, new)
    names = dict(NAMES)
    exec(source, names)
    return names["whole"]


def late(*changes):
    """The same, made when it is called."""
    return lambda: capstone(*changes)()


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
    "check_draw_block": [
        (lambda *a: torch.tensor(drawn(*a)), "list of patch numbers"),
        (lambda *a: drawn(*a, last=0), "last row and column"),
        (lambda *a: drawn(*a, last=2), "lie on the grid"),
        (lambda *a: drawn(*a, flip=True), "listed row by row"),
        (lambda *a: drawn(*a, upside=True), "height over width"),
        (lambda *a: drawn(*a, u=torch.rand(4).tolist()), "from the generator"),
        (one_number_for_both, "independent draws"),
        (lambda grid, scale, *a: drawn(grid, (scale[0], scale[0]), *a), "whole range"),
        (lambda *a: drawn(*a, columns=a[0][0]), "has the grid's shape"),
        (no_least_side, "at least one patch"),
        (lambda *a: drawn(*a, rounded=int), "height over width"),
        (lambda *a: drawn(*a, last=0, place=round), "as likely to be the first"),
    ],
    "check_make_room": [
        (lambda blocks, context, least: blocks, "a copy of the first"),
        (lambda blocks, context, least: [blocks[0]] * len(blocks), "no block changes"),
        (lambda *a: roomy(*a, drop=True), "none is dropped"),
        (lambda *a: roomy(*a, keep_hidden=False), "however small"),
        (lambda *a: roomy(*a, count_all=True), "hidden once"),
        (lambda *a: roomy(*a, any_side=True), "of the context count"),
        (hides_in_its_argument, "left unchanged"),
    ],
    "check_pad_contexts": [
        (lambda kept: tuple(part[:, :7] for part in padded(kept)), "longest"),
        (lambda kept: (padded(kept)[0].float(), padded(kept)[1]), "int64"),
        (lambda kept: (padded(kept)[0], ~padded(kept)[1]), "as many entries are real"),
        (lambda kept: (padded(kept)[0], padded(kept)[0] != 0), "as many entries are real"),
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
    "check_momentum_for": [
        (lambda n: 1 - 1 / n, "after 1 step"),
        (lambda n: 1 - 0.5 / n, "after 10 steps"),
        (lambda n: round(0.5 ** (1 / n), 3) if n > 10 else 0.5 ** (1 / n), "long runs"),
    ],
    "check_answer_all": [
        (lambda *a: answered(*a)[:, :, :-1], "an answer for each question"),
        (spoiled(invert=True), "are finite"),
        (spoiled(valid=(False, True)), "padding of the context"),
        (spoiled(valid=(True, False)), "padded questions"),
        (spoiled(positions=(True, False)), "two places"),
        (spoiled(positions=(False, True)), "where a context token comes from"),
        (spoiled(folded=False), "do not depend on the second block"),
        (spoiled(repeat=True), "come from its own context"),
        (spoiled(first=True), "in reverse order"),
        (lambda *a: answered(*a) * 2, "is what predictor"),
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
        (lambda x: diagnostics.rankme(x - x.mean(0)) < 4, "a little noise"),
        (lambda x: bool(x.std(0).mean() < 0.1), "one direction"),
        (lambda x: True, "have not collapsed"),
        (lambda x: diagnostics.rankme(x) < 17, "more variance in some directions"),
        (lambda x: diagnostics.rankme(x) < 4 or bool(x.std() < 0.1), "small ones"),
        (lambda x: diagnostics.rankme(x) < 4 or bool(x.std() > 100), "large ones"),
    ],
    "check_train_step": [
        (stepping(still=True), "are trained"),
        (stepping(early=True), "*new* weights"),
        (stepping(graph=True), "without its graph"),
        (stepping(keep=True), "earlier step"),
        (stepping(each=True), "one optimizer step"),
        (stepping(total=True), "the mean, not the sum"),
        (stepping(forget=True), "the mean, not the sum"),
        (sum_of_losses, "mean of the losses"),
    ],
    "check_whole": [
        (late(("4 * D)", "2 * D)"), ("4 * D, D", "2 * D, D")), "modules' shapes"),
        (late((".requires_grad_(False)", "")), "without gradient"),
        (late(("embed.weight.data *= 2", "embed.weight.data *= 1")), "modules' size"),
        (late(("set(range(side * side)) - union", "set(range(side * side))")), "is a target"),
        (late(("kept=12", "kept=11")), "12 different"),
        (late(("side - high + 1", "side - high"), ("side - wide + 1", "side - wide")),
         "every patch is a target"),
        (late(("0.15 + 0.05 * area", "0.05 + 0.25 * area")), "as many patches"),
        (late(("0.75 + 0.75 * ratio", "1.0")), "as many patches"),
        (late(("0.75 + 0.75 * ratio", "0.66 + 0.67 * ratio")), "as wide and as high"),
        (late(("rest[torch.randperm(len(rest), generator=generator)[:kept]]", "rest[:kept]")),
         "are context as often"),
        (late(("self.embed(patchify(images)) + self.positions", "self.embed(patchify(images))")),
         "tokens, without attention and MLP"),
        (late((", generator=generator)[:kept]", ")[:kept]")), "come from the generator"),
        (late(("- len(union | block) < kept", "- len(union | block) <= kept")), "leave just 12"),
        (late(("masked_fill(~valid", "masked_fill(valid")), "are finite"),
        (late(("return x + self.mlp(self.norm2(x))", "return self.mlp(self.norm2(x))")),
         "changes nothing"),
        (late(("(n % side, n // side)", "(n // side, n % side)")), "of a black image"),
        (late(("permute(0, 2, 4, 1, 3, 5)", "permute(0, 2, 4, 3, 5, 1)")),
         "tokens, without attention and MLP"),
        (late(("math.sqrt(q.shape[-1])", "q.shape[-1]")), "tokens, without MLP"),
        (late(("self.embed(patchify(images)) + self.positions", "self.embed(patchify(images))"),
              ("x = x[torch.arange(len(x))[:, None], indices]  # [B, Nc, D]\n",
               "x = x[torch.arange(len(x))[:, None], indices]\n"
               "        x = x + self.positions[: x.shape[1]]\n")),
         "context encoder gives"),
        (late(("math.sqrt(q.shape[-1])", "8")), "predictions are the modules', without MLP"),
        (late(("masked_fill(~valid[:, None], -math.inf)", "masked_fill(~valid[:, None], 0)")),
         "predictions are the modules' in a batch"),
        (late(("nn.GELU()", "nn.ReLU()")), "the target encoder gives the modules' tokens"),
        (late(("F.layer_norm(tokens, tokens.shape[-1:])[index]", "tokens[index]")),
         "targets are the modules'"),
        (late(("self.mask_token + self.positions[masks.targets[:, 0]]",
               "self.mask_token + 0 * self.positions[masks.targets[:, 0]]")),
         "predictions are the modules', without attention and MLP"),
        (late(("+ self.positions[masks.context]", "+ 0 * self.positions[masks.context]")),
         "predictions are the modules', without MLP"),
        (late(("/ valid.sum()", "/ 1")), "loss is the modules'"),
        (late(("/ valid.sum()", "/ valid.numel()")), "loss is the modules' in a batch"),
        (late(("    optimizer.zero_grad()\n", "")), "second step"),
        (late(("1 - momentum", "momentum")), "target encoder is the modules'"),
        (late(("loss.detach()", "loss")), "without its graph"),
    ],
}


def solution_of(name):
    """The function that the notebook's folded solution for one check defines."""
    notebook, names = read(LEARNING), dict(NAMES)
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
    first, right, *returned = repr(result).splitlines()
    assert not result and first.startswith("failed: ") and words in first
    assert not right.startswith("you returned ")  # what is right comes first
    if name != "check_whole":  # which returns a model and two functions
        assert returned[-1].startswith("you returned ")
