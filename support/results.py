"""Results: where their numbers come from, JSON that a person can read, and tables."""

import datetime
import json
import os
import platform
import re
import statistics

import numpy
import sklearn
import torch

from config import UsageError
from support.checkpoint import one_line, write


def provenance(device):
    """What a results file says of its numbers' origin besides commands and seed: a dict."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    versions = {"python": platform.python_version(), "torch": torch.__version__,
                "numpy": numpy.__version__, "scikit-learn": sklearn.__version__}
    return {"hardware": {"processor": platform.processor() or platform.machine(),
                         "cpus": os.cpu_count(), "threads": torch.get_num_threads(), "gpu": gpu},
            "versions": versions,
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")}


def write_json(path, results):
    """Write a dict as indented JSON, each list of plain values on one line."""
    text = json.dumps(results, indent=2)
    text = re.sub(r"\[[^\[\]{}]*\]", lambda values: " ".join(values[0].split()), text)
    write(path, lambda temporary: temporary.write_text(text))


def read_json(path):
    """The dict in a results file. Raises UsageError if it does not exist or is damaged."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise UsageError(f"{path} does not exist") from None
    except ValueError as error:
        raise UsageError(f"{path} is damaged ({one_line(error)}); move it away") from None


ROWS = {"target": "target encoder", "context": "context encoder", "random": "untrained encoder",
        "pixels": "raw pixels"}


def table(results):
    """What evaluation.json holds, as text."""
    found, scores = results["measures"], results["features"]
    if scores:
        lines = ["{dataset}: {train:,} training and {test:,} test images, chance {chance:.1%}; "
                 "test accuracy in percent".format(**results, **results["split_sizes"]), "",
                 f"{'':18}{'linear probe':>14}{'kNN':>8}"]
        lines += [f"{ROWS[name]:18}{100 * row['linear']:14.1f}{100 * row['knn']:8.1f}"
                  for name, row in scores.items()] + [""]
        ahead = [ROWS[name] for name in ("random", "pixels")
                 if scores[name]["linear"] >= scores["target"]["linear"]]
        if ahead:
            lines += [f"The target encoder is no better than the {' and the '.join(ahead)} by the "
                      "linear probe: train for longer.", ""]
        elif scores["pixels"]["knn"] > scores["target"]["knn"]:
            lines += ["kNN on raw pixels beats kNN on the features here. A linear probe can weigh "
                      "the features, kNN cannot.", ""]
    else:
        lines = [f"{results['dataset']} has no labels: no probe and no kNN. Name labeled data "
                 "with --dataset."]
    lines.append(f"features of images not trained on: standard deviation "
                 f"{found['target_std']:.2f}, effective rank {found['rank']:.1f} of "
                 f"{results['width']}")
    if "cosine" in found:
        lines.append(f"cosine of predictions and targets: {found['cosine']:.2f}; of the mean "
                     f"target of each place and the targets: {found['mean_cosine']:.2f}")
    return "\n".join(lines + [f"warning: {warning}" for warning in results["warnings"]])


def summary(runs):
    """Mean and standard deviation of the rows that all of several runs' results have, as text."""
    lines = [f"{len(runs)} runs, mean ± standard deviation, percent", "",
             f"{'':18}{'linear probe':>14}{'kNN':>14}"]
    for name in runs[0]["features"]:
        if not all(name in run["features"] for run in runs):
            continue
        line = f"{ROWS[name]:18}"
        for measure in ("linear", "knn"):
            values = [100 * run["features"][name][measure] for run in runs]
            line += f"{f'{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}':>14}"
        lines.append(line)
    return "\n".join(lines)
