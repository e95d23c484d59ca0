from collections.abc import Callable
from typing import Any

import pytest

from headgate.core.accounts import Balance, KeyRecord
from headgate.core.errors import InvalidRequest, LedgerUnavailable, NotFound
from headgate.core.money import MAX_CREDIT, NanoUSD
from headgate.stores.accounts import SqliteAccounts
from headgate.stores.audit import audit
from headgate.stores.database import Database

Fund = Callable[[str, int], None]


def key(id: str, **fields: Any) -> KeyRecord:
    defaults = {"id": id, "digest": id.encode(), "prefix": "hg-", "account": "ann", "created_ms": 7}
    return KeyRecord(**{**defaults, **fields})


def test_an_account_starts_with_its_credit_and_credits_add_up(
    accounts: SqliteAccounts, database: Database
) -> None:
    assert accounts.create("ann", NanoUSD(5), 1) == Balance(account="ann", balance=5, held=0)
    assert accounts.create("bob", None, 1) == Balance(account="bob", balance=0, held=0)
    assert accounts.credit("ann", NanoUSD(7), 2).balance == 12
    assert accounts.balance("funding").balance == -12
    report = audit(database)
    assert report.ok and report.transfers == 2


def test_an_account_is_created_once(accounts: SqliteAccounts) -> None:
    accounts.create("ann", NanoUSD(5), 1)
    with pytest.raises(InvalidRequest, match="exists already"):
        accounts.create("ann", NanoUSD(5), 2)
    assert accounts.balance("ann").balance == 5


def test_missing_accounts_are_made_and_others_left_alone(accounts: SqliteAccounts) -> None:
    accounts.create("ann", NanoUSD(5), 1)
    accounts.ensure(["ann", "studio"], 2)
    assert (accounts.balance("ann").balance, accounts.balance("studio").balance) == (5, 0)


def test_money_and_keys_are_for_clients_only(accounts: SqliteAccounts) -> None:
    accounts.create("ann", NanoUSD(5), 1)
    for name in ("nobody", "funding"):
        with pytest.raises(NotFound):
            accounts.credit(name, NanoUSD(1), 1)
        with pytest.raises(NotFound):
            accounts.add_key(key("k1", account=name))
        with pytest.raises(NotFound):
            accounts.require_client(name)
    accounts.require_client("ann")


def test_credits_stop_before_they_leave_64_bits(accounts: SqliteAccounts, database: Database) -> None:
    accounts.create("ann", MAX_CREDIT, 1)
    for _ in range(8):
        accounts.credit("ann", MAX_CREDIT, 1)
    with pytest.raises(InvalidRequest):
        accounts.credit("ann", MAX_CREDIT, 1)
    assert accounts.balance("ann").balance == 9 * MAX_CREDIT
    assert audit(database).ok


def test_keys_are_listed_and_revoked_by_id_or_digest(accounts: SqliteAccounts) -> None:
    accounts.create("ann", None, 1)
    for id in ("k1", "k2", "k3"):
        accounts.add_key(key(id, admin=id == "k2", app="story" if id == "k3" else None))
    assert accounts.revoke_key("k1", b"?", 50) == "k1"
    assert accounts.revoke_key("?", b"k2", 60) == "k2"
    assert accounts.revoke_key("k1", b"?", 70) == "k1"
    assert accounts.keys() == (
        key("k1", revoked_ms=50),
        key("k2", admin=True, revoked_ms=60),
        key("k3", app="story"),
    )
    with pytest.raises(NotFound):
        accounts.revoke_key("k4", b"?", 80)


def test_a_revoked_token_is_forgotten_when_it_has_expired(
    accounts: SqliteAccounts, database: Database
) -> None:
    accounts.revoke_token("short", "ann", 1000, 1)
    accounts.revoke_token("long", "ann", 9000, 2)
    accounts.revoke_token("unknown", None, None, 3)
    accounts.revoke_token("long", "ann", 9000, 5000)
    with database.read() as connection:
        kept = connection.exec_driver_sql("SELECT jti FROM revoked_tokens ORDER BY jti").scalars().all()
    assert kept == ["long", "unknown"]


def test_a_busy_database_says_so(accounts: SqliteAccounts, database: Database) -> None:
    other = database.connect()
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(LedgerUnavailable, match="busy; try again"):
        accounts.create("ann", None, 1)
    other.close()
    accounts.create("ann", None, 1)
