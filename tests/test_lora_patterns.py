"""Regular expressions from files: `re`'s answers, in bounded time."""

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minilora.lora.patterns import Pattern

NAMES = st.text("ab.1_", max_size=12)
ATOMS = st.sampled_from(["a", "b", ".", r"\.", "[ab]", "[^a]", r"\d", r"\w", r"\b", "^", "$"])
WRAPPED = ["({})*", "(?:{})+?", "({})?", "({}){{2}}", "(?:{}){{1,3}}", "({})*?", "(?={})", "(?!{})"]
PATTERNS = st.recursive(
    ATOMS,
    lambda inner: (
        st.lists(inner, min_size=1, max_size=3).map("".join)
        | st.lists(inner, min_size=2, max_size=3).map(lambda ways: f"(?:{'|'.join(ways)})")
        | st.tuples(st.sampled_from(WRAPPED), inner).map(lambda pair: pair[0].format(pair[1]))
    ),
    max_leaves=6,
)


@settings(max_examples=400)
@given(PATTERNS, NAMES)
def test_a_pattern_matches_what_re_matches(text, name):
    try:
        wanted = re.compile(text)
        pattern = Pattern(text, "targets")
    except ValueError as error:
        assert "a lookaround within another" in str(error)
        return
    except re.error:
        return
    pattern.simple = False  # what re would be left to as well
    if name or not {r"\b", "$", "^"} & set(re.findall(r"\\b|\$|\^", text)):
        assert pattern.fullmatch(name) == bool(wanted.fullmatch(name))
        assert pattern.ends(name) == bool(re.match(rf"(.*\.)?({text})$", name))


USED = [  # as adapters in public have them
    r".*\.(q_proj|v_proj)$",
    r"^(?!.*visual).*(?:self_attn|mlp).*(?:q_proj|k_proj|gate_proj).*$",
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?"
    r"(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}"
    r"\.(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense)\.(?:(?:q_proj|k_proj|up_proj)))",
    r"model\.layers\.(1[0-9]|2[0-3])\.(self_attn|mlp)\.[a-z]+_proj",
    r".*(?<!lm_)head|.*q_proj(?:_\w+)?",
    r"(?i).*ATTN.*",
    r"(?i).*(attn|mlp).*",
]


@pytest.mark.parametrize("text", USED)
def test_patterns_in_use_match_as_in_re_and_fast(text):
    parts = ["self_attn.q_proj", "self_attn.q_proj_lora", "mlp.up_proj", "visual.q_proj", "lm_head"]
    names = [f"base.language_model.model.layers.{i}.{part}" for i in range(40) for part in parts]
    pattern = Pattern(text, "targets")
    begin = time.perf_counter()
    found = [pattern.fullmatch(name) for name in names]
    assert time.perf_counter() - begin < 1
    assert found == [bool(re.fullmatch(text, name)) for name in names]


HOSTILE = [
    "[a.]*[a.]*!",
    "(a|[a-z_.0-9]+)+!", "(a+)+!", "(a|a)*!", ".*.*.*.*.*.*.*.*.*.*!", "a?" * 60 + "a" * 60,
    "((a{0,99}){99}){99}!", "((((.{0,1}){99}){99}){99}){99}!", "(.{0,9}.{0,9}){1000000}!",
    "(?=(a|a)*!)(?!(a|a)*!).*", "(a{4000000000}|a){4000000000}!", "(a|b|ab)*(a|b|ab)*(bc|a)*!",
]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_patterns_end_soon(text):
    begin = time.perf_counter()
    for name in ("a" * 60, "model.layers.0.self_attn.q_proj", "ab" * 400):
        try:
            assert Pattern(text, "targets").fullmatch(name) == (text[0] == "a" and name == "a" * 60)
        except ValueError as error:
            assert re.search(r"matched in 20,000 steps, .* write a simpler one", str(error))
    assert time.perf_counter() - begin < 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("(", "targets must be a valid regular expression"),
        ("a{99999999999}", "targets must be a valid regular expression"),
        ("(" * 20_000 + ")" * 20_000, "targets must be a valid regular expression"),
        ("a" * 100_001, "at most 100,000 characters, found 100,001"),
        (r"(a*)(b*)\1", "matched in bounded time, .* has groupref; write a simpler one"),
        ("(?i)(a*)(b*)(c*)", "matched in bounded time, .* has flags"),
        ("(?i:a)b*c*d*", "matched in bounded time, .* has flags"),
        ("(?=(?=a)b*)c*", "has a lookaround within another"),
    ],
)
def test_patterns_that_are_refused(text, message):
    with pytest.raises(ValueError, match=message) as caught:
        Pattern(text, "targets")
    assert len(str(caught.value)) < 400


def test_a_name_without_end_is_refused():
    with pytest.raises(ValueError, match="at most 1,000 characters, found 2,000"):
        Pattern("a*", "targets").fullmatch("a" * 2000)
