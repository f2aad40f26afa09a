"""Claims about the planted bugs: each is caught by its own test and by no other, the sound code
passes all; each trains; and the exercise says which names are right and what speaks against one."""

import json

import pytest

import exercises_bugs
import models
from extras import bugs


@pytest.mark.parametrize("name", ["sound", *bugs.BUGS])
def test_a_bug_is_caught_by_its_own_test_and_by_no_other(name):
    rows = exercises_bugs.settle(bugs.BUGS.get(name, bugs.SOUND))
    caught = [check for check, row in zip(exercises_bugs.CHECKS, rows) if not row[3]]
    assert caught == [name] * (name != "sound")


def test_a_planted_function_is_taken_out_again():
    sound = models.explicit_attention
    with bugs.planted(bugs.BUGS["inverted mask"], exercises_bugs.SMALL):
        assert models.explicit_attention is bugs.inverted_attention
    assert models.explicit_attention is sound


def test_the_runs_are_those_of_the_results_file_and_are_drawn(monkeypatch, tmp_path):
    """Two steps of each on few images; the second call has nothing left to train."""
    monkeypatch.setattr("support.shapes.COUNT", {"train": 700, "test": 100})
    monkeypatch.setattr("support.shapes.make.__defaults__", (100,))
    sound = bugs.train_one
    monkeypatch.setattr(bugs, "PLACE", tmp_path / "bugs.json")
    monkeypatch.setattr(bugs, "train_one", lambda bug, seed, dataset: sound(
        bug, seed, dataset, 2, 1, encoder="16x1x1", predictor="8x1x1", precision="fp32"))
    bugs.main(["--seeds", "0"])
    found = json.loads(bugs.PLACE.read_text())
    monkeypatch.setattr(bugs, "train_one", None)
    bugs.main(["--seeds", "0"])
    committed = json.loads((bugs.Path(bugs.__file__).parents[1] / "results/bugs.json").read_text())
    assert committed["runs"].keys() == found["runs"].keys() == {"sound", *bugs.BUGS}
    for runs in committed["runs"].values():
        assert runs["0"].keys() == found["runs"]["sound"]["0"].keys()
        assert runs["0"]["step"] == [bugs.STEPS * i / bugs.MEASUREMENTS
                                     for i in range(bugs.MEASUREMENTS + 1)]
    assert {found[name] is not None for name in ("command", "hardware", "date", "what")} == {True}
    axes = bugs.figure(found, "AB").axes
    assert len(axes) == 2 * len(bugs.PANELS) and axes[0].get_ylabel() == "case A"
    assert len(axes[0].lines) == 2 and len(axes[5].lines) == 4


def test_the_curves_are_as_the_notebook_says():
    runs = json.loads(bugs.PLACE.read_text())["runs"]
    sound, measures = runs["sound"], ("knn", "target_std", "rank", "cosine")

    def difference(one, other, name):
        return max(abs(a - b) for a, b in zip(one[name], other[name]))

    def gap(run):  # of the predictor over the mean of the place
        return [a - b for a, b in zip(run["cosine"], run["mean_cosine"])]

    for seed in map(str, bugs.SEEDS):
        for name in ("EMA before the step", "targets not layer-normed", "decayed norms"):
            for measure in measures:  # less than half of what another seed changes
                assert (difference(runs[name][seed], sound[seed], measure)
                        < difference(sound["0"], sound["1"], measure) / 2), (name, measure)
        def of(name, seed=seed):
            return runs[name][seed]

        assert min(of("sum for mean")["loss"][1:]) > 10_000 * max(sound[seed]["loss"][1:])
        assert of("schedule in batches")["grad_norm"][-1] > sound[seed]["grad_norm"][-1]
        assert max(of("gradient into the target")["target_std"][1:]) < 0.1
        assert max(of("inverted mask")["knn"]) < 0.16 and max(gap(of("inverted mask"))) < 0.001
        assert max(gap(of("no positions in the predictor"))) < 0
        leak = of("leaking patches")
        assert gap(leak)[3] > gap(sound[seed])[3] + 0.03
        assert leak["loss"][-1] < sound[seed]["loss"][-1] / 2
        assert leak["target_std"][-1] < sound[seed]["target_std"][-1] - 0.2
        chosen = of("test set selects")
        assert all(a >= b for a, b in zip(chosen["knn"], sound[seed]["knn"]))
        assert all(chosen[name] == sound[seed][name] for name in chosen if name != "knn")


def test_every_letter_is_another_bug():
    assert sorted(bugs.CASES.values()) == sorted(bugs.BUGS) == sorted(exercises_bugs.SIGNS)
    assert list(bugs.CASES.values()) != list(bugs.BUGS) and "".join(bugs.CASES) == "ABCDEFGHIJ"


def test_the_exercise_says_what_is_right_and_what_speaks_against_a_wrong_name(capsys):
    check, cases = exercises_bugs.check_diagnosis, bugs.CASES
    assert check(lambda: dict(cases))
    assert repr(check(lambda: dict.fromkeys(cases))) == "not attempted"
    assert "the letters are A to J" in repr(check(lambda: {"K": "sum for mean"}))
    assert "unknown: ['wrong mask']" in repr(check(lambda: {"A": "wrong mask"}))
    letters = {name: letter for letter, name in cases.items()}
    right, wrong = letters["leaking patches"], letters["inverted mask"]
    said = repr(check(lambda: {right: "leaking patches", wrong: "sum for mean"}))
    assert said.startswith("failed: every case has the name of its bug\n")
    assert f"named rightly: {right}\n" in said
    assert f"{wrong} is not 'sum for mean': with that bug the loss" in said
    assert said.count("not named: ") == 1
    for letter, name in cases.items():  # each other name has something that speaks against it
        for other in bugs.BUGS:
            if other != name:
                said = repr(check(lambda a=letter, n=other: {a: n}))  # noqa: B023
                assert exercises_bugs.SIGNS[other][0] in said
                assert exercises_bugs.SIGNS[name][1] in said
    exercises_bugs.print_tests("sound")
    assert "FAIL" not in capsys.readouterr().out
    exercises_bugs.print_tests(letters["decayed norms"])
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 10 and [line[:4] for line in out].count("FAIL") == 1
    assert "norms and biases that are decayed: 32, should be 0" in "\n".join(out)
