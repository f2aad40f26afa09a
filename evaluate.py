"""What a frozen encoder knows: linear probes, nearest neighbours and few labels, beside a random encoder and raw pixels.

    python evaluate.py RUN                  prints the tables and writes RUN/evaluation.json
    python evaluate.py RUN1 RUN2 RUN3       the same for each, and their mean and standard deviation
    python evaluate.py RUN --compare OTHER  how alike two encoders are
    python evaluate.py --pretrained NAME_OR_PATH --dataset stl10     the same protocol for an encoder that was not trained here

The features are the average of the patch tokens (appendix A.2); nothing here changes a weight of the encoder. Everything that
is tuned is tuned on part of the training images; the test images are looked at once. `n` images, `L` layers, `D` features.
"""

import dataclasses
import datetime
import functools
import hashlib
import json
import math
import os
import platform
import re
import shlex
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from support import checkpoint
import config
import data
import diagnostics
from extras import methods
import models
from extras import pretrained
from extras import probes
import train

ROWS = {"target": "target encoder", "context": "context encoder", "random": "random encoder", "pixels": "raw pixels"}
PIXEL_SIDE = {4: 32, 5: 16}  # larger images (volumes) are shrunk to this for the pixel rows: 224 x 224 x 3 features would take hours


# ---- features ----


def at_once(image_size):
    """Images in a batch: 512, and fewer above 96 pixels, so that what a huge encoder computes on the way fits in memory."""
    pixels = image_size**2 if isinstance(image_size, int) else math.prod(image_size)
    return max(1, min(512, 512 * 96**2 // pixels))


@torch.no_grad()
def features(encoder, dataset, image_size, device, batch_size=None, layers=None, quiet=None):
    """Average of the patch tokens of every image, float32 [n, D] on the CPU, the encoder's mode left as found (appendix A.2).

    With layers=L those of the last L blocks (or as many as there are), [n, L, D]. quiet: no progress bar; None: one on terminals only.
    """
    was_training, batch_size = encoder.training, batch_size or at_once(image_size)
    encoder.eval()
    pooled, total = [], -(-len(dataset) // batch_size)
    try:
        for images in tqdm(data.batches(dataset, batch_size, image_size, device), "features", total, leave=False, disable=quiet):
            tokens = encoder(images) if layers is None else torch.stack(encoder(images, return_layers=layers), 1)  # [B, (L,) N, D]
            pooled.append(tokens.float().mean(-2).cpu())  # [B, (L,) D]
    finally:
        encoder.train(was_training)
    return torch.cat(pooled)  # [n, (L,) D]


@torch.no_grad()
def patch_tokens(encoder, dataset, image_size, device):
    """Every image's patch tokens, float16 [n, N, D] on the device: what an attentive probe reads."""
    return torch.cat([encoder(images).half() for images in data.batches(dataset, at_once(image_size), image_size, device)])


def pixels(dataset, image_size):
    """The normalised images themselves as features, float32 [n, C*H*W] on the CPU; the baseline that any encoder must beat."""
    return torch.cat([images.float().flatten(1).cpu() for images in data.batches(dataset, 512, image_size, "cpu")])


def fingerprint(encoder):
    """Sixteen hex digits that change with any weight of the encoder."""
    digest = hashlib.sha256()
    for name, value in encoder.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def cached_features(folder, encoder, dataset, image_size, device, layers=4):
    """`features` of the last layers [n, L, D], kept in folder/features for the next call with the same weights and the same images."""
    statistics = hashlib.sha256(repr((dataset.mean, dataset.std)).encode()).hexdigest()[:8]
    name = f"{dataset.name}-{len(dataset)}-{dataset.fingerprint()}-{image_size}-{statistics}-{fingerprint(encoder)}"
    path = folder / "features" / f"{name}.pt"
    if path.exists():
        return torch.load(path, weights_only=True)
    found = features(encoder, dataset, image_size, device, layers=layers)
    path.parent.mkdir(exist_ok=True)
    checkpoint.write(path, lambda temporary: torch.save(found, temporary))
    return found


# ---- the protocol ----


def subsample(dataset, n, seed):
    """A random `n` images with as many of each class as there are (to within one); all of them when `n` is 0 or too large."""
    if n == 0 or n >= len(dataset):
        return dataset
    rank, order = probes.class_rank(dataset.labels, seed)
    taken = order[rank[order].argsort(stable=True)][:n]  # every class's first image, then every class's second, ...
    return dataset.subset(taken.sort().values)


def judge(train_x, train_y, test_x, test_y, K, seed=0):
    """Everything that is read from one set of features [n, L, D] and [m, L, D] with labels int64, a dict ready for JSON.

    linear (last layer, batch norm), knn, precision@5 (fractions); the linear probe's macro_f1, per_class and confusion; heads: name ->
    accuracy, held_out_accuracy, strength, at_edge; head: the one that the held-out images choose; best: its accuracy.
    """
    heads, chosen = probes.probe_heads(train_x, train_y, test_x, test_y, seed)
    predictions = {name: head.pop("predictions") for name, head in heads.items()}
    last = [train_x[:, -1], train_y, test_x[:, -1], test_y]
    return {"linear": heads["last+bn"]["accuracy"], "knn": diagnostics.knn(*last), "best": heads[chosen]["accuracy"], "head": chosen,
            "precision@5": probes.retrieval_precision(*last), **probes.scores(predictions["last+bn"], test_y.cpu(), K), "heads": heads}


def evaluate(encoders, train_set, test_set, image_size, device="cpu", seed=0, folder=None, counts=probes.LOW_SHOT):
    """`judge` for every encoder of the dict and for the raw pixels ("pixels"), on two labelled `ImageDataset`s.

    Gives (scores, low_shot, seconds): name -> what `judge` found; name -> what `probes.low_shot` found with `counts` labelled images a
    class, for all but "context"; name -> seconds of each part. With a `folder` features are kept in it. Where the training
    set has STL-10's folds, scores also hold `folds`, ten accuracies.
    """
    where = "cpu" if torch.device(device).type == "mps" else device  # Apple's GPUs lack the eigenvalues that the probe needs
    K = int(max(train_set.labels.max(), test_set.labels.max())) + 1
    found, few_labels, seconds = {}, {}, {}
    for name in (*encoders, "pixels"):
        start = time.perf_counter()
        if name == "pixels":
            side = min(image_size, PIXEL_SIDE[len(train_set.images.shape)])
            parts = [pixels(dataset, side)[:, None] for dataset in (train_set, test_set)]  # [n, 1, C*H*W]
        elif folder is None:
            parts = [features(encoders[name], dataset, image_size, device, layers=4) for dataset in (train_set, test_set)]
        else:
            parts = [cached_features(folder, encoders[name], dataset, image_size, device) for dataset in (train_set, test_set)]
        extracted = time.perf_counter()
        train_x, train_y, test_x, test_y = (part.to(where) for part in (parts[0], train_set.labels, parts[1], test_set.labels))
        found[name] = judge(train_x, train_y, test_x, test_y, K, seed)
        if train_set.folds:
            found[name]["folds"] = probes.fold_accuracies(train_x[:, -1], train_y, test_x[:, -1], test_y, train_set.folds)
        judged = time.perf_counter()
        if name != "context":
            few_labels[name] = probes.low_shot(train_x[:, -1], train_y, test_x[:, -1], test_y, counts)
        seconds[name] = {"features": extracted - start, "probes": judged - extracted, "low_shot": time.perf_counter() - judged}
    return found, few_labels, seconds


# ---- what is printed ----


def measures_text(results):
    """The measures of collapse in a line, with a line for each warning."""
    found = results["measures"]
    text = (f"target features of images not trained on: standard deviation {found['target_std']:.2f}, "
            f"effective rank {found['rank']:.1f} of {results['width']}")
    if "cosine" in found:
        text += f"; the predictor's cosine {found['cosine']:.2f}, the mean target's {found['mean_cosine']:.2f}"
    return "\n".join([text, *(f"warning: {warning}" for warning in results["warnings"])])


def table(results):
    """The text that `main` prints, from what it writes to evaluation.json: percents, and differences in points."""
    scores, sizes = results["features"], results["split_sizes"]
    lines = [f"{results['dataset']}: {sizes['train']:,} training and {sizes['test']:,} test images, "
             f"{100 * results['chance']:.1f}% by chance; percent, and points over the baselines", "",
             f"{'':16}{'linear':>8}{'- random':>10}{'- pixels':>10}{'kNN':>8}{'- random':>10}{'- pixels':>10}"
             f"{'macro F1':>10}{'P@5':>7}{'best head':>11}"]
    for name, score in scores.items():
        line = f"{ROWS.get(name, name):16}"
        for measure in ("linear", "knn"):
            line += f"{100 * score[measure]:8.1f}"
            for baseline in ("random", "pixels"):  # a baseline has no difference from itself, nor pixels from a random encoder
                compared = baseline in scores and name not in ("random", "pixels") or (name, baseline) == ("random", "pixels")
                line += f"{100 * (score[measure] - scores[baseline][measure]):+10.1f}" if compared else " " * 10
        lines.append(f"{line}{100 * score['macro_f1']:10.1f}{100 * score['precision@5']:7.1f}{100 * score['best']:7.1f} {score['head']}")
    lines += ["", "linear: last layer with batch norm. best head: chosen on held-out training images among last layer and last four, each",
              "with and without batch norm. P@5: share of the five nearest training images that have the class of the test image."]
    for name, few in results["low_shot"]["scores"].items():
        if few["mean"]:
            shots = [f"{count}: {100 * mean:.1f}" for count, mean in zip(results["low_shot"]["per_class"], few["mean"])]
            lines += ([""] if name == "target" else []) + [f"{ROWS.get(name, name):16}with few labels a class   {'   '.join(shots)}"]
    for name, title in (("attentive", "attentive probe"), ("fine_tuned", "fine-tuned")):
        for row, found in results.get(name, {}).items():
            lines.append(f"{ROWS[row]:16}{title:16}{100 * found['accuracy']:7.1f}")
    for name in scores:
        if "folds" in scores[name]:
            folds = [100 * accuracy for accuracy in scores[name]["folds"]]
            lines.append(f"{ROWS.get(name, name):16}ten folds {statistics.mean(folds):.1f} ± {statistics.stdev(folds):.1f}")
    lines += ["", measures_text(results)]
    edge = [ROWS.get(name, name) for name, score in scores.items() if score["heads"]["last+bn"]["at_edge"]]
    if edge:
        lines += ["", f"The probe chose its strongest regularisation for: {', '.join(edge)}. A stronger one might score higher."]
    if scores["pixels"]["knn"] > scores["target"]["knn"]:
        lines += ["", "The raw pixels' kNN beats the target encoder's here: among the labelled images some match pixel by pixel,",
                  "and the cosine of pooled features is not the distance that a probe learns (README, How accuracy is measured)."]
    return "\n".join(lines)


def summary(runs):
    """Mean and standard deviation of several runs' results (a list of what evaluation.json holds), as text."""
    heads = "".join(f"{title:>14}" for title in ("linear", "kNN", "macro F1", "best head"))
    lines = [f"{len(runs)} runs, mean ± standard deviation, percent", "", " " * 16 + heads]
    for name in runs[0]["features"]:
        line = f"{ROWS.get(name, name):16}"
        for measure in ("linear", "knn", "macro_f1", "best"):
            values = [100 * run["features"][name][measure] for run in runs]
            line += f"{f'{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}':>14}"
        lines.append(line)
    return "\n".join(lines)


# ---- command line ----


def random_encoder(run_config, about, device, seed):
    """An encoder of the run's architecture as it was before any training, drawn from `seed`; `about` is what load_run gives."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return methods.build(run_config, about["channels"], about["axes"], about["classes"]).target_encoder.to(device)


def arguments(argv):
    """The command line as a namespace."""
    parser = config.Parser(prog="evaluate.py", description="Probes of a pretrained encoder's frozen features, beside its baselines.")
    parser.add_argument("runs", type=Path, nargs="*", metavar="RUN", help="run folders that train.py wrote")
    parser.add_argument("--pretrained", metavar="NAME_OR_PATH", help=f"instead of runs: {' or '.join(pretrained.SHIPPED)}, which "
                        "comes with this code; a .pth.tar of the official code, a Hugging Face folder, a run's encoder.pt, or, downloaded "
                        f"once (10 to 17 GB), one of {', '.join(pretrained.OFFICIAL)}")
    parser.add_argument("--out", type=Path, help="folder of what --pretrained finds (default runs/NAME-on-DATASET)")
    parser.add_argument("--train-images", type=int, default=10000, help="labelled training images; 0 is all (default 10000)")
    parser.add_argument("--test-images", type=int, default=0, help="test images; 0 is all (default 0)")
    parser.add_argument("--attentive", type=int, default=0, metavar="EPOCHS", help="also train an attentive probe so long (default 0)")
    parser.add_argument("--finetune", type=int, default=0, metavar="EPOCHS", help="also fine-tune the whole encoder (default 0)")
    parser.add_argument("--layer-decay", type=float, default=0.75, help="fine-tuning: a layer's rate over the next one's (default .75)")
    parser.add_argument("--smoothing", type=float, default=0.1, help="fine-tuning: label smoothing (default .1)")
    parser.add_argument("--compare", type=Path, metavar="OTHER", help="only compare two runs' target encoders: CKA, shared neighbours")
    parser.add_argument("--seed", type=int, default=0, help="seed of the subsets, the held-out images and the random encoder (default 0)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="auto takes cuda, else mps, else cpu")
    parser.add_argument("--dataset", help="labelled data with a train and a test split, where it is not what the run was trained on")
    parser.add_argument("--data-dir", help="folder of the data, where it is not the one the run was trained from")
    args = parser.parse_args(argv)
    need = functools.partial(config.need, args)
    if bool(args.runs) == bool(args.pretrained):
        raise config.UsageError("name run folders, or one encoder with --pretrained (--help lists what there is)")
    need(not args.pretrained or args.dataset, "pretrained", "it needs --dataset, labelled data with a train and a test split")
    need(not args.out or args.pretrained, "out", "it is for --pretrained; what is found of a run goes to its folder")
    need(not args.compare or len(args.runs) == 1, "compare", f"it goes with one RUN, not with {len(args.runs)}")
    need(args.train_images >= 0, "train_images", "it must be 0 (all) or more")
    need(args.test_images >= 0 and args.test_images != 1, "test_images", "it must be 0 (all), or 2 or more")
    for name in ("attentive", "finetune"):
        need(getattr(args, name) >= 0, name, "it must be 0 (none) or more epochs")
    need(0 < args.layer_decay <= 1, "layer_decay", "it must be above 0 and at most 1")
    need(0 <= args.smoothing < 1, "smoothing", "it must be 0 or more and below 1")
    need(0 <= args.seed <= config.LARGEST, "seed", config.SEEDS)
    for name in ("dataset", "data_dir"):
        need(getattr(args, name) != "", name, "it needs a name")
    return args


def provenance(commands, device, argv):
    """What every results file says of where its numbers come from: `commands` before this one, this one, hardware, date."""
    return {
        "commands": [*commands, "python evaluate.py " + shlex.join(sys.argv[1:] if argv is None else map(str, argv))],
        "hardware": {"processor": platform.processor() or platform.machine(), "cpus": os.cpu_count(), "torch": torch.__version__,
                     "gpu": torch.cuda.get_device_name() if device.type == "cuda" else None},
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def trained_heads(args, model, random, train_set, test_set, size, device, run_config):
    """The probes that are trained step by step, on the target and the random encoder: what evaluation.json holds of them, a dict."""
    found = {}
    for name, encoder in (("target", model.target_encoder), ("random", random)):
        if args.attentive:
            tokens = [patch_tokens(encoder, dataset, size, device) for dataset in (train_set, test_set)]
            found.setdefault("attentive", {})[name] = probes.attentive_probe(
                tokens[0], train_set.labels.to(device), tokens[1], test_set.labels, args.attentive, args.seed)
        if args.finetune:
            found.setdefault("fine_tuned", {})[name] = probes.fine_tune(
                encoder, train_set, test_set, size, device, args.finetune, args.layer_decay, args.smoothing, run_config.crop_scale,
                run_config.flip, args.seed)
    for part in found.values():
        for head in part.values():
            del head["predictions"]
            head.pop("model", None)  # of fine-tuning; not for JSON
    return found


def measure(model, dataset, seed, device):
    """The measures of collapse on up to 512 images of an ImageDataset, and what they warn of: two keys of evaluation.json, as a dict."""
    chosen = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))[:512]
    images = torch.cat(list(data.batches(dataset.subset(chosen), 128, model.target_encoder.image_size, device)))
    found = diagnostics.measure(model, images)
    return {"measures": found, "warnings": list(diagnostics.warnings(found, found, 1.0).values())}


def measure_unlabelled(dataset, model, run_config, args):
    """All that can be said of a run without labels, on the images that it held out: print it, and return it ready for evaluation.json."""
    held = train.hold_out(run_config, len(dataset))[1]
    if not len(held):
        raise config.UsageError(f"{dataset.name} has no labels, and too few images to hold some out; name labelled data with --dataset")
    results = {"dataset": dataset.name, "features": {}, "width": model.context_encoder.width,
               **measure(model, dataset.subset(held), args.seed, next(model.parameters()).device)}
    print(measures_text(results))
    print(f"left out probes, kNN and fine-tuning: {dataset.name} has no labels; name labelled data with --dataset")
    return results


def evaluate_run(folder, args, argv=None):
    """Evaluate one run folder as the command line says: print the tables, write and return what evaluation.json holds."""
    start, device = time.perf_counter(), train.pick_device(args.device)
    model, run_config, about = checkpoint.load_run(folder, device)
    name, where = args.dataset or run_config.dataset, (args.data_dir or run_config.data_dir, run_config.image_size)
    full = data.load(name, "train", *where)
    if full.labels is None and not args.dataset:
        dataset = full if run_config.split == "train" else data.load(name, run_config.split, *where)
        results = measure_unlabelled(dataset, model, run_config, args)
    else:
        test_set = test_images(full, name, *where)
        check_images(full, about, folder)
        random = random_encoder(run_config, about, device, args.seed)
        results = measure_labelled(folder, model, random, run_config, full, test_set, args, device)
    results |= {"config": dataclasses.asdict(run_config), "training": about["progress"],
                **provenance([config.command(run_config)], device, argv)}
    return write_results(folder, results, start)


def evaluate_pretrained(args, argv=None):
    """Evaluate an encoder that was not trained here as the command line says, on images of its size with its statistics: print the
    tables, write and return what evaluation.json holds. There is no context encoder among the rows."""
    start, device = time.perf_counter(), train.pick_device(args.device)
    data_dir = args.data_dir or "data"
    found = pretrained.load(args.pretrained, data_dir)
    # Of a run's settings only these are read; fine-tuning crops as the official code does.
    size = found.shape["image_size"]
    settings = config.Config(dataset=args.dataset, image_size=size, crop_scale=(0.3, 1.0))
    full = data.load(args.dataset, "train", data_dir, size)
    test_set = test_images(full, args.dataset, data_dir, size)
    check_images(full, {"channels": found.shape["channels"], "axes": len(found.encoder.image_size)}, args.pretrained)
    if found.mean is not None:
        full, test_set = (dataclasses.replace(dataset, mean=found.mean, std=found.std) for dataset in (full, test_set))
    with torch.random.fork_rng():
        torch.manual_seed(args.seed)
        random = models.Encoder(**found.shape).to(device)
    folder = args.out or default_folder(args)
    folder.mkdir(parents=True, exist_ok=True)
    model = nn.ModuleDict({"target_encoder": found.encoder.to(device)})
    results = measure_labelled(folder, model, random, settings, full, test_set, args, device)
    results |= {"pretrained": {"source": args.pretrained, "kind": found.kind, **found.shape, "mean": full.mean, "std": full.std},
                **provenance([found.command] if found.command else [], device, argv)}
    return write_results(folder, results, start)


def default_folder(args):
    """Where what --pretrained finds is written when --out names no place: runs/NAME-on-DATASET."""
    path = Path(args.pretrained).resolve()
    name = path.parent.name + "-encoder" if path.name == "encoder.pt" else path.name.removesuffix(".pth.tar")
    return Path("runs") / f"{name}-on-{Path(args.dataset).stem}"


def write_results(folder, results, start):
    """Write evaluation.json with the seconds since `start`, and return what it holds."""
    results["seconds"] = {"total": time.perf_counter() - start, **results.pop("seconds", {})}
    text = re.sub(r"\[[^\[\]{}]*\]", lambda numbers: " ".join(numbers[0].split()), json.dumps(results, indent=2))  # a list on one line
    checkpoint.write(folder / "evaluation.json", lambda path: Path(path).write_text(text))
    return results


def test_images(full, name, data_dir, image_size):
    """The test split of the data set whose train split is `full`; raises UsageError where there is none, or either has no labels."""
    if full.labels is not None:
        try:
            test_set = data.load(name, "test", data_dir, image_size)
        except config.UsageError as error:
            raise config.UsageError(f"evaluation needs test images: {error}") from None
        if len(test_set) < 2:
            raise config.UsageError(f"{name} has one test image; evaluation needs two or more")
        if test_set.labels is not None:
            return test_set
    raise config.UsageError(f"evaluation needs labels, and {name} has none; name labelled data with --dataset")


def measure_labelled(folder, model, random, run_config, full, test_set, args, device):
    """Every probe that the command line asks for of a model and an untrained encoder like its own, on a data set's train split (`full`)
    and test split: print the tables, and return them ready for evaluation.json."""
    size, name = run_config.image_size, args.dataset or run_config.dataset
    train_set, test_set = subsample(full, args.train_images, args.seed), subsample(test_set, args.test_images, args.seed)
    try:
        probes.held_out(train_set.labels, args.seed)  # before minutes are spent on the features
    except config.UsageError as error:
        raise config.UsageError(f"--train-images is {args.train_images}, of {len(full):,} in {name}: {error}") from None
    per_class = full.labels.bincount()[full.labels.unique()].min().item()
    counts = sorted({*probes.LOW_SHOT, *(count for count in (per_class // 100, per_class // 10) if count > 1)})  # 1% and 10% of the labels
    context = {"context": model.context_encoder} if hasattr(model, "context_encoder") else {}
    encoders = {"target": model.target_encoder, **context, "random": random}
    scores, few, seconds = evaluate(encoders, train_set, test_set, size, device, args.seed, folder, counts)
    results = {
        "dataset": name, "split_sizes": {"train": len(train_set), "test": len(test_set)}, "width": model.target_encoder.width,
        # What answering the commonest class every time would score.
        "chance": test_set.labels.bincount().max().item() / len(test_set),
        "class_names": test_set.class_names, "features": scores,
        "low_shot": {"per_class": few["target"]["per_class"], "full": per_class,
                     "scores": {row: {"mean": part["mean"], "std": part["std"]} for row, part in few.items()}},
        **trained_heads(args, model, random, train_set, test_set, size, device, run_config),
        **measure(model, test_set, args.seed, device), "seconds": seconds,
    }
    print(table(results))
    return results


def check_images(dataset, about, folder):
    """Raise UsageError where the encoder of a run (`about` is what load_run gives) does not take the images of an ImageDataset."""
    channels, axes = dataset.images.shape[1], len(dataset.images.shape) - 2
    if (channels, axes) != (about["channels"], about["axes"]):
        raise config.UsageError(f"{dataset.name} has images of {channels} channels and {axes} axes, the encoder of {folder} takes "
                                f"{about['channels']} and {about['axes']}; name other data with --dataset")


def compare(args):
    """How alike two runs' target encoders are, beside the first one's random encoder, on the first one's test images; prints, and writes
    RUN/compare.json."""
    device, found = train.pick_device(args.device), {}
    model, run_config, about = checkpoint.load_run(args.runs[0], device)
    other, other_config, other_about = checkpoint.load_run(args.compare, device)
    encoders = {str(args.compare): (other.target_encoder, other_config.image_size),
                "random encoder": (random_encoder(run_config, about, device, args.seed), run_config.image_size)}
    images = data.load(args.dataset or run_config.dataset, "test", args.data_dir or run_config.data_dir, run_config.image_size)
    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(args.seed))[: args.test_images or 5000]
    for folder, takes in ((args.runs[0], about), (args.compare, other_about)):
        check_images(images, takes, folder)
    images = images.subset(chosen)
    if len(images) < 11:
        raise config.UsageError(f"--compare needs 11 test images or more, for the 10 neighbours of each, got {len(images)}; "
                                f"--test-images is {args.test_images}, 0 takes all")
    x = features(model.target_encoder, images, run_config.image_size, device)
    print(f"{args.runs[0]} on {len(images):,} test images of {images.name}, beside")
    print(f"{'':24}{'CKA':>8}{'10 neighbours shared, %':>28}")
    for name, (encoder, size) in encoders.items():
        y = features(encoder, images, size, device)
        found[name] = {"cka": probes.linear_cka(x, y), "neighbour_overlap": probes.neighbour_overlap(x, y)}
        print(f"{name:24}{found[name]['cka']:8.2f}{100 * found[name]['neighbour_overlap']:28.1f}")
    checkpoint.write(args.runs[0] / "compare.json", lambda path: Path(path).write_text(json.dumps(found, indent=2)))


def main(argv=None):
    """Evaluate runs: print the tables, write each RUN/evaluation.json; raises UsageError for what the user can put right."""
    args = arguments(argv)
    if args.compare:
        return compare(args)
    if args.pretrained:
        return evaluate_pretrained(args, argv)
    if len(args.runs) > 1:  # before the first one takes its minutes: all are runs, and their mean is one of something
        data_sets = {str(folder): checkpoint.load_checkpoint(folder, "cpu")["config"]["dataset"] for folder in args.runs}
        if not args.dataset and len(set(data_sets.values())) > 1:
            raise config.UsageError("a mean over runs of different data says nothing ("
                                    + ", ".join(f"{folder}: {name}" for folder, name in data_sets.items())
                                    + "); evaluate them one by one, or on the same --dataset")
    runs = [evaluate_run(folder, args, argv) for folder in args.runs]
    if len(runs) > 1 and all(run["features"] for run in runs):
        print(f"\n{summary(runs)}")


if __name__ == "__main__":
    config.run(main)
