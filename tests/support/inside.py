"""A whole gateway in the test's own process, with providers of the test's choice and no engine or socket."""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping, MutableMapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from msgspec import Struct
from multidict import CIMultiDict
from tests.support.doors import Caller, Door, Reply
from tests.support.stage import JWT_SECRET, settings_for
from tests.support.steady import steady

from headgate.bootstrap import administration
from headgate.bootstrap.gateway import open_gateway
from headgate.config import Settings, load
from headgate.core.money import NanoUSD
from headgate.core.ports import Provider
from headgate.service.gateway import Gateway
from headgate.web.app import HeadgateApp
from headgate.web.routes import RouteRow, route_table

ENVIRONMENT = {"JWT_SECRET": JWT_SECRET, "ACME_KEY": "unused"}


class Inside(Struct):
    """The gateway's parts, and a client that speaks ASGI to it."""

    settings: Settings
    gateway: Gateway
    rows: tuple[RouteRow, ...]
    app: HeadgateApp

    def caller(self, account: str, usd: int = 10) -> Caller:
        with administration(self.settings) as operator:
            operator.create_account(account, NanoUSD(usd * 10**9) if usd else None)
            return Caller(
                account=account,
                key=operator.create_key(account).key,
                token=operator.create_token(account, 3600).token,
            )

    async def ask(self, door: Door, caller: Caller, text: str = "say hello", **fields: Any) -> Reply:
        headers, body = door.question(caller, text, **fields)
        return await self.send("POST", door.path, body, headers)

    async def send(
        self,
        method: str,
        path: str,
        body: bytes | dict[str, Any] = b"",
        headers: Mapping[str, str] | None = None,
    ) -> Reply:
        """One request, its answer read to the end. Nobody disconnects."""
        sent = json.dumps(body).encode() if isinstance(body, dict) else body
        given = [(name.lower().encode(), value.encode()) for name, value in (headers or {}).items()]
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [(b"host", b"inside"), *given],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 80),
            "state": {},
        }
        return await _answered(self.app, scope, sent)


async def _answered(app: HeadgateApp, scope: dict[str, Any], body: bytes) -> Reply:
    requested = False
    never = asyncio.Event()
    started: list[MutableMapping[str, Any]] = []
    parts: list[bytes] = []

    async def receive() -> MutableMapping[str, Any]:
        nonlocal requested
        if requested:
            await never.wait()
        requested = True
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            started.append(message)
        else:
            parts.append(message.get("body", b""))

    await app(scope, receive, send)
    (start,) = started
    headers = CIMultiDict((name.decode(), value.decode()) for name, value in start["headers"])
    return Reply(status=start["status"], headers=headers, body=b"".join(parts))


@asynccontextmanager
async def inside(folder: Path, providers: Mapping[str, Provider], *, more: str = "") -> AsyncIterator[Inside]:
    """A gateway over `settings_for`'s models. `providers` should replace "acme" and "embedded"."""
    config = folder / "inside.toml"
    config.write_text(steady(settings_for("http://127.0.0.1:9/v1", more)))
    settings = load(config, ENVIRONMENT | {"HEADGATE_DATA_DIR": str(folder / "data")})
    async with open_gateway(settings, providers=providers) as gateway:
        rows = route_table(settings, gateway, lambda: "http://inside")
        yield Inside(settings, gateway, rows, HeadgateApp(rows, settings.server.cors_origins))
