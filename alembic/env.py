"""Alembic's entry: uses the connection that ``app.db`` hands over, or (command line) opens one from the settings."""

from __future__ import annotations

from alembic import context
from sqlalchemy import Connection

from app import db
from app.settings import get_settings
from app.tables import Base


def run(connection: Connection) -> None:
    context.configure(
        connection=connection,
        target_metadata=Base.metadata,
        render_as_batch=connection.dialect.name == "sqlite",
        transactional_ddl=True,  # SQLite too: the caller's BEGIN IMMEDIATE covers the whole migration
    )
    with context.begin_transaction():
        context.run_migrations()


if context.is_offline_mode():
    raise SystemExit("run the migrations on a database; --sql is not offered")
if (given := context.config.attributes.get("connection")) is not None:
    run(given)
else:
    with db.migrating(get_settings().effective_database_url) as own:
        run(own)
