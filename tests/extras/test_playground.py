"""The playground: its ONNX files compute what PyTorch computes, and a real browser shows that."""

import functools
import http.server
import json
import re
import shutil
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import predict_and_visualize as core
import train
from config import UsageError, from_preset
from extras import playground, sketcher
from masking import Masks
from support import checkpoint

SOURCES = playground.OUT.parent
BLOCK = [0, 1, 3, 2]  # row, column, height, width: not the one that the page starts with


def save_run(config, shape, change=0.0):
    """A run folder of a Config that was not trained, its weights moved by random numbers."""
    model, _ = train.build(config, *shape)
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(change * torch.randn_like(p))
    about = {"name": config.dataset, "images": 64, "channels": shape[0], "axes": shape[1],
             "classes": 10, "fingerprint": ""}
    with checkpoint.open_folder(config, resume=False) as folder:
        checkpoint.Run(folder, config, model, train.build_optimizer(config, model),
                       torch.amp.GradScaler("cpu", enabled=False), "cpu", about).save()
    return folder


def drawer():
    """The Sketcher of the small run, not trained."""
    torch.manual_seed(0)
    return sketcher.Sketcher({"predicted": 16, "untrained": 16}, (6, 6), 4, 3, 8).eval()


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder with the page and the data of a small run; the run's folder is next to it."""
    pytest.importorskip("onnxscript", reason="python -m pip install -r requirements-playground.txt")
    place = tmp_path_factory.mktemp("playground")
    config = from_preset("shapes", encoder="16x1x2", predictor="8x1x2", out=str(place / "run"))
    folder = save_run(config, (3, 2), change=0.3)
    torch.save({"settings": {"width": 8}, "sketcher": drawer().state_dict()},
               folder / "sketcher.pt")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("support.shapes.COUNT", {"train": 1000, "test": 60})
        patch.setattr("support.shapes.make.__defaults__", (60,))
        playground.main([str(folder), "--out", str(place / "site/built"), "--images", "40"])
    for path in SOURCES.glob("*.*"):
        shutil.copy(path, place / "site")
    return place / "site"


def pictures(site):
    """The images of a site's sheet, float [n, 3, H, W] from 0 to 1."""
    about = json.loads((site / "built/about.json").read_text())
    sheet = torch.from_numpy(np.array(Image.open(site / "built/sheet.png"))).float() / 255
    H, W = (side * about["patch"] for side in about["grid"])
    tiles = sheet.unflatten(0, (-1, H)).unflatten(2, (-1, W)).permute(0, 2, 4, 1, 3).flatten(0, 1)
    return tiles[: about["images"]]


def answer_of(site, weights):
    """The playground.Answer that a site's ONNX file was made from."""
    model, _, config, about = train.load_run(site.parent / "run")
    if weights == "untrained":
        model = train.build(config, about["channels"])[0].eval()
    mean, std = ([value] * 3 for value in (0.498, 0.318))  # data.STATISTICS["shapes"]
    gallery = (pictures(site)[playground.EXAMPLES:] - mean[0]) / std[0]
    kind = "predicted" if weights == "trained" else weights
    return playground.Answer(model, gallery, mean, std, drawer().conditions[kind])


# --- the numbers ----------------------------------------------------------------------------------


@torch.no_grad()
def test_an_answer_is_the_models_output_and_the_galleries_nearest(site):
    answer, images = answer_of(site, "trained"), pictures(site)
    model, masks = answer.model, playground.OneBlock((6, 6), BLOCK)(1)
    found = answer(images[:1], **vars(masks))
    normalized = (images - 0.498) / 0.318
    output = model(normalized[:1], masks)
    predicted, true = output.predictions[0, 0], output.targets[0, 0]  # [Nt, D]
    assert torch.allclose(found["error"], 1 - F.cosine_similarity(predicted, true, dim=1))
    others = normalized[playground.EXAMPLES:]
    gallery = core.make_gallery(model, others, images[playground.EXAMPLES:])
    for name, features in (("predicted", predicted), ("true", true)):
        expected = core.nearest(features, gallery.features)[:, 0]
        assert torch.equal(found[f"{name}_patches"], expected)
    pooled = model.target_encoder(normalized).mean(1)  # [n, D]
    others = pooled[playground.EXAMPLES:]
    assert torch.equal(found["images"], core.nearest(pooled[:1], others, playground.NEAREST)[0])
    usual = gallery.features.unflatten(0, (-1, 36)).mean(0)[masks.targets[0, 0]]  # [Nt, D]
    assert torch.allclose(found["usual_error"], 1 - F.cosine_similarity(usual, true, dim=1))


@torch.no_grad()
def test_a_gray_encoder_answers_about_the_gray_of_a_color_image():
    model, _ = train.build(from_preset("shapes", encoder="16x1x2", predictor="8x1x2"), 1)
    images, masks = torch.rand(20, 1, 24, 24), playground.OneBlock((6, 6), BLOCK)(1)
    answer = playground.Answer(model, images, (0.0,), (1.0,))
    color = images[:1] + torch.tensor([-0.1, 0.0, 0.1]).view(3, 1, 1)  # of the same mean
    found, right = answer(color, **vars(masks)), model(images[:1], masks)
    expected = 1 - F.cosine_similarity(right.predictions, right.targets, dim=-1)[0, 0]
    torch.testing.assert_close(found["error"], expected)


def pad(masks, n):
    """The same masks with n more entries of padding in each list."""
    return Masks(*(F.pad(part, (0, n)) for part in vars(masks).values()))


@torch.no_grad()
@pytest.mark.parametrize("weights", ["trained", "untrained"])
def test_the_onnx_file_computes_what_pytorch_computes(site, weights):
    """By onnx's own interpreter; blocks of any size, lists with and without padding."""
    from onnx.reference import ReferenceEvaluator

    answer, image = answer_of(site, weights), pictures(site)[3:4]
    onnx = ReferenceEvaluator(str(site / f"built/{weights}.onnx"))
    for block in (BLOCK, [5, 0, 1, 1], [0, 0, 6, 5]):
        masks = playground.OneBlock((6, 6), block)(1)
        expected = answer(image, **vars(masks))
        for asked in (masks, pad(masks, 3)):
            inputs = {name: part.numpy() for name, part in vars(asked).items()}
            outputs = onnx.run(None, {"pixels": image.numpy(), **inputs})
            for right, value in zip(expected.values(), outputs, strict=True):
                found = torch.from_numpy(np.array(value))[: len(right)]  # without the padding's
                torch.testing.assert_close(found, right, rtol=0, atol=1e-3)


def test_the_page_says_of_the_run_only_what_was_measured(site):
    about = json.loads((site / "built/about.json").read_text())
    assert about["facts"]["Encoder"].startswith("16 wide, 1 deep, 2 heads")
    assert "union" in about["facts"]["In training it predicts"]
    assert "Training" not in about["facts"] and "accuracy" not in str(about["facts"]).lower()
    model, masking, config, _ = train.load_run(site.parent / "run")
    images = (pictures(site)[playground.EXAMPLES:] - 0.498) / 0.318
    with torch.no_grad():
        output = model(images, playground.OneBlock((6, 6), about["block"])(len(images)))
    error = 1 - F.cosine_similarity(output.predictions, output.targets, dim=-1).mean()
    assert about["errors"][1][1] == pytest.approx(error.item(), abs=1e-5)  # float32's rounding


def test_what_cannot_be_shown_is_refused_in_one_line(tmp_path, monkeypatch, site):
    flat = from_preset("shapes3d", encoder="8x1x1", predictor="8x1x1", out=str(tmp_path / "flat"))
    with pytest.raises(UsageError, match="has 1 channels and 3 axes"):
        playground.build(save_run(flat, (1, 3)), tmp_path)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(UsageError, match="needs the package onnxscript: python -m pip install"):
        playground.export_answer(answer_of(site, "trained"), tmp_path / "x.onnx")


# --- the page, in a browser -----------------------------------------------------------------------


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder and says nothing."""

    def log_message(self, *arguments):
        pass


@pytest.fixture(scope="module")
def address(site):
    """Where the site is served, with onnxruntime-web from npm."""
    modules = SOURCES / "node_modules"
    if not modules.exists():
        if not shutil.which("npm"):
            pytest.skip("neither playground/node_modules nor npm")
        done = subprocess.run(
            ["npm", "ci", "--prefix", SOURCES, "--ignore-scripts", "--no-audit", "--no-fund"],
            capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"npm could not install onnxruntime-web: {done.stderr[-200:]}")
    (site / "node_modules").symlink_to(modules)
    server = http.server.ThreadingHTTPServer(
        ("localhost", 0), functools.partial(Handler, directory=site))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://localhost:{server.server_port}/"
    server.shutdown()


@pytest.fixture
def page(browser, address):
    """The page, once it has answered; fails for an error in its console or a foreign address."""
    page, wrong = browser.new_page(), []
    page.on("console", lambda message: message.type in ("error", "warning")
            and wrong.append(message.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda request: request.url.startswith((address, "data:"))
            or wrong.append(request.url))
    page.goto(address)
    wait(page)
    yield page
    page.close()
    assert wrong == []


def wait(page, text="Answered in"):
    page.locator("#summary", has_text=text).wait_for()


def drag(page, element, patches_down, patches_right):
    """Drag an element by so many patches with the mouse."""
    box, side = page.locator(element).bounding_box(), page.locator("#image").bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + patches_right * side["width"] / 6, y + patches_down * side["height"] / 6,
                    steps=4)
    page.mouse.up()


def shown(page):
    """The numbers of the page's table: row and column from 1, error, that of the mean; [Nt, 4]."""
    return torch.tensor(page.eval_on_selector_all(
        "#numbers tbody tr", "rows => rows.map(r => [...r.cells].map(c => Number(c.textContent)))"))


@torch.no_grad()
def test_the_block_is_dragged_and_the_answer_is_pytorchs(page, site):
    """To 1e-3, with the trained and with the untrained weights."""
    before = page.text_content("#summary")
    drag(page, "#block", -1, 1)  # from row 2, column 2 to row 1, column 3, counted from 0
    drag(page, "#handle", 2, 1)
    wait(page, "12 patches hidden (row 2 to 5, column 4 to 6)")
    assert page.text_content("#summary") != before
    masks = playground.OneBlock((6, 6), [1, 3, 4, 3])(1)
    for weights in ("trained", "untrained"):
        page.check(f"[value={weights}]")
        wait(page)
        expected = answer_of(site, weights)(pictures(site)[:1], **vars(masks))
        found = shown(page)
        assert torch.equal((found[:, 0] - 1) * 6 + found[:, 1] - 1, masks.targets[0, 0].float())
        for column, name in ((2, "error"), (3, "usual_error")):
            torch.testing.assert_close(found[:, column], expected[name], rtol=0, atol=1e-3)
        labels = json.loads((site / "built/about.json").read_text())["labels"]
        neighbors = page.eval_on_selector_all("#neighbors canvas", "all => all.map(c => c.title)")
        assert neighbors == [labels[playground.EXAMPLES + i] for i in expected["images"]]
        filled = read(page, "#predicted canvas")  # [3, H, W]
        patches = core.patchify(pictures(site), 4)  # [n, N, 3*p*p]
        right = patches[playground.EXAMPLES:].flatten(0, 1)[expected["predicted_patches"]]
        torch.testing.assert_close(core.patchify(filled[None], 4)[0, masks.targets[0, 0]], right)


def read(page, canvas):
    """The pixels of a canvas, float [3, H, W] from 0 to 1."""
    pixels = page.eval_on_selector(canvas, """c => {
        const {data} = c.getContext("2d").getImageData(0, 0, c.width, c.height);
        return [...data].filter((_, i) => i % 4 < 3);
    }""")
    return torch.tensor(pixels).view(24, 24, 3).permute(2, 0, 1) / 255


@torch.no_grad()
def test_sketches_are_drawn_from_the_prediction_alone_and_are_pytorchs(page, site):
    """Eight, of the block only; with the noise given, the pixels are PyTorch's to 1e-3."""
    page.click("#sketch")
    page.locator("#sketches canvas >> nth=7").wait_for()
    assert page.locator("#sketches canvas").count() == 8
    first, second = (read(page, f"#sketches canvas:nth-child({n})") for n in (1, 2))
    about = json.loads((site / "built/about.json").read_text())
    masks = playground.OneBlock((6, 6), about["block"])(1)
    differ = (core.patchify((first - second)[None], 4)[0].abs().sum(1) > 0).nonzero()[:, 0]
    assert torch.equal(differ, masks.targets[0, 0])
    found = page.evaluate("""async () => {
        const {state} = await import("./app.js"), {sketch} = await import("./model.js");
        return Array.from((await sketch(state.block, state.answer.condition, 1, () => 0.5))[0]);
    }""")
    told = answer_of(site, "trained")(pictures(site)[:1], **vars(masks))["condition"]
    x, network = torch.full((1, masks.targets.shape[2], 48), 0.5), drawer()
    for step in range(playground.STEPS):
        t = torch.full((1, 1), step / playground.STEPS)
        x = x + network(x, t, told, masks) / playground.STEPS
    height, width = about["block"][2:]
    expected = core.unpatchify(x, (3, 4 * height, 4 * width), 4)[0]
    expected = (expected * 0.318 + 0.498).clamp(0, 1).flatten()
    torch.testing.assert_close(torch.tensor(found), expected, rtol=0, atol=1e-3)
    page.focus("#row")
    page.keyboard.press("ArrowDown")
    wait(page, "(row 2 to 3")
    assert page.locator("#sketches canvas").count() == 0  # they answered another question


def test_a_keyboard_and_a_screen_reader_are_enough(page):
    page.focus("#row")
    page.keyboard.press("ArrowDown")  # a slider's step back
    wait(page, "(row 2 to")
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowRight")
    wait(page, "column 4 to")
    page.get_by_role("button", name=re.compile("Example 3")).press("Enter")
    assert page.get_attribute("#image", "aria-label").startswith("Example 3")
    page.get_by_role("radio", name=re.compile("untrained")).press("Space")
    wait(page)
    tree = page.locator("body").aria_snapshot()
    for line in tree.splitlines():  # each with a name: - button "Start the tour"
        if re.match(r"\s*- (img|button|slider|radio)\b", line):
            assert '"' in line, line
    assert len(re.findall(r"- slider", tree)) == 4 and len(re.findall(r"- img", tree)) > 6
    assert page.get_attribute("#summary", "role") == "status"


def test_the_tour_covers_the_answer_until_one_looks(page):
    page.click("#tour-next")
    for number in range(1, 6):
        assert page.text_content("#tour-title").startswith(f"{number} of 5")
        assert page.locator(".covered").count() > 0
        assert not page.locator("#error canvas").is_visible()
        page.click("#tour-look")
        page.locator("#tour-next", has_text="Finish" if number == 5 else "Next").wait_for()
        assert page.locator(".covered").count() == 0
        assert page.is_checked("[value=untrained]") == (number == 5)
        page.click("#tour-next")
    assert page.is_checked("[value=trained]")


def test_an_image_of_ones_own(page, tmp_path):
    """Cut to a square, shrunk, asked about; what is no image is refused in a line."""
    wide = np.zeros((60, 120, 3), np.uint8)
    wide[:, 30:90] = (255, 0, 0)  # what the square in the middle holds
    Image.fromarray(wide).save(tmp_path / "red.png")
    (tmp_path / "text.png").write_text("no image")
    page.set_input_files("#upload", tmp_path / "red.png")
    page.locator("#image[aria-label='Your image']").wait_for()
    red = torch.tensor([1.0, 0, 0]).view(3, 1, 1)
    assert torch.equal(read(page, "#image"), red.expand(3, 24, 24))
    page.set_input_files("#upload", tmp_path / "text.png")
    wait(page, "text.png cannot be read as an image")


def test_it_fits_on_a_phone(page):
    page.set_viewport_size({"width": 360, "height": 740})
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


def test_the_lock_file_names_no_private_registry():
    packages = json.loads((SOURCES / "package-lock.json").read_text())["packages"]
    del packages[""]  # the page itself
    for package in packages.values():
        assert package["integrity"].startswith("sha512-")
        assert package.get("resolved", "https://registry.npmjs.org/").startswith(
            "https://registry.npmjs.org/")
