"""What every check of an exercise shares: it asks the reader's function and says what it found.

A check is a generator marked `@exercise`. It takes `ask`, which calls the reader's function, and
yields (property, holds, what is right and why), the properties of the commonest mistakes first. The
reader is told these, and what was returned.
The check that results takes the reader's function and returns a `Result`, which Jupyter shows.
"""

import functools
import pathlib
import reprlib
import traceback

import torch

ROOT = pathlib.Path(__file__).parents[1]
SMALL = 12  # numbers of a tensor that are shown one by one


class NotAttempted(Exception):
    """The stub is unchanged: it returns None or `...`, or raises NotImplementedError.

    A check may raise it, too.
    """


class Nothing(Exception):
    """The reader's function returned nothing although it has answered an earlier call."""


class Raised(Exception):
    """The reader's function raised an error; the message says which call, and which error."""


class Result:
    """The outcome of a check: true if passed; `text` is what a notebook shows."""

    def __init__(self, passed, text):
        self.passed, self.text = passed, text

    def __bool__(self):
        return self.passed

    def __repr__(self):
        return self.text


def exercise(properties):
    """Make a check of a generator that takes `ask` and yields (property, holds, what is right)."""

    @functools.wraps(properties)
    def check(attempt):
        ask, count, name = Ask(attempt), 0, None
        try:
            for name, holds, right in properties(ask):
                if not holds:
                    lines = f"failed: {name}", right, ask.last
                    return Result(False, "\n".join(filter(None, lines)))
                count += 1
        except NotAttempted:
            return Result(False, "not attempted")
        except Nothing:
            return Result(False, f"failed: {ask.call} returns nothing\n"
                                 "it answers other calls: look for a branch without `return`")
        except Raised as error:
            return Result(False, f"failed: {error}")
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # the answer is of another kind than the check can use
            where = line_of_reader(error)
            what = "your code" if where else f"what {ask.call} returned"
            return Result(False, f"failed: {what} cannot be used\n"
                                 f"{type(error).__name__}: {error}\n{where or ask.last}".rstrip())
        return Result(True, f"passed: all {count} properties hold")

    return check


class Ask:
    """Calls the reader's function and remembers the last call and its answer."""

    def __init__(self, attempt):
        self.attempt, self.answered = attempt, False
        self.name = getattr(attempt, "__name__", "your function")
        self.call, self.last = self.name, ""

    def __call__(self, *arguments):
        self.call = f"{self.name}({', '.join(map(short, arguments))})"
        try:
            answer = self.attempt(*arguments)
        except (KeyboardInterrupt, NotAttempted):
            raise
        except NotImplementedError as error:
            raise NotAttempted from error
        except BaseException as error:  # a reader's function may raise anything
            text = f"{self.call} raised {type(error).__name__}\n{error}\n{line_of_reader(error)}"
            raise Raised(text.rstrip("\n")) from error
        if answer is None or answer is ...:
            raise Nothing if self.answered else NotAttempted
        self.answered, self.last = True, f"you returned {short(answer)} for {self.call}"
        return answer


def line_of_reader(error):
    """Where in the reader's own code an error arose, "" if it did not."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__)
              if "-packages" not in frame.filename  # site- or, on Debian, dist-
              and pathlib.Path(frame.filename).parent not in (ROOT, ROOT / "tests")]
    return f"at line {frames[-1].lineno}: {frames[-1].line}".rstrip(": ") if frames else ""


def short(value):
    """A value in a few words: small tensors by their numbers, large ones by their shape."""
    if isinstance(value, torch.Tensor):
        kind = str(value.dtype).removeprefix("torch.")
        if value.numel() > SMALL:
            return f"{kind} of shape {list(value.shape)}"
        numbers = rounded(value.tolist()) if value.is_floating_point() else value.tolist()
        return f"{numbers} ({kind})"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (tuple, list)) and not all(isinstance(v, (int, float)) for v in value):
        opening, closing = "()" if isinstance(value, tuple) else "[]"
        more = ["..."] if len(value) > 4 else []
        return opening + ", ".join([*map(short, value[:4]), *more]) + closing
    if callable(value) and hasattr(value, "__name__"):
        return value.__name__
    if type(value).__module__ != "builtins":
        return type(value).__name__
    return " ".join(shortener.repr(value).split())


def rounded(numbers):
    """Nested lists of floats with four significant digits."""
    return [rounded(n) for n in numbers] if isinstance(numbers, list) else float(f"{numbers:.4g}")


shortener = reprlib.Repr()
shortener.maxlist = shortener.maxtuple = shortener.maxset = shortener.maxdict = 8
shortener.maxother = shortener.maxstring = 60


def equal(found, expected, tolerance=1e-5):
    """Whether numbers or tensors of numbers agree in shape and value, whatever their type.

    The tolerance is absolute near 0 and relative elsewhere.
    """
    try:
        found, expected = (torch.as_tensor(x).detach().cpu().double() for x in (found, expected))
    except (TypeError, ValueError, RuntimeError):  # a string, a ragged list
        return False
    return (found.shape == expected.shape
            and torch.allclose(found, expected, atol=tolerance, rtol=tolerance))


def seeded(seed=0):
    """A generator of its own, so that a check draws the same numbers each time."""
    return torch.Generator().manual_seed(seed)
