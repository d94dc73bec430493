"""How often a request's lease expired, so that lost workers can be counted.

Counted from here on: of what was before, only the audit log knows.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("unlearn_requests", sa.Column("lease_expiries", sa.Integer(), nullable=False, server_default="0"))


def downgrade() -> None:
    op.drop_column("unlearn_requests", "lease_expiries")
