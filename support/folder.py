"""Image folders: which files are images, the split and class of each, and their pixels.

A file that cannot be decoded is named on the terminal and left out, or replaced by its neighbor.
"""

import contextlib
import os
import re
import signal
import sys
import threading
import warnings
from collections import Counter
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
LARGE = 50_000_000  # pixels; of the images that are larger, one at a time is decoded
LARGEST = 250_000_000  # pixels; a larger image is refused, as a file of a few kB may claim to be
SAMPLE = 2000  # files whose gray levels are measured in a folder of more than ten times as many


# --- one file -------------------------------------------------------------------------------------

one_large_image = threading.Lock()


@contextlib.contextmanager
def opened(path):
    """An image file opened by Pillow, up to LARGEST pixels; large ones one at a time."""
    warnings.filterwarnings("ignore", module="PIL")  # damaged EXIF data does not matter here
    if Image.MAX_IMAGE_PIXELS is not None:  # Pillow refuses twice as many
        Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, LARGEST // 2)
    with Image.open(path) as image:
        large = image.width * image.height > LARGE
        with one_large_image if large else contextlib.nullcontext():
            yield image


def shrink(image, side):
    """A large image at a fraction of its size, its sides about `side` pixels or more."""
    factor = min(image.size) // side
    if image.width * image.height <= LARGE or factor < 2:
        return image
    if image.mode in ("L", "RGB", "RGBA", "LA", "CMYK", "YCbCr"):
        return image.reduce(factor)
    return image.resize((image.width // factor, image.height // factor), Image.Resampling.NEAREST)


def upright(image):
    """The image turned as its EXIF data says, whatever its format; unturned if they are damaged."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # as many types as there are ways to damage EXIF data
        return image


def gray_levels(image):
    """The integers of an image of more than 8 bits, [H, W]; ValueError if their white is unknown"""
    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise ValueError(f"mode {image.mode}: 32-bit pixels, whose black and white are unknown; "
                         "save it with 8 or 16 bits")
    return values


def decode(path, size, bits=16):
    """Decode an image file as uint8 [3, size, size] (pixels); returns it and the file's mode.

    The shorter side is resized to `size` and the center kept. Of an animation the first frame is
    taken; transparent pixels become white. bits: of the integers of gray images of more than 8 bits
    (`measure_bits`); brighter ones become white. Raises whatever Pillow raises on a damaged file.
    """
    with opened(path) as image:
        mode = image.mode
        image.draft(None, (2 * size, 2 * size))  # a JPEG is decoded at a fraction of its size
        image.load()
        image = upright(shrink(image, 4 * size))
        if mode[0] in "IF":  # which Pillow would clip to white rather than scale
            values = gray_levels(image).astype(np.int32) >> (bits - 8)  # [H, W]
            image = Image.fromarray(np.minimum(values, 255).astype(np.uint8))
        if "A" in image.getbands() or "transparency" in image.info:
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image.convert("RGBA"))
        image = ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1), mode  # [C, H, W]


def attempt(path, size, bits=16):
    """`decode`, but (None, why) for a file that cannot be decoded."""
    try:
        return decode(path, size, bits)
    except Exception as error:  # Pillow raises half a dozen unrelated types on a damaged file
        return None, one_line(error)


def bits_of(path):
    """How many bits the integers of a gray and of a colored image take; 0 for pixels of 8 bits."""
    try:
        with opened(path) as image:
            if image.mode[0] == "I":
                return int(gray_levels(image).max()).bit_length(), 0
            if ";16" in repr(image.tile[:1]):  # 16 bits a color, of which Pillow keeps the upper 8
                bands = zip(image.getbands(), image.convert(image.mode).split())
                top = max(band.getextrema()[1] for name, band in bands if name != "A")
                return 0, 8 + top.bit_length()
    except Exception:  # whoever decodes the file will say so
        pass
    return 0, 0


# --- many files -----------------------------------------------------------------------------------


def measure_bits(paths, other_places):
    """Bits of the integers that the gray images of a data set hold, 8 to 16: the same for all, so
    that images stay comparable. 16 if there are none.

    paths: the image files of one split; other_places: the folders of the others, which are asked
    only if there are such images. Of more than ten times SAMPLE files, about SAMPLE are measured.
    Raises UsageError if colors have 16 bits of which Pillow would drop those that are used.
    """
    def measure(files):
        step = len(files) // SAMPLE if len(files) > 10 * SAMPLE else 1
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            found = [(0, 0), *pool.map(bits_of, files[::step])]
        return [max(bits) for bits in zip(*found)]

    found = [measure(paths)]
    if any(found[0]):
        found += [measure(image_files(place)) for place in other_places]
    gray, color = (max(bits) for bits in zip(*found))
    if 0 < color < 14:
        raise UsageError(f"{one_line(paths[0])} and others have 16 bits a color but use the lowest "
                         f"{color} at most, of which Pillow drops 8; save them with 8 bits a color")
    return max(gray, 8) if gray else 16


def decode_all(paths, size, bits=16):
    """Decode files on all cores: uint8 [n, 3, size, size] and the numbers of the files decoded.

    Prints which could not be decoded; raises UsageError if none could.
    """
    images = torch.empty(len(paths), 3, size, size, dtype=torch.uint8)  # [n, C, H, W]
    kept, broken, converted = [], [], []
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow decodes outside Python's lock
        answers = pool.map(lambda path: attempt(path, size, bits), paths)
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
    paths: of all files; labels: int64 of all files, or None; numbers: the files of this subset;
    bits: see `decode`.
    """

    def __init__(self, paths, labels, size, numbers=None, broken=None, bits=16):
        self.paths, self.labels, self.size, self.bits = paths, labels, size, bits
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
        return LazyFolder(self.paths, self.labels, self.size, numbers, self.broken, self.bits)

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
                found, note = attempt(self.paths[k], self.size, self.bits)
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

SYSTEM = ("@eadir", "#recycle", "$recycle.bin", "system volume information", "__macosx",
          "lost+found", "__pycache__")  # folders that are no part of the data
NOTES = (".txt", ".csv", ".tsv", ".json", ".xml", ".yaml", ".yml", ".md", ".rst", ".html", ".pdf",
         ".py", ".ipynb", ".sh", ".log", ".mat", ".db", ".ini", ".zip", ".gz", ".tar", ".pt")
UNREADABLE = ("BUFR", "GRIB", "HDF5", "MPEG", "EPS", "WMF")  # Pillow only knows their headers


def extensions():
    """Endings, in lower case, of the files that Pillow reads."""
    known = Image.registered_extensions()
    return (".mpo", *(end for end, format in known.items()
                      if format in Image.OPEN and format not in UNREADABLE))


def is_folder(entry):
    """Whether an os.DirEntry is a folder, or a link to one; asks the disk about links only."""
    return os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()


def is_run(names):
    """Whether files of these names stand in the folder of a run of train.py."""
    return "config.json" in names and ("metrics.csv" in names or "checkpoint.pt" in names)


def is_data(name):
    """Whether a file or folder of this name is neither hidden nor the system's."""
    return not name.startswith(".") and name.lower() not in SYSTEM


def walk(folder):
    """Paths of the image files anywhere below a folder, in a fixed order; and lines about what
    is left out there. Hidden files and folders, and the system's, are left out without a line.

    Links are followed, but each folder is visited once, not through a link if possible: cycles end.
    """
    found, others, notes, seen, waiting = [], [], [], set(), [str(folder)]
    endings = extensions()
    for place in waiting:  # grows as folders are found
        if (real := os.path.realpath(place)) in seen:
            continue
        seen.add(real)
        try:
            entries = [entry for entry in os.scandir(place) if is_data(entry.name)]
        except OSError as error:
            notes.append(f"cannot open the folder {one_line(place)} ({one_line(error)}); it is left"
                         " out")
            continue
        if len(seen) > 1 and is_run({entry.name for entry in entries}):
            notes.append(f"{one_line(place)} is the folder of a run; it is left out")
            continue
        folders = {entry for entry in entries if is_folder(entry)}
        waiting += [entry.path for entry in
                    sorted(folders, key=lambda entry: (entry.is_symlink(), entry.name))]
        for entry in entries:
            if entry in folders:
                continue
            name = entry.name.lower()
            if name.endswith(endings):
                found.append(entry.path)
            elif not name.endswith(NOTES):
                others.append(entry.path)
    if others:
        kinds = Counter(os.path.splitext(path)[1].lower() or "no ending" for path in others)
        kinds = ", ".join(f"{count} {one_line(kind)}" for kind, count in kinds.most_common(5))
        notes.append(f"{len(others)} files in {one_line(folder)} are left out, for Pillow cannot "
                     f"read them: {kinds} (first: {one_line(min(others))})")
    found.sort(key=lambda path: (os.path.dirname(path).split(os.sep), path))
    return found, notes


def image_files(folder):
    """Paths of the image files anywhere below a folder, in a fixed order."""
    return walk(folder)[0]


def sub_folders(folder):
    """Names of the folders in a folder, sorted, but for hidden ones and the system's."""
    try:
        return sorted(item.name for item in os.scandir(folder)
                      if is_data(item.name) and is_folder(item))
    except OSError:  # `walk` says so
        return []


def group(files, folder):
    """Name -> image files, sorted, of the sub-folders with images; and the files in none."""
    groups, loose, start = {}, [], len(os.path.join(folder, ""))
    for path in files:
        name, _, inside = path[start:].partition(os.sep)
        (groups.setdefault(name, []) if inside else loose).append(path)
    return groups, loose


# --- splits ---------------------------------------------------------------------------------------

SPLITS = {"train": "train", "training": "train", "trainset": "train", "test": "test",
          "testing": "test", "testset": "test", "val": "val", "valid": "val", "validation": "val",
          "valset": "val", "dev": "val"}
IMAGES = ("images", "image", "imgs", "img", "jpegimages")  # folders that are no class
LEVELS = (*IMAGES, "unknown", "unlabeled", "unlabelled", "all")  # nor are these, if alone


def words(name):
    """The words in a folder's name, in lower case."""
    return [word for word in re.split(r"[\W\d_]+", name.lower()) if word]


def split_of(name):
    """The split that a folder's name stands for, such as val for Validation_set, or None."""
    rest = [word for word in words(name) if word not in ("set", "data", "images", "image", "imgs")]
    return SPLITS.get(rest[0]) if len(rest) == 1 else None


def split_folders(folder):
    """Split -> folder: train/ and test/ or val/, of which one replaces the other if it is missing;
    without them the whole folder is the train split. A wrapper around all the images is opened.

    Raises UsageError where split folders would be taken for classes.
    """
    there = {}
    for name in sub_folders(folder):
        if split := split_of(name):
            if split in there:
                raise UsageError(f"{folder} has {there[split].name}/ and {name}/, both a {split} "
                                 "split; rename or move one of them")
            there[split] = folder / name
    if "train" in there and len(there) > 1:
        beside = [item.name for item in os.scandir(folder) if is_data(item.name)
                  and item.name.lower().endswith(extensions()) and not is_folder(item)]
        if beside and 2 * len(beside) > len(image_files(folder)):
            raise UsageError(f"{folder} has {len(beside)} images of its own and fewer in train/ and"
                             " its other splits; move either elsewhere")
        used = {place.name for place in there.values()}
        if beside := beside[:1] + [name for name in sub_folders(folder) if name not in used]:
            print(f"{folder} is read from {', '.join(sorted(used))} only, not from "
                  f"{one_line(', '.join(beside[:5]))}")
        return {"train": there["train"], "test": there.get("test", there.get("val")),
                "val": there.get("val", there.get("test"))}
    groups, loose = group(image_files(folder), folder)
    inside = sum(map(len, groups.values()))
    if len(loose) >= inside or not groups:
        return {"train": folder}
    if "train" in there and there["train"].name in groups:
        own, flat = group(groups[there["train"].name], there["train"])
        others = [name for name in groups if name != there["train"].name]
        split = own and not flat and not any(name.lower() in LEVELS for name in own)
        if split or not others:
            if others:
                print(f"{folder} is read from {there['train'].name} only, not from "
                      f"{one_line(', '.join(others[:5]))}")
            return {"train": there["train"]}
        print(f"{there['train']} is taken for a class, as {one_line(others[0])} is, for it has no "
              "class folders of its own")
    elif stray := [part.name for part in there.values() if part.name in groups]:
        raise UsageError(f"{folder} has {stray[0]}/ but no train/: a split without images to train "
                         "on; move the images to train on into train/, or choose "
                         f"--dataset {folder / stray[0]}")
    spoken = {}  # what is left of the names without their split -> splits, for pets_train
    for name in groups:
        parts = words(name)
        if splits := [part for part in parts if part in SPLITS]:
            rest = " ".join(part for part in parts if part not in SPLITS)
            spoken.setdefault(rest, set()).add(SPLITS[splits[0]])
    if any("train" in splits and len(splits) > 1 for splits in spoken.values()):
        raise UsageError(f"the sub-folders of {folder} ({one_line(', '.join(list(groups)[:4]))}) "
                         "look like splits; name them train/, test/ or val/")
    if len(groups) == 1 and not loose:
        return open_wrapper(folder, *groups.items())
    return {"train": folder}


def open_wrapper(folder, only):
    """`split_folders` of the only sub-folder with images, (name, files), if it wraps the data set;
    one that holds a class leaves the folder as it is."""
    (name, files), place = only, folder
    chain_of = [name]
    while True:
        place = place / name
        groups, loose = group(files, place)
        if loose or len(groups) > 1:
            break
        ((name, files),) = groups.items()
        chain_of.append(name)
        if split_of(name):
            break
    wraps = not loose and (len(groups) > 1 or split_of(name))
    if not wraps and chain_of[0].lower() not in LEVELS:
        return {"train": folder}
    print(f"{one_line(folder)} holds images in {one_line(chain_of[0])}/ only, which is read "
          "in its place")
    return split_folders(folder / chain_of[0])


# --- classes --------------------------------------------------------------------------------------


def classes_in(place):
    """Class name -> image files, sorted; the files in no class; lines about what is left out; and
    the folder itself, or the one in it that holds all the images (images/, or train/ in train/).

    The first is empty if the images lie flat. Raises UsageError if it is unclear whether they do.
    """
    files, notes = walk(place)
    classes, loose = group(files, place)
    inside = sum(map(len, classes.values()))
    if len(classes) == 1 and not loose:
        (name,) = classes
        if name.lower() in LEVELS or split_of(name) and split_of(name) == split_of(place.name):
            classes, loose, more, _ = classes_in(place / name)
            return annotated(place, classes, loose, more), loose, more, place / name
    if loose and classes:
        names = {os.path.basename(path) for path in loose}
        copies = all(os.path.basename(path) in names for path in chain(*classes.values()))
        if len(loose) >= inside or copies:
            notes.append(f"the {len(loose)} images that lie in {one_line(place)} itself are the "
                         f"data set; the {inside} in sub-folders (first: "
                         f"{one_line(list(classes)[0])}) are left out")
            classes = {}
        elif len(classes) == 1 and 10 * len(loose) > inside:
            raise UsageError(f"{place} has {len(loose)} images of its own and {inside} in "
                             f"{one_line(list(classes)[0])}/: move the former into sub-folders, "
                             "one for each class, or the latter elsewhere")
    if clear := [name for name in classes if name.lower() in IMAGES and len(classes) > 1]:
        others = one_line(", ".join([name for name in classes if name not in clear][:3]))
        raise UsageError(f"{place} has images in {clear[0]}/ and in {others}, which are no classes;"
                         f" choose --dataset {place / clear[0]}, or move the others elsewhere")
    for name, members in classes.items():
        below = {split_of(part) for part in group(members, place / name)[0]}
        if "train" in below and len(below - {None}) > 1:
            raise UsageError(f"{place} has train/ and other splits in {one_line(name)}/ rather than"
                             f" around the classes; choose --dataset {one_line(place / name)}, or "
                             "move the class folders into train/ and test/")
    return annotated(place, classes, loose, notes), loose, notes, place


def annotated(place, classes, loose, notes):
    """The classes, or for flat images those of Tiny-ImageNet's val_annotations.txt; adds to the
    notes if other files seem to hold labels. Takes images that get a class off `loose`."""
    table = place / "val_annotations.txt"
    if classes or not loose:
        return classes
    if table.is_file():
        try:
            lines = table.read_text(errors="replace").splitlines()
        except OSError as error:
            raise UsageError(f"cannot read {table} ({one_line(error)})") from None
        known = dict(line.split("\t")[:2] for line in lines if line.count("\t"))
        for path in list(loose):
            if name := known.get(os.path.basename(path)):
                classes.setdefault(name, []).append(path)
        loose[:] = [path for path in loose if os.path.basename(path) not in known]
        return dict(sorted(classes.items()))
    tables = sorted(item.name for item in place.iterdir() if item.suffix.lower() in
                    (".csv", ".json", ".txt") and {"annotations", "labels", "classes"} & set(
                        words(item.stem)))
    if tables:
        notes.append(f"the images of {one_line(place)} lie flat and get no labels: "
                     f"{one_line(tables[0])} is not read; for labels put them into a sub-folder "
                     "for each class")
    return classes


def number_classes(place, classes, class_names, loose):
    """Labels int64 [n] of the files of `classes`; prints what is left out."""
    if strange := [name for name in classes if name not in class_names]:
        raise UsageError(f"{place} has images of {one_line(strange[0])}, a class that train/ lacks")
    if loose:
        print(f"{len(loose)} images in {place} are in none of its class folders; they are left out")
    if empty := [name for name in sub_folders(place) if name not in classes]:
        print(f"{len(empty)} folders in {place} hold no image of their own (first: "
              f"{one_line(empty[0])}); they get no class number")
    number = {name: k for k, name in enumerate(class_names)}
    return torch.tensor([number[name] for name, files in classes.items() for _ in files])  # [n]


def read_folder(folder, split, size=None):
    """The fields of an ImageDataset: the images below a folder, as uint8 [n, 3, size, size].

    Sub-folders, sorted, are the classes, train/'s those of all splits; a flat folder has no labels.
    If test/ has none, and val/ has, val/ replaces it.
    Differs from the official code: crops are cut from the stored center square, not from the whole
    photograph.
    """
    size, places = size or FOLDER_SIZE, split_folders(folder)
    check_choice(f"--split of the folder {folder}", split, places)
    place = places[split]
    classes, loose, notes, inner = classes_in(place)
    names = list(classes if split == "train" else classes_in(places["train"])[0])
    if split == "test" and names and not classes and (val := places["val"]) != place:
        labelled, val_loose, val_notes, val_inner = classes_in(val)
        if labelled:
            print(f"the images in {place} have no labels; those in {val} are the test split")
            place, classes, loose, notes, inner = val, labelled, val_loose, val_notes, val_inner
    for note in notes:
        print(note)
    paths = list(chain(*classes.values())) or loose
    if not paths:
        raise UsageError(f"there is no image in {place} or below it; looked for .jpg .png .tiff and"
                         " Pillow's other formats, in upper or lower case" + "".join(
                             f"; {note}" for note in notes))
    labels = number_classes(inner, classes, names, loose) if classes else None
    bits = measure_bits(paths, {*places.values()} - {place})
    if bits < 16:
        print(f"gray images of {folder} hold {bits}-bit integers in 16 or 32 bits: in all of them "
              f"0..{2**bits - 1} becomes 0..255")
    if len(paths) * 3 * size * size > MEMORY_LIMIT:
        print(f"{len(paths):,} images of {size} pixels do not fit into memory: each is decoded when"
              " it is needed")
        images = LazyFolder(paths, labels, size, bits=bits)
    else:
        images, kept = decode_all(paths, size, bits)
        labels = None if labels is None else labels[kept]
        paths = [paths[i] for i in kept]
    return {"images": images, "labels": labels, "class_names": names or None, "paths": paths}
