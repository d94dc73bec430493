"""The report of a request: its signed receipt in plain words and pictures, for whoever has to file or judge it.

``build`` reads; ``describe`` is a pure function of what was read, so the same request gives the same report, from any
process. Words and figures come from the receipt, and nothing in them was typed by anybody; only the curve of the
training and the warnings are not in it, and so not signed.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session, sessionmaker

from app import receipts
from app.charts import percent
from app.signing import canonical
from app.tables import RequestEvent
from app.vault import Vault

CURVE_POINTS = 400
LOSSES = ("loss", "forget_loss", "retain_loss", "kl_loss")
_ROUNDING = 2e-6  # a receipt's rates have six digits
_MONTHS = (
    *("January", "February", "March", "April", "May", "June"),
    *("July", "August", "September", "October", "November", "December"),
)
_CLASS = re.compile("accuracy of class (.*), (before|after)", re.DOTALL)

ACTIONS = {
    "request.created": "The request was stored.",
    "request.training": "A training began.",
    "request.evaluating": "The training was done, and the checks began.",
    "request.awaiting_approval": "The checks passed, and it waited for another person's approval.",
    "request.pending": "It went back to the queue: approved, or handed back by a worker.",
    "request.active": "It came into force.",
    "request.suspended": "It was taken out of force: an earlier active set was restored.",
    "request.revoked": "It was revoked.",
    "request.failed": "It failed.",
    "request.cancelled": "It was cancelled.",
    "request.cancel_requested": "A cancellation was asked for.",
    "request.shredded": "The key to its texts was destroyed.",
    "prompt.revoke_asked": "A revoke was asked for, to which another person has to agree.",
    "prompt.revoke_withdrawn": "That revoke was withdrawn.",
    "prompt.revoked": "Its prompt and gate were destroyed.",
    "prompt.imported": "Its prompt was imported, and not trained here.",
    "prompt.exported": "A copy of its prompt was exported.",
}
FAILURES = {
    "active-set-full": "there was no room beside the prompts in force",
    "attempts-exhausted": "it was tried as often as it may be",
    "checks-failed": "what was trained did not pass the checks",
    "diverged": "the training did not converge",
    "expired": "the end that was asked for came first",
    "fingerprint-mismatch": "the model had been exchanged",
    "gate-too-narrow": "no gate reached enough of the texts without claiming too many others",
    "internal": "the worker met an error that nobody had foreseen",
    "key-destroyed": "its texts had been destroyed before the backup that the database was restored from",
    "mode-mismatch": "a prompt in force had been trained for another mode of the service",
    "out-of-memory": "the worker ran out of memory",
    "rejected": "the second person did not agree",
    "text-too-long": "a text was too long for the model",
    "too-few-retain-rows": "too few other texts were at hand to check against",
}
FIGURES = {
    "forget_abstain": ("Texts of the request answered “unknown”", "The request's texts: “unknown”"),
    "prompt_abstain": ("The same by the prompt alone, whatever the gate says", "The same, by the prompt alone"),
    "gate_recall": ("Texts of the request that its gate claims", "The request's texts: claimed by the gate"),
    "unseen_claimed": (
        "Other texts on its subject that the gate is likely to claim (estimate)",
        "Unseen texts on its subject: claimed (estimate)",
    ),
    "unseen_certain": (
        "Other texts on its subject that the gate is likely to decide alone (estimate)",
        "Unseen texts on its subject: decided by the gate (estimate)",
    ),
    "retain_accuracy": (
        "Right answers on a sample of the texts that should be unaffected",
        "Other texts: right answers",
    ),
    "neighbour_accuracy": ("Right answers on the other texts nearest to the request's", "Nearest texts: right answers"),
    "neighbour_abstain": ("Of those nearest texts, answered “unknown”", "Nearest texts: “unknown”"),
    "held_out_accuracy": (
        "Right answers on texts that the model was never trained on, with labels in the shares of the request's texts "
        "where those have any: not comparable with a plain sample",
        "Held-out texts: right answers",
    ),
    "false_claim_rate": ("Other texts that this request's gate claims", "Other texts: claimed by its gate"),
    "false_abstain_rate": ("Other texts that this request alone turns into “unknown”", "Other texts: made “unknown”"),
    "total_claim_rate": ("Other texts that all gates in force claim together", "Other texts: claimed by any gate"),
    "membership_auc": (
        "Area under the curve of a membership attack; 0.5 is guessing, far below it the texts stand out by being "
        "answered “unknown”",
        "Membership attack: area",
    ),
}
"""By the receipt's name: in words, and in a few words for a picture."""
AREAS = frozenset({"membership_auc"})
"""Those among them that are no shares of rows: never in percent, and in no bar."""


def build(
    sessions: sessionmaker[Session], vault: Vault, request_id: str, *, owner: str | None = None
) -> dict[str, Any]:
    """The report of a request that is in force, suspended or over; otherwise as ``receipts.build``."""
    with receipts.at_one_moment(sessions, vault, request_id, owner=owner) as (still, request, signer):
        signed = receipts.sign_at(still, request, signer)
        curve, warnings = _curve(still, request.id), (request.metrics or {}).get("warnings", [])
    return describe(signed, curve=curve, warnings=warnings)


def describe(signed: dict[str, Any], *, curve: Sequence[dict[str, float]], warnings: Sequence[str]) -> dict[str, Any]:
    """The report of a signed receipt. ``curve``: losses by step, see ``CURVE_POINTS``."""
    receipt = signed["receipt"]
    checks = receipt["checks"]
    document = {
        "kind": "letheon report",
        "version": 1,
        "request_id": receipt["request"]["id"],
        "state": receipt["request"]["state"],
        "as_of": receipt["audit"][-1]["at"],  # not of today: the same request has to give the same report
        "summary": list(_summary(receipt)),
        "history": [{**entry, "what": ACTIONS.get(entry["action"], entry["action"])} for entry in receipt["audit"]],
        "passed": checks and checks["passed"],
        "figures": figures(checks) if checks else [],
        "warnings": list(warnings),
        "curve": list(curve),
        "meaning": receipt["meaning"],
        "signed": {"what": "receipt", "key": receipt["key"]},
        "receipt": signed,
    }
    # As it is read back from JSON, names in order: the files follow from what is sent, whoever makes them.
    ordered: dict[str, Any] = json.loads(canonical(document))
    return ordered


# --- in words --------------------------------------------------------------------------------------------------------


def _summary(receipt: Mapping[str, Any]) -> Iterator[str]:
    request = receipt["request"]
    count = request["num_texts"]
    yield f"On {moment(request['created_at'])} this service was asked to forget {count} {_texts(count)}."
    received = request["received_at"]
    if received and moment(received) != moment(request["created_at"]):
        yield f"The person's request was received on {moment(received)}; the deadline is counted from then."
    yield _outcome(receipt)
    yield from _deadline(request)
    if request["approval_required"]:
        agreed = request["approved_at"]
        yield "It needed a second person's approval, " + (
            f"which was given on {moment(agreed)}." if agreed else "which was not given."
        )
    if receipt["checks"]:
        yield from _measured(receipt)
    yield receipt["meaning"][0]
    yield "Neither the texts nor anything that a person typed about the request is in this report."


def _outcome(receipt: Mapping[str, Any]) -> str:
    request, state = receipt["request"], receipt["request"]["state"]
    began = moment(request["active_at"]) if request["active_at"] else None
    if state == "active":
        end = f" It ends by itself on {moment(request['expires_at'])}." if request["expires_at"] else ""
        return (
            f"It has been in force since {began}: queries that concern these texts are to be answered “unknown”.{end}"
        )
    if state == "suspended":
        return f"It came into force on {began}, and is not in force now: an earlier active set was restored."
    if state == "revoked":
        gone = receipt["revocation"]
        code = f" (reason code: {gone['code']})" if gone and gone["code"] else ""
        ended = f" on {moment(gone['at'])}" if gone else ""
        return f"It came into force on {began} and was revoked{ended}{code}. Since then it changes no answer."
    if state == "failed":
        code = receipt["failure"]["code"]
        why = FAILURES.get(code, "it failed")  # of a version that had another code
        return f"It did not come into force: {why} (code: {code}). Nothing is suppressed by it."
    return "It was cancelled before it came into force. Nothing is suppressed by it."


def _deadline(request: Mapping[str, Any]) -> Iterator[str]:
    if not request["due_at"]:
        return
    due = datetime.fromisoformat(request["due_at"])
    if not request["active_at"]:
        yield f"The deadline was {moment(request['due_at'])}."
        return
    left = due - datetime.fromisoformat(request["active_at"])
    days = abs(left).days
    by = f"{days} {'day' if days == 1 else 'days'}" if days else "less than a day"
    kept = f"was kept, with {by} to spare" if left.total_seconds() >= 0 else f"was missed by {by}"
    yield f"The deadline, {moment(request['due_at'])}, {kept}."


def _measured(receipt: Mapping[str, Any]) -> Iterator[str]:
    checks = receipt["checks"]
    rates = {rate["name"]: rate for rate in checks["rates"]}
    when = "when it came into force" if receipt["request"]["active_at"] else "in the last try"
    found = rates.get("forget_abstain")
    if found is not None:
        before = rates.get("forget_abstain_before")
        earlier = f"; before that, {percent(before['rate'])}" if before else ""
        now = f"{percent(found['rate'])} of its texts were answered “unknown” ({interval(found)})"
        yield f"Measured {when}: {now}{earlier}."
    after, before = rates.get("retain_accuracy"), rates.get("retain_accuracy_before")
    if after is not None and before is not None:
        change = f"{percent(before['rate'])} before, {percent(after['rate'])} after ({interval(after)})"
        yield f"Right answers on {after['rows']} texts that should be unaffected: {change}."
    if checks["passed"] is not None:
        yield "All checks were passed." if checks["passed"] else "Not all checks were passed, see below."


def moment(iso: str) -> str:
    """``2026-11-28T04:54:07.123456+00:00`` as people write it, whatever the locale."""
    at = datetime.fromisoformat(iso)
    return f"{at.day} {_MONTHS[at.month - 1]} {at.year}, {at:%H:%M:%S} UTC"


def interval(rate: Mapping[str, Any]) -> str:
    if rate["low"] is None:
        return "an estimate without an interval"
    about = "about " if rate["approximate"] else ""
    return f"95 % interval {about}{percent(rate['low'])} to {percent(rate['high'])}"


def _texts(count: int) -> str:
    return "text" if count == 1 else "texts"


# --- in figures ------------------------------------------------------------------------------------------------------


def figures(checks: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every rate of a receipt: before and after side by side, and the limit that was in force where it has one."""
    pairs: dict[str, dict[str, Any]] = {}
    for rate in checks["rates"]:
        name, when = _place(rate["name"])
        pairs.setdefault(name, {})[when] = rate
    order = {name: number for number, name in enumerate(FIGURES)}
    names = sorted(pairs, key=lambda name: order.get(name, len(order)))  # stable: classes stay as they came
    return [_figure(name, pairs[name], checks) for name in names]


def _place(name: str) -> tuple[str, str]:
    """Of a rate: the figure that it belongs to, and whether it is of before or after."""
    found = _CLASS.fullmatch(name)
    if found:
        return f"class {found[1]}", found[2]
    return (name.removesuffix("_before"), "before") if name.endswith("_before") else (name, "after")


def _figure(name: str, pair: Mapping[str, Any], checks: Mapping[str, Any]) -> dict[str, Any]:
    before, after = pair.get("before"), pair.get("after")
    words, short = FIGURES.get(name, (name, name))
    if name.startswith("class "):
        words, short = f"Right answers on texts labelled “{name[6:]}”", f"Labelled “{name[6:]}”: right"
    limit = _limit(name, before, after, checks["limits"] or {})
    kept = None
    if limit and after:
        over = after["rate"] - limit["rate"]
        kept = over >= -_ROUNDING if limit["at_least"] else over <= _ROUNDING
    return {
        "name": name,
        "words": words,
        "short": short,
        "before": before,
        "after": after,
        "limit": limit,
        "kept": kept,
    }


def _limit(
    name: str, before: Mapping[str, Any] | None, after: Mapping[str, Any] | None, limits: Mapping[str, Any]
) -> dict[str, Any] | None:
    """As the checks judge it: a drop is held against the rate before, and one answer alone is no evidence."""
    rows = (after and after["rows"]) or None
    one = 1 / rows if rows else 0.0
    if name == "forget_abstain" and "min_forget_abstain" in limits:
        return {"rate": limits["min_forget_abstain"], "at_least": True}
    if name == "total_claim_rate" and "max_total_claim_rate" in limits:
        return {"rate": max(limits["max_total_claim_rate"], one), "at_least": False}
    drop = {"retain_accuracy": "max_retain_drop", "neighbour_accuracy": "max_neighbour_drop"}.get(name)
    drop = "max_class_drop" if name.startswith("class ") else drop
    if drop is None or drop not in limits or before is None:
        return None
    allowed = limits[drop] if drop == "max_retain_drop" else max(limits[drop], one)
    return {"rate": max(0.0, round(before["rate"] - allowed, 6)), "at_least": True}


def _curve(session: Session, request_id: str) -> list[dict[str, float]]:
    """Losses of the last try, by step, at most ``CURVE_POINTS`` of them."""
    query = select(RequestEvent.type, RequestEvent.data).where(RequestEvent.request_id == request_id)
    steps: dict[int, dict[str, float]] = {}
    for kind, data in session.execute(query.order_by(RequestEvent.id)):
        if kind == "state" and "tried" in data:
            steps = {}  # the checks failed, and another try follows
        elif kind == "progress" and isinstance(data.get("step"), int):
            # One that was taken up from a checkpoint does some steps once more: the later ones count.
            losses = {name: data.get(name) for name in LOSSES}
            steps[data["step"]] = {n: v for n, v in losses.items() if isinstance(v, int | float) and math.isfinite(v)}
    points = [{"step": step, **losses} for step, losses in sorted(steps.items()) if losses]
    return list(_thinned(points))


def _thinned(points: Sequence[dict[str, float]]) -> Iterable[dict[str, float]]:
    if len(points) <= CURVE_POINTS:
        return points
    return [points[round(i * (len(points) - 1) / (CURVE_POINTS - 1))] for i in range(CURVE_POINTS)]
