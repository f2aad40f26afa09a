"""What the frozen encoder knows: linear probe and nearest neighbors, next to two baselines.

    python evaluate.py RUN                      prints a table and writes RUN/evaluation.json
    python evaluate.py RUN1 RUN2 RUN3           the same for each, then mean and deviation
    python evaluate.py RUN --dataset cifar10    transfer: writes RUN/evaluation-cifar10.json

An image's features are the average of its patch tokens (paper appendix A.2). The baselines are an
untrained encoder of the same architecture and the raw pixels: only what exceeds them was learned.
The probe is tuned on part of the training images; the test images are predicted once.
Notation: n training images, m test images, D features, K classes.
"""

import contextlib
import copy
import math
import shlex
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import confusion_matrix
from threadpoolctl import threadpool_limits
from torch import nn
from tqdm import tqdm

import data
import diagnostics
import train
from config import UsageError, check, parse_size
from models import Encoder
from support import checkpoint, command_line
from support.results import ROWS, provenance, summary, table, write_json

# --- features -------------------------------------------------------------------------------------


@torch.no_grad()
def features(encoder, dataset, image_size, device="cpu", batch_size=None):
    """Average of the patch tokens of every image, float32 [n, D] on the CPU (appendix A.2).

    image_size: pixels. batch_size: 512 if None, fewer above 96 pixels. The encoder computes in eval
    mode; its mode is restored.
    """
    if batch_size is None:
        area = image_size**2 if isinstance(image_size, int) else math.prod(image_size)
        batch_size = max(1, min(512, 512 * 96**2 // area))
    batches = data.batches(dataset, batch_size, image_size, device)
    total, was_training, pooled = math.ceil(len(dataset) / batch_size), encoder.training, []
    encoder.eval()
    for images in tqdm(batches, "features", total, leave=False, disable=None):
        pooled.append(encoder(images).float().mean(dim=1).cpu())  # [B, D]
    encoder.train(was_training)
    return torch.cat(pooled)  # [n, D]


def pixels(dataset, image_size):
    """The normalized pixels as features, float32 [n, C*H*W]: what there is without an encoder.

    Images are shrunk to 32 pixels a side where larger, volumes to 16.
    """
    size = min(image_size, {2: 32, 3: 16}[dataset.shape[1]])
    return torch.cat([images.flatten(1) for images in data.batches(dataset, 512, size)])


# --- which images ---------------------------------------------------------------------------------


def class_rank(labels, seed):
    """Each image's place, from 0, in a random order of its own class; int64 [n]."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    rank = torch.empty(len(labels), dtype=torch.int64)
    for c in labels.unique():
        members = order[labels[order] == c]
        rank[members] = torch.arange(len(members))
    return rank


def subsample(dataset, n, seed):
    """A random n of the images, equally many of each class to within one; all if n is 0."""
    if n == 0 or n >= len(dataset):
        return dataset
    rank = class_rank(dataset.labels, seed)
    return dataset.subset(rank.argsort(stable=True)[:n].sort().values)  # each class's first, ...


def held_out(labels, seed):
    """True at a tenth of the images, the same share of every class; bool [n].

    Raises UsageError if there are fewer than two classes, or no class has an image to spare.
    """
    held = class_rank(labels, seed) % 10 == 1  # never a class's only image
    if not held.any() or len(labels.unique()) < 2:
        raise UsageError("a probe needs two classes and two images of one of them, got "
                         f"{labels.bincount().tolist()} of each; try a larger --train-images")
    return held


# --- the linear probe -----------------------------------------------------------------------------


def standardize(train_x, test_x):
    """Features [n, D] and [m, D] minus the *training* mean, divided by the training deviation.

    This is batch norm without affine parameters in eval mode. A constant feature becomes 0.
    """
    deviation, mean = torch.std_mean(train_x, dim=0, correction=0)  # [D], [D]
    # A constant's deviation is rounding, about 1e-7 of its mean: dividing by it would give noise.
    deviation = torch.where(deviation > 1e-6 * mean.abs(), deviation, torch.inf)
    return (train_x - mean) / deviation, (test_x - mean) / deviation


STRENGTHS = (10.0, 1.0, 0.1, 1e-2, 1e-3, 1e-4, 1e-5)


def fit(model, x, y, strength):
    """Fit a LogisticRegression, from the weights it has, to x [n, D] and y [n]; returns it.

    It minimizes the mean cross-entropy + strength / 2 * |weights|**2. The solver stops once no
    gradient exceeds `tol`. That must be far below `strength`: where images are fewer than features,
    the gradient of the cross-entropy vanishes and the penalty's alone leads to the optimum.
    """
    model.set_params(C=1 / (strength * len(y)), tol=min(1e-4, strength / 1000))
    with threadpool_limits(1):  # threads would wait for each other at every small product
        return model.fit(x, y)


def linear_probe(train_x, train_y, test_x, test_y, seed=0, strengths=STRENGTHS, batch_norm=True):
    """Multinomial logistic regression on frozen features, standardized unless batch_norm is False.

    train_x float [n, D], test_x float [m, D], labels int64 [n] and [m], on any device. A tenth of
    the training images chooses the strength of the L2 penalty; the fit is repeated on all of them,
    and the test images are predicted once. Returns a dict: accuracy (a fraction of the test
    images), predictions (int64 [m] on the CPU), strength, held_out_accuracy, converged.
    Differs: the paper sweeps learning rates of SGD (appendix A.2); the problem is convex, and
    scikit-learn's L-BFGS has no rate to choose. Raises UsageError as `held_out` does.
    """
    if batch_norm:
        train_x, test_x = standardize(train_x, test_x)
    held = held_out(train_y.cpu(), seed).numpy()  # [n]
    # Large problems take float32, a third of the time: the solver then stops where rounding does,
    # with an objective that is right to 1e-4 and an accuracy to about .1 points.
    precision = torch.float64 if train_x.numel() < 5e6 else torch.float32
    x, test_x = (part.cpu().to(precision).numpy() for part in (train_x, test_x))
    y, test_y = train_y.cpu().numpy(), test_y.cpu()
    model, best_accuracy = LogisticRegression(max_iter=10_000, warm_start=True), -1.0
    for strength in sorted(strengths, reverse=True):  # each fit starts from the one before
        accuracy = fit(model, x[~held], y[~held], strength).score(x[held], y[held])
        if accuracy > best_accuracy:
            best, best_accuracy, best_strength = copy.deepcopy(model), accuracy, strength
        elif accuracy < best_accuracy - math.sqrt(best_accuracy * (1 - best_accuracy) / held.sum()):
            break  # a standard error below the best: weaker penalties overfit more
    fit(best, x, y, best_strength)
    predictions = torch.from_numpy(best.predict(test_x))  # [m]
    return {"accuracy": (predictions == test_y).double().mean().item(), "predictions": predictions,
            "strength": best_strength, "held_out_accuracy": best_accuracy,
            "converged": bool(best.n_iter_.max() < best.max_iter)}


def score(train_x, train_y, test_x, test_y, seed=0):
    """All that is read from one set of features, ready for JSON.

    linear, knn: accuracies, fractions; strength: of the probe's penalty; converged; of the probe's
    answers also per_class (K accuracies) and confusion ([K][K] counts, a row for each true class).
    """
    probe = linear_probe(train_x, train_y, test_x, test_y, seed)
    classes = range(int(max(train_y.max(), test_y.max())) + 1)
    confusion = confusion_matrix(test_y, probe["predictions"], labels=classes)  # [K, K]
    per_class = confusion.diagonal() / confusion.sum(axis=1).clip(min=1)  # [K]
    return {"linear": probe["accuracy"], "knn": diagnostics.knn(train_x, train_y, test_x, test_y),
            "strength": probe["strength"], "converged": probe["converged"],
            "per_class": per_class.tolist(), "confusion": confusion.tolist()}


# --- the encoders of a run ------------------------------------------------------------------------


def build_encoder(config, about):
    """The Encoder that a run's Config describes; about: what its checkpoint says of its data."""
    return Encoder(*parse_size(config.encoder), (config.image_size,) * about["axes"],
                   config.patch_size, about["channels"])


def untrained_encoder(config, about, seed=0):
    """An encoder of a run's architecture as it is before training, its weights from the seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build_encoder(config, about).eval()


def load_encoders(folder, device="cpu"):
    """The encoders of any run folder, in eval mode, its Config and a dict about data and progress.

    ({"target": Encoder, "context": Encoder}, config, about). Methods that have one encoder, such as
    MAE, give it as "target". Raises UsageError if the checkpoint is missing or damaged.
    """
    config, about, state = checkpoint.load(folder)
    found = {}
    for name in ("target", "context"):
        prefix = f"{name}_encoder."
        weights = {key.removeprefix(prefix): value for key, value in state["model"].items()
                   if key.startswith(prefix)}
        if weights:
            found[name] = build_encoder(config, about)
            checkpoint.load_weights(found[name], weights, folder)
            found[name].to(device).eval()
    return found if "target" in found else {"target": found["context"]}, config, about


# --- one run --------------------------------------------------------------------------------------


def test_images(train_set, about, name, *where):
    """The test split of the data set whose train split is given.

    Raises UsageError if there is none, if labels are missing, or if the images do not fit the
    encoder that `about`, from load_encoders, describes.
    """
    if train_set.shape != (about["channels"], about["axes"]):
        raise UsageError("{} has images of {} channels and {} axes, ".format(name, *train_set.shape)
                         + "the encoder takes {channels} and {axes}".format(**about))
    try:
        test_set = data.load(name, "test", *where)
    except UsageError as error:
        raise UsageError(f"evaluation needs test images: {error}") from None
    if train_set.labels is None or test_set.labels is None:
        raise UsageError(f"evaluation needs labels, and {name} has none; name labeled data with "
                         "--dataset")
    return test_set


def compare(encoders, train_set, test_set, image_size, device="cpu", seed=0):
    """`score` of each encoder of a dict and of "pixels", on two labeled ImageDatasets: a dict."""
    held_out(train_set.labels, seed)  # raises now, not after minutes
    found = {}
    for name, encoder in {**encoders, "pixels": None}.items():
        x, test_x = (features(encoder, part, image_size, device) if encoder is not None else
                     pixels(part, image_size) for part in (train_set, test_set))
        found[name] = score(x, train_set.labels, test_x, test_set.labels, seed)
    return found


def collapse_measures(folder, encoder, dataset, seed, device):
    """Measures of collapse on up to 512 of the images, and what they warn of: a dict."""
    model, masking = nn.ModuleDict({"target_encoder": encoder}), None
    with contextlib.suppress(UsageError):  # other methods have no predictions of features
        model, masking, *_ = train.load_run(folder, device)
    chosen = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))[:512]
    batches = data.batches(dataset.subset(chosen), 128, encoder.image_size, device)
    found = diagnostics.measure(model, masking, torch.cat(list(batches)))
    # Measures from before training are not known here: only the absolute thresholds can warn.
    return {"measures": found, "warnings": [*diagnostics.warnings(found, found, 1.0).values()]}


def measure_run(encoders, config, about, args, seed, device):
    """What evaluation.json holds of the data and the features, and the images to measure on."""
    name = args.dataset or config.dataset
    where = args.data_dir or config.data_dir, config.image_size
    train_set = data.load(name, "train", *where)
    if train_set.labels is None and not args.dataset:
        dataset = train_set if config.split == "train" else data.load(name, config.split, *where)
        held = train.hold_out(config, len(dataset))[1]
        if len(held) < 2:  # one image differs from no other
            raise UsageError(f"{name} has no labels, and too few images to hold some out; name "
                             "labeled data with --dataset")
        return {"dataset": name, "features": {}}, dataset.subset(held)
    test_set = test_images(train_set, about, name, *where)
    train_set = subsample(train_set, args.train_images, seed)
    test_set = subsample(test_set, args.test_images, seed)
    if len(test_set) < 2:
        raise UsageError(f"evaluation needs two test images or more, {name} has {len(test_set)}; "
                         "add some, or try a larger --test-images")
    rows = {**encoders, "random": untrained_encoder(config, about, seed).to(device)}
    return {
        "dataset": name, "split_sizes": {"train": len(train_set), "test": len(test_set)},
        # What answering the commonest class every time would score.
        "chance": test_set.labels.bincount().max().item() / len(test_set),
        "class_names": test_set.class_names,
        "features": compare(rows, train_set, test_set, config.image_size, device, seed),
    }, test_set


def evaluate_run(folder, args, command):
    """Evaluate one run folder: write what was found as JSON, print it as a table, and return it."""
    start, device = time.perf_counter(), train.pick_device(args.device)
    encoders, config, about = load_encoders(folder, device)
    seed = config.seed if args.seed is None else args.seed
    results, measured = measure_run(encoders, config, about, args, seed, device)
    program = about.get("program")  # weights from elsewhere have none
    trained = [command_line.command(config, program)] if program else []
    results |= {
        "width": encoders["target"].width,
        **collapse_measures(folder, encoders["target"], measured, seed, device),
        "seed": seed, "seconds": time.perf_counter() - start, "training": about["progress"],
        "commands": [*trained, command], **provenance(device), "config": asdict(config)}
    results["warnings"] += [f"the linear probe of the {ROWS[name]} did not converge"
                            for name, row in results["features"].items() if not row["converged"]]
    transfer = results["dataset"] != config.dataset
    name = f"evaluation-{Path(results['dataset']).stem}.json" if transfer else "evaluation.json"
    write_json(Path(folder) / name, results)
    print(table(results))
    return results


# --- command line ---------------------------------------------------------------------------------


def parse(argv):
    """The command line as a namespace."""
    p = command_line.Parser(description="Probe a run's frozen features.")
    p.add_argument("runs", nargs="+", metavar="RUN", help="run folder")
    p.add_argument("--dataset", help="labeled data, if not what the run was trained on")
    p.add_argument("--data-dir", help="folder of the data, if not the run's")
    p.add_argument("--train-images", type=int, default=10_000,
                   help="labeled training images, equally many per class; 0 is all [10000]")
    p.add_argument("--test-images", type=int, default=0, help="test images; 0 is all [0]")
    p.add_argument("--seed", type=int, help="seed of the subsets, the held-out images and the "
                   "untrained encoder [the run's]")
    p.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"))
    args = p.parse_args(argv)
    for name in ("train_images", "test_images", "seed"):
        check((getattr(args, name) or 0) >= 0, name, getattr(args, name), "0 or more")
    return args


def main(argv=None):
    """The command line: print a table and write RUN/evaluation.json for each run."""
    args = parse(argv)
    used = {args.dataset or checkpoint.load(folder)[0].dataset for folder in args.runs}
    if len(used) > 1:  # checked now, not after minutes of evaluation
        raise UsageError(f"a mean over runs of {' and '.join(sorted(used))} is meaningless; "
                         "evaluate them one by one, or on the same --dataset")
    command = "python evaluate.py " + shlex.join(sys.argv[1:] if argv is None else map(str, argv))
    runs = [evaluate_run(folder, args, command) for folder in args.runs]
    if len(runs) > 1 and all(run["features"] for run in runs):
        print(f"\n{summary(runs)}")


if __name__ == "__main__":
    command_line.run(main)
