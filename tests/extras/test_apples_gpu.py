"""Claims about the extras on Apple's GPUs, which pretend.py plays: all of them run there."""

import pickle

import numpy as np
import pytest
from pretend import Remote, pretending

import evaluate
import train
from config import from_preset
from extras import figures, mae, probes
from extras.estimator import IJEPATransformer

TINY = {"encoder": "16x1x2", "predictor": "8x1x2", "batch_size": 16, "max_steps": 2,
        "measurements": 1, "precision": "fp32"}


@pytest.fixture(autouse=True)
def few_shapes(monkeypatch):
    monkeypatch.setattr("support.shapes.COUNT", {"train": 64, "test": 64})
    monkeypatch.setattr("support.shapes.make.__defaults__", (64,))


def test_an_estimator_fitted_on_a_gpu_unpickles_without_one(monkeypatch):
    def refuse(tensor, protocol):
        raise RuntimeError("pickled on mps, which another machine may lack")

    images = np.random.default_rng(0).integers(0, 256, (20, 8, 8), dtype=np.uint8)
    with pretending(), monkeypatch.context() as patch:
        patch.setattr(Remote, "__reduce_ex__", refuse)
        model = IJEPATransformer(encoder="8x1x1", predictor="8x1x1", patch_size=2, max_steps=2,
                                 batch_size=16, device="mps").fit(images)
        features = model.transform(images)
        stored = pickle.dumps(model.partial_fit(images))
    thawed = pickle.loads(stored).set_params(device="cpu")
    assert thawed.partial_fit(images).transform(images).shape == features.shape


def test_probes_and_figures_of_a_run_are_made_there(tmp_path):
    config = from_preset("shapes", **TINY, device="mps", out=str(tmp_path))
    with pretending():
        train.train(config, *mae.build(config), program=f"{mae.PROGRAM} 0.75")
        evaluate.main([str(tmp_path), "--device", "mps", "--train-images", "40"])
        probes.main([str(tmp_path), "--device", "mps", "--attentive", "1", "--finetune", "1"])
        figures.main([str(tmp_path), "--device", "mps", "--images", "30"])
    assert (tmp_path / "figures/reconstruction.png").exists()
