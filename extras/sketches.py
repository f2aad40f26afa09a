"""Sketches: what a predicted representation fixes, and what it leaves open (paper section 8).

    python -m extras.sketches RUN               train a sketcher or finish one, draw, measure
    python -m extras.sketches RUN --mae RUN     also from a MAE's features of the true block

A prediction is a vector, not a picture. A small generator (extras/sketcher.py) draws the pixels of
the hidden block from it, several times. What all sketches share is what the predictor knows; where
they differ is what it leaves open. The controls, drawn and measured alike: the true target feature,
an untrained predictor's answer to the trained context encoder, the answer of a wholly untrained
I-JEPA, nothing but the block's place, and the prediction for another image.
Notation as in extras/sketcher.py.
"""

import math
import shlex
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression

import evaluate
import train
from config import UsageError, check
from extras.figures import frame
from extras.sketcher import Subject, block_feature, build, draw, fit, paste
from models import patchify, take
from predict_and_visualize import rgb, save, to_pixels
from support import command_line
from support.plots import table
from support.results import provenance, write_json


def probe(subject, n=4000):
    """A linear classifier of the target encoder's pooled features: [n, D] -> classes [n]."""
    some = evaluate.subsample(subject.dataset.subset(subject.kept), n, seed=0)
    x = evaluate.features(subject.model.target_encoder, some, subject.config.image_size,
                          subject.device)
    fitted = evaluate.fit(LogisticRegression(max_iter=10_000), x.numpy(), some.labels.numpy(), 1e-3)
    return lambda features: torch.from_numpy(fitted.predict(features.cpu().numpy()))


def sketches(sketcher, subject, images, masks, counts, steps=32):
    """Sketches from each kind of condition in `counts`, a dict of kind -> S: of kind -> [B, S, Nt,
    P]. "shuffled" is a control that needs no layer of its own: the prediction for another image."""
    found = subject.conditions(images, masks)
    read = {kind: sketcher.read({kind: x}) for kind, x in found.items()}  # each [B, D]
    read["shuffled"] = read["predicted"].roll(1, 0)
    with subject.autocast():
        return {kind: draw(sketcher, read[kind], masks, S, steps) for kind, S in counts.items()}


@torch.no_grad()
def measure(sketcher, subject, images, masks, classify, count=8):
    """How sketches compare with the truth: a dict of kind of condition -> dict of numbers.

    Sketches are pasted into their image, which is encoded anew. agreement: how often `classify`,
    from features [n, D] to classes [n], then says what it says of the true image; likeness: cosine
    of the block's feature with the true one, both less the mean over images; spread: deviation
    between the sketches of a block, in deviations of the data's pixels. "true block" and "gray
    block" bound these numbers.
    """
    true = take(patchify(images, sketcher.patch_size), masks.targets[:, 0])[:, None]  # [B, 1,Nt, P]
    counts = dict.fromkeys([*sketcher.conditions, "shuffled"], count)
    drawn = {**sketches(sketcher, subject, images, masks, counts),
             "true block": true, "gray block": torch.zeros_like(true)}
    rows = {}
    for kind, patches in {"": true, **drawn}.items():  # first the images as they are
        S, real = patches.shape[1], masks.targets_valid[:, 0]
        pasted = paste(images, masks, patches).flatten(0, 1)  # [B*S, C, H, W]
        tokens = torch.cat([subject.model.target_encoder(part) for part in pasted.split(512)])
        again = masks[torch.arange(len(images)).repeat_interleave(S)]
        found = block_feature(tokens, again).unflatten(0, (-1, S))  # [B, S, D]
        said = classify(tokens.mean(1)).view(-1, S)  # [B, S]
        if not rows:
            answer, feature, mean = said, found, found.mean(0)  # [B, 1], [B, 1, D], [1, D]
        like = F.cosine_similarity(found - mean, feature - mean, dim=-1).mean()
        rows[kind] = {"agreement": (said == answer).double().mean().item(), "likeness": like.item(),
                      "spread": patches.std(1, correction=0)[real].mean().item()}
    return {kind: rows[kind] for kind in drawn}


def sketch_figure(sketcher, subject, images, masks, count=8, title=""):
    """A row for each image [B, C, H, W]: the block, the context, sketches of the prediction, their
    mean (one step), and a sketch of each control."""
    grid, p = subject.masking.grid, sketcher.patch_size
    controls = [kind for kind in [*sketcher.conditions, "shuffled"] if kind != "predicted"]
    counts = {"predicted": count, **dict.fromkeys(controls, 1)}
    drawn = sketches(sketcher, subject, images, masks, counts)
    mean = sketches(sketcher, subject, images, masks, {"predicted": 1}, steps=1)
    drawn = {"predicted": drawn.pop("predicted"), "their mean": mean["predicted"], **drawn}
    context, block = masks.maps(math.prod(grid))  # [B, N], [B, 1, N]
    pictures = rgb(images, subject.dataset)
    seen = to_pixels(context, grid, p)[:, None]  # [B, 1, H, W]
    columns = [("image", pictures), ("context", torch.where(seen, pictures, 1.0))]
    for kind, patches in drawn.items():
        pasted = paste(images, masks, patches).unbind(1)  # S of [B, C, H, W]
        columns += [(kind.replace(" ", "\n"), rgb(part, subject.dataset)) for part in pasted]
    figure, axes = table(columns, title, side=1.2)
    for panels, inside in zip(axes, block[:, 0].unflatten(1, grid)):
        rows, files = (inside.any(1 - axis).nonzero()[:, 0] for axis in (0, 1))
        for panel in (panels[0], *panels[2:]):
            frame(panel, (p * rows[0], p * files[0]), (p * len(rows), p * len(files)))
    return figure


# --- the command ----------------------------------------------------------------------------------


def main(argv=None):
    """The command line: train or finish RUN/sketcher.pt, write RUN/sketches.json and the figure."""
    p = command_line.Parser(description="Sketch what a run's predictor imagines.")
    p.add_argument("run", type=Path, metavar="RUN", help="run folder of an I-JEPA")
    p.add_argument("--mae", default="", metavar="RUN", help="a MAE's run, as one more control")
    p.add_argument("--steps", type=int, default=1400, help="of training, 48 images each [1400]")
    p.add_argument("--width", type=int, default=32, help="of the sketcher [32]")
    p.add_argument("--images", type=int, default=200, help="held-out images to measure on [200]")
    p.add_argument("--seed", type=int, default=0, help="of weights, masks and noise [0]")
    p.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")
    args = p.parse_args(argv)
    for name in ("steps", "width"):
        check(getattr(args, name) > 0, name, getattr(args, name), "1 or more")
    subject = Subject(args.run, args.mae, train.pick_device(args.device))
    if len(subject.held) < 32 or subject.dataset.labels is None:
        raise UsageError(f"{args.run} needs labels, and 32 or more images held out of training")
    settings = {name: getattr(args, name) for name in ("mae", "steps", "width", "seed")}
    began, worked = time.perf_counter(), time.process_time()
    path = args.run / "sketcher.pt"
    sketcher = fit(build(subject, args.width, args.seed), subject, settings, path)
    results = {"settings": settings, "seconds": round(time.perf_counter() - began, 1),
               "cpu_seconds": round(time.process_time() - worked, 1)}
    images = subject.images(subject.held[: args.images])
    masks = subject.masks(len(images), torch.Generator().manual_seed(args.seed))
    rows = measure(sketcher, subject, images, masks, probe(subject))
    print(f"{'sketched from':20}", *(f"{name:>10}" for name in rows["predicted"]))
    for kind, row in rows.items():
        print(f"{kind:20}", *(f"{value:10.3f}" for value in row.values()))
    words = ["python", "-m", "extras.sketches", *(sys.argv[1:] if argv is None else argv)]
    results |= {"data": subject.dataset.name, "images": len(images), "rows": rows,
                "command": shlex.join(map(str, words)), **provenance(subject.device)}
    write_json(args.run / "sketches.json", results)
    title = f"run {args.run.resolve().name}: what its predictor imagines in the frame"
    figure = sketch_figure(sketcher, subject, images[:6], masks[:6], title=title)
    save(subject, [("sketches", figure)])


if __name__ == "__main__":
    command_line.run(main)
