"""Claims about weights from elsewhere: here they compute what they compute there, none is lost.

No official file is at hand: the tests make up files with its names and shapes, and compute the
method once more here, in functions of a state dict. What transformers computes it is asked itself.
"""

import copy
import functools
import http.server
import json
import os
import sys
import threading

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
import transformers
from PIL import Image

import data
import evaluate
import models
import train
from config import UsageError, from_preset, parse_size
from extras import pretrained, sketcher
from masking import Masks, MultiBlockMasking
from models import IJEPA, Encoder, Predictor
from support import checkpoint
from test_readme import snippets

# --- the official format, made up and computed once more ------------------------------------------


def official_positions(side, width):
    """As in the official code: the column's half, then the row's, sines and cosines. [1, N, D]"""
    omega = 1 / 10000 ** (np.arange(width // 4) / (width / 4))
    patches = [np.concatenate([wave(place * omega) for place in (column, row)
                               for wave in (np.sin, np.cos)])
               for row in range(side) for column in range(side)]
    return torch.tensor(np.array(patches)).float()[None]


def random_blocks(prefix, depth, width, hidden, draw):
    """Random weights of transformer blocks under the official names."""
    linear = {"attn.qkv": (3 * width, width), "attn.proj": (width, width),
              "mlp.fc1": (hidden, width), "mlp.fc2": (width, hidden)}
    state = {}
    for block in (f"{prefix}.{i}" for i in range(depth)):
        for norm in ("norm1", "norm2"):
            state |= {f"{block}.{norm}.weight": draw(width), f"{block}.{norm}.bias": draw(width)}
        for name, (rows, columns) in linear.items():
            state[f"{block}.{name}.weight"] = draw(rows, columns)
            state[f"{block}.{name}.bias"] = draw(rows)
    return state


def random_official(width=192, depth=2, hidden=768, patch=4, side=4, narrow=24, shallow=2):
    """A checkpoint in the official format, every weight random: 192 wide, so it has 3 heads."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return 0.2 * torch.randn(shape, generator=generator)

    def encoder():
        return {"patch_embed.proj.weight": draw(width, 3, patch, patch),
                "patch_embed.proj.bias": draw(width), "pos_embed": official_positions(side, width),
                "norm.weight": draw(width), "norm.bias": draw(width),
                **random_blocks("blocks", depth, width, hidden, draw)}

    predictor = {
        "predictor_embed.weight": draw(narrow, width), "predictor_embed.bias": draw(narrow),
        "mask_token": draw(1, 1, narrow), "predictor_pos_embed": official_positions(side, narrow),
        "predictor_norm.weight": draw(narrow), "predictor_norm.bias": draw(narrow),
        "predictor_proj.weight": draw(width, narrow), "predictor_proj.bias": draw(width),
        **random_blocks("predictor_blocks", shallow, narrow, 4 * narrow, draw)}
    parts = {"encoder": encoder(), "predictor": predictor, "target_encoder": encoder()}
    stored = {name: {f"module.{key}": value for key, value in state.items()}
              for name, state in parts.items()}
    return {**stored, "opt": {"state": {0: {"exp_avg": draw(3)}}, "param_groups": []},
            "scaler": None, "epoch": 300, "loss": 0.1, "batch_size": 128, "world_size": 16,
            "lr": 1e-6}


def norm(x, state, name):
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], 1e-6)


def linear(x, state, name):
    return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])


def run_blocks(x, state, prefix, heads):
    """The blocks of an official state dict, step by step: x [B, N, D] -> [B, N, D]."""
    depth = sum(key.startswith(f"{prefix}.") and key.endswith("norm1.bias") for key in state)
    for block in (f"{prefix}.{i}" for i in range(depth)):
        q, k, v = linear(norm(x, state, f"{block}.norm1"), state, f"{block}.attn.qkv").chunk(3, -1)
        q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (q, k, v))
        attended = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v  # [B, nh, N, D/nh]
        x = x + linear(attended.transpose(1, 2).flatten(2), state, f"{block}.attn.proj")
        hidden = F.gelu(linear(norm(x, state, f"{block}.norm2"), state, f"{block}.mlp.fc1"))
        x = x + linear(hidden, state, f"{block}.mlp.fc2")
    return x


def run_encoder(images, state, heads=3):
    """images [B, C, H, W] -> [B, N, D], by the official names."""
    weight, bias = state["patch_embed.proj.weight"], state["patch_embed.proj.bias"]
    x = F.conv2d(images, weight, bias, weight.shape[-1]).flatten(2).mT + state["pos_embed"]
    return norm(run_blocks(x, state, "blocks", heads), state, "norm")


def run_predictor(tokens, context, target, state, heads=3):
    """One image's tokens [1, Nc, D] at the patches `context` -> predictions [1, Nt, D]."""
    positions = state["predictor_pos_embed"]
    queries = state["mask_token"].expand(-1, len(target), -1) + positions[:, target]
    x = torch.cat([linear(tokens, state, "predictor_embed") + positions[:, context], queries], 1)
    x = norm(run_blocks(x, state, "predictor_blocks", heads), state, "predictor_norm")
    return linear(x[:, len(context):], state, "predictor_proj")


def state_of(stored, name):
    return {key.removeprefix("module."): value for key, value in stored[name].items()}


@pytest.fixture
def official(tmp_path):
    """A made-up official checkpoint: its path and its content."""
    stored = random_official()
    torch.save(stored, tmp_path / "tiny.pth.tar")
    return tmp_path / "tiny.pth.tar", stored


@torch.no_grad()
def test_an_official_checkpoint_computes_what_its_weights_say(official):
    path, stored = official
    model, images = pretrained.from_official(path), torch.randn(2, 3, 16, 16)
    for name, encoder in (("encoder", model.context_encoder),
                          ("target_encoder", model.target_encoder)):
        expected = run_encoder(images, state_of(stored, name))
        torch.testing.assert_close(encoder(images), expected, rtol=0, atol=1e-5)
    assert not torch.equal(model.context_encoder(images), model.target_encoder(images))
    # `load` gives the encoder that the paper evaluates.
    assert torch.equal(pretrained.load(path).encoder(images), model.target_encoder(images))
    context, target = torch.tensor([0, 2, 7, 9]), torch.tensor([3, 4, 14])
    masks = Masks(context[None], torch.ones(1, 4, dtype=torch.bool),
                  target[None, None], torch.ones(1, 1, 3, dtype=torch.bool))
    tokens = model.context_encoder(images[:1], context[None])  # [1, Nc, D]
    predicted = model.predictor(tokens, masks)[:, 0]  # [1, Nt, D]
    expected = run_predictor(tokens, context, target, state_of(stored, "predictor"))
    torch.testing.assert_close(predicted, expected, rtol=0, atol=1e-5)


def test_our_positions_are_the_official_ones_to_the_last_digits_of_float32():
    for side, width in ((16, 1280), (14, 1408), (28, 384), (6, 64)):
        ours = models.sincos_positions((side, side), width)
        assert (ours - official_positions(side, width)[0]).abs().max() < 2e-7
    swapped = official_positions(6, 64)[0].view(6, 6, -1).transpose(0, 1).flatten(0, 1)
    assert (models.sincos_positions((6, 6), 64) - swapped).abs().max() > 1  # rows first: wrong


def test_positions_that_are_not_the_sine_cosine_ones_are_used_and_kept(official):
    path, stored = official
    stored["target_encoder"]["module.pos_embed"] += 0.5
    torch.save(stored, path)
    encoder, images = pretrained.from_official(path).target_encoder, torch.randn(1, 3, 16, 16)
    expected = run_encoder(images, state_of(stored, "target_encoder"))
    torch.testing.assert_close(encoder(images), expected, rtol=0, atol=1e-5)
    assert "positions" in encoder.state_dict()  # so no copy of the weights can lose them


def test_what_is_written_is_the_official_format_and_reads_back_the_same(official, tmp_path):
    path, stored = official
    pretrained.to_official(pretrained.from_official(path), tmp_path / "again.pth.tar")
    again = torch.load(tmp_path / "again.pth.tar", weights_only=True)
    assert {"encoder", "predictor", "target_encoder", "opt", "scaler", "epoch"} <= set(again)
    for name in ("encoder", "predictor", "target_encoder"):
        assert set(again[name]) == set(stored[name])
        for key, value in stored[name].items():
            atol = 2e-7 if "pos_embed" in key else 0
            torch.testing.assert_close(again[name][key], value, rtol=0, atol=atol)


def test_a_model_of_any_width_survives_the_way_to_the_official_format_and_back(tmp_path):
    torch.manual_seed(0)
    encoder = Encoder(32, 2, 4, image_size=24, patch_size=4)
    model, images = IJEPA(encoder, Predictor(32, encoder.grid, 16, 1, 2)), torch.randn(4, 3, 24, 24)
    path, masks = tmp_path / "run.pth.tar", MultiBlockMasking(encoder.grid)(4)
    expected = model.eval()(images, masks).predictions
    pretrained.to_official(model, path)
    again = pretrained.from_official(path)
    assert torch.equal(again(images, masks).predictions, expected)
    stored = torch.load(path, weights_only=True)
    del stored["heads"]  # as the official code would write it
    torch.save(stored, path)
    with pytest.raises(UsageError, match="no encoder of the official code is 32 wide"):
        pretrained.from_official(path)


@pytest.mark.parametrize("name, size, mlp_ratio, patch, image", (
    ("IN1K-vit.h.14-300e", parse_size("huge"), 4, 14, 224),
    ("IN1K-vit.h.16-448px-300e", parse_size("huge"), 4, 16, 448),
    ("IN22K-vit.h.14-900e", parse_size("huge"), 4, 14, 224),
    ("IN22K-vit.g.16-600e", (1408, 40, 16), 48 / 11, 16, 224)))
def test_the_four_published_sizes_are_told_from_their_shapes(
        name, size, mlp_ratio, patch, image, monkeypatch):
    """On torch's meta device, where tensors have shapes and no values."""
    assert name in pretrained.OFFICIAL
    monkeypatch.setattr(pretrained, "load_weights", lambda *_: None)
    monkeypatch.setattr(pretrained, "empty_encoder", Encoder)
    with torch.device("meta"):
        encoder = Encoder(*size, image, patch, mlp_ratio=mlp_ratio)
        state = {pretrained.rename(key, pretrained.OFFICIAL_ENCODER): value
                 for key, value in encoder.state_dict().items()}
        state["patch_embed.proj.weight"] = torch.empty(encoder.width, 3, patch, patch)
        state["pos_embed"] = torch.empty(1, (image // patch) ** 2, encoder.width)
        found = pretrained.official_encoder({"encoder": state}, "encoder", name)
    assert found.image_size == (image, image) and found.patch_size == patch
    assert found.blocks[0].attention.heads == size[2]
    shapes = [[value.shape for value in one.state_dict().values()] for one in (found, encoder)]
    assert shapes[0] == shapes[1]


def test_weights_that_do_not_fit_are_listed_in_one_line(official):
    path, stored = official

    def error_of(broken):
        torch.save(broken, path)
        with pytest.raises(UsageError) as error:
            pretrained.from_official(path)
        assert "\n" not in str(error.value)
        return str(error.value)

    broken = copy.deepcopy(stored)
    for i in range(2):
        for name in ("mlp.fc2", "norm2"):
            del broken["encoder"][f"module.blocks.{i}.{name}.bias"]
    broken["encoder"]["module.cls_token"] = torch.zeros(1)
    assert error_of(broken).endswith(
        "encoder do not fit: missing 4: blocks.0.mlp.fc2.bias, blocks.0.norm2.bias, "
        "blocks.1.mlp.fc2.bias, ...; unexpected 1: cls_token")
    broken = copy.deepcopy(stored)
    broken["predictor"]["module.predictor_proj.bias"] = torch.zeros(7)
    assert "predictor do not fit" in error_of(broken)
    assert "not an official I-JEPA checkpoint" in error_of({"model": {"weight": torch.zeros(1)}})


class Trap:
    """What a malicious checkpoint holds: unpickling it would create a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_checkpoint_that_would_run_code_is_rejected_and_the_code_is_not_run(tmp_path):
    torch.save({"encoder": Trap(tmp_path / "sprung")}, tmp_path / "trap.pth.tar")
    with pytest.raises(UsageError, match="cannot be read"):
        pretrained.from_official(tmp_path / "trap.pth.tar")
    assert not (tmp_path / "sprung").exists()


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder that stands for the official site: its files can be downloaded."""
    folder = tmp_path / "site"
    folder.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(pretrained, "ADDRESS", f"http://127.0.0.1:{server.server_port}")
        yield folder
        server.shutdown()


def test_by_name_it_is_downloaded_once(official, site, tmp_path):
    name, kept = "IN1K-vit.h.14-300e", tmp_path / "data"
    path = official[0].rename(site / f"{name}.pth.tar")
    pretrained.from_official(name, kept)
    assert (kept / f"{name}.pth.tar").read_bytes() == path.read_bytes()
    path.unlink()
    assert pretrained.load(name, kept).encoder.width == 192  # not downloaded again
    with pytest.raises(UsageError, match="put IN22K-vit.g.16-600e.pth.tar into .*data"):
        pretrained.from_official("IN22K-vit.g.16-600e", kept)
    with pytest.raises(UsageError, match="IN1K-vit.h.14 does not exist; .*IN1K-vit.h.14-300e"):
        pretrained.load("IN1K-vit.h.14")


# --- Hugging Face ---------------------------------------------------------------------------------

# Encoders of the named widths with few blocks: width, blocks, heads, MLP width, patch, and an image
# larger than 224.
SHAPES = {"tiny": (192, 3, 3, 768, 16, 320), "base": (768, 2, 12, 3072, 16, 288),
          "huge": (1280, 1, 16, 5120, 14, 252), "giant": (1408, 1, 16, 6144, 16, 256)}


def theirs(width, depth, heads, hidden, patch, image=224, kind="IJepaModel", **changes):
    """A model of transformers with every weight random: its biases, norms and positions too."""
    config = transformers.IJepaConfig(
        hidden_size=width, num_hidden_layers=depth, num_attention_heads=heads,
        intermediate_size=hidden, patch_size=patch, image_size=image,
        **{"layer_norm_eps": 1e-6, **changes})
    with torch.device("meta"):  # their own initialization would take longer than the test
        model = getattr(transformers, kind)(config)
    model = model.to_empty(device="cpu").eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(std=0.5 / p.shape[-1] ** 0.5 if p.ndim > 1 else 0.1)
            p.add_("norm" in name and "weight" in name)
    return model


def assert_close(ours, theirs):
    """Equal to 1e-5, the largest absolute difference."""
    assert ours.shape == theirs.shape and ours.std() > 0.1
    assert (ours - theirs).abs().max() < 1e-5


@pytest.mark.parametrize("name", SHAPES)
@torch.no_grad()
def test_transformers_computes_the_same_also_at_interpolated_sizes_and_gets_its_weights_back(
        name, tmp_path):
    *shape, larger = SHAPES[name]
    model = theirs(*shape)
    encoder = pretrained.from_huggingface(model.state_dict(), model.config.to_dict())
    for size in (224, larger):
        images = torch.randn(1, 3, size, size)
        expected = model(images, interpolate_pos_encoding=True).last_hidden_state
        assert_close(pretrained.resize(encoder, size)(images), expected)
    pretrained.to_huggingface(encoder, tmp_path, *data.STATISTICS["folder"])
    again, info = transformers.IJepaModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    state, expected = again.state_dict(), model.state_dict()
    assert set(state) == set(expected)
    assert all(torch.equal(state[key], value) for key, value in expected.items())
    assert again.config.layer_norm_eps == 1e-6 and again.config.num_channels == 3
    assert again.config.image_size == 224


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    return Encoder(64, 2, 4, image_size=32, patch_size=8).eval()


@torch.no_grad()
def test_a_pipeline_sees_an_image_as_our_encoder_does(encoder, tmp_path):
    pretrained.to_huggingface(encoder, tmp_path, *data.STATISTICS["cifar10"])
    pixels = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)
    image = Image.fromarray(pixels[0].permute(1, 2, 0).numpy())
    extract = transformers.pipeline("image-feature-extraction", str(tmp_path))
    expected = encoder(data.normalize(pixels, *data.STATISTICS["cifar10"]))
    assert_close(expected, torch.tensor(extract(image)))
    larger = image.resize((48, 40), Image.Resampling.BILINEAR)  # is resized to 32 pixels
    assert torch.tensor(extract(larger)).shape == expected.shape


@torch.no_grad()
def test_wide_images_are_interpolated_alike_and_volumes_keep_their_smooth_positions(
        encoder, tmp_path):
    pretrained.to_huggingface(encoder, tmp_path, (0.5,) * 3, (0.5,) * 3)
    model = transformers.AutoModel.from_pretrained(tmp_path)
    images = torch.randn(2, 3, 24, 64)
    expected = model(images, interpolate_pos_encoding=True).last_hidden_state
    wide = pretrained.resize(encoder, (24, 64))
    assert_close(wide(images), expected)
    assert "positions" in wide.state_dict() and "positions" not in encoder.state_dict()
    with pytest.raises(UsageError, match="do not divide"):
        pretrained.resize(encoder, 44)
    volumes = Encoder(24, 1, 2, image_size=(16, 16, 16), patch_size=4, channels=1)
    finer = pretrained.resize(volumes, 32).positions.view(8, 8, 8, 24)
    between = volumes.positions.view(4, 4, 4, 24)[1:3, 1:3, 1:3].mean((0, 1, 2))
    torch.testing.assert_close(finer[3:5, 3:5, 3:5].mean((0, 1, 2)), between)


@torch.no_grad()
def test_a_saved_classifier_is_read_without_its_head(tmp_path, capsys):
    model = theirs(32, 2, 4, 48, 8, 32, "IJepaForImageClassification", layer_norm_eps=1e-12,
                   num_labels=5)
    model.save_pretrained(tmp_path)
    encoder, images = pretrained.from_huggingface(tmp_path), torch.randn(2, 3, 32, 32)
    assert_close(encoder(images), model.ijepa(images).last_hidden_state)
    assert "left out what is not part of the encoder (class" in capsys.readouterr().out
    assert encoder.norm.eps == encoder.blocks[1].norm2.eps == 1e-12
    in_memory = pretrained.from_huggingface(model.state_dict(), model.config.to_dict())
    assert_close(in_memory(images), encoder(images))


def test_half_precision_and_several_files_are_read(encoder, tmp_path):
    pretrained.to_huggingface(encoder, tmp_path, (0.5,) * 3, (0.5,) * 3)
    path = tmp_path / "model.safetensors"
    state = {key: value.half() for key, value in safetensors.torch.load_file(path).items()}
    path.unlink()
    for number, keys in enumerate((list(state)[:9], list(state)[9:]), 1):
        safetensors.torch.save_file({key: state[key] for key in keys},
                                    tmp_path / f"model-0000{number}-of-00002.safetensors")
    read = pretrained.from_huggingface(tmp_path)
    assert read.norm.weight.dtype == torch.float32
    weight = encoder.blocks[1].mlp[0].weight
    assert torch.equal(read.blocks[1].mlp[0].weight, weight.half().float())


def test_a_folder_that_our_encoder_cannot_compute_is_rejected_in_one_line(
        encoder, tmp_path, monkeypatch):
    def reject(match):
        with pytest.raises(UsageError, match=match) as error:
            pretrained.from_huggingface(tmp_path)
        assert "\n" not in str(error.value)

    reject("is not a Hugging Face folder: config.json cannot be read")
    pretrained.to_huggingface(encoder, tmp_path, (0.5,) * 3, (0.5,) * 3)
    config = json.loads((tmp_path / "config.json").read_text())
    for key, value, match in (
            ("model_type", "vit", "model_type is vit, expected ijepa"),
            ("hidden_act", "relu", "hidden_act is relu"),
            ("image_size", [32, 64], "expected one number"),
            ("num_hidden_layers", 3, "missing 12: encoder.layer.2"),
            ("num_hidden_layers", 1, "unexpected 12: encoder.layer.1"),
            ("image_size", 40, "do not fit")):
        (tmp_path / "config.json").write_text(json.dumps({**config, key: value}))
        reject(match)
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes(b"rubbish")
    reject("model.safetensors cannot be read")
    for other in (Encoder(24, 1, 2, (16, 16, 16), 8), Encoder(24, 1, 2, (16, 32), 8)):
        with pytest.raises(UsageError, match="only encoders of square images"):
            pretrained.to_huggingface(other, tmp_path, (0.5,), (0.5,))
    monkeypatch.setitem(sys.modules, "safetensors", None)  # as if it were not installed
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    reject("python -m pip install safetensors")


# --- run folders ----------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path):
    """An untrained run folder of the synthetic shapes: its path and its model."""
    config = from_preset("shapes", encoder="32x2x2", predictor="16x1x2", device="cpu", seed=1,
                         out=str(tmp_path / "runs" / "shapes"))
    model, _ = train.build(config)
    about = {"name": "shapes", "images": 64, "channels": 3, "axes": 2, "classes": 10,
             "fingerprint": ""}
    with checkpoint.open_folder(config, resume=False) as folder:
        optimizer = train.build_optimizer(config, model)
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        checkpoint.Run(folder, config, model, optimizer, scaler, torch.device("cpu"), about).save()
    return folder, model.eval()


PIXELS = torch.randint(0, 256, (4, 3, 24, 24), dtype=torch.uint8,
                       generator=torch.Generator().manual_seed(0))


def images(dataset):
    """The same images, normalized as those of a data set."""
    return data.normalize(PIXELS, *data.STATISTICS[dataset])


@torch.no_grad()
def test_all_kinds_become_run_folders_that_compute_the_same(run, tmp_path):
    folder, model = run
    expected = model.target_encoder(images("shapes"))
    pretrained.to_huggingface(model.target_encoder, tmp_path / "hf", *data.STATISTICS["shapes"])
    for source in (folder, folder / "encoder.pt", tmp_path / "hf"):
        out = tmp_path / f"from-{source.name}"
        pretrained.main([str(source), "--out", str(out), "--dataset", "shapes"])
        encoders, config, about = evaluate.load_encoders(out)
        assert encoders.keys() == {"target"} and not encoders["target"].training
        assert config.dataset == "shapes" and config.image_size == 24 and about["channels"] == 3
        torch.testing.assert_close(encoders["target"](images("shapes")), expected)
    pretrained.to_official(model, tmp_path / "tiny.pth.tar")
    pretrained.main([str(tmp_path / "tiny.pth.tar"), "--out", str(tmp_path / "whole")])
    encoders, config, _ = evaluate.load_encoders(tmp_path / "whole")
    whole, masking, *_ = train.load_run(tmp_path / "whole")  # the predictor too
    masks = masking(4, torch.Generator().manual_seed(0))
    inputs = images("folder")  # the official code's normalization
    for name in ("target", "context"):
        torch.testing.assert_close(encoders[name](inputs),
                                   getattr(model, f"{name}_encoder")(inputs))
    torch.testing.assert_close(whole(inputs, masks).predictions, model(inputs, masks).predictions)


@torch.no_grad()
@pytest.mark.parametrize("named", [True, False])
def test_an_encoder_computes_the_same_from_the_images_of_a_data_set_that_is_normalized_otherwise(
        named, official, tmp_path):
    """The official code normalized by ImageNet's statistics; evaluate.py by the data set's."""
    dataset, (mean, std) = "cifar10", data.STATISTICS["cifar10"]
    pixels = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)
    if not named:  # data.load measures an .npz
        dataset = str(tmp_path / "mine.npz")
        np.savez(dataset, train_images=pixels.permute(0, 2, 3, 1).numpy() // 2)
        loaded = data.load(dataset)
        mean, std = loaded.mean, loaded.std
    pretrained.write_run(official[0], tmp_path / "run", dataset)
    encoders, config, _ = evaluate.load_encoders(tmp_path / "run")
    assert config.dataset == dataset
    model = pretrained.from_official(official[0])
    for name in ("target", "context"):
        expected = getattr(model, f"{name}_encoder")(
            data.normalize(pixels, *data.STATISTICS["folder"]))
        found = encoders[name](data.normalize(pixels, mean, std))
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
        other = encoders[name](data.normalize(pixels, (0.5,) * 3, std))
        assert (other - expected).abs().max() > 0.01


def test_what_a_run_folder_cannot_hold_is_said_in_one_line(official, tmp_path):
    path, stored = official
    torch.save(random_official(hidden=832), tmp_path / "wide.pth.tar")
    for name, changes in (("learned", {}), ("eps", {"layer_norm_eps": 1e-12})):
        theirs(32, 1, 4, 128, 8, 32, **changes).save_pretrained(tmp_path / name)
    fixed = models.sincos_positions((4, 4), 32)[None]
    state = safetensors.torch.load_file(tmp_path / "eps/model.safetensors")
    key = next(key for key in state if "position" in key)
    safetensors.torch.save_file({**state, key: fixed}, tmp_path / "eps/model.safetensors",
                                metadata={"format": "pt"})
    for source, why in (("wide.pth.tar", "its MLPs are 832 wide, not 4 x 192"),
                        ("learned", "its positions are learned or interpolated"),
                        ("eps", "its layer norms add 1e-12")):
        with pytest.raises(UsageError, match=f"cannot hold this encoder: {why}") as error:
            pretrained.main([str(tmp_path / source), "--out", str(tmp_path / "run")])
        assert "\n" not in str(error.value) and not (tmp_path / "run").exists()
        assert pretrained.load(tmp_path / source).encoder.width in (32, 192)  # in Python it works
    with pytest.raises(UsageError, match="images of 1 channels, the encoder takes 3"):
        pretrained.main([str(path), "--out", str(tmp_path / "run"), "--dataset", "shapes3d"])
    with pytest.raises(UsageError, match="expected one of cifar10-ijepa, .*, a .pth.tar"):
        pretrained.main(["nowhere.pth.tar", "--out", str(tmp_path / "run")])


@torch.no_grad()
def test_a_packed_run_is_half_as_large_and_gives_the_same_features_to_three_digits(run, tmp_path):
    folder, model = run
    pretrained.pack(folder, tmp_path / "small.pt")
    stored = torch.load(tmp_path / "small.pt")
    weights = [value for name in ("encoder", "context_encoder", "predictor")
               for value in stored[name].values()]
    assert {value.dtype for value in weights} == {torch.float16}
    found = pretrained.load(tmp_path / "small.pt")
    assert found.encoder.norm.weight.dtype == torch.float32
    assert (found.mean, found.std) == data.STATISTICS["shapes"]
    expected = model.target_encoder(images("shapes"))  # features of size 1
    torch.testing.assert_close(found.encoder(images("shapes")), expected, rtol=0, atol=0.01)


@torch.no_grad()
def test_a_packed_run_becomes_a_run_that_predicts_the_same(run, tmp_path):
    folder, model = run
    for p in model.context_encoder.parameters():  # no longer the target encoder's weights
        p.mul_(1.1)
    state = {**checkpoint.load(folder)[2], "model": model.state_dict()}
    torch.save(state, folder / "checkpoint.pt")
    pretrained.pack(folder, tmp_path / "small.pt")
    pretrained.main([str(tmp_path / "small.pt"), "--out", str(tmp_path / "again")])
    again, masking, *_ = train.load_run(tmp_path / "again")
    masks = masking(4, torch.Generator().manual_seed(0))
    found, expected = (part(images("shapes"), masks).predictions for part in (again, model))
    torch.testing.assert_close(found, expected, rtol=0, atol=0.01)  # predictions of size 1, float16


@torch.no_grad()
@pytest.mark.parametrize("name", pretrained.SHIPPED)
def test_a_shipped_encoder_is_small_becomes_a_run_and_has_its_accuracy_beside_it(name, tmp_path):
    path = pretrained.SHIPPED[name]
    measured = json.loads(path.with_suffix(".json").read_text())["features"]
    assert path.stat().st_size < 12e6
    assert measured["target"]["linear"] > measured["random"]["linear"] + 0.1
    pretrained.main([name, "--out", str(tmp_path / "run")])
    encoders, config, _ = evaluate.load_encoders(tmp_path / "run")
    pixels = torch.randn(2, 3, config.image_size, config.image_size)
    assert torch.equal(encoders["target"](pixels), pretrained.load(name).encoder(pixels))
    assert path.with_name(f"{name}-sketcher.pt").stat().st_size < 4e6
    drawer = sketcher.load(tmp_path / "run/sketcher.pt", encoders["target"], 3)
    assert {"predicted", "true", "place only"} < drawer.conditions.keys()


def test_evaluate_probes_both_encoders_of_an_official_checkpoint(official, tmp_path, capsys):
    pixels = torch.randint(0, 256, (40, 16, 16, 3), dtype=torch.uint8).numpy()
    arrays = {f"{split}_{what}": value for split in ("train", "test")
              for what, value in (("images", pixels), ("labels", np.arange(40) % 2))}
    np.savez(tmp_path / "mine.npz", **arrays)
    pretrained.write_run(official[0], tmp_path / "run", str(tmp_path / "mine.npz"))
    evaluate.main([str(tmp_path / "run")])
    written = json.loads((tmp_path / "run/evaluation.json").read_text())
    assert written["features"].keys() == {"target", "context", "random", "pixels"}


# --- the pages' snippets --------------------------------------------------------------------------


@torch.no_grad()
def test_the_documented_snippets_run(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    torch.save(random_official(patch=14, side=16), tmp_path / "data/IN1K-vit.h.14-300e.pth.tar")
    official, hugging_face = {}, {}
    exec(*snippets("Official weights"), official)
    assert official["features"].shape == (1, 192) and (tmp_path / "mine.pth.tar").exists()
    exec(*snippets("Hugging Face"), hugging_face)
    expected = run[1].target_encoder(images("shapes"))
    assert_close(expected, hugging_face["encoder"](images("shapes")))
    model = transformers.AutoModel.from_pretrained("shapes-hf")
    assert_close(expected, model(images("shapes")).last_hidden_state)
