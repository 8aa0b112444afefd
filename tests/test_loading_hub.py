"""Names on the hub, against a server of our own and the cache that huggingface_hub itself makes."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import test_loading_gguf
import torch
from hub_server import Hub, serving
from huggingface_hub import constants
from model_families import read_model
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file, save_file
from small_models import shake
from test_cli import run, tiny_folder
from transformers import AutoModelForCausalLM

import minilora
from minilora.cli.sources import base_of
from minilora.data import Encoding, files_in
from minilora.data.record_files import read_rows
from minilora.files import HubName, cached_name, on_hub
from minilora.loading import load_model, read_config, read_tokenizer
from minilora.planning import machines
from minilora.planning.shapes import read_shape

pytestmark = pytest.mark.peers

OLD, NEW = "0" * 40, "a" * 40
NAME = "someone/tiny"


@pytest.fixture
def local(tmp_path):
    """A sharded model's folder with files that are none of ours."""
    folder = tiny_folder(tmp_path / "local")
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    theirs.save_pretrained(folder, max_shard_size="8KB")
    for name in ("pytorch_model.bin", "modeling.py", "onnx/model.safetensors", "original/a.pt"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"none of ours")
    return folder


@pytest.fixture
def hub(tmp_path, local, monkeypatch):
    """A hub with the model, which huggingface_hub asks in this process."""
    hub = Hub()
    hub.add(NAME, local, OLD)
    hub.add(NAME, local, NEW)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between its attempts
    monkeypatch.chdir(tmp_path)
    with serving(hub) as address:
        point_to(monkeypatch, address)
        yield hub


def point_to(monkeypatch, address):
    """Do what HF_ENDPOINT does when huggingface_hub is imported."""
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", address)


@pytest.fixture
def offline(monkeypatch):
    return lambda: monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def same(found, wanted):
    state = wanted.state_dict()
    assert found.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in found.state_dict().items())


# --- names --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "parts"), [
    ("Qwen/Qwen3-0.6B", ("Qwen/Qwen3-0.6B", None, None)),
    ("a/b.c@refs/pr/1", ("a/b.c", "refs/pr/1", None)),
    ("a/b:q/c-Q4_1.gguf", ("a/b", None, "q/c-Q4_1.gguf")),
    ("a/b@v1:c.gguf", ("a/b", "v1", "c.gguf")),
])  # fmt: skip
def test_names_of_the_hub(text, parts):
    assert on_hub(text) == HubName(*parts)
    assert str(on_hub(text)) == text


@pytest.mark.parametrize("text", [
    "gpt2", "a/b/c", "./a/b", "../a", "/a/b", "~/a", "a/b.gguf", "a/config.json", "a/", "", "a/b@",
    "a/b:c.bin", "a/b c", "C:\\a/b",
])  # fmt: skip
def test_what_is_no_name_of_the_hub(text):
    assert on_hub(text) is None


def test_a_path_that_is_here_goes_first(hub, local):
    local.rename("someone")
    (local.parent / "someone").rename("other")
    os.mkdir("someone")
    os.rename("other", "someone/tiny")
    assert on_hub(NAME) is None
    load_model(NAME)
    assert not hub.asked


@pytest.mark.parametrize(("path", "name"), [
    ("/h/hub/models--a--b--c/snapshots/012", HubName("a/b--c", "012")),
    ("/h/hub/models--gpt2/snapshots/012/", HubName("gpt2", "012")),
    ("C:\\hub\\models--a--b\\snapshots\\012\\q\\c.gguf", HubName("a/b", "012", "q\\c.gguf")),
    ("/h/models--a--b/snapshots/012/config.json", None), ("out/v1", None), ("None", None),
])  # fmt: skip
def test_paths_in_the_cache(path, name):
    assert cached_name(path) == name


# --- models -------------------------------------------------------------------------------------


def test_a_model_is_downloaded_once_and_only_what_is_read(hub, local, offline):
    model, tokenizer = load_model(NAME, dtype=None)
    same(model, read_model(local))
    assert tokenizer.encode("a b") == read_tokenizer(local).encode("a b")
    shards = {file.name for file in local.glob("model-*.safetensors")}
    small = {file.name for file in local.glob("*.json")}
    assert len(shards) > 2 and {path for _, path in hub.served} == shards | small
    hub.served.clear()
    load_model(NAME, dtype=None)
    assert not hub.served
    hub.asked.clear()
    offline()
    same(load_model(NAME, dtype=None)[0], model)
    assert not hub.asked


def test_the_cache_is_read_where_the_hub_cannot_be_reached(hub, monkeypatch):
    model = read_model(NAME)
    hub.status = 503
    same(read_model(NAME), model)
    point_to(monkeypatch, "http://127.0.0.1:9")
    same(read_model(NAME), model)


def test_a_revision_is_a_branch_a_tag_or_a_commit(hub, local, tmp_path):
    other = tiny_folder(tmp_path / "other", torch.float64)
    hub.add(NAME, other, "b" * 40)
    hub.tags[NAME, "v1"] = OLD
    assert next(read_model(NAME).parameters()).dtype == torch.float64
    for revision in ("v1", NEW):
        assert next(read_model(f"{NAME}@{revision}").parameters()).dtype == torch.float32
    with pytest.raises(ValueError, match=f"'{NAME}' has no revision 'v2'; see http"):
        read_model(f"{NAME}@v2")


def test_all_shards_of_a_gguf_file_are_fetched(hub, tmp_path):
    theirs = test_loading_gguf._theirs()
    (tmp_path / "quants" / "some").mkdir(parents=True)
    test_loading_gguf._write_shards(tmp_path / "quants" / "some", theirs)
    hub.add("someone/quants", tmp_path / "quants")
    same(read_model("someone/quants:some/m-00002-of-00003.gguf"), theirs)
    assert len({path for _, path in hub.served}) == 3


def test_a_gguf_file_in_a_repository(hub, tmp_path, local):
    theirs = test_loading_gguf._theirs()
    content = test_loading_gguf._tensors(theirs), test_loading_gguf._metadata(theirs.config)
    (tmp_path / "quants" / "some").mkdir(parents=True)
    test_loading_gguf._write(tmp_path / "quants" / "some" / "tiny.gguf", *content)
    hub.add("someone/quants", tmp_path / "quants")
    model = read_model("someone/quants:some/tiny.gguf")
    assert [path for _, path in hub.served] == ["some/tiny.gguf"]
    config = minilora.save(minilora.inject(model, r=2), tmp_path / "out") / "adapter_config.json"
    entries = json.loads(config.read_text())
    assert entries["base_model_name_or_path"] == "someone/quants:some/tiny.gguf"
    assert entries["revision"] == NEW
    with pytest.raises(ValueError, match=r"must hold absent.gguf, found no such file on the hub"):
        load_model("someone/quants:absent.gguf")
    with pytest.raises(ValueError, match=r"must hold config.json"):
        load_model("someone/quants")


def test_a_quantized_folder_on_the_hub(hub, tmp_path, local):
    run("quantize", local, "--format", "int8", "--out", tmp_path / "small")
    hub.add("someone/small", tmp_path / "small")
    same(load_model("someone/small")[0], load_model(tmp_path / "small")[0])


def test_pickles_alone_are_no_model(hub, tmp_path, local):
    for file in local.glob("*.safetensors*"):
        file.unlink()
    hub.add("someone/old", local)
    with pytest.raises(ValueError, match="'someone/old' must hold model.safetensors or .* pickles"):
        load_model("someone/old")
    assert "pytorch_model.bin" not in {path for _, path in hub.served}


def test_an_index_brings_no_pickle(hub, local):
    index = local / "model.safetensors.index.json"
    entries = json.loads(index.read_text())
    entries["weight_map"]["lm_head.weight"] = "pytorch_model.bin"
    index.write_text(json.dumps(entries))
    hub.add("someone/odd", local)
    with pytest.raises(ValueError, match="names 'pytorch_model.bin', found no such file"):
        load_model("someone/odd")
    assert "pytorch_model.bin" not in {path for _, path in hub.served}


def test_config_tokenizer_and_plan_fetch_no_weights(
    hub, local, tmp_path, capsys, monkeypatch, request
):
    monkeypatch.setattr(machines, "process_bytes", lambda: 10**8)
    request.addfinalizer(machines.calibrate.cache_clear)  # which would keep that
    assert read_config(NAME) == read_config(local)
    assert [path for _, path in hub.served] == ["config.json"]
    shape = read_shape(NAME)
    assert shape.config == read_config(local) and shape.stored
    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "a b c"}\n')
    assert run("plan", NAME, "--data", data, "--untimed", "--max-length", 16) == 0
    assert f"minilora train {NAME} " in capsys.readouterr().out
    assert not [path for _, path in hub.served if path.endswith(".safetensors")]


# --- what goes wrong ----------------------------------------------------------------------------


def test_a_download_that_breaks_off_goes_on_where_it_stopped(hub, local, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)  # what is kept of a broken answer
    hub.cut = 1000
    same(load_model(NAME, dtype=None)[0], read_model(local))
    assert {"bytes=1000-", "bytes=2000-"} <= set(hub.ranges)


def test_files_that_have_come_stay(hub, local):
    shards = {file.name for file in local.glob("model-*.safetensors")}
    hub.broken = {max(shards)}
    with pytest.raises(RuntimeError, match=r"could not be downloaded \(it answered 500\); try aga"):
        load_model(NAME)
    come = {path for _, path in hub.served} & shards
    hub.broken.clear()
    hub.served.clear()
    same(load_model(NAME, dtype=None)[0], read_model(local))
    assert come and {path for _, path in hub.served} <= shards - come


@pytest.mark.parametrize(("name", "kind", "match"), [
    ("someone/absent", ValueError, "the hub has no 'someone/absent' that you may read; check the"),
    ("someone/private", ValueError, "for a private one log in with `hf auth login`"),
    ("someone/gated", RuntimeError, "is gated: accept its conditions at http.*/someone/gated, the"),
    ("some..one/x", ValueError, "that is no name of the hub: "),
])  # fmt: skip
def test_refusals_say_what_to_do(hub, local, name, kind, match):
    hub.add("someone/private", local)
    hub.add("someone/gated", local)
    hub.private, hub.gated = {"someone/private"}, {"someone/gated"}
    with pytest.raises(kind, match=match) as told:
        load_model(name)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(("status", "match"), [
    (403, r"the hub refuses 'someone/tiny' to your token \(403\); log in"),
    (500, r"could not be downloaded \(it answered 500\)"),
    (429, r"could not be downloaded \(it answered 429\)"),
])  # fmt: skip
def test_other_answers(hub, status, match):
    hub.status = status
    with pytest.raises(RuntimeError, match=match):
        load_model(NAME)


def test_no_network_and_nothing_in_the_cache(hub, offline, monkeypatch, tmp_path):
    point_to(monkeypatch, "http://127.0.0.1:9")
    with pytest.raises(
        RuntimeError, match=r"downloaded \(Connect.*refused.*what was downloaded is kept"
    ):
        load_model(NAME)
    offline()
    with pytest.raises(RuntimeError, match=r"nor all of it in the cache.*HF_HUB_OFFLINE is set"):
        load_model(NAME)


def test_a_cache_that_holds_a_part(hub, offline):
    read_tokenizer(NAME)
    offline()
    with pytest.raises((ValueError, RuntimeError), match="in the cache"):
        load_model(NAME)


def test_without_huggingface_hub(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for verb in (load_model, read_config, read_tokenizer, read_shape):
        with pytest.raises(RuntimeError, match=r'needs huggingface_hub .* "minilora\[hub\]"'):
            verb("owner/model")
    with pytest.raises(RuntimeError, match="or plan for a preset, nearest: llama-2-7b"):
        read_shape("owner/llama-2-7")


def test_a_bare_word_is_not_asked_for(hub):
    with pytest.raises(ValueError, match=r"a name of the hub \(owner/name\) or one of smollm2"):
        load_model("gpt2")
    assert not hub.asked


# --- adapters -----------------------------------------------------------------------------------


def test_an_adapter_names_its_base_and_commit(hub, tmp_path, local):
    model = minilora.inject(load_model(NAME, dtype=None)[0], r=2)
    shake(model)
    out = minilora.save(model, tmp_path / "out")
    entries = json.loads((out / "adapter_config.json").read_text())
    assert (entries["base_model_name_or_path"], entries["revision"]) == (NAME, NEW)
    named = minilora.save(model, tmp_path / "named", base_name="me/base")
    entries = json.loads((named / "adapter_config.json").read_text())
    assert (entries["base_model_name_or_path"], entries["revision"]) == ("me/base", None)

    hub.add("someone/adapter", out)
    again = minilora.load(load_model(local, dtype=None)[0], "someone/adapter")
    ids = torch.arange(8).reshape(1, 8)
    assert torch.equal(again(ids), model(ids))
    with pytest.raises(ValueError, match="'someone/tiny' must hold adapter_config.json, adapter_"):
        minilora.load(load_model(local)[0], NAME)


@pytest.mark.parametrize(("revision", "ours", "base"), [
    (None, True, "smollm2-135m"), (None, False, "HuggingFaceTB/SmolLM2-135M-Instruct"),
    ("abc", True, "HuggingFaceTB/SmolLM2-135M-Instruct@abc"),
])  # fmt: skip
def test_the_base_of_an_adapter_is_the_file_that_was_fetched_or_the_hubs(
    hub, tmp_path, local, revision, ours, base
):
    model = minilora.inject(load_model(local)[0], r=2)
    out = minilora.save(model, tmp_path / "out", base_name="HuggingFaceTB/SmolLM2-135M-Instruct")
    config = out / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"revision": revision}))
    if not ours:
        weights = out / "adapter_model.safetensors"
        save_file(load_file(weights), weights, metadata={"format": "pt"})
    assert base_of(out, None) == base
    assert base_of(out, "other") == "other"


def test_peft_loads_base_and_adapter_by_the_names_in_the_config(hub, tmp_path):
    model = minilora.inject(load_model(NAME, dtype=None)[0], r=2)
    shake(model)
    minilora.save(model, tmp_path / "out")
    theirs = AutoPeftModelForCausalLM.from_pretrained(str(tmp_path / "out"))
    ids = torch.arange(8).reshape(1, 8)
    torch.testing.assert_close(theirs(ids).logits, model(ids), rtol=1e-5, atol=1e-6)


def test_the_command_takes_names(tmp_path, hub, capfd, offline):
    data = tmp_path / "letters.jsonl"
    data.write_text('{"text": "a b c d e"}\n' * 8)
    limits = ("--max-steps", 2, "--max-length", 16, "--dtype", "float32")
    assert run("train", NAME, "--data", data, "--out", "run", *limits) == 0
    said = capfd.readouterr().err
    assert "Fetching" in said or "%" in said  # progress
    hub.add("someone/adapter", tmp_path / "run" / "last")
    assert run("merge", NAME, "--adapter", "someone/adapter", "--out", "merged") == 0
    offline()
    assert run("explain", "run", "--dtype", "float32") == 0


def test_the_variable_of_huggingface_hub_keeps_the_command_offline(tmp_path):
    """A process of its own, as a user starts it: the variable is read at import."""
    data = tmp_path / "letters.jsonl"
    data.write_text('{"text": "a b c d e"}\n')
    done = subprocess.run(
        [sys.executable, "-m", "minilora", "eval", "someone/other", "--data", str(data)],
        capture_output=True, text=True, check=False, cwd=tmp_path,
        env=os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "HF_HUB_OFFLINE is set" in done.stderr


def test_a_folder_is_not_taken_for_a_name_on_the_hub(hub, tmp_path, local, monkeypatch, capsys):
    """`models/tiny`, seen from another folder; a name of that form is asked for, and said."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(local, tmp_path / "models" / "tiny")
    model = minilora.inject(load_model("models/tiny", dtype=None)[0], r=2)
    out = minilora.save(model, tmp_path / "out")
    assert base_of(out, None) == "./models/tiny"
    other = minilora.save(model, tmp_path / "other", base_name="models/tiny")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"by the path ./models/tiny, found nothing there from"):
        base_of(out, None)
    capsys.readouterr()
    assert base_of(other, None) == "models/tiny"
    said = "the base, models/tiny, is no folder here; the hub is asked for it\n"
    assert capsys.readouterr().err == said
    file = other / "adapter_model.safetensors"
    save_file(load_file(file), file)  # PEFT's, which knows no base that is a path elsewhere
    assert base_of(other, None) == "models/tiny"
    assert not capsys.readouterr().err
    assert not hub.asked


def test_a_folder_of_the_owners_name_hides_nothing(hub, tmp_path, local):
    data = tmp_path / "letters.jsonl"
    data.write_text('{"text": "a b c d e"}\n' * 8)
    small = ["--max-steps", 1, "--max-length", 16]
    assert run("train", NAME, "--data", data, "--out", "someone/lora", *small) == 0
    assert run("generate", "someone/lora", "a b", "--max-new-tokens", 1) == 0
    assert run("resume", "someone/lora", "--max-steps", 2) == 0
    assert run("repeat", "someone/lora", "someone/again") in (0, 1)
    hub.add("someone/adapter", tmp_path / "someone" / "lora")
    assert run("generate", NAME, "a", "--adapter", "someone/adapter", "--max-new-tokens", 1) == 0


def test_a_run_names_the_base_that_base_name_says(hub, tmp_path, capsys):
    data = tmp_path / "letters.jsonl"
    data.write_text('{"text": "a b c d e"}\n' * 8)
    train = ["train", NAME, "--data", data, "--out", "run", "--max-steps", 1, "--max-length", 16]
    assert run(*train, "--base-name", "me/base") == 0
    entries = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    assert (entries["base_model_name_or_path"], entries["revision"]) == ("me/base", None)
    with pytest.raises(SystemExit):
        run(*train, "--base-name", "")
    assert "base_name must be a name or none, found ''" in capsys.readouterr().err


# --- data sets ----------------------------------------------------------------------------------


@pytest.fixture
def data(hub, tmp_path):
    """A data set in two languages, and one of a single file."""
    files = {
        "many/README.md": b"about it",
        "many/en/train-0.jsonl": b'{"text": "a"}\n',
        "many/en/train-1.jsonl": b'{"text": "b"}\n',
        "many/en/test-0.jsonl": b'{"text": "c"}\n',
        "many/de/train-0.jsonl": b'{"text": "d"}\n',
        "one/data.csv": b"question,answer\na,b\n",
        "one/LICENSE.txt": b"free",
        "none/script.py": b"pass",
        "kinds/data/train_sft-00000-of-00002-a3ecf92756993583.jsonl": b'{"text": "a"}\n',
        "kinds/data/train_sft-00001-of-00002-0a1819e7c0ffee00.jsonl": b'{"text": "b"}\n',
        "kinds/data/train_prefs-00000-of-00001.jsonl": b'{"text": "a"}\n',
        "kinds/data/test_sft-00000-of-00001.jsonl": b'{"text": "c"}\n',
        "mixed/rows.csv": b"question,answer\na,b\n",
        "mixed/test.csv": b"question,answer\nc,d\n",
    }
    for name, content in files.items():
        (tmp_path / "sets" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "sets" / name).write_bytes(content)
    for name in ("many", "one", "none", "mixed", "kinds"):
        hub.add(f"someone/{name}", tmp_path / "sets" / name)
    return hub


def test_a_data_set_of_the_hub_is_its_training_files(data, offline, tmp_path):
    """The second time from the cache."""
    (tmp_path / "someone" / "lora").mkdir(parents=True)  # the owner's name hides nothing
    for go_offline in (False, True):
        if go_offline:
            offline()
        rows, problems, _ = read_rows(files_in(["someone/many/en", "someone/one"]), Encoding(9))
        assert [row for _, row in rows] == [
            {"text": "a"}, {"text": "b"}, {"question": "a", "answer": "b"}
        ]  # fmt: skip
        assert problems == []
    served = {path for _, path in data.served}
    assert served == {"en/train-0.jsonl", "en/train-1.jsonl", "data.csv"}


def test_one_of_several_training_sets_is_named(data, offline):
    """Each holds the same questions in another shape."""
    message = "one training set, found data/train_prefs, data/train_sft; name one as OWNER/NAME/da"
    with pytest.raises(ValueError, match=message):
        files_in(["someone/kinds"])
    rows, _, _ = read_rows(files_in(["someone/kinds/data/train_sft"]), Encoding(9))
    assert [row for _, row in rows] == [{"text": "a"}, {"text": "b"}]
    offline()
    assert len(files_in(["someone/kinds/data/train_sft"])) == 2


@pytest.mark.parametrize("left", ["data/train_sft-00001-of-", "data/test_sft-00000-of-00001"])
def test_a_part_of_a_data_set_in_the_cache_is_not_the_whole(data, offline, left):
    for file in files_in(["someone/kinds/data/train_sft"]):
        if left not in str(file):
            file.unlink()
    if "test" in left:
        assert len(files_in(["someone/kinds/data/test_sft"])) == 1
    offline()
    message = f"the hub can't be reached, and of its files these alone were fetched before: {left}"
    with pytest.raises(ValueError, match=message):
        files_in(["someone/kinds"])
    if "test" in left:  # named, it is meant
        assert len(files_in(["someone/kinds/data/test_sft"])) == 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("someone/many", "in one place, found them in de, en; name one as OWNER/NAME/FOLDER"),
        ("someone/mixed", r"names other and test data \(rows.csv, test.csv\); download them, and"),
        ("someone/none", "in one place, found none of .jsonl"),
        ("someone/lacking", "the hub has no 'someone/lacking' that you may read"),
        ("sets/may", r"file 'sets/may' here \(did you mean sets/many\?\), and the hub has no"),
    ],
)
def test_another_data_set_is_refused(data, name, message):
    with pytest.raises(ValueError, match=message):
        files_in([name])


def test_a_file_that_is_not_there_is_not_asked_of_the_hub(data):
    for name in ("a/b.jsonl", "a/b.csv.gz", "alone.csv"):
        with pytest.raises(FileNotFoundError, match=name):
            read_rows(files_in([name]), Encoding(9))
    assert data.asked == []
