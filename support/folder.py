"""Image files: from a path to pixels, all at once in memory or each time they are asked for.

A file that cannot be decoded is named on the terminal and left out, or replaced by its neighbor.
"""

import contextlib
import functools
import hashlib
import math
import os
import shutil
import signal
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from itertools import chain

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, default_collate
from tqdm import tqdm

from config import UsageError
from support.checkpoint import one_line

LARGE = 50_000_000  # pixels; of the images that are larger, one at a time is decoded
LARGEST = 250_000_000  # pixels; a larger image is refused, as a file of a few kB may claim to be


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


def signature(path):
    """16 bytes that change with a file's name, its size, or its first or last kilobyte."""
    digest = hashlib.sha256(os.fsencode(os.path.basename(path)) + b"\0")
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            for start in (0, max(size - 1024, 0)):
                file.seek(start)
                digest.update(file.read(1024))
        digest.update(str(size).encode())
    except OSError:  # such a file cannot be decoded either: another one replaces it
        digest.update(b"unreadable")
    return digest.digest()[:16]


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
        """Bytes that change with the name, the size, or the first or last kilobyte of any file."""
        return b"".join(signature(self.paths[i]) for i in self.numbers)

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


@functools.cache
def note(text):
    """Print a line once, though every epoch has reason to."""
    tqdm.write(text, file=sys.stderr)


def processes(workers, batch):
    """How many of the `workers` to start for batches of so many bytes: no more than there are
    cores, nor than shared memory has room for; in a container that may be little.

    Each process holds two batches there, and one more is being read. Where there is no room torch
    would end the run, and leave its files in /dev/shm.
    """
    usable = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))
    workers = min(workers, len(usable(0)))
    if workers and os.path.isdir("/dev/shm"):
        free = shutil.disk_usage("/dev/shm").free // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        if (fit := max(0, free // batch - 1) // 2) < workers:
            note(f"/dev/shm has {free / 1e6:.0f} MB to spare, too little for {workers} processes "
                 f"that decode: there will be {fit} (Docker has --shm-size 1g for more)")
            return fit
    return workers


def lazy_batches(images, parts, workers):
    """The images of a LazyFolder numbered by each of `parts`, uint8 [B, C, H, W], decoded by
    `workers` processes where that many can be started."""
    largest = max(map(len, parts), default=0) * math.prod(images.shape[1:])  # bytes
    # A generator of its own: the loader would otherwise draw from torch's global one.
    loader = DataLoader(
        [part.tolist() for part in parts], None, num_workers=processes(workers, max(largest, 1)),
        collate_fn=images.read, pin_memory=torch.cuda.is_available(), generator=torch.Generator(),
        worker_init_fn=ignore_ctrl_c)
    for batch, broken in loader:
        images.report(broken)
        yield batch
