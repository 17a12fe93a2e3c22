"""A headless Chromium for tests, and a server for it to look at."""

import os
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager

import pytest
from ports import free_port

_NAMES = ("chromium", "chromium-browser", "google-chrome")
_FLAGS = """--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
--disable-component-update --disable-sync""".split()


def chromium():
    """Its path; installed with apt where that can be done, else the test is skipped."""
    if not (found := next(filter(None, map(shutil.which, _NAMES)), None)):
        if hasattr(os, "geteuid") and os.geteuid() == 0 and shutil.which("apt-get"):
            subprocess.run(["apt-get", "install", "-y", "chromium"], check=False, capture_output=True, timeout=600)
        if not (found := shutil.which("chromium")):
            pytest.skip("NO BROWSER, NOTHING OF THE EXPLORER'S PAGE IS TESTED: apt-get install chromium")
    return found


@contextmanager
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="NO BROWSER: pip install playwright")
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=chromium(), args=_FLAGS)
        yield started
        started.close()


@contextmanager
def served(command, cwd, log, **environment):
    """A server's address, once it answers; stopped afterwards. GRADIO_SERVER_PORT is where it listens."""
    port = free_port()
    environment = {**os.environ, "GRADIO_SERVER_PORT": str(port), "OMP_NUM_THREADS": "1", **environment}
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, *command], cwd=cwd, env=environment, stdout=output, stderr=subprocess.STDOUT
        )
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            assert process.poll() is None, log.read_text()
            try:
                urllib.request.urlopen(f"{url}/", timeout=5).close()
                break
            except urllib.error.URLError:
                time.sleep(0.2)
        else:
            pytest.fail(f"it does not answer: {log.read_text()}")
        yield url
    finally:
        process.terminate()
        process.wait(30)
