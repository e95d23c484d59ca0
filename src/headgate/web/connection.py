"""uvicorn's connection, but what its parser refuses is answered in our own form.

The parser knows the registered methods only and breaks off at any other; to clients those are methods like PUT,
which no path has: 405 with `Allow`, or 404.
"""

import re
import secrets
import sys
from urllib.parse import unquote

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from headgate.core.errors import InvalidRequest
from headgate.web.app import rendered

_REQUEST_LINE = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+) (/[!-~]*) HTTP/1\.[01]\r\n")


class Connection(HttpToolsProtocol):
    """One client connection."""

    _received = b""

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
