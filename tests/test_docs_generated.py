"""Generated pages are what the code says now, tables what the CSVs say; `minilora docs` prints."""

import re

import pytest
import tables
from docs_pages import DOCS, PAGES, ROOT

from minilora.cli.command import main

ALL = sorted(DOCS.glob("*.md"))


@pytest.mark.parametrize("name", PAGES)
def test_a_generated_page_is_up_to_date(name):
    assert (DOCS / name).read_text(encoding="utf-8") == PAGES[name](), (
        f"docs/{name} differs from the code; run PYTHONPATH=tests python tests/docs_pages.py"
    )


@pytest.mark.parametrize("page", tables.PAGES, ids=lambda page: page.stem)
def test_the_tables_of_a_page_are_the_files(page):
    text = page.read_text(encoding="utf-8")
    assert text == tables.render(text), "run PYTHONPATH=benchmarks python benchmarks/tables.py"


def test_the_benchmarks_page_has_no_table_of_its_own():
    text = (DOCS / "benchmarks.md").read_text(encoding="utf-8")
    assert not re.search(r"^\|", re.sub(r"<!-- table: .*?<!-- end -->", "", text, flags=re.S), re.M)


def test_the_site_has_every_page():
    named = re.findall(r"^      - .*: (.*\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M)
    assert sorted(named) == [page.name for page in ALL]


def test_docs_prints_a_page_or_names_the_nearest(capsys):
    assert main(["docs"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in listed] == [page.stem for page in ALL]
    assert main(["docs", "benchmarks"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("# Benchmarks\n") and "<!--" not in said and "| goal |" in said
    assert main(["docs", "quantised"]) == 2
    assert "lists, found 'quantised'; nearest: quantized-bases" in capsys.readouterr().err
