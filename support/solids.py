"""Synthetic volumes: ten kinds of solid, so that three dimensions need no download either.

Every volume has one solid at a random position, size and rotation, in one gray on another; which is
the brighter is a coin toss. Both are mottled, with noise on top. All kinds have about the same
volume. So no voxel and no mean of voxels tells the kind, only the surface does; and one slice
seldom does, as a rod, a ball and a cone can all be cut to a disc.
"""

import torch
import torch.nn.functional as F

SIZE = 16  # voxels
COUNT = {"train": 10_000, "test": 2_000}


def ball(x, y, z):
    return norm(x, y, z) - 1


def shell(x, y, z):
    return (norm(x, y, z) - 0.95).abs() - 0.18


def cube(x, y, z):
    return largest(x.abs(), y.abs(), z.abs()) - 0.81


def rod(x, y, z):
    return largest(norm(x, y) - 0.65, z.abs() - 1.6)


def plate(x, y, z):
    return largest(norm(x, y) - 1.35, z.abs() - 0.37)


def cone(x, y, z):
    return largest(0.92 * norm(x, y) + 0.4 * (z - 1.75), -z - 1.05)


def torus(x, y, z):
    return norm(norm(x, y) - 1.05, z) - 0.45


def cross(x, y, z):
    bars = [largest(along.abs() - 1.4, one.abs() - 0.4, other.abs() - 0.4)
            for along, one, other in ((x, y, z), (y, x, z), (z, x, y))]
    return -largest(*(-bar for bar in bars))


def half_ball(x, y, z):
    return largest(norm(x, y, z + 0.47) - 1.26, -z - 0.47)


def pair(x, y, z):
    return norm(x, y, z.abs() - 0.9) - 0.79


def norm(*parts):
    """Length of the vector of these parts."""
    return sum(part.square() for part in parts).sqrt()


def largest(*parts):
    """The largest of some tensors: the distance to what several solids have in common."""
    return torch.stack(parts).amax(0)


# Signed distance to the surface (or a little less), negative inside, in units of the ball's radius.
KINDS = [ball, shell, cube, rod, plate, cone, torus, cross, half_ball, pair]


def rotations(n, generator):
    """n uniformly random rotations [n, 3, 3]: the orthogonal part of Gaussian matrices, its
    reflections mirrored."""
    q, r = torch.linalg.qr(torch.randn(n, 3, 3, generator=generator))
    q = q * r.diagonal(dim1=1, dim2=2).sign()[:, None]  # without this some rotations are likelier
    return q * torch.linalg.det(q).view(-1, 1, 1)


def draw(labels, generator, size=SIZE):
    """Draw one volume for each label: int64 [n] -> uint8 [n, 1, size, size, size]."""
    n = len(labels)

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(n, *shape, generator=generator)

    line = (torch.arange(size) + 0.5) / size  # voxel centers, 0..1
    places = torch.stack(torch.meshgrid(line, line, line, indexing="ij")).flatten(1)  # [3, voxels]
    radius = uniform(0.36, 0.44, 1)
    places = rotations(n, generator) @ (places - uniform(0.44, 0.56, 3, 1)) / radius[..., None]
    distance = torch.empty(n, size**3)
    for kind, surface in enumerate(KINDS):
        chosen = labels == kind
        distance[chosen] = surface(*places[chosen].unbind(1))
    inside = (0.5 - distance * radius * size).clamp(0, 1)  # [n, voxels], with a soft edge
    inside = inside.view(n, 1, size, size, size)

    dark, contrast = uniform(0.15, 0.4, 1, 1, 1, 1), uniform(0.25, 0.45, 1, 1, 1, 1)
    bright = dark + contrast
    swapped = uniform(0, 1, 1, 1, 1, 1) < 0.5
    layers = []
    for gray in (torch.where(swapped, dark, bright), torch.where(swapped, bright, dark)):
        # Blotches of four voxels: no part of the volume foretells them, so there is nothing in them
        # to predict.
        blotches = torch.randn(n, 1, *[size // 4] * 3, generator=generator)
        blotches = F.interpolate(blotches, size=[size] * 3, mode="trilinear")
        layers.append(gray * (1 + uniform(0.05, 0.15, 1, 1, 1, 1) * blotches))
    background, solid = layers  # [n, 1, size, size, size] each
    noise = 0.04 * torch.randn(n, 1, size, size, size, generator=generator)
    volume = background + (solid - background) * inside + noise
    return (volume.clamp(0, 1) * 255).to(torch.uint8)


def make(split, chunk=1000):
    """A split: uint8 [n, 1, 16, 16, 16], labels int64 [n], names of the kinds; always the same."""
    volumes, labels = [], []
    for number in range(COUNT[split] // chunk):  # a seed for each chunk: the splits share no volume
        seed = list(COUNT).index(split) * 1_000_000 + number
        labels.append(torch.arange(chunk) % len(KINDS))  # classes in turn; training shuffles
        volumes.append(draw(labels[-1], torch.Generator().manual_seed(seed)))
    names = [kind.__name__.replace("_", " ") for kind in KINDS]
    return torch.cat(volumes), torch.cat(labels), names
