"""Text out: a batch writes what each row alone would, stops where told, samples as stated."""

import functools
import math
import random
import types

import numpy as np
import pytest
import torch
from byte_tokenizer import ALPHABET
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from running_models import (
    CONTEXT,
    VOCAB,
    Bare,
    Masked,
    Plain,
    bare_llama,
    gpt2,
    llama,
    model_logits,
    plain,
    plain_logits,
)
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend
from torch import nn
from transformers import LlamaConfig as TheirConfig
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

import minilora
from minilora.lora import lora_layers, mixed
from minilora.running import compiling
from minilora.running.compiling import compile_problem
from minilora.running.generation import generate, pick_token, token_probabilities
from minilora.text.tokenizer import Tokenizer

LETTERS = "abcdefghijklmnopqrst"
NAMES = ["<|endoftext|>", "<|begin|>", "<|im_start|>", "<|im_end|>"]
END, BEGIN = 20, 21
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] + m['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
)


def letter_tokenizer(begin=False):
    """A token per letter and four control tokens, of which two end a text."""
    backend = Backend(models.BPE({name: i for i, name in enumerate([*LETTERS, *NAMES])}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(name, normalized=False) for name in NAMES])
    if begin:
        backend.post_processor = processors.TemplateProcessing(
            single="<|begin|> $A", special_tokens=[("<|begin|>", BEGIN)]
        )
    return Tokenizer(backend, bos="<|begin|>", eos="<|endoftext|>", chat_template=CHAT)


MODELS = {
    "plain": plain,
    "llama": llama,
    "gpt2": gpt2,
    "bare llama": bare_llama,
}
KINDS = pytest.mark.parametrize("kind", sorted(MODELS))
PROMPTS = [[3, 1, 4, 1, 5, 9, 2], [6], [5, 3, 5], [8, 9, 7, 9]]

prompt_lists = st.lists(
    st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=9), min_size=1, max_size=5
)


def greedy(model, ids, count):
    """The oracle: one row, one argmax after another."""
    forward = plain_logits if isinstance(model, Plain) else model_logits
    ids = list(ids)
    for _ in range(count):
        ids.append(int(forward(model, ids)[-1].astype(np.float32).argmax()))  # picked from f32
    return ids[-count:]


def text(ids):
    return "".join(LETTERS[i] for i in ids if i < len(LETTERS))


def flags_of(model):
    return {name: module.training for name, module in model.named_modules()}


def watch(model):
    """The shapes of what is fed, call by call."""
    shapes = []
    model.register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape)))
    return shapes


# --- greedy -------------------------------------------------------------------------------------


@settings(max_examples=25)
@given(prompt_lists, st.integers(1, 8), st.sampled_from(sorted(MODELS)))
def test_generate_greedy_batch_equals_one_prompt_at_a_time(prompts, count, kind):
    model = MODELS[kind]()
    found = generate(model, prompts, max_new_tokens=count)
    assert found == [greedy(model, prompt, count) for prompt in prompts]
    assert found == [generate(model, [prompt], max_new_tokens=count)[0] for prompt in prompts]


@KINDS
def test_generate_greedy_batch_equals_one_at_a_time_in_f32(kind):
    model = MODELS[kind](torch.float32)
    found = generate(model, PROMPTS, max_new_tokens=12)
    assert found == [generate(model, [prompt], max_new_tokens=12)[0] for prompt in PROMPTS]
    assert len({token for row in found for token in row}) > 5  # no constant: it can go wrong


def test_generate_feeds_llama_each_token_once():
    """The cached path: the padded prompts, then one token a row."""
    model = llama()
    shapes = watch(model)
    generate(model, PROMPTS, max_new_tokens=4)
    assert shapes == [(4, 7), (4, 1), (4, 1), (4, 1)]


def test_generate_feeds_a_plain_module_everything_again():
    model = plain()
    shapes = watch(model)
    generate(model, PROMPTS, max_new_tokens=4)
    assert shapes == [(4, 7), (4, 8), (4, 9), (4, 10)]


def test_generate_goes_on_while_other_rows_have_stopped():
    """A row that has stopped stays in the batch and must not disturb the others."""
    for kind, make in MODELS.items():
        model = make()
        free = [greedy(model, prompt, 10) for prompt in PROMPTS]
        stop = free[0][1]
        wanted = [row[: row.index(stop)] if stop in row else row for row in free]
        assert len({len(row) for row in wanted}) > 1, kind
        assert generate(model, PROMPTS, max_new_tokens=10, stop=stop) == wanted


def test_generate_reads_equal_prompts_once():
    model = llama()
    shapes = watch(model)
    prompts = [PROMPTS[2], PROMPTS[0], PROMPTS[2], PROMPTS[2], PROMPTS[0]]
    found = generate(model, prompts, max_new_tokens=4)
    assert shapes == [(2, 7), (5, 1), (5, 1), (5, 1)]
    assert found == [greedy(model, prompt, 4) for prompt in prompts]
    drawn = generate(model, prompts, max_new_tokens=9, temperature=2.0, seed=1)
    assert drawn == generate(bare_llama(), prompts, max_new_tokens=9, temperature=2.0, seed=1)
    assert len(set(map(tuple, drawn))) == 5


def test_generate_lets_go_of_rows_that_have_stopped():
    model = llama()
    prompts = [[i, 7 - i % 3] for i in range(8)]
    free = [greedy(model, prompt, 12) for prompt in prompts]
    ends = {t: [row.index(t) if t in row else 12 for row in free] for t in range(VOCAB)}
    stop = max(ends, key=lambda t: len(set(ends[t])))  # the token that ends rows most unlike
    wanted = [row[:end] for row, end in zip(free, ends[stop], strict=True)]
    assert len(set(map(len, wanted))) > 2
    shapes = watch(model)
    assert generate(model, prompts, max_new_tokens=12, stop=stop) == wanted
    batches = [shape[0] for shape in shapes]
    assert batches[0] == 8 and batches == sorted(batches, reverse=True)
    running = [sum(len(row) >= n for row in wanted) for n in range(len(batches))]
    assert all(held <= max(2, n / 0.75) for held, n in zip(batches, running, strict=True))


def test_generate_keeps_rows_that_have_adapters_of_their_own():
    model = llama()
    for seed, name in enumerate(("one", "two")):
        minilora.inject(model, r=2, alpha=3, adapter=name)
        torch.manual_seed(seed)
        for layer in lora_layers(model).values():
            nn.init.normal_(layer.adapters[name].lora_B, std=0.5)
    names, prompts = ["one", "two", "base", "one"], [PROMPTS[0]] * 4
    alone = {}
    for name in ("one", "two", "base"):
        minilora.activate(model, [] if name == "base" else name)
        alone[name] = generate(model, [PROMPTS[0]], max_new_tokens=9)[0]
    assert len(set(map(tuple, alone.values()))) == 3
    stop = alone["one"][1]
    wanted = [alone[n][: alone[n].index(stop)] if stop in alone[n] else alone[n] for n in names]
    with mixed(model, names):
        assert generate(model, prompts, max_new_tokens=9, stop=stop) == wanted


@pytest.mark.peers
def test_generate_of_a_transformers_model_equals_its_own_text():
    """Its forward returns an object with logits and takes an attention mask."""
    torch.manual_seed(0)
    config = TheirConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config).double().eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.5)
    found = generate(model, PROMPTS, max_new_tokens=6)
    for prompt, row in zip(PROMPTS, found, strict=True):
        whole = model.generate(
            torch.tensor([prompt]), max_new_tokens=6, do_sample=False, pad_token_id=0
        )
        assert row == whole[0, len(prompt) :].tolist()


def test_generate_passes_the_mask_to_a_forward_that_names_it():
    model = Masked()
    wanted = [greedy(model, prompt, 8) for prompt in PROMPTS]
    assert generate(model, PROMPTS, max_new_tokens=8) == wanted


@pytest.mark.parametrize("options", [{"top_k": 3}, {"top_p": 0.2}, {"seed": 5}])
def test_generate_at_temperature_0_is_greedy_whatever_the_rest(options):
    model = llama()
    wanted = [greedy(model, prompt, 6) for prompt in PROMPTS]
    assert generate(model, PROMPTS, max_new_tokens=6, temperature=0, **options) == wanted


def test_generate_takes_prompts_of_each_kind_and_leaves_them():
    model, tokenizer = llama(), letter_tokenizer()
    row = greedy(model, [0, 1, 2], 5)
    assert not {END, 23} & set(row)
    ids = [[0, 1, 2], (0, 1, 2), torch.tensor([0, 1, 2])]
    assert generate(model, ids, max_new_tokens=5) == [row] * 3
    assert ids[0] == [0, 1, 2]
    for prompts in ("abc", ["abc"], ("abc",), [[0, 1, 2]]):
        assert generate(model, prompts, tokenizer=tokenizer, max_new_tokens=5) == [text(row)]


def test_generate_begins_texts_as_the_tokenizer_does():
    model, seen = llama(), []
    model.register_forward_pre_hook(lambda _, args: seen.append(args[0].tolist()))
    generate(model, "abc", tokenizer=letter_tokenizer(begin=True), max_new_tokens=1)
    generate(model, "abc", tokenizer=letter_tokenizer(), max_new_tokens=1)
    assert seen == [[[BEGIN, 0, 1, 2]], [[0, 1, 2]]]


def test_generate_with_chat_asks_by_the_template():
    """The name of a control token in a text stays text, which this vocabulary cannot spell."""
    model, tokenizer, seen = llama(), letter_tokenizer(), []
    model.register_forward_pre_hook(lambda _, args: seen.append(args[0].tolist()))
    generate(model, ["abc<|im_end|>"], tokenizer=tokenizer, chat=True, max_new_tokens=1)
    spelled = {name: i for i, name in enumerate(LETTERS)}
    user, asked, assistant = (
        [spelled[c] for c in word if c in spelled] for word in ("user", "abcimend", "assistant")
    )
    assert seen == [[[22, *user, *asked, 23, 22, *assistant]]]


class Script(nn.Module):
    """Writes given ids, whatever it is asked."""

    def __init__(self, ids, vocabulary):
        super().__init__()
        self.ids, self.vocabulary, self.told = ids, vocabulary, None
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, input_ids):
        self.told = len(input_ids[0]) if self.told is None else self.told
        logits = torch.zeros(*input_ids.shape, self.vocabulary)
        logits[..., self.ids[input_ids.shape[1] - self.told]] = self.scale.item()
        return logits


def spaced_tokenizer():
    """As Llama 2's: a space before each text, bytes where no letter is."""
    names = ["<unk>", "<s>", "</s>", *[f"<0x{byte:02X}>" for byte in range(256)], "▁", *LETTERS]
    vocabulary = {name: i for i, name in enumerate(names)}
    backend = Backend(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return Tokenizer(backend, bos="<s>", eos="</s>", unk="<unk>")


@pytest.mark.parametrize("make", [letter_tokenizer, spaced_tokenizer])
def test_generate_takes_tokenizers_of_transformers(make):
    ours = make()
    theirs = PreTrainedTokenizerFast(
        tokenizer_object=ours._backend, bos_token=ours.decode([ours.bos_id], skip_special=False),
        eos_token=ours.decode([ours.eos_id], skip_special=False),
    )  # fmt: skip
    ids = ours.encode("bcd", special=False)
    model = Script(ids, ours.vocab_size)
    wanted = generate(model, ["ab"], tokenizer=ours, max_new_tokens=len(ids))
    model.told = None
    assert generate(model, ["ab"], tokenizer=theirs, max_new_tokens=len(ids)) == wanted
    with pytest.raises(TypeError, match="found SimpleNamespace; convert it by minilora.text"):
        generate(model, ["ab"], tokenizer=types.SimpleNamespace(), max_new_tokens=2)


@pytest.mark.parametrize("where", ["config", "generation_config", "folder"])
def test_what_ends_a_text_of_the_model_does_with_transformers_tokenizer(tmp_path, where):
    ours = letter_tokenizer()
    b, c, d = ours.encode("bcd", special=False)
    model = Script([b, c, d], ours.vocab_size)
    theirs = PreTrainedTokenizerFast(tokenizer_object=ours._backend)
    if where == "folder":
        theirs.save_pretrained(tmp_path)
        (tmp_path / "generation_config.json").write_text(f'{{"eos_token_id": [900, {d}]}}')
        theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    else:
        setattr(model, where, types.SimpleNamespace(eos_token_id=[900, d]))
    assert generate(model, "a", tokenizer=theirs, max_new_tokens=3) == [ours.decode([b, c])]


def test_generate_keeps_the_space_a_text_begins_with_and_finds_it_in_stop_strings():
    ours = spaced_tokenizer()
    ids = ours.encode("ab cd ef", special=False)[3:]  # behind "ab"
    for stop, wanted in (((), " cd ef"), (" cd", ""), (" ef", " cd"), ("d e", " c")):
        model = Script(ids, ours.vocab_size)
        assert generate(model, "ab", tokenizer=ours, max_new_tokens=6, stop=stop) == [wanted]
    model = Script(ours.encode("cd", special=False), ours.vocab_size)
    assert generate(model, [[ours.bos_id]], tokenizer=ours, max_new_tokens=3) == ["cd"]


def byte_level_tokenizer():
    """As GPT-2's: a token a byte."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return Tokenizer(backend)


@pytest.mark.parametrize("make", [byte_level_tokenizer, spaced_tokenizer])
def test_generate_writes_no_part_of_a_character(make):
    """Cut after each token; a stop string of whole characters is found all the same."""
    ours = make()
    text = "aé🙂€b"
    ids = ours.encode("b" + text, special=False)[-len(text.encode()) :]
    found = [
        generate(Script(ids, ours.vocab_size), "b", tokenizer=ours, max_new_tokens=n)[0]
        for n in range(1, len(ids) + 1)
    ]
    assert all(text.startswith(each) for each in found) and found[-1] == text
    assert sorted(set(found), key=len) == [text[:n] for n in range(1, 6)]
    stopped = generate(Script(ids, ours.vocab_size), "b", tokenizer=ours, stop="€")
    assert stopped == ["aé🙂"]


BYTES = st.sampled_from([*b"ab", *"é🙂€\ufffd".encode(), 0xFF, 0xC3, 0xF0, 0x80])


@pytest.mark.parametrize("make", [byte_level_tokenizer, spaced_tokenizer])
@settings(max_examples=80)
@given(written=st.lists(BYTES, min_size=1, max_size=12), stop=st.sampled_from(["", "b", "\ufffda"]))
def test_what_is_streamed_is_the_text_also_of_bytes_that_are_none(make, written, stop):
    """The oracle is Python's own decoder; what it would write of a cut character may lack."""
    ours = make()
    names = [ALPHABET[byte] if ours.joins else f"<0x{byte:02X}>" for byte in written]
    ids = [ours._backend.token_to_id(name) for name in names]
    pieces = []
    (found,) = generate(
        Script(ids, ours.vocab_size),
        "b",
        tokenizer=ours,
        max_new_tokens=len(ids),
        stop=stop or (),
        stream=lambda row, piece: pieces.append(piece),
    )
    assert "".join(pieces) == found
    whole = bytes(written).decode("utf-8", "replace")
    whole = whole.partition(stop)[0] if stop else whole
    assert whole.startswith(found) and whole[len(found) :].strip("\ufffd") == ""


def test_generate_warns_of_a_prompt_that_was_put_through_the_template():
    ours = letter_tokenizer()
    model = Script(ours.encode("bcd"), ours.vocab_size)
    with pytest.warns(
        UserWarning, match="prompt 0 begins with the name of the control token '<|im"
    ):
        generate(model, "<|im_start|>abc", tokenizer=ours, max_new_tokens=2)


# --- where it stops -----------------------------------------------------------------------------


@settings(max_examples=25)
@given(
    prompt_lists,
    st.integers(1, 8),
    st.sets(st.integers(0, VOCAB - 1), max_size=4),
    st.sampled_from(sorted(MODELS)),
)
def test_generate_stops_before_the_first_stop_id(prompts, count, stops, kind):
    model = MODELS[kind]()
    wanted = []
    for prompt in prompts:
        row = greedy(model, prompt, count)
        first = next((i for i, token in enumerate(row) if token in stops), count)
        wanted.append(row[:first])
    assert generate(model, prompts, max_new_tokens=count, stop=stops) == wanted


def cut(row, strings):
    """The oracle: write token by token until the text holds a string, and end where it begins."""
    shown = ""
    for token in row:
        shown = text([*map(LETTERS.index, shown), token])
        places = [shown.find(string) for string in strings if string in shown]
        if places:
            return shown[: min(places)]
    return shown


@settings(max_examples=40)
@given(prompt_lists, st.lists(st.tuples(st.integers(0, 11), st.integers(1, 4)), max_size=3))
def test_generate_ends_a_text_where_the_first_stop_string_begins(prompts, places):
    """Stop strings out of the free text, so that they occur, across tokens too."""
    model, tokenizer = plain(), letter_tokenizer()
    free = [greedy(model, prompt, 12) for prompt in prompts]
    free = [row[: next((i for i, t in enumerate(row) if t in (END, 23)), 12)] for row in free]
    first = text(free[0])
    strings = [first[at : at + length] for at, length in places if at < len(first)]
    found = generate(model, prompts, tokenizer=tokenizer, max_new_tokens=12, stop=strings)
    assert found == [cut(row, strings) for row in free]


def test_generate_ends_at_a_stop_string_across_tokens():
    model, tokenizer = llama(), letter_tokenizer()
    row = greedy(model, [0, 1, 2], 8)
    shown = text(row)
    assert len(shown) == len(row) == 8
    stop = shown[3:5]
    assert stop not in shown[:4]
    shapes = watch(model)
    for stops in (stop, [stop], ("zzz", stop)):
        found = generate(model, "abc", tokenizer=tokenizer, max_new_tokens=8, stop=stops)
        assert found == [shown[:3]]
    assert len(shapes) == 3 * 5  # nothing is computed after it
    shapes.clear()
    stop = shown[0]
    assert generate(model, "abc", tokenizer=tokenizer, max_new_tokens=8, stop=stop) == [""]
    assert len(shapes) == 1


def test_generate_stops_at_the_tokenizers_stop_ids():
    tokenizer = letter_tokenizer()
    assert tokenizer.stop_ids == {END, 23}
    model = plain()
    for end in (END, 23):
        model.head.bias.data.zero_()
        model.head.bias.data[end] = 1e3
        shapes = watch(model)
        prompts = [[1], [2, 3]]
        assert generate(model, prompts, tokenizer=tokenizer, max_new_tokens=3) == ["", ""]
        assert generate(model, prompts, max_new_tokens=3) == [[end] * 3] * 2
        assert len(shapes) == 1 + 3


@settings(max_examples=15)
@given(prompt_lists, st.integers(1, 9))
def test_generate_writes_at_most_max_new_tokens(prompts, count):
    model = plain()
    shapes = watch(model)
    assert [len(row) for row in generate(model, prompts, max_new_tokens=count)] == [count] * len(
        prompts
    )
    assert len(shapes) == count


def test_generate_writes_64_tokens_by_default():
    assert [len(row) for row in generate(plain(), PROMPTS[:2])] == [64, 64]


@KINDS
def test_generate_fills_the_context_to_the_last_token(kind):
    model = MODELS[kind]()
    prompts = [[1] * (CONTEXT - 4), [2, 3]]
    found = generate(model, prompts, max_new_tokens=4)
    assert found == [greedy(model, prompt, 4) for prompt in prompts]


# --- sampling -----------------------------------------------------------------------------------

SAMPLED = {"max_new_tokens": 10, "temperature": 1.5, "top_k": 15, "top_p": 0.95}


@KINDS
def test_generate_sampled_is_reproduced_by_its_seed(kind):
    model = MODELS[kind]()
    first = generate(model, PROMPTS, seed=3, **SAMPLED)
    torch.manual_seed(99), random.seed(99)
    assert generate(model, PROMPTS, seed=3, **SAMPLED) == first
    for seed in (4, -3, 0):
        assert generate(model, PROMPTS, seed=seed, **SAMPLED) != first


def test_generate_sampled_is_the_same_with_and_without_a_cache():
    assert generate(llama(), PROMPTS, seed=1, **SAMPLED) == generate(
        Bare(llama()), PROMPTS, seed=1, **SAMPLED
    )


@settings(max_examples=20)
@given(prompt_lists, prompt_lists, st.integers(0, 2**64), st.sampled_from(sorted(MODELS)))
def test_generate_sampled_row_depends_on_no_row_beside_it(one, other, seed, kind):
    """Row i of any batch: its place and the seed decide, not how long the others are or last."""
    model = MODELS[kind]()
    shared = [4, 2]
    place = min(len(one), len(other))
    rows = [
        generate(model, [*batch[:place], shared, *batch[place:]], seed=seed, stop=7, **SAMPLED)
        for batch in (one, other)
    ]
    assert rows[0][place] == rows[1][place]


def test_generate_sampled_from_all_is_as_without_limits():
    model = llama()
    free, limited = (
        generate(model, PROMPTS, max_new_tokens=8, temperature=1.5, seed=2, **options)
        for options in ({}, {"top_k": VOCAB, "top_p": 1.0})
    )
    assert free == limited


def test_generate_sampled_rows_differ_among_themselves():
    rows = generate(llama(), [[1, 2]] * 6, seed=0, **SAMPLED)
    assert len({tuple(row) for row in rows}) == 6


def test_generate_without_a_seed_draws_afresh():
    model = llama()
    torch.manual_seed(0), random.seed(0)
    first = generate(model, PROMPTS, **SAMPLED)
    torch.manual_seed(0), random.seed(0)
    assert generate(model, PROMPTS, **SAMPLED) != first


@pytest.mark.parametrize("options", [{"max_new_tokens": 5}, SAMPLED, {**SAMPLED, "seed": 3}])
def test_generate_leaves_global_random_state_alone(options):
    model = llama()
    before = torch.get_rng_state(), random.getstate(), str(np.random.get_state())
    generate(model, PROMPTS, **options)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert str(np.random.get_state()) == before[2]


@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-6}])
def test_generate_sampled_among_one_is_greedy(options):
    model = llama()
    wanted = [greedy(model, prompt, 6) for prompt in PROMPTS]
    options = {"temperature": 2.0, **options}
    assert generate(model, PROMPTS, max_new_tokens=6, **options) == wanted


def probabilities(logits, temperature, top_k=None, top_p=None):
    """The oracle: rank, keep, divide by the sum; then keep until top_p is reached, and again."""
    logits = np.asarray(logits, np.float64)
    ranked = sorted(range(len(logits)), key=lambda i: -logits[i])[:top_k]
    weights = {i: math.exp((logits[i] - logits.max()) / temperature) for i in ranked}
    total = sum(weights.values())
    weights = {i: weight / total for i, weight in weights.items()}
    if top_p is not None:
        reached, kept = 0.0, {}
        for i, weight in weights.items():  # in rank order
            if reached >= top_p:
                break
            kept[i] = weight
            reached += weight
        weights = {i: weight / reached for i, weight in kept.items()}
    return np.array([weights.get(i, 0.0) for i in range(len(logits))])


@given(
    st.lists(st.integers(-80, 80), min_size=1, max_size=20, unique=True),
    st.floats(0.05, 20),
    st.none() | st.integers(1, 25),
    st.none() | st.floats(0.01, 1),
)
def test_token_probabilities_equal_the_oracle(eighths, temperature, top_k, top_p):
    logits = torch.tensor(eighths) / 8
    if top_p is not None:  # no threshold within rounding of a sum
        sums = np.cumsum(sorted(probabilities(logits, temperature, top_k))[::-1])
        assume(np.abs(sums - top_p).min() > 1e-9 or top_p == 1)
    before = logits.clone()
    found = token_probabilities(logits, temperature, top_k=top_k, top_p=top_p)
    wanted = probabilities(logits, temperature, top_k, None if top_p == 1 else top_p)
    assert found.dtype == torch.float64
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-12, atol=1e-300)
    assert torch.equal(logits, before)


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({}, [0.25] * 4),
        ({"top_k": 2}, [0, 0, 0.5, 0.5]),
        ({"top_k": 4}, [0.25] * 4),
        ({"top_k": 9}, [0.25] * 4),
        ({"top_p": 0.5}, [0, 0, 0.5, 0.5]),
        ({"top_p": 0.75}, [0, 1 / 3, 1 / 3, 1 / 3]),
        ({"top_p": 0.51}, [0, 1 / 3, 1 / 3, 1 / 3]),
        ({"top_p": 0.25}, [0, 0, 0, 1]),
        ({"top_p": 1e-9}, [0, 0, 0, 1]),
        ({"top_p": 1.0}, [0.25] * 4),
        ({"top_k": 3, "top_p": 0.6}, [0, 0, 0.5, 0.5]),
    ],
)
def test_token_probabilities_of_equal_logits_keep_no_more(options, wanted):
    """Ties are where thresholds go wrong: sums are exact here, and so is what must stay."""
    found = token_probabilities(torch.full((4,), 3.5), 0.7, **options).tolist()
    assert sorted(found) == pytest.approx(wanted, rel=1e-15)


def test_token_probabilities_survive_extremes():
    big = torch.tensor([3e38, -3e38, 3e38, -torch.inf])
    for temperature in (1e-300, 1.0, 1e30):
        assert token_probabilities(big, temperature).tolist() == [0.5, 0, 0.5, 0]
    assert token_probabilities(torch.tensor([5.0]), top_k=1, top_p=0.1).tolist() == [1]
    narrow = token_probabilities(torch.tensor([1.0, 2.0], dtype=torch.bfloat16))
    np.testing.assert_allclose(narrow.numpy(), probabilities([1, 2], 1), rtol=1e-14)


def surprise(counts, wanted):
    """How far counts are from probabilities: χ² in standard deviations above its mean."""
    assert all(n == 0 for n, p in zip(counts, wanted, strict=True) if p == 0)
    kept = wanted > 0
    expected = wanted[kept] * counts.sum()
    assert expected.min() > 5
    freedom = kept.sum() - 1
    return (((counts[kept] - expected) ** 2 / expected).sum() - freedom) / math.sqrt(2 * freedom)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.0, "top_k": 8},
        {"temperature": 0.7, "top_p": 0.9},
        {"temperature": 1.7, "top_k": 10, "top_p": 0.8},
    ],
)
def test_generate_samples_from_the_stated_distribution(options):
    """Each row draws from its own generator, so many rows show the distribution."""
    model, prompt, rows = plain(), [3, 1, 4], 6000
    found = generate(model, [prompt] * rows, max_new_tokens=1, seed=0, **options)
    counts = np.bincount([row[0] for row in found], minlength=VOCAB)
    wanted = probabilities(plain_logits(model, prompt)[-1], **options)
    assert (wanted > 0).sum() > 3
    assert surprise(counts, wanted) < 4
    hotter = np.sqrt(wanted) / np.sqrt(wanted).sum()
    assert surprise(counts, hotter) > 20  # the test can fail


def test_pick_token_draws_from_the_generator_given():
    logits = torch.randn(VOCAB)
    draws = [
        [
            pick_token(logits, 1.0, generator=generator)
            for generator in [torch.Generator().manual_seed(seed)]
            for _ in range(20)
        ]
        for seed in (1, 1, 2)
    ]
    assert draws[0] == draws[1] != draws[2]
    torch.manual_seed(7)
    first = [pick_token(logits, 1.0) for _ in range(20)]
    torch.manual_seed(7)
    assert [pick_token(logits, 1.0) for _ in range(20)] == first


def test_pick_token_at_temperature_0_is_the_likeliest():
    logits = torch.tensor([1.0, -torch.inf, 4.0, 3.999])
    assert {pick_token(logits) for _ in range(5)} == {2}
    assert logits.tolist() == [1.0, -math.inf, 4.0, pytest.approx(3.999)]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_pick_token_refuses_logits_that_are_no_numbers(value):
    logits = torch.full((4,), -math.inf)
    logits[2] = value
    for temperature in (0, 1):
        message = f"logits must have a finite maximum, found {value}; check the model"
        with pytest.raises(RuntimeError, match=message):
            pick_token(logits, temperature)


# --- the model is left as it was ----------------------------------------------------------------


def test_generate_is_without_dropout_and_restores_each_flag():
    model = plain().train()
    model.embed.eval()
    flags = flags_of(model)
    assert set(flags.values()) == {True, False}
    found = generate(model, PROMPTS, max_new_tokens=8)
    assert found == [greedy(plain(), prompt, 8) for prompt in PROMPTS]
    assert flags_of(model) == flags
    assert torch.is_grad_enabled()
    assert all(parameter.grad is None for parameter in model.parameters())


@KINDS
def test_generate_restores_the_flags_after_an_error(kind):
    model = MODELS[kind]().train()
    next(model.children()).eval()
    flags = flags_of(model)
    assert set(flags.values()) == {True, False}
    for parameter in model.parameters():
        parameter.data.fill_(math.nan)
    with pytest.raises(RuntimeError, match="logits must have a finite maximum, found nan"):
        generate(model, PROMPTS, max_new_tokens=2)
    assert flags_of(model) == flags


def test_generate_is_in_the_public_interface():
    assert minilora.generate is generate


# --- compiled ----------------------------------------------------------------------------------


@pytest.mark.skipif(compile_problem() is not None, reason=str(compile_problem()))
@pytest.mark.parametrize("kind", ["llama", "gpt2", "plain"])
def test_generate_compiled_writes_the_same_and_leaves_no_trace(kind, monkeypatch):
    """Padded prompts in two cache sizes, in f64: compiled tokens are the uncompiled ones.

    One of the models is compiled by Inductor, which takes ten seconds.
    """
    if kind != "llama":
        traced = functools.partial(torch.compile, backend="aot_eager")
        monkeypatch.setattr(torch, "compile", traced)
    model = MODELS[kind]()
    for prompts, count in ((PROMPTS, 9), ([[6, 2]], 12)):
        wanted = generate(model, prompts, max_new_tokens=count)
        assert generate(model, prompts, max_new_tokens=count, compile=True) == wanted
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_generate_compiles_after_the_first_token(monkeypatch):
    """The blocks alone, once the prompts are read; what stops at once compiles nothing."""
    made, model = [], llama()
    monkeypatch.setattr(compiling, "compile_problem", lambda device: None)
    monkeypatch.setattr(torch, "compile", lambda forward, **_: made.append(forward) or forward)
    generate(model, PROMPTS, max_new_tokens=1, compile=True)
    assert not made
    generate(model, PROMPTS, max_new_tokens=3, compile="auto")
    assert [forward.__self__ for forward in made] == list(model.model.layers)


def test_generate_compiled_needs_a_compiler(monkeypatch):
    monkeypatch.setattr(compiling, "compile_problem", lambda device: "no g++")
    with pytest.raises(RuntimeError, match="needs torch.compile to work, found: no g"):
        generate(llama(), PROMPTS, compile=True)
    wanted = generate(llama(), PROMPTS, max_new_tokens=3)
    assert generate(llama(), PROMPTS, max_new_tokens=3, compile="auto") == wanted


# --- what is refused ----------------------------------------------------------------------------

BAD_VALUES = [
    ({"max_new_tokens": 0}, "max_new_tokens must be a whole number of at least 1, found 0"),
    ({"max_new_tokens": 2.5}, "max_new_tokens must be a whole number of at least 1, found 2.5"),
    ({"temperature": -0.5}, r"temperature must be 0 or a positive number, found -0\.5"),
    ({"temperature": math.nan}, "temperature must be 0 or a positive number, found nan"),
    ({"temperature": math.inf}, "temperature must be 0 or a positive number, found inf"),
    ({"top_k": 0}, "top_k must be at least 1 or None, found 0"),
    ({"top_p": 0.0}, r"top_p must lie in \(0, 1\] or be None, found 0\.0"),
    ({"top_p": 1.01}, r"top_p must lie in \(0, 1\] or be None, found 1\.01"),
    ({"top_p": math.nan}, r"top_p must lie in \(0, 1\] or be None, found nan"),
    ({"compile": "yes"}, "compile must be True, False or 'auto', found 'yes'"),
    ({"stop": ["a", ""]}, "a stop string must not be empty: every text contains it"),
    ({"prompts": []}, "prompts must hold at least one prompt, found none"),
    ({"prompts": ["a", ""]}, "prompt 1 must hold at least one token, found none"),
    ({"prompts": [[1], []]}, "prompt 1 must hold at least one token, found none"),
    (
        {"prompts": [[1], [3, VOCAB]]},
        rf"token ids must lie in \[0, {VOCAB}\), prompt 1 has 3 to {VOCAB}",
    ),
    ({"prompts": [[1, -1]]}, rf"token ids must lie in \[0, {VOCAB}\), prompt 0 has -1 to 1"),
    (
        {"prompts": [[1], [1] * 20], "max_new_tokens": 13},
        "the longest prompt and max_new_tokens must fit the model's context of 32 tokens, found "
        r"20 \+ 13; shorten one of them",
    ),
]
BAD_TYPES = [
    ({"stop": [1, 2.5]}, r"stop must hold strings and token ids, found 2\.5"),
    ({"prompts": 5}, "prompts must be a text or a list, found int"),
    ({"prompts": {"a": 1}}, "prompts must be a text or a list, found dict"),
    ({"prompts": torch.ones(1, 2).long()}, "prompts must be a text or a list, found Tensor"),
    ({"prompts": [1, 2]}, "prompts must be texts or lists of token ids, prompt 0 is 1"),
    ({"prompts": [[1], [1.0]]}, r"prompts must be texts .*, prompt 1 is \[1\.0\]"),
    ({"prompts": [[True]]}, r"prompts must be texts .*, prompt 0 is \[True\]"),
    ({"prompts": ["a", [1]], "chat": True}, "chat=True needs texts, prompt 1 is list"),
    (
        {"prompts": [[1], "a"], "tokenizer": None},
        "prompt 1 is a text and needs a tokenizer, found None",
    ),
    (
        {"prompts": [[1]], "tokenizer": None, "stop": "a"},
        "stop strings need a tokenizer, found None; pass token ids or tokenizer=",
    ),
]


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [(ValueError, *each) for each in BAD_VALUES] + [(TypeError, *each) for each in BAD_TYPES],
)
def test_generate_refuses_bad_arguments_before_any_work(kind, options, message):
    model = llama().train()
    shapes = watch(model)
    options = {"prompts": ["abc"], "tokenizer": letter_tokenizer(), **options}
    with pytest.raises(kind, match=message):
        generate(model, **{"max_new_tokens": 2, **options})
    assert not shapes
    assert all(module.training for module in model.modules())


def test_generate_without_a_config_still_refuses_negative_ids():
    with pytest.raises(ValueError, match=r"token ids must lie in \[0, 2³¹\), prompt 0 has -2 to 3"):
        generate(plain(), [[3, -2]])


@pytest.mark.parametrize("name", ["max_position_embeddings", "n_positions", "n_ctx"])
def test_generate_finds_the_context_under_each_name(name):
    model = plain()
    model.config = types.SimpleNamespace(**{name: 5})
    assert len(generate(model, [[1, 2]], max_new_tokens=3)[0]) == 3
    with pytest.raises(ValueError, match=r"context of 5 tokens, found 2 \+ 4"):
        generate(model, [[1, 2]], max_new_tokens=4)
