"""Claims about sketches: they follow their condition, and only the block changes."""

import json
import statistics
from pathlib import Path

import pytest
import torch
from test_readme import section, table

import config as settings
import train
from extras import sketcher, sketches
from masking import MultiBlockMasking
from models import patchify, take
from support import shapes

RESULTS = sorted((Path(__file__).parents[2] / "results").glob("sketches_seed*.json"))
PHOTOGRAPHS = Path(__file__).parents[2] / "results/sketches_cifar10.json"
GRID, P = (4, 4), 12  # P = 3 channels * 2 * 2 pixels


@pytest.fixture(scope="module")
def toy():
    """A sketcher of blocks that are all light or all dark, which the condition tells, and a control
    that is told nothing."""
    torch.manual_seed(0)
    drawer = sketcher.Sketcher({"told": 1, "none": 1}, GRID, 2, 3, 8)
    optimizer = torch.optim.AdamW(drawer.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    masking = MultiBlockMasking(GRID, 1)
    for step in range(250):
        masks, light = masking(64, generator), torch.randn(64, 1, generator=generator).sign()
        optimizer.param_groups[0]["lr"] = train.cosine(1e-2, 1e-4, step / 250)
        patches = light[..., None].expand(-1, masks.targets.shape[2], P)
        given = drawer.read({"told": light, "none": torch.zeros(64, 1)})
        loss = sketcher.flow_loss(drawer, patches.repeat(2, 1, 1), given,
                                  masks[torch.arange(64).repeat(2)], generator)
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
    return drawer.eval(), masking(200, generator), torch.randn(200, 1, generator=generator).sign()


def brightness(drawer, masks, kind, condition, **options):
    """The mean over the real patches of one sketch of each block: [B]."""
    drawn = sketcher.draw(drawer, drawer.read({kind: condition}), masks, 1, **options)[:, 0]
    return sketcher.pool(drawn, masks).mean(1)


def test_sketches_show_what_the_condition_tells(toy):
    drawer, masks, light = toy
    found = brightness(drawer, masks, "told", light)
    assert (found.sign() == light[:, 0]).float().mean() > 0.95
    shuffled = brightness(drawer, masks, "told", light.roll(1, 0))
    assert (shuffled.sign() == light[:, 0]).float().mean() < 0.65


def test_what_the_condition_leaves_open_differs_from_sketch_to_sketch(toy):
    """Told nothing, it draws either light or dark blocks, about as many of each; one step of length
    1 gives their mean instead, which is neither."""
    drawer, masks, light = toy
    found = brightness(drawer, masks, "none", torch.zeros_like(light))
    assert found.abs().median() > 0.7
    assert 0.3 < (found > 0).float().mean() < 0.7
    mean = brightness(drawer, masks, "none", torch.zeros_like(light), steps=1)
    assert mean.abs().median() < 0.5  # nearer to gray than to light or dark


def test_one_block_knows_nothing_of_the_others_in_its_batch(toy):
    drawer, masks, light = toy
    together = sketcher.draw(drawer, drawer.read({"told": light}), masks, 1, steps=2)
    alone = sketcher.draw(drawer, drawer.read({"told": light[:1]}), masks[:1], 1, steps=2)
    torch.testing.assert_close(together[:1], alone, atol=1e-5, rtol=0)


def test_only_the_block_is_replaced():
    images = torch.randn(3, 3, 8, 8)
    masks = MultiBlockMasking(GRID, 1)(3, torch.Generator().manual_seed(0))
    new = torch.randn(3, 2, masks.targets.shape[2], P)
    pasted = sketcher.paste(images, masks, new)  # [3, 2, 3, 8, 8]
    block = masks.maps(16)[1][:, 0]  # [3, 16]
    for s in range(2):
        patches = patchify(pasted[:, s], 2)
        assert torch.equal(patches[~block], patchify(images, 2)[~block])
        real = masks.targets_valid[:, 0]
        assert torch.equal(take(patches, masks.targets[:, 0])[real], new[:, s][real])


# --- the command ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shapes, "COUNT", {"train": 1000, "test": 1000})
        out = str(tmp_path_factory.mktemp("run") / "run")
        train.train(settings.from_preset("shapes", max_steps=2, measurements=0, held_out=64,
                                         encoder="32x1x1", predictor="16x1x1", out=out))
        yield Path(out)


def test_the_command_trains_measures_and_draws_and_does_not_train_twice(run, capsys):
    command = [str(run), "--steps", "3", "--width", "8", "--images", "32"]
    sketches.main(command)
    rows = json.loads((run / "sketches.json").read_text())["rows"]
    assert rows["true block"]["agreement"] == 1
    assert {"predicted", "true", "untrained", "place only", "shuffled"} < set(rows)
    assert (run / "figures" / "sketches.png").exists()
    written = (run / "sketcher.pt").stat().st_mtime_ns
    first = capsys.readouterr().out
    sketches.main(command)
    assert capsys.readouterr().out == first
    with pytest.raises(settings.UsageError, match="other settings"):
        sketches.main([*command[:1], "--steps", "4", *command[3:]])
    assert written


def test_an_interrupted_sketcher_resumes_to_the_bit(run, tmp_path, monkeypatch):
    monkeypatch.setattr(sketcher, "SAVE_EVERY", 2)
    subject = sketcher.Subject(run)
    given = {"mae": "", "steps": 5, "width": 8, "seed": 0}

    def fit(path):
        return sketcher.fit(sketcher.build(subject, 8), subject, given, path, batch_size=8)

    whole, asked = fit(tmp_path / "whole.pt"), subject.conditions
    calls = iter([asked, asked, asked])
    monkeypatch.setattr(subject, "conditions", lambda *x: next(calls)(*x))
    with pytest.raises(StopIteration):  # in the third step
        fit(tmp_path / "parts.pt")
    monkeypatch.undo()
    monkeypatch.setattr(shapes, "COUNT", {"train": 1000, "test": 1000})
    resumed = fit(tmp_path / "parts.pt")
    for a, b in zip(whole.parameters(), resumed.parameters()):
        assert torch.equal(a, b)


# --- what was measured ----------------------------------------------------------------------------


def test_the_page_says_what_was_measured():
    rows = [json.loads(path.read_text())["rows"] for path in RESULTS]
    lines = [[cell.strip("*") for cell in cells] for cells in table(
        "sketches.md", "How much of it comes from the prediction?").values()]
    kinds = ("true", "predicted", "MAE", "untrained predictor", "untrained", "place only",
             "shuffled", "gray block")  # in the page's order
    for kind, said in zip(kinds, lines, strict=True):
        for name, cell, digits in zip(("agreement", "likeness", "spread"), said, (1, 2, 2)):
            found = [row[kind][name] * (100 if name == "agreement" else 1) for row in rows]
            mean, deviation = statistics.mean(found), statistics.stdev(found)
            assert cell == f"{mean:.{digits}f} ± {deviation:.{digits}f}", (kind, name)
    times = [json.loads(path.read_text())["seconds"] for path in RESULTS]
    assert "took {:.0f} seconds on two cores, and {:.0f} and {:.0f} on one".format(
        *times) in section("sketches.md", "How much of it comes from the prediction?")


def test_the_page_says_what_was_measured_on_photographs():
    rows = json.loads(PHOTOGRAPHS.read_text())["rows"]
    kinds = ("true", "predicted", "untrained predictor", "untrained", "place only", "shuffled",
             "gray block")  # in the page's order
    lines = table("sketches.md", "Photographs").values()
    assert [[cell.strip("*") for cell in cells] for cells in lines] == [
        [f"{100 * rows[kind]['agreement']:.1f}", f"{rows[kind]['likeness']:.2f}",
         f"{rows[kind]['spread']:.2f}"] for kind in kinds]
    place = rows["place only"]
    assert rows["predicted"]["agreement"] > max(place["agreement"] + 0.1,
                                                rows["untrained predictor"]["agreement"])
    assert rows["predicted"]["spread"] < place["spread"] - 0.2


def test_the_prediction_was_drawn_better_than_its_controls():
    """With every seed, by more than the noise of 200 images, which is below 3 points."""
    assert RESULTS
    for path in RESULTS:
        rows = json.loads(path.read_text())["rows"]
        for control in ("untrained predictor", "untrained", "place only", "shuffled"):
            for name in ("agreement", "likeness"):
                assert rows["predicted"][name] > rows[control][name] + 0.03, (path.name, control)
        assert rows["shuffled"]["likeness"] < rows["place only"]["likeness"]
        assert rows["predicted"]["agreement"] < rows["true"]["agreement"]
