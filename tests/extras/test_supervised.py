"""Claims about supervision: it learns the labels, and needs them."""

import csv

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from config import UsageError, from_preset
from extras import supervised

TINY = ["--encoder", "16x2x1", "--batch-size", "16", "--device", "cpu"]


def test_the_loss_is_the_cross_entropy_of_pooled_tokens():
    model, masking = supervised.build(from_preset("shapes", encoder="16x2x1"), classes=3)
    assert masking is None
    images, labels = torch.randn(4, 3, 24, 24), torch.tensor([0, 1, 2, 0])
    output = model(images, labels)
    assert torch.equal(output.tokens, model.target_encoder(images))
    assert not output.tokens.requires_grad
    logits = output.tokens.mean(dim=1) @ model.head.weight.T + model.head.bias
    torch.testing.assert_close(output.loss, F.cross_entropy(logits, labels))
    output.loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_it_learns_the_labels_and_needs_them(tmp_path):
    """Two brightnesses are told apart within 60 steps: the loss starts at ln 2 = .69 or above."""
    labels = np.arange(400) % 2
    images = np.random.default_rng(0).integers(0, 120, (400, 24, 24, 3))
    images = (images + 100 * labels[:, None, None, None]).astype(np.uint8)
    np.savez(tmp_path / "labeled.npz", train_images=images, train_labels=labels)
    np.savez(tmp_path / "unlabeled.npz", train_images=images)
    out = tmp_path / "run"
    supervised.main([*TINY, "--dataset", str(tmp_path / "labeled.npz"), "--max-steps", "60",
                     "--out", str(out)])
    rows = list(csv.DictReader(open(out / "metrics.csv")))
    assert float(rows[-1]["loss"]) < 0.1 and float(rows[-1]["knn"]) > 0.9
    with pytest.raises(UsageError, match="has no labels"):
        supervised.main([*TINY, "--dataset", str(tmp_path / "unlabeled.npz"), "--out", str(out)])
