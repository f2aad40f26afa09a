"""Matplotlib: colors, text, a table of images, the curves of metrics.csv."""

import math
import re
import textwrap
import warnings

from matplotlib.figure import Figure

# Okabe and Ito's colors, which color-blind readers can tell apart, and two more.
COLORS = ["#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#0072B2", "#D55E00", "#F0E442", "#999999",
          "#000000", "#7F3C8D"]


def plain(text):
    """Text that matplotlib shows as it is: between two dollar signs it would expect a formula.

    What is no character, as in file names of another encoding, becomes a question mark.
    """
    return str(text).encode("utf-8", "replace").decode().replace("$", r"\$")


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


def table(columns, title="", side=1.32, **colors):
    """A Figure and its axes [rows, columns] from a list of (name, images), one image a row.

    Images are [3, H, W] from 0 to 1, or maps [H, W], drawn with `colors`: cmap, vmin, vmax. side:
    of an image in inches.
    """
    rows, wide = len(columns[0][1]), len(columns)
    figure = Figure(figsize=(side * wide + 0.3, side * rows + 0.8), layout="constrained")
    axes = figure.subplots(rows, wide, squeeze=False)
    for panels, (name, images) in zip(axes.T, columns):
        panels[0].set_title(plain(name), fontsize=9)
        for panel, image in zip(panels, images):
            image = image.movedim(0, -1) if image.ndim == 3 else image  # [H, W, 3] or [H, W]
            panel.imshow(image.cpu().numpy(), **{"cmap": "gray", "vmin": 0, "vmax": 1, **colors})
            panel.set(xticks=[], yticks=[])
    letters = int(12 * figure.get_figwidth())  # to a line
    lines = [textwrap.fill(line, letters) for line in plain(title).splitlines()]
    figure.suptitle("\n".join(lines), fontsize=10)
    return figure, axes


# Panels of curves_figure: title and what to notice; columns of metrics.csv and their labels.
PANELS = [
    ("loss\nmay rise while the features improve", {"loss": ""}),
    ("cosine of prediction and target\nthe gap is what is predicted",
     {"cosine": "predictor", "mean_cosine": "mean of that place"}),
    ("kNN accuracy\nshould rise: the features improve", {"knn": ""}),
    ("deviation of target features\nnear 0: collapsed", {"target_std": ""}),
    ("effective rank\nlow: few directions in use", {"rank": ""}),
    ("gradient norm\nspikes: unstable", {"grad_norm": ""}),
    ("learning rate", {"lr": ""}),
    ("weight decay", {"weight_decay": ""}),
    ("momentum of the target\n1: frozen", {"momentum": ""}),
]


def curves_figure(rows, title=""):
    """Training curves over optimizer steps, from rows of metrics.csv (dicts of strings).

    A value that a row lacks is skipped; a panel without values is left out.
    """
    panels = [(heading, {name: label for name, label in columns.items()
                         if any(row.get(name) for row in rows)}) for heading, columns in PANELS]
    panels = [panel for panel in panels if panel[1]]
    wide = min(3, len(panels))
    high = math.ceil(len(panels) / wide)
    figure = Figure(figsize=(3.3 * wide, 2.2 * high + 0.5), layout="constrained")
    for number, (heading, columns) in enumerate(panels, 1):
        axes = figure.add_subplot(high, wide, number)
        for (name, label), color in zip(columns.items(), (COLORS[4], COLORS[7])):
            points = [(int(row["step"]), float(row[name])) for row in rows if row.get(name)]
            axes.plot(*zip(*points), color=color, linewidth=1.3, label=label,
                      marker="o" if len(points) < 40 else None, markersize=2.5)
        axes.set_xlim(0, max(int(rows[-1]["step"]), 1))
        if "target_std" in columns:
            axes.set_ylim(0, 1.1)
        if len(columns) > 1:
            axes.legend(fontsize=7, frameon=False)
        axes.set_title(heading, fontsize=9)
        axes.ticklabel_format(useOffset=False)  # 0.990, not 9.9e-1 + 1e-16
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
        if number > len(panels) - wide:
            axes.set_xlabel("optimizer step", fontsize=9)
    figure.suptitle(plain(title), fontsize=10)
    return figure
