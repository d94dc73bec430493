"""Signed receipts: what was asked, what was done about it, how well it works, and what it is not.

A receipt is made of what the database has for good, so the same state gives the same bytes, from any process. It holds
ids, digests, counts, times, codes and figures: no text, no reason, nothing that anybody typed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session, sessionmaker

from app import audit, audit_state, db, lifecycle
from app.audit_chain import iso
from app.entry_facts import texts_digest, time_or_none
from app.errors import Conflict
from app.receipt_format import MEANING, MEMBERSHIP, sign, wilson
from app.set_history import RECORD_ONLY
from app.signing import PublicKey, Signer
from app.signing_key import load_signer
from app.tables import (
    ActiveSetMember,
    ActiveSetVersion,
    ForgetDigest,
    Prompt,
    RequestState,
    UnlearnRequest,
)
from app.vault import Vault

AVAILABLE = frozenset(
    {
        RequestState.ACTIVE,
        RequestState.SUSPENDED,
        RequestState.REVOKED,
        RequestState.FAILED,
        RequestState.CANCELLED,
    }
)
VERSION = 2
"""Of what is in a receipt. 1 had no ``received_at``, and no intervals of estimates."""
# What each rate is over: the column of the request or the metric that counts its rows.
_RATES: dict[str, str] = {
    "forget_abstain": "num_texts",
    "forget_abstain_before": "num_texts",
    "prompt_abstain": "num_texts",
    "gate_recall": "num_texts",
    "unseen_claimed": "unseen_rows",
    "unseen_certain": "unseen_rows",
    "false_claim_rate": "check_rows",
    "total_claim_rate": "check_rows",
    "false_abstain_rate": "check_rows",
    "retain_accuracy": "retain_rows",
    "retain_accuracy_before": "retain_rows",
    "neighbour_accuracy": "neighbour_rows",
    "neighbour_accuracy_before": "neighbour_rows",
    "neighbour_abstain": "neighbour_rows",
    "held_out_accuracy": "held_out_rows",
    "held_out_accuracy_before": "held_out_rows",
}
_APPROXIMATE = ("retain_accuracy", "retain_accuracy_before", "unseen_claimed", "unseen_certain")
_COUNTS = (
    "unseen_rows",
    "check_rows",
    "retain_rows",
    "neighbour_rows",
    "held_out_rows",
    "prompt_norm",
    "prompt_norm_mean",
    "lost_canaries",
    "active_requests",
    "steps",
    "attempt",
)


def build(
    sessions: sessionmaker[Session], vault: Vault, request_id: str, *, owner: str | None = None
) -> dict[str, Any]:
    """The signed receipt of a request that is in force, suspended or over; ``owner`` as in ``lifecycle.get_request``.

    The first one of a deployment makes its signing key, and commits it. Raises NotFound, Conflict while the request is
    open, VaultError, and AuditBroken as ``at_one_moment`` does.
    """
    with at_one_moment(sessions, vault, request_id, owner=owner) as (still, request, signer):
        return sign_at(still, request, signer)


@contextmanager
def at_one_moment(
    sessions: sessionmaker[Session], vault: Vault, request_id: str, *, owner: str | None = None
) -> Iterator[tuple[Session, UnlearnRequest, Signer]]:
    """What ``sign_at`` needs: a session that reads as of one moment, the request as it was then, and the signing key.

    What is held against the log has to be what is signed: were the rows read once more, somebody who altered them and
    put them back in a loop would get a genuine signature over theirs, and no trace would be left. The key comes first,
    and its transaction is over by then: no call holds two connections and waits for the second. Raises NotFound,
    VaultError, and AuditBroken when the log says otherwise (``audit_state.hold_request``): no altered row is signed.
    """
    with sessions.begin() as session:
        lifecycle.get_state(session, request_id, owner=owner)  # or asking for what is not there would make the key
        signer = load_signer(session, vault)
    with sessions() as session, db.snapshot(session) as still:
        audit_state.hold_request(still, request_id)  # first: it can tell of a row that cannot be read
        yield still, lifecycle.get_request(still, request_id, owner=owner), signer


def sign_at(still: Session, request: UnlearnRequest, signer: Signer) -> dict[str, Any]:
    """The receipt of a request that was held against the log ``at_one_moment``, in its session. Raises Conflict."""
    return sign(_receipt(still, request, signer.public), signer)


def _receipt(session: Session, request: UnlearnRequest, public: PublicKey) -> dict[str, Any]:
    state = RequestState(request.state)
    if state not in AVAILABLE:
        raise Conflict(f"a request that is {state.value} has no receipt yet", state=state.value)
    query = select(Prompt).where(Prompt.request_id == request.id).options(*RECORD_ONLY)
    prompt = session.scalars(query, execution_options={"populate_existing": True}).one_or_none()
    metrics = request.metrics or {}
    entries = audit.entries_about(session, request.id, *([prompt.id] if prompt else []))
    told = [entry.detail["tried"] for entry in entries if "tried" in entry.detail]
    tries = metrics.get("earlier_tries", told)
    return {
        "kind": "letheon receipt",
        "version": VERSION,
        "request": _request(session, request, prompt),
        "model": {"fingerprint": request.fingerprint, "identity": metrics.get("identity")},
        "prompt": _prompt(prompt) if prompt else None,
        "active_set": _active_set(session, prompt) if prompt else None,
        "checks": _checks(request, metrics) if metrics else None,
        "earlier_tries": tries,
        "failure": {"code": request.failure["code"]} if request.failure else None,
        "revocation": _revocation(prompt) if prompt and prompt.revoked_at else None,
        "audit": [
            {"seq": entry.seq, "at": iso(entry.at), "action": entry.action, "hash": entry.hash} for entry in entries
        ],
        "meaning": [*MEANING, *([MEMBERSHIP] if metrics.get("membership") else [])],
        "key": _key(public),
    }


def _request(session: Session, request: UnlearnRequest, prompt: Prompt | None) -> dict[str, Any]:
    texts = select(ForgetDigest.digest).where(ForgetDigest.request_id == request.id)
    return {
        "id": request.id,
        "state": RequestState(request.state).value,
        "num_texts": request.num_texts,
        "set_digest": (request.set_digest or texts_digest(session.scalars(texts))).hex(),
        "options": request.options,
        "asked_by": request.api_key_id,
        "received_at": time_or_none(request.received_at),
        "created_at": iso(request.created_at),
        "due_at": time_or_none(request.due_at),
        "active_at": time_or_none(prompt.activated_at if prompt else None),
        "finished_at": time_or_none(request.finished_at),
        "expires_at": time_or_none(request.expires_at),
        "approval_required": request.approval_required,
        "approved_at": time_or_none(request.approved_at),
        "approved_by": request.approved_by,
    }


def _prompt(prompt: Prompt) -> dict[str, Any]:
    names = ("id", "mode", "num_virtual_tokens", "hidden_size", "digest", "gate_digest", "gate_space", "fingerprint")
    return {name: getattr(prompt, name) for name in names}


def _active_set(session: Session, prompt: Prompt) -> dict[str, Any]:
    """The set that the prompt came into force with, and in which versions it was."""
    query = select(ActiveSetMember.from_version, ActiveSetMember.to_version)
    query = query.where(ActiveSetMember.prompt_id == prompt.id).order_by(ActiveSetMember.from_version)
    rows = session.execute(query).all()
    first = rows[0].from_version if rows else None  # a prompt of a database older than the history has none
    return {
        "version": first,
        "digest": session.scalar(select(ActiveSetVersion.digest).where(ActiveSetVersion.version == first)),
        "in_force": [{"from": row.from_version, "before": row.to_version} for row in rows],
    }


def _checks(request: UnlearnRequest, metrics: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "passed": metrics.get("passed"),
        "violations": metrics.get("violations", []),
        "limits": metrics.get("limits"),
        "counts": {name: metrics[name] for name in _COUNTS if name in metrics},
        "rates": [*_rates(request, metrics), *_class_rates(metrics), *_membership(metrics)],
    }


def _rates(request: UnlearnRequest, metrics: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for name, counted in _RATES.items():
        rate = metrics.get(name)
        if rate is None:
            continue
        # Requests of before there was the metric that counts have no rows, and no interval.
        rows = request.num_texts if counted == "num_texts" else metrics.get(counted)
        yield _rate(name, rate, rows, approximate=name in _APPROXIMATE)


def _class_rates(metrics: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for label, figures in sorted(metrics.get("per_class", {}).items()):
        for when in ("before", "after"):
            yield _rate(f"accuracy of class {label}, {when}", figures[when], int(figures["rows"]))


def _membership(metrics: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Of requests that have evidence: no share of rows, so with the interval that it came with."""
    found = metrics.get("membership")
    if not found:
        return
    for name, when in (("membership_auc", "after"), ("membership_auc_before", "before")):
        area = found[when]
        figures = {"rate": area["auc"], "rows": found["members"], "low": area["low"], "high": area["high"]}
        yield {"name": name, **figures, "approximate": False}


def _rate(name: str, rate: float, rows: int | None, *, approximate: bool = False) -> dict[str, Any]:
    rate = min(1.0, rate)  # a weighed mean of ones may come out a bit above
    low, high = wilson(rate, rows) if rows else (None, None)
    return {
        "name": name,
        "rate": round(rate, 6),
        "rows": rows,
        "low": None if low is None else round(low, 6),
        "high": None if high is None else round(high, 6),
        "approximate": approximate,
    }


def _revocation(prompt: Prompt) -> dict[str, Any]:
    return {"code": prompt.revoke_code, "at": time_or_none(prompt.revoked_at), "by": prompt.revoked_by}


def _key(public: PublicKey) -> dict[str, Any]:
    return {"algorithm": "Ed25519", "id": public.key_id, "public_key": public.hex()}
