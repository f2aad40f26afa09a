"""Figures that need no model: masks, coverage, training curves, t-SNE, tokens, and all that evaluation.json holds.

Each is a function from tensors, arrays or dicts to a matplotlib `Figure`, so that scripts save it, notebooks show it and tests
call it. Colours are Okabe and Ito's, which colour-blind readers tell apart. Alphabet as in models.py, `K` classes; images shown
are float [B, 3, H, W] in 0..1. Volumes [B, 3, T, H, W] are shown by slices, S to a volume, a row each.
"""

import math
import textwrap
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE

COLOURS = ["#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#0072B2", "#D55E00", "#F0E442", "#999999", "#000000", "#7F3C8D"]
# Label and colour of the features that evaluation.json compares, the same in every figure.
FEATURES = {"target": ("target encoder", COLOURS[4]), "context": ("context encoder", COLOURS[1]),
            "random": ("random encoder", COLOURS[0]), "pixels": ("raw pixels", COLOURS[7])}


# ---- small pieces


def show(axes, image, title="", cmap="gray", vmin=0, vmax=1):
    """One picture [3, H, W] in 0..1, or a map [H, W] in the colours of `cmap`, on an axes without ticks."""
    picture = image.movedim(0, -1).clamp(0, 1) if image.ndim == 3 else image  # [H, W, 3] or [H, W]
    axes.imshow(picture.numpy(), cmap=cmap, vmin=vmin, vmax=vmax, interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    axes.set_title(title, fontsize=9)


def table(columns, title="", **colours):
    """A Figure and its axes [rows, columns]: columns is a list of (name, images), the images as `show` takes them, maps in `colours`."""
    high, wide = len(columns[0][1]), len(columns)
    figure = Figure(figsize=(1.32 * wide + 0.3, 1.35 * high + 0.8), layout="constrained")
    axes = figure.subplots(high, wide, squeeze=False)
    for panels, (name, images) in zip(axes.T, columns):
        for i, (panel, image) in enumerate(zip(panels, images)):
            show(panel, image, "" if i else name, **colours)
    figure.suptitle(title, fontsize=10)
    return figure, axes


def add_bar(figure, axes, label, **options):
    """A colour bar beside some axes of a table, for the last image drawn in them; the figure is widened to make room."""
    figure.set_figwidth(figure.get_figwidth() + 0.9)
    figure.colorbar(axes.flat[-1].images[-1], ax=axes, label=label, **options)


def to_pixels(flags, image_size, grid):
    """Patch maps [..., N] as pixel maps [..., H, W], on a grid of three axes [..., T, H, W]."""
    flags = flags.unflatten(-1, grid)
    for axis in range(len(grid)):
        flags = flags.repeat_interleave(image_size // grid[-1], -1 - axis)
    return flags


def by_slice(pixels, grid):
    """Volumes [B, ..., T, H, W] as rows [B * S, ..., H, W], the middle slice of each of the grid's S layers; flat images as they are."""
    if len(grid) == 2:
        return pixels
    thickness = pixels.shape[-3] // grid[0]
    return pixels[..., thickness // 2 :: thickness, :, :].movedim(-3, 1).flatten(0, 1)


def frame(axes, corner, sides, colour):
    """Outline a block: corner (row, column) and sides (height, width) in pixels of the image shown."""
    (row, column), (height, width) = corner, sides
    axes.add_patch(Rectangle((column - 0.5, row - 0.5), width, height, fill=False, edgecolor=colour, linewidth=1.8))


# ---- masks


def mask_figure(images, masks, grid, title=""):
    """A row for each image [B, 3, H, W]: the image, what the context encoder sees (the rest white), and each target block in its colour."""
    context, targets = (to_pixels(part, images.shape[-1], grid) for part in masks.maps(math.prod(grid)))  # [B, H, W], [B, M, H, W]
    columns = [("image", images), ("context", torch.where(context[:, None], images, 1.0))]
    for m in range(targets.shape[1]):
        tint = torch.tensor(to_rgb(COLOURS[m % len(COLOURS)])).view(3, *[1] * len(grid))
        columns.append((f"target {m + 1}", torch.where(targets[:, m, None], 0.45 * images + 0.55 * tint, 0.25 * images + 0.75)))
    return table([(name, by_slice(part, grid)) for name, part in columns], title)[0]


def official_coverage(grid, batch_size, batches, generator, min_keep=4):
    """How often each patch is context and target under the rules of the official sampler: two float [N] maps in 0..1.

    The rules, from its published code: one block size a batch from one random number, which drives scale and aspect alike; the
    first row and column drawn below the last possible one; every mask cut to the batch's shortest by keeping its first patches.
    """
    H, W = grid
    counts = torch.zeros(2, H * W)
    for _ in range(batches):
        u = torch.rand(1, generator=generator).item()
        area, aspect = H * W * (0.15 + 0.05 * u), 0.75 + 0.75 * u
        h, w = min(round((area * aspect) ** 0.5), H - 1), min(round((area / aspect) ** 0.5), W - 1)
        side = round((H * W * (0.85 + 0.15 * u)) ** 0.5)
        sides = min(side, H - 1), min(side, W - 1)

        def block(height, width):
            top, left = (int(torch.randint(0, n, (1,), generator=generator)) for n in (max(H - height, 1), max(W - width, 1)))
            cells = torch.zeros(H, W, dtype=torch.bool)
            cells[top : top + height, left : left + width] = True
            return cells.flatten()  # [N]

        contexts = []
        while len(contexts) < batch_size:
            targets = torch.stack([block(h, w) for _ in range(4)])  # [4, N]
            kept = (block(*sides) & ~targets.any(0)).nonzero()[:, 0]
            if len(kept) > min_keep:  # it draws again otherwise
                contexts.append(kept)
                counts[1] += targets.any(0)
        shortest = min(map(len, contexts))
        for kept in contexts:
            counts[0][kept[:shortest]] += 1
    return counts / (batches * batch_size)


def coverage_figure(masking, generator, batch_size=64, batches=16):
    """How often each cell of a grid is context and target: this sampler above, the official sampler's rules below.

    The official sampler knows no third axis; of a 3-D grid all layers are drawn, side by side, for this sampler alone.
    """
    drawn = [masking(batch_size, generator).maps(masking.N) for _ in range(batches)]
    ours = torch.stack([torch.cat([c for c, _ in drawn]).float().mean(0), torch.cat([t.any(1) for _, t in drawn]).float().mean(0)])
    rows = [("ours", ours)]
    if len(masking.grid) == 2:
        rows.append(("official rules", official_coverage(masking.grid, batch_size, batches, generator)))
    figure = Figure(figsize=(6.4, 3.1 * len(rows)) if len(rows) == 2 else (12, 2.4), layout="constrained")
    for row, (name, maps) in zip(figure.subplots(len(rows), 2, squeeze=False), rows):
        for axes, part, values in zip(row, ("context", "any target"), maps):
            never = (values == 0).sum().item()
            values = values.view(masking.grid)  # [rows, columns], or [layers, rows, columns]
            if values.ndim == 3:
                values = F.pad(values, (0, 1), value=math.nan).movedim(0, 1).flatten(1)[:, :-1]  # layers side by side, a gap between
            picture = axes.imshow(values.numpy(), cmap="viridis", vmin=0)
            axes.set_title(f"{name}: {part}, {never} of {masking.N} cells never", fontsize=9)
            axes.set(xticks=[], yticks=[])
            figure.colorbar(picture, ax=axes, shrink=0.8)
    figure.suptitle(f"How often each patch of a {'x'.join(map(str, masking.grid))} grid is used, as a fraction of images:\n"
                    "a cell that is never drawn (0) is never learnt from", fontsize=10)
    return figure


# ---- curves

# Panels of curves_figure: title, what to notice, and the columns of metrics.csv drawn in it with their labels.
PANELS = [
    ("loss", "falls, then may rise while kNN improves",
     {"loss": "training", "held_out_loss": "held out", "mean_loss": "mean of that place"}),
    ("cosine of prediction and target", "the gap is what is predicted",
     {"cosine": "predictor", "mean_cosine": "mean of that place"}),
    ("kNN accuracy, %", "should rise: the features get better", {"knn": ""}),
    ("spread of target features", "std near 0, cosine near 1: collapsed",
     {"target_std": "std", "pairwise_cosine": "cosine of two images"}),
    ("effective rank", "low: few directions in use", {"rank": "RankMe", "lidar": "LiDAR"}),
    ("gradient norm", "spikes: unstable", {"grad_norm": ""}),
    ("learning rate", "", {"lr": ""}),
    ("weight decay", "", {"weight_decay": ""}),
    ("momentum of the target", "1: frozen", {"momentum": ""}),
]
# Colours of the lines that are not the first of their panel: baselines grey.
LINES = {"held_out_loss": COLOURS[5], "pairwise_cosine": COLOURS[5], "lidar": COLOURS[5],
         "mean_loss": COLOURS[7], "mean_cosine": COLOURS[7]}


def curves_figure(rows, title=""):
    """Training curves over optimizer steps from rows of metrics.csv (dicts of strings); a panel without values is left out."""

    def column(name):
        """The rows that have a value here: steps and values."""
        filled = [row for row in rows if row.get(name)]
        return [int(row["step"]) for row in filled], [float(row[name]) for row in filled]

    panels = [(heading, note, {name: label for name, label in columns.items() if column(name)[0]}) for heading, note, columns in PANELS]
    panels = [panel for panel in panels if panel[2]]
    wide = min(3, len(panels))
    high = -(-len(panels) // wide)
    figure = Figure(figsize=(3.3 * wide, 2.15 * high + 0.5), layout="constrained")
    for i, (heading, note, columns) in enumerate(panels):
        axes = figure.add_subplot(high, wide, i + 1)
        for name, label in columns.items():
            steps, values = column(name)
            axes.plot(steps, [100 * value for value in values] if name == "knn" else values, color=LINES.get(name, COLOURS[4]),
                      linewidth=1.3, marker="o" if len(steps) < 40 else None, markersize=2.5, label=label)
        axes.set_xlim(0, int(rows[-1]["step"]))  # the same in every panel, however early a column was last filled
        axes.set_title(f"{heading}\n{note}" if note else heading, fontsize=9)
        axes.tick_params(labelsize=8)
        axes.ticklabel_format(useOffset=False)  # 0.990, not 9.9e-1 + 1e-16
        axes.grid(alpha=0.3)
        if len(columns) > 1:
            axes.legend(fontsize=7, frameon=False)
        if "target_std" in columns:
            axes.set_ylim(0, 1.1)
        if i + wide >= len(panels):
            axes.set_xlabel("optimizer step", fontsize=9)
    figure.suptitle(title, fontsize=10)
    return figure


# ---- features


def tsne_figure(features, labels, class_names, title="", seed=0):
    """t-SNE side by side of several features of the same images: features a dict of name -> [n, D], labels int64 [n]."""
    figure = Figure(figsize=(4.8 * len(features), 5.4), layout="constrained")
    panels = figure.subplots(1, len(features), squeeze=False)[0]
    colours = np.array([to_rgb(colour) for colour in COLOURS])[labels.numpy() % len(COLOURS)]  # [n, 3]
    for axes, (name, x) in zip(panels, features.items()):
        x = PCA(min(50, *x.shape), random_state=seed).fit_transform(x.numpy())  # [n, 50]
        places = TSNE(random_state=seed, init="pca", angle=0.8).fit_transform(x)  # [n, 2]; angle .5 would take 1.6 times as long
        axes.scatter(*places.T, s=20_000 / (1_000 + len(x)), linewidths=0, c=colours)
        axes.set(xticks=[], yticks=[])
        axes.set_title(name, fontsize=10)
    if len(class_names) <= len(COLOURS):  # with more classes than colours a legend would say nothing
        for name, colour in zip(class_names, COLOURS):
            panels[0].scatter([], [], s=30, color=colour, label=name)
        figure.legend(loc="outside lower center", ncols=min(len(class_names), 5), fontsize=9, frameon=False)
    figure.suptitle(title, fontsize=10)
    return figure


def token_figure(tokens, grid, pictures, title=""):
    """The first three principal components of patch tokens [B, N, D] as red, green and blue, under each picture [B, 3, H, W]."""
    parts = PCA(3).fit_transform(tokens.flatten(0, 1).numpy())  # [B * N, 3]
    low, high = np.percentile(parts, [2, 98], axis=0)
    colours = torch.tensor((parts - low) / (high - low)).float().unflatten(0, tokens.shape[:2])  # [B, N, 3]
    rows = by_slice(pictures, grid), by_slice(colours.mT.unflatten(2, grid), grid)
    return table([("", pair) for pair in zip(*rows)], title)[0]


def nearest_images_figure(queries, matches, title=""):
    """Each query picture [Q, 3, H, W] followed by the k pictures found for it, best first: matches [Q, k, 3, H, W]."""
    return table([("query", queries), *((f"nearest {j + 1}", matches[:, j]) for j in range(matches.shape[1]))], title)[0]


# ---- what evaluation.json holds


def evaluated(results):
    """'data, run' for titles, from the dict of evaluation.json."""
    out = results.get("config", {}).get("out")
    return f"{results['dataset']}, {Path(out).name}" if out else results["dataset"]


def feature_style(name):
    """Label and colour of one of the features compared."""
    return FEATURES.get(name, (name, COLOURS[3]))


def names_of_classes(results, K):
    """The K class names, or their numbers where the data has no names."""
    return results.get("class_names") or [str(k) for k in range(K)]


def comparison_figure(results):
    """Bars of evaluation.json: linear probe and kNN of the trained encoders beside the random one and the raw pixels."""
    names = list(results["features"])
    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    axes = figure.subplots()
    for offset, measure, label, colour in ((-0.2, "linear", "linear probe", COLOURS[4]), (0.2, "knn", "kNN", COLOURS[0])):
        values = [100 * results["features"][name][measure] for name in names]
        bars = axes.bar(np.arange(len(names)) + offset, values, 0.38, color=colour, label=label)
        axes.bar_label(bars, fmt="%.1f", fontsize=8)
    axes.axhline(100 * results["chance"], color="black", linestyle=":", linewidth=1, label="chance")
    axes.set_xticks(range(len(names)), [feature_style(name)[0] for name in names], fontsize=9)
    axes.set_ylabel("test accuracy, %", fontsize=9)
    figure.legend(loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{evaluated(results)}: what the frozen features know;\nonly what is above the random encoder was learnt", fontsize=10)
    return figure


def confusion_figure(results, name="target"):
    """Which class is taken for which, in percent of each true class (a row): hits on the diagonal blue, confusions orange."""
    counts = np.array(results["features"][name]["confusion"], dtype=float)  # [K, K]
    K, percent = len(counts), 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)  # [K, K]
    names, hits = names_of_classes(results, K), np.eye(K, dtype=bool)
    wrong = np.where(hits, 0.0, percent)
    side = min(max(0.5 * K, 3.6), 9.0)  # inches
    figure = Figure(figsize=(side + 1.6, side + 1.4), layout="constrained")
    axes = figure.subplots()
    axes.imshow(np.where(hits, percent, np.nan), cmap="Blues", vmin=0, vmax=130)  # 130: black numbers stay readable
    axes.imshow(np.where(hits, np.nan, percent), cmap="Oranges", vmin=0, vmax=1.6 * max(wrong.max(), 1.0))
    size = min(9.0, 55 * side / K)  # points
    if K <= 100:
        tilt = {"rotation": 90, "va": "center"} if K > 20 else {"rotation": 45}
        axes.set_xticks(range(K), names, ha="right", rotation_mode="anchor", fontsize=size, **tilt)
        axes.set_yticks(range(K), names, fontsize=size)
    axes.set(xlabel="answer of the linear probe", ylabel="true class")
    if K <= 20:
        for row, column in np.ndindex(K, K):
            if percent[row, column] >= 0.5:  # a lone 0 in most cells would hide the pattern
                axes.text(column, row, f"{percent[row, column]:.0f}", ha="center", va="center", fontsize=size - 1)
    worst = [divmod(place, K) for place in wrong.ravel().argsort()[::-1][:3] if wrong.flat[place] > 0]
    said = ", ".join(f"{names[row]} as {names[column]} {wrong[row, column]:.0f}%" for row, column in worst) or "none"
    figure.suptitle(f"{evaluated(results)}, {feature_style(name)[0]}: percent of each true class\n"
                    + textwrap.fill(f"largest confusions: {said}", round(13 * figure.get_figwidth())), fontsize=10)
    return figure


def per_class_figure(results):
    """Test accuracy of each class, sorted by the target encoder's, beside the baselines; above 30 classes the 15 best and 15 worst."""
    scores = {name: 100 * np.array(score["per_class"]) for name, score in results["features"].items()
              if name in ("target", "random", "pixels") and "per_class" in score}
    K = len(scores["target"])
    names, order = names_of_classes(results, K), np.argsort(-scores["target"], kind="stable")
    if K > 30:
        order = np.concatenate([order[:15], order[-15:]])
    figure = Figure(figsize=(min(max(0.62 * len(order), 4.5), 10.5), 4.2), layout="constrained")
    axes = figure.subplots()
    width = 0.84 / len(scores)
    for i, (name, values) in enumerate(scores.items()):
        label, colour = feature_style(name)
        bars = axes.bar(np.arange(len(order)) + (i - (len(scores) - 1) / 2) * width, values[order], width, color=colour, label=label)
        if name == "target" and len(order) <= 20:
            axes.bar_label(bars, fmt="%.0f", fontsize=8)
    if K > 30:
        axes.axvline(14.5, color="black", linestyle=":", linewidth=1)
    axes.set_xticks(range(len(order)), [names[k] for k in order], rotation=45, ha="right", rotation_mode="anchor", fontsize=8)
    axes.set_ylabel("linear probe, % right", fontsize=9)
    axes.set_xlim(-0.6, len(order) - 0.4)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    which = f"the 15 best and the 15 worst of {K} classes" if K > 30 else "accuracy by class"
    figure.suptitle(f"{evaluated(results)}: {which};\nnotice where pretraining helps most, and where not at all", fontsize=10)
    return figure


def low_shot_figure(results):
    """Accuracy over labels per class (log axis), mean with a band of one standard deviation, and where 1% and 10% of all labels lie."""
    shots, figure = results["low_shot"], Figure(figsize=(6.4, 4.0), layout="constrained")
    axes, x = figure.subplots(), np.array(shots["per_class"])
    for name, score in shots["scores"].items():
        label, colour = feature_style(name)
        mean, std = 100 * np.array(score["mean"]), 100 * np.array(score["std"])
        axes.plot(x, mean, color=colour, marker="o", markersize=4, label=label)
        axes.fill_between(x, mean - std, mean + std, color=colour, alpha=0.25, linewidth=0)
    for share in (0.01, 0.1):
        if place := share * (shots.get("full") or 0):
            axes.axvline(place, color="black", linestyle=":", linewidth=1)
            axes.text(place, 1.01, f"{share:.0%} of all", transform=axes.get_xaxis_transform(), ha="center", fontsize=8)
    axes.axhline(100 * results["chance"], color="black", linestyle="--", linewidth=0.8, label="chance")
    axes.set_xscale("log")
    axes.set_xticks(x, [str(count) for count in x], fontsize=8, rotation=45)  # 400 and 500 would touch
    axes.minorticks_off()
    axes.set_xlabel("labelled images of each class", fontsize=9)
    axes.set_ylabel("test accuracy, %", fontsize=9)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    figure.suptitle(f"{evaluated(results)}: few labels (mean and one standard deviation over draws);\n"
                    "read across: how many labels pretraining saves", fontsize=10)
    return figure


def ablations_figure(rows, title=""):
    """Linear probe and kNN of each ablation: the mean as a bar, each seed as a dot, the first row (nothing taken away) as a line: rows of
    results/ablations.json."""
    names = list(rows)
    figure = Figure(figsize=(7.4, 0.34 * len(names) + 1.2), layout="constrained")
    axes = figure.subplots()
    for offset, measure, label, colour, ink in ((-0.2, "linear", "linear probe", COLOURS[4], "white"),
                                                (0.2, "knn", "kNN", COLOURS[0], "black")):
        values = np.array([100 * np.mean([run[measure] for run in row["runs"]]) for row in rows.values()])
        bars = axes.barh(np.arange(len(names)) + offset, values, 0.38, color=colour, label=label)
        axes.bar_label(bars, fmt="%.1f", fontsize=7, label_type="center", color=ink)
        axes.axvline(values[0], color=colour, linestyle=":", linewidth=1)
        for number, row in enumerate(rows.values()):
            axes.plot([100 * run[measure] for run in row["runs"]], [number + offset] * len(row["runs"]), "k.", markersize=4)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("test accuracy, %", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    figure.suptitle(title, fontsize=10)
    return figure
