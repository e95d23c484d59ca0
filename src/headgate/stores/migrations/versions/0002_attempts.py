"""Usage rows say how often providers were asked, and what failed attempts cost."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

big = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    for name in ("attempts", "failed_cost"):
        op.add_column("usage", sa.Column(name, big, nullable=False, server_default="0"))
