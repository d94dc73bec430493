"""``letheon vault``: which master key holds what, and moving from one to the next."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer
from sqlalchemy import func, select
from sqlalchemy.orm import Session, sessionmaker

from app import failpoints, key_file, reconcile, rotation
from app.cli_local import local_sessions
from app.cli_output import CommandGroup, JsonOption, bar, emit, note, print_table
from app.errors import Conflict, InvalidInput
from app.failpoints import failpoint
from app.settings import Settings, get_settings
from app.tables import PendingShred
from app.vault import Vault

vault_app = typer.Typer(cls=CommandGroup, no_args_is_help=True, help="The master key, its rotation, the key shares.")

Sessions = sessionmaker[Session]


@vault_app.command("new-key")
def new_key() -> None:
    """Print a fresh master key. Nothing is stored."""
    typer.echo(key_file.new_key())


@contextmanager
def _vault(settings: Settings) -> Iterator[Vault]:
    vault = Vault.from_settings(settings)
    try:
        yield vault
    finally:
        vault.close()


@vault_app.command("status")
def status(as_json: JsonOption = False) -> None:
    """How many keys are wrapped under which master key, and how many shares the key store holds."""
    settings = get_settings()
    with local_sessions(settings) as sessions, _vault(settings) as vault, sessions() as session:
        counts = rotation.tally(session, vault)
        pending = session.scalar(select(func.count()).select_from(PendingShred)) or 0
        store = vault.keystore
        live, gone = store.counts() if store is not None else (0, 0)
        spare = rotation.unreferenced(session, vault)
        place = store.place if store is not None else None
    keys = {key_id: counts.pop(key_id, 0) for key_id in vault.key_ids}
    shares = {"live": live, "tombstones": gone, "unreferenced": spare, "pending_shreds": pending}
    if as_json:
        emit({"current": vault.key_id, "keys": keys, "others": dict(counts), "key_store": place, "shares": shares})
        return
    rows = [(key_id, "current" if key_id == vault.key_id else "previous", count) for key_id, count in keys.items()]
    print_table(("master key", "", "keys under it"), [*rows, *((name, "", count) for name, count in counts.items())])
    note(f"key store: {place or 'none; wrapped keys alone open what they seal'}")
    note(f"{live} shares, {gone} destroyed, {spare} that no key needs, {pending} to be destroyed")


@vault_app.command("rotate")
def rotate(
    new_key_file: Annotated[
        bool, typer.Option("--new-key-file", help="First swap the key file under LETHEON_HOME for a new one.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Wrap every key under the current master key. May run beside the service, and again after it was cut off."""
    settings = get_settings()
    failpoints.arm(os.environ)
    if new_key_file and settings.master_key is not None:
        raise InvalidInput("--new-key-file is for the key file; here LETHEON_MASTER_KEY is set, so change that")
    with local_sessions(settings) as sessions:
        with sessions() as session:
            rotation.check_adopted(session)
        if new_key_file:
            with _vault(settings) as vault, sessions() as session:
                reconcile.check_master_key(session, vault)  # a key that opens nothing must not be put aside
            key_file.swap(settings.home)
        with _vault(settings) as vault:
            moved = _rotate(sessions, vault)
            with sessions() as session:
                left = rotation.tally(session, vault)
            _finish(settings, vault, moved, left, as_json)


def _rotate(sessions: Sessions, vault: Vault) -> Counter[str]:
    moved: Counter[str] = Counter()
    with sessions() as session:
        total = rotation.count_keys(session)
    with bar() as progress:
        task = progress.add_task("keys", total=total)
        for where in rotation.COLUMNS:
            after: str | None = ""
            while after is not None:
                with sessions.begin() as session:
                    step = rotation.rotate_some(session, vault, where, after, actor="cli")
                    failpoint("rotate.before_commit")
                failpoint("rotate.after_commit")
                after, moved[where] = step.last, moved[where] + step.moved
                progress.advance(task, step.read)
    return moved


def _finish(settings: Settings, vault: Vault, moved: Counter[str], left: Counter[str], as_json: bool) -> None:
    """Raises Conflict when keys are left that the current master key does not open."""
    wrong = {name: count for name, count in left.items() if count and name not in (vault.key_id, rotation.DESTROYED)}
    if wrong:
        detail = ", ".join(f"{count} {name}" for name, count in wrong.items())
        raise Conflict(
            f"keys are left that are not under {vault.key_id} ({detail}): a service that still runs with another key "
            "makes them. Restart every service with the new key, and run this again; keep the previous key until then"
        )
    forgotten = settings.master_key is None and key_file.forget(settings.home)
    if as_json:
        emit({"master_key": vault.key_id, "moved": dict(moved), "under_it": left[vault.key_id]})
        return
    note(f"{sum(moved.values())} keys moved, {left[vault.key_id]} are under {vault.key_id}, none under another")
    if forgotten:
        note(f"{key_file.FORMER} was removed. Backups from before need that key: keep a copy if you keep them")
    elif len(vault.key_ids) > 1:
        note("LETHEON_PREVIOUS_MASTER_KEYS may be removed now. Backups from before need that key")
