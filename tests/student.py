"""Write copies of the course's notebooks for students, without solutions: `make student`."""

import copy

import nbformat

from tests.notebooks import LEARNING, PROBE, ROOT, SOLUTION, read


def without_solutions(notebook):
    """The notebook without the solutions of its exercises and without outputs; hints remain."""
    notebook = copy.deepcopy(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
        else:
            cell.source = SOLUTION.sub("", cell.source).strip()
    notebook.cells = [cell for cell in notebook.cells if cell.source]
    return notebook


def main(folder=ROOT / "student"):
    folder.mkdir(exist_ok=True)
    for path in (LEARNING, PROBE):
        nbformat.write(without_solutions(read(path)), folder / path.name)
    print(f"Written to {folder.name}/: put both in the place of the two beside masking.py.")


if __name__ == "__main__":
    main()
