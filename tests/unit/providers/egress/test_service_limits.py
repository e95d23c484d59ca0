"""The outbound HTTP port under strain: time-outs, the cap, and what the upstream sees when we leave."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable, Iterator

import pytest
from tests.support.asking import BODY, STREAM, ask, nothing
from tests.support.script import Script
from tests.support.upstream import Upstream

from headgate.core.errors import Overloaded, UpstreamFailed, UpstreamTimeout
from headgate.providers.egress.service import Http

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


@contextlib.asynccontextmanager
async def saying(*parts: bytes) -> AsyncIterator[tuple[str, asyncio.Event, asyncio.Event]]:
    """A server that says the first part and each further one when `more` is set: its URL, `more`, and what is set
    when the client left."""
    more, left = asyncio.Event(), asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        for part in parts:
            writer.write(part)
            more.clear()
            waiting = asyncio.ensure_future(more.wait())
            gone = asyncio.ensure_future(_end(reader))
            await asyncio.wait([waiting, gone], return_when=asyncio.FIRST_COMPLETED)
            waiting.cancel()
            if gone.done():
                break
            gone.cancel()
        left.set()
        writer.transport.abort()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", more, left
    finally:
        server.close()
        await server.wait_closed()


async def _end(reader: asyncio.StreamReader) -> None:
    with contextlib.suppress(ConnectionError):
        while await reader.read(65536):
            pass


HEAD = b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n"


async def test_the_first_byte_of_the_content_may_take_as_long_as_its_own_limit_says(connect: Connect) -> None:
    async with saying(HEAD, b"abc", b"defghi") as (url, more, left):
        response = await connect(url, first_byte_timeout_s=0.3, chunk_timeout_s=10).open("/", BODY, nothing)
        with pytest.raises(UpstreamTimeout):
            await response.block()
        response.close()
        async with asyncio.timeout(1):
            await left.wait()
        assert not more.is_set()


async def test_silence_within_the_content_has_a_limit_of_its_own(connect: Connect) -> None:
    async with saying(HEAD, b"abc", b"defghi") as (url, more, left):
        response = await connect(url, first_byte_timeout_s=10, chunk_timeout_s=0.3).open("/", BODY, nothing)
        more.set()
        assert await response.block() == b"abc"
        with pytest.raises(UpstreamTimeout):
            await response.block()
        response.close()
        async with asyncio.timeout(1):
            await left.wait()


async def test_content_may_pause_longer_than_it_may_take_to_begin(connect: Connect) -> None:
    async with saying(HEAD + b"abc", b"defghi") as (url, more, _):
        http = connect(url, first_byte_timeout_s=0.3, chunk_timeout_s=10)
        response = await http.open("/", BODY, nothing)
        assert await response.block() == b"abc"
        rest = asyncio.ensure_future(response.block())
        _, waiting = await asyncio.wait([rest], timeout=0.6)
        assert waiting
        more.set()
        assert await rest == b"defghi"
        assert await response.block() == b""
        response.close()


async def test_an_idle_connection_is_not_timed_after_an_answer_in_one_block(
    upstream: Upstream, connect: Connect
) -> None:
    http = connect(first_byte_timeout_s=10, chunk_timeout_s=0.1)
    await ask(http)
    await asyncio.sleep(0.3)  # longer than a chunk may take: there is nothing to await
    await ask(http)
    assert upstream.accepted == 1


async def test_no_call_is_made_when_its_deadline_is_past(upstream: Upstream, connect: Connect) -> None:
    http = connect(max_concurrency=1)
    now = asyncio.get_running_loop().time()
    with pytest.raises(UpstreamTimeout, match="No time is left"):
        await http.open("/completions", BODY, nothing, deadline=now)
    assert upstream.accepted == 0
    assert await ask(http)  # no turn was lost


@pytest.mark.parametrize("script", [Script(silent=True), Script(pieces=("x",) * 1000, pause_s=0.02)])
async def test_the_earlier_of_deadline_and_total_time_out_counts(
    upstream: Upstream, connect: Connect, script: Script
) -> None:
    upstream.script(script, script)
    now = asyncio.get_running_loop().time()
    for http, deadline in ((connect(), now + 0.3), (connect(total_timeout_s=0.3), now + 100)):
        async with asyncio.timeout(5):
            with pytest.raises(UpstreamTimeout):
                response = await http.open("/completions", STREAM, nothing, deadline=deadline)
                try:
                    while await response.block():
                        pass
                finally:
                    response.close()
    for request in upstream.requests:
        async with asyncio.timeout(1):
            await request.closed.wait()


async def test_a_deadline_bounds_the_wait_for_a_turn(upstream: Upstream, connect: Connect) -> None:
    upstream.on("plain", Script(hold_at=0))
    http = connect(max_concurrency=1, queue_wait_s=100)
    first = asyncio.create_task(ask(http))
    await upstream.request(0)
    with pytest.raises(Overloaded):
        await http.open("/", BODY, nothing, deadline=asyncio.get_running_loop().time() + 0.1)
    upstream.release()
    await first


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
