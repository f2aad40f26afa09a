"""A page for a run: what was trained, what it knows, curves, film and figures, warnings, commands.

    python -m extras.report RUN              writes RUN/report.html
    python -m extras.report RUN1 RUN2 RUN3   side by side: writes RUN1/comparison.html

One file of 5 MB at most, to be opened, mailed or printed; it needs no network. What it says of a
run is computed from the run's files. What is missing is named, with the command that makes it.
"""

import math
import string
from dataclasses import asdict
from html import escape
from pathlib import Path
from typing import NamedTuple

import diagnostics
import evaluate
import train
from config import Config, UsageError
from extras.film import PROGRAM as FILM
from extras.film import film
from extras.report_pictures import code, curves, figures, named
from support import command_line
from support.checkpoint import write
from support.logs import complete_rows, duration
from support.results import ROWS, read_json

LIMIT = 5_000_000  # bytes of a page
IJEPA = ("train.py", FILM)  # the programs that train I-JEPA as it is


class Run(NamedTuple):
    """What the page needs of a run folder."""

    folder: Path
    name: str
    config: Config
    about: dict  # of its data and progress
    program: str  # that trained it; empty if none of ours did
    parameters: int  # of the encoder
    rows: list  # of metrics.csv, dicts of strings
    evaluations: dict  # file name -> results; only those with accuracies
    figures: dict  # name -> path


def read_run(folder, name):
    """The Run in a folder. Raises UsageError if it holds none, or if a file is damaged."""
    encoders, config, about = evaluate.load_encoders(folder)
    found = {path.name: read_json(path) for path in sorted(folder.glob("evaluation*.json"))}
    return Run(folder, name, config, about, program_of(folder, about),
               sum(p.numel() for p in encoders["target"].parameters()),
               complete_rows(folder / "metrics.csv"),
               {file: results for file, results in found.items() if results["features"]},
               {path.stem: path for path in sorted(folder.glob("figures/*.png"))})


def program_of(folder, about):
    """What to type after `python` to train such a run; empty if that is not known: weights from
    elsewhere, and models of one's own that were given to train.train."""
    program = about.get("program", "")
    if program in IJEPA:
        try:
            train.load_run(folder)
        except UsageError:  # train.train calls itself train.py whatever it is given
            return ""
    return program


# --- what was trained -----------------------------------------------------------------------------


def sentence(run):
    """What was trained, in one sentence."""
    config, about, progress = run.config, run.about, run.about["progress"]
    size = f"an encoder {config.encoder} with {run.parameters:,} parameters"
    if not progress["total"]:
        return escape(f"Weights from elsewhere: {size}.")
    method = "I-JEPA" if run.program in IJEPA else f"python {run.program}"
    method = method if run.program else "A method of one's own"
    kept, held = train.hold_out(config, about["images"])
    return escape(
        f"{method}: {size}, trained on {len(kept):,} images of {about['name']} ({len(held):,} more "
        f"were held out), {progress['step']:,} steps of {config.batch_size * config.accumulation} "
        f"images in {duration(progress['seconds'])}.")


def differences(runs):
    """A table of the settings in which runs differ."""
    settings = {run.name: asdict(run.config) for run in runs}
    first, *others = settings.values()
    rows = "".join(
        f"<tr><th scope=row>{name}</th>"
        + "".join(f"<td>{escape(str(values[name]))}</td>" for values in settings.values()) + "</tr>"
        for name in first if name != "out" and any(other[name] != first[name] for other in others))
    heads = "".join(f"<th scope=col>{escape(name)}</th>" for name in settings)
    return (f"<div class=scroll><table><thead><tr><th scope=col>settings that differ</th>{heads}"
            f"</tr></thead><tbody>{rows}</tbody></table></div>" if rows else
            "<p>Their settings are the same.</p>")


# --- what it knows --------------------------------------------------------------------------------


def lead(results, measure, baseline):
    """How far the target encoder is ahead of a baseline: points, and two standard errors of the
    difference between two accuracies on so many test images."""
    ours, theirs = (results["features"][name][measure] for name in ("target", baseline))
    variance = (ours * (1 - ours) + theirs * (1 - theirs)) / results["split_sizes"]["test"]
    return 100 * (ours - theirs), 200 * math.sqrt(variance)


def verdict(results):
    """The target encoder next to the baselines, in words."""
    sentences = []
    for measure, name in (("linear", "By the linear probe"), ("knn", "By kNN")):
        parts = []
        for baseline in ("random", "pixels"):
            points, error = lead(results, measure, baseline)
            word = "above" if points > 0 else "below"
            parts.append(f"{abs(points):.1f} points {word} the {ROWS[baseline]}"
                         if abs(points) > error else
                         f"not clearly different from the {ROWS[baseline]} ({points:+.1f} points)")
        sentences.append(f"{name} the target encoder is {' and '.join(parts)}.")
    return " ".join(sentences)


def scores(runs, file):
    """The table of one evaluation of the runs, all of which have it."""
    found = [run.evaluations[file] for run in runs]
    names = [name for name in ROWS if any(name in results["features"] for results in found)]
    heads = len(runs) * "<th scope=col>linear probe</th><th scope=col>kNN</th>"
    over = "".join(f"<th colspan=2 scope=colgroup>{escape(run.name)}</th>" for run in runs)
    over = f"<tr><td></td>{over}</tr>" if len(runs) > 1 else ""

    def cells(row):
        return "".join(f'<td class=score style="--share:{100 * row[measure]:.1f}%">'
                       f"{100 * row[measure]:.1f}</td>" if row else "<td></td>"
                       for measure in ("linear", "knn"))

    rows = "".join(f"<tr><th scope=row>{ROWS[name]}</th>" + "".join(
        cells(results["features"].get(name)) for results in found) + "</tr>" for name in names)
    chance = "".join(f"<td colspan=2>{100 * results['chance']:.1f}</td>" for results in found)
    rows += f"<tr><th scope=row>chance</th>{chance}</tr>"
    return (f"<div class=scroll><table><thead>{over}<tr><td></td>{heads}</tr>"
            f"</thead><tbody>{rows}</tbody></table></div>")


def knowledge(runs):
    """The section of accuracies."""
    parts = []
    for file in sorted({file for run in runs for file in run.evaluations}):
        shown = [run for run in runs if file in run.evaluations]
        parts.append(f"<h3>{escape(shown[0].evaluations[file]['dataset'])}: test accuracy in "
                     f"percent</h3>{scores(shown, file)}")
        for run in shown:
            results = run.evaluations[file]
            says = "{} {train:,} labeled training images, {test:,} test images.".format(
                verdict(results), **results["split_sizes"])
            parts.append(f"<p>{named(runs, run, says)}</p>")
    if parts:
        parts.append("<p class=soft>Read from the frozen, average-pooled features: what does not "
                     "exceed the untrained encoder was not learned. A difference is called clear "
                     "above two standard errors, which come from the number of test images; "
                     "another seed may differ by more.</p>")
    for run in runs:
        if not run.evaluations:
            says = f"Not evaluated yet: {code(f'python evaluate.py {run.folder}')}"
            if (run.folder / "evaluation.json").exists():  # without accuracies
                command = f"python evaluate.py {run.folder} --dataset LABELED_DATA"
                says = f"Its images have no labels. On others: {code(command)}"
            parts.append(f"<p>{named(runs, run, says)}</p>")
    return "".join(parts)


# --- warnings -------------------------------------------------------------------------------------


def training_warnings(run):
    """What looked wrong while a run trained, each kind once, and what to try: strings."""
    config, found, now = run.config, {}, {}
    measured = [{name: float(row[name]) for name in ("step", *diagnostics.MEASURES) if row[name]}
                for row in run.rows if row["target_std"]]
    for row in measured:
        now = diagnostics.warnings(row, measured[0], row["step"] / run.about["progress"]["total"])
        for kind, text in now.items():
            found.setdefault(kind, f"At step {row['step']:,.0f}, {text}")
    texts = [f"{text}; at the end {'still so' if kind in now else 'no longer so'}."
             for kind, text in found.items()]
    return texts + [f"What to try: train for longer, a lower --lr (now {config.lr:g}), a longer "
                    f"--warmup (now {config.warmup:g}), or a --momentum closer to 1 (now "
                    f"{config.momentum:g})."] * bool(texts)


def evaluation_warnings(run):
    """What looks wrong in its evaluations: strings."""
    texts, step = [], run.about["progress"]["step"]
    for file, results in run.evaluations.items():
        texts += [f"{file}: {text}." for text in results["warnings"]]
        ahead = {name: lead(results, "linear", name) for name in ("random", "pixels")}
        behind = [ROWS[name] for name, (points, error) in ahead.items() if points <= error]
        if behind:
            texts.append(f"{file}: by the linear probe, the target encoder is not clearly above "
                         f"the {' and the '.join(behind)}. Train for longer.")
        if results["training"]["step"] != step:
            texts.append(f"{file} is of step {results['training']['step']:,}, the run is at step "
                         f"{step:,}. Evaluate it again.")
    return texts


def warnings(runs):
    """The section of warnings."""
    parts = []
    for run in runs:
        texts, progress = training_warnings(run) + evaluation_warnings(run), run.about["progress"]
        if progress["step"] < progress["total"]:
            texts.append(f"It stopped at step {progress['step']:,} of {progress['total']:,}." + (
                f" Resume it: python {run.program} --out {run.folder} --resume"
                if run.program else ""))
        parts += [f"<p class=warning>{named(runs, run, escape(text))}</p>" for text in texts]
        if not texts:
            measured = sum(bool(row["target_std"]) for row in run.rows)
            says = f"None, after {measured} measurements of the features during training."
            parts.append(f"<p>{named(runs, run, says)}</p>")
    return "".join(parts)


# --- the page -------------------------------------------------------------------------------------


def films(runs):
    """The section of films."""
    parts = []
    for run in runs:
        says = (f"No snapshots were kept. {code('python -m extras.film')} trains as train.py does, "
                "and keeps them.")
        try:
            if (run.folder / "snapshots").is_dir():
                says = film(run.folder)
        except UsageError as error:
            says = f"Left out: {escape(str(error))}."
        parts.append(f"<div>{named(runs, run, says)}</div>")
    return "".join(parts)


def reproduce(runs):
    """The section of commands."""
    parts = []
    for run in runs:
        lines = [command_line.command(run.config, run.program)] if run.program else []
        lines += [results["commands"][-1] for results in run.evaluations.values()]
        lines += [f"python -m extras.figures {run.folder}"] * bool(run.figures)
        parts.append(f"<pre>{escape(chr(10).join(lines))}</pre>" if lines else
                     f"<p>{named(runs, run, 'Not trained by a program of this code.')}</p>")
        for file, results in run.evaluations.items():
            versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
            parts.append("<p class=soft>" + escape(f"{file}: {results['date']}, {versions}, seed "
                                                   f"{results['seed']}.") + "</p>")
    return "".join(parts)


def page(runs):
    """The page of some runs, as HTML."""
    template = string.Template(Path(__file__).with_suffix(".html").read_text())
    sections = {"Accuracy": knowledge(runs), "Warnings": warnings(runs), "Curves": curves(runs),
                "Film": films(runs), "Figures": "", "Commands": reproduce(runs)}
    used = len(template.template) + len("".join(sections.values()).encode(errors="replace"))
    sections["Figures"] = figures(runs, LIMIT - used - 20_000)  # less what stands around them
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs side by side"
    body = [f"<h1>{escape(title)}</h1>"]
    body += [f"<p class=lead>{named(runs, run, sentence(run))}</p>" for run in runs]
    body += [differences(runs)] if len(runs) > 1 else []
    body += ["<nav>", *(f'<a href="#{name}">{name}</a>' for name in sections), "</nav>"]
    body += [f"<section id={name}><h2>{name}</h2>{text}</section>"
             for name, text in sections.items()]
    return template.substitute(title=escape(title), body="\n".join(body))


def main(argv=None):
    """The command line: write the page and name it."""
    p = command_line.Parser(description="Write one page about a run, or about several.")
    p.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folder")
    folders = p.parse_args(argv).runs
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):
        names = list(map(str, folders))
    text = page([read_run(folder, name) for folder, name in zip(folders, names)])
    path = folders[0] / ("report.html" if len(folders) == 1 else "comparison.html")
    write(path, lambda temporary: temporary.write_text(text, encoding="utf-8", errors="replace"))
    print(f"{path} ({path.stat().st_size / 1e6:.1f} MB)")


if __name__ == "__main__":
    command_line.run(main)
