"""The search for a canary looks at every answer: no route is left out, and a leak is found wherever it is planted."""

from __future__ import annotations

import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from api_kit import Api, add_prompt, running, soft_prompt
from fastapi import Response
from fastapi.testclient import TestClient
from sqlalchemy import update
from test_access_matrix import routes

from app import audit, report_pdf, report_view, webhooks
from app.keystore import KeyStore
from app.settings import Mode
from app.tables import Prompt, UnlearnRequest
from app.vault import Vault
from bench.fault_canary import Collector, copy_of, make_canaries, recoverable, search
from bench.fault_walk import Asked, log_in, walk

pytestmark = pytest.mark.slow

UNWALKED = {"/openapi.json", "/docs", "/docs/{name}"}
"""What a walk begins with, and files that are the same for everybody."""


@pytest.fixture
def api(tmp_path: Path) -> Iterator[Api]:
    url, changes = f"sqlite:///{tmp_path}/letheon.db", {"webhook_private": True, "export_prompts": True}
    with running(url, tmp_path, mode=Mode.CONCATENATE, **changes) as api:
        yield api


class Walked:
    """A server with something in every place, and who walks through it."""

    def __init__(self, api: Api) -> None:
        self.api, self.canaries = api, make_canaries()
        headers = api.key()
        client: Any = TestClient(api.app, headers=headers)
        self.asked = Asked(replace(api, client=client))  # type: ignore[arg-type]  # of an API it takes the client
        log_in(self.asked, headers["Authorization"].removeprefix("Bearer "))
        self.prompt_id = add_prompt(api.service, soft_prompt(1))
        with api.service.sessions() as session:
            prompt = session.get(Prompt, self.prompt_id)
            assert prompt is not None
            self.request_id = prompt.request_id
        self.webhook_id = self.asked("POST", "/webhooks", json={"url": "http://127.0.0.1:9/"}).json()["id"]

    def hits(self) -> list[str]:
        known = {"webhook_id": self.webhook_id, "version": "1"}
        walk(self.asked, known, [{"request_id": self.request_id, "prompt_id": self.prompt_id}])
        return search({"responses": b"\n".join(self.asked.said)}, self.canaries)


def test_a_walk_comes_by_every_route_and_finds_nothing_that_is_not_there(api: Api) -> None:
    walked = Walked(api)
    assert walked.hits() == []
    assert set(walked.asked.routes) == {path for method, path in routes(api.app.routes) if method == "GET"} - UNWALKED
    # Nothing was trained here, so there is no evidence; the bench's own trials have it.
    assert walked.asked.missed and all("/evidence" in route for route in walked.asked.missed)


def test_a_route_that_a_walk_cannot_call_is_named(api: Api) -> None:
    walked = Walked(api)

    def of_a_thing(thing_id: str) -> dict[str, str]:
        return {"thing": walked.canaries[0]}

    api.app.get("/things/{thing_id}")(of_a_thing)
    api.app.get("/never")(lambda: Response(status_code=409))
    assert walked.hits() == []
    assert {"/things/{thing_id}", "/never"} <= set(walked.asked.missed)


def new_route(walked: Walked, _: pytest.MonkeyPatch) -> None:
    def leak(request_id: str) -> dict[str, str]:
        return {"text": walked.canaries[0]}

    walked.api.app.get("/unlearn-requests/{request_id}/leak")(leak)


def audit_detail(walked: Walked, _: pytest.MonkeyPatch) -> None:
    with walked.api.service.sessions.begin() as session:
        audit.append(session, actor="test", action="test", subject="x", detail={"text": walked.canaries[1]})


def request_row(walked: Walked, _: pytest.MonkeyPatch) -> None:
    with walked.api.service.sessions.begin() as session:
        session.execute(update(UnlearnRequest).values(reason=walked.canaries[1]))


def webhook_log(walked: Walked, _: pytest.MonkeyPatch) -> None:
    with walked.api.service.sessions.begin() as session:
        webhooks.ping(session, walked.webhook_id, of=None).last_error = walked.canaries[0]


def console_page(walked: Walked, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.console.overview._health", lambda service: walked.canaries[0])


def only_the_pdf(walked: Walked, monkeypatch: pytest.MonkeyPatch) -> None:
    def subtitled(document: Any) -> report_view.View:
        return replace(report_view.view(document), subtitle=walked.canaries[0])

    monkeypatch.setattr(report_pdf, "view", subtitled)


def attached_to_the_pdf(walked: Walked, monkeypatch: pytest.MonkeyPatch) -> None:
    def with_receipt(document: Any) -> report_view.View:
        return replace(report_view.view(document), receipt=walked.canaries[1])

    monkeypatch.setattr(report_pdf, "view", with_receipt)


PLANTS = [new_route, audit_detail, request_row, webhook_log, console_page, only_the_pdf, attached_to_the_pdf]


@pytest.mark.parametrize("plant", PLANTS)
def test_a_leak_is_found_wherever_it_is_planted(
    api: Api, plant: Callable[[Walked, pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    walked = Walked(api)
    plant(walked, monkeypatch)
    assert walked.hits()


def test_what_arrives_at_a_receiver_is_kept_whole() -> None:
    canaries, receiver = make_canaries(), Collector()
    try:
        for headers, body in (({}, canaries[1]), ({"X-Text": canaries[0]}, "{}")):
            url = f"http://127.0.0.1:{receiver.server_port}/"
            with urllib.request.urlopen(urllib.request.Request(url, body.encode(), headers)) as answer:
                assert answer.status == 200
            assert search({"messages": receiver.received[-1]}, canaries)
    finally:
        receiver.close()


def test_a_copy_that_still_opens_is_named(tmp_path: Path) -> None:
    vault = Vault(bytes(32), keystore=KeyStore(f"sqlite:///{tmp_path}/keystore.db"))
    kept, shredded = vault.new_key(), vault.new_key()
    copies = {
        name: copy_of(key, vault.seal(key, b"a text", aad=name), name)
        for name, key in (("prompt", kept), ("gate", shredded), ("evidence", shredded))
    }
    made = {name: copy for name, copy in copies.items() if copy is not None}
    assert len(recoverable(vault, made)) == 3
    assert vault.keystore is not None
    vault.keystore.destroy([shredded[1:17]])
    (reason,) = recoverable(vault, made)
    assert "prompt" in reason
    vault.close()
