"""Claims about the house: who imports whom, what stands at the root, and how long it is."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[2]
CORE = ("config", "masking", "models", "data", "diagnostics", "train", "evaluate",
        "predict_and_visualize")
LIBRARIES = {"torch", "numpy", "tqdm", "matplotlib", "sklearn", "threadpoolctl"}  # sklearn's own


def imported(path):
    """The first words of all that a module imports, with the first two of our own packages."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


def rooms(path):
    """The top-level names that a module imports."""
    return {name.split(".")[0] for name in imported(path)}


def test_the_core_is_eight_files_at_the_root():
    assert {path.stem for path in ROOT.glob("*.py")} == set(CORE)


@pytest.mark.parametrize("name", CORE)
def test_the_core_imports_the_core_support_and_five_libraries(name):
    import sys

    standard = set(sys.stdlib_module_names)
    allowed = standard | LIBRARIES | set(CORE) | {"support"}
    assert rooms(ROOT / f"{name}.py") <= allowed


@pytest.mark.parametrize("path", sorted((ROOT / "support").glob("*.py")), ids=lambda p: p.stem)
def test_support_imports_nothing_of_ours_but_config_and_itself(path):
    assert not rooms(path) & (set(CORE) - {"config"} | {"extras", "bench", "tests"})


def test_nothing_imports_extras_but_extras_tests_bench_and_notebooks():
    for path in (*ROOT.glob("*.py"), *ROOT.glob("support/*.py")):
        assert "extras" not in rooms(path), path.name


def test_no_package_shadows_a_library():
    """A local folder called `datasets` would hide the library of that name."""
    for name in ("datasets", "transformers", "timm", "lightning", "evaluate"):
        assert not (ROOT / name).is_dir()


@pytest.mark.parametrize("path", [ROOT / f"{name}.py" for name in CORE] + sorted(
    ROOT.glob("support/*.py")) + sorted(ROOT.glob("extras/*.py")),
    ids=lambda p: p.relative_to(ROOT).as_posix())
def test_a_line_fits_on_a_projected_page(path):
    assert max(map(len, path.read_text().splitlines()), default=0) <= 100
