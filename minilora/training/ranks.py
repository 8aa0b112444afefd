"""One process or several: torch's DDP and FSDP2, and what ranks must agree on.

Started by torchrun, which sets the addresses. Gradients are reduced once a step: under `ddp` by
torch's DistributedDataParallel over the trained parameters, in a backward pass of zeros after the
rank's own passes, so that ranks may have any number of passes; under `fsdp` by `fully_shard` in
every pass.
"""

import ctypes
import functools
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from minilora.files import short
from minilora.kernels import hardware
from minilora.lora import lora_layers, weight_device, weight_sample
from minilora.quantization import weight_values

KINDS = ("ddp", "fsdp")
_MMAP_THRESHOLD = -3  # name of a setting in glibc's malloc.h


class _Trained(nn.Module):
    """The trained parameters alone, for DDP to look after; its output is 0."""

    def __init__(self, parameters: list[Any]):
        super().__init__()
        self.parameters_ = nn.ParameterList(parameters)

    def forward(self) -> Tensor:
        return torch.stack([(p * 0).sum().float() for p in self.parameters_]).sum()


class Ranks:
    """The processes of a run. Without a kind there is one, and nothing is communicated.

    Attributes:
        kind: None, `"ddp"` or `"fsdp"`.
        rank: this process, from 0; 0 writes and prints.
        world: how many there are.

    Raises:
        RuntimeError: a kind is asked for, but torchrun did not start this process; or torchrun
            did, and no kind is asked for.
    """

    def __init__(self, kind: str | None = None, device: torch.device | None = None):
        self.kind, self.rank, self.world = kind, 0, 1
        self.device = device or torch.device("cpu")
        self.reducer: nn.Module | None = None
        if kind is not None:
            start(kind, self.device)
            self.rank, self.world = dist.get_rank(), dist.get_world_size()
            if kind == "fsdp":
                _give_back_freed_memory()
        elif torchrun_number("WORLD_SIZE", 1) > 1:
            raise RuntimeError(
                f"each of several processes must train with parallel='ddp' or 'fsdp' (--parallel), "
                f"found {os.environ['WORLD_SIZE']} processes without it, which would all write the "
                f"same files; add it, or start one process"
            )

    def sums(self, *values: float) -> list[float]:
        """Return each value's sum over all ranks."""
        if self.kind is None:
            return list(values)
        sums = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(sums)
        return sums.tolist()

    def apart(self, value: int) -> list[int]:
        """Return a list whose sums over all ranks are every rank's value."""
        return [value if rank == self.rank else 0 for rank in range(self.world)]

    def any(self, here: bool) -> bool:
        """Tell whether it holds on any rank."""
        return self.sums(here)[0] > 0

    def agree(self, dtype: torch.dtype | None) -> torch.dtype | None:
        """Return rank 0's dtype."""
        known = [None, torch.float64, torch.float32, torch.bfloat16, torch.float16]
        return known[int(self.of_first(known.index(dtype)))]

    def of_first(self, value: float) -> float:
        """Return rank 0's value."""
        return self.sums(value if self.rank == 0 else 0.0)[0]

    def one_after_the_first(self, action: Callable[[], Any]) -> Any:
        """Let rank 0 act before the others do."""
        if self.kind is not None and self.rank > 0:
            dist.barrier()
        result = action()
        if self.kind is not None and self.rank == 0:
            dist.barrier()
        return result

    def take_first(self, tensors: Iterable[Tensor]) -> None:
        """Replace each whole tensor by rank 0's."""
        for tensor in tensors if self.kind is not None else ():
            if not hasattr(tensor, "full_tensor"):  # of a sharded one each rank has its own part
                value = tensor.detach().contiguous()
                dist.broadcast(value, 0)
                tensor.data.copy_(value)

    def look_after(self, names: dict[Tensor, str]) -> None:
        """Let DDP give every rank rank 0's parameters, and reduce their gradients from now on."""
        if self.kind == "ddp":
            from torch.nn.parallel import DistributedDataParallel

            self.reducer = DistributedDataParallel(_Trained(list(names)))

    def reduce(self) -> None:
        """Replace the ranks' gradients by their mean, where the passes have not done so."""
        if self.reducer is not None:
            parameters: Any = self.reducer.module.parameters_  # type: ignore[union-attr]
            used = self.sums(*(p.grad is not None for p in parameters))
            self.reducer().backward()
            for parameter, ranks in zip(parameters, used, strict=True):
                if not ranks:  # the zeros came from here alone: AdamW would go on by its moments
                    parameter.grad = None

    def full(self, tensor: Tensor) -> Tensor:
        """Return a whole tensor of one that may be sharded; all ranks must ask."""
        return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor

    def put(self, tensor: Tensor, value: Tensor) -> None:
        """Write a whole value into a tensor that may be sharded."""
        with torch.no_grad():
            tensor.copy_(self.like(tensor, value))

    def like(self, tensor: Tensor, value: Tensor) -> Tensor:
        """Shard a whole value as `tensor` is."""
        value = value.to(tensor.device)
        if not hasattr(tensor, "full_tensor"):
            return value.clone()
        from torch.distributed.tensor import distribute_tensor

        mesh, placements = tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]
        return distribute_tensor(value, mesh, placements, src_data_rank=None)

    def lost(self, error: BaseException) -> bool:
        """Tell whether an error means that another process is gone."""
        words = r"(?i)connection|by peer|gloo|nccl|timed out|socket"
        return self.kind is not None and isinstance(error, RuntimeError) and bool(
            re.search(words, str(error))
        )  # fmt: skip

    def close(self) -> None:
        """Forget what looks after the parameters."""
        self.reducer = None


@functools.cache
def _give_back_freed_memory() -> None:
    """Let glibc hand blocks above 1 MB back to the system as they are freed.

    Under FSDP2 each block of the model is gathered into new tensors that are freed after it; gloo's
    threads would each keep theirs in a heap of its own (benchmarks/NOTES.md).
    """
    mallopt: Any = None
    if sys.platform.startswith("linux"):
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, 2**20)


def torchrun_number(name: str, default: int) -> int:
    """Return a number that torchrun sets in the environment.

    Raises:
        RuntimeError: it is no number.
    """
    text = os.environ.get(name, str(default))
    if not text.isascii() or not text.isdigit() or len(text) > 9:
        raise RuntimeError(
            f"the environment variable {name} must be a whole number, as torchrun sets it, found "
            f"{short(text)}; unset it"
        )
    return int(text)


def start(kind: str, device: torch.device) -> None:
    """Join the processes that torchrun started, unless that has been done.

    Raises:
        RuntimeError: torchrun did not start this process.
    """
    if dist.is_initialized():
        return
    if not dist.is_available() or "RANK" not in os.environ:
        raise RuntimeError(
            f"parallel='{kind}' needs processes started by torchrun, found none of its variables; "
            f"start: torchrun --nproc-per-node N -m minilora train ... --parallel {kind}"
        )
    for name in ("RANK", "WORLD_SIZE"):
        torchrun_number(name, 0)
    if device.type == "cuda":
        torch.cuda.set_device(torchrun_number("LOCAL_RANK", 0))
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")


def common_dtype(kind: str) -> torch.dtype:
    """Return the dtype that is fastest on rank 0, for all: the others' probe may find another."""
    dtypes = [torch.float32, torch.bfloat16, torch.float16]
    ranks = Ranks(kind)
    mine = dtypes.index(hardware().dtype) if ranks.rank == 0 else 0
    return dtypes[int(ranks.of_first(mine))]


def leave() -> None:
    """Leave the other processes, at the end of the program."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def is_sharded(model: nn.Module) -> bool:
    """Tell whether a model went through `shard`."""
    return any(hasattr(p, "full_tensor") for p in model.parameters())


def shard(model: nn.Module) -> None:
    """Shard a model with adapters over all ranks by FSDP2, block by block.

    Frozen parameters of any dtype (codes in uint8 or int8, scales) are sharded beside the trained
    ones, which must be of one dtype in each block. Blocks are the entries of the largest
    `nn.ModuleList`.

    Raises:
        ValueError: an adapter with trained copies or of several dtypes.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    layers = lora_layers(model)
    for fqn, layer in layers.items():
        if len(layer.held):
            raise ValueError(
                f"parallel='fsdp' shards factors only, but {fqn} has trained copies of base "
                f"parameters (bias or modules_to_save); use parallel='ddp'"
            )
    dtypes = {str(p.dtype) for p in model.parameters() if p.requires_grad}
    if len(dtypes) > 1:
        raise ValueError(
            f"parallel='fsdp' needs trained parameters of one dtype, found "
            f"{', '.join(sorted(dtypes))}; inject with one dtype"
        )
    for fqn, layer in layers.items():  # the whole weight is not at hand later
        if layer.base_sample is None and weight_device(layer.base).type != "meta":
            layer.base_sample = weight_sample(fqn, weight_values(layer.base))
    device = next(model.parameters()).device.type
    mesh = init_device_mesh("cpu" if device == "meta" else device, (dist.get_world_size(),))
    for block in blocks(model):
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    fully_shard(model, mesh=mesh, reshard_after_forward=True)
    if callable(getattr(model, "loss", None)):
        register_fsdp_forward_method(model, "loss")


def blocks(model: nn.Module) -> list[nn.Module]:
    """Return the entries of the module list with the most parameters."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
    sizes = [sum(p.numel() for p in found.parameters()) for found in lists]
    return list(lists[sizes.index(max(sizes))]) if lists else []


@contextmanager
def whole_factors(model: nn.Module, adapter: str) -> Iterator[None]:
    """Within the block the adapter's factors are whole tensors; all ranks must enter."""
    swapped = []
    for layer in lora_layers(model).values():
        if adapter in layer.adapters:
            held = layer.adapters[adapter]._parameters
            for key, parameter in held.items():
                if parameter is not None and hasattr(parameter, "full_tensor"):
                    swapped.append((held, key, parameter))
                    held[key] = nn.Parameter(parameter.full_tensor().detach())
    try:
        yield
    finally:
        for held, key, parameter in swapped:
            held[key] = parameter
