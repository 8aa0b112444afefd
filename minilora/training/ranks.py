"""The processes of a run: torch's DDP and FSDP2, started by torchrun, which sets the addresses.

Gradients are reduced once a step: under `ddp` by torch's DistributedDataParallel over the trained
parameters, in a backward pass of zeros after the rank's own passes, so that ranks may have any
number of passes; under `fsdp` by `fully_shard` in every pass.
"""

import os
import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from minilora.files import short
from minilora.kernels import hand_back_large_blocks, hardware


class _Trained(nn.Module):
    """The trained parameters alone, for DDP to wrap; its output is 0."""

    def __init__(self, parameters: list[Any]):
        super().__init__()
        self.parameters_ = nn.ParameterList(parameters)

    def forward(self) -> Tensor:
        return torch.stack([(p * 0).sum().float() for p in self.parameters_]).sum()


class Ranks:
    """The processes of a run. Without `parallel` there is one, and nothing is communicated.

    Attributes:
        parallel: None, `"ddp"` or `"fsdp"`.
        rank: this process, from 0; rank 0 writes and prints.
        world_size: the number of processes.

    Raises:
        RuntimeError: `parallel` is given, but torchrun did not start this process; or torchrun
            did, and it is not given.
    """

    def __init__(self, parallel: str | None = None, device: torch.device | None = None):
        self.parallel, self.rank, self.world_size = parallel, 0, 1
        self.device = device or torch.device("cpu")
        self.reducer: Any = None
        if parallel is not None:
            start(parallel, self.device)
            self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
            if parallel == "fsdp":
                hand_back_large_blocks()
        elif torchrun_number("WORLD_SIZE", 1) > 1:
            raise RuntimeError(
                f"each of several processes must train with --parallel ddp or fsdp (in Python: "
                f"parallel=), found {os.environ['WORLD_SIZE']} processes without it, which would "
                f"all write the same files; add it, or start one process"
            )

    def all_reduce(self, *values: float) -> list[float]:
        """Return each value's sum over all ranks."""
        if self.parallel is None:
            return list(values)
        sums = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(sums)
        return sums.tolist()

    def all_gather(self, value: int) -> list[int]:
        """Return every rank's value."""
        mine = [value if rank == self.rank else 0 for rank in range(self.world_size)]
        return [int(n) for n in self.all_reduce(*mine)]

    def merge(self, new: dict) -> dict:
        """Return the union of all ranks' entries."""
        if self.parallel is None or not self.any(bool(new)):
            return new
        found: list[Any] = [None] * self.world_size
        dist.all_gather_object(found, new)
        return {key: value for one in found for key, value in one.items()}

    def any(self, here: bool) -> bool:
        """Return whether it holds on any rank."""
        return self.all_reduce(here)[0] > 0

    def broadcast(self, value: Any) -> Any:
        """Return rank 0's value."""
        if self.parallel is None:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def rank0_first(self, action: Callable[[], Any]) -> Any:
        """Let rank 0 act before the others do; return what the action returns."""
        if self.parallel is not None and self.rank > 0:
            dist.barrier()
        result = action()
        if self.parallel is not None and self.rank == 0:
            dist.barrier()
        return result

    def broadcast_tensors(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by rank 0's; of a sharded one each rank keeps its own shard."""
        for tensor in tensors if self.parallel is not None else ():
            if not hasattr(tensor, "full_tensor"):
                value = tensor.detach().contiguous()
                dist.broadcast(value, 0)
                tensor.data.copy_(value)

    def wrap(self, parameters: Iterable[Tensor]) -> None:
        """Let DDP give every rank rank 0's parameters, and reduce their gradients from now on."""
        if self.parallel == "ddp":
            from torch.nn.parallel import DistributedDataParallel

            self.reducer = DistributedDataParallel(_Trained(list(parameters)))

    def reduce_gradients(self) -> None:
        """Replace the ranks' gradients by their mean, where the passes have not done so."""
        if self.reducer is not None:
            parameters = self.reducer.module.parameters_
            used = self.all_reduce(*(p.grad is not None for p in parameters))
            self.reducer().backward()
            for parameter, ranks in zip(parameters, used, strict=True):
                if not ranks:  # the zeros came from here alone: AdamW would go on by its moments
                    parameter.grad = None

    def full(self, tensor: Tensor) -> Tensor:
        """Return a whole tensor of one that may be sharded; all ranks must call this."""
        return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor

    def put(self, tensor: Tensor, value: Tensor) -> None:
        """Write a whole value into a tensor that may be sharded."""
        with torch.no_grad():
            tensor.copy_(self.shard_like(tensor, value))

    def shard_like(self, tensor: Tensor, value: Tensor) -> Tensor:
        """Return a copy of a whole value, sharded as `tensor` is."""
        value = value.to(tensor.device)
        if not hasattr(tensor, "full_tensor"):
            return value.clone()
        from torch.distributed.tensor import distribute_tensor

        mesh, placements = tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]
        return distribute_tensor(value, mesh, placements, src_data_rank=None)

    def has_lost_peer(self, error: BaseException) -> bool:
        """Return whether an error means that another process is gone."""
        words = r"(?i)connection|by peer|gloo|nccl|timed out|socket"
        failed = self.parallel is not None and isinstance(error, RuntimeError)
        return failed and re.search(words, str(error)) is not None

    def close(self) -> None:
        """Drop DDP's wrapper."""
        self.reducer = None


def torchrun_number(name: str, default: int) -> int:
    """Return a number that torchrun sets in the environment.

    Raises:
        RuntimeError: it is not a number.
    """
    text = os.environ.get(name, str(default))
    if not text.isascii() or not text.isdigit() or len(text) > 9:
        raise RuntimeError(
            f"the environment variable {name} must be a whole number, as torchrun sets it, found "
            f"{short(text)}; unset it"
        )
    return int(text)


def start(parallel: str, device: torch.device) -> None:
    """Join the processes that torchrun started, unless that has been done."""
    if dist.is_initialized():
        return
    if not dist.is_available() or "RANK" not in os.environ:
        raise RuntimeError(
            f"parallel='{parallel}' needs processes started by torchrun, found none of its "
            f"variables; start: torchrun --nproc-per-node N -m minilora train ... --parallel "
            f"{parallel}"
        )
    for name in ("RANK", "WORLD_SIZE"):
        torchrun_number(name, 0)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")


def common_dtype(parallel: str) -> torch.dtype:
    """Return the dtype that is fastest on rank 0, for all: another rank's probe may differ."""
    ranks = Ranks(parallel)
    return ranks.broadcast(hardware().dtype if ranks.rank == 0 else None)


def leave() -> None:
    """Leave the other processes, at the end of the program."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
