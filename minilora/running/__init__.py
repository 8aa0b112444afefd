"""Evaluate, generate, and compile what does."""

from minilora.running.arguments import context_of
from minilora.running.chat import BASE, Chat
from minilora.running.compiling import CompileClock, compiled, settle_compile
from minilora.running.evaluation import Evaluation, device_of, evaluate, summarize
from minilora.running.generation import generate
from minilora.running.loss import Loss, forward_logits, takes_packed, token_loss
from minilora.running.preference import KINDS, Preference

__all__ = [
    "BASE",
    "KINDS",
    "Chat",
    "CompileClock",
    "Evaluation",
    "Loss",
    "Preference",
    "compiled",
    "context_of",
    "device_of",
    "evaluate",
    "forward_logits",
    "generate",
    "settle_compile",
    "summarize",
    "takes_packed",
    "token_loss",
]
