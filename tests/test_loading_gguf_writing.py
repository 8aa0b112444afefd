"""GGUF files that minilora writes, read by the gguf package and run by llama.cpp."""

import copy
import dataclasses
import importlib.util
import json
import subprocess
import sys
import warnings
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from byte_tokenizer import ALPHABET, CHATML, byte_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from model_families import FAMILIES, every_family, read_model, tiny
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend
from torch import nn

import minilora
from minilora.cli.command import main
from minilora.loading import export_gguf, save_gguf, save_pretrained
from minilora.models import GPT2, Gemma2, Gemma3, GPTNeoX, Llama
from minilora.models.rope import Dynamic, Linear, Llama3, LongRope, Yarn
from minilora.text import Tokenizer

BUILT = sorted(name for name, row in FAMILIES.items() if row.ours.gguf is not None)


def adapted(model, r=3, alpha=12, std=0.3, **options):
    """Inject an adapter that changes every layer."""
    minilora.inject(model, r=r, alpha=alpha, **options)
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=std)
    return model


def assert_kept(found, value, fqn, model):
    """A tensor is as it was; where a file has 1 + weight (Gemma's norms), that was rounded."""
    one = model.gguf.stored(fqn, torch.zeros_like(value), model.config).abs().max()
    assert found.shape == value.shape
    assert (found - value).abs().max() <= one * 2**-23, fqn


@pytest.mark.parametrize("family", BUILT)
def test_what_is_stored_is_restored(family):
    """Of every tensor the two functions of a family undo each other."""
    model = tiny(family)
    names = model.gguf
    for fqn, value in model.state_dict().items():
        found = names.restored(fqn, names.stored(fqn, value, model.config), model.config)
        assert_kept(found, value, fqn, model)


@pytest.mark.parametrize("family", BUILT)
@pytest.mark.parametrize("options", [{}, {"rslora": True}])
def test_an_adapter_has_the_names_and_the_change_of_its_layers(tmp_path, family, options):
    """`scale · B A` under a weight's name is the change of that weight as the file stores it."""
    model = adapted(tiny(family), **options)
    export_gguf(model, tmp_path / "a.gguf")
    file = gguf.GGUFReader(tmp_path / "a.gguf")
    field = {name: file.fields[name].contents() for name in file.fields}
    assert field["general.type"] == "adapter"
    assert field["adapter.type"] == "lora"
    assert field["general.architecture"] == model.gguf.architecture
    tensors = {tensor.name: tensor.data for tensor in file.tensors}
    layers = {n: m for n, m in model.named_modules() if isinstance(m, minilora.LoRALayer)}
    assert len(tensors) == 2 * len(layers)
    known = gguf.get_tensor_name_map(
        next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == model.gguf.architecture), 2
    )
    for fqn, layer in layers.items():
        name = known.get_name(fqn) + ".weight"
        A, B = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
        scale = field["adapter.lora.alpha"] / len(A)
        wanted = model.gguf.stored(f"{fqn}.weight", layer.delta_weight("default"), model.config)
        found = scale * (B.astype(np.float64) @ A.astype(np.float64))
        assert np.abs(found - wanted.detach().double().numpy()).max() < 1e-5 * wanted.abs().max()


@given(r=st.integers(1, 6), alpha=st.floats(0.5, 40))
def test_ranks_that_differ_are_brought_to_one(tmp_path_factory, r, alpha):
    file = tmp_path_factory.mktemp("g") / "a.gguf"
    model = adapted(tiny("llama"), r=r, alpha=alpha, rank_pattern={"q_proj": r + 2})
    export_gguf(model, file)
    found = gguf.GGUFReader(file)
    shapes = {t.data.shape for t in found.tensors if t.name.endswith("lora_a")}
    assert {shape[0] for shape in shapes} == {r + 2}
    assert found.fields["adapter.lora.alpha"].contents() == r + 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_factors_are_written_in_other_dtypes(tmp_path, dtype):
    model = adapted(tiny("llama"))
    report = export_gguf(model, tmp_path / "a.gguf", dtype=dtype)
    assert 1e-5 < report.error < 1e-2
    kinds = {str(t.tensor_type.name) for t in gguf.GGUFReader(tmp_path / "a.gguf").tensors}
    assert kinds == {{torch.float16: "F16", torch.bfloat16: "BF16"}[dtype]}


def test_what_llama_cpp_adds_nothing_to_is_refused(tmp_path):
    file = tmp_path / "a.gguf"
    model = adapted(tiny("llama"), targets=["embed_tokens"])
    with pytest.raises(ValueError, match=r"linear layers .*found model\.embed_tokens; merge"):
        export_gguf(model, file)
    nameless = adapted(tiny("gpt2"))
    nameless.gguf = None
    with pytest.raises(ValueError, match="needs a model whose names in it are built, found GPT2"):
        export_gguf(nameless, file)
    with pytest.raises(ValueError, match=r"found lm_head; merge"):
        export_gguf(adapted(tiny("llama", tied=True), targets=["lm_head"]), file)
    with pytest.raises(ValueError, match="needs r=... for a DoRA adapter"):
        export_gguf(adapted(tiny("llama"), dora=True), file)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_is_named_and_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(RuntimeError, match=r"written needs gguf .*minilora\[gguf\]"):
        export_gguf(adapted(tiny("llama")), tmp_path / "a.gguf")
    assert list(tmp_path.iterdir()) == []


# --- models, and llama.cpp as the judge -----------------------------------------------------------

LETTERS = [*ALPHABET.values(), "<|end|>", "<|im_start|>", "<|im_end|>", "ab", "er"]
TOKENIZER = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": LETTERS,
    "tokenizer.ggml.token_type": [3 if letter.startswith("<|") else 1 for letter in LETTERS],
    "tokenizer.ggml.merges": ["a b", "e r"],
    "tokenizer.ggml.eos_token_id": LETTERS.index("<|end|>"),
    "tokenizer.chat_template": CHATML,
}
JUDGE = Path(__file__).with_name("llama_cpp_text.py")
SHAPES = {  # what llama.cpp has
    "gpt_neox": {"attention_bias": True},
    "mistral": {"sliding_window": None},
    "smollm3": {"num_hidden_layers": 5, "no_rope_layer_interval": 4},
}
ASKED = "Where is the ab er"


def writer(family, **changes):
    """A model that writes letters (any other logit is 0), and its tokenizer."""
    torch.manual_seed(2)
    row = FAMILIES[family]
    changes = SHAPES.get(family, {}) | changes
    config = row.tiny.replace(vocab_size=len(LETTERS), eos_token_id=256, **changes)
    model = row.ours(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
        written = [i for i, letter in enumerate(LETTERS) if letter.isascii() and letter.isalpha()]
        others = [i for i in range(len(LETTERS)) if i not in written]
        model.lm_head.weight[others] = 0
    return model, Tokenizer.from_metadata(TOKENIZER)


def theirs(model, adapter=None, tokens=12):
    """What llama.cpp writes after ASKED, greedily, and its first log-probabilities."""
    if importlib.util.find_spec("xllamacpp") is None:
        pytest.skip("xllamacpp is not installed")
    words = [sys.executable, JUDGE, ASKED, tokens, model, *([] if adapter is None else [adapter])]
    done = subprocess.run([*map(str, words)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout.splitlines()[-1])
    return told["text"], {LETTERS.index(token): value for token, value in told["first"].items()}


def with_their_gelu(model):
    """A copy that takes GELU as llama.cpp does, from a table of float16; others have none."""
    found = copy.deepcopy(model)
    for module in found.modules():
        name = type(module).__name__
        if name == "PlainMLP":
            module.act = _table
        elif isinstance(model, (Gemma2, Gemma3)) and name.endswith("MLP"):
            module.forward = lambda x, m=module: m.down_proj(_table(m.gate_proj(x)) * m.up_proj(x))
    return found


def _table(x):
    return nn.functional.gelu(x.half().float(), approximate="tanh").half().float()


def agree(theirs, model, tokenizer, tokens=12):
    """Hold text and first log-probabilities against ours, and return the text."""
    text, first = theirs
    with torch.no_grad():
        logits = with_their_gelu(model)(torch.tensor([tokenizer.encode(ASKED)]))[0, -1]
    wanted = logits.double().log_softmax(0)
    # A GELU whose argument lies between two entries of the table may take the other one.
    bound = 1e-4 if isinstance(model, (GPT2, GPTNeoX, Gemma2, Gemma3)) else 3e-5
    assert len(first) == 4
    for i, value in first.items():
        assert value == pytest.approx(wanted[i].item(), abs=bound)
    asked = {"tokenizer": tokenizer, "max_new_tokens": tokens}
    assert text == minilora.generate(model, ASKED, **asked)[0]
    return text


@pytest.mark.peers
@every_family("GGUF files, llama.cpp's text")
def test_llama_cpp_writes_the_same_text(tmp_path, family):
    """From base and adapter, and from the merged model."""
    model, tokenizer = writer(family)
    save_gguf(model, tmp_path / "base.gguf", tokenizer, type="f32")
    base = agree(theirs(tmp_path / "base.gguf"), model, tokenizer)
    adapted(model)
    export_gguf(model, tmp_path / "a.gguf")
    both = theirs(tmp_path / "base.gguf", tmp_path / "a.gguf")
    assert agree(both, model, tokenizer) != base
    minilora.merge(model, keep=None)
    minilora.eject(model)
    save_gguf(model, tmp_path / "merged.gguf", tokenizer, type="f32")
    assert agree(theirs(tmp_path / "merged.gguf"), model, tokenizer) == both[0]


ENDING = ("<|endoftext|>", "<|end|>", "<end_of_turn>", "<|x|>", "<|y|>", "<|z|>")  # from 256 on
ENDS = """
import json, sys, xllamacpp
asked = xllamacpp.CommonParams()
asked.model.path, asked.n_ctx, asked.n_parallel, asked.verbosity = sys.argv[1], 64, 1, 0
asked.cpuparams.n_threads, asked.warmup = 1, False
server, found = xllamacpp.Server(asked), {}
for letter in "abcdef":
    told = {"prompt": letter, "temperature": 0, "max_tokens": 3}
    found[letter] = server.handle_completions(told)["usage"]["completion_tokens"]
print("\\n" + json.dumps(found), flush=True)
"""


def byte_level(vocabulary, merges):
    """A byte-level BPE that does not cut text."""
    backend = Backend(models.BPE(vocabulary, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def _ending(stop_ids):
    """A model that writes the first of ENDING after a, the second after b, … and its tokenizer."""
    letters = [*ALPHABET.values(), *ENDING, "ab"]
    backend = byte_level({letter: i for i, letter in enumerate(letters)}, [("a", "b")])
    backend.add_special_tokens([AddedToken(name, normalized=False) for name in ENDING])
    tokenizer = Tokenizer(backend, eos="<|endoftext|>", stop_ids=stop_ids)
    changes = {"vocab_size": len(letters), "eos_token_id": 256, "tie_word_embeddings": False}
    model = Llama(FAMILIES["llama"].tiny.replace(hidden_size=64, **changes)).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                parameter.zero_()
        embedding = model.model.embed_tokens.weight.normal_()
        model.lm_head.weight.zero_()
        for letter, i in zip(b"abcdef", range(256, 262), strict=True):
            model.lm_head.weight[i] = embedding[letter]
    return model, tokenizer


@pytest.mark.peers
def test_llama_cpp_ends_a_text_where_we_do(tmp_path):
    """Two ends it knows by their names, as we do, and two by the keys that the file has for it."""
    model, tokenizer = _ending([259, 260])
    assert tokenizer.stop_ids == {256, 257, 258, 259, 260}
    save_gguf(model, tmp_path / "a.gguf", tokenizer, type="f32")
    assert minilora.load_model(tmp_path / "a.gguf")[1].stop_ids == tokenizer.stop_ids
    written = {}
    for letter in "abcdef":
        ids = tokenizer.encode(letter)
        (found,) = minilora.generate(model, [ids], max_new_tokens=3, stop=tokenizer.stop_ids)
        written[letter] = min(3, len(found) + 1)  # the one that ends it counts too
    if importlib.util.find_spec("xllamacpp") is None:
        pytest.skip("xllamacpp is not installed")
    words = [sys.executable, "-c", ENDS, str(tmp_path / "a.gguf")]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == written
    assert [written[letter] for letter in "abcde"] == [1] * 5 and written["f"] > 1


def test_ends_that_a_gguf_file_has_no_key_for_are_named(tmp_path):
    model, tokenizer = _ending([259, 260, 261, 10**9])
    message = r"two more ends of a text than eos, found 3; in llama.cpp <\|z\|> will not end one"
    with pytest.warns(UserWarning, match=message):
        save_gguf(model, tmp_path / "a.gguf", tokenizer)
    assert minilora.load_model(tmp_path / "a.gguf")[1].stop_ids == {*range(256, 261)}


@pytest.mark.peers
@pytest.mark.parametrize("family", ["gpt_neox", "olmo2", "llama"])
def test_llama_cpp_reads_a_head_that_is_the_embedding(tmp_path, family):
    """Of some architectures it asks for a head's tensor all the same."""
    model, tokenizer = writer(family, tie_word_embeddings=True)
    save_gguf(model, tmp_path / "a.gguf", tokenizer, type="f32")
    agree(theirs(tmp_path / "a.gguf"), model, tokenizer)


ROPES = {
    "linear": Linear(3.0),
    "yarn": Yarn(16, 4.0),
    "llama3": Llama3(8.0, 1.0, 4.0, 16),
    "longrope": LongRope((1.0, 1.5, 2, 4, 4, 5, 6, 7), tuple(range(2, 10)), 512, factor=4.0),
    "longrope, long": LongRope((1.0, 1.5, 2, 4, 4, 5, 6, 7), tuple(range(2, 10)), 2, factor=4.0),
}
SCALED = [
    (family, rope)
    for family in BUILT
    for rope in ROPES
    if rope.split(",")[0] in FAMILIES[family].ours.gguf.ropes
]


@pytest.mark.peers
@pytest.mark.parametrize(("family", "rope"), SCALED)
def test_llama_cpp_rotates_as_the_model_does(tmp_path, family, rope):
    """It takes the long factors where its context, here 256, is longer than the original one."""
    wide = {"hidden_size": 64, "head_dim": 16}
    wide |= {"query_pre_attn_scalar": 16} if "gemma" in family else {}
    wide |= {"partial_rotary_factor": 1.0} if family == "gpt_neox" else {}
    if family == "gemma3_text":  # scaled where there is no window
        types = ("sliding_attention",) * 5 + ("full_attention",)
        wide |= {"num_hidden_layers": 6, "layer_types": types}
    plain, _ = writer(family, **wide)
    model, tokenizer = writer(family, rope_scaling=ROPES[rope], **wide)
    ids = torch.tensor([tokenizer.encode(ASKED)])
    with torch.no_grad():
        assert (plain(ids) - model(ids)).abs().max() > 0.01
    save_gguf(model, tmp_path / "a.gguf", tokenizer, type="f32")
    agree(theirs(tmp_path / "a.gguf"), model, tokenizer)
    with torch.no_grad():
        again = read_model(tmp_path / "a.gguf")(ids)
        assert (again - model(ids)).abs().max() <= 1e-5 * again.abs().max()


def test_a_rope_that_llama_cpp_has_no_name_for_is_refused(tmp_path):
    model, tokenizer = writer("llama", rope_scaling=Dynamic(2.0))
    with pytest.raises(ValueError, match="must tell all of the model's configuration"):
        save_gguf(model, tmp_path / "a.gguf", tokenizer)
    model, tokenizer = writer("qwen2", rope_scaling=ROPES["llama3"])
    with pytest.raises(ValueError, match="qwen2: the rotary embedding 'llama3' is not built"):
        save_gguf(model, tmp_path / "a.gguf", tokenizer)
    model, tokenizer = writer("llama", rope_scaling=Yarn(16, 4.0, attention_factor=2.0))
    with pytest.raises(ValueError, match="must tell all of the model's configuration"):
        save_gguf(model, tmp_path / "a.gguf", tokenizer)
    model, tokenizer = writer("smollm3", num_hidden_layers=3, no_rope_layers=(0, 1, 1))
    with pytest.raises(ValueError, match="must tell all of the model's configuration"):
        save_gguf(model, tmp_path / "a.gguf", tokenizer)
    model, tokenizer = writer("gpt_neox", attention_bias=False)
    with pytest.raises(ValueError, match="must tell all of the model's configuration"):
        save_gguf(model, tmp_path / "a.gguf", tokenizer)
    model, tokenizer = writer("mistral", sliding_window=8)
    with pytest.raises(ValueError, match="must tell all of the model's configuration"):
        save_gguf(model, tmp_path / "a.gguf", tokenizer)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("family", BUILT)
@pytest.mark.parametrize("tied", [False, True])
def test_a_model_is_read_again(tmp_path, family, tied):
    model, tokenizer = writer(family, tie_word_embeddings=tied)
    if not tied and "lm_head" not in model.gguf.whole.values():
        with pytest.raises(ValueError, match="a GGUF file has no name for lm_head.weight"):
            save_gguf(model, tmp_path / "a.gguf", tokenizer)
        return
    save_gguf(model, tmp_path / "a.gguf", tokenizer, type="f32")
    read, words = minilora.load_model(tmp_path / "a.gguf", dtype=None)
    told = dataclasses.asdict(read.config)
    if model.gguf.own_head:  # a copy of the embedding, as llama.cpp asks for one
        told["tie_word_embeddings"] = tied
    for field, value in dataclasses.asdict(model.config).items():
        if isinstance(value, float):  # the file has f32, or nothing of what is by default
            assert told[field] in (value, np.float32(value)), field
        elif not field.endswith("_token_id") and field in told:  # a Mistral's is a Llama's
            assert told[field] == value, field
    assert read.config.eos_token_id == 256
    for fqn, value in model.state_dict().items():
        assert_kept(read.state_dict()[fqn], value, fqn, model)
    assert words.chat_template == CHATML
    assert words.stop_ids == tokenizer.stop_ids
    text = "I'll  go 12345\n\n to Ünï 🙂 <|im_start|>"
    assert words.encode(text) == tokenizer.encode(text)


@pytest.mark.parametrize(("type", "error"), [("f16", 1e-3), ("bf16", 8e-3), ("q8_0", 1e-2)])
def test_matrices_are_written_in_other_types(tmp_path, type, error):
    model, tokenizer = writer("llama", hidden_size=32, intermediate_size=40, head_dim=8)
    save_gguf(model, tmp_path / "a.gguf", tokenizer, type=type)
    read = read_model(tmp_path / "a.gguf")
    for fqn, value in model.state_dict().items():
        worst = (read.state_dict()[fqn] - value).abs().max() / value.abs().max()
        assert worst <= (error if value.dim() > 1 else 0), fqn
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "a.gguf").tensors}
    assert kinds["blk.0.attn_q.weight"] == type.upper()
    # A row of 40 weights is no multiple of 32.
    assert kinds["blk.0.ffn_down.weight"] == ("F32" if type == "q8_0" else type.upper())
    assert kinds["output_norm.weight"] == "F32"


def test_what_a_model_file_cannot_hold_is_refused(tmp_path):
    model, tokenizer = writer("llama")
    file = tmp_path / "a.gguf"
    with pytest.raises(ValueError, match="type must be one of f32, f16, q8_0, bf16, found 'q4'"):
        save_gguf(model, file, tokenizer, type="q4")
    with pytest.raises(ValueError, match="cut text as one of gpt-2, .* found another way"):
        save_gguf(model, file, byte_tokenizer(CHATML, merges=[("2", ",")]))
    with pytest.raises(ValueError, match="must be a byte-level BPE, found WordLevel"):
        save_gguf(model, file, Tokenizer(Backend(models.WordLevel({"a": 0}, unk_token="a"))))
    with pytest.raises(ValueError, match="must have merges, found none: .* write a folder instead"):
        save_gguf(model, file, byte_tokenizer(CHATML))
    nameless = tiny("gpt2")
    nameless.gguf = None
    with pytest.raises(ValueError, match="whose names in it are built, found GPT2"):
        save_gguf(nameless, file, tokenizer)
    with torch.no_grad():
        model.lm_head.weight[3, 3] = 1e5
    with pytest.raises(ValueError, match=r"output\.weight must be finite in f16, found .*1e\+05"):
        save_gguf(model, file, tokenizer)
    with pytest.raises(ValueError, match="found adapters or quantized layers; merge and eject"):
        save_gguf(adapted(model), file, tokenizer)
    assert list(tmp_path.iterdir()) == []


def test_integers_of_a_config_are_written_as_floats(tmp_path):
    """llama.cpp refuses the file otherwise."""
    model, tokenizer = writer("llama", rope_theta=100000)
    save_gguf(model, tmp_path / "a.gguf", tokenizer, type="f32")
    field = gguf.GGUFReader(tmp_path / "a.gguf").fields["llama.rope.freq_base"]
    assert field.types == [gguf.GGUFValueType.FLOAT32]
    agree(theirs(tmp_path / "a.gguf"), model, tokenizer)


def test_norms_of_a_gemma_in_bf16_are_not_rounded(tmp_path):
    model, tokenizer = writer("gemma2")
    save_gguf(model.bfloat16(), tmp_path / "a.gguf", tokenizer, type="f32")
    read = read_model(tmp_path / "a.gguf").state_dict()
    for fqn, value in model.state_dict().items():
        assert (read[fqn] - value.float()).abs().max() <= 1e-6 * value.abs().max(), fqn


def test_what_llama_cpp_does_not_do_with_a_text_is_refused_or_said(tmp_path):
    model, tokenizer = writer("llama")
    backend = Backend.from_str(tokenizer.to_json())
    backend.normalizer = normalizers.Replace("``", '"')
    with pytest.raises(ValueError, match="no key for a tokenizer's normalizer, found Replace"):
        save_gguf(model, tmp_path / "a.gguf", Tokenizer(backend, eos="<|end|>"))
    backend.normalizer = normalizers.NFC()
    with pytest.warns(UserWarning, match="in llama.cpp text is not brought to NFC$"):
        save_gguf(model, tmp_path / "a.gguf", Tokenizer(backend, eos="<|end|>"))
    backend.add_tokens([AddedToken("[T]", lstrip=True)])
    with pytest.raises(ValueError, match="found 261 rows and 262 ids; resize the embedding"):
        save_gguf(model, tmp_path / "b.gguf", Tokenizer(backend, eos="<|end|>"))


def test_what_llama_cpp_does_not_read_of_a_file_is_said(tmp_path):
    model, tokenizer = writer("llama", rope_scaling=Yarn(16, 4.0, beta_fast=8.0, beta_slow=1.0))
    with pytest.warns(UserWarning, match="command line alone: --yarn-beta-fast 8$"):
        save_gguf(model, tmp_path / "a.gguf", tokenizer)
    model, tokenizer = writer("phi3", sliding_window=8)
    with pytest.warns(UserWarning, match="no window for phi3, and this model has one of 8 tokens"):
        save_gguf(model, tmp_path / "b.gguf", tokenizer)
    model.config = model.config.replace(sliding_window=model.config.max_position_embeddings)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_gguf(model, tmp_path / "b.gguf", tokenizer)
    model, tokenizer = writer("qwen3", attention_bias=True)  # llama.cpp refuses such a file
    with pytest.raises(ValueError, match="must tell all of the model's configuration"):
        save_gguf(model, tmp_path / "c.gguf", tokenizer)


@pytest.mark.peers
@pytest.mark.parametrize(
    ("family", "options"),
    [("llama", {"rope_scaling": Yarn(256, 4.0, beta_fast=4.0)}), ("phi3", {"sliding_window": 8})],
)
def test_llama_cpp_still_does_not_read_it(tmp_path, family, options):
    """Where this fails, llama.cpp reads the key, and the warning can go."""
    wide = {"hidden_size": 64, "head_dim": 16} if family == "llama" else {}
    model, tokenizer = writer(family, **wide, **options)
    with pytest.warns(UserWarning, match=r"llama\.cpp"):
        save_gguf(model, tmp_path / "a.gguf", tokenizer, type="f32")
    with pytest.raises(AssertionError):
        agree(theirs(tmp_path / "a.gguf"), model, tokenizer)


def test_an_option_that_no_key_tells_is_refused(tmp_path, monkeypatch):
    model, tokenizer = writer("llama")
    optional = {k: v for k, v in Llama.gguf.optional.items() if v != "rope_theta"}
    names = Llama.gguf._replace(optional=optional)
    model.config = model.config.replace(rope_theta=77.0)
    monkeypatch.setattr(Llama, "gguf", names)
    with pytest.raises(ValueError, match="must tell all of the model's configuration"):
        save_gguf(model, tmp_path / "a.gguf", tokenizer)
    assert list(tmp_path.iterdir()) == []


# --- the command ----------------------------------------------------------------------------------


def test_the_command_writes_what_llama_cpp_answers_from(tmp_path, capsys):
    model, tokenizer = writer("llama")
    save_pretrained(model, tmp_path / "base", tokenizer)
    save_gguf(model, tmp_path / "base.gguf", tokenizer, type="f32")
    minilora.save(adapted(model), tmp_path / "out", base_name=str(tmp_path / "base"))
    adapter, merged = tmp_path / "adapter" / "a.gguf", tmp_path / "merged" / "m.gguf"
    words = ["export", tmp_path / "out", "--gguf", adapter, "--ollama", tmp_path / "base.gguf"]
    assert main([*map(str, words)]) == 2
    assert "--gguf must name a file in a folder that is there" in capsys.readouterr().err
    adapter.parent.mkdir()
    merged.parent.mkdir()
    assert main([*map(str, words)]) == 0
    wanted = agree(theirs(tmp_path / "base.gguf", adapter), model, tokenizer)
    file = (adapter.parent / "Modelfile").read_text()
    assert file == f"FROM {tmp_path / 'base.gguf'}\nADAPTER ./a.gguf\n"
    words = ["merge", tmp_path / "base", "--adapter", tmp_path / "out", "--gguf", merged, "--type"]
    assert main([*map(str, words), "f32", "--ollama"]) == 0
    assert theirs(merged)[0] == wanted
    assert (merged.parent / "Modelfile").read_text() == (
        'FROM ./m.gguf\nPARAMETER stop "<|end|>"\nPARAMETER stop "<|im_end|>"\n'
    )
    out = capsys.readouterr().out
    assert f"GGUF adapter in {adapter}: 14 layers, exact\n" in out
    assert "llama-cli" not in out  # its base is a folder
    base = tmp_path / "base.gguf"
    words = ["export", tmp_path / "out", "--model", base, "--gguf", tmp_path / "b.gguf"]
    assert main([*map(str, words)]) == 0
    command = f"in llama.cpp: llama-cli -m {base} --lora {tmp_path / 'b.gguf'}"
    assert command in capsys.readouterr().out
    assert f"merged model in {merged}, f32" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["export", "out"], "export needs a new folder, or --gguf FILE, found neither"),
        (["export", "out", "n", "--ollama", "b"], "--ollama goes with --gguf, found none"),
        (["merge", "m", "--adapter", "a"], "merge needs --out FOLDER, or --gguf FILE, found neith"),
        (["merge", "m", "--adapter", "a", "--out", "o", "--ollama"], "--ollama goes with --gguf"),
    ],
)
def test_the_command_says_what_is_missing(words, message, capsys):
    assert main(words) == 2
    assert message in capsys.readouterr().err
