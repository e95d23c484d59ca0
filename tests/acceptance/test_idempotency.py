"""The same request sent again under one Idempotency-Key: one debit, one answer, in every dialect."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from tests.support.doors import BLOCKING, BY_NAME, DOORS, STREAMING, Caller, Door, Reply
from tests.support.script import Script
from tests.support.stage import Stage
from tests.support.until import until

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.process]

every_door = pytest.mark.parametrize("door", DOORS, ids=lambda door: door.name)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stage(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stage]:
    async with Stage(tmp_path_factory.mktemp("keyed")) as stage:
        yield stage


class Keyed:
    """One caller and one key; `ask` sends the same request each time."""

    def __init__(self, stage: Stage, door: Door, number: int) -> None:
        self.stage = stage
        self.door = door
        self.caller: Caller = stage.caller(f"keyed-{door.name}-{number}")
        self.key = f"key {number}"

    async def ask(self, text: str = "say hello", key: str | None = None, **fields: Any) -> Reply:
        headers = {"Idempotency-Key": key or self.key}
        return await self.stage.ask(self.door, self.caller, text, headers=headers, **fields)

    @property
    def spent(self) -> int:
        balance = self.stage.books.balance(self.caller.account)
        assert (balance.held, balance.open_holds) == (0, 0)
        return 10 * 10**9 - balance.balance

    @property
    def rows(self) -> int:
        return len(self.stage.books.rows(self.caller.account))


_numbers = iter(range(10_000))


@pytest.fixture
def keyed(stage: Stage, door: Door) -> Keyed:
    return Keyed(stage, door, next(_numbers))


def text_of(door: Door, reply: Reply) -> str:
    """All text of an answer, streamed or not."""
    found: list[str | None] = []
    for body in reply.events if door.streams else [reply.json]:
        if body == "[DONE]":
            continue
        if door.dialect == "dify":
            found.append(body.get("answer"))
        elif door.dialect == "genstack" and not door.streams:
            found.append(body.get("output"))
        else:
            found.append(body.get("token"))
        parts = [choice.get("message") or choice.get("delta") or choice for choice in body.get("choices", ())]
        found += [part.get("text") or part.get("content") for part in parts]
    return "".join(filter(None, found))


@every_door
async def test_the_same_request_again_gives_the_same_answer_for_one_price(keyed: Keyed, door: Door) -> None:
    calls = len(keyed.stage.upstream.requests)
    first = await keyed.ask()
    spent = keyed.spent
    again = await keyed.ask()
    assert (first.status, again.status) == (200, 200)
    assert spent > 0
    assert (keyed.spent, keyed.rows, len(keyed.stage.upstream.requests)) == (spent, 1, calls + 1)
    assert "Idempotent-Replayed" not in first.headers
    assert again.headers["Idempotent-Replayed"] == "true"
    assert again.headers["X-Headgate-Provider"] == first.headers["X-Headgate-Provider"]
    if door.streams:
        assert door.complete(again)
        assert text_of(door, again) == text_of(door, first) != ""
        assert again.events[-1] == first.events[-1]
    else:
        assert again.body == first.body
        assert again.headers["X-Headgate-Price"] == first.headers["X-Headgate-Price"]


@every_door
async def test_the_key_with_another_body_is_refused_and_the_answer_stays(keyed: Keyed, door: Door) -> None:
    first = await keyed.ask()
    spent = keyed.spent
    other = await keyed.ask("something else")
    assert other.status == (400 if door.dialect == "dify" else 422)
    assert other.problem(door.dialect).message
    assert keyed.spent == spent
    assert text_of(door, await keyed.ask()) == text_of(door, first)


@every_door
async def test_a_twin_is_told_that_the_first_is_under_way(keyed: Keyed, door: Door) -> None:
    keyed.stage.upstream.hold()
    keyed.stage.upstream.script(Script(pieces=("slow",), hold_at=0))
    calls = len(keyed.stage.upstream.requests)
    asking = asyncio.ensure_future(keyed.ask())
    await keyed.stage.upstream.request(calls)
    twin = await keyed.ask()
    assert twin.status == 409
    keyed.stage.upstream.release()
    first = await asking
    assert first.status == 200
    assert text_of(door, await keyed.ask()) == text_of(door, first) == "slow"
    assert keyed.rows == 1


@every_door
async def test_of_many_twins_at_once_one_is_answered_and_charged(keyed: Keyed, door: Door) -> None:
    replies = await asyncio.gather(*[keyed.ask() for _ in range(12)])
    assert {reply.status for reply in replies} <= {200, 409}
    assert 200 in {reply.status for reply in replies}
    assert keyed.rows == 1


@every_door
async def test_what_failed_without_a_charge_may_be_tried_again(keyed: Keyed, door: Door) -> None:
    keyed.stage.upstream.script(Script(status=500, body={"error": {"message": "broken"}}))
    failed = await keyed.ask()
    assert failed.status >= 400
    assert keyed.spent == 0
    again = await keyed.ask()
    assert again.status == 200
    assert "Idempotent-Replayed" not in again.headers
    assert keyed.spent > 0


@pytest.mark.parametrize("door", STREAMING, ids=lambda door: door.name)
async def test_a_stream_that_broke_is_replayed_as_it_broke(keyed: Keyed, door: Door) -> None:
    keyed.stage.upstream.script(Script(pieces=("one", " two", " three"), error_at=2))
    first = await keyed.ask()
    spent, calls = keyed.spent, len(keyed.stage.upstream.requests)
    again = await keyed.ask()
    assert spent > 0
    assert (keyed.spent, len(keyed.stage.upstream.requests)) == (spent, calls)
    assert not door.complete(again)
    assert text_of(door, again) == text_of(door, first) == "one two"
    assert door.error_event(again) == door.error_event(first)


@pytest.mark.parametrize(
    "door", [door for door in STREAMING if door.name == "genstack-stream"], ids=lambda door: door.name
)
async def test_a_stream_that_was_stopped_is_replayed_as_aborted(keyed: Keyed, door: Door) -> None:
    upstream = keyed.stage.upstream
    upstream.hold()
    upstream.script(Script(pieces=("one", " two"), hold_at=1))
    calls = len(upstream.requests)
    headers, body = door.question(keyed.caller)
    headers["Idempotency-Key"] = keyed.key
    async with keyed.stage.http.post(keyed.stage.url + door.path, json=body, headers=headers) as response:
        await upstream.request(calls)
        await response.content.readuntil(b"one")
        stream_id = response.headers["X-Stream-Id"]
        assert (await keyed.stage.send("POST", "/stream/shutdown", {"streamId": stream_id})).status == 200
        rest = await response.read()
    upstream.release()
    assert b'"aborted":true' in rest
    again = await keyed.ask()
    assert again.headers["X-Stream-Id"] == stream_id
    assert again.events[-1]["aborted"] is True
    assert again.events[-1]["response"] == json.loads(rest.decode().strip().split("data: ")[-1])["response"]
    assert keyed.rows == 1


@pytest.mark.parametrize("door", BLOCKING, ids=lambda door: door.name)
async def test_a_client_that_left_and_comes_back_is_not_charged_twice(keyed: Keyed, door: Door) -> None:
    upstream = keyed.stage.upstream
    upstream.hold()
    upstream.script(Script(pieces=("slow",), hold_at=0))
    calls = len(upstream.requests)
    asking = asyncio.ensure_future(keyed.ask())
    await upstream.request(calls)
    asking.cancel()
    await until(lambda: keyed.stage.books.rows(keyed.caller.account))
    upstream.release()
    spent = keyed.spent
    assert spent > 0
    again = await keyed.ask()
    assert again.status == 409
    assert (keyed.spent, keyed.rows) == (spent, 1)


async def test_two_apps_of_an_account_never_share_an_answer(stage: Stage) -> None:
    caller = stage.caller(f"apps-{next(_numbers)}", apps=("large", "demo"))
    door = BY_NAME["dify"]
    headers = {"Idempotency-Key": "same"}
    first = await stage.ask(door, caller, headers=headers)
    other = await stage.ask(door, caller, headers=headers, model="demo")
    assert (first.status, other.status) == (200, 400), "the same key for something else"


async def test_models_that_failed_in_a_stream_fail_in_its_replay(stage: Stage) -> None:
    door = BY_NAME["thiggle-stream"]
    keyed = Keyed(stage, door, next(_numbers))
    first = await keyed.ask(model=["large", "keyless", "large"])
    spent = keyed.spent
    again = await keyed.ask(model=["large", "keyless", "large"])
    assert keyed.spent == spent > 0

    def ends(reply: Reply) -> dict[int, tuple[str | None, bool]]:
        choices = [choice for event in reply.events if event != "[DONE]" for choice in event["choices"]]
        return {choice["index"]: (choice["finish_reason"], "error" in choice) for choice in choices}

    assert ends(again) == ends(first)
    assert ends(first)[1] == ("error", True)
    assert again.headers["X-Headgate-Provider"] == first.headers["X-Headgate-Provider"]


async def test_figures_too_odd_to_be_kept_do_not_hold_up_the_settle(stage: Stage) -> None:
    keyed = Keyed(stage, BY_NAME["openai"], next(_numbers))
    usage = {"prompt_tokens": 2**40, "completion_tokens": 1, "total_tokens": 2**40 + 1}
    stage.upstream.script(Script(pieces=("hi",), usage=usage))
    assert (await keyed.ask()).status == 200
    spent = keyed.spent
    assert spent > 0
    assert (await keyed.ask()).status == 409
    assert keyed.spent == spent


@every_door
@pytest.mark.parametrize("key", ["x" * 256, "é", "a\tb"])
async def test_what_is_no_key_is_refused_by_name(keyed: Keyed, door: Door, key: str) -> None:
    calls = len(keyed.stage.upstream.requests)
    headers, body = door.question(keyed.caller)
    raw = json.dumps(body).encode()
    head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    start = f"POST {door.path} HTTP/1.1\r\nHost: h\r\nContent-Length: {len(raw)}\r\n{head}".encode()
    reply = await keyed.stage.raw(start + b"Idempotency-Key: " + key.encode("latin-1") + b"\r\n\r\n" + raw)
    assert reply.status == 400
    assert "Idempotency-Key" in reply.problem(door.dialect).message
    assert len(keyed.stage.upstream.requests) == calls


@pytest.mark.parametrize("door", [DOORS[4]], ids=lambda door: door.name)
async def test_keys_belong_to_their_account(keyed: Keyed, door: Door) -> None:
    other = Keyed(keyed.stage, door, next(_numbers))
    await keyed.ask(key="shared")
    reply = await other.ask("another text", key="shared")
    assert reply.status == 200
    assert "Idempotent-Replayed" not in reply.headers


@pytest.mark.parametrize("door", [BY_NAME["openai"], BY_NAME["chat-stream"]], ids=lambda door: door.name)
async def test_an_answer_is_replayed_after_a_restart_and_a_crash(door: Door, tmp_path: Path) -> None:
    async with Stage(tmp_path) as stage:
        keyed = Keyed(stage, door, 1)
        first = await keyed.ask()
        await stage.server.kill()
        await stage.server.start()
        again = await keyed.ask()
        assert text_of(door, again) == text_of(door, first)
        stage.upstream.hold()
        stage.upstream.script(Script(pieces=("one", " two"), hold_at=1 if door.streams else 0))
        calls = len(stage.upstream.requests)
        asking = asyncio.ensure_future(keyed.ask("later", key="crashing"))
        await stage.upstream.request(calls)
        await stage.server.kill()
        await asyncio.wait((asking,))
        asking.exception()
        stage.upstream.release()
        await stage.server.start()
        before = keyed.spent
        retried = await keyed.ask("later", key="crashing")
        charged = keyed.spent - before
        # Either the crash charged what was delivered, and the key says so, or the retry is the only one to pay.
        assert (retried.status == 409) == (not charged), (retried.status, charged)
        assert stage.books.check().ok
