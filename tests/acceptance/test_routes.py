"""The route table, walked: which routes cost money and hold it first, and what every path says to every method."""

import re
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from tests.support.doors import DOORS, JSON, Caller, DialectName, Door
from tests.support.inside import Inside, inside
from tests.support.stage import Stage

from headgate.bootstrap import administration
from headgate.core.accounts import Balance
from headgate.core.completion import Chunk, Completion, Job
from headgate.providers.fake import Fake
from headgate.web.completions import CompletionEndpoint
from headgate.web.routes import RouteRow

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.process]

PARAMETERS = {"{task_id}": "6d0c5a0e-0000-4000-8000-000000000000", "{id:path}": "acme/large"}
CONTRACT: dict[DialectName, set[tuple[str, str]]] = {
    "genstack": {("GET", "/"), ("POST", "/"), ("POST", "/stream"), ("POST", "/stream/shutdown")},
    "dify": {
        ("POST", "/completion-messages"),
        ("POST", "/completion-messages/{task_id}/stop"),
        ("POST", "/files/upload"),
        ("GET", "/parameters"),
        ("GET", "/info"),
    },
    "openai": {
        ("POST", "/completions"),
        ("GET", "/models"),
        ("GET", "/models/{id:path}"),
        ("GET", "/balance"),
        ("POST", "/tokenize"),
        ("POST", "/detokenize"),
        ("GET", "/tokenizer_info"),
    },
    "chat": {("POST", "/chat/completions")},
    "thiggle": {("POST", "/v1/completion")},
}
OPERATIONS = {("GET", "/livez"), ("GET", "/readyz"), ("GET", "/metrics")}
COSTS_MONEY = {"/", "/stream", "/completion-messages", "/completions", "/chat/completions", "/v1/completion"}


class Watched(Fake):
    """Notes, at the moment it is called, what the database says is held of the caller's account."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.look: Callable[[], Balance] | None = None
        self.seen: list[tuple[str, Balance]] = []
        self.counted: list[str] = []

    async def count_prompt(self, job: Job) -> int | None:
        self.counted.append(job.request_id)
        return await super().count_prompt(job)

    async def complete(self, job: Job, on_sent: Callable[[], None]) -> Completion:
        self._note(job)
        return await super().complete(job, on_sent)

    async def stream(self, job: Job, on_sent: Callable[[], None]) -> AsyncGenerator[Sequence[Chunk], None]:
        self._note(job)
        async for batch in super().stream(job, on_sent):
            yield batch

    def _note(self, job: Job) -> None:
        assert self.look is not None
        self.seen.append((job.request_id, self.look()))


class House:
    """The gateway, its provider, and one customer."""

    def __init__(self, inner: Inside, watched: Watched, caller: Caller) -> None:
        self.inner = inner
        self.watched = watched
        self.caller = caller


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def house(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[House]:
    watched = Watched("acme")
    providers = {"acme": watched, "embedded": Fake("embedded")}
    async with inside(tmp_path_factory.mktemp("routes"), providers) as inner:
        caller = inner.caller("alice")
        with administration(inner.settings) as operator:
            watched.look = lambda: operator.balance("alice")
            yield House(inner, watched, caller)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stage(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stage]:
    async with Stage(tmp_path_factory.mktemp("served")) as running:
        yield running


@pytest.fixture(scope="module")
def bob(stage: Stage) -> Caller:
    return stage.caller("bob")


def real(path: str) -> str:
    for placeholder, value in PARAMETERS.items():
        path = path.replace(placeholder, value)
    return path


def doors_at(row: RouteRow) -> list[Door]:
    """The questions that this row answers: blocking, streamed, or both."""
    return [
        Door(name=door.name, dialect=door.dialect, path=row.path, streams=door.streams)
        for door in DOORS
        if door.dialect == row.dialect
        and (row.dialect != "genstack" or door.streams == row.path.endswith("/stream"))
    ]


async def test_the_table_holds_every_route_of_the_contract_and_no_other(house: House) -> None:
    wanted = set(OPERATIONS)
    for dialect, routes in CONTRACT.items():
        wanted |= routes
        if dialect in ("openai", "chat", "dify"):
            wanted |= {(method, f"/v1{path}") for method, path in routes}
    assert {(row.method, row.path) for row in house.inner.rows} == wanted
    assert house.inner.app.rows == house.inner.rows


async def test_exactly_the_completion_routes_are_flagged(house: House) -> None:
    for row in house.inner.rows:
        costs = row.method == "POST" and row.path.removeprefix("/v1") in {
            path.removeprefix("/v1") for path in COSTS_MONEY
        }
        assert row.calls_model == costs, row.path
        assert isinstance(row.app, CompletionEndpoint) == costs, row.path


async def test_every_route_that_reaches_a_provider_holds_money_first(house: House) -> None:
    walked = 0
    for row in house.inner.rows:
        if not row.calls_model:
            continue
        for door in doors_at(row):
            walked += 1
            request_id = f"walk-{walked}"
            house.watched.seen.clear()
            headers, body = door.question(house.caller)
            reply = await house.inner.send("POST", row.path, body, headers | {"X-Request-Id": request_id})
            assert reply.status == 200, (row.path, reply.body)
            ((seen_id, balance),) = house.watched.seen
            assert seen_id == request_id
            assert balance.open_holds == 1, row.path
            with administration(house.inner.settings) as operator:
                (usage,) = [
                    record.row for record in operator.usage("alice") if record.row.request_id == request_id
                ]
                after = operator.balance("alice")
            # Enough was held, it was durable before the call, and none of it is left.
            assert balance.held >= usage.price > 0
            assert (after.held, after.open_holds) == (0, 0)
            assert after.balance == balance.balance - usage.price
    assert walked == 16


async def test_without_funds_no_route_reaches_a_provider(house: House) -> None:
    poor = house.inner.caller("poor", 0)
    calls = len(house.watched.calls)
    for row in house.inner.rows:
        if row.calls_model:
            for door in doors_at(row):
                headers, body = door.question(poor)
                reply = await house.inner.send("POST", row.path, body, headers)
                assert reply.status == (400 if row.dialect == "dify" else 402), row.path
    assert len(house.watched.calls) == calls


async def test_other_routes_never_reach_a_provider(house: House) -> None:
    calls, counted = len(house.watched.calls), len(house.watched.counted)
    for row in house.inner.rows:
        if row.calls_model:
            continue
        # The best a client could do to make it complete something: every dialect's body, and its credential.
        for door in DOORS:
            headers, body = door.question(house.caller, streamId="0" * 32)
            bearer = {"Authorization": f"Bearer {house.caller.key}"}
            reply = await house.inner.send(row.method, real(row.path), body, headers | bearer)
            # This house has no tokenizer: not that of a named model, nor one by default. Uploads are no JSON.
            expected = (400, 503) if "tokenize" in row.path else (415,) if "files" in row.path else (200, 404)
            assert reply.status in expected, (row.path, reply.body)
    assert len(house.watched.calls) == calls
    assert len(house.watched.counted) == counted
    balance = house.watched.look() if house.watched.look else None
    assert balance is not None
    assert balance.open_holds == 0


# What every path says to every method, over real connections.

STRANGE_METHODS = ("PUT", "DELETE", "PATCH", "TRACE", "QUERY", "PROPFIND", "LOCK", "FOO", "get", "X-Y_Z")
UI = {"/ui": {"GET"}, "/ui/": {"GET"}}


def allowed_by_path(rows: Sequence[RouteRow]) -> dict[str, set[str]]:
    allowed: dict[str, set[str]] = {path: set(methods) for path, methods in UI.items()}
    for row in rows:
        allowed.setdefault(real(row.path), set()).add(row.method)
    for methods in allowed.values():
        if "GET" in methods:
            methods.add("HEAD")
    return allowed


async def exchange(stage: Stage, method: str, path: str, *headers: str) -> Any:
    lines = "".join(f"{line}\r\n" for line in headers)
    return await stage.raw(f"{method} {path} HTTP/1.1\r\nHost: x\r\n{lines}\r\n".encode())


@pytest.mark.parametrize("method", [*STRANGE_METHODS, "GET", "POST"])
async def test_other_methods_are_405_with_what_is_allowed(stage: Stage, house: House, method: str) -> None:
    for path, allowed in allowed_by_path(house.inner.rows).items():
        if method in allowed:
            continue
        reply = await exchange(stage, method, path)
        problem = reply.problem("openai")
        assert (reply.status, problem.kind) == (405, "invalid_request_error"), (method, path)
        assert set(reply.headers["Allow"].split(", ")) == allowed, (method, path)
        assert re.fullmatch(r"[A-Za-z0-9._-]{1,128}", reply.headers["X-Request-Id"])


UNKNOWN = (
    "/nothing",
    "/v1",
    "/v1/",
    "/v1/nothing",
    "/v1/completions/",
    "//v1/completions",
    "/V1/completions",
    "/v1/completion/x",
    "/v2/completions",
    "/stream/",
    "/v1/stream",
    "/v1/livez",
    "/completion",
    "/completion-messages/x",
    "/completion-messages/x/y/stop",
    "/ui/nothing.js",
    "/ui/../server.py",
    "/%00",
    "/%ff",
    "/" + "x" * 3000,
)


@pytest.mark.parametrize("path", UNKNOWN, ids=lambda path: path[:40])
async def test_an_unknown_path_is_404_in_the_openai_form(stage: Stage, path: str) -> None:
    for method in ("GET", "POST", "PUT", "TRACE", "FOO"):
        reply = await exchange(stage, method, path)
        problem = reply.problem("openai")
        assert (reply.status, problem.kind) == (404, "invalid_request_error"), (method, path)
        assert reply.headers["X-Request-Id"]


@pytest.mark.parametrize(
    "request_",
    [
        b"\r\nhello\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nbad header\r\n\r\n",
        b"F(O /livez HTTP/1.1\r\n\r\n",
    ],
)
async def test_what_is_no_http_is_refused_in_the_openai_form(stage: Stage, request_: bytes) -> None:
    reply = await stage.raw(request_)
    assert (reply.status, reply.problem("openai").kind) == (400, "invalid_request_error")
    assert reply.headers["X-Request-Id"]
    assert (await stage.send("GET", "/livez")).status == 200


GETS = (
    "/",
    "/livez",
    "/readyz",
    "/metrics",
    "/ui",
    "/v1/models",
    "/models/large",
    "/v1/balance",
    "/info",
    "/parameters",
)


@pytest.mark.parametrize("path", [*GETS, "/nothing", "/v1/models/nothing"])
async def test_head_is_get_without_a_body(stage: Stage, bob: Caller, path: str) -> None:
    headers = {"Authorization": f"Bearer {bob.key}"}
    got = await stage.send("GET", path, headers=headers)
    head = await stage.send("HEAD", path, headers=headers)
    assert head.status == got.status
    assert head.body == b""
    assert head.headers["Content-Type"] == got.headers["Content-Type"]
    if path != "/metrics":  # its figures move with every request
        assert head.headers["Content-Length"] == str(len(got.body))


async def test_head_without_a_credential_is_refused_as_get_is(stage: Stage) -> None:
    assert (await stage.send("HEAD", "/v1/balance")).status == 401


@pytest.mark.parametrize("door", DOORS, ids=lambda door: door.name)
async def test_openai_and_dify_routes_exist_with_and_without_v1(
    stage: Stage, bob: Caller, door: Door
) -> None:
    headers, body = door.question(bob)
    bare = door.path.removeprefix("/v1")
    statuses = [(await stage.send("POST", prefix + bare, body, headers)).status for prefix in ("", "/v1")]
    assert (
        statuses
        == {
            "openai": [200, 200],
            "chat": [200, 200],
            "dify": [200, 200],
            "thiggle": [404, 200],
            "genstack": [200, 404],
        }[door.dialect]
    )


def everything(caller: Caller) -> list[tuple[str, str, bytes | dict[str, Any] | None, dict[str, str], int]]:
    """(method, path, body, headers, status): each kind of response there is."""
    key = {"Authorization": f"Bearer {caller.key}"}
    asked: list[tuple[str, str, bytes | dict[str, Any] | None, dict[str, str], int]] = []
    for door in DOORS:
        headers, body = door.question(caller)
        asked += [
            ("POST", door.path, body, headers, 200),
            ("POST", door.path, b"{", JSON, 400),
            ("POST", door.path, {"model": "x"}, JSON, 401),
            ("POST", door.path, b"", {"Content-Type": "text/plain"}, 415),
            ("PUT", door.path, None, {}, 405),
        ]
    asked += [("GET", path, None, key, 200) for path in GETS]
    asked += [
        ("GET", "/v1/balance", None, {}, 401),
        ("GET", "/v1/models/nothing", None, key, 404),
        ("GET", "/nothing", None, {}, 404),
        ("HEAD", "/livez", None, {}, 200),
        ("GET", "/ui/", None, {}, 308),
        ("GET", "/ui", None, {"If-None-Match": "*"}, 304),
        ("POST", "/stream/shutdown", {"streamId": "0" * 32}, {}, 404),
        ("POST", "/completion-messages/x/stop", {"user": "u"}, key, 200),
        ("OPTIONS", "/v1/completions", None, PREFLIGHT, 200),
    ]
    return asked


PREFLIGHT = {
    "Origin": "https://page.example",
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization, content-type, x-request-id, x-stainless-lang",
}


async def test_every_response_carries_a_request_id_of_its_own(stage: Stage, bob: Caller) -> None:
    seen = set()
    asked = everything(bob)
    for method, path, body, headers, status in asked:
        reply = await stage.send(method, path, body, headers)
        assert reply.status == status, (method, path, reply.body)
        request_id = reply.headers.get("X-Request-Id")
        assert request_id is not None, (method, path, status)
        assert re.fullmatch(r"[A-Za-z0-9._-]{1,128}", request_id)
        seen.add(request_id)
    assert len(seen) == len(asked)


async def test_a_valid_request_id_of_the_clients_is_echoed_once(stage: Stage, bob: Caller) -> None:
    for number, (method, path, body, headers, _) in enumerate(everything(bob)):
        given = f"Mine_{number}.x-" + "y" * (115 if number == 3 else 0)
        options = {"X-Request-Id": given}
        async with stage.http.request(
            method,
            stage.url + path,
            json=body if isinstance(body, dict) else None,
            data=body if isinstance(body, bytes) else None,
            headers=headers | options,
            allow_redirects=False,
        ) as response:
            assert response.headers.getall("X-Request-Id") == [given], (method, path)


@pytest.mark.parametrize(
    "given", ["", "x" * 129, "a b", "a/b", "a\tb", "ä", "<script>", "a,b", "${x}", "a:b"]
)
async def test_another_request_id_is_replaced(stage: Stage, bob: Caller, given: str) -> None:
    for method, path, body, headers, status in everything(bob)[:6] + everything(bob)[-6:]:
        reply = await stage.send(method, path, body, headers | {"X-Request-Id": given})
        assert reply.status == status
        assert reply.headers["X-Request-Id"] != given
        assert re.fullmatch(r"[A-Za-z0-9._-]{1,128}", reply.headers["X-Request-Id"])


EXPOSED = {
    "x-stream-id",
    "x-request-id",
    "x-headgate-provider",
    "x-headgate-price",
    *(
        f"x-ratelimit-{what}-{unit}"
        for what in ("limit", "remaining", "reset")
        for unit in ("requests", "tokens")
    ),
}


async def test_any_page_may_read_every_response_but_without_credentials(stage: Stage, bob: Caller) -> None:
    for method, path, body, headers, _ in everything(bob):
        if method == "OPTIONS":
            continue
        reply = await stage.send(method, path, body, headers | {"Origin": "https://page.example"})
        assert reply.headers["Access-Control-Allow-Origin"] == "*", (method, path)
        exposed = {name.strip().lower() for name in reply.headers["Access-Control-Expose-Headers"].split(",")}
        assert exposed >= EXPOSED
        assert "Access-Control-Allow-Credentials" not in reply.headers


async def test_a_preflight_allows_what_clients_send(stage: Stage, house: House) -> None:
    for path, allowed in allowed_by_path(house.inner.rows).items():
        for method in allowed - {"HEAD"}:
            asked = PREFLIGHT | {"Access-Control-Request-Method": method}
            reply = await stage.send("OPTIONS", path, headers=asked)
            assert reply.status == 200, reply.body
            assert reply.headers["Access-Control-Allow-Origin"] == "*"
            assert method in reply.headers["Access-Control-Allow-Methods"]
            permitted = {
                name.strip() for name in reply.headers["Access-Control-Allow-Headers"].lower().split(",")
            }
            assert permitted >= {"authorization", "content-type", "x-request-id", "x-stainless-lang"}
            assert "Access-Control-Allow-Credentials" not in reply.headers


async def test_a_configured_list_of_origins_is_the_list(tmp_path: Path) -> None:
    more = '[server]\ncors_origins = ["https://app.example"]\n'
    async with inside(tmp_path, {"acme": Fake("acme"), "embedded": Fake("embedded")}, more=more) as inner:
        ours = await inner.send("GET", "/livez", headers={"Origin": "https://app.example"})
        assert ours.headers["access-control-allow-origin"] == "https://app.example"
        theirs = await inner.send("GET", "/livez", headers={"Origin": "https://page.example"})
        assert "access-control-allow-origin" not in theirs.headers
        refused = await inner.send("OPTIONS", "/v1/completions", headers=PREFLIGHT)
        assert "access-control-allow-origin" not in refused.headers
