"""What a run minimises, and measures on held-out data.

This file chooses; what changes the loss itself is an argument of `token_loss` (`running/loss.py`)
and of `CausalLM.loss` (`models/causal.py`, `kernels/cross_entropy.py`), which keeps no logits.
"""

from typing import Any

import torch
from torch import nn

from minilora.lora import inference, view, widened
from minilora.running import Loss, Preference, device_of, forward_logits, token_loss
from minilora.training.config import TrainConfig


def chosen_loss(config: TrainConfig, own: Loss | None) -> Loss:
    """Return what a step minimises and an evaluation reports; `own` is the user's, if any."""
    if config.loss != "ce":
        if own is not None:
            raise ValueError(
                f"a run has one loss, found loss={config.loss!r} in the config and a loss of your "
                f"own; leave one of them out"
            )
        gamma = 1.0 if config.gamma is None else config.gamma
        return Preference(config.loss, config.beta, gamma, config.kto_weights)  # type: ignore[return-value]
    if own is not None and config.max_memory is not None:
        raise ValueError(
            "max_memory plans what the model's own loss takes, found a loss of your own; leave "
            "one of them out"
        )
    return own or token_loss


def require_next_token_loss(model: nn.Module) -> None:
    """Refuse models of transformers that predict no next token: their loss has to be given."""
    takes, config = getattr(model, "main_input_name", None), getattr(model, "config", None)
    if takes is None or config is None:
        return
    of_words = takes == "input_ids" and not getattr(config, "is_encoder_decoder", False)
    head: Any = getattr(model, "get_output_embeddings", lambda: None)()
    if of_words and (head is not None or "LM" in type(model).__name__):
        _require_causal(model, config)
        return
    if takes != "input_ids":
        raise ValueError(
            f"fit() passes input_ids, but {type(model).__name__} takes {takes}; train its adapter "
            f"in a loop of your own: loss = model(**batch).loss; loss.backward(); optimizer.step()"
        )
    raise ValueError(
        f"fit() without loss= learns the next token, which {type(model).__name__} does not "
        f"predict; pass loss=, as in: def loss(model, batch): "
        f"count = int((batch.labels != -100).sum()); "
        f"found = model(input_ids=batch.input_ids, labels=batch.labels); "
        f"return found.loss * count, count"
    )


def _require_causal(model: nn.Module, config: Any) -> None:
    """Refuse a model whose logits see what they are to predict, as those of BERT do."""
    vocabulary = getattr(config, "vocab_size", 0)
    if not isinstance(vocabulary, int) or vocabulary < 8 or _stored_otherwise(model):
        return
    ids = torch.arange(4, device=device_of(model))[None] + vocabulary // 2
    other = torch.where(ids == ids[0, -1], ids[0, 0], ids)  # the last token is another one
    with inference(model), widened(model):  # as training computes
        one, two = (forward_logits(model, x) for x in (ids, other))
    if one.dim() != 3 or one.shape[1] != 4:
        return
    moved = (one - two).abs().amax(-1)[0].float()
    # Rounding may depend on the other tokens too: experts and GEMMs of other sizes add otherwise.
    eps = max(torch.finfo(p.dtype).eps for p in model.parameters() if p.is_floating_point())
    if float(moved[:-1].max()) > max(1e-3, 4 * eps) * float(moved[-1]):
        raise ValueError(
            f"fit() without loss= learns the next token, but {type(model).__name__} sees it: its "
            f"logits depend on later tokens; load it as a causal model (is_decoder=True), or pass "
            f"loss= with masked tokens"
        )


def _stored_otherwise(model: nn.Module) -> bool:
    """Return whether rounding of activations may depend on other tokens."""
    bases = (view(module) for module in model.modules())
    return any(base is not None and (base.is_quantized or base.packed) for base in bases)
