"""What an image folder too large for memory costs: images/s, and memory over the epoch, as JSON.

`make streaming`. The folder is 200 JPEG files of 500 x 375 pixels, each of them under many names,
so 100,000 files fit on a small disk; every one is opened and decoded as if it were its own.
"""

import argparse
import contextlib
import datetime
import io
import json
import os
import pathlib
import platform
import sys
import tempfile
import time

import numpy as np
import psutil
import torch
from PIL import Image

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
import data  # noqa: E402 (the path has to be there first)
from support import layout  # noqa: E402

DETAIL = ((4, 0.4), (16, 0.3), (64, 0.2), (500, 0.1))  # cells to a row, weight


def photograph(rng):
    """The bytes of a JPEG with structure at all scales, like a photograph's; about 60 kB."""
    image = np.zeros((375, 500, 3))
    for side, weight in DETAIL:
        cells = rng.integers(0, 256, (side * 3 // 4 + 1, side, 3), dtype=np.uint8)
        image += weight * np.asarray(Image.fromarray(cells).resize((500, 375)), float)
    file = io.BytesIO()
    Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


def make_folder(place, files, originals):
    """Write the files in ten class folders; returns the kilobytes of an average one."""
    rng, written = np.random.default_rng(0), []
    for i in range(files):
        path = place / f"class{i % 10}" / f"{i:06}.jpg"
        path.parent.mkdir(exist_ok=True)
        if i < originals:
            path.write_bytes(photograph(rng))
            written.append(path)
        else:
            os.link(written[i % originals], path)
    return sum(path.stat().st_size for path in written) / len(written) / 1000


def memory():
    """Bytes of this process and its loader processes, pages that they share left out."""
    process = psutil.Process()
    processes = (process, *process.children(recursive=True))
    return sum(p.memory_full_info().uss for p in processes)


def measure(dataset, size, workers):
    """Read all images once: (images/s, images seen [k], bytes of memory then [k])."""
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))
    seen, used, start = 0, [], time.perf_counter()
    batches = data.batches(dataset, 64, size, order=order, workers=workers)
    for number, batch in enumerate(batches):
        seen += len(batch)
        if number % max(1, len(dataset) // 64 // 50) == 0:
            used.append((seen, memory()))
    return seen / (time.perf_counter() - start), *torch.tensor(used, dtype=torch.float64).T


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=100_000)
    parser.add_argument("--originals", type=int, default=200)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--size", type=int, default=224)
    args = parser.parse_args()
    layout.MEMORY_LIMIT = 0  # as if it did not fit
    with tempfile.TemporaryDirectory() as place:
        kilobytes = make_folder(pathlib.Path(place), args.files, args.originals)
        start = time.perf_counter()
        with contextlib.redirect_stdout(sys.stderr):
            dataset = data.load(place, image_size=args.size)
        listed = time.perf_counter() - start
        rate, images, held = measure(dataset, args.size, args.workers)
    first, last = held[0].item(), held[-1].item()
    start = len(held) // 5  # the first fifth fills buffers
    images, held = images[start:], held[start:]
    images, held = images - images.mean(), held - held.mean()
    slope = (images @ held / images.square().sum()).item()
    print(json.dumps({
        "command": " ".join(["python bench/streaming.py", *sys.argv[1:]]),
        "files": len(dataset), "pixels": "500x375", "size": args.size,
        "kilobytes_a_file": round(kilobytes, 1), "workers": args.workers,
        "images_per_second": round(rate, 1), "seconds_to_list": round(listed, 2),
        "memory_mb": {"first": round(first / 1e6, 1), "last": round(last / 1e6, 1)},
        "memory_slope_bytes_per_image": round(slope, 1),
        "processor": platform.processor() or platform.machine(), "cpus": os.cpu_count(),
        "torch": torch.__version__, "date": datetime.date.today().isoformat(),
    }, indent=1))


if __name__ == "__main__":
    main()
