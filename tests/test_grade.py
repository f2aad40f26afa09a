"""Grading a notebook, copies without solutions, and slides."""

import re

import nbformat
import pytest

from bench import slides
from config import UsageError
from tests import grade, student
from tests.notebooks import LEARNING, PROBE, exercises, read, shown, solved

each_notebook = pytest.mark.parametrize("path", [LEARNING, PROBE], ids=lambda path: path.stem)

# Ten wrong answers, one each of the commonest mistakes, and words of the message each must get.
WRONG = {
    "patch_of_pixel": ("def patch_of_pixel(y, x, patch_size, columns):\n"
                       "    return x // patch_size * columns + y // patch_size",
                       "pixel (0, 4) lies in patch 1, pixel (4, 0) in patch 6 "
                       "you returned 6 for patch_of_pixel(0, 4, 4, 6)"),
    "make_room": ("def make_room(blocks, context, min_keep):\n"
                  "    return [b if len(context - b) >= min_keep else blocks[0] for b in blocks]",
                  "the block that leaves too few becomes a copy of the first"),
    "pad_contexts": ("def pad_contexts(kept):\n"
                     "    longest = max(map(len, kept))\n"
                     "    rows = [row + [-1] * (longest - len(row)) for row in kept]\n"
                     "    context = torch.tensor(rows)\n"
                     "    return context, context >= 0",
                     "0 is legal in every grid; -1 is not"),
    "attend": ("def attend(query, keys, values, valid):\n"
               "    scores = keys @ query / len(query) ** 0.5\n"
               "    return scores.masked_fill(valid, -math.inf).softmax(0) @ values",
               "the mask is inverted"),
    "momentum_for": ("def momentum_for(steps):\n    return 1 - 0.5 / steps",
                     "the share that is left after n steps is m ** n"),
    "mean_over_real": ("def mean_over_real(distances, valid):\n"
                       "    return (distances * valid).mean()",
                       "it is divided by the number of real patches"),
    "has_collapsed": ("def has_collapsed(features):\n"
                      "    return features.std(0).mean() < 0.1",
                      "differ in one direction only"),
    "pooled": ("def pooled(encoder, images):\n    return encoder(images).mean(1)",
               "use torch.no_grad()"),
    "standardized": ("def standardized(train_x, test_x):\n"
                     "    scale = lambda x: (x - x.mean(0)) / x.std(0).clamp(min=1e-6)\n"
                     "    return scale(train_x), scale(test_x)",
                     "a test image may be the only one"),
    "confused": ("def confused(labels, predictions, K):\n"
                 "    return torch.bincount(predictions * K + labels, minlength=K * K).view(K, K)",
                 "a row is a *true* class"),
}


def cell_of(notebook, name):
    """The stub's cell of the exercise whose check takes the function of this name."""
    return next((notebook.cells[one.stub] for one in exercises(notebook)
                 if f"({name})" in notebook.cells[one.check].source), None)


@each_notebook
def test_a_solved_notebook_gets_the_full_score_and_an_unsolved_none(path):
    notebook = read(path)
    text = grade.report(grade.grade(solved(notebook)))
    count = len(exercises(notebook))
    assert f"{count} of {count} passed" in text.splitlines()[-1], text
    text = grade.report(grade.grade(notebook))
    assert text.count("not attempted") == count
    assert text.splitlines()[-1] == f"0 of {count} passed, 0 starred"


def test_ten_wrong_answers_get_messages_that_name_the_mistake():
    left = set(WRONG)
    for path in (LEARNING, PROBE):
        notebook = read(path)
        for name, (source, _) in WRONG.items():
            if cell := cell_of(notebook, name):
                cell.source = source
                left.remove(name)
        text = " ".join(grade.report(grade.grade(notebook)).split())
        assert " 0 of " in text
        for name, (_, words) in WRONG.items():
            assert words in text or not cell_of(notebook, name), f"{name}: {text}"
    assert not left


def test_what_a_cell_may_do_does_not_stop_the_grading():
    """A cell that is no Python, that raises, that ends the process, that prints; lost tags."""
    notebook = read(LEARNING)
    titles = [one.title for one in exercises(notebook)]
    stubs = [notebook.cells[one.stub] for one in exercises(notebook)]
    for cell in notebook.cells:
        cell.metadata.pop("tags", None)
    solution = exercises(notebook)[3].solution
    sources = ("def f(:", "1 / 0", "raise SystemExit", f"%time\nprint('a trial')\n{solution}")
    for stub, source in zip(stubs, sources):
        stub.source = source
    outcomes = grade.grade(notebook)
    assert [title for title, _ in outcomes] == titles
    for (_, outcome), error in zip(outcomes, ("SyntaxError", "ZeroDivisionError", "SystemExit")):
        assert str(outcome).startswith(f"failed: the cell raised {error}")
    assert outcomes[3][1]  # and the others are graded


def test_starred_exercises_are_counted():
    outcomes = [("Exercise 1. A", True), ("Exercise 2*. B", True), ("Exercise 3*. C", "failed: x")]
    text = grade.report(outcomes)
    assert text.splitlines()[-1] == "2 of 3 passed, 1 starred"


def test_the_command_line_prints_the_table_and_refuses_what_has_no_exercise(tmp_path, capsys):
    with pytest.raises(UsageError, match="name one notebook"):
        grade.main([])
    (tmp_path / "text.ipynb").write_text("no notebook")
    with pytest.raises(UsageError, match="is not a notebook"):
        grade.main([str(tmp_path / "text.ipynb")])
    nbformat.write(nbformat.v4.new_notebook(), tmp_path / "empty.ipynb")
    with pytest.raises(UsageError, match="has no exercises"):
        grade.main([str(tmp_path / "empty.ipynb")])
    notebook = read(PROBE)
    notebook.cells = notebook.cells[: exercises(notebook)[0].check + 1]
    nbformat.write(notebook, tmp_path / "one.ipynb")
    grade.main([str(tmp_path / "one.ipynb")])
    assert re.search(r"Exercise 1.* not attempted\n\n0 of 1 passed", capsys.readouterr().out)


def test_copies_for_students_have_hints_and_no_solutions_and_no_outputs(tmp_path):
    student.main(tmp_path / "student")
    for path in (LEARNING, PROBE):
        notebook, original = read(tmp_path / "student" / path.name), read(path)
        assert not any(shown(cell) for cell in notebook.cells)
        text = "\n".join(cell.source for cell in notebook.cells)
        assert "<summary>Solution" not in text
        for name in ("Hint", "Answer"):
            boxes = f"<summary>{name}</summary>"
            assert text.count(boxes) == sum(cell.source.count(boxes) for cell in original.cells)
        for one, other in zip(exercises(notebook), exercises(original), strict=True):
            assert one.title == other.title and not one.solution
            assert notebook.cells[one.stub].source == original.cells[other.stub].source
        code = "\n".join(cell.source for cell in original.cells if cell.cell_type == "code")
        lines = {line for one in exercises(original) for line in one.solution.splitlines()
                 if line.startswith("    ") and len(line) > 40}
        assert not [line for line in lines if line in text and line not in code]


@each_notebook
def test_slides_leave_out_setup_and_solutions_and_wait_with_what_answers_a_prediction(path):
    notebook = slides.marked(read(path))
    for before, cell in zip(notebook.cells, notebook.cells[1:]):
        kind = cell.metadata.slideshow.slide_type
        if "setup" in cell.metadata.get("tags", []) or "<summary>Solution" in cell.source:
            assert kind in ("skip", "notes")
        elif "**Predict" in before.source and cell.cell_type == "code":
            assert kind == "fragment"
        elif cell.cell_type == "markdown" and re.match("#{1,2} ", cell.source):
            assert kind == "slide"
