"""What the trials of ``fault_changes`` are made of: requests brought so far, calls that end in a death, and judges."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import httpx2
from sqlalchemy import select, update
from sqlalchemy.orm import Session

from app import active_set, shredding
from app.tables import PendingShred, Prompt, PromptState, RequestEvent, UnlearnRequest, utcnow
from bench.fault_judge import ENDED, History, Outcome
from bench.fault_kills import die
from bench.fault_messages import let_leases_pass
from bench.fault_outages import expect_killed, kept_worker, post, revocations
from bench.fault_processes import FaultFailed, wait_for
from bench.fault_site import TAKE_UP, Api, Site, in_force

WAITS = "awaiting_approval"


def committed(point: str) -> bool:
    return ".after_commit" in point


def expect(held: bool, otherwise: str, outcome: Outcome) -> None:
    if not held:
        outcome.reasons.append(otherwise)


def state_of(site: Site, request_id: str) -> str | None:
    query = select(UnlearnRequest.state).where(UnlearnRequest.id == request_id)
    state: str | None = site.read(lambda session: session.scalar(query))
    return state


def version(site: Site) -> int:
    return int(site.read(active_set.read_active_set).version)


def active(site: Site, outcome: Outcome) -> str:
    """A request that is in force."""
    kept_worker(site)
    request_id = site.submit()
    outcome.judge(site.wait_end(request_id))
    return request_id


def waiting(site: Site, what: str) -> tuple[str, str]:
    """A request that awaits an approval, and the path to approve, reject or cancel it."""
    kept_worker(site)
    request_id = site.submit(approval=True)
    wait_for(lambda: state_of(site, request_id) == WAITS, "a request that awaits its approval")
    return request_id, f"/unlearn-requests/{request_id}/{what}"


def send_home(site: Site) -> None:
    """Let the worker that lives from trial to trial end, so that the one that is to die meets its point."""
    worker = site.shared.pop("worker", None)
    if worker is not None:
        worker.signal(signal.SIGTERM)
        if not worker.ended(60):
            raise FaultFailed("an idle worker did not end")
    wait_for(lambda: not site.read(pending_shreds) or shredding.finish(site.sessions, site.vault), "the shares")


def expire(site: Site, request_id: str) -> None:
    """Its time is over."""
    with site.sessions.begin() as session:
        row = update(UnlearnRequest).where(UnlearnRequest.id == request_id)
        session.execute(row.values(expires_at=utcnow()).execution_options(synchronize_session=False))


def succeed(site: Site, point: str, outcome: Outcome, done: Callable[[], Any]) -> None:
    """A worker dies at its point; the next one brings it to what is ``done``, within a lease and 15 s."""
    died = die_working(site, point, outcome)
    kept_worker(site)
    wait_for(done, "another worker to do it")
    outcome.take_up(time.time() - died, TAKE_UP)


def die_working(site: Site, point: str, outcome: Outcome) -> float:
    """The only worker dies at its point, perhaps with messages in its hands; when."""
    victim = site.worker(point)
    die(victim, outcome)
    let_leases_pass(site)
    assert victim.died is not None
    return victim.died


def die_answering(
    site: Site,
    point: str,
    path: str,
    body: dict[str, Any] | None,
    outcome: Outcome,
    *,
    key: str = "",
    **knobs: Any,
) -> float:
    """An API of its own dies while it answers; when."""
    api = site.api(point, **knobs)
    said = post(api, path, body, key=key)
    if said is not None:
        outcome.reasons.append(f"the API answered {said.status_code}, so it did not die")
    expect_killed(api, outcome)
    assert api.child.died is not None
    return api.child.died


def answer(
    site: Site,
    path: str,
    wanted: Collection[int],
    outcome: Outcome,
    body: dict[str, Any] | None = None,
    *,
    key: str = "",
    **knobs: Any,
) -> None:
    """Ask an API that lives from trial to trial."""
    name = f"api {sorted(knobs)}"
    api: Api | None = site.shared.get(name)
    if api is None or api.child.ended():
        api = site.shared[name] = site.api(**knobs)
    said: httpx2.Response | None = post(api, path, body, key=key)
    if said is None or said.status_code not in wanted:
        outcome.reasons.append(f"{path.split('/')[-1]}: {said.status_code if said else 'no answer'}, not {wanted}")


def to_revoke(site: Site) -> tuple[str, str, dict[str, Any]]:
    """The one prompt in force, and the call that revokes it."""
    (prompt_id,) = site.read(in_force)
    return prompt_id, f"/admin/prompts/{prompt_id}/revoke", {"reason": "bench"}


def asked_by(site: Site, prompt_id: str) -> str | None:
    prompt: Prompt = site.read(partial(active_set.get_prompt, prompt_id=prompt_id))
    return prompt.revoke_asked_by


def pending_shreds(session: Session) -> list[bytes]:
    return list(session.scalars(select(PendingShred.share_id)))


# --- judging ---------------------------------------------------------------------------------------------------------


def judge_approved(site: Site, request_id: str, outcome: Outcome) -> History:
    """In force is the very prompt that was approved, and it was trained once."""
    history = site.wait_end(request_id)
    outcome.judge(history)
    events = select(RequestEvent.data).where(RequestEvent.request_id == request_id, RequestEvent.type == "state")
    said = site.read(lambda s: s.scalars(events.order_by(RequestEvent.id)).all())
    shown = [data["prompt_digest"] for data in said if data["state"] == WAITS]
    digest = site.read(lambda s: s.scalar(select(Prompt.digest).where(Prompt.request_id == request_id)))
    if shown != [digest]:
        outcome.doubled += len(shown) > 1
        outcome.reasons.append(f"approved {[name[:8] for name in shown]}, and in force is {str(digest)[:8]}")
    return history


def judge_revoked(site: Site, request_id: str, prompt_id: str, outcome: Outcome) -> None:
    outcome.judge(site.history(request_id), ("revoked",))
    times = len(site.read(lambda session: session.scalars(revocations(prompt_id)).all()))
    outcome.doubled += times > 1
    expect(times == 1 and not site.read(in_force), f"revoked {times} times", outcome)


def judge_half_shredded(site: Site, point: str, share: bytes, outcome: Outcome) -> None:
    """Right after the death, with nobody there: the database knows what is to be destroyed; then a worker does it."""
    assert site.vault.keystore is not None
    destroyed = site.vault.keystore.destroyed([share]).get(share) is not None
    expect(share in site.read(pending_shreds), "the share is not pending", outcome)
    expect(
        destroyed == point.startswith("shares.destroyed"), f"the share is{'' if destroyed else ' not'} gone", outcome
    )
    died = time.time()
    kept_worker(site)
    wait_for(lambda: not site.read(pending_shreds), "the share to be destroyed")
    outcome.take_up(time.time() - died, TAKE_UP)


def judge_shares(site: Site, outcome: Outcome) -> None:
    """Nothing is left to destroy, and of every request that has ended the key of its texts opens nothing any more."""
    try:
        wait_for(lambda: not site.read(pending_shreds), "the key shares to be destroyed")
    except FaultFailed as error:
        outcome.reasons.append(f"{len(site.read(pending_shreds))} shares: {error}")
    rows = site.read(lambda s: s.execute(select(UnlearnRequest.id, UnlearnRequest.state)).all())
    over = {site.shares[row.id] for row in rows if row.state in ENDED and row.id in site.shares}
    kept = select(Prompt.id).where(Prompt.state == PromptState.REVOKED, Prompt.wrapped_key.is_not(None))
    assert site.vault.keystore is not None
    gone = site.vault.keystore.destroyed(over)
    alive = sum(gone.get(share) is None for share in over)
    outcome.leaks += alive
    expect(not alive, f"{alive} of {len(over)} requests have ended, and their key is not destroyed", outcome)
    expect(not site.read(lambda s: s.scalars(kept).all()), "a revoked prompt still has its key", outcome)
