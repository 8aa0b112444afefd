"""Losses over pairs of answers against float64 written apart: values, every gradient, sharing."""

import dataclasses

import pytest
import torch
from foreign_models import foreign
from hypothesis import given, settings
from hypothesis import strategies as st
from preference_pairs import drift, log_probs, loss, pair, pairs
from running_models import BY_LENGTH, llama
from small_models import shake
from training_models import CONFIG, examples, tiny

import minilora
from minilora.data import Batches, PairBatch, pad
from minilora.lora.layer import lora_layers
from minilora.models import GPT2, GPT2Config, Llama, Mistral, MistralConfig
from minilora.running import KINDS, Preference, evaluate
from minilora.running.log_probs import pair_log_probs, shares_prompts
from minilora.running.loss import token_loss

BETAS = {"dpo": 0.7, "ipo": 0.3, "orpo": 0.4, "kto": 0.6, "simpo": 1.7}


def moved(seed=0, **options):
    """A float64 model whose adapter is not zero."""
    return shake(tiny(seed, **options).double(), scale=0.1)


def gradients(model):
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad(set_to_none=True)
    return found


def expected(kind, model, data, **options):
    """The sum over pairs by the oracle, and its gradients."""
    with torch.no_grad(), minilora.disabled(model):
        before = [log_probs(model, one) for one in data]
    z = 0.0
    if kind == "kto":
        with torch.no_grad():
            now = [log_probs(model, one)[1][0] for one in data]
        z = max(0.0, float(sum(a - b[1][0] for a, b in zip(now, before, strict=True)) / len(data)))
    losses = [
        loss(kind, log_probs(model, one), old, wanted=one.wanted, z=z, **options)
        for one, old in zip(data, before, strict=True)
    ]
    total = torch.stack(losses).sum()
    total.backward()
    return float(total.detach()), gradients(model)


def check(kind, model, data, batch_size=3, tolerance=1e-9, **options):
    want, wanted = expected(kind, model, data, **options)
    ours = Preference(kind, **({"kto_weights": options.pop("weights")} if "weights" in options
                               else {}), **options)  # fmt: skip
    batches = [pad(data[i : i + batch_size]) for i in range(0, len(data), batch_size)]
    ours.prepare(model, batches)
    total = 0.0
    for batch in batches:
        part, count = ours(model, batch)
        assert count == len(batch)
        part.backward()
        total += float(part.detach())
    assert total == pytest.approx(want, rel=tolerance)
    for name, grad in gradients(model).items():
        torch.testing.assert_close(grad, wanted[name], rtol=10 * tolerance, atol=10 * tolerance)
    return ours


@settings(max_examples=12)
@given(
    st.sampled_from(sorted(KINDS)), st.integers(1, 7), st.integers(0, 99), st.integers(1, 4)
)  # fmt: skip
def test_losses_and_gradients_are_the_oracles(kind, count, seed, batch_size):
    model = moved()
    data = pairs(count, seed, kto=kind == "kto")
    check(kind, model, data, batch_size, beta=BETAS[kind])


def test_options_of_the_losses():
    model = moved()
    check("simpo", model, pairs(4), beta=2.0, gamma=0.3)
    check("kto", model, pairs(6, kto=True), beta=0.5, weights=(2.0, 0.25))


def test_ends_of_the_lengths():
    """No prompt, answers of one token, a beginning that both answers share."""
    data = [
        pair([], [3, 4, 5], [6, 7]),
        pair([1], [2], [3]),
        pair([1, 2, 3], [4, 5, 6], [4, 5, 7, 8, 9]),
        pair([9] * 11, [1], list(range(13))),
    ]
    for kind in ("dpo", "ipo", "orpo", "simpo"):
        check(kind, moved(), data, beta=BETAS[kind])


def windowed(window):
    torch.manual_seed(0)
    shape = {k: v for k, v in dataclasses.asdict(CONFIG).items() if k in SHAPE}
    model = Mistral(MistralConfig(**shape, sliding_window=window))
    return minilora.inject(model, r=4, alpha=6)


SHAPE = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
         "num_attention_heads", "num_key_value_heads", "head_dim")  # fmt: skip


def gpt2():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=61, n_embd=24, n_layer=2, n_head=4, n_positions=64)
    return minilora.inject(GPT2(config), r=4, alpha=6)


@pytest.mark.parametrize(
    ("make", "shared"),
    [(tiny, True), (gpt2, True), (lambda: windowed(4), False), (lambda: windowed(64), True)],
    ids=["llama", "gpt2", "narrow window", "wide window"],
)
def test_a_prompt_is_shared_where_that_is_exact(make, shared):
    model = shake(make().double(), scale=0.1)
    data = pairs(5)
    assert shares_prompts(model, pad(data)) is shared
    check("dpo", model, data, beta=0.7)


@pytest.mark.parametrize("kind", sorted(BY_LENGTH))
def test_rotary_embeddings_that_depend_on_the_length_of_an_answer_alone(kind):
    """The oracle runs each prompt and answer in a row without padding."""
    model = minilora.inject(llama(**BY_LENGTH[kind]), r=4, alpha=6)
    model = shake(model.double(), scale=0.1)
    data = [pair([1, 2], [3], [4, 5, 6, 7, 8, 9]), *pairs(3, vocabulary=24, longest=6)]
    assert not shares_prompts(model, pad(data))
    check("dpo", model, data, beta=0.7)


def test_a_row_of_both_answers_may_be_longer_than_the_context():
    """Then each answer gets a row."""
    torch.manual_seed(0)
    short = dataclasses.replace(CONFIG, max_position_embeddings=9)
    model = shake(minilora.inject(Llama(short), r=4, alpha=6).double(), scale=0.1)
    data = [pair([1, 2, 3, 4], [5, 6, 7, 8, 9], [10, 11, 12])]
    assert not shares_prompts(model, pad(data))
    check("dpo", model, data, beta=0.7)


@pytest.mark.parametrize("kind", ["llama", "opt", "mamba"])
def test_models_of_transformers(kind):
    model = shake(minilora.inject(foreign(kind, torch.float64), r=4, alpha=6), scale=0.1)
    data = pairs(4, vocabulary=256, longest=7)
    check("dpo", model, data, beta=0.7, tolerance=1e-7)


def test_the_reference_has_the_bases_own_parameters():
    """Trained copies of the head, an embedding's and biases are the adapter's, too."""
    for options in ({"modules_to_save": ["lm_head"]}, {"targets": ["q_proj", "lm_head"]}):
        model = moved(**options)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if p.requires_grad and "lora" not in name:
                    p.add_(0.3 * torch.randn_like(p))
        check("dpo", model, pairs(4), beta=0.7)
        check("orpo", model, pairs(4), beta=0.4)


@pytest.mark.parametrize("format", ["int8", "nf4"])
def test_a_quantized_base(format):
    model = shake(tiny(), scale=0.1)
    more = {"block_size": 32} if format == "nf4" else {"compute": "dequantize"}
    minilora.quantize(model, format, **more)
    data = pairs(5)
    ours = Preference("dpo", beta=0.7)
    total, _ = ours(model, pad(data))
    want, _ = expected("dpo", model, data, beta=0.7)
    assert float(total.detach()) == pytest.approx(want, rel=1e-5)


def test_other_active_adapters_belong_to_the_reference():
    model = moved()
    shake(minilora.inject(model, r=2, alpha=3, adapter="second").double(), "second", 0.1)
    minilora.activate(model, ["default", "second"], trainable="second")
    data, ours = pairs(3), Preference("dpo", adapter="second")
    ours.prepare(model, [pad(data)])
    minilora.activate(model, "default")
    want = [[float(s) for s, _ in log_probs(model, one)] for one in data]
    keys = pad(data).keys.tolist()
    for key, (first, second) in zip(keys, want, strict=True):
        assert ours.known[key] == pytest.approx((first, second), rel=1e-9)
    assert set(Preference("orpo").known) == set()


def test_the_reference_is_computed_once(monkeypatch):
    model, data, ours = moved(), pairs(5), Preference("dpo")
    batch = pad(data)
    ours.prepare(model, [batch])
    known = dict(ours.known)

    def never(*_, **__):
        raise AssertionError("computed again")

    monkeypatch.setattr(Preference, "_reference", lambda self, model, parts: (
        {} if all(set(p.keys.tolist()) <= set(self.known) for p in parts) else never()
    ))  # fmt: skip
    ours.prepare(model, [pad(data[:2]), pad(data[2:])])
    ours(model, batch.rows(1, 3))
    assert ours.known == known


def test_the_reference_of_another_model_or_adapter_is_forgotten():
    first, second, data = moved(), moved(seed=1), pairs(5)
    ours = Preference("dpo", beta=0.7)
    for model in (first, second, first):
        want, _ = expected("dpo", model, data, beta=0.7)
        assert evaluate(model, data, loss=ours).loss == pytest.approx(want / 5, rel=1e-9)
    shake(minilora.inject(first, r=2, alpha=3, adapter="second").double(), "second", 0.1)
    minilora.activate(first, ["default", "second"], trainable="second")
    fresh = Preference("dpo", beta=0.7, adapter="second")
    ours.adapter = "second"
    want = float(fresh(first, pad(data))[0].detach())
    assert float(ours(first, pad(data))[0].detach()) == pytest.approx(want, rel=1e-9)


def test_the_reference_of_other_weights_is_forgotten():
    model, data, ours = moved(), pad(pairs(5)), Preference("dpo", beta=0.7)
    ours(model, data)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.requires_grad:
                parameter.mul_(1.5)
    want = float(Preference("dpo", beta=0.7)(model, data)[0].detach())
    assert float(ours(model, data)[0].detach()) == pytest.approx(want, rel=1e-9)


def test_the_reference_beside_other_adapters_is_forgotten():
    """Also where they are trainable: in a loop of one's own both may be."""
    model, data, ours = moved(), pad(pairs(5)), Preference("dpo", beta=0.7, adapter="second")
    shake(minilora.inject(model, r=2, alpha=3, adapter="second").double(), "second", 0.1)
    seen = set()

    def scaled():
        for layer in lora_layers(model).values():
            layer.adapters["default"].alpha *= 2

    for change in (
        lambda: minilora.activate(model, ["default", "second"], trainable=["default", "second"]),
        lambda: minilora.activate(model, "second"),
        lambda: minilora.activate(model, ["default", "second"]),
        lambda: shake(model, "default", 0.2),
        scaled,
    ):
        change()
        want = float(Preference("dpo", beta=0.7, adapter="second")(model, data)[0].detach())
        assert float(ours(model, data)[0].detach()) == pytest.approx(want, rel=1e-9)
        seen.add(round(want, 9))
    assert len(seen) == 4  # the third is the first
    before = ours.known
    shake(model, "second", 0.2)
    ours(model, data)
    assert ours.known is before  # a step of its own adapter changes nothing of it


def test_what_was_restored_is_of_the_next_model():
    model, data, ours, again = moved(), pad(pairs(5)), Preference("dpo"), Preference("dpo")
    ours.prepare(model, [data])
    again.prepare(moved(seed=1), [data])
    again.restore(*ours.tensors().values())
    again.prepare(model, [data])
    assert again.known == ours.known


def test_before_training_every_margin_is_zero():
    """At equal rewards a pair counts as half right."""
    model = tiny()
    for kind, value in (("dpo", 0.6931472), ("ipo", 25.0), ("kto", 0.5)):
        data = pairs(6, kto=kind == "kto")
        found = evaluate(model, data, batch_size=4, loss=Preference(kind))
        assert found.loss == pytest.approx(value, rel=1e-5)
        assert found.margin == pytest.approx(0, abs=1e-6) and 0 <= found.accuracy <= 1


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_evaluation_gives_loss_and_accuracy_whatever_the_batch(kind):
    model = moved()
    data = pairs(9, kto=kind == "kto")
    found = [evaluate(model, data, batch_size=n, loss=Preference(kind)) for n in (1, 4, 9)]
    for other in found[1:]:
        assert other.loss == pytest.approx(found[0].loss, rel=1e-9)
        assert other.accuracy == found[0].accuracy
        assert other.margin == pytest.approx(found[0].margin, rel=1e-9)
    assert found[0].tokens == 9 and f"accuracy {found[0].accuracy:.3f}" in str(found[0])
    want, _ = expected(kind, model, data, beta=KINDS[kind].beta)
    assert found[0].loss == pytest.approx(want / 9, rel=1e-9)


def test_accuracy_and_margin_are_those_of_the_rewards():
    model, data = moved(), pairs(8)
    rewards = []
    for one in data:
        with torch.no_grad():
            now = log_probs(model, one)
        with torch.no_grad(), minilora.disabled(model):
            before = log_probs(model, one)
        rewards.append([0.5 * float(a[0] - b[0]) for a, b in zip(now, before, strict=True)])
    found = evaluate(model, data, loss=Preference("dpo", beta=0.5))
    assert found.accuracy == sum(a > b for a, b in rewards) / 8
    assert found.margin == pytest.approx(sum(a - b for a, b in rewards) / 8)
    labelled = pairs(8, kto=True)
    ours = Preference("kto", beta=0.5)
    found = evaluate(model, labelled, loss=ours)
    with torch.no_grad():
        reference = moved()
        shake(reference, scale=0.0)
        assert ours.drift == pytest.approx(drift(model, reference, labelled), rel=1e-6)
    scores = ours.scores(model, pad(labelled))
    right = [(a > b) == one.wanted for a, b, one in zip(*scores[1:], labelled, strict=True)]
    assert found.accuracy == sum(bool(x) for x in right) / 8


def test_probabilities_that_round_to_one_give_a_finite_gradient():
    model = tiny()
    with torch.no_grad():
        model.lm_head.weight.mul_(1e4)  # every token is certain
    ids = [5]
    for _ in range(4):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    total, _ = Preference("orpo")(model, pad([pair([5], ids[1:], [7, 8])]))
    total.backward()
    assert torch.isfinite(total)
    assert all(torch.isfinite(g).all() for g in gradients(model).values() if g is not None)


def test_logits_are_never_whole(monkeypatch):
    """The head gives each learned token's loss chunk by chunk, also one that is wrapped."""
    seen = []
    import minilora.running.log_probs as module

    real = module.linear_cross_entropy
    monkeypatch.setattr(
        module, "linear_cross_entropy", lambda *a, **k: seen.append(len(a[0])) or real(*a, **k)
    )
    data = pairs(5)
    batch = pad(data)
    Preference("orpo")(moved(), batch)
    assert seen == [int((batch.labels != -100).sum())]
    monkeypatch.setattr(module, "_CHUNK_ELEMENTS", 1)
    check("dpo", moved(targets=["lm_head"]), pairs(16, longest=14), batch_size=16, beta=0.7)


def test_texts_and_pairs_are_told_apart():
    model, data, texts = tiny(), pairs(2), examples(2)
    with pytest.raises(ValueError, match="a batch must hold texts, found a preference pair; train"):
        token_loss(model, pad(data))
    with pytest.raises(ValueError, match="a batch must hold texts, found an answer with a label;"):
        token_loss(model, pad(pairs(2, kto=True)))
    with pytest.raises(ValueError, match=r"example 0 must be one text, found a preference pair"):
        evaluate(model, data)
    with pytest.raises(ValueError, match=r"loss='dpo' learns from rows with prompt, chosen and"):
        evaluate(model, texts, loss=Preference("dpo"))
    with pytest.raises(ValueError, match="is an answer with a label; use --loss kto"):
        evaluate(model, pairs(2, kto=True), loss=Preference("dpo"))
    with pytest.raises(ValueError, match="is a pair of answers; use --loss dpo"):
        evaluate(model, data, loss=Preference("kto"))
    with pytest.raises(ValueError, match="all preference pairs or all texts, found both"):
        Batches([*data, *texts], batch_size=2)
    with pytest.raises(ValueError, match="must be one of dpo, ipo, orpo, kto, simpo, found 'ppo'"):
        Preference("ppo")


def test_a_batch_of_pairs_goes_apart_and_knows_its_places():
    data = [pair([1, 2], [3], [4, 5]), pair([6], [7, 8], [9])]
    batch = pad(data)
    assert isinstance(batch, PairBatch) and isinstance(batch.rows(0, 1), PairBatch)
    rows = batch.apart()
    assert rows.input_ids.tolist() == [[1, 2, 3, 0], [1, 2, 4, 5], [6, 7, 8, 0], [6, 9, 0, 0]]
    assert rows.labels.tolist()[0] == [-100, -100, 3, -100]
    assert batch.positions().tolist()[0][:5] == [0, 1, 2, 2, 3]
    assert batch.before().tolist()[0][:5] == [0, 0, 1, 1, 3]
    assert batch.apart((2,)).input_ids.tolist() == [[1, 2, 4, 5], [6, 9, 0, 0]]
    sums, tokens = pair_log_probs(tiny(), batch)
    assert tokens.tolist() == [[1, 2], [2, 1]] and sums.shape == (2, 2)
    assert all(layer.active == ("default",) for layer in lora_layers(tiny()).values())
