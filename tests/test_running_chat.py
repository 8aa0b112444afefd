"""Conversations: what is asked is what training saw, answers stream, nothing is changed."""

import io
import json
import os
import select
import subprocess
import sys
from contextlib import suppress

import pytest
import torch
from byte_tokenizer import CHATML, byte_tokenizer
from hypothesis import given
from hypothesis import strategies as st

import minilora
from minilora.cli import chatting
from minilora.cli.chatting import _Session
from minilora.cli.command import main
from minilora.loading.saving import save_pretrained
from minilora.models import Llama, LlamaConfig
from minilora.running import Chat
from minilora.running.generation import _certain

USER = {"role": "user", "content": "hi"}


def model(adapters=(), context=256):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=260, hidden_size=32, intermediate_size=40, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        max_position_embeddings=context,
    )  # fmt: skip
    found = Llama(config).eval()
    for name in adapters:
        minilora.inject(found, r=4, alpha=12, adapter=name)
        with torch.no_grad():
            for fqn, parameter in found.named_parameters():
                if f".{name}." in fqn:
                    parameter.normal_(std=0.4)
    return found


def asked(tokenizer, model, messages, **options):
    ids = tokenizer.encode_chat(messages, add_generation_prompt=True)
    return minilora.generate(model, [ids], tokenizer=tokenizer, **options)[0]


def test_answers_are_those_of_the_whole_conversation():
    tokenizer, made = byte_tokenizer(CHATML), model(["v1"])
    talk = Chat(made, tokenizer, adapter="v1", system="S", max_new_tokens=9)
    pieces = []
    first = talk.ask("hi", pieces.append)
    system = {"role": "system", "content": "S"}
    assert first == asked(tokenizer, made, [system, USER], max_new_tokens=9) == "".join(pieces)
    assert len(pieces) > 1
    turns = [USER, {"role": "assistant", "content": first}, {"role": "user", "content": "more"}]
    second = talk.ask("more")
    assert second == asked(tokenizer, made, [system, *turns], max_new_tokens=9)
    assert talk.messages == [*turns, {"role": "assistant", "content": second}]


def test_each_adapter_and_the_base_answer_and_nothing_is_changed():
    tokenizer, made = byte_tokenizer(CHATML), model(["v1", "v2"])
    minilora.activate(made, "v2")
    wanted = {"v2": asked(tokenizer, made, [USER], max_new_tokens=9)}
    with minilora.disabled(made):
        wanted["base"] = asked(tokenizer, made, [USER], max_new_tokens=9)
    minilora.activate(made, "v1")
    wanted["v1"] = asked(tokenizer, made, [USER], max_new_tokens=9)
    talk = Chat(made, tokenizer, max_new_tokens=9)
    assert {name: talk.answer([USER], name) for name in wanted} == wanted
    assert len(set(wanted.values())) == 3
    assert talk.messages == []
    talk.use("v2")
    assert talk.ask("hi") == wanted["v2"]
    assert asked(tokenizer, made, [USER], max_new_tokens=9) == wanted["v1"]
    with pytest.raises(ValueError, match="must be one of base, v1, v2, found 'v3'"):
        talk.use("v3")


def test_adapters_may_come_and_be_merged_during_a_conversation():
    tokenizer, made = byte_tokenizer(CHATML), model()
    talk = Chat(made, tokenizer, max_new_tokens=9)
    base = talk.answer([USER], "base")
    minilora.inject(made, r=4, alpha=12, adapter="v1")
    with torch.no_grad():
        for fqn, parameter in made.named_parameters():
            if ".v1." in fqn:
                parameter.normal_(std=0.4)
    assert talk.answer([USER], "base") == base
    talk.use("v1")
    assert talk.ask("hi") == asked(tokenizer, made, [USER], max_new_tokens=9) != base
    minilora.merge(made)
    with pytest.raises(RuntimeError, match=r"chat\(\) needs unmerged weights"):
        talk.answer([USER], "base")


def test_without_a_template_a_question_is_asked_as_it_is_learned():
    tokenizer, made = byte_tokenizer(None), model()
    talk = Chat(made, tokenizer, system="S", max_new_tokens=5)
    talk.ask("before")
    record = {"question": "hi", "answer": "X", "system": "S"}
    example = minilora.read_data([record], tokenizer)[0][0]
    prompt = [i for i, label in zip(example.input_ids, example.labels, strict=True) if label < 0]
    found = minilora.generate(made, [prompt], tokenizer=tokenizer, max_new_tokens=5)
    assert talk.ask("hi") == found[0]


def test_a_full_context_is_refused_and_the_last_room_is_used():
    tokenizer = byte_tokenizer(CHATML)
    used = len(tokenizer.encode_chat([USER], add_generation_prompt=True))
    talk = Chat(model(context=used + 2), tokenizer, max_new_tokens=50)
    talk.ask("hi")
    before = list(talk.messages)
    with pytest.raises(
        ValueError, match=rf"context of {used + 2} tokens, found \d+ in it; .*/reset"
    ):
        talk.ask("more")
    assert talk.messages == before


def test_an_interrupted_answer_keeps_what_was_written():
    talk = Chat(model(), byte_tokenizer(CHATML), max_new_tokens=30)

    def interrupt(piece):
        written.append(piece)
        if len(written) == 3:
            raise KeyboardInterrupt

    written = []
    assert talk.ask("hi", interrupt) == "".join(written)
    assert len(written) == 3
    assert talk.messages[-1]["content"] == "".join(written)


def test_an_empty_answer_is_not_kept():
    talk = Chat(model(), byte_tokenizer(CHATML), max_new_tokens=30)

    talk.answer = lambda *arguments: ""
    assert talk.ask("hi") == ""
    assert talk.messages == []


@given(st.text("abc"), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3))
def test_what_is_streamed_never_has_to_be_taken_back(text, stops):
    """Every longer text, cut at its first stop string, begins with what was certain before."""
    ends = (end for end in range(len(text) + 1) if any(stop in text[:end] for stop in stops))
    text = text[: next(ends, len(text))]  # where generation ends
    found = min((text.find(stop) for stop in stops if stop in text), default=len(text))
    for end in range(len(text) + 1):
        assert text[:found].startswith(text[: _certain(text[:end], stops)])


def test_stream_needs_a_tokenizer_and_system_a_chat():
    made = model()
    with pytest.raises(TypeError, match="stream needs a tokenizer, found None"):
        minilora.generate(made, [[1]], stream=print)
    with pytest.raises(ValueError, match="system needs chat=True"):
        minilora.generate(made, "a", tokenizer=byte_tokenizer(CHATML), system="S")


def test_a_stream_is_the_text_row_by_row():
    tokenizer, made = byte_tokenizer(CHATML), model()
    found = {0: "", 1: ""}

    def stream(row, piece):
        found[row] += piece

    options = {"tokenizer": tokenizer, "max_new_tokens": 12, "temperature": 1.0, "seed": 3}
    texts = minilora.generate(made, ["é", "bcd"], stop=["e"], stream=stream, **options)
    assert (
        texts
        == [found[0], found[1]]
        == minilora.generate(made, ["é", "bcd"], stop=["e"], **options)
    )


# --- the command ----------------------------------------------------------------------------------


@pytest.fixture
def folders(tmp_path):
    made, tokenizer = model(["v1", "v2"]), byte_tokenizer(CHATML)
    for name in ("v1", "v2"):
        minilora.save(made, tmp_path / name, name, base_name=str(tmp_path / "model"))
    minilora.delete(made, "v1")
    minilora.delete(made, "v2")
    save_pretrained(made, tmp_path / "model", tokenizer)
    return tmp_path


@pytest.fixture
def session(folders, monkeypatch, capsys):
    """Hold a conversation with the command; return its exit code and what it wrote."""

    def hold(lines, *arguments, model="model"):
        words = ["chat", folders / model, "--dtype", "float32", "--max-new-tokens", 6, *arguments]
        monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
        capsys.readouterr()
        return main(list(map(str, words))), *capsys.readouterr()

    return hold


def test_the_command_answers_side_by_side_and_saves_what_was_said(folders, session):
    made, tokenizer = model(["v1", "v2"]), byte_tokenizer(CHATML)
    talks = {name: Chat(made, tokenizer, max_new_tokens=6) for name in ("base", "v1", "v2")}
    told = {name: talk.answer([USER], name) for name, talk in talks.items()}
    saved = folders / "talk.jsonl"
    saved.write_text('{"messages": "whose line has no end"}')
    lines = [
        "/ab", "hi", "/ab", "/again", "/base", f"/save {saved}", "/what", "/reset", "/base",
        "/use v3", "/use v2", "old", "/system S", "hi", f"/save {saved}", "/save a.txt",
        "/help", "/quit", "never",
    ]  # fmt: skip
    code, out, err = session(lines, "--adapter", folders / "v2" / "v2", model="v1/v1")
    assert code == 0, err
    wanted = [f"[base] {told['base']}", f"[v2] {told['v2']}", f"[v1] {told['v1']}", told["v1"]]
    old = talks["v2"].answer([{"role": "user", "content": "old"}], "v2")
    talks["v2"].system = "S"  # a new conversation, as its turns were answered without it
    wanted += [f"[base] {told['base']}", old, talks["v2"].answer([USER], "v2")]
    assert out == "".join(f"{line}\n" for line in wanted)
    rows = [json.loads(line)["messages"] for line in saved.read_text("utf-8").splitlines()][1:]
    assert rows[0] == [USER, {"role": "assistant", "content": told["v1"]}]
    assert rows[1][:2] == [{"role": "system", "content": "S"}, USER]
    for message in (
        "(base, v1, v2); answers of v1. /help lists the commands.",
        "\na new conversation\n",
        "\nthe conversation goes on with answers of v2\n",
        "\na new conversation, with this system message\n",
        "from now on: answers of base, v1, v2",
        "from now on: answers of v1",
        f"the conversation is a row of {saved}",
        "/what is no command; /help lists them",
        "there must be a question before this, found none yet",
        "must be one of base, v1, v2, found 'v3'",
        "/save needs a name that ends in .jsonl, found 'a.txt'",
        "/reset         begin a new conversation",
    ):
        assert message in err


def test_a_line_can_be_edited_on_a_terminal():
    """An arrow key moves within the line; one process that imports torch."""
    pty = pytest.importorskip("pty")
    pytest.importorskip("readline")
    mine, theirs = pty.openpty()
    code = "from minilora.cli.chatting import _read; print('ready', repr(_read()), repr(_read()))"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=theirs, stdout=theirs, stderr=subprocess.DEVNULL
    ) as child:
        os.close(theirs)
        said, keys = b"", [b"ac\x1b[Db\n", b"\x04"]  # left, then b; at the end Ctrl-D
        with suppress(OSError):  # when the other side is closed
            while select.select([mine], [], [], 60)[0] and (found := os.read(mine, 1000)):
                said += found
                if keys and said.count(b"> ") > 2 - len(keys):  # when it is asked for
                    os.write(mine, keys.pop(0))
        os.close(mine)
    assert child.returncode == 0
    assert b"ready 'abc' None" in said


def test_the_command_refuses_before_it_loads(folders, capsys):
    assert main(["chat", str(folders / "model"), "--adapter", str(folders / "none")]) == 2
    assert "--adapter must name a folder with adapter_config.json" in capsys.readouterr().err


def test_adapters_of_one_name_are_told_apart(folders, session):
    adapters = [folders / "v1" / "v1", folders / "v1" / ".." / "v1" / "v1", folders / "v2" / "v2"]
    code, _, err = session(["/quit"], "--adapter", *adapters)
    assert code == 0
    assert "(base, v1, v1_2, v2); answers of v1." in err


def test_again_takes_nothing_back_where_there_is_no_room():
    tokenizer = byte_tokenizer(CHATML)
    used = len(tokenizer.encode_chat([USER], add_generation_prompt=True))
    talk = Chat(model(context=used + 4), tokenizer, max_new_tokens=4)
    talk.ask("hi")
    before = list(talk.messages)
    talk.system = "longer now"
    with pytest.raises(ValueError, match="must leave room"):
        _Session(talk, []).take("/again")
    assert talk.messages == before


def test_ab_needs_an_adapter(session):
    code, out, err = session(["/ab"])
    assert (code, out) == (0, "")
    assert "/ab compares adapters with the base, found none; pass --adapter" in err


def test_what_a_command_can_not_do_is_said(session, folders):
    saved = folders / "none" / "x.jsonl"
    lines = ["/reset now", "/base x", "/quit now", "hi", f"/save {saved}", "/system", "/use base"]
    code, _, err = session(lines, model="v1/v1")
    assert code == 0 and "trained on" not in err
    for message in (
        "/reset takes no argument, found 'now'; leave it out",
        "/base takes no argument, found 'x'; leave it out",
        "/quit takes no argument, found 'now'; leave it out",
        f"/save needs a file that can be written, found {saved}: No such file or directory; name",
        "a new conversation, without a system message",
        "the conversation goes on with answers of base",
    ):
        assert f"\n{message}" in err


def test_ctrl_c_at_an_empty_prompt_is_asked_for_twice(monkeypatch, capsys):
    typed = [KeyboardInterrupt, "hi\n", KeyboardInterrupt, KeyboardInterrupt]

    def line():
        if isinstance(each := typed.pop(0), str):
            return each
        raise each

    monkeypatch.setattr(chatting, "_line", line)
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    assert (chatting._read(), chatting._read(), typed) == ("hi", None, [])
    hint = "/quit or Ctrl-D ends the conversation; so does Ctrl-C again"
    assert capsys.readouterr().err.count(hint) == 2
