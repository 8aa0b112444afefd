"""A conversation under a chat template: its text, and ids whose control tokens are the template's.

The name of a control token inside a message is hidden from the template and from the search for
control tokens, and encoded as the characters it is made of.
"""

import json
import re
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

from minilora.text.chat_template import map_strings, plain_messages
from minilora.text.long_text import encode_pieces
from minilora.text.special_tokens import Encoded, encode_as_text, longest_first, name_pattern

if TYPE_CHECKING:
    from minilora.text.tokenizer import Tokenizer

_NO_CHARACTERS = range(0xFDD0, 0xFDF0), range(0xF0000, 0xFFFFE)  # code points
_PROBE = "qqprobeqq"


class Conversation:
    """Messages and template variables, rendered and encoded as often as it takes.

    Texts are as they are encoded: where a message holds the name of a control token, the
    template's own control tokens have other names. Compare and join them, then encode.

    Attributes:
        names_control: whether a message holds the name of a control token.

    Args:
        tokenizer: whose template and vocabulary are used.
        messages: dicts of JSON values with `role`; not changed.
        variables: further variables the template reads, of JSON values.

    Raises:
        TypeError, ValueError: as `Tokenizer.render`.
    """

    def __init__(
        self, tokenizer: "Tokenizer", messages: Sequence[dict[str, Any]], variables: dict[str, Any]
    ) -> None:
        self._tokenizer = tokenizer
        plain = plain_messages(messages)
        values = map_strings(variables, str)
        self._names = longest_first(tokenizer.control)
        self._search = name_pattern(self._names)
        text = json.dumps([plain, values], ensure_ascii=False)
        unused = (chr(i) for i in chain(*_NO_CHARACTERS) if chr(i) not in text)
        self._mark, self._own = next(unused), next(unused)  # names in messages; the template's
        self.names_control = False
        self._messages = map_strings(plain, self._hide)
        self._variables = map_strings(values, self._hide)

    def _hide(self, text: str) -> str:
        hidden = self._marked(text, self._mark)
        self.names_control |= hidden != text
        return hidden

    def _marked(self, text: str, mark: str) -> str:
        return self._search.sub(lambda name: f"{mark}{self._names.index(name[0]):05d}", text)

    def text(self, turns: int | None = None, *, prompt: bool = False) -> str:
        """Return the text of the first `turns` messages (None: of all).

        Args:
            turns: how many.
            prompt: end with the beginning of the assistant's next turn.
        """
        return self._rendered(self._messages[:turns], prompt)

    def content(self, turn: int) -> str:
        """Return what a message says."""
        return self._shown(str(self._messages[turn]["content"]))

    def ending(self, turn: int) -> str:
        """Return what the template writes behind a message, when it is the last."""
        probe = {**self._messages[turn], "content": _PROBE}
        return self._rendered([*self._messages[:turn], probe], False).rpartition(_PROBE)[2]

    def _rendered(self, messages: list[dict[str, Any]], prompt: bool) -> str:
        return self._shown(self._tokenizer._rendered(messages, prompt, self._variables))

    def _shown(self, text: str) -> str:
        """Bring the hidden names back, once the names in the text are told apart from them."""
        if not self.names_control:
            return text
        text = self._marked(text, self._own)
        text = re.sub(self._mark + r"(\d{5})", lambda found: self._names[int(found[1])], text)
        if self._mark in text:
            raise ValueError(
                "the chat template takes apart a message that holds the name of a control "
                "token; remove the name from the message"
            )
        return text

    def pieces(self, text: str) -> Iterator[tuple[list[int], list[int]]]:
        """Yield the ids of a text, and the character after each token, piece by piece."""
        if not self.names_control:
            yield from self._tokenizer.pieces(text, parse_special=True)
            return
        backend, ids = self._tokenizer._standing_in(self._own)

        def encode(part: str) -> Encoded:
            found, spans = encode_as_text(backend, part, self._tokenizer.control)
            return [ids.get(i, i) for i in found], spans

        yield from encode_pieces(encode, text)
