"""How the course's notebooks are built: their exercises, each with a stub, a check, a solution."""

import copy
import pathlib
import re
from typing import NamedTuple

import nbformat

ROOT = pathlib.Path(__file__).parents[1]
LEARNING, PROBE = ROOT / "Self_Supervised_Learning.ipynb", ROOT / "Linear_Probe.ipynb"
# Of the cell after a check; the hint's box, where there is one, stands before the solution's.
SOLUTION = re.compile(
    r"<details>\s*<summary>Solution</summary>\s*```python\n(.*?)```.*?</details>", re.S)


class Exercise(NamedTuple):
    """An exercise of a notebook: the numbers of its cells, and the code of its solution."""

    title: str  # such as "Exercise 3. Padding by hand"; "Exercise 3*. ..." where it is harder
    stub: int
    check: int
    solution: str


def read(path):
    return nbformat.read(path, as_version=4)


def tags(cell):
    return cell.metadata.get("tags", [])


def exercises(notebook):
    """The exercises in their order."""
    found, cells = [], notebook.cells
    for i, cell in enumerate(cells):
        if "exercise" in tags(cell):
            title = re.search(r"^#+ (Exercise.*)$", cells[i - 1].source, re.M)
            check = next(j for j in range(i + 1, len(cells)) if "check_" in cells[j].source)
            solution = SOLUTION.search(cells[check + 1].source)
            found.append(Exercise(title[1] if title else f"Exercise {len(found) + 1}", i, check,
                                  solution[1] if solution else ""))
    return found


def solved(notebook):
    """The notebook with every stub replaced by its solution."""
    notebook = copy.deepcopy(notebook)
    for exercise in exercises(notebook):
        notebook.cells[exercise.stub].source = exercise.solution
    return notebook


def shown(cell):
    """The text of a code cell's outputs: what it printed, and its last value."""
    texts = (output.get("text") or output.get("data", {}).get("text/plain", "")
             for output in cell.get("outputs", []))
    return "".join(texts)
