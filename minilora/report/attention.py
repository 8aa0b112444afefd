"""How much attention goes to chosen tokens, read where a model attends.

A torch function mode sees every call of `scaled_dot_product_attention` within a block, so any model
that attends through it works, and nothing of it is changed or patched.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from minilora.data import Example, pad
from minilora.lora import inference
from minilora.report.tokens import encode
from minilora.running import device_of, forward_logits


@dataclass(frozen=True)
class Attention:
    """The share of attention on chosen tokens, a mean over heads and over the tokens that see one.

    Each tuple but the first has a value per attention layer, in the order they run.
    """

    words: tuple[str, ...]
    before: tuple[float, ...]  # without the adapter
    after: tuple[float, ...]  # with it
    even: tuple[float, ...]  # the share if every token that the layer's mask shows got as much
    tokens: int  # how many of the data's tokens are chosen ones
    queries: tuple[int, ...]  # how many tokens see a chosen one


class AttentionMass(TorchFunctionMode):
    """Sums, per call within one forward pass, the attention that falls on the chosen keys.

    `chosen` are the keys and `real` the queries that are no padding, both bool `[B, T]`.
    """

    def __init__(self, chosen: Tensor, real: Tensor):
        super().__init__()
        self.chosen, self.real = chosen, real
        self.sums: list[tuple[float, float, int]] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        """Look at attention calls and leave every call as it is."""
        if func is F.scaled_dot_product_attention:
            self.sums.append(self.mass(*args, **(kwargs or {})))
        return func(*args, **(kwargs or {}))

    def mass(self, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, *,
             scale=None, enable_gqa=False) -> tuple[float, float, int]:  # fmt: skip
        """Return what falls on the chosen keys in one call, and what would if all got as much.

        Both are summed over the queries that see a chosen key; their number comes third. q is
        `[B, H, T, d]`, k `[B, H or fewer, T, d]`.
        """
        width = self.chosen.shape[1]
        if query.dim() != 4 or (query.shape[2], key.shape[2]) != (width, width):
            raise ValueError(
                f"attention mass needs self-attention [batch, heads, tokens, size] over the whole "
                f"input, found queries {list(query.shape)} and keys {list(key.shape)}; leave words "
                f"out"
            )
        k = key.float().repeat_interleave(query.shape[1] // key.shape[1], 1)
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        scores = (query.float() * scale) @ k.transpose(2, 3)
        visible = torch.ones(width, width, dtype=torch.bool, device=scores.device)
        if is_causal:
            visible = visible.tril()
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            visible = visible & attn_mask
        elif attn_mask is not None:  # instead of -inf some have the dtype's least value
            scores = scores + attn_mask.float()
            visible = visible & (attn_mask > torch.finfo(attn_mask.dtype).min / 2)
        shape = torch.broadcast_shapes(visible.shape, (len(query), 1, width, width))
        visible = visible.expand(shape)
        chosen = visible & self.chosen[:, None, None]
        sees = self.real & chosen.any(3).any(1)
        weights = scores.masked_fill(~visible, -torch.inf).softmax(3)
        mass = (weights * chosen).sum(3).mean(1)[sees]
        even = (chosen.sum(3) / visible.sum(3)).mean(1)[sees]
        return float(mass.double().sum()), float(even.double().sum()), int(sees.sum())


def occurrences(ids: Sequence[int], patterns: Sequence[Sequence[int]]) -> list[bool]:
    """Return, token by token, which belong to an occurrence of one of the patterns."""
    found = [False] * len(ids)
    for pattern in patterns:
        wanted, size = list(pattern), len(pattern)
        for start in range(len(ids) - size + 1):
            if list(ids[start : start + size]) == wanted:
                found[start : start + size] = [True] * size
    return found


def word_ids(words: Sequence[str], tokenizer: Any) -> list[list[int]]:
    """Return the words' token ids, each as written at a start and after a space."""
    if tokenizer is None:
        raise ValueError("words need a tokenizer to be found in the data; pass tokenizer=")
    patterns = []
    for word in words:
        if not isinstance(word, str) or not word.strip():
            raise ValueError(f"words must be strings with something in them, found {word!r}")
        for text in (word, " " + word):
            ids = encode(tokenizer, text)
            if ids and ids not in patterns:
                patterns.append(ids)
    return patterns


def attention_masses(
    model: nn.Module,
    examples: Sequence[Example],
    patterns: Sequence[Sequence[int]],
    *,
    batch_size: int,
    pad_id: int = 0,
) -> tuple[tuple[float, ...], tuple[float, ...], int, tuple[int, ...]]:
    """Measure how much attention falls on the patterns, with the model as it is now.

    Return the mean share per attention layer, the share if attention were even, chosen tokens, and
    tokens that see one, per layer as well.
    """
    marked = [(e, occurrences(e.input_ids, patterns)) for e in examples]
    marked = sorted((m for m in marked if any(m[1])), key=lambda m: len(m[0].input_ids))
    if not marked:
        raise ValueError(
            "words must occur in the data, found none of them; check their spelling and case"
        )
    totals: list[tuple[float, float, int]] = []
    tokens = 0
    with inference(model):
        for start in range(0, len(marked), batch_size):
            rows = marked[start : start + batch_size]
            batch = pad([example for example, _ in rows], pad_id).to(device_of(model))
            width = batch.input_ids.shape[1]
            chosen = torch.tensor([flags + [False] * (width - len(flags)) for _, flags in rows])
            real = torch.ones_like(chosen) if batch.attention_mask is None else batch.attention_mask
            tokens += int(chosen.sum())
            device = batch.input_ids.device
            with AttentionMass(chosen.to(device), real.to(device)) as mode:
                forward_logits(model, batch.input_ids, batch.attention_mask)
            if not mode.sums:
                raise ValueError(
                    "attention mass needs a model that attends through "
                    "torch.nn.functional.scaled_dot_product_attention, found no call of it; load "
                    'transformers\' models with attn_implementation="sdpa", or leave words out'
                )
            before = totals or [(0.0, 0.0, 0)] * len(mode.sums)
            totals = [
                (mass + m, even + e, queries + q)
                for (mass, even, queries), (m, e, q) in zip(before, mode.sums, strict=True)
            ]
    masses, evens, queries = zip(*totals, strict=True)
    return (
        tuple(mass / max(1, n) for mass, n in zip(masses, queries, strict=True)),
        tuple(even / max(1, n) for even, n in zip(evens, queries, strict=True)),
        tokens,
        queries,
    )
