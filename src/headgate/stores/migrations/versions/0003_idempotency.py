"""Requests by Idempotency-Key: by account, with the hold while they are under way, with their outcome afterwards."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

big = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    # Nothing has ever written the table of this name.
    op.drop_table("idempotency")
    op.create_table(
        "idempotency",
        sa.Column("account", sa.Text(), nullable=False),
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("digest", sa.LargeBinary(), nullable=False),
        sa.Column("hold_id", sa.Text()),
        sa.Column("kept", sa.LargeBinary()),
        sa.Column("expires", big, nullable=False),
        sa.PrimaryKeyConstraint("account", "key", name=op.f("pk_idempotency")),
        sa.UniqueConstraint("hold_id", name=op.f("uq_idempotency_hold_id")),
        sqlite_strict=True,
        sqlite_with_rowid=False,
    )
    op.create_index("ix_idempotency_expires", "idempotency", ["expires"])
