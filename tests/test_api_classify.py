"""Classification: one shape, scores by scope, every replica obeys a revoke, and no answer without the active set."""

from __future__ import annotations

import json
import logging
import math
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from api_kit import MARKER, Api, add_prompt, assert_problem, running, soft_prompt, tiny_llm, wait_until
from sqlalchemy import func, select, update

from app import active_set
from app.errors import Busy
from app.settings import Mode
from app.tables import ActiveSet, AuditEntry, Prompt, UnlearnRequest
from models.inference import Classifier
from models.soft_prompt import SoftPrompt

CONCATENATE = Mode.CONCATENATE  # the prompts of these tests have no gate; for gates see test_stack.py
TEXT = f"the film with {MARKER} is good"


@pytest.fixture
def api(database_url: str, tmp_path: Path) -> Iterator[Api]:
    with running(database_url, tmp_path, mode=CONCATENATE) as api:
        yield api


def expected(*prompts: SoftPrompt) -> dict[str, float]:
    """What the ML core says about TEXT behind exactly these prompts."""
    return Classifier(tiny_llm()).classify([TEXT], prompts)[0].probabilities


def scores(api: Api, headers: dict[str, str]) -> dict[str, float]:
    found: dict[str, float] = api.classify(headers, TEXT)["results"][0]["scores"]
    return found


def test_one_shape_and_no_scores_by_default(api: Api) -> None:
    texts = [TEXT, "a bad film", "awful"]
    plain = Classifier(tiny_llm()).classify(texts)
    headers = api.key("classify")
    one = api.client.post("/classify", json={"text": TEXT}, headers=headers)
    many = api.client.post("/classify", json={"texts": texts}, headers=headers)
    assert MARKER not in one.text + many.text
    assert one.json()["results"] == [{"label": plain[0].label, "abstained": plain[0].abstained}]
    assert many.json()["results"] == [{"label": found.label, "abstained": found.abstained} for found in plain]
    assert set(one.json()) == set(many.json()) == {"results", "active_set_version"}


def test_scores_when_asked_for_and_allowed(api: Api) -> None:
    headers = api.key("classify", "scores")
    assert "scores" not in api.client.post("/classify", json={"text": TEXT}, headers=headers).json()["results"][0]
    [result] = api.classify(headers, TEXT)["results"]
    assert result["scores"] == pytest.approx(expected())
    assert result["confidence"] == max(result["scores"].values()) == result["scores"][result["label"]]


def test_activation_and_revocation_reach_the_next_call(api: Api) -> None:
    headers = api.key()
    first, second = soft_prompt(1), soft_prompt(2)
    versions = [api.classify(headers, TEXT)["active_set_version"]]
    bare = scores(api, headers)
    assert bare == pytest.approx(expected())
    ids = []
    for stack in ([first], [first, second]):
        ids.append(add_prompt(api.service, stack[-1]))
        versions.append(api.classify(headers, TEXT)["active_set_version"])
        assert scores(api, headers) == pytest.approx(expected(*stack), abs=1e-6)
    assert scores(api, headers) != pytest.approx(bare, abs=1e-3), "these prompts must make a difference"
    listed = api.client.get("/admin/prompts", headers=headers).json()["items"]
    assert [prompt["id"] for prompt in listed] == ids[::-1]
    revoked = api.client.post(f"/admin/prompts/{ids[0]}/revoke", json={"reason": "withdrawn"}, headers=headers)
    assert revoked.status_code == 200
    assert (revoked.json()["state"], revoked.json()["revoke_reason"]) == ("revoked", "withdrawn")
    assert not {"sealed", "wrapped_key"} & set(revoked.json())
    versions.append(api.classify(headers, TEXT)["active_set_version"])
    assert scores(api, headers) == pytest.approx(expected(second), abs=1e-6)
    api.client.post(f"/admin/prompts/{ids[1]}/revoke", json={"reason": "withdrawn"}, headers=headers)
    assert scores(api, headers) == bare, "bit for bit as before"
    assert versions == sorted(set(versions))
    record = api.client.get(f"/admin/prompts/{ids[0]}", headers=headers).json()
    assert {**record, "active_set_version": versions[-1]} == revoked.json(), "the answer names the set without it"
    request = api.client.get(f"/unlearn-requests/{revoked.json()['request_id']}", headers=headers).json()
    assert request["state"] == "revoked"


def test_two_replicas_on_one_database(database_url: str, tmp_path: Path) -> None:
    with (
        running(database_url, tmp_path / "a", mode=CONCATENATE) as one,
        running(database_url, tmp_path / "b", mode=CONCATENATE) as other,
    ):
        headers = one.key()
        bare = scores(other, headers)
        prompt = soft_prompt(3)
        prompt_id = add_prompt(one.service, prompt)
        assert scores(other, headers) == scores(one, headers) == pytest.approx(expected(prompt), abs=1e-6)
        one.client.post(f"/admin/prompts/{prompt_id}/revoke", json={"reason": "withdrawn"}, headers=headers)
        after = other.classify(headers, TEXT)
        assert after["results"][0]["scores"] == bare
        assert after["active_set_version"] == one.classify(headers, TEXT)["active_set_version"]


def test_a_replica_that_is_busy_obeys_too(api: Api) -> None:
    """Calls in flight all the while: any that starts after the acknowledged revoke goes without the prompt."""
    headers = api.key()
    prompt_id = add_prompt(api.service, soft_prompt(4))
    revoked = threading.Event()
    seen: list[tuple[bool, int]] = []

    def ask() -> None:
        for _ in range(15):
            was_revoked = revoked.is_set()
            seen.append((was_revoked, api.classify(headers, TEXT)["active_set_version"]))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    api.client.post(f"/admin/prompts/{prompt_id}/revoke", json={"reason": "withdrawn"}, headers=headers)
    revoked.set()
    final = api.classify(headers, TEXT)["active_set_version"]
    with api.service.sessions() as session:
        assert final == active_set.read_active_set(session).version
    for thread in threads:
        thread.join()
    assert len(seen) == 60
    assert {version for was_revoked, version in seen if was_revoked} <= {final}


def corrupt(api: Api, prompt_id: str, **values: object) -> None:
    with api.service.sessions.begin() as session:
        session.execute(update(Prompt).where(Prompt.id == prompt_id).values(**values))


def test_fail_closed_on_a_corrupted_prompt(database_url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    prompt = soft_prompt(5)
    with running(database_url, tmp_path, mode=CONCATENATE) as api:
        prompt_id = add_prompt(api.service, prompt)
        with api.service.sessions() as session:
            sealed = session.scalars(select(Prompt.sealed)).one()
        corrupt(api, prompt_id, sealed=sealed[:-1] + bytes([sealed[-1] ^ 1]))
        headers = api.key()
        for _ in range(2):
            problem = assert_problem(
                api.client.post("/classify", json={"text": TEXT}, headers=headers), 503, "not-ready"
            )
            assert prompt_id in problem["detail"]
        assert_problem(api.client.get("/readyz"), 503, "not-ready")
        assert api.client.get("/livez").status_code == 200
        assert "Quillfeather" not in caplog.text
        corrupt(api, prompt_id, sealed=sealed)
        assert scores(api, headers) == pytest.approx(expected(prompt), abs=1e-6)
        assert api.client.get("/readyz").json() == {"status": "ready", "degraded": []}


def test_fail_closed_on_a_prompt_of_another_model(api: Api) -> None:
    headers = api.key()
    assert scores(api, headers)
    prompt_id = add_prompt(api.service, SoftPrompt(soft_prompt(6).embeddings, "0" * 64))
    problem = assert_problem(api.client.post("/classify", json={"text": TEXT}, headers=headers), 503, "not-ready")
    assert problem["detail"].startswith(f"prompt {prompt_id} cannot be loaded: prompt of model 000000000000")
    api.client.post(f"/admin/prompts/{prompt_id}/revoke", json={"reason": "wrong model"}, headers=headers)
    assert scores(api, headers) == pytest.approx(expected())


def test_fail_closed_on_an_active_set_that_lost_a_prompt(api: Api) -> None:
    """A row that vanished behind the service's back (a bad restore) must not turn into an unprompted answer."""
    headers = api.key()
    prompt_id = add_prompt(api.service, soft_prompt(7))
    with api.service.sessions.begin() as session:
        session.execute(update(Prompt).where(Prompt.id == prompt_id).values(state="revoked"))
    assert_problem(api.client.post("/classify", json={"text": TEXT}, headers=headers), 503, "not-ready")
    with api.service.sessions.begin() as session:
        session.execute(update(ActiveSet).values(version=ActiveSet.version + 1, id=2))
    assert_problem(api.client.post("/classify", json={"text": TEXT}, headers=headers), 503, "not-ready")


def test_prompts_and_text_that_exceed_the_model_fail_closed(api: Api) -> None:
    headers = api.key()
    add_prompt(api.service, soft_prompt(8, tokens=tiny_llm().max_positions))
    assert_problem(api.client.post("/classify", json={"text": TEXT}, headers=headers), 503, "not-ready")


def test_an_old_stack_is_let_go(api: Api) -> None:
    headers = api.key()
    prompt_id = add_prompt(api.service, soft_prompt(9))
    api.classify(headers, TEXT)
    stack = api.service.serving._reader._stack
    assert stack is not None and len(stack.prompts) == 1
    api.client.post(f"/admin/prompts/{prompt_id}/revoke", json={"reason": "withdrawn"}, headers=headers)
    api.classify(headers, TEXT)
    stack = api.service.serving._reader._stack
    assert stack is not None and stack.prompts == ()


def test_a_full_queue_is_a_503_with_retry_after(tmp_path: Path) -> None:
    with running(f"sqlite:///{tmp_path}/letheon.db", tmp_path, max_queued_texts=1) as api:
        headers = api.key("classify")
        serving = api.service.serving
        answers: list[int] = []
        with serving._lock:  # the model thread stops where it would confirm the active set
            running_one = serving.submit(serving.encode(["a"]))
            wait_until(lambda: serving._batcher.queued == 0)
            waiting = serving.submit(serving.encode(["b"]))
            response = api.client.post("/classify", json={"text": TEXT}, headers=headers)
            assert_problem(response, 503, "overloaded")
            assert 1 <= int(response.headers["retry-after"]) <= 60
            answers.append(response.status_code)
        assert len(running_one.result(20).results) == len(waiting.result(20).results) == 1
        assert api.client.post("/classify", json={"text": TEXT}, headers=headers).status_code == 200


def test_a_client_that_sets_a_deadline_is_not_kept_waiting(tmp_path: Path) -> None:
    with running(f"sqlite:///{tmp_path}/letheon.db", tmp_path, classify_deadline_seconds=0.3) as api:
        headers = api.key("classify")
        serving = api.service.serving
        with serving._lock:  # the model thread stops where it would confirm the active set
            running_one = serving.submit(serving.encode(["a"]))
            wait_until(lambda: serving._batcher.running > 0)
            for allowed in ({}, {"timeout_seconds": 0.05}, {"timeout_seconds": 3600}):
                response = api.client.post("/classify", json={"text": TEXT, **allowed}, headers=headers)
                problem = assert_problem(response, 503, "deadline-exceeded")
                assert response.headers["retry-after"] == "1" and TEXT not in str(problem)
                assert serving._batcher.queued == 0, "who stops waiting leaves the queue"
            wait_until(lambda: serving._batcher.running > 0.3)
            assert_problem(api.client.get("/readyz"), 503, "not-ready")
        assert len(running_one.result(20).results) == 1
        assert api.client.get("/readyz").status_code == 200
        wait_until(lambda: api.client.post("/classify", json={"text": TEXT}, headers=headers).status_code == 200)
        for wrong in (0, -1, float("inf"), "1"):
            content = json.dumps({"text": TEXT, "timeout_seconds": wrong})
            json_headers = {**headers, "Content-Type": "application/json"}
            response = api.client.post("/classify", content=content, headers=json_headers)
            assert_problem(response, 422, "invalid-input")


def test_a_client_may_name_the_version_it_knows_of(api: Api) -> None:
    headers = api.key()
    prompt_id = add_prompt(api.service, soft_prompt(10))
    revoked = api.client.post(f"/admin/prompts/{prompt_id}/revoke", json={"reason": "withdrawn"}, headers=headers)
    version = revoked.json()["active_set_version"]
    for known in (0, version - 1, version):
        answer = api.client.post("/classify", json={"text": TEXT, "min_version": known}, headers=headers)
        assert answer.json()["active_set_version"] == version
    response = api.client.post("/classify", json={"text": TEXT, "min_version": version + 1}, headers=headers)
    problem = assert_problem(response, 503, "not-ready")
    assert (problem["active_set_version"], response.headers["retry-after"]) == (version, "1")
    for wrong in (-1, 2**31, 1.5, "1"):
        response = api.client.post("/classify", json={"text": TEXT, "min_version": wrong}, headers=headers)
        assert_problem(response, 422, "invalid-input")


def test_readyz_turns_red_when_the_model_thread_is_gone(api: Api) -> None:
    assert api.client.get("/readyz").status_code == 200
    assert api.client.get("/livez").status_code == 200
    api.service.serving.close()
    assert_problem(api.client.get("/livez"), 503, "stuck")
    assert_problem(api.client.get("/readyz"), 503, "not-ready")
    assert_problem(api.client.post("/classify", json={"text": TEXT}, headers=api.key()), 503, "not-ready")


def test_classifying_writes_nothing(api: Api) -> None:
    headers = api.key()

    def rows() -> list[int | None]:
        with api.service.sessions() as session:
            return [session.scalar(select(func.count()).select_from(t)) for t in (AuditEntry, UnlearnRequest, Prompt)]

    before = rows()
    scores(api, headers)
    assert rows() == before


def test_only_a_batch_beyond_all_patience_is_stuck(tmp_path: Path) -> None:
    with running(f"sqlite:///{tmp_path}/letheon.db", tmp_path, classify_deadline_seconds=5.0) as api:
        serving = api.service.serving
        with serving._lock:  # the model thread stops where it would confirm the active set
            held = serving.submit([])
            wait_until(lambda: serving._batcher.running > 0)
            assert serving._batcher._running_since is not None
            serving._batcher._running_since -= 6.0  # as if it had taken so long
            with pytest.raises(Busy):
                serving.check()
            assert api.client.get("/livez").status_code == 200
            serving._batcher._stepped -= 60.0
            assert_problem(api.client.get("/livez"), 503, "stuck")
        held.result(20)
        assert api.client.get("/livez").status_code == 200


def test_a_call_too_large_for_a_slow_model_ends_with_its_deadline_and_harms_nobody(tmp_path: Path) -> None:
    passes: list[float] = []

    def slow(*_: object) -> None:
        passes.append(time.monotonic())
        time.sleep(0.3)

    knobs = {"classify_deadline_seconds": 0.5, "max_classify_texts": 320, "max_batch_texts": 64}
    with ExitStack() as stack:
        api = stack.enter_context(running(f"sqlite:///{tmp_path}/letheon.db", tmp_path, **knobs))
        hook = stack.enter_context(tiny_llm().decoder.norm.register_forward_pre_hook(slow))
        headers = api.key("classify")
        for _ in range(4):  # more than would make it unready if each were a failure
            answer = api.client.post("/classify", json={"texts": [TEXT] * 320}, headers=headers)
            assert_problem(answer, 503, "deadline-exceeded")
            wait_until(lambda: api.service.serving._batcher.running == 0)
        assert len(passes) <= 4 * 3, "five passes each, had they gone on"
        assert [api.client.get(path).status_code for path in ("/livez", "/readyz")] == [200, 200]
        hook.remove()
        wait_until(lambda: api.client.post("/classify", json={"text": TEXT}, headers=headers).status_code == 200)


def test_a_model_that_fails_every_batch_is_not_ready_until_it_answers(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Others would be sent to where refusals are quick."""

    def fail(*_: object) -> None:
        raise RuntimeError(f"device lost, {TEXT}")

    with ExitStack() as stack:
        hook = stack.enter_context(tiny_llm().decoder.norm.register_forward_pre_hook(fail))
        api = stack.enter_context(running(f"sqlite:///{tmp_path}/letheon.db", tmp_path, active_set_poll_seconds=0.02))
        headers = api.key("classify")
        for _ in range(2):
            assert_problem(api.client.post("/classify", json={"text": TEXT}, headers=headers), 503, "not-ready")
            assert api.client.get("/readyz").status_code == 200, "it may have been the text"
        assert_problem(api.client.post("/classify", json={"text": TEXT}, headers=headers), 503, "not-ready")
        assert "batches" in assert_problem(api.client.get("/readyz"), 503, "not-ready")["detail"]
        assert api.client.get("/livez").status_code == 200
        hook.remove()
        wait_until(lambda: api.client.get("/readyz").status_code == 200)
        assert api.client.post("/classify", json={"text": TEXT}, headers=headers).status_code == 200
    assert "RuntimeError" in caplog.text and MARKER not in caplog.text


def test_what_cannot_be_answered_in_time_is_refused_before_it_is_read(tmp_path: Path) -> None:
    with running(f"sqlite:///{tmp_path}/letheon.db", tmp_path, max_queued_texts=3) as api:
        headers, serving = api.key("classify"), api.service.serving
        with serving.place(2, math.inf) as put:  # somebody's texts are being made tokens
            response = api.client.post("/classify", json={"texts": [TEXT, "x" * 5000]}, headers=headers)
            assert_problem(response, 503, "overloaded")
            assert api.client.post("/classify", json={"texts": [TEXT]}, headers=headers).status_code == 200
            future = put(serving.encode(["a", "b"]))
        assert len(future.result(20).results) == 2
        response = api.client.post("/classify", json={"texts": [TEXT, "x" * 5000]}, headers=headers)
        assert_problem(response, 422, "invalid-input")
        assert serving._batcher._reserved == 0
