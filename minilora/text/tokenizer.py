"""Text to token ids and back, around the `tokenizers` library; conversations to ids.

Text of users never turns into control tokens unless it is asked for: `"<|im_end|>"` in a document
is encoded as the characters it is made of.
"""

import functools
import itertools
import re
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from minilora.files import reading, whole_folder, write, write_json
from minilora.text.chat_template import compiled, map_strings, plain_messages
from minilora.text.conversation import Conversation
from minilora.text.from_folder import folder_parts, remove_templates
from minilora.text.from_gguf import metadata_parts
from minilora.text.long_text import encode_pieces
from minilora.text.special_tokens import (
    Encoded,
    control_tokens,
    encode_as_text,
    make_special,
    stand_in,
    tokenizers_library,
)

# Control tokens that end a turn or a document in any model; llama.cpp stops at them too, and looks
# for a turn's end in this order (its `llama-vocab.cpp`).
ENDS = (
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>",
    "</s>", "<|eom_id|>",
)  # fmt: skip


class Tokenizer:
    """Encode and decode text, and render conversations; made by `from_pretrained`.

    Attributes:
        bos_id: id that begins a text, or None.
        eos_id: id that ends a text or turn, or None.
        pad_id: id to fill batches with: the tokenizer's own, else `eos_id`, or None.
        stop_ids: ids at which generation ends.
        vocab_size: ids are below this number.
        control: ids of the control tokens by name.
        chat_template: Jinja source, or None.
        tool_template: that of conversations with tools, where it is another one, or None.
    """

    def __init__(
        self,
        backend: Any,
        *,
        bos: str | None = None,
        eos: str | None = None,
        pad: str | None = None,
        unk: str | None = None,
        stop_ids: Iterable[int] = (),
        chat_template: str | None = None,
        tool_template: str | None = None,
        others: Mapping[str, str] | None = None,
        frame: tuple[bool, bool] | None = None,
    ) -> None:
        """Wrap a `tokenizers.Tokenizer`, with special tokens given by their text.

        `frame`: whether the bos token begins and the eos token ends a document; None leaves that
        as the backend has it. `others`: further tokens that templates read, by `sep_token` etc.
        """
        self._backend = backend
        self._lock = threading.Lock()
        named = {"bos_token": bos, "eos_token": eos, "pad_token": pad, "unk_token": unk}
        self._named = {name: text for name, text in named.items() if text is not None}
        ids = {name: backend.token_to_id(text) for name, text in self._named.items()}
        for name, token_id in ids.items():
            if token_id is None:
                raise ValueError(
                    f"{name} must be in the vocabulary, found {self._named[name]!r}, which is not"
                )
        self.bos_id: int | None = ids.get("bos_token")
        self.eos_id: int | None = ids.get("eos_token")
        self.pad_id: int | None = ids.get("pad_token", self.eos_id)
        backend.no_truncation()  # what tokenizer.json may keep of some earlier call
        backend.no_padding()
        make_special(backend, self._named.values())
        self.control: dict[str, int] = control_tokens(backend)
        ends = {self.control[text] for text in ENDS if text in self.control}
        if self.control.keys() & {"<|return|>", "<|call|>"}:  # gpt-oss: <|end|> ends a part
            ends.discard(self.control.get("<|end|>"))
        if self.eos_id is not None:
            ends.add(self.eos_id)
        self.stop_ids: frozenset[int] = frozenset(ends | set(stop_ids))
        self.vocab_size: int = 1 + max(backend.get_vocab(with_added_tokens=True).values())
        self._stand_in: tuple[str, Any, dict[int, int]] | None = None
        self.chat_template, self.tool_template = chat_template, tool_template
        self._named |= others or {}
        if frame is not None:
            before, after = (
                [self._named[name]] if wanted and name in self._named else []
                for name, wanted in zip(("bos_token", "eos_token"), frame, strict=True)
            )
            backend.post_processor = tokenizers_library().processors.TemplateProcessing(
                single=[*before, "$A", *after],
                special_tokens=[(text, backend.token_to_id(text)) for text in before + after],
            )

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, end: str | None = None) -> "Tokenizer":
        """Read a Hugging Face folder.

        `tokenizer.json` is needed, or GPT-2's `vocab.json` and `merges.txt`, or SentencePiece's
        `tokenizer.model`; `tokenizer_config.json`, `special_tokens_map.json`, `config.json`,
        `generation_config.json` and files of chat templates are read where they are there.
        `tokenizer.json` states which tokens frame a text; as in transformers 5, `add_bos_token` and
        `add_eos_token` don't override it (and count where there is no such file). Control tokens
        that `tokenizer_config.json` alone names are added behind the vocabulary.

        Args:
            folder: path of the folder.
            end: the token that begins and ends a text where no file names one.

        Raises:
            ValueError: a file that is missing or damaged, or special tokens that contradict it.
            RuntimeError: the `tokenizers` package is missing.
        """
        with reading(f"the tokenizer in '{folder}'"):
            return cls(**folder_parts(Path(folder), end))

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> "Tokenizer":
        """Make the tokenizer of a GGUF file's metadata: a byte-level BPE or a SentencePiece one.

        Raises:
            ValueError: metadata that is missing or contradicts, another kind of vocabulary, or a
                pre-tokenizer that is not built, by name.
            RuntimeError: the `tokenizers` package is missing.
        """
        return cls(**metadata_parts(metadata))

    def encode(self, text: str, *, special: bool = True, parse_special: bool = False) -> list[int]:
        """Turn text into token ids.

        Args:
            text: any text.
            special: put around it the tokens the model wants around a document (often a beginning
                token, for some models none). False for the continuation of a text and for rendered
                conversations, whose template writes them.
            parse_special: read the names of control tokens in `text` as those tokens. Only for
                text that no user has written; `encode_chat` keeps the two apart.

        Returns:
            Token ids.

        Raises:
            TypeError: `text` is no string.
            ValueError: it holds half a surrogate pair, which no encoding can store.
        """
        if special:
            before, after = self._around
            return [*before, *self.encode(text, special=False, parse_special=parse_special), *after]
        return [i for ids, _ in self.pieces(text, parse_special=parse_special) for i in ids]

    def pieces(
        self, text: str, *, parse_special: bool = False
    ) -> Iterator[tuple[list[int], list[int]]]:
        """Yield the ids of a text and the character after each token, a few thousand at a time.

        Args, Raises: as `encode`, with `special=False`.
        """
        if not isinstance(text, str):
            raise TypeError(f"encode needs a string, found {type(text).__name__}")
        if half := re.search("[\ud800-\udfff]", text):
            raise ValueError(
                f"encode needs text, found half a surrogate pair at character {half.start()}; "
                f"decode the bytes it came from as UTF-8"
            )

        def encode(part: str) -> Encoded:
            with self._lock, reading("the tokenizer"):  # the library keeps this choice as state
                self._backend.encode_special_tokens = not parse_special
                return encode_as_text(self._backend, part, {} if parse_special else self.control)

        return encode_pieces(encode, text)

    @functools.cached_property
    def _around(self) -> tuple[list[int], list[int]]:
        """The ids before and after a document."""
        whole = self._backend.encode("a", add_special_tokens=True).ids
        inner = self._backend.encode("a", add_special_tokens=False).ids
        for start in range(len(whole) - len(inner) + 1):
            if inner and whole[start : start + len(inner)] == inner:
                return whole[:start], whole[start + len(inner) :]
        return self._backend.encode("", add_special_tokens=True).ids, []

    def tokens_from(self, first: int) -> list[str]:
        """Return the tokens that texts may have from an id on, in the order of their ids.

        Control tokens are among them where they begin or end each document.
        """
        framing = {i for ids in self._around for i in ids}
        control = {i for i in self.control.values() if i not in framing}
        vocabulary = self._backend.get_vocab(with_added_tokens=True)
        found = ((i, token) for token, i in vocabulary.items() if i >= first and i not in control)
        return [token for _, token in sorted(found)]

    @functools.cached_property
    def joins(self) -> bool:
        """Whether texts that are encoded apart read as one text.

        False of vocabularies that put a space before each (SentencePiece), or mark what goes on.
        """
        apart = [i for letter in "ab" for i in self.encode(letter, special=False)]
        return self.decode(apart) == "ab"

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Turn token ids into text.

        Args:
            ids: token ids; ids above the vocabulary (a model's padding rows) give no text.
            skip_special: leave control tokens out.

        Raises:
            ValueError: negative ids.
        """
        ids = [int(i) for i in ids]
        if ids and min(ids) < 0:
            raise ValueError(f"token ids must be 0 or more, found {min(ids)}")
        return self._backend.decode(ids, skip_special_tokens=skip_special)

    def decode_after(self, before: Sequence[int], ids: Sequence[int]) -> str:
        """Return the text that `ids` add to what `before` says, without control tokens.

        The space that a vocabulary drops at the beginning of a text is kept. A character cut off
        at the end is left out, and bytes that are no text are written as U+FFFD, as Python does,
        so the text of more ids begins with it.

        Args:
            before: ids of the text that `ids` go on from; may be empty.
            ids: token ids.

        Raises:
            ValueError: negative ids.
        """
        silent = set(self.control.values()).issuperset(before)
        anchor = [] if silent else self.encode("a", special=False)[-1:]
        start = self.decode(anchor)
        ids = [int(i) for i in ids]
        for end in range(len(ids), 0, -1):
            written = self._whole_characters(ids[:end])
            text = self.decode([*anchor, *written])
            text = text[len(start) :] if text.startswith(start) else self.decode(written)
            if not text.endswith("\ufffd") or self._ends_with_replacement(ids[:end]):
                return text
        return ""

    @functools.cached_property
    def _bytes(self) -> dict[int, int]:
        """The bytes that tokens of their own stand for, where characters fall back to those."""
        decoder = self._backend.decoder
        if decoder is None or b"ByteFallback" not in decoder.__getstate__():
            return {}
        found = {self._backend.token_to_id(f"<0x{byte:02X}>"): byte for byte in range(256)}
        return found if len(found) == 256 and None not in found else {}

    def _whole_characters(self, ids: list[int]) -> list[int]:
        """Replace bytes that are no text by the replacement character's.

        The library would write each byte of a run with a bad one as that character, good ones
        before it too, so that a text changed that had been streamed already.
        """
        if self._bytes.keys().isdisjoint(ids):
            return ids
        to_id = {byte: i for i, byte in self._bytes.items()}
        found: list[int] = []
        for are_bytes, run in itertools.groupby(ids, key=self._bytes.__contains__):
            if are_bytes:
                text = bytes(self._bytes[i] for i in run).decode("utf-8", "replace")
                found += [to_id[byte] for byte in text.encode("utf-8")]
            else:
                found += run
        return found

    def _ends_with_replacement(self, ids: Sequence[int]) -> bool:
        """Whether the replacement character was itself written."""
        start = len(self.encode("a", special=False))
        written = self.encode("a\ufffd", special=False)[start:]  # its three bytes, or one token
        return bool(written) and list(ids[-len(written) :]) == written

    def render(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """Write a conversation as the text the model was trained on, by its chat template.

        The template is untrusted: it runs in a sandbox, for at most a few seconds.

        Args:
            messages: dicts of JSON values with `role` and, mostly, `content`; not changed.
            add_generation_prompt: end with the beginning of the assistant's next turn.
            variables: what else the template reads, as JSON values: tools, documents, …

        Returns:
            Text in which control tokens are named, whoever wrote them: to encode it safely use
            `encode_chat`.

        Raises:
            ValueError: no chat template, or one that refuses the messages or fails.
            TypeError: messages of another type.
            RuntimeError: jinja2 is missing.
        """
        values = map_strings(variables, str)
        return self._rendered(plain_messages(messages), add_generation_prompt, values)

    def _rendered(
        self, messages: list[dict[str, Any]], prompt: bool, variables: dict[str, Any]
    ) -> str:
        if self.chat_template is None:
            raise ValueError(
                "a conversation needs a chat template, found none in this tokenizer; set "
                "tokenizer.chat_template or use plain text"
            )
        given = {"tools": None, "documents": None, **self._named, **variables}
        source = self.tool_template if given["tools"] is not None else None
        template = compiled(source or self.chat_template)
        return template.render(messages, add_generation_prompt=prompt, **given)

    @property
    def template_sources(self) -> list[str]:
        """The chat template and the one with tools, as far as there are any."""
        return [each for each in (self.chat_template, self.tool_template) if each is not None]

    @property
    def template_variables(self) -> frozenset[str]:
        """What the chat templates read beside the messages and the tokens' names."""
        return frozenset().union(*(compiled(text).variables for text in self.template_sources))

    def encode_chat(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> list[int]:
        """Render a conversation and encode it; only the template's control tokens become ones.

        The name of a control token inside a message (role and every other field included) stays
        text. Holds for templates that put text of their own between two fields: the halves of a
        name in two fields that a template joins directly are read as the name.

        Args:
            messages, add_generation_prompt, variables: as in `render`.

        Returns:
            Token ids.

        Raises:
            As `render`; ValueError too where a template takes such a name apart.
        """
        talk = Conversation(self, messages, variables)
        text = talk.text(prompt=add_generation_prompt)
        return [i for ids, _ in talk.pieces(text) for i in ids]

    def _standing_in(self, mark: str) -> tuple[Any, dict[int, int]]:
        """Return `stand_in`'s result for this tokenizer, kept for the mark used last."""
        if self._stand_in is None or self._stand_in[0] != mark:
            self._stand_in = mark, *stand_in(self._backend, mark)
        return self._stand_in[1:]

    def to_json(self) -> str:
        """Return what `save` writes as tokenizer.json."""
        return self._backend.to_str()

    def frame(self) -> tuple[bool, bool]:
        """Return whether the bos token begins a document, and whether the eos token ends it."""
        ids = self.encode("")
        return self.bos_id in ids[:1], self.eos_id in ids[-1:] and ids[-1:] != [self.bos_id]

    def save(self, folder: str | Path) -> None:
        """Write the files from which transformers' `AutoTokenizer` makes the same tokenizer.

        Args:
            folder: made when missing; `tokenizer.json`, `tokenizer_config.json` and
                `chat_template.jinja` in it are replaced or, without a template of its own, removed.
        """
        entries: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", **self._named}
        entries["clean_up_tokenization_spaces"] = False
        if self.tool_template is not None:
            named = {"default": self.chat_template, "tool_use": self.tool_template}
            entries["chat_template"] = [{"name": k, "template": v} for k, v in named.items()]
        with whole_folder(folder, last="tokenizer.json") as made:
            write(made / "tokenizer.json", self._backend.to_str(pretty=True))
            write_json(made / "tokenizer_config.json", entries)
            if self.chat_template is not None and self.tool_template is None:
                write(made / "chat_template.jinja", self.chat_template)
            remove_templates(Path(folder), made)
