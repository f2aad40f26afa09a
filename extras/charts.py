"""Charts of numbers: what evaluate.py and extras/probes.py found of a run, what ablations cost.

Each is a function from the dict of a results file to a matplotlib Figure. K classes.
"""

import textwrap
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from support.plots import COLORS, plain
from support.results import ROWS

# The color of each of the features that are compared, the same in every figure.
INKS = {"target": COLORS[4], "context": COLORS[1], "random": COLORS[0], "pixels": COLORS[7]}


def subject(results):
    """'data, run', for titles."""
    out = results.get("config", {}).get("out")
    return plain(f"{results['dataset']}, {Path(out).name}" if out else results["dataset"])


def style(name):
    """Label and color of one of the features compared."""
    return ROWS.get(name, plain(name)), INKS.get(name, COLORS[3])


def class_names(results, K):
    """The names of K classes; numbers for classes without a name."""
    names = list(results.get("class_names") or [])[:K]
    return [plain(name) for name in (*names, *range(len(names), K))]


def comparison_figure(results):
    """Bars: linear probe and kNN of the trained encoders, an untrained one and the raw pixels."""
    names = list(results["features"])
    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    axes = figure.subplots()
    for offset, measure, label, color in ((-0.2, "linear", "linear probe", COLORS[4]),
                                          (0.2, "knn", "kNN", COLORS[0])):
        values = [100 * results["features"][name][measure] for name in names]
        bars = axes.bar(np.arange(len(names)) + offset, values, 0.38, color=color, label=label)
        axes.bar_label(bars, fmt="%.1f", fontsize=8)
    axes.axhline(100 * results["chance"], color="black", linestyle=":", linewidth=1, label="chance")
    axes.set_xticks(range(len(names)), [style(name)[0] for name in names], fontsize=9)
    axes.set_ylabel("test accuracy, %", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    figure.suptitle(f"{subject(results)}: what the frozen features know;\n"
                    "only what exceeds the untrained encoder was learned", fontsize=10)
    return figure


def confusion_figure(results, name="target"):
    """Which class is taken for which, in percent of each true class (a row): hits on the diagonal
    blue, confusions orange."""
    counts = np.array(results["features"][name]["confusion"], dtype=float)  # [K, K]
    K, percent = len(counts), 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
    names, hits = class_names(results, K), np.eye(K, dtype=bool)
    wrong = np.where(hits, 0.0, percent)
    side = min(max(0.5 * K, 3.6), 9.0)  # inches
    figure = Figure(figsize=(side + 1.6, side + 1.4), layout="constrained")
    axes = figure.subplots()
    # Up to 130 and 1.6: black numbers stay readable on the darkest cell.
    axes.imshow(np.where(hits, percent, np.nan), cmap="Blues", vmin=0, vmax=130)
    axes.imshow(np.where(hits, np.nan, percent), cmap="Oranges", vmin=0,
                vmax=1.6 * max(wrong.max(), 1.0))
    size = min(9.0, 55 * side / K)  # points
    if K <= 100:
        axes.set_xticks(range(K), names, ha="right", rotation_mode="anchor", fontsize=size,
                        rotation=90 if K > 20 else 45, va="center" if K > 20 else "top")
        axes.set_yticks(range(K), names, fontsize=size)
    axes.set(xlabel="answer of the linear probe", ylabel="true class")
    if K <= 20:
        for row, column in np.argwhere(percent >= 0.5):  # zeros would hide the pattern
            axes.text(column, row, f"{percent[row, column]:.0f}", ha="center", va="center",
                      fontsize=size - 1)
    worst = [divmod(place, K) for place in wrong.ravel().argsort()[::-1][:3] if wrong.flat[place]]
    worst = [f"{names[row]} as {names[column]} {wrong[row, column]:.0f}%" for row, column in worst]
    figure.suptitle(f"{subject(results)}, {style(name)[0]}: percent of each true class\n"
                    + textwrap.fill(f"largest confusions: {', '.join(worst) or 'none'}",
                                    round(13 * figure.get_figwidth())), fontsize=10)
    return figure


def per_class_figure(results):
    """Accuracy of each class, sorted by the target encoder's, and the baselines'; above 30 classes
    the 15 best and the 15 worst."""
    scores = {name: 100 * np.array(score["per_class"])
              for name, score in results["features"].items()
              if name in ("target", "random", "pixels") and "per_class" in score}
    K = len(scores["target"])
    names, order = class_names(results, K), np.argsort(-scores["target"], kind="stable")
    many = K > 30
    if many:
        order = np.concatenate([order[:15], order[-15:]])
    figure = Figure(figsize=(min(max(0.62 * len(order), 5.5), 10.5), 4.2), layout="constrained")
    axes = figure.subplots()
    width = 0.84 / len(scores)
    for i, (name, values) in enumerate(scores.items()):
        label, color = style(name)
        places = np.arange(len(order)) + (i - (len(scores) - 1) / 2) * width
        bars = axes.bar(places, values[order], width, color=color, label=label)
        if name == "target" and len(order) <= 20:
            axes.bar_label(bars, fmt="%.0f", fontsize=8)
    if many:
        axes.axvline(14.5, color="black", linestyle=":", linewidth=1)
    axes.set_xticks(range(len(order)), [names[k] for k in order], rotation=45, ha="right",
                    rotation_mode="anchor", fontsize=8)
    axes.set_ylabel("linear probe, % right", fontsize=9)
    axes.set_xlim(-0.6, len(order) - 0.4)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    which = f"the 15 best and the 15 worst of {K} classes" if many else "accuracy by class"
    figure.suptitle(f"{subject(results)}: {which}.\n"
                    "Where does pretraining help most, and where not at all?", fontsize=10)
    return figure


def low_shot_figure(results):
    """Accuracy over labels per class, mean with a band of one standard deviation, and where 1% and
    10% of all labels lie."""
    shots, figure = results["low_shot"], Figure(figsize=(6.4, 4.0), layout="constrained")
    axes, x = figure.subplots(), np.array(shots["per_class"])
    for name, score in shots["scores"].items():
        label, color = style(name)
        mean, std = 100 * np.array(score["mean"]), 100 * np.array(score["std"])
        axes.plot(x, mean, color=color, marker="o", markersize=4, label=label)
        axes.fill_between(x, mean - std, mean + std, color=color, alpha=0.25, linewidth=0)
    for share in (0.01, 0.1):
        if place := share * (shots.get("full") or 0):
            axes.axvline(place, color="black", linestyle=":", linewidth=1)
            axes.text(place, 1.01, f"{share:.0%} of all", transform=axes.get_xaxis_transform(),
                      ha="center", fontsize=8)
    axes.axhline(100 * results["chance"], color="black", linestyle="--", linewidth=0.8,
                 label="chance")
    axes.set_xscale("log")
    axes.set_xticks(x, list(map(str, x)), fontsize=8, rotation=45)  # 400 and 500 would touch
    axes.minorticks_off()
    axes.set_xlabel("labelled images of each class", fontsize=9)
    axes.set_ylabel("test accuracy, %", fontsize=9)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    figure.suptitle(f"{subject(results)}: few labels (mean and deviation over draws).\n"
                    "Read across: how many labels does pretraining save?", fontsize=10)
    return figure


def dial_figure(rows):
    """Linear probe and kNN over the dial, a line for each method: rows "METHOD, detail X" of
    results/dial.json, the mean as a line, each seed as a dot."""
    figure = Figure(figsize=(7.4, 3.6), layout="constrained")
    for axes, (measure, label) in zip(figure.subplots(1, 2, sharey=True),
                                      (("linear", "linear probe"), ("knn", "kNN"))):
        lines = {}  # method -> details, and the seeds' accuracies at each
        for name, row in rows.items():
            method, detail = name.split(", detail ")
            lines.setdefault(method, []).append(
                (float(detail), [100 * run[measure] for run in row["runs"]]))
        for color, (method, points) in zip((COLORS[4], COLORS[0], COLORS[2]), lines.items()):
            axes.plot([x for x, _ in points], [np.mean(y) for _, y in points], color=color,
                      label=method if measure == "linear" else None)
            for x, y in points:
                axes.plot([x] * len(y), y, ".", color=color, markersize=5)
        axes.set_title(label, fontsize=10)
        axes.set_xlabel("share of the dots that cannot be predicted", fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("test accuracy, %", fontsize=9)
    figure.legend(loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    figure.suptitle("When the detail cannot be predicted, who still learns the shape?", fontsize=10)
    return figure


def ablations_figure(rows, title=""):
    """Linear probe and kNN of each row of results/ablations.json: the mean as a bar, each seed as a
    dot, the first row (nothing taken away) as a line."""
    names = list(rows)
    figure = Figure(figsize=(7.4, 0.34 * len(names) + 1.2), layout="constrained")
    axes = figure.subplots()
    for offset, measure, label, color, ink in (
            (-0.2, "linear", "linear probe", COLORS[4], "white"),
            (0.2, "knn", "kNN", COLORS[0], "black")):
        seeds = [[100 * run[measure] for run in row["runs"]] for row in rows.values()]
        means = [np.mean(values) for values in seeds]
        bars = axes.barh(np.arange(len(names)) + offset, means, 0.38, color=color, label=label)
        axes.bar_label(bars, fmt="%.1f", fontsize=7, label_type="center", color=ink)
        axes.axvline(means[0], color=color, linestyle=":", linewidth=1)
        for number, values in enumerate(seeds):
            axes.plot(values, [number + offset] * len(values), "k.", markersize=4)
    axes.set_yticks(range(len(names)), list(map(plain, names)), fontsize=8)
    axes.set_ylim(len(names) - 0.4, -0.6)  # the first row on top
    axes.set_xlabel("test accuracy, %", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    figure.suptitle(plain(title), fontsize=10)
    return figure
