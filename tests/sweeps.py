"""How many examples Hypothesis draws: a few in the suite that people wait for, more with --wide."""

from hypothesis import settings


def examples(few: int, many: int) -> settings:
    """Return settings for a test: `few` examples, or `many` with --wide (see conftest.py)."""
    wide = settings().max_examples > settings.get_profile("default").max_examples
    return settings(max_examples=many if wide else few)
