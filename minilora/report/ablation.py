"""Switch an adapter off in parts of a model, or on in one part alone, and measure the loss."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn

from minilora.data import Example
from minilora.lora import Survey, split_block
from minilora.report.tokens import measured
from minilora.running import token_losses

COPIES = "trained copies"
OUTSIDE = "outside blocks"


@dataclass(frozen=True)
class Ablation:
    """One part of the adapter taken away, and one alone; losses in nats per token."""

    part: str  # "block 3", a kind of module, or what else the adapter brings
    by: str  # "block", "kind", or "all" for the adapter as a whole
    layers: int  # how many of the adapter's layers are in it
    without: float  # the loss with all of the adapter but this part
    alone: float  # the loss with this part only
    rise: float  # what leaving it out costs, without − the whole adapter's loss
    gain: float  # what it brings by itself, the base's loss − alone
    rise_error: float  # standard error, from the differences between examples; inf for one
    gain_error: float


def stacks_of(names: Sequence[str]) -> list[str]:
    """Return the stacks of blocks; an encoder and a decoder are two."""
    parts = map(split_block, names)
    return list(dict.fromkeys(stack for stack, block, _ in parts if block is not None))


def kinds_of(names: Sequence[str]) -> dict[str, str]:
    """Return the kind of each module: its name within the block, in short where that is clear.

    Where there are several stacks of blocks, the stack is part of it.
    """
    whole = {name: split_block(name)[2] for name in names}
    short: dict[str, set[str]] = {}
    for kind in whole.values():
        short.setdefault(kind.rpartition(".")[2], set()).add(kind)
    several = len(stacks_of(names)) > 1
    kinds = {}
    for name, kind in whole.items():
        last = kind.rpartition(".")[2]
        said = last if len(short[last]) == 1 and not last.isdigit() else kind
        stack = split_block(name)[0]
        kinds[name] = f"{stack}.{said}" if several and stack else said
    return kinds


@contextmanager
def only(
    model: nn.Module | Survey, adapter: str, names: Sequence[str], copies: bool = True
) -> Iterator[None]:
    """Within the block this adapter alone is active, on these layers alone; without any the base.

    `copies` is whether the adapter's trained copies are in place.
    """
    survey, chosen = Survey.of(model), set(names)
    with survey.switched():
        for name, layer in survey.layers.items():
            layer.activate((adapter,) if name in chosen else ())
        survey.install((adapter,) if copies else ())
        yield


def parts_of(model: nn.Module | Survey, adapter: str) -> list[tuple[str, str, list[str]]]:
    """Return the parts of an adapter as (part, by, dotted names), the whole first."""
    survey = Survey.of(model)
    names = list(survey.with_adapter(adapter))
    kinds = kinds_of(names)
    blocks: dict[tuple[str, int | None], list[str]] = {}
    modules: dict[str, list[str]] = {}
    for name in names:
        blocks.setdefault(split_block(name)[:2], []).append(name)
        modules.setdefault(kinds[name], []).append(name)
    parts = [("whole adapter", "all", names)]
    stacks = stacks_of(names)
    order = sorted(
        blocks,
        key=lambda b: (b[1] is None, stacks.index(b[0]) if b[1] is not None else 0, b[1] or 0),
    )
    for stack, block in order:
        label = f"block {block}" if len(stacks) == 1 else f"{stack}.{block}".strip(".")
        label = OUTSIDE if block is None else label
        parts.append((label, "block", blocks[stack, block]))
    parts += [(kind, "kind", inside) for kind, inside in modules.items()]
    if survey.copies_of(adapter):
        parts.append((COPIES, "kind", []))
    return parts


def ablate(
    model: nn.Module | Survey,
    adapter: str,
    examples: Sequence[Example],
    *,
    batch_size: int,
    pad_id: int,
    say=lambda done, total: None,
) -> tuple[Ablation, ...]:
    """Measure each part of an adapter by leaving it out, and by using it alone.

    The whole adapter left out is the base: the same bits as with the adapter disabled. `say` is
    called with measurements done and to do.
    """
    survey = Survey.of(model)

    def losses(names: Sequence[str], copies: bool) -> list[Tensor]:
        with only(survey, adapter, names, copies):
            return token_losses(survey.model, examples, batch_size=batch_size, pad_id=pad_id)

    parts = parts_of(survey, adapter)
    every, copied = parts[0][2], bool(survey.copies_of(adapter))
    base, full = losses((), False), losses(every, copied)
    # A part that is all of the adapter, or nothing of it, is measured once.
    known = {((), False): base, (tuple(every), copied): full}
    found = []
    for done, (part, by, names) in enumerate(parts):
        say(done, len(parts))
        inside, whole = set(names), by == "all"
        rest = tuple(n for n in every if n not in inside)
        sides = []
        for chosen, copies in (
            (rest, copied and part != COPIES and not whole),
            (tuple(names), copied and (part == COPIES or whole)),
        ):
            if (chosen, copies) not in known:
                known[chosen, copies] = losses(chosen, copies)
            sides.append(known[chosen, copies])
        rise, gain = measured(full, sides[0]), measured(sides[1], base)
        found.append(
            Ablation(part, by, len(names), rise.after, gain.before, rise.change, gain.change,
                     rise.error, gain.error)
        )  # fmt: skip
    say(len(parts), len(parts))
    return tuple(found)
