"""Claims about the benchmark: its FLOPs are those that torch counts."""

import json
import math

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import data
import train
from bench import peers
from config import UsageError, from_preset
from extras import benchmark

TINY = ["--encoder", "16x2x1", "--predictor", "8x1x1", "--batch-size", "16", "--device", "cpu",
        "--synthetic", "--seconds", "0.01"]


@pytest.fixture(autouse=True)
def small_matrices(monkeypatch):
    monkeypatch.setitem(benchmark.MATRICES, "cpu", (32, 64))


@pytest.mark.parametrize("axes", [2, 3])
@pytest.mark.parametrize("context_size", [0, 3])
def test_the_flops_counted_from_the_shapes_are_those_that_torch_counts(axes, context_size):
    """Equal, with no tolerance: both are whole numbers below 2**53.

    Attention is computed by torch's "math" kernel, as two matrix products: of its fused kernel for
    CPUs torch counts nothing.
    """
    B, config = 4, from_preset("shapes", image_size=16, encoder="24x2x2", predictor="12x2x3",
                               context_size=context_size)
    model, masking = train.build(config, 2, axes)
    images = torch.randn(B, 2, *(16,) * axes)
    masks = masking(B, torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(images, masks).loss.backward()
    context = torch.full((B,), masks.context.shape[1]).double()
    targets = torch.full(masks.targets.shape[:2], masks.targets.shape[2]).double()
    flops = benchmark.step_flops(config, 2, axes, context, targets)
    assert flops * B == counter.get_total_flops()


def test_attention_is_counted_image_by_image():
    """It grows with the square of the tokens: images of 10 and 30 cost more than two of 20."""
    config, targets = from_preset("shapes"), torch.full((2, 4), 6.0)
    uneven, even = (benchmark.step_flops(config, 3, 2, torch.tensor(context), targets)
                    for context in ([10.0, 30.0], [20.0, 20.0]))
    variance = 10**2
    encoder, predictor = 4 * 64 * 3, 4 * 32 * 2 * 4  # of a squared token: width, depth, blocks
    assert uneven - even == 3 * variance * (encoder + predictor)


def test_padding_is_counted_as_spent_and_not_as_useful():
    config = from_preset("shapes", context_size=0)
    dataset, (_, masking) = benchmark.synthetic(config), train.build(config)
    found = benchmark.work(config, dataset, masking)
    assert found["padding"] == 1 - found["useful"] / found["spent"] > 0.05
    useful, spent = found["tokens"]["useful"], found["tokens"]["spent"]
    assert useful["context"] < spent["context"] and useful["target_block"] < spent["target_block"]
    config = from_preset("shapes", context_size=6)
    found = benchmark.work(config, dataset, train.build(config)[1])
    assert found["tokens"]["useful"]["context"] == found["tokens"]["spent"]["context"] == 6


@pytest.mark.parametrize("flags", [
    ["--precision", "fp32"], ["--precision", "bf16", "--accumulation", "2"]])
def test_what_is_measured_is_written_as_json(tmp_path, capsys, flags):
    benchmark.main(["--json", str(tmp_path / "speed.json"), *TINY, *flags])
    found = json.loads((tmp_path / "speed.json").read_text())
    step = found["train_step"]
    low, high = step["quartiles"]
    assert 0 < low <= step["images_per_second"] <= high
    for name, value in found["utilization"].items():
        product = (found["flops_an_image"][name] * step["images_per_second"]
                   / found["matmul"]["flops_per_second"])
        assert math.isclose(value, product, rel_tol=1e-12) and value > 0
    assert found["masks"]["images_per_second"] > 0 and found["data_path"]["images_per_second"] > 0
    assert found["memory"]["bytes"] is None or found["memory"]["bytes"] > 1e7  # Python alone
    dtype = "bfloat16" if "bf16" in flags else "float32"
    assert found["precision"] == found["matmul"]["precision"] == dtype
    assert found["images_a_step"] == (32 if "--accumulation" in flags else 16)
    out = capsys.readouterr().out
    assert f"{step['images_per_second']:,.1f}" in out
    assert f"{found['utilization']['useful']:.1%}" in out


@pytest.mark.parametrize("preset,changes,shape", [
    ("shapes", {}, (3, 24, 24)), ("shapes3d", {}, (1, 16, 16, 16)),
    ("stl10-vit-base", {"accumulation": 32}, (3, 96, 96)),
    ("imagenet-vit-huge", {"image_size": 28}, (3, 28, 28))])
def test_random_images_are_like_those_of_the_data_set_and_enough_for_a_step(preset, changes, shape):
    config = from_preset(preset, **changes)
    dataset = benchmark.synthetic(config)
    assert dataset.images.shape[1:] == shape and dataset.images.dtype == torch.uint8
    kept, _ = train.hold_out(config, len(dataset))
    assert len(kept) >= config.batch_size * config.accumulation


@pytest.fixture
def few_images(monkeypatch):
    """A data set of 64 random images, whatever is asked for."""
    images = torch.randint(0, 256, (64, 3, 24, 24), dtype=torch.uint8)
    dataset = data.ImageDataset("shapes", images, None, None, (0.5,) * 3, (0.3,) * 3)
    monkeypatch.setattr(data, "load", lambda *_: dataset)


def test_the_data_set_itself_is_measured_without_synthetic(capsys, few_images):
    benchmark.main([flag for flag in TINY if flag != "--synthetic"])
    assert capsys.readouterr().out.startswith("shapes ·")


@pytest.mark.parametrize("flags,words", [
    (["--bath-size", "3"], "did you mean --batch-size"),
    (["--seconds", "0"], "--seconds is 0.0, expected more than 0"),
    (["--json", "nowhere/speed.json"], "there is no folder nowhere"),
    (["--batch-size", "500", "--accumulation", "9"], "--batch-size is 500"),
])
def test_wrong_use_is_one_line(flags, words, few_images):
    with pytest.raises(UsageError, match=words) as error:
        benchmark.main(["--device", "cpu", *flags])
    assert "\n" not in str(error.value)


# --- the masks of the codes that bench/peers.py compares with -------------------------------------


def test_the_official_masks_become_ours_by_hand():
    """A list of [B, Nc], one for each context block, and of [B, Nt], one for each target block."""
    context = torch.tensor([[0, 1, 4], [2, 3, 7]])  # B = 2, M = 3
    targets = [torch.tensor([[5, 6], [8, 9]]), torch.tensor([[9, 10], [0, 1]]),
               torch.tensor([[13, 14], [4, 5]])]
    masks = peers.from_official([context], targets)
    assert torch.equal(masks.context, context)
    assert masks.context_valid.all() and masks.targets_valid.all()
    assert masks.targets.tolist() == [[[5, 6], [9, 10], [13, 14]], [[8, 9], [0, 1], [4, 5]]]


def test_one_mask_for_the_whole_batch_becomes_ours_by_hand():
    """Lists of patches, the blocks of different lengths: the shorter one is padded."""
    masks = peers.from_homemade([0, 3, 5], [[1, 2], [6, 7, 8]], B=2)
    assert masks.context.tolist() == [[0, 3, 5], [0, 3, 5]] and masks.context_valid.all()
    assert masks.targets.tolist() == [[[1, 2, 0], [6, 7, 8]]] * 2
    assert masks.targets_valid.tolist() == [[[True, True, False], [True, True, True]]] * 2
