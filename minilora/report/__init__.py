"""What an adapter changed, as numbers, tables and plots."""

from minilora.report.analysis import explain
from minilora.report.comparing import AdapterComparison, compare
from minilora.report.explanation import Explanation
from minilora.report.subspace import Comparison, check_keep, subspaces, truncate

__all__ = [
    "AdapterComparison",
    "Comparison",
    "Explanation",
    "check_keep",
    "compare",
    "explain",
    "subspaces",
    "truncate",
]
