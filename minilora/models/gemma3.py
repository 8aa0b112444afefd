"""Gemma 3's language models: the numbers of Hugging Face's `Gemma3ForCausalLM`.

A Gemma 2 that norms the queries and the keys of each head before they are rotated, in place of a
cap on attention scores, and whose layers with a window have a rotary base of their own (Gemma Team
2025, "Gemma 3", section 2). Images are for the models around it, which aren't built.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from minilora.files import one_line, short
from minilora.models.config import FULL, SLIDING
from minilora.models.gemma2 import Gemma2, Gemma2Config, Gemma2Layer, GemmaNorm, scaled
from minilora.models.qwen3 import NormedAttention
from minilora.models.rope import Rope, read_rope


@dataclass(frozen=True)
class Gemma3Config(Gemma2Config):
    """Hold the numbers that define a Gemma 3 model; the others are `Gemma2Config`'s.

    Args:
        rope_local_base_freq: base of the rotary frequencies in layers with a window.
    """

    model_type = "gemma3_text"
    architecture = "Gemma3ForCausalLM"
    neutral: ClassVar = Gemma2Config.neutral | {"attn_logit_softcapping": (None,)}

    max_position_embeddings: int = 131072
    rope_theta: float = 1_000_000.0
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    rope_local_base_freq: float = 10_000.0

    @property
    def ropes(self) -> tuple[Rope | None, ...]:
        """Per layer how queries and keys are rotated."""
        local = Rope(self.head_dim, self.rope_local_base_freq, None, self.max_position_embeddings)
        return tuple(self.rope if window is None else local for window in self.windows)

    @classmethod
    def _completed(cls, values: dict[str, Any], entries: dict[str, Any]) -> dict[str, Any]:
        ropes = entries.get("rope_parameters")
        local: dict[str, Any] = {"rope_theta": entries.get("rope_local_base_freq")}
        # Which transformers reads only where a model has one rope.
        entries = entries | {"original_max_position_embeddings": None}
        if isinstance(ropes, dict):
            for key in ropes.keys() - {FULL, SLIDING}:
                raise ValueError(
                    f"rope_parameters: {one_line(key, 80)}={short(ropes[key])} is not built: it "
                    f"must hold {FULL!r} and {SLIDING!r}; correct config.json"
                )
            local["rope_parameters"] = ropes.get(SLIDING)
            entries = entries | {"rope_parameters": ropes.get(FULL)}
        theta = read_rope(local, cls.max_position_embeddings, {}).get("rope_theta", 10_000.0)
        return super()._completed(values | {"rope_local_base_freq": theta}, entries)

    @classmethod
    def _older_types(cls, values: dict[str, Any], entries: dict[str, Any]) -> list[str]:
        period = entries.get("sliding_window_pattern", 6)
        cls._check("sliding_window_pattern", int, period)
        layers = range(1, values["num_hidden_layers"] + 1)
        return [SLIDING if layer % period else FULL for layer in layers]

    def _entries(self) -> dict[str, Any]:
        entries = super()._entries()
        local = {"rope_theta": self.rope_local_base_freq, "rope_type": "default"}
        ropes = {FULL: entries["rope_parameters"], SLIDING: local}
        return entries | {"rope_parameters": ropes}


class Gemma3Attention(NormedAttention):
    """Attend with queries and keys of unit mean square, times 1 + weight."""

    norm_class = GemmaNorm


class Gemma3Layer(Gemma2Layer):
    """Add attention and then the GeGLU block to the residual stream, each between two norms."""

    attention_class = Gemma3Attention


def _completed(entries: dict[str, Any]) -> dict[str, Any]:
    """Take it that no layer has a window where none is stated."""
    return scaled({"sliding_window": None, **entries})


class Gemma3(Gemma2):
    """Compute next-token logits as Hugging Face's `Gemma3ForCausalLM` does; see `CausalLM`."""

    config_class, layer_class = Gemma3Config, Gemma3Layer
    gguf = Gemma2.gguf._replace(
        architecture="gemma3",
        required={
            key: field
            for key, field in Gemma2.gguf.required.items()
            if "softcapping" not in key and "sliding" not in key
        },
        optional=Gemma2.gguf.optional
        | {
            "attention.sliding_window": "sliding_window",
            "final_logit_softcapping": "final_logit_softcapping",
            "rope.freq_base_swa": "rope_local_base_freq",
        },
        parts=Gemma2.gguf.parts
        | {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"},
        completed=_completed,
        ropes=("linear",),  # of the layers without a window
    )
