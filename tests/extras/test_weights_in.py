"""Claims about weights and arrays that come in: they are used rightly, or refused in one line."""

import json
import warnings

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers

import data
from config import UsageError
from extras import pretrained
from extras.estimator import IJEPATransformer
from models import Encoder
from test_pretrained import random_official

# --- Hugging Face folders -------------------------------------------------------------------------

PIXELS = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8,
                       generator=torch.Generator().manual_seed(0))


@pytest.fixture
def folder(tmp_path):
    """A Hugging Face folder of a small encoder of 16 pixels."""
    torch.manual_seed(0)
    pretrained.to_huggingface(Encoder(32, 2, 2, image_size=16, patch_size=4), tmp_path / "hf",
                              *data.STATISTICS["cifar10"])
    return tmp_path / "hf"


def change(path, **settings):
    """Change some entries of a JSON file; those that are None are removed."""
    content = {**json.loads(path.read_text()), **settings}
    path.write_text(json.dumps({key: one for key, one in content.items() if one is not None}))


def refused(match, function, *arguments):
    """The function raises UsageError with these words, in one line."""
    with pytest.raises(UsageError, match=match) as error:
        function(*arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("settings", [
    {"do_normalize": False}, {"rescale_factor": 1 / 127.5}, {"rescale_factor": 1},
    {"do_rescale": False}, {"do_rescale": False, "image_mean": [124, 116, 104], "image_std": 58.0},
    {"do_rescale": False, "do_normalize": False}, {"image_mean": 0.5, "image_std": 0.25},
    {"image_mean": None, "image_std": None}, {"do_rescale": None, "do_normalize": None}], ids=str)
def test_images_are_normalized_as_by_transformers_own_processor(folder, settings):
    change(folder / "preprocessor_config.json", **settings)
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    expected = processor(list(PIXELS), return_tensors="pt").pixel_values.float()
    found = pretrained.load(folder)
    ours = data.normalize(PIXELS, found.mean, found.std)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_without_a_preprocessor_file_it_is_transformers_default_and_that_is_said(folder, capsys):
    (folder / "preprocessor_config.json").unlink()
    found = pretrained.load(folder)
    assert (found.mean, found.std) == ((0.5,) * 3, (0.5,) * 3)
    printed = capsys.readouterr().out
    assert "mean 0.5 0.5 0.5, deviation 0.5 0.5 0.5 (transformers' default: there is no" in printed
    assert printed.count("\n") == 1


@pytest.mark.parametrize("settings, match", [
    ({"image_mean": [0.5]}, "image_mean is .*, expected one finite number, or 3, one a channel"),
    ({"image_std": [0.5, 0.5, 0.0]}, "image_std is .*, each more than 0"),
    ({"image_std": "0.5"}, "image_std is 0.5, expected"),
    ({"image_mean": float("nan")}, "image_mean is nan"),
    ({"rescale_factor": 0}, "rescale_factor is 0"),
    ({"do_rescale": "false"}, "do_rescale is false, expected true or false"),
    ({"do_flip_channel_order": True}, "do_flip_channel_order is true, expected false"),
    ({"image_processor_type": "CLIPImageProcessor", "image_mean": None},
     "lacks image_mean or image_std, and the defaults of CLIPImageProcessor")], ids=str)
def test_a_processor_that_does_something_else_is_refused(folder, settings, match):
    change(folder / "preprocessor_config.json", **settings)
    refused(match, pretrained.from_huggingface, folder)
    refused(match, pretrained.load, folder)


def test_which_encoder_a_folder_holds_is_said_as_far_as_it_is_known(folder, capsys):
    encoder = pretrained.from_huggingface(folder)
    assert "holds an encoder, unknown whether target or context" in capsys.readouterr().out
    pretrained.to_huggingface(encoder, folder, (0.5,) * 3, (0.5,) * 3, which="target")
    pretrained.from_huggingface(folder)
    assert "holds the target encoder" in capsys.readouterr().out
    transformers.AutoModel.from_pretrained(folder).save_pretrained(folder)  # keeps it
    pretrained.from_huggingface(folder)
    assert "holds the target encoder" in capsys.readouterr().out


def test_a_folder_without_safetensors_is_refused_with_what_to_do(folder):
    path = folder / "model.safetensors"
    torch.save(safetensors.torch.load_file(path), folder / "pytorch_model.bin")
    path.unlink()
    refused("only pytorch_model.bin, expected .*.safetensors: .*save_pretrained",
            pretrained.load, folder)
    (folder / "pytorch_model.bin").unlink()
    refused("has no weights, expected", pretrained.load, folder)


def test_weights_that_are_there_twice_quantized_or_broken_are_refused(folder):
    path = folder / "model.safetensors"
    state = safetensors.torch.load_file(path)
    safetensors.torch.save_file(state, folder / "old.safetensors")
    refused("holds weights twice .*old.safetensors", pretrained.load, folder)
    (folder / "old.safetensors").unlink()
    key = "layernorm.weight"
    for value, match in ((torch.ones(32, dtype=torch.int8), r"whole numbers \(quantized\) in 1: "),
                         (torch.full((32,), torch.nan), "NaN or infinite in 1: ")):
        safetensors.torch.save_file({**state, key: value}, path)
        refused(match + key, pretrained.load, folder)


# --- official files -------------------------------------------------------------------------------


def without_last_block(stored, *names):
    """A checkpoint whose named parts have lost their last block."""
    last = max(int(key.split(".")[2]) for key in stored[names[0]] if ".blocks." in key)
    return {**stored, **{name: {key: value for key, value in stored[name].items()
                                if f".blocks.{last}." not in key} for name in names}}


@pytest.mark.parametrize("name", ["encoder", "target_encoder"])
def test_an_official_file_that_lost_an_encoders_last_block_is_refused(name, tmp_path):
    path = tmp_path / "short.pth.tar"
    torch.save(without_last_block(random_official(depth=3), name), path)
    for read in (pretrained.from_official, pretrained.load):
        refused("is incomplete: its .*encoder has . blocks, its .*encoder has .; get", read, path)


def test_a_file_that_lost_it_in_both_is_refused_by_its_width(tmp_path):
    path = tmp_path / "short.pth.tar"
    stored = random_official(width=768, depth=12, hidden=8, patch=1, side=2)
    torch.save(stored, path)
    assert len(pretrained.load(path).encoder.blocks) == 12
    torch.save(without_last_block(stored, "encoder", "target_encoder"), path)
    refused("target_encoder has 11 blocks, the official size of width 768 has 12",
            pretrained.load, path)


def test_a_file_that_ends_too_early_is_refused(tmp_path):
    path = tmp_path / "short.pth.tar"
    torch.save(random_official(), path)
    path.write_bytes(path.read_bytes()[:-5000])
    refused("cannot be read", pretrained.load, path)


# --- arrays ---------------------------------------------------------------------------------------

ARRAY = np.random.default_rng(0).integers(0, 256, (20, 8, 8), dtype=np.uint8)  # [n, H, W]


def fitted(X):
    return IJEPATransformer(encoder="8x1x1", predictor="8x1x1", patch_size=2, epochs=0,
                            device="cpu", random_state=0).fit(X)


@pytest.mark.parametrize("seen, given", [(ARRAY, ARRAY / 255), (ARRAY / 255, ARRAY),
                                         (ARRAY, ARRAY / 127.5 - 1), (ARRAY * 257.0, ARRAY)])
def test_other_units_than_fit_saw_give_a_warning(seen, given):
    model = fitted(seen)
    with pytest.warns(UserWarning, match="X has values .* but fit saw .* convert it") as caught:
        model.transform(given)
    assert len(caught) == 1 and "\n" not in str(caught[0].message)
    assert caught[0].filename == __file__


def test_the_same_units_give_none():
    model = fitted(ARRAY)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for same in (ARRAY[:1], ARRAY.astype(float), ARRAY // 4, np.full((2, 8, 8), 7)):
            model.transform(same)


def test_a_masked_array_that_hides_something_is_refused():
    hidden = np.ma.masked_array(ARRAY, ARRAY > 250)
    model = fitted(np.ma.masked_array(ARRAY))  # nothing is hidden: an array like any other
    for call in (fitted, model.transform, model.partial_fit):
        for X in (hidden, hidden.reshape(20, 64)):
            refused(r"hides \d+ values, expected an array without a mask: .*X.filled", call, X)
    assert np.array_equal(model.transform(np.ma.masked_array(ARRAY)), model.transform(ARRAY))
