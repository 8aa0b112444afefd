"""`minilora docs`."""

import argparse
import re
from pathlib import Path

import minilora
from minilora.cli.arguments import arg, verb
from minilora.files import nearest, short


def _folder() -> Path:
    """Return where the pages lie: in the package, or beside it in a clone of the repository."""
    package = Path(minilora.__file__).parent
    return next(there for there in (package / "docs", package.parent / "docs") if there.is_dir())


@verb("docs", arg("topic", nargs="?", metavar="TOPIC", help="a page's name; without it, the list"))
def docs(options: argparse.Namespace) -> int:
    """Print a page of the documentation."""
    pages = {file.stem: file for file in sorted(_folder().glob("*.md"))}
    if options.topic is None:
        for name, file in pages.items():
            print(f"{name:<16} {file.read_text(encoding='utf-8').partition(chr(10))[0][2:]}")
        return 0
    if options.topic not in pages:
        raise ValueError(
            f"TOPIC must be a page that `minilora docs` lists, found {short(options.topic)}"
            f"{nearest(options.topic, pages)}"
        )
    text = pages[options.topic].read_text(encoding="utf-8")
    print(re.sub(r"<!--.*?-->\n*", "", text))
    return 0
