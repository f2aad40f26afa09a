"""Claims about the notebooks: how they are built, that they run as they are and with the exercises
solved, and that the checks of the exercises can fail.

The executions set IJEPA_FAST=1, which the notebooks' preset cell reads, and happen in a copy of the
files a notebook needs, so that no run folder is touched.
"""

import ast
import copy
import importlib.machinery
import math
import os
import pathlib
import re
import shutil
import subprocess
import sys

import nbformat
import pytest
import torch
from nbclient import NotebookClient

import config as settings
import diagnostics
from bench import colab

ROOT = pathlib.Path(__file__).parents[1]
LEARNING, PROBE = ROOT / "Self_Supervised_Learning.ipynb", ROOT / "Linear_Probe.ipynb"
EXERCISES = 12  # over both notebooks
LINES = 10  # of code in a cell
MEGABYTES = 3.0


def read(path):
    return nbformat.read(path, as_version=4)


def tags(cell):
    return cell.metadata.get("tags", [])


def code_lines(cell):
    """Lines of a code cell that are neither blank nor only a comment."""
    lines = map(str.strip, cell.source.splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def exercises(notebook):
    """For each exercise: the number of its stub's cell, of its check's, and its folded solution."""
    found, cells = [], notebook.cells
    folded = r"<details>\s*<summary>Solution</summary>\s*```python\n(.*?)```.*</details>"
    for i, cell in enumerate(cells):
        if "exercise" in tags(cell):
            check = next(j for j in range(i + 1, len(cells)) if cells[j].cell_type == "code")
            solution = re.search(folded, cells[check + 1].source, re.S)
            found.append((i, check, solution[1] if solution else ""))
    return found


def solved(notebook):
    """The notebook with every stub replaced by its solution."""
    notebook = copy.deepcopy(notebook)
    for stub, _, solution in exercises(notebook):
        notebook.cells[stub].source = solution
    return notebook


def printed(cell):
    outputs = cell.get("outputs", [])
    return "".join(output.text for output in outputs if output.output_type == "stream")


# --- how they are built ---------------------------------------------------------------------------

each_notebook = pytest.mark.parametrize("path", [LEARNING, PROBE], ids=lambda path: path.stem)


def test_there_are_enough_exercises():
    assert sum(len(exercises(read(path))) for path in (LEARNING, PROBE)) >= EXERCISES


@each_notebook
def test_it_opens_with_goals_and_closes_with_takeaways(path):
    prose = [cell.source.lower() for cell in read(path).cells if cell.cell_type == "markdown"]
    assert all(word in prose[0] for word in ("goals", "prerequisites", "run time", "cpu", "gpu"))
    assert re.search("take ?away", prose[-1])
    assert "not show" in prose[-1]  # and what its numbers do not show


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
    outputs = [output for cell in code for output in cell.outputs]
    assert not any(output.output_type == "error" for output in outputs)
    assert any("image/png" in output.get("data", {}) for output in outputs)
    for one, two in zip(code, code[1:]):
        assert one.outputs or two.outputs, f"two silent cells:\n{one.source}\n\n{two.source}"


@each_notebook
def test_prose_stands_before_code(path):
    """No more than two code cells in a row (three where one is an exercise's stub and check)."""
    row = 0
    for cell in read(path).cells:
        row = row + 1 if cell.cell_type == "code" else 0
        assert row <= 2 or row == 3 and "check_" in cell.source, cell.source


@each_notebook
def test_it_defines_no_model_loss_or_training_loop_of_its_own(path):
    """Those are the modules': nothing here is a Module, is called a loss, or steps an optimizer."""
    code = [cell.source for cell in read(path).cells
            if cell.cell_type == "code" and "exercise" not in tags(cell)]
    for node in ast.walk(ast.parse(re.sub(r"^%.*$", "", "\n".join(code), flags=re.M))):
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
    assert not re.search(r"/home/\w|/root/|/Users/\w|/tmp/|/work/", text)
    assert not re.search(r'"execution": \{|application/vnd.jupyter.widget', text)
    assert read(path).metadata.kernelspec.name == "python3"


@each_notebook
def test_every_exercise_has_a_stub_a_check_and_a_folded_solution(path):
    notebook = read(path)
    for stub, check, solution in exercises(notebook):
        assert "exercise" in notebook.cells[stub - 1].source.lower()
        source = notebook.cells[stub].source
        assert re.search(r"^\s+(\.\.\.|return None)", source, re.M), source
        call = notebook.cells[check].source.strip()
        assert re.fullmatch(r"\w+\.check_\w+\(\w+(, \w+)*\)", call)
        assert solution, source
        assert "not attempted" in printed(notebook.cells[check])


# --- alone, as on Colab and Kaggle ----------------------------------------------------------------


def first_code(path, address=""):
    """The source of the first code cell, with an address as `make colab` writes it."""
    notebook = read(path)
    colab.set_address(notebook, address)
    return next(cell.source for cell in notebook.cells if cell.cell_type == "code")


@pytest.fixture
def started(monkeypatch):
    """The commands that a cell starts, without doing so."""
    commands = []
    monkeypatch.setattr(subprocess, "run", lambda words, check: commands.append(words))
    return commands


@each_notebook
def test_beside_the_modules_the_first_cell_does_nothing(path, monkeypatch, capsys, started):
    monkeypatch.chdir(ROOT)
    exec(first_code(path, "https://example.org/ijepa"), {})
    assert capsys.readouterr().out == "8 modules found\n" and not started


@each_notebook
def test_alone_and_without_an_address_one_line_says_what_to_do(path, tmp_path, monkeypatch,
                                                               started):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as error:
        exec(first_code(path), {})
    assert "set REPOSITORY" in error.value.code and "\n" not in error.value.code and not started


@each_notebook
def test_alone_the_repository_is_cloned_once_and_its_modules_come_first(path, tmp_path,
                                                                        monkeypatch, capsys):
    """In an empty folder, from a local address."""
    if not (ROOT / ".git").exists():
        pytest.skip("this is a download without a history: there is nothing to clone")
    commands, run = [], subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda words, check: (
        commands.append(words), run(words, check=True) if words[0] == "git" else None))
    monkeypatch.setattr(sys, "path", [*sys.path])
    for _ in range(2):  # and again, when the kernel was restarted
        monkeypatch.chdir(tmp_path)
        exec(first_code(path, ROOT.as_uri()), {})
        place = importlib.machinery.PathFinder.find_spec("masking", sys.path).origin
        assert place == str(tmp_path / "ijepa/masking.py")
        assert os.getcwd() == str(tmp_path / "ijepa")
    assert capsys.readouterr().out == "8 modules found\n" * 2
    assert [words[0] for words in commands] == ["git", sys.executable, sys.executable]
    asked = commands[1][commands[1].index("--quiet") + 1 :]
    required = (ROOT / "requirements.txt").read_text("utf-8")
    assert all(f"{name}>=" in required or name == "ipywidgets" for name in asked)  # no versions


def test_the_address_is_written_by_one_command_and_taken_out_again(tmp_path):
    for name in ("README.md", LEARNING.name, PROBE.name):
        shutil.copy(ROOT / name, tmp_path)
    colab.main("", tmp_path)
    without = {path: path.read_text("utf-8") for path in tmp_path.iterdir()}
    for address in ("https://github.com/someone/ijepa", "https://gitlab.com/other/ijepa"):
        colab.main(address, tmp_path)
        for path in (LEARNING, PROBE):
            notebook = read(tmp_path / path.name)
            assert f'REPOSITORY = "{address}"' in notebook.cells[1].source
            page = f"https://colab.research.google.com/github/someone/ijepa/blob/main/{path.name}"
            for text in (notebook.cells[0].source, (tmp_path / "README.md").read_text("utf-8")):
                assert (page in text) == ("github" in address) == ("kaggle.com" in text)
    colab.main("", tmp_path)
    assert without == {path: path.read_text("utf-8") for path in tmp_path.iterdir()}


# --- they run -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def copied(tmp_path_factory):
    """A folder with the files a notebook needs, and no runs; the second execution finds the run of
    the first."""
    folder = tmp_path_factory.mktemp("repository")
    needed = ("*.py", "support/*.py", "extras/*.py", "tests/exercises_*.py", "encoders/*")
    for path in (path for pattern in needed for path in ROOT.glob(pattern)):
        target = folder / path.relative_to(ROOT)
        target.parent.mkdir(exist_ok=True)
        shutil.copy(path, target)
    return folder


def execute(notebook, folder):
    client = NotebookClient(notebook, timeout=600, kernel_name="python3",
                            resources={"metadata": {"path": str(folder)}})
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
        cell = notebook.cells[check]
        assert "passed" in printed(cell), cell.source + printed(cell)


# --- the checks of the first notebook can fail (the second's: test_exercises_probe.py) ------------


def fifth(changes, prediction="up"):
    return lambda _: (settings.from_preset("shapes", **changes), prediction)


def padded(kept):
    context = torch.zeros(len(kept), max(map(len, kept)), dtype=torch.int64)
    valid = torch.zeros(context.shape, dtype=torch.bool)
    for b, indices in enumerate(kept):
        context[b, : len(indices)], valid[b, : len(indices)] = torch.tensor(indices), True
    return context, valid


def padded_in_front(kept):
    return tuple(part.flip(1) for part in padded([indices[::-1] for indices in kept]))


def padded_with(kept, value):
    context, valid = padded(kept)
    return context.masked_fill(~valid, value), valid


def scores(query, keys, valid, scale=True):
    width = len(query) if scale else 1
    return (keys @ query / math.sqrt(width)).masked_fill(~valid, -math.inf)


def unmasked(query, keys, values, valid):
    return scores(query, keys, torch.ones_like(valid)).softmax(0) @ values


def leaks_large_values(query, keys, values, valid):
    return scores(query, keys, valid).softmax(0) @ values + (values.max() > 1e5)


def cuts_its_argument(context, targets):
    for block in targets:
        context -= block
    return len(context)


def moved(start, followed, m, n):
    return m**n * start + (1 - m**n) * followed


def mean_of_blocks(distances, valid):
    return ((distances * valid).sum(-1) / valid.sum(-1)).mean()


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
        (cuts_its_argument, "left unchanged"),
    ],
    "check_pad_contexts": [
        (lambda kept: tuple(part[:, :7] for part in padded(kept)), "longest"),
        (lambda kept: (padded(kept)[0].float(), padded(kept)[1]), "int64"),
        (lambda kept: (padded(kept)[0], ~padded(kept)[1]), "as many entries are real"),
        (lambda kept: padded([indices[::-1] for indices in kept]), "in their order"),
        (padded_in_front, "real entries come first"),
        (lambda kept: padded_with(kept, -1), "legal"),
    ],
    "check_attend": [
        (lambda q, k, v, valid: v.sum(0), "plain average"),
        (lambda q, k, v, valid: scores(q, k, valid, False).softmax(0) @ v, "softmax attention"),
        (lambda q, k, v, valid: (scores(q, k, valid | True).softmax(0) * valid) @ v, "sum to one"),
        (lambda q, k, v, valid: scores(q, k, valid.all() | ~valid).softmax(0) @ v, "True means"),
        (unmasked, "True means"),
        (leaks_large_values, "padding has no influence"),
    ],
    "check_ema_after": [
        (lambda start, followed, m, n: moved(followed, start, m, n), "after no step"),
        (lambda start, followed, m, n: moved(start, followed, 1 - m, n), "one step"),
        (lambda start, followed, m, n: start + n * (1 - m) * (followed - start), "five steps"),
        (lambda start, followed, m, n: moved(start, followed, min(m, 0.95), n), "never moves"),
    ],
    "check_mean_over_real": [
        (lambda distances, valid: distances.mean(0), "plain mean"),
        (lambda distances, valid: distances.mean(), "padding has no influence"),
        (lambda distances, valid: (distances * valid).mean(), "number of real patches"),
        (mean_of_blocks, "counts the same"),
    ],
    "check_optimizer_steps": [
        (lambda images, batch, accumulation, epochs: images, "no accumulation"),
        (lambda images, batch, accumulation, epochs: epochs * (images // batch),
         "four forward passes"),
        (lambda images, batch, accumulation, epochs: -(-epochs * images // batch // accumulation),
         "dropped"),
        (lambda images, batch, accumulation, epochs: epochs * images // (batch * accumulation),
         "every epoch"),
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
        (fifth({"num_targets": 5, "out": "runs/five"}, "maybe"), "predicted"),
    ],
}


def checks():
    module = importlib.import_module("exercises_learning")
    return {name: getattr(module, name) for name in vars(module) if name.startswith("check_")}


def solution_of(name):
    """The function that the notebook's folded solution for one check defines."""
    notebook = read(LEARNING)
    names = {"torch": torch, "math": math, "diagnostics": diagnostics, "settings": settings}
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


@pytest.mark.parametrize(
    "name, number", [(name, i) for name, wrong in WRONG.items() for i in range(len(wrong))])
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
