"""One batch: examples padded to one length, as plain rows, packed rows, or pairs of answers."""

from __future__ import annotations

import dataclasses
import hashlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from minilora.data.examples import IGNORE, Example, Pair, common_prefix


@dataclass(frozen=True)
class Batch:
    """Hold examples padded on the right to one length.

    Attributes:
        input_ids: [B, T] int64.
        labels: [B, T] int64, -100 on padding and on what is not learned.
        attention_mask: [B, T] bool, False on padding; None when nothing is padded.
        documents: [B, T] int64, which of its row's documents a token belongs to, -1 on padding;
            None where rows are single documents.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    attention_mask: torch.Tensor | None = None
    documents: torch.Tensor | None = None

    def __len__(self) -> int:
        """Count the rows."""
        return len(self.input_ids)

    @property
    def tokens(self) -> int:
        """Count the labels that enter the loss: those at index ≥ 1 that are not -100."""
        return sum(self._row_tokens())

    def _row_tokens(self) -> list[int]:
        counts, shared = self._known()
        if counts is None:
            counts = self._learned()[:, 1:].sum(1).tolist()
            self._note(counts, shared)
        return counts

    def _learned(self) -> torch.Tensor:
        return self.labels != IGNORE

    def _versions(self) -> tuple[int, int] | None:
        """Return numbers that change with ids and labels, None where torch keeps none."""
        if self.input_ids.is_inference() or self.labels.is_inference():
            return None
        return self.input_ids._version, self.labels._version

    def _note(self, row_tokens: list[int] | None, shared: int) -> Batch:
        """Keep what was counted, if need be on the CPU: counting on a GPU waits for it."""
        self.__dict__["_noted"] = self._versions(), row_tokens, shared
        return self

    def _known(self) -> tuple[list[int] | None, int]:
        """Return what was noted, as long as ids and labels are what they were."""
        versions, counts, shared = self.__dict__.get("_noted", (None, None, 0))
        return (counts, shared) if versions and versions == self._versions() else (None, 0)

    @property
    def shared(self) -> int:
        """Count the first tokens of all rows that are the same, if computing them once saves much.

        Neither they nor the next token is learned. Known of what `pad` made, until its ids or
        labels are changed.
        """
        return self._known()[1]

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch on `device`; a pinned one is copied without waiting."""
        copied = self._each(lambda tensor: tensor.to(device, non_blocking=tensor.is_pinned()))
        return copied._note(self._row_tokens(), self.shared)

    def pinned(self) -> Batch:
        """Return the batch in page-locked memory."""
        return self._each(torch.Tensor.pin_memory)._note(self._row_tokens(), self.shared)

    def rows(self, start: int, stop: int) -> Batch:
        """Return some of the rows, padded as they were."""
        some = self._each(lambda tensor: tensor[start:stop])
        shared = worth_sharing(len(some), self.input_ids.shape[1], self.shared)
        return some._note(self._row_tokens()[start:stop], shared)

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        found = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        changed: dict[str, Any] = {k: v if v is None else change(v) for k, v in found.items()}
        return type(self)(**changed)

    def positions(self) -> torch.Tensor:
        """Return [B, T] positions that restart with each document; of packed rows only."""
        return positions_in(self._documents())

    def document_mask(self) -> torch.Tensor:
        """Return [B, 1, T, T] bool: what is before a token in its own document, and itself."""
        documents = self._documents()
        own = documents[:, :, None] == documents[:, None, :]
        return own.tril()[:, None]

    def _documents(self) -> torch.Tensor:
        if self.documents is None:
            raise ValueError("the batch must hold packed rows, found single documents")
        return self.documents


def worth_sharing(rows: int, length: int, shared: int) -> int:
    """Return `shared`, or 0 where computing so many first tokens once would save too little.

    Attention takes rows apart, which costs more in long rows: an eighth of all tokens has to be
    saved, and a quarter in rows of 1024.
    """
    saved = (rows - 1) * shared / max(1, rows * length)
    return shared if saved >= 1 / 8 + length / 8192 else 0


def positions_in(documents: torch.Tensor) -> torch.Tensor:
    """Return [B, T] positions that restart where a row's next document, or padding, begins.

    Args:
        documents: [B, T] of any dtype, one value on each document and another one beside it.
    """
    counted = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)
    begins = torch.ones_like(documents, dtype=torch.bool)
    begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return counted - torch.where(begins, counted, 0).cummax(1).values


def pad(examples: Sequence[Example], pad_id: int = 0) -> Batch:
    """Pad examples on the right to the longest of them.

    Args:
        examples: of none there is a batch without rows, of one column.
        pad_id: the token id put in the padding, whose labels are -100.
    """
    if not examples:
        return Batch(*torch.zeros(2, 0, 1, dtype=torch.int64))
    if pairs := [example for example in examples if isinstance(example, Pair)]:
        return _pad_pairs(pairs, pad_id)
    lengths = torch.tensor([len(example.input_ids) for example in examples])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    input_ids = torch.full(mask.shape, pad_id)
    labels = torch.full(mask.shape, IGNORE)
    input_ids[mask] = torch.tensor([i for example in examples for i in example.input_ids])
    labels[mask] = torch.tensor([label for example in examples for label in example.labels])
    documents = None
    if any(example.lengths for example in examples):
        documents = torch.full(mask.shape, -1)
        documents[mask] = torch.tensor([i for example in examples for i in _numbers(example)])
    shared = worth_sharing(len(mask), mask.shape[1], common_prefix(examples))
    return Batch(input_ids, labels, None if mask.all() else mask, documents)._note(None, shared)


def _numbers(example: Example) -> Iterator[int]:
    """Yield for each token the number of its document in the row."""
    for number, length in enumerate(example.lengths or (len(example.input_ids),)):
        yield from [number] * length


@dataclass(frozen=True)
class PairBatch(Batch):
    """Hold pairs, each a row: a prompt, and two answers of which neither sees the other.

    Attributes:
        parts: [B, T] int64, 0 on the prompt, 1 and 2 on the answers, -1 on padding.
        wanted: [B] int64, `Pair.wanted` as 0 or 1, -1 for None.
        keys: [B] int64, a fingerprint of the row.
    """

    parts: torch.Tensor = dataclasses.field(kw_only=True)
    wanted: torch.Tensor = dataclasses.field(kw_only=True)
    keys: torch.Tensor = dataclasses.field(kw_only=True)

    def _learned(self) -> torch.Tensor:
        """Of an answer with a label it is that one: the other only says how far a model moved."""
        partner = (self.parts == 2) & (self.wanted[:, None] >= 0)
        return super()._learned() & ~partner

    def positions(self) -> torch.Tensor:
        """Return [B, T] positions, which go on from the prompt in both answers."""
        first = (self.parts == 1).sum(1, keepdim=True)
        places = torch.arange(self.parts.shape[1], device=self.parts.device)
        return places - torch.where(self.parts == 2, first, 0)

    def document_mask(self) -> torch.Tensor:
        """Return [B, 1, T, T] bool: what is before a token in the prompt and its own answer."""
        query, key = self.parts[:, :, None], self.parts[:, None, :]
        return ((key == 0) | (key == query)).tril()[:, None]

    def before(self) -> torch.Tensor:
        """Return [B, T] the place of the token that each follows; of the first one it is 0."""
        prompt = (self.parts == 0).sum(1, keepdim=True)
        places = torch.arange(self.parts.shape[1], device=self.parts.device).expand_as(self.parts)
        begins = (self.parts == 2).cumsum(1) == 1
        return (torch.where(begins, prompt, places) - 1).clamp(min=0)

    def apart(self, answers: Sequence[int] = (1, 2)) -> Batch:
        """Return plain rows: each prompt with its first answer, then with its second one.

        Args:
            answers: which of the two; of one alone there are B rows, else 2 B.
        """
        sides = [(self.parts == 0) | (self.parts == answer) for answer in answers]
        kept = torch.stack(sides, 1).flatten(0, 1)
        order = (~kept).byte().argsort(dim=1, stable=True)  # what is kept comes first, as it stood
        mask = kept.gather(1, order)
        width = int(mask.sum(1).max())
        order, mask = order[:, :width], mask[:, :width]
        ids, labels = (
            tensor.repeat_interleave(len(answers), 0).gather(1, order).where(mask, filler)
            for tensor, filler in ((self.input_ids, 0), (self.labels, IGNORE))
        )
        return Batch(ids, labels, None if bool(mask.all()) else mask)


def _pad_pairs(pairs: Sequence[Pair], pad_id: int) -> PairBatch:
    """Pad pairs on the right; see `pad`."""
    rows = pad([Example(pair.input_ids, pair.labels) for pair in pairs], pad_id)
    parts = torch.full_like(rows.input_ids, -1)
    for row, pair in zip(parts, pairs, strict=True):
        row[: len(pair.input_ids)] = torch.tensor(list(_numbers(pair)))
    wanted = torch.tensor([-1 if pair.wanted is None else int(pair.wanted) for pair in pairs])
    keys = torch.tensor([_key(pair) for pair in pairs])
    return PairBatch(
        rows.input_ids, rows.labels, rows.attention_mask, parts=parts, wanted=wanted, keys=keys
    )


def _key(pair: Pair) -> int:
    """Return 63 bits that stand for the ids and what of them is learned."""
    numbers = array("q", [*pair.lengths, *pair.input_ids, *pair.labels])
    return int.from_bytes(hashlib.sha256(numbers).digest()[:8], "little") >> 1
