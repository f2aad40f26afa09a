"""What a run leaves on disk and how it resumes: nothing is lost when it is stopped or killed.

A file is written beside the old one, flushed, read back, and only then renamed. Files are read with
weights_only=True: a checkpoint from a stranger cannot run code.
"""

import contextlib
import json
import os
import sys
import time
import warnings
import zipfile
from dataclasses import asdict, fields
from pathlib import Path

import filelock  # a requirement of torch
import torch
from tqdm import tqdm

from config import Config, UsageError
from support import distributed

# Settings that may differ when a run resumes. `dataset` is only a name: the images are compared.
FREE = ("out", "device", "workers", "checkpoint_minutes", "measurements", "log_to", "data_dir",
        "dataset", "compile")
PARTS = {"config": dict, "data": dict, "progress": dict, "model": dict, "optimizer": dict,
         "scaler": dict, "generator": torch.Tensor}


def one_line(error):
    """The reason an exception gives, or any text, on one line that can be printed."""
    text = " ".join(str(error).split()).removeprefix("<urlopen error ").removesuffix(">")
    return text.encode(errors="replace").decode() or type(error).__name__


def write(path, save):
    """Call save(temporary path), flush to disk, rename: a reader sees the old file or the new one.

    Raises UsageError, with the old file kept, if the disk is full or the folder not writable.
    """
    path = Path(path)
    temporary = path.with_suffix(path.suffix + ".tmp")
    try:
        save(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        if path.suffix == ".pt" and (damaged := zipfile.ZipFile(temporary).testzip()):
            raise OSError(f"{damaged} reads back differently")  # each part has a checksum
        os.replace(temporary, path)
        if hasattr(os, "O_DIRECTORY"):  # Windows opens no folders
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder)  # the new name, too, is on disk
            os.close(folder)
    except (OSError, RuntimeError, zipfile.BadZipFile) as error:  # RuntimeError: torch's full disk
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        kept = "; what it held before is kept" if path.exists() else ""
        raise UsageError(f"{path} cannot be written ({one_line(error)[:200]}){kept}; free some disk"
                         " space, or choose another folder") from None


@contextlib.contextmanager
def open_folder(config, resume):
    """Within `with`, the run folder of a Config is this run's alone; a new run's has config.json.

    Raises UsageError if it holds a run already, or if another process is writing into it. The
    operating system frees the lock when a process ends, whatever ends it.
    """
    folder = Path(config.out)
    if not distributed.is_first():
        yield folder
        return
    if not resume and (folder / "checkpoint.pt").exists():
        raise UsageError(f"--out {folder} already holds a run; resume it with --resume, or choose "
                         "another --out")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(folder / ".lock")
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise UsageError(f"another process is writing into --out {folder}; wait for it, or choose "
                         "another --out") from None
    except OSError as error:
        raise UsageError(f"--out {folder} cannot be written to ({one_line(error)})") from None
    with lock:
        if not resume:
            write_settings(folder, config)
        try:
            yield folder
        finally:
            lock.release(force=True)


def write_settings(folder, config):
    """Write config.json, for people: a checkpoint has the settings itself."""
    text = json.dumps(asdict(config), indent=2)
    write(folder / "config.json", lambda path: path.write_text(text))


def read(path):
    """The dict in a file of torch.save, on the CPU; UsageError if there is none to be read."""
    try:
        with warnings.catch_warnings():  # the UsageError below says what is wrong
            warnings.simplefilter("ignore")
            return dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # torch raises many kinds for a damaged or an unsafe file
        if isinstance(error, FileNotFoundError):
            raise UsageError(f"{path} does not exist") from None
        known = isinstance(error, OSError)
        why = one_line(error) if known else "damaged, or not written by train.py"
        raise UsageError(f"{path} cannot be read ({why})") from None


def load(folder):
    """A run folder's checkpoint: its Config, a dict about its data and progress, and all its state.

    Raises UsageError if there is none, if it is damaged, or if an older version wrote it.
    """
    path = Path(folder) / "checkpoint.pt"
    if not path.exists():
        raise UsageError(f"{folder} holds no checkpoint.pt; train with: python train.py --out "
                         f"{folder}")
    state = read(path)
    if not all(isinstance(state.get(name), kind) for name, kind in PARTS.items()):
        raise UsageError(f"{path} is not a checkpoint of this version of train.py; train again")
    about = {**state["data"], "progress": state["progress"]}
    return config_from(state["config"], path), about, state


def finished(config, about, progress, weights):
    """What `load` reads of a run that never resumes: there is nothing to train it with."""
    return {"config": asdict(config), "data": about, "progress": progress, "model": weights,
            "optimizer": {}, "scaler": {}, "generator": torch.Generator().get_state()}


def config_from(values, path):
    """The Config that `dataclasses.asdict` wrote; settings that no longer exist are left out."""
    values = {"merge_targets": False, **values}  # what runs did before there was a choice
    known = {f.name: values[f.name] for f in fields(Config) if f.name in values}
    try:
        return Config(**{name: tuple(value) if isinstance(value, list) else value
                         for name, value in known.items()})
    except TypeError:
        raise UsageError(f"{path} holds no settings") from None


def load_weights(module, weights, where):
    """Load a state dict; UsageError if its names or shapes are not those of the module."""
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        raise UsageError(f"the weights in {where} do not fit ({one_line(error)[:200]})") from None


class Run:
    """A run while it trains: what a checkpoint holds, how far it has come, when it was saved.

    step and total count optimizer steps; saved is the step of the checkpoint on disk, or None. All
    crops and masks come from `generator`, which is on the CPU: they are the same on every device.
    """

    def __init__(self, folder, config, model, optimizer, scaler, device, about):
        self.folder, self.config, self.model, self.device = folder, config, model, device
        self.optimizer, self.scaler, self.about = optimizer, scaler, about
        self.generator = torch.Generator().manual_seed(config.seed)
        self.step, self.total, self.saved = 0, 0, None
        self.start(0.0)

    def start(self, seconds):
        """Start the clock, with the seconds that the run has trained before."""
        self.began, self.first_step, self.before = time.perf_counter(), self.step, seconds
        self.last_save, self.cost = self.began, 0.0

    def seconds(self):
        """Seconds of training so far, those before a resume included."""
        return self.before + time.perf_counter() - self.began

    def rate(self):
        """Optimizer steps per second since the run started or resumed."""
        return (self.step - self.first_step) / (time.perf_counter() - self.began)

    def is_due(self):
        """Whether it is time to save; saving takes a fiftieth of the time at most."""
        wait = max(60 * self.config.checkpoint_minutes, 50 * self.cost)
        return time.perf_counter() - self.last_save > wait

    def diverged(self, what):
        """The UsageError of a run whose loss or weights are NaN or infinite."""
        advice = f"a lower --lr (now {self.config.lr:g}) or --clip-grad 1"
        kept = f"nothing was saved yet; start again with {advice}"
        if self.saved is not None:
            kept = (f"{self.folder} keeps the checkpoint of step {self.saved}; resume it with "
                    f"--resume --override and {advice}")
        return UsageError(f"{what} at step {self.step}; {kept}")

    def save(self, final=False):
        """Write checkpoint.pt and encoder.pt; a checkpoint never holds NaN.

        A disk that is full may be put right while the run continues: until the final save there is
        only a warning.
        """
        if not distributed.is_first():
            return
        start = time.perf_counter()
        if not all(p.isfinite().all() for p in self.model.parameters()):
            raise self.diverged("the weights are NaN or infinite")
        shared = {"config": asdict(self.config), "data": self.about}
        progress = {"step": self.step, "total": self.total, "seconds": self.seconds()}
        checkpoint = {
            **shared, "progress": progress, "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict(),
            "generator": self.generator.get_state()}
        encoder = {**shared, "encoder": self.model.target_encoder.state_dict()}
        try:
            write(self.folder / "checkpoint.pt", lambda path: torch.save(checkpoint, path))
            write(self.folder / "encoder.pt", lambda path: torch.save(encoder, path))
            self.saved = self.step
        except UsageError as error:
            if final:
                raise
            tqdm.write(f"warning at step {self.step}: {error}", file=sys.stderr)
        self.last_save = time.perf_counter()
        self.cost = self.last_save - start

    def restore(self, override=False):
        """Load checkpoint.pt, so that the run resumes as if it had not stopped.

        Raises UsageError, naming what differs, if settings or data are not the run's, unless
        `override`; and if the weights do not fit.
        """
        then, about, state = load(self.folder)
        differs = [f"--{f.name.replace('_', '-')} was {getattr(then, f.name)}, now {now}"
                   for f in fields(Config) if f.name not in FREE
                   and (now := getattr(self.config, f.name)) != getattr(then, f.name)]
        # The same images under another name are the same data: their folder was renamed.
        same = about.get("fingerprint") and about["fingerprint"] == self.about.get("fingerprint")
        differs += [f"its {name} was {about[name]}, now {now}"
                    for name, now in self.about.items() if about.get(name, now) != now
                    and not (name == "name" and same)]
        if differs and not override:
            raise UsageError(f"cannot resume {self.folder}: {'; '.join(differs)} (--override "
                             "resumes all the same)")
        load_weights(self.model, state["model"], self.folder)
        try:
            self.optimizer.load_state_dict(state["optimizer"])
        except ValueError as error:
            raise UsageError(f"cannot resume {self.folder}: {one_line(error)}") from None
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self.generator.set_state(state["generator"])
        self.step = self.saved = about["progress"]["step"]
        self.start(about["progress"]["seconds"])
        if distributed.is_first():
            write_settings(self.folder, self.config)  # now that nothing speaks against them
