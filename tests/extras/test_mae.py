"""Claims about the masked autoencoder: what it sees, what it predicts, and that a run is a run."""

import csv

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from config import UsageError, from_preset
from extras import mae
from models import patchify, take

TINY = ["--encoder", "16x2x1", "--predictor", "8x1x1", "--batch-size", "16", "--device", "cpu"]


@pytest.fixture
def noise(tmp_path):
    """The path of a .npz of 400 images of noise in two brightnesses, which are their labels."""
    labels = np.arange(400) % 2
    images = np.random.default_rng(0).integers(0, 120, (400, 24, 24, 3))
    path = tmp_path / "noise.npz"
    np.savez(path, train_images=(images + 100 * labels[:, None, None, None]).astype(np.uint8),
             train_labels=labels)
    return str(path)


def tiny():
    """A small MAE with its masks, and four images."""
    model, masking = mae.build(from_preset("shapes", encoder="16x2x1", predictor="8x1x1"))
    images = torch.randn(4, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    return model, masking(4, torch.Generator().manual_seed(0)), images


def hidden_pixels(masks):
    """bool [B, 1, 24, 24], True at the pixels of the hidden patches, 4 pixels a side."""
    hidden = masks.maps(36)[1][:, 0].view(-1, 1, 6, 6)
    return hidden.repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)


def test_three_quarters_are_hidden_and_every_patch_is_either_seen_or_predicted():
    masks = mae.RandomMasking((6, 6))(500, torch.Generator().manual_seed(0))
    assert masks.context.shape == (500, 9) and masks.targets.shape == (500, 1, 27)
    assert masks.context_valid.all() and masks.targets_valid.all()
    context, targets = masks.maps(36)
    assert (context ^ targets[:, 0]).all()
    # Every place is seen as often: .08 is four standard deviations of the mean of 500.
    assert (context.float().mean(dim=0) - 0.25).abs().max() < 0.08
    with pytest.raises(UsageError, match="--mask-ratio is 0.95"):
        mae.RandomMasking((2, 2), 0.95)


def test_pixel_targets_are_patches_without_their_own_brightness_and_contrast():
    x = torch.randn(4, 3, 24, 24)
    targets = mae.pixel_targets(x, 4)
    assert targets.shape == (4, 36, 48)
    torch.testing.assert_close(targets.mean(-1), torch.zeros(4, 36), atol=1e-5, rtol=0)
    torch.testing.assert_close(targets.std(-1), torch.ones(4, 36), atol=1e-3, rtol=0)
    torch.testing.assert_close(mae.pixel_targets(3 * x + 1, 4), targets, atol=1e-3, rtol=0)


def test_the_loss_is_the_mean_squared_error_of_the_hidden_patches():
    model, masks, images = tiny()
    output = model(images, masks)
    assert output.predictions.shape == output.targets.shape == (4, 1, 27, 48)
    expected = take(mae.pixel_targets(images, 4), masks.targets)
    torch.testing.assert_close(output.loss, F.mse_loss(output.predictions, expected))
    output.loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_the_mae_never_sees_what_it_predicts():
    """Changing the hidden pixels changes the targets, and not the predictions."""
    model, masks, images = tiny()
    changed = torch.where(hidden_pixels(masks), torch.randn(4, 3, 24, 24), images)
    first, second = model(images, masks), model(changed, masks)
    assert torch.equal(first.predictions, second.predictions)
    assert not torch.equal(first.targets, second.targets)


def test_unpatchify_undoes_patchify():
    x = torch.randn(2, 3, 8, 12)
    assert torch.equal(mae.unpatchify(patchify(x, 4), x.shape[1:], 4), x)


def test_a_reconstruction_keeps_what_was_seen_and_a_perfect_decoder_gives_the_image_back():
    model, masks, images = tiny()
    hidden = hidden_pixels(masks).expand_as(images)
    masked, answer = mae.reconstruct(model, images, masks)
    assert torch.equal(masked[~hidden], images[~hidden]) and (masked[hidden] == 0).all()
    assert torch.equal(answer[~hidden], images[~hidden])
    assert not torch.allclose(answer[hidden], images[hidden])
    model.predictor.forward = lambda context, masks: model.make_targets(images, masks)
    torch.testing.assert_close(mae.reconstruct(model, images, masks)[1], images, atol=1e-3, rtol=0)


def test_a_run_trains_is_measured_resumes_and_is_loaded(tmp_path, noise):
    """Resumed after half of its steps it ends with the weights of a run in one go."""
    flags = [*TINY, "--dataset", noise, "--mask-ratio", "0.5", "--max-steps", "10"]
    mae.main([*flags, "--out", str(tmp_path / "whole")])
    rows = list(csv.DictReader(open(tmp_path / "whole" / "metrics.csv")))
    assert float(rows[-1]["loss"]) > 0 and float(rows[-1]["rank"]) >= 1 and rows[-1]["knn"]
    whole, masking, config, _ = mae.load_run(tmp_path / "whole")
    assert masking.count == 18 and config.max_steps == 10

    step, calls = mae.train.train_step, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return step(*args)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(mae.train, "train_step", interrupted)
        mae.main([*flags, "--checkpoint-minutes", "0", "--out", str(tmp_path / "parts")])
    with pytest.raises(UsageError, match="its program was .*0.5, now .*0.75"):
        mae.main(["--out", str(tmp_path / "parts"), "--resume"])
    mae.main(["--mask-ratio", "0.5", "--out", str(tmp_path / "parts"), "--resume"])
    parts = mae.load_run(tmp_path / "parts")[0]
    assert all(map(torch.equal, whole.state_dict().values(), parts.state_dict().values()))


def test_a_run_of_another_program_is_refused(tmp_path, noise):
    out = ["--out", str(tmp_path / "run")]
    mae.train.main([*TINY, "--dataset", noise, "--max-steps", "1", *out])
    with pytest.raises(UsageError, match="its program was train.py, now -m extras.mae"):
        mae.main([*out, "--resume"])
    with pytest.raises(UsageError, match="holds a run of train.py, not a masked autoencoder"):
        mae.load_run(tmp_path / "run")
