"""Rows of benchmarks/results/*.csv, and Markdown tables of them with their conditions."""

import csv
import re
from collections.abc import Iterable
from pathlib import Path

HERE = Path(__file__).resolve().parent
Row = dict[str, str]
MACHINES = {  # part of the processor's name, and the flag that tells
    "Xeon, AMX": ("Intel", "amx"),
    "EPYC, AVX-512": ("family 25", "avx512_bf16"),
    "EPYC, AVX2": ("family 23", "avx2"),
}


def read(name: str, **wanted: str) -> list[Row]:
    """Return a file's rows with these values, but for those of a changed tree."""
    with open(HERE / "results" / f"{name}.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return [
        row
        for row in rows
        if not (row.get("commit") or "").endswith("-dirty")
        and all(row[key] == value for key, value in wanted.items())
    ]


def newest(rows: list[Row], *keys: str) -> list[Row]:
    """Return the rows that agree in some fields with the last one."""
    return [row for row in rows if all(row[key] == rows[-1][key] for key in keys)]


def measured_on(where: str, rows: Iterable[Row]) -> list[Row]:
    """Return the rows of one of `MACHINES`."""
    processor, flag = MACHINES[where]
    return [row for row in rows if processor in row["processor"] and flag in row["flags"]]


def last_of(rows: Iterable[Row], key: str) -> dict[str, Row]:
    """Return the last row for each value of a field."""
    return {row[key]: row for row in rows}


def table(head: str, rows: Iterable[Iterable[object]]) -> str:
    """Return a Markdown table; `head` names its columns between bars. Numbers go to the right."""
    names, cells = head.split(" | "), [[str(cell) for cell in row] for row in rows]
    numbers = (all(re.match(r"[-+≥≤–]? ?\d|–?$", cell) for cell in column)
               for column in zip(*cells, strict=True))  # fmt: skip
    marks = ["---:" if number else "---" for number in numbers]
    return "".join(f"| {' | '.join(row)} |\n" for row in [names, marks, *cells])


def machine(row: Row) -> str:
    """Return a processor in a few words."""
    name = "Xeon" if row["processor"].startswith("Intel") else "EPYC"
    if "family 23" in row["processor"]:
        name += " of the first generation"
    elif "family 25" in row["processor"]:
        name += f" of the {'third' if row['flags'] == 'avx2' else 'fourth'} generation"
    flags = row.get("flags", "")
    for flag, text in (("amx", "AMX"), ("avx512_bf16", "AVX-512"), ("avx2", "AVX2 alone")):
        if flag in flags:
            return f"{name}, {text}"
    return name


def caption(text: str, rows: list[Row]) -> str:
    """Return a line of conditions: the text, then machine, torch, commits and dates of rows."""
    last = rows[-1]
    parts = [
        text[:1].upper() + text[1:],
        f"{machine(last)}, {last['threads']} thread{'s' * (last['threads'] != '1')}, torch "
        f"{last['torch']}",
    ]
    if last.get("commit"):
        parts.append("commit " + " and ".join(dict.fromkeys(row["commit"] for row in rows)))
    if last.get("date"):
        parts.append(last["date"])
    return f"*{'; '.join(part for part in parts if part)}.*\n\n"
