"""What an adapter depends on and its files do not hold: heads, vocabularies, norms, statistics."""

import json
import warnings

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import minilora
from minilora.lora.layer import lora_layers
from minilora.lora.samples import describe, difference, drawn_modules

IDS = torch.arange(10)[None]
WEIGHTS = "adapter_model.safetensors"


def rewrite(folder, **metadata):
    file = folder / WEIGHTS
    with safe_open(file, "pt") as opened:
        old = opened.metadata()
    old.update(metadata, minilora_sha256=None)
    save_file(load_file(file), file, {k: v for k, v in old.items() if v is not None})


@pytest.mark.parametrize(
    "name", ["lm_head.weight", "embed.weight", "layers.1.mlp.0.bias", "layers.0.v_proj.weight"]
)
def test_another_value_outside_the_adapter_is_refused_by_name(net, tmp_path, name):
    minilora.save(minilora.inject(net(), r=2, targets=["q_proj"]), tmp_path)
    other = net()
    other.get_parameter(name).data += 1
    module = name.rpartition(".")[0]
    with pytest.raises(ValueError, match=rf"values of {name} are others.*save=\['{module}'\]"):
        minilora.load(other, tmp_path)
    assert not lora_layers(other)
    minilora.load(other, tmp_path, verify=False)


def test_the_bias_of_a_quantized_layer_is_compared_also_with_the_plain_one(net, tmp_path):
    model = net()
    minilora.quantize(model, "int8", targets=["mlp.0"])
    minilora.save(minilora.inject(model, r=2, targets=["q_proj"]), tmp_path)
    minilora.load(net(), tmp_path)
    other = net()
    other.layers[1].mlp[0].bias.data += 1
    with pytest.raises(ValueError, match=r"values of layers\.1\.mlp\.0\.bias are others"):
        minilora.load(other, tmp_path)


def test_one_new_row_of_many_is_noticed(net, tmp_path):
    minilora.save(minilora.inject(net(), r=2), tmp_path)
    other = net()
    other.embed.weight.data[-1] += 1
    with pytest.raises(ValueError, match=r"values of embed\.weight are others"):
        minilora.load(other, tmp_path)


def test_rounding_passes_and_another_size_is_named(net, shake, tmp_path):
    model = shake(minilora.inject(net(), r=2))
    minilora.save(model, tmp_path)
    minilora.load(net(dtype=torch.bfloat16), tmp_path)
    minilora.load(net(dtype=torch.float64), tmp_path)
    grown = net()
    grown.embed = nn.Embedding(13, 7)
    with pytest.raises(ValueError, match=r"\[11, 7\] there, and has \[13, 7\].*embeddings\(11\)"):
        minilora.load(grown, tmp_path)


def test_files_without_the_new_fingerprint_load(net, tmp_path):
    minilora.save(minilora.inject(net(), r=2), tmp_path)
    rewrite(tmp_path, minilora_rest=None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        minilora.load(net(), tmp_path)


@pytest.mark.parametrize("text", ["[", "[1]", '{"embed.weight": 3}', '{"embed.weight": {}}'])
def test_an_unreadable_fingerprint_is_refused(net, tmp_path, text):
    minilora.save(minilora.inject(net(), r=2), tmp_path)
    rewrite(tmp_path, minilora_rest=text)
    with pytest.raises(ValueError, match="minilora_rest in the metadata must be readable"):
        minilora.load(net(), tmp_path)


def test_modules_to_save_leaves_something_to_adapt():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    with pytest.raises(ValueError, match=r"modules_to_save=\['0'\] leaves no layer"):
        minilora.inject(model, modules_to_save=["0"])


def test_a_tied_value_is_described_once_and_holds_untied():
    tied = nn.Parameter(torch.randn(5, 3))
    text = describe({"embed.weight": tied, "head.weight": tied})
    assert json.loads(text)["head.weight"] == {"as": "embed.weight"}
    apart = {"embed.weight": tied, "head.weight": tied.detach().clone()}
    assert difference(apart, text) is None
    apart["head.weight"] += 1
    assert "head.weight are others" in difference(apart, text)


def test_a_parameter_trained_beside_the_adapter_is_not_lost(net, tmp_path):
    model = minilora.inject(net(), r=2)
    model.embed.weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"embed\.weight requires gradients.*save=\['embed'\]"):
        minilora.save(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    model.embed.weight.requires_grad_(False)
    minilora.save(model, tmp_path / "new")


def test_running_statistics_are_named_and_kept_by_fit(tmp_path):
    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.embed = nn.Embedding(11, 8)
            self.one, self.norm = nn.Linear(8, 8), nn.BatchNorm1d(8)
            self.lm_head = nn.Linear(8, 11)

        def forward(self, input_ids):
            x = self.one(self.embed(input_ids))
            return self.lm_head(self.norm(x.transpose(1, 2)).transpose(1, 2))

    model = Normed()
    with pytest.warns(UserWarning, match="norm .1 in all. moves its running statistics"):
        minilora.inject(model, r=2)
    config = minilora.TrainConfig(max_steps=2, dtype="float32", compile=False)
    minilora.fit(model, [{"input_ids": [1, 2, 3, 4]}], config=config, quiet=True)
    assert torch.equal(model.norm.running_mean, torch.zeros(8))
    assert model.norm.training
    model.train()
    model(IDS)
    minilora.save(model, tmp_path)
    with pytest.raises(ValueError, match=r"values of norm\.running_mean are others"):
        minilora.load(Normed(), tmp_path)


def test_a_run_is_not_resumed_over_another_head(tmp_path):
    from minilora.models import Llama, LlamaConfig

    def tiny():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=1, head_dim=4, max_position_embeddings=16,
        )  # fmt: skip
        return Llama(config)

    def fit(model, steps, **options):
        config = minilora.TrainConfig(max_steps=steps, dtype="float32", compile=False)
        rows = [{"input_ids": [1, 2, 3, 4]}]
        return minilora.fit(model, rows, config=config, out=tmp_path, quiet=True, **options)

    fit(minilora.inject(tiny(), r=2), 1)
    other = minilora.inject(tiny(), r=2)
    other.lm_head.weight.data += 1
    with pytest.raises(ValueError, match=r"another base: the weights of lm_head\.weight"):
        fit(other, 2, resume=True)
    assert fit(minilora.inject(tiny(), r=2), 2, resume=True).steps == 2


# --- with transformers and PEFT


@pytest.fixture
def hf(llama_config, tmp_path):
    """Return a maker of models read from a stored Llama, and of other kinds with new heads."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    stored = tmp_path / "stored"
    config = transformers.LlamaConfig(**llama_config, pad_token_id=0)
    transformers.LlamaForCausalLM(config).save_pretrained(stored)

    def make(kind="LlamaForCausalLM", seed=1, rows=None, **options):
        torch.manual_seed(seed)
        model = getattr(transformers, kind).from_pretrained(stored, **options)
        if rows is not None:
            model.resize_token_embeddings(rows, mean_resizing=False)
        return model.eval()

    return make


def filled(model):
    """Give every trained parameter random values."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator), alpha=0.3)
    return model


@pytest.mark.peers
@pytest.mark.parametrize(
    ("kind", "head", "options"),
    [
        ("LlamaForSequenceClassification", "score", {"num_labels": 3}),
        ("LlamaForTokenClassification", "score", {"num_labels": 3}),
    ],
)
def test_a_new_head_has_to_be_saved(hf, tmp_path, kind, head, options):
    """Refused with the way out; then another process, and PEFT, get the trained head."""
    model = hf(kind, **options)
    assert drawn_modules(model) == [head]
    with pytest.raises(ValueError, match=rf"{head} holds values drawn.*save=\['{head}'\]"):
        minilora.inject(model, r=2)
    assert not lora_layers(model)
    filled(minilora.inject(model, r=2, alpha=3, modules_to_save=[head]))
    assert head not in lora_layers(model)
    folder = minilora.save(model, tmp_path / "adapter")
    expected = model(IDS)[0]
    again = minilora.load(hf(kind, seed=2, **options), folder)
    torch.testing.assert_close(again(IDS)[0], expected)
    peft = pytest.importorskip("peft")
    theirs = peft.PeftModel.from_pretrained(hf(kind, seed=3, **options), folder)
    torch.testing.assert_close(theirs(IDS)[0], expected)


@pytest.mark.peers
def test_a_new_head_of_an_encoder_is_no_layer_to_adapt(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
        intermediate_size=64, max_position_embeddings=32,
    )  # fmt: skip
    transformers.BertForMaskedLM(config).save_pretrained(tmp_path / "base")
    make = transformers.BertForQuestionAnswering.from_pretrained
    model = make(tmp_path / "base").eval()
    with pytest.raises(ValueError, match="qa_outputs holds values drawn at random"):
        minilora.inject(model, r=2)
    with pytest.raises(ValueError, match="qa_outputs is a target of LoRA too"):
        minilora.inject(model, r=2, targets=["qa_outputs"], modules_to_save=["qa_outputs"])
    filled(minilora.inject(model, r=2, alpha=3, modules_to_save=["qa_outputs"]))
    minilora.save(model, tmp_path / "adapter")
    again = minilora.load(make(tmp_path / "base").eval(), tmp_path / "adapter")
    torch.testing.assert_close(again(IDS)[0], model(IDS)[0])


@pytest.mark.peers
@pytest.mark.parametrize("tied", [False, True])
def test_a_grown_vocabulary_has_to_be_saved(hf, tmp_path, tied):
    ids = torch.arange(55, 64)[None]
    model = hf(rows=64, tie_word_embeddings=tied)
    with pytest.raises(ValueError, match=r"embed_tokens, lm_head hold values drawn"):
        minilora.inject(model, r=2)
    filled(minilora.inject(model, r=2, alpha=3, modules_to_save=["embed_tokens", "lm_head"]))
    folder = minilora.save(model, tmp_path / "adapter")
    expected = model(ids).logits
    again = minilora.load(hf(seed=2, rows=64, tie_word_embeddings=tied), folder)
    torch.testing.assert_close(again(ids).logits, expected)
    with pytest.raises(ValueError, match=r"call model\.resize_token_embeddings\(64\) first"):
        minilora.load(hf(tie_word_embeddings=tied), folder)


def test_a_vocabulary_that_grows_after_inject_is_named_by_save(hf, tmp_path):
    model = minilora.inject(hf(), r=2, alpha=3)
    model.resize_token_embeddings(64)
    with pytest.warns(UserWarning, match=r"embed_tokens, lm_head of the base holds values drawn"):
        folder = minilora.save(model, tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"grew: model\.resize_token_embeddings\(64\) first"):
        minilora.load(hf(), folder)


@pytest.mark.peers
@pytest.mark.parametrize("tied", [False, True])
def test_pefts_adapter_over_a_grown_vocabulary_loads(hf, tmp_path, tied):
    """PEFT writes embedding and head along, and says so nowhere but in the keys."""
    peft = pytest.importorskip("peft")
    ids = torch.arange(55, 64)[None]
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj"], task_type="CAUSAL_LM")
    theirs = filled(peft.get_peft_model(hf(rows=64, tie_word_embeddings=tied), config))
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=True)
    expected = theirs(ids).logits
    says = minilora.check(tmp_path / "theirs")[0]
    assert says.takes
    assert any("embed_tokens.weight replaces the base's own" in note for note in says.notes)
    model = minilora.load(hf(seed=2, rows=64, tie_word_embeddings=tied), tmp_path / "theirs")
    torch.testing.assert_close(model(ids).logits, expected)
    with pytest.raises(ValueError, match=r"call model\.resize_token_embeddings\(64\) first"):
        minilora.load(hf(tie_word_embeddings=tied), tmp_path / "theirs")
    minilora.save(model, tmp_path / "ours")
    for load in (minilora.load, peft.PeftModel.from_pretrained):
        again = load(hf(seed=3, rows=64, tie_word_embeddings=tied), tmp_path / "ours")
        torch.testing.assert_close(again(ids).logits, expected)


@pytest.mark.peers
def test_what_was_read_and_what_is_not_known_is_no_new_head(hf, llama_config):
    transformers = pytest.importorskip("transformers")
    assert drawn_modules(hf()) == []
    assert drawn_modules(hf(tie_word_embeddings=True)) == []
    config = transformers.LlamaConfig(**llama_config)
    assert drawn_modules(transformers.LlamaForCausalLM(config)) == []


@pytest.mark.peers
def test_a_merged_head_is_no_longer_tied_in_the_config(hf, tmp_path):
    model = hf(tie_word_embeddings=True)
    filled(minilora.inject(model, r=2, targets=["q_proj"], modules_to_save=["lm_head"]))
    expected = model(IDS).logits
    minilora.merge(model, keep=None)
    minilora.eject(model).save_pretrained(tmp_path / "merged")
    assert not json.loads((tmp_path / "merged/config.json").read_text())["tie_word_embeddings"]
    again = type(model).from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(again(IDS).logits, expected)


@pytest.mark.peers
@pytest.mark.parametrize("way", ["disk", "ejected", "nf4"])
def test_weights_that_a_merge_made_are_no_new_head(hf, tmp_path, way):
    """The next adapter goes onto them, as after one of instructions comes one of preferences."""
    model = hf(tie_word_embeddings=True)
    few = {"r": 2, "targets": ["q_proj", "v_proj"]}
    if way == "nf4":
        minilora.quantize(model, "nf4", targets=few["targets"])
    filled(minilora.inject(model, **few))
    minilora.merge(model, keep="disk", mode="dequantize" if way == "nf4" else None)
    if way == "disk":
        minilora.unmerge(model)
    else:
        minilora.eject(model)
    minilora.inject(model, **few, adapter="next")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        minilora.save(model, tmp_path, adapter="next")
    config = type(model.config).from_dict(model.config.to_dict())
    made = type(model)(config)  # not read from a checkpoint: nothing is known of it
    minilora.quantize(made, "nf4", targets="all-linear")
    filled(minilora.inject(made, r=2))
    minilora.eject(minilora.merge(made, mode="dequantize") or made)
    assert drawn_modules(made) == []


@pytest.mark.peers
def test_a_merged_head_is_saved_untied_and_unmerges_tied(hf, tmp_path):
    model = hf(tie_word_embeddings=True)
    filled(minilora.inject(model, r=2, targets=["q_proj", "lm_head"]))
    minilora.merge(model, untie=True)
    model.save_pretrained(tmp_path / "merged")
    assert not json.loads((tmp_path / "merged/config.json").read_text())["tie_word_embeddings"]
    again = type(model).from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(again(IDS).logits, model(IDS).logits)
    assert model.config.tie_word_embeddings
    minilora.unmerge(model)
    model.save_pretrained(tmp_path / "plain")
    assert json.loads((tmp_path / "plain/config.json").read_text())["tie_word_embeddings"]


@pytest.mark.peers
def test_a_merged_model_that_reads_no_tokens_is_saved(tmp_path):
    """It has no embeddings to be tied to."""
    transformers = pytest.importorskip("transformers")
    config = transformers.SegformerConfig(
        depths=[1], hidden_sizes=[8], num_attention_heads=[1], num_encoder_blocks=1, sr_ratios=[1],
        strides=[4], patch_sizes=[7], mlp_ratios=[2], decoder_hidden_size=8,
    )  # fmt: skip
    model = transformers.SegformerForSemanticSegmentation(config).eval()
    filled(minilora.inject(model, r=2, targets=["q_proj"]))
    image = torch.linspace(-1, 1, 3 * 32 * 32).reshape(1, 3, 32, 32)
    minilora.merge(model)
    wanted = model(image).logits
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(image).logits, wanted)
    torch.testing.assert_close(minilora.eject(model)(image).logits, wanted)
