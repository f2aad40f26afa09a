"""More than one process: `torchrun --nproc_per_node=2 train.py ...`. One process is a team of one, and nothing here costs it anything.

The processes share each batch: `--batch-size` is what all of them see together, so that a run's result does not depend on how many there
are. Every process draws the crops and masks of the whole batch from the same generator and keeps its own rows; DistributedDataParallel
averages the gradients. Only the first process writes.
"""

import contextlib
import itertools
import os
import socket
import tempfile
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import data
from config import UsageError

TEAMS = itertools.count()  # teams made so far by this process


def place():
    """(number of this process, how many there are): (0, 1) outside of torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def first():
    """Whether this process is the one that writes and prints."""
    return place()[0] == 0


def local():
    """This process's number on its machine, which is also that of its GPU; 0 outside of torchrun."""
    return int(os.environ.get("LOCAL_RANK", 0))


@contextlib.contextmanager
def team(device):
    """Within `with`, the processes that torchrun started are in touch: GPUs by nccl, their hosts by gloo."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # A prefix of its own: after a restart the store still has the addresses of the processes before.
    store, rank, world = next(dist.rendezvous("env://"))
    store = dist.PrefixStore(f"{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}-{next(TEAMS)}", store)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=timedelta(minutes=30), store=store,
                            rank=rank, world_size=world)
    try:
        yield
    finally:
        dist.destroy_process_group()


def restarted():
    """Whether torchrun started this process again because one of its team was lost (--max-restarts)."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


# --- what all must agree on ----------------------------------------------------------------------------------------------


def any_of(flag):
    """Whether the flag is set in any process. Hosts ask each other here; no GPU is waited for."""
    if place()[1] == 1:
        return flag
    flags = torch.tensor([float(flag)])
    dist.all_reduce(flags, dist.ReduceOp.MAX)
    return bool(flags.item())


def from_first(value):
    """The first process's value (any object that can be pickled), in every process."""
    if place()[1] == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, 0)
    return values[0]


def mean(value):
    """The mean over the processes of a scalar tensor, as a float."""
    value = value.detach().float().clone()
    if place()[1] > 1:
        dist.all_reduce(value)
    return value.item() / place()[1]


# --- data: read from disk once a machine ---------------------------------------------------------------------------------


def load(*arguments):
    """data.load(*arguments), read by one process of each machine; the others map the same memory.

    Images that are too many for memory are listed once too, and each process decodes only its own.
    """
    if place()[1] == 1:
        return data.load(*arguments)
    folder = "/dev/shm" if os.access("/dev/shm", os.W_OK) else tempfile.gettempdir()
    path = os.path.join(folder, f"ijepa-{socket.gethostname()}-{os.getppid()}.pt")  # torchrun is the parent of all on a machine
    problem = None
    if local() == 0:
        try:
            dataset = data.load(*arguments)
            with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
                torch.save(vars(dataset) if isinstance(dataset.images, torch.Tensor) else {"lazy": True}, file)
        except UsageError as error:
            problem = error
    if any_of(problem is not None):
        raise problem or UsageError("the data could not be read by another process of this run")
    if local() != 0:
        content = torch.load(path, mmap=True, weights_only=True)
        dataset = data.load(*arguments) if "lazy" in content else data.ImageDataset(**content)
    any_of(False)  # everyone has mapped it: its name can go, its memory stays until the last process ends
    if local() == 0:
        os.remove(path)
    return dataset


# --- the model -----------------------------------------------------------------------------------------------------------


class Share(nn.Module):
    """A model that is shown this process's rows of the global batch, with a loss whose mean over the processes is the whole batch's.

    Its `forward` draws the masks of the whole batch and takes its own. The blocks of one share hold a few patches more than another's,
    so a plain mean of means would not be the mean over all target patches: each share is weighted by its number of them.

    compiled: what the model does with images and masks becomes one graph of torch.compile. The masks are drawn outside of it, for a graph
    holds no torch.Generator; the model itself stays as it is for whoever else calls it, and so do the names of its weights.
    """

    def __init__(self, model, compiled=False):
        super().__init__()
        self.model = model
        self.run = torch.compile(model.forward, fullgraph=True) if compiled else model

    def forward(self, images, *labels, generator):
        if not hasattr(self.model, "masking"):
            return self.run(images, *labels)  # supervision: every share has as many images
        rank, world = place()
        whole = self.model.masking(len(images) * world, generator)
        masks = whole.share(rank, world)
        output = self.run(images, masks)
        if whole.targets_valid is not None:
            output = output._replace(loss=output.loss * world * masks.targets_valid.sum() / whole.targets_valid.sum())
        return output

    def update_target(self, momentum):
        """The target encoder follows."""
        self.model.update_target(momentum)


class Parallel(DistributedDataParallel):
    """DistributedDataParallel of a model's Share, with the `update_target` that train_step calls."""

    def update_target(self, momentum):
        """The target encoder follows; every process does the same, so nothing need be sent."""
        self.module.update_target(momentum)


def wrap(model, compiled=False):
    """What trains a model: the model itself, its Share where it is compiled, or a Parallel of that where there are several processes."""
    if place()[1] > 1:
        return Parallel(Share(model, compiled))
    return Share(model, compiled) if compiled else model
