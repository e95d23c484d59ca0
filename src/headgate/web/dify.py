"""Dify's siblings of /completion-messages: stop, parameters, info."""

from starlette.requests import Request
from starlette.responses import Response

from headgate.core.accounts import App
from headgate.dialects.dify import STOP_DONE, Dify, stream_id_of
from headgate.dialects.dify_app import render_app, render_parameters
from headgate.service.gateway import Gateway
from headgate.web.json_endpoints import caller, json_response, parsed_body


class DifyEndpoints:
    def __init__(self, gateway: Gateway, dialect: Dify, max_body_bytes: int, max_file_bytes: int) -> None:
        self._gateway = gateway
        self._dialect = dialect
        self._max_body_bytes = max_body_bytes
        self._max_file_bytes = max_file_bytes

    async def stop(self, request: Request) -> Response:
        """Always success (as Dify answers); only the app's own task of that user is stopped."""
        user, principal = await parsed_body(
            request,
            self._max_body_bytes,
            self._dialect.decode_stop,
            lambda: caller(request, self._gateway, "dify"),
        )
        app = self._dialect.app_of(principal)
        stream_id = stream_id_of(request.path_params["task_id"])
        if stream_id is not None:
            streams = self._gateway.streams
            running = streams.find("dify", stream_id, account=principal.account, app=app.name, user=user)
            if running is not None:
                await streams.stop(running)
        return json_response(STOP_DONE)

    async def parameters(self, request: Request) -> Response:
        app = await self._app(request)
        vision = self._gateway.catalog.resolve(app.model).vision
        return json_response(render_parameters(app, vision=vision, max_file_bytes=self._max_file_bytes))

    async def info(self, request: Request) -> Response:
        return json_response(render_app(await self._app(request)))

    async def _app(self, request: Request) -> App:
        return self._dialect.app_of(await caller(request, self._gateway, "dify"))
