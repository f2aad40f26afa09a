"""What an image folder too large for memory costs: images/s of one decoding process, and memory over the epoch: prints JSON.

`make streaming`. The folder is 200 JPEG files of 500 x 375 pixels, each of them under many names, so that 100,000 files can be had on a
small disk; every one is opened and decoded as if it were its own.
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
from support import folder  # noqa: E402


def photograph(rng):
    """The bytes of a JPEG with structure at all scales, as a photograph has: about 60 kB at quality 90."""
    image = sum(np.asarray(Image.fromarray(rng.integers(0, 256, (side * 3 // 4 + 1, side, 3), dtype=np.uint8)).resize((500, 375)), float)
                * weight for side, weight in ((4, 0.4), (16, 0.3), (64, 0.2), (500, 0.1)))
    file = io.BytesIO()
    Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


def memory():
    """Bytes that this process and its loader processes have to themselves (USS: shared pages are not counted)."""
    process = psutil.Process()
    return sum(p.memory_full_info().uss for p in (process, *process.children(recursive=True)))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=100_000)
    parser.add_argument("--originals", type=int, default=200)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--size", type=int, default=224)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        rng, place = np.random.default_rng(0), pathlib.Path(place)
        for i in range(args.files):
            path = place / f"class{i % 10}" / f"{i:06}.jpg"
            path.parent.mkdir(exist_ok=True)
            if i < args.originals:
                path.write_bytes(photograph(rng))
            else:
                original = i % args.originals
                os.link(place / f"class{original % 10}" / f"{original:06}.jpg", path)
        kilobytes = sum((place / f"class{i % 10}" / f"{i:06}.jpg").stat().st_size for i in range(args.originals)) / args.originals / 1000
        folder.MEMORY_LIMIT = 0  # as if it did not fit
        start = time.perf_counter()
        with contextlib.redirect_stdout(sys.stderr):
            dataset = data.load(str(place), image_size=args.size)
        listed = time.perf_counter() - start
        used, seen, start = [], 0, time.perf_counter()
        order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))
        for number, batch in enumerate(data.batches(dataset, 64, args.size, order=order, workers=args.workers)):
            seen += len(batch)
            if number % max(1, args.files // 64 // 50) == 0:
                used.append((seen, memory()))
        seconds = time.perf_counter() - start
    images, held = (torch.tensor(values, dtype=torch.float64) for values in zip(*used[len(used) // 5 :]))  # the first fifth fills buffers
    slope = ((images - images.mean()) @ (held - held.mean()) / (images - images.mean()).square().sum()).item()
    print(json.dumps({
        "command": " ".join(["python bench/streaming.py", *sys.argv[1:]]), "files": len(dataset), "pixels": "500x375",
        "size": args.size, "kilobytes_a_file": round(kilobytes, 1), "workers": args.workers, "images_per_second": round(seen / seconds, 1),
        "seconds_to_list": round(listed, 2), "memory_mb": {"first": round(used[0][1] / 1e6, 1), "last": round(used[-1][1] / 1e6, 1)},
        "memory_slope_bytes_per_image": round(slope, 1), "processor": platform.processor() or platform.machine(), "cpus": os.cpu_count(),
        "torch": torch.__version__, "date": datetime.date.today().isoformat(),
    }, indent=1))


if __name__ == "__main__":
    main()
