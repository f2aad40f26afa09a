"""Heads that are trained step by step: an attentive probe, and fine-tuning of the whole encoder.

Learning rates are chosen on a tenth of the training images; test images are predicted once.
Notation: n training and m test images, B images in a batch, N patches, D features, K classes.
"""

import copy
import math

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import data
from evaluate import held_out
from train import cosine


class AttentiveHead(nn.Module):
    """One learned query attends to the patch tokens: [B, N, D] -> logits [B, K]."""

    def __init__(self, width, classes, heads=4):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.query = nn.Parameter(torch.randn(width) * width**-0.5)
        self.kv = nn.Linear(width, 2 * width)
        self.classify = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, classes))

    def forward(self, tokens):
        kv = self.kv(self.norm(tokens)).unflatten(-1, (2, self.heads, -1))  # [B, N, 2, nh, D/nh]
        k, v = kv.permute(2, 0, 3, 1, 4)  # each [B, nh, N, D/nh]
        q = self.query.view(self.heads, 1, -1).expand(len(tokens), -1, -1, -1)  # [B, nh, 1, D/nh]
        return self.classify(F.scaled_dot_product_attention(q, k, v).flatten(1))  # [B, K]


class Classifier(nn.Module):
    """An encoder, a linear head on its mean token: images [B, C, H, W] -> logits [B, K]."""

    def __init__(self, encoder, classes):
        super().__init__()
        self.encoder, self.norm = encoder, nn.BatchNorm1d(encoder.width, affine=False)
        self.head = nn.Linear(encoder.width, classes)
        nn.init.zeros_(self.head.weight)  # the first steps then move the head, not yet the features

    def forward(self, images):
        return self.head(self.norm(self.encoder(images).mean(dim=1)))  # [B, K]


def layer_groups(classifier, decay, weight_decay):
    """A Classifier's parameters for AdamW, each with its `scale` of the learning rate.

    The scale is 1 for the head and, for each layer below, `decay` times that of the one above
    (appendix A.2). Biases and norms are not decayed.
    """
    depth, groups = len(classifier.encoder.blocks), []
    for name, parameter in classifier.named_parameters():
        layer = 0 if name.startswith("encoder.patch_embed") else depth + 1
        if name.startswith("encoder.blocks."):
            layer = int(name.split(".")[2]) + 1
        groups.append({"params": [parameter], "scale": decay ** (depth + 1 - layer),
                       "weight_decay": weight_decay * (parameter.ndim > 1)})
    return groups


def train_head(model, groups, batches, labels, epochs, lr, smoothing, seed, description=""):
    """Train a classifier in place: AdamW, a tenth of the steps warming up, then half a cosine.

    groups: parameters with their `scale` of the rate; batches(order, size, generator): iterates
    over the inputs numbered `order`, `size` at a time; labels int64 [n], on the model's device;
    smoothing: of the labels in the cross-entropy. Returns the model in eval mode.
    """
    generator, size = torch.Generator().manual_seed(seed), 128
    n = len(labels) - (len(labels) % size == 1)  # batch norm cannot normalize a batch of one image
    optimizer, total, step = torch.optim.AdamW(groups, lr=lr), epochs * math.ceil(n / size), 0
    model.train()
    for _ in tqdm(range(epochs), description, leave=False, disable=None):
        order = torch.randperm(len(labels), generator=generator)[:n]
        for inputs, part in zip(batches(order, size, generator), order.split(size)):
            warmup = total / 10
            share = (step / warmup if step < warmup
                     else cosine(1, 0, (step - warmup) / (total - warmup)))
            for group in optimizer.param_groups:
                group["lr"] = lr * share * group["scale"]
            optimizer.zero_grad()
            loss = F.cross_entropy(model(inputs), labels[part],
                                   label_smoothing=smoothing)
            loss.backward()
            optimizer.step()
            step += 1
    return model.eval()


@torch.no_grad()
def predict(model, inputs):
    """Predicted classes, int64 [m] on the CPU, for an iterable of input batches."""
    return torch.cat([model(part).argmax(dim=1).cpu() for part in inputs])


def choose_rate(fit, predict, train_y, test_y, seed, rates):
    """Choose a learning rate on a tenth of the training images, then train on all of them.

    fit(image numbers, rate) gives a model, predict(model, image numbers or None) the classes of
    training images, or of the test images. Returns a dict: accuracy, held_out_accuracy, rate,
    predictions (int64 [m]), model.
    """
    train_y, test_y = train_y.cpu(), test_y.cpu()
    held = held_out(train_y, seed)
    kept, held = (~held).nonzero()[:, 0], held.nonzero()[:, 0]
    with torch.random.fork_rng():
        held_accuracy, rate = max(
            ((predict(fit(kept, rate), held) == train_y[held]).double().mean().item(), rate)
            for rate in rates)
        model = fit(torch.arange(len(train_y)), rate)
    predictions = predict(model, None)
    return {"accuracy": (predictions == test_y).double().mean().item(),
            "held_out_accuracy": held_accuracy, "rate": rate, "predictions": predictions,
            "model": model}


def attentive_probe(train_tokens, train_y, test_tokens, test_y, epochs=20, seed=0,
                    rates=(3e-4, 1e-3, 3e-3)):
    """An AttentiveHead on frozen patch tokens [n, N, D] and [m, N, D]; returns as choose_rate.

    The tokens may be half precision; labels and tokens are on one device.
    """
    def fit(numbers, rate):
        torch.manual_seed(seed)
        head = AttentiveHead(train_tokens.shape[-1], int(train_y.max()) + 1).to(train_y.device)
        groups = [{"params": list(head.parameters()), "scale": 1.0, "weight_decay": 0.01}]

        def batches(order, size, generator):
            return (train_tokens[numbers[part]].float() for part in order.split(size))

        return train_head(head, groups, batches, train_y[numbers], epochs, rate, 0.0, seed,
                          f"attentive probe, rate {rate:g}")

    def classes(head, numbers):
        tokens = test_tokens if numbers is None else train_tokens[numbers]
        return predict(head, (part.float() for part in tokens.split(512)))

    return choose_rate(fit, classes, train_y, test_y, seed, rates)


def fine_tune(encoder, train_set, test_set, image_size, device="cpu", epochs=20, layer_decay=0.75,
              smoothing=0.1, crop_scale=(0.5, 1.0), flip=True, seed=0, rates=(5e-4, 2e-3, 8e-3)):
    """Train a copy of the encoder with a linear head on labeled ImageDatasets (appendix A.2).

    layer_decay: learning rate of a layer over that of the one above; smoothing: of the labels.
    Returns as choose_rate; "model" is the Classifier in eval mode. The given encoder is unchanged.
    """
    labels = train_set.labels.to(device)

    def fit(numbers, rate):
        torch.manual_seed(seed)
        copied = copy.deepcopy(encoder).requires_grad_(True)
        model = Classifier(copied, int(labels.max()) + 1).to(device)
        part = train_set.subset(numbers)

        def batches(order, size, generator):
            return data.batches(part, size, image_size, device, order, generator, crop_scale, flip)

        return train_head(model, layer_groups(model, layer_decay, 0.05), batches, labels[numbers],
                          epochs, rate, smoothing, seed, f"fine-tuning, rate {rate:g}")

    def classes(model, numbers):
        dataset = test_set if numbers is None else train_set.subset(numbers)
        return predict(model, data.batches(dataset, 512, image_size, device))

    return choose_rate(fit, classes, labels, test_set.labels, seed, rates)
