"""A ledger in memory that commits after a known number of turns of the event loop: every race can be replayed."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from headgate.core.accounts import Balance, Hold, Settlement, UsageRow
from headgate.core.errors import InsufficientFunds, LedgerUnavailable
from headgate.core.money import NanoUSD
from headgate.stores.posting import post


class MemoryLedger:
    """core.ports.Ledger. What was asked is committed `turns` turns later, in order, whoever still waits.

    `problem`: every commit fails with it and changes nothing. `rows` are the usage rows as they were settled,
    `amounts` what was held, in order.
    """

    def __init__(self, balances: dict[str, int] | None = None, *, turns: int = 2) -> None:
        self.balances = dict(balances or {})
        self.credited = dict(self.balances)
        self.holds: dict[str, Hold] = {}
        self.amounts: list[int] = []
        self.rows: list[UsageRow] = []
        self.settled: list[str] = []
        self.checkpoints: list[tuple[UsageRow, ...]] = []
        self.problem: Exception | None = None
        self._turns = turns

    def hold(self, hold: Hold) -> Awaitable[None]:
        def commit() -> None:
            available = self.balances.get(hold.account, 0) - self._held(hold.account)
            if available < hold.amount:
                raise InsufficientFunds(hold.amount, available)
            self.holds[hold.id] = hold
            self.amounts.append(hold.amount)

        return self._submit(commit)

    def checkpoint(self, hold_id: str, rows: Sequence[UsageRow]) -> None:
        self.checkpoints.append(tuple(rows))

    def settle(self, hold_id: str, rows: Sequence[UsageRow]) -> Awaitable[Settlement]:
        def commit() -> Settlement:
            hold = self.holds.pop(hold_id)
            posting = post(rows, hold.amount)
            before = self.balances[hold.account]
            self.balances[hold.account] = before - posting.charge
            for credit in posting.credits:
                self.balances[credit.account] = self.balances.get(credit.account, 0) + credit.amount
            self.rows += posting.rows
            self.settled.append(hold_id)
            return Settlement(
                price=NanoUSD(posting.charge),
                balance_before=NanoUSD(before),
                balance_after=NanoUSD(before - posting.charge),
            )

        return self._submit(commit)

    def balance(self, account: str) -> Awaitable[Balance | None]:
        def read() -> Balance | None:
            if account not in self.balances:
                return None
            open_holds = sum(1 for hold in self.holds.values() if hold.account == account)
            held = self._held(account)
            return Balance(account=account, balance=self.balances[account], held=held, open_holds=open_holds)

        return self._submit(read)

    def ping(self) -> Awaitable[None]:
        return self._submit(lambda: None)

    def fail(self) -> None:
        """Nothing is recorded from now on, until `problem` is None again."""
        self.problem = LedgerUnavailable("The ledger is out.")

    def assert_balanced(self) -> None:
        """Nothing is held, and what was paid is where it belongs."""
        assert self.holds == {}
        assert sum(self.balances.values()) == sum(self.credited.values())

    def _held(self, account: str) -> int:
        return sum(hold.amount for hold in self.holds.values() if hold.account == account)

    def _submit(self, operation: Callable[[], Any]) -> Awaitable[Any]:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()

        def turn(left: int) -> None:
            if left:
                loop.call_soon(turn, left - 1)
                return
            try:
                if self.problem is not None:
                    raise self.problem
                outcome = operation()
            except Exception as error:
                if not future.done():
                    future.set_exception(error)
            else:
                if not future.done():
                    future.set_result(outcome)

        loop.call_soon(turn, self._turns)
        return future
