"""Text to token ids and back, around the `tokenizers` library; conversations to ids.

Text of users never turns into control tokens unless it is asked for: `"<|im_end|>"` in a document
is encoded as the characters it is made of.
"""

import re
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from minilora.files import leads_out, whole_folder, write, write_json

from .byte_level import folder_backend, gguf_backend, tokenizers_library
from .chat_template import ChatTemplate, map_strings, plain_messages
from .folder import read_json

_CONTROL, _USER_DEFINED = 3, 4  # tokenizer.ggml.token_type

# Control tokens that end a turn or a document in any model; llama.cpp stops at them too.
_ENDS = ("<|endoftext|>", "<|im_end|>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>", "</s>")
_MARK = "\ufdd0"  # a code point that stands for no character


class Tokenizer:
    """Encode and decode text, and render conversations.

    Made by `from_pretrained` or `from_gguf`.

    Attributes:
        bos_id: id that begins a text, or None.
        eos_id: id that ends a text or turn, or None.
        pad_id: id to fill batches with: the tokenizer's own, else `eos_id`, or None.
        stop_ids: ids at which generation ends.
        vocab_size: ids are below this number.
        chat_template: Jinja source, or None.
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
    ) -> None:
        """Wrap a `tokenizers.Tokenizer`, with special tokens given by their text."""
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
        added = backend.get_added_tokens_decoder()
        self._control = {token.content: i for i, token in added.items() if token.special}
        ends = {self._control[text] for text in _ENDS if text in self._control}
        if self.eos_id is not None:
            ends.add(self.eos_id)
        self.stop_ids: frozenset[int] = frozenset(ends | set(stop_ids))
        self.vocab_size: int = 1 + max(backend.get_vocab(with_added_tokens=True).values())
        self._template: ChatTemplate | None = None
        self.chat_template = chat_template

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "Tokenizer":
        """Read a Hugging Face folder.

        `tokenizer.json` is needed, or GPT-2's `vocab.json` and `merges.txt`;
        `tokenizer_config.json`, `special_tokens_map.json`, `chat_template.jinja`, `config.json`
        and `generation_config.json` are read where they lie.
        Which tokens frame a text stands in `tokenizer.json`; as in transformers 5, `add_bos_token`
        and `add_eos_token` don't override it (and count where there is no such file).

        Raises:
            ValueError: a file that is missing or damaged, or special tokens that contradict it.
            RuntimeError: the `tokenizers` package is missing.
        """
        folder = Path(folder)
        entries: dict[str, Any] = {}
        for name in ("special_tokens_map.json", "tokenizer_config.json"):
            if (folder / name).is_file():
                entries |= read_json(folder / name)
        backend, defaults = folder_backend(folder, entries)
        entries = defaults | entries
        named = {
            name: _text_of(entries.get(f"{name}_token")) for name in ("bos", "eos", "pad", "unk")
        }
        stops: set[int] = set()
        for name in ("config.json", "generation_config.json"):
            if (folder / name).is_file():
                ids = read_json(folder / name).get("eos_token_id")
                stops |= {i for i in (ids if isinstance(ids, list) else [ids]) if type(i) is int}
        template = entries.get("chat_template")
        if isinstance(template, list):  # several, by name
            template = {each["name"]: each["template"] for each in template}.get("default")
        if (folder / "chat_template.jinja").is_file():
            if leads_out(folder, folder / "chat_template.jinja"):
                raise ValueError(
                    f"'{folder / 'chat_template.jinja'}' must lie in its folder, found a link to "
                    f"somewhere else; put a copy there: save would publish whatever it leads to"
                )
            template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
        made = cls(backend, **named, stop_ids=stops, chat_template=template)
        if not (folder / "tokenizer.json").is_file():
            made._frame(bool(entries.get("add_bos_token")), bool(entries.get("add_eos_token")))
        return made

    @classmethod
    def from_gguf(cls, file: str | Path) -> "Tokenizer":
        """Read the byte-level BPE vocabulary and merges in a GGUF file's metadata.

        Raises:
            ValueError: a file that is no GGUF, another kind of vocabulary, or a pre-tokenizer
                that is not built, by name.
            RuntimeError: the `tokenizers` package is missing.
        """
        from .gguf_file import read_gguf

        return cls._from_gguf(read_gguf(file))

    @classmethod
    def _from_gguf(cls, source: Any) -> "Tokenizer":
        library = tokenizers_library()
        tokens = source.need("tokenizer.ggml.tokens")
        backend = gguf_backend(source, tokens)
        kinds = source.metadata.get("tokenizer.ggml.token_type", [])
        added = [
            library.AddedToken(token, normalized=False, special=kind == _CONTROL)
            for token, kind in zip(tokens, kinds, strict=False)
            if kind in (_CONTROL, _USER_DEFINED)
        ]
        backend.add_special_tokens([token for token in added if token.special])
        backend.add_tokens([token for token in added if not token.special])
        ids = {
            name: source.metadata.get(f"tokenizer.ggml.{key}_token_id")
            for name, key in (
                ("bos", "bos"),
                ("eos", "eos"),
                ("pad", "padding"),
                ("unk", "unknown"),
            )
        }
        for name, token_id in ids.items():
            if token_id is not None and not 0 <= token_id < len(tokens):
                raise ValueError(
                    f"'{source.path}': the {name} token's id must lie in [0, {len(tokens)}), found "
                    f"{token_id}"
                )
        stops = [source.metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("eot", "eom")]
        made = cls(
            backend,
            **{name: None if i is None else tokens[i] for name, i in ids.items()},
            stop_ids=[i for i in stops if i is not None],
            chat_template=source.metadata.get("tokenizer.chat_template"),
        )
        begins = source.metadata["tokenizer.ggml.pre"] == "llama-bpe"  # llama.cpp's default
        made._frame(
            bool(source.metadata.get("tokenizer.ggml.add_bos_token", begins)),
            bool(source.metadata.get("tokenizer.ggml.add_eos_token", False)),
        )
        return made

    def _frame(self, begin: bool, end: bool) -> None:
        """Let `encode` put the beginning and ending tokens around a text."""
        processors = tokenizers_library().processors
        special, single = [], "$A"
        if begin and self.bos_id is not None:
            special.append((self._named["bos_token"], self.bos_id))
            single = f"{self._named['bos_token']} {single}"
        if end and self.eos_id is not None:
            special.append((self._named["eos_token"], self.eos_id))
            single = f"{single} {self._named['eos_token']}"
        self._backend.post_processor = processors.TemplateProcessing(
            single=single, special_tokens=special
        )

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
        if not isinstance(text, str):
            raise TypeError(f"encode needs a string, found {type(text).__name__}")
        if half := re.search("[\ud800-\udfff]", text):
            raise ValueError(
                f"encode needs text, found half a surrogate pair at character {half.start()}; "
                f"decode the bytes it came from as UTF-8"
            )
        with self._lock:  # the library keeps this choice as state
            self._backend.encode_special_tokens = not parse_special
            return self._backend.encode(text, add_special_tokens=special).ids

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

    def render(
        self, messages: Sequence[dict[str, Any]], *, add_generation_prompt: bool = True
    ) -> str:
        """Write a conversation as the text the model was trained on, by its chat template.

        The template is untrusted: it runs in a sandbox, for at most a few seconds.

        Args:
            messages: dicts of JSON values with `role` and, mostly, `content`; not changed.
            add_generation_prompt: end with the beginning of the assistant's next turn.

        Returns:
            Text in which control tokens stand by name, whoever wrote them: to encode it safely use
            `encode_chat`.

        Raises:
            ValueError: no chat template, or one that refuses the messages or fails.
            TypeError: messages of another type.
            RuntimeError: jinja2 is missing.
        """
        return self._rendered(plain_messages(messages), add_generation_prompt)

    def _rendered(self, messages: list[dict[str, Any]], add_generation_prompt: bool) -> str:
        if self.chat_template is None:
            raise ValueError(
                "a conversation needs a chat template, found none in this tokenizer; set "
                "tokenizer.chat_template or use plain text"
            )
        if self._template is None or self._template.source != self.chat_template:
            self._template = ChatTemplate(self.chat_template)
        return self._template.render(
            messages,
            add_generation_prompt=add_generation_prompt,
            tools=None,
            documents=None,
            **self._named,
        )

    def encode_chat(
        self, messages: Sequence[dict[str, Any]], *, add_generation_prompt: bool = True
    ) -> list[int]:
        """Render a conversation and encode it; only the template's control tokens become ones.

        The name of a control token inside a message (role and every other field included) stays
        text. Holds for templates that put text of their own between two fields: the halves of a
        name in two fields that a template joins directly are read as the name.

        Args:
            messages: as in `render`.
            add_generation_prompt: as in `render`.

        Returns:
            Token ids.

        Raises:
            As `render`; ValueError too where a template takes such a name apart.
        """
        plain = plain_messages(messages)
        names = sorted(self._control, key=len, reverse=True)
        control = re.compile("|".join(map(re.escape, names)) or r"(?!)")
        found: list[bool] = []
        marks = _longest_run(plain) + _MARK

        def hide(text: str) -> str:
            found.extend(True for _ in control.finditer(text))
            return control.sub(lambda name: f"{marks}{names.index(name[0]):05d}", text)

        hidden = [map_strings(message, hide) for message in plain]
        text = self._rendered(hidden, add_generation_prompt)
        if not found:
            return self.encode(text, special=False, parse_special=True)
        ids: list[int] = []
        end = 0
        for match in (*control.finditer(text), None):
            piece = text[end : match.start() if match else len(text)]
            shown = re.sub(marks + r"(\d{5})", lambda name: names[int(name[1])], piece)
            if marks in shown:
                raise ValueError(
                    "the chat template takes apart a message that holds the name of a control "
                    "token; remove the name from the message"
                )
            ids += self.encode(shown, special=False)
            if match:
                ids.append(self._control[match[0]])
                end = match.end()
        return ids

    def save(self, folder: str | Path) -> None:
        """Write the files from which transformers' `AutoTokenizer` makes the same tokenizer.

        Args:
            folder: made when missing; `tokenizer.json`, `tokenizer_config.json` and
                `chat_template.jinja` in it are replaced.
        """
        entries = {"tokenizer_class": "PreTrainedTokenizerFast", **self._named}
        with whole_folder(folder, last="tokenizer.json") as made:
            write(made / "tokenizer.json", self._backend.to_str(pretty=True))
            write_json(
                made / "tokenizer_config.json", {**entries, "clean_up_tokenization_spaces": False}
            )
            if self.chat_template is not None:
                write(made / "chat_template.jinja", self.chat_template)


def _text_of(token: Any) -> str | None:
    """A special token's text: in config files it stands bare or as an object."""
    return token.get("content") if isinstance(token, dict) else token


def _longest_run(value: Any) -> str:
    """The longest run of marks in any string inside, so that one more is unmistakable."""
    runs = [""]

    def note(text: str) -> str:
        runs.extend(re.findall(f"{_MARK}+", text))
        return text

    map_strings(value, note)
    return max(runs, key=len)
