import asyncio
import sqlite3
import threading

import pytest

from headgate.core.errors import LedgerUnavailable
from headgate.stores.database import Database
from headgate.stores.writer import Writer


class Gate:
    """An operation that keeps the writer busy until it is opened."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self.open = threading.Event()

    def __call__(self, cursor: sqlite3.Cursor) -> None:
        self.entered.set()
        assert self.open.wait(30)


async def test_what_queues_up_becomes_one_transaction(database: Database) -> None:
    statements: list[str] = []

    class Traced(Database):
        def connect(self) -> sqlite3.Connection:
            connection = super().connect()
            connection.set_trace_callback(statements.append)
            return connection

    writer = Writer(Traced(database.path))
    writer.start()
    gate = Gate()
    first = writer.submit(gate)
    await asyncio.to_thread(gate.entered.wait, 30)
    rest = [writer.submit(lambda cursor: cursor.execute("SELECT 1").fetchone()) for _ in range(3)]
    gate.open.set()
    await asyncio.gather(first, *rest)
    await writer.close()
    batch = ["BEGIN IMMEDIATE", "SELECT 1", "SELECT 1", "SELECT 1", "COMMIT"]
    assert statements == ["BEGIN IMMEDIATE", "COMMIT", *batch]


async def test_a_full_queue_refuses_all_but_the_urgent(database: Database) -> None:
    writer = Writer(database, capacity=2)
    writer.start()
    gate = Gate()
    first = writer.submit(gate)
    await asyncio.to_thread(gate.entered.wait, 30)
    assert writer.post(lambda cursor: None)
    assert not writer.post(lambda cursor: None)  # half full already
    waiting = writer.submit(lambda cursor: "taken")
    with pytest.raises(LedgerUnavailable):
        await writer.submit(lambda cursor: "refused")
    urgent = writer.submit(lambda cursor: "urgent", urgent=True)
    gate.open.set()
    await first
    assert (await waiting, await urgent) == ("taken", "urgent")
    await writer.close()


async def test_a_returned_exception_is_delivered_and_the_batch_stands(database: Database) -> None:
    writer = Writer(database)
    writer.start()

    def insert(cursor: sqlite3.Cursor) -> str:
        cursor.execute("INSERT INTO accounts VALUES ('a', 0, 0, 'user', 0)")
        return "inserted"

    refusal = KeyError("h1")
    outcomes = await asyncio.gather(
        writer.submit(insert), writer.submit(lambda cursor: refusal), return_exceptions=True
    )
    assert list(outcomes) == ["inserted", refusal]
    await writer.close()
    with database.read() as connection:
        assert connection.exec_driver_sql("SELECT name FROM accounts").scalars().all() == ["a"]


async def test_a_dead_writer_answers_everybody_with_unavailable(database: Database) -> None:
    writer = Writer(database)
    writer.start()
    gate = Gate()

    def die(cursor: sqlite3.Cursor) -> None:
        gate(cursor)
        raise SystemExit

    killed = writer.submit(die)
    await asyncio.to_thread(gate.entered.wait, 30)
    queued = writer.submit(lambda cursor: None)
    gate.open.set()
    for waiting in (killed, queued):
        with pytest.raises(LedgerUnavailable):
            await asyncio.wait_for(waiting, 30)
    with pytest.raises(LedgerUnavailable):
        await writer.submit(lambda cursor: None)
    await writer.close()


async def test_closing_before_starting_is_harmless(database: Database) -> None:
    await Writer(database).close()
