"""What a request's checks leave to look at: sealed points of a picture, and the curves of an attack.

Requests that are there get none: their texts are gone.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "evidence",
        sa.Column("request_id", sa.String(length=40), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("sealed", sa.LargeBinary(), nullable=True),
        sa.Column("absent", sa.String(length=60), nullable=True),
        sa.PrimaryKeyConstraint("request_id", name="pk_evidence"),
        sa.ForeignKeyConstraint(
            ["request_id"],
            ["unlearn_requests.id"],
            name="fk_evidence_request_id_unlearn_requests",
            ondelete="CASCADE",
        ),
    )


def downgrade() -> None:
    op.drop_table("evidence")
