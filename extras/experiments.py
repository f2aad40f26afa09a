"""Comparisons that need many runs: I-JEPA beside MAE and supervision, and the paper's ablations at our scale.

    python -m extras.experiments comparison          I-JEPA, MAE, supervised, random: at equal epochs and at equal seconds
    python -m extras.experiments ablations           masks, targets, predictor, as in the paper's tables 6 to 14
    python -m extras.experiments ablations --seeds 0 1 2 --measurements 2
    python -m extras.experiments recipe --preset cifar10 --epochs 20 --jobs 6      what each lever of a recipe is worth
    python -m extras.experiments budgets --preset cifar10 --labels 0               what half a minute to ten minutes reach

Each run lies in runs/experiments/NAME-SEED and is trained only once: stopped, the command goes on where it was. What a run scored is in
its score.json; after each, results/NAME.json and results/NAME.md are written, and at the end images/ablations.png. What
results/NAME.json knows of the same settings is not trained again and is not lost when the command is stopped, so that a table can grow
seed by seed on several machines.
"""

import datetime
import json
import platform
import shlex
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from tqdm import tqdm

from support import checkpoint
import config
import data
import diagnostics
import evaluate
from extras import figures
from extras import methods
from extras import probes
import train

FOLDER = Path("runs/experiments")
# Rows of the ablations: name, what train.py is given, and what the paper says (its table, and its accuracy).
ABLATIONS = {
    "I-JEPA as it is": ([], "T6, T8-T10: 54.2"),
    "masks: raster": (["--method", "ijepa-raster-masks", "--context-size", "0"], "T6: 15.5"),
    "masks: one block of .6": (["--num-targets", "1", "--target-scale", "0.6", "0.6", "--context-scale", "1", "1", "--context-size", "0"],
                               "T6: 20.2"),
    "masks: random .6": (["--method", "ijepa-random-masks", "--context-size", "0"], "T6: 17.6"),
    "targets: pixels": (["--method", "ijepa-pixels"], "T7: 40.7 (features 66.9)"),
    "target encoder's input masked": (["--method", "ijepa-masked-input"], "T11: 56.1 (output 67.3)"),
    "1 target": (["--num-targets", "1"], "T10: 9.0"),
    "1 target, all of the context": (["--num-targets", "1", "--context-size", "0"], "T10: 9.0"),
    "2 targets": (["--num-targets", "2"], "T10: 22.0"),
    "3 targets": (["--num-targets", "3"], "T10: 48.5"),
    "target scale .075 to .2": (["--target-scale", "0.075", "0.2"], "T8: 19.2"),
    "target scale .2 to .25": (["--target-scale", "0.2", "0.25"], "T8: 38.9"),
    "target scale .2 to .3": (["--target-scale", "0.2", "0.3"], "T8: 33.6"),
    "context scale .4 to 1": (["--context-scale", "0.4", "1", "--context-size", "0"], "T9: 31.2"),
    "context scale .85 to 1, all of it": (["--context-size", "0"], "T9: 54.2"),
    "predictor 1 deep": (["--predictor", "32x1x1"], "T12: depth 6 64.0, 12 66.9"),
    "predictor 4 deep": (["--predictor", "32x4x1"], "T12: depth 6 64.0, 12 66.9"),
    "predictor as wide as the encoder": (["--predictor", "64x2x1"], "T14: width 384 70.7, 1024 68.4"),
    "no stop-gradient": (["--method", "ijepa-no-stop-gradient"], "-"),
    "momentum 0": (["--method", "ijepa-momentum-0"], "-"),
    "momentum 1": (["--method", "ijepa-momentum-1"], "-"),
}
# Levers of the recipe for small images: name, what train.py is given.
RECIPE = {
    "preset": [],
    "patch 2": ["--patch-size", "2", "--context-size", "80"],
    "targets .1 to .2": ["--target-scale", "0.1", "0.2"],
    "targets .15 to .3": ["--target-scale", "0.15", "0.3"],
    "context: all of it": ["--context-size", "0"],
    "context: cut to the shortest": ["--context-size", "0", "--mask-mode", "truncate"],
    "context: 12 patches": ["--context-size", "12"],
    "context: 28 patches": ["--context-size", "28"],
    "targets: mean of 3 blocks": ["--target-layers", "3"],
    "targets: mean of all 6 blocks": ["--target-layers", "6"],
    "VICReg .02": ["--vicreg", "0.02"],
    "VICReg .1": ["--vicreg", "0.1"],
    "VICReg .02, targets: mean of 4 blocks": ["--vicreg", "0.02", "--target-layers", "4"],
    "4 registers": ["--registers", "4"],
    "stochastic depth .1": ["--stochastic-depth", "0.1"],
    "EMA .98": ["--momentum", "0.98", "--momentum-final", "0.98"],
    "EMA .99": ["--momentum", "0.99", "--momentum-final", "0.99"],
    "EMA .99 to 1": ["--momentum", "0.99"],
    "predictor 2 deep": ["--predictor", "96x2x2"],
    "predictor 6 deep": ["--predictor", "96x6x2"],
    "predictor 192 wide": ["--predictor", "192x4x3"],
    "crops .08 to 1": ["--crop-scale", "0.08", "1"],
    "crops .5 to 1": ["--crop-scale", "0.5", "1"],
    "no crops": ["--crop-scale", "1", "1"],
    "rate 2e-3": ["--lr", "2e-3", "--lr-start", "2e-4"],
    "rate 4e-3": ["--lr", "4e-3", "--lr-start", "4e-4"],
    "weight decay stays .04": ["--weight-decay-final", "0.04"],
    "encoder 384 x 5": ["--encoder", "384x5x6", "--predictor", "192x4x3"],
}
BUDGETS = (0.5, 1, 2, 5, 10)  # minutes of training
METHODS = {"I-JEPA": ["--method", "ijepa"], "MAE": ["--method", "mae"], "supervised": ["--method", "supervised"]}


# ---- one run


def trained(run):
    """The folder of the run that a Config describes, trained if it is not yet, gone on with if it was stopped.

    Raises UsageError where the folder holds a run of other settings.
    """
    folder = Path(run.out)
    if not (folder / "checkpoint.pt").exists():
        train.train(run)
        return folder
    saved = checkpoint.load_checkpoint(folder, "cpu")
    there, asked = config.command(config.from_dict(saved["config"])), config.command(run)
    if there != asked:
        raise config.UsageError(f"{folder} holds a run of `{there}`, asked is `{asked}`; move that folder away, or ask for its settings")
    if saved["progress"]["step"] < saved["progress"]["total"]:
        train.train(run, resume=True)
    return folder


def score_file(folder, random):
    """Where it is kept what a run scored, or its untrained encoder."""
    return Path(folder) / ("random_score.json" if random else "score.json")


def labels_of(found):
    """With how many labelled images a run was scored, 0 for all; in older files, which do not say, 10,000."""
    return found.get("labels", 10000)


def train_ahead(runs, jobs):
    """Train the runs, Configs, that are not yet, `jobs` of them at a time, each in a process of its own; what fails is seen when scored."""
    runs = {run.out: run for run in runs if not (Path(run.out) / "checkpoint.pt").exists()}.values()  # a run may stand in two rows
    commands = [[sys.executable, train.__file__, *shlex.split(config.command(run))[2:]] for run in runs]
    with ThreadPoolExecutor(jobs) as pool:
        list(tqdm(pool.map(lambda words: subprocess.run(words, capture_output=True), commands), total=len(commands), unit="run"))


def score(folder, seed, finetune=0, random=False, labels=10000):
    """What the features of a run are worth, a dict of fractions: linear, knn, low-shot at 1% and 10% of the labels, fine_tuned if asked.

    Kept in the run's folder; the next time only what is not yet there is measured.
    """
    path = score_file(folder, random)
    found = json.loads(path.read_text()) if path.exists() else {}
    found = found if labels_of(found) == labels else {}
    if "linear" in found and ("fine_tuned" in found or not finetune):
        return found
    device = train.pick_device("auto")
    model, run, about = checkpoint.load_run(folder, device)
    encoder = evaluate.random_encoder(run, about, device, seed) if random else model.target_encoder
    full, test = (data.load(run.dataset, split, run.data_dir, run.image_size) for split in ("train", "test"))
    few = evaluate.subsample(full, labels, seed)
    if "linear" not in found:
        x, test_x = (evaluate.features(encoder, part, run.image_size, device) for part in (few, test))
        per_class = full.labels.bincount().min().item()
        shots = probes.low_shot(x, few.labels, test_x, test.labels, (per_class // 100, per_class // 10))
        found = {
            "linear": probes.linear_probe(x, few.labels, test_x, test.labels, seed)["accuracy"],
            "knn": diagnostics.knn(x, few.labels, test_x, test.labels),
            "1%": shots["mean"][0], "10%": shots["mean"][1],
            "seconds": about["progress"]["seconds"], "steps": about["progress"]["step"], "command": config.command(run),
            "labels": labels,
        }
    if finetune:
        tuned = probes.fine_tune(encoder, few, test, run.image_size, device, finetune, crop_scale=run.crop_scale, flip=run.flip, seed=seed)
        found["fine_tuned"] = tuned["accuracy"]
    checkpoint.write(path, lambda temporary: temporary.write_text(json.dumps(found, indent=2)))
    return found


def settings(args, flags, *more):
    """The Config that train.py would make of the preset, a row's flags, those given to the experiment, and `more`, which come last."""
    return config.from_arguments(config.parser("").parse_args(["--preset", args.preset, *flags, *args.flags, *more]))


class Table:
    """The rows of an experiment: which runs are planned, and what those scored, now or when results/NAME.json was written before."""

    def __init__(self, args):
        self.args, self.planned, self.name = args, [], args.what if args.preset == "shapes" else f"{args.what}_{args.preset}"
        path = Path(f"results/{self.name}.json")
        before = json.loads(path.read_text()) if path.exists() else {"rows": {}}
        self.known = {(name, run["command"]): run for name, row in before["rows"].items() for run in row["runs"]
                      if labels_of(run) == args.labels}
        self.ratios = before.get("steps_in_the_time_of_one")

    def plan(self, row, name, flags, seed, more=(), finetune=0, random=False, **about):
        """Add a run to a row, beside which `about` is written; it may have been scored already."""
        run = settings(self.args, flags, *more, "--seed", str(seed), "--out", str(FOLDER / f"{name}-{seed}"))
        self.planned.append((row, run, finetune, random, about))
        path, key = score_file(run.out, random), (row, config.command(run))
        found = json.loads(path.read_text()) if path.exists() and not self.scored(row, run, finetune) else {}
        if found.get("command") == key[1] and labels_of(found) == self.args.labels:
            self.known[key] = found

    def rows(self):
        """name -> {"runs": what each seed scored}, of the planned runs as far as it is known."""
        rows = {}
        for row, run, _, _, about in self.planned:
            if found := self.known.get((row, config.command(run))):
                rows.setdefault(row, {**about, "runs": []})["runs"].append({"seed": run.seed, **found})
        return rows

    def fill(self, jobs=1):
        """Train and score what is not known yet, `jobs` trainings at a time, and write the table after each."""
        missing = [plan for plan in self.planned if not self.scored(*plan[:3])]
        if jobs > 1:
            train_ahead([run for _, run, *_ in missing], jobs)
        self.write()
        for row, run, finetune, random, _ in tqdm(missing, unit="run"):
            self.known[row, config.command(run)] = found = score(trained(run), run.seed, finetune, random, self.args.labels)
            tqdm.write(f"{row:36}{100 * found['linear']:8.1f}")
            self.write()

    def scored(self, row, run, finetune):
        """Whether all that is asked of a run is known."""
        found = self.known.get((row, config.command(run)), {})
        return "linear" in found and ("fine_tuned" in found or not finetune)

    def write(self):
        """Write results/NAME.json and results/NAME.md as far as they are known."""
        args, rows = self.args, self.rows()
        words = ["python -m extras.experiments", args.what, "--preset", args.preset, "--seeds", *map(str, args.seeds), *args.flags]
        words += ["--labels", str(args.labels)] if args.labels != 10000 else []
        words += ["--finetune", str(args.finetune)] if args.what == "comparison" and args.finetune != 10 else []
        about = {"command": " ".join(words), "seeds": args.seeds, "processor": platform.processor() or platform.machine(),
                 "torch": torch.__version__, "threads": torch.get_num_threads(), "date": datetime.date.today().isoformat(),
                 "note": args.note}
        about |= {"steps_in_the_time_of_one": self.ratios} if self.ratios else {}
        labels = f"{args.labels:,}" if args.labels else "all"
        text = f"`{about['command']}`, {about['date']}; percent, frozen target encoder, {labels} labelled images; ± over seeds. {args.note}"
        content = json.dumps({**about, "rows": rows}, indent=2)
        checkpoint.write(Path(f"results/{self.name}.json"), lambda path: path.write_text(content))
        Path(f"results/{self.name}.md").write_text(markdown(rows, f"{args.what} on {args.preset}", text), encoding="utf-8")


# ---- the experiments


def each(table, rows, jobs=1):
    """Train and score rows, name -> (what train.py is given, what is written beside the row): all with a seed before any with the next."""
    for seed in table.args.seeds:
        for name, (flags, about) in rows.items():
            slug = f"{table.name}-" + "".join(letter if letter.isalnum() else "-" for letter in name)
            table.plan(name, slug, flags, seed, **about)
    table.fill(jobs)


def ablations(table):
    """The paper's ablations at our scale."""
    each(table, {name: (flags, {"paper": paper}) for name, (flags, paper) in ABLATIONS.items()}, table.args.jobs)
    figure = figures.ablations_figure(table.rows(), f"{table.args.preset}: what each part of I-JEPA is worth")
    figure.savefig(f"images/{table.name}.png", dpi=130)


def recipe(table):
    """What each lever of the recipe is worth."""
    each(table, {name: (flags, {}) for name, flags in RECIPE.items()}, table.args.jobs)


def budgets(table):
    """What so many minutes of training reach, one run at a time: side by side they would share the machine."""
    each(table, {f"{minutes:g} min": (["--max-minutes", str(minutes), "--epochs", "100000"], {}) for minutes in BUDGETS})


def seconds_of(run, dataset, device, steps=10):
    """A function that makes some whole training steps of a Config (images to EMA) and returns their seconds."""
    about, generator = train.describe(dataset), torch.Generator(device).manual_seed(0)
    model = methods.build(run, about["channels"], about["axes"], about["classes"]).to(device).train()
    optimizer, stream = train.build_optimizer(run, model), train.image_stream(run, dataset, device, generator, 0)

    def seconds():
        start = time.perf_counter()
        for _ in range(steps):
            loss = train.train_step(run, model, optimizer, [next(stream)], 1, 1000, generator)["loss"]
        loss.item()  # waits for the device
        return time.perf_counter() - start

    return seconds


def steps_in_the_time_of_one(args, flags, rounds=9):
    """How many training steps with `flags` take as long as one of I-JEPA's: the median of timings made in turn, so that whatever else
    the machine does meets both alike."""
    device, runs = train.pick_device("auto"), [settings(args, METHODS["I-JEPA"]), settings(args, flags)]
    dataset = data.load(runs[0].dataset, runs[0].split, runs[0].data_dir, runs[0].image_size)
    clocks = [seconds_of(run, dataset, device) for run in runs]
    seconds = [[clock() for clock in clocks] for _ in range(rounds)][1:]  # the first round warms up
    return statistics.median(first / second for first, second in seconds)


def comparison(table):
    """I-JEPA, MAE and supervision at equal epochs, MAE and supervision at I-JEPA's seconds, and no training."""
    args = table.args  # timed once: all seeds are to have the same epochs
    table.ratios = table.ratios or {name: steps_in_the_time_of_one(args, flags) for name, flags in METHODS.items()}
    for seed in args.seeds:
        for name, flags in METHODS.items():
            slug = f"{args.preset}-{name.lower()}"
            table.plan(name, slug, flags, seed, finetune=args.finetune)
            epochs = round(settings(args, flags).epochs * table.ratios[name])
            more = ["--epochs", str(epochs)]
            if name == "I-JEPA":
                table.plan("random init", slug, flags, seed, finetune=args.finetune, random=True)
            elif epochs != settings(args, flags).epochs:
                table.plan(f"{name}, equal seconds", f"{slug}-seconds", flags, seed, more, args.finetune, epochs=epochs)
    table.fill(args.jobs)


def markdown(rows, title, provenance):
    """The rows as a table: mean ± standard deviation over seeds, percent; with the paper's numbers also what was gained over the first
    row by the linear probe, seed by seed, for runs of a seed start from like weights and see the same images."""
    first = next(iter(rows.values()), {"runs": [{}]})
    measures = [name for name in ("linear", "knn", "1%", "10%", "fine_tuned") if name in first["runs"][0]]
    heads = {"linear": "linear probe", "knn": "kNN", "1%": "1% of the labels", "10%": "10%", "fine_tuned": "fine-tuned"}
    columns = [heads[name] for name in measures] + ["seeds"] + ["over the first row", "paper"] * ("paper" in first)
    lines = [f"# {title}", "", provenance, "", f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name, row in rows.items():
        cells = [mean_and_spread([run[measure] for run in row["runs"] if measure in run]) for measure in measures]
        cells += [str(len(row["runs"]))] + ([mean_and_spread(gains(row, first), "+"), row["paper"]] if "paper" in first else [])
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def gains(row, first):
    """What each run of a row scored over the first row's run of the same seed, with the linear probe; nothing for the first row itself."""
    base = {run["seed"]: run["linear"] for run in first["runs"]}
    return [run["linear"] - base[run["seed"]] for run in row["runs"] if run["seed"] in base] if row is not first else []


def mean_and_spread(values, sign=""):
    """Fractions as percent, "mean ± standard deviation": "" for none, no deviation for one; with sign "+" always signed."""
    spread = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):{sign}.1f}{spread}" if values else ""


def main(argv=None):
    """Train what is missing, score it, write the tables; raises UsageError for what the user can put right."""
    parser = config.Parser(prog="experiments.py", description="Comparisons that need many runs; stopped, they go on where they were.")
    parser.add_argument("what", choices=("comparison", "ablations", "recipe", "budgets"), help="which comparison")
    parser.add_argument("--preset", default="shapes", help="preset of every run (default shapes)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="seeds (default 0)")
    parser.add_argument("--finetune", type=int, default=10, help="epochs of fine-tuning in the comparison; 0 is none (default 10)")
    parser.add_argument("--labels", type=int, default=10000, help="labelled training images of the probes; 0 is all (default 10000)")
    parser.add_argument("--jobs", type=int, default=1, help="runs that are trained at the same time, but for budgets (default 1)")
    parser.add_argument("--note", default="", help="what readers of the table are to know of its data, as 'JPEG copy.'")
    args, args.flags = parser.parse_known_args(argv)  # the rest goes to train.py
    table = Table(args)
    {"comparison": comparison, "ablations": ablations, "recipe": recipe, "budgets": budgets}[args.what](table)
    print(Path(f"results/{table.name}.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    config.run(main)
