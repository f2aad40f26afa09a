"""Synthetic images: ten kinds of shape, to run the whole method in minutes without a download.

Every image has one shape at a random position, size and angle. The colors of shape and background
come from the same distribution; both are mottled, with noise on top. All kinds have about the same
area. So the mean image of every kind is the same: no pixel, no color and no amount of color tells
the kind, only the outline does.
"""

import math

import torch
import torch.nn.functional as F

SIZE = 24  # pixels
COUNT = {"train": 40_000, "test": 5_000}


def disc(u, v):
    return torch.hypot(u, v) - 1


def ring(u, v):
    return (torch.hypot(u, v) - 0.85).abs() - 0.29


def square(u, v):
    return torch.maximum(u.abs(), v.abs()) - 0.89


def triangle(u, v):
    return torch.maximum(-v, math.sqrt(0.75) * u.abs() + v / 2) - 0.74


def star(u, v):
    """Five points, outer radius 1.5, inner .64: the distance to one edge, the plane being folded
    into one tenth."""
    sector = math.pi / 5
    angle = ((torch.atan2(v, u) % (2 * sector)) - sector).abs()  # 0 at a valley, most at a point
    radius = torch.hypot(u, v)
    valley, point = (0.64, 0.0), (1.5 * math.cos(sector), 1.5 * math.sin(sector))
    along = (point[0] - valley[0], point[1] - valley[1])
    across = (radius * torch.cos(angle) * along[1] - radius * torch.sin(angle) * along[0]
              - valley[0] * along[1])
    return across / math.hypot(*along)


def cross(u, v):
    u, v = u.abs(), v.abs()
    return torch.minimum(torch.maximum(u - 1.25, v - 0.37), torch.maximum(v - 1.25, u - 0.37))


def half_disc(u, v):
    return torch.maximum(torch.hypot(u + 0.6, v) - 1.4, -u - 0.6)


def crescent(u, v):
    return torch.maximum(torch.hypot(u, v) - 1.3, 0.95 - torch.hypot(u - 0.75, v))


def bar(u, v):
    return torch.maximum(u.abs() - 1.6, v.abs() - 0.49)


def pair(u, v):
    return torch.hypot(u.abs() - 0.85, v) - 0.71


# Signed distance to the outline, negative inside, in units of the disc's radius.
KINDS = [disc, ring, square, triangle, star, cross, half_disc, crescent, bar, pair]


def to_rgb(hue, saturation, value):
    """HSV to RGB, all in 0..1: three tensors [n] -> [n, 3]."""
    k = (torch.tensor([5.0, 3.0, 1.0]) + 6 * hue[:, None]) % 6  # [n, 3]
    return value[:, None] * (1 - saturation[:, None] * torch.minimum(k, 4 - k).clamp(0, 1))


def draw(labels, generator, size=SIZE):
    """Draw one image for each label: int64 [n] -> uint8 [n, 3, size, size]."""
    n = len(labels)

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(n, *shape, generator=generator)

    line = (torch.arange(size) + 0.5) / size  # pixel centers, 0..1
    y, x = torch.meshgrid(line, line, indexing="ij")  # [size, size]
    radius = uniform(0.38, 0.46, 1, 1)
    angle = uniform(0, 2 * math.pi, 1, 1)
    dx, dy = x - uniform(0.42, 0.58, 1, 1), y - uniform(0.42, 0.58, 1, 1)  # [n, size, size]
    u = (angle.cos() * dx + angle.sin() * dy) / radius
    v = (angle.cos() * dy - angle.sin() * dx) / radius
    distance = torch.empty(n, size, size)
    for kind, outline in enumerate(KINDS):
        chosen = labels == kind
        distance[chosen] = outline(u[chosen], v[chosen])
    inside = (0.5 - distance * radius * size).clamp(0, 1)[:, None]  # [n, 1, size, size], soft edge

    hue = uniform(0, 1)
    layers = []  # background and shape: hues at least a quarter turn apart
    for layer_hue in (hue, hue + uniform(0.25, 0.75)):
        color = to_rgb(layer_hue % 1, uniform(0.5, 1.0), uniform(0.45, 0.95))[..., None, None]
        # Blotches of four pixels: no part of the image foretells them, so there is nothing in them
        # to predict.
        blotches = torch.randn(n, 1, size // 4, size // 4, generator=generator)
        blotches = F.interpolate(blotches, size=size, mode="bilinear")
        layers.append(color * (1 + uniform(0.05, 0.2, 1, 1, 1) * blotches))  # [n, 3, size, size]
    background, shape = layers
    noise = 0.04 * torch.randn(n, 3, size, size, generator=generator)
    image = background + (shape - background) * inside + noise
    return (image.clamp(0, 1) * 255).to(torch.uint8)


def make(split, chunk=1000):
    """A split: uint8 [n, 3, 24, 24], labels int64 [n], names of the kinds; always the same."""
    images, labels = [], []
    for number in range(COUNT[split] // chunk):  # a seed for each chunk: the splits share no image
        seed = list(COUNT).index(split) * 1_000_000 + number
        labels.append(torch.arange(chunk) % len(KINDS))  # classes in turn; training shuffles
        images.append(draw(labels[-1], torch.Generator().manual_seed(seed)))
    names = [kind.__name__.replace("_", " ") for kind in KINDS]
    return torch.cat(images), torch.cat(labels), names
