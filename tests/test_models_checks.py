"""What each family has to pass beside logits and gradients: steps, packing, quantizing, planning.

python tests/test_models_checks.py    # writes docs/models.md anew
"""

import importlib
import inspect
import subprocess
from pathlib import Path

import pytest
import torch
from model_families import (
    CHECKS,
    FAMILIES,
    assert_close,
    check,
    every_family,
    every_shape,
    our_model,
    read_model,
    some_ids,
    their_model,
    tiny,
)

import minilora
from minilora.data import Example, pack, pad
from minilora.loading.model import _opened, make_model
from minilora.planning.saved import SavedBytes
from minilora.quantization import Quantization, QuantizedLinear
from minilora.running import compiled, token_loss

pytestmark = pytest.mark.peers

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
WINDOWED = [
    (family, shape)
    for family, row in FAMILIES.items()
    for shape in ("plain", *(name for name in row.shapes if name.startswith("windows")))
]
WIDE = {"compiled = eager": ("llama",)}  # the families that such a check always takes
windowed = pytest.mark.parametrize(("family", "shape"), WINDOWED)


def made(family, shape):
    return our_model(family, their_model(family, **FAMILIES[family].shapes[shape]))


@every_family("3 training steps")
def test_three_training_steps_equal_transformers(family):
    theirs = their_model(family)
    ours = our_model(family, theirs)
    before = {name: p.detach().clone() for name, p in ours.named_parameters()}
    ids = some_ids(ours, 3, 9)
    for model in (ours, theirs):  # not in training mode, where GPT-2 of transformers drops
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        for _ in range(3):
            optimizer.zero_grad()
            loss = model.loss(ids, ids) if model is ours else model(ids, labels=ids).loss
            loss.backward()
            optimizer.step()
    wanted = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        assert not torch.equal(parameter, before[name]), name
        assert_close(parameter, wanted[name], 2e-5)


@check("packed = alone")
@windowed
def test_packed_documents_are_as_good_as_alone(family, shape):
    """Loss and gradients: each sees itself alone, its window included."""
    model = made(family, shape)
    documents = [some_ids(model, 1, n)[0].tolist() for n in (9, 3, 7, 12)]
    examples = [Example(ids, ids) for ids in documents]
    rows = pack(examples, 16)
    assert len(rows) < len(documents)
    found, tokens = token_loss(model, pad(rows))
    found.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    alone = [token_loss(model, pad([example])) for example in examples]
    assert tokens == sum(count for _, count in alone)
    wanted = sum(loss for loss, _ in alone)
    wanted.backward()
    assert_close(found, wanted)
    for name, parameter in model.named_parameters():
        assert_close(gradients[name], parameter.grad, 2e-5)


@every_shape("shared prefix = apart")
def test_first_tokens_that_rows_share_are_computed_once(family, shape):
    """Loss and every gradient, with and without checkpointing."""
    model = made(family, shape).double().train()
    ids = some_ids(model, 3, 13)
    ids[:, :5] = ids[0, :5]
    labels = ids.clone()
    labels[:, :6] = -100
    labels[1, 9:] = -100  # as where a row is padded
    found = {}
    for shared, again in ((0, False), (5, False), (3, True)):
        model.gradient_checkpointing = again
        model.zero_grad()
        loss = model.loss(ids, labels, shared=shared)
        loss.backward()
        found[shared] = {n: p.grad.clone() for n, p in model.named_parameters()} | {"loss": loss}
    for name, wanted in found[0].items():
        assert_close(found[5][name], wanted, 1e-10)
        assert_close(found[3][name], wanted, 1e-10)


@every_family("quantized while read")
def test_quantizing_while_reading_equals_quantizing_after(tmp_path, family):
    their_model(family).save_pretrained(tmp_path)
    wanted = minilora.quantize(read_model(tmp_path), "int8")
    found = make_model(_opened(tmp_path, None), None, "cpu", Quantization("int8"))
    layers = [m for m in found.modules() if isinstance(m, QuantizedLinear)]
    assert len(layers) >= 4 * found.config.num_hidden_layers
    ids = some_ids(found, 2, 9)
    with torch.no_grad():
        assert torch.equal(found(ids), wanted(ids))


@every_family("compiled = eager")
def test_compiled_blocks_equal_eager_ones(family, pytestconfig):
    if family not in WIDE["compiled = eager"] and not pytestconfig.getoption("--wide"):
        pytest.skip("compiling takes some seconds; --wide compiles every family")
    model = tiny(family)
    ids = some_ids(model, 2, 9)
    with torch.no_grad():
        wanted = model(ids)
        with compiled(model, True, every=True):
            assert_close(model(ids), wanted)
            assert_close(model(ids[:, :5]), wanted[:, :5])


@check("planned memory")
@windowed
def test_what_is_planned_for_is_what_a_pass_keeps(family, shape):
    model = minilora.inject(made(family, shape), r=2).train()
    counted = SavedBytes(model)
    for size in ((2, 4), (3, 20), (1, 31)):
        assert counted(*size).total == kept(model, some_ids(model, *size))


def kept(model, ids):
    """Return the bytes of the storages that autograd saves, without the model's own."""
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    seen = {}

    def pack_in(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own and tensor.dtype != torch.int64:  # ids
            seen[storage.data_ptr()] = storage  # held, so that no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack_in, lambda tensor: tensor):
        model.hidden(ids)
    return sum(storage.nbytes() for storage in seen.values())


# --- docs/models.md -----------------------------------------------------------------------------

HEAD = """# Model families

The families of models with code of their own, what each reads, how long its file is, and
which checks it passes.
`tests/test_models_checks.py` writes this page.

"""

# The commit that brought a family, and how many files it touched: in all, and of the package.
ADDED = {
    "llama": ("51c75b5", 37, 27),
    "gpt2": ("fb20dcf", 11, 9),
    "qwen2": ("53887c1", 10, 3),
    "phi3": ("3e65a07", 7, 2),
    "qwen3": ("e35593b", 11, 3),
    "granite": ("26f3c6c", 14, 6),
    "olmo2": ("26f3c6c", 14, 6),
    "mistral": ("994fd75", 22, 8),
    "smollm3": ("994fd75", 22, 8),
    "gemma2": ("78d4522", 35, 13),
    "gemma3_text": ("78d4522", 35, 13),
    "gpt_neox": ("78d4522", 35, 13),
}
COUNTED = """
**files** is how many the commit touched that brought the family, and how many of them are of the
package; the others are tests and pages. Llama came with the first tree. A family that shared parts
can express takes two or three files of the package. Granite and OLMo 2 came in one commit, Mistral
and SmolLM3 in another, the Gemmas and GPT-NeoX in a third, each with what the shared parts lacked:
norms that stand elsewhere, a plan by layer, norms with an offset.

"""
LONGEST = 150  # lines of a family's file


def rope_names(config):
    """The `rope_type`s of a family; an older name of one is not listed."""
    if not hasattr(config, "rope_types"):
        return "learned positions"
    return ", ".join(["default", *dict.fromkeys(t.rope_type for t in config.rope_types.values())])


def windows_of(config):
    """Which layers of a family may have a window."""
    left_out = getattr(config, "left_out", ())
    if not hasattr(config, "rope_types") or "sliding_window" in left_out:
        return "–"
    return "all layers" if "layer_types" in left_out else "by layer"


def lines_of(model_class):
    """How long a family's file is."""
    return len(inspect.getsource(inspect.getmodule(model_class)).splitlines())


def page():
    """Return docs/models.md: options from the configurations, checks from the registry."""
    for module in ("test_models_causal", "test_models_families", "test_loading_gguf_writing"):
        importlib.import_module(module)  # which list their checks
    rows = [
        "| family | class | rope_types | windows | GGUF files | rope_types there | lines | files |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in FAMILIES.items():
        config, gguf = row.ours.config_class, row.ours.gguf
        there = ", ".join(["default", *gguf.ropes]) if gguf.ropes else "learned positions"
        _, touched, package = ADDED[name]
        rows.append(
            f"| {name} | `{row.ours.__name__}` | {rope_names(config)} | {windows_of(config)} "
            f"| `{gguf.architecture}` | {there} | {lines_of(row.ours)} | {touched}, {package} |"
        )
    rows += [
        COUNTED.rstrip(),
        "",
        f"| check | {' | '.join(FAMILIES)} |",
        f"|---|{'---|' * len(FAMILIES)}",
    ]
    for title in sorted(CHECKS):
        cells = ["✓" if title not in WIDE or name in WIDE[title] else "✓*" for name in FAMILIES]
        rows.append(f"| {title} | {' | '.join(cells)} |")
    return HEAD + "\n".join(rows) + "\n\n\\* with `pytest --wide`.\n"


def test_docs_show_this_table():
    assert PAGE.read_text(encoding="utf-8") == page(), "python tests/test_models_checks.py"


def test_the_file_of_a_family_is_short():
    assert FAMILIES.keys() == ADDED.keys()
    for name, row in FAMILIES.items():
        assert lines_of(row.ours) <= LONGEST, name


@pytest.mark.parametrize("family", ADDED)
def test_the_commits_of_the_families_touched_these_files(family):
    """Held against git where the history is there."""
    commit, touched, package = ADDED[family]
    asked = ["git", "show", "--name-only", "--format=", "--diff-merges=off", commit]
    try:
        told = subprocess.run(asked, cwd=PAGE.parent, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("git is not installed")
    if told.returncode:
        pytest.skip("no history with that commit")
    files = told.stdout.split()
    file = Path(inspect.getfile(FAMILIES[family].ours)).name
    assert f"minilora/models/{file}" in files
    assert (len(files), sum(f.startswith("minilora/") for f in files)) == (touched, package)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
