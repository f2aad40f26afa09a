"""The rewritten core computes what the old one did: from equal weights and masks, equal gradients.

    git worktree add ../before 280d613
    python bench/parity.py ../before          writes results/parity_core.json

Both codes are loaded into one process and given the same weights, images and masks, which the new
sampler draws. Differences are relative: the largest absolute difference of a tensor, divided by the
old tensor's largest absolute value; `gradient` takes the gradients of all parameters as one tensor,
`worst_tensor` each on its own. What is left is rounding: the old code computed attention of up to
128 tokens on a CPU by the formula, the new one calls torch's fused kernel. In float64 it vanishes,
and in float32 it is as large as the old code's own distance from its float64.
"""

import argparse
import datetime
import importlib
import json
import pathlib
import sys
from dataclasses import asdict

import torch

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import train  # noqa: E402
from config import PRESETS, from_preset  # noqa: E402
from extras.benchmark import hardware  # noqa: E402
from support import checkpoint, command_line  # noqa: E402

BAR = 1e-6
OLD = ("config", "masking", "fast_masking", "mae", "models", "methods", "train")
# Name: preset, what differs from it, and the sides of the images if they are not square.
CASES = {
    "64x3x1, 32x2x1, 6 x 6 patches, 12 of context": ("shapes", {}, None),
    "192x6x6, 96x4x6, 8 x 8 patches, padded": (
        "cifar10", {"encoder": "192x6x6", "predictor": "96x4x6", "context_size": 0}, None),
    "the same with the squared distance": ("cifar10-peer", {}, None),
    "64x3x4, 32x2x2, 6 x 10 patches, padded": (
        "shapes", {"encoder": "64x3x4", "predictor": "32x2x2", "context_size": 0}, (24, 40)),
    "64x3x1, 32x2x1, 4 x 4 x 4 patches, padded": ("shapes3d", {"context_size": 0}, (16, 16, 16)),
}
STEPS = 10


def load_old(folder):
    """The old modules by name; ours are set aside while the old ones import each other."""
    names = {path.stem for path in pathlib.Path(folder).glob("*.py")}
    ours = {name: sys.modules.pop(name) for name in list(sys.modules) if name in names}
    sys.path.insert(0, str(folder))
    try:
        return {name: importlib.import_module(name) for name in OLD}
    finally:
        sys.path.remove(str(folder))
        for name in names & set(sys.modules):
            del sys.modules[name]
        sys.modules.update(ours)


def relative(old, new):
    """The largest absolute difference of two tensors, divided by the old one's largest value."""
    return ((new - old).abs().max() / old.abs().max().clamp(min=1e-30)).item()


def pairs(old_model, model):
    """The parameters of both models, by name."""
    return [(old_model.get_parameter(name), p) for name, p in model.named_parameters()]


def old_masks(old, masks):
    """The same masks as an object of the old code."""
    return old["masking"].Masks(*vars(masks).values())


def build_pair(old, preset, changes, sides=None):
    """(old config, old model, config, model, masking); the old model gets the new one's weights."""
    config, axes = from_preset(preset, **changes, device="cpu"), len(sides or (0, 0))
    old_config = old["config"].from_preset(preset, **changes, device="cpu")
    if len(set(sides or ())) > 1:  # neither code's settings know images that are not square
        model, masking = build_rectangular(config, sides)
        encoder = old["models"].Encoder(config.encoder, sides, config.patch_size)
        old_model = old["models"].IJEPA(encoder, config.predictor, loss=config.loss)
    else:
        channels = 1 if axes == 3 else 3
        model, masking = train.build(config, channels, axes)
        old_model = old["methods"].build(old_config, channels, axes)
    old_model.load_state_dict(model.state_dict())  # strict: the names are the same
    return old_config, old_model.train(), config, model.train(), masking


def build_rectangular(config, sides):
    """As train.build, for images whose sides differ."""
    torch.manual_seed(config.seed)
    encoder = train.Encoder(*train.parse_size(config.encoder), sides, config.patch_size)
    predictor = train.Predictor(encoder.width, encoder.grid, *train.parse_size(config.predictor))
    return train.IJEPA(encoder, predictor, config.loss), train.MultiBlockMasking(encoder.grid)


def draw(model, B, generator):
    """Random images [B, C, *sides] for a model."""
    encoder = model.context_encoder
    weight = encoder.patch_embed.project.weight  # [D, C * pixels of a patch]
    channels = weight.shape[1] // encoder.patch_size ** len(encoder.image_size)
    return torch.randn(B, channels, *encoder.image_size, generator=generator)


def compare_pass(old, case, B=16, seed=1):
    """Differences of one forward and backward pass, in float32 and in float64: a dict of dicts."""
    preset, changes, sides = CASES[case]
    _, old_model, _, model, masking = build_pair(old, preset, changes, sides)
    with torch.no_grad():  # the target encoder too must differ from the context encoder
        for p, q in pairs(old_model.target_encoder, model.target_encoder):
            p.copy_(q.mul_(0.9))
    generator = torch.Generator().manual_seed(seed)
    images, masks = draw(model, B, generator), masking(B, generator)
    real, found, single = masks.targets_valid, {}, None
    for dtype in (torch.float32, torch.float64):
        old_model, model, images = old_model.to(dtype), model.to(dtype), images.to(dtype)
        before, after = old_model(images, old_masks(old, masks)), model(images, masks)
        for one, output in ((old_model, before), (model, after)):
            one.zero_grad()
            output.loss.backward()
        gradients = [(p.grad, q.grad) for p, q in pairs(old_model, model) if q.requires_grad]
        p, q = (torch.cat([g.flatten() for g in side]) for side in zip(*gradients))
        found[str(dtype).removeprefix("torch.")] = {
            "loss": relative(before.loss, after.loss),
            "predictions": relative(before.predictions[real], after.predictions[real]),
            "targets": relative(before.targets[real], after.targets[real]),
            "gradient": relative(p, q), "worst_tensor": max(relative(*g) for g in gradients)}
        if single:  # how far the old code's own float32 is from its float64
            found["float32"]["worst_tensor_of_old_to_float64"] = max(
                relative(g[0], g32) for g, g32 in zip(gradients, single))
        single = [g[0].double() for g in gradients]
    return found | {"context_padding": 1 - masks.context_valid.float().mean().item(),
                    "target_padding": 1 - real.float().mean().item()}


def without_key_biases(model):
    """The parameters by name, the biases of attention's keys set to 0.

    They add the same to a query's scores of all keys, so softmax has no use for them: their
    gradient is rounding alone, which Adam scales up to a step of full size.
    """
    found = {name: p.detach().clone() for name, p in model.named_parameters()}
    for name, p in found.items():
        if name.endswith("qkv.bias"):
            p.view(3, -1)[1] = 0
    return found


def compare_steps(old, preset, dtype, B=16, seed=2):
    """Differences after training steps: AdamW, schedules, accumulation of 2, EMA."""
    old_config, old_model, config, model, masking = build_pair(old, preset, {})
    old_model, model = old_model.to(dtype), model.to(dtype)
    old_optimizer = old["train"].build_optimizer(old_config, old_model)
    optimizer, scaler = train.build_optimizer(config, model), torch.amp.GradScaler(enabled=False)
    generator, losses = torch.Generator().manual_seed(seed), []
    for step in range(STEPS):
        batches = [(draw(model, B, generator).to(dtype), masking(B, generator)) for _ in range(2)]
        before = old["train"].train_step(
            old_config, old_model, old_optimizer,
            [(images, old_masks(old, masks)) for images, masks in batches], step, STEPS, None)
        after = train.train_step(config, model, optimizer, scaler, batches, step, STEPS)
        assert all(before[name] == after[name] for name in ("lr", "weight_decay", "momentum"))
        losses.append(relative(before["loss"], after["loss"]))
    old_weights, weights = without_key_biases(old_model), without_key_biases(model)
    return {"steps": STEPS, "loss": max(losses),
            "worst_weights": max(relative(old_weights[name], weights[name]) for name in weights)}


def compare_start(old):
    """Presets whose settings, initial weights or schedules are not those of before."""
    differs = []
    for preset in PRESETS:
        before, now = old["config"].from_preset(preset), from_preset(preset)
        differs += [f"{preset}: {name}" for name, value in asdict(now).items()
                    if name in vars(before) and name != "out" and value != getattr(before, name)]
        if preset in ("shapes", "shapes3d", "cifar10", "cifar10-peer", "small"):
            shape = (1, 3) if preset == "shapes3d" else (3, 2)
            torch.manual_seed(now.seed)
            old_state = old["methods"].build(before, *shape).state_dict()
            state = train.build(now, *shape)[0].state_dict()
            differs += [f"{preset}: weights of {name}" for name, value in state.items()
                        if not torch.equal(value, old_state[name])]
        differs += [f"{preset}: schedules at step {step}" for step in range(0, 1000, 37)
                    if old["train"].schedules(before, step, 1000)
                    != train.schedules(now, step, 1000)]
    return differs


def main(argv=None):
    """Compare, print and write; exit with 1 if a difference of a pass is above the bar."""
    parser = argparse.ArgumentParser(description="The rewritten core next to the old one.")
    parser.add_argument("old", help="a checkout of commit 280d613")
    parser.add_argument("--json", default="results/parity_core.json")
    args = parser.parse_args(argv)
    old = load_old(pathlib.Path(args.old).resolve())
    found = {"command": "python bench/parity.py FOLDER", "old": "commit 280d613",
             "date": datetime.date.today().isoformat(), "hardware": hardware(torch.device("cpu")),
             "bar": BAR, "seeds": {"weights": 0, "passes": 1, "steps": 2},
             "same_seed_differs": compare_start(old), "passes": {}, "steps": {}}
    print(f"settings, initial weights or schedules that differ: {found['same_seed_differs']}")
    for case in CASES:
        row = found["passes"][case] = compare_pass(old, case)
        print(case)
        for dtype in ("float32", "float64"):
            print(f"    {dtype} " + ", ".join(f"{k} {v:.2g}" for k, v in row[dtype].items()))
    for preset in ("shapes", "cifar10-peer"):
        for dtype in (torch.float32, torch.float64):
            name = f"{preset}, {str(dtype).removeprefix('torch.')}"
            row = found["steps"][name] = compare_steps(old, preset, dtype)
            print(f"{name}: " + ", ".join(f"{k} {v:.2g}" for k, v in row.items()))
    worst = max(row[dtype][name] for row in found["passes"].values()
                for dtype in ("float32", "float64") for name in ("loss", "predictions", "gradient"))
    found["worst"] = worst
    checkpoint.write(args.json, lambda path: path.write_text(json.dumps(found, indent=2) + "\n"))
    print(f"largest difference of a pass: {worst:.2g}, bar {BAR:g}")
    sys.exit(worst > BAR)


if __name__ == "__main__":
    command_line.run(main)
