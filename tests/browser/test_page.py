"""The page at /ui in a real browser, before a real server with the demo model and a scripted slow upstream."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from decimal import Decimal
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from msgspec import Struct
from playwright.sync_api import Browser, Page, Request, Route, expect, sync_playwright

CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        CHROMIUM is None,
        reason="Chromium is missing (Debian: apt-get install chromium); the page was NOT tested",
    ),
]
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
CREDIT_USD = Decimal("0.0001")
REQUEST_ID = re.compile(r"request [A-Za-z0-9._-]+")
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


class Drip(ThreadingHTTPServer):
    """An upstream that writes a word every 20 ms for as long as somebody reads; "break" in the prompt breaks it."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), DripHandler)
        self.left = threading.Event()  # the reader went away
        self.closing = threading.Event()

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class DripHandler(BaseHTTPRequestHandler):
    server: Drip

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        words = 3 if b"break" in body else 4000
        try:
            for _ in range(words):
                delta = {"index": 0, "delta": {"content": "drip "}, "finish_reason": None}
                event = {"id": "1", "object": "chat.completion.chunk", "choices": [delta]}
                self.wfile.write(b"data: " + json.dumps(event).encode() + b"\n\n")
                if self.server.closing.wait(0.02):
                    return
        except OSError:
            self.server.left.set()

    def log_message(self, format: str, *args: object) -> None:
        """Silent: the test's output is not its log."""


class Gateway(Struct, frozen=True, kw_only=True):
    base: str
    token: str
    environ: dict[str, str]
    folder: Path

    @property
    def link(self) -> str:
        return f"{self.base}/ui#token={self.token}"

    def cli(self, *args: str) -> str:
        command = [sys.executable, "-m", "headgate", *args]
        done = subprocess.run(
            command,
            cwd=self.folder,
            env=self.environ,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout


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
    environ = {**os.environ, "HEADGATE_DATA_DIR": str(folder / "data"), "DRIP_KEY": "any", "DRY_KEY": ""}
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
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=CHROMIUM_ARGS)
        yield browser
        browser.close()


class Watch:
    """What a page must not do: complain on the console, break its policy, ask another host."""

    def __init__(self, page: Page) -> None:
        self.complaints: list[str] = []
        self.hosts: set[str] = set()
        self.expected = re.compile(r"(?!)")
        page.add_init_script(
            "addEventListener('securitypolicyviolation', e => console.error('policy', e.violatedDirective))"
        )
        page.on("console", lambda message: self._complain(message.text, message.type in ("error", "warning")))
        page.on("pageerror", lambda error: self._complain(str(error), True))
        page.on("request", self._request)

    def expect(self, pattern: str) -> None:
        """The console line that a refused request leaves in every browser."""
        self.expected = re.compile(pattern)

    def _complain(self, text: str, counts: bool) -> None:
        if counts and not self.expected.search(text):
            self.complaints.append(text)

    def _request(self, request: Request) -> None:
        self.hosts.add(urlsplit(request.url).netloc)


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


def state_of(page: Page, state: str) -> None:
    expect(page.locator("#state")).to_have_text(state, timeout=WAIT_MS)


def figures(page: Page) -> dict[str, str]:
    rows = page.locator("#figures > div").all()
    return {row.locator("dt").inner_text(): " | ".join(row.locator("dd").all_inner_texts()) for row in rows}


def start_dripping(page: Page) -> None:
    page.get_by_role("radio", name="dripping").check()
    page.get_by_label("Prompt").fill("Go on and on.")
    page.get_by_role("button", name="Submit").click()
    expect(page.locator("#text")).to_contain_text("drip drip", timeout=WAIT_MS)


def test_a_link_signs_in_and_leaves_no_token_in_the_address_bar(
    page: Page, gateway: Gateway, watch: Watch
) -> None:
    page.goto(gateway.link)
    expect(page.get_by_label("Prompt")).to_be_focused()
    expect(page.locator("#account-name")).to_have_text("demo")
    assert page.url == f"{gateway.base}/ui"
    page.reload()
    expect(page.locator("#account-name")).to_have_text("demo")
    page.get_by_role("button", name="Sign out").click()
    page.reload()
    expect(page.get_by_role("heading", name="Sign in")).to_be_visible()


def test_a_prompt_runs_to_its_end_and_shows_what_it_came_to(
    page: Page, gateway: Gateway, watch: Watch
) -> None:
    page.goto(gateway.link)
    page.get_by_role("radio", name="demo").check()
    page.get_by_label("System").fill("Answer briefly.")
    page.get_by_label("Prompt").fill("What is the capital of France?")
    page.get_by_label("Temperature").fill("0")
    page.get_by_label("Output limit").fill("32")
    page.get_by_role("button", name="Submit").click()
    state_of(page, "Complete")
    assert page.locator("#text").inner_text().strip()

    shown = figures(page)
    prompt, completion = re.findall(r"(\d+) (?:prompt|completion)", shown["Tokens"])
    assert int(prompt) > 0
    assert 0 < int(completion) <= 32
    price = Decimal(shown["Price"].split(" | ")[0].removeprefix("$"))
    before, after = (Decimal(text.replace(",", "")) for text in shown["Balance"].split(" | ")[0].split(" → "))
    assert price > 0
    assert before - after == price / CREDIT_USD
    assert shown["Cost"].startswith("$0.")
    assert re.match(r"\d+\.\d\d s \| first token after", shown["Time"])
    assert shown["Request"]
    expect(page.locator("#balance")).to_have_text(f"${after * CREDIT_USD:f}".rstrip("0"))


def test_the_stop_button_ends_a_long_answer(page: Page, gateway: Gateway, watch: Watch, drip: Drip) -> None:
    drip.left.clear()
    page.goto(gateway.link)
    start_dripping(page)
    expect(page.get_by_role("button", name="Submit")).to_be_hidden()
    page.get_by_role("button", name="Stop").click()
    state_of(page, "Stopped")
    expect(page.locator("#note")).to_be_hidden()
    assert "drip" in page.locator("#text").inner_text()
    shown = figures(page)
    completion = re.search(r"(\d+) completion", shown["Tokens"])
    assert completion
    assert int(completion[1]) > 0
    assert drip.left.wait(10), "the upstream was left running"
    expect(page.get_by_role("button", name="Submit")).to_be_visible()


def test_ctrl_enter_submits_and_escape_stops(page: Page, gateway: Gateway, watch: Watch) -> None:
    page.goto(gateway.link)
    page.get_by_role("radio", name="dripping").check()
    page.get_by_label("Prompt").fill("Go on.")
    page.keyboard.press("Control+Enter")
    expect(page.locator("#text")).to_contain_text("drip", timeout=WAIT_MS)
    page.keyboard.press("Escape")
    state_of(page, "Stopped")


def test_limits_follow_the_model(page: Page, gateway: Gateway, watch: Watch) -> None:
    page.goto(gateway.link)
    page.get_by_role("radio", name="dripping").check()
    expect(page.get_by_label("Temperature")).to_have_attribute("max", "1")
    expect(page.get_by_label("Output limit")).to_have_attribute("max", "4096")
    page.get_by_label("Temperature").fill("1.5")
    page.get_by_label("Prompt").fill("Too hot.")
    page.get_by_role("button", name="Submit").click()
    assert page.locator("#temperature:invalid").count() == 1
    expect(page.locator("#state")).to_be_empty()


def test_models_that_cannot_be_called_are_disabled_with_their_reason(
    page: Page, gateway: Gateway, watch: Watch
) -> None:
    page.goto(gateway.link)
    page.get_by_text(re.compile(r"^\d+ not available$")).click()
    off = page.locator(".model.off").filter(has_text="keyless")
    expect(off.get_by_role("radio")).to_be_disabled()
    expect(off.locator(".reason")).to_contain_text("DRY_KEY")


def test_a_bad_token_shows_the_sign_in_box_and_a_good_one_opens_the_page(
    page: Page, gateway: Gateway, watch: Watch
) -> None:
    watch.expect("401")
    page.goto(f"{gateway.base}/ui#token=not.a.token")
    expect(page.get_by_role("heading", name="Sign in")).to_be_visible()
    expect(page.get_by_role("alert")).to_contain_text("Missing or invalid credentials.")
    expect(page.get_by_role("alert")).to_contain_text(REQUEST_ID)
    assert page.url == f"{gateway.base}/ui"

    page.get_by_label("Token").fill("hg-anything")
    page.get_by_role("button", name="Sign in").click()
    expect(page.get_by_role("alert")).to_contain_text("That is an API key")

    page.get_by_label("Token").fill(gateway.token)
    page.get_by_role("button", name="Sign in").click()
    expect(page.locator("#account-name")).to_have_text("demo")


def test_missing_funds_are_told_in_the_servers_words(page: Page, gateway: Gateway, watch: Watch) -> None:
    watch.expect("402")
    gateway.cli("accounts", "create", "poor")
    token = json.loads(gateway.cli("tokens", "create", "--account", "poor", "--json"))["token"]
    page.goto(f"{gateway.base}/ui#token={token}")
    page.get_by_label("Prompt").fill("Anything.")
    page.get_by_role("button", name="Submit").click()
    state_of(page, "Failed")
    note = page.locator("#note")
    expect(note).to_contain_text("InsufficientFunds · HTTP 402")
    expect(note).to_contain_text(re.compile(r"available\s*0 credits"))
    expect(note).to_contain_text(REQUEST_ID)


def test_an_upstream_that_breaks_mid_answer_is_shown_as_a_failure(
    page: Page, gateway: Gateway, watch: Watch
) -> None:
    page.goto(gateway.link)
    page.get_by_role("radio", name="dripping").check()
    page.get_by_label("Prompt").fill("Please break.")
    page.get_by_role("button", name="Submit").click()
    state_of(page, "Failed")
    expect(page.locator("#text")).to_have_text("drip drip drip ")
    expect(page.locator("#note")).to_contain_text("GatewayError")
    expect(page.locator("#note")).to_contain_text(REQUEST_ID)


def test_a_stream_without_its_last_event_is_shown_as_broken(
    page: Page, gateway: Gateway, watch: Watch
) -> None:
    def half(route: Route) -> None:
        body = ': ping\n\ndata: {"token": "Half an"}\n\ndata: {"token": " ans'
        route.fulfill(content_type="text/event-stream", body=body)

    page.goto(gateway.link)
    page.route("**/stream", half)
    page.get_by_label("Prompt").fill("Anything.")
    page.get_by_role("button", name="Submit").click()
    state_of(page, "Broken off")
    expect(page.locator("#text")).to_have_text("Half an")
    expect(page.locator("#note")).to_contain_text("ended before the gateway said")


def test_a_token_that_expires_meanwhile_asks_for_another_and_keeps_the_prompt(
    page: Page, gateway: Gateway, watch: Watch
) -> None:
    def expired(route: Route) -> None:
        error = {"type": "InvalidCredentials", "message": "Missing or invalid credentials.", "details": {}}
        route.fulfill(status=401, json={"error": error})

    watch.expect("401")
    page.goto(gateway.link)
    page.get_by_label("Prompt").fill("Keep me.")
    page.route("**/stream", expired)
    page.get_by_role("button", name="Submit").click()
    page.get_by_label("Token").fill(gateway.token)
    page.get_by_role("button", name="Sign in").click()
    expect(page.get_by_label("Prompt")).to_have_value("Keep me.")


def test_a_stop_before_the_first_word_hangs_up(page: Page, gateway: Gateway, watch: Watch) -> None:
    asked = threading.Event()
    page.goto(gateway.link)
    page.route("**/stream", lambda route: asked.set())  # and never an answer
    page.get_by_label("Prompt").fill("Anything.")
    page.get_by_role("button", name="Submit").click()
    state_of(page, "Waiting…")
    page.get_by_role("button", name="Stop").click()
    state_of(page, "Stopped")
    assert asked.is_set()
    expect(page.locator("#note")).to_have_text("Stopped before the answer began.")


def test_a_gateway_out_of_reach_is_said(page: Page, gateway: Gateway, watch: Watch) -> None:
    watch.expect("ERR_FAILED")
    page.goto(gateway.link)
    page.route("**/stream", lambda route: route.abort())
    page.get_by_label("Prompt").fill("Anything.")
    page.get_by_role("button", name="Submit").click()
    state_of(page, "Failed")
    expect(page.locator("#note")).to_contain_text("The gateway cannot be reached")


def test_what_a_model_writes_stays_text(page: Page, gateway: Gateway, watch: Watch) -> None:
    markup = "<img src=x onerror=alert(1)><b>bold</b>"

    def answer(route: Route) -> None:
        body = "data: " + json.dumps({"token": markup}) + "\n\n"
        route.fulfill(content_type="text/event-stream", body=body)

    page.goto(gateway.link)
    page.route("**/stream", answer)
    page.get_by_label("Prompt").fill("Write markup.")
    page.get_by_role("button", name="Submit").click()
    expect(page.locator("#text")).to_have_text(markup)
    assert page.locator("#text *").count() == 0


def test_it_fits_a_phone(page: Page, gateway: Gateway, watch: Watch) -> None:
    page.set_viewport_size({"width": 390, "height": 844})
    page.goto(gateway.link)
    expect(page.get_by_label("Prompt")).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
