"""A gateway, the upstream it calls, its books, and accounts to ask with."""

import contextlib
import itertools
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path

from tests.support.books import Books
from tests.support.client import Client
from tests.support.server import Server
from tests.support.upstream import Received, Upstream

RICH = 10**10
"""10 USD."""


class Site:
    """`server` may be replaced by a later one on the same folder."""

    def __init__(self, server: Server, up: Upstream, books: Books, stack: AsyncExitStack) -> None:
        self.server = server
        self.up = up
        self.books = books
        self._stack = stack
        self._numbers = itertools.count(1)
        self._seen = 0

    async def client(self, nano: int = RICH) -> Client:
        """A client of a new account with this much money (nano-USD)."""
        account = f"account-{next(self._numbers)}"
        self.books.open(account, nano)
        return await self._stack.enter_async_context(Client(self.server.url, self.books, account))

    def mark(self) -> None:
        """From here on `asked` counts, and everything is held again that a script holds."""
        self._seen = len(self.up.requests)
        self.up.hold()

    @property
    def asked(self) -> int:
        """How often the upstream was asked since the mark."""
        return len(self.up.requests) - self._seen

    async def request(self, index: int = 0) -> Received:
        """The request with this number since the mark, once the upstream has it."""
        return await self.up.request(self._seen + index)


@contextlib.asynccontextmanager
async def open_site(
    toml: Callable[[str], str], folder: Path, speaks: type[Upstream] = Upstream
) -> AsyncIterator[Site]:
    """`toml` makes the configuration from the upstream's base URL; `speaks` says what the upstream speaks."""
    async with AsyncExitStack() as stack:
        up = await stack.enter_async_context(speaks())
        server = Server(toml(up.url), folder=folder)
        await server.start()
        stack.push_async_callback(server.stop)
        books = stack.enter_context(Books(server))
        clients = await stack.enter_async_context(AsyncExitStack())
        yield Site(server, up, books, clients)
