"""Credentials on the way of a request: read-only look-ups in a thread of their own.

Each look-up is its own WAL read, so what the command line committed is seen by the next one.
"""

import asyncio
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import structlog

from headgate.core.accounts import KeyRecord
from headgate.core.errors import LedgerUnavailable
from headgate.stores import statements
from headgate.stores.database import Database, FileMoved

log = structlog.get_logger("headgate.credentials")


class SqliteAccountStore:
    """core.ports.AccountStore. LedgerUnavailable when the database cannot be read: no answer is no admission."""

    def __init__(self, database: Database) -> None:
        self._database = database
        # One thread owns the connection; a look-up takes microseconds, so they queue for nothing.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="headgate-accounts")
        self._connection: sqlite3.Connection | None = None

    async def key_by_digest(self, digest: bytes) -> KeyRecord | None:
        """The unrevoked key with this SHA-256, or None."""
        row = await self._one(statements.KEY_BY_DIGEST, (digest,))
        if row is None:
            return None
        return KeyRecord(
            id=row[0],
            digest=row[1],
            prefix=row[2],
            account=row[3],
            app=row[4],
            admin=bool(row[5]),
            created_ms=row[6],
        )

    async def token_state(self, account: str, jti: str | None) -> bool:
        """True when a client has this account and the token id is not revoked."""
        row = await self._one(statements.TOKEN_STATE, (account, jti))
        return row is not None and bool(row[0])

    async def close(self) -> None:
        await asyncio.get_running_loop().run_in_executor(self._thread, self._disconnect)
        self._thread.shutdown(wait=False)

    async def _one(self, statement: str, parameters: tuple[object, ...]) -> tuple[Any, ...] | None:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, self._query, statement, parameters)

    def _query(self, statement: str, parameters: tuple[object, ...]) -> tuple[Any, ...] | None:
        try:
            if self._connection is None:
                self._connection = self._database.connect()
            else:
                self._database.verify()
            # Read to the end: a statement left open would keep seeing its own moment.
            rows = self._connection.execute(statement, parameters).fetchall()
        except sqlite3.Error as error:
            if not isinstance(error, FileMoved):
                self._disconnect()
            log.error("credentials cannot be checked", reason=str(error))
            raise LedgerUnavailable("Credentials cannot be checked at the moment.") from error
        return rows[0] if rows else None

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()
