"""Reading requests and writing responses at the ASGI level, without a framework between (it would cost more than
the rest of a request). The protocol: https://asgi.readthedocs.io/en/stable/specs/www.html"""

import re
import secrets
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any

from headgate.core.errors import BodyTooLarge, InvalidRequest, UnsupportedContentType

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Headers = Iterable[tuple[str, str]]

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}")


class ClientGone(Exception):
    """The client closed the connection before its request was answered."""


def header(scope: Scope, name: bytes) -> bytes | None:
    """The first value of a header, named in lower case."""
    value: bytes
    for key, value in scope["headers"]:
        if key == name:
            return value
    return None


def new_id() -> str:
    """128 random bits in hex."""
    return secrets.token_hex(16)


def request_id(scope: Scope, make: Callable[[], str] = new_id) -> str:
    """The client's X-Request-Id where it has the allowed form, else a new one. Kept in the scope."""
    known = scope.get("headgate.request_id")
    if known is None:
        given = header(scope, b"x-request-id")
        known = given.decode() if given and _REQUEST_ID.fullmatch(given) else make()
        scope["headgate.request_id"] = known
    return str(known)


def check_content_type(scope: Scope) -> None:
    """JSON, or none given. UnsupportedContentType for everything else."""
    given = header(scope, b"content-type")
    if given is None or not given:
        return
    media_type = given.split(b";", 1)[0].strip().lower()
    if media_type != b"application/json":
        shown = given.decode("latin-1")[:100]
        raise UnsupportedContentType(f"The content type must be application/json, not {shown!r}.")


async def read_body(scope: Scope, receive: Receive, limit: int) -> bytes:
    """The whole body. BodyTooLarge beyond `limit` bytes, ClientGone when it does not come to an end."""
    declared = header(scope, b"content-length")
    if declared is not None:
        if not declared.isdigit():
            raise InvalidRequest("The Content-Length header is not a number.")
        if len(declared) > 15 or int(declared) > limit:
            raise BodyTooLarge(f"The body must be at most {limit} bytes.")
    message = await receive()
    if message["type"] == "http.disconnect":
        raise ClientGone
    body: bytes = message.get("body", b"")
    if not message.get("more_body"):
        if len(body) > limit:
            raise BodyTooLarge(f"The body must be at most {limit} bytes.")
        return body
    parts, size = [body], len(body)
    while message.get("more_body"):
        if size > limit:
            raise BodyTooLarge(f"The body must be at most {limit} bytes.")
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        parts.append(message.get("body", b""))
        size += len(parts[-1])
    if size > limit:
        raise BodyTooLarge(f"The body must be at most {limit} bytes.")
    return b"".join(parts)


def encoded(headers: Headers) -> list[tuple[bytes, bytes]]:
    return [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers]


async def respond(
    send: Send, status: int, body: bytes, headers: Headers = (), content_type: bytes = b"application/json"
) -> None:
    """One whole response."""
    await send(
        {
            "type": "http.response.start",
            "status": status,
            "headers": [
                (b"content-type", content_type),
                (b"content-length", str(len(body)).encode()),
                *encoded(headers),
            ],
        }
    )
    await send({"type": "http.response.body", "body": body})
