"""Attention mass against weights computed by hand, in our models and in transformers'."""

import re

import pytest
import torch
from report_models import Letters, causal, sentences
from torch import nn
from transformers import LlamaConfig as TheirConfig
from transformers import LlamaForCausalLM

from minilora.data.batches import Example
from minilora.models import Llama, LlamaConfig, Qwen2, Qwen2Config
from minilora.report.attention import AttentionMass, attention_masses, occurrences, word_ids


def weights_of(q, k, causal=True):
    """Attention weights of one sequence, head by head."""
    T = q.shape[-2]
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    if causal:
        scores = scores.masked_fill(~torch.ones(T, T, dtype=torch.bool).tril(), -torch.inf)
    return scores.softmax(-1)


@torch.no_grad()
def test_attention_masses_are_the_weights_on_the_chosen_tokens():
    model, examples = causal(), sentences(6)
    pattern = [examples[0].input_ids[1]]
    found, even, tokens, queries = attention_masses(model, examples, [pattern], batch_size=4)
    sums, shares, count, chosen = [0.0, 0.0], 0.0, 0, 0
    for example in examples:
        ids = torch.tensor([example.input_ids])
        marks = ids[0] == pattern[0]
        sees = marks.cumsum(0) > 0
        chosen, count = chosen + int(marks.sum()), count + int(sees.sum())
        shares += float((marks.cumsum(0) / torch.arange(1, len(marks) + 1))[sees].sum())
        x = model.embed(ids)
        for i, block in enumerate(model.layers):
            q, k = (p(x).unflatten(-1, (2, -1)).transpose(1, 2)
                    for p in (block.q_proj, block.k_proj))  # fmt: skip
            mass = weights_of(q, k)[..., marks].sum(-1)[0].mean(0)
            sums[i] += float(mass[sees].sum())
            x = block(x)
    assert (tokens, queries) == (chosen, (count, count))
    assert found == pytest.approx([s / count for s in sums], rel=1e-5)
    assert even == pytest.approx([shares / count] * 2, rel=1e-6)


class Fixed(nn.Module):
    """Attends without a preference, under a mask."""

    def __init__(self, mask):
        super().__init__()
        self.weight, self.mask = nn.Parameter(torch.zeros(1)), mask

    def forward(self, ids):
        q = torch.zeros(*ids.shape, 2, 4).transpose(1, 2)
        torch.nn.functional.scaled_dot_product_attention(q, q, q, self.mask)
        return torch.zeros(*ids.shape, 13)


def masked(kind):
    """bool `[2 heads, 9, 9]`: what each sees, both heads the same but for "heads"."""
    i, j = torch.arange(9)[:, None], torch.arange(9)
    causal = (j <= i).expand(2, 9, 9)
    return {
        "window": causal & (i - j < 3),
        "both ways": torch.ones(2, 9, 9).bool(),
        "blocks": causal & (i // 4 == j // 4),
        "heads": torch.stack([causal[0], causal[0] & (i - j < 2)]),
    }[kind]


@pytest.mark.parametrize("form", ["bool", "-inf", "least"])
@pytest.mark.parametrize("kind", ["window", "both ways", "blocks", "heads"])
def test_even_attention_has_the_even_share_under_any_mask(kind, form):
    """An adapter that changes nothing does not read as one that avoids or seeks a word."""
    seen = masked(kind)
    least = -torch.inf if form == "-inf" else torch.finfo(torch.float32).min
    mask = seen if form == "bool" else torch.zeros(2, 9, 9).masked_fill(~seen, least)
    ids = [1, 2, 5, 2, 2, 6, 2, 2, 2]
    found, even, tokens, queries = attention_masses(
        Fixed(mask), [Example(ids, ids)], [[5], [6]], batch_size=1
    )
    marks = torch.tensor(ids) > 4
    shares = [[float(head[t][marks].sum() / head[t].sum()) for head in seen] for t in range(9)]
    sees = [any(share) for share in shares]
    wanted = sum(sum(share) / 2 for share in shares) / sum(sees)
    assert (tokens, queries) == (2, (sum(sees),))
    assert even == pytest.approx([wanted], rel=1e-6)
    assert found == pytest.approx(even, rel=1e-5)


@torch.no_grad()
def test_a_window_counts_what_lies_within_it():
    """Layers with a window and without one, each with its own even share and queries."""
    config = Qwen2Config.from_dict(
        SHAPE | {"model_type": "qwen2", "sliding_window": 3, "use_sliding_window": True,
                 "max_window_layers": 2, "rms_norm_eps": 1e-6, "hidden_act": "silu",
                 "rope_theta": 1e4, "tie_word_embeddings": True}
    )  # fmt: skip
    torch.manual_seed(0)
    model = Qwen2(config).eval()
    for name, parameter in model.named_parameters():
        if "q_proj" in name:
            parameter.zero_()
    ids = [1, 5, 2, 3, 4, 6, 7, 8]
    found, even, _, queries = attention_masses(model, [Example(ids, ids)], [[5]], batch_size=1)
    assert queries == (7, 7, 3)  # the tokens from the chosen one on; within its window
    full, near = sum(1 / n for n in range(2, 9)) / 7, (1 / 2 + 1 / 3 + 1 / 3) / 3
    assert even == pytest.approx([full, full, near], rel=1e-6)
    assert found == pytest.approx(even, rel=1e-5)


SHAPE = {"vocab_size": 13, "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 3,
         "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4,
         "max_position_embeddings": 32}  # fmt: skip


@pytest.mark.peers
def test_attention_masses_match_what_transformers_reports():
    """Grouped heads, padding and masks: eager attention of transformers gives the weights out."""
    torch.manual_seed(0)
    theirs = LlamaForCausalLM(TheirConfig(**SHAPE, attn_implementation="eager")).eval()
    ours = Llama(LlamaConfig(**SHAPE)).eval()
    ours.load_state_dict(theirs.state_dict())
    sdpa = LlamaForCausalLM(TheirConfig(**SHAPE, attn_implementation="sdpa")).eval()
    sdpa.load_state_dict(theirs.state_dict())
    examples = sentences(5)
    sums, count = torch.zeros(3), 0
    for example in examples:
        ids = torch.tensor([example.input_ids])
        marks = ids[0] == 2
        if not marks.any():
            continue
        sees = marks.cumsum(0) > 0
        count += int(sees.sum())
        with torch.no_grad():
            layers = theirs(ids, output_attentions=True).attentions
        sums += torch.stack([w[0].mean(0)[:, marks].sum(-1)[sees].sum() for w in layers])
    wanted = (sums / count).tolist()
    for model in (ours, sdpa):
        for size in (1, 4):
            found = attention_masses(model, examples, [[2]], batch_size=size)[0]
            assert found == pytest.approx(wanted, rel=1e-5)


def test_attention_mass_follows_masks_and_scale():
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 2, 4, 3)
    chosen, counted = torch.tensor([[True, False, True, False]]), torch.ones(1, 4).bool()
    mode = AttentionMass(chosen, counted)
    allowed = torch.ones(4, 4).bool().tril()
    plain = weights_of(q, k)[..., chosen[0]].sum(-1).mean(1).sum().item()
    added = torch.zeros(4, 4).masked_fill(~allowed, -torch.inf)
    for options in ({"is_causal": True}, {"attn_mask": allowed}, {"attn_mask": added},
                    {"is_causal": True, "scale": 3**-0.5}):  # fmt: skip
        assert mode.mass(q, k, k, **options)[0] == pytest.approx(plain, rel=1e-5)
    free = weights_of(q, k, causal=False)[..., chosen[0]].sum(-1).mean(1).sum().item()
    assert mode.mass(q, k, k)[0] == pytest.approx(free, rel=1e-5)
    twice = weights_of(2 * q, k)[..., chosen[0]].sum(-1).mean(1).sum().item()
    assert mode.mass(q, k, k, is_causal=True, scale=2 * 3**-0.5)[0] == pytest.approx(
        twice, rel=1e-5
    )
    with mode:
        torch.nn.functional.scaled_dot_product_attention(q, k, k, is_causal=True)
    assert mode.sums[0][0] == pytest.approx(plain, rel=1e-5)
    with pytest.raises(ValueError, match=r"needs self-attention \[batch, heads, tokens, size\]"):
        mode.mass(q[:, :, :1], k, k)


def test_words_are_found_at_starts_and_after_spaces():
    assert word_ids(["ab", "c"], Letters()) == [[1, 2], [0, 1, 2], [3], [0, 3]]
    assert occurrences([0, 1, 2, 3, 1, 1, 2], [[0, 1, 2], [1, 2]]) == [True] * 3 + [False] * 2 + [
        True,
        True,
    ]

    class Theirs:
        def encode(self, text, add_special_tokens=True):
            return [len(text), add_special_tokens]

    assert word_ids(["ab"], Theirs()) == [[2, False], [3, False]]


class Rows(nn.Module):
    def forward(self, ids):
        return torch.zeros(*ids.shape, 13)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: word_ids(["a"], None), "words need a tokenizer"),
        (lambda: word_ids([" "], Letters()), "words must be strings with something in them"),
        (lambda: word_ids([3], Letters()), "words must be strings with something in them"),
        (
            lambda: attention_masses(causal(), sentences(), [[1] * 9], batch_size=2),
            "words must occur in the data, found none of them",
        ),
        (
            lambda: attention_masses(Rows(), [Example((1, 2), (1, 2))], [[1]], batch_size=2),
            "attention mass needs a model that attends through",
        ),
    ],
)
def test_attention_says_what_is_wrong(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()
