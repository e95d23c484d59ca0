"""A real server with the demo model and a scripted slow upstream, and a real browser before it."""

import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, Page, sync_playwright
from tests.support.page import Drip, Gateway, Watch

CHROMIUM_ARGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
WAIT_MS = 20_000
KEPT = ("PATH", "HOME", "LANG", "VIRTUAL_ENV", "TMPDIR")
"""Of the caller's environment; a provider's key must not come along."""
CONFIG = """
[providers.drip]
kind = "openai"
base_url = "{base_url}"
api_key_env = "DRIP_KEY"

[[models]]
name = "dripping"
provider = "drip"
mode = "chat"
context_window = 8192
max_output_tokens = 4096
temperature = [0, 1]
input_price = "1"
output_price = "2"

[providers.dry]
kind = "openai"
base_url = "{base_url}"
api_key_env = "DRY_KEY"

[[models]]
name = "keyless"
provider = "dry"
mode = "chat"
context_window = 8192
max_output_tokens = 4096
input_price = "1"
output_price = "2"
"""


@pytest.fixture(scope="module")
def drip() -> Iterator[Drip]:
    with Drip() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.closing.set()
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def gateway(drip: Drip, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    folder = tmp_path_factory.mktemp("gateway")
    (folder / "headgate.toml").write_text(CONFIG.format(base_url=drip.base_url))
    environ = {name: os.environ[name] for name in KEPT if name in os.environ}
    environ |= {"HEADGATE_DATA_DIR": str(folder / "data"), "DRIP_KEY": "any"}
    log = folder / "stderr"
    command = [sys.executable, "-m", "headgate", "serve", "--demo", "--host", "127.0.0.1", "--port", "0"]
    with (
        log.open("w") as stderr,
        subprocess.Popen(
            command, cwd=folder, env=environ, stdout=subprocess.PIPE, stderr=stderr, text=True
        ) as process,
    ):
        try:
            printed = ""
            assert process.stdout is not None
            for line in process.stdout:
                printed += line
                if line.startswith("ready "):
                    break
            ready = re.search(r"^ready (http://\S+)$", printed, re.MULTILINE)
            link = re.search(r"/ui#token=([\w.-]+)", printed)
            assert ready and link, f"printed {printed!r}; log: {log.read_text()[-4000:]}"
            yield Gateway(base=ready[1], token=link[1], environ=environ, folder=folder)
        finally:
            process.terminate()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=CHROMIUM_ARGS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    with browser.new_context(viewport={"width": 1200, "height": 900}) as context:
        context.set_default_timeout(WAIT_MS)
        yield context.new_page()


@pytest.fixture
def watch(page: Page, gateway: Gateway) -> Iterator[Watch]:
    watch = Watch(page)
    yield watch
    assert watch.complaints == []
    assert watch.hosts == {urlsplit(gateway.base).netloc}
