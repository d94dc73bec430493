"""API keys and webhooks that have ended, told to the key store: a restored backup must not bring them back to life.

The main database is what says so, and is asked again and again; the key store, which no backup holds, remembers it.
"""

from __future__ import annotations

from sqlalchemy import select
from sqlalchemy.orm import Session, sessionmaker

from app import db, keys, webhook_queue
from app.keystore import CHUNK, KeyStore
from app.tables import ApiKey, Webhook, utcnow

CODE = "reconciled"


def tell(sessions: sessionmaker[Session], keystore: KeyStore, told: set[str]) -> None:
    """Have the key store know what has ended. ``told``: what it knows already; grows. Raises KeyStoreAway."""
    with sessions() as session:
        ended = set(session.scalars(select(ApiKey.id).where(ApiKey.revoked_at.is_not(None))))
        ended |= set(session.scalars(select(Webhook.id).where(Webhook.disabled_at.is_not(None))))
    if new := sorted(ended - told):
        keystore.add_ended(new)
        told |= ended


def end_again(session: Session, keystore: KeyStore) -> tuple[int, int]:
    """Revoke keys and disable webhooks that a backup has brought back: how many of each. Raises KeyStoreAway."""
    ended = sorted(keystore.ended())
    db.begin_write(session)
    # All rows are locked before the first audit entry, whose lock is global; other processes may start as well.
    api_keys, webhooks = list[str](), list[Webhook]()
    for start in range(0, len(ended), CHUNK):
        part = ended[start : start + CHUNK]
        alive = select(ApiKey.id).where(ApiKey.id.in_(part), ApiKey.revoked_at.is_(None)).order_by(ApiKey.id)
        api_keys += session.scalars(alive.with_for_update())
        enabled = select(Webhook.id).where(Webhook.id.in_(part), Webhook.disabled_at.is_(None)).order_by(Webhook.id)
        webhooks += [webhook_queue.lock_webhook(session, webhook_id) for webhook_id in session.scalars(enabled).all()]
    for key_id in api_keys:
        keys.revoke_key(session, key_id, actor="system", detail={"code": CODE})
    for webhook in webhooks:
        webhook_queue.disable(session, webhook, actor="system", why=CODE, now=utcnow())
    return len(api_keys), len(webhooks)
