"""The ledger on SQLite: holds, settles and checkpoints as operations of the writer thread."""

import asyncio
import sqlite3
from collections.abc import Awaitable, Sequence
from functools import partial

import msgspec
import structlog
from msgspec import Struct, structs

from headgate.core.accounts import Balance, Hold, Settlement, UsageRow
from headgate.core.errors import InsufficientFunds
from headgate.core.money import NanoUSD
from headgate.core.ports import Clock
from headgate.stores import statements
from headgate.stores.database import Database
from headgate.stores.posting import Posting, post
from headgate.stores.writer import CAPACITY, Writer

log = structlog.get_logger("headgate.ledger")

MAX_INTEGER = 2**63 - 1
RECOVERY_BATCH = 256

_rows_encoder = msgspec.json.Encoder()
_rows_decoder = msgspec.json.Decoder(tuple[UsageRow, ...])


class Recovery(Struct, frozen=True, kw_only=True):
    """What a start found: holds charged by their checkpoint, holds released, and the sum charged (nano-USD)."""

    charged: int
    released: int
    charge: int


class SqliteLedger:
    """core.ports.Ledger. `start` it on the event loop that uses it, `close` it on the same one."""

    def __init__(self, database: Database, clock: Clock, *, capacity: int = CAPACITY) -> None:
        self._clock = clock
        self._writer = Writer(database.connect, capacity=capacity)

    def start(self) -> None:
        """Start the writer thread."""
        self._writer.start()

    def hold(self, hold: Hold) -> Awaitable[None]:
        return self._writer.submit(partial(_hold, hold))

    def checkpoint(self, hold_id: str, rows: Sequence[UsageRow]) -> None:
        self._writer.post(partial(_checkpoint, hold_id, tuple(rows)))

    def settle(self, hold_id: str, rows: Sequence[UsageRow]) -> Awaitable[Settlement]:
        # Urgent: there is one for each admitted hold, so a full queue must not keep money held.
        return self._writer.submit(partial(_settle, hold_id, tuple(rows), self._now()), urgent=True)

    def balance(self, account: str) -> Awaitable[Balance | None]:
        return self._writer.submit(partial(_balance, account))

    def ping(self) -> Awaitable[None]:
        return self._writer.submit(_ping)

    async def recover(self) -> Recovery:
        """Resolve what a former process left open: charge each hold's last checkpoint, release the others.

        To be called under the data folder's lock, before anything is served.
        """
        open_holds: list[tuple[str, bytes]] = await self._writer.submit(_open_holds)
        settlements: list[Settlement] = []
        for start in range(0, len(open_holds), RECOVERY_BATCH):
            batch = open_holds[start : start + RECOVERY_BATCH]
            settlements += await asyncio.gather(
                *(self.settle(hold_id, _stored_rows(hold_id, rows)) for hold_id, rows in batch)
            )
        charged = sum(1 for settlement in settlements if settlement.price)
        recovery = Recovery(
            charged=charged,
            released=len(settlements) - charged,
            charge=sum(settlement.price for settlement in settlements),
        )
        if settlements:
            log.warning("resolved holds of a former process", **structs.asdict(recovery))
        return recovery

    async def close(self) -> None:
        """Commit what is queued and close the database. Later calls get LedgerUnavailable."""
        await self._writer.close()

    def _now(self) -> int:
        return int(self._clock.time() * 1000)


def _hold(hold: Hold, cursor: sqlite3.Cursor) -> InsufficientFunds | None:
    # What does not fit into 64 bits is more than anybody has.
    amount = min(hold.amount, MAX_INTEGER)
    cursor.execute(statements.RESERVE, (amount, hold.account, amount))
    if cursor.rowcount != 1:
        row = cursor.execute(statements.AVAILABLE, (hold.account,)).fetchone()
        return InsufficientFunds(hold.amount, row[0] if row else 0)
    rows = _rows_encoder.encode(hold.rows)
    cursor.execute(statements.OPEN_HOLD, (hold.id, hold.account, amount, hold.created_ms, rows))
    return None


def _checkpoint(hold_id: str, rows: tuple[UsageRow, ...], cursor: sqlite3.Cursor) -> None:
    cursor.execute(statements.CHECKPOINT, (_rows_encoder.encode(rows), hold_id))


def _settle(
    hold_id: str, rows: tuple[UsageRow, ...], now: int, cursor: sqlite3.Cursor
) -> Settlement | KeyError:
    held = cursor.execute(statements.TAKE_HOLD, (hold_id,)).fetchone()
    if held is None:
        return KeyError(hold_id)
    account, amount = held
    posting = post(rows, amount)
    (balance,) = cursor.execute(statements.PAY, (posting.charge, amount, account)).fetchone()
    transfer = _transfer(hold_id, account, posting, now, cursor) if posting.charge else None
    for row in posting.rows:
        cursor.execute(statements.USAGE, (hold_id, account, amount, transfer, now, *structs.astuple(row)))
    return Settlement(
        price=NanoUSD(posting.charge),
        balance_before=NanoUSD(balance + posting.charge),
        balance_after=NanoUSD(balance),
    )


def _transfer(hold_id: str, account: str, posting: Posting, now: int, cursor: sqlite3.Cursor) -> int | None:
    cursor.execute(statements.TRANSFER, (hold_id, now))
    transfer = cursor.lastrowid
    cursor.execute(statements.ENTRY, (transfer, account, -posting.charge))
    for credit in posting.credits:
        cursor.execute(statements.RECEIVE, (credit.account, credit.amount, credit.kind, now))
        cursor.execute(statements.ENTRY, (transfer, credit.account, credit.amount))
    return transfer


def _balance(account: str, cursor: sqlite3.Cursor) -> Balance | None:
    row = cursor.execute(statements.BALANCE, (account,)).fetchone()
    if row is None:
        return None
    return Balance(account=account, balance=row[0], held=row[1], open_holds=row[2])


def _ping(cursor: sqlite3.Cursor) -> None:
    cursor.execute(statements.PING, ("",)).fetchone()


def _open_holds(cursor: sqlite3.Cursor) -> list[tuple[str, bytes]]:
    return cursor.execute(statements.OPEN_HOLDS).fetchall()


def _stored_rows(hold_id: str, stored: bytes) -> tuple[UsageRow, ...]:
    try:
        return _rows_decoder.decode(stored)
    except msgspec.DecodeError:
        # Another version's rows. Nobody can say what to charge, so nothing is.
        log.exception("a hold's checkpoint cannot be read; releasing it", hold=hold_id)
        return ()
