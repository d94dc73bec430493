"""The history of the active set over HTTP, and its restoration, which reaches the next classification."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from api_kit import Api, add_prompt, assert_problem, running, soft_prompt

from app import audit
from app.settings import Mode

TEXT = "the film is good"


@pytest.fixture
def api(database_url: str, tmp_path: Path) -> Iterator[Api]:
    with running(database_url, tmp_path, mode=Mode.CONCATENATE) as api:
        yield api


def restore(api: Api, headers: dict[str, str], version: int, **body: Any) -> Any:
    body = body or {"reason": "version 2 hides too much"}
    return api.client.post(f"/admin/active-sets/{version}/restore", json=body, headers=headers)


def revoke(api: Api, headers: dict[str, str], prompt_id: str) -> None:
    body = {"reason": "withdrawn"}
    assert api.client.post(f"/admin/prompts/{prompt_id}/revoke", json=body, headers=headers).status_code == 200


def test_history_and_restoration(api: Api) -> None:
    headers = api.key()
    first, second = add_prompt(api.service, soft_prompt(1)), None
    under_one = api.classify(headers, TEXT)["results"]
    second = add_prompt(api.service, soft_prompt(2))
    under_two = api.classify(headers, TEXT)["results"]
    assert under_one != under_two
    page = api.client.get("/admin/active-sets", headers=headers).json()
    assert [(s["version"], s["size"]) for s in page["items"]] == [(2, 2), (1, 1), (0, 0)]
    assert page["next_before"] is None
    assert page["items"][0]["checks"] == {"forget_abstain": 1.0}
    digests = {s["version"]: s["digest"] for s in page["items"]}

    back = restore(api, headers, 1)
    assert back.status_code == 200
    found = back.json()
    assert (found["version"], found["size"], found["digest"]) == (3, 1, digests[1])
    assert found["reason"] == "version 2 hides too much"
    answer = api.classify(headers, TEXT)
    assert (answer["results"], answer["active_set_version"]) == (under_one, 3)
    states = {p["id"]: p["state"] for p in api.client.get("/admin/prompts", headers=headers).json()["items"]}
    assert states == {first: "active", second: "suspended"}

    assert restore(api, headers, 2).json()["digest"] == digests[2]
    assert api.classify(headers, TEXT)["results"] == under_two
    with api.service.sessions() as session:
        audit.verify(session)


def test_pages(api: Api) -> None:
    headers = api.key("admin")
    for seed in (1, 2):
        add_prompt(api.service, soft_prompt(seed))
    page = api.client.get("/admin/active-sets?limit=2", headers=headers).json()
    assert ([s["version"] for s in page["items"]], page["next_before"]) == ([2, 1], 1)
    page = api.client.get("/admin/active-sets?limit=2&before=1", headers=headers).json()
    assert ([s["version"] for s in page["items"]], page["next_before"]) == ([0], None)
    assert api.client.get("/admin/active-sets/1", headers=headers).json()["size"] == 1


def test_what_cannot_be_restored(api: Api) -> None:
    headers = api.key()
    prompt = add_prompt(api.service, soft_prompt(1))
    add_prompt(api.service, soft_prompt(2))
    assert "in force already" in assert_problem(restore(api, headers, 2), 409, "conflict")["detail"]
    assert_problem(restore(api, headers, 9), 404, "not-found")
    assert_problem(restore(api, headers, 1, reason="  "), 422, "invalid-input", field="reason")
    assert_problem(restore(api, headers, -1), 422, "invalid-input", field="path.version")
    assert_problem(restore(api, headers, 2**31), 422, "invalid-input", field="path.version")
    revoke(api, headers, prompt)
    gone = assert_problem(restore(api, headers, 1), 409, "conflict")
    assert prompt in gone["detail"]
    assert api.classify(headers, TEXT)["active_set_version"] == 3


def test_only_admins(api: Api) -> None:
    headers = api.key("requests", "classify", "scores")
    assert_problem(restore(api, headers, 0), 403, "forbidden")
    for path in ("/admin/active-sets", "/admin/active-sets/0"):
        assert_problem(api.client.get(path, headers=headers), 403, "forbidden")
        assert_problem(api.client.get(path), 401, "unauthenticated")
