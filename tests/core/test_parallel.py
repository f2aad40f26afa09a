"""Claims about torchrun: several processes learn what one learns, read the data once, write once, and go on when one of them is killed."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import config
import data
import train

ROOT = pathlib.Path(__file__).parents[2]
# Crops, mirrors and padded blocks: everything that is drawn at random differs from image to image.
FLAGS = ["--preset", "shapes", "--encoder", "16x2x1", "--predictor", "8x1x1", "--batch-size", "16", "--crop-scale", "0.5", "1", "--flip",
         "--context-size", "0", "--max-steps", "20", "--epochs", "9", "--device", "cpu", "--momentum", "0.9", "--held-out", "0"]
RUNS = {"ijepa": [], "accumulated": ["--accumulation", "2", "--batch-size", "8"], "mae": ["--method", "mae"],
        "supervised": ["--method", "supervised"]}
# What each process does: trains RUNS (or what it is told) and says so when it reads data or writes a file.
SCRIPT = """
import os, signal, sys
import config, data, train
from support import checkpoint
from support import logs
rank = os.environ.get("RANK", "0")
def told(word, original):
    return lambda *given: (print(word, rank, flush=True), original(*given))[1]
data.load = told("reads", data.load)
checkpoint.write = logs.write = train.write = told("writes", checkpoint.write)
step, calls = train.train_step, []
def killed(*given):
    calls.append(1)
    if len(calls) == DEATH and rank == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    return step(*given)
train.train_step = killed
for flags in RUNS:
    config.run(lambda: train.main(flags))
"""


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """An .npz of 160 images of noise in two brightnesses, which are their labels."""
    labels = np.arange(160) % 2
    pixels = np.random.default_rng(0).integers(0, 120, (160, 24, 24, 3)) + 100 * labels[:, None, None, None]
    path = tmp_path_factory.mktemp("data") / "noise.npz"
    np.savez(path, train_images=pixels.astype(np.uint8), train_labels=labels)
    return path


def command(images, out, *more):
    return [*FLAGS, "--dataset", str(images), "--out", str(out), *more]


def torchrun(folder, runs, *options, kill=0):
    """Start two processes on the script; `kill`: the step at which the second one is killed, once."""
    (folder / "script.py").write_text(SCRIPT.replace("DEATH", str(kill)).replace("RUNS", repr(runs)))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *options, "script.py"],
                            cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def weights(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)["model"]


def that_matter(model):
    """The weights without the keys' biases: one adds the same to all scores of a query, which softmax does not see. Their gradient is
    rounding noise around 0, and Adam scales noise up to whole steps."""
    return {name: p[torch.arange(len(p)) // (len(p) // 3) != 1] if name.endswith("qkv.bias") else p for name, p in model.items()}


@pytest.fixture(scope="module")
def together(images, tmp_path_factory):
    """What two processes print, and the folder with their RUNS."""
    folder = tmp_path_factory.mktemp("two")
    process = torchrun(folder, [command(images, folder / name, *flags) for name, flags in RUNS.items()])
    out, problems = process.communicate(timeout=300)
    assert process.returncode == 0 and "Warning: `" not in problems, problems
    return folder, out


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_learn_what_one_learns_from_the_same_batches(images, together, tmp_path, name):
    """1e-5: sums over a batch are taken in another order; a wrong share of images, masks or gradient is off by 1e-2 and more."""
    train.main(command(images, tmp_path, *RUNS[name]))
    one, two = that_matter(weights(tmp_path)), that_matter(weights(together[0] / name))
    assert max((one[key] - two[key]).abs().max().item() for key in one) < 1e-5
    texts = [(folder / "metrics.csv").read_text() for folder in (tmp_path, together[0] / name)]
    losses = [[line.split(",")[2] for line in text.splitlines()[1:]] for text in texts]
    assert np.allclose(*np.array(losses, dtype=float), atol=1e-5) and len(losses[0]) == 20


def test_one_process_reads_the_data_and_one_writes(together):
    """Counted over the four runs; the second process maps the memory of the first."""
    said = [line.split() for line in together[1].splitlines() if line.startswith(("reads", "writes"))]
    assert said.count(["reads", "0"]) == len(RUNS) and said.count(["reads", "1"]) == 0
    assert said.count(["writes", "0"]) == 4 * len(RUNS) and said.count(["writes", "1"]) == 0  # config, metrics, checkpoint, encoder
    assert together[1].count("evaluate with: python evaluate.py") == len(RUNS)


def test_a_killed_process_is_started_again_and_the_run_ends_as_if_nothing_had_happened(images, together, tmp_path):
    process = torchrun(tmp_path, [command(images, tmp_path / "run", "--checkpoint-minutes", "0")], "--max-restarts=1", kill=12)
    out, problems = process.communicate(timeout=300)
    assert process.returncode == 0, problems
    planned = [int(line.split(" steps of 16 ")[0].split()[-1]) for line in out.splitlines() if " steps of 16 " in line]
    assert len(planned) == 2 and planned[0] == 20 and 8 < planned[1] < 20  # two starts, the second from a checkpoint before step 12
    whole, killed = weights(together[0] / "ijepa"), weights(tmp_path / "run")
    assert all(torch.equal(whole[name], killed[name]) for name in whole)


def test_sigterm_to_torchrun_saves_one_checkpoint_that_all_go_on_from(images, together, tmp_path):
    flags = command(images, tmp_path / "run")
    flags[flags.index("20")] = "100000"
    flags += ["--epochs", "100000"]
    process = torchrun(tmp_path, [flags])
    while not (tmp_path / "run/metrics.csv").exists() and process.poll() is None:
        time.sleep(0.1)
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    step = torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)["progress"]["step"]
    assert f"stopped at step {step:,} of" in out and "--resume" in out and step > 0


def test_a_batch_that_cannot_be_shared_is_refused_in_one_line(monkeypatch):
    monkeypatch.setattr("support.distributed.place", lambda: (0, 3))
    with pytest.raises(config.UsageError, match="--batch-size is 128: 3 processes share each batch, so it must be a multiple"):
        train.set_up(config.from_preset("shapes", device="cpu", out="-"), False, False)


def test_shares_of_a_batch_are_its_rows_whatever_the_number_of_processes():
    """Crops and mirrors of one process are those that a single process gives to the same images."""
    pictures = torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8)
    dataset = data.ImageDataset("x", pictures, None, None, (0.5,) * 3, (0.2,) * 3)

    def cropped(order, share):
        generator = torch.Generator().manual_seed(0)
        return next(data.batches(dataset, 8, 16, order=order, generator=generator, crop_scale=(0.3, 1.0), flip=True, share=share))

    whole = cropped(torch.arange(8), (0, 1))
    for rank in range(4):
        assert torch.equal(cropped(torch.arange(2 * rank, 2 * rank + 2), (rank, 4)), whole[2 * rank : 2 * rank + 2])
