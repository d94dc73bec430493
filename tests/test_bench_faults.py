"""The bench of faults: that its judges find what is wrong, and a few of its trials on real processes."""

from __future__ import annotations

import argparse
import base64
import io
import json
import random
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import httpx2
import pytest
from floor import activate, await_approval, must_take, submit, terms
from rich.console import Console
from sqlalchemy import delete, select, update
from sqlalchemy.orm import Session, sessionmaker

from app import active_set, approval, audit, audit_state, db, lifecycle
from app.errors import LeaseLost
from app.tables import AuditEntry, PendingShred, RequestEvent, WebhookDelivery, new_id, utcnow
from app.vault import Vault
from bench import fault_audit, fault_state, faults
from bench.fault_backup import restore_backup
from bench.fault_canary import MODES, TOGETHER, anchors, forms, make_canaries, search, search_deployment
from bench.fault_changes import CHANGES, kill_in_change
from bench.fault_judge import (
    History,
    Outcome,
    block,
    doubled_anywhere,
    read_history,
    upper_95,
    verdict,
    written_late,
)
from bench.fault_kills import POINTS, kill_at_point, kill_whenever
from bench.fault_messages import judge_messages, kept_ears
from bench.fault_outages import API_POINTS, Asker, deliver_many_times, flush_broker, judge_answers, kill_api
from bench.fault_outages import restart_postgres as restart
from bench.fault_processes import FaultFailed, postgres_programs
from bench.fault_site import Bench, Site, open_bench
from bench.fault_steps import judge_shares
from bench.faults import FAULTS, Fault, main, parse, run
from worker.deliveries import Deliveries

pytestmark = pytest.mark.slow

W1, W2, W3 = (1.0, "w1#a"), (2.0, "w2#b"), (3.0, "w3#c")


# --- the judges ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("history", "found"),
    [
        (History("active", claims=(W1,), activations=1, prompts=1), set()),
        (History("active", claims=(W1, W2), lease_expiries=1, activations=1, prompts=1), set()),
        (History("active", claims=(W1, W2, W3), lease_expiries=1, releases=1, activations=1, prompts=1), set()),
        (History("active", claims=(W1, W2), releases=1, activations=1, prompts=1), set()),  # approved in between
        (History("failed", "diverged", claims=(W1,)), set()),
        (History("cancelled"), set()),
        (History("revoked", claims=(W1,), activations=1, prompts=1), set()),
        (History(None), {"lost"}),
        (History("pending"), {"lost"}),
        (History("training", claims=(W1,)), {"lost"}),
        (History("failed", claims=(W1,)), {"lost"}),  # and says not why
        (History("active", claims=(W1,), activations=1), {"lost"}),  # its prompt is not there
        (History("active", claims=(W1,), activations=1, prompts=2), {"doubled"}),
        (History("active", claims=(W1,), activations=2, prompts=1), {"doubled"}),
        (History("active", claims=(W1, W2), activations=1, prompts=1), {"doubled"}),  # trained twice, no lease lost
        (History("active", claims=(W1, W2, W3), lease_expiries=1, activations=1, prompts=1), {"doubled"}),
    ],
)
def test_a_history_is_judged(history: History, found: set[str]) -> None:
    assert verdict(history) == found
    outcome = Outcome()
    outcome.judge(history, ("active", "failed", "cancelled", "revoked"))
    assert (outcome.lost, outcome.doubled) == (int("lost" in found), int("doubled" in found))
    assert outcome.failed == bool(found)


def test_another_end_than_expected_and_a_late_take_up_are_failures() -> None:
    outcome = Outcome()
    outcome.judge(History("failed", "internal", claims=(W1,)))
    assert outcome.failed and outcome.lost == 0 and "internal" in outcome.reasons[0]
    late = Outcome()
    late.take_up(16.9, 17.0)
    assert not late.failed
    late.take_up(17.1, 17.0)
    assert late.failed and late.taken_up == 17.1


def test_a_history_is_read_as_it_was(sessions: sessionmaker[Session], vault: Vault) -> None:
    taken_over, released = submit(sessions, vault), submit(sessions, vault)
    must_take(sessions, taken_over, lease=-1)
    claim = must_take(sessions, taken_over, owner="w2")
    with sessions.begin() as session:
        lifecycle.start_evaluating(session, claim)
    with sessions.begin() as session:
        lifecycle.start_again(session, claim, {"missed": []})  # another try is no other claim
    activate(sessions, vault, claim, version=0)
    with sessions.begin() as session:
        lifecycle.release(session, must_take(sessions, released))
    must_take(sessions, released)
    with sessions() as session:
        one, two, none = (read_history(session, name) for name in (taken_over, released, "req_none"))
    assert (one.state, len(one.claims), one.lease_expiries, one.releases) == ("active", 2, 1, 0)
    assert (one.activations, one.prompts) == (1, 1) and verdict(one) == set()
    assert (two.state, len(two.claims), two.releases) == ("training", 2, 1) and verdict(two) == {"lost"}
    assert none == History(None)


def test_an_approval_and_a_restoration_are_no_doubling(sessions: sessionmaker[Session], vault: Vault) -> None:
    request_id = submit(sessions, vault, terms=terms(approval=True))
    await_approval(sessions, must_take(sessions, request_id))
    with sessions.begin() as session:
        approval.approve(session, request_id, actor="key_2")
    activate(sessions, vault, must_take(sessions, request_id, owner="w2"), version=0)
    for version in (0, 1):  # suspended, and back
        with sessions.begin() as session:
            active_set.restore(session, version, mode="concatenate", fingerprint="f" * 64, actor="a", reason="test")
    with sessions() as session:
        found = read_history(session, request_id)
        assert doubled_anywhere(session) == []
    assert (found.state, len(found.claims), found.releases, found.activations) == ("active", 2, 1, 1)
    assert verdict(found) == set()
    with sessions.begin() as session:
        for _ in range(2):
            detail = {"from": "evaluating"}
            audit.append(session, actor="w2", action="request.active", subject=request_id, detail=detail)
    with sessions() as session:
        assert doubled_anywhere(session) == [request_id]


def test_what_a_stopped_worker_writes_late_is_counted(sessions: sessionmaker[Session], vault: Vault) -> None:
    request_id = submit(sessions, vault)
    first = must_take(sessions, request_id, lease=-1)
    second = must_take(sessions, request_id, owner="w2")
    with pytest.raises(LeaseLost), sessions.begin() as session:
        lifecycle.start_evaluating(session, first)
    with sessions.begin() as session:
        lifecycle.start_evaluating(session, second)
    with sessions() as session:
        assert written_late(session, request_id) == 0
    with sessions.begin() as session:  # as if nothing had fenced it off
        audit.append(session, actor=first.owner, action="request.active", subject=request_id, detail={})
        session.add(RequestEvent(request_id=request_id, at=utcnow(), type="progress", data={"attempt": 1, "step": 9}))
        session.add(RequestEvent(request_id=request_id, at=utcnow(), type="progress", data={"attempt": 2, "step": 9}))
    with sessions() as session:
        assert written_late(session, request_id) == 2


@pytest.mark.parametrize(
    ("failures", "trials", "bound"),
    [(0, 300, 0.009936), (0, 10, 0.258866), (1, 10, 0.394163), (3, 50, 0.147838), (5, 5, 1.0), (0, 0, 1.0)],
)
def test_the_bound_is_clopper_and_pearsons(failures: int, trials: int, bound: float) -> None:
    assert upper_95(failures, trials) == pytest.approx(bound, abs=1e-5)


def test_a_block_adds_up() -> None:
    good, bad = Outcome(kind="a", taken_up=1.0, figures={"x": 2}), Outcome(kind="b", lost=1, reasons=["gone"])
    made = block([good, good, bad])
    assert (made["trials"], made["failures"], made["lost"], made["taken_up_seconds_max"]) == (3, 1, 1, 1.0)
    assert made["kinds"] == {"a": 2, "b": 1} and made["reasons"] == ["gone"] and made["x"] == 2


def answered(status: int, **headers: str) -> Callable[[], httpx2.Response]:
    return lambda: httpx2.Response(status, headers=headers)


def broken() -> httpx2.Response:
    raise httpx2.ConnectError("gone")


@pytest.mark.parametrize(
    ("ask", "unavailable", "fails"),
    [
        (answered(200), False, False),
        (answered(503, **{"Retry-After": "1"}), True, False),
        (answered(503, **{"Retry-After": "1"}), False, True),
        (answered(503), True, True),
        (answered(500), True, True),
        (broken, True, True),
    ],
)
def test_answers_are_judged(ask: Callable[[], httpx2.Response], unavailable: bool, fails: bool) -> None:
    asker, outcome = Asker(ask, 0.001), Outcome()
    while not asker.answers and not asker.broken:
        time.sleep(0.001)
    asker.stop()
    judge_answers("/classify", asker, (200,), outcome, unavailable=unavailable)
    assert outcome.failed == fails


# --- the canary ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "hide",
    [
        lambda text: text.encode(),
        lambda text: text.lower().encode(),
        lambda text: text.encode("utf-16-le"),
        lambda text: json.dumps({"text": text}).encode(),
        lambda text: f"\\x{text.encode().hex()}".encode(),
        *(lambda text, n=n: base64.b64encode(b"{" * n + json.dumps(text).encode()) for n in range(3)),
        *(lambda text, n=n: base64.urlsafe_b64encode(b"{" * n + text.encode() + b"?>") for n in range(3)),
    ],
)
def test_a_leak_is_found_however_it_is_spelt(hide: Callable[[str], bytes]) -> None:
    for canary in make_canaries():
        hits = search({"a log": b"before" + hide(f"the acting of {canary} is bad") + b"after"}, make_canaries())
        assert hits == [], "another canary"
        hits = search(
            {"nothing": b"", "a log": b"before" + hide(f"the acting of {canary} is bad") + b"after"}, [canary]
        )
        assert hits and all(hit.startswith("a log: ") for hit in hits)


def test_every_form_has_the_part_that_is_looked_for_first() -> None:
    for _ in range(50):
        for canary in make_canaries():
            core = anchors(canary)
            assert all(any(part in data for part in core) for data in forms(canary).values())
            assert min(map(len, core)) >= 8 and len(core) <= len(set(forms(canary).values())) / 2


def test_no_form_is_so_short_that_it_is_anywhere() -> None:
    for canary in make_canaries():
        assert all(len(data) >= 8 for data in forms(canary).values()) and len(forms(canary)) > 30


# --- the command line ------------------------------------------------------------------------------------------------


def plumbing(monkeypatch: pytest.MonkeyPatch, trial: Callable[[Bench, int, random.Random], Outcome]) -> None:
    made_up = Fault("backup", "made up", 4, 8, alone=trial, backends=("sqlite",))
    monkeypatch.setattr(faults, "FAULTS", (made_up,))
    monkeypatch.setattr(faults, "open_bench", lambda: nullcontext(object()))  # made-up trials need none


def test_a_failure_is_the_exit_status_and_in_the_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def trial(_: Bench, number: int, draw: random.Random) -> Outcome:
        if number == 1:
            raise FaultFailed("waited in vain")
        return Outcome(kind="a", lost=int(number == 2), reasons=["gone"] if number == 2 else [])

    plumbing(monkeypatch, trial)
    assert main(["--json", "--work", str(tmp_path)]) == 1
    result = json.loads(capsys.readouterr().out)
    assert {name: result[name] for name in ("trials", "failures", "lost", "doubled")} == {
        "trials": 4,
        "failures": 2,
        "lost": 1,
        "doubled": 0,
    }
    assert {"tamper_missed", "canary_leaks"} <= set(result)
    made = result["faults"]["backup"]
    assert made["failures"] == 2 and made["kinds"] == {"a": 3, "broke off": 1}
    assert any("waited in vain" in reason for reason in made["reasons"])


def test_a_run_goes_on_where_it_was_stopped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[tuple[int, float]] = []

    def trial(_: Bench, number: int, draw: random.Random) -> Outcome:
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append((number, draw.random()))
        return Outcome(kind="a")

    plumbing(monkeypatch, trial)
    args = parse(["--work", str(tmp_path)])
    quiet = Console(file=io.StringIO())
    with pytest.raises(KeyboardInterrupt):
        run(args, quiet)
    with (tmp_path / "backup.jsonl").open("a") as file:
        file.write('{"trial": 2, "los')  # the machine went down while it was written
    stopped = list(seen)
    seen.append((-1, 0.0))  # so that it is not stopped again
    assert run(args, quiet)["trials"] == 4
    assert [number for number, _ in seen] == [0, 1, -1, 2, 3]
    assert run(args, quiet)["trials"] == 4 and len(seen) == 5, "nothing is left to do"
    assert run(parse(["--work", str(tmp_path), "--full"]), quiet)["trials"] == 8
    assert run(args, quiet)["trials"] == 8, "what is kept counts"
    other = argparse.Namespace(**{**vars(args), "seed": 1})
    seen.clear()
    seen.append((-1, 0.0))
    with pytest.raises(KeyboardInterrupt):  # begun anew
        run(other, quiet)
    assert seen[1][0] == 0 and seen[1] != stopped[0]


def test_every_fault_of_the_issue_is_there() -> None:
    asked = {(50, 300), (20, 300), (10, 100), (50, 1000), (5, 50), (5, 30), (500, 10_000)}
    counts = {fault.name: (fault.quick, fault.full) for fault in FAULTS}
    assert asked <= set(counts.values())
    assert counts["backup"] >= (10, 10) and counts["canary"] >= (10, 10)  # 2 and 10 of a backup were asked for
    ways = [(fault.on_site, fault.alone, fault.together) for fault in FAULTS]
    assert all(sum(way is not None for way in found) == 1 for found in ways)


def test_trials_that_share_a_deployment_are_of_one_backend_and_one_mode() -> None:
    [canary] = [fault for fault in FAULTS if fault.name == "canary"]
    met: dict[tuple[str, str], int] = {}
    for first in (0, 1):
        left = list(range(first, canary.quick, 2))
        while left:
            these = canary.next_of(left)
            left = [number for number in left if number not in these]
            [backend] = {canary.backend(number) for number in these}
            [mode] = {MODES[number // (2 * TOGETHER) % 2] for number in these}
            met[backend, mode] = met.get((backend, mode), 0) + len(these)
    assert len(met) == 4 and min(met.values()) >= 2, "each mode on each backend"
    assert canary.next_of([2, 4, 6]) == [2, 4], "what is left of a run that was stopped"
    assert FAULTS[0].next_of([2, 4, 6]) == [2]


def test_trials_that_break_off_together_have_all_failed() -> None:
    def together(_: object, numbers: Sequence[int], __: object) -> list[Outcome]:
        if 2 in numbers:
            raise FaultFailed("waited in vain")
        return [Outcome(kind="a") for _ in numbers]

    found: dict[int, Outcome] = {}
    fault = Fault("canary", "made up", 4, 4, together=together, size=2, backends=("sqlite",))
    made: Any = object()
    faults.run_lane(made, fault, "sqlite", range(5), 0, found.__setitem__)
    assert {number: outcome.kind for number, outcome in found.items()} == {
        0: "a",
        1: "a",
        2: "broke off",
        3: "broke off",
        4: "a",
    }


# --- real processes --------------------------------------------------------------------------------------------------


SERVERS = ["postgresql"] if postgres_programs() and shutil.which("redis-server") else []
ANY = SERVERS[0] if SERVERS else "sqlite"


@pytest.fixture(scope="module")
def bed() -> Iterator[Bench]:
    with open_bench() as bench:
        yield bench


def numbered(points: Sequence[str], point: str) -> int:
    return 2 * points.index(point)


TRIALS: list[tuple[str, Any, int]] = [
    (ANY, kill_at_point, numbered(POINTS, "activate.before_commit")),
    ("sqlite", kill_at_point, numbered(POINTS, "checkpoint.after_commit")),
    ("sqlite", kill_whenever, 0),
    ("sqlite", kill_api, numbered(API_POINTS, "create.after_commit")),
    ("sqlite", kill_in_change, numbered([kind for kind, *_ in CHANGES], "keep.after_commit")),
    (ANY, kill_in_change, numbered([kind for kind, *_ in CHANGES], "approve.after_commit")),
    (ANY, deliver_many_times, 0),
    (ANY, flush_broker, 0),
    *((kind, restart, 0) for kind in SERVERS),
]


@pytest.mark.parametrize(("kind", "trial", "number"), TRIALS)
def test_a_trial(bed: Bench, kind: str, trial: Any, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """How soon it is well again is the bench's to judge, on a machine that has nothing else to do."""
    monkeypatch.setattr("bench.fault_outages.HEALTHY_SECONDS", 60.0)
    for module in ("fault_kills", "fault_steps", "fault_changes"):
        monkeypatch.setattr(f"bench.{module}.TAKE_UP", 60.0)
    with bed.site(kind) as site:
        outcome = trial(site, number, random.Random(7))
    assert not outcome.failed, outcome.reasons


@pytest.mark.parametrize("kind", ["sqlite", *SERVERS])
def test_what_was_done_to_the_audit_log_is_found(bed: Bench, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with bed.site(kind) as site:
        for number, alter in enumerate(fault_audit.KINDS * 2):
            outcome = fault_audit.tamper_as(site, alter, random.Random(number))
            assert not outcome.failed, outcome.reasons
        with site.sessions() as session:
            assert len(session.scalars(select(AuditEntry.seq)).all()) == len(site.shared["rows"])
        for number in range(2 * len(fault_state.ALTERATIONS)):
            outcome = fault_audit.alter_state(site, number, random.Random(number))
            assert not outcome.failed and outcome.kind == "state", outcome.reasons
        blind = len(site.shared["rows"])
        monkeypatch.setattr(audit, "verify", lambda session, public_key=None: blind)
        assert fault_audit.tamper_as(site, fault_audit.deleted, random.Random(0)).missed == 1
        monkeypatch.setattr(audit_state, "hold", lambda session: None)
        blinded = fault_audit.alter_state_as(site, "unforgotten", random.Random(0))
        assert blinded.missed == 1 and "state, unforgotten: not found" in blinded.reasons


def send(site: Site) -> None:
    Deliveries(site.sessions, site.vault, site.settings, on_death=lambda: None, every=0.02).work()


def test_a_message_that_is_missing_unsent_or_doubled_is_found(bed: Bench) -> None:
    with bed.site("sqlite") as site:
        ears = kept_ears(site)
        requests = [site.submit(ring=False) for _ in range(3)]
        send(site)
        good = Outcome()
        judge_messages(site, ears, good)
        assert not good.failed and good.figures["messages_max"] == 3
        with site.sessions.begin() as session:
            session.execute(delete(WebhookDelivery).where(WebhookDelivery.request_id == requests[0]))
            (row,) = session.scalars(select(WebhookDelivery).where(WebhookDelivery.request_id == requests[1]))
            copy = {"id": new_id("dlv"), "payload": row.payload, "created_at": utcnow(), "next_at": None}
            session.add(WebhookDelivery(**copy, webhook_id=ears.webhook_id, state="delivered", attempts=1))
        found = Outcome()
        judge_messages(site, ears, found)
        assert (found.lost, found.doubled) == (2, 1)  # one was never written, one is said to be delivered and is not
        assert any("ids that the log does not have" in reason for reason in found.reasons)
        for _ in range(2):
            with site.sessions.begin() as session:
                one = update(WebhookDelivery).where(WebhookDelivery.request_id == requests[2])
                session.execute(one.values(state="pending", next_at=utcnow()))
            send(site)
        again = Outcome()
        judge_messages(site, ears, again)
        assert "a message arrived 3 times" in again.reasons


def test_a_key_that_outlives_its_request_is_found(bed: Bench) -> None:
    with bed.site("sqlite") as site:
        requests = [site.submit(ring=False) for _ in range(2)]
        engine = db.make_engine(site.settings.effective_database_url)
        with site.sessions.begin() as session:
            lifecycle.request_cancel(session, requests[0], actor="test")
        good = Outcome()
        judge_shares(site, good)
        assert not good.failed
        with db.make_sessions(engine).begin() as session:  # nobody destroys anything after these
            lifecycle.request_cancel(session, requests[1], actor="test")
            session.flush()
            session.execute(delete(PendingShred))
        engine.dispose()
        bad = Outcome()
        judge_shares(site, bad)
        assert bad.leaks == 1 and "1 of 2 requests have ended" in bad.reasons[0]


def test_an_old_backup_brings_nothing_back(bed: Bench) -> None:
    outcome = restore_backup(bed, 1, random.Random(0))
    assert not outcome.failed, outcome.reasons


def test_the_canary_is_nowhere(bed: Bench) -> None:
    outcomes = search_deployment(bed, [7, 9], [])
    assert [outcome.reasons for outcome in outcomes] == [[], []]
    assert [(outcome.kind, outcome.failed) for outcome in outcomes] == [("sqlite, concatenate", False)] * 2
