"""What happens before anything is served: the keys are checked, and a restored backup is brought up to date.

A backup may bring back what was revoked or shredded after it was made. Its keys do not open, because their shares are
destroyed; the key store's tombstones say so, and the rows are made to say it as well. So it is with what has ended
without that (``app.ended``).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, TypeVar

from sqlalchemy import select
from sqlalchemy.orm import Session, sessionmaker

from app import active_set, audit, ended, evidence, lifecycle, set_history, shredding
from app.audit_chain import iso
from app.errors import KeyDestroyed, ShareMissing, VaultError
from app.failpoints import failpoint
from app.keystore import CHUNK
from app.lifecycle import end_failed, lock_request, move
from app.tables import Prompt, PromptState, RequestState, UnlearnRequest, Webhook, utcnow
from app.vault import ANOTHER_KEY, Vault, share_id

log = logging.getLogger(__name__)

CODE = "reconciled"
KEY_DESTROYED = "key-destroyed"
NO_KEY_STORE = (
    "there is no key store: what is shredded still opens with the master key, in backups of this database, in its "
    "write-ahead log and until it is vacuumed; set LETHEON_KEYSTORE_URL (docs/keys-and-backups.md)"
)
_DETAIL = "its texts were shredded after the backup that this database was restored from: submit it again"
_WRAPPED = (Prompt.wrapped_key, UnlearnRequest.wrapped_key, Webhook.wrapped_key)

T = TypeVar("T", Prompt, Webhook)


@dataclass(frozen=True)
class Reconciled:
    """How many rows a restored backup had brought back."""

    revoked: int = 0
    failed: int = 0
    shredded: int = 0


def make_ready(sessions: sessionmaker[Session], vault: Vault) -> None:
    """Raises VaultError (wrong master key or key store), NotReady (the key store cannot be reached); then do not start.

    From then on what these sessions shred is destroyed in the key store after the commit.
    """
    if vault.keystore is not None:
        vault.keystore.check()
    else:
        log.warning(NO_KEY_STORE)
    with sessions() as session:
        check_master_key(session, vault)
    with sessions.begin() as session:
        vault.adopt(session)
    shredding.attach(sessions, vault)
    shredding.finish(sessions, vault)
    with sessions.begin() as session:
        found = reconcile(session, vault)
        if found != Reconciled():
            failpoint("reconcile.before_commit")
    if found != Reconciled():
        failpoint("reconcile.after_commit")
        log.warning(
            "this database is an older state: %d prompts were revoked since, %d requests lost their key, %d more texts "
            "were shredded; it says so now",
            found.revoked,
            found.failed,
            found.shredded,
        )
    if vault.keystore is not None:
        with sessions.begin() as session:
            again = ended.end_again(session, vault.keystore)
        ended.tell(sessions, vault.keystore, set())
        if any(again):
            log.warning(
                "this database is an older state: %d API keys, %d webhooks and %d requests had ended; they have again",
                *again,
            )


def check_master_key(session: Session, vault: Vault) -> None:
    """Raises VaultError when what is sealed here was sealed under another master key, or needs another key store.

    Better known at the start than from requests that fail one after another, their texts shredded.
    """
    for table in (Prompt, UnlearnRequest):
        query = select(table.wrapped_key).where(table.wrapped_key.is_not(None)).order_by(table.id.desc())
        with closing(session.execute(query.execution_options(yield_per=20))) as newest_first:
            for row in newest_first:
                assert row.wrapped_key is not None
                try:
                    vault.seal(row.wrapped_key, b"", aad="")
                except KeyDestroyed:
                    continue  # a backup came back; it says nothing of the master key, and ``reconcile`` sees to it
                except ShareMissing:
                    raise
                except VaultError:
                    raise VaultError(ANOTHER_KEY) from None
                break


def reconcile(session: Session, vault: Vault) -> Reconciled:
    """Let the rows follow the key store. Raises ShareMissing, and then changes nothing.

    A prompt whose share is destroyed was revoked; a request that goes on without its key has failed; texts that were
    kept are shredded. A share that the key store has never heard of is no revocation: that is another key store.
    """
    dead = _dead(session, vault)
    if not any(dead.values()):
        return Reconciled()
    for row_id in sorted(dead[UnlearnRequest]):  # before the active set, as a worker that activates does
        lock_request(session, row_id)
    current = active_set.lock_active_set(session)
    prompts = _read(session, Prompt, dead[Prompt])  # again, now that nobody else can revoke them
    requests = {
        row_id: lock_request(session, row_id)
        for row_id in sorted({*dead[UnlearnRequest], *(prompt.request_id for prompt in prompts)})
    }
    texts = [requests[row_id] for row_id in dead[UnlearnRequest] if requests[row_id].wrapped_key is not None]
    now = utcnow()
    for request in texts:
        lifecycle.shred(session, request)
    webhooks = [hook for hook in _read(session, Webhook, dead[Webhook]) if hook.disabled_at is None]
    for webhook in webhooks:
        webhook.disabled_at = now
    in_force = any(prompt.state == PromptState.ACTIVE for prompt in prompts)
    for prompt in prompts:
        prompt.state = PromptState.REVOKED
        shredding.destroy_key(session, prompt.wrapped_key)
        prompt.wrapped_key = prompt.sealed = prompt.sealed_gate = prompt.sealed_canaries = None
        evidence.drop(session, prompt.request_id)
        prompt.revoked_at, prompt.revoked_by, prompt.revoke_code = now, "system", CODE
    version = active_set.bump(session, current, actor="system", now=now) if in_force else current.version
    for prompt in prompts:
        detail: dict[str, Any] = {"prompt_digest": prompt.digest, "active_set_version": version, "code": CODE}
        detail |= {"active_set_digest": current.digest, "revoked_at": iso(now)}
        audit.append(session, actor="system", action="prompt.revoked", subject=prompt.id, detail=detail)
        detail = {"prompt_id": prompt.id, "active_set_version": version, "code": CODE}
        move(session, requests[prompt.request_id], RequestState.REVOKED, actor="system", detail=detail, now=now)
    failed = [request for request in texts if RequestState.FAILED in lifecycle.TRANSITIONS[RequestState(request.state)]]
    for request in failed:
        end_failed(session, request, actor="system", code=KEY_DESTROYED, detail=_DETAIL, now=now)
    kept = [request for request in texts if request not in failed]
    for request in kept:
        audit.append(session, actor="system", action="request.shredded", subject=request.id, detail={"code": CODE})
    for webhook in webhooks:
        audit.append(session, actor="system", action="webhook.disabled", subject=webhook.id, detail={"code": CODE})
    return Reconciled(len(prompts), len(failed), len(kept))


def _dead(session: Session, vault: Vault) -> dict[Any, list[str]]:
    """Ids of the rows whose share is destroyed, by table. Raises ShareMissing when one is unknown to the key store."""
    owners: dict[bytes, tuple[Any, str]] = {}
    for column in _WRAPPED:
        table: Any = column.class_
        for row_id, wrapped in session.execute(select(table.id, column).where(column.is_not(None))):
            found = share_id(wrapped)
            if found is not None:
                owners[found] = table, row_id
    dead: dict[Any, list[str]] = {column.class_: [] for column in _WRAPPED}
    if not owners:
        return dead
    if vault.keystore is None:
        raise ShareMissing(
            f"{len(owners)} keys of this database need a key share, and no key store is configured: set "
            "LETHEON_KEYSTORE_URL to the one that it was used with"
        )
    known = vault.keystore.destroyed(owners)
    if missing := len(owners) - len(known):
        raise ShareMissing(
            f"the key store does not know the shares of {missing} of the {len(owners)} keys of this database: "
            "LETHEON_KEYSTORE_URL names another key store, or this one was lost. Name the one that the database was "
            "used with, or restore it from its own copy (docs/keys-and-backups.md); nothing was changed"
        )
    for found, (table, row_id) in owners.items():
        if known[found] is not None:
            dead[table].append(row_id)
    return dead


def _read(session: Session, table: type[T], ids: Sequence[str]) -> list[T]:
    """The rows that still hold a key."""
    found: list[T] = []
    for start in range(0, len(ids), CHUNK):
        query = select(table).where(table.id.in_(ids[start : start + CHUNK]), table.wrapped_key.is_not(None))
        if table is Prompt:
            query = query.options(*set_history.RECORD_ONLY)
        found += session.scalars(query.execution_options(populate_existing=True))
    return found
