"""Claims about the experiments: every row trains, no run trains twice, tables say what is so."""

import importlib
import json
import pathlib
import shlex
import shutil
import statistics

import numpy as np
import pytest

import config
import train
from config import UsageError
from extras import experiments, recipe

ROOT = pathlib.Path(experiments.__file__).parents[1]
TINY = ["--encoder", "16x2x1", "--predictor", "8x1x1", "--batch-size", "16", "--max-steps", "2",
        "--held-out", "0", "--device", "cpu"]
FEW = {name: experiments.ABLATIONS[name] for name in ("I-JEPA as it is", "masks: raster")}


@pytest.fixture
def noise(tmp_path, monkeypatch):
    """Flags for a data set of noise in an empty working folder; programs run in this process."""
    images = np.random.default_rng(0).integers(0, 256, (2, 1000, 24, 24, 3), dtype=np.uint8)
    np.savez(tmp_path / "noise.npz", train_images=images[0], train_labels=np.arange(1000) % 10,
             test_images=images[1, :100], test_labels=np.arange(100) % 10)
    monkeypatch.chdir(tmp_path)
    for folder in ("results", "images"):
        (tmp_path / folder).mkdir()
    monkeypatch.setattr(experiments, "call", run_here)
    return [*TINY, "--dataset", str(tmp_path / "noise.npz")]


def run_here(command, quiet=False):
    """Run the program of a command in this process."""
    words = shlex.split(command)[1:]
    module, flags = (words[1], words[2:]) if words[0] == "-m" else (words[0][:-3], words[1:])
    importlib.import_module(module).main(flags)


def rows_of(name):
    return json.loads(pathlib.Path(f"results/{name}.json").read_text())["rows"]


@pytest.mark.parametrize("preset, rows", [
    ("shapes", experiments.ABLATIONS), ("cifar10", experiments.RECIPE)])
def test_every_row_is_a_command_that_its_program_accepts(preset, rows, noise, monkeypatch):
    trained = []
    monkeypatch.setattr(train, "train", lambda config, *rest, **named: trained.append(config))
    monkeypatch.setattr(recipe.evaluate, "load_encoders", lambda folder: (
        {"target": train.build(config.from_preset("cifar10"))[0].target_encoder},
        config.from_preset("cifar10"), {}))  # the teacher's
    for program, flags, *_ in rows.values():
        usual = experiments.RECIPE_FLAGS if rows is experiments.RECIPE else []
        run_here(f"python {program} --preset {preset} {shlex.join(usual)} {flags} "
                 f"--image-size 32 {shlex.join(noise[-2:])}")
    assert len(trained) == len(rows)


def test_the_comparison_trains_each_run_once_and_shows_their_mean(noise, monkeypatch, capsys):
    monkeypatch.setattr(experiments, "equal_seconds", lambda args: {"MAE": 2.0, "supervised": 1.5})
    command = ["comparison", "--seeds", "0", "1", *noise]
    experiments.main(command)
    rows = rows_of("comparison")
    assert list(rows) == ["I-JEPA", "random init", "MAE", "MAE, equal seconds", "supervised",
                          "supervised, equal seconds"]
    assert "--epochs 20" in rows["MAE, equal seconds"]["runs"][0]["command"]  # twice the preset's
    assert len(list(pathlib.Path("runs/experiments").iterdir())) == 10  # random init has no run
    for name, row in rows.items():
        mean = 50 * sum(run["linear"] for run in row["runs"])
        assert f"| {name} | {mean:.1f}" in pathlib.Path("results/comparison.md").read_text()
    assert pathlib.Path("results/comparison.md").read_text() in capsys.readouterr().out
    monkeypatch.setattr(train, "train", lambda *_, **__: pytest.fail("trained again"))
    monkeypatch.setattr(experiments, "equal_seconds", lambda args: pytest.fail("timed again"))
    experiments.main(command)


def test_a_table_grows_by_a_seed_and_a_stopped_command_loses_no_row(noise, monkeypatch):
    """The run folders are gone: what results/ knows is neither trained again nor lost."""
    monkeypatch.setattr(experiments, "ABLATIONS", FEW)
    experiments.main(["ablations", *noise])
    before = rows_of("ablations")
    shutil.rmtree("runs")
    score = experiments.score

    def stopped(run, *how):
        if run.row == "masks: raster":
            raise KeyboardInterrupt
        return score(run, *how)

    monkeypatch.setattr(experiments, "score", stopped)
    with pytest.raises(KeyboardInterrupt):
        experiments.main(["ablations", "--seeds", "0", "1", *noise])
    after = rows_of("ablations")
    assert {name: row["runs"][0] for name, row in after.items()} == {
        name: row["runs"][0] for name, row in before.items()}
    assert [len(row["runs"]) for row in after.values()] == [2, 1]
    table = pathlib.Path("results/ablations.md").read_text()
    assert "| masks: raster |" in table and "T6: 15.5" in table


def test_the_ablations_end_in_a_figure_and_fine_tuning_is_a_column(noise, monkeypatch):
    monkeypatch.setattr(experiments, "ABLATIONS", FEW)
    experiments.main(["ablations", *noise])
    assert pathlib.Path("images/ablations.png").stat().st_size > 5000
    monkeypatch.setattr(train, "train", lambda *_, **__: pytest.fail("trained again"))
    experiments.main(["ablations", "--finetune", "1", *noise])
    assert "| 10% | fine-tuned | seeds |" in pathlib.Path("results/ablations.md").read_text()


def test_a_stopped_run_is_resumed_and_one_of_other_settings_is_not_taken_for_it(noise, monkeypatch):
    monkeypatch.setattr(experiments, "ABLATIONS", {"as it is": ("train.py", "", "-")})
    step, steps = train.train_step, []

    def interrupted(*args):
        steps.append(args)
        if len(steps) == 2:
            raise KeyboardInterrupt
        return step(*args)

    command = ["ablations", *noise, "--checkpoint-minutes", "0"]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "train_step", interrupted)
        experiments.main(command)
    with pytest.raises(UsageError, match="holds a run of .*--max-steps 2.*, not .*--max-steps 3"):
        experiments.main([*command, "--max-steps", "3"])
    assert not pathlib.Path("results/ablations.json").exists()  # nothing was scored yet
    experiments.main(command)
    assert rows_of("ablations")["as it is"]["runs"][0]["steps"] == 2


def test_runs_are_trained_side_by_side_in_processes_of_their_own(noise, monkeypatch):
    """And score what they score one after the other."""
    monkeypatch.setattr(experiments, "ABLATIONS", FEW)
    experiments.main(["ablations", *noise])
    alone = rows_of("ablations")
    for folder in ("runs", "results"):
        shutil.rmtree(folder)
    pathlib.Path("results").mkdir()
    pathlib.Path("train.py").symlink_to(ROOT / "train.py")
    monkeypatch.undo()  # call is the real one again
    monkeypatch.chdir(pathlib.Path(noise[-1]).parent)
    monkeypatch.setattr(experiments, "ABLATIONS", FEW)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    experiments.main(["ablations", "--jobs", "2", *noise])
    for name, row in rows_of("ablations").items():
        assert row["runs"][0]["linear"] == alone[name]["runs"][0]["linear"]
    with pytest.raises(UsageError, match="--no-such"):
        experiments.main(["ablations", "--jobs", "2", *noise, "--no-such", "1"])


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_a_run_that_fails_does_not_cost_the_scores_of_those_before(jobs, noise, monkeypatch):
    def train_run(run, quiet):
        if run.row != first:
            raise UsageError("it fails")

    first, _ = FEW
    monkeypatch.setattr(experiments, "ABLATIONS", FEW)
    monkeypatch.setattr(experiments, "train_run", train_run)
    monkeypatch.setattr(experiments, "score", lambda run, *_: {"linear": 0.5,
                                                               "command": run.command})
    with pytest.raises(UsageError, match="it fails"):
        experiments.main(["ablations", "--jobs", jobs, *noise])
    assert [*rows_of("ablations")] == [first]


def test_a_step_is_timed_without_those_that_warm_up(tmp_path, monkeypatch):
    """A second to start, then a tenth a step: images_per_second is the mean since the start."""

    def fake(command, quiet):
        folder = pathlib.Path(shlex.split(command)[-1])
        rows = [f"{n},{128 * n / (1 + 0.1 * n)}" for n in range(1, 51)]
        (folder / "config.json").write_text('{"batch_size": 128}')
        (folder / "metrics.csv").write_text("\n".join(["step,images_per_second", *rows]))

    monkeypatch.setattr(experiments, "call", fake)
    args = type("Args", (), {"preset": "shapes", "flags": []})
    assert experiments.time_steps(args, "train.py") == pytest.approx(40 * 0.1)


def test_equal_seconds_is_the_median_of_rounds(monkeypatch):
    """A round in which the machine was busy, for one method or for all, changes nothing."""
    times = iter([(3.0, 1.0, 2.0), (30.0, 10.0, 20.0), (3.0, 9.0, 2.0)])
    monkeypatch.setattr(experiments, "time_steps", lambda args, program, flags: next(one))
    one = iter([value for row in times for value in row])
    assert experiments.equal_seconds(None, rounds=3) == {"MAE": 3.0, "supervised": 1.5}


def test_each_row_of_the_dial_gets_the_first_row_s_seconds_on_its_own_images(noise, monkeypatch):
    monkeypatch.setattr(experiments, "equal_seconds", lambda *_: {"MAE": 1.5, "supervised": 2.0})
    monkeypatch.setattr(experiments, "DETAIL", (0.0, 1.0))
    monkeypatch.setattr("support.shapes.COUNT", {"train": 640, "test": 64})
    monkeypatch.setattr("support.shapes.make.__defaults__", (64,))
    experiments.main(["dial", *noise[:-2]])
    rows = rows_of("dial")
    assert [*rows] == [f"{name}, detail {detail}" for detail in (0, 1)
                       for name in experiments.METHODS]
    assert [row["runs"][0]["steps"] for row in rows.values()] == [2, 3, 4] * 2
    plain, confetti = (np.load(f"data/dial/shapes-{detail}.npz")["test_images"].astype(float)
                       for detail in (0, 1))
    assert pathlib.Path("images/dial.png").stat().st_size > 5000
    assert plain.mean(axis=0).std() > 2 * confetti.mean(axis=0).std()  # the wallpaper is in all


def test_the_recipe_is_judged_on_training_images_that_were_held_out(noise, monkeypatch):
    first, second = [*experiments.RECIPE.items()][:2]
    monkeypatch.setattr(experiments, "equal_seconds", lambda *_: {second[0]: 2.0})  # x a third
    monkeypatch.setattr(experiments, "RECIPE", dict([first, second]))
    load = experiments.data.load

    def no_test_images(name, split, *rest):
        assert split == "train"
        return load(name, split, *rest)

    monkeypatch.setattr(experiments.data, "load", no_test_images)
    experiments.main(["recipe", *noise, "--image-size", "24", "--held-out", "50",
                      "--max-steps", "6"])
    assert [row["runs"][0]["steps"] for row in rows_of("recipe").values()] == [6, 4]


def test_a_student_has_the_teacher_of_its_seed_and_what_the_teacher_left_of_the_time(
        noise, monkeypatch):
    mae, student = "an MAE, a third of the time", [*experiments.RECIPE][-1]
    rows = {name: experiments.RECIPE[name] for name in ("4 masks of 32 images", mae, student)}
    monkeypatch.setattr(experiments, "RECIPE", rows)
    monkeypatch.setattr(experiments, "equal_seconds", lambda *_: {mae: 2.0})
    experiments.main(["recipe", "--seeds", "3", *noise, "--max-steps", "6", "--held-out", "50",
                      "--image-size", "24"])
    found = {name: row["runs"][0] for name, row in rows_of("recipe").items()}
    assert [run["steps"] for run in found.values()] == [6, 4, 4]
    teacher = shlex.split(found[student]["command"])[6]
    assert f"--out {teacher}" in found[mae]["command"] and teacher.endswith("-3")


def test_gains_are_taken_seed_by_seed():
    """A seed that is lucky for both rows counts for neither: 70, 80 and 75, 85 is a gain of 5."""

    def row(*scores):
        runs = [{"seed": seed, "linear": linear} for seed, linear in scores]
        return {"paper": "-", "runs": runs}

    rows = {"as it is": row((0, 0.7), (1, 0.8)), "better": row((1, 0.85), (0, 0.75)),
            "worse": row((1, 0.7))}
    first, better, worse = experiments.markdown(rows, "", "").splitlines()[-3:]
    assert first.endswith(f"| 75.0 ± {100 * statistics.stdev((0.7, 0.8)):.1f} | 2 |  | - |")
    assert better.endswith("| 80.0 ± 7.1 | 2 | +5.0 ± 0.0 | - |")
    assert worse.endswith("| 70.0 | 1 | -10.0 | - |")
