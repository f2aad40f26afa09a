"""What a run tells while it trains: metrics.csv, TensorBoard or Weights & Biases, a clean stop."""

import contextlib
import csv
import os
import re
import signal
import sys
import threading
import uuid
from dataclasses import asdict

import torch

from config import UsageError
from support import distributed
from support.checkpoint import write

NUMBER = re.compile(r"-?[\d.]+(e[-+]?\d+)?|nan|inf|-inf|")  # as Python writes a float, or nothing


def duration(seconds):
    """Seconds in words: '45 s', '4.6 min', '3.4 h'."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def announcement(run, dataset, kept, held):
    """One line on what is about to happen: data, model, steps, device, folder."""
    config, model = run.config, run.model
    parts = {"encoder": model.context_encoder, "predictor": getattr(model, "predictor", None)}
    sizes = ", ".join(f"{name} {sum(p.numel() for p in part.parameters()) / 1e6:.2f} M"
                      for name, part in parts.items() if part is not None)
    where = f"cpu, threads: {torch.get_num_threads()}"
    if run.device.type != "cpu":
        where = torch.cuda.get_device_name() if run.device.type == "cuda" else run.device.type
    images = config.batch_size * config.accumulation
    begun = f"resuming at step {run.step} of {run.total}, " if run.step else ""
    return (f"{dataset.name}: {kept:,} images, {held:,} held out · {type(model).__name__}: "
            f"{sizes} parameters · {begun}{run.total - run.step:,} steps of {images} images on "
            f"{where} · {run.folder}")


def conclude(run):
    """Say how a run ended and what comes next; one that was stopped exits with status 130."""
    finished = run.step == run.total
    if distributed.is_first() and finished:
        print(f"{run.step} steps in {duration(run.seconds())}; next: "
              f"python evaluate.py {run.folder}")
    elif distributed.is_first():
        print(f"stopped at step {run.step} of {run.total}; resume with: "
              f"python {run.about['program']} --out {run.folder} --resume")
    if not finished:
        sys.exit(130)


class StopSignals:
    """Within `with`, signals that ask for a stop only set `stop`: the step is finished, and saved.

    Those are Ctrl-C, SIGTERM, a closed terminal (SIGHUP) and a cluster's warning (SIGUSR1).
    """

    def __enter__(self):
        self.stop, self.previous = False, {}
        if threading.current_thread() is threading.main_thread():  # Python allows handlers there
            for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"):
                if number := getattr(signal, name, None):  # Windows lacks some
                    self.previous[number] = signal.signal(number, self.request)
        return self

    def request(self, number, frame):
        """Ask for a stop; Ctrl-C twice stops at once, but torchrun repeats what a terminal sent."""
        if self.stop and number == signal.SIGINT and distributed.place()[1] == 1:
            raise KeyboardInterrupt
        self.stop = True

    def __exit__(self, *error):
        for number, handler in self.previous.items():
            signal.signal(number, handler)


class Metrics:
    """Appends rows to metrics.csv; in processes other than the first it does nothing.

    When a run resumes, rows after the checkpoint's step are dropped: they will be written again. A
    run that was killed before its first checkpoint starts with no rows at all. A value that a row
    lacks stays empty: features are measured more rarely than the loss. The rows go to what `log_to`
    names, too. Raises UsageError if its package is not installed.
    """

    def __init__(self, config, folder, after, measures):
        self.columns = ("step", "epoch", "loss", "lr", "weight_decay", "momentum", "grad_norm",
                        *measures, "images_per_second", "seconds")
        self.before, self.stack = None, contextlib.ExitStack()
        if not distributed.is_first():
            return
        path = folder / "metrics.csv"
        kept = [{name: row.get(name, "") for name in self.columns}
                for row in complete_rows(path) if int(row["step"]) <= after] if after else []
        if kept and kept[0]["target_std"]:  # what was measured before training
            self.before = {name: float(kept[0][name]) for name in measures if kept[0][name]}
        self.log = logger(config, folder, after, self.stack)

        def save(temporary):
            with open(temporary, "w", newline="") as file:
                writer = csv.DictWriter(file, self.columns)
                writer.writeheader()
                writer.writerows(kept)

        write(path, save)  # in one move: a kill in between would lose every row
        self.file = self.stack.enter_context(open(path, "a", newline=""))

    def append(self, row):
        """Write one row, a dict of column -> number; it is on disk even if power fails now."""
        if not distributed.is_first():
            return
        csv.DictWriter(self.file, self.columns).writerow(row)
        self.file.flush()
        os.fsync(self.file.fileno())
        self.log({name: value for name, value in row.items() if name != "step"}, row["step"])

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.stack.close()


def complete_rows(path):
    """The rows, dicts of strings, of a metrics.csv that a crash may have cut in mid-line."""
    if not path.exists():
        return []
    text = path.read_text(errors="replace")
    rows = csv.DictReader(text[: text.rfind("\n") + 1].splitlines(), restval="cut")
    if text and "step" not in (rows.fieldnames or ()):
        raise UsageError(f"{path} is damaged, or not written by train.py; move it away to resume "
                         "without its rows")
    return [row for row in rows if None not in row and row.get("step", "").isdigit()
            and all(map(NUMBER.fullmatch, row.values()))]


def logger(config, folder, after, stack):
    """The function log(values, step) of what --log-to names; it is closed with the stack."""
    kind, _, project = config.log_to.partition(":")
    try:
        if kind == "tensorboard" and not project:
            from torch.utils.tensorboard import SummaryWriter
            writer = stack.enter_context(SummaryWriter(folder, purge_step=after + 1))
            return lambda row, step: [writer.add_scalar(k, v, step) for k, v in row.items()]
        if kind == "wandb" and project:
            import wandb
            run = wandb.init(project=project, name=folder.name, id=run_id(folder), resume="allow",
                             config=asdict(config), dir=folder)
            stack.callback(run.finish)
            return lambda row, step: run.log(row, step=step)
    except ImportError:
        raise UsageError(f"--log-to {config.log_to} needs a package that is not installed: "
                         f"pip install {kind}") from None
    if config.log_to:
        raise UsageError(f"--log-to is {config.log_to!r}, expected tensorboard or wandb:PROJECT")
    return lambda row, step: None


def run_id(folder):
    """A run's unique id for Weights & Biases, kept in its folder so that it resumes as the same."""
    path = folder / "wandb_id"
    if not path.exists():
        path.write_text(uuid.uuid4().hex)
    return path.read_text()
