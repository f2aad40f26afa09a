"""Fetch and unpack the archives of CIFAR-10, CIFAR-100 and STL-10: checked by MD5, unpacked aside, then renamed."""

import hashlib
import http.client
import os
import shutil
import tarfile
import tempfile
import urllib.request
from pathlib import Path

from tqdm import tqdm

from config import UsageError

# Name: official address, MD5 of the archive, folder it unpacks to.
ARCHIVES = {
    "cifar10": ("https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a", "cifar-10-batches-py"),
    "cifar100": ("https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz", "eb9058c3a382ffc7106e4002c42a8d85", "cifar-100-python"),
    "stl10": ("http://ai.stanford.edu/~acoates/stl10/stl10_binary.tar.gz", "91f7769df0f17e558f3565bffb0c7dfb", "stl10_binary"),
}


def one_line(error):
    """The reason an exception gives, without line breaks; its type where it gives none."""
    return " ".join(str(getattr(error, "reason", error)).split()) or type(error).__name__


def md5(path):
    """MD5 of a file, 32 hex digits."""
    digest = hashlib.md5(usedforsecurity=False)
    with open(path, "rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def download(url, archive, folder):
    """Fetch url into the file `archive` by way of a .part file; UsageError, naming the way round it, where that fails."""
    part = archive.with_name(archive.name + ".part")
    try:
        archive.parent.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(url, timeout=30) as response, open(part, "wb") as file:
            total = int(response.headers.get("Content-Length") or 0) or None
            with tqdm(total=total, desc=archive.name, unit="B", unit_scale=True) as bar:
                while chunk := response.read(2**18):
                    file.write(chunk)
                    bar.update(len(chunk))
    except (OSError, http.client.HTTPException) as error:
        part.unlink(missing_ok=True)
        remedy = f"put {archive.name} or the folder {folder} into {archive.parent}"
        raise UsageError(f"cannot fetch {url} ({one_line(error)}); {remedy}") from None
    part.replace(archive)


def unpack(archive, folder):
    """Unpack a .tar.gz beside itself; `folder` appears at its place only once it is complete."""
    scratch = tempfile.mkdtemp(dir=archive.parent)
    try:
        with tarfile.open(archive) as tar:
            if hasattr(tarfile, "data_filter"):
                tar.extractall(scratch, filter="data")
            else:  # Python before 3.10.12: the least that keeps members inside the folder
                for member in tar.getmembers():
                    if member.name.startswith("/") or ".." in member.name.split("/") or not (member.isfile() or member.isdir()):
                        raise UsageError(f"{archive} holds {member.name}, which would leave its folder; refused")
                tar.extractall(scratch)
        os.rename(os.path.join(scratch, folder), archive.parent / folder)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UsageError(f"cannot unpack {archive} ({one_line(error)}); delete it to download it again, and check the free space") from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def fetch(name, data_dir):
    """The dataset's folder in data_dir: used as it is, else unpacked from the archive there, else downloaded first.

    Raises UsageError where the archive cannot be fetched or does not have the MD5 in ARCHIVES.
    """
    url, expected, folder = ARCHIVES[name]
    archive = Path(data_dir) / url.rsplit("/", 1)[1]
    if not (archive.parent / folder).is_dir():
        if not archive.is_file():
            download(url, archive, folder)
        if (found := md5(archive)) != expected:
            raise UsageError(f"{archive} is damaged: its MD5 is {found}, expected {expected}; delete it to download it again")
        unpack(archive, folder)
    return archive.parent / folder
