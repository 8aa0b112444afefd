"""Write text: several prompts at once, greedy or sampled, with a cache where a model takes one."""

import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from minilora.data import encode_prompt, warn_of_control
from minilora.files import short
from minilora.lora import Survey, inference, widened
from minilora.models import KVCache
from minilora.running.arguments import argument_names, context_of
from minilora.running.compiling import compiled, settle_compile
from minilora.running.evaluation import device_of
from minilora.running.foreign import Rows, cached_steps
from minilora.running.loss import forward_logits
from minilora.text import as_tokenizer


def generate(
    model: nn.Module,
    prompts: str | Sequence[str] | Sequence[Sequence[int]],
    *,
    tokenizer: Any = None,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop: str | int | Iterable[str | int] = (),
    seed: int | None = None,
    chat: bool = False,
    system: str | None = None,
    compile: bool | str = False,
    stream: Callable[[int, str], None] | None = None,
) -> list[Any]:
    """Continue each prompt until a stop token, a stop string or `max_new_tokens`.

    A row's text depends on no row beside it: greedy rows equal one-at-a-time generation, and row
    i of a sampled batch draws from its own generator, made of seed and i.

    Args:
        model: a model of `minilora.models` or of transformers, run with its cache; or any causal
            model that returns logits [B, T, V] (or has them in `.logits`), recomputed for each
            token.
            Left as it was, flags, buffers and torch's random state included.
        prompts: a text, several texts, or several lists of token ids.
        tokenizer: a `minilora.text.Tokenizer`, or one of transformers'; needed for texts and
            stop strings. Its `stop_ids` stop a row; with one of transformers', so do the
            `eos_token_id`s of its folder, of `model.config` and of `model.generation_config`.
        max_new_tokens: tokens to write at most, at least 1.
        temperature: 0 takes the likeliest token, whatever `top_k` and `top_p` say; above 0
            samples from softmax(logits / temperature).
        top_k: sample among that many likeliest tokens only.
        top_p: sample among the fewest likeliest tokens whose probability reaches top_p, in
            (0, 1]; after `top_k` (Holtzman et al. 2020, section 3.1).
        stop: further stop strings and token ids.
        seed: reproduces a sampled text; None draws a fresh one. The global random state is
            neither read nor changed.
        chat: wrap each text as a user message in the tokenizer's chat template.
        system: with chat, the system message before it.
        compile: True runs the model's blocks through `torch.compile` after the first token, which
            takes a C++ compiler (on a GPU Triton and a C compiler) and some ten seconds once;
            `"auto"` does where that works. Its rounding differs, so a greedy text may turn where
            two tokens are nearly as likely.
        stream: called with a prompt's number and what its text has grown by, as soon as that is
            certain: not within a character or a stop string; needs a tokenizer.

    Returns:
        Per prompt the new text, or the new token ids when there is no tokenizer; what stopped the
        row is not part of it, nor is a character whose last bytes were not written.

    Raises:
        ValueError: an option out of range, an empty prompt, ids outside the vocabulary, more
            tokens than the model's context holds, an adapter with NaN; all before any work.
        TypeError: prompts of another type, texts without a tokenizer, another tokenizer.
        RuntimeError: the model's logits are not numbers; `compile=True` without a compiler.
    """
    _check_options(max_new_tokens, temperature, top_k, top_p, compile)
    tokenizer = None if tokenizer is None else as_tokenizer(tokenizer, model)
    wanted = settle_compile(compile, device_of(model))[0]
    stop_ids, stop_strings = _stops(stop, tokenizer)
    rows = _encode(prompts, tokenizer, chat, system)
    if stream is not None and tokenizer is None:
        raise TypeError("stream needs a tokenizer, found None; pass tokenizer=")
    _check_rows(rows, max_new_tokens, model)
    survey = Survey(model)
    survey.require_values("generate")
    survey.require_finite()
    seed = random.SystemRandom().getrandbits(62) if seed is None else seed
    generators = [_generator(seed, i) for i in range(len(rows))]
    asked = [list(row) for row in rows]
    new: Rows = [[] for _ in rows]
    running = list(range(len(rows)))
    said = [0] * len(rows)  # characters that `stream` has had
    with inference(model), widened(model):
        step = _step(model, rows, max_new_tokens, survey)
        logits = step(rows, running)  # the prompts, uncompiled: of other lengths, and come once
        with compiled(model, wanted and max_new_tokens > 1, every=True):
            while running:
                found = logits.to("cpu", torch.float32)
                for i, row in zip(tuple(running), found, strict=True):
                    token = pick_token(
                        row, temperature, top_k=top_k, top_p=top_p, generator=generators[i]
                    )
                    if token in stop_ids:
                        running.remove(i)
                        continue
                    rows[i].append(token)
                    new[i].append(token)
                    text = ""
                    if stop_strings or stream is not None:
                        text = tokenizer.decode_after(asked[i], new[i])
                    if stream is not None and (end := _certain(text, stop_strings)) > said[i]:
                        stream(i, text[said[i] : end])
                        said[i] = end
                    if _end(text, stop_strings) >= 0 or len(new[i]) == max_new_tokens:
                        running.remove(i)
                if running:
                    logits = step(rows, running)
    if tokenizer is None:
        return new
    texts = [tokenizer.decode_after(*both) for both in zip(asked, new, strict=True)]
    ends = [_end(text, stop_strings) for text in texts]
    texts = [text if end < 0 else text[:end] for text, end in zip(texts, ends, strict=True)]
    for i, text in enumerate(texts):
        if stream is not None and len(text) > said[i]:
            stream(i, text[said[i] :])
    return texts


def _certain(text: str, stop_strings: Sequence[str]) -> int:
    """Return how much of a text is sure to stay: what may begin a stop string is not."""
    if (end := _end(text, stop_strings)) >= 0:
        return end
    begun = [n for s in stop_strings for n in range(1, len(s)) if text.endswith(s[:n])]
    return len(text) - max(begun, default=0)


def _end(text: str, stop_strings: Sequence[str]) -> int:
    """Return where the first stop string begins, -1 if there is none."""
    return min((text.find(string) for string in stop_strings if string in text), default=-1)


def pick_token(
    logits: torch.Tensor,
    temperature: float = 0.0,
    *,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> int:
    """Choose the next token by logits [V] on the CPU, which are -inf where one must not come.

    It is the likeliest at temperature 0, else one drawn at random; see `generate`.
    """
    largest = float(logits.max())
    if not abs(largest) < float("inf"):
        raise RuntimeError(f"logits must have a finite maximum, found {largest}; check the model")
    if temperature == 0:
        return int(logits.argmax())
    p = token_probabilities(logits, temperature, top_k=top_k, top_p=top_p)
    return int(torch.multinomial(p, 1, generator=generator))


def token_probabilities(
    logits: torch.Tensor,
    temperature: float = 1.0,
    *,
    top_k: int | None = None,
    top_p: float | None = None,
) -> torch.Tensor:
    """Return what is sampled from: p = softmax(logits / temperature), cut and scaled to sum 1.

    Of equal logits too no more than `top_k` keep a probability. A token keeps its own when the
    likelier ones together are below `top_p`: so at least one does, and all of them at 1.
    """
    scaled = (logits.double() - logits.max()) / temperature  # first minus, so nothing overflows
    if top_k is not None and top_k < len(scaled):
        best = scaled.topk(top_k)
        scaled = torch.full_like(scaled, -torch.inf).scatter_(0, best.indices, best.values)
    p = scaled.softmax(0)
    if top_p is not None and top_p < 1:
        ordered, index = p.sort(descending=True, stable=True)
        before = ordered.cumsum(0).roll(1)
        before[0] = 0
        p[index[before >= top_p]] = 0
        p /= p.sum()
    return p


def _generator(seed: int, row: int) -> torch.Generator:
    """Make a stream for one row that no other row or seed shares."""
    return torch.Generator().manual_seed(random.Random(f"{seed}/{row}").getrandbits(62))


def _step(
    model: nn.Module, rows: Rows, new: int, survey: Survey
) -> Callable[[Rows, list[int]], torch.Tensor]:
    """Return a function from all ids so far, and the rows that run, to their logits [B, V]."""
    if argument_names(model.forward) >= {"positions", "mask", "cache", "last"}:
        bound = (route.rows for layer in survey.layers.values() for route in layer.routes())
        return _Cached(model, rows, new, any(bound))
    step = cached_steps(model, rows, new)
    device = device_of(model)

    def recompute(rows: Rows) -> torch.Tensor:
        """Pad on the right, where causal attention sees no padding."""
        lengths = torch.tensor([len(row) for row in rows], device=device)
        longest = max(len(row) for row in rows)
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=device)
        mask = torch.arange(longest, device=device) < lengths[:, None]
        even = all(len(row) == longest for row in rows)
        logits = forward_logits(model, ids, None if even else mask)
        return logits[torch.arange(len(rows), device=device), lengths - 1]

    every = recompute if step is None else step
    return lambda rows, running: every(rows)[running]


class _Cached:
    """Feed the prompts padded on the left, equal ones once, then one token a row.

    Rows that have stopped leave the batch when they are a quarter of it, as the cache is copied.
    Where each row of the batch has an adapter of its own (`bound`) all of them stay.
    """

    def __init__(self, model: nn.Module, rows: Rows, new: int, bound: bool):
        self.model, self.device, self.bound = model, device_of(model), bound
        first = {tuple(row): i for i, row in reversed(list(enumerate(rows)))}
        self.held = list(range(len(rows)) if bound else sorted(first.values()))
        self.copies = [self.held.index(i if bound else first[tuple(r)]) for i, r in enumerate(rows)]
        longest = max(len(row) for row in rows)
        self.cache = KVCache(model, len(self.held), longest + new)
        self.padding = [longest - len(row) for row in rows]

    def __call__(self, rows: Rows, running: list[int]) -> torch.Tensor:
        if not self.cache.length:
            logits = self._forward(rows)
            self._take(self.copies, running)
            return logits[self.copies]
        if not self.bound and 2 <= len(running) <= 0.75 * len(self.held):  # 1 would compile anew
            self._take([self.held.index(i) for i in running], running)
        logits = self._forward(rows)
        return logits[[self.held.index(i) for i in running]]

    def _take(self, copies: list[int], held: list[int]) -> None:
        """Hold these rows of the cache as the rows of these numbers."""
        if copies != list(range(self.cache.batch)):
            self.cache.take(copies)
        self.held = list(held)

    def _forward(self, rows: Rows) -> torch.Tensor:
        """Return the logits of the rows held."""
        pads = [self.padding[i] for i in self.held]  # a list: reading a tensor waits for a GPU
        rows, past = [rows[i] for i in self.held], self.cache.length
        padding, width = torch.tensor(pads, device=self.device), past + 1
        if past and self.model.outgrows((past - padding)[:, None]):  # type: ignore[operator]
            past = self.cache.length = 0
        if past:
            fed = [row[-1:] for row in rows]
        else:
            fed = [[0] * n + row for n, row in zip(pads, rows, strict=True)]
            fed = [row + [0] * (width - len(row)) for row in fed]  # those that have stopped
        ids = torch.tensor(fed, device=self.device)
        positions = mask = None
        if any(pads):
            new = torch.arange(past, past + ids.shape[1], device=self.device)[:, None]  # [T, 1]
            keys = torch.arange(past + ids.shape[1], device=self.device)  # [S]
            positions = (new.T - padding[:, None]).clamp(min=0)
            # A query in the padding sees itself: a row that sees nothing would be NaN.
            mask = (keys <= new) & (keys >= padding[:, None, None]) | (keys == new)
            mask = mask[:, None]  # [B, 1, T, S]
        return self.model(ids, positions=positions, mask=mask, cache=self.cache, last=1)[:, -1]


def _check_options(
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    compile: bool | str,
) -> None:
    if type(max_new_tokens) is not int or max_new_tokens < 1:
        raise ValueError(
            f"max_new_tokens must be a whole number of at least 1, found {short(max_new_tokens)}"
        )
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature must be 0 or a positive number, found {short(temperature)}")
    if top_k is not None and not 1 <= top_k < 2**63:
        raise ValueError(f"top_k must be at least 1 or None, found {short(top_k)}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must lie in (0, 1] or be None, found {short(top_p)}")
    if compile not in (True, False, "auto"):
        raise ValueError(f"compile must be True, False or 'auto', found {compile!r}")


def _stops(stop: Any, tokenizer: Any) -> tuple[set[int], list[str]]:
    """Sort stop ids and stop strings apart."""
    stops = [stop] if isinstance(stop, (str, int)) else list(stop)
    if bad := [value for value in stops if not isinstance(value, (str, int))]:
        raise TypeError(f"stop must hold strings and token ids, found {bad[0]!r}")
    strings = [value for value in stops if isinstance(value, str)]
    if "" in strings:
        raise ValueError("a stop string must not be empty: every text contains it")
    if strings and tokenizer is None:
        raise TypeError("stop strings need a tokenizer, found None; pass token ids or tokenizer=")
    ids = {value for value in stops if isinstance(value, int)}
    return ids | set(() if tokenizer is None else tokenizer.stop_ids), strings


def _encode(prompts: Any, tokenizer: Any, chat: bool, system: str | None) -> Rows:
    """Turn prompts into token ids."""
    if system is not None and not chat:
        raise ValueError("system needs chat=True, which puts it into the template")
    before = [] if system is None else [{"role": "system", "content": system}]
    prompts = [prompts] if isinstance(prompts, str) else prompts
    if not isinstance(prompts, (list, tuple)):
        raise TypeError(f"prompts must be a text or a list, found {type(prompts).__name__}")
    rows = []
    for i, prompt in enumerate(prompts):
        if isinstance(prompt, str):
            if tokenizer is None:
                raise TypeError(f"prompt {i} is a text and needs a tokenizer, found None")
            if chat:
                messages = [*before, {"role": "user", "content": prompt}]
                ids = tokenizer.encode_chat(messages, add_generation_prompt=True)
            else:
                warn_of_control(tokenizer, prompt, f"prompt {i}")
                ids = encode_prompt(tokenizer, prompt)
        elif chat:
            raise TypeError(f"chat=True needs texts, prompt {i} is {type(prompt).__name__}")
        else:
            ids = prompt.tolist() if isinstance(prompt, torch.Tensor) else prompt
        if not isinstance(ids, (list, tuple)) or any(type(token) is not int for token in ids):
            raise TypeError(
                f"prompts must be texts or lists of token ids, prompt {i} is {prompt!r:.40}"
            )
        if not ids:
            raise ValueError(f"prompt {i} must hold at least one token, found none")
        rows.append(list(ids))
    if not rows:
        raise ValueError("prompts must hold at least one prompt, found none")
    return rows


def _check_rows(rows: Rows, new: int, model: nn.Module) -> None:
    """Hold the prompts against the model's vocabulary and context."""
    vocabulary = getattr(getattr(model, "config", None), "vocab_size", None)
    for i, row in enumerate(rows):
        if min(row) < 0 or max(row) >= (2**31 if vocabulary is None else vocabulary):
            raise ValueError(
                f"token ids must lie in [0, {vocabulary or '2³¹'}), prompt {i} has "
                f"{short(min(row))} to {short(max(row))}"
            )
    context, longest = context_of(model), max(len(row) for row in rows)
    if longest + new > context:
        raise ValueError(
            f"the longest prompt and max_new_tokens must fit the model's context of {context} "
            f"tokens, found {longest} + {new}; shorten one of them"
        )
