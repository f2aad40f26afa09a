"""Film of a run: what its encoder sees, at moments of training that were kept.

    python -m extras.film --preset shapes       trains as train.py does, into runs/shapes-film, and
                                                keeps the target encoder of some moments
    python -m extras.report runs/shapes-film    its page then has a slider over these moments

They are kept after 25, 50, 100, 200, ... optimizer steps, as RUN/snapshots/STEP/checkpoint.pt. Each
is a small run folder: `python evaluate.py RUN/snapshots/000400` says what that encoder knows.
Notation as in models.py; n images in a film, of which R have a row of their own.
"""

import io
from html import escape
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.colors import to_rgb
from PIL import Image
from scipy.linalg import orthogonal_procrustes
from sklearn.decomposition import PCA

import data
import evaluate
import train
from config import UsageError
from extras.figures import as_colors
from extras.report_pictures import image_tag
from predict_and_visualize import arrange, images_to_show, normalized, rgb
from support import checkpoint, command_line, distributed
from support.plots import COLORS

PROGRAM = "-m extras.film"
FIRST = 25  # optimizer steps until the first moment; each later one is at twice as many
IMAGES, ROWS, NEAREST = 500, 5, 5  # in a film; with a row of their own; neighbors in a row
SIDE = 48  # pixels of a small image, at most

# --- while training -------------------------------------------------------------------------------


def is_moment(step):
    """Whether the encoder of this optimizer step is kept: 25, 50, 100, 200, ..."""
    return step % FIRST == 0 and (step // FIRST).bit_count() == 1


def keep_snapshots(model, config, about, step=0):
    """Let a model, any that train.train takes, write its target encoder at every moment; `step`
    optimizer steps are done already. about: what a checkpoint says of the data.

    train_step calls `update_target` once a step, so that is where the steps are counted.
    """
    update = model.update_target

    def update_and_keep(momentum):
        nonlocal step
        update(momentum)
        step += 1
        if is_moment(step) and distributed.is_first():
            write_snapshot(model, config, about, step)

    model.update_target = update_and_keep


def write_snapshot(model, config, about, step):
    """Write RUN/snapshots/STEP/checkpoint.pt, which holds the target encoder and cannot resume."""
    weights = {f"target_encoder.{key}": value
               for key, value in model.target_encoder.state_dict().items()}
    state = checkpoint.finished(config, about, {"step": step}, weights)
    folder = Path(config.out) / "snapshots" / f"{step:06}"
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint.write(folder / "checkpoint.pt", lambda path: torch.save(state, path))


# --- what is shown of a moment --------------------------------------------------------------------


class Frame(NamedTuple):
    """What the encoder of one moment makes of the same images."""

    colors: torch.Tensor  # [R, 3, *grid]: principal components of the patch tokens, 0 to 1
    places: np.ndarray  # [n, 2]: t-SNE of the pooled features
    neighbors: torch.Tensor  # [n, NEAREST]: the nearest other images by pooled features


def encoders_of(folder):
    """Step -> target encoder, in order: untrained, at every snapshot, and as the run is now."""
    encoders, config, about = evaluate.load_encoders(folder)
    found = {0: evaluate.untrained_encoder(config, about, config.seed),
             about["progress"]["step"]: encoders["target"]}
    for path in folder.glob("snapshots/*/checkpoint.pt"):
        encoders, _, there = evaluate.load_encoders(path.parent)
        found[there["progress"]["step"]] = encoders["target"]
    return dict(sorted(found.items()))


def principal_components(tokens, like=None):
    """The first three principal components [R*N, 3] of patch tokens [R, N, D].

    like: components of another moment. The new ones are rotated to be as near to them as possible:
    a principal component has no sign and no fixed rank, and colors would flicker.
    """
    parts = PCA(3, random_state=0).fit_transform(tokens.flatten(0, 1).numpy())
    parts = parts / max(parts.std(), 1e-9)
    return parts if like is None else parts @ orthogonal_procrustes(parts, like)[0]


def nearest_others(features, k):
    """For each of the features [n, D] the k others of highest cosine, best first: [n, k]."""
    unit = F.normalize(features, dim=1)
    return (unit @ unit.T).fill_diagonal_(-2).topk(min(k, len(unit) - 1), dim=1).indices


@torch.no_grad()
def frames_of(encoders, images):
    """Step -> Frame for a dict of step -> Encoder, on an ImageDataset of two images or more."""
    shown, tokens, pooled = images.subset(range(min(ROWS, len(images)))), {}, {}
    for step, encoder in encoders.items():
        tokens[step] = encoder(normalized(shown, encoder.image_size))  # [R, N, D]
        pooled[step] = evaluate.features(encoder, images, encoder.image_size)  # [n, D]
    colors, parts = {}, None
    for step, encoder in reversed(encoders.items()):  # the last moment's are not rotated
        parts = principal_components(tokens[step], parts)  # [R*N, 3]
        flat = as_colors(parts).unflatten(0, tokens[step].shape[:2])  # [R, N, 3]
        colors[step] = flat.mT.unflatten(2, encoder.grid)
    frames, places = {}, None
    for step, features in pooled.items():
        places = arrange(features, places)  # from the moment before: images stay where they can
        frames[step] = Frame(colors[step], places, nearest_others(features, NEAREST))
    return frames


# --- as HTML --------------------------------------------------------------------------------------

NOTICE = ("Tokens: their first three principal components as red, green and blue, turned so that "
          "colors change little between moments. Framed: nearest images of the same class. "
          "Points: t-SNE of the pooled features, started from the places of the moment before.")
# Outlines of the classes' marks, from a point: circle, square, triangle, diamond, plus.
MARKS = ("m-3,0a3,3 0 1,0 6,0a3,3 0 1,0-6,0z", "m-2.6-2.6h5.2v5.2h-5.2z", "m0-3.4l3.2,5.6h-6.4z",
         "m0-3.6l3.6,3.6l-3.6,3.6l-3.6-3.6z",
         "m-1-3.2h2v2.2h2.2v2h-2.2v2.2h-2v-2.2h-2.2v-2h2.2z")


def class_names(images):
    """The names of an ImageDataset's classes; numbers if they have none."""
    return images.class_names or range(int(images.labels.max()) + 1)


def marks(k, name, points):
    """The points (x, y) of class k as one SVG path; there are five marks, filled and hollow."""
    color = COLORS[k % len(COLORS)].replace("#000000", "inherit")  # black; in the dark, white
    outline = "".join(f"M{x:.0f},{y:.0f}{MARKS[k % len(MARKS)]}" for x, y in points)
    hollow = " class=hollow" if k // len(MARKS) % 2 else ""
    return (f'<path{hollow} style="color:{color}" d="{outline}"><title>{escape(str(name))}</title>'
            "</path>")


def scatter(places, images):
    """An SVG of places [n, 2] of an ImageDataset's images, with a mark for each class."""
    low, span = places.min(0), max(np.ptp(places, axis=0).max(), 1e-9)
    points = 6 + 288 * (places - low) / span  # [n, 2]
    if images.labels is None:
        paths = marks(0, "an image", points)
    else:
        names, labels = class_names(images), images.labels.numpy()
        paths = "".join(marks(k, names[k], points[labels == k]) for k in np.unique(labels))
    return ('<svg viewBox="0 0 300 300" class=scatter role=img aria-label="t-SNE of '
            f'{len(places)} images">{paths}</svg>')


def legend(images):
    """The marks of the classes with their names; nothing for images without labels."""
    if images.labels is None:
        return ""
    names = class_names(images)
    entries = (f'<li><svg viewBox="0 0 10 10">{marks(k, names[k], [(5, 5)])}</svg>'
               f"{escape(str(names[k]))}</li>" for k in images.labels.unique().tolist())
    return f"<ul class=legend>{''.join(entries)}</ul>"


def sheet(cells, framed, alt):
    """An <img> of images [R, columns, 3, side, side] from 0 to 1, in rows and columns; those of
    `framed`, bool [R, columns], have a frame."""
    R, columns, _, side, _ = cells.shape
    canvas = torch.zeros(R, columns, 4, side + 6, side + 6)  # red, green, blue, opacity
    frame = torch.tensor([*to_rgb(COLORS[4]), 1.0]).view(4, 1, 1)
    canvas[..., 1:-1, 1:-1] = frame * framed[:, :, None, None, None]
    canvas[..., 3:-3, 3:-3] = F.pad(cells, (0, 0, 0, 0, 0, 1), value=1.0)
    pixels = canvas.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)  # [height, width, 4]
    image, file = Image.fromarray((255 * pixels).round().byte().numpy()), io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return image_tag(file.getvalue(), "png", image.size, alt, " class=sheet")


def middle(pictures):
    """Pictures [B, 3, H, W] as they are; of volumes [B, 3, T, H, W] the middle slice."""
    return pictures if pictures.ndim == 4 else pictures[:, :, pictures.shape[2] // 2]


def small(images, numbers):
    """Some images of an ImageDataset to look at, [k, 3, side, side]."""
    some, size = images.subset(numbers), images.images.shape[-1]
    return data.resize(middle(rgb(normalized(some, size), some)), min(size, SIDE))


def agreement(neighbors, labels):
    """How many of the neighbors [n, k] are of an image's own class, and how many of all others
    are: two fractions."""
    own = (labels[neighbors] == labels[:, None]).float().mean().item()
    others = labels.bincount()[labels] - 1  # [n], of each image's class, itself left out
    return own, (others.float().mean() / (len(labels) - 1)).item()


def frame_html(step, frame, images):
    """One moment: a row for each of R images, of the image, its tokens' colors and its neighbors;
    and the t-SNE of all n."""
    R, labels, says = len(frame.colors), images.labels, ""
    queries, found = small(images, range(R)), small(images, frame.neighbors[:R].flatten())
    colors = F.interpolate(middle(frame.colors), queries.shape[-2:])  # [R, 3, side, side]
    found = found.unflatten(0, (R, -1))  # [R, NEAREST, 3, side, side]
    cells = torch.cat([queries[:, None], colors[:, None], found], dim=1)
    framed = torch.zeros(cells.shape[:2], dtype=torch.bool)
    if labels is not None:
        framed[:, 2:] = labels[frame.neighbors[:R]] == labels[:R, None]
        own, chance = agreement(frame.neighbors, labels)
        says = (f"Of the {frame.neighbors.shape[1]} nearest of each of {len(labels)} images, "
                f"{own:.1%} are of its own class; of all other images, {chance:.1%}.")
    when = f"After {step:,} steps" if step else "Before training"
    image = sheet(cells, framed, f"{when}: {R} images, their tokens, and the nearest images")
    return (f'<div class=frame data-when="{when}"><h3>{when}</h3><p>{says}</p><div class=pair>'
            "<div><p class=heads><span>image</span><span>tokens</span><span>nearest images</span>"
            f"</p>{image}</div>{scatter(frame.places, images)}</div></div>")


def film(folder):
    """The film of a run folder with snapshots, as HTML. Raises UsageError without its data."""
    config = checkpoint.load(folder)[0]
    images = images_to_show(config, config.data_dir)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images = images.subset(order[:IMAGES])
    if len(images) < 2:
        raise UsageError(f"{config.dataset} has one image to show; a film needs two or more")
    frames = frames_of(encoders_of(folder), images)
    shown = "".join(frame_html(step, frame, images) for step, frame in frames.items())
    return (f"<div class=film><p class=notice>{NOTICE}</p>{legend(images)}"
            "<div class=controls hidden><button>Play</button><input type=range min=0 "
            f'max={len(frames) - 1} value=0 aria-label="moment of training"></div>{shown}</div>')


# --- the program ----------------------------------------------------------------------------------


def main(argv=None):
    """The command line: as train.py's."""
    arguments = command_line.parse(argv, "Pretrain I-JEPA and keep its target encoder after 25, "
                                   "50, 100, 200, ... steps.", suffix="-film")
    config = arguments.config
    dataset = data.load(config.dataset, config.split, config.data_dir, config.image_size)
    model, masking = train.build(config, *dataset.shape)
    done = checkpoint.load(config.out)[1]["progress"]["step"] if arguments.resume else 0
    keep_snapshots(model, config, {**dataset.describe(), "program": PROGRAM}, done)
    train.train(config, model, masking, dataset, arguments.resume, arguments.override, PROGRAM)


if __name__ == "__main__":
    command_line.run(main)
