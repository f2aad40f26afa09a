"""Claims about what a run leaves on disk: it survives a full disk and a read-only folder, and a stranger's file cannot run code."""

import os
import pathlib
import pickle
import subprocess
import sys
import zipfile

import pytest
import torch

from support import checkpoint
import train
from config import UsageError
from test_train import few_shapes, tiny  # noqa: F401 (the fixture works by being here)

ROOT = pathlib.Path(__file__).parents[2]


def test_a_file_that_could_not_be_written_leaves_the_old_one_and_no_rubbish(tmp_path):
    path = tmp_path / "notes.txt"
    checkpoint.write(path, lambda temporary: temporary.write_text("old"))

    def breaks(temporary):
        temporary.write_text("half of the n")
        raise OSError(28, "No space left on device")

    with pytest.raises(UsageError, match="No space left on device.*held before is kept"):
        checkpoint.write(path, breaks)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_checkpoint_that_reads_back_wrongly_is_never_named(tmp_path):
    """A disk that lies: what was flushed is not what was written. The checksum of each part tells."""
    path = tmp_path / "checkpoint.pt"
    checkpoint.write(path, lambda temporary: torch.save({"weights": torch.zeros(1000)}, temporary))

    def corrupt(temporary):
        torch.save({"weights": torch.ones(1000)}, temporary)
        with open(temporary, "rb+") as file:
            file.seek(1500)
            file.write(b"\\0\\0\\0\\0")

    with pytest.raises(UsageError, match="cannot be written"):
        checkpoint.write(path, corrupt)
    assert torch.equal(torch.load(path, weights_only=True)["weights"], torch.zeros(1000))


def test_a_disk_that_fills_up_during_a_run_gives_a_line_and_keeps_the_checkpoint_before(tmp_path):
    """The real fault: the operating system refuses to write more than 60 kB to a file, while a checkpoint needs more."""
    train.train(tiny(tmp_path, max_steps=2))
    before = (tmp_path / "checkpoint.pt").read_bytes()
    code = ("import resource, signal, config, train; from support import shapes; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
            "resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000)); shapes.COUNT = {'train': 64, 'test': 64}; "
            "shapes.make.__defaults__ = (64,); "
            f"config.run(lambda: train.main(['--out', {str(tmp_path)!r}, '--resume', '--max-steps', '9', '--override']))")
    assert len(before) > 60_000
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    last = ended.stderr.strip().splitlines()[-1]
    assert ended.returncode == 2 and "checkpoint.pt cannot be written" in last and "held before is kept" in last, ended.stderr
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    assert not list(tmp_path.glob("*.tmp"))


def test_a_truncated_checkpoint_is_refused_in_one_line(tmp_path):
    train.train(tiny(tmp_path, max_steps=2))
    whole = (tmp_path / "checkpoint.pt").read_bytes()
    (tmp_path / "checkpoint.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UsageError, match="cannot be read") as error:
        checkpoint.load_run(tmp_path)
    assert "\\n" not in str(error.value)


class Trap:
    """What a malicious checkpoint holds: unpickling it would create a file."""

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
        checkpoint.load_run(tmp_path)
    assert not (tmp_path / "sprung").exists()
    if kind == "pickle":  # the trap works where it is sprung
        pickle.loads(pickle.dumps(trap))
        assert (tmp_path / "sprung").exists()


def test_override_goes_on_with_other_settings_and_without_it_they_are_named(tmp_path):
    train.train(tiny(tmp_path, max_steps=2))
    arguments = ["--out", str(tmp_path), "--resume", "--lr", "0.001", "--momentum", "0.5"]
    with pytest.raises(UsageError, match="--lr was 0.004, now 0.001; --momentum was 0.99, now 0.5"):
        train.main(arguments)
    with pytest.raises(UsageError, match="--override is for --resume"):
        train.main(["--override"])
    train.main([*arguments, "--max-steps", "5", "--override"])
    went_on = checkpoint.load_checkpoint(tmp_path, "cpu")
    assert went_on["config"]["momentum"] == 0.5 and went_on["progress"]["step"] == 5


def test_a_checkpoint_is_a_zip_file_whose_parts_have_checksums(tmp_path):
    """What the check after writing rests on."""
    torch.save({"a": torch.zeros(3)}, tmp_path / "a.pt")
    assert zipfile.ZipFile(tmp_path / "a.pt").testzip() is None
