"""A headless Chromium, spoken to over its DevTools pipe: no driver and no library between."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless=new",
    "--no-sandbox",  # tests run as root in containers
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-extensions",
    "--disable-background-networking",
    "--no-first-run",
    "--remote-debugging-pipe",
)
ANSWER_S = 10.0
LOOK_S = 0.05


def found_browser() -> str | None:
    """The first browser on PATH."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One page. Every wait ends within `ANSWER_S`."""

    def __init__(self, path: str, profile: Path, *, width: int = 1280, height: int = 900) -> None:
        self._next_id = 0
        self._rest = b""
        self.problems: list[str] = []
        """What the page logged as an error, or threw, or was kept from loading."""
        commands, self._write = os.pipe()
        self._read, answers = os.pipe()
        # The pipe's ends are 3 and 4 in the browser; no other is passed on.
        redirect = f'exec "$@" 3<&{commands} 4>&{answers}'
        flags = (*FLAGS, f"--user-data-dir={profile}", f"--window-size={width},{height}")
        self._process = subprocess.Popen(
            ["bash", "-c", redirect, "browser", path, *flags, "about:blank"],
            pass_fds=(commands, answers),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(commands)
        os.close(answers)
        try:
            [target] = [t for t in self._call("Target.getTargets")["targetInfos"] if t["type"] == "page"]
            attached = self._call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
            self._session: str = attached["sessionId"]
            for domain in ("Page", "Runtime", "Log"):
                self.call(f"{domain}.enable")
        except BaseException:
            self.close()
            raise

    def call(self, method: str, **params: Any) -> Any:
        """One command to the page."""
        return self._call(method, self._session, **params)

    def open(self, url: str) -> None:
        """Goes there; the page may still be loading."""
        told = self.call("Page.navigate", url=url)
        assert "errorText" not in told, told

    def js(self, expression: str) -> Any:
        """The value of an expression in the page, awaited if it is a promise."""
        told = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in told, told["exceptionDetails"]
        return told["result"].get("value")

    def wait(self, expression: str) -> Any:
        """The value of an expression as soon as it is true."""
        until = time.monotonic() + ANSWER_S
        while not (value := self.js(expression)):
            assert time.monotonic() < until, f"not true within {ANSWER_S} s: {expression}; {self.problems}"
            time.sleep(LOOK_S)
        return value

    def press(self, key: str) -> None:
        """One key, at what has the focus."""
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key)

    def drag(self, start: tuple[float, float], end: tuple[float, float], steps: int = 8) -> None:
        """The left button held from one point to another."""
        self._mouse("mousePressed", *start, buttons=1)
        for step in range(1, steps + 1):
            x, y = (a + (b - a) * step / steps for a, b in zip(start, end, strict=True))
            self._mouse("mouseMoved", x, y, buttons=1)
        self._mouse("mouseReleased", *end, buttons=0)

    def screenshot(self, *, whole: bool = False) -> bytes:
        """What is seen, as PNG; the whole page where that is more."""
        return base64.b64decode(self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"])

    def close(self) -> None:
        """Ends it. Idempotent."""
        self._process.kill()
        self._process.wait()
        for end in (self._write, self._read):
            if end >= 0:
                os.close(end)
        self._write = self._read = -1

    def __enter__(self) -> Browser:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _mouse(self, kind: str, x: float, y: float, *, buttons: int) -> None:
        self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", buttons=buttons, clickCount=1)

    def _call(self, method: str, session: str = "", **params: Any) -> Any:
        self._next_id += 1
        command = {"id": self._next_id, "method": method, "params": params}
        if session:
            command["sessionId"] = session
        os.write(self._write, json.dumps(command).encode() + b"\0")
        until = time.monotonic() + ANSWER_S
        while True:
            message = self._message(until)
            if message.get("id") == self._next_id:
                assert "error" not in message, (method, message)
                return message["result"]
            self._note(message)

    def _message(self, until: float) -> Any:
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._read], [], [], max(0.0, until - time.monotonic()))
            assert ready, f"the browser did not answer within {ANSWER_S} s"
            read = os.read(self._read, 1 << 16)
            assert read, "the browser has ended"
            self._rest += read
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)

    def _note(self, message: Any) -> None:
        params = message.get("params", {})
        match message.get("method"):
            case "Runtime.exceptionThrown":
                self.problems.append(json.dumps(params["exceptionDetails"]))
            case "Log.entryAdded" if params["entry"]["level"] == "error":
                self.problems.append(params["entry"]["text"])
            case "Runtime.consoleAPICalled" if params["type"] in ("error", "assert"):
                self.problems.append(json.dumps(params["args"]))
