"""All figures of a run: what predict_and_visualize.py draws, and everything below.

    python -m extras.figures RUN     writes RUN/figures/*.png and RUN/figures/retrieval.json; says
                                     what it leaves out, and why

Notation, `images` and `pictures` as in predict_and_visualize.py. Volumes are drawn by slices.
"""

import json
import math

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from sklearn.decomposition import PCA

import evaluate
import predict_and_visualize as core
from config import UsageError
from extras import mae, volumes
from extras.charts import comparison_figure, confusion_figure, low_shot_figure, per_class_figure
from extras.volumes import by_slice
from masking import Masks, to_indices
from predict_and_visualize import fill, make_gallery, nearest
from support import command_line
from support.plots import COLORS, table
from support.results import read_json, write_json

# --- small pieces ---------------------------------------------------------------------------------


def add_bar(figure, axes, label, **options):
    """A color bar beside some axes of a table, for the last image drawn in them."""
    figure.set_figwidth(figure.get_figwidth() + 0.9)
    figure.colorbar(axes.flat[-1].images[-1], ax=axes, label=label, **options)


def frame(axes, corner, sides, color):
    """Outline a block: corner (row, column) and sides (height, width) in pixels of its image."""
    (row, column), (height, width) = corner, sides
    axes.add_patch(Rectangle((column - 0.5, row - 0.5), width, height, fill=False, edgecolor=color,
                             linewidth=1.8))


def cosine_distance(output):
    """1 - cosine of the predictions and targets of an Output, [B, M, Nt]."""
    return 1 - F.cosine_similarity(output.predictions, output.targets, dim=-1)


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
    rows = [("ours", ours)]
    if len(masking.grid) == 2:
        official = official_coverage(masking.grid, batch_size, batches, generator)
        rows.append(("official rules", official))
    flat = len(masking.grid) == 2
    figure = Figure(figsize=(6.4, 6.6) if flat else (12, 2.4), layout="constrained")
    for row, (name, found) in zip(figure.subplots(len(rows), 2, squeeze=False), rows):
        for axes, part, values in zip(row, ("context", "any target"), found):
            never = (values == 0).sum().item()
            values = values.view(-1, *masking.grid[-2:])  # [layers, rows, columns]
            values = F.pad(values, (0, 1), value=math.nan).movedim(0, 1).flatten(1)[:, :-1]
            image = axes.imshow(values.numpy(), cmap="viridis", vmin=0)
            axes.set_title(f"{name}: {part}\n{never} of {masking.N} cells never", fontsize=9)
            axes.set(xticks=[], yticks=[])
            figure.colorbar(image, ax=axes, shrink=0.8)
    figure.suptitle(f"How often each patch of a {'x'.join(map(str, masking.grid))} grid is used, "
                    "as a fraction of images:\nnothing is learned from a cell that is never drawn "
                    "(0)", fontsize=10)
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
def moving_block_figure(model, images, pictures, gallery, sides=None, places=5, title=""):
    """One block slides over each image: what is imagined at up to `places` places of the middle
    row, and the error at every place.

    sides: rows and columns of the block, in patches; by default about 17.5% of the grid. The error
    is the cosine distance of predicted and true features, averaged over the block, drawn at the
    block's center. Raises UsageError for volumes.
    """
    grid, p = model.target_encoder.grid, model.target_encoder.patch_size
    if len(grid) != 2:
        raise UsageError("a moving block is drawn for images, not for volumes")
    sides = sides or [max(1, round(side * 0.175**0.5)) for side in grid]
    masks = slide(grid, sides).to(images.device)
    down, across = (side - length + 1 for side, length in zip(grid, sides))  # places on each axis
    steps = torch.linspace(0, across - 1, min(places, across)).round().long()
    chosen = down // 2 * across + steps  # of the P places
    filled, errors = [], []
    for image, picture in zip(images, pictures):
        output = model(image.expand(down * across, *image.shape), masks)
        filled.append(fill(picture.expand(len(steps), *picture.shape), masks[chosen],
                           output.predictions[chosen], gallery, p))
        errors.append(cosine_distance(output).mean((1, 2)).view(down, across).cpu())
    filled, errors = torch.stack(filled), torch.stack(errors)  # [B, places, 3, H, W], [B, *, *]
    columns = [(f"column {step + 1}", filled[:, i]) for i, step in enumerate(steps)]
    columns = [("image", pictures), *columns, ("error, by center", 0.5 + 0.5 * pictures)]
    figure, axes = table(columns, title)
    top, left = ((length - 1) / 2 * p - 0.5 for length in sides)  # center patch of the first place
    for row, error in zip(axes, errors):
        for panel, step in zip(row[1:], steps):
            frame(panel, (down // 2 * p, step * p), (sides[0] * p, sides[1] * p), COLORS[5])
        row[-1].imshow(error.numpy(), cmap="magma", vmin=0, vmax=errors.max().item(),
                       extent=(left, left + across * p, top + down * p, top))
        row[-1].set(xlim=(-0.5, grid[1] * p - 0.5), ylim=(grid[0] * p - 0.5, -0.5))
    add_bar(figure, axes[:, -1], "cosine distance", shrink=0.8)
    return figure


@torch.no_grad()
def error_figure(model, masking, images, pictures, generator, draws=32, title=""):
    """Where prediction is hard: mean cosine distance of predicted and true feature for each patch,
    over many masks."""
    B, N, grid = len(images), masking.N, masking.grid
    total, count = torch.zeros(B, N), torch.zeros(B, N)
    for _ in range(draws):
        masks = masking(B, generator)
        distance = cosine_distance(model(images, masks.to(images.device))).cpu()  # [B, M, Nt]
        real = masks.targets_valid
        total.scatter_add_(1, masks.targets.flatten(1), (distance * real).flatten(1))
        count.scatter_add_(1, masks.targets.flatten(1), real.float().flatten(1))
    error = (total / count.clamp(min=1)).unflatten(1, grid)  # [B, rows, columns]
    rows = by_slice(pictures, grid), by_slice(error, grid)
    figure, axes = table([("", pair) for pair in zip(*rows)], title, cmap="magma",
                         vmax=error.max().item())
    add_bar(figure, axes, "cosine distance", shrink=0.6)
    return figure


@torch.no_grad()
def retrieval(model, untrained, images, labels, masks, gallery_images, gallery_labels):
    """How well predicted features find the right patch, for the trained and an untrained predictor:
    a dict of fractions.

    images [B, C, H, W] normalised with Masks; gallery_images [G, C, H, W] other images. For
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
    and the image, a row for each of the normalised images of an ImageDataset."""
    seen, answer = mae.reconstruct(model, images, masks)
    columns = [("seen", seen), ("reconstructed", answer), ("image", images)]
    return table([(name, core.rgb(part, dataset)) for name, part in columns], title, side=1.6)[0]


# --- what the encoder sees ------------------------------------------------------------------------


@torch.no_grad()
def attention_weights(encoder, images):
    """How the last block mixes the patches of normalised images: softmax weights [B, nh, N, N],
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
    """Attention of the last block, averaged over heads: for each image the mean over all queries,
    then that of single patches.

    queries: patch indices, by default three far from each other. Weights are in multiples of an
    even share, 1/N.
    """
    grid, p = encoder.grid, encoder.patch_size
    if queries is None:
        shares = ((0.5, 0.2, 0.2), (0.5, 0.5, 0.5), (0.5, 0.8, 0.2))  # of layers, down, across
        places = np.array([share[-len(grid) :] for share in shares]) * grid  # [3, axes]
        queries = np.ravel_multi_index(places.astype(int).T, grid)  # [3]
    weights = attention_weights(encoder, images).mean(1).cpu() * math.prod(grid)  # [B, N, N]
    maps = {"mean of all": weights.mean(1)}  # each [B, N]
    maps |= {f"from patch {query}": weights[:, query] for query in queries}
    top = torch.stack(list(maps.values())).quantile(0.99).item()
    columns = [("image", pictures), *((name, m.unflatten(1, grid)) for name, m in maps.items())]
    figure, axes = table([(name, by_slice(part, grid)) for name, part in columns], title,
                         cmap="viridis", vmax=top)
    for i, row in enumerate(axes):
        for panel, query, color in zip(row[2:], queries, (COLORS[5], COLORS[3], COLORS[0])):
            *layer, down, across = np.unravel_index(query, grid)
            if not layer or i % grid[0] == layer[0]:  # of a volume, only in its slice
                frame(panel, (down, across), (1, 1), color)
                frame(row[0], (p * down, p * across), (p, p), color)
    add_bar(figure, axes[:, 1:], "attention (1: an even share)", shrink=0.6, extend="max")
    return figure


def token_figure(tokens, grid, pictures, title=""):
    """The first three principal components of patch tokens [B, N, D] as red, green and blue, below
    each image [B, 3, H, W]."""
    parts = PCA(3).fit_transform(tokens.flatten(0, 1).cpu().numpy())  # [B*N, 3]
    low, high = np.percentile(parts, [2, 98], axis=0)
    colors = torch.tensor((parts - low) / np.maximum(high - low, 1e-9)).clamp(0, 1)
    colors = colors.unflatten(0, tokens.shape[:2]).mT.unflatten(2, grid)  # [B, 3, rows, columns]
    rows = by_slice(pictures, grid), by_slice(colors, grid)
    return table([("", pair) for pair in zip(*rows)], title)[0]


def nearest_images_figure(queries, matches, title=""):
    """Each query [Q, 3, H, W], then the k images found for it, best first: [Q, k, 3, H, W]."""
    columns = [(f"nearest {j + 1}", matches[:, j]) for j in range(matches.shape[1])]
    return table([("query", queries), *columns], title)[0]


# --- the figures of a run -------------------------------------------------------------------------


def predictor_figures(run, generator):
    """Yields (file name, Figure): what a run's masks cover, and what its predictor knows."""
    rows = min(run.rows, volumes.SHOWN) if run.about["axes"] == 3 else run.rows
    images, pictures = run.take(range(rows))
    yield "coverage", coverage_figure(run.masking, generator)
    if run.about["axes"] == 2:
        gallery = make_gallery(run.model, *run.take(range(rows, len(run.images))))
        yield "moving_block", moving_block_figure(
            run.model, images[:4], pictures[:4], gallery,
            title=f"{run.what}: one block, predicted at several places.\n"
            "How does the answer change with the place, and where is the error high?")
    else:
        print("left out moving_block: it is drawn for images, not for volumes")
    yield "prediction_error", error_figure(
        run.model, run.masking, images, pictures, generator,
        title=f"{run.what}: where prediction is hard (mean of 32 masks).\n"
        "Are outlines and small things harder than plain ground?")


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
        f"{run.what}: {masking.count} of {masking.N} patches hidden, and the decoder's answer.\n"
        "Each has the true patch's mean and contrast,\nwhich the decoder is not asked for")


def encoder_figures(run):
    """Yields (file name, Figure): how a run's target encoder sees patches, and whole images."""
    rows, encoder = run.rows, run.encoder
    flat = run.about["axes"] == 2
    images, pictures = run.take(range(rows if flat else min(rows, volumes.SHOWN)))
    with torch.no_grad():
        tokens = encoder(images)  # [B, N, D]
    yield "tokens", token_figure(
        tokens, encoder.grid, pictures,
        f"{run.what}: first three principal components of the patch tokens.\n"
        "Do patches that look alike get like colors, in all images?")
    yield "attention", attention_figure(
        encoder, images[:4], pictures[:4], f"{run.what}: attention of the last block.\n"
        "How does it depend on the patch that attends (framed)?")
    pooled = evaluate.features(encoder, run.images, encoder.image_size, run.device)  # [n, D]
    found = rows + nearest(pooled[:rows], pooled[rows:], min(7, len(pooled) - rows))  # [rows, 7]
    queries, matches = run.take(range(rows))[1], run.take(found.flatten())[1]
    if not flat:
        middle = queries.shape[2] // 2
        queries, matches = queries[:, :, middle], matches[:, :, middle]
    yield "nearest_images", nearest_images_figure(
        queries, matches.unflatten(0, found.shape),
        f"{run.what}: nearest of {len(pooled) - rows:,} images by pooled target features.\n"
        "What makes two images alike?")


def recorded_figures(run):
    """Yields (file name, Figure) of what evaluation left in the run's folder."""
    path = run.folder / "evaluation.json"
    results = read_json(path) if path.exists() else {}
    if results.get("features"):  # empty if the data has no labels
        yield "comparison", comparison_figure(results)
        yield "confusion", confusion_figure(results)
        yield "per_class", per_class_figure(results)
    else:
        flag = " --dataset LABELLED_DATA" if run.images.labels is None else ""
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
        print("left out masks, coverage, predictor_neighbours, moving_block and prediction_error: "
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
