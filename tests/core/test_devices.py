"""Claims about machines other than this one: Apple's GPUs, old and unknown ones, Windows.

None of them is here: each is played by what it lacks (pretend.py plays Apple's GPUs). What needs a
real GPU is in test_gpu.py.
"""

import contextlib
import json

import pytest
import torch
from pretend import Remote, pretending

import data
import evaluate
import predict_and_visualize
import train
from test_parallel import that_matter
from test_train import few_shapes, rows, tiny, weights  # noqa: F401 (the fixture works by being here)

# --- Apple's GPUs ---------------------------------------------------------------------------------


def test_the_pretended_device_refuses_what_apples_refuse():
    """So that the tests below can fail."""
    with pretending() as mps:
        tensor = torch.ones(2, 3, 8, 8).to(mps)
        assert isinstance(tensor, Remote) and tensor.device.type == "mps"
        with pytest.raises(TypeError, match="float64"):
            tensor.double()
        with pytest.raises(RuntimeError, match="one device"):
            tensor + torch.ones(8)
        with pytest.raises(TypeError, match="numpy"):
            tensor.numpy()
        with pytest.raises(RuntimeError, match="waited for"):
            torch.ones(3).to(mps, non_blocking=True)
        with pytest.raises(NotImplementedError):
            data.resize(tensor, 4)


@pytest.mark.parametrize("changes", [
    dict(crop_scale=(0.5, 1.0), flip=True, accumulation=2, clip_grad=1.0),
    dict(dataset="shapes3d", image_size=16, crop_scale=(0.5, 1.0), context_size=0)],
    ids=["images", "volumes"])
def test_a_run_on_apples_gpu_is_the_one_on_the_cpu(tmp_path, monkeypatch, changes):
    """Schedules, steps, measures and checkpoints. 1e-5: attention has another kernel, which sums
    in another order; a wrong batch is off by 1e-2 and more."""
    for name in ("shapes", "solids"):
        monkeypatch.setattr(f"support.{name}.COUNT", {"train": 320, "test": 64})
        monkeypatch.setattr(f"support.{name}.make.__defaults__", (64,))
    changes = {"max_steps": 4, "batch_size": 8, "measurements": 2, "held_out": 32, **changes}
    train.train(tiny(tmp_path / "cpu", **changes))
    with pretending():
        model = train.train(tiny(tmp_path / "mps", device="mps", **changes))
    assert all(isinstance(p, Remote) for p in model.parameters())
    one, other = (that_matter(weights(tmp_path / name)) for name in ("cpu", "mps"))
    assert max((one[name] - other[name]).abs().max().item() for name in one) < 1e-5
    for column in ("loss", "target_std", "rank", "cosine"):
        values = ([float(row[column]) for row in rows(tmp_path / name) if row[column]]
                  for name in ("cpu", "mps"))
        assert next(values) == pytest.approx(next(values), abs=1e-3)


def test_evaluation_on_apples_gpu_is_that_on_the_cpu_and_figures_are_drawn(tmp_path):
    """Nothing is computed there in float64, and nothing read from there by NumPy."""
    train.train(tiny(tmp_path, max_steps=2))
    found = {}
    for device in ("cpu", "mps"):
        with pretending() if device == "mps" else contextlib.nullcontext():
            evaluate.main([str(tmp_path), "--device", device])
            if device == "mps":
                predict_and_visualize.main([str(tmp_path), "--device", device])
        found[device] = json.loads((tmp_path / "evaluation.json").read_text())
    scores = [{name: (row["linear"], row["knn"]) for name, row in results["features"].items()}
              for results in found.values()]
    assert scores[0] == scores[1]
    assert found["cpu"]["measures"] == pytest.approx(found["mps"]["measures"], abs=1e-4)


def test_auto_picks_apples_gpu_only_when_asked():
    """Until someone has run the tests on one."""
    with pretending():
        assert train.pick_device("mps").type == "mps"
        assert train.pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
