"""Several processes: `torchrun --nproc_per_node=2 train.py ...`, with DistributedDataParallel.

The processes share each batch: --batch-size is what all of them see together, so the result does
not depend on how many there are. Each draws the crops and masks of the whole batch from the same
generator and keeps its own rows. Only the first process writes. Outside torchrun there is one.
"""

import contextlib
import gc
import importlib
import itertools
import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from config import UsageError

TEAMS = itertools.count()  # numbers the teams that this process has been part of


def place():
    """(number of this process, how many there are)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def is_first():
    """Whether this process is the one that writes and prints."""
    return place()[0] == 0


def was_restarted():
    """Whether torchrun started this process again, because one was lost (--max-restarts)."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def own(device):
    """This process's GPU of those of its machine; any other device as it is."""
    number = int(os.environ.get("LOCAL_RANK", 0))
    if device.type != "cuda" or int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return device
    if number >= torch.cuda.device_count():
        raise UsageError(f"torchrun started process {number + 1} on a machine with "
                         f"{torch.cuda.device_count()} GPUs: lower --nproc_per_node")
    return torch.device("cuda", number)


@contextlib.contextmanager
def team(device):
    """Within `with`, the processes that torchrun started can talk: GPUs by nccl, hosts by gloo."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # DistributedDataParallel imports this. Imported while a group lives, it keeps the group, whose
    # threads then may still hold tensors when the interpreter ends, and abort the process.
    importlib.import_module("torch._dynamo")
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    # A prefix of its own: the store still has the addresses of an earlier team, or of processes
    # that were lost and restarted.
    store, rank, world = next(dist.rendezvous("env://"))
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)
    store = dist.PrefixStore(f"{restarts}-{next(TEAMS)}", store)
    dist.init_process_group(backend, timeout=timedelta(minutes=30), store=store, rank=rank,
                            world_size=world)
    try:
        yield
    finally:
        gc.collect()  # an unused Parallel in a reference cycle keeps the group's threads alive
        dist.destroy_process_group()


def any_of(*flags):
    """Whether each flag is set in any process, a list; asked between hosts, so no GPU waits."""
    if place()[1] == 1:
        return list(flags)
    shared = torch.tensor(flags, dtype=torch.float32)
    dist.all_reduce(shared, dist.ReduceOp.MAX)
    return shared.bool().tolist()


def mean(value):
    """The mean of a scalar tensor over the processes, a float; waits for the device."""
    value = value.detach().float().clone()
    if place()[1] > 1:
        dist.all_reduce(value)
    return value.item() / place()[1]


class Share(nn.Module):
    """A model that takes its own rows of the whole batch's masks (or labels).

    The loss is weighted so that its mean over the processes is that of the whole batch: the mean
    over all target patches, of which some processes' images have more than others'.
    """

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images, masks):
        rank, world = place()
        if len(masks) != world * len(images):
            raise UsageError(f"--batch-size is {len(masks)}, expected a multiple of the {world} "
                             "processes that share it")
        own = masks[rank * len(images) : (rank + 1) * len(images)]
        output = self.model(images, own)
        if hasattr(masks, "targets_valid"):
            share = own.targets_valid.sum() / masks.targets_valid.sum()
            output = output._replace(loss=output.loss * world * share)
        return output


class Parallel(DistributedDataParallel):
    """DistributedDataParallel with the `update_target` that train_step calls."""

    def update_target(self, momentum):
        """The target encoder follows, in every process alike: nothing needs to be sent."""
        self.module.model.update_target(momentum)


def wrap(model, compiled=False):
    """What trains a model: the model, compiled if asked; among several processes a Parallel."""
    world = place()[1]
    if world > 1:
        learner = Parallel(Share(model))
        learner.broadcast_buffers = False  # positions: constants
        return torch.compile(learner) if compiled else learner
    return torch.compile(model) if compiled else model


def reduce_if(model, last):
    """Within `with`, processes average their gradients only if this pass is a step's last."""
    if last or not hasattr(model, "no_sync"):
        return contextlib.nullcontext()
    return model.no_sync()
