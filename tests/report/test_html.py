"""report.html: self-contained, escaped, and looked at by a real browser where there is one."""

import re
from collections.abc import Iterator
from functools import cache
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest

from exporter.report.html import TEMPLATES, html_page, visible
from tests.report.browser import CHROMIUM, Page, browser
from tests.report.conftest import VERIFICATIONS

VOID = {"meta", "link", "br", "img", "hr", "input"}


class Outline(HTMLParser):
    """Checks that tags nest, and collects ids, references and the visible text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.tags: set[str] = set()
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag not in VOID:
            self.open.append(tag)
        for key, value in attrs:
            if key == "id":
                self.ids.append(value or "")
            if key in ("href", "xlink:href", "src"):
                self.references.append(value or "")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] not in (["style"], ["script"]):
            self.text += data


@cache
def page_of(name: str) -> str:
    return html_page(VERIFICATIONS[name]())


def outline(page: str) -> Outline:
    parser = Outline()
    parser.feed(page)
    parser.close()
    assert parser.open == []
    return parser


@pytest.mark.parametrize("name", ["failing", "passing", "unsure", "empty"])
def test_the_page_stands_alone(name: str) -> None:
    page = page_of(name)
    found = outline(page)
    assert "script" not in found.tags
    assert all(reference.startswith(("#", "data:,")) for reference in found.references)
    assert len(found.ids) == len(set(found.ids))
    assert {r[1:] for r in found.references if r.startswith("#")} <= set(found.ids)
    assert set(re.findall(r"url\(#([^)]*)\)", page)) <= set(found.ids)
    assert not re.findall(r"url\((?!#)", page)
    assert "@import" not in page


def test_the_verdict_stands_first_then_what_failed_by_how_much_and_where() -> None:
    text = " ".join(outline(page_of("failing")).text.split())
    body = text[text.index("1 of 2 bundles does not say") - 10 :]
    order = ["FAIL", "1 of 2 bundles does not say", "What went wrong", "weights.projection", "25 x the limit"]
    order += [
        "Where it comes from",
        "arises in the merge",
        "block 3",
        "h.3.attn.c_attn.weight",
        "96 % of the error from truth to bundle comes from the stored weights (M32 -> F)",
    ]
    order += [
        "What to do",
        "Merge again",
        "How far each token is",
        "Gates",
        "Proof that the check can fail",
        "worst tokens",
    ]
    places = [body.index(word) for word in order]
    assert places == sorted(places)
    assert "survived" in text


def test_what_to_do_follows_from_the_gate() -> None:
    text = " ".join(outline(page_of("unsure")).text.split())
    assert "could not be judged" in text
    assert "Use a wider precision" in text  # the adapter is too small beside the rounding
    assert "What went wrong" not in page_of("passing")


def test_texts_of_models_are_escaped() -> None:
    page = page_of("failing")
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    assert page.count('<p class="context">') == 40  # 20 worst tokens of each bundle


def test_what_cannot_be_seen_is_shown_by_number() -> None:
    assert visible("a\nb\tc \u202ed\x07é🙂") == "a⏎b⇥c \\u202ed\\u0007é🙂"


def test_plots_take_their_colours_from_the_page() -> None:
    page = page_of("passing")
    assert page.count("<svg") == 16  # 7 of each bundle, and what 8 bits do
    drawings = page[page.index("<svg") :]
    assert "var(--ink)" in drawings
    assert "var(--first)" in drawings
    assert not re.findall(r"(?:fill|stroke): ?#(?!none)[0-9a-f]{6}", drawings)


def test_plots_have_units_limits_and_words_for_those_who_do_not_see_them() -> None:
    page = page_of("failing")
    words = [unescape(one) for one in re.findall(r'<svg role="img" aria-label="([^"]*)"', page)]
    assert len(words) == page.count("<svg")
    assert "Means in nats: truth to bundle 3e-7, reference to bundle 0.00026" in words[0]
    assert "graph.kl 0.001" in words[0]
    assert "the stored weights (M32 -> F) 96.0 %" in words[1]
    assert "Weights beyond the limits: h.3.attn.c_attn.weight" in words[2]
    assert "Largest local: block 3, 4e-5." in words[3]
    assert "Named as the origin: block 3." in words[3]
    assert "10 % with head" in words[4]
    assert "Limit: 0.002" in words[6]
    assert "8-bit weights (T -> D) 70.0 %; 8-bit activations (D -> R) 30.0 %" in words[14]
    assert "from 0.6 to 0.95" in words[15]
    for label in ("KL of a token, nats (log scale)", "share of the error, %", "position in the document, tokens"):
        assert label in page
    assert page.count("mean KL T-O, nats (log scale)") == 2


def palettes() -> list[tuple[str, dict[str, str]]]:
    """The colours of each scheme: light, dark and print."""
    style = (TEMPLATES / "report.css").read_text()
    blocks = [
        dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block)) for block in re.findall(r":root \{(.*?)\}", style, re.S)
    ]
    light, dark, paper = blocks
    return [("light", light), ("dark", light | dark), ("print", light | paper)]


def luminance(colour: tuple[float, ...]) -> float:
    """Relative luminance of an sRGB colour, WCAG 2.2."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def rgb(colour: str) -> tuple[float, ...]:
    return tuple(int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))


def mixed(share: float, colour: str, ground: str) -> tuple[float, ...]:
    """color-mix(in srgb, colour share, transparent) over `ground`."""
    return tuple(share * a + (1 - share) * b for a, b in zip(rgb(colour), rgb(ground), strict=True))


def contrast(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize(("scheme", "colours"), palettes())
def test_contrast_is_wcag_aa(scheme: str, colours: dict[str, str]) -> None:
    assert contrast(rgb("#ffffff"), rgb("#000000")) == pytest.approx(21)
    card, paper = colours["card"], colours["paper"]
    for name in ("ink", "quiet", "first", "bad", "good", "unsure"):  # text
        assert contrast(rgb(colours[name]), rgb(card)) >= 4.5, name
        assert contrast(rgb(colours[name]), rgb(paper)) >= 4.5, name
    for name in ("bad", "good", "unsure", "quiet"):  # badges, on 12 % of their own colour
        assert contrast(rgb(colours[name]), mixed(0.12, colours[name], card)) >= 4.5, name
    if scheme != "print":  # the verdict, on a fill
        for name in ("bad", "good", "unsure"):
            assert contrast(rgb(colours["on-fill"]), rgb(colours[name])) >= 4.5, name
    assert contrast(rgb(colours["ink"]), mixed(0.28, colours["second"], card)) >= 4.5  # a marked token
    assert contrast(rgb(colours["quiet"]), mixed(0.35, colours["line"], card)) >= 4.5  # a token among quiet words
    for name in ("first", "second", "third", "bad"):  # lines of plots
        assert contrast(rgb(colours[name]), rgb(card)) >= 3, name


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    if CHROMIUM is None:
        pytest.skip("no chromium: the page is not looked at")
    with browser(tmp_path_factory.mktemp("chromium")) as opened:
        yield opened


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("name", ["failing", "passing", "unsure", "empty"])
def test_a_browser_renders_it(name: str, width: int, scheme: str, page: Page, tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    file.write_text(page_of(name), encoding="utf-8")
    page.complaints.clear()
    page.requests.clear()
    page.open(file, width, scheme)
    assert page.complaints == []
    assert [one for one in page.requests if one != file.as_uri() and not one.startswith("data:,")] == []
    assert page.evaluate("innerWidth") == width
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    # Nothing sticks out of its box but what a scrolling box holds.
    assert page.evaluate(STICKING_OUT) == []
    assert page.evaluate("getComputedStyle(document.querySelector('h1')).fontSize") >= "26px"
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert ground == {"light": "rgb(246, 246, 243)", "dark": "rgb(17, 20, 24)"}[scheme]
    if name != "empty":
        smallest = page.evaluate(SMALLEST_TYPE)
        assert smallest >= 8.5, f"{smallest} px"
        assert page.evaluate("[...document.querySelectorAll('svg')].every(s => s.getBoundingClientRect().height > 80)")


def test_it_prints_with_everything_open(page: Page, tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    file.write_text(page_of("failing"), encoding="utf-8")
    page.open(file, 1280, "dark")
    assert page.pdf().startswith(b"%PDF")
    page.call("Emulation.setEmulatedMedia", media="print", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    hidden = "[...document.querySelectorAll('details table, details ol')].filter(e => !e.checkVisibility()).length"
    assert page.evaluate(hidden) == 0
    page.call("Emulation.setEmulatedMedia", media="")


STICKING_OUT = """[...document.querySelectorAll('main *')]
  .filter(e => !e.closest('.wide *') && !e.closest('svg') && e.checkVisibility())
  .filter(e => e.getBoundingClientRect().right > document.documentElement.clientWidth + 0.5)
  .map(e => e.tagName + '.' + e.className)"""
SMALLEST_TYPE = """Math.min(...[...document.querySelectorAll('svg text')].map(t => {
  const svg = t.ownerSVGElement;
  return parseFloat(getComputedStyle(t).fontSize) * svg.getBoundingClientRect().width / svg.viewBox.baseVal.width;
}))"""
