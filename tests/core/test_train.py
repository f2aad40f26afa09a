"""Claims about training: schedules, the step, the order of the data, resume, and how a run ends."""

import csv
import json
import math
import os
import pathlib
import signal

import pytest
import torch

import data
import train
from config import PRESETS, Config, UsageError, from_preset
from support import checkpoint

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def few_shapes(monkeypatch):
    """64 training images, made at once: these tests are about the loop, not about learning."""
    monkeypatch.setattr("support.shapes.COUNT", {"train": 64, "test": 64})
    monkeypatch.setattr("support.shapes.make.__defaults__", (64,))


def tiny(out, **changes):
    """A run of seconds: 58 images to train on, 3 steps an epoch."""
    return from_preset("shapes", **{"encoder": "16x1x2", "predictor": "8x1x2", "batch_size": 16,
                                    "epochs": 3, "device": "cpu", "precision": "fp32",
                                    "out": str(out), **changes})


def rows(folder):
    return list(csv.DictReader(open(folder / "metrics.csv")))


def weights(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)["model"]


def same_weights(one, other):
    one, other = weights(one), weights(other)
    return all(torch.equal(one[name], other[name]) for name in one)


# --- schedules ------------------------------------------------------------------------------------


def test_schedules_reach_their_ends():
    config = Config(lr_start=1e-4, lr=1e-3, lr_final=1e-6, warmup=0.1, weight_decay=0.04,
                    weight_decay_final=0.4, momentum=0.996, momentum_final=1.0)
    first, peak, last = (train.schedules(config, step, 1000) for step in (0, 100, 999))
    assert first == pytest.approx({"lr": 1e-4, "weight_decay": 0.04, "momentum": 0.996})
    assert peak["lr"] == pytest.approx(1e-3)
    assert last == pytest.approx({"lr": 1e-6, "weight_decay": 0.4, "momentum": 1.0})


def test_the_learning_rate_rises_once_and_falls_once_and_the_others_only_rise():
    config = from_preset("cifar10")
    values = [train.schedules(config, step, 400) for step in range(400)]
    rates = [v["lr"] for v in values]
    peak = rates.index(max(rates))
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    for name in ("weight_decay", "momentum"):
        assert [v[name] for v in values] == sorted(v[name] for v in values)


def test_schedules_count_optimizer_steps_not_forward_passes(tmp_path):
    """The same images in 4 accumulated passes of 4 or in one of 16: the same rates and momenta."""
    for name, split in (("one", {}), ("four", dict(batch_size=4, accumulation=4))):
        train.train(tiny(tmp_path / name, momentum_final=1.0, held_out=0, **split))
    one, four = rows(tmp_path / "one"), rows(tmp_path / "four")
    assert len(one) == 12  # 3 epochs of 64 images, 16 a step
    for column in ("step", "lr", "weight_decay", "momentum", "epoch"):
        assert [row[column] for row in one] == [row[column] for row in four]


def test_max_steps_fits_the_schedules_to_the_shorter_run(tmp_path):
    train.train(tiny(tmp_path, max_steps=5, momentum_final=1.0))
    last = rows(tmp_path)[-1]
    assert last["step"] == "5" and float(last["momentum"]) == 1.0
    assert float(last["lr"]) == pytest.approx(Config.lr_final)


# --- one step -------------------------------------------------------------------------------------


def one_step(config, batches=1):
    """The model after one step, what it was before, and what train_step returned."""
    model, masking = train.build(config)
    optimizer = train.build_optimizer(config, model)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    scaler = torch.amp.GradScaler("cpu", enabled=config.precision == "fp16")
    generator = torch.Generator().manual_seed(0)
    inputs = [(torch.randn(config.batch_size, 3, 24, 24, generator=generator),
               masking(config.batch_size, generator)) for _ in range(batches)]
    values = train.train_step(config, model.train(), optimizer, scaler, inputs, 0, 10)
    return model, before, values


def test_the_target_moves_by_the_momentum_towards_the_updated_context_encoder():
    model, before, values = one_step(tiny("-", momentum=0.9))
    context = model.context_encoder.state_dict()
    for name, target in model.target_encoder.state_dict().items():
        assert not torch.equal(context[name], before[f"context_encoder.{name}"])
        expected = 0.9 * before[f"target_encoder.{name}"] + 0.1 * context[name]
        assert torch.allclose(target, expected, atol=1e-6)
    assert values["momentum"] == 0.9


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_stays_close_to_fp32_and_keeps_the_weights_in_fp32(precision):
    """bfloat16 has 8 significant bits: the first loss agrees to a few parts in a hundred."""
    model, before, half = one_step(tiny("-", precision=precision))
    _, _, full = one_step(tiny("-", precision="fp32"))
    assert half["loss"].item() == pytest.approx(full["loss"].item(), rel=0.03)
    assert half["loss"] != full["loss"]
    assert half["grad_norm"].item() == pytest.approx(full["grad_norm"].item(), rel=0.05)  # unscaled
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert not torch.equal(model.predictor.mask_token, before["predictor.mask_token"])


@pytest.mark.parametrize("device, has, dtype", [
    ("cpu", None, torch.float32), ("cpu", "amx_tile", torch.bfloat16), ("mps", None, torch.float32),
    ("cpu", "avx512_bf16", torch.bfloat16), ("mps", "amx_tile", torch.float32),
    ("cuda", (9, 0), torch.bfloat16), ("cuda", (8, 0), torch.bfloat16),
    ("cuda", (7, 5), torch.float16), ("cuda", (7, 0), torch.float16)])
def test_precision_is_what_the_hardware_has(monkeypatch, device, has, dtype):
    """7.0 is a V100, 7.5 a T4 or RTX 20, 8.0 an A100, 9.0 an H100."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: has)
    for unit in ("amx_tile", "avx512_bf16"):
        monkeypatch.setattr(torch.cpu, f"_is_{unit}_supported", lambda unit=unit: has == unit,
                            raising=False)
    auto, asked = tiny("-", precision="auto"), tiny("-", precision="bf16")
    assert train.pick_precision(auto, torch.device(device)) == dtype
    assert train.pick_precision(asked, torch.device(device)) == torch.bfloat16


def test_a_torch_too_old_to_know_the_cpu_trains_in_float32(monkeypatch):
    for unit in ("amx_tile", "avx512_bf16"):
        monkeypatch.delattr(torch.cpu, f"_is_{unit}_supported", raising=False)
    assert train.pick_precision(tiny("-", precision="auto"), torch.device("cpu")) == torch.float32


def test_biases_norms_and_the_mask_token_are_not_decayed():
    model, _ = train.build(tiny("-"))
    decayed, spared = train.build_optimizer(tiny("-"), model).param_groups
    assert decayed["decayed"] and all(p.ndim == 2 for p in decayed["params"])
    assert not spared["decayed"] and all(p.ndim == 1 for p in spared["params"])
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(decayed["params"]) + len(spared["params"]) == len(trained)


def test_clipping_bounds_the_gradient_that_the_optimizer_sees():
    model, _, values = one_step(tiny("-", clip_grad=0.01))
    gradients = [p.grad.norm() for p in model.parameters() if p.grad is not None]
    assert values["grad_norm"] > 0.01  # as it was before
    assert torch.stack(gradients).norm().item() == pytest.approx(0.01, rel=1e-3)


def test_accumulated_gradients_are_the_mean_over_the_passes():
    config = tiny("-", batch_size=8)
    model, masking = train.build(config)
    generator = torch.Generator().manual_seed(0)
    batches = [(torch.randn(8, 3, 24, 24, generator=generator), masking(8, generator))
               for _ in range(2)]
    apart = [torch.autograd.grad(model(*batch).loss, model.predictor.mask_token)[0]
             for batch in batches]
    train.train_step(config, model, train.build_optimizer(config, model),
                     torch.amp.GradScaler("cpu", enabled=False), batches, 0, 10)
    assert torch.allclose(model.predictor.mask_token.grad, (apart[0] + apart[1]) / 2, atol=1e-6)


def test_the_loss_falls(tmp_path):
    train.train(tiny(tmp_path, epochs=30, lr=3e-3))
    losses = [float(row["loss"]) for row in rows(tmp_path)]
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])


# --- data order, resume ---------------------------------------------------------------------------


def test_every_epoch_shows_whole_batches_of_different_images_in_a_new_order():
    config, dataset = tiny("-", held_out=0), data.load("shapes")
    dataset.images[:] = torch.arange(64, dtype=torch.uint8)[:, None, None, None]
    _, masking = train.build(config)
    stream = train.batches_of(config, dataset, masking, torch.arange(64), "cpu",
                              torch.Generator().manual_seed(0), 0)
    seen = [torch.cat([next(stream)[0][:, 0, 0, 0] for _ in range(4)]) for _ in range(2)]
    assert len(seen[0].unique()) == 64
    assert torch.equal(seen[0].sort().values, seen[1].sort().values)
    assert not torch.equal(seen[0], seen[1])


def test_what_is_held_out_is_a_tenth_at_most_and_never_trained_on():
    kept, held = train.hold_out(from_preset("shapes"), 4000)
    assert len(held) == 400
    assert torch.equal(torch.cat([kept, held]).sort().values, torch.arange(4000))


def interrupt_at(monkeypatch, step, number=signal.SIGINT):
    """Send this process a signal when train_step is called for the given step."""
    original = train.train_step

    def interrupted(*arguments):
        if arguments[5] == step:
            os.kill(os.getpid(), number)
        return original(*arguments)

    monkeypatch.setattr(train, "train_step", interrupted)


@pytest.mark.parametrize("accumulation, number", [
    (1, signal.SIGINT), (2, signal.SIGTERM), (1, signal.SIGHUP), (1, signal.SIGUSR1)])
def test_a_stopped_run_resumes_bit_identical_to_an_uninterrupted_one(tmp_path, monkeypatch,
                                                                     accumulation, number):
    """Stopped in mid-epoch: crops, flips, masks, order, optimizer and schedules resume exactly."""
    changes = dict(crop_scale=(0.5, 1.0), flip=True, batch_size=8, accumulation=accumulation,
                   momentum_final=1.0)
    train.train(tiny(tmp_path / "whole", **changes))
    with monkeypatch.context() as patch:
        interrupt_at(patch, 4, number)
        with pytest.raises(SystemExit, match="130"):
            train.train(tiny(tmp_path / "halves", **changes))
    assert checkpoint.load(tmp_path / "halves")[1]["progress"]["step"] == 5
    train.main(["--out", str(tmp_path / "halves"), "--resume"])
    assert same_weights(tmp_path / "whole", tmp_path / "halves")
    for column in ("step", "loss", "lr", "target_std"):
        whole, halves = rows(tmp_path / "whole"), rows(tmp_path / "halves")
        assert [row[column] for row in whole] == [row[column] for row in halves]


def test_two_runs_with_one_seed_are_identical_and_another_seed_differs(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train.train(tiny(tmp_path / name, seed=seed, max_steps=3))
    assert same_weights(tmp_path / "a", tmp_path / "b")
    assert not same_weights(tmp_path / "a", tmp_path / "c")


def test_load_run_gives_back_the_trained_model(tmp_path):
    model = train.train(tiny(tmp_path, max_steps=2))
    loaded, masking, config, about = train.load_run(tmp_path)
    assert not loaded.training and config.encoder == "16x1x2" and about["name"] == "shapes"
    assert masking.grid == (6, 6) and about["progress"]["step"] == 2
    assert all(map(torch.equal, model.parameters(), loaded.parameters()))


def test_resume_refuses_other_settings_and_other_data_naming_them(tmp_path, monkeypatch):
    train.train(tiny(tmp_path, max_steps=2))
    with pytest.raises(UsageError, match="--lr was 0.003, now 0.1"):
        train.main(["--out", str(tmp_path), "--resume", "--lr", "0.1"])
    assert json.loads((tmp_path / "config.json").read_text())["lr"] == 0.003  # not the refused one
    monkeypatch.setattr("support.shapes.COUNT", {"train": 128, "test": 64})
    with pytest.raises(UsageError, match="its images was 64, now 128"):
        train.main(["--out", str(tmp_path), "--resume"])


def test_override_resumes_with_other_settings(tmp_path):
    train.train(tiny(tmp_path, max_steps=2))
    with pytest.raises(UsageError, match="--override is for --resume"):
        train.main(["--override"])
    train.main(["--out", str(tmp_path), "--resume", "--override", "--momentum", "0.5",
                "--max-steps", "5"])
    config, about, _ = checkpoint.load(tmp_path)
    assert config.momentum == 0.5 and about["progress"]["step"] == 5


def test_a_second_run_in_the_same_folder_is_refused_while_the_first_lives(tmp_path):
    with checkpoint.open_folder(tiny(tmp_path), resume=False):
        with pytest.raises(UsageError, match="another process is writing into"):
            train.train(tiny(tmp_path))
    train.train(tiny(tmp_path, max_steps=1))  # the lock is gone with its owner
    with pytest.raises(UsageError, match="already holds a run; resume it with --resume"):
        train.train(tiny(tmp_path))


# --- how a run tells, and how it ends -------------------------------------------------------------


def test_the_run_folder_and_the_first_and_last_line(tmp_path, capsys):
    train.train(tiny(tmp_path, max_steps=2))
    left = {p.name for p in tmp_path.iterdir()} - {".lock"}
    assert left == {"config.json", "metrics.csv", "checkpoint.pt", "encoder.pt"}
    assert json.loads((tmp_path / "config.json").read_text())["encoder"] == "16x1x2"
    first, last = capsys.readouterr().out.splitlines()
    for word in ("shapes: 58 images, 6 held out", "parameters", "2 steps of 16 images", "cpu"):
        assert word in first
    assert f"next: python evaluate.py {tmp_path}" in last


@pytest.mark.parametrize("last", [False, True])
def test_a_loss_that_is_nan_ends_the_run_and_the_last_good_checkpoint_is_kept_and_resumes(
        tmp_path, monkeypatch, last):
    """Whether it shows at a logged step or only in the weights of the last one."""
    whole, poisoned = 9, 8 if last else 5
    original = train.train_step

    def poison(config, model, optimizer, scaler, batches, step, total):
        if step == poisoned and not last:
            model.predictor.mask_token.data.fill_(math.nan)
        values = original(config, model, optimizer, scaler, batches, step, total)
        if step == poisoned and last:
            model.predictor.mask_token.data.fill_(math.nan)
        return values

    config = tiny(tmp_path, checkpoint_minutes=0.0)
    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", poison)
        what = "the weights are NaN or infinite" if last else "the loss is nan"
        with pytest.raises(UsageError, match=f"{what} at step {poisoned + 1}; .* keeps the "
                           "checkpoint of step .*--resume --override and a lower --lr"):
            train.train(config)
    kept = checkpoint.load(tmp_path)[2]
    assert 0 < kept["progress"]["step"] <= poisoned
    assert all(value.isfinite().all() for value in kept["model"].values())
    train.main(["--out", str(tmp_path), "--resume", "--override", "--lr", "0.001"])
    assert checkpoint.load(tmp_path)[1]["progress"]["step"] == whole


def test_nothing_saved_yet_is_said(tmp_path):
    with pytest.raises(UsageError, match="nothing was saved yet; start again with a lower --lr"):
        train.train(tiny(tmp_path, lr=1e30, lr_start=1e30))
    assert not (tmp_path / "checkpoint.pt").exists()


def test_nothing_reads_a_value_from_the_device_but_at_logged_steps(monkeypatch):
    """A read would make the host wait for a GPU; on the CPU we count them."""
    reads = []
    for name in ("item", "__float__", "__bool__", "tolist", "cpu"):
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda self, *given, name=name, original=original: (
            reads.append(name), original(self, *given))[1])
    config = tiny("-")
    model, masking = train.build(config)
    optimizer = train.build_optimizer(config, model)
    optimizer.step = lambda: None  # torch's own counts its steps on the CPU, whatever the device
    generator = torch.Generator().manual_seed(0)
    batch = torch.randn(16, 3, 24, 24), masking(16, generator)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    reads.clear()
    train.train_step(config, model, optimizer, scaler, [batch], 0, 10)
    assert reads == []


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_builds_its_model_and_masks(name):
    config, volumes = from_preset(name), {"shapes3d": (1, 3), "organmnist3d": (1, 3)}
    config.encoder, config.predictor = "24x1x2", "12x1x2"  # the sizes are tested in test_models.py
    _, masking = train.build(config, *volumes.get(config.dataset, (3, 2)))
    masks = masking(64, torch.Generator().manual_seed(0))
    blocks = 1 if config.merge_targets else config.num_targets
    assert len(masks.context) == 64 and masks.targets.shape[1] == blocks


def test_a_compiled_run_learns_the_same(tmp_path, monkeypatch):
    """With the backend that runs the graph as it is: a real one takes a minute to start. 1e-5 is
    rounding through four steps of Adam."""
    compiled, compile = [], torch.compile
    monkeypatch.setattr(torch, "compile", lambda model: (
        compiled.append(model), compile(model, backend="eager"))[1])
    for name, flag in (("plain", False), ("compiled", True)):
        train.train(tiny(tmp_path / name, compile=flag, max_steps=4))
    plain, other = weights(tmp_path / "plain"), weights(tmp_path / "compiled")
    assert len(compiled) == 1 and plain.keys() == other.keys()
    assert all(torch.allclose(plain[key], other[key], rtol=1e-3, atol=1e-5) for key in plain)
