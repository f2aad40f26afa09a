"""I-JEPA as a scikit-learn transformer: `fit` pretrains on images in a NumPy array.

    features = IJEPATransformer(image_size=32).fit(X).transform(X)

X: images [n, 8, 8] or their rows [n, 64] -> float32 [n, D], the target encoder's pooled features.
Model, masks and optimizer step are those of train.py; added here are arrays of any layout and
scikit-learn's checks, seeds and pickles. No files are written.
"""

import copy
import dataclasses
import itertools
import math
import re
import warnings

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data
from tqdm import tqdm

import config as settings
import data
import diagnostics
import train
from config import UsageError, check_choice, parse_size
from masking import MultiBlockMasking
from models import IJEPA, Encoder, Predictor

LAYOUTS = ("NHW", "NCHW", "NHWC", "NTHW", "NCTHW", "NTHWC")  # N images, C channels, T H W sides
# Parameters that change the preset.
OVERRIDES = ("encoder", "predictor", "patch_size", "epochs", "max_steps", "batch_size", "lr")
# Fields of Config that `settings` may not hold: parameters already, or about files and runs.
RESERVED = (*OVERRIDES, "image_size", "seed", "device", "dataset", "split", "data_dir", "held_out",
            "measurements", "workers", "compile", "checkpoint_minutes", "log_to", "out")


# --- arrays ---------------------------------------------------------------------------------------


def find_layout(shape, layout=None):
    """The layout of images of a shape (without n): the one asked for, or the only one possible.

    Two axes are H W. Of three or four, the first or the last is C if only one of these two has
    length 1 or 3. Raises UsageError if that leaves more than one layout, or none.
    """
    if layout is not None:
        check_choice("layout", layout, LAYOUTS)
    possible = [name for name in LAYOUTS if len(name) == 1 + len(shape)]
    if not possible or layout not in (None, *possible):
        raise UsageError(f"images of shape {shape} cannot be {layout or ' or '.join(LAYOUTS)}: "
                         "a layout has a letter for each axis, N for the images")
    if layout or len(possible) == 1:
        return layout or possible[0]
    first, last = shape[0] in (1, 3), shape[-1] in (1, 3)
    if first == last:
        raise UsageError(f"images of shape {shape} could be {' or '.join(possible)}: "
                         f"say which, such as layout='{possible[0]}'")
    return next(name for name in possible if name[1 if first else -1] == "C")


def statistics(images):
    """Mean and standard deviation of each channel of [n, C, ...], two float64 [C].

    The deviation of a constant channel is 1.
    """
    axes = (0, *range(2, images.ndim))
    mean = images.mean(axes, dtype=np.float64)  # [C]
    center = mean.reshape(-1, *(1,) * (images.ndim - 2))  # [C, 1, 1]
    # A thousand at a time: a float64 copy of all images would take eight times their memory.
    squares = sum(np.square(images[i : i + 1000] - center).sum(axes)
                  for i in range(0, len(images), 1000))  # [C]
    std = np.sqrt(squares * len(mean) / images.size)
    rounding = 1e-6 * np.abs(mean)  # what float32 makes of a constant
    return mean, np.where(std > rounding, std, 1.0)


# --- training -------------------------------------------------------------------------------------


def build(config, sides, channels):
    """As train.build, for images whose sides may differ: the model and the mask sampler."""
    torch.manual_seed(config.seed)
    encoder = Encoder(*parse_size(config.encoder), sides, config.patch_size, channels)
    predictor = Predictor(encoder.width, encoder.grid, *parse_size(config.predictor, "predictor"))
    min_keep = max(1, min(4, math.prod(encoder.grid) // 4))  # a small grid has no 4 to spare
    masking = MultiBlockMasking(encoder.grid, config.num_targets, config.target_scale,
                                config.target_aspect, config.context_scale, config.context_size,
                                min_keep, config.merge_targets)
    return IJEPA(encoder, predictor, config.loss), masking


def train_steps(config, model, masking, optimizer, dataset, device, steps, start, bar=False):
    """Train for `steps` optimizer steps on a dataset in memory -> their losses, floats.

    The schedules span these steps; the data's order continues from step `start`. Raises UsageError
    if a loss is NaN or infinite.
    """
    generator = torch.Generator().manual_seed(config.seed + start)  # crops and masks
    stream = train.batches_of(config, dataset, masking, torch.arange(len(dataset)), device,
                              generator, start * config.accumulation)
    half = train.pick_precision(config, device) == torch.float16
    scaler, losses = torch.amp.GradScaler(device.type, enabled=half), []
    with tqdm(range(steps), "I-JEPA", unit="step", disable=not bar) as progress:
        for step in progress:
            batches = list(itertools.islice(stream, config.accumulation))
            values = train.train_step(config, model, optimizer, scaler, batches, step, steps)
            losses.append(values["loss"])
    losses = [float(loss) for loss in losses]  # only now: until here nothing waited for the device
    for step, loss in enumerate(losses, start + 1):
        if not math.isfinite(loss):
            raise UsageError(f"the loss is {loss} at step {step}; lower lr ({config.lr:g}), or set "
                             "clip_grad in settings")
    return losses


def as_parameters(function, *args, **kwargs):
    """Call the function; in its UsageError, flags such as --patch-size become parameter names."""
    try:
        return function(*args, **kwargs)
    except UsageError as error:
        text = re.sub(r"--(\w[\w-]+)", lambda flag: flag[1].replace("-", "_"), str(error))
        raise UsageError(text) from None


class IJEPATransformer(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    """Pretrains I-JEPA on unlabeled images and turns images into its target encoder's features.

    X: an array of images, uint8, float or any other number, in one of LAYOUTS, or their flattened
    rows [n, p]. Each channel is standardized by the mean and deviation of the images given to
    `fit`: only the numbers count, not their dtype, and later images must have the same units. `y`
    is ignored.

    preset, and what changes it (None takes the preset's value): encoder, predictor, patch_size
    (pixels), epochs (0: an untrained encoder), max_steps (0 is no limit), batch_size (n at most),
    lr; `python train.py --help` explains them.
    image_size: side in pixels to which images are resized, None leaves them as they are. Enlarge
    tiny images: the position of a patch of a few numbers drowns its content.
    image_shape: of one flattened row, such as (28, 28, 3), one side may be -1; None: square images.
    layout: one of LAYOUTS; None asks `find_layout`, which rejects ambiguous shapes.
    settings: a dict of other fields of Config; context_size is 0 by default, not the preset's.
    random_state: int, RandomState or None. device: auto, cpu, cuda or mps. verbose: 1 shows a bar.

    After fit: model_ (an IJEPA on the CPU), config_, mean_ and std_ [C], range_ (the smallest and
    the largest value), layout_, image_shape_ (C, (T,) H, W), loss_curve_ (one loss per step),
    n_features_in_ (values of one image, C*H*W).

    Raises UsageError, a ValueError, if parameters or shapes do not fit together, and for masked
    arrays that hide values. Warns if later images seem to have other units.
    """

    def __init__(self, preset="small", *, encoder=None, predictor=None, patch_size=None,
                 epochs=None, max_steps=None, batch_size=None, lr=None, settings=None,
                 image_size=None, image_shape=None, layout=None, random_state=None, device="auto",
                 verbose=0):
        self.preset = preset
        self.encoder = encoder
        self.predictor = predictor
        self.patch_size = patch_size
        self.epochs = epochs
        self.max_steps = max_steps
        self.batch_size = batch_size
        self.lr = lr
        self.settings = settings
        self.image_size = image_size
        self.image_shape = image_shape
        self.layout = layout
        self.random_state = random_state
        self.device = device
        self.verbose = verbose

    # --- what a user calls

    def fit(self, X, y=None):
        """Pretrain from scratch on the images X; returns self."""
        images = self._images(X, reset=True)  # [n, C, (T,) H, W]
        self.mean_, self.std_ = statistics(images)  # [C], [C]
        self.range_ = float(images.min()), float(images.max())
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        return self._train(images, seed, resume=False)

    def partial_fit(self, X, y=None):
        """Train on for `epochs` (or max_steps) more on the images X; the first call is `fit`.

        Weights, Adam's averages, seed and standardization are kept. The schedules start again (a
        warm restart, Loshchilov & Hutter 2017). Parameters that have changed since then are used.
        """
        if not hasattr(self, "model_"):
            return self.fit(X)
        return self._train(self._images(X, reset=False), self.config_.seed, resume=True)

    @torch.no_grad()
    def transform(self, X):
        """Features of the images X, float32 [n, D]: the same as evaluate.features."""
        check_is_fitted(self, "model_")
        dataset, device = self._dataset(self._images(X, reset=False)), self._device()
        encoder = copy.deepcopy(self.model_.target_encoder).to(device)  # model_ stays on the CPU
        parts = [diagnostics.pool(encoder, part).cpu()
                 for part in data.batches(dataset, 512, encoder.image_size, device)]
        return torch.cat(parts).numpy()  # [n, D]

    # --- what they consist of

    def _images(self, X, reset):
        """X in any layout as uint8 or float32 [n, C, (T,) H, W], checked by scikit-learn.

        With reset its shape is stored, otherwise compared with the stored one.
        """
        if np.ma.is_masked(X):
            raise UsageError(f"X is a masked array that hides {np.ma.count_masked(X):,} values, "
                             "expected an array without a mask: fill them, such as by X.filled(0), "
                             "or leave their images out")
        shape = tuple(getattr(X, "shape", None) or np.asarray(X).shape)[1:]
        if len(shape) > 1:  # scikit-learn's checks count the columns of a table
            X = np.asarray(X)
            X = X.reshape(len(X), math.prod(shape))
        X = validate_data(self, X, reset=reset, dtype=(np.float32, np.uint8),
                          ensure_min_features=2 if reset else 1)  # [n, p]
        layout = self.layout
        if len(shape) == 1:
            shape, layout = self._row_shape(X, reset)
        layout = find_layout(shape, layout)
        images = X.reshape(len(X), *shape)
        images = np.moveaxis(images, layout.index("C"), 1) if "C" in layout else images[:, None]
        if reset:
            self.layout_, self.image_shape_ = layout, images.shape[1:]
        elif images.shape[1:] != self.image_shape_:
            raise UsageError(f"images of {images.shape[1:]}, channels first, but fit was given "
                             f"{self.image_shape_} (layout {layout})")
        else:
            self._warn_of_units(images)
        return np.require(images, requirements=("C", "W"))  # torch shares writable memory only

    def _row_shape(self, X, reset):
        """What one row of X [n, p] is: the shape of an image, and its layout or None."""
        if not reset:
            shape = list(self.image_shape_[1:])
            if "C" in self.layout_:
                shape.insert(self.layout_.index("C") - 1, self.image_shape_[0])
            return tuple(shape), self.layout_
        p, shape = X.shape[1], self.image_shape
        if shape is None:
            shape = (math.isqrt(p),) * 2
            if math.prod(shape) != p:
                raise UsageError(f"a row of {p} values is no square image: give its shape, such as "
                                 "image_shape=(28, 28, 3)")
        try:
            return X[0].reshape(shape).shape, self.layout
        except (TypeError, ValueError):
            raise UsageError(f"image_shape {shape} is not the shape of a row of {p} values"
                             ) from None

    def _warn_of_units(self, images):
        """Warn if the values span a tenth of what `fit` saw or less, or ten times as much or more:
        0..1 and 0..255, for example. Images of one value span nothing and say nothing."""
        low, high = float(images.min()), float(images.max())
        least, most = self.range_
        ratio = (high - low) / (most - least) if most > least else 1.0
        if high > low and not 0.1 < ratio < 10:
            warnings.warn(f"X has values from {low:.4g} to {high:.4g}, but fit saw {least:.4g} to "
                          f"{most:.4g}: if X is in other units, convert it to those of fit",
                          UserWarning, stacklevel=6)  # who calls transform, past its decorators

    def _dataset(self, images):
        """The images with fit's statistics divided by 255, as data.normalize divides pixels."""
        mean, std = (tuple((values / 255).tolist()) for values in (self.mean_, self.std_))
        return data.ImageDataset("array", torch.from_numpy(images), None, None, mean, std)

    def _device(self):
        return as_parameters(train.pick_device, self.device)

    def _config(self, images, seed):
        """The Config for images [n, C, (T,) H, W], and the sides in pixels that they train at."""
        if reserved := sorted(set(self.settings or {}) & set(RESERVED)):
            raise UsageError(f"settings holds {', '.join(reserved)}: a parameter of its own, or "
                             "about files and runs, which fit does not have")
        sides = images.shape[2:]
        if self.image_size is not None:
            sides = (self.image_size,) * len(sides)
        changes = {name: value for name in OVERRIDES
                   if (value := getattr(self, name)) is not None}
        changes |= {"context_size": 0, **(self.settings or {}), "image_size": max(sides)}
        changes = {name: value.item() if isinstance(value, np.generic) else value
                   for name, value in changes.items()}  # a grid search passes NumPy's numbers
        if changes.get("epochs") == 0:
            del changes["epochs"]  # Config knows no run without steps; _train does
        config = as_parameters(settings.from_preset, self.preset, seed=seed, device=self.device,
                               **changes)
        batch_size = min(config.batch_size, len(images))
        return dataclasses.replace(config, batch_size=batch_size), sides

    def _train(self, images, seed, resume):
        """Train on images [n, C, (T,) H, W]; self changes only once that has succeeded."""
        (config, sides), device = self._config(images, seed), self._device()
        dataset = self._dataset(images)
        with torch.random.fork_rng():
            model, masking = as_parameters(build, config, sides, images.shape[1])
        model.to(device).train()
        optimizer, losses = train.build_optimizer(config, model), []
        if resume:
            losses = self.loss_curve_
            self._restore(model, optimizer)
        steps = config.epochs * (len(images) // config.batch_size) // config.accumulation
        steps = 0 if self.epochs == 0 else min(max(steps, 1), config.max_steps or math.inf)
        config_of_images = dataclasses.replace(config, image_size=sides)  # not all square
        losses = losses + train_steps(config_of_images, model, masking, optimizer, dataset, device,
                                      steps, len(losses), self.verbose)
        if steps:
            self._warn_of_collapse(config, model, dataset, device)
        state = optimizer.state_dict()
        state["state"] = {number: {name: value.cpu() for name, value in one.items()}
                          for number, one in state["state"].items()}
        self.config_, self.model_ = config, model.cpu().eval()
        self._optimizer_state, self.loss_curve_ = state, losses
        return self

    def _restore(self, model, optimizer):
        """Load the fitted weights and Adam's averages. Raises UsageError if they do not fit."""
        try:
            model.load_state_dict(self.model_.state_dict())
        except RuntimeError:
            raise UsageError("the fitted weights do not fit encoder, predictor and patch_size, "
                             "which were changed since: set them back, or call fit") from None
        optimizer.load_state_dict(copy.deepcopy(self._optimizer_state))  # trained in place

    @torch.no_grad()
    def _warn_of_collapse(self, config, model, dataset, device):
        """Warn if the features of at most 512 different images hardly differ."""
        some = dataset.subset(range(min(512, len(dataset))))
        size = model.target_encoder.image_size
        tokens = torch.cat([model.target_encoder(part).float()
                            for part in data.batches(some, config.batch_size, size, device)])
        deviation = diagnostics.deviation(F.layer_norm(tokens, tokens.shape[-1:]))
        if deviation < 0.3:  # as in diagnostics.warnings
            warnings.warn(
                f"the features of different images hardly differ (standard deviation "
                f"{deviation:.2f}; healthy is .5 or more); try a lower lr (now {config.lr:g}), a "
                f"longer warmup in settings (now {config.warmup:g}), or larger patches of images "
                "enlarged by image_size", ConvergenceWarning, stacklevel=4)

    @property
    def _n_features_out(self):
        """D, for get_feature_names_out and set_output."""
        return self.model_.target_encoder.width

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float32"]
        tags.input_tags.three_d_array = True
        return tags
