"""What attention by the formula, kept memory and bfloat16 are worth on this machine's CPU; prints JSON.

    python bench/cpu.py > results/speed_cpu.json

Whole training steps of the preset cifar10 (batch 128), each way in a process of its own that steps when it is told to; and attention alone,
forward and backward. All take turns, so that whatever else the machine does meets all alike; a ratio is the median over the rounds.
"""

import datetime
import json
import pathlib
import statistics
import subprocess
import sys
import time

import torch
import torch.nn.functional as F

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from extras import benchmark  # noqa: E402
import config as settings  # noqa: E402
import models  # noqa: E402
import train  # noqa: E402

# B, nh, queries, keys, D/nh, padded: the predictor's first blocks, its last one, an encoder's context, whole images of 64 and 196 patches.
SHAPES = ((512, 2, 28, 28, 48, True), (512, 2, 16, 28, 48, True), (128, 3, 12, 12, 64, False), (128, 3, 64, 64, 64, False),
          (16, 6, 196, 196, 64, False))
WAYS = ("fused fp32", "formula fp32", "formula keep fp32", "fused keep bf16", "formula keep bf16")  # the first is the one compared with


def attention_seconds(attention, B, nh, queries, keys, width, padded, precision):
    """Seconds of one forward and backward pass."""
    q, k, v = (torch.randn(B, nh, n, width, dtype=precision, requires_grad=True) for n in (queries, keys, keys))
    mask = (torch.arange(keys) < keys - 5).expand(B, 1, 1, keys) if padded else None
    start = time.perf_counter()
    attention(q, k, v, attn_mask=mask).sum().backward()
    return time.perf_counter() - start


def attention_rows(rounds=15):
    """How many times as fast the formula is as the fused kernel, for each shape and precision."""
    rows = []
    for precision in (torch.float32, torch.bfloat16):
        for shape in SHAPES:
            pairs = [[attention_seconds(attention, *shape, precision) for attention in (F.scaled_dot_product_attention,
                                                                                        models.explicit_attention)]
                     for _ in range(rounds)][3:]  # three warm up
            rows.append({"precision": str(precision).removeprefix("torch."), "shape": shape,
                         "formula_times_as_fast": round(statistics.median(fused / formula for fused, formula in pairs), 3)})
    return rows


def work(way):
    """Make a training step for every line that comes, and answer with its seconds."""
    if "keep" in way:
        train.keep_memory()
    if "fused" in way:
        models.attend = F.scaled_dot_product_attention
    config = settings.from_preset("cifar10", batch_size=128, precision=way.split()[-1], device="cpu")
    dataset, device = benchmark.synthetic(config), torch.device("cpu")
    model, optimizer, generator, _ = train.prepare(config, dataset, device)
    stream = train.image_stream(config, dataset, device, generator, 0)
    for _ in sys.stdin:
        start = time.perf_counter()
        train.train_step(config, model, optimizer, [next(stream)], 1, 1000, generator)
        print(time.perf_counter() - start, flush=True)


def step_ratios(rounds=30):
    """How many times as fast as the first way each is, a dict."""
    workers = {way: subprocess.Popen([sys.executable, __file__, *way.split()], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
               for way in WAYS}

    def seconds(worker):
        worker.stdin.write("step\n")
        worker.stdin.flush()
        return float(worker.stdout.readline())

    found = [[seconds(worker) for worker in workers.values()] for _ in range(rounds)][2:]  # two warm up
    for worker in workers.values():
        worker.stdin.close()
        worker.wait()
    return {way: round(statistics.median(row[0] / row[i] for row in found), 3) for i, way in enumerate(WAYS)}


def main():
    """Measure on one thread and print."""
    torch.set_num_threads(1)
    if len(sys.argv) > 1:
        return work(" ".join(sys.argv[1:]))
    print(json.dumps({"command": "python bench/cpu.py", "date": datetime.date.today().isoformat(),
                      "hardware": benchmark.hardware(torch.device("cpu")), "step_times_as_fast": step_ratios(),
                      "attention_shapes": "B, nh, queries, keys, D/nh, padded", "attention": attention_rows()}, indent=2))


if __name__ == "__main__":
    main()
