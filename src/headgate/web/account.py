"""GET /v1/models, /v1/models/{id} and /v1/balance: what the caller may use, and what is left."""

from msgspec.structs import replace
from starlette.requests import Request
from starlette.responses import Response

from headgate.core.models import Catalog, ModelSpec, Retired
from headgate.dialects.models_view import ModelRow, render_balance, render_model, render_models
from headgate.service.gateway import Gateway
from headgate.web.json_endpoints import caller, json_response


class AccountEndpoints:
    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._read_at = int(gateway.clock.time())

    async def models(self, request: Request) -> Response:
        await caller(request, self._gateway, "openai")
        everything = request.query_params.get("all", "").lower() in {"true", "1"}
        catalog = self._gateway.catalog
        rows = [self._row(spec) for spec in catalog.models]
        if everything:
            rows += [self._retired_row(catalog, retired) for retired in catalog.retired]
        return json_response(render_models(rows, created=self._read_at, everything=everything))

    async def model(self, request: Request) -> Response:
        await caller(request, self._gateway, "openai")
        row = self._row(self._gateway.catalog.resolve(request.path_params["id"], param="id"))
        return json_response(render_model(row, created=self._read_at))

    async def balance(self, request: Request) -> Response:
        principal = await caller(request, self._gateway, "openai")
        return json_response(render_balance(await self._gateway.balance(principal)))

    def _retired_row(self, catalog: Catalog, retired: Retired) -> ModelRow:
        qualified = f"{retired.provider}/{retired.name}"
        successor = self._row(catalog.resolve(qualified))
        in_use = any(retired.name in (model.name, *model.aliases) for model in catalog.models)
        return replace(successor, name=qualified if in_use else retired.name, successor=successor.name)

    def _row(self, spec: ModelSpec) -> ModelRow:
        unique = self._gateway.catalog.short_name_is_unique(spec)
        return ModelRow(
            spec=spec,
            name=spec.name if unique else spec.qualified_name,
            reason=self._gateway.unavailable(spec),
        )
