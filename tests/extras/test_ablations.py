"""Claims about the ablations: each changes what its name says, and nothing else."""

import csv

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import train
from config import UsageError, from_preset
from extras import ablations
from models import take

TINY = dict(encoder="16x3x1", predictor="8x1x1", context_size=0)


def images(B=4):
    return torch.randn(B, 3, 24, 24, generator=torch.Generator().manual_seed(0))


def build(name, B=4):
    """An ablation of a small I-JEPA and the masks of B images."""
    model, masking = ablations.build(name, from_preset("shapes", **TINY))
    return model, masking(B, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ablations.ABLATIONS)
def test_every_ablation_trains_and_is_measured(name, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (400, 24, 24, 3), dtype=np.uint8)
    np.savez(tmp_path / "noise.npz", train_images=pixels, train_labels=np.arange(400) % 2)
    ablations.main([name, "--encoder", "16x2x1", "--predictor", "8x1x1", "--batch-size", "16",
                    "--dataset", str(tmp_path / "noise.npz"), "--max-steps", "2", "--device", "cpu",
                    "--out", str(tmp_path / "run")])
    rows = list(csv.DictReader(open(tmp_path / "run" / "metrics.csv")))
    assert float(rows[-1]["loss"]) > 0 and float(rows[-1]["rank"]) >= 1 and rows[-1]["cosine"]


def test_the_list_names_all_of_them(capsys):
    ablations.main(["--list"])
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(
        ablations.ABLATIONS)


@pytest.mark.parametrize("name", ablations.ABLATIONS)
def test_an_ablation_starts_from_the_weights_of_i_jepa(name):
    """With one seed, the difference between two runs is the ablation's alone."""
    model, _ = build(name)
    whole, _ = train.build(from_preset("shapes", **TINY))
    weights = model.state_dict()
    assert all(torch.equal(value, weights[key]) for key, value in whole.state_dict().items()
               if name != "pixel-targets" or "predictor.project" not in key)


def test_flags_given_win_over_the_ablations_own(tmp_path, monkeypatch):
    configs = []
    monkeypatch.setattr(train, "train", lambda config, *rest: configs.append(config))
    monkeypatch.setattr("support.shapes.COUNT", {"train": 100, "test": 100})
    monkeypatch.setattr("support.shapes.make.__defaults__", (100,))
    ablations.main(["momentum-0"])
    ablations.main(["momentum-0", "--momentum-final", "0.5", "--out", "elsewhere"])
    assert [(c.momentum, c.momentum_final) for c in configs] == [(0.0, 0.0), (0.0, 0.5)]
    assert [c.out for c in configs] == ["runs/shapes-momentum-0", "elsewhere"]


# --- other masks ----------------------------------------------------------------------------------


def test_raster_masks_are_quarters():
    masks = ablations.RasterMasking((4, 6))(300, torch.Generator().manual_seed(0))
    context, targets = masks.maps(24)
    assert (context.int() + targets.sum(dim=1) == 1).all()
    corner = torch.zeros(4, 6, dtype=torch.bool)
    corner[:2, :3] = True
    # A quarter of 300 images; .08 is three standard deviations.
    share = (context == corner.flatten()).all(dim=1).float().mean()
    assert share == pytest.approx(0.25, abs=0.08)
    with pytest.raises(UsageError, match="even sides"):
        ablations.RasterMasking((3, 6))


def test_truncated_masks_have_one_block_size_and_one_context_length_a_batch():
    masking = ablations.TruncatedMasking((6, 6))
    generator, sizes = torch.Generator().manual_seed(0), set()
    for _ in range(20):
        masks = masking(16, generator)
        assert masks.context_valid.all() and masks.targets_valid.all()
        context, targets = masks.maps(36)
        assert not (context & targets.any(dim=1)).any()
        assert (context.sum(dim=1) == masks.context.shape[1]).all()  # no patch twice
        sizes.add(masks.targets.shape[2])
    assert len(sizes) > 1  # another batch, another size


# --- other targets --------------------------------------------------------------------------------


def test_without_stop_gradient_gradients_reach_the_targets_and_with_it_they_do_not():
    for name in ablations.ABLATIONS:
        model, masks = build(name)
        free = name in ("no-stop-gradient", "no-safeguards")
        assert model.make_targets(images(), masks)[0].requires_grad == free
        assert (model.target_encoder is model.context_encoder) == free


def test_without_stop_gradient_the_gradient_is_that_of_both_paths():
    """The loss falls through the predictions and through the targets, which the formula says."""
    model, masks = build("no-stop-gradient")
    model(images(), masks).loss.backward()
    found = [p.grad.clone() for p in model.context_encoder.parameters()]
    model.zero_grad()
    tokens = model.context_encoder(images())
    targets = take(F.layer_norm(tokens, (16,)), masks.targets)
    context = model.context_encoder(images(), masks.context, masks.context_valid)
    distance = F.smooth_l1_loss(model.predictor(context, masks), targets, reduction="none")
    distance[masks.targets_valid].mean().backward()
    for p, grad in zip(model.context_encoder.parameters(), found):
        torch.testing.assert_close(p.grad, grad, atol=1e-6, rtol=1e-4)


def test_targets_without_norm_are_the_target_encoders_tokens():
    for name in ("no-target-norm", "no-safeguards"):
        model, masks = build(name)
        with torch.no_grad():  # so that the norm's own weights show
            model.target_encoder.norm.weight.fill_(3.0)
        targets, tokens = model.make_targets(images(), masks)
        assert torch.equal(targets, take(model.target_encoder(images()), masks.targets))
        assert torch.equal(tokens, model.target_encoder(images()))


def test_pixel_targets_are_of_the_same_blocks():
    model, masks = build("pixel-targets")
    targets, _ = model.make_targets(images(), masks)
    assert torch.equal(targets, take(ablations.pixel_targets(images(), 4), masks.targets))
    assert model(images(), masks).predictions.shape == targets.shape


def test_a_masked_input_hides_the_rest_of_the_image_from_the_target_encoder():
    """Pixels outside of a block change its targets, unless the target encoder's input is masked."""
    for name in ("momentum-0", "masked-target-input"):
        model, masks = build(name)
        inside = masks.maps(36)[1][:, 0].view(4, 1, 6, 6)  # the first block
        inside = inside.repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)
        changed = torch.where(inside, images(), torch.randn(4, 3, 24, 24))
        first, second = (model.make_targets(x, masks)[0][:, 0][masks.targets_valid[:, 0]]
                         for x in (images(), changed))
        assert torch.allclose(first, second, atol=1e-5) == (name == "masked-target-input")


def test_targets_of_several_layers_are_their_mean_each_layer_normed():
    model, masks = build("several-layers")
    x, layers = model.target_encoder.patch_embed(images()) + model.target_encoder.positions, []
    for block in model.target_encoder.blocks:
        x = block(x)
        layers.append(F.layer_norm(x, (16,)))
    wanted = F.layer_norm(torch.stack(layers[-3:]).mean(dim=0), (16,))
    targets, tokens = model.make_targets(images(), masks)
    assert torch.allclose(targets, take(wanted, masks.targets), atol=1e-6)
    assert torch.equal(tokens, model.target_encoder(images()))


# --- VICReg's terms -------------------------------------------------------------------------------


def test_vicregs_term_is_small_for_features_that_vary_in_every_direction_and_grows_otherwise():
    apart = 2 * torch.randn(4000, 8, generator=torch.Generator().manual_seed(0))
    term = ablations.variance_and_covariance
    assert term(apart) < 0.01  # covariances of 4,000 draws: 4 / sqrt(4000) each
    assert term(0.1 * apart) == pytest.approx(0.8, abs=0.02)  # a deviation of .2 lacks .8
    assert term(torch.ones(10, 8)) == pytest.approx(0.99)  # epsilon, .0001, counts for .01
    alike = apart[:, :1].expand(-1, 8)  # seven covariances of 4 a feature, squared, and a 25th
    assert term(alike) == pytest.approx(7 * 16 / 25, rel=0.1)


def test_with_vicreg_the_loss_also_has_the_terms_of_the_pooled_context():
    """Padding does not count: each context on its own gives the same."""
    model, masks = build("vicreg", B=20)
    whole, _ = train.build(from_preset("shapes", **TINY))
    pooled = torch.stack([
        model.context_encoder(image[None], context[valid][None])[0].mean(dim=0)
        for image, context, valid in zip(images(20), masks.context, masks.context_valid)])
    terms = ablations.variance_and_covariance(pooled)
    expected = whole(images(20), masks).loss + 0.02 * terms
    torch.testing.assert_close(model(images(20), masks).loss, expected, rtol=1e-4, atol=0)


def test_vicreg_refuses_torchrun(monkeypatch):
    model, masks = build("vicreg")
    monkeypatch.setattr("support.distributed.place", lambda: (0, 2))
    with pytest.raises(UsageError, match="torchrun"):
        model(images(), masks)
