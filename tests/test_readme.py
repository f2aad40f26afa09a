"""The pages' numbers are those of results/, what they name exists, and their Python is tested."""

import csv
import json
import re
import statistics
from pathlib import Path

import pytest
import torch

import config
import data
import diagnostics
import evaluate
import train
from extras import ablations, experiments
from masking import MultiBlockMasking
from support import checkpoint
from tests import notebooks

ROOT = Path(__file__).parents[1]
FILES = [ROOT / "README.md", ROOT / "TEACHING.md", *sorted(ROOT.glob("docs/*.md")),
         ROOT / "results/README.md"]
PAGES = {path.name if path.parent != ROOT / "results" else f"results/{path.name}":
         path.read_text(encoding="utf-8") for path in FILES}
ALL = "\n".join(PAGES.values())
ROWS = {"target encoder": "target", "context encoder": "context", "untrained encoder": "random",
        "raw pixels": "pixels"}


def read(name):
    """A committed JSON file of measurements, such as shapes_seed0."""
    folder = ROOT / ("encoders" if name == "cifar10-ijepa" else "results")
    return json.loads((folder / f"{name}.json").read_text())


def seeds(name):
    """The committed runs of the seeds 0, 1, 2."""
    return [read(f"{name}_seed{seed}") for seed in range(3)]


def section(page, heading):
    """A page from a heading to the next of any level, white space as single blanks."""
    text = re.split(rf"^#+ {re.escape(heading)}$", PAGES[page], flags=re.MULTILINE)[1]
    return " ".join(re.split(r"^#+ ", text, flags=re.MULTILINE)[0].split())


def snippets(heading):
    """The Python under a heading of a page, a string for each block."""
    parts = re.split(rf"^##+ {re.escape(heading)}$", ALL, flags=re.MULTILINE)
    assert len(parts) == 2, heading
    text = re.split(r"^##+ ", parts[1], flags=re.MULTILINE)[0]
    return re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def table(page, heading):
    """The first table under a heading: name of a row -> its cells, strings."""
    text = re.split(rf"^#+ {re.escape(heading)}$", PAGES[page], flags=re.MULTILINE)[1]
    lines = re.search(r"(^\|.*\n)+", text, re.MULTILINE)[0].splitlines()[2:]
    rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    return {name: cells for name, *cells in rows}


def percent(values):
    """Fractions as percent, mean ± deviation where there are several; as the pages show them."""
    values = [100 * value for value in values]
    if len(values) == 1:
        return f"{values[0]:.1f}"
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"


# --- what the pages name --------------------------------------------------------------------------


def test_every_piece_of_python_is_run_by_a_test():
    shown = {heading for heading in re.findall(r"^##+ (.*)$", ALL, re.MULTILINE)
             if ALL.count(f"# {heading}\n") == 1 and snippets(heading)}
    tests = "".join(path.read_text(encoding="utf-8") for path in ROOT.glob("tests/**/test_*.py"))
    assert shown == set(re.findall(r'\bsnippets\("(.+?)"\)', tests))
    assert sum(len(snippets(heading)) for heading in shown) == ALL.count("```python") > 0


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_leads_somewhere(path):
    for target, anchor in re.findall(r"\]\((?!http)([^)#]*)(?:#([^)]*))?\)", path.read_text()):
        there = path.parent / target if target else path
        assert there.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", there.read_text(), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings]


def test_every_picture_says_in_words_what_it_shows():
    texts = re.findall(r"!\[(.*?)\]\(", ALL)
    assert len(texts) == ALL.count("![") > 5 and all(len(text.split()) > 7 for text in texts)


def test_every_file_program_preset_and_flag_exists():
    for name in re.findall(r"`((?:results|encoders|images|bench|extras|support)/[\w./*-]+)`", ALL):
        assert list(ROOT.glob(name)), name
    for module, name in re.findall(r"python -m (extras\.\w+)(?: ([a-z][a-z-]+)\b)?", ALL):
        assert (ROOT / module.replace(".", "/")).with_suffix(".py").exists(), module
        assert module != "extras.ablations" or name in ablations.ABLATIONS, name
    assert all((ROOT / name).exists() for name in re.findall(r"python ([\w/]+\.py)", ALL))
    assert set(re.findall(r"--preset ([a-z0-9-]+)", ALL)) <= set(config.PRESETS)
    settings = vars(config.Config())
    flags = {"--" + name.replace("_", "-") for name in settings}
    flags |= {"--no-" + name for name, value in settings.items() if isinstance(value, bool)}
    flags |= {"--help", "--nproc_per_node", "--max-restarts", "--shm-size"}  # torchrun's, Docker's
    flags |= {"--dry", "--alone"}  # of bench/
    for script in [*ROOT.glob("*.py"), *ROOT.glob("extras/*.py"), ROOT / "support/command_line.py"]:
        flags |= set(re.findall(r'add_argument\(\s*"(--[a-z-]+)"', script.read_text()))
    assert set(re.findall(r"(?<![-\w])--[a-z][a-z_-]+", ALL)) <= flags


def test_the_table_of_presets_is_complete():
    names = re.findall(r"`([\w-]+)`", " ".join(table("training.md", "Presets")))
    assert sorted(names) == sorted(config.PRESETS)


# --- accuracies -----------------------------------------------------------------------------------


RUNS = {"Synthetic shapes": ("shapes", 3), "Synthetic volumes": ("shapes3d", 3),
        "CIFAR-10, and the encoder that ships with this code": ("cifar10-ijepa", 1),
        "STL-10, pretrained on Tiny-ImageNet": ("stl10", 1)}


@pytest.mark.parametrize("heading", RUNS)
def test_the_tables_of_results_are_the_committed_runs(heading):
    name, count = RUNS[heading]
    runs = seeds(name) if count == 3 else [read(name)]
    rows = table("results.md", heading)
    assert {ROWS[row] for row in rows} == set(runs[0]["features"])
    for row, cells in rows.items():
        scores = [run["features"][ROWS[row]] for run in runs]
        measures = ("linear", "best", "knn", "precision@5")
        assert cells == [percent([score[measure] for score in scores])
                         for measure in (measures if len(cells) == 4 else measures[::2])]


def test_the_readmes_table_is_that_of_results():
    rows = [cells for _, cells in re.findall(r"^\| ((?:synthetic|CIFAR|STL)[^|]*)(\|.*)\|$",
                                             PAGES["README.md"], re.MULTILINE)]
    assert len(rows) == len(RUNS)
    for cells, (name, count) in zip(rows, RUNS.values()):
        runs = seeds(name) if count == 3 else [read(name)]
        expected = [" / ".join(percent([run["features"][part][measure] for run in runs])
                               for measure in ("linear", "knn"))
                    for part in ("target", "random", "pixels")]
        about, *numbers = [cell.strip() for cell in cells.strip("|").split("|")]
        assert numbers == expected and f"{count} seed" in about
        minutes = statistics.mean(run["training"]["seconds"] for run in runs) / 60
        assert about.startswith(f"{minutes:.0f} min")


def test_on_the_shapes_only_what_was_learned_tells_the_kinds_apart():
    """The lecture's first table: by probe and by kNN, with every seed."""
    for run in seeds("shapes"):
        score = run["features"]
        assert score["target"]["linear"] > 0.85 and score["target"]["knn"] > 0.75
        assert all(score[name][measure] < 0.3 for name in ("random", "pixels")
                   for measure in ("linear", "knn"))


def test_on_the_volumes_the_probe_shows_what_was_learned_and_crops_helped():
    for run in seeds("shapes3d"):
        score = run["features"]
        assert max(score["random"]["linear"], score["pixels"]["linear"]) < 0.35
        assert score["target"]["linear"] > 0.95
    said = section("results.md", "Synthetic volumes")
    cropped, whole = seeds("shapes3d")[0], read("shapes3d_no_crops")
    differs = {name for name, value in cropped["config"].items() if whole["config"][name] != value}
    assert differs == {"crop_scale", "out"}
    (with_linear, with_knn), (linear, knn) = (
        [100 * run["features"]["target"][measure] for measure in ("linear", "knn")]
        for run in (cropped, whole))
    assert f"ends at {linear:.1f} by the linear probe, with crops at {with_linear:.1f};" in said
    assert f"kNN at {knn:.1f} and at {with_knn:.1f}." in said


def test_on_the_volumes_knn_on_pixels_does_well():
    """With each volume's mean removed; some voxels may round otherwise than in the file."""
    parts = [data.load("shapes3d", split) for split in ("train", "test")]
    parts[0] = evaluate.subsample(parts[0], 10_000, seed=0)
    x, test_x = (part - part.mean(dim=1, keepdim=True)
                 for part in (evaluate.pixels(part, 16) for part in parts))
    known = read("shapes3d_pixels")["knn"]
    assert "then it reaches {:.1f}, with the nearest volume alone {:.1f}".format(
        100 * known["20"], 100 * known["1"]) in section("results.md", "Synthetic volumes")
    for k, accuracy in known.items():
        found = diagnostics.knn(x, parts[0].labels, test_x, parts[1].labels, int(k))
        assert found == pytest.approx(accuracy, abs=0.0015)


@pytest.mark.parametrize("name", ["shapes", "shapes3d"])
def test_the_committed_runs_are_those_of_todays_presets(name):
    for seed, run in enumerate(seeds(name)):
        then = checkpoint.config_from(run["config"], name)
        today = config.from_preset(name, seed=seed, out=then.out)
        assert vars(today) == vars(then)


def test_what_results_says_beside_its_tables_is_so():
    said = section("results.md", "Synthetic shapes")
    linear = [100 * run["features"]["target"]["linear"] for run in seeds("shapes")]
    assert "{:.1f}, {:.1f} and {:.1f}".format(*linear) in said
    low = [run["low_shot"] for run in seeds("shapes")]
    forty = [run["scores"]["target"]["mean"][run["per_class"].index(40)] for run in low]
    assert f"at {percent(forty)}." in said
    times = [run["training"]["seconds"] for run in seeds("shapes")]
    assert f"{min(times):.0f} to {max(times):.0f} s" in said
    found = [[run["segmentation"][name] for run in seeds("shapes")]
             for name in ("target", "random", "pixels", "predicted")]
    assert "{:.2f}, {:.2f}, {:.2f} and {:.2f}".format(*map(statistics.mean, found)) in said
    said = section("results.md", "STL-10, pretrained on Tiny-ImageNet")
    with open(ROOT / "results/stl10_metrics.csv") as file:
        found = [100 * float(row["knn"]) for row in csv.DictReader(file) if row["knn"]]
    assert found[-1] == max(found) and f"from {found[0]:.1f} to {found[-1]:.1f}" in said
    said = section("results.md", "Synthetic volumes")
    linear = [100 * run["features"]["target"]["linear"] for run in seeds("shapes3d")]
    assert "{:.1f}, {:.1f} and {:.1f}".format(*linear) in said
    times = [run["training"]["seconds"] for run in seeds("shapes3d")]
    assert f"{min(times):.0f} to {max(times):.0f} s" in said


def test_what_results_says_of_the_encoder_that_ships_is_so():
    said = section("results.md", "CIFAR-10, and the encoder that ships with this code")
    said = " ".join(said.split())
    run = read("cifar10-ijepa")
    epochs = run["training"]["step"] * run["config"]["batch_size"] / 45_000
    assert f"{epochs:.0f} epochs, four masks each" in said
    assert f"{epochs:.0f} epochs hold as many masks as {4 * epochs:.0f} of its" in said
    with open(ROOT / "results/cifar10_ijepa_metrics.csv") as file:
        rows = list(csv.DictReader(file))
    few = run["low_shot"]
    five, untrained = few["scores"]["target"]["mean"][1], few["scores"]["random"]["mean"][-1]
    assert few["per_class"][1] == 5 and few["per_class"][-1] == 500
    assert f"({100 * five:.1f}%)" in said and f"with 500 ({100 * untrained:.1f}%)" in said
    lowest = min((row for row in rows if row["loss"]), key=lambda row: float(row["loss"]))
    found = [(int(row["step"]), float(row["knn"])) for row in rows if row["knn"]]
    assert found[-1][1] == max(knn for _, knn in found)
    assert f"from {found[0][1]:.2f} to {found[-1][1]:.2f}" in said
    assert all(knn < 0.4 for step, knn in found if step <= int(lowest["step"]))


def test_the_predictor_finds_the_hidden_patch_and_the_untrained_one_does_not():
    found = read("cifar10_ijepa_retrieval")
    ten, one = (f"{100 * found['trained'][f'recall@{k}']:.1f}%" for k in (10, 1))
    said = section("results.md", "CIFAR-10, and the encoder that ships with this code")
    assert f"for {ten} of {found['queries']:,} hidden patches (the nearest for {one})" in said
    assert f"for {ten} of the hidden patches" in section("README.md", "What it learns")
    assert found["untrained"]["recall@10"] == 0 and found["gallery_size"] == 128_000


def test_the_committed_shapes_runs_are_healthy_by_every_measure():
    """No warning at any time, and kNN at the end four times what it was before training."""
    for seed in range(3):
        with open(ROOT / f"results/shapes_seed{seed}_metrics.csv") as file:
            rows = [row for row in csv.DictReader(file) if row["rank"]]
        found = [{name: float(row[name]) for name in diagnostics.MEASURES} for row in rows]
        for row, now in zip(rows, found):
            progress = int(row["step"]) / int(rows[-1]["step"])
            assert diagnostics.warnings(now, found[0], progress) == {}
        assert found[-1]["knn"] > 4 * found[0]["knn"]


def test_the_masks_a_second_are_those_of_the_committed_file():
    variants = read("throughput")["variants"]
    assert table("recipe.md", "Masks a second") == {
        name: [f"{row['masks_per_second']:.1f}", f"{row['times']:.2f}"]
        for name, row in variants.items()}


def test_two_threads_and_two_processes_are_as_measured():
    ways, said = read("processes")["ways"], section("recipe.md", "Masks a second")
    assert f"train {ways['two threads']['times']} times as fast as one" in said
    processes = "two processes of one thread"
    assert f"{processes} {ways[processes]['times']} times" in said


def test_the_steps_next_to_public_codes_are_those_of_the_committed_file():
    found = read("peers")
    rows = [(peer, row) for peer in ("official", "homemade")
            for name, row in found[peer].items() if name != "tokens"]
    rows += [("official", row) for row in found["masks"]["1024"].values()]
    assert list(table("recipe.md", "Next to two public codes").values()) == [
        [f"{row['images_per_second']:,.1f}", f"{row.get(f'times_{peer}', 1):.2f}"]
        for peer, row in rows]


def test_the_demo_and_the_notebooks_take_the_minutes_that_are_said():
    run, said = read("demo"), " ".join(PAGES["README.md"].split())
    assert f"a page to open: {run['seconds']['all, packages included'] / 60:.0f} minutes" in said
    assert f"{run['seconds']['training, one thread'] / 60:.1f} minutes of one CPU core" in said
    assert f"{run['gallery_images']:,} other images" in said
    for path in (notebooks.LEARNING, notebooks.PROBE):
        opening = notebooks.read(path).cells[0].source
        assert f"{read('notebooks')[path.stem]['minutes']} minutes" in opening


# --- the contrast ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name,page", [("dial", "contrast"), ("comparison_cifar10", "contrast"),
                                       ("ablations", "contrast"), ("recipe", "recipe")])
def test_the_tables_of_experiments_are_those_of_results(name, page):
    markdown = experiments.markdown(read(name)["rows"], "", "").strip().split("\n\n")[-1]
    assert markdown in PAGES[f"{page}.md"]


def ahead(rows, name, other, measure):
    """By how much one row is ahead of another, seed by seed."""
    return [a[measure] - b[measure] for a, b in zip(rows[name], rows[other], strict=True)]


def test_the_lines_of_the_dial_cross():
    """The MAE is ahead where dots can be predicted, I-JEPA where none can, by what is said."""
    said = section("contrast.md", "When do representations beat pixels?")
    rows = {name: row["runs"] for name, row in read("dial")["rows"].items()}
    for detail, first, second, words in (
            ("0", "MAE", "I-JEPA", "by {:.1f} points of the linear probe and {:.1f} of kNN"),
            ("0.5", "MAE", "I-JEPA", "where half of them can, by {:.1f} and {:.1f}"),
            ("1", "I-JEPA", "MAE", "ahead by {:.1f} and {:.1f}")):
        by = [ahead(rows, f"{first}, detail {detail}", f"{second}, detail {detail}", measure)
              for measure in ("linear", "knn")]
        assert all(min(values) > 0 for values in by)
        assert words.format(*(100 * statistics.mean(values) for values in by)) in said
    steps = [f"{rows[f'{name}, detail 1'][0]['steps']:,}" for name in experiments.METHODS]
    assert "{} steps of I-JEPA, {} of the MAE, {} of supervision".format(*steps) in said


def test_the_lines_of_the_dial_cross_at_other_rates_too():
    heading = "At other learning rates"
    rates = [read(name)["rows"] for name in ("dial_low", "dial", "dial_high")]
    runs = {name: [rate[name]["runs"][0] for rate in rates] for name in rates[0]}
    assert {run["seed"] for row in runs.values() for run in row} == {0}
    assert table("contrast.md", heading) == {
        name: [" / ".join(percent([run[key]]) for key in ("linear", "knn")) for run in row]
        for name, row in runs.items()}
    for detail in ("0", "0.5", "1"):
        pairs = zip(runs[f"MAE, detail {detail}"], runs[f"I-JEPA, detail {detail}"], strict=True)
        assert all((mae[key] > ours[key]) == (detail != "1") for mae, ours in pairs
                   for key in ("linear", "knn"))
        for key in ("knn", "linear"):
            low, preset, high = (run[key] for run in runs[f"I-JEPA, detail {detail}"])
            assert preset > max(low, high)
            low, preset, high = (run[key] for run in runs[f"MAE, detail {detail}"])
            assert (preset > max(low, high)) == (detail != "1")
    gain = 100 * (low - preset)
    behind = 100 * (runs["I-JEPA, detail 1"][1]["linear"] - low)
    assert f"it is {gain:.1f} points better by the linear probe, and still {behind:.1f} behind" in (
        section("contrast.md", heading))


def test_what_is_said_of_mae_and_supervision_on_photographs_is_so():
    """Who is ahead, by how much, and with how many of the seeds."""
    said = section("contrast.md", "MAE and supervision on photographs")
    cifar = {name: row["runs"] for name, row in read("comparison_cifar10")["rows"].items()}
    assert all(len(runs) == 3 for runs in cifar.values())
    epochs = [cifar[name][0]["steps"] * 5 / cifar["I-JEPA"][0]["steps"]
              for name in ("MAE, equal seconds", "supervised, equal seconds")]
    assert "the MAE runs {:.0f} epochs and supervision {:.0f}, by".format(*epochs) in said
    took = [limit(run["seconds"] for run in cifar[name])
            for name in ("I-JEPA", "MAE, equal seconds", "supervised, equal seconds")
            for limit in (min, max)]
    assert ("took {:.0f} to {:.0f} s, the MAE's {:.0f} to {:.0f} s, supervision's {:.0f} to {:.0f}"
            " s:".format(*took)) in said
    for measure in ("linear", "knn", "1%", "10%"):
        assert all(min(ahead(cifar, "supervised", name, measure)) > 0
                   for name in ("MAE", "MAE, equal seconds", "I-JEPA"))
    ours, same, longer = "I-JEPA", "MAE", "MAE, equal seconds"
    for names, measure, seeds_ahead, sentence in (
            ((same, ours), "linear", [1, 2], "ahead with two seeds of three, by {} points. By"),
            ((ours, same), "knn", [0, 1, 2], "By kNN, I-JEPA is ahead with every seed, by {}."),
            ((longer, ours), "linear", [1, 2], "with the same two seeds, by {}, and with 1%")):
        by = ahead(cifar, *names, measure)
        assert sentence.format(percent(by)) in said
        assert [seed for seed, gain in enumerate(by) if gain > 0] == seeds_ahead
    assert all(min(ahead(cifar, longer, ours, measure)) > 0 for measure in ("1%", "10%"))
    by = ahead(cifar, ours, longer, "knn")
    assert f"I-JEPA is ahead by {percent(by)}." in said
    assert abs(statistics.mean(by)) < statistics.stdev(by)  # level


def test_what_is_said_of_the_ablations_is_so():
    """What each change loses, with how many seeds, and what it loses in the paper."""
    found = read("ablations")["rows"]
    rows = {name: row["runs"] for name, row in found.items()}
    assert all([run["seed"] for run in runs] == [0, 1, 2] for runs in rows.values())
    heading = "Does the paper's order hold on a grid of 36 patches?"
    first, whole = "I-JEPA as it is", "context scale .85 to 1, all of it"
    for name, (*lost, paper) in table("contrast.md", heading).items():
        other = whole if name.startswith(("masks", "1 target", first)) else first
        with_all = name != "masks: random .6" and not name.startswith("predictor")
        for measure, said in zip(("linear", "1%"), lost, strict=True):
            gains = ahead(rows, name, other, measure)
            assert said == f"{-100 * statistics.mean(gains):.1f}"
            assert sum(gain < 0 for gain in gains) == (3 if with_all else 2)
        there = [float(number) for number in re.findall(r"\d+\.\d", found[name]["paper"])]
        whole_there = [54.2] if len(there) == 1 else []  # of tables 6 and 8 to 10
        assert paper == (f"{max(there + whole_there) - min(there):.1f}" if name != first else "-")

    def mean(name, measure):
        return f"{100 * statistics.mean(run[measure] for run in rows[name]):.1f}%"

    said = section("contrast.md", heading)
    no_stop, copied, frozen = "no stop-gradient", "momentum 0", "momentum 1"
    assert f"kNN ends at {mean(no_stop, 'knn')}; with a target" in said
    assert f"it ends at {mean(copied, 'knn')}. Chance is 10%." in said
    assert f"ends at {mean(no_stop, 'linear')} and {mean(copied, 'linear')}, below" in said
    assert f"(kNN {mean(no_stop, 'knn')} and {mean(copied, 'knn')}; chance is 10%)" in (
        section("README.md", "Results"))
    untrained = [run["features"]["random"]["linear"] for run in seeds("shapes")]
    assert [run["linear"] for run in rows[frozen]] == untrained  # it remains so
    assert f"({mean('targets: pixels', 'linear')} and {mean(frozen, 'linear')})" in said
    assert all(max(run["linear"] for run in rows[name]) < min(untrained)
               for name in (no_stop, copied, "targets: pixels"))
    alike = read("detail0_pixels"), read("detail0_features")
    ends = [100 * run["features"]["target"]["linear"] for run in alike]
    assert "pixels end at {:.1f}% and features at {:.1f}%".format(*ends) in said
    settings = [{**run["config"], "out": ""} for run in alike]
    assert settings[0] == settings[1] == {**settings[0], "dataset": "data/dial/shapes-0.npz"}


def test_what_is_said_of_the_levers_is_so():
    """By how much each change is ahead of or behind the first row, and whether with both seeds."""
    found, said = read("recipe"), section("recipe.md", "The levers")
    rows = {name: row["runs"] for name, row in found["rows"].items()}
    first, one, two = "4 masks of 32 images", "1 mask of 128 images", "2 masks of 64 images"
    mae, student = "an MAE, a third of the time", [*rows][-1]
    assert all([run["seed"] for run in runs] == [0, 1] for runs in rows.values())
    assert f"`{found['command']}`" in said

    def gains(name, other=first):
        return [[100 * gain for gain in ahead(rows, name, other, measure)]
                for measure in ("linear", "knn")]

    def says(sentence, *values, both=False):
        """The sentence holds the mean of each measure's gains; in both seeds one sign, if asked."""
        assert sentence.format(*map(statistics.mean, values)) in said
        assert not both or all(min(gain) > 0 or max(gain) < 0 for gain in values)

    apart = [100 * abs(rows[first][0][key] - rows[first][1][key]) for key in ("linear", "knn")]
    assert "lie {:.1f} points apart by the linear probe and {:.1f} by kNN".format(*apart) in said
    steps = {name: runs[0]["steps"] for name, runs in rows.items()}
    assert f"are {128 * steps[first]:,} masks of {32 * steps[first]:,} crops" in said
    assert f"of 64 are {128 * steps[two]:,} of {64 * steps[two]:,}; one" in said
    assert f"each of 128, {128 * steps[one]:,} of as many" in said
    assert f"give {steps[first] / steps[one]:.2f} times as many masks as one" in said
    says("with both seeds, by {:.1f} points of the linear probe and {:.1f} of kNN", *gains(two),
         both=True)
    says("level with the other ({:+.1f} and {:+.1f} on average)", *gains(one))
    assert all(gain[0] > 0.5 and abs(gain[1]) < 0.2 for gain in gains(one))
    block = "one pass for each target block"
    assert f"leaves time for {steps[block]:,} of the {steps[first]:,} steps" in said
    linear, knn = gains(block)
    says("behind by {:.1f} points of the linear probe, with both seeds", [-x for x in linear],
         both=True)
    says("level by kNN ({:+.1f})", knn)
    says("of .6: ahead with both seeds, by {:.1f} and {:.1f}", *gains("crops from .3"), both=True)
    says("the other loses ({:+.1f} and {:+.1f} on average)", *gains("no crops"))
    assert all(min(gain) < 0 < max(gain) for gain in gains("no crops"))
    context, momentum, wide = "context of 24 patches", "momentum from 1", "encoder 192 wide"
    assert f"leave time for {steps[context]:,} steps" in said
    says("the other loses ({:+.1f} and {:+.1f} on average): 16 do as well", *gains(context))
    assert all(min(gain) < 0 < max(gain) for gain in gains(context))
    (linear, other), (knn, lost) = gains(momentum)
    assert f"one seed gains {linear:.1f} and the other nothing; by kNN one gains {knn:.1f}" in said
    assert f"and the other loses {-lost:.1f}." in said and abs(other) < 0.05
    assert f"leaves time for {steps[wide]:,} steps" in said
    says("behind with both seeds, by {:.1f} and {:.1f}",
         *gains(first, wide), both=True)
    linear, knn = gains("targets of blocks 2, 3, 4")
    assert min(linear) < 0 < max(linear) and abs(statistics.mean(linear)) < 0.1
    says("behind by {:.1f} points of kNN, with both", [-x for x in knn], both=True)
    says("The student passes its teacher by {:.1f} and {:.1f} points", *gains(student, mae),
         both=True)
    says("all the time, by {:.1f}, with one seed of two, and {:.1f}, with both",
         *gains(first, student))
    linear, knn = gains(first, student)
    assert min(linear) < 0 < max(linear) and min(knn) > 0
    assert all(statistics.mean(gain) < most for name in rows
               for gain, most in zip(gains(name), apart))
    assert [mae, wide, student] == [name for name in rows if any(
        -statistics.mean(gain) > most for gain, most in zip(gains(name), apart))]
    others = [name for name in rows if name not in (mae, student)]
    took = [run["seconds"] for name in others for run in rows[name]]
    both = sorted(a["seconds"] + b["seconds"] for a, b in zip(rows[mae], rows[student]))
    assert "took {:,.0f} to {:,.0f} s, an MAE and its student together {:,.0f} and {:,.0f}".format(
        min(took), max(took), *both) in said


# --- other measurements ---------------------------------------------------------------------------


@pytest.mark.parametrize("name,context_size", [("shapes", None), ("cifar10", None), ("stl10", None),
                                               ("shapes", 0), ("cifar10", 0)])
def test_how_often_target_blocks_are_laid_onto_the_first(name, context_size, monkeypatch):
    changes = {} if context_size is None else {"context_size": context_size}
    preset = config.from_preset(name, **changes)
    make_room, images = MultiBlockMasking.make_room, 0

    def counted(self, targets, context):
        nonlocal images
        answer = make_room(self, targets, context)
        images += (answer[0] != targets).flatten(1).any(dim=1).sum().item()
        return answer

    monkeypatch.setattr(MultiBlockMasking, "make_room", counted)
    _, masking = train.build(preset)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        masking(1000, generator)
    row = f"| `{name}` | {' × '.join(map(str, masking.grid))} | {preset.context_size} "
    if context_size == 0:
        row = "| `shapes`, `cifar10` with `--context-size 0` | | all "
    assert f"{row}| {images / 200:.1f}% |" in PAGES["differences.md"]


def test_without_stop_gradient_or_ema_the_features_collapsed_and_those_runs_said_so():
    variants, said = read("collapse")["variants"], section("training.md", "Is it learning?")
    for name, run in variants.items():
        healthy = name in ("as it is", "targets not layer-normed")
        assert (run["rows"][-1]["target_std"] > 0.5) == healthy == (not run["warnings"])
    start, early = variants["no stop-gradient"]["rows"][:2]
    assert early["step"] == 150 and "After 150 steps" in said
    for row in (early, start):
        std = f"{row['target_std']:.2f}".lstrip("0")
        assert f"{std} and" in said and f"{row['rank']:.1f}" in said
    losses = (variants[name]["rows"][1]["loss"] for name in ("no stop-gradient", "as it is"))
    assert "{:.4f}, next to {:.2f} of".format(*losses) in said.replace(" .", " 0.")
    ends = (100 * variants[name]["rows"][-1]["knn"] for name in ("momentum 0", "as it is"))
    assert "({:.1f}% after 1,500 steps; with the EMA {:.1f}%)".format(*ends) in said


def test_the_digits_are_those_of_the_committed_file():
    run, said = read("digits"), section("use.md", "scikit-learn").replace(" .", " 0.")
    means = [f"{statistics.mean(run[name]):.3f} ± {statistics.stdev(run[name]):.3f}"
             for name in ("pretrained", "untrained")]
    assert " and ".join(means) in said
    first = f"prints {run['pretrained'][0]:.2f}, with `epochs=0` {run['untrained'][0]:.2f}"
    assert first in said


def test_what_decoding_costs_is_the_committed_measurement():
    run, said = read("streaming"), section("distributed.md", "Image folders larger than memory")
    rate = run["images_per_second"]
    assert f"decodes {rate:.0f} photographs" in said
    assert f"about {1000 / rate:.0f} such cores" in said
    assert f"in about {1_281_167 / rate / 16 / 60:.0f} minutes" in said
    assert run["workers"] == 1 and abs(run["memory_slope_bytes_per_image"]) < 1500


def test_the_playground_answers_in_time():
    run, said = read("playground")["blocks"], section("playground.md", "How it is made")
    three, six = run["3 x 3 patches"], run["6 x 6 patches"]
    assert f"is drawn {three['median_ms']:.0f} ms" in said
    assert f"slowest of {three['answers']}: {three['slowest_ms']:.0f} ms" in said
    assert f"for 6 x 6 after {six['median_ms']:.0f} ms" in said
    assert max(row["slowest_ms"] for row in run.values()) < 300


def test_no_kill_and_no_fault_lost_anything():
    found, said = read("reliability"), " ".join(PAGES["reliability.md"].split())
    kills = found["kills"]
    assert f"of {kills['all']} kills, {kills['writing']} while" in said
    assert found["broken"] == found["different"] == 0
    assert all(row["passed"] == row["tests"] > 0 for row in found["faults"].values())
