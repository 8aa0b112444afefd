"""SentencePiece vocabularies: BPE whose merges follow from the pieces' order, and unigrams.

A space is spelled ▁, and a character without a piece by its bytes (`<0x0A>`). Their rules: Kudo and
Richardson 2018, "SentencePiece"; https://github.com/google/sentencepiece.
"""

import struct
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from minilora.text.special_tokens import tokenizers_library

CONTROL, USER_DEFINED = 3, 4  # the types of pieces, in GGUF files too
_SPACE = "▁"


def bpe(tokens: Sequence[str], order: Sequence[float], unk: str | None, longest_left: bool) -> Any:
    """Return a backend of a BPE that makes first the piece with the lowest number in `order`.

    Of two ways to make a piece the one with the longest left part comes first, or the shortest.
    """
    library = tokenizers_library()
    ids = {token: i for i, token in enumerate(tokens)}
    if len(ids) != len(tokens):
        raise ValueError("tokens must differ, found one twice")
    sign = -1 if longest_left else 1
    pairs = []
    for i, token in enumerate(tokens):
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in ids and right in ids:
                pairs.append((order[i], sign * cut, sign * len(right), i, left, right))
    merges = [pair[-2:] for pair in sorted(pairs)]
    return library.Tokenizer(
        library.models.BPE(ids, merges, unk_token=unk, fuse_unk=True, byte_fallback=True)
    )


def space(backend: Any, scheme: str) -> None:
    """Let a backend put a space before a text.

    "first": before the text; "always": behind each control token too, in both cases unless there
    is one; "each": behind each, even if there is one; "never".
    """
    library = tokenizers_library()
    normal = library.normalizers
    backend.normalizer = backend.pre_tokenizer = None
    if scheme == "each":
        steps = [normal.Prepend(_SPACE), normal.Replace(" ", _SPACE)]
        backend.normalizer = normal.Sequence(steps)
    else:
        backend.pre_tokenizer = library.pre_tokenizers.Metaspace(
            _SPACE, prepend_scheme=scheme, split=False
        )


def unspace(backend: Any, strip: bool) -> None:
    """Let a backend turn pieces into text; with `strip`, without the space put before it."""
    decoders = tokenizers_library().decoders
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, *([decoders.Strip(" ", 1, 0)] if strip else [])])


def gemma(backend: Any) -> None:
    """Let a backend spell spaces as Gemma's does: none is put before a text."""
    library = tokenizers_library()
    backend.normalizer = library.normalizers.Replace(" ", _SPACE)
    backend.pre_tokenizer = library.pre_tokenizers.Split(" ", "merged_with_previous")
    unspace(backend, strip=False)


def add_typed(backend: Any, tokens: Iterable[str], types: Iterable[int]) -> None:
    """Make added tokens of a backend's pieces of the types CONTROL and USER_DEFINED."""
    added = tokenizers_library().AddedToken
    typed = list(zip(tokens, types, strict=False))
    control = [added(t, normalized=False, special=True) for t, k in typed if k == CONTROL]
    backend.add_special_tokens(control)
    backend.add_tokens([added(t, normalized=False) for t, k in typed if k == USER_DEFINED])


class Pieces(NamedTuple):
    """What a `tokenizer.model` holds.

    Attributes:
        tokens, scores, types: of the pieces, by id.
        unigram: whether it is a unigram model, not a BPE.
        byte_fallback: whether characters without a piece are spelled by bytes.
        unk: id of the piece for what can't be spelled.
        named: its own control tokens: unk, bos, eos and pad, where there are some.
        charsmap: compiled rules by which characters are replaced.
        prefix: whether a space is put before a text.
        squeezes: whether spaces at the ends and one after another are removed.
    """

    tokens: list[str]
    scores: list[float]
    types: list[int]
    unigram: bool
    byte_fallback: bool
    unk: int
    named: dict[str, str]
    charsmap: bytes
    prefix: bool
    squeezes: bool

    def backend(self) -> Any:
        """Return a backend that encodes as SentencePiece does."""
        library = tokenizers_library()
        normal = library.normalizers
        if self.unigram:
            scored = list(zip(self.tokens, self.scores, strict=True))
            model = library.models.Unigram(scored, self.unk, self.byte_fallback)
            backend = library.Tokenizer(model)
        else:
            order = range(len(self.tokens))
            backend = bpe(self.tokens, order, self.named.get("unk"), longest_left=False)
        steps = [normal.Precompiled(self.charsmap)] if self.charsmap else []
        if self.squeezes:
            steps.append(normal.Replace(library.Regex(r"\A +| +\z| (?= )"), ""))
        if self.prefix:
            steps.append(normal.Prepend(_SPACE))
        backend.normalizer = normal.Sequence([*steps, normal.Replace(" ", _SPACE)])
        unspace(backend, strip=self.prefix)
        return backend


def read_pieces(file: Path) -> Pieces:
    """Read a `tokenizer.model`: `ModelProto` of sentencepiece_model.proto."""
    try:
        raw = file.read_bytes()
        tokens: list[str] = []
        scores, types = [], []
        trainer: dict[int, Any] = {}
        normalizer: dict[int, Any] = {}
        for number, value in _fields(raw):
            if number == 1:
                piece = dict(_fields(value))
                tokens.append(piece.get(1, b"").decode("utf-8"))
                scores.append(struct.unpack("<f", piece.get(2, bytes(4)))[0])
                types.append(piece.get(3, 1))
            elif number in (2, 3):
                (trainer if number == 2 else normalizer).update(_fields(value))
        if not tokens:
            raise ValueError("it has no pieces")
        ids = [_signed(trainer.get(40 + i, default)) for i, default in enumerate((0, 1, 2, -1))]
        if trainer.get(3, 1) not in (1, 2) or max(ids) >= len(tokens):
            raise ValueError("it must be a unigram or BPE model whose special ids are pieces")
        names = zip(("unk", "bos", "eos", "pad"), ids, strict=True)
        return Pieces(
            tokens=tokens,
            scores=scores,
            types=types,
            unigram=trainer.get(3, 1) == 1,
            byte_fallback=bool(trainer.get(35, 0)),
            unk=ids[0],
            named={name: tokens[i] for name, i in names if i >= 0},
            charsmap=normalizer.get(2, b""),
            prefix=bool(normalizer.get(3, 1)),
            squeezes=bool(normalizer.get(4, 1)),
        )
    except (OSError, LookupError, TypeError, ValueError, struct.error) as error:
        raise ValueError(
            f"'{file}' must be a whole SentencePiece model, found otherwise: {error}"
        ) from None


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


def _fields(raw: bytes) -> Iterator[tuple[int, Any]]:
    """Yield a message's fields: numbers or bytes; see protobuf.dev/programming-guides/encoding."""
    at = 0

    def number() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = raw[at]
            at, value, shift = at + 1, value | (byte & 127) << shift, shift + 7
            if byte < 128:
                return value

    while at < len(raw):
        key = number()
        if key & 7 == 0:
            yield key >> 3, number()
            continue
        sizes = {1: 8, 5: 4}
        size = number() if key & 7 == 2 else sizes[key & 7]
        if size > len(raw) - at:
            raise ValueError("it is cut short")
        at += size
        yield key >> 3, raw[at - size : at]
