"""A page in Debian's Chromium, driven by Playwright, and a TensorBoard server to view with it.

    def test_…(page):                     # a fresh page of one browser; `from tests.browser import page` makes it known
        with tensorboard(folder) as url:
            page.goto(url)

`page.goto(path.as_uri())` opens a file. Without Chromium a test is skipped; in CI (CI=true) it fails. Only this machine
can be reached: other requests are refused, and a test that made one fails.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest

LOCAL = re.compile(r"(https?://(localhost|127\.0\.0\.1)[:/]|file:|data:|blob:|about:)")
WAIT_S = 60.0


@pytest.fixture(scope="module")
def browser():
    missing = [
        name for name, there in {"chromium": shutil.which("chromium"), "playwright": _playwright()}.items() if not there
    ]
    if missing:
        if os.environ.get("CI") == "true":
            pytest.fail(f"{' and '.join(missing)} must be there in CI: see .ci/run")
        pytest.skip(f"no {' and no '.join(missing)}: apt-get install chromium, pip install playwright")
    with _playwright()() as playwright:
        # root may not use Chromium's sandbox; containers have a small /dev/shm
        flags = ["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"]
        chromium = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=flags)
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser):
    context = browser.new_context(viewport={"width": 1500, "height": 1000})
    context.set_default_timeout(WAIT_S * 1e3)
    outside = []

    def answer(route):
        if LOCAL.match(route.request.url):
            route.continue_()
        else:
            outside.append(route.request.url)
            route.abort()

    context.route("**/*", answer)
    yield context.new_page()
    context.close()
    assert not outside, f"the page asked for {outside}"


def _playwright():
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        return None
    return sync_playwright


@contextmanager
def tensorboard(folder: Path):
    """Start TensorBoard on a free port. Yields its address."""
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(folder), "--port", "0", "--host", "127.0.0.1"]
    command += ["--reload_interval", "1", "--load_fast", "false"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    stderr, said = process.stderr, list[str]()
    ready = threading.Event()

    def listen() -> None:
        for line in stderr:
            said.append(line)
            if "http://" in line:
                ready.set()
        ready.set()

    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    try:
        ready.wait(WAIT_S)
        address = re.search(r"http://\S+", "".join(said))
        assert address, f"TensorBoard did not start: {''.join(said)}"
        yield address[0].rstrip("/") + "/"
    finally:
        process.terminate()
        process.wait(10)
        listener.join(10)
        stderr.close()
