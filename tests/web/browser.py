"""A headless browser behind chromedriver's plain HTTP interface, and a static server for a folder."""

from __future__ import annotations

import base64
import functools
import http.server
import json
import shutil
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Without these Chromium asks the network for things of its own.
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
)  # fmt: skip
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the key of an element's id in WebDriver


def why_not() -> str:
    """What is missing to run a browser; "" where nothing is."""
    missing = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    return f"{' and '.join(missing)} not installed" if missing else ""


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class _Handler(http.server.SimpleHTTPRequestHandler):
    isolated = False
    asked: list[str]

    def log_message(self, *_: Any) -> None:
        self.asked.append(self.path)

    def end_headers(self) -> None:
        if self.isolated:
            self.send_header("Cross-Origin-Opener-Policy", "same-origin")
            self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        super().end_headers()


@contextmanager
def served(
    folder: Path, *, isolated: bool = False, types: dict[str, str] | None = None
) -> Iterator[tuple[str, list[str]]]:
    """The address of a folder on a static server of its own, and the paths that were asked for.

    Args:
        folder: what is served.
        isolated: whether pages may share memory between threads.
        types: by the ending of a file, as what it is sent.
    """
    asked: list[str] = []
    known = {**_Handler.extensions_map, ".mjs": "text/javascript", ".js": "text/javascript", **(types or {})}
    kind = type("Handler", (_Handler,), {"isolated": isolated, "asked": asked, "extensions_map": known})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(kind, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/", asked
    finally:
        server.shutdown()
        server.server_close()


class Browser:
    """One window."""

    def __init__(self, driver: str, session: str) -> None:
        self.driver, self.session = driver, session

    def call(self, method: str, path: str, body: Any = None) -> Any:
        return _call(self.driver, method, f"/session/{self.session}{path}", body)

    def open(self, address: str) -> None:
        self.call("POST", "/url", {"url": address})

    def run(self, script: str, *arguments: Any) -> Any:
        """What a script returns; it may use `await`."""
        wrapped = (
            f"const done = arguments[arguments.length - 1]; (async (...args) => {{ {script} }})"
            "(...arguments).then(done, (error) => done({failed: String(error)}))"
        )
        found = self.call("POST", "/execute/async", {"script": wrapped, "args": list(arguments)})
        assert not (isinstance(found, dict) and "failed" in found), found
        return found

    def wait(self, condition: str, seconds: float = 60) -> None:
        """Until a JavaScript expression is true."""
        end = time.monotonic() + seconds
        while not self.run(f"return Boolean({condition});"):
            text = self.run("return document.body.dataset.state + ': ' + document.body.innerText;")
            assert time.monotonic() < end, f"{condition} did not come true: {text}"
            time.sleep(0.1)

    def type(self, selector: str, text: str) -> None:
        found = self.call("POST", "/element", {"using": "css selector", "value": selector})
        self.call("POST", f"/element/{found[ELEMENT]}/value", {"text": text})

    def look(self, file: Path, *, width: int = 1000, height: int = 1300, dark: bool = False) -> None:
        """A screenshot."""
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.cdp("Emulation.setEmulatedMedia", {"features": scheme})
        sides = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.cdp("Emulation.setDeviceMetricsOverride", sides)
        file.write_bytes(base64.b64decode(self.call("GET", "/screenshot")))

    def cdp(self, command: str, parameters: dict[str, Any]) -> Any:
        return self.call("POST", "/goog/cdp/execute", {"cmd": command, "params": parameters})

    def log(self) -> list[str]:
        """Errors and warnings of the console since the last call."""
        return [entry["message"] for entry in self.call("POST", "/se/log", {"type": "browser"})]


def _call(driver: str, method: str, path: str, body: Any = None) -> Any:
    data = json.dumps(body or {}).encode() if method == "POST" else None
    request = urllib.request.Request(driver + path, data, {"Content-Type": "application/json"}, method=method)
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.load(answer)["value"]
    except urllib.error.HTTPError as error:
        raise AssertionError(error.read().decode()[:1000]) from None


@contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    """A browser with an empty profile."""
    port = free_port()
    driver = f"http://127.0.0.1:{port}"
    process = subprocess.Popen(["chromedriver", f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait_for(driver)
        options = {"args": [*FLAGS, f"--user-data-dir={profile}"], "binary": shutil.which("chromium")}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        session = _call(driver, "POST", "/session", {"capabilities": {"alwaysMatch": wanted}})["sessionId"]
        found = Browser(driver, session)
        try:
            yield found
        finally:
            found.call("DELETE", "")
    finally:
        process.terminate()
        process.wait(10)


def _wait_for(driver: str) -> None:
    for _ in range(300):
        try:
            if _call(driver, "GET", "/status")["ready"]:
                return
        except OSError:
            pass
        time.sleep(0.1)
    raise AssertionError("chromedriver did not start")
