"""Pages of docs/ that are made from the code: run this file to write them anew."""

import argparse
import inspect
import re
from pathlib import Path

import minilora
from minilora.cli.command import build_parser

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
MARK = "<!-- written by tests/docs_pages.py from here on -->\n"


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
    return re.split(r"(?<=[.?])\s(?=[A-Z`])", text)[0].rstrip(":")


# --- docs/cli.md --------------------------------------------------------------------------------


def cli():
    """Return docs/cli.md: every verb of the command, with all its arguments."""
    (verbs,) = [a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction)]
    about = {action.dest: action.help for action in verbs._choices_actions}
    lines = [
        "# The `minilora` command",
        "",
        "All commands with all their arguments; `minilora COMMAND --help` prints the same.",
        "",
        *table("command | what it does", [
            (f"[`minilora {name}`](#minilora-{name})", f"{about[name]}.") for name in verbs.choices
        ]),
    ]  # fmt: skip
    for name, parser in verbs.choices.items():
        shown = [a for a in parser._actions if a.help != argparse.SUPPRESS]
        actions = [a for a in shown if not isinstance(a, argparse._HelpAction)]
        usage = " ".join(["minilora", name, *(written(a) for a in actions if needed(a))])
        lines += ["", f"## `minilora {name}`", "", f"{about[name]}.", "", "```text", usage, "```"]
        plain, *named = parser._action_groups[1:]
        groups = {"": parser._action_groups[0]._group_actions + plain._group_actions}
        groups |= {group.title: group._group_actions for group in named}
        for title, some in groups.items():
            rows = [(spelled(a), explained(a)) for a in some if a in actions]
            lines += ["", f"### Of the {title}"] * bool(title)
            lines += ["", *table("argument | what it is", rows)] * bool(rows)
    return "\n".join(lines) + "\n"


def needed(action):
    return not action.option_strings or action.required


def value(action, long=False):
    """Return how the value of an argument is written, '' of a switch."""
    if action.nargs == 0:
        return ""
    name = action.metavar or action.dest.upper()
    if action.choices and action.metavar is None:
        name = "{" + ",".join(map(str, action.choices)) + "}" if long else "NAME"
    name = name if isinstance(name, str) else " ".join(name)
    name = " ".join([name] * action.nargs) if isinstance(action.nargs, int) else name
    return {"?": f"[{name}]", "*": f"[{name} ...]", "+": f"{name} ..."}.get(action.nargs, name)


def written(action):
    """Return an argument as a line of usage has it."""
    words = [*action.option_strings[:1], value(action, long=True)]
    return " ".join(words)


def spelled(action):
    """Return the names of an argument as code, the last with its value."""
    names = list(action.option_strings) or [value(action)]
    if action.option_strings and not isinstance(action, argparse.BooleanOptionalAction):
        names[-1] = f"{names[-1]} {value(action)}".strip()
    return ", ".join(f"`{name}`" for name in names)


def explained(action):
    text = " ".join((action.help or "").replace("%%", "%").split()).replace("|", r"\|")
    if action.choices and action.metavar is None:
        text += f"; one of {', '.join(map(str, action.choices))}"
    if action.option_strings and action.default not in (None, False, argparse.SUPPRESS, (), []):
        text += "" if "default" in text else f" (default: {action.default})"
    return text.removeprefix("; ").strip()


def table(head, rows):
    names = head.split(" | ")
    lines = [names, ["---"] * len(names), *rows]
    return [f"| {' | '.join(line)} |" for line in lines]


# --- docs/api.md --------------------------------------------------------------------------------


def api():
    """Return docs/api.md: its guide as it stands, then each public name with its docstring."""
    guide = (DOCS / "api.md").read_text(encoding="utf-8").partition(MARK)[0]
    parts = [entry(name) for name in sorted(minilora.__all__, key=str.lower)]
    return f"{guide}{MARK}\n## Reference\n\n" + "\n".join(parts)


def entry(name):
    """Return the section of one name."""
    thing = getattr(minilora, name)
    call = f"minilora.{name}({signature(thing)})"
    return f"### `{name}`\n\n```text\n{call}\n```\n\n{body(inspect.getdoc(thing))}"


def signature(thing):
    """Return the parameters with their defaults, one a line where they are many."""
    parts, star = [], False
    for name, p in inspect.signature(thing).parameters.items():
        star_here = p.kind is p.KEYWORD_ONLY and not star
        star = star or p.kind in (p.KEYWORD_ONLY, p.VAR_POSITIONAL)
        prefix = {p.VAR_POSITIONAL: "*", p.VAR_KEYWORD: "**"}.get(p.kind, "")
        default = "" if p.default is p.empty else f"={p.default!r}"
        parts += ["*"] * (star_here and p.kind is not p.VAR_POSITIONAL) + [prefix + name + default]
    line = ", ".join(parts)
    return line if len(line) < 70 else "\n    " + ",\n    ".join(parts) + ",\n"


def body(text):
    """Return a docstring as Markdown: its lists of arguments as lists, its examples as code."""
    lines, out, section = text.splitlines(), [], None
    for line in lines:
        if re.match(r"^[A-Z][a-z]+:$", line):
            section = line[:-1]
            out += [f"**{section}**", ""]
        elif section and line and not line.startswith(" "):
            section = None
            out += ["", line]
        elif section not in (None, "Returns") and (
            found := re.match(r"^    (\w[\w, ]*): (.*)", line)
        ):
            out.append(f"- `{found.group(1)}`: {found.group(2)}")
        elif section and line.startswith("     "):
            out.append("  " + line.strip())
        else:
            out.append(line.removeprefix("    ") if section else line)
    text = "\n".join(out).strip() + "\n"
    return re.sub(r"(?m)(^>>> .*\n(?:^\.\.\. .*\n)*)+", lambda m: fence(m.group()), text)


def fence(code):
    return "```text\n" + re.sub(r"(?m)^(>>>|\.\.\.) ", "", code) + "```\n"


PAGES = {"cli.md": cli, "api.md": api, "llms.txt": llms}

if __name__ == "__main__":
    for name, make in PAGES.items():
        (DOCS / name).write_text(make(), encoding="utf-8")
