"""Claims about the comparisons: every row can be trained, a finished run is not trained twice, and the table says what the runs scored."""

import json
import shutil

import pytest

import experiments
import train
from config import UsageError

TINY = ["--encoder", "16x2x1", "--batch-size", "16", "--max-steps", "2", "--held-out", "0", "--device", "cpu"]


@pytest.fixture(autouse=True)
def few_shapes(tmp_path, monkeypatch):
    monkeypatch.setattr("shapes.COUNT", {"train": 3000, "test": 100})
    monkeypatch.setattr("shapes.make.__defaults__", (100,))
    monkeypatch.chdir(tmp_path)
    for folder in ("results", "images"):
        (tmp_path / folder).mkdir()


def test_every_ablation_is_a_command_that_train_accepts():
    for flags, paper in experiments.ABLATIONS.values():
        run = experiments.config.from_arguments(experiments.config.parser("").parse_args(flags))
        experiments.methods.build(run)
        assert paper


def test_the_comparison_trains_each_run_once_and_its_table_is_their_mean(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(experiments, "steps_in_the_time_of_one", lambda args, flags: 2.0 if "mae" in flags else 1.0)
    experiments.main(["comparison", "--seeds", "0", "1", "--finetune", "0", *TINY])
    rows = json.loads((tmp_path / "results/comparison.json").read_text())["rows"]
    assert set(rows) == {"I-JEPA", "random init", "MAE", "MAE, equal seconds", "supervised"}
    assert "--epochs 20" in rows["MAE, equal seconds"]["runs"][0]["command"]  # twice the preset's ten
    mean = 50 * sum(run["linear"] for run in rows["MAE"]["runs"])
    table = (tmp_path / "results/comparison.md").read_text()
    assert f"| MAE | {mean:.1f} ± " in table and table in capsys.readouterr().out
    monkeypatch.setattr(train, "train", lambda *_: pytest.fail("a finished run is trained again"))
    experiments.main(["comparison", "--seeds", "0", "1", "--finetune", "0", *TINY])


def test_a_table_grows_on_another_machine_from_what_results_knows(tmp_path, monkeypatch):
    """The runs themselves are gone there: only the third seed is trained, the other two are taken from the file."""
    monkeypatch.setattr(experiments, "steps_in_the_time_of_one", lambda args, flags: 2.0 if "mae" in flags else 1.0)
    flags = ["--finetune", "0", "--epochs", "3", *TINY]
    experiments.main(["comparison", "--seeds", "0", "1", *flags])
    before = json.loads((tmp_path / "results/comparison.json").read_text())["rows"]
    shutil.rmtree(tmp_path / "runs")
    monkeypatch.setattr(experiments, "steps_in_the_time_of_one", lambda *_: pytest.fail("timed twice"))
    experiments.main(["comparison", "--seeds", "0", "1", "2", *flags])
    after = json.loads((tmp_path / "results/comparison.json").read_text())["rows"]
    assert {name: row["runs"][:2] for name, row in after.items()} == {name: row["runs"] for name, row in before.items()}
    assert all(len(row["runs"]) == 3 for row in after.values())
    assert "--epochs 6" in after["MAE, equal seconds"]["runs"][2]["command"]  # twice those asked for, which come before
    assert len(list((tmp_path / "runs/experiments").iterdir())) == 4  # four methods and budgets, one seed


def test_the_ablations_end_in_a_table_beside_the_papers_numbers_and_a_figure(tmp_path, monkeypatch):
    few = {name: experiments.ABLATIONS[name] for name in ("I-JEPA as it is", "1 target")}
    monkeypatch.setattr(experiments, "ABLATIONS", few)
    experiments.main(["ablations", *TINY])
    table = (tmp_path / "results/ablations.md").read_text()
    assert "| 1 target |" in table and "T10: 9.0" in table
    assert (tmp_path / "images/ablations.png").stat().st_size > 5000


def test_a_flag_that_train_does_not_know_is_refused():
    with pytest.raises(UsageError, match="--no-such"):
        experiments.main(["ablations", "--no-such", "1"])
