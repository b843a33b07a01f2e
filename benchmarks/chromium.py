"""Headless Chromium, driven over its DevTools pipe with nothing but the standard library: for looking at reports as readers do.

Chromium reads commands from descriptor 3 and answers on descriptor 4, JSON texts that end in a zero byte
(https://chromedevtools.github.io/devtools-protocol/). Nothing listens on a port, and the browser has no network: a page that asks for
anything outside itself shows it in `Page.requests`.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
#: Gives the pipe its two descriptors, whatever they are called in this process, and becomes the browser.
_EXEC = (
    "import os, sys; a, b = (os.dup2(int(n), 100 + i) for i, n in enumerate(sys.argv[1:3])); "
    "os.dup2(a, 3); os.dup2(b, 4); os.execv(sys.argv[3], sys.argv[3:])"
)
#: Key -> what a key event needs beside its name.
KEYS: dict[str, dict[str, Any]] = {
    "Tab": {"code": "Tab", "windowsVirtualKeyCode": 9},
    "Enter": {"code": "Enter", "windowsVirtualKeyCode": 13, "text": "\r"},
    " ": {"code": "Space", "windowsVirtualKeyCode": 32, "text": " "},
}


def find_chromium() -> str | None:
    """Return the path of a Chromium; None where there is none."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Page:
    """One tab.

    Attributes
    ----------
    errors : list of str
        What the console said of errors, and exceptions that nothing caught.
    requests : list of str
        Addresses that were asked for, the page's own included; what the page itself holds is not asked for.
    """

    def __init__(self, process: subprocess.Popen[bytes], read: int, write: int) -> None:
        self._process, self._read, self._write = process, read, write
        self._buffer, self._number, self._session, self._scripting = b"", 0, "", True
        self.errors: list[str] = []
        self.requests: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> Any:
        """Send a command and return its result.

        Raises
        ------
        RuntimeError
            Chromium refuses it, has gone, or does not answer within two minutes.
        """
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self._number:
            self._note(answer)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']['message']}")
        return answer["result"]

    def _next(self, seconds: float = 120.0) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            if not select.select([self._read], [], [], seconds)[0]:
                raise RuntimeError(f"Chromium said nothing for {seconds:g} s")
            found = os.read(self._read, 1 << 20)
            if not found:
                raise RuntimeError("Chromium has gone")
            self._buffer += found
        text, self._buffer = self._buffer.split(b"\0", 1)
        answer: dict[str, Any] = json.loads(text)
        return answer

    def _note(self, event: dict[str, Any]) -> None:
        name, params = event.get("method"), event.get("params", {})
        if name == "Network.requestWillBeSent" and not params["request"]["url"].startswith("data:"):
            self.requests.append(params["request"]["url"])
        elif name == "Runtime.exceptionThrown":
            self.errors.append(str(params["exceptionDetails"].get("exception", params["exceptionDetails"])))
        elif name == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.errors.append(str(params["args"]))
        elif name == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.errors.append(params["entry"]["text"])

    def open(self, path: Path, width: int = 1400, height: int = 900, dark: bool = False) -> float:
        """Load a file and return the seconds from asking for it until it was loaded, laid out and painted once."""
        self.size(width, height)
        self.media(dark=dark)
        started = time.perf_counter()
        self.call("Page.navigate", url=path.resolve().as_uri())
        while True:
            event = self._next()
            self._note(event)
            if event.get("method") == "Page.loadEventFired":
                break
        if self._scripting:  # two frames: in the first the page is painted, the second begins after it
            self.run("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(1))))")
        return time.perf_counter() - started

    def size(self, width: int, height: int = 900) -> None:
        """Set the window's size in CSS pixels."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def media(self, dark: bool = False, kind: str = "") -> None:
        """Say what the reader's system prefers, and whether the page is shown or printed (``"print"``)."""
        features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", media=kind, features=features)

    def run(self, script: str) -> Any:
        """Return what an expression gives, promises awaited.

        Raises
        ------
        RuntimeError
            It throws.
        """
        found = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in found:
            raise RuntimeError(f"{script}: {found['exceptionDetails'].get('exception', {}).get('description')}")
        return found["result"].get("value")

    def press(self, key: str) -> None:
        """Press and release a key of `KEYS`."""
        facts = {"key": key, **KEYS[key]}
        self.call("Input.dispatchKeyEvent", type="keyDown", **facts)
        self.call("Input.dispatchKeyEvent", type="keyUp", **{k: v for k, v in facts.items() if k != "text"})

    def shot(self, path: Path, whole: bool = False) -> None:
        """Save what is seen, or the whole page, as PNG."""
        data = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"]
        path.write_bytes(base64.b64decode(data))

    def pdf(self, path: Path) -> None:
        """Print to a file."""
        data = self.call("Page.printToPDF", printBackground=True, paperWidth=8.27, paperHeight=11.69)["data"]
        path.write_bytes(base64.b64decode(data))

    def scripting(self, on: bool) -> None:
        """Let pages run scripts, or not."""
        self._scripting = on
        self.call("Emulation.setScriptExecutionDisabled", value=not on)


@contextlib.contextmanager
def chromium(path: str | None = None) -> Iterator[Page]:
    """Start a browser without network and yield its tab.

    Parameters
    ----------
    path : str, optional
        Of the program; default: the first of `NAMES`.

    Raises
    ------
    RuntimeError
        There is none.
    """
    program = path or find_chromium()
    if program is None:
        raise RuntimeError(f"no Chromium among {', '.join(NAMES)}")
    their_in, our_out = os.pipe()
    our_in, their_out = os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
        flags += ["--disable-background-networking", "--disable-extensions", "--disable-sync", "--disable-component-update"]
        flags += ["--host-resolver-rules=MAP * ~NOTFOUND", "--hide-scrollbars", f"--user-data-dir={profile}"]
        command = [sys.executable, "-c", _EXEC, str(their_in), str(their_out), program, *flags]
        command += ["--remote-debugging-pipe", "about:blank"]
        process = subprocess.Popen(
            command, pass_fds=(their_in, their_out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(their_in)
        os.close(their_out)
        try:
            yield Page(process, our_in, our_out)
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            os.close(our_out)
            os.close(our_in)
