"""What people quote, beside what is."""

import pytest

from minilora.planning.memory import Settings, count_memory
from minilora.planning.rules import rules_of_thumb
from minilora.planning.shapes import read_shape


def rules(name, **options):
    shape, settings = read_shape(name), Settings(**options)
    return rules_of_thumb(shape, settings, count_memory(shape, settings, gpu=True))


def test_what_the_rules_say_and_what_is():
    memory, lora, nf4 = rules("llama-2-70b", r=16, batch_size=1)
    assert lora.says == pytest.approx(14e9, rel=0.02)
    assert lora.computed > 138e9
    assert "frozen weights: these stay" in str(lora)
    assert memory.says == pytest.approx(1.2 * 69e9, rel=0.01)
    assert memory.computed > memory.says
    seven = rules("llama-2-7b")[2]
    assert seven.says == pytest.approx(3.4e9, rel=0.02)
    assert 3.8e9 < seven.computed < 4.1e9
    assert nf4.computed > nf4.says


def test_a_small_model_is_mostly_not_weights():
    first = rules("smollm2-135m", length=256)[0]
    assert first.computed > 5 * first.says
