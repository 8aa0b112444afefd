"""Hold the sizes of files and functions; exit 1 where one is exceeded.

A file has at most 400 lines, a function at most 60 lines of code (no docstring, comment or blank
line counted). Exceptions stand here with their reason.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FILE, FUNCTION = 400, 60
EXCEPTIONS: dict[str, str] = {}


def code_lines(function: ast.AST, lines: list[str]) -> int:
    """Return the lines of a function that are code; a signature counts as one."""
    body = function.body  # type: ignore[attr-defined]
    first = body[0]
    if isinstance(first, ast.Expr) and isinstance(getattr(first.value, "value", None), str):
        body = body[1:]
    if not body:
        return 1
    inside = lines[body[0].lineno - 1 : function.end_lineno]  # type: ignore[attr-defined]
    return 1 + sum(bool(line.strip()) and not line.strip().startswith("#") for line in inside)


def exceeded() -> Iterator[str]:
    """Yield what is too long and no exception."""
    files = [*(ROOT / "minilora").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]
    for file in sorted(files):
        name = file.relative_to(ROOT).as_posix()
        lines = file.read_text(encoding="utf-8").splitlines()
        if len(lines) > FILE and name not in EXCEPTIONS:
            yield f"{name}: {len(lines)} lines, at most {FILE}"
        for node in ast.walk(ast.parse("\n".join(lines))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                count, key = code_lines(node, lines), f"{name}:{node.name}"
                if count > FUNCTION and key not in EXCEPTIONS:
                    yield f"{key}: {count} lines of code, at most {FUNCTION}"


if __name__ == "__main__":
    found = list(exceeded())
    print("\n".join(found) or "no file or function exceeds its limit")
    sys.exit(1 if found else 0)
