"""Image folders: which files are images, the class of each, and their pixels.

A file that cannot be decoded is named on the terminal and left out, or replaced by its neighbor.
"""

import os
import signal
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from itertools import chain

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, default_collate
from tqdm import tqdm

from config import UsageError, check_choice
from support.checkpoint import one_line

MEMORY_LIMIT = 4 * 2**30  # bytes of pixels kept in memory; a larger folder is decoded on demand
FOLDER_SIZE = 224  # side of a folder's images in pixels, if the caller names none
EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm")


# --- one file -------------------------------------------------------------------------------------


def decode(path, size):
    """Decode an image file as uint8 [3, size, size] (pixels); returns it and the file's mode.

    The shorter side is resized to `size` and the center kept. Of an animation the first frame is
    taken; transparent pixels become white. Raises whatever Pillow raises on a damaged file.
    """
    warnings.filterwarnings("ignore", module="PIL")  # damaged EXIF data does not matter here
    with Image.open(path) as image:
        mode = image.mode
        image.draft(None, (2 * size, 2 * size))  # a JPEG is decoded at a fraction of its size
        if mode[0] in "IF":  # 16-bit gray, which Pillow would clip to white rather than scale
            values = np.asarray(image)
            if mode == "F" or values.min() < 0 or values.max() > 65535:
                raise ValueError(f"mode {mode}: 32-bit pixels, whose black and white are unknown; "
                                 "save it with 8 or 16 bits")
            image = Image.fromarray((values // 256).astype(np.uint8))
        image = ImageOps.exif_transpose(image)
        if "A" in image.getbands() or "transparency" in image.info:
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image.convert("RGBA"))
        image = ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1), mode  # [C, H, W]


def attempt(path, size):
    """`decode`, but (None, why) for a file that cannot be decoded."""
    try:
        return decode(path, size)
    except Exception as error:  # Pillow raises half a dozen unrelated types on a damaged file
        return None, one_line(error)


# --- many files -----------------------------------------------------------------------------------


def decode_all(paths, size):
    """Decode files on all cores: uint8 [n, 3, size, size] and the numbers of the files decoded.

    Prints which could not be decoded; raises UsageError if none could.
    """
    images = torch.empty(len(paths), 3, size, size, dtype=torch.uint8)  # [n, C, H, W]
    kept, broken, converted = [], [], []
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow decodes outside Python's lock
        answers = pool.map(lambda path: attempt(path, size), paths)
        bar = tqdm(answers, total=len(paths), desc="decoding", unit="image")
        for i, (image, note) in enumerate(bar):
            if image is None:
                broken.append(f"{one_line(paths[i])}: {note}")
                continue
            if note != "RGB":
                converted.append(f"{one_line(paths[i])}, mode {note}")
            images[len(kept)] = image
            kept.append(i)
    if not kept:
        raise UsageError(f"none of the {len(paths)} image files could be decoded (first: "
                         f"{broken[0]})")
    for what, files in (("were not RGB and were converted", converted),
                        ("could not be decoded and are left out", broken)):
        if files:
            print(f"{len(files)} of {len(paths)} images {what} (first: {files[0]})")
    return images[: len(kept)], kept


class LazyFolder:
    """Image files decoded each time they are indexed, like a uint8 tensor [n, 3, size, size].

    A file that cannot be decoded is replaced by the next one, of its own class if possible: which
    one depends on the files alone, so a resumed run sees the same. Raises UsageError once more than
    ten files, and more than 1% of them, are broken, or all.
    paths: of all files; labels: int64 of all files, or None; numbers: the files of this subset.
    """

    def __init__(self, paths, labels, size, numbers=None, broken=None):
        self.paths, self.labels, self.size = paths, labels, size
        self.numbers = range(len(paths)) if numbers is None else numbers
        self.broken = {} if broken is None else broken  # path -> why; shared by the subsets
        self.shape = torch.Size((len(self.numbers), 3, size, size))  # [n, C, H, W]

    def __len__(self):
        return len(self.numbers)

    def __getitem__(self, i):
        wanted = torch.as_tensor(i)
        images, broken = self.read(wanted.flatten().tolist())
        self.report(broken)
        return images.view(*wanted.shape, *self.shape[1:])  # [3, size, size], or [k, 3, size, size]

    def subset(self, indices):
        """The images numbered `indices` (int64 [k])."""
        numbers = [self.numbers[i] for i in indices.tolist()]
        return LazyFolder(self.paths, self.labels, self.size, numbers, self.broken)

    def identity(self):
        """Bytes that change with the name or size of any file."""
        paths = [self.paths[i] for i in self.numbers]
        sizes = [(os.path.basename(path), os.path.getsize(path)) for path in paths]
        return repr(sizes).encode(errors="surrogateescape")

    def candidates(self, i):
        """File numbers: i, then those after it, then those before it; of i's class first."""
        yield i
        everything = torch.arange(len(self.paths))
        alike = everything if self.labels is None else everything[self.labels == self.labels[i]]
        for numbers in (alike, everything):
            yield from chain(numbers[numbers > i].tolist(), numbers[numbers < i].tolist())

    def read(self, wanted):
        """The images numbered `wanted` (a list), uint8 [B, 3, size, size], and path -> why for
        those that cannot be decoded. Runs in loader processes, so it leaves printing to `report`.
        """
        images, broken = [], {}
        for i in wanted:
            image = torch.zeros(self.shape[1:], dtype=torch.uint8)  # never seen: `report` raises
            for k in self.candidates(self.numbers[i]):
                found, note = attempt(self.paths[k], self.size)
                if found is not None:
                    image = found
                    break
                broken[self.paths[k]] = note
                if self.too_many(broken):
                    break
            images.append(image)
        # In a loader process default_collate stacks in shared memory; a tensor moved there when it
        # is sent would leave its old memory behind, 10 MB a batch.
        return default_collate(images), broken  # [B, C, H, W]

    def too_many(self, broken):
        """Whether so many files are broken that the data must be at fault."""
        n = len(self.paths)
        return len(broken) > max(10, n // 100) or len(broken) == n

    def report(self, broken):
        """Warn of each newly found broken file once; UsageError if there are too many of them."""
        new = {path: why for path, why in broken.items() if path not in self.broken}
        self.broken.update(new)
        if self.too_many(self.broken):
            path, why = next(iter(self.broken.items()))
            raise UsageError(f"{len(self.broken)} of {len(self.paths)} image files could not be "
                             f"decoded (first: {one_line(path)}: {why}); repair or remove them")
        for path, why in new.items():
            tqdm.write(f"warning: cannot decode {one_line(path)} ({why}); another image of its "
                       "class replaces it", file=sys.stderr)


def ignore_ctrl_c(worker):
    """Ctrl-C reaches the loader processes too; the training loop alone decides when to stop."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def lazy_batches(images, parts, workers):
    """The images of a LazyFolder numbered by each of `parts`, uint8 [B, C, H, W], decoded by
    `workers` processes, but no more than there are cores."""
    usable = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))
    # A generator of its own: the loader would otherwise draw from torch's global one.
    loader = DataLoader(
        [part.tolist() for part in parts], None, num_workers=min(workers, len(usable(0))),
        collate_fn=images.read, pin_memory=torch.cuda.is_available(), generator=torch.Generator(),
        worker_init_fn=ignore_ctrl_c)
    for batch, broken in loader:
        images.report(broken)
        yield batch


# --- which files ----------------------------------------------------------------------------------


def is_folder(entry):
    """Whether an os.DirEntry is a folder, or a link to one; asks the disk about links only."""
    return os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()


def image_files(folder):
    """Paths of the image files anywhere below a folder, in a fixed order, hidden ones left out.

    Links are followed, but each folder is visited once, not through a link if possible: cycles end.
    """
    found, seen, waiting = [], set(), [str(folder)]
    for place in waiting:  # grows as folders are found
        if (real := os.path.realpath(place)) in seen:
            continue
        seen.add(real)
        try:
            entries = [entry for entry in os.scandir(place) if not entry.name.startswith(".")]
        except OSError as error:
            print(f"cannot open the folder {one_line(place)} ({one_line(error)}); it is left out")
            continue
        folders = {entry for entry in entries if is_folder(entry)}
        waiting += [entry.path for entry in
                    sorted(folders, key=lambda entry: (entry.is_symlink(), entry.name))]
        found += [entry.path for entry in entries
                  if entry.name.lower().endswith(EXTENSIONS) and entry not in folders]
    return sorted(found, key=lambda path: (os.path.dirname(path).split(os.sep), path))


def class_folders(folder):
    """Class name -> image files, sorted, of the sub-folders with images; and the files in none."""
    classes, loose, start = {}, [], len(os.path.join(folder, ""))
    for path in image_files(folder):
        name, _, inside = path[start:].partition(os.sep)
        (classes.setdefault(name, []) if inside else loose).append(path)
    return classes, loose


def split_folders(folder):
    """Split -> folder: train/ and test/ or val/, of which one replaces the other if it is missing;
    without them the whole folder is the train split."""
    there = {part: folder / part for part in ("train", "test", "val") if (folder / part).is_dir()}
    if "train" not in there or len(there) == 1:
        return {"train": folder}
    return {"train": there["train"], "test": there.get("test", there.get("val")),
            "val": there.get("val", there.get("test"))}


def number_classes(place, classes, class_names, loose):
    """Labels int64 [n] of the files of `classes`; prints what is left out."""
    if strange := [name for name in classes if name not in class_names]:
        raise UsageError(f"{place} has images of {one_line(strange[0])}, a class that train/ lacks")
    if loose:
        print(f"{len(loose)} images in {place} are in none of its class folders; they are left out")
    inside = {item.name for item in place.iterdir() if item.is_dir() and item.name[0] != "."}
    if empty := sorted(inside - classes.keys()):
        print(f"{len(empty)} folders in {place} hold no image of their own (first: "
              f"{one_line(empty[0])}); they get no class number")
    number = {name: k for k, name in enumerate(class_names)}
    return torch.tensor([number[name] for name, files in classes.items() for _ in files])  # [n]


def read_folder(folder, split, size=None):
    """The fields of an ImageDataset: the images below a folder, as uint8 [n, 3, size, size].

    Sub-folders, sorted, are the classes, train/'s those of all splits; a flat folder has no labels.
    Differs from the official code: crops are cut from the stored center square, not from the whole
    photograph.
    """
    size, places = size or FOLDER_SIZE, split_folders(folder)
    check_choice(f"--split of the folder {folder}", split, places)
    classes, loose = class_folders(places[split])
    paths = list(chain(*classes.values())) or loose
    if not paths:
        raise UsageError(f"there is no image in {places[split]} or below it; looked for "
                         f"{' '.join(EXTENSIONS)}, in upper or lower case")
    labels, names = None, list(classes if split == "train" else class_folders(places["train"])[0])
    if classes:
        labels = number_classes(places[split], classes, names, loose)
    if len(paths) * 3 * size * size > MEMORY_LIMIT:
        print(f"{len(paths):,} images of {size} pixels do not fit into memory: each is decoded when"
              " it is needed")
        images = LazyFolder(paths, labels, size)
    else:
        images, kept = decode_all(paths, size)
        labels = None if labels is None else labels[kept]
    return {"images": images, "labels": labels, "class_names": names or None}
