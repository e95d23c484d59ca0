"""Genstack's small endpoints: service health at `GET /`, and stopping a stream."""

from collections.abc import Callable

from starlette.requests import Request
from starlette.responses import Response

from headgate.core.errors import InternalError, StreamNotFound
from headgate.dialects.genstack import SHUTDOWN_DONE, Genstack, render_health
from headgate.service.gateway import Gateway
from headgate.web.json_endpoints import json_body, json_response


class GenstackEndpoints:
    def __init__(
        self,
        gateway: Gateway,
        dialect: Genstack,
        env: str,
        public_url: Callable[[], str],
        max_body_bytes: int,
    ) -> None:
        self._gateway = gateway
        self._dialect = dialect
        self._env = env
        self._public_url = public_url
        self._max_body_bytes = max_body_bytes

    async def health(self, _: Request) -> Response:
        """200 only after a real round trip to the database."""
        reason = await self._gateway.ledger_problem()
        if reason is not None:
            raise InternalError(f"The service is not healthy: {reason}.")
        return json_response(render_health(self._env, f"{self._public_url()}/ui"))

    async def shutdown(self, request: Request) -> Response:
        """Stop a stream; with a token given, only the caller's own."""
        body = await json_body(request, self._max_body_bytes)
        token = self._dialect.credential(None, body)
        account = None
        if token is not None:
            account = (await self._gateway.identity.authenticate(token, tokens_only=True)).account
        stream_id = self._dialect.decode_shutdown(body)
        running = self._gateway.streams.find("genstack", stream_id, account=account)
        if running is None:
            raise StreamNotFound("No such stream is running.", param="streamId")
        if not await self._gateway.streams.stop(running):
            raise InternalError("The stream could not be stopped in time.")
        return json_response(SHUTDOWN_DONE)
