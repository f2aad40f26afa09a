"""Claims about the comparisons: every row can be trained, a finished run is not trained twice, and the table says what the runs scored."""

import json
import shutil

import numpy as np
import pytest

from extras import experiments
import train
from config import UsageError

TINY = ["--encoder", "16x2x1", "--batch-size", "16", "--max-steps", "2", "--held-out", "0", "--device", "cpu"]


@pytest.fixture(autouse=True)
def few_shapes(tmp_path, monkeypatch):
    monkeypatch.setattr("support.shapes.COUNT", {"train": 3000, "test": 100})
    monkeypatch.setattr("support.shapes.make.__defaults__", (100,))
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


def test_side_by_side_too_each_run_of_the_comparison_is_trained_once(tmp_path, monkeypatch):
    """I-JEPA's run stands in two rows, its own and that of its untrained encoder: two processes must not write one folder."""
    commands = []
    monkeypatch.setattr(experiments, "steps_in_the_time_of_one", lambda *_: 1.0)
    monkeypatch.setattr(experiments.subprocess, "run", lambda words, **_: commands.append(words))
    experiments.main(["comparison", "--finetune", "0", "--jobs", "2", *TINY])
    folders = [words[words.index("--out") + 1] for words in commands]
    assert sorted(folders) == [f"runs/experiments/shapes-{name}-0" for name in ("i-jepa", "mae", "supervised")]


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


def test_a_command_that_is_stopped_has_lost_no_row_that_results_knew(tmp_path, monkeypatch):
    """All rows of one seed come before any of the next; the rows not reached are those of before, beside the new ones."""
    few = {name: experiments.ABLATIONS[name] for name in ("I-JEPA as it is", "1 target", "2 targets")}
    monkeypatch.setattr(experiments, "ABLATIONS", few)
    experiments.main(["ablations", *TINY])
    shutil.rmtree(tmp_path / "runs")
    score, scored = experiments.score, []

    def stopped(*args):
        if len(scored) == 1:
            raise KeyboardInterrupt
        scored.append(args)
        return score(*args)

    monkeypatch.setattr(experiments, "score", stopped)
    with pytest.raises(KeyboardInterrupt):
        experiments.main(["ablations", "--seeds", "0", "1", *TINY])
    rows = json.loads((tmp_path / "results/ablations.json").read_text())["rows"]
    assert {name: len(row["runs"]) for name, row in rows.items()} == {"I-JEPA as it is": 2, "1 target": 1, "2 targets": 1}


def test_a_folder_that_holds_a_run_of_other_settings_is_not_taken_for_the_one_asked(tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "ABLATIONS", {"I-JEPA as it is": ([], "")})
    experiments.main(["ablations", *TINY])
    with pytest.raises(UsageError, match="I-JEPA-as-it-is-0 holds a run of .*--max-steps 2.*, asked is .*--max-steps 3"):
        experiments.main(["ablations", *TINY, "--max-steps", "3"])
    assert json.loads((tmp_path / "results/ablations.json").read_text())["rows"] == {}


def test_scores_with_another_number_of_labels_are_measured_anew_and_the_run_is_not_trained_again(tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "ABLATIONS", {"I-JEPA as it is": ([], "")})
    experiments.main(["ablations", *TINY])
    monkeypatch.setattr(train, "train", lambda *_: pytest.fail("trained again"))
    for labels in ("0", "2000"):  # all 3,000, and fewer
        experiments.main(["ablations", "--labels", labels, *TINY])
        (run,) = json.loads((tmp_path / "results/ablations.json").read_text())["rows"]["I-JEPA as it is"]["runs"]
        assert run["labels"] == int(labels)


def test_gains_are_taken_seed_by_seed():
    """A seed that is lucky for both rows counts for neither: 70 and 80 beside 75 and 85 is a gain of five, without spread."""
    def row(*scores):
        return {"paper": "-", "runs": [{"seed": seed, "linear": linear} for seed, linear in scores]}

    rows = {"as it is": row((0, 0.7), (1, 0.8)), "better": row((1, 0.85), (0, 0.75)), "worse": row((1, 0.7),)}
    lines = experiments.markdown(rows, "", "").splitlines()
    assert lines[-3].endswith("| 75.0 ± 7.1 | 2 |  | - |")
    assert lines[-2].endswith("| 80.0 ± 7.1 | 2 | +5.0 ± 0.0 | - |") and lines[-1].endswith("| 70.0 | 1 | -10.0 | - |")


def test_the_levers_of_the_recipe_are_trained_side_by_side_and_end_as_if_one_after_the_other(tmp_path, monkeypatch):
    few = {name: experiments.RECIPE[name] for name in ("preset", "EMA .98")}
    monkeypatch.setattr(experiments, "RECIPE", few)
    data = np.random.default_rng(0).integers(0, 256, (2, 3000, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "noise.npz", train_images=data[0], train_labels=np.arange(3000) % 10, test_images=data[1, :100],
             test_labels=np.arange(100) % 10)
    flags = ["recipe", "--preset", "cifar10", "--dataset", str(tmp_path / "noise.npz"), "--image-size", "16", *TINY]
    flags += ["--predictor", "8x1x1", "--context-size", "2", "--min-keep", "1"]
    with monkeypatch.context() as patch:
        patch.setattr(train, "train", lambda *_: pytest.fail("trained here, not by a process of its own"))
        experiments.main([*flags, "--jobs", "2"])
    side_by_side = json.loads((tmp_path / "results/recipe_cifar10.json").read_text())["rows"]
    assert list(side_by_side) == list(few)
    for folder in ("runs", "results"):
        shutil.rmtree(tmp_path / folder)
    (tmp_path / "results").mkdir()
    experiments.main(flags)
    alone = json.loads((tmp_path / "results/recipe_cifar10.json").read_text())["rows"]
    for name in few:
        assert side_by_side[name]["runs"][0]["linear"] == alone[name]["runs"][0]["linear"]


def test_every_lever_of_the_recipe_is_a_command_that_train_accepts():
    for flags in experiments.RECIPE.values():
        arguments = experiments.config.parser("").parse_args(["--preset", "cifar10", *flags])
        experiments.methods.build(experiments.config.from_arguments(arguments))


def test_budgets_are_minutes_that_the_schedules_are_fitted_to(tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "BUDGETS", (0.02,))
    experiments.main(["budgets", *[word for word in TINY if word not in ("--max-steps", "2")], "--labels", "0"])
    (run,) = json.loads((tmp_path / "results/budgets.json").read_text())["rows"]["0.02 min"]["runs"]
    assert run["seconds"] < 60 and "--max-minutes 0.02" in run["command"]
    assert "all labelled images" in (tmp_path / "results/budgets.md").read_text()


def test_a_flag_that_train_does_not_know_is_refused():
    with pytest.raises(UsageError, match="--no-such"):
        experiments.main(["ablations", "--no-such", "1"])
