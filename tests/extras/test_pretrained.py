"""Claims about weights from elsewhere: read into our modules they compute what they compute there, and none is lost or left over.

No official file is at hand: the tests make up files with its names and shapes, and compare with the method written down once more here,
in functions of a state dict. What Hugging Face's library computes is asked of the library itself.
"""

import copy
import functools
import hashlib
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

import config as settings
import data
import evaluate
from extras import methods
import models
from extras import pretrained
import train
from config import UsageError
from masking import Masks
from models import IJEPA, Encoder
from test_readme import snippets
from test_train import few_shapes, tiny  # noqa: F401 (the fixture works by being here)


# --- the official format, made up and computed once more ------------------------------------------------------------------


def official_positions(side, width):
    """One patch at a time, as the official code has it: the column's half, then the row's, each sines and then cosines. [1, N, D]"""
    omega = 1 / 10000 ** (np.arange(width // 4) / (width / 4))
    rows = [np.concatenate([wave(place * omega) for place in (column, row) for wave in (np.sin, np.cos)])
            for row in range(side) for column in range(side)]
    return torch.tensor(np.array(rows)).float()[None]


def made_up_blocks(prefix, depth, width, hidden, generator):
    """Random weights of transformer blocks under the official names."""
    shapes = {"norm1.weight": (width,), "norm1.bias": (width,), "attn.qkv.weight": (3 * width, width), "attn.qkv.bias": (3 * width,),
              "attn.proj.weight": (width, width), "attn.proj.bias": (width,), "norm2.weight": (width,), "norm2.bias": (width,),
              "mlp.fc1.weight": (hidden, width), "mlp.fc1.bias": (hidden,), "mlp.fc2.weight": (width, hidden), "mlp.fc2.bias": (width,)}
    return {f"{prefix}.{i}.{name}": 0.2 * torch.randn(shape, generator=generator) for i in range(depth) for name, shape in shapes.items()}


def made_up_official(width=192, depth=2, hidden=48, patch=4, side=4, predictor_width=24, predictor_depth=2, seed=0):
    """A checkpoint in the official format, every weight random: 192 wide, so that it has 3 heads."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return 0.2 * torch.randn(shape, generator=generator)

    def encoder():
        return {"patch_embed.proj.weight": draw(width, 3, patch, patch), "patch_embed.proj.bias": draw(width),
                "pos_embed": official_positions(side, width), "norm.weight": draw(width), "norm.bias": draw(width),
                **made_up_blocks("blocks", depth, width, hidden, generator)}

    predictor = {
        "predictor_embed.weight": draw(predictor_width, width), "predictor_embed.bias": draw(predictor_width),
        "mask_token": draw(1, 1, predictor_width), "predictor_pos_embed": official_positions(side, predictor_width),
        "predictor_norm.weight": draw(predictor_width), "predictor_norm.bias": draw(predictor_width),
        "predictor_proj.weight": draw(width, predictor_width), "predictor_proj.bias": draw(width),
        **made_up_blocks("predictor_blocks", predictor_depth, predictor_width, 4 * predictor_width, generator)}
    stored = {name: {f"module.{key}": value for key, value in part.items()}
              for name, part in (("encoder", encoder()), ("predictor", predictor), ("target_encoder", encoder()))}
    return {**stored, "opt": {"state": {0: {"exp_avg": draw(3)}}, "param_groups": []}, "scaler": None, "epoch": 300, "loss": 0.1,
            "batch_size": 128, "world_size": 16, "lr": 1e-6}


def norm(x, state, name):
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], 1e-6)


def linear(x, state, name):
    return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])


def run_blocks(x, state, prefix, heads):
    """The blocks of an official state dict, step by step: x [B, N, D] -> [B, N, D]."""
    depth = sum(key.startswith(f"{prefix}.") and key.endswith("norm1.bias") for key in state)
    for block in (f"{prefix}.{i}" for i in range(depth)):
        q, k, v = linear(norm(x, state, f"{block}.norm1"), state, f"{block}.attn.qkv").chunk(3, -1)
        q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (q, k, v))  # [B, nh, N, D/nh]
        attended = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v
        x = x + linear(attended.transpose(1, 2).flatten(2), state, f"{block}.attn.proj")
        x = x + linear(F.gelu(linear(norm(x, state, f"{block}.norm2"), state, f"{block}.mlp.fc1")), state, f"{block}.mlp.fc2")
    return x


def run_encoder(images, state, heads):
    """images [B, C, H, W] -> [B, N, D], by the official names."""
    x = F.conv2d(images, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], state["patch_embed.proj.weight"].shape[-1])
    return norm(run_blocks(x.flatten(2).mT + state["pos_embed"], state, "blocks", heads), state, "norm")


def run_predictor(tokens, context, target, state, heads):
    """One image's tokens [1, Nc, D] at the places `context` -> predictions at the places `target` [1, Nt, D], by the official names."""
    places, asked = state["predictor_pos_embed"], state["mask_token"].expand(-1, len(target), -1)
    x = torch.cat([linear(tokens, state, "predictor_embed") + places[:, context], asked + places[:, target]], 1)
    x = norm(run_blocks(x, state, "predictor_blocks", heads), state, "predictor_norm")
    return linear(x[:, len(context):], state, "predictor_proj")


def state_of(stored, name):
    return {key.removeprefix("module."): value for key, value in stored[name].items()}


@pytest.fixture
def official(tmp_path):
    """A made-up official checkpoint: its path and its content."""
    stored = made_up_official()
    torch.save(stored, tmp_path / "tiny.pth.tar")
    return tmp_path / "tiny.pth.tar", stored


@torch.no_grad()
def test_an_official_checkpoint_computes_what_its_weights_say_encoders_and_predictor(official):
    path, stored = official
    model, images = pretrained.from_official(path), torch.randn(2, 3, 16, 16)
    for name, encoder in (("encoder", model.context_encoder), ("target_encoder", model.target_encoder)):
        torch.testing.assert_close(encoder(images), run_encoder(images, state_of(stored, name), heads=3), rtol=0, atol=1e-5)
    assert not torch.equal(model.context_encoder(images), model.target_encoder(images))  # two encoders, not one twice
    assert torch.equal(pretrained.load(path).encoder(images), model.target_encoder(images))  # the one that the paper evaluates
    context, target = torch.tensor([0, 2, 7, 9]), torch.tensor([3, 4, 14])
    tokens = model.context_encoder(images[:1], context[None])  # [1, Nc, D]
    predicted = model.predictor(tokens, Masks(context[None], None, target[None, None], None))[:, 0]  # [1, Nt, D]
    expected = run_predictor(tokens, context, target, state_of(stored, "predictor"), heads=3)
    torch.testing.assert_close(predicted, expected, rtol=0, atol=1e-5)


def test_our_positions_are_the_official_ones_to_the_last_digits_of_float32():
    for side, width in ((16, 1280), (14, 1408), (28, 384), (6, 64)):
        ours = models.sincos_positions((side, side), width)
        assert (ours - official_positions(side, width)[0]).abs().max() < 2e-7
    swapped = official_positions(6, 64)[0].view(6, 6, -1).transpose(0, 1).flatten(0, 1)
    assert (models.sincos_positions((6, 6), 64) - swapped).abs().max() > 1  # rows first would be seen


def test_positions_that_are_not_the_sine_cosine_ones_are_used_and_kept(official):
    path, stored = official
    stored["target_encoder"]["module.pos_embed"] += 0.5
    torch.save(stored, path)
    encoder, images = pretrained.from_official(path).target_encoder, torch.randn(1, 3, 16, 16)
    torch.testing.assert_close(encoder(images), run_encoder(images, state_of(stored, "target_encoder"), 3), rtol=0, atol=1e-5)
    assert "positions" in encoder.state_dict()  # so that no copy of the weights can lose them
    assert evaluate.fingerprint(encoder) != evaluate.fingerprint(pretrained.from_official(path).context_encoder)


def test_what_is_written_is_the_official_format_and_reads_back_the_same(official, tmp_path):
    path, stored = official
    pretrained.to_official(pretrained.from_official(path), tmp_path / "again.pth.tar")
    again = torch.load(tmp_path / "again.pth.tar", weights_only=True)
    assert {"encoder", "predictor", "target_encoder", "opt", "scaler", "epoch"} <= set(again)
    for name in ("encoder", "predictor", "target_encoder"):
        assert set(again[name]) == set(stored[name])
        for key, value in stored[name].items():
            torch.testing.assert_close(again[name][key], value, rtol=0, atol=2e-7 if "pos_embed" in key else 0)


def test_a_run_of_any_width_survives_the_way_to_the_official_format_and_back(tmp_path):
    torch.manual_seed(0)
    model, images = IJEPA("32x2x4", "16x1x2", image_size=24, patch_size=4).eval(), torch.randn(4, 3, 24, 24)
    pretrained.to_official(model, tmp_path / "run.pth.tar")
    again, masks = pretrained.from_official(tmp_path / "run.pth.tar"), model.masking(4, torch.Generator().manual_seed(0))
    assert torch.equal(again(images, masks).predictions, model(images, masks).predictions)
    stored = torch.load(tmp_path / "run.pth.tar", weights_only=True)
    del stored["heads"]  # as the official code would write it
    torch.save(stored, tmp_path / "run.pth.tar")
    with pytest.raises(UsageError, match="no encoder of the official code is 32 wide"):
        pretrained.from_official(tmp_path / "run.pth.tar")
    again = pretrained.from_official(tmp_path / "run.pth.tar", heads=(4, 2))
    assert torch.equal(again(images, masks).predictions, model(images, masks).predictions)


@pytest.mark.parametrize("name, size, patch, image", (
    ("IN1K-vit.h.14-300e", "huge", 14, 224), ("IN1K-vit.h.16-448px-300e", "huge", 16, 448), ("IN22K-vit.h.14-900e", "huge", 14, 224),
    ("IN22K-vit.g.16-600e", "giant", 16, 224)))
def test_the_four_published_sizes_are_told_from_their_shapes(name, size, patch, image, monkeypatch):
    """On torch's meta device, where tensors have shapes and no values."""
    assert name in pretrained.OFFICIAL
    with torch.device("meta"):
        encoder = Encoder(size, image, patch)
        monkeypatch.setattr(pretrained, "load_weights", lambda *_: None)
        monkeypatch.setattr(pretrained, "empty_encoder", lambda shape: Encoder(**shape))
        state = {rename: torch.empty(value.shape) for rename, value in (
            (pretrained.rename(key, pretrained.OFFICIAL_ENCODER), value) for key, value in encoder.state_dict().items())}
        state["patch_embed.proj.weight"] = torch.empty(encoder.width, 3, patch, patch)
        state["pos_embed"] = torch.empty(1, (image // patch) ** 2, encoder.width)
        told, shape = pretrained.official_encoder({"encoder": state}, "encoder", None, name)
    assert models.parse_size(shape["size"]) == models.parse_size(size) and shape["patch_size"] == patch
    assert shape["image_size"] == image and shape["channels"] == 3
    assert [value.shape for value in told.state_dict().values()] == [value.shape for value in encoder.state_dict().values()]


def test_weights_that_do_not_fit_are_listed_in_one_line(official):
    path, stored = official
    broken = copy.deepcopy(stored)
    for i in range(2):
        del broken["encoder"][f"module.blocks.{i}.mlp.fc2.bias"], broken["encoder"][f"module.blocks.{i}.norm2.bias"]
    broken["encoder"]["module.cls_token"] = torch.zeros(1)
    torch.save(broken, path)
    with pytest.raises(UsageError, match=r"encoder do not fit: missing 4: blocks.0.mlp.fc2.bias, blocks.0.norm2.bias, "
                                         r"blocks.1.mlp.fc2.bias, \.\.\.; unexpected 1: cls_token$") as error:
        pretrained.from_official(path)
    assert "\n" not in str(error.value)
    broken = copy.deepcopy(stored)
    broken["predictor"]["module.predictor_proj.bias"] = torch.zeros(7)
    torch.save(broken, path)
    with pytest.raises(UsageError, match="predictor do not fit .*project.bias"):
        pretrained.from_official(path)
    torch.save({"model": {"weight": torch.zeros(1)}}, path)
    with pytest.raises(UsageError, match="no official I-JEPA checkpoint: encoder has no patch_embed.proj.weight"):
        pretrained.from_official(path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UsageError, match="cannot be read"):
        pretrained.from_official(path)


class Trap:
    """What a malicious checkpoint holds: unpickling it would create a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_checkpoint_that_would_run_code_is_refused_and_the_code_is_not_run(tmp_path):
    torch.save({"encoder": Trap(tmp_path / "sprung")}, tmp_path / "trap.pth.tar")
    with pytest.raises(UsageError, match="cannot be read"):
        pretrained.from_official(tmp_path / "trap.pth.tar")
    assert not (tmp_path / "sprung").exists()


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder that stands for the official site: what lies in it can be downloaded."""
    folder = tmp_path / "site"
    folder.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(pretrained, "ADDRESS", f"http://127.0.0.1:{server.server_port}")
        yield folder
        server.shutdown()


def test_by_name_it_is_downloaded_once_and_its_checksum_kept_and_compared(official, site, tmp_path):
    name, kept = "IN1K-vit.h.14-300e", tmp_path / "data"
    path = official[0].rename(site / f"{name}.pth.tar")
    pretrained.from_official(name, kept)
    local = kept / f"{name}.pth.tar"
    assert local.read_bytes() == path.read_bytes()
    assert (kept / f"{name}.pth.tar.sha256").read_text() == f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {name}.pth.tar\n"
    path.unlink()
    assert pretrained.load(name, kept).kind == "target encoder of an official checkpoint"  # not downloaded again
    other = made_up_official(seed=1)
    torch.save(other, local)  # readable, but not what was downloaded
    for source in (name, local):
        with pytest.raises(UsageError, match="is not what it was .*delete both to download it again"):
            pretrained.from_official(source, kept)
    with pytest.raises(UsageError, match="cannot fetch http.*not found.*; put IN22K-vit.g.16-600e.pth.tar into .*data"):
        pretrained.from_official("IN22K-vit.g.16-600e", kept)
    with pytest.raises(UsageError, match="'IN1K-vit.h.14' is none of .*IN1K-vit.h.14-300e, .*nor a .pth.tar"):
        pretrained.load("IN1K-vit.h.14")


# --- Hugging Face ----------------------------------------------------------------------------------------------------------

# Encoders of the named widths with few blocks: width, blocks, heads, MLP width, patch, a larger image than 224.
SHAPES = {"tiny": (192, 3, 3, 768, 16, 320), "base": (768, 2, 12, 3072, 16, 288), "huge": (1280, 1, 16, 5120, 14, 252),
          "giant": (1408, 1, 16, 6144, 16, 256)}


def theirs(width, depth, heads, hidden, patch, image=224, kind="IJepaModel", **changes):
    """A model of their library with every weight random, its biases, norms and positions too."""
    config = transformers.IJepaConfig(hidden_size=width, num_hidden_layers=depth, num_attention_heads=heads, intermediate_size=hidden,
                                      patch_size=patch, image_size=image, **{"layer_norm_eps": 1e-6, **changes})
    with torch.device("meta"):  # their own initialisation would take longer than the test
        model = getattr(transformers, kind)(config)
    model = model.to_empty(device="cpu").eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(std=0.5 / p.shape[-1] ** 0.5 if p.ndim > 1 else 0.1).add_("norm" in name and "weight" in name)
    return model


def close(ours, theirs):
    """Equal to 1e-5, the greatest absolute difference."""
    assert ours.shape == theirs.shape and ours.std() > 0.1
    assert (ours - theirs).abs().max() < 1e-5


@pytest.mark.parametrize("name", SHAPES)
@torch.no_grad()
def test_both_libraries_compute_the_same_at_224_and_at_interpolated_sizes_and_no_weight_changes_on_the_way_back(name, tmp_path):
    *shape, larger = SHAPES[name]
    model = theirs(*shape)
    encoder = pretrained.from_huggingface(model.state_dict(), model.config.to_dict())
    assert models.parse_size(f"{shape[0]}x1x{shape[2]}x{shape[3]}")[3] == models.SIZES[name][3] == pytest.approx(shape[3] / shape[0])
    for size in (224, larger):
        images = torch.randn(1, 3, size, size)
        close(encoder(images), model(images, interpolate_pos_encoding=True).last_hidden_state)
    pretrained.to_huggingface(encoder, tmp_path, *data.STATISTICS["folder"])
    again, info = transformers.IJepaModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    state = again.state_dict()
    assert set(state) == set(model.state_dict()) and all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    assert {key: getattr(again.config, key) for key in ("layer_norm_eps", "image_size", "num_channels")} == {
        "layer_norm_eps": 1e-6, "image_size": 224, "num_channels": 3}


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    return Encoder("64x2x4", image_size=32, patch_size=8).eval()


@torch.no_grad()
def test_the_pipeline_sees_an_image_as_our_encoder_does_normalisation_and_positions_included(encoder, tmp_path):
    pretrained.to_huggingface(encoder, tmp_path, *data.STATISTICS["cifar10"])
    pixels = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)
    image = Image.fromarray(pixels[0].permute(1, 2, 0).numpy())
    extract = transformers.pipeline("image-feature-extraction", str(tmp_path))
    expected = encoder(data.normalise(pixels, *data.STATISTICS["cifar10"]))
    close(expected, torch.tensor(extract(image)))
    larger = image.resize((48, 40), Image.Resampling.BILINEAR)  # the folder also says that images are resized to 32 pixels
    assert torch.tensor(extract(larger)).shape == expected.shape


@torch.no_grad()
def test_wide_images_are_interpolated_alike_and_a_size_that_patches_do_not_divide_is_refused(encoder, tmp_path):
    pretrained.to_huggingface(encoder, tmp_path, (0.5,) * 3, (0.5,) * 3)
    model = transformers.AutoModel.from_pretrained(tmp_path)
    images = torch.randn(2, 3, 24, 64)
    close(encoder(images), model(images, interpolate_pos_encoding=True).last_hidden_state)
    images = torch.randn(1, 3, 44, 44)  # 5 patches and a half: their convolution drops the half
    close(encoder(images[:, :, :40, :40]), model(images, interpolate_pos_encoding=True).last_hidden_state)
    with pytest.raises(UsageError, match="do not divide"):
        encoder(images)


@torch.no_grad()
def test_a_saved_classifier_is_read_without_its_head_which_a_line_says(tmp_path, capsys):
    model = theirs(32, 2, 4, 48, 8, 32, "IJepaForImageClassification", layer_norm_eps=1e-12, num_labels=5)
    model.save_pretrained(tmp_path)
    encoder, images = pretrained.from_huggingface(tmp_path), torch.randn(2, 3, 32, 32)
    close(encoder(images), model.ijepa(images).last_hidden_state)
    assert "left out what is no part of the encoder (classifier.bias, classifier.weight)" in capsys.readouterr().out
    assert encoder.norm.eps == encoder.blocks[1].norm2.eps == 1e-12
    close(pretrained.from_huggingface(model.state_dict(), model.config.to_dict())(images), encoder(images))


def test_half_precision_and_several_files_are_read(encoder, tmp_path):
    pretrained.to_huggingface(encoder, tmp_path, (0.5,) * 3, (0.5,) * 3)
    state = {key: value.half() for key, value in safetensors.torch.load_file(tmp_path / "model.safetensors").items()}
    (tmp_path / "model.safetensors").unlink()
    for number, keys in enumerate((list(state)[:9], list(state)[9:])):
        safetensors.torch.save_file({key: state[key] for key in keys}, tmp_path / f"model-0000{number + 1}-of-00002.safetensors")
    read = pretrained.from_huggingface(tmp_path)
    assert read.norm.weight.dtype == torch.float32
    assert torch.equal(read.blocks[1].mlp[0].weight, encoder.blocks[1].mlp[0].weight.half().float())


def test_a_folder_that_is_none_of_ours_is_refused_in_one_line(encoder, tmp_path, monkeypatch):
    def refused(match):
        with pytest.raises(UsageError, match=match) as error:
            pretrained.from_huggingface(tmp_path)
        assert "\n" not in str(error.value)

    refused("is no Hugging Face folder: config.json cannot be read")
    pretrained.to_huggingface(encoder, tmp_path, (0.5,) * 3, (0.5,) * 3)
    config = json.loads((tmp_path / "config.json").read_text())
    for key, value, match in (("model_type", "vit", "model_type is vit, expected ijepa"), ("hidden_act", "relu", "hidden_act is relu"),
                              ("image_size", [32, 64], "expected a square"), ("num_hidden_layers", 3, "missing 12: encoder.layer.2"),
                              ("num_hidden_layers", 1, "unexpected 12: encoder.layer.1"), ("image_size", 40, "do not fit")):
        (tmp_path / "config.json").write_text(json.dumps({**config, key: value}))
        refused(match)
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes(b"rubbish")
    refused("model.safetensors cannot be read")
    for volume in (Encoder("24x1x2", 16, 8, axes=3), Encoder("24x1x2", (16, 32), 8)):
        with pytest.raises(UsageError, match="only encoders of square images"):
            pretrained.to_huggingface(volume, tmp_path, (0.5,), (0.5,))
    monkeypatch.setitem(sys.modules, "safetensors", None)  # as where it is not installed
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    refused("python -m pip install safetensors")
    with pytest.raises(UsageError, match="python -m pip install safetensors"):
        pretrained.to_huggingface(encoder, tmp_path / "new", (0.5,) * 3, (0.5,) * 3)


# --- evaluate.py --pretrained ----------------------------------------------------------------------------------------------


@pytest.fixture
def small_probes(monkeypatch, few_shapes):  # noqa: F811
    """64 shapes, one strength of the probe, two labels a class: these tests are about which encoder sees which images, not about probes."""
    monkeypatch.setattr("extras.probes.linear_probe.__defaults__", (0, (1.0,), True))
    monkeypatch.setattr(evaluate, "PIXEL_SIDE", {4: 8})
    monkeypatch.setattr(evaluate.probes, "LOW_SHOT", (2,))


@pytest.fixture
def run(tmp_path, small_probes):
    """An untrained run folder for the embedded shapes: its path and its model."""
    config = settings.from_preset("shapes", encoder="32x2x2", predictor="16x1x2", device="cpu")
    torch.manual_seed(1)  # the random encoder beside it is drawn from seed 0
    model, folder = methods.build(config).eval(), tmp_path / "runs" / "shapes"
    folder.mkdir(parents=True)
    about = {"name": "shapes", "channels": 3, "axes": 2, "classes": 10}
    torch.save({"config": vars(config), "data": about, "encoder": model.target_encoder.state_dict()}, folder / "encoder.pt")
    return folder, model


def probe(source, out, capsys):
    """What `evaluate.py --pretrained` writes, having printed its table."""
    evaluate.main(["--pretrained", str(source), "--dataset", "shapes", "--out", str(out), "--train-images", "40", "--device", "cpu"])
    written = json.loads((out / "evaluation.json").read_text())
    assert evaluate.table(written) in capsys.readouterr().out
    assert set(written["features"]) == set(written["low_shot"]["scores"]) == {"target", "random", "pixels"}
    assert written["split_sizes"] == {"train": 40, "test": 64} and "--pretrained" in written["commands"][-1]
    assert all(0 <= score[measure] <= 1 for score in written["features"].values() for measure in ("linear", "knn", "precision@5"))
    assert written["features"]["target"] != written["features"]["random"]
    return written


def test_an_official_a_hugging_face_and_an_own_encoder_are_probed_alike(run, tmp_path, capsys):
    folder, model = run
    mean, std = data.STATISTICS["shapes"]
    pretrained.to_official(model, tmp_path / "tiny.pth.tar")
    pretrained.to_huggingface(model.target_encoder, tmp_path / "hf", mean, std)
    found = {source: probe(tmp_path / source, tmp_path / "out" / source, capsys)
             for source in ("tiny.pth.tar", "hf", "runs/shapes/encoder.pt")}
    for written in found.values():
        assert written["pretrained"]["image_size"] == 24 and written["width"] == 32
    own, hf, official = (found[source] for source in ("runs/shapes/encoder.pt", "hf", "tiny.pth.tar"))
    assert own["features"] == hf["features"] and own["pretrained"]["mean"] == hf["pretrained"]["mean"] == list(mean)
    # The official code's images were normalised by ImageNet's statistics, so the same weights see another input.
    assert official["pretrained"]["mean"] == list(data.STATISTICS["folder"][0])
    assert official["features"]["target"] != own["features"]["target"]


@torch.no_grad()
def test_images_are_resized_to_the_encoders_size_and_normalised_with_its_statistics(tmp_path, capsys, monkeypatch, small_probes):
    pretrained.to_huggingface(Encoder("16x1x2", 40, 8), tmp_path / "hf", (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    seen, extract = [], evaluate.features

    def watch(encoder, dataset, size, *args, **kw):
        seen.append((size, dataset.mean, dataset.std, next(data.batches(dataset, 2, size)).shape[2:]))
        return extract(encoder, dataset, size, *args, **kw)

    monkeypatch.setattr(evaluate, "features", watch)
    probe(tmp_path / "hf", tmp_path / "out", capsys)
    assert seen == [(40, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), (40, 40))] * 4  # train and test, target and random


def test_results_go_to_a_folder_named_after_encoder_and_data():
    def place(source, dataset="data/cats.npz"):
        return str(evaluate.default_folder(evaluate.arguments(["--pretrained", source, "--dataset", dataset])))

    assert place("IN1K-vit.h.14-300e", "stl10") == os.path.join("runs", "IN1K-vit.h.14-300e-on-stl10")
    assert place("x/a.b.pth.tar") == os.path.join("runs", "a.b-on-cats")
    assert place("runs/mine/encoder.pt") == os.path.join("runs", "mine-encoder-on-cats")


def test_a_packed_encoder_is_half_as_large_and_gives_the_same_features_to_three_digits(run, tmp_path):
    folder, model = run
    pretrained.pack(folder / "encoder.pt", tmp_path / "small.pt")
    weights = {name: tensor.dtype for name, tensor in torch.load(tmp_path / "small.pt")["encoder"].items()}
    assert set(weights.values()) == {torch.float16}
    images = torch.randn(8, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    found = pretrained.load(tmp_path / "small.pt")
    assert found.encoder.norm.weight.dtype == torch.float32 and found.command.startswith("python train.py")
    with torch.no_grad():
        torch.testing.assert_close(found.encoder(images), model.target_encoder(images), rtol=0, atol=0.01)  # of features of size 1


@pytest.mark.parametrize("name", pretrained.SHIPPED)
def test_a_shipped_encoder_is_small_and_has_its_accuracy_beside(name):
    path = pretrained.SHIPPED[name]
    measured, found = json.loads(path.with_suffix(".json").read_text()), pretrained.load(name)
    assert path.stat().st_size < 12e6 and measured["pretrained"]["source"] == name
    assert measured["commands"][0] == found.command and measured["pretrained"]["size"] == found.shape["size"]
    assert measured["features"]["target"]["linear"] > measured["features"]["random"]["linear"] + 0.1


def test_a_run_with_registers_is_read_and_cannot_be_written_in_formats_that_have_none(tmp_path):
    train.train(tiny(tmp_path, registers=2, max_steps=1))
    encoder = pretrained.load(tmp_path / "encoder.pt").encoder
    assert encoder.registers.shape == (2, 16)
    with pytest.raises(UsageError, match="only encoders without registers can be written, this one has 2"):
        pretrained.to_huggingface(encoder, tmp_path / "theirs", (0.5,) * 3, (0.5,) * 3)


def test_what_evaluate_cannot_do_is_one_line(run, tmp_path):
    folder, _ = run
    grey = tmp_path / "grey.npz"
    np.savez(grey, **{f"{split}_{what}": value for split in ("train", "test") for what, value in (
        ("images", np.zeros((20, 8, 8), np.uint8)), ("labels", np.arange(20) % 2))})
    cases = [
        ([], "name run folders, or one encoder with --pretrained"),
        ([folder, "--pretrained", "x", "--dataset", "shapes"], "name run folders, or one encoder with --pretrained"),
        (["--pretrained", "x"], "--pretrained is x: it needs --dataset"),
        ([folder, "--out", "x"], "--out is x: it is for --pretrained"),
        (["--pretrained", "nowhere.pth.tar", "--dataset", "shapes"], "'nowhere.pth.tar' is none of"),
        (["--pretrained", folder, "--dataset", "shapes"], "a run's encoder is its file encoder.pt"),
        (["--pretrained", folder / "encoder.pt", "--dataset", grey], "has images of 1 channels and 2 axes, the encoder of"),
        (["--pretrained", grey, "--dataset", "shapes"], "cannot be read"),
    ]
    for words, message in cases:
        with pytest.raises(UsageError) as error:
            evaluate.main([*map(str, words)])
        assert message in str(error.value) and "\n" not in str(error.value), words


# --- the README's two snippets ---------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_readmes_snippets_run(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    torch.save(made_up_official(patch=14, side=16), tmp_path / "data" / "IN1K-vit.h.14-300e.pth.tar")
    official, hugging_face = ({} for _ in range(2))
    exec(*snippets("Official weights"), official)
    assert official["features"].shape == (1, 192) and (tmp_path / "mine.pth.tar").exists()
    exec(*snippets("Hugging Face"), hugging_face)
    torch.manual_seed(0)
    images = torch.randn(2, 3, 24, 24)
    expected = run[1].target_encoder(images)
    close(expected, hugging_face["encoder"](images))
    close(expected, transformers.AutoModel.from_pretrained("shapes-hf")(images).last_hidden_state)
