"""Claims about IJEPATransformer: scikit-learn's own checks, pipelines, layouts, seeds, pickles."""

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
from test_readme import ALL, snippets

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (20, 3, 8, 12), dtype=np.uint8)  # [n, C, H, W], no two sides alike
VOLUMES = RNG.integers(0, 256, (20, 3, 4, 6, 8), dtype=np.uint8)  # [n, C, T, H, W]
DIGITS = load_digits().images[:64].astype(np.float32)  # [n, 8, 8]
DIVERGING = {"lr": 1e30, "settings": {"warmup": 0.0}}


def tiny(**changes):
    """So small that a fit takes hundredths of a second; two steps show everything but learning."""
    return IJEPATransformer(**{
        "encoder": "8x1x1", "predictor": "8x1x1", "patch_size": 2, "max_steps": 2,
        "batch_size": 16, "random_state": 0, "device": "cpu", **changes})


# --- scikit-learn's own checks --------------------------------------------------------------------

# Its tables have 2 to 20 columns: each row is an image of one pixel row, each value a patch.
ROWS = tiny(image_shape=(1, -1), patch_size=1)
# No check is excluded or expected to fail. scikit-learn itself skips check_array_api_input if
# SCIPY_ARRAY_API=1 is not in the environment; with it, the check passes.


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")  # two steps on noise
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
    else:  # scikit-learn's own words: the request has reached it
        with pytest.raises(ImportError, match=library):
            model.transform(DIGITS)
    assert isinstance(model.set_output(transform="default").transform(DIGITS), np.ndarray)


# --- learning -------------------------------------------------------------------------------------


def test_the_documented_lines_beat_the_same_pipeline_with_an_untrained_encoder(capsys):
    names = {}
    exec(*snippets("scikit-learn"), names)
    trained, X, y = float(capsys.readouterr().out), names["X"], names["y"]
    model = clone(names["model"]).set_params(ijepatransformer__epochs=0)
    untrained = model.fit(X[:1200], y[:1200]).score(X[1200:], y[1200:])
    # Fractions of 597 images: the deviation of a difference is at most 2.3 points around 80%.
    assert trained > untrained + 0.05
    said = re.search(r"prints \.(\d+), with `epochs=0` \.(\d+)", ALL)
    for found, percent in ((trained, said[1]), (untrained, said[2])):
        # Rounding differs between machines, and training amplifies it.
        assert found == pytest.approx(float(f"0.{percent}"), abs=0.03)


def test_partial_fit_trains_on_and_is_no_worse_for_it():
    """A JEPA's loss says little, but with fixed targets it must not rise when training goes on."""
    fixed = {"momentum": 1.0, "momentum_final": 1.0}
    once = tiny(max_steps=20, settings=fixed).fit(DIGITS)
    twice = tiny(max_steps=20, settings=fixed).partial_fit(DIGITS)  # the first call is fit
    assert twice.loss_curve_ == once.loss_curve_
    twice.partial_fit(DIGITS)
    assert len(twice.loss_curve_) == 40 and twice.loss_curve_[:20] == once.loss_curve_
    assert np.mean(twice.loss_curve_[-5:]) < np.mean(once.loss_curve_[-5:])
    start, before, after = (twice.loss_curve_[step] for step in (0, 19, 20))
    assert abs(after - before) < abs(after - start)  # from where it was, not from scratch


def test_partial_fit_takes_other_images_and_keeps_their_units():
    model = tiny().fit(DIGITS[:32])
    mean = model.mean_.copy()
    model.partial_fit(2 * DIGITS[32:60])
    assert len(model.loss_curve_) == 4 and np.array_equal(model.mean_, mean)


def test_a_partial_fit_that_fails_changes_nothing():
    model = tiny().fit(DIGITS)
    before, curve = model.transform(DIGITS), list(model.loss_curve_)
    for impossible in ({"encoder": "16x1x1"}, DIVERGING):
        with pytest.raises(UsageError):
            model.set_params(**impossible).partial_fit(DIGITS)
        model.set_params(encoder="8x1x1", lr=None, settings=None)
        assert np.array_equal(model.transform(DIGITS), before) and model.loss_curve_ == curve
    assert model.partial_fit(DIGITS).loss_curve_[:2] == curve


# --- as scikit-learn's users work -----------------------------------------------------------------


def test_a_grid_search_tries_both_values_in_a_pipeline():
    rows, labels = DIGITS.reshape(64, -1), load_digits().target[:64]
    search = GridSearchCV(make_pipeline(tiny(), LogisticRegression()),
                          {"ijepatransformer__lr": np.array([1e-3, 4e-3]),
                           "ijepatransformer__batch_size": np.array([16])}, cv=2)
    search.fit(rows, labels)
    scores = search.cv_results_["mean_test_score"]
    assert np.isfinite(scores).all() and len(scores) == 2
    assert search.predict(rows).shape == (64,)


def test_one_seed_gives_one_encoder_and_another_seed_another():
    def features(seed):
        return tiny(random_state=seed).fit_transform(DIGITS)

    assert np.array_equal(features(0), features(0)) and not np.allclose(features(0), features(1))
    stream = np.random.RandomState(0)
    first, second = features(stream), features(stream)  # two seeds, as everywhere in scikit-learn
    assert np.array_equal(first, features(np.random.RandomState(0)))
    assert not np.allclose(first, second) and not np.allclose(features(None), features(None))


def test_fit_leaves_torchs_random_numbers_alone_and_prints_and_writes_nothing(
        tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    before = torch.get_rng_state()
    model = tiny().fit(DIGITS)
    model.transform(DIGITS)
    assert torch.equal(torch.get_rng_state(), before)
    assert capfd.readouterr() == ("", "") and not list(tmp_path.iterdir())
    model.set_params(verbose=1).fit(DIGITS)
    assert "2/2" in capfd.readouterr().err


def test_clones_and_pickles_give_the_same_features():
    model = tiny().fit(IMAGES)
    features = model.transform(IMAGES)
    assert np.array_equal(clone(model).fit(IMAGES).transform(IMAGES), features)
    thawed = pickle.loads(pickle.dumps(model))
    assert np.array_equal(thawed.transform(IMAGES), features)
    # Adam's averages are kept too: what was pickled trains on exactly as what was not.
    assert np.array_equal(thawed.partial_fit(IMAGES).transform(IMAGES),
                          model.partial_fit(IMAGES).transform(IMAGES))


def test_the_features_are_those_of_evaluate():
    model = tiny().fit(IMAGES)
    pixels = IMAGES.transpose(1, 0, 2, 3).reshape(3, -1) / 255
    dataset = data.ImageDataset("array", torch.from_numpy(IMAGES), None, None,
                                tuple(pixels.mean(1).tolist()), tuple(pixels.std(1).tolist()))
    expected = evaluate.features(model.model_.target_encoder, dataset, (8, 12), "cpu")
    features = model.transform(IMAGES)
    assert features.dtype == np.float32 and features.shape == (20, 8)
    assert np.allclose(features, expected, atol=1e-6)  # the mean is summed in another order


def test_merged_targets_are_another_loss():
    one_by_one, merged = (tiny(settings={"merge_targets": merge}).fit(IMAGES).loss_curve_
                          for merge in (False, True))
    assert not np.allclose(one_by_one, merged)


def test_before_fit_there_are_no_features():
    with pytest.raises(NotFittedError):
        tiny().transform(DIGITS)


def test_images_without_differences_give_a_warning():
    with pytest.warns(ConvergenceWarning, match="hardly differ"):
        tiny(image_shape=(8, 8)).fit(np.ones((20, 64)))


def test_epochs_0_is_an_untrained_encoder():
    untrained = tiny(epochs=0).fit(DIGITS)
    assert untrained.loss_curve_ == []
    model = untrained.model_
    for context, target in zip(model.context_encoder.parameters(),
                               model.target_encoder.parameters()):
        assert torch.equal(context, target)


def test_epochs_are_passes_over_the_images_and_a_batch_has_at_most_all_of_them():
    # What does not fill a batch is left for the next shuffle.
    for n, batch_size, steps in ((64, 16, 12), (64, 30, 6), (10, 16, 3)):
        model = tiny(max_steps=None, epochs=3, batch_size=batch_size).fit(DIGITS[:n])
        assert len(model.loss_curve_) == steps


# --- arrays ---------------------------------------------------------------------------------------


def arranged(images, layout):
    """Images [n, C, (T,) H, W] in another layout."""
    return np.moveaxis(images, 1, layout.index("C")) if "C" in layout else images[:, 0]


@pytest.mark.parametrize("images, layouts", [
    (IMAGES, ("NCHW", "NHWC")), (IMAGES[:, :1], ("NCHW", "NHWC", "NHW")),
    (VOLUMES, ("NCTHW", "NTHWC")), (VOLUMES[:, :1], ("NCTHW", "NTHWC", "NTHW"))])
def test_every_layout_gives_the_same_features_and_so_do_rows(images, layouts):
    expected = tiny().fit(images).transform(images)
    for layout in layouts:
        X = arranged(images, layout)
        model = tiny(layout=layout).fit(X)
        assert np.array_equal(model.transform(X), expected)
        assert model.n_features_in_ == images[0].size
        rows = X.reshape(20, -1)
        assert np.array_equal(model.transform(rows), expected)
        of_rows = tiny(layout=layout, image_shape=X.shape[1:]).fit(rows)
        assert np.array_equal(of_rows.transform(X), expected)
        if layout != "NTHW":  # the others are found, also if fit saw another layout
            assert find_layout(X.shape[1:]) == layout
            assert np.array_equal(tiny().fit(images).transform(X), expected)


def test_the_layout_is_never_guessed():
    for shape in ((16, 32, 32), (3, 32, 3), (2, 8, 8, 8)):
        with pytest.raises(UsageError, match="say which"):
            find_layout(shape)
    for layout in LAYOUTS:
        assert find_layout((9,) * (len(layout) - 1), layout) == layout


@pytest.mark.parametrize("dtype", [bool, np.int64, np.uint16, np.float32, np.float64])
def test_equal_numbers_give_equal_features_whatever_their_dtype(dtype):
    images = IMAGES % 2 if dtype is bool else IMAGES
    same, fitted = images.astype(dtype), tiny().fit(images)
    expected = fitted.transform(images)
    assert np.array_equal(tiny().fit(same).transform(same), expected)
    assert np.array_equal(fitted.transform(same), expected)


def test_units_do_not_matter():
    """Standardized by their own mean and deviation, pixels of 0..255, 0..1 or thousands are alike.

    (Before training: Adam's first steps follow a gradient's sign, which rounding can turn.)
    """
    units = IMAGES, IMAGES / 255, 1000.0 + 40 * IMAGES.astype(int)
    features = [tiny(epochs=0).fit_transform(images) for images in units]
    assert all(np.allclose(features[0], other, atol=1e-4) for other in features[1:])


def test_small_images_can_be_enlarged():
    model = tiny(image_size=16, patch_size=4).fit(DIGITS)
    assert model.model_.target_encoder.grid == (4, 4)
    assert model.transform(DIGITS).shape == (64, 8)


@pytest.mark.parametrize("changes, X, message", [
    ({}, np.zeros((20, 12)), "a row of 12 values is no square image: give its shape"),
    ({"image_shape": (3, 5)}, np.zeros((20, 12)), "is not the shape of a row of 12 values"),
    ({}, VOLUMES[:, 0], "could be NCHW or NHWC or NTHW: say which, such as layout='NCHW'"),
    ({"layout": "NHWC"}, DIGITS, "images of shape .* cannot be NHWC: a layout has a letter"),
    ({"layout": "HWC"}, DIGITS, "layout is 'HWC', expected one of NHW, NCHW"),
    ({}, np.zeros((2, 1, 1, 8, 8, 8)), "cannot be NHW or NCHW"),
    ({"patch_size": 3}, DIGITS, "^patch_size is 3, expected a divisor of the image size, 8"),
    ({"patch_size": 8}, DIGITS, "^num_targets is 2, expected from 1 to 1"),
    ({"preset": "digits"}, DIGITS, "^preset is 'digits', expected one of"),
    ({"lr": "fast"}, DIGITS, "^lr is 'fast', expected a finite number"),
    ({"epochs": 2.5}, DIGITS, "^epochs is 2.5, expected"),
    ({"settings": {"lr": 1.0, "out": "runs"}}, DIGITS, "settings holds lr, out: "),
    ({"settings": {"num_target": 3}}, DIGITS, "did you mean num_targets"),
    (DIVERGING, DIGITS, r"the loss is (nan|inf) at step"),
    ({"device": "tpu"}, DIGITS, "device is 'tpu', expected one of auto, cpu"),
])
def test_what_cannot_work_is_one_line(changes, X, message):
    with pytest.raises(UsageError, match=message) as error:
        tiny(**changes).fit(X)
    assert "\n" not in str(error.value) and "--" not in str(error.value)


def test_images_of_another_shape_than_fits_are_rejected():
    model = tiny().fit(IMAGES)
    with pytest.raises(UsageError, match="but fit was given"):
        model.transform(IMAGES.reshape(20, 3, 12, 8))
    with pytest.raises(ValueError, match="X has 64 features, .* expecting 288"):
        model.transform(DIGITS)


def test_bad_values_are_rejected_in_scikit_learns_words():
    for bad, message in ((np.nan, "Input X contains NaN"), (-np.inf, "Input X contains infinity")):
        with pytest.raises(ValueError, match=message):
            tiny().fit(np.where(IMAGES == IMAGES[0, 0, 0, 0], bad, IMAGES))
    for empty in (IMAGES[:0], DIGITS[:0], np.zeros((0, 64))):
        with pytest.raises(ValueError, match=r"Found array with 0 sample\(s\)"):
            tiny().fit(empty)
