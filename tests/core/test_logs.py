"""Claims about what a run tells: metrics.csv survives a crash; TensorBoard and W&B get the same."""

import os
import pathlib
import subprocess
import sys
import types

import psutil
import pytest
import torch
from PIL import Image

import train
from config import UsageError
from support import logs
from test_train import few_shapes, rows, tiny  # noqa: F401 (the fixture works by being here)

ROOT = pathlib.Path(__file__).parents[2]


def slope(values):
    """How much a value grows from one to the next: the slope of the nearest straight line."""
    y = torch.tensor(values, dtype=torch.float64)
    x = torch.arange(len(y), dtype=torch.float64) - (len(y) - 1) / 2
    return (x @ (y - y.mean()) / x.square().sum()).item()


@pytest.mark.parametrize("tail", [
    "12", "12,0.5,0.4\n", "\0\0\0\0", "x,y\n", "12," * 30 + "\n", "\n\n", '7,"'])
def test_a_line_that_a_crash_cut_is_dropped_when_the_run_resumes(tmp_path, tail):
    train.train(tiny(tmp_path, max_steps=4))
    whole = rows(tmp_path)
    with open(tmp_path / "metrics.csv", "a") as file:
        file.write(tail)
    train.main(["--out", str(tmp_path), "--resume"])
    assert rows(tmp_path) == whole and len(whole) == 4


def test_a_run_killed_before_its_first_checkpoint_starts_anew_with_no_row_twice(tmp_path):
    """The row of step 0, before training, is written before there is any checkpoint."""
    config, folder = tiny(tmp_path), tmp_path
    for _ in range(2):
        with logs.Metrics(config, folder, 0, ("target_std",)) as metrics:
            metrics.append({"step": 0, "target_std": 0.9})
    assert [row["step"] for row in rows(folder)] == ["0"]


def test_a_kill_while_metrics_are_rewritten_leaves_the_old_ones(tmp_path, monkeypatch):
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

    train.train(tiny(tmp_path, max_steps=4, log_to="tensorboard"))
    events = EventAccumulator(str(tmp_path)).Reload()
    told = {event.step: event.value for event in events.Scalars("loss")}
    assert told == pytest.approx({int(row["step"]): float(row["loss"]) for row in rows(tmp_path)})
    assert {"lr", "momentum", "grad_norm"} <= set(events.Tags()["scalars"])


def test_weights_and_biases_get_the_rows_of_metrics_csv_under_an_id_that_is_unique_and_kept(
        tmp_path, monkeypatch):
    """The package wants an account; what is called of it is its documented interface."""
    told, started = {}, []
    run = types.SimpleNamespace(log=lambda row, step: told.update({step: row["loss"]}),
                                finish=lambda: told.update(finished=True))
    wandb = types.SimpleNamespace(init=lambda **given: started.append(given) or run)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for name in ("a/run", "b/run"):
        train.train(tiny(tmp_path / name, max_steps=3, log_to="wandb:students"))
    train.main(["--out", str(tmp_path / "a/run"), "--resume"])
    first, second, resumed = started
    assert first["project"] == "students" and first["config"]["encoder"] == "16x1x2"
    assert first["id"] == resumed["id"] != second["id"]  # though the folders' names are the same
    assert told.pop("finished")
    losses = {int(row["step"]): float(row["loss"]) for row in rows(tmp_path / "a/run")}
    assert told == pytest.approx(losses)


@pytest.mark.parametrize("module, log_to", [("torch.utils.tensorboard", "tensorboard"),
                                            ("wandb", "wandb:students")])
def test_a_log_that_is_not_installed_is_asked_for_in_one_line(tmp_path, monkeypatch, module,
                                                              log_to):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UsageError, match=f"--log-to {log_to} needs .* pip install"):
        train.train(tiny(tmp_path, max_steps=2, log_to=log_to))


def test_memory_stays_flat_over_1000_steps(tmp_path, monkeypatch):
    """With measures and checkpoints. The bound, 1 kB a step, leaks 300 MB in a day of training."""
    used, step = [], train.train_step

    def watched(*arguments):
        if arguments[5] % 50 == 0:
            used.append(psutil.Process().memory_info().rss)
        return step(*arguments)

    monkeypatch.setattr(train, "train_step", watched)
    train.train(tiny(tmp_path, batch_size=8, epochs=1000, max_steps=1000, checkpoint_minutes=0.01))
    assert slope(used[5:]) / 50 < 1000, f"{slope(used[5:]) / 50:.0f} bytes a step"


EPOCH_OF_A_FOLDER = """
import sys, psutil, data
from support import layout
layout.MEMORY_LIMIT, process = 0, psutil.Process()
for _ in data.batches(data.load(sys.argv[1]), 64, 224, workers=1):
    used = sum(p.memory_full_info().uss for p in (process, *process.children(recursive=True)))
    print("bytes", used)
"""


def test_memory_stays_flat_over_an_epoch_of_a_folder_too_large_for_memory(tmp_path):
    """Main and loader process together. A batch left behind would be 150 kB an image; the bound is
    a tenth of that."""
    Image.effect_noise((80, 80), 60).save(tmp_path / "0.jpg")
    for i in range(1, 1600):
        os.link(tmp_path / "0.jpg", tmp_path / f"{i}.jpg")
    said = subprocess.run([sys.executable, "-c", EPOCH_OF_A_FOLDER, str(tmp_path)], text=True,
                          capture_output=True, check=True, cwd=ROOT).stdout
    used = [int(line.split()[1]) for line in said.splitlines() if line.startswith("bytes")]
    assert len(used) == 25
    assert slope(used[5:]) / 64 < 15000, f"{slope(used[5:]) / 64:.0f} bytes an image"
