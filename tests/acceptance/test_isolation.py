"""Two accounts on one gateway: what belongs to one looks to the other exactly as if it did not exist."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
from tests.support.doors import BLOCKING, BY_NAME, DOORS, Caller, Door, Reply
from tests.support.script import Script
from tests.support.stage import Stage
from tests.support.upstream import Received

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.process]

UNKNOWN_STREAM = "0" * 32
UNKNOWN_TASK = "6d0c5a0e-0000-4000-8000-000000000000"
GENSTACK, DIFY = BY_NAME["genstack-stream"], BY_NAME["dify-stream"]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stage(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stage]:
    async with Stage(tmp_path_factory.mktemp("isolation")) as running:
        yield running


@pytest.fixture(scope="module")
def alice(stage: Stage) -> Caller:
    return stage.caller("alice", apps=("cold",))


@pytest.fixture(scope="module")
def bob(stage: Stage) -> Caller:
    return stage.caller("bob", apps=("cold",))


class Listening:
    """A stream that runs until the upstream is released, after its first event."""

    def __init__(self, response: aiohttp.ClientResponse, first: Any, asked: Received) -> None:
        self.response = response
        self.first = first
        self.asked = asked

    async def rest(self) -> Reply:
        """What comes after the first event, to the end."""
        body = await self.response.read()
        return Reply(status=self.response.status, headers=self.response.headers, body=body)


@asynccontextmanager
async def listening(stage: Stage, door: Door, caller: Caller, **question: Any) -> AsyncIterator[Listening]:
    stage.upstream.hold()
    stage.upstream.script(Script(pieces=("one", " two", " three"), hold_at=2))
    calls = len(stage.upstream.requests)
    headers, body = door.question(caller, **question)
    async with stage.http.post(stage.url + door.path, json=body, headers=headers) as response:
        assert response.status == 200
        line = await response.content.readline()
        assert await response.content.readline() == b"\n"
        asked = await stage.upstream.request(calls)
        yield Listening(response, json.loads(line.removeprefix(b"data: ")), asked)
    stage.upstream.release()


async def shut_down(stage: Stage, stream_id: str, token: str | None) -> Reply:
    body = {"streamId": stream_id} | ({} if token is None else {"genstackToken": token})
    return await stage.send("POST", "/stream/shutdown", body)


async def stop(stage: Stage, task_id: str, key: str, body: dict[str, Any], prefix: str = "") -> Reply:
    headers = {"Authorization": f"Bearer {key}"}
    return await stage.send("POST", f"{prefix}/completion-messages/{task_id}/stop", body, headers)


async def test_anothers_stream_looks_unknown_and_goes_on(stage: Stage, alice: Caller, bob: Caller) -> None:
    async with listening(stage, GENSTACK, alice) as stream:
        stream_id = stream.response.headers["X-Stream-Id"]
        assert len(stream_id) >= 32
        theirs = await shut_down(stage, stream_id, bob.token)
        unknown = await shut_down(stage, UNKNOWN_STREAM, bob.token)
        assert (theirs.status, theirs.body) == (404, unknown.body)
        assert theirs.problem("genstack").kind == "InvalidRequest"
        stage.upstream.release()
        rest = await stream.rest()
        assert [event["token"] for event in rest.events[:-1]] == [" two", " three"]
        assert rest.events[-1]["completed"] is True
        finished = await shut_down(stage, stream_id, alice.token)
        assert (finished.status, finished.body) == (404, unknown.body)


@pytest.mark.parametrize("with_token", [True, False])
async def test_ones_own_stream_is_stopped(stage: Stage, alice: Caller, with_token: bool) -> None:
    async with listening(stage, GENSTACK, alice) as stream:
        stream_id = stream.response.headers["X-Stream-Id"]
        stopped = await shut_down(stage, stream_id, alice.token if with_token else None)
        assert (stopped.status, stopped.json) == (200, {"success": True})
        assert (await stream.rest()).events[-1]["aborted"] is True
        await stream.asked.closed.wait()
        assert not stream.asked.answered.is_set()


async def test_only_genstacks_own_streams_are_shut_down_there(stage: Stage, alice: Caller) -> None:
    async with listening(stage, DIFY, alice) as stream:
        task_id = stream.first["task_id"]
        for spelled in (task_id, task_id.replace("-", "")):
            assert (await shut_down(stage, spelled, alice.token)).status == 404
        stage.upstream.release()
        assert (await stream.rest()).events[-1]["event"] == "message_end"


@pytest.mark.parametrize("stream_id", ["", "x", "../..", "0" * 5000, "é", "' OR 1=1 --"])
async def test_a_strange_stream_id_is_missing_or_unknown(stage: Stage, alice: Caller, stream_id: str) -> None:
    reply = await shut_down(stage, stream_id, alice.token)
    assert reply.status == (404 if stream_id else 400)
    assert reply.problem("genstack").kind == "InvalidRequest"


@pytest.mark.parametrize(
    "who", ["another account", "another user", "no user", "another app", "another account's app"]
)
async def test_anothers_task_is_not_stopped(stage: Stage, alice: Caller, bob: Caller, who: str) -> None:
    key, body = {
        "another account": (bob.key, {"user": "u1"}),
        "another user": (alice.key, {"user": "u2"}),
        "no user": (alice.key, {}),
        "another app": (alice.app_keys["cold"], {"user": "u1"}),
        "another account's app": (bob.app_keys["cold"], {"user": "u1"}),
    }[who]
    async with listening(stage, DIFY, alice) as stream:
        reply = await stop(stage, stream.first["task_id"], key, body)
        unknown = await stop(stage, UNKNOWN_TASK, key, body)
        assert (reply.status, reply.json) == (200, {"result": "success"})
        assert (unknown.status, unknown.body) == (200, reply.body)
        stage.upstream.release()
        rest = await stream.rest()
        assert [event["answer"] for event in rest.events[:-1]] == [" two", " three"]
        assert rest.events[-1]["event"] == "message_end"
        assert stream.asked.answered.is_set()


@pytest.mark.parametrize("app", ["large", "cold"])
@pytest.mark.parametrize("prefix", ["", "/v1"])
async def test_ones_own_task_is_stopped(stage: Stage, alice: Caller, app: str, prefix: str) -> None:
    key = alice.key if app == "large" else alice.app_keys["cold"]
    async with listening(stage, DIFY, alice, model=app) as stream:
        reply = await stop(stage, stream.first["task_id"], key, {"user": "u1"}, prefix)
        assert (reply.status, reply.json) == (200, {"result": "success"})
        assert (await stream.rest()).events[-1]["event"] == "message_end"
        await stream.asked.closed.wait()
        assert not stream.asked.answered.is_set()


@pytest.mark.parametrize("task_id", ["x", "00000000000000000000000000000000", "...", "' OR 1=1", "9" * 300])
async def test_a_strange_task_id_is_answered_as_an_unknown_one(
    stage: Stage, alice: Caller, task_id: str
) -> None:
    reply = await stop(stage, task_id, alice.key, {"user": "u1"})
    assert (reply.status, reply.json) == (200, {"result": "success"})


async def balance_of(stage: Stage, caller: Caller) -> dict[str, str]:
    headers = {"Authorization": f"Bearer {caller.key}"}
    reply = await stage.send("GET", "/v1/balance", headers=headers)
    return dict(reply.json)


@pytest.mark.parametrize("door", BLOCKING, ids=lambda door: door.name)
async def test_what_one_uses_another_does_not_pay(stage: Stage, door: Door) -> None:
    payer, other = stage.caller(f"payer-{door.name}"), stage.caller(f"other-{door.name}")
    reply = await stage.ask(door, payer, headers={"X-Request-Id": f"same-{door.name}"})
    assert reply.status == 200
    # The same request id from somebody else is another request.
    assert (await stage.send("GET", "/livez", headers={"X-Request-Id": f"same-{door.name}"})).status == 200
    rows = stage.books.rows(payer.account)
    assert [row.request_id for row in rows] == [f"same-{door.name}"]
    assert rows[0].price > 0
    assert stage.books.rows(other.account) == []
    stage.assert_untouched(other)
    paid = await balance_of(stage, payer)
    assert paid["account"] == payer.account
    assert float(paid["available"]) == pytest.approx(10 - rows[0].price / 1e9, abs=1e-12)
    assert await balance_of(stage, other) == {
        "account": other.account,
        "balance": "10",
        "held": "0",
        "available": "10",
    }


async def test_what_one_holds_is_not_held_of_another(stage: Stage, alice: Caller) -> None:
    onlooker = stage.caller("onlooker")
    async with listening(stage, GENSTACK, alice) as stream:
        assert float((await balance_of(stage, alice))["held"]) > 0
        assert (await balance_of(stage, onlooker))["held"] == "0"
        stage.upstream.release()
        await stream.rest()


async def test_one_without_funds_is_refused_beside_one_with(stage: Stage, alice: Caller) -> None:
    poor = stage.caller("poor", 0)
    for door in DOORS:
        statuses = [(await stage.ask(door, caller)).status for caller in (poor, alice)]
        assert statuses == [400 if door.dialect == "dify" else 402, 200]


async def test_the_same_request_id_from_two_accounts_is_two_requests(stage: Stage) -> None:
    callers = [stage.caller("twin-1"), stage.caller("twin-2")]
    for caller in callers:
        reply = await stage.ask(BY_NAME["openai"], caller, headers={"X-Request-Id": "twins"})
        assert reply.status == 200
    prices = [[(row.request_id, row.price) for row in stage.books.rows(caller.account)] for caller in callers]
    assert prices[0] == prices[1]
    assert prices[0][0][1] > 0
    stage.books.check()
