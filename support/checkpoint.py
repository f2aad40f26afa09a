"""What a run leaves on disk and how it is taken up again: nothing is lost when it is stopped, killed, or short of disk.

A file is written beside the old one, flushed, read back, and only then given its name. Files are read with `weights_only=True`, so that
a checkpoint from a stranger cannot run code.
"""

import os
import pathlib
import sys
import time
import warnings
import zipfile
from dataclasses import asdict, dataclass

import torch
from tqdm import tqdm

import config as settings
import data
from extras import methods
from support import distributed as parallel
from config import UsageError

# Fields that may differ between a run and its continuation: they cannot change its result, or what they name is compared itself.
FREE_ON_RESUME = ("out", "device", "workers", "checkpoint_minutes", "measurements", "deterministic", "tensorboard", "wandb", "data_dir",
                  "dataset", "recompute", "compile")
# What a checkpoint holds.
PARTS = {"config": dict, "data": dict, "progress": dict, "model": dict, "optimizer": dict, "generator": torch.Tensor}


@dataclass
class Progress:
    """How far a run has come: optimizer steps done, steps planned, seconds of training so far."""

    step: int = 0
    total: int = 0
    seconds: float = 0.0


# --- writing -------------------------------------------------------------------------------------------------------------


def write(path, save):
    """Call save(temporary path), flush to disk, rename: a reader finds the old file or the new one, never half of one.

    Raises UsageError, the old file left as it was, where the disk is full or the folder cannot be written to.
    """
    path = pathlib.Path(path)
    temporary = path.with_suffix(path.suffix + ".tmp")
    try:
        save(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        if path.suffix == ".pt" and (damaged := zipfile.ZipFile(temporary).testzip()):  # each part has a checksum
            raise OSError(f"what was read back of {damaged} is not what was written")
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY) if hasattr(os, "O_DIRECTORY") else None  # Windows opens no folders
        if folder is not None:
            os.fsync(folder)  # the new name, too, is on disk
            os.close(folder)
    except (OSError, RuntimeError, zipfile.BadZipFile) as error:  # torch turns a full disk into a RuntimeError
        temporary.unlink(missing_ok=True)
        kept = "; what it held before is kept" if path.exists() else ""
        why = data.one_line(error)[:200]
        raise UsageError(f"{path} cannot be written ({why}){kept}; free some disk, or choose another --out") from None


def torch_generator(device):
    """The module of torch with get_rng_state and set_rng_state of a device."""
    return {"cuda": torch.cuda, "mps": torch.mps}.get(device.type, torch)


def save_checkpoint(folder, config, model, optimizer, generator, progress, about):
    """Write checkpoint.pt, with everything the run needs to go on as if it had not stopped, and encoder.pt, its result.

    The place in the data follows from the step and the seed; crops and masks come from the one generator, which blocks stochastic depth
    skips from torch's own.
    """
    about = {**about, "device": generator.device.type}
    checkpoint = {
        "config": asdict(config), "data": about, "progress": asdict(progress), "model": model.state_dict(),
        "optimizer": optimizer.state_dict(), "generator": generator.get_state(),
        "torch_generator": torch_generator(generator.device).get_rng_state(),
    }
    write(folder / "checkpoint.pt", lambda path: torch.save(checkpoint, path))
    encoder = {"config": asdict(config), "data": about, "encoder": model.target_encoder.state_dict()}
    write(folder / "encoder.pt", lambda path: torch.save(encoder, path))


class Saver:
    """Saves a run every `checkpoint_minutes`, or more rarely where that would take more than a fiftieth of the time.

    `step`: the optimizer step that checkpoint.pt on disk holds, None where there is none. Of several processes only the first saves.
    """

    def __init__(self, *run):
        self.run, self.last, self.cost = run, time.perf_counter(), 0.0
        self.step = run[5].step or None

    def save(self):
        """Save now, unless a weight is no number: what is on disk is then better. Raises UsageError where the disk will not take it."""
        folder, config, model, optimizer, generator, progress, about = self.run
        if not parallel.first() or not all(p.isfinite().all() for p in model.parameters()):
            return
        start = time.perf_counter()
        save_checkpoint(folder, config, model, optimizer, generator, progress, about)
        self.step, self.last = progress.step, time.perf_counter()
        self.cost = self.last - start

    def save_if_due(self):
        """Save if it is time. A full disk may be put right while the run goes on, so it is only warned of."""
        _, config, *_, progress, _ = self.run
        if time.perf_counter() - self.last < max(60 * config.checkpoint_minutes, 50 * self.cost):
            return
        try:
            self.save()
        except UsageError as error:
            self.last = time.perf_counter()
            again = f"tried again in {config.checkpoint_minutes:g} minutes"
            tqdm.write(f"warning at step {progress.step:,}: {error}; {again}", file=sys.stderr)


# --- reading -------------------------------------------------------------------------------------------------------------


def load_checkpoint(folder, device):
    """The dict that save_checkpoint wrote. Raises UsageError where there is none or it cannot be read."""
    path = pathlib.Path(folder) / "checkpoint.pt"
    if not path.exists():
        raise UsageError(f"{folder} holds no checkpoint.pt; train with `python train.py --out {folder}` first")
    try:
        with warnings.catch_warnings():  # what torch thinks of a strange file is no help to whoever gave it
            warnings.simplefilter("ignore")
            checkpoint = dict(torch.load(path, map_location=device, weights_only=True))
        if not all(isinstance(checkpoint[name], kind) for name, kind in PARTS.items()):
            raise TypeError
        return checkpoint
    except Exception as error:  # torch raises many kinds for a damaged or an unsafe file
        why = data.one_line(error) if isinstance(error, OSError) else "it is damaged, or no checkpoint that train.py wrote"
        raise UsageError(f"{path} cannot be read ({why}); train again with another --out") from error


def load_run(folder, device="cpu"):
    """A finished or unfinished run, ready to use: the model in eval mode, its Config, and a dict with "name", "channels", "axes" and
    "classes" of its data and its "progress" (step, total, seconds)."""
    checkpoint = load_checkpoint(folder, device)
    config, about = settings.from_dict(checkpoint["config"]), {**checkpoint["data"], "progress": checkpoint["progress"]}
    try:
        model = methods.build(config, about["channels"], about["axes"], about["classes"]).to(device)
        model.load_state_dict(checkpoint["model"])
    except (KeyError, RuntimeError):
        raise UsageError(f"{folder} holds weights that are not those of its settings; train again with another --out") from None
    return model.eval(), config, about


# --- going on ------------------------------------------------------------------------------------------------------------


def resumed_config(arguments):
    """The Config of the run in --out, with the flags given now in place of its own; `restore` compares the two."""
    stored = load_checkpoint(arguments.out, "cpu")["config"]
    return settings.from_dict({**stored, **settings.given(arguments)})


def restore(folder, config, device, model, optimizer, generator, about, override=False):
    """Load checkpoint.pt into what is given and return its Progress.

    Raises UsageError, naming what differs, where settings, data or device are not the run's, unless `override`; and where the weights
    do not fit.
    """
    checkpoint = load_checkpoint(folder, device)
    was, settings_then, settings_now = checkpoint["data"], asdict(settings.from_dict(checkpoint["config"])), asdict(config)
    changed = [name for name, value in settings_now.items() if name not in FREE_ON_RESUME and value != settings_then[name]]
    if changed and not override:
        raise UsageError(f"cannot resume {folder} with other settings: " + "; ".join(
            f"--{name.replace('_', '-')} was {settings_then[name]}, now {settings_now[name]}" for name in changed)
            + " (--override does it all the same)")
    if was["device"] != device.type and not override:  # another generator draws other crops and masks
        raise UsageError(f"{folder} was trained on {was['device']} and can only go on there, but this is {device.type}; "
                         "use --device, or that machine, or --override")
    differs = [f"{name} (was {was[name]}, is {value})" for name, value in about.items() if was[name] != value]
    if differs and not override:
        raise UsageError(f"the data is not what {folder} was trained on; these differ: {', '.join(differs)} "
                         "(--override goes on all the same)")
    try:
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
    except (RuntimeError, ValueError):
        raise UsageError(f"the weights of {folder} do not fit these settings: --method, --targets, --encoder, --predictor, --patch-size "
                         "and --optimizer must be the run's") from None
    if was["device"] == device.type:
        generator.set_state(checkpoint["generator"].cpu())
        if "torch_generator" in checkpoint:  # files from before stochastic depth have none
            torch_generator(device).set_rng_state(checkpoint["torch_generator"].cpu())
    progress = Progress(**checkpoint["progress"])
    if override:
        progress.total = 0  # planned anew
    return progress
