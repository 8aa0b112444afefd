"""Folders of models that are not built here: transformers' own, judged by transformers."""

import json
import sys

import pytest
import torch
import transformers
from byte_tokenizer import byte_tokenizer
from foreign_models import KINDS, foreign, foreign_folder
from safetensors.torch import load_file, save_file
from small_models import shake

import minilora
from minilora.loading import save_pretrained
from minilora.quantization import quantized_layers
from minilora.text import Tokenizer

pytestmark = pytest.mark.peers
IDS = torch.arange(40, 58).reshape(2, 9)


def _load(folder, *args, **options):
    return minilora.load_model(folder, *args, **{"dtype": torch.float32, "device": "cpu"} | options)


def _equal(one, other):
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def _edit(file, **entries):
    file.write_text(json.dumps({**json.loads(file.read_text()), **entries}))


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_is_read_as_transformers_reads_it(tmp_path, capsys, kind):
    """Names are those of the plain model, so adapters are PEFT's; one line says what is used."""
    theirs = foreign_folder(kind, tmp_path)
    capsys.readouterr()
    model, tokenizer = _load(tmp_path)
    assert type(model) is type(theirs) and not model.training and _equal(model, theirs)
    assert torch.equal(model(IDS).logits, theirs(IDS).logits)
    assert isinstance(tokenizer, Tokenizer) and model.name_or_path == str(tmp_path)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith(f"minilora: {kind}")
    assert f"not built here: transformers' {type(theirs).__name__} is used; slower" in said


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_dtypes(tmp_path, dtype):
    theirs = foreign_folder("falcon", tmp_path, torch.bfloat16)
    assert _equal(_load(tmp_path, dtype=dtype)[0], theirs.to(dtype or torch.bfloat16))


def test_without_one_stored_dtype_that_of_the_config_is_taken(tmp_path):
    foreign_folder("mamba", tmp_path, torch.bfloat16)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors = {n: t.float() if n.endswith(".D") else t for n, t in tensors.items()}
    save_file(tensors, file, metadata={"format": "pt"})
    assert {p.dtype for p in _load(tmp_path, dtype=None)[0].parameters()} == {torch.bfloat16}
    _edit(tmp_path / "config.json", dtype=None, torch_dtype=None)
    with pytest.raises(ValueError, match="dtype=None needs weights stored in one dtype, or one"):
        _load(tmp_path, dtype=None)


@pytest.mark.parametrize("kind", ["falcon", "llama", "mamba", "mixtral"])
@pytest.mark.parametrize("format", ["int8", "nf4"])
def test_quantizing_while_reading_is_quantizing_afterwards(tmp_path, kind, format):
    foreign_folder(kind, tmp_path)
    model = _load(tmp_path, format)[0]
    assert _equal(model, minilora.quantize(_load(tmp_path)[0], format))
    assert quantized_layers(model) and not any(
        p.requires_grad for layer in quantized_layers(model).values() for p in layer.parameters()
    )


def test_chosen_layers_and_a_tied_head_are_quantized(tmp_path):
    foreign_folder("falcon", tmp_path)
    names = {"targets": ["dense", "lm_head"]}
    model = _load(tmp_path, "int8", **names)[0]
    assert _equal(model, minilora.quantize(_load(tmp_path)[0], "int8", **names))
    assert "lm_head" in quantized_layers(model)
    assert len(quantized_layers(_load(tmp_path, "int8", targets=["dense"], layers=[1])[0])) == 1


def test_no_layer_to_quantize_is_whole_in_memory(tmp_path, monkeypatch):
    """What transformers is given for it is one number in the weight's shape."""
    foreign_folder("falcon", tmp_path)
    given = {}
    family = transformers.FalconForCausalLM
    read = family.from_pretrained.__func__

    def watched(cls, *args, state_dict, **options):
        for name, stored in state_dict.items():
            given[name] = stored[...]
        return read(cls, *args, state_dict=state_dict, **options)

    monkeypatch.setattr(family, "from_pretrained", classmethod(watched))
    _load(tmp_path, "nf4")
    held = {n for n, t in given.items() if t.untyped_storage().nbytes() >= t.nbytes}
    assert "transformer.h.1.mlp.dense_h_to_4h.weight" in given.keys() - held
    assert held == {n for n in given if "word_embeddings" in n or "layernorm" in n or "ln_f" in n}


@pytest.mark.filterwarnings("ignore:minilora. no adapter reaches")
@pytest.mark.parametrize("kind", ["falcon", "mamba", "mixtral"])
def test_saved_folders_are_read_again(tmp_path, kind):
    """By transformers, in the stored dtype; quantized ones by load_model."""
    foreign_folder(kind, tmp_path / "model", torch.bfloat16)
    sampling = {"temperature": 0.6, "do_sample": False, "eos_token_id": [256, 7]}
    (tmp_path / "model/generation_config.json").write_text(json.dumps(sampling))
    model, tokenizer = _load(tmp_path / "model", dtype=None)
    assert tokenizer.stop_ids >= {256, 7}
    shake(minilora.inject(model, r=4, alpha=6))
    with pytest.raises(ValueError, match="found adapters; eject adapters"):
        save_pretrained(model, tmp_path / "no")
    minilora.merge(model, keep=None)
    minilora.eject(model)
    save_pretrained(model, tmp_path / "merged", tokenizer)
    read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert read.dtype == torch.bfloat16 and torch.equal(read(IDS).logits, model(IDS).logits)
    options = json.loads((tmp_path / "merged/generation_config.json").read_text())
    assert options.items() >= sampling.items()
    with pytest.raises(ValueError, match="ForCausalLM needs a new or empty folder, found files"):
        save_pretrained(model, tmp_path / "merged")
    small = _load(tmp_path / "model", "int8")[0]
    save_pretrained(small, tmp_path / "small", tokenizer)
    again, words = _load(tmp_path / "small", compute="dequantize")
    assert _equal(again, small)
    assert words.stop_ids == tokenizer.stop_ids
    stored = transformers.GenerationConfig.from_pretrained(tmp_path / "small")
    assert stored.eos_token_id == [256, 7]
    assert {m.spec.compute for m in quantized_layers(again).values()} == {"dequantize"}


def test_a_damaged_quantized_folder_is_refused(tmp_path):
    foreign_folder("falcon", tmp_path / "model")
    save_pretrained(_load(tmp_path / "model", "int8")[0], tmp_path / "small", byte_tokenizer())
    layers = tmp_path / "small/quantization.json"
    text = layers.read_text()
    layers.write_text(text.replace("h.1.mlp.dense_h_to_4h", "h.7.mlp.dense_h_to_4h"))
    with pytest.raises(ValueError, match="names a quantized layer transformer.h.7.mlp.dense_h_to"):
        _load(tmp_path / "small")
    layers.write_text(text)
    file = tmp_path / "small/quantized.safetensors"
    tensors = load_file(file)
    del tensors["transformer.h.1.mlp.dense_h_to_4h.codes"]
    save_file(tensors, file)
    with pytest.raises(ValueError, match=r"dense_h_to_4h in '.*' must .*; the file is damaged"):
        _load(tmp_path / "small")


# --- what is refused, in one line and before anything is made


def _drop(tensors):
    del tensors["transformer.h.1.mlp.dense_h_to_4h.weight"]


def _add(tensors):
    tensors["transformer.h.2.mlp.dense_h_to_4h.weight"] = torch.zeros(128, 32)


def _reshape(tensors):
    tensors["transformer.h.1.mlp.dense_h_to_4h.weight"] = torch.zeros(96, 32)


def _nan(tensors):
    tensors["transformer.h.1.mlp.dense_h_to_4h.weight"][3, 3] = float("nan")


@pytest.mark.parametrize("quantize", [None, "int8"])
@pytest.mark.parametrize(
    "change, message",
    [
        (_drop, r"found missing: transformer.h.1.mlp.dense_h_to_4h.weight; the weights and the"),
        (_add, r"found unexpected: transformer.h.2.mlp.dense_h_to_4h.weight; the weights"),
        (_reshape, r"of another shape: transformer.h.1.mlp.dense_h_to_4h.weight \[96, 32\] inst"),
        (_nan, r"transformer.h.1.mlp.dense_h_to_4h.weight must be finite.*, found NaN or Inf;"),
    ],
)
def test_weights_of_another_model_are_refused_by_name(tmp_path, change, message, quantize):
    foreign_folder("falcon", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=message):
        _load(tmp_path, quantize)


def test_half_downloaded_shards_and_other_files_are_refused(tmp_path):
    foreign("falcon").save_pretrained(tmp_path, max_shard_size="20KB")
    byte_tokenizer().save(tmp_path)
    assert _load(tmp_path)[0] is not None
    part = sorted(tmp_path.glob("model-*.safetensors"))[1]
    part.unlink()
    with pytest.raises(ValueError, match=f"names '{part.name}', found no such file in the folder"):
        _load(tmp_path)
    for file in tmp_path.glob("model*"):
        file.unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"found \['pytorch_model.bin'\].* only safetensors are r"):
        _load(tmp_path)


@pytest.mark.parametrize(
    "make",
    [
        lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(
            vocab_size=60, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)),
        lambda: transformers.BertForMaskedLM(transformers.BertConfig(
            vocab_size=60, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=8)),
        lambda: transformers.RobertaForCausalLM(transformers.RobertaConfig(
            vocab_size=60, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=8)),
        lambda: transformers.LlamaForSequenceClassification(transformers.LlamaConfig(
            vocab_size=60, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=8)),
        lambda: transformers.ViTForImageClassification(transformers.ViTConfig(
            hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)),
        lambda: transformers.BartForConditionalGeneration(transformers.BartConfig(
            vocab_size=60, d_model=8, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=8,
            decoder_ffn_dim=8, encoder_attention_heads=2, decoder_attention_heads=2)),
    ],
)  # fmt: skip
def test_models_that_predict_no_next_token_are_refused(tmp_path, make):
    model = make()
    model.save_pretrained(tmp_path)
    byte_tokenizer().save(tmp_path)
    found = (
        rf"must be of a causal language model of text, found '{type(model).__name__}' \(.*\); in"
    )
    with pytest.raises(ValueError, match=found):
        _load(tmp_path)


def test_no_code_of_a_folder_is_run(tmp_path):
    foreign_folder("falcon", tmp_path)
    (tmp_path / "mine.py").write_text("raise SystemExit('run')")
    _edit(tmp_path / "config.json", auto_map={"AutoModelForCausalLM": "mine.Mine"})
    assert type(_load(tmp_path)[0]) is transformers.FalconForCausalLM
    _edit(tmp_path / "config.json", model_type="mine")
    with pytest.raises(ValueError, match=r"does not know it either; the code .* is never run"):
        _load(tmp_path)
    _edit(tmp_path / "config.json", model_type="falcon", attn_implementation="someone/attention")
    with pytest.raises(ValueError, match="must name no code to fetch, found attn_implementation="):
        _load(tmp_path)


def test_configurations_that_transformers_cannot_read(tmp_path):
    foreign_folder("falcon", tmp_path)
    _edit(tmp_path / "config.json", hidden_size="wide")
    with pytest.raises(ValueError, match="must describe a falcon as transformers reads it, found"):
        _load(tmp_path)
    _edit(tmp_path / "config.json", hidden_size=32, quantization_config={"quant_method": "gptq"})
    with pytest.raises(ValueError, match="holds a quantized FalconForCausalLM; of models that are"):
        _load(tmp_path)


def test_without_transformers_the_nearest_family_is_named(tmp_path, monkeypatch):
    foreign_folder("falcon", tmp_path)
    _edit(tmp_path / "config.json", model_type="llama4_text")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(RuntimeError, match="'llama4_text'; nearest: llama; .* pip install -U"):
        _load(tmp_path)


def test_a_model_that_nobody_knows_is_refused_with_the_nearest_family(tmp_path):
    foreign_folder("falcon", tmp_path)
    _edit(tmp_path / "config.json", model_type="qwen2_new")
    found = r"built \(.*\), found 'qwen2_new'; nearest: qwen2; transformers .* not know it either"
    with pytest.raises(ValueError, match=found):
        _load(tmp_path)


def test_reading_in_parts_is_for_models_that_are_built(tmp_path):
    foreign_folder("falcon", tmp_path)
    with pytest.raises(ValueError, match="read in parts .* found a FalconForCausalLM in"):
        _load(tmp_path, prepare=lambda model: None)


def test_an_adapter_given_as_the_model_is_recognised(tmp_path):
    model = foreign("falcon")
    model.name_or_path = "tiiuae/falcon-7b"
    minilora.save(minilora.inject(model, r=4), tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"found an adapter in .*on, 'tiiuae/falcon-7b'"):
        _load(tmp_path / "adapter")
