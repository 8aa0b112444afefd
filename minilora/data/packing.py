"""Pack short documents into long rows, so that less is padding; documents never see each other."""

from collections.abc import Iterable, Sequence
from typing import Any

from minilora.data.examples import IGNORE, Example, Pair, as_examples


def pack(examples: Iterable[Any], length: int) -> list[Example]:
    """Pack documents into rows of at most `length` tokens, first-fit in the order given.

    Each document goes into the first row that has room. In a row every document attends only to
    itself and its positions begin at 0 (`Batch.documents`), and its first token, which has nothing
    before it, is not learned: its loss is what it is alone.

    Args:
        examples: documents as `minilora.data.as_examples` takes them.
        length: tokens in a row, at least 2; no document may be longer.

    Returns:
        The rows; a row of one document is that document.

    Raises:
        ValueError: a document longer than a row, by index; one that is packed already; pairs.
    """
    if length < 2:
        raise ValueError(f"length must be at least 2, found {length}")
    examples = list(examples)
    if any(isinstance(example, Pair) for example in examples):
        raise ValueError(
            "preference pairs are rows of their own and can't be packed; leave --pack out"
        )
    documents = as_examples(examples)
    for i, document in enumerate(documents):
        if len(document.input_ids) > length:
            raise ValueError(
                f"documents must fit a row of {length} tokens, but example {i} has "
                f"{len(document.input_ids)}; cut it (--max-length {length}), or raise length"
            )
        if document.lengths:
            raise ValueError(f"documents must be packed once, but example {i} is a packed row")
    rows = first_fit([len(document.input_ids) for document in documents], length)
    return [_row([documents[i] for i in row]) for row in rows]


def _row(documents: Sequence[Example]) -> Example:
    if len(documents) == 1:
        return documents[0]
    ids: list[int] = []
    labels: list[int] = []
    for document in documents:
        ids += document.input_ids
        labels += [IGNORE, *document.labels[1:]]
    return Example(ids, labels, [len(document.input_ids) for document in documents])


def first_fit(sizes: Sequence[int], room: int) -> list[list[int]]:
    """Put each size into the first bin that has room for it; return the bins as indices.

    The free room of all bins is kept in a tree of maxima, so n sizes take n log n steps.
    """
    leaves = 1
    while leaves < len(sizes):
        leaves *= 2
    free = [room] * (2 * leaves)  # free[i] = max(free[2 i], free[2 i + 1]); bins are the leaves
    bins: list[list[int]] = []
    for index, size in enumerate(sizes):
        node = 1
        while node < leaves:
            node = 2 * node if free[2 * node] >= size else 2 * node + 1
        if node - leaves == len(bins):
            bins.append([])
        bins[node - leaves].append(index)
        free[node] -= size
        while node > 1:
            node //= 2
            free[node] = max(free[2 * node], free[2 * node + 1])
    return bins
