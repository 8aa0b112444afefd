"""`minilora generate` and `chat`: what a model writes."""

import argparse
import importlib
import json
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import minilora
from minilora.cli.arguments import MODEL, SAMPLING, arg, positive, verb, without_effect
from minilora.cli.run_file import rows_of
from minilora.cli.sources import adapter_in_place, adapter_of, load, load_adapter, names_of
from minilora.files import said, short, ticking
from minilora.running import BASE, Chat

_HELP = """/reset         begin a new conversation
/again         answer the last question anew
/base          the base model's answer to the last question
/ab            from now on show every answer: the base's and each adapter's (again: stop)
/use NAME      go on with this adapter's answers, or with base
/system TEXT   begin a new conversation with another system message, or without one
/save FILE     add the conversation to a .jsonl file, as a row to train on
/quit          or Ctrl-D"""


@verb(
    "generate",
    *MODEL,
    "--adapter",
    arg("prompts", nargs="+", metavar="PROMPT"),
    arg("--max-new-tokens", type=positive, default=64, help="(default: 64)"),
    *SAMPLING,
    arg(
        "--chat",
        action=argparse.BooleanOptionalAction,
        help="ask through the chat template (default: where the adapter was trained so)",
    ),
    arg("--system", metavar="TEXT", help="system message"),
    arg("--compile", action="store_true", help="faster tokens after some ten seconds; needs g++"),
)
def generate(options: argparse.Namespace) -> int:
    """Continue a prompt."""
    if options.chat is None and rows_of(Path(options.adapter or options.model)).get("chat"):
        options.chat = True
        _say(
            "prompts are asked through the chat template, as the adapter was trained; --no-chat "
            "continues them as they are"
        )
    if options.system is not None and not options.chat:
        raise ValueError(without_effect("--system", ("--chat",)))
    model, tokenizer = load(options)
    if tokenizer.chat_template is not None and options.chat is None:
        _say(
            "prompts are continued as they are; --chat asks them through the chat template, as "
            "questions and conversations are trained on"
        )
    options.chat = bool(options.chat)
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "seed", "chat", "system", "compile")
    settings = {name: getattr(options, name) for name in names}
    with ticking("writing"):
        texts = minilora.generate(model, options.prompts, tokenizer=tokenizer, **settings)
    print(*texts, sep="\n")
    if empty := sum(not text.strip() for text in texts):
        print(f"the model ended {empty} of {len(texts)} texts at once", file=sys.stderr)
    return 0


@verb(
    "chat",
    *MODEL,
    arg(
        "--adapter",
        nargs="+",
        type=Path,
        default=[],
        help="folders with adapters, or names on the hub",
    ),
    arg("--system", metavar="TEXT", help="system message"),
    arg("--max-new-tokens", type=positive, default=512, help="of an answer (default: 512)"),
    *SAMPLING,
)
def chat(options: argparse.Namespace) -> int:
    """Talk to a model, with its adapters or without."""
    given = [*adapter_in_place(options), *options.adapter]
    adapters = [adapter_of(name, "--adapter") for name in given]
    options.adapter = None
    model, tokenizer = load(options)
    names = names_of(adapters)
    for name, folder in zip(names, adapters, strict=True):
        load_adapter(model, folder, name)
    settings = ("max_new_tokens", "temperature", "top_k", "top_p", "seed", "system")
    talk = Chat(
        model,
        tokenizer,
        adapter=names[0] if names else BASE,
        **{name: getattr(options, name) for name in settings},
    )
    shown = ", ".join([BASE, *names])
    _say(f"{options.model} ({shown}); answers of {talk.adapter}. /help lists the commands.")
    if tokenizer.chat_template is None:
        _say("it has no chat template: each question stands alone, in Alpaca's form")
    single = [n for n, f in zip(names, adapters, strict=True) if rows_of(f).get("questions") == 1]
    if single:
        _say(
            f"trained on single questions: {', '.join(single)}. A second question may be answered "
            f"wrongly; /reset begins a new conversation."
        )
    session = _Session(talk, names)
    while (line := _read()) is not None:
        try:
            if not session.take(line):
                break
        except (ValueError, RuntimeError, OSError) as error:
            _say(said(error))
    return 0


def _read() -> str | None:
    """Return the next line that says something, None at the end."""
    asked = not sys.stdin.isatty()  # whether Ctrl-C, with nothing being answered, is the end
    while True:
        try:
            line = _line()
        except KeyboardInterrupt:
            print(file=sys.stderr)
            if asked:
                return None
            asked = True
            _say("/quit or Ctrl-D ends the conversation; so does Ctrl-C again")
            continue
        if not line:
            return None
        if line.strip():
            return line.strip()


def _line() -> str:
    """Return a line with its end, "" after the last; on a terminal it can be edited."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        print("> " * sys.stdin.isatty(), end="", file=sys.stderr, flush=True)
        return sys.stdin.readline()
    with suppress(ImportError):  # not on Windows, whose terminal edits lines itself
        importlib.import_module("readline")
    try:
        return input("> ") + "\n"
    except EOFError:
        print(file=sys.stderr)
        return ""


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def _write(text: str) -> None:
    print(text, end="", flush=True)


def _take_none(command: str, rest: str) -> None:
    if rest.strip():
        raise ValueError(f"/{command} takes no argument, found {short(rest.strip())}; leave it out")


class _Session:
    """Carry out one line after another; `_HELP` says what each command does."""

    def __init__(self, talk: Chat, names: list[str]) -> None:
        self.talk, self.names = talk, names
        self.side_by_side = False

    def take(self, line: str) -> bool:
        """Answer a question or follow a command; return whether to go on."""
        if not line.startswith("/"):
            self.ask(line)
            return True
        command, _, rest = line[1:].partition(" ")
        if command in ("quit", "exit"):
            _take_none(command, rest)
            return False
        commands: dict[str, Callable[[str], None]] = {
            "use": self.use,
            "system": self.system,
            "save": self.save,
        }
        alone: dict[str, Callable[[], None]] = {
            "reset": self.reset,
            "again": self.again,
            "base": self.base,
            "ab": self.ab,
            "help": lambda: _say(_HELP),
        }
        if command in commands:
            commands[command](rest.strip())
        elif command in alone:
            _take_none(command, rest)
            alone[command]()
        else:
            raise ValueError(f"/{command} is no command; /help lists them")
        return True

    def ask(self, question: str) -> None:
        """Answer, and beside it as the others would where that is wanted."""
        others = [name for name in (BASE, *self.names) if name != self.talk.adapter]
        asked = [*self.talk.messages, {"role": "user", "content": question}]
        for name in others if self.side_by_side else ():
            _write(f"[{name}] ")
            self.talk.answer(asked, name, _write)
            _write("\n")
        if self.side_by_side:
            _write(f"[{self.talk.adapter}] ")
        self.talk.ask(question, _write)
        _write("\n")

    def reset(self) -> None:
        self.talk.messages.clear()
        _say("a new conversation")

    def use(self, name: str) -> None:
        self.talk.use(name)
        _say(f"the conversation goes on with answers of {name}")

    def again(self) -> None:
        self._last()
        before = list(self.talk.messages)
        *self.talk.messages, question, _ = before
        try:
            self.ask(question["content"])
        except BaseException:
            self.talk.messages = before
            raise

    def base(self) -> None:
        self._last()
        _write(f"[{BASE}] ")
        self.talk.answer(self.talk.messages[:-1], BASE, _write)
        _write("\n")

    def _last(self) -> None:
        if not self.talk.messages:
            raise ValueError("there must be a question before this, found none yet")

    def ab(self) -> None:
        if not self.names:
            raise ValueError("/ab compares adapters with the base, found none; pass --adapter")
        self.side_by_side = not self.side_by_side
        names = ", ".join([BASE, *self.names] if self.side_by_side else [self.talk.adapter])
        _say(f"from now on: answers of {names}")

    def system(self, text: str) -> None:
        self.talk.system = text or None
        self.talk.messages.clear()
        _say(f"a new conversation, {'with this' if text else 'without a'} system message")

    def save(self, name: str) -> None:
        if Path(name).suffix.lower() != ".jsonl":
            raise ValueError(f"/save needs a name that ends in .jsonl, found {name!r:.60}")
        self._last()
        first = [{"role": "system", "content": self.talk.system}] if self.talk.system else []
        row = json.dumps({"messages": [*first, *self.talk.messages]}, ensure_ascii=False)
        try:
            with open(name, "a+b") as file:
                begun = file.tell()  # at the end
                file.seek(max(0, begun - 1))
                unended = begun and file.read(1) != b"\n"
                file.write((b"\n" if unended else b"") + row.encode() + b"\n")
        except OSError as error:
            raise ValueError(
                f"/save needs a file that can be written, found {name}: {error.strerror}; name "
                f"another one"
            ) from None
        _say(f"the conversation is a row of {name}")
