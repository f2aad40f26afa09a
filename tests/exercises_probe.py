"""Checks of the exercises in Linear_Probe.ipynb: each states properties of an answer.

Notation: n training and m test images, D features, K classes.
"""

import math

import torch
import torch.nn.functional as F

import diagnostics
import models
from exercises import equal, exercise, seeded


@exercise
def check_pooled(pooled):
    """The mean over the patch tokens, image by image, without a gradient."""
    encoder = models.Encoder(16, 1, 1, image_size=8, patch_size=4)  # 4 patches
    images = torch.randn(3, 3, 8, 8, generator=seeded())
    found = pooled(encoder, images)
    yield ("3 images give one feature of 16 numbers each, [3, 16]",
           found.shape == (3, 16),
           "the tokens are [B, N, D]: average over the N patches, dimension 1")
    yield ("no gradient is kept",
           not found.requires_grad,
           "the encoder is frozen: use torch.no_grad()")
    yield ("the feature of an image does not depend on the others in its batch",
           equal(pooled(encoder, images[:1]), found[:1], 1e-4),
           "average over patches, not over images")
    yield ("the feature is the mean over the N patch tokens",
           equal(found, encoder(images).mean(1).detach(), 1e-4),
           "encoder(images) gives the tokens, and .mean(1) their average")


@exercise
def check_standardized(standardized):
    """Training features get mean 0 and deviation 1; test features are moved by the same numbers."""
    scales = torch.tensor([1.0, 10.0, 1e-4, 1.0])
    train = 3 + 5 * torch.randn(500, 4, generator=seeded()) * scales
    test = 7 + torch.randn(40, 4, generator=seeded(1))
    x, y = standardized(train, test)
    yield ("both sets keep their shapes",
           x.shape == train.shape and y.shape == test.shape,
           "two tensors, as large as the two that came in")
    yield ("every training feature has mean 0",
           equal(x.mean(0), torch.zeros(4), 1e-3),
           "subtract the mean of the training images")
    yield ("every training feature has deviation 1, each divided by its own",
           equal(x.std(0), torch.ones(4), 1e-2),
           "the deviation over the images, dimension 0: one for each feature")
    yield ("the training set does not depend on the test set",
           equal(standardized(train, test + 100)[0], x),
           "mean and deviation come from the training images only")
    yield ("a test image does not depend on the other test images",
           equal(standardized(train, test[:1])[1], y[:1]),
           "a test image may be the only one: use the training mean and deviation")
    yield ("the test set is moved and divided by the *training* mean and deviation",
           equal(y, (test - train.mean(0)) / train.std(0), 2e-2),
           "both sets by the same two numbers for each feature")
    same = torch.full((500,), 1000.0)
    rounded = same.clone()
    rounded[::2] = torch.nextafter(same[::2], 2 * same[::2])  # the next number that there is
    for feature, kind, right in ((same, "never changes", "not NaN (0 / 0)"),
                                 (rounded, "changes by rounding only",
                                  "not rounding noise divided by rounding noise: its deviation is "
                                  "1e-7 of its mean")):
        constant = torch.cat([train, feature[:, None]], 1)
        x, y = standardized(constant, constant[:5])
        yield (f"a feature that {kind} becomes 0",
               x.isfinite().all() and (x[:, 4].abs() < 1e-3).all() and (y[:, 4].abs() < 1e-3).all(),
               right)


@exercise
def check_set_aside(set_aside):
    """A tenth of every class, drawn from the generator."""
    labels = torch.arange(3).repeat_interleave(torch.tensor([300, 200, 50]))
    labels = labels[torch.randperm(550, generator=seeded(5))]
    held = set_aside(labels, seeded())
    yield ("one bool for each image",
           isinstance(held, torch.Tensor) and held.dtype == torch.bool
           and held.shape == labels.shape,
           "a bool tensor as long as `labels`, True where an image is set aside")
    yield ("some images are set aside and some are left",
           bool(held.any() and not held.all()),
           "a tenth is set aside")
    counts = labels[held].bincount(minlength=3).tolist()
    yield ("a tenth of every class is set aside",
           counts == [30, 20, 5],
           f"of 300, 200 and 50 images 30, 20 and 5, not {', '.join(map(str, counts))}")
    yield ("the same generator, the same choice",
           torch.equal(held, set_aside(labels, seeded())),
           "draw from `generator`: torch.randperm(n, generator=generator)")
    yield ("another generator gives another choice: the images are drawn, not the first ones",
           not torch.equal(held, set_aside(labels, seeded(1))),
           "draw from `generator`: torch.randperm(n, generator=generator)")


@exercise
def check_probe(probe):
    """Standardized by the training images, penalty chosen on held-out ones, fitted again on all."""
    y, flip = torch.arange(360) % 3, torch.rand(360, generator=seeded(1)) < 0.5
    x = 0.5 * torch.randn(3, 40, generator=seeded(2))[y] + torch.randn(360, 40, generator=seeded())
    held = torch.arange(180) >= 90
    noisy = torch.where(flip[:180] & ~held, (y[:180] + 1 + torch.arange(180) // 3 % 2) % 3, y[:180])
    answer = probe(x[:180], noisy, x[180:], y[180:], held, (1.0, 1e-3))
    yield ("two numbers: an accuracy from 0 to 1, and one of the strengths",
           len(answer) == 2 and 0 <= float(answer[0]) <= 1 and float(answer[1]) in (1.0, 1e-3),
           "return (share of the test images that are right, strength), in this order")
    whole, with_one_more = (
        float(probe(x[:180], noisy, torch.cat([x[180:], far]), torch.cat([y[180:], y[: len(far)]]),
                    held, (1.0,))[0]) for far in (torch.empty(0, 40), torch.full((1, 40), 1e4)))
    yield ("a test image's answer does not depend on the other test images",
           abs(with_one_more - whole) < 0.02,
           f"one more test image, of huge features, made an accuracy of {whole:.2f} one of "
           f"{with_one_more:.2f}: standardize all by the *training* mean and deviation")
    wrong = torch.rand(360, generator=seeded(7))[:180] < 0.2  # held-out ones, too
    spoiled = torch.where(wrong, (y[:180] + 1 + torch.arange(180) // 3 % 2) % 3, y[:180])
    wide = 0.4 * torch.randn(3, 80, generator=seeded(2))[y] + torch.randn(360, 80,
                                                                          generator=seeded())
    yield ("the images that choose are not fitted while they do",
           float(probe(wide[:180], spoiled, wide[180:], y[180:], held, (1.0, 1e-3))[1]) == 1.0,
           "fit on `~held`, count on `held`: an image that was fitted is right by remembering, "
           "also where its label is wrong, and favors a weak penalty")
    moved = probe(x[:180], noisy, x[180:], (y[180:] + 1) % 3, held, (1.0, 1e-3))
    yield ("the test labels have no part in the choice",
           float(moved[1]) == float(answer[1]),
           "with other test labels the strength must be the same: choose on the held-out images")
    few = torch.arange(360) % 10 < 2
    unequal = 0.01 * torch.randn(360, 2, generator=seeded(3)) + 0.025 * few[:, None]
    unequal = unequal[:240], few[:240].long(), unequal[240:], few[240:].long()
    aside = torch.arange(240) >= 120
    yield ("a weak penalty is chosen where it is better, also for features of small scale",
           float(probe(*unequal, aside, (30.0, 1e-3))[1]) == 1e-3,
           "standardize, so that the penalty means the same at every scale, then compare both "
           "strengths on the held-out images")
    yield ("the last fit is on all training images",
           float(probe(x[:180], noisy, x[180:], y[180:], held, (1.0,))[0]) > 0.8,
           "fit again with the chosen strength, the held-out images included: here only their "
           "labels are all right, and the accuracy rises to about .9")


@exercise
def check_optimism(optimism):
    """No optimism for one head; more with more heads, less with more images; the closed form."""

    def mean(heads, images, accuracy=0.6):
        return float(optimism(heads, images, accuracy, 2000, seeded()))

    deviation = math.sqrt(0.6 * 0.4 / 100)  # of one head's accuracy on 100 images
    yield ("one head alone has no optimism",
           abs(mean(1, 100)) < 0.1 * deviation,
           "on average its test accuracy is its true accuracy, 0.6: the optimism is 0")
    yield ("the best of ten scores above its true accuracy, by more than a head's deviation",
           mean(10, 100) > deviation,
           "take the maximum over the heads within each draw, then the mean over the draws")
    yield ("the more heads compete, the larger the optimism",
           mean(50, 100) > mean(10, 100) > mean(2, 100),
           "the maximum of 50 is larger than that of 10")
    yield ("the more test images, the smaller the optimism",
           mean(10, 1000) < mean(10, 100),
           "each head's accuracy is a mean over the images")
    two = deviation / math.sqrt(math.pi)
    yield ("with two heads it is deviation / sqrt(pi)",
           abs(mean(2, 100) - two) < 0.15 * deviation,
           f"for 100 images and accuracy .6 that is {two:.3f}: every head guesses on its own")


@exercise
def check_knn_classes(knn_classes):
    """Weighted votes of the k nearest training images by cosine, for all test images at once."""
    train_x, train_y = torch.randn(60, 8, generator=seeded()), torch.arange(60) % 3
    queries = torch.randn(20, 8, generator=seeded(1))
    found = torch.as_tensor(knn_classes(train_x, train_y, queries, 5, 0.07))
    yield ("20 test images get one class each",
           found.shape == (20,),
           "votes are [m, K]: take the argmax over the classes, dimension 1")
    longer = torch.linspace(0.1, 9, 60)[:, None]
    yield ("the length of a training feature does not matter",
           equal(knn_classes(train_x * longer, train_y, queries, 5, 0.07), found),
           "the cosine is the dot product of features divided by their lengths: normalize both")
    yield ("the length of a test feature does not matter",
           equal(knn_classes(train_x, train_y, 9 * queries, 5, 0.07), found),
           "normalize the test features too: otherwise the temperature means something else")
    yield ("a test image's class does not depend on the other test images",
           equal(knn_classes(train_x, train_y, queries[3:4], 5, 0.07), found[3:4]),
           "sort and vote within each row, dimension 1")
    query, labels = torch.tensor([[1.0, 0.0]]), torch.tensor([0, 1, 1, 2, 2])
    bank = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.8, -0.6], [-1.0, 0.1], [-1.0, 0.2]])
    yield ("a nearer neighbor weighs more",
           equal(knn_classes(bank, labels, query, 3, 0.07), [0]),
           "its weight is exp(cosine / temperature): here one of cosine 1 outweighs two of 0.8")
    yield ("at a high temperature all k neighbors weigh the same, and the majority wins",
           equal(knn_classes(bank, labels, query, 3, 100.0), [1]),
           "exp(cosine / 100) is nearly 1 for all: two votes against one")
    labels = torch.tensor([0, 0, 1, 1, 1])
    bank = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.0, 1.0], [0.0, 1.0]])
    yield ("only the k nearest vote",
           equal(knn_classes(bank, labels, query, 2, 100.0), [0]),
           "the two nearest have class 0")
    truth = torch.arange(20) % 3
    yield ("the accuracy is that of diagnostics.knn",
           equal((found == truth).float().mean(),
                 diagnostics.knn(train_x, train_y, queries, truth, k=5)),
           "for 20 queries with k = 5")


@exercise
def check_choose_k(choose_k):
    """The k of the best leave-one-out accuracy on the training images."""
    y = torch.arange(80) % 2
    blobs = F.normalize(torch.randn(80, 6, generator=seeded(2)) + 4 * F.one_hot(y, 6), dim=1)
    wrong = torch.rand(80, generator=seeded(3)) < 0.2
    labels = torch.where(wrong, 1 - y, y)  # two clear classes, a fifth of the labels wrong
    found = choose_k(blobs, labels, (1, 15))
    yield ("the answer is one of the ks",
           found in (1, 15) and choose_k(blobs, labels, (5,)) == 5,
           "return the k itself, not its accuracy")
    yield ("where a fifth of the labels are wrong, 15 neighbors are better than one",
           found == 15,
           "with k = 1 every image finds itself and seems right: take it out of its own "
           "neighbors, for example by a cosine of -inf")
    angles = 2 * math.pi * torch.arange(80) / 80 - 0.07 * (torch.arange(80) % 2)
    pairs = torch.stack([angles.cos(), angles.sin()], 1)  # 40 pairs on a circle
    of_pairs = torch.randint(4, (40,), generator=seeded(4)).repeat_interleave(2)
    yield ("where images come in pairs of one class, one neighbor is best",
           choose_k(pairs, of_pairs, (1, 15)) == 1,
           "each k's accuracy is how often the vote of an image's k nearest others is right")
    group = torch.arange(80) % 8  # eight tight groups of ten, a fifth of the labels wrong
    groups = F.normalize(torch.randn(80, 8, generator=seeded(2)) + 16 * F.one_hot(group, 8), dim=1)
    flipped = torch.rand(80, generator=seeded(5)) < 0.2
    yield ("nearer neighbors weigh more, so that far ones do no harm",
           choose_k(groups, ((group < 3) ^ flipped).long(), (1, 40)) == 40,
           "each of the k votes with weight exp(cosine / 0.07): of 40 neighbors the 9 near ones "
           "decide, and they are right more often than the nearest alone")
    yield ("the order of the ks does not matter",
           choose_k(pairs, of_pairs, (15, 1)) == 1,
           "compare the accuracies, and return the k of the highest")
    yield ("the length of a feature does not matter",
           choose_k(blobs * (0.5 + wrong)[:, None], labels, (1, 15)) == 15,
           "neighbors are those of highest cosine: normalize the features")


@exercise
def check_needed(needed):
    """The smallest count that reaches an accuracy, exactly reached, never reached."""
    counts, rising, curve = [2, 5, 10, 20], [0.3, 0.5, 0.6, 0.8], [0.3, 0.5, 0.45, 0.8]
    yield ("the count whose accuracy reaches what is wanted",
           equal(needed(counts, rising, 0.75), 20),
           ".75 is reached with 20")
    yield ("exactly reached is reached",
           equal(needed(counts, rising, 0.5), 5),
           ".5 is reached with 5: >=, not >")
    yield ("the *smallest* count that reaches it, even where the curve dips later",
           equal(needed(counts, curve, 0.48), 5),
           ".48 is reached with 5, for the first time; the dip at 10 does not undo it")
    yield ("what every count reaches is reached with the least",
           equal(needed(counts, curve, 0.1), 2),
           ".1 is reached with 2")
    yield ("what no count reaches needs more labels than were tried: math.inf",
           equal(needed(counts, curve, 0.9), math.inf),
           ".9 is not reached: return math.inf")


@exercise
def check_confused(confused):
    """Rows are true classes, columns answers, empty classes keep their row."""
    labels, predictions = torch.tensor([0, 0, 0, 1, 1, 3]), torch.tensor([0, 1, 1, 1, 0, 3])
    found = torch.as_tensor(confused(labels, predictions, 4))
    yield ("K x K numbers, also where a class does not occur",
           found.shape == (4, 4),
           "for K = 4 the shape is [4, 4]")
    yield ("every image is counted once",
           int(found.sum()) == 6,
           "the six images make a sum of 6")
    yield ("a row is a *true* class",
           found.sum(1).tolist() == [3, 2, 0, 1],
           "the sums of the rows are how many images each class has: 3, 2, 0, 1")
    yield ("a column is an answer",
           found.sum(0).tolist() == [2, 3, 0, 1],
           "the sums of the columns are how often each answer was given: 2, 3, 0, 1")
    yield ("each cell counts the images of the row's class that were answered with the column's",
           found.tolist() == [[1, 2, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1]],
           "for example two images of class 0 were answered with 1")


@exercise
def check_parts(parts):
    """What the method explains and what the protocol explains, one changed at a time."""
    table = {"I-JEPA": {"frozen": 0.60, "fine-tuned": 0.70},
             "MAE": {"frozen": 0.35, "fine-tuned": 0.55}}
    found = parts(table)
    yield ("two numbers",
           len(found) == 2,
           "what the method explains, and what the protocol explains")
    method, protocol = map(float, found)
    yield ("the two add up to frozen I-JEPA minus fine-tuned MAE",
           equal(method + protocol, 0.60 - 0.55),
           "0.60 - 0.55 = 0.05")
    yield ("the first compares two methods under *one* protocol, the frozen one",
           equal(method, 0.60 - 0.35),
           "I-JEPA minus MAE: 0.60 - 0.35 = 0.25")
    yield ("the second compares two protocols on *one* method, MAE",
           equal(protocol, 0.35 - 0.55),
           "frozen minus fine-tuned: 0.35 - 0.55 = -0.20")


@exercise
def check_attentive_pool(attentive_pool):
    """Softmax over the patches of how well each fits one query; the weighted mean of the tokens."""
    tokens, query = torch.randn(3, 9, 4, generator=seeded()), torch.randn(4, generator=seeded(1))
    found = attentive_pool(tokens, query)
    yield ("3 images give one feature of 4 numbers each, [3, 4]",
           found.shape == (3, 4),
           "sum the weighted tokens over the N patches, dimension 1")
    same = attentive_pool(tokens[:, :1].expand(-1, 9, -1), query)
    yield ("where all patches are alike, the feature is that patch",
           equal(same, tokens[:, 0]),
           "the weights of an image sum to one: the softmax over its patches, dimension 1, then "
           "the *sum* of the weighted tokens")
    yield ("a query of zeros gives the mean over the patches",
           equal(attentive_pool(tokens, torch.zeros(4)), tokens.mean(1)),
           "all scores are 0, so every patch weighs 1/N: take the softmax over the patches, "
           "dimension 1")
    yield ("the feature of an image does not depend on the others in its batch",
           equal(attentive_pool(tokens[:1], query), found[:1]),
           "take the softmax over the patches of each image")
    best = (tokens @ query).argmax(1)
    yield ("a query of great length picks the patch that fits it best",
           equal(attentive_pool(tokens, 1e4 * query), tokens[torch.arange(3), best]),
           "the scores are dot products of the query with each token")
    weights = (tokens @ query / 2).softmax(1)  # [3, 9]
    yield ("the scores are divided by the square root of the width",
           equal(found, torch.einsum("bn,bnd->bd", weights, tokens)),
           "softmax(tokens @ query / sqrt(D)), as in attention: here sqrt(4) = 2")
    learned = query.clone().requires_grad_()
    yield ("the query gets a gradient: it is what is learned",
           attentive_pool(tokens, learned).requires_grad,
           "no torch.no_grad() here: the encoder is frozen, the query is not")
