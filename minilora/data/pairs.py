"""Make pairs of encoded rows: a better and a worse answer, or one answer with a label (KTO)."""

from __future__ import annotations

from collections.abc import Sequence

from minilora.data.encoder import Row
from minilora.data.examples import IGNORE, Example, Pair, alike, first_learned


class PairRow(Row):
    """The row of a prompt with its first answer; `other` is that with the second one, if any."""

    def __init__(self, first: Row, other: Row | None = None, wanted: bool | None = None) -> None:
        super().__init__(first.limit)
        self.ids, self.labels, self.count = first.ids, first.labels, first.count
        self.other, self.wanted = other, wanted
        if other is not None:
            self.count = max(first.count, other.count)

    def learns(self) -> bool:
        """Whether something is learned of each answer, and they differ as far as they are kept."""
        if self.other is None:
            return super().learns()
        return super().learns() and self.other.learns() and self.ids != self.other.ids

    def example(self) -> Pair:
        """Return the pair; that of one answer has no second one yet (`with_other_answers`)."""
        if self.other is None:
            prompt = first_learned(self.labels)
            parts = (prompt, len(self.ids) - prompt, 0)
            return Pair(tuple(self.ids), tuple(self.labels), parts, self.wanted)
        shared = alike(self.ids, self.other.ids)
        prompt = min(shared, first_learned(self.labels), first_learned(self.other.labels))
        answers = [
            (row.ids[prompt:], _after(prompt, row.labels[prompt:])) for row in (self, self.other)
        ]
        return _joined(self.ids[:prompt], answers[0], answers[1], self.wanted)


Answer = tuple[Sequence[int], Sequence[int]]  # ids and labels


def _after(prompt: int, labels: Sequence[int]) -> Sequence[int]:
    """Return an answer's labels; without a prompt nothing comes before its first token."""
    return labels if prompt else [IGNORE, *labels[1:]]


def _joined(prompt: Sequence[int], first: Answer, second: Answer, wanted: bool | None) -> Pair:
    ids = (*prompt, *first[0], *second[0])
    labels = (*[IGNORE] * len(prompt), *first[1], *second[1])
    return Pair(ids, labels, (len(prompt), len(first[0]), len(second[0])), wanted)


def with_other_answers(examples: Sequence[Example], max_length: int) -> list[Example]:
    """Give each labelled answer the answer of the row before it that has another prompt.

    KTO measures on these how far the model has moved in general. They are fixed by the order of the
    rows, so that no number depends on the batches. Other examples stay as they are.
    """
    single = [e for e in examples if isinstance(e, Pair) and e.wanted is not None]
    if not single:
        return list(examples)
    prompts = [pair.input_ids[: pair.lengths[0]] for pair in single]
    if all(prompt == prompts[0] for prompt in prompts):
        raise ValueError(
            f"answers with a label (KTO) must be to two prompts at least, since each is compared "
            f"with an answer to another prompt, found {len(single)} rows with one; add rows (they "
            f"can't be streamed)"
        )
    last = max(i for i, prompt in enumerate(prompts) if prompt != prompts[0])
    other, found = last, []  # of the first row: the last one with another prompt
    for i, (pair, prompt) in enumerate(zip(single, prompts, strict=True)):
        if i and prompts[i - 1] != prompt:
            other = i - 1
        count, source = pair.lengths[0], single[other]
        answers = [
            (one.input_ids[start:end], _after(count, one.labels[start:end]))
            for one, start in ((pair, count), (source, source.lengths[0]))
            for end in [start + max_length - count]
        ]
        found.append(_joined(prompt, answers[0], answers[1], pair.wanted))
    rest = iter(found)
    return [next(rest) if isinstance(e, Pair) and e.wanted is not None else e for e in examples]


def cut(pair: Pair) -> tuple[Example, Example]:
    """Return the two texts of a pair: the prompt with each answer."""
    prompt, first, _ = pair.lengths
    begin = pair.input_ids[:prompt], pair.labels[:prompt]
    ends = (slice(prompt, prompt + first), slice(prompt + first, None))
    one, two = (
        Example((*begin[0], *pair.input_ids[end]), (*begin[1], *pair.labels[end])) for end in ends
    )
    return one, two
