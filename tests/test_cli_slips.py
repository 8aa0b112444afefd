"""What the command says to a slip of a newcomer: the nearest that there is, and what to write."""

import json
import runpy
import sys
import types
from pathlib import Path

import pytest
from huggingface_hub import errors
from safetensors.torch import load_file, save_file
from test_cli import tiny_folder

import minilora
from minilora import read_data
from minilora.cli.command import main
from minilora.loading import base_name
from minilora.loading.model import load_model, read_config, read_tokenizer

DATA = ["--data", "train.jsonl"]


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """A folder with a model, data in other words, and `out` with one adapter."""
    monkeypatch.chdir(tmp_path)
    tiny_folder(tmp_path / "model")
    rows = [{"frage": "a b c"[: 1 + 2 * (i % 3)], "antwort": "d e"} for i in range(9)]
    Path("train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    model, _ = load_model("model", dtype=None)
    minilora.save(minilora.inject(model, r=2), "out/b1")
    return tmp_path


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def asked(*_, **__):
        raise AssertionError("the hub was asked")

    for name in ("snapshot_download", "HfApi"):
        monkeypatch.setattr(f"huggingface_hub.{name}", asked)


@pytest.fixture
def said(capsys):
    """Run a command that must end with code 2, and return what it said."""

    def said(*words):
        capsys.readouterr()
        try:
            code = main([str(word) for word in words])
        except SystemExit as stop:
            code = stop.code
        text = capsys.readouterr().err
        assert code == 2
        return text.splitlines(keepends=True)[-1] if words else text

    return said


def test_a_command_that_is_mistyped_or_missing(said):
    assert "unknown command 'generat'; nearest: generate (see" in said("generat", "model", "a")
    assert "unknown command 'zzz' (see minilora --help)" in said("zzz")
    assert "unknown argument '--verion'; nearest: --version" in said("--verion")
    every = said()
    assert all(f"\n    {name} " in every for name in ("train", "chat", "plan"))


@pytest.mark.parametrize(("words", "message"), [
    (["generate", "model", "a", "--temperature", "abc"], "must be a number, found 'abc'"),
    (["generate", "model", "a", "--top-p", "x"], "--top-p: must be a number, found 'x'"),
    (["eval", "model", *DATA, "--skip-bad", "1.5"], "must be a whole number, found '1.5'"),
    (["data", "a.csv", "--model", "m", "--show", "all"], "must be a whole number, found 'all'"),
    (["plan", "gpt2", "--batch-size", "x"], "--batch-size: must be a whole number, found 'x'"),
    (["plan", "gpt2", "--memory", "8GB"], "--memory: must be a number, found '8GB'"),
    (["merge", "m", "--gguf", "a.gguf", "--type", "q4_0"],
     "--type: must be one of f32, f16, q8_0, bf16, found 'q4_0'; nearest: q8_0"),
    (["train", "m", *DATA, "--out", "x", "--dtype", "bf16"], "float16, found 'bf16'; nearest: bfl"),
])  # fmt: skip
def test_a_value_that_is_none_of_its_kind(said, words, message):
    assert message in said(*words)


@pytest.mark.parametrize("words", [
    ["chat", "out/b2"], ["check", "out/b2"], ["check", "./out/b2"], ["explain", "out/b2"],
    ["export", "out/b2", "new"], ["compare", "model", "out/b2", *DATA], ["plan", "out/b2"],
    ["eval", "out/b2", *DATA, "--map", "question=frage", "answer=antwort"],
    ["data", "train.jsonl", "--model", "out/b2", "--map", "question=frage", "answer=antwort"],
    ["generate", "model", "a", "--adapter", "out/b2"], ["generate", "/none/b2", "a"],
])  # fmt: skip
def test_of_a_path_that_is_not_there_the_nearest_is_said_first(said, words, monkeypatch):
    def offline(*_, **__):
        raise errors.OfflineModeIsEnabled

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    text = said(*words)
    path = next(word for word in words if word.endswith("b2"))
    found = f"found no folder or file '{Path(path)}'"
    if Path(path).is_absolute():
        assert found in text and "cache" not in text
    else:  # it might be a name of the hub
        assert f"{found} here (did you mean out/b1?), nor all of it in the cache" in text


def test_the_nearest_is_said_where_the_package_is_missing(said, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for words in (["chat", "out/b2"], ["eval", "model", "--data", "out/b2"]):
        start = "found no folder or file 'out/b2'; nearest: out/b1; reading it from the hub needs"
        assert start in said(*words)


def test_a_folder_of_adapters_names_the_first(said):
    for words in (["chat", "out"], ["check", "out"], ["generate", "model", "a", "--adapter", "out"],
                  ["plan", "out"], ["data", "train.jsonl", "--model", "out", "--map",
                   "question=frage", "answer=antwort"]):  # fmt: skip
        assert "did you mean out/b1?" in said(*words)


def named(base):
    """Let the adapter name another base."""
    file = Path("out/b1/adapter_config.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": base}))


def test_an_adapter_in_the_place_of_a_model_names_its_base(said):
    map_ = ["--map", "question=frage", "answer=antwort"]
    train = ["train", "out/b1", *DATA, *map_, "--out", "out/new"]
    for words in (train, ["targets", "out/b1"], ["plan", "out/b1", "--untimed"],
                  ["plan", "out/b1", *DATA, *map_]):  # fmt: skip
        text = said(*words)
        assert "this must be a model, found an adapter in 'out/b1'; pass the model that" in text
        assert "trained on, 'model' (train goes on from an adapter with --adapter" in text
    assert not Path("out/new").exists()
    named(hub := "HuggingFaceTB/SmolLM2-135M-Instruct")
    assert "trained on, 'smollm2-135m' (" in said(*train)
    for read in (load_model, read_config, read_tokenizer):
        with pytest.raises(ValueError, match="trained on, 'smollm2-135m'"):
            read("out/b1")
    assert base_name(Path("out/b1")) == "smollm2-135m"
    file = "out/b1/adapter_model.safetensors"
    save_file(load_file(file), file)  # another program's: it had the weights of the hub
    assert base_name(Path("out/b1")) == hub


def test_fields_that_are_named_the_wrong_way_round(said):
    words = ["data", "train.jsonl", "--model", "model", "--map"]
    text = said(*words, "frage=question", "antwort=answer")
    assert "found --map frage=question antwort=answer (in Python: " in text
    assert "write --map question=frage answer=antwort (in Python: " in text
    assert "skip" not in text  # all rows fail, so none is left out
    assert (
        "as in question=frage where your rows call the question frage, found 'question:frage'"
        in (said(*words, "question:frage"))
    )
    rows = [{"frage": "a", "antwort": "b"}]
    with pytest.raises(
        ValueError, match=r"in Python: fields=\{'question': 'frage', 'answer': 'ant"
    ):
        read_data(rows, read_tokenizer("model"))


def test_plan_reads_data_as_train_does(capsys):
    words = ["plan", "model", *DATA, "--max-length", "16", "--untimed", "--json"]
    assert main(words) == 2
    assert "--map question=frage answer=antwort" in capsys.readouterr().err
    map_ = ["--map", "question=frage", "answer=antwort", "--all-tokens", "--no-parse-special"]
    assert main([*words, *map_, "--skip-bad", "1"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["data"]["examples"] == 9
    command = found["advice"]["command"]
    assert (
        "--data train.jsonl --all-tokens --map question=frage answer=antwort --skip-bad 1 "
        "--no-parse-special --out" in command
    )
    assert main(command.split()[1:]) == 0


def test_how_data_is_read_needs_data(said):
    for verb, sets in ((["plan", "gpt2"], "--data"), (["explain", "out/b1"], "--data or --train")):
        for flag in (["--map", "a=b"], ["--chat"], ["--no-parse-special"], ["--skip-bad", "1"]):
            assert f"{flag[0]} does nothing without {sets}" in said(*verb, *flag)


def test_a_config_is_read_from_what_is_here(monkeypatch):
    monkeypatch.setattr("minilora.loading.model.fetch", None)
    for name in ("smollm2-135m", "./out/b2"):
        with pytest.raises(ValueError, match=f"in a folder or file, found no folder or.*'{name}'"):
            read_config(name)


def test_a_name_in_capitals_ends_as_it_must(said, monkeypatch):
    monkeypatch.setattr("minilora.cli.sources.load_model", None)
    assert "merge needs an adapter" in said("merge", "model", "--gguf", "m.GGUF")


def test_merge_refuses_before_the_model_is_loaded(said, monkeypatch):
    monkeypatch.setattr("minilora.cli.sources.load_model", None)
    for verb in ("merge", "export"):
        text = said(verb, "out/b1", "--gguf", "m.txt")
        assert "--gguf must name a file that ends in .gguf, found m.txt" in text
    named("HuggingFaceTB/SmolLM2-135M-Instruct")
    text = said("merge", "out/b1", "--out", "m")
    assert "--dtype says in what a merged folder is stored, found none and a base in" in text
    assert "(smollm2-135m)" in text


def test_a_tuning_that_is_refused_leaves_no_folder(said):
    map_ = ["--map", "question=frage", "answer=antwort"]
    tune = ["tune", "model", *DATA, "--valid", "train.jsonl", "--allow-shared", *map_]
    tune += ["--max-steps", "30", "--out", "new/exp"]
    assert "'q_prj' matches none" in said(*tune, "--targets", "q_prj")
    assert not Path("new").exists()
    Path("new/exp").mkdir(parents=True)
    said(*tune, "--targets", "q_prj")
    assert list(Path("new/exp").iterdir()) == []


def test_the_example_for_llama_cpp_looks_for_its_files(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "xllamacpp", types.SimpleNamespace(Server=None))
    script = Path(__file__).resolve().parents[1] / "examples" / "ask_llama_cpp.py"
    Path("a.gguf").touch()
    for words, missing in ((["b.gguf"], "b.gguf"), (["a.gguf", "--lora", "l.gguf"], "l.gguf")):
        monkeypatch.setattr(sys, "argv", [str(script), *words, "Why?"])
        with pytest.raises(SystemExit):
            runpy.run_path(str(script), run_name="__main__")
        assert f"found no file {missing}\n" in capsys.readouterr().err
