"""What can be read from features: linear and attentive probes, kNN precision, few labels, fine-tuning, similarity of two encoders.

Functions of tensors; `evaluate.py` is the protocol that calls them. Everything that is tuned here is tuned on a tenth of the
*training* images; test images are predicted once. `n` training and `m` test images, `D` features, `K` classes, `N` patches.
"""

import copy
import math

import torch
import torch.nn.functional as F
from sklearn.metrics import confusion_matrix, f1_score
from torch import nn
from tqdm import tqdm

import data
from config import UsageError

# Weights of the squared norm beside the *mean* cross-entropy, so that one grid serves 1,000 and 50,000 images; strongest first.
STRENGTHS = tuple(10.0**e for e in range(2, -8, -1))
HEADS = {"last": (1, False), "last+bn": (1, True), "last4": (4, False), "last4+bn": (4, True)}  # layers, batch norm
LOW_SHOT = (2, 5, 10, 20, 50, 100, 200, 500)  # labelled images of each class


# ---- which images


def class_rank(labels, seed):
    """Place of every image in a random order of its own class, int64 [n], and the random order of all images it came from, int64 [n]."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    rank = torch.empty(len(labels), dtype=torch.int64)
    for c in labels.unique():
        members = order[labels[order] == c]
        rank[members] = torch.arange(len(members))
    return rank, order


def held_out(labels, seed):
    """True at a tenth of the images, the same share of every class, bool [n]. Raises UsageError where that leaves nothing to learn from."""
    held = class_rank(labels, seed)[0] % 10 == 1  # from the second image on, so that every class is left with one to learn from
    if not held.any() or len(labels.unique()) < 2:
        raise UsageError(f"a probe needs two classes and two images of one, got {labels.bincount().tolist()} of each")
    return held


# ---- linear probe


def standardise(train_x, test_x, batch_norm=True):
    """Both [n, D] sets with the *training* mean removed and divided by the training deviation, float32; a constant feature becomes 0.

    That is what batch norm without affine does in evaluation. Without `batch_norm` one deviation, that of all features, divides them all.
    """
    deviation, mean = torch.std_mean(train_x.float(), 0, correction=0)  # [D], [D]
    # Rounding gives a constant feature a deviation of about 1e-7 of its mean; dividing by that would turn it into noise.
    scale = torch.where(deviation > 1e-6 * mean.abs(), deviation, torch.inf)  # [D]
    if not batch_norm:
        scale = torch.where(scale.isinf(), scale, deviation.square().mean().sqrt())
    return (train_x - mean) / scale, (test_x - mean) / scale


def principal_axes(x):
    """Orthonormal axes [D, r] of the rows of x [n, D] and the variance along each, [r]; r = min(n, D)."""
    n, D = x.shape
    if n < D:  # the solution lies among the rows, so n axes are enough
        variance, left = torch.linalg.eigh(x @ x.T / n)  # [n], [n, n]
        return F.normalize(x.T @ left, dim=0), variance.clamp(min=0)
    variance, axes = torch.linalg.eigh(x.T @ x / n)
    return axes, variance.clamp(min=0)


def fit(x, y, variance, strength, weight, bias):
    """Weights [r, K] and biases [K] of multinomial logistic regression with strength/2 times the squared norm, started from those given.

    x [n, r] lies along its principal axes. The problem is solved in units in which the loss curves about equally in every
    direction, so that L-BFGS needs tens of steps instead of thousands; the optimum is the same.
    """
    unit = (0.1 * variance + strength).rsqrt()[:, None]  # [r, 1]; a probability p of .1 curves the loss by p (1 - p) variance
    scaled, bias = (weight / unit).requires_grad_(), bias.clone().requires_grad_()
    solver = torch.optim.LBFGS([scaled, bias], max_iter=100, history_size=20, tolerance_grad=1e-5, tolerance_change=1e-7,
                               line_search_fn="strong_wolfe")

    def loss():
        solver.zero_grad()
        weight = unit * scaled  # [r, K]
        value = F.cross_entropy(x @ weight + bias, y) + strength / 2 * weight.square().sum()
        value.backward()
        return value

    solver.step(loss)
    return (unit * scaled).detach(), bias.detach()


def linear_probe(train_x, train_y, test_x, test_y, seed=0, strengths=STRENGTHS, batch_norm=True):
    """Multinomial logistic regression on frozen features: a dict with the test `accuracy`, a fraction, and the `predictions`, int64 [m].

    train_x [n, D] and test_x [m, D] float, labels int64 [n] and [m], on one device. A tenth of the training images, the same share of
    every class, chooses the strength (`strength`, `held_out_accuracy`; `at_edge`: the grid's strongest was chosen); the fit is
    repeated on all training images, and the test set predicted once. Raises UsageError for fewer than two classes, or when no
    class has an image to hold out. Differs from the paper's protocol (appendix A.2: SGD and a sweep of learning rates): the
    problem is convex, so a solver needs no learning rate.
    """
    if len(train_x) != len(train_y) or len(test_x) != len(test_y):
        raise ValueError(f"a label for every image expected, got {len(train_y)} for {len(train_x)} and {len(test_y)} for {len(test_x)}")
    held = held_out(train_y.cpu(), seed).to(train_x.device)
    train_x, test_x = standardise(train_x, test_x, batch_norm)
    axes, variance = principal_axes(train_x)
    train_x, test_x = train_x @ axes, test_x @ axes  # [n, r], [m, r]
    weight = torch.zeros(axes.shape[1], int(train_y.max()) + 1, device=train_x.device)
    bias, path = weight[0], []  # path: (held-out accuracy, strength, weights, biases)
    for strength in sorted(strengths, reverse=True):
        weight, bias = fit(train_x[~held], train_y[~held], variance, strength, weight, bias)
        score = ((train_x[held] @ weight + bias).argmax(1) == train_y[held]).float().mean().item()
        path.append((score, strength, weight, bias))
        best = max(range(len(path)), key=lambda i: path[i][0])  # the first, so the strongest, of equals
        if len(path) - best > 2 and score < path[best][0] > path[-2][0]:
            break  # the last two were worse than the best: weaker strengths only overfit more
    score, strength, weight, bias = path[best]
    weight, bias = fit(train_x, train_y, variance, strength, weight, bias)
    predictions = (test_x @ weight + bias).argmax(1)  # [m]
    return {"accuracy": (predictions == test_y).float().mean().item(), "strength": strength, "held_out_accuracy": score,
            "at_edge": best == 0, "predictions": predictions.cpu()}


def layers(features, count):
    """The last `count` layers' features side by side: [n, L, D] -> [n, count * D] (fewer where the encoder has fewer)."""
    return features[:, -count:].flatten(1)


def probe_heads(train_x, train_y, test_x, test_y, seed=0):
    """The paper's four heads (appendix A.2) on features [n, L, D] and [m, L, D]: last layer or last four, with and without batch norm.

    Gives name -> what `linear_probe` gives, and the name that the held-out images choose. The paper reports the best on the test set.
    """
    heads = {name: linear_probe(layers(train_x, count), train_y, layers(test_x, count), test_y, seed, batch_norm=norm)
             for name, (count, norm) in HEADS.items() if count == 1 or train_x.shape[1] > 1}
    return heads, max(heads, key=lambda name: heads[name]["held_out_accuracy"])


# ---- scores


def scores(predictions, labels, K):
    """Of predictions int64 [m]: `macro_f1`, `per_class` (accuracy of each class, K floats) and `confusion` ([K][K] counts, rows true)."""
    confusion = torch.from_numpy(confusion_matrix(labels, predictions, labels=range(K)))
    return {"macro_f1": float(f1_score(labels, predictions, average="macro", labels=labels.unique().tolist())),
            "per_class": (confusion.diag() / confusion.sum(1).clamp(min=1)).tolist(), "confusion": confusion.tolist()}


@torch.no_grad()
def retrieval_precision(train_x, train_y, test_x, test_y, k=5):
    """Mean share, over test images, of the k training images of highest cosine that have the same class; features [n, D], [m, D]."""
    train_x = F.normalize(train_x, dim=1)
    right = [(train_y[(F.normalize(x, dim=1) @ train_x.T).topk(k).indices] == y[:, None]).float().mean(1)  # [B]
             for x, y in zip(test_x.split(1024), test_y.split(1024))]
    return torch.cat(right).mean().item()


def low_shot(train_x, train_y, test_x, test_y, counts=LOW_SHOT, draws=3):
    """Linear probes on a few labels: mean and deviation over `draws` random choices of each count of labelled images a class.

    Counts of which some class has too few are left out. Gives {"per_class": counts used, "mean": [...], "std": [...]}, fractions.
    """
    fewest = train_y.bincount()[train_y.unique()].min().item()
    found = {"per_class": [count for count in counts if count <= fewest], "mean": [], "std": []}
    for count in found["per_class"]:
        accuracies = []
        for draw in range(draws):
            chosen = class_rank(train_y.cpu(), draw)[0] < count
            accuracies.append(linear_probe(train_x[chosen], train_y[chosen], test_x, test_y, draw)["accuracy"])
        std, mean = torch.std_mean(torch.tensor(accuracies))
        found["mean"].append(mean.item())
        found["std"].append(std.item())
    return found


def fold_accuracies(train_x, train_y, test_x, test_y, folds):
    """STL-10's protocol: one probe on each fold of 1,000 training images (int64 [1000] each), all on the whole test set; fractions."""
    return [linear_probe(train_x[fold], train_y[fold], test_x, test_y)["accuracy"] for fold in folds]


# ---- two encoders


def linear_cka(x, y):
    """Linear CKA (Kornblith et al. 2019), 0 to 1, of two encoders' features of the same images, [n, D1] and [n, D2]."""
    x, y = (part.double() - part.double().mean(0) for part in (x, y))
    return ((x.T @ y).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm())).item()


@torch.no_grad()
def neighbour_overlap(x, y, k=10):
    """Mean share of each image's k nearest others (cosine) that two encoders agree on; features [n, D1] and [n, D2] of the same images."""
    def neighbours(features):
        cosine = F.normalize(features.float(), dim=1) @ F.normalize(features.float(), dim=1).T  # [n, n]
        return cosine.fill_diagonal_(-2).topk(k).indices  # [n, k]

    return (neighbours(x)[:, :, None] == neighbours(y)[:, None, :]).any(2).float().mean().item()


# ---- heads that are trained step by step


class AttentiveHead(nn.Module):
    """One learned query attends to the patch tokens, and what it gathers is classified: tokens [B, N, D] -> logits [B, K]."""

    def __init__(self, width, classes, heads=4):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.query = nn.Parameter(torch.randn(width) * width**-0.5)
        self.kv = nn.Linear(width, 2 * width)
        self.classify = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, classes))

    def forward(self, tokens):
        k, v = self.kv(self.norm(tokens)).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)  # 2 of [B, nh, N, D/nh]
        q = self.query.view(self.heads, 1, -1).expand(len(tokens), -1, -1, -1)  # [B, nh, 1, D/nh]
        return self.classify(F.scaled_dot_product_attention(q, k, v).flatten(1))  # [B, K]


class Classifier(nn.Module):
    """An encoder with a linear head on its average-pooled tokens: images [B, C, H, W] -> logits [B, K]."""

    def __init__(self, encoder, classes):
        super().__init__()
        self.encoder, self.norm = encoder, nn.BatchNorm1d(encoder.width, affine=False)
        self.head = nn.Linear(encoder.width, classes)
        nn.init.zeros_(self.head.weight)  # the first steps then move the head, not yet the features

    def forward(self, images):
        return self.head(self.norm(self.encoder(images).mean(1)))  # [B, K]


def layer_groups(classifier, decay, weight_decay):
    """Parameter groups of a Classifier for AdamW, each with its share of the rate as `scale`: 1 for the head, and for each layer below
    `decay` times that of the one above (paper A.2). Biases and norms are not decayed.
    """
    depth, groups = len(classifier.encoder.blocks), []
    for name, parameter in classifier.named_parameters():
        if name.startswith("encoder.blocks."):
            layer = int(name.split(".")[2]) + 1
        else:
            layer = 0 if name.startswith("encoder.patch_embed") else depth + 1
        groups.append({"params": [parameter], "scale": decay ** (depth + 1 - layer), "weight_decay": weight_decay * (parameter.ndim > 1)})
    return groups


def train_head(model, groups, batches, labels, epochs, lr, smoothing, seed, description=""):
    """Train a classifier in place: AdamW, a tenth of the steps warming up, then half a cosine; cross-entropy with label smoothing.

    groups: parameters, each group with its `scale` of the rate; batches(order, size, generator) yields the inputs of the image numbers
    `order`, `size` at a time; labels int64 [n] on the model's device.
    """
    generator = torch.Generator(labels.device).manual_seed(seed)
    optimizer, size = torch.optim.AdamW(groups, lr=lr), 128
    total, step = epochs * -(-len(labels) // size), 0
    model.train()
    for _ in tqdm(range(epochs), description, leave=False, disable=None):
        order = torch.randperm(len(labels), generator=generator, device=labels.device)  # [n]
        for inputs, part in zip(batches(order, size, generator), order.split(size)):
            warm, done = total / 10, step / total
            share = step / warm if step < warm else (1 + math.cos(math.pi * done)) / 2
            for group in optimizer.param_groups:
                group["lr"] = lr * share * group["scale"]
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), labels[part], label_smoothing=smoothing).backward()
            optimizer.step()
            step += 1
    return model.eval()


@torch.no_grad()
def predict(model, inputs):
    """Predicted classes, int64 [m] on the CPU, for an iterable of input batches."""
    return torch.cat([model(part).argmax(1).cpu() for part in inputs])


def choose_rate(train, predict, labels, seed, rates):
    """Choose a learning rate on a tenth of the labels, then train on all: (trained model, rate, held-out accuracy).

    train(image numbers, rate) gives a model, predict(model, image numbers) its classes; labels int64 [n].
    """
    held = held_out(labels.cpu(), seed)
    kept, held = (part.nonzero()[:, 0] for part in (~held, held))
    path = [((predict(train(kept, rate), held) == labels.cpu()[held]).float().mean().item(), rate) for rate in rates]
    best, rate = max(path)
    return train(torch.arange(len(labels)), rate), rate, best


def attentive_probe(train_tokens, train_y, test_tokens, test_y, epochs=20, seed=0, rates=(3e-4, 1e-3, 3e-3)):
    """An AttentiveHead on frozen patch tokens [n, N, D] and [m, N, D]: `accuracy`, `rate`, `held_out_accuracy`, `predictions`.

    The learning rate is chosen on a tenth of the training images; the tokens may be half precision, on the labels' device.
    """
    def train(numbers, rate):
        torch.manual_seed(seed)
        numbers = numbers.to(train_y.device)
        head = AttentiveHead(train_tokens.shape[-1], int(train_y.max()) + 1).to(train_y.device)
        groups = [{"params": list(head.parameters()), "scale": 1.0, "weight_decay": 0.01}]
        return train_head(head, groups, lambda order, size, _: (train_tokens[numbers[part]].float() for part in order.split(size)),
                          train_y[numbers], epochs, rate, 0.0, seed, f"attentive probe, rate {rate:g}")

    with torch.random.fork_rng():
        head, rate, held = choose_rate(train, lambda head, numbers: predict(
            head, (train_tokens[part.to(train_y.device)].float() for part in numbers.split(512))), train_y, seed, rates)
    predictions = predict(head, (part.float() for part in test_tokens.split(512)))  # [m]
    return {"accuracy": (predictions == test_y.cpu()).float().mean().item(), "rate": rate, "held_out_accuracy": held,
            "predictions": predictions}


def fine_tune(encoder, train_set, test_set, image_size, device, epochs=20, layer_decay=0.75, smoothing=0.1, crop_scale=(0.5, 1.0),
              flip=True, seed=0, rates=(5e-4, 2e-3, 8e-3)):
    """Train a copy of the encoder with a linear head on labelled ImageDatasets (paper A.2): `accuracy`, `rate`, `held_out_accuracy`,
    `predictions`, and `model`, the trained Classifier in eval mode.

    layer_decay: rate of a layer over that of the one above; smoothing: of the labels. The rate is chosen on a tenth of the
    training images. The encoder given is left as it is.
    """
    labels = train_set.labels.to(device)

    def train(numbers, rate):
        torch.manual_seed(seed)
        model = Classifier(copy.deepcopy(encoder).requires_grad_(True), int(labels.max()) + 1).to(device)
        part = train_set.subset(numbers)
        return train_head(model, layer_groups(model, layer_decay, 0.05), lambda order, size, generator: data.batches(
            part, size, image_size, device, order.cpu(), generator, crop_scale, flip), labels[numbers.to(device)], epochs, rate, smoothing,
            seed, f"fine-tuning, rate {rate:g}")

    def classes(model, dataset):
        return predict(model, data.batches(dataset, 512, image_size, device))

    with torch.random.fork_rng():
        model, rate, held = choose_rate(train, lambda model, numbers: classes(model, train_set.subset(numbers)), labels, seed, rates)
    predictions = classes(model, test_set)
    return {"accuracy": (predictions == test_set.labels).float().mean().item(), "rate": rate, "held_out_accuracy": held,
            "predictions": predictions, "model": model}
