"""Hugging Face folders, read and written, judged by transformers."""

import json
import os
import resource
import shutil
import struct
import warnings

import pytest
import torch
from model_families import read_model, their_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_files import every_kill, needs_fork
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers, processors
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
from transformers import LlamaConfig as TheirConfig

from minilora.loading.model import load_model
from minilora.loading.saving import save_pretrained
from minilora.text.tokenizer import Tokenizer

pytestmark = pytest.mark.peers

F32 = 1e-5  # two f32 computations in another order, relative to the largest value
QUERY = "model.layers.0.self_attn.q_proj.weight"
EMBEDDING = "model.embed_tokens.weight"


def _theirs(dtype=torch.float32, **changes):
    shape = {
        "vocab_size": 53,
        "hidden_size": 24,
        "intermediate_size": 28,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    torch.manual_seed(0)
    model = LlamaForCausalLM(TheirConfig(**{**shape, **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.to(dtype)


@pytest.fixture
def folder(tmp_path):
    """A folder that transformers wrote."""
    _theirs().save_pretrained(tmp_path / "theirs")
    return tmp_path / "theirs"


def _ids():
    return torch.arange(20).reshape(2, 10)


def _close(found, wanted):
    assert (found - wanted).abs().max() <= F32 * wanted.abs().max()


def _rewrite(folder, change):
    """Change the tensors of a folder."""
    tensors = load_file(folder / "model.safetensors")
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _edit(file, **entries):
    file.write_text(json.dumps({**json.loads(file.read_text()), **entries}))


def _everything(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


# --- both ways ----------------------------------------------------------------------------------


@pytest.mark.parametrize("mapped", [1, 2**26])
def test_reading_reads_shards(monkeypatch, tmp_path, mapped):
    monkeypatch.setattr("minilora.loading.folder._MAPPED", mapped)
    theirs = _theirs()
    theirs.save_pretrained(tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    with torch.no_grad():
        _close(read_model(tmp_path)(_ids()), theirs(_ids()).logits)


def test_save_pretrained_stores_shared_memory_twice_where_the_config_unties(tmp_path, folder):
    ours = read_model(folder)
    ours.lm_head.weight = ours.model.embed_tokens.weight
    save_pretrained(ours, tmp_path / "ours")
    with safe_open(tmp_path / "ours" / "model.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("lm_head.weight"), file.get_tensor(EMBEDDING))
    with torch.no_grad():
        _close(AutoModelForCausalLM.from_pretrained(tmp_path / "ours")(_ids()).logits, ours(_ids()))


# --- dtype, prepare, memory ---------------------------------------------------------------------


def test_reading_keeps_or_changes_the_dtype(tmp_path):
    _theirs(torch.bfloat16).save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    kept = read_model(tmp_path).state_dict()
    wide = read_model(tmp_path, dtype=torch.float64).state_dict()
    for name, tensor in stored.items():
        assert torch.equal(kept[name], tensor)
        assert kept[name].dtype == torch.bfloat16
        assert torch.equal(wide[name], tensor.double())


def test_reading_auto_takes_the_fastest_dtype(monkeypatch, folder):
    monkeypatch.setattr("minilora.loading.source.fastest_dtype", lambda device: torch.float16)
    assert read_model(folder, dtype="auto").lm_head.weight.dtype == torch.float16


def test_reading_takes_the_name_of_a_dtype(folder):
    assert read_model(folder, dtype="bfloat16").lm_head.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", ["int8", torch.int8, 3])
def test_reading_refuses_another_dtype(folder, dtype):
    with pytest.raises(ValueError, match="dtype must be a floating-point torch dtype .* or its"):
        read_model(folder, dtype=dtype)


def test_reading_refuses_mixed_dtypes_unless_one_is_named(folder):
    _rewrite(folder, lambda t: t.update({QUERY: t[QUERY].half()}))
    with pytest.raises(ValueError, match="stored in one dtype, found F16, F32"):
        read_model(folder)
    assert read_model(folder, dtype=torch.float32)(_ids()).dtype == torch.float32


def test_prepare_gets_every_tensor_once_in_the_wanted_dtype(tmp_path):
    theirs = _theirs(tie_word_embeddings=True)
    theirs.save_pretrained(tmp_path)
    seen = {}

    def prepare(model):
        assert all(p.is_meta and p.dtype == torch.float64 for p in model.parameters())
        return lambda fqn, tensor: seen.update({fqn: (fqn in seen, tensor)})

    read_model(tmp_path, dtype=torch.float64, prepare=prepare)
    assert seen.keys() == dict(theirs.named_parameters()).keys()
    for fqn, (again, tensor) in seen.items():
        assert not again
        assert torch.equal(tensor, theirs.get_parameter(fqn).double())


@pytest.mark.parametrize("prepared", [False, True])
def test_reading_holds_one_tensor_beside_the_model(monkeypatch, tmp_path, prepared):
    """Every tensor is copied out of the mapped file, and none is read before it is needed."""
    _theirs().save_pretrained(tmp_path)
    alive, reads = {}, []
    original = safe_open(tmp_path / "model.safetensors", "pt").__class__

    class Watched:
        def __init__(self, *args, **kwargs):
            self.file = original(*args, **kwargs)

        def __enter__(self):
            self.file.__enter__()
            return self

        def __exit__(self, *args):
            return self.file.__exit__(*args)

        def __getattr__(self, name):
            return getattr(self.file, name)

        def get_tensor(self, name):
            assert len(reads) == len(alive) or not prepared
            reads.append(name)
            return self.file.get_tensor(name)

    monkeypatch.setattr("minilora.files.tensors.safe_open", Watched)
    prepare = (lambda model: alive.__setitem__) if prepared else None
    found = read_model(tmp_path, prepare=prepare).state_dict()
    found = alive if prepared else found
    assert reads == list(alive) or not prepared
    wanted = {name: tensor.clone() for name, tensor in found.items()}
    (tmp_path / "model.safetensors").write_bytes(  # in place: a view would change with it
        bytes(os.path.getsize(tmp_path / "model.safetensors"))
    )
    for name, tensor in found.items():
        assert torch.equal(tensor, wanted[name])


# --- tensors that do not fit --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(QUERY), f"found missing: {QUERY};"),
        (lambda t: t.update(extra=torch.ones(2)), "found unexpected: extra;"),
        (lambda t: t.update({QUERY: torch.ones(3, 24)}), r"q_proj.weight \[3, 24\] instead of"),
        (
            lambda t: t.clear() or t.update(a=torch.ones(1), b=torch.ones(1)),
            "missing: .* and 16 more; unexpected: a, b",
        ),
        (
            lambda t: t.update({QUERY: t[QUERY].to(torch.int8)}),
            "q_proj.weight in .* found I8",
        ),
    ],
)
def test_reading_refuses_other_tensors_by_name(folder, change, message):
    _rewrite(folder, change)
    with pytest.raises(ValueError, match=message):
        read_model(folder, dtype=torch.float32)


def test_reading_passes_over_stored_frequencies(folder):
    _rewrite(
        folder, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": t[QUERY] * 1})
    )
    read_model(folder)


def test_reading_reads_a_tied_head_only_when_it_is_the_embedding(folder):
    _theirs(tie_word_embeddings=True).save_pretrained(folder)
    _rewrite(folder, lambda t: t.update({"lm_head.weight": t[EMBEDDING].clone()}))
    ours = read_model(folder)
    assert ours.lm_head.weight is ours.model.embed_tokens.weight
    _rewrite(folder, lambda t: t["lm_head.weight"].add_(1))
    with pytest.raises(ValueError, match=r"tie_word_embeddings is true in .* differs from"):
        read_model(folder)


# --- damaged and hostile folders ----------------------------------------------------------------


def test_reading_refuses_what_is_no_model_folder(tmp_path, folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"found \['pytorch_model.bin'\] in .* only safetensors"):
        read_model(folder)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(ValueError, match="found neither in"):
        read_model(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "must be JSON"),
        ("[1]", "must hold a JSON object, found list"),
        ("\0", "must be JSON"),
        (
            '{"a": {"b": 1, "c": 2, "b": 1}}',
            "must be JSON, found otherwise: the key 'b' is given twice",
        ),
    ],
)
def test_reading_refuses_a_damaged_config(folder, text, message):
    (folder / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_model(folder)


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_reading_names_a_truncated_file(folder, keep):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"model\.safetensors' must be a whole safetensors file"):
        read_model(folder)


def test_reading_names_a_file_with_a_damaged_header(folder):
    file = folder / "model.safetensors"
    raw = file.read_bytes()
    file.write_bytes(struct.pack("<Q", 2**60) + raw[8:])
    with pytest.raises(ValueError, match=r"model\.safetensors' must be a whole safetensors file"):
        read_model(folder)


@pytest.fixture
def sharded(tmp_path):
    _theirs().save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    return tmp_path / "sharded"


@pytest.mark.parametrize(
    "name",
    [
        "../outside.safetensors",
        "a/../../outside.safetensors",
        "{above}/outside.safetensors",
        "{above}/sharded/outside.safetensors",  # inside, and still not a name in the folder
        "a/../outside.safetensors",
    ],
)
def test_reading_refuses_an_index_that_leads_out(sharded, name):
    for place in (sharded.parent, sharded):
        save_file({"secret": torch.ones(1)}, place / "outside.safetensors")
    (sharded / "a").mkdir()
    name = name.format(above=sharded.parent)
    index = sharded / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    _edit(index, weight_map={**weight_map, QUERY: name})
    with pytest.raises(ValueError, match=r"must name files inside its folder, found .*outside"):
        read_model(sharded)


def test_reading_refuses_a_link_that_leads_out(sharded):
    shard = next(sharded.glob("model-*.safetensors"))
    outside = sharded.parent / "outside.safetensors"
    shard.rename(outside)
    shard.symlink_to(outside)
    with pytest.raises(ValueError, match="which leads out of it"):
        read_model(sharded)


def test_reading_reads_the_links_of_a_hub_cache(sharded):
    home = sharded.parent / "models--a--b"
    (home / "blobs").mkdir(parents=True)
    snapshot = home / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    for file in sharded.iterdir():
        file.rename(home / "blobs" / file.name)
        (snapshot / file.name).symlink_to(home / "blobs" / file.name)
    with torch.no_grad():
        _close(read_model(snapshot)(_ids()), _theirs()(_ids()).logits)


def test_reading_refuses_an_index_that_disagrees(sharded):
    index = sharded / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    other = next(name for name in weight_map.values() if name != weight_map[QUERY])
    _edit(index, weight_map={**weight_map, QUERY: other})
    with pytest.raises(ValueError, match=f"found it wrong about {QUERY}"):
        read_model(sharded)
    _edit(index, weight_map={**weight_map, "more": "absent.safetensors"})
    with pytest.raises(ValueError, match=r"names 'absent\.safetensors', found no such file"):
        read_model(sharded)
    _edit(index, weight_map=[1])
    with pytest.raises(ValueError, match="must map tensor names to files"):
        read_model(sharded)


def test_reading_refuses_a_tensor_in_two_shards(sharded):
    names = sorted(sharded.glob("model-*.safetensors"))
    first, second = load_file(names[0]), load_file(names[1])
    twice = next(iter(first))
    save_file({**second, twice: first[twice]}, names[1])
    with pytest.raises(ValueError, match=f"{twice} must be stored once"):
        read_model(sharded)


# --- writing ------------------------------------------------------------------------------------


def test_save_pretrained_refuses_models_that_are_not_plain(tmp_path, folder):
    ours = read_model(folder)
    ours.model.layers[0].self_attn.q_proj = nn.Sequential(ours.model.layers[0].self_attn.q_proj)
    with pytest.raises(ValueError, match=r"differs in model\.layers\.0\.self_attn\.q_proj\.0"):
        save_pretrained(ours, tmp_path / "ours")
    ours = read_model(folder)
    weight = ours.model.norm.weight
    ours.model.norm.weight = nn.Parameter(weight.to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"differs in model\.norm\.weight; eject"):
        save_pretrained(ours, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize(
    "name",
    ["model-00001-of-00002.safetensors", "pytorch_model.bin", "a.gguf", "adapter_config.json"],
)
def test_save_pretrained_refuses_a_folder_with_other_model_files(tmp_path, folder, name):
    ours = read_model(folder)
    target = tmp_path / "target"
    target.mkdir()
    (target / name).write_text("something of value")
    with pytest.raises(ValueError, match=f"no model files but minilora's own, found {name}"):
        save_pretrained(ours, target)
    assert [file.name for file in target.iterdir()] == [name]


def test_save_pretrained_refuses_weights_that_another_program_wrote(folder):
    ours = read_model(folder)
    before = _everything(folder)
    with pytest.raises(ValueError, match=r"found config\.json, model\.safetensors; choose"):
        save_pretrained(ours, folder)
    assert _everything(folder) == before


def test_save_pretrained_that_fails_leaves_the_files(tmp_path, folder):
    ours = read_model(folder)
    save_pretrained(ours, tmp_path / "ours")
    before = _everything(tmp_path / "ours")

    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    for name in ("ours", "new"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))
        try:
            with pytest.raises(RuntimeError, match=f"/{name} must be written.*File too large"):
                save_pretrained(ours, tmp_path / name)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert _everything(tmp_path / "ours") == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ours", "theirs"]


@needs_fork
def test_a_killed_save_pretrained_leaves_no_folder_that_loads_as_something_else(tmp_path, folder):
    """Killed before each call: without end token or template a folder would load as another."""
    ours, out = read_model(folder), tmp_path / "ours"

    def check():
        if (out / "config.json").exists():
            _, tokenizer = load_model(out)
            assert tokenizer.stop_ids == {2} and tokenizer.chat_template

    calls = every_kill(
        lambda: save_pretrained(ours, out, _tokenizer()),
        lambda: shutil.rmtree(out, ignore_errors=True),
        check,
    )
    assert calls > 10 and sorted(p.name for p in tmp_path.iterdir()) == ["ours", "theirs"]

    def whole():
        if not (out / "config.json").exists():
            shutil.rmtree(out, ignore_errors=True)
            save_pretrained(ours, out, _tokenizer())

    every_kill(lambda: save_pretrained(ours, out, _tokenizer()), whole, check)  # over another one


def test_save_pretrained_notices_a_flipped_bit_when_it_is_read(tmp_path, folder):
    save_pretrained(read_model(folder), tmp_path / "ours")
    file = tmp_path / "ours" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-50] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match="found it damaged or cut short .*SHA-256"):
        read_model(tmp_path / "ours")


def test_a_linked_chat_template_is_not_published(tmp_path, folder):
    save_pretrained(read_model(folder), tmp_path / "ours", _tokenizer())
    template = tmp_path / "ours" / "chat_template.jinja"
    (tmp_path / "secret").write_text("key")
    template.unlink()
    template.symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match="chat_template.jinja' must lie in its folder, found a li"):
        load_model(tmp_path / "ours")


def _tokenizer():
    backend = Backend(models.WordLevel({"<unk>": 0, "hello": 1, "<end>": 2}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(["<end>"])
    return Tokenizer(backend, eos="<end>", chat_template="{{ messages[0].content }}<end>")


def test_load_model_reads_what_save_pretrained_writes(tmp_path, folder):
    save_pretrained(read_model(folder), tmp_path / "ours", _tokenizer())
    model, tokenizer = load_model(str(tmp_path / "ours"), dtype=None)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "ours")
    assert tokenizer.encode("hello you") == theirs.encode("hello you") == [1, 0]
    assert tokenizer.encode_chat([{"role": "user", "content": "hello <end>"}])[-1] == 2
    assert tokenizer.stop_ids == {2}
    with torch.no_grad():
        _close(model(_ids()), read_model(folder)(_ids()))


# --- load_model ---------------------------------------------------------------------------------


def test_load_model_refuses_what_is_neither(tmp_path):
    with pytest.raises(ValueError, match=r"config\.json, a \.gguf file, a name of the hub"):
        load_model(tmp_path / "absent")
    (tmp_path / "text").write_text("hello, world")
    with pytest.raises(ValueError, match="text' must be a GGUF file"):
        load_model(tmp_path / "text")
    with pytest.raises(ValueError, match=r"must hold config\.json"):
        load_model(tmp_path)


def test_more_blocks_than_tensors_are_refused_before_they_are_built(folder):
    _edit(folder / "config.json", num_hidden_layers=900)
    with pytest.raises(ValueError, match=r"found 900 blocks in the configuration and 21 tensors"):
        read_model(folder)


def _spoiled(folder, name, value):
    _rewrite(folder, lambda tensors: tensors[name].view(-1)[5:6].fill_(value))


@pytest.mark.parametrize("name", [EMBEDDING, QUERY, "model.norm.weight"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(folder, name, value):
    _spoiled(folder, name, value)
    for dtype in (None, torch.bfloat16):
        with pytest.raises(ValueError, match=f"{name} must be finite, found NaN or Inf"):
            read_model(folder, dtype=dtype)


def test_weights_that_a_dtype_cannot_hold_are_refused(folder):
    _spoiled(folder, QUERY, -1e6)
    message = r"q_proj.weight must be finite in torch.float16, found values up to 1e\+06"
    with pytest.raises(ValueError, match=message):
        read_model(folder, dtype=torch.float16)
    given = {}
    with pytest.raises(ValueError, match=message):
        read_model(folder, dtype=torch.float16, prepare=lambda model: given.__setitem__)
    assert given
    held = read_model(folder, dtype=torch.bfloat16).state_dict()
    assert held[QUERY].min() == torch.tensor(-1e6).bfloat16()


def _words(count):
    backend = Backend(models.WordLevel({f"w{i}": i for i in range(count)}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return backend


def test_control_tokens_and_ends_beyond_the_embedding_are_told(folder):
    """As a padding token that was added and never trained."""
    (folder / "generation_config.json").unlink()
    words = _words(53)
    words.add_special_tokens(["<pad>"])
    words.save(str(folder / "tokenizer.json"))
    _edit(folder / "config.json", eos_token_id=10**9)
    message = "its tokenizer has 54 ids, and the model can't compute 53 and more"
    with (
        pytest.warns(UserWarning, match=message),
        pytest.warns(
            UserWarning,
            match="eos_token_id 1000000000 is not among the model's 53 ids: no text ends",
        ),
    ):
        load_model(folder)
    _words(53).save(str(folder / "tokenizer.json"))
    _edit(folder / "config.json", eos_token_id=[10**9, 3])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_model(folder)


def _framed(words):
    words.add_special_tokens(["<s>"])
    words.post_processor = processors.TemplateProcessing(
        single=["<s>", "$A"], special_tokens=[("<s>", 53)]
    )


@pytest.mark.parametrize(
    ("count", "change", "found"),
    [
        (55, lambda words: None, "beyond the 53 rows of the embedding: 'w53', 'w54'; use the"),
        (53, lambda words: words.add_tokens(["added"]), "rows of the embedding: 'added'; use"),
        (53, _framed, "rows of the embedding: '<s>'; use"),
    ],
)
def test_a_tokenizer_whose_texts_leave_the_embedding_is_refused(folder, count, change, found):
    words = _words(count)
    change(words)
    words.save(str(folder / "tokenizer.json"))
    with pytest.raises(ValueError, match=found):
        load_model(folder)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ("qwen2", r"found unexpected: model.layers.0.self_attn.k_proj.bias, "),
        ("phi3", r"found missing: .*gate_proj.weight, .*; unexpected: .*gate_up_proj.weight"),
        ("olmo2", r"found missing: .*input_layernorm.weight, .*; unexpected: .*k_norm.weight"),
        ("gpt2", r"found missing: .*embed_tokens.weight, .*; unexpected: transformer\.h\.0"),
    ],
)
def test_a_configuration_of_another_family_is_refused(tmp_path, weights, message):
    sizes = {"vocab_size": 61, "num_hidden_layers": 2}
    their_model("llama", **sizes).save_pretrained(tmp_path / "llama")
    their_model(weights, **({} if weights == "gpt2" else sizes)).save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "other" / "model.safetensors", tmp_path / "llama")
    with pytest.raises(ValueError, match=message + ".*do not belong together"):
        read_model(tmp_path / "llama")
