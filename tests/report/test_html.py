"""report.html: self-contained, escaped, and looked at by a real browser where there is one."""

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from exporter.parity.result import Verification
from exporter.report.html import html_page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
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


def outline(page: str) -> Outline:
    parser = Outline()
    parser.feed(page)
    parser.close()
    assert parser.open == []
    return parser


@pytest.mark.parametrize("name", ["failing", "passing", "unsure", "empty"])
def test_the_page_stands_alone(name: str, request: pytest.FixtureRequest) -> None:
    page = html_page(request.getfixturevalue(name))
    found = outline(page)
    assert "script" not in found.tags
    assert all(reference.startswith(("#", "data:,")) for reference in found.references)
    assert len(found.ids) == len(set(found.ids))
    assert {r[1:] for r in found.references if r.startswith("#")} <= set(found.ids)
    assert set(re.findall(r"url\(#([^)]*)\)", page)) <= set(found.ids)
    assert not re.findall(r"url\((?!#)", page)
    assert "@import" not in page


def test_the_verdict_stands_first_then_what_failed_by_how_much_and_where(failing: Verification) -> None:
    text = " ".join(outline(html_page(failing)).text.split())
    order = ["FAIL", "What went wrong", "weights.projection", "25 x the limit", "h.3.attn.c_attn.weight", "Gates"]
    places = [text.index(word) for word in order]
    assert places == sorted(places)
    assert "storing the weights (M32 -> F) carries 96 % of the error" in text
    assert "survived" in text


def test_texts_of_models_are_escaped(failing: Verification) -> None:
    page = html_page(failing)
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    assert page.count('<li><span class="quiet">document') == 40  # 20 worst tokens of each bundle


def test_plots_take_their_colours_from_the_page(passing: Verification) -> None:
    page = html_page(passing)
    assert page.count("<svg") == 10
    drawings = page[page.index("<svg") :]
    assert "var(--ink)" in drawings
    assert "var(--first)" in drawings
    assert not re.findall(r"(?:fill|stroke): ?#(?!none)[0-9a-f]{6}", drawings)


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium: the page is not looked at")
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_renders_it_without_errors_or_sideways_scrolling(
    failing: Verification, tmp_path: Path, width: int
) -> None:
    assert CHROMIUM is not None
    page = html_page(failing)
    # A probe for this test alone: the page itself has no script.
    frame = (
        "<!doctype html><body style='margin:0'><iframe id=f style='border:0;width:{w}px;height:4000px' src=report.html>"
        "</iframe><pre id=out></pre><script>addEventListener('load',()=>{{const d=f.contentDocument.documentElement;"
        "out.textContent='WIDTH '+d.scrollWidth+' OF '+d.clientWidth+' SVG '+Math.min(...[...d.querySelectorAll('svg')]"
        ".map(s=>s.getBoundingClientRect().width))}})</script>"
    )
    (tmp_path / "report.html").write_text(page, encoding="utf-8")
    (tmp_path / "probe.html").write_text(frame.format(w=width), encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    flags += [
        "--disable-component-update",
        "--disable-sync",
        "--allow-file-access-from-files",
        "--enable-logging=stderr",
    ]
    command = [
        CHROMIUM,
        *flags,
        f"--user-data-dir={tmp_path / 'profile'}",
        "--dump-dom",
        f"file://{tmp_path / 'probe.html'}",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert "CONSOLE" not in done.stderr
    found = re.search(r"WIDTH (\d+) OF (\d+) SVG ([\d.]+)", done.stdout)
    assert found is not None, done.stdout[-500:]
    scrolled, visible, narrowest = (float(group) for group in found.groups())
    assert scrolled <= visible
    assert narrowest > 0.8 * min(width, 420) - 40
