"""Signed receipts: what was asked, what was done about it, how well it works, and what it is not.

A receipt is made of what the database has for good, so the same state gives the same bytes, from any process. It holds
ids, digests, counts, times, codes and figures: no text, no reason, nothing that anybody typed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from app import audit, lifecycle
from app.audit_chain import iso
from app.errors import Conflict
from app.receipt_format import MEANING, MEMBERSHIP, sign, wilson
from app.set_history import RECORD_ONLY
from app.signing import PublicKey
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
# What each rate is over: the column of the request or the metric that counts its rows. None: an estimate, no share.
_RATES: dict[str, str | None] = {
    "forget_abstain": "num_texts",
    "forget_abstain_before": "num_texts",
    "prompt_abstain": "num_texts",
    "gate_recall": "num_texts",
    "unseen_claimed": None,
    "unseen_certain": None,
    "false_claim_rate": "check_rows",
    "total_claim_rate": "check_rows",
    "false_abstain_rate": "check_rows",
    "retain_accuracy": "retain_rows",
    "retain_accuracy_before": "retain_rows",
    "neighbour_accuracy": "neighbour_rows",
    "neighbour_accuracy_before": "neighbour_rows",
    "neighbour_abstain": "neighbour_rows",
}
_APPROXIMATE = ("retain_accuracy", "retain_accuracy_before")
_COUNTS = (
    "check_rows",
    "retain_rows",
    "neighbour_rows",
    "prompt_norm",
    "prompt_norm_mean",
    "lost_canaries",
    "active_requests",
    "steps",
    "attempt",
)


def build(session: Session, vault: Vault, request: UnlearnRequest) -> dict[str, Any]:
    """The signed receipt of a request that is in force, suspended or over.

    The caller commits: the first signature of a deployment makes its key. Raises Conflict before that, VaultError.
    """
    signer = load_signer(session, vault)
    while True:
        moved = audit.last_about(session, request.id)
        receipt = _receipt(session, lifecycle.get_request(session, request.id), signer.public)
        # Several statements: what moves the request meanwhile writes an entry, and then half of this is of before it.
        if audit.last_about(session, request.id) == moved:
            return sign(receipt, signer)


def _receipt(session: Session, request: UnlearnRequest, public: PublicKey) -> dict[str, Any]:
    state = RequestState(request.state)
    if state not in AVAILABLE:
        raise Conflict(f"a request that is {state.value} has no receipt yet", state=state.value)
    query = select(Prompt).where(Prompt.request_id == request.id).options(*RECORD_ONLY)
    prompt = session.scalars(query, execution_options={"populate_existing": True}).one_or_none()
    metrics = request.metrics or {}
    tries = metrics["earlier_tries"] if "earlier_tries" in metrics else lifecycle.list_tries(session, request.id)
    return {
        "kind": "letheon receipt",
        "version": 1,
        "request": _request(session, request, prompt),
        "model": {"fingerprint": request.fingerprint, "identity": metrics.get("identity")},
        "prompt": _prompt(prompt) if prompt else None,
        "active_set": _active_set(session, prompt) if prompt else None,
        "checks": _checks(request, metrics) if metrics else None,
        "earlier_tries": tries,
        "failure": {"code": request.failure["code"]} if request.failure else None,
        "revocation": _revocation(prompt) if prompt and prompt.revoked_at else None,
        "audit": [
            {"seq": entry.seq, "at": iso(entry.at), "action": entry.action, "hash": entry.hash}
            for entry in audit.entries_about(session, request.id, *([prompt.id] if prompt else []))
        ],
        "meaning": [*MEANING, *([MEMBERSHIP] if metrics.get("membership") else [])],
        "key": _key(public),
    }


def _request(session: Session, request: UnlearnRequest, prompt: Prompt | None) -> dict[str, Any]:
    return {
        "id": request.id,
        "state": RequestState(request.state).value,
        "num_texts": request.num_texts,
        "set_digest": (request.set_digest or _digest_of_texts(session, request.id)).hex(),
        "options": request.options,
        "asked_by": request.api_key_id,
        "created_at": iso(request.created_at),
        "due_at": _time(request.due_at),
        "active_at": _time(prompt.activated_at if prompt else None),
        "finished_at": _time(request.finished_at),
        "expires_at": _time(request.expires_at),
        "approval_required": request.approval_required,
        "approved_at": _time(request.approved_at),
        "approved_by": request.approved_by,
    }


def _digest_of_texts(session: Session, request_id: str) -> bytes:
    """Over the keyed digests of the texts, in order, so nobody without the key can try texts against it."""
    query = select(ForgetDigest.digest).where(ForgetDigest.request_id == request_id)
    digests = sorted(session.scalars(query))  # here: a database may order bytes in ways of its own
    return hashlib.sha256(b"letheon set v1\0" + b"".join(digests)).digest()


def _prompt(prompt: Prompt) -> dict[str, Any]:
    names = ("id", "mode", "num_virtual_tokens", "hidden_size", "digest", "gate_digest", "gate_space", "fingerprint")
    return {name: getattr(prompt, name) for name in names}


def _active_set(session: Session, prompt: Prompt) -> dict[str, Any]:
    """The set that the prompt came into force with, and in which versions it was."""
    query = (
        select(ActiveSetMember.from_version, ActiveSetMember.to_version, ActiveSetVersion.digest)
        .join(ActiveSetVersion, ActiveSetVersion.version == ActiveSetMember.from_version)
        .where(ActiveSetMember.prompt_id == prompt.id)
        .order_by(ActiveSetMember.from_version)
    )
    rows = session.execute(query).all()
    return {
        "version": rows[0].from_version if rows else None,  # a prompt of a database older than the history has none
        "digest": rows[0].digest if rows else None,
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
        rows = None if counted is None else request.num_texts if counted == "num_texts" else metrics.get(counted)
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
    return {"code": prompt.revoke_code, "at": _time(prompt.revoked_at), "by": prompt.revoked_by}


def _key(public: PublicKey) -> dict[str, Any]:
    return {"algorithm": "Ed25519", "id": public.key_id, "public_key": public.hex()}


def _time(at: datetime | None) -> str | None:
    return None if at is None else iso(at)
