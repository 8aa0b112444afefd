"""What is planned for: a model's shape from a preset, a folder, a file, the hub or a module."""

import difflib
import functools
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from minilora.files import absent, on_hub, whole
from minilora.loading import NAMES, ForeignConfig, read_config
from minilora.lora import (
    Survey,
    base_of,
    check_rank,
    inject,
    quantize,
    select_targets,
    split_block,
)
from minilora.models import FAMILIES, GPT2Config, ModelConfig
from minilora.planning.batches import pass_rows
from minilora.planning.saved import keep_blocks, samples
from minilora.quantization import Quantization


class Preset(NamedTuple):
    """A model's shape and where its numbers stand."""

    config: ModelConfig
    source: str


def _gpt2(name: str, width: int, layers: int, heads: int) -> Preset:
    config = GPT2Config(n_embd=width, n_layer=layers, n_head=heads)
    return Preset(config, f"huggingface.co/openai-community/{name}, config.json")


_NUMBERS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
)


def _decoder(
    source: str, *numbers: int, tied: bool = False, family: str = "llama", **others: Any
) -> Preset:
    """Take the `_NUMBERS` and what else decides about memory in config.json."""
    entries = dict(zip(_NUMBERS, numbers, strict=True)) | {"tie_word_embeddings": tied}
    config = FAMILIES[family].config_class.from_dict({"model_type": family} | entries | others)
    return Preset(config, f"huggingface.co/{source}, config.json")


PRESETS: dict[str, Preset] = {
    "gpt2": _gpt2("gpt2", 768, 12, 12),
    "gpt2-medium": _gpt2("gpt2-medium", 1024, 24, 16),
    "gpt2-large": _gpt2("gpt2-large", 1280, 36, 20),
    "gpt2-xl": _gpt2("gpt2-xl", 1600, 48, 25),
    "smollm2-135m": _decoder("HuggingFaceTB/SmolLM2-135M",
        49152, 576, 1536, 30, 9, 3, 8192, tied=True),
    "smollm2-360m": _decoder("HuggingFaceTB/SmolLM2-360M",
        49152, 960, 2560, 32, 15, 5, 8192, tied=True),
    "smollm2-1.7b": _decoder("HuggingFaceTB/SmolLM2-1.7B",
        49152, 2048, 8192, 24, 32, 32, 8192, tied=True),
    "tinyllama-1.1b": _decoder("TinyLlama/TinyLlama-1.1B-Chat-v1.0",
        32000, 2048, 5632, 22, 32, 4, 2048),
    "llama-2-7b": _decoder("meta-llama/Llama-2-7b-hf", 32000, 4096, 11008, 32, 32, 32, 4096),
    "llama-2-13b": _decoder("meta-llama/Llama-2-13b-hf", 32000, 5120, 13824, 40, 40, 40, 4096),
    "llama-2-70b": _decoder("meta-llama/Llama-2-70b-hf", 32000, 8192, 28672, 80, 64, 8, 4096),
    "llama-3-8b": _decoder("meta-llama/Meta-Llama-3-8B", 128256, 4096, 14336, 32, 32, 8, 8192),
    "llama-3-70b": _decoder("meta-llama/Meta-Llama-3-70B", 128256, 8192, 28672, 80, 64, 8, 8192),
    "llama-3.1-8b": _decoder("meta-llama/Llama-3.1-8B", 128256, 4096, 14336, 32, 32, 8, 131072),
    "llama-3.1-70b": _decoder("meta-llama/Llama-3.1-70B", 128256, 8192, 28672, 80, 64, 8, 131072),
    "llama-3.2-1b": _decoder("meta-llama/Llama-3.2-1B",
        128256, 2048, 8192, 16, 32, 8, 131072, tied=True),
    "llama-3.2-3b": _decoder("meta-llama/Llama-3.2-3B",
        128256, 3072, 8192, 28, 24, 8, 131072, tied=True),
    "mistral-7b-v0.1": _decoder("mistralai/Mistral-7B-v0.1",
        32000, 4096, 14336, 32, 32, 8, 32768, family="mistral", sliding_window=4096),
    "mistral-7b-v0.3": _decoder("mistralai/Mistral-7B-v0.3",
        32768, 4096, 14336, 32, 32, 8, 32768, family="mistral", sliding_window=None),
    "mistral-nemo-12b": _decoder(
        "mistralai/Mistral-Nemo-Base-2407", 131072, 5120, 14336, 40, 32, 8, 131072,
        family="mistral", sliding_window=None, head_dim=128,
    ),
    "mistral-small-24b": _decoder("mistralai/Mistral-Small-24B-Base-2501",
        131072, 5120, 32768, 40, 32, 8, 32768, family="mistral", sliding_window=None, head_dim=128),
    "qwen2.5-0.5b": _decoder("Qwen/Qwen2.5-0.5B",
        151936, 896, 4864, 24, 14, 2, 32768, tied=True, family="qwen2"),
    "qwen2.5-1.5b": _decoder("Qwen/Qwen2.5-1.5B",
        151936, 1536, 8960, 28, 12, 2, 32768, tied=True, family="qwen2"),
    "qwen2.5-7b": _decoder("Qwen/Qwen2.5-7B",
        152064, 3584, 18944, 28, 28, 4, 131072, family="qwen2"),
    "qwen3-0.6b": _decoder("Qwen/Qwen3-0.6B",
        151936, 1024, 3072, 28, 16, 8, 40960, tied=True, family="qwen3"),
    "qwen3-1.7b": _decoder("Qwen/Qwen3-1.7B",
        151936, 2048, 6144, 28, 16, 8, 40960, tied=True, family="qwen3"),
    "qwen3-4b": _decoder("Qwen/Qwen3-4B",
        151936, 2560, 9728, 36, 32, 8, 40960, tied=True, family="qwen3"),
    "qwen3-8b": _decoder("Qwen/Qwen3-8B", 151936, 4096, 12288, 36, 32, 8, 40960, family="qwen3"),
    "qwen3-14b": _decoder("Qwen/Qwen3-14B", 151936, 5120, 17408, 40, 40, 8, 40960, family="qwen3"),
    "qwen3-32b": _decoder("Qwen/Qwen3-32B", 151936, 5120, 25600, 64, 64, 8, 40960, family="qwen3"),
    "smollm3-3b": _decoder("HuggingFaceTB/SmolLM3-3B",
        128256, 2048, 11008, 36, 16, 4, 65536, tied=True, family="smollm3"),
    "phi-3-mini": _decoder("microsoft/Phi-3-mini-4k-instruct",
        32064, 3072, 8192, 32, 32, 32, 4096, family="phi3", sliding_window=2047),
    "phi-4-mini": _decoder(
        "microsoft/Phi-4-mini-instruct", 200064, 3072, 8192, 32, 24, 8, 131072,
        tied=True, family="phi3", sliding_window=262144, partial_rotary_factor=0.75,
    ),
    "gemma-2-2b": _decoder("google/gemma-2-2b",
        256000, 2304, 9216, 26, 8, 4, 8192, tied=True, family="gemma2"),
    "gemma-3-1b": _decoder("google/gemma-3-1b-pt",
        262144, 1152, 6912, 26, 4, 1, 32768, tied=True, family="gemma3_text", sliding_window=512),
    "phi-4": _decoder("microsoft/phi-4", 100352, 5120, 17920, 40, 40, 10, 16384, family="phi3"),
}  # fmt: skip


def nearest(name: str, known: Any) -> str:
    """Name the known ones that look most like a name, or all."""
    found = difflib.get_close_matches(name.lower(), list(known), n=3, cutoff=0.4)
    return f"nearest: {', '.join(found)}" if found else f"there are: {', '.join(known)}"


@dataclass(frozen=True)
class Shape:
    """A model's numbers."""

    name: str  # as the user called it; what `minilora train` takes where that can be known
    config: Any  # the `ModelConfig` of its family, or a `ForeignConfig`
    source: str  # where the numbers come from
    stored: bool = False  # whether `name` is a place with weights, so that a command can name it
    foreign: str = ""  # why such a model is read through transformers, "" where it is built here

    def empty(self, dtype: torch.dtype = torch.float32) -> Any:
        """Return the model on the meta device: shapes without memory."""
        if isinstance(self.config, ForeignConfig):
            return self.config.empty(dtype)
        return FAMILIES[self.config.model_type](self.config, dtype=dtype, device="meta")

    def kinds(self, model: Any, blocks: int) -> list[tuple[Any, ...]]:
        """Return what tells blocks of the same layers apart: how each attends."""
        if not isinstance(self.config, ForeignConfig):
            return [(block.window, block.rope) for block in model.blocks]
        types = getattr(self.config.own, "layer_types", None) or ()
        return [(each,) for each in types] if len(types) == blocks else [()] * blocks

    def check_length(self, length: int) -> None:
        """Raise unless rows of this length fit the context."""
        if length > self.config.max_position_embeddings:
            raise ValueError(
                f"length must fit the context of {self.name}, "
                f"{self.config.max_position_embeddings} tokens, found {length}"
            )

    @functools.cached_property
    def parameters(self) -> int:
        """Number of parameters, a tied head counted once."""
        return sum(p.numel() for p in self.empty().parameters())


def read_shape(model: Any) -> Shape:
    """Find a model's shape; `plan` says what a model may be."""
    if isinstance(model, Shape):
        return model
    if isinstance(model, ModelConfig):
        return Shape("a configuration", model, "as given")
    if isinstance(model, nn.Module):
        return _of_module(model)
    if not isinstance(model, (str, Path)):
        raise TypeError(
            f"plan() needs a model's name, path, config or module, found {type(model).__name__}"
        )
    name, path = str(model), Path(model)
    if path.exists():
        alone = path.suffix == ".json"  # no weights beside it that a command could name
        source = f"{name}/config.json" if path.is_dir() else name
        config = read_config(path)
        foreign = _foreign(config)
        return Shape(str(path.parent) if alone else name, config, source, not alone, foreign)
    if name.lower() in PRESETS:
        name = name.lower()
        return Shape(name, *PRESETS[name], stored=name in NAMES)
    if on_hub(name) is not None:
        config = _hub_config(name)
        return Shape(name, config, f"huggingface.co/{name}, config.json", True, _foreign(config))
    found = absent(name) if "/" in name else f"found {name!r}; {nearest(name, PRESETS)}"
    raise ValueError(
        f"a model to plan for is a preset, a folder, a config.json, a .gguf file or a hub name, "
        f"{found}"
    )


def _of_module(model: Any) -> Shape:
    config = getattr(model, "config", None)
    if hasattr(config, "to_json_string"):
        config = ForeignConfig(config, type(model))
    elif not isinstance(config, ModelConfig):
        raise ValueError(
            f"plan() knows what models of minilora.models and of transformers keep in memory, "
            f"found {type(model).__name__}; pass the name of a preset of its size instead"
        )
    name = getattr(model, "name_or_path", None)
    return Shape(name or type(model).__name__, config, "the module", stored=name is not None)


def _foreign(config: Any) -> str:
    """Say whose a model is that is not built here, or ""."""
    return f"{config.own.model_type} is not built" if isinstance(config, ForeignConfig) else ""


def _hub_config(name: str) -> Any:
    try:
        return read_config(name)
    except RuntimeError as error:
        presets = nearest(name.rpartition("/")[2], PRESETS)
        raise RuntimeError(f"{error}; or plan for a preset, {presets}") from error


COUNT = whole(1, 10**6)  # no run comes near it


@dataclass(frozen=True)
class Settings:
    """What decides memory and time beside the model; checked."""

    format: str | None = None  # of the base's linears: None, "int8", "nf4" or "int4"
    dtype: torch.dtype = torch.bfloat16  # of everything else, and of what is computed
    r: int = 8
    targets: object = "all-linear"  # as for `inject`
    exclude: object = ()  # as for `inject`
    batch_size: int = 8  # rows of a micro-batch, over all ranks
    accumulate: int = 1  # micro-batches of a step
    length: int = 512  # tokens of a row
    checkpointing: bool = False  # recompute blocks in the backward pass
    dropout: float = 0.0  # of the adapters
    ranks: int = 1  # processes
    parallel: str | None = None  # None, "ddp" or "fsdp"
    block_size: int = 64  # of nf4 and int4
    double_quant: bool = True  # of nf4
    autocast: bool = False  # whether an f32 base computes in `dtype` under autocast
    adapter_dtype: torch.dtype = torch.float32  # of the factors and their gradients
    moment_bytes: int | None = None  # of an element of AdamW's moments; None: 4 (8-bit Adam: 1)
    learned: float = 1.0  # share of the predicted tokens that enters the loss, in (0, 1]
    compile: bool = False  # run blocks through torch.compile
    pass_tokens: int | None = None  # tokens that one pass computes at most; None: any number
    shared: int = 0  # first tokens of a row that are computed once for all rows of a pass

    def __post_init__(self) -> None:
        for key in ("batch_size", "accumulate", "length", "ranks"):
            COUNT(getattr(self, key), key)
        if self.pass_tokens is not None:
            whole()(self.pass_tokens, "pass_tokens")
        if not 0 <= self.shared < self.length:
            raise ValueError(
                f"shared must lie in [0, {self.length}), as rows have {self.length} tokens, found "
                f"{self.shared}"
            )
        if self.parallel not in (None, "ddp", "fsdp"):
            raise ValueError(f"parallel must be None, 'ddp' or 'fsdp', found {self.parallel!r}")
        if (self.parallel is None) != (self.ranks == 1):
            raise ValueError(
                f"several ranks need parallel='ddp' or 'fsdp', and one rank needs none, found "
                f"ranks={self.ranks} and parallel={self.parallel!r}"
            )
        if self.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(
                f"dtype must be float32, bfloat16 or float16, found {self.dtype!r}; leave it out "
                f"for what is fastest"
            )

    @property
    def rank_rows(self) -> int:
        """Rows of a micro-batch, on the rank that has most."""
        return math.ceil(self.batch_size / self.ranks)

    @property
    def rows(self) -> int:
        """Rows of a pass of those."""
        return pass_rows(self.rank_rows, self.length, self.pass_tokens, self.shared)

    @property
    def tokens(self) -> int:
        """Tokens of a pass, padding included."""
        return self.rows * self.length - (self.rows - 1) * self.shared

    @property
    def passes(self) -> int:
        """How many passes a micro-batch takes."""
        return math.ceil(self.rank_rows / self.rows)

    @property
    def fullest(self) -> "Settings":
        """The settings with the length, up to this one, at which a pass has the most tokens."""

        def tokens(length: int) -> tuple[int, int]:
            one = replace(self, length=length, shared=min(self.shared, length - 1))
            return one.tokens, length

        whole = self.pass_tokens is None or self.rank_rows * self.length <= self.pass_tokens
        length = self.length if whole else max(range(1, self.length + 1), key=tokens)
        return replace(self, length=length, shared=min(self.shared, length - 1))

    @property
    def learned_tokens(self) -> int:
        """Tokens of a pass that enter the loss."""
        return math.ceil(self.rows * (self.length - 1) * self.learned)

    @property
    def spec(self) -> Quantization | None:
        """How the base's linears are stored, None as they are."""
        return None if self.format is None else Quantization.of_stored(vars(self))

    @property
    def base_dtype(self) -> torch.dtype:
        """What the base has where it is not quantized."""
        return torch.float32 if self.autocast else self.dtype


def planned_model(shape: Shape, settings: Settings, most: int | None = 2) -> tuple[Any, list[int]]:
    """Make what the settings make of a shape, on the meta device: quantized, and with adapters.

    It has `most` blocks of every sort (None: all). Also return how many each of them stands for.
    """
    model = shape.empty(settings.base_dtype)
    survey, r = Survey(model), check_rank(settings.r)
    chosen = select_targets(model, settings.targets, settings.exclude)
    for name in chosen:
        size = list(base_of(survey.modules[name]).shape)
        if r > min(size):
            raise ValueError(
                f"r={r} is above what {name} can use: its shape is {size}, so no change of it "
                f"has a rank above {min(size)}; lower r, or exclude the layer"
            )
    sorts: dict[str, list[str]] = {name: [] for name in survey.blocks}
    kinds = shape.kinds(model, len(sorts))
    inside = {}  # the block that a target is in
    for name in chosen:
        stack, number, rest = split_block(name)
        inside[name] = f"{stack}.{number}"
        sorts.get(inside[name], []).append(rest)
    alike = [(*kind, *names) for kind, names in zip(kinds, sorts.values(), strict=True)]
    few = samples(alike, most or len(sorts))
    kept = [name for i, name in enumerate(sorts) if i in few]
    keep_blocks(survey, kept)
    chosen = [name for name in chosen if inside[name] not in sorts or inside[name] in kept]
    if settings.spec is not None:
        quantize(model, settings.spec)
    inject(model, settings.r, targets=chosen, dropout=settings.dropout,
           dtype=settings.adapter_dtype)  # fmt: skip
    return model, list(few.values())
