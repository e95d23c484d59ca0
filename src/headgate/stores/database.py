"""The SQLite file: how it is created, migrated and connected to.

Every connection runs in WAL with synchronous=FULL and foreign keys, read back before the connection is used: a
commit that was reported has reached the disk. A fresh file is made straight from the schema; Alembic is imported
only for one that an older version left, because it costs a second and more memory than all the rest of the gateway.
"""

import fcntl
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
from headgate.stores.schema import metadata

if TYPE_CHECKING:
    from alembic.config import Config

DATABASE_NAME = "headgate.db"
HEAD = "0001"
"""The newest migration; a test compares it with the migrations folder."""

BUSY_TIMEOUT_S = 5.0
"""How long a transaction waits for another process's. All of ours are short."""

_VERSION_TABLE = (
    "CREATE TABLE alembic_version "
    "(version_num VARCHAR(32) NOT NULL, CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num))"
)
_PRAGMAS = (("journal_mode", "wal"), ("synchronous", 2), ("foreign_keys", 1))


def make_folder(folder: Path) -> None:
    """Create the data folder, readable by its owner only. One that exists keeps its mode."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise LedgerUnavailable(f"{folder}: cannot be used as the data folder: {error.strerror}") from error


class Database:
    """One SQLite file. `open_database` makes sure it exists and is up to date."""

    def __init__(self, path: Path, *, busy_timeout_s: float = BUSY_TIMEOUT_S) -> None:
        self.path = path
        self._busy_timeout_s = busy_timeout_s
        # Connections are few and short outside the ledger's writer; a pool would keep files open for nothing.
        self._engine = create_engine("sqlite://", creator=self.connect, poolclass=NullPool)

    def connect(self) -> sqlite3.Connection:
        """A connection in autocommit mode. sqlite3.Error when the file is gone, broken or not durable."""
        connection = self._connect()
        try:
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute("PRAGMA foreign_keys = ON")
            for pragma, wanted in _PRAGMAS:
                (found,) = connection.execute(f"PRAGMA {pragma}").fetchone()
                if found != wanted:
                    raise sqlite3.OperationalError(f"PRAGMA {pragma} is {found!r} instead of {wanted!r}")
        except BaseException:
            connection.close()
            raise
        return connection

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

    def migrate(self) -> None:
        """Bring the file to HEAD. LedgerUnavailable when it is newer than this program, or cannot be used."""
        try:
            if not self._is_current():
                with self._folder_locked():
                    self._create()
                    self._upgrade()
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

    @contextmanager
    def _folder_locked(self) -> Iterator[None]:
        # SQLite's busy timeout does not cover the switch to WAL, so of two first starts one waits here.
        # The folder is locked, not the file: closing a second descriptor of the file drops SQLite's own locks.
        descriptor = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

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


def open_database(data_dir: Path, *, busy_timeout_s: float = BUSY_TIMEOUT_S) -> Database:
    """The database of a data folder, created and migrated as needed. LedgerUnavailable names file and reason."""
    make_folder(data_dir)
    database = Database(data_dir / DATABASE_NAME, busy_timeout_s=busy_timeout_s)
    database.migrate()
    return database
