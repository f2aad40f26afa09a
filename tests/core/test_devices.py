"""Claims about machines other than this one: Apple's GPUs, old and unknown ones, Windows.

None of them is here: each is played by what it lacks (pretend.py plays Apple's GPUs). What needs a
real GPU is in test_gpu.py.
"""

import contextlib
import io
import json
import os
import pathlib
import pickle
import shutil
import signal
import subprocess
import sys
import types

import pytest
import torch
from PIL import Image
from pretend import Remote, pretending

import data
import evaluate
import predict_and_visualize
import train
from extras import benchmark, pretrained
from support import command_line, folder
from test_parallel import that_matter
from test_train import (  # noqa: F401 (the fixture works by being here)
    few_shapes, interrupt_at, rows, same_weights, tiny, weights)

ROOT = pathlib.Path(__file__).parents[2]

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


# --- NVIDIA's GPUs, new and old: test_gpu.py runs on one ------------------------------------------


def test_what_was_saved_on_a_gpu_is_read_without_one(tmp_path, monkeypatch):
    """Evaluation, figures, resume; and torch.load, left to itself, does ask for the GPU."""
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        train.train(tiny(tmp_path, max_steps=2))
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="CUDA"):
            torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    for loaded in (evaluate.load_encoders(tmp_path)[0]["target"], train.load_run(tmp_path)[0],
                   pretrained.load(tmp_path / "encoder.pt").encoder):
        assert {p.device.type for p in loaded.parameters()} == {"cpu"}
    train.main(["--out", str(tmp_path), "--resume", "--override", "--max-steps", "4"])
    assert rows(tmp_path)[-1]["step"] == "4"


def test_a_run_in_float16_resumes_bit_identical_to_an_uninterrupted_one(tmp_path, monkeypatch):
    """Older GPUs train so. The scale of the loss is part of the checkpoint."""
    config = dict(precision="fp16", max_steps=6, held_out=0)
    train.train(tiny(tmp_path / "whole", **config))
    with monkeypatch.context() as patch:
        interrupt_at(patch, 2)
        with pytest.raises(SystemExit, match="130"):
            train.train(tiny(tmp_path / "halves", **config))
    train.main(["--out", str(tmp_path / "halves"), "--resume"])
    assert same_weights(tmp_path / "whole", tmp_path / "halves")
    scales = [torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["scaler"]
              for name in ("whole", "halves")]
    assert scales[0] == scales[1] and scales[0]["_growth_tracker"] == 6


def test_a_step_whose_gradients_overflow_in_float16_is_skipped_and_the_scale_lowered():
    config = tiny("-", precision="fp16")
    model, masking = train.build(config)
    optimizer, scaler = train.build_optimizer(config, model), torch.amp.GradScaler("cpu", 2.0**40)
    before = model.predictor.mask_token.clone()
    generator = torch.Generator().manual_seed(0)
    batch = torch.randn(16, 3, 24, 24, generator=generator), masking(16, generator)
    train.train_step(config, model, optimizer, scaler, [batch], 0, 100)
    assert torch.equal(model.predictor.mask_token, before) and scaler.get_scale() == 2.0**39
    for step in range(1, 40):
        values = train.train_step(config, model, optimizer, scaler, [batch], step, 100)
    assert not torch.equal(model.predictor.mask_token, before)
    assert values["grad_norm"].isfinite() and 1 < scaler.get_scale() < 2.0**39


# --- image folders too large for memory, in a container -------------------------------------------


@pytest.fixture
def large(tmp_path, monkeypatch):
    """An image folder of 60 files that counts as too large for memory."""
    monkeypatch.setattr("support.layout.MEMORY_LIMIT", 0)
    for i in range(60):
        Image.effect_noise((16, 16), 60).save(tmp_path / f"{i}.png")
    return tmp_path


def test_evaluation_decodes_a_large_folder_in_other_processes(large, monkeypatch):
    """As training does; on one core a GPU would wait for every image."""
    attempt, here = folder.attempt, os.getpid()

    def elsewhere(*given):
        assert os.getpid() != here
        return attempt(*given)

    monkeypatch.setattr(folder, "attempt", elsewhere)
    dataset = data.load(str(large), image_size=16)
    encoder = train.build(tiny("-", image_size=16))[0].target_encoder
    assert evaluate.features(encoder, dataset, 16).shape == (60, 16)
    assert evaluate.pixels(dataset, 16).shape == (60, 768)


@pytest.mark.parametrize("free, runs, started", [
    (10**9, 1, 3), (700, 1, 3), (699, 1, 2), (299, 1, 0), (0, 1, 0), (1400, 2, 3), (1399, 2, 2)])
def test_no_more_processes_than_shared_memory_has_room_for(monkeypatch, capsys, free, runs,
                                                           started):
    """Batches of 100 bytes: two for each process, and the one that is being read."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(3), raising=False)
    monkeypatch.setattr(os.path, "isdir", lambda path: path == "/dev/shm")
    monkeypatch.setattr(folder.shutil, "disk_usage", lambda _: types.SimpleNamespace(free=free))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(runs))  # of torchrun: they share it
    folder.note.cache_clear()
    assert [folder.processes(workers, 100) for workers in (8, 8)] == [started] * 2
    assert folder.processes(0, 100) == 0
    said = capsys.readouterr().err
    assert said.count("too little for 3 processes") == (started < 3)  # once


MOUNT = "mount -t tmpfs -o size=1m tmpfs /dev/shm"
DECODE = """
import sys, data
from support import layout
layout.MEMORY_LIMIT = 0
images = data.batches(data.load(sys.argv[1], image_size=256), 20, 256, workers=2)
print("decoded", sum(map(len, images)))
"""


def test_a_small_dev_shm_slows_decoding_and_keeps_nothing(large):
    """The real fault: a container's /dev/shm of 1 MB, where a batch takes 4."""
    own = ["unshare", "-rm", "sh", "-c"]
    if not shutil.which("unshare") or subprocess.run([*own, MOUNT], capture_output=True).returncode:
        pytest.skip("this system lets nobody mount a /dev/shm of their own")
    done = subprocess.run([*own, f'{MOUNT} && "$0" -c "$1" "$2"; ls /dev/shm', sys.executable,
                           DECODE, str(large)], cwd=ROOT, capture_output=True, text=True)
    assert "too little for" in done.stderr
    assert done.stdout.splitlines()[-1] == "decoded 60"  # and no file after it


# --- Windows, and other terminals -----------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["cp932", "cp1252", "ascii"])
def test_output_that_the_terminal_cannot_encode_never_ends_a_run(tmp_path, monkeypatch, encoding):
    """Folders and classes of many scripts, one of them with a byte that is no character."""
    images, run = tmp_path / "größe 写真 \udce9", str(tmp_path / "été")
    for split in ("train", "test"):
        for name in ("猫 🐈", "καφές", "قهوة"):
            (images / split / name).mkdir(parents=True)
            for i in range(6):
                Image.effect_noise((8, 8), 60).save(images / split / name / f"{i}.png")
        (images / split / name / "broken.png").write_bytes(b"")
    written = {}
    for stream in ("stdout", "stderr"):
        written[stream] = io.TextIOWrapper(io.BytesIO(), encoding)
        monkeypatch.setattr(sys, stream, written[stream])
    small = ["--image-size", "24", "--encoder", "16x1x2", "--predictor", "8x1x2", "--batch-size",
             "8", "--max-steps", "2", "--held-out", "0", "--device", "cpu"]
    command_line.run(lambda: train.main(["--dataset", str(images), *small, "--out", run]))
    command_line.run(lambda: evaluate.main([run, run]))
    words = ["broken.png", "mean ? standard" if encoding == "ascii" else "standard deviation"]
    if encoding == "ascii":
        command_line.run(lambda: predict_and_visualize.main([run]))
        words += ["tsne.png", "the font lacks"]  # of the names of classes
    written["stdout"].flush()
    said = written["stdout"].buffer.getvalue().decode(encoding)
    assert all(word in said for word in words), said


def test_a_run_needs_nothing_that_windows_lacks(tmp_path, monkeypatch):
    """No SIGHUP, no opening of folders, no affinity, no `resource`, no fork, no fcntl."""
    for module, name in ((signal, "SIGHUP"), (signal, "SIGUSR1"), (os, "O_DIRECTORY"),
                         (os, "sched_getaffinity"), (os, "fork"), (os, "sysconf"), (os, "getuid")):
        monkeypatch.delattr(module, name, raising=False)
    for module in ("resource", "fcntl", "pwd", "grp", "termios"):
        monkeypatch.setitem(sys.modules, module, None)
    train.train(tiny(tmp_path, max_steps=2))
    train.main(["--out", str(tmp_path), "--resume", "--override", "--max-steps", "3"])
    evaluate.main([str(tmp_path)])
    assert benchmark.peak_memory(torch.device("cpu"))["bytes"] is None
    images = folder.LazyFolder(["a.png"], None, 8)
    for sent in (images.read, folder.ignore_ctrl_c):  # to processes that are spawned, not forked
        pickle.loads(pickle.dumps(sent))
