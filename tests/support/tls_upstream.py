"""The scripted upstream over TLS."""

import asyncio
import ssl
from typing import Self

from tests.support.upstream import Connection, Upstream


class TLSUpstream(Upstream):
    """`url` names it `host`, which must lead here."""

    def __init__(self, tls: ssl.SSLContext, host: str = "localhost") -> None:
        super().__init__()
        self._tls = tls
        self._host = host

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(
            lambda: Connection(self), "127.0.0.1", self._port, ssl=self._tls
        )
        self._port = self._server.sockets[0].getsockname()[1]
        return self

    @property
    def url(self) -> str:
        return f"https://{self._host}:{self._port}/v1"
