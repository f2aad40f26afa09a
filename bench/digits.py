"""The lines of scikit-learn in docs/use.md with three seeds, pretrained and not; prints JSON.

    python bench/digits.py > results/digits.json       a minute
"""

import datetime
import json
import os
import pathlib
import platform
import sys

import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
from extras.estimator import IJEPATransformer  # noqa: E402

SEEDS = (0, 1, 2)


def accuracy(seed, **changes):
    """Fraction of the last 597 digits that are told apart by the first 1,200 and their labels."""
    X, y = load_digits(return_X_y=True)
    model = make_pipeline(IJEPATransformer(image_size=32, random_state=seed, **changes),
                          LogisticRegression(C=100, max_iter=5000))
    return model.fit(X[:1200], y[:1200]).score(X[1200:], y[1200:])


if __name__ == "__main__":
    print(json.dumps({
        "command": "python bench/digits.py",
        "data": "scikit-learn's digits, 1,200 training and 597 test images", "seeds": SEEDS,
        "pretrained": [accuracy(seed) for seed in SEEDS],
        "untrained": [accuracy(seed, epochs=0) for seed in SEEDS],
        "processor": platform.processor() or platform.machine(), "cpus": os.cpu_count(),
        "torch": torch.__version__, "date": datetime.date.today().isoformat()}, indent=1))
