"""A headless Chromium, spoken to by the DevTools protocol over a pipe: no driver and no library between."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_SECONDS = 60.0


def find_chromium() -> str | None:
    """The browser's path; None where there is none."""
    return next((path for name in _NAMES if (path := shutil.which(name))), None)


class Chromium:
    """One page in a browser of its own.

    Args:
        binary: see :func:`find_chromium`.

    Attributes:
        complaints: what the page wrote to its console as an error or warning, uncaught errors and failed loads.
        requests: addresses that the page asked for, data URIs left out.
    """

    def __init__(self, binary: str) -> None:
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self._number, self._buffer = 0, b""
        self._profile = tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True)
        child_reads, self._writes = os.pipe()
        self._reads, child_writes = os.pipe()
        # Chromium takes its commands from descriptor 3 and answers on 4; the shell puts them there.
        words = f'exec "$0" "$@" 3<&{child_reads} 4>&{child_writes}'
        options = [
            "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--hide-scrollbars",
            "--remote-debugging-pipe", f"--user-data-dir={self._profile.name}", "about:blank",
        ]  # fmt: skip
        self._process = subprocess.Popen(
            ["bash", "-c", words, binary, *options], pass_fds=(child_reads, child_writes),
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(child_reads)
        os.close(child_writes)
        targets = self._call("Target.getTargets")["targetInfos"]
        page = next(target["targetId"] for target in targets if target["type"] == "page")
        attached = self._call("Target.attachToTarget", {"targetId": page, "flatten": True})
        self._session: str | None = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def __enter__(self) -> Chromium:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.terminate()
        self._process.wait(timeout=_SECONDS)
        os.close(self._writes)
        os.close(self._reads)
        self._profile.cleanup()

    def call(self, method: str, parameters: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """One command to the page, and its answer.

        Raises:
            RuntimeError: the browser refused it, or is gone.
        """
        return self._call(method, parameters, self._session)

    def open(self, path: Path, width: int = 1280, height: int = 900, scheme: str = "light") -> None:
        """Loads a file into a window of a size, and waits until it is loaded and painted."""
        mobile = width < 600
        self.call(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": mobile},
        )
        self.call("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]})
        self.call("Page.navigate", {"url": path.resolve().as_uri()})
        self.wait("document.readyState === 'complete'")
        self.wait("performance.getEntriesByType('paint').length > 0")

    def run(self, script: str) -> Any:
        """A script's value; a promise is waited for.

        Raises:
            RuntimeError: it threw.
        """
        wanted = {"expression": script, "returnByValue": True, "awaitPromise": True}
        answer = self.call("Runtime.evaluate", wanted)
        if "exceptionDetails" in answer:
            raise RuntimeError(str(answer["exceptionDetails"].get("exception", answer["exceptionDetails"])))
        return answer["result"].get("value")

    def wait(self, condition: str) -> None:
        """Until a script's value is true.

        Raises:
            TimeoutError: it never was.
        """
        until = time.monotonic() + _SECONDS
        while time.monotonic() < until:
            if self.run(condition):
                return
            time.sleep(0.02)
        raise TimeoutError(f"this never came true in the page: {condition}")

    def click(self, x: float, y: float) -> None:
        """A mouse's click at a place of the window."""
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            event = {"type": kind, "x": x, "y": y, "button": "left", "clickCount": 1, "buttons": 1}
            self.call("Input.dispatchMouseEvent", event)

    def picture(self, path: Path, whole: bool = False) -> None:
        """Saves what the window shows, or the whole page, as PNG."""
        answer = self.call("Page.captureScreenshot", {"format": "png", "captureBeyondViewport": whole})
        path.write_bytes(base64.b64decode(answer["data"]))

    def _call(
        self, method: str, parameters: Mapping[str, Any] | None = None, session: str | None = None
    ) -> dict[str, Any]:
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": dict(parameters or {})}
        if session is not None:
            message["sessionId"] = session
        os.write(self._writes, json.dumps(message).encode() + b"\0")
        until = time.monotonic() + _SECONDS
        while True:
            answer = self._next(until)
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                found: dict[str, Any] = answer["result"]
                return found
            self._hear(answer)

    def _next(self, until: float) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._reads], [], [], max(0.0, until - time.monotonic()))
            part = os.read(self._reads, 65536) if ready else b""
            if not part:
                raise RuntimeError("the browser does not answer")
            self._buffer += part
        line, _, self._buffer = self._buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        return message

    def _hear(self, event: dict[str, Any]) -> None:
        kind, told = event.get("method"), event.get("params", {})
        if kind == "Runtime.exceptionThrown":
            self.complaints.append(str(told["exceptionDetails"]))
        elif kind == "Runtime.consoleAPICalled" and told["type"] in ("error", "warning", "assert"):
            self.complaints.append(str(told["args"]))
        elif kind == "Log.entryAdded" and told["entry"]["level"] in ("error", "warning"):
            self.complaints.append(told["entry"]["text"])
        elif kind == "Network.requestWillBeSent" and not told["request"]["url"].startswith("data:"):
            self.requests.append(told["request"]["url"])
