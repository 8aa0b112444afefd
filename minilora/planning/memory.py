"""Bytes at the peak of training, by component, on shapes alone.

    peak = process + base + adapters + gradients + optimizer + workspace + activations + gathered
           + max(loss workspace, recomputed block + backward workspace) + heap

The base is counted by `minilora.lora.storage`, activations by `activations.py`; what can't be
derived (the process, the heap) stands in `constants.py`.
"""

import math
from dataclasses import dataclass, field, fields
from typing import Any

import torch

from minilora.files import short
from minilora.lora import Sizes, sizes
from minilora.planning import constants
from minilora.planning.activations import Pass, block_saved, linears_by_block, saved
from minilora.planning.shapes import Linear, Shape, adapted
from minilora.quantization import FORMATS, Quantization

_CHUNK = 3 * 2**22  # logits the loss holds at a time, as minilora.kernels.cross_entropy
_F32 = 4


@dataclass(frozen=True)
class Settings:
    """What decides memory and time beside the model; checked.

    Attributes:
        format: of the base's linears: None, `"int8"`, `"nf4"` or `"int4"`.
        dtype: of everything else, and of what is computed.
        r: rank.
        targets: as for `inject`.
        exclude: likewise.
        batch_size: rows of a micro-batch, over all ranks.
        accumulate: micro-batches of a step.
        length: tokens of a row.
        checkpointing: recompute blocks in the backward pass.
        dropout: of the adapters.
        ranks: processes.
        parallel: None, `"ddp"` or `"fsdp"`.
        block_size: of nf4 and int4.
        double_quant: of nf4.
        autocast: whether an f32 base computes in `dtype` under autocast.
        adapter_dtype: of the factors and their gradients.
        moment_bytes: of one of AdamW's two moments, an element; None: as the factors (an 8-bit
            optimizer has 1).
        learned: share of the predicted tokens that enters the loss, in (0, 1].
    """

    format: str | None = None
    dtype: torch.dtype = torch.bfloat16
    r: int = 8
    targets: object = "all-linear"
    exclude: object = ()
    batch_size: int = 8
    accumulate: int = 1
    length: int = 512
    checkpointing: bool = False
    dropout: float = 0.0
    ranks: int = 1
    parallel: str | None = None
    block_size: int = 64
    double_quant: bool = True
    autocast: bool = False
    adapter_dtype: torch.dtype = torch.float32
    moment_bytes: int | None = None
    learned: float = 1.0

    def __post_init__(self) -> None:
        for key in ("batch_size", "accumulate", "length", "ranks"):
            whole(key, getattr(self, key))
        if self.parallel not in (None, "ddp", "fsdp"):
            raise ValueError(f"parallel must be None, 'ddp' or 'fsdp', found {self.parallel!r}")
        if (self.parallel is None) != (self.ranks == 1):
            raise ValueError(
                f"several ranks need parallel='ddp' or 'fsdp', and one rank needs none, found "
                f"ranks={self.ranks} and parallel={self.parallel!r}"
            )
        if self.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(
                f"dtype must be float32, bfloat16 or float16, found {self.dtype!r}; leave it out "
                f"for what is fastest"
            )

    @property
    def one_pass(self) -> Pass:
        """The pass of one rank."""
        rows = math.ceil(self.batch_size / self.ranks)
        w = self.dtype.itemsize
        learned = math.ceil(rows * (self.length - 1) * self.learned)
        return Pass(rows, self.length, w, self.autocast, self.dropout > 0, learned)


def whole(key: str, value: object) -> int:
    """Return a whole number from 1 to a limit that no run comes near, or raise."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{key} must be a whole number of at least 1, found {short(value)}")
    most = 10**12 if key == "data" else 10**6
    if value > most:
        raise ValueError(f"{key} must be at most {most:,}, found {short(value)}")
    return value


@dataclass(frozen=True)
class Memory:
    """Bytes per process at the peak of training.

    Attributes:
        process: Python, torch and their libraries; on a GPU its context.
        base: plain weights: linears that are not quantized, embeddings, norms, head.
        codes: quantized weights.
        scales: of quantized weights.
        adapters: trained factors.
        gradients: theirs (twice under DDP, which keeps a bucket).
        optimizer: AdamW's two moments.
        activations: what lies between forward and backward.
        recomputed: one block's, run again under checkpointing.
        loss: workspace of head and loss.
        backward: workspace of a block's backward pass.
        workspace: a matrix decoded from its codes, or cast, to be multiplied; on a CPU logits take
            the same buffer, which stays.
        gathered: under FSDP2 the blocks that are whole for a moment, and embeddings and head.
        heap: what the C library keeps of freed memory (0 on a GPU).
    """

    process: int = 0
    base: int = 0
    codes: int = 0
    scales: int = 0
    adapters: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    recomputed: int = 0
    loss: int = 0
    backward: int = 0
    workspace: int = 0
    gathered: int = 0
    heap: int = 0
    sizes: Sizes = field(default_factory=Sizes, repr=False, compare=False)

    @property
    def weights(self) -> int:
        """All of the frozen base."""
        return self.base + self.codes + self.scales

    @property
    def peak(self) -> int:
        """What is held at once at most: the loss and the backward pass follow one another."""
        apart = ("recomputed", "loss", "backward", "sizes")
        held = sum(getattr(self, f.name) for f in fields(self) if f.name not in apart)
        return held + max(self.loss, self.recomputed + self.backward)

    def components(self) -> dict[str, int]:
        """Return what makes up the peak, by name; it sums to `peak`."""
        in_loss = self.loss >= self.recomputed + self.backward
        left_out = ("recomputed", "backward") if in_loss else ("loss",)
        names = [f.name for f in fields(self) if f.name not in (*left_out, "sizes")]
        return {name: getattr(self, name) for name in names if getattr(self, name)}


def linears_of(shape: Shape, settings: Settings) -> dict[str, Linear]:
    """List a model's linears with the ranks that settings give them."""
    return _counted(shape, settings, settings.dtype)[1]


def count_memory(
    shape: Shape,
    settings: Settings,
    *,
    gpu: bool = False,
    integer: str | None = "int8",
    process: int | None = None,
    linears: dict[str, Linear] | None = None,
    base: Sizes | None = None,
) -> Memory:
    """Plan the peak of one process.

    Args:
        shape: of the model.
        settings: of the run.
        gpu: whether it trains on a GPU, whose memory is meant then.
        integer: how INT8 and INT4 are multiplied as integers there, `"int8"` or `"blocks"` (see
            `kernels/int8.py`); None: as floats.
        process: bytes of a process that trained nothing, None for `constants`.
        linears: of a model that is there, with their ranks; default: as `settings` say.
        base: bytes of a model that is there; likewise.

    Raises:
        ValueError: what `quantize` or `inject` would refuse by shape; rows longer than the model's
            context.
    """
    config, p = shape.config, settings.one_pass
    if settings.length > config.max_position_embeddings:
        raise ValueError(
            f"length must fit the context of {shape.name}, {config.max_position_embeddings} "
            f"tokens, found {settings.length}"
        )
    dtype = torch.float32 if settings.autocast else settings.dtype
    if base is None or linears is None:
        base, linears = _counted(shape, settings, dtype)
    found = base
    count = sum(one.r * (one.N + one.K) for one in linears.values())
    trained = count * settings.adapter_dtype.itemsize
    moment = settings.adapter_dtype.itemsize
    if settings.moment_bytes is not None:
        moment = settings.moment_bytes
    kept = saved(config, linears, p, settings.checkpointing)
    block = block_saved(config, linears_by_block(linears)[config.num_hidden_layers - 1], p)
    again = block if settings.checkpointing else 0
    share = settings.ranks if settings.parallel == "fsdp" else 1
    heap = 0.0
    if not gpu:
        heap = constants.HEAP_FIXED + constants.HEAP_SHARE * kept
        heap += constants.HEAP_RECOMPUTED * again
        heap += constants.HEAP_EACH_F32 * again * layers_that_grow(shape, settings)
    default = constants.CUDA_CONTEXT if gpu else constants.PROCESS
    whole_block = found.base - found.embeddings - _head(linears) * dtype.itemsize
    whole_block = max(0, whole_block) // config.num_hidden_layers
    return Memory(
        process=default if process is None else process,
        base=(found.linears + found.embeddings + found.other) // share,
        codes=found.codes // share,
        scales=found.scales // share,
        adapters=trained // share,
        gradients=trained * (2 if settings.parallel == "ddp" else 1) // share,
        optimizer=2 * count * moment // share,
        activations=kept,
        recomputed=again,
        loss=_loss(shape, p, gpu),
        backward=_backward(shape, settings, None if gpu else integer),
        workspace=_workspace(shape, linears, settings, gpu, None if gpu else integer),
        gathered=0 if share == 1 else 2 * whole_block + found.base - whole_block
        * config.num_hidden_layers,
        heap=int(heap),
        sizes=found,
    )  # fmt: skip


# A plan asks for the same many times.
_known: dict[str, Sizes] = {}
_known_linears: dict[str, dict[str, Linear]] = {}


def _counted(
    shape: Shape, settings: Settings, dtype: torch.dtype
) -> tuple[Sizes, dict[str, Linear]]:
    """Count the base's bytes and list the linears of a model on the meta device."""
    quantizing = {} if settings.format is None else _quantizing(settings)
    key = repr((shape.config, settings.format, quantizing, dtype))
    which = repr((shape.config, settings.r, settings.targets, settings.exclude))
    if key not in _known or which not in _known_linears:
        model = shape.empty(dtype)
        for held in (_known, _known_linears):
            if len(held) >= 64:
                held.clear()
        _known[key] = sizes(model, settings.format, **quantizing)
        _known_linears[which] = adapted(model, settings.r, settings.targets, settings.exclude)
    return _known[key], _known_linears[which]


def layers_that_grow(shape: Shape, settings: Settings) -> int:
    """Count the blocks of a Llama that computes in f32, see `constants.HEAP_EACH_F32`."""
    grows = shape.kind == "llama" and settings.dtype == torch.float32
    return shape.config.num_hidden_layers if grows else 0


def _quantizing(settings: Settings) -> dict[str, Any]:
    return {"block_size": settings.block_size, "double_quant": settings.double_quant}


def _head(linears: dict[str, Linear]) -> int:
    return sum(one.N * one.K for name, one in linears.items() if name == "lm_head")


def _logits(shape: Shape, p: Pass) -> int:
    """Count the logits that the loss holds at a time."""
    V = shape.config.vocab_size
    return min(p.learned, max(32, _CHUNK // V)) * V


def _loss(shape: Shape, p: Pass, gpu: bool) -> int:
    """Head and loss: the rows that learn, the head under autocast; on a GPU a chunk of logits.

    They turn into their own gradient in place, after a copy in f32 where they are narrower. On a
    CPU both lie in buffers that stay (`_workspace`).
    """
    h = shape.config.hidden_size
    cast = shape.config.vocab_size * h * p.w if p.autocast else 0
    chunk = _logits(shape, p) * (p.w + (_F32 if p.w < _F32 else 0)) if gpu else 0
    return chunk + (p.tokens - p.B) * h * p.w + cast


def _backward(shape: Shape, settings: Settings, integer: str | None) -> int:
    """Gradients within a block, and the copies that `_int_mm` takes and gives, f32 and integer."""
    config, p = shape.config, settings.one_pass
    h, i = config.hidden_size, config.intermediate_size
    total = p.tokens * (3 * i + 3 * h) * p.w
    if integer == "int8" and settings.format and FORMATS[settings.format].integer:
        total += p.tokens * i * (3 * _F32 + 1) + p.tokens * h * 2 * _F32
    return total


def _workspace(
    shape: Shape,
    linears: dict[str, Linear],
    settings: Settings,
    gpu: bool,
    integer: str | None,
) -> int:
    """Return the bytes of what is decoded or cast before it is multiplied, and of logits.

    A CPU has one buffer a dtype, as large as the largest of them (`kernels/workspace.py`).
    """
    stored = settings.format is not None
    used = [one for name, one in linears.items() if one.r or (stored and name != "lm_head")]
    largest = max((one.N * one.K for one in used), default=0)
    w = settings.dtype.itemsize
    logits = 0 if gpu else _logits(shape, settings.one_pass) * w
    if settings.format is None:
        return logits + (largest * w if settings.autocast else 0)
    spec = Quantization(settings.format, settings.block_size, settings.double_quant)
    beside = spec.storage.workspace_bytes(spec, largest)
    integer = integer if spec.storage.integer else None
    if integer == "blocks":  # codes in another order, and those of X; a sixteenth for their sums
        longest = max((max(one.N, one.K) for one in used), default=0)
        return beside + logits + (largest + settings.one_pass.tokens * longest) * 17 // 16
    return beside + max(logits, 0 if integer else largest * w)
