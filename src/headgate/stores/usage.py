"""Reading usage rows back."""

from sqlalchemy import select

from headgate.core.accounts import UsageRecord, UsageRow
from headgate.stores.database import Database
from headgate.stores.schema import usage


def recent_usage(
    database: Database, account: str | None = None, limit: int | None = None
) -> tuple[UsageRecord, ...]:
    """Usage rows, newest first; `account` None: everybody's, `limit` None: all. LedgerUnavailable."""
    if account is None:
        # Rows are inserted as they are settled: the order of ids is that of time, and needs no index.
        query = select(usage).order_by(usage.c.id.desc())
    else:
        query = (
            select(usage)
            .where(usage.c.account == account)
            .order_by(usage.c.created.desc(), usage.c.id.desc())
        )
    with database.read() as connection:
        return tuple(
            UsageRecord(
                account=row["account"],
                created_ms=row["created"],
                row=UsageRow(
                    **{name: row[name] for name in UsageRow.__struct_fields__ if name != "stream"},
                    stream=bool(row["stream"]),
                ),
            )
            for row in connection.execute(query.limit(limit)).mappings()
        )
