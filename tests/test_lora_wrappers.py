"""Wrappers around a model or its parts: names stay the plain model's, and PEFT reads the files."""

import json
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

import minilora
from minilora.lora.layer import lora_layers
from minilora.training.state import STATE_FILE

IDS = torch.arange(8)[None]


def compiled(module):
    return torch.compile(module, backend="eager")


@pytest.fixture
def ddp(tmp_path):
    """Return DistributedDataParallel, within a group of this one process."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1
    )
    yield DistributedDataParallel
    torch.distributed.destroy_process_group()


def shaken(model):
    """Give every lora_B random values, by the layers' order."""
    generator = torch.Generator().manual_seed(1)
    for layer in lora_layers(model).values():
        B = layer.adapters["default"].lora_B.data
        B.copy_(0.3 * torch.randn(B.shape, generator=generator))
    return model


def in_parts(model):
    """Wrap a block, a single layer and the layers of an MLP."""
    model.layers[0] = compiled(model.layers[0])
    model.layers[1].q_proj = compiled(model.layers[1].q_proj)
    model.layers[1].mlp = checkpoint_wrapper(model.layers[1].mlp)
    return model


WRAPPERS = {
    "compiled": compiled,
    "DataParallel": DataParallel,
    "both": lambda model: DataParallel(compiled(model)),
    "averaged": AveragedModel,
    "parts": in_parts,
}


@pytest.mark.parametrize("how", WRAPPERS)
@pytest.mark.parametrize("late", [False, True])
def test_files_hold_the_plain_names(net, tmp_path, how, late):
    model = net()
    if late:  # wrapped and run before the adapter is there
        wrapped = WRAPPERS[how](model)
        wrapped(IDS)
        minilora.inject(wrapped, r=2, alpha=3, modules_to_save=["embed"])
    else:
        wrapped = WRAPPERS[how](minilora.inject(model, r=2, alpha=3, modules_to_save=["embed"]))
    shaken(wrapped)
    plain = shaken(minilora.inject(net(), r=2, alpha=3, modules_to_save=["embed"]))
    torch.testing.assert_close(wrapped(IDS), plain(IDS))
    assert (wrapped(IDS) - net()(IDS)).abs().max() > 0.01
    assert minilora.targets(wrapped) == minilora.targets(plain)
    minilora.save(wrapped, tmp_path / "wrapped")
    minilora.save(plain, tmp_path / "plain")
    expected = load_file(tmp_path / "plain/adapter_model.safetensors")
    found = load_file(tmp_path / "wrapped/adapter_model.safetensors")
    assert found.keys() == expected.keys()
    config = "adapter_config.json"
    assert (tmp_path / "wrapped" / config).read_text() == (tmp_path / "plain" / config).read_text()
    onto = minilora.load(WRAPPERS[how](net()), tmp_path / "plain")
    torch.testing.assert_close(onto(IDS), plain(IDS))


@pytest.mark.parametrize("how", WRAPPERS)
def test_verbs_see_through_wrappers(net, how):
    wrapped, base = WRAPPERS[how](net()), net()
    minilora.inject(wrapped, r=2, alpha=3)
    plain = minilora.inject(net(), r=2, alpha=3)
    shaken(wrapped), shaken(plain)
    adapted = plain(IDS)
    with minilora.disabled(wrapped):
        torch.testing.assert_close(wrapped(IDS), base(IDS))
    minilora.merge(wrapped)
    with torch.no_grad():
        torch.testing.assert_close(wrapped(IDS), adapted)
    minilora.unmerge(wrapped)
    assert str(minilora.explain(wrapped)) == str(minilora.explain(plain))
    assert minilora.summary(wrapped).parameters == minilora.summary(plain).parameters
    minilora.eject(wrapped)
    torch.testing.assert_close(wrapped(IDS), base(IDS))
    assert all(p.requires_grad for p in wrapped.parameters())


def test_a_compiled_lora_layer_is_really_taken_off(net):
    """torch.compile keeps calling the module it was given, whatever takes its place."""
    model = shaken(minilora.inject(net(), r=2, targets=["q_proj"]))
    model.layers[0].q_proj = compiled(model.layers[0].q_proj)
    minilora.eject(model)
    torch.testing.assert_close(model(IDS), net()(IDS))


def test_ddp_saves_plain_names_and_takes_no_new_parameters(net, tmp_path, ddp):
    model = ddp(minilora.inject(net(), r=2))
    model(IDS).sum().backward()
    folder = minilora.save(model, tmp_path / "adapter")
    assert not any("module" in key for key in load_file(folder / "adapter_model.safetensors"))
    with pytest.raises(ValueError, match=r"inject\(\) adds parameters.*DistributedDataParallel"):
        minilora.inject(model, adapter="second")
    with pytest.raises(ValueError, match=r"load\(\) adds parameters.*wrap it afterwards"):
        minilora.load(ddp(net()), folder)
    with pytest.raises(ValueError, match="found DistributedDataParallel around it"):
        minilora.fit(model, [{"input_ids": [1, 2, 3]}])


def test_flattened_parameters_are_refused(net, tmp_path, ddp):
    from torch.distributed.fsdp import FullyShardedDataParallel

    device = torch.device("cpu")
    injected = minilora.inject(net(), r=2)
    model = FullyShardedDataParallel(injected, use_orig_params=True, device_id=device)
    for verb in (lambda: minilora.save(model, tmp_path), lambda: minilora.inject(model)):
        with pytest.raises(ValueError, match=r"FullyShardedDataParallel, which flattens them"):
            verb()


def test_fit_refuses_a_wrapper_and_takes_wrapped_parts(tmp_path):
    from minilora.models import Llama, LlamaConfig

    def tiny():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, head_dim=4, max_position_embeddings=16,
        )  # fmt: skip
        return minilora.inject(Llama(config), r=2)

    rows = [{"input_ids": [1, 2, 3, 4]}]
    options = minilora.TrainConfig(max_steps=2, dtype="float32", compile=False)
    for wrap in (compiled, DataParallel):
        with pytest.raises(ValueError, match=r"fit\(\) needs the model itself, found .* around"):
            minilora.fit(wrap(tiny()), rows, config=options, quiet=True)
    model, plain = tiny(), tiny()
    model.model.layers[0].mlp = compiled(model.model.layers[0].mlp)
    for one, out in ((model, tmp_path / "parts"), (plain, tmp_path / "plain")):
        minilora.fit(one, rows, config=options, out=out, quiet=True)
    found = load_file(tmp_path / "parts/adapter_model.safetensors")
    for key, value in load_file(tmp_path / "plain/adapter_model.safetensors").items():
        torch.testing.assert_close(found[key], value)
    assert not any("_orig_mod" in key for key in load_file(tmp_path / "parts" / STATE_FILE))


@pytest.mark.parametrize("mark", ["_orig_mod.", "module.", "_checkpoint_wrapped_module."])
def test_a_file_with_a_wrappers_names_is_called_dead_and_loads(net, tmp_path, mark):
    model = shaken(minilora.inject(net(), r=2, alpha=3))
    file = minilora.save(model, tmp_path) / "adapter_model.safetensors"
    start = "base_model.model."
    tensors = {f"{start}{mark}{k.removeprefix(start)}": v for k, v in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})
    for reader in minilora.check(tmp_path):
        assert not reader.takes
        assert f"names carry '{mark[:-1]}'" in str(reader.problems)
    again = minilora.load(net(), tmp_path, verify=False)
    torch.testing.assert_close(again(IDS), model(IDS))


def test_peft_loads_what_a_wrapped_model_saved(llama_config, tmp_path):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")

    def base():
        torch.manual_seed(0)
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**llama_config)).eval()

    model = DataParallel(compiled(shaken(minilora.inject(base(), r=2, alpha=3))))
    minilora.save(model, tmp_path)
    assert minilora.check(tmp_path)[0].takes
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected).*")
        theirs = peft.PeftModel.from_pretrained(base(), tmp_path)
    expected = model(IDS).logits
    torch.testing.assert_close(theirs(IDS).logits, expected)
    assert (expected - base()(IDS).logits).abs().max() > 0.01


def test_a_file_without_factors_changes_nothing(net, tmp_path):
    minilora.save(minilora.inject(net(), r=2), tmp_path)
    save_file({}, tmp_path / "adapter_model.safetensors")
    for reader in minilora.check(tmp_path):
        assert "holds no LoRA factors, so it changes nothing" in str(reader)
        assert not reader.takes
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["r"] == 2


def test_a_module_of_ones_own_called_module_keeps_its_name(net, tmp_path):
    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = net()

        def forward(self, ids):
            return self.module(ids)

    model = shaken(minilora.inject(Holder(), r=2))
    file = minilora.save(model, tmp_path) / "adapter_model.safetensors"
    assert all(key.startswith("base_model.model.module.") for key in load_file(file))
    torch.testing.assert_close(minilora.load(Holder(), tmp_path)(IDS), model(IDS))
