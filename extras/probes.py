"""More of what the frozen encoder knows, and what it learns when it is not frozen.

    python evaluate.py RUN                           first: what follows uses its images and seed
    python -m extras.probes RUN                      heads, few labels, precision@5, STL-10's folds
    python -m extras.probes RUN --few-labels         only that: the curve of few labels
    python -m extras.probes RUN --attentive 20       only that: an attentive probe
    python -m extras.probes RUN --finetune 30        only that: the whole encoder on the labels
    python -m extras.probes RUN --compare OTHER      only that: how alike two encoders are
    python -m extras.probes RUN --segment            only that: where the synthetic shape is

Results are printed and added to RUN/evaluation.json, all accuracies as fractions:
    features.ROW.heads.HEAD   accuracy, held_out_accuracy, strength, converged of each head; ROW is
                              target, context, random or pixels, HEAD one of HEADS
    features.ROW.head, best   the head that the held-out images choose, and its test accuracy
    features.ROW.precision@5  mean share of the 5 nearest training images with the right class
    features.ROW.folds        STL-10 only: accuracies of ten probes on 1,000 images each
    low_shot                  per_class: numbers of labels; full: labels of each class in the data;
                              scores.ROW.mean, std: a list each, for target, random and pixels
    attentive, fine_tuned     .ROW: accuracy, held_out_accuracy, rate, for target and random
    compare.OTHER             cka, neighbor_overlap; the same of "untrained"
    segmentation.ROW          intersection over union of the patches on the shape, told from one
                              patch's token; "predicted": of hidden patches, from the predictor
Notation as in evaluate.py; L layers, N patches. What is tuned is tuned on a tenth of the training
images; test images are predicted once.
"""

import shlex
import statistics
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from torch import nn

import data
import evaluate
import train
from config import UsageError, check
from evaluate import class_rank, linear_probe
from extras.trained_heads import attentive_probe, fine_tune
from models import patchify, take
from support import command_line, shapes
from support.results import ROWS, read_json, write_json

HEADS = {"last": (1, False), "last+bn": (1, True), "last4": (4, False), "last4+bn": (4, True)}
LOW_SHOT = (2, 5, 10, 20, 50, 100, 200, 500)  # labeled images of each class

# --- the paper's four heads -----------------------------------------------------------------------


class LastLayers(nn.Module):
    """The tokens of an Encoder's last blocks, side by side: images [B, C, H, W] -> [B, N, L*D]."""

    def __init__(self, encoder, count=4):
        super().__init__()
        self.encoder, self.count = encoder, min(count, len(encoder.blocks))

    def forward(self, images):
        outputs = []
        hooks = [block.register_forward_hook(lambda module, inputs, output: outputs.append(output))
                 for block in self.encoder.blocks[-self.count:]]
        self.encoder(images)
        for hook in hooks:
            hook.remove()
        return torch.cat([self.encoder.norm(output) for output in outputs], dim=-1)  # [B, N, L*D]


def layer_features(encoder, dataset, image_size, device="cpu", count=4):
    """`evaluate.features` of each of the last blocks, float32 [n, L, D]; [:, -1] is the last."""
    layers = LastLayers(encoder, count)
    x = evaluate.features(layers, dataset, image_size, device)  # [n, L*D]
    return x.unflatten(1, (layers.count, -1))


def one_scale(train_x, test_x):
    """Both sets minus the training mean of each feature, divided by one deviation for all."""
    deviation, mean = torch.std_mean(train_x, dim=0, correction=0)  # [D], [D]
    scale = deviation.square().mean().sqrt()
    return (train_x - mean) / scale, (test_x - mean) / scale


def probe_heads(train_x, train_y, test_x, test_y, seed=0):
    """The paper's heads (appendix A.2) on features [n, L, D] and [m, L, D]: of the last layer or of
    the last four, with and without batch norm.

    Returns name -> what linear_probe gives, and the name that the held-out images choose. Differs:
    the paper reports the best on the test set.
    """
    found = {}
    for name, (count, batch_norm) in HEADS.items():
        if count == 1 or train_x.shape[1] > 1:
            parts = train_x[:, -count:].flatten(1), test_x[:, -count:].flatten(1)
            x, test = parts if batch_norm else one_scale(*parts)
            found[name] = linear_probe(x, train_y, test, test_y, seed, batch_norm=batch_norm)
    return found, max(found, key=lambda name: found[name]["held_out_accuracy"])


# --- other ways to read features ------------------------------------------------------------------


@torch.no_grad()
def retrieval_precision(train_x, train_y, test_x, test_y, k=5):
    """Mean share of the k training images of highest cosine that have the test image's class."""
    train_x = F.normalize(train_x, dim=1)
    right = [(train_y[(F.normalize(x, dim=1) @ train_x.T).topk(k).indices] == y[:, None]).float()
             for x, y in zip(test_x.split(1024), test_y.split(1024))]  # each [B, k]
    return torch.cat(right).mean().item()


def low_shot(train_x, train_y, test_x, test_y, counts=LOW_SHOT, draws=3):
    """Linear probes on a few labeled images of each class, chosen at random `draws` times.

    Counts that some class does not have are left out. Returns {"per_class": counts used, "mean":
    accuracies, "std": their deviations}.
    """
    fewest = train_y.bincount()[train_y.unique()].min().item()
    found = {"per_class": [count for count in counts if count <= fewest], "mean": [], "std": []}
    for count in found["per_class"]:
        accuracies = []
        for draw in range(draws):
            few = class_rank(train_y, draw) < count
            probe = linear_probe(train_x[few], train_y[few], test_x, test_y, draw)
            accuracies.append(probe["accuracy"])
        found["mean"].append(statistics.mean(accuracies))
        found["std"].append(statistics.stdev(accuracies))
    return found


def linear_cka(x, y):
    """Linear CKA (Kornblith et al. 2019), 0 to 1, of two encoders' features of the same images."""
    x, y = (part.double() - part.double().mean(dim=0) for part in (x, y))  # [n, D1], [n, D2]
    return ((x.T @ y).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm())).item()


@torch.no_grad()
def neighbor_overlap(x, y, k=10):
    """Mean share of each image's k nearest others (cosine) on which two encoders agree."""

    def neighbors(part):
        cosine = F.normalize(part, dim=1) @ F.normalize(part, dim=1).T  # [n, n]
        return cosine.fill_diagonal_(-2).topk(k).indices  # [n, k]

    same = neighbors(x)[:, :, None] == neighbors(y)[:, None, :]  # [n, k, k]
    return same.any(dim=2).float().mean().item()


# --- where the synthetic shape is, told from single patches ---------------------------------------


def patch_cover(masks, p):
    """Whether a shape covers at least half of each patch: bool [n, H, W] -> bool [n, N]."""
    return F.avg_pool2d(masks[:, None].float(), p).flatten(1) >= 0.5


def intersection_over_union(found, true):
    """Patches found and true over those found or true; two bool tensors of one shape."""
    return ((found & true).sum() / (found | true).sum()).item()


@torch.no_grad()
def segmentation(model, masking, untrained, n=1000, seed=0):
    """How well one patch's token tells whether the patch lies on the synthetic shape: a dict of
    intersections over union on n test images.

    A logistic regression is fitted to the layer-normed tokens of n training images, one for the
    target encoder, one for an untrained encoder, one for pixels. "predicted": the first, applied to
    what the predictor says of hidden patches, shows where the predictor imagines the shape to be.
    """
    p, rows, readers = model.target_encoder.patch_size, {}, {}
    images, covers = [], []
    for split in ("train", "test"):
        drawn, *_, masks = shapes.make(split)
        chosen = torch.randperm(len(drawn), generator=torch.Generator().manual_seed(seed))[:n]
        images.append(data.normalize(drawn[chosen], *data.STATISTICS["shapes"]))  # [n, C, H, W]
        covers.append(patch_cover(masks[chosen], p))  # [n, N]
    for name, read in (("target", model.target_encoder), ("random", untrained),
                       ("pixels", lambda part: patchify(part, p))):
        tokens = [read(part) for part in images]  # [n, N, D] each
        x, test_x = (F.layer_norm(part, part.shape[-1:]).flatten(0, 1).numpy() for part in tokens)
        readers[name] = LogisticRegression(max_iter=1000).fit(x, covers[0].flatten().numpy())
        found = torch.from_numpy(readers[name].predict(test_x)).view_as(covers[1])
        rows[name] = intersection_over_union(found, covers[1])
    masks = masking(len(images[1]), torch.Generator().manual_seed(seed))
    predictions = model(images[1], masks).predictions[masks.targets_valid]  # [hidden patches, D]
    found = torch.from_numpy(readers["target"].predict(predictions.numpy()))
    true = take(covers[1][..., None], masks.targets)[..., 0][masks.targets_valid]
    return {**rows, "predicted": intersection_over_union(found, true)}


# --- what the command adds to evaluation.json -----------------------------------------------------


def score(train_x, train_y, test_x, test_y, folds, seed):
    """What is added to a row of `features`, from features [n, L, D] and [m, L, D]."""
    heads, chosen = probe_heads(train_x, train_y, test_x, test_y, seed)
    for head in heads.values():
        del head["predictions"]
    last = train_x[:, -1], train_y, test_x[:, -1], test_y
    found = {"heads": heads, "head": chosen, "best": heads[chosen]["accuracy"],
             "precision@5": retrieval_precision(*last)}
    if folds:
        found["folds"] = [linear_probe(last[0][fold], train_y[fold], *last[2:])["accuracy"]
                          for fold in folds]
    return found


def read_features(results, run, few_only=False):
    """Heads, precision@5, folds and few labels of every row: printed, and added to the results."""
    train_y, test_y = run.train_set.labels, run.test_set.labels
    counts = sorted({*LOW_SHOT, run.full // 100, run.full // 10} - {0, 1})  # also 1% and 10%
    results["low_shot"] = {"per_class": [], "full": run.full, "scores": {}}
    for name, encoder in {**run.encoders, "pixels": None}.items():
        x, test_x = (
            evaluate.pixels(dataset, run.image_size)[:, None] if encoder is None else
            layer_features(encoder, dataset, run.image_size, run.device, 1 if few_only else 4)
            for dataset in (run.train_set, run.test_set))
        row = {}
        if few_only:
            print(ROWS[name])
        else:
            row = score(x, train_y, test_x, test_y, run.train_set.folds, run.seed)
            results["features"][name].update(row)
            print(f"{ROWS[name]:18}best head {100 * row['best']:.1f} ({row['head']}), precision@5 "
                  f"{100 * row['precision@5']:.1f}")
        if "folds" in row:
            print(f"{'':18}ten folds {100 * statistics.mean(row['folds']):.1f} ± "
                  f"{100 * statistics.stdev(row['folds']):.1f}")
        if name != "context":
            few = low_shot(x[:, -1], train_y, test_x[:, -1], test_y, counts)
            results["low_shot"]["per_class"] = few.pop("per_class")
            results["low_shot"]["scores"][name] = few
            shots = zip(results["low_shot"]["per_class"], few["mean"])
            print(f"{'':18}accuracy with so many labels of each class: "
                  + ", ".join(f"{count}: {100 * mean:.1f}" for count, mean in shots))


@torch.no_grad()
def patch_tokens(encoder, dataset, image_size, device):
    """Every image's patch tokens, float16 [n, N, D] on the device."""
    return torch.cat([encoder(images).half()
                      for images in data.batches(dataset, 128, image_size, device)])


def train_heads(results, run, args):
    """The attentive probe and the fine-tuning that are asked for, of the target encoder and of the
    untrained one: printed, and added to the results."""
    for key, epochs in (("attentive", args.attentive), ("fine_tuned", args.finetune)):
        for name in ("target", "random") if epochs else ():
            encoder = run.encoders[name]
            if key == "attentive":
                tokens, test_tokens = (patch_tokens(encoder, dataset, run.image_size, run.device)
                                       for dataset in (run.train_set, run.test_set))
                found = attentive_probe(tokens, run.train_set.labels.to(run.device), test_tokens,
                                        run.test_set.labels, epochs, run.seed)
            else:
                found = fine_tune(encoder, run.train_set, run.test_set, run.image_size, run.device,
                                  epochs, crop_scale=run.config.crop_scale, flip=run.config.flip,
                                  seed=run.seed)
            kept = ("accuracy", "held_out_accuracy", "rate")
            results.setdefault(key, {})[name] = {part: found[part] for part in kept}
            print(f"{ROWS[name]:18}{key.replace('_', '-')} {100 * found['accuracy']:.1f}")


def compare(results, run, other):
    """How alike the target encoder is to another run's and to an untrained one, on test images."""
    encoders, config, about = evaluate.load_encoders(other, run.device)
    if (about["channels"], about["axes"]) != run.test_set.shape:
        raise UsageError(f"--compare {other}: its encoder does not take images of "
                         f"{run.test_set.name}")
    images = run.test_set.subset(torch.arange(min(len(run.test_set), 5000)))  # [n, n] cosines
    x = evaluate.features(run.encoders["target"], images, run.image_size, run.device)
    for name, encoder, size in ((other, encoders["target"], config.image_size),
                                ("untrained", run.encoders["random"], run.image_size)):
        y = evaluate.features(encoder, images, size, run.device)
        found = {"cka": linear_cka(x, y), "neighbor_overlap": neighbor_overlap(x, y)}
        results.setdefault("compare", {})[name] = found
        print(f"{name}: CKA {found['cka']:.2f}, {100 * found['neighbor_overlap']:.1f}% of the 10 "
              "nearest images shared")


# --- command line ---------------------------------------------------------------------------------


class Run:
    """A run that evaluate.py has evaluated: its encoders, and the same images."""

    def __init__(self, folder, results, data_dir=None, device="auto"):
        if not results["features"]:
            raise UsageError(f"{folder} was evaluated without labels; name labeled data with: "
                             f"python evaluate.py {folder} --dataset")
        self.device, self.seed = train.pick_device(device), results["seed"]
        self.encoders, self.config, about = evaluate.load_encoders(folder, self.device)
        self.image_size = self.config.image_size
        untrained = evaluate.untrained_encoder(self.config, about, self.seed)
        self.encoders["random"] = untrained.to(self.device)
        where = data_dir or self.config.data_dir, self.image_size
        full, test = (data.load(results["dataset"], split, *where) for split in ("train", "test"))
        self.full = full.labels.bincount()[full.labels.unique()].min().item()
        self.train_set = evaluate.subsample(full, results["split_sizes"]["train"], self.seed)
        self.test_set = evaluate.subsample(test, results["split_sizes"]["test"], self.seed)


def main(argv=None):
    """The command line: more probes of a run, added to its evaluation.json."""
    p = command_line.Parser(description="More probes of a run that evaluate.py has evaluated; "
                            "without a flag: heads, few labels, precision@5.")
    p.add_argument("run", type=Path, metavar="RUN", help="run folder")
    p.add_argument("--few-labels", action="store_true", help="only the curve of few labels")
    p.add_argument("--attentive", type=int, default=0, metavar="EPOCHS", help="an attentive probe")
    p.add_argument("--finetune", type=int, default=0, metavar="EPOCHS", help="fine-tuning")
    p.add_argument("--segment", action="store_true", help="where the synthetic shape is")
    p.add_argument("--compare", metavar="OTHER", help="how alike another run's encoder is")
    p.add_argument("--data-dir", help="folder of the data, if not the run's")
    p.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"))
    args = p.parse_args(argv)
    for name in ("attentive", "finetune"):
        check(getattr(args, name) >= 0, name, getattr(args, name), "a number of epochs")
    path = args.run / "evaluation.json"
    if not path.exists():
        raise UsageError(f"{path} does not exist; first: python evaluate.py {args.run}")
    results = read_json(path)
    run = Run(args.run, results, args.data_dir, args.device)
    if args.attentive or args.finetune:
        train_heads(results, run, args)
    if args.compare:
        compare(results, run, args.compare)
    if args.segment:
        if results["dataset"] != "shapes":
            raise UsageError(f"--segment needs the synthetic shapes, not {results['dataset']}")
        model, masking, *_ = train.load_run(args.run)
        found = segmentation(model, masking, run.encoders["random"].cpu(), seed=run.seed)
        results["segmentation"] = found
        print("intersection over union of patches on the shape: "
              + ", ".join(f"{ROWS.get(name, name)} {value:.2f}" for name, value in found.items()))
    if not (args.attentive or args.finetune or args.compare or args.segment):
        read_features(results, run, args.few_labels)
    words = sys.argv[1:] if argv is None else map(str, argv)
    results["commands"].append("python -m extras.probes " + shlex.join(words))
    write_json(path, results)


if __name__ == "__main__":
    command_line.run(main)
