"""Masks a second on one core, before and after, as JSON on stdout.

The preset cifar10 (192x6x3, predictor 96x2x2, 16 context patches, 128 masks a step), one change
after another, all in turn, several rounds; CPU seconds of whole training steps, masks included, on
images of noise without crops. "fused kernel" is scaled_dot_product_attention, which a CPU ran
before.
"""

import json
import pathlib
import statistics
import sys
import time

import torch
import torch.nn.functional as F

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import models  # noqa: E402
import train
from config import from_preset
from extras import recipe
from support.results import provenance

ROUNDS, STEPS = 5, 6
# name -> precision, fused kernel, merged targets, masks of an image; 128 masks a step in all
VARIANTS = {
    "float32, fused kernel, one pass for each block": ("fp32", True, False, 1),
    "bfloat16": ("bf16", True, False, 1),
    "and attention by the formula": ("bf16", False, False, 1),
    "and one pass over the union": ("bf16", False, True, 1),
    "and 2 masks an image": ("bf16", False, True, 2),
    "and 4 masks an image": ("bf16", False, True, 4),
    "and 8 masks an image": ("bf16", False, True, 8),
}
explicit = models.explicit_attention


class Variant:
    """A model and what it needs to take steps on images of noise."""

    def __init__(self, precision, fused, merged, K):
        self.config = from_preset(
            "cifar10", predictor="96x2x2", context_size=16, precision=precision,
            merge_targets=merged, batch_size=128 // K)
        self.fused = fused
        self.model, self.masking = recipe.build(self.config, K=K)
        self.optimizer = train.build_optimizer(self.config, self.model)
        self.scaler = torch.amp.GradScaler("cpu", enabled=False)
        self.generator = torch.Generator().manual_seed(0)
        self.images = torch.randn(128 // K, 3, 32, 32, generator=self.generator)

    def seconds(self, steps):
        """CPU seconds of a step, the mean over some."""
        models.explicit_attention = F.scaled_dot_product_attention if self.fused else explicit
        start = time.process_time()
        for step in range(steps):
            masks = self.masking(len(self.images), self.generator)
            train.train_step(self.config, self.model, self.optimizer, self.scaler,
                             [(self.images, masks)], step, 1000)
        models.explicit_attention = explicit
        return (time.process_time() - start) / steps


if __name__ == "__main__":
    torch.set_num_threads(1)
    variants = {name: Variant(*how) for name, how in VARIANTS.items()}
    for variant in variants.values():
        variant.seconds(2)
    rounds = [{name: variant.seconds(STEPS) for name, variant in variants.items()}
              for _ in range(ROUNDS)]
    before = next(iter(VARIANTS))
    print(json.dumps({
        "what": "masks a second on one core: encoder 192x6x3, predictor 96x2x2, 8 x 8 patches, 16 "
                "context patches, 128 masks a step; medians of rounds in turn",
        "command": "python bench/throughput.py", "data": "noise", "seeds": [0],
        **provenance(torch.device("cpu")),
        "variants": {name: {
            "masks_per_second": round(128 / statistics.median(row[name] for row in rounds), 1),
            "times": round(statistics.median(row[before] / row[name] for row in rounds), 2)}
            for name in variants}}, indent=1))
