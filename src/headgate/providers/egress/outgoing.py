"""The body of an outgoing request."""

import asyncio
from collections.abc import Callable
from typing import cast
from weakref import WeakSet

import aiohttp
from aiohttp.abc import AbstractStreamWriter


class Outgoing(aiohttp.Payload):
    """A request body that notices when, and on which connection, it is sent."""

    _value: bytes
    _autoclose = True

    def __init__(
        self, value: bytes, on_sent: Callable[[], None], used: WeakSet[asyncio.BaseProtocol]
    ) -> None:
        super().__init__(value, content_type="application/json")
        self._size = len(value)
        self._on_sent: Callable[[], None] | None = on_sent
        self._used = used
        self._transport: asyncio.Transport | None = None
        self.reused = False

    async def write(self, writer: AbstractStreamWriter) -> None:
        stream = cast("aiohttp.http.StreamWriter", writer)  # what a client request is always written to
        connection = stream.protocol
        self.reused = connection in self._used
        self._used.add(connection)
        self._transport = stream.transport
        if self._on_sent is not None and self._transport is not None and not self._transport.is_closing():
            self._on_sent()
            self._on_sent = None
        await writer.write(self._value)

    def abort(self) -> None:
        """Close the connection now; closing it politely would first send what is still unsent."""
        if self._transport is not None:
            self._transport.abort()
            self._transport = None

    def decode(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        return self._value.decode(encoding, errors)
