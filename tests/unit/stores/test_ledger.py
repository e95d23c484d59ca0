import asyncio
import resource
import sqlite3
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from headgate.core.accounts import Balance, Hold, UsageRow
from headgate.core.errors import InsufficientFunds, InternalError, LedgerUnavailable
from headgate.core.money import NanoUSD
from headgate.stores.accounts import SqliteAccounts
from headgate.stores.audit import audit
from headgate.stores.database import Database, open_database
from headgate.stores.ledger import Recovery, SqliteLedger
from headgate.stores.usage import recent_usage

Fund = Callable[[str, int], None]
MakeHold = Callable[..., Hold]
MakeRow = Callable[..., UsageRow]


def books_are_right(database: Database) -> bool:
    report = audit(database)
    assert report.problems == ()
    return report.ok


async def test_hold_and_settle_charge_the_price_and_free_the_rest(
    ledger: SqliteLedger, database: Database, fund: Fund, hold: MakeHold, row: MakeRow
) -> None:
    fund("ann", 1000)
    await ledger.hold(hold(amount=400))
    assert await ledger.balance("ann") == Balance(account="ann", balance=1000, held=400, open_holds=1)
    used = row(cost=70, price=100, developer="studio", developer_share=20, stream=True, user="u")
    settlement = await ledger.settle("h1", [used])
    assert (settlement.price, settlement.balance_before, settlement.balance_after) == (100, 1000, 900)
    assert await ledger.balance("ann") == Balance(account="ann", balance=900, held=0)
    for account, balance in (("provider:acme", 70), ("studio", 20), ("platform", 10), ("funding", -1000)):
        assert await ledger.balance(account) == Balance(account=account, balance=balance, held=0)
    (record,) = recent_usage(database)
    assert (record.account, record.row) == ("ann", used)
    assert books_are_right(database)


async def test_a_developer_who_pays_for_its_own_request_sees_before_equal_after_plus_price(
    ledger: SqliteLedger, database: Database, fund: Fund, hold: MakeHold, row: MakeRow
) -> None:
    fund("ann", 1000)
    await ledger.hold(hold())
    settlement = await ledger.settle("h1", [row(cost=50, price=100, developer="ann", developer_share=50)])
    assert (settlement.balance_before, settlement.balance_after) == (1000, 900)
    assert await ledger.balance("ann") == Balance(account="ann", balance=950, held=0)
    assert books_are_right(database)


async def test_a_price_of_zero_releases_and_still_records_usage(
    ledger: SqliteLedger, database: Database, fund: Fund, hold: MakeHold, row: MakeRow
) -> None:
    fund("ann", 1000)
    await ledger.hold(hold())
    settlement = await ledger.settle("h1", [row(error="upstream_failed"), row(error="upstream_timeout")])
    assert (settlement.price, settlement.balance_before, settlement.balance_after) == (0, 1000, 1000)
    assert await ledger.balance("ann") == Balance(account="ann", balance=1000, held=0)
    errors = [record.row.error for record in recent_usage(database)]
    assert errors == ["upstream_timeout", "upstream_failed"]
    assert audit(database).transfers == 1  # the credit


async def test_a_charge_above_the_hold_is_capped_and_the_excess_recorded(
    ledger: SqliteLedger, database: Database, fund: Fund, hold: MakeHold, row: MakeRow
) -> None:
    fund("ann", 100)
    await ledger.hold(hold(amount=100))
    settlement = await ledger.settle("h1", [row(cost=120, price=150)])
    assert (settlement.price, settlement.balance_after) == (100, 0)
    (record,) = recent_usage(database)
    assert (record.row.price, record.row.excess) == (100, 50)
    assert books_are_right(database)


async def test_a_hold_resolves_once(
    ledger: SqliteLedger, database: Database, fund: Fund, hold: MakeHold, row: MakeRow
) -> None:
    fund("ann", 1000)
    await ledger.hold(hold())
    racing = [ledger.settle("h1", [row(price=10)]) for _ in range(5)]
    outcomes = await asyncio.gather(*racing, return_exceptions=True)
    assert [type(outcome).__name__ for outcome in outcomes] == ["Settlement"] + ["KeyError"] * 4
    balance = await ledger.balance("ann")
    assert balance is not None and (balance.balance, balance.held) == (990, 0)
    assert len(recent_usage(database)) == 1


async def test_an_unknown_account_has_no_funds_and_no_balance(ledger: SqliteLedger, hold: MakeHold) -> None:
    with pytest.raises(InsufficientFunds) as refusal:
        await ledger.hold(hold(account="nobody"))
    assert (refusal.value.required_nano, refusal.value.available_nano) == (100, 0)
    assert await ledger.balance("nobody") is None


async def test_more_than_64_bits_is_just_too_much(ledger: SqliteLedger, fund: Fund, hold: MakeHold) -> None:
    fund("ann", 1000)
    with pytest.raises(InsufficientFunds) as refusal:
        await ledger.hold(hold(amount=10**30))
    assert (refusal.value.required_nano, refusal.value.available_nano) == (10**30, 1000)


@pytest.mark.parametrize("ledgers", [1, 2])
async def test_of_200_parallel_holds_on_funds_for_10_exactly_10_are_admitted(
    database: Database, fund: Fund, hold: MakeHold, ledgers: int
) -> None:
    fund("ann", 1099)
    opened = [SqliteLedger(Database(database.path, busy_timeout_s=10), time) for _ in range(ledgers)]
    for ledger in opened:
        ledger.start()
    holds = [opened[i % ledgers].hold(hold(id=f"h{i}", amount=100)) for i in range(200)]
    outcomes = await asyncio.gather(*holds, return_exceptions=True)
    assert sum(outcome is None for outcome in outcomes) == 10
    assert sum(isinstance(outcome, InsufficientFunds) for outcome in outcomes) == 190
    assert await opened[0].balance("ann") == Balance(account="ann", balance=1099, held=1000, open_holds=10)
    for ledger in opened:
        await ledger.close()
    assert books_are_right(database)


async def test_a_cancelled_wait_does_not_undo_the_hold(
    ledger: SqliteLedger, fund: Fund, hold: MakeHold, row: MakeRow
) -> None:
    fund("ann", 1000)
    waiting = asyncio.ensure_future(ledger.hold(hold()))
    waiting.cancel()
    settlement = await ledger.settle("h1", [row(error="disconnected")])
    assert settlement.price == 0
    assert waiting.cancelled()


async def test_one_broken_operation_harms_no_other_of_its_batch(
    ledger: SqliteLedger, database: Database, fund: Fund, hold: MakeHold, row: MakeRow
) -> None:
    fund("ann", 1000)
    await ledger.hold(hold(id="taken"))
    outcomes = await asyncio.gather(
        ledger.hold(hold(id="a")),
        ledger.hold(hold(id="taken")),
        ledger.settle("taken", [row(prompt_tokens=2**70)]),
        ledger.hold(hold(id="b")),
        return_exceptions=True,
    )
    assert [type(outcome) for outcome in outcomes] == [type(None), InternalError, InternalError, type(None)]
    balance = await ledger.balance("ann")
    assert balance is not None and (balance.held, balance.open_holds) == (300, 3)
    assert books_are_right(database)


async def test_a_busy_database_is_unavailable_and_then_works_again(
    ledger: SqliteLedger, database: Database, fund: Fund, hold: MakeHold, row: MakeRow
) -> None:
    fund("ann", 1000)
    await ledger.hold(hold())
    other = database.connect()
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(LedgerUnavailable):
        await ledger.settle("h1", [row(price=10)])
    with pytest.raises(LedgerUnavailable):
        await ledger.ping()
    other.execute("ROLLBACK")
    other.close()
    await ledger.ping()
    assert (await ledger.settle("h1", [row(price=10)])).price == 10


class SmallDisk(Database):
    """Connections that refuse to let the file grow beyond `pages`."""

    pages = 0

    def connect(self) -> sqlite3.Connection:
        connection = super().connect()
        connection.execute(f"PRAGMA max_page_count = {self.pages or 10**6}")
        return connection


async def test_a_full_disk_is_unavailable_and_then_works_again(
    database: Database, fund: Fund, hold: MakeHold, row: MakeRow
) -> None:
    fund("ann", 1000)
    disk = SmallDisk(database.path)
    disk.pages = 1  # SQLite takes it for "not one page more"
    ledger = SqliteLedger(disk, time)
    ledger.start()
    big = hold(rows=tuple(row(user="x" * 1000) for _ in range(200)))
    with pytest.raises(LedgerUnavailable) as failure:
        await ledger.hold(big)
    assert "full" in str(failure.value.__cause__)
    disk.pages = 0
    await ledger.hold(big)
    await ledger.close()
    assert books_are_right(database)


@contextmanager
def no_room(database: Database) -> Iterator[None]:
    """No file of this process may grow beyond the database's log; what is there can be read."""
    size = database.path.with_name(database.path.name + "-wal").stat().st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


async def test_while_nothing_can_be_written_ping_fails_though_reads_succeed(
    ledger: SqliteLedger, database: Database, fund: Fund, hold: MakeHold
) -> None:
    other = database.connect()  # keeps the log from being emptied
    fund("ann", 1000)
    await ledger.hold(hold(id="h1"))
    with no_room(database):
        await ledger.ping()  # nothing failed yet, so nothing is written to find out
        with pytest.raises(LedgerUnavailable):
            await ledger.hold(hold(id="h2"))
        for _ in range(2):
            assert await ledger.balance("ann") == Balance(account="ann", balance=1000, held=100, open_holds=1)
            with pytest.raises(LedgerUnavailable):
                await ledger.ping()
    await ledger.ping()
    with no_room(database):
        await ledger.ping()  # a write went well: it reads only
    await ledger.hold(hold(id="h2"))
    other.close()
    assert books_are_right(database)


async def test_an_outage_promises_nothing_about_charges(ledger: SqliteLedger, database: Database) -> None:
    database.path.unlink()
    with pytest.raises(LedgerUnavailable) as failure:
        await ledger.ping()
    assert failure.value.message == "The ledger is unavailable."


async def test_a_file_removed_under_a_running_server_takes_no_more_money(
    ledger: SqliteLedger, database: Database, fund: Fund, hold: MakeHold, row: MakeRow
) -> None:
    fund("ann", 1000)
    await ledger.hold(hold())
    away = database.path.with_suffix(".away")
    database.path.rename(away)
    with capture_logs() as lines:
        for refused in (ledger.hold(hold(id="h2")), ledger.settle("h1", [row(price=10)]), ledger.ping()):
            with pytest.raises(LedgerUnavailable):
                await refused
    assert "removed while in use" in lines[0]["reason"] and "restart is needed" in lines[0]["reason"]
    away.rename(database.path)
    assert (await ledger.settle("h1", [row(price=10)])).balance_after == 990
    assert books_are_right(database)


def open_files() -> set[str]:
    """What this process has open, by path."""
    found = set()
    for link in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # closed in the meantime
            found.add(str(link.readlink()))
    return found


async def test_a_removed_file_is_not_let_go(ledger: SqliteLedger, database: Database) -> None:
    await ledger.ping()
    database.path.unlink()
    for _ in range(2):
        with pytest.raises(LedgerUnavailable):
            await ledger.ping()
    # Held open it can still be rescued, and its number goes to no other file.
    assert f"{database.path} (deleted)" in open_files()


async def test_a_file_put_in_the_place_of_the_one_in_use_is_never_adopted(
    ledger: SqliteLedger,
    database: Database,
    fund: Fund,
    hold: MakeHold,
    row: MakeRow,
    replace: Callable[[], None],
) -> None:
    fund("ann", 1000)
    await ledger.hold(hold())
    replace()
    with capture_logs() as lines:
        for refused in (ledger.hold(hold(id="h2")), ledger.settle("h1", [row(price=10)]), ledger.ping()):
            with pytest.raises(LedgerUnavailable):
                await refused
    assert "replaced while in use; a restart is needed" in lines[0]["reason"]
    assert "with no headgate.db-wal and -shm" in lines[0]["reason"]
    await ledger.close()
    for end in ("-wal", "-shm"):
        database.path.with_name(database.path.name + end).unlink(missing_ok=True)
    report = audit(open_database(database.path.parent))
    assert (report.ok, report.open_holds, report.transfers) == (True, 0, 1)


async def test_a_database_that_vanished_is_unavailable(
    ledger: SqliteLedger, database: Database, hold: MakeHold
) -> None:
    other = database.connect()
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(LedgerUnavailable):
        await ledger.ping()  # the connection is gone now
    other.close()
    database.path.rename(database.path.with_suffix(".away"))
    with pytest.raises(LedgerUnavailable):
        await ledger.ping()
    database.path.with_suffix(".away").rename(database.path)
    await ledger.ping()


async def test_a_closed_ledger_is_unavailable_after_it_committed_what_was_queued(
    database: Database, fund: Fund, hold: MakeHold
) -> None:
    fund("ann", 1000)
    ledger = SqliteLedger(database, time)
    ledger.start()
    last = asyncio.ensure_future(ledger.hold(hold()))
    await ledger.close()
    await last
    for refused in (ledger.hold(hold(id="h2")), ledger.ping(), ledger.settle("h1", ())):
        with pytest.raises(LedgerUnavailable):
            await refused
    await ledger.close()
    assert audit(database).open_holds == 1


async def test_recovery_charges_the_last_checkpoint_and_releases_the_others(
    database: Database, fund: Fund, hold: MakeHold, row: MakeRow
) -> None:
    fund("ann", 1000)
    crashed = SqliteLedger(database, time)
    crashed.start()
    await asyncio.gather(*(crashed.hold(hold(id=f"h{i}")) for i in range(3)))
    crashed.checkpoint("h1", [row(price=10, error="interrupted")])
    crashed.checkpoint("h1", [row(price=30, error="interrupted")])
    crashed.checkpoint("unknown", [row(price=99)])
    await crashed.close()

    ledger = SqliteLedger(open_database(database.path.parent), time)
    ledger.start()
    assert await ledger.recover() == Recovery(charged=1, released=2, charge=30)
    assert await ledger.recover() == Recovery(charged=0, released=0, charge=0)
    assert await ledger.balance("ann") == Balance(account="ann", balance=970, held=0)
    await ledger.close()
    records = recent_usage(database)
    assert sorted(record.row.price for record in records) == [0, 0, 30]
    assert {record.row.error for record in records} == {"interrupted"}
    assert books_are_right(database)


NEEDED = b'"request_id": "r", "dialect": "openai", "model": "demo"'


@pytest.mark.parametrize(
    "stored",
    [
        pytest.param(b"{", id="cut off"),
        pytest.param(b'[{%s, "provider": "\xff"}]' % NEEDED, id="not UTF-8"),
        pytest.param(b"[{%s}]" % NEEDED, id="older"),
        pytest.param(b'[{%s, "provider": "acme", "source": "oracle"}]' % NEEDED, id="newer"),
        pytest.param(b'[{%s, "provider": "acme", "more": %s}]' % (NEEDED, b"[" * 100_000), id="deep"),
    ],
)
async def test_a_hold_whose_rows_cannot_be_read_is_released_and_leaves_a_trace(
    ledger: SqliteLedger, database: Database, fund: Fund, hold: MakeHold, row: MakeRow, stored: bytes
) -> None:
    fund("ann", 1000)
    await ledger.hold(hold(id="damaged"))
    await ledger.hold(hold(id="sound", rows=(row(price=7, error="interrupted"),)))
    with database.write() as connection:
        connection.exec_driver_sql("UPDATE holds SET rows = ? WHERE id = 'damaged'", (stored,))
    with capture_logs() as lines:
        assert await ledger.recover() == Recovery(charged=1, released=1, charge=7)
    assert "damaged" in [line.get("hold") for line in lines]
    assert await ledger.balance("ann") == Balance(account="ann", balance=993, held=0)
    bare = row(
        request_id="unknown", dialect="unknown", model="unknown", provider="unknown", error="interrupted"
    )
    (used,) = (record.row for record in recent_usage(database, "ann") if record.row.price == 0)
    assert used == bare
    assert books_are_right(database)


async def test_a_hold_that_cannot_be_charged_is_released_and_its_usage_kept(
    ledger: SqliteLedger, database: Database, fund: Fund, hold: MakeHold, row: MakeRow
) -> None:
    fund("ann", 1000)
    huge = row(price=2**70, cost=2**70, excess=2**70, prompt_tokens=2**70, completion_tokens=5)
    await ledger.hold(hold(id="huge", rows=(huge,)))
    await ledger.hold(hold(id="sound", rows=(row(price=7),)))
    with capture_logs() as lines:
        assert await ledger.recover() == Recovery(charged=1, released=1, charge=7)
    assert "huge" in [line.get("hold") for line in lines]
    assert await ledger.balance("ann") == Balance(account="ann", balance=993, held=0)
    (used,) = (record.row for record in recent_usage(database, "ann") if record.row.price == 0)
    assert used == row(prompt_tokens=2**63 - 1, completion_tokens=5)
    assert books_are_right(database)


async def test_a_hold_that_cannot_even_be_released_stays_open_and_stops_nobody(
    ledger: SqliteLedger, database: Database, fund: Fund, hold: MakeHold
) -> None:
    fund("ann", 1000)
    fund("bob", 1000)
    await ledger.hold(hold(id="stuck"))
    await ledger.hold(hold(id="sound", account="bob"))
    with database.write() as connection:
        connection.exec_driver_sql("UPDATE accounts SET held = 0 WHERE name = 'ann'")
    with capture_logs() as lines:
        assert await ledger.recover() == Recovery(charged=0, released=1, charge=0, left=1)
    assert "stuck" in [line.get("hold") for line in lines]
    assert await ledger.balance("bob") == Balance(account="bob", balance=1000, held=0)
    assert audit(database).problems == ("account ann: held is 0, its open holds sum to 100",)


KILLED = """
import asyncio, os, pathlib, signal, sys, time
from headgate.core.accounts import Hold, UsageRow
from headgate.stores.database import open_database
from headgate.stores.ledger import SqliteLedger

async def main():
    ledger = SqliteLedger(open_database(pathlib.Path(sys.argv[1])), time)
    ledger.start()
    rows = (UsageRow(request_id="r", dialect="openai", model="demo", provider="acme", price=7),)
    for id in ("with", "without"):
        await ledger.hold(Hold(id=id, account="ann", amount=100, created_ms=1, rows=()))
    ledger.checkpoint("with", rows)
    await ledger.ping()
    os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main())
"""


async def test_holds_of_a_killed_process_are_recovered(
    ledger: SqliteLedger, database: Database, fund: Fund
) -> None:
    fund("ann", 1000)
    killed = await asyncio.create_subprocess_exec(sys.executable, "-c", KILLED, str(database.path.parent))
    assert await asyncio.wait_for(killed.wait(), 60) == -9
    assert audit(database).held == 200
    assert await ledger.recover() == Recovery(charged=1, released=1, charge=7)
    assert await ledger.balance("ann") == Balance(account="ann", balance=993, held=0)
    assert books_are_right(database)


amounts = st.integers(min_value=0, max_value=2000)
requests = st.lists(
    st.tuples(
        amounts,
        st.lists(
            st.builds(
                UsageRow,
                request_id=st.just("r"),
                dialect=st.just("openai"),
                model=st.just("demo"),
                provider=st.sampled_from(["acme", "embedded"]),
                cost=amounts,
                price=amounts,
                developer=st.sampled_from([None, "studio", "ann"]),
                developer_share=amounts,
            ),
            max_size=3,
        ),
    ),
    max_size=6,
)


@given(requests)
@settings(max_examples=40, deadline=None)
def test_whatever_is_settled_the_books_balance(asked: list[tuple[int, list[UsageRow]]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        database = open_database(Path(folder))
        SqliteAccounts(database).create("ann", NanoUSD(5000), 1)
        prices = asyncio.run(settle_all(database, asked))
        assert books_are_right(database)
        assert audit(database).held == 0
        earned = sum(
            record.row.developer_share
            for record in recent_usage(database)
            if record.row.developer == "ann" and record.row.price
        )
        balance = SqliteAccounts(database).balance("ann").balance
        assert balance <= 5000 - sum(prices) + earned
        assert sum(record.row.price for record in recent_usage(database)) == sum(prices)


async def settle_all(database: Database, asked: list[tuple[int, list[UsageRow]]]) -> list[int]:
    ledger = SqliteLedger(database, time)
    ledger.start()
    prices: list[int] = []
    for number, (amount, rows) in enumerate(asked):
        hold = Hold(id=f"h{number}", account="ann", amount=NanoUSD(amount), created_ms=1, rows=())
        try:
            await ledger.hold(hold)
        except InsufficientFunds:
            continue
        settlement = await ledger.settle(hold.id, rows)
        assert settlement.balance_before == settlement.balance_after + settlement.price
        assert settlement.price == min(amount, sum(row.price for row in rows))
        prices.append(settlement.price)
    await ledger.close()
    return prices
