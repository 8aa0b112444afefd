"""`minilora.explain`: check everything, read the weights, then measure on data if there is any."""

import datetime
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from minilora.data import Batches, Example, as_examples, learned_labels
from minilora.files import counted
from minilora.lora import Approximation, Survey, finite_factors, split_block, unwrapped
from minilora.report.ablation import ablate, kinds_of, only, parts_of
from minilora.report.attention import Attention, attention_masses, word_ids
from minilora.report.explanation import Behaviour, CopyReport, Explanation
from minilora.report.progress import Progress, tokens_of
from minilora.report.spectra import layer_report
from minilora.report.subspace import check_keep, is_product, subspaces, truncate
from minilora.report.tokens import Measured, effects, gap, measured, shown
from minilora.running import token_losses

LARGEST = 2048  # the shorter side of a weight whose singular vectors are found
SHOWN = 3  # examples told token by token
_CUT = "truncated_for_explain"  # a name for the truncated adapter while it is measured


@torch.no_grad()
def explain(
    model: nn.Module,
    adapter: str | None = None,
    *,
    data: Iterable[Any] | None = None,
    train: Iterable[Any] | None = None,
    outside: Iterable[Any] | None = None,
    against: str | None = None,
    words: Sequence[str] = (),
    tokenizer: Any = None,
    keep: float = 0.95,
    ablate_examples: int = 32,
    top: int = 20,
    largest: int = LARGEST,
    batch_size: int = 8,
    pad_id: int = 0,
    progress: bool | float = False,
    about: Mapping[str, str] | None = None,
) -> Explanation:
    """Report what an adapter changed, where, and whether it matters.

    From the factors and weights alone: norms, singular values of ΔW = scaling · B A (from QR of the
    factors and a small SVD; B A is never formed), the energy each smaller rank keeps, a suggested
    rank per layer, and how ΔW lies to W's own singular vectors. With held-out data: loss per token
    with the adapter on and off, and what single blocks and kinds of modules contribute.

    Args:
        model: holds the adapter, unmerged; left as it was.
        adapter: its name; None: the only one, or the only one that is active.
        data: held-out examples as for `evaluate`, or a `Batches` of them.
        train: examples it was trained on, for the gap; needs `data`.
        outside: examples of other text, for forgetting.
        against: another adapter of the model, to compare subspaces with.
        words: whose share of the attention is measured in `data`; needs a tokenizer.
        tokenizer: to show tokens as text.
        keep: the share of ‖ΔW‖² that a suggested rank keeps on each layer, in (0, 1].
        ablate_examples: how many of `data` to ablate on, evenly picked, 0 for none: two passes over
            them for each block and each kind of module.
        top: how many tokens that were helped and hurt to list.
        largest: compare with W's singular vectors where min(N, K) is at most this (an N³ step).
        batch_size: examples at a time.
        pad_id: token id in the padding.
        progress: say on stderr what is being done, and soon the time left; a number: a line in so
            many seconds at most.
        about: what the report is to call adapter, base and data, by the keys of its `about`.

    Returns:
        An `Explanation`: prints as tables; `to_dict`, `to_json(file)`, `to_html(file)`.

    Raises:
        ValueError: an unknown adapter, NaN or Inf in it, options out of range, data that is empty
            or malformed, words that don't occur.
        TypeError: data that is no examples.
        RuntimeError: adapters are merged.

    Hu et al. 2021, arXiv:2106.09685, section 7; Shuttleworth et al. 2024, arXiv:2410.21228.
    """
    survey = Survey(model)
    survey.require_layers("explain")
    survey.require_unmerged("explain")
    adapter = survey.adapter(adapter, "explain")
    check_keep(keep)
    for value, what, least in (
        (ablate_examples, "ablate_examples", 0), (top, "top", 0), (largest, "largest", 0),
        (batch_size, "batch_size", 1),
    ):  # fmt: skip
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{what} must be a whole number of at least {least}, found {value!r}")
    if data is None and (train is not None or words):
        what = "train" if train is not None else "words"
        raise ValueError(f"{what} needs data, the held-out examples to measure on; pass data=")
    for name in (adapter, against):
        if name is not None:
            finite_factors(survey, name, "explain")
    if against == adapter:
        raise ValueError(f"against must name another adapter than {adapter!r}")
    held, seen, other = (
        None if some is None else as_examples(some.examples if isinstance(some, Batches) else some)
        for some in (data, train, outside)
    )
    words = (words,) if words and isinstance(words, str) else tuple(words)
    patterns = word_ids(words, tokenizer) if words else []
    say = Progress(progress)
    comparison = None if against is None else subspaces(survey, adapter, against)
    mine = survey.with_adapter(adapter)
    kinds = kinds_of(list(mine))
    reports = []
    for count, (name, layer) in enumerate(mine.items(), 1):
        say(f"reading {name}, layer {count} of {len(mine)}")
        block = split_block(name)[1]
        reports.append(layer_report(name, block, kinds[name], layer, adapter, keep, largest))
    run = _Run(survey, adapter, tokenizer, batch_size, pad_id, say)
    say.tokens = (3 + 2 * bool(patterns)) * tokens_of(held)
    say.tokens += 2 * (tokens_of(seen) + tokens_of(other))
    ablated = [] if held is None else [held[i] for i in _spread(len(held), ablate_examples)]
    if ablated:  # two passes for each part
        say.tokens += 2 * len(parts_of(survey, adapter)) * tokens_of(ablated)
    ranks = {report.name: report.suggested_r for report in reports}
    truncation, cut_loss = run.truncated(ranks, held)
    behaviour = None
    if held is not None:
        behaviour = run.behaviour(held, top, ablated, cut_loss, words, patterns)
    found = Explanation(
        adapter, keep, tuple(reports), _copies(survey, adapter), truncation, comparison, behaviour,
        gap(run.loss(seen, "training data"), behaviour.loss) if seen and behaviour else None,
        run.loss(other, "text outside the task") if other else None,
        _about(model, adapter, {"held-out data": held, "training data": seen, "outside": other})
        | dict(about or {}),
    )  # fmt: skip
    say("")
    return found


def _about(
    model: nn.Module, adapter: str, data: Mapping[str, list[Example] | None]
) -> dict[str, str]:
    """Say what was measured, as far as the model and the examples tell."""
    plain = unwrapped(model)
    named = getattr(plain, "name_or_path", None) or type(plain).__name__
    counts = {what: counted(len(some), "example") for what, some in data.items() if some}
    return {
        "adapter": adapter,
        "base": str(named),
        **counts,
        "date": datetime.date.today().isoformat(),
    }


def _copies(survey: Survey, adapter: str) -> tuple[CopyReport, ...]:
    def norms(name: str, value: Tensor) -> CopyReport:
        own = survey.originals[name].double()
        return CopyReport(name, float((value.double() - own).norm()), float(own.norm()))

    return tuple(norms(*item) for item in survey.copies_of(adapter).items())


class _Run:
    """The measurements on data, each with the adapter alone, or without any."""

    def __init__(self, survey: Survey, adapter: str, tokenizer: Any, batch_size: int, pad_id: int,
                 say: Progress):  # fmt: skip
        self.survey, self.model, self.adapter = survey, survey.model, adapter
        self.tokenizer, self.say = tokenizer, say
        self.options: dict[str, Any] = {"batch_size": batch_size, "pad_id": pad_id}
        self.names = list(survey.with_adapter(adapter))

    def on(self):
        """Within the block this adapter alone is active."""
        return only(self.survey, self.adapter, self.names)

    def off(self):
        """Within the block the model is its base."""
        return only(self.survey, self.adapter, (), copies=False)

    def both(self, examples: Sequence[Example], what: str):
        """Return the token losses without and with the adapter."""
        count = tokens_of(examples)
        with self.say.measuring(f"measuring {what} without the adapter", count), self.off():
            before = token_losses(self.model, examples, **self.options)
        with self.say.measuring(f"measuring {what} with the adapter", count), self.on():
            return before, token_losses(self.model, examples, **self.options)

    def loss(self, examples: Sequence[Example], what: str) -> Measured:
        """Return the loss without and with the adapter."""
        return measured(*self.both(examples, what))

    def truncated(
        self, ranks: dict[str, int], examples: Sequence[Example] | None
    ) -> tuple[Approximation | None, float | None]:
        """Cut the adapter for a while; return its error and, with data, its loss."""
        if not is_product(self.survey, self.adapter):
            return None, None
        name = _CUT
        while name in self.survey.adapters:
            name += "_"
        fit = truncate(self.survey, self.adapter, name, ranks=ranks)
        try:
            if examples is None:
                return fit, None
            line = "measuring the adapter at the suggested ranks"
            with self.say.measuring(line, tokens_of(examples)), only(self.survey, name, self.names):
                losses = token_losses(self.model, examples, **self.options)
        finally:
            for layer in self.survey.with_adapter(name).values():
                del layer.adapters[name]
        return fit, measured(losses, losses).before

    def behaviour(
        self,
        held: list[Example],
        top: int,
        some: list[Example],
        cut: float | None,
        words: tuple[str, ...],
        patterns: list[list[int]],
    ) -> Behaviour:
        """Measure everything that needs held-out data; `some` of it is ablated on."""
        before, after = self.both(held, "held-out data")
        helped, hurt = effects(held, before, after, self.tokenizer, top)
        ablations: tuple = ()
        if some:
            begun, count = time.monotonic(), 2 * tokens_of(some)

            def say(done: int, total: int) -> None:
                nonlocal begun
                now = time.monotonic()
                if done:
                    self.say.took(count, now - begun)
                begun = now
                self.say(f"ablation {done} of {total}")

            ablations = ablate(self.survey, self.adapter, some, **self.options, say=say)
        attention = None
        if patterns:
            count = tokens_of(held)
            with self.say.measuring("measuring attention", count), self.off():
                old, even, tokens, queries = attention_masses(
                    self.model, held, patterns, **self.options
                )
            with self.say.measuring("measuring attention with the adapter", count), self.on():
                new = attention_masses(self.model, held, patterns, **self.options)[0]
            attention = Attention(words, old, new, even, tokens, queries)
        changes = torch.cat(after) - torch.cat(before)
        pick = _spread(len(held), SHOWN)
        return Behaviour(
            measured(before, after), cut, float((changes < 0).double().mean()), helped, hurt,
            tuple(shown(held[i], before[i], after[i], self.tokenizer) for i in pick),
            ablations, (len(some), sum(learned_labels(e.labels) for e in some)), attention,
            (before, after),
        )  # fmt: skip


def _spread(total: int, count: int) -> list[int]:
    """Return `count` indices (or all there are) evenly over `total`."""
    count = min(total, count)
    return [i * total // count for i in range(count)]
