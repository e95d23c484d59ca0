"""The one thread that writes the ledger: whatever is queued becomes one transaction, and one fsync.

No timer: while a commit is on its way to the disk the next batch gathers by itself. Operations are functions of
a cursor. What an operation *returns* goes to its waiter, an exception too (a refusal that changed nothing); an
exception it *raises* rolls the batch back, and then each operation runs in a transaction of its own.
"""

import asyncio
import sqlite3
import threading
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import Any

import structlog

from headgate.core.errors import InternalError, LedgerUnavailable
from headgate.stores.database import Database, FileMoved

log = structlog.get_logger("headgate.ledger")

Operation = Callable[[sqlite3.Cursor], Any]
"""Runs inside a transaction. Anything but its statements must have no effect: it may run twice."""

_Queued = tuple[Operation, asyncio.Future[Any] | None]

CAPACITY = 4096


class Writer:
    """Runs operations in order, in batches. Everything but the thread's own work happens on the event loop."""

    failing: bool
    """An outage ended a batch, and no change was committed since. Reads may well succeed: the disk may be full."""

    def __init__(self, database: Database, *, capacity: int = CAPACITY) -> None:
        self.failing = False
        self._database = database
        self._capacity = capacity
        self._queue: SimpleQueue[_Queued | None] = SimpleQueue()
        self._connection: sqlite3.Connection | None = None
        self._open = False
        self._finished = asyncio.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start the thread; the running loop is the one that results go to."""
        loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._run, args=(loop,), name="headgate-ledger", daemon=True)
        self._open = True
        self._thread.start()

    def submit(self, operation: Operation, *, urgent: bool = False) -> asyncio.Future[Any]:
        """Enqueue now; the future gets what the operation returns, after its commit.

        LedgerUnavailable (in the future) when the writer is closed or its queue is full; `urgent` ones are
        taken even then: they free what others wait for, and the caller sees to it that they are few.
        """
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        if not self._open:
            future.set_exception(LedgerUnavailable("The ledger is closed."))
        elif not urgent and self._queue.qsize() >= self._capacity:
            future.set_exception(LedgerUnavailable("The ledger has too much to write."))
        else:
            self._queue.put((operation, future))
        return future

    def post(self, operation: Operation) -> bool:
        """Enqueue something nobody waits for; False when it was dropped because the queue is filling up."""
        if not self._open or self._queue.qsize() * 2 >= self._capacity:
            return False
        self._queue.put((operation, None))
        return True

    async def close(self) -> None:
        """Take nothing more, commit what is queued, close the connection."""
        if self._thread is None:
            return
        if self._open:
            self._open = False
            self._queue.put(None)
        await self._finished.wait()
        self._thread.join()

    def _run(self, loop: asyncio.AbstractEventLoop) -> None:
        try:
            while self._next_batch(loop):
                pass
        except BaseException:
            log.exception("the ledger's writer died")
        finally:
            self._disconnect()
            _call(loop, self._finish)

    def _next_batch(self, loop: asyncio.AbstractEventLoop) -> bool:
        """Wait for work, commit all there is, report. False when it was the last."""
        queued = [self._queue.get()]
        queued += [self._queue.get() for _ in range(self._queue.qsize())]
        batch = [item for item in queued if item is not None]
        if batch:
            try:
                outcomes = self._commit([operation for operation, _ in batch])
            except BaseException:
                # The thread is about to die, and no waiter must hang on it.
                _call(loop, _report, batch, [LedgerUnavailable("The ledger broke down.") for _ in batch])
                raise
            _call(loop, _report, batch, outcomes)
        return len(batch) == len(queued)

    def _commit(self, operations: Sequence[Operation]) -> list[Any]:
        """The operations' outcomes; the durable ones are committed."""
        try:
            return self._transaction(operations)
        except sqlite3.Error as error:
            if not _is_outage(error):
                return self._isolate(operations, error)
            # Busy, full or broken: nobody's fault here. A new connection finds out whether it is over.
            self.failing = True
            if not isinstance(error, FileMoved):
                self._disconnect()
            log.error("ledger unavailable", reason=str(error), operations=len(operations))
            return [_unavailable(error) for _ in operations]
        except Exception as error:
            return self._isolate(operations, error)

    def _isolate(self, operations: Sequence[Operation], error: Exception) -> list[Any]:
        """After an unexpected error: let each operation fail or succeed alone."""
        self._roll_back()
        if len(operations) > 1:
            return [outcome for operation in operations for outcome in self._commit([operation])]
        log.error("a ledger operation failed", exc_info=error)
        failure = InternalError()
        failure.__cause__ = error
        return [failure]

    def _transaction(self, operations: Sequence[Operation]) -> list[Any]:
        if self._connection is None:
            self._connection = self._database.connect()
        else:
            self._database.verify()
        changes = self._connection.total_changes
        cursor = self._connection.cursor()
        cursor.execute("BEGIN IMMEDIATE")
        outcomes = [operation(cursor) for operation in operations]
        cursor.execute("COMMIT")
        if self._connection.total_changes != changes:
            self.failing = False
        return outcomes

    def _roll_back(self) -> None:
        try:
            if self._connection is not None and self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
        except sqlite3.Error:
            self._disconnect()

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            try:
                connection.close()
            except sqlite3.Error as error:
                log.warning("closing the ledger's connection failed", reason=str(error))

    def _finish(self) -> None:
        """On the loop, after the thread's last batch: nothing that was queued stays unanswered."""
        self._open = False
        while not self._queue.empty():
            item = self._queue.get()
            if item is not None:
                _report([item], [LedgerUnavailable("The ledger is closed.")])
        self._finished.set()


def _call(loop: asyncio.AbstractEventLoop, callback: Callable[..., None], *arguments: Any) -> None:
    try:
        loop.call_soon_threadsafe(callback, *arguments)
    except RuntimeError:
        # The loop is closed: nobody waits any more, and the commits stand.
        log.warning("the event loop ended before the ledger was closed")


def _report(batch: Sequence[_Queued], outcomes: Sequence[Any]) -> None:
    """Give every waiter its outcome. One that was cancelled in the meantime wants none."""
    for (_, future), outcome in zip(batch, outcomes, strict=True):
        if future is None or future.done():
            continue
        if isinstance(outcome, Exception):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)


def _is_outage(error: sqlite3.Error) -> bool:
    """Whether the database as a whole is in trouble, rather than one statement."""
    return isinstance(error, sqlite3.OperationalError) or type(error) is sqlite3.DatabaseError


def _unavailable(error: sqlite3.Error) -> LedgerUnavailable:
    failure = LedgerUnavailable("The ledger is unavailable.")
    failure.__cause__ = error
    return failure
