"""Charts of numbers: what evaluate.py and extras/probes.py found of a run, what ablations cost.

Each is a function from the dict of a results file to a matplotlib Figure. K classes.
"""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from support.plots import COLORS, FEATURES, headline, plain
from support.results import ROWS

MEASURES = {"linear": "linear probe", "knn": "kNN"}


def subject(results):
    """'run on data', for titles."""
    out = results.get("config", {}).get("out")
    return f"run {Path(out).name} on {results['dataset']}" if out else results["dataset"]


def style(name):
    """Label, color and marker of one of the features compared."""
    return ROWS.get(name, name), *FEATURES.get(name, (COLORS[3], "X"))


def class_names(results, K):
    """The names of K classes; numbers for classes without a name."""
    names = list(results.get("class_names") or [])[:K]
    return [str(name) for name in (*names, *range(len(names), K))]


def legend(figure):
    """The labels of a Figure's axes below it; one that several axes share, once."""
    found = {label: handle for axes in figure.axes
             for handle, label in zip(*axes.get_legend_handles_labels())}
    figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=4, frameon=False)


def comparison_figure(results):
    """Linear probe and kNN of the trained encoders, an untrained one and the raw pixels: a bar for
    each, and what the untrained one reaches as a line."""
    names = list(results["features"])
    labels, colors, _ = zip(*map(style, names))
    figure = Figure(figsize=(9, 0.55 * len(names) + 2), layout="constrained")
    for axes, (measure, title) in zip(figure.subplots(1, 2, sharey=True), MEASURES.items()):
        values = {name: 100 * score[measure] for name, score in results["features"].items()}
        bars = axes.barh(range(len(names)), values.values(), 0.7, color=colors)
        axes.bar_label(bars, fmt="%.1f", padding=4)
        axes.axvline(values["random"], color="black", linestyle="--", label="untrained encoder")
        axes.axvline(100 * results["chance"], color="black", linestyle=":", label="chance")
        axes.set_yticks(range(len(names)), labels)
        axes.set(xlim=(0, 113), xticks=range(0, 101, 25), xlabel="test accuracy, %", title=title)
        axes.spines[["top", "right"]].set_visible(False)
    axes.invert_yaxis()  # shared; the first row on top
    legend(figure)
    headline(figure, f"{subject(results)}: what the frozen features know.\n"
             "How much lies beyond the dashed line, which takes no training?")
    return figure


def confusion_figure(results, name="target"):
    """Which class is taken for which, in percent of each true class (a row): hits on the diagonal
    blue, confusions orange."""
    counts = np.array(results["features"][name]["confusion"], dtype=float)  # [K, K]
    K, percent = len(counts), 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
    names, hits = class_names(results, K), np.eye(K, dtype=bool)
    wrong = np.where(hits, 0.0, percent)
    side = min(max(0.55 * K, 4), 9)  # inches
    figure = Figure(figsize=(side + 1.6, side + 1.4), layout="constrained")
    axes = figure.subplots()
    # Up to 130 and 1.6: black numbers stay readable on the darkest cell.
    axes.imshow(np.where(hits, percent, np.nan), cmap="Blues", vmin=0, vmax=130)
    axes.imshow(np.where(hits, np.nan, percent), cmap="Oranges", vmin=0,
                vmax=1.6 * max(wrong.max(), 1.0))
    size = min(11.0, 55 * side / K)  # points
    if K <= 100:
        ticks = range(K), list(map(plain, names))
        axes.set_xticks(*ticks, ha="right", rotation_mode="anchor", fontsize=size,
                        rotation=90 if K > 20 else 45, va="center" if K > 20 else "top")
        axes.set_yticks(*ticks, fontsize=size)
    axes.set(xlabel="answer of the linear probe", ylabel="true class")
    if K <= 20:
        for row, column in np.argwhere(percent >= 0.5):  # zeros would hide the pattern
            axes.text(column, row, f"{percent[row, column]:.0f}", ha="center", va="center",
                      fontsize=size)
    worst = [divmod(place, K) for place in wrong.ravel().argsort()[::-1][:2] if wrong.flat[place]]
    worst = [f"{names[row]} as {names[column]} {wrong[row, column]:.0f}%" for row, column in worst]
    headline(figure, f"{subject(results)}, {style(name)[0]}: percent of each true class.\n"
             f"Largest confusions: {', '.join(worst) or 'none'}")
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
    figure = Figure(figsize=(min(max(0.7 * len(order), 6), 11), 4.8), layout="constrained")
    axes = figure.subplots()
    width = 0.84 / len(scores)
    for i, (name, values) in enumerate(scores.items()):
        label, color, _ = style(name)
        places = np.arange(len(order)) + (i - (len(scores) - 1) / 2) * width
        bars = axes.bar(places, values[order], width, color=color, label=label)
        if name == "target" and len(order) <= 20:
            axes.bar_label(bars, fmt="%.0f")
    if many:
        axes.axvline(14.5, color="black", linestyle=":", linewidth=1)
    axes.set_xticks(range(len(order)), [plain(names[k]) for k in order], rotation=45, ha="right",
                    rotation_mode="anchor")
    axes.set(ylabel="linear probe, % right", xlim=(-0.6, len(order) - 0.4))
    axes.spines[["top", "right"]].set_visible(False)
    legend(figure)
    which = f"the 15 best and the 15 worst of {K} classes" if many else "accuracy by class"
    headline(figure, f"{subject(results)}: {which}.\n"
             "Where does pretraining help most, and where not at all?")
    return figure


def low_shot_figure(results):
    """Accuracy over labels per class, mean with a band of one standard deviation, and where 1% and
    10% of all labels lie."""
    shots, figure = results["low_shot"], Figure(figsize=(7.4, 5), layout="constrained")
    axes, x = figure.subplots(), np.array(shots["per_class"])
    for name, score in shots["scores"].items():
        label, color, marker = style(name)
        mean, std = 100 * np.array(score["mean"]), 100 * np.array(score["std"])
        axes.plot(x, mean, color=color, marker=marker, label=label)
        axes.fill_between(x, mean - std, mean + std, color=color, alpha=0.25, linewidth=0)
    for share in (0.01, 0.1):
        if place := share * (shots.get("full") or 0):
            axes.axvline(place, color="black", linestyle=":", linewidth=1)
            axes.text(place, 1.01, f"{share:.0%} of all", transform=axes.get_xaxis_transform(),
                      ha="center")
    axes.axhline(100 * results["chance"], color="black", linestyle="--", linewidth=1,
                 label="chance")
    axes.set_xscale("log")
    axes.set_xticks(x, list(map(str, x)), rotation=45)  # 400 and 500 would touch
    axes.minorticks_off()
    axes.set(xlabel="labeled images of each class", ylabel="test accuracy, %")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    legend(figure)
    headline(figure, f"{subject(results)}: few labels (mean and deviation over draws).\n"
             "Read across: how many labels does pretraining save?")
    return figure


def dial_figure(rows):
    """Linear probe and kNN over the dial, a line for each method: rows "METHOD, detail X" of
    results/dial.json, the mean as a line, each seed as a marker."""
    figure = Figure(figsize=(9, 4.6), layout="constrained")
    for axes, (measure, title) in zip(figure.subplots(1, 2, sharey=True), MEASURES.items()):
        lines = {}  # method -> details, and the seeds' accuracies at each
        for name, row in rows.items():
            method, detail = name.split(", detail ")
            lines.setdefault(method, []).append(
                (float(detail), [100 * run[measure] for run in row["runs"]]))
        for method, points in lines.items():
            label, color, marker = style(method)
            axes.plot([x for x, _ in points], [np.mean(values) for _, values in points],
                      color=color)
            runs = [(x, value) for x, values in points for value in values]
            axes.plot(*zip(*runs), marker, color=color, label=label)
        axes.set(title=title, xlabel="share of the dots that cannot be predicted", ylim=(0, 105))
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("test accuracy, %")
    legend(figure)
    headline(figure, "When the detail cannot be predicted, who still learns the shape?\n"
             "(Each marker is a run, the lines join their means.)")
    return figure


def ablations_figure(rows, title=""):
    """What each change of results/ablations.json is worth, in points over the first row by linear
    probe and kNN: each seed, compared with itself, as a dot, their mean as a bar.

    Where the first row has several seeds, a gray band shows the standard deviation between them.
    """
    (base, whole), *changed = rows.items()
    names = [name for name, _ in changed]
    figure = Figure(figsize=(11, 0.32 * len(names) + 2.2), layout="constrained")
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    for axes, (measure, label) in zip(panels, MEASURES.items()):
        first = {run["seed"]: 100 * run[measure] for run in whole["runs"]}
        if len(first) > 1:
            spread = np.std([*first.values()], ddof=1)
            axes.axvspan(-spread, spread, color="0.9",
                         label="standard deviation of the first row's seeds")
        axes.axvline(0, color="black", linewidth=1)
        for number, (_, row) in enumerate(changed):
            gains = [100 * run[measure] - first[run["seed"]] for run in row["runs"]
                     if run["seed"] in first]
            axes.barh(number, np.mean(gains), 0.6, color=COLORS[1])
            axes.plot(gains, [number] * len(gains), "o", color=COLORS[4], markersize=5)
            axes.text(1.02, number, f"{np.mean(gains):+.1f}", va="center",
                      transform=axes.get_yaxis_transform())
        axes.set(title=label,
                 xlabel=f"points over {plain(base)} ({np.mean([*first.values()]):.1f}%)")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(names)), list(map(plain, names)))
    panels[0].set_ylim(len(names) - 0.4, -0.6)  # the first on top
    legend(figure)
    headline(figure, f"{title}\n(A dot is a seed, compared with the same seed of the first row; "
             "a bar is their mean.)")
    return figure
