"""Approval, expiry and deadlines of requests; keys with limits; webhooks; idempotency; signed audit checkpoints.

Requests that are there get no deadline: when their persons asked is not known.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

TIME = sa.DateTime(timezone=True)
BIG = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    with op.batch_alter_table("api_keys") as batch:
        batch.add_column(sa.Column("limits", sa.JSON(), nullable=True))
        batch.add_column(sa.Column("expires_at", TIME, nullable=True))
        batch.add_column(sa.Column("last_used_at", TIME, nullable=True))
    with op.batch_alter_table("unlearn_requests") as batch:
        batch.add_column(sa.Column("shred_at", TIME, nullable=True))
        batch.add_column(sa.Column("set_digest", sa.LargeBinary(length=32), nullable=True))
        batch.add_column(sa.Column("received_at", TIME, nullable=True))
        batch.add_column(sa.Column("due_at", TIME, nullable=True))
        batch.add_column(sa.Column("expires_at", TIME, nullable=True))
        batch.add_column(sa.Column("approval_required", sa.Boolean(), nullable=False, server_default=sa.false()))
        batch.add_column(sa.Column("approved_by", sa.String(length=40), nullable=True))
        batch.add_column(sa.Column("approved_at", TIME, nullable=True))
        batch.create_index("ix_unlearn_requests_api_key_id_id", ["api_key_id", "id"])
        batch.create_index("ix_unlearn_requests_set_digest", ["set_digest"])
    with op.batch_alter_table("prompts") as batch:
        batch.add_column(sa.Column("revoke_code", sa.String(length=30), nullable=True))
        batch.add_column(sa.Column("revoke_asked_by", sa.String(length=40), nullable=True))
        batch.add_column(sa.Column("revoke_asked_at", TIME, nullable=True))
    op.create_index("ix_audit_log_subject_seq", "audit_log", ["subject", "seq"])
    op.create_table(
        "audit_checkpoints",
        sa.Column("seq", BIG, autoincrement=False, nullable=False),
        sa.Column("hash", sa.String(length=64), nullable=False),
        sa.Column("at", TIME, nullable=False),
        sa.Column("key_id", sa.String(length=64), nullable=False),
        sa.Column("signature", sa.LargeBinary(length=64), nullable=False),
        sa.PrimaryKeyConstraint("seq", name="pk_audit_checkpoints"),
    )
    op.create_table(
        "secrets",
        sa.Column("name", sa.String(length=40), nullable=False),
        sa.Column("wrapped", sa.LargeBinary(), nullable=False),
        sa.Column("created_at", TIME, nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_secrets"),
    )
    op.create_table(
        "pending_shreds",
        sa.Column("share_id", sa.LargeBinary(length=16), nullable=False),
        sa.Column("at", TIME, nullable=False),
        sa.PrimaryKeyConstraint("share_id", name="pk_pending_shreds"),
    )
    op.create_table(
        "idempotency_keys",
        sa.Column("api_key_id", sa.String(length=40), nullable=False),
        sa.Column("digest", sa.LargeBinary(length=32), nullable=False),
        sa.Column("body_digest", sa.LargeBinary(length=32), nullable=False),
        sa.Column("request_id", sa.String(length=40), nullable=False),
        sa.Column("created_at", TIME, nullable=False),
        sa.PrimaryKeyConstraint("api_key_id", "digest", name="pk_idempotency_keys"),
        sa.ForeignKeyConstraint(["api_key_id"], ["api_keys.id"], name="fk_idempotency_keys_api_key_id_api_keys"),
        sa.ForeignKeyConstraint(
            ["request_id"],
            ["unlearn_requests.id"],
            name="fk_idempotency_keys_request_id_unlearn_requests",
            ondelete="CASCADE",
        ),
    )
    op.create_table(
        "webhooks",
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("api_key_id", sa.String(length=40), nullable=False),
        sa.Column("url", sa.String(length=2000), nullable=False),
        sa.Column("states", sa.JSON(), nullable=False),
        sa.Column("all_requests", sa.Boolean(), nullable=False, server_default=sa.false()),
        sa.Column("wrapped_key", sa.LargeBinary(), nullable=False),
        sa.Column("sealed_secret", sa.LargeBinary(), nullable=False),
        sa.Column("created_at", TIME, nullable=False),
        sa.Column("disabled_at", TIME, nullable=True),
        sa.PrimaryKeyConstraint("id", name="pk_webhooks"),
        sa.ForeignKeyConstraint(["api_key_id"], ["api_keys.id"], name="fk_webhooks_api_key_id_api_keys"),
    )
    op.create_index("ix_webhooks_api_key_id", "webhooks", ["api_key_id"])
    op.create_table(
        "webhook_deliveries",
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("webhook_id", sa.String(length=40), nullable=False),
        sa.Column("request_id", sa.String(length=40), nullable=True),
        sa.Column("payload", sa.JSON(), nullable=False),
        sa.Column("state", sa.String(length=20), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("next_at", TIME, nullable=True),
        sa.Column("created_at", TIME, nullable=False),
        sa.Column("delivered_at", TIME, nullable=True),
        sa.Column("last_status", sa.Integer(), nullable=True),
        sa.Column("last_error", sa.String(length=100), nullable=True),
        sa.PrimaryKeyConstraint("id", name="pk_webhook_deliveries"),
        sa.ForeignKeyConstraint(
            ["webhook_id"], ["webhooks.id"], name="fk_webhook_deliveries_webhook_id_webhooks", ondelete="CASCADE"
        ),
        sa.ForeignKeyConstraint(
            ["request_id"],
            ["unlearn_requests.id"],
            name="fk_webhook_deliveries_request_id_unlearn_requests",
            ondelete="CASCADE",
        ),
    )
    op.create_index("ix_webhook_deliveries_state_next_at", "webhook_deliveries", ["state", "next_at"])
    op.create_index("ix_webhook_deliveries_webhook_id_id", "webhook_deliveries", ["webhook_id", "id"])


def downgrade() -> None:
    waiting = op.get_bind().execute(sa.text("SELECT count(*) FROM pending_shreds")).scalar_one()
    if waiting:  # their ids stand nowhere else: what was shredded would open again, with an old backup
        raise RuntimeError(
            f"{waiting} key shares are still to be destroyed, and the older version cannot: let a worker run, with the "
            "key store, until `letheon vault status` shows none to be destroyed, then stop it and downgrade"
        )
    # The older version knows no such state; the texts are still there, so it can train them again.
    op.execute("UPDATE unlearn_requests SET state = 'pending' WHERE state = 'awaiting_approval'")
    for table in ("webhook_deliveries", "webhooks", "idempotency_keys", "pending_shreds", "secrets"):
        op.drop_table(table)
    op.drop_table("audit_checkpoints")
    op.drop_index("ix_audit_log_subject_seq", "audit_log")
    with op.batch_alter_table("prompts") as batch:
        for column in ("revoke_code", "revoke_asked_by", "revoke_asked_at"):
            batch.drop_column(column)
    with op.batch_alter_table("unlearn_requests") as batch:
        batch.drop_index("ix_unlearn_requests_api_key_id_id")
        batch.drop_index("ix_unlearn_requests_set_digest")
        for column in (
            "shred_at",
            "set_digest",
            "received_at",
            "due_at",
            "expires_at",
            "approval_required",
            "approved_by",
            "approved_at",
        ):
            batch.drop_column(column)
    with op.batch_alter_table("api_keys") as batch:
        for column in ("limits", "expires_at", "last_used_at"):
            batch.drop_column(column)
