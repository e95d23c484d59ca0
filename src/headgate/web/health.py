"""/livez: the process answers. /readyz: new work can be done. /metrics: Prometheus."""

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from headgate.service.gateway import Gateway
from headgate.web.json_endpoints import json_response

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class HealthEndpoints:
    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    async def livez(self, _: Request) -> Response:
        return json_response(b'{"status":"ok"}')

    async def readyz(self, _: Request) -> Response:
        """200, or 503 with the reason. Engines and deployments in trouble are shown and do not make it unready."""
        reason = await self._gateway.not_ready()
        body = {
            "status": "ok" if reason is None else "unavailable",
            "reason": reason,
            "engines": self._gateway.engines(),
            "deployments": self._gateway.deployments(),
        }
        return json_response(msgspec.json.encode(body), 200 if reason is None else 503)

    async def metrics(self, _: Request) -> Response:
        return Response(self._gateway.exposition(), media_type=METRICS_TYPE)
