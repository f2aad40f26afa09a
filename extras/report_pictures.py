"""The pictures of a report: training curves, drawn anew as SVG, and the figures of the run folders.

All lie inside the page. SVG takes the page's colors, light or dark, and its text stays text.
`runs` are those of extras/report.py.
"""

import base64
import io
import math
from html import escape

from matplotlib.ticker import MaxNLocator
from PIL import Image

from config import UsageError
from support.plots import COLORS, PANELS
from support.results import read_json

# Figures in the order of the page: what they show, and what to look for.
NOTICE = {
    "masks": ("Masks", "What is white is hidden from the context encoder. Could you say what fills "
              "the target blocks?"),
    "coverage": ("How often each patch is used", "Nothing is learned from a cell that is never "
                 "drawn (x). Is there one?"),
    "predictor_neighbors": ("What the predictor imagines", "Does 'predicted' continue what the "
                             "context shows? 'True features' is the best that these patches "
                             "allow."),
    "sketches": ("Sketches of a prediction", "What do all sketches of one block share, and what "
                 "differs? Compare with those that were told its place only."),
    "moving_block": ("One block at several places", "Does the answer follow the place, and how "
                     "much better are the true features?"),
    "prediction_error": ("Where prediction is hard", "What do the hardest tenth of the patches "
                         "(framed) have in common?"),
    "reconstruction": ("What the decoder answers", "What is sharp, and what is blurred?"),
    "tokens": ("Principal components of the patch tokens", "Do the colors follow the image or the "
               "place?"),
    "attention": ("Attention of the last block", "How does it depend on the patch that attends?"),
    "nearest_images": ("Nearest images", "What makes two images alike? Framed: those of the "
                       "query's class."),
    "tsne": ("t-SNE of the features", "Which classes come apart, and which only after training? "
             "Distances between groups mean little."),
    "confusion": ("Which class is taken for which", "Would you confuse the same ones?"),
    "per_class": ("Accuracy by class", "Where does pretraining help most, and where not at all?"),
    "low_shot": ("Few labels", "Read across: how many labels lie between two curves?"),
}
REDRAWN = ("curves", "comparison")  # left out: the page has them as SVG and as a table


def code(words):
    """A command to type."""
    return f"<code>{escape(words)}</code>"


def named(runs, run, text):
    """Text about a run, with its name if there are several."""
    return f"<b>{escape(run.name)}</b>{': ' if text else ''}{text}" if len(runs) > 1 else text


def image_tag(content, kind, size, alt, more=""):
    """An <img> that holds its file, the bytes of a PNG or WebP shown at (width, height)."""
    url = f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
    return f'<img{more} width={size[0]} height={size[1]} alt="{escape(alt)}" src="{url}">'


# --- curves ---------------------------------------------------------------------------------------

WIDE, HIGH, LEFT, RIGHT, TOP, BOTTOM = 320, 150, 46, 312, 6, 130  # of a panel; of its axes


def colors(runs):
    """A color for each run; the first has the page's own."""
    order = ["var(--accent)", *(COLORS[k] for k in (5, 2, 3, 0, 1, 9, 7))]
    return [order[i % len(order)] for i in range(len(runs))]


def panel(lines, heading, limits):
    """An SVG of lines (name, color, dashed, points); points: (step, value), not all values alike.
    limits: where the axis begins and ends, None as the data have it. About 40 points of each line
    have a tooltip."""
    steps, values = zip(*(point for *_, points in lines for point in points))
    low, high = (pick(values) if limit is None else limit
                 for pick, limit in zip((min, max), limits))
    last = max(*steps, 1)

    def place(step, value):
        return (LEFT + (RIGHT - LEFT) * step / last,
                BOTTOM - (BOTTOM - TOP) * (value - low) / (high - low))

    parts = []
    for tick in MaxNLocator(4).tick_values(low, high):
        if low <= tick <= high:
            y = place(0, tick)[1]
            parts.append(f'<path class=axis d="M{LEFT},{y:.1f}H{RIGHT}"/><text x={LEFT - 6} '
                         f'y={y + 3.5:.1f} text-anchor=end>{tick:g}</text>')
    for tick in MaxNLocator(4, integer=True).tick_values(0, last):
        if tick <= last:
            parts.append(f'<text x={place(tick, low)[0]:.1f} y={HIGH - 4} text-anchor=middle>'
                         f"{tick:,.0f}</text>")
    for name, color, dashed, points in lines:
        path = "L".join("{:.1f},{:.1f}".format(*place(*point)) for point in points)
        parts.append(f'<g style="color:{color}"><path class="curve{" dashed" * dashed}" '
                     f'd="M{path}"/>')
        for step, value in points[:: len(points) // 40 + 1] + points[-1:]:
            x, y = place(step, value)
            parts.append(f"<circle class=hit cx={x:.1f} cy={y:.1f} r=5><title>{escape(name)}, step "
                         f"{step:,}: {value:.4g}</title></circle>")
        parts.append("</g>")
    return (f'<svg viewBox="0 0 {WIDE} {HIGH}" role=img aria-label="{escape(heading)} over '
            f'optimizer steps">{"".join(parts)}</svg>')


def points_of(run, column):
    """(step, value) of a column of metrics.csv, where it has a finite number."""
    return [(int(row["step"]), float(row[column])) for row in run.rows
            if row.get(column) and math.isfinite(float(row[column]))]


def curves(runs):
    """The section of training curves; several runs share the panels."""
    panels, constant = [], []
    for title, columns, limits in PANELS:
        heading, _, notice = title.partition("\n")
        lines = [(f"{run.name}, {label or heading}", color, dashed, points)
                 for run, color in zip(runs, colors(runs))
                 for dashed, (column, label) in enumerate(columns.items())
                 if (points := points_of(run, column))]
        found = {value for *_, points in lines for _, value in points}
        if len(found) > 1:
            notice += "".join(f" (dashed: {label})" for label in list(columns.values())[1:])
            panels.append(f"<figure><h3>{heading}</h3><p class=notice>{notice}</p>"
                          f"{panel(lines, heading, limits)}</figure>")
        elif found:
            constant.append(f"{heading} {found.pop():g}")
    key = "".join(f'<li style="color:{color}"><svg viewBox="0 0 10 10"><path d="M0,3h10v4h-10z"/>'
                  f"</svg><span>{escape(run.name)}</span></li>"
                  for run, color in zip(runs, colors(runs)))
    missing = "".join(f"<p>{named(runs, run, 'No curves: metrics.csv has no rows.')}</p>"
                      for run in runs if not run.rows)
    return (f"<ul class=legend>{key}</ul>" * (len(runs) > 1)
            + f"<div class=grid>{''.join(panels)}</div>"
            + f"<p>The same in all steps: {', '.join(constant)}.</p>" * bool(constant) + missing)


# --- figures --------------------------------------------------------------------------------------


def shrink(path, width, quality):
    """The bytes of a PNG, its kind, and its (width, height) in pixels; as WebP, so many pixels wide
    at most, unless width is None."""
    with Image.open(path) as image:
        size, file = image.size, io.BytesIO()
        if width is None:
            return path.read_bytes(), "png", size
        image = image.convert("RGB")
        image.thumbnail((width, 4 * width))
        image.save(file, "WEBP", quality=quality, method=6)
    return file.getvalue(), "webp", size


def load_figures(runs, budget):
    """(run name, figure name) -> what `shrink` gives: as they are, or, if all of them would exceed
    the budget of bytes, smaller. Raises UsageError if even that does not help."""
    paths = {(run.name, name): path for run in runs for name, path in run.figures.items()
             if name not in REDRAWN}
    for width, quality in ((None, None), (1600, 85), (1200, 75), (900, 60), (600, 50)):
        found = {key: shrink(path, width, quality) for key, path in paths.items()}
        if sum(len(content) * 4 / 3 + 1000 for content, *_ in found.values()) < budget:
            return found
    raise UsageError(f"the curves, films and figures of {len(runs)} runs do not fit into one page; "
                     "name fewer runs")


def retrieval(run):
    """How often predicted features find the true patch, in words; nothing if that is unknown."""
    path = run.folder / "figures" / "retrieval.json"
    if not path.exists():
        return ""
    found = read_json(path)
    return (f"The true patch is among the ten nearest of {found['gallery_size']:,} for "
            f"{found['trained']['recall@10']:.1%} of the hidden patches; by an untrained predictor,"
            f" for {found['untrained']['recall@10']:.1%}.")


def figures(runs, budget):
    """The section of figures, those of several runs side by side, in `budget` bytes."""
    found, parts = load_figures(runs, budget), []
    for name in dict.fromkeys([*NOTICE, *(name for _, name in found)]):
        heading, notice = NOTICE.get(name, (name.replace("_", " "), ""))
        images = []
        for run in runs:
            if (run.name, name) in found:
                content, kind, size = found[run.name, name]
                shown = [round(0.7 * side) for side in size]  # 150 dpi: sharp, and not too large
                says = retrieval(run) if name == "predictor_neighbors" else ""
                images.append(
                    f"<figure{' class=wide' * (size[0] > 1.2 * size[1])}>"
                    + image_tag(content, kind, shown, f"{heading}: {run.name}")
                    + f"<figcaption>{named(runs, run, says)}</figcaption></figure>")
        if images:
            parts.append(f"<h3>{escape(heading)}</h3><p class=notice>{notice}</p><div class=side>"
                         f"{''.join(images)}</div>")
    for run in runs:
        if not run.figures:
            says = f"No figures yet: {code(f'python -m extras.figures {run.folder}')}"
            parts.append(f"<p>{named(runs, run, says)}</p>")
    return "".join(parts)
