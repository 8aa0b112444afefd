"""Shapes of well-known models by name, each from the numbers of its published `config.json`."""

import difflib
from typing import Any, NamedTuple

from minilora.models import GPT2Config, LlamaConfig


class Preset(NamedTuple):
    """A model's shape and where its numbers stand."""

    config: GPT2Config | LlamaConfig
    source: str
    foreign: str = ""  # why `minilora train` does not read it, "" where it does


def _gpt2(name: str, width: int, layers: int, heads: int) -> Preset:
    config = GPT2Config(n_embd=width, n_layer=layers, n_head=heads)
    return Preset(config, f"huggingface.co/openai-community/{name}, config.json")


def _llama(
    source: str, *numbers: int, tied: bool = False, biases: bool = False, foreign: str = ""
) -> Preset:
    """Take vocabulary, width, inner width, layers, heads, key-value heads, context."""
    vocabulary, width, inner, layers, heads, kv_heads, context = numbers
    config = LlamaConfig(
        vocabulary, width, inner, layers, heads, kv_heads, width // heads, context,
        tie_word_embeddings=tied, attention_bias=biases,
    )  # fmt: skip
    return Preset(config, f"huggingface.co/{source}, config.json", foreign)


_SCALED = "its rotary embeddings are scaled"
_BIASES = "q, k and v have biases (planned with one more on o)"
_FUSED = "q, k, v and gate, up are one matrix each (planned as five)"


PRESETS: dict[str, Preset] = {
    "gpt2": _gpt2("gpt2", 768, 12, 12),
    "gpt2-medium": _gpt2("gpt2-medium", 1024, 24, 16),
    "gpt2-large": _gpt2("gpt2-large", 1280, 36, 20),
    "gpt2-xl": _gpt2("gpt2-xl", 1600, 48, 25),
    "smollm2-135m": _llama(
        "HuggingFaceTB/SmolLM2-135M", 49152, 576, 1536, 30, 9, 3, 8192, tied=True
    ),
    "smollm2-360m": _llama(
        "HuggingFaceTB/SmolLM2-360M", 49152, 960, 2560, 32, 15, 5, 8192, tied=True
    ),
    "smollm2-1.7b": _llama(
        "HuggingFaceTB/SmolLM2-1.7B", 49152, 2048, 8192, 24, 32, 32, 8192, tied=True
    ),
    "tinyllama-1.1b": _llama(
        "TinyLlama/TinyLlama-1.1B-Chat-v1.0", 32000, 2048, 5632, 22, 32, 4, 2048
    ),
    "llama-2-7b": _llama("meta-llama/Llama-2-7b-hf", 32000, 4096, 11008, 32, 32, 32, 4096),
    "llama-2-13b": _llama("meta-llama/Llama-2-13b-hf", 32000, 5120, 13824, 40, 40, 40, 4096),
    "llama-2-70b": _llama("meta-llama/Llama-2-70b-hf", 32000, 8192, 28672, 80, 64, 8, 4096),
    "llama-3-8b": _llama("meta-llama/Meta-Llama-3-8B", 128256, 4096, 14336, 32, 32, 8, 8192),
    "llama-3-70b": _llama("meta-llama/Meta-Llama-3-70B", 128256, 8192, 28672, 80, 64, 8, 8192),
    "llama-3.1-8b": _llama(
        "meta-llama/Llama-3.1-8B", 128256, 4096, 14336, 32, 32, 8, 131072, foreign=_SCALED
    ),
    "llama-3.2-1b": _llama(
        "meta-llama/Llama-3.2-1B", 128256, 2048, 8192, 16, 32, 8, 131072, tied=True, foreign=_SCALED
    ),
    "llama-3.2-3b": _llama(
        "meta-llama/Llama-3.2-3B", 128256, 3072, 8192, 28, 24, 8, 131072, tied=True, foreign=_SCALED
    ),
    "mistral-7b-v0.3": _llama(
        "mistralai/Mistral-7B-v0.3", 32768, 4096, 14336, 32, 32, 8, 32768,
        foreign="its config.json names another family",
    ),
    "qwen2.5-0.5b": _llama(
        "Qwen/Qwen2.5-0.5B", 151936, 896, 4864, 24, 14, 2, 32768,
        tied=True, biases=True, foreign=_BIASES,
    ),
    "qwen2.5-1.5b": _llama(
        "Qwen/Qwen2.5-1.5B", 151936, 1536, 8960, 28, 12, 2, 32768,
        tied=True, biases=True, foreign=_BIASES,
    ),
    "qwen2.5-7b": _llama(
        "Qwen/Qwen2.5-7B", 152064, 3584, 18944, 28, 28, 4, 131072, biases=True, foreign=_BIASES
    ),
    "phi-3-mini": _llama(
        "microsoft/Phi-3-mini-4k-instruct", 32064, 3072, 8192, 32, 32, 32, 4096, foreign=_FUSED
    ),
    "phi-4": _llama("microsoft/phi-4", 100352, 5120, 17920, 40, 40, 10, 16384, foreign=_FUSED),
}  # fmt: skip
# Families whose blocks keep something that a Llama's does not.
_OTHERS = {
    "qwen3": "its blocks norm queries and keys",
    "gemma": "its blocks have two or four norms more and another activation",
}


def nearest(name: str, known: Any) -> str:
    """Name the known ones that look most like a name, or all; say why a family is not there."""
    for family, why in _OTHERS.items():
        if known is PRESETS and family in name.lower():
            return f"{family} is not planned, as {why}"
    found = difflib.get_close_matches(name.lower(), list(known), n=3, cutoff=0.4)
    return f"nearest: {', '.join(found)}" if found else f"there are: {', '.join(known)}"
