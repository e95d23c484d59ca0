"""A forward proxy: CONNECT for https, requests with a whole URL for http."""

import asyncio
import contextlib
import ssl
from collections.abc import Coroutine, Mapping
from typing import Self

from msgspec import Struct
from yarl import URL


class Proxied(Struct, frozen=True):
    """One request the proxy got: its first line's method and target, and its headers in lower case."""

    method: str
    target: str
    headers: Mapping[str, str]


class ForwardProxy:
    """`hosts` says which address a name leads to; others are looked up. `status` refuses everything; `silent` never
    answers; `tls`: it is reached over TLS itself. `closed` is set when a client's connection went away."""

    def __init__(
        self,
        *,
        hosts: Mapping[str, str] | None = None,
        status: int | None = None,
        silent: bool = False,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.requests: list[Proxied] = []
        self.asked = asyncio.Event()
        self.closed = asyncio.Event()
        self._hosts = hosts or {}
        self._status = status
        self._silent = silent
        self._tls = tls
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._begin, "127.0.0.1", 0, ssl=self._tls)
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()

    @property
    def address(self) -> str:
        assert self._server is not None
        return f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    @property
    def url(self) -> str:
        return f"http://{self.address}"

    def _begin(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.get_running_loop().create_task(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            with contextlib.suppress(OSError, asyncio.IncompleteReadError):
                await self._passed(reader, writer)
        finally:
            self.closed.set()
            writer.transport.abort()

    async def _passed(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        first, *lines = head.split("\r\n")
        method, target, _ = first.split(" ")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        self.requests.append(Proxied(method, target, headers))
        self.asked.set()
        if self._silent:
            await reader.read()
            return
        if self._status is not None:
            writer.write(f"HTTP/1.1 {self._status} No\r\nContent-Length: 0\r\n\r\n".encode())
            await reader.read()
            return
        url = URL(f"https://{target}" if method == "CONNECT" else target)
        host = self._hosts.get(url.host or "", url.host)
        up_reader, up_writer = await asyncio.open_connection(host, url.port)
        try:
            if method == "CONNECT":
                writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
            else:
                up_writer.write(head.replace(target, url.raw_path_qs, 1).encode("latin-1"))
            await _both(_copied(reader, up_writer), _copied(up_reader, writer))
        finally:
            up_writer.transport.abort()


async def _copied(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while block := await reader.read(65536):
        writer.write(block)
        await writer.drain()


async def _both(*ways: Coroutine[None, None, None]) -> None:
    """Both ways, until one of them ends."""
    tasks = [asyncio.ensure_future(way) for way in ways]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
