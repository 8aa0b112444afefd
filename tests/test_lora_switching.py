"""Whole-model verbs: activate, disabled, eject, summary, copies."""

import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from small_models import bits, net, shake, two_adapters, unchanged

import minilora
from minilora.lora import mixed
from minilora.lora.layer import lora_layers


def test_adapters_sum_switch_and_roll_back():
    model, x = net().double(), torch.randn(3, 12, dtype=torch.float64)
    base = model(x)
    shake(minilora.inject(model, r=2, alpha=3, dtype=torch.float64))
    first = model(x)
    shake(minilora.inject(model, r=3, alpha=7, adapter="b", dtype=torch.float64), "b")
    second = model(x)
    minilora.activate(model, ["default", "b"])
    q = model.q_proj
    both = q.base.weight + sum(f.delta_weight() for f in q.adapters.values())
    torch.testing.assert_close(q(x), x @ both.T + q.base.bias)
    with minilora.disabled(model):
        assert torch.equal(model(x), base)
    minilora.activate(model, "b")
    assert torch.equal(model(x), second)
    minilora.activate(model, "default", trainable="b")
    assert torch.equal(model(x), first)
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    assert all(flag == ("adapters.b." in name) for name, flag in flags.items())
    minilora.activate(model, None)
    assert torch.equal(model(x), base)


def test_eject_gives_the_plain_model_back():
    model = net()
    model.v_proj.weight.requires_grad_(False)
    before, flags = bits(model), [p.requires_grad for p in model.parameters()]
    shake(minilora.inject(model, r=4, alpha=6))
    minilora.eject(model)
    unchanged(model, before, flags)


def test_copies_and_pickles_keep_the_numbers():
    model, x = shake(minilora.inject(net(), r=4, alpha=6)), torch.randn(3, 12)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), model(x))
        shake(twin)
        assert not torch.equal(twin(x), model(x))


def _in_thread(action):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(action).result()


def _within(model):
    yield minilora.disabled(model)
    yield mixed(model, ["default", "base", "default"])


@pytest.mark.parametrize("which", [0, 1], ids=["disabled", "mixed"])
def test_a_block_serves_one_thread_and_others_are_refused(which):
    model, x = shake(minilora.inject(net(), r=4, alpha=6)), torch.randn(3, 12)
    full = model(x)
    with list(_within(model))[which]:
        inside = model(x)
        assert not torch.equal(inside, full)
        with pytest.raises(
            RuntimeError, match=r"must be used by one thread .* a copy \(copy\.deepcopy\)"
        ):
            _in_thread(lambda: model(x))
        for block in _within(model):
            with pytest.raises(RuntimeError, match=r"found another one within such a block"):
                _in_thread(block.__enter__)
        with list(_within(model))[which]:  # of one thread they nest
            pass
        assert torch.equal(model(x), inside)
    assert torch.equal(model(x), full)
    assert torch.equal(_in_thread(lambda: model(x)), full)


def test_threads_that_disable_at_once_leave_the_adapters_on():
    model, x = shake(minilora.inject(net(), r=4, alpha=6)), torch.randn(3, 12)
    full = model(x)
    with minilora.disabled(model):
        base = model(x)
    begin = threading.Barrier(4)

    def work():
        begin.wait()
        refused = 0
        for _ in range(40):
            try:
                with minilora.disabled(model):
                    assert torch.equal(model(x), base)
                assert torch.equal(model(x), full)
            except RuntimeError:
                refused += 1
        return refused

    with ThreadPoolExecutor(4) as pool:
        done = [pool.submit(work) for _ in range(4)]
    assert all(0 <= one.result() <= 40 for one in done)
    assert torch.equal(model(x), full)


def test_verbs_that_compute_refuse_a_model_of_shapes(tmp_path):
    model = minilora.inject(net().to("meta"), r=2)
    for verb in (
        lambda: minilora.evaluate(model, [{"input_ids": [1, 2]}]),
        lambda: minilora.generate(model, [[1, 2]]),
        lambda: minilora.save(model, tmp_path),
    ):
        with pytest.raises(ValueError, match="needs a model with weights, found .* on the meta"):
            verb()


# --- what every verb refuses, and what summary and targets say


VERBS = {
    "activate": lambda m: minilora.activate(m, None),
    "disabled": lambda m: minilora.disabled(m).__enter__(),
    "merge": minilora.merge,
    "unmerge": minilora.unmerge,
    "eject": minilora.eject,
    "summary": minilora.summary,
}


@pytest.mark.parametrize("verb", VERBS)
def test_verbs_refuse_a_model_without_adapters(verb):
    with pytest.raises(ValueError, match=rf"{verb}\(\) needs a model with adapters, found none"):
        VERBS[verb](net())


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda m: minilora.activate(m, 3), TypeError, r"activate\(\) takes an adapter's name"),
        (lambda m: minilora.activate(m, ["b", 3]), TypeError, "a list of names or None, found"),
        (lambda m: minilora.activate(m, "c"), ValueError, "no adapter 'c'; this model has: defau"),
        (lambda m: minilora.activate(m, ["b", "b"]), ValueError, "each adapter may be named once"),
        (lambda m: minilora.activate(m, "b", trainable="c"), ValueError, "no adapter 'c'"),
        (lambda m: minilora.merge(m, "c"), ValueError, "no adapter 'c'"),
        (lambda m: minilora.merge(m, keep="ram"), ValueError, "keep must be 'memory', 'disk' or N"),
        (minilora.unmerge, RuntimeError, "needs merged weights, found none"),
    ],
)
def test_verbs_refuse_and_leave_the_model_as_it_was(call, error, text):
    model = two_adapters()
    before, flags = bits(model), [p.requires_grad for p in model.parameters()]
    active = [layer.active for layer in lora_layers(model).values()]
    with pytest.raises(error, match=text):
        call(model)
    unchanged(model, before, flags)
    assert active == [layer.active for layer in lora_layers(model).values()]


def test_activate_trainable_is_exactly_what_was_asked():
    model = two_adapters()
    for asked in ("b", ["default", "b"], [], "default"):
        minilora.activate(model, "default", trainable=asked)
        names = [asked] if isinstance(asked, str) else asked
        for name, parameter in model.named_parameters():
            assert parameter.requires_grad == any(f"adapters.{n}." in name for n in names), name


def test_disabled_restores_even_after_an_error():
    model = two_adapters()
    active = {n: layer.active for n, layer in lora_layers(model).items()}
    with pytest.raises(KeyError), minilora.disabled(model):
        assert not any(layer.active for layer in lora_layers(model).values())
        raise KeyError
    assert {n: layer.active for n, layer in lora_layers(model).items()} == active


def test_summary_counts_what_is_there():
    model = two_adapters()
    found = minilora.summary(model)
    default, b = found.adapters
    layers = {"q_proj": (12, 20), "v_proj": (12, 20), "mlp.0": (20, 20), "mlp.2": (20, 12)}
    parameters = 4 * sum(map(sum, layers.values()))
    assert (default.layers, default.parameters, default.ranks) == (4, parameters, {4: 4})
    assert (b.layers, b.parameters, b.scalings) == (1, 2 * 32, {2.5: 1})
    assert found.trainable == default.trainable + b.trainable == parameters + 64
    assert (default.active, b.active, b.merged) == (False, True, False)
    base = sum(p.numel() for p in net().parameters())
    assert found.parameters == base + parameters + 64
    assert found.bytes == 4 * found.parameters
    assert "adapter b: r=2 on 1 layers, scaling 2.5, 64 parameters, active, trainable" in str(found)
    minilora.merge(model)
    found = minilora.summary(model)
    assert found.kept_bytes == 4 * 12 * 20
    assert "originals kept in memory for unmerge" in str(found)
    assert found.adapters[1].merged
