"""The SQLite file: how it is created, migrated and connected to.

Every connection runs in WAL with synchronous=FULL and foreign keys, read back before the connection is used: a
commit that was reported has reached the disk. A fresh file is made straight from the schema; Alembic is imported
only for one that an older version left, because it costs a second and more memory than all the rest of the gateway.

A process stays with the file it found first: SQLite would go on writing to one that was removed or replaced, and what
is written there is lost.
"""

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy import Connection, create_engine
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import NullPool

from headgate.core.errors import LedgerUnavailable
from headgate.stores.lock import folder_guard, make_folder, server_runs
from headgate.stores.schema import metadata

if TYPE_CHECKING:
    from alembic.config import Config

DATABASE_NAME = "headgate.db"
HEAD = "0003"
"""The newest migration; a test compares it with the migrations folder."""

BUSY_TIMEOUT_S = 5.0
"""How long a transaction waits for another process's. All of ours are short."""

_VERSION_TABLE = (
    "CREATE TABLE alembic_version "
    "(version_num VARCHAR(32) NOT NULL, CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num))"
)
_PRAGMAS = (("journal_mode", "wal"), ("synchronous", 2), ("foreign_keys", 1))


class FileMoved(sqlite3.OperationalError):
    """The file in use is not at its path any more. Its connections are worth keeping: they are all that is left."""


class Database:
    """One SQLite file. `open_database` makes sure it exists and is up to date."""

    def __init__(self, path: Path, *, busy_timeout_s: float = BUSY_TIMEOUT_S) -> None:
        self.path = path
        self._identity: tuple[int, int] | None = None
        self._busy_timeout_s = busy_timeout_s
        # Connections are few and short outside the ledger's writer; a pool would keep files open for nothing.
        self._engine = create_engine("sqlite://", creator=self.connect, poolclass=NullPool)

    def connect(self) -> sqlite3.Connection:
        """A connection in autocommit mode. sqlite3.Error when the file is gone, replaced, broken or not durable."""
        if self._identity is not None:
            self.verify()
        connection = self._connect()
        try:
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute("PRAGMA foreign_keys = ON")
            for pragma, wanted in _PRAGMAS:
                (found,) = connection.execute(f"PRAGMA {pragma}").fetchone()
                if found != wanted:
                    raise sqlite3.OperationalError(f"PRAGMA {pragma} is {found!r} instead of {wanted!r}")
            self.verify()
        except BaseException:
            connection.close()
            raise
        return connection

    def verify(self) -> None:
        """Cheap enough for every batch: FileMoved when the path does not lead to the file that was found first."""
        try:
            found = self.path.stat()
        except FileNotFoundError:
            raise FileMoved(
                "the file was removed while in use; put the same file back, or a restart is needed"
            ) from None
        except OSError as error:
            raise sqlite3.OperationalError(f"the file cannot be looked at: {error.strerror}") from error
        identity = (found.st_dev, found.st_ino)
        self._identity = self._identity or identity
        if identity != self._identity:
            # A restart would replay the old file's log onto the new one.
            raise FileMoved(
                "the file was replaced while in use; a restart is needed, "
                f"with no {self.path.name}-wal and -shm of the old one beside it"
            )

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """A short write transaction: committed at the end, rolled back on an error. LedgerUnavailable."""
        with self._transaction("BEGIN IMMEDIATE") as connection:
            yield connection

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A read transaction: all its queries see one moment, and no writer waits for it. LedgerUnavailable."""
        with self._transaction("BEGIN") as connection:
            yield connection

    def migrate(self, *, locked: bool = False) -> None:
        """Bring the file to HEAD. LedgerUnavailable when it is newer than this program, or cannot be used.

        `locked`: the caller holds the folder's lock. Nobody else makes a file under a running server, whose own
        is missing then.
        """
        try:
            if not self._is_current():
                # SQLite's busy timeout does not cover the switch to WAL, so of two first starts one waits here.
                with folder_guard(self.path.parent):
                    if not locked and self._is_missing() and server_runs(self.path.parent):
                        raise LedgerUnavailable(
                            f"{self.path}: the running server's database file is missing; put it back, "
                            "or stop the server"
                        )
                    self._create()
                    self._upgrade()
            self.verify()
        except (sqlite3.Error, OSError) as error:
            raise self.unusable(error) from error

    def unusable(self, error: BaseException) -> LedgerUnavailable:
        """The error an operator reads: which file, what is wrong, what to do."""
        if isinstance(error, sqlite3.OperationalError) and "locked" in str(error):
            return LedgerUnavailable(f"{self.path}: the database is busy; try again")
        return LedgerUnavailable(f"{self.path}: the database cannot be used: {error}")

    def _connect(self) -> sqlite3.Connection:
        # mode=rw: a file that vanished is an error, never a fresh and empty ledger.
        return sqlite3.connect(
            f"{self.path.absolute().as_uri()}?mode=rw",
            uri=True,
            timeout=self._busy_timeout_s,
            isolation_level=None,
            check_same_thread=False,
        )

    @contextmanager
    def _transaction(self, begin: str) -> Iterator[Connection]:
        try:
            with self._engine.connect() as connection:
                connection.exec_driver_sql(begin)
                yield connection
                connection.commit()
        except DBAPIError as error:
            raise self.unusable(error.orig or error) from error
        except sqlite3.Error as error:
            raise self.unusable(error) from error

    def _is_missing(self) -> bool:
        # An empty file is one that somebody else has put there.
        return not self.path.exists() or self.path.stat().st_size == 0

    def _is_current(self) -> bool:
        if not self.path.exists():
            return False
        connection = self._connect()
        try:
            (mode,) = connection.execute("PRAGMA journal_mode").fetchone()
            version = self._version(connection)
        finally:
            connection.close()
        return bool(mode == "wal" and version == HEAD)

    def _version(self, connection: sqlite3.Connection) -> str | None:
        table = "SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = 'alembic_version'"
        if connection.execute(table).fetchone() is None:
            return None
        row = connection.execute("SELECT version_num FROM alembic_version").fetchone()
        version = None if row is None else str(row[0])
        if version is not None and version > HEAD:
            raise LedgerUnavailable(
                f"{self.path}: the database was made by a newer Headgate (schema {version}, this one knows {HEAD}); "
                "upgrade Headgate"
            )
        return version

    def _create(self) -> None:
        if not self.path.exists():
            os.close(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        connection = self._connect()
        try:
            connection.execute("PRAGMA journal_mode = WAL")
        finally:
            connection.close()

    def _upgrade(self) -> None:
        with self.write() as connection:
            driver = connection.connection.driver_connection
            if not isinstance(driver, sqlite3.Connection):
                raise TypeError("the engine's connections are SQLite's")
            version = self._version(driver)
            if version is None:
                metadata.create_all(connection, checkfirst=False)
                connection.exec_driver_sql(_VERSION_TABLE)
                connection.exec_driver_sql("INSERT INTO alembic_version VALUES (?)", (HEAD,))
            elif version != HEAD:
                upgrade(connection)


def upgrade(connection: Connection) -> None:
    """Run Alembic's migrations inside the connection's transaction."""
    from alembic import command

    config = migrations_config()
    config.attributes["connection"] = connection
    command.upgrade(config, "head")


def migrations_config() -> "Config":
    """Alembic's configuration: where the migrations are."""
    from alembic.config import Config

    config = Config()
    folder = str(Path(__file__).parent / "migrations").replace("%", "%%")
    config.set_main_option("script_location", folder)
    config.set_main_option("path_separator", "os")
    return config


def open_database(
    data_dir: Path, *, locked: bool = False, busy_timeout_s: float = BUSY_TIMEOUT_S
) -> Database:
    """The database of a data folder, created and migrated as needed. LedgerUnavailable names file and reason.

    `locked`: the caller holds the folder's lock; without it none is created under a running server.
    """
    make_folder(data_dir)
    database = Database(data_dir / DATABASE_NAME, busy_timeout_s=busy_timeout_s)
    database.migrate(locked=locked)
    return database
