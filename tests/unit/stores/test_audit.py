import sqlite3
from collections.abc import Callable

import pytest
import pytest_asyncio

from headgate.core.accounts import Hold, LedgerReport, UsageRow
from headgate.stores.audit import audit
from headgate.stores.database import Database
from headgate.stores.ledger import SqliteLedger


@pytest_asyncio.fixture
async def books(
    ledger: SqliteLedger,
    database: Database,
    fund: Callable[[str, int], None],
    hold: Callable[..., Hold],
    row: Callable[..., UsageRow],
) -> Database:
    """A credit, a settled hold and an open one."""
    fund("ann", 1000)
    await ledger.hold(hold())
    await ledger.settle("h1", [row(cost=60, price=80), row(cost=10, price=20), row(error="timeout")])
    await ledger.hold(hold(id="h2", amount=300))
    return database


async def test_right_books_have_no_problems(books: Database) -> None:
    assert audit(books) == LedgerReport(transfers=2, open_holds=1, held=300, problems=())


@pytest.mark.parametrize(
    ("tampering", "problems"),
    [
        (
            "UPDATE entries SET amount = amount - 5 WHERE account = 'provider:acme'",
            [
                "transfer 2: its entries sum to -5",
                "account provider:acme: its balance is 70, its entries sum to 65",
            ],
        ),
        (
            "DELETE FROM entries WHERE transfer_id = 1",
            ["transfer 1: it has 0 entries", "account ann", "account funding"],
        ),
        ("UPDATE accounts SET balance = balance + 1 WHERE name = 'ann'", ["account ann: its balance is 901"]),
        (
            "UPDATE accounts SET held = 299 WHERE name = 'ann'",
            ["account ann: held is 299, its open holds sum to 300"],
        ),
        (
            "UPDATE accounts SET held = -1 WHERE name = 'platform'",
            ["account platform: held is -1", "account platform: held is negative"],
        ),
        ("DELETE FROM holds", ["account ann: held is 300, its open holds sum to 0"]),
        ("UPDATE usage SET price = 81 WHERE price = 80", ["transfer 2: its usage rows charge 101 to ann"]),
        ("UPDATE usage SET account = 'funding' WHERE price = 80", ["to ann", "to funding"]),
        ("DELETE FROM usage", ["transfer 2: it has no usage rows"]),
        (
            "UPDATE usage SET transfer_id = NULL WHERE price = 20",
            ["transfer 2: its usage rows charge 80", "usage row 2"],
        ),
        (
            "DELETE FROM accounts WHERE name = 'provider:acme'",
            ["entries row 4: it names something that is not in accounts"],
        ),
    ],
)
async def test_each_kind_of_tampering_is_found(books: Database, tampering: str, problems: list[str]) -> None:
    # Somebody with the file in hand is stopped by neither triggers nor checks.
    connection = sqlite3.connect(books.path)
    connection.execute("PRAGMA ignore_check_constraints = ON")
    for table in ("entries", "transfers"):
        for change in ("update", "delete"):
            connection.execute(f"DROP TRIGGER {table}_no_{change}")
    connection.execute(tampering)
    connection.commit()
    connection.close()
    report = audit(books)
    assert not report.ok
    assert len(report.problems) == len(problems)
    for found, expected in zip(sorted(report.problems), sorted(problems), strict=True):
        assert expected in found


async def test_the_books_can_be_checked_while_the_server_writes(
    books: Database, ledger: SqliteLedger, hold: Callable[..., Hold], row: Callable[..., UsageRow]
) -> None:
    for number in range(5):
        waiting = [ledger.hold(hold(id=f"p{number}-{i}", amount=10)) for i in range(20)]
        assert audit(books).problems == ()
        for held in waiting:
            await held
        settles = [ledger.settle(f"p{number}-{i}", [row(cost=1, price=2)]) for i in range(20)]
        assert audit(books).problems == ()
        for settled in settles:
            await settled
    assert audit(books).transfers == 2 + 100
