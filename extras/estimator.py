"""I-JEPA as a scikit-learn transformer: `fit` pretrains on images in NumPy arrays, `transform` gives the frozen target encoder's features.

    features = IJEPATransformer(image_size=32).fit(X).transform(X)  # X [n, 8, 8] or its rows [n, 64] -> float32 [n, D]

Model, masks, optimizer step and pooling are those of `train.py` and `evaluate.py`; what is here is the way in and out: arrays of any
layout, scikit-learn's checks, seeds and pickles. No files are written. Imported by no other module.
"""

import copy
import dataclasses
import itertools
import math
import operator
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
import evaluate
from extras import methods
import train
from config import UsageError

LAYOUTS = ("NHW", "NCHW", "NHWC", "NTHW", "NCTHW", "NTHWC")  # N images, C channels, T H W sides
OVERRIDES = ("encoder", "predictor", "patch_size", "epochs", "max_steps", "batch_size", "lr")  # parameters that change the preset
# Fields of Config that `settings` may not hold: parameters of their own here, or about files, runs and measures that fit has not.
ELSEWHERE = (*OVERRIDES, "preset", "image_size", "seed", "device", "dataset", "split", "data_dir", "held_out", "measurements", "workers",
             "max_minutes", "checkpoint_minutes", "out")


# --- arrays --------------------------------------------------------------------------------------------------------------


def find_layout(shape, layout=None):
    """The layout of an array whose images have this shape (without n): the one given, or the only one that the rule allows.

    The rule: two axes are H W. Of three or four, the first or the last is C where just one of the two has length 1 or 3.
    Raises UsageError where that leaves more than one answer, or none.
    """
    if layout not in (None, *LAYOUTS):
        raise UsageError(f"layout {layout!r} is none of {', '.join(LAYOUTS)}")
    possible = [name for name in LAYOUTS if len(name) == 1 + len(shape)]
    if not possible or layout not in (None, *possible):
        raise UsageError(f"images of shape {shape} cannot be {layout or 'any of ' + ', '.join(LAYOUTS)}: a letter an axis, N the images")
    if layout or len(possible) == 1:
        return layout or possible[0]
    first, last = shape[0] in (1, 3), shape[-1] in (1, 3)
    if first == last:
        raise UsageError(f"images of shape {shape} could be {' or '.join(possible)}: say which, as in layout='{possible[0]}'")
    return next(name for name in possible if name[1 if first else -1] == "C")


def statistics(images):
    """Mean and standard deviation of each channel of [n, C, ...], two float64 [C]; the deviation is 1 where a channel is constant."""
    axes = (0, *range(2, images.ndim))
    mean = images.mean(axes, dtype=np.float64)  # [C]
    centre = mean.reshape(-1, *(1,) * (images.ndim - 2))  # [C, 1, 1]
    # Some thousand images at a time: a float64 copy of all would be eight times the size of uint8 images.
    squares = sum(np.square(images[i : i + 1000] - centre).sum(axes) for i in range(0, len(images), 1000))  # [C]
    std = np.sqrt(squares * len(mean) / images.size)
    return mean, np.where(std > 1e-6 * np.abs(mean), std, 1.0)  # 1e-6: what float32 rounding leaves of a constant


# --- training ------------------------------------------------------------------------------------------------------------


def fit_steps(config, model, optimizer, dataset, generator, steps, start, bar=False):
    """`steps` optimizer steps of train.py on a dataset in memory, the data's order taken up at step `start`; gives their losses, floats.

    The schedules span these steps. Raises UsageError where a loss is not finite.
    """
    stream, losses = train.image_stream(config, dataset, generator.device, generator, start * config.accumulation), []
    with tqdm(range(steps), "I-JEPA", unit="step", disable=not bar) as progress:
        for step in progress:
            batches = list(itertools.islice(stream, config.accumulation))
            losses.append(train.train_step(config, model, optimizer, batches, step, steps, generator)["loss"])
            if bar:
                progress.set_postfix_str(f"loss {losses[-1]:.4f}", refresh=False)
    losses = [float(loss) for loss in losses]  # only now: until here nothing waited for the device
    if bad := [step for step, loss in enumerate(losses, start + 1) if not math.isfinite(loss)]:
        raise UsageError(f"the loss is not finite from step {bad[0]} on; lower lr ({config.lr:g}), or set clip_grad in settings")
    return losses


class IJEPATransformer(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    """Pretrains I-JEPA on images without labels and turns images into features of its target encoder, average-pooled.

    X: an array of images, uint8, float or any other number, in one of LAYOUTS, or their flattened rows [n, p]. Each channel is
    standardised by the mean and deviation of the images given to `fit`, whatever the dtype, so that equal numbers give equal
    features; later images must come in the same units. `y` is ignored. Images are float32 or uint8 inside.

    preset, and what changes it (None takes the preset's value): encoder, predictor, patch_size (pixels), epochs (0: the encoder as it
    is drawn, untrained), max_steps (0 is no limit), batch_size (at most n), lr, as `python train.py --help` explains them.
    image_size: side in pixels to which images are resized, None leaves them as they are; enlarge tiny ones, since a patch of a few
    numbers is drowned by its position. image_shape: of one flattened row, as in (28, 28, 3), one side may be -1; None takes rows for
    squares. layout: one of LAYOUTS; None asks `find_layout`, which refuses what could be read in two ways. settings: a dict of other
    fields of Config; context_size is 0, not the preset's, which is made for the preset's grid. random_state: int, RandomState or
    None. device: auto, cpu, cuda or mps. verbose: 1 shows progress bars.

    After fit: model_ (on the CPU, wherever it was trained), config_, mean_ and std_ [C], layout_, image_shape_ (C, (T,) H, W),
    loss_curve_ (a loss a step), n_features_in_: the values of one image, C*H*W, so that an array and its rows have as many.

    Raises UsageError, a ValueError, in one line where parameters or shapes do not go together.
    """

    def __init__(self, preset="small", *, encoder=None, predictor=None, patch_size=None, epochs=None, max_steps=None, batch_size=None,
                 lr=None, settings=None, image_size=None, image_shape=None, layout=None, random_state=None, device="auto", verbose=0):
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
        """Pretrain from the start on the images X; gives self."""
        images = self._images(X, reset=True)  # [n, C, (T,) H, W]
        self.mean_, self.std_ = statistics(images)  # [C], [C]
        return self._train(images, int(check_random_state(self.random_state).randint(2**31 - 1)), going_on=False)

    def partial_fit(self, X, y=None):
        """Go on from where it is, for `epochs` (or max_steps) more on the images X, which may be others; the first call is `fit`.

        Weights, Adam's averages, seed and standardisation are kept. The schedules begin anew (a warm restart, Loshchilov & Hutter
        2017), so that calls can be as many and as short as one likes. Parameters set since then count, where the weights fit them.
        """
        if not hasattr(self, "model_"):
            return self.fit(X)
        return self._train(self._images(X, reset=False), self.config_.seed, going_on=True)

    def transform(self, X):
        """Features of the images X, float32 [n, D]: what `evaluate.features` gives for the target encoder."""
        check_is_fitted(self, "model_")
        dataset, device, encoder = self._dataset(self._images(X, reset=False)), self._device(), self.model_.target_encoder
        if device.type != "cpu":
            encoder = copy.deepcopy(encoder).to(device)  # model_ stays on the CPU, so that its pickle opens on any machine
        return evaluate.features(encoder, dataset, encoder.image_size, device, quiet=not self.verbose).numpy()  # [n, D]

    # --- what they are made of

    def _images(self, X, reset):
        """X in any layout as uint8 or float32 [n, C, (T,) H, W], checked by scikit-learn; `reset` notes its shape, else compares it."""
        shape = tuple(getattr(X, "shape", None) or np.asarray(X).shape)[1:]
        if len(shape) > 1:  # scikit-learn's checks count the columns of a table
            X = np.asarray(X)
            X = X.reshape(len(X), math.prod(shape))
        # One value has nothing to be predicted from. In transform the wrong number of values is the clearer complaint.
        X = validate_data(self, X, reset=reset, dtype=(np.float32, np.uint8), ensure_min_features=2 if reset else 1)  # [n, p]
        layout = self.layout
        if len(shape) == 1:
            shape, layout = self._row_shape(X, reset)
        layout = find_layout(shape, layout)
        images = X.reshape(len(X), *shape)
        images = np.moveaxis(images, layout.index("C"), 1) if "C" in layout else images[:, None]  # [n, C, (T,) H, W]
        if reset:
            self.layout_, self.image_shape_ = layout, images.shape[1:]
        elif images.shape[1:] != self.image_shape_:
            raise UsageError(f"images of {images.shape[1:]}, channels first, but fit was given {self.image_shape_} (layout {layout})")
        return np.require(images, requirements=("C", "W"))  # W: torch shares memory only with arrays it may write to

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
                raise UsageError(f"a row of {p} values is no square image: give its shape, as in image_shape=(28, 28, 3)")
        try:
            return X[0].reshape(shape).shape, self.layout
        except (TypeError, ValueError):
            raise UsageError(f"image_shape {shape} is not the shape of a row of {p} values") from None

    def _dataset(self, images):
        """The images with fit's statistics; `data.normalise` divides pixels by 255, which cancels where these are divided too."""
        mean, std = (tuple((values / 255).tolist()) for values in (self.mean_, self.std_))
        return data.ImageDataset("array", torch.from_numpy(images), None, None, mean, std)

    def _device(self):
        return self._in_our_words(train.pick_device, self.device)

    @staticmethod
    def _in_our_words(function, *given, **named):
        """Call the function; where its UsageError names a flag, as in --patch-size, name the parameter instead."""
        try:
            return function(*given, **named)
        except UsageError as error:
            raise UsageError(re.sub(r"--(\w[\w-]+)", lambda flag: flag[1].replace("-", "_"), str(error))) from None

    def _config(self, images, seed):
        """The Config of these parameters for images [n, C, (T,) H, W]."""
        if refused := sorted(set(self.settings or {}) & set(ELSEWHERE)):
            raise UsageError(f"settings holds {', '.join(refused)}: a parameter of its own, or about files and runs, which fit has not")
        sides = images.shape[2:] if self.image_size is None else (self.image_size,) * (images.ndim - 2)
        given = {name: getattr(self, name) for name in OVERRIDES if getattr(self, name) is not None}
        given |= {"context_size": 0, **(self.settings or {}), "image_size": max(sides)}
        kinds = {field.name: field.type for field in dataclasses.fields(settings.Config)}
        for name, value in given.items():  # a grid search hands over NumPy's numbers
            make = {int: operator.index, float: float, str: str, bool: bool}.get(kinds.get(name), tuple)
            try:
                given[name] = make(value)
            except (TypeError, ValueError):
                raise UsageError(f"{name} is {value!r}: expected {make.__name__.replace('index', 'a whole number')}") from None
        if given.get("epochs") == 0:
            del given["epochs"]  # Config knows no run without steps; _train does
        config = self._in_our_words(settings.from_preset, self.preset, held_out=0, seed=seed, device=self.device, **given)
        if config.method == "supervised":
            raise UsageError("method supervised needs labels, and this transformer ignores y; use train.py, or another method")
        return dataclasses.replace(config, image_size=sides, batch_size=min(config.batch_size, len(images)))

    def _train(self, images, seed, going_on):
        """Train on images [n, C, (T,) H, W], from the start or from where it is; nothing is changed before it has succeeded."""
        config, device, dataset = self._config(images, seed), self._device(), self._dataset(images)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = self._in_our_words(methods.build, config, images.shape[1], images.ndim - 2).to(device).train()
        optimizer, losses = train.build_optimizer(config, model), []
        if going_on:
            losses = self.loss_curve_
            try:
                if config.optimizer != self.config_.optimizer:
                    raise ValueError
                model.load_state_dict(self.model_.state_dict())
                optimizer.load_state_dict(copy.deepcopy(self._optimizer_state))  # a copy: its tensors would be trained in place
            except (RuntimeError, ValueError):
                raise UsageError("the fitted weights do not fit parameters set since (encoder, predictor, patch_size, optimizer or "
                                 "method): set them back, or call fit") from None
        steps = config.epochs * (len(images) // config.batch_size) // config.accumulation
        steps = 0 if self.epochs == 0 else min(max(steps, 1), config.max_steps or math.inf)
        generator = torch.Generator(device).manual_seed(seed + len(losses))  # crops and masks
        losses = losses + fit_steps(config, model, optimizer, dataset, generator, steps, len(losses), self.verbose)
        if steps:
            self._warn_of_collapse(config, model, dataset, device)
        state = optimizer.state_dict()
        state["state"] = {i: {name: value.cpu() for name, value in one.items()} for i, one in state["state"].items()}
        self.config_, self.model_, self._optimizer_state, self.loss_curve_ = config, model.cpu().eval(), state, losses
        return self

    def _warn_of_collapse(self, config, model, dataset, device):
        """Warn where the features of different images hardly differ, by the measure of `diagnostics.warnings`, on at most 512 images."""
        with torch.no_grad():
            some = dataset.subset(range(min(512, len(dataset))))
            tokens = torch.cat([model.target_encoder(part) for part in data.batches(some, config.batch_size, config.image_size, device)])
            deviation = diagnostics.deviation(F.layer_norm(tokens.float(), tokens.shape[-1:]))
        if deviation < 0.3:
            warnings.warn(
                f"the features of different images hardly differ (standard deviation {deviation:.2f}; healthy is .5 and more); try a "
                f"lower lr (now {config.lr:g}), a longer warmup in settings (now {config.warmup:g}), or larger patches of images "
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
