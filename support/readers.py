"""Readers of CIFAR-10/100 and STL-10, and the names of all data sets.

Each returns a dict of an ImageDataset's fields: images uint8 [n, C, H, W], labels int64 [n] or
None, class_names or None, and folds, mean and std where it knows them. Data that is damaged raises
a UsageError that names the file or folder.
"""

import hashlib
import pickle

import numpy as np
import torch

from config import UsageError, check_choice
from support import shapes, solids
from support.download import VOLUMES, fetch, fetch_volumes
from support.npz import read_npz, reading


def fingerprint(images, labels):
    """16 hex digits that change with any pixel or label; of a LazyFolder, with what its `identity`
    reads of each file. Neither knows where the data is: a copy has the same digits."""
    digest = hashlib.sha256(repr(tuple(images.shape)).encode())
    in_memory = isinstance(images, torch.Tensor)
    digest.update(images.contiguous().numpy() if in_memory else images.identity())
    if labels is not None:
        digest.update(labels.numpy())
    return digest.hexdigest()[:16]


# --- CIFAR and STL-10 -----------------------------------------------------------------------------

ADVICE = "delete {} to unpack or download it again"
# What the pickle of an array calls; taken from arrays, as the modules' names vary between versions.
ARRAY_CODE = {code.__name__: code for code in (
    np.ndarray, np.dtype, np.empty(0).__reduce__()[0], np.empty(0).__reduce_ex__(5)[0])}


class ArrayUnpickler(pickle.Unpickler):
    """Reads pickles of arrays, numbers, strings and containers; anything else could run code."""

    def find_class(self, module, name):
        if module.split(".")[0] == "numpy" and name in ARRAY_CODE:
            return ARRAY_CODE[name]
        if (module, name) == ("_codecs", "encode"):  # bytes in an old protocol
            return super().find_class(module, name)
        raise ValueError(f"it asks for {module}.{name}, which could run code")


def unpickle(path, *keys):
    """The values under some keys (bytes) of the dict in a CIFAR file."""
    with reading(path, ADVICE.format(path.parent)), open(path, "rb") as file:
        content = ArrayUnpickler(file, encoding="bytes").load()
        return [content[key] for key in keys]


def records(path, *shape):
    """A file of uint8 records [n, *shape], not yet read into memory."""
    with reading(path, ADVICE.format(path.parent)):
        return np.memmap(path, np.uint8, "r").reshape(-1, *shape)


def checked(images, labels, class_names):
    """The fields of a data set whose labels fit its images and the names of its classes."""
    fit = len(labels) == len(images) and 0 <= labels.min() <= labels.max() < len(class_names)
    if images.dtype != torch.uint8 or not fit:
        raise ValueError("its labels do not fit its images, or the names of its classes")
    return {"images": images, "labels": labels, "class_names": class_names}


def read_cifar(name, split, data_dir):
    """CIFAR-10, or CIFAR-100 with its fine labels: 32 x 32 pixels (Krizhevsky 2009)."""
    check_choice(f"--split of {name}", split, ("train", "test"))
    folder = fetch(name, data_dir)
    if name == "cifar100":
        files, meta, kind = [split], "meta", b"fine_label"
    else:
        files = [f"data_batch_{i}" for i in range(1, 6)] if split == "train" else ["test_batch"]
        meta, kind = "batches.meta", b"label"
    parts = [unpickle(folder / file, b"data", kind + b"s") for file in files]
    (class_names,) = unpickle(folder / meta, kind + b"_names")
    with reading(folder, ADVICE.format("it")):
        images = torch.cat([torch.from_numpy(pixels) for pixels, _ in parts])  # [n, 3072]
        labels = torch.cat([torch.tensor(labels) for _, labels in parts])  # [n]
        class_names = [word.decode() for word in class_names]
        return checked(images.view(-1, 3, 32, 32), labels, class_names)


def read_folds(folder, n):
    """The ten lists of 1,000 training images that STL-10's protocol trains on; None if missing."""
    if not (folder / "fold_indices.txt").exists():
        print(f"{folder} has no fold_indices.txt; STL-10 is read without its ten folds")
        return None
    folds = torch.from_numpy(np.loadtxt(folder / "fold_indices.txt", np.int64, ndmin=2))
    if not 0 <= folds.min() <= folds.max() < n:
        raise ValueError("fold_indices.txt names images that train_X.bin does not hold")
    return list(folds)


def read_stl10(name, split, data_dir):
    """STL-10's binary version: 96 x 96 pixels; labels from 0, None if unlabeled (Coates 2011)."""
    check_choice("--split of stl10", split, ("train", "test", "unlabeled", "train+unlabeled"))
    folder = fetch("stl10", data_dir)
    if "unlabeled" in split and not (folder / "unlabeled_X.bin").exists():
        lacking = f"{folder} has no unlabeled_X.bin"
        if split == "unlabeled":
            raise UsageError(f"{lacking}; choose --split train, or {ADVICE.format(folder)}")
        print(f"{lacking}; its labeled training images are read alone")
        split = "train"
    parts = [records(folder / f"{part}_X.bin", 3, 96, 96) for part in split.split("+")]
    images = np.empty((sum(map(len, parts)), 3, 96, 96), np.uint8)  # [n, C, H, W]
    # Stored column by column. Copied once, straight from the file: the unlabeled part has 2.8 GB.
    np.concatenate([part.swapaxes(2, 3) for part in parts], out=images)
    images = torch.from_numpy(images)
    with reading(folder, ADVICE.format("it")):
        class_names = (folder / "class_names.txt").read_text().split()
        if split not in ("train", "test"):
            return {"images": images, "labels": None, "class_names": class_names}
        labels = torch.from_numpy(records(folder / f"{split}_y.bin").astype(np.int64)) - 1  # [n]
        folds = read_folds(folder, len(images)) if split == "train" else None
        return {**checked(images, labels, class_names), "folds": folds}


# --- all data sets that have a name ---------------------------------------------------------------


def read_synthetic(name, split, data_dir):
    """Shapes or solids, drawn from a seed."""
    check_choice(f"--split of {name}", split, ("train", "test"))
    return dict(zip(("images", "labels", "class_names"), SYNTHETIC[name].make(split)))


def read_volumes(name, split, data_dir):
    """One of MedMNIST's sets of volumes."""
    return read_npz(fetch_volumes(name, data_dir), split)


# reader(name, split, data_dir)
SYNTHETIC = {"shapes": shapes, "shapes3d": solids}
NAMED = {**dict.fromkeys(SYNTHETIC, read_synthetic), "cifar10": read_cifar,
         "cifar100": read_cifar, "stl10": read_stl10, **dict.fromkeys(VOLUMES, read_volumes)}
