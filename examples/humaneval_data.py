"""Functions with docstrings out of libraries that are here anyway, and what they share with others.

A function is taken where it stands alone: all that it reads are its arguments, builtins and modules
that are imported at the head of what is learned. So its body follows from what is shown of it.
"""

import ast
import builtins
import importlib.util
import re
import sysconfig
import textwrap
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

GRAM = 10  # tokens in a row that training data may not share with HumanEval
STDLIB = "Python's standard library"
LICENCES = {
    STDLIB: "PSF-2.0", "torch": "BSD-3-Clause", "numpy": "BSD-3-Clause", "sympy": "BSD-3-Clause",
    "mpmath": "BSD-3-Clause", "networkx": "BSD-3-Clause", "jinja2": "BSD-3-Clause",
    "fsspec": "BSD-3-Clause", "setuptools": "MIT",
}  # fmt: skip
SKIPPED = {"site-packages", "dist-packages", "test", "tests", "_vendor", "lib2to3", "idlelib"}
PLAIN = {  # modules whose names a self-contained function may use
    "bisect", "collections", "datetime", "functools", "heapq", "itertools", "math", "operator",
    "random", "re", "string", "typing",
}  # fmt: skip


def words(text: str) -> list[str]:
    """Cut a text into words, numbers and signs, as the check for overlap counts them."""
    return re.findall(r"\w+|[^\w\s]", text)


def grams(text: str) -> set[tuple[str, ...]]:
    found = words(text)
    return {tuple(found[i : i + GRAM]) for i in range(len(found) - GRAM + 1)}


def plain_imports(tree: ast.Module) -> dict[str, str]:
    """Return by name the line that imports it, of what a self-contained function may use."""
    lines = {}
    for node in tree.body:
        if isinstance(node, ast.Import):
            for each in node.names:
                if each.name in PLAIN:
                    lines[each.asname or each.name] = ast.unparse(ast.Import([each]))
        elif isinstance(node, ast.ImportFrom) and node.module in PLAIN and not node.level:
            for each in node.names:
                name = each.asname or each.name
                lines[name] = ast.unparse(ast.ImportFrom(node.module, [each], 0))
    return lines


def free_names(function: ast.FunctionDef) -> set[str]:
    """Return the names that a function reads and does not set, builtins left out."""
    bound, read = set(dir(builtins)), set()
    for node in ast.walk(function):
        if isinstance(node, ast.Name):
            (read if isinstance(node.ctx, ast.Load) else bound).add(node.id)
        elif isinstance(node, ast.arg):
            bound.add(node.arg)
        elif isinstance(node, (ast.FunctionDef, ast.ExceptHandler)) and node.name:
            bound.add(node.name)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            bound |= {(each.asname or each.name).partition(".")[0] for each in node.names}
    return read - bound


def functions_in(source: str) -> Iterator[dict[str, str]]:
    """Yield imports, signature, docstring and body of each self-contained function."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old escapes in old modules
        tree = ast.parse(source)
    imports, lines = plain_imports(tree), source.splitlines()
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef) or node.decorator_list:
            continue
        first, free = node.body[0], free_names(node)
        returns = any(isinstance(n, ast.Return) and n.value for n in ast.walk(node))
        method = node.args.args[:1] and node.args.args[0].arg in ("self", "cls")
        alone = first.lineno > node.lineno and len(node.body) > 1 and free <= set(imports)
        if method or not alone or not returns or not ast.get_docstring(node):
            continue
        whole = textwrap.dedent("\n".join(lines[node.lineno - 1 : node.end_lineno])).split("\n")
        start, end = first.lineno - node.lineno, first.end_lineno - node.lineno + 1
        yield {
            "imports": "".join(f"{line}\n" for line in sorted({imports[name] for name in free})),
            "signature": "\n".join(whole[:start]),
            "docstring": "\n".join(whole[start:end]),
            "body": "\n".join(whole[end:]).strip("\n"),
        }


def library_functions() -> Iterator[dict[str, str]]:
    """Yield every self-contained function once, with its package."""
    seen = set()
    for package in LICENCES:
        if package == STDLIB:
            root = Path(sysconfig.get_path("stdlib"))
        else:
            spec = importlib.util.find_spec(package)
            if spec is None or not spec.submodule_search_locations:
                continue
            root = Path(spec.submodule_search_locations[0])
        for file in sorted(root.rglob("*.py")):
            if SKIPPED & set(file.relative_to(root).parts):
                continue
            try:
                found = list(functions_in(file.read_text(encoding="utf-8")))
            except (SyntaxError, UnicodeDecodeError, ValueError):
                continue
            for function in found:
                if function["body"] not in seen:
                    seen.add(function["body"])
                    yield {"package": package, **function}


def without_overlap(
    functions: Iterable[dict[str, str]], texts: Iterable[str]
) -> tuple[list[dict[str, str]], dict[str, Any]]:
    """Leave out functions that share `GRAM` tokens in a row with a text; return a report too."""
    known = set().union(*map(grams, texts))
    kept, removed = [], []
    for each in functions:
        whole = "\n".join(each[part] for part in ("imports", "signature", "docstring", "body"))
        (removed if grams(whole) & known else kept).append(each)
    counts = [Counter(each["package"] for each in some) for some in (kept, removed)]
    return kept, {
        "tokens_in_a_row": GRAM,
        "kept": len(kept),
        "removed": len(removed),
        "packages": {
            package: {"licence": licence, "kept": counts[0][package], "removed": counts[1][package]}
            for package, licence in LICENCES.items()
        },
        "removed_functions": [f"{each['package']}: {each['signature']}" for each in removed],
    }
