"""Claims about data.py and its readers: images as they are known, one clear line for data that is
missing or damaged, crops as torchvision draws them, batches that depend on the seed alone."""

import math
import os
import pickle
import random
import time

import numpy as np
import pytest
import torch
from PIL import Image

import data
import train
from config import UsageError, from_preset
from support import npz, readers
from support.folder import LazyFolder


def refusal(call, *args, **kwargs):
    """The message of the UsageError that the call raises, checked to be one line."""
    with pytest.raises(UsageError) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def noise(*shape, seed=0):
    return torch.randint(0, 256, shape, generator=seeded(seed), dtype=torch.uint8)


def dataset(images, labels=None):
    channels = images.shape[1]
    return data.ImageDataset("test", images, labels, None, (0.5,) * channels, (0.25,) * channels)


def save(folder, name, mode="RGB", color=None, size=(40, 30)):
    folder.mkdir(parents=True, exist_ok=True)
    values = noise(size[1], size[0], 3, seed=len(name)).numpy()
    image = Image.fromarray(values) if color is None else Image.new("RGB", size, color)
    image.convert(mode).save(folder / name)


def make_cifar10(root, protocol=2):
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    for k, name in enumerate([f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]):
        content = {b"data": noise(4, 3072, seed=k).numpy(), b"labels": [k, 1, 2, 3],
                   b"batch_label": name.encode()}
        (folder / name).write_bytes(pickle.dumps(content, protocol))
    names = {b"label_names": [b"class%d" % i for i in range(10)]}
    (folder / "batches.meta").write_bytes(pickle.dumps(names, protocol))
    return folder


def make_stl10(root, n=4):
    folder = root / "stl10_binary"
    folder.mkdir(parents=True)
    images = np.zeros((n, 3, 96, 96), dtype=np.uint8)
    images[0, 0, 5, 80] = 200  # one red point near the top (row 5), to the right (column 80)
    columns = images.transpose(0, 1, 3, 2).tobytes()  # column after column
    for part in ("train", "test", "unlabeled"):
        (folder / f"{part}_X.bin").write_bytes(columns)
    for part in ("train", "test"):
        (folder / f"{part}_y.bin").write_bytes(bytes([10, *range(1, n)]))
    (folder / "class_names.txt").write_text("\n".join(f"class{i}" for i in range(10)) + "\n")
    (folder / "fold_indices.txt").write_text("0 1 \n" * 5 + "2 3 \n" * 5)
    return folder


# --- CIFAR, STL-10, the synthetic images ----------------------------------------------------------


@pytest.mark.parametrize("protocol", [2, 5])
def test_cifar10_rows_columns_and_labels(tmp_path, protocol):
    make_cifar10(tmp_path, protocol)
    train_set = data.load("cifar10", "train", tmp_path)
    assert train_set.images.shape == (20, 3, 32, 32)
    flat = noise(4, 3072, seed=1)[0]  # the second file's first image: red row by row, green, blue
    assert train_set.images[4, 1, 3, 7] == flat[1024 + 3 * 32 + 7]
    assert train_set.labels[4] == 1 and train_set.labels[16] == 4
    assert train_set.labels.dtype == torch.int64 and train_set.class_names[1] == "class1"
    assert data.load("cifar10", "test", tmp_path).labels.tolist() == [5, 1, 2, 3]


def test_cifar100_takes_the_fine_labels(tmp_path):
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    pixels = noise(2, 3072).numpy()
    for part in ("train", "test"):
        content = {b"data": pixels, b"fine_labels": [99, 3], b"coarse_labels": [1, 2]}
        (folder / part).write_bytes(pickle.dumps(content, 2))
    names = {b"fine_label_names": [b"fine%d" % i for i in range(100)],
             b"coarse_label_names": [b"coarse"]}
    (folder / "meta").write_bytes(pickle.dumps(names, 2))
    test = data.load("cifar100", "test", tmp_path)
    assert test.labels.tolist() == [99, 3] and test.class_names[99] == "fine99"
    assert torch.equal(test.images, torch.from_numpy(pixels).view(2, 3, 32, 32))


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    folder = make_cifar10(tmp_path)
    code = b"cos\nsystem\n(S'touch " + str(tmp_path / "ran").encode() + b"'\ntR."
    (folder / "data_batch_2").write_bytes(code)
    message = refusal(data.load, "cifar10", "train", tmp_path)
    assert "data_batch_2" in message and "os.system" in message
    assert not (tmp_path / "ran").exists()


def test_a_missing_file_of_a_data_set_is_named(tmp_path):
    path = make_cifar10(tmp_path) / "data_batch_3"
    path.unlink()
    assert str(path) in refusal(data.load, "cifar10", "train", tmp_path)


def test_stl10_images_are_upright_and_labels_start_at_zero(tmp_path):
    make_stl10(tmp_path)
    train_set = data.load("stl10", "train", tmp_path)
    assert train_set.images.shape == (4, 3, 96, 96) and train_set.images.dtype == torch.uint8
    assert train_set.images[0].nonzero().tolist() == [[0, 5, 80]]
    assert train_set.images.is_contiguous()
    assert train_set.labels.tolist() == [9, 0, 1, 2] and train_set.labels.dtype == torch.int64
    assert [fold.tolist() for fold in train_set.folds] == [[0, 1]] * 5 + [[2, 3]] * 5
    assert train_set.class_names[9] == "class9"
    assert data.load("stl10", "test", tmp_path).folds is None
    both = data.load("stl10", "train+unlabeled", tmp_path)
    assert both.labels is None and len(both) == 8
    assert both.images[4].nonzero().tolist() == [[0, 5, 80]]


def test_stl10_can_be_read_without_its_folds_and_without_its_unlabeled_images(tmp_path, capsys):
    folder = make_stl10(tmp_path)
    (folder / "unlabeled_X.bin").unlink()
    (folder / "fold_indices.txt").unlink()
    assert len(data.load("stl10", "test", tmp_path)) == 4 and capsys.readouterr().out == ""
    train_set = data.load("stl10", "train", tmp_path)
    assert train_set.folds is None and train_set.labels.tolist() == [9, 0, 1, 2]
    assert capsys.readouterr().out == (
        f"{folder} has no fold_indices.txt; STL-10 is read without its ten folds\n")
    message = refusal(data.load, "stl10", "unlabeled", tmp_path)
    assert "has no unlabeled_X.bin; choose --split train" in message
    alone = data.load("stl10", "train+unlabeled", tmp_path)  # what the preset asks for
    assert torch.equal(alone.images, train_set.images)
    assert "has no unlabeled_X.bin; its labeled training images" in capsys.readouterr().out


def test_shapes_need_no_file_and_their_statistics_are_those_of_the_images():
    test = data.load("shapes", "test")
    assert test.images.dtype == torch.uint8 and test.images.shape[1:] == (3, 24, 24)
    assert len(test.labels) == len(test) and test.labels.max() + 1 == len(test.class_names)
    for known, measured in zip((test.mean, test.std), npz.measure(test.images)):
        assert known == pytest.approx(measured, abs=0.005)


def test_measured_statistics_are_those_of_torch():
    images = noise(10, 3, 8, 8)
    mean, std = npz.measure(images)
    pixels = images.double().div(255).transpose(0, 1).flatten(1)
    assert mean == pytest.approx(pixels.mean(1).tolist(), abs=1e-6)
    assert std == pytest.approx(pixels.std(1, correction=0).tolist(), abs=1e-6)


# --- names ----------------------------------------------------------------------------------------


def test_unknown_names_and_splits_list_what_is_allowed():
    message = refusal(data.load, "cifr10")
    assert message.startswith(f"--dataset is 'cifr10', expected one of {', '.join(readers.NAMED)}, "
                              f"a folder of images, or a .npz file ({os.getcwd()}")
    assert message.endswith("did you mean cifar10?")
    assert "/no/such/folder is neither" in refusal(data.load, "/no/such/folder")
    assert "/no/such/file.npz" in refusal(data.load, "/no/such/file.npz")
    assert "train, test" in refusal(data.load, "cifar10", "unlabeled")
    assert "did you mean unlabeled?" in refusal(data.load, "stl10", "unlabled")


@pytest.mark.parametrize("name", ["cifar10", "shapes", "organmnist3d"])
def test_a_folder_of_images_with_the_name_of_a_data_set_is_never_confused_with_it(
        tmp_path, monkeypatch, name):
    """Read for its path; for the bare name neither is chosen silently, and nothing downloaded."""
    def no_download(*args):
        raise AssertionError("a download was started")

    monkeypatch.setattr("support.download.download", no_download)
    monkeypatch.chdir(tmp_path)
    save(tmp_path / name, "1.png")
    save(tmp_path / "data" / name, "1.png")
    for path in (f"./{name}", f"{name}/", f"data/{name}", str(tmp_path / name)):
        folder = data.load(path, image_size=8)
        assert len(folder) == 1 and folder.labels is None and folder.name == name
        assert folder.mean == data.STATISTICS["folder"][0]
    assert f"write ./{name} to read it" in refusal(data.load, name)


def test_a_folder_without_images_does_not_hide_the_data_set_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cifar10").mkdir()
    make_cifar10(tmp_path / "cifar10")
    assert len(data.load("cifar10", "test", "cifar10")) == 4


def test_training_on_a_folder_called_stl10_does_not_ask_for_the_real_one(tmp_path, monkeypatch):
    """STL-10's unlabeled images are measured with its labeled ones; this folder is not STL-10."""
    monkeypatch.chdir(tmp_path)
    for i in range(8):
        save(tmp_path / "stl10", f"{i}.png")
    config = from_preset("shapes", dataset="./stl10")
    folder = data.load(config.dataset, image_size=24)
    loaded = []
    monkeypatch.setattr(data, "load", lambda *args: loaded.append(args))
    assert train.monitor(config, folder.subset([0] * 64), torch.arange(32), torch.arange(32, 64))
    assert loaded == []


# --- image folders --------------------------------------------------------------------------------


def test_class_folders_give_sorted_labels_and_a_flat_folder_none(tmp_path):
    save(tmp_path / "pets" / "dog", "1.png", color=(255, 0, 0))
    save(tmp_path / "pets" / "cat", "2.JPG", color=(0, 0, 255))
    save(tmp_path / "pets" / "cat" / "deeper", "3.bmp", color=(0, 255, 0))
    (tmp_path / "pets" / "notes").mkdir()  # a folder without images is no class
    (tmp_path / "pets" / "cat" / "._2.jpg").write_bytes(b"macOS")
    pets = data.load(str(tmp_path / "pets"), image_size=16)
    assert pets.class_names == ["cat", "dog"] and pets.labels.tolist() == [0, 0, 1]
    assert pets.images.shape == (3, 3, 16, 16)
    assert pets.images[2, :, 8, 8].tolist() == [255, 0, 0]
    flat = data.load(str(tmp_path / "pets" / "dog"), image_size=16)
    assert flat.labels is None and flat.class_names is None and len(flat) == 1


def test_train_and_val_folders_are_the_splits_and_share_class_numbers(tmp_path):
    for name in ("cat", "dog"):
        save(tmp_path / "train" / name, "1.png")
    save(tmp_path / "val" / "dog", "2.png")
    assert data.load(str(tmp_path), "train", image_size=8).labels.tolist() == [0, 1]
    test = data.load(str(tmp_path), "test", image_size=8)
    assert test.labels.tolist() == [1] and test.class_names == ["cat", "dog"]
    save(tmp_path / "val" / "emu", "3.png")
    assert "emu" in refusal(data.load, str(tmp_path), "val", image_size=8)
    assert "expected one of train" in refusal(data.load, str(tmp_path / "train"), "test")


def test_the_center_of_a_wide_image_is_kept(tmp_path):
    image = np.zeros((10, 30, 3), dtype=np.uint8)
    image[:, 10:20] = 255
    Image.fromarray(image).save(tmp_path / "wide.png")
    assert (data.load(str(tmp_path), image_size=10).images == 255).all()


def test_images_that_are_not_rgb_are_converted_and_counted(tmp_path, capsys):
    save(tmp_path, "a.png", color=(10, 200, 30))
    for name, mode in (("b.png", "L"), ("c.gif", "P"), ("d.png", "RGBA")):
        save(tmp_path, name, mode, color=(10, 200, 30))
    half = np.full((30, 40), 128 * 256, dtype=np.uint16)
    Image.fromarray(half).save(tmp_path / "e.png")  # 16-bit gray, half way
    images = data.load(str(tmp_path), image_size=8).images
    assert (f"4 of 5 images were not RGB and were converted (first: {tmp_path / 'b.png'}, mode L)"
            in capsys.readouterr().out)
    for i in (0, 2, 3):
        assert images[i, :, 4, 4].tolist() == pytest.approx([10, 200, 30], abs=8)  # GIF's palette
    assert images[1, 0, 4, 4] == images[1, 2, 4, 4]
    assert images[4, :, 4, 4].tolist() == [128] * 3


def test_undecodable_images_are_left_out_with_their_labels_unless_none_is_left(tmp_path, capsys):
    save(tmp_path / "cat", "1.png")
    (tmp_path / "cat" / "0.png").write_bytes(b"not an image")
    save(tmp_path / "dog", "1.png")
    assert data.load(str(tmp_path), image_size=8).labels.tolist() == [0, 1]
    out, first = capsys.readouterr().out, tmp_path / "cat" / "0.png"
    assert f"1 of 3 images could not be decoded and are left out (first: {first}: cannot" in out
    (tmp_path / "cat" / "1.png").unlink()
    (tmp_path / "dog" / "1.png").unlink()
    assert "0.png" in refusal(data.load, str(tmp_path), image_size=8)


def test_an_empty_folder_says_what_was_looked_for_and_where(tmp_path):
    message = refusal(data.load, str(tmp_path))
    assert str(tmp_path) in message and ".jpg" in message and ".tiff" in message


def test_a_lazy_folder_gives_the_pixels_of_the_one_in_memory(tmp_path, monkeypatch):
    for i in range(5):
        save(tmp_path / "ab"[i % 2], "x" * (i + 1) + ".png")
    memory = data.load(str(tmp_path), image_size=12)
    monkeypatch.setattr("support.layout.MEMORY_LIMIT", 0)
    lazy = data.load(str(tmp_path), image_size=12)
    assert isinstance(lazy.images, LazyFolder) and torch.equal(lazy.labels, memory.labels)
    assert lazy.shape == memory.shape == (3, 2) and len(lazy) == len(memory)
    assert torch.equal(lazy.in_memory().images, memory.images)
    assert isinstance(lazy.images, LazyFolder)  # in_memory returns another one
    order = torch.tensor([3, 0, 4])
    assert torch.equal(lazy.images[order], memory.images[order])
    assert torch.equal(lazy.images[1], memory.images[1])
    assert torch.equal(lazy.subset([4]).images[0], memory.subset([4]).images[0])
    before = torch.get_rng_state()
    for workers in (0, 1):
        pairs = zip(data.batches(lazy, 2, 12, order=order, workers=workers),
                    data.batches(memory, 2, 12, order=order), strict=True)
        for one, other in pairs:
            assert torch.equal(one, other)
    assert torch.equal(before, torch.get_rng_state())  # the loader left the global generator alone


# --- .npz files -----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape, expected", [
    ((6, 9, 8), (6, 1, 9, 8)),
    ((6, 9, 8, 3), (6, 3, 9, 8)),
    ((6, 5, 9, 8), (6, 1, 5, 9, 8)),
    ((6, 5, 9, 8, 2), (6, 2, 5, 9, 8)),
])
def test_npz_gray_color_and_volumes(tmp_path, shape, expected):
    values = noise(*shape).numpy()
    np.savez(tmp_path / "x.npz", train_images=values, test_images=values[:2] // 2,
             train_labels=np.arange(6)[:, None].astype(np.uint8))
    train_set = data.load(str(tmp_path / "x.npz"))
    assert train_set.images.shape == expected and len(train_set.mean) == expected[1]
    channels_last = train_set.images.movedim(1, -1).numpy()
    assert (channels_last == values.reshape(channels_last.shape)).all()
    assert train_set.labels.tolist() == list(range(6)) and train_set.labels.dtype == torch.int64
    test = data.load(str(tmp_path / "x.npz"), "test")
    assert test.labels is None and test.mean == train_set.mean  # normalized as training images are


def test_npz_refuses_what_it_cannot_mean(tmp_path, capsys):
    path = tmp_path / "x.npz"
    images = np.zeros((2, 4, 4), dtype=np.uint8)
    np.savez(path, train_images=images.astype(np.float32))
    message = refusal(data.load, str(path))
    assert str(path) in message and "train_images is float32, expected uint8" in message
    np.savez(path, train_images=images[0])
    assert "(4, 4)" in refusal(data.load, str(path))
    for shape in ((2, 2, 32, 32), (2, 32, 32, 2)):  # two channels: no volumes
        np.savez(path, train_images=np.zeros(shape, np.uint8))
        assert f"{shape}, expected n,H,W or n,H,W,3" in refusal(data.load, str(path))
    np.savez(path, train_images=images, train_labels=np.zeros(3, dtype=np.int64))
    assert "train_labels" in refusal(data.load, str(path))
    assert "expected one of train" in refusal(data.load, str(path), "val")
    np.savez(path, images=images)
    assert "train_images" in refusal(data.load, str(path))
    np.savez(path, train_images=np.array([{}], dtype=object))  # a pickle: could run code
    assert str(path) in refusal(data.load, str(path))
    np.savez(path, train_images=images, train_labels=np.zeros((2, 3), dtype=np.int64))
    assert data.load(str(path)).labels is None
    assert "3 labels" in capsys.readouterr().out


# --- augmentation ---------------------------------------------------------------------------------


def draws_for(shape, seed=0):
    """The random numbers that crops of images of this shape need."""
    return torch.rand(shape[0], 2 * data.TRIES + len(shape) - 2, generator=seeded(seed))


@pytest.mark.parametrize("shape, size", [
    ((4, 3, 24, 24), 24), ((4, 3, 24, 24), 40), ((4, 3, 24, 24), 10), ((2, 3, 20, 30), 20),
    ((2, 1, 9, 8, 8), 8)])
def test_a_crop_of_everything_is_the_resized_image(shape, size):
    images = noise(*shape).float() / 255
    crops = data.random_resized_crop(images, size, (1.0, 1.0), draws_for(shape))
    torch.testing.assert_close(crops, data.resize(images, size), atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", [(2000, 3, 24, 24), (2000, 3, 20, 40), (2000, 1, 16, 16, 16)])
def test_crop_boxes_lie_inside_with_the_area_and_aspect_asked_for(shape):
    half, center = data.crop_boxes(draws_for(shape), (0.2, 0.4), shape[2:])
    assert (half + center.abs()).max() <= 1 + 1e-6
    assert (half + center.abs()).amax() > 0.99  # boxes reach the edge
    area = half.prod(1)
    assert 0.2 - 1e-5 <= area.min() < 0.21 and 0.39 < area.max() <= 0.4 + 1e-5
    aspect = half[:, 0] * shape[-1] / (half[:, 1] * shape[-2])
    assert 3 / 4 - 1e-5 <= aspect.min() < 0.76 and 1.31 < aspect.max() <= 4 / 3 + 1e-5
    assert abs(aspect.log().mean()) < 0.02 and abs(center.mean()) < 0.02


def torchvision_box(height, width, scale, chance, ratio=(3 / 4, 4 / 3)):
    """Height and width of RandomResizedCrop's box, by its published rule, in whole pixels."""
    for _ in range(10):
        area = height * width * chance.uniform(*scale)
        aspect = math.exp(chance.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return h, w
    if width / height < min(ratio):
        return round(width / min(ratio)), width
    if width / height > max(ratio):
        return height, round(height * max(ratio))
    return height, width


@pytest.mark.parametrize("scale", [(0.3, 1.0), (0.6, 1.0), (0.08, 1.0), (0.97, 1.0)])
@pytest.mark.parametrize("shape", [(100_000, 100_000), (90_000, 110_000)])
def test_crops_have_the_statistics_of_torchvisions(scale, shape):
    """Mean area, spread of the area, and the share of crops that span a full side, or both.

    Each within 4 standard errors of the difference. The images are huge, as torchvision rounds its
    boxes to pixels and we do not; a side of 99.99% is full.
    """
    n, chance = 20_000, random.Random(0)
    boxes = torch.tensor([torchvision_box(*shape, scale, chance) for _ in range(n)])
    theirs = boxes.flip(1) / torch.tensor(shape[::-1])  # [n, 2] as (x, y), fractions
    ours, _ = data.crop_boxes(draws_for((n, 3, *shape)), scale, shape)  # [n, 2]

    def statistics(side):
        area, full = side.prod(1).double(), side > 0.9999
        return torch.stack([area, (area - area.mean()) ** 2, full.any(1), full.all(1),
                            side[:, 0] / side[:, 1]])  # [5, n]

    one, other = statistics(theirs), statistics(ours)
    error = ((one.var(1) + other.var(1)) / n).sqrt()
    assert ((one.mean(1) - other.mean(1)).abs() <= 4 * error).all()


def test_a_crop_shows_the_place_of_its_box():
    ramp = torch.linspace(-1, 1, 64).expand(8, 1, 64, 64)  # a pixel's value is its x coordinate
    draws = draws_for(ramp.shape, 3)
    half, center = data.crop_boxes(draws, (0.1, 0.5), ramp.shape[2:])
    crops = data.random_resized_crop(ramp, 32, (0.1, 0.5), draws)
    # Pixel centers reach to 63/64 only, so the ramp is too steep by 1.6%.
    torch.testing.assert_close(crops.mean((1, 2, 3)), center[:, 0], atol=0.02, rtol=0)


def test_flips_mirror_about_half_the_images_and_leave_the_rest():
    small = dataset(noise(400, 1, 4, 4))
    images = next(data.batches(small, 400, 4))
    flipped = next(data.batches(small, 400, 4, generator=seeded(), flip=True))
    same = (flipped == images).flatten(1).all(1)
    mirrored = (flipped == images.flip(-1)).flatten(1).all(1)
    assert (same | mirrored).all() and 150 < mirrored.sum() < 250  # 5 standard deviations


def test_normalized_pixels_have_their_channels_mean_and_unit():
    pixels = torch.tensor([0, 255], dtype=torch.uint8).view(1, 2, 1, 1)
    assert data.normalize(pixels, (0.5, 0.5), (0.25, 0.5)).flatten().tolist() == [-2.0, 1.0]


# --- batches --------------------------------------------------------------------------------------


def test_batches_cover_each_image_once_in_order():
    numbers = torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1).expand(10, 1, 4, 4)

    def seen(**options):
        images = torch.cat(list(data.batches(dataset(numbers), 4, 4, **options)))
        return ((images[:, 0, 0, 0] * 0.25 + 0.5) * 255).round().tolist()

    assert [len(batch) for batch in data.batches(dataset(numbers), 4, 4)] == [4, 4, 2]
    assert seen() == list(range(10))
    assert seen(order=torch.tensor([7, 2, 2, 0, 9])) == [7, 2, 2, 0, 9]


@pytest.mark.parametrize("shape", [(6, 3, 24, 24), (6, 1, 12, 12, 12)])
def test_the_same_seed_gives_the_same_batch_and_another_seed_another(shape):
    small = dataset(noise(*shape))

    def draw(seed):
        return torch.cat(list(data.batches(small, 4, 8, generator=seeded(seed),
                                           crop_scale=(0.3, 1.0), flip=True)))

    assert draw(0).shape == (*shape[:2], *(8,) * (len(shape) - 2))
    assert torch.equal(draw(0), draw(0)) and not torch.equal(draw(0), draw(1))


def test_without_a_generator_nothing_is_random_whatever_is_asked():
    small = dataset(noise(3, 3, 8, 8))
    plain = next(data.batches(small, 3, 8))
    assert torch.equal(plain, next(data.batches(small, 3, 8, crop_scale=(0.3, 1.0), flip=True)))
    assert torch.equal(plain, data.normalize(small.images, small.mean, small.std))


@pytest.mark.parametrize("scale", [(0.0, 1.0), (0.5, 0.3), (0.5, 1.1), (math.nan, 1.0)])
def test_an_impossible_crop_is_refused(scale):
    batches = data.batches(dataset(noise(2, 3, 8, 8)), 2, 8, crop_scale=scale)
    assert "--crop-scale" in refusal(next, batches)


# --- changes are noticed --------------------------------------------------------------------------


def test_a_subset_keeps_labels_and_statistics():
    full = dataset(noise(10, 3, 4, 4), torch.arange(10))
    part = full.subset([8, 1])
    assert part.labels.tolist() == [8, 1] and torch.equal(part.images[1], full.images[1])
    assert part.mean == full.mean


def test_any_pixel_and_any_label_changes_what_a_checkpoint_keeps_of_its_data():
    images, labels = noise(200, 3, 4, 4), torch.arange(200) % 10
    known = dataset(images, labels).describe()
    assert known == dataset(images.clone(), labels.clone()).describe()
    assert {name: known[name] for name in ("images", "channels", "axes", "classes")} == {
        "images": 200, "channels": 3, "axes": 2, "classes": 10}
    for i in range(200):
        other, renamed = images.clone(), labels.clone()
        other[i, i % 3, i % 4, i // 4 % 4] ^= 1
        renamed[i] = (renamed[i] + 1) % 10
        assert dataset(other, labels).describe()["fingerprint"] != known["fingerprint"]
        assert dataset(images, renamed).describe()["fingerprint"] != known["fingerprint"]
    assert dataset(images).describe()["classes"] == 0


def test_any_name_and_any_size_changes_what_is_kept_of_a_folder_too_large_for_memory(
        tmp_path, monkeypatch):
    monkeypatch.setattr("support.layout.MEMORY_LIMIT", 0)
    for i in range(100):
        save(tmp_path / "all", f"{i:03}.png", color=(i, 0, 0), size=(4, 4))

    def fingerprint():
        return data.load(str(tmp_path / "all")).describe()["fingerprint"]

    known, path = fingerprint(), tmp_path / "all" / "057.png"
    (tmp_path / "all").rename(tmp_path / "moved")
    (tmp_path / "moved").rename(tmp_path / "all")
    assert fingerprint() == known
    content = path.read_bytes()
    path.write_bytes(content + b"\0")
    assert fingerprint() != known
    path.write_bytes(content)
    assert fingerprint() == known
    path.rename(path.with_name("057b.png"))
    assert fingerprint() != known


def test_a_run_whose_images_were_replaced_does_not_resume(tmp_path):
    """Same names, same sizes in pixels, same number: one image in forty was painted over."""
    for i in range(40):
        save(tmp_path / "images", f"{i}.png", color=(6 * i, 0, 0))
    words = ["--dataset", str(tmp_path / "images"), "--encoder", "16x1x2", "--predictor", "16x1x2",
             "--batch-size", "8", "--context-size", "4", "--max-steps", "1", "--device", "cpu",
             "--out", str(tmp_path / "run")]
    train.main(words)
    train.main([*words, "--resume"])
    save(tmp_path / "images", "33.png", color=(0, 255, 0))
    assert "fingerprint was" in refusal(train.main, [*words, "--resume"])
    train.main([*words, "--resume", "--override"])


def test_a_fingerprint_costs_little():
    """CIFAR-10's 154 MB take .2 s of one core; ten times that is allowed."""
    images = torch.zeros(50_000, 3, 32, 32, dtype=torch.uint8)
    start = time.process_time()
    readers.fingerprint(images, None)
    assert time.process_time() - start < 2
