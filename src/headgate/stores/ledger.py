"""The ledger on SQLite: holds, settles and checkpoints as operations of the writer thread."""

import asyncio
import sqlite3
from collections.abc import Awaitable, Sequence
from functools import partial

import msgspec
import structlog
from msgspec import Struct, structs

from headgate.core.accounts import Balance, Hold, Kept, Settlement, UsageRow
from headgate.core.completion import IdempotencyKey
from headgate.core.errors import (
    IdempotencyConflict,
    IdempotencyMismatch,
    InsufficientFunds,
    InternalError,
)
from headgate.core.money import NanoUSD
from headgate.core.ports import Clock
from headgate.stores import statements
from headgate.stores.database import Database
from headgate.stores.posting import Posting, post
from headgate.stores.writer import CAPACITY, Writer

log = structlog.get_logger("headgate.ledger")

MAX_INTEGER = 2**63 - 1
KEPT_MS = 24 * 3600 * 1000
"""How long an outcome is kept, from the request's beginning."""
MAX_OUTCOME_BYTES = 1024 * 1024
KEY_HEADER = "Idempotency-Key"
NOTHING_SETTLED = Settlement(price=NanoUSD(0), balance_before=NanoUSD(0), balance_after=NanoUSD(0))
RECOVERY_BATCH = 256

COUNTS = ("prompt_tokens", "cached_tokens", "completion_tokens")
UNREADABLE = UsageRow(
    request_id="unknown", dialect="unknown", model="unknown", provider="unknown", error="interrupted"
)
"""The usage row of a request of which only the hold is known; the hold's id and account stand beside it."""

_rows_encoder = msgspec.json.Encoder()
_kept_encoder = msgspec.msgpack.Encoder()
_kept_decoder = msgspec.msgpack.Decoder(Kept)
_rows_decoder = msgspec.json.Decoder(tuple[UsageRow, ...])


class Recovery(Struct, frozen=True, kw_only=True):
    """What a start found: holds charged by their checkpoint, holds released, and the sum charged (nano-USD).

    `left` are holds that could not even be released; they stay open, and `ledger check` shows them.
    """

    charged: int
    released: int
    charge: int
    left: int = 0


class SqliteLedger:
    """core.ports.Ledger. `start` it on the event loop that uses it, `close` it on the same one."""

    def __init__(self, database: Database, clock: Clock, *, capacity: int = CAPACITY) -> None:
        self._clock = clock
        self._writer = Writer(database, capacity=capacity)

    def start(self) -> None:
        """Start the writer thread."""
        self._writer.start()

    def remembered(self, key: IdempotencyKey) -> Awaitable[Kept | None]:
        return self._writer.submit(partial(_remembered, key, self._now()))

    def hold(self, hold: Hold, key: IdempotencyKey | None = None) -> Awaitable[None]:
        if key is None:
            return self._writer.submit(partial(_hold, hold))
        return self._writer.submit(partial(_hold_keyed, hold, key, self._now()))

    def checkpoint(self, hold_id: str, rows: Sequence[UsageRow]) -> None:
        self._writer.post(partial(_checkpoint, hold_id, tuple(rows)))

    def settle(
        self,
        hold_id: str,
        rows: Sequence[UsageRow],
        *,
        keyed: bool = True,
        outcome: bytes | None = None,
    ) -> Awaitable[Settlement]:
        # Urgent: there is one for each admitted hold, so a full queue must not keep money held.
        operation = partial(_settle, hold_id, tuple(rows), self._now(), keyed, outcome)
        return self._writer.submit(operation, urgent=True)

    def balance(self, account: str) -> Awaitable[Balance | None]:
        return self._writer.submit(partial(_balance, account))

    def ping(self) -> Awaitable[None]:
        # After an outage only a write shows whether it is over: a full disk can still be read.
        return self._writer.submit(_probe if self._writer.failing else _ping)

    async def recover(self) -> Recovery:
        """Resolve what a former process left open: charge each hold's last checkpoint, release the others.

        To be called under the data folder's lock, before anything is served. No single hold keeps a server from
        starting: one whose rows cannot be read or charged is logged and released, its usage kept as far as it can
        be. LedgerUnavailable when the database as a whole is in trouble.
        """
        open_holds: list[tuple[str, bytes]] = await self._writer.submit(_open_holds)
        outcomes: list[Settlement | None] = []
        for start in range(0, len(open_holds), RECOVERY_BATCH):
            batch = open_holds[start : start + RECOVERY_BATCH]
            outcomes += await asyncio.gather(*(self._resolve(hold_id, rows) for hold_id, rows in batch))
        settlements = [outcome for outcome in outcomes if outcome is not None]
        charged = sum(1 for settlement in settlements if settlement.price)
        recovery = Recovery(
            charged=charged,
            released=len(settlements) - charged,
            charge=sum(settlement.price for settlement in settlements),
            left=len(outcomes) - len(settlements),
        )
        await self._writer.submit(partial(_forget_lost, self._now()))
        if outcomes:
            log.warning("resolved holds of a former process", **structs.asdict(recovery))
        return recovery

    async def close(self) -> None:
        """Commit what is queued and close the database. Later calls get LedgerUnavailable."""
        await self._writer.close()

    async def _resolve(self, hold_id: str, stored: bytes) -> Settlement | None:
        """Charge the stored rows; failing that record them uncharged; failing that release with a bare row."""
        rows = _stored_rows(hold_id, stored)
        for attempt in (rows, tuple(map(_uncharged, rows)), (UNREADABLE,)):
            try:
                return await self.settle(hold_id, attempt)
            except InternalError:
                log.error("a hold of a former process cannot be settled like this", hold=hold_id)
        log.error("a hold of a former process stays open", hold=hold_id)
        return None

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


def _hold_keyed(
    hold: Hold, key: IdempotencyKey, now: int, cursor: sqlite3.Cursor
) -> InsufficientFunds | IdempotencyConflict | None:
    refusal = _hold(hold, cursor)
    if refusal is not None:
        return refusal
    cursor.execute(statements.FORGET_EXPIRED, (now,))
    known = (key.account, key.key, key.digest, hold.id, now + KEPT_MS, now)
    cursor.execute(statements.REMEMBER, known)
    if cursor.rowcount == 1:
        return None
    # A twin was faster: give back what was just held.
    cursor.execute(statements.TAKE_HOLD, (hold.id,))
    cursor.execute(statements.PAY, (0, min(hold.amount, MAX_INTEGER), hold.account))
    return under_way()


def _remembered(
    key: IdempotencyKey, now: int, cursor: sqlite3.Cursor
) -> Kept | IdempotencyMismatch | IdempotencyConflict | None:
    row = cursor.execute(statements.REMEMBERED, (key.account, key.key, now)).fetchone()
    if row is None:
        return None
    digest, hold_id, kept = row
    if digest != key.digest:
        return IdempotencyMismatch("The Idempotency-Key was used for another request.", param=KEY_HEADER)
    if hold_id is not None:
        return under_way()
    try:
        return _kept_decoder.decode(kept)
    except (msgspec.DecodeError, TypeError):
        log.exception("what is kept of a keyed request cannot be read", account=key.account)
        return Kept(outcome=None, settlement=NOTHING_SETTLED)


def _forget_lost(now: int, cursor: sqlite3.Cursor) -> None:
    """What expired, and what was under way in a process that is gone."""
    cursor.execute(statements.FORGET_EXPIRED, (now,))
    cursor.execute(statements.FORGET_LOST)


def under_way() -> IdempotencyConflict:
    return IdempotencyConflict("A request with this Idempotency-Key is under way.", param=KEY_HEADER)


def _checkpoint(hold_id: str, rows: tuple[UsageRow, ...], cursor: sqlite3.Cursor) -> None:
    cursor.execute(statements.CHECKPOINT, (_rows_encoder.encode(rows), hold_id))


def _settle(
    hold_id: str,
    rows: tuple[UsageRow, ...],
    now: int,
    keyed: bool,
    outcome: bytes | None,
    cursor: sqlite3.Cursor,
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
    settlement = Settlement(
        price=NanoUSD(posting.charge),
        balance_before=NanoUSD(balance + posting.charge),
        balance_after=NanoUSD(balance),
    )
    if keyed and outcome is None and not posting.charge:
        cursor.execute(statements.FORGET, (hold_id,))
    elif keyed:
        kept = Kept(
            outcome=outcome if len(outcome or b"") <= MAX_OUTCOME_BYTES else None, settlement=settlement
        )
        cursor.execute(statements.KEEP, (_kept_encoder.encode(kept), hold_id))
    return settlement


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


def _probe(cursor: sqlite3.Cursor) -> None:
    for change in (1, -1):
        cursor.execute(statements.PROBE, (change,))


def _open_holds(cursor: sqlite3.Cursor) -> list[tuple[str, bytes]]:
    return cursor.execute(statements.OPEN_HOLDS).fetchall()


def _stored_rows(hold_id: str, stored: bytes) -> tuple[UsageRow, ...]:
    try:
        return _rows_decoder.decode(stored)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        # Another version's rows, or damaged ones. Nobody can say what to charge, so nothing is.
        log.exception("a hold's checkpoint cannot be read; releasing it", hold=hold_id)
        return (UNREADABLE,)


def _uncharged(row: UsageRow) -> UsageRow:
    """The row without money, its counts kept where the database can hold them."""
    counts = {name: min(getattr(row, name), MAX_INTEGER) for name in COUNTS}
    return structs.replace(row, cost=0, price=0, excess=0, developer_share=0, **counts)
