"""Experiments of many runs: I-JEPA next to MAE and supervision, and the paper's ablations.

    python -m extras.experiments comparison                 at equal epochs and at equal seconds
    python -m extras.experiments ablations --seeds 0 1 2    masks, targets, predictor
    python -m extras.experiments recipe --seeds 0 1         more from each second, on CIFAR-10
    python -m extras.experiments dial --seeds 0 1 2         how much detail can be predicted?

A run is a process of its own, `python PROGRAM FLAGS`, in runs/experiments. Flags that are not
listed by --help go to every run. Scores are written to results/NAME.json and NAME.md after each
run. To continue after a stop, repeat the command; if a seed is added, only that seed is trained.
Scores in the JSON file are kept if the new command plans the same runs; all others are dropped.
"""

import csv
import json
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

import data
import diagnostics
import evaluate
import train
from config import UsageError
from extras import charts, probes, trained_heads
from support import checkpoint, command_line, shapes
from support.plots import save_figure
from support.results import provenance, write_json

FOLDER, LABELS = Path("runs/experiments"), 10_000  # labeled training images of the probes
RANDOM = "random init"  # the row that scores I-JEPA's encoder before training
METHODS = {"I-JEPA": "train.py", "MAE": "-m extras.mae", "supervised": "-m extras.supervised"}
# Rows: name -> program, its flags, and what the paper says (its table, its accuracy).
ABLATIONS = {
    "I-JEPA as it is": ("train.py", "", "T6, T8-T10: 54.2"),
    "masks: raster": ("-m extras.ablations raster-masks", "", "T6: 15.5"),
    "masks: one block of .6": ("-m extras.ablations one-block", "", "T6: 20.2"),
    "masks: random .6": ("-m extras.ablations random-masks", "", "T6: 17.6"),
    "targets: pixels": ("-m extras.ablations pixel-targets", "", "T7: 40.7 (features 66.9)"),
    "target encoder's input masked": ("-m extras.ablations masked-target-input", "",
                                      "T11: 56.1 (output 67.3)"),
    "1 target, all of the context": ("train.py", "--num-targets 1 --context-size 0", "T10: 9.0"),
    "target scale .075 to .2": ("train.py", "--target-scale .075 .2", "T8: 19.2"),
    "context scale .85 to 1, all of it": ("train.py", "--context-size 0", "T9: 54.2"),
    "predictor 1 deep": ("train.py", "--predictor 32x1x1", "T12: depth 6 64.0, 12 66.9"),
    "predictor as wide as the encoder": ("train.py", "--predictor 64x2x1",
                                         "T14: width 384 70.7, 1024 68.4"),
    "no stop-gradient": ("-m extras.ablations no-stop-gradient", "", "-"),
    "momentum 0": ("-m extras.ablations momentum-0", "", "-"),
    "momentum 1": ("-m extras.ablations momentum-1", "", "-"),
}
SEVERAL = "-m extras.recipe --masks-per-image"
# Changes of one recipe, judged on held-out training images after as many seconds as the first row
# takes, or after the share of them that is the third entry. SEED becomes the run's own seed.
RECIPE = {
    "4 masks of 32 images": (f"{SEVERAL} 4", ""),
    "an MAE, a third of the time": ("-m extras.mae", "--batch-size 128", 1 / 3),
    "one pass for each target block": (f"{SEVERAL} 4", "--no-merge-targets"),
    "1 mask of 128 images": (f"{SEVERAL} 1", "--batch-size 128"),
    "2 masks of 64 images": (f"{SEVERAL} 2", "--batch-size 64"),
    "crops from .3": (f"{SEVERAL} 4", "--crop-scale .3 1"),
    "no crops": (f"{SEVERAL} 4", "--crop-scale 1 1"),
    "context of 24 patches": (f"{SEVERAL} 4", "--context-size 24"),
    "targets of blocks 2, 3, 4": (f"{SEVERAL} 4 --target-blocks 2 3 4", ""),
    "momentum from 1": (f"{SEVERAL} 4", "--momentum 1 --momentum-final .99"),
    "encoder 192 wide": (f"{SEVERAL} 4", "--encoder 192x4x3"),
    "that MAE as frozen teacher, the other two thirds": (
        f"{SEVERAL} 4 --teacher runs/experiments/recipe-an-MAE-a-third-of-the-time-SEED", "",
        2 / 3),
}
RECIPE_FLAGS = ("--encoder 128x4x2 --predictor 64x2x2 --batch-size 32 --context-size 16 "
                "--crop-scale .6 1 --lr 1.5e-3 --lr-start 1.5e-4 --lr-final 1e-5 --betas .9 .95 "
                "--weight-decay .05 --weight-decay-final .05 --clip-grad 3 --momentum .98 "
                "--momentum-final .999 --held-out 5000 --measurements 5 --epochs 1000 "
                "--max-steps 7000").split()
# The dial: the share of a shape's dots that no context predicts.
DETAIL = (0.0, 0.5, 1.0)

# --- one run --------------------------------------------------------------------------------------


Run = namedtuple("Run", "row seed command folder")  # one seed of a row, and what trains it where


def plan(args, row, program, flags, seed):
    """The Run of a row with one seed. A row's flags come after the user's, and so win."""
    name = f"{args.table} {'I-JEPA' if row == RANDOM else row} {seed}"
    folder = FOLDER / re.sub(r"\W+", "-", name)
    program = program.replace("SEED", str(seed))
    words = ["python", *program.split(), "--preset", args.preset, *args.flags, *flags.split(),
             "--seed", str(seed), "--out", str(folder)]
    return Run(row, seed, shlex.join(words), folder)


def call(command, quiet=False):
    """Run `python ...` in a process of its own; UsageError with its last line if it fails."""
    done = subprocess.run([sys.executable, *shlex.split(command)[1:]], text=True,
                          stdout=subprocess.DEVNULL if quiet else None,
                          stderr=subprocess.PIPE if quiet else None)
    if done.returncode:
        why = (done.stderr or "").strip().splitlines()[-1:] or [f"status {done.returncode}"]
        raise UsageError(f"`{command}` failed: {why[0]}")


def train_run(run, quiet=False):
    """Train a Run, resume it if it was stopped, or do nothing if it is finished.

    Raises UsageError if it fails, or if the folder holds the run of another command.
    """
    note, started = run.folder / "command.txt", (run.folder / "checkpoint.pt").exists()
    if started:
        if note.read_text() != run.command:
            raise UsageError(f"{run.folder} holds a run of `{note.read_text()}`, not "
                             f"`{run.command}`; move that folder away")
        progress = checkpoint.load(run.folder)[1]["progress"]
        if progress["step"] == progress["total"]:
            return
    run.folder.mkdir(parents=True, exist_ok=True)
    note.write_text(run.command)
    call(run.command + " --resume" * started, quiet)


def score(run, finetune=0, held_out=False):
    """What a run's target encoder is worth: a dict of accuracies, fractions, and what they took.

    On test images, or, while choices are still to be made, on the training images held out.

    linear, knn, 1% and 10% (linear probes on that part of the labels), fine_tuned if finetune, its
    epochs, is not 0. The row RANDOM scores the same encoder before training.
    """
    device = train.pick_device("auto")
    encoders, config, about = evaluate.load_encoders(run.folder, device)
    encoder = encoders["target"]
    if run.row == RANDOM:
        encoder = evaluate.untrained_encoder(config, about, run.seed).to(device)
    full = data.load(config.dataset, "train", config.data_dir, config.image_size)
    if held_out:
        full, test = map(full.subset, train.hold_out(config, len(full)))
    else:
        test = data.load(config.dataset, "test", config.data_dir, config.image_size)
    few = evaluate.subsample(full, LABELS, run.seed)
    x, test_x = (evaluate.features(encoder, part, config.image_size, device)
                 for part in (few, test))
    features = x, few.labels, test_x, test.labels
    per_class = full.labels.bincount().min().item()  # a probe needs 2 images of a class
    shots = probes.low_shot(*features, (max(2, per_class // 100), per_class // 10))["mean"]
    found = {"linear": evaluate.linear_probe(*features, run.seed)["accuracy"],
             "knn": diagnostics.knn(*features), "1%": shots[0], "10%": shots[1],
             "seconds": about["progress"]["seconds"], "steps": about["progress"]["step"],
             "command": run.command}
    if finetune:
        found["fine_tuned"] = trained_heads.fine_tune(
            encoder, few, test, config.image_size, device, finetune, crop_scale=config.crop_scale,
            flip=config.flip, seed=run.seed)["accuracy"]
    return found


# --- the table of an experiment -------------------------------------------------------------------


class Table:
    """The planned Runs and the scores that are known, also from before, in results/NAME.json."""

    def __init__(self, args):
        self.args, self.path, self.runs = args, Path(f"results/{args.table}.json"), []
        before = json.loads(self.path.read_text()) if self.path.exists() else {"rows": {}}
        self.known = {(name, run["command"]): run for name, row in before["rows"].items()
                      for run in row["runs"]}
        self.ratios = before.get("equal_seconds", {})  # flags -> method -> ratio of its steps

    def rows(self):
        """name -> {"runs": each seed's scores}, of the planned runs as far as they are known."""
        rows = {}
        for run in self.runs:
            if found := self.known.get((run.row, run.command)):
                paper = {"paper": ABLATIONS[run.row][2]} if self.args.what == "ablations" else {}
                row = rows.setdefault(run.row, {**paper, "runs": []})
                row["runs"].append({"seed": run.seed, **found})
        return rows

    def fill(self):
        """Train what is not known, args.jobs runs at a time, and score each when it is done."""
        wanted = {"linear", "fine_tuned"} if self.args.finetune else {"linear"}
        missing = [run for run in self.runs
                   if not wanted <= self.known.get((run.row, run.command), {}).keys()]
        groups, jobs = {}, self.args.jobs  # rows that score one and the same training
        for run in missing:
            groups.setdefault(run.folder, []).append(run)
        firsts = [runs[0] for runs in groups.values()]
        with ThreadPoolExecutor(jobs) as pool:
            apply = pool.map if jobs > 1 else map
            done = apply(lambda run: train_run(run, quiet=jobs > 1), firsts)
            for runs, _ in tqdm(zip(groups.values(), done), total=len(groups), unit="run",
                                disable=jobs == 1):
                for run in runs:
                    found = score(run, self.args.finetune, self.args.what == "recipe")
                    self.known[run.row, run.command] = found
                    tqdm.write(f"{run.row:36}{100 * found['linear']:8.1f}")
                    self.write()
        self.write()

    def write(self):
        """Write results/NAME.json and results/NAME.md as far as they are known."""
        args, rows = self.args, self.rows()
        about = {"command": args.command, "seeds": args.seeds,
                 **provenance(train.pick_device("auto"))}
        write_json(self.path, {**about, "equal_seconds": self.ratios, "rows": rows})
        which = "held-out training images" if args.what == "recipe" else "test images"
        text = (f"`{args.command}`, {about['date'][:10]}; percent, frozen target encoder, "
                f"{LABELS:,} labeled images, {which}; ± over seeds.")
        table = markdown(rows, f"{args.what} on {args.preset}", text)
        self.path.with_suffix(".md").write_text(table, encoding="utf-8")


def markdown(rows, title, provenance):
    """The rows as a table: mean ± standard deviation over seeds, percent.

    With the paper's numbers it also has the gain over the first row by the linear probe, seed by
    seed: runs of a seed start from the same weights and see the same images.
    """
    first = next(iter(rows.values()), {"runs": [{}]})
    heads = {"linear": "linear probe", "knn": "kNN", "1%": "1% of the labels", "10%": "10%",
             "fine_tuned": "fine-tuned"}
    measures = [name for name in heads if name in first["runs"][0]]
    columns = [heads[name] for name in measures] + ["seeds"]
    columns += ["over the first row", "paper"] * ("paper" in first)
    lines = [f"# {title}", "", provenance, "", f"| | {' | '.join(columns)} |",
             "|---" * (len(columns) + 1) + "|"]
    for name, row in rows.items():
        cells = [mean_and_spread([run[m] for run in row["runs"] if m in run]) for m in measures]
        cells.append(str(len(row["runs"])))
        if "paper" in first:
            cells += [mean_and_spread(gains(row, first), "+"), row["paper"]]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def gains(row, first):
    """A row's linear probes minus the first row's with the same seed; [] for the first row."""
    base = {run["seed"]: run["linear"] for run in first["runs"]} if row is not first else {}
    return [run["linear"] - base[run["seed"]] for run in row["runs"] if run["seed"] in base]


def mean_and_spread(values, sign=""):
    """Fractions as percent, "mean ± standard deviation"; with sign "+" always signed."""
    spread = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):{sign}.1f}{spread}" if values else ""


# --- the experiments ------------------------------------------------------------------------------


def time_steps(args, program, more=""):
    """Seconds that 40 steps of a program take, after 10 that warm up."""
    with tempfile.TemporaryDirectory() as folder:
        flags = [*args.flags, *more.split(), "--max-steps", "50", "--measurements", "0"]
        call(shlex.join(["python", *program.split(), "--preset", args.preset, *flags, "--out",
                         folder]), quiet=True)
        with open(Path(folder) / "metrics.csv") as file:
            rows = list(csv.DictReader(file))
        images = json.loads((Path(folder) / "config.json").read_text())["batch_size"]
    start, end = (int(row["step"]) * images / float(row["images_per_second"])
                  for row in (rows[9], rows[-1]))
    return end - start


def equal_seconds(args, rows=None, rounds=5):
    """How many steps of each row take as long as one of the first row's: the median of short runs
    in turn, because whatever else the machine does then affects all alike."""
    rows = rows or {name: (program, "") for name, program in METHODS.items()}
    times = [{name: time_steps(args, *row) for name, row in rows.items()} for _ in range(rounds)]
    first = next(iter(rows))
    return {name: round(statistics.median(time[first] / time[name] for time in times), 3)
            for name in rows if name != first}


def comparison(args, table):
    """Rows of all methods at equal epochs, at I-JEPA's seconds, and of no training."""
    flags = " ".join(args.flags)
    if flags not in table.ratios:
        table.ratios[flags] = equal_seconds(args)
        table.write()  # timed again they would differ, and so would the epochs
    epochs = command_line.parse(["--preset", args.preset, *args.flags], "").config.epochs
    rows = {"I-JEPA": (METHODS["I-JEPA"], ""), RANDOM: (METHODS["I-JEPA"], "")}
    for name, ratio in table.ratios[flags].items():
        rows[name] = METHODS[name], ""
        rows[f"{name}, equal seconds"] = METHODS[name], f"--epochs {round(epochs * ratio)}"
    return rows


def recipe(args, table):
    """RECIPE's rows, each with as many steps as fit into the first row's seconds."""
    args.flags = [*RECIPE_FLAGS, *args.flags]
    return fitted(args, table, RECIPE, 3)


def fitted(args, table, rows, rounds):
    """The rows with flags for as many steps as fit into the first row's seconds, or a share."""
    ratios = table.ratios.setdefault(shlex.join(args.flags), {})
    # A student cannot be timed before its teacher is there; its step is the first row's.
    timed = {name: row[:2] for name, row in rows.items() if "SEED" not in row[0]}
    if not ratios.keys() >= {*timed} - {next(iter(timed))}:
        ratios |= equal_seconds(args, timed, rounds)
        table.write()  # timed again they would differ, and so would the steps
    steps = command_line.parse(["--preset", args.preset, *args.flags], "").config.max_steps
    return {name: (program, f"{flags} --max-steps "
                   f"{round(steps * ratios.get(name, 1) * (share[0] if share else 1))}")
            for name, (program, flags, *share) in rows.items()}


def dial(args, table):
    """I-JEPA, MAE and supervision at equal seconds; more and more dots cannot be predicted."""
    args.flags = ["--epochs", "1000", "--max-steps", "3000", "--measurements", "1", *args.flags]
    methods = fitted(args, table, {name: (program, "") for name, program in METHODS.items()}, 5)
    rows = {}
    for detail in DETAIL:
        path = Path(f"data/dial/shapes-{detail:g}.npz")
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            arrays = {}
            for split in shapes.COUNT:
                images, labels, *_ = shapes.make(split, detail=detail)
                arrays[f"{split}_images"] = images.movedim(1, -1).numpy()
                arrays[f"{split}_labels"] = labels.numpy()
            np.savez(path, **arrays)
        for name, (program, flags) in methods.items():
            rows[f"{name}, detail {detail:g}"] = program, f"{flags} --dataset {path}"
    return rows


def main(argv=None):
    """Train what is missing, score it, write the table. Raises UsageError if a run fails."""
    parser = command_line.Parser(description="Train, score and tabulate many runs. Flags that are "
                                 "not listed here go to every run.")
    parser.add_argument("what", choices=("comparison", "ablations", "recipe", "dial"))
    parser.add_argument("--preset", help="preset of every run [shapes; of recipe cifar10]")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="seeds [0]")
    parser.add_argument("--name", help="results/NAME.json, images/NAME.png [experiment, preset]")
    parser.add_argument("--finetune", type=int, default=0, help="epochs of fine-tuning [0: none]")
    parser.add_argument("--jobs", type=int, default=1, help="runs trained at the same time [1]")
    argv = sys.argv[1:] if argv is None else argv
    args, args.flags = parser.parse_known_args(argv)
    args.command = shlex.join(["python", "-m", "extras.experiments", *argv])
    usual = "cifar10" if args.what == "recipe" else "shapes"
    args.preset = args.preset or usual
    args.table = args.name or f"{args.what}_{args.preset}".removesuffix(f"_{usual}")
    table = Table(args)
    make = {"comparison": comparison, "recipe": recipe, "dial": dial}.get(args.what)
    rows = make(args, table) if make else ABLATIONS
    table.runs = [plan(args, name, *row[:2], seed) for seed in args.seeds
                  for name, row in rows.items()]
    table.fill()
    figures = {
        "ablations": lambda rows: charts.ablations_figure(
            rows, f"{args.preset}: I-JEPA with one thing changed"),
        "recipe": lambda rows: charts.ablations_figure(
            rows, "CIFAR-10: changes of one recipe, at equal seconds"),
        "dial": charts.dial_figure}
    if args.what in figures:
        save_figure(figures[args.what](table.rows()), f"images/{args.table}.png")
    print(table.path.with_suffix(".md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    command_line.run(main)
