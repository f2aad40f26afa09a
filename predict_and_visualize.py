"""Every figure: masks, coverage, curves, what the predictor imagines, t-SNE, tokens, attention, confusion.

    python predict_and_visualize.py RUN          writes RUN/figures/*.png and RUN/figures/retrieval.json

Each figure is a function that takes tensors and returns a matplotlib `Figure`, so that scripts save it, notebooks show it and
tests call it. Colours are Okabe and Ito's, which colour-blind readers tell apart. Alphabet as in models.py; images shown are
float [B, 3, H, W] in 0..1.
"""

import csv
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE

import config
import data
import evaluate
import models
import train

COLOURS = ["#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#0072B2", "#D55E00", "#F0E442", "#999999", "#000000", "#7F3C8D"]


# ---- small pieces


def show(axes, image, title="", size=9):
    """One image [3, H, W] in 0..1 (or a grey one [H, W]) on an axes without ticks."""
    picture = image.movedim(0, -1) if image.ndim == 3 else image
    axes.imshow(picture.clamp(0, 1).numpy(), cmap="gray", interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    axes.set_title(title, fontsize=size)


def to_pixels(flags, image_size, grid):
    """Boolean patch maps [..., N] as pixel maps [..., H, W]."""
    patch = image_size // grid[0]
    return flags.unflatten(-1, grid).repeat_interleave(patch, -2).repeat_interleave(patch, -1)  # [..., H, W]


def rgb(dataset, indices, size):
    """Images of a dataset as they are shown: float [B, 3, H, W] in 0..1."""
    images = data.resize(dataset.images[indices].float() / 255, size)  # [B, C, H, W]
    return images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images


def normalised(dataset, indices, size):
    """The same images as the encoder takes them: float [B, C, H, W]."""
    return next(data.batches(dataset.subset(indices), len(indices), size))


# ---- masks


def mask_figure(images, masks, grid, title=""):
    """A row for each image [B, 3, H, W]: the image, what the context encoder sees (the rest white), and each target block in its colour."""
    B, M = masks.targets.shape[:2]
    context, targets = (to_pixels(part, images.shape[-1], grid) for part in masks.maps(grid[0] * grid[1]))  # [B, H, W], [B, M, H, W]
    figure = Figure(figsize=(1.35 * (M + 2), 1.45 * B + 0.6), layout="constrained")
    axes = figure.subplots(B, M + 2, squeeze=False)
    for i, row in enumerate(axes):
        names = ["image", "context", *(f"target {m + 1}" for m in range(M))] if i == 0 else [""] * (M + 2)
        show(row[0], images[i], names[0])
        show(row[1], torch.where(context[i], images[i], 1.0), names[1])
        for m in range(M):
            tint = torch.tensor(to_rgb(COLOURS[m % len(COLOURS)]))[:, None, None]  # [3, 1, 1]
            show(row[2 + m], torch.where(targets[i, m], 0.45 * images[i] + 0.55 * tint, 0.25 * images[i] + 0.75), names[2 + m])
    figure.suptitle(title, fontsize=10)
    return figure


def official_coverage(grid, batch_size, batches, generator, min_keep=4):
    """How often each patch is context and target under the rules of the official sampler: two float [N] maps in 0..1.

    The rules, from its published code: one block size a batch from one random number, which drives scale and aspect alike; the
    first row and column drawn below the last possible one; every mask cut to the batch's shortest by keeping its first patches.
    """
    H, W = grid
    counts = torch.zeros(2, H * W)
    for _ in range(batches):
        u = torch.rand(1, generator=generator).item()
        area, aspect = H * W * (0.15 + 0.05 * u), 0.75 + 0.75 * u
        h, w = min(round((area * aspect) ** 0.5), H - 1), min(round((area / aspect) ** 0.5), W - 1)
        side = round((H * W * (0.85 + 0.15 * u)) ** 0.5)
        sides = min(side, H - 1), min(side, W - 1)

        def block(height, width):
            top, left = (int(torch.randint(0, n, (1,), generator=generator)) for n in (max(H - height, 1), max(W - width, 1)))
            cells = torch.zeros(H, W, dtype=torch.bool)
            cells[top : top + height, left : left + width] = True
            return cells.flatten()  # [N]

        contexts = []
        while len(contexts) < batch_size:
            targets = torch.stack([block(h, w) for _ in range(4)])  # [4, N]
            kept = (block(*sides) & ~targets.any(0)).nonzero()[:, 0]
            if len(kept) > min_keep:  # it draws again otherwise
                contexts.append(kept)
                counts[1] += targets.any(0)
        shortest = min(map(len, contexts))
        for kept in contexts:
            counts[0][kept[:shortest]] += 1
    return counts / (batches * batch_size)


def coverage_figure(masking, generator, batch_size=64, batches=16):
    """How often each cell of a 2-D grid is context and target: this sampler above, the official sampler's rules below."""
    drawn = [masking(batch_size, generator).maps(masking.N) for _ in range(batches)]
    ours = torch.stack([torch.cat([c for c, _ in drawn]).float().mean(0), torch.cat([t.any(1) for _, t in drawn]).float().mean(0)])
    official = official_coverage(masking.grid, batch_size, batches, generator)
    figure = Figure(figsize=(6.4, 6.2), layout="constrained")
    for row, (name, maps) in zip(figure.subplots(2, 2), (("ours", ours), ("official rules", official))):
        for axes, part, values in zip(row, ("context", "any target"), maps):
            values = values.view(masking.grid)
            picture = axes.imshow(values.numpy(), cmap="viridis", vmin=0)
            never = (values == 0).sum().item()
            axes.set_title(f"{name}: {part}, {never} of {masking.N} cells never", fontsize=9)
            axes.set(xticks=[], yticks=[])
            figure.colorbar(picture, ax=axes, shrink=0.8)
    figure.suptitle(f"How often each patch of a {'x'.join(map(str, masking.grid))} grid is used", fontsize=10)
    return figure


# ---- curves


def curves_figure(rows, title=""):
    """Training curves over optimizer steps from the rows of metrics.csv (dicts of strings)."""
    columns = {name: np.array([float(row[name]) for row in rows]) for name in rows[0]}
    panels = [("loss", "falls, then may rise as the targets grow richer"), ("target_std", "near 0: collapsed"),
              ("grad_norm", ""), ("lr", ""), ("weight_decay", ""), ("momentum", "")]
    figure = Figure(figsize=(9, 4.6), layout="constrained")
    for axes, (name, note) in zip(figure.subplots(2, 3, sharex=True).flat, panels):
        axes.plot(columns["step"], columns[name], color=COLOURS[4], linewidth=1.3)
        axes.set_title(name.replace("_", " ") + (f" ({note})" if note else ""), fontsize=9)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
        if name == "target_std":
            axes.set_ylim(0, 1.1)
    for axes in figure.axes[3:]:
        axes.set_xlabel("optimizer step", fontsize=9)
    figure.suptitle(title, fontsize=10)
    return figure


# ---- what the predictor imagines


@torch.no_grad()
def block_features(model, images, masks, predictor):
    """Predicted and true features of the target patches of normalised images, each [B, M, Nt, D], layer-normed."""
    context = model.context_encoder(images, masks.context, masks.context_valid)  # [B, Nc, D]
    predicted = predictor(context, masks)
    return F.layer_norm(predicted, predicted.shape[-1:]), model.targets(images, masks)


@torch.no_grad()
def gallery_features(model, images):
    """Layer-normed target features of every patch of normalised images [G, C, H, W] -> [G * N, D]."""
    tokens = torch.cat([model.target_encoder(part) for part in images.split(256)])  # [G, N, D]
    return F.layer_norm(tokens, tokens.shape[-1:]).flatten(0, 1)


def nearest(queries, gallery, k=1):
    """Indices [Q, k] of the rows of the gallery [K, D] with the highest cosine to each query [Q, D], best first."""
    gallery = F.normalize(gallery, dim=1)
    return torch.cat([(F.normalize(part, dim=1) @ gallery.T).topk(k, dim=1).indices for part in queries.split(512)])


def retrieval(model, untrained, images, labels, masks, gallery_images, gallery_labels):
    """How well predicted features find the right patch, for the trained and an untrained predictor: a dict of fractions.

    images [B, C, H, W] normalised with Masks; gallery_images [G, C, H, W] other held-out images. For recall@1, 5 and 10 the
    gallery also holds the patches of the queries themselves, so the true patch is there to be found among `gallery_size`;
    `median_rank` is its place. Class agreement is the share of nearest patches, all of other images, whose image has the
    query's class (`labels` may be None).
    """
    N, others = model.masking.N, gallery_features(model, gallery_images)
    gallery = torch.cat([gallery_features(model, images), others])  # [(B + G) * N, D]
    _, valid = masks.valid()  # [B, M, Nt]
    image_number = torch.arange(len(images))[:, None, None].expand_as(masks.targets)
    truth = (image_number * N + masks.targets)[valid]  # [Q], place of the true patch in the gallery
    results = {"gallery_size": len(gallery), "queries": len(truth)}
    unit = F.normalize(gallery, dim=1)
    for name, predictor in (("trained", model.predictor), ("untrained", untrained)):
        predicted, _ = block_features(model, images, masks, predictor)
        queries = F.normalize(predicted[valid], dim=1)  # [Q, D]
        ranks = []
        for part, right in zip(queries.split(512), truth.split(512)):
            cosine = part @ unit.T  # [q, (B + G) * N]
            ranks.append((cosine > cosine.gather(1, right[:, None])).sum(1))  # 0: the true patch is the nearest
        ranks = torch.cat(ranks)
        results[name] = {f"recall@{k}": (ranks < k).float().mean().item() for k in (1, 5, 10)}
        results[name]["median_rank"] = ranks.float().median().item() + 1
        if labels is not None:
            found = nearest(predicted[valid], others)[:, 0] // N
            results[name]["class_agreement"] = (gallery_labels[found] == labels[image_number[valid]]).float().mean().item()
    return results


def neighbours_figure(model, untrained, images, pictures, masks, gallery_images, gallery_pictures, title=""):
    """What the predictor imagines: hidden patches replaced by the gallery patch whose target feature is nearest (cosine).

    A row an image: original, context, one column for each target block filled from *predicted* features, all blocks at once,
    then two controls: filled from the *true* features (the best this gallery can do) and from an untrained predictor's.
    images, gallery_images: normalised; pictures, gallery_pictures: the same in 0..1; gallery and images are disjoint.
    """
    (B, M), grid, size = masks.targets.shape[:2], model.masking.grid, pictures.shape[-1]
    patch = size // grid[0]
    gallery = gallery_features(model, gallery_images)
    tiles = models.patchify(gallery_pictures, patch).flatten(0, 1)  # [G * N, 3 * patch**2]
    context, targets = masks.maps(model.masking.N)  # [B, N], [B, M, N]
    hidden = torch.where(to_pixels(context, size, grid)[:, None], pictures, 1.0)  # [B, 3, H, W]
    _, valid = masks.valid()  # [B, M, Nt]

    def fill(features):
        """Pictures with every target patch replaced, [B, N, 3 * patch**2], white elsewhere."""
        filled = models.patchify(hidden, patch).clone()  # [B, N, 3 * patch**2]
        found = nearest(features[valid], gallery)[:, 0]
        row = torch.arange(B)[:, None, None].expand_as(masks.targets)[valid]
        filled[row, masks.targets[valid]] = tiles[found]
        return filled

    def to_image(flat):
        """patchify undone: [B, N, 3 * patch**2] -> [B, 3, H, W]."""
        return flat.unflatten(1, grid).unflatten(-1, (3, patch, patch)).permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)

    predicted, true = block_features(model, images, masks, model.predictor)
    guess, _ = block_features(model, images, masks, untrained)
    filled = to_image(fill(predicted))
    where = to_pixels(targets, size, grid)[:, :, None]  # [B, M, 1, H, W]
    columns = [("original", pictures), ("context", hidden)]
    columns += [(f"block {m + 1}", torch.where(where[:, m], filled, hidden)) for m in range(M)]
    columns += [("all predicted", filled), ("true features", to_image(fill(true))), ("untrained", to_image(fill(guess)))]
    figure = Figure(figsize=(1.25 * len(columns), 1.32 * B + 0.6), layout="constrained")
    for i, row in enumerate(figure.subplots(B, len(columns), squeeze=False)):
        for axes, (name, picture) in zip(row, columns):
            show(axes, picture[i], name if i == 0 else "")
    figure.suptitle(title, fontsize=10)
    return figure


def error_figure(model, images, pictures, generator, draws=32, title=""):
    """Where prediction is hard: mean cosine distance of predicted and true feature for each patch, over many masks."""
    B, N, grid = len(images), model.masking.N, model.masking.grid
    total, count = torch.zeros(B, N), torch.zeros(B, N)
    for _ in range(draws):
        masks = model.masking(B, generator)
        predicted, true = block_features(model, images, masks, model.predictor)
        _, valid = masks.valid()  # [B, M, Nt]
        distance = 1 - F.cosine_similarity(predicted, true, dim=-1)  # [B, M, Nt]
        total.scatter_add_(1, masks.targets.flatten(1), (distance * valid).flatten(1))
        count.scatter_add_(1, masks.targets.flatten(1), valid.float().flatten(1))
    error = (total / count.clamp(min=1)).unflatten(1, grid)  # [B, rows, columns]
    figure = Figure(figsize=(1.5 * B, 3.6), layout="constrained")
    axes = figure.subplots(2, B, squeeze=False)
    for i in range(B):
        show(axes[0, i], pictures[i])
        heat = axes[1, i].imshow(error[i].numpy(), cmap="magma", vmin=0, vmax=error.max().item())
        axes[1, i].set(xticks=[], yticks=[])
    figure.colorbar(heat, ax=axes[1, :], shrink=0.8, label="cosine distance")
    figure.suptitle(title, fontsize=10)
    return figure


# ---- features


def tsne_figure(features, labels, class_names, title="", seed=0):
    """t-SNE side by side of several features of the same images: features a dict of name -> [n, D], labels int64 [n]."""
    figure = Figure(figsize=(5.2 * len(features), 5.6), layout="constrained")
    panels = figure.subplots(1, len(features), squeeze=False)[0]
    for axes, (name, x) in zip(panels, features.items()):
        x = PCA(min(50, x.shape[1]), random_state=seed).fit_transform(x.numpy())
        places = TSNE(random_state=seed, init="pca").fit_transform(x)  # [n, 2]
        for kind in range(len(class_names)):
            chosen = (labels == kind).numpy()
            axes.scatter(*places[chosen].T, s=5, linewidths=0, color=COLOURS[kind % len(COLOURS)], label=class_names[kind])
        axes.set(xticks=[], yticks=[])
        axes.set_title(name, fontsize=10)
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=min(len(names), 5), fontsize=9, markerscale=3, frameon=False)
    figure.suptitle(title, fontsize=10)
    return figure


@torch.no_grad()
def token_figure(encoder, images, pictures, title=""):
    """The patch tokens' first three principal components over all images as red, green and blue, under each picture."""
    tokens = encoder(images)  # [B, N, D]
    parts = PCA(3).fit_transform(tokens.flatten(0, 1).numpy())  # [B * N, 3]
    low, high = np.percentile(parts, [2, 98], axis=0)
    colours = torch.tensor((parts - low) / (high - low)).float().unflatten(0, tokens.shape[:2]).mT.unflatten(2, encoder.grid)
    figure = Figure(figsize=(1.35 * len(images), 3.3), layout="constrained")
    for column, picture, colour in zip(figure.subplots(2, len(images), squeeze=False).T, pictures, colours):
        show(column[0], picture)
        show(column[1], colour)
    figure.suptitle(title, fontsize=10)
    return figure


def nearest_images_figure(gallery, gallery_pictures, queries, query_pictures, k=7, title=""):
    """Each query image followed by the k gallery images of highest cosine: features [G, D] and [Q, D]."""
    found = nearest(queries, gallery, k)  # [Q, k]
    figure = Figure(figsize=(1.2 * (k + 1), 1.25 * len(queries) + 0.6), layout="constrained")
    for i, row in enumerate(figure.subplots(len(queries), k + 1, squeeze=False)):
        show(row[0], query_pictures[i], "query" if i == 0 else "")
        for j in range(k):
            show(row[j + 1], gallery_pictures[found[i, j]], f"nearest {j + 1}" if i == 0 else "")
    figure.suptitle(title, fontsize=10)
    return figure


def comparison_figure(results):
    """Bars of evaluation.json: linear probe and kNN of the trained encoders beside the random one and the raw pixels."""
    names = list(results["features"])
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    for offset, measure, colour in ((-0.2, "linear", COLOURS[4]), (0.2, "knn", COLOURS[0])):
        values = [100 * results["features"][name][measure] for name in names]
        bars = axes.bar(np.arange(len(names)) + offset, values, 0.38, color=colour, label={"linear": "linear probe", "knn": "kNN"}[measure])
        axes.bar_label(bars, fmt="%.1f", fontsize=8)
    axes.axhline(100 * results["chance"], color="gray", linestyle=":", linewidth=1, label="chance")
    axes.set_xticks(range(len(names)), [evaluate.ROWS.get(name, name) for name in names], fontsize=9)
    axes.set_ylabel("test accuracy, %", fontsize=9)
    axes.legend(fontsize=8, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(f"{results['dataset']}: what the frozen features know", fontsize=10)
    return figure


# ---- command line


def held_out(dataset, count, seed):
    """Two disjoint random sets of image numbers: `count` queries, int64 [count], and all the rest for galleries."""
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))
    return order[:count], order[count:]


def images_to_show(run_config, data_dir):
    """The run's test images; where its data has no test split, as a flat folder has none, its training images, and says so."""
    try:
        return data.load(run_config.dataset, "test", data_dir, run_config.image_size)
    except config.UsageError:
        dataset = data.load(run_config.dataset, run_config.split, data_dir, run_config.image_size)
        print(f"{run_config.dataset} has no test images: the figures show images that were trained on")
        return dataset


def main(argv=None):
    """Write the figures of one run; raises UsageError for what the user can put right."""
    parser = config.Parser(prog="predict_and_visualize.py", description="Write every figure of a run into RUN/figures.")
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder that train.py wrote")
    parser.add_argument("--data-dir", help="folder of the data, where it is not the one the run was trained from")
    parser.add_argument("--images", type=int, default=2000, help="held-out images in the galleries and t-SNE (default 2000)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the images and masks shown (default 0)")
    args = parser.parse_args(argv)
    if args.images < 250:
        raise config.UsageError(f"--images is {args.images}: it must be 250 or more")
    model, run_config, about = train.load_run(args.run)
    if about["axes"] != 2:
        raise config.UsageError(f"{args.run} was trained on volumes; the figures show flat images only")
    test = images_to_show(run_config, args.data_dir or run_config.data_dir)
    size, generator = run_config.image_size, torch.Generator().manual_seed(args.seed)
    folder, what = args.run / "figures", f"{run_config.dataset}, {args.run.name}"
    folder.mkdir(exist_ok=True)
    shown, rest = held_out(test, 6, args.seed)
    rest = rest[: args.images]
    if len(rest) < 250:
        raise config.UsageError(f"{run_config.dataset} has {len(test)} test images; the figures need 256 or more")
    pictures, images = rgb(test, shown, size), normalised(test, shown, size)
    gallery_pictures, gallery_images = rgb(test, rest, size), normalised(test, rest, size)
    masks = model.masking(len(shown), generator)
    with torch.random.fork_rng():
        torch.manual_seed(args.seed)
        untrained = models.build(run_config, about["channels"]).predictor.eval()

    def save(name, figure):
        figure.savefig(folder / f"{name}.png", dpi=130)
        print(f"{folder / name}.png", flush=True)

    save("masks", mask_figure(pictures, masks, model.masking.grid, f"{what}: seen by the context encoder, and to be predicted"))
    save("coverage", coverage_figure(model.masking, generator))
    with open(args.run / "metrics.csv") as file:
        save("curves", curves_figure(list(csv.DictReader(file)), f"{what}: training"))
    save("predictor_neighbours", neighbours_figure(
        model, untrained, images, pictures, masks, gallery_images, gallery_pictures,
        f"{what}: hidden patches filled with the nearest of {len(rest):,} held-out images' patches"))
    save("prediction_error", error_figure(model, images, pictures, generator, title=f"{what}: where prediction is hard (mean of 32 masks)"))
    save("tokens", token_figure(model.target_encoder, images, pictures, f"{what}: first three principal components of the patch tokens"))
    queries, _ = held_out(test, 206, args.seed)
    labels = test.labels
    numbers = retrieval(model, untrained, normalised(test, queries[6:], size), None if labels is None else labels[queries[6:]],
                        model.masking(200, generator), gallery_images[200:], None if labels is None else labels[rest[200:]])
    (folder / "retrieval.json").write_text(json.dumps(numbers, indent=2))
    print(json.dumps(numbers))
    random = evaluate.random_encoder(run_config, about, torch.device("cpu"), args.seed)
    pooled = {name: evaluate.features(encoder, test.subset(rest), size, "cpu")
              for name, encoder in (("target encoder", model.target_encoder), ("random encoder", random))}
    shown_features = evaluate.features(model.target_encoder, test.subset(shown), size, "cpu")
    save("nearest_images", nearest_images_figure(pooled["target encoder"], gallery_pictures, shown_features, pictures,
                                                 title=f"{what}: nearest of {len(rest):,} held-out images by pooled target features"))
    if labels is None:
        print("the images have no labels: t-SNE and the comparison of accuracies are left out")
        return
    save("tsne", tsne_figure(pooled, labels[rest], test.class_names or [str(i) for i in range(int(labels.max()) + 1)],
                             f"{what}: t-SNE of {len(rest):,} held-out images' pooled features"))
    if (args.run / "evaluation.json").exists():
        save("comparison", comparison_figure(json.loads((args.run / "evaluation.json").read_text())))


if __name__ == "__main__":
    config.run(main)
