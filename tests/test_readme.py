"""The README's numbers are those of results/, its commands and files exist, and every piece of Python in it is run by a test."""

import csv
import json
import pathlib
import re
import statistics

import pytest

import config
import diagnostics
from extras import experiments

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def snippets(heading):
    """The Python under a heading of the README, a string for each block, as far as the next heading of any level."""
    section = re.split(rf"^#+ {re.escape(heading)}$", README, flags=re.MULTILINE)[1]
    text = re.split(r"^##+ ", section, flags=re.MULTILINE)[0]
    return re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def table_row(name, heading):
    """The numbers of the row that starts with `name` in the README's section `heading`."""
    section = README.split(heading, 1)[1].split("\n#", 1)[0]
    row = next(line for line in section.splitlines() if line.startswith(f"| {name} "))
    return [cell.strip() for cell in row.strip("|").split("|")[1:]]


def test_every_piece_of_python_in_the_readme_is_run_by_a_test():
    headings = re.findall(r"^##+ (.*)$", README, re.MULTILINE)
    shown = {heading for heading in headings if snippets(heading)}
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    assert shown == set(re.findall(r'\bsnippets\("(.+?)"\)', tests))
    assert sum(len(snippets(heading)) for heading in shown) == README.count("```python")


@pytest.mark.parametrize("preset,heading", [("shapes", "### Embedded shapes"), ("shapes3d", "### Embedded volumes")])
def test_the_tables_of_embedded_data_are_the_mean_and_deviation_of_the_three_committed_runs(preset, heading):
    runs = [json.loads((ROOT / f"results/{preset}_seed{seed}.json").read_text()) for seed in range(3)]
    for name in ("target encoder", "context encoder", "random encoder", "raw pixels"):
        for measure, cell in zip(("linear", "best", "knn", "precision@5"), table_row(name, heading), strict=True):
            values = [100 * run["features"][name.split()[0 if "raw" not in name else 1]][measure] for run in runs]
            assert cell == f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"


@pytest.mark.parametrize("preset,points", [("shapes", 0.40), ("shapes3d", 0.25)])
def test_the_target_beats_both_baselines_in_every_committed_run(preset, points):
    for seed in range(3):
        run = json.loads((ROOT / f"results/{preset}_seed{seed}.json").read_text())
        linear = {name: score["linear"] for name, score in run["features"].items()}
        assert linear["target"] - max(linear["random"], linear["pixels"]) > points


def test_volumes_are_learnt_in_under_ten_minutes_of_one_core():
    seconds = [json.loads((ROOT / f"results/shapes3d_seed{seed}.json").read_text())["training"]["seconds"] for seed in range(3)]
    assert max(seconds) < 600 and f"{min(seconds):.0f} to {max(seconds):.0f} s" in README


def test_two_cores_train_in_under_5_minutes():
    run = json.loads((ROOT / "results/shapes_two_cores.json").read_text())
    assert run["threads"] == 2 and run["seconds"] < 300
    assert f"{run['seconds']:.0f} s" in README and f"{run['images_per_second']:,.0f} images/s" in README


@pytest.mark.parametrize("preset", ["shapes", "shapes3d"])
def test_the_committed_runs_of_embedded_data_are_those_of_todays_presets(preset):
    today = config.from_preset(preset)
    for seed in range(3):
        run = json.loads((ROOT / f"results/{preset}_seed{seed}.json").read_text())
        then = config.from_dict(run["config"])
        changed = [f for f in vars(today) if f not in ("seed", "out") and getattr(today, f) != getattr(then, f)]
        assert changed == [] and then.seed == seed


@pytest.mark.parametrize("name", ["comparison", "comparison_cifar10", "ablations"])
def test_the_contrasts_tables_are_those_of_results(name):
    rows = json.loads((ROOT / f"results/{name}.json").read_text())["rows"]
    assert experiments.markdown(rows, "", "").strip().split("\n\n")[-1] in README.split("## The contrast")[1].split("\n## ")[0]


def test_what_is_said_of_the_contrast_is_so():
    """Who is ahead, by how much, and with how many of the seeds."""
    section = " ".join(README.split("## The contrast")[1].split("### What each part")[0].split())
    shapes, cifar, cut = ({name: row["runs"] for name, row in json.loads((ROOT / f"results/{file}.json").read_text())["rows"].items()}
                          for file in ("comparison", "comparison_cifar10", "comparison_cifar10_context12"))
    assert all(len(runs) == 3 for rows in (shapes, cifar) for runs in rows.values())

    def ahead(rows, name, other, measure):
        return [one[measure] - two[measure] for one, two in zip(rows[name], rows[other], strict=True)]

    for measure in ("linear", "knn", "1%", "10%", "fine_tuned"):
        assert statistics.mean(ahead(shapes, "MAE", "I-JEPA", measure)) > 0
        assert statistics.mean(ahead(shapes, "MAE, equal seconds", "MAE", measure)) > 0
    for measure in ("linear", "knn", "1%", "10%"):
        assert min(ahead(cut, "MAE", "I-JEPA", measure)) > 0
        assert all(min(ahead(rows, "supervised", name, measure)) > 0 for rows in (shapes, cifar) for name in ("MAE", "I-JEPA"))
    whole = json.loads((ROOT / "results/ablations.json").read_text())["rows"]["context scale .85 to 1, all of it"]["runs"]
    assert "it has {:.1f} and {:.1f}".format(*(100 * statistics.mean(run[key] for run in whole) for key in ("linear", "knn"))) in section
    level = [experiments.mean_and_spread([run["linear"] for run in cifar[name]]) for name in ("I-JEPA", "MAE")]
    assert "({} and {})".format(*level) in section
    assert abs(statistics.mean(ahead(cifar, "I-JEPA", "MAE", "linear"))) < 0.01
    for names, measure, sentence in ((("I-JEPA", "MAE"), "knn", "by kNN I-JEPA is ahead with every seed, by {} points"),
                                     (("MAE, equal seconds", "I-JEPA"), "linear", "by the linear probe with every seed, by {} points"),
                                     (("I-JEPA", "MAE, equal seconds"), "knn", "and I-JEPA by kNN still, by {}.")):
        by = ahead(cifar, *names, measure)
        assert sentence.format(experiments.mean_and_spread(by)) in section and min(by) > 0


def test_what_is_said_of_the_ablations_is_so():
    """Each claim, seed by seed where it is one of seeds."""
    rows = json.loads((ROOT / "results/ablations.json").read_text())["rows"]
    section = " ".join(README.split("### What each part")[1].split("\n## ")[0].split())
    whole, cut = rows["context scale .85 to 1, all of it"], rows["I-JEPA as it is"]
    lost = {name: experiments.gains(rows[name], whole) for name in ("masks: raster", "masks: one block of .6", "masks: random .6")}
    assert all(len(seeds) == 3 and max(seeds) < 0 for seeds in lost.values())
    assert "by {:.1f}, {:.1f} and {:.1f} points".format(*(-100 * statistics.mean(seeds) for seeds in lost.values())) in section
    one = experiments.gains(rows["1 target, all of the context"], whole)
    assert f"is behind by {-100 * statistics.mean(one):.1f}, with two seeds of three" in section and sum(gain < -0.01 for gain in one) == 2
    gained = experiments.gains(whole, cut)
    assert f"costs {experiments.mean_and_spread(gained)} points" in section and min(gained) > 0
    pixels = experiments.gains(rows["targets: pixels"], cut)
    assert f"({experiments.mean_and_spread(pixels, '+')})" in section and abs(statistics.mean(pixels)) < statistics.stdev(pixels)
    for name, row in rows.items():
        assert (min(run["linear"] for run in row["runs"]) < 0.25) == (name in ("no stop-gradient", "momentum 1"))
    assert f"costs {-100 * statistics.mean(experiments.gains(rows['momentum 0'], cut)):.0f} points" in section
    once = [row for name, row in rows.items() if len(row["runs"]) == 1 and name not in ("no stop-gradient", "momentum 0", "momentum 1")]
    assert max(abs(experiments.gains(row, cut)[0]) for row in once) < 0.0305


def test_the_cifar_table_is_the_committed_run():
    run = json.loads((ROOT / "results/cifar10_cpu.json").read_text())
    for name in ("target encoder", "context encoder", "random encoder", "raw pixels"):
        score = run["features"][name.split()[0 if "raw" not in name else 1]]
        assert table_row(name, "### CIFAR-10") == [f"{100 * score[measure]:.1f}" for measure in ("linear", "best", "knn", "precision@5")]


def test_the_shipped_encoders_table_is_what_was_measured_of_it():
    run = json.loads((ROOT / "encoders/cifar10-small.json").read_text())
    for name in ("target encoder", "random encoder", "raw pixels"):
        score = run["features"][name.split()[0 if "raw" not in name else 1]]
        expected = [f"{100 * score[measure]:.1f}" for measure in ("linear", "best", "knn", "precision@5")]
        assert table_row(name, "### An encoder that comes") == expected


def test_the_predictor_finds_the_hidden_patch_and_the_untrained_one_does_not():
    found = json.loads((ROOT / "results/cifar10_cpu_retrieval.json").read_text())
    assert found["trained"]["recall@10"] > 0.5 > 0.01 > found["untrained"]["recall@10"]
    assert f"{100 * found['trained']['recall@10']:.1f}% of {found['queries']:,} hidden patches" in " ".join(README.split())


def test_every_file_and_preset_the_readme_names_exists():
    links = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    assert links and all((ROOT / link).exists() for link in links)
    assert set(re.findall(r"--preset ([a-z0-9-]+)", README)) <= set(config.PRESETS)
    settings = vars(config.Config())
    flags = {"--" + name.replace("_", "-") for name in settings} | {"--help", "--nproc_per_node", "--max-restarts"}  # two are torchrun's
    flags |= {"--no-" + name.replace("_", "-") for name, value in settings.items() if isinstance(value, bool)}
    for script in ("train.py", "evaluate.py", "predict_and_visualize.py", "extras/experiments.py", "extras/benchmark.py"):
        flags |= set(re.findall(r'add_argument\("(--[a-z-]+)"', (ROOT / script).read_text(encoding="utf-8")))
    assert set(re.findall(r"(?<![-\w])--[a-z][a-z_-]+", README)) <= flags


def test_the_committed_shapes_runs_are_healthy_by_every_measure():
    """No warning at any time, and kNN at the end six times what it was before training."""
    for seed in range(3):
        with open(ROOT / f"results/shapes_seed{seed}_metrics.csv") as file:
            rows = [row for row in csv.DictReader(file) if row["rank"]]
        found = [{name: float(row[name]) for name in diagnostics.MEASURES} for row in rows]
        for row, now in zip(rows, found):
            assert diagnostics.warnings(now, found[0], int(row["step"]) / int(rows[-1]["step"])) == {}
        assert found[-1]["knn"] > 6 * found[0]["knn"] and found[-1]["rank"] > found[0]["rank"]


def test_only_without_the_stop_gradient_did_the_features_collapse_and_those_runs_said_so():
    variants = json.loads((ROOT / "results/collapse.json").read_text())["variants"]
    for name, run in variants.items():
        collapsed = name in ("no stop-gradient", "none of the three")
        assert (run["rows"][-1]["target_std"] < 0.05) == collapsed == bool(run["warnings"])
    healthy, collapsed = (variants[name]["rows"][-1]["held_out_loss"] for name in ("as it is", "no stop-gradient"))
    assert f"{collapsed:.4f}".lstrip("0") in README and f"{healthy:.2f}".lstrip("0") in README and healthy / collapsed > 490


def test_the_digits_are_those_of_the_committed_file():
    run = json.loads((ROOT / "results/digits.json").read_text())
    words = " and ".join(f"{statistics.mean(run[name]):.3f} ± {statistics.stdev(run[name]):.3f}" for name in ("pretrained", "untrained"))
    assert words.replace("0.", ".") in README
    assert f"prints {run['pretrained'][0]:.2f}, with `epochs=0` {run['untrained'][0]:.2f}".replace("0.", ".") in README


def test_what_decoding_costs_is_the_committed_measurement():
    run = json.loads((ROOT / "results/streaming.json").read_text())
    rate = run["images_per_second"]
    assert f"decodes {rate:.0f} made-up photographs" in README and f"about {1000 / rate:.0f} such cores" in README
    assert f"in about {1_281_167 / rate / 16 / 60:.0f} minutes" in README
    assert run["workers"] == 1 and abs(run["memory_slope_bytes_per_image"]) < 1500  # a hundredth of an image


def test_no_kill_and_no_fault_lost_anything():
    found = json.loads((ROOT / "results/reliability.json").read_text())
    assert found["kills"]["all"] >= 50 and found["kills"]["writing"] >= 10 and found["broken"] == found["different"] == 0
    assert all(row["passed"] == row["tests"] > 0 for row in found["faults"].values())
