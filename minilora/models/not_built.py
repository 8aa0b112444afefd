"""The error of a model that has no code here."""


class NotBuiltError(ValueError):
    """Say that a model has no code here; transformers' own may stand in for it."""
