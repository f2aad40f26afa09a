"""Claims about what is read from features: it finds what is there, nothing where there is nothing, and never looks at the test labels."""

import pytest
import torch
from sklearn.linear_model import LogisticRegression

import data
import diagnostics
import models
from extras import probes


def blobs(n=300, classes=3, distance=4.0, seed=0):
    """`classes` round clouds, far enough apart that a line separates them: float32 [n, 8], int64 [n]."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    return torch.randn(n, 8, generator=generator) + distance * torch.eye(classes, 8)[labels] * 2, labels


def test_probe_separates_what_is_separable():
    assert probes.linear_probe(*blobs(), *blobs(seed=1))["accuracy"] > 0.98


def test_probe_is_at_chance_on_random_labels():
    x, y = blobs(2000, classes=4, distance=0.0)
    test_x, test_y = blobs(2000, classes=4, distance=0.0, seed=1)
    assert 0.2 < probes.linear_probe(x, y, test_x, test_y)["accuracy"] < 0.3


def test_test_labels_do_not_choose_the_strength():
    train, (test_x, test_y) = blobs(distance=0.5), blobs(distance=0.5, seed=1)
    honest, permuted = probes.linear_probe(*train, test_x, test_y), probes.linear_probe(*train, test_x, test_y.roll(1))
    assert honest["accuracy"] != permuted["accuracy"]
    assert torch.equal(honest.pop("predictions"), permuted.pop("predictions"))
    assert {**honest, "accuracy": 0} == {**permuted, "accuracy": 0}


def test_probe_does_not_depend_on_the_features_scale():
    (x, y), (test_x, test_y) = blobs(distance=0.5), blobs(distance=0.5, seed=1)
    stretch = torch.logspace(-3, 3, 8)
    stretched = probes.linear_probe(x * stretch + 1, y, test_x * stretch + 1, test_y)
    assert probes.linear_probe(x, y, test_x, test_y)["accuracy"] == pytest.approx(stretched["accuracy"], abs=0.02)


@pytest.mark.parametrize("constant", (0.0, 0.1, 1e6))
def test_a_constant_feature_becomes_zero_not_nan(constant):
    (x, y), (test_x, test_y) = blobs(), blobs(seed=1)
    x[:, 3] = test_x[:, 3] = constant
    for standardised in probes.standardise(x, test_x):
        assert standardised.isfinite().all() and (standardised[:, 3] == 0).all()
    assert probes.linear_probe(x, y, test_x, test_y)["accuracy"] > 0.98


def test_probe_says_when_the_strength_is_at_the_grids_edge():
    (x, y), test = blobs(distance=0.5), blobs(distance=0.5, seed=1)
    assert probes.linear_probe(x, y, *test, strengths=(1.0,))["at_edge"]
    assert not probes.linear_probe(x, y, *test, strengths=(1e4, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5))["at_edge"]  # 1e4 is chance


def test_every_class_keeps_an_image_to_learn_from():
    (x, y), (test_x, test_y) = blobs(6, distance=20.0), blobs(distance=20.0, seed=1)  # two images a class
    assert probes.linear_probe(x[:, :3], y, test_x[:, :3], test_y)["accuracy"] > 0.98
    with pytest.raises(ValueError, match="two images"):
        probes.linear_probe(x[:3], y[:3], test_x, test_y)


def test_knn_is_the_vote_written_out():
    generator = torch.Generator().manual_seed(0)
    train_x, test_x = torch.randn(30, 5, generator=generator), torch.randn(1500, 5, generator=generator)  # more than one chunk
    train_y, test_y = torch.randint(0, 3, (30,), generator=generator), torch.randint(0, 3, (1500,), generator=generator)
    correct = 0
    for x, y in zip(test_x, test_y):
        cosines = [(float(x @ t / (x.norm() * t.norm())), int(label)) for t, label in zip(train_x, train_y)]
        votes = [0.0, 0.0, 0.0]
        for cosine, label in sorted(cosines, reverse=True)[:7]:
            votes[label] += 2.718281828459045 ** (cosine / 0.5)
        correct += votes.index(max(votes)) == int(y)
    assert diagnostics.knn(train_x, train_y, test_x, test_y, k=7, temperature=0.5) == correct / 1500


def test_knn_weighs_a_close_neighbour_above_two_far_ones():
    train_x, train_y = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]), torch.tensor([0, 1, 1])
    nearly = torch.tensor([[1.0, 0.1]])
    assert diagnostics.knn(train_x, train_y, nearly, torch.tensor([0]), k=100) == 1  # all three vote, though k is larger
    assert diagnostics.knn(train_x, train_y, nearly, torch.tensor([1]), k=100, temperature=100) == 1  # the majority, without distance


def test_the_fit_is_the_optimum_that_scikit_learn_finds():
    """The same objective, whatever the units it is solved in: weights, biases and probabilities agree."""
    (x, y), _ = blobs(distance=0.5), None
    x = x * torch.logspace(-2, 2, 8)  # badly scaled, as features are
    axes, variance = probes.principal_axes(x)
    for strength in (1.0, 1e-2, 1e-4):
        weight, bias = probes.fit(x @ axes, y, variance, strength, torch.zeros(8, 3), torch.zeros(3))
        theirs = LogisticRegression(C=1 / (strength * len(y)), max_iter=10000, tol=1e-8).fit(x.double().numpy(), y.numpy())
        ours = (x @ axes @ weight + bias).softmax(1)
        assert torch.allclose(ours, torch.from_numpy(theirs.predict_proba(x.double().numpy())).float(), atol=2e-3)


def test_fewer_images_than_features_need_no_more_axes_than_images():
    x = torch.randn(12, 40, generator=torch.Generator().manual_seed(0))
    axes, variance = probes.principal_axes(x)
    assert axes.shape == (40, 12)
    torch.testing.assert_close(axes.T @ axes, torch.eye(12), atol=1e-4, rtol=0)
    torch.testing.assert_close(x @ axes @ axes.T, x, atol=1e-4, rtol=0)  # nothing of the images is lost


def test_without_batch_norm_all_features_share_one_scale():
    x = torch.tensor([[1.0, 100.0], [3.0, 300.0], [5.0, 200.0]])
    scaled, _ = probes.standardise(x, x, batch_norm=False)
    assert torch.allclose((scaled[:, 1] / scaled[:, 0])[[0, 2]].abs(), torch.tensor([50.0, 0.0]), atol=1e-4)
    assert torch.allclose(scaled.var(0, correction=0).mean(), torch.tensor(1.0))


def test_the_head_is_chosen_on_held_out_images_and_earlier_layers_can_win():
    """The classes are readable from the third layer of four and hidden in the last: the concatenation must be chosen."""
    (x, y), (test_x, test_y) = blobs(), blobs(seed=1)
    noise = torch.randn(300, 8, generator=torch.Generator().manual_seed(5))
    def stack(part):
        return torch.stack([noise, noise, part, noise], 1)  # [n, 4, 8]

    heads, chosen = probes.probe_heads(stack(x), y, stack(test_x), test_y)
    assert chosen.startswith("last4") and heads[chosen]["accuracy"] > 0.9 and heads["last"]["accuracy"] < 0.6
    swapped, same = probes.probe_heads(stack(x), y, stack(test_x), test_y.roll(1))
    assert same == chosen


def test_scores_are_those_of_a_case_done_by_hand():
    found = probes.scores(torch.tensor([0, 0, 1, 1, 1, 2]), torch.tensor([0, 0, 0, 1, 1, 1]), 4)  # class 3 is absent
    assert found["confusion"] == [[2, 1, 0, 0], [0, 2, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert found["per_class"] == pytest.approx([2 / 3, 2 / 3, 0, 0])
    assert found["macro_f1"] == pytest.approx((0.8 + 2 / 3) / 2)  # over the two classes that the labels hold


def test_precision_counts_the_neighbours_of_the_same_class():
    train_x = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.8, 0.2], [0.0, 1.0]])
    found = probes.retrieval_precision(
        train_x, torch.tensor([0, 0, 1, 1]), torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 0]), k=2)
    assert found == pytest.approx((1.0 + 0.0) / 2)  # first: both of class 0; second: the two of class 1


def test_more_labels_help_and_too_many_are_left_out():
    (x, y), (test_x, test_y) = blobs(600, distance=0.5), blobs(600, distance=0.5, seed=1)
    found = probes.low_shot(x, y, test_x, test_y, counts=(2, 20, 200, 201))
    assert found["per_class"] == [2, 20, 200] and found["mean"] == sorted(found["mean"]) and found["mean"][0] < found["mean"][2] - 0.1
    assert found["std"][2] < found["std"][0]  # with all the images only the choice of the strength is left to chance


def test_folds_are_probed_one_by_one():
    (x, y), (test_x, test_y) = blobs(), blobs(seed=1)
    folds = [torch.arange(0, 150), torch.arange(150, 300)]
    found = probes.fold_accuracies(x, y, test_x, test_y, folds)
    assert found == [probes.linear_probe(x[fold], y[fold], test_x, test_y)["accuracy"] for fold in folds]


def test_cka_ignores_rotation_and_scale_and_is_near_zero_for_unrelated_features():
    x = torch.randn(500, 6, generator=torch.Generator().manual_seed(0))
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(1)))[0]
    assert probes.linear_cka(x, 3 * x @ rotation + 1) == pytest.approx(1)
    assert probes.linear_cka(x, torch.randn(500, 6, generator=torch.Generator().manual_seed(2))) < 0.05


def test_overlap_is_one_with_itself_and_chance_with_noise():
    x, y = (torch.randn(400, 8, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    assert probes.neighbour_overlap(x, x) == 1 and probes.neighbour_overlap(x, y) == pytest.approx(10 / 399, abs=0.02)


def test_the_attentive_probe_finds_the_one_patch_that_holds_the_class_and_the_average_hides():
    """One of 16 patches, marked and elsewhere each time, holds the class; the others hold noise, whose mean drowns it."""
    def tokens(seed, n=600):
        generator = torch.Generator().manual_seed(seed)
        labels = torch.arange(n) % 3
        x = 3 * torch.randn(n, 16, 8, generator=generator)
        where = torch.randint(16, (n,), generator=generator)
        x[torch.arange(n), where] = 6 * torch.eye(8)[labels] + 6 * torch.eye(8)[7]
        x[..., 7] = torch.where(torch.arange(16) == where[:, None], 6.0, -1.0)
        return x, labels

    (x, y), (test_x, test_y) = tokens(0), tokens(1)
    average = probes.linear_probe(x.mean(1), y, test_x.mean(1), test_y)["accuracy"]
    assert probes.attentive_probe(x, y, test_x, test_y, epochs=60, rates=(3e-3, 1e-2))["accuracy"] > max(0.9, average + 0.1)


def test_the_attentive_head_does_not_care_for_the_order_of_the_patches():
    head, tokens = probes.AttentiveHead(8, 3, heads=2), torch.randn(4, 16, 8)
    torch.testing.assert_close(head(tokens), head(tokens[:, torch.randperm(16)]))


def tiny_encoder():
    torch.manual_seed(0)
    return models.Encoder("16x3x1", 8, 4)


def test_lower_layers_learn_more_slowly():
    """Layer-wise decay, as the paper's appendix has it: each layer at `decay` times the rate of the one above."""
    model = probes.Classifier(tiny_encoder(), 4)
    scales = {}
    for (name, _), group in zip(model.named_parameters(), probes.layer_groups(model, 0.5, 0.05)):
        scales[name] = group["scale"]
        assert (group["weight_decay"] > 0) == (group["params"][0].ndim > 1)
    assert scales["head.weight"] == 1 and scales["encoder.norm.weight"] == 1
    assert scales["encoder.blocks.2.mlp.0.weight"] == 0.5 and scales["encoder.blocks.0.mlp.0.weight"] == 0.125
    assert scales["encoder.patch_embed.project.weight"] == 0.0625


def test_each_layer_learns_at_its_share_of_the_rate(monkeypatch):
    """What the optimizer is given, at every step of a training."""
    rates = []

    class Watched(torch.optim.AdamW):
        def step(self):
            rates.append([group["lr"] for group in self.param_groups])
            super().step()

    monkeypatch.setattr(torch.optim, "AdamW", Watched)
    model, images = probes.Classifier(tiny_encoder(), 4), torch.randn(256, 3, 8, 8)
    groups = probes.layer_groups(model, 0.5, 0.05)
    probes.train_head(model, groups, lambda order, size, _: images[order].split(size), torch.arange(256) % 4, 10, 1e-3, 0.0, 0)
    head = [name for name, _ in model.named_parameters()].index("head.weight")
    assert len(rates) == 20 and max(step[head] for step in rates) == pytest.approx(1e-3, rel=0.03)  # the cosine has begun: 2.4% below
    for step in rates:
        assert step == pytest.approx([step[head] * group["scale"] for group in groups])


def test_fine_tuning_learns_what_frozen_features_do_not_hold_and_leaves_the_encoder_alone():
    """The class is which of four brightnesses the top left patch has: easy to learn, and lost in a random encoder's average."""
    def brightness(n, seed):
        generator = torch.Generator().manual_seed(seed)
        pictures = torch.randint(0, 256, (n, 3, 8, 8), generator=generator, dtype=torch.uint8)
        labels = torch.arange(n) % 4
        pictures[:, :, :4, :4] = (labels * 70 + 20).to(torch.uint8)[:, None, None, None]
        return data.ImageDataset("toy", pictures, labels, None, (0.5,) * 3, (0.25,) * 3)

    encoder = tiny_encoder()
    before = [p.clone() for p in encoder.parameters()]
    found = probes.fine_tune(encoder, brightness(240, 0), brightness(100, 1), 8, torch.device("cpu"), epochs=30, rates=(4e-3, 8e-3),
                             crop_scale=(1.0, 1.0), flip=False)
    assert found["accuracy"] > 0.9 and found["rate"] in (4e-3, 8e-3)
    assert all(torch.equal(p, old) for p, old in zip(encoder.parameters(), before))
    again = probes.predict(found["model"], data.batches(brightness(100, 1), 50, 8))
    assert torch.equal(again, found["predictions"])  # the classifier that comes back is the one that was judged
