"""What a run settles before its first step: what is trained, in which dtype, for how long."""

import functools
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from minilora.data import NOT_ONE_TEXT, Batch, Batches, Example, Pair, Stream, StreamBatches
from minilora.kernels import fastest_dtype, hardware, is_slow
from minilora.lora import LoRALayer, Survey, check_whole, is_copy, named_parameters, unwrapped
from minilora.running import Preference, context_of, takes_packed


def check_model(survey: Survey) -> None:
    """Refuse models whose training could not work or not be saved."""
    model = survey.model
    if unwrapped(model) is not model:
        raise ValueError(
            f"fit() needs the model itself, found {type(model).__name__} around it; pass the "
            f"model you wrapped: TrainConfig(compile=...) compiles it, and torchrun spreads a run "
            f"over processes"
        )
    check_whole(model, "fit")
    if survey.merged:
        raise RuntimeError("fit() needs unmerged weights; call minilora.unmerge(model) first")
    survey.require_unmixed("fit()")
    survey.require_finite()


def trained_adapter(survey: Survey) -> str:
    """Return the one adapter that is active and trainable."""
    active = dict.fromkeys(name for layer in survey.layers.values() for name in layer.active)
    names = [n for n in active if any(p.requires_grad for p in _belonging(survey, n))]
    if not names:
        raise ValueError(
            "fit() needs an active adapter that requires gradients, found none; use "
            "minilora.load(..., trainable=True) or minilora.activate(model, name, trainable=name)"
        )
    if len(names) > 1:
        raise ValueError(
            f"fit() trains one adapter at a time, found {', '.join(sorted(names))} active and "
            f"trainable; say which with minilora.activate(model, ..., trainable=name)"
        )
    return names[0]


def _belonging(survey: Survey, adapter: str) -> list[Tensor]:
    """Return an adapter's parameters: factors, and trained copies of base parameters."""
    factors = [p for one in survey.factors(adapter).values() for p in one.parameters()]
    return [*factors, *survey.copies_of(adapter).values()]


def trained(survey: Survey, adapter: str) -> dict[Tensor, str]:
    """Return the parameters to train with their names; refuse others that require gradients."""
    mine = {p for p in _belonging(survey, adapter) if p.requires_grad}
    known = {p for name in {*survey.adapters, *survey.copies} for p in _belonging(survey, name)}
    for name, parameter in named_parameters(survey.model):
        if parameter.requires_grad and parameter not in known:
            raise ValueError(
                f"fit() trains adapters only, but {name} requires gradients too; freeze it, or "
                f"write your own loop"
            )
    # A trained copy goes by the name of the parameter it stands for, not by where it is kept.
    names = named_parameters(survey.model)
    trained: dict[Tensor, str] = {p: n for n, p in names if p in mine and not is_copy(n)}
    for one, name in trained.items():
        if one.dtype == torch.float16:
            raise ValueError(
                f"fit() trains parameters in float32 or bfloat16, found {name} in float16, in "
                f"which small updates would be lost; load or inject the adapter with dtype "
                f"float32, and with bias= or modules_to_save= the base as well"
            )
    return trained


def make_batches(
    data: Iterable[Any], what: str, check: Callable[[Example, str], None], **options: Any
) -> Batches | StreamBatches:
    """Return batches over examples, each checked, or say that batches were given."""
    if isinstance(data, Stream):
        return StreamBatches(data, check=check, **options)
    if isinstance(data, Batches):
        raise TypeError(
            f"fit() makes its own batches, found Batches as {what}; pass its .examples (size and "
            f"order are set by TrainConfig)"
        )
    data = list(data)
    if not data:
        raise ValueError(f"{what} must hold at least one example, found none")
    if any(isinstance(item, Batch) for item in data):
        raise TypeError(
            f"fit() makes its own batches, found a Batch in {what}; pass single examples"
        )
    batches = Batches(data, **options)
    for i, example in enumerate(batches.examples):
        check(example, f"example {i} of {what}")
    return batches


class HeldOut:
    """Held-out examples, and which of them have been met in the training data."""

    def __init__(self, valid: Sequence[Example]) -> None:
        self._ids = [example.own_ids for example in valid]
        self._known, self._met = set(self._ids), set[tuple[int, ...]]()

    def meet(self, example: Example, name: str) -> None:
        """Note an example of a stream; warn of the first that is held out."""
        if example.own_ids not in self._known:
            return
        if not self._met:
            warnings.warn(
                f"held-out examples are trained on too, the first is {name}; the end of the run "
                "says how many",
                stacklevel=2,
            )
        self._met.add(example.own_ids)

    def found(self, examples: Iterable[Example] = ()) -> list[str]:
        """Note training examples; return a remark if held-out ones were among all noted so far."""
        self._met |= self._known.intersection(example.own_ids for example in examples)
        seen = [i for i, ids in enumerate(self._ids) if ids in self._met]
        if not seen:
            return []
        return [
            f"{len(seen)} of {len(self._ids)} held-out examples are trained on too (first: "
            f"example {seen[0]} of valid); their loss says nothing of other data"
        ]


def example_check(
    model: nn.Module, pad_id: int, own_loss: bool, preference: Preference | None
) -> Callable[[Example, str], None]:
    """Return what holds an example against the model's context and vocabulary.

    With `own_loss` the user's loss says what labels are, and knows packed rows.
    """
    config = getattr(model, "config", None)
    context = context_of(model)
    vocabulary = getattr(config, "vocab_size", None)
    vocabulary = vocabulary if isinstance(vocabulary, int) else math.inf
    if not 0 <= pad_id < vocabulary:
        raise ValueError(
            f"pad_id must lie in [0, {vocabulary}), found {pad_id}; any token id will do"
        )

    @functools.cache  # a model of transformers is tried
    def apart() -> bool:
        return own_loss or takes_packed(model)

    def check(example: Example, name: str) -> None:
        _check_kind(example, name, preference)
        pair = isinstance(example, Pair)
        tokens = example.longest if isinstance(example, Pair) else len(example.input_ids)
        if tokens > context:
            raise ValueError(
                f"examples must fit the model's context of {context} tokens, but {name} has "
                f"{tokens}; cut them (--max-length {context}, or "
                f"read_data(..., max_length={context}))"
            )
        largest = max(*example.input_ids, *(() if own_loss else example.labels), 0)
        if largest >= vocabulary:
            raise ValueError(
                f"token ids must lie in [0, {vocabulary}), but {name} holds {largest}; encode the "
                f"data with this model's own tokenizer"
            )
        if example.lengths and not pair and not apart():
            raise ValueError(
                f"packed rows need a model that keeps their documents apart, but "
                f"{type(model).__name__} does not, and {name} is packed; do not pack for it"
            )

    return check


def _check_kind(example: Example, name: str, preference: Preference | None) -> None:
    """Refuse a text where pairs of answers are compared, and the other way round."""
    if preference is None:
        if isinstance(example, Pair):
            found = NOT_ONE_TEXT[example.wanted is not None]
            raise ValueError(f"loss='ce' learns texts, but {name} is {found}")
        return
    labelled = example.wanted is not None if isinstance(example, Pair) else None
    if labelled != (preference.kind == "kto"):
        raise ValueError(preference.refusal(name, labelled))


def compute_dtype(
    layers: dict[str, LoRALayer], choice: str, device: torch.device
) -> torch.dtype | None:
    """Return the dtype to autocast to, or None to compute in the base's own."""
    base = next(iter(layers.values())).view.dtype
    if choice == "auto":
        if base != torch.float32 or device.type not in ("cpu", "cuda"):
            return None
        wanted = fastest_dtype(device)
    else:
        wanted = getattr(torch, choice)
    if wanted == base:
        return None
    if wanted == torch.float32:
        raise ValueError(
            f"dtype='float32' needs a float32 base, found {base}; load the model with dtype=float32"
        )
    return wanted


def slow_dtype(
    layers: dict[str, LoRALayer], autocast: torch.dtype | None, device: torch.device
) -> str | None:
    """Say so where training computes in bf16 that this processor multiplies slowly, or None."""
    dtype = autocast or next(iter(layers.values())).view.dtype
    if device.type != "cpu" or dtype != torch.bfloat16 or not is_slow(dtype):
        return None
    rates = hardware()
    advice = "load the base in float32" if autocast is None else "leave dtype at 'auto'"
    return (
        f"this processor multiplies bfloat16 at {rates.bfloat16:.0f} GFLOP/s and float32 at "
        f"{rates.float32:.0f}, so linears widen it; {advice} to spare that"
    )
