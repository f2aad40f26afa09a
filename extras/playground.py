"""The playground's data: a run's I-JEPA as ONNX, images, and what is known about the run.

    python -m extras.playground RUN      writes playground/built; `make playground` also serves it

The page in playground/ only draws. All that it shows of an image and a hidden block is computed by
`Answer`, in PyTorch, and exported twice: with the run's weights and with those before training.
Notation as in models.py; G gallery images, K = G * N gallery patches.
"""

import json
import logging
import math
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.decomposition import PCA
from torch import nn

import diagnostics
import predict_and_visualize as core
import train
from config import UsageError, check
from extras import pretrained
from extras.sketcher import load as load_sketcher
from extras.sketcher import pool
from masking import Masks, to_indices
from support import command_line
from support.results import ROWS, read_json

OUT = Path(__file__).parents[1] / "playground" / "built"
EXAMPLES = 12  # images to choose from; they are not in the gallery
NEAREST = 8  # images
STEPS = 16  # of a sketch


class Answer(nn.Module):
    """One forward pass of an I-JEPA, and what the page shows of it.

    images: normalized, float [G, C, H, W], those that patches and neighbors are taken from; mean,
    std: of their channels, one float each; read: from the mean prediction [1, D] to what a Sketcher
    is told.
    """

    @torch.no_grad()
    def __init__(self, model, images, mean, std, read=None):
        super().__init__()
        self.model, self.channels, self.read = model, len(mean), read
        tokens = torch.cat([model.target_encoder(part) for part in images.split(256)])  # [G, N, D]
        features = F.layer_norm(tokens, tokens.shape[-1:])  # [G, N, D]
        usual = features.mean(0)  # [N, D], the mean feature of each place
        pca = PCA(3).fit((features - usual).flatten(0, 1).numpy())  # without what the place tells
        parts = pca.transform((features - usual).flatten(0, 1).numpy())  # [K, 3]
        low, high = np.percentile(parts, [2, 98], axis=0)
        buffers = {
            "mean": torch.tensor(mean).view(-1, 1, 1), "std": torch.tensor(std).view(-1, 1, 1),
            "patches": F.normalize(features.flatten(0, 1), dim=1).T.contiguous(),  # [D, K]
            "pooled": F.normalize(tokens.mean(1), dim=1).T.contiguous(),  # [D, G]
            "usual": usual, "axes": torch.from_numpy(pca.components_.T),
            "low": torch.from_numpy(low), "range": torch.from_numpy(high - low).clamp(min=1e-9)}
        for name, value in buffers.items():
            self.register_buffer(name, value.float())

    def forward(self, pixels, context, context_valid, targets, targets_valid):
        """pixels: a color image [1, 3, H, W] from 0 to 1; the others: its Masks, with one block.

        Returns a dict: error, usual_error [Nt], 1 - cosine of the true feature and the predicted
        one, or the mean feature of that place; predicted_patches, true_patches int64 [Nt], the
        gallery's nearest to either; colors [N, 3], predicted_colors [Nt, 3] from 0 to 1; images
        int64 [NEAREST], the gallery's nearest to the whole image; with a Sketcher its condition.
        """
        pixels = pixels if self.channels == 3 else pixels.mean(1, keepdim=True)
        masks = Masks(context, context_valid, targets, targets_valid)
        output = self.model((pixels - self.mean) / self.std, masks)
        predicted, true = output.predictions[0, 0], output.targets[0, 0]  # [Nt, D] each
        tokens = output.tokens  # [1, N, D]
        usual = self.usual[targets[0, 0]]  # [Nt, D]
        pooled = F.normalize(tokens.mean(1), dim=1)  # [1, D]
        asked = pool(output.predictions[:, 0], masks)  # [1, D]
        return {
            "error": 1 - F.cosine_similarity(predicted, true, dim=-1),
            "usual_error": 1 - F.cosine_similarity(usual, true, dim=-1),
            "predicted_patches": self.nearest(predicted), "true_patches": self.nearest(true),
            "colors": self.color(F.layer_norm(tokens, tokens.shape[-1:])[0] - self.usual),
            "predicted_colors": self.color(predicted - usual),
            "images": (pooled @ self.pooled)[0].topk(NEAREST).indices,
            **({"condition": self.read(asked)} if self.read else {})}

    def nearest(self, features):
        """The gallery's patches of the highest cosine: features [Q, D] -> int64 [Q]."""
        return (F.normalize(features, dim=1) @ self.patches).argmax(1)

    def color(self, features):
        """The gallery's first three principal components of features [Q, D] as colors [Q, 3].

        features: less the mean of their place, which would otherwise tell most.
        """
        return ((features @ self.axes - self.low) / self.range).clamp(0, 1)


class SketchStep(nn.Module):
    """One of STEPS steps of a Sketcher's drawing (extras/sketcher.py)."""

    def __init__(self, sketcher, mean, std):
        super().__init__()
        self.sketcher = sketcher
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1))

    def forward(self, x, t, condition, targets):
        """S sketches x [S, C, H, W] of one block, at time t [1, 1], their condition [1, D], and the
        block's patches [1, 1, Nt].

        Returns a dict: next, x a step later; pixels [S, 3, H, W] of it, from 0 to 1.
        """
        places = self.sketcher.positions[targets[0, 0]].mean(0, keepdim=True)  # [1, D]
        inside = torch.ones_like(x[:1, :1])  # [1, 1, H, W]: no padding
        later = x + self.sketcher.velocity(x, t, condition, places, inside) / STEPS
        return {"next": later, "pixels": (later * self.std + self.mean).clamp(0, 1)
                .expand(-1, 3, -1, -1)}


class OneBlock:
    """A mask sampler that hides the same block of every image and keeps all other patches.

    block: row, column, height and width in patches.
    """

    def __init__(self, grid, block):
        self.N = math.prod(grid)
        row, column, height, width = block
        hidden = torch.zeros(grid, dtype=torch.bool)
        hidden[row : row + height, column : column + width] = True
        self.hidden = hidden.flatten()  # [N]

    def __call__(self, B, generator=None):
        hidden = self.hidden.expand(B, -1)  # [B, N]
        return Masks(*to_indices(~hidden), *to_indices(hidden[:, None]))


def first_block(grid):
    """The block that the page starts with: two fifths of each side, in the middle."""
    sides = [max(1, round(0.4 * side)) for side in grid]
    return [(whole - side) // 2 for whole, side in zip(grid, sides)] + sides


# --- ONNX -----------------------------------------------------------------------------------------


def export(module, path, inputs, dims):
    """Write a module as ONNX, by example inputs; dims: which of their axes stay free, by name."""
    try:
        import onnxscript  # noqa: F401
    except ImportError:
        raise UsageError("the playground needs the package onnxscript: python -m pip install -r "
                         "requirements-playground.txt -c constraints.txt") from None
    free = {}  # a name is one dimension, wherever it stands
    shapes = {name: {axis: free.setdefault(dim, torch.export.Dim(dim))
                     for axis, dim in dims.get(name, {}).items()} for name in inputs}
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it lists what is not installed
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # torch.onnx warns of its own deprecations
        names = list(module(**inputs))
        torch.onnx.export(module.eval(), kwargs=inputs, f=path, dynamo=True, verbose=False,
                          external_data=False, input_names=list(inputs), output_names=names,
                          dynamic_shapes=shapes)


def export_answer(answer, path):
    """Write an Answer as ONNX. Numbers of context and target patches stay free."""
    encoder = answer.model.target_encoder
    masks = OneBlock(encoder.grid, first_block(encoder.grid))(1)
    export(answer, path, {"pixels": torch.zeros(1, 3, *encoder.image_size), **vars(masks)},
           {"context": {1: "Nc"}, "context_valid": {1: "Nc"}, "targets": {2: "Nt"},
            "targets_valid": {2: "Nt"}})


def export_step(step, path):
    """Write a SketchStep as ONNX. The number of sketches and the sides of the block stay free."""
    sketcher, p = step.sketcher, step.sketcher.patch_size
    export(step, path, {"x": torch.zeros(2, sketcher.channels, 2 * p, 3 * p),
                        "t": torch.zeros(1, 1),
                        "condition": torch.zeros(1, sketcher.place.in_features),
                        "targets": torch.arange(6).view(1, 1, 6)},
           {"x": {0: "S", 2: "H", 3: "W"}, "targets": {2: "Nt"}})


# --- images and facts -----------------------------------------------------------------------------


def write_sheet(pictures, path):
    """Write pictures [n, 3, H, W] from 0 to 1 as one PNG, row by row; returns its columns."""
    n, _, H, W = pictures.shape
    columns = math.ceil(n**0.5)
    rows = math.ceil(n / columns)
    sheet = F.pad(pictures, (0, 0, 0, 0, 0, 0, 0, rows * columns - n))  # black where none is left
    sheet = sheet.unflatten(0, (rows, columns)).permute(0, 3, 1, 4, 2)  # [rows, H, columns, W, 3]
    sheet = (255 * sheet.reshape(rows * H, columns * W, 3)).round().byte()
    Image.fromarray(sheet.numpy()).save(path)
    return columns


def size(module):
    """Width, depth, heads and parameters of an Encoder or a Predictor, as text."""
    block, count = module.blocks[0], sum(p.numel() for p in module.parameters())
    return (f"{block.norm1.normalized_shape[0]} wide, {len(module.blocks)} deep, "
            f"{block.attention.heads} heads, {count / 1e6:.2f} M parameters")


def describe_masks(masking):
    """How many patches a prediction is made from, and of how many, in training; as text."""
    masks = masking(1000, torch.Generator().manual_seed(0))
    context, targets = masks.context_valid.sum(1), masks.targets_valid.sum(2)  # [B], [B, M]
    what = "the union of its target blocks" if masking.merge_targets else "one target block"
    return (f"{what} at a time, {targets.float().mean():.0f} patches, from "
            f"{context.float().mean():.0f} context patches (means)")


def describe_training(config, progress):
    """What is known of a run's length, as text; None if nothing is."""
    if not progress.get("step"):
        return None
    return (f"{progress['step']:,} steps of {config.batch_size * config.accumulation} images, "
            f"{progress['seconds'] / 60:.0f} minutes")


def describe_accuracy(evaluation):
    """The probes' accuracies in evaluation.json as text; None if there are none."""
    rows = [f"{ROWS[name]} {100 * row['linear']:.1f} / {100 * row['knn']:.1f}"
            for name, row in evaluation.get("features", {}).items()]
    return ", ".join(rows) or None


def describe_errors(model, untrained, masking, block, images):
    """Rows of a table: mean errors, 1 - cosine, for masks as in training and for one block."""
    rows = []
    for name, sampler in (("masks as in training", masking),
                          ("one block, all else seen", OneBlock(masking.grid, block))):
        found, before = (diagnostics.measure(part, sampler, images) for part in (model, untrained))
        rows.append([name, *(1 - part[key] for part in (found, before)
                             for key in ("cosine", "mean_cosine"))])
    return rows


# --- a run ----------------------------------------------------------------------------------------


def load(source):
    """A run folder, or a name that ships: model, masking, Config, data, evaluation (dicts), and a
    Sketcher if there is one."""
    folder, found = Path(source), Path(source) / "evaluation.json"
    with tempfile.TemporaryDirectory() as temporary:
        if source in pretrained.SHIPPED:
            folder, found = Path(temporary) / "run", pretrained.SHIPPED[source].with_suffix(".json")
            if "predictor" not in pretrained.write_run(source, folder):
                raise UsageError(f"{source} has an encoder and no predictor, so it cannot answer; "
                                 "name a run folder, such as runs/demo")
        model, masking, config, about = train.load_run(folder)
        path = folder / "sketcher.pt"
        sketcher = (load_sketcher(path, model.target_encoder, about["channels"])
                    if path.exists() else None)
    return model, masking, config, about, read_json(found) if found.exists() else {}, sketcher


def build(source, out=OUT, images=500, data_dir=None):
    """Write the playground's data for a run folder, or a name that ships, into the folder `out`.

    images: of the gallery. Raises UsageError for volumes, other channels, and too few images.
    """
    model, masking, config, about, evaluation, sketcher = load(source)
    if about["axes"] != 2 or about["channels"] not in (1, 3):
        raise UsageError(f"the playground shows gray and color images; {source} has "
                         "{channels} channels and {axes} axes".format(**about))
    dataset = core.images_to_show(config, data_dir or config.data_dir)
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))
    dataset = dataset.subset(order[: EXAMPLES + images])
    if len(dataset) < 2 * EXAMPLES:
        raise UsageError(f"{config.dataset} has {len(dataset)} images to show; the playground needs"
                         f" {2 * EXAMPLES} or more")
    encoder = model.target_encoder
    pixels = core.normalized(dataset, encoder.image_size)  # [n, C, H, W]
    gallery, block = pixels[EXAMPLES:], first_block(encoder.grid)
    untrained = train.build(config, about["channels"])[0].eval()

    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    for name, which, kind in (("trained", model, "predicted"),
                              ("untrained", untrained, "untrained")):
        print(f"{name} weights as ONNX ...", flush=True)
        read = sketcher and sketcher.conditions[kind]
        export_answer(Answer(which, gallery, dataset.mean, dataset.std, read), out / f"{name}.onnx")
    if sketcher:
        export_step(SketchStep(sketcher, dataset.mean, dataset.std), out / "sketcher.onnx")
    columns = write_sheet(core.rgb(pixels, dataset), out / "sheet.png")
    names = dataset.class_names or []
    labels = [] if dataset.labels is None else dataset.labels.tolist()
    facts = {
        "Run": Path(source).name, "Images": f"{dataset.name}, {len(gallery)} in the gallery",
        "Encoder": size(encoder), "Predictor": size(model.predictor),
        "Training": describe_training(config, evaluation.get("training") or about["progress"]),
        "In training it predicts": describe_masks(masking),
        "Accuracy, linear probe / kNN": describe_accuracy(evaluation)}
    page = {
        "grid": encoder.grid, "patch": encoder.patch_size, "columns": columns,
        "examples": EXAMPLES, "images": len(dataset), "block": block,
        "steps": STEPS if sketcher else 0, "channels": about["channels"],
        "labels": [names[label] if names else str(label) for label in labels],
        "facts": {name: text for name, text in facts.items() if text},
        "errors": describe_errors(model, untrained, masking, block, gallery[:256])}
    (out / "about.json").write_text(json.dumps(page))
    print(f"{out} holds {', '.join(sorted(path.name for path in out.iterdir()))}")


def main(argv=None):
    """The command line: write the playground's data."""
    p = command_line.Parser(description="Export a run's I-JEPA for the playground.")
    p.add_argument("source", metavar="RUN", help="run folder of train.py, or a name that ships: "
                   f"{', '.join(pretrained.SHIPPED)}")
    p.add_argument("--images", type=int, default=500,
                   help="images whose patches may be shown (default 500)")
    p.add_argument("--data-dir", help="folder of the data, if it has moved since training")
    p.add_argument("--out", default=OUT, help="folder to write to (default playground/built)")
    arguments = p.parse_args(argv)
    check(arguments.images >= EXAMPLES, "images", arguments.images, f"{EXAMPLES} or more")
    build(arguments.source, arguments.out, arguments.images, arguments.data_dir)


if __name__ == "__main__":
    command_line.run(main)
