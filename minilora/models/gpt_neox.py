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

from minilora.models.blocks import Slot, attend, extend
from minilora.models.causal import Decoder
from minilora.models.config import DecoderConfig
from minilora.models.gguf_names import PART_ROTATED
from minilora.models.gpt2 import ACTIVATIONS
from minilora.models.rotary import Rotation, rotate

_ABSENT = ("num_key_value_heads", "head_dim", "rms_norm_eps", "mlp_bias")
_BUFFERS = (".attention.bias", ".attention.masked_bias", ".rotary_emb.inv_freq")


@dataclass(frozen=True)
class GPTNeoXConfig(DecoderConfig):
    """Hold the numbers that define a GPT-NeoX model; the others are `DecoderConfig`'s.

    Args:
        layer_norm_eps: added to the variance in the layer norms.
        hidden_act: of the MLP, a key of `ACTIVATIONS`.
        use_parallel_residual: whether attention and MLP read the same hidden state.
        partial_rotary_factor: share of a head that is rotated; `rotary_pct` in older files.
    """

    model_type = "gpt_neox"
    architecture = "GPTNeoXForCausalLM"
    neutral: ClassVar = DecoderConfig.neutral | {
        "hidden_act": tuple(ACTIVATIONS),
        "hidden_dropout": (None, 0, 0.0),
    }
    left_out = (*DecoderConfig.left_out, *_ABSENT)

    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 2
    layer_norm_eps: float = 1e-5
    hidden_act: str = "gelu"
    use_parallel_residual: bool = True
    partial_rotary_factor: float = 0.25

    rotary_dim = property(lambda self: int(self.head_dim * self.partial_rotary_factor))

    @classmethod
    def _completed(cls, values: dict[str, Any], entries: dict[str, Any]) -> dict[str, Any]:
        rope = {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}
        older = {key: entries.get(name) for key, name in rope.items()}
        return super()._completed({"attention_bias": True, **values}, older | entries)

    def _entries(self) -> dict[str, Any]:
        entries = super()._entries()
        share, theta = self.partial_rotary_factor, entries.pop("rope_theta")
        entries["rope_parameters"]["partial_rotary_factor"] = share
        return entries | {"rotary_pct": share, "rotary_emb_base": theta}


class Attention(nn.Module):
    """Attend with as many key and value heads as query heads, all from one projection."""

    def __init__(self, config: GPTNeoXConfig, **made: Any) -> None:
        super().__init__()
        size, made = config.hidden_size, made | {"bias": config.attention_bias}
        self.head_dim, self.scale = config.head_dim, config.attention_scale
        self.query_key_value = nn.Linear(size, 3 * size, **made)
        self.dense = nn.Linear(size, size, **made)

    def forward(
        self, x: Tensor, rotation: Rotation, mask: Tensor | None, slot: Slot | None
    ) -> Tensor:
        """Return `[B, T, hidden]`; without a mask position t sees positions 0 to t."""
        split = (*x.shape[:2], -1, 3 * self.head_dim)
        q, k, v = self.query_key_value(x).view(split).transpose(1, 2).chunk(3, dim=-1)
        q, k = rotate(q, rotation), rotate(k, rotation)
        if slot is not None:
            k, v = extend(slot, k, v)
        return self.dense(attend(q, k, v, mask, self.scale).transpose(1, 2).reshape(x.shape))


class MLP(nn.Module):
    """Apply a linear map, the activation and a linear map back."""

    def __init__(self, config: GPTNeoXConfig, **made: Any) -> None:
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, config.intermediate_size, **made)
        self.dense_4h_to_h = nn.Linear(config.intermediate_size, config.hidden_size, **made)
        self.act = ACTIVATIONS[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        """Return `dense_4h_to_h(act(dense_h_to_4h(x)))`."""
        return self.dense_4h_to_h(self.act(self.dense_h_to_4h(x)))


class Layer(nn.Module):
    """Add attention and MLP to the residual stream, each after a norm."""

    window = None

    def __init__(self, config: GPTNeoXConfig, layer: int, **made: Any) -> None:
        super().__init__()
        self.rope, self.parallel = config.ropes[layer], config.use_parallel_residual
        norm = partial(nn.LayerNorm, config.hidden_size, config.layer_norm_eps, **made)
        self.input_layernorm, self.post_attention_layernorm = norm(), norm()
        self.attention, self.mlp = Attention(config, **made), MLP(config, **made)

    def forward(
        self, x: Tensor, rotation: Rotation, mask: Tensor | None, slot: Slot | None
    ) -> Tensor:
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
    required={
        "attention.layer_norm_epsilon": "layer_norm_eps",
        "use_parallel_residual": "use_parallel_residual",
        **{key: f for key, f in PART_ROTATED.required.items() if not key.endswith("rms_epsilon")},
    },
    biases={},
    whole={
        "token_embd": "gpt_neox.embed_in",
        "output_norm": "gpt_neox.final_layer_norm",
        "output": "lm_head",
    },
    parts={
        "attn_norm": "input_layernorm",
        "attn_qkv": "attention.query_key_value",
        "attn_output": "attention.dense",
        "ffn_norm": "post_attention_layernorm",
        "ffn_up": "mlp.dense_h_to_4h",
        "ffn_down": "mlp.dense_4h_to_h",
    },
    restored=_regrouped(3, -1),  # llama.cpp has them by part
    stored=_regrouped(-1, 3),
)


class GPTNeoX(Decoder):
    """Compute next-token logits as Hugging Face's `GPTNeoXForCausalLM` does in evaluation mode."""

    embedding_name, blocks_name = "gpt_neox.embed_in", "gpt_neox.layers"
    config_class, norm_name = GPTNeoXConfig, "gpt_neox.final_layer_norm"
    gguf = _GGUF

    def body(self, **made: Any) -> nn.Module:
        """Make the embedding, the layers and the last norm."""
        config, body = self.config, nn.Module()
        body.embed_in = nn.Embedding(config.vocab_size, config.hidden_size, **made)
        body.layers = nn.ModuleList(
            Layer(config, i, **made) for i in range(config.num_hidden_layers)
        )
        body.final_layer_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps, **made)
        return body

    @staticmethod
    def stored_fqn(name: str) -> str | None:
        """Pass over the masks that checkpoints hold, and rename the head."""
        name = "lm_head.weight" if name == "embed_out.weight" else name
        return None if name.endswith(_BUFFERS) else name

    @staticmethod
    def written_fqn(name: str) -> str:
        """Call the head what `stored_fqn` does."""
        return "embed_out.weight" if name == "lm_head.weight" else name
