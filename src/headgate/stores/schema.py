"""The database's tables, as SQLAlchemy Core: one schema for SQLite now and PostgreSQL later.

Amounts are integers in nano-USD, times integers in milliseconds since 1970. On SQLite the tables are STRICT, so
that not even an overflow can turn money into a float. A fresh database is made from this module, an older one
is migrated; a test compares what comes of both.
"""

from sqlalchemy import (
    DDL,
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
    UniqueConstraint,
    event,
)

# SQLite's STRICT tables know INTEGER only; it holds 64 bits there.
Big = BigInteger().with_variant(Integer(), "sqlite")
Flag = Boolean().with_variant(Integer(), "sqlite")

metadata = MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "uq": "uq_%(table_name)s_%(column_0_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    }
)

accounts = Table(
    "accounts",
    metadata,
    Column("name", Text, primary_key=True),
    Column("balance", Big, nullable=False),
    Column("held", Big, nullable=False),
    Column("kind", Text, nullable=False),
    Column("created", Big, nullable=False),
    CheckConstraint("kind IN ('user', 'internal', 'provider')", name="kind"),
    CheckConstraint("held >= 0", name="held"),
    sqlite_strict=True,
    sqlite_with_rowid=False,
)
"""Who has money. `kind` user: clients. internal: platform and funding. provider: one per provider."""

transfers = Table(
    "transfers",
    metadata,
    Column("id", Big, primary_key=True),
    Column("kind", Text, nullable=False),
    Column("hold_id", Text),
    Column("reference", Text),
    Column("created", Big, nullable=False),
    CheckConstraint("kind IN ('credit', 'settle')", name="kind"),
    UniqueConstraint("hold_id"),
    sqlite_strict=True,
)
"""One movement of money; its entries sum to zero. A hold has at most one."""

# Partial: the settles, which are nearly all transfers, have no reference and cost nothing here.
Index(
    "ix_transfers_reference",
    transfers.c.kind,
    transfers.c.reference,
    unique=True,
    sqlite_where=transfers.c.reference.is_not(None),
    postgresql_where=transfers.c.reference.is_not(None),
)

entries = Table(
    "entries",
    metadata,
    Column("id", Big, primary_key=True),
    Column("transfer_id", Big, ForeignKey("transfers.id"), nullable=False),
    Column("account", Text, ForeignKey("accounts.name"), nullable=False),
    Column("amount", Big, nullable=False),
    sqlite_strict=True,
)
"""The account's side of a transfer. Append-only."""

holds = Table(
    "holds",
    metadata,
    Column("id", Text, primary_key=True),
    Column("account", Text, ForeignKey("accounts.name"), nullable=False),
    Column("amount", Big, nullable=False),
    Column("created", Big, nullable=False),
    Column("rows", LargeBinary, nullable=False),
    sqlite_strict=True,
    sqlite_with_rowid=False,
)
"""Open holds only: resolving one deletes its row. `rows` is JSON, a list of UsageRow: what recovery charges."""

usage = Table(
    "usage",
    metadata,
    Column("id", Big, primary_key=True),
    Column("hold_id", Text, nullable=False),
    Column("account", Text, ForeignKey("accounts.name"), nullable=False),
    Column("hold_amount", Big, nullable=False),
    Column("transfer_id", Big, ForeignKey("transfers.id")),
    Column("created", Big, nullable=False),
    # From here on: the fields of UsageRow, in its order.
    Column("request_id", Text, nullable=False),
    Column("dialect", Text, nullable=False),
    Column("model", Text, nullable=False),
    Column("provider", Text, nullable=False),
    Column("prompt_tokens", Big, nullable=False),
    Column("cached_tokens", Big, nullable=False),
    Column("completion_tokens", Big, nullable=False),
    Column("source", Text, nullable=False),
    Column("cost", Big, nullable=False),
    Column("price", Big, nullable=False),
    Column("excess", Big, nullable=False),
    Column("developer", Text),
    Column("developer_share", Big, nullable=False),
    Column("key_id", Text),
    Column("app", Text),
    Column("user", Text),
    Column("stream", Flag, nullable=False),
    Column("error", Text),
    Column("attempts", Big, nullable=False, server_default="0"),
    Column("failed_cost", Big, nullable=False, server_default="0"),
    Index("ix_usage_account_created", "account", "created"),
    Index("ix_usage_request_id", "request_id"),
    sqlite_strict=True,
)
"""What one model of one request used. `price` was charged, `excess` was not."""

api_keys = Table(
    "api_keys",
    metadata,
    Column("id", Text, primary_key=True),
    Column("digest", LargeBinary, nullable=False),
    Column("prefix", Text, nullable=False),
    Column("account", Text, ForeignKey("accounts.name"), nullable=False),
    Column("app", Text),
    Column("admin", Flag, nullable=False),
    Column("created", Big, nullable=False),
    Column("revoked", Big),
    UniqueConstraint("digest"),
    sqlite_strict=True,
)
"""API keys: the SHA-256, never the key."""

revoked_tokens = Table(
    "revoked_tokens",
    metadata,
    Column("jti", Text, primary_key=True),
    Column("account", Text),
    Column("expires", Big),
    Column("revoked", Big, nullable=False),
    sqlite_strict=True,
    sqlite_with_rowid=False,
)
"""JWTs that were logged out early. `expires` null: unknown, so the row stays."""

idempotency = Table(
    "idempotency",
    metadata,
    Column("account", Text, primary_key=True),
    Column("key", Text, primary_key=True),
    Column("digest", LargeBinary, nullable=False),
    Column("hold_id", Text),
    Column("kept", LargeBinary),
    Column("expires", Big, nullable=False),
    Index("ix_idempotency_expires", "expires"),
    UniqueConstraint("hold_id"),
    sqlite_strict=True,
    sqlite_with_rowid=False,
)
"""Requests by Idempotency-Key. `hold_id` while one is under way, then `kept`: what became of it."""

developers = Table(
    "developers",
    metadata,
    Column("id", Text, primary_key=True),
    Column("account", Text, ForeignKey("accounts.name"), nullable=False),
    Column("created", Big, nullable=False),
    sqlite_strict=True,
    sqlite_with_rowid=False,
)
"""Developers that are not in the configuration. Nothing writes it yet."""


def append_only(table: Table) -> None:
    """What was posted stays as it was posted: corrections are new transfers. The database itself says so."""
    for change in ("UPDATE", "DELETE"):
        trigger = DDL(  # type: ignore[no-untyped-call]  # SQLAlchemy leaves it untyped
            f"CREATE TRIGGER {table.name}_no_{change.lower()} BEFORE {change} ON {table.name} "
            f"BEGIN SELECT RAISE(ABORT, '{table.name} are append-only'); END"
        )
        event.listen(table, "after_create", trigger.execute_if(dialect="sqlite"))


append_only(entries)
append_only(transfers)
