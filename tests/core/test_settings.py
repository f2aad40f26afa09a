"""Claims about settings: whatever is asked for is done, or refused in one line that names the flag, the value and what is allowed.

First a table of command lines that nobody should get away with; then settings drawn at random. `python tests/test_settings.py 2000 7` makes
2,000 draws from seed 7 and prints how many were trained, how many refused and why, and the command line of every failure.
"""

import collections
import contextlib
import csv
import dataclasses
import io
import json
import math
import pathlib
import pickle
import random
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # run as a script it is not pytest that does this

import config as settings  # noqa: E402
import data  # noqa: E402
import evaluate  # noqa: E402
from extras import methods  # noqa: E402
import predict_and_visualize  # noqa: E402
import train  # noqa: E402

PROGRAMS = {"train": train, "evaluate": evaluate, "predict_and_visualize": predict_and_visualize}
ABSENT = "mps" if torch.cuda.is_available() else "cuda"  # no machine has both
SMALL = "--encoder 16x2x2 --predictor 8x1x2 --batch-size 16 --max-steps 2 --measurements 0 --device cpu"


# --- a small world: few images of every kind, and runs, whole and damaged -----------------------------------------------------


def make_data():
    """In the current folder: an image folder with splits and classes, a flat one, .npz files of grey images and of volumes."""
    noise = np.random.default_rng(0)

    def pixels(*shape):
        return noise.integers(0, 256, shape, dtype=np.uint8)

    for place, count in (("photos/train/cat", 18), ("photos/train/dog", 18), ("photos/val/cat", 4), ("photos/val/dog", 4), ("flat", 36)):
        pathlib.Path(place).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(pixels(16, 16, 3)).save(f"{place}/{i}.png")
    pathlib.Path("empty").mkdir()
    pathlib.Path("file").write_text("not a folder")
    labels = np.arange(400) % 3
    for name, shape, train_n, test_n in (("grey", (12, 12), 400, 60), ("volumes", (8, 8, 8), 48, 1)):
        np.savez(name, train_images=pixels(train_n, *shape), train_labels=labels[:train_n], test_images=pixels(test_n, *shape),
                 test_labels=labels[:test_n])
    np.savez("unlabelled", train_images=pixels(40, 12, 12))
    np.savez("one_class", train_images=pixels(40, 12, 12), train_labels=0 * labels[:40])
    np.savez("float", train_images=pixels(40, 12, 12) / 255)


def make_runs():
    """In the current folder: a run on shapes, one on volumes, a masked autoencoder, and what is left of a run after accidents."""
    for line in ("--out run", "--out mae --method mae", "--out volumes --dataset volumes.npz --image-size 8 --context-size 0 --min-keep 1"):
        assert call("train", SMALL + " " + line)[0] == 0
    whole = pathlib.Path("run/checkpoint.pt").read_bytes()
    for name, file, content in (("unfinished", "checkpoint.pt", None), ("halved", "checkpoint.pt", whole[: len(whole) // 2]),
                                ("emptied", "checkpoint.pt", b""), ("pickled", "checkpoint.pt", pickle.dumps({"model": 1})),
                                ("scribbled", "metrics.csv", b"\xff\x00,1\n2")):
        shutil.copytree("run", name)
        path = pathlib.Path(name, file)
        path.unlink() if content is None else path.write_bytes(content)
    pathlib.Path("stranger").mkdir()
    torch.save({"config": 1, "data": 2, "progress": 3, "model": {}, "optimizer": {}, "generator": 4}, "stranger/checkpoint.pt")


@contextlib.contextmanager
def small_world(folder):
    """Within `with`: 400 shapes instead of 40,000, folders decoded image by image from 17 pixels on, the folder the current one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("support.shapes.COUNT", {"train": 400, "test": 300})
        patch.setattr("support.shapes.make.__defaults__", (100,))
        patch.setattr("support.folder.MEMORY_LIMIT", 36 * 3 * 16 * 16)
        patch.chdir(folder)
        yield


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    with small_world(folder):
        make_data()
        make_runs()
    return folder


@pytest.fixture(autouse=True)
def inside(world):
    with small_world(world):
        yield


def call(program, line):
    """Run a command line in this process: exit code, lines on stderr. What is no UsageError is raised."""
    errors, code = io.StringIO(), 0
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        try:
            settings.run(lambda: PROGRAMS[program].main(shlex.split(line)))
        except SystemExit as ended:
            code = ended.code
    return code, errors.getvalue().splitlines()


# --- command lines that must be refused ---------------------------------------------------------------------------------------

# Program, arguments, and words that the line must hold: flag and value, and what is allowed.
WRONG = [
    # names
    ("train", "--preset shape", "--preset is shape", "shapes, shapes3d, medmnist3d, cifar10", "nearest: shapes"),
    ("train", "--preset SHAPES", "--preset is SHAPES", "nearest: shapes"),
    ("train", "--preset ''", "--preset is empty", "choose one of shapes"),
    ("train", "--method byol", "--method is byol", "choose one of ijepa, mae, supervised"),
    ("train", "--method MAE", "--method is MAE", "nearest: mae"),
    ("train", "--optimizer adamW", "--optimizer is adamW", "nearest: adamw"),
    ("train", "--schedule linear", "--schedule is linear", "cosine, constant"),
    ("train", "--loss l1", "--loss is l1", "smooth_l1, l2"),
    ("train", "--masks grid", "--masks is grid", "blocks, random, raster"),
    ("train", "--mask-mode truncated", "--mask-mode is truncated", "nearest: truncate"),
    ("train", "--targets pixel", "--targets is pixel", "nearest: pixels"),
    ("train", "--precision fp16", "--precision is fp16", "auto, fp32, bf16"),
    ("train", "--device gpu", "--device is gpu", "auto, cpu, cuda, mps"),
    ("train", f"--device {ABSENT}", f"--device {ABSENT}", "it has", "cpu"),
    # flags
    ("train", "--bath-size 8", "--bath-size", "nearest: --batch-size"),
    ("train", "--Batch_Size 8", "--Batch_Size", "nearest: --batch-size"),
    ("train", "--flip yes", "yes", "no flag takes it"),
    ("train", "cifar10", "cifar10", "no flag takes it"),
    ("train", "--epochs", "--epochs", "expected one argument"),
    ("train", "--target-scale 0.2", "--target-scale", "expected 2 arguments"),
    ("train", "--betas 0.9", "--betas", "expected 2 arguments"),
    # numbers
    ("train", "--epochs ten", "--epochs is ten", "a whole number"),
    ("train", "--epochs 1.5", "--epochs is 1.5", "a whole number"),
    ("train", "--epochs 0", "--epochs is 0", "1 or more"),
    ("train", "--batch-size 1e9", "--batch-size is 1e9", "a whole number"),
    ("train", "--batch-size 99999999999999999999", "--batch-size is 99999999999999999999", "2147483647 at most"),
    ("train", "--accumulation -1", "--accumulation is -1", "1 or more"),
    ("train", "--lr 1,5", "--lr is 1,5", "a number"),
    ("train", "--lr ''", "--lr is empty", "a number"),
    ("train", "--lr 0", "--lr is 0.0", "above 0"),
    ("train", "--lr -1e-3", "--lr is -0.001", "above 0"),
    ("train", "--lr nan", "--lr is nan", "finite"),
    ("train", "--lr -inf", "--lr is -inf", "finite"),
    ("train", "--lr-start inf", "--lr-start is inf", "finite"),
    ("train", "--weight-decay -1", "--weight-decay is -1.0", "cannot be negative"),
    ("train", "--clip-grad -1", "--clip-grad is -1.0", "cannot be negative"),
    ("train", "--stochastic-depth 1", "--stochastic-depth is 1.0", "from 0 to below 1"),
    ("train", "--registers -1", "--registers is -1", "cannot be negative"),
    ("train", "--registers 2000000000", "--registers 2000000000", "GB of memory or more"),
    ("train", "--vicreg -0.1", "--vicreg is -0.1", "cannot be negative"),
    ("train", "--method mae --vicreg 0.1", "--vicreg is 0.1", "--method mae makes nothing of it"),
    ("train", "--warmup 40", "--warmup is 40.0", "from 0 to 1"),
    ("train", "--momentum 1.5", "--momentum is 1.5", "from 0 to 1"),
    ("train", "--momentum-final -0.1", "--momentum-final is -0.1", "from 0 to 1"),
    ("train", "--betas 0.9 1", "--betas is 0.9 1.0", "below 1"),
    ("train", "--seed -1", "--seed is -1", "from 0 to 2147483647"),
    ("train", f"--seed {2**63}", f"--seed is {2**63}", "2147483647 at most"),
    ("train", "--max-steps -5", "--max-steps is -5", "cannot be negative"),
    ("train", "--max-minutes inf", "--max-minutes is inf", "finite"),
    ("train", "--checkpoint-minutes -2", "--checkpoint-minutes is -2.0", "cannot be negative"),
    ("train", "--held-out -1", "--held-out is -1", "cannot be negative"),
    ("train", "--measurements -1", "--measurements is -1", "cannot be negative"),
    ("train", "--workers -1", "--workers is -1", "cannot be negative"),
    ("train", "--crop-scale 1 0.3", "--crop-scale is 1.0 0.3", "least <= most"),
    ("train", "--target-scale 0.2 1.5", "--target-scale is 0.2 1.5", "<= 1"),
    ("train", "--context-scale 0 1", "--context-scale is 0.0 1.0", "0 < least"),
    ("train", "--target-aspect 1e-40 1e40", "--target-aspect is 1e-40 1e+40", ".01 <= least <= most <= 100"),
    # sizes
    ("train", "--image-size 0", "--image-size is 0", "1 or more"),
    ("train", "--patch-size 5", "--patch-size is 5", "must divide the --image-size of 24"),
    ("train", "--patch-size 48", "--patch-size is 48", "must divide the --image-size of 24"),
    ("train", "--encoder 64x3", "--encoder is 64x3:", "width x depth x heads"),
    ("train", "--encoder ''", "--encoder is empty", "needs a name"),
    ("train", "--encoder Small", "--encoder is Small", "nearest: small"),
    ("train", "--encoder 64x3x5", "--encoder is 64x3x5", "multiple of 4 and of the number of heads"),
    ("train", "--encoder 66x3x3", "--encoder is 66x3x3", "multiple of 4"),
    ("train", "--encoder 64x0x1", "--encoder is 64x0x1", "at least 1"),
    ("train", "--predictor 32x-2x1", "--predictor is 32x-2x1", "at least 1"),
    ("train", "--encoder 4x20000x1", "--encoder is 4x20000x1", "depth 1000 or less"),
    ("train", "--dataset volumes.npz --image-size 8 --encoder 4x1x1", "--encoder is 4x1x1", "6 or more on 3 axes"),
    ("train", "--batch-size 390", "--batch-size is 390", "360 images to train on"),
    ("train", "--accumulation 30", "--accumulation 30", "360 images to train on", "lower one"),
    # more than any memory holds
    ("train", "--batch-size 2000000000", "--batch-size 2000000000", "GB of memory", "lower"),
    ("train", "--image-size 1000000", "--image-size 1000000", "GB of memory", "lower"),
    ("train", "--dataset photos --image-size 1000000 --patch-size 500000", "--patch-size 500000", "GB of memory", "lower"),
    ("train", "--dataset volumes.npz --image-size 10000 --patch-size 2500", "--image-size 10000", "GB of memory", "lower"),
    ("train", "--encoder 1000000x12x1", "--encoder 1000000x12x1", "GB of memory", "lower"),
    ("train", "--predictor 1000000x2x1", "--predictor 1000000x2x1", "GB of memory", "lower"),
    # masks that this grid does not hold
    ("train", "--patch-size 12", "--context-size is 12", "3 context patches at most", "2x2 grid"),
    ("train", "--patch-size 24 --context-size 0", "--min-keep is 4", "0 context patches at most", "1x1 grid"),
    ("train", "--context-size 33", "--context-size is 33", "27 context patches at most"),
    ("train", "--min-keep 100 --allow-overlap", "--min-keep is 100", "36 context patches at most"),
    ("train", "--target-scale 0.9 1", "--target-scale 1.0 takes 36", "0 context patches at most"),
    ("train", "--num-targets 1000", "--num-targets is 1000", "36 at most"),
    ("train", "--masks random --mask-ratio 1", "--mask-ratio is 1.0", "below 1"),
    ("train", "--masks random --mask-ratio 0.001", "--mask-ratio is 0.001", "0 to predict", "some of each"),
    ("train", "--method mae --mask-ratio 0.99", "--mask-ratio is 0.99", "0 to see", "some of each"),
    ("train", "--masks raster --patch-size 8", "--masks is raster", "two even sides, got 3x3"),
    ("train", "--masks raster --dataset volumes.npz --image-size 8", "--masks is raster", "two even sides, got 2x2x2"),
    # settings that contradict each other, or that nobody would read
    ("train", "--mask-ratio 0.5", "--mask-ratio is 0.5", "for --masks random and --method mae"),
    ("train", "--targets pixels --masked-input", "--masked-input is given", "--targets pixels makes nothing of it"),
    ("train", "--targets pixels --no-target-norm", "--no-target-norm is given", "--targets pixels makes nothing of it"),
    ("train", "--masked-input --no-stop-gradient", "--no-stop-gradient is given", "--masked-input makes nothing of it"),
    ("train", "--method mae --targets pixels", "--targets is pixels", "--method mae makes nothing of it"),
    ("train", "--method supervised --masks raster", "--masks is raster", "--method supervised makes nothing of it"),
    ("train", "--method ijepa-pixels --targets features", "--targets is features", "stands for pixels"),
    ("train", "--method ijepa-one-block --num-targets 4", "--num-targets is 4", "stands for 1"),
    ("train", "--method mae --dataset grey.npz --image-size 12 --patch-size 1", "--patch-size is 1", "2 or more"),
    # data
    ("train", "--dataset ''", "--dataset is empty", "needs a name"),
    ("train", "--dataset CIFAR10", "--dataset 'CIFAR10'", "nearest: cifar10"),
    ("train", "--dataset file", "--dataset 'file'", "an image folder, or an .npz file"),
    ("train", "--dataset nowhere/images", "--dataset nowhere/images", "neither a folder nor an .npz file"),
    ("train", "--dataset nowhere.npz", "--dataset nowhere.npz", "neither a folder nor an .npz file"),
    ("train", "--dataset empty", "no image in empty", ".jpg"),
    ("train", "--dataset float.npz", "float.npz", "float64, expected uint8"),
    ("train", "--split val", "--split of shapes 'val'", "train, test"),
    ("train", "--preset stl10 --split unlabelled", "--split of stl10 'unlabelled'", "nearest: unlabeled"),
    ("train", "--dataset photos --split trian", "--split of folder photos 'trian'", "nearest: train"),
    ("train", "--data-dir ''", "--data-dir is empty", "needs a name"),
    ("train", "--dataset cifar10 --data-dir file", "file", "--data-dir"),
    ("train", "--method supervised --dataset unlabelled.npz --image-size 12", "--method supervised", "unlabelled has none", "two classes"),
    ("train", "--method supervised --dataset one_class.npz --image-size 12", "--method supervised", "one_class has 1", "two classes"),
    # run folders
    ("train", "--out file", "--out file", "cannot be written to"),
    ("train", "--out file/run", "--out file/run", "cannot be written to"),
    ("train", "--out run", "--out run already holds a run", "add --resume"),
    ("train", "--resume", "--resume needs --out FOLDER"),
    ("train", "--resume --out ''", "--resume needs --out FOLDER"),
    ("train", "--resume --out nowhere", "nowhere holds no checkpoint.pt", "train with"),
    ("train", "--resume --out unfinished", "unfinished holds no checkpoint.pt", "train with"),
    ("train", "--resume --out halved", "halved/checkpoint.pt cannot be read", "damaged", "another --out"),
    ("train", "--resume --out emptied", "emptied/checkpoint.pt cannot be read", "damaged", "another --out"),
    ("train", "--resume --out pickled", "pickled/checkpoint.pt cannot be read", "damaged", "another --out"),
    ("train", "--resume --out stranger", "stranger/checkpoint.pt cannot be read", "no checkpoint that train.py wrote"),
    ("train", "--resume --out scribbled", "scribbled/metrics.csv is damaged", "move it away"),
    ("train", "--resume --out run --lr 0.1", "--lr was 0.004, now 0.1", "--override"),
    ("train", "--resume --out run --encoder 32x1x1 --override", "weights of run do not fit", "--encoder"),
    ("train", "--resume --out run --lr -1 --override", "--lr is -1.0", "above 0"),
    ("train", "--override --out run", "--override is for --resume"),
    # evaluate.py
    ("evaluate", "", "name run folders", "--pretrained"),
    ("evaluate", "good --pretrained x", "name run folders", "--pretrained"),
    ("evaluate", "--pretrained x", "--pretrained is x", "--dataset"),
    ("evaluate", "good --out x", "--out is x", "it is for --pretrained"),
    ("evaluate", "--pretrained x --dataset shapes", "'x' is none of", "IN1K-vit.h.14-300e", "encoder.pt"),
    ("evaluate", "nowhere", "nowhere holds no checkpoint.pt", "train with"),
    ("evaluate", "photos", "photos holds no checkpoint.pt", "train with"),
    ("evaluate", "halved", "halved/checkpoint.pt cannot be read", "damaged"),
    ("evaluate", "run nowhere", "nowhere holds no checkpoint.pt"),
    ("evaluate", "run volumes", "runs of different data", "run: shapes", "volumes: volumes.npz", "--dataset"),
    ("evaluate", "run --train-images -1", "--train-images is -1", "0 (all) or more"),
    ("evaluate", "run --train-images 1", "--train-images is 1", "two images of one"),
    ("evaluate", "run --train-images ten", "--train-images is ten", "a whole number"),
    ("evaluate", "run --test-images 1", "--test-images is 1", "2 or more"),
    ("evaluate", "run --attentive -1", "--attentive is -1", "0 (none) or more"),
    ("evaluate", "run --finetune 2.5", "--finetune is 2.5", "a whole number"),
    ("evaluate", "run --finetune 1 --layer-decay 0", "--layer-decay is 0.0", "above 0 and at most 1"),
    ("evaluate", "run --finetune 1 --layer-decay 2", "--layer-decay is 2.0", "above 0 and at most 1"),
    ("evaluate", "run --finetune 1 --smoothing 1", "--smoothing is 1.0", "below 1"),
    ("evaluate", "run --smoothing nan", "--smoothing is nan", "below 1"),
    ("evaluate", "run --seed -1", "--seed is -1", "from 0 to 2147483647"),
    ("evaluate", f"run --seed {2**70}", f"--seed is {2**70}", "from 0 to 2147483647"),
    ("evaluate", "run --device gpu", "--device", "'gpu'", "cpu"),
    ("evaluate", f"run --device {ABSENT}", f"--device {ABSENT}", "it has", "cpu"),
    ("evaluate", "run --dataset ''", "--dataset is empty", "needs a name"),
    ("evaluate", "run --dataset Shapes", "--dataset 'Shapes'", "nearest: shapes"),
    ("evaluate", "run --dataset grey.npz", "grey has images of 1 channels", "run takes 3", "--dataset"),
    ("evaluate", "volumes --dataset grey.npz", "1 channels and 2 axes", "volumes takes 1 and 3", "--dataset"),
    ("evaluate", "run --dataset flat", "needs labels", "flat has none", "--dataset"),
    ("evaluate", "volumes", "volumes.npz has one test image", "two or more"),
    ("evaluate", "run --tran-images 5", "--tran-images", "nearest: --train-images"),
    ("evaluate", "run --compare nowhere", "nowhere holds no checkpoint.pt"),
    ("evaluate", "run --compare volumes", "shapes has images of 3 channels and 2 axes", "volumes takes 1 and 3"),
    ("evaluate", "run mae --compare run", "--compare is run", "one RUN, not with 2"),
    ("evaluate", "run --compare mae --test-images 5", "--test-images is 5", "11 test images or more"),
    # predict_and_visualize.py
    ("predict_and_visualize", "", "RUN", "required"),
    ("predict_and_visualize", "nowhere", "nowhere holds no checkpoint.pt", "train with"),
    ("predict_and_visualize", "emptied", "emptied/checkpoint.pt cannot be read", "damaged"),
    ("predict_and_visualize", "run mae", "mae", "no flag takes it"),
    ("predict_and_visualize", "run --images 0", "--images is 0", "250 or more"),
    ("predict_and_visualize", "mae --images many", "--images is many", "a whole number"),
    ("predict_and_visualize", "run --tsne-images 1", "--tsne-images is 1", "0 (all) or 100 or more"),
    ("predict_and_visualize", "mae --tsne-images -1", "--tsne-images is -1", "0 (all) or 100 or more"),
    ("predict_and_visualize", "run --seed -1", "--seed is -1", "from 0 to 2147483647"),
    ("predict_and_visualize", "run --data-dir ''", "--data-dir is empty", "needs a name"),
    ("predict_and_visualize", "run --image 500", "--image", "nearest: --images"),
    ("predict_and_visualize", "volumes", "volumes.npz has 1 test images", "the figures need 256 or more"),
]


def refused(code, lines, words):
    """Whether this is a refusal as it should be: exit code 2 and one line of at most 300 characters that holds the words."""
    return code == 2 and len(lines) == 1 and lines[0].startswith("error: ") and len(lines[0]) <= 300 and all(w in lines[0] for w in words)


@pytest.mark.parametrize("program,line,words", [pytest.param(p, line, words, id=f"{p} {line}") for p, line, *words in WRONG])
def test_wrong_settings_get_one_clear_line_and_exit_code_2(program, line, words):
    before = sorted(pathlib.Path().rglob("*"))
    if program == "train" and "--resume" not in line:
        line = f"{SMALL} {line}" + ("" if "--out" in line else " --out new")
    code, lines = call(program, line)
    assert refused(code, lines, words), (code, lines)
    assert sorted(pathlib.Path().rglob("*")) == before  # nothing is left behind by what never began


def test_the_table_is_long_enough_to_mean_something():
    count = collections.Counter(program for program, *_ in WRONG)
    assert count["train"] >= 45 and count["evaluate"] >= 12 and count["predict_and_visualize"] >= 8 and len(set(WRONG)) == len(WRONG)


def test_the_programs_themselves_end_with_that_line_and_exit_code_2():
    """The same as a user meets it: another process, no traceback. Started side by side, for they take seconds to import torch."""
    chosen = [next(row for row in WRONG if row[0] == program and row[1]) for program in PROGRAMS]
    started = [subprocess.Popen([sys.executable, str(ROOT / f"{program}.py"), *shlex.split(line)], stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE, text=True) for program, line, *_ in chosen]
    for process, (_, line, *words) in zip(started, chosen):
        out, errors = process.communicate(timeout=120)
        assert refused(process.returncode, errors.splitlines(), words) and out == "", (line, errors)


def test_a_run_that_diverges_ends_with_a_line_that_says_what_to_try():
    for i, flags in enumerate(("--lr 1e30 --optimizer sgd", "--lr 1e300", "--lr 1e30 --max-steps 1 --measurements 1")):
        code, lines = call("train", f"{SMALL} --warmup 0 {flags} --out diverged{i}")
        assert code == 2 and lines[-1].startswith("error: ") and "lower --lr" in lines[-1].replace("a lower", "lower"), lines


def test_memory_that_is_too_small_is_said_in_a_line(monkeypatch):
    """Where it could not be foreseen: the words are those of torch on a CPU, torch on a GPU, and Python."""
    for error in (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."),
                  torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), MemoryError()):
        monkeypatch.setattr(train, "time_step", lambda *_, error=error: (_ for _ in ()).throw(error))
        code, lines = call("train", f"{SMALL} --out new")
        assert code == 2 and len(lines) == 1 and "memory" in lines[0] and "--batch-size" in lines[0], lines
    monkeypatch.setattr(train, "time_step", lambda *_: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError):  # a mistake in the program keeps its traceback
        call("train", f"{SMALL} --out new")


@pytest.mark.parametrize("name", settings.PRESETS)
def test_what_is_refused_for_lack_of_memory_could_not_have_run(name):
    """The bytes counted are never more than weights, gradients, moments and images take, and not far below: a batch of one image."""
    config = settings.from_preset(name, batch_size=1)
    channels, axes = data.NAMES.get(config.dataset, (3, 2))
    with torch.device("meta"):
        model = methods.build(config, channels, axes)
    weights = sum(4 * p.numel() * (4 if p.requires_grad else 1) for p in model.parameters())
    batch = 4 * channels * config.image_size**axes + 2 * math.prod(model.context_encoder.grid) * model.context_encoder.width
    assert 0.95 * (weights + batch) < methods.least_memory(config, channels, axes) <= weights + batch


def test_extremes_that_make_sense_are_accepted():
    for i, flags in enumerate((
            "--max-minutes 1e308", "--max-minutes 1e-9", "--workers 1000000", "--held-out 2000000000", "--measurements 1000000000",
            "--target-scale 1 1 --allow-overlap", "--clip-grad 1e-300", "--warmup 1")):
        assert call("train", f"{SMALL} {flags} --out extreme{i}")[0] == 0, flags


# --- settings drawn at random -----------------------------------------------------------------------------------------------------

DATASETS = {  # image sizes, patch sizes, splits
    "shapes": ((24, 12, 32), (4, 6, 8, 2), ("train", "test")),
    "grey.npz": ((12, 16, 8), (2, 4, 1), ("train", "test")),
    "volumes.npz": ((8, 12), (2, 4), ("train",)),
    "photos": ((16, 32), (4, 8), ("train", "val", "test")),
    "flat": ((16, 24), (4, 2), ("train",)),
}
SENSIBLE = {  # what a draw picks from; numbers as they are typed
    "preset": list(settings.PRESETS), "data_dir": ["data", "my data"], "crop_scale": ["1 1", "0.3 1", "0.5 0.5"], "flip": [True, False],
    "num_targets": ["1", "2", "4", "6"], "target_scale": ["0.15 0.2", "0.05 0.1", "0.2 0.4"], "target_aspect": ["0.75 1.5", "1 1", "0.2 5"],
    "context_scale": ["0.85 1", "0.3 0.6", "1 1"], "context_size": ["0", "0", "1", "3"], "mask_mode": ["pad", "truncate"],
    "min_keep": ["1", "2", "4"], "allow_overlap": [True, False], "encoder": ["16x1x2", "8x2x1", "24x2x4", "12x3x3"],
    "predictor": ["8x1x2", "12x2x3", "16x1x1"], "loss": ["l2", "smooth_l1"], "method": ["ijepa"] * 8 + list(settings.METHODS),
    "targets": ["features", "pixels"], "masks": ["blocks", "blocks", "random", "raster"], "mask_ratio": ["0.5", "0.6", "0.9"],
    "masked_input": [False, False, True], "stop_gradient": [True, True, False], "target_norm": [True, False],
    "target_layers": ["1", "1", "2"], "registers": ["0", "2"], "stochastic_depth": ["0", "0.5"], "vicreg": ["0", "0.1"],
    "epochs": ["1", "3", "100"],
    "batch_size": ["1", "4", "16"], "accumulation": ["1", "1", "2"], "optimizer": ["adamw", "adam", "sgd"],
    "schedule": ["cosine", "constant"], "betas": ["0.9 0.999", "0 0", "0.9 0.95"],
    "lr": ["1e-3", "0.1", "1e-8"], "lr_start": ["0", "1e-4", "0.01"], "lr_final": ["0", "1e-6"],
    "warmup": ["0", "0.5", "1"], "weight_decay": ["0", "0.04"], "weight_decay_final": ["0", "0.4"], "decay_all": [True, False],
    "clip_grad": ["0", "1", "1e-6"], "momentum": ["0", "0.99", "1"], "momentum_final": ["0", "1"], "held_out": ["0", "32", "512"],
    "measurements": ["0", "1", "5"], "seed": ["0", "1", "2147483647"], "device": ["auto", "cpu", "cpu"],
    "precision": ["auto", "fp32", "bf16"], "recompute": [True, False], "compile": [False], "workers": ["0", "1", "8"],
    "max_steps": ["2", "2", "2", "1", "3"], "max_minutes": ["0", "10", "0.001"],
    "checkpoint_minutes": ["2", "0", "1e9"], "deterministic": [True, False], "tensorboard": [False, False, True],
    "wandb": ["", "", "", "", "students"], "out": ["out/run", "out/a run", "out/été", "out/1/2/3"],
}
NUMBERS = ["-1", "0", "1", "2", "3", "7", "1000", "2147483647", "99999999999", "0.5", "1e-30", "1e30", "1e308", "nan", "inf", "-inf",
           "-1e-3", "", "ten"]
ODD = {  # what may stand in place of one of them; all other fields are numbers
    "pair": ["0 1", "1 0.5", "0.5", "nan 1", "1e-9 1", "1e-300 1e300", "1 1 1", "-1 1", "0.999 0.999", "1e-9 1e-9", "a b"],
    "size": ["0x1x1", "16x1", "16x1x3", "18x1x1", "4x1x1", "4x30x4", "x", "tiny", "Tiny", "100000x12x1", "8x5000x1", "", "16X1X2"],
    "word": ["", "auto", "CPU", "ADAM", "mae", "shape", "pixel", "none", "gpu", ABSENT, "random", "supervised", "bf16"],
    "bounded": ["-1", "7", "1.5", "nan", "-inf", "", "ten", "99999999999"],  # the others would be done, in hours
    "path": ["", "file", "file/below", "run", "nowhere/a.npz", "float.npz", "one_class.npz", "empty", "unlabelled.npz", "/dev/null/x"],
}
FIELDS = {
    "pair": ("crop_scale", "target_scale", "target_aspect", "context_scale", "betas"), "size": ("encoder", "predictor"),
    "word": ("preset", "split", "mask_mode", "loss", "method", "targets", "masks", "optimizer", "schedule", "device", "precision"),
    "path": ("out", "dataset", "data_dir"),
    "bounded": ("max_steps", "image_size"),
}
# Without these a draw would take minutes, or be the preset's size and no more.
ALWAYS = ("dataset", "image_size", "patch_size", "encoder", "predictor", "batch_size", "accumulation", "max_steps", "context_size",
          "min_keep", "split", "out")


def draw(rng):
    """The arguments of a random training run, a list of words: sensible values of some fields; in half of the draws one or two are odd."""
    dataset = rng.choice(list(DATASETS))
    image_sizes, patch_sizes, splits = DATASETS[dataset]
    values = {name: rng.choice(choices) for name, choices in SENSIBLE.items()}
    values |= {"dataset": dataset, "image_size": str(rng.choice(image_sizes)), "patch_size": str(rng.choice(patch_sizes)),
               "split": rng.choice(splits)}
    given = {name for name in values if name in ALWAYS or rng.random() < 0.4}
    if values["method"] != "ijepa" and "method" in given and rng.random() < 0.9:  # what a method stands for need not be said again
        given -= {"targets", "masks", "masked_input", "stop_gradient", "target_norm", "target_layers", "vicreg", "num_targets",
                  "momentum", "momentum_final"}
    if "targets" in given and values["targets"] == "pixels" and rng.random() < 0.9:  # which these say nothing of
        given -= {"masked_input", "stop_gradient", "target_norm", "target_layers"}
    read = ("masks" in given and values["masks"] == "random") or ("method" in given and values["method"] == "mae")
    if read or rng.random() < 0.9:  # mask_ratio is for those two, and refused without
        given = given | {"mask_ratio"} if read else given - {"mask_ratio"}
    for _ in range(rng.choice((0, 0, 0, 1, 1, 2))):
        name = rng.choice(list(values))
        given.add(name)
        if not isinstance(values[name], bool):
            values[name] = rng.choice(next((ODD[kind] for kind, names in FIELDS.items() if name in names), NUMBERS))
    words = []
    for name in rng.sample(sorted(given), len(given)):
        flag = name.replace("_", "-")
        if isinstance(values[name], bool):
            words.append(f"--{flag}" if values[name] else f"--no-{flag}")
        else:
            words += [f"--{flag}", *(values[name].split(" ") if name in FIELDS["pair"] else [values[name]])]
    return words


class Slow(BaseException):
    """Raised in a draw that hangs; no program catches it. Five minutes, for a busy machine makes seconds long."""


def too_slow(*_):
    raise Slow("took more than five minutes")


def attempt(words):
    """Train as drawn, then remove what was written: ("trained", its Config as a dict), ("refused", the line), or ("failed", why)."""
    known = set(pathlib.Path().rglob("*"))
    if hasattr(signal, "SIGALRM"):
        signal.signal(signal.SIGALRM, too_slow)
        signal.setitimer(signal.ITIMER_REAL, 300, 5)  # and again every 5 seconds, should it end in a __del__
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            code, lines = call("train", shlex.join(words))
        unclear = [str(warning.message) for warning in caught if not issubclass(warning.category, DeprecationWarning)]
        errors = [line for line in lines if line.startswith("error: ")]
        if unclear:
            return "failed", f"warns: {unclear[0]}"
        if code == 2 and len(errors) == 1 and lines[-1] == errors[0] and len(errors[0]) < 400:
            return "refused", errors[0]
        if code:
            return "failed", f"exit code {code}: {lines}"
        folder = next(path for path in set(pathlib.Path().rglob("*")) - known if path.name == "metrics.csv").parent
        losses = [float(row["loss"]) for row in csv.DictReader(open(folder / "metrics.csv")) if row["loss"]]
        steps = torch.load(folder / "checkpoint.pt", weights_only=True)["progress"]["step"]
        if not losses or not all(map(math.isfinite, losses)) or len(losses) != steps:
            return "failed", f"losses {losses} of {steps} steps"
        return "trained", json.loads((folder / "config.json").read_text())
    except Exception as error:
        return "failed", f"{type(error).__name__}: {error}"
    except Slow as error:
        return "failed", str(error)
    finally:
        if hasattr(signal, "SIGALRM"):
            signal.setitimer(signal.ITIMER_REAL, 0)
        for path in sorted(set(pathlib.Path().rglob("*")) - known, reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()


def fuzz(count, seed=0, say=lambda text: None):
    """Draw and attempt: what was trained (Configs), what was refused (lines), what failed (command line, why)."""
    rng, found = random.Random(seed), {"trained": [], "refused": [], "failed": []}
    for number in range(count):
        words = draw(rng)
        kind, what = attempt(words)
        found[kind].append((f"python train.py {shlex.join(words)}", what) if kind == "failed" else what)
        if kind == "failed":
            say(f"{number}: {what}\n    {found[kind][-1][0]}")
        elif number % 100 == 99:
            say(f"{number + 1}: " + ", ".join(f"{len(part)} {kind}" for kind, part in found.items()))
    return found


def unvaried(configs):
    """Fields that have the same value in all of these Configs, but for `wandb`, whose package is not installed here and which is refused,
    and `compile`, which would take a minute for each draw (test_train.py trains with it)."""
    names = [f.name for f in dataclasses.fields(settings.Config) if f.name not in ("wandb", "compile")]
    return [name for name in names if len({str(config[name]) for config in configs}) < 2]


def test_settings_drawn_at_random_train_or_are_refused_in_a_line():
    found = fuzz(100)
    assert found["failed"] == []
    assert len(found["trained"]) >= 40 and unvaried(found["trained"]) == [] and len(found["refused"]) >= 10


if __name__ == "__main__":
    draws, seed = map(int, (*sys.argv[1:], *("1000", "0")[len(sys.argv) - 1:]))
    with tempfile.TemporaryDirectory() as folder, small_world(folder):
        make_data()
        make_runs()
        found = fuzz(draws, seed, lambda text: print(text, flush=True))
    print(f"{len(found['trained'])} trained, {len(found['refused'])} refused, {len(found['failed'])} failed; never varied in what trained: "
          f"{', '.join(unvaried(found['trained'])) or 'no field'}")
    for reason, count in collections.Counter(" ".join(line.split()[1:3]) for line in found["refused"]).most_common():
        print(f"{count:6} refused: {reason}")
    sys.exit(bool(found["failed"]))
