"""A device that this machine lacks, played by the CPU: `mps`, Apple's GPUs.

Within `pretending()` a tensor that goes to `mps` becomes a Remote, whose values stay on the CPU. It
refuses what the device refuses: float64, company of tensors on the CPU, NumPy, kernels that torch
2.6 lacks there, and copies that are not waited for (they may read their source once it is freed).
Numbers come from the CPU: what is tested is where tensors are, not what Apple's kernels compute.
"""

import contextlib

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

aten = torch.ops.aten
LACKING = {aten._upsample_bilinear2d_aa.default, aten.grid_sampler_3d.default,
           aten.upsample_trilinear3d.default}
# Calls that take tensors of two devices: copies, and indices on the CPU.
ACROSS = {aten.copy_.default, aten.index.Tensor, aten.index_put_.default}


def is_pretended(device):
    return device is not None and torch.device(device).type == "mps"


class Remote(torch.Tensor):
    """A tensor on the pretended device; `values` is the same on the CPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: torch.device("mps"))

    @staticmethod
    def __new__(cls, values):
        return torch.Tensor._make_wrapper_subclass(
            cls, values.shape, strides=values.stride(), dtype=values.dtype)

    def __init__(self, values):
        if values.dtype == torch.float64:
            raise TypeError("mps has no float64")
        self.values = values

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return call(function, args, kwargs or {})

    # What torch answers from the tensor's memory, without a dispatch.

    def cpu(self):
        return self.values.clone()

    def to(self, *args, **kwargs):
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        same = self if dtype in (None, self.dtype) else super().to(dtype)
        return same.cpu() if device and device.type == "cpu" else same

    def numpy(self, *args):
        raise TypeError("can't convert an mps tensor to numpy; use Tensor.cpu() first")

    __array__ = numpy

    def tolist(self):
        return self.values.tolist()

    def new_tensor(self, values, **options):
        return Remote(self.values.new_tensor(values, **options))

    def __reduce_ex__(self, protocol):  # for torch.save
        return self.values.__reduce_ex__(protocol)


def call(function, args, kwargs):
    """Call a kernel as the device would: with its inputs all there, and its outputs too."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    there = any(isinstance(tensor, Remote) for tensor in tensors)
    device = kwargs.get("device")
    if not there and not is_pretended(device):
        return function(*args, **kwargs)
    if function in LACKING:
        raise NotImplementedError(f"{function} is not implemented for mps")
    here = [t for t in tensors if t.ndim and not isinstance(t, Remote)]  # numbers go everywhere
    if there and here and function not in ACROSS:
        raise RuntimeError(f"{function}: expected all tensors on one device, found mps and cpu")
    if not there and kwargs.get("non_blocking"):
        raise RuntimeError("a copy to mps that is not waited for may read what is freed")
    if device is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    arguments = tree_map_only(Remote, lambda tensor: tensor.values, (args, kwargs))
    answer = function(*arguments[0], **arguments[1])
    if function._schema.name.endswith("_"):  # in place
        return args[0]
    return tree_map_only(torch.Tensor, Remote, answer)


class Dispatch(TorchDispatchMode):
    """Sees the calls that have no Remote among their inputs: those that bring tensors there."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return call(function, args, kwargs or {})


class Number(TorchFunctionMode):
    """Gives the device a number: without one, torch asks a driver for it."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        def numbered(value):
            bare = isinstance(value, (str, torch.device)) and str(value) == "mps"
            return torch.device("mps", 0) if bare else value

        named = {name: numbered(value) for name, value in (kwargs or {}).items()}
        return function(*map(numbered, args), **named)


@contextlib.contextmanager
def pretending():
    """Within `with`, this machine has the device."""
    with pytest.MonkeyPatch.context() as patch, Number(), Dispatch():
        patch.setattr(torch.backends.mps, "is_available", lambda: True)
        # Modules get new parameters: a plain one's memory could not be exchanged for a Remote's.
        convert = torch.__future__.get_overwrite_module_params_on_conversion()
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        try:
            yield torch.device("mps")
        finally:
            torch.__future__.set_overwrite_module_params_on_conversion(convert)
