"""Models of transformers: the loss without logits, packed rows, text through their own cache."""

import pytest
import torch
import torch.nn.functional as F
import transformers
from foreign_models import KINDS, foreign
from small_models import shake
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.modeling_flash_attention_utils import _is_packed_sequence

import minilora
from minilora.data import IGNORE, Example, pack, pad
from minilora.running import foreign as room
from minilora.running import takes_packed, token_loss

pytestmark = [
    pytest.mark.peers,
    pytest.mark.filterwarnings("ignore:minilora. no adapter reaches"),
    pytest.mark.filterwarnings("ignore:minilora. r=.* is above min"),
]
LENGTHS = 5, 9, 3, 12, 2
APART = {"cohere", "starcoder2", "llama", "mixtral"}  # keep documents of packed rows apart


def _rows(lengths=LENGTHS):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 256, (n,), generator=generator).tolist() for n in lengths]


def _examples():
    examples = [Example(ids, list(ids)) for ids in _rows()]
    examples[1].labels[3:5] = [IGNORE] * 2
    return examples


def _oracle(model, examples):
    """The summed loss of each example alone, of the model's own logits, in float64."""
    total = 0.0
    for example in examples:
        logits = model(torch.tensor([example.input_ids])).logits[0, :-1].double()
        labels = torch.tensor(example.labels[1:])
        total = total + F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")
    return total


def _injected(kind):
    return shake(minilora.inject(foreign(kind), r=3, alpha=5), scale=0.1)


def _gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def _check(model, batch):
    """Loss and every gradient are those of each document alone."""
    total, tokens = token_loss(model, batch)
    wanted = _oracle(model, _examples())
    assert tokens == batch.tokens
    torch.testing.assert_close(total.double(), wanted, rtol=2e-6, atol=0)
    ours, theirs = _gradients(model, total), _gradients(model, wanted.float())
    assert ours.keys() == theirs.keys() and ours
    for name, gradient in theirs.items():
        assert (ours[name] - gradient).abs().max() <= 2e-5 * gradient.abs().max(), name


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_every_gradient_are_those_of_the_models_own_logits(kind):
    _check(_injected(kind), pad(_examples()))


@pytest.mark.parametrize("kind", KINDS)
def test_no_logits_are_held_where_they_are_the_heads_alone(kind, monkeypatch):
    """Cohere scales its logits, OPT runs past its body's forward; a hook may change any."""
    model, batch, runs = foreign(kind), pad(_examples()), []
    token_loss(model, batch)  # tries the head
    model.register_forward_pre_hook(lambda *_: runs.append(1))
    token_loss(model, batch)
    assert len(runs) == (kind in ("cohere", "opt"))
    head = model.get_output_embeddings()
    head.register_forward_hook(lambda _, __, logits: logits * 2)
    assert token_loss(model, batch)[0] != token_loss(foreign(kind), batch)[0] and runs


def test_a_head_with_an_adapter_or_a_bias_is_run():
    model = shake(minilora.inject(foreign("llama"), r=3, targets=["lm_head", "q_proj"]), scale=0.1)
    _check(model, pad(_examples()))
    model = _injected("llama")
    model.lm_head.bias = nn.Parameter(torch.randn(260), requires_grad=False)
    _check(model, pad(_examples()))


# --- packed rows


@pytest.mark.parametrize("kind", KINDS)
def test_packed_documents_are_kept_apart_or_packing_is_refused(kind):
    """One document's tokens change; another one's loss and gradient must not."""
    model, rows = _injected(kind), pack(_examples(), 20)
    assert any(row.lengths for row in rows)
    assert takes_packed(model) == (kind in APART)
    if kind in APART:
        _check(model, pad(rows))
        return
    with pytest.raises(ValueError, match=f"documents apart, found {type(model).__name__};"):
        token_loss(model, pad(rows))
    config = minilora.TrainConfig(max_steps=1, dtype="float32")
    with pytest.raises(ValueError, match=r"apart, but .* does not, and example \d of train is"):
        minilora.fit(model, rows, config=config, quiet=True)


def _one_row_apart(module, q, k, v, attention_mask, position_ids=None, scaling=None, **_):
    """Attend as flash attention does in transformers 5, which asks this of the positions."""
    mask = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril()
    if _is_packed_sequence(position_ids, len(q)):
        document = (position_ids[0] == 0).cumsum(0)
        mask = mask & (document[:, None] == document)
    out = F.scaled_dot_product_attention(q, k, v, mask, scale=scaling, enable_gqa=True)
    return out.transpose(1, 2), None


def test_attention_that_keeps_documents_apart_in_batches_of_one_row_alone_is_found_out():
    """Also where it comes after the model has been tried with another one."""
    AttentionInterface.register("one_row_apart", _one_row_apart)
    AttentionMaskInterface.register("one_row_apart", lambda *_, **__: None)
    fresh, tried = foreign("llama"), foreign("llama")
    assert takes_packed(tried)
    for model in (fresh, tried):
        model.set_attn_implementation("one_row_apart")
        first = torch.tensor([_rows((11,))[0]])
        changed = torch.cat(((first[:, :5] + 1) % 256, first[:, 5:]), 1)
        positions = torch.tensor([[*range(5), *range(6)]])
        one, two = (model(ids, position_ids=positions).logits[:, 5:] for ids in (first, changed))
        assert torch.equal(one, two)  # one row is fine
        assert not takes_packed(model)
        model.set_attn_implementation("sdpa")
        assert takes_packed(model)


@pytest.mark.parametrize("kind", sorted(APART))
def test_a_changed_document_leaves_the_others_logits_to_the_bit(kind):
    """Experts take tokens of all documents in one product, whose rounding follows their number."""
    model = foreign(kind)
    documents = _rows((7, 6))
    batch = pad([pack([{"input_ids": ids} for ids in documents], 16)[0]])
    changed = batch.input_ids.clone()
    changed[0, :7] = (changed[0, :7] + 31) % 256
    one, two = (room.own_logits(model, type(batch)(ids, batch.labels, None, batch.documents))
                for ids in (batch.input_ids, changed))  # fmt: skip
    alone = model(torch.tensor([documents[1]])).logits[0]
    assert not torch.equal(one[0, :7], two[0, :7])
    leak = (one[0, 7:] - two[0, 7:]).abs().max()
    assert leak == 0 or (kind == "mixtral" and leak <= 1e-5 * one.abs().max())
    assert (one[0, 7:] - alone).abs().max() <= 1e-5 * alone.abs().max()


def test_a_model_that_takes_positions_and_mixes_documents_is_found_out():
    """As a window of three tokens over the embeddings, which no mask reaches, would."""
    model = foreign("llama")
    assert takes_packed(model)
    mixing = foreign("llama")
    mixing.model.embed_tokens.register_forward_hook(
        lambda _, __, x: x + 0.1 * F.pad(x, (0, 0, 1, 0))[:, :-1]
    )
    assert not takes_packed(mixing)


# --- text


@pytest.mark.parametrize("kind", KINDS)
def test_text_is_the_same_alone_in_a_batch_and_from_transformers(kind):
    model, prompts = _injected(kind).eval(), _rows((5, 9, 1, 12, 5))
    batched = minilora.generate(model, prompts, max_new_tokens=8)
    assert batched == [minilora.generate(model, [p], max_new_tokens=8)[0] for p in prompts]
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    for prompt, text in zip(prompts, batched, strict=True):
        assert text == model.generate(torch.tensor([prompt]), **options)[0, len(prompt) :].tolist()


@pytest.mark.parametrize("kind", ["falcon", "mamba"])
def test_each_token_is_computed_once(kind):
    model, fed = foreign(kind), []
    minilora.generate(model, [[5]], max_new_tokens=1)  # and how it counts is found out
    body = model.base_model
    hook = body.register_forward_pre_hook(
        lambda _, args, named: fed.append((args + tuple(named.values()))[0].shape),
        with_kwargs=True,
    )
    minilora.generate(model, [[5, 6, 7], [8, 9, 10]], max_new_tokens=4)
    hook.remove()
    assert [shape[1] for shape in fed] == [3, 1, 1, 1]


def test_a_model_that_returns_no_cache_is_run_again(monkeypatch):
    model, prompts = foreign("falcon"), _rows()
    wanted = minilora.generate(model, prompts, max_new_tokens=5)
    forward = type(model).forward

    def without(self, *args, use_cache=None, past_key_values=None, attention_mask=None,
                position_ids=None, **named):  # fmt: skip
        assert past_key_values is None
        beside = {"attention_mask": attention_mask, "position_ids": position_ids}
        return forward(self, *args, use_cache=False, **beside, **named)

    monkeypatch.setattr(type(model), "forward", without)
    assert minilora.generate(model, prompts, max_new_tokens=5) == wanted


def test_stop_ids_and_sampling_are_ours():
    model = foreign("falcon")
    text = minilora.generate(model, [[5, 6, 7]], max_new_tokens=6)[0]
    assert minilora.generate(model, [[5, 6, 7]], max_new_tokens=6, stop=text[2]) == [
        text[: text.index(text[2])]
    ]
    options = {"max_new_tokens": 6, "temperature": 2.0, "top_k": 40, "seed": 3}
    sampled = minilora.generate(model, [[5, 6, 7]], **options)
    assert sampled == minilora.generate(model, [[5, 6, 7]], **options) != [text]


_LONG = {
    "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4,
    "long_factor": [8.0, 8.0, 4.0, 2.0], "original_max_position_embeddings": 16,
}  # fmt: skip
_SMALL = {
    "vocab_size": 211, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": None, "max_position_embeddings": 128,
}  # fmt: skip
SWITCHING = {
    # Its first layer has no keys to count.
    "Bamba": {"attn_layer_indices": [1], "mamba_n_heads": 4, "mamba_d_head": 16,
              "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8},
    # Above 16 tokens they take other rotary frequencies.
    "Phi3": {"rope_parameters": _LONG, "original_max_position_embeddings": 16},
    "Phimoe": {"rope_parameters": _LONG | {"factor": 8.0, "short_mscale": 1.0, "long_mscale": 1.2},
               "original_max_position_embeddings": 16, "num_local_experts": 2,
               "num_experts_per_tok": 1},
}  # fmt: skip


@pytest.mark.parametrize("kind", SWITCHING)
def test_text_is_transformers_where_positions_or_frequencies_are_not_the_caches(kind):
    config = getattr(transformers, f"{kind}Config")(**_SMALL | SWITCHING[kind])
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.25)
    fed: list[int] = []
    minilora.generate(model, [[5]], max_new_tokens=1)  # and how it counts is found out
    model.base_model.register_forward_pre_hook(lambda *_: fed.append(1))
    minilora.generate(model, [[5, 6, 7], [8, 9]], max_new_tokens=4)
    assert len(fed) == (8 if kind == "Bamba" else 4), "apart only where it has to be"
    prompts = [[7 * i % 200 + 3 for i in range(n)] for n in (10, 3, 22, 10)]
    batched = minilora.generate(model, prompts, max_new_tokens=12)
    for prompt, text in zip(prompts, batched, strict=True):
        wanted = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)
        assert text == wanted[0, len(prompt) :].tolist()


def test_text_is_what_the_models_own_forward_says_where_it_counts_positions_itself():
    """RoBERTa counts from its padding's id on, which training does too."""
    config = transformers.RobertaConfig(**_SMALL | {"is_decoder": True, "pad_token_id": 1})
    torch.manual_seed(0)
    model = transformers.RobertaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
    row = [5, 9, 33, 12]
    for token in minilora.generate(model, [row, [7, 8]], max_new_tokens=6)[0]:
        assert token == int(model(torch.tensor([row])).logits[0, -1].argmax())
        row = [*row, token]
