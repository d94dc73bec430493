"""Gates beside the prompts, prompts that can be shredded, and the history of the active set.

Prompts that are there were trained to be concatenated and are marked so. History begins with the set in force.
"""

from __future__ import annotations

import json
from hashlib import sha256

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

TIME = sa.DateTime(timezone=True)


def upgrade() -> None:
    op.create_table(
        "gate_spaces",
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("source", sa.String(length=64), nullable=False),
        sa.Column("created_at", TIME, nullable=False),
        sa.Column("data", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("digest", name="pk_gate_spaces"),
        sa.UniqueConstraint("source", name="uq_gate_spaces_source"),
    )
    with op.batch_alter_table("prompts") as batch:
        batch.add_column(sa.Column("mode", sa.String(length=20), nullable=False, server_default="concatenate"))
        batch.add_column(sa.Column("gate_digest", sa.String(length=64), nullable=True))
        batch.add_column(sa.Column("gate_space", sa.String(length=64), nullable=True))
        batch.add_column(sa.Column("sealed_gate", sa.LargeBinary(), nullable=True))
        batch.add_column(sa.Column("sealed_canaries", sa.LargeBinary(), nullable=True))
        batch.create_foreign_key("fk_prompts_gate_space_gate_spaces", "gate_spaces", ["gate_space"], ["digest"])
        batch.alter_column("wrapped_key", existing_type=sa.LargeBinary(), nullable=True)
        batch.alter_column("sealed", existing_type=sa.LargeBinary(), nullable=True)
    with op.batch_alter_table("prompts") as batch:
        batch.alter_column("mode", existing_type=sa.String(length=20), server_default=None)
    # Revoked prompts are shredded from now on, so those that were revoked before are as well.
    op.execute("UPDATE prompts SET wrapped_key = NULL, sealed = NULL WHERE state = 'revoked'")
    op.create_table(
        "active_set_versions",
        sa.Column("version", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("size", sa.Integer(), nullable=False),
        sa.Column("created_at", TIME, nullable=False),
        sa.Column("created_by", sa.String(length=100), nullable=False),
        sa.Column("reason", sa.String(length=500), nullable=True),
        sa.Column("checks", sa.JSON(), nullable=True),
        sa.PrimaryKeyConstraint("version", name="pk_active_set_versions"),
    )
    op.create_table(
        "active_set_members",
        sa.Column("prompt_id", sa.String(length=40), nullable=False),
        sa.Column("from_version", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("to_version", sa.Integer(), nullable=True),
        sa.ForeignKeyConstraint(["prompt_id"], ["prompts.id"], name="fk_active_set_members_prompt_id_prompts"),
        sa.PrimaryKeyConstraint("prompt_id", "from_version", name="pk_active_set_members"),
    )
    op.execute(
        "INSERT INTO active_set_versions (version, digest, size, created_at, created_by) "
        "SELECT version, digest, (SELECT count(*) FROM prompts WHERE state = 'active'), updated_at, 'system' "
        "FROM active_set"
    )
    op.execute(
        "INSERT INTO active_set_members (prompt_id, from_version) "
        "SELECT prompts.id, active_set.version FROM prompts, active_set WHERE prompts.state = 'active'"
    )


def downgrade() -> None:
    """Prompts that have a gate, or were shredded, cannot be expressed before, nor can a suspended one.

    They go, their requests become revoked, and the active set is the one of the prompts that stay.
    """
    op.drop_table("active_set_members")
    op.drop_table("active_set_versions")
    op.execute(
        "UPDATE unlearn_requests SET state = 'revoked' WHERE state IN ('active', 'suspended') AND id IN (SELECT "
        "request_id FROM prompts WHERE mode <> 'concatenate' OR sealed IS NULL OR state = 'suspended')"
    )
    op.execute("DELETE FROM prompts WHERE mode <> 'concatenate' OR sealed IS NULL OR state = 'suspended'")
    connection = op.get_bind()
    query = sa.text("SELECT digest FROM prompts WHERE state = 'active' ORDER BY position")
    left = json.dumps([row.digest for row in connection.execute(query)], separators=(",", ":"))
    update = sa.text("UPDATE active_set SET digest = :digest, version = version + 1")
    connection.execute(update, {"digest": sha256(left.encode()).hexdigest()})
    with op.batch_alter_table("prompts") as batch:
        batch.drop_constraint("fk_prompts_gate_space_gate_spaces", type_="foreignkey")
        batch.alter_column("sealed", existing_type=sa.LargeBinary(), nullable=False)
        batch.alter_column("wrapped_key", existing_type=sa.LargeBinary(), nullable=False)
        batch.drop_column("sealed_canaries")
        batch.drop_column("sealed_gate")
        batch.drop_column("gate_space")
        batch.drop_column("gate_digest")
        batch.drop_column("mode")
    op.drop_table("gate_spaces")
