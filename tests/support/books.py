"""A server's ledger as its operator sees it: in this process, because a command each would take half a second."""

import asyncio
from contextlib import ExitStack
from typing import Self

from tests.support.server import Server

from headgate.bootstrap import administration
from headgate.core.accounts import Balance, LedgerReport, UsageRow
from headgate.core.errors import NotFound
from headgate.core.money import NanoUSD
from headgate.service.accounts import Administration

SETTLED_SECONDS = 2.0
"""How long after its end a request may take to leave its rows."""

POLL_SECONDS = 0.005


class Books:
    """`with Books(server) as books:`; the server may run, be dead, or be started again meanwhile."""

    def __init__(self, server: Server) -> None:
        self._settings = server.settings
        self._stack = ExitStack()
        self._admin: Administration | None = None

    def __enter__(self) -> Self:
        self._admin = self._stack.enter_context(administration(self._settings))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def admin(self) -> Administration:
        assert self._admin is not None
        return self._admin

    def open(self, account: str, nano: int) -> None:
        self.admin.create_account(account, NanoUSD(nano) if nano else None)

    def key(self, account: str, app: str | None = None) -> str:
        return self.admin.create_key(account, app=app).key

    def token(self, account: str) -> str:
        return self.admin.create_token(account, 3600).token

    def balance(self, account: str) -> Balance:
        return self.admin.balance(account)

    def earned(self, account: str) -> int:
        """The balance of an account that need not exist before it first earned anything."""
        try:
            return self.balance(account).balance
        except NotFound:
            return 0

    def rows(self, account: str) -> list[UsageRow]:
        """The account's usage rows, oldest first."""
        return [record.row for record in reversed(self.admin.usage(account))]

    async def settled(self, account: str, rows: int = 1, seconds: float = SETTLED_SECONDS) -> list[UsageRow]:
        """The account's rows once there are so many and nothing is held; fails when that takes too long."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + seconds
        while True:
            balance, found = self.balance(account), self.rows(account)
            if len(found) >= rows and not balance.open_holds and not balance.held:
                assert len(found) == rows, found
                return found
            assert loop.time() < deadline, f"not settled after {seconds} s: {balance}, {found}"
            await asyncio.sleep(POLL_SECONDS)

    async def quiet(self, account: str, seconds: float = SETTLED_SECONDS) -> None:
        """Wait until nothing is held of the account."""
        async with asyncio.timeout(seconds):
            while self.balance(account).open_holds:  # noqa: ASYNC110
                await asyncio.sleep(POLL_SECONDS)

    async def held(self, account: str, holds: int = 1, seconds: float = SETTLED_SECONDS) -> int:
        """What is held of the account once it has so many open holds, in nano-USD."""
        async with asyncio.timeout(seconds):
            while (balance := self.balance(account)).open_holds < holds:  # noqa: ASYNC110
                await asyncio.sleep(POLL_SECONDS)
        return balance.held

    def check(self) -> LedgerReport:
        """The whole ledger, which must be right."""
        report = self.admin.audit()
        assert report.ok, report.problems
        return report
