"""Time of the linear probe on 50,000 features of width 768, as JSON: `make probe-speed`. Needs CIFAR-10 in data/.

The features are a random layer's averaged over the patches: as correlated as an encoder's, and made in seconds.
"""

import datetime
import json
import pathlib
import platform
import sys
import time

import torch

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import data  # noqa: E402
import models  # noqa: E402
from extras import probes  # noqa: E402


def features(split):
    """Random features [n, 768] and labels [n] of a split of CIFAR-10."""
    dataset = data.load("cifar10", split, str(ROOT / "data"), 32)
    weight = torch.randn(192, 768, generator=torch.Generator().manual_seed(0)) / 7  # [C*p*p, D]
    pooled = [torch.nn.functional.gelu(models.patchify(images, 8) @ weight).mean(1) for images in data.batches(dataset, 500, 32)]
    return torch.cat(pooled), dataset.labels


train, test = features("train"), features("test")
start = time.perf_counter()
found = probes.linear_probe(*train, *test)
seconds = time.perf_counter() - start
print(json.dumps({
    "what": "linear probe, 50,000 x 768 features, path of strengths and final fit", "seconds": round(seconds, 1),
    "accuracy": found["accuracy"], "strength": found["strength"], "data": "CIFAR-10, JPEG copy", "threads": torch.get_num_threads(),
    "command": "make probe-speed", "processor": platform.processor() or platform.machine(), "torch": torch.__version__,
    "date": datetime.date.today().isoformat()}, indent=2))
