"""Chromium without a window, spoken to over a pipe by the DevTools protocol."""

import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-sync",
    "--disable-background-networking",
    "--disable-component-update",
    "--remote-debugging-pipe",
)
WAIT = 240  # seconds for an answer: others may use the machine
UNDRAWN = (
    "[...document.querySelectorAll('.graph')]"
    ".some(g => !g.querySelector('.main-svg') && !g.textContent)"
)
NAMES = ("chromium", "chromium-browser", "google-chrome")


def find() -> str | None:
    """Return the path of Chromium, or None."""
    return next(filter(None, map(shutil.which, NAMES)), None)


@dataclass
class Page:
    """One page: ``errors`` and ``requests`` collect what it complains about and asks for."""

    write: int
    read: int
    session: str = ""
    number: int = 0
    rest: bytes = b""
    errors: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    loaded: bool = False

    def call(self, method: str, **values: Any) -> dict[str, Any]:
        """Send a command and return its answer."""
        self.number += 1
        message: dict[str, Any] = {"id": self.number, "method": method, "params": values}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next(WAIT)
            if answer.get("id") == self.number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return dict(answer["result"])
            self._event(answer)

    def _next(self, seconds: float) -> dict[str, Any]:
        while b"\0" not in self.rest:
            if not select.select([self.read], [], [], seconds)[0]:
                raise TimeoutError("Chromium does not answer")
            part = os.read(self.read, 1 << 20)
            if not part:
                raise RuntimeError("Chromium has ended")
            self.rest += part
        message, self.rest = self.rest.split(b"\0", 1)
        return dict(json.loads(message))

    def _event(self, message: dict[str, Any]) -> None:
        kind, values = message.get("method"), message.get("params", {})
        if kind == "Page.loadEventFired":
            self.loaded = True
        elif kind == "Runtime.exceptionThrown":
            self.errors.append(json.dumps(values["exceptionDetails"])[:2000])
        elif kind == "Runtime.consoleAPICalled" and values["type"] in ("error", "warning"):
            self.errors.append(json.dumps(values["args"])[:2000])
        elif kind == "Log.entryAdded" and values["entry"]["level"] in ("error", "warning"):
            self.errors.append(values["entry"]["text"])
        elif kind == "Network.requestWillBeSent":
            self.requests.append(values["request"]["url"])

    def open(self, path: Path, *, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        """Open a file at a width and wait until it has drawn."""
        self.loaded = False
        self.look(width=width, height=height, dark=dark)
        self.call("Page.navigate", url=path.as_uri())
        while not self.loaded:
            self._event(self._next(WAIT))
        self.settle()
        until = time.monotonic() + WAIT
        while self.run(UNDRAWN) and time.monotonic() < until:  # on a busy machine
            time.sleep(0.2)
        self.settle()

    def look(self, *, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        """Change the size of the screen, narrow ones being phones, and the colour scheme."""
        phone = width < 600
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=phone,
        )
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", features=scheme)

    def settle(self) -> None:
        """Wait for two frames, in which plots draw what was asked of them."""
        frames = "requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(done, 150)))"
        self.run(f"new Promise(done => {frames})")

    def run(self, script: str) -> Any:
        """Evaluate JavaScript in the page; a promise is waited for."""
        answer = self.call(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in answer:
            raise RuntimeError(str(answer["exceptionDetails"]))
        return answer["result"].get("value")

    def screenshot(self, path: Path) -> None:
        """Write the whole page as a PNG."""
        answer = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(answer["data"]))


@contextmanager
def chromium(path: str) -> Iterator[Page]:
    """Start Chromium with an empty profile and end it afterwards."""
    to_read, to_write = os.pipe()
    from_read, from_write = os.pipe()

    def wire() -> None:  # the protocol wants descriptors 3 and 4
        a, b = os.dup(to_read), os.dup(from_write)
        os.dup2(a, 3)
        os.dup2(b, 4)

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        process = subprocess.Popen(
            [path, *FLAGS, f"--user-data-dir={profile}", "about:blank"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            preexec_fn=wire, pass_fds=(3, 4),
        )  # fmt: skip
        os.close(to_read)
        os.close(from_write)
        page = Page(write=to_write, read=from_read)
        try:
            _attach(page)
            yield page
        finally:
            process.terminate()
            process.wait(20)
            os.close(to_write)
            os.close(from_read)


def _attach(page: Page) -> None:
    until = time.monotonic() + 30
    while time.monotonic() < until:
        targets = page.call("Target.getTargets")["targetInfos"]
        found = [target["targetId"] for target in targets if target["type"] == "page"]
        if found:
            break
        time.sleep(0.1)
    page.session = page.call("Target.attachToTarget", targetId=found[0], flatten=True)["sessionId"]
    for domain in ("Page", "Runtime", "Log", "Network"):
        page.call(f"{domain}.enable")
