"""Images in, batches out: `load` gives an ImageDataset, `batches` normalized images on the device.

Images stay in memory as uint8; a batch at a time is moved to the device, where all its images are
normalized, cropped and flipped at once. A small data set then needs no loader processes. Every
random number comes from one generator on the CPU: crops are the same on every device.
Notation: B images in a batch, n in a data set, C channels, H W pixels.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F

from config import UsageError, check_choice, check_range
from support import readers
from support.folder import LazyFolder, lazy_batches
from support.layout import image_files, read_folder

# Mean and standard deviation of each channel over the training images, pixels scaled to 0..1.
STATISTICS = {
    "shapes": ((0.498, 0.498, 0.498), (0.318, 0.318, 0.318)),
    "shapes3d": ((0.448,), (0.192,)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "stl10": ((0.4467, 0.4398, 0.4066), (0.2603, 0.2566, 0.2713)),
    "folder": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),  # ImageNet's: most are photographs
}


@dataclass
class ImageDataset:
    """Images and what is known about them.

    images: uint8 [n, C, H, W] (volumes [n, C, T, H, W]), or a LazyFolder, which decodes on demand;
    labels: int64 [n] or None; mean, std: one float a channel, pixels scaled to 0..1; folds:
    STL-10's ten lists of 1000 training images, int64, or None; paths: an image folder's files.
    """

    name: str
    images: "torch.Tensor | LazyFolder"
    labels: torch.Tensor | None
    class_names: list[str] | None
    mean: tuple
    std: tuple
    folds: list[torch.Tensor] | None = None
    paths: list[str] | None = None

    def __len__(self):
        return len(self.images)

    @property
    def shape(self):
        """(channels, axes) of the images; axes is 3 for volumes."""
        return self.images.shape[1], len(self.images.shape) - 2

    def subset(self, indices):
        """The images numbered `indices`, with their labels, without folds."""
        indices = torch.as_tensor(indices)
        lazy = isinstance(self.images, LazyFolder)
        images = self.images.subset(indices) if lazy else self.images[indices]
        labels = None if self.labels is None else self.labels[indices]
        paths = None if self.paths is None else [self.paths[i] for i in indices.tolist()]
        return replace(self, images=images, labels=labels, folds=None, paths=paths)

    def in_memory(self):
        """The same, with all images decoded."""
        if not isinstance(self.images, LazyFolder):
            return self
        return replace(self, images=self.images[torch.arange(len(self))])

    def describe(self):
        """What a checkpoint keeps of its data: enough to build the model, and to notice changes."""
        channels, axes = self.shape
        classes = 0 if self.labels is None else int(self.labels.max()) + 1
        return {"name": self.name, "images": len(self), "channels": channels, "axes": axes,
                "classes": classes, "fingerprint": readers.fingerprint(self.images, self.labels)}


def load(name, split="train", data_dir="data", image_size=None):
    """Load one split of a data set, by its name or by the path of an image folder or .npz file.

    data_dir holds or receives the downloads. image_size (pixels) is the side at which a folder's
    images are stored, 224 if None; other data sets keep their own size.
    Raises UsageError for an unknown name or split, and for data that is missing or damaged.
    """
    path = Path(name).expanduser()
    if name in readers.NAMED:
        if path.is_dir() and image_files(path):
            raise UsageError(f"--dataset {name} names a data set, but a folder of images here has "
                             f"the same name: write ./{name} to read it, or rename it")
        found = readers.NAMED[name](name, split, data_dir)
    elif path.is_dir():
        found = read_folder(path, split, image_size)
    elif path.suffix.lower() == ".npz":
        found = readers.read_npz(path, split)
    else:
        check_choice("--dataset", name, readers.NAMED, ", a folder of images, or a .npz file ("
                     f"{path.absolute()} is neither)")
    mean, std = STATISTICS.get(name, STATISTICS["folder"])  # unless the reader has measured them
    name = path.absolute().name.removesuffix(".npz")
    return ImageDataset(**{"name": name, "mean": mean, "std": std, **found})


# --- a batch, on its device -----------------------------------------------------------------------


def normalize(images, mean, std):
    """uint8 images [B, C, ...] -> float32, pixels scaled to 0..1, then (pixel - mean) / std."""
    shape = (1, -1) + (1,) * (images.ndim - 2)
    mean, std = torch.tensor([mean, std]).to(images.device, non_blocking=True)  # [C], [C]
    return (images.float() / 255 - mean.view(shape)) / std.view(shape)


def resize(images, size):
    """Float images [B, C, H, W] resized to `size`, one number or (H, W); shrinking averages."""
    size = (size,) * (images.ndim - 2) if isinstance(size, int) else tuple(size)
    if images.shape[2:] == size:
        return images
    if images.ndim == 5:  # torch averages images only
        return F.interpolate(images, size, mode="trilinear")  # [B, C, *size]
    return F.interpolate(images, size, mode="bilinear", antialias=True)  # [B, C, *size]


TRIES = 10  # boxes drawn for each crop; the first that fits into the image is taken


def crop_boxes(draws, scale, shape, aspect=(3 / 4, 4 / 3)):
    """Boxes of random resized crops: half sides and centers, each [B, 2] as (x, y).

    Coordinates are affine_grid's, in which the image reaches from -1 to 1: a half side is also the
    box's fraction of the image's side. The area is uniform in `scale`, width / height in pixels
    log-uniform in `aspect`, the position uniform. If none of ten boxes fits, the crop is the whole
    image. Source: torchvision's RandomResizedCrop.
    draws: uniform random numbers [B, 2 * TRIES + axes]; shape: (H, W) of the images.
    """
    axes = len(shape)
    area, ratio = draws[:, : 2 * TRIES].unflatten(1, (2, TRIES)).unbind(1)  # [B, TRIES] each
    area = scale[0] + (scale[1] - scale[0]) * area
    low, high = map(math.log, aspect)
    stretch = ((low + (high - low) * ratio) / 2).exp() * (shape[-2] / shape[-1]) ** 0.5
    side = area ** (1 / axes)
    half = torch.stack([side * stretch, side / stretch, side][:axes], dim=-1)  # [B, TRIES, axes]
    half = F.pad(half, (0, 0, 0, 1), value=1.0)  # [B, TRIES + 1, axes]; the last is the whole image
    first = (half <= 1).all(dim=-1).int().argmax(dim=1)  # [B]
    half = half[torch.arange(len(half), device=half.device), first]  # [B, axes]
    return half, (1 - half) * (2 * draws[:, 2 * TRIES :] - 1)


def random_resized_crop(images, size, scale, draws):
    """Cut a random box from each float image [B, C, H, W] and resize it to `size` (pixels).

    scale: the range of the box's area, a fraction of the image's; draws as in `crop_boxes`.
    """
    half, center = crop_boxes(draws, scale, images.shape[2:])  # [B, axes]
    theta = torch.cat([torch.diag_embed(half), center[..., None]], dim=-1)  # [B, axes, axes + 1]
    # grid_sample reads single points, so it must not shrink: sample at the image's own resolution.
    size = (size,) * half.shape[1] if isinstance(size, int) else tuple(size)
    fine = [max(pair) for pair in zip(size, images.shape[2:])]
    grid = F.affine_grid(theta, [*images.shape[:2], *fine], align_corners=False)  # [B, *fine, axes]
    # Reflection differs from border padding only outside the image, and also runs on Apple's GPUs.
    crops = F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)
    return resize(crops, size)  # [B, C, *size]


def batches(dataset, batch_size, image_size, device="cpu", order=None, generator=None,
            crop_scale=(1.0, 1.0), flip=False, workers=8, share=(0, 1)):
    """Iterate over normalized float32 images [B, C, H, W] on the device; the last batch may be
    smaller.

    order: image numbers, int64 (None: all, in order). image_size: pixels. generator: a CPU
    generator; without one, images are only resized. With one, each is cropped to an area in
    crop_scale, unless that is (1, 1), and with `flip` half are mirrored. workers: processes that
    decode a LazyFolder. share: (rank, processes); yields only this process's rows of each batch,
    which are the same as if one process made them all.
    """
    check_range("crop_scale", tuple(crop_scale), 1e-6, 1)
    order = torch.arange(len(dataset)) if order is None else order
    rank, world = share
    parts = order.split(batch_size)
    rows = [slice(rank * len(part) // world, (rank + 1) * len(part) // world) for part in parts]
    own = [part[row] for part, row in zip(parts, rows)]
    stored = (dataset.images[numbers] for numbers in own)  # uint8 [B, C, H, W]
    if isinstance(dataset.images, LazyFolder):
        stored = lazy_batches(dataset.images, own, workers)
    cropped = tuple(crop_scale) != (1.0, 1.0)
    # Apple's GPUs lack some of these kernels (torch 2.6), and copies to them must be waited for.
    place = "cpu" if torch.device(device).type == "mps" else device
    for images, part, row in zip(stored, parts, rows):
        images = normalize(images.to(place, non_blocking=True), dataset.mean, dataset.std)
        if generator is None or not (cropped or flip):
            yield resize(images, image_size).to(device)
            continue
        draws = torch.rand(len(part), 2 * TRIES + images.ndim - 1, generator=generator)[row]
        draws = draws.to(place, non_blocking=True)  # [B, 2 * TRIES + axes + 1]
        if cropped:
            images = random_resized_crop(images, image_size, crop_scale, draws[:, :-1])
        else:
            images = resize(images, image_size)
        if flip:
            mirrored = (draws[:, -1] < 0.5).view(-1, *(1,) * (images.ndim - 1))
            images = torch.where(mirrored, images.flip(-1), images)
        yield images.to(device)  # [B, C, *image_size]
