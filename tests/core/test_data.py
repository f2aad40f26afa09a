"""Claims about data.py: readers return the known image, damaged or missing data gives one clear line, crops stay inside."""

import pickle

import numpy as np
import pytest
import torch
from PIL import Image

import data
from config import UsageError


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


def save(folder, name, mode="RGB", colour=None, size=(40, 30)):
    folder.mkdir(parents=True, exist_ok=True)
    values = noise(size[1], size[0], 3, seed=len(name)).numpy()
    image = Image.fromarray(values) if colour is None else Image.new("RGB", size, colour)
    image.convert(mode).save(folder / name)


def make_cifar10(root, protocol=2):
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    for k, name in enumerate([f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]):
        content = {b"data": noise(4, 3072, seed=k).numpy(), b"labels": [k, 1, 2, 3], b"batch_label": name.encode()}
        (folder / name).write_bytes(pickle.dumps(content, protocol))
    (folder / "batches.meta").write_bytes(pickle.dumps({b"label_names": [b"class%d" % i for i in range(10)]}, protocol))
    return folder


def make_stl10(root):
    folder = root / "stl10_binary"
    folder.mkdir(parents=True)
    image = np.zeros((2, 3, 96, 96), dtype=np.uint8)
    image[0, 0, 5, 80] = 200  # one red point near the top (row 5), to the right (column 80)
    for part, n in (("train", 2), ("test", 1), ("unlabeled", 2)):
        stored = np.stack([np.asfortranarray(plane).ravel(order="F") for plane in image[:n].reshape(-1, 96, 96)])  # column after column
        (folder / f"{part}_X.bin").write_bytes(stored.tobytes())
    (folder / "train_y.bin").write_bytes(bytes([10, 1]))
    (folder / "test_y.bin").write_bytes(bytes([3]))
    (folder / "class_names.txt").write_text("\n".join(f"class{i}" for i in range(10)) + "\n")
    (folder / "fold_indices.txt").write_text("0 \n" * 5 + "1 \n" * 5)
    return folder


# ---- readers


def test_stl10_image_is_upright_and_labels_start_at_zero(tmp_path):
    make_stl10(tmp_path)
    train = data.load("stl10", "train", tmp_path)
    assert train.images.shape == (2, 3, 96, 96) and train.images.dtype == torch.uint8
    assert train.images[0].nonzero().tolist() == [[0, 5, 80]]
    assert train.labels.tolist() == [9, 0] and train.labels.dtype == torch.int64
    assert [fold.tolist() for fold in train.folds] == [[0]] * 5 + [[1]] * 5
    assert train.class_names[9] == "class9"
    assert data.load("stl10", "test", tmp_path).folds is None
    both = data.load("stl10", "train+unlabeled", tmp_path)
    assert both.labels is None and len(both) == 4
    assert both.images[2].nonzero().tolist() == [[0, 5, 80]]


def test_stl10_file_of_the_wrong_size_is_named(tmp_path):
    path = make_stl10(tmp_path) / "train_X.bin"
    path.write_bytes(path.read_bytes()[:-1])
    message = refusal(data.load, "stl10", "train", tmp_path)
    assert str(path) in message and "55295" in message and "27648" in message


@pytest.mark.parametrize("protocol", [2, 5])
def test_cifar10_rows_columns_and_labels(tmp_path, protocol):
    make_cifar10(tmp_path, protocol)
    train = data.load("cifar10", "train", tmp_path)
    assert train.images.shape == (20, 3, 32, 32)
    flat = noise(4, 3072, seed=1)[0]  # first image of the second file: 1024 red values row by row, then green, then blue
    assert train.images[4, 1, 3, 7] == flat[1024 + 3 * 32 + 7]
    assert train.labels[4] == 1 and train.labels[16] == 4 and train.labels.dtype == torch.int64
    assert data.load("cifar10", "test", tmp_path).labels.tolist() == [5, 1, 2, 3]
    assert train.class_names[1] == "class1"


def test_cifar100_takes_the_fine_labels(tmp_path):
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    pixels = noise(2, 3072).numpy()
    for part in ("train", "test"):
        content = {b"data": pixels, b"fine_labels": [99, 3], b"coarse_labels": [1, 2]}
        (folder / part).write_bytes(pickle.dumps(content, 2))
    names = {b"fine_label_names": [b"fine%d" % i for i in range(100)], b"coarse_label_names": [b"coarse"]}
    (folder / "meta").write_bytes(pickle.dumps(names, 2))
    test = data.load("cifar100", "test", tmp_path)
    assert test.labels.tolist() == [99, 3] and test.class_names[99] == "fine99"
    assert torch.equal(test.images, torch.from_numpy(pixels).view(2, 3, 32, 32))


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    folder = make_cifar10(tmp_path)
    (folder / "data_batch_2").write_bytes(b"cos\nsystem\n(S'touch " + str(tmp_path / "ran").encode() + b"'\ntR.")
    message = refusal(data.load, "cifar10", "train", tmp_path)
    assert "data_batch_2" in message and "os.system" in message
    assert not (tmp_path / "ran").exists()


def test_a_missing_file_of_a_known_dataset_is_named(tmp_path):
    path = make_cifar10(tmp_path) / "data_batch_3"
    path.unlink()
    assert str(path) in refusal(data.load, "cifar10", "train", tmp_path)


def test_shapes_need_no_file_and_their_statistics_are_those_of_the_images():
    test = data.load("shapes", "test")
    assert test.images.dtype == torch.uint8 and test.images.shape[1:] == (3, 24, 24)
    assert len(test.labels) == len(test) and int(test.labels.max()) + 1 == len(test.class_names)
    for known, measured in zip((test.mean, test.std), data.measure(test.images)):
        assert known == pytest.approx(measured, abs=0.005)


def test_measured_statistics_are_torchs():
    images = noise(10, 3, 8, 8)
    mean, std = data.measure(images)
    pixels = images.double().div(255).transpose(0, 1).flatten(1)
    assert mean == pytest.approx(pixels.mean(1).tolist(), abs=1e-6)
    assert std == pytest.approx(pixels.std(1, correction=0).tolist(), abs=1e-6)


def test_unknown_names_and_splits_list_what_is_allowed():
    message = refusal(data.load, "cifr10")
    assert message == f"--dataset 'cifr10' is none of {', '.join(data.NAMES)}, an image folder, or an .npz file; nearest: cifar10"
    assert "/no/such/folder" in refusal(data.load, "/no/such/folder")
    assert "train, test" in refusal(data.load, "cifar10", "unlabeled")
    assert "nearest: unlabeled" in refusal(data.load, "stl10", "unlabelled")


# ---- image folders


def test_class_folders_give_sorted_labels_and_a_flat_folder_none(tmp_path):
    save(tmp_path / "pets" / "dog", "1.png", colour=(255, 0, 0))
    save(tmp_path / "pets" / "cat", "2.JPG", colour=(0, 0, 255))
    save(tmp_path / "pets" / "cat" / "deeper", "3.bmp", colour=(0, 255, 0))
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
    assert "none of train" in refusal(data.load, str(tmp_path / "train"), "test")


def test_the_centre_of_a_wide_image_is_kept(tmp_path):
    image = np.zeros((10, 30, 3), dtype=np.uint8)
    image[:, 10:20] = 255
    Image.fromarray(image).save(tmp_path / "wide.png")
    assert (data.load(str(tmp_path), image_size=10).images == 255).all()


def test_grey_palette_and_transparent_images_are_converted_and_counted(tmp_path, capsys):
    save(tmp_path, "a.png", colour=(10, 200, 30))
    for name, mode in (("b.png", "L"), ("c.gif", "P"), ("d.png", "RGBA")):
        save(tmp_path, name, mode, colour=(10, 200, 30))
    Image.fromarray(np.full((30, 40), 128 * 256, dtype=np.uint16)).save(tmp_path / "e.png")  # 16-bit grey, half way
    images = data.load(str(tmp_path), image_size=8).images
    assert "4 of 5 images were not RGB (first: b.png, mode L); converted" in capsys.readouterr().out
    for i in (0, 2, 3):
        assert images[i, :, 4, 4].tolist() == pytest.approx([10, 200, 30], abs=8)
    assert images[1, 0, 4, 4] == images[1, 2, 4, 4]
    assert images[4, :, 4, 4].tolist() == [128] * 3


def test_undecodable_images_are_skipped_with_their_labels_unless_none_is_left(tmp_path, capsys):
    save(tmp_path / "cat", "1.png")
    (tmp_path / "cat" / "0.png").write_bytes(b"not an image")
    save(tmp_path / "dog", "1.png")
    assert data.load(str(tmp_path), image_size=8).labels.tolist() == [0, 1]
    named = f"first: {tmp_path / 'cat' / '0.png'}, cannot identify image file"
    assert f"1 of 3 images could not be decoded ({named}); skipped" in capsys.readouterr().out
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
    monkeypatch.setattr("support.folder.MEMORY_LIMIT", 0)
    lazy = data.load(str(tmp_path), image_size=12)
    assert isinstance(lazy.images, data.LazyFolder) and torch.equal(lazy.labels, memory.labels)
    assert lazy.images.shape == memory.images.shape and lazy.fingerprint() == memory.fingerprint()
    order = torch.tensor([3, 0, 4])
    assert torch.equal(lazy.images[order], memory.images[order]) and torch.equal(lazy.images[1], memory.images[1])
    before = torch.get_rng_state()
    for workers in (0, 1):
        pairs = zip(data.batches(lazy, 2, 12, order=order, workers=workers), data.batches(memory, 2, 12, order=order), strict=True)
        for one, other in pairs:
            assert torch.equal(one, other)
    assert torch.equal(before, torch.get_rng_state())  # the loader left the global generator alone
    assert torch.equal(lazy.subset([4]).images[0], memory.subset([4]).images[0])


# ---- .npz files


def test_npz_grey_colour_and_volumes(tmp_path):
    for shape, expected in [
        ((6, 9, 8), (6, 1, 9, 8)),
        ((6, 9, 8, 3), (6, 3, 9, 8)),
        ((6, 5, 9, 8), (6, 1, 5, 9, 8)),
        ((6, 5, 9, 8, 2), (6, 2, 5, 9, 8)),
    ]:
        values = noise(*shape).numpy()
        np.savez(tmp_path / "x.npz", train_images=values, train_labels=np.arange(6)[:, None].astype(np.uint8), test_images=values[:2] // 2)
        train = data.load(str(tmp_path / "x.npz"))
        assert train.images.shape == expected and len(train.mean) == expected[1]
        channels_last = train.images.movedim(1, -1).numpy()
        assert (channels_last == values.reshape(channels_last.shape)).all()
        assert train.labels.tolist() == list(range(6)) and train.labels.dtype == torch.int64
        test = data.load(str(tmp_path / "x.npz"), "test")
        assert test.labels is None and test.mean == train.mean  # normalised as the training images are


def test_npz_refuses_what_it_cannot_mean(tmp_path, capsys):
    path = tmp_path / "x.npz"
    np.savez(path, train_images=np.zeros((2, 4, 4), dtype=np.float32))
    message = refusal(data.load, str(path))
    assert str(path) in message and "train_images" in message and "float32" in message and "uint8" in message
    np.savez(path, train_images=np.zeros((2, 4), dtype=np.uint8))
    assert "(2, 4)" in refusal(data.load, str(path))
    np.savez(path, train_images=np.zeros((2, 4, 4), dtype=np.uint8), train_labels=np.zeros(3, dtype=np.int64))
    assert "train_labels" in refusal(data.load, str(path))
    assert "none of train" in refusal(data.load, str(path), "val")
    np.savez(path, images=np.zeros((2, 4, 4), dtype=np.uint8))
    assert "train_images" in refusal(data.load, str(path))
    np.savez(path, train_images=np.array([{}], dtype=object))  # a pickle: could run code
    assert str(path) in refusal(data.load, str(path))
    path.write_bytes(path.read_bytes()[:100])
    assert str(path) in refusal(data.load, str(path))
    np.savez(path, train_images=np.zeros((2, 4, 4), dtype=np.uint8), train_labels=np.zeros((2, 3), dtype=np.int64))
    assert data.load(str(path)).labels is None
    assert "3 labels" in capsys.readouterr().out


# ---- augmentation


@pytest.mark.parametrize(
    "shape, size", [((4, 3, 24, 24), 24), ((4, 3, 24, 24), 40), ((4, 3, 24, 24), 10), ((2, 3, 20, 30), 20), ((2, 1, 9, 8, 8), 8)]
)
def test_a_crop_of_everything_is_the_resized_image(shape, size):
    images = noise(*shape).float() / 255
    aspect = shape[-1] / shape[-2]
    crops = data.random_resized_crop(images, size, (1.0, 1.0), seeded(), aspect=(aspect, aspect))
    torch.testing.assert_close(crops, data.resize(images, size), atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", [(2000, 3, 24, 24), (2000, 3, 20, 40), (2000, 1, 16, 16, 16)])
def test_crop_boxes_lie_inside_with_the_area_and_aspect_asked_for(shape):
    images = torch.zeros(1).expand(shape)
    half, centre = data.crop_boxes(images, (0.2, 0.4), seeded())
    assert (half + centre.abs()).max() <= 1 + 1e-6
    assert (half + centre.abs()).amax() > 0.99  # boxes reach the edge
    area = half.prod(1)
    assert 0.2 - 1e-5 <= area.min() < 0.21 and 0.39 < area.max() <= 0.4 + 1e-5
    aspect = half[:, 0] * shape[-1] / (half[:, 1] * shape[-2])
    assert 3 / 4 - 1e-5 <= aspect.min() < 0.76 and 1.31 < aspect.max() <= 4 / 3 + 1e-5
    assert abs(aspect.log().mean()) < 0.02 and abs(centre.mean()) < 0.02


def test_a_crop_shows_the_place_of_its_box():
    ramp = torch.linspace(-1, 1, 64).expand(8, 1, 64, 64)  # each pixel's value is its x coordinate, near enough
    half, centre = data.crop_boxes(ramp, (0.1, 0.5), seeded(3))
    crops = data.random_resized_crop(ramp, 32, (0.1, 0.5), seeded(3))
    torch.testing.assert_close(crops.mean((1, 2, 3)), centre[:, 0], atol=0.03, rtol=0)


def test_flips_mirror_about_half_the_images_and_leave_the_rest():
    images = noise(400, 1, 4, 4).float()
    flipped = data.random_flip(images, seeded())
    same = (flipped == images).flatten(1).all(1)
    mirrored = (flipped == images.flip(-1)).flatten(1).all(1)
    assert (same | mirrored).all() and 150 < mirrored.sum() < 250


def test_normalised_pixels_have_their_channels_mean_and_unit():
    pixels = torch.tensor([0, 255], dtype=torch.uint8).view(1, 2, 1, 1)
    assert data.normalise(pixels, (0.5, 0.5), (0.25, 0.5)).flatten().tolist() == [-2.0, 1.0]


# ---- batches


def test_batches_cover_each_image_once_in_order():
    numbers = torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1).expand(10, 1, 4, 4)
    images = list(data.batches(dataset(numbers), 4, 4))
    assert [len(batch) for batch in images] == [4, 4, 2]
    seen = torch.cat(images)[:, 0, 0, 0] * 0.25 + 0.5
    assert (seen * 255).round().tolist() == list(range(10))
    order = torch.tensor([7, 2, 2])
    seen = torch.cat(list(data.batches(dataset(numbers), 2, 4, order=order)))[:, 0, 0, 0] * 0.25 + 0.5
    assert (seen * 255).round().tolist() == [7, 2, 2]


@pytest.mark.parametrize("shape", [(6, 3, 24, 24), (6, 1, 12, 12, 12)])
def test_the_same_seed_gives_the_same_batch_and_another_seed_another(shape):
    small = dataset(noise(*shape))

    def draw(seed):
        return torch.cat(list(data.batches(small, 4, 8, generator=seeded(seed), crop_scale=(0.3, 1.0), flip=True)))

    assert draw(0).shape == (*shape[:2], *(8,) * (len(shape) - 2))
    assert torch.equal(draw(0), draw(0)) and not torch.equal(draw(0), draw(1))


def test_without_a_generator_nothing_is_random_whatever_is_asked():
    small = dataset(noise(3, 3, 8, 8))
    plain = next(data.batches(small, 3, 8))
    assert torch.equal(plain, next(data.batches(small, 3, 8, crop_scale=(0.3, 1.0), flip=True)))
    assert torch.equal(plain, data.normalise(small.images, small.mean, small.std))


def test_an_impossible_crop_is_refused():
    for scale in ((0.0, 1.0), (0.5, 0.3), (0.5, 1.1)):
        assert "crop_scale" in refusal(next, data.batches(dataset(noise(2, 3, 8, 8)), 2, 8, crop_scale=scale))


def test_subset_keeps_labels_and_the_fingerprint_sees_images_and_labels():
    full = dataset(noise(10, 3, 4, 4), torch.arange(10))
    part = full.subset([8, 1])
    assert part.labels.tolist() == [8, 1] and torch.equal(part.images[1], full.images[1]) and part.mean == full.mean
    other = dataset(full.images.clone(), full.labels.clone())
    assert other.fingerprint() == full.fingerprint()
    other.labels[3] = 0
    assert other.fingerprint() != full.fingerprint()
    other = dataset(full.images.clone(), full.labels)
    other.images[3, 0, 0, 0] += 1
    assert other.fingerprint() != full.fingerprint()
