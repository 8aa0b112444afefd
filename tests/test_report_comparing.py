"""Which adapter is better: differences, intervals and answers against oracles written apart."""

import dataclasses
import json
import math
import re
from contextlib import contextmanager
from fractions import Fraction
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from byte_tokenizer import CHATML, byte_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from test_report_page import parsed
from test_running_chat import model

import minilora
from minilora.cli.command import main
from minilora.data import IGNORE, read_data
from minilora.loading.saving import save_pretrained
from minilora.report.answers import AnswerDifference, length_controlled, mcnemar
from minilora.report.comparing import Gap, ShownChange
from minilora.report.comparing_page import comparing_page
from minilora.report.plots import intervals
from minilora.running.paired import Difference, paired_difference, t975

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
    assert found.gaps["v1"].change == pytest.approx(gap, abs=1e-5)
    (between,) = found.among
    assert (between.first, between.second) == ("v1", "v2")
    assert between.change == pytest.approx(
        found.differences[1].change - found.differences[0].change, rel=1e-4
    )
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


def test_the_interval_of_over_fitting_is_that_of_two_independent_sets():
    """Half-widths add as the sides of a right angle: held-out and training examples differ."""
    held = Difference("base", "v1", -0.5, -0.6, -0.3, 20, 99, None)
    trained = Difference("base", "v1", -0.9, -1.3, -0.8, 20, 99, None)
    gap = Gap.between(held, trained)
    assert gap.change == pytest.approx(0.4)
    assert gap.low == pytest.approx(0.4 - math.sqrt(0.1**2 + 0.1**2))
    assert gap.high == pytest.approx(0.4 + math.sqrt(0.2**2 + 0.4**2))
    assert (gap.examples, gap.caveat) == (20, "")


def test_over_fitting_on_a_few_examples_is_said_to_be_untold(tmp_path):
    for data, few in ((DATA, True), (DATA * 2, False)):
        found = minilora.compare(model(["v1"]), [None, "v1"], data, train=data, resamples=99)
        for text in (str(found), found.to_html(tmp_path / "a.html").read_text()):
            assert ("fewer than 10 examples are too few to tell" in text) == few


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
    assert str(difference).startswith(
        "can't tell whether base or default is better; fewer than 10 examples"
    )
    assert found.gained == found.lost == ()


def test_progress_names_the_contender(monkeypatch):
    said = []

    @contextmanager
    def ticking(what, *rest, **options):
        said.append(what)
        yield lambda count: None

    monkeypatch.setattr("minilora.report.answers.ticking", ticking)
    monkeypatch.setattr("minilora.running.paired.ticking", ticking)
    minilora.compare(model(["v1"]), ["base", "v1"], DATA, tokenizer=TOKENIZER, right="exact",
                     max_new_tokens=9, progress=True)  # fmt: skip
    assert {"measuring base", "base answering", "measuring v1", "v1 answering"} == {*said}


UNSURE = "can't tell whether base or v1 is better"


@pytest.mark.parametrize(
    ("change", "low", "high", "more", "said"),
    [
        (0.5, 0.3, 0.7, 0, f"{UNSURE}; fewer than 10 examples are too few to tell: +0.5000"),
        (-0.5, -0.7, -0.3, None, "v1 is better than base: -0.5000 nats a token, 95 % -0.7000 to "),
        (0.5, 0.3, 0.7, None, "base is better than v1: +0.5000 nats a token"),
        (0.1, -0.1, 0.3, 300, f"{UNSURE}; about 300 more examples would tell: +0.1000"),
        (1e-6, -1, 1, 10**12, f"{UNSURE}; more than 1,000,000 more examples would tell: "),
    ],
)
def test_a_difference_says_what_it_means(change, low, high, more, said):
    count = 12 if more != 0 else 9
    assert str(Difference("base", "v1", change, low, high, count, 99, more)).startswith(said)


def test_noise_is_called_a_difference_one_time_in_twenty():
    """400 draws of no difference, of 10 examples each: 5 % of them, at most 8 with their error."""
    draw = np.random.default_rng(0)
    clear = 0
    for _ in range(400):
        sums = [float(draw.normal(size=3).sum()) for _ in range(10)]
        clear += paired_difference("a", "b", [0.0] * 10, sums, [3] * 10, resamples=400).clear
    assert 0.02 < clear / 400 < 0.08


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 5, 9, 30, 1000])
def test_students_t_is_the_tables(degrees):
    table = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 9: 2.262, 30: 2.042, 1000: 1.962}
    assert t975(degrees) == pytest.approx(table[degrees], abs=2e-3)


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


def oracle_of_lengths(apart):
    """The same regression by a search of torch's in f64, with the same weak penalty."""
    won = torch.tensor([float(w) for w, _ in apart], dtype=torch.float64)
    lengths = torch.tensor([float(n) for _, n in apart], dtype=torch.float64)
    slope = (lengths / lengths.std(correction=0)).tanh()

    def fitted(columns):
        w = torch.zeros(columns.shape[1], dtype=torch.float64, requires_grad=True)
        search = torch.optim.LBFGS(
            [w], max_iter=500, tolerance_grad=1e-12, line_search_fn="strong_wolfe"
        )

        def likelihood():
            z = columns @ w
            return (won * z - torch.nn.functional.softplus(z)).sum()

        def closure():
            search.zero_grad()
            loss = -likelihood() + 0.005 * (w**2).sum()
            loss.backward()
            return loss

        search.step(closure)
        return likelihood().item(), w[0].item()

    full, constant = fitted(torch.stack([torch.ones_like(slope), slope], 1))
    alone, _ = fitted(slope[:, None])
    normal = torch.distributions.Normal(0.0, 1.0)
    z = math.sqrt(2 * max(0.0, full - alone))
    return 1 / (1 + math.exp(-constant)), 2 * (1 - normal.cdf(torch.tensor(z, dtype=torch.float64)))


@settings(deadline=None, max_examples=25)
@given(st.lists(st.tuples(st.booleans(), st.integers(-40, 40)), min_size=10, max_size=40))
def test_length_controlled_wins_are_those_of_a_logistic_regression(apart):
    found = length_controlled(apart)
    if len({longer for _, longer in apart}) == 1:
        return
    share, p = oracle_of_lengths(apart)
    assert found[0] == pytest.approx(share, abs=1e-4)
    # Near p = 1 the root of a ratio of 1 + 1e-8 makes much of how sums are rounded, χ² does not.
    square = torch.distributions.Normal(0.0, 1.0).icdf
    mine, theirs = (square(torch.as_tensor(q, dtype=torch.float64) / 2) ** 2 for q in (found[1], p))
    assert float(mine) == pytest.approx(float(theirs), rel=1e-3, abs=1e-6)


def test_an_answer_that_wins_by_its_length_alone_does_not_win_when_controlled():
    """The longer of two answers is right nine times in ten, and the second is longer."""
    apart = [(i % 10 != 0, 10 + i % 3) for i in range(60)] + [(i % 10 == 0, -10) for i in range(20)]
    share, p = length_controlled(apart)
    assert sum(won for won, _ in apart) / len(apart) > 0.65
    assert abs(share - 0.5) < 0.1 and p > 0.2
    share, p = length_controlled([(True, i % 2) for i in range(30)])
    assert share > 0.8 and p < 0.001
    assert length_controlled([(True, 1)] * 9) is None
    assert length_controlled([(True, 0)] * 20) is None
    said = str(AnswerDifference("a", "b", 4, 9, 0.27, (0.52, 0.9)))
    assert said.endswith(
        "can't tell\n  with answers of one length it would win 52% of these: p = 0.9"
    )


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
        "questions that only one gets right: default 1, base 0; p = 1, can't tell"
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
    assert found.gained[0].answers.keys() == {"base", "default"}
    assert found.gained[0].answers["default"].startswith("4.")


def test_the_page_shows_verdicts_intervals_answers_and_examples(tmp_path):
    found = minilora.compare(
        model(["v1", "v2"]), [None, "v1", "v2"], DATA, outside=DATA[:3], train=DATA[3:],
        tokenizer=TOKENIZER, right="exact", max_new_tokens=3,
    )  # fmt: skip
    text = found.to_html(tmp_path / "page.html").read_text(encoding="utf-8")
    page = parsed(text)
    assert not re.search(r"https?:|//[a-z]|url\(|@import|<script|<link|<img", text)
    words = " ".join("".join(page.words).split())
    for part in (
        "base, v1, v2: which is better?", "Held-out loss", "Difference of the held-out loss",
        "base → v1", "base → v2", "v1 → v2", "Outside the task", "Over-fitting", "Answers",
        "tokens of an answer", "Worst regressions", "Best gains", "v2 wrote",
    ):  # fmt: skip
        assert part in words, part
    for each in (*found.differences, *found.among):
        assert f"{each.change:+.4f}" in words and f"{each.low:+.4f}" in words
    drawings = re.findall(r"<svg.*?</svg>", text, re.S)
    assert len(drawings) == 3
    for drawing in drawings:
        root = ElementTree.fromstring(drawing)
        assert root.get("role") == "img" and root[0].text and root[1].text


def test_the_page_escapes_what_comes_from_outside():
    found = minilora.compare(model(["v1"]), [None, "v1"], DATA)
    evil = ShownChange(0, "<script>alert('&')</script>", -1.0, {"<b>": "<i>&"})
    text = comparing_page(dataclasses.replace(found, gained=(evil,)))
    parsed(text)
    assert "&lt;script&gt;alert(" in text and "&lt;b&gt; wrote" in text and "&lt;i&gt;&amp;" in text
    assert "<script" not in text and "<b> wrote" not in text


def test_an_interval_is_drawn_where_it_lies():
    rows = [
        ("a", -0.5, -0.75, -0.25, "x", True),
        ("b", 0.25, -0.25, 0.75, "y", False),
        ("c", 1, 0.5, 1.5, "z", True),
        ("of one example", 1, 1, 1, "?", False),
    ]
    root = ElementTree.fromstring(intervals("T", rows))
    dots = [float(c.get("cx")) for c in root.iter("circle")]
    step = (dots[2] - dots[0]) / 1.5
    assert dots[1] - dots[0] == pytest.approx(0.75 * step, abs=0.2)
    lines = [c for c in root.iter("line") if "thick" in c.get("class")]
    for line, (_, _, low, high, *_) in zip(lines, rows, strict=True):
        width = float(line.get("x2")) - float(line.get("x1"))
        assert width == pytest.approx((high - low) * step, abs=0.2)
    assert [c.get("class").split()[0] for c in lines] == ["better", "axis", "worse", "axis"]
    assert intervals("T", [("same", 0.0, 0.0, 0.0, "", False)])


@pytest.mark.parametrize(
    ("contenders", "options", "message"),
    [
        (["v1"], {}, "needs two or more different contenders, found"),
        (["v1", "v1"], {}, "needs two or more different contenders"),
        ("v1", {}, "needs two or more different contenders"),
        ([None, "v9"], {}, "v9"),
        ([None, "v1"], {"right": "exact"}, "needs a tokenizer, found None"),
        ([None, "v1"], {"right": "(", "tokenizer": TOKENIZER}, "right must be 'exact', a regular"),
        (
            [None, "v1"],
            {"max_new_tokens": 8},
            "max_new_tokens is of answers, .*=8 without it; pass",
        ),
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
    words += ["--json", tmp_path / "c.json", "--html", tmp_path / "c.html"]
    assert main(list(map(str, words))) == 0
    out = capsys.readouterr().out
    files = f"JSON in {tmp_path / 'c.json'}\npage in {tmp_path / 'c.html'}\n"
    assert out == f"{found}\n{files}"
    assert (tmp_path / "c.html").read_text() == comparing_page(found)
    stored = json.loads((tmp_path / "c.json").read_text())
    assert stored["losses"] == found.losses
    assert stored["differences"][0]["second"] == "v2"
    assert out.startswith(f"loss over {found.differences[0].tokens} tokens of 8 examples:")
    assert "v1: 0 of 8 answers right, " in out
