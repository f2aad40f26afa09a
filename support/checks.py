"""Errors of one line: what was wrong, where, what is allowed, and the nearest spelling."""

import difflib


class UsageError(ValueError):
    """Something the user asked for cannot be done; the message, one line, says what to try."""


def nearest(word, known):
    """'; did you mean X?' where a known word is spelled nearly like this one; else nothing."""
    known = {name.lower(): name for name in known}
    close = difflib.get_close_matches(str(word).lower(), known, 1, 0.7)
    return f"; did you mean {known[close[0]]}?" if close else ""


def show(value):
    """A value as a user would type it after a flag."""
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    return repr(value) if isinstance(value, str) else str(value)


def check(condition, name, value, expected):
    """Raise UsageError unless the condition holds: a setting's name, its value, what is right."""
    if not condition:
        flag = "--" + name.replace("_", "-")
        raise UsageError(f"{flag} is {show(value)}, expected {expected}")


def check_choice(name, value, choices, more=""):
    """Raise UsageError, with the nearest spelling, unless the value is one of the choices."""
    if value not in choices:
        expected = f"expected one of {', '.join(choices)}{more}{nearest(value, choices)}"
        raise UsageError(f"{name} is {show(value)}, {expected}")


def check_range(name, pair, least, most):
    """Raise UsageError unless pair is two numbers, least <= first <= second <= most; no NaN."""
    check(isinstance(pair, tuple) and len(pair) == 2 and least <= pair[0] <= pair[1] <= most,
          name, pair, f"two numbers, the smaller first, from {least:g} to {most:g}")
