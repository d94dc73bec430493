"""Un-forgetting: coded reasons, two persons where they are wanted, and no way around them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from api_kit import Api, add_prompt, assert_problem, running, soft_prompt
from databases import database_kinds, fresh_database
from floor import activate, must_take, submit
from sqlalchemy import select
from sqlalchemy.orm import Session, sessionmaker

from app import active_set, audit, keys, revoking
from app.errors import Conflict
from app.settings import Mode
from app.tables import ApiKey, AuditEntry, utcnow
from app.vault import Vault

Sessions = sessionmaker[Session]
TEXT = "the film is good"


@pytest.fixture(scope="module", params=database_kinds())
def api(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    """One service for all tests; each has keys of its own."""
    folder = tmp_path_factory.mktemp("life")
    with fresh_database(request.param, folder) as url, running(url, folder, mode=Mode.CONCATENATE) as api:
        yield api


@pytest.fixture
def two(database_url: str, tmp_path: Path) -> Iterator[Api]:
    """A service where a revoke needs two persons."""
    with running(database_url, tmp_path, mode=Mode.CONCATENATE, revoke_needs_two=True) as api:
        yield api


def revoke(api: Api, headers: dict[str, str], prompt_id: str, **body: Any) -> httpx2.Response:
    body = {"reason": "Jane changed her mind", **body}
    return api.client.post(f"/admin/prompts/{prompt_id}/revoke", json=body, headers=headers)


def entries(api: Api, subject: str) -> list[tuple[str, dict[str, Any]]]:
    with api.service.sessions() as session:
        audit.verify(session)
        return [
            (e.action, e.detail)
            for e in session.scalars(select(AuditEntry).order_by(AuditEntry.seq))
            if e.subject == subject
        ]


def test_the_code_is_audited_and_the_reason_is_not(api: Api) -> None:
    admin = api.key("admin")
    named, other = add_prompt(api.service, soft_prompt(1)), add_prompt(api.service, soft_prompt(2))
    found = revoke(api, admin, named, code="harm")
    assert found.status_code == 200
    assert (found.json()["state"], found.json()["revoke_code"]) == ("revoked", "harm")
    assert revoke(api, admin, other).json()["revoke_code"] == "other"
    [(action, detail)] = entries(api, named)
    assert (action, detail["code"], detail["asked_by"]) == ("prompt.revoked", "harm", None)
    assert "Jane" not in repr(entries(api, named))


def test_codes_that_are_none(api: Api) -> None:
    prompt_id = add_prompt(api.service, soft_prompt(1))
    for code in ("expired", "", "HARM", 7, None):
        assert_problem(revoke(api, api.key("admin"), prompt_id, code=code), 422, "invalid-input", field="code")


def test_the_second_person_carries_it_out(two: Api) -> None:
    first, second = two.key("admin"), two.key("admin")
    bare = two.classify(two.key("classify", "scores"), TEXT)["results"]
    prompt_id = add_prompt(two.service, soft_prompt(1))
    hidden = two.classify(two.key("classify", "scores"), TEXT)["results"]
    asked = revoke(two, first, prompt_id, code="withdrawn")
    assert asked.status_code == 202
    body = asked.json()
    assert (body["state"], body["revoked_at"], body["active_set_version"]) == ("active", None, 1)
    assert body["revoke_asked_by"].startswith("key_") and body["revoke_asked_at"]
    assert_problem(revoke(two, first, prompt_id), 409, "conflict")
    assert two.classify(two.key("classify", "scores"), TEXT)["results"] == hidden != bare
    done = revoke(two, second, prompt_id, code="mistake")
    assert (done.status_code, done.json()["state"], done.json()["revoke_code"]) == (200, "revoked", "mistake")
    assert two.classify(two.key("classify", "scores"), TEXT)["results"] == bare
    told = entries(two, prompt_id)
    assert [(action, detail["code"]) for action, detail in told] == [
        ("prompt.revoke_asked", "withdrawn"),
        ("prompt.revoked", "mistake"),
    ]
    assert told[-1][1]["asked_by"] == body["revoke_asked_by"] != done.json()["revoked_by"]
    for headers in (first, second):
        assert_problem(revoke(two, headers, prompt_id), 409, "conflict")


def test_an_ask_is_taken_back(two: Api) -> None:
    first, second = two.key("admin"), two.key("admin")
    prompt_id = add_prompt(two.service, soft_prompt(1))
    path = f"/admin/prompts/{prompt_id}/revoke/withdraw"
    assert_problem(two.client.post(path, headers=first), 409, "conflict")
    assert_problem(two.client.post(path, headers=two.key("requests", "approve")), 403, "forbidden")
    assert_problem(two.client.post(path.replace(prompt_id, "prm_" + "0" * 28), headers=first), 404, "not-found")
    revoke(two, first, prompt_id)
    back = two.client.post(path, headers=second)
    assert back.status_code == 200
    names = ("revoke_asked_by", "revoke_asked_at", "revoke_code", "revoke_reason")
    assert [back.json()[name] for name in names] == [None] * 4
    assert [action for action, _ in entries(two, prompt_id)] == ["prompt.revoke_asked", "prompt.revoke_withdrawn"]
    assert revoke(two, second, prompt_id).status_code == 202, "as if nobody had asked"
    assert revoke(two, first, prompt_id).status_code == 200
    assert_problem(two.client.post(path, headers=first), 409, "conflict")


@pytest.mark.parametrize("end", ["revoked", "expired"])
def test_an_ask_counts_as_long_as_its_key(two: Api, end: str) -> None:
    stolen, second, third = (two.key("admin") for _ in range(3))
    prompt_id = add_prompt(two.service, soft_prompt(1))
    asked_by = revoke(two, stolen, prompt_id, code="harm").json()["revoke_asked_by"]
    with two.service.sessions.begin() as session:
        if end == "revoked":
            keys.revoke_key(session, asked_by, actor="test")
        else:
            session.get_one(ApiKey, asked_by).expires_at = utcnow()
    again = revoke(two, second, prompt_id, code="mistake")
    assert (again.status_code, again.json()["state"], again.json()["revoke_code"]) == (202, "active", "mistake")
    assert again.json()["revoke_asked_by"] not in (None, asked_by)
    assert_problem(revoke(two, second, prompt_id), 409, "conflict")
    assert revoke(two, third, prompt_id).status_code == 200
    told = entries(two, prompt_id)
    assert [action for action, _ in told] == ["prompt.revoke_asked", "prompt.revoke_asked", "prompt.revoked"]
    assert told[-1][1]["asked_by"] == again.json()["revoke_asked_by"]


def test_a_restore_is_no_way_around(two: Api) -> None:
    admin = two.key("admin")
    kept, gone = add_prompt(two.service, soft_prompt(1)), add_prompt(two.service, soft_prompt(2))
    body = {"reason": "hides too much"}
    for version in (0, 1):
        refused = two.client.post(f"/admin/active-sets/{version}/restore", json=body, headers=admin)
        assert gone in assert_problem(refused, 409, "conflict")["detail"]
    with two.service.sessions() as session:
        assert [prompt.id for prompt in active_set.active_prompts(session)] == [kept, gone]
        assert active_set.read_active_set(session).version == 2
    two.service.settings.__dict__["revoke_needs_two"] = False  # as it was when the set was rolled back
    assert two.client.post("/admin/active-sets/1/restore", json=body, headers=admin).status_code == 200
    two.service.settings.__dict__["revoke_needs_two"] = True
    forward = two.client.post("/admin/active-sets/2/restore", json=body, headers=admin)
    assert (forward.status_code, forward.json()["size"]) == (200, 2), "what forgets more takes one person"
    missing = two.client.post("/admin/active-sets/9/restore", json=body, headers=admin)
    assert_problem(missing, 404, "not-found")


def test_a_suspended_prompt_takes_two_as_well(two: Api) -> None:
    add_prompt(two.service, soft_prompt(1))
    prompt_id = add_prompt(two.service, soft_prompt(2))
    with two.service.sessions.begin() as session:
        active_set.restore(
            session,
            1,
            mode=Mode.CONCATENATE,
            fingerprint=soft_prompt(1).fingerprint,
            actor="key_1",
            reason="hides too much",
        )
    asked = revoke(two, two.key("admin"), prompt_id)
    assert (asked.status_code, asked.json()["state"]) == (202, "suspended")
    assert revoke(two, two.key("admin"), prompt_id).json()["state"] == "revoked"


@pytest.mark.parametrize("needs_two", [False, True])
def test_revoked_at_once(sessions: Sessions, vault: Vault, needs_two: bool) -> None:
    """One asks and one carries out, or one revokes; everybody else is told that it is done, or that they have asked."""
    prompt_id = activate(sessions, vault, must_take(sessions, submit(sessions, vault)), version=0)
    barrier = threading.Barrier(6)
    outcomes: list[bool | None] = []

    def work(actor: str) -> None:
        barrier.wait()
        try:
            with sessions.begin() as session:
                _, done = revoking.revoke(session, prompt_id, actor=actor, code="harm", reason="r", needs_two=needs_two)
        except Conflict:
            outcomes.append(None)
        else:
            outcomes.append(done)

    threads = [threading.Thread(target=work, args=(f"key_{n % 3}",)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes.count(True) == 1 and outcomes.count(False) == int(needs_two)
    with sessions() as session:
        prompt = active_set.get_prompt(session, prompt_id)
        assert prompt.state == "revoked" and prompt.sealed is None
        assert (prompt.revoke_asked_by != prompt.revoked_by) == needs_two or prompt.revoke_asked_by is None
        assert active_set.read_active_set(session).version == 2
        audit.verify(session)
