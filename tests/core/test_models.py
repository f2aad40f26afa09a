"""Claims about the model: positions, attention, what may influence what, where gradients go."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from config import SIZES, UsageError
from masking import Masks, MultiBlockMasking
from models import (
    IJEPA,
    Attention,
    Encoder,
    PatchEmbed,
    Predictor,
    explicit_attention,
    patchify,
    prediction_loss,
    sincos_positions,
    take,
)


def small(loss="smooth_l1"):
    """A small I-JEPA on 24x24 images, with weights large enough that every part matters."""
    torch.manual_seed(0)
    encoder = Encoder(32, 2, 4, image_size=24, patch_size=4)
    model = IJEPA(encoder, Predictor(32, encoder.grid, 16, 2, 2), loss)
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.2)
    model.target_encoder.load_state_dict(model.context_encoder.state_dict())
    return model.train()


def images(B=3, seed=0):
    return torch.randn(B, 3, 24, 24, generator=torch.Generator().manual_seed(seed))


def draw(B=3, seed=0, **settings):
    return MultiBlockMasking((6, 6), **settings)(B, torch.Generator().manual_seed(seed))


def equal_blocks(B=3):
    """Masks in which every target block has 6 patches, so that nothing is padded."""
    return draw(B, target_scale=(0.1667, 0.1667), target_aspect=(1.5, 1.5), context_size=8)


# --- from pixels to tokens ------------------------------------------------------------------------


def test_patchify_by_hand():
    """Patch 1 of a 4x4 image with patches of 2 is its top right corner, channel by channel."""
    image = torch.arange(32.0).view(1, 2, 4, 4)
    patches = patchify(image, 2)
    assert patches.shape == (1, 4, 8)
    assert patches[0, 1].tolist() == [2, 3, 6, 7, 18, 19, 22, 23]


def test_patch_embedding_is_a_strided_convolution():
    embed = PatchEmbed(4, 3, 16)
    weight = embed.project.weight.view(16, 3, 4, 4)
    convolved = F.conv2d(images(), weight, embed.project.bias, stride=4)  # [B, D, H/p, W/p]
    assert torch.allclose(embed(images()), convolved.flatten(2).transpose(1, 2), atol=1e-5)


def test_volumes_are_patched_like_a_3d_convolution():
    embed = PatchEmbed(2, 1, 16, axes=3)
    volume = torch.randn(2, 1, 4, 6, 8)
    convolved = F.conv3d(volume, embed.project.weight.view(16, 1, 2, 2, 2), embed.project.bias, 2)
    assert torch.allclose(embed(volume), convolved.flatten(2).transpose(1, 2), atol=1e-5)


def test_positions_by_hand():
    """Row 1, column 2 of a 3x4 grid: sines and cosines of the column, then of the row."""
    expected = [f(coordinate * frequency) for coordinate in (2, 1) for f in (math.sin, math.cos)
                for frequency in (1, 0.01)]
    assert torch.allclose(sincos_positions((3, 4), 8)[1 * 4 + 2], torch.tensor(expected))


@pytest.mark.parametrize("grid, width", [((6, 6), 32), ((3, 5), 32), ((2, 3, 4), 64)])
def test_every_place_has_its_own_position(grid, width):
    positions = sincos_positions(grid, width)
    assert positions.shape == (math.prod(grid), width)
    assert (torch.cdist(positions, positions) + 9 * torch.eye(len(positions))).min() > 0.1


def test_take_by_eye():
    """Tokens that hold their own index come back as the indices asked for."""
    tokens = torch.arange(16.0).view(1, 16, 1).expand(2, 16, 4)
    indices = torch.tensor([[[3, 1], [0, 15]], [[7, 7], [2, 4]]])  # [B, M, Nt]
    assert torch.equal(take(tokens, indices)[..., 0].long(), indices)


# --- attention ------------------------------------------------------------------------------------


@pytest.mark.parametrize("padded", [False, True])
def test_the_kernel_equals_softmax_attention_written_out(padded):
    q, k, v = torch.randn(3, 2, 4, 7, 8, generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(7) < torch.tensor([[5], [7]]))[:, None, None] if padded else None
    fused = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    assert torch.allclose(fused, explicit_attention(q, k, v, mask), atol=1e-6)


def test_attention_over_a_padded_sequence_equals_attention_without_the_padding():
    attention, x = Attention(32, 4), torch.randn(1, 7, 32)
    valid = torch.tensor([[True] * 5 + [False] * 2])
    assert torch.allclose(attention(x, valid)[:, :5], attention(x[:, :5]), atol=1e-6)


def test_a_mask_the_wrong_way_round_makes_padding_matter():
    """nn.MultiheadAttention's key_padding_mask means the opposite by True."""
    attention, x = Attention(32, 4), torch.randn(1, 7, 32)
    valid, other = torch.tensor([[True] * 5 + [False] * 2]), x.clone()
    other[:, 5:] += 1.0  # change the padding
    assert torch.equal(attention(x, valid)[:, :5], attention(other, valid)[:, :5])
    wrong, other_wrong = attention(x, ~valid)[:, :5], attention(other, ~valid)[:, :5]
    assert not torch.allclose(wrong, other_wrong, atol=1e-3)


# --- what may influence what ----------------------------------------------------------------------


def test_the_context_encoder_sees_only_the_context_patches():
    """Changing every hidden pixel leaves its output as it was, to the bit."""
    model, masks = small(), draw()
    context, _ = masks.maps(36)
    seen = context.view(3, 1, 6, 6).repeat_interleave(4, 2).repeat_interleave(4, 3)  # pixels
    before, after = (model.context_encoder(x, masks.context, masks.context_valid)
                     for x in (images(), images() + 5 * ~seen))
    assert torch.equal(before[masks.context_valid], after[masks.context_valid])


def test_predictions_do_not_depend_on_batch_neighbors_or_padding():
    """One image alone, with nothing padded, gives what it gives in a padded batch (1e-5: other
    shapes, other order of summation)."""
    model, masks, batch = small(), draw(8), images(8)
    together = model(batch, masks)
    assert not masks.context_valid.all() and not masks.targets_valid.all()
    for i in range(8):
        context = masks.context[i, masks.context_valid[i]]
        for m in range(4):
            real = masks.targets_valid[i, m]
            target = masks.targets[i, m, real]
            alone = Masks(context[None], torch.ones(1, len(context), dtype=torch.bool),
                          target[None, None], torch.ones(1, 1, len(target), dtype=torch.bool))
            prediction = model(batch[i : i + 1], alone).predictions[0, 0]
            assert torch.allclose(prediction, together.predictions[i, m, real], atol=1e-5)


def test_target_blocks_do_not_see_each_other():
    model, masks = small(), equal_blocks()
    first = model(images(), masks).predictions[:, 0]
    masks.targets[:, 1:] = masks.targets[:, 1:].flip(0)  # other places in the other blocks
    assert torch.equal(first, model(images(), masks).predictions[:, 0])


def test_permuting_a_blocks_patches_permutes_its_predictions():
    model, masks = small(), equal_blocks()
    order = torch.randperm(masks.targets.shape[2], generator=torch.Generator().manual_seed(1))
    before = model(images(), masks).predictions
    masks.targets = masks.targets[:, :, order]
    assert torch.allclose(model(images(), masks).predictions, before[:, :, order], atol=1e-5)


def test_the_predictor_depends_on_place_and_on_context():
    model, masks = small(), equal_blocks()
    before = model(images(), masks).predictions
    assert not torch.allclose(before[:, :, 0], before[:, :, 1], atol=1e-3)  # another place
    other = model(images(seed=1), masks).predictions
    assert not torch.allclose(before, other, atol=1e-3)


def test_no_gradient_reaches_the_target_encoder_and_every_trained_weight_has_one():
    model = small()
    output = model(images(), draw())
    output.loss.backward()
    assert not output.targets.requires_grad and not output.tokens.requires_grad
    assert all(p.grad is None and not p.requires_grad for p in model.target_encoder.parameters())
    trained = [*model.context_encoder.parameters(), *model.predictor.parameters()]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained)


def test_targets_are_the_whole_images_tokens_layer_normed_then_cut_out():
    model, masks = small(), draw()
    tokens = model.target_encoder(images())
    deviation = (tokens.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    normed = (tokens - tokens.mean(-1, keepdim=True)) / deviation
    targets, whole = model.make_targets(images(), masks)
    assert torch.allclose(targets, take(normed, masks.targets), atol=1e-5)
    assert torch.equal(whole, tokens)


# --- the loss and the moving average --------------------------------------------------------------


@pytest.mark.parametrize("kind, formula", [
    ("l2", lambda d: d**2),
    ("smooth_l1", lambda d: torch.where(d.abs() < 1, d**2 / 2, d.abs() - 0.5)),
])
def test_the_loss_is_a_mean_over_real_patches_only(kind, formula):
    generator = torch.Generator().manual_seed(0)
    predictions, targets = 2 * torch.randn(2, 2, 3, 4, 8, generator=generator)
    valid = torch.ones(2, 3, 4, dtype=torch.bool)
    valid[0, :, 2:] = False
    expected = formula(predictions - targets)[valid].mean()
    predictions[~valid] = 1e6  # padding may hold anything
    loss = prediction_loss(predictions, targets, valid, kind)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_loss_does_not_grow_with_the_batch_or_the_width():
    for shape in [(2, 4, 6, 8), (64, 4, 6, 8), (2, 4, 6, 512)]:
        valid = torch.ones(shape[:3], dtype=torch.bool)
        loss = prediction_loss(torch.zeros(shape), torch.ones(shape), valid, "l2")
        assert loss.item() == pytest.approx(1.0)


def test_the_target_encoder_starts_as_a_copy_and_follows_the_closed_form():
    """After n steps towards a fixed encoder: m**n * start + (1 - m**n) * context."""
    model = small()
    start = copy.deepcopy(model.target_encoder)
    assert all(map(torch.equal, start.parameters(), model.context_encoder.parameters()))
    with torch.no_grad():
        for p in model.context_encoder.parameters():
            p.add_(1.0)
    for _ in range(5):
        model.update_target(0.9)
    for target, first, context in zip(model.target_encoder.parameters(), start.parameters(),
                                      model.context_encoder.parameters()):
        assert torch.allclose(target, 0.9**5 * first + (1 - 0.9**5) * context, atol=1e-5)


# --- encoders -------------------------------------------------------------------------------------


def test_an_encoder_of_ones_own_can_be_passed_in():
    class Linear(torch.nn.Module):
        """The least that IJEPA asks of an encoder: the call."""

        def __init__(self):
            super().__init__()
            self.embed = PatchEmbed(4, 3, 24)

        def forward(self, images, indices=None, valid=None):
            tokens = self.embed(images)
            return tokens if indices is None else take(tokens, indices)

    output = IJEPA(Linear(), Predictor(24, (6, 6), 16, 1, 2))(images(), draw())
    output.loss.backward()
    assert output.predictions.shape[-1] == 24


@pytest.mark.parametrize("name, millions", [
    ("tiny", 5.5), ("small", 21.6), ("base", 85.8), ("large", 303.3), ("huge", 630.8)])
def test_named_sizes_have_the_published_number_of_parameters(name, millions):
    """The ViT papers' counts, less class token and learned positions, within 1%."""
    with torch.device("meta"):
        encoder = Encoder(*SIZES[name], image_size=224, patch_size=14 if name == "huge" else 16)
    count = sum(p.numel() for p in encoder.parameters())
    assert count / 1e6 == pytest.approx(millions, rel=0.01)


def test_volumes_go_through_the_whole_model():
    encoder = Encoder(32, 1, 4, image_size=(4, 8, 8), patch_size=2, channels=1)
    model = IJEPA(encoder, Predictor(32, encoder.grid, 16, 1, 2))
    masks = MultiBlockMasking(encoder.grid)(2, torch.Generator().manual_seed(0))
    output = model(torch.randn(2, 1, 4, 8, 8), masks)
    output.loss.backward()
    assert encoder.grid == (2, 4, 4) and output.predictions.shape[-1] == 32


def test_a_patch_that_does_not_divide_the_image_and_an_image_of_another_size_are_refused():
    with pytest.raises(UsageError, match="patches of 4 pixels do not divide an image of"):
        Encoder(32, 1, 4, image_size=30, patch_size=4)
    with pytest.raises(UsageError, match=r"expected images of \(24, 24\), got \(26, 24\)"):
        Encoder(32, 1, 4, image_size=24, patch_size=4)(torch.zeros(1, 3, 26, 24))
