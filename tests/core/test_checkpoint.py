"""Claims about what a run leaves on disk: it survives a full disk, and runs no stranger's code."""

import dataclasses
import os
import pathlib
import pickle
import subprocess
import sys
import zipfile

import pytest
import torch

import train
from config import UsageError, from_preset
from support import checkpoint
from test_train import few_shapes, tiny  # noqa: F401 (the fixture works by being here)

ROOT = pathlib.Path(__file__).parents[2]


def test_a_file_that_could_not_be_written_leaves_the_old_one_and_nothing_else(tmp_path):
    path = tmp_path / "notes.txt"
    checkpoint.write(path, lambda temporary: temporary.write_text("old"))

    def breaks(temporary):
        temporary.write_text("half of the n")
        raise OSError(28, "No space left on device")

    with pytest.raises(UsageError, match="No space left on device.*held before is kept"):
        checkpoint.write(path, breaks)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_checkpoint_that_reads_back_differently_never_replaces_the_old_one(tmp_path):
    """A disk that lies: what was flushed is not what was written. Each part's checksum tells."""
    path = tmp_path / "checkpoint.pt"
    weights = {"weights": torch.zeros(1000)}
    checkpoint.write(path, lambda temporary: torch.save(weights, temporary))
    assert zipfile.ZipFile(path).testzip() is None

    def corrupt(temporary):
        torch.save({"weights": torch.ones(1000)}, temporary)
        with open(temporary, "rb+") as file:
            file.seek(1500)
            file.write(b"\0\0\0\0")

    with pytest.raises(UsageError, match="cannot be written"):
        checkpoint.write(path, corrupt)
    assert torch.equal(torch.load(path, weights_only=True)["weights"], torch.zeros(1000))


FULL_DISK = """
import resource, signal, sys, train
from support import command_line, shapes
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
shapes.COUNT, shapes.make.__defaults__ = {"train": 64, "test": 64}, (64,)
command_line.run(lambda: train.main(["--out", sys.argv[1], "--resume", "--max-steps", "9",
                                     "--override"]))
"""


def test_a_disk_that_fills_up_during_a_run_gives_a_line_and_keeps_the_checkpoint_before(tmp_path):
    """The real fault: the system writes at most 60 kB to a file, and a checkpoint needs more."""
    train.train(tiny(tmp_path, max_steps=2))
    before = (tmp_path / "checkpoint.pt").read_bytes()
    assert len(before) > 60_000
    ended = subprocess.run([sys.executable, "-c", FULL_DISK, str(tmp_path)], cwd=ROOT,
                           capture_output=True, text=True)
    last = ended.stderr.strip().splitlines()[-1]
    assert ended.returncode == 2, ended.stderr
    assert "checkpoint.pt cannot be written" in last and "held before is kept" in last
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    assert not list(tmp_path.glob("*.tmp"))


def test_a_truncated_checkpoint_is_refused_in_one_line(tmp_path):
    train.train(tiny(tmp_path, max_steps=2))
    whole = (tmp_path / "checkpoint.pt").read_bytes()
    (tmp_path / "checkpoint.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UsageError, match="cannot be read") as error:
        train.load_run(tmp_path)
    assert "\n" not in str(error.value)


def test_a_checkpoint_of_something_else_is_refused(tmp_path):
    torch.save({"weights": torch.zeros(3)}, tmp_path / "checkpoint.pt")
    with pytest.raises(UsageError, match="not a checkpoint of this version of train.py"):
        train.load_run(tmp_path)


class Trap:
    """What a malicious checkpoint holds: unpickling it would create a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("kind", ("torch", "pickle"))
def test_a_checkpoint_that_would_run_code_is_refused_and_the_code_is_not_run(tmp_path, kind):
    trap = Trap(tmp_path / "sprung")
    if kind == "torch":
        torch.save({"config": {}, "model": trap}, tmp_path / "checkpoint.pt")
    else:
        (tmp_path / "checkpoint.pt").write_bytes(pickle.dumps(trap))
    with pytest.raises(UsageError, match="cannot be read"):
        train.load_run(tmp_path)
    assert not (tmp_path / "sprung").exists()
    pickle.loads(pickle.dumps(trap))  # the trap works where it is sprung
    assert (tmp_path / "sprung").exists()


def test_saving_takes_a_fiftieth_of_the_time_at_most(tmp_path, monkeypatch):
    """A checkpoint that takes a second is written every fifty seconds at most."""
    clock, saves = [0.0], []

    def slow(path, save):
        if path.name == "checkpoint.pt":
            saves.append(clock[0])
            clock[0] += 1.0

    monkeypatch.setattr(checkpoint.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(checkpoint, "write", slow)
    config = tiny(tmp_path, checkpoint_minutes=0.0)
    model, _ = train.build(config)
    run = checkpoint.Run(tmp_path, config, model, train.build_optimizer(config, model),
                         torch.amp.GradScaler("cpu", enabled=False), torch.device("cpu"), {})
    while clock[0] < 1000:
        clock[0] += 0.5
        if run.is_due():
            run.save()
    assert 18 <= len(saves) <= 20


def test_a_run_from_before_targets_could_be_merged_is_read_as_it_was():
    values = dataclasses.asdict(from_preset("shapes", lr=0.1))
    assert checkpoint.config_from(values, "-").merge_targets
    del values["merge_targets"]
    assert not checkpoint.config_from(values, "-").merge_targets
