"""Evaluate, generate, and compile what does."""

from minilora.running.arguments import context_of
from minilora.running.chat import BASE, Chat
from minilora.running.compiling import CompileClock, compiled, settle_compile
from minilora.running.evaluation import Evaluation, device_of, evaluate, summarize
from minilora.running.generation import generate
from minilora.running.loss import (
    Loss,
    forward_logits,
    only_watches,
    shares_prefix,
    takes_packed,
    token_loss,
)
from minilora.running.paired import (
    FEWEST,
    RESAMPLES,
    TOO_FEW,
    Difference,
    paired_difference,
    require_unpacked,
    summed,
    t975,
    token_losses,
)
from minilora.running.preference import KINDS, Preference

__all__ = [
    "BASE",
    "FEWEST",
    "KINDS",
    "RESAMPLES",
    "TOO_FEW",
    "Chat",
    "CompileClock",
    "Difference",
    "Evaluation",
    "Loss",
    "Preference",
    "compiled",
    "context_of",
    "device_of",
    "evaluate",
    "forward_logits",
    "generate",
    "only_watches",
    "paired_difference",
    "require_unpacked",
    "settle_compile",
    "shares_prefix",
    "summarize",
    "summed",
    "t975",
    "takes_packed",
    "token_loss",
    "token_losses",
]
