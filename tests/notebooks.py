"""How the course's notebooks are built: their exercises, each with a stub, a check, a solution."""

import copy
import pathlib
import re
from typing import NamedTuple

import nbformat

ROOT = pathlib.Path(__file__).parents[1]
LEARNING, PROBE = ROOT / "Self_Supervised_Learning.ipynb", ROOT / "Linear_Probe.ipynb"
CHECK = re.compile(r"^\w+\.check_\w+\(\w+\)\s*$", re.M)  # a line of its own, which shows a Result
# In the cell after a check; the hint's box, where there is one, stands before the solution's.
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
    """The exercises in their order: each check's cell, and the stub before it."""
    found, cells = [], notebook.cells
    for i, cell in enumerate(cells):
        if cell.cell_type == "code" and CHECK.search(cell.source):
            earlier = [j for j in range(i) if cells[j].cell_type == "code"]
            tagged = [j for j in earlier if "exercise" in tags(cells[j])]
            stub = (tagged or earlier)[-1]  # some editors lose the tags
            prose = "\n".join(c.source for c in cells[:stub] if c.cell_type == "markdown")
            titles = re.findall(r"^#+ (Exercise.*)$", prose, re.M)
            after = cells[i + 1].source if i + 1 < len(cells) else ""
            solution = SOLUTION.search(after)
            found.append(Exercise(titles[-1] if titles else f"Exercise {len(found) + 1}", stub, i,
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
