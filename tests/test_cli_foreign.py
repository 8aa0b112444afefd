"""The command on folders of models that are not built here, from training to the merged model."""

import io
import json
import re

import pytest
import torch
import transformers
from foreign_models import foreign_folder

import minilora
from minilora.cli.command import main

pytestmark = pytest.mark.peers


def run(*arguments):
    return main([str(argument) for argument in arguments])


@pytest.fixture
def data(tmp_path):
    file = tmp_path / "data.jsonl"
    rows = [{"prompt": f"{i} and {i} is", "completion": f" {2 * i}."} for i in range(8)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def falcon(tmp_path):
    foreign_folder("falcon", tmp_path / "falcon", torch.bfloat16)
    return tmp_path / "falcon"


FAST = ("--dtype", "float32", "--batch-size", 4, "--max-length", 32)


def test_every_verb_on_an_architecture_of_transformers_alone(
    tmp_path, falcon, data, capsys, monkeypatch
):
    """Some 12 s: ten verbs, each of which reads the model anew; PEFT and transformers judge."""
    assert run("plan", falcon, "--examples", 20, "--max-length", 32, "--untimed") == 0
    assert f"minilora train {falcon}" in capsys.readouterr().out
    out, merged, small = tmp_path / "out", tmp_path / "merged", tmp_path / "small"
    train = [
        "train",
        falcon,
        "--data",
        data,
        "--valid",
        data,
        "--allow-shared",
        "--out",
        out,
        *FAST,
    ]
    options = ["--max-steps", 6, "--lr", "1e-2", "--targets", "query_key_value", "dense"]
    assert run(*train, *options, "--sample", "3 and") == 0
    said = capsys.readouterr()
    assert "held out after" in said.out
    line = "minilora: falcon is not built here: transformers' FalconForCausalLM is used; slower"
    assert said.err.count(line) == 1
    losses = {}
    for name, adapter in (("base", ()), ("tuned", ("--adapter", out))):
        assert run("eval", falcon, "--data", data, "--json", *FAST, *adapter) == 0
        losses[name] = json.loads(capsys.readouterr().out)["loss"]
    assert losses["tuned"] < losses["base"]
    ask = ("--max-new-tokens", 6, "--dtype", "float32")
    assert run("generate", falcon, "3 and", "12 and 12", "--adapter", out, *ask) == 0
    text = capsys.readouterr().out
    monkeypatch.setattr("sys.stdin", io.StringIO("3 and\n/base\n/quit\n"))
    assert run("chat", falcon, "--adapter", out, *ask) == 0
    said = capsys.readouterr()
    assert "(base, out); answers of out" in said.err
    tuned, base = said.out.split("[base] ")
    assert tuned.strip() and base.strip() and tuned != base
    assert run("merge", falcon, "--adapter", out, "--out", merged, "--dtype", "float32") == 0
    assert capsys.readouterr().out.endswith("weights in float32\n")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(merged)
    assert type(theirs) is transformers.FalconForCausalLM and theirs.dtype == torch.float32
    assert run("generate", merged, "3 and", "12 and 12", *ask) == 0
    assert capsys.readouterr().out == text
    assert run("eval", merged, "--data", data, "--json", *FAST) == 0
    assert json.loads(capsys.readouterr().out)["loss"] == pytest.approx(losses["tuned"], rel=1e-5)
    assert run("explain", out, "--data", data, "--dtype", "float32", "--ablate", 4) == 0
    assert "query_key_value" in capsys.readouterr().out
    assert run("check", out) == 0 and run("targets", falcon) == 0
    assert "8 of 9 linear layers" in capsys.readouterr().out
    assert run("quantize", falcon, "--format", "nf4", "--out", small) == 0
    assert run("eval", small, "--data", data, "--json", *FAST) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["loss"]
    assert found == pytest.approx(losses["base"], rel=0.02)
    assert run("eval", falcon, "--quantize", "nf4", "--data", data, "--json", *FAST) == 0
    assert json.loads(capsys.readouterr().out)["loss"] == pytest.approx(found, rel=1e-5)


def test_peft_reads_the_adapter(tmp_path, falcon, data, capsys):
    peft, out = pytest.importorskip("peft"), tmp_path / "out"
    assert run("train", falcon, "--data", data, "--out", out, *FAST, "--max-steps", 2) == 0
    base = transformers.AutoModelForCausalLM.from_pretrained(falcon, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, out)
    ours = minilora.load(minilora.load_model(falcon, dtype=torch.float32, device="cpu")[0], out)
    ids = torch.arange(50, 60)[None]
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:minilora. no adapter reaches")
@pytest.mark.filterwarnings("ignore:minilora. PEFT refuses")
@pytest.mark.parametrize("kind", ["falcon", "mamba"])
def test_a_resumed_run_is_the_whole_one_bit_for_bit(tmp_path, data, kind, capsys):
    foreign_folder(kind, tmp_path / "model")
    train = ["train", tmp_path / "model", "--data", data, *FAST, "--schedule", "constant"]
    options = ["--dropout", 0.2, "--r", 2]
    if kind == "mamba":
        options += ["--exclude", "dt_proj"]  # of which Mamba reads the weight alone
    for name, steps in (("whole", 6), ("parts", 3)):
        out = tmp_path / name
        assert run(*train, *options, "--out", out, "--max-steps", steps) == 0
    again = ("--out", tmp_path / "parts", "--max-steps", 6, "--resume")
    assert run(*train, *options, *again) == 0
    one, other = (tmp_path / name / "adapter_model.safetensors" for name in ("whole", "parts"))
    assert one.read_bytes() == other.read_bytes()


def test_training_experts_says_what_no_adapter_reaches(tmp_path, data):
    foreign_folder("mixtral", tmp_path / "model")
    train = ["train", tmp_path / "model", "--data", data, "--out", tmp_path / "out", *FAST]
    with pytest.warns(UserWarning, match=r"no adapter reaches \d+% of the parameters: .*experts"):
        assert run(*train, "--max-steps", 1) == 0


def test_packing_is_refused_where_documents_would_mix(tmp_path, falcon, data, capsys):
    train = ["train", falcon, "--data", data, "--out", tmp_path / "out", *FAST, "--max-steps", 1]
    assert run(*train, "--pack") == 2
    assert "apart, but FalconForCausalLM does not" in capsys.readouterr().err.splitlines()[-1]
    foreign_folder("starcoder2", tmp_path / "starcoder2")
    train[1] = tmp_path / "starcoder2"
    assert run(*train, "--pack") == 0


@pytest.mark.filterwarnings("ignore:minilora. no adapter reaches")
def test_plan_counts_and_times_transformers_own_model(falcon, capsys):
    assert run("plan", falcon, "--examples", 20, "--max-length", 32) == 0
    said = capsys.readouterr().out
    assert "transformers' own model is trained: falcon is not built" in said
    assert f"minilora train {falcon}" in said and "s a step" in said
    foreign_folder("mixtral", falcon.parent / "mixtral")
    assert run("plan", falcon.parent / "mixtral", "--dtype", "float32", "--untimed") == 2
    said = capsys.readouterr().err
    assert "on shapes alone, which transformers' MixtralForCausalLM does not take (" in said
    assert re.search(r"known is that [\d,]+ parameters take \S+ GB in 16 bits", said)


def test_other_models_are_refused_in_one_line(tmp_path, data, falcon, capsys):
    config = transformers.T5Config(vocab_size=60, d_model=8, d_kv=4, d_ff=8, num_layers=1)
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    (tmp_path / "adapter").mkdir()
    text = json.dumps({"base_model_name_or_path": "tiiuae/falcon-7b"})
    (tmp_path / "adapter/adapter_config.json").write_text(text)
    train = ["--data", data, "--out", tmp_path / "out", *FAST, "--max-steps", 1]
    for folder, message in (
        ("t5", "must be of a causal language model of text, found 'T5ForConditionalGeneration'"),
        ("adapter", "pass the model that it was trained on, 'tiiuae/falcon-7b' (train goes on"),
    ):
        capsys.readouterr()
        assert run("train", tmp_path / folder, *train) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out/adapter_config.json").exists()
