"""A demo gateway beside a scripted upstream, for tests that speak to it as clients do and check what it cost."""

import asyncio
import contextlib
import io
import json
from collections.abc import AsyncIterator, Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any

import aiohttp
from msgspec import Struct
from tests.support.books import POLL_SECONDS, SETTLED_SECONDS, Books
from tests.support.server import Server
from tests.support.upstream import Upstream

from headgate.core.accounts import UsageRow

NANO = 10**9
UPSTREAM_URL = "@upstream@"
"""Stands in configurations for the scripted upstream's base URL."""

ACME = f"""
[providers.acme]
kind = "openai"
base_url = "{UPSTREAM_URL}"
"""


def model_row(name: str, **fields: Any) -> str:
    """A `[[models]]` table of the provider "acme": 0.50 USD in, 0.25 cached, 1.50 out per million tokens."""
    row = {
        "name": name,
        "provider": "acme",
        "mode": "completion",
        "context_window": 8192,
        "max_output_tokens": 4096,
        "input_price": "0.50",
        "cached_input_price": "0.25",
        "output_price": "1.50",
    } | fields
    # JSON's scalars and lists are TOML's too.
    return "\n".join(["", "[[models]]", *(f"{key} = {json.dumps(value)}" for key, value in row.items()), ""])


def nano(usd: str) -> int:
    """Nano-USD from a decimal string in USD, exactly."""
    amount = Decimal(usd) * NANO
    assert amount == int(amount), usd
    return int(amount)


def events(body: bytes) -> list[str]:
    """The payloads of a whole event stream of `data:` events."""
    blocks = body.decode().split("\n\n")
    assert blocks.pop() == "", "the stream ends inside an event"
    payloads = [block for block in blocks if not block.startswith(":")]
    assert all(block.startswith("data: ") and "\n" not in block for block in payloads), payloads
    return [block.removeprefix("data: ") for block in payloads]


class Reply(Struct, frozen=True):
    """A whole answer."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def events(self) -> list[Any]:
        """Decoded events; `[DONE]` stays that word."""
        return [data if data == "[DONE]" else json.loads(data) for data in events(self.body)]

    @property
    def price(self) -> int:
        """X-Headgate-Price in nano-USD."""
        return nano(self.headers["X-Headgate-Price"])

    @property
    def request_id(self) -> str:
        return self.headers["X-Request-Id"]


class House:
    """The gateway with its demo account of 10 USD (`key`, `token`), and the upstream it may call."""

    def __init__(self, server: Server, up: Upstream, http: aiohttp.ClientSession, books: Books) -> None:
        self.server = server
        self.up = up
        self.books = books
        self.key = _after(server.stdout, "key ")
        self.token = _after(server.stdout, "page ").partition("#token=")[2]
        self._http = http

    @property
    def url(self) -> str:
        return self.server.url

    async def post(self, path: str, body: object, key: str | None = None) -> Reply:
        headers = {"Authorization": f"Bearer {key or self.key}", "Content-Type": "application/json"}
        # A file, because the client warns of large bodies that are bytes.
        content = io.BytesIO(json.dumps(body).encode())
        async with self._http.post(path, data=content, headers=headers) as response:
            return Reply(response.status, response.headers, await response.read())

    async def get(self, path: str, key: str | None = None) -> Reply:
        headers = {"Authorization": f"Bearer {key or self.key}"}
        async with self._http.get(path, headers=headers) as response:
            return Reply(response.status, response.headers, await response.read())

    def balance(self) -> int:
        """The demo account's balance in nano-USD; nothing of it may be held."""
        balance = self.books.balance("demo")
        assert (balance.held, balance.open_holds) == (0, 0), balance
        return balance.balance

    def rows(self, request_id: str) -> list[UsageRow]:
        """The usage rows of one request, in the order of its models."""
        return [row for row in self.books.rows("demo") if row.request_id == request_id]

    async def settled(self, request_id: str) -> list[UsageRow]:
        """The rows of a request that nobody waited for, once it is settled."""
        async with asyncio.timeout(SETTLED_SECONDS):
            while self.books.balance("demo").open_holds or not self.rows(request_id):  # noqa: ASYNC110
                await asyncio.sleep(POLL_SECONDS)  # another process settles it
        return self.rows(request_id)

    async def responses(self, dialect: str, status: int) -> int:
        """How many answers with this status the gateway says it gave."""
        wanted = f'headgate_requests_total{{dialect="{dialect}",status="{status}"}} '
        lines = (await self.get("/metrics")).body.decode().splitlines()
        counts = [float(line.removeprefix(wanted)) for line in lines if line.startswith(wanted)]
        return int(sum(counts))


@contextlib.asynccontextmanager
async def open_house(toml: str, folder: Path, env: dict[str, str] | None = None) -> AsyncIterator[House]:
    """Start upstream and gateway; `@upstream@` in the configuration becomes the upstream's base URL."""
    async with Upstream() as up:
        server = Server(toml.replace(UPSTREAM_URL, up.url), folder=folder, env=env, demo=True)
        try:
            await server.start()
            async with aiohttp.ClientSession(server.url) as http:
                with Books(server) as books:
                    yield House(server, up, http, books)
        finally:
            await server.stop()


def _after(lines: list[str], label: str) -> str:
    return next(line.strip().removeprefix(label).strip() for line in lines if line.strip().startswith(label))
