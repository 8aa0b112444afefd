"""Generated pages are what the code says now; `python tests/docs_pages.py` writes them anew."""

import re

import pytest
from docs_pages import DOCS, PAGES, ROOT


@pytest.mark.parametrize("name", PAGES)
def test_a_generated_page_is_up_to_date(name):
    assert (DOCS / name).read_text(encoding="utf-8") == PAGES[name](), (
        f"docs/{name} differs from the code; run python tests/docs_pages.py"
    )


def test_the_site_has_every_page():
    named = re.findall(r"^      - .*: (.*\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M)
    assert sorted(named) == sorted(file.name for file in DOCS.glob("*.md"))
