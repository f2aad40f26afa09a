"""Claims about the other probes: each finds what is there, and no test label chooses anything."""

import json

import pytest
import torch

import data
import evaluate
import models
import train
from config import UsageError, from_preset
from extras import probes, trained_heads
from models import patchify
from test_evaluate import blobs, noise

# --- the paper's four heads -----------------------------------------------------------------------


def test_layers_are_each_blocks_normed_mean_token_and_the_last_is_the_feature():
    encoder, dataset = models.Encoder(16, 3, 2, 8, 4).eval(), noise()
    x = probes.layer_features(encoder, dataset, 8, count=4)  # four asked for, three there
    assert x.shape == (40, 3, 16)
    torch.testing.assert_close(x[:, -1], evaluate.features(encoder, dataset, 8))
    shorter = models.Encoder(16, 2, 2, 8, 4)
    shorter.load_state_dict({key: value for key, value in encoder.state_dict().items()
                             if not key.startswith("blocks.2")})
    torch.testing.assert_close(x[:, 1], evaluate.features(shorter, dataset, 8))
    assert not any(block._forward_hooks for block in encoder.blocks)


def test_without_batch_norm_all_features_share_one_scale():
    x = torch.tensor([[1.0, 100.0], [3.0, 300.0], [5.0, 200.0]])
    scaled, _ = probes.one_scale(x, x)
    ratio = (scaled[:, 1] / scaled[:, 0])[[0, 2]].abs()
    torch.testing.assert_close(ratio, torch.tensor([50.0, 0.0]))
    torch.testing.assert_close(scaled.var(0, correction=0).mean(), torch.tensor(1.0))


def test_the_head_is_chosen_on_held_out_images_and_earlier_layers_can_win():
    """The classes show in the third layer of four and are hidden in the last."""
    (x, y), (test_x, test_y) = blobs(), blobs(seed=1)
    other = torch.randn(300, 8, generator=torch.Generator().manual_seed(5))

    def layers(part):
        return torch.stack([other, other, part, other], 1)  # [n, 4, 8]

    heads, chosen = probes.probe_heads(layers(x), y, layers(test_x), test_y)
    assert list(heads) == ["last", "last+bn", "last4", "last4+bn"]
    assert chosen.startswith("last4") and heads[chosen]["accuracy"] > 0.9
    assert heads["last"]["accuracy"] < 0.6
    _, same = probes.probe_heads(layers(x), y, layers(test_x), test_y.roll(1))
    assert same == chosen


# --- other ways to read features ------------------------------------------------------------------


def test_precision_counts_the_neighbors_of_the_same_class():
    train_x = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.8, 0.2], [0.0, 1.0]])
    found = probes.retrieval_precision(train_x, torch.tensor([0, 0, 1, 1]), torch.eye(2),
                                       torch.tensor([0, 0]), k=2)
    assert found == pytest.approx((1.0 + 0.0) / 2)  # both of class 0; the two of class 1


def test_more_labels_help_and_too_many_are_left_out():
    train_set, test_set = blobs(600, distance=1.0), blobs(600, distance=1.0, seed=1)
    found = probes.low_shot(*train_set, *test_set, counts=(2, 20, 200, 201))
    assert found["per_class"] == [2, 20, 200] and found["mean"] == sorted(found["mean"])
    assert found["mean"][0] < found["mean"][2] - 0.1
    assert found["std"][2] < found["std"][0]  # with all images only the strength is left to chance


def test_cka_ignores_rotation_and_scale_and_is_near_zero_for_unrelated_features():
    x, y, other = (torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
                   for seed, shape in enumerate(((500, 6), (500, 6), (6, 6))))
    rotation = torch.linalg.qr(other)[0]
    assert probes.linear_cka(x, 3 * x @ rotation + 1) == pytest.approx(1)
    assert probes.linear_cka(x, y) < 0.05


def test_overlap_is_one_with_itself_and_chance_with_noise():
    x, y = (torch.randn(400, 8, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    assert probes.neighbor_overlap(x, x) == 1
    assert probes.neighbor_overlap(x, y) == pytest.approx(10 / 399, abs=0.02)


# --- heads that are trained step by step ----------------------------------------------------------


def test_the_attentive_probe_finds_the_one_patch_that_holds_the_class_and_the_average_hides():
    """One of 16 patches, marked and elsewhere each time, holds the class; noise drowns its mean."""

    def tokens(seed, n=600):
        generator = torch.Generator().manual_seed(seed)
        labels = torch.arange(n) % 3
        x = 3 * torch.randn(n, 16, 8, generator=generator)
        where = torch.randint(16, (n,), generator=generator)
        x[torch.arange(n), where] = 6 * torch.eye(8)[labels]
        x[..., 7] = torch.where(torch.arange(16) == where[:, None], 6.0, -1.0)
        return x, labels

    (x, y), (test_x, test_y) = tokens(0), tokens(1)
    average = evaluate.linear_probe(x.mean(1), y, test_x.mean(1), test_y)["accuracy"]
    found = probes.attentive_probe(x, y, test_x, test_y, epochs=60, rates=(3e-3, 1e-2))
    assert found["accuracy"] > max(0.9, average + 0.1)


def test_the_attentive_head_ignores_the_order_of_the_patches():
    head, tokens = trained_heads.AttentiveHead(8, 3, heads=2), torch.randn(4, 16, 8)
    torch.testing.assert_close(head(tokens), head(tokens[:, torch.randperm(16)]))


def tiny_encoder():
    torch.manual_seed(0)
    return models.Encoder(16, 3, 1, 8, 4)


def test_lower_layers_learn_more_slowly(monkeypatch):
    """Each layer at `decay` times the rate of the one above (appendix A.2), at every step."""
    rates = []

    class Watched(torch.optim.AdamW):
        def step(self):
            rates.append([group["lr"] for group in self.param_groups])
            super().step()

    monkeypatch.setattr(torch.optim, "AdamW", Watched)
    model, images = trained_heads.Classifier(tiny_encoder(), 4), torch.randn(256, 3, 8, 8)
    groups, scales = trained_heads.layer_groups(model, 0.5, 0.05), {}
    for (name, parameter), group in zip(model.named_parameters(), groups):
        scales[name] = group["scale"]
        assert group["params"] == [parameter]
        assert (group["weight_decay"] > 0) == (parameter.ndim > 1)
    assert scales["head.weight"] == 1 and scales["encoder.norm.weight"] == 1
    assert scales["encoder.blocks.2.mlp.0.weight"] == 0.5
    assert scales["encoder.blocks.0.mlp.0.weight"] == 0.125
    assert scales["encoder.patch_embed.project.weight"] == 0.0625
    trained_heads.train_head(model, groups, lambda order, size, _: images[order].split(size),
                             torch.arange(256) % 4, 10, 1e-3, 0.0, 0)
    head = list(scales).index("head.weight")
    assert len(rates) == 20 and max(step[head] for step in rates) == pytest.approx(1e-3)
    for step in rates:
        assert step == pytest.approx([step[head] * scale for scale in scales.values()])


def brightness(n, seed):
    """Images whose class is which of four brightnesses the top left patch has, the rest noise."""
    dataset = noise(n, seed=seed)
    dataset.images[:, :, :4, :4] = (dataset.labels * 70 + 20).byte()[:, None, None, None]
    return dataset


def test_fine_tuning_learns_what_frozen_features_do_not_hold_and_leaves_the_encoder_alone():
    encoder = tiny_encoder()
    before = [p.clone() for p in encoder.parameters()]
    found = probes.fine_tune(encoder, brightness(240, 0), brightness(100, 1), 8, epochs=30,
                             rates=(4e-3, 8e-3), crop_scale=(1.0, 1.0), flip=False)
    assert found["accuracy"] > 0.9 and found["rate"] in (4e-3, 8e-3)
    assert all(torch.equal(p, old) for p, old in zip(encoder.parameters(), before))
    again = trained_heads.predict(found["model"], data.batches(brightness(100, 1), 50, 8))
    assert torch.equal(again, found["predictions"])  # the model that comes back was judged


@pytest.mark.parametrize("n", (129, 145))  # of 145 the rate is chosen on 16, after 129
def test_fine_tuning_takes_any_number_of_images(n):
    """A last batch of one image has no statistics for batch norm."""
    assert int((~evaluate.held_out(noise(145).labels, 0)).sum()) == 129
    found = probes.fine_tune(tiny_encoder(), noise(n), noise(20), 8, epochs=1, rates=(1e-3,))
    assert len(found["predictions"]) == 20


# --- the command ----------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run folder that evaluate.py has evaluated; the data is labeled noise with two folds."""

    def load(name, split, *where):
        dataset = noise(200, seed=len(split))
        dataset.folds = [torch.arange(100), torch.arange(100, 200)] if split == "train" else None
        return dataset

    out = tmp_path / "run"
    config = from_preset(image_size=8, patch_size=2, encoder="16x2x2", predictor="16x1x2",
                         context_size=0, batch_size=32, max_steps=1, device="cpu", out=str(out))
    train.train(config, dataset=noise(200))
    monkeypatch.setattr(data, "load", load)
    evaluate.main([str(out), "--train-images", "0", "--seed", "3"])
    return out


def written(run):
    return json.loads((run / "evaluation.json").read_text())


def test_the_command_adds_to_what_evaluate_wrote(run, capsys):
    before = written(run)
    probes.main([str(run)])
    found, printed = written(run), capsys.readouterr().out
    for name, row in before["features"].items():
        assert row.items() <= found["features"][name].items()
        added = found["features"][name]
        assert added["best"] == added["heads"][added["head"]]["accuracy"]
        assert added["heads"]["last+bn"]["accuracy"] == row["linear"]  # the same probe and images
        assert len(added["folds"]) == 2 and 0 < added["precision@5"] < 1
    shots = found["low_shot"]
    assert shots["per_class"] == [2, 5, 10, 20, 50] and shots["full"] == 50
    assert shots["scores"].keys() == {"target", "random", "pixels"}
    assert len(shots["scores"]["target"]["mean"]) == len(shots["scores"]["target"]["std"]) == 5
    assert found["commands"][-1] == f"python -m extras.probes {run}"
    assert "best head" in printed and "ten folds" in printed and "labels of each class" in printed


def test_no_more_layers_are_kept_than_are_read(run, monkeypatch):
    """The curve of few labels reads the last; four of a ViT would take four times the memory."""
    kept, read = [], probes.layer_features
    monkeypatch.setattr(probes, "layer_features",
                        lambda *given: kept.append(read(*given)) or kept[-1])
    monkeypatch.setattr(probes, "low_shot",
                        lambda *given: {"per_class": [2], "mean": [0.5], "std": [0.1]})
    probes.main([str(run), "--few-labels"])
    assert {x.shape[1] for x in kept} == {1}


def test_each_flag_adds_its_part_only(run, capsys):
    probes.main([str(run), "--attentive", "1", "--finetune", "1", "--compare", str(run)])
    found, printed = written(run), capsys.readouterr().out
    assert found["attentive"].keys() == found["fine_tuned"].keys() == {"target", "random"}
    assert found["attentive"]["target"].keys() == {"accuracy", "held_out_accuracy", "rate"}
    alike = found["compare"]
    assert alike[str(run)] == pytest.approx({"cka": 1, "neighbor_overlap": 1})  # with itself
    assert alike["untrained"]["cka"] < 1
    assert "attentive" in printed and "fine-tuned" in printed and "CKA 1.00" in printed
    assert "low_shot" not in found


def test_evaluate_comes_first(tmp_path, run):
    with pytest.raises(UsageError, match="first: python evaluate.py"):
        probes.main([str(tmp_path)])
    path = run / "evaluation.json"
    path.write_text(json.dumps({**written(run), "features": {}}))
    with pytest.raises(UsageError, match="without labels"):
        probes.main([str(run)])


def test_a_patch_lies_on_the_shape_if_half_of_it_does():
    mask = torch.zeros(1, 4, 4, dtype=torch.bool)
    mask[0, :2, :3] = True  # the first patch whole, the second half
    mask[0, 2, 0] = True  # a quarter of the third
    assert probes.patch_cover(mask, 2).tolist() == [[True, True, False, False]]
    a, b = torch.tensor([True, True, False]), torch.tensor([True, False, True])
    assert probes.intersection_over_union(a, b) == pytest.approx(1 / 3)


def test_segmentation_reads_the_patch_that_it_is_asked_about(monkeypatch):
    """Confetti has the ground's mean, so single pixels do not tell it, but their spread does: from
    an "encoder" that gives each patch's deviation the probe finds the shape, and the predictor that
    answers for the wrong places does not."""
    monkeypatch.setattr("support.shapes.COUNT", {"train": 400, "test": 400})
    monkeypatch.setattr("support.shapes.make.__defaults__", (400,))
    model, masking = train.build(from_preset("shapes"))

    class Spread(torch.nn.Module):
        patch_size = 4

        def forward(self, images, indices=None, valid=None):
            spread = patchify(images, 4).std(dim=-1)  # [B, N]
            return torch.stack([spread, 1 - spread, spread / 2, spread - spread], dim=-1)

    model.target_encoder = Spread()
    model.make_targets = lambda images, masks: (torch.zeros(*masks.targets.shape, 4), None)
    model.predictor.project = torch.nn.Linear(32, 4)  # answers at random
    found = probes.segmentation(model, masking, Spread(), n=400)
    assert found["target"] == found["random"] > 0.85 and found["pixels"] < 0.6
    assert 0 <= found["predicted"] < 0.6


def test_segmentation_needs_the_images_whose_masks_are_known(run):
    path = run / "evaluation.json"
    path.write_text(json.dumps({**written(run), "dataset": "cifar10"}))
    with pytest.raises(UsageError, match="needs the synthetic shapes"):
        probes.main([str(run), "--segment"])
