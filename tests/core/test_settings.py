"""Claims about settings: what is asked for is done, or refused in one line."""

import dataclasses
import pathlib
import re
import shlex
import subprocess
import sys
import types

import pytest
from torch._dynamo.exc import BackendCompilerFailed
from torch._inductor.exc import GPUTooOldForTriton, TritonMissing

import config as settings
import train
from config import PRESETS, Config, UsageError, from_preset
from support import command_line

ROOT = pathlib.Path(__file__).parents[2]
P100 = types.SimpleNamespace(name="Tesla P100", major=6, minor=0)  # a GPU of Kaggle's

# A command line of train.py, and words that its one line holds.
WRONG = [
    ("--lr ten", "--lr is 'ten'", "a number, such as 0.5"),
    ("--lr nan", "--lr is nan", "a finite number"),
    ("--lr inf", "--lr is inf", "a finite number"),
    ("--lr -1e-3", "--lr is -0.001", "a finite number, 0 or more"),
    ("--lr 0", "--lr is 0.0", "more than 0"),
    ("--epochs 2.5", "--epochs is '2.5'", "a whole number"),
    ("--epochs 0", "--epochs is 0", "more than 0"),
    ("--epochs -3", "--epochs is -3", "from 0 to 2147483647"),
    ("--epochs 99999999999", "--epochs is 99999999999", "from 0 to 2147483647"),
    ("--batch-size 0", "--batch-size is 0", "more than 0"),
    ("--accumulation 0", "--accumulation is 0", "more than 0"),
    ("--seed -1", "--seed is -1", "from 0"),
    ("--weight-decay -1", "--weight-decay is -1.0", "0 or more"),
    ("--clip-grad -1", "--clip-grad is -1.0", "0 or more"),
    ("--warmup 1.5", "--warmup is 1.5", "from 0 to 1"),
    ("--momentum 1.1", "--momentum is 1.1", "from 0 to 1"),
    ("--momentum-final -0.1", "--momentum-final is -0.1", "0 or more"),
    ("--betas 0.9 1", "--betas is 0.9 1.0", "below 1"),
    ("--betas 0.9", "--betas", "expected 2 arguments"),
    ("--crop-scale 1 0.3", "--crop-scale is 1.0 0.3", "the smaller first"),
    ("--crop-scale 0 1", "--crop-scale is 0.0 1.0", "the smaller first"),
    ("--target-scale 0.3 0.2", "--target-scale is 0.3 0.2", "the smaller first"),
    ("--target-aspect 0 1", "--target-aspect is 0.0 1.0", "from 0.01 to 100"),
    ("--context-scale 0.5 2", "--context-scale is 0.5 2.0", "from 1e-06 to 1"),
    ("--num-targets 0", "--num-targets is 0", "more than 0"),
    ("--context-size 36", "on a grid of 6x6 patches", "lower --context-size"),
    ("--patch-size 5", "--patch-size is 5", "a divisor of the image size, 24 pixels"),
    ("--patch-size 24", "--num-targets is 4", "from 1 to 1"),
    ("--encoder vast", "--encoder is 'vast'", "width x depth x heads"),
    ("--encoder 32x1x5", "--encoder is '32x1x5'", "divisible by 4 and by the number of heads"),
    ("--encoder 32x0x4", "--encoder is '32x0x4'", "width x depth x heads"),
    ("--predictor 10x1x1", "--predictor is '10x1x1'", "divisible by 4"),
    ("--loss l1", "--loss is 'l1'", "smooth_l1, l2"),
    ("--device gpu", "--device is 'gpu'", "auto, cpu, cuda, mps"),
    ("--device cuda", "--device is 'cuda'", "expected cpu"),
    ("--precision bf61", "--precision is 'bf61'", "did you mean bf16?"),
    ("--preset cifar", "--preset is 'cifar'", "did you mean cifar10?"),
    ("--datset shapes", "unrecognized arguments: --datset", "did you mean --dataset?"),
    ("--dataset shape", "--dataset is 'shape'", "did you mean shapes?"),
    ("--dataset nowhere/photos", "nowhere/photos is neither"),
    ("--dataset ''", "--dataset is ''"),
    ("--split trian", "--split of shapes is 'trian'", "did you mean train?"),
    ("--log-to wandb", "--log-to is 'wandb'", "wandb:PROJECT"),
    ("--batch-size 100000", "39488 images to train on", "lower --batch-size"),
    ("--resume --out nowhere", "nowhere holds no checkpoint.pt", "train with"),
    ("--override", "--override is for --resume"),
]


@pytest.mark.parametrize("line, words", [(line, words) for line, *words in WRONG],
                         ids=[row[0] for row in WRONG])
def test_wrong_settings_are_refused_in_one_line(tmp_path, monkeypatch, line, words):
    if torch_has_cuda() and "--device cuda" in line:
        pytest.skip("this machine has cuda")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError) as error:
        train.main(["--device", "cpu", *shlex.split(line)])
    message = str(error.value)
    assert "\n" not in message and len(message) < 400
    assert all(word in message for word in words), message
    assert not list(tmp_path.rglob("checkpoint.pt"))


def torch_has_cuda():
    import torch

    return torch.cuda.is_available()


@pytest.mark.parametrize("changes, words", [
    (dict(flip="no"), "--flip is 'no', expected True or False"),
    (dict(flip=1), "--flip is 1, expected True or False"),
    (dict(epochs=2.5), "--epochs is 2.5, expected a whole number"),
    (dict(epochs=True), "--epochs is True, expected a whole number"),
    (dict(lr="0.1"), "--lr is '0.1', expected a finite number"),
    (dict(target_scale=[0.1, 0.2]), "--target-scale is .*, expected two finite numbers"),
    (dict(target_scale=(0.1,)), "--target-scale is 0.1, expected two finite numbers"),
    (dict(out=None), "--out is None, expected a string"),
    (dict(epoch=3), "the setting's name is 'epoch'.*did you mean epochs?"),
])
def test_types_and_names_are_checked_from_python_too(changes, words):
    with pytest.raises(UsageError, match=words):
        from_preset("shapes", **changes)


def test_the_programs_end_with_that_line_and_exit_status_2():
    """As a user meets it: another process, no traceback."""
    for program, line, word in (("train", "--lr ten", "--lr is 'ten'"),
                                ("evaluate", "nowhere", "nowhere"),
                                ("predict_and_visualize", "nowhere", "nowhere")):
        ended = subprocess.run([sys.executable, str(ROOT / f"{program}.py"), *line.split()],
                               capture_output=True, text=True, timeout=120)
        lines = ended.stderr.splitlines()
        assert ended.returncode == 2 and ended.stdout == "" and len(lines) == 1, ended.stderr
        assert lines[0].startswith("error: ") and word in lines[0]


@pytest.mark.parametrize("error, words", [
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
     "out of memory; lower --batch-size"),
    (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), "out of memory"),
    (MemoryError(), "out of memory"), (OSError(28, "No space left on device"), "No space left"),
    (RuntimeError("CUDA error: no kernel image is available for execution on the device\nCUDA "
                  "kernel errors might be reported elsewhere"), "not built for this GPU; try"),
    (GPUTooOldForTriton(P100, None), "CUDA capability 6.0); leave out --compile"),
    (TritonMissing(None), "Cannot find a working triton"),
    (BackendCompilerFailed(print, ValueError("no g++"), None), "ValueError: no g++); leave out")])
def test_what_the_user_can_put_right_is_one_line(capsys, error, words):
    def main():
        raise error

    with pytest.raises(SystemExit, match="2"):
        command_line.run(main)
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and words in said


def test_a_mistake_in_the_program_keeps_its_traceback():
    def main():
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError):
        command_line.run(main)


def test_there_are_forty_settings_at_most_each_with_a_comment_and_each_read_somewhere():
    names = [f.name for f in dataclasses.fields(Config)]
    sources = "".join(path.read_text() for path in (*ROOT.glob("*.py"), *ROOT.glob("support/*.py")))
    assert len(names) <= 40
    assert all(f.metadata["comment"] for f in dataclasses.fields(Config))
    assert [name for name in names if not re.search(rf"(config|Config)\.{name}\b", sources)] == []


def test_help_shows_every_setting_with_its_comment_and_default(capsys):
    with pytest.raises(SystemExit, match="0"):
        train.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert all(f"--{f.name.replace('_', '-')}" in text for f in dataclasses.fields(Config))
    assert "EMA momentum at the first step (paper .996) [0.995]" in text


@pytest.mark.parametrize("changes", [
    {}, dict(encoder="192x6x3", lr=0.1, flip=True, crop_scale=(0.5, 1.0), out="runs/my run")])
@pytest.mark.parametrize("name", PRESETS)
def test_a_run_s_command_trains_with_the_same_settings(name, changes):
    config = from_preset(name, **changes)
    words = shlex.split(command_line.command(config))
    assert words[:2] == ["python", "train.py"]
    assert command_line.parse(words[2:], "").config == config


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_valid_and_shapes_is_the_default(name):
    assert from_preset(name).out == f"runs/{name}"
    assert dataclasses.replace(Config(), out="runs/shapes") == from_preset("shapes")
    assert settings.PRESETS["shapes"] == {}
