"""What each safeguard against collapse is worth on the embedded shapes, as JSON: `make collapse` (CPU, minutes).

Trains the default preset for 300 steps as it is, and with one safeguard or all taken away, and keeps what the run measured on its held-out
images before the first step and at the end, and what it warned of.
"""

import csv
import datetime
import json
import pathlib
import platform
import subprocess
import sys
import tempfile

import torch

ROOT = pathlib.Path(__file__).parents[1]
MOMENTUM_0, NO_STOP, NO_NORM = ["--momentum", "0", "--momentum-final", "0"], ["--no-stop-gradient"], ["--no-target-norm"]
VARIANTS = {"as it is": [], "no stop-gradient": NO_STOP, "momentum 0": MOMENTUM_0, "targets not layer-normed": NO_NORM,
            "momentum 0, targets not layer-normed": MOMENTUM_0 + NO_NORM, "none of the three": MOMENTUM_0 + NO_STOP + NO_NORM}
STEPS = 300

found = {}
for name, flags in VARIANTS.items():
    with tempfile.TemporaryDirectory() as folder:
        command = ["train.py", "--max-steps", str(STEPS), "--measurements", "10", *flags]
        run = subprocess.run([sys.executable, *command, "--out", folder], cwd=ROOT, capture_output=True, text=True, check=True)
        rows = [row for row in csv.DictReader(open(pathlib.Path(folder) / "metrics.csv")) if row["target_std"]]
    columns = ("step", "held_out_loss", "mean_loss", "target_std", "rank", "pairwise_cosine", "lidar", "knn")
    warnings = sorted({line.split("warning at ")[1] for line in run.stderr.replace("\r", "\n").splitlines() if "warning at " in line})
    found[name] = {"command": "python " + " ".join(command), "warnings": warnings,
                   "rows": [{column: float(row[column]) for column in columns} for row in rows]}
print(json.dumps({"what": f"{STEPS} steps of the preset shapes, seed 0", "variants": found, "command": "make collapse", "seeds": [0],
                  "processor": platform.processor() or platform.machine(), "torch": torch.__version__, "data": "embedded shapes",
                  "date": datetime.date.today().isoformat()}, indent=2))
