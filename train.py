"""Pretrain I-JEPA: the schedules, one step, the loop.

    python train.py                                       synthetic shapes, minutes on a CPU
    python train.py --preset cifar10 --epochs 100         --help lists every setting
    python train.py --out runs/cifar10 --resume           as if it had not stopped

Everything that is scheduled counts *optimizer steps*. With 4 forward passes to a step, a warmup of
5 epochs lasts as many steps as 5 epochs have; counted in passes it would be 4 times too long.
A run folder holds config.json, metrics.csv, checkpoint.pt, with all that it needs to resume, and
encoder.pt, the result: the target encoder.
"""

import itertools
import math
import sys

import torch
from tqdm import tqdm

import data
import diagnostics
from config import UsageError, check, parse_size
from masking import MultiBlockMasking
from models import IJEPA, Encoder, Predictor
from support import checkpoint, command_line, distributed
from support.logs import Metrics, StopSignals, announcement, conclude

# --- schedules ------------------------------------------------------------------------------------


def cosine(start, end, progress):
    """From start to end along half a cosine; progress from 0 to 1."""
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


def schedules(config, step, total):
    """Learning rate, weight decay and EMA momentum of step 0 <= step < total (appendix A.1).

    The learning rate rises linearly in the first `warmup`, a fraction of the steps, then falls
    along a cosine; weight decay follows a cosine, the momentum a line.
    Differs: the paper says that weight decay grows linearly; the official code has the cosine.
    """
    progress = step / max(total - 1, 1)  # 0 at the first step, 1 at the last
    warmup = config.warmup * total  # steps
    if step < warmup:
        lr = config.lr_start + (config.lr - config.lr_start) * step / warmup
    else:
        lr = cosine(config.lr, config.lr_final, (step - warmup) / max(total - 1 - warmup, 1))
    return {
        "lr": lr,
        "weight_decay": cosine(config.weight_decay, config.weight_decay_final, progress),
        "momentum": config.momentum + (config.momentum_final - config.momentum) * progress,
    }


# --- one step -------------------------------------------------------------------------------------


def build(config, channels=3, axes=2):
    """The model and the mask sampler that a Config describes; axes: 2 for images, 3 for volumes."""
    torch.manual_seed(config.seed)
    encoder = Encoder(*parse_size(config.encoder), (config.image_size,) * axes, config.patch_size,
                      channels)
    predictor = Predictor(encoder.width, encoder.grid, *parse_size(config.predictor, "predictor"))
    masking = MultiBlockMasking(encoder.grid, config.num_targets, config.target_scale,
                                config.target_aspect, config.context_scale, config.context_size,
                                merge_targets=config.merge_targets)
    return IJEPA(encoder, predictor, config.loss), masking


def build_optimizer(config, model):
    """AdamW over all that is trained; biases, norms and the mask token are not decayed."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if p.ndim > 1], "decayed": True},
              {"params": [p for p in trained if p.ndim <= 1], "decayed": False}]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas)


def pick_precision(config, device):
    """The dtype of the forward pass: what the setting says, or the fastest the hardware has.

    bfloat16 has float32's range; float16, for cards without bfloat16, needs its loss scaled.
    """
    name = config.precision
    if name == "auto" and device.type == "cuda":
        name = "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
    elif name == "auto":
        units = ("amx_tile", "avx512_bf16") if device.type == "cpu" else ()
        # A torch too old for these queries gets `bool` in their place, and bool() is False.
        found = (getattr(torch.cpu, f"_is_{unit}_supported", bool)() for unit in units)
        name = "bf16" if any(found) else "fp32"
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


def train_step(config, model, optimizer, scaler, batches, step, total):
    """One optimizer step over `batches`, one (images, masks) for each accumulation.

    scaler: in float16 it scales the loss, so that small gradients do not vanish, and skips a step
    whose gradients overflow; otherwise it does nothing but call backward and step.
    Returns lr, weight_decay, momentum (floats), loss and grad_norm (tensors: the host waits for
    the device only when it reads them).
    """
    values = schedules(config, step, total)
    for group in optimizer.param_groups:
        group["lr"] = values["lr"]
        group["weight_decay"] = values["weight_decay"] if group["decayed"] else 0.0
    optimizer.zero_grad()
    device = batches[0][0].device
    precision, loss = pick_precision(config, device), 0.0
    for number, (images, masks) in enumerate(batches, 1):
        with distributed.reduce_if(model, number == len(batches)):
            with torch.autocast(device.type, precision, enabled=precision != torch.float32):
                output = model(images, masks)  # targets, context, prediction, loss
            scaler.scale(output.loss / len(batches)).backward()
        loss = loss + output.loss.detach() / len(batches)
    scaler.unscale_(optimizer)  # so that clipping sees gradients as they are
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    grad_norm = torch.nn.utils.clip_grad_norm_(trained, config.clip_grad or math.inf)
    scaler.step(optimizer)
    scaler.update()
    model.update_target(values["momentum"])  # after the optimizer: it follows the new weights
    return {"loss": loss, "grad_norm": grad_norm, **values}


# --- the data, in an order that depends on the seed alone -----------------------------------------


def hold_out(config, n):
    """Numbers of the images to train on and of those held out to measure on, int64."""
    held = min(config.held_out, n // 10)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(config.seed))
    return order[held:], order[:held]


def batches_of(config, dataset, masking, kept, device, generator, start):
    """Yield (images, masks) forever, from forward pass number `start` on.

    Without masking, (images, labels). Every epoch is a new shuffle of the images numbered `kept`,
    which depends on the seed and the epoch alone: a run can resume in its middle. Of several
    processes each gets its own rows of the images but the masks of the whole batch, of which
    distributed.Share picks the same rows.
    """
    per_epoch = len(kept) // config.batch_size
    first_epoch, done = divmod(start, per_epoch)
    for epoch in itertools.count(first_epoch):
        shuffle = torch.Generator().manual_seed(config.seed * 1_000_003 + epoch)
        order = kept[torch.randperm(len(kept), generator=shuffle)]
        order = order[: per_epoch * config.batch_size].view(per_epoch, config.batch_size)
        order = order[done if epoch == first_epoch else 0 :]
        stream = data.batches(dataset, config.batch_size, config.image_size, device,
                              order.flatten(), generator, config.crop_scale, config.flip,
                              config.workers, distributed.place())
        for images, numbers in zip(stream, order):
            if masking:
                yield images, masking(config.batch_size, generator).to(device)
            else:
                yield images, dataset.labels[numbers].to(device)


# --- the run --------------------------------------------------------------------------------------


def pick_device(name):
    """The torch.device of auto, cpu, cuda or mps. Raises UsageError if this machine lacks it."""
    available = {"cpu": True, "cuda": torch.cuda.is_available(),
                 "mps": torch.backends.mps.is_available()}
    if name == "auto":  # mps only when asked for: nobody has run the tests on it yet
        name = "cuda" if available["cuda"] else "cpu"
    check(available[name], "device", name, " or ".join(d for d in available if available[d]))
    return distributed.own(torch.device(name))


def monitor(config, dataset, kept, held):
    """The Monitor of the run's features on its held-out images; None if that was not asked for, or
    if there are too few."""
    if len(held) < 32 or not config.measurements or not distributed.is_first():
        return None
    labeled = None
    if config.dataset == "stl10" and dataset.labels is None:
        labeled = data.load("stl10", "train", config.data_dir)
    return diagnostics.Monitor(dataset, kept, held, config.image_size, labeled)


def train(config, model=None, masking=None, dataset=None, resume=False, override=False,
          program="train.py"):
    """Pretrain as the Config says and fill its run folder; returns the model.

    model: I-JEPA by default, or your own (extras/mae.py is an example). It is called as
    model(images, masks) with masks from `masking`, or as model(images, labels) if that is None, and
    returns a NamedTuple with a `loss`. It needs `context_encoder`, `target_encoder` (they may be
    the same) and `update_target(momentum)`. program: what to type after `python` to resume the run.
    Raises UsageError if settings, data and folder do not fit, and if the loss is NaN or infinite; a
    run that is stopped is saved and exits with status 130.
    """
    device = pick_device(config.device)
    if dataset is None:
        dataset = data.load(config.dataset, config.split, config.data_dir, config.image_size)
    with distributed.team(device), checkpoint.open_folder(config, resume) as folder:
        if model is None:
            channels, axes = dataset.shape
            model, masking = build(config, channels, axes)
        kept, held = hold_out(config, len(dataset))
        steps_per_epoch = len(kept) // (config.batch_size * config.accumulation)
        if not steps_per_epoch:
            raise UsageError(f"{dataset.name} has {len(kept)} images to train on, fewer than one "
                             "step sees: lower --batch-size or --accumulation")
        model.to(device).train()
        scaler = torch.amp.GradScaler(device.type,
                                      enabled=pick_precision(config, device) == torch.float16)
        run = checkpoint.Run(folder, config, model, build_optimizer(config, model), scaler, device,
                             {**dataset.describe(), "program": program})
        if resume:
            run.restore(override)
        run.total = min(config.epochs * steps_per_epoch, config.max_steps or math.inf)
        stream = batches_of(config, dataset, masking, kept, device, run.generator,
                            run.step * config.accumulation)
        if distributed.is_first():
            tqdm.write(announcement(run, dataset, len(kept), len(held)))
        loop(config, run, masking, stream, monitor(config, dataset, kept, held), steps_per_epoch)
        conclude(run)
    return model


def loop(config, run, masking, stream, watch, steps_per_epoch):
    """Train from run.step to run.total; log, measure and save on the way."""
    learner = distributed.wrap(run.model, config.compile)  # the model, compiled or distributed
    log_every = max(run.total // 200, 1)
    measure_every = max(run.total // max(config.measurements, 1), 1)
    metrics = Metrics(config, run.folder, run.step, diagnostics.MEASURES)
    bar = tqdm(total=run.total, initial=run.step, unit="step", disable=not distributed.is_first())
    with StopSignals() as signals, metrics, bar:
        if watch:
            watch.before = metrics.before  # what a resumed run measured before training
            if run.step == 0:
                metrics.append({"step": 0, "epoch": 0.0, **measure_and_warn(watch, run, masking)})
        while run.step < run.total:
            stop, due = distributed.any_of(signals.stop, run.is_due())
            if stop:
                break
            batches = list(itertools.islice(stream, config.accumulation))
            values = train_step(config, learner, run.optimizer, run.scaler, batches, run.step,
                                run.total)
            run.step += 1
            bar.update()
            measuring = run.step % measure_every == 0 or run.step == run.total
            if run.step % log_every == 0 or measuring:
                row = read(config, run, values, steps_per_epoch)
                if watch and measuring:
                    row |= measure_and_warn(watch, run, masking)
                metrics.append(row)
                bar.set_postfix_str(f"loss {row['loss']:.4f}, {row['images_per_second']} images/s",
                                    refresh=False)
            if due:
                run.save()
        run.save(final=True)


def read(config, run, values, steps_per_epoch):
    """What metrics.csv says of a step. Reads its loss from the device, for which the host must
    wait; raises UsageError if that is NaN or infinite."""
    loss = distributed.mean(values["loss"])
    if not math.isfinite(loss):
        raise run.diverged(f"the loss is {loss}")
    rate = run.rate() * config.batch_size * config.accumulation
    return {"step": run.step, "epoch": round(run.step / steps_per_epoch, 3), **values,
            "loss": loss, "grad_norm": values["grad_norm"].item(),
            "images_per_second": round(rate, 1), "seconds": round(run.seconds(), 1)}


def measure_and_warn(watch, run, masking):
    """Measure the model, print what looks wrong and what to try, and return the measures."""
    found, warnings = watch(run.model, masking, run.step / run.total, run.device)
    for warning in warnings:
        tqdm.write(f"warning at step {run.step}: {warning}. Train for longer, or try a lower --lr "
                   f"(now {run.config.lr:g}), a longer --warmup or a --momentum closer to 1",
                   file=sys.stderr)
    return {name: round(value, 5) for name, value in found.items()}


def load_run(folder, device="cpu"):
    """A run, ready to use: its model in eval mode, its mask sampler, its Config, and a dict about
    its data (name, channels, axes, classes) and progress. Raises UsageError unless it is I-JEPA."""
    config, about, state = checkpoint.load(folder)
    model, masking = build(config, about["channels"], about["axes"])
    checkpoint.load_weights(model, state["model"], folder)
    return model.to(device).eval(), masking, config, about


def main(argv=None):
    """The command line: a flag for every setting, --preset, --resume and --override."""
    arguments = command_line.parse(argv, "Pretrain I-JEPA.")
    train(arguments.config, resume=arguments.resume, override=arguments.override)


if __name__ == "__main__":
    command_line.run(main)
