"""All figures of a run: what predict_and_visualize.py draws, and everything below.

    python -m extras.figures RUN     writes RUN/figures/*.png and RUN/figures/retrieval.json; says
                                     what it leaves out, and why

Notation, `images` and `pictures` as in predict_and_visualize.py. Volumes are drawn by slices.
"""

import base64
import itertools
import json
import math
import re
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from sklearn.decomposition import PCA

import evaluate
import predict_and_visualize as core
from config import UsageError, check_choice
from extras import mae, volumes
from extras.charts import comparison_figure, confusion_figure, low_shot_figure, per_class_figure
from extras.volumes import by_slice
from masking import Masks, to_indices
from predict_and_visualize import fill, make_gallery, nearest
from support import command_line
from support.plots import COLORS, MAP, headline, table
from support.results import read_json, write_json

# --- small pieces ---------------------------------------------------------------------------------


def add_bar(figure, axes, label, **options):
    """A color bar beside some axes of a table, for the last image drawn in them."""
    figure.set_figwidth(figure.get_figwidth() + 0.9)
    figure.colorbar(axes.flat[-1].images[-1], ax=axes, label=label, **options)


def frame(axes, corner, sides, color=COLORS[5]):
    """Outline a block: corner (row, column) and sides (height, width) in pixels of its image."""
    (row, column), (height, width) = corner, sides
    on_any_ground = [withStroke(linewidth=4, foreground="white")]
    axes.add_patch(Rectangle((column - 0.5, row - 0.5), width, height, fill=False, edgecolor=color,
                             linewidth=2, path_effects=on_any_ground))


def as_colors(parts):
    """Three components [n, 3] (NumPy) -> red, green and blue [n, 3], the middle 96% from 0 to 1."""
    low, high = np.percentile(parts, [2, 98], axis=0)
    return torch.from_numpy((parts - low) / np.maximum(high - low, 1e-9)).clamp(0, 1).float()


class Diagram:
    """The picture of I-JEPA with the parts named in full color and the others faded, in a notebook.

    parts: ids of images/ijepa.svg, such as "predictor"; none: all of it. Raises UsageError for an
    unknown one.
    """

    FILE = Path(__file__).parents[1] / "images/ijepa.svg"

    def __init__(self, *parts):
        text, opening = self.FILE.read_text("utf-8"), r'<g class="part" id="([\w-]+)"'
        names = re.findall(opening, text)
        for part in parts:
            check_choice("the diagram's part", part, names)
        for name in set(names).difference(parts or names):
            text = text.replace(f'id="{name}"', f'id="{name}" opacity="0.25"')
        self.parts, self.text = parts, text

    def _repr_html_(self):
        """An image of its own: JupyterLab shows it, unlike plain SVG, before a notebook is trusted.
        """
        data = base64.b64encode(self.text.encode()).decode()
        return f'<img alt="{self}" width="800" src="data:image/svg+xml;base64,{data}">'

    def __repr__(self):
        return f"diagram of I-JEPA: {', '.join(self.parts) or 'from an image to the loss'}"


# --- which patches a sampler uses -----------------------------------------------------------------


def official_coverage(grid, batch_size, batches, generator, min_keep=4):
    """How often a patch is context and target under the official sampler: two maps [N], 0 to 1.

    Its rules, from the published code: one block size a batch, from one random number for scale and
    aspect alike; the last possible row and column never drawn; every context cut to the batch's
    shortest, which keeps its first patches.
    """
    H, W = grid
    counts = torch.zeros(2, H * W)

    def block(height, width):
        top, left = (int(torch.randint(0, max(room, 1), (1,), generator=generator))
                     for room in (H - height, W - width))
        cells = torch.zeros(H, W, dtype=torch.bool)
        cells[top : top + height, left : left + width] = True
        return cells.flatten()  # [N]

    for _ in range(batches):
        u = torch.rand(1, generator=generator).item()
        area, aspect = H * W * (0.15 + 0.05 * u), 0.75 + 0.75 * u
        h = min(round((area * aspect) ** 0.5), H - 1)
        w = min(round((area / aspect) ** 0.5), W - 1)
        side = round((H * W * (0.85 + 0.15 * u)) ** 0.5)
        contexts = []
        while len(contexts) < batch_size:
            targets = torch.stack([block(h, w) for _ in range(4)]).any(0)  # [N]
            kept = (block(min(side, H - 1), min(side, W - 1)) & ~targets).nonzero()[:, 0]
            if len(kept) > min_keep:  # it draws again otherwise
                contexts.append(kept)
                counts[1] += targets
        shortest = min(map(len, contexts))
        for kept in contexts:
            counts[0][kept[:shortest]] += 1
    return counts / (batches * batch_size)


def coverage_figure(masking, generator, batch_size=64, batches=16):
    """How often each cell of a grid is context and target: this sampler, and the official rules.

    The official sampler knows no third axis: for volumes, all layers of this sampler, side by side.
    """
    maps = [masking(batch_size, generator).maps(masking.N) for _ in range(batches)]
    ours = (torch.cat([context for context, _ in maps]).float().mean(0),
            torch.cat([targets.any(1) for _, targets in maps]).float().mean(0))
    rows, flat = [("ours", ours)], len(masking.grid) == 2
    if flat:
        official = official_coverage(masking.grid, batch_size, batches, generator)
        rows.append(("official rules", official))
    figure = Figure(figsize=(7, 7.2) if flat else (12, 2.6), layout="constrained")
    panels = figure.subplots(len(rows), 2, squeeze=False)
    for row, (name, found) in zip(panels, rows):
        for axes, part, values in zip(row, ("context", "a target"), found):
            never = (values == 0).sum().item()
            values = values.view(-1, *masking.grid[-2:])  # [layers, rows, columns]
            values = F.pad(values, (0, 1), value=math.nan).movedim(0, 1).flatten(1)[:, :-1]
            image = axes.imshow(values.numpy(), cmap=MAP, vmin=0, vmax=1)
            size = min(12, 90 / values.shape[1])  # points
            axes.plot(*(values == 0).nonzero().T.flip(0), "x", color="white", markersize=size)
            axes.set_title(f"{name}: {part}\n{never} of {masking.N} patches never (x)")
            axes.set(xticks=[], yticks=[])
    figure.colorbar(image, ax=panels, shrink=0.6, label="fraction of images")
    headline(figure, f"How often each patch of a {'x'.join(map(str, masking.grid))} grid is "
             "context or target.\nNothing is learned from a patch that is never drawn")
    return figure


# --- what the predictor knows ---------------------------------------------------------------------


def slide(grid, sides):
    """One block of `sides` (rows, columns of patches) at each of its P places on the grid, in
    raster order, as Masks of P images: targets [P, 1, Nt], and all the rest as context."""
    cells = torch.arange(math.prod(grid)).view(grid)
    blocks = cells.unfold(0, sides[0], 1).unfold(1, sides[1], 1)  # [down, across, *sides]
    blocks = blocks.flatten(2).flatten(0, 1)  # [P, Nt]
    hidden = torch.zeros(len(blocks), cells.numel(), dtype=torch.bool).scatter(1, blocks, True)
    blocks = blocks[:, None]
    return Masks(*to_indices(~hidden), blocks, torch.ones_like(blocks, dtype=torch.bool))


@torch.no_grad()
def moving_block_figure(model, images, pictures, gallery, sides=None, places=4, title=""):
    """One block at up to `places` places of the middle row of each image, filled from what is
    predicted there and, below, from the true features, the best that this gallery can do.

    sides: rows and columns of the block, in patches; by default about 17.5% of the grid. Raises
    UsageError for volumes.
    """
    grid, p = model.target_encoder.grid, model.target_encoder.patch_size
    if len(grid) != 2:
        raise UsageError("a moving block is drawn for images, not for volumes")
    sides = sides or [max(1, round(side * 0.175**0.5)) for side in grid]
    down, across = (side - length + 1 for side, length in zip(grid, sides))  # places on each axis
    steps = torch.linspace(0, across - 1, min(places, across)).round().long()
    masks = slide(grid, sides)[down // 2 * across + steps].to(images.device)
    filled = []  # of each image and place: from the prediction, and from the true features
    for image, picture in zip(images, pictures):
        output = model(image.expand(len(steps), *image.shape), masks)
        scene = picture.expand(len(steps), *picture.shape)
        filled += [fill(scene, masks, features, gallery, p)
                   for features in (output.predictions, output.targets)]
    columns = [(f"block at column {step + 1}", part)
               for step, part in zip(steps, torch.stack(filled, dim=1))]  # each [2*B, 3, H, W]
    columns = [("image", pictures.repeat_interleave(2, dim=0)), *columns]
    figure, axes = table(columns, title, side=2)
    for row, name in zip(axes, itertools.cycle(("predicted", "true features"))):
        row[0].set_ylabel(name)
        for panel, step in zip(row[1:], steps):
            frame(panel, (down // 2 * p, step * p), (sides[0] * p, sides[1] * p))
    return figure


@torch.no_grad()
def error_figure(model, masking, images, pictures, generator, draws=32, title=""):
    """Where prediction is hard: mean cosine distance of predicted and true feature for each patch,
    over many masks, below each image; the tenth of the patches where it is largest is framed."""
    B, N, grid = len(images), masking.N, masking.grid
    total, count = torch.zeros(B, N), torch.zeros(B, N)
    for _ in range(draws):
        masks = masking(B, generator)
        output = model(images, masks.to(images.device))
        distance = 1 - F.cosine_similarity(output.predictions, output.targets, dim=-1).cpu()
        real = masks.targets_valid  # [B, M, Nt], as the distance
        total.scatter_add_(1, masks.targets.flatten(1), (distance * real).flatten(1))
        count.scatter_add_(1, masks.targets.flatten(1), real.float().flatten(1))
    error = by_slice((total / count.clamp(min=1)).unflatten(1, grid), grid)  # [B, rows, columns]
    shown = by_slice(pictures, grid)
    figure, axes = table([("", pair) for pair in zip(shown, error)], title, side=2,
                         vmax=error.max().item())
    p = shown.shape[-1] // grid[-1]
    for i, down, across in (error >= error.quantile(0.9)).nonzero().tolist():
        frame(axes[0, i], (p * down, p * across), (p, p))
    add_bar(figure, axes[1:], "cosine distance", shrink=0.9)
    return figure


@torch.no_grad()
def retrieval(model, untrained, images, labels, masks, gallery_images, gallery_labels):
    """How well predicted features find the right patch, for the trained and an untrained predictor:
    a dict of fractions.

    images [B, C, H, W] normalized with Masks; gallery_images [G, C, H, W] other images. For
    recall@1, 5 and 10 the gallery also holds the queries' own patches, so the true patch can be
    found among `gallery_size`; `median_rank` is its place. class_agreement: how often the nearest
    patch of another image is from an image of the same class (labels None: not measured).
    """
    others = make_gallery(model, gallery_images, gallery_images).features  # [G*N, D]
    gallery = torch.cat([make_gallery(model, images, images).features, others])  # [(B+G)*N, D]
    N, real = len(others) // len(gallery_images), masks.targets_valid  # [B, M, Nt]
    image = torch.arange(len(images), device=real.device)[:, None, None].expand_as(real)
    truth = (image * N + masks.targets)[real]  # [Q], place of the true patch in the gallery
    results = {"gallery_size": len(gallery), "queries": len(truth)}
    unit = F.normalize(gallery, dim=1)
    context = model.context_encoder(images, masks.context, masks.context_valid)  # [B, Nc, D]
    for name, predictor in (("trained", model.predictor), ("untrained", untrained)):
        queries = F.normalize(predictor(context, masks)[real], dim=1)  # [Q, D]
        ranks = []
        for part, right in zip(queries.split(512), truth.split(512)):
            cosine = part @ unit.T  # [q, (B+G)*N]
            # 0 if the true patch is the nearest
            ranks.append((cosine > cosine.gather(1, right[:, None])).sum(1))
        ranks = torch.cat(ranks).float()
        results[name] = {f"recall@{k}": (ranks < k).float().mean().item() for k in (1, 5, 10)}
        results[name]["median_rank"] = ranks.median().item() + 1
        if labels is not None:
            found = gallery_labels[(nearest(queries, others)[:, 0] // N).cpu()]
            agree = found == labels[image[real].cpu()]
            results[name]["class_agreement"] = agree.float().mean().item()
    return results


def reconstruction_figure(model, images, masks, dataset, title=""):
    """What a masked autoencoder answers: seen (hidden patches in the mean color), reconstructed,
    and the image, a row for each of the normalized images of an ImageDataset."""
    seen, answer = mae.reconstruct(model, images, masks)
    columns = [("seen", seen), ("reconstructed", answer), ("image", images)]
    return table([(name, core.rgb(part, dataset)) for name, part in columns], title, side=2)[0]


# --- what the encoder sees ------------------------------------------------------------------------


@torch.no_grad()
def attention_weights(encoder, images):
    """How the last block mixes the patches of normalized images: softmax weights [B, nh, N, N],
    queries in rows, each summing to 1."""
    attention, inputs = encoder.blocks[-1].attention, []
    # The fused kernel keeps no weights: catch what goes in, and compute them again.
    hook = attention.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    encoder(images)
    hook.remove()
    qkv = attention.qkv(inputs[0]).unflatten(-1, (3, attention.heads, -1))  # [B, N, 3, nh, D/nh]
    q, k, _ = qkv.permute(2, 0, 3, 1, 4)  # each [B, nh, N, D/nh]
    return (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(dim=-1)  # [B, nh, N, N]


def attention_figure(encoder, images, pictures, title="", queries=None):
    """Attention of the last block, averaged over heads, that single patches pay to all of an image.

    queries: patch indices, by default three far from each other. Weights are in multiples of an
    even share, 1/N.
    """
    grid, p = encoder.grid, encoder.patch_size
    if queries is None:
        shares = ((0.5, 0.2, 0.2), (0.5, 0.5, 0.5), (0.5, 0.8, 0.2))  # of layers, down, across
        places = np.array([share[-len(grid) :] for share in shares]) * grid  # [3, axes]
        queries = np.ravel_multi_index(places.astype(int).T, grid)  # [3]
    weights = attention_weights(encoder, images).mean(1).cpu() * math.prod(grid)  # [B, N, N]
    maps = weights[:, queries].unbind(1)  # each [B, N]
    columns = [("image", pictures), *((f"from patch {query}", part.unflatten(1, grid))
                                      for query, part in zip(queries, maps))]
    figure, axes = table([(name, by_slice(part, grid)) for name, part in columns], title, side=2,
                         vmax=torch.stack(maps).quantile(0.99).item())
    for i, row in enumerate(axes):
        for panel, query, color in zip(row[1:], queries, (COLORS[5], COLORS[3], COLORS[8])):
            *layer, down, across = np.unravel_index(query, grid)
            if not layer or i % grid[0] == layer[0]:  # of a volume, only in its slice
                frame(panel, (down, across), (1, 1), color)
                frame(row[0], (p * down, p * across), (p, p), color)
    add_bar(figure, axes[:, 1:], "attention (1: an even share)", shrink=0.6, extend="max")
    return figure


def token_figure(tokens, grid, pictures, title=""):
    """Patch tokens as colors, red, green and blue the first three principal components, below each
    image [B, 3, H, W].

    tokens: a dict of name -> [n, N, D], the B images first. To the left stands how much of the
    tokens' variance the colors show, and how much the place alone explains.
    """
    rows = {"image": pictures}
    for name, x in tokens.items():
        deviations = x.cpu() - x.cpu().mean((0, 1))
        place = deviations.mean(0).square().mean() / deviations.square().mean()
        pca = PCA(3).fit(deviations.flatten(0, 1).numpy())
        parts = pca.transform(deviations.flatten(0, 1).numpy())  # [n*N, 3]
        colors = as_colors(parts).unflatten(0, x.shape[:2])  # [n, N, 3]
        colors = colors.mT.unflatten(2, grid)  # [n, 3, rows, columns]
        shares = f"colors {pca.explained_variance_ratio_.sum():.0%}, place {place:.0%}"
        rows[f"{name}\n{shares}"] = colors[: len(pictures)]
    columns = [("", column) for column in zip(*(by_slice(part, grid) for part in rows.values()))]
    figure, axes = table(columns, title, side=2)
    for panel, name in zip(axes[:, 0], rows):
        panel.set_ylabel(name)
    return figure


def nearest_images_figure(queries, matches, title="", same=None):
    """Each query [Q, 3, H, W], then the k images found for it, best first: [Q, k, 3, H, W].

    same: bool [Q, k], which of them are of the query's class; they are framed, and counted.
    """
    if same is not None:
        title += f" (Framed: the query's class, {same.sum()} of {same.numel()}.)"
    columns = [(f"nearest {j + 1}", matches[:, j]) for j in range(matches.shape[1])]
    figure, axes = table([("query", queries), *columns], title, side=1.8)
    for row, j in () if same is None else same.nonzero().tolist():
        axes[row, j + 1].spines[:].set(color=COLORS[4], linewidth=5)
    return figure


# --- the figures of a run -------------------------------------------------------------------------


def predictor_figures(run, generator):
    """Yields (file name, Figure): what a run's masks cover, and what its predictor knows."""
    rows = min(run.rows, volumes.SHOWN) if run.about["axes"] == 3 else run.rows
    images, pictures = run.take(range(rows))
    yield "coverage", coverage_figure(run.masking, generator)
    if run.about["axes"] == 2:
        gallery = make_gallery(run.model, *run.take(range(rows, len(run.images))))
        yield "moving_block", moving_block_figure(
            run.model, images[:2], pictures[:2], gallery,
            title=f"{run.what}: one block, predicted at several places.\n"
            "Does the answer follow the place, and how much better are the true features?")
    else:
        print("left out moving_block: it is drawn for images, not for volumes")
    yield "prediction_error", error_figure(
        run.model, run.masking, images, pictures, generator,
        title=f"{run.what}: error of the predicted features, mean of 32 masks.\n"
        "What do the hardest tenth of the patches (framed) have in common?")


def decoder_figures(run, generator):
    """Yields (file name, Figure): what a masked autoencoder makes of hidden patches."""
    try:
        model, masking, *_ = mae.load_run(run.folder, run.device)
    except UsageError:
        return
    if run.about["axes"] == 3:
        print("left out reconstruction: it is drawn for images, not for volumes")
        return
    images, _ = run.take(range(run.rows))
    yield "reconstruction", reconstruction_figure(
        model, images, masking(run.rows, generator).to(run.device), run.images,
        f"{run.what}: what the decoder answers.\n"
        f"{masking.count} of {masking.N} patches are hidden; their mean and contrast are given")


def encoder_figures(run):
    """Yields (file name, Figure): how a run's target encoder sees patches, and whole images."""
    rows, encoder = run.rows, run.encoder
    flat = run.about["axes"] == 2
    images, pictures = run.take(range(min(64, len(run.images))))
    few = slice(rows if flat else volumes.SHOWN)
    untrained = evaluate.untrained_encoder(run.config, run.about, run.seed).to(run.device)
    with torch.no_grad():
        tokens = {"untrained encoder": untrained(images), "target encoder": encoder(images)}
    yield "tokens", token_figure(
        tokens, encoder.grid, pictures[few],
        f"{run.what}: patch tokens, three principal components as colors.\n"
        "Do they follow the image or the place? (Left: shares of the tokens' variance.)")
    yield "attention", attention_figure(
        encoder, images[few], pictures[few], f"{run.what}: attention of the last block.\n"
        "How does it depend on the patch that attends (framed)?")
    pooled = evaluate.features(encoder, run.images, encoder.image_size, run.device)  # [n, D]
    found = rows + nearest(pooled[:rows], pooled[rows:], min(5, len(pooled) - rows))  # [rows, 5]
    queries, matches = run.take(range(rows))[1], run.take(found.flatten())[1]
    if not flat:
        middle = queries.shape[2] // 2
        queries, matches = queries[:, :, middle], matches[:, :, middle]
    labels = run.images.labels
    yield "nearest_images", nearest_images_figure(
        queries, matches.unflatten(0, found.shape),
        f"{run.what}: nearest of {len(pooled) - rows:,} images by pooled target features.\n"
        "What makes two images alike?",
        None if labels is None else labels[found] == labels[:rows, None])


def recorded_figures(run):
    """Yields (file name, Figure) of what evaluation left in the run's folder."""
    path = run.folder / "evaluation.json"
    results = read_json(path) if path.exists() else {}
    if results.get("features"):  # empty if the data has no labels
        yield "comparison", comparison_figure(results)
        yield "confusion", confusion_figure(results)
        yield "per_class", per_class_figure(results)
    else:
        flag = " --dataset LABELED_DATA" if run.images.labels is None else ""
        print(f"left out comparison, confusion and per_class: first run python evaluate.py "
              f"{run.folder}{flag}")
    if results.get("low_shot", {}).get("per_class"):  # empty if the classes are too small
        yield "low_shot", low_shot_figure(results)
    else:
        print(f"left out low_shot: first run python -m extras.probes {run.folder}")


def write_retrieval(run, generator):
    """Write retrieval.json, with up to 200 images as queries and the others as their gallery, and
    print it."""
    n, labels = len(run.images), run.images.labels
    B = min(200, n // 2)
    found = retrieval(run.model, run.untrained_predictor(), run.take(range(B))[0],
                      None if labels is None else labels[:B],
                      run.masking(B, generator).to(run.device), run.take(range(B, n))[0],
                      None if labels is None else labels[B:])
    write_json(run.folder / "figures" / "retrieval.json", found)
    print(json.dumps(found))


def main(argv=None):
    """The command line: write every figure that a run allows into its folder."""
    run = core.load(core.parse(argv, "Draw everything there is to see of a run, into RUN/figures."))
    generator = torch.Generator().manual_seed(run.seed)
    if run.model is None:
        print("left out masks, coverage, predictor_neighbors, moving_block and prediction_error: "
              "only I-JEPA predicts features")
        core.save(run, decoder_figures(run, generator))
    else:
        core.save(run, (volumes if run.about["axes"] == 3 else core).predictor_figures(run))
        core.save(run, predictor_figures(run, generator))
        write_retrieval(run, generator)
    for figures in (core.feature_figures, encoder_figures, recorded_figures):
        core.save(run, figures(run))


if __name__ == "__main__":
    command_line.run(main)
