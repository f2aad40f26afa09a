"""Is it learning? The measures that a JEPA's loss does not give: collapse, rank, and how well the predictor beats the mean.

The loss compares predictions with targets that move: it falls when both collapse to one answer, and rises when the targets grow
richer. `measure` looks at held-out images instead; `warnings` turns what it found into plain words. Used by the training loop and
by notebooks. Alphabet as in models.py; `n` held-out images, `q` views of each.
"""

import math

import torch
import torch.nn.functional as F

from models import prediction_loss

# --- measures of features: each takes a tensor and gives a float ---------------------------------------------------------


def deviation(tokens):
    """How much features differ between images *at the same place*: layer-normed tokens [n, N, D] -> mean deviation over places and width.

    Near 1 where features tell images apart; near 0 where the encoder answers the same for every image, even if it tells places apart.
    """
    return tokens.std(dim=0).mean().item()


def rankme(features):
    """Effective rank of [n, D] features, from 1 to min(n, D): exp of the entropy of the singular values' shares (Garrido et al. 2023).

    The mean is not removed, as in the paper: features that hardly differ from their mean have rank 1.
    """
    singular = torch.linalg.svdvals(features.float())  # [min(n, D)]
    share = singular / singular.sum() + 1e-7
    return math.exp(-(share * share.log()).sum().item())


def pairwise_cosine(features):
    """Mean cosine between the features [n, D] of two different images; near 1 where all images look alike."""
    n = len(features)
    total = F.normalize(features.float(), dim=1).sum(0).square().sum().item()  # the sum over all pairs, without making them
    return (total - n) / (n * (n - 1))  # less each image with itself


def lidar(views):
    """LiDAR (Thilak et al. 2024) of views [n, q, D], from 1 to min(n - 1, D): the effective rank of what tells images apart once what
    differs between views of the same image is divided out. Needs n * (q - 1) well above D to be reliable."""
    n, q, D = views.shape
    views = views.double()
    means = views.mean(1)  # [n, D]
    within = (views - means[:, None]).flatten(0, 1)  # [n*q, D]
    between = means - means.mean(0)
    within = within.T @ within / (n * (q - 1)) + 1e-4 * torch.eye(D, device=views.device, dtype=views.dtype)  # [D, D]
    values, vectors = torch.linalg.eigh(within)
    whiten = vectors * values.rsqrt()  # [D, D]
    spread = between @ whiten  # [n, D]
    share = torch.linalg.svdvals(spread).square()
    share = share / share.sum() + 1e-7
    return math.exp(-(share * share.log()).sum().item())


@torch.no_grad()
def pool(encoder, images, batch_size=512):
    """Average of an encoder's patch tokens: normalised images [n, C, H, W] -> [n, D] float32 (paper appendix A.2)."""
    return torch.cat([encoder(part).float().mean(1) for part in images.split(batch_size)])


@torch.no_grad()
def knn(train_x, train_y, test_x, test_y, k=20, temperature=0.07):
    """Test accuracy, a fraction, of a vote of the `k` training images of highest cosine, each weighing exp(cosine / temperature).

    Features float [n, D] and [m, D], labels int64 [n] and [m], on one device; all `n` vote when `k` is larger. It has nothing to
    tune: `k` and `temperature` are those of Wu et al. 2018 (Non-Parametric Instance Discrimination) with DINO's k of 20.
    """
    train_x = F.normalize(train_x.float(), dim=1)
    classes = int(max(train_y.max(), test_y.max())) + 1
    correct = 0
    for x, y in zip(test_x.split(1024), test_y.split(1024)):  # in chunks: m x n cosines would not fit in memory
        with torch.autocast(x.device.type, enabled=False):  # in bf16 many neighbours would tie
            cosine, neighbours = (F.normalize(x.float(), dim=1) @ train_x.T).topk(min(k, len(train_x)), dim=1)  # [B, k]
        votes = torch.zeros(len(x), classes, device=x.device)  # [B, K]
        votes.scatter_add_(1, train_y[neighbours], (cosine / temperature).exp())
        correct += (votes.argmax(1) == y).sum().item()
    return correct / len(test_y)


# --- all of them on a model ------------------------------------------------------------------------------------------------


@torch.no_grad()
def predictions(model, images, batch_size):
    """What the predictor answers and should have answered, [patches, D] each, and at which places, int64 [patches]: one mask an image."""
    generator, found = torch.Generator(images.device).manual_seed(0), []
    for part in images.split(batch_size):
        masks = model.masking(len(part), generator)
        context = model.context_encoder(part, masks.context, masks.context_valid)  # [B, Nc, D]
        asked = masks.valid()[1]  # [B, M, Nt]
        found.append((model.predictor(context, masks)[asked].float(), model.targets(part, masks)[asked].float(), masks.targets[asked]))
    return [torch.cat(parts) for parts in zip(*found)]


@torch.no_grad()
def context_views(model, images, batch_size, views):
    """The context encoder's pooled features under `views` masks of each image, [n, views, D]."""
    generator, found = torch.Generator(images.device).manual_seed(1), []
    for part in images.repeat_interleave(views, 0).split(batch_size):
        masks = model.masking(len(part), generator)
        context = model.context_encoder(part, masks.context, masks.context_valid).float()  # [B, Nc, D]
        real = masks.valid()[0][..., None]  # [B, Nc, 1]
        found.append((context * real).sum(1) / real.sum(1))  # [B, D]
    return torch.cat(found).unflatten(0, (-1, views))


@torch.no_grad()
def measure(model, images, labelled=None, batch_size=128, views=4):
    """What a model makes of normalised images [n, C, H, W] that it was not trained on (n at least 2): a dict of floats.

    held_out_loss and cosine (prediction and target), each beside the same for the *mean target of that place* (mean_loss,
    mean_cosine): what can be had without looking at the image. target_std, rank, pairwise_cosine: of the target encoder. lidar: of
    the context encoder, its `views` of an image differing in their masks. knn, a fraction: of the target encoder, where `labelled` is
    (bank [m, C, H, W], its labels [m], queries [k, C, H, W], their labels [k]). A model without predictor gets what needs none. The
    masks are the same at every call, so that calls can be compared; the model's mode is left as found.
    """
    was_training, found = model.training, {}
    model.eval()
    if hasattr(model, "predictor"):
        answers, targets, places = predictions(model, images, batch_size)  # [patches, D] twice, [patches]
        N, count = model.masking.N, torch.bincount(places, minlength=model.masking.N)  # [N]
        mean = targets.new_zeros(N, targets.shape[1]).index_add(0, places, targets) / count[:, None].clamp(min=1)  # [N, D]
        found = {
            "held_out_loss": prediction_loss(answers, targets, kind=model.loss).item(),
            "mean_loss": prediction_loss(mean[places], targets, kind=model.loss).item(),
            "cosine": F.cosine_similarity(answers, targets, dim=-1).mean().item(),
            "mean_cosine": F.cosine_similarity(mean[places], targets, dim=-1).mean().item(),
        }
    tokens = torch.cat([model.target_encoder(part).float() for part in images.split(batch_size)])  # [n, N, D]
    pooled = tokens.mean(1)  # [n, D]
    found |= {"target_std": deviation(F.layer_norm(tokens, tokens.shape[-1:])), "rank": rankme(pooled),
              "pairwise_cosine": pairwise_cosine(pooled)}
    if hasattr(model, "predictor"):
        found["lidar"] = lidar(context_views(model, images, batch_size, views))
    if labelled is not None:
        bank, bank_labels, queries, labels = labelled
        bank, queries = (pool(model.target_encoder, part, batch_size) for part in (bank, queries))  # [m, D], [k, D]
        found["knn"] = knn(bank, bank_labels, queries, labels)
    model.train(was_training)
    return found


MEASURES = ("held_out_loss", "mean_loss", "cosine", "mean_cosine", "target_std", "rank", "pairwise_cosine", "lidar", "knn")


def warnings(now, first, progress):
    """What looks wrong, in plain words: a dict of kind -> sentence, empty where all is well.

    now, first: what `measure` found now and before training; progress: the fraction of the run that is done. The thresholds
    stand far from every healthy run in results/ (deviation above .7, rank above half of its first value).
    """
    found = {}
    if now["target_std"] < 0.3:
        found["collapse"] = ("collapse: the target features of different images hardly differ (standard deviation "
                             f"{now['target_std']:.2f}; healthy is .5 and more)")
    if now["rank"] < first["rank"] / 4:
        found["rank"] = f"collapse: the features have shrunk to {now['rank']:.1f} directions, from {first['rank']:.1f} before training"
    if progress > 0.3 and now.get("held_out_loss", 0) > now.get("mean_loss", 0):
        found["predictor"] = ("the predictor is no better than the mean target (loss on held-out images "
                              f"{now['held_out_loss']:.3f} against {now['mean_loss']:.3f})")
    if progress > 0.5 and now.get("knn", 1) < first.get("knn", 0) - 0.05:  # .05: two deviations of the difference with 512 queries
        found["knn"] = f"the features tell classes apart less well than before training (kNN {now['knn']:.1%} against {first['knn']:.1%})"
    return found


class Monitor:
    """Measures a run's model on the same held-out images each time, and says what looks wrong once for each kind of trouble."""

    def __init__(self, images, labelled=None, batch_size=128):
        self.images, self.labelled, self.batch_size = images, labelled, batch_size
        self.first, self.said = None, set()

    def __call__(self, model, progress):
        """What `measure` finds, and the sentences not said before: (dict of floats, list of str); progress from 0 to 1."""
        found = measure(model, self.images, self.labelled, self.batch_size)
        self.first = self.first or found
        new = {kind: text for kind, text in warnings(found, self.first, progress).items() if kind not in self.said}
        self.said |= set(new)
        return found, list(new.values())


# ---- what went wrong


def origin(model, forward, batches, generator):
    """In words, where the passes over `batches` first meet a number that is not finite: data, weights, a part's output, loss, gradient.

    `forward` is the model or what calls it; `generator` is as it was before those passes.
    """
    parts = {name.replace("_", " "): part for name, part in model.named_children() if isinstance(part, torch.nn.Module)}
    if getattr(model, "target_encoder", None) is model.context_encoder:
        parts.pop("target encoder", None)
    for name, part in parts.items():
        if not all(p.isfinite().all() for p in part.parameters()):
            return f"the weights of the {name}"
    found = []

    def watch(name):
        def look(part, inputs, output):  # an encoder asked for several layers gives a list
            if not all(tokens.isfinite().all() for tokens in (output if isinstance(output, list) else [output])):
                found.append(name)
        return look

    hooks = [part.register_forward_hook(watch(name)) for name, part in parts.items()]
    try:
        for batch in batches:
            if not batch[0].isfinite().all():
                return "the data, before any network saw it"
            model.zero_grad()
            loss = forward(*batch, generator=generator).loss
            if found:
                return f"the {found[0]}"
            if not loss.isfinite():
                return "the loss"
            loss.backward()
            for name, part in reversed(parts.items()):
                if not all(p.grad.isfinite().all() for p in part.parameters() if p.grad is not None):
                    return f"the gradient of the {name}"
    finally:
        model.zero_grad()
        for hook in hooks:
            hook.remove()
    return "the sum of several passes, each of which is finite by itself"
