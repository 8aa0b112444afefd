"""Pages of docs/ that are made from the code: run this file to write them anew."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"


def llms():
    """Return docs/llms.txt: the site's pages in its order, each with its first sentence."""
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    lines = ["# minilora", "", f"> {re.search('site_description: (.*)', text).group(1)}."]
    for line in text.partition("nav:\n")[2].splitlines():
        if section := re.match(r"  - (.*):$", line):
            lines += ["", f"## {section.group(1)}", ""]
        elif page := re.match(r"      - (.*): (.*)$", line):
            lines.append(f"- [{page.group(1)}]({page.group(2)}): {first_sentence(page.group(2))}")
    return "\n".join(lines) + "\n"


def first_sentence(page):
    """Return the first sentence of a page's text, without its links."""
    text = (DOCS / page).read_text(encoding="utf-8").partition("\n\n")[2]
    text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", " ".join(text.partition("\n\n")[0].split()))
    return re.split(r"(?<=[.?])\s(?=[A-Z])", text)[0].rstrip(":")


PAGES = {"llms.txt": llms}

if __name__ == "__main__":
    for name, make in PAGES.items():
        (DOCS / name).write_text(make(), encoding="utf-8")
