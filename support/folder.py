"""Image folders: which files are images, what class each belongs to, and their pixels; broken files are left out and named."""

import os
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from itertools import chain

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import default_collate
from tqdm import tqdm

from config import UsageError, check_known
from support.download import one_line

MEMORY_LIMIT = 4 * 2**30  # bytes of uint8 pixels that a folder may take in memory; above it, files are decoded when needed
FOLDER_SIZE = 224  # pixels; side of a folder's images when the caller names none
EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm")


# ---- one file


def decode(path, size):
    """Read one image file as uint8 [3, size, size] (pixels): shorter side resized, centre kept; also returns its mode.

    Of an animation the first picture is taken; what is transparent becomes white. Raises whatever Pillow does on a
    damaged file, and on one of more pixels than it takes for honest (Image.MAX_IMAGE_PIXELS).
    """
    if not any(known[2] is Image.DecompressionBombWarning for known in warnings.filters):
        warnings.filterwarnings("ignore", "Corrupt EXIF data", UserWarning)  # the pixels are none the worse for it
        warnings.simplefilter("error", Image.DecompressionBombWarning)
    with Image.open(path) as image:
        mode = image.mode
        image.draft(None, (2 * size, 2 * size))  # a large JPEG is decoded at a fraction of its size, still twice what we keep
        if mode[0] in "IF":  # 16-bit grey: Pillow would clip it to white instead of scaling it
            values = np.asarray(image)
            if mode == "F" or values.min() < 0 or values.max() > 65535:
                raise ValueError(f"mode {mode}: pixels of 32 bits, whose black and white are not known; save it with 8 or 16 bits")
            image = Image.fromarray((values // 256).astype(np.uint8))
        image = ImageOps.exif_transpose(image)
        if "A" in image.getbands() or "transparency" in image.info:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        image = ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1), mode  # [C, H, W]


def attempt(path, size):
    """`decode`, but of a file that cannot be decoded it returns (None, why)."""
    try:
        return decode(path, size)
    except Exception as error:  # Pillow raises half a dozen unrelated types on a damaged file
        return None, one_line(error).replace(f" {path!r}", "").rstrip(":")


# ---- many files


def decode_all(paths, size):
    """Decode files into uint8 [n, 3, size, size] on all cores; returns it with the kept positions; prints what was not plain RGB.

    Raises UsageError where none can be decoded.
    """
    images = torch.empty(len(paths), 3, size, size, dtype=torch.uint8)  # [n, C, H, W]
    kept, broken, converted = [], [], []
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # threads suffice: Pillow decodes outside Python's lock
        answers = pool.map(lambda path: attempt(path, size), paths)
        for i, (image, note) in enumerate(tqdm(answers, total=len(paths), desc="decoding", unit="image")):
            if image is None:
                broken.append(f"{one_line(paths[i])}, {note}")
                continue
            if note != "RGB":
                converted.append(f"{one_line(os.path.basename(paths[i]))}, mode {note}")
            images[len(kept)] = image
            kept.append(i)
    if not kept:
        raise UsageError(f"none of the {len(paths)} image files could be decoded (the first: {broken[0]})")
    if converted:
        print(f"{len(converted)} of {len(paths)} images were not RGB (first: {converted[0]}); converted")
    if broken:
        print(f"{len(broken)} of {len(paths)} images could not be decoded (first: {broken[0]}); skipped")
    return images[: len(kept)], kept


class LazyFolder:
    """Image files that are decoded each time they are asked for; indexed and measured as a uint8 tensor [n, 3, size, size] would be.

    For a file that cannot be decoded stands the next one that can, of its own class where there is one: which one depends on
    the files alone, so a run that is taken up again sees the same. It is named once. Raises UsageError where more than
    1% of the files, and more than ten, are broken, or all. `labels`: int64 [n] or None; `numbers`: the places in `paths` (and
    `labels`) of a subset's images.
    """

    dtype = torch.uint8

    def __init__(self, paths, labels, size, numbers=None, broken=None):
        self.paths, self.labels, self.size = paths, labels, size
        self.numbers = range(len(paths)) if numbers is None else numbers
        self.broken = {} if broken is None else broken  # path -> why, for those found so far; shared by the subsets
        self.shape = torch.Size((len(self.numbers), 3, size, size))  # [n, C, H, W]

    def __len__(self):
        return len(self.numbers)

    def subset(self, indices):
        """The images numbered `indices` (int64 [k])."""
        return LazyFolder(self.paths, self.labels, self.size, [self.numbers[i] for i in indices.tolist()], self.broken)

    def __getitem__(self, i):
        wanted = torch.as_tensor(i)
        images, broken = self.read(wanted.flatten().tolist())
        self.report(broken)
        return images.view(*wanted.shape, *self.shape[1:])  # [3, size, size] for a number, [k, 3, size, size] for k

    def stand_ins(self, i):
        """Places in `paths`: i, then those after it, then those before it; of i's class first."""
        yield i
        alike = range(len(self.paths)) if self.labels is None else (self.labels == self.labels[i]).nonzero().flatten().tolist()
        for places in (alike, range(len(self.paths))):
            yield from chain((k for k in places if k > i), (k for k in places if k < i))

    def read(self, wanted):
        """The images numbered `wanted` (a list), uint8 [B, 3, size, size], and path -> why for what could not be decoded.

        Runs in a loader's process too, so it neither prints nor remembers: `report` does, where the answer arrives.
        """
        images, broken = [], {}
        for i in wanted:
            image = None
            for k in self.stand_ins(self.numbers[i]):
                if image is not None or self.too_many(broken):
                    break
                image, note = attempt(self.paths[k], self.size)
                if image is None:
                    broken[self.paths[k]] = note
            images.append(torch.zeros(self.shape[1:], dtype=torch.uint8) if image is None else image)  # of zeros nothing will be seen
        # In a loader's process default_collate stacks in shared memory. A tensor that is moved there when it is sent would leave its old
        # memory behind: 10 MB a batch.
        return default_collate(images), broken  # [B, C, H, W]

    def too_many(self, broken):
        """Whether so many files cannot be decoded that the data is at fault."""
        return len(broken) > max(10, len(self.paths) // 100) or len(broken) == len(self.paths)

    def report(self, broken):
        """Print a line on stderr for each file of `broken` (path -> why) that is new; UsageError where they have become too many."""
        new = {path: why for path, why in broken.items() if path not in self.broken}
        self.broken.update(new)
        if self.too_many(self.broken):
            path, why = next(iter(self.broken.items()))
            raise UsageError(f"{len(self.broken)} of {len(self.paths)} image files could not be decoded, more than a few (the first: "
                             f"{one_line(path)}, {why}); repair or remove them")
        for path, why in new.items():
            tqdm.write(f"warning: cannot decode {one_line(path)} ({why}); the next image of its class stands in for it", file=sys.stderr)


# ---- which files


def image_files(folder):
    """Paths of the image files anywhere below a folder, in a fixed order; hidden ones (.DS_Store, ._a.jpg, .ipynb_checkpoints) are none.

    Links are followed, but each folder is visited once, at its highest place, where it is rather than where a link is: circles end.
    """
    found, seen, waiting = [], set(), [str(folder)]
    for place in waiting:  # grows as folders are found
        if (real := os.path.realpath(place)) in seen:
            continue
        seen.add(real)
        try:
            entries = sorted((entry for entry in os.scandir(place) if not entry.name.startswith(".")), key=lambda entry: entry.name)
        except OSError as error:
            print(f"cannot look into the folder {one_line(place)} ({one_line(error)}); left out")
            continue
        # Only a link is asked with isdir: the others know what they are, and a million questions take time on a network's disk.
        folders = {e.path: e.is_symlink() for e in entries if (os.path.isdir(e.path) if e.is_symlink() else e.is_dir())}
        waiting += sorted(folders, key=folders.get)  # links last
        found += [entry.path for entry in entries if entry.path not in folders and entry.name.lower().endswith(EXTENSIONS)]
    return sorted(found, key=lambda path: (os.path.dirname(path).split(os.sep), path))


def class_folders(folder):
    """Class name -> image files, for the sub-folders that hold any, in sorted order; and the image files beside them."""
    classes, loose, start = {}, [], len(os.path.join(folder, ""))
    for path in image_files(folder):
        name, _, inside = path[start:].partition(os.sep)
        (classes.setdefault(name, []) if inside else loose).append(path)
    return classes, loose


def read_folder(folder, split, size=None):
    """Image files below a folder: images uint8 [n, 3, size, size], labels int64 [n] or None, class names or None.

    Class sub-folders, sorted, give the labels; a flat folder has none. With train/ and test/ or val/ below it, each split is
    read from its own sub-folder (val stands in for test, and test for val) and train/ names the classes; otherwise the
    whole folder is the train split. Differs from the official code: crops are cut from the stored centre square, not from
    the whole photograph.
    """
    size = size or FOLDER_SIZE
    places = {part: folder / part for part in ("train", "test", "val") if os.path.isdir(folder / part)}
    if "train" not in places or len(places) == 1:
        places = {"train": folder}
    else:
        places = {"train": places["train"], "test": places.get("test", places.get("val")), "val": places.get("val", places.get("test"))}
    check_known(f"--split of folder {folder}", split, list(places))
    place = places[split]
    classes, loose = class_folders(place)
    paths = list(chain(*classes.values())) or loose
    if not paths:
        raise UsageError(f"no image in {place} or below it; looked for {' '.join(EXTENSIONS)}, in any case")
    class_names, labels = list(classes if split == "train" else class_folders(places["train"])[0]) or None, None
    if classes:
        if strange := [name for name in classes if name not in (class_names or ())]:
            raise UsageError(f"{place} has images of {one_line(strange[0])}, {places['train']} has none; train/ names the classes")
        number = {name: k for k, name in enumerate(class_names)}
        labels = torch.tensor([number[name] for name, files in classes.items() for _ in files])  # [n]
        if loose:
            print(f"{len(loose)} images lie in {place} beside its class folders; left out")
        named = (item.name for item in place.iterdir() if item.is_dir() and not item.name.startswith("."))
        if empty := sorted(set(named) - set(classes)):
            print(f"{len(empty)} folders in {place} hold no image of their own (first: {one_line(empty[0])}) and get no class number")
    if len(paths) * 3 * size * size > MEMORY_LIMIT:
        print(f"{len(paths):,} images of {size} pixels are too many for memory: decoded when needed, and converted where they are not RGB")
        return LazyFolder(paths, labels, size), labels, class_names
    images, kept = decode_all(paths, size)
    if classes:
        labels = labels[kept]
        if gone := [name for name in classes if number[name] not in labels]:
            print(f"no image is left of {len(gone)} classes (first: {one_line(gone[0])}), which keep their numbers")
    return images, labels, class_names
