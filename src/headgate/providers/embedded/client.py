"""A small HTTP/1.1 client for the engine's private socket, and for nothing else.

One connection per exchange: closing it is how a generation is cancelled, and the engine frees its slot within
milliseconds. Bytes are parsed as they come; what has not been read yet is bounded by pausing the socket.

Nothing here gives up on silence: the engine says nothing at all before the first token of a long prompt. Whether it
still lives is its supervisor's question, and an engine that is ended ends its exchanges.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable
from typing import cast

import httptools
from msgspec import Struct

HIGH_WATER = 256 * 1024
MAX_EVENT_BYTES = 1024 * 1024
MAX_HEADER_BYTES = 16 * 1024


class Address(Struct, frozen=True, kw_only=True):
    """Where an engine listens: a unix socket, or a loopback port with a key."""

    path: str = ""
    port: int = 0
    key: str = ""


class EngineGone(Exception):
    """The engine cannot be reached, broke off, or does not speak HTTP."""


class EngineRefusal(Exception):
    """The engine answered with another status than 200. `body` is what it said, cut."""

    def __init__(self, status: int, body: bytes) -> None:
        super().__init__(f"status {status}")
        self.status = status
        self.body = body


async def post(address: Address, path: str, body: bytes, most: int) -> bytes:
    """One request, its whole answer of at most `most` bytes. EngineGone, EngineRefusal."""
    exchange = await _connect(address)
    try:
        exchange.send(address, path, body)
        return await exchange.whole(most)
    finally:
        exchange.close()


async def post_events(
    address: Address, path: str, body: bytes, on_sent: Callable[[], None]
) -> AsyncGenerator[list[bytes], None]:
    """One request answered by server-sent events: their payloads, as many at once as have arrived.

    `on_sent` is called when the request has been written. Closing the generator closes the socket.
    EngineGone, EngineRefusal.
    """
    exchange = await _connect(address)
    try:
        exchange.send(address, path, body)
        await exchange.written()
        on_sent()
        await exchange.accepted()
        rest = b""
        while piece := await exchange.read():
            *events, rest = (rest + piece).split(b"\n\n")
            if len(rest) > MAX_EVENT_BYTES:
                raise EngineGone("the engine sent an event without an end")
            # Comments, which start with a colon, only prove that the engine lives.
            payloads = [event[6:] for event in events if event.startswith(b"data: ")]
            if payloads:
                yield payloads
    finally:
        exchange.close()


async def _connect(address: Address) -> "_Exchange":
    loop = asyncio.get_running_loop()
    try:
        if address.path:
            _, exchange = await loop.create_unix_connection(lambda: _Exchange(loop), address.path)
        else:
            _, exchange = await loop.create_connection(lambda: _Exchange(loop), "127.0.0.1", address.port)
    except OSError as error:
        raise EngineGone(f"the engine cannot be reached: {error.strerror}") from error
    return exchange


class _Exchange(asyncio.Protocol):
    """One connection, one request, one response. httptools calls the on_ methods."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._parser = httptools.HttpResponseParser(self)
        self._transport: asyncio.Transport | None = None
        self._body = bytearray()
        self._header_bytes = 0
        self._status = 0
        self._complete = False
        self._lost: str | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._blocked = False

    # What the caller does.

    def send(self, address: Address, path: str, body: bytes) -> None:
        key = f"Authorization: Bearer {address.key}\r\n" if address.key else ""
        head = (
            f"POST {path} HTTP/1.1\r\nHost: engine\r\n{key}Content-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        )
        if self._transport is not None:
            self._transport.write(head.encode() + body)

    async def written(self) -> None:
        """Wait until the socket took the request. EngineGone when it broke before."""
        while self._blocked and self._lost is None:
            await self._change()
        if self._lost is not None and not self._complete:
            raise EngineGone(self._lost)

    async def accepted(self) -> None:
        """Wait for the response's head. EngineRefusal when it is not a 200."""
        while not self._status and self._lost is None:
            await self._change()
        if self._status == 200:
            return
        if not self._status:
            raise EngineGone(self._lost or "the engine broke off")
        said = bytearray()
        while len(said) < 4096 and (piece := await self.read()):
            said += piece
        raise EngineRefusal(self._status, bytes(said[:4096]))

    async def read(self) -> bytes:
        """What has arrived of the body, at least a byte; b"" at its end. EngineGone when it breaks off."""
        while not self._body:
            if self._complete:
                return b""
            if self._lost is not None:
                raise EngineGone(self._lost)
            await self._change()
        piece = bytes(self._body)
        self._body.clear()
        if len(piece) > HIGH_WATER and self._transport is not None:
            self._transport.resume_reading()
        return piece

    async def whole(self, most: int) -> bytes:
        await self.accepted()
        body = bytearray()
        while piece := await self.read():
            body += piece
            if len(body) > most:
                raise EngineGone("the engine's answer is too long")
        return bytes(body)

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    async def _change(self) -> None:
        self._waiter = self._loop.create_future()
        await self._waiter

    # What the socket does.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # Not checked at run time: uvloop's transports are no subclasses of asyncio's.
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        if not self._status:
            self._header_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self._fail("the engine does not speak HTTP")
            return
        if not self._status and self._header_bytes > MAX_HEADER_BYTES:
            self._fail("the engine sent too long a head")
            return
        if len(self._body) > HIGH_WATER and self._transport is not None:
            self._transport.pause_reading()
        self._wake()

    def connection_lost(self, error: Exception | None) -> None:
        if self._lost is None:
            self._lost = "the engine broke off"
        self._wake()

    def pause_writing(self) -> None:
        self._blocked = True

    def resume_writing(self) -> None:
        self._blocked = False
        self._wake()

    def on_headers_complete(self) -> None:
        self._status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        self._complete = True

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _fail(self, reason: str) -> None:
        self._lost = reason
        if self._transport is not None:
            self._transport.abort()
        self._wake()
