"""One completion route as a client meets it: refusals, the way of a stream, and clients that leave or do not read."""

import asyncio
import contextlib
import json
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from tests.support.doors import BY_NAME, DOORS, Caller, Door
from tests.support.exchange import Exchange, scope_of
from tests.support.inside import Inside, inside
from tests.support.until import until

from headgate.bootstrap import administration
from headgate.core.accounts import Balance, UsageRow
from headgate.core.completion import Answer
from headgate.core.errors import LedgerUnavailable, UpstreamFailed, UpstreamTimeout
from headgate.dialects.openai import OpenAICompletions
from headgate.providers.fake import Fake, FakeAnswer
from headgate.web import completions

TIMES = """
[server]
first_chunk_wait_s = {wait}
ping_interval_s = 0.03
write_timeout_s = 0.03
max_body_bytes = 2000
"""
OPENAI, STREAM = BY_NAME["openai"], BY_NAME["openai-stream"]


class Web:
    """A gateway whose models answer as `acme` is told to."""

    def __init__(self, gateway: Inside, acme: Fake, caller: Caller) -> None:
        self.inside = gateway
        self.acme = acme
        self.caller = caller

    def exchange(self, door: Door, *parts: bytes, **fields: Any) -> Exchange:
        headers, body = door.question(self.caller, **fields)
        return Exchange(*(parts or (json.dumps(body).encode(),)), scope=scope_of("POST", door.path, headers))

    async def play(self, exchange: Exchange) -> None:
        await self.inside.app(exchange.scope, exchange.receive, exchange.send)

    @contextlib.asynccontextmanager
    async def under_way(self, exchange: Exchange) -> AsyncIterator["asyncio.Task[None]"]:
        task = asyncio.ensure_future(self.play(exchange))
        try:
            yield task
        finally:
            exchange.leave()
            async with asyncio.timeout(30):
                await task

    async def rows(self, count: int = 1) -> list[UsageRow]:
        """The usage rows, once there are so many."""
        with administration(self.inside.settings) as operator:
            await until(lambda: len(operator.usage()) >= count)
            return [record.row for record in reversed(operator.usage())]

    def balance(self) -> Balance:
        with administration(self.inside.settings) as operator:
            return operator.balance(self.caller.account)


@contextlib.asynccontextmanager
async def opened(folder: Path, wait: float) -> AsyncIterator[Web]:
    acme = Fake("acme")
    more = TIMES.format(wait=wait)
    async with inside(folder, {"acme": acme, "embedded": Fake("embedded")}, more=more) as gateway:
        yield Web(gateway, acme, gateway.caller("ann"))


@pytest_asyncio.fixture
async def web(tmp_path: Path) -> AsyncIterator[Web]:
    """Waits for a first chunk as long as it takes."""
    async with opened(tmp_path, 60) as web:
        yield web


@pytest_asyncio.fixture
async def hasty(tmp_path: Path) -> AsyncIterator[Web]:
    """Sends headers though no chunk has come."""
    async with opened(tmp_path, 0.03) as web:
        yield web


def held(text: str = "one two", gate_at: int = 0, **fields: Any) -> FakeAnswer:
    return FakeAnswer(text=text, gate=asyncio.Event(), gate_at=gate_at, **fields)


def release(web: Web) -> None:
    assert web.acme.default.gate is not None
    web.acme.default.gate.set()


class TestOrderOfChecks:
    """content type -> size -> JSON -> credential -> fields -> model -> limits -> funds"""

    @pytest.mark.parametrize("door", DOORS, ids=lambda door: door.name)
    async def test_each_is_told_before_those_that_come_later(self, web: Web, door: Door) -> None:
        headers, body = door.question(web.caller)
        wrong_field = {"model": 5, "response_mode": 5, "prompt": {}, "messages": 5}
        broken = body | {name: value for name, value in wrong_field.items() if name in body}
        no_credential, anonymous = door.with_credential(headers, broken, None)

        async def status(headers: dict[str, str], body: bytes) -> int | None:
            exchange = Exchange(body, scope=scope_of("POST", door.path, headers))
            await web.play(exchange)
            return exchange.status

        huge = b"x" * 3000
        assert await status(no_credential | {"Content-Type": "text/plain"}, huge) == 415
        assert await status(no_credential, huge) == 413
        assert await status(no_credential, b"{") == 400
        assert await status(no_credential, json.dumps(anonymous).encode()) == 401
        assert await status(headers, json.dumps(broken).encode()) == 400
        assert web.acme.calls == []

    @pytest.mark.parametrize("key", [b"", b" ", b"k" * 256, b"\xe9", b"a\x00b"])
    async def test_an_odd_idempotency_key_is_refused_rather_than_ignored(self, web: Web, key: bytes) -> None:
        exchange = web.exchange(OPENAI)
        exchange.scope["headers"].append((b"idempotency-key", key))
        await web.play(exchange)
        assert exchange.status == 400
        assert exchange.json["error"]["param"] == "Idempotency-Key"
        assert web.acme.calls == []


class TestBlocking:
    async def test_the_answer_says_who_served_and_what_it_cost(self, web: Web) -> None:
        exchange = web.exchange(OPENAI)
        exchange.scope["headers"].append((b"x-request-id", b"mine"))
        await web.play(exchange)
        (row,) = await web.rows()
        assert exchange.status == 200
        assert exchange.headers["x-request-id"] == "mine" == row.request_id
        assert exchange.headers["x-headgate-provider"] == "acme"
        assert exchange.headers["x-headgate-price"] == f"0.{row.price:09}".rstrip("0")

    @pytest.mark.parametrize("door", [door for door in DOORS if not door.streams], ids=lambda door: door.name)
    async def test_a_client_that_leaves_ends_the_call_and_pays_its_prompt(self, web: Web, door: Door) -> None:
        web.acme.default = held()
        exchange = web.exchange(door)
        async with web.under_way(exchange):
            await called(web.acme)
            exchange.leave()
            await web.acme.calls[0].ended.wait()
        (row,) = await web.rows()
        assert (exchange.status, web.acme.calls[0].state) == (None, "abandoned")
        assert row.price > 0 and row.completion_tokens == 0
        assert 'status="499"' in web.inside.gateway.exposition().decode()
        assert web.balance().held == 0

    async def test_a_client_that_leaves_with_half_a_body_is_no_request(self, web: Web) -> None:
        exchange = Exchange(b'{"mod', b"", scope=web.exchange(OPENAI).scope)
        messages: list[dict[str, Any]] = [
            {"type": "http.request", "body": b"{", "more_body": True},
            {"type": "http.disconnect"},
        ]

        async def receive() -> dict[str, Any]:
            return messages.pop(0)

        await web.inside.app(exchange.scope, receive, exchange.send)
        assert (exchange.status, web.acme.calls) == (None, [])

    async def test_a_bug_is_told_in_the_dialects_form_and_without_its_words(
        self, web: Web, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async def broken(*_: object) -> None:
            raise RuntimeError("canary-1b7d")

        monkeypatch.setattr(web.inside.gateway.completions, "complete", broken)
        exchange = web.exchange(OPENAI)
        await web.play(exchange)
        assert (exchange.status, exchange.json["error"]["type"]) == (500, "server_error")
        assert b"canary" not in exchange.body

    @pytest.mark.parametrize("many", [False, True])
    async def test_an_answer_of_many_scores_is_rendered_beside_the_event_loop(
        self, web: Web, monkeypatch: pytest.MonkeyPatch, many: bool
    ) -> None:
        threads: list[int] = []
        render = OpenAICompletions.render

        def noting(dialect: OpenAICompletions, answer: Answer) -> bytes:
            threads.append(threading.get_ident())
            return render(dialect, answer)

        monkeypatch.setattr(OpenAICompletions, "render", noting)
        monkeypatch.setattr(completions, "SCORES_RENDERED_HERE", 1 if many else 1000)
        exchange = web.exchange(OPENAI, logprobs=2)
        await web.play(exchange)
        assert exchange.json["choices"][0]["logprobs"]["tokens"]
        assert (threads == [threading.get_ident()]) is not many

    async def test_a_ledger_that_fails_at_the_end_is_503_and_nothing_stays_held(
        self, web: Web, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        ledger = web.inside.gateway.ledger
        settle, failures = ledger.settle, [LedgerUnavailable("out")]

        def out_once(hold_id: str, rows: Any, **kept: Any) -> Any:
            if failures:
                future = asyncio.get_running_loop().create_future()
                future.set_exception(failures.pop())
                return future
            return settle(hold_id, rows)

        monkeypatch.setattr(ledger, "settle", out_once)
        exchange = web.exchange(OPENAI)
        await web.play(exchange)
        assert exchange.status == 503
        (row,) = await web.rows()
        assert (row.price, web.balance().held) == (0, 0)


class TestStreams:
    async def test_a_refusal_before_the_first_chunk_keeps_its_status(self, web: Web) -> None:
        web.acme.default = FakeAnswer(error=UpstreamTimeout("silence"))
        exchange = web.exchange(STREAM)
        await web.play(exchange)
        assert exchange.status == 504
        assert exchange.headers["content-type"] == "application/json"

    async def test_after_a_while_without_a_chunk_the_headers_go_out_and_pings_follow(
        self, hasty: Web
    ) -> None:
        hasty.acme.default = held()
        exchange = hasty.exchange(STREAM)
        async with hasty.under_way(exchange) as task:
            await exchange.until(status=True)
            assert exchange.status == 200
            assert exchange.headers["content-type"] == "text/event-stream; charset=utf-8"
            assert (exchange.headers["cache-control"], exchange.headers["x-accel-buffering"]) == (
                "no-cache",
                "no",
            )
            await exchange.until(text=b": ping\n\n", times=2)
            release(hasty)
            await task
        assert "".join(event["choices"][0]["text"] for event in exchange.events[:-1]) == "one two"
        assert exchange.events[-1] == "[DONE]" and exchange.ended

    async def test_an_idle_stream_is_kept_alive_between_chunks(self, web: Web) -> None:
        web.acme.default = held(gate_at=1)
        exchange = web.exchange(STREAM)
        async with web.under_way(exchange) as task:
            await exchange.until(text=b": ping\n\n", times=2)
            assert exchange.body.startswith(b"data: ")
            release(web)
            await task
        assert exchange.events[-1] == "[DONE]"

    async def test_difys_pings_are_events_as_its_clients_expect(self, hasty: Web) -> None:
        hasty.acme.default = held()
        exchange = hasty.exchange(BY_NAME["dify-stream"])
        async with hasty.under_way(exchange) as task:
            await exchange.until(text=b"event: ping\n\n")
            release(hasty)
            await task
        assert exchange.events[-1]["event"] == "message_end"

    @pytest.mark.parametrize("gate_at", [0, 1])
    @pytest.mark.parametrize("door", [door for door in DOORS if door.streams], ids=lambda door: door.name)
    async def test_what_fails_after_the_headers_is_an_event_and_never_looks_complete(
        self, hasty: Web, door: Door, gate_at: int
    ) -> None:
        hasty.acme.default = held(gate_at=gate_at, error=UpstreamFailed("canary says no"), error_at=gate_at)
        exchange = hasty.exchange(door)
        async with hasty.under_way(exchange) as task:
            await exchange.until(status=True)
            release(hasty)
            await task
        assert exchange.status == 200 and exchange.ended
        last = exchange.events[-1]
        assert "canary says no" in json.dumps(last)
        assert "[DONE]" not in exchange.events and b"message_end" not in exchange.body
        assert b'"completed"' not in exchange.body
        (row,) = await hasty.rows()
        assert (row.price > 0, row.error) == (gate_at > 0, "upstream_failed")

    @pytest.mark.parametrize("gate_at", [0, 1])
    async def test_a_client_that_leaves_ends_the_call_and_pays_for_what_came(
        self, hasty: Web, gate_at: int
    ) -> None:
        hasty.acme.default = held(gate_at=gate_at)
        exchange = hasty.exchange(STREAM)
        async with hasty.under_way(exchange):
            await exchange.until(status=True, text=b"data: " if gate_at else b"")
            await called(hasty.acme)
            exchange.leave()
            await hasty.acme.calls[0].ended.wait()
        (row,) = await hasty.rows()
        assert (row.completion_tokens, row.error) == (gate_at, None)
        assert row.price > 0
        assert 'status="499"' in hasty.inside.gateway.exposition().decode()

    async def test_a_client_that_does_not_read_is_taken_for_gone(self, web: Web) -> None:
        web.acme.default = held(gate_at=1)
        exchange = web.exchange(STREAM)
        async with web.under_way(exchange) as task:
            await exchange.until(text=b"data: ")
            exchange.stuck = True
            release(web)
            await task
        (row,) = await web.rows()
        assert row.price > 0 and not exchange.ended
        assert 'status="499"' in web.inside.gateway.exposition().decode()
        assert len(web.inside.gateway.streams) == 0 and web.balance().held == 0

    async def test_a_client_that_does_not_even_take_the_headers_too(self, web: Web) -> None:
        exchange = web.exchange(STREAM)
        exchange.stuck = True
        async with web.under_way(exchange) as task:
            await task
        assert exchange.status is None
        await web.rows()
        assert len(web.inside.gateway.streams) == 0 and web.balance().held == 0

    async def test_what_arrives_together_leaves_together(self, web: Web) -> None:
        web.acme.default = FakeAnswer(text="one two three four")
        exchange = web.exchange(STREAM)
        await web.play(exchange)
        assert len(exchange.events) > len(exchange.parts)
        assert exchange.headers["x-headgate-provider"] == "acme"


class TestDraining:
    @pytest.mark.parametrize("door", DOORS, ids=lambda door: door.name)
    async def test_new_work_is_refused_and_told_when_to_come_back(self, web: Web, door: Door) -> None:
        await web.inside.gateway.drain()
        exchange = web.exchange(door)
        await web.play(exchange)
        assert exchange.status == 503
        assert 1 <= int(exchange.headers["retry-after"]) <= 120
        assert web.acme.calls == []


async def called(fake: Fake) -> None:
    await until(lambda: fake.calls)
