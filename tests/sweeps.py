"""What the suite that people wait for leaves to `--wide`: examples of Hypothesis, slow cases."""

import pytest
from hypothesis import settings


def examples(few: int, many: int) -> settings:
    """Return settings for a test: `few` examples, or `many` with --wide (see conftest.py)."""
    wide = settings().max_examples > settings.get_profile("default").max_examples
    return settings(max_examples=many if wide else few)


def wide(*case):
    """Return a case of `parametrize` that runs with --wide alone."""
    return pytest.param(*case, marks=pytest.mark.wide)
