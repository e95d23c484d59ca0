"""What the small JSON endpoints share: read a body, know the caller, answer, refuse in the dialect's form."""

from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import structlog
from starlette.requests import Request
from starlette.responses import Response

from headgate.core.accounts import Principal
from headgate.core.errors import GatewayError, InternalError, InvalidRequest
from headgate.dialects.base import Dialect, MalformedBody, bearer
from headgate.service.gateway import Gateway
from headgate.service.identity import authorize
from headgate.web.wire import ClientGone, Receive, Scope, Send, check_content_type, read_body, request_id

log = structlog.get_logger("headgate.request")
T = TypeVar("T")
P = TypeVar("P")
Endpoint = Callable[[Request], Awaitable[Response]]


class JsonEndpoint:
    """An ASGI application around `endpoint`; GatewayErrors are rendered by the dialect."""

    def __init__(self, dialect: Dialect[Any], endpoint: Endpoint) -> None:
        self._dialect = dialect
        self._endpoint = endpoint

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            response = await self._endpoint(Request(scope, receive))
        except ClientGone:
            return
        except Exception as error:
            if not isinstance(error, GatewayError):
                log.exception("request failed", request_id=request_id(scope))
                error = InternalError()
            rendered = self._dialect.render_error(error)
            response = json_response(rendered.body, rendered.status)
            response.headers.update(dict(rendered.headers))
        await response(scope, receive, send)


def json_response(body: bytes, status: int = 200) -> Response:
    return Response(body, status, media_type="application/json")


async def caller(request: Request, gateway: Gateway, dialect: str) -> Principal:
    """The authenticated principal of a Bearer request, allowed on this dialect's routes."""
    principal = await gateway.identity.authenticate(bearer(request.headers.get("authorization")))
    authorize(principal, dialect)
    return principal


async def parsed_body(
    request: Request, limit: int, parse: Callable[[bytes], T], admit: Callable[[], Awaitable[P]]
) -> tuple[T, P]:
    """The body as parsed, and whom `admit` let in; what is no JSON is said before the 401, a wrong field after it."""
    body = await json_body(request, limit)
    try:
        parsed = parse(body)
    except MalformedBody:
        raise
    except InvalidRequest:
        await admit()
        raise
    return parsed, await admit()


async def json_body(request: Request, limit: int) -> bytes:
    check_content_type(request.scope)
    return await read_body(request.scope, request.receive, limit)
