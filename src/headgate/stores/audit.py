"""`headgate ledger check`: proves the books from the entries up, in one read transaction beside a running server."""

from collections.abc import Callable, Iterator

from sqlalchemy import Connection, func, outerjoin, select

from headgate.core.accounts import LedgerReport
from headgate.stores.database import Database
from headgate.stores.schema import accounts, entries, holds, transfers, usage

MAX_PROBLEMS = 100
"""Of each kind; books that broken need no longer list."""

Check = Callable[[Connection], Iterator[str]]


def audit(database: Database) -> LedgerReport:
    """Check every rule of the ledger. LedgerUnavailable when the database cannot be read."""
    with database.read() as connection:
        counted = connection.execute(
            select(
                select(func.count()).select_from(transfers).scalar_subquery(),
                select(func.count()).select_from(holds).scalar_subquery(),
                select(func.coalesce(func.sum(holds.c.amount), 0)).scalar_subquery(),
            )
        ).one()
        problems = [
            problem
            for check in (
                _transfers_sum_to_zero,
                _balances_equal_entries,
                _held_equals_open_holds,
                _settles_equal_usage,
                _charges_are_posted,
                _references_exist,
            )
            for problem in check(connection)
        ]
    return LedgerReport(
        transfers=counted[0], open_holds=counted[1], held=counted[2], problems=tuple(problems)
    )


def _transfers_sum_to_zero(connection: Connection) -> Iterator[str]:
    total = func.coalesce(func.sum(entries.c.amount), 0)
    count = func.count(entries.c.id)
    query = (
        select(transfers.c.id, total, count)
        .select_from(outerjoin(transfers, entries))
        .group_by(transfers.c.id)
        .having((total != 0) | (count < 2))
        .limit(MAX_PROBLEMS)
    )
    for transfer, amount, number in connection.execute(query):
        if amount:
            yield f"transfer {transfer}: its entries sum to {amount} instead of 0"
        else:
            yield f"transfer {transfer}: it has {number} entries, which moves nothing"


def _balances_equal_entries(connection: Connection) -> Iterator[str]:
    posted = (
        select(entries.c.account, func.sum(entries.c.amount).label("amount"))
        .group_by(entries.c.account)
        .subquery()
    )
    amount = func.coalesce(posted.c.amount, 0)
    query = (
        select(accounts.c.name, accounts.c.balance, amount)
        .select_from(outerjoin(accounts, posted, accounts.c.name == posted.c.account))
        .where(accounts.c.balance != amount)
        .limit(MAX_PROBLEMS)
    )
    for name, balance, total in connection.execute(query):
        yield f"account {name}: its balance is {balance}, its entries sum to {total}"


def _held_equals_open_holds(connection: Connection) -> Iterator[str]:
    opened = (
        select(holds.c.account, func.sum(holds.c.amount).label("amount")).group_by(holds.c.account).subquery()
    )
    amount = func.coalesce(opened.c.amount, 0)
    query = (
        select(accounts.c.name, accounts.c.held, amount)
        .select_from(outerjoin(accounts, opened, accounts.c.name == opened.c.account))
        .where((accounts.c.held != amount) | (accounts.c.held < 0))
        .limit(MAX_PROBLEMS)
    )
    for name, held, total in connection.execute(query):
        if held < 0:
            yield f"account {name}: held is negative: {held}"
        if held != total:
            yield f"account {name}: held is {held}, its open holds sum to {total}"


def _settles_equal_usage(connection: Connection) -> Iterator[str]:
    """Every settle has an entry that takes from the payer just what its usage rows say was charged."""
    used = (
        select(usage.c.transfer_id, usage.c.account, func.sum(usage.c.price).label("price"))
        .group_by(usage.c.transfer_id, usage.c.account)
        .subquery()
    )
    paid = (
        select(entries.c.transfer_id, entries.c.account, entries.c.amount)
        .where(entries.c.amount < 0)
        .subquery()
    )
    on_transfer = outerjoin(transfers, used, transfers.c.id == used.c.transfer_id)
    query = (
        select(transfers.c.id, used.c.account, used.c.price)
        .select_from(
            outerjoin(
                on_transfer,
                paid,
                (paid.c.transfer_id == used.c.transfer_id)
                & (paid.c.account == used.c.account)
                & (paid.c.amount == -used.c.price),
            )
        )
        .where(transfers.c.kind == "settle", paid.c.transfer_id.is_(None))
        .limit(MAX_PROBLEMS)
    )
    for transfer, account, price in connection.execute(query):
        if account is None:
            yield f"transfer {transfer}: it has no usage rows"
        else:
            yield f"transfer {transfer}: its usage rows charge {price} to {account}, its entries do not"


def _charges_are_posted(connection: Connection) -> Iterator[str]:
    query = (
        select(usage.c.id, usage.c.account, usage.c.price)
        .where(usage.c.transfer_id.is_(None), usage.c.price != 0)
        .limit(MAX_PROBLEMS)
    )
    for row, account, price in connection.execute(query):
        yield f"usage row {row}: it charges {price} to {account} without a transfer"


def _references_exist(connection: Connection) -> Iterator[str]:
    for table, row, parent, _ in connection.exec_driver_sql("PRAGMA foreign_key_check").fetchmany(
        MAX_PROBLEMS
    ):
        yield f"{table} row {row}: it names something that is not in {parent}"
