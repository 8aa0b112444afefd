"""What an adapter changed, as numbers, tables and plots."""

from minilora.report.ablation import Ablation, ablate
from minilora.report.analysis import explain
from minilora.report.answers import AnswerDifference
from minilora.report.comparing import AdapterComparison, compare
from minilora.report.explanation import Behaviour, Explanation
from minilora.report.spectra import LayerReport
from minilora.report.subspace import (
    Comparison,
    LayerComparison,
    check_keep,
    subspaces,
    truncate,
)
from minilora.running import Difference

__all__ = [
    "Ablation",
    "AdapterComparison",
    "AnswerDifference",
    "Behaviour",
    "Comparison",
    "Difference",
    "Explanation",
    "LayerComparison",
    "LayerReport",
    "ablate",
    "check_keep",
    "compare",
    "explain",
    "subspaces",
    "truncate",
]
