"""What a run looks like: what its predictor imagines, where its encoder looks, and every figure of figures.py, written to files.

    python predict_and_visualize.py RUN          writes RUN/figures/*.png and RUN/figures/retrieval.json

Here is what has to ask the model; what only draws is in figures.py. Alphabet as in models.py; images are normalised float
[B, C, H, W] as the encoder takes them, pictures the same images as they are shown, float [B, 3, H, W] in 0..1. Of volumes
[B, C, T, H, W] pictures are volumes too, and the figures show slices of them.
"""

import csv
import json
import math
from collections import namedtuple
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from support import checkpoint
import config
import data
import evaluate
from extras import mae
from extras import methods
import models
import train
from extras.figures import (COLOURS, add_bar, by_slice, comparison_figure, confusion_figure, coverage_figure, curves_figure, frame,
                     low_shot_figure, mask_figure, nearest_images_figure, per_class_figure, table, to_pixels, token_figure, tsne_figure)
from masking import Masks

SHOWN = 6  # images in the rows of the figures
TSNE_IMAGES = 5000
Gallery = namedtuple("Gallery", "features patches")  # of the same patches: layer-normed target features [K, D], pixels [K, 3 * patch**2]


# ---- images, as the encoder takes them and as they are shown


def rgb(dataset, indices, size):
    """Images of a dataset as they are shown: float [B, 3, H, W] in 0..1."""
    images = data.resize(dataset.images[indices].float() / 255, size)  # [B, C, H, W]
    return images.expand(-1, 3, *images.shape[2:]) if images.shape[1] == 1 else images


def normalised(dataset, indices, size):
    """The same images as the encoder takes them: float [B, C, H, W]."""
    return next(data.batches(dataset.subset(indices), len(indices), size))


# ---- features


@torch.no_grad()
def block_features(model, images, masks, predictor):
    """Predicted and true features of the target patches of normalised images, each [B, M, Nt, D], layer-normed."""
    context = model.context_encoder(images, masks.context, masks.context_valid)  # [B, Nc, D]
    predicted = predictor(context, masks)
    return F.layer_norm(predicted, predicted.shape[-1:]), model.targets(images, masks)


@torch.no_grad()
def gallery_features(model, images):
    """Layer-normed target features of every patch of normalised images [G, C, H, W] -> [G * N, D]."""
    return torch.cat([model.target_tokens(part) for part in images.split(256)]).flatten(0, 1)  # [G * N, D]


def nearest(queries, gallery, k=1):
    """Indices [Q, k] of the rows of the gallery [K, D] with the highest cosine to each query [Q, D], best first."""
    gallery = F.normalize(gallery, dim=1)
    return torch.cat([(F.normalize(part, dim=1) @ gallery.T).topk(k, dim=1).indices for part in queries.split(512)])


def retrieval(model, untrained, images, labels, masks, gallery_images, gallery_labels):
    """How well predicted features find the right patch, for the trained and an untrained predictor: a dict of fractions.

    images [B, C, H, W] normalised with Masks; gallery_images [G, C, H, W] other held-out images. For recall@1, 5 and 10 the
    gallery also holds the patches of the queries themselves, so the true patch is there to be found among `gallery_size`;
    `median_rank` is its place. Class agreement is the share of nearest patches, all of other images, whose image has the
    query's class (`labels` may be None).
    """
    N, others = model.masking.N, gallery_features(model, gallery_images)
    gallery = torch.cat([gallery_features(model, images), others])  # [(B + G) * N, D]
    _, valid = masks.valid()  # [B, M, Nt]
    image_number = torch.arange(len(images))[:, None, None].expand_as(masks.targets)
    truth = (image_number * N + masks.targets)[valid]  # [Q], place of the true patch in the gallery
    results = {"gallery_size": len(gallery), "queries": len(truth)}
    unit = F.normalize(gallery, dim=1)
    for name, predictor in (("trained", model.predictor), ("untrained", untrained)):
        predicted, _ = block_features(model, images, masks, predictor)
        queries = F.normalize(predicted[valid], dim=1)  # [Q, D]
        ranks = []
        for part, right in zip(queries.split(512), truth.split(512)):
            cosine = part @ unit.T  # [q, (B + G) * N]
            ranks.append((cosine > cosine.gather(1, right[:, None])).sum(1))  # 0: the true patch is the nearest
        ranks = torch.cat(ranks)
        results[name] = {f"recall@{k}": (ranks < k).float().mean().item() for k in (1, 5, 10)}
        results[name]["median_rank"] = ranks.float().median().item() + 1
        if labels is not None:
            found = nearest(predicted[valid], others)[:, 0] // N
            results[name]["class_agreement"] = (gallery_labels[found] == labels[image_number[valid]]).float().mean().item()
    return results


# ---- what the predictor imagines


def make_gallery(model, images, pictures):
    """The patches that hidden ones may be filled with: a Gallery of all patches of G images, given normalised and as pictures."""
    return Gallery(gallery_features(model, images), models.patchify(pictures, pictures.shape[-1] // model.masking.grid[0]).flatten(0, 1))


def fill(pictures, masks, features, gallery, grid):
    """Pictures [B, 3, H, W] with each target patch replaced by the gallery's nearest (cosine) to its feature in [B, M, Nt, D]."""
    patch = pictures.shape[-1] // grid[0]
    _, valid = masks.valid()  # [B, M, Nt]
    row = torch.arange(len(pictures))[:, None, None].expand_as(masks.targets)  # [B, M, Nt], number of the image
    patches = models.patchify(pictures, patch).clone()  # [B, N, 3 * patch**2]
    patches[row[valid], masks.targets[valid]] = gallery.patches[nearest(features[valid], gallery.features)[:, 0]]
    return models.unpatchify(patches, grid, patch)  # [B, 3, H, W]


def neighbours_figure(model, untrained, images, pictures, masks, gallery, title=""):
    """What the predictor imagines: hidden patches replaced by the gallery patch whose target feature is nearest (cosine).

    A row an image: original, context, one column for each target block filled from *predicted* features, all blocks at once,
    then two controls: filled from the *true* features (the best this gallery can do) and from an `untrained` predictor's.
    The gallery is of other images.
    """
    M, grid, size = masks.targets.shape[1], model.masking.grid, pictures.shape[-1]
    context, targets = masks.maps(model.masking.N)  # [B, N], [B, M, N]
    hidden = torch.where(to_pixels(context, size, grid)[:, None], pictures, 1.0)  # [B, 3, H, W]
    predicted, true = block_features(model, images, masks, model.predictor)
    guess, _ = block_features(model, images, masks, untrained)
    filled, best, chance = (fill(hidden, masks, features, gallery, grid) for features in (predicted, true, guess))
    where = to_pixels(targets, size, grid)[:, :, None]  # [B, M, 1, H, W]
    columns = [("original", pictures), ("context", hidden)]
    columns += [(f"block {m + 1}", torch.where(where[:, m], filled, hidden)) for m in range(M)]
    columns += [("all predicted", filled), ("true features", best), ("untrained", chance)]
    return table([(name, by_slice(part, grid)) for name, part in columns], title)[0]


def slide(grid, sides):
    """One block of `sides` (rows, columns of patches) at each of its P places on the grid, in raster order: Masks of P images.

    The context is all the rest, more than in training, so nothing is padded: context [P, N - Nt], targets [P, 1, Nt].
    """
    cells = blocks = torch.arange(math.prod(grid)).view(grid)
    for axis, length in enumerate(sides):
        blocks = blocks.unfold(axis, length, 1)  # in the end [places on each axis, sides]
    blocks = blocks.flatten(len(grid)).flatten(0, -2)  # [P, Nt]
    hidden = torch.zeros(len(blocks), cells.numel(), dtype=torch.bool).scatter_(1, blocks, True)  # [P, N]
    context = cells.flatten().expand_as(hidden)[~hidden].view(len(blocks), -1)  # [P, N - Nt]
    return Masks(context, None, blocks[:, None], None)


def moving_block_figure(model, images, pictures, gallery, sides=None, places=5, title=""):
    """One block slides over each picture: what is imagined at up to `places` places of the middle row, and the error at every place.

    sides: rows and columns of the block, in patches; by default a block of the middle of the run's target scales. The error is the
    cosine distance of predicted and true features, averaged over the block, drawn at the block's centre. Of volumes the slice through
    the middle of the block is shown.
    """
    grid, size = model.masking.grid, pictures.shape[-1]
    scale = getattr(model.masking, "target_scale", (0.15, 0.2))  # random and raster masks have none
    sides = sides or [max(1, round(side * (sum(scale) / 2) ** (1 / len(grid)))) for side in grid]
    patch, masks = size // grid[-1], slide(grid, sides)
    room = [side - length + 1 for side, length in zip(grid, sides)]  # places on each axis
    *deep, down = [count // 2 for count in room[:-1]]  # the middle row, of volumes in the middle layer
    steps = torch.linspace(0, room[-1] - 1, min(places, room[-1])).round().long()
    chosen = torch.arange(math.prod(room)).view(room)[(*deep, down, steps)]  # of the P places
    some = Masks(masks.context[chosen], None, masks.targets[chosen], None)
    cut = (..., int((deep[0] + sides[0] / 2) * patch), slice(None), slice(None)) if deep else ...
    filled, errors = [], []
    for image, picture in zip(images, pictures):
        predicted, true = block_features(model, image.expand(len(masks.context), *image.shape), masks, model.predictor)  # [P, 1, Nt, D]
        filled.append(fill(picture.expand(len(chosen), *picture.shape), some, predicted[chosen], gallery, grid)[cut])  # [places, 3, H, W]
        errors.append((1 - F.cosine_similarity(predicted, true, dim=-1)).mean((1, 2)).view(room)[tuple(deep)])
    filled, errors, pictures = torch.stack(filled), torch.stack(errors), pictures[cut]  # [B, places, 3, H, W], [B, high, wide]
    columns = [(f"column {step + 1}", filled[:, place]) for place, step in enumerate(steps)]
    figure, axes = table([("original", pictures), *columns, ("error, by centre", 0.5 + 0.5 * pictures)], title)
    left, top = ((length - 1) / 2 * patch - 0.5 for length in (sides[-1], sides[-2]))  # the patch at the centre of the first place
    for row, error in zip(axes, errors):
        for panel, step in zip(row[1:], steps):
            frame(panel, (down * patch, step * patch), (sides[-2] * patch, sides[-1] * patch), COLOURS[5])
        row[-1].imshow(error.numpy(), cmap="magma", vmin=0, vmax=errors.max().item(),
                       extent=(left, left + room[-1] * patch, top + room[-2] * patch, top))
        row[-1].set(xlim=(-0.5, size - 0.5), ylim=(size - 0.5, -0.5))
    add_bar(figure, axes[:, -1], "cosine distance", shrink=0.8)
    return figure


def reconstruction_figure(model, images, pictures, masks, mean, std, title=""):
    """What a masked autoencoder answers: seen (the rest white), its reconstruction, and the original, a row an image.

    images: normalised by `mean` and `std` (a number a channel); pictures: the same in 0..1.
    """
    grid = model.masking.grid
    hidden = to_pixels(masks.maps(model.masking.N)[1][:, 0], pictures.shape[-1], grid)[:, None]  # [B, 1, H, W]
    _, answered = mae.reconstruct(model, images, masks)
    mean, std = (torch.tensor(part).view(-1, *[1] * len(grid)) for part in (mean, std))  # [C, 1, 1]
    columns = [("seen", torch.where(hidden, 1.0, pictures)), ("reconstructed", (answered * std + mean).expand_as(pictures)),
               ("original", pictures)]
    return table([(name, by_slice(part, grid)) for name, part in columns], title)[0]


def error_figure(model, images, pictures, generator, draws=32, title=""):
    """Where prediction is hard: mean cosine distance of predicted and true feature for each patch, over many masks."""
    B, N, grid = len(images), model.masking.N, model.masking.grid
    total, count = torch.zeros(B, N), torch.zeros(B, N)
    for _ in range(draws):
        masks = model.masking(B, generator)
        predicted, true = block_features(model, images, masks, model.predictor)
        _, valid = masks.valid()  # [B, M, Nt]
        distance = 1 - F.cosine_similarity(predicted, true, dim=-1)  # [B, M, Nt]
        total.scatter_add_(1, masks.targets.flatten(1), (distance * valid).flatten(1))
        count.scatter_add_(1, masks.targets.flatten(1), valid.float().flatten(1))
    error = (total / count.clamp(min=1)).unflatten(1, grid)  # [B, rows, columns]
    rows = by_slice(pictures, grid), by_slice(error, grid)
    figure, axes = table([("", pair) for pair in zip(*rows)], title, cmap="magma", vmax=error.max().item())
    add_bar(figure, axes[1], "cosine distance")
    return figure


# ---- where the encoder looks


@torch.no_grad()
def attention_weights(encoder, images):
    """How the last block mixes the patches of normalised images: softmax weights [B, nh, N, N], queries in rows, each summing to 1."""
    attention, inputs = encoder.blocks[-1].attention, []
    hook = attention.register_forward_pre_hook(lambda module, given: inputs.append(given[0]))  # the fused kernel keeps no weights
    encoder(images)
    hook.remove()
    q, k, _ = attention.qkv(inputs[0]).unflatten(-1, (3, attention.heads, -1)).permute(2, 0, 3, 1, 4)  # each [B, nh, N, D/nh]
    return (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(dim=-1)  # [B, nh, N, N]


def attention_figure(encoder, images, pictures, title="", queries=None):
    """Attention of the last block, averaged over heads: for each image the mean over all queries, then that of single patches.

    queries: patch indices, by default three far from each other. Weights are in multiples of an even share, 1/N.
    """
    grid, patch = encoder.grid, encoder.patch_size
    if queries is None:
        shares = ((0.5, 0.2, 0.2), (0.5, 0.5, 0.5), (0.5, 0.8, 0.2))  # of layers, down and across
        places = np.array([share[-len(grid) :] for share in shares]) * grid  # [3, axes]
        queries = np.ravel_multi_index(places.astype(int).T, grid)  # [3]
    weights = attention_weights(encoder, images).mean(1) * math.prod(grid)  # [B, N, N]
    columns = [("mean of all", weights.mean(1)), *((f"from patch {query}", weights[:, query]) for query in queries)]  # maps [B, N]
    columns = [("image", pictures), *((name, values.unflatten(1, grid)) for name, values in columns)]
    top = torch.stack([values for _, values in columns[1:]]).quantile(0.99).item()
    figure, axes = table([(name, by_slice(part, grid)) for name, part in columns], title, cmap="viridis", vmax=top)
    for i, row in enumerate(axes):
        for panel, query, colour in zip(row[2:], queries, (COLOURS[5], COLOURS[3], COLOURS[0])):
            *layer, down, across = np.unravel_index(query, grid)
            if layer and i % grid[0] != layer[0]:  # the patch that asks is in another slice
                continue
            frame(panel, (down, across), (1, 1), colour)
            frame(row[0], (patch * down, patch * across), (patch, patch), colour)
    add_bar(figure, axes[:, 1:], "attention (1: an even share)", shrink=0.6, extend="max")
    return figure


# ---- command line


@dataclass
class Run:
    """A trained run and the images that its figures show: the first SHOWN of `order` in rows, those after them as the gallery."""

    folder: Path
    model: models.IJEPA
    config: config.Config
    about: dict  # what checkpoint.load_run says of its data
    test: data.ImageDataset
    order: torch.Tensor  # int64 [n], a random order of the test images
    gallery_size: int
    tsne_size: int
    seed: int

    @property
    def rows(self):
        """How many images the rows of a figure show; of volumes, which have a row for each slice, two."""
        return SHOWN if self.about["axes"] == 2 else 2

    @property
    def what(self):
        """Data and run, for titles."""
        return f"{self.test.name}, {self.folder.name}{', by slice' if self.about['axes'] == 3 else ''}"

    def take(self, start, stop):
        """The images from place `start` to `stop` of the order, normalised and as pictures."""
        chosen, size = self.order[start:stop], self.config.image_size
        return normalised(self.test, chosen, size), rgb(self.test, chosen, size)


def predictor_figures(run, untrained, generator):
    """Yields (file name, Figure): what is hidden from a run's model, and what its predictor makes of it."""
    model, (images, pictures) = run.model, run.take(0, run.rows)
    masks = model.masking(run.rows, generator)
    yield "masks", mask_figure(pictures, masks, model.masking.grid,
                               f"{run.what}: seen by the context encoder (the rest is white), and to be predicted (in colour)")
    yield "coverage", coverage_figure(model.masking, generator)
    gallery = make_gallery(model, *run.take(SHOWN, SHOWN + run.gallery_size))
    yield "predictor_neighbours", neighbours_figure(
        model, untrained, images, pictures, masks, gallery,
        f"{run.what}: hidden patches filled with the nearest of {run.gallery_size:,} held-out images' patches.\n"
        "Notice where 'all predicted' goes on with what the context shows, and what only 'true features' finds")
    yield "moving_block", moving_block_figure(
        model, images[:4], pictures[:4], gallery, title=f"{run.what}: one block, asked about at several places.\n"
        "Notice how the answer changes with the place, and where the error is high")
    yield "prediction_error", error_figure(
        model, images, pictures, generator, title=f"{run.what}: where prediction is hard (mean of 32 masks).\n"
        "Notice that outlines and small things are harder than plain ground")


def decoder_figures(run, generator):
    """Yields (file name, Figure): what a masked autoencoder makes of hidden patches."""
    images, pictures = run.take(0, run.rows)
    yield "reconstruction", reconstruction_figure(
        run.model, images, pictures, run.model.masking(run.rows, generator), run.test.mean, run.test.std,
        f"{run.what}: three quarters hidden, and the decoder's answer.\n"
        "Each patch is given the true one's mean and contrast, which the decoder is not asked for")


def encoder_figures(run):
    """Yields (file name, Figure): how a run's target encoder sees single patches, and whole images."""
    encoder, (images, pictures), size = run.model.target_encoder, run.take(0, run.rows), run.config.image_size
    with torch.no_grad():
        tokens = encoder(images)  # [B, N, D]
    yield "tokens", token_figure(tokens, encoder.grid, pictures, f"{run.what}: first three principal components of the patch tokens.\n"
                                 "Notice that alike patches get alike colours, in all images")
    yield "attention", attention_figure(encoder, images[:4], pictures[:4], f"{run.what}: attention of the last block.\n"
                                        "Notice how it depends on the patch that asks (framed)")
    labels = run.test.labels
    used = run.order[: max(SHOWN + run.gallery_size, 0 if labels is None else run.tsne_size)]
    pooled = evaluate.features(encoder, run.test.subset(used), size, "cpu")  # [n, D]
    found = SHOWN + nearest(pooled[:SHOWN], pooled[SHOWN : SHOWN + run.gallery_size], 7)  # [SHOWN, 7]
    queries, matches = (rgb(run.test, run.order[numbers], size) for numbers in (slice(SHOWN), found.flatten()))
    if run.about["axes"] == 3:
        queries, matches = queries[:, :, size // 2], matches[:, :, size // 2]  # the middle slice
    yield "nearest_images", nearest_images_figure(
        queries, matches.unflatten(0, found.shape),
        f"{run.what}: nearest of {run.gallery_size:,} held-out images by pooled target features.\nNotice what makes two images alike")
    if labels is None:
        print(f"left out tsne: the images of {run.test.name} have no labels to colour it by")
        return
    used = run.order[: run.tsne_size]
    random = evaluate.random_encoder(run.config, run.about, torch.device("cpu"), run.seed)
    features = {"target encoder": pooled[: run.tsne_size], "random encoder": evaluate.features(random, run.test.subset(used), size, "cpu")}
    yield "tsne", tsne_figure(features, labels[used], run.test.class_names or [str(k) for k in range(int(labels.max()) + 1)],
                              f"{run.what}: t-SNE of {len(used):,} held-out images' pooled features.\n"
                              "Notice which classes come apart, if any, and whether only after training")


def recorded(path, read):
    """What `read` makes of the text of a file in the run's folder, None where there is no file; UsageError where it is damaged."""
    try:
        return read(path.read_text()) if path.exists() else None
    except (ValueError, KeyError, TypeError) as error:
        raise config.UsageError(f"{path} is damaged ({data.one_line(error)}); move it away to draw what it does not hold") from None


def rows_of(text):
    """The rows of metrics.csv, dicts of strings, each with its step."""
    return [row for row in csv.DictReader(text.splitlines()) if int(row["step"]) >= 0]


def recorded_figures(run):
    """Yields (file name, Figure) from the files that training and evaluation left in the run's folder; says what is missing."""
    path = run.folder / "metrics.csv"
    if rows := recorded(path, rows_of):
        yield "curves", curves_figure(rows, f"{run.what}: training")
    else:
        print(f"left out curves: {path} has no rows; train for longer")
    path = run.folder / "evaluation.json"
    results = recorded(path, json.loads) or {"features": {}}
    target = results["features"].get("target", {})
    figures = [("comparison", comparison_figure, target), ("confusion", confusion_figure, "confusion" in target),
               ("per_class", per_class_figure, "per_class" in target),
               ("low_shot", low_shot_figure, results.get("low_shot", {}).get("per_class"))]  # empty where classes are too small
    yield from ((name, figure(results)) for name, figure, there in figures if there)
    missing = ", ".join(name for name, _, there in figures if not there)
    if missing:
        why = "does not hold them" if path.exists() else "is not there"
        print(f"left out {missing}: {path} {why}; run python evaluate.py {run.folder}"
              + (" --dataset NAME, with labelled data" if run.test.labels is None else ""))


def write_retrieval(run, untrained, generator):
    """Write retrieval.json for the first 200 images of the gallery as queries and the others as their gallery, and print it."""
    first, middle, last = SHOWN, SHOWN + 200, SHOWN + run.gallery_size
    labels = [None if run.test.labels is None else run.test.labels[part] for part in (run.order[first:middle], run.order[middle:last])]
    numbers = retrieval(run.model, untrained, run.take(first, middle)[0], labels[0], run.model.masking(200, generator),
                        run.take(middle, last)[0], labels[1])
    (run.folder / "figures" / "retrieval.json").write_text(json.dumps(numbers, indent=2))
    print(json.dumps(numbers))


def images_to_show(run_config, data_dir):
    """The run's test images; where its data has no test split, as a flat folder has none, those held out of training; says so."""
    try:
        return data.load(run_config.dataset, "test", data_dir, run_config.image_size)
    except config.UsageError:
        dataset = data.load(run_config.dataset, run_config.split, data_dir, run_config.image_size)
        held = train.hold_out(run_config, len(dataset))[1]
        enough = len(held) >= 250 + SHOWN
        kind = "held out of training" if enough else "trained on"
        print(f"{run_config.dataset} has no test images: the figures show images that were {kind}")
        return dataset.subset(held) if enough else dataset


def load(args):
    """The Run that the command line asks for; raises UsageError where images are too few."""
    model, run_config, about = checkpoint.load_run(args.run)
    test = images_to_show(run_config, args.data_dir or run_config.data_dir)
    if len(test) < 250 + SHOWN:
        raise config.UsageError(f"{run_config.dataset} has {len(test)} test images; the figures need {250 + SHOWN} or more")
    order = torch.randperm(len(test), generator=torch.Generator().manual_seed(args.seed))
    gallery_size = min(args.images, len(test) - SHOWN)
    return Run(args.run, model, run_config, about, test, order, gallery_size, args.tsne_images or len(test), args.seed)


def arguments(argv):
    """The command line as a namespace."""
    parser = config.Parser(prog="predict_and_visualize.py", description="Write every figure of a run into RUN/figures.")
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder that train.py wrote")
    parser.add_argument("--data-dir", help="folder of the data, where it is not the one the run was trained from")
    parser.add_argument("--images", type=int, default=2000, help="held-out images in the galleries (default 2000)")
    parser.add_argument("--tsne-images", type=int, default=TSNE_IMAGES, help=f"held-out images in t-SNE; 0 is all (default {TSNE_IMAGES})")
    parser.add_argument("--seed", type=int, default=0, help="seed of the images and masks shown (default 0)")
    args = parser.parse_args(argv)
    config.need(args, args.images >= 250, "images", "it must be 250 or more")
    config.need(args, args.tsne_images == 0 or args.tsne_images >= 100, "tsne_images", "it must be 0 (all) or 100 or more")
    config.need(args, 0 <= args.seed <= config.LARGEST, "seed", config.SEEDS)
    config.need(args, args.data_dir != "", "data_dir", "it needs a name")
    return args


def main(argv=None):
    """Write the figures of one run; raises UsageError for what the user can put right."""
    run = load(arguments(argv))
    generator, folder = torch.Generator().manual_seed(run.seed), run.folder / "figures"
    folder.mkdir(exist_ok=True)
    def save(figures):
        for name, figure in figures:
            figure.savefig(folder / f"{name}.png", dpi=130)
            print(f"{folder / name}.png", flush=True)

    if isinstance(run.model, models.IJEPA) and run.config.targets == "features":
        with torch.random.fork_rng():
            torch.manual_seed(run.seed)
            untrained = methods.build(run.config, run.about["channels"], run.about["axes"]).predictor.eval()
        save(predictor_figures(run, untrained, generator))
        write_retrieval(run, untrained, generator)
    elif run.config.method == "mae":
        save(decoder_figures(run, generator))
    else:
        print(f"left out what the predictor imagines: --method {run.config.method} predicts no features")
    save(encoder_figures(run))
    save(recorded_figures(run))


if __name__ == "__main__":
    config.run(main)
