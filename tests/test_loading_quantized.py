"""Quantizing while loading, quantized folders, and those transformers saved with bitsandbytes."""

import json
import os
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from small_models import read_by

import minilora
from minilora.files import read_tensors
from minilora.loading.model import load_model
from minilora.loading.quantized import LAYERS
from minilora.loading.saving import save_pretrained
from minilora.models import GPT2, GPT2Config, Llama, LlamaConfig
from minilora.quantization import Quantization, QuantizedLinear, quantized_layers

IDS = torch.tensor([[1, 2, 3, 4, 5]])


def llama(tied=False):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=32,
        tie_word_embeddings=tied,
    )
    return Llama(config)


def gpt2():
    torch.manual_seed(0)
    return GPT2(GPT2Config(vocab_size=61, n_positions=32, n_embd=64, n_layer=2, n_head=2))


def a_tokenizer(folder):
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<|endoftext|>": 0, **{f"w{i}": i for i in range(1, 61)}}
    backend = Tokenizer(models.WordLevel(words, unk_token="<|endoftext|>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')


@pytest.fixture(params=["llama", "tied llama", "gpt2"])
def folder(request, tmp_path):
    kind = request.param
    model = gpt2() if kind == "gpt2" else llama(tied="tied" in kind)
    save_pretrained(model, tmp_path / "full")
    a_tokenizer(tmp_path / "full")
    return tmp_path / "full"


def same_state(a, b):
    mine, theirs = a.state_dict(), b.state_dict()
    assert list(mine) == list(theirs)
    for name, value in mine.items():
        assert value.dtype == theirs[name].dtype, name
        assert torch.equal(value, theirs[name]), name


@pytest.mark.parametrize("format", ["int8", "nf4", "int4"])
def test_quantizing_while_loading_is_quantizing_after(folder, format):
    model, _ = load_model(folder, format, dtype=torch.float32)
    after, _ = load_model(folder, dtype=torch.float32)
    minilora.quantize(after, format)
    same_state(model, after)
    same_state(model, load_model(folder, Quantization(format), dtype=torch.float32)[0])
    assert torch.equal(model(IDS), after(IDS))
    assert not any(
        p.requires_grad
        for m in model.modules()
        if isinstance(m, QuantizedLinear)
        for p in m.parameters()
    )
    if model.config.tie_word_embeddings:
        assert (
            model.lm_head.weight
            is model.get_submodule(
                "transformer.wte" if isinstance(model, GPT2) else "model.embed_tokens"
            ).weight
        )
    minilora.inject(model, r=2)
    assert minilora.summary(model).paths


def test_a_head_asked_for_is_quantized_while_loading(folder, tmp_path):
    """A tied one has no tensor of its own in the file."""
    given = in_parts(folder, "int8", targets=["lm_head"])[1]["lm_head.weight"]
    model, tokenizer = load_model(folder, "int8", targets=["lm_head"], dtype=torch.float32)
    after, _ = load_model(folder, dtype=torch.float32)
    minilora.quantize(after, "int8", targets=["lm_head"])
    assert type(model.lm_head) is QuantizedLinear
    assert torch.equal(given.weight, model.lm_head.weight)
    same_state(model, after)
    save_pretrained(model, tmp_path / "q", tokenizer)
    again, _ = load_model(tmp_path / "q", dtype=None)
    same_state(model, again)
    assert not any(p.requires_grad for p in again.lm_head.parameters())


@pytest.mark.parametrize("format", ["int8", "nf4", "int4"])
def test_save_and_load_give_the_same_codes(folder, format, tmp_path):
    model, tokenizer = load_model(folder, format, dtype=torch.bfloat16)
    save_pretrained(model, tmp_path / "q", tokenizer)
    again, other = load_model(tmp_path / "q", dtype=None)
    same_state(model, again)
    assert torch.equal(model(IDS), again(IDS))
    assert other.encode("w3 w4") == tokenizer.encode("w3 w4")
    assert sum(p.nbytes for p in again.parameters()) == sum(p.nbytes for p in model.parameters())
    wide, _ = load_model(tmp_path / "q", dtype=torch.float32)
    assert wide(IDS).dtype == torch.float32


@pytest.mark.parametrize("double", [True, False])
def test_folders_of_transformers_with_bitsandbytes_load(tmp_path, double):
    save_pretrained(llama(), tmp_path / "full")
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=torch.float32,
    )  # fmt: skip
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "full", quantization_config=config, dtype=torch.float32, device_map="cpu"
    )
    theirs.save_pretrained(tmp_path / "bnb")
    a_tokenizer(tmp_path / "bnb")
    ours, _ = load_model(tmp_path / "bnb", dtype=torch.float32)
    kinds = [m for m in ours.modules() if isinstance(m, QuantizedLinear)]
    assert len(kinds) == 14
    assert kinds[0].spec.double_quant == double
    _, parts = in_parts(tmp_path / "bnb")
    assert sum(isinstance(part, QuantizedLinear) for part in parts.values()) == 14
    direct, _ = load_model(_with_tokenizer(tmp_path / "full"), "nf4", dtype=torch.float32,
                               double_quant=double)  # fmt: skip
    same_state(ours, direct)
    with torch.no_grad():
        mine, judge = ours(IDS), theirs(IDS).logits
    # The codes are the same; bitsandbytes multiplies them in bf16 on a CPU.
    assert float((mine - judge).norm() / judge.norm()) < 1e-2


def _with_tokenizer(folder):
    a_tokenizer(folder)
    return folder


def spoil(folder, name, change):
    tensors = load_file(folder / name)
    change(tensors)
    save_file(tensors, folder / name, metadata={"format": "pt"})


def _key(tensors, end):
    return next(name for name in tensors if name.endswith(end))


def _cut(tensors):
    key = _key(tensors, "up_proj.codes")
    tensors[key] = tensors[key][:-1].clone()


def _zero(tensors):
    tensors[_key(tensors, "scale_bits")].zero_()


def _nan(tensors):
    tensors["model.norm.weight"][3] = float("nan")


def _drop(tensors):
    del tensors[_key(tensors, "down_proj.scale_bits")]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_cut, r"another shape: model.*up_proj.codes \[127, 64\] instead of \[128, 64\]"),
        (_zero, "must have scales above 0, found 0"),
        (_drop, "down_proj.scale_bits"),
        (_nan, "model.norm.weight must be finite, found NaN or Inf; fetch or write"),
    ],
)
def test_damaged_quantized_folders(tmp_path, change, message):
    save_pretrained(llama(), tmp_path / "full")
    a_tokenizer(tmp_path / "full")
    model, tokenizer = load_model(tmp_path / "full", "int8", dtype=torch.float32)
    save_pretrained(model, tmp_path / "q", tokenizer)
    spoil(tmp_path / "q", "quantized.safetensors", change)
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path / "q")


def test_flipped_bits_of_a_quantized_folder_are_refused(tmp_path):
    """Of codes and scales, by which nothing else could tell; a file without checksums is read."""
    save_pretrained(llama(), tmp_path / "full")
    full = _with_tokenizer(tmp_path / "full")
    save_pretrained(*load_model(full, "nf4", dtype=torch.float32)[:1], tmp_path / "q")
    a_tokenizer(tmp_path / "q")
    file = tmp_path / "q" / "quantized.safetensors"
    whole = file.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    places = torch.randint(start, len(whole), (60,), generator=torch.Generator().manual_seed(0))
    for at in places.tolist():
        flipped = bytearray(whole)
        flipped[at] ^= 1 << (at % 8)
        file.write_bytes(flipped)
        with pytest.raises(ValueError, match="damaged or cut short .*SHA-256 that it was saved"):
            read_tensors(file)
    with pytest.raises(ValueError, match="damaged or cut short"):
        load_model(tmp_path / "q")
    file.write_bytes(whole)
    before = load_model(tmp_path / "q")[0](IDS)
    save_file(load_file(file), file, {"format": "pt"})
    assert torch.equal(load_model(tmp_path / "q")[0](IDS), before)


def test_stored_layers_are_multiplied_as_asked_where_their_format_reads_it(tmp_path):
    model = llama()
    minilora.quantize(model, "int8", targets=["q_proj"])
    minilora.quantize(model, "nf4", targets=["v_proj"])
    save_pretrained(model, tmp_path / "two")
    folder = _with_tokenizer(tmp_path / "two")
    found = quantized_layers(load_model(folder, compute="dequantize")[0])
    assert {(m.spec.format, m.spec.compute) for m in found.values()} == {
        ("int8", "dequantize"), ("nf4", "auto")}  # fmt: skip
    save_pretrained(minilora.quantize(llama(), "nf4"), tmp_path / "one")
    folder = _with_tokenizer(tmp_path / "one")
    with pytest.raises(ValueError, match="outliers acts on format='int8' or 'int4' alone"):
        load_model(folder, outliers=4)


def test_a_folder_may_name_what_its_format_does_not_read(tmp_path):
    """As it was written while such options were taken."""
    save_pretrained(minilora.quantize(llama(), "int8"), tmp_path)
    _with_tokenizer(tmp_path)
    file = tmp_path / LAYERS
    told = json.loads(file.read_text())
    for row in told["layers"].values():
        row |= {"block_size": 32, "double_quant": False}
    expected = load_model(tmp_path)[0](IDS)
    file.write_text(json.dumps(told))
    assert torch.equal(load_model(tmp_path)[0](IDS), expected)


def test_other_errors_of_quantized_folders(tmp_path):
    save_pretrained(llama(), tmp_path / "full")
    full = _with_tokenizer(tmp_path / "full")
    with pytest.raises(ValueError, match="block_size say how .* is quantized, found"):
        load_model(full, block_size=32)
    with pytest.raises(ValueError, match="targets, layers say how .* found '.*' without quantize"):
        load_model(full, targets=["q_proj"], layers=[0])
    model, tokenizer = load_model(full, "int8")
    save_pretrained(model, tmp_path / "q", tokenizer)
    for options in ({"block_size": 32}, {"double_quant": False}, {"exclude": ["q_proj"]}):
        with pytest.raises(ValueError, match="say how a model is quantized, .* already; leave th"):
            load_model(tmp_path / "q", **options)
    with pytest.raises(ValueError, match="is quantized already; load it without quantize"):
        load_model(tmp_path / "q", "nf4")
    with pytest.raises(ValueError, match="needs a new or empty folder, found files"):
        save_pretrained(model, tmp_path / "q")
    minilora.inject(model, r=2)
    with pytest.raises(ValueError, match="the model differs in .*; eject adapters"):
        save_pretrained(model, tmp_path / "r")
    entries = json.loads((tmp_path / "q/quantization.json").read_text())
    for version, layers, message in (
        (2, entries["layers"], "version 1 is read, found 2"),
        (1, {"model.layers.9.up": dict(next(iter(entries["layers"].values())))}, "does not have"),
        (1, {"model.layers.0.mlp.up_proj": {"format": "int3"}}, "must describe the layers"),
    ):
        (tmp_path / "q/quantization.json").write_text(
            json.dumps({"version": version, "layers": layers})
        )
        with pytest.raises(ValueError, match=message):
            load_model(tmp_path / "q")
    (tmp_path / "q/quantization.json").write_text(json.dumps(entries))
    (tmp_path / "q/quantized.safetensors").write_bytes(b"12345")
    with pytest.raises(ValueError, match="must be a whole safetensors file"):
        load_model(tmp_path / "q")
    config = json.loads((full / "config.json").read_text())
    for change, message in (
        ({"quantization_config": {}}, "found no 4-bit layers of bitsandbytes"),
        (
            {"quantization_config": {}, "model_type": "bert"},
            r"must be of a causal language model of text, found .* \(bert\)",
        ),
    ):
        (full / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=message):
            load_model(full)


def test_nan_in_a_stored_tensor_is_found_while_loading(tmp_path):
    save_pretrained(llama(), tmp_path / "full")
    full = _with_tokenizer(tmp_path / "full")
    for end in ("up_proj.weight", "norm.weight"):
        spoil(full, "model.safetensors", lambda t, end=end: t[_key(t, end)].view(-1)[3:4].fill_(
            float("nan")))  # fmt: skip
        with pytest.raises(ValueError, match="must be finite, found NaN or Inf; fetch or write"):
            load_model(full, "nf4")
    with pytest.raises(ValueError, match="'nope' matches none"):
        load_model(full, "nf4", targets=["nope"])
    with pytest.raises(ValueError, match="format must be one of"):
        load_model(full, "fp4")


@pytest.mark.parametrize("part", ["up_proj.scale_bits", "norm.weight"])
def test_what_float16_cannot_hold_is_refused_where_it_was_quantized_too(tmp_path, part):
    save_pretrained(llama(), tmp_path / "full")
    model, tokenizer = load_model(_with_tokenizer(tmp_path / "full"), "int8", dtype=None)
    save_pretrained(model, tmp_path / "q", tokenizer)

    def enlarge(tensors):
        values = tensors[_key(tensors, part)].view(torch.float32).view(-1)
        values[0] = 1e5

    spoil(tmp_path / "q", "quantized.safetensors", enlarge)
    for options in ({}, {"prepare": lambda model: lambda name, value: None}):
        with pytest.raises(ValueError, match=r"must be finite in torch.float16, found"):
            load_model(tmp_path / "q", dtype=torch.float16, **options)
    assert load_model(tmp_path / "q", dtype=torch.bfloat16)


def in_parts(folder, format=None, **options):
    """Load by `prepare`; return what it was given, whole and quantized."""
    given = {}

    def prepare(model):
        assert all(p.is_meta for p in model.parameters())
        return lambda name, value: given.update({name: value})

    model, _ = load_model(folder, format, dtype=torch.float32, prepare=prepare, **options)
    return model, given


@pytest.mark.parametrize("format", ["int8", "nf4", "int4"])
def test_a_model_read_in_parts_gets_the_same_codes(folder, tmp_path, format):
    """While quantizing, and from a folder: every parameter once, in a model of shapes."""
    blocks = read_by(format, block_size=32)
    whole, tokenizer = load_model(folder, format, **blocks, dtype=torch.float32)
    save_pretrained(whole, tmp_path / "q", tokenizer)
    expected = dict(whole.named_parameters())
    for model, given in (in_parts(folder, format, **blocks), in_parts(tmp_path / "q")):
        assert {n: p.shape for n, p in model.named_parameters()} == {
            n: p.shape for n, p in expected.items()
        }
        found = {}
        for name, value in given.items():
            if isinstance(value, QuantizedLinear):
                owner = name.removesuffix(".weight")
                found |= {f"{owner}.{part}": t for part, t in value.named_parameters()}
                assert torch.equal(value.weight, whole.get_submodule(owner).weight)
            else:
                found[name] = value
        tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
        assert found.keys() == expected.keys() - tied
        assert all(torch.equal(value, expected[name]) for name, value in found.items())


def test_reading_in_parts_refuses_what_is_damaged_or_not_there(tmp_path):
    save_pretrained(llama(), tmp_path / "full")
    full = _with_tokenizer(tmp_path / "full")
    model, tokenizer = load_model(full, "int8", dtype=torch.float32)
    save_pretrained(model, tmp_path / "q", tokenizer)
    file = tmp_path / "q" / "quantized.safetensors"
    state = load_file(file)
    name = next(key for key in state if key.endswith("up_proj.codes"))
    norm = next(key for key in state if key.endswith("norm.weight"))
    for change, message in (
        ({name: state[name][:-1].clone()}, "of another shape: .*up_proj.codes"),
        ({name: state[name].short()}, r"must have codes of torch.int8 .* found torch.int16"),
        ({name: torch.full_like(state[name], -128)}, "must have codes of -127 to 127, found -128"),
        ({"model.other": torch.zeros(2)}, "found unexpected: model.other"),
        ({norm: state[norm] * float("nan")}, "must be finite, found NaN or Inf; fetch or write"),
    ):
        save_file(state | change, file)
        with pytest.raises(ValueError, match=message):
            in_parts(tmp_path / "q")


PEAK = """
import sys, torch
from minilora.loading import load_model
def status(key):
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith(key)) / 1024
load_model(sys.argv[2], "nf4", dtype=torch.bfloat16)  # so that all code is in memory
before = status("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # resets the peak
model, _ = load_model(sys.argv[1], "nf4", dtype=torch.bfloat16)
peak = status("VmHWM")
final = sum(p.nbytes for p in model.parameters()) / 2**20
print(peak - before - final, final)
"""


def test_peak_memory_while_quantizing_is_one_tensor(tmp_path):
    """A checkpoint written shard by shard: the peak is the result and one tensor.

    With BIG=1 (`make soak`) it is one of over 1 GB; the bound is the same.
    """
    big = bool(os.environ.get("BIG"))
    hidden, wide, blocks, vocab = (2048, 8192, 5, 8000) if big else (1024, 4096, 4, 4000)
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=hidden, intermediate_size=wide, num_hidden_layers=blocks,
        num_attention_heads=16, num_key_value_heads=16, head_dim=128,
        max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    model = Llama(config, device="meta")
    folder = tmp_path / "big"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config.to_dict(torch.float32)))
    a_tokenizer(folder)
    save_pretrained(llama(), tmp_path / "little")
    little = _with_tokenizer(tmp_path / "little")
    shards: dict[str, list] = {}
    for name, parameter in model.named_parameters():
        shards.setdefault(name.split(".")[2] if ".layers." in name else "x", []).append(
            (name, parameter.shape)
        )
    index, total = {}, 0
    for shard, rows in shards.items():
        tensors = {name: torch.full(shape, 0.01) for name, shape in rows}
        total += sum(t.nbytes for t in tensors.values())
        save_file(tensors, folder / f"s{shard}.safetensors", metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, f"s{shard}.safetensors")
        del tensors
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    assert total > (1e9 if big else 0.2e9)
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(folder), str(little)],
        capture_output=True,
        text=True,
        check=True,
    )
    over, final = map(float, done.stdout.split())
    largest = max(wide * hidden, vocab * hidden) * 4 / 2**20
    assert final < 0.3 * total / 2**20
    # 16 MB of a file may be mapped beside it.
    assert over <= largest + 16 + 48, f"{over:.0f} MB over the result of {final:.0f} MB"
