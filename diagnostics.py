"""Is it learning, or has it collapsed? The measures that a JEPA's loss does not give.

The loss compares predictions with targets that move: it falls when both collapse to one answer, and
rises when the targets grow richer. So a run measures its features on images held out of training.
Notation as in models.py; n held-out images.
"""

import math

import torch
import torch.nn.functional as F

import data

MEASURES = ("knn", "target_std", "rank", "cosine", "mean_cosine")


# --- measures of features -------------------------------------------------------------------------


def deviation(tokens):
    """How much features differ between images *at the same place*, a float from 0 to about 1.

    tokens: layer-normed [n, N, D]. The standard deviation over the images, averaged over places and
    dimensions: near 0, the encoder gives all images the same answer, and has collapsed.
    """
    return tokens.std(dim=0).mean().item()


def rankme(features):
    """Effective rank of features [n, D], from 1 to min(n, D) (RankMe, Garrido et al. 2023).

    The exponential of the entropy of the singular values, each divided by their sum.
    """
    singular = torch.linalg.svdvals(features.float().cpu())  # [min(n, D)]
    share = singular / singular.sum() + 1e-7
    return math.exp(-(share * share.log()).sum().item())


@torch.no_grad()
def pool(encoder, images, batch_size=512):
    """Average of an encoder's patch tokens: images [n, C, H, W] -> [n, D] (appendix A.2)."""
    return torch.cat([encoder(part).float().mean(dim=1) for part in images.split(batch_size)])


@torch.no_grad()
def knn(train_x, train_y, test_x, test_y, k=20, temperature=0.07):
    """Accuracy, a fraction, of a vote of the k nearest training features by cosine.

    Each vote weighs exp(cosine / temperature). There is nothing to tune: k and temperature are
    those of DINO and Wu et al. 2018. Features float [n, D] and [m, D], labels int64 [n] and [m].
    """
    train_x, correct = F.normalize(train_x.float(), dim=1), 0
    classes = int(max(train_y.max(), test_y.max())) + 1
    for x, y in zip(test_x.split(1024), test_y.split(1024)):  # m x n cosines would not fit
        with torch.autocast(x.device.type, enabled=False):  # in bf16 many neighbors would tie
            cosine = F.normalize(x.float(), dim=1) @ train_x.T  # [B, n]
            cosine, nearest = cosine.topk(min(k, len(train_x)), dim=1)  # [B, k]
        votes = torch.zeros(len(x), classes, device=x.device)  # [B, classes]
        votes.scatter_add_(1, train_y[nearest], (cosine / temperature).exp())
        correct += (votes.argmax(dim=1) == y).sum().item()
    return correct / len(test_y)


# --- all of them on a model -----------------------------------------------------------------------


@torch.no_grad()
def measure(model, masking, images, labeled=None, batch_size=128):
    """Measure a model on normalized images [n, C, H, W] not trained on: a dict of floats.

    target_std, rank: of the target encoder's features. cosine: between predictions and targets,
    next to mean_cosine, what the *mean target of that place* would reach without looking at the
    image; both are left out if masking is None. knn, if labeled is (bank images, their labels,
    query images, their labels). The masks are the same at every call. The model's mode is restored.
    """
    was_training, generator = model.training, torch.Generator().manual_seed(0)
    model.eval()
    tokens, predictions, targets, places = [], [], [], []
    for part in images.split(batch_size):
        tokens.append(model.target_encoder(part).float())  # [B, N, D]
        if masking:
            masks = masking(len(part), generator).to(part.device)
            output, real = model(part, masks), masks.targets_valid
            predictions.append(output.predictions[real].float())  # [patches, D]
            targets.append(output.targets[real].float())  # [patches, D]
            places.append(masks.targets[real])  # [patches]
    tokens = torch.cat(tokens)  # [n, N, D]
    found = {"target_std": deviation(F.layer_norm(tokens, tokens.shape[-1:])),
             "rank": rankme(tokens.mean(dim=1))}
    if masking:
        predictions, targets, places = map(torch.cat, (predictions, targets, places))
        total = torch.zeros(masking.N, targets.shape[1], device=targets.device)  # [N, D]
        total.index_add_(0, places, targets)  # its direction is that of the mean target of a place
        found["cosine"] = F.cosine_similarity(predictions, targets, dim=-1).mean().item()
        found["mean_cosine"] = F.cosine_similarity(total[places], targets, dim=-1).mean().item()
    if labeled is not None:
        bank, bank_labels, queries, labels = labeled
        bank, queries = (pool(model.target_encoder, part, batch_size) for part in (bank, queries))
        found["knn"] = knn(bank, bank_labels, queries, labels)
    model.train(was_training)
    return found


def warnings(now, first, progress):
    """What looks wrong, in plain words: a dict of kind -> sentence, empty if all is well.

    now, first: what `measure` found now and before training; progress: the fraction of the run
    that is done. Every healthy run in results/ stays far from these thresholds.
    """
    found = {}
    if now["target_std"] < 0.3:
        found["collapse"] = (
            "collapse: the target features of different images hardly differ (standard deviation "
            f"{now['target_std']:.2f}; healthy is .5 or more)")
    if now["rank"] < first["rank"] / 4:
        found["rank"] = (f"collapse: the features have shrunk to {now['rank']:.1f} directions, "
                         f"from {first['rank']:.1f} before training")
    if progress > 0.3 and now.get("cosine", 1) < now.get("mean_cosine", -1):
        found["predictor"] = (
            "the predictor is no better than the mean target of each place (cosine "
            f"{now['cosine']:.3f}, the mean's {now['mean_cosine']:.3f})")
    if progress > 0.5 and now.get("knn", 1) < first.get("knn", 0) - 0.05:  # 2 standard deviations
        found["knn"] = ("the features tell classes apart less well than before training (kNN "
                        f"{now['knn']:.1%}, then {first['knn']:.1%})")
    return found


class Monitor:
    """Measures a run's model on the same held-out images, and reports each kind of trouble once.

    dataset: an ImageDataset; kept, held: the numbers of the images trained on and held out. kNN
    votes among 1,000 of the kept images; for data trained on without labels (STL-10's), within
    `labeled`, an ImageDataset with labels.
    """

    def __init__(self, dataset, kept, held, image_size, labeled=None):
        self.held = dataset.subset(held).in_memory()
        self.image_size, self.bank, self.queries = image_size, None, None
        if dataset.labels is not None:
            self.bank, self.queries = dataset.subset(kept[:1000]).in_memory(), self.held
        elif labeled is not None:
            order = torch.randperm(len(labeled), generator=torch.Generator().manual_seed(0))
            self.bank, self.queries = (labeled.subset(order[:1000]).in_memory(),
                                       labeled.subset(order[1000:1500]).in_memory())
        self.before, self.reported = None, set()

    def __call__(self, model, masking, progress, device):
        """What `measure` finds, a dict of floats, and the warnings not given before, strings."""

        def images(dataset):
            return torch.cat(list(data.batches(dataset, 128, self.image_size, device)))

        labeled = None
        if self.bank is not None:
            labeled = (images(self.bank), self.bank.labels.to(device),
                        images(self.queries), self.queries.labels.to(device))
        found = measure(model, masking, images(self.held), labeled)
        self.before = self.before or found
        new = warnings(found, self.before, progress)
        new = {kind: text for kind, text in new.items() if kind not in self.reported}
        self.reported |= new.keys()
        return found, list(new.values())
