"""Synthetic images: ten kinds of shape, to run the whole method in minutes without a download.

Every image has one shape at a random place, size and angle, filled with confetti: dots of random
color, whose mean is the color of the ground. No dot foretells another, so there is nothing in them
to predict, and no pixel, no color and no mean tells the kind: only where the confetti ends does.
All kinds have about the same area. An exact mask of the shape comes with each image.
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


def outline(labels, uniform, size):
    """How much of each pixel the shape covers, 0 to 1: labels int64 [n] -> [n, size, size].

    uniform(low, high, *shape): random numbers [n, *shape].
    """
    line = (torch.arange(size) + 0.5) / size  # pixel centers, 0..1
    y, x = torch.meshgrid(line, line, indexing="ij")  # [size, size]
    radius = uniform(0.36, 0.46, 1, 1)  # of a disc of the same area; 1 is the image's side
    angle = uniform(0, 2 * math.pi, 1, 1)
    dx, dy = x - uniform(0.34, 0.66, 1, 1), y - uniform(0.34, 0.66, 1, 1)  # [n, size, size]
    u = (angle.cos() * dx + angle.sin() * dy) / radius
    v = (angle.cos() * dy - angle.sin() * dx) / radius
    distance = torch.empty(len(labels), size, size)
    for kind, signed_distance in enumerate(KINDS):
        chosen = labels == kind
        distance[chosen] = signed_distance(u[chosen], v[chosen])
    return (0.5 - distance * radius * size).clamp(0, 1)  # a soft edge, one pixel wide


def draw(labels, generator, size=SIZE, detail=1.0):
    """Draw one image for each label: int64 [n] -> uint8 [n, 3, size, size], bool [n, size, size].

    The second is True where the shape covers at least half of a pixel. detail: the share of dots
    that are drawn anew for each image and cannot be predicted; the others are the same in all
    images, as if every shape were a window on one wallpaper.
    """
    n = len(labels)

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(n, *shape, generator=generator)

    inside = outline(labels, uniform, size)[:, None]  # [n, 1, size, size]
    blotches = torch.randn(n, 3, size // 4, size // 4, generator=generator)
    blotches = F.interpolate(blotches, size=size, mode="bilinear")  # [n, 3, size, size]
    ground = 0.5 + 0.06 * blotches + 0.04 * torch.randn(n, 3, size, size, generator=generator)
    confetti = torch.randn(n, 3, size, size, generator=generator).sign()
    if detail < 1:
        anew = torch.rand(n, 1, size, size, generator=generator) < detail
        wallpaper = torch.randn(3, size, size, generator=torch.Generator().manual_seed(0)).sign()
        confetti = torch.where(anew, confetti, wallpaper)
    image = ground + 0.48 * inside * confetti
    return (image.clamp(0, 1) * 255).to(torch.uint8), inside[:, 0] >= 0.5


def make(split, chunk=1000, *, detail=1.0):
    """A split, always the same: uint8 [n, 3, 24, 24], labels int64 [n], names of the kinds, masks.

    The masks, bool [n, 24, 24], are True on the shape. detail: as in `draw`.
    """
    images, labels, masks = [], [], []
    for number in range(COUNT[split] // chunk):  # a seed for each chunk: the splits share no image
        seed = list(COUNT).index(split) * 1_000_000 + number
        labels.append(torch.arange(chunk) % len(KINDS))  # classes in turn; training shuffles
        drawn, mask = draw(labels[-1], torch.Generator().manual_seed(seed), detail=detail)
        images.append(drawn)
        masks.append(mask)
    names = [kind.__name__.replace("_", " ") for kind in KINDS]
    return torch.cat(images), torch.cat(labels), names, torch.cat(masks)
