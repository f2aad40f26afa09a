"""Claims about damaged and odd data: converted, or left out with its name and a count, or refused
in one line; never a crash."""

import os
import pickle
import random
import shutil
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_data import make_cifar10, make_stl10, refusal

import data
import train
from config import UsageError
from support import folder, layout

SIZE = 8  # pixels; side at which folders are read here
RED, BLUE, WHITE = [255, 0, 0], [0, 0, 255], [255, 255, 255]


def picture(path, color=(255, 0, 0), size=(20, 16)):
    """Write an image of one color; returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)
    return path


def broken(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"<html>404 not found</html>")
    return path


def load(path):
    return data.load(str(path), image_size=SIZE)


def middle(path):
    """The middle pixel of the only image of a folder, three numbers."""
    (image,) = load(path).images
    return image[:, SIZE // 2, SIZE // 2].tolist()


# --- CIFAR, STL-10 --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["data_batch_3", "batches.meta"])
def test_a_cifar_file_cut_anywhere_is_refused_by_name(tmp_path, name):
    path = make_cifar10(tmp_path) / name
    whole = path.read_bytes()
    cuts = [*range(0, min(len(whole), 300), 3), *range(300, len(whole), 997), len(whole) - 1]
    for cut in cuts:
        path.write_bytes(whole[:cut])
        assert str(path) in refusal(data.load, "cifar10", "train", tmp_path), cut


@pytest.mark.parametrize("name, key, value", [
    ("data_batch_3", b"labels", [0, 1, 2]),  # one fewer than images
    ("data_batch_3", b"labels", [0, 1, 2, 10]),
    ("data_batch_3", b"labels", [0, 1, 2, None]),
    ("data_batch_3", b"data", np.zeros((4, 3071), dtype=np.uint8)),
    ("data_batch_3", b"data", np.zeros((4, 3072), dtype=np.float32)),
    ("data_batch_3", b"data", None),
    ("batches.meta", b"label_names", [b"class0"]),
    ("batches.meta", b"label_names", 7),
])
def test_a_cifar_file_with_the_wrong_content_is_refused(tmp_path, name, key, value):
    path = make_cifar10(tmp_path) / name
    path.write_bytes(pickle.dumps({**pickle.loads(path.read_bytes()), key: value}, 2))
    message = refusal(data.load, "cifar10", "train", tmp_path)
    assert str(path.parent) in message and "delete it" in message


@pytest.mark.parametrize("name, content", [
    ("train_X.bin", bytes(3 * 3 * 96 * 96)),  # cut by a whole image: the labels are one more
    ("train_X.bin", bytes(3 * 96 * 96 + 5)),
    ("train_X.bin", b""),
    ("train_y.bin", bytes([1, 2, 3])),
    ("train_y.bin", bytes([1, 2, 3, 0])),  # labels are stored from 1
    ("train_y.bin", bytes([1, 2, 3, 11])),
    ("class_names.txt", b"class0\nclass1"),
    ("fold_indices.txt", b"0 1\n2 "),
    ("fold_indices.txt", b"0 1\n2 9\n"),
    ("fold_indices.txt", b"\x89PNG\xff\xfe"),
])
def test_a_damaged_stl10_file_is_refused_and_its_folder_named(tmp_path, name, content):
    where = make_stl10(tmp_path)
    assert len(data.load("stl10", "train", tmp_path)) == 4
    (where / name).write_bytes(content)
    message = refusal(data.load, "stl10", "train", tmp_path)
    assert str(where) in message and "delete" in message


# --- image files of every kind --------------------------------------------------------------------


def test_images_of_every_mode_show_their_color(tmp_path):
    full, none = 255, 0
    gray16 = np.full((16, 20), 40_000, dtype=np.uint16)
    made = {
        "rgb.jpg": (Image.new("RGB", (20, 16), (255, 0, 0)), RED),
        "palette.png": (Image.new("RGB", (20, 16), (255, 0, 0)).convert("P"), RED),
        "gray.png": (Image.new("L", (20, 16), 70), [70] * 3),
        "gray_alpha.png": (Image.new("LA", (20, 16), (70, full)), [70] * 3),
        "clear_gray.png": (Image.new("LA", (20, 16), (70, none)), WHITE),
        "rgba.png": (Image.new("RGBA", (20, 16), (255, 0, 0, full)), RED),
        "clear.png": (Image.new("RGBA", (20, 16), (0, 0, 0, none)), WHITE),
        "half_clear.webp": (Image.new("RGBA", (20, 16), (0, 0, 0, 128)), [127] * 3),
        "cmyk.jpg": (Image.new("CMYK", (20, 16), (0, 255, 255, 0)), RED),
        "cmyk.tif": (Image.new("CMYK", (20, 16), (0, 255, 255, 0)), RED),
        "gray16.png": (Image.fromarray(gray16), [40_000 // 256] * 3),
        "gray16.tif": (Image.fromarray(gray16), [40_000 // 256] * 3),
        "big_endian.tif": (Image.fromarray(gray16.astype(">u2")), [40_000 // 256] * 3),
        "one_bit.png": (Image.new("1", (20, 16), 1), WHITE),
        "ycbcr.tif": (Image.new("YCbCr", (20, 16), (76, 85, 255)), RED),
    }
    for name, (image, color) in made.items():
        where = tmp_path / name.replace(".", "_")
        where.mkdir()
        image.save(where / name)
        assert middle(where) == pytest.approx(color, abs=3), name  # JPEG and YCbCr round


def test_a_palettes_transparent_color_becomes_white(tmp_path):
    for name in ("one.png", "several.png", "x.gif"):
        image = Image.new("P", (20, 16), 1)
        image.putpalette([0, 0, 0, 0, 255, 0] + [0] * 762)
        (tmp_path / name).mkdir()
        several = name == "several.png"
        image.save(tmp_path / name / name, transparency=bytes([255, 0]) if several else 1)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert middle(tmp_path / name) == WHITE


@pytest.mark.parametrize("name", ["x.gif", "x.webp", "x.png", "x.tif"])
def test_of_an_animation_the_first_frame_is_taken(tmp_path, name):
    first, second = (Image.new("RGB", (20, 16), tuple(color)) for color in (RED, BLUE))
    first.save(tmp_path / name, save_all=True, append_images=[second])
    with Image.open(tmp_path / name) as image:
        assert image.n_frames == 2
    assert middle(tmp_path) == pytest.approx(RED, abs=3)


def test_a_photograph_is_turned_upright(tmp_path):
    image = Image.new("RGB", (16, 16), (255, 0, 0))
    image.paste((0, 0, 255), (0, 0, 16, 8))  # as stored: blue above, red below
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise: what is stored on the left belongs on top
    image.save(tmp_path / "x.jpg", exif=exif, quality=100, subsampling=0)
    (upright,) = load(tmp_path).images
    left, right = upright[:, 4, 1].tolist(), upright[:, 4, 6].tolist()
    assert left == pytest.approx(RED, abs=9) and right == pytest.approx(BLUE, abs=9)


def test_damaged_exif_data_costs_neither_the_image_nor_a_warning(tmp_path, recwarn):
    exif = Image.Exif()
    exif[0x0112] = 6
    for cut in range(6, len(exif.tobytes())):
        Image.new("RGB", (20, 16)).save(tmp_path / f"{cut}.jpg", exif=exif.tobytes()[:cut])
    assert len(load(tmp_path)) == len(exif.tobytes()) - 6 and not recwarn.list


def test_32_bit_pixels_are_left_out_since_nobody_knows_their_white(tmp_path, capsys):
    picture(tmp_path / "a.png")
    Image.fromarray(np.full((16, 20), 0.5, dtype=np.float32)).save(tmp_path / "b.tif")
    Image.fromarray(np.full((16, 20), 2**20, dtype=np.int32)).save(tmp_path / "c.tif")
    Image.fromarray(np.full((16, 20), 2**15, dtype=np.int32)).save(tmp_path / "d.tif")  # 16 bits
    assert load(tmp_path).images[:, 0, 4, 4].tolist() == [255, 128]
    out = capsys.readouterr().out
    assert "2 of 4" in out and "b.tif: mode F: 32-bit pixels" in out
    (tmp_path / "a.png").unlink()
    (tmp_path / "d.tif").unlink()
    assert "save it with 8 or 16 bits" in refusal(load, tmp_path)


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 1), (3, 2), (640, 480)])
def test_images_of_any_size_become_squares_of_the_size_asked_for(tmp_path, size):
    picture(tmp_path / "x.png", size=size)
    picture(tmp_path / "y.png")
    images = load(tmp_path).images
    assert images.shape == (2, 3, SIZE, SIZE)
    assert (images == torch.tensor(RED).view(1, 3, 1, 1)).all()


# --- files that are no images ---------------------------------------------------------------------


def truncated_jpeg(path):
    values = np.random.default_rng(0).integers(0, 256, (160, 200, 3), np.uint8)
    Image.fromarray(values).save(path)
    path.write_bytes(path.read_bytes()[:20_000])


def bomb(path):
    """272 million pixels in a few kilobytes: refused without being decoded."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Image, "MAX_IMAGE_PIXELS", None)
        Image.new("1", (17_000, 16_000)).save(path, format="PNG")


FAULTS = {
    "no image": (broken, "cannot identify image file"),
    "empty": (Path.touch, "cannot identify image file"),
    "truncated": (truncated_jpeg, "truncated"),
    "dangling link": (lambda path: path.symlink_to(path.parent / "gone.jpg"), "No such file"),
    "bomb": (bomb, "decompression bomb"),
}


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_file_that_is_no_image_costs_only_itself_and_is_named_once(
        tmp_path, capsys, monkeypatch, recwarn, fault, lazy):
    make, why = FAULTS[fault]
    picture(tmp_path / "a.png", (0, 0, 255))
    make(tmp_path / "b.jpg")
    picture(tmp_path / "c.png")
    monkeypatch.setattr("support.layout.MEMORY_LIMIT", 0 if lazy else 2**30)
    dataset = load(tmp_path)
    seen = [dataset.images[[i]] for i in range(len(dataset)) for _ in range(2)]
    expected = [BLUE, BLUE, *([RED, RED] if lazy else []), RED, RED]  # b is replaced by the next, c
    assert torch.cat(seen)[:, :, 4, 4].tolist() == expected
    out, err = capsys.readouterr()
    (line,) = [line for line in (out + err).splitlines() if "b.jpg" in line]
    assert str(tmp_path / "b.jpg") in line and why in line
    assert ("replaces it" if lazy else "1 of 3") in line
    assert not recwarn.list


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="Windows forbids nobody to read by mode")
def test_a_file_and_a_folder_that_may_not_be_read_are_left_out_and_named(capsys):
    place = Path(tempfile.mkdtemp())  # not tmp_path, into which only its owner may look
    try:
        place.chmod(0o755)
        picture(place / "cat" / "1.png")
        picture(place / "cat" / "2.png").chmod(0)
        picture(place / "dog" / "1.png")
        picture(place / "dog" / "secret" / "1.png")
        (place / "dog" / "secret").chmod(0)
        Image.init()
        root = os.geteuid() == 0
        if root:  # root may read everything: be somebody else for a moment
            os.seteuid(65534)
        try:
            labels = load(place).labels.tolist()
        finally:
            if root:
                os.seteuid(0)
    finally:
        shutil.rmtree(place)
    out = capsys.readouterr().out
    assert labels == [0, 1]
    assert f"1 of 3 images could not be decoded and are left out (first: {place}/cat/2.png" in out
    assert "Permission denied" in out
    assert f"cannot open the folder {place / 'dog' / 'secret'}" in out


def test_one_corrupt_jpeg_in_ten_thousand_leaves_the_others_their_labels(tmp_path, capsys):
    for k in range(10):
        one = picture(tmp_path / f"class{k}" / "0000.jpg", (25 * k, 0, 0))
        for i in range(1, 1000):
            os.link(one, one.with_name(f"{i:04}.jpg"))
    bad = tmp_path / "class3" / "0500.jpg"
    bad.unlink()
    bad.write_bytes(one.read_bytes()[:-100])
    dataset = load(tmp_path)
    assert torch.bincount(dataset.labels).tolist() == [1000] * 3 + [999] + [1000] * 6
    red = dataset.images[:, 0, 4, 4].float()
    assert all((red[dataset.labels == k] - 25 * k).abs().max() < 3 for k in range(10))
    assert f"1 of 10000 images could not be decoded and are left out (first: {bad}:" in (
        capsys.readouterr().out)


# --- a folder too large for memory ----------------------------------------------------------------


@pytest.fixture
def lazy(tmp_path, monkeypatch):
    """Ten red images of class a, ten blue of b; broken are the last two of a, and one of b."""
    for i in range(10):
        for name, color in (("a", (10 * i + 10, 0, 0)), ("b", (0, 0, 10 * i + 10))):
            path = tmp_path / name / f"{i}.png"
            if (name, i) in (("a", 8), ("a", 9), ("b", 4)):
                broken(path)
            else:
                picture(path, color)
    monkeypatch.setattr("support.layout.MEMORY_LIMIT", 0)
    return tmp_path


def test_a_broken_file_is_replaced_by_the_next_of_its_class(lazy):
    images = load(lazy).images[[7, 8, 9, 14]][:, :, 4, 4]  # after the last of a, the first of a
    assert images.tolist() == [[80, 0, 0], [10, 0, 0], [10, 0, 0], [0, 0, 60]]


def test_the_only_file_of_a_class_is_replaced_by_one_of_another(tmp_path, monkeypatch):
    broken(tmp_path / "a" / "1.png")
    picture(tmp_path / "b" / "1.png")
    monkeypatch.setattr("support.layout.MEMORY_LIMIT", 0)
    assert load(tmp_path).images[0][:, 4, 4].tolist() == RED


@pytest.mark.parametrize("workers", [0, 2])
def test_a_replacement_depends_on_the_files_alone_and_is_reported_once(lazy, capsys, workers):
    def seen(dataset, order):
        images = torch.cat(list(data.batches(dataset, 3, SIZE, order=order, workers=workers)))
        return images[order.argsort()]

    forwards, backwards = torch.arange(20), torch.arange(19, -1, -1)
    dataset = load(lazy)
    first = seen(dataset, forwards)
    assert torch.equal(first, seen(dataset, backwards))
    assert torch.equal(first, seen(load(lazy), backwards))  # whatever was read before
    some = load(lazy).subset([9, 14])
    assert torch.equal(first[[9, 14]], seen(some, torch.arange(2)))  # a subset asks all the files
    assert load(lazy).describe() == dataset.describe()
    capsys.readouterr()
    again = load(lazy)
    for _ in range(3):
        seen(again, forwards), seen(again.subset(range(20)), backwards)
    lines = [line for line in capsys.readouterr().err.splitlines() if "cannot decode" in line]
    assert len(lines) == 3 and all("replaces it" in line for line in lines)


@pytest.mark.parametrize("workers", [0, 1])
def test_more_than_a_few_broken_files_end_the_run_in_one_line(tmp_path, monkeypatch, workers):
    monkeypatch.setattr("support.layout.MEMORY_LIMIT", 0)
    for i in range(40):
        (broken if i % 4 == 0 and i else picture)(tmp_path / f"{i:02}.png")
    dataset = load(tmp_path)
    assert len(list(data.batches(dataset, 4, SIZE, workers=workers))) == 10  # nine are a few
    for i in (1, 3):
        broken(tmp_path / f"{i:02}.png")
    message = refusal(list, data.batches(dataset, 4, SIZE, workers=workers))
    assert message.startswith("11 of 40 image files could not be decoded")
    assert str(tmp_path / "04.png") in message


def test_a_few_are_one_in_a_hundred():
    many = folder.LazyFolder(["x.png"] * 2000, None, SIZE)
    assert not many.too_many(range(20)) and many.too_many(range(21))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_large_folder_of_broken_files_only_is_refused(tmp_path, monkeypatch, workers):
    monkeypatch.setattr("support.layout.MEMORY_LIMIT", 0)
    for i in range(3):
        broken(tmp_path / f"{i}.png")
    message = refusal(list, data.batches(load(tmp_path), 2, SIZE, workers=workers))
    assert "3 of 3 image files could not be decoded" in message


def test_a_run_on_a_large_folder_with_a_broken_file_ends_well(lazy, tmp_path, capsys):
    train.main(["--dataset", str(lazy), "--image-size", "24", "--batch-size", "4", "--max-steps",
                "3", "--workers", "1", "--device", "cpu", "--encoder", "16x1x2", "--predictor",
                "16x1x2", "--context-size", "4", "--out", str(tmp_path / "run")])
    out, err = capsys.readouterr()
    assert "3 steps in" in out and 1 <= err.count("replaces it") <= 3 and "Traceback" not in err


# --- folders --------------------------------------------------------------------------------------

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="other systems forbid the name")


@pytest.mark.parametrize("name", [
    "with a space", "größe 猫", pytest.param("two\nlines", marks=LINUX),
    pytest.param(os.fsdecode(b"latin\xe9"), marks=LINUX)], ids=ascii)
def test_names_with_spaces_accents_line_breaks_and_bytes_that_are_no_text(tmp_path, capsys, name):
    good = picture(tmp_path / name / f"{name}.png")
    broken(tmp_path / name / f"a{name}.png")
    (tmp_path / f"{name} empty").mkdir()
    assert load(tmp_path).class_names == [name]
    out = capsys.readouterr().out
    out.encode()  # it can be printed
    assert len(out.splitlines()) == 2 and "1 of 2 images" in out and "1 folders" in out
    good.unlink()
    refusal(load, tmp_path).encode()


def test_links_in_a_circle_end_and_no_image_is_read_twice(tmp_path):
    picture(tmp_path / "cat" / "1.png")
    picture(tmp_path / "dog" / "1.png")
    elsewhere = tmp_path.parent / (tmp_path.name + "_linked")
    elsewhere.mkdir()
    (elsewhere / "cat").symlink_to(tmp_path / "cat")  # a class that is stored elsewhere
    assert load(elsewhere).class_names == ["cat"] and len(load(elsewhere)) == 1
    for link, target in (
            ("cat/all", tmp_path), ("cat/itself", tmp_path / "cat"),
            ("cat/self", tmp_path / "cat" / "self"), ("dog/other", tmp_path / "cat"),
            ("alias", tmp_path / "cat")):
        (tmp_path / link).symlink_to(target)
    dataset = load(tmp_path)
    assert dataset.labels.tolist() == [0, 1] and dataset.class_names == ["cat", "dog"]


def test_an_empty_class_folder_has_no_number_and_a_line_says_so(tmp_path, capsys):
    picture(tmp_path / "ant" / "1.png")
    (tmp_path / "bee").mkdir()
    (tmp_path / "cow" / "notes").mkdir(parents=True)
    picture(tmp_path / "dog" / "1.png")
    dataset = load(tmp_path)
    assert dataset.class_names == ["ant", "dog"] and dataset.labels.tolist() == [0, 1]
    assert (f"2 folders in {tmp_path} hold no image of their own (first: bee); they get no class "
            "number") in capsys.readouterr().out


def test_a_class_all_of_whose_files_are_broken_keeps_its_number(tmp_path):
    for name in ("ant", "bee", "cow"):
        (broken if name == "bee" else picture)(tmp_path / name / "1.png")
    dataset = load(tmp_path)
    assert dataset.class_names == ["ant", "bee", "cow"] and dataset.labels.tolist() == [0, 2]


def test_a_folder_with_one_image_is_read_and_training_on_it_is_refused(tmp_path):
    picture(tmp_path / "1.png")
    assert len(load(tmp_path)) == 1
    message = refusal(train.main, ["--dataset", str(tmp_path), "--device", "cpu",
                                   "--out", str(tmp_path / "run")])
    assert "1 images to train on" in message


def test_a_folder_of_broken_files_only_is_refused(tmp_path, capsys):
    for i in range(3):
        broken(tmp_path / f"{i}.png")
    message = refusal(load, tmp_path)
    assert message.startswith("none of the 3 image files could be decoded")
    assert str(tmp_path / "0.png") in message and capsys.readouterr().out == ""


def test_files_are_listed_in_the_same_order_on_every_walk(tmp_path):
    for name in ("b", "a", "a/deep", "c"):
        for i in (2, 10, 1):
            picture(tmp_path / name / f"{i}.png")
    paths = layout.image_files(tmp_path)
    assert paths == layout.image_files(tmp_path)
    assert [path[len(str(tmp_path)) + 1 :] for path in paths] == [
        f"{name}/{i}.png" for name in ("a", "a/deep", "b", "c") for i in (1, 10, 2)]


# --- .npz -----------------------------------------------------------------------------------------


def test_an_npz_cut_anywhere_or_with_a_flipped_bit_is_read_right_or_refused_by_name(tmp_path):
    path = tmp_path / "x.npz"
    images = np.random.default_rng(0).integers(0, 256, (20, 8, 8), np.uint8)
    np.savez_compressed(path, train_images=images, train_labels=np.arange(20))
    whole = path.read_bytes()
    for cut in [*range(0, len(whole), 37), len(whole) - 1]:
        path.write_bytes(whole[:cut])
        assert str(path) in refusal(data.load, str(path)), cut
    chance = random.Random(0)
    for _ in range(200):
        at = chance.randrange(len(whole))
        flipped = whole[at] ^ 1 << chance.randrange(8)
        path.write_bytes(whole[:at] + bytes([flipped]) + whole[at + 1 :])
        try:
            assert len(data.load(str(path))) == 20
        except UsageError as error:
            assert str(path) in str(error) and "\n" not in str(error)


@pytest.mark.parametrize("labels, why", [
    (np.arange(7), "one for each of the 5 images"),
    (np.arange(3), "one for each of the 5 images"),
    (np.zeros(5), "whole numbers"),
    (np.array(list("abcde")), "whole numbers"),
    (np.array([{}] * 5, dtype=object), "cannot read"),  # a pickle, which could run code
    (np.array(3), "one for each of the 5 images"),
    (np.zeros((5, 0), dtype=np.int64), "one for each of the 5 images"),
    (np.array([0, 1, 2, 3, -1]), "class numbers from 0"),
])
def test_labels_of_an_npz_that_do_not_fit_are_refused(tmp_path, labels, why):
    images = np.zeros((5, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "x.npz", train_images=images, train_labels=labels)
    message = refusal(data.load, str(tmp_path / "x.npz"))
    assert why in message and str(tmp_path / "x.npz") in message


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.uint16, np.uint64, np.int32])
def test_labels_of_an_npz_may_be_whole_numbers_of_any_type(tmp_path, dtype):
    labels = np.array([0, 1, 1, 0, 1]).astype(dtype)
    images = np.zeros((5, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "x.npz", train_images=images, train_labels=labels)
    assert data.load(str(tmp_path / "x.npz")).labels.tolist() == [0, 1, 1, 0, 1]
