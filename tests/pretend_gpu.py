"""A device that is none: its tensors lie in memory and are computed there, under another name.

Where a tensor of the CPU meets one of the device, it is an error, as on a GPU: so a run shows every
place that forgets to say where it makes a tensor.
`switch_on` is for a process of its own: torch has one such device.
"""

import torch
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map

NAME = "pretend"
_COPIES = ("aten::copy_", "aten::_to_copy")  # may take one of each


class Pretended(torch.Tensor):
    """A tensor of the device, and where its values are."""

    raw: torch.Tensor

    @staticmethod
    def __new__(cls, raw):
        made = torch.Tensor._make_wrapper_subclass(
            cls, raw.size(), strides=raw.stride(), storage_offset=raw.storage_offset(),
            dtype=raw.dtype, device=torch.device(NAME, 0),
        )  # fmt: skip
        made.raw = raw
        return made

    def tolist(self):
        return self.cpu().tolist()

    def __repr__(self):
        return f"Pretended({self.raw})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


class _Everywhere(TorchDispatchMode):
    """Sees what is made on the device out of nothing."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


def _run(func, args, kwargs):
    tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, torch.Tensor)]
    ours = any(isinstance(t, Pretended) for t in tensors)
    target = kwargs.get("device")
    name = func._schema.name
    if not ours and (target is None or torch.device(target).type != NAME):
        return func(*args, **kwargs)
    strangers = [t for t in tensors if not isinstance(t, Pretended) and t.dim()]
    if ours and strangers and name not in _COPIES:
        raise RuntimeError(f"{name} met tensors of two devices: {[t.shape for t in tensors]}")
    plain = tree_map(lambda t: t.raw if isinstance(t, Pretended) else t, (args, kwargs))
    leaves = target is not None and torch.device(target).type != NAME
    if target is not None:
        plain[1]["device"] = torch.device("cpu")
    with torch._C._DisableTorchDispatch():
        found = func(*plain[0], **plain[1])
        if name == "aten::_to_copy" and any(found is t for t in tree_flatten(plain)[0]):
            found = found.clone()
    if leaves or name == "aten::_local_scalar_dense":
        return found
    found = tree_map(lambda t: Pretended(t) if isinstance(t, torch.Tensor) else t, found)
    return return_and_correct_aliasing(func, args, kwargs, found)


class _Generator(torch.Generator):
    """Of the CPU, whatever device is asked for."""

    def __new__(cls, device="cpu"):
        return super().__new__(cls)


def switch_on():
    """Make the device known to torch, and to the layers that take plain tensors alone."""
    from minilora.lora import base

    module = backend_registration._DummyBackendModule()
    module.get_amp_supported_dtype = lambda: [torch.bfloat16]
    backend_registration._setup_privateuseone_for_python_backend(NAME, module)
    base.FakeTensor = Pretended  # the one subclass whose weights are read as they are
    torch.Generator = _Generator
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(…) then copies where a mode sees it
    _Everywhere().__enter__()
