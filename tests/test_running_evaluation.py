"""Held-out numbers: the same as a float64 oracle's, whatever the batches and the padding."""

import copy
import math
import threading
from functools import partial

import numpy as np
import pytest
import running_models
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from running_models import BY_LENGTH, VOCAB, Bare, Masked, Plain, model_logits, plain_logits
from torch import nn
from transformers import LlamaConfig as TheirConfig
from transformers import LlamaForCausalLM

import minilora
from minilora.data.batches import Batch, Batches, Example, pad
from minilora.data.examples import as_examples
from minilora.lora import inference
from minilora.lora import mixed as serve_mixed
from minilora.running.evaluation import Evaluation, device_of, evaluate
from minilora.running.loss import argument_names, forward_logits, token_loss
from minilora.running.paired import token_losses

ROUNDING = 64  # in units of the dtype's eps; plain torch is off by up to 15 on these logits


def near(value, dtype=torch.float64):
    """What a loss of 0 to 15 nats may be off by: rounding, of logits of up to 15 too."""
    tiny = ROUNDING * torch.finfo(dtype).eps
    return pytest.approx(value, rel=tiny, abs=tiny)


def plain(dtype=torch.float32):
    return running_models.plain(dtype)


def llama(dtype=torch.float32):
    return running_models.llama(dtype)


def bare_llama(dtype=torch.float32):
    return running_models.bare_llama(dtype)


MODELS = {"plain": plain, "llama": llama, "bare llama": bare_llama} | {
    kind: partial(running_models.llama, **options) for kind, options in BY_LENGTH.items()
}


def summed(logits, labels):
    """The oracle: Σ −log p(labels[t] | ids before t) and the count, one label after another."""
    total, count = 0.0, 0
    for t in range(1, len(labels)):
        if labels[t] != -100:
            row = logits[t - 1]
            top = row.max()
            total += top + np.log(np.exp(row - top).sum()) - row[labels[t]]
            count += 1
    return total, count


def oracle(forward, model, rows):
    """Loss per token over all rows, and the tokens."""
    parts = [summed(forward(model, row["input_ids"]), row["labels"]) for row in rows]
    tokens = sum(count for _, count in parts)
    return sum(total for total, _ in parts) / tokens, tokens


@st.composite
def ragged(draw, most=12):
    """Rows of 2 to 9 tokens with ragged masks, each with a label to learn."""
    rows = []
    for length in draw(st.lists(st.integers(2, 9), min_size=1, max_size=most)):
        ids = draw(st.lists(st.integers(0, VOCAB - 1), min_size=length, max_size=length))
        masked = draw(st.lists(st.booleans(), min_size=length, max_size=length))
        masked[draw(st.integers(1, length - 1))] = False
        labels = [-100 if hide else token for token, hide in zip(ids, masked, strict=True)]
        rows.append({"input_ids": ids, "labels": labels})
    return rows


def some_rows(count=11, seed=0):
    """Ragged rows whose beginnings are masked."""
    draw = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        ids = draw.integers(0, VOCAB, draw.integers(2, 12)).tolist()
        masked = int(draw.integers(0, len(ids) - 1))
        rows.append({"input_ids": ids, "labels": [-100] * masked + ids[masked:]})
    return rows


# --- the numbers --------------------------------------------------------------------------------


@settings(max_examples=40)
@given(ragged(), st.integers(1, 13))
def test_evaluate_of_a_plain_module_equals_the_oracle(rows, size):
    for dtype in (torch.float64, torch.float32):
        model = plain(dtype)
        found = evaluate(model, rows, batch_size=size)
        loss, tokens = oracle(plain_logits, model, rows)
        assert found.loss == near(loss, dtype)
        assert math.log(found.perplexity) == near(loss, dtype)
        assert found.perplexity == math.exp(found.loss)
        assert found.tokens == tokens


@settings(max_examples=25)
@given(ragged(8), st.integers(1, 9), st.sampled_from(["llama", "bare llama", *BY_LENGTH]))
def test_evaluate_of_llama_equals_the_oracle(rows, size, kind):
    """Through `Llama.loss` and through bare logits."""
    model = MODELS[kind](torch.float64)
    found = evaluate(model, rows, batch_size=size)
    loss, tokens = oracle(model_logits, model, rows)
    assert found.loss == near(loss)
    assert found.tokens == tokens


@settings(max_examples=25)
@given(ragged(), st.sampled_from(sorted(MODELS)))
def test_evaluate_is_the_same_for_every_batch_size(rows, kind):
    model = MODELS[kind]()
    found = [evaluate(model, rows, batch_size=size) for size in (1, 2, 3, len(rows))]
    assert len({each.tokens for each in found}) == 1
    for each in found[1:]:
        assert each.loss == near(found[0].loss, torch.float32)


def test_evaluate_weighs_tokens_and_not_batches():
    """A mean over rows or batches is another number; the test must see the difference."""
    rows, model = some_rows(), plain(torch.float64)
    parts = [summed(plain_logits(model, row["input_ids"]), row["labels"]) for row in rows]
    by_rows = np.mean([total / count for total, count in parts])
    loss, tokens = oracle(plain_logits, model, rows)
    assert abs(by_rows - loss) > 1e-3
    for size in (1, 4):
        assert evaluate(model, rows, batch_size=size).loss == near(loss)
    assert tokens < sum(len(row["input_ids"]) - 1 for row in rows)


@pytest.mark.parametrize("kind", sorted(MODELS))
def test_evaluate_gives_the_same_bits_for_the_same_batches(kind):
    model, rows = MODELS[kind](), some_rows()
    first = evaluate(model, rows, batch_size=3)
    assert evaluate(model, rows, batch_size=3) == first
    assert evaluate(model, rows[:], batch_size=3, pad_id=0) == first


@settings(max_examples=25)
@given(ragged(6), st.integers(0, VOCAB - 1), st.integers(0, 5), st.sampled_from(sorted(MODELS)))
def test_padding_never_changes_the_loss(rows, pad_id, more, kind):
    """Neither the token in it nor how much of it there is."""
    model = MODELS[kind](torch.float64)
    loss, tokens = oracle(model_logits, model, rows)
    width = max(len(row["input_ids"]) for row in rows) + more
    ids = torch.full((len(rows), width), pad_id)
    labels = torch.full((len(rows), width), -100)
    for i, row in enumerate(rows):
        ids[i, : len(row["input_ids"])] = torch.tensor(row["input_ids"])
        labels[i, : len(row["labels"])] = torch.tensor(row["labels"])
    lengths = torch.tensor([[len(row["input_ids"])] for row in rows])
    batch = Batch(ids, labels, torch.arange(width) < lengths)
    for found in (evaluate(model, [batch]), evaluate(model, rows, pad_id=pad_id)):
        assert found.loss == near(loss)
        assert found.tokens == tokens


def test_evaluate_without_labels_learns_the_ids():
    model, ids = plain(torch.float64), [3, 1, 4, 1, 5]
    loss, _ = oracle(plain_logits, model, [{"input_ids": ids, "labels": ids}])
    for data in ([{"input_ids": ids}], [Example(ids, ids)], [{"input_ids": torch.tensor(ids)}]):
        found = evaluate(model, data)
        assert found.loss == near(loss)
        assert found.tokens == 4


@pytest.mark.peers
def test_evaluate_of_a_transformers_model_equals_its_own_loss():
    """Its forward returns an object with logits and takes an attention mask."""
    torch.manual_seed(0)
    config = TheirConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config).double().eval()
    rows, total, tokens = some_rows(), 0.0, 0
    for row in rows:
        ids, labels = (torch.tensor([row[key]]) for key in ("input_ids", "labels"))
        count = int((labels[:, 1:] != -100).sum())
        with torch.no_grad():
            total += float(model(ids, labels=labels).loss) * count
        tokens += count
    for size in (1, 4):
        found = evaluate(model, rows, batch_size=size)
        assert found.loss == pytest.approx(total / tokens, rel=1e-6)  # theirs computes it in f32
        assert found.tokens == tokens


# --- what data may be ---------------------------------------------------------------------------


def test_evaluate_takes_batches_in_their_order_and_examples_by_length():
    model, seen = plain(), []

    def loss(model, batch):
        seen.append(batch.input_ids.tolist())
        return token_loss(model, batch)

    rows = [{"input_ids": [1] * n} for n in (5, 2, 4, 3)]
    evaluate(model, rows, batch_size=3, loss=loss)
    assert seen == [[[1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]], [[1] * 5]]
    seen.clear()
    made = [pad([Example(row["input_ids"], row["input_ids"])]) for row in rows]
    evaluate(model, iter(made), batch_size=3, loss=loss)
    assert seen == [[row["input_ids"]] for row in rows]


def test_evaluate_of_a_loader_takes_its_examples_and_leaves_its_place():
    model, rows, sizes = plain(), some_rows(7), []

    def loss(model, batch):
        sizes.append(len(batch.input_ids))
        return token_loss(model, batch)

    loader = Batches(rows, batch_size=3, drop_last=True, pad_id=5)
    next(iter(loader))
    before = loader.state_dict()
    found = evaluate(model, loader, batch_size=1, loss=loss)
    assert loader.state_dict() == before
    assert sizes == [3, 3, 1]  # what drop_last leaves out of training is measured
    assert found == evaluate(model, rows, batch_size=3, pad_id=5)


def test_evaluate_sums_the_given_loss_in_float64():
    """In f32 a sum of 1e8 and ones would stay 1e8."""
    values = iter([1e8, 1.0, 1.0, 1.0])
    rows = [{"input_ids": [1, 2]}] * 4
    found = evaluate(plain(), rows, batch_size=1, loss=lambda *_: (torch.tensor(next(values)), 2))
    assert found.loss == (1e8 + 3) / 8
    assert found.tokens == 8


def test_evaluation_of_a_hopeless_model_is_not_hidden():
    for value, perplexity in ((1000.0, math.inf), (math.inf, math.inf), (math.nan, math.nan)):
        found = evaluate(
            plain(), [{"input_ids": [1, 2]}], loss=lambda *_, v=value: (torch.tensor(v), 1)
        )
        assert str(found.loss) == str(value)
        assert str(found.perplexity) == str(perplexity)
    broken = plain()
    broken.head.bias.data[3] = math.nan
    assert math.isnan(evaluate(broken, some_rows()).loss)


def test_evaluation_prints_its_numbers():
    shown = str(Evaluation(1.23456, 3.43687, 7))
    assert shown == "loss 1.2346, perplexity 3.437 over 7 tokens"


# --- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, -1])
def test_evaluate_refuses_a_bad_batch_size(size):
    with pytest.raises(ValueError, match=f"batch_size must be at least 1, found {size}"):
        evaluate(plain(), some_rows(), batch_size=size)


def test_evaluate_refuses_fully_masked_data():
    """As examples, as batches, and where a loss of one's own counts nothing."""
    masked = {"input_ids": [1, 2, 3], "labels": [1, -100, -100]}
    with pytest.raises(ValueError, match="example 1: nothing to learn"):
        evaluate(plain(), [{"input_ids": [1, 2]}, masked])
    batch = pad([Example([1, 2, 3], [1, -100, -100])])
    message = (
        r"a batch must have a label to learn, found \(1, 3\) labels of which all after the first "
        "column are -100; leave such batches out"
    )
    for make in MODELS.values():
        with pytest.raises(ValueError, match=message):
            evaluate(make(), [batch])
    message = "data must hold a label to learn, found none: loss counted 0 tokens"
    with pytest.raises(ValueError, match=message):
        evaluate(plain(), [batch], loss=lambda *_: (torch.zeros(()), 0))


def test_mixed_rows_keep_their_order_or_are_refused():
    """Sorted by length they would get each other's adapters."""
    model, rows = llama(), [{"input_ids": [3, 4, 5, 6, 7, 8]}, {"input_ids": [1, 2, 3]}]
    alone = []
    for name, row in zip("ab", rows, strict=True):
        minilora.inject(model, r=4, alpha=6, adapter=name)
        for fqn, p in model.named_parameters():
            if fqn.endswith(f".{name}.lora_B"):
                nn.init.normal_(p, std=0.5)
        alone.append(evaluate(model, [row]))
    base = evaluate(minilora.eject(copy.deepcopy(model)), rows[1:])
    assert abs(base.loss - alone[1].loss) > 0.01
    batch = pad(as_examples(rows))
    contenders = {"contenders": ["a", "b"], "data": rows}
    with serve_mixed(model, ["a", "b"]):
        mean = sum(each.loss * each.tokens for each in alone) / batch.tokens
        assert evaluate(model, [batch]).loss == near(mean, torch.float32)
        for call, verb in (
            (lambda: evaluate(model, rows), r"evaluate\(\) of examples, which it sorts,"),
            (
                lambda: evaluate(model, Batches(as_examples(rows), batch_size=2)),
                r"evaluate\(\) of examples",
            ),
            (lambda: token_losses(model, as_examples(rows), batch_size=2), "that sorts examples"),
            (lambda: minilora.compare(model, **contenders), "that switches adapters"),
            (lambda: minilora.fit(model, rows), r"fit\(\)"),
        ):
            with pytest.raises(RuntimeError, match=f"{verb}.* must be called outside of mixed"):
                call()


def test_evaluate_refuses_what_is_no_data():
    with pytest.raises(ValueError, match="data must hold at least one example, found none"):
        evaluate(plain(), [])
    with pytest.raises(TypeError, match="example 0 must have input_ids, found str without them"):
        evaluate(plain(), ["text"])
    batch = pad([Example([1, 2], [1, 2])])
    with pytest.raises(TypeError, match="example 1: input_ids must hold integers in one dim"):
        evaluate(plain(), [{"input_ids": [1, 2]}, batch])


# --- the model is left as it was ----------------------------------------------------------------


def mixed(model):
    """Training with one module in evaluation mode; the flags by name."""
    model.train()
    model.embed.eval()
    return {name: module.training for name, module in model.named_modules()}


def test_evaluate_is_without_dropout_and_restores_each_flag():
    model, rows = plain(torch.float64), some_rows()
    loss, _ = oracle(plain_logits, model, rows)
    flags = mixed(model)
    assert set(flags.values()) == {True, False}
    assert evaluate(model, rows).loss == near(loss)
    assert {name: module.training for name, module in model.named_modules()} == flags
    for training in (True, False):
        model.train(training)
        evaluate(model, rows)
        assert all(module.training is training for module in model.modules())


@pytest.mark.parametrize("where", ["data", "loss", "model"])
def test_evaluate_restores_the_flags_after_an_error(where):
    model, rows = plain(), some_rows()
    flags = mixed(model)

    def loss(model, batch):
        assert not any(module.training for module in model.modules())
        raise KeyError("loss")

    if where == "data":
        with pytest.raises(ValueError, match="negative"):
            evaluate(model, [*rows, {"input_ids": [1, -1]}])
    elif where == "loss":
        with pytest.raises(KeyError, match="loss"):
            evaluate(model, rows, loss=loss)
    else:
        with pytest.raises(IndexError):
            evaluate(model, [{"input_ids": [0, VOCAB]}])
    assert {name: module.training for name, module in model.named_modules()} == flags
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("kind", sorted(MODELS))
def test_evaluate_changes_nothing_and_draws_nothing(kind):
    model, rows = MODELS[kind]().train(), some_rows()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random_state = torch.get_rng_state()
    sums = []

    def loss(model, batch):
        sums.append(token_loss(model, batch))
        return sums[-1]

    evaluate(model, rows, loss=loss)
    assert not any(part.requires_grad for part, _ in sums)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), random_state)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_evaluate_is_in_the_public_interface():
    assert minilora.evaluate is evaluate


# --- the loss of a batch ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", sorted(MODELS))
def test_token_loss_carries_the_gradient_of_the_sum(kind):
    """Against plain torch on unpadded rows, in float64."""
    model, rows = MODELS[kind](torch.float64), some_rows(5)
    batch = pad([Example(row["input_ids"], row["labels"]) for row in rows])
    part, tokens = token_loss(model, batch)
    assert (part.shape, part.dtype) == ((), torch.float64)
    parameters = list(model.parameters())
    found = torch.autograd.grad(part, parameters)
    total = torch.zeros((), dtype=torch.float64)
    for row in rows:
        logs = model(torch.tensor([row["input_ids"]]))[0].log_softmax(-1)
        for t, label in enumerate(row["labels"][1:]):
            total = total - (logs[t, label] if label != -100 else 0)
    assert tokens == sum(label != -100 for row in rows for label in row["labels"][1:])
    assert float(part.detach()) == near(float(total.detach()))
    for ours, theirs in zip(found, torch.autograd.grad(total, parameters), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_token_loss_lets_a_model_compute_its_own_loss():
    """`Llama.loss` never holds all logits, so its forward must not be called."""
    batch = pad([Example([1, 2, 3], [1, 2, 3]), Example([4, 5], [4, 5])])
    for model, calls in ((llama(), 0), (Bare(llama()), 1)):
        seen = []
        model.register_forward_hook(lambda *call, seen=seen: seen.append(call))
        token_loss(model, batch)
        assert len(seen) == calls


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_token_loss_widens_narrow_logits(dtype):
    """The softmax is in f32: against the oracle on the very logits, which are narrow."""
    model = plain(dtype)
    rows = [row for row in some_rows(30) if len(row["input_ids"]) == 6]
    assert len(rows) > 1
    batch = pad([Example(row["input_ids"], row["labels"]) for row in rows])
    with torch.no_grad():
        part, tokens = token_loss(model, batch)
        logits = model(batch.input_ids)
    assert logits.dtype == dtype
    assert part.dtype == torch.float32
    wanted = sum(summed(logits[i].double().numpy(), row["labels"])[0] for i, row in enumerate(rows))
    assert float(part) == near(wanted, torch.float32)
    assert tokens == batch.tokens


def test_evaluate_passes_the_mask_to_a_forward_that_names_it():
    model = Masked()
    rows = some_rows()
    loss, tokens = oracle(model_logits, model, rows)
    for size in (1, 3, len(rows)):
        found = evaluate(model, rows, batch_size=size)
        assert found.loss == near(loss)
        assert found.tokens == tokens


def test_forward_logits_takes_them_out_of_an_object():
    class Output(nn.Module):
        def forward(self, input_ids):
            return type("Out", (), {"logits": input_ids * 2})()

    ids = torch.tensor([[1, 2]])
    assert torch.equal(forward_logits(Output(), ids), ids * 2)
    assert torch.equal(forward_logits(nn.Identity(), ids), ids)


def test_argument_names_of_functions_and_of_what_is_none():
    assert argument_names(Masked.forward) == {"self", "input_ids", "attention_mask"}
    assert argument_names(plain().forward) == {"input_ids"}
    assert argument_names(None) == argument_names(nn.MSELoss()) == set()


def test_token_loss_prefers_logits_to_a_loss_that_is_no_method():
    """A criterion kept as `loss` takes no ids."""

    class WithCriterion(Plain):
        def __init__(self):
            super().__init__()
            self.loss = nn.CrossEntropyLoss()

    torch.manual_seed(0)
    model = WithCriterion().double()
    rows = some_rows(4)
    loss, _ = oracle(plain_logits, model, rows)
    assert evaluate(model, rows).loss == near(loss)


def test_device_of_looks_at_parameters_then_buffers():
    assert device_of(nn.Linear(1, 1, device="meta")).type == "meta"
    assert device_of(Masked("meta")).type == "meta"
    assert device_of(nn.Identity()) == torch.device("cpu")


def test_threads_that_run_a_model_at_once_leave_its_flags_as_they_were():
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5)).train()
    model[0].eval()
    begun, done = threading.Event(), threading.Event()

    def run():
        with inference(model):
            begun.set()
            done.wait(60)

    other = threading.Thread(target=run)
    other.start()
    assert begun.wait(60)
    with inference(model):  # it begins and ends within the other's, which goes on
        pass
    assert not any(module.training for module in model.modules())
    with inference(model):
        done.set()
        other.join()
        assert not any(module.training for module in model.modules())  # or there were dropout
    assert [module.training for module in model.modules()] == [True, False, True]
