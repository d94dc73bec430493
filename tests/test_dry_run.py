"""Dry runs: figures by hand and the worker's own, nothing stored, nothing told, and nobody kept waiting."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from api_kit import MARKER, Api, add_prompt, assert_problem, running, server_logs, soft_prompt, tiny_llm, wait_until
from sqlalchemy import func, select

from app import dry_run
from app.deps import Service
from app.errors import DeadlineExceeded, NotReady, Overloaded
from app.settings import Mode
from app.tables import AuditEntry, Base
from models.errors import TextTooLong
from models.examples import Example, read_examples
from worker.context import Context
from worker.tasks import run_job

NOUNS = ("film", "movie", "story", "scene", "plot", "director")
WORDS = ("good", "bad", "great", "awful", "quite good", "very bad", "with a plot", "not a movie")
RETAIN = [f"the {noun} of number {i} is {word} and so on" for i in range(4) for noun in NOUNS for word in WORDS]
OWN = [f"the acting of {MARKER} in this {noun} is {word}" for noun, word in zip(NOUNS, WORDS, strict=False)]


def write_retain(folder: Path, texts: list[str]) -> Path:
    path = folder / "retain.jsonl"
    rows = [{"text": text, "label": ("positive", "negative")[i % 2]} for i, text in enumerate(texts)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def knobs(folder: Path, **changes: Any) -> dict[str, Any]:
    return {
        "retain": str(write_retain(folder, RETAIN)),
        "gate_rows": 160,
        "max_forget_texts": 16,
        "max_false_claim_rate": 0.05,
        "num_virtual_tokens": 4,
        "min_forget_abstain": 0.0,
        "max_retain_drop": 1.0,
        "max_class_drop": 1.0,
        "max_neighbour_drop": 1.0,
        "max_total_claim_rate": 0.5,
        **changes,
    }


@pytest.fixture
def api(database_url: str, tmp_path: Path) -> Iterator[Api]:
    with running(database_url, tmp_path, **knobs(tmp_path)) as api:
        yield api


@pytest.fixture
def lite(tmp_path: Path) -> Iterator[Api]:
    """The same where no database makes a difference."""
    with running(f"sqlite:///{tmp_path}/one.db", tmp_path, **knobs(tmp_path)) as api:
        yield api


def ask(api: Api, *texts: str, **options: Any) -> dict[str, Any]:
    body = {"forget_texts": list(texts), **({"options": options} if options else {})}
    response = api.client.post("/unlearn-requests?dry_run=true", json=body, headers=api.key("requests", "classify"))
    assert response.status_code == 200, response.text
    for text in (*texts, *RETAIN[:3], MARKER, str(api.service.settings.home)):
        assert text not in response.text
    report: dict[str, Any] = response.json()
    return report


def counts(api: Api) -> dict[str, int]:
    """Rows of every table, without the keys that `ask` makes."""
    with api.service.sessions() as session:
        found = {
            name: session.scalar(select(func.count()).select_from(table)) or 0
            for name, table in Base.metadata.tables.items()
            if name != "api_keys"
        }
        of_keys = select(func.count()).select_from(AuditEntry).where(AuditEntry.action == "key.created")
        return {**found, "audit_log": found["audit_log"] - (session.scalar(of_keys) or 0)}


def test_a_forget_set_by_hand(api: Api, caplog: pytest.LogCaptureFixture) -> None:
    before = counts(api)
    changed = RETAIN[10].replace(" and so on", " and so forth")
    texts = [OWN[0], OWN[0].upper(), OWN[0].replace("acting", "actign"), RETAIN[3], f"{RETAIN[3]} ! ", changed, OWN[1]]
    report = ask(api, *texts)
    forget, retain = report["forget"], report["retain"]
    assert (forget["texts"], forget["different"]) == (7, 7), "the worker tells upper case from lower"
    assert forget["exact_duplicates"] == [1], "letter case aside; punctuation makes another text"
    assert 2 in forget["near_duplicates"] and 4 in forget["near_duplicates"] and 0 not in forget["near_duplicates"]
    assert retain["rows"] == len(RETAIN)
    assert (retain["withheld"], retain["withheld_share"]) == (1, 1 / len(RETAIN))
    assert retain["texts"] == [3, 4], "the guard takes the second for the first"
    assert 5 in retain["near_texts"] and not {0, 1, 2, 6} & set(retain["near_texts"])
    assert retain["near_rows"] >= 1
    assert any("stay in the retain set" in warning for warning in report["warnings"])
    assert counts(api) == before
    assert list(api.service.settings.broker_dir.rglob("*.msg")) == []
    logged = "\n".join(record.getMessage() for record in server_logs(caplog))
    assert MARKER not in logged and RETAIN[3] not in logged
    audited = api.client.get("/unlearn-requests", headers=api.key()).json()
    assert audited["items"] == []


def test_it_says_what_the_worker_finds(api: Api) -> None:
    """Before and after the space is there that gates share, and with the pace of a training that has ended."""
    service, texts = api.service, OWN[:5]
    before = ask(api, *texts, max_steps=3)
    assert (before["cost"]["planned_steps"], before["cost"]["seconds"]) == (3, None)
    assert before["obstacles"] == []
    assert before["active_set_version"] == 0 and before["fingerprint"] == tiny_llm().fingerprint
    assert run_job(_context(service), api_submit(api, texts, max_steps=3))
    request = api.client.get("/unlearn-requests", headers=api.key()).json()["items"][0]
    assert request["state"] == "active", request["failure"]
    found, gate, blast = request["metrics"], before["gate"], before["blast_radius"]
    assert gate["own_recall"] == pytest.approx(found["gate_recall"])
    for name in ("unseen_claimed", "unseen_certain"):
        assert gate[name] == pytest.approx(found[name]), name
    assert (blast["rows"], blast["share"]) == (found["check_rows"], pytest.approx(found["false_claim_rate"]))
    assert blast["share_with_active_set"] == pytest.approx(found["total_claim_rate"])
    assert blast["low"] <= blast["share"] <= blast["high"] and blast["low"] < blast["high"]
    assert blast["claimed"] == round(blast["share"] * blast["rows"])

    after = ask(api, *texts, max_steps=6)
    assert after["active_set_version"] == 1
    assert after["forget"]["already_unknown"] == list(range(5)) and after["forget"]["already_unknown_share"] == 1
    assert after["gate"] == pytest.approx(gate) and after["blast_radius"]["share"] == pytest.approx(blast["share"])
    cost = after["cost"]
    assert cost["planned_steps"] == 6
    assert cost["seconds_per_step"] == pytest.approx(found["training_seconds"] / 3, abs=1e-3)
    assert cost["seconds"] == pytest.approx(6 * cost["seconds_per_step"], abs=0.1)
    assert "newest 1 trainings" in cost["basis"]


def api_submit(api: Api, texts: list[str], **options: Any) -> str:
    body = {"forget_texts": texts, "options": options}
    response = api.client.post("/unlearn-requests", json=body, headers=api.key("requests"))
    assert response.status_code == 202, response.text
    return str(response.json()["id"])


def _context(service: Service) -> Context:
    retain = read_examples(service.settings.retain, labels=service.settings.labels)
    return Context(service.settings, service.sessions, service.vault, tiny_llm(), retain)


def test_answers_need_the_scope_that_answers(api: Api) -> None:
    body = {"forget_texts": [RETAIN[0]]}
    report = api.client.post("/unlearn-requests?dry_run=true", json=body, headers=api.key("requests")).json()
    assert report["forget"]["already_unknown"] is report["forget"]["already_unknown_share"] is None
    assert report["retain"] is not None and report["blast_radius"]["share_with_active_set"] is None


def test_who_asked_for_what_before_is_not_told(api: Api) -> None:
    """Not by equal texts, not by near ones, and not by the gate, which such rows could help to fit."""
    near = RETAIN[0].replace(" and so on", " and so forth")
    before = ask(api, RETAIN[1], RETAIN[2], near)
    assert before["retain"]["near_texts"] and before["gate"] is not None
    api_submit(api, RETAIN[:2])
    after = ask(api, RETAIN[1], RETAIN[2], near)
    assert after == before and (after["retain"]["withheld"], after["retain"]["texts"]) == (2, [0, 1])


def test_what_is_in_force_shows_to_none_but_those_who_may_classify(api: Api) -> None:
    body = {"forget_texts": OWN[:3]}

    def report() -> dict[str, Any]:
        found = api.client.post("/unlearn-requests?dry_run=true", json=body, headers=api.key("requests")).json()
        return {name: found[name] for name in ("forget", "retain", "gate", "blast_radius", "obstacles", "warnings")}

    before = report()
    assert run_job(_context(api.service), api_submit(api, OWN[:5], max_steps=3))
    assert api.client.get("/unlearn-requests", headers=api.key()).json()["items"][0]["state"] == "active"
    assert report() == before


def test_only_what_is_answered_unknown_counts(tmp_path: Path) -> None:
    """In mode `concatenate` the prompt stands before every query, and there is no gate to say anything of."""
    mode = knobs(tmp_path, mode=Mode.CONCATENATE)
    with running(f"sqlite:///{tmp_path}/one.db", tmp_path, **mode) as api:
        headers = api.key()
        add_prompt(api.service, soft_prompt(1))
        answers = [api.classify(headers, text)["results"][0]["abstained"] for text in OWN]
        report = ask(api, *OWN)
        assert report["forget"]["already_unknown"] == [i for i, abstained in enumerate(answers) if abstained]
        assert report["mode"] == "concatenate" and report["gate"] is report["blast_radius"] is None
        assert report["retain"]["rows"] == len(RETAIN) and report["obstacles"] == []
        assert any("there is no gate" in warning for warning in report["warnings"])
        assert report["cost"]["planned_steps"] == 140


def test_without_a_retain_set_the_rest_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for retain in ("", str(tmp_path / "gone.jsonl")):
        with running(f"sqlite:///{tmp_path}/one.db", tmp_path, retain=retain) as api:
            report = ask(api, OWN[0], OWN[0].lower())
        assert report["retain"] is report["gate"] is report["blast_radius"] is None
        assert report["forget"]["exact_duplicates"] == [1]
        assert report["warnings"] == ["this server can read no retain set (its log says why), so nothing is said of it"]
    assert "gone.jsonl" in caplog.text


@pytest.mark.parametrize(
    ("changes", "texts", "code"),
    [
        ({"min_retain_rows": len(RETAIN)}, [RETAIN[0]], "too-few-retain-rows"),
        ({"retain_rows": 6, "min_retain_rows": 2}, [OWN[0]], "too-few-retain-rows"),
        ({"max_false_claim_rate": 1e-9, "min_forget_abstain": 1.0}, RETAIN[:4] + OWN[:2], "gate-too-narrow"),
        ({"max_false_claim_rate": 1.0, "max_total_claim_rate": 0.0}, OWN[:1], "checks-failed"),
    ],
)
def test_what_the_worker_would_fail_on(tmp_path: Path, changes: dict[str, Any], texts: list[str], code: str) -> None:
    rows = changes.pop("retain_rows", len(RETAIN))
    with running(f"sqlite:///{tmp_path}/one.db", tmp_path, **knobs(tmp_path, **changes)) as api:
        write_retain(tmp_path, RETAIN[:rows])
        report = ask(api, *texts)
    assert [obstacle["code"] for obstacle in report["obstacles"]] == [code]


def test_a_retain_text_that_does_not_fit_is_an_obstacle(tmp_path: Path) -> None:
    with running(f"sqlite:///{tmp_path}/one.db", tmp_path, **knobs(tmp_path)) as api:
        write_retain(tmp_path, [*RETAIN[:60], *(f"{text} {'good ' * 600}" for text in RETAIN[60:])])
        report = ask(api, *OWN[:2])
    assert [obstacle["code"] for obstacle in report["obstacles"]] == ["text-too-long"]
    assert report["blast_radius"] is None and report["retain"]["rows"] == len(RETAIN)


def test_one_at_a_time_and_in_time(lite: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    body, headers, runs = {"forget_texts": OWN[:2]}, lite.key("requests"), lite.service.dry_runs
    path = "/unlearn-requests?dry_run=true"
    with runs._lock:
        response = lite.client.post(path, json=body, headers=headers)
        assert_problem(response, 503, "overloaded")
        assert response.headers["retry-after"] == "5"
    # A deadline that passes while rows are read; what was read is kept, so the next one goes on from there.
    early, pieces = dry_run._early, 0

    def slow(texts: list[str]) -> Any:
        nonlocal pieces
        pieces += 1
        if pieces == 2:
            monkeypatch.setattr(dry_run.time, "monotonic", lambda: float("inf"))
        return early(texts)

    runs._at_once = 16
    monkeypatch.setattr(dry_run, "_early", slow)
    assert_problem(lite.client.post(path, json=body, headers=headers), 503, "deadline-exceeded")
    monkeypatch.undo()
    retain = runs._retain
    assert retain is not None and len(retain._states) >= 16
    assert not runs._lock.locked()
    assert lite.client.post(path, json=body, headers=headers).status_code == 200
    assert len(retain._states) <= 160


def test_states_of_rows_that_are_gone_are_let_go(lite: Api) -> None:
    ask(lite, *OWN[:2])
    retain = lite.service.dry_runs._retain
    assert retain is not None
    gone = next(iter(retain._states))
    ask(lite, *OWN[:2], retain.rows[gone].text)
    assert gone not in retain._states and len(retain._states) <= 160


def test_only_the_texts_limits_and_scope_apply(lite: Api) -> None:
    path, good = "/unlearn-requests?dry_run=true", {"forget_texts": [OWN[0]]}
    assert_problem(lite.client.post(path, json=good, headers=lite.key("classify")), 403, "forbidden")
    response = lite.client.post("/unlearn-requests?dry_run=perhaps", json=good, headers=lite.key())
    assert_problem(response, 422, "invalid-input", field="query.dry_run")
    many = {"forget_texts": [OWN[0]] * 17}
    assert_problem(lite.client.post(path, json=many, headers=lite.key()), 422, "invalid-input", field="forget_texts")
    assert lite.client.post("/unlearn-requests?dry_run=false", json=good, headers=lite.key()).status_code == 202


# --- the model's thread ----------------------------------------------------------------------------------------------


def test_a_question_waits_for_one_piece_at_most(lite: Api) -> None:
    serving, order = lite.service.serving, list[str]()
    started, go = threading.Event(), threading.Event()

    def first(*_: Any) -> None:
        started.set()
        assert go.wait(20)
        order.append("piece")

    def pieces() -> None:
        serving.work(first)
        serving.work(lambda *_: order.append("piece"))

    thread = threading.Thread(target=pieces)
    thread.start()
    assert started.wait(20)
    answer = serving.submit(serving.encode([OWN[0]]))
    answer.add_done_callback(lambda _: order.append("answer"))
    go.set()
    assert answer.result(20).results
    thread.join(20)
    assert order == ["piece", "answer", "piece"]


def test_what_a_piece_raises_is_its_callers_alone(lite: Api) -> None:
    serving = lite.service.serving

    def fails(error: Exception) -> Any:
        def run(*_: Any) -> None:
            raise error

        return run

    for error, seen in ((TextTooLong("too long"), TextTooLong), (KeyError(MARKER), NotReady)):
        for _ in range(4):
            with pytest.raises(seen) as caught:
                serving.work(fails(error))
            assert MARKER not in str(caught.value)
    serving.check()  # and the server is as ready as before
    with pytest.raises(DeadlineExceeded):
        serving.work(lambda *_: None, deadline=0.0)
    tokens = serving._classifier.take_counts()
    assert tokens == (0, 0)


def test_a_full_queue_refuses_a_piece(tmp_path: Path) -> None:
    started, go = threading.Event(), threading.Event()

    def block(*_: Any) -> None:
        started.set()
        assert go.wait(20)

    with running(f"sqlite:///{tmp_path}/one.db", tmp_path, max_queued_texts=4, max_batch_texts=4) as api:
        serving = api.service.serving
        thread = threading.Thread(target=serving.work, args=(block,))
        thread.start()
        assert started.wait(20)
        waiting = serving.submit(serving.encode([OWN[0]]))
        with pytest.raises(Overloaded):
            serving.work(lambda *_: None)
        go.set()
        thread.join(20)
        wait_until(waiting.done)


def test_examples_carry_no_text_in_a_repr() -> None:
    assert MARKER not in repr(Example(MARKER)) + repr(dry_run._Run([MARKER], [MARKER], {}, 0.0, True, [], []))
