"""Images in, batches out: embedded shapes and solids, CIFAR-10/100, STL-10, image folders and MedMNIST-style .npz files.

`load` gives an `ImageDataset`, whose images stay in memory as uint8; `batches` moves one batch at a time to the
device and normalises, crops and flips it there, all images at once. A small dataset then needs no loader processes.
"""

import hashlib
import math
import os
import pickle
import signal
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from support import shapes
from support import solids
from config import UsageError, check_known
from support.download import ARCHIVES, VOLUMES, fetch, fetch_volumes, one_line
from support.folder import LazyFolder, read_folder

# Data sets with a name of their own: channels and axes of their images, (1, 3) for volumes.
NAMES = {**dict.fromkeys(("shapes", *ARCHIVES), (3, 2)), **dict.fromkeys(("shapes3d", *VOLUMES), (1, 3))}
# Mean and standard deviation of each channel over the training images, pixels scaled to 0..1.
STATISTICS = {
    "shapes": ((0.436, 0.436, 0.436), (0.259, 0.260, 0.260)),
    "shapes3d": ((0.448,), (0.192,)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "stl10": ((0.4467, 0.4398, 0.4066), (0.2603, 0.2566, 0.2713)),
    "folder": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),  # ImageNet's: a folder is most often photographs
}


# ---- what a dataset is


@dataclass
class ImageDataset:
    """Images with what is known about them.

    `images`: uint8 [n, C, H, W] (volumes [n, C, T, H, W]) or a LazyFolder; `labels`: int64 [n] or None;
    `class_names`: list or None; `mean`, `std`: one float a channel, pixels scaled to 0..1;
    `folds`: STL-10's ten sets of 1000 training images, int64 [1000] each, else None.
    """

    name: str
    images: "torch.Tensor | LazyFolder"
    labels: "torch.Tensor | None"
    class_names: "list[str] | None"
    mean: tuple
    std: tuple
    folds: "list[torch.Tensor] | None" = None

    def __len__(self):
        return len(self.images)

    def subset(self, indices):
        """The images numbered `indices` (int64 [k], or a list) with their labels, as a dataset without folds."""
        indices = torch.as_tensor(indices, dtype=torch.int64)
        lazy = isinstance(self.images, LazyFolder)
        images = self.images.subset(indices) if lazy else self.images[indices.to(self.images.device)]
        labels = None if self.labels is None else self.labels[indices.to(self.labels.device)]
        return ImageDataset(self.name, images, labels, self.class_names, self.mean, self.std)

    def fingerprint(self):
        """Sixteen hex digits that change with the name, the shape, any label, or any of about 64 images spread evenly."""
        digest = hashlib.sha256(repr((self.name, tuple(self.images.shape), str(self.images.dtype))).encode())
        if self.labels is not None:
            digest.update(self.labels.cpu().numpy().tobytes())
        for i in range(0, len(self), max(1, len(self) // 64)):
            digest.update(self.images[i].cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]


# ---- small helpers


def need(path):
    """The path, if it is a file; UsageError otherwise."""
    if not path.is_file():
        raise UsageError(f"{path} is missing: the folder {path.parent} is incomplete; delete it and it is unpacked or downloaded again")
    return path


def measure(images):
    """Mean and standard deviation of each channel of uint8 [n, C, ...], pixels scaled to 0..1: two tuples of C floats."""
    values = torch.arange(256, dtype=torch.float64) / 255
    mean, std = [], []
    for channel in images.unbind(1):
        share = torch.bincount(channel.flatten(), minlength=256) / channel.numel()  # a histogram: no float copy of the images
        mean.append(float(share.double() @ values))
        std.append(max(float(share.double() @ (values - mean[-1]) ** 2) ** 0.5, 1 / 255))  # images of one colour: no division by 0
    return tuple(mean), tuple(std)


# ---- readers: one for each kind of dataset


# The functions that numpy's own pickles call, taken from such pickles: their module is named differently from version to version.
ARRAY_CODE = {
    ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
    ("numpy.core.numeric", "_frombuffer"): np.empty(0).__reduce_ex__(5)[0],
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
}


class ArrayUnpickler(pickle.Unpickler):
    """Reads pickles of arrays, numbers, strings and containers; UsageError for anything else, which could run code."""

    def find_class(self, module, name):
        if (module, name) == ("_codecs", "encode"):  # how Python 3 writes bytes in an old protocol
            return super().find_class(module, name)
        try:
            return ARRAY_CODE[module.replace("numpy._core", "numpy.core"), name]
        except KeyError:
            raise UsageError(f"asks for {module}.{name}, which a CIFAR file does not need and which could run code") from None


def unpickle(path, *keys):
    """The values under `keys` (bytes) of a CIFAR pickle; UsageError naming the file where it is not one."""
    try:
        with open(need(path), "rb") as file:
            content = ArrayUnpickler(file, encoding="bytes").load()
        return [content[key] for key in keys]
    except Exception as error:  # a damaged pickle raises nearly any type
        if not path.is_file():
            raise
        raise UsageError(f"{path} is not a CIFAR file ({one_line(error)}); delete the folder {path.parent}") from None


def read_cifar(name, split, data_dir):
    """CIFAR-10 or CIFAR-100 (fine labels), python version: images uint8 [n, 3, 32, 32]; Krizhevsky 2009, cs.toronto.edu/~kriz."""
    check_known(f"--split of {name}", split, ("train", "test"))
    folder = fetch(name, data_dir)
    if name == "cifar10":
        files = [f"data_batch_{i}" for i in range(1, 6)] if split == "train" else ["test_batch"]
        meta, label_key, names_key = "batches.meta", b"labels", b"label_names"
    else:
        files, meta, label_key, names_key = [split], "meta", b"fine_labels", b"fine_label_names"
    pixels, labels = zip(*(unpickle(folder / file, b"data", label_key) for file in files))
    for file, part, part_labels in zip(files, pixels, labels):
        n = len(part_labels) if isinstance(part_labels, (list, np.ndarray)) else None
        if getattr(part, "dtype", None) != np.uint8 or part.shape != (n, 3072):
            raise UsageError(f"{folder / file} does not hold uint8 images of 3072 values, a label each; delete {folder}")
    images = torch.from_numpy(np.concatenate(pixels)).view(-1, 3, 32, 32)  # [n, C, H, W]
    labels = [label for part in labels for label in part]
    (class_names,) = unpickle(folder / meta, names_key)
    named = isinstance(class_names, list) and all(isinstance(word, bytes) and word.isascii() for word in class_names)
    if not named or not all(label in range(len(class_names)) for label in labels):
        raise UsageError(f"{folder} is damaged: its labels are not those that {meta} names; delete it")
    labels = torch.tensor(labels, dtype=torch.int64)  # [n]
    return ImageDataset(name, images, labels, [word.decode() for word in class_names], *STATISTICS[name])


def records(path, size, what):
    """A file as uint8 [count, size] without reading it yet; UsageError where it is not a whole number of records."""
    length = need(path).stat().st_size
    if length == 0 or length % size:
        raise UsageError(f"{path} has {length} bytes, expected a multiple of {size} ({what}); it is damaged, so delete {path.parent}")
    return np.memmap(path, dtype=np.uint8, mode="r").reshape(-1, size)


def read_stl10(split, data_dir):
    """STL-10, binary version: images uint8 [n, 3, 96, 96], labels 0..9 or None; Coates et al. 2011, cs.stanford.edu/~acoates/stl10."""
    check_known("--split of stl10", split, ("train", "test", "unlabeled", "train+unlabeled"))
    folder = fetch("stl10", data_dir)
    parts = [records(folder / f"{part}_X.bin", 3 * 96 * 96, "one 96x96 RGB image") for part in split.split("+")]
    images = np.empty((sum(map(len, parts)), 3, 96, 96), dtype=np.uint8)  # [n, C, H, W]
    at = 0
    for part in parts:  # copied once, straight from the file: the unlabeled images are 2.8 GB
        images[at : at + len(part)] = part.reshape(-1, 3, 96, 96).swapaxes(2, 3)  # stored [n, C, W, H], column after column
        at += len(part)
    labels, folds = None, None
    if split in ("train", "test"):
        labels = torch.from_numpy(records(folder / f"{split}_y.bin", 1, "one label").astype(np.int64)).flatten() - 1  # [n], stored from 1
        if len(labels) != len(images):
            raise UsageError(f"{folder} has {len(images)} {split} images but {len(labels)} labels; it is damaged, so delete it")
    class_names = need(folder / "class_names.txt").read_text(errors="replace").split()
    if split == "train":
        path = need(folder / "fold_indices.txt")
        words = [line.split() for line in path.read_text(errors="replace").splitlines() if line.strip()]
        if len(set(map(len, words))) != 1 or not all(word.isdecimal() and int(word) < len(images) for line in words for word in line):
            raise UsageError(f"{path} does not hold lines of equally many image numbers; it is damaged, so delete {folder}")
        folds = [torch.tensor([int(word) for word in line]) for line in words]
    if labels is not None and not 0 <= labels.min() <= labels.max() < len(class_names):
        raise UsageError(f"{folder} has labels that class_names.txt does not name; it is damaged, so delete it")
    return ImageDataset("stl10", torch.from_numpy(images), labels, class_names, *STATISTICS["stl10"], folds)


def npz_images(path, arrays, key):
    """The array under `key` as uint8 [n, C, H, W] or [n, C, T, H, W]; UsageError for another dtype or number of axes."""
    array = arrays[key]
    if array.dtype != np.uint8:
        raise UsageError(f"{path}: {key} is {array.dtype}, expected uint8; scale the pixels to 0..255 and save them with .astype('uint8')")
    images = torch.from_numpy(array)
    if images.ndim == 3 or (images.ndim == 4 and images.shape[-1] not in (1, 3)):
        images = images.unsqueeze(-1)  # [n, H, W, 1] or [n, T, H, W, 1]: grey, without an axis for it
    if images.ndim not in (4, 5) or 0 in images.shape:
        raise UsageError(f"{path}: {key} has the shape {array.shape}, expected n,H,W or n,H,W,3 or, for volumes, n,T,H,W or n,T,H,W,C")
    return images.movedim(-1, 1).contiguous()  # [n, C, H, W] or [n, C, T, H, W]


def npz_labels(path, arrays, key, n):
    """The labels under `key` ([n] or [n, 1]) as int64 [n]; None where there are several to an image."""
    labels = torch.from_numpy(arrays[key])
    if labels.ndim not in (1, 2) or not labels.numel() or len(labels) != n or labels.is_floating_point():
        raise UsageError(f"{path}: {key} is {labels.dtype} {list(labels.shape)}, expected whole numbers, one for each of the {n} images")
    if labels.ndim == 2 and labels.shape[1] > 1:
        print(f"{path}: {key} has {labels.shape[1]} labels an image; multi-label data is read without labels")
        return None
    if labels.min() < 0:
        raise UsageError(f"{path}: {key} holds {labels.min().item()}, expected class numbers from 0")
    return labels.flatten().to(torch.int64)  # [n]


def read_npz(path, split):
    """A MedMNIST-style .npz with {split}_images and {split}_labels; images are normalised as its training images are."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            splits = [part for part in ("train", "val", "test") if f"{part}_images" in arrays]
            if not splits:
                raise UsageError(f"{path} has the keys {', '.join(arrays) or '(none)'}, expected train_images, train_labels and so on")
            check_known(f"--split of {path}", split, splits)
            images = npz_images(path, arrays, f"{split}_images")
            labels = npz_labels(path, arrays, f"{split}_labels", len(images)) if f"{split}_labels" in arrays else None
            train = npz_images(path, arrays, "train_images") if split != "train" and "train" in splits else images
    except UsageError:
        raise
    except Exception as error:  # a damaged .npz raises any of zipfile's, zlib's and numpy's errors
        raise UsageError(f"cannot read {path} ({one_line(error)}); expected an .npz of plain arrays, saved with np.savez") from None
    return ImageDataset(path.stem, images, labels, None, *measure(train))


def load(name, split="train", data_dir="data", image_size=None):
    """Load one split of a dataset by name (one of NAMES) or by the path of an image folder or .npz file.

    Images are uint8, [n, C, H, W] or [n, C, T, H, W]. `data_dir` holds or receives the archives. `image_size` (pixels,
    default 224) is the side at which a folder's images are stored; other datasets keep their own size.
    Raises UsageError for an unknown name or split, and for data that is missing or damaged.
    """
    path = Path(name).expanduser()
    if name == "shapes":
        check_known("--split of shapes", split, ("train", "test"))
        return ImageDataset("shapes", *shapes.make(split), *STATISTICS["shapes"])  # [n, 3, 24, 24], [n]
    if name == "shapes3d":
        check_known("--split of shapes3d", split, ("train", "test"))
        return ImageDataset("shapes3d", *solids.make(split), *STATISTICS["shapes3d"])  # [n, 1, 16, 16, 16], [n]
    if name in VOLUMES:
        return read_npz(fetch_volumes(name, data_dir), split)
    if name in ("cifar10", "cifar100"):
        return read_cifar(name, split, data_dir)
    if name == "stl10":
        return read_stl10(split, data_dir)
    if os.path.isdir(path):  # Path.is_dir would raise where a folder above may not be looked into
        return ImageDataset(path.resolve().name, *read_folder(path, split, image_size), *STATISTICS["folder"])
    if path.suffix.lower() == ".npz" and os.path.isfile(path):
        return read_npz(path, split)
    if len(path.parts) > 1 or path.suffix.lower() == ".npz":
        raise UsageError(f"--dataset {path} is neither a folder nor an .npz file (looked for {path.absolute()})")
    check_known("--dataset", name, NAMES, ", an image folder, or an .npz file")


# ---- a batch, on its device


def normalise(images, mean, std):
    """uint8 images [B, C, ...] -> float32, pixels scaled to 0..1, then (pixel - mean) / std of their channel."""
    ones = (1,) * (images.ndim - 2)
    # non_blocking: a plain copy to the GPU would make the host wait for all the work queued there.
    mean, std = (torch.tensor(values).view(-1, *ones).to(images.device, non_blocking=True) for values in (mean, std))  # [C, 1, 1]
    return (images.float() / 255 - mean) / std


def sides(images, size):
    """The image axes' lengths (H, W) or (T, H, W): a number means a square or a cube, a tuple is kept."""
    return (size,) * (images.ndim - 2) if isinstance(size, int) else tuple(size)


def resize(images, size):
    """Float images [B, C, H, W] or [B, C, T, H, W] resized to `size` (pixels; one number or one an axis), linearly.

    The aspect ratio is not kept. Shrinking averages (antialias) in 2-D; torch has no such filter for volumes.
    """
    size = sides(images, size)
    if images.shape[2:] == size:
        return images
    if images.ndim == 5:
        return F.interpolate(images, size, mode="trilinear")  # [B, C, *size]
    return F.interpolate(images, size, mode="bilinear", antialias=True)  # [B, C, *size]


def draw(images, count, generator, share=(0, 1)):
    """`count` uniform numbers an image, float [B, count]. Of several processes each draws for the whole batch and keeps its own rows, so
    that the numbers do not depend on how many there are; share: (number of this process, how many)."""
    B, (rank, world) = len(images), share
    return torch.rand(B * world, count, generator=generator, device=images.device)[rank * B : (rank + 1) * B]


def crop_boxes(images, scale, generator, aspect=(3 / 4, 4 / 3), share=(0, 1)):
    """Draw one box an image: its half sides and its centre, float [B, 2] as (x, y) or [B, 3] as (x, y, z).

    Coordinates are affine_grid's, where the image reaches from -1 to 1, so that a half side is also the fraction of the
    image's side. The area (of a volume: the volume) is uniform in `scale`, width over height in pixels log-uniform in
    `aspect`, the centre uniform. A box longer than the image is clamped to it. Source: torchvision's RandomResizedCrop.
    """
    axes, (height, width) = images.ndim - 2, images.shape[-2:]
    draws = draw(images, 2 + axes, generator, share)  # [B, 2 + axes]: area, aspect, place on each axis
    area = scale[0] + (scale[1] - scale[0]) * draws[:, 0]  # [B]
    root = (math.log(aspect[0]) + math.log(aspect[1] / aspect[0]) * draws[:, 1]).div(2).exp()  # [B], square root of the aspect
    side = area ** (1 / axes)
    shape = (height / width) ** 0.5  # turns width over height in pixels into a ratio of fractions
    half = torch.stack([side * root * shape, side / root / shape, side][:axes], dim=1).clamp(max=1)  # [B, axes]; depth keeps its share
    return half, (1 - half) * (2 * draws[:, 2:] - 1)  # [B, axes]: the centre has 1 - half to either side


def random_resized_crop(images, size, scale, generator, aspect=(3 / 4, 4 / 3), share=(0, 1)):
    """Cut one random box from each float image [B, C, (T,) H, W] and resize it to `size`; `scale` is the range of its area.

    Areas are fractions of the image. The generator must live on the images' device. Boxes are as in `crop_boxes`.
    """
    size = sides(images, size)
    half, centre = crop_boxes(images, scale, generator, aspect, share)
    theta = torch.cat([torch.diag_embed(half), centre.unsqueeze(-1)], dim=-1).to(images.dtype)  # [B, axes, axes + 1]
    # grid_sample reads single points, so it must not shrink: sample at the stored size, then let resize average.
    fine = [max(wanted, stored) for wanted, stored in zip(size, images.shape[2:])]
    grid = F.affine_grid(theta, [*images.shape[:2], *fine], align_corners=False)  # [B, *fine, axes]
    # Inside the image reflection does what border padding does, and Apple's GPUs lack the latter.
    crops = F.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)  # [B, C, *fine]
    return resize(crops, size)  # [B, C, *size]


def random_flip(images, generator, share=(0, 1)):
    """Mirror the last axis (left and right) of each image [B, C, ..., W] with probability one half."""
    mirrored = draw(images, 1, generator, share)[:, 0] < 0.5  # [B]
    return torch.where(mirrored.view(-1, *(1,) * (images.ndim - 1)), images.flip(-1), images)


def ignore_ctrl_c(worker):
    """Ctrl-C reaches the loader's processes too; the training loop alone decides when to stop."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def uint8_batches(images, batch_size, order, device, workers):
    """The images numbered `order`, uint8 [B, C, ...], in batches; from memory, or decoded by DataLoader's processes."""
    if not isinstance(images, LazyFolder):
        order = order.to(images.device)
        yield from (images[order[i : i + batch_size]] for i in range(0, len(order), batch_size))
        return
    numbers = order.tolist()
    parts = [numbers[i : i + batch_size] for i in range(0, len(numbers), batch_size)]
    workers = min(workers, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)  # more are no faster
    # A generator of its own: the loader would otherwise draw from the global one and shift whatever is drawn from it next.
    loader = torch.utils.data.DataLoader(
        parts, None, num_workers=workers, collate_fn=images.read, pin_memory=device.type == "cuda", generator=torch.Generator(),
        worker_init_fn=ignore_ctrl_c,
    )
    for batch, broken in loader:
        images.report(broken)
        yield batch


def batches(dataset, batch_size, image_size, device="cpu", order=None, generator=None, crop_scale=(1.0, 1.0), flip=False, workers=0,
            share=(0, 1)):
    """Iterate over normalised float32 images [B, C, H, W] (or [B, C, T, H, W]) on the device; the last batch may be short.

    `order`: image numbers, int64 [k] (None: all, in order). `image_size`: pixels, one number or one an axis.
    Without a generator (on `device`) nothing is random: images are only resized. With one, each image is cropped to an
    area in `crop_scale` (fractions; (1, 1) does not crop) and, with `flip`, half are mirrored. `workers`: processes that
    decode a LazyFolder. `share`: as in `draw`; `order` and `batch_size` are then this process's own.
    Raises UsageError for an impossible crop_scale, and where too many files cannot be decoded.
    """
    if not 0 < crop_scale[0] <= crop_scale[1] <= 1:
        raise UsageError(f"crop_scale is {tuple(crop_scale)}, expected two fractions of the image's area, 0 < least <= most <= 1")
    order = torch.arange(len(dataset)) if order is None else order
    cropping = generator is not None and tuple(crop_scale) != (1.0, 1.0)
    for images in uint8_batches(dataset.images, batch_size, order, torch.device(device), workers):
        images = normalise(images.to(device, non_blocking=True), dataset.mean, dataset.std)  # [B, C, H, W], stored size
        images = (random_resized_crop(images, image_size, crop_scale, generator, share=share) if cropping
                  else resize(images, image_size))
        yield random_flip(images, generator, share) if generator is not None and flip else images
