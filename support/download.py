"""Download CIFAR-10, CIFAR-100, STL-10 and MedMNIST's volumes: resume, check the MD5, unpack."""

import hashlib
import http.client
import shutil
import tarfile
import time
import urllib.error
import urllib.request
from pathlib import Path

from filelock import FileLock, Timeout  # a requirement of torch
from tqdm import tqdm

from config import UsageError
from support.checkpoint import one_line

# Name: address of the archive, its MD5, the folder inside.
ARCHIVES = {
    "cifar10": ("https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
                "c58f30108f718f92721af3b95e74349a", "cifar-10-batches-py"),
    "cifar100": ("https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
                 "eb9058c3a382ffc7106e4002c42a8d85", "cifar-100-python"),
    "stl10": ("http://ai.stanford.edu/~acoates/stl10/stl10_binary.tar.gz",
              "91f7769df0f17e558f3565bffb0c7dfb", "stl10_binary"),
}
# MedMNIST's volumes of 28 voxels a side (Yang et al. 2023, version 3): name, MD5 of its .npz.
MEDMNIST3D = "https://zenodo.org/records/10519652/files/"
VOLUMES = {
    "organmnist3d": "a0c5a1ff56af4f155c46d46fbb45a2fe",
    "nodulemnist3d": "8755a7e9e05a4d9ce80a24c3e7a256f3",
    "adrenalmnist3d": "bbd3c5a5576322bc4cdfea780653b1ce",
    "fracturemnist3d": "6aa7b0143a6b42da40027a9dda61302f",
    "vesselmnist3d": "b41fd4f7e7e2feedddb201585ecafa1b",
    "synapsemnist3d": "1235b78a3cd6280881dd7850a78eadb6",
}
STALL = 30  # seconds without a byte after which a connection counts as dropped
ATTEMPTS = 5  # failures in a row without a new byte, after which we give up
FIRST_WAIT = 1  # seconds before the second attempt; each further one waits twice as long


def md5(path):
    """MD5 of a file, 32 hex digits."""
    digest = hashlib.md5(usedforsecurity=False)
    with open(path, "rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def size(path):
    """Bytes in a file; 0 if there is none."""
    return path.stat().st_size if path.exists() else 0


def receive(url, part):
    """Append to the .part file what it lacks of `url`.

    Raises OSError or HTTPException if the connection breaks; the bytes received until then stay.
    """
    have = size(part)
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=STALL)
    except urllib.error.HTTPError as error:
        if have and error.code == 416:  # nothing is left to send: the MD5 tells whether it is whole
            return
        raise
    with response:
        if response.status != 206:  # the server sends the whole file
            have = 0
        total = None if response.length is None else have + response.length
        bar = tqdm(total=total, initial=have, desc=part.stem, unit="B", unit_scale=True)
        with bar, open(part, "ab" if have else "wb") as file:
            while chunk := response.read1(2**18):  # `read` would lose what came before a stall
                have += file.write(chunk)
                bar.update(len(chunk))
    if total is not None and have < total:
        raise ConnectionError(f"the connection closed after {have:,} of {total:,} bytes")


def download(url, archive, remedy, expected=None):
    """Download url as the file `archive`, by way of a .part file with the MD5 `expected`, if known.

    A broken connection is resumed, and a damaged file downloaded once more, with a line printed.
    Raises UsageError with the alternative (`remedy`) if that does not help.
    """
    part = archive.with_name(archive.name + ".part")
    failures, longest, damaged = 0, size(part), False
    while True:
        try:
            receive(url, part)
        except (OSError, http.client.HTTPException) as error:
            have = size(part)
            failures, longest = (1, have) if have > longest else (failures + 1, longest)
            if failures == ATTEMPTS or getattr(error, "code", None) in (401, 403, 404, 410):
                kept = f"; the {have:,} bytes received are kept, so try again, or" if have else ";"
                raise UsageError(f"cannot fetch {url} ({one_line(error)}){kept} {remedy}"
                                 ) from None
            wait = FIRST_WAIT * 2 ** (failures - 1)
            print(f"{archive.name}: {one_line(error)}; resuming from byte {have:,} in {wait:g} s")
            time.sleep(wait)
            continue
        if expected is None or (found := md5(part)) == expected:
            part.replace(archive)
            return
        part.unlink()
        why = f"its MD5 is {found}, expected {expected}"
        if damaged:
            raise UsageError(f"{url} came damaged twice ({why}); {remedy}")
        print(f"{archive.name} came damaged ({why}); downloading it again from the start")
        failures, longest, damaged = 0, 0, True


def unpack(archive, folder):
    """Unpack a .tar.gz next to itself; `folder` appears only once it is complete."""
    scratch = archive.parent / (folder + ".unpacking")
    shutil.rmtree(scratch, ignore_errors=True)  # left behind by a process that was killed
    try:
        with tarfile.open(archive) as tar:
            tar.extractall(scratch, filter="data")  # refuses members outside the folder
        (scratch / folder).rename(archive.parent / folder)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UsageError(f"cannot unpack {archive} ({one_line(error)}); check the free disk space, "
                         "or delete it to download it again") from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def only_one(archive):
    """The archive's lock as a context; waits, with a line printed, while another process has it."""
    try:
        archive.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{archive}.lock")  # freed by the system when its process ends
        try:
            return lock.acquire(timeout=0)
        except Timeout:
            print(f"waiting for another process that downloads {archive.name}", flush=True)
            return lock.acquire()
    except OSError as error:
        raise UsageError(f"cannot write to {archive.parent} ({one_line(error)}); choose another "
                         "--data-dir") from None


def fetch(name, data_dir):
    """The folder of a data set in data_dir: used if it is there, else unpacked from its archive,
    which is downloaded first if it is not there either.

    Raises UsageError if the archive cannot be downloaded or its MD5 is wrong.
    """
    url, expected, folder = ARCHIVES[name]
    archive = Path(data_dir) / url.rsplit("/", 1)[1]
    place = archive.parent / folder
    if place.is_dir():
        return place
    with only_one(archive):
        if place.is_dir():  # another process made it while this one waited
            return place
        if not archive.is_file():
            remedy = f"put {archive.name} or the folder {folder} into {archive.parent}"
            download(url, archive, remedy, expected)
        elif (found := md5(archive)) != expected:
            raise UsageError(f"{archive} is damaged: it has the MD5 {found}, expected {expected}; "
                             "delete it to download it again")
        unpack(archive, folder)
    return place


def fetch_volumes(name, data_dir):
    """The path of a MedMNIST .npz in data_dir, downloaded if it is not there; one that is there may
    be of any version. Raises UsageError if it cannot be downloaded or its MD5 is wrong.
    """
    archive = Path(data_dir) / f"{name}.npz"
    if not archive.is_file():
        with only_one(archive):
            if not archive.is_file():
                download(MEDMNIST3D + archive.name, archive,
                         f"put {archive.name} into {archive.parent}", VOLUMES[name])
    return archive
