"""Checks of the exercises in Self_Supervised_Learning.ipynb: properties of an answer."""

import dataclasses
import random

import torch
import torch.nn.functional as F

import config as settings
import diagnostics
import train
from exercises import equal, exercise


@exercise
def check_patch_of_pixel(patch_of_pixel):
    """First and last patch, the order of rows and columns, every pixel of a grid not square."""
    yield ("the first pixel lies in patch 0",
           equal(patch_of_pixel(0, 0, 4, 6), 0),
           "both divisions give 0")
    yield ("in a grid 4 wide of patches of 2 pixels, pixel (2, 3) lies in patch 5",
           equal(patch_of_pixel(2, 3, 2, 4), 5),
           "2 // 2 = 1 is the row, 3 // 2 = 1 the column, and a row has 4 patches")
    yield ("a step to the right moves on by one patch, a step down by a whole row",
           equal(patch_of_pixel(0, 4, 4, 6), 1) and equal(patch_of_pixel(4, 0, 4, 6), 6),
           "pixel (0, 4) lies in patch 1, pixel (4, 0) in patch 6")
    grid = torch.arange(3 * 5).view(3, 5)
    places = grid.repeat_interleave(2, 0).repeat_interleave(2, 1)  # [6, 10], patches of 2 pixels
    found = torch.tensor([[int(patch_of_pixel(y, x, 2, 5)) for x in range(10)] for y in range(6)])
    yield ("every pixel of a 3 x 5 grid is right",
           torch.equal(found, places),
           f"the patches of the pixels are\n{places}")


@exercise
def check_count_context_patches(count_context_patches):
    """Nothing hidden, overlapping targets, targets that extend beyond, everything hidden."""
    yield ("without target blocks nothing is hidden",
           equal(count_context_patches({0, 1, 2}, []), 3),
           "3 patches remain")
    yield ("a target block is taken away",
           equal(count_context_patches(set(range(16)), [{5, 6, 9, 10}]), 12),
           "16 - 4 = 12")
    yield ("patches in two target blocks are taken away once",
           equal(count_context_patches(set(range(16)), [{5, 6}, {6, 7}]), 13),
           "5, 6 and 7 are hidden: 13 remain")
    yield ("target patches outside the context block take nothing away",
           equal(count_context_patches({0, 1, 4, 5}, [{5, 6}, {15}]), 3),
           "only 5 is hidden: 3 remain")
    yield ("nothing remains where all is hidden",
           equal(count_context_patches({1, 2}, [{1}, {2, 3}]), 0),
           "0 patches")
    context, targets = {0, 1, 2}, [{1}]
    count_context_patches(context, targets)
    yield ("the arguments are left unchanged",
           context == {0, 1, 2} and targets == [{1}],
           "take a copy, or a difference of sets")


@exercise
def check_pad_contexts(pad_contexts):
    """Padding: shapes and types, what is real and its order, legal indices."""
    chance = random.Random(0)
    kept = [sorted(chance.sample(range(16), length)) for length in (5, 9, 7)]
    context, valid = pad_contexts(kept)
    yield ("both tensors are as long as the longest list",
           context.shape == valid.shape == (3, 9),
           "the shape is [3, 9]")
    yield ("indices are int64 and `valid` is bool",
           context.dtype == torch.int64 and valid.dtype == torch.bool,
           "`context` is int64, `valid` is bool")
    yield ("as many entries are real as patches are kept",
           valid.sum(1).tolist() == [5, 9, 7],
           "True at real patches, False at padding")
    yield ("the real entries are the patches kept, in their order",
           all(row[real].tolist() == k for row, real, k in zip(context, valid, kept)),
           f"for the first image {kept[0]}")
    yield ("real entries come first, padding last",
           all(bool(row[: len(k)].all()) for row, k in zip(valid, kept)),
           "fill from the left")
    yield ("padding is a legal index",
           bool(((context >= 0) & (context < 16)).all()),
           "0 is legal in every grid; -1 is not")


@exercise
def check_attend(attend):
    """Plain average, the formula, weights that sum to one, padding without influence."""
    torch.manual_seed(0)
    query, keys, values = torch.randn(4), torch.randn(5, 4), torch.randn(5, 4)
    every = torch.ones(5, dtype=torch.bool)
    some = torch.tensor([True, True, False, True, False])

    def kernel(valid):
        return F.scaled_dot_product_attention(query[None], keys, values, attn_mask=valid[None])[0]

    multiplied = ((keys @ query / 2) * some).softmax(0) @ values
    found = attend(query, keys, values, some)
    yield ("True in `valid` means: may be attended to",
           not equal(found, kernel(~some)),
           "you averaged exactly the padding: the mask is inverted")
    yield ("padding gets no weight",
           not equal(found, multiplied) and not equal(found, kernel(every)),
           "a score of 0 still has the weight exp(0) = 1: set it to -infinity before the softmax")
    yield ("the weights of the valid keys sum to one",
           equal(attend(query, keys, torch.ones(5, 4), some), torch.ones(4)),
           "values of 1 must give 1: leave padding out before the softmax, not after it")
    yield ("a query of zeros gives the plain average",
           equal(attend(torch.zeros(4), keys, values, every), values.mean(0)),
           "all weights are 1/5")
    yield ("with all keys valid it is softmax attention",
           equal(attend(query, keys, values, every), kernel(every)),
           "scores are dot products over the square root of D = 4")
    yield ("with padding it is softmax attention over the valid keys",
           equal(attend(query, keys, values, some), kernel(some)),
           "the same formula, over the keys where `valid` is True")
    changed = values.clone()
    changed[~some] = 1e6
    yield ("padding has no influence",
           equal(attend(query, keys, changed, some), kernel(some)),
           "its weight is 0")


@exercise
def check_ema_after(ema_after):
    """The closed form of an EMA: no step, one step, five steps, momentum 0 and 1."""
    yield ("after no step it is where it began",
           equal(ema_after(2.0, 5.0, 0.9, 0), 2.0),
           "momentum ** 0 is 1")
    yield ("one step moves it by (1 - momentum) of the way",
           equal(ema_after(2.0, 5.0, 0.9, 1), 2.3),
           "0.9 * 2 + 0.1 * 5 = 2.3")
    average = 2.0
    for _ in range(5):
        average = 0.7 * average + 0.3 * -1.0
    yield ("five steps are as in the loop",
           equal(ema_after(2.0, -1.0, 0.7, 5), average),
           f"from 2 towards -1 with momentum .7: {average:.4f}")
    yield ("momentum 1 never moves, momentum 0 arrives at once",
           equal(ema_after(2.0, 5.0, 1.0, 50), 2.0) and equal(ema_after(2.0, 5.0, 0.0, 1), 5.0),
           "2 and 5")


@exercise
def check_mean_over_real(mean_over_real):
    """A masked mean: all real, padding without influence, patches count the same, a scalar."""
    torch.manual_seed(0)
    distances = torch.rand(2, 3, 4)
    valid = torch.arange(4) < torch.tensor([[4, 1, 2], [3, 4, 1]])[..., None]  # [2, 3, 4]
    yield ("without padding it is the plain mean",
           equal(mean_over_real(distances, torch.ones_like(valid)), distances.mean()),
           "distances.mean(), a scalar")
    large, zero = (distances.where(valid, torch.tensor(padding)) for padding in (1e6, 0.0))
    yield ("padding has no influence",
           equal(mean_over_real(large, valid), mean_over_real(zero, valid)),
           "leave it out")
    yield ("it is divided by the number of real patches",
           equal(mean_over_real(torch.ones(2, 3, 4), valid), 1.0),
           "distances of 1 have the mean 1, however many are padding")
    yield ("every real patch counts the same",
           equal(mean_over_real(distances, valid), distances[valid].mean()),
           "not the mean of the blocks' means")


@exercise
def check_optimizer_steps(optimizer_steps):
    """Counting steps: plain, accumulated, with a remainder, several epochs."""
    yield ("one pass, no accumulation",
           equal(optimizer_steps(40_000, 50, 1, 1), 800),
           "40,000 / 50 = 800")
    yield ("four forward passes make one step",
           equal(optimizer_steps(40_000, 50, 4, 1), 200),
           "800 / 4 = 200")
    yield ("what does not fill a step is dropped",
           equal(optimizer_steps(1030, 50, 2, 1), 10),
           "1,030 // 100 = 10")
    yield ("it is dropped in every epoch, not once at the end",
           equal(optimizer_steps(1060, 50, 2, 5), 50),
           "5 * (1,060 // 100) = 50")


@exercise
def check_has_collapsed(has_collapsed):
    """The alarm: constant and one-directional features, healthy ones of any size."""
    torch.manual_seed(0)
    healthy, constant = torch.randn(256, 32), torch.randn(32).expand(256, -1)
    yield ("one vector for all images is a collapse",
           bool(has_collapsed(constant)),
           "its rank is 1")
    yield ("so is one vector with a little noise",
           bool(has_collapsed(constant + 1e-3 * healthy)),
           "its effective rank is near 1")
    yield ("so are features that differ in one direction only",
           bool(has_collapsed(torch.randn(256, 1) * constant)),
           "their rank is 1, although they differ between images")
    yield ("random features have not collapsed",
           not has_collapsed(healthy),
           f"their effective rank is {diagnostics.rankme(healthy):.0f} of 32")
    yield ("nor have small ones",
           not has_collapsed(1e-3 * healthy),
           "scale is no sign of collapse: use shares, not sizes")
    yield ("nor large ones",
           not has_collapsed(1e3 * healthy),
           "scale is no sign of collapse: use shares, not sizes")


@exercise
def check_fifth_block(fifth_block):
    """A Config with five blocks, nothing else changed but its folder, and a prediction."""
    plain, (changed, prediction) = settings.from_preset("shapes"), fifth_block("shapes")
    yield ("there are five target blocks",
           changed.num_targets == 5,
           f"num_targets is {changed.num_targets}")
    other = {name for name, value in dataclasses.asdict(plain).items()
             if getattr(changed, name) != value} - {"num_targets", "out"}
    yield ("nothing else is changed but the run folder",
           not other,
           f"these differ, too: {', '.join(sorted(other))}")
    yield ("the run has a folder of its own",
           changed.out not in ("", "runs/shapes", "runs/notebook-shapes"),
           f"out is '{changed.out}', where another run may lie")
    apart = dataclasses.replace(changed, merge_targets=False)
    masks = train.build(apart)[1](2, torch.Generator().manual_seed(0))
    yield "the sampler draws five blocks", masks.targets.shape[1] == 5, "M is 5"
    yield ("you have predicted something",
           prediction in ("up", "down", "no clear change"),
           f"'up', 'down' or 'no clear change', not {prediction!r}")
