"""GPT-2: the numbers of Hugging Face's `GPT2LMHeadModel`.

    h = E[ids] + P[positions]
    per block:  h += proj(attention(norm(h)));  h += proj(act(fc(norm(h))))
    logits = head(norm(h))

Positions are learned, and linear maps are stored as `[in, out]` (Radford et al. 2019, "Language
Models are Unsupervised Multitask Learners", section 2.3).
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from torch import Tensor, nn

from minilora.models.blocks import Mask, Slot
from minilora.models.causal import CausalLM
from minilora.models.config import ModelConfig
from minilora.models.gguf_names import LAYER_NORMED, Entries, GGUFNames, joint_parts, whole_names
from minilora.models.gpt_blocks import STD, JointAttention, PlainMLP, check_activation, turned
from minilora.models.rotary import Rotation


@dataclass(frozen=True)
class GPT2Config(ModelConfig):
    """Hold the numbers that define a GPT-2 model; names and defaults are Hugging Face's.

    Transformers' common names (`hidden_size`, `num_hidden_layers`, …) can be read too.

    Args:
        vocab_size: rows of the embedding and of the output head.
        n_positions: longest sequence, in tokens: rows of the position embedding.
        n_embd, n_inner: width of the residual stream, and inside the MLP; None is 4 · n_embd.
        n_layer, n_head: blocks, and attention heads, whose number divides `n_embd`.
        activation_function: of the MLP, a key of `ACTIVATIONS`.
        layer_norm_epsilon: added to the variance in the layer norms.
        scale_attn_weights: whether attention scores are divided by sqrt(head_dim).
        scale_attn_by_inverse_layer_idx: whether those of block i (from 0) are divided by i + 1.
        tie_word_embeddings: whether the head is the embedding matrix.
        resid_pdrop, embd_pdrop, attn_pdrop: kept to be written back: `GPT2` applies no dropout.
        bos_token_id, eos_token_id, pad_token_id: beginning, end (or several) and padding, or None.
    """

    model_type, architecture = "gpt2", "GPT2LMHeadModel"
    neutral: ClassVar = {"reorder_and_upcast_attn": (None, False), "pruned_heads": (None, {})}
    aliases: ClassVar = {
        "hidden_size": "n_embd", "max_position_embeddings": "n_positions",
        "num_attention_heads": "n_head", "num_hidden_layers": "n_layer",
    }  # fmt: skip

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None
    activation_function: str = "gelu_new"
    layer_norm_epsilon: float = 1e-5
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    tie_word_embeddings: bool = True
    resid_pdrop: float = 0.1
    embd_pdrop: float = 0.1
    attn_pdrop: float = 0.1
    bos_token_id: int | None = 50256
    eos_token_id: int | list[int] | None = 50256
    pad_token_id: int | None = None

    hidden_size = property(lambda self: self.n_embd)
    max_position_embeddings = property(lambda self: self.n_positions)
    num_attention_heads = num_key_value_heads = property(lambda self: self.n_head)
    num_hidden_layers = property(lambda self: self.n_layer)
    intermediate_size = property(lambda self: self.n_inner or 4 * self.n_embd)
    head_dim = property(lambda self: self.n_embd // self.n_head)
    norm_eps = property(lambda self: self.layer_norm_epsilon)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_activation(self.activation_function)
        if self.n_embd % self.n_head:
            found = f"{self.n_head} and {self.n_embd}"
            raise ValueError(f"n_head must divide n_embd, found {found}; correct config.json")


class Block(nn.Module):
    """Add attention and then the MLP to the residual stream, each after a norm."""

    window = rope = None
    norm_class = nn.LayerNorm

    def __init__(self, config: GPT2Config, layer: int, **made: Any) -> None:
        super().__init__()
        size, inner, head = config.n_embd, config.intermediate_size, config.head_dim
        scale = head**-0.5 if config.scale_attn_weights else 1.0
        scale /= layer + 1 if config.scale_attn_by_inverse_layer_idx else 1
        norm = partial(nn.LayerNorm, size, config.norm_eps, **made)
        made, act = made | {"linear": turned}, config.activation_function
        attn, mlp = ("c_attn", "c_proj"), ("c_fc", "c_proj")
        self.ln_1, self.attn = norm(), JointAttention(attn, size, head, scale, **made)
        self.ln_2, self.mlp = norm(), PlainMLP(mlp, size, inner, act, **made)

    def forward(self, x: Tensor, rotation: Rotation, mask: Mask, slot: Slot | None) -> Tensor:
        """Return `[B, T, n_embd]`."""
        x = x + self.attn(self.ln_1(x), rotation, mask, slot)
        return x + self.mlp(self.ln_2(x))


def _of_gguf(entries: Entries) -> Entries:
    """An MLP of the usual width is not stated."""
    width = entries["intermediate_size"]
    return entries | {"n_inner": None if width == 4 * entries["hidden_size"] else width}


class GPT2(CausalLM):
    """Compute next-token logits as Hugging Face's `GPT2LMHeadModel` does in evaluation mode.

    Dropout of the model is never applied, in training mode either: what LoRA trains is regularised
    by the adapters' own. Fresh matrices are normal with standard deviation 0.02, the maps back to
    the residual stream (`c_proj`) with 0.02 / sqrt(2 · n_layer) (section 2.3).
    """

    config_class, layer_class = GPT2Config, Block
    embedding_name, positions_name = "transformer.wte", "transformer.wpe"
    blocks_name, norm_name = "transformer.h", "transformer.ln_f"
    passed_over = (".attn.bias", ".attn.masked_bias")  # the causal mask and its fill value
    end_of_text = "<|endoftext|>"  # OpenAI's own folder names no special token
    gguf = GGUFNames(
        architecture="gpt2",
        required=LAYER_NORMED | {"attention.layer_norm_epsilon": "layer_norm_epsilon"},
        optional={"vocab_size": "vocab_size"},
        equal={"attention.head_count_kv": "num_key_value_heads"},
        neutral={"attention.causal": (True,)},
        biases={},
        whole=whole_names("transformer.wte", "transformer.ln_f")
        | {"position_embd": "transformer.wpe"},
        parts=joint_parts("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"),
        completed=_of_gguf,
        turned=("attn_qkv", "attn_output", "ffn_up", "ffn_down"),
    )

    def _deviation(self, name: str) -> float:
        return STD / (2 * self.config.n_layer) ** 0.5 if name.endswith(".c_proj.weight") else STD

    @classmethod
    def stored_fqn(cls, name: str) -> str | None:
        """Put `transformer.` before the names of OpenAI's own weights."""
        bare = name.startswith(("wte.", "wpe.", "h.", "ln_f."))
        return super().stored_fqn(f"transformer.{name}" if bare else name)
