"""What a second person, a client, an operator or the clock changes, and what follows a change: the process that is at
it dies on either side of its commit, and then it is asked again, or another process goes on."""

from __future__ import annotations

import random
from collections.abc import Callable

from sqlalchemy import select

from app import active_set, audit
from app.tables import AuditEntry, Prompt
from app.vault import share_id
from bench.fault_judge import ENDED, Outcome
from bench.fault_kills import ENDLESS
from bench.fault_messages import judge_messages, kept_ears
from bench.fault_outages import kept_worker
from bench.fault_rotation import die_in_rotation
from bench.fault_site import TAKE_UP, Site, in_force
from bench.fault_steps import (
    WAITS,
    active,
    answer,
    asked_by,
    committed,
    die_answering,
    die_working,
    expect,
    expire,
    judge_approved,
    judge_half_shredded,
    judge_revoked,
    judge_shares,
    send_home,
    state_of,
    succeed,
    to_revoke,
    version,
    waiting,
)

Trial = Callable[[Site, str, Outcome], None]


def kill_in_change(site: Site, number: int, draw: random.Random) -> Outcome:
    """One process dies at one named point. Every message of it all arrives, and what was to be destroyed is."""
    kind, trial, point, hits = CHANGES[number // 2 % len(CHANGES)]
    outcome = Outcome(kind=kind)
    ears = kept_ears(site)
    trial(site, f"{point}:{draw.randint(1, hits)}", outcome)
    kept_worker(site)
    judge_messages(site, ears, outcome)
    judge_shares(site, outcome)
    site.read(audit.verify)
    return site.finish(outcome)


# --- approval --------------------------------------------------------------------------------------------------------


def die_before_it_waits(site: Site, point: str, outcome: Outcome) -> None:
    """A worker has trained what somebody has to approve; the next one waits for the approval, and then it comes."""
    send_home(site)
    request_id = site.submit(approval=True)
    succeed(site, point, outcome, lambda: state_of(site, request_id) in (WAITS, *ENDED))
    answer(site, f"/unlearn-requests/{request_id}/approve", (200,), outcome, key=site.second_key)
    judge_approved(site, request_id, outcome)


def die_approving(site: Site, point: str, outcome: Outcome) -> None:
    request_id, path = waiting(site, "approve")
    answer(site, path, (403,), outcome)  # not the key that asked for it
    died = die_answering(site, point, path, None, outcome, key=site.second_key)
    if committed(point):
        answer(site, path, (409,), outcome, key=site.second_key)
    else:
        expect(state_of(site, request_id) == WAITS, "approved without a commit", outcome)
        answer(site, path, (200,), outcome, key=site.second_key)
    history = judge_approved(site, request_id, outcome)
    if committed(point):
        outcome.take_up(min((at - died for at, _ in history.claims if at > died), default=None), TAKE_UP)


def die_rejecting(site: Site, point: str, outcome: Outcome) -> None:
    request_id, path = waiting(site, "reject")
    body = {"reason": "not the person's own"}
    die_answering(site, point, path, body, outcome, key=site.second_key)
    answer(site, path, (409,) if committed(point) else (200,), outcome, body, key=site.second_key)
    history = site.wait_end(request_id)
    outcome.judge(history, ("failed",))
    expect(history.failure == "rejected", f"stated as {history.failure}", outcome)


# --- cancel and expiry -----------------------------------------------------------------------------------------------


def die_cancelling_a_training(site: Site, point: str, outcome: Outcome) -> None:
    kept_worker(site)
    request_id = site.submit(training_deadline_seconds=ENDLESS)
    site.wait_checkpoint(request_id)
    path = f"/unlearn-requests/{request_id}/cancel"
    die_answering(site, point, path, None, outcome)
    if not committed(point):
        expect(state_of(site, request_id) == "training", "cancelled without a commit", outcome)
    # Asked for twice it is asked for once, until the worker has heard of it.
    answer(site, path, (200, 409) if committed(point) else (200,), outcome)
    outcome.judge(site.wait_end(request_id), ("cancelled",))


def die_cancelling_what_waits(site: Site, point: str, outcome: Outcome) -> None:
    request_id, path = waiting(site, "cancel")
    die_answering(site, point, path, None, outcome)
    answer(site, path, (409,) if committed(point) else (200,), outcome)
    outcome.judge(site.wait_end(request_id), ("cancelled",))


def die_at_the_end_of_a_prompt(site: Site, point: str, outcome: Outcome) -> None:
    """It expires while it is in force, and the reaper that revokes it dies."""
    request_id = active(site, outcome)
    send_home(site)
    expire(site, request_id)
    succeed(site, point, outcome, lambda: state_of(site, request_id) == "revoked")
    outcome.judge(site.history(request_id), ("revoked",))
    expect(not site.read(in_force), "in force after its end", outcome)


def die_at_the_end_of_what_waits(site: Site, point: str, outcome: Outcome) -> None:
    request_id, _ = waiting(site, "approve")
    send_home(site)
    expire(site, request_id)
    succeed(site, point, outcome, lambda: state_of(site, request_id) in ENDED)
    history = site.history(request_id)
    outcome.judge(history, ("failed",))
    expect(history.failure == "expired", f"stated as {history.failure}", outcome)


# --- what is in force ------------------------------------------------------------------------------------------------


def die_restoring(site: Site, point: str, outcome: Outcome) -> None:
    """An earlier set comes back once, whole or not at all; then the later one does."""
    requests, versions = [], []
    for _ in range(2):
        requests.append(active(site, outcome))
        versions.append(version(site))
    both: list[str] = site.read(in_force)
    path, body = f"/admin/active-sets/{versions[0]}/restore", {"reason": "bench"}
    die_answering(site, point, path, body, outcome)
    expect(site.read(in_force) == (both[:1] if committed(point) else both), "restored in part", outcome)
    expect(version(site) == versions[1] + committed(point), f"version {version(site)} after the kill", outcome)
    answer(site, path, (409,) if committed(point) else (200,), outcome, body)
    site.read(active_set.read_members)  # raises NotReady where they are not those of the digest
    restored = select(AuditEntry.seq).where(AuditEntry.action == "active_set.restored")
    times = len(site.read(lambda s: s.scalars(restored.where(AuditEntry.subject == f"version {versions[0]}")).all()))
    outcome.doubled += times > 1
    expect(times == 1, f"restored {times} times", outcome)
    answer(site, f"/admin/active-sets/{versions[1]}/restore", (200,), outcome, body)
    expect(site.read(in_force) == both, "the later set did not come back", outcome)
    for request_id in requests:
        outcome.judge(site.history(request_id))


def die_asking_to_revoke(site: Site, point: str, outcome: Outcome) -> None:
    """Where a revoke takes two persons: the first one's call."""
    request_id = active(site, outcome)
    prompt_id, path, body = to_revoke(site)
    die_answering(site, point, path, body, outcome, revoke_needs_two=True)
    expect(bool(asked_by(site, prompt_id)) == committed(point), "asked for without a commit, or not", outcome)
    answer(site, path, (409,) if committed(point) else (202,), outcome, body, revoke_needs_two=True)
    answer(site, path, (200,), outcome, body, key=site.second_key, revoke_needs_two=True)
    judge_revoked(site, request_id, prompt_id, outcome)


def die_agreeing_to_revoke(site: Site, point: str, outcome: Outcome) -> None:
    """The second one's."""
    request_id = active(site, outcome)
    prompt_id, path, body = to_revoke(site)
    answer(site, path, (202,), outcome, body, revoke_needs_two=True)
    die_answering(site, point, path, body, outcome, key=site.second_key, revoke_needs_two=True)
    expect(bool(site.read(in_force)) != committed(point), "in force after a revoke, or out of force without", outcome)
    wanted = (409,) if committed(point) else (200,)
    answer(site, path, wanted, outcome, body, key=site.second_key, revoke_needs_two=True)
    judge_revoked(site, request_id, prompt_id, outcome)


# --- what follows a commit -------------------------------------------------------------------------------------------


def die_shredding_texts(site: Site, point: str, outcome: Outcome) -> None:
    """A worker has put a prompt in force, and the key of its texts is about to be destroyed."""
    send_home(site)
    request_id = site.submit()
    die_working(site, point, outcome)
    judge_half_shredded(site, point, site.shares[request_id], outcome)
    outcome.judge(site.wait_end(request_id))


def die_shredding_a_prompt(site: Site, point: str, outcome: Outcome) -> None:
    """An API has revoked a prompt; a worker that starts later destroys what it left."""
    request_id = active(site, outcome)
    send_home(site)
    prompt_id, path, body = to_revoke(site)
    share = share_id(site.read(lambda s: s.scalar(select(Prompt.wrapped_key).where(Prompt.id == prompt_id))))
    assert share is not None
    die_answering(site, point, path, body, outcome)
    judge_half_shredded(site, point, share, outcome)
    outcome.judge(site.wait_end(request_id), ("revoked",))


def die_sending(site: Site, point: str, outcome: Outcome) -> None:
    """A worker dies with messages in its hands. The request that it trained goes on, and so do the messages."""
    send_home(site)
    request_id = site.submit()
    die_working(site, point, outcome)
    kept_worker(site)
    outcome.judge(site.wait_end(request_id))


def both(*names: str) -> tuple[str, ...]:
    return tuple(f"{name}.{side}" for name in names for side in ("before_commit", "after_commit"))


_SHARES = ("shares.pending", "shares.destroyed")
CHANGES: tuple[tuple[str, Trial, str, int], ...] = tuple(
    (f"{point} ({kind})" if kind else point, trial, point, hits)
    for kind, trial, points, hits in (
        ("", die_before_it_waits, both("keep", "await_approval"), 1),
        ("in force", die_at_the_end_of_a_prompt, both("expire"), 1),
        ("awaiting approval", die_at_the_end_of_what_waits, both("expire"), 1),
        ("a worker's", die_shredding_texts, _SHARES, 1),
        ("an API's", die_shredding_a_prompt, _SHARES, 1),
        ("", die_sending, both("webhook_claim"), 2),
        ("", die_sending, both("webhook_record"), 3),
        ("", die_approving, both("approve"), 1),
        ("", die_rejecting, both("reject"), 1),
        ("in training", die_cancelling_a_training, both("request_cancel"), 1),
        ("awaiting approval", die_cancelling_what_waits, both("request_cancel"), 1),
        ("", die_restoring, both("restore"), 1),
        ("the first of two", die_asking_to_revoke, both("revoke"), 1),
        ("the second of two", die_agreeing_to_revoke, both("revoke"), 1),
        ("", die_in_rotation, both("rotate"), 7),
    )
    for point in points
)
"""What is tried, at which point, and at the how manieth time at most."""
