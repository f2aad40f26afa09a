"""Reader of MedMNIST-style .npz files: what could be meant in two ways is refused in one line."""

import contextlib
import functools
import itertools

import numpy as np
import torch

from config import UsageError, check_choice, nearest
from support.checkpoint import one_line


@contextlib.contextmanager
def reading(path, advice):
    """Within `with`, whatever a damaged file raises becomes a UsageError that names its path."""
    try:
        yield
    except (UsageError, MemoryError):
        raise
    except Exception as error:  # pickle, zipfile, zlib and numpy raise dozens of types
        raise UsageError(f"cannot read {path} ({one_line(error)}); {advice}") from None


def measure(images):
    """Mean and standard deviation of each channel of uint8 [n, C, ...]: two tuples of C floats.

    Pixels are scaled to 0..1. From histograms: a float copy would take four times the memory.
    """
    values, mean, std = torch.arange(256, dtype=torch.float64) / 255, [], []
    for channel in images.unbind(1):
        share = torch.bincount(channel.flatten(), minlength=256).double() / channel.numel()  # [256]
        mean.append(float(share @ values))
        std.append(max(float(share @ (values - mean[-1]) ** 2) ** 0.5, 1 / 255))  # never 0
    return tuple(mean), tuple(std)


# --- .npz: images ---------------------------------------------------------------------------------


@functools.cache
def say(line):
    """Print a line, but once: a file is read for its training images and again for its others."""
    print(line)


def channel_axis(shape):
    """The axis of the channels of an array of images (n, ...): 1, -1, or None if it has none.

    One or three channels come first or last, as `find_layout` of extras/estimator.py has it, four
    only last, as RGBA. n,T,H,W are gray volumes if all sides are 5 or more, and none is over twice
    another; volumes with an axis of 1 to 4 channels may have any sides from 5 on. Raises ValueError
    for other shapes; its text says what to try.
    """
    sides = shape[1:]
    if len(sides) not in (2, 3, 4) or 0 in shape:
        raise ValueError("flattened images need their sides back: x.reshape(-1, 28, 28)")
    few = (1, 2, 3, 4) if len(sides) == 4 else (1, 3)
    first, last = sides[0] in few, sides[-1] in few
    if len(sides) == 2:
        if last and sides[0] > 4:
            raise ValueError("if this is a single image, save x[None]; pad strips so thin")
        return None
    if first and last:
        raise ValueError("its second or its last axis could be the channels; pad the images to more"
                         " than 4 pixels a side")
    if len(sides) == 4:
        if not (first or last) or min(sides[1:] if first else sides[:-1]) < 5:
            raise ValueError("keep 1 to 4 channels, such as x[..., :3]")
        return 1 if first else -1
    if first or last or (sides[-1] == 4 and min(sides[:-1]) >= 5):
        return 1 if first else -1
    if 5 <= min(sides) and max(sides) <= 2 * min(sides):
        return None
    if sides[0] == 4:
        raise ValueError("put its channels last: np.moveaxis(x, 1, -1)")
    raise ValueError("keep 1 or 3 channels, such as x[..., :1], or x[:, :1] if they come first; of "
                     "volumes save x[..., None]")


def as_bytes(path, key, images):
    """Pixels as uint8: those of other whole-number types if all lie in 0..255, else UsageError."""
    if images.dtype == np.uint8:
        return images
    found, scale = "", "x"
    if images.dtype.kind in "iuf" and images.size:
        low, high = images.min(), images.max()
        if images.dtype.kind != "f" and 0 <= low and high <= 255:
            say(f"{path}: its images are {images.dtype} with values in 0..255; read as uint8")
            return images.astype(np.uint8)
        found = f" (its values are {low:g} to {high:g})"
        if 0 <= low and (high <= 1 or 255 < high < np.inf):
            scale = f"x * {255 / max(high, 1):g}"
    raise UsageError(f"{path}: {key} is {images.dtype}, expected uint8{found}; scale the pixels of "
                     f"all splits alike to 0..255: ({scale}).round().astype('uint8')")


def npz_images(path, arrays, key):
    """The array under `key` as uint8 [n, C, H, W], or [n, C, T, H, W] for volumes."""
    images = as_bytes(path, key, arrays[key])
    shape = images.shape
    try:
        axis = channel_axis(shape)
    except ValueError as error:
        raise UsageError(f"{path}: {key} has the shape {shape}, expected n,H,W or n,H,W,3 or "
                         "n,3,H,W or, for volumes, n,T,H,W or n,T,H,W,C with at least 5 voxels a "
                         f"side; {error}") from None
    if len(shape) == 4 and axis == -1 and shape[-1] == 4:
        say(f"{path}: its images have 4 channels; read as RGBA, without alpha")
        images = images[..., :3]
    images = images[:, None] if axis is None else np.moveaxis(images, axis, 1)  # [n, C, ...]
    return torch.from_numpy(np.ascontiguousarray(images))


# --- .npz: labels ---------------------------------------------------------------------------------

SPLITS = ("train", "val", "test")


def distinct(labels):
    """The different labels of an array, sorted ints; none if images have no label or several."""
    single = labels.dtype.kind in "biu" and labels.ndim and labels.size == len(labels)
    return [int(label) for label in np.unique(labels) if label >= 0] if single else []


def class_numbers(groups):
    """Label -> class number, a dict; groups: the sorted labels of each split, training's first.

    Labels that fill 0..K-1 are class numbers already. Others are ids: the training images' are
    numbered from 0, and those that only later splits have come after them.
    """
    labels = list(dict.fromkeys(itertools.chain(*groups)))
    if sorted(labels) == list(range(len(labels))):
        labels.sort()
    return {label: k for k, label in enumerate(labels)}


def npz_labels(path, arrays, key, n, numbers):
    """The labels under `key` ([n] or [n, 1]) as class numbers, int64 [n]; None if an image has
    several. numbers: label -> class number."""
    labels = arrays[key]
    fit = labels.ndim in (1, 2) and len(labels) == n and labels.size
    if labels.dtype.kind not in "biu" or not fit:
        raise UsageError(f"{path}: {key} is {labels.dtype} {list(labels.shape)}, expected whole "
                         f"numbers, one for each of the {n} images; save them as an array [{n}] of "
                         "integers")
    if labels.size != n:
        print(f"{path}: {key} has {labels.shape[1]} labels for each image; read without labels (of "
              "one-hot labels save labels.argmax(1))")
        return None
    if labels.min() < 0:
        raise UsageError(f"{path}: {key} holds {labels.min()}, expected class numbers from 0; leave"
                         " out the images without a class, or all labels")
    values, where = np.unique(labels, return_inverse=True)
    own = np.array([numbers[int(value)] for value in values], np.int64)  # of each value
    return torch.from_numpy(own[where.reshape(-1)])  # [n]


def npz_classes(path, arrays, keys, split, n):
    """The class numbers of a split, int64 [n] or None, and the classes' names, None if numbers.

    keys: a name such as train_labels -> the key it has in this file.
    """
    there = {part: keys[f"{part}_labels"] for part in SPLITS if f"{part}_labels" in keys}
    if split not in there:
        known = {f"{part}_{kind}" for part in SPLITS for kind in ("images", "labels")}
        if unknown := [key for key in arrays if key.lower() not in known]:
            say(f"{path} has no {split}_labels and is read without labels; not read: "
                f"{', '.join(unknown)}{nearest(f'{split}_labels', unknown)}")
        return None, None
    groups = {part: distinct(arrays[key]) for part, key in there.items()}
    numbers = class_numbers(groups.values())
    labels = npz_labels(path, arrays, there[split], n, numbers)
    first = next(iter(groups))
    if labels is not None and (new := sorted({*groups[split]} - {*groups[first]})):
        say(f"{path}: no training image has a label that {there[split]} holds ({len(new)} such, the"
            f" first is {new[0]}); such images count as classes of their own")
    if labels is None or list(numbers) == list(range(len(numbers))):
        return labels, None
    say(f"{path}: its labels are ids from {min(numbers)} to {max(numbers)}; its {len(numbers)} "
        "classes are numbered from 0, and named after the ids")
    return labels, [str(label) for label in numbers]


def read_npz(path, split):
    """An .npz file as MedMNIST has it: {split}_images and, if known, {split}_labels (Yang 2023).

    Keys may be in upper case. mean and std are those of the training images, whatever the split;
    so are the numbers of the classes.
    """
    with (reading(path, "expected an .npz of plain arrays, saved with np.savez"),
          np.load(path, allow_pickle=False) as arrays):
        keys = {key.lower(): key for key in arrays} | {key: key for key in arrays}
        splits = [part for part in SPLITS if f"{part}_images" in keys]
        if not splits:
            meant = [nearest(key, ["train_images"]) for key in arrays]
            raise UsageError(f"{path} has the keys {', '.join(arrays) or '(none)'}, expected "
                             f"train_images, train_labels and so on{max(meant, default='')}; save "
                             "it with np.savez(path, train_images=..., train_labels=...)")
        check_choice(f"--split of {path}", split, splits)
        images = npz_images(path, arrays, keys[f"{split}_images"])
        labels, class_names = npz_classes(path, arrays, keys, split, len(images))
        train = images if split == splits[0] else npz_images(path, arrays,
                                                             keys[f"{splits[0]}_images"])
        mean, std = measure(train)
    return {"images": images, "labels": labels, "class_names": class_names, "mean": mean,
            "std": std}
