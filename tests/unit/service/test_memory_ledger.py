"""The tests' ledger keeps the promises of the real one, so that what holds with it holds with that."""

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from msgspec import structs
from tests.support.memory_ledger import MemoryLedger

from headgate.core.accounts import Balance, Hold, UsageRow
from headgate.core.errors import InsufficientFunds
from headgate.core.money import NanoUSD
from headgate.core.ports import Ledger
from headgate.stores.accounts import SqliteAccounts
from headgate.stores.database import open_database
from headgate.stores.ledger import SqliteLedger

ROW = UsageRow(request_id="r", dialect="openai", model="fast", provider="acme")


def hold(id: str = "h1", amount: int = 100, account: str = "ann") -> Hold:
    return Hold(id=id, account=account, amount=NanoUSD(amount), created_ms=1, rows=(ROW,))


def priced(price: int, cost: int = 0) -> UsageRow:
    return structs.replace(ROW, price=price, cost=cost)


@pytest_asyncio.fixture(params=["memory", "sqlite"])
async def ledger(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Ledger]:
    if request.param == "memory":
        yield MemoryLedger({"ann": 1000})
        return
    database = open_database(tmp_path)
    SqliteAccounts(database).create("ann", NanoUSD(1000), 1)
    sqlite = SqliteLedger(database, time)
    sqlite.start()
    yield sqlite
    await sqlite.close()


async def test_a_hold_is_kept_until_it_is_settled(ledger: Ledger) -> None:
    await ledger.hold(hold(amount=400))
    assert await ledger.balance("ann") == Balance(account="ann", balance=1000, held=400, open_holds=1)
    settlement = await ledger.settle("h1", [priced(70, cost=50)])
    assert (settlement.price, settlement.balance_before, settlement.balance_after) == (70, 1000, 930)
    assert await ledger.balance("ann") == Balance(account="ann", balance=930, held=0)


async def test_a_hold_above_what_is_available_is_refused_and_changes_nothing(ledger: Ledger) -> None:
    await ledger.hold(hold(amount=600))
    with pytest.raises(InsufficientFunds) as refusal:
        await ledger.hold(hold("h2", amount=401))
    assert (refusal.value.required_nano, refusal.value.available_nano) == (401, 400)
    assert await ledger.balance("ann") == Balance(account="ann", balance=1000, held=600, open_holds=1)


async def test_a_hold_resolves_once(ledger: Ledger) -> None:
    await ledger.hold(hold())
    await ledger.settle("h1", [priced(5)])
    with pytest.raises(KeyError):
        await ledger.settle("h1", [priced(5)])


async def test_a_charge_is_capped_at_the_hold(ledger: Ledger) -> None:
    await ledger.hold(hold(amount=100))
    assert (await ledger.settle("h1", [priced(150)])).price == 100


async def test_a_cancelled_wait_does_not_undo_what_was_asked(ledger: Ledger) -> None:
    waiting = asyncio.ensure_future(ledger.hold(hold(amount=400)))
    waiting.cancel()
    balance = await ledger.balance("ann")
    assert balance is not None and balance.held == 400


async def test_an_account_that_is_not_there_has_no_balance_and_no_money(ledger: Ledger) -> None:
    assert await ledger.balance("nobody") is None
    with pytest.raises(InsufficientFunds):
        await ledger.hold(hold(account="nobody"))
