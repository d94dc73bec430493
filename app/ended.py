"""What has ended, told to the key store: a restored backup must not bring it back to life.

That is API keys, webhooks, and cancelled requests whose texts are kept for a while (``keep_texts_hours``): of any other
request the destroyed share says it. The main database is what says so, and is asked again and again; the key store,
which no backup holds, remembers it.
"""

from __future__ import annotations

from sqlalchemy import select
from sqlalchemy.orm import Session, sessionmaker

from app import db, keys, lifecycle, webhook_queue
from app.keystore import CHUNK, KeyStore
from app.tables import OPEN, ApiKey, RequestState, UnlearnRequest, Webhook, utcnow

CODE = "reconciled"


def tell(sessions: sessionmaker[Session], keystore: KeyStore, told: set[str]) -> None:
    """Have the key store know what has ended. ``told``: what it knows already; grows. Raises KeyStoreAway."""
    with sessions() as session:
        ended = set(session.scalars(select(ApiKey.id).where(ApiKey.revoked_at.is_not(None))))
        ended |= set(session.scalars(select(Webhook.id).where(Webhook.disabled_at.is_not(None))))
        kept = UnlearnRequest.state == RequestState.CANCELLED, UnlearnRequest.shred_at.is_not(None)
        ended |= set(session.scalars(select(UnlearnRequest.id).where(*kept)))
    if new := sorted(ended - told):
        keystore.add_ended(new)
        told |= ended


def end_again(session: Session, keystore: KeyStore) -> tuple[int, int, int]:
    """Revoke keys, disable webhooks and cancel requests that a backup has brought back: how many of each.

    Raises KeyStoreAway.
    """
    ended = sorted(keystore.ended())
    db.begin_write(session)
    # All rows are locked before the first audit entry, whose lock is global; other processes may start as well.
    api_keys, webhooks, requests = list[str](), list[Webhook](), list[UnlearnRequest]()
    for start in range(0, len(ended), CHUNK):
        part = ended[start : start + CHUNK]
        going_on = select(UnlearnRequest.id).where(UnlearnRequest.id.in_(part), UnlearnRequest.state.in_(OPEN))
        requests += [
            lifecycle.lock_request(session, found)
            for found in session.scalars(going_on.order_by(UnlearnRequest.id)).all()
        ]
    for start in range(0, len(ended), CHUNK):
        part = ended[start : start + CHUNK]
        alive = select(ApiKey.id).where(ApiKey.id.in_(part), ApiKey.revoked_at.is_(None)).order_by(ApiKey.id)
        api_keys += session.scalars(alive.with_for_update())
        enabled = select(Webhook.id).where(Webhook.id.in_(part), Webhook.disabled_at.is_(None)).order_by(Webhook.id)
        webhooks += [webhook_queue.lock_webhook(session, webhook_id) for webhook_id in session.scalars(enabled).all()]
    requests = [request for request in requests if request.state in OPEN]  # another process may have been first
    for request in requests:
        # Their texts were kept for a while from the first cancellation on, and a restore keeps them no longer.
        lifecycle.shred(session, request)
    for key_id in api_keys:
        keys.revoke_key(session, key_id, actor="system", detail={"code": CODE})
    for webhook in webhooks:
        webhook_queue.disable(session, webhook, actor="system", why=CODE, now=utcnow())
    for request in requests:
        lifecycle.move(session, request, RequestState.CANCELLED, actor="system", detail={"code": CODE})
    return len(api_keys), len(webhooks), len(requests)
