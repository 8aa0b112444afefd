"""What `train_step.py` times: a name, and how to build the model whose steps it stands for.

Models: SmolLM2-135M with its weights, GPT-2-124M and TinyLlama-1.1B's shape with random ones. The
peers' models get the very weights of ours.
"""

import sysconfig
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import minilora
from minilora.kernels import hand_back_freed_memory, keep_freed_memory
from minilora.loading.fetching import fetch
from minilora.loading.model import load_model
from minilora.lora.widening import widened
from minilora.planning.shapes import read_shape
from minilora.running.compiling import compiled

LR = 1e-3
MODELS = ("smollm2-135m", "gpt2", "tinyllama-1.1b")
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Provider:
    """One row: whose code, what the base is stored in, what is computed in.

    Attributes:
        code: `"minilora"` or `"peft"`.
        compute: `"f32"` or `"bf16"`.
        format: None, `"int8"`, `"nf4"` or `"int4"` (peft: bitsandbytes' NF4).
        compiled: blocks and loss through torch.compile (peft: the whole model).
        checkpointing: blocks run again in the backward pass.
        adapters: False for the frozen base alone: forward, and the gradient of its input.
        r: rank; alpha is twice as much.
        targets: `"all"` linears but the head, or those of `"attention"`.
    """

    code: str
    compute: str
    format: str | None = None
    compiled: bool = False
    checkpointing: bool = False
    adapters: bool = True
    r: int = 8
    targets: str = "all"

    @property
    def name(self) -> str:
        parts = [self.code, self.format or "", self.compute]
        parts += ["compiled"] if self.compiled else []
        parts += ["checkpointing"] if self.checkpointing else []
        parts += [] if self.adapters else ["frozen base alone"]
        return " ".join(part for part in parts if part)


def providers() -> dict[str, Provider]:
    """Every row, by name, the peers first."""
    found = [Provider("peft", c, compiled=k) for c in DTYPES for k in (False, True)]
    found += [Provider("peft", c, "nf4") for c in DTYPES]
    found += [Provider(code, c, adapters=False) for code in ("peft", "minilora") for c in DTYPES]
    found += [Provider("minilora", c, compiled=True, adapters=False) for c in DTYPES]
    bases = [(c, f) for f in (None, "int8", "nf4", "int4") for c in DTYPES]
    for checkpointing in (False, True):
        for k in (False, True):
            found += [Provider("minilora", c, f, k, checkpointing) for c, f in bases]
    return {provider.name: provider for provider in found}


def text_rows(model: str, rows: int, tokens: int, batches: int) -> list[Tensor]:
    """Return batches `[rows, tokens]` of ids: this Python's own source code, or random ids."""
    generator = torch.Generator().manual_seed(0)
    if model != "smollm2-135m":
        size = read_shape(model).config.vocab_size
        drawn = torch.randint(0, size, (batches, rows, tokens), generator=generator)
        return list(drawn)
    _, tokenizer = load_model(fetch(model))
    library = Path(sysconfig.get_path("stdlib"))
    ids: list[int] = []
    for name in ("argparse", "typing", "ast", "inspect", "pathlib", "subprocess", "turtle"):
        ids += tokenizer.encode((library / f"{name}.py").read_text(encoding="utf-8"))
    need = rows * tokens * batches
    return list(torch.tensor((ids * (need // len(ids) + 1))[:need]).view(batches, rows, tokens))


def plain_model(model: str, dtype: torch.dtype) -> Any:
    """Return ours, without adapters."""
    if model == "smollm2-135m":
        return load_model(fetch(model), dtype=dtype)[0]
    made = read_shape(model).empty(dtype)
    generator, drawn = torch.Generator().manual_seed(0), {}
    for module in made.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in drawn:
                value = torch.empty(parameter.shape, dtype=torch.float32)
                if value.dim() == 1:
                    value.fill_(0.0 if name == "bias" else 1.0)
                else:
                    value.normal_(0, 0.02, generator=generator)
                drawn[id(parameter)] = nn.Parameter(value.to(dtype), requires_grad=False)
            module._parameters[name] = drawn[id(parameter)]
    return made


def targets_of(model: Any, provider: Provider) -> list[str]:
    """Return the last names of the adapted layers."""
    if hasattr(model, "transformer"):
        return ["c_attn"] if provider.targets == "attention" else ["c_attn", "c_proj", "c_fc"]
    attention = ["q_proj", "k_proj", "v_proj", "o_proj"]
    return attention + (
        [] if provider.targets == "attention" else ["gate_proj", "up_proj", "down_proj"]
    )


def peft_model(ours: Any, provider: Provider) -> Any:
    """Return the same weights in transformers' model, with PEFT's adapters."""
    import peft
    import transformers

    entries = {k: v for k, v in asdict(ours.config).items() if v is not None}
    kind = "GPT2" if hasattr(ours, "transformer") else "Llama"
    config = getattr(transformers, f"{kind}Config")(**entries)
    config._attn_implementation = "sdpa"
    model = getattr(transformers, f"{kind}LMHeadModel" if kind == "GPT2" else "LlamaForCausalLM")(
        config
    )
    model = model.to(DTYPES[provider.compute])
    model.load_state_dict(ours.state_dict(), strict=False)
    if provider.format is not None:
        _into_bitsandbytes(model, DTYPES[provider.compute])
    if not provider.adapters:
        model.requires_grad_(False)
        model.enable_input_require_grads()
        return model
    settings = peft.LoraConfig(
        r=provider.r,
        lora_alpha=2 * provider.r,
        target_modules=targets_of(ours, provider),
        task_type="CAUSAL_LM",
    )
    return peft.get_peft_model(model, settings)


def _into_bitsandbytes(model: Any, dtype: torch.dtype) -> None:
    """Replace the linears but the head by bitsandbytes' NF4 ones, as `load_in_4bit` does."""
    import bitsandbytes

    for name, module in list(model.named_modules()):
        if type(module) is not nn.Linear or module is model.lm_head:
            continue
        small = bitsandbytes.nn.Linear4bit(
            module.in_features, module.out_features, bias=module.bias is not None,
            quant_type="nf4", compute_dtype=dtype,
        )  # fmt: skip
        small.weight = bitsandbytes.nn.Params4bit(
            module.weight.detach(), requires_grad=False, quant_type="nf4", compress_statistics=True
        )
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, small.to("cpu"))
    model.is_loaded_in_4bit = True


def build(model: str, provider: Provider, stack: ExitStack) -> tuple[Any, Callable[..., Tensor]]:
    """Return a model ready to train and a function of (ids) that returns its loss.

    The stack holds what has to end with the measurement: a compiled model is put back.
    """
    dtype = DTYPES[provider.compute]
    base = plain_model(model, dtype)
    torch.manual_seed(0)
    if provider.code == "peft":
        theirs = peft_model(base, provider).train()
        del base
        hand_back_freed_memory()  # of building: full weights, a second model
        loss_of: Any = torch.compile(theirs) if provider.compiled else theirs
        return theirs, lambda ids: loss_of(input_ids=ids, labels=ids).loss
    if provider.format is not None:
        minilora.quantize(base, provider.format)
    hand_back_freed_memory()
    keep_freed_memory()  # as `minilora.fit` does
    if provider.adapters:
        targets = targets_of(base, provider)
        minilora.inject(base, r=provider.r, alpha=2 * provider.r, targets=targets)
    else:
        base.requires_grad_(False)
        body = base.transformer.wte if hasattr(base, "transformer") else base.model.embed_tokens
        body.register_forward_hook(lambda _, __, out: out.requires_grad_())
    base.train()
    base.gradient_checkpointing = provider.checkpointing
    stack.enter_context(widened(base))  # likewise
    stack.enter_context(compiled(base, provider.compiled))
    return base, lambda ids: base.loss(ids, ids)
