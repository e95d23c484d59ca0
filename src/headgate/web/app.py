"""The ASGI application: hot routes by a dict, everything else through Starlette, CORS around both."""

from collections.abc import MutableMapping, Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Match, Route

from headgate.core.errors import GatewayError, InternalError, MethodNotAllowed, NotFound
from headgate.dialects.openai_errors import error_response
from headgate.web.json_endpoints import json_response
from headgate.web.routes import RouteRow
from headgate.web.ui_routes import ui_routes
from headgate.web.wire import Receive, Scope, Send, header, request_id

EXPOSED_HEADERS = (
    "X-Request-Id",
    "X-Stream-Id",
    "X-Headgate-Provider",
    "X-Headgate-Price",
    "Retry-After",
    *(
        f"x-ratelimit-{what}-{unit}"
        for what in ("limit", "remaining", "reset")
        for unit in ("requests", "tokens")
    ),
)


class HeadgateApp:
    """Dispatches. `rows` is the route table."""

    def __init__(self, rows: Sequence[RouteRow], cors_origins: Sequence[str]) -> None:
        self.rows = tuple(rows)
        self._hot = {row.path: row.app for row in rows if row.calls_model}
        routes: list[BaseRoute] = [Route(row.path, row.app, methods=[row.method]) for row in rows]
        self._rest = Starlette(
            routes=routes + list(ui_routes()),
            exception_handlers={HTTPException: self._http_error, Exception: _bug},
        )
        self._rest.router.redirect_slashes = False
        self._entry = CORSMiddleware(
            self._dispatch,
            allow_origins=list(cors_origins),
            allow_methods=["GET", "POST", "HEAD", "OPTIONS"],
            allow_headers=["*"],
            expose_headers=list(EXPOSED_HEADERS),
            max_age=600,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            raise RuntimeError(f"cannot serve {scope['type']}")
        if scope["method"] == "POST" and (hot := self._hot.get(scope["path"])) is not None:
            # Clients that are not browsers send no Origin and need no CORS; its layers cost 8 % of a request.
            entry = hot if header(scope, b"origin") is None else self._entry
            await entry(scope, receive, send)
            return
        given_id = request_id(scope).encode()

        async def send_with_id(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"x-request-id", given_id)]
            await send(message)

        await self._entry(scope, receive, send_with_id)

    async def _dispatch(self, scope: Scope, receive: Receive, send: Send) -> None:
        hot = self._hot.get(scope["path"]) if scope["method"] == "POST" else None
        await (hot or self._rest)(scope, receive, send)

    async def _http_error(self, request: Request, _: Exception) -> Response:
        """404 and 405 of the router, in the OpenAI form."""
        return self.refusal(request.method, request.scope["path"])

    def refusal(self, method: str, path: str) -> Response:
        """The answer to a method that this path does not have: 405, or 404 where there is no such path."""
        scope: Scope = {"type": "http", "method": method, "path": path}
        methods: set[str] = set()
        for route in self._rest.routes:
            if isinstance(route, Route) and route.matches(scope)[0] != Match.NONE:
                methods |= route.methods or {"GET"}
        if not methods:
            return rendered(NotFound(f"There is nothing at {path[:200]}."))
        allow = ", ".join(sorted(methods))
        response = rendered(MethodNotAllowed(f"{method[:20]} is not allowed here; allowed: {allow}."))
        response.headers["allow"] = allow
        return response


async def _bug(_: Request, __: Exception) -> Response:
    return rendered(InternalError())


def rendered(error: GatewayError) -> Response:
    """The error in the OpenAI form."""
    told = error_response(error)
    response = json_response(told.body, told.status)
    response.headers.update(dict(told.headers))
    return response
