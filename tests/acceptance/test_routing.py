"""When an upstream fails: what clients of every dialect are told of who served, and what operators see."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from tests.support.books import Books
from tests.support.client import Client, Dialect, texts_of
from tests.support.script import Script
from tests.support.server import Server
from tests.support.upstream import Upstream

pytestmark = pytest.mark.process

DIALECTS: tuple[Dialect, ...] = ("openai", "chat", "thiggle", "dify", "genstack")
CONFIG = """
[routing]
retries = 2
retry_wait_s = 0.01
retry_max_wait_s = 2
breaker_failures = {failures}
breaker_open_s = 60

[providers.first]
kind = "openai"
base_url = "{first}"

[providers.second]
kind = "openai"
base_url = "{second}"
"""
MODEL = """
[[models]]
name = "{name}"
provider = "{provider}"
upstream_name = "{upstream_name}"
mode = "both"
context_window = 8192
max_output_tokens = 4096
input_price = "{price}"
output_price = "1.50"
{more}

[apps.{name}]
model = "{name}"
prompt = "{{{{query}}}}"
variables = [{{ name = "query", type = "paragraph", required = true }}]
"""


def model(name: str, provider: str = "first", price: str = "0.50", more: str = "", upstream: str = "") -> str:
    return MODEL.format(name=name, provider=provider, upstream_name=upstream or name, price=price, more=more)


MODELS = (
    model("main", more='fallbacks = ["spare"]')
    + model("spare", "second", "2.00")
    + model("alone")
    + model("homely", more='fallbacks = ["demo"]')
    + model("fragile")
    + model("shared", more='deployments = [{ provider = "second", weight = 1 }]')
)


class Place:
    def __init__(
        self, server: Server, first: Upstream, second: Upstream, client: Client, books: Books
    ) -> None:
        self.server = server
        self.first = first
        self.second = second
        self.client = client
        self.books = books

    async def get(self, path: str) -> Any:
        headers = {"Authorization": f"Bearer {self.client.key}"}
        async with self.client.session.get(path, headers=headers) as response:
            text = await response.text()
            return await response.json() if "json" in response.headers["Content-Type"] else text


@pytest.fixture
async def place(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Place]:
    async with AsyncExitStack() as stack:
        first = await stack.enter_async_context(Upstream())
        second = await stack.enter_async_context(Upstream())
        failures = getattr(request, "param", 0)
        head = CONFIG.format(first=first.url, second=second.url, failures=failures)
        server = await stack.enter_async_context(Server(head + MODELS, folder=tmp_path))
        books = stack.enter_context(Books(server))
        books.open("ann", 10**10)
        client = await stack.enter_async_context(Client(server.url, books, "ann"))
        yield Place(server, first, second, client, books)


def model_in(dialect: Dialect, body: dict[str, Any]) -> str | None:
    if dialect == "thiggle":
        return str(body["choices"][0]["model"])
    return body.get("model")


@pytest.mark.parametrize("dialect", DIALECTS)
async def test_a_fallback_answers_and_is_named_wherever_a_name_is_shown(
    place: Place, dialect: Dialect
) -> None:
    place.first.on("main", Script(status=500, body={"error": {"message": "broken"}}))
    ask = place.client.ask(dialect, "main")
    async with await place.client.send(ask) as response:
        body = await response.json()
        assert response.status == 200
        assert response.headers["X-Headgate-Provider"] == "second"
    if dialect != "dify":  # its answers name no model
        assert model_in(dialect, body) == "spare"
    assert len(place.first.requests) == 3
    (row,) = await place.books.settled("ann")
    assert (row.model, row.provider, row.attempts, row.error) == ("spare", "second", 4, None)
    assert row.price == row.prompt_tokens * 2000 + row.completion_tokens * 1500


@pytest.mark.parametrize("dialect", DIALECTS)
async def test_a_stream_falls_back_before_its_first_chunk(place: Place, dialect: Dialect) -> None:
    place.first.on("main", Script(status=404))
    response = await place.client.send(place.client.ask(dialect, "main", stream=True))
    text = (await response.read()).decode()
    assert (response.status, response.headers["X-Headgate-Provider"]) == (200, "second")
    if dialect in ("openai", "chat", "thiggle"):
        assert '"model":"spare"' in text
        assert '"model":"main"' not in text
    (row,) = await place.books.settled("ann")
    assert (row.model, row.stream, row.attempts) == ("spare", True, 2)


@pytest.mark.parametrize("dialect", DIALECTS)
async def test_a_passing_failure_is_not_seen_at_all(place: Place, dialect: Dialect) -> None:
    place.first.script(Script(reset_at=0), Script(status=529, body={"error": {"message": "busy"}}))
    status, body = await place.client.blocking(dialect, "alone")
    assert status == 200
    assert texts_of(body)[0]
    assert len(place.first.requests) == 3
    (row,) = await place.books.settled("ann")
    assert (row.model, row.attempts, row.error) == ("alone", 3, None)


async def test_what_a_failed_attempt_cost_is_on_the_usage_row_alone(place: Place) -> None:
    usage = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
    place.first.script(Script(body={"error": {"message": "broken", "code": 502}, "usage": usage}))
    before = place.books.balance("ann").balance
    status, body = await place.client.blocking("openai", "alone")
    assert status == 200
    (row,) = await place.books.settled("ann")
    assert row.failed_cost == 100 * 500 + 10 * 1500
    assert row.price == body["usage"]["prompt_tokens"] * 500 + body["usage"]["completion_tokens"] * 1500
    assert place.books.balance("ann").balance == before - row.price


async def test_after_retries_and_fallbacks_a_429_is_the_clients(place: Place) -> None:
    busy = Script(status=429, headers={"Retry-After": "7"}, body={"error": {"message": "slow"}})
    place.first.on("main", busy)
    place.second.on("spare", busy)
    async with await place.client.send(place.client.ask("openai", "main")) as response:
        assert (response.status, response.headers["Retry-After"]) == (429, "7")
    assert (len(place.first.requests), len(place.second.requests)) == (1, 1)
    await place.books.settled("ann")
    assert place.books.balance("ann").balance == 10**10


@pytest.mark.parametrize("place", [3], indirect=True)
async def test_a_circuit_opens_is_seen_everywhere_and_spares_the_upstream(place: Place) -> None:
    place.first.on("fragile", Script(status=500))
    for _ in range(4):  # three attempts each, until the third request opens the circuit
        await place.client.blocking("openai", "fragile")
    assert len(place.first.requests) == 3 + 3 + 1
    async with await place.client.send(place.client.ask("openai", "fragile")) as response:
        body = await response.json()
        assert (response.status, body["error"]["code"]) == (503, "upstream_unavailable")
        assert 1 <= int(response.headers["Retry-After"]) <= 60
    ready = await place.get("/readyz")
    (status,) = ready["deployments"]
    assert ready["status"] == "ok"
    assert (status["provider"], status["model"], status["state"]) == ("first", "fragile", "open")
    assert status["reason"] == "upstream_failed"
    metrics = await place.get("/metrics")
    assert 'headgate_circuit_state{model="fragile",provider="first"} 2.0' in metrics
    assert (
        'headgate_failed_attempts_total{kind="upstream_failed",model="fragile",provider="first"} 7.0'
        in metrics
    )
    listed = {row["id"]: row for row in (await place.get("/v1/models?all=true"))["data"]}
    assert listed["fragile"]["available"] is False
    assert "fails at present" in listed["fragile"]["reason"]
    assert listed["alone"]["available"] is True
    assert (await place.client.blocking("openai", "alone"))[0] == 200


@pytest.mark.parametrize("place", [3], indirect=True)
async def test_a_429_keeps_everybody_away_for_as_long_as_it_says(place: Place) -> None:
    place.first.script(Script(status=429, headers={"Retry-After": "60"}))
    for _ in range(3):
        async with await place.client.send(place.client.ask("openai", "alone")) as response:
            assert response.status == 429
            assert 55 <= int(response.headers["Retry-After"]) <= 60
    assert len(place.first.requests) == 1


async def test_the_embedded_model_can_stand_in(place: Place) -> None:
    place.first.on("homely", Script(status=500))
    status, body = await place.client.blocking("openai", "homely", max_tokens=4)
    assert (status, body["model"]) == (200, "demo")
    (row,) = await place.books.settled("ann")
    assert (row.model, row.provider, row.source, row.error) == ("demo", "embedded", "provider", None)


async def test_deployments_share_the_work_and_stand_in_for_each_other(place: Place) -> None:
    for _ in range(30):
        assert (await place.client.blocking("openai", "shared"))[1]["model"] == "shared"
    assert min(len(place.first.requests), len(place.second.requests)) >= 3
    place.first.on("shared", Script(status=503))
    for _ in range(10):
        async with await place.client.send(place.client.ask("openai", "shared")) as response:
            assert (response.status, response.headers["X-Headgate-Provider"]) == (200, "second")
    rows = await place.books.settled("ann", 40)
    assert {row.model for row in rows} == {"shared"}
    report = await place.server.cli("ledger", "check")
    assert (report["ok"], report["open_holds"]) == (True, 0)
