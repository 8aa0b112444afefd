"""Lines that tokenizers disagree about, and small vocabularies trained on them."""

import argparse
import inspect
import random

ODD = [
    "0123456789 3.14 1,000,000 ² ½ ٣٤٥ 12345 x1 1x",
    "don't we'll I'M they'Re 'Tis O'Neil",
    "naïve café Ünïcödé é ﬁ Ⅷ ſ's",
    "日本語のテキスト、漢字。中文分词测试",
    "Привет, мир! 123абв",
    "مرحبا بالعالم ١٢٣",
    "👩\u200d👩\u200d👧\u200d👦 🏳️\u200d🌈 🙂🙂 👍🏽",
    "\xa0\u2003\u200b\ufeff a",
    "\x00\x01\x7f\x85\u2028",
    "<s>",
    "</s>",
    "a</s>b",
    "<|user|> hi <|end|>\n",
    " <s> x </s> ",
    "<0x0A>",
    "▁ ▁▁a",
    "Ġhello Ċ",
    "\t\tif x==1:\n\t\t\treturn y  # comment\r\n\r\n",
    "a\n\n\nb \n c",
    "camelCaseWord HTTPServer v2beta",
    "$100+<=>^~|*&%#@!?",
    "...---...",
    "        indented",
    "http://a.b/c?d=e&f=g",
    "ไทย ภาษา",
    "हिन्दी में",
]


def lines(count=1000):
    """Return lines of code, digits, several scripts, control characters and odd spaces."""
    r = random.Random(0)
    code = inspect.getsource(argparse).splitlines()
    found = ["", " ", "  ", "   ", "\n", "a", " a", "  a  b   ", *ODD]
    while len(found) < count:
        line = r.choice(code)
        kind = r.randrange(6)
        if kind == 1:
            line = " " * r.randrange(4) + r.choice(ODD) + " " * r.randrange(3) + line.strip()
        elif kind == 2:
            line = "".join(r.choice([*ODD, " ", "\n"])[:6] for _ in range(6))
        elif kind == 3:
            line = str(r.randrange(10**9)) + line.strip().upper() + " " * r.randrange(4)
        elif kind == 4:
            line = "".join(
                chr(r.choice([r.randrange(32, 127), r.randrange(0x2000)])) for _ in "_" * 12
            )
        found.append(line)
    return found
