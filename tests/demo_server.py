"""The demo in a process of its own, and a browser to look at it."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import httpx
import psutil
import pytest

ROOT = Path(__file__).resolve().parent.parent
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
CHROMIUM_OPTIONS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed: apt-get install chromium")


@dataclass
class Demo:
    """A running `python app.py`."""

    process: subprocess.Popen
    url: str
    folder: Path
    log: Path

    def memory_bytes(self) -> int:
        return psutil.Process(self.process.pid).memory_info().rss

    def stop(self, number: int) -> int:
        """Send a signal; returns the exit code."""
        self.process.send_signal(number)
        return self.process.wait(60)


@contextmanager
def running_demo(folder: Path, *arguments: str, **environment: str) -> Iterator[Demo]:
    """`python app.py` with `arguments`, its temporary files and caches below `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    variables = {
        **os.environ,
        "TMPDIR": str(folder),
        "HF_HOME": str(folder / "hub"),
        "HF_ENDPOINT": "http://127.0.0.1:9",  # nobody is there
        **environment,
    }
    log = folder / "log.txt"
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "app.py", "--port", str(port), "--device", "cpu", *arguments],
            cwd=ROOT,
            env=variables,
            stdout=output,
            stderr=subprocess.STDOUT,
            # pytest may have been started with them ignored, as shells and nohup do it.
            preexec_fn=_heed_signals,
        )
    demo = Demo(process, f"http://127.0.0.1:{port}", folder, log)
    try:
        _wait_until_ready(demo)
        yield demo
    finally:
        process.kill()
        process.wait()


def _heed_signals() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def _wait_until_ready(demo: Demo) -> None:
    end = time.monotonic() + 600
    while time.monotonic() < end and demo.process.poll() is None:
        try:
            httpx.get(demo.url, timeout=5)
            return
        except httpx.TransportError:
            time.sleep(0.1)
    raise RuntimeError(f"the demo does not answer: {demo.log.read_text()}")


@contextmanager
def running_browser() -> Iterator:
    """Playwright's handle of a Chromium."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=CHROMIUM_OPTIONS)
        yield browser
        browser.close()


class Visitor:
    """Somebody with a window of their own."""

    def __init__(self, browser, demo: Demo, *, width: int = 1280, height: int = 900, tab: str = "Enlarge"):
        self.page = browser.new_context(viewport={"width": width, "height": height}).new_page()
        self.page.set_default_timeout(60_000)
        self.hosts: set[str] = set()
        self.page.on("request", lambda request: self.hosts.add(re.split("[/:]+", request.url)[1]))
        self.page.goto(demo.url)
        self.open(tab)

    def open(self, tab: str) -> None:
        self.page.get_by_role("tab", name=tab).click()
        self.panel = self.page.get_by_role("tabpanel").filter(visible=True)
        self.panel.get_by_role("button", name=tab, exact=True).wait_for()

    def choose(self, *paths: Path) -> None:
        """Upload files and see the first of them."""
        self.panel.locator("input[type=file]").set_input_files(list(paths))
        self.panel.locator(f'img[alt^=Before][src$="/{quote(paths[0].stem)}.png"]').wait_for()

    def clear(self) -> None:
        """Take the files away again."""
        self.panel.get_by_label("Clear").first.click()

    def press(self, name: str) -> None:
        self.panel.get_by_role("button", name=name, exact=True).click()

    def picture(self, label: str):
        return self.panel.get_by_role("img", name=re.compile(f"^{label},"))

    def pixels(self, label: str) -> tuple[int, int]:
        """Width and height of what the browser has loaded."""
        handle = self.picture(label).element_handle()
        self.page.wait_for_function("img => img.complete && img.naturalWidth > 0", arg=handle)
        return tuple(handle.evaluate("img => [img.naturalWidth, img.naturalHeight]"))

    def sees(self, text: str) -> None:
        self.page.get_by_text(re.compile(text)).filter(visible=True).first.wait_for()

    @contextmanager
    def seeing(self, text: str) -> Iterator[None]:
        """Within the block the page shows `text` at some moment, however short."""
        self.page.evaluate(
            """text => {
                window.hasSeen = false;
                const look = () => { window.hasSeen ||= new RegExp(text).test(document.body.innerText); };
                const changes = {subtree: true, childList: true, characterData: true};
                new MutationObserver(look).observe(document.body, changes);
            }""",
            text,
        )
        yield
        self.page.wait_for_function("() => window.hasSeen")

    def download(self, folder: Path, button: str = "Download") -> Path:
        with self.page.expect_download() as waiting:
            self.press(button)
        path = folder / waiting.value.suggested_filename
        waiting.value.save_as(path)
        return path
