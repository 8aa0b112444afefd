"""Which adapter is better: differences, intervals and answers against oracles written apart."""

import json
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from byte_tokenizer import CHATML, byte_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from test_running_chat import model

import minilora
from minilora.cli.command import main
from minilora.data import IGNORE, read_data
from minilora.loading.saving import save_pretrained
from minilora.report.answers import mcnemar
from minilora.report.contest import Difference, _Bootstrap, _t975

TOKENIZER = byte_tokenizer(CHATML)
WORDS = ["one two three", "a", "bcd efg", "hi there", "0123456789", "xyz", "lorem ipsum", "no"]
DATA = read_data([{"prompt": f"{w}: ", "completion": w[::-1]} for w in WORDS], TOKENIZER)[0]


def losses(made, adapter, examples):
    """Summed loss and learned tokens of each example alone, in f64."""
    found = []
    minilora.activate(made, adapter)
    for example in examples:
        with torch.no_grad():
            logits = made(torch.tensor([example.input_ids]))[0].double().log_softmax(-1)
        learned = [(t, i) for t, i in enumerate(example.labels) if t and i != IGNORE]
        found.append((-sum(logits[t - 1, i].item() for t, i in learned), len(learned)))
    return found


def test_losses_and_differences_are_those_of_each_example_alone():
    made = model(["v1", "v2"])
    minilora.activate(made, "v2")
    found = minilora.compare(made, [None, "v1", "v2"], DATA, outside=DATA[:3], train=DATA[3:])
    alone = {name: losses(made, name, DATA) for name in (None, "v1", "v2")}
    for name, pairs in alone.items():
        wanted = sum(a for a, _ in pairs) / sum(n for _, n in pairs)
        assert found.losses[name or "base"] == pytest.approx(wanted, rel=1e-5)
    for difference, name in zip(found.differences, ("v1", "v2"), strict=True):
        assert (difference.first, difference.second) == ("base", name)
        change = sum(b - a for (a, _), (b, _) in zip(alone[None], alone[name], strict=True))
        tokens = sum(n for _, n in alone[None])
        assert difference.change == pytest.approx(change / tokens, rel=1e-4)
        assert (difference.tokens, difference.examples) == (tokens, len(DATA))
        assert difference.low < difference.change < difference.high
    three = alone["v1"][:3], alone[None][:3]
    outside = sum(a for a, _ in three[0]) - sum(a for a, _ in three[1])
    assert found.outside[0].change == pytest.approx(outside / sum(n for _, n in three[0]), rel=1e-4)
    rest = [sum(a for a, _ in alone[name][3:]) for name in ("v1", None)]
    gap = found.differences[0].change - (rest[0] - rest[1]) / sum(n for _, n in alone[None][3:])
    assert found.gaps["v1"] == pytest.approx(gap, abs=1e-5)
    each = [(b - a) / n for (a, n), (b, _) in zip(alone[None], alone["v2"], strict=True)]
    assert found.gained == () or found.gained[0].example == int(np.argmin(each))
    assert found.lost[0].example == int(np.argmax(each))
    assert found.lost[0].change == pytest.approx(max(each), rel=1e-4)


def test_intervals_are_quantiles_of_examples_drawn_anew():
    """An oracle with draws of its own: equal to the error of 10,000 draws."""
    made = model(["v1"])
    (found,) = minilora.compare(made, [None, "v1"], DATA).differences
    base, tuned = losses(made, None, DATA), losses(made, "v1", DATA)
    sums = np.array([b - a for (a, _), (b, _) in zip(base, tuned, strict=True)])
    counts = np.array([n for _, n in base])
    rows = np.random.RandomState(7).randint(0, len(DATA), (40_000, len(DATA)))
    means = sums[rows].sum(1) / counts[rows].sum(1)
    n, change = len(DATA), sums.sum() / counts.sum()
    wide = 2.3646 / 1.96 * math.sqrt(n / (n - 1))  # Student's t of 7 degrees at 0.975
    low, high = change + wide * (np.quantile(means, [0.025, 0.975]) - change)
    assert found.low == pytest.approx(low, abs=0.03 * (high - low))
    assert found.high == pytest.approx(high, abs=0.03 * (high - low))


def test_equal_seeds_give_equal_numbers_and_the_model_stays():
    made = model(["v1"])
    minilora.activate(made, "v1")
    before = made(torch.tensor([[1, 2]]))
    first = minilora.compare(made, [None, "v1"], DATA, seed=3)
    assert first == minilora.compare(made, [None, "v1"], DATA, seed=3)
    assert first != minilora.compare(made, [None, "v1"], DATA, seed=4)
    other = minilora.compare(made, [None, "v1"], DATA, seed=3, batch_size=1)
    assert other.differences[0].low == pytest.approx(first.differences[0].low, rel=1e-4)
    assert torch.equal(made(torch.tensor([[1, 2]])), before)


def test_what_is_the_same_cannot_be_told_apart():
    made = model()
    minilora.inject(made, r=2, alpha=3)
    found = minilora.compare(made, [None, "default"], DATA)
    (difference,) = found.differences
    assert (difference.change, difference.low, difference.high) == (0, 0, 0)
    assert difference.more is None
    assert str(difference).startswith("base or default, can't tell; fewer than 10 examples")
    assert found.gained == found.lost == ()


@pytest.mark.parametrize(
    ("change", "low", "high", "more", "said"),
    [
        (0.5, 0.3, 0.7, 0, "base or v1, can't tell; fewer than 10 examples never can: +0.5000"),
        (-0.5, -0.7, -0.3, None, "v1 is better than base: -0.5000 nats a token, 95 % -0.7000 to "),
        (0.5, 0.3, 0.7, None, "base is better than v1: +0.5000 nats a token"),
        (0.1, -0.1, 0.3, 300, "base or v1, can't tell; about 300 more examples would: +0.1000"),
    ],
)
def test_a_difference_says_what_it_means(change, low, high, more, said):
    count = 12 if more != 0 else 9
    assert str(Difference("base", "v1", change, low, high, count, 99, more)).startswith(said)


def test_noise_is_called_a_difference_one_time_in_twenty():
    """400 draws of no difference, of 10 examples each: 5 % of them, at most 8 with their error."""
    draw = np.random.default_rng(0)
    bootstrap = _Bootstrap(0, 400)
    clear = 0
    for _ in range(400):
        losses = {
            "a": [torch.zeros(3) for _ in range(10)],
            "b": [torch.from_numpy(draw.normal(size=3)) for _ in range(10)],
        }
        clear += bootstrap.differences(["a", "b"], losses)[0].clear
    assert 0.02 < clear / 400 < 0.08


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 5, 9, 30, 1000])
def test_students_t_is_the_tables(degrees):
    table = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 9: 2.262, 30: 2.042, 1000: 1.962}
    assert _t975(degrees) == pytest.approx(table[degrees], abs=2e-3)


def test_of_a_conversation_the_first_learned_turn_is_the_answer():
    say = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    messages = [{"role": role, "content": content} for role, content in say]
    examples = read_data([{"messages": messages}], TOKENIZER)[0]
    wanted = []
    minilora.compare(
        model(["v1"]), [None, "v1"], examples, tokenizer=TOKENIZER, max_new_tokens=2,
        right=lambda written, learned: bool(wanted.append(learned)),
    )  # fmt: skip
    assert set(wanted) == {"b"}


def test_the_examples_that_are_missing_are_reckoned_from_the_interval():
    made = model()
    minilora.inject(made, r=2, alpha=3)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.01)
    (found,) = minilora.compare(made, [None, "default"], DATA).differences
    assert not found.clear
    half = max(found.high - found.change, found.change - found.low)
    assert found.more == math.ceil(len(DATA) * ((half / found.change) ** 2 - 1))


@given(st.integers(0, 30), st.integers(0, 30))
def test_mcnemar_is_the_exact_binomial_test(first, second):
    both = first + second
    chance = [Fraction(math.comb(both, k), 2**both) for k in range(both + 1)]
    # As unlikely as what was found, or more.
    wanted = sum(p for p in chance if p <= chance[first])
    assert mcnemar(first, second) == pytest.approx(float(wanted))


def test_answers_are_judged_against_what_is_learned():
    """A model that is taught one answer by heart, and its base."""
    made = model()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    minilora.inject(made, r=8, alpha=32)
    rows = [{"prompt": "2+2=", "completion": "4."}, {"prompt": "1+1=", "completion": "5."}]
    examples = read_data(rows, TOKENIZER)[0]
    config = minilora.TrainConfig(max_steps=40, lr=2e-2, batch_size=1)
    minilora.fit(made, examples[:1], config=config)
    asked = {"tokenizer": TOKENIZER, "max_new_tokens": 4}
    found = minilora.compare(made, [None, "default"], examples, right="exact", **asked)
    assert dict(found.right) == {"base": 0, "default": 1}
    (answer,) = found.answers
    assert (answer.only_first, answer.only_second, answer.p) == (0, 1, 1.0)
    assert str(answer) == (
        "default answers 1 rightly that base does not, and 0 the other way round: p = 1, can't tell"
    )
    assert found.lengths["default"] == 2
    assert found.cut == {"base": 2, "default": found.cut["default"]}
    by_digit = minilora.compare(made, [None, "default"], examples, right=r"(\d)", **asked)
    assert by_digit.right["default"] == 1
    seen = []

    def judge(written, wanted):
        seen.append(wanted)
        return True

    assert minilora.compare(made, [None, "default"], examples, right=judge, **asked).right == {
        "base": 2, "default": 2}  # fmt: skip
    assert set(seen) == {"4.", "5."}


@pytest.mark.parametrize(
    ("contenders", "options", "message"),
    [
        (["v1"], {}, "needs two or more different contenders, found"),
        (["v1", "v1"], {}, "needs two or more different contenders"),
        ("v1", {}, "needs two or more different contenders"),
        ([None, "v9"], {}, "v9"),
        ([None, "v1"], {"right": "exact"}, "needs a tokenizer, found None"),
        ([None, "v1"], {"right": "(", "tokenizer": TOKENIZER}, "right must be 'exact', a regular"),
        ([None, "v1"], {"outside": []}, "data must hold at least one example, found none"),
    ],
)
def test_what_cannot_be_compared_is_refused(contenders, options, message):
    with pytest.raises(ValueError, match=message):
        minilora.compare(model(["v1"]), contenders, DATA, **options)


def test_the_command_prints_and_writes_the_same(tmp_path, capsys):
    made = model(["v1", "v2"])
    for name in ("v1", "v2"):
        minilora.save(made, tmp_path, name, base_name=str(tmp_path / "model"))
    found = minilora.compare(made, ["v1", "v2"], DATA, tokenizer=TOKENIZER, right="exact")
    minilora.delete(made, "v1")
    minilora.delete(made, "v2")
    save_pretrained(made, tmp_path / "model", TOKENIZER)
    rows = [{"prompt": f"{w}: ", "completion": w[::-1]} for w in WORDS]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["compare", tmp_path / "model", tmp_path / "v1", tmp_path / "v2", "--no-base"]
    words += ["--data", tmp_path / "d.jsonl", "--right", "exact", "--dtype", "float32"]
    assert main([*map(str, words), "--json", str(tmp_path / "c.json")]) == 0
    out = capsys.readouterr().out
    assert out == f"{found}\nJSON in {tmp_path / 'c.json'}\n"
    stored = json.loads((tmp_path / "c.json").read_text())
    assert stored["losses"] == found.losses
    assert stored["differences"][0]["second"] == "v2"
    assert out.startswith(f"held-out loss over {found.differences[0].tokens} tokens of 8 examples:")
    assert "v1: 0 of 8 answers right, " in out
