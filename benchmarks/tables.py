"""The tables of the documentation, made from benchmarks/results/*.csv.

    PYTHONPATH=benchmarks python benchmarks/tables.py

A page holds a table between `<!-- table: NAME -->` and `<!-- end -->`; this writes all of them
anew, and a test holds them equal. Rows of a changed tree (a commit that ends in `-dirty`) are left
out everywhere.
"""

import re
from pathlib import Path

import tables_bases
import tables_goals
import tables_gpu
import tables_plans
import tables_training

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGES = [DOCS.with_name("README.md"), *sorted(DOCS.glob("*.md"))]
TABLES = {
    "goals": tables_goals.goals,
    "real task": tables_training.real_task,
    "real task avx512": tables_training.real_task_avx512,
    "documents": tables_training.documents,
    "documents avx512": tables_training.documents_avx512,
    "equal steps": tables_training.equal_steps,
    "shared prefix": tables_training.shared_prefix,
    "recipes": tables_training.recipes,
    "real task caption": tables_training.real_task_caption,
    "defaults": tables_training.defaults,
    "defaults beside": tables_training.defaults_beside,
    "tune": tables_training.tune,
    "demo": tables_training.demo,
    "gguf answers": tables_training.gguf_answers,
    "cpu": tables_training.cpu,
    "step amx": tables_training.step_amx,
    "step avx512": tables_training.step_avx512,
    "step avx2": tables_training.step_avx2,
    "step other models": tables_training.step_models,
    "curves": tables_training.curves,
    "breakdown": tables_training.breakdown,
    "loss": tables_training.loss,
    "waiting": tables_training.waiting,
    "deployment": tables_bases.deployment,
    "quantized bases": tables_bases.quantized_bases,
    "sizes": tables_bases.sizes,
    "formats": tables_bases.formats,
    "rounding": tables_bases.rounding,
    "explain": tables_bases.explain,
    "loss curves": tables_bases.loss_curves,
    "linear": tables_bases.linear,
    "plans": tables_plans.plans,
    "published": tables_plans.published,
    "llama 70b": tables_plans.llama_70b,
    "rank memory": tables_plans.rank_memory,
    "traffic": tables_plans.traffic,
    "gpu": tables_gpu.machines,
    "gpu checks": tables_gpu.checks,
    "gpu layers": tables_gpu.layers,
    "gpu kernels": tables_gpu.kernels,
    "gpu passes": tables_gpu.passes,
    "gpu few rows": tables_gpu.few_rows,
    "gpu models": tables_gpu.models,
    "gpu no-op": tables_gpu.no_op,
    "gpu no-op beside": tables_gpu.no_op_beside,
    "gpu profile": tables_gpu.profile,
    "gpu models h100": tables_gpu.models_h100,
    "gpu smollm2": tables_gpu.smollm2,
}


def render(text: str) -> str:
    """Return a page with every table made anew."""

    def put(match: re.Match[str]) -> str:
        return f"<!-- table: {match.group(1)} -->\n\n{TABLES[match.group(1)]()}\n<!-- end -->"

    return re.sub(r"<!-- table: (.*?) -->.*?<!-- end -->", put, text, flags=re.S)


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(render(page.read_text(encoding="utf-8")), encoding="utf-8")
