"""Claims about the notebooks: how they are built, and that they run as they are and with the
exercises solved. (That the checks of the exercises can fail: test_exercises_learning.py, _probe.)

The executions set IJEPA_FAST=1, which the notebooks' preset cell reads, and happen in a copy of the
files a notebook needs, so that no run folder is touched.
"""

import ast
import dis
import importlib.machinery
import os
import re
import shutil
import subprocess
import sys
import types

import pytest
from nbclient import NotebookClient

from bench import colab
from tests.notebooks import LEARNING, PROBE, ROOT, exercises, read, shown, solved, tags

EXERCISES = 12  # over both notebooks
LINES = 13  # of code in a cell
MEGABYTES = 3.0


def code_lines(cell):
    """Lines of a code cell that are neither blank nor only a comment."""
    lines = map(str.strip, cell.source.splitlines())
    return [line for line in lines if line and not line.startswith("#")]


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
            long = {"setup", "capstone"} & set(tags(cell))
            assert long or len(code_lines(cell)) <= LINES, cell.source
            assert max(map(len, cell.source.splitlines())) <= 100, cell.source


@each_notebook
def test_it_was_run_from_top_to_bottom_and_shows_something(path):
    code = [cell for cell in read(path).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert not any(output.output_type == "error" for output in outputs)
    assert not any(output.get("name") == "stderr" for output in outputs)
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
    """Those are the modules': nothing here is a Module, is called a loss, or steps an optimizer.

    Free of this are the reader's cells, the capstone among them, and those tagged `by-hand`, which
    write a step out on a toy and compare it with PyTorch's or the module's.
    """
    free = {"exercise", "by-hand"}
    code = [cell.source for cell in read(path).cells
            if cell.cell_type == "code" and not free & set(tags(cell))]
    for node in ast.walk(ast.parse(re.sub(r"^%.*$", "", "\n".join(code), flags=re.M))):
        if isinstance(node, ast.ClassDef):
            assert not any("Module" in ast.unparse(base) for base in node.bases), node.name
        if isinstance(node, ast.FunctionDef):
            assert "loss" not in node.name, node.name
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            assert not (node.func.attr == "step" and not node.args), ast.unparse(node)


def names_of(source):
    """The names that a cell's code needs from earlier cells, and those that it binds."""
    code, needed, bound, inner = compile(source, "cell", "exec"), set(), set(), set()
    for instruction in dis.get_instructions(code):
        if instruction.opname == "STORE_NAME":
            bound.add(instruction.argval)
        elif instruction.opname == "LOAD_NAME" and instruction.argval not in bound:
            needed.add(instruction.argval)
    nested = [code]
    while nested:  # functions and, before Python 3.12, comprehensions
        for part in nested.pop().co_consts:
            if isinstance(part, types.CodeType):
                nested.append(part)
                inner |= {i.argval for i in dis.get_instructions(part) if i.opname == "LOAD_GLOBAL"}
    return needed | inner - bound, bound


@each_notebook
def test_a_name_that_another_section_needs_has_one_meaning(path):
    """It is bound in one section only."""
    section, made, last, crossing = 0, {}, {}, set()
    for cell in read(path).cells:
        if cell.cell_type == "markdown":
            section += cell.source.startswith("## ")
        elif "exercise" not in tags(cell):
            needed, bound = names_of(re.sub("^%.*$", "", cell.source, flags=re.M))
            crossing |= {name for name in needed if last.get(name, section) != section}
            for name in bound:
                last[name] = section
                made.setdefault(name, set()).add(section)
    assert crossing & {"CONFIG", "settings"}
    twice = {name: made[name] for name in crossing if len(made[name]) > 1}
    assert not twice


@each_notebook
def test_outputs_have_no_errors_no_warnings_and_no_absolute_paths(path):
    for cell in read(path).cells:
        for output in cell.get("outputs", []):
            assert output.get("name") != "stderr", f"{cell.source}\n\n{output.text}"
        text = shown(cell)
        assert not re.search(r"\w*Warning\b|\bwarning:|Traceback", text), text
        assert not re.search(r"(?<![\w.:/])(/[\w.-]+){2,}|\b[A-Z]:\\\\", text), text


@each_notebook
def test_every_prediction_that_is_asked_for_is_answered(path):
    """After the code that a question precedes comes an answer: a folded box, or some text before
    the next heading. (Whether it answers, a reader must judge.)"""
    cells = read(path).cells
    opening = next(i for i, cell in enumerate(cells) if cell.source.startswith("## "))
    for i, cell in enumerate(cells):
        if i >= opening and cell.cell_type == "markdown" and "**Predict" in cell.source:
            code = next(j for j in range(i, len(cells)) if cells[j].cell_type == "code")
            after = next(c.source for c in cells[code:] if c.cell_type == "markdown")
            text = re.split(r"^#", after, flags=re.M)[0]
            assert "<summary>Answer</summary>" in after or len(text.split()) >= 5, cell.source


@each_notebook
def test_it_is_light_and_bears_no_trace_of_the_machine(path):
    text = path.read_text()
    assert len(text) < MEGABYTES * 1e6
    assert not re.search(r"/home/\w|/root/|/Users/\w|/tmp/|/work/", text)
    assert not re.search(r'"execution": \{|application/vnd.jupyter.widget', text)
    assert read(path).metadata.kernelspec.name == "python3"


@each_notebook
def test_every_exercise_has_a_stub_a_check_a_hint_and_a_folded_solution(path):
    notebook = read(path)
    for exercise in exercises(notebook):
        assert "exercise" in notebook.cells[exercise.stub - 1].source.lower()
        source = notebook.cells[exercise.stub].source
        assert re.search(r"^\s+(\.\.\.|return None)", source, re.M), source
        call = notebook.cells[exercise.check].source.strip()
        assert re.fullmatch(r"\w+\.check_\w+\(\w+\)", call)
        assert exercise.solution, source
        boxes = notebook.cells[exercise.check + 1].source
        assert re.match(r"<details>\s*<summary>Hint</summary>.*?</details>", boxes, re.S), source
        assert "not attempted" in shown(notebook.cells[exercise.check])


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
    needed = ("*.py", "support/*.py", "extras/*.py", "tests/exercises*.py", "encoders/*",
              "images/*.svg", "results/*.json")
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
    for exercise in exercises(notebook):
        assert shown(notebook.cells[exercise.check]) == "not attempted"


@each_notebook
def test_it_runs_with_every_exercise_solved(path, copied):
    notebook = execute(solved(read(path)), copied)
    for exercise in exercises(notebook):
        result = shown(notebook.cells[exercise.check])
        assert result.startswith("passed: "), f"{exercise.title}: {result}"
