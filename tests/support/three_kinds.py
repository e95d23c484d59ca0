"""One gateway in front of an upstream of each kind, each speaking its own format on a real socket."""

import contextlib
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Literal

from tests.support.anthropic_upstream import AnthropicUpstream
from tests.support.books import Books
from tests.support.catalogue import model
from tests.support.client import Client
from tests.support.cohere_upstream import CohereUpstream
from tests.support.server import Server
from tests.support.site import RICH
from tests.support.upstream import Received, Upstream

Kind = Literal["openai", "anthropic", "cohere"]
KINDS: tuple[Kind, ...] = ("openai", "anthropic", "cohere")
SPEAKS: Mapping[Kind, type[Upstream]] = {
    "openai": Upstream,
    "anthropic": AnthropicUpstream,
    "cohere": CohereUpstream,
}
UPSTREAM_KEY = "upstream-key-canary-8e02"
KEY_VARIABLE = "THREE_KINDS_KEY"


def provider_of(kind: Kind) -> str:
    return f"{kind}-service"


def model_of(kind: Kind) -> str:
    return f"{kind}-model"


def kind_model(kind: Kind, name: str = "", **fields: Any) -> str:
    """A model that chats, served by the upstream of this kind, and an app of the same name."""
    fields = {"provider": provider_of(kind), "mode": "chat"} | fields
    return model(name or model_of(kind), **fields)


class ThreeKinds:
    def __init__(
        self, server: Server, ups: Mapping[Kind, Upstream], books: Books, stack: AsyncExitStack
    ) -> None:
        self.server = server
        self.ups = ups
        self.books = books
        self._stack = stack
        self._accounts = 0

    @property
    def url(self) -> str:
        return self.server.url

    async def client(self) -> Client:
        """A client of a new account with 10 USD."""
        self._accounts += 1
        account = f"account-{self._accounts}"
        self.books.open(account, RICH)
        return await self._stack.enter_async_context(Client(self.url, self.books, account))

    @property
    def asked(self) -> int:
        """How often any upstream was asked."""
        return sum(len(up.requests) for up in self.ups.values())

    def latest(self, kind: Kind) -> Received:
        """What the upstream of this kind was asked last."""
        return self.ups[kind].requests[-1]

    def untouched(self, client: Client) -> bool:
        """The client's account has what it began with, nothing is held of it, and it has no usage."""
        balance = self.books.balance(client.account)
        return (balance.balance, balance.held, balance.open_holds) == (RICH, 0, 0) and not self.books.rows(
            client.account
        )


@contextlib.asynccontextmanager
async def open_three_kinds(
    models: str, folder: Path, *, provider_lines: str = "", env: Mapping[str, str] | None = None
) -> AsyncIterator[ThreeKinds]:
    """`models` is what follows the providers in headgate.toml; `provider_lines` are further lines of each provider."""
    async with AsyncExitStack() as stack:
        ups = {kind: await stack.enter_async_context(SPEAKS[kind]()) for kind in KINDS}
        providers = "".join(
            f'\n[providers.{provider_of(kind)}]\nkind = "{kind}"\nbase_url = "{up.url}"\n'
            f'api_key_env = "{KEY_VARIABLE}"\n{provider_lines}\n'
            for kind, up in ups.items()
        )
        server = Server(providers + models, folder=folder, env={KEY_VARIABLE: UPSTREAM_KEY, **(env or {})})
        await server.start()
        stack.push_async_callback(server.stop)
        books = stack.enter_context(Books(server))
        clients = await stack.enter_async_context(AsyncExitStack())
        yield ThreeKinds(server, ups, books, clients)
