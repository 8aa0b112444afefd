"""Examples that are kept back."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilora.data import Example, hold_out

ROWS = st.lists(st.integers(0, 50), min_size=2, max_size=60, unique=True)


def made(numbers):
    return [Example((n, n + 1), (-100, n + 1)) for n in numbers]


@given(ROWS, st.floats(0.01, 0.99))
def test_every_example_is_on_one_side_and_their_share_is_the_one_asked_for(numbers, share):
    rows = made(numbers)
    count = max(1, round(share * len(rows)))
    if count == len(rows):
        with pytest.raises(ValueError, match="leaves none that differs to learn; hold out less"):
            hold_out(rows, share)
        return
    learned, held_out = hold_out(rows, share)
    assert len(held_out) == count
    assert [row for row in rows if row in learned] == learned
    assert [row for row in rows if row not in learned] == held_out


@given(ROWS, st.randoms())
def test_the_order_does_not_matter_and_equal_examples_stay_together(numbers, random):
    rows = made(numbers)
    other = rows * 2
    random.shuffle(other)
    if len(rows) == 1:
        return
    held_out = set(hold_out(rows, 1)[1])
    assert set(hold_out(other, 1)[1]) == held_out
    assert len(hold_out(other, 1)[1]) == 2


@given(ROWS, st.integers(51, 99))
def test_what_is_held_out_stays_so_when_rows_are_added(numbers, new):
    (before,) = hold_out(made(numbers), 1)[1]
    (after,) = hold_out(made([*numbers, new]), 1)[1]
    assert after in (before, *made([new]))


def test_a_number_of_rows_is_a_number():
    assert len(hold_out(made(range(40)), 7)[1]) == 7
    with pytest.raises(ValueError, match="holding out 40 of 40 examples"):
        hold_out(made(range(40)), 40)
    with pytest.raises(ValueError, match="holding out 1 of 3 examples"):
        hold_out(made([1, 1, 1]), 0.1)
