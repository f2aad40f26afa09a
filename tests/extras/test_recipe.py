"""Claims about the recipe: masks of an image share its targets, blocks stand side by side, and a
teacher does not change."""

import json

import pytest
import torch
import torch.nn.functional as F

import train
from config import UsageError, from_preset
from extras import recipe
from models import take


def tiny(**changes):
    return from_preset("shapes", **{
        "encoder": "16x3x2", "predictor": "8x1x2", "batch_size": 16, "max_steps": 2,
        "device": "cpu", "precision": "fp32", "held_out": 0, **changes})


@pytest.fixture(autouse=True)
def few_shapes(monkeypatch):
    monkeypatch.setattr("support.shapes.COUNT", {"train": 64, "test": 64})
    monkeypatch.setattr("support.shapes.make.__defaults__", (64,))


def batch(masking, B=4):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(B, 3, 24, 24, generator=generator), masking(B, generator)


def test_several_masks_of_an_image_are_what_copies_of_the_image_would_be():
    """Same loss and gradients as I-JEPA on three copies, with a third of the target passes."""
    model, masking = recipe.build(tiny(), K=3)
    plain, _ = train.build(tiny())
    images, masks = batch(masking)
    assert len(masks) == 12
    seen = []
    model.target_encoder.register_forward_hook(lambda encoder, given, out: seen.append(len(out)))
    output, expected = model(images, masks), plain(images.repeat(3, 1, 1, 1), masks)
    assert seen == [4] and len(output.tokens) == 4
    assert torch.allclose(output.loss, expected.loss, atol=1e-6)
    for run in (output, expected):
        run.loss.backward()
    for ours, theirs in zip(model.context_encoder.parameters(), plain.context_encoder.parameters()):
        assert torch.allclose(ours.grad, theirs.grad, atol=1e-6)


def test_every_mask_asks_about_its_own_image():
    model, masking = recipe.build(tiny(), K=2)
    images, masks = batch(masking)
    targets, tokens = model.make_targets(images, masks)
    normed = F.layer_norm(tokens, tokens.shape[-1:])  # [B, N, D]
    for k in range(2):
        rows = slice(4 * k, 4 * k + 4)
        assert torch.equal(targets[rows], take(normed, masks.targets[rows]))


def test_targets_of_several_blocks_stand_side_by_side_each_layer_normed():
    model, masking = recipe.build(tiny(), blocks=(1, 3))
    images, masks = batch(masking)
    with torch.no_grad():
        x, encoder, outputs = None, model.target_encoder, []
        x = encoder.patch_embed(images) + encoder.positions
        for block in encoder.blocks:
            x = block(x)
            outputs.append(F.layer_norm(x, (16,)))
    expected = take(torch.cat([outputs[0], outputs[2]], dim=-1), masks.targets)
    output = model(images, masks)
    assert torch.allclose(output.targets, expected, atol=1e-6)
    assert output.predictions.shape == expected.shape
    assert torch.equal(output.tokens, encoder(images))  # what is kept and measured is the last


def test_a_teacher_makes_the_targets_and_never_changes():
    """The target encoder, which is kept, follows the context encoder all the same."""
    teacher = train.build(tiny(seed=7))[0].target_encoder
    model, masking = recipe.build(tiny(), teacher=teacher)
    images, masks = batch(masking)
    normed = F.layer_norm(teacher(images), (16,))
    assert torch.allclose(model.make_targets(images, masks)[0], take(normed, masks.targets))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config = tiny(lr_start=1e-2)
    train.train_step(config, model, train.build_optimizer(config, model),
                     torch.amp.GradScaler("cpu", enabled=False), [(images, masks)], 0, 2)
    changed = {name.split(".")[0] for name, value in model.state_dict().items()
               if not torch.equal(value, before[name])}
    assert changed == {"context_encoder", "predictor", "target_encoder"}


def test_the_program_trains_and_resumes_with_what_it_was_given(tmp_path, capsys):
    teacher, out = tmp_path / "teacher", tmp_path / "run"
    flags = ["--encoder", "16x3x2", "--predictor", "8x1x2", "--batch-size", "16", "--device", "cpu",
             "--held-out", "0"]
    train.main([*flags, "--max-steps", "1", "--out", str(teacher)])
    asked = ["--masks-per-image", "2", "--target-blocks", "2", "3", "--teacher", str(teacher)]
    recipe.main([*flags, *asked, "--max-steps", "3", "--out", str(out)])
    assert "masks-per-image" not in json.loads((out / "config.json").read_text())
    recipe.main([*asked, "--resume", "--override", "--max-steps", "4", "--out", str(out)])
    saved = torch.load(out / "checkpoint.pt", weights_only=True)
    assert saved["progress"]["step"] == 4
    assert saved["data"]["program"] == "-m extras.recipe " + " ".join(asked)
    assert saved["model"]["predictor.project.weight"].shape == (32, 8)  # two blocks of 16


@pytest.mark.parametrize("flags, words", [
    (["--target-blocks", "4"], "--target-blocks is 4, expected numbers from 1 to 3"),
    (["--masks-per-image", "0"], "--masks-per-image is 0, expected 1 or more")])
def test_what_no_run_could_use_is_refused(tmp_path, flags, words):
    with pytest.raises(UsageError, match=words):
        recipe.main(["--encoder", "16x3x2", "--predictor", "8x1x2", "--out", str(tmp_path), *flags])
