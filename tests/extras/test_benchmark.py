"""Claims about the benchmark: its FLOPs are those that torch counts, its utilisation is the product it says, wrong use is refused."""

import json
import math

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from extras import benchmark
import config as settings
from extras import methods
import models
from bench import peers
import train
from config import METHODS, UsageError, from_preset

TINY = ["--encoder", "16x2x1", "--predictor", "8x1x1", "--batch-size", "16", "--device", "cpu", "--synthetic", "--seconds", "0.01"]


@pytest.fixture(autouse=True)
def few(monkeypatch):
    monkeypatch.setattr("support.shapes.COUNT", {"train": 400, "test": 200})
    monkeypatch.setattr("support.shapes.make.__defaults__", (100,))
    monkeypatch.setitem(benchmark.MATRICES, "cpu", (32, 64))


def counted(config, axes, classes):
    """FLOPs an image that torch counts in a forward and backward pass, and the tokens that the batch had, padded.

    Attention is computed by its "math" kernel, as two matrix multiplications: of the fused kernel for CPUs torch counts nothing, and of
    those for GPUs a backward pass of five multiplications, since it computes the scores again.
    """
    B, model = 4, methods.build(config, channels=2, axes=axes, classes=classes).train()
    images = torch.randn(B, 2, *(config.image_size,) * axes)
    masks = model.masking(B, torch.Generator().manual_seed(0)) if config.method != "supervised" else None  # a small product, not counted
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        if config.method == "supervised":
            tokens, loss = (), model(images, torch.zeros(B, dtype=torch.int64)).loss
        else:
            used = next(models.groups(masks))[1] if models.worth_grouping(masks) else masks  # of 4, one group
            tokens = torch.full((B,), used.context.shape[1]).double(), torch.full(used.targets.shape[:2], used.targets.shape[2]).double()
            loss = model(images, masks).loss
        loss.backward()
    return counter.get_total_flops() / B, tokens


FLAT = [*METHODS, "ijepa truncate", "ijepa context_size", *(f"{method} registers" for method in METHODS)]
VOLUMES = [method for method in FLAT if "raster" not in method]  # which are for flat images


@pytest.mark.parametrize("method,axes", [*((method, 2) for method in FLAT), *((method, 3) for method in VOLUMES)])
def test_the_flops_counted_from_the_shapes_are_those_that_torch_counts(method, axes):
    """Equal, with no tolerance: both count the same whole numbers, and sums of these below 2**53 are exact."""
    method, *more = method.split()
    changes = {"truncate": {"mask_mode": "truncate"}, "context_size": {"context_size": 3}, "registers": {"registers": 2}}
    changes = changes[more[0]] if more else {}
    config = from_preset("shapes", method=method, image_size=16, encoder="24x2x2x50", predictor="12x2x3", batch_size=4,
                         **{"context_size": 0, "min_keep": 1, **changes})
    flops, tokens = counted(config, axes, classes=5)
    assert benchmark.step_flops(config, {"axes": axes, "channels": 2, "classes": 5}, *tokens) == flops


def test_without_the_stop_gradient_the_target_encoder_costs_three_times_as_much():
    """Forward only with it; without, the gradients of weights and inputs too. The patch embedding has no gradient of inputs."""
    about, tokens = {"axes": 2, "channels": 3, "classes": 0}, (torch.tensor([12.0]), torch.full((1, 4), 6.0))
    encoder, N, embed = (64, 3, 1, 4.0), 36, 2 * 36 * 48 * 64
    with_it, without = (benchmark.step_flops(from_preset("shapes", stop_gradient=stop), about, *tokens) for stop in (True, False))
    assert without - with_it == 2 * benchmark.blocks_flops(encoder, N) + embed


def test_attention_is_counted_image_by_image():
    """It grows with the square of the tokens, so two images of 10 and 30 cost more than two of 20."""
    config, about, targets = from_preset("shapes"), {"axes": 2, "channels": 3, "classes": 0}, torch.full((2, 4), 6.0)
    uneven, even = (benchmark.step_flops(config, about, torch.tensor(context), targets) for context in ([10.0, 30.0], [20.0, 20.0]))
    variance = 10**2
    # FLOPs of attention for a squared token: width, depth, target blocks; the predictor's last block has 6 queries, so no squares.
    encoder, predictor = 4 * 64 * 3, 4 * 32 * (2 - 1) * 4
    assert uneven - even == 3 * variance * (encoder + predictor)


@pytest.mark.parametrize("flags,waste", [(["--context-size", "0"], True), (["--context-size", "6", "--mask-mode", "truncate"], False)])
def test_padding_is_wasted_and_a_truncated_batch_of_fixed_contexts_has_none(flags, waste):
    config = settings.from_arguments(settings.parser("").parse_args(flags))
    model, generator = methods.build(config), torch.Generator().manual_seed(0)
    found = benchmark.work(config, {"axes": 2, "channels": 3, "classes": 0}, model, generator)
    assert (found["padding_waste"] > 0.05) if waste else (found["padding_waste"] == 0 and found["useful"] == found["spent"])
    assert (found["tokens"]["real"] != found["tokens"]["padded"]) == waste


@pytest.mark.parametrize("flags", [[], ["--method", "mae"], ["--method", "supervised"], ["--precision", "bf16", "--accumulation", "2"]])
def test_what_is_measured_is_written_as_json_and_utilisation_is_the_product_it_says(tmp_path, capsys, flags):
    context = [] if "--method" in flags else ["--context-size", "6"]
    benchmark.main(["--preset", "shapes", "--json", str(tmp_path / "speed.json"), *TINY, *flags, *context])
    found = json.loads((tmp_path / "speed.json").read_text())
    assert set(found) == {"command", "date", "settings", "hardware", "data", "precision", "images_a_step", "train_step", "memory",
                          "data_path", "masks", "flops_an_image", "matmul", "utilisation"}
    assert {"device", "name", "threads", "torch"} <= set(found["hardware"])
    low, high = found["train_step"]["quartiles"]
    assert 0 < low <= found["train_step"]["images_per_second"] <= high and found["train_step"]["calls"] >= 5
    for name, value in found["utilisation"].items():
        product = found["flops_an_image"][name] * found["train_step"]["images_per_second"] / found["matmul"]["flops_per_second"]
        assert math.isclose(value, product, rel_tol=1e-12) and value > 0
    assert (found["masks"] is None) == ("supervised" in flags) and (not found["masks"] or found["masks"]["images_per_second"] > 0)
    assert found["memory"]["bytes"] is None or found["memory"]["bytes"] > 1e7  # Python alone takes more
    precisions = ("bf16 autocast", "bfloat16") if "bf16" in flags else ("fp32", "float32")
    assert (found["precision"], found["matmul"]["precision"]) == precisions
    assert found["images_a_step"] == (32 if "--accumulation" in flags else 16)
    out = capsys.readouterr().out
    assert f"{found['train_step']['images_per_second']:,.1f}" in out and f"{found['utilisation']['useful']:.1%}" in out


@pytest.mark.parametrize("preset,changes,side", [
    ("shapes", {}, 24), ("cifar10", {}, 32), ("stl10-vit-base", {"accumulation": 32}, 96), ("imagenet-vit-huge", {"image_size": 28}, 28)])
def test_random_images_are_as_large_as_those_of_the_data_set_and_enough_for_a_step(preset, changes, side):
    config = from_preset(preset, **changes)
    dataset = benchmark.synthetic(config)
    assert dataset.images.shape[1:] == (3, side, side) and dataset.images.dtype == torch.uint8 and len(dataset.labels) == len(dataset)
    kept, _ = train.hold_out(config, len(dataset))
    assert len(kept) >= config.batch_size * config.accumulation


def test_the_data_set_itself_is_measured_where_it_is_there(capsys):
    benchmark.main(["--preset", "shapes", *[flag for flag in TINY if flag != "--synthetic"]])
    assert capsys.readouterr().out.startswith("shapes ·")


@pytest.mark.parametrize("flags,words", [
    (["--preset", "shape"], "--preset is shape: choose one of shapes, shapes3d"),
    (["--bath-size", "3"], "nearest: --batch-size"),
    (["--seconds", "0"], "--seconds is 0.0: it must be above 0"),
    (["--json", "nowhere/speed.json"], "--json is nowhere/speed.json: there is no folder nowhere"),
    (["--batch-size", "500"], "--batch-size is 500"),
    (["--batch-size", "2000000000"], "GB of memory"),
    (["--dataset", "nowhere/images"], "neither a folder nor an .npz"),
])
def test_wrong_use_is_refused_in_a_line(flags, words):
    with pytest.raises(UsageError, match=words) as refusal:
        benchmark.main(["--device", "cpu", *flags])
    assert "\n" not in str(refusal.value)


def test_a_batch_that_does_not_fit_is_said_in_a_line(monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr("models.IJEPA.forward", full)
    with pytest.raises(UsageError, match="a batch of 16 images does not fit in the memory of cpu; lower --batch-size"):
        benchmark.main(["--preset", "shapes", *TINY])


# --- the masks of the codes that peers.py compares with ---------------------------------------------------------------------------


def test_the_official_masks_become_ours_by_hand():
    """A list of [B, Nc], one for each context block, and one of [B, Nt] for each target block: here B = 2, M = 3."""
    context = torch.tensor([[0, 1, 4], [2, 3, 7]])
    targets = [torch.tensor([[5, 6], [8, 9]]), torch.tensor([[9, 10], [0, 1]]), torch.tensor([[13, 14], [4, 5]])]
    masks = peers.from_official([context], targets)
    assert torch.equal(masks.context, context) and masks.context_valid is None and masks.targets_valid is None
    assert masks.targets.tolist() == [[[5, 6], [9, 10], [13, 14]], [[8, 9], [0, 1], [4, 5]]]


def test_one_mask_for_the_whole_batch_becomes_ours_by_hand():
    """Lists of patches, the blocks of different lengths: the shorter one is padded, and every image has the same."""
    masks = peers.from_homemade([0, 3, 5], [[1, 2], [6, 7, 8]], B=2)
    assert masks.context.tolist() == [[0, 3, 5], [0, 3, 5]] and masks.context_valid is None
    assert masks.targets.tolist() == [[[1, 2, 0], [6, 7, 8]]] * 2
    assert masks.targets_valid.tolist() == [[[True, True, False], [True, True, True]]] * 2
    context, targets = masks.maps(9)
    assert context.sum(1).tolist() == [3, 3] and targets.sum(2).tolist() == [[2, 3], [2, 3]]


def test_peers_needs_a_folder_to_compare_with(tmp_path):
    with pytest.raises(UsageError, match="--official FOLDER or --homemade FOLDER"):
        peers.main([])
    with pytest.raises(UsageError, match="--official is .*: it holds no src/models/vision_transformer.py"):
        peers.main(["--official", str(tmp_path)])
