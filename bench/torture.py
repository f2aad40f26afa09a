"""Kill runs with SIGKILL at random moments, also while a checkpoint is being written: what is lost?

    python bench/torture.py        writes results/reliability.json and reliability.md; minutes

A run that was killed and resumed again and again must end with the same bits as one that was never
killed. Then the tests of faults are run.
"""

import argparse
import csv
import datetime
import json
import os
import pathlib
import platform
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np
import torch
from tqdm import tqdm

ROOT = pathlib.Path(__file__).parents[1]
STEPS = 400
FAULTS = {  # what is tried -> the tests that try it
    "checkpoints: full disk, lying disk, truncated and foreign files": ["test_checkpoint.py"],
    "NaN, resume to the bit, cut logs, memory": ["test_train.py", "test_logs.py"],
    "downloads: a server that drops, truncates, corrupts, stalls, refuses": ["test_download.py"],
    "bad images, folders and archives": ["test_bad_data.py"],
    "wrong settings": ["test_settings.py"],
    "several processes: killed and stopped": ["test_parallel.py"],
}


def command(data, out, *more):
    """train.py on noise: 400 steps of a small I-JEPA in seconds, with about ten checkpoints."""
    words = [sys.executable, ROOT / "train.py", "--dataset", data, "--encoder", "64x2x1",
             "--predictor", "32x1x1", "--batch-size", 16, "--epochs", 1000, "--max-steps", STEPS,
             "--crop-scale", 0.5, 1, "--flip", "--held-out", 32, "--measurements", 4,
             "--device", "cpu", "--checkpoint-minutes", 0.004, "--out", out, *more]
    return list(map(str, words))


def reached(folder):
    """The last step in metrics.csv, which has every second one."""
    try:
        return int((folder / "metrics.csv").read_text().rsplit("\n", 2)[-2].split(",")[0])
    except (OSError, IndexError, ValueError):
        return 0


def saved(folder):
    """The step of checkpoint.pt, 0 if there is none yet. One that cannot be read is an error."""
    path = folder / "checkpoint.pt"
    return torch.load(path, weights_only=True)["progress"]["step"] if path.exists() else 0


def kill(process, folder, moments):
    """Kill a run at a random moment, or at the next checkpoint that it writes.

    Returns "writing" or "running", or None if it had ended.
    """
    wanted, seen = moments.random() < 0.5, reached(folder)
    while process.poll() is None and reached(folder) <= seen:  # until it has begun to train
        time.sleep(0.005)
    delay, started = moments.uniform(0, 2.0), time.monotonic()
    while process.poll() is None and time.monotonic() - started < (20 if wanted else delay):
        if wanted and (folder / "checkpoint.pt.tmp").exists():
            time.sleep(moments.uniform(0, 0.01))  # anywhere between its first byte and its new name
            break
        time.sleep(0.0005)
    writing = (folder / "checkpoint.pt.tmp").exists()
    if process.poll() is not None:
        return None
    process.send_signal(signal.SIGKILL)
    process.wait()
    return "writing" if writing or (folder / "checkpoint.pt.tmp").exists() else "running"


def weights(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)["model"]


def undisturbed(data, folder):
    """Make the reference run, and return the most steps between two of its checkpoints."""
    process = subprocess.Popen(command(data, folder), stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    steps = [0]
    while process.poll() is None:
        steps += [step] if (step := saved(folder)) != steps[-1] else []
        time.sleep(0.05)
    return max(after - before for before, after in zip(steps, [*steps[1:], STEPS]))


def tortured(data, folder, reference, kills, moments):
    """One run, killed up to seven times and then left to end.

    Returns what each kill lost, whether the end is the reference's to the bit, and the problem.
    """
    found = []
    for attempt in range(8):
        resume = ["--resume"] if (folder / "checkpoint.pt").exists() else []
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
        process = subprocess.Popen(command(data, folder, *resume), cwd=folder.parent, **quiet)
        if attempt == 7 or len(found) == kills:
            if process.wait():
                return found, False, process.stderr.read().decode()[-300:]
            break
        if (when := kill(process, folder, moments)) is None:
            break
        found.append({"when": when, "reached": reached(folder), "kept": saved(folder)})
    whole, ours = weights(reference), weights(folder)
    rows = list(csv.DictReader(open(folder / "metrics.csv")))
    steps, losses = [row["step"] for row in rows], [row["loss"] for row in rows]
    known = list(csv.DictReader(open(reference / "metrics.csv")))
    same = all(torch.equal(whole[name], ours[name]) for name in whole)
    same &= steps == [row["step"] for row in known] and losses == [row["loss"] for row in known]
    return found, same, "" if same else "another end than the reference"


def faults():
    """How many tests of faults pass, by what they try."""
    found = {}
    for what, files in FAULTS.items():
        pytest = [sys.executable, "-m", "pytest", "-v", "--tb=no",
                  *(f"tests/core/{name}" for name in files)]
        done = subprocess.run(pytest, cwd=ROOT, capture_output=True, text=True)
        ends = re.findall(r"::test_(\w+)(?:\[.*\])? (PASSED|FAILED|ERROR)", done.stdout)
        passed = sum(end == "PASSED" for _, end in ends)
        claims = sorted({name.replace("_", " ") for name, _ in ends})  # a test's name is its claim
        found[what] = {"tests": len(ends), "passed": passed, "files": files, "claims": claims}
        print(f"{what}: {found[what]['passed']} of {found[what]['tests']}", flush=True)
    return found


def page(results):
    """results/reliability.md."""
    kills, lost = results["kills"], results["steps_lost"]
    lines = [
        "# What is lost", "", f"`{results['command']}`, {results['date']}, {results['processor']}, "
        f"torch {results['torch']}.", "",
        "| | |", "|---|---|",
        f"| SIGKILLs at random moments | {kills['all']}, in {results['runs']} runs of {STEPS} |",
        f"| of these while a checkpoint was being written | {kills['writing']} |",
        f"| runs that could not resume, or checkpoints not readable | {results['broken']} |",
        "| runs whose weights or metrics differ in any bit from those of a run never killed | "
        f"{results['different']} |",
        "| steps between two checkpoints of the run never killed | "
        f"{results['between_checkpoints']} at most |",
        f"| steps repeated after a kill | {lost['mean']:.0f} on average, "
        f"{lost['most']} at most |", "",
        "| faults injected by the tests | tests | passed |", "|---|---|---|",
        *(f"| {what} (`{', '.join(row['files'])}`) | {row['tests']} | {row['passed']} |"
          for what, row in results["faults"].items()), "",
        "What these tests claim, by their names:", "",
    ]
    for what, row in results["faults"].items():
        lines += [f"**{what}**", "", *(f"- {claim}" for claim in row["claims"]), ""]
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    moments, killed, broken, different, runs = random.Random(args.seed), [], 0, 0, 0
    with tempfile.TemporaryDirectory() as scratch:
        scratch = pathlib.Path(scratch)
        data = scratch / "noise.npz"
        noise = np.random.default_rng(0).integers(0, 256, (512, 24, 24, 3), dtype=np.uint8)
        np.savez(data, train_images=noise, train_labels=np.arange(512) % 10)
        between = undisturbed(data, scratch / "reference")
        with tqdm(total=args.kills, unit="kill") as bar:
            while len(killed) < args.kills:
                found, same, problem = tortured(data, scratch / f"run{runs}",
                                                scratch / "reference", args.kills - len(killed),
                                                moments)
                killed += found
                runs += 1
                broken += not same and "another end" not in problem
                different += not same and "another end" in problem
                bar.update(len(found))
                if problem:
                    print(problem, flush=True)
    lost = [one["reached"] - one["kept"] for one in killed]
    results = {
        "command": f"python bench/torture.py --kills {args.kills} --seed {args.seed}",
        "date": datetime.date.today().isoformat(),
        "processor": platform.processor() or platform.machine(), "cpus": os.cpu_count(),
        "torch": torch.__version__, "runs": runs,
        "kills": {"all": len(killed), "writing": sum(k["when"] == "writing" for k in killed)},
        "broken": broken, "different": different, "between_checkpoints": between,
        "steps_lost": {"mean": statistics.mean(lost), "most": max(lost)}, "each": killed,
        "faults": faults(),
    }
    return results


if __name__ == "__main__":
    results = main()
    (ROOT / "results/reliability.json").write_text(json.dumps(results, indent=1))
    (ROOT / "results/reliability.md").write_text(page(results))
