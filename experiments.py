"""Comparisons that need many runs: I-JEPA beside MAE and supervision, and the paper's ablations at our scale.

    python experiments.py comparison          I-JEPA, MAE, supervised, random: at equal epochs and at equal seconds
    python experiments.py ablations           masks, targets, predictor, as in the paper's tables 6 to 14
    python experiments.py ablations --epochs 5 --seeds 0 1

Each run lies in runs/experiments/NAME-SEED and is trained only once: stopped, the command goes on where it was. What a run scored is in
its score.json; at the end results/NAME.json, results/NAME.md and, for the ablations, images/ablations.png are written.
"""

import datetime
import json
import platform
import statistics
from pathlib import Path

import torch

import checkpoint
import config
import data
import diagnostics
import evaluate
import figures
import methods
import probes
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
METHODS = {"I-JEPA": ["--method", "ijepa"], "MAE": ["--method", "mae"], "supervised": ["--method", "supervised"]}


# ---- one run


def trained(name, flags):
    """The folder of the run of this name, trained if it is not yet, gone on with if it was stopped."""
    folder = FOLDER / name
    if not (folder / "checkpoint.pt").exists():
        train.main([*flags, "--out", str(folder)])
        return folder
    progress = checkpoint.load_checkpoint(folder, "cpu")["progress"]
    if progress["step"] < progress["total"]:
        train.main(["--out", str(folder), "--resume"])
    return folder


def score(folder, seed, finetune=0, random=False):
    """What the features of a run are worth, a dict of fractions: linear, knn, low-shot at 1% and 10% of the labels, fine_tuned if asked.

    Kept in the run's score.json (random_score.json for its untrained encoder); the next time only what is not yet there is measured.
    """
    path = folder / ("random_score.json" if random else "score.json")
    found = json.loads(path.read_text()) if path.exists() else {}
    if "linear" in found and ("fine_tuned" in found or not finetune):
        return found
    device = train.pick_device("auto")
    model, run, about = checkpoint.load_run(folder, device)
    encoder = evaluate.random_encoder(run, about, device, seed) if random else model.target_encoder
    full, test = (data.load(run.dataset, split, run.data_dir, run.image_size) for split in ("train", "test"))
    few = evaluate.subsample(full, 10000, seed)
    if "linear" not in found:
        x, test_x = (evaluate.features(encoder, part, run.image_size, device) for part in (few, test))
        per_class = full.labels.bincount().min().item()
        shots = probes.low_shot(x, few.labels, test_x, test.labels, (per_class // 100, per_class // 10))
        found = {
            "linear": probes.linear_probe(x, few.labels, test_x, test.labels, seed)["accuracy"],
            "knn": diagnostics.knn(x, few.labels, test_x, test.labels),
            "1%": shots["mean"][0], "10%": shots["mean"][1],
            "seconds": about["progress"]["seconds"], "steps": about["progress"]["step"], "command": config.command(run),
        }
    if finetune:
        tuned = probes.fine_tune(encoder, few, test, run.image_size, device, finetune, crop_scale=run.crop_scale, flip=run.flip, seed=seed)
        found["fine_tuned"] = tuned["accuracy"]
    checkpoint.write(path, lambda temporary: temporary.write_text(json.dumps(found, indent=2)))
    return found


# ---- the two experiments


def ablations(args):
    """Rows of the ablations: name -> {"paper", "runs": what each seed scored}."""
    rows = {}
    for name, (flags, paper) in ABLATIONS.items():
        runs = []
        for seed in args.seeds:
            slug = "".join(letter if letter.isalnum() else "-" for letter in name)
            folder = trained(f"ablation-{slug}-{seed}", ["--preset", args.preset, *flags, *args.flags, "--seed", str(seed)])
            runs.append(score(folder, seed))
        rows[name] = {"paper": paper, "runs": runs}
        print(f"{name:36}" + "".join(f"{100 * run['linear']:8.1f}" for run in runs), flush=True)
    return rows


def settings(args, *flags):
    """The Config that train.py would make of the preset and these flags."""
    return config.from_arguments(config.parser("").parse_args(["--preset", args.preset, *flags, *args.flags]))


def steps_in_the_time_of_one(args, flags, rounds=7):
    """How many training steps with `flags` take as long as one of I-JEPA's: the median of timings made in turn, so that whatever else
    the machine does meets both alike."""
    device, runs = train.pick_device("auto"), [settings(args, *METHODS["I-JEPA"]), settings(args, *flags)]
    dataset = data.load(runs[0].dataset, runs[0].split, runs[0].data_dir, runs[0].image_size)
    about = train.describe(dataset)
    models = [methods.build(run, about["channels"], about["axes"], about["classes"]).to(device).train() for run in runs]
    seconds = [[train.time_step(run, model, dataset, device) for run, model in zip(runs, models)] for _ in range(rounds)]
    return statistics.median(first / second for first, second in seconds)


def comparison(args):
    """Rows of the comparison: I-JEPA, MAE and supervision at equal epochs, MAE and supervision at I-JEPA's seconds, and no training."""
    rows = {}

    def add(row, name, flags, seed, **options):
        folder = trained(f"{args.preset}-{name.lower()}-{seed}", ["--preset", args.preset, *flags, *args.flags, "--seed", str(seed)])
        rows.setdefault(row, {"runs": []})["runs"].append(score(folder, seed, args.finetune, **options))

    epochs = {name: round(settings(args).epochs * steps_in_the_time_of_one(args, flags)) for name, flags in METHODS.items()}
    for seed in args.seeds:
        for name, flags in METHODS.items():
            add(name, name, flags, seed)
            if name == "I-JEPA":
                add("random init", name, flags, seed, random=True)
            elif epochs[name] != epochs["I-JEPA"]:
                add(f"{name}, equal seconds", f"{name}-seconds", [*flags, "--epochs", str(epochs[name])], seed)
    return rows


def markdown(rows, title, provenance):
    """The rows as a table: mean ± standard deviation over seeds, percent."""
    measures = [name for name in ("linear", "knn", "1%", "10%", "fine_tuned") if name in next(iter(rows.values()))["runs"][0]]
    heads = {"linear": "linear probe", "knn": "kNN", "1%": "1% of the labels", "10%": "10%", "fine_tuned": "fine-tuned"}
    paper = "paper" in next(iter(rows.values()))
    lines = [f"# {title}", "", provenance, "", "| | " + " | ".join(heads[name] for name in measures) + (" | paper |" if paper else " |"),
             "|---" * (len(measures) + 1 + paper) + "|"]
    for name, row in rows.items():
        cells = []
        for measure in measures:
            values = [100 * run[measure] for run in row["runs"]]
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.1f}{spread}")
        lines.append(f"| {name} | " + " | ".join(cells) + (f" | {row['paper']} |" if paper else " |"))
    return "\n".join(lines) + "\n"


def main(argv=None):
    """Train what is missing, score it, write the tables; raises UsageError for what the user can put right."""
    parser = config.Parser(prog="experiments.py", description="Comparisons that need many runs; stopped, they go on where they were.")
    parser.add_argument("what", choices=("comparison", "ablations"), help="which comparison")
    parser.add_argument("--preset", default="shapes", help="preset of every run (default shapes)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="seeds (default 0)")
    parser.add_argument("--finetune", type=int, default=10, help="epochs of fine-tuning in the comparison; 0 is none (default 10)")
    args, args.flags = parser.parse_known_args(argv)  # the rest goes to train.py
    rows = {"comparison": comparison, "ablations": ablations}[args.what](args)
    name = args.what if args.preset == "shapes" else f"{args.what}_{args.preset}"
    seeds = " ".join(map(str, args.seeds))
    command = f"python experiments.py {args.what} --preset {args.preset} --seeds {seeds} {' '.join(args.flags)}".strip()
    about = {"command": command, "seeds": args.seeds, "processor": platform.processor() or platform.machine(), "torch": torch.__version__,
             "threads": torch.get_num_threads(), "date": datetime.date.today().isoformat()}
    text = f"`{command}`, {len(args.seeds)} seed(s), {about['date']}; percent, frozen target encoder, 10,000 labelled images."
    checkpoint.write(Path(f"results/{name}.json"), lambda path: path.write_text(json.dumps({**about, "rows": rows}, indent=2)))
    Path(f"results/{name}.md").write_text(markdown(rows, f"{args.what} on {args.preset}", text), encoding="utf-8")
    if args.what == "ablations":
        figures.ablations_figure(rows, f"{args.preset}: what each part of I-JEPA is worth").savefig(f"images/{name}.png", dpi=130)
    print(Path(f"results/{name}.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    config.run(main)
