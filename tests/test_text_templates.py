"""Chat templates: the text they write in transformers, and an early end to hostile ones."""

import sys
import time
import tracemalloc

import pytest
from transformers.utils.chat_template_utils import _compile_jinja_template

from minilora.text.chat_template import ChatTemplate

USER = [{"role": "user", "content": " What is\tLoRA? "}]
CALL = {"function": {"name": "f", "arguments": {"k": [1, 2.5, None, True]}}}
MESSAGES = [
    {"role": "system", "content": "S<é"},
    {"role": "user", "content": " a\nb "},
    {"role": "assistant", "content": "<think>x</think>y", "tool_calls": [CALL]},
]
TEMPLATES = [
    "{{ messages[::-1]|map(attribute='role')|join(', ') }}",
    "{% for k,v in messages[2]|items %}{{k}}={{v|string|length}};{% endfor %}",
    "{{ messages|selectattr('role','equalto','user')|list|length }}",
    "{{ messages[2].tool_calls|tojson(indent=4) }}",
    "{{ messages|tojson }}",
    "{{ messages[2].content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') }}",
    (
        "{% set ns=namespace(a=0) %}{% for m in messages %}{% set ns.a = ns.a + loop.inde"
        "x0 * 2 %}{% endfor %}{{ ns.a }}"
    ),
    (
        "{% macro r(x, y=false) %}[{{ x }}{{ caller() if caller }}]{% endmacro %}{{ r('q'"
        ") }}{% call r(1) %}zz{% endcall %}"
    ),
    "{{ (messages|first).content ~ 5 ~ none ~ true }}",
    "{{ messages[0].content + 'x'|safe + '<' }}",
    "{{ 'a-b-c'|replace('-', '+', 1) }}{{ 'aXa'.replace('a','bb',1) }}",
    "{{ ['a','b']|join }}{{ '-'.join(['a','b']) }}{{ 'abc'|reverse }}{{ [1,2]|reverse|list }}",
    "{{ {'b':1,'a':2}|dictsort }}{{ {'b':1}.items()|list }}{{ {'b':1}.keys()|list }}",
    "{% for i in range(3) %}{{ loop.cycle('a','b') }}{{ loop.last }}{{ loop.length }}{% endfor %}",
    "{{ messages[0].missing is defined }}{{ messages[0].missing|default('d') }}{{ none is none }}",
    "{{ 'é'|tojson }}{{ '<&>'|tojson|safe }}",
    (
        "{% for m in messages if m.role != 'user' %}{{ loop.index }}{{ m.role|title }}{% "
        "if loop.nextitem is defined %}n{% endif %}{% endfor %}"
    ),
    (
        "{{ [3,1,2]|sort|list }}{{ [1,1,2]|unique|list }}{{ [1,2]|max }}{{ -3|abs }}{{ '5"
        "'|int + 1 }}{{ 7 // 2 }}{{ 7 % 4 }}"
    ),
    "{{ 'x' * 3 }}{{ [1] * 2 }}{{ 2.5 * 2 }}{{ [1] + [2] }}{{ (1,2) }}",
    "{{ messages|length > 2 and 'user' in messages|map(attribute='role') }}",
    "{% set a, b = 1, 2 %}{{ a }}{{ b }}{% set x %}blk{{ a }}{% endset %}{{ x }}",
    "{{ strftime_now('%Y') }}",
    "{{ messages[2].content|trim|upper|lower|capitalize }}{{ 'a b'|wordcount if false else 1 }}",
]


@pytest.mark.peers
@pytest.mark.parametrize("template", TEMPLATES)
def test_templates_write_what_they_write_in_transformers(template):
    wanted = _compile_jinja_template(template).render(messages=MESSAGES)
    assert ChatTemplate(template).render(MESSAGES) == wanted


GROW = "{% set ns = namespace(s='aaaa') %}{% for i in range(60) %}"
UNSAFE = "is unsafe"
LARGE, LATE = "it makes too much text", "it runs for more than"
HOSTILE = {
    "{{ ''.__class__.__mro__ }}": "attribute '__class__' of 'str' object is unsafe",
    "{{ messages.__class__.__base__ }}": "attribute '__class__' of 'list' object is unsafe",
    "{{ (''|attr('__class__')).x }}": UNSAFE,
    "{{ (messages|map(attribute='__class__')|first).x }}": UNSAFE,
    "{{ raise_exception.__globals__['json'] }}": "'__globals__' of 'function'",
    "{{ cycler.__init__.__globals__.os }}": "'__init__' of 'type'",
    "{% include '/etc/passwd' %}": "no loader",
    "{% import 'os' as os %}{{ os }}": "no loader",
    "{{ messages.append(1) }}": "'append' of 'list' object is unsafe",
    "{% for i in range(1000000000000) %}x{% endfor %}": "Range too big",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}": LATE,
    "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(90) }}": LATE,
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "maximum recursion depth",
    "{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}": "maximum recursion depth",
    "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}": "maximum recursion depth",
    "{% for i in range(99999) %}{{ 'a' * 9999 }}{% endfor %}": LARGE,
    "{{ 'a' * 1000000000000 }}": LARGE,
    "{{ 1000000000000 * [1] }}": LARGE,
    "{{ 10**(10**10) }}": r"the \*\* operator on a int is refused",
    "{% set ns = namespace(x=7) %}{% for i in range(99) %}{% set ns.x = ns.x * ns.x %}"
    "{% endfor %}": LARGE,
    "{{ '%1000000000d' % 1 }}": "the % operator on a str is refused",
    "{{ '{:>10000000000}'.format(1) }}": "'format' of 'str' object is unsafe",
    "{{ 'a'.center(100000000000) }}": "'center' of 'str' object is unsafe",
    "{{ ('a'|safe).center(100000000000) }}": "'center' of 'Markup' object is unsafe",
    "{{ 'a\nb'|indent(100000000000) }}": "No filter named 'indent'",
    "{{ (1).to_bytes(1000000000000) }}": "'to_bytes' of 'int' object is unsafe",
    "{{ ('a' * 1000000).translate({97: 'b' * 1000000}) }}": "'translate' of 'str' object is unsafe",
    GROW + "{% set ns.s = ns.s ~ ns.s %}{% endfor %}": LARGE,
    GROW + "{% set ns.s = ns.s + ns.s %}{% endfor %}": LARGE,
    GROW + "{% set ns.s %}{{ ns.s }}{{ ns.s }}{% endset %}{% endfor %}": LARGE,
    GROW + "{% set ns.s = ns.s.replace('a', 'aa') %}{% endfor %}": LARGE,
    GROW + "{% set ns.s = ns.s.join([ns.s, ns.s]) %}{% endfor %}": LARGE,
}


@pytest.mark.parametrize("template", HOSTILE)
def test_render_of_a_hostile_template_ends_with_an_error(monkeypatch, template):
    if HOSTILE[template] == LATE:
        monkeypatch.setattr("minilora.text.template_sandbox._SECONDS", 0.3)
    begin = time.monotonic()
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=f"^the chat template .*: .*{HOSTILE[template]}"):
            ChatTemplate(template).render(USER)
        assert tracemalloc.get_traced_memory()[1] < 4e8
    finally:
        tracemalloc.stop()
    assert time.monotonic() - begin < 5  # the bound and a slow machine


def test_numbers_in_formats_and_indents_make_no_more_than_they_may():
    assert len(ChatTemplate("{{ strftime_now('%1000000000Y') }}").render(USER)) < 26_000
    assert len(ChatTemplate("{{ [[1]]|tojson(indent=1000000000) }}").render(USER)) < 99


def test_render_of_long_messages_is_not_taken_for_an_attack():
    messages = [{"role": "user", "content": "word " * 200_000}] * 3
    template = "{% for m in messages %}{{ m.role ~ m.content | trim }}{% endfor %}"
    assert len(ChatTemplate(template).render(messages)) > 2_999_990


def test_a_missing_or_old_jinja2_is_named(monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr("jinja2.__version__", "3.1.5")
        with pytest.raises(RuntimeError, match=r"need jinja2 3\.1\.6 or newer, .* found 3\.1\.5"):
            ChatTemplate("")
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(RuntimeError, match=r'needs jinja2 .*: pip install "minilora\[text\]"'):
        ChatTemplate("")
