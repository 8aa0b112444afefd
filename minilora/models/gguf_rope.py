"""What a GGUF file says of rotary frequencies: keys `rope.scaling.…`, and tensors of divisors.

llama.cpp divides each frequency by its number in `rope_freqs`, or in `rope_factors_short` and
`rope_factors_long`; of Llama 3's rule a file holds that list alone. The keys, and what absent ones
mean: https://github.com/ggml-org/llama.cpp/blob/master/src/llama-model.cpp; what is written:
https://github.com/ggml-org/llama.cpp/tree/master/conversion.
"""

from typing import Any

import torch
from torch import Tensor

from minilora.files import one_line, short
from minilora.models.rope import Linear, Llama3, LongRope, Rope, Scaling, Yarn, frequencies

FREQS, LONG, SHORT = (f"rope_{name}.weight" for name in ("freqs", "factors_long", "factors_short"))
ROPE_TENSORS = (FREQS, LONG, SHORT)
_BETAS = {"yarn_beta_fast": "beta_fast", "yarn_beta_slow": "beta_slow"}
_KEYS = {"type", "factor", "scale_linear", "original_context_length"}
_NEUTRAL: dict[str, Any] = {"attn_factor": 1, "yarn_attn_factor": 1, "yarn_log_multiplier": 0}
_ROUNDING = 4e-6  # of numbers that were computed in f32


def is_rope_key(key: str) -> bool:
    """Whether `read_scaling` reads a key."""
    return key.startswith("rope.scal") and key != "rope.scaling.finetuned"


def read_scaling(
    given: dict[str, Any], tensors: dict[str, Tensor], theta: float, context: int
) -> Scaling | None:
    """Return how a file scales rotary frequencies, None where it does not.

    Args:
        given: metadata, by keys without the architecture.
        tensors: those of `ROPE_TENSORS` that the file holds.
        theta, context: `rope_theta` and `max_position_embeddings`.

    Raises:
        ValueError: keys, values or tensors that are not built together, by name.
    """
    keys = {k.rpartition(".")[2]: value for k, value in given.items() if is_rope_key(k)}
    kind, factor = keys.get("type", "linear"), keys.get("factor") or keys.get("scale_linear") or 1
    kind = "none" if kind == "linear" and factor == 1 else kind
    known = _KEYS
    if kind in ("none", "longrope") and factor == 1 and tensors:
        kind = {(FREQS,): "divided", (LONG, SHORT): "longrope"}.get(tuple(sorted(tensors)), "?")
        known = _KEYS | {"attn_factor"} if kind == "longrope" else _KEYS
    elif kind == "longrope" or tensors:
        kind = "?"
    elif kind == "yarn":
        known = _KEYS | _BETAS.keys()
    if any(k not in known and value != _NEUTRAL.get(k) for k, value in keys.items()):
        kind = "?"
    original = keys.get("original_context_length", context)
    if kind == "none":
        return None
    if kind == "linear":
        return Linear(factor)
    if kind == "yarn":
        betas = {ours: keys[key] for key, ours in _BETAS.items() if key in keys}
        return Yarn(original, factor, **betas)
    if kind == "longrope":
        near, far = (tuple(tensors[name].tolist()) for name in (SHORT, LONG))
        return LongRope(near, far, original, attention_factor=keys.get("attn_factor", 1.0))
    if kind == "divided":
        return _divided(tensors[FREQS], theta, context)
    told = [f"{one_line(key, 80)} = {short(given[key])}" for key in given if is_rope_key(key)]
    raise ValueError(f"{', '.join([*told, *sorted(tensors)])} is not built")


def _divided(divisors: Tensor, theta: float, context: int) -> Scaling | None:
    """Return the Llama 3 rule that makes these divisors, else a LongRoPE of one list."""
    if bool((divisors == 1).all()):
        return None
    rope = Rope(2 * len(divisors), theta)
    if bool((divisors >= 1).all()) and bool(divisors.isfinite().all()):
        for power in range(3, 24):
            rule = Llama3(float(divisors.max()), 1.0, 4.0, 2**power)
            if _alike(_divisors(rope._replace(scaling=rule)), divisors):
                return rule
    listed = tuple(divisors.tolist())
    return LongRope(listed, listed, context, attention_factor=1.0)


def written_scaling(rope: Rope) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the keys and tensors of a rope's scaling; none where llama.cpp has none for it."""
    scaling = rope.scaling
    if isinstance(scaling, Linear):
        return {"rope.scaling.type": "linear", "rope.scaling.factor": float(scaling.factor)}, {}
    if isinstance(scaling, Yarn):
        numbers: dict[str, Any] = {
            "factor": float(scaling.stretch(rope)),
            "original_context_length": scaling.original_max_position_embeddings,
        }
        betas = ((key, getattr(scaling, ours)) for key, ours in _BETAS.items())
        numbers |= {key: float(value) for key, value in betas if value is not None}
        numbers["type"] = "yarn"
        return {f"rope.scaling.{key}": value for key, value in numbers.items()}, {}
    if isinstance(scaling, Llama3):
        return {}, {FREQS: _divisors(rope)}
    if isinstance(scaling, LongRope):
        lists = {SHORT: scaling.short_factor, LONG: scaling.long_factor}
        keys = {
            "rope.scaling.type": "longrope",
            "rope.scaling.attn_factor": float(scaling.amplitude(rope)),
            "rope.scaling.original_context_length": scaling.original_max_position_embeddings,
        }
        return keys, {
            name: torch.tensor(list_, dtype=torch.float32) for name, list_ in lists.items()
        }
    return {}, {}


def unread_scaling(rope: Rope) -> str:
    """Return the flags that llama.cpp needs: it reads these keys of few architectures alone."""
    flags = []
    for key, usual in (("yarn_beta_fast", 32), ("yarn_beta_slow", 1)):
        value = getattr(rope.scaling, _BETAS[key], None)
        if value not in (None, usual):
            flags.append(f"--{key.replace('_', '-')} {value:g}")
    return " ".join(flags)


def rotates_alike(a: Rope | None, b: Rope | None) -> bool:
    """Whether two ropes turn queries and keys by the same angles, to the rounding of f32."""
    if a is None or b is None:
        return a is b
    if (a.dim, a.theta) != (b.dim, b.theta):
        return False
    known = [a.context, b.context]
    known += [getattr(r.scaling, "original_max_position_embeddings", 1) for r in (a, b)]
    counts = [float(n + more) for n in {1, *known} for more in (0, 1, 5 * n)]
    lengths = torch.tensor(counts, dtype=torch.float32)
    each = [frequencies(rope, lengths) for rope in (a, b)]
    sizes = [1.0 if r.scaling is None else r.scaling.amplitude(r) for r in (a, b)]
    return _alike(*each) and abs(sizes[0] - sizes[1]) <= _ROUNDING * sizes[0]


def _alike(a: Tensor, b: Tensor) -> bool:
    return bool(((a - b).abs() <= _ROUNDING * b.abs()).all())


def _divisors(rope: Rope) -> Tensor:
    plain, scaled = (
        frequencies(each, torch.ones(1)) for each in (rope._replace(scaling=None), rope)
    )
    return plain / scaled
