"""The page at /ui in a real browser, before a real server."""

import json
import re
import shutil
import threading
from decimal import Decimal

import pytest
from playwright.sync_api import Page, Route, expect
from tests.support.page import Drip, Gateway, Watch

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        shutil.which("chromium") is None,
        reason="Chromium is missing (Debian: apt-get install chromium); the page was NOT tested",
    ),
]
WAIT_MS = 20_000
CREDIT_USD = Decimal("0.0001")
REQUEST_ID = re.compile(r"request [A-Za-z0-9._-]+")


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
