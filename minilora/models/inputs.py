"""Checks of the tensors that a model is given."""

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from minilora.kernels import bounds

IGNORED = -100  # the label of a token that does not count, as in Hugging Face


def check_ids(ids: Tensor, vocabulary: int) -> None:
    """Raise ValueError unless ids are `[B, T]` integers in `[0, vocabulary)`."""
    if ids.dim() != 2 or ids.dtype not in (torch.int64, torch.int32) or not ids.numel():
        raise ValueError(
            f"input_ids must be [batch, tokens] of int64 or int32 with at least one token, "
            f"found {ids.dtype} of shape {list(ids.shape)}"
        )
    # Reading values would split the graph, and fake ones have none.
    if torch.compiler.is_compiling() or isinstance(ids, FakeTensor):
        return
    low, high = bounds(ids)
    if low < 0 or high >= vocabulary:
        raise ValueError(
            f"token ids must lie in [0, {vocabulary}), found ids from {low} to "
            f"{high}; the tokenizer and the model do not belong together"
        )


def check_positions(positions: Tensor, batch: int, tokens: int, context: int) -> None:
    """Raise ValueError unless positions are integers of a shape that fits, in `[0, context)`."""
    if positions.shape not in ((tokens,), (batch, tokens)) or positions.is_floating_point():
        raise ValueError(
            f"positions must be integers of shape [{tokens}] or [{batch}, {tokens}], found "
            f"{positions.dtype} of shape {list(positions.shape)}"
        )
    if torch.compiler.is_compiling():
        return
    low, high = bounds(positions)
    if low < 0 or high >= context:
        raise ValueError(f"positions must lie in [0, {context}), found {low} to {high}")


def check_shared(ids: Tensor, labels: Tensor, shared: int, **beside: Tensor | None) -> None:
    """Raise ValueError unless rows begin with the same tokens, none of which is learned."""
    if not 0 < shared < ids.shape[1] - 1:
        raise ValueError(
            f"shared must leave at least two of the {ids.shape[1]} tokens to each row, found "
            f"{shared}"
        )
    for name, found in beside.items():
        if found is not None:
            raise ValueError(
                f"rows with shared tokens take the causal rule and count their positions from 0, "
                f"found {name} beside shared; leave one of them out"
            )
    if ids.device.type != "cpu" or torch.compiler.is_compiling() or isinstance(ids, FakeTensor):
        return
    if not ids[:, :shared].equal(ids[:1, :shared].expand(len(ids), -1)):
        raise ValueError(f"rows must begin with the same shared={shared} tokens, but they differ")
    if bool((labels[:, 1 : shared + 1] != IGNORED).any()):
        raise ValueError(
            f"none of the first shared={shared} tokens, nor the next one, may be learned, found "
            f"labels among them that count; pass a smaller shared"
        )


def checked_mask(mask: Tensor, whole: tuple[int, int, int, int]) -> Tensor:
    """Return a mask for `[batch, heads, T, S]` with four dimensions, or raise ValueError."""
    fits = mask.dim() <= 4 and all(
        size in (1, full) for size, full in zip(mask.shape[::-1], whole[::-1], strict=False)
    )
    if mask.dtype != torch.bool or not fits:
        raise ValueError(
            f"mask must be bool (True = may attend) and broadcast to [batch, heads, T, S] = "
            f"{list(whole)}, found {mask.dtype} of shape {list(mask.shape)}"
        )
    return mask[(None,) * (4 - mask.dim())]
