"""Time of the linear probe, as JSON: `make probe-speed`. Needs CIFAR-10 in data/.

Features are a random layer's, averaged over the patches: as correlated as an encoder's, and made in
seconds. Raw pixels are CIFAR-10's at 24 pixels, 1728 numbers an image.
"""

import json
import os
import pathlib
import sys
import time

import torch

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import data  # noqa: E402
import evaluate  # noqa: E402
import models  # noqa: E402
from support.results import provenance  # noqa: E402

CASES = ((10_000, 64), (10_000, "pixels"), (50_000, 192), (50_000, 768))  # images, features


def features(dataset, D):
    """Random features [n, D] of a data set, or its pixels [n, 1728]."""
    if D == "pixels":
        return evaluate.pixels(dataset, 24)
    weight = torch.randn(192, D, generator=torch.Generator().manual_seed(0)) / 7  # [C*p*p, D]
    return torch.cat([torch.nn.functional.gelu(models.patchify(images, 8) @ weight).mean(dim=1)
                      for images in data.batches(dataset, 500, 32)])


def main():
    splits = {split: data.load("cifar10", split, str(ROOT / "data")) for split in ("train", "test")}
    rows = []
    for n, D in CASES:
        train_set, test_set = evaluate.subsample(splits["train"], n, 0), splits["test"]
        x, test_x = features(train_set, D), features(test_set, D)
        start, cpu = time.perf_counter(), time.process_time()
        found = evaluate.linear_probe(x, train_set.labels, test_x, test_set.labels)
        rows.append({"images": n, "features": x.shape[1],
                     "seconds": round(time.perf_counter() - start, 1),
                     "cpu_seconds": round(time.process_time() - cpu, 1),
                     **{key: found[key] for key in ("accuracy", "strength", "converged")}})
        print(rows[-1], file=sys.stderr)
    print(json.dumps({"what": "evaluate.linear_probe: the path of strengths and the final fit",
                      "data": "CIFAR-10, JPEG copy", "command": "make probe-speed", "rows": rows,
                      "blas_threads": os.environ.get("OMP_NUM_THREADS", "all"),
                      **provenance(torch.device("cpu"))}, indent=2))


if __name__ == "__main__":
    main()
