"""What a frozen encoder knows: a linear probe and a nearest-neighbour vote, beside a random encoder and raw pixels.

    python evaluate.py RUN          prints the table and writes RUN/evaluation.json

The features are the average of the patch tokens (appendix A.1); nothing here changes a weight of the encoder. Everything that
is tuned is tuned on part of the training images; the test images are looked at once. `n` images, `D` features, `K` classes.
"""

import dataclasses
import datetime
import json
import os
import platform
import shlex
import sys
import time
import warnings
from pathlib import Path

import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits  # comes with scikit-learn
from tqdm import tqdm

import config
import data
import models
import train
from diagnostics import knn

# Weights of the squared norm beside the *mean* cross-entropy, so that one grid serves 1,000 and 50,000 images; strongest first.
STRENGTHS = tuple(10.0**e for e in range(2, -8, -1))
ROWS = {"target": "target encoder", "context": "context encoder", "random": "random encoder", "pixels": "raw pixels"}
PIXEL_SIDE = {4: 32, 5: 16}  # larger images (volumes) are shrunk to this for the pixel rows: 224 x 224 x 3 features would take hours


# ---- features ----

@torch.no_grad()
def features(encoder, dataset, image_size, device, batch_size=512):
    """Average of the patch tokens of every image, float32 [n, D] on the CPU, the encoder's mode left as found (appendix A.1)."""
    was_training = encoder.training
    encoder.eval()
    try:
        batches = data.batches(dataset, batch_size, image_size, device)
        total = -(-len(dataset) // batch_size)
        pooled = [encoder(images).float().mean(1).cpu()                            # [B, N, D] -> [B, D]
                  for images in tqdm(batches, "features", total, leave=False, disable=None)]
    finally:
        encoder.train(was_training)
    return torch.cat(pooled)                                                       # [n, D]


def pixels(dataset, image_size):
    """The normalised images themselves as features, float32 [n, C*H*W] on the CPU; the baseline that any encoder must beat."""
    return torch.cat([images.float().flatten(1).cpu() for images in data.batches(dataset, 512, image_size, "cpu")])


# ---- which images ----

def class_rank(labels, seed):
    """Place of every image in a random order of its own class, int64 [n], and the random order of all images it came from, int64 [n]."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    rank = torch.empty(len(labels), dtype=torch.int64)
    for c in labels.unique():
        members = order[labels[order] == c]
        rank[members] = torch.arange(len(members))
    return rank, order


def subsample(dataset, n, seed):
    """A random `n` images with as many of each class as there are (to within one); all of them when `n` is 0 or too large."""
    if n == 0 or n >= len(dataset):
        return dataset
    rank, order = class_rank(dataset.labels, seed)
    taken = order[rank[order].argsort(stable=True)][:n]  # every class's first image, then every class's second, ...
    return dataset.subset(taken.sort().values)


# ---- linear probe ----

def standardise(train_x, test_x):
    """Both [n, D] sets with the *training* mean removed and divided by the training deviation, float32; a constant feature becomes 0."""
    deviation, mean = torch.std_mean(train_x.float(), 0, correction=0)             # [D], [D]
    # Rounding gives a constant feature a deviation of about 1e-7 of its mean; dividing by that would turn it into noise.
    scale = torch.where(deviation > 1e-6 * mean.abs(), deviation, torch.inf)
    return (train_x - mean) / scale, (test_x - mean) / scale


def fit(classifier, x, y, strength):
    """Fit at this strength from wherever the classifier stands (`warm_start`), and return it."""
    classifier.set_params(C=1 / (strength * len(y)))  # scikit-learn weighs the *sum* of the losses against half the squared norm
    with warnings.catch_warnings():
        # Not converging is all right: the path goes from strong to weak, so stopping early leaves a fit a little more strongly
        # regularised than its name says, and how good that fit is was measured on held-out images, not assumed.
        warnings.simplefilter("ignore", ConvergenceWarning)
        return classifier.fit(x, y)


def linear_probe(train_x, train_y, test_x, test_y, seed=0, strengths=STRENGTHS):
    """Test accuracy of multinomial logistic regression on frozen features, as a fraction.

    `train_x` [n, D] and `test_x` [m, D] are float, the labels int64 [n] and [m]. A tenth of the training images, the same share
    of every class, chooses the strength; the fit is then repeated on all training images, and the test set is scored once.
    Gives `accuracy`, `strength`, `held_out_accuracy` and `at_edge` (the choice is the grid's strongest, so a stronger one might be better;
    the weakest of STRENGTHS is as good as none).
    Raises UsageError for fewer than two classes, or when no class has an image to hold out. Differs from the paper's protocol
    (appendix A.1: SGD, batch norm, a sweep of learning rates): this problem is convex, so a solver needs no learning rate.
    """
    if len(train_x) != len(train_y) or len(test_x) != len(test_y):
        raise ValueError(f"a label for every image expected, got {len(train_y)} for {len(train_x)} and {len(test_y)} for {len(test_x)}")
    held_out = class_rank(train_y, seed)[0] % 10 == 1  # from the second image on, so that every class is left with one to learn from
    if not held_out.any() or len(train_y.unique()) < 2:
        raise config.UsageError(f"a probe needs two classes and two images of one, got {train_y.bincount().tolist()} of each")
    train_x, test_x = standardise(train_x, test_x)
    strengths = sorted(strengths, reverse=True)
    classifier = LogisticRegression(warm_start=True, max_iter=1000, tol=1e-4)
    path = []  # (held-out accuracy, weights, biases) at each strength
    # One thread: on features this small, the threads of NumPy's and SciPy's BLAS wait for each other, up to 40 times slower.
    fit_x, fit_y, held_x, held_y = (part.numpy() for keep in (~held_out, held_out) for part in (train_x[keep], train_y[keep]))
    with threadpool_limits(1, "blas"):
        for strength in strengths:
            fit(classifier, fit_x, fit_y, strength)
            score = classifier.score(held_x, held_y)
            path.append((score, classifier.coef_, classifier.intercept_))
            best = max(range(len(path)), key=lambda i: path[i][0])  # the first, so the strongest, of equals
            if len(path) - best > 2 and score < path[best][0] > path[-2][0]:
                break  # the last two were worse than the best: weaker strengths only overfit more
        _, classifier.coef_, classifier.intercept_ = path[best]
        fit(classifier, train_x.numpy(), train_y.numpy(), strengths[best])
        accuracy = float(classifier.score(test_x.numpy(), test_y.numpy()))
    return {"accuracy": accuracy, "strength": strengths[best], "held_out_accuracy": float(path[best][0]),
            "at_edge": best == 0}


# ---- all of it ----

def evaluate(encoders, train_set, test_set, image_size, device="cpu", seed=0, batch_size=512):
    """Linear probe and kNN of every encoder of the dict, and of the raw pixels, on two labelled `ImageDataset`s.

    Gives for each name `linear` and `knn` (fractions), the probe's `strength`, `held_out_accuracy` and `at_edge`, and `seconds` per part.
    """
    parts = {name: lambda dataset, encoder=encoder: features(encoder, dataset, image_size, device, batch_size)
             for name, encoder in encoders.items()}
    parts["pixels"] = lambda dataset: pixels(dataset, min(image_size, PIXEL_SIDE[len(train_set.images.shape)]))
    results = {}
    for name, extract in parts.items():
        start = time.perf_counter()
        train_x, test_x = extract(train_set), extract(test_set)
        extracted = time.perf_counter()
        probe = linear_probe(train_x, train_set.labels, test_x, test_set.labels, seed)
        probed = time.perf_counter()
        neighbours = knn(*(part.to(device) for part in (train_x, train_set.labels, test_x, test_set.labels)))
        seconds = {"features": extracted - start, "linear": probed - extracted, "knn": time.perf_counter() - probed}
        results[name] = {"linear": probe.pop("accuracy"), "knn": neighbours, **probe, "seconds": seconds}
    return results


def table(results):
    """The text that `main` prints, from what it writes to evaluation.json: percents, and differences in points."""
    scores, sizes = results["features"], results["split_sizes"]
    lines = [f"{results['dataset']}: {sizes['train']:,} training and {sizes['test']:,} test images, "
             f"{100 * results['chance']:.1f}% by chance; percent, and points over the baselines", "",
             f"{'':16}{'linear':>8}{'- random':>10}{'- pixels':>10}{'kNN':>10}{'- random':>10}{'- pixels':>10}"]
    for name, score in scores.items():
        line = f"{ROWS.get(name, name):16}"
        for measure, width in (("linear", 8), ("knn", 10)):
            line += f"{100 * score[measure]:{width}.1f}"
            for baseline in ("random", "pixels"):  # a baseline has no difference from itself, nor pixels from a random encoder
                compared = baseline in scores and name not in ("random", "pixels") or (name, baseline) == ("random", "pixels")
                line += f"{100 * (score[measure] - scores[baseline][measure]):+10.1f}" if compared else " " * 10
        lines.append(line.rstrip())
    edge = [ROWS.get(name, name) for name, probe in results["probe"].items() if probe["at_edge"]]
    if edge:
        lines += ["", f"The probe chose its strongest regularisation for: {', '.join(edge)}. A stronger one might score higher."]
    if "target" in scores and scores["pixels"]["knn"] > scores["target"]["knn"]:
        lines += ["", "The raw pixels' kNN beats the target encoder's here: among the labelled images some match pixel by pixel,",
                  "and the cosine of pooled features is not the distance that a probe learns (README, How accuracy is measured)."]
    return "\n".join(lines)


# ---- command line ----

def labelled(name, split, data_dir, image_size, n, seed):
    """The labelled split of a data set, cut to `n` images (0 is all); raises UsageError where there are no labels."""
    dataset = data.load(name, split, data_dir, image_size)
    if dataset.labels is None:
        raise config.UsageError(f"evaluation needs labels, and the {split} split of {name} has none")
    return subsample(dataset, n, seed)


def random_encoder(run_config, about, device, seed):
    """An encoder of the run's architecture as it was before any training, drawn from `seed`; `about` is what load_run gives."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return models.build(run_config, about["channels"], about["axes"]).target_encoder.to(device)


def arguments(argv):
    """The command line as a namespace."""
    parser = config.Parser(prog="evaluate.py", description="Linear probe and kNN of a pretrained encoder, beside its baselines.")
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder that train.py wrote")
    parser.add_argument("--train-images", type=int, default=10000, help="labelled training images; 0 is all (default 10000)")
    parser.add_argument("--test-images", type=int, default=0, help="test images; 0 is all (default 0)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the subsets, the held-out images and the random encoder (default 0)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="auto takes cuda, else mps, else cpu")
    parser.add_argument("--dataset", help="labelled data with a train and a test split, where it is not what the run was trained on")
    parser.add_argument("--data-dir", help="folder of the data, where it is not the one the run was trained from")
    args = parser.parse_args(argv)
    if min(args.train_images, args.test_images) < 0:
        raise config.UsageError("--train-images and --test-images must be 0 (all) or more")
    return args


def main(argv=None):
    """Evaluate one run: print the table, write RUN/evaluation.json; raises UsageError for what the user can put right."""
    args, start = arguments(argv), time.perf_counter()
    device = train.pick_device(args.device)
    model, run_config, about = train.load_run(args.run, device)
    size, data_dir = run_config.image_size, args.data_dir or run_config.data_dir
    name = args.dataset or run_config.dataset
    train_set = labelled(name, "train", data_dir, size, args.train_images, args.seed)
    test_set = labelled(name, "test", data_dir, size, args.test_images, args.seed)
    if train_set.images.shape[1] != about["channels"]:
        raise config.UsageError(f"{name} has {train_set.images.shape[1]} channels, the run's encoder takes {about['channels']}")
    encoders = {"target": model.target_encoder, "context": model.context_encoder,
                "random": random_encoder(run_config, about, device, args.seed)}
    scores = evaluate(encoders, train_set, test_set, size, device, args.seed)
    results = {
        "dataset": name, "split_sizes": {"train": len(train_set), "test": len(test_set)},
        # What answering the commonest class every time would score.
        "chance": test_set.labels.bincount().max().item() / len(test_set),
        "features": {name: {"linear": score["linear"], "knn": score["knn"]} for name, score in scores.items()},
        "probe": {name: {key: score[key] for key in ("strength", "held_out_accuracy", "at_edge")} for name, score in scores.items()},
        "config": dataclasses.asdict(run_config),
        "commands": [config.command(run_config), "python evaluate.py " + shlex.join(sys.argv[1:] if argv is None else map(str, argv))],
        "training": about["progress"],
        "hardware": {"processor": platform.processor() or platform.machine(), "cpus": os.cpu_count(), "torch": torch.__version__,
                     "gpu": torch.cuda.get_device_name() if device.type == "cuda" else None},
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "seconds": {"total": time.perf_counter() - start, **{name: score["seconds"] for name, score in scores.items()}},
    }
    print(table(results))
    train.write(args.run / "evaluation.json", lambda path: Path(path).write_text(json.dumps(results, indent=2)))


if __name__ == "__main__":
    config.run(main)
