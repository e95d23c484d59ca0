"""The first tables: accounts, double entry, holds, usage, credentials; room for idempotency and developers."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

big = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
flag = sa.Boolean().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    op.create_table(
        "accounts",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("balance", big, nullable=False),
        sa.Column("held", big, nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("created", big, nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_accounts")),
        sa.CheckConstraint("kind IN ('user', 'internal', 'provider')", name=op.f("ck_accounts_kind")),
        sa.CheckConstraint("held >= 0", name=op.f("ck_accounts_held")),
        sqlite_strict=True,
        sqlite_with_rowid=False,
    )
    op.create_table(
        "transfers",
        sa.Column("id", big, nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("hold_id", sa.Text()),
        sa.Column("reference", sa.Text()),
        sa.Column("created", big, nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_transfers")),
        sa.CheckConstraint("kind IN ('credit', 'settle')", name=op.f("ck_transfers_kind")),
        sa.UniqueConstraint("hold_id", name=op.f("uq_transfers_hold_id")),
        sqlite_strict=True,
    )
    op.create_index(
        "ix_transfers_reference",
        "transfers",
        ["kind", "reference"],
        unique=True,
        sqlite_where=sa.text("reference IS NOT NULL"),
        postgresql_where=sa.text("reference IS NOT NULL"),
    )
    op.create_table(
        "entries",
        sa.Column("id", big, nullable=False),
        sa.Column("transfer_id", big, nullable=False),
        sa.Column("account", sa.Text(), nullable=False),
        sa.Column("amount", big, nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_entries")),
        sa.ForeignKeyConstraint(["transfer_id"], ["transfers.id"], name=op.f("fk_entries_transfer_id")),
        sa.ForeignKeyConstraint(["account"], ["accounts.name"], name=op.f("fk_entries_account")),
        sqlite_strict=True,
    )
    op.create_table(
        "holds",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("account", sa.Text(), nullable=False),
        sa.Column("amount", big, nullable=False),
        sa.Column("created", big, nullable=False),
        sa.Column("rows", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_holds")),
        sa.ForeignKeyConstraint(["account"], ["accounts.name"], name=op.f("fk_holds_account")),
        sqlite_strict=True,
        sqlite_with_rowid=False,
    )
    op.create_table(
        "usage",
        sa.Column("id", big, nullable=False),
        sa.Column("hold_id", sa.Text(), nullable=False),
        sa.Column("account", sa.Text(), nullable=False),
        sa.Column("hold_amount", big, nullable=False),
        sa.Column("transfer_id", big),
        sa.Column("created", big, nullable=False),
        sa.Column("request_id", sa.Text(), nullable=False),
        sa.Column("dialect", sa.Text(), nullable=False),
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("provider", sa.Text(), nullable=False),
        sa.Column("prompt_tokens", big, nullable=False),
        sa.Column("cached_tokens", big, nullable=False),
        sa.Column("completion_tokens", big, nullable=False),
        sa.Column("source", sa.Text(), nullable=False),
        sa.Column("cost", big, nullable=False),
        sa.Column("price", big, nullable=False),
        sa.Column("excess", big, nullable=False),
        sa.Column("developer", sa.Text()),
        sa.Column("developer_share", big, nullable=False),
        sa.Column("key_id", sa.Text()),
        sa.Column("app", sa.Text()),
        sa.Column("user", sa.Text()),
        sa.Column("stream", flag, nullable=False),
        sa.Column("error", sa.Text()),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_usage")),
        sa.ForeignKeyConstraint(["account"], ["accounts.name"], name=op.f("fk_usage_account")),
        sa.ForeignKeyConstraint(["transfer_id"], ["transfers.id"], name=op.f("fk_usage_transfer_id")),
        sqlite_strict=True,
    )
    op.create_index("ix_usage_account_created", "usage", ["account", "created"])
    op.create_index("ix_usage_request_id", "usage", ["request_id"])
    op.create_table(
        "api_keys",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("digest", sa.LargeBinary(), nullable=False),
        sa.Column("prefix", sa.Text(), nullable=False),
        sa.Column("account", sa.Text(), nullable=False),
        sa.Column("app", sa.Text()),
        sa.Column("admin", flag, nullable=False),
        sa.Column("created", big, nullable=False),
        sa.Column("revoked", big),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_api_keys")),
        sa.UniqueConstraint("digest", name=op.f("uq_api_keys_digest")),
        sa.ForeignKeyConstraint(["account"], ["accounts.name"], name=op.f("fk_api_keys_account")),
        sqlite_strict=True,
    )
    op.create_table(
        "revoked_tokens",
        sa.Column("jti", sa.Text(), nullable=False),
        sa.Column("account", sa.Text()),
        sa.Column("expires", big),
        sa.Column("revoked", big, nullable=False),
        sa.PrimaryKeyConstraint("jti", name=op.f("pk_revoked_tokens")),
        sqlite_strict=True,
        sqlite_with_rowid=False,
    )
    op.create_table(
        "idempotency",
        sa.Column("scope", sa.Text(), nullable=False),
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("digest", sa.LargeBinary(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("response", sa.LargeBinary()),
        sa.Column("created", big, nullable=False),
        sa.Column("expires", big, nullable=False),
        sa.PrimaryKeyConstraint("scope", "key", name=op.f("pk_idempotency")),
        sa.CheckConstraint("state IN ('running', 'done')", name=op.f("ck_idempotency_state")),
        sqlite_strict=True,
    )
    op.create_index("ix_idempotency_expires", "idempotency", ["expires"])
    op.create_table(
        "developers",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("account", sa.Text(), nullable=False),
        sa.Column("created", big, nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_developers")),
        sa.ForeignKeyConstraint(["account"], ["accounts.name"], name=op.f("fk_developers_account")),
        sqlite_strict=True,
        sqlite_with_rowid=False,
    )
    # What was posted stays as it was posted: corrections are new transfers.
    for table in ("entries", "transfers"):
        for change in ("UPDATE", "DELETE"):
            op.execute(
                f"CREATE TRIGGER {table}_no_{change.lower()} BEFORE {change} ON {table} "
                f"BEGIN SELECT RAISE(ABORT, '{table} are append-only'); END"
            )


def downgrade() -> None:
    raise NotImplementedError("money is never unrecorded; restore a backup instead")
