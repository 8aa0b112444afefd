"""Chat templates in our sandbox and in transformers': the same language, the same text."""

import pytest
from transformers.utils.chat_template_utils import _compile_jinja_template

from minilora.text.chat_template import ChatTemplate

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
