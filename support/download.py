"""Fetch CIFAR-10, CIFAR-100, STL-10 and MedMNIST's volumes, going on where a download broke off; check and unpack them."""

import errno
import hashlib
import http.client
import os
import shutil
import tarfile
import time
import urllib.error
import urllib.request
from pathlib import Path

from filelock import FileLock, Timeout  # a requirement of torch
from tqdm import tqdm

from config import UsageError

# Name: official address, MD5 of the archive, folder it unpacks to.
ARCHIVES = {
    "cifar10": ("https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a", "cifar-10-batches-py"),
    "cifar100": ("https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz", "eb9058c3a382ffc7106e4002c42a8d85", "cifar-100-python"),
    "stl10": ("http://ai.stanford.edu/~acoates/stl10/stl10_binary.tar.gz", "91f7769df0f17e558f3565bffb0c7dfb", "stl10_binary"),
}
# MedMNIST's volumes of 28 voxels a side (Yang et al. 2023, version 2): name, MD5 of its .npz, under one address.
MEDMNIST3D = "https://zenodo.org/record/6496656/files/"
VOLUMES = {
    "organmnist3d": "21f0a239e7f502e6eca33c3fc453c0b6", "nodulemnist3d": "8755a7e9e05a4d9ce80a24c3e7a256f3",
    "adrenalmnist3d": "bbd3c5a5576322bc4cdfea780653b1ce", "fracturemnist3d": "6aa7b0143a6b42da40027a9dda61302f",
    "vesselmnist3d": "2ba5b80617d705141f3f85627108fce8", "synapsemnist3d": "1235b78a3cd6280881dd7850a78eadb6",
}
STALL = 30  # seconds without a byte after which a connection counts as dropped
ATTEMPTS = 5  # failures in a row, none of which brought the file any further, before we give up
FIRST_WAIT = 1  # seconds before the second attempt; each further one waits twice as long


def one_line(error):
    """The reason an exception gives (or any text) on one line that can be printed; the exception's type where it gives none."""
    text = " ".join(str(error).split()).removeprefix("<urlopen error ").removesuffix(">")
    return text.encode(errors="replace").decode() or type(error).__name__  # a file's name may hold bytes that are no text


def md5(path):
    """MD5 of a file, 32 hex digits."""
    digest = hashlib.md5(usedforsecurity=False)
    with open(path, "rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def size(path):
    """Bytes in a file; 0 where there is none."""
    return path.stat().st_size if path.exists() else 0


def receive(url, part):
    """Ask for what the .part file lacks of `url` and append it; where the server's file is another by now, begin anew.

    The version (ETag or date) that the server gave lies beside the .part file, for later processes. Raises OSError or
    HTTPException where the connection breaks; what has come by then stays.
    """
    have, stamp = size(part), part.with_name(part.name + ".version")
    known = stamp.read_text() if stamp.exists() else ""
    headers = {"Range": f"bytes={have}-", **({"If-Range": known} if known else {})} if have else {}
    try:
        response = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=STALL)
    except urllib.error.HTTPError as error:
        if have and error.code == 416:  # nothing lies behind the .part file: it is whole, or too long, which its checksum will tell
            return
        raise
    with response:
        tag = response.headers.get("ETag", "W/")
        version = response.headers.get("Last-Modified", "") if tag.startswith("W/") else tag  # If-Range takes no weak tag
        if response.status == 206:
            if not response.headers.get("Content-Range", "").startswith(f"bytes {have}-") or (known and version and version != known):
                part.unlink(missing_ok=True)  # never spliced
                raise ConnectionError("the file on the server has changed")
        else:  # the whole file: asked for, or changed since, or from a server that knows no ranges
            have = 0
        end = None if getattr(response, "length", None) is None else have + response.length  # bytes of the whole file
        bar = tqdm(total=end, initial=have, desc=part.stem, unit="B", unit_scale=True)
        with bar, open(part, "ab" if have else "wb") as file:
            if not have:
                stamp.write_text(version)
            while chunk := response.read1(2**18 if end is None else min(2**18, end - have)):  # read would lose what came before a stall
                have += file.write(chunk)
                bar.update(len(chunk))
    if end is not None and have < end:
        raise ConnectionError(f"the connection closed after {have:,} of {end:,} bytes")


def hopeless(error):
    """Whether trying again cannot help: the server refuses (4xx, save for "later" and "too often"), or the disk does."""
    if isinstance(error, urllib.error.HTTPError):
        return error.code < 500 and error.code not in (408, 425, 429)
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES)


def download(url, archive, remedy, expected=None):
    """Fetch url into the file `archive` by way of a .part file, whose MD5 must be `expected` (None: any).

    What broke off is taken up again, what came damaged is fetched once more from the start, each with a line printed.
    Raises UsageError, naming the way round it (`remedy`), where that does not help.
    """
    part = archive.with_name(archive.name + ".part")
    failures, longest, damaged = 0, size(part), 0
    while True:
        try:
            receive(url, part)
        except (OSError, http.client.HTTPException) as error:
            have = size(part)
            failures, longest = (1, have) if have > longest else (failures + 1, longest)
            if hopeless(error) or failures == ATTEMPTS:
                kept = f", or try again: the {have:,} bytes that came are kept" if have else ""
                raise UsageError(f"cannot fetch {url} ({one_line(error)}); {remedy}{kept}") from None
            wait = FIRST_WAIT * 2 ** (failures - 1)
            print(f"{archive.name}: {one_line(error)}; trying again in {wait:g} s, from byte {have:,} on")
            time.sleep(wait)
            continue
        if expected is None or (found := md5(part)) == expected:
            break
        part.unlink()
        failures, longest, damaged = 0, 0, damaged + 1
        if damaged == 2:
            raise UsageError(f"{url} came damaged twice: the MD5 is {found}, expected {expected}; {remedy}")
        print(f"{archive.name} came damaged: its MD5 is {found}, expected {expected}; fetched once more from the start")
    part.replace(archive)
    part.with_name(part.name + ".version").unlink(missing_ok=True)


def unpack(archive, folder):
    """Unpack a .tar.gz beside itself; `folder` appears at its place only once it is complete."""
    scratch = archive.parent / (folder + ".unpacking")
    shutil.rmtree(scratch, ignore_errors=True)  # left behind by a process that was killed
    try:
        with tarfile.open(archive) as tar:
            if hasattr(tarfile, "data_filter"):
                tar.extractall(scratch, filter="data")
            else:  # Python before 3.10.12: the least that keeps members inside the folder
                for member in tar.getmembers():
                    if member.name.startswith("/") or ".." in member.name.split("/") or not (member.isfile() or member.isdir()):
                        raise UsageError(f"{archive} holds {member.name}, which would leave its folder; refused")
                tar.extractall(scratch)
        os.rename(scratch / folder, archive.parent / folder)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UsageError(f"cannot unpack {archive} ({one_line(error)}); delete it to download it again, and check the free space") from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def only_one(archive):
    """The archive's lock as a context; waits, with a line printed, while another process has it, and no longer than that lives."""
    try:
        archive.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{archive}.lock")  # the file stays; what counts is the operating system's lock on it
        try:
            return lock.acquire(timeout=0)
        except Timeout:
            print(f"another process is fetching {archive.name}; waiting for it", flush=True)
            return lock.acquire()
    except OSError as error:
        raise UsageError(f"cannot write to {archive.parent} ({one_line(error)}); choose another --data-dir") from None


def fetch(name, data_dir):
    """The dataset's folder in data_dir: used as it is, else unpacked from the archive there, else downloaded first.

    Raises UsageError where the archive cannot be fetched or does not have the MD5 in ARCHIVES.
    """
    url, expected, folder = ARCHIVES[name]
    archive = Path(data_dir) / url.rsplit("/", 1)[1]
    place = archive.parent / folder
    if place.is_dir():
        return place
    with only_one(archive):
        if not place.is_dir():  # else another process made it while this one waited
            if not archive.is_file():
                download(url, archive, f"put {archive.name} or the folder {folder} into {archive.parent}", expected)
            elif (found := md5(archive)) != expected:
                raise UsageError(f"{archive} is damaged: its MD5 is {found}, expected {expected}; delete it to download it again")
            unpack(archive, folder)
    return place


def fetch_volumes(name, data_dir):
    """The path of a MedMNIST .npz in data_dir, downloaded first where it is not there; one put there by hand may be any version.

    Raises UsageError where it cannot be fetched or does not have the MD5 in VOLUMES.
    """
    archive = Path(data_dir) / f"{name}.npz"
    if not archive.is_file():
        with only_one(archive):
            if not archive.is_file():
                download(f"{MEDMNIST3D}{archive.name}", archive, f"put {archive.name} into {archive.parent}", VOLUMES[name])
    return archive
