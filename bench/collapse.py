"""What each safeguard against collapse is worth on the synthetic shapes, as JSON: `make collapse`.

Trains the default preset for 1,500 steps as it is and with one safeguard or all of them taken away,
and keeps what each run measured on its held-out images and what it warned of. CPU, minutes.
"""

import csv
import datetime
import json
import platform
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT, STEPS = Path(__file__).parents[1], 1500
ABLATION = "-m extras.ablations"
VARIANTS = {
    "as it is": "train.py",
    "no stop-gradient": f"{ABLATION} no-stop-gradient",
    "momentum 0": f"{ABLATION} momentum-0",
    "targets not layer-normed": f"{ABLATION} no-target-norm",
    "momentum 0, targets not layer-normed":
        f"{ABLATION} no-target-norm --momentum 0 --momentum-final 0",
    "none of the three": f"{ABLATION} no-safeguards",
}
COLUMNS = ("step", "loss", "target_std", "rank", "cosine", "mean_cosine", "knn")


def measure(program):
    """Train a program for STEPS steps; its command, its warnings, and what it measured."""
    command = f"{program} --max-steps {STEPS} --measurements 10"
    with tempfile.TemporaryDirectory() as folder:
        run = subprocess.run([sys.executable, *shlex.split(command), "--out", folder], cwd=ROOT,
                             stderr=subprocess.PIPE, text=True, check=True, stdout=sys.stderr)
        with open(Path(folder) / "metrics.csv") as file:
            rows = [row for row in csv.DictReader(file) if row["target_std"]]
    return {"command": f"python {command}",
            "warnings": sorted(set(re.findall(r"warning at (.*)", run.stderr))),
            "rows": [{name: float(row[name]) for name in COLUMNS if row[name]} for row in rows]}


if __name__ == "__main__":
    print(json.dumps({
        "what": f"{STEPS} steps of the preset shapes, seed 0", "command": "make collapse",
        "variants": {name: measure(program) for name, program in VARIANTS.items()}, "seeds": [0],
        "processor": platform.processor() or platform.machine(), "torch": torch.__version__,
        "data": "synthetic shapes", "date": datetime.date.today().isoformat()}, indent=2))
