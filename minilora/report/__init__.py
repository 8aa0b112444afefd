"""What an adapter changed, as numbers, tables and plots."""

from minilora.report.ablation import Ablation, ablate
from minilora.report.comparison import Comparison, LayerComparison, compare, truncate
from minilora.report.explanation import Behaviour, Explanation
from minilora.report.spectra import LayerReport
from minilora.report.verb import explain

__all__ = [
    "Ablation",
    "Behaviour",
    "Comparison",
    "Explanation",
    "LayerComparison",
    "LayerReport",
    "ablate",
    "compare",
    "explain",
    "truncate",
]
