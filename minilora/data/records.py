"""Encode training records into examples that say what is learned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from minilora.data.encoder import Encoder, Encoding
from minilora.data.examples import Example, learned_labels, number
from minilora.data.pairs import with_other_answers
from minilora.data.preference_shapes import LABELLED
from minilora.data.problems import Problem, listed, refuse
from minilora.data.recognition import resolve
from minilora.data.shapes import COMPLETION, Record, Shape

_CLASSES = "label is not read, as not all are true, false, 1 or 0 (found {})"


@dataclass(frozen=True)
class EncodeReport:
    """Say what became of the records."""

    documents: int  # records read
    tokens: int  # of the kept examples
    learned_tokens: int  # labels of theirs that enter the loss
    truncated: int  # records cut at max_length
    fully_masked: int  # records dropped because nothing was left to learn
    longest: int  # tokens of the longest record before the cut
    notes: tuple[str, ...] = ()  # what else to know: fields ignored, bad records left out, …
    shapes: tuple[str, ...] = ()  # the fields that records were read by: "question and answer", …

    def __add__(self, other: EncodeReport) -> EncodeReport:
        both: dict[str, Any] = {name: n + vars(other)[name] for name, n in vars(self).items()}
        both |= {name: tuple(dict.fromkeys(both[name])) for name in ("notes", "shapes")}
        return EncodeReport(**both | {"longest": max(self.longest, other.longest)})

    def __str__(self) -> str:
        kept = self.documents - self.fully_masked
        read_as = f" ({'; '.join(self.shapes)})" if self.shapes else ""
        counts = (
            f"{kept} of {self.documents} documents kept{read_as}: {self.tokens} tokens, "
            f"{self.learned_tokens} learned; {self.truncated} truncated (the longest had "
            f"{self.longest}), {self.fully_masked} dropped with nothing left to learn"
        )
        return "; ".join([counts, *(f"note: {note}" for note in self.notes)])


def encode_rows(
    rows: Sequence[tuple[str, Any]], tokenizer: Any, options: Encoding
) -> tuple[list[Example], EncodeReport]:
    """Encode records that have names; see `read_data`."""
    encoder = Encoder(tokenizer, options)
    problems: list[Problem] = []
    good: list[tuple[str, Shape, Record]] = []
    classes: list[str] = []  # labels that do not say whether an answer is wanted
    for name, record in rows:  # before the slow part
        try:
            shape, known = resolve(record, options.fields)
            shape.check(known)
            good.append((name, shape, known))
            if shape is COMPLETION and known.get("label") is not None:
                classes.append(f"{known['label']!r:.40} in {name}")
        except ValueError as error:
            problems.append((name, str(error)))
    refuse(problems, "cannot encode the records", options.skip_bad, len(rows))
    shapes: dict[str, None] = {}
    examples: list[Example] = []
    truncated = longest = masked = 0
    for name, own_shape, known in good:
        shape = COMPLETION if classes and own_shape is LABELLED else own_shape
        if shape is not own_shape:
            encoder.note(_CLASSES.format(classes[0]), name)
        try:
            found = shape.encode(encoder, known, name)
            shapes[" and ".join(shape.keys)] = None
        except ValueError as error:
            problems.append((name, str(error)))
            continue
        learned = [row.example() for row in found if row.learns()]
        if len(learned) > 1:
            source = number(learned[0].input_ids)
            learned = [replace(example, source=source) for example in learned]
        examples += learned
        masked += not learned
        truncated += any(row.count > options.max_length for row in found)
        longest = max([longest, *(row.count for row in found)])
    refuse(problems, "cannot encode the records", options.skip_bad, len(rows))
    examples = with_other_answers(examples, options.max_length)
    left_out = [f"left out: {listed(problems)}"] if problems else []
    return examples, EncodeReport(
        documents=len(good),
        tokens=sum(len(example.input_ids) for example in examples),
        learned_tokens=sum(learned_labels(example.labels) for example in examples),
        truncated=truncated,
        fully_masked=masked,
        longest=longest,
        notes=(*encoder.said(), *left_out),
        shapes=tuple(shapes),
    )
