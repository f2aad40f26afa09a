"""I-JEPA as a scikit-learn transformer: scikit-learn's own checks, its pipelines and searches, every layout, seeds, pickles, going on."""

import importlib.util
import pickle
import re

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.utils.estimator_checks import parametrize_with_checks

import data
import evaluate
from config import UsageError
from extras.estimator import LAYOUTS, IJEPATransformer, find_layout
from test_readme import README, snippets

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (20, 3, 8, 12), dtype=np.uint8)  # [n, C, H, W], no two sides alike
DIGITS = load_digits().images[:64].astype(np.float32)  # [n, 8, 8]
DIVERGING = {"lr": 1e30, "settings": {"warmup": 0.0, "schedule": "constant"}}


def tiny(**changes):
    """So small that a fit takes some hundredths of a second; two steps show everything but learning."""
    return IJEPATransformer(**{"encoder": "8x1x1", "predictor": "8x1x1", "patch_size": 2, "max_steps": 2, "batch_size": 16,
                               "random_state": 0, "device": "cpu", **changes})


# --- scikit-learn's own checks -------------------------------------------------------------------------------------------

# Its tables have 2 to 20 columns, most of them no square numbers: each row is an image of one pixel row, each value a patch. On grids
# of three patches a target block may leave but one for the context.
ROWS = tiny(image_shape=(1, -1), patch_size=1, settings={"min_keep": 1})
# No check is excluded or expected to fail. scikit-learn itself skips one, check_array_api_input, where SCIPY_ARRAY_API=1 is not in the
# environment; with it, the check passes.


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")  # two steps on noise: nothing is learnt
@parametrize_with_checks([ROWS], expected_failed_checks=lambda estimator: {})
def test_scikit_learns_checks(estimator, check):
    check(estimator)


@pytest.mark.parametrize("library", ["pandas", "polars"])
def test_set_output_names_the_columns(library):
    model = tiny().fit(DIGITS).set_output(transform=library)
    names = list(model.get_feature_names_out())
    assert names == [f"ijepatransformer{i}" for i in range(8)]
    if importlib.util.find_spec(library):
        assert list(model.transform(DIGITS).columns) == names
    else:  # scikit-learn's own words: the wish has reached it
        with pytest.raises(ImportError, match=library):
            model.transform(DIGITS)
    assert isinstance(model.set_output(transform="default").transform(DIGITS), np.ndarray)


# --- learning ------------------------------------------------------------------------------------------------------------


def test_the_readmes_five_lines_beat_the_same_pipeline_with_an_untrained_encoder(capsys):
    names = {}
    exec(*snippets("scikit-learn"), names)
    trained, model = float(capsys.readouterr().out), names["model"]
    X, y = names["X"], names["y"]
    random = clone(model).set_params(ijepatransformer__epochs=0).fit(X[:1200], y[:1200]).score(X[1200:], y[1200:])
    # Both accuracies are fractions of 597 images: the deviation of a difference is at most 2.3 points around 80%.
    assert trained > random + 0.05
    said = re.search(r"prints \.(\d+), with `epochs=0` \.(\d+)", README)
    for found, percent in ((trained, said[1]), (random, said[2])):
        assert found == pytest.approx(float(f"0.{percent}"), abs=0.03)  # rounding differs between machines, and training amplifies it


def test_partial_fit_goes_on_and_is_no_worse_for_it():
    """The loss of the last steps: a JEPA's says little, but where targets hardly move it must not rise when training goes on."""
    settings = {"momentum": 1.0, "momentum_final": 1.0}
    once = tiny(max_steps=20, settings=settings).fit(DIGITS)
    twice = tiny(max_steps=20, settings=settings).partial_fit(DIGITS)  # the first call is fit
    assert twice.loss_curve_ == once.loss_curve_
    twice.partial_fit(DIGITS)
    assert len(twice.loss_curve_) == 40 and twice.loss_curve_[:20] == once.loss_curve_
    assert np.mean(twice.loss_curve_[-5:]) < np.mean(once.loss_curve_[-5:])
    start, before, after = (twice.loss_curve_[step] for step in (0, 19, 20))
    assert abs(after - before) < abs(after - start)  # from where it was, not from the start


def test_partial_fit_takes_other_images_and_keeps_their_units():
    model = tiny().fit(DIGITS[:32])
    mean = model.mean_.copy()
    model.partial_fit(2 * DIGITS[32:60])
    assert len(model.loss_curve_) == 4 and np.array_equal(model.mean_, mean)


def test_a_partial_fit_that_fails_changes_nothing():
    model = tiny().fit(DIGITS)
    before, curve = model.transform(DIGITS), list(model.loss_curve_)
    for impossible in ({"encoder": "16x1x1"}, {"settings": {"optimizer": "sgd"}}, DIVERGING):
        with pytest.raises(UsageError):
            model.set_params(**impossible).partial_fit(DIGITS)
        model.set_params(encoder="8x1x1", lr=None, settings=None)
        assert np.array_equal(model.transform(DIGITS), before) and model.loss_curve_ == curve
    assert model.partial_fit(DIGITS).loss_curve_[:2] == curve


# --- as scikit-learn's users work ----------------------------------------------------------------------------------------


def test_a_grid_search_tries_both_values_in_a_pipeline():
    rows, labels = DIGITS.reshape(64, -1), load_digits().target[:64]
    search = GridSearchCV(make_pipeline(tiny(), LogisticRegression()), {"ijepatransformer__lr": np.array([1e-3, 4e-3])}, cv=2)
    search.fit(rows, labels)
    assert np.isfinite(search.cv_results_["mean_test_score"]).all() and len(search.cv_results_["params"]) == 2
    assert search.predict(rows).shape == (64,)


def test_one_seed_gives_one_encoder_and_another_seed_another():
    fits = [tiny(random_state=seed).fit(DIGITS).transform(DIGITS) for seed in (0, 0, 1, np.random.RandomState(0), np.random.RandomState(0))]
    assert np.array_equal(fits[0], fits[1]) and np.array_equal(fits[3], fits[4]) and not np.allclose(fits[0], fits[2])
    stream = np.random.RandomState(0)  # used twice it gives two seeds, as everywhere in scikit-learn
    assert not np.allclose(tiny(random_state=stream).fit_transform(DIGITS), tiny(random_state=stream).fit_transform(DIGITS))
    assert not np.allclose(tiny(random_state=None).fit_transform(DIGITS), tiny(random_state=None).fit_transform(DIGITS))


def test_fit_leaves_torchs_random_numbers_alone_and_says_and_writes_nothing(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    before = torch.get_rng_state()
    model = tiny().fit(DIGITS)
    model.transform(DIGITS)
    assert torch.equal(torch.get_rng_state(), before)
    assert capfd.readouterr() == ("", "") and not list(tmp_path.iterdir())
    model.set_params(verbose=1).fit(DIGITS)
    assert "2/2" in capfd.readouterr().err


def test_clones_and_pickles_give_the_same_features(tmp_path, monkeypatch):
    model = tiny().fit(IMAGES)
    features = model.transform(IMAGES)
    monkeypatch.chdir(tmp_path)
    assert np.array_equal(clone(model).fit(IMAGES).transform(IMAGES), features)
    thawed = pickle.loads(pickle.dumps(model))
    assert np.array_equal(thawed.transform(IMAGES), features)
    assert np.array_equal(pickle.loads(pickle.dumps(tiny())).fit(IMAGES).transform(IMAGES), features)
    # Adam's averages travel too: what was pickled goes on exactly as what was not.
    assert np.array_equal(thawed.partial_fit(IMAGES).transform(IMAGES), model.partial_fit(IMAGES).transform(IMAGES))


def test_the_features_are_those_of_evaluate():
    model = tiny().fit(IMAGES)
    mean, std = (IMAGES.transpose(1, 0, 2, 3).reshape(3, -1) / 255).mean(1), (IMAGES.transpose(1, 0, 2, 3).reshape(3, -1) / 255).std(1)
    dataset = data.ImageDataset("array", torch.from_numpy(IMAGES), None, None, tuple(mean.tolist()), tuple(std.tolist()))
    expected = evaluate.features(model.model_.target_encoder, dataset, (8, 12), "cpu")
    features = model.transform(IMAGES)
    assert features.dtype == np.float32 and features.shape == (20, 8)
    assert np.allclose(features, expected, atol=1e-6)  # mean and deviation are summed in another order


def test_before_fit_there_are_no_features():
    with pytest.raises(NotFittedError):
        tiny().transform(DIGITS)


def test_images_without_differences_are_warned_of():
    with pytest.warns(ConvergenceWarning, match="hardly differ"):
        tiny(image_shape=(8, 8)).fit(np.ones((20, 64)))


def test_epochs_0_is_the_encoder_as_it_was_drawn():
    untrained = tiny(epochs=0).fit(DIGITS)
    assert untrained.loss_curve_ == []
    for context, target in zip(untrained.model_.context_encoder.parameters(), untrained.model_.target_encoder.parameters()):
        assert torch.equal(context, target)


def test_epochs_are_passes_over_the_images_and_a_batch_has_at_most_all_of_them():
    for n, batch_size, steps in ((64, 16, 12), (64, 30, 6), (10, 16, 3)):  # what does not fill a batch waits for the next shuffle
        assert len(tiny(max_steps=None, epochs=3, batch_size=batch_size).fit(DIGITS[:n]).loss_curve_) == steps


# --- arrays --------------------------------------------------------------------------------------------------------------


def arranged(images, layout):
    """Images [n, C, (T,) H, W] in another layout."""
    return np.moveaxis(images, 1, layout.index("C")) if "C" in layout else images[:, 0]


VOLUMES = RNG.integers(0, 256, (20, 3, 4, 6, 8), dtype=np.uint8)  # [n, C, T, H, W]


@pytest.mark.parametrize("images, layouts", [(IMAGES, ("NCHW", "NHWC")), (IMAGES[:, :1], ("NCHW", "NHWC", "NHW")),
                                             (VOLUMES, ("NCTHW", "NTHWC")), (VOLUMES[:, :1], ("NCTHW", "NTHWC", "NTHW"))])
def test_every_layout_gives_the_same_features_and_so_do_rows(images, layouts):
    expected = tiny().fit(images).transform(images)
    n_values = images[0].size
    for layout in layouts:
        X = arranged(images, layout)
        model = tiny(layout=layout).fit(X)
        assert np.array_equal(model.transform(X), expected) and model.n_features_in_ == n_values
        rows = X.reshape(20, -1)
        assert np.array_equal(model.transform(rows), expected)
        assert np.array_equal(tiny(layout=layout, image_shape=X.shape[1:]).fit(rows).transform(X), expected)
        if layout != "NTHW":  # the others are understood without being named, also where fit saw another
            assert find_layout(X.shape[1:]) == layout
            assert np.array_equal(tiny().fit(images).transform(X), expected)


def test_the_layout_is_never_guessed():
    for shape in ((16, 32, 32), (3, 32, 3), (2, 8, 8, 8)):
        with pytest.raises(UsageError, match="say which"):
            find_layout(shape)
    for layout in LAYOUTS:
        assert find_layout((9,) * (len(layout) - 1), layout) == layout


@pytest.mark.parametrize("dtype", [bool, np.int64, np.uint16, np.float32, np.float64])
def test_equal_numbers_give_equal_features_whatever_their_type(dtype):
    images = IMAGES % 2 if dtype is bool else IMAGES
    expected = tiny().fit(images).transform(images)
    assert np.array_equal(tiny().fit(images.astype(dtype)).transform(images.astype(dtype)), expected)
    assert np.array_equal(tiny().fit(images).transform(images.astype(dtype)), expected)


def test_units_do_not_matter():
    """Standardised by their own mean and deviation, pixels of 0..255, 0..1 or thousands are the same but for float32's rounding.
    (Before training: Adam's first steps go by a gradient's sign, and turn where rounding turns it.)"""
    features = [tiny(epochs=0).fit_transform(images) for images in (IMAGES, IMAGES / 255, 1000.0 + 40 * IMAGES.astype(int))]
    assert all(np.allclose(features[0], other, atol=1e-4) for other in features[1:])


def test_small_images_can_be_enlarged():
    model = tiny(image_size=16, patch_size=4).fit(DIGITS)
    assert model.model_.target_encoder.grid == (4, 4) and model.transform(DIGITS).shape == (64, 8)


@pytest.mark.parametrize("changes, X, message", [
    ({}, np.zeros((20, 12)), "a row of 12 values is no square image: give its shape"),
    ({"image_shape": (3, 5)}, np.zeros((20, 12)), r"image_shape \(3, 5\) is not the shape of a row of 12 values"),
    ({}, VOLUMES[:, 0], "could be NCHW or NHWC or NTHW: say which, as in layout='NCHW'"),
    ({"layout": "NHWC"}, DIGITS, "images of shape .* cannot be NHWC: a letter an axis"),
    ({"layout": "HWC"}, DIGITS, "layout 'HWC' is none of NHW, NCHW"),
    ({}, np.zeros((2, 1, 1, 8, 8, 8)), "cannot be any of NHW, NCHW"),
    ({"patch_size": 3}, DIGITS, "^patch_size is 3: it must divide the image_size of 8 pixels"),
    ({"patch_size": 4}, DIGITS, "^min_keep is 4: .* on a 2x2 grid .* target_scale"),
    ({"preset": "digits"}, DIGITS, "preset is digits: choose one of"),
    ({"lr": "fast"}, DIGITS, "lr is 'fast': expected float"),
    ({"epochs": 2.5}, DIGITS, "epochs is 2.5: expected a whole number"),
    ({"settings": {"lr": 1.0, "out": "runs"}}, DIGITS, "settings holds lr, out: "),
    ({"settings": {"masc": "blocks"}}, DIGITS, "no setting is called masc"),
    ({"settings": {"method": "supervised"}}, DIGITS, "needs labels"),
    (DIVERGING, DIGITS, "the loss is not finite from step"),
    ({"device": "tpu"}, DIGITS, "^device is tpu: choose one of auto, cpu"),
])
def test_what_cannot_be_is_said_in_one_line(changes, X, message):
    with pytest.raises(UsageError, match=message) as error:
        tiny(**changes).fit(X)
    assert "\n" not in str(error.value)


def test_images_of_another_shape_than_fits_are_refused():
    model = tiny().fit(IMAGES)
    with pytest.raises(UsageError, match="but fit was given"):
        model.transform(IMAGES.reshape(20, 3, 12, 8))
    with pytest.raises(ValueError, match="X has 64 features, but IJEPATransformer is expecting 288 features"):
        model.transform(DIGITS)


def test_bad_values_are_refused_in_scikit_learns_words():
    for bad, message in ((np.nan, "Input X contains NaN"), (-np.inf, "Input X contains infinity")):
        with pytest.raises(ValueError, match=message):
            tiny().fit(np.where(IMAGES == IMAGES[0, 0, 0, 0], bad, IMAGES))
    for empty in (IMAGES[:0], DIGITS[:0], np.zeros((0, 64))):
        with pytest.raises(ValueError, match=r"Found array with 0 sample\(s\)"):
            tiny().fit(empty)
