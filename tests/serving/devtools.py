"""A page in headless Chromium, driven by its DevTools protocol through a pipe: no driver, no package."""

import base64
import json
import os
import select
import subprocess
import time
from pathlib import Path
from typing import Any, Self

FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-pipe"]


class Page:
    """`url` in a window of `width` x `height` CSS pixels. Chromium reads commands from its file 3, answers on 4."""

    def __init__(self, chromium: str, url: str, profile: Path, *, width: int, height: int) -> None:
        its_in, self._out = os.pipe()
        self._in, its_out = os.pipe()
        words = [chromium, *FLAGS, f"--user-data-dir={profile / 'chromium'}", "about:blank"]
        program = f'exec "$0" "$@" 3<&{its_in} 4>&{its_out}'
        self._process = subprocess.Popen(
            ["bash", "-c", program, *words],
            pass_fds=(its_in, its_out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(its_in)
        os.close(its_out)
        self._held, self._id, self._session = b"", 0, ""
        self._events: list[dict[str, Any]] = []
        targets = self._call("Target.getTargets")["targetInfos"]
        target = next(one["targetId"] for one in targets if one["type"] == "page")
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self._call("Emulation.setDeviceMetricsOverride", **size)
        for domain in ("Page", "Runtime", "Log"):
            self._call(f"{domain}.enable")
        self._call("Page.navigate", url=url)
        self.until("document.readyState === 'complete' && location.href !== 'about:blank'")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._in)
        os.close(self._out)

    def run(self, script: str) -> Any:
        """The value of an expression in the page."""
        answer = self._call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def until(self, condition: str, seconds: float = 30.0) -> None:
        end = time.monotonic() + seconds
        while not self.run(condition):
            assert time.monotonic() < end, (condition, self.run("document.body.innerText"), self.complaints())
            time.sleep(0.05)

    def fill(self, id: str, text: str) -> None:
        """Replace a field's content by typing."""
        self.run(f"document.getElementById({json.dumps(id)}).focus(); document.activeElement.select()")
        self._call("Input.insertText", text=text)

    def screenshot(self, path: Path) -> None:
        image = self._call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(image["data"]))

    def complaints(self) -> list[str]:
        """What went wrong in the page: exceptions, blocked content. An answer with an error's status is none."""
        self.run("1")
        found = [one["params"]["entry"] for one in self._events if one["method"] == "Log.entryAdded"]
        texts = [entry["text"] for entry in found if entry["source"] != "network"]
        return texts + [str(one["params"]) for one in self._events if one["method"] == "Runtime.exceptionThrown"]

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._id += 1
        message = {"id": self._id, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._id:
                assert "error" not in answer, answer
                return answer["result"]
            self._events.append(answer)

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._held:
            assert select.select([self._in], [], [], 60)[0], "Chromium is silent"
            part = os.read(self._in, 1 << 20)
            assert part, "Chromium has ended"
            self._held += part
        message, _, self._held = self._held.partition(b"\0")
        return json.loads(message)
