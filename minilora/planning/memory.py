"""Bytes at the peak of training, by component.

    peak = process + base + adapters + gradients + optimizer + workspace + activations + gathered
           + max(loss workspace, recomputed block + backward workspace) + heap

Weights and what lies between forward and backward (`saved.py`) are counted on a model's modules.
What was measured instead, of the process and of the heap, are the constants here:
`python benchmarks/plan_accuracy.py --constants` measures them again, on rows other than those that
the plan is judged on, and prints their values.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import nn

from minilora.files import one_line
from minilora.lora import Sizes, Survey, base_of, is_linear, sizes
from minilora.planning.machines import PROCESS
from minilora.planning.saved import SavedBytes
from minilora.planning.shapes import Settings, Shape, planned_model

MIB = 2**20
# A CUDA context and the libraries' own workspaces, which no allocator statistic shows.
CUDA_CONTEXT = 520 * MIB
# The C library's heap keeps what was freed between tensors that live. Of tensors below 32 MiB
# (larger ones go back to the system), measured with glibc: a fixed part, a share of what lies
# between forward and backward, and, where blocks are recomputed, a multiple of one block's tensors.
HEAP_FIXED = 83 * MIB
HEAP_SHARE = 0.21
HEAP_RECOMPUTED = 3.16
# Batches of different sizes cut each other's freed memory up: so much of the activations more.
# Of two runs one took 0.31 more (bf16), the other 0.09 (f32).
HEAP_MIXED = 0.2
# In 16 bits tensors of f32 lie between them, and oneDNN keeps products compiled for each length
# (see kernels/workspace.py): the share grows to this with 40 sizes. Chosen by runs of 14 to 74
# steps in bf16 on a Xeon with AMX; of a later one with another seed it planned 16 % too much.
HEAP_MIXED_16_BITS, MANY_SIZES, COMPILED_PRODUCTS = 0.6, 40, 160 * MIB
# In blocks of more than four linears (Llama's seven, not GPT-2's four) that compute in f32 the heap
# grows by this share of a block with every block run again. Not in bf16; and with
# MALLOC_MMAP_THRESHOLD_ set nothing of it is seen.
HEAP_EACH_F32 = 0.35
# Share of a machine's memory that a plan leaves free.
MARGIN = 0.10

# Logits the loss holds at a time, on a CPU and on a GPU, as in kernels/cross_entropy.py.
_CHUNK, _GPU_CHUNK = 3 * 2**22, 2**26
_F32 = 4


def _bytes(words: str) -> Any:
    """Return a field of `Memory`, and what its line of the table is called."""
    return field(default=0, metadata={"words": words})


@dataclass(frozen=True)
class Memory:
    """Bytes per process at the peak of training."""

    process: int = _bytes("process (Python, torch, libraries)")  # on a GPU its context
    base: int = _bytes("base, not quantized")  # linears, embeddings, norms, head
    codes: int = _bytes("base, codes")
    scales: int = _bytes("base, scales")
    adapters: int = _bytes("adapters")
    gradients: int = _bytes("their gradients")  # twice under DDP, which keeps a bucket
    optimizer: int = _bytes("optimizer (AdamW's moments)")
    activations: int = _bytes("activations")  # what lies between forward and backward
    recomputed: int = _bytes("a block run again")  # under checkpointing
    loss: int = _bytes("head and loss")
    backward: int = _bytes("backward workspace")  # of a block
    # A matrix decoded from its codes, or cast, to be multiplied; on a CPU logits take the same
    # buffer, which stays.
    workspace: int = _bytes("workspace (logits, decoded)")
    # The blocks that are whole for a moment, and embeddings and head.
    gathered: int = _bytes("gathered blocks (FSDP2)")
    heap: int = _bytes("heap (freed, but kept)")  # by the C library; 0 on a GPU

    @property
    def weights(self) -> int:
        """All of the frozen base."""
        return self.base + self.codes + self.scales

    @property
    def peak(self) -> int:
        """What is held at once at most: loss and backward pass follow one another."""
        return sum(self.components().values())

    def plus(self, heap: int) -> "Memory":
        """Return it with so many bytes more in the heap, or less."""
        return dataclasses.replace(self, heap=max(0, self.heap + heap))

    def mixed(self, dtype: torch.dtype, sizes: int) -> "Memory":
        """Return it for batches of so many sizes, this one the largest, in this dtype."""
        share, products = HEAP_MIXED, 0
        if dtype.itemsize < _F32:
            share += (HEAP_MIXED_16_BITS - HEAP_MIXED) * min(1.0, sizes / MANY_SIZES)
            products = COMPILED_PRODUCTS
        return self.plus(int(share * (self.activations + self.recomputed)) + products)

    def keeping(self, share: float) -> "Memory":
        """Return it with this share of the activations, as compiled blocks keep fewer."""
        less = int((1 - share) * self.activations)
        heap = max(0, self.heap - int(HEAP_SHARE * less))
        return dataclasses.replace(self, activations=self.activations - less, heap=heap)

    def components(self) -> dict[str, int]:
        """Return what makes up the peak, by name; it sums to `peak`."""
        in_loss = self.loss >= self.recomputed + self.backward
        left_out = ("recomputed", "backward") if in_loss else ("loss",)
        return {name: n for name, n in vars(self).items() if n and name not in left_out}


def memory_table(memory: Memory, room: int | None = None) -> str:
    """Return the components at the peak, one a line, and their sum."""
    words = {one.name: one.metadata["words"] for one in fields(Memory)}
    lines = ["Memory of each process at the peak, MB"]
    for name, size in memory.components().items():
        lines.append(f"  {words[name]:36s} {size / 1e6:12,.1f}")
    text = f"  {'peak':36s} {memory.peak / 1e6:12,.1f}"
    if room is not None:
        text += f"   of {room / 1e6:,.0f}"
    return "\n".join([*lines, text])


class Counted:
    """What a model takes whatever the batches are, counted on its modules.

    Args:
        model: with adapters, on any device.
        autocast: the dtype of autocast, None without.
        number: how many blocks each of the model's stands for, see `SavedBytes`.
        saved: what counts `saved`, where that is known.
        gpu: whether it is to train on a GPU, see `SavedBytes`.
    """

    def __init__(
        self,
        model: nn.Module,
        autocast: torch.dtype | None = None,
        number: Sequence[int] | None = None,
        saved: SavedBytes | None = None,
        gpu: bool | None = None,
    ) -> None:
        survey = Survey(model)
        blocks, modules = list(survey.blocks.values()), survey.modules
        times = [1] * len(blocks) if number is None else list(number)
        more = [(model, 1), *((b, n - 1) for b, n in zip(blocks, times, strict=True) if n > 1)]
        bytes_of = [(sizes(part), n) for part, n in more]
        names = [f.name for f in fields(Sizes)]
        # Bytes of all weights.
        self.sizes = Sizes(*(sum(n * getattr(one, name) for one, n in bytes_of) for name in names))
        self.blocks, self.block_bytes = sum(times), sizes(blocks[-1]).base
        trained = [(p, n) for part, n in more for p in part.parameters() if p.requires_grad]
        self.trained = sum(n * p.numel() for p, n in trained)
        self.trained_bytes = sum(n * p.nbytes for p, n in trained)
        # Two moments; of what is narrower than f32 they and a copy are kept in f32.
        self.optimizer_bytes = sum(
            n * (2 * p.nbytes if p.dtype.itemsize >= _F32 else 3 * _F32 * p.numel())
            for p, n in trained
        )
        inside = [_linears(block) for block in blocks]
        self.linears = len(inside[-1])  # of a block
        self.weights = sum(n * N * K for n, found in zip(times, inside, strict=True)
                           for N, K in found)  # fmt: skip
        # Of a block's linears, inputs or outputs.
        self.widest = max(max(shape) for found in inside for shape in found)
        # Those that have an adapter or are stored as codes.
        self.matrices = [
            base_of(module).shape for name, module in modules.items() if is_linear(module)
            and (name in survey.layers or base_of(module).is_quantized)
        ]  # fmt: skip
        self.saved = saved or SavedBytes(model, autocast, number=number, gpu=gpu)
        self.head = base_of(modules[self.saved.head]).shape  # vocabulary, and the blocks' width


def _linears(module: nn.Module) -> list[tuple[int, int]]:
    """Return `[N, K]` of the linears inside."""
    return [base_of(one).shape for one in Survey(module).modules.values() if is_linear(one)]


_known: dict[str, Counted] = {}  # a plan asks for the same many times


def count_planned(
    shape: Shape, settings: Settings, most: int | None = None, gpu: bool = False
) -> Counted:
    """Count what the settings make of a shape; `most`: of a model of that many blocks a sort."""
    # None of these changes what is counted.
    same: dict[str, Any] = dict.fromkeys(("batch_size", "accumulate", "length", "ranks"), 1)
    same |= {"learned": 1.0, "moment_bytes": None, "parallel": None, "pass_tokens": None}
    same |= {"compile": False, "checkpointing": False, "shared": 0}
    key = repr((shape.config, dataclasses.replace(settings, **same), most, gpu))
    if key not in _known:
        if len(_known) >= 64:
            _known.clear()
        model, number = planned_model(shape, settings, most or 2)
        autocast, saved = settings.dtype if settings.autocast else None, None
        # A frozen base keeps nothing, whatever it is stored in.
        if settings.format and not autocast:
            plain = dataclasses.replace(settings, format=None)
            saved = count_planned(shape, plain, most, gpu).saved
        try:
            _known[key] = Counted(model, autocast, None if most else number, saved, gpu)
        except RuntimeError as error:
            if not shape.foreign:
                raise
            raise ValueError(
                f"plan() runs a model on shapes alone, which transformers' {type(model).__name__} "
                f"does not take ({one_line(error, 120)}); known is that {shape.parameters:,} "
                f"parameters take {shape.parameters * 2e-9:.2g} GB in 16 bits"
            ) from error
    return _known[key]


def count_memory(
    shape: Shape,
    settings: Settings,
    *,
    gpu: bool = False,
    integer: str | None = "int8",
    process: int | None = None,
    counted: Counted | None = None,
) -> Memory:
    """Plan the peak of one process.

    Args:
        shape: of the model.
        settings: of the run.
        gpu: whether it trains on a GPU, whose memory is meant then.
        integer: how INT8 and INT4 are multiplied as integers there, `"int8"` or `"blocks"` (see
            `kernels/int8.py`); None: as floats.
        process: bytes of a process that trained nothing; None: `PROCESS` or `CUDA_CONTEXT`.
        counted: a model that is there; default: what the settings make of the shape.

    Raises:
        ValueError: what `quantize` or `inject` would refuse by shape; rows longer than the model's
            context.
    """
    shape.check_length(settings.length)
    found = count_planned(shape, settings, gpu=gpu) if counted is None else counted
    integer = None if gpu else integer
    kept = found.saved(settings.rows, settings.length, settings.shared)
    held, again = (kept.inputs, kept.block) if settings.checkpointing else (kept.total, 0)
    share = settings.ranks if settings.parallel == "fsdp" else 1
    moments = found.optimizer_bytes
    if settings.moment_bytes is not None:
        moments = 2 * found.trained * settings.moment_bytes
    # The loss keeps its gradient for the head's input.
    held += settings.learned_tokens * found.head[1] * settings.dtype.itemsize
    base = found.sizes
    gathered = 2 * found.block_bytes + base.base - found.block_bytes * found.blocks
    if process is None:
        process = CUDA_CONTEXT if gpu else PROCESS
    return Memory(
        process=process,
        base=(base.linears + base.embeddings + base.other) // share,
        codes=base.codes // share,
        scales=base.scales // share,
        adapters=base.adapters // share,
        gradients=found.trained_bytes * (2 if settings.parallel == "ddp" else 1) // share,
        optimizer=moments // share,
        activations=held,
        recomputed=again,
        loss=_loss(found, settings, gpu),
        backward=_backward(found, settings, integer),
        workspace=_workspace(found, settings, gpu, integer),
        gathered=gathered if share > 1 else 0,
        heap=0 if gpu else _heap(found, settings, held, again),
    )


def grows(found: Counted, settings: Settings) -> bool:
    """Return whether the heap grows with every block run again, see `HEAP_EACH_F32`."""
    return found.linears > 4 and settings.dtype == torch.float32


def _heap(found: Counted, settings: Settings, held: int, again: int) -> int:
    each = HEAP_EACH_F32 * found.blocks if grows(found, settings) else 0.0
    return int(HEAP_FIXED + HEAP_SHARE * held + (HEAP_RECOMPUTED + each) * again)


def _logits(found: Counted, settings: Settings, gpu: bool) -> int:
    """Count the logits that the loss holds at a time."""
    V = found.head[0]
    return min(settings.learned_tokens, max(32, (_GPU_CHUNK if gpu else _CHUNK) // V)) * V


def _loss(found: Counted, settings: Settings, gpu: bool) -> int:
    """Head and loss: the rows that learn, the head under autocast; on a GPU a chunk of logits.

    They turn into their own gradient in place, after a copy in f32 where they are narrower. On a
    CPU both lie in buffers that stay (`_workspace`).
    """
    (V, h), w = found.head, settings.dtype.itemsize
    cast = V * h * w if settings.autocast else 0
    chunk = _logits(found, settings, gpu) * (w + (_F32 if w < _F32 else 0)) if gpu else 0
    return chunk + (settings.tokens - settings.rows) * h * w + cast


def _backward(found: Counted, settings: Settings, integer: str | None) -> int:
    """Gradients within a block, and the copies that `_int_mm` takes and gives, f32 and integer."""
    tokens, h, i = settings.tokens, found.head[1], found.widest
    total = tokens * (3 * i + 3 * h) * settings.dtype.itemsize
    spec = settings.spec
    if integer == "int8" and spec is not None and spec.storage.integer:
        total += tokens * i * (3 * _F32 + 1) + tokens * h * 2 * _F32
    return total


def _workspace(found: Counted, settings: Settings, gpu: bool, integer: str | None) -> int:
    """Return the bytes of what is decoded or cast before it is multiplied, and of logits.

    A CPU has one buffer a dtype, as large as the largest of them (`kernels/workspace.py`).
    """
    largest = max((N * K for N, K in found.matrices), default=0)
    w = settings.dtype.itemsize
    logits = 0 if gpu else _logits(found, settings, gpu) * w
    spec = settings.spec
    if spec is None:
        return logits + (largest * w if settings.autocast else 0)
    beside = spec.storage.workspace_bytes(spec, largest)
    integer = integer if spec.storage.integer else None
    if integer == "blocks":  # codes in another order, and those of X; a sixteenth for their sums
        longest = max(max(shape) for shape in found.matrices)
        return beside + logits + (largest + settings.tokens * longest) * 17 // 16
    return beside + max(logits, 0 if integer else largest * w)
