"""Pretrain I-JEPA: `python train.py --preset shapes`. The loop, the schedules, the EMA, checkpoints and resume.

Everything that is scheduled (learning rate, weight decay, momentum) is a function of the *optimizer step*, never of the
forward passes that accumulate into one: with 4 accumulation steps a warmup counted in forward passes would last 4 times too
long. A run folder holds config.json, metrics.csv, checkpoint.pt (all that is needed to go on) and encoder.pt (the result).
"""

import contextlib
import ctypes
import itertools
import json
import math
import os
import pathlib
import platform
import sys
import time
from dataclasses import asdict

import torch
from tqdm import tqdm

import config as settings
import data
import diagnostics
from extras import methods
from support import distributed as parallel
from support.checkpoint import Progress, Saver, restore, resumed_config, write
from config import UsageError
from support.logs import Metrics, StopSignals, duration

# --- schedules: functions of the optimizer step ------------------------------------------------------------------------


def cosine(start, end, progress):
    """From start to end along half a cosine, progress from 0 to 1."""
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


def schedules(config, step, total):
    """Learning rate, weight decay and EMA momentum of optimizer step 0 <= step < total (paper appendix A.1), a dict of floats.

    Differs: weight decay follows a cosine, as in the official code; the paper says linearly.
    """
    progress = step / max(total - 1, 1)  # 0 at the first step, 1 at the last
    warmup = config.warmup * total
    if step < warmup:
        lr = config.lr_start + (config.lr - config.lr_start) * step / warmup
    elif config.schedule == "constant":
        lr = config.lr
    else:
        lr = cosine(config.lr, config.lr_final, (step - warmup) / max(total - 1 - warmup, 1))
    return {
        "lr": lr,
        "weight_decay": cosine(config.weight_decay, config.weight_decay_final, progress),
        "momentum": config.momentum + (config.momentum_final - config.momentum) * progress,
    }


# --- one step ----------------------------------------------------------------------------------------------------------


def build_optimizer(config, model):
    """The optimizer of a Config over the context encoder and the predictor; biases, norms and the mask token are not decayed.

    Groups carry `decayed`, which says whether train_step gives them the schedule's weight decay or 0.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in trained if p.ndim > 1 or config.decay_all]
    spared = [p for p in trained if not (p.ndim > 1 or config.decay_all)]
    groups = [{"params": group, "decayed": flag} for group, flag in ((decayed, True), (spared, False)) if group]
    fused = trained[0].device.type in ("cpu", "cuda")  # one kernel for all parameters
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.betas[0], fused=fused)
    kind = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
    return kind(groups, lr=config.lr, betas=config.betas, fused=fused)


def autocast(config, device):
    """The precision context of a Config: bfloat16 needs no loss scaling, so there is no GradScaler to explain."""
    use = config.precision == "bf16" or (config.precision == "auto" and device.type == "cuda")
    return torch.autocast(device.type, torch.bfloat16) if use else contextlib.nullcontext()


def train_step(config, model, optimizer, batches, step, total, generator):
    """One optimizer step over `batches`, one for each accumulation: each a tuple (images,) float [B, C, H, W], or (images, labels).

    Returns a dict: lr, weight_decay, momentum (floats); loss, grad_norm (tensors [], so that nothing here waits for the device).
    """
    values = schedules(config, step, total)
    for group in optimizer.param_groups:
        group["lr"] = values["lr"]
        group["weight_decay"] = values["weight_decay"] if group["decayed"] else 0.0
    optimizer.zero_grad()
    loss = 0.0
    for batch in batches:
        with autocast(config, batch[0].device):
            output = model(*batch, generator=generator)  # targets under no_grad, context, predictions, loss
        (output.loss / len(batches)).backward()
        loss = loss + output.loss.detach() / len(batches)
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    grad_norm = torch.nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
    if config.clip_grad:
        torch.nn.utils.clip_grads_with_norm_(trained, config.clip_grad, grad_norm)
    # Where loss or gradient is no number, the fused step leaves the weights as they are; the host need not wait to know.
    optimizer.found_inf = (~(loss + grad_norm).isfinite()).float()
    optimizer.step()
    model.update_target(values["momentum"])  # after the optimizer: the target follows the weights just learned
    return {"loss": loss, **values, "grad_norm": grad_norm}


# --- data, in an order that depends only on the seed ---------------------------------------------------------------------


def hold_out(config, n):
    """Numbers of the images to train on and of those kept out, int64: `held_out` of n, at most a tenth; none of fewer than 320."""
    held = min(config.held_out, n // 10)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(config.seed))
    return (order[held:], order[:held]) if held >= 32 else (torch.arange(n), torch.empty(0, dtype=torch.int64))


def image_stream(config, dataset, device, generator, start):
    """Endless batches (normalised images float [B, C, H, W],), for supervision (images, labels), from forward pass number `start` on.

    A new shuffle every epoch, whole batches only, none of the images held out. The order of an epoch depends on the seed and the epoch
    alone, so a run can be taken up in its middle. Of several processes each gets its part of every batch.
    """
    kept, _ = hold_out(config, len(dataset))
    per_epoch, (rank, world) = len(kept) // config.batch_size, parallel.place()
    mine = config.batch_size // world
    for epoch in itertools.count(start // per_epoch):
        shuffle = torch.Generator().manual_seed(config.seed * 1_000_003 + epoch)
        order = kept[torch.randperm(len(kept), generator=shuffle)][: per_epoch * config.batch_size]
        if epoch == start // per_epoch:
            order = order[start % per_epoch * config.batch_size:]
        order = order.view(-1, world, mine)[:, rank].flatten()  # [batches * mine]
        batches = data.batches(dataset, mine, config.image_size, device, order, generator, config.crop_scale, config.flip,
                               config.workers, (rank, world))
        for images, numbers in zip(batches, order.split(mine)):
            yield (images, dataset.labels[numbers].to(device)) if config.method == "supervised" else (images,)


def monitor(config, dataset, device):
    """A Monitor of the held-out images, with kNN on them where there are labels; None where nothing is held out.

    Images trained on without labels (STL-10's) are judged by kNN on the same data set's labelled train split.
    """
    kept, held = hold_out(config, len(dataset))
    if not len(held) or not config.measurements:
        return None

    def images(source, numbers):
        return torch.cat(list(data.batches(source.subset(numbers), config.batch_size, config.image_size, device)))

    labelled, bank, queries = dataset, kept[:1000], held
    if dataset.labels is None and dataset.name in data.NAMES:
        labelled = data.load(dataset.name, "train", config.data_dir, config.image_size)
        bank, queries = torch.randperm(len(labelled), generator=torch.Generator().manual_seed(config.seed))[:1500].split((1000, 500))
    sets = None
    if labelled.labels is not None:
        sets = [part for numbers in (bank, queries) for part in (images(labelled, numbers), labelled.labels[numbers].to(device))]
    return diagnostics.Monitor(images(dataset, held), sets, config.batch_size)


# --- the run -----------------------------------------------------------------------------------------------------------


def pick_device(name):
    """torch.device of 'auto', 'cpu', 'cuda' or 'mps'. Raises UsageError where this machine does not have it."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(device for device, found in there.items() if found)
    if not there[name]:
        raise UsageError(f"--device {name}: this machine has no {name}; it has {', '.join(d for d in there if there[d])}")
    if name != "cuda" or int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return torch.device(name)
    if parallel.local() >= torch.cuda.device_count():
        raise UsageError(f"torchrun started process {parallel.local() + 1} of this machine, which has {torch.cuda.device_count()} GPUs; "
                         "lower --nproc_per_node, or use --device cpu")
    return torch.device("cuda", parallel.local())


def describe(dataset):
    """What a checkpoint keeps of its data: enough to rebuild the model and to notice other data on resume."""
    _, channels, *sides = dataset.images.shape
    classes = 0 if dataset.labels is None else int(dataset.labels.max()) + 1
    return {"name": dataset.name, "images": len(dataset), "channels": channels, "axes": len(sides), "classes": classes,
            "fingerprint": dataset.fingerprint()}


def time_step(config, model, dataset, device):
    """Seconds that one optimizer step takes, measured on two or three forward and backward passes that leave no trace in the run.

    Raises UsageError where the device's memory is too small, and where --compile finds no compiler.
    """
    generator = torch.Generator(device).manual_seed(0)
    stream = image_stream(config, dataset, device, generator, 0)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        for _ in range(3 if config.compile else 2):  # the last one counts; the first is compiled for its own shapes, the second for any
            start = time.perf_counter()
            batch = next(stream)
            try:
                with autocast(config, device):
                    loss = model(*batch, generator=generator).loss
                loss.backward()
            except torch.OutOfMemoryError:
                raise UsageError(f"a batch of {config.batch_size} images does not fit in the memory of {device}; "
                                 "lower --batch-size and raise --accumulation as much") from None
            except RuntimeError as error:
                if not config.compile:
                    raise
                raise UsageError(f"--compile is given: torch.compile makes no code for {device} here ({data.one_line(error)[:200]}); "
                                 "leave it out, or install what is missing (a C++ compiler, on CUDA triton)") from None
            loss.item()  # waits for the device
            seconds = time.perf_counter() - start
    model.zero_grad()
    return seconds * config.accumulation


def announce(config, model, dataset, device, progress, seconds_per_step):
    """Print what is about to happen: device, images, parameters, steps, expected time."""
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"{device.type}, {torch.get_num_threads()} threads"
    parts = {f"encoder {config.encoder}": model.context_encoder}
    if hasattr(model, "predictor"):
        parts[f"{'decoder' if config.method == 'mae' else 'predictor'} {config.predictor}"] = model.predictor
    sizes = ", ".join(f"{name} {sum(p.numel() for p in part.parameters()) / 1e6:.2f} M" for name, part in parts.items())
    kept, held = map(len, hold_out(config, len(dataset)))
    images, grid = config.batch_size * config.accumulation, "x".join(map(str, model.context_encoder.grid))
    print(
        f"{dataset.name}: {kept:,} images and {held:,} held out, crops of {config.image_size} pixels in {grid} patches · "
        f"{config.method}: {sizes} parameters · "
        f"{progress.total - progress.step:,} steps of {images} images "
        f"({(progress.total - progress.step) * images / kept:.1f} epochs) on {where} · "
        f"about {duration((progress.total - progress.step) * seconds_per_step)} · {config.out}", flush=True)


def look(config, watch, model, progress):
    """Measure the model with a Monitor, print what it warns of and what to try, and return the measures, a dict of floats."""
    try:
        with autocast(config, watch.images.device):
            found, warnings = watch(model, progress.step / progress.total)
    except torch.linalg.LinAlgError:  # what is no number has no rank
        raise UsageError(f"the features are no finite numbers at step {progress.step:,}; lower --lr (now {config.lr:g})") from None
    advice = f"Try a lower --lr (now {config.lr:g}) or a longer --warmup (now {config.warmup:g})"
    if config.method not in ("mae", "supervised"):  # they have no targets that move
        advice += f", or a --momentum closer to 1 (now {config.momentum:g}), with --stop-gradient and --target-norm on"
    for warning in warnings:
        tqdm.write(f"warning at step {progress.step:,}: {warning}. {advice}", file=sys.stderr)
    return {name: round(value, 5) for name, value in found.items()}


def prepare(config, dataset, device):
    """What trains on a data set: (model, optimizer, generator of crops and masks, what is known of the data). To a GPU with room for
    them the images are moved too.

    Raises UsageError where there are too few images, no labels for supervision, or too little memory.
    """
    kept, held = map(len, hold_out(config, len(dataset)))
    if kept < config.batch_size * config.accumulation:
        raise UsageError(f"--batch-size is {config.batch_size}, --accumulation {config.accumulation}: {dataset.name} has {kept} images to "
                         f"train on ({held} are held out), fewer than one step's; lower one of the two")
    about = describe(dataset)
    if config.method == "supervised" and about["classes"] < 2:
        raise UsageError(f"--method supervised needs labels of two classes or more, and the {config.split} split of {dataset.name} has "
                         f"{about['classes'] or 'none'}")
    methods.check_memory(config, device, about["channels"], about["axes"])
    torch.manual_seed(config.seed)
    model = methods.build(config, about["channels"], about["axes"], about["classes"]).to(device).train()
    optimizer = build_optimizer(config, model)
    if device.type == "cuda" and isinstance(dataset.images, torch.Tensor) and dataset.images.nbytes < torch.cuda.mem_get_info()[0] / 4:
        dataset.images = dataset.images.to(device)  # an epoch then copies nothing
    return model, optimizer, torch.Generator(device).manual_seed(config.seed), about


def set_up(config, resume, override):
    """All that a run works with, (dataset, model, optimizer, generator, what is known of the data, Progress); on resume as it was left."""
    folder, device = pathlib.Path(config.out), pick_device(config.device)
    if not resume and (folder / "checkpoint.pt").exists():
        raise UsageError(f"--out {folder} already holds a run; add --resume to go on with it, or choose another --out")
    methods.check_memory(config, device)
    if config.dataset in data.NAMES:
        with torch.device("meta"):
            methods.build(config, *data.NAMES[config.dataset], classes=1)  # refuses sizes and masks that cannot be, before the data is read
    if config.batch_size % parallel.place()[1]:
        raise UsageError(f"--batch-size is {config.batch_size}: {parallel.place()[1]} processes share each batch, so it must be a multiple")
    dataset = parallel.load(config.dataset, config.split, config.data_dir, config.image_size)
    model, optimizer, generator, about = prepare(config, dataset, device)
    progress = restore(folder, config, device, model, optimizer, generator, about, override) if resume else Progress()
    return dataset, model, optimizer, generator, about, progress


def open_folder(config):
    """Make the run folder and write config.json into it. Raises UsageError where that cannot be."""
    folder = pathlib.Path(config.out)
    if not parallel.first():
        return folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write(folder / "config.json", lambda path: path.write_text(json.dumps(asdict(config), indent=2)))
    except OSError as error:
        raise UsageError(f"--out {folder} cannot be written to ({data.one_line(error)})") from None
    return folder


def plan(config, progress, n, seconds_per_step):
    """How many optimizer steps a run over n images has: its epochs, or less where --max-steps or --max-minutes says so."""
    planned = config.epochs * (n // (config.batch_size * config.accumulation))
    planned = min(planned, config.max_steps or planned)
    affordable = max(1, config.max_minutes * 60 / seconds_per_step) if config.max_minutes else planned
    return planned, progress.total or int(min(planned, affordable))


def refuse(config, saver, where, values, step):
    """Raise the UsageError of a step whose gradient is no number: where that arose, what is kept, and what to try."""
    folder = config.out
    kept = (f"{folder} keeps the weights of step {saver.step:,}: go on from them with --resume --override and" if saver.step is not None
            else "nothing was saved yet: start again with")
    raise UsageError(f"at step {step:,} the loss is {values['loss']:g} and the gradient {values['grad_norm']:g}; it arose in {where}; "
                     f"{kept} a lower --lr (now {config.lr:g}) or --clip-grad 1")


def keep_memory():
    """Let this process keep the memory that a training step frees for the next one; returns whether it does, which is on glibc only.

    Left alone, glibc gives large pieces back to the system at once, and the next step pays for each of their pages again. Pieces of 32 MB
    and more still are given back, glibc's own upper limit: before version 2.38 it cannot fill the hole that an aligned piece left with the
    next of the same size as long as scraps between them lie in its cache (its bug 14581), and 15 to 25 holes pile up before it can.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc, trim_threshold, mmap_threshold = ctypes.CDLL(None), -1, -3  # numbers of malloc.h
    return libc.mallopt(mmap_threshold, 32 * 2**20) == 1 and libc.mallopt(trim_threshold, 2**31 - 1) == 1


@contextlib.contextmanager
def determinism(wanted):
    """Within `with`, and if wanted, operations that do not give the same bits every time are replaced or refused."""
    was = torch.are_deterministic_algorithms_enabled()
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was)


def train(config, resume=False, override=False):
    """Pretrain as the Config says and fill its run folder; returns the model. Ctrl-C or SIGTERM: saves, says how to
    go on, and exits with 130.

    Raises UsageError where settings, data and folder do not go together, and where the loss or a gradient is no number.
    """
    config.out = config.out or f"runs/{config.preset}"
    with determinism(config.deterministic), parallel.team(pick_device(config.device)):
        return fit(config, *set_up(config, resume, override))


def fit(config, dataset, model, optimizer, generator, about, progress):
    """The loop of `train` over what `set_up` gave."""
    device, images_per_step, first = generator.device, config.batch_size * config.accumulation, parallel.first()
    learner = parallel.wrap(model, config.compile)
    seconds_per_step = parallel.from_first(time_step(config, learner, dataset, device))
    folder = open_folder(config)
    watch = monitor(config, dataset, device) if first else None
    per_epoch = len(hold_out(config, len(dataset))[0])
    planned, progress.total = plan(config, progress, per_epoch, seconds_per_step)
    if first:
        announce(config, model, dataset, device, progress, seconds_per_step)
    stream = image_stream(config, dataset, device, generator, progress.step * config.accumulation)
    before, began, clock = progress.seconds, progress.step, time.perf_counter()
    saver = Saver(folder, config, model, optimizer, generator, progress, about)
    metrics = Metrics(config, folder, progress.step) if first else None
    if watch:
        watch.first = metrics.first

    def due(times):
        """Whether this is one of about `times` steps spread over the run, or its last one."""
        return progress.step % max(progress.total // times, 1) == 0 or progress.step == progress.total

    slow = 0.5 if sys.stderr.isatty() else 30  # seconds between two updates of the bar
    bar = tqdm(total=progress.total, initial=progress.step, unit="step", mininterval=slow, disable=not first)
    with StopSignals() as signals, bar, contextlib.closing(metrics) if first else contextlib.nullcontext():
        if watch and progress.step == 0:
            metrics.append({"step": 0, "epoch": 0.0, **look(config, watch, model, progress)})
        attempt = values = None
        while progress.step < progress.total and not parallel.any_of(signals.stop):
            batches = list(itertools.islice(stream, config.accumulation))
            past, attempt = (attempt, values), (batches, generator.get_state())
            values = train_step(config, learner, optimizer, batches, progress.step, progress.total, generator)
            # A GPU is asked about the step before: it has done that one, so nothing waits.
            tried, result = (attempt, values) if device.type == "cpu" or due(200) else past
            if tried and not math.isfinite(result["loss"] + result["grad_norm"]):
                saver.save()  # the weights have not moved
                generator.set_state(tried[1])
                where = diagnostics.origin(model, parallel.Share(model), tried[0], generator)  # nothing compiled, and no other process
                refuse(config, saver, where, result, progress.step + (tried is attempt))
            progress.step += 1
            progress.seconds = before + time.perf_counter() - clock
            bar.update()
            measuring = config.measurements and due(config.measurements)
            if due(200) or measuring:
                values = {**values, "loss": parallel.mean(values["loss"]), "grad_norm": float(values["grad_norm"])}
                row = {"step": progress.step, "epoch": round(progress.step * images_per_step / per_epoch, 3), **values}
                if watch and measuring:
                    row |= look(config, watch, model, progress)
                    progress.seconds = before + time.perf_counter() - clock
                rate = (progress.step - began) * images_per_step / (progress.seconds - before)
                if first:
                    metrics.append({**row, "images_per_second": round(rate, 1), "seconds": round(progress.seconds, 1)})
                bar.set_postfix_str(f"loss {values['loss']:.4f}, {rate:.0f} images/s", refresh=False)
                if config.max_minutes:  # fit what is left of the schedules to what is left of the time
                    left = (config.max_minutes * 60 - progress.seconds) * rate / images_per_step
                    bar.total = progress.total = parallel.from_first(int(min(planned, progress.step + max(0, left))))
            saver.save_if_due()
        saver.save()
    if first and saver.step != progress.step:
        raise UsageError(f"the weights are no finite numbers after step {progress.step:,}; lower --lr (now {config.lr:g}) or set "
                         "--clip-grad 1")
    if progress.step < progress.total:
        if first:
            print(f"stopped at step {progress.step:,} of {progress.total:,}; go on with: python train.py --out {folder} --resume")
        sys.exit(130)
    if first:
        print(f"{progress.step:,} steps in {duration(progress.seconds)}; evaluate with: python evaluate.py {folder}")
    return model


def main(argv=None):
    """The command line: flags are the fields of Config, and --resume."""
    parser = settings.parser("Pretrain I-JEPA on a data set; without flags, on embedded images.")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out")
    parser.add_argument("--override", action="store_true", help="with --resume: go on although settings, data or device are not the run's")
    arguments = parser.parse_args(argv)
    keep_memory()
    if parallel.restarted() and not arguments.resume:
        config = settings.from_arguments(arguments)
        arguments.out = config.out or f"runs/{config.preset}"
        arguments.resume = (pathlib.Path(arguments.out) / "checkpoint.pt").exists()
    if arguments.resume:
        if not getattr(arguments, "out", ""):
            raise UsageError("--resume needs --out FOLDER, the run to go on with")
        return train(resumed_config(arguments), True, arguments.override)
    if arguments.override:
        raise UsageError("--override is for --resume")
    return train(settings.from_arguments(arguments))


if __name__ == "__main__":
    settings.run(main)
