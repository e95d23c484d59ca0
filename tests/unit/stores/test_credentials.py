from collections.abc import AsyncIterator, Callable

import pytest
import pytest_asyncio
from structlog.testing import capture_logs

from headgate.core.accounts import KeyRecord
from headgate.core.errors import LedgerUnavailable
from headgate.stores.accounts import SqliteAccounts
from headgate.stores.credentials import SqliteAccountStore
from headgate.stores.database import Database


@pytest_asyncio.fixture
async def store(database: Database) -> AsyncIterator[SqliteAccountStore]:
    store = SqliteAccountStore(database)
    yield store
    await store.close()


async def test_a_key_is_found_until_it_is_revoked(
    store: SqliteAccountStore, accounts: SqliteAccounts
) -> None:
    accounts.create("ann", None, 1)
    record = KeyRecord(
        id="k1", digest=b"d", prefix="hg-a", account="ann", app="story", admin=True, created_ms=3
    )
    assert await store.key_by_digest(b"d") is None
    accounts.add_key(record)
    assert await store.key_by_digest(b"d") == record
    accounts.revoke_key("k1", b"", 9)
    assert await store.key_by_digest(b"d") is None


async def test_a_token_counts_for_a_clients_account_until_it_is_revoked(
    store: SqliteAccountStore, accounts: SqliteAccounts
) -> None:
    assert not await store.token_state("ann", "j1")
    accounts.create("ann", None, 1)
    assert await store.token_state("ann", "j1")
    assert await store.token_state("ann", None)
    accounts.revoke_token("j1", "ann", None, 1)
    assert not await store.token_state("ann", "j1")
    assert await store.token_state("ann", "j2")
    assert await store.token_state("ann", None)


async def test_the_ledgers_own_accounts_have_no_tokens(
    store: SqliteAccountStore, accounts: SqliteAccounts, database: Database
) -> None:
    with database.write() as connection:
        connection.exec_driver_sql("INSERT INTO accounts VALUES ('platform', 0, 0, 'internal', 0)")
    assert not await store.token_state("platform", None)


async def test_without_a_database_nobody_is_admitted_and_then_it_works_again(
    store: SqliteAccountStore, accounts: SqliteAccounts, database: Database
) -> None:
    accounts.create("ann", None, 1)
    away = database.path.with_suffix(".away")
    database.path.rename(away)
    with pytest.raises(LedgerUnavailable):
        await store.token_state("ann", None)
    away.rename(database.path)
    assert await store.token_state("ann", None)


async def test_a_file_that_is_removed_or_replaced_in_use_admits_nobody(
    store: SqliteAccountStore, accounts: SqliteAccounts, database: Database, replace: Callable[[], None]
) -> None:
    accounts.create("ann", None, 1)
    assert await store.token_state("ann", None)
    database.path.unlink()
    with capture_logs() as lines, pytest.raises(LedgerUnavailable):
        await store.token_state("ann", None)
    assert "removed while in use" in lines[0]["reason"] and "restart is needed" in lines[0]["reason"]
    replace()
    for _ in range(2):
        with pytest.raises(LedgerUnavailable):
            await store.token_state("ann", None)


async def test_a_file_that_comes_back_is_used_again(
    store: SqliteAccountStore, accounts: SqliteAccounts, database: Database
) -> None:
    accounts.create("ann", None, 1)
    assert await store.token_state("ann", None)
    away = database.path.with_suffix(".away")
    database.path.rename(away)
    with pytest.raises(LedgerUnavailable):
        await store.token_state("ann", None)
    away.rename(database.path)
    assert await store.token_state("ann", None)
