"""Two processes of one thread against two threads of one process, as JSON on stdout.

Images a second of whole runs of train.py on two cores, which must be idle, in turn, several rounds;
from the last quarter of the run's steps.
"""

import csv
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile

import torch

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from support.results import provenance  # noqa: E402

ROUNDS, STEPS = 3, 80
SETTINGS = ("--preset cifar10 --predictor 96x2x2 --context-size 16 --merge-targets "
            f"--batch-size 128 --max-steps {STEPS} --measurements 0").split()
PYTHON, TORCHRUN = [sys.executable], [sys.executable, "-m", "torch.distributed.run"]
WAYS = {"one thread": (1, PYTHON), "two threads": (2, PYTHON),
        "two processes of one thread": (1, [*TORCHRUN, "--nproc-per-node", "2"])}


def rate(threads, launcher):
    """Images a second of one run."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([*launcher, "train.py", *SETTINGS, "--out", f"{folder}/run"], cwd=ROOT,
                       env={**os.environ, "OMP_NUM_THREADS": str(threads)}, check=True,
                       capture_output=True)
        rows = list(csv.DictReader(open(f"{folder}/run/metrics.csv")))
    late = [float(row["images_per_second"]) for row in rows if int(row["step"]) > 0.75 * STEPS]
    return statistics.median(late)


if __name__ == "__main__":
    rounds = [{name: rate(*how) for name, how in WAYS.items()} for _ in range(ROUNDS)]
    print(json.dumps({
        "what": "images a second of train.py on two cores, one mask an image; medians of rounds in "
                "turn",
        "command": "python bench/processes.py", "settings": " ".join(SETTINGS),
        "data": "CIFAR-10", "seeds": [0], **provenance(torch.device("cpu")),
        "ways": {name: {
            "images_per_second": round(statistics.median(row[name] for row in rounds), 1),
            "times": round(statistics.median(row[name] / row["one thread"] for row in rounds), 2)}
            for name in WAYS}}, indent=1))
