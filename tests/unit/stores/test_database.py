import re
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection

from headgate.core.accounts import UsageRow
from headgate.core.errors import LedgerUnavailable
from headgate.stores.accounts import SqliteAccounts
from headgate.stores.database import (
    DATABASE_NAME,
    HEAD,
    Database,
    migrations_config,
    open_database,
    upgrade,
)
from headgate.stores.lock import folder_lock
from headgate.stores.schema import metadata, usage


def schema_of(connection: Connection) -> dict[str, str]:
    """The SQL of every table, index and trigger, whatever its layout."""
    rows = connection.exec_driver_sql("SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL")
    return {name: re.sub(r"\s*([(),])\s*", r"\1", re.sub(r"\s+", " ", text)).strip() for name, text in rows}


def migrated(path: Path) -> Database:
    """A file that Alembic's migrations made from nothing."""
    path.touch()
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.close()
    database = Database(path)
    with database.write() as transaction:
        upgrade(transaction)
    return database


def test_head_is_the_newest_migration() -> None:
    assert ScriptDirectory.from_config(migrations_config()).get_current_head() == HEAD


def test_the_migrations_make_the_same_schema_as_a_fresh_start(database: Database, tmp_path: Path) -> None:
    with database.read() as fresh, migrated(tmp_path / "old.db").read() as old:
        assert schema_of(old) == schema_of(fresh)
        assert "entries_no_update" in schema_of(old)
        context = MigrationContext.configure(old, opts={"compare_type": True})
        assert compare_metadata(context, metadata) == []


def test_a_migrated_file_counts_as_current(tmp_path: Path) -> None:
    database = migrated(tmp_path / DATABASE_NAME)
    database.migrate()
    with database.read() as connection:
        assert connection.exec_driver_sql("SELECT version_num FROM alembic_version").scalar_one() == HEAD


def test_usage_columns_are_the_fields_of_a_usage_row() -> None:
    names = [column.name for column in usage.columns]
    assert tuple(names[names.index("request_id") :]) == UsageRow.__struct_fields__


def test_folder_and_file_are_the_owners_only(tmp_path: Path) -> None:
    open_database(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "a" / "b" / DATABASE_NAME).stat().st_mode & 0o777 == 0o600


def test_every_connection_is_durable(database: Database) -> None:
    connection = database.connect()
    assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert connection.execute("PRAGMA synchronous").fetchone() == (2,)
    assert connection.execute("PRAGMA foreign_keys").fetchone() == (1,)
    connection.close()


def test_a_connection_that_is_not_durable_is_refused(database: Database) -> None:
    connection = sqlite3.connect(database.path)
    connection.execute("PRAGMA journal_mode = DELETE")
    connection.close()
    with pytest.raises(sqlite3.OperationalError, match="journal_mode"):
        database.connect()


def test_a_file_that_vanished_is_not_replaced_by_an_empty_one(database: Database) -> None:
    database.path.unlink()
    with pytest.raises(sqlite3.OperationalError, match="removed while in use"):
        database.connect()
    assert not database.path.exists()


def test_a_file_that_was_replaced_is_not_adopted(
    database: Database, accounts: SqliteAccounts, replace: Callable[[], None]
) -> None:
    pinned = database.connect()  # so that its number is not given to another file
    replace()
    with pytest.raises(sqlite3.OperationalError, match="replaced while in use; a restart is needed"):
        database.connect()
    with pytest.raises(LedgerUnavailable, match=r"headgate\.db.*replaced"):
        accounts.balance("ann")
    pinned.close()
    assert SqliteAccounts(open_database(database.path.parent)).balance("ann").balance == 1000


@pytest.mark.parametrize("left", [None, b""])
def test_no_database_is_made_under_a_running_server_that_misses_its_own(
    database: Database, left: bytes | None
) -> None:
    folder = database.path.parent
    database.path.unlink()
    if left is not None:
        database.path.write_bytes(left)
    with folder_lock(folder):
        with pytest.raises(LedgerUnavailable, match=r"headgate\.db.*server's database file is missing"):
            open_database(folder)
        assert left == (database.path.read_bytes() if database.path.exists() else None)
    open_database(folder)


def test_the_lock_owner_makes_the_database_and_others_may_use_it(tmp_path: Path) -> None:
    with folder_lock(tmp_path):
        open_database(tmp_path, locked=True)
        SqliteAccounts(open_database(tmp_path)).create("ann", None, 1)


def test_a_newer_database_stops_with_a_clear_error(database: Database) -> None:
    with database.write() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(LedgerUnavailable, match=r"headgate\.db.*newer Headgate.*9999.*upgrade"):
        open_database(database.path.parent)


def test_a_file_that_is_no_database_is_named(tmp_path: Path) -> None:
    (tmp_path / DATABASE_NAME).write_bytes(b"not a database, but long enough to look at" * 50)
    with pytest.raises(LedgerUnavailable, match=r"headgate\.db.*not a database"):
        open_database(tmp_path)


def test_a_data_folder_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "data").touch()
    with pytest.raises(LedgerUnavailable, match="data folder"):
        open_database(tmp_path / "data")


def test_several_processes_may_start_first_at_once(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib; from headgate.stores.database import open_database; sys.stdin.read();"
        "open_database(pathlib.Path(sys.argv[1]))"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "data")], stdin=subprocess.PIPE)
        for _ in range(3)
    ]
    # They wait for the end of their input, so they all reach for the file together.
    for process in processes:
        assert process.stdin is not None
        process.stdin.close()
    assert [process.wait(60) for process in processes] == [0, 0, 0]
    with open_database(tmp_path / "data").read() as connection:
        assert connection.exec_driver_sql("SELECT count(*) FROM alembic_version").scalar_one() == 1


@pytest.mark.parametrize("change", ["UPDATE entries SET amount = 1", "DELETE FROM entries"])
def test_entries_are_append_only(database: Database, change: str) -> None:
    with database.write() as connection:
        connection.exec_driver_sql("INSERT INTO accounts VALUES ('a', 0, 0, 'user', 0)")
        connection.exec_driver_sql("INSERT INTO transfers (id, kind, created) VALUES (1, 'credit', 0)")
        connection.exec_driver_sql("INSERT INTO entries VALUES (1, 1, 'a', 5)")
    with pytest.raises(LedgerUnavailable, match="append-only"), database.write() as connection:
        connection.exec_driver_sql(change)


def test_money_cannot_become_a_float(database: Database) -> None:
    with pytest.raises(LedgerUnavailable, match="REAL"), database.write() as connection:
        connection.exec_driver_sql("INSERT INTO accounts VALUES ('a', 0.5, 0, 'user', 0)")


def test_a_failed_write_leaves_nothing(database: Database) -> None:
    with pytest.raises(ZeroDivisionError), database.write() as connection:
        connection.exec_driver_sql("INSERT INTO accounts VALUES ('a', 0, 0, 'user', 0)")
        raise ZeroDivisionError
    with database.read() as connection:
        assert connection.exec_driver_sql("SELECT count(*) FROM accounts").scalar_one() == 0
