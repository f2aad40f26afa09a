"""Claims about what a run tells: metrics.csv survives a crash, and the same numbers reach TensorBoard and Weights & Biases where asked."""

import os
import pathlib
import subprocess
import sys
import types

import psutil
import pytest
import torch
from PIL import Image

from support import checkpoint
from support import logs
import train
from config import UsageError
from test_train import few_shapes, rows, tiny  # noqa: F401 (the fixture works by being here)

ROOT = pathlib.Path(__file__).parents[2]


def slope(values):
    """How much a value grows from one to the next: the slope of the straight line nearest to them."""
    y = torch.tensor(values, dtype=torch.float64)
    x = torch.arange(len(y), dtype=torch.float64) - (len(y) - 1) / 2
    return (x @ (y - y.mean()) / x.square().sum()).item()


@pytest.mark.parametrize("tail", ["12", "12,0.5,0.4", "12,0.5,0.4\n", "\0\0\0\0", "x,y\n", "12," * 30 + "\n", "\n\n", '7,"'])
def test_a_line_that_a_crash_cut_is_dropped_and_the_run_goes_on(tmp_path, tail):
    """Rows up to the checkpoint are kept whole; a cut line, or what a disk without power left of it, is no row."""
    train.train(tiny(tmp_path, max_steps=4))
    whole = rows(tmp_path)
    with open(tmp_path / "metrics.csv", "a") as file:
        file.write(tail)
    train.main(["--out", str(tmp_path), "--resume"])
    assert rows(tmp_path) == whole
    assert all(set(row) == set(logs.Metrics.COLUMNS) and float(row["loss"]) > 0 for row in rows(tmp_path))


def test_a_kill_while_metrics_are_taken_over_leaves_the_old_ones(tmp_path, monkeypatch):
    train.train(tiny(tmp_path, max_steps=4))
    before = (tmp_path / "metrics.csv").read_text()

    def killed(path, save):
        save(path.with_suffix(".tmp"))
        raise KeyboardInterrupt

    monkeypatch.setattr(logs, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        train.main(["--out", str(tmp_path), "--resume"])
    assert (tmp_path / "metrics.csv").read_text() == before


def test_tensorboard_gets_the_rows_of_metrics_csv(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train.train(tiny(tmp_path, max_steps=4, tensorboard=True))
    events = EventAccumulator(str(tmp_path)).Reload()
    told = {event.step: event.value for event in events.Scalars("loss")}
    assert told == pytest.approx({int(row["step"]): float(row["loss"]) for row in rows(tmp_path)})
    assert {"lr", "momentum", "grad_norm"} <= set(events.Tags()["scalars"])


def test_weights_and_biases_get_the_rows_of_metrics_csv(tmp_path, monkeypatch):
    """The package itself wants an account; what is called of it is its documented interface: init, log, finish."""
    told = {}
    run = types.SimpleNamespace(log=lambda row, step: told.update({step: row["loss"]}), finish=lambda: told.update(finished=True))
    started = {}
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **given: started.update(given) or run))
    train.train(tiny(tmp_path, max_steps=3, wandb="students"))
    assert started["project"] == "students" and started["config"]["encoder"] == "16x1x2" and started["name"] == tmp_path.name
    assert told.pop("finished") and told == pytest.approx({int(row["step"]): float(row["loss"]) for row in rows(tmp_path)})


@pytest.mark.parametrize("module,settings,said", [
    ("torch.utils.tensorboard", {"tensorboard": True}, "--tensorboard needs .* pip install tensorboard"),
    ("wandb", {"wandb": "students"}, "--wandb students needs .* pip install wandb")])
def test_a_log_that_is_not_installed_is_asked_for_in_one_line(tmp_path, monkeypatch, module, settings, said):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UsageError, match=said):
        train.train(tiny(tmp_path, max_steps=2, **settings))


def test_no_log_is_left_open_where_another_is_not_installed(tmp_path, monkeypatch):
    """A TensorBoard writer has a thread, which would write on after the command was refused."""
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UsageError, match="--wandb"):
        train.train(tiny(tmp_path, max_steps=2, tensorboard=True, wandb="students"))
    assert not list(tmp_path.glob("events*"))


def test_memory_stays_flat_over_2000_steps(tmp_path, monkeypatch):
    """With logs, measures and checkpoints on. The bound, 1 kB a step, is a leak of 300 MB in a day of training."""
    used, step = [], train.train_step

    def watched(config, model, optimizer, batches, number, *rest):
        if number % 100 == 0:
            used.append(psutil.Process().memory_info().rss)
        return step(config, model, optimizer, batches, number, *rest)

    monkeypatch.setattr(train, "train_step", watched)
    train.train(tiny(tmp_path, batch_size=8, epochs=1000, max_steps=2000, checkpoint_minutes=0.01))
    assert slope(used[5:]) / 100 < 1000, f"{slope(used[5:]) / 100:.0f} bytes a step"  # the first steps fill caches


EPOCH_OF_A_FOLDER = """
import sys, psutil, data, train
from support import folder
train.keep_memory()
folder.MEMORY_LIMIT, process = 0, psutil.Process()
for _ in data.batches(data.load(sys.argv[1]), 64, 224, workers=1):
    print("bytes", sum(p.memory_full_info().uss for p in (process, *process.children(recursive=True))))
"""


def test_memory_stays_flat_over_an_epoch_of_a_folder_too_large_for_memory(tmp_path):
    """Main and loader process together, freed memory kept as in training, in a process of its own, where no other test has freed any.
    A batch left behind would be 150 kB an image; the bound is a tenth of that."""
    Image.effect_noise((80, 80), 60).save(tmp_path / "0.jpg")
    for i in range(1, 1600):
        os.link(tmp_path / "0.jpg", tmp_path / f"{i}.jpg")
    said = subprocess.run([sys.executable, "-c", EPOCH_OF_A_FOLDER, str(tmp_path)], capture_output=True, text=True, check=True,
                          cwd=ROOT).stdout
    assert "too many for memory" in said
    used = [int(line.split()[1]) for line in said.splitlines() if line.startswith("bytes")]
    assert len(used) == 25
    assert slope(used[5:]) / 64 < 15000, f"{slope(used[5:]) / 64:.0f} bytes an image"  # the first batches fill buffers


def test_rare_checkpoints_where_they_are_slow(tmp_path, monkeypatch):
    """A checkpoint that takes a second is written every fifty seconds at most: 2% of the time."""
    clock, saves = [0.0], []
    monkeypatch.setattr(checkpoint.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(checkpoint, "save_checkpoint", lambda *run: (saves.append(clock[0]), clock.__setitem__(0, clock[0] + 1.0)))
    model = torch.nn.Linear(1, 1)
    saver = checkpoint.Saver(tmp_path, tiny(tmp_path, checkpoint_minutes=0.0), model, None, None, checkpoint.Progress(), {})
    while clock[0] < 1000:
        clock[0] += 0.5
        saver.save_if_due()
    assert 18 <= len(saves) <= 20 and len(saves) * 1.0 / clock[0] <= 0.02
