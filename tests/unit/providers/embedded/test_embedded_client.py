"""The engine's HTTP client against servers that cut, split, stall and misbehave."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

import pytest

from headgate.providers.embedded import client
from headgate.providers.embedded.client import Address, EngineGone, EngineRefusal

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]

EVENT_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


@asynccontextmanager
async def serving(folder: Path, handler: Handler) -> AsyncIterator[Address]:
    path = str(folder / "s.sock")

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            await handler(reader, writer)
            await writer.drain()
        writer.close()

    server = await asyncio.start_unix_server(answer, path)
    async with server:
        yield Address(path=path, key="sesame")


def chunked(*pieces: bytes) -> bytes:
    return b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces)


def replying(reply: bytes, *, at_a_time: int = 1 << 20, seen: list[bytes] | None = None) -> Handler:
    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        body = await reader.readexactly(length)
        if seen is not None:
            seen.extend((head, body))
        for start in range(0, len(reply), at_a_time):
            writer.write(reply[start : start + at_a_time])
            await writer.drain()
            await asyncio.sleep(0)

    return handler


async def events(address: Address, sent: list[bool] | None = None) -> list[bytes]:
    calls = sent if sent is not None else []
    payloads: list[bytes] = []
    stream = client.post_events(address, "/completion", b"{}", lambda: calls.append(True))
    async with aclosing(stream):
        async for batch in stream:
            payloads += batch
    return payloads


@pytest.mark.parametrize("at_a_time", [1, 7, 1 << 20])
async def test_events_arrive_whole_however_the_bytes_are_split(tmp_path: Path, at_a_time: int) -> None:
    body = (
        chunked(b"data: one\n", b"\ndata: two\n\n: ping\n\n:\n\nda", b"ta: thr\xc3", b"\xa9e\n\n")
        + b"0\r\n\r\n"
    )
    sent: list[bool] = []
    async with serving(tmp_path, replying(EVENT_HEAD + body, at_a_time=at_a_time)) as address:
        assert await events(address, sent) == [b"one", b"two", b"thr\xc3\xa9e"]
    assert sent == [True]


async def test_events_that_arrive_together_come_together(tmp_path: Path) -> None:
    body = chunked(*(b"data: %d\n\n" % number for number in range(50))) + b"0\r\n\r\n"
    async with serving(tmp_path, replying(EVENT_HEAD + body)) as address:
        stream = client.post_events(address, "/completion", b"{}", lambda: None)
        async with aclosing(stream):
            assert len(await anext(stream)) > 1


async def test_the_key_and_the_body_reach_the_engine(tmp_path: Path) -> None:
    seen: list[bytes] = []
    reply = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
    async with serving(tmp_path, replying(reply, seen=seen)) as address:
        assert await client.post(address, "/tokenize", b'{"a":1}', 100) == b"ok"
    assert seen[0].startswith(b"POST /tokenize HTTP/1.1\r\n")
    assert b"Authorization: Bearer sesame\r\n" in seen[0]
    assert seen[1] == b'{"a":1}'


async def test_a_large_body_comes_back_whole(tmp_path: Path) -> None:
    content = bytes(range(256)) * 8192
    reply = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(content), content)
    async with serving(tmp_path, replying(reply)) as address:
        assert await client.post(address, "/x", b"", len(content)) == content


async def test_an_answer_longer_than_allowed_is_refused(tmp_path: Path) -> None:
    reply = b"HTTP/1.1 200 OK\r\nContent-Length: 4096\r\n\r\n" + b"x" * 4096
    async with serving(tmp_path, replying(reply)) as address:
        with pytest.raises(EngineGone, match="too long"):
            await client.post(address, "/x", b"", 100)


async def test_another_status_is_a_refusal_with_its_body(tmp_path: Path) -> None:
    reply = b"HTTP/1.1 400 Bad Request\r\nContent-Length: 5\r\n\r\nwrong"
    async with serving(tmp_path, replying(reply)) as address:
        with pytest.raises(EngineRefusal) as caught:
            await events(address)
    assert (caught.value.status, caught.value.body) == (400, b"wrong")


@pytest.mark.parametrize(
    "reply",
    [
        b"",
        b"HTTP/1.1 200 OK\r\nContent-Le",
        EVENT_HEAD + chunked(b"data: one\n\n"),
        EVENT_HEAD + b"40\r\ndata: half",
        b"SSH-2.0-OpenSSH_9.9\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"y" * (1 << 20),
        EVENT_HEAD + chunked(b"data: " + b"x" * (client.MAX_EVENT_BYTES + 1)) + b"0\r\n\r\n",
    ],
    ids=["nothing", "half a head", "no end", "half a chunk", "not HTTP", "endless head", "endless event"],
)
async def test_whatever_breaks_off_or_runs_wild_is_gone(tmp_path: Path, reply: bytes) -> None:
    async with serving(tmp_path, replying(reply)) as address:
        with pytest.raises(EngineGone):
            await events(address)


async def test_nobody_listening_is_gone_and_nothing_counts_as_sent(tmp_path: Path) -> None:
    sent: list[bool] = []
    with pytest.raises(EngineGone):
        await events(Address(path=str(tmp_path / "none.sock")), sent)
    assert sent == []


@pytest.mark.parametrize("how", ["closed", "cancelled"])
async def test_leaving_a_stream_closes_its_socket(tmp_path: Path, how: str) -> None:
    gone = asyncio.Event()

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(EVENT_HEAD + chunked(b"data: one\n\n"))
        await writer.drain()
        while await reader.read(100):
            pass
        gone.set()

    async with serving(tmp_path, handler) as address:
        first = asyncio.Event()

        async def follow() -> None:
            stream = client.post_events(address, "/completion", b"{}", lambda: None)
            async with aclosing(stream):
                async for _ in stream:
                    first.set()
                    if how == "closed":
                        return

        task = asyncio.create_task(follow())
        await first.wait()
        if how == "cancelled":
            task.cancel()
        async with asyncio.timeout(5):
            await gone.wait()
        await asyncio.gather(task, return_exceptions=True)


async def test_a_reader_that_does_not_read_stops_the_sender(tmp_path: Path) -> None:
    written = 0
    stuck = asyncio.Event()

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal written
        await reader.readuntil(b"\r\n\r\n")
        writer.write(EVENT_HEAD)
        piece = chunked(b"data: " + b"x" * 60_000 + b"\n\n")
        while True:
            writer.write(piece)
            try:
                async with asyncio.timeout(1):
                    await writer.drain()
            except TimeoutError:
                stuck.set()
                return
            written += len(piece)
            if written > 64 << 20:
                return

    async with serving(tmp_path, handler) as address:
        stream = client.post_events(address, "/completion", b"{}", lambda: None)
        async with aclosing(stream):
            await anext(stream)
            async with asyncio.timeout(20):
                await stuck.wait()
    assert written < 8 << 20
