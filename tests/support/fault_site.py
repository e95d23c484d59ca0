"""A gateway in this process before the upstream that breaks: every door, every format, exact books."""

import asyncio
import itertools
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from msgspec import Struct
from multidict import CIMultiDict
from tests.support.books import POLL_SECONDS, SETTLED_SECONDS
from tests.support.doors import DOORS, Caller, Door, Reply
from tests.support.exchange import Exchange, scope_of
from tests.support.fault_upstream import FaultUpstream, Play, Steps
from tests.support.stage import JWT_SECRET
from tests.support.wires import WIRES, Wire

from headgate.bootstrap import administration
from headgate.bootstrap.gateway import open_gateway
from headgate.config import Settings, load
from headgate.core.accounts import UsageRow
from headgate.core.money import NanoUSD
from headgate.providers.fake import Fake
from headgate.service.accounts import Administration
from headgate.web.app import HeadgateApp
from headgate.web.routes import route_table

INPUT, CACHED_INPUT, OUTPUT = 500, 250, 1500
"""Nano-USD per token."""

CREDIT = 10**12
"""Nano-USD that each account begins with."""

MOST_TOKENS = 8
UPSTREAM_KEY = "upstream-key-canary-7d20"
SILENCE_S, TOTAL_S = 1.0, 2.0
"""How long the hasty providers wait."""

_HEAD = """
[tokens]
secret_env = "JWT_SECRET"

[routing]
retries = 0
breaker_failures = 0
"""
_ROW = """
[providers.{name}]
kind = "{kind}"
base_url = "{url}"
api_key_env = "ACME_KEY"
{times}

[[models]]
name = "{name}"
provider = "{name}"
upstream_name = "plain"
mode = "{mode}"
context_window = 8192
max_output_tokens = 4096
input_price = "0.50"
cached_input_price = "0.25"
output_price = "1.50"

[apps.{name}]
model = "{name}"
prompt = "{{{{query}}}}"
max_tokens = 8
variables = [{{ name = "query", type = "paragraph", required = true }}]
"""


class Visit(Struct):
    """One request on its way: the client's side, the upstream's, and whose it is."""

    request_id: str
    tag: str
    door: Door
    account: str
    exchange: Exchange
    play: Play
    task: "asyncio.Task[None]"

    async def reply(self) -> Reply:
        """The answer, once it is whole."""
        await self.task
        exchange = self.exchange
        assert exchange.status is not None and exchange.ended
        return Reply(status=exchange.status, headers=CIMultiDict(exchange.headers), body=exchange.body)


class FaultSite:
    """Models and apps bear their format's name, with "hasty-" before it where the provider soon gives up, and
    "unreachable-" where no connection ever comes about."""

    def __init__(
        self, app: HeadgateApp, up: FaultUpstream, operator: Administration, settings: Settings
    ) -> None:
        self.up = up
        self.operator = operator
        self._app = app
        self._numbers = itertools.count(1)
        apps = tuple(name for name in settings.apps if name != "default")
        self._callers = {door.name: self._caller(door, apps) for door in DOORS}

    def _caller(self, door: Door, apps: tuple[str, ...]) -> Caller:
        """Every door has an account of its own."""
        account, operator = door.name, self.operator
        operator.create_account(account, NanoUSD(CREDIT))
        keys = {app: operator.create_key(account, app=app).key for app in apps if door.dialect == "dify"}
        return Caller(
            account=account,
            key=operator.create_key(account).key,
            token=operator.create_token(account, 3600).token,
            app_keys=keys,
        )

    def visit(self, door: Door, model: str, steps: Steps) -> Visit:
        """Ask through a door, and be answered by these steps."""
        tag = f"cell-{next(self._numbers)}"
        caller = self._callers[door.name]
        play = self.up.play(tag, steps)
        headers, body = door.question(caller, f"This is {tag}.", model=model)
        headers["X-Request-Id"] = tag
        exchange = Exchange(
            json.dumps(body).encode(), scope=scope_of("POST", door.path, {"Host": "inside", **headers})
        )
        task = asyncio.ensure_future(self._app(exchange.scope, exchange.receive, exchange.send))
        return Visit(tag, tag, door, caller.account, exchange, play, task)

    def rows(self, visit: Visit) -> list[UsageRow]:
        """The request's usage rows."""
        records = self.operator.usage(visit.account, 100)
        return [record.row for record in records if record.row.request_id == visit.request_id]

    async def settled(self, visit: Visit) -> UsageRow:
        """The row of a request that nobody waited for."""
        async with asyncio.timeout(SETTLED_SECONDS):
            while not (rows := self.rows(visit)):  # noqa: ASYNC110
                await asyncio.sleep(POLL_SECONDS)  # the ledger's writer thread settles it
        (row,) = rows
        return row

    def balance(self, door: Door) -> int:
        """What the door's account has; nothing of it may be held."""
        balance = self.operator.balance(door.name)
        assert (balance.held, balance.open_holds) == (0, 0), balance
        return balance.balance

    def check(self) -> None:
        """The whole ledger is right, and nothing is held."""
        report = self.operator.audit()
        assert report.ok, report.problems
        assert (report.open_holds, report.held) == (0, 0)


def priced(row: UsageRow) -> int:
    """What the row's tokens cost."""
    fresh = row.prompt_tokens - row.cached_tokens
    return fresh * INPUT + row.cached_tokens * CACHED_INPUT + row.completion_tokens * OUTPUT


def _rows(wire: Wire, origin: str, unreachable: str) -> str:
    fields = {"kind": wire.kind, "mode": wire.mode}
    url = origin + wire.root
    hasty = f"timeout_s = {SILENCE_S}\ntotal_timeout_s = {TOTAL_S}"
    return (
        _ROW.format(name=wire.name, url=url, times="", **fields)
        + _ROW.format(name=f"hasty-{wire.name}", url=url, times=hasty, **fields)
        + _ROW.format(name=f"unreachable-{wire.name}", url=unreachable + wire.root, times="", **fields)
    )


@asynccontextmanager
async def open_fault_site(folder: Path, unreachable: str = "http://127.0.0.1:9") -> AsyncIterator[FaultSite]:
    async with FaultUpstream() as up:
        config = folder / "faults.toml"
        config.write_text(_HEAD + "".join(_rows(wire, up.origin, unreachable) for wire in WIRES))
        environment = {"JWT_SECRET": JWT_SECRET, "ACME_KEY": UPSTREAM_KEY}
        settings = load(config, environment | {"HEADGATE_DATA_DIR": str(folder / "data")})
        async with open_gateway(settings, providers={"embedded": Fake("embedded")}) as gateway:
            app = HeadgateApp(
                route_table(settings, gateway, lambda: "http://inside"), settings.server.cors_origins
            )
            with administration(settings) as operator:
                yield FaultSite(app, up, operator, settings)
