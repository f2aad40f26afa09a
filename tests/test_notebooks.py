"""Claims about the notebooks: how they are built, that they run as they are and with the exercises solved, and that the checks can fail.

Every notebook at the root of the repository is held to the same rules. The executions set IJEPA_FAST=1, which the notebooks' preset
cell reads, and happen in a copy of the repository's files, so that no run folder of yours is touched.
"""

import ast
import copy
import importlib
import math
import os
import pathlib
import re
import shutil

import nbformat
import pytest
import torch
from nbclient import NotebookClient

import diagnostics
from config import from_preset

ROOT = pathlib.Path(__file__).parents[1]
NOTEBOOKS = sorted(ROOT.glob("*.ipynb"))
EXERCISES = 12  # over both notebooks
LINES = 10  # of code in a cell
MEGABYTES = 3.0


def read(path):
    return nbformat.read(path, as_version=4)


def tags(cell):
    return cell.metadata.get("tags", [])


def code_lines(cell):
    """Lines of a code cell that are neither blank nor only a comment."""
    return [line for line in cell.source.splitlines() if line.strip() and not line.strip().startswith("#")]


def exercises(notebook):
    """For each cell tagged "exercise": its number, that of the check, and the code of the folded solution ("" where there is none)."""
    found, cells = [], notebook.cells
    for i, cell in enumerate(cells):
        if "exercise" in tags(cell):
            check = next((j for j in range(i + 1, len(cells)) if cells[j].cell_type == "code"), None)
            after = cells[check + 1].source if check and check + 1 < len(cells) else ""
            folded = re.search(r"<details>\s*<summary>Solution</summary>\s*```python\n(.*?)```.*</details>", after, re.S)
            found.append((i, check, folded[1] if folded else ""))
    return found


def solved(notebook):
    """The notebook with every stub replaced by its solution."""
    notebook = copy.deepcopy(notebook)
    for stub, _, solution in exercises(notebook):
        notebook.cells[stub].source = solution
    return notebook


def printed(cell):
    return "".join(output.text for output in cell.get("outputs", []) if output.output_type == "stream")


# --- how they are built ------------------------------------------------------------------------------------------------

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def test_there_are_notebooks_with_enough_exercises():
    assert NOTEBOOKS
    if len(NOTEBOOKS) > 1:
        assert sum(len(exercises(read(path))) for path in NOTEBOOKS) >= EXERCISES


@each_notebook
def test_it_opens_with_goals_and_closes_with_takeaways(path):
    first, last = (next(cell for cell in cells if cell.cell_type == "markdown").source.lower()
                   for cells in (read(path).cells, read(path).cells[::-1]))
    assert all(word in first for word in ("goals", "prerequisites", "run time", "cpu", "gpu"))
    assert re.search("take ?away", last) and "not show" in last  # and what its numbers do not show


@each_notebook
def test_cells_are_short(path):
    for cell in read(path).cells:
        if cell.cell_type == "code":
            assert len(code_lines(cell)) <= LINES or "setup" in tags(cell), cell.source
            assert max(map(len, cell.source.splitlines())) <= 100, cell.source


@each_notebook
def test_it_was_run_from_top_to_bottom_and_shows_something(path):
    code = [cell for cell in read(path).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert not any(output.output_type == "error" for cell in code for output in cell.outputs)
    assert any("image/png" in output.get("data", {}) for cell in code for output in cell.outputs)
    for one, two in zip(code, code[1:]):
        assert one.outputs or two.outputs, f"two silent cells in a row:\n{one.source}\n\n{two.source}"


@each_notebook
def test_prose_stands_before_code(path):
    """No more than two code cells in a row (three where one is an exercise's stub with its check)."""
    row = 0
    for cell in read(path).cells:
        row = row + 1 if cell.cell_type == "code" else 0
        assert row <= 2 or row == 3 and "check_" in cell.source, cell.source


@each_notebook
def test_it_defines_no_model_loss_or_training_loop_of_its_own(path):
    """Those are the modules': toys may compute gradients, but nothing here is a Module, is called a loss, or steps an optimizer."""
    source = "\n".join(cell.source for cell in read(path).cells if cell.cell_type == "code" and "exercise" not in tags(cell))
    for node in ast.walk(ast.parse(re.sub(r"^%.*$", "", source, flags=re.M))):
        if isinstance(node, ast.ClassDef):
            assert not any("Module" in ast.unparse(base) for base in node.bases), node.name
        if isinstance(node, ast.FunctionDef):
            assert "loss" not in node.name, node.name
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            assert not (node.func.attr == "step" and not node.args), ast.unparse(node)


@each_notebook
def test_it_is_light_and_bears_no_trace_of_the_machine(path):
    text = path.read_text()
    assert len(text) < MEGABYTES * 1e6
    assert not re.search(r'/home/\w|/root/|/Users/\w|/tmp/|"execution": \{|application/vnd.jupyter.widget', text)
    assert read(path).metadata.kernelspec.name == "python3"


@each_notebook
def test_every_exercise_has_a_stub_a_check_and_a_folded_solution(path):
    notebook = read(path)
    for stub, check, solution in exercises(notebook):
        assert "exercise" in notebook.cells[stub - 1].source.lower()
        assert re.search(r"^\s+(\.\.\.|return None)", notebook.cells[stub].source, re.M), notebook.cells[stub].source
        assert re.fullmatch(r"\w+\.check_\w+\(\w+(, \w+)*\)", notebook.cells[check].source.strip())
        assert solution, notebook.cells[stub].source
        assert "not attempted" in printed(notebook.cells[check])


# --- they run ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def copied(tmp_path_factory):
    """A folder with the files that a notebook needs, and no runs. A notebook's second execution finds the run of its first."""
    folder = tmp_path_factory.mktemp("repository")
    for name in ("tests", "encoders", "support", "extras"):
        (folder / name).mkdir()
    for path in (*ROOT.glob("*.py"), *ROOT.glob("*.ipynb"), *ROOT.glob("support/*.py"), *ROOT.glob("extras/*.py"),
                 *ROOT.glob("tests/exercises_*.py"), *ROOT.glob("encoders/*.pt")):
        shutil.copy(path, folder / path.relative_to(ROOT))
    return folder


def execute(notebook, folder):
    client = NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(folder)}})
    client.execute(env=dict(os.environ, IJEPA_FAST="1"))
    return notebook


@each_notebook
def test_it_runs_as_it_is(path, copied):
    notebook = execute(read(path), copied)
    for _, check, _ in exercises(notebook):
        assert "not attempted" in printed(notebook.cells[check])


@each_notebook
def test_it_runs_with_every_exercise_solved(path, copied):
    notebook = execute(solved(read(path)), copied)
    for _, check, _ in exercises(notebook):
        assert "passed" in printed(notebook.cells[check]), notebook.cells[check].source + printed(notebook.cells[check])


# --- the checks can fail -----------------------------------------------------------------------------------------------


def fifth(changes, prediction="up", preset="shapes"):
    return lambda _: (from_preset(preset, **changes), prediction)


def padded_right(kept):
    context = torch.zeros(len(kept), max(map(len, kept)), dtype=torch.int64)
    valid = torch.zeros(context.shape, dtype=torch.bool)
    for b, indices in enumerate(kept):
        context[b, : len(indices)], valid[b, : len(indices)] = torch.tensor(indices), True
    return context, valid


def pad_in_front(kept):
    context, valid = padded_right(kept)
    return context.flip(1), valid.flip(1)


def pad_sorted_backwards(kept):
    return padded_right([indices[::-1] for indices in kept])


def scores(query, keys, valid, scale=True):
    return (keys @ query / (math.sqrt(len(query)) if scale else 1.0)).masked_fill(~valid, -math.inf)


def cut_first_set(context, targets):
    for block in targets:
        context -= block
    return len(context)


# For each check wrong answers, and words of the property that each of them violates.
WRONG = {
    "check_patch_of_pixel": [
        (lambda y, x, p, columns: 1 + y // p * columns + x // p, "first pixel"),
        (lambda y, x, p, columns: x // p * columns + y // p, "step to the right"),
        (lambda y, x, p, columns: y // p * 4 + x // p, "step down by a whole row"),
        (lambda y, x, p, columns: min(y // p * columns + x // p, 10), "every pixel"),
    ],
    "check_count_context_patches": [
        (lambda context, targets: len(context) - sum(map(len, targets)), "taken away once"),
        (lambda context, targets: len(context) - len(set().union(*targets)), "outside"),
        (lambda context, targets: len(context), "taken away"),
        (lambda context, targets: max(1, len(context.difference(*targets))), "nothing remains"),
        (cut_first_set, "left as they were"),
    ],
    "check_pad_contexts": [
        (lambda kept: tuple(part[:, :7] for part in padded_right(kept)), "longest"),
        (lambda kept: (padded_right(kept)[0].float(), padded_right(kept)[1]), "int64"),
        (lambda kept: (padded_right(kept)[0], ~padded_right(kept)[1]), "as many entries are real"),
        (pad_sorted_backwards, "in their order"),
        (lambda kept: tuple(part.flip(1) for part in padded_right([k[::-1] for k in kept])), "real entries come first"),
        (lambda kept: (padded_right(kept)[0].masked_fill(~padded_right(kept)[1], -1), padded_right(kept)[1]), "legal"),
    ],
    "check_attend": [
        (lambda q, k, v, valid: v.sum(0), "plain average"),
        (lambda q, k, v, valid: scores(q, k, valid, False).softmax(0) @ v, "softmax attention"),
        (lambda q, k, v, valid: (scores(q, k, torch.ones_like(valid)).softmax(0) * valid) @ v, "sum to one"),
        (lambda q, k, v, valid: scores(q, k, valid if valid.all() else ~valid).softmax(0) @ v, "True means"),
        (lambda q, k, v, valid: scores(q, k, torch.ones_like(valid)).softmax(0) @ v, "True means"),
        (lambda q, k, v, valid: scores(q, k, valid).softmax(0) @ v + 0 * v.abs().max().clamp(min=1e5).sub(1e5).sum() + (v.max() > 1e5),
         "padding has no influence"),
    ],
    "check_ema_after": [
        (lambda start, followed, m, n: (1 - m**n) * start + m**n * followed, "after no step"),
        (lambda start, followed, m, n: start if n == 0 else m * followed + (1 - m) * start, "one step"),
        (lambda start, followed, m, n: start + n * (1 - m) * (followed - start), "five steps"),
        (lambda start, followed, m, n: (m**n * start + (1 - m**n) * followed) if 0 < m < 1 else 0.0, "never moves"),
    ],
    "check_mean_over_real": [
        (lambda distances, valid: distances.mean(0), "plain mean"),
        (lambda distances, valid: distances.mean(), "padding has no influence"),
        (lambda distances, valid: (distances * valid).mean(), "number of real patches"),
        (lambda distances, valid: ((distances * valid).sum(-1) / valid.sum(-1)).mean(), "counts the same"),
    ],
    "check_optimizer_steps": [
        (lambda images, batch, accumulation, epochs: images, "no accumulation"),
        (lambda images, batch, accumulation, epochs: epochs * (images // batch), "four forward passes"),
        (lambda images, batch, accumulation, epochs: epochs * math.ceil(images / batch / accumulation), "dropped"),
        (lambda images, batch, accumulation, epochs: epochs * images // (batch * accumulation), "every epoch"),
    ],
    "check_has_collapsed": [
        (lambda x: False, "one vector for all"),
        (lambda x: bool((x.std(0) == 0).all()), "a little noise"),
        (lambda x: bool(x.std(0).mean() < 0.1), "one direction"),
        (lambda x: True, "have not collapsed"),
        (lambda x: diagnostics.rankme(x) < 4 or bool(x.std() < 0.1), "small ones"),
        (lambda x: diagnostics.rankme(x) < 4 or bool(x.std() > 100), "large ones"),
    ],
    "check_fifth_block": [
        (fifth({"out": "runs/five"}), "five target blocks"),
        (fifth({"num_targets": 5, "context_size": 10, "out": "runs/five"}), "nothing else"),
        (fifth({"num_targets": 5}), "folder of its own"),
        (fifth({"num_targets": 5, "masks": "random", "out": "runs/five"}), "nothing else"),
        (fifth({"num_targets": 5, "out": "runs/five"}, "maybe"), "predicted"),
    ],
}
LEARNING = ROOT / "Self_Supervised_Learning.ipynb"


def checks():
    module = importlib.import_module("exercises_learning")
    return {name: getattr(module, name) for name in vars(module) if name.startswith("check_")}


def solution_of(name):
    """The function that the notebook's folded solution for one check defines."""
    notebook = read(LEARNING)
    names = vars(importlib.import_module("math")) | {"torch": torch, "math": math, "diagnostics": diagnostics,
                                                     "settings": importlib.import_module("config")}
    for _, check, code in exercises(notebook):
        called = re.search(r"\.(check_\w+)\((\w+)", notebook.cells[check].source)
        if called[1] == name:
            exec(code, names)
            return names[called[2]]


def test_every_check_of_the_first_notebook_has_wrong_answers_here():
    assert set(WRONG) == set(checks())


@pytest.mark.parametrize("name", WRONG)
def test_a_check_passes_the_solution_and_leaves_the_stub_unattempted(name, capsys):
    checks()[name](solution_of(name))
    assert capsys.readouterr().out.startswith("passed")
    checks()[name](lambda *arguments: None)
    checks()[name](lambda *arguments: ...)
    assert capsys.readouterr().out == "not attempted\n" * 2


@pytest.mark.parametrize("name, number", [(name, number) for name, wrong in WRONG.items() for number in range(len(wrong))])
def test_a_check_names_the_property_that_a_wrong_answer_violates(name, number, capsys):
    answer, words = WRONG[name][number]
    checks()[name](answer)
    out = capsys.readouterr().out
    assert out.startswith("failed: ") and words in out.splitlines()[0]
    assert out.splitlines()[1].strip()  # and what is right


@pytest.mark.parametrize("name", WRONG)
def test_a_check_survives_an_answer_that_raises(name, capsys):
    checks()[name](lambda *arguments: 1 / 0)
    assert capsys.readouterr().out.startswith("failed: ZeroDivisionError")
