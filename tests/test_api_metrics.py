"""GET /metrics: who may read it, what it counts, that it answers when the database does not, and holds no text."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from api_kit import (
    MARKER,
    Api,
    add_prompt,
    assert_problem,
    claim,
    gate_space,
    make_gate,
    make_settings,
    new_key,
    running,
    soft_prompt,
    take_database_away,
    tiny_llm,
)
from databases import database_kinds, fresh_database
from fastapi.testclient import TestClient
from metrics_kit import by_label, scrape, value
from prometheus_client import CollectorRegistry
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics_families
from prometheus_client.parser import text_string_to_metric_families

from app import db, keys, lifecycle
from app import scrape as scrape_module
from app.main import create_app
from app.metrics import Metrics, outcome, outcomes
from app.scrape import Patience
from app.settings import Mode
from models.gate import Gate
from models.inference import Classification, Classifier
from models.routing import Route, Routed, Routes, classify_routed

CANARY = "Zyxomma"
HTTP = "letheon_http_request_duration_seconds_count"


@pytest.fixture
def api(database_url: str, tmp_path: Path) -> Iterator[Api]:
    with running(database_url, tmp_path, mode=Mode.CONCATENATE) as api:
        yield api


@pytest.fixture
def lite(tmp_path: Path) -> Iterator[Api]:
    with running(f"sqlite:///{tmp_path}/letheon.db", tmp_path, mode=Mode.CONCATENATE) as api:
        yield api


def test_requests_are_counted_once_by_template_and_status(lite: Api) -> None:
    headers = lite.key()
    before = scrape(lite, headers)
    assert (HTTP, frozenset({"method": "GET", "route": "/metrics", "status": "200"}.items())) not in before
    lite.classify(headers, "a good film")
    lite.classify(headers, "a bad film")
    created = lite.submit(headers)["id"]
    lite.client.get(f"/unlearn-requests/{created}", headers=headers)
    lite.client.get("/unlearn-requests/nothing", headers=headers)
    lite.client.post("/classify", json={"text": "a"})
    lite.client.get(f"/{CANARY}/x?q={CANARY}")
    lite.client.request(CANARY, "/classify")
    lite.client.post("/classify", content=b"x" * 30_000)
    samples = scrape(lite, headers)
    counted = {
        tuple(dict(labels)[name] for name in ("method", "route", "status")): found
        for (name, labels), found in samples.items()
        if name == HTTP
    }
    assert counted == {
        ("GET", "/metrics", "200"): 1,  # the one before; this one is not over yet
        ("POST", "/classify", "200"): 2,
        ("POST", "/unlearn-requests", "202"): 1,
        ("GET", "/unlearn-requests/{request_id}", "200"): 1,
        ("GET", "/unlearn-requests/{request_id}", "404"): 1,
        ("POST", "/classify", "401"): 1,
        ("GET", "(no route)", "404"): 1,
        ("(other)", "/classify", "405"): 1,
        ("POST", "(no route)", "413"): 1,
    }
    seconds = value(
        samples, "letheon_http_request_duration_seconds_sum", method="POST", route="/classify", status="200"
    )
    assert 0 < seconds < 60


def test_what_serving_and_batching_tell(lite: Api) -> None:
    headers, metrics = lite.key("metrics"), lite.service.metrics
    samples = scrape(lite, headers)
    # Before anything happened every series is there, or the first event would be invisible to a rate.
    assert set(by_label(samples, "letheon_classified_texts_total", "outcome").values()) == {0}
    assert set(by_label(samples, "letheon_refused_total", "reason")) == {
        "overloaded",
        "deadline",
        "not-ready",
        "disconnected",
    }
    waiting = [3]
    metrics.queue(lambda: waiting[0], lambda: 1.5 if waiting[0] else 0.0)
    metrics.batch(texts=32, seconds=0.2, tokens=900, padding=100)
    metrics.batch(texts=1, seconds=0.01, tokens=20, padding=0)
    metrics.waited(0.03)
    metrics.waited(120)
    metrics.answers(base=30, claimed=2, prompted_abstained=3, certain=4, guarded=5)
    metrics.answers(base=1, claimed=0, prompted_abstained=0, certain=0, guarded=0)
    metrics.active_set(7, 3)
    metrics.refused("overloaded")
    metrics.refused("overloaded")
    metrics.refused("disconnected")
    samples = scrape(lite, headers)
    assert value(samples, "letheon_queue_texts") == 3
    assert value(samples, "letheon_queue_oldest_seconds") == 1.5
    assert value(samples, "letheon_batch_texts_bucket", le="1.0") == 1
    assert value(samples, "letheon_batch_texts_bucket", le="32.0") == value(samples, "letheon_batch_texts_count") == 2
    assert value(samples, "letheon_batch_texts_sum") == 33
    assert value(samples, "letheon_batch_duration_seconds_sum") == pytest.approx(0.21)
    assert value(samples, "letheon_batch_tokens_total") == 920
    assert value(samples, "letheon_batch_padding_tokens_total") == 100
    assert value(samples, "letheon_queue_wait_seconds_bucket", le="60.0") == 1
    assert value(samples, "letheon_queue_wait_seconds_count") == 2
    assert by_label(samples, "letheon_classified_texts_total", "outcome") == {
        "base": 31,
        "cleared": 2,
        "abstained": 3,
        "certain": 4,
        "guarded": 5,
    }
    assert by_label(samples, "letheon_refused_total", "reason") == {
        "overloaded": 2,
        "deadline": 0,
        "not-ready": 0,
        "disconnected": 1,
    }
    assert value(samples, "letheon_active_set_version") == 7
    assert value(samples, "letheon_active_set_prompts") == 3
    waiting[0] = 0
    assert value(scrape(lite, headers), "letheon_queue_oldest_seconds") == 0


def test_classifying_is_counted_as_it_happens(tmp_path: Path) -> None:
    with running(f"sqlite:///{tmp_path}/letheon.db", tmp_path) as api:
        headers, serving = api.key(), api.service.serving
        known = f"{CANARY} is awful"
        gate = make_gate(known, digests=[api.service.vault.gate_digest(known)])
        prompt_id = add_prompt(api.service, soft_prompt(1), gate, text=known)
        texts = ["a good film", known, "the plot is great"]
        assert api.client.post("/classify", json={"texts": texts}, headers=headers).status_code == 200
        samples = scrape(api, headers)
        assert by_label(samples, "letheon_classified_texts_total", "outcome") == {
            "base": 2,
            "cleared": 0,
            "abstained": 0,
            "certain": 0,
            "guarded": 1,
        }
        assert value(samples, "letheon_batch_texts_sum") == 3
        assert value(samples, "letheon_batch_tokens_total") == sum(len(row) for row in serving.llm.rows(texts))
        assert value(samples, "letheon_batch_padding_tokens_total") == 0, "rows are packed"
        assert value(samples, "letheon_queue_wait_seconds_count") == 1
        version = value(samples, "letheon_active_set_version")
        assert value(samples, "letheon_active_set_prompts") == 1
        api.client.post(f"/admin/prompts/{prompt_id}/revoke", json={"reason": "withdrawn"}, headers=headers)
        api.classify(headers, "a good film")
        samples = scrape(api, headers)
        assert value(samples, "letheon_active_set_version") == version + 1
        assert value(samples, "letheon_active_set_prompts") == 0
        with serving._lock:  # the model thread stops where it would confirm the active set
            hurried = {"text": "a", "timeout_seconds": 0.2}
            response = api.client.post("/classify", json=hurried, headers=headers)
            assert_problem(response, 503, "deadline-exceeded")
        late = api.client.post("/classify", json={"text": "a", "min_version": 99}, headers=headers)
        assert_problem(late, 503, "not-ready")
        serving.close()
        assert_problem(api.client.post("/classify", json={"text": "a"}, headers=headers), 503, "not-ready")
        refused = by_label(scrape(api, headers), "letheon_refused_total", "reason")
        assert refused == {"overloaded": 0, "deadline": 1, "not-ready": 2, "disconnected": 0}


def test_outcomes_of_what_the_model_really_decides() -> None:
    """A gate per way of deciding, and prompts enough that some abstain on the claimed text and some do not."""
    llm = tiny_llm()
    classifier = Classifier(llm)
    texts = ["Zyxomma Quillfeather is awful", "a very bad scene", "the plot is great"]
    gate = make_gate(texts[0])
    found: dict[str, Routed] = {}

    def decide(gate: Gate, seed: int, text: str, known: str = "") -> Routed:
        routes = Routes([Route(soft_prompt(seed), gate)], {gate.space: gate_space()}, fingerprint=llm.fingerprint)
        [decided] = classify_routed(
            classifier, routes, [text], digest=lambda text: b"\1" * 32 if text == known else b"\2" * 32, max_prompts=4
        )
        return decided

    for seed in range(60):
        decided = decide(gate, seed, texts[0])
        assert decided.claims == (0,)
        behind = classifier.classify([texts[0]], [soft_prompt(seed)])[0]
        assert outcome(decided) == ("abstained" if behind.abstained else "cleared")
        found[outcome(decided)] = decided
    found["base"] = decide(gate, 0, texts[2])
    sure = Gate(gate.directions, gate.threshold, gate.threshold, gate.digests, gate.space)
    found["certain"] = decide(sure, 0, texts[0])
    guard = make_gate(texts[0], digests=[b"\1" * 32])
    found["guarded"] = decide(guard, 0, texts[1], known=texts[1])
    assert {name: outcome(decided) for name, decided in found.items()} == {name: name for name in found}
    assert set(found) == {"base", "cleared", "abstained", "certain", "guarded"}
    metrics = Metrics()
    metrics.answers(**outcomes([*found.values(), found["base"]]))
    for name in found:
        sample = metrics.registry.get_sample_value("letheon_classified_texts_total", {"outcome": name})
        assert sample == (2 if name == "base" else 1)


def test_a_bare_model_that_says_unknown_is_no_prompt_that_abstains() -> None:
    unknown = Classification("unknown", True, {"unknown": 1.0})
    assert outcome(Routed(unknown, unknown, (0,), False, False)) == "cleared"
    assert outcome(Routed(unknown, unknown, (), False, False)) == "base"


def test_both_formats(lite: Api) -> None:
    headers = lite.key("metrics")
    prometheus = (
        "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,"
        "text/plain;version=0.0.4;q=0.5,*/*;q=0.1"
    )
    modern = lite.client.get("/metrics", headers=headers | {"Accept": prometheus})
    assert modern.headers["content-type"] == "application/openmetrics-text; version=1.0.0; charset=utf-8"
    assert modern.text.endswith("# EOF\n")
    parsed = {family.name: family.type for family in openmetrics_families(modern.text)}
    assert parsed["letheon_lease_expiries"] == "counter"
    assert parsed["letheon_http_request_duration_seconds"] == "histogram"
    for accept in ("text/plain", "*/*", "", "text/plain; version=x", f"application/json, {CANARY}"):
        plain = lite.client.get("/metrics", headers=headers | {"Accept": accept})
        assert plain.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
        names = {family.name for family in text_string_to_metric_families(plain.text)}
        assert names == set(parsed)
    odd = lite.client.get("/metrics", headers=headers | {"Accept": f"application/openmetrics-text; version={CANARY}"})
    assert odd.status_code == 200 and CANARY not in odd.text + str(odd.headers)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="the library reads /proc")
def test_process_metrics_are_there(lite: Api) -> None:
    samples = scrape(lite, lite.key("metrics"))
    assert value(samples, "process_resident_memory_bytes") > 2**20
    assert value(samples, "process_cpu_seconds_total") > 0


def test_readiness_and_the_sets_version(api: Api) -> None:
    headers = api.key("metrics")
    samples = scrape(api, headers)
    assert (value(samples, "letheon_ready"), value(samples, "letheon_database_active_set_version")) == (1, 0)
    add_prompt(api.service, soft_prompt(8, tokens=4))
    samples = scrape(api, headers)
    assert value(samples, "letheon_database_active_set_version") == 1
    assert by_label(samples, "letheon_prompts", "state")["active"] == 1
    broken = add_prompt(api.service, soft_prompt(9))
    with api.service.sessions.begin() as session:
        session.connection().exec_driver_sql(f"UPDATE prompts SET wrapped_key = sealed WHERE id = '{broken}'")
    assert_problem(api.client.get("/readyz"), 503, "not-ready")
    assert value(scrape(api, headers), "letheon_ready") == 0


def test_each_application_counts_for_itself_and_may_start_again(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/letheon.db"
    with running(url, tmp_path) as one, running(url, tmp_path) as other:
        headers = one.key()
        one.classify(headers, "a film")
        route = {"method": "POST", "route": "/classify", "status": "200"}
        assert value(scrape(one, headers), HTTP, **route) == 1
        assert (HTTP, frozenset(route.items())) not in scrape(other, headers)
    app = create_app(make_settings(url, tmp_path), tiny_llm())
    for _ in range(2):
        with TestClient(app) as client:
            api = Api(app, client)
            assert value(scrape(api, headers), "letheon_database_up") == 1


def test_without_the_database_it_still_answers_whom_it_knows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(f"sqlite:///{tmp_path}/letheon.db", tmp_path) as api:
        known, stranger, classifies = api.key("metrics"), api.key("metrics"), api.key("classify")
        assert value(scrape(api, known), "letheon_database_up") == 1
        assert api.client.get("/metrics", headers=classifies).status_code == 403
        take_database_away(api.service, tmp_path)
        samples = scrape(api, known)
        assert (value(samples, "letheon_database_up"), value(samples, "letheon_ready")) == (0, 0)
        assert not any(name.startswith("letheon_requests") for name, _ in samples), "nothing is made up"
        assert value(samples, "process_resident_memory_bytes") > 0
        for headers in (stranger, classifies, {"Authorization": "Bearer lth_x"}):
            response = api.client.get("/metrics", headers=headers)
            if "lth_x" in headers["Authorization"]:  # not the form of a key: known to be none without asking
                assert_problem(response, 401, "unauthenticated")
            else:
                assert_problem(response, 503, "unavailable")
                assert response.headers["retry-after"]
        monkeypatch.setattr(scrape_module, "REMEMBERED_SECONDS", 0.0)
        assert_problem(api.client.get("/metrics", headers=known), 503, "unavailable")


def test_a_revoked_key_is_not_remembered(tmp_path: Path) -> None:
    with running(f"sqlite:///{tmp_path}/letheon.db", tmp_path) as api:
        headers = api.key("metrics")
        scrape(api, headers)
        with api.service.sessions.begin() as session:
            keys.revoke_key(session, "key_" + headers["Authorization"].split("_")[1], actor="test")
        assert api.client.get("/metrics", headers=headers).status_code == 401
        take_database_away(api.service, tmp_path)
        assert_problem(api.client.get("/metrics", headers=headers), 503, "unavailable")


@pytest.mark.skipif("postgresql" not in database_kinds(), reason="a lock that a read waits for needs PostgreSQL")
def test_a_database_that_hangs_costs_seconds_and_holds_nothing_else_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lives, answered_meanwhile = threading.Event(), list[bool]()
    generate = scrape_module.generate_latest

    def held(registry: CollectorRegistry) -> bytes:
        answered_meanwhile.append(lives.wait(20))  # a scrape on the event loop would wait in vain
        return generate(registry)

    monkeypatch.setattr(scrape_module, "generate_latest", held)
    lives.set()
    with fresh_database("postgresql", tmp_path) as url, running(url, tmp_path) as api:
        headers = api.key("metrics")
        assert value(scrape(api, headers), "letheon_database_up") == 1
        with psycopg.connect(url) as lock:
            lock.execute("LOCK TABLE api_keys, unlearn_requests, active_set IN ACCESS EXCLUSIVE MODE")
            taken: list[float] = []
            for _ in range(2):  # the second finds the first one's thread still hanging
                scraping = threading.Thread(target=lambda: taken.append(value(scrape(api, headers), "letheon_ready")))
                lives.clear()
                scraping.start()
                assert api.client.get("/livez").status_code == 200
                lives.set()
                scraping.join(60)  # the lock is still held
                assert not scraping.is_alive()
            assert taken == [0, 0] and all(answered_meanwhile)
            samples = scrape(api, headers)
            assert (value(samples, "letheon_database_up"), value(samples, "letheon_ready")) == (0, 0)
            lock.rollback()
        deadline = time.monotonic() + 20
        while value(samples := scrape(api, headers), "letheon_database_up") != 1:
            assert time.monotonic() < deadline
            time.sleep(0.2)
        assert value(samples, "letheon_ready") == 1


def test_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    patient = Patience(30)
    assert patient(lambda: 5) == 5
    with pytest.raises(ZeroDivisionError):
        patient(lambda: 1 // 0)
    patience, held = Patience(0.1), threading.Event()
    calls: list[int] = []
    with pytest.raises(TimeoutError):
        patience(lambda: held.wait(20))
    waits: list[float] = []
    busy = patience._busy

    class Watched:
        def acquire(self, *, timeout: float) -> bool:
            waits.append(timeout)
            return busy.acquire(timeout=timeout)

    monkeypatch.setattr(patience, "_busy", Watched())
    for _ in range(50):
        with pytest.raises(TimeoutError):
            patience(lambda: calls.append(1))
    assert (set(waits), calls) == ({0}, []), "while one hangs no other is started or waited for"
    monkeypatch.setattr(patience, "_busy", busy)
    held.set()
    deadline = time.monotonic() + 10
    while True:
        try:
            assert patience(lambda: 6) == 6
            break
        except TimeoutError:
            assert time.monotonic() < deadline
    both: list[int] = []
    slow = Patience(5)
    threads = [threading.Thread(target=lambda: both.append(slow(lambda: time.sleep(0.05) or 1))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert both == [1] * 4, "those that come at once wait for each other"


def test_no_text_and_no_key_ever(api: Api, caplog: pytest.LogCaptureFixture) -> None:
    """A canary in every place that a client can write to."""
    headers = api.key() | {"X-Request-ID": CANARY, "User-Agent": CANARY, "tracestate": f"a={CANARY}"}
    api.classify(headers, f"{MARKER} is a good film")
    api.client.post("/classify", json={"texts": [f"{CANARY} again", "x" * 5000]}, headers=headers)
    api.client.post("/classify", json={CANARY: CANARY}, headers=headers)
    api.client.get(f"/unlearn-requests/{CANARY}?q={CANARY}", headers=headers)
    api.client.get(f"/{CANARY}", headers=headers)
    api.client.request(CANARY, f"/{CANARY}", headers=headers)
    body = {"forget_texts": [{"text": f"{MARKER} is awful", "label": "negative"}], "reason": CANARY}
    created = api.client.post("/unlearn-requests", json=body, headers=headers).json()["id"]
    failing = claim(api.service, created)
    with api.service.sessions.begin() as session:
        lifecycle.fail(session, failing, code="check-failed", detail=CANARY)
    prompt = add_prompt(api.service, soft_prompt(3))
    api.client.post(f"/admin/prompts/{prompt}/revoke", json={"reason": CANARY}, headers=headers)
    with api.service.sessions.begin() as session:
        keys.create_key(session, name=CANARY, scopes=["metrics"], actor=CANARY)
    for accept in ("text/plain", "application/openmetrics-text"):
        response = api.client.get(f"/metrics?name[]={CANARY}", headers=headers | {"Accept": accept})
        assert response.status_code == 200
        lowered = response.text.lower()
        for secret in (CANARY, "Quillfeather", created, prompt, headers["Authorization"].split("_", 2)[2]):
            assert secret.lower() not in lowered
    assert json.loads(api.client.get("/livez").text) == {"status": "alive"}


def test_a_key_for_it_is_made_by_name(tmp_path: Path) -> None:
    with running(f"sqlite:///{tmp_path}/letheon.db", tmp_path) as api:
        only = new_key(api.service, "metrics")
        assert value(scrape(api, only), "letheon_database_up") == 1
        for path in ("/unlearn-requests", "/admin/prompts"):
            assert api.client.get(path, headers=only).status_code == 403
        db.check_schema(api.service.engine)
