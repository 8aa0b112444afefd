"""What llama.cpp calls the numbers and tensors of a family, in its GGUF files.

`DECODER_NAMES` is every decoder's; a family changes its own copy by `_replace`, in its own file.

The names: https://github.com/ggml-org/llama.cpp/blob/master/gguf-py/gguf/constants.py.
"""

from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

from torch import Tensor

Entries = dict[str, Any]


def _as_stored(fqn: str, tensor: Tensor, config: Any) -> Tensor:
    return tensor


def _as_stated(entries: Entries) -> Entries:
    return entries


class GGUFNames(NamedTuple):
    """A family's names in GGUF files.

    Attributes:
        architecture: `general.architecture`, and what its metadata keys begin with.
        required: metadata keys that must be there, and the fields of the configuration they give.
        optional: keys that may be there, and their fields.
        equal: keys that must agree with a field, as anything else is not built.
        neutral: keys that must have one of these values. Any other key of the architecture may
            change the maths and is refused by name.
        biases: tensors whose presence sets a field to True.
        whole: tensors of the whole model, and the modules they belong to.
        parts: tensors of the block `blk.N`, and the modules of `blocks_name` they belong to.
        restored: undoes what llama.cpp's converter does to a tensor, by its name in the model.
        stored: does it; takes the B of an adapter for its layer's weight, too.
        completed: adds to the entries of a `config.json` what llama.cpp knows without a key.
        turned: parts whose matrices the model stores as `[in, out]`.
        ropes: the `rope_type`s that llama.cpp has for the architecture.
        own_head: whether llama.cpp asks for a head's tensor where that is the embedding's, too.
        windowless: whether llama.cpp ignores the key of the window.
    """

    architecture: str
    required: dict[str, str]
    optional: dict[str, str]
    equal: dict[str, str]
    neutral: dict[str, tuple[Any, ...]]
    biases: dict[str, str]
    whole: dict[str, str]
    parts: dict[str, str]
    restored: Callable[[str, Tensor, Any], Tensor] = _as_stored
    stored: Callable[[str, Tensor, Any], Tensor] = _as_stored
    completed: Callable[[Entries], Entries] = _as_stated
    turned: tuple[str, ...] = ()
    ropes: tuple[str, ...] = ()
    own_head: bool = False
    windowless: bool = False

    def turns(self, name: str) -> bool:
        """Whether a tensor of the file is the transpose of the model's."""
        part = name.removesuffix(".weight").rpartition(".")[2]
        return name.endswith(".weight") and part in self.turned


DECODER_NAMES = GGUFNames(
    architecture="",
    required={
        "embedding_length": "hidden_size",
        "feed_forward_length": "intermediate_size",
        "block_count": "num_hidden_layers",
        "attention.head_count": "num_attention_heads",
        "context_length": "max_position_embeddings",
        "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    },
    optional={
        "vocab_size": "vocab_size",
        "attention.head_count_kv": "num_key_value_heads",
        "attention.key_length": "head_dim",
        "rope.freq_base": "rope_theta",
    },
    equal={"rope.dimension_count": "head_dim", "attention.value_length": "head_dim"},
    neutral={
        "expert_count": (0,),
        "expert_used_count": (0,),
        "rope.scaling.finetuned": (False, True),
        "attention.causal": (True,),
    },
    biases={"blk.0.attn_q.bias": "attention_bias", "blk.0.ffn_gate.bias": "mlp_bias"},
    whole={"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"},
    parts={
        "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    },
    ropes=("linear", "yarn"),
)


# Of architectures with layer norms, whose epsilon has another key.
LAYER_NORMED = {
    key: field for key, field in DECODER_NAMES.required.items() if not key.endswith("rms_epsilon")
}


def whole_names(embedding: str, norm: str) -> dict[str, str]:
    """Return the `whole` of a model with these modules and a head."""
    return {"token_embd": embedding, "output_norm": norm, "output": "lm_head"}


def joint_parts(*modules: str) -> dict[str, str]:
    """Return the `parts` of a block with one projection for q, k and v: two norms, four maps."""
    names = ("attn_norm", "attn_qkv", "attn_output", "ffn_norm", "ffn_up", "ffn_down")
    return dict(zip(names, modules, strict=True))


def rotated_share(entries: Entries) -> Entries:
    """Add the share of a head that is rotated: all of it, if the file doesn't say how many.

    It and theta get the names of both families, Phi-3's and GPT-NeoX's.
    """
    with suppress(TypeError, ZeroDivisionError):  # of a number that from_dict refuses by name
        width = entries["head_dim"] or entries["hidden_size"] // entries["num_attention_heads"]
        share = entries.get("rotary_dim", width) / width
        entries = entries | {"rotary_emb_base": entries["rope_theta"], "rotary_pct": share}
        return entries | {"partial_rotary_factor": share}
    return entries


PART_ROTATED = DECODER_NAMES._replace(
    optional=DECODER_NAMES.optional | {"rope.dimension_count": "rotary_dim"},
    equal=DECODER_NAMES.equal | {"rope.dimension_count": "rotary_dim"},
    completed=rotated_share,
)
