"""A real SQLite file per test, and shorthand for holds and usage rows."""

import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from headgate.core.accounts import Hold, UsageRow
from headgate.core.money import NanoUSD
from headgate.stores.accounts import SqliteAccounts
from headgate.stores.database import DATABASE_NAME, Database, open_database
from headgate.stores.ledger import SqliteLedger


@pytest.fixture
def database(tmp_path: Path) -> Database:
    """A fresh database; a transaction waits for another one for 0.2 s only."""
    return open_database(tmp_path / "data", busy_timeout_s=0.2)


@pytest.fixture
def replace(database: Database, tmp_path: Path) -> Callable[[], None]:
    """Put another, healthy database in the place of the one in use."""

    def put() -> None:
        SqliteAccounts(open_database(tmp_path / "other")).create("ann", NanoUSD(1000), 1)
        (tmp_path / "other" / DATABASE_NAME).replace(database.path)

    return put


@pytest.fixture
def accounts(database: Database) -> SqliteAccounts:
    return SqliteAccounts(database)


@pytest.fixture
def fund(accounts: SqliteAccounts) -> Callable[[str, int], None]:
    """Create an account with this many nano-USD."""

    def create(name: str, amount: int) -> None:
        accounts.create(name, NanoUSD(amount), 1)

    return create


@pytest_asyncio.fixture
async def ledger(database: Database) -> AsyncIterator[SqliteLedger]:
    ledger = SqliteLedger(database, time)
    ledger.start()
    yield ledger
    await ledger.close()


@pytest.fixture
def row() -> Callable[..., UsageRow]:
    def make(**fields: Any) -> UsageRow:
        defaults = {"request_id": "r1", "dialect": "openai", "model": "demo", "provider": "acme"}
        return UsageRow(**{**defaults, **fields})

    return make


@pytest.fixture
def hold(row: Callable[..., UsageRow]) -> Callable[..., Hold]:
    def make(id: str = "h1", amount: int = 100, account: str = "ann", **fields: Any) -> Hold:
        fields.setdefault("rows", (row(error="interrupted"),))
        return Hold(id=id, account=account, amount=NanoUSD(amount), created_ms=5, **fields)

    return make
