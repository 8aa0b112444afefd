"""Tiny models of transformers that have no family here, in folders, with a tokenizer of bytes."""

import torch
import transformers
from byte_tokenizer import END, byte_tokenizer

_SHAPE = {"vocab_size": 260, "hidden_size": 32, "num_hidden_layers": 2}
_HEADS = _SHAPE | {"num_attention_heads": 4, "bos_token_id": 257, "eos_token_id": END}
_GATED = _HEADS | {"intermediate_size": 48, "num_key_value_heads": 2}
_T = transformers
KINDS = {
    "falcon": (_T.FalconForCausalLM, _HEADS),
    "bloom": (_T.BloomForCausalLM, _SHAPE | {"num_attention_heads": 4}),
    "opt": (_T.OPTForCausalLM, _HEADS | {
        "ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 64}),
    "cohere": (_T.CohereForCausalLM, _GATED | {"pad_token_id": 0}),
    "mamba": (_T.MambaForCausalLM, _SHAPE | {"state_size": 4, "eos_token_id": END}),
    "mixtral": (_T.MixtralForCausalLM, _GATED | {"num_local_experts": 4}),
    "starcoder2": (_T.Starcoder2ForCausalLM, _GATED | {"sliding_window": 4}),
    "llama": (_T.LlamaForCausalLM, _GATED | {"rope_parameters": {
        "rope_type": "proportional", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}),
}  # fmt: skip


def foreign(kind, dtype=torch.float32):
    """Return a random model whose logits are of order 1."""
    family, shape = KINDS[kind]
    torch.manual_seed(0)
    model = family(family.config_class(**shape)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "A_log" not in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.to(dtype)


def foreign_folder(kind, folder, dtype=torch.float32):
    """Write a folder as transformers does, and return the model."""
    model = foreign(kind, dtype)
    model.save_pretrained(folder)
    byte_tokenizer().save(folder)
    return model
