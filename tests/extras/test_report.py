"""Claims about a run's page: it needs no network, says what the run's files say, names what is
missing, fits 5 MB, and works in a real browser; and about the film of a run."""

import csv
import html.parser
import json
import re
import shutil
from base64 import b64decode
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

import data
import evaluate
import predict_and_visualize as core
import train
from config import UsageError, from_preset
from extras import film, mae, report, report_pictures
from models import Encoder

TINY = ["--encoder", "16x1x2", "--predictor", "8x1x2", "--batch-size", "16", "--device", "cpu",
        "--precision", "fp32"]


class Page(html.parser.HTMLParser):
    """A page taken apart: what it refers to, the cells of scores, the text."""

    def __init__(self, text):
        super().__init__()
        self.addresses, self.scores, self.text, self.cell = [], [], "", False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.addresses += [given[name] for name in ("src", "href", "data") if name in given]
        self.cell = tag == "td" and given.get("class") == "score"

    def handle_data(self, text):
        self.text += text
        if self.cell:
            self.scores.append(text)
            self.cell = False


@pytest.fixture(scope="module", autouse=True)
def few_shapes():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("support.shapes.COUNT", {"train": 384, "test": 64})
        patch.setattr("support.shapes.make.__defaults__", (64,))
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of 60 steps that has everything: snapshots, an evaluation, figures."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    film.main([*TINY, "--max-steps", "60", "--measurements", "4", "--out", str(folder)])
    evaluate.main([str(folder), "--train-images", "100", "--device", "cpu"])
    core.main([str(folder), "--images", "20", "--device", "cpu"])
    return folder


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """A run of two steps that has nothing of it."""
    folder = tmp_path_factory.mktemp("runs") / "bare"
    train.main([*TINY, "--max-steps", "2", "--seed", "1", "--out", str(folder)])
    return folder


def write(*folders):
    """The path of the page of some runs."""
    report.main(list(map(str, folders)))
    return folders[0] / ("report.html" if len(folders) == 1 else "comparison.html")


@pytest.fixture(scope="module")
def pages(whole, bare):
    """The pages of one run and of two, as paths."""
    return write(whole), write(whole, bare)


# --- what the page says ---------------------------------------------------------------------------


def test_a_page_holds_all_that_it_shows_and_fits_5_mb(pages):
    for path in pages:
        text, page = path.read_text(), Page(path.read_text())
        assert path.stat().st_size <= report.LIMIT == 5_000_000
        assert any(address.startswith("data:image/png") for address in page.addresses)
        assert all(address.startswith(("data:image/", "#")) for address in page.addresses)
        assert "url(" not in text and "@import" not in text and "default-src 'none'" in text


def test_the_table_has_the_numbers_of_the_evaluation(whole, pages):
    features = json.loads((whole / "evaluation.json").read_text())["features"]
    expected = [f"{100 * features[name][measure]:.1f}"
                for name in ("target", "context", "random", "pixels")
                for measure in ("linear", "knn")]
    assert Page(pages[0].read_text()).scores == expected
    assert Page(pages[1].read_text()).scores == expected  # the other run has none


def test_the_sentence_says_what_was_trained(whole):
    run = report.read_run(whole, "whole")
    size = sum(p.numel() for p in evaluate.load_encoders(whole)[0]["target"].parameters())
    assert report.sentence(run).startswith(
        f"I-JEPA: an encoder 16x1x2 with {size:,} parameters, trained on 346 images of shapes (38 "
        "more were held out), 60 steps of 16 images in ")


def test_a_model_of_ones_own_is_not_called_ijepa(tmp_path):
    config = from_preset("shapes", encoder="16x1x2", predictor="8x1x2", batch_size=16, max_steps=1,
                         device="cpu", out=str(tmp_path))
    train.train(config, *mae.build(config))  # says nothing of a program
    run = report.read_run(tmp_path, "own")
    assert report.sentence(run).startswith("A method of one&#x27;s own: an encoder 16x1x2")
    assert "train.py" not in report.reproduce([run])


@pytest.mark.parametrize("target, n, says", [
    (0.60, 1000, "10.0 points above the raw pixels"), (0.40, 1000, "10.0 points below the raw"),
    (0.60, 50, "not clearly different from the raw pixels (+10.0 points)"),
    (0.50, 1000, "not clearly different from the raw pixels (+0.0 points)")])
def test_only_a_difference_above_two_standard_errors_is_called_one(whole, target, n, says):
    """Two standard errors of .5 and .6 are 4.4 points on 1,000 images, and 19.8 on 50."""
    row = {"linear": 0.5, "knn": 0.5}
    results = {"split_sizes": {"test": n}, "warnings": [], "training": {"step": 60}, "features": {
        "target": {"linear": target, "knn": target}, "random": row, "pixels": row}}
    assert says in report.verdict(results)
    run = report.read_run(whole, "whole")._replace(evaluations={"evaluation.json": results})
    warned = any("not clearly above" in text for text in report.evaluation_warnings(run))
    assert warned == (not says.startswith("10.0 points above"))


def test_curves_begin_and_end_where_metrics_csv_does(whole, pages):
    with open(whole / "metrics.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["knn"]]
    found = re.findall(r"<title>whole, kNN accuracy, step (\d+): ([\d.]+)</title>",
                       pages[0].read_text())
    assert [(step, float(value)) for step, value in found[:-1]] == [
        (row["step"], pytest.approx(float(row["knn"]), rel=1e-3)) for row in rows]  # 4 digits
    assert found[-1] == found[-2]  # the last point of a line always has a tooltip


def test_a_line_is_drawn_to_scale():
    lines = [("a", "red", False, [(0, 1.0), (50, 3.0), (100, 2.0)])]
    path = re.search(r'd="M([^H]*?)"/><circle', report_pictures.panel(lines, "a", (1, None)))[1]
    (x0, y0), (x1, y1), (x2, y2) = (map(float, point.split(",")) for point in path.split("L"))
    assert x1 - x0 == x2 - x1 == 133 and (y0 - y1, y0 - y2) == (124, 62)


def test_several_runs_stand_side_by_side(bare, whole, pages):
    text = pages[1].read_text()
    page = Page(text)
    assert "2 runs side by side" in page.text
    assert "whole, loss, step" in page.text and "bare, loss, step" in page.text  # one panel
    differing = re.search(r"settings that differ.*?</table>", text)[0]
    assert re.findall(r"<th scope=row>(\w+)", differing) == ["max_steps", "measurements", "seed"]
    assert "<td>60</td><td>2</td>" in differing


def test_what_is_missing_is_named_with_the_command_that_makes_it(bare):
    text = Page(write(bare).read_text()).text
    for command in (f"python evaluate.py {bare}", f"python -m extras.figures {bare}",
                    "python -m extras.film"):
        assert command in text


def test_the_commands_on_the_page_are_those_of_the_run(whole, pages):
    text = Page(pages[0].read_text()).text
    assert "python -m extras.film --preset shapes --encoder 16x1x2" in text
    assert f"python evaluate.py {whole} --train-images 100" in text


def run_with(whole, **changes):
    return report.read_run(whole, "whole")._replace(**changes)


def measured(step, **values):
    healthy = {"target_std": 0.7, "rank": 12, "cosine": 0.9, "mean_cosine": 0.8, "knn": 0.5}
    return {"step": str(step), **{name: str(value) for name, value in (healthy | values).items()}}


def test_a_collapse_is_reported_with_its_step_and_with_how_it_ended(whole):
    rows = [measured(0), measured(20, target_std=0.1), measured(40), measured(60)]
    first, advice = report.training_warnings(run_with(whole, rows=rows))
    assert first.startswith("At step 20, collapse") and first.endswith("at the end no longer so.")
    assert "a lower --lr (now 0.003)" in advice
    assert report.training_warnings(run_with(whole, rows=rows[2:])) == []
    rows = rows[:2]
    assert report.training_warnings(run_with(whole, rows=rows))[0].endswith("at the end still so.")


def test_an_evaluation_of_an_earlier_step_is_reported(whole):
    run = report.read_run(whole, "whole")
    assert not any("Evaluate it again" in text for text in report.evaluation_warnings(run))
    run.about["progress"]["step"] = 70
    assert any("is of step 60, the run is at step 70. Evaluate it again" in text
               for text in report.evaluation_warnings(run))


def test_a_run_that_stopped_is_reported_with_the_command_that_resumes_it(whole):
    run = report.read_run(whole, "whole")
    run.about["progress"]["total"] = 80
    text = Page(report.warnings([run])).text
    assert "It stopped at step 60 of 80." in text
    assert f"python -m extras.film --out {whole} --resume" in text


def test_a_page_is_written_without_a_film_when_the_images_are_gone(whole, tmp_path, monkeypatch):
    def gone(config, data_dir):
        raise UsageError("the images are gone")

    folder = shutil.copytree(whole, tmp_path / "moved")
    monkeypatch.setattr(film, "images_to_show", gone)
    page = Page(write(folder).read_text())
    assert "Left out: the images are gone." in page.text and len(page.scores) == 8


def test_figures_shrink_until_they_fit(whole, tmp_path):
    """A PNG of 400 x 300 random pixels has 360 kB."""
    noise = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "masks.png", compress_level=1)
    run = run_with(whole, figures={"masks": tmp_path / "masks.png"})
    for budget, kind in ((500_000, "png"), (150_000, "webp")):
        ((content, found, size),) = report_pictures.load_figures([run], budget).values()
        assert found == kind and len(content) * 4 / 3 < budget and size == (400, 300)
    with pytest.raises(UsageError, match="do not fit into one page; name fewer runs"):
        report_pictures.load_figures([run], 1000)


def test_names_are_shown_as_they_are_and_never_become_tags(bare, tmp_path):
    folder = tmp_path / "a <script> & \"b\""
    shutil.copytree(bare, folder)
    text = write(folder).read_text()
    assert "<h1>a &lt;script&gt; &amp;" in text and "a <script>" not in text
    assert "a <script> & \"b\"" in Page(text).text


# --- the film -------------------------------------------------------------------------------------


def test_encoders_are_kept_after_25_steps_and_each_doubling():
    assert [step for step in range(1000) if film.is_moment(step)] == [25, 50, 100, 200, 400, 800]


def test_a_filmed_run_is_the_run_that_train_py_trains(whole, tmp_path):
    flags = [*TINY, "--max-steps", "25", "--measurements", "0", "--out"]
    train.main([*flags, str(tmp_path / "plain")])
    film.main([*flags, str(tmp_path / "filmed")])
    plain, filmed, kept = (evaluate.load_encoders(tmp_path / name)[0]["target"].state_dict()
                           for name in ("plain", "filmed", "filmed/snapshots/000025"))
    for name, weight in plain.items():  # the one moment is the end of this run
        assert torch.equal(weight, filmed[name]) and torch.equal(weight, kept[name])


def test_a_filmed_run_that_resumes_counts_on(whole, tmp_path):
    """Steps 26 to 50 after a resume: one more moment, at 50."""
    flags = [*TINY, "--measurements", "0", "--out", str(tmp_path)]
    film.main([*flags, "--max-steps", "25"])
    film.main([*flags, "--max-steps", "50", "--resume", "--override"])
    assert sorted(path.name for path in tmp_path.glob("snapshots/*")) == ["000025", "000050"]
    assert torch.equal(*(evaluate.load_encoders(tmp_path / name)[0]["target"].norm.weight
                         for name in ("", "snapshots/000050")))


def test_a_film_begins_with_the_encoder_before_training_and_ends_with_the_run(whole):
    encoders = film.encoders_of(whole)
    assert list(encoders) == [0, 25, 50, 60]
    begun = train.build(evaluate.load_encoders(whole)[1])[0].target_encoder.state_dict()
    ended = evaluate.load_encoders(whole)[0]["target"].state_dict()
    for name in begun:
        assert torch.equal(begun[name], encoders[0].state_dict()[name])
        assert torch.equal(ended[name], encoders[60].state_dict()[name])
    assert not torch.equal(encoders[25].state_dict()[name], encoders[50].state_dict()[name])


def test_a_snapshot_is_a_run_folder_for_evaluation(whole):
    place = whole / "snapshots" / "000025"
    evaluate.main([str(place), "--train-images", "50", "--device", "cpu"])
    assert json.loads((place / "evaluation.json").read_text())["training"] == {"step": 25}


def test_features_that_are_only_turned_keep_their_colors():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(2, 9, 6, generator=generator) * torch.tensor([5.0, 3, 2, 1, 0.5, 0.1])
    turn = torch.linalg.qr(torch.randn(6, 6, generator=generator)).Q
    before = film.principal_components(tokens)
    after = film.principal_components(7 * tokens @ turn, like=before)
    assert np.allclose(after, before, atol=1e-4)


def test_neighbors_are_the_nearest_others_and_their_classes_are_counted():
    features = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0], [1.0, 0.0]])
    found = film.nearest_others(features, 2)
    assert found[0].tolist() == [4, 1] and found[2].tolist() == [3, 1]
    own, all_others = film.agreement(found, torch.tensor([0, 0, 1, 1, 0]))
    assert own == pytest.approx(8 / 10)  # 2 and 3 have one other of their class
    assert all_others == pytest.approx((3 * 2 + 2 * 1) / 5 / 4)


def test_neighbors_of_the_own_class_are_framed():
    cells, framed = torch.full((1, 2, 3, 8, 8), 0.5), torch.tensor([[False, True]])
    content = re.search(r"base64,([^\"]*)", film.sheet(cells, framed, ""))[1]
    pixels = np.array(Image.open(BytesIO(b64decode(content))))
    assert pixels.shape == (14, 28, 4)
    assert (pixels[3:11, 3:11] == [128, 128, 128, 255]).all()
    assert pixels[1, 1:13, 3].max() == 0 and (pixels[1, 15:27] == [0, 114, 178, 255]).all()


@pytest.mark.parametrize("shape, labels", [((3, 16, 16), False), ((1, 16, 16, 16), True)], ids=str)
def test_images_without_labels_and_volumes_have_a_film(shape, labels):
    generator = torch.Generator().manual_seed(0)
    stored = torch.randint(0, 256, (6, *shape), generator=generator, dtype=torch.uint8)
    images = data.ImageDataset("toys", stored, torch.arange(6) % 2 if labels else None, None,
                               (0.5,) * shape[0], (0.25,) * shape[0])
    encoder = Encoder(16, 1, 2, shape[1:], 8, shape[0]).eval()
    frames = film.frames_of({0: encoder, 25: encoder}, images)
    assert torch.allclose(frames[0].colors, frames[25].colors, atol=1e-4)  # the same encoder
    text = film.frame_html(25, frames[25], images)
    assert ("of its own class" in text) == labels
    assert text.count("<path") == (2 if labels else 1)


# --- in a browser ---------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [390, 1200])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pages_are_as_wide_as_the_screen_in_light_and_dark_without_an_error(
        browser, pages, scheme, width):
    context = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 800})
    troubles, requests = [], []
    for path in pages:
        tab = context.new_page()
        tab.on("console", lambda message: troubles.append(message.text))
        tab.on("pageerror", lambda error: troubles.append(str(error)))
        tab.on("request", lambda request: requests.append(request.url))
        tab.goto(path.as_uri())
        assert tab.evaluate("document.documentElement.scrollWidth") == width
        shade = tab.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (max(map(int, re.findall(r"\d+", shade))) < 60) == (scheme == "dark")
    assert not troubles
    outside = [url for url in requests if not url.startswith("data:")]
    assert outside == [path.as_uri() for path in pages]  # nothing but the two files
    context.close()


def test_the_slider_moves_by_keyboard_and_the_film_plays_to_its_end(browser, pages):
    tab = browser.new_page()
    tab.goto(pages[0].as_uri())
    slider, shown = tab.get_by_role("slider"), tab.locator(".frame:visible h3")
    assert shown.all_inner_texts() == ["Before training"]
    slider.press("ArrowRight")
    assert shown.all_inner_texts() == ["After 25 steps"]
    assert slider.get_attribute("aria-valuetext") == "After 25 steps"
    slider.press("Home")
    tab.clock.install()
    tab.get_by_role("button", name="Play").click()
    assert shown.all_inner_texts() == ["After 25 steps"]
    tab.clock.run_for(2000)
    assert shown.all_inner_texts() == ["After 60 steps"]
    assert tab.get_by_role("button").inner_text() == "Play"  # it stopped
    tab.close()


def test_without_javascript_and_on_paper_every_frame_is_shown(browser, pages):
    context = browser.new_context(java_script_enabled=False)
    tab = context.new_page()
    tab.goto(pages[0].as_uri())
    assert tab.locator(".frame:visible").count() == 4
    assert tab.locator(".controls:visible").count() == 0
    context.close()
    tab = browser.new_page(color_scheme="dark")
    tab.goto(pages[0].as_uri())
    tab.emulate_media(media="print")
    assert tab.locator(".frame:visible").count() == 4
    assert tab.locator(".controls:visible, nav:visible").count() == 0
    ink = tab.evaluate("getComputedStyle(document.body).color")
    assert max(map(int, re.findall(r"\d+", ink))) < 60  # dark ink, in the dark theme too
    tab.close()
