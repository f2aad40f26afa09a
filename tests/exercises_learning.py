"""Checks of the exercises in Self_Supervised_Learning.ipynb: properties of an answer."""

import copy
import random

import torch
import torch.nn.functional as F

import config as settings
import diagnostics
import models
import train
from exercises import equal, exercise, seeded
from masking import Masks, MultiBlockMasking


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
def check_draw_block(draw_block):
    """A block: reachable edges, a rectangle, its sides, its random numbers, a grid not square."""
    half, one = (0.25, 0.25), (1.0, 1.0)
    blocks = [draw_block((4, 4), half, one, seeded(i)) for i in range(100)]
    yield ("a block is a list of patch numbers", isinstance(blocks[0], list),
           "ints, such as [0, 1, 4, 5]")
    seen = {int(n) for block in blocks for n in block}
    yield ("every patch of the grid can be drawn, also in the last row and column",
           {3, 12, 15} <= seen,
           "a block of 2 rows can begin in row 0, 1 or 2: there are H - h + 1 places")
    yield "all patches lie on the grid", seen == set(range(16)), "a 4 x 4 grid has patches 0 to 15"
    tops = [int(draw_block((4, 4), half, one, seeded(i))[0]) // 4 for i in range(400)]
    yield ("each row is as likely to be the first",
           max(map(tops.count, range(3))) < 170,  # of 133 expected: 4 standard errors
           f"rows 0, 1 and 2 were it {', '.join(str(tops.count(row)) for row in range(3))} times: "
           "floor(u * (H - h + 1)) gives each an equal share of u")
    block = draw_block((6, 6), (0.15, 0.15), (1.3, 1.3), seeded())
    high, wide = sides(block, 6)
    yield ("a block is a rectangle, listed row by row",
           list(block) == [int(block[0]) + 6 * r + c for r in range(high) for c in range(wide)],
           "all patches from the corner on, `high` rows of `wide` patches, each once")
    yield ("aspect is height over width",
           (high, wide) == (3, 2),
           "area .15 and aspect 1.3 on a 6 x 6 grid: 6 * sqrt(.15 * 1.3) = 2.65 rounds to 3 rows, "
           "6 * sqrt(.15 / 1.3) = 2.04 to 2 columns")
    yield ("all random numbers come from the generator",
           all(draw_block((4, 4), half, one, seeded(i)) == blocks[i] for i in range(20)),
           "the same seed must give the same block")
    wild = [sides(draw_block((30, 30), (0.05, 0.3), (0.5, 2.0), seeded(i)), 30)
            for i in range(200)]
    area, ratio = torch.tensor([(h * w, h / w) for h, w in wild], dtype=torch.float32).T
    correlation = torch.corrcoef(torch.stack([area, ratio.log()]))[0, 1].abs().item()
    yield ("scale and aspect are two independent draws",
           correlation < 0.4,
           f"the correlation of area and aspect is {correlation:.2f}: draw a number for each")
    yield ("both are drawn from their whole range",
           area.min() < 80 and area.max() > 230 and ratio.min() < 0.7 and ratio.max() > 1.5,
           "uniformly from the least to the most")
    high, wide = sides(draw_block((4, 8), half, one, seeded()), 8)
    yield ("on a grid of 4 x 8 the block has the grid's shape",
           (high, wide) == (2, 4),
           "each side is a fraction of the grid's own side, and a row has 8 patches")
    yield ("a block has at least one patch",
           len(draw_block((4, 4), (0.001, 0.001), one, seeded())) == 1,
           "a side that rounds to 0 becomes 1")


def sides(block, columns):
    """How many rows and columns of the grid a list of patch numbers reaches over."""
    rows, across = {int(n) // columns for n in block}, {int(n) % columns for n in block}
    return len(rows), len(across)


@exercise
def check_make_room(make_room):
    """What becomes of blocks that leave too little: the first too many, all later ones, overlap."""
    A, B, C, D = {0, 1, 4, 5}, {2, 3, 6, 7}, {8, 9, 12, 13}, {10}
    grid = set(range(16))
    blocks, context = [set(A), set(B), set(C)], set(grid)
    make_room(blocks, context, 6)
    yield ("the arguments are left unchanged",
           blocks == [A, B, C] and context == grid,
           "make new sets: `hidden = hidden | block`, not `hidden |= block` on a block")
    yield ("where enough is left no block changes",
           make_room([A, B], grid, 8) == [A, B],
           "16 - 8 = 8 patches are left")
    yield ("the block that leaves too few becomes a copy of the first, and none is dropped",
           make_room([A, B, C], grid, 6) == [A, B, A],
           "with the third 4 patches are left: [first, second, first]")
    yield ("so do all later ones, however small",
           make_room([A, B, C, D], grid, 6) == [A, B, A, A],
           "after a block that was too much the running count stays too small")
    yield ("patches in two blocks are hidden once",
           make_room([A, {4, 5, 8, 9}], grid, 10) == [A, {4, 5, 8, 9}],
           "0, 1, 4, 5, 8, 9 are hidden: 10 are left")
    yield ("only patches of the context count",
           make_room([A, B], grid - {2, 3}, 8) == [A, B],
           "of the second block only 6 and 7 lie in the context: 14 - 6 = 8 are left")
    chance = random.Random(0)
    draws = [[set(chance.sample(range(16), 4)) for _ in range(4)] for _ in range(50)]
    yield ("it is the module's rule",
           all(make_room(draw, grid, 6) == by_module(draw, 6) for draw in draws),
           "as MultiBlockMasking.make_room")


def by_module(blocks, min_keep):
    """What the mask sampler's rule makes of blocks on a 4 x 4 grid: a list of sets."""
    maps = torch.zeros(1, len(blocks), 16, dtype=torch.bool)
    for m, block in enumerate(blocks):
        maps[0, m, sorted(block)] = True
    sampler = MultiBlockMasking((4, 4), min_keep=min_keep)
    kept = sampler.make_room(maps, torch.ones(1, 16, dtype=torch.bool))[0][0]  # [M, N]
    return [set(row.nonzero()[:, 0].tolist()) for row in kept]


@exercise
def check_pad_contexts(pad_contexts):
    """Padding: shapes and types, what is real and its order, legal indices."""
    chance = random.Random(0)
    kept = [[0, *sorted(chance.sample(range(1, 16), length - 1))] for length in (5, 9, 7)]
    context, valid = pad_contexts(kept)
    yield ("both tensors are as long as the longest list",
           context.shape == valid.shape == (3, 9),
           "the shape is [3, 9]")
    yield ("indices are int64 and `valid` is bool",
           context.dtype == torch.int64 and valid.dtype == torch.bool,
           "`context` is int64, `valid` is bool")
    yield ("as many entries are real as patches are kept",
           valid.sum(1).tolist() == [5, 9, 7],
           "True at real patches, False at padding; patch 0 can be real, too: only the lists' "
           "lengths tell what is padding")
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
def check_momentum_for(momentum_for):
    """The momentum of a half-life: one step, ten steps, long runs."""
    yield ("half of the old value is forgotten after 1 step",
           equal(momentum_for(1), 0.5),
           "m = .5: the old value keeps the share m ** 1")
    yield ("half is forgotten after 10 steps",
           equal(momentum_for(10) ** 10, 0.5),
           "the share that is left after n steps is m ** n: it must be .5")
    yield ("it is right for long runs, too",
           equal(momentum_for(1000), 0.99930709),
           "half of it, not a share that is only near: 0.9993071")


@exercise
def check_answer_all(answer_all):
    """The predictor's forward: who sees whom, positions on both sides, blocks apart, all of it."""
    torch.manual_seed(0)
    predictor = models.Predictor(4, (4, 4), width=8, depth=2, heads=2)
    with torch.no_grad():
        predictor.mask_token.normal_()  # of a size that counts, as after training
    masks = MultiBlockMasking((4, 4), num_targets=2)(3, seeded(2))
    context, real = torch.randn(3, masks.context.shape[1], 4), masks.targets_valid
    found = answer_all(predictor, context, masks)
    shape = (*masks.targets.shape, 4)
    yield ("there is an answer for each question",
           tuple(getattr(found, "shape", ())) == shape,
           f"[B, M, Nt, D] is {list(shape)}")
    yield ("the answers are finite",
           bool(found.isfinite().all()),
           "NaN comes from a token that may attend to nothing: is the mask inverted?")
    padding = ~masks.context_valid[..., None]
    other = context.clone()
    other[1:] += torch.randn(4)
    yield ("the answers about an image come from its own context",
           equal(answer_all(predictor, other, masks)[0][real[0]], found[0][real[0]], 1e-4),
           "image 0's answers changed with the context of the others: row b * M + m of the batch "
           "needs the context of image b, as from repeat_interleave(M, 0), not from repeat; "
           "unflatten(0, (B, M)) undoes it")
    other = answer_all(predictor, torch.where(padding, context, context + torch.randn(4)), masks)
    yield ("the answers depend on the context",
           not equal(other[real], found[real], 1e-3),
           "other context tokens gave the same answers: is the mask inverted? True means: attend")
    other = answer_all(predictor, torch.where(padding, context + 5, context), masks)
    yield ("padding of the context has no influence",
           equal(other[real], found[real], 1e-4),
           "give `context_valid` to the blocks as part of `valid`")
    moved = Masks(masks.context, masks.context_valid, masks.targets.where(real, 9), real)
    yield ("padded questions have no influence",
           equal(answer_all(predictor, context, moved)[real], found[real], 1e-4),
           "give `targets_valid` to the blocks as part of `valid`")
    yield ("two places get two answers",
           not equal(found[0, 0, 0], found[0, 0, 1], 1e-3),
           "a question is the mask token plus the position of its place")
    shifted = Masks((masks.context + 5) % 16, masks.context_valid, masks.targets, real)
    yield ("it matters where a context token comes from",
           not equal(answer_all(predictor, context, shifted)[real], found[real], 1e-3),
           "add `predictor.positions[masks.context]` to the embedded context")
    turned = Masks(masks.context, masks.context_valid, masks.targets.flip(2), real.flip(2))
    yield ("asked in reverse order, the answers come in reverse order",
           equal(answer_all(predictor, context, turned).flip(2)[real], found[real], 1e-4),
           "the questions were joined after the context: the answers are the last Nt tokens")
    single = Masks(masks.context, masks.context_valid, masks.targets[:, :1], real[:, :1])
    yield ("the first block's answers do not depend on the second block",
           equal(answer_all(predictor, context, single)[:, 0][real[:, 0]],
                 found[:, 0][real[:, 0]], 1e-4),
           "each block is a row of the batch of its own: [B*M, Nc+Nt, Dp]")
    yield ("it is what predictor(context, masks) gives",
           equal(found[real], predictor(context, masks)[real], 1e-4),
           "embed, add positions, join, blocks, norm, project, and read off the last Nt tokens")


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


class Counting(torch.optim.SGD):
    """Plain gradient descent that counts its steps. (AdamW's first step has nearly the same length
    whatever the gradient, and so turns rounding into large differences.)"""

    steps = 0

    def step(self, closure=None):
        self.steps += 1
        return super().step(closure)


def toy(count):
    """A small I-JEPA, an optimizer for it, and `count` batches whose losses differ."""
    torch.manual_seed(0)
    encoder = models.Encoder(8, 1, 1, image_size=8, patch_size=2, channels=1)
    model = models.IJEPA(encoder, models.Predictor(8, (4, 4), width=8, depth=1, heads=1))
    with torch.no_grad():
        for p in model.context_encoder.parameters():  # the two encoders differ, as in a run
            p += 0.1 * torch.randn_like(p)
    trained = [p for p in model.parameters() if p.requires_grad]
    masking = MultiBlockMasking((4, 4), num_targets=2)
    batches = [((1 + i) * torch.randn(4, 1, 8, 8), masking(4, seeded(i))) for i in range(count)]
    return model, Counting(trained, lr=0.5), batches


def stepped(model, batches, momentum=0.9):
    """The weights after a step, by the definition: gradient of the mean loss, descent, EMA."""
    model = copy.deepcopy(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    loss = sum(model(*batch).loss for batch in batches) / len(batches)
    gradients = torch.autograd.grad(loss, trained)
    with torch.no_grad():
        for p, g in zip(trained, gradients):
            p -= 0.5 * g
    model.update_target(momentum)
    return loss.detach(), flat(model.context_encoder, model.predictor), flat(model.target_encoder)


def flat(*modules):
    """All weights of some modules in one vector."""
    return torch.cat([p.detach().flatten() for module in modules for p in module.parameters()])


@exercise
def check_train_step(train_step):
    """One step: EMA after the optimizer, stale gradients, accumulation, what is returned."""
    model, optimizer, batches = toy(1)
    old, (loss, trained, target) = flat(model.target_encoder), stepped(model, batches)
    found = train_step(model, optimizer, batches, 0.9)
    new = flat(model.context_encoder, model.predictor)
    yield ("context encoder and predictor are trained",
           not equal(new, flat(toy(1)[0].context_encoder, toy(1)[0].predictor)),
           "their weights are as before: call backward, then optimizer.step")
    yield ("the gradient is that of the loss",
           equal(new, trained),
           "optimizer.zero_grad, backward, optimizer.step, in this order, of the loss divided by "
           "the number of batches, here 1")
    followed = flat(model.context_encoder)
    yield ("the target encoder follows the *new* weights of the context encoder",
           equal(flat(model.target_encoder), 0.9 * old + 0.1 * followed),
           "model.update_target(momentum), with the momentum itself, after optimizer.step")
    yield ("it returns the loss, without its graph",
           equal(found, loss) and not getattr(found, "requires_grad", False),
           f"{loss:.4f}, detached: a loss that keeps its graph keeps all activations in memory")
    model, optimizer, batches = toy(1)
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    train_step(model, optimizer, batches, 0.9)
    yield ("gradients left over from an earlier step are cleared",
           equal(flat(model.context_encoder, model.predictor), trained),
           "optimizer.zero_grad() comes before backward")
    model, optimizer, batches = toy(3)
    loss, trained, target = stepped(model, batches)
    found = train_step(model, optimizer, batches, 0.9)
    yield ("three batches make one optimizer step",
           optimizer.steps == 1,
           f"the optimizer made {optimizer.steps}: gradients add up by themselves")
    yield ("their gradient is the mean, not the sum",
           equal(flat(model.context_encoder, model.predictor), trained, 1e-4),
           "zero_grad once, before the loop; each loss divided by the number of batches, then "
           "backward")
    yield ("the target encoder moves once",
           equal(flat(model.target_encoder), target, 1e-4),
           "update_target once, after the step")
    yield "it returns the mean of the losses", equal(found, loss), f"{loss:.4f}"


@exercise
def check_has_collapsed(has_collapsed):
    """The alarm: constant and one-directional features, healthy ones of any size."""
    torch.manual_seed(0)
    healthy, constant = torch.randn(256, 32), torch.randn(32).expand(256, -1)
    noisy, line = constant + 1e-3 * healthy, torch.randn(256, 1) * constant

    def rank(features):
        return f"diagnostics.rankme gives {diagnostics.rankme(features):.2f} of 32"

    yield "one vector for all images is a collapse", bool(has_collapsed(constant)), rank(constant)
    yield ("so is one vector with a little noise",
           bool(has_collapsed(noisy)),
           f"{rank(noisy)}; do not subtract the mean: only the noise would be left, of rank "
           f"{diagnostics.rankme(noisy - noisy.mean(0)):.0f}")
    yield ("so are features that differ in one direction only",
           bool(has_collapsed(line)),
           f"{rank(line)}, although they differ between images")
    yield ("random features have not collapsed",
           not has_collapsed(healthy),
           rank(healthy))
    skewed = healthy * 0.85 ** torch.arange(32)
    yield ("features with more variance in some directions than in others have not",
           not has_collapsed(skewed), f"{rank(skewed)}: many directions are left")
    yield ("nor have small ones",
           not has_collapsed(1e-3 * healthy),
           "scale is no sign of collapse: use shares, not sizes")
    yield ("nor large ones",
           not has_collapsed(1e3 * healthy),
           "scale is no sign of collapse: use shares, not sizes")


def sizes(model):
    """The deviation of each of a model's weights."""
    return torch.stack([p.detach().std(correction=0) for p in model.parameters()])


# Parts of all blocks that are left out, and where to look if that much is not the modules'.
ENCODER = {("attention", "MLP"): "patches: channels first; what comes in is added without its norm",
           ("MLP",): "attention: of the first norm, scores over the square root of the width, "
                     "added to what came in",
           (): "the MLP: of the second norm, GELU between its layers, added to what came in"}
PREDICTOR = {("attention", "MLP"): "mask token plus position of the target, last norm (eps=1e-6), "
                                   "output layer; the answers are the last Nt tokens",
             ("MLP",): "context tokens, embedded and with their positions, joined with the "
                       "questions; scores over the square root of *this* width, 32",
             (): "the MLP is as the encoder's"}
LAST = {"attention": "attention.project", "MLP": "mlp.2"}  # the layer that ends a part


def without(parts, *models_):
    """Copies of models, ordered like the modules', in whose blocks some parts give 0."""
    names = [name for name, _ in models_[-1].named_parameters()]
    copies = copy.deepcopy(models_)
    with torch.no_grad():
        for model in copies:
            for name, p in zip(names, model.parameters()):
                if any(LAST[part] in name for part in parts):
                    p.zero_()
    return copies


def context_tokens(model, images, masks):
    """What a model's context encoder gives in a forward pass; None if it is not called as such."""
    caught = []
    hook = model.context_encoder.register_forward_hook(lambda *call: caught.append(call[2]))
    model(images, masks)
    hook.remove()
    return caught[0].detach() if caught else None


def names_of(parts):
    return f", without {' and '.join(parts)}" if parts else ""


def sampled_alike(mine, theirs):
    """Properties of two samplers' maps of context and targets, each bool [n, 36], n = 4000.

    The limits are 4 to 6 standard errors of the difference.
    """
    (context, targets), (their_context, their_targets) = mine, theirs
    often, right = targets.float().mean(0), their_targets.float().mean(0)  # [N]
    yield ("every patch is a target in some image", bool((often > 0).all()),
           "the last place of a corner is included: H - h + 1 places")
    counts = [maps.sum(1) for maps in (targets, their_targets)]  # of targets in an image
    shares = [torch.bincount(count, minlength=37).cumsum(0) / len(count) for count in counts]
    yield ("the blocks hide as many patches as the modules'",
           bool(((shares[0] - shares[1]).abs() < 0.05).all()),
           "an image has {:.1f} targets (deviation {:.1f}), with the modules {:.1f} ({:.1f}): "
           "four blocks, each of an area drawn uniformly from .15 to .2 of the grid".format(
               *(f(count.float()).item() for count in counts for f in (torch.mean, torch.std))))
    beside = [(grid[:, :, 1:] & grid[:, :, :-1]).sum((1, 2)).float().mean().item()
              for grid in (maps.view(-1, 6, 6) for maps in (targets, their_targets))]
    yield ("the blocks are as wide and as high as the modules'",
           abs(beside[0] - beside[1]) < 0.22,
           f"an image has {beside[0]:.1f} pairs of targets side by side, with the modules "
           f"{beside[1]:.1f}: aspect is height over width, a random number of its own, drawn "
           "uniformly from .75 to 1.5")
    yield ("patches are targets as often as the modules'",
           bool(((often - right).abs() < 0.06).all()),
           "every place of the corner is as likely as any other")
    kept, right = context.float().mean(0), their_context.float().mean(0)
    yield ("patches are context as often as the modules'",
           bool(((kept - right).abs() < 0.06).all()),
           f"patch 0 is kept in {kept[0]:.0%} of the images, with the modules in {right[0]:.0%}: "
           "draw the 12 at random from those that are left")


@exercise
def check_whole(whole):
    """The capstone against the modules: weights, masks, targets, predictions, loss, one step."""
    torch.manual_seed(0)
    model, draw_masks, train_step = whole()
    whole.last = ""  # three objects: nothing to be read off
    config = settings.from_preset("shapes", precision="fp32")
    reference, masking = train.build(config)
    shapes = [[list(p.shape) for p in m.parameters()] for m in (model, reference)]
    names = [name for name, _ in reference.named_parameters()]
    first = next((f"number {i} is {a}, the modules' {name} is {b}"
                  for i, (a, b, name) in enumerate(zip(*shapes, names)) if a != b),
                 f"there are {len(shapes[0])}, the modules have {len(names)}")
    yield "the parameters have the modules' shapes, in their order", shapes[0] == shapes[1], first
    trained = [p.requires_grad for p in model.parameters()]
    yield ("the target encoder, and nothing else, is without gradient",
           trained == [p.requires_grad for p in reference.parameters()],
           "copy.deepcopy(context_encoder).requires_grad_(False)")
    close = (sizes(model) - sizes(reference)).abs() < 0.25 * sizes(reference) + 0.01
    yield ("the weights begin with the modules' size",
           bool(close.all()),
           f"{names[int((~close).int().argmax())]} differs: Xavier for linear layers, biases 0, "
           "the patch embedding doubled, the mask token .02")
    yield ("the target encoder begins as a copy of the context encoder",
           equal(flat(model.target_encoder), flat(model.context_encoder)),
           "copy it after the weights are drawn")

    masks, theirs = draw_masks(4000, seeded()), masking(4000, seeded())
    context, targets = masks.maps(36)
    yield ("no context patch is a target",
           not (context & targets.any(1)).any(),
           "take the targets away from the context")
    one, other = (draw_masks(50, seeded()) for _ in range(2))
    yield ("all random numbers come from the generator",
           torch.equal(one.context, other.context) and torch.equal(one.targets, other.targets),
           "the same seed must give the same masks; torch.randperm takes a generator, too")
    yield ("12 different context patches are kept, none of them padding",
           masks.context.shape == (4000, 12) and bool((context.sum(1) == 12).all()),
           "context is [B, 12], context_valid is True everywhere; a block that would leave fewer "
           "than 12 is left out")
    yield ("the blocks of an image are one list, without doubles",
           targets.shape[1] == 1 and equal(targets.sum(-1), masks.targets_valid.sum(-1)),
           "targets is [B, 1, Nt], the union of the blocks; targets_valid is True where it is real")
    their_context, their_targets = theirs.maps(36)
    yield from sampled_alike((context, targets.any(1)), (their_context, their_targets.any(1)))
    yield ("a block may leave just 12", int(targets.sum((1, 2)).max()) == 24,
           "fewer than 12 are too few, 12 are enough")

    with torch.no_grad():
        for mine, right in zip(model.parameters(), reference.parameters()):
            mine.copy_(right + 0.02 * torch.randn_like(right))  # no bias is 0
            right.copy_(mine)
    images, masks = torch.randn(8, 3, 24, 24, generator=seeded(1)), masking(8, seeded(2))
    yield ("the target encoder's tokens are finite", model.target_encoder(images).isfinite().all(),
           "NaN comes from a token that may attend to nothing: is the mask inverted?")
    inner = "attention", "MLP"
    bare = without(inner, model, reference)
    first, second = bare[0].target_encoder(images[:2])
    yield ("a block whose attention and MLP give 0 changes nothing", not equal(first, second, 1e-3),
           "all images got the same tokens: attention and MLP are *added* to what came in")
    yield (f"of a black image the target encoder gives the modules' tokens{names_of(inner)}",
           equal(*(m.target_encoder(0 * images) for m in bare)),
           "positions (the column's half first; sines, then cosines), last norm (eps=1e-6)")
    for parts, right in ENCODER.items():
        mine, theirs = (m.target_encoder(images) for m in without(parts, model, reference))
        yield (f"the target encoder gives the modules' tokens{names_of(parts)}",
               equal(mine, theirs), right)
    mine, theirs = (context_tokens(m, images, masks) for m in (model, reference))
    yield ("the context encoder gives the modules' tokens", mine is None or equal(mine, theirs),
           "patches are taken after positions are added and before the first block; True in "
           "context_valid means: may be attended to")
    output, expected, real = model(images, masks), reference(images, masks), masks.targets_valid
    yield "`tokens` are the target encoder's", equal(output.tokens, expected.tokens), "as they are"
    yield ("the targets are the modules'",
           equal(output.targets[real], expected.targets[real]),
           "encode the whole image, layer-norm each token, then take the targets")
    alone = images[:1], masking(1, seeded(2))  # no padding
    for parts, right in PREDICTOR.items():
        mine, theirs = (m(*alone).predictions for m in without(parts, model, reference))
        yield f"the predictions are the modules'{names_of(parts)}", equal(mine, theirs), right
    yield ("the predictions are the modules' in a batch with padding",
           equal(output.predictions[real], expected.predictions[real]),
           "padded targets get no weight: their scores are -infinity before the softmax")
    mine, theirs = (m(*alone).loss for m in (model, reference))
    yield ("the loss is the modules'", equal(mine, theirs),
           f"of one image {theirs:.5f}, not {mine:.5f}: smooth L1, the mean over width and targets")
    yield ("the loss is the modules' in a batch with padding", equal(output.loss, expected.loss),
           f"{expected.loss:.5f}, not {output.loss:.5f}: the mean over *real* targets, each "
           "counting the same")
    optimizers = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.5)
                  for m in (model, reference)]
    def both_step(seed):
        batch = torch.randn(8, 3, 24, 24, generator=seeded(seed)), masking(8, seeded(seed))
        optimizers[1].zero_grad()
        loss = reference(*batch).loss
        loss.backward()
        optimizers[1].step()
        reference.update_target(0.9)
        return train_step(model, optimizers[0], *batch, 0.9), loss

    def same(*parts):
        one, other = (flat(*(getattr(m, part) for part in parts)) for m in (model, reference))
        return equal(one, other, 1e-4)

    found, loss = both_step(3)
    yield ("after a step context encoder and predictor are the modules'",
           same("context_encoder", "predictor"),
           "optimizer.zero_grad, backward, optimizer.step, in this order")
    yield ("after a step the target encoder is the modules'",
           same("target_encoder"),
           "target = momentum * target + (1 - momentum) * context, of the *new* weights: after the "
           "optimizer's step")
    both_step(4)
    yield ("so it is after a second step",
           same("context_encoder", "predictor", "target_encoder"),
           "zero_grad: the gradients of the first step must not stay")
    yield ("a step returns the loss, without its graph",
           equal(found, loss, 1e-4) and not getattr(found, "requires_grad", False),
           "loss.detach()")
