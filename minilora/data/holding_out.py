"""Keep some of the examples back, so that what was learned can be measured on them."""

from collections.abc import Sequence

from minilora.data.examples import Example


def hold_out(examples: Sequence[Example], share: float) -> tuple[list[Example], list[Example]]:
    """Split examples into those to learn and those held out, both in their order.

    The content decides, by its hash: equal examples stay together, so do those of one record and
    pairs to one prompt, and what is held out stays so when others are added or the order changes.

    Args:
        examples: at least two that differ.
        share: of the examples, below 1; or their number, from 1. Those that stay together may make
            it more.

    Raises:
        ValueError: nothing would be left on one of the sides.
    """
    keys = [one.group for one in examples]
    count = max(1, round(share * len(examples))) if share < 1 else int(share)
    last = sorted(keys)[min(count, len(keys)) - 1] if keys else 0
    learned = [one for one, key in zip(examples, keys, strict=True) if key > last]
    held_out = [one for one, key in zip(examples, keys, strict=True) if key <= last]
    if not learned:
        raise ValueError(
            f"holding out {count} of {len(examples)} examples leaves none that differs to learn "
            f"(those of one record, and pairs to one prompt, stay together); hold out less "
            f"(--hold-out), cut long records up, or pass other data to measure on (--valid)"
        )
    return learned, held_out
