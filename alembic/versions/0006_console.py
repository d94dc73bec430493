"""Sessions of the console that were ended before their time; indexes for what lists of requests are narrowed by."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "ended_sessions",
        sa.Column("id", sa.String(length=32), nullable=False),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_ended_sessions"),
    )
    # Before there was the column nobody could say otherwise.
    op.execute("UPDATE unlearn_requests SET received_at = created_at WHERE received_at IS NULL")
    op.create_index("ix_unlearn_requests_received_at", "unlearn_requests", ["received_at"])
    op.create_index("ix_unlearn_requests_due_at", "unlearn_requests", ["due_at"])


def downgrade() -> None:
    # The older version takes none of this one's sessions. Upgraded again within their hours, those that were logged
    # out of hold again (docs/keys-and-backups.md).
    op.drop_index("ix_unlearn_requests_due_at", "unlearn_requests")
    op.drop_index("ix_unlearn_requests_received_at", "unlearn_requests")
    op.drop_table("ended_sessions")
