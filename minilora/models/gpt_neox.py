"""GPT-NeoX and Pythia: the numbers of Hugging Face's `GPTNeoXForCausalLM`.

    h = E[ids]
    per layer:  h += attention(norm(h)) + MLP(norm'(h)), side by side or one after the other
    logits = head(norm(h))

Queries, keys and values come from one projection, head by head, and a part of each head is rotated
(Black et al. 2022, "GPT-NeoX-20B", section 2.1).
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from torch import Tensor, nn

from minilora.files import short
from minilora.models.blocks import Mask, Slot
from minilora.models.causal import CausalLM
from minilora.models.config import DecoderConfig
from minilora.models.gguf_names import LAYER_NORMED, PART_ROTATED, joint_parts, whole_names
from minilora.models.gpt_blocks import ACTIVATIONS, JointAttention, PlainMLP
from minilora.models.rotary import Rotation

_ABSENT = ("num_key_value_heads", "head_dim", "rms_norm_eps", "mlp_bias")
_BUFFERS = (".attention.bias", ".attention.masked_bias", ".rotary_emb.inv_freq")


@dataclass(frozen=True)
class GPTNeoXConfig(DecoderConfig):
    """Hold the numbers that define a GPT-NeoX model; the others are `DecoderConfig`'s.

    Args:
        layer_norm_eps: added to the variance in the layer norms.
        hidden_act: of the MLP, a key of `ACTIVATIONS`.
        use_parallel_residual: whether attention and MLP read the same hidden state.
        rope_theta: base of the rotary frequencies; `rotary_emb_base` outside `rope_parameters`.
        partial_rotary_factor: share of a head that is rotated; `rotary_pct` outside.
    """

    model_type = "gpt_neox"
    architecture = "GPTNeoXForCausalLM"
    neutral: ClassVar = DecoderConfig.neutral | {
        "hidden_act": tuple(ACTIVATIONS),
        "hidden_dropout": (None, 0, 0.0),
    }
    left_out = (*DecoderConfig.left_out, *_ABSENT)
    defaults: ClassVar = {"attention_bias": True}

    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 2
    layer_norm_eps: float = 1e-5
    hidden_act: str = "gelu"
    use_parallel_residual: bool = True
    partial_rotary_factor: float = 0.25

    norm_eps = property(lambda self: self.layer_norm_eps)
    rotary_dim = property(lambda self: int(self.head_dim * self.partial_rotary_factor))

    @classmethod
    def _completed(cls, values: dict[str, Any], entries: dict[str, Any]) -> dict[str, Any]:
        own = {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}
        values = {key: value for key, value in values.items() if key not in own}
        read = {key: entries.get(name) for key, name in own.items()}
        values = super()._completed(values, entries | read)
        for key, name in own.items():
            taken = values.get(key, getattr(cls, key))
            if entries.get(key) not in (None, taken):
                raise ValueError(
                    f"{key} must be {taken}, as rope_parameters, {name} or its default say, found "
                    f"{short(entries[key])}, which transformers 5 ignores; remove {key} from "
                    f"config.json, or correct {name}"
                )
        return values

    def _entries(self) -> dict[str, Any]:
        entries = super()._entries()
        share, theta = self.partial_rotary_factor, entries.pop("rope_theta")
        entries["rope_parameters"]["partial_rotary_factor"] = share
        return entries | {"rotary_pct": share, "rotary_emb_base": theta}


class Layer(nn.Module):
    """Add attention and MLP to the residual stream, each after a norm."""

    window, norm_class = None, nn.LayerNorm

    def __init__(self, config: GPTNeoXConfig, layer: int, **made: Any) -> None:
        super().__init__()
        self.rope, self.parallel = config.ropes[layer], config.use_parallel_residual
        size, inner, width = config.hidden_size, config.intermediate_size, config.head_dim
        norm = partial(nn.LayerNorm, size, config.layer_norm_eps, **made)
        self.input_layernorm, self.post_attention_layernorm = norm(), norm()
        names, biases = ("query_key_value", "dense"), made | {"bias": config.attention_bias}
        scale, act = config.attention_scale, config.hidden_act
        self.attention = JointAttention(names, size, width, scale, True, **biases)
        self.mlp = PlainMLP(("dense_h_to_4h", "dense_4h_to_h"), size, inner, act, **made)

    def forward(self, x: Tensor, rotation: Rotation, mask: Mask, slot: Slot | None) -> Tensor:
        """Return `[B, T, hidden]`."""
        attended = self.attention(self.input_layernorm(x), rotation, mask, slot)
        seen = x if self.parallel else attended + x
        return self.mlp(self.post_attention_layernorm(seen)) + attended + x


def _regrouped(*groups: int) -> Any:
    """Change the rows of queries, keys and values from by head to by part, or back."""

    def change(fqn: str, rows: Tensor, config: GPTNeoXConfig) -> Tensor:
        if ".query_key_value." not in fqn:
            return rows
        split = rows.view(*groups, config.head_dim, *rows.shape[1:])
        return split.transpose(0, 1).reshape(rows.shape)

    return change


_GGUF = PART_ROTATED._replace(
    architecture="gptneox",
    required=LAYER_NORMED
    | {
        "attention.layer_norm_epsilon": "layer_norm_eps",
        "use_parallel_residual": "use_parallel_residual",
    },
    biases={},
    whole=whole_names("gpt_neox.embed_in", "gpt_neox.final_layer_norm"),
    parts=joint_parts(
        "input_layernorm",
        "attention.query_key_value",
        "attention.dense",
        "post_attention_layernorm",
        "mlp.dense_h_to_4h",
        "mlp.dense_4h_to_h",
    ),
    restored=_regrouped(3, -1),  # llama.cpp has them by part
    stored=_regrouped(-1, 3),
    own_head=True,
)


class GPTNeoX(CausalLM):
    """Compute next-token logits as Hugging Face's `GPTNeoXForCausalLM` does in evaluation mode."""

    embedding_name, blocks_name = "gpt_neox.embed_in", "gpt_neox.layers"
    norm_name, passed_over = "gpt_neox.final_layer_norm", _BUFFERS
    head_name = "embed_out.weight"
    config_class, layer_class, gguf = GPTNeoXConfig, Layer, _GGUF
