"""Claims about .npz files that people make themselves: each kind of pixels, labels and keys is read
right or refused in one line, and data has the same identity wherever it lies."""

import itertools
import json
import time

import numpy as np
import pytest
import torch

import data
import evaluate
import train
from config import UsageError
from extras.estimator import find_layout
from support import npz, readers

TINY = ["--encoder", "16x1x2", "--predictor", "16x1x2", "--image-size", "16", "--batch-size", "8",
        "--context-size", "4", "--held-out", "0", "--device", "cpu"]


def noise(*shape, high=256):
    return np.random.default_rng(0).integers(0, high, shape, np.uint8)


def load(path, split="train", **arrays):
    """What data.load makes of the arrays, saved as an .npz; by default with images."""
    np.savez(path / "x.npz", **arrays)
    return data.load(str(path / "x.npz"), split)


def refusal(path, split="train", **arrays):
    """The one line that refuses the arrays; it names the file."""
    with pytest.raises(UsageError) as caught:
        load(path, split, **arrays)
    message = str(caught.value)
    assert "\n" not in message and str(path / "x.npz") in message
    return message


# --- pixels ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape, axes, what", [
    ((6, 12, 10), None, "gray"),
    ((6, 12, 10, 1), (0, 3, 1, 2), "gray, with an axis for it"),
    ((6, 1, 12, 10), (0, 1, 2, 3), "gray, channels first"),
    ((6, 12, 10, 3), (0, 3, 1, 2), "color"),
    ((6, 3, 12, 10), (0, 1, 2, 3), "color, channels first"),
    ((3, 3, 32, 32), (0, 1, 2, 3), "three color images"),
    ((6, 4, 4, 3), (0, 3, 1, 2), "color, tiny"),
    ((6, 8, 12, 10), None, "gray volumes"),
    ((6, 5, 30, 30, 1), (0, 4, 1, 2, 3), "gray volumes, flat"),
    ((6, 8, 12, 10, 3), (0, 4, 1, 2, 3), "color volumes"),
    ((6, 3, 8, 12, 10), (0, 1, 2, 3, 4), "color volumes, channels first"),
    ((6, 8, 12, 10, 4), (0, 4, 1, 2, 3), "volumes of four channels"),
])
def test_axes_that_can_mean_one_thing_only_are_read_as_that(tmp_path, capsys, shape, axes, what):
    pixels = noise(*shape)
    found = load(tmp_path, train_images=pixels)
    expected = pixels[:, None] if axes is None else pixels.transpose(axes)
    assert np.array_equal(found.images, expected) and found.images.is_contiguous()
    assert len(found.mean) == len(found.std) == expected.shape[1]
    assert not capsys.readouterr().out


@pytest.mark.parametrize("shape, advice", [
    ((6, 2, 32, 32), "x[:, :1] if they come first"),
    ((6, 32, 32, 2), "keep 1 or 3 channels, such as x[..., :1]"),
    ((6, 4, 32, 32), "np.moveaxis(x, 1, -1)"),
    ((6, 13, 64, 64), "of volumes save x[..., None]"),  # Sentinel-2's bands
    ((6, 64, 64, 13), "of volumes save x[..., None]"),
    ((6, 32, 32, 5), "keep 1 or 3 channels"),
    ((6, 32, 3, 32), "keep 1 or 3 channels"),
    ((6, 3, 32, 3), "pad the images"),
    ((6, 4, 4, 4), "np.moveaxis(x, 1, -1)"),
    ((6, 8, 8, 8, 8), "keep 1 to 4 channels"),
    ((6, 3, 8, 8, 3), "pad the images"),
    ((6, 3, 4, 8, 8), "keep 1 to 4 channels"),  # volumes of four slices
    ((6, 784), "x.reshape(-1, 28, 28)"),
    ((32, 32, 3), "x[None]"),
    ((0, 32, 32, 3), "(0, 32, 32, 3)"),
])
def test_axes_that_could_mean_several_things_or_none_are_refused_with_what_to_do(
        tmp_path, shape, advice):
    message = refusal(tmp_path, train_images=np.zeros(shape, np.uint8))
    assert f"train_images has the shape {shape}, expected n,H,W or n,H,W,3" in message
    assert advice in message


def test_alpha_is_left_out_and_that_is_said_once(tmp_path, capsys):
    pixels = noise(6, 12, 10, 4)
    arrays = {"train_images": pixels, "test_images": pixels[:3]}
    found = load(tmp_path, **arrays)
    assert np.array_equal(found.images, pixels[..., :3].transpose(0, 3, 1, 2))
    assert len(load(tmp_path, "test", **arrays)) == 3
    out = capsys.readouterr().out
    assert out.count("read as RGBA, without alpha") == out.count("\n") == 1


def test_the_reader_and_the_estimator_never_read_one_shape_in_two_ways():
    """The estimator can be told the layout, so it refuses more: the sides alone tell volumes."""
    agreed = 0
    sides = (1, 2, 3, 4, 5, 9, 28)
    for shape in itertools.chain.from_iterable(itertools.product(sides, repeat=k) for k in (3, 4)):
        try:
            layout = find_layout(shape)
            axis = npz.channel_axis((10, *shape))
        except ValueError:
            continue
        assert axis is not None and layout[axis] == "C", (shape, layout, axis)
        agreed += 1
    assert agreed > 100


@pytest.mark.parametrize("dtype", [np.int64, np.uint16, np.int32, np.uint64, np.int16])
def test_other_whole_numbers_in_0_to_255_are_converted_and_that_is_said_once(
        tmp_path, capsys, dtype):
    pixels = noise(6, 12, 10)
    found = load(tmp_path, train_images=pixels.astype(dtype), test_images=pixels[:2].astype(dtype))
    data.load(str(tmp_path / "x.npz"), "test")
    assert np.array_equal(found.images[:, 0], pixels) and found.images.dtype == torch.uint8
    out = capsys.readouterr().out
    assert out.count(f"are {np.dtype(dtype)} with values in 0..255; read as uint8") == 1
    assert out.count("\n") == 1


@pytest.mark.parametrize("pixels, advice", [
    (np.linspace(0, 1, 600), "float64, expected uint8 (its values are 0 to 1); scale the pixels of "
     "all splits alike to 0..255: (x * 255).round().astype('uint8')"),
    (np.linspace(0, 255, 600, dtype=np.float32), "(x).round().astype('uint8')"),
    (np.linspace(-1, 1, 600), "its values are -1 to 1"),
    (np.full(600, np.nan), "its values are nan to nan"),
    (np.arange(600) * 100, "(x * 0.00425"),
    (np.arange(600) - 1, "its values are -1 to 598"),
    (np.arange(600) % 2 == 0, "bool, expected uint8"),
    (np.array(["a"] * 600), "<U1, expected uint8"),
    (np.zeros(600, complex), "complex128, expected uint8"),
])
def test_other_pixels_are_refused_with_their_range_and_what_to_do(tmp_path, pixels, advice):
    message = refusal(tmp_path, train_images=pixels.reshape(6, 10, 10))
    assert advice in message and ".astype('uint8')" in message


# --- keys -----------------------------------------------------------------------------------------


def test_keys_may_be_in_upper_case(tmp_path):
    pixels, labels = noise(6, 12, 10), np.arange(6) % 2
    found = load(tmp_path, Train_images=pixels, TRAIN_LABELS=labels, Test_Images=pixels[:2])
    assert np.array_equal(found.images[:, 0], pixels) and found.labels.tolist() == labels.tolist()
    assert len(data.load(str(tmp_path / "x.npz"), "test")) == 2


def test_misspelled_keys_are_named_with_what_was_meant(tmp_path, capsys):
    pixels, labels = noise(6, 12, 10), np.arange(6) % 2
    assert "did you mean train_images?" in refusal(tmp_path, train_image=pixels)
    for names in (("x_train", "y_train"), ("images", "labels"), ("arr_0", "arr_1")):
        message = refusal(tmp_path, **dict(zip(names, (pixels, labels))))
        assert "np.savez(path, train_images=..., train_labels=...)" in message
        assert f"has the keys {', '.join(names)}, expected train_images" in message
    assert load(tmp_path, train_images=pixels, train_label=labels).labels is None
    out = capsys.readouterr().out
    assert "has no train_labels and is read without labels" in out
    assert "did you mean train_label?" in out
    load(tmp_path, train_images=pixels)
    assert not capsys.readouterr().out  # nothing that was left unread


# --- labels ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("ids, dtype", [
    ((0, 333, 500, 999), np.uint16), ((7, 1000, 50_000, 60_000), np.uint16),
    ((1, 2, 3, 4), np.uint8), ((5, 10**9, 10**12, 2**62), np.int64),
    ((1, 2, 3, 2**64 - 1), np.uint64), ((-0, 2, 4, 100), np.int8),
])
def test_labels_that_are_ids_cost_as_many_classes_as_there_are(tmp_path, capsys, ids, dtype):
    order = np.array([2, 0, 3, 1, 0, 2])
    labels = np.array(ids, dtype)[order]
    arrays = {"train_images": noise(6, 12, 10), "train_labels": labels,
              "test_images": noise(2, 12, 10), "test_labels": labels[2:4, None]}
    found, test = load(tmp_path, **arrays), load(tmp_path, "test", **arrays)
    assert found.labels.tolist() == order.tolist() and found.labels.dtype == torch.int64
    assert test.labels.tolist() == [3, 1]  # the training images' numbers
    assert found.class_names == test.class_names == [str(label) for label in ids]
    assert found.describe()["classes"] == 4
    out = capsys.readouterr().out
    assert f"its labels are ids from {ids[0]} to {ids[-1]}; its 4 classes" in out
    assert out.count("\n") == 1


def test_class_numbers_from_0_stay_as_they_are_whatever_a_split_lacks(tmp_path, capsys):
    arrays = {"train_images": noise(6, 12, 10), "train_labels": np.array([0, 1, 3, 0, 1, 3]),
              "test_images": noise(3, 12, 10), "test_labels": np.array([2, 3, 0], np.uint8)}
    found, test = load(tmp_path, **arrays), load(tmp_path, "test", **arrays)
    assert found.labels.tolist() == [0, 1, 3, 0, 1, 3] and found.class_names is None
    assert test.labels.tolist() == [2, 3, 0] and test.class_names is None
    out = capsys.readouterr().out
    assert "no training image has a label that test_labels holds (1 such, the first is 2)" in out


def test_an_id_that_only_test_images_have_comes_after_those_of_the_training_images(
        tmp_path, capsys):
    arrays = {"train_images": noise(4, 12, 10), "train_labels": np.array([70, 9, 9, 70]),
              "val_images": noise(1, 12, 10), "val_labels": np.array([8], np.uint64),
              "test_images": noise(3, 12, 10), "test_labels": np.array([70, 3, 9])}
    found, test = load(tmp_path, **arrays), load(tmp_path, "test", **arrays)
    assert found.labels.tolist() == [1, 0, 0, 1] and test.labels.tolist() == [1, 3, 0]
    assert load(tmp_path, "val", **arrays).labels.tolist() == [2]
    assert found.class_names == test.class_names == ["9", "70", "8", "3"]
    assert "(1 such, the first is 3); such images count as classes" in capsys.readouterr().out


@pytest.mark.parametrize("labels, why", [
    (np.arange(6.0), "float64 [6], expected whole numbers"),
    (np.arange(6)[None], "int64 [1, 6], expected whole numbers"),
    (np.arange(6)[:, None, None], "one for each of the 6 images"),
    (np.array([3, 1, 2, -1, 1, 1], np.int8), "holds -1, expected class numbers from 0"),
])
def test_labels_that_are_no_class_numbers_are_refused(tmp_path, labels, why):
    assert why in refusal(tmp_path, train_images=noise(6, 12, 10), train_labels=labels)


def test_strange_labels_of_another_split_do_not_hinder_pretraining(tmp_path):
    arrays = {"train_images": noise(6, 12, 10), "train_labels": np.arange(6) % 2,
              "test_images": noise(3, 12, 10)}
    for strange in (np.full(3, -1), np.zeros(3), np.array(["a", "b", "c"]), np.array(1)):
        assert load(tmp_path, **arrays, test_labels=strange).labels.tolist() == [0, 1] * 3


@pytest.mark.parametrize("top", [1000, 50_000])
def test_four_ids_are_evaluated_as_four_classes(tmp_path, top):
    number = np.arange(80) % 4
    pixels = noise(80, 16, 16, high=60)
    pixels[np.arange(80), number * 4] += 150
    ids = np.array([0, top // 3, top // 2, top - 1])[number]
    np.savez(tmp_path / "x.npz", train_images=pixels, train_labels=ids, test_images=pixels[:20],
             test_labels=ids[:20])
    train.main([*TINY, "--dataset", str(tmp_path / "x.npz"), "--max-steps", "2",
                "--out", str(tmp_path / "run")])
    evaluate.main([str(tmp_path / "run"), "--device", "cpu"])
    written = (tmp_path / "run" / "evaluation.json").read_text()
    found = json.loads(written)
    assert found["class_names"] == ["0", str(top // 3), str(top // 2), str(top - 1)]
    assert np.shape(found["features"]["target"]["confusion"]) == (4, 4)
    assert found["features"]["pixels"]["linear"] == 1.0 and len(written) < 20_000


# --- identity -------------------------------------------------------------------------------------


def test_a_fingerprint_changes_with_any_byte_and_not_with_the_place_or_the_layout(tmp_path):
    pixels, labels = noise(50, 12, 10, 3), np.arange(50) % 4
    known = load(tmp_path, train_images=pixels, train_labels=labels).describe()
    (tmp_path / "x.npz").rename(tmp_path / "y.npz")
    moved = data.load(str(tmp_path / "y.npz")).describe()
    assert moved == {**known, "name": "y"}
    first = load(tmp_path, train_images=pixels.transpose(0, 3, 1, 2), train_labels=labels + 70)
    assert first.describe() == known  # the same images, the same classes
    for at in ((0, 0, 0, 0), (31, 5, 5, 1), (49, 11, 9, 2)):
        changed = pixels.copy()
        changed[at] ^= 1
        found = load(tmp_path, train_images=changed, train_labels=labels).describe()
        assert found["fingerprint"] != known["fingerprint"]


def test_a_run_resumes_with_the_data_at_a_new_place_and_under_a_new_name(tmp_path):
    """The name alone differs: its data is the same. Other data of the new name is refused."""
    np.savez(tmp_path / "old.npz", train_images=noise(40, 16, 16))
    out = ["--out", str(tmp_path / "run")]
    train.main([*TINY, "--dataset", str(tmp_path / "old.npz"), "--max-steps", "2", *out])
    (tmp_path / "old.npz").rename(tmp_path / "new.npz")
    resume = ["--resume", "--dataset", str(tmp_path / "new.npz"), *out]
    train.main(resume)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["dataset"] == str(tmp_path / "new.npz")
    _, _, config, about = train.load_run(tmp_path / "run")
    assert config.dataset == str(tmp_path / "new.npz") and about["name"] == "new"
    train.main(["--resume", *out])  # the new place is remembered
    np.savez(tmp_path / "new.npz", train_images=noise(40, 16, 16) ^ 1)
    with pytest.raises(UsageError, match="cannot resume .*its fingerprint was"):
        train.main(["--resume", *out])


def test_every_byte_of_a_large_data_set_is_read_in_a_second_or_two():
    images = torch.zeros(60_000, 3, 32, 32, dtype=torch.uint8)
    start, known = time.process_time(), readers.fingerprint(images, None)
    assert time.process_time() - start < 3
    images[59_999, 2, 31, 31] = 1
    assert readers.fingerprint(images, None) != known
