"""Claims about image folders of every layout: read right, or refused in one line; never silently
wrong."""

import json
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from test_data import refusal

import data
from support import layout

SIZE = 8  # pixels; side at which folders are read here
RED, BLUE = (255, 0, 0), (0, 0, 255)


def picture(path, color=RED, size=(20, 16), **options):
    """Write an image of one color; returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path, **options)
    return path


def pictures(place, count, color=RED):
    for i in range(count):
        picture(place / f"{i}.png", color)


def load(path, split="train"):
    return data.load(str(path), split, image_size=SIZE)


def names(dataset, root):
    """The paths of a dataset, relative to a folder."""
    return [path[len(str(root)) + 1 :] for path in dataset.paths]


def gray(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)


# --- splits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("train, other, split", [
    ("train", "valid", "val"), ("train", "validation", "val"), ("Train", "Test", "test"),
    ("Training", "Testing", "test"), ("TRAIN", "dev", "val"), ("train", "val", "val"),
    ("training_set", "test_set", "test"), ("train2017", "val2017", "val")])
def test_splits_of_many_names_are_never_classes(tmp_path, train, other, split):
    for name in ("cat", "dog"):
        pictures(tmp_path / train / name, 2)
        pictures(tmp_path / other / name, 1)
    found = load(tmp_path)
    assert found.class_names == ["cat", "dog"] and found.labels.tolist() == [0, 0, 1, 1]
    for part in (split, "test", "val"):
        held = load(tmp_path, part)
        assert names(held, tmp_path / other) == ["cat/0.png", "dog/0.png"]
        assert held.class_names == ["cat", "dog"] and held.labels.tolist() == [0, 1]


def test_two_folders_for_one_split_are_refused(tmp_path):
    for name in ("train", "val", "valid"):
        pictures(tmp_path / name / "cat", 1)
    assert "val/ and valid/, both a val split" in refusal(load, tmp_path)


def test_test_folders_without_training_images_are_refused(tmp_path):
    pictures(tmp_path / "test" / "cat", 1)
    assert "has test/ but no train/" in refusal(load, tmp_path)
    pictures(tmp_path / "cat", 3)
    pictures(tmp_path / "dog", 3)
    assert "has test/ but no train/" in refusal(load, tmp_path)


def test_names_that_look_like_splits_are_refused(tmp_path):
    pictures(tmp_path / "pets_train" / "cat", 2)
    pictures(tmp_path / "pets_test" / "cat", 2)
    assert "look like splits" in refusal(load, tmp_path)


def test_splits_inside_each_class_are_refused(tmp_path):
    for name in ("bottle", "cable"):
        pictures(tmp_path / name / "train" / "good", 2)
        pictures(tmp_path / name / "test" / "bad", 2)
    message = refusal(load, tmp_path)
    assert "has train/ and other splits in bottle/" in message
    assert load(tmp_path / "bottle").class_names == ["good"]


def test_a_vehicle_is_a_class_and_that_is_said(tmp_path, capsys):
    for name in ("bus", "car", "train"):
        pictures(tmp_path / name, 1)
    assert load(tmp_path).class_names == ["bus", "car", "train"]
    assert "train is taken for a class, as bus is" in capsys.readouterr().out


def test_only_train_is_the_train_split(tmp_path, capsys):
    for name in ("cat", "dog"):
        pictures(tmp_path / "train" / name, 1)
    assert load(tmp_path).class_names == ["cat", "dog"]
    assert "expected one of train" in refusal(load, tmp_path, "test")
    capsys.readouterr()
    pictures(tmp_path / "unlabeled", 4)
    assert load(tmp_path).class_names == ["cat", "dog"]
    assert "is read from train only, not from unlabeled" in capsys.readouterr().out


def test_a_flat_test_does_not_hide_a_labeled_val(tmp_path, capsys):
    for name in ("cat", "dog"):
        pictures(tmp_path / "train" / name, 1)
        pictures(tmp_path / "val" / name, 1)
    pictures(tmp_path / "test", 5)
    test = load(tmp_path, "test")
    assert test.labels.tolist() == [0, 1] and names(test, tmp_path)[0] == "val/cat/0.png"
    assert f"those in {tmp_path / 'val'} are the test split" in capsys.readouterr().out


@pytest.mark.parametrize("folder", ["unknown", "unlabeled", "unlabelled"])
def test_a_flat_test_alone_has_no_labels(tmp_path, folder):
    for name in ("cat", "dog"):
        pictures(tmp_path / "train" / name, 1)
    pictures(tmp_path / "test" / folder, 5)
    assert load(tmp_path, "test").labels is None and len(load(tmp_path, "test")) == 5


@pytest.mark.parametrize("wrap", ["pets", "data/pets", "images"])
def test_a_wrapper_is_opened_and_named(tmp_path, capsys, wrap):
    for name in ("cat", "dog"):
        pictures(tmp_path / wrap / name, 1)
    assert load(tmp_path).class_names == ["cat", "dog"]
    assert f"holds images in {wrap.split('/')[0]}/ only" in capsys.readouterr().out


def test_a_wrapper_around_splits_is_opened(tmp_path):
    for part in ("train", "test"):
        for name in ("cat", "dog"):
            pictures(tmp_path / "archive" / part / part / name, 1)
    assert load(tmp_path).class_names == ["cat", "dog"]
    assert load(tmp_path, "test").labels.tolist() == [0, 1]


def test_images_alone_in_a_folder_called_images_are_flat(tmp_path):
    pictures(tmp_path / "images", 3)
    assert load(tmp_path).labels is None and len(load(tmp_path)) == 3


def test_tiny_imagenet_as_it_is_unpacked(tmp_path):
    root = tmp_path / "tiny-imagenet-200"
    for name in ("n01", "n02"):
        picture(root / "train" / name / "images" / f"{name}_0.JPEG")
        (root / "train" / name / f"{name}_boxes.txt").write_text("n01_0.JPEG\t0\t0\t9\t9\n")
    for i in range(3):
        picture(root / "val" / "images" / f"val_{i}.JPEG")
    picture(root / "test" / "images" / "test_0.JPEG")
    (root / "val" / "val_annotations.txt").write_text(
        "val_0.JPEG\tn02\t0\t0\t9\t9\nval_1.JPEG\tn01\t0\t0\t9\t9\nval_2.JPEG\tn02\t0\t0\t9\t9\n")
    assert load(tmp_path).class_names == ["n01", "n02"] and load(tmp_path).labels.tolist() == [0, 1]
    for split in ("val", "test"):
        held = load(tmp_path, split)
        assert [path[-10:] for path in held.paths] == ["val_1.JPEG", "val_0.JPEG", "val_2.JPEG"]
        assert held.labels.tolist() == [0, 1, 1]


def test_roboflow_with_class_folders_and_with_annotation_files(tmp_path, capsys):
    for part in ("train", "valid", "test"):
        for name in ("cat", "dog"):
            pictures(tmp_path / "classes" / part / name, 1)
        pictures(tmp_path / "boxes" / part, 3)
        (tmp_path / "boxes" / part / "_annotations.coco.json").write_text("{}")
    (tmp_path / "classes" / "README.roboflow.txt").write_text("")
    assert load(tmp_path / "classes", "val").labels.tolist() == [0, 1]
    assert load(tmp_path / "boxes").labels is None
    assert "_annotations.coco.json is not read; for labels put them" in capsys.readouterr().out


def test_masks_next_to_images_are_no_class(tmp_path):
    pictures(tmp_path / "images", 3)
    pictures(tmp_path / "annotations" / "trimaps", 3)
    message = refusal(load, tmp_path)
    assert "images in images/ and in annotations, which are no classes" in message
    assert f"choose --dataset {tmp_path / 'images'}" in message


# --- pixels ---------------------------------------------------------------------------------------

RAMP = np.tile(np.arange(64) * 4, (64, 1))  # 0..252


@pytest.mark.parametrize("name, dtype, factor, bits", [
    ("x.png", np.uint16, 1, 8), ("x.tif", np.uint16, 1, 8), ("x.tif", np.int32, 1, 8),
    ("x.png", np.uint16, 4, 10), ("x.png", np.uint16, 16, 12), ("x.tif", np.uint16, 16, 12),
    ("x.tif", np.int32, 16, 12), ("x.tif", ">u2", 16, 12), ("x.png", np.uint16, 256, 16)])
@pytest.mark.parametrize("lazy", [False, True])
def test_integers_that_do_not_fill_16_bits_keep_their_gray_levels(
        tmp_path, capsys, monkeypatch, name, dtype, factor, bits, lazy):
    monkeypatch.setattr("support.layout.MEMORY_LIMIT", 0 if lazy else 2**30)
    gray(tmp_path / name, (RAMP * factor).astype(dtype))
    (image,) = data.load(str(tmp_path), image_size=64).in_memory().images
    assert torch.equal(image[0], torch.from_numpy(RAMP).to(torch.uint8))
    said = f"{bits}-bit integers in 16 or 32 bits: in all of them 0..{2**bits - 1} becomes 0..255"
    assert capsys.readouterr().out.count(said) == (bits < 16)


def test_all_images_of_all_splits_have_one_scale(tmp_path):
    for part, value in (("train", 4000), ("test", 900)):
        for name in ("a", "b"):
            gray(tmp_path / part / name / "1.png", np.full((16, 20), value, dtype=np.uint16))
    gray(tmp_path / "train" / "a" / "2.png", np.full((16, 20), 100, dtype=np.uint16))
    assert load(tmp_path).images[:, 0, 4, 4].tolist() == [250, 6, 250]
    assert load(tmp_path, "test").images[:, 0, 4, 4].tolist() == [56, 56]


@pytest.mark.parametrize("name", ["x.jpg", "x.png", "x.webp", "x.tif", "x.avif", "gray16.png",
                                  "gray16.tif"])
def test_photographs_of_every_format_are_turned_upright(tmp_path, name):
    image = Image.new("RGB", (16, 16), RED)
    image.paste(BLUE, (0, 0, 16, 8))  # as stored: blue above, red below
    if "gray16" in name:
        values = np.full((16, 16), 60_000, dtype=np.uint16)
        values[:8] = 0
        image = Image.fromarray(values)
    exif = Image.Exif()
    exif[0x0112] = 6  # what is stored on the left belongs on top
    image.save(tmp_path / name, exif=exif)
    (turned,) = load(tmp_path).images
    left, right = turned[0, 4, 1].item(), turned[0, 4, 6].item()
    assert left > 220 and right < 40


@pytest.mark.parametrize("name, mode", [("x.png", "1"), ("x.jpg", "L"), ("x.png", "P"),
                                        ("x.png", "L")])
def test_a_photograph_of_200_megapixels_is_read(tmp_path, recwarn, name, mode):
    image = Image.new(mode, (20_000, 10_000), 0)
    image.paste(255 if mode == "L" else 1, (0, 0, 10_000, 10_000))
    if mode == "P":
        image.putpalette([0, 0, 0, 255, 255, 255])
    image.save(tmp_path / name)
    del image
    (image,) = load(tmp_path).images
    row = image[0, 4].tolist()  # its middle is blurred
    assert row[:3] + row[5:] == pytest.approx([255] * 3 + [0] * 3, abs=3)
    assert not recwarn.list


def test_a_large_16_bit_image_keeps_its_gray_levels(tmp_path, monkeypatch):
    monkeypatch.setattr("support.folder.LARGE", 1000)
    gray(tmp_path / "x.png", np.repeat(np.repeat(RAMP * 16, 8, 0), 8, 1).astype(np.uint16))
    picture(tmp_path / "y.png", size=(500, 400))
    images = load(tmp_path).images
    assert images[0, 0, 4].tolist() == pytest.approx(RAMP.reshape(64, 8, 8).mean((0, 2)), abs=6)
    assert images[1, :, 4, 4].tolist() == list(RED)


# --- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, format", [
    ("x.jfif", "JPEG"), ("x.JPE", "JPEG"), ("x.pgm", "PPM"), ("x.avif", "AVIF"),
    ("x.jp2", "JPEG2000"), ("x.tga", "TGA"), ("x.pcx", "PCX"), ("x.dds", "DDS"), ("x.mpo", "JPEG"),
    ("x.qoi", "QOI")])
def test_whatever_pillow_opens_is_read(tmp_path, name, format):
    image = Image.new("L" if name == "x.pgm" else "RGB", (20, 16), 90 if name == "x.pgm" else RED)
    image.save(tmp_path / name, format=format)
    (image,) = load(tmp_path).images
    assert image[0, 4, 4].item() == pytest.approx(90 if name == "x.pgm" else 255, abs=5)


def test_what_pillow_cannot_open_is_counted_and_named(tmp_path, capsys):
    pictures(tmp_path / "cat", 1)
    for name in ("IMG_1.HEIC", "IMG_2.heic", "logo.svg", "notes.txt", "scan.h5"):
        (tmp_path / "cat" / name).write_bytes(b"\0")
    assert len(load(tmp_path)) == 1
    out = capsys.readouterr().out
    assert "4 files in" in out and "2 .heic, 1 " in out and "1 .svg" in out and "1 .h5" in out
    assert f"(first: {tmp_path / 'cat' / 'IMG_1.HEIC'})" in out
    (tmp_path / "cat" / "0.png").unlink()
    assert "2 .heic" in refusal(load, tmp_path)


def test_system_folders_are_left_out(tmp_path, capsys):
    for name in ("cat", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "__MACOSX",
                 ".thumbnails", "dog/@eaDir", "dog/.git"):
        pictures(tmp_path / name, 2)
    pictures(tmp_path / "dog", 1)
    found = load(tmp_path)
    assert found.class_names == ["cat", "dog"] and found.labels.tolist() == [0, 0, 1]
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("stray, count", [("thumbnails", 40), ("runs/a/figures", 2),
                                          ("thumbs/small", 25), ("train", 3), ("test", 3)])
def test_a_stray_folder_does_not_swallow_flat_photographs(tmp_path, capsys, stray, count):
    pictures(tmp_path, 40)
    pictures(tmp_path / stray, count, BLUE)
    found = load(tmp_path)
    assert len(found) == 40 and found.labels is None and found.class_names is None
    assert names(found, tmp_path) == sorted(f"{i}.png" for i in range(40))
    assert f"the {count} in sub-folders (first: {stray.split('/')[0]})" in capsys.readouterr().out


def test_copies_in_several_sizes_do_not_swallow_flat_photographs(tmp_path):
    for place in (".", "thumbs/small", "thumbs/large"):
        pictures(tmp_path / place, 10)
    assert len(load(tmp_path)) == 10


def test_a_folder_that_may_be_flat_or_not_is_refused(tmp_path):
    pictures(tmp_path, 4)
    for i in range(10, 20):
        picture(tmp_path / "holiday" / f"{i}.png")
    assert "has 4 images of its own and 10 in holiday/" in refusal(load, tmp_path)


def test_images_next_to_split_folders_are_mentioned_or_refused(tmp_path, capsys):
    for part in ("train", "test"):
        pictures(tmp_path / part / "cat", 2)
    picture(tmp_path / "cover.png")
    assert len(load(tmp_path)) == 2
    assert "not from cover.png" in capsys.readouterr().out
    pictures(tmp_path, 9)
    assert "10 images of its own and fewer in train/" in refusal(load, tmp_path)


@pytest.mark.parametrize("flat", [False, True])
def test_a_run_folder_is_no_class(tmp_path, capsys, flat):
    for name in ("cat", "dog"):
        pictures(tmp_path / ("." if flat else name), 2)
    for run in ("runs/a", "b"):
        pictures(tmp_path / run / "figures", 9)
        (tmp_path / run / "config.json").write_text(json.dumps({}))
        (tmp_path / run / "metrics.csv").write_text("")
    found = load(tmp_path)
    assert found.class_names == (None if flat else ["cat", "dog"])
    assert len(found) == (2 if flat else 4)
    assert f"{tmp_path / 'b'} is the folder of a run; it is left out" in capsys.readouterr().out


# --- rows -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("lazy", [False, True])
def test_paths_are_those_of_the_rows(tmp_path, monkeypatch, lazy):
    monkeypatch.setattr("support.layout.MEMORY_LIMIT", 0 if lazy else 2**30)
    for i in range(10):
        picture(tmp_path / "ab"[i % 2] / f"{i}.png", (20 * i, 0, 0))
    if not lazy:
        for name in ("a/4.png", "b/1.png"):
            (tmp_path / name).write_bytes(b"\x89PNG\r\n\x1a\n broken")
    picture(tmp_path / "cover.png", BLUE)
    found = load(tmp_path)
    assert len(found.paths) == len(found) == (10 if lazy else 8)
    for part in (found, found.subset([5, 0, 3]), found.subset([5, 0, 3]).subset([2, 1])):
        for row, path in enumerate(part.paths):
            with Image.open(path) as image:
                assert part.images[row][0, 4, 4].item() == image.getpixel((10, 8))[0]
            assert f"/{'ab'[part.labels[row]]}/" in path
    assert data.load("shapes", "test").paths is None


# --- few images -----------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 4])
def test_one_class_and_few_images_are_read(tmp_path, count):
    pictures(tmp_path / "cat", count)
    found = load(tmp_path)
    assert found.class_names == ["cat"] and found.labels.tolist() == [0] * count


def test_a_single_class_in_both_splits_is_read(tmp_path):
    for part in ("train", "test"):
        pictures(tmp_path / part / "cat", 2)
    assert load(tmp_path, "test").labels.tolist() == [0, 0]
    assert load(tmp_path).class_names == ["cat"]


def png_of_16_bit_colors(path, value):
    """A PNG of 16 x 16 pixels, written by hand, as Pillow writes no 16-bit colors."""
    def chunk(kind, content):
        check = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + check

    rows = (b"\0" + struct.pack(">H", value) * 48) * 16
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(
        ">IIBBBBB", 16, 16, 16, 2, 0, 0, 0)) + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b""))


def test_colors_of_16_bits_that_would_turn_black_are_refused(tmp_path):
    png_of_16_bit_colors(tmp_path / "x.png", 1000)
    assert "16 bits a color but use the lowest 10 at most" in refusal(load, tmp_path)
    png_of_16_bit_colors(tmp_path / "y.png", 60_000)
    assert load(tmp_path).images[:, 0, 4, 4].tolist() == [1000 // 256, 60_000 // 256]


def test_endings_are_those_of_pillow_but_for_formats_it_cannot_decode():
    assert {".jpg", ".png", ".tif", ".webp"} < set(layout.extensions())
    assert not {".pdf", ".h5", ".eps", ".mpg"} & set(layout.extensions())
