"""An old backup is restored, from before something was revoked and shredded."""

from __future__ import annotations

import random
import shutil
import signal
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import psycopg
from psycopg import sql
from sqlalchemy import make_url, select

from app import active_set, lifecycle
from app.errors import VaultError
from app.lifecycle import texts_aad
from app.tables import Prompt, UnlearnRequest
from bench.fault_judge import Outcome
from bench.fault_processes import FaultFailed
from bench.fault_site import Bench, Site, in_force


def restore_backup(bench: Bench, number: int, draw: random.Random) -> Outcome:
    """Backup, revoke and shred, restore. Nothing shredded opens, and the API is ready only with the set of today.

    In the backup: two prompts in force and one request that waits. After it one prompt is revoked and the request is
    cancelled. The key store is a file of its own, which no backup of the database holds.
    """
    backend = ("postgresql", "sqlite")[number % 2]
    outcome = Outcome(kind=backend)
    with bench.site(backend) as site:
        kept, gone = site.submit(), site.submit()
        worker = site.worker()
        for request_id in (kept, gone):
            outcome.judge(site.wait_end(request_id))
        worker.kill()
        waiting = site.submit(ring=False)
        prompts = {row.request_id: row.id for row in site.read(active_set.active_prompts)}
        if set(prompts) != {kept, gone}:
            return Outcome(kind=backend, reasons=[f"{len(prompts)} prompts in force before the backup"])
        backup = back_up(site)
        with site.sessions.begin() as session:
            active_set.revoke_prompt(session, prompts[gone], actor="bench", reason=None)
        with site.sessions.begin() as session:
            lifecycle.request_cancel(session, waiting, actor="bench")
        restore(site, backup)
        for what in readable(site, waiting, prompts[gone]):
            outcome.leaks += 1
            outcome.reasons.append(f"of the backup, {what} opens with the master key")
        point = draw.choice(("reconcile.before_commit", "reconcile.after_commit"))
        victim = site.worker(point)  # dies while it brings the rows up to date, and the API goes on from there
        if not victim.ended(60) or victim.status != -signal.SIGKILL:
            outcome.reasons.append(f"{point}: status {victim.status}: {victim.output()[-400:]}")
            victim.kill()
        try:
            api = site.api()  # returns when /readyz says so
        except FaultFailed as error:
            outcome.reasons.append(f"the API does not start on the backup: {error}")
            return outcome
        answer = api.client.get("/admin/prompts", params={"state": "active"})
        said = [item["id"] for item in answer.json()["items"]]
        left = site.read(in_force)
        if said != [prompts[kept]] or left != said:
            outcome.reasons.append(f"ready with {len(left)} prompts in force; of the two one was revoked")
        state = site.history(waiting).state
        if state not in ("failed", "cancelled"):
            outcome.reasons.append(f"the request whose texts were shredded is {state} again")
    return outcome


def back_up(site: Site) -> Path | str:
    """A copy of the database alone: a file, or a database beside it."""
    if site.kind == "sqlite":
        target = site.home / "backup.db"
        with closing(sqlite3.connect(site.home / "letheon.db")) as source, closing(sqlite3.connect(target)) as copy:
            source.backup(copy)
        return target
    name = f"{database_of(site)}_backup"
    copy_database(site, database_of(site), name)
    return name


def restore(site: Site, backup: Path | str) -> None:
    dispose(site)
    if isinstance(backup, Path):
        for suffix in ("", "-wal", "-shm"):
            (site.home / f"letheon.db{suffix}").unlink(missing_ok=True)
        shutil.move(backup, site.home / "letheon.db")
    else:
        copy_database(site, backup, database_of(site))


def copy_database(site: Site, source: str, target: str) -> None:
    """``target`` becomes what ``source`` is, by PostgreSQL's own copy of its files."""
    dispose(site)
    admin = make_url(site.settings.database_url).set(database="postgres").render_as_string(hide_password=False)
    with psycopg.connect(admin, autocommit=True) as connection:
        connection.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(target)))
        statement = sql.SQL("CREATE DATABASE {} TEMPLATE {}")
        connection.execute(statement.format(sql.Identifier(target), sql.Identifier(source)))


def database_of(site: Site) -> str:
    name = make_url(site.settings.database_url).database
    assert name is not None
    return name


def dispose(site: Site) -> None:
    with site.sessions() as session:
        bind: Any = session.get_bind()
        bind.dispose()


def readable(site: Site, request_id: str, prompt_id: str) -> list[str]:
    """What of the shredded the master key still opens."""
    found = []
    with site.sessions() as session:
        row = session.scalars(select(UnlearnRequest).where(UnlearnRequest.id == request_id)).one()
        prompt = session.scalars(select(Prompt).where(Prompt.id == prompt_id)).one()
        if row.sealed_texts is None or prompt.sealed is None:
            raise FaultFailed("the backup was not restored")
        for name, wrapped, sealed, aad in (
            ("a text", row.wrapped_key, row.sealed_texts, texts_aad(row.id)),
            ("a prompt", prompt.wrapped_key, prompt.sealed, active_set.prompt_aad(prompt.id, prompt.digest)),
        ):
            try:
                site.vault.open(wrapped, sealed, aad=aad)
            except VaultError:
                continue
            found.append(name)
    return found
