"""Claims about the model: positions, attention, what may influence what, and where gradients go."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

import data
import evaluate
import models
from config import UsageError, from_preset
from masking import Masks, MultiBlockMasking
from extras.methods import build
from models import (
    IJEPA, Attention, Block, Encoder, PatchEmbed, explicit_attention, parse_size, patchify, prediction_loss, resize_positions,
    sincos_positions, take,
)


def small(**changes):
    """A small I-JEPA in train mode on 24x24 images, with weights large enough that every part matters."""
    torch.manual_seed(0)
    model = IJEPA("32x2x4", "16x2x2", image_size=24, patch_size=4, **changes)
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.2)
    model.target_encoder.load_state_dict(model.context_encoder.state_dict())
    return model.train()


def images(B=3, seed=0):
    return torch.randn(B, 3, 24, 24, generator=torch.Generator().manual_seed(seed))


def draw(B=3, seed=0, **settings):
    return MultiBlockMasking((6, 6), **settings)(B, torch.Generator().manual_seed(seed))


def test_patchify_by_hand():
    """Patch 1 of a 4x4 image with patches of 2 is its top right corner, channel by channel, row by row."""
    image = torch.arange(32.0).view(1, 2, 4, 4)
    patches = patchify(image, 2)
    assert patches.shape == (1, 4, 8)
    assert patches[0, 1].tolist() == [2, 3, 6, 7, 18, 19, 22, 23]


def test_patch_embedding_is_a_strided_convolution():
    embed = PatchEmbed(4, 3, 16)
    weight = embed.project.weight.view(16, 3, 4, 4)
    convolved = F.conv2d(images(), weight, embed.project.bias, stride=4).flatten(2).transpose(1, 2)  # [B, N, D]
    assert torch.allclose(embed(images()), convolved, atol=1e-5)


def test_volumes_are_patched_like_a_3d_convolution():
    embed = PatchEmbed(2, 1, 16, axes=3)
    volume = torch.randn(2, 1, 4, 6, 8)
    convolved = F.conv3d(volume, embed.project.weight.view(16, 1, 2, 2, 2), embed.project.bias, stride=2).flatten(2).transpose(1, 2)
    assert torch.allclose(embed(volume), convolved, atol=1e-5)


def test_positions_by_hand():
    """Row 1, column 2 of a 3x4 grid: sines and cosines of the column, then of the row, at frequencies 1 and 1/100."""
    expected = [math.sin(2), math.sin(0.02), math.cos(2), math.cos(0.02), math.sin(1), math.sin(0.01), math.cos(1), math.cos(0.01)]
    assert torch.allclose(sincos_positions((3, 4), 8)[1 * 4 + 2], torch.tensor(expected))


@pytest.mark.parametrize("grid,width", [((6, 6), 32), ((3, 5), 32), ((2, 3, 4), 64)])
def test_every_place_has_its_own_position(grid, width):
    positions = sincos_positions(grid, width)
    assert positions.shape == (math.prod(grid), width)
    assert (torch.cdist(positions, positions) + 9 * torch.eye(len(positions))).min() > 0.1


def test_positions_resized_to_their_own_grid_are_unchanged():
    positions = sincos_positions((6, 6), 32)
    assert torch.allclose(resize_positions(positions, (6, 6), (6, 6)), positions, atol=1e-5)


@pytest.mark.parametrize("padded", [False, True])
def test_the_kernel_equals_softmax_attention_written_out(padded):
    q, k, v = torch.randn(3, 2, 4, 7, 8, generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(7) < torch.tensor([[5], [7]]))[:, None, None] if padded else None  # True = may be attended to
    assert torch.allclose(F.scaled_dot_product_attention(q, k, v, attn_mask=mask), explicit_attention(q, k, v, mask), atol=1e-6)


@pytest.mark.parametrize("tokens, precision, formula", [
    (128, torch.float32, True), (129, torch.float32, False), (129, torch.bfloat16, True)])
def test_attention_on_a_cpu_goes_by_the_formula_where_that_is_faster(tokens, precision, formula, monkeypatch):
    by_formula = []
    monkeypatch.setattr("models.explicit_attention", lambda *parts: by_formula.append(parts) or parts[2])
    with torch.autocast("cpu", precision, enabled=precision == torch.bfloat16):
        Attention(8, 2)(torch.randn(2, tokens, 8))
    assert bool(by_formula) == formula


def test_attention_equals_attention_without_the_padding():
    attention = Attention(32, 4)
    x, valid = torch.randn(1, 7, 32), torch.tensor([[True] * 5 + [False] * 2])
    assert torch.allclose(attention(x, valid)[:, :5], attention(x[:, :5]), atol=1e-6)


def test_a_mask_the_wrong_way_round_is_caught():
    """nn.MultiheadAttention's key_padding_mask means the opposite by True; passed here, it makes padding matter."""
    attention = Attention(32, 4)
    x, valid = torch.randn(1, 7, 32), torch.tensor([[True] * 5 + [False] * 2])
    other = x.clone()
    other[:, 5:] += 1.0  # change what lies in the padding
    assert torch.equal(attention(x, valid)[:, :5], attention(other, valid)[:, :5])
    assert not torch.allclose(attention(x, ~valid)[:, :5], attention(other, ~valid)[:, :5], atol=1e-3)


def test_the_encoder_sees_only_the_context_patches():
    """Changing every hidden pixel leaves the context encoder's output as it was, to the bit."""
    model, masks = small(), draw()
    context, _ = masks.maps(36)
    hidden = ~context.view(3, 1, 6, 6).repeat_interleave(4, 2).repeat_interleave(4, 3)  # [B, 1, H, W] pixels
    changed = images() + 5 * hidden
    before, after = (model.context_encoder(x, masks.context, masks.context_valid) for x in (images(), changed))
    assert torch.equal(before[masks.context_valid], after[masks.context_valid])


@pytest.mark.parametrize("mode", ["pad", "truncate"])
def test_predictions_do_not_depend_on_batch_neighbours_or_padding(mode):
    """One image with its masks alone, without any padding, gives what it gives within a padded batch (1e-5)."""
    model, masks, batch = small(), draw(8, mode=mode), images(8)
    together = model(batch, masks)
    for i in range(8):
        real = slice(None) if masks.context_valid is None else masks.context_valid[i]
        for m in range(4):
            block = slice(None) if masks.targets_valid is None else masks.targets_valid[i, m]
            alone = Masks(masks.context[i, real][None], None, masks.targets[i, m, block][None, None], None)
            prediction = model(batch[i : i + 1], alone).predictions[0, 0]
            assert torch.allclose(prediction, together.predictions[i, m, block], atol=1e-5)


def test_target_blocks_do_not_see_each_other():
    model, masks = small(), draw(mode="truncate")
    first = model(images(), masks).predictions[:, 0]
    masks.targets[:, 1:] = masks.targets[:, 1:].flip(0)  # other questions in the other blocks
    assert torch.equal(first, model(images(), masks).predictions[:, 0])


def test_permuting_a_blocks_patches_permutes_its_predictions():
    model, masks = small(), draw(mode="truncate")
    order = torch.randperm(masks.targets.shape[2], generator=torch.Generator().manual_seed(1))
    before = model(images(), masks).predictions
    masks.targets = masks.targets[:, :, order]
    assert torch.allclose(model(images(), masks).predictions, before[:, :, order], atol=1e-5)


def test_the_predictor_depends_on_place_and_on_context():
    model, masks = small(), draw(mode="truncate")
    before = model(images(), masks).predictions
    assert not torch.allclose(before[:, :, 0], before[:, :, 1], atol=1e-3)  # same question word, other place
    assert not torch.allclose(before, model(images(seed=1), masks).predictions, atol=1e-3)  # other image


def test_images_taken_in_groups_of_like_length_give_the_losses_and_gradients_of_the_padded_batch(monkeypatch):
    """What a CPU does to compute less padding: to rounding, nothing changes but the time."""
    torch.manual_seed(0)
    model, images = IJEPA("32x2x2", "16x2x2", image_size=24, patch_size=4), torch.randn(70, 3, 24, 24)
    masks, found = MultiBlockMasking((6, 6))(70, torch.Generator().manual_seed(0)), []
    sizes = [part.context.shape[1] for _, part in models.groups(masks)]
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1] == masks.context.shape[1]  # less is computed
    for grouped in (True, False):
        monkeypatch.setattr(models, "worth_grouping", lambda masks, grouped=grouped: grouped)
        output = model(images, masks)
        output.loss.backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        found.append((output.loss, torch.where(masks.valid()[1][..., None], output.predictions, 0), *grads))
        model.zero_grad()
    assert len(found[0]) > 20
    assert all(torch.allclose(one, other, rtol=1e-4, atol=1e-6) for one, other in zip(*found))  # float32, summed in another order


def test_context_that_is_padded_in_front_of_real_patches_is_grouped_by_its_last_real_one():
    valid = torch.tensor([[True, False, True, False], [True, False, False, False]])
    masks = Masks(torch.arange(4).expand(2, 4), valid, torch.zeros(2, 1, 1, dtype=torch.int64), None)
    ((rows, part),) = models.groups(masks)
    assert rows.tolist() == [1, 0] and part.context.shape == (2, 3)


def test_the_last_blocks_answers_at_the_target_places_are_those_of_a_block_that_answers_everywhere():
    torch.manual_seed(0)
    block, x, valid = Block(32, 4), torch.randn(3, 10, 32), torch.rand(3, 10) < 0.7
    valid[:, 0] = True
    assert torch.allclose(block(x, valid, first=6), block(x, valid)[:, 6:], atol=1e-6)


def test_no_gradient_reaches_the_target_encoder_and_every_trained_parameter_has_one():
    model = small()
    output = model(images(), draw())
    output.loss.backward()
    assert not output.targets.requires_grad
    assert all(p.grad is None and not p.requires_grad for p in model.target_encoder.parameters())
    trained = [*model.context_encoder.parameters(), *model.predictor.parameters()]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained)


def test_targets_are_the_whole_images_tokens_layer_normed_then_cut_out():
    model, masks = small(), draw()
    tokens = model.target_encoder(images())
    tokens = (tokens - tokens.mean(-1, keepdim=True)) / (tokens.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    assert torch.allclose(model.targets(images(), masks), take(tokens, masks.targets), atol=1e-5)


def test_take_by_eye():
    """Tokens that hold their own index come back as the indices asked for."""
    tokens = torch.arange(16.0).view(1, 16, 1).expand(2, 16, 4)
    indices = torch.tensor([[[3, 1], [0, 15]], [[7, 7], [2, 4]]])  # [B, M, Nt]
    assert torch.equal(take(tokens, indices)[..., 0].long(), indices)


@pytest.mark.parametrize("kind,formula", [
    ("l2", lambda d: d**2), ("smooth_l1", lambda d: torch.where(d.abs() < 1, d**2 / 2, d.abs() - 0.5)),
])
def test_the_loss_is_a_mean_over_real_patches_only(kind, formula):
    predictions, targets = 2 * torch.randn(2, 2, 3, 4, 8, generator=torch.Generator().manual_seed(0))
    valid = torch.ones(2, 3, 4, dtype=torch.bool)
    valid[0, :, 2:] = False
    expected = formula(predictions - targets)[valid].mean()
    predictions[~valid] = 1e6  # padding may hold anything
    assert prediction_loss(predictions, targets, valid, kind).item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_loss_does_not_grow_with_the_batch_or_the_width():
    for shape in [(2, 4, 6, 8), (64, 4, 6, 8), (2, 4, 6, 512)]:
        assert prediction_loss(torch.zeros(shape), torch.ones(shape), None, "l2").item() == pytest.approx(1.0)


def test_ema_follows_its_closed_form():
    """After n steps towards a fixed context encoder: target = m**n * start + (1 - m**n) * context."""
    model = small()
    start = copy.deepcopy(model.target_encoder)
    with torch.no_grad():
        for p in model.context_encoder.parameters():
            p.add_(1.0)
    for _ in range(5):
        model.update_target(0.9)
    for target, first, context in zip(model.target_encoder.parameters(), start.parameters(), model.context_encoder.parameters()):
        assert torch.allclose(target, 0.9**5 * first + (1 - 0.9**5) * context, atol=1e-5)


def test_in_eval_mode_every_patch_is_encoded_by_the_target_encoder():
    model = small().eval()
    with torch.no_grad():
        model.context_encoder.norm.bias.add_(1.0)
        assert torch.equal(model(images()), model.target_encoder(images()))
    assert model(images()).shape == (3, 36, 32)


@pytest.mark.parametrize("probe", ["target", "context"])
def test_an_outputs_tokens_are_the_whole_images_as_evaluation_sees_it_and_carry_no_gradient(probe):
    model = small(probe=probe)
    with torch.no_grad():
        model.context_encoder.norm.bias.add_(1.0)  # now the two encoders differ
    tokens = model(images(), draw()).tokens
    assert torch.equal(tokens, getattr(model, f"{probe}_encoder")(images())) and not tokens.requires_grad
    pixels = torch.randint(0, 256, (3, 3, 24, 24), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    dataset = data.ImageDataset("noise", pixels, None, None, (0.5,) * 3, (0.25,) * 3)
    tokens = model(*data.batches(dataset, 3, 24)).tokens
    assert torch.equal(tokens.mean(1), evaluate.features(getattr(model, f"{probe}_encoder"), dataset, 24, "cpu"))


def test_the_target_encoders_tokens_cost_no_pass_and_the_context_encoders_one():
    for probe, passes in (("target", ["context", "target"]), ("context", ["context", "context", "target"])):
        model, seen = small(probe=probe), []
        for name in ("context", "target"):
            getattr(model, f"{name}_encoder").register_forward_hook(lambda *_, name=name, seen=seen: seen.append(name))
        model(images(), draw())
        assert sorted(seen) == passes


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_what_a_probe_reads_changes_no_gradient(precision):
    """In bf16 too, where older torch would hand weights cast for the probe, without gradient, to the pass that is to learn."""
    gradients = []
    for probe in ("target", "context"):
        model = small(probe=probe)
        with torch.autocast("cpu", precision, enabled=precision != torch.float32):
            output = model(images(), draw())
        output.loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))
    with pytest.raises(UsageError, match="probe 'contxt' is none of target, context; nearest: context"):
        small(probe="contxt")


def test_in_train_mode_the_model_draws_its_own_masks():
    model = small()
    first, second = (model(images(), generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first.loss, second.loss) and first.predictions.shape[:2] == (3, 4)


def test_an_encoder_of_ones_own_can_be_passed_in():
    class Linear(torch.nn.Module):
        """The least that IJEPA asks of an encoder: .width, .grid and the call."""

        def __init__(self):
            super().__init__()
            self.width, self.grid, self.embed = 24, (6, 6), PatchEmbed(4, 3, 24)

        def forward(self, images, indices=None, valid=None):
            tokens = self.embed(images)
            return tokens if indices is None else take(tokens, indices)

    output = IJEPA(Linear(), "16x1x2")(images())
    output.loss.backward()
    assert output.predictions.shape[-1] == 24


def test_last_layers_for_probes():
    encoder = Encoder("32x3x4", 24, 4)
    layers = encoder(images(), return_layers=2)
    assert len(layers) == 2 and torch.equal(layers[-1], encoder(images()))


def test_a_larger_image_gets_interpolated_positions():
    encoder = Encoder("32x1x4", 24, 4)
    assert encoder(torch.randn(1, 3, 36, 24)).shape == (1, 54, 32)


@pytest.mark.parametrize("name,millions", [
    ("tiny", 5.5), ("small", 21.6), ("base", 85.8), ("large", 303.3), ("huge", 630.8), ("giant", 1011.0),
])
def test_named_sizes_have_the_published_number_of_parameters(name, millions):
    """The ViT papers' counts, less class token and learned positions (giant: 1.01 billion), within 1%."""
    with torch.device("meta"):
        encoder = Encoder(name, 224, {"huge": 14}.get(name, 16))
    assert sum(p.numel() for p in encoder.parameters()) / 1e6 == pytest.approx(millions, rel=0.01)


def test_a_size_may_name_its_mlp_width_as_giants_48_elevenths_need():
    block = Encoder("1408x1x16x6144", 32, 16).blocks[0]
    assert block.mlp[0].weight.shape == (6144, 1408) and parse_size("giant")[3] == 48 / 11
    assert parse_size("192x6x6") == (192, 6, 6, 4.0) and parse_size("32x1x4x100") == (32, 1, 4, 100 / 32)


def test_volumes_go_through_the_whole_model():
    model = IJEPA("32x1x4", "16x1x2", image_size=(4, 8, 8), patch_size=2, channels=1)
    output = model(torch.randn(2, 1, 4, 8, 8))
    output.loss.backward()
    assert model.context_encoder.grid == (2, 4, 4) and output.predictions.shape[-1] == 32


@pytest.mark.parametrize("build_it,message", [
    (lambda: Encoder("32x1x4", 30, 4), "do not divide"), (lambda: Encoder("32x1x5"), "multiple"), (lambda: Encoder("vast"), "neither"),
    (lambda: Encoder("32x1x4x0"), "at least 1"), (lambda: Encoder("32x1x4x8x8"), "neither"),
    (lambda: Encoder("32x1x4", 24, 4)(torch.zeros(1, 3, 26, 24)), "do not divide"),
    (lambda: build(from_preset("shapes", image_size=24, patch_size=12)), "2x2 grid"),
])
def test_what_does_not_go_together_is_refused(build_it, message):
    with pytest.raises(UsageError, match=message):
        build_it()
