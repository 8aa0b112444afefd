"""Evaluate, generate, and compile what does."""

from minilora.running.chat import BASE, Chat
from minilora.running.compiling import compiled, settle_compile
from minilora.running.evaluation import Evaluation, device_of, evaluate, summarize
from minilora.running.generation import CONTEXT_NAMES, generate
from minilora.running.loss import Loss, forward_logits, takes_packed, token_loss

__all__ = [
    "BASE",
    "CONTEXT_NAMES",
    "Chat",
    "Evaluation",
    "Loss",
    "compiled",
    "device_of",
    "evaluate",
    "forward_logits",
    "generate",
    "settle_compile",
    "summarize",
    "takes_packed",
    "token_loss",
]
