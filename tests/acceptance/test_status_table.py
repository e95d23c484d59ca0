"""Every cause of failure, provoked for real, through every dialect's door, blocking and streamed.

What each door says is the contract's status table; nothing is ever charged, and what is the client's fault never
reaches the upstream.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest
import pytest_asyncio
from msgspec import Struct
from tests.support.doors import (
    BLOCKING,
    DOORS,
    JSON,
    OPENAI_FORM,
    STREAMING,
    Caller,
    DialectName,
    Door,
    Problem,
    Reply,
)
from tests.support.inside import inside
from tests.support.script import Script
from tests.support.stage import UPSTREAM_KEY, Stage

from headgate.bootstrap import administration
from headgate.core.completion import Chunk, Completion, Job
from headgate.providers.fake import Fake
from headgate.stores.ledger import SqliteLedger

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.process]

Told = tuple[int, str] | tuple[int, str, str]
"""Status and kind; in the OpenAI form also the code, where the contract fixes it."""

APPS = ("cold", "hasty", "keyless", "narrow")
FIRST_CHUNK_WAIT_S = 0.6


class Cause(Struct, frozen=True, kw_only=True):
    """What each dialect says; chat as openai, and thiggle too where it is None."""

    openai: Told
    genstack: Told
    dify: Told
    thiggle: Told | None = None

    def told(self, door: Door) -> Told:
        if door.dialect == "thiggle" and self.thiggle is not None:
            return self.thiggle
        return {
            "openai": self.openai,
            "chat": self.openai,
            "thiggle": self.openai,
            "genstack": self.genstack,
            "dify": self.dify,
        }[door.dialect]


FAILED = Cause(
    openai=(500, "server_error", "upstream_error"),
    thiggle=(502, "server_error", "upstream_error"),
    genstack=(502, "GatewayError"),
    dify=(400, "completion_request_error"),
)
REFUSED_OUR_KEY = Cause(
    openai=(500, "server_error", "upstream_auth"),
    thiggle=(502, "server_error", "upstream_auth"),
    genstack=(502, "GatewayError"),
    dify=(400, "completion_request_error"),
)
UNAVAILABLE = Cause(
    openai=(503, "server_error"), genstack=(503, "GatewayError"), dify=(503, "completion_request_error")
)
TIMED_OUT = Cause(
    openai=(504, "timeout_error"), genstack=(504, "GatewayError"), dify=(504, "completion_request_error")
)
LIMITED = Cause(
    openai=(429, "rate_limit_error"), genstack=(429, "GatewayError"), dify=(429, "too_many_requests")
)
REJECTED = Cause(
    openai=(400, "invalid_request_error", "upstream_rejected"),
    genstack=(400, "InvalidRequest"),
    dify=(400, "invalid_param"),
)
REJECTED_422 = Cause(
    openai=(422, "invalid_request_error", "upstream_rejected"),
    genstack=(400, "InvalidRequest"),
    dify=(400, "invalid_param"),
)

UPSTREAM_STATUSES: Mapping[int, Cause] = {
    400: REJECTED,
    401: REFUSED_OUR_KEY,
    402: REFUSED_OUR_KEY,
    403: REFUSED_OUR_KEY,
    404: FAILED,
    413: REJECTED,
    418: FAILED,
    422: REJECTED_422,
    429: LIMITED,
    500: FAILED,
    502: FAILED,
    503: UNAVAILABLE,
    529: UNAVAILABLE,
}

INVALID = Cause(
    openai=(400, "invalid_request_error"), genstack=(400, "InvalidRequest"), dify=(400, "invalid_param")
)
BAD_CREDENTIAL = Cause(
    openai=(401, "invalid_request_error", "invalid_api_key"),
    genstack=(401, "InvalidCredentials"),
    dify=(401, "unauthorized"),
)
UNKNOWN_MODEL = Cause(
    openai=(404, "not_found_error", "model_not_found"),
    thiggle=(400, "invalid_request_error"),
    genstack=(400, "InvalidRequest"),
    dify=(400, "app_unavailable"),
)
NO_FUNDS = Cause(
    openai=(402, "insufficient_funds"),
    genstack=(402, "InsufficientFunds"),
    dify=(400, "provider_quota_exceeded"),
)
TOO_LARGE = Cause(
    openai=(413, "invalid_request_error"), genstack=(413, "InvalidRequest"), dify=(413, "invalid_param")
)
WRONG_TYPE = Cause(
    openai=(415, "invalid_request_error"), genstack=(415, "InvalidRequest"), dify=(415, "invalid_param")
)
NO_KEY = Cause(
    openai=(503, "server_error"), genstack=(503, "GatewayError"), dify=(400, "provider_not_initialize")
)

WRONG_FIELD: Mapping[str, dict[str, Any]] = {
    "genstack": {"maxOutputTokens": 0},
    "dify": {"response_mode": "chatty"},
    "openai": {"max_tokens": -1},
    "chat": {"max_tokens": 0},
    "thiggle": {"max_tokens": 0},
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stage(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stage]:
    more = f"[server]\nfirst_chunk_wait_s = {FIRST_CHUNK_WAIT_S}\n"
    async with Stage(tmp_path_factory.mktemp("status"), more=more) as running:
        yield running


@pytest.fixture(scope="module")
def alice(stage: Stage) -> Caller:
    return stage.caller("alice", apps=APPS)


@pytest.fixture(scope="module")
def wasteful(stage: Stage) -> Caller:
    """Somebody whose streams break, and are charged for what came."""
    return stage.caller("wasteful")


every_door = pytest.mark.parametrize("door", DOORS, ids=lambda door: door.name)


def assert_told(reply: Reply, door: Door, cause: Cause) -> Problem:
    """The reply is this cause's error, whole: status, kind, code, form and the headers that belong to them."""
    told = cause.told(door)
    problem = reply.problem(door.dialect)
    assert (reply.status, problem.kind) == told[:2], reply.body
    if len(told) == 3:
        assert problem.code == told[2]
    retry_after = reply.headers.get("Retry-After")
    if reply.status == 429:
        assert retry_after is not None
    assert retry_after is None or 1 <= int(retry_after) <= 120
    openai_form = door.dialect in OPENAI_FORM
    never_retried = openai_form and (reply.status == 402 or problem.code == "upstream_auth")
    assert reply.headers.get("x-should-retry") == ("false" if never_retried else None)
    if door.dialect == "dify" and reply.status == 401:
        assert reply.headers["WWW-Authenticate"] == 'Bearer realm="api"'
    assert "X-Headgate-Price" not in reply.headers
    return problem


async def assert_refused(
    stage: Stage, door: Door, caller: Caller, cause: Cause, *, usd: int = 10, **question: Any
) -> Problem:
    """Ask and be refused, with no upstream call, no hold, no charge and no usage row."""
    calls, request_id = len(stage.upstream.requests), stage.new_id()
    own, body = door.question(caller, **question)
    reply = await stage.send("POST", door.path, body, own | {"X-Request-Id": request_id})
    problem = assert_told(reply, door, cause)
    assert reply.headers["X-Request-Id"] == request_id
    assert len(stage.upstream.requests) == calls
    assert stage.rows(request_id) == []
    stage.assert_untouched(caller, usd)
    return problem


async def until_unready(stage: Stage) -> None:
    async with asyncio.timeout(30):
        while True:
            if (await stage.send("GET", "/readyz")).status == 503:
                return
            await asyncio.sleep(0.01)


@every_door
@pytest.mark.parametrize("status", UPSTREAM_STATUSES)
async def test_an_upstreams_status_becomes_the_dialects_own(
    stage: Stage, alice: Caller, door: Door, status: int
) -> None:
    message = f"The upstream says {status} to {UPSTREAM_KEY}."
    stage.upstream.script(Script(status=status, body={"error": {"message": message}}))
    calls, request_id = len(stage.upstream.requests), stage.new_id()

    reply = await stage.ask(door, alice, headers={"X-Request-Id": request_id})

    problem = assert_told(reply, door, UPSTREAM_STATUSES[status])
    assert len(stage.upstream.requests) == calls + 1
    told_on = status in (400, 413, 422)
    assert (f"The upstream says {status}" in problem.message) == told_on
    assert UPSTREAM_KEY.encode() not in reply.body
    stage.assert_untouched(alice)
    (row,) = stage.rows(request_id)
    assert (row.price, row.cost, row.model) == (0, 0, "large")
    assert row.error is not None


@every_door
async def test_an_upstream_that_stays_silent_is_a_time_out(stage: Stage, alice: Caller, door: Door) -> None:
    stage.upstream.script(Script(silent=True))
    request_id = stage.new_id()
    reply = await stage.ask(door, alice, model="hasty", headers={"X-Request-Id": request_id})
    assert_told(reply, door, TIMED_OUT)
    stage.assert_untouched(alice)
    assert [(row.price, row.error) for row in stage.rows(request_id)] == [(0, "upstream_timeout")]


@every_door
@pytest.mark.parametrize(
    "script",
    [
        Script(reset_at=0),
        Script(raw="HTTP/1.1 2"),
        Script(body="<html>not what was asked for</html>", headers={"Content-Type": "text/html"}),
        Script(body={"error": {"message": "Out of order."}}),
        Script(status=302, headers={"Location": "http://127.0.0.1:1/"}, body=""),
    ],
    ids=["reset", "half a status line", "html", "200 with an error", "redirect"],
)
async def test_an_upstream_that_breaks_before_output_has_failed(
    stage: Stage, alice: Caller, door: Door, script: Script
) -> None:
    await stage.upstream.drop_connections()  # what breaks on a used connection is asked once more
    stage.upstream.script(script)
    reply = await stage.ask(door, alice)
    assert_told(reply, door, FAILED)
    stage.assert_untouched(alice)


@every_door
@pytest.mark.parametrize(
    ("given", "passed_on"), [("7", 7), ("5000", 120), ("0", 1), ("soon", 1), (None, 1), ("1.5", 2)]
)
async def test_an_upstreams_retry_after_is_passed_on_within_1_and_120_seconds(
    stage: Stage, alice: Caller, door: Door, given: str | None, passed_on: int
) -> None:
    headers = {} if given is None else {"Retry-After": given}
    stage.upstream.script(Script(status=429, headers=headers, body={"error": {"message": "Slow down."}}))
    reply = await stage.ask(door, alice)
    assert_told(reply, door, LIMITED)
    assert reply.headers["Retry-After"] == str(passed_on)


@every_door
async def test_a_wrong_field(stage: Stage, alice: Caller, door: Door) -> None:
    problem = await assert_refused(stage, door, alice, INVALID, **WRONG_FIELD[door.dialect])
    (field,) = WRONG_FIELD[door.dialect]
    assert field in problem.message
    if door.dialect != "dify":  # its form has no place for the field but the message
        assert problem.field == field


@every_door
@pytest.mark.parametrize("credential", [None, "hg-unknown"])
async def test_no_or_a_bad_credential(
    stage: Stage, alice: Caller, door: Door, credential: str | None
) -> None:
    calls = len(stage.upstream.requests)
    headers, body = door.with_credential(*door.question(alice), credential)
    reply = await stage.send("POST", door.path, body, headers)
    assert_told(reply, door, BAD_CREDENTIAL)
    assert len(stage.upstream.requests) == calls


@pytest.mark.parametrize(
    "door", [door for door in DOORS if door.dialect in OPENAI_FORM], ids=lambda door: door.name
)
async def test_an_app_key_is_not_permitted_on_other_dialects_routes(
    stage: Stage, alice: Caller, door: Door
) -> None:
    calls = len(stage.upstream.requests)
    headers, body = door.with_credential(*door.question(alice), alice.app_keys["cold"])
    reply = await stage.send("POST", door.path, body, headers)
    problem = reply.problem(door.dialect)
    assert (reply.status, problem.kind) == (403, "permission_denied_error")
    assert len(stage.upstream.requests) == calls


@pytest.mark.parametrize(
    "door", [door for door in DOORS if door.dialect != "dify"], ids=lambda door: door.name
)
async def test_an_unknown_model(stage: Stage, alice: Caller, door: Door) -> None:
    problem = await assert_refused(stage, door, alice, UNKNOWN_MODEL, model="no-such-model")
    assert problem.field == "model"
    assert "no-such-model" in problem.message


@pytest.mark.parametrize(
    "door", [door for door in DOORS if door.dialect == "dify"], ids=lambda door: door.name
)
async def test_an_app_that_is_no_longer_configured(stage: Stage, alice: Caller, door: Door) -> None:
    key = stage.key_for_a_newer_app("alice", "gone")
    caller = msgspec.structs.replace(alice, app_keys={"gone": key})
    await assert_refused(stage, door, caller, UNKNOWN_MODEL, model="gone")


@every_door
async def test_no_funds(stage: Stage, door: Door) -> None:
    poor = stage.caller(f"poor-{door.name}", 0)
    calls, request_id = len(stage.upstream.requests), stage.new_id()
    reply = await stage.ask(door, poor, headers={"X-Request-Id": request_id})
    assert_told(reply, door, NO_FUNDS)
    assert len(stage.upstream.requests) == calls
    assert stage.rows(request_id) == []
    stage.assert_untouched(poor, 0)
    if door.dialect == "genstack":
        details = reply.json["error"]["details"]
        # 9 + 16 bytes of prompt and its message at most, 8 tokens of output, in credits of 0.0001 USD.
        assert float(details["required"]) > 0
        assert details["available"] == "0"


@every_door
async def test_a_body_too_large(stage: Stage, alice: Caller, door: Door) -> None:
    await assert_refused(stage, door, alice, TOO_LARGE, padding="x" * (10 * 1024 * 1024))


@every_door
async def test_a_wrong_content_type(stage: Stage, alice: Caller, door: Door) -> None:
    calls = len(stage.upstream.requests)
    headers, body = door.question(alice)
    reply = await stage.send(
        "POST", door.path, msgspec.json.encode(body), headers | {"Content-Type": "text/plain"}
    )
    assert_told(reply, door, WRONG_TYPE)
    assert len(stage.upstream.requests) == calls


@every_door
async def test_a_model_whose_provider_has_no_key(stage: Stage, alice: Caller, door: Door) -> None:
    problem = await assert_refused(stage, door, alice, NO_KEY, model="keyless")
    # Which variable to set, and what works meanwhile.
    assert "NOBODY_SETS_THIS" in problem.message
    assert "large" in problem.message


# The order of checks, by requests that are wrong in two ways at once.

TOO_MUCH = str(10 * 1024 * 1024 + 1)


@every_door
async def test_the_method_is_checked_before_the_content_type(stage: Stage, door: Door) -> None:
    reply = await stage.send("PUT", door.path, b"x", {"Content-Type": "text/plain"})
    assert (reply.status, reply.problem("openai").kind) == (405, "invalid_request_error")


@every_door
async def test_the_content_type_is_checked_before_the_size(stage: Stage, door: Door) -> None:
    reply = await stage.send("POST", door.path, bytes(int(TOO_MUCH)), {"Content-Type": "text/plain"})
    assert_told(reply, door, WRONG_TYPE)


@every_door
async def test_the_size_is_checked_before_the_json(stage: Stage, door: Door) -> None:
    reply = await stage.send("POST", door.path, b"{" * int(TOO_MUCH), JSON)
    assert_told(reply, door, TOO_LARGE)


@every_door
@pytest.mark.parametrize("body", [b'{"prompt": "x', b"[]", b"", b'{"x": "\xff"}'])
async def test_the_json_is_checked_before_the_credential(stage: Stage, door: Door, body: bytes) -> None:
    assert_told(await stage.send("POST", door.path, body, JSON), door, INVALID)


@every_door
async def test_the_credential_is_checked_before_the_fields(stage: Stage, alice: Caller, door: Door) -> None:
    out_of_range = door.question(alice, **WRONG_FIELD[door.dialect])
    wrong_type = door.question(alice, **{field: [[]] for field in WRONG_FIELD[door.dialect]})
    idempotent = door.question(alice)
    idempotent[0]["Idempotency-Key"] = "x" * 256
    for question in (out_of_range, wrong_type, idempotent):
        for credential in (None, "hg-unknown"):
            headers, body = door.with_credential(*question, credential)
            assert_told(await stage.send("POST", door.path, body, headers), door, BAD_CREDENTIAL)


@every_door
async def test_the_fields_are_checked_before_the_model(stage: Stage, alice: Caller, door: Door) -> None:
    key = stage.key_for_a_newer_app("alice", "gone")
    caller = msgspec.structs.replace(alice, app_keys={**alice.app_keys, "gone": key})
    (field,) = WRONG_FIELD[door.dialect]
    for model in ("gone", "keyless"):
        problem = await assert_refused(stage, door, caller, INVALID, model=model, **WRONG_FIELD[door.dialect])
        assert field in problem.message
    if door.dialect == "dify":
        problem = await assert_refused(stage, door, caller, INVALID, model="gone", inputs={})
        assert "inputs" in problem.message


@every_door
async def test_the_model_is_checked_before_the_funds(stage: Stage, door: Door) -> None:
    poor = stage.caller(f"poorer-{door.name}", 0, apps=("keyless",))
    await assert_refused(stage, door, poor, NO_KEY, usd=0, model="keyless")
    if door.dialect != "dify":
        await assert_refused(stage, door, poor, UNKNOWN_MODEL, usd=0, model="no-such-model")


@pytest.mark.parametrize(
    ("path", "dialect", "unauthorized"),
    [
        ("/completion-messages/6d0c5a0e-0000-4000-8000-000000000000/stop", "dify", None),
        ("/stream/shutdown", "genstack", {"genstackToken": "bad", "streamId": 7}),
        ("/tokenize", "openai", {"prompt": 7}),
        ("/v1/detokenize", "openai", {"tokens": "seven"}),
    ],
)
async def test_the_small_endpoints_check_in_the_same_order(
    stage: Stage, path: str, dialect: DialectName, unauthorized: dict[str, object] | None
) -> None:
    wrong_type = await stage.send("POST", path, b"{", {"Content-Type": "text/plain"})
    too_large = await stage.send("POST", path, b"{" * int(TOO_MUCH), JSON)
    not_json = await stage.send("POST", path, b"{", JSON)
    no_credential = await stage.send("POST", path, unauthorized or {"user": 7})
    replies = (wrong_type, too_large, not_json, no_credential)
    assert [reply.status for reply in replies] == [415, 413, 400, 401]
    for reply in replies:
        reply.problem(dialect)


async def test_a_full_queue_is_refused_at_every_door_with_retry_after(stage: Stage) -> None:
    dora = stage.caller("dora", apps=("narrow",))
    stage.upstream.hold()
    stage.upstream.script(Script(hold_at=0))
    began = len(stage.upstream.requests)
    openai = DOORS[4]
    holding = asyncio.create_task(stage.ask(openai, dora, model="narrow"))
    await stage.upstream.request(began)
    waiting = asyncio.create_task(stage.ask(openai, dora, model="narrow"))
    await stage.books.held("dora", 2)
    replies = await asyncio.gather(*(stage.ask(door, dora, model="narrow") for door in DOORS))
    for door, reply in zip(DOORS, replies, strict=True):
        assert_told(reply, door, UNAVAILABLE)
        assert "Retry-After" in reply.headers
    assert len(stage.upstream.requests) == began + 1
    stage.upstream.release()
    await asyncio.gather(holding, waiting)


@pytest.mark.parametrize("door", STREAMING, ids=lambda door: door.name)
@pytest.mark.parametrize(
    ("script", "cause"),
    [
        (Script(pieces=("a", " b", " c"), error_at=2, error={"message": "Out.", "code": 500}), FAILED),
        (Script(pieces=("a", " b", " c"), error_at=2, error={"message": "Busy.", "code": 503}), UNAVAILABLE),
        (Script(pieces=("a", " b", " c"), error_at=2, error={"message": "Slow.", "code": 429}), LIMITED),
        (
            Script(pieces=("a", " b", " c"), error_at=2, error={"message": "Key.", "code": 401}),
            REFUSED_OUR_KEY,
        ),
        (Script(pieces=("a", " b", " c"), reset_at=2), FAILED),
        (Script(pieces=("a", " b", " c"), close_at=2), FAILED),
    ],
    ids=["failed", "overloaded", "rate limited", "our key", "reset", "cut"],
)
async def test_what_fails_after_output_is_an_event_of_the_same_kind_and_the_stream_looks_broken(
    stage: Stage, wasteful: Caller, door: Door, script: Script, cause: Cause
) -> None:
    stage.upstream.script(script)
    reply = await stage.ask(door, wasteful)
    assert reply.status == 200
    problem = door.error_event(reply)
    told = cause.told(door)
    assert problem.kind == told[1]
    if len(told) == 3:
        assert problem.code == told[2]
    if door.dialect == "dify":
        assert problem.status == told[0]
    assert not door.complete(reply)


@pytest.mark.parametrize("door", STREAMING, ids=lambda door: door.name)
async def test_what_fails_after_the_wait_for_the_first_chunk_is_an_event(
    stage: Stage, alice: Caller, door: Door
) -> None:
    stage.upstream.hold()
    stage.upstream.script(Script(status=500, hold_at=0, body={"error": {"message": "Late."}}))
    headers, body = door.question(alice)
    async with stage.http.post(stage.url + door.path, json=body, headers=headers) as response:
        assert response.status == 200  # sent without a chunk, since none came in time
        stage.upstream.release()
        reply = Reply(status=200, headers=response.headers, body=await response.read())
    assert door.error_event(reply).kind == FAILED.told(door)[1]
    # Thiggle's says of each model that it failed, and at last that all did.
    assert len(reply.events) == (2 if door.dialect == "thiggle" else 1)
    stage.assert_untouched(alice)


async def test_a_draining_gateway_refuses_at_every_door_while_it_still_listens(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    async with Stage(tmp_path_factory.mktemp("draining")) as stage:
        bob = stage.caller("bob")
        stage.upstream.script(Script(hold_at=0))
        running = asyncio.create_task(stage.ask(BLOCKING[2], bob))
        await stage.upstream.request(0)
        ending = asyncio.create_task(stage.server.stop())
        await until_unready(stage)
        for door in DOORS:
            reply = await stage.ask(door, bob)
            assert_told(reply, door, UNAVAILABLE)
            assert "Retry-After" in reply.headers
        assert (await stage.send("GET", "/livez")).status == 200
        assert len(stage.upstream.requests) == 1
        stage.upstream.release()
        assert (await running).status == 200
        assert await ending == 0
        with pytest.raises(aiohttp.ClientConnectionError):
            await stage.send("GET", "/livez")


BROKEN_LEDGER = Cause(
    openai=(503, "server_error"), genstack=(503, "InternalError"), dify=(503, "internal_server_error")
)
OUR_BUG = Cause(
    openai=(500, "server_error"), genstack=(500, "InternalError"), dify=(500, "internal_server_error")
)


@every_door
async def test_without_a_ledger_nothing_is_done(tmp_path: Path, door: Door) -> None:
    acme = Fake("acme")
    async with inside(tmp_path, {"acme": acme, "embedded": Fake("embedded")}) as house:
        carol = house.caller("carol")
        assert isinstance(house.gateway.ledger, SqliteLedger)
        await house.gateway.ledger.close()
        reply = await house.ask(door, carol)
        assert_told(reply, door, BROKEN_LEDGER)
        assert acme.calls == []
        assert (await house.send("GET", "/readyz")).status == 503
        health = await house.send("GET", "/")
        assert (health.status, health.problem("genstack").kind) == (500, "InternalError")


class Buggy(Fake):
    """Our own code at fault."""

    async def complete(self, job: Job, on_sent: Callable[[], None]) -> Completion:
        raise RuntimeError("canary-of-a-bug")

    async def stream(self, job: Job, on_sent: Callable[[], None]) -> AsyncGenerator[Sequence[Chunk], None]:
        raise RuntimeError("canary-of-a-bug")
        yield []


@every_door
async def test_our_own_bug_is_a_500_that_tells_nothing_of_it(tmp_path: Path, door: Door) -> None:
    async with inside(tmp_path, {"acme": Buggy("acme"), "embedded": Fake("embedded")}) as house:
        carol = house.caller("carol")
        reply = await house.ask(door, carol)
        assert_told(reply, door, OUR_BUG)
        assert b"canary" not in reply.body
        with administration(house.settings) as operator:
            balance = operator.balance("carol")
            assert (balance.balance, balance.open_holds) == (10 * 10**9, 0)
