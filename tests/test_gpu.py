"""Claims about a CUDA GPU: it trains, resumes, evaluates and draws as the CPU does, only faster.

    make test-gpu                                      on a machine with a GPU: a minute or two
    TEST_GPU_DEVICE=cpu python -m pytest tests/test_gpu.py    these tests themselves, without one

Capability 8.0 (A100, RTX 30) and newer have bfloat16, older ones (T4, V100, RTX 20) float16.
"""

import functools
import json
import os
import pickle

import numpy as np
import pytest
import torch

import data
import evaluate
import predict_and_visualize
import train
from config import from_preset
from extras.estimator import IJEPATransformer
from test_parallel import that_matter
from test_train import (  # noqa: F401 (the fixture works by being here)
    few_shapes, interrupt_at, rows, tiny, weights)

DEVICE = torch.device(os.environ.get("TEST_GPU_DEVICE", "cuda"))
REAL = DEVICE.type == "cuda"
pytestmark = pytest.mark.skipif(REAL and not torch.cuda.is_available(),
                                reason="torch finds no CUDA GPU on this machine")
cuda_only = pytest.mark.skipif(not REAL, reason="asks what only a GPU can answer")
CAPABILITY = torch.cuda.get_device_capability() if torch.cuda.is_available() else (9, 0)
needs_bf16 = pytest.mark.skipif(CAPABILITY < (8, 0), reason="no units for bfloat16")
PRECISIONS = ["fp32", "fp16", pytest.param("bf16", marks=needs_bf16)]
# A GPU adds in another order at every run: `take` sums gradients atomically, and Adam makes whole
# steps of small gradients. Over a few steps this moves weights by 1e-5; a wrong batch, mask or
# learning rate moves them by 1e-2.
CLOSE = 1e-3


def on_gpu(out, **changes):
    return tiny(out, device=DEVICE.type, **changes)


def pieces(config):
    """What train_step takes, on the GPU, and a stream of batches."""
    model, masking = train.build(config)
    model.to(DEVICE).train()
    half = train.pick_precision(config, DEVICE) == torch.float16
    scaler, dataset = torch.amp.GradScaler(DEVICE.type, enabled=half), data.load(config.dataset)
    stream = train.batches_of(config, dataset, masking, torch.arange(len(dataset)), DEVICE,
                              torch.Generator().manual_seed(0), 0)
    return config, model, train.build_optimizer(config, model), scaler, stream


def close(one, other):
    """Whether the weights of two run folders are the same but for the order of sums."""
    one, other = that_matter(weights(one)), that_matter(weights(other))
    return max((one[name] - other[name]).abs().max().item() for name in one) < CLOSE


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_run_learns_and_keeps_its_weights_in_float32(tmp_path, precision):
    model = train.train(on_gpu(tmp_path, precision=precision, epochs=30, measurements=3))
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {(DEVICE.type, torch.float32)}
    losses = [float(row["loss"]) for row in rows(tmp_path)]
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])


def test_auto_is_the_precision_that_this_gpu_has_units_for():
    picked = train.pick_precision(from_preset("shapes"), DEVICE)
    if REAL:
        assert picked == (torch.bfloat16 if CAPABILITY >= (8, 0) else torch.float16)
    assert train.pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_crops_and_masks_are_those_of_the_cpu():
    """Masks to the bit; pixels but for the rounding of another interpolation kernel."""
    config = tiny("-", crop_scale=(0.3, 1.0), flip=True, context_size=0)
    _, masking = train.build(config)
    (images, masks), (expected, cpu_masks) = (
        next(train.batches_of(config, data.load("shapes"), masking, torch.arange(64), device,
                              torch.Generator().manual_seed(0), 0))
        for device in (DEVICE, torch.device("cpu")))
    assert images.device.type == masks.context.device.type == DEVICE.type
    assert (images.cpu() - expected).abs().max() < 1e-3  # pixels reach from -2 to 2
    assert all(torch.equal(a.cpu(), b) for a, b in zip(vars(masks).values(),
                                                       vars(cpu_masks).values()))


def test_a_run_in_float32_is_that_of_the_cpu(tmp_path):
    changes = dict(crop_scale=(0.5, 1.0), flip=True, accumulation=2, batch_size=8, max_steps=8)
    train.train(on_gpu(tmp_path / "gpu", **changes))
    train.train(tiny(tmp_path / "cpu", **changes))
    assert close(tmp_path / "gpu", tmp_path / "cpu")


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_stopped_run_resumes_as_if_it_had_not_stopped(tmp_path, monkeypatch, precision):
    """In low precision another order of sums changes the last of 8 or 11 bits: ten times CLOSE."""
    config = dict(precision=precision, max_steps=6, held_out=0)
    train.train(on_gpu(tmp_path / "whole", **config))
    with monkeypatch.context() as patch:
        interrupt_at(patch, 2)
        with pytest.raises(SystemExit, match="130"):
            train.train(on_gpu(tmp_path / "halves", **config))
    train.main(["--out", str(tmp_path / "halves"), "--resume"])
    whole, halves = (that_matter(weights(tmp_path / name)) for name in ("whole", "halves"))
    furthest = max((whole[name] - halves[name]).abs().max().item() for name in whole)
    assert furthest < (CLOSE if precision == "fp32" else 10 * CLOSE)
    scales = [torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["scaler"]
              for name in ("whole", "halves")]
    assert scales[0] == scales[1] and bool(scales[0]) == (precision == "fp16")


@pytest.mark.skipif(CAPABILITY < (7, 0), reason="Triton needs capability 7.0")
def test_a_compiled_run_learns_the_same(tmp_path, monkeypatch):
    if not REAL:  # a compiler for CPUs takes a minute to start
        monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    for name, flag in (("plain", False), ("compiled", True)):
        train.train(on_gpu(tmp_path / name, compile=flag, max_steps=4))
    assert close(tmp_path / "plain", tmp_path / "compiled")


def test_evaluation_and_figures_on_the_gpu_are_those_of_the_cpu(tmp_path):
    """Features to 1e-4, so accuracies to one image in 64 that lay between two classes."""
    train.train(on_gpu(tmp_path, max_steps=4))
    found = {}
    for device in ("cpu", DEVICE.type):
        evaluate.main([str(tmp_path), "--device", device])
        found[device] = json.loads((tmp_path / "evaluation.json").read_text())
    cpu, gpu = found["cpu"], found[DEVICE.type]
    assert gpu["measures"] == pytest.approx(cpu["measures"], abs=1e-3)
    for name, row in cpu["features"].items():
        for measure in ("linear", "knn"):
            assert gpu["features"][name][measure] == pytest.approx(row[measure], abs=2 / 64)
    assert bool(gpu["hardware"]["gpu"]) == REAL
    predict_and_visualize.main([str(tmp_path), "--device", DEVICE.type])
    assert {path.stem for path in (tmp_path / "figures").glob("*.png")} == {
        "masks", "predictor_neighbors", "curves", "tsne"}


def test_what_the_gpu_saved_another_machine_reads(tmp_path):
    """Run folders by evaluate.py --device cpu above; an estimator by pickle."""
    images = np.random.default_rng(0).integers(0, 256, (20, 8, 8), dtype=np.uint8)
    model = IJEPATransformer(encoder="8x1x1", predictor="8x1x1", patch_size=2, max_steps=2,
                             batch_size=16, device=DEVICE.type).fit(images)
    stored = pickle.dumps(model)
    assert b"cuda:" not in stored
    features = pickle.loads(stored).set_params(device="cpu").transform(images)
    assert np.allclose(features, model.transform(images), atol=1e-4)


@cuda_only
@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=needs_bf16)])
def test_neither_the_batch_nor_the_step_waits_for_the_gpu(precision):
    """In float16 the scaler reads one number, whether a gradient has overflowed; it has to."""
    config = on_gpu("-", precision=precision, crop_scale=(0.5, 1.0), flip=True, clip_grad=1.0,
                    accumulation=2, num_targets=3, merge_targets=False)
    *step, stream = pieces(config)
    train.train_step(*step, [next(stream), next(stream)], 0, 10)  # the first allocates
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        train.train_step(*step, [next(stream), next(stream)], 1, 10)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@cuda_only
def test_a_step_of_stl10_vit_base_fits_a_gpu_of_16_gb(monkeypatch):
    """The smallest that Colab and Kaggle lend, a T4, has 15.8e9 bytes; torch itself takes some."""
    config = from_preset("stl10-vit-base", device="cuda")
    images = torch.zeros(256, 3, 96, 96, dtype=torch.uint8)
    dataset = data.ImageDataset("x", images, None, None, (0.5,) * 3, (0.2,) * 3)
    monkeypatch.setattr(data, "load", lambda *_: dataset)
    *step, stream = pieces(config)
    torch.cuda.reset_peak_memory_stats()
    for number in range(2):  # Adam's averages come with the first
        train.train_step(*step, [next(stream) for _ in range(config.accumulation)], number, 10)
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() < 14e9
