"""How many rows of a micro-batch are computed at once."""

import math

# On a CPU more tokens in a pass take memory and hardly less time for each: SmolLM2-135M in bf16 on
# two threads of a Xeon with AMX takes 0.9 ms a token and 0.6 s a pass (benchmarks/NOTES.md).
PASS_TOKENS = 3072


def usual_pass_tokens(gpu: bool, parallel: str | None, foreign: bool) -> int | None:
    """Return how many tokens a pass has at most if nobody says, None for any number.

    Args:
        gpu: whether another device than a CPU computes.
        parallel: ranks under `"fsdp"` compute in step.
        foreign: whether the model or its loss is not ours, so that more may follow from a batch.
    """
    return None if gpu or parallel == "fsdp" or foreign else PASS_TOKENS


def pass_rows(rows: int, length: int, tokens: int | None, shared: int = 0) -> int:
    """Return how many of the rows a pass has at most: as few passes as hold them, all about alike.

    `length` counts the tokens of a row, `tokens` those that a pass may have (None: any number),
    `shared` those that are computed once for all rows. Of these a row still keeps what attention
    does, taken for a tenth.
    """
    if tokens is None or not rows:
        return rows
    once = min(shared, length - 1) * 9 // 10
    most = max(1, (tokens - once) // (length - once))
    return math.ceil(rows / math.ceil(rows / most))
