"""Matplotlib: the palette, titles, a table of images, dots of classes, curves of metrics.csv."""

import math
import re
import textwrap
import warnings

import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.markers import MarkerStyle

# Okabe and Ito's colors, which color-blind readers can tell apart, and two more; a marker for each.
COLORS = ["#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#0072B2", "#D55E00", "#F0E442", "#999999",
          "#000000", "#7F3C8D"]
MARKERS = "os^vDPX*<>"
MAP = "viridis"  # of maps of numbers
# Color and marker of each kind of features, the same in every figure.
FEATURES = {"target": (COLORS[4], "o"), "I-JEPA": (COLORS[4], "o"), "context": (COLORS[1], "P"),
            "random": (COLORS[0], "^"), "pixels": (COLORS[7], "s"), "MAE": (COLORS[5], "D"),
            "supervised": (COLORS[2], "v")}


def plain(text):
    """Text that matplotlib shows as it is: between two dollar signs it would expect a formula.

    What is no character, as in file names of another encoding, becomes a question mark.
    """
    return str(text).encode("utf-8", "replace").decode().replace("$", r"\$")


def headline(figure, text):
    """Write a Figure's title, in lines no longer than the Figure is wide."""
    letters = int(10.5 * figure.get_figwidth())
    lines = [textwrap.fill(line, letters) for line in plain(text).splitlines()]
    figure.suptitle("\n".join(lines))


def save_figure(figure, path):
    """Write a Figure as PNG; prints one line if the font lacks characters, which become boxes."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        figure.savefig(path, dpi=150)
    lacking = set()
    for warning in caught:
        if glyph := re.match(r"Glyph (\d+) .*missing from", str(warning.message)):
            lacking.add(chr(int(glyph[1])))
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename,
                                   warning.lineno)
    if lacking:
        print(f"{path}: the font lacks {ascii(''.join(sorted(lacking))[:8])}, drawn as boxes; name "
              "one that has them in matplotlib's setting font.family")


def table(columns, title="", side=1.6, **colors):
    """A Figure and its axes [rows, columns] from a list of (name, images), one image a row.

    Images are [3, H, W] from 0 to 1, or maps [H, W], drawn with `colors`: cmap, vmin, vmax. side:
    of an image in inches.
    """
    rows, wide = len(columns[0][1]), len(columns)
    figure = Figure(figsize=(side * wide + 0.3, side * rows + 1.0), layout="constrained")
    axes = figure.subplots(rows, wide, squeeze=False)
    for panels, (name, images) in zip(axes.T, columns):
        panels[0].set_title(plain(name), fontsize=11)
        for panel, image in zip(panels, images):
            image = image.movedim(0, -1) if image.ndim == 3 else image  # [H, W, 3] or [H, W]
            panel.imshow(image.cpu().numpy(), **{"cmap": MAP, "vmin": 0, "vmax": 1, **colors})
            panel.set(xticks=[], yticks=[])
    headline(figure, title)
    return figure, axes


def class_dots(axes, places, labels):
    """Draw places [n, 2] in the colors and markers of their classes, int [n]; those from the
    eleventh class on as small gray dots."""
    kinds = np.minimum(labels, len(COLORS))
    marks = [MarkerStyle(mark) for mark in (*MARKERS, ".")]
    colors = np.array([to_rgb(color) for color in (*COLORS, "0.8")])[kinds]  # [n, 3]
    dots = axes.scatter(*places.T, s=40_000 / (1_000 + len(kinds)), c=colors, edgecolors="0.3",
                        linewidths=0.3)
    dots.set_paths([marks[k].get_path().transformed(marks[k].get_transform()) for k in kinds])


def class_legend(figure, names):
    """A legend for `class_dots` below a Figure, from the names of all classes."""
    shown, more = list(map(plain, names[: len(COLORS)])), len(names) - len(COLORS)
    shown += [f"{more} other classes"] if more > 0 else []
    dots = [Line2D([], [], linestyle="", color=color, marker=marker, markersize=8)
            for color, marker, _ in zip((*COLORS, "0.8"), (*MARKERS, "."), shown)]
    inches = 0.6 + 0.1 * max(map(len, shown))  # of a column
    columns = max(1, min(5, int(figure.get_figwidth() / inches)))
    figure.legend(dots, shown, loc="outside lower center", ncols=columns, frameon=False)


# Panels of curves_figure: title and what to notice; columns of metrics.csv and their labels; where
# the axis begins and ends, None as the data have it.
PANELS = [
    ("loss\nmay rise while the features improve", {"loss": ""}, (0, None)),
    ("cosine of prediction and target\nthe gap is what is predicted",
     {"cosine": "predictor", "mean_cosine": "mean of that place"}, (None, 1)),
    ("kNN accuracy\nshould rise: the features improve", {"knn": ""}, (0, None)),
    ("deviation of target features\nnear 0: collapsed", {"target_std": ""}, (0, 1.1)),
    ("effective rank\nlow: few directions in use", {"rank": ""}, (0, None)),
    ("gradient norm\nspikes: unstable", {"grad_norm": ""}, (0, None)),
    ("learning rate", {"lr": ""}, (0, None)),
    ("weight decay", {"weight_decay": ""}, (0, None)),
    ("momentum of the target\n1: frozen", {"momentum": ""}, (None, 1)),
]


def curves_figure(rows, title=""):
    """Training curves over optimizer steps, from rows of metrics.csv (dicts of strings).

    A value that a row lacks is skipped. Left out are a panel without values, and the weight decay
    and the momentum of a run that keeps them constant.
    """
    panels = []
    for heading, columns, limits in PANELS:
        shown = {name: label for name, label in columns.items()
                 if len({row[name] for row in rows if row.get(name)})
                 > (name in ("weight_decay", "momentum"))}  # True is 1
        if shown:
            panels.append((heading, shown, limits))
    high = math.ceil(len(panels) / 4)
    wide = math.ceil(len(panels) / high)
    figure = Figure(figsize=(3.3 * wide, 2.5 * high + 0.5), layout="constrained")
    for number, (heading, columns, limits) in enumerate(panels, 1):
        axes = figure.add_subplot(high, wide, number)
        for (name, label), color in zip(columns.items(), (COLORS[4], COLORS[7])):
            points = [(int(row["step"]), float(row[name])) for row in rows if row.get(name)]
            axes.plot(*zip(*points), color=color, label=label,
                      marker="o" if len(points) < 40 else None, markersize=3)
        axes.set_xlim(0, max(int(rows[-1]["step"]), 1))
        axes.set_ylim(*limits)
        if len(columns) > 1:
            axes.legend(frameon=False)
        axes.set_title(heading, fontsize=11)
        axes.ticklabel_format(useOffset=False)  # 0.990, not 9.9e-1 + 1e-16
        axes.locator_params(nbins=4)
        axes.grid(alpha=0.3)
        if number > len(panels) - wide:
            axes.set_xlabel("optimizer step")
    headline(figure, title)
    return figure
