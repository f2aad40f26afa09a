"""Claims about torchrun: processes learn what one learns, one writes, a killed one is replaced."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

import data
import train
from config import from_preset
from support import distributed

ROOT = pathlib.Path(__file__).parents[2]
# Crops, mirrors and padded blocks: everything that is drawn at random differs between images.
FLAGS = ["--preset", "shapes", "--encoder", "16x2x1", "--predictor", "8x1x1", "--batch-size", "16",
         "--crop-scale", "0.5", "1", "--flip", "--context-size", "0", "--max-steps", "20",
         "--epochs", "9", "--device", "cpu", "--precision", "fp32", "--no-merge-targets",
         "--momentum", "0.9", "--momentum-final", "0.9", "--held-out", "0"]
PROGRAMS = {"ijepa": ("train", []), "mae": ("extras.mae", []),
            "supervised": ("extras.supervised", []),
            "accumulated": ("train", ["--accumulation", "2", "--batch-size", "8"])}
# What each process does: it trains, says when it writes a file, and perhaps kills itself once.
SCRIPT = """
import glob, importlib, os, pathlib, signal, sys
import train
from support import checkpoint, command_line, logs
rank = os.environ.get("RANK", "0")
write = checkpoint.write
checkpoint.write = logs.write = lambda *given: (print("writes", rank, flush=True), write(*given))[1]
step, calls = train.train_step, []
def killed(*given):
    calls.append(1)
    if len(calls) == DEATH and rank == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    return step(*given)
train.train_step = killed
for program, flags in RUNS:
    command_line.run(lambda: importlib.import_module(program).main(flags))
    names = [pathlib.Path(task, "comm").read_text() for task in glob.glob("/proc/self/task/*")]
    print("threads", sum("gloo" in name for name in names), flush=True)
"""


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A .npz of 160 images of noise in two brightnesses, which are their labels."""
    labels = np.arange(160) % 2
    noise = np.random.default_rng(0).integers(0, 120, (160, 24, 24, 3))
    path = tmp_path_factory.mktemp("data") / "noise.npz"
    pixels = (noise + 100 * labels[:, None, None, None]).astype(np.uint8)
    np.savez(path, train_images=pixels, train_labels=labels)
    return path


def command(images, out, *more):
    return [*FLAGS, "--dataset", str(images), "--out", str(out), *more]


def torchrun(folder, runs, *options, kill=0):
    """Start two processes on the script; kill: the step at which the second is killed, once."""
    script = SCRIPT.replace("DEATH", str(kill)).replace("RUNS", repr(runs))
    (folder / "script.py").write_text(script)
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
         *options, "script.py"], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})


def weights(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)["model"]


def that_matter(model):
    """The weights without the keys' biases: one adds the same to all scores of a query, which
    softmax does not see. Their gradient is rounding noise, which Adam scales up to whole steps."""
    return {name: p[torch.arange(len(p)) // (len(p) // 3) != 1] if name.endswith("qkv.bias") else p
            for name, p in model.items()}


@pytest.fixture(scope="module")
def together(images, tmp_path_factory):
    """What two processes print, and the folder with a run of each program."""
    folder = tmp_path_factory.mktemp("two")
    process = torchrun(folder, [(program, command(images, folder / name, *flags))
                                for name, (program, flags) in PROGRAMS.items()])
    out, problems = process.communicate(timeout=300)
    assert process.returncode == 0, problems
    return folder, out


@pytest.mark.parametrize("name", PROGRAMS)
def test_two_processes_learn_what_one_learns_from_the_same_batches(images, together, tmp_path,
                                                                   name):
    """1e-5: sums over a batch are taken in another order; a wrong share of images, masks or
    gradient is off by 1e-2 and more."""
    program, flags = PROGRAMS[name]
    module = train if program == "train" else __import__(program, fromlist=["main"])
    module.main(command(images, tmp_path, *flags))
    one, two = that_matter(weights(tmp_path)), that_matter(weights(together[0] / name))
    assert max((one[key] - two[key]).abs().max().item() for key in one) < 1e-5
    texts = [(folder / "metrics.csv").read_text() for folder in (tmp_path, together[0] / name)]
    losses = [[line.split(",")[2] for line in text.splitlines()[1:]] for text in texts]
    assert np.allclose(*np.array(losses, dtype=float), atol=1e-5) and len(losses[0]) == 20


def test_only_the_first_process_writes(together):
    said = [line.split() for line in together[1].splitlines() if line.startswith("writes")]
    # config.json, metrics.csv, checkpoint.pt and encoder.pt of each run
    assert said.count(["writes", "0"]) == 4 * len(PROGRAMS) and ["writes", "1"] not in said
    assert together[1].count("next: python evaluate.py") == len(PROGRAMS)


def test_no_thread_of_the_team_outlives_a_run(together):
    """One that still holds a tensor when Python ends aborts the process, once in some hundred."""
    said = [line for line in together[1].splitlines() if line.startswith("threads")]
    assert said == ["threads 0"] * 2 * len(PROGRAMS)


def test_a_killed_process_is_replaced_and_the_run_ends_as_if_nothing_had_happened(
        images, together, tmp_path):
    runs = [("train", command(images, tmp_path / "run", "--checkpoint-minutes", "0"))]
    process = torchrun(tmp_path, runs, "--max-restarts=1", kill=12)
    out, problems = process.communicate(timeout=300)
    assert process.returncode == 0, problems
    planned = [int(line.split(" steps of 16 ")[0].split()[-1])
               for line in out.splitlines() if " steps of 16 " in line]
    assert len(planned) == 2 and planned[0] == 20 and 8 < planned[1] < 20  # the second resumes
    whole, killed = weights(together[0] / "ijepa"), weights(tmp_path / "run")
    assert all(torch.equal(whole[name], killed[name]) for name in whole)


def test_sigterm_to_torchrun_saves_one_checkpoint_to_resume_from(images, tmp_path):
    flags = command(images, tmp_path / "run", "--max-steps", "100000", "--epochs", "100000")
    process = torchrun(tmp_path, [("train", flags)])
    while not (tmp_path / "run/metrics.csv").exists() and process.poll() is None:
        time.sleep(0.1)
    time.sleep(2)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    step = torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)["progress"]["step"]
    assert f"stopped at step {step} of" in out and "--resume" in out and step > 0


def test_a_step_of_several_passes_exchanges_gradients_once_and_constants_never(monkeypatch):
    """One process is enough to count. (Positions are the constants, of the size of the grid.)"""
    config = from_preset("shapes", accumulation=3, batch_size=8)
    model, masking = train.build(config)
    generator, sent = torch.Generator().manual_seed(0), []
    batches = [(torch.randn(8, 3, 24, 24), masking(8, generator)) for _ in range(3)]
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(distributed, "place", lambda: (0, 2))
            learner = distributed.wrap(model)
        learner.register_comm_hook(None, lambda _, bucket: (
            sent.append(bucket.index()), allreduce_hook(None, bucket))[1])
        assert not learner.will_sync_module_buffers()
        train.train_step(config, learner, train.build_optimizer(config, model),
                         torch.amp.GradScaler("cpu", enabled=False), batches, 0, 10)
    finally:
        dist.destroy_process_group()
    assert sent == sorted(set(sent)) and sent[0] == 0  # each part once


def test_shares_of_a_batch_are_its_rows_whatever_the_number_of_processes():
    """A process crops and mirrors its images just as a single process would."""
    pixels = torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8)
    dataset = data.ImageDataset("x", pixels, None, None, (0.5,) * 3, (0.2,) * 3)

    def cropped(share):
        generator = torch.Generator().manual_seed(0)
        return next(data.batches(dataset, 8, 16, generator=generator, crop_scale=(0.3, 1.0),
                                 flip=True, share=share))

    whole = cropped((0, 1))
    for rank in range(4):
        assert torch.equal(cropped((rank, 4)), whole[2 * rank : 2 * rank + 2])
