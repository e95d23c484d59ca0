"""A ledger in memory that commits after a known number of turns of the event loop: every race can be replayed."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from headgate.core.accounts import Balance, Hold, Kept, Settlement, UsageRow
from headgate.core.completion import IdempotencyKey
from headgate.core.errors import (
    IdempotencyConflict,
    IdempotencyMismatch,
    InsufficientFunds,
    LedgerUnavailable,
)
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
        self.keyed: dict[tuple[str, str], tuple[bytes, str | Kept]] = {}
        self.rows: list[UsageRow] = []
        self.settled: list[str] = []
        self.checkpoints: list[tuple[UsageRow, ...]] = []
        self.problem: Exception | None = None
        self._turns = turns

    def remembered(self, key: IdempotencyKey) -> Awaitable[Kept | None]:
        def read() -> Kept | None:
            known = self.keyed.get((key.account, key.key))
            if known is None:
                return None
            digest, kept = known
            if digest != key.digest:
                raise IdempotencyMismatch("Another request.")
            if isinstance(kept, str):
                raise IdempotencyConflict("Under way.")
            return kept

        return self._submit(read)

    def hold(self, hold: Hold, key: IdempotencyKey | None = None) -> Awaitable[None]:
        def commit() -> None:
            if key is not None and (key.account, key.key) in self.keyed:
                raise IdempotencyConflict("Under way.")
            available = self.balances.get(hold.account, 0) - self._held(hold.account)
            if available < hold.amount:
                raise InsufficientFunds(hold.amount, available)
            self.holds[hold.id] = hold
            self.amounts.append(hold.amount)
            if key is not None:
                self.keyed[key.account, key.key] = (key.digest, hold.id)

        return self._submit(commit)

    def checkpoint(self, hold_id: str, rows: Sequence[UsageRow]) -> None:
        self.checkpoints.append(tuple(rows))

    def settle(
        self,
        hold_id: str,
        rows: Sequence[UsageRow],
        *,
        keyed: bool = True,
        outcome: bytes | None = None,
    ) -> Awaitable[Settlement]:
        def commit() -> Settlement:
            hold = self.holds.pop(hold_id)
            posting = post(rows, hold.amount)
            before = self.balances[hold.account]
            self.balances[hold.account] = before - posting.charge
            for credit in posting.credits:
                self.balances[credit.account] = self.balances.get(credit.account, 0) + credit.amount
            self.rows += posting.rows
            self.settled.append(hold_id)
            settlement = Settlement(
                price=NanoUSD(posting.charge),
                balance_before=NanoUSD(before),
                balance_after=NanoUSD(before - posting.charge),
            )
            for name, (digest, state) in list(self.keyed.items()):
                if state == hold_id and outcome is None and not posting.charge:
                    del self.keyed[name]
                elif state == hold_id:
                    self.keyed[name] = (digest, Kept(outcome=outcome, settlement=settlement))
            return settlement

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
