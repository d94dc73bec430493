"""Evidence of a request: a picture and an attack (``models.evidence``), kept sealed, gone with what it is about.

Its points are made from forget texts, so they are personal data too. While the request waits for an approval they are
sealed under its own key, once it is in force under its prompt's: what shreds the one shreds the other, in backups as
well. What stays for good are the figures in the request's metrics, which are of all its texts together. Nothing here
commits.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from app.errors import Conflict, KeyDestroyed
from app.tables import OPEN, Evidence, Prompt, RequestState, UnlearnRequest, utcnow
from app.vault import Vault

_MEASURES = ("auc", "low", "high")
_OLDER = "the request has no evidence: LETHEON_EVIDENCE_TEXTS was 0, or the version that trained it made none"


@dataclass(frozen=True, repr=False)
class Found:
    """What a worker made; ``document`` None: it could not, and ``absent`` is the kind of what went wrong.

    ``held_out``: figures on texts that nobody asked to forget and the model was never trained on, where there are any.
    """

    document: dict[str, Any] | None
    absent: str | None = None
    held_out: Mapping[str, Any] = field(default_factory=dict)

    @property
    def figures(self) -> dict[str, Any]:
        """What of it goes into the request's metrics."""
        if self.document is None:
            return {"membership": None}
        attack = self.document["membership"]
        before, after = ({name: attack[view][name] for name in _MEASURES} for view in ("base", "served"))
        counts = {name: attack[name] for name in ("members", "others", "non_members")}
        return {"membership": {**counts, "before": before, "after": after}, **self.held_out}


@dataclass(frozen=True, repr=False)
class Sealed:
    """As it is stored; ``data`` None where it could not be made."""

    data: bytes | None
    absent: str | None


def seal(vault: Vault, request_id: str, wrapped: bytes, found: Found | None) -> Sealed | None:
    """For ``save``, and before anything is locked: the key store is asked. Raises VaultError, KeyStoreAway."""
    if found is None:
        return None
    if found.document is None:
        return Sealed(None, found.absent)
    data = json.dumps(found.document, separators=(",", ":"), allow_nan=False).encode()
    return Sealed(vault.seal(wrapped, data, aad=aad(request_id)), None)


def save(session: Session, request_id: str, sealed: Sealed | None) -> None:
    """Keep it in place of what there was; None: there is none any more."""
    if sealed is None:
        drop(session, request_id)
        return
    session.merge(Evidence(request_id=request_id, created_at=utcnow(), sealed=sealed.data, absent=sealed.absent))


def drop(session: Session, request_id: str) -> None:
    session.execute(
        delete(Evidence).where(Evidence.request_id == request_id),
        execution_options={"synchronize_session": False},
    )


def read(session: Session, vault: Vault, request: UnlearnRequest) -> dict[str, Any]:
    """The document, with ``request_id`` and ``created_at``. Raises VaultError, and Conflict with ``why`` without one:
    ``not-yet``, ``ended``, ``shredded``, ``could-not`` or ``not-made``."""
    # One statement: an activation between two would seal it under another key.
    query = (
        select(
            Evidence.sealed,
            Evidence.absent,
            Evidence.created_at,
            Prompt.id.label("prompt_id"),
            Prompt.wrapped_key.label("prompt_key"),
            UnlearnRequest.wrapped_key.label("request_key"),
        )
        .join(UnlearnRequest, UnlearnRequest.id == Evidence.request_id)
        .outerjoin(Prompt, Prompt.request_id == Evidence.request_id)
        .where(Evidence.request_id == request.id)
    )
    row = session.execute(query).one_or_none()
    if row is None:
        raise _none(RequestState(request.state))
    if row.sealed is None:
        raise Conflict(f"the evidence could not be made: {row.absent}", why="could-not", state=request.state)
    try:
        data = vault.open(row.request_key if row.prompt_id is None else row.prompt_key, row.sealed, aad=aad(request.id))
    except KeyDestroyed:  # revoked since the row was read, or before the backup that this database comes from
        raise _none(RequestState.REVOKED) from None
    return {"request_id": request.id, "created_at": row.created_at, **json.loads(data)}


def list_sealed(session: Session, *, limit: int) -> list[UnlearnRequest]:
    """Requests whose evidence is there to look at, newest first."""
    query = select(UnlearnRequest).join(Evidence, Evidence.request_id == UnlearnRequest.id)
    query = query.where(Evidence.sealed.is_not(None)).order_by(Evidence.request_id.desc()).limit(limit)
    return list(session.scalars(query))


def _none(state: RequestState) -> Conflict:
    if state in OPEN:
        return Conflict(f"the request is {state.value}: evidence comes with its checks", why="not-yet", state=state)
    if state == RequestState.REVOKED:
        return Conflict("the evidence was shredded with the prompt", why="shredded", state=state)
    if state in (RequestState.FAILED, RequestState.CANCELLED):
        return Conflict(f"the request ended as {state.value}: it has no evidence", why="ended", state=state)
    return Conflict(_OLDER, why="not-made", state=state)


def aad(request_id: str) -> str:
    return f"{request_id}:evidence"
