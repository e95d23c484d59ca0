from collections.abc import Callable

from headgate.core.accounts import Hold, UsageRow
from headgate.stores.database import Database
from headgate.stores.ledger import SqliteLedger
from headgate.stores.usage import recent_usage


async def test_usage_is_listed_newest_first_by_account_and_up_to_a_limit(
    ledger: SqliteLedger,
    database: Database,
    fund: Callable[[str, int], None],
    hold: Callable[..., Hold],
    row: Callable[..., UsageRow],
) -> None:
    fund("ann", 1000)
    fund("bob", 1000)
    for number, account in enumerate(("ann", "bob", "ann")):
        await ledger.hold(hold(id=f"h{number}", account=account))
        await ledger.settle(f"h{number}", [row(request_id=f"r{number}", key_id="k", app="a", price=number)])
    assert [record.row.request_id for record in recent_usage(database)] == ["r2", "r1", "r0"]
    assert [record.row.request_id for record in recent_usage(database, "ann")] == ["r2", "r0"]
    assert [record.row.request_id for record in recent_usage(database, None, 1)] == ["r2"]
    (record,) = recent_usage(database, "bob")
    assert record.account == "bob"
    assert record.row == row(request_id="r1", key_id="k", app="a", price=1)
