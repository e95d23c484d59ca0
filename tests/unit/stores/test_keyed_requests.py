"""Requests by Idempotency-Key in the ledger: noted with the hold, kept with the settle, forgotten in time."""

import time
from collections.abc import Callable

import pytest
from tests.support.clock import ManualClock

from headgate.core.accounts import Hold, UsageRow
from headgate.core.completion import IdempotencyKey
from headgate.core.errors import IdempotencyConflict, IdempotencyMismatch, InsufficientFunds
from headgate.stores.audit import audit
from headgate.stores.database import Database
from headgate.stores.ledger import MAX_OUTCOME_BYTES, SqliteLedger

Fund = Callable[[str, int], None]
MakeHold = Callable[..., Hold]
MakeRow = Callable[..., UsageRow]
DAY = 24 * 3600


def key(name: str = "k", digest: bytes = b"d", account: str = "ann") -> IdempotencyKey:
    return IdempotencyKey(account=account, key=name, digest=digest)


async def test_what_became_of_it_is_kept_with_the_settle(
    ledger: SqliteLedger, fund: Fund, hold: MakeHold, row: MakeRow
) -> None:
    fund("ann", 1000)
    assert await ledger.remembered(key()) is None
    await ledger.hold(hold(), key())
    with pytest.raises(IdempotencyConflict):
        await ledger.remembered(key())
    settlement = await ledger.settle("h1", [row(cost=10, price=10)], outcome=b"answer")
    kept = await ledger.remembered(key())
    assert kept is not None
    assert (kept.outcome, kept.settlement) == (b"answer", settlement)
    with pytest.raises(IdempotencyMismatch):
        await ledger.remembered(key(digest=b"other"))
    assert await ledger.remembered(key(account="bob")) is None


async def test_a_twin_that_was_slower_holds_nothing(
    ledger: SqliteLedger, database: Database, fund: Fund, hold: MakeHold, row: MakeRow
) -> None:
    fund("ann", 1000)
    await ledger.hold(hold(amount=400), key())
    with pytest.raises(IdempotencyConflict):
        await ledger.hold(hold(id="h2", amount=300), key())
    balance = await ledger.balance("ann")
    assert balance is not None
    assert (balance.held, balance.open_holds) == (400, 1)
    await ledger.settle("h1", [row(cost=1, price=1)], outcome=b"x")
    with pytest.raises(IdempotencyConflict):
        await ledger.hold(hold(id="h3", amount=300), key())
    assert audit(database).ok


async def test_one_that_came_to_nothing_is_forgotten(
    ledger: SqliteLedger, fund: Fund, hold: MakeHold, row: MakeRow
) -> None:
    fund("ann", 1000)
    await ledger.hold(hold(), key())
    await ledger.settle("h1", [row(error="upstream_failed")])
    assert await ledger.remembered(key()) is None
    with pytest.raises(InsufficientFunds):
        await ledger.hold(hold(id="h2", amount=5000), key())
    assert await ledger.remembered(key()) is None
    await ledger.hold(hold(id="h3"), key(digest=b"other"))


async def test_one_that_was_charged_without_an_answer_is_remembered_as_such(
    ledger: SqliteLedger, fund: Fund, hold: MakeHold, row: MakeRow
) -> None:
    fund("ann", 1000)
    for number, outcome in enumerate((None, b"x" * (MAX_OUTCOME_BYTES + 1))):
        name = f"k{number}"
        await ledger.hold(hold(id=name), key(name))
        await ledger.settle(name, [row(cost=5, price=5)], outcome=outcome)
        kept = await ledger.remembered(key(name))
        assert kept is not None
        assert (kept.outcome, kept.settlement.price) == (None, 5)


async def test_after_a_crash_what_was_under_way_is_charged_or_free_again(
    database: Database, fund: Fund, hold: MakeHold, row: MakeRow
) -> None:
    fund("ann", 1000)
    before = SqliteLedger(database, time)
    before.start()
    for name in ("talking", "mute"):
        await before.hold(hold(id=name), key(name))
    before.checkpoint("talking", [row(cost=7, price=7)])
    await before.close()
    after = SqliteLedger(database, time)
    after.start()
    await after.recover()
    kept = await after.remembered(key("talking"))
    assert kept is not None
    assert (kept.outcome, kept.settlement.price) == (None, 7)
    assert await after.remembered(key("mute")) is None
    await after.close()


async def test_a_day_later_the_key_is_free_and_nothing_is_left_of_it(
    database: Database, fund: Fund, hold: MakeHold, row: MakeRow
) -> None:
    fund("ann", 1000)
    clock = ManualClock()
    ledger = SqliteLedger(database, clock)
    ledger.start()
    for name in ("old", "young"):
        await ledger.hold(hold(id=name), key(name))
        await ledger.settle(name, [row(cost=1, price=1)], outcome=b"answer")
        clock.advance(DAY / 2)
    clock.advance(1)
    assert await ledger.remembered(key("old")) is None
    assert await ledger.remembered(key("young")) is not None
    await ledger.hold(hold(id="again"), key("old", b"another body"))
    await ledger.settle("again", [row()])
    await ledger.close()
    with database.read() as connection:
        names = connection.exec_driver_sql("SELECT key FROM idempotency").scalars().all()
    assert names == ["young"]
