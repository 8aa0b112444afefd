"""What autograd keeps between forward and backward, counted by running blocks on fake tensors.

A fake tensor has shape, dtype and device, and no memory. The model is copied with fake parameters
and the first two blocks of every sort, and run; each storage that autograd saves counts once,
parameters, buffers and ids do not. This holds for any model that keeps its blocks in an
`nn.ModuleList`, whatever its linears are stored in and its adapters are.
"""

import contextlib
import copy
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_leaves

from minilora.kernels import as_on_gpu, hardware, integer_way
from minilora.lora import Survey
from minilora.running import compiled, shares_prefix

_ROWS = 2  # of the smallest pass that is run


class Saved(NamedTuple):
    """Bytes that lie between forward and backward, without the head and the loss."""

    total: int  # of all blocks and what stands around them
    inputs: int  # what is left where blocks are run again (checkpointing): their inputs
    block: int  # of the block that keeps most, while it is run again


def keep_blocks(survey: Survey, names: Iterable[str]) -> Callable[[], None]:
    """Leave a model these of its blocks alone; return what puts the others back."""
    lists: dict[str, dict[str, Any]] = {name.rpartition(".")[0]: {} for name in survey.blocks}
    for name in names:
        around, _, key = name.rpartition(".")
        lists[around][key] = survey.everything[around]._modules[key]
    before = {around: survey.everything[around]._modules for around in lists}

    def put(modules: dict[str, Any]) -> None:
        for around, blocks in modules.items():
            survey.everything[around]._modules = blocks

    put(lists)
    return lambda: put(before)


def sort_of(block: nn.Module) -> Hashable:
    """Return what blocks that keep the same have in common: class, window, rope, parameters."""
    parameters = ((n, p.shape, p.dtype, p.requires_grad) for n, p in block.named_parameters())
    kind = getattr(block, "window", None), getattr(block, "rope", None)
    return type(block), kind, *parameters


def samples(sorts: Sequence[Hashable], most: int = 2) -> dict[int, int]:
    """Return the positions of the first blocks of every sort, and how many each stands for.

    All but the last stand for themselves: a first block's input may need no gradient.
    """
    found: dict[int, int] = {}
    for sort in dict.fromkeys(sorts):
        at = [i for i, one in enumerate(sorts) if one == sort]
        found |= dict.fromkeys(at[:most], 1)
        found[at[:most][-1]] += len(at[most:])
    return dict(sorted(found.items()))


def copied(model: nn.Module, make: Callable[[str, Tensor], Tensor]) -> Any:
    """Copy a model; `make` gives each parameter and buffer anew, from its name and itself."""
    made: dict[int, Any] = {}
    for module in model.modules():
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None and id(tensor) not in made:
                new = make(name, tensor)
                if isinstance(tensor, nn.Parameter):
                    new = nn.Parameter(new, requires_grad=tensor.requires_grad)
                made[id(tensor)] = new
    return copy.deepcopy(model, made)


class _HeadReachedError(Exception):
    pass


class SavedBytes:
    """Count what a model keeps for its backward pass, at any number of rows and tokens.

    Bytes are a + b·T + e·T² + B·(c·T + d·T²) for B rows of T tokens: five small runs give the
    factors. Rows longer than the layers' windows are another case, which keeps masks. Of P tokens
    that rows share three more runs show how that changes: + P·(p − (B − 1)·o) + q·B·T.

    The model may be on any device, the meta device too; it is not changed. `number` is how many
    blocks each of its own stands for, None where all are there. `device` is what to count for,
    `"cpu"` or `"cuda"`; where no GPU is here, tensors of the CPU take its code paths. `compile`:
    blocks are compiled; they are traced for it (some seconds), as what they keep is settled before
    code is made for a device.
    """

    def __init__(
        self,
        model: nn.Module,
        autocast: torch.dtype | None = None,
        *,
        number: Sequence[int] | None = None,
        device: str = "cpu",
        compile: bool = False,
    ) -> None:
        hardware(), integer_way()  # cached: measured on fake tensors they would be wrong
        survey = Survey(model)
        if not survey.blocks or survey.head is None:
            raise ValueError(
                f"a model to plan for must have a head, and its blocks in an nn.ModuleList, found "
                f"neither or one of them in {type(model).__name__}"
            )
        self.head, restore = survey.head, None
        if number is None:
            chosen = samples([sort_of(block) for block in survey.blocks.values()])
            number, names = list(chosen.values()), list(survey.blocks)
            restore = keep_blocks(survey, [names[i] for i in chosen])
        self.gpu = device != "cpu"
        here = torch.backends.cuda.is_built() and torch.cuda.is_available()
        device = device if here else "cpu"
        self.number, self.autocast, self.device = number, autocast, device
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        try:
            with self.mode:
                self.model = copied(
                    model, lambda _, t: torch.empty(t.shape, dtype=t.dtype, device=device)
                ).train()
        finally:
            if restore is not None:
                restore()
        for module in self.model.modules():
            if hasattr(module, "gradient_checkpointing"):
                module.gradient_checkpointing = False
        config: Any = getattr(self.model, "config", None)
        if hasattr(config, "use_cache"):  # transformers keep keys and values otherwise
            config.use_cache = False
        context = getattr(config, "max_position_embeddings", 64)
        B, T = _ROWS, max(1, min(32, context // 3))
        sizes = ((B, T), (B + 1, T), (B, 2 * T), (B + 1, 2 * T), (B, 3 * T))
        self.tokens = T
        # Kept masks begin above the window; every run of a case is on one side of it.
        self.window = min({*getattr(self.model, "windows", ())} - {None}, default=None)
        self.runs: list[list[Saved]] = []  # below the window, and above it where there is one
        self.changes: list[list[tuple[int, int, int]]] = []  # the same where tokens are shared
        sharing = shares_prefix(self.model)
        # Inductor's decompositions and its choice of what to keep, without its code.
        with compiled(self.model, compile, backend="aot_eager_decomp_partition"):
            for window in (None,) if self.window is None else (1, None):
                if self.window is not None:
                    self.model.set_windows(window)
                self.runs.insert(0, [self._run(*size) for size in sizes])
                large = sizes[2:]
                at_once = [self._run(*size, T) for size in large] if sharing else self.runs[0][2:]
                self.changes.insert(0, self._changes(self.runs[0][2:], at_once))
        del self.model

    def __call__(self, rows: int, tokens: int, shared: int = 0) -> Saved:
        """Return the bytes of a pass over `[rows, tokens]` ids, the first `shared` of them once."""
        t, found = self.tokens, []
        masked = self.window is not None and tokens > self.window
        for short, wide, long, large, longest in zip(*self.runs[masked], strict=True):
            row, row_of_two = wide - short, large - long  # of t tokens, and of 2 t
            square = (row_of_two - 2 * row) // (2 * t * t)
            token = row // t - square * t
            # What does not depend on the number of rows, at t, 2 t and 3 t tokens.
            one, two = short - _ROWS * row, long - _ROWS * row_of_two
            three = longest - _ROWS * 3 * t * (token + 3 * t * square)
            masks = (three - 2 * two + one) // (2 * t * t)
            each = (two - one) // t - 3 * masks * t
            fixed = one - each * t - masks * t * t
            by_row = rows * (token + square * tokens)
            found.append(fixed + tokens * (each + masks * tokens + by_row))
        if shared:
            for i, (once, start, each) in enumerate(self.changes[masked]):
                found[i] += shared * (start - (rows - 1) * once) + rows * tokens * each
        return Saved(*found)

    def _changes(self, plain: list[Saved], shared: list[Saved]) -> list[tuple[int, int, int]]:
        """Return o, p and q of each field: bytes that `shared` runs keep beyond the `plain` ones.

        Of 2 rows of 2 t tokens, 3 of 2 t, and 2 of 3 t, of which t are shared.
        """
        t, found = self.tokens, []
        for i in range(len(Saved._fields)):
            first, wide, long = (a[i] - b[i] for a, b in zip(shared, plain, strict=True))
            each = (long - first) // (2 * t)
            once = (first - wide) // t + 2 * each
            found.append((once, first // t + once - 4 * each, each))
        return found

    def _run(self, rows: int, tokens: int, start: int = 0) -> Saved:
        inputs, needed, kept = [], [], []
        shared: list[Tensor] = []  # what several blocks are given, such as rotations
        with self.mode, saved_bytes() as bytes_of, contextlib.ExitStack() as hooks:
            if self.gpu:
                hooks.enter_context(as_on_gpu())
            own = [*self.model.parameters(), *self.model.buffers()]
            own.append(torch.zeros(rows, tokens, dtype=torch.int64, device=self.device))

            def held(*others: Tensor) -> int:
                return bytes_of(*own, *others)

            def enter(_: nn.Module, args: tuple, named: dict[str, Any]) -> None:
                given = [v for v in tree_leaves((args, named)) if isinstance(v, Tensor)]
                inputs.append(given[0].nbytes)
                needed.append(given[0].requires_grad)
                shared.extend(given[1:])
                kept.append(held(*shared))

            def leave(*_: Any) -> None:
                kept[-1] = held(*shared) - kept[-1]

            def stop(*_: Any) -> None:
                raise _HeadReachedError

            survey = Survey(self.model)
            for block in survey.blocks.values():
                hooks.callback(block.register_forward_pre_hook(enter, with_kwargs=True).remove)
                hooks.callback(block.register_forward_hook(leave).remove)
            head = survey.layers.get(self.head, survey.modules[self.head])
            hooks.callback(head.register_forward_pre_hook(stop).remove)
            on = self.autocast is not None
            low = torch.autocast(self.device, self.autocast, enabled=on)
            with torch.enable_grad(), low, contextlib.suppress(_HeadReachedError):
                if start:
                    self.model.hidden(own[-1], shared=start)
                else:
                    self.model(own[-1])
            again = [size for size, x in zip(kept, needed, strict=True) if x] or kept
        total, between = held() - sum(kept), held(*shared) - sum(kept)
        for times, x, size in zip(self.number, inputs, kept, strict=True):
            total += times * size
            between += times * x
        return Saved(total, between, max(again))


@contextlib.contextmanager
def saved_bytes() -> Iterator[Callable[..., int]]:
    """Give what counts the bytes that autograd saves within the block, but for those of tensors."""
    found: dict[int, Any] = {}  # storages by address; held, so that none comes twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        found[storage._cdata] = storage
        return tensor

    def bytes_of(*left_out: Tensor) -> int:
        own = {tensor.untyped_storage()._cdata for tensor in left_out}
        return sum(storage.nbytes() for at, storage in found.items() if at not in own)

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield bytes_of
