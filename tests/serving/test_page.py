"""The page at /: self-contained, and in a real browser, where there is one, it answers a prompt."""

import re
import shutil
from pathlib import Path

import pytest
from openai import OpenAI

from exporter.serving.app import PAGE
from tests.serving.devtools import Page
from tests.serving.running import Running

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FILES = {"/": "text/html", "/page.css": "text/css", "/page.js": "javascript"}


@pytest.mark.parametrize("path", FILES)
def test_nothing_comes_from_elsewhere(server: Running, path: str) -> None:
    response = server.get(path)
    assert response.status_code == 200
    assert FILES[path] in response.headers["content-type"]
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert not re.search(r"(https?:)?//\w", response.text.replace("// ", ""))
    assert not re.search(r"<script(?! src=)|style=|\son\w+=", response.text)


def test_only_text_is_written_into_the_page() -> None:
    """What a model says is never markup."""
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(", (PAGE / "page.js").read_text())


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_a_person_asks_and_reads_the_answer(server: Running, client: OpenAI, tmp_path: Path) -> None:
    """Driven through Chromium's own protocol: type, open the details, send; then stop a second answer."""
    messages = [{"role": "user", "content": "Name three colours.", "input": "For a flag."}]
    expected = client.chat.completions.create(
        model="demo",
        messages=messages,  # pyright: ignore
        max_tokens=12,
        temperature=0,
    )
    assert CHROMIUM is not None
    with Page(CHROMIUM, server.url + "/", tmp_path, width=390, height=844) as page:
        page.until("document.getElementById('model').value === 'demo'")
        page.run("document.querySelector('details').open = true")
        page.fill("instruction", "Name three colours.")
        page.fill("input", "For a flag.")
        page.fill("tokens", "12")
        page.run("document.getElementById('rendered-section').open = true")
        page.run("document.getElementById('send').click()")
        page.until("document.getElementById('state').textContent.includes('tokens in')")
        assert page.run("document.getElementById('answer').textContent") == expected.choices[0].message.content
        page.until("document.getElementById('rendered').textContent.endsWith('### Response:\\n')")
        assert "### Input:\n\nFor a flag." in page.run("document.getElementById('rendered').textContent")
        assert "raise_exception" in page.run("document.getElementById('template').textContent")
        page.screenshot(tmp_path / "page.png")
        assert page.run("document.documentElement.scrollWidth <= innerWidth"), "wider than a phone"

        page.fill("instruction", "Tell a long story of a fox, a river and a boat, and then tell it again. " * 4)
        page.fill("tokens", "400")
        # In one go: on a fast machine an answer ends while the browser is asked whether it has begun.
        page.run(
            "new MutationObserver(() => document.getElementById('stop').click())"
            ".observe(document.getElementById('answer'), {childList: true, characterData: true, subtree: true})"
        )
        page.run("document.getElementById('send').click()")
        page.until("document.getElementById('state').textContent === 'stopped'")

        page.run("document.getElementById('model').value = 'tiny'")
        page.run("document.getElementById('model').dispatchEvent(new Event('change'))")
        page.until("!document.querySelector('.raw').hidden && document.querySelector('.chat').hidden")
        page.fill("prompt", "ab")
        page.fill("tokens", "300")
        page.run("document.getElementById('send').click()")
        page.until("document.getElementById('error').textContent.includes('context')")
        assert page.complaints() == []
