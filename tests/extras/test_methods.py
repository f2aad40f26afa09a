"""Claims about what the loop trains beside I-JEPA: the masked autoencoder, supervision, and I-JEPA with a part taken away."""

import copy
import csv
import dataclasses

import pytest
import torch
import torch.nn.functional as F

from support import checkpoint
import data
import evaluate
from extras import mae
from extras import methods
import predict_and_visualize as viz
import train
from config import METHODS, UsageError, from_dict, from_preset
from masking import RandomMasking, RasterMasking
from models import IJEPA, Encoder, patchify, take, unpatchify


@pytest.fixture(autouse=True)
def few_shapes(monkeypatch):
    monkeypatch.setattr("support.shapes.COUNT", {"train": 400, "test": 200})
    monkeypatch.setattr("support.shapes.make.__defaults__", (100,))


def tiny(**changes):
    return from_preset("shapes", **{"encoder": "16x2x1", "predictor": "8x1x1", "batch_size": 16, "epochs": 1, "device": "cpu", **changes})


def images(B=4):
    return torch.randn(B, 3, 24, 24, generator=torch.Generator().manual_seed(0))


def test_random_masks_hide_three_quarters_and_every_patch_is_either_seen_or_asked_about():
    masks = RandomMasking((6, 6))(500, torch.Generator().manual_seed(0))
    assert masks.context.shape == (500, 9) and masks.targets.shape == (500, 1, 27)
    context, targets = masks.maps(36)
    assert (context ^ targets[:, 0]).all()
    assert (context.float().mean(0) - 0.25).abs().max() < 0.08  # no place is favoured: four deviations of the mean of 500
    with pytest.raises(UsageError, match="leaves 0 to see"):
        RandomMasking((2, 2), 0.95)


def test_raster_masks_are_quarters():
    masks = RasterMasking((4, 6))(300, torch.Generator().manual_seed(0))
    context, targets = masks.maps(24)
    assert (context.int() + targets.sum(1) == 1).all()
    corner = torch.zeros(4, 6, dtype=torch.bool)
    corner[:2, :3] = True
    assert (context == corner.flatten()).all(1).float().mean() == pytest.approx(0.25, abs=0.08)
    with pytest.raises(UsageError, match="even sides"):
        RasterMasking((3, 6))


def test_pixel_targets_are_each_patch_without_its_own_brightness_and_contrast():
    x = images()
    targets = mae.pixel_targets(x, 4)
    assert targets.shape == (4, 36, 48)
    torch.testing.assert_close(targets.mean(-1), torch.zeros(4, 36), atol=1e-5, rtol=0)
    torch.testing.assert_close(targets.std(-1), torch.ones(4, 36), atol=1e-3, rtol=0)
    torch.testing.assert_close(mae.pixel_targets(3 * x + 1, 4), targets, atol=1e-3, rtol=0)


def test_the_mae_never_sees_what_it_must_predict():
    """Changing the hidden pixels changes the targets, and not the predictions."""
    model, x = methods.build(tiny(method="mae")), images()
    masks = model.masking(4, torch.Generator().manual_seed(0))
    hidden = masks.maps(36)[1][:, 0].view(4, 1, 6, 6).repeat_interleave(4, 2).repeat_interleave(4, 3)  # [B, 1, H, W]
    first, second = model(x, masks), model(torch.where(hidden, torch.randn(4, 3, 24, 24), x), masks)
    assert torch.equal(first.predictions, second.predictions) and not torch.equal(first.targets, second.targets)
    assert first.predictions.shape == first.targets.shape == (4, 1, 27, 48)


def test_a_reconstruction_keeps_what_was_seen_and_a_perfect_decoder_gives_the_image_back():
    model, x = methods.build(tiny(method="mae")).eval(), images()
    masks = model.masking(4, torch.Generator().manual_seed(0))
    hidden = masks.maps(36)[1][:, 0].view(4, 1, 6, 6).repeat_interleave(4, 2).repeat_interleave(4, 3).expand_as(x)
    masked, answered = mae.reconstruct(model, x, masks)
    assert torch.equal(masked[~hidden], x[~hidden]) and torch.equal(answered[~hidden], x[~hidden])
    assert (masked[hidden] == 0).all() and not torch.allclose(answered[hidden], x[hidden])
    model.predictor.forward = lambda context, masks: model.targets(x, masks)  # knows the answer
    torch.testing.assert_close(mae.reconstruct(model, x, masks)[1], x, atol=1e-3, rtol=0)


def test_unpatchify_undoes_patchify():
    x = torch.randn(2, 3, 8, 12)
    assert torch.equal(unpatchify(patchify(x, 4), (2, 3), 4), x)


def test_i_jepa_with_nothing_taken_away_is_i_jepa():
    torch.manual_seed(0)
    whole = methods.build(tiny())
    torch.manual_seed(0)
    encoder = Encoder("16x2x1", 24, 4)
    same = methods.AblatedIJEPA(encoder, "8x1x1", methods.masking(tiny(), encoder.grid), "smooth_l1")
    assert type(whole) is IJEPA
    losses = [model(images(), generator=torch.Generator().manual_seed(0)).loss for model in (whole, same)]
    assert torch.equal(*losses)


def test_without_stop_gradient_gradients_reach_the_targets_and_with_it_they_do_not():
    for stop in (True, False):
        model = methods.build(tiny(stop_gradient=stop, target_norm=False))  # an AblatedIJEPA either way
        assert model.targets(images(), model.masking(4)).requires_grad == (not stop)


def test_targets_of_several_layers_are_their_mean_each_layer_normed():
    config = from_preset("shapes", encoder="16x3x2", predictor="8x1x1", target_layers=2, context_size=0)
    model, images = methods.build(config), torch.randn(4, 3, 24, 24)
    *_, before, last = (F.layer_norm(layer, (16,)) for layer in model.target_encoder(images, return_layers=3))
    output = model(images, generator=torch.Generator().manual_seed(0))
    masks = model.masking(4, torch.Generator().manual_seed(0))
    wanted = F.layer_norm((before + last) / 2, (16,))
    assert torch.allclose(output.targets, take(wanted, masks.targets), atol=1e-6)
    assert torch.equal(output.tokens, model.target_encoder(images)) and not output.targets.requires_grad
    with pytest.raises(UsageError, match="--target-layers is 4: --encoder 16x3x2 has 3 blocks"):
        methods.build(from_preset("shapes", encoder="16x3x2", target_layers=4))


def test_a_masked_input_hides_the_rest_of_the_image_from_the_target_encoder():
    """Changing pixels outside of a target block changes its targets, unless the target encoder's input is masked."""
    x = images()
    for masked_input in (False, True):
        model = methods.build(tiny(masked_input=masked_input, target_norm=True))
        masks = model.masking(4, torch.Generator().manual_seed(0))
        inside = masks.maps(36)[1][:, 0].view(4, 1, 6, 6).repeat_interleave(4, 2).repeat_interleave(4, 3)  # the first block
        changed = torch.where(inside, x, torch.randn(4, 3, 24, 24))
        same = torch.allclose(model.targets(x, masks)[:, 0][masks.valid()[1][:, 0]],
                              model.targets(changed, masks)[:, 0][masks.valid()[1][:, 0]], atol=1e-5)
        assert same == masked_input


@pytest.mark.parametrize("method", METHODS)
def test_every_method_offers_a_probe_the_whole_images_tokens_or_none_where_no_encoder_sees_it(method):
    torch.manual_seed(0)
    model = methods.build(tiny(method=method, **({"context_size": 0} if "mae" not in method else {})), classes=10).train()
    output = model(images(), labels=torch.arange(4)) if method == "supervised" else model(images())
    if method in ("mae", "ijepa-pixels", "ijepa-masked-input"):
        assert output.tokens is None
    else:
        assert torch.equal(output.tokens, model.target_encoder(images())) and not output.tokens.requires_grad
        output.loss.backward()  # the detached tokens leave the gradient's way as it was
        assert all(p.grad is not None for p in model.context_encoder.parameters())


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_is_measured_and_is_probed(tmp_path, method, capsys):
    changes = {"context_size": 0} if "mae" not in method else {}
    train.train(tiny(method=method, out=str(tmp_path), measurements=2, **changes))
    rows = list(csv.DictReader(open(tmp_path / "metrics.csv")))
    assert all(float(row["loss"]) > 0 for row in rows[1:]) and float(rows[-1]["rank"]) >= 1 and rows[-1]["knn"]
    assert bool(rows[-1]["held_out_loss"]) == (method != "supervised")
    model, run_config, _ = checkpoint.load_run(tmp_path)
    assert run_config.method == method
    x = evaluate.features(model.target_encoder, data.load("shapes", "test"), 24, "cpu")
    assert x.shape == (200, 16) and x.isfinite().all()


def test_figures_of_a_masked_autoencoder_and_of_supervision_show_what_they_have(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("support.shapes.COUNT", {"train": 400, "test": 400})
    for method in ("mae", "supervised"):
        train.train(tiny(method=method, out=str(tmp_path / method), max_steps=2))
        viz.main([str(tmp_path / method), "--images", "250", "--tsne-images", "100"])
        drawn = {path.stem for path in (tmp_path / method / "figures").glob("*.png")}
        assert {"tokens", "attention", "nearest_images", "tsne", "curves"} <= drawn
        assert ("reconstruction" in drawn) == (method == "mae") and "predictor_neighbours" not in drawn
    assert "supervised predicts no features" in capsys.readouterr().out


def test_supervision_learns_the_labels_and_needs_them(tmp_path, monkeypatch):
    train.train(tiny(method="supervised", out=str(tmp_path), epochs=25, lr=1e-2))
    rows = list(csv.DictReader(open(tmp_path / "metrics.csv")))
    assert float(rows[-1]["loss"]) < 0.6 * float(rows[1]["loss"])  # it learns its training images by heart
    load = data.load

    def unlabelled(*args):
        dataset = load(*args)
        dataset.labels = None
        return dataset

    monkeypatch.setattr(data, "load", unlabelled)
    with pytest.raises(UsageError, match="needs labels"):
        train.train(tiny(method="supervised", out=str(tmp_path / "other")))


def gradients(config, kept=None):
    """Loss and every gradient of a forward and backward pass; `kept` is filled with the bytes of each tensor kept for the latter."""
    torch.manual_seed(0)
    model = methods.build(config, classes=3).train()
    weights = {p.data_ptr() for p in model.parameters()}

    def keep(tensor):
        if kept is not None and tensor.data_ptr() not in weights:
            kept[tensor.data_ptr()] = tensor.nbytes  # a dict: what two operations keep is there once
        return tensor

    labels = [torch.tensor([0, 1, 2, 0])] if config.method == "supervised" else []
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(images(), *labels, generator=torch.Generator().manual_seed(0)).loss
    loss.backward()
    return [loss, *(p.grad for p in model.parameters() if p.requires_grad)]


@pytest.mark.parametrize("method", METHODS)
def test_gradients_are_the_same_when_activations_are_computed_again(method):
    """To the bit: the same kernels see the same numbers, once more."""
    config = tiny(method=method, context_size=0)
    plain, again = (gradients(dataclasses.replace(config, recompute=recompute)) for recompute in (False, True))
    assert len(plain) > 20 and all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


@pytest.mark.parametrize("method", ["ijepa", "mae", "supervised"])
def test_recomputing_keeps_less_than_a_third_for_the_backward_pass(method):
    """Of each block its input only, where it would have kept about ten times as much."""
    kept = {False: {}, True: {}}
    for recompute, sizes in kept.items():
        gradients(tiny(method=method, encoder="32x6x2", predictor="32x6x2", recompute=recompute), sizes)
    assert sum(kept[True].values()) < sum(kept[False].values()) / 3


def test_nothing_is_computed_again_without_gradients_or_in_eval_mode(monkeypatch):
    monkeypatch.setattr("models.checkpoint", lambda *_, **__: pytest.fail("computed for a backward pass"))
    model = methods.build(tiny(recompute=True))
    with torch.no_grad():
        model.train()(images(), model.masking(4))
    model.eval()(images(), model.masking(4))
    with pytest.raises(pytest.fail.Exception):
        model.train()(images(), model.masking(4))


def test_a_run_without_recomputing_may_go_on_with_it(tmp_path):
    train.train(tiny(out=str(tmp_path), max_steps=2))
    with pytest.raises(UsageError, match="--lr"):
        train.main(["--out", str(tmp_path), "--resume", "--recompute", "--lr", "0.5"])
    train.main(["--out", str(tmp_path), "--resume", "--recompute"])


def test_a_run_from_before_there_was_the_setting_is_read():
    written = dataclasses.asdict(tiny())
    del written["recompute"]
    assert from_dict(written) == tiny()


def test_a_method_that_does_not_exist_is_refused_with_those_that_do():
    with pytest.raises(UsageError, match="--method is byol: choose one of ijepa, mae"):
        from_preset("shapes", method="byol")


# --- beyond the paper ----------------------------------------------------------------------------------------------------------


def test_the_vicreg_term_is_nothing_for_features_that_differ_in_every_direction_and_grows_as_they_become_alike():
    apart = torch.randn(4000, 8, generator=torch.Generator().manual_seed(0)) * 2
    assert methods.variance_and_covariance(apart) < 0.01  # covariances of 4,000 draws: 4 / sqrt(4000) each
    assert methods.variance_and_covariance(0.1 * apart) == pytest.approx(0.8, abs=0.02)  # a deviation of .2 lacks .8
    assert methods.variance_and_covariance(torch.ones(10, 8)) == pytest.approx(0.99)  # eq. 2's epsilon of .0001 counts for .01
    assert methods.variance_and_covariance(torch.ones(1, 8)).isfinite()  # one image differs from no other
    alike = apart[:, :1].expand(-1, 8)  # seven covariances of 4 a feature, squared, and a 25th of that
    assert methods.variance_and_covariance(alike) == pytest.approx(7 * 16 / 25, rel=0.1)


def test_with_vicreg_the_loss_has_that_of_the_context_of_all_images_as_well():
    """Padded contexts go through in groups, and padding does not count."""
    config = tiny(context_size=0, vicreg=0.5)
    model, x = methods.build(config), torch.randn(70, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    masks = model.masking(70, torch.Generator().manual_seed(0))
    output, pooled = model(x, masks), []
    for image, context, valid in zip(x, masks.context, masks.context_valid):
        pooled.append(model.context_encoder(image[None], context[valid][None])[0].mean(0))  # [D]
    copy.deepcopy(model)  # holds nothing of that pass
    model.vicreg = 0.0
    expected = model(x, masks).loss + 0.5 * methods.variance_and_covariance(torch.stack(pooled))
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-4)


def test_registers_join_every_image_and_leave_again():
    encoder, x = Encoder("16x2x1", 24, 4, registers=3), images()
    assert encoder.registers.shape == (3, 16) and Encoder("16x2x1", 24, 4).registers is None
    lengths = []
    encoder.blocks[0].register_forward_hook(lambda module, given, output: lengths.append(output.shape[1]))
    indices, valid = torch.tensor([[1, 5, 7]] * 4), torch.tensor([[True, True, False]] * 4)
    padded, alone = encoder(x, indices, valid), encoder(x, indices[:, :2])
    assert padded.shape == (4, 3, 16) and lengths == [6, 5]
    torch.testing.assert_close(padded[:, :2], alone)
    assert [layer.shape for layer in encoder(x, return_layers=2)] == [(4, 36, 16)] * 2
    with torch.no_grad():
        encoder.registers.add_(1.0)
    assert not torch.allclose(encoder(x, indices[:, :2]), alone)  # the patches look at them


def test_stochastic_depth_skips_branches_of_the_context_encoder_as_often_as_it_says_and_keeps_their_mean():
    model, x = methods.build(tiny(stochastic_depth=0.4)), torch.randn(2000, 3, 8, 16)
    block, tokens = model.context_encoder.blocks[1].train(), torch.randn(2000, 2, 16)
    torch.manual_seed(0)
    branch, whole = block.attention(tokens), block.eval().attention(tokens)
    skipped = (branch == 0).all(-1).all(-1)
    assert skipped.float().mean() == pytest.approx(0.4, abs=0.05)  # of 2,000 images; the deviation is .011
    torch.testing.assert_close(branch[~skipped], whole[~skipped] / 0.6)
    first = model.context_encoder.blocks[0].train().mlp(tokens)
    assert (first == 0).all(-1).all(-1).float().mean() == pytest.approx(0.2, abs=0.05)
    target = model.target_encoder.train().blocks[1].mlp(tokens)
    assert not (target == 0).all(-1).any() and x.shape[0] == 2000


def test_gradients_are_right_where_a_skipping_block_is_computed_again():
    config = tiny(stochastic_depth=0.5, context_size=0)
    torch.manual_seed(1)
    plain, again = (gradients(dataclasses.replace(config, recompute=recompute)) for recompute in (False, True))
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
