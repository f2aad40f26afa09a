"""The Python of docs/use.md, run as it stands."""

import math
import os
import shutil
import sys
import types

import lightning
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import config
import data
import train
from support import folder
from test_readme import snippets

MOMENTUM = 0.996  # the page's


def run(code, names=None):
    """The names that Python code leaves, a dict; run among `names`."""
    names = {} if names is None else names
    exec(code, names)
    return names


def ema(target, context):
    """Target parameters after one step towards the context's, [...] each, by the formula."""
    return [MOMENTUM * t + (1 - MOMENTUM) * c for t, c in zip(target, context)]


def equal(first, second, atol=0.0):
    """Whether two lists of tensors agree, to the bit where no tolerance is given."""
    return all(torch.allclose(a, b, rtol=0, atol=atol) for a, b in zip(first, second, strict=True))


def copies(module):
    return [p.detach().clone() for p in module.parameters()]


# --- a run on a folder of images ------------------------------------------------------------------


def paint(place, n, seed):
    """n dark and n light images of noise as PNG files of 20 x 30 pixels, in a folder each."""
    rng = np.random.default_rng(seed)
    for name, brightness in (("dark", 0), ("light", 120)):
        os.makedirs(os.path.join(place, name))
        for i in range(n):
            pixels = (brightness + rng.integers(0, 100, (20, 30, 3))).astype(np.uint8)
            Image.fromarray(pixels).save(os.path.join(place, name, f"{i}.png"))


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A working folder with an image folder in it, and a small run on that: `runs/mine`."""
    monkeypatch.chdir(tmp_path)
    paint("path/to/images", 24, 0)
    train.train(config.from_preset(
        "shapes", dataset="path/to/images", out="runs/mine", encoder="16x2x1", predictor="8x1x1",
        batch_size=16, max_steps=2, device="cpu"))


@torch.no_grad()
def test_features_of_a_folder_are_those_of_each_file_in_order(mine):
    names = run(*snippets("Features of a folder of images"))
    encoder, features, images = names["encoders"]["target"], names["features"], names["images"]
    files = images.paths
    assert features.shape == (48, 16) and features.dtype == np.float32 and len(files) == 48
    for i in (0, 30, 47):
        pixels = folder.decode(files[i], 24)[0][None]  # [1, 3, 24, 24]
        expected = encoder(data.normalize(pixels, *data.STATISTICS["folder"])).mean(1)[0]
        # A batch of one is summed in another order.
        assert np.allclose(expected.numpy(), features[i], atol=1e-5)
        assert images.class_names[images.labels[i]] in files[i]


def test_fine_tuning_learns_the_folders_classes_and_gives_the_classifier(mine):
    shutil.move("path/to/images", "path/to/train")
    shutil.move("path/to/train", "path/to/images/train")
    paint("path/to/images/test", 10, 1)
    names = run(*snippets("Fine-tuning"))
    tuned, test_set = names["tuned"], names["test_set"]
    images = data.normalize(test_set.images, test_set.mean, test_set.std)
    right = tuned["model"](images).argmax(1) == test_set.labels  # [m]
    assert tuned["accuracy"] == right.float().mean().item() == 1.0  # dark or light


# --- a bare loop, and Lightning -------------------------------------------------------------------


@pytest.fixture
def few_shapes(tmp_path, monkeypatch):
    """272 training images, a whole batch and a short one; a working folder for what is written."""
    monkeypatch.setattr("support.shapes.COUNT", {"train": 272, "test": 64})
    monkeypatch.setattr("support.shapes.make.__defaults__", (16,))
    monkeypatch.chdir(tmp_path)


def loop(code):
    torch.manual_seed(0)
    return run(code)


def test_a_bare_loop_trains_model_and_probe_and_the_probe_leaves_the_model_alone(few_shapes):
    (code,) = snippets("In your own training loop")
    names = loop(code)
    alone = loop(code.replace("(output.loss + probe_loss).backward()", "output.loss.backward()"))
    untrained = loop(code.split("for images, labels")[0])
    model, start = names["model"], untrained["model"]
    assert equal(copies(model), copies(alone["model"]))  # to the bit, with the probe or without
    assert not equal(copies(names["probe"]), copies(untrained["probe"]))
    assert equal(copies(alone["probe"]), copies(untrained["probe"]))
    for part in ("context_encoder", "predictor", "target_encoder"):
        assert not equal(copies(getattr(model, part)), copies(getattr(start, part)))
    images = names["pairs"].tensors[0][:128]
    masks = names["masking"](128, torch.Generator().manual_seed(0))
    with torch.no_grad():  # two steps have improved the predictions
        assert model(images, masks).loss < start(images, masks).loss


def lit(**changes):
    """The names of the loop and the LightningModule, without its Trainer, and a quiet Trainer."""
    (code,), (module,) = snippets("In your own training loop"), snippets("Lightning")
    names = loop(code.split("encoder =")[0])
    torch.manual_seed(0)
    run(module.split("lightning.Trainer(")[0], names)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar",
                           "enable_model_summary"), False)
    return names, lightning.Trainer(accelerator="cpu", devices=1, **{**quiet, **changes})


def test_lightning_runs_as_it_stands(few_shapes, monkeypatch):
    monkeypatch.setattr("support.shapes.COUNT", {"train": 32, "test": 32})  # one short batch
    names = loop(*snippets("In your own training loop"))
    run(*snippets("Lightning"), names)
    (checkpoint,) = [os.path.join(place, file) for place, _, files in os.walk("lightning_logs")
                     for file in files if file.endswith(".ckpt")]
    assert torch.load(checkpoint, weights_only=True)["global_step"] == 10  # epochs of one batch


@pytest.mark.parametrize("accumulated", [1, 2])
def test_in_lightning_the_target_follows_once_an_optimizer_step(few_shapes, accumulated):
    names, trainer = lit(max_epochs=2, accumulate_grad_batches=accumulated)
    steps = []

    class Watched(names["LitIJEPA"]):
        def optimizer_step(self, *arguments):
            before = copies(self.model.target_encoder)
            super().optimizer_step(*arguments)
            steps.append((before, copies(self.model.context_encoder),
                          copies(self.model.target_encoder)))

    module = Watched()
    start = copies(module.model.context_encoder)
    trainer.fit(module, names["loader"])
    assert len(steps) == trainer.global_step == 4 // accumulated
    for before, context, after in steps:
        assert equal(after, ema(before, context), atol=1e-6)  # the rounding of one float32 sum
    assert equal(steps[-1][2], copies(module.model.target_encoder))  # nothing else moves it
    assert not equal(steps[-1][1], start) and not equal(steps[-1][2], start)


def test_a_lightning_checkpoint_gives_back_every_weight_and_resumes(few_shapes):
    names, trainer = lit(max_epochs=1)
    module = names["LitIJEPA"]()
    trainer.fit(module, names["loader"])
    trainer.save_checkpoint("it.ckpt")
    again = names["LitIJEPA"].load_from_checkpoint("it.ckpt")
    assert equal(module.state_dict().values(), again.state_dict().values())
    _, longer = lit(max_epochs=2)
    longer.fit(again, names["loader"], ckpt_path="it.ckpt")
    assert longer.global_step == 4 and not equal(copies(module), copies(again))


# --- an encoder from elsewhere --------------------------------------------------------------------


class Patches(nn.Module):
    """Under timm's names: a strided convolution to tokens [B, N, D]."""

    def __init__(self, image, patch, width):
        super().__init__()
        self.grid_size = (image // patch, image // patch)
        self.proj = nn.Conv2d(3, width, patch, patch)

    def forward(self, x):
        return self.proj(x).flatten(2).mT


class Block(nn.Module):
    """Under timm's names: attention to where the mask is True, bool [B, 1, 1, N], then an MLP."""

    def __init__(self, width, heads):
        super().__init__()
        self.norm1, self.qkv, self.heads = nn.LayerNorm(width), nn.Linear(width, 3 * width), heads
        self.mlp = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(),
                                 nn.Linear(2 * width, width))

    def forward(self, x, attn_mask=None, is_causal=False):
        q, k, v = (part.unflatten(2, (self.heads, -1)).transpose(1, 2)
                   for part in self.qkv(self.norm1(x)).chunk(3, -1))  # [B, nh, N, D/nh]
        answer = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, is_causal=is_causal)
        x = x + answer.transpose(1, 2).flatten(2)  # [B, N, D]
        return x + self.mlp(x)


class VisionTransformer(nn.Module):
    """A small module with those names of timm's class that an encoder needs; no class token."""

    def __init__(self, image=24, patch=4, width=32):
        super().__init__()
        self.embed_dim, self.patch_embed = width, Patches(image, patch, width)
        self.norm_pre, self.num_prefix_tokens = nn.Identity(), 0
        N = math.prod(self.patch_embed.grid_size)
        self.pos_embed = nn.Parameter(0.5 * torch.randn(1, N, width))
        self.blocks = nn.Sequential(Block(width, 4), Block(width, 4))
        self.norm = nn.LayerNorm(width)

    def forward_features(self, x):
        return self.norm(self.blocks(self.patch_embed(x) + self.pos_embed))


def create_model(name, num_classes, class_token, global_pool):
    """In timm's place: tokens only, and the last norm, which other poolings would move."""
    assert (num_classes, class_token, global_pool) == (0, False, "")
    return VisionTransformer()


@pytest.fixture
def foreign(monkeypatch):
    """The page's IJEPA around an encoder that is not ours, images [B, C, H, W] and their masks."""
    monkeypatch.setitem(sys.modules, "timm", types.SimpleNamespace(create_model=create_model))
    torch.manual_seed(0)
    names = run(*snippets("An encoder of your own"))
    masks = names["masking"](8, torch.Generator().manual_seed(0))
    return names["model"], torch.randn(8, 3, 24, 24), masks


@pytest.mark.parametrize("name, value", [
    ("num_prefix_tokens", 4), ("norm_pre", nn.LayerNorm(32)), ("rope", nn.Identity())])
def test_the_adapter_refuses_a_transformer_that_is_not_plain(monkeypatch, name, value):
    monkeypatch.setitem(sys.modules, "timm", types.SimpleNamespace(create_model=create_model))
    adapter = run(*snippets("An encoder of your own"))["TimmEncoder"]
    vit = VisionTransformer()
    setattr(vit, name, value)
    with pytest.raises(ValueError, match="expected a plain ViT"):
        adapter(vit)


def test_an_encoder_from_elsewhere_trains_and_its_target_follows(foreign):
    model, images, masks = foreign  # always the same question, so that it can be memorized
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses, target = [], copies(model.target_encoder)
    for _ in range(10):
        output = model(images, masks)
        optimizer.zero_grad()
        output.loss.backward()
        assert all(p.grad is not None and p.grad.any() for p in model.context_encoder.parameters())
        assert all(p.grad is None for p in model.target_encoder.parameters())
        optimizer.step()
        model.update_target(MOMENTUM)
        target = ema(target, model.context_encoder.parameters())
        losses.append(output.loss.item())
    assert losses[-1] < 0.6 * losses[0]
    assert equal(copies(model.target_encoder), target, atol=1e-5)  # rounding of ten float32 sums


@torch.no_grad()
def test_the_adapter_computes_what_the_transformer_does_and_ignores_padding(foreign):
    model, images, masks = foreign
    encoder = model.context_encoder
    assert torch.allclose(encoder(images), encoder.vit.forward_features(images), atol=1e-6)
    together = encoder(images, masks.context, masks.context_valid)
    assert not masks.context_valid.all()
    for image, kept, valid, tokens in zip(images, masks.context, masks.context_valid, together):
        assert torch.allclose(encoder(image[None], kept[valid][None])[0], tokens[valid], atol=1e-5)
    wrong = encoder(images, masks.context)  # padding taken for patches
    assert not torch.allclose(wrong[masks.context_valid], together[masks.context_valid], atol=1e-3)


def test_the_two_encoders_share_no_weight(foreign):
    model, _, _ = foreign
    shared = ({id(p) for p in model.context_encoder.parameters()}
              & {id(p) for p in model.target_encoder.parameters()})
    assert not shared and equal(copies(model.context_encoder), copies(model.target_encoder))
