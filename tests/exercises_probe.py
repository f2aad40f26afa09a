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
def check_standardised(standardised):
    """Training features get mean 0 and deviation 1; test features are moved by the same numbers."""
    scales = torch.tensor([1.0, 10.0, 0.1, 1.0])
    train = 3 + 5 * torch.randn(500, 4, generator=seeded()) * scales
    test = 7 + torch.randn(40, 4, generator=seeded(1))
    x, y = standardised(train, test)
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
           equal(standardised(train, test + 100)[0], x),
           "mean and deviation come from the training images only")
    yield ("a test image does not depend on the other test images",
           equal(standardised(train, test[:1])[1], y[:1]),
           "a test image may be the only one: use the training mean and deviation")
    yield ("the test set is moved and divided by the *training* mean and deviation",
           equal(y, (test - train.mean(0)) / train.std(0), 2e-2),
           "both sets by the same two numbers for each feature")
    constant = torch.cat([train, torch.full((500, 1), 0.1)], 1)
    x, y = standardised(constant, constant[:5])
    yield ("a feature that never changes becomes 0",
           x.isfinite().all() and (x[:, 4].abs() < 1e-3).all() and (y[:, 4].abs() < 1e-3).all(),
           "not NaN (0 / 0), and not rounding noise divided by rounding noise")


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
def check_optimism(optimism):
    """No optimism for one head; more with more heads, less with more images; the closed form."""

    def mean(heads, images, accuracy=0.6):
        return float(optimism(heads, images, accuracy, 2000, seeded()))

    deviation = math.sqrt(0.6 * 0.4 / 100)  # of one head's accuracy on 100 images
    yield ("one head alone has no optimism",
           abs(mean(1, 100)) < 0.1 * deviation,
           "on average its test accuracy is its true accuracy, 0.6: the optimism is 0")
    yield ("the best of several scores above its true accuracy",
           mean(10, 100) > 0,
           "take the maximum over the heads of each draw, then the mean over the draws")
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
def check_vote(vote):
    """Weighted votes of the k nearest images by cosine."""
    train_x, train_y = torch.randn(60, 8, generator=seeded()), torch.arange(60) % 3
    queries = torch.randn(20, 8, generator=seeded(1))

    def answers(bank, x, k=5, temperature=0.07):
        return [int(vote(bank, train_y, one, k, temperature)) for one in x]

    found, lengths = answers(train_x, queries), torch.linspace(0.1, 9, 60)[:, None]
    nearest = [int(train_y[F.cosine_similarity(one[None], train_x).argmax()]) for one in queries]
    yield ("with k = 1 the answer is the class of the image of highest cosine",
           answers(train_x, queries, k=1) == nearest,
           "the cosine is the dot product of features divided by their lengths")
    yield ("the length of a feature does not matter",
           answers(train_x * lengths, queries) == found,
           "the cosine is the dot product of features divided by their lengths")
    query, labels = torch.tensor([1.0, 0.0]), torch.tensor([0, 1, 1, 2, 2])
    bank = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.8, -0.6], [-1.0, 0.1], [-1.0, 0.2]])
    yield ("a nearer neighbour weighs more",
           int(vote(bank, labels, query, 3, 0.07)) == 0,
           "its weight is exp(cosine / temperature): here one of cosine 1 outweighs two of 0.8")
    yield ("at a high temperature all k neighbours weigh the same, and the majority wins",
           int(vote(bank, labels, query, 3, 100.0)) == 1,
           "exp(cosine / 100) is nearly 1 for all: two votes against one")
    labels = torch.tensor([0, 0, 1, 1, 1])
    bank = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.0, 1.0], [0.0, 1.0]])
    yield ("only the k nearest vote",
           int(vote(bank, labels, query, 2, 100.0)) == 0,
           "the two nearest have class 0")
    truth = torch.arange(20) % 3
    right = (torch.tensor(found) == truth).float().mean()
    yield ("the accuracy is that of diagnostics.knn",
           equal(right, diagnostics.knn(train_x, train_y, queries, truth, k=5)),
           "for 20 queries with k = 5")


@exercise
def check_needed(needed):
    """The smallest count that reaches an accuracy, exactly reached, never reached."""
    counts, curve = [2, 5, 10, 20], [0.3, 0.5, 0.45, 0.8]
    yield ("the count whose accuracy reaches what is wanted",
           equal(needed(counts, curve, 0.75), 20),
           ".75 is reached with 20")
    yield ("the *smallest* count that reaches it, even where the curve dips later",
           equal(needed(counts, curve, 0.45), 5),
           ".45 is reached with 5")
    yield ("exactly reached is reached",
           equal(needed(counts, curve, 0.5), 5),
           ".5 is reached with 5: >=, not >")
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
