"""Tokenizers and chat templates."""

from minilora.text.chat_template import REASONING
from minilora.text.conversation import Conversation
from minilora.text.foreign_tokenizer import as_tokenizer, read_folder_tokenizer
from minilora.text.from_folder import remove_templates
from minilora.text.special_tokens import name_pattern
from minilora.text.to_gguf import gguf_metadata
from minilora.text.tokenizer import Tokenizer

__all__ = [
    "REASONING",
    "Conversation",
    "Tokenizer",
    "as_tokenizer",
    "gguf_metadata",
    "name_pattern",
    "read_folder_tokenizer",
    "remove_templates",
]
