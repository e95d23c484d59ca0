"""A client that leaves stops its request, whenever it leaves."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
import uvicorn
from tests.support.doors import BY_NAME, Caller
from tests.support.inside import Inside, inside
from tests.support.until import until

from headgate.bootstrap import administration
from headgate.core.accounts import Principal
from headgate.providers.fake import Fake, FakeAnswer
from headgate.service.streams import Running
from headgate.web.connection import Connection
from headgate.web.disconnect import LEAVING, DisconnectWatch, Leaving


def running() -> Running:
    return Running(dialect="openai", stream_id="s", account="ann", app=None, user=None)


async def never() -> dict[str, Any]:
    await asyncio.Event().wait()
    raise AssertionError


class TestWatch:
    async def test_a_lost_connection_stops_what_runs_on_it(self) -> None:
        leaving, one, two = Leaving(), running(), running()
        for each in (one, two):
            DisconnectWatch({LEAVING: leaving}, never, each)
        leaving.lost()
        assert (one.stop_reason, two.stop_reason) == ("disconnected", "disconnected")

    async def test_what_begins_on_a_lost_connection_is_stopped_at_once(self) -> None:
        leaving, late = Leaving(), running()
        leaving.lost()
        DisconnectWatch({LEAVING: leaving}, never, late)
        assert late.stop_reason == "disconnected"

    async def test_what_has_ended_is_let_be(self) -> None:
        leaving, ended = Leaving(), running()
        DisconnectWatch({LEAVING: leaving}, never, ended).end()
        leaving.lost()
        assert ended.stop_reason is None

    async def test_under_another_server_the_disconnect_message_counts(self) -> None:
        messages: list[dict[str, Any]] = [{"type": "http.request", "body": b""}, {"type": "http.disconnect"}]
        left = running()

        async def receive() -> dict[str, Any]:
            return messages.pop(0)

        watch = DisconnectWatch({}, receive, left)
        await until(lambda: left.stop_reason)
        watch.end()
        assert left.stop_reason == "disconnected"

    async def test_under_another_server_it_can_be_ended_too(self) -> None:
        stayed = running()
        watch = DisconnectWatch({}, never, stayed)
        watch.end()
        await asyncio.sleep(0)
        assert stayed.stop_reason is None


class Served:
    """A gateway on a real port, with the gateway's own kind of connection."""

    def __init__(self, gateway: Inside, acme: Fake, port: int) -> None:
        self.gateway = gateway
        self.acme = acme
        self.url = f"http://127.0.0.1:{port}"
        self.caller: Caller = gateway.caller("ann")


@pytest_asyncio.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    acme = Fake("acme", default=FakeAnswer(gate=asyncio.Event()))
    async with inside(tmp_path, {"acme": acme, "embedded": Fake("embedded")}) as gateway:
        config = uvicorn.Config(
            gateway.app, http=Connection, ws="none", lifespan="off", log_config=None, port=0, loop="none"
        )
        server = uvicorn.Server(config)
        server.capture_signals = contextlib.nullcontext  # type: ignore[assignment]  # signals stay the test's
        serving = asyncio.ensure_future(server.serve())
        await until(lambda: server.started)
        yield Served(gateway, acme, server.servers[0].sockets[0].getsockname()[1])
        server.should_exit = True
        await serving


@pytest.mark.parametrize("name", ["openai", "openai-stream"])
async def test_a_client_that_leaves_while_its_credential_is_looked_up_is_charged_nothing(
    served: Served, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    identity = served.gateway.gateway.identity
    authenticate: Callable[..., Any] = identity.authenticate
    looking, found = asyncio.Event(), asyncio.Event()

    async def slow(*args: Any, **fields: Any) -> Principal:
        principal: Principal = await authenticate(*args, **fields)
        looking.set()
        await found.wait()
        return principal

    monkeypatch.setattr(identity, "authenticate", slow)
    lost = asyncio.Event()
    connection_lost = Connection.connection_lost

    def noticed(self: Connection, exc: Exception | None) -> None:
        connection_lost(self, exc)
        lost.set()

    monkeypatch.setattr(Connection, "connection_lost", noticed)
    headers, body = BY_NAME[name].question(served.caller)
    async with aiohttp.ClientSession(served.url) as http:
        asking = asyncio.ensure_future(http.post(BY_NAME[name].path, json=body, headers=headers))
        async with asyncio.timeout(30):
            await looking.wait()
            asking.cancel()
            await lost.wait()
    found.set()
    await until(lambda: b'status="499"' in served.gateway.gateway.exposition())
    assert served.acme.calls == []
    with administration(served.gateway.settings) as operator:
        balance = operator.balance("ann")
    assert (balance.balance, balance.held) == (10 * 10**9, 0)


@pytest.mark.parametrize("name", ["openai", "openai-stream"])
async def test_a_client_that_leaves_while_the_model_is_asked_ends_the_call(served: Served, name: str) -> None:
    headers, body = BY_NAME[name].question(served.caller)
    async with aiohttp.ClientSession(served.url) as http:
        asking = asyncio.ensure_future(http.post(BY_NAME[name].path, json=body, headers=headers))
        await until(lambda: served.acme.calls)
        asking.cancel()
        await until(served.acme.calls[0].ended.is_set)
    assert served.acme.calls[0].state == "abandoned"
