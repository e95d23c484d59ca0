"""The outbound HTTP port under strain: time-outs, the cap, and what the upstream sees when we leave."""

import asyncio
import contextlib
import socket
from collections.abc import Callable, Iterator

import pytest
from tests.support.asking import BODY, STREAM, ask, nothing
from tests.support.script import Script
from tests.support.upstream import Upstream

from headgate.core.errors import Overloaded, UpstreamFailed, UpstreamTimeout
from headgate.providers.http import Http

Connect = Callable[..., Http]


# --- time-outs --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def deaf_address() -> Iterator[str]:
    """An address that accepts no connection: its queue is full, so connecting just hangs."""
    with socket.socket() as listener, contextlib.ExitStack() as queued:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(4):
            waiting = queued.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(listener.getsockname())
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"


async def test_connecting_is_timed_and_nothing_counts_as_sent(connect: Connect) -> None:
    with deaf_address() as url:
        sent: list[bool] = []
        with pytest.raises(UpstreamTimeout):
            await connect(url, timeout_s=0.2).open("/completions", BODY, lambda: sent.append(True))
        assert sent == []


async def test_waiting_for_the_head_is_timed_and_the_upstream_sees_us_leave(
    upstream: Upstream, connect: Connect
) -> None:
    upstream.script(Script(silent=True))
    with pytest.raises(UpstreamTimeout):
        await ask(connect(timeout_s=0.2))
    await upstream.requests[0].closed.wait()


async def test_silence_between_blocks_is_timed(upstream: Upstream, connect: Connect) -> None:
    upstream.script(Script(pieces=("a", "b"), hold_at=1))
    response = await connect(timeout_s=0.2).open("/completions", STREAM, nothing)
    assert b'"a"' in await response.block()
    with pytest.raises(UpstreamTimeout):
        while await response.block():
            pass
    response.close()
    await upstream.requests[0].closed.wait()


async def test_an_endless_answer_ends_at_the_total_time_out(upstream: Upstream, connect: Connect) -> None:
    upstream.script(Script(pieces=("x",) * 1000, pause_s=0.02))
    response = await connect(timeout_s=0.3, total_timeout_s=0.3).open("/completions", STREAM, nothing)
    with pytest.raises(UpstreamTimeout, match="too long"):
        while await response.block():
            pass
    response.close()
    await upstream.requests[0].closed.wait()


# --- the cap ----------------------------------------------------------------------------------------------------


async def test_calls_beyond_the_cap_wait_for_their_turn(upstream: Upstream, connect: Connect) -> None:
    upstream.on("plain", Script(pieces=("x",), hold_at=0))
    http = connect(max_concurrency=2)
    calls = [asyncio.create_task(ask(http)) for _ in range(4)]
    await upstream.request(1)
    upstream.release()
    await asyncio.gather(*calls)
    assert upstream.accepted == 2


async def test_calls_that_wait_too_long_or_are_too_many_are_refused(
    upstream: Upstream, connect: Connect
) -> None:
    upstream.on("plain", Script(hold_at=0))
    http = connect(max_concurrency=1, queue_wait_s=0.1)
    first = asyncio.create_task(ask(http))
    await upstream.request(0)
    results = await asyncio.gather(ask(http), ask(http), return_exceptions=True)
    assert [type(result) for result in results] == [Overloaded, Overloaded]
    assert all(isinstance(result, Overloaded) and result.retry_after for result in results)
    upstream.release()
    await first
    assert len(upstream.requests) == 1


@pytest.mark.parametrize("end", ["answered", "failed", "cancelled", "unread"])
async def test_a_turn_is_given_back_however_a_call_ends(
    upstream: Upstream, connect: Connect, end: str
) -> None:
    http = connect(max_concurrency=1, queue_wait_s=0.1)
    if end == "failed":
        upstream.script(Script(reset_at=0))
        with pytest.raises(UpstreamFailed):
            await ask(http)
    elif end == "cancelled":
        upstream.script(Script(silent=True))
        call = asyncio.create_task(ask(http))
        await upstream.request(0)
        call.cancel()
        await asyncio.wait([call])
        assert call.cancelled()
    elif end == "unread":
        response = await http.open("/completions", STREAM, nothing)
        response.close()
        response.close()
    else:
        await ask(http)
    assert b"echo: hi" in await ask(http)
    held = await http.open("/completions", BODY, nothing)
    with pytest.raises(Overloaded):  # the cap still is 1: no turn was given back twice
        await ask(http)
    held.close()


# --- leaving ----------------------------------------------------------------------------------------------------


async def test_cancelling_while_connecting_returns_at_once(connect: Connect) -> None:
    with deaf_address() as url:
        call = asyncio.create_task(ask(connect(url)))
        _, running = await asyncio.wait([call], timeout=0.1)
        assert running
        call.cancel()
        done, _ = await asyncio.wait([call], timeout=1)
        assert done
        assert call.cancelled()


async def test_cancelling_while_waiting_for_the_head_closes_the_connection(
    upstream: Upstream, connect: Connect
) -> None:
    upstream.script(Script(silent=True))
    call = asyncio.create_task(ask(connect()))
    request = await upstream.request(0)
    call.cancel()
    async with asyncio.timeout(1):
        await request.closed.wait()
    await asyncio.wait([call])
    assert call.cancelled()


async def test_closing_a_response_that_still_runs_closes_the_connection(
    upstream: Upstream, connect: Connect
) -> None:
    upstream.script(Script(pieces=("a", "b"), hold_at=1))
    response = await connect().open("/completions", STREAM, nothing)
    await response.block()
    response.close()
    async with asyncio.timeout(1):
        await upstream.requests[0].closed.wait()


async def test_cancelling_an_upload_nobody_reads_drops_what_is_unsent(connect: Connect) -> None:
    cancelled = asyncio.Event()
    received: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def read_late(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await cancelled.wait()
        count = 0
        with contextlib.suppress(ConnectionError):
            while block := await reader.read(65536):
                count += len(block)
        received.set_result(count)
        writer.close()

    server = await asyncio.start_server(read_late, "127.0.0.1", 0, limit=1024)
    sent = asyncio.Event()
    http = connect(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
    call = asyncio.create_task(http.open("/completions", b"x" * 50_000_000, sent.set))
    await sent.wait()
    call.cancel()
    await asyncio.wait([call])
    cancelled.set()
    async with asyncio.timeout(5):
        assert await received < 50_000_000
    server.close()
    await server.wait_closed()


async def test_an_answer_that_never_ends_although_complete_is_dropped_in_the_end(
    upstream: Upstream, connect: Connect
) -> None:
    upstream.script(Script(pieces=("a", "b"), hold_at=1))
    response = await connect().open("/completions", STREAM, nothing)
    await response.block()
    response.finish()
    async with asyncio.timeout(5):
        await upstream.requests[0].closed.wait()
