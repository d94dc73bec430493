"""Key shares of rows that are yet to come, so that none is left behind when they never do."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "prepared_shares",
        sa.Column("share_id", sa.LargeBinary(length=16), nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("share_id", name="pk_prepared_shares"),
    )


def downgrade() -> None:
    # Workers are stopped by now, so no row of theirs will come: the older version destroys the shares.
    op.execute(
        "INSERT INTO pending_shreds (share_id, at) SELECT share_id, at FROM prepared_shares "
        "WHERE share_id NOT IN (SELECT share_id FROM pending_shreds)"
    )
    op.drop_table("prepared_shares")
