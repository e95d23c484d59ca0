"""A gateway process with a scripted upstream behind it, a client before it, and the operator's door beside it."""

import asyncio
import io
import itertools
import json
from collections.abc import AsyncIterable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Self

import aiohttp
from multidict import CIMultiDict
from tests.support.books import Books
from tests.support.doors import Caller, Door, Reply
from tests.support.server import Server
from tests.support.upstream import Upstream

from headgate.bootstrap import administration
from headgate.config import load
from headgate.core.accounts import UsageRow

JWT_SECRET = "a secret for tests that is long enough for every HMAC algorithm there is"
UPSTREAM_KEY = "upstream-key-canary-51c7"

PROVIDER = """
[providers.{name}]
kind = "openai"
base_url = "{url}"
"""
MODEL = """
[[models]]
name = "{name}"
provider = "{provider}"
upstream_name = "plain"
mode = "{mode}"
context_window = {window}
max_input_tokens = {window}
max_output_tokens = {output}
temperature = [0, {hottest}]
input_price = "0.50"
output_price = "1.50"
"""
APP = """
[apps.{name}]
model = "{model}"
prompt = "{{{{query}}}}"
variables = [{{ name = "query", type = "paragraph", required = true }}]
{more}
"""


def model(
    name: str,
    provider: str,
    *,
    mode: str = "both",
    window: int = 8192,
    output: int = 4096,
    hottest: float = 2,
    app: str = "",
) -> str:
    """A `[[models]]` row, and an app of the same name that uses it; `app` is more of the app's own settings."""
    row = MODEL.format(name=name, provider=provider, mode=mode, window=window, output=output, hottest=hottest)
    return row + APP.format(name=name, model=name, more=app)


def settings_for(url: str, more: str = "") -> str:
    """A configuration whose model `large`, also behind the app `default`, is served by the upstream at `url`.

    `cold` is small and takes little temperature, `demo` is the embedded model, `hasty` times out early,
    `keyless` lacks its key, `narrow` takes one request at a time.
    """
    return (
        '[tokens]\nsecret_env = "JWT_SECRET"\n'
        + PROVIDER.format(name="acme", url=url)
        + 'api_key_env = "ACME_KEY"\n'
        + PROVIDER.format(name="hasty", url=url)
        + "timeout_s = 0.3\ntotal_timeout_s = 5\n"
        + PROVIDER.format(name="keyless", url=url)
        + 'api_key_env = "NOBODY_SETS_THIS"\n'
        + PROVIDER.format(name="narrow", url=url)
        + "max_concurrency = 1\n"
        + model("large", "acme")
        + APP.format(name="default", model="large", more="")
        + model("cold", "acme", window=256, output=64, hottest=0.5)
        + model("hasty", "hasty")
        + APP.format(name="demo", model="demo", more="")
        + model("keyless", "keyless")
        + model("narrow", "narrow")
        + more
    )


class Stage:
    """`async with Stage(folder) as stage:`. `more` goes to the end of headgate.toml."""

    upstream: Upstream
    server: Server
    http: aiohttp.ClientSession

    def __init__(self, folder: Path, *, more: str = "", env: dict[str, str] | None = None) -> None:
        self.folder = folder
        self._more = more
        self._env = {"JWT_SECRET": JWT_SECRET, "ACME_KEY": UPSTREAM_KEY, **(env or {})}
        self._ids = itertools.count(1)
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        self.upstream = await self._stack.enter_async_context(Upstream())
        toml = settings_for(self.upstream.url, self._more)
        self.server = Server(toml, folder=self.folder, env=self._env)
        await self._stack.enter_async_context(self.server)
        self.books = self._stack.enter_context(Books(self.server))
        connector = aiohttp.TCPConnector(limit=0)
        self.http = await self._stack.enter_async_context(aiohttp.ClientSession(connector=connector))
        return self

    async def __aexit__(self, *_: object) -> None:
        self.upstream.release()
        await self._stack.aclose()

    @property
    def url(self) -> str:
        return self.server.url

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def caller(self, account: str, usd: int = 10, *, apps: tuple[str, ...] = ()) -> Caller:
        """A new account with credit in USD, a key, a token, and a key for each app."""
        self.books.open(account, usd * 10**9)
        return Caller(
            account=account,
            key=self.books.key(account),
            token=self.books.token(account),
            app_keys={app: self.books.key(account, app) for app in apps},
        )

    def key_for_a_newer_app(self, account: str, app: str) -> str:
        """A key for an app that the operator has configured since this server started."""
        newer = self.folder / "newer.toml"
        newer.write_text(
            (self.folder / "test.toml").read_text() + APP.format(name=app, model="large", more="")
        )
        data = {"HEADGATE_DATA_DIR": str(self.folder / "data")}
        with administration(load(newer, self._env | data)) as operator:
            return operator.create_key(account, app=app).key

    def new_id(self) -> str:
        """A request id not used before."""
        return f"test-{next(self._ids)}"

    async def send(
        self,
        method: str,
        path: str,
        body: bytes | dict[str, Any] | AsyncIterable[bytes] | None = None,
        headers: dict[str, str] | None = None,
    ) -> Reply:
        """Any request. A dict is sent as JSON; no content type is added to bytes."""
        given = dict(headers or {})
        if isinstance(body, dict):
            body = json.dumps(body).encode()
            given.setdefault("Content-Type", "application/json")
        async with self.http.request(
            method,
            self.url + path,
            data=io.BytesIO(body) if isinstance(body, bytes) else body,
            headers=given,
            skip_auto_headers=("Content-Type",),
            allow_redirects=False,
        ) as response:
            return Reply(status=response.status, headers=response.headers, body=await response.read())

    async def ask(
        self,
        door: Door,
        caller: Caller,
        text: str = "say hello",
        *,
        headers: dict[str, str] | None = None,
        **fields: Any,
    ) -> Reply:
        """A completion through this door; `fields` (and `model`) as for `Door.question`."""
        own, body = door.question(caller, text, **fields)
        return await self.send("POST", door.path, body, own | (headers or {}))

    async def raw(self, *parts: bytes) -> Reply:
        """Write these bytes to a connection of their own, then read one answer with a Content-Length."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            for part in parts:
                writer.write(part)
            async with asyncio.timeout(30):
                head = await reader.readuntil(b"\r\n\r\n")
                first, *lines = head.decode("latin-1").rstrip("\r\n").split("\r\n")
                headers = CIMultiDict(
                    (name, value) for name, _, value in (line.partition(": ") for line in lines)
                )
                body = await reader.readexactly(int(headers["Content-Length"]))
            return Reply(status=int(first.split()[1]), headers=headers, body=body)
        finally:
            writer.close()

    def rows(self, request_id: str) -> list[UsageRow]:
        """The usage rows of one request."""
        return [record.row for record in self.books.admin.usage() if record.row.request_id == request_id]

    def assert_untouched(self, caller: Caller, usd: int = 10) -> None:
        """The account has what it began with, and nothing of it is held."""
        balance = self.books.balance(caller.account)
        assert (balance.balance, balance.held, balance.open_holds) == (usd * 10**9, 0, 0)
