"""What an operator does to accounts, keys and tokens: short transactions, safe beside a running server."""

from collections.abc import Iterable

from sqlalchemy import Connection, Row, func, insert, select, update
from sqlalchemy.dialects import sqlite

from headgate.core.accounts import FUNDING_ACCOUNT, Balance, KeyRecord
from headgate.core.errors import InvalidRequest, NotFound
from headgate.core.money import NanoUSD
from headgate.stores.database import Database
from headgate.stores.schema import accounts, api_keys, entries, holds, revoked_tokens, transfers

MAX_BALANCE = 9 * 10**18
"""Nano-USD; just inside 64 bits."""


class SqliteAccounts:
    """Clients' accounts and their credentials. Everything raises LedgerUnavailable when the file cannot be used."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def create(self, name: str, credit: NanoUSD | None, created_ms: int) -> Balance:
        """A new account, with its first credit. InvalidRequest when the name is taken."""
        with self._database.write() as connection:
            if _find(connection, name) is not None:
                raise InvalidRequest(f"The account {name!r} exists already.", param="name")
            connection.execute(
                insert(accounts).values(name=name, balance=0, held=0, kind="user", created=created_ms)
            )
            if credit is not None:
                _credit(connection, name, credit, created_ms)
            return _balance(connection, name)

    def ensure(self, names: Iterable[str], created_ms: int) -> None:
        """Create the accounts that are missing, with nothing in them."""
        with self._database.write() as connection:
            for name in names:
                values = {"name": name, "balance": 0, "held": 0, "kind": "user", "created": created_ms}
                connection.execute(sqlite.insert(accounts).values(values).on_conflict_do_nothing())

    def credit(self, name: str, amount: NanoUSD, created_ms: int) -> Balance:
        """Pay money in: funding -amount, account +amount. NotFound when no client has this account."""
        with self._database.write() as connection:
            _client(connection, name)
            _credit(connection, name, amount, created_ms)
            return _balance(connection, name)

    def balance(self, name: str) -> Balance:
        """NotFound when there is no such account."""
        with self._database.read() as connection:
            if _find(connection, name) is None:
                raise _unknown(name)
            return _balance(connection, name)

    def require_client(self, name: str) -> None:
        """NotFound when no client has this account."""
        with self._database.read() as connection:
            _client(connection, name)

    def add_key(self, record: KeyRecord) -> None:
        """Store a key of an existing account; NotFound otherwise."""
        with self._database.write() as connection:
            _client(connection, record.account)
            connection.execute(
                insert(api_keys).values(
                    id=record.id,
                    digest=record.digest,
                    prefix=record.prefix,
                    account=record.account,
                    app=record.app,
                    admin=int(record.admin),
                    created=record.created_ms,
                )
            )

    def keys(self) -> tuple[KeyRecord, ...]:
        """All keys, revoked ones too, oldest first."""
        with self._database.read() as connection:
            rows = connection.execute(select(api_keys).order_by(api_keys.c.created, api_keys.c.id))
            return tuple(
                KeyRecord(
                    id=row.id,
                    digest=row.digest,
                    prefix=row.prefix,
                    account=row.account,
                    app=row.app,
                    admin=bool(row.admin),
                    created_ms=row.created,
                    revoked_ms=row.revoked,
                )
                for row in rows
            )

    def revoke_key(self, key_id: str, digest: bytes, revoked_ms: int) -> str:
        """Revoke the key with this id or this digest and return its id; once revoked it stays so. NotFound."""
        with self._database.write() as connection:
            found = connection.execute(
                select(api_keys.c.id).where((api_keys.c.id == key_id) | (api_keys.c.digest == digest))
            ).scalar_one_or_none()
            if found is None:
                raise NotFound("There is no such key; `headgate keys list` shows the ids.")
            connection.execute(
                update(api_keys)
                .values(revoked=revoked_ms)
                .where(api_keys.c.id == found, api_keys.c.revoked.is_(None))
            )
            return str(found)

    def revoke_token(self, jti: str, account: str | None, expires_ms: int | None, revoked_ms: int) -> None:
        """Remember a token id as revoked, until it would have expired anyway."""
        with self._database.write() as connection:
            connection.execute(revoked_tokens.delete().where(revoked_tokens.c.expires < revoked_ms))
            connection.execute(
                sqlite.insert(revoked_tokens)
                .values(jti=jti, account=account, expires=expires_ms, revoked=revoked_ms)
                .on_conflict_do_nothing()
            )


def _find(connection: Connection, name: str) -> Row[int, int, str] | None:
    return connection.execute(
        select(accounts.c.balance, accounts.c.held, accounts.c.kind).where(accounts.c.name == name)
    ).one_or_none()


def _client(connection: Connection, name: str) -> None:
    """Keys and credits belong to clients; NotFound for the ledger's own accounts as for unknown ones."""
    found = _find(connection, name)
    if found is None or found.kind != "user":
        raise _unknown(name)


def _unknown(name: str) -> NotFound:
    return NotFound(f"There is no account {name!r}; `headgate accounts create {name}` makes one.")


def _balance(connection: Connection, name: str) -> Balance:
    open_holds = select(func.count()).select_from(holds).where(holds.c.account == name).scalar_subquery()
    row = connection.execute(
        select(accounts.c.balance, accounts.c.held, open_holds).where(accounts.c.name == name)
    ).one()
    return Balance(account=name, balance=row[0], held=row[1], open_holds=row[2])


def _credit(connection: Connection, name: str, amount: NanoUSD, created_ms: int) -> None:
    funding = {
        "name": FUNDING_ACCOUNT,
        "balance": 0,
        "held": 0,
        "kind": "internal",
        "created": created_ms,
    }
    connection.execute(sqlite.insert(accounts).values(funding).on_conflict_do_nothing())
    transfer = connection.execute(insert(transfers).values(kind="credit", created=created_ms))
    (transfer_id,) = transfer.inserted_primary_key or (None,)
    for account, change in ((FUNDING_ACCOUNT, -amount), (name, amount)):
        found = _find(connection, account)
        if found is not None and abs(found.balance + change) > MAX_BALANCE:
            raise InvalidRequest("The ledger cannot hold that much money.", param="amount")
        connection.execute(
            update(accounts).values(balance=accounts.c.balance + change).where(accounts.c.name == account)
        )
        connection.execute(insert(entries).values(transfer_id=transfer_id, account=account, amount=change))
