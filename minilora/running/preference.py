"""Losses over answers that people prefer, for models of any make.

Letters, for a pair of answers to one prompt: c and r are the sums of log p over the learned tokens
of the chosen and the rejected answer, C and R the same under the reference, which is the model
without the adapter in training; c̄ and r̄ are means over tokens. σ is the logistic function.

    dpo    −log σ(β·((c − C) − (r − R)))                              Rafailov et al. 2023
    ipo    (((c − C) / tokens − (r − R) / tokens) − 1 / (2β))²        Azar et al. 2023
    simpo  −log σ(β·(c̄ − r̄) − γ)                                      Meng et al. 2024
    orpo   −c̄ − β·log σ(log odds(c̄) − log odds(r̄))                    Hong et al. 2024
           log odds(x) = x − log(1 − exp x)
    kto    λ·(1 − σ(±β·((c − C) − z)))   + where c is wanted, else −   Ethayarajh et al. 2024
           z = max(0, mean of log p / p_reference over answers to other prompts)

arXiv: 2305.18290, 2310.12036, 2405.14734, 2403.07691, 2402.01306. ipo divides by tokens as TRL
does, agreed with its authors. No logits are kept whole, and where the model allows it a pair's
prompt is computed once, in a row whose answers do not see each other.
"""

import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilora.data import Batch, PairBatch
from minilora.lora import Survey, disabled, inference
from minilora.running.log_probs import pair_log_probs, shares_prompts


class Scores(NamedTuple):
    """What a batch of pairs comes to, `[B]` each: losses, and rewards of the two answers.

    Of labelled answers (kto) `second` is z times β.
    """

    losses: Tensor
    first: Tensor
    second: Tensor


@dataclass(frozen=True)
class Answers:
    """Sums of log p under the model and the reference, and tokens: `[B, 2]`, of kto `[B, 1]`."""

    model: Tensor
    reference: Tensor
    tokens: Tensor


def _dpo(answers: Answers, loss: "Preference", _: PairBatch) -> Scores:
    rewards = loss.beta * (answers.model - answers.reference)
    first, second = rewards.unbind(1)
    return Scores(-F.logsigmoid(first - second), first, second)


def _ipo(answers: Answers, loss: "Preference", _: PairBatch) -> Scores:
    ratios = (answers.model - answers.reference) / answers.tokens
    first, second = ratios.unbind(1)
    losses = (first - second - 1 / (2 * loss.beta)) ** 2
    return Scores(losses, loss.beta * first, loss.beta * second)


def _simpo(answers: Answers, loss: "Preference", _: PairBatch) -> Scores:
    first, second = (loss.beta * answers.model / answers.tokens).unbind(1)
    return Scores(-F.logsigmoid(first - second - loss.gamma), first, second)


def _orpo(answers: Answers, loss: "Preference", _: PairBatch) -> Scores:
    means = answers.model / answers.tokens
    first, second = means.unbind(1)
    odds = means - _log_of_rest(means)
    losses = -first - loss.beta * F.logsigmoid(odds[:, 0] - odds[:, 1])
    return Scores(losses, loss.beta * first, loss.beta * second)


def _log_of_rest(x: Tensor) -> Tensor:
    """Return log(1 − exp x), for x < 0; where x rounds to 0 as just below it, without gradient."""
    x = x.clamp(max=-torch.finfo(x.dtype).eps)
    near = x > -math.log(2)  # each form where it does not cancel, and finite where it is not taken
    small, large = x.where(near, -1.0), x.where(~near, -1.0)
    return torch.where(near, (-torch.expm1(small)).log(), torch.log1p(-large.exp()))


def _kto(answers: Answers, loss: "Preference", batch: PairBatch) -> Scores:
    first = loss.beta * (answers.model - answers.reference)[:, 0]
    second = torch.full_like(first, loss.beta * loss.drift)
    wanted = batch.wanted == 1
    sign = torch.where(wanted, 1.0, -1.0).to(first.dtype)
    weight = torch.where(wanted, *loss.kto_weights).to(first.dtype)
    return Scores(weight * torch.sigmoid(-sign * (first - second)), first, second)


class Kind(NamedTuple):
    """One loss: what computes it, β where none is given, and whether it has a reference."""

    scores: Callable[[Answers, "Preference", PairBatch], Scores]
    beta: float
    reference: bool


KINDS = {
    "dpo": Kind(_dpo, 0.1, True),
    "ipo": Kind(_ipo, 0.1, True),
    "orpo": Kind(_orpo, 0.1, False),
    "kto": Kind(_kto, 0.1, True),
    "simpo": Kind(_simpo, 2.0, False),
}


def _state_without(model: nn.Module, adapter: str | None) -> int:
    """Return a number that changes with the model as it is without an adapter, or without any.

    That is when another adapter becomes active, or when any tensor but the adapter's own is
    written to or replaced.
    """
    survey = Survey(model)
    left_out = survey.adapters if adapter is None else [adapter]
    own: set[Tensor] = set()
    for name in left_out:
        own.update(survey.copies_of(name).values())
        for factors in survey.factors(name).values():
            own.update(chain(factors.parameters(), factors.buffers()))
    rest = [
        (fqn, name, layer.adapters[name].scaling)
        for fqn, layer in survey.layers.items()
        for name in layer.active
        if name not in left_out
    ]
    tensors = [t for t in chain(model.parameters(), model.buffers()) if t not in own]
    if any(hasattr(t, "full_tensor") for t in tensors):  # FSDP2 puts others there all the time
        tensors = []
    written = ((id(t), 0 if t.is_inference() else t._version) for t in tensors)
    return hash((*rest, *written))


class Preference:
    """A loss over pairs: (model, `PairBatch`) → (loss summed over pairs, pairs).

    Give it to `minilora.evaluate`; `TrainConfig(loss=...)` trains with it.

    Args:
        kind: `"dpo"`, `"ipo"`, `"orpo"`, `"kto"` or `"simpo"`.
        beta: β; None is the kind's usual one.
        gamma: γ of simpo.
        kto_weights: λ of wanted and of unwanted answers.
        adapter: the one whose absence makes the reference; None: all adapters go.

    Attributes:
        has_reference: whether answers are held against those of a reference.
        known: log-probabilities of the reference by `PairBatch.keys`: computed once for a model
            and an `adapter`, forgotten where another comes, where weights other than the
            adapter's change, or what else is active.
        drift: z of kto, over the pairs that `prepare` saw last.
    """

    def __init__(
        self,
        kind: str,
        beta: float | None = None,
        gamma: float = 1.0,
        kto_weights: tuple[float, float] = (1.0, 1.0),
        adapter: str | None = None,
    ):
        if kind not in KINDS:
            raise ValueError(f"a preference loss must be one of {', '.join(KINDS)}, found {kind!r}")
        self.kind, self._scores = kind, KINDS[kind].scores
        self.has_reference = KINDS[kind].reference
        self.beta = KINDS[kind].beta if beta is None else beta
        self.gamma, self.kto_weights, self.adapter = gamma, kto_weights, adapter
        self.known: dict[int, tuple[float, float]] = {}
        self._known_of: tuple[Any, str | None, int] | None = None  # model, adapter, weights
        self.drift = 0.0
        self.seen: list[Tensor] = []

    def __call__(self, model: nn.Module, batch: PairBatch) -> tuple[Tensor, int]:
        """Return the loss summed over the pairs, which carries the gradient, and their number."""
        scores = self.scores(model, batch)
        self.seen.append(self._told(scores, batch))
        return scores.losses.sum(), len(batch)

    def scores(self, model: nn.Module, batch: PairBatch) -> Scores:
        """Return losses and rewards pair by pair."""
        self.check(batch)
        self._forget_others(model)
        if self.has_reference and not self.known.keys() >= set(batch.keys.tolist()):
            self.known = self._reference(model, [batch]) | self.known
        answers = (1,) if self.kind == "kto" else (1, 2)
        sums, tokens = pair_log_probs(model, batch, answers)
        reference = torch.zeros_like(sums)
        if self.has_reference:
            values = [self.known[key][: len(answers)] for key in batch.keys.tolist()]
            reference = torch.tensor(values, dtype=sums.dtype, device=sums.device)
        return self._scores(Answers(sums, reference, tokens), self, batch)

    def check(self, batch: Any) -> None:
        """Raise ValueError unless a batch holds what this loss compares."""
        if not isinstance(batch, PairBatch):
            raise ValueError(self.refusal("a batch", None))
        if bool(((batch.wanted >= 0) != (self.kind == "kto")).any()):
            raise ValueError(self.refusal("a batch", self.kind != "kto"))

    def rows_per_pair(self, model: nn.Module, batch: Batch) -> int:
        """Return how many rows of the model's input a pair is learned in."""
        return 1 if self.kind == "kto" or shares_prompts(model, batch) else 2

    def refusal(self, name: str, labelled: bool | None) -> str:
        """Return what to say of data of another kind: labelled answers, pairs, or texts (None)."""
        needed = "prompt, chosen and rejected"
        if self.kind == "kto":
            needed = "prompt, completion and label (true, false, 1 or 0 in all)"
        found = {
            None: "a text; give such rows, or leave --loss at ce",
            True: "an answer with a label; use --loss kto (in Python: loss='kto')",
            False: "a pair of answers; use --loss dpo (in Python: loss='dpo')",
        }
        return f"loss={self.kind!r} learns from rows with {needed}, but {name} is {found[labelled]}"

    def prepare(
        self,
        model: nn.Module,
        batches: Sequence[Any],
        rows: int = 0,
        merge: Callable[[dict], dict] = lambda new: new,
        add: Callable[..., list[float]] = lambda *values: list(values),
    ) -> None:
        """Compute what all pairs of a step or an evaluation share, before the first of them.

        These are log-probabilities of the reference that are not known yet, and kto's z, which is a
        mean over all of them: so neither depends on how the pairs are spread over batches.

        Args:
            model: with the adapter; left as it was.
            batches: `PairBatch`es of the step, those without a row too.
            rows: pairs in a pass; 0: a batch.
            merge: returns the union of all processes' new entries.
            add: returns sums over all processes.
        """
        self.seen = []
        self._forget_others(model)
        parts = [
            batch.rows(start, start + (rows or len(batch)))
            for batch in batches
            for start in range(0, len(batch), rows or len(batch) or 1)
        ]
        for part in parts:
            self.check(part)
        if self.has_reference:
            self.known = merge(self._reference(model, parts)) | self.known
        if self.kind == "kto":
            total, count = add(self._drift(model, parts), sum(map(len, parts)))
            self.drift = max(0.0, total / max(1, count))

    def _forget_others(self, model: nn.Module) -> None:
        """Forget the reference of another model or state, or without another adapter."""
        now = weakref.ref(model), self.adapter, _state_without(model, self.adapter)
        if self._known_of not in (None, now):
            self.known = {}
        self._known_of = now

    def _reference(
        self, model: nn.Module, parts: Sequence[PairBatch]
    ) -> dict[int, tuple[float, float]]:
        """Return the reference's sums of log p where they are not known."""
        new: dict[int, tuple[float, float]] = {}
        with inference(model), disabled(model, self.adapter):
            for part in parts:
                keys = part.keys.tolist()
                if not self.known.keys() | new.keys() >= set(keys):
                    sums = pair_log_probs(model, part)[0].double().tolist()
                    new |= {key: (a, b) for key, (a, b) in zip(keys, sums, strict=True)}
        return new

    def _drift(self, model: nn.Module, parts: Sequence[PairBatch]) -> float:
        """Return the sum of log p / p_reference of answers to other prompts."""
        found: list[float] = []
        with inference(model):
            for part in parts:
                sums = pair_log_probs(model, part, (2,))[0][:, 0].double().tolist()
                keys = part.keys.tolist()
                found += [one - self.known[key][1] for one, key in zip(sums, keys, strict=True)]
        return math.fsum(found)

    def _told(self, scores: Scores, batch: PairBatch) -> Tensor:
        """Return sums over pairs: how many, right ones, margins, both rewards; f64 `[5]`."""
        first, second = (each.detach().double() for each in (scores.first, scores.second))
        margins = first - second
        if self.kind == "kto":
            margins = torch.where(batch.wanted == 1, margins, -margins)
        right = (margins > 0).double() + (margins == 0).double() / 2
        sums = (torch.ones_like(margins), right, margins, first, second)
        return torch.stack([each.sum() for each in sums])

    def told(
        self, add: Callable[..., list[float]] = lambda *values: list(values)
    ) -> dict[str, float]:
        """Return what the pairs since the last call came to.

        Returns:
            `accuracy`, the share of pairs with a margin above 0 (of 0: half of them), the mean
            `margin` of the rewards and both rewards; of kto the margin from z on the wanted side.
        """
        sums = torch.stack(self.seen).sum(0).tolist() if self.seen else [0.0] * 5
        self.seen = []
        pairs, *rest = add(*sums)
        names = ("accuracy", "margin", "reward_chosen", "reward_rejected")
        if self.kind == "kto":
            names = ("accuracy", "margin", "reward", "reward_elsewhere")
        means = (value / pairs if pairs else math.nan for value in rest)
        return {"pairs": int(pairs), **dict(zip(names, means, strict=True))}

    def tensors(self) -> dict[str, Tensor]:
        """Return what is known of the reference, for a state on the disk."""
        values = list(self.known.values())
        return {
            "reference.keys": torch.tensor(list(self.known), dtype=torch.int64),
            "reference.values": torch.tensor(values, dtype=torch.float64).view(-1, 2),
        }

    def restore(self, keys: Tensor, values: Tensor) -> None:
        """Take up what `tensors` returned; it is of the model that comes next."""
        self._known_of = None
        pairs = ((a, b) for a, b in values.tolist())
        self.known = dict(zip(keys.tolist(), pairs, strict=True))
