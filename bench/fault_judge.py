"""What counts as lost, doubled or unfenced, and how much a clean run says: pure functions of what was seen."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from app.tables import AuditEntry, Prompt, RequestEvent, UnlearnRequest

ENDED = frozenset({"active", "failed", "cancelled", "revoked"})


@dataclass(frozen=True)
class History:
    """What a database says of one accepted request. ``claims``: when each attempt began, and its owner."""

    state: str | None  # None: there is no such request
    failure: str | None = None
    claims: tuple[tuple[float, str], ...] = ()
    lease_expiries: int = 0
    releases: int = 0  # and approvals, after which a worker claims it once more
    activations: int = 0
    prompts: int = 0


@dataclass
class Outcome:
    """One trial. ``reasons``: why it failed; empty where it did not."""

    lost: int = 0
    doubled: int = 0
    missed: int = 0
    leaks: int = 0
    taken_up: float | None = None
    reasons: list[str] = field(default_factory=list)
    kind: str = ""
    figures: dict[str, float] = field(default_factory=dict)  # the block shows the largest of each

    @property
    def failed(self) -> bool:
        return bool(self.lost or self.doubled or self.missed or self.leaks or self.reasons)

    def judge(self, history: History, expected: Collection[str] = ("active",), *, where: str = "") -> None:
        """Add what is wrong with this request."""
        found = verdict(history)
        self.lost += "lost" in found
        self.doubled += "doubled" in found
        self.reasons += [f"{where}{name}: {history}" for name in sorted(found)]
        if not found and history.state not in expected:
            self.reasons.append(f"{where}it ended as {history.state} ({history.failure}), not as {'/'.join(expected)}")

    def take_up(self, seconds: float | None, limit: float) -> None:
        """Of what was taken up after a fault; ``limit`` is what is promised."""
        if seconds is None:
            return
        self.taken_up = max(seconds, self.taken_up or 0.0)
        if seconds > limit:
            self.reasons.append(f"taken up after {seconds:.1f} s, not within {limit:.1f} s")


def verdict(history: History) -> set[str]:
    """``lost``: neither in force nor in a stated end. ``doubled``: in force twice, or trained twice without cause."""
    found = set()
    stated = history.state in ENDED and (history.state != "failed" or bool(history.failure))
    if not stated:
        found.add("lost")
    again = len(history.claims) - 1
    if history.prompts > 1 or history.activations > 1 or again > history.lease_expiries + history.releases:
        found.add("doubled")
    if history.state == "active" and not history.prompts:
        found.add("lost")
    return found


def read_history(session: Session, request_id: str) -> History:
    row = session.get(UnlearnRequest, request_id, populate_existing=True)
    if row is None:
        return History(None)
    entries = session.execute(
        select(AuditEntry.at, AuditEntry.actor, AuditEntry.action, AuditEntry.detail)
        .where(AuditEntry.subject == request_id)
        .order_by(AuditEntry.seq)
    ).all()
    claims = [
        (e.at.timestamp(), e.actor) for e in entries if e.action == "request.training" and "tried" not in e.detail
    ]
    return History(
        state=row.state,
        failure=row.failure["code"] if row.failure else None,
        claims=tuple(claims),
        lease_expiries=row.lease_expiries,
        releases=sum(e.detail.get("why") in ("released", "approved") for e in entries),
        activations=sum(e.action == "request.active" and e.detail.get("from") != "suspended" for e in entries),
        prompts=session.scalars(select(func.count()).where(Prompt.request_id == request_id)).one(),
    )


def doubled_anywhere(session: Session) -> list[str]:
    """Requests that came into force more than once: of all there ever were, not only the one of this trial."""
    of_prompts = select(Prompt.request_id).group_by(Prompt.request_id).having(func.count() > 1)
    of_entries = (
        select(AuditEntry.subject)
        .where(AuditEntry.action == "request.active", AuditEntry.detail["from"].as_string() != "suspended")
        .group_by(AuditEntry.subject)
        .having(func.count() > 1)
    )
    return sorted({*session.scalars(of_prompts), *session.scalars(of_entries)})


def written_late(session: Session, request_id: str) -> int:
    """What the first owner of a request wrote after the second had claimed it."""
    history = read_history(session, request_id)
    if len(history.claims) < 2:
        return 0
    (_, first), (_, second) = history.claims[:2]
    late: int = 0
    entries = session.execute(
        select(AuditEntry.seq, AuditEntry.actor, AuditEntry.action)
        .where(AuditEntry.subject == request_id)
        .order_by(AuditEntry.seq)
    ).all()
    taken = next(e.seq for e in entries if e.actor == second and e.action == "request.training")
    late += sum(e.actor == first and e.seq > taken for e in entries)
    events = session.execute(
        select(RequestEvent.type, RequestEvent.data)
        .where(RequestEvent.request_id == request_id)
        .order_by(RequestEvent.id)
    ).all()
    attempt = 0
    for event in events:
        said: int | None = event.data.get("attempt")
        if event.type == "state" and event.data.get("state") == "training" and said is not None:
            attempt = said
        elif said is not None and said < attempt:
            late += 1
    return late


def upper_95(failures: int, trials: int) -> float:
    """With 95 % confidence the failure rate is below this (Clopper-Pearson, one-sided).

    Without a failure it is 1 − 0.05^(1/n), by the rule of three nearly 3/n. 1.0 where nothing was tried.
    """
    if trials == 0 or failures >= trials:
        return 1.0
    low, high = failures / trials, 1.0
    for _ in range(60):  # bisection: exact enough, and without a dependency
        middle = (low + high) / 2
        low, high = (middle, high) if _at_most(failures, trials, middle) > 0.05 else (low, middle)
    return high


def _at_most(failures: int, trials: int, rate: float) -> float:
    """P(X ≤ failures) of a binomial distribution."""
    term, total = (1 - rate) ** trials, 0.0
    for k in range(failures + 1):
        total += term
        term *= (trials - k) / (k + 1) * rate / (1 - rate)
    return total


def block(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """What is reported of one fault."""
    failures = sum(outcome.failed for outcome in outcomes)
    taken = [outcome.taken_up for outcome in outcomes if outcome.taken_up is not None]
    figures: dict[str, float] = {}
    for outcome in outcomes:
        for name, value in outcome.figures.items():
            figures[name] = max(value, figures.get(name, value))
    kinds: dict[str, int] = {}
    for outcome in outcomes:
        kinds[outcome.kind] = kinds.get(outcome.kind, 0) + 1
    return {
        "trials": len(outcomes),
        "failures": failures,
        "upper_95": round(upper_95(failures, len(outcomes)), 6),
        "lost": sum(outcome.lost for outcome in outcomes),
        "doubled": sum(outcome.doubled for outcome in outcomes),
        "taken_up_seconds_max": round(max(taken), 2) if taken else None,
        **{name: round(value, 3) for name, value in figures.items()},
        "kinds": dict(sorted(kinds.items())),
        "reasons": [reason for outcome in outcomes for reason in outcome.reasons][:20],
    }
