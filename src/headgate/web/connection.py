"""uvicorn's connection, with two additions.

It stops the requests of a client that leaves. And what its parser refuses is answered in our own form: the parser
knows the registered methods only and breaks off at any other; to clients those are methods like PUT,
which no path has: 405 with `Allow`, or 404.
"""

import asyncio
import re
import secrets
import sys
from urllib.parse import unquote

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from headgate.core.errors import InvalidRequest
from headgate.web.app import rendered
from headgate.web.disconnect import LEAVING, Leaving

_REQUEST_LINE = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+) (/[!-~]*) HTTP/1\.[01]\r\n")


class Connection(HttpToolsProtocol):
    """One client connection."""

    _received = b""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        super().connection_made(transport)
        self._leaving = Leaving()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._leaving.lost()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope[LEAVING] = self._leaving  # type: ignore[literal-required]  # an extension of ours

    def on_message_complete(self) -> None:
        super().on_message_complete()
        # A large body may have paused reading, and a paused connection does not notice that it is closed.
        if not self.pipeline:
            self.flow.resume_reading()

    def data_received(self, data: bytes) -> None:
        self._received = data
        super().data_received(data)

    def send_400_response(self, msg: str) -> None:
        """Called while the parser's error is handled; the connection cannot be used after it."""
        line = _REQUEST_LINE.match(self._received)
        if line and isinstance(sys.exc_info()[1], httptools.HttpParserInvalidMethodError):
            path = unquote(line[2].partition(b"?")[0].decode("ascii"))
            response = self.config.app.refusal(line[1].decode("ascii"), path)  # type: ignore[union-attr]
        else:
            response = rendered(InvalidRequest("The request is not valid HTTP."))
        response.headers["x-request-id"] = secrets.token_hex(16)
        response.headers["connection"] = "close"
        head = b"".join(b"%b: %b\r\n" % pair for pair in response.raw_headers)
        self.transport.write(b"%b%b\r\n%b" % (STATUS_LINE[response.status_code], head, response.body))
        self.transport.close()
