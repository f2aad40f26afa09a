"""What a run looks like: its masks, what its predictor imagines, its curves, its features.

    python predict_and_visualize.py RUN    writes masks, predictor_neighbors, curves and tsne into
                                           RUN/figures
    python -m extras.figures RUN           these and many more

Every figure is a function from tensors to a matplotlib Figure: scripts save it, notebooks show it,
tests call it. Notation as in models.py; `images` are normalized, float [B, C, H, W], as the encoder
takes them; `pictures` are the same images for display, float [B, 3, H, W] from 0 to 1.
"""

import contextlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE

import data
import evaluate
import train
from config import Config, UsageError, check
from models import patchify
from support import command_line
from support.logs import complete_rows
from support.plots import (class_dots, class_legend, curves_figure, headline, plain, save_figure,
                           table)

# --- images for display ---------------------------------------------------------------------------


def normalized(dataset, size, device="cpu"):
    """All images of an ImageDataset as the encoder takes them: float [B, C, H, W]."""
    return torch.cat(list(data.batches(dataset, 256, size, device)))


def rgb(images, dataset):
    """Normalized images of an ImageDataset as they look: float [B, 3, H, W] from 0 to 1."""
    shape = (-1,) + (1,) * (images.ndim - 2)  # a value for each channel
    mean, std = (images.new_tensor(part).view(shape) for part in (dataset.mean, dataset.std))
    pictures = (images * std + mean).clamp(0, 1)
    return pictures.expand(-1, 3, *pictures.shape[2:])


def unpatchify(patches, shape, p):
    """`patchify` undone: patches [B, N, C*p*p] -> images [B, *shape], with shape (C, H, W)."""
    numbers = torch.arange(math.prod(shape), device=patches.device).view(1, *shape)
    images = patches.new_empty(len(patches), numbers.numel())
    images[:, patchify(numbers, p)[0]] = patches  # each value goes where its number came from
    return images.view(-1, *shape)


def to_pixels(flags, grid, p):
    """Maps of the patches [..., N] as maps of the pixels [..., H, W]."""
    flags = flags.unflatten(-1, grid)
    for axis in range(-len(grid), 0):
        flags = flags.repeat_interleave(p, axis)
    return flags


# --- masks ----------------------------------------------------------------------------------------


def mask_figure(pictures, masks, grid, title=""):
    """A row for each image: all of it, what the context encoder sees, and each target block.

    pictures [B, 3, H, W] with their Masks; grid: rows and columns of patches. The rest is white.
    """
    p = pictures.shape[-1] // grid[-1]
    context, targets = (to_pixels(part, grid, p) for part in masks.maps(math.prod(grid)))
    M = targets.shape[1]
    names = [f"target block {m + 1}" for m in range(M)] if M > 1 else ["targets, merged"]
    parts = {"context": context, **dict(zip(names, targets.unbind(1)))}  # each [B, H, W]
    shown = [(name, torch.where(part[:, None], pictures, 1.0)) for name, part in parts.items()]
    return table([("image", pictures), *shown], title)[0]


# --- what the predictor imagines ------------------------------------------------------------------


class Gallery(NamedTuple):
    """The patches that hidden ones may be filled with, all of images that are not shown."""

    features: torch.Tensor  # [K, D]: layer-normed target features
    patches: torch.Tensor  # [K, 3*p*p]: the pixels


@torch.no_grad()
def make_gallery(model, images, pictures):
    """The Gallery of all patches of some images, normalized and as pictures."""
    tokens = torch.cat([model.target_encoder(part) for part in images.split(256)])  # [G, N, D]
    features = F.layer_norm(tokens, tokens.shape[-1:]).flatten(0, 1)  # [G*N, D]
    return Gallery(features, patchify(pictures, model.target_encoder.patch_size).flatten(0, 1))


def nearest(queries, rows, k=1):
    """Which of the rows [K, D] have the highest cosine to each query [Q, D]: [Q, k], best first."""
    rows = F.normalize(rows, dim=1)
    return torch.cat([(F.normalize(part, dim=1) @ rows.T).topk(k, dim=1).indices
                      for part in queries.split(512)])


def fill(pictures, masks, features, gallery, p):
    """Pictures with every target patch replaced by the gallery's nearest to its feature.

    features [B, M, Nt, D]: of the target patches; p: patch size in pixels.
    """
    real = masks.targets_valid  # [B, M, Nt]
    image = torch.arange(len(pictures), device=real.device)[:, None, None].expand_as(real)
    found = nearest(features[real], gallery.features)[:, 0]
    patches = patchify(pictures, p).clone()  # [B, N, 3*p*p]
    patches[image[real], masks.targets[real]] = gallery.patches[found]
    return unpatchify(patches, pictures.shape[1:], p)


@torch.no_grad()
def imagine(model, untrained, images, pictures, masks, gallery):
    """The columns of `neighbors_figure`: a list of (name, pictures [B, 3, H, W])."""
    encoder, p = model.target_encoder, model.target_encoder.patch_size
    output = model(images, masks)
    context = model.context_encoder(images, masks.context, masks.context_valid)  # [B, Nc, D]
    seen = to_pixels(masks.maps(len(encoder.positions))[0], encoder.grid, p)  # [B, H, W]
    seen = torch.where(seen[:, None], pictures, 1.0)
    answers = {"predicted": output.predictions, "true features": output.targets,
               "untrained predictor": untrained(context, masks)}  # each [B, M, Nt, D]
    filled = [(name, fill(seen, masks, features, gallery, p)) for name, features in answers.items()]
    return [("image", pictures), ("context", seen), *filled]


def neighbors_figure(model, untrained, images, pictures, masks, gallery, title=""):
    """What the predictor imagines: hidden patches, filled from a gallery of other images' patches.

    Each hidden place shows the patch whose target feature is nearest (cosine) to the predicted one.
    Two controls: the patch nearest to the *true* feature, the best that this gallery can do, and
    the one nearest to what an `untrained` predictor answers.
    """
    return table(imagine(model, untrained, images, pictures, masks, gallery), title, side=2)[0]


# --- features -------------------------------------------------------------------------------------


def arrange(features, start=None, seed=0):
    """t-SNE of features [n, D], n at least 2 -> places [n, 2] (NumPy).

    It begins from `start` [n, 2], by default the first two principal components.
    """
    n = len(features)
    x = PCA(min(50, *features.shape), random_state=seed).fit_transform(features.numpy())  # [n, 50]
    start = x[:, :2] if start is None else start
    start = 1e-4 * start / max(start[:, 0].std(), 1e-9)  # as init="pca", safe from 0 / 0
    perplexity = min(30, max(1, (n - 1) / 3))  # neighbors: one at least, below n
    return TSNE(perplexity=perplexity, init=start, angle=0.8, random_state=seed).fit_transform(x)


def tsne_figure(features, labels, class_names, title="", seed=0):
    """t-SNE of several features of the same images, side by side, in the colors of ten classes.

    Panel titles say how often an image's nearest neighbor (cosine of all D numbers) has its class.
    features: a dict of name -> float [n, D]; labels int64 [n]. Raises UsageError if n is below 2.
    """
    n, labels = len(labels), labels.cpu()
    if n < 2:
        raise UsageError(f"t-SNE places images by their distances and needs two or more, got {n}")
    figure = Figure(figsize=(4.8 * len(features), 5.8), layout="constrained")
    panels = figure.subplots(1, len(features), squeeze=False)[0]
    for axes, (name, x) in zip(panels, features.items()):
        x = x.cpu()
        alike = (labels[nearest(x, x, 2)[:, 1]] == labels).float().mean()
        class_dots(axes, arrange(x, seed=seed), labels.numpy())
        axes.set(xticks=[], yticks=[])
        axes.set_title(f"{plain(name)}\nnearest image has the same class: {alike:.0%}")
    class_legend(figure, class_names)
    headline(figure, title)
    return figure


# --- the figures of a run -------------------------------------------------------------------------

SHOWN = 4  # images in the rows of a figure


@dataclass
class Run:
    """A run, and held-out images in random order: the first `rows` to show, the rest a gallery."""

    folder: Path
    config: Config
    about: dict
    encoder: torch.nn.Module  # the target encoder
    model: torch.nn.Module | None  # None, like masking, if the run is no I-JEPA
    masking: object
    images: data.ImageDataset
    rows: int
    seed: int
    device: torch.device

    @property
    def what(self):
        """Data and run, for titles."""
        return f"run {self.folder.resolve().name} on {self.images.name}"

    def take(self, numbers):
        """Some of its images: normalized, and as pictures."""
        some = self.images.subset(numbers)
        images = normalized(some, self.encoder.image_size, self.device)
        return images, rgb(images, some)

    def untrained_predictor(self):
        """The predictor as it was before training."""
        model, _ = train.build(self.config, self.about["channels"], self.about["axes"])
        return model.predictor.to(self.device).eval()


def images_to_show(config, data_dir):
    """A run's test images; if its data has none, those held out of training, or, if there are too
    few, those trained on. Says which."""
    try:
        return data.load(config.dataset, "test", data_dir, config.image_size)
    except UsageError:
        dataset = data.load(config.dataset, config.split, data_dir, config.image_size)
        _, held = train.hold_out(config, len(dataset))
        kind = "held out of training" if len(held) > 2 * SHOWN else "trained on"
        print(f"{config.dataset} has no test images: the figures show images {kind}")
        return dataset.subset(held) if len(held) > 2 * SHOWN else dataset


def load(arguments):
    """The Run that a command line asks for. Raises UsageError if it has fewer than two images."""
    device, folder = train.pick_device(arguments.device), arguments.run
    encoders, config, about = evaluate.load_encoders(folder, device)
    model = masking = None
    with contextlib.suppress(UsageError):  # no I-JEPA: MAE, for example, which has an encoder only
        model, masking, *_ = train.load_run(folder, device)
    images = images_to_show(config, arguments.data_dir or config.data_dir)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(arguments.seed))
    images = images.subset(order[: arguments.images])
    if len(images) < 2:
        raise UsageError(f"{config.dataset} has one image to show; the figures need two or more")
    return Run(folder, config, about, encoders["target"], model, masking, images,
               min(SHOWN, len(images) // 2), arguments.seed, device)


def predictor_figures(run):
    """Yields (file name, Figure): the masks of a run, and what its predictor imagines."""
    images, pictures = run.take(range(run.rows))
    masks = run.masking(run.rows, torch.Generator().manual_seed(run.seed)).to(run.device)
    yield "masks", mask_figure(
        pictures, masks, run.masking.grid,
        f"{run.what}: what the context encoder sees, and what is to be predicted")
    others = range(run.rows, len(run.images))
    yield "predictor_neighbors", neighbors_figure(
        run.model, run.untrained_predictor(), images, pictures, masks,
        make_gallery(run.model, *run.take(others)),
        f"{run.what}: target blocks, filled with patches of {len(others):,} other images.\n"
        "Does 'predicted' continue what the context shows? (White: neither seen nor predicted.)")


def feature_figures(run):
    """Yields (file name, Figure): a run's curves, and its features; says what is missing."""
    if rows := complete_rows(run.folder / "metrics.csv"):
        yield "curves", curves_figure(rows, f"{run.what}: training")
    else:
        print(f"left out curves: {run.folder / 'metrics.csv'} has no rows")
    labels = run.images.labels
    if labels is None:
        print(f"left out tsne: the images of {run.images.name} have no labels to color it by")
        return
    encoders = {"target encoder": run.encoder,
                "untrained encoder": evaluate.untrained_encoder(run.config, run.about, run.seed)}
    features = {name: evaluate.features(encoder.to(run.device), run.images, encoder.image_size,
                                        run.device) for name, encoder in encoders.items()}
    names = run.images.class_names or list(range(int(labels.max()) + 1))
    yield "tsne", tsne_figure(
        features, labels, names, f"{run.what}: t-SNE of the features of {len(labels):,} images.\n"
        "Which classes come apart, and which only after training?")


def save(run, figures):
    """Write figures, pairs of (file name, Figure), into RUN/figures and print their paths."""
    folder = run.folder / "figures"
    folder.mkdir(exist_ok=True)
    for name, figure in figures:
        save_figure(figure, folder / f"{name}.png")
        print(folder / f"{name}.png", flush=True)


def parse(argv, description):
    """The command line as a namespace."""
    p = command_line.Parser(description=description)
    p.add_argument("run", type=Path, metavar="RUN", help="run folder that train.py wrote")
    p.add_argument("--images", type=int, default=2000, help="images in t-SNE; all but the four "
                   "shown also fill hidden patches (default 2000)")
    p.add_argument("--data-dir", help="folder of the data, if it has moved since training")
    p.add_argument("--seed", type=int, default=0, help="seed of images and masks (default 0)")
    p.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto",
                   help="auto is cuda where there is one, else cpu")
    arguments = p.parse_args(argv)
    check(arguments.images > 1, "images", arguments.images, "2 or more")
    return arguments


def main(argv=None):
    """The command line: write a run's figures into its folder."""
    run = load(parse(argv, "Draw what a run has learned, into RUN/figures."))
    left_out = "left out masks and predictor_neighbors:"
    if run.model is None:
        print(f"{left_out} only I-JEPA predicts features")
    elif run.about["axes"] == 3:
        print(f"{left_out} for volumes run python -m extras.figures {run.folder}")
    else:
        save(run, predictor_figures(run))
    save(run, feature_figures(run))


if __name__ == "__main__":
    command_line.run(main)
