"""A headless Chromium, driven through its DevTools protocol: what a page shows, says and takes in width."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from websockets.sync.client import ClientConnection, connect

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
_DEADLINE_S = 60.0


@dataclass
class Page:
    """One tab. `complaints`: errors and warnings of its console, exceptions, and refused or failed requests."""

    socket: ClientConnection
    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    _number: int = 0
    _events: list[str] = field(default_factory=list)

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command of the protocol; events that arrive meanwhile are kept."""
        self._number += 1
        self.socket.send(json.dumps({"id": self._number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self.socket.recv(timeout=_DEADLINE_S))
            if message.get("id") == self._number:
                assert "error" not in message, f"{method}: {message['error']}"
                result: dict[str, Any] = message["result"]
                return result
            self._hear(message)

    def _hear(self, message: dict[str, Any]) -> None:
        method, parameters = message.get("method", ""), message.get("params", {})
        self._events.append(method)
        if method == "Runtime.exceptionThrown":
            self.complaints.append(str(parameters["exceptionDetails"]))
        elif method == "Log.entryAdded" and parameters["entry"]["level"] in ("error", "warning"):
            self.complaints.append(parameters["entry"]["text"])
        elif method == "Runtime.consoleAPICalled" and parameters["type"] in ("error", "warning", "assert"):
            self.complaints.append(str(parameters["args"]))
        elif method == "Page.javascriptDialogOpening":
            self.complaints.append(f"a dialog: {parameters['message']}")
        elif method == "Network.requestWillBeSent":
            self.requests.append(parameters["request"]["url"])

    def open(self, file: Path, width: int, height: int, dark: bool = False) -> None:
        """Show a file at a size in CSS pixels, and wait until it is loaded and has been quiet for two frames."""
        phone = width < 600
        self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=phone,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])
        self._events.clear()
        self.send("Page.navigate", url=file.absolute().as_uri())
        until = time.monotonic() + _DEADLINE_S
        while "Page.loadEventFired" not in self._events:
            assert time.monotonic() < until, "the page was not loaded in time"
            self.evaluate("1")
        self.evaluate(
            "new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(1))))"
        )

    def evaluate(self, script: str) -> Any:
        """The value of a JavaScript expression; a promise is waited for."""
        answer = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def screenshot(self, clip: tuple[int, int, int, int] | None = None) -> bytes:
        """PNG of what is seen, or of (x, y, width, height) of the page."""
        box = {}
        if clip:
            box = {"clip": dict(zip(("x", "y", "width", "height", "scale"), (*clip, 1), strict=True))}
        taken = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=True, **box)
        return base64.b64decode(taken["data"])


@contextmanager
def chromium_page(profile: Path) -> Iterator[Page]:
    """A tab of a Chromium of its own, whose profile lies in an empty folder."""
    assert CHROMIUM, "Chromium is missing; install Debian's package chromium (`make chromium`)"
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run"]
    options += ["--disable-dev-shm-usage", "--remote-debugging-port=0", f"--user-data-dir={profile}"]
    log = (profile.parent / f"{profile.name}.log").open("wb")
    process = subprocess.Popen([CHROMIUM, *options, "about:blank"], stdout=log, stderr=log)
    try:
        with connect(_address(profile, process), max_size=None) as socket:
            page = Page(socket)
            for domain in ("Page", "Runtime", "Log", "Network"):
                page.send(f"{domain}.enable")
            yield page
    finally:
        process.terminate()
        process.wait(timeout=_DEADLINE_S)
        log.close()


def _address(profile: Path, process: subprocess.Popen[bytes]) -> str:
    """Of the first tab, once the browser listens."""
    from urllib.request import urlopen

    file = profile / "DevToolsActivePort"
    until = time.monotonic() + _DEADLINE_S
    while time.monotonic() < until:
        assert process.poll() is None, f"Chromium ended with {process.returncode}; see {profile}.log"
        if file.is_file() and (port := file.read_text().partition("\n")[0]):
            with urlopen(f"http://127.0.0.1:{port}/json/list") as answer:
                tabs = [tab for tab in json.load(answer) if tab["type"] == "page"]
            if tabs:
                return str(tabs[0]["webSocketDebuggerUrl"])
        time.sleep(0.1)
    raise AssertionError("Chromium did not open its DevTools port in time")
