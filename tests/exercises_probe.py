"""Checks of the exercises in Linear_Probe.ipynb: each states properties of an answer.

A check takes the reader's function, tries the properties on small made-up data, and prints
"passed", the first property that does not hold, or "not attempted". Notation: n training and m test
images, D features, K classes.
"""

import functools
import math

import torch
import torch.nn.functional as F

import diagnostics
import models


class NotAttempted(Exception):
    """The function is still the stub, which returns None."""


class Wrong(Exception):
    """A property does not hold; the message says which."""


def claim(holds, what):
    """Raise Wrong, with the property in words, unless it holds."""
    if not holds:
        raise Wrong(what)


def exercise(check):
    """Turn a function that raises into a check that prints; it takes the reader's function."""
    name = f"exercise {check.__name__.removeprefix('check_')}"

    @functools.wraps(check)
    def run(answer):
        def attempt(*arguments):
            found = answer(*arguments)
            if found is None:
                raise NotAttempted
            return found

        try:
            check(attempt)
            print(f"{name}: passed")
        except NotAttempted:
            print(f"{name}: not attempted")
        except Wrong as property:
            print(f"{name}: not yet. This should hold: {property}")
        except Exception as error:  # whatever the reader's code raises must not stop the notebook
            print(f"{name}: not yet. It raised {type(error).__name__}: {error}")

    return run


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def is_close(a, b, tolerance=1e-5):
    """Whether two tensors (or numbers) agree in shape and value."""
    a, b = torch.as_tensor(a, dtype=torch.float64), torch.as_tensor(b, dtype=torch.float64)
    return a.shape == b.shape and torch.allclose(a, b, atol=tolerance, rtol=tolerance)


@exercise
def check_pooled(pooled):
    encoder = models.Encoder(16, 1, 1, image_size=8, patch_size=4)  # 4 patches
    images = torch.randn(3, 3, 8, 8, generator=seeded())
    found = pooled(encoder, images)
    claim(isinstance(found, torch.Tensor) and found.shape == (3, 16),
          "3 images give one feature of 16 numbers each, [3, 16] "
          f"(got {list(getattr(found, 'shape', []))})")
    claim(not found.requires_grad, "no gradient is kept: the encoder is frozen")
    claim(is_close(pooled(encoder, images[:1]), found[:1], 1e-4),
          "the feature of an image does not depend on the others in its batch")
    claim(is_close(found, encoder(images).mean(1).detach(), 1e-4),
          "the feature is the mean over the N patch tokens")


@exercise
def check_standardised(standardised):
    scales = torch.tensor([1.0, 10.0, 0.1, 1.0])
    train = 3 + 5 * torch.randn(500, 4, generator=seeded()) * scales
    test = 7 + torch.randn(40, 4, generator=seeded(1))
    x, y = standardised(train, test)
    claim(x.shape == train.shape and y.shape == test.shape, "both sets keep their shapes")
    claim(is_close(x.mean(0), torch.zeros(4), 1e-3), "every training feature has mean 0")
    claim(is_close(x.std(0), torch.ones(4), 1e-2),
          "every training feature has deviation 1, each divided by its own")
    claim(is_close(standardised(train, test + 100)[0], x),
          "the training set does not depend on the test set")
    claim(is_close(standardised(train, test[:1])[1], y[:1]),
          "a test image does not depend on the other test images")
    claim(is_close(y, (test - train.mean(0)) / train.std(0), 2e-2),
          "the test set is moved and divided by the *training* mean and deviation")
    constant = torch.cat([train, torch.full((500, 1), 0.1)], 1)
    x, y = standardised(constant, constant[:5])
    claim(x.isfinite().all() and (x[:, 4].abs() < 1e-3).all() and (y[:, 4].abs() < 1e-3).all(),
          "a feature that never changes becomes 0, not NaN and not rounding noise")


@exercise
def check_set_aside(set_aside):
    labels = torch.arange(3).repeat_interleave(torch.tensor([300, 200, 50]))
    labels = labels[torch.randperm(550, generator=seeded(5))]
    held = set_aside(labels, seeded())
    claim(isinstance(held, torch.Tensor) and held.dtype == torch.bool
          and held.shape == labels.shape, "one bool for each image")
    claim(held.any() and not held.all(), "some images are set aside and some are left")
    counts = labels[held].bincount(minlength=3).tolist()
    claim(counts == [30, 20, 5], "a tenth of every class is set aside: of 300, 200 and 50 images, "
          f"30, 20 and 5 (got {counts})")
    claim(torch.equal(held, set_aside(labels, seeded())), "the same generator, the same choice")
    claim(not torch.equal(held, set_aside(labels, seeded(1))),
          "another generator gives another choice: the images are drawn, not the first ones")


@exercise
def check_optimism(optimism):
    def mean(heads, images, accuracy=0.6):
        return float(optimism(heads, images, accuracy, 2000, seeded()))

    deviation = math.sqrt(0.6 * 0.4 / 100)  # of one head's accuracy on 100 images
    claim(abs(mean(1, 100)) < 0.1 * deviation, "one head alone: on average its test accuracy is "
          "its true accuracy, so the optimism is 0")
    claim(mean(10, 100) > 0, "the best of several scores above its true accuracy")
    claim(mean(50, 100) > mean(10, 100) > mean(2, 100),
          "the more heads compete, the larger the optimism")
    claim(mean(10, 1000) < mean(10, 100), "the more test images, the smaller the optimism")
    two = deviation / math.sqrt(math.pi)
    claim(abs(mean(2, 100) - two) < 0.15 * deviation, "with two heads it is deviation / sqrt(pi), "
          f"for 100 images and accuracy .6 {two:.3f} (got {mean(2, 100):.3f})")


@exercise
def check_vote(vote):
    train_x, train_y = torch.randn(60, 8, generator=seeded()), torch.arange(60) % 3
    queries = torch.randn(20, 8, generator=seeded(1))

    def answers(bank, x, k=5, temperature=0.07):
        return [int(vote(bank, train_y, one, k, temperature)) for one in x]

    found, lengths = answers(train_x, queries), torch.linspace(0.1, 9, 60)[:, None]
    nearest = [int(train_y[F.cosine_similarity(one[None], train_x).argmax()]) for one in queries]
    claim(answers(train_x, queries, k=1) == nearest,
          "with k = 1 the answer is the class of the image of highest cosine")
    claim(answers(train_x * lengths, queries) == found,
          "cosine: the length of a feature does not matter")
    query, labels = torch.tensor([1.0, 0.0]), torch.tensor([0, 1, 1, 2, 2])
    bank = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.8, -0.6], [-1.0, 0.1], [-1.0, 0.2]])
    claim(int(vote(bank, labels, query, 3, 0.07)) == 0,
          "a nearer neighbour weighs more: exp(cosine / temperature)")
    claim(int(vote(bank, labels, query, 3, 100.0)) == 1,
          "at a high temperature all k neighbours weigh the same, and the majority wins")
    labels = torch.tensor([0, 0, 1, 1, 1])
    bank = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.0, 1.0], [0.0, 1.0]])
    claim(int(vote(bank, labels, query, 2, 100.0)) == 0, "only the k nearest vote")
    truth = torch.arange(20) % 3
    right = (torch.tensor(found) == truth).float().mean()
    claim(is_close(right, diagnostics.knn(train_x, train_y, queries, truth, k=5)),
          "the accuracy is that of diagnostics.knn")


@exercise
def check_needed(needed):
    counts, curve = [2, 5, 10, 20], [0.3, 0.5, 0.45, 0.8]
    claim(needed(counts, curve, 0.75) == 20,
          "the count whose accuracy reaches what is wanted: .75 is reached with 20")
    claim(needed(counts, curve, 0.45) == 5, "the *smallest* count that reaches it, even where the "
          "curve dips later: .45 is reached with 5")
    claim(needed(counts, curve, 0.5) == 5, "exactly reached is reached")
    claim(needed(counts, curve, 0.1) == 2, "what every count reaches is reached with 2, the least")
    claim(needed(counts, curve, 0.9) == math.inf,
          "what no count reaches needs more labels than were tried: math.inf")


@exercise
def check_confused(confused):
    labels, predictions = torch.tensor([0, 0, 0, 1, 1, 3]), torch.tensor([0, 1, 1, 1, 0, 3])
    found = torch.as_tensor(confused(labels, predictions, 4))
    claim(found.shape == (4, 4), "K x K numbers, also where a class does not occur "
          f"(got {list(found.shape)} for K = 4)")
    claim(int(found.sum()) == 6, "every image is counted once")
    claim(found.sum(1).tolist() == [3, 2, 0, 1],
          "a row is a *true* class: its sum is how many images that class has")
    claim(found.sum(0).tolist() == [2, 3, 0, 1],
          "a column is an answer: its sum is how often it was given")
    claim(found.tolist() == [[1, 2, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1]],
          "each cell counts the images of the row's class that were answered with the column's")


@exercise
def check_parts(parts):
    table = {"I-JEPA": {"frozen": 0.60, "fine-tuned": 0.70},
             "MAE": {"frozen": 0.35, "fine-tuned": 0.55}}
    found = parts(table)
    claim(len(found) == 2, "two numbers: what the method explains, and what the protocol explains")
    method, protocol = map(float, found)
    claim(is_close(method + protocol, 0.60 - 0.55),
          "the two add up to frozen I-JEPA minus fine-tuned MAE")
    claim(is_close(method, 0.60 - 0.35), "the first compares two methods under *one* protocol, "
          "the frozen one: I-JEPA minus MAE")
    claim(is_close(protocol, 0.35 - 0.55), "the second compares two protocols on *one* method, "
          "MAE: frozen minus fine-tuned")
