"""Image folders: which files are images, and the split and class of each.

Splits, classes and wrappers go by many names. Recognized layouts are read, files that are left out
are reported, and ambiguous layouts are rejected.
"""

import os
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import chain

import torch
from PIL import Image

from config import UsageError, check_choice
from support.checkpoint import one_line
from support.folder import LazyFolder, bits_of, decode_all

MEMORY_LIMIT = 4 * 2**30  # bytes of pixels kept in memory; a larger folder is decoded on demand
FOLDER_SIZE = 224  # side of a folder's images in pixels, if the caller names none
SAMPLE = 2000  # files whose gray levels are measured in a folder of more than ten times as many

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

    The sorted sub-folders are the classes; those of train/ apply to all splits. A flat folder has
    no labels. If the images in test/ have no labels and those in val/ do, val/ replaces test/.
    Differs from the official code: crops are cut from the stored center square, not from the whole
    photograph.
    """
    size, places = size or FOLDER_SIZE, split_folders(folder)
    check_choice(f"--split of the folder {folder}", split, places)
    place = places[split]
    classes, loose, notes, inner = classes_in(place)
    names = list(classes if split == "train" else classes_in(places["train"])[0])
    if split == "test" and names and not classes and (val := places["val"]) != place:
        labeled, val_loose, val_notes, val_inner = classes_in(val)
        if labeled:
            print(f"the images in {place} have no labels; those in {val} are the test split")
            place, classes, loose, notes, inner = val, labeled, val_loose, val_notes, val_inner
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
