"""The command line: a flag for every setting, errors of one line, the command of a run."""

import argparse
import os
import re
import shlex
import sys
from dataclasses import asdict, fields
from pathlib import Path

import config as settings
from config import PRESETS, Config, Pair, UsageError, nearest
from support import checkpoint, distributed


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises UsageError with what is allowed and the nearest flag."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, **options)
        # argparse's own pattern takes the -1e-3 of `--lr -1e-3` for a flag.
        self._negative_number_matcher = re.compile(r"-(\d|\.\d|inf|nan)")

    def error(self, message):
        if wrong := re.match(r"argument (\S+): invalid (int|float) value: '(.*)'", message):
            kind = {"int": "a whole number, such as 12", "float": "a number, such as 0.5"}[wrong[2]]
            raise UsageError(f"{wrong[1]} is {wrong[3]!r}, expected {kind}")
        more = ""
        if unknown := re.search(r"unrecognized arguments: (--\S*)", message):
            more = nearest(unknown[1], self._option_string_actions)
        raise UsageError(f"{message}{more} (--help lists all flags)")


def parser(description):
    """A Parser with a flag for every setting; --help shows each one's comment and default."""
    p = Parser(description=f"{description} Defaults, in brackets, are those of the preset shapes.",
               epilog=f"presets: {', '.join(PRESETS)}")
    p.add_argument("--preset", default="shapes", help="named settings that the other flags change")
    p.add_argument("--resume", action="store_true", help="resume the run in --out")
    p.add_argument("--override", action="store_true",
                   help="with --resume: resume even if settings or data differ from the run's")
    for f in fields(Config):
        flag, default = "--" + f.name.replace("_", "-"), argparse.SUPPRESS
        shown = " ".join(map(str, f.default)) if f.type is Pair else f.default
        comment = f"{f.metadata['comment']} [{shown}]".replace("%", "%%")
        if f.type is bool:
            p.add_argument(flag, action=argparse.BooleanOptionalAction, default=default,
                           help=comment)
        elif f.type is Pair:
            p.add_argument(flag, type=float, nargs=2, default=default, metavar="NUMBER",
                           help=comment)
        else:
            p.add_argument(flag, type=f.type, default=default, metavar=f.type.__name__.upper(),
                           help=comment)
    return p


def given(arguments):
    """The settings among parsed flags, a dict."""
    found = {name: value for name, value in vars(arguments).items() if name in names()}
    return {name: tuple(value) if isinstance(value, list) else value
            for name, value in found.items()}


def names():
    """The names of all settings."""
    return [f.name for f in fields(Config)]


def parse(argv, description, make_parser=parser, suffix=""):
    """Read a command line -> its Namespace, with `config` besides `resume` and `override`.

    The default run folder is runs/PRESET followed by the suffix. With --resume the config is that
    of the run in --out, changed by the flags that were given. A process that torchrun has started
    again (--max-restarts) resumes by itself.
    """
    arguments = make_parser(description).parse_args(argv)
    changes = given(arguments)
    changes["out"] = changes.get("out") or f"runs/{arguments.preset}{suffix}"
    folder = Path(changes["out"])
    if distributed.was_restarted() and (folder / "checkpoint.pt").exists():
        arguments.resume = True
    if arguments.override and not arguments.resume:
        raise UsageError("--override is for --resume")
    if arguments.resume:
        arguments.config = checkpoint.load(folder)[0]
        for name, value in changes.items():
            setattr(arguments.config, name, value)
        settings.validate(arguments.config)
    else:
        arguments.config = settings.from_preset(arguments.preset, **changes)
    return arguments


def command(config, program="train.py"):
    """The command that trains with this Config: a preset, and a flag for each difference."""

    def differences(preset):
        base = asdict(Config(**PRESETS[preset]))
        return {name: value for name, value in asdict(config).items()
                if value != base[name] and (name, value) != ("out", f"runs/{preset}")}

    preset = min(PRESETS, key=lambda name: len(differences(name)))
    words = ["python", *program.split(), "--preset", preset]
    for name, value in differences(preset).items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", *map(str, value if isinstance(value, tuple) else (value,))]
    return shlex.join(words)


def run(main):
    """Call main(); what the user can put right becomes one line on stderr and exit status 2.

    A UsageError, an OSError, which names its file, too little memory, no compiler, an old GPU.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that lacks a sign must not end a run
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted")
    except (UsageError, OSError, MemoryError, RuntimeError) as error:
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            why = checkpoint.one_line(error)[:300]
            error = f"torch.compile failed ({why}); leave out --compile"
        elif "no kernel image" in f"{error}":  # as for Kaggle's P100
            error = "this torch was not built for this GPU; try --device cpu, or another build"
        elif isinstance(error, (MemoryError, RuntimeError)):
            if not re.search("out of memory|can't allocate memory", f"{error}") and not isinstance(
                    error, MemoryError):
                raise
            error = "out of memory; lower --batch-size, --image-size, --encoder or --train-images"
        rank = os.environ.get("RANK", "0")  # set by torchrun
        print(f"error: {error}" if rank == "0" else f"error in process {rank}: {error}",
              file=sys.stderr)
        sys.exit(2)
