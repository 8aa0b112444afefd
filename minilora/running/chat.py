"""Talk to a model: turns that are kept, answers as they are written."""

from collections.abc import Callable
from contextlib import suppress
from typing import Any

from torch import nn

from minilora.data import ALPACA, encode_prompt
from minilora.lora import Survey
from minilora.running.arguments import context_of
from minilora.running.generation import generate
from minilora.text import as_tokenizer

BASE = "base"


class Chat:
    """Keep a conversation with a model and answer it.

    Without a chat template each question stands alone, in the form that `read_data` gives it.

    Args:
        model: with or without adapters; left as it was.
        tokenizer: of the model.
        system: the system message, or None.
        max_new_tokens: of an answer, at most.
        options: others of `generate`: `temperature`, `top_k`, `top_p`, `seed`, `compile`.

    Attributes:
        messages: the turns so far, without the system message.
        adapter: whose answers the conversation goes on with; `"base"` is none.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        adapter: str = BASE,
        system: str | None = None,
        max_new_tokens: int = 512,
        **options: Any,
    ) -> None:
        self.model, self.tokenizer = model, as_tokenizer(tokenizer, model)
        self.system, self.max_new_tokens, self.options = system, max_new_tokens, options
        self.messages: list[dict[str, str]] = []
        self.use(adapter)

    def use(self, adapter: str) -> None:
        """Go on with the answers of an adapter, or of the base.

        Raises:
            ValueError: no adapter of that name.
        """
        self._survey(adapter)
        self.adapter = adapter

    def _survey(self, adapter: str) -> Survey:
        """Survey the model as it is now: adapters come and go during a conversation."""
        survey = Survey(self.model)
        survey.require_unmerged("chat")
        names = [BASE, *survey.adapters]
        if adapter not in names:
            raise ValueError(f"an adapter must be one of {', '.join(names)}, found {adapter!r:.60}")
        return survey

    def ask(self, question: str, write: Callable[[str], None] = lambda text: None) -> str:
        """Answer a question and keep both.

        Args:
            question: the next turn of the user.
            write: called with each piece of the answer as it is written.

        Returns:
            The answer; what there is of it after Ctrl-C.

        Raises:
            ValueError: the conversation leaves no room in the model's context. It is as before.
        """
        turn = {"role": "user", "content": question}
        answer = self.answer([*self.messages, turn], self.adapter, write)
        if answer:  # an empty one could not be learned from, nor go on from
            self.messages += [turn, {"role": "assistant", "content": answer}]
        return answer

    def answer(
        self,
        messages: list[dict[str, str]],
        adapter: str,
        write: Callable[[str], None] = lambda text: None,
    ) -> str:
        """Return an adapter's answer to turns that are not kept; see `ask`."""
        ids = self._encoded(messages)
        context = context_of(self.model)
        room = min(self.max_new_tokens, context - len(ids))
        if room < 1:
            raise ValueError(
                f"the conversation must leave room in the model's context of {context} tokens, "
                f"found {len(ids)} in it; begin a new one (/reset)"
            )
        text: list[str] = []

        def stream(row: int, piece: str) -> None:
            text.append(piece)
            write(piece)

        survey = self._survey(adapter)
        with survey.switched():
            survey.activate(() if adapter == BASE else (adapter,))
            with suppress(KeyboardInterrupt):  # what has been written stays
                text = generate(
                    self.model,
                    [ids],
                    tokenizer=self.tokenizer,
                    max_new_tokens=int(room),
                    stream=stream,
                    **self.options,
                )
        return "".join(text)

    def _encoded(self, messages: list[dict[str, str]]) -> list[int]:
        if self.tokenizer.chat_template is None:
            before = f"{self.system}\n\n" if self.system else ""
            asked = ALPACA.format(system=before, question=messages[-1]["content"])
            return encode_prompt(self.tokenizer, asked)
        first = [] if self.system is None else [{"role": "system", "content": self.system}]
        return self.tokenizer.encode_chat([*first, *messages], add_generation_prompt=True)
