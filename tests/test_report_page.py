"""The page: complete, self-contained, well formed, and drawn by a browser where there is one."""

import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image
from report_models import Letters, causal, filled, kinds, sentences

import minilora
from minilora.report.page import page
from minilora.report.plots import arrows, bars, heat_map, spectra, ticks, two_lines

VOID = {"meta", "br", "img", "link", "input", "hr"}
BROWSER = next((p for p in map(shutil.which, ("chromium", "google-chrome", "chrome")) if p), None)


def explained(**options):
    model = causal()
    minilora.inject(model, r=2, alpha=3, adapter="v2", targets=["q_proj"], dtype=torch.float64)
    filled(model, "v2", seed=2)
    options = {"data": sentences(4), "train": sentences(4, seed=1), "outside": sentences(3, seed=2),
               "words": ["b"], "tokenizer": Letters(), "against": "v2",
               "about": {"adapter": "out/v1"}} | options  # fmt: skip
    return minilora.explain(model, "default", **options)


@pytest.fixture(scope="module")
def whole():
    return explained()


class Checker(HTMLParser):
    """Require every element closed in order; collect tags, attributes and text."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.words = [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def parsed(text):
    checker = Checker()
    checker.feed(text)
    checker.close()
    assert checker.open == []
    return checker


def test_page_is_well_formed_and_loads_nothing(whole, tmp_path):
    text = whole.to_html(tmp_path / "page.html").read_text(encoding="utf-8")
    assert text == page(whole)
    found = parsed(text)
    assert not re.search(r"https?:|//[a-z]|url\(|@import|<script|<link|<img|<iframe", text)
    assert not any(
        key in ("src", "href") or key.startswith("on") for _, a in found.tags for key in a
    )
    (policy,) = [a["content"] for t, a in found.tags if a.get("http-equiv")]
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"
    assert ("html", {"lang": "en"}) in found.tags


def test_page_shows_every_part(whole):
    text = " ".join("".join(parsed(page(whole)).words).split())
    for words in (
        "What adapter out/v1 changed", "held-out data4 examples",
        "8 layers of rank 3; W is a layer's weight",
        "The median layer keeps", "at rank 1, 2, …",
        "Loss without and with the adapter", "held out", "training",
        "outside the task", "Where it changed the model", "Singular values of the change",
        "Ranks it needs", "minilora.inject(model, r=", "Directions the base did not have",
        "Which parts matter", "blocks: gain of one alone", "kinds of modules: rise without it",
        "Token by token", "Helped most", "Hurt most", "Attention on chosen words",
        "default and v2", "In words and figures", "All 8 layers", "All ablations",
    ):  # fmt: skip
        assert words in text, words
    for layer in whole.layers:
        assert layer.name in text


def test_page_leaves_out_what_was_not_measured():
    model = kinds(bias="all")
    text = page(minilora.explain(model))
    parsed(text)
    for words in ("Token by token", "Which parts", "Loss without", "Attention", "forget"):
        assert words not in text
    assert "Trained copies of base parameters" in text
    assert "Directions" in text and "Directions" not in page(minilora.explain(model, largest=0))


def test_page_escapes_what_comes_from_outside(whole):
    class Evil:
        def decode(self, ids, skip_special=True):
            return "<script>alert('&')</script>" * len(ids)

        def encode(self, text, special=True):
            return [2]

    text = page(explained(tokenizer=Evil(), words=["<b>"]))
    parsed(text)
    assert "<script" not in text and "<b>&" not in text and "&lt;script&gt;" in text
    assert "&lt;b&gt;" in text


def test_page_tells_plots_in_words(whole):
    """Every drawing has a role, a title and a description that its label points to."""
    drawings = re.findall(r"<svg.*?</svg>", page(whole), re.S)
    assert len(drawings) >= 12
    seen = set()
    for drawing in drawings:
        root = ElementTree.fromstring(drawing)
        assert root.get("role") == "img"
        names = root.get("aria-labelledby").split()
        assert [root[i].get("id") for i in (0, 1)] == names
        assert root[0].text and root[1].text
        assert not seen & set(names)
        seen |= set(names)


def test_heat_map_fills_a_cell_per_value():
    values = {("q", "0"): 1.0, ("q", "1"): 0.0, ("v", "0"): float("inf")}
    root = ElementTree.fromstring(
        heat_map("Size", ["0", "1"], ["q", "v"], values, str, numbers=True)
    )
    cells = [e for e in root if e.get("class") == "cell"]
    assert [c[0].text for c in cells] == ["q, 0: 1.0", "q, 1: 0.0", "v, 0: inf"]
    shades = [float(c.get("fill-opacity")) for c in cells]
    assert shades == [0.56, 0.06, 0.56]
    assert "the largest is inf at v, 0" in root[1].text
    assert "no values" in heat_map("Size", ["0"], ["q"], {}, str)
    pale = ElementTree.fromstring(heat_map("New", ["0"], ["q"], {("q", "0"): 0.05}, str, top=0.5))
    shade = next(float(e.get("fill-opacity")) for e in pale if e.get("class") == "cell")
    assert shade == pytest.approx(0.06 + 0.94 * 0.1), "small beside what would count"
    assert any(e.text == "0 to 0.5" for e in pale)


def test_a_few_loud_layers_do_not_set_the_scale():
    nothing = {("q", "0"): 0.0, ("q", "1"): 0.0}  # as after a run that no evaluation found better
    assert "0 to 1.0" in heat_map("Size", ["0", "1"], ["q"], nothing, str, cap=True)
    values = {("q", str(i)): 1.0 + i / 100 for i in range(29)} | {("q", "29"): 40.0}
    columns = [str(i) for i in range(30)]
    root = ElementTree.fromstring(heat_map("Size", columns, ["q"], values, str, cap=True))
    cells = [e for e in root if (e.get("class") or "").startswith("cell") and len(e)]
    outlined = [e[0].text for e in cells if e.get("class") == "cell above"]
    assert outlined == ["q, 27: 1.27", "q, 28: 1.28", "q, 29: 40.0"]
    assert min(float(e.get("fill-opacity")) for e in cells) > 0.7
    (legend,) = [e.text for e in root if (e.text or "").startswith("0 to ")]
    assert legend == "0 to 1.26; outlined: 3 above, up to 40.0"
    calm = heat_map("Size", columns, ["q"], values | {("q", "29"): 1.3}, str, cap=True)
    assert "0 to 1.3<" in calm and "above" not in calm


def test_spectra_fall_where_values_fall():
    root = ElementTree.fromstring(spectra("q", [("a", 0, (4.0, 2.0, 1.0)), ("b", 1, (1.0, 0.0))]))
    first, second = [e for e in root if e.tag == "polyline"]
    heights = [float(point.split(",")[1]) for point in first.get("points").split()]
    assert heights[1] - heights[0] == pytest.approx(heights[2] - heights[1], abs=0.11)  # a log axis
    assert heights == sorted(heights)
    assert len(second.get("points").split()) == 1 and root.findall("circle")
    assert first.get("stroke") != second.get("stroke")
    assert "ΔW = 0" in spectra("q", [("a", 0, (0.0, 0.0))])


def test_bars_rise_and_hang_in_proportion():
    root = ElementTree.fromstring(bars("gain", ["a", "b", "c"], [0.2, -0.1, 0.0], [0.0, 0.05, 0.0]))
    up, down, none = (e for e in root if e.tag == "rect")
    assert float(up.get("height")) == pytest.approx(2 * float(down.get("height")), abs=0.2)
    zero = float(up.get("y")) + float(up.get("height"))
    assert float(down.get("y")) == pytest.approx(zero, abs=0.11)
    assert float(none.get("height")) < 1
    assert "the largest is a with +0.2000" in root[1].text
    ElementTree.fromstring(bars("gain", ["a long name"] * 9, [0.0] * 9, [0.0] * 9))


def test_arrows_point_from_before_to_after():
    root = ElementTree.fromstring(arrows("loss", [("x", 2.0, 1.0, "2 → 1"), ("y", 1.0, 1.5, "")]))
    better, worse = (e for e in root if (e.get("class") or "").endswith("thick"))
    assert float(better.get("x1")) > float(better.get("x2"))
    assert float(worse.get("x1")) < float(worse.get("x2"))
    assert [better.get("class"), worse.get("class")] == ["better thick", "worse thick"]
    ElementTree.fromstring(arrows("loss", [("x", 1.0, 1.0, "")]))


def test_two_lines_draw_both_sides():
    root = ElementTree.fromstring(two_lines("share", (0.1, 0.2), (0.2, 0.1), (0.1, 0.2), str))
    even, before, after = (e.get("points").split() for e in root if e.tag == "polyline")
    assert even == before
    assert before[0].split(",")[1] == after[1].split(",")[1] != before[1].split(",")[1]
    ElementTree.fromstring(two_lines("share", (0.1,), (0.2,), (0.15,), str))


@pytest.mark.parametrize("ends", [(0, 1), (-0.03, 0.021), (1234, 5678), (0, 1e-9), (-7, -5)])
def test_ticks_are_round_and_within(ends):
    found = ticks(*ends)
    assert 2 <= len(found) <= 6
    assert ends[0] - 1e-12 <= found[0] and found[-1] <= ends[1] + 1e-12
    steps = np.diff(found)
    assert steps == pytest.approx(steps[0])
    assert f"{steps[0]:.0e}"[0] in "125"
    assert ticks(3, 3) == [3]


@pytest.mark.skipif(BROWSER is None, reason="no chromium or chrome is installed")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_is_drawn_by_a_browser(whole, tmp_path, scheme):
    file, shot = whole.to_html(tmp_path / "page.html"), tmp_path / f"{scheme}.png"
    command = [
        BROWSER, "--headless", "--disable-gpu", "--hide-scrollbars", "--window-size=1040,1400",
        f"--blink-settings=preferredColorScheme={int(scheme == 'light')}",
        f"--user-data-dir={tmp_path / 'profile'}", "--no-first-run", f"--screenshot={shot}",
        file.as_uri(),
    ]  # fmt: skip
    if os.geteuid() == 0:  # its sandbox refuses root
        command.insert(1, "--no-sandbox")
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert shot.exists(), done.stderr
    pixels = np.asarray(Image.open(shot).convert("RGB")).astype(int)
    assert pixels.shape == (1400, 1040, 3)
    background = pixels[-1, 0]
    assert (background.mean() > 200) == (scheme == "light")
    accent = {"light": (0x0B, 0x66, 0xC3), "dark": (0x5A, 0xA9, 0xFF)}[scheme]
    drawn = (np.abs(pixels - accent).max(2) < 3).sum()
    assert drawn > 500  # the plots' own colour, from the arrows and the heat map
    assert (np.abs(pixels - background).max(2) > 60).mean() > 0.01  # and text to read
