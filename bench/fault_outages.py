"""APIs that die, messages that come ten times, brokers and databases that go away, while clients go on asking."""

from __future__ import annotations

import random
import shutil
import signal
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import httpx2
from sqlalchemy import select

from app import audit_state
from app.tables import AuditEntry, UnlearnRequest
from bench.fault_judge import Outcome
from bench.fault_processes import Child, FaultFailed, wait_for
from bench.fault_site import Api, Site, forget_texts, in_force, taken_up_after

QUERY = "the film is a good story"
CREATE_POINTS = ("create.after_commit", "create.after_commit", "create.before_commit", "create.rung")
REVOKE_POINTS = ("revoke.before_commit", "revoke.after_commit")
API_POINTS = (*CREATE_POINTS, *REVOKE_POINTS)
COPIES = 10
WORKERS = 3
BROKER_SECONDS = 30.0
HEALTHY_SECONDS = 10.0


def request_body(texts: int = 6) -> dict[str, Any]:
    return {
        "forget_texts": [{"text": text, "label": label} for text, label in forget_texts(texts)],
        "options": {"max_steps": 40},
    }


def post(api: Api, path: str, body: dict[str, Any] | None, *, key: str = "") -> httpx2.Response | None:
    """None where the server died before it answered. ``key``: another one than the site's."""
    try:
        return api.client.post(path, json=body, headers={"Authorization": f"Bearer {key}"} if key else {})
    except httpx2.TransportError:
        return None


def kept_worker(site: Site) -> Child:
    """One that lives from trial to trial."""
    worker: Child | None = site.shared.get("worker")
    if worker is None or worker.ended():
        # Ready before anything breaks: without its database a worker does not start, and nobody here starts it again.
        made = worker = site.shared["worker"] = site.worker()
        wait_for(lambda: "ready." in made.output() or made.ended(), "a worker that is ready")
    return worker


# --- kill -9 of an API -----------------------------------------------------------------------------------------------


def kill_api(site: Site, number: int, draw: random.Random) -> Outcome:
    """The API dies at a point of its own while a client submits or revokes; every 202 is in the database once."""
    point = API_POINTS[number // 2 % len(API_POINTS)]
    outcome = Outcome(kind=point)
    kept_worker(site)
    if point in REVOKE_POINTS:
        return kill_while_revoking(site, point, outcome)
    before = set(site.read(all_requests))
    accepted: list[str] = []
    api = site.api(f"{point}:{draw.randint(1, 3)}")
    for _ in range(4):
        answer = post(api, "/unlearn-requests", request_body())
        if answer is None:
            break
        if answer.status_code != 202:
            outcome.reasons.append(f"{answer.status_code} for a good request")
            break
        accepted.append(answer.json()["id"])
    expect_killed(api, outcome)
    new = [request_id for request_id in site.read(all_requests) if request_id not in before]
    # What was committed without an answer may be there; it was never promised, and it must end like any other.
    unanswered = len(new) - len(accepted)
    if unanswered != (0 if point == "create.before_commit" else 1) or not set(accepted) <= set(new):
        outcome.lost += len(set(accepted) - set(new))
        outcome.reasons.append(f"{point}: {len(accepted)} answers of 202, {len(new)} requests in the database")
    for request_id in new:
        outcome.judge(site.wait_end(request_id), where=f"{point}, ")
    return site.finish(outcome)


def kill_while_revoking(site: Site, point: str, outcome: Outcome) -> Outcome:
    """A revoke whose answer never came was carried out or not, and asked for again it is carried out once."""
    request_id = site.submit()
    outcome.judge(site.wait_end(request_id))
    found = site.read(in_force)
    if len(found) != 1:
        outcome.reasons.append(f"{len(found)} prompts in force before the revoke")
        return site.finish(outcome)
    api = site.api(point)
    if post(api, f"/admin/prompts/{found[0]}/revoke", {"reason": "bench"}) is not None:
        outcome.reasons.append("the API answered, so it did not die")
    expect_killed(api, outcome)
    left = site.read(in_force)
    if left != (found if point == "revoke.before_commit" else []):
        outcome.reasons.append(f"{point}: {len(left)} prompts in force after the kill")
    again = site.api()
    answer = post(again, f"/admin/prompts/{found[0]}/revoke", {"reason": "bench"})
    wanted = 200 if left else 409
    if answer is None or answer.status_code != wanted:
        outcome.reasons.append(f"asked for again: {answer.status_code if answer else 'no answer'}, not {wanted}")
    again.child.kill()
    revoked = site.read(lambda session: session.scalars(revocations(found[0])).all())
    if len(revoked) != 1 or site.read(in_force):
        outcome.doubled += len(revoked) > 1
        outcome.reasons.append(f"revoked {len(revoked)} times")
    return site.finish(outcome)


def revocations(prompt_id: str) -> Any:
    return select(AuditEntry.seq).where(AuditEntry.subject == prompt_id, AuditEntry.action == "prompt.revoked")


def expect_killed(api: Api, outcome: Outcome) -> None:
    if not api.child.ended(60) or api.child.status != -signal.SIGKILL:
        outcome.reasons.append(f"the API did not die at its point: {api.child.output()[-400:]}")
        api.child.kill()
    api.client.close()


def all_requests(session: Any) -> list[str]:
    return list(session.scalars(select(UnlearnRequest.id)))


# --- one message, ten times ------------------------------------------------------------------------------------------


def deliver_many_times(site: Site, number: int, draw: random.Random) -> Outcome:
    """The same message ten times at once, to three workers: one training."""
    outcome = Outcome(kind=site.kind)
    if "workers" not in site.shared:
        site.shared["workers"] = [site.worker() for _ in range(WORKERS)]
        site.senders = site.senders or ThreadPoolExecutor(COPIES)
        wait_for(lambda: all("ready." in worker.output() for worker in site.shared["workers"]), "the workers")
        site.ring("req_" + "0" * 28)  # opens the connection
    request_id = site.submit(ring=False)
    together = threading.Barrier(COPIES)

    def send() -> bool:
        together.wait()
        return site.ring(request_id)

    assert site.senders is not None
    sent = [task.result() for task in [site.senders.submit(send) for _ in range(COPIES)]]
    if not all(sent):
        outcome.reasons.append(f"only {sum(sent)} of {COPIES} messages were taken")
    history = site.wait_end(request_id)
    outcome.judge(history)
    outcome.figures["claims_max"] = len(history.claims)
    for worker in site.shared["workers"]:
        if worker.ended():
            outcome.reasons.append(f"a worker ended with status {worker.status}")
            site.shared.pop("workers", None)
    return site.finish(outcome)


# --- clients that go on asking ---------------------------------------------------------------------------------------


@dataclass
class Asker:
    """Asks again and again in a thread of its own until told to stop; keeps what it was answered."""

    ask: Callable[[], httpx2.Response]
    pause: float
    answers: list[tuple[int, bool, float]] = field(default_factory=list)  # status, with Retry-After, when
    broken: list[str] = field(default_factory=list)
    accepted: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._end.wait(self.pause):
            try:
                answer = self.ask()
            except httpx2.TransportError as error:
                self.broken.append(type(error).__name__)
                continue
            self.answers.append((answer.status_code, "retry-after" in answer.headers, time.time()))
            if answer.status_code == 202:
                self.accepted.append(answer.json()["id"])

    def stop(self) -> None:
        self._end.set()
        self._thread.join(60)


def judge_answers(name: str, asker: Asker, allowed: Sequence[int], outcome: Outcome, *, unavailable: bool) -> None:
    """Only what is allowed, or 503 with Retry-After where something is down."""
    if asker.broken:
        outcome.reasons.append(f"{name}: {len(asker.broken)} connections broke ({asker.broken[0]})")
    bad = [
        status
        for status, retry_after, _ in asker.answers
        if status not in allowed and not (unavailable and status == 503 and retry_after)
    ]
    if bad:
        outcome.reasons.append(f"{name}: answers {sorted(set(bad))} ({len(bad)} of {len(asker.answers)})")
    if not asker.answers:
        outcome.reasons.append(f"{name}: nobody answered")


def kept_api(site: Site) -> Api:
    api: Api | None = site.shared.get("api")
    if api is None or api.child.ended():
        api = site.shared["api"] = site.api()
    return api


def classify(api: Api) -> Callable[[], httpx2.Response]:
    return lambda: api.client.post("/classify", json={"text": QUERY})


# --- the broker ------------------------------------------------------------------------------------------------------


def flush_broker(site: Site, number: int, draw: random.Random) -> Outcome:
    """kill -9 of Redis, all it held is gone (or the folder is deleted); requests come before, meanwhile and after."""
    outcome = Outcome(kind=site.kind)
    api = kept_api(site)
    kept_worker(site)
    asker = Asker(classify(api), 0.05)
    submitted: dict[str, float] = {}

    def submit() -> None:
        answer = post(api, "/unlearn-requests", request_body())
        if answer is None or answer.status_code != 202:
            outcome.reasons.append(f"a submit was answered {answer.status_code if answer else 'not at all'}")
        else:
            submitted[answer.json()["id"]] = time.time()

    submit()
    if site.redis is not None:
        site.redis.kill_and_flush()
    else:
        shutil.rmtree(site.settings.broker_dir, ignore_errors=True)
    submit()
    time.sleep(draw.uniform(0, 1.5))
    if site.redis is not None:
        site.redis.start_again()
    back = time.time()
    submit()
    for request_id, at in submitted.items():
        history = site.wait_end(request_id)
        outcome.judge(history)
        seconds = taken_up_after(history, at)
        outcome.take_up(seconds if seconds is None or at >= back else max(0.0, at + seconds - back), BROKER_SECONDS)
    asker.stop()
    judge_answers("/classify", asker, (200,), outcome, unavailable=False)
    if site.shared["worker"].ended():
        outcome.reasons.append(f"the worker ended with status {site.shared['worker'].status}")
    return site.finish(outcome)


# --- PostgreSQL ------------------------------------------------------------------------------------------------------


def restart_postgres(site: Site, number: int, draw: random.Random) -> Outcome:
    """An immediate stop under load, and a start: 503 with Retry-After meanwhile, no 500, healthy within 10 s."""
    outcome = Outcome(kind="immediate stop")
    postgres = site.postgres
    assert postgres is not None
    api = kept_api(site)
    kept_worker(site)
    request_id = site.submit()
    askers = {
        "/classify": Asker(classify(api), 0.02),
        "submit": Asker(lambda: api.client.post("/unlearn-requests", json=request_body(3)), 0.4),
        "list": Asker(lambda: api.client.get("/unlearn-requests"), 0.05),
        "/readyz": Asker(lambda: api.client.get("/readyz"), 0.05),
    }
    time.sleep(draw.uniform(0.2, 1.5))
    stopped = time.time()
    postgres.stop_at_once()
    time.sleep(draw.uniform(0.2, 2.5))
    postgres.start()
    back = time.time()
    try:
        wait_for(api.ready, "a healthy API")
    except FaultFailed as error:
        outcome.reasons.append(str(error))
    healthy = time.time() - back
    outcome.figures["healthy_seconds_max"] = healthy
    if healthy > HEALTHY_SECONDS:
        outcome.reasons.append(f"healthy after {healthy:.1f} s")
    time.sleep(0.5)
    for asker in askers.values():
        asker.stop()
    for (name, asker), allowed in zip(askers.items(), ((200,), (202,), (200,), (200,)), strict=True):
        judge_answers(name, asker, allowed, outcome, unavailable=True)
    during = [status for status, _, at in askers["/classify"].answers if stopped < at < back]
    if not any(status == 503 for status in during):
        outcome.reasons.append("nothing was refused meanwhile, so nothing was down")
    outcome.figures["refused_max"] = sum(status == 503 for status in during)
    for accepted in (request_id, *askers["submit"].accepted):
        outcome.judge(site.wait_end(accepted))
    if site.shared["worker"].ended():
        outcome.reasons.append(f"the worker ended with status {site.shared['worker'].status}")
    site.read(audit_state.verify)
    return site.finish(outcome)
