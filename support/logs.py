"""What a run tells while it goes on: metrics.csv always, TensorBoard and Weights & Biases where asked for, and a stop when asked to."""

import csv
import os
import re
import signal
import threading
from dataclasses import asdict

import diagnostics
from support import distributed as parallel
from support.checkpoint import write
from config import UsageError

NUMBER = re.compile(r"-?[\d.]+(e[-+]?\d+)?|nan|inf|-inf|")  # as Python writes a float; or nothing


def duration(seconds):
    """Seconds in words: '45 s', '4.6 min', '3.4 h'."""
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


class StopSignals:
    """Within `with`, Ctrl-C and SIGTERM only set `.stop`, so that the step under way is finished before the run is saved."""

    def __enter__(self):
        self.stop, self.previous = False, {}
        if threading.current_thread() is threading.main_thread():  # Python allows signal handlers there only
            for number in (signal.SIGINT, signal.SIGTERM):
                self.previous[number] = signal.signal(number, self._request)
        return self

    def _request(self, number, frame):
        if self.stop and parallel.place()[1] == 1:  # asked twice: at once; but torchrun sends on what the terminal sent already
            raise KeyboardInterrupt
        self.stop = True

    def __exit__(self, *error):
        for number, handler in self.previous.items():
            signal.signal(number, handler)


class Metrics:
    """Appends rows to metrics.csv; on resume, rows after the checkpoint's step are dropped, for they will be written again.

    What a row lacks stays empty: the measures of the features are taken more rarely than the loss. The same rows go to TensorBoard
    (--tensorboard) and to Weights & Biases (--wandb PROJECT). Raises UsageError where one of those is asked for and not installed.
    """

    COLUMNS = ("step", "epoch", "loss", "lr", "weight_decay", "momentum", "grad_norm", *diagnostics.MEASURES,
               "images_per_second", "seconds")

    def __init__(self, config, folder, after):
        path = folder / "metrics.csv"
        kept = [{name: row.get(name, "") for name in self.COLUMNS} for row in complete_rows(path) if int(row["step"]) <= after]
        # What was measured before the first step, to compare with; None where nothing was.
        self.first = {name: float(kept[0][name]) for name in diagnostics.MEASURES if kept[0].get(name)} if kept else None

        def save(temporary):
            with open(temporary, "w", newline="") as file:
                writer = csv.DictWriter(file, self.COLUMNS)
                writer.writeheader()
                writer.writerows(kept)

        starts = [tensorboard(config, folder, after), wandb(config, folder)]  # both are looked for before one is opened
        write(path, save)  # a kill between emptying the old file and filling it again would lose every row
        self.file = open(path, "a", newline="")
        self.writer = csv.DictWriter(self.file, self.COLUMNS)
        self.others = [start() for start in starts if start]

    def append(self, row):
        """Write one row, a dict of COLUMNS -> number; it is on disk even if the machine loses its power now."""
        self.writer.writerow(row)
        self.file.flush()
        os.fsync(self.file.fileno())
        for log, _ in self.others:
            log({name: value for name, value in row.items() if name != "step"}, row["step"])

    def close(self):
        """End all logs."""
        self.file.close()
        for _, end in self.others:
            end()


def complete_rows(path):
    """The rows of a metrics.csv that a crash may have cut in the middle of a line, as dicts of numbers in words; none where there is no
    file."""
    if not path.exists():
        return []
    text = path.read_text(errors="replace")
    rows = csv.DictReader(text[: text.rfind("\n") + 1].splitlines(), restval="cut")
    if text and "step" not in (rows.fieldnames or ()):
        raise UsageError(f"{path} is damaged, or no metrics.csv of train.py; move it away to go on without what it recorded")
    return [row for row in rows if None not in row and row.get("step", "").isdigit() and all(map(NUMBER.fullmatch, row.values()))]


def tensorboard(config, folder, after):
    """What opens a TensorBoard writer in the run folder and returns (log, end) of it; None where it was not asked for."""
    if not config.tensorboard:
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UsageError("--tensorboard needs a package that is not installed: pip install tensorboard") from None

    def start():
        writer = SummaryWriter(folder, purge_step=after + 1)  # on resume what came after the checkpoint is written anew
        return lambda row, step: [writer.add_scalar(name, value, step) for name, value in row.items()], writer.close

    return start


def wandb(config, folder):
    """What opens a Weights & Biases run and returns (log, end) of it; None where it was not asked for."""
    if not config.wandb:
        return None
    try:
        import wandb
    except ImportError:
        raise UsageError(f"--wandb {config.wandb} needs a package that is not installed: pip install wandb") from None

    def start():
        run = wandb.init(project=config.wandb, name=folder.name, id=folder.name, resume="allow", config=asdict(config), dir=folder)
        return lambda row, step: run.log(row, step=step), run.finish

    return start
