"""The command, run as a user runs it, on a tiny model in a folder and on the real SmolLM2."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers
from transformers import GenerationConfig

import minilora
from minilora.cli.arguments import VERBS
from minilora.cli.command import main
from minilora.cli.sources import names_of
from minilora.loading.model import load_model, read_tokenizer
from minilora.loading.saving import save_pretrained
from minilora.models import Llama, LlamaConfig
from minilora.text.tokenizer import Tokenizer
from minilora.training.state import load_state

ROWS = [
    {"prompt": f"What is {a} plus {b}?", "completion": f" The sum of {a} and {b} is {a + b}."}
    for a in range(4)
    for b in range(2)
]


@pytest.fixture
def data(tmp_path):
    file = tmp_path / "sums.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return file


def run(*arguments):
    return main([str(argument) for argument in arguments])


def tiny_folder(folder, dtype=torch.float32, config=None):
    """Write a tiny Llama that reads words of one letter."""
    torch.manual_seed(0)
    vocabulary = {"<s>": 0, "<end>": 1, **{chr(97 + i): 2 + i for i in range(26)}}
    backend = Backend(models.WordLevel(vocabulary, unk_token="<s>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(["<s>", "<end>"])
    config = config or LlamaConfig(
        vocab_size=28, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=6, max_position_embeddings=32,
        eos_token_id=1,
    )  # fmt: skip
    model = Llama(config).to(dtype)
    save_pretrained(model, folder, Tokenizer(backend, eos="<end>", stop_ids={1}))
    return folder


@pytest.fixture
def folder(tmp_path):
    return tiny_folder(tmp_path / "model", torch.bfloat16)


@pytest.fixture
def letters(tmp_path):
    file = tmp_path / "letters.jsonl"
    file.write_text("".join(json.dumps({"text": "a b c d e"}) + "\n" for _ in range(8)))
    return file


@pytest.fixture
def no_model(monkeypatch):
    """Fail where a model is loaded: what is wrong must be said before."""

    def fail(*arguments, **options):
        raise AssertionError("the model was loaded")

    for module in ("adapters", "sources"):
        monkeypatch.setattr(f"minilora.cli.{module}.load_model", fail)


def dtypes(file):
    with safe_open(file, "pt") as opened:
        return {opened.get_slice(key).get_dtype() for key in opened.keys()}  # noqa: SIM118


def test_cli_train_and_merge_keep_the_stored_dtype(folder, letters, tmp_path, capsys):
    out = tmp_path / "run"
    train = ["train", folder, "--data", letters, "--valid", letters, "--allow-shared", "--out", out]
    assert run(*train, "--max-steps", 3, "--max-length", 32, "--lora-plus-ratio", 4) == 0
    assert "held out after" in capsys.readouterr().out
    config = load_state(out)[1]["identity"]["config"]
    assert config["lora_plus_ratio"] == 4.0 and config["dtype"] == "auto"
    merge = ["merge", folder, "--adapter", out]
    assert run(*merge, "--out", tmp_path / "a") == 0
    assert "weights in bfloat16" in capsys.readouterr().out
    assert dtypes(tmp_path / "a" / "model.safetensors") == {"BF16"}
    assert run(*merge, "--out", tmp_path / "b", "--dtype", "float32") == 0
    assert "weights in float32" in capsys.readouterr().out
    assert dtypes(tmp_path / "b" / "model.safetensors") == {"F32"}
    modes = {
        (tmp_path / "b" / name).stat().st_mode for name in ("model.safetensors", "config.json")
    }
    assert len(modes) == 1


def test_cli_train_computes_in_float32_where_asked(folder, letters, tmp_path, capsys):
    train = ["train", folder, "--data", letters, "--max-length", 32, "--max-steps", 1]
    assert run(*train, "--out", tmp_path / "run", "--dtype", "float32") == 0
    assert "base float32, no autocast" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cli_train_needs_the_gpu_it_is_asked_for(folder, letters, tmp_path, capsys):
    train = ["train", folder, "--data", letters, "--max-length", 32, "--device", "cuda"]
    assert run(*train, "--out", tmp_path / "run") == 2
    assert "device 'cuda' needs a GPU that torch can use, found none" in capsys.readouterr().err


def test_cli_trains_and_generates_in_float16(folder, letters, tmp_path, capsys):
    train = ["train", folder, "--data", letters, "--max-length", 32, "--max-steps", 2]
    assert run(*train, "--out", tmp_path / "run", "--dtype", "float16") == 0
    assert "base float16, no autocast, losses scaled by 256" in capsys.readouterr().err
    assert dtypes(tmp_path / "run" / "adapter_model.safetensors") == {"F32"}
    generate = ["generate", folder, "--adapter", tmp_path / "run", "--dtype", "float16"]
    assert run(*generate, "a b c", "--max-new-tokens", 3) == 0
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("stream", [(), ("--stream",)])
def test_cli_leaves_out_bad_rows_where_asked(folder, letters, tmp_path, capsys, stream, recwarn):
    letters.write_text(letters.read_text() + '{"text": ""}\n{"text": "a b", "id": 1}\n')
    train = ["train", folder, "--data", letters, "--max-length", 32, "--max-steps", 2, *stream]
    assert run(*train, "--out", tmp_path / "run") == 2
    said = capsys.readouterr().err
    assert "letters.jsonl:9: text must not be empty; mend these rows, or leave them out" in said
    assert run(*train, "--out", tmp_path / "again", "--skip-bad", 1) == 0
    said = capsys.readouterr().err + " ".join(str(each.message) for each in recwarn)
    assert "left out: " in said and "letters.jsonl:9: text must not be empty" in said
    assert "ignored fields, with how often they occur: id (1)" in said


def test_cli_reads_control_tokens_in_texts_where_asked(folder, tmp_path, capsys):
    file = tmp_path / "names.jsonl"
    file.write_text('{"text": "a b <end> c"}\n')
    counts = []
    for flags in ((), ("--parse-special",), ("--no-parse-special",)):
        assert run("eval", folder, "--data", file, "--json", *flags) == 0
        said = capsys.readouterr()
        counts.append(json.loads(said.out)["tokens"])
        named = "names of control tokens are read as text" in said.err
        assert named == ("--parse-special" not in flags)
    assert counts[0] == counts[2] > counts[1] == 4


def test_cli_cuts_a_text_file_into_windows(folder, tmp_path, capsys):
    """Every token but the first is learned once, whatever the window."""
    file = tmp_path / "long.txt"
    file.write_text("a b c d e f g h i j " * 5)
    found = {}
    for length in (2, 7, 10, 32):
        assert run("eval", folder, "--data", file, "--max-length", length, "--json") == 0
        said = capsys.readouterr()
        found[length] = json.loads(said.out)["tokens"]
        assert "51 tokens in" in said.err
    assert set(found.values()) == {50}
    assert "2 windows of up to 32" in said.err


def test_cli_merge_refuses_a_folder_that_holds_something(folder, tmp_path, no_model, capsys):
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert run("merge", folder, "--adapter", tmp_path, "--out", folder) == 2
    assert "--out must be a new or empty folder" in capsys.readouterr().err
    assert before == {file.name: file.read_bytes() for file in folder.iterdir()}
    (tmp_path / "file").touch()
    assert run("merge", folder, "--adapter", tmp_path, "--out", tmp_path / "file") == 2
    assert run("merge", folder, "--adapter", tmp_path, "--out", tmp_path / "new") == 2
    assert "found no adapter_config.json in" in capsys.readouterr().err


def test_cli_exports_and_checks_an_adapter(folder, letters, tmp_path, capsys):
    run_folder, new = tmp_path / "run", tmp_path / "new"
    train = ["train", folder, "--data", letters, "--out", run_folder, "--max-steps", 2]
    assert run(*train, "--max-length", 32, "--dora", "--r", 2, "--rslora") == 0
    capsys.readouterr()
    assert run("check", run_folder) == 1
    said = capsys.readouterr().out
    assert "PEFT: yes" in said and "vLLM: no\n  - use_dora (first: " in said
    assert run("export", run_folder, new) == 2
    assert "export() needs r=... for a DoRA adapter" in capsys.readouterr().err
    assert not new.exists()
    assert run("export", run_folder, new, "--r", 24, "--dtype", "bfloat16") == 0
    said = capsys.readouterr().out
    assert "relative error" in said and "llama.cpp: yes" in said
    assert dtypes(new / "adapter_model.safetensors") == {"BF16"}
    assert run("check", new) == 0
    ids = torch.tensor([[3, 4, 5, 6]])
    outputs = []
    for adapter in (run_folder, new):
        model, _ = load_model(folder, dtype=torch.float32)
        outputs.append(minilora.load(model, adapter)(ids).detach())
    torch.testing.assert_close(*outputs, rtol=0.01, atol=0.01)
    assert run("export", run_folder, new) == 2
    assert "NEW must be a new or empty folder, found files at" in capsys.readouterr().err


def test_cli_export_needs_a_model_and_an_adapter(folder, tmp_path, capsys):
    assert run("export", tmp_path, tmp_path / "new") == 2
    assert "OUT must name a folder with adapter_config.json" in capsys.readouterr().err
    assert run("check", tmp_path) == 2
    assert "adapter_config.json is missing" in capsys.readouterr().err
    model, _ = load_model(folder)
    model.name_or_path = None
    minilora.save(minilora.inject(model, r=2), tmp_path)
    assert run("export", tmp_path, tmp_path / "new") == 2
    assert "must name its base, found none; pass --model" in capsys.readouterr().err
    assert run("export", tmp_path, tmp_path / "new", "--model", folder) == 0
    assert "layers, exact" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--r", 0], "--r/--rank: r must be a whole number of at least 1, found 0"),
        (["--r", 10**9], "at most 65,536, found 1000000000"),
        (["--batch-size", 2**31], "batch_size must be a whole number of at least 1, at most 2,147"),
        (["--max-length", 1], "--max-length: must be at least 2"),
        (["--alpha", 0], "--alpha: alpha must be a finite number other than 0"),
        (["--dropout", 1], "--dropout: dropout must lie in [0, 1), found 1.0"),
        (["--lr", 0], "lr must be a finite number above 0"),
        (["--lora-plus-ratio", 0], "lora_plus_ratio must be a finite number above 0"),
        (["--resume"], "resume needs"),
        (["--valid", "missing.jsonl"], "missing.jsonl"),
    ],
)
def test_cli_train_refuses_options_before_it_loads_the_model(
    letters, tmp_path, no_model, capsys, options, message
):
    command = ["train", "model", "--data", letters, "--out", tmp_path / "run", *options]
    try:
        assert run(*command) == 2
    except SystemExit as stop:
        assert stop.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_cli_train_refuses_an_out_that_holds_an_adapter(letters, tmp_path, no_model, capsys):
    (tmp_path / "adapter_config.json").touch()
    assert run("train", "model", "--data", letters, "--out", tmp_path) == 2
    assert "found adapter_config.json" in capsys.readouterr().err


def test_cli_names_the_file_in_which_nothing_is_left_to_learn(folder, tmp_path, capsys):
    file = tmp_path / "long.jsonl"
    file.write_text(json.dumps({"prompt": "a b " * 15, "completion": " b"}) + "\n")
    train = ["train", folder, "--data", file, "--out", tmp_path / "run"]
    assert run(*train, "--max-length", 8, "--max-steps", 1) == 2
    error = capsys.readouterr().err
    assert f"{file} must hold something to learn" in error and "raise --max-length" in error
    assert run(*train, "--max-length", 8, "--max-steps", 1, "--all-tokens") == 0


def test_cli_train_names_max_length_where_the_model_reads_less(folder, tmp_path, capsys):
    file = tmp_path / "long.jsonl"
    file.write_text(json.dumps({"text": "a " * 50}) + "\n")
    assert run("train", folder, "--data", file, "--out", tmp_path / "run") == 2
    assert "context of 32 tokens, but example 0 of train has 51" in capsys.readouterr().err


def test_cli_help_names_every_command(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert [name for name in VERBS if f"    {name} " not in text] == []


def test_a_head_that_shares_its_weight_is_merged_apart_where_asked(tmp_path, capsys):
    config = LlamaConfig(
        vocab_size=28, hidden_size=24, intermediate_size=40, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, head_dim=6, tie_word_embeddings=True,
    )  # fmt: skip
    folder = tiny_folder(tmp_path / "model", config=config)
    model, _ = load_model(folder, dtype="float32")
    minilora.inject(model, r=2, alpha=3, targets=["embed_tokens"])
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, generator=torch.manual_seed(0))
    minilora.save(model, tmp_path / "adapter")
    merge = ["merge", tmp_path / "adapter", "--out", tmp_path / "merged"]
    assert run(*merge) == 2
    assert "both share one weight; pass --untie (in Python: untie=True)" in capsys.readouterr().err
    assert run(*merge, "--untie") == 0
    ids = torch.arange(28)[None]
    found = load_model(tmp_path / "merged", dtype="float32")[0](ids)
    assert (found - model(ids)).abs().max() < 1e-5


def test_all_linear_is_a_target_on_the_command_line(folder, letters, tmp_path, capsys):
    assert run("targets", folder, "--targets", "all-linear") == 0
    named = capsys.readouterr().out
    assert run("targets", folder) == 0
    assert capsys.readouterr().out == named and "down_proj" in named
    train = ["train", folder, "--data", letters, "--max-length", 32, "--max-steps", 1]
    assert run(*train, "--targets", "all-linear", "--out", tmp_path / "a") == 0
    stored = json.loads((tmp_path / "a" / "adapter_config.json").read_text())["target_modules"]
    assert len(stored) == 7


def test_what_ends_a_text_goes_with_the_model(folder, tmp_path):
    """Merged or quantized: generation_config.json may state more ends than config.json."""
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 5]}')
    model, _ = minilora.load_model(folder)
    minilora.save(minilora.inject(model, r=2), tmp_path / "adapter")
    assert run("merge", tmp_path / "adapter", "--out", tmp_path / "m") == 0
    assert run("quantize", folder, "--format", "int8", "--out", tmp_path / "q") == 0
    for made in (tmp_path / "m", tmp_path / "q"):
        assert GenerationConfig.from_pretrained(made).eos_token_id == [1, 5]
        assert read_tokenizer(made).stop_ids == {1, 5}


@pytest.mark.real_model
def test_cli_train_eval_generate_merge(data, tmp_path, capsys):
    """Train, measure, ask, merge; transformers loads what merge wrote.

    Some 15 s: the real model is read four times, and written once.
    """
    out, merged = tmp_path / "run", tmp_path / "merged"
    train = ["train", "smollm2-135m", "--data", data, "--valid", data, "--allow-shared"]
    train += ["--out", out, "--alpha", 16, "--max-steps", 4, "--lr", "2e-3", "--batch-size", 4]
    assert run(*train, "--dtype", "float32") == 0
    said = capsys.readouterr().out
    losses = re.findall(r"^held out (?:before|after): +loss ([\d.]+)", said, re.M)
    before, after = map(float, losses)
    assert after < 0.7 * before
    assert "| weights | smollm2-135m |" in (out / "README.md").read_text("utf-8"), "4-bit ones"
    evaluate = ["eval", "smollm2-135m", "--dtype", "float32", "--data", data, "--json"]
    assert run(*evaluate, "--adapter", out) == 0
    found = json.loads(capsys.readouterr().out)["loss"]
    assert found == pytest.approx(after, abs=1e-4)
    ask = ["generate", "smollm2-135m", "What is 3 plus 2?", "--adapter", out]
    assert run(*ask, "--dtype", "float32", "--max-new-tokens", 6) == 0
    assert "sum" in capsys.readouterr().out
    merge = ["merge", "smollm2-135m", "--dtype", "float32", "--adapter", out, "--out", merged]
    assert run(*merge) == 0
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    ours, tokenizer = load_model(merged, dtype=torch.float32)
    assert isinstance(ours, Llama)
    ids = torch.tensor([tokenizer.encode("What is 3 plus 2?")])
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.real_model
def test_cli_targets_lists_the_head_as_left_out(capsys):
    assert run("targets", "smollm2-135m", "--r", 4) == 0
    text = capsys.readouterr().out
    assert "lm_head" in text and "(left out)" in text and "210 of 211 linear layers" in text


def test_cli_bad_input_is_one_line_and_exit_2(tmp_path, capsys):
    missing = tmp_path / "none"
    assert run("targets", missing) == 2
    error = capsys.readouterr().err
    assert error.startswith("minilora targets: a model is a folder") and error.count("\n") == 1
    assert run("fetch", "gpt-9") == 2
    assert "smollm2-135m" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        run("train")
    assert stop.value.code == 2


def test_cli_reports_bad_lines_by_file_and_number(tmp_path, no_model, capsys):
    file = tmp_path / "bad.jsonl"
    file.write_text('{"text": "fine"}\n{"txt": "typo"}\nnot json\n')
    assert run("eval", "smollm2-135m", "--data", file) == 2
    error = capsys.readouterr().err
    assert f"{file}:2:" in error and f"{file}:3:" in error


def test_cli_train_passes_the_adapters_options_on(folder, letters, tmp_path, capsys):
    out = tmp_path / "run"
    train = ["train", folder, "--data", letters, "--max-length", 32, "--max-steps", 2]
    options = ["--dora", "--modules-to-save", "model.norm", "--targets", "q_proj", "--r", 2]
    assert run(*train, "--out", out, *options) == 0
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["use_dora"], config["modules_to_save"]) == (True, ["model.norm"])
    assert run(*train, "--out", tmp_path / "b", "--bias", "all") == 2
    assert "bias='all' must find a bias to train, found none" in capsys.readouterr().err


def test_cli_train_packs_streams_and_keeps_tokens(folder, tmp_path, capsys):
    file = tmp_path / "some.jsonl"
    file.write_text(
        "".join(json.dumps({"text": "a b c d e"[: 2 * n + 1]}) + "\n" for n in (1, 4, 2))
    )
    train = ["train", folder, "--data", file, "--max-length", 16, "--max-steps", 2]
    assert run(*train, "--out", tmp_path / "a", "--pack", "--token-cache", tmp_path / "c") == 0
    said = capsys.readouterr().err
    assert "3 of 3 documents kept (text): 13 tokens" in said
    assert "3 documents packed in 1 rows, 13 tokens, 0.0 % padding" in said
    assert run(*train, "--out", tmp_path / "b", "--token-cache", tmp_path / "c") == 0
    assert "0 dropped with nothing left to learn; note: from the cache" in capsys.readouterr().err
    assert run(*train, "--out", tmp_path / "d", "--stream") == 0
    assert "a stream of examples, in windows of 400" in capsys.readouterr().err
    assert run(*train[:-2], "--out", tmp_path / "e", "--stream") == 2
    assert "a stream has no known length" in capsys.readouterr().err
    assert run(*train, "--out", tmp_path / "f", "--stream", "--pack") == 0
    assert "windows of 400, packed into rows of 16 tokens" in capsys.readouterr().err
    assert run(*train, "--out", tmp_path / "g", "--stream", "--token-cache", tmp_path / "c") == 2
    assert "--stream encodes during it; leave one out" in capsys.readouterr().err


def test_cli_stream_names_a_bad_file_before_the_model(folder, letters, tmp_path, capsys, no_model):
    train = ["train", folder, "--max-steps", 1, "--out", tmp_path / "a", "--stream", "--data"]
    (tmp_path / "b.txt").write_text("a b")
    os.mkfifo(tmp_path / "pipe.jsonl")
    for name, message in (
        ("none.jsonl", f"found no file '{tmp_path / 'none.jsonl'}'"),
        ("b.txt", "b.txt: only .jsonl, "),
        ("pipe.jsonl", "pipe.jsonl: must be a regular file, found another kind"),
    ):
        assert run(*train, letters, tmp_path / name) == 2
        assert message in capsys.readouterr().err


def test_cli_sample_needs_evaluations(folder, letters, tmp_path, capsys, no_model):
    train = ["train", folder, "--data", letters, "--max-steps", 1, "--out", tmp_path / "a"]
    assert run(*train, "--sample", "a b") == 2
    assert "--sample writes at each evaluation, which needs --valid" in capsys.readouterr().err


def test_cli_train_plans_where_asked(folder, letters, tmp_path, capsys, monkeypatch):
    """What `fit(plan=True)` says is tested with fit, and takes its time."""

    def fit(*_, plan, **__):
        raise ValueError(f"plan is {plan}")

    monkeypatch.setattr(minilora, "fit", fit)
    arguments = ("train", folder, "--data", letters, "--out", tmp_path / "out")
    for options, message in (
        (["--plan"], "plan is True"),
        ([], "plan is False"),
        (["--plan", "--stream"], "--plan counts the examples, which --stream does not know"),
    ):
        assert run(*arguments, *options) == 2
        assert message in capsys.readouterr().err


def test_cli_train_on_a_stream_names_the_bad_line(folder, letters, tmp_path, capsys):
    letters.write_text(letters.read_text() + '{"txt": "a"}\n')
    train = ["train", folder, "--data", letters, "--stream", "--max-steps", 3, "--max-length", 16]
    assert run(*train, "--out", tmp_path / "run") == 2
    assert "letters.jsonl:9: a record must have" in capsys.readouterr().err
    (text := tmp_path / "x.txt").write_text("a b")
    assert run("train", folder, "--data", text, *train[4:], "--out", tmp_path / "run") == 2
    assert re.search(r"x\.txt: only \.jsonl, .* files can be streamed", capsys.readouterr().err)


def test_cli_train_samples_and_stops_early(folder, letters, tmp_path, capsys):
    train = [
        "train",
        folder,
        "--data",
        letters,
        "--valid",
        letters,
        "--allow-shared",
        "--max-length",
        16,
    ]
    more = ["--sample", "a b", "--eval-every", 1, "--patience", 1, "--max-steps", 30, "--lr", 10]
    assert run(*train, *more, "--out", tmp_path / "run") == 0
    said = capsys.readouterr().err
    assert "sample: a b" in said and "evaluations in a row were not better" in said


@pytest.fixture
def trained(folder, letters, tmp_path):
    """Two adapters of the tiny Llama, the first of which names its base."""
    for seed in (0, 1):
        train = ["train", folder, "--data", letters, "--out", tmp_path / f"v{seed}", "--seed", seed]
        assert run(*train, "--max-steps", 3, "--max-length", 32, "--r", 3, "--alpha", 5) == 0
    return tmp_path / "v0"


def test_cli_explain_writes_everything_it_found(trained, letters, tmp_path, capsys):
    files = {name: tmp_path / name for name in ("e.json", "e.html", "small")}
    command = ["explain", trained, "--data", letters, "--train", letters, "--outside", letters]
    command += ["--against", tmp_path / "v1", "--words", "b", "--max-length", 32, "--examples", 3]
    command += ["--ablate", 2, "--keep", 0.5, "--truncate", files["small"]]
    capsys.readouterr()
    assert run(*command, "--json", files["e.json"], "--html", files["e.html"]) == 0
    said = capsys.readouterr()
    if sys.version_info >= (3, 11):  # run.toml is read
        assert f"note: the adapter was trained on {letters}: that is not held out" in said.out
    for line in (f"adapter {trained}; base ", "v0 / v1", "held-out data: loss",
                 "attention on b", "outside the task", "over-fitted", f"page in {files['e.html']}",
                 f"adapter at the suggested ranks in {files['small']}"):  # fmt: skip
        assert line in said.out, line
    assert "reading model" not in said.err  # not a terminal
    found = json.loads(files["e.json"].read_text())
    assert found["behaviour"]["loss"]["examples"] == 3
    assert found["behaviour"]["ablated"][0] == 2
    ranks = {layer["name"]: layer["suggested_r"] for layer in found["layers"]}
    assert {layer["r"] for layer in found["layers"]} == {3} and set(ranks.values()) <= {1, 2}
    assert files["e.html"].read_text().startswith("<!doctype html>")
    capsys.readouterr()
    assert run("explain", files["small"], "--keep", 1) == 0
    shown = capsys.readouterr().out
    assert f"ranks {sum(ranks.values())} → {sum(ranks.values())} in all keep 100 %" in shown
    assert "held-out" not in shown


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["missing"], "OUT must name a folder with adapter_config.json"),
        ([".", "--against", "missing"], "--against must name a folder with adapter_config.json"),
        ([".", "--keep", 2], "keep must lie in (0, 1]"),
        (
            [".", "--html", "missing/e.html"],
            "--html must name a file in a folder that is there, found no folder missing",
        ),
        (
            [".", "--html", "run.toml"],
            "--html must name a new file, found run.toml, which is there",
        ),
        ([".", "--json", "e", "--html", "../v0/e"], "--json and --html must name different files"),
        ([".", "--truncate", "."], "--truncate must be a new or empty folder, found files at ."),
        (["."], "must name its base, found none; pass --model"),
        ([".", "--model", "x", "--data", "missing.txt"], "missing.txt"),
    ],
)
def test_cli_explain_refuses_options_before_it_loads_the_model(
    trained, no_model, monkeypatch, capsys, options, message
):
    monkeypatch.chdir(trained)
    config = json.loads((trained / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = None
    (trained / "adapter_config.json").write_text(json.dumps(config))
    assert run("explain", *options) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("format", ["int8", "nf4", "int4"])
def test_cli_quantizes_trains_evaluates_and_merges(letters, tmp_path, capsys, format):
    config = LlamaConfig(
        vocab_size=28, hidden_size=64, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, head_dim=32, max_position_embeddings=64,
        eos_token_id=1,
    )  # fmt: skip
    folder = tiny_folder(tmp_path / "wide", config=config)
    out, small = tmp_path / "out", tmp_path / "small"
    train = ["--data", letters, "--max-steps", "2", "--batch-size", "2", "--max-length", "16"]
    assert run("train", folder, *train, "--out", out, "--quantize", format) == 0
    assert run("quantize", folder, "--format", format, "--out", small, "--block-size", "64") == 0
    assert f"{format} model in" in capsys.readouterr().out
    scores = []
    for model in ([folder, "--quantize", format], [small]):
        assert run("eval", *model, "--adapter", out, "--data", letters, "--json") == 0
        said = capsys.readouterr()
        scores.append(json.loads(said.out)["loss"])
        assert "was trained on a base in" not in said.err
    assert scores[0] == scores[1]
    assert run("eval", folder, "--adapter", out, "--data", letters) == 0
    said = f"{out} was trained on a base in {format} (--quantize {format}), and this one is in floa"
    assert said in capsys.readouterr().err
    assert run("generate", small, "a", "--max-new-tokens", "2") == 0
    capsys.readouterr()
    merge = ["merge", small, "--adapter", out, "--out", tmp_path / "merged"]
    assert run(*merge) == 2
    assert "--dtype says in what a merged folder is stored" in capsys.readouterr().err
    assert run(*merge, "--dtype", "float32") == 0
    assert run("eval", tmp_path / "merged", "--data", letters, "--json") == 0
    assert run("quantize", small, "--format", format, "--out", tmp_path / "twice") == 2
    assert "is quantized already" in capsys.readouterr().err
    assert run("train", folder, *train, "--out", tmp_path / "x", "--quantize", "nf4",
               "--block-size", "65") == 2  # fmt: skip
    assert "block_size of nf4 must be one of" in capsys.readouterr().err
    assert run("train", folder, *train, "--out", tmp_path / "x", "--quantize", "int8",
               "--block-size", "32") == 2  # fmt: skip
    assert "block_size acts on format='nf4' or 'int4' alone" in capsys.readouterr().err


def test_cli_train_goes_on_with_an_adapter(folder, letters, tmp_path, capsys):
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps({"text": "e d c b a"}) + "\n" for _ in range(8)))
    common = ("--max-steps", 2, "--batch-size", 4)
    first = ("train", folder, "--data", letters, "--out", tmp_path / "a", "--r", 4, *common)
    assert run(*first) == 0
    again = ("train", folder, "--data", other, "--out", tmp_path / "b", *common)
    assert run(*again, "--adapter", tmp_path / "a", "--lr", 1e-9) == 0  # hardly moves
    start = factors(tmp_path / "a")
    for key, value in factors(tmp_path / "b").items():
        torch.testing.assert_close(value, start[key], rtol=0, atol=1e-7)
        assert value.any()
    capsys.readouterr()
    assert run(*first[:3], other, *first[4:], "--resume") == 2
    assert "begin a new run with load(..., trainable=True) or --adapter" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--r", 4), "--adapter goes on with an adapter as it is, found --r too"),
        (("--modules-to-save", "lm_head"), "found --modules-to-save too"),
        (("--parallel", "fsdp"), "--adapter is read whole, and --parallel fsdp reads in parts"),
    ],
)
def test_cli_train_refuses_what_an_adapter_has_settled(
    letters, tmp_path, capsys, no_model, options, text
):
    arguments = ("train", "model", "--data", letters, "--out", tmp_path / "b")
    assert run(*arguments, "--adapter", tmp_path / "a", *options) == 2
    assert text in capsys.readouterr().err


def factors(folder):
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


@pytest.mark.parametrize("module", [False, True])
def test_ctrl_c_while_the_command_imports_is_a_line_and_130(module):
    script = Path(sys.executable).with_name("minilora")
    command = [sys.executable, "-m", "minilora"] if module else [script]
    process = subprocess.Popen([*command, "check", "nowhere"], stderr=subprocess.PIPE, text=True)
    while "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    said = process.communicate()[1]
    assert (process.returncode, said) == (130, "minilora: interrupted\n")


def test_numbers_of_torchrun_that_are_none_are_named(
    folder, letters, tmp_path, monkeypatch, capsys
):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "x")
        assert (
            run("train", folder, "--data", letters, "--out", tmp_path / "o", "--max-steps", 1) == 2
        )
        said = capsys.readouterr().err.splitlines()[-1]
        assert (
            f"the environment variable {name} must be a whole number, as torchrun sets it" in said
        )
        monkeypatch.delenv(name)


def test_an_argument_is_never_shown_in_full_nor_obeyed_by_the_terminal(tmp_path, capsys):
    with pytest.raises(SystemExit):
        run("eval", "model", "--data", "rows.jsonl", "--batch-size", "x" * 10**5)
    assert len(capsys.readouterr().err.splitlines()[-1]) <= 700
    assert run("check", tmp_path / "\x1b[2Jnowhere\nelse") == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said[:-1].isprintable() and r"\x1b[2Jnowhere else" in said


def test_cli_takes_an_adapters_folder_for_a_model(trained, folder, letters, tmp_path, capsys):
    """Which names its base: the same as the base and --adapter."""
    data = ["--data", letters, "--max-length", 32]
    said = []
    for model in ([trained], [folder, "--adapter", trained]):
        capsys.readouterr()
        assert run("eval", *model, *data, "--json") == 0
        assert run("generate", *model, "a b", "--max-new-tokens", 4) == 0
        said.append(capsys.readouterr().out)
        assert run("merge", *model, "--out", tmp_path / f"merged{len(said)}") == 0
    assert said[0] == said[1] and json.loads(said[0].splitlines()[0])["loss"] > 0
    merged = [(tmp_path / f"merged{n}" / "model.safetensors").read_bytes() for n in (1, 2)]
    assert merged[0] == merged[1]
    found = []
    for adapters in ([trained, tmp_path / "v1"], [folder, trained, tmp_path / "v1"]):
        capsys.readouterr()
        assert run("compare", *adapters, *data) == 0
        found.append(capsys.readouterr().out)
    assert found[0] == found[1]
    assert "v0" in found[0] and "v1" in found[0]
    if sys.version_info >= (3, 11):  # run.toml is read
        assert f"note: v0 was trained on {letters}: its loss there is not held out" in found[0]
    assert run("data", letters, "--model", trained) == 0
    assert re.search(r"^3 of \d+ examples; --show N prints more$", capsys.readouterr().out, re.M)


def test_cli_says_which_of_two_adapters_or_none_is_meant(
    trained, folder, letters, no_model, capsys
):
    data = ["--data", letters]
    for words, message in (
        (["eval", trained, "--adapter", trained, *data], "--adapter goes with a base, found MODEL"),
        (["compare", folder, *data], "compare needs an adapter's folder, found the model"),
        (["compare", folder, trained, *data, "--json", letters], "--json must name a new file"),
        (["compare", trained, *data, "--html", "none/x"], "found no folder none; make it"),
        (["merge", folder, "--out", folder / "x"], "merge needs an adapter, found the model"),
    ):
        assert run(*words) == 2
        assert message in capsys.readouterr().err


def test_cli_train_refuses_held_out_rows_that_are_trained_on(folder, letters, tmp_path, capsys):
    valid = tmp_path / "valid.jsonl"
    valid.write_text('{"text": "b c d"}\n{"text": "a b c d e"}\n')
    train = ["train", folder, "--data", letters, "--valid", valid, "--max-length", 32]
    train += ["--max-steps", 1, "--out", tmp_path / "run"]
    for more in ([], ["--pack"]):
        assert run(*train, *more) == 2
        said = capsys.readouterr().err
        assert "found 1 of 2 in both (the first is example 1)" in said and "--allow-shared" in said
        assert not (tmp_path / "run").exists()
    assert run(*train, "--allow-shared") == 0
    assert "1 of 2 held-out examples are trained on too" in capsys.readouterr().err


def test_adapters_are_named_after_their_folders():
    """Whatever a folder is called: some names can't be an adapter's."""
    folders = ["out/train", "out/café", "a/base", "b/base", "c/v1", "d/v1", "out/keys", "/"]
    assert names_of(list(map(Path, folders))) == [
        "train_2", "caf_", "base_2", "base_3", "v1", "v1_2", "keys_2", "adapter"
    ]  # fmt: skip
