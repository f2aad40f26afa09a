"""Grade a notebook: run its exercises and their checks, and nothing else.

    python -m tests.grade Self_Supervised_Learning.ipynb     a student's copy, under any name

Of the other cells only imports and definitions are run, so nothing is trained, and a student's
function can use the notebook's imports and functions but not the variables of other cells.
"""

import ast
import contextlib
import io
import os
import re
import sys
import textwrap

from config import UsageError
from support import command_line
from tests.notebooks import ROOT, exercises, read

KEPT = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)


def run(code, names, kept=None):
    """Execute a cell without its magics, or its statements of some kinds; what it prints is lost.

    Returns the value of its last line, if that is an expression.
    """
    tree = ast.parse(re.sub(r"^\s*[%!].*$", "", code, flags=re.M))
    body = [node for node in tree.body if kept is None or isinstance(node, kept)]
    last = body.pop() if body and isinstance(body[-1], ast.Expr) else None
    with contextlib.redirect_stdout(io.StringIO()):
        exec(compile(ast.Module(body, []), "cell", "exec"), names)
        return eval(compile(ast.Expression(last.value), "cell", "eval"), names) if last else None


def grade(notebook):
    """The outcome of each exercise of a notebook: a list of (title, Result, or what went wrong)."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    found, names, cells = exercises(notebook), {"__name__": "notebook"}, notebook.cells
    own = {number for exercise in found for number in (exercise.stub, exercise.check)}
    for number, cell in enumerate(cells):
        if cell.cell_type == "code" and number not in own:
            with contextlib.suppress(Exception):  # a default value may need another cell's variable
                run(cell.source, names, KEPT)
    outcomes = []
    for exercise in found:
        try:
            run(cells[exercise.stub].source, names)
            outcome = run(cells[exercise.check].source, names)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a student's cell may raise anything
            outcome = f"failed: the cell raised {type(error).__name__}\n{error}"
        outcomes.append((exercise.title, outcome))
    return outcomes


def report(outcomes):
    """The outcomes as a table, and the score, as text."""
    width = max((len(title) for title, _ in outcomes), default=0) + 2
    lines = []
    for title, outcome in outcomes:
        first, *rest = str(outcome).splitlines()
        lines.append(f"{title:{width}}{first}")
        for line in rest:
            lines += [" " * width + part for part in textwrap.wrap(line, max(100 - width, 40))]
    passed = [title for title, outcome in outcomes if not isinstance(outcome, str) and outcome]
    starred = sum("*" in title for title in passed)
    return "\n".join([*lines, "", f"{len(passed)} of {len(outcomes)} passed, {starred} starred"])


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if len(argv) != 1:
        raise UsageError("python -m tests.grade NOTEBOOK: name one notebook")
    os.environ.setdefault("MPLBACKEND", "agg")
    try:
        notebook = read(argv[0])
    except FileNotFoundError:
        raise
    except Exception as error:
        raise UsageError(f"{argv[0]} is not a notebook ({type(error).__name__})") from None
    if not exercises(notebook):
        raise UsageError(f"{argv[0]} has no exercises: no cell is a check of one")
    print(report(grade(notebook)))


if __name__ == "__main__":
    command_line.run(main)
