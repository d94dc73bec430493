"""Traces: nothing when off, spans with numbers and ids when on, and no text in any of them."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from api_kit import MARKER, Api, assert_problem, make_settings, new_key, running, tiny_llm
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from sqlalchemy.orm import Session, sessionmaker
from tiny_models import make_tiny_model
from worker_kit import forget_texts, write_retain

from app import lifecycle, tracing
from app.errors import MissingExtra
from app.main import create_app
from app.settings import Settings
from app.vault import Vault
from models.examples import read_examples
from models.llm import FrozenLLM
from worker.context import Context
from worker.tasks import run_job

CANARY = "Zyxomma"
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE}-{PARENT}-01"


@pytest.fixture
def spans() -> Iterator[InMemorySpanExporter]:
    exporter = InMemorySpanExporter()
    stop = tracing.start("letheon-test", exporter)
    yield exporter
    stop()


@pytest.fixture
def api(tmp_path: Path) -> Iterator[Api]:
    with running(f"sqlite:///{tmp_path}/letheon.db", tmp_path) as api:
        yield api


def named(exporter: InMemorySpanExporter, name: str) -> list[ReadableSpan]:
    return [span for span in exporter.get_finished_spans() if span.name == name]


def attributes(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


def test_a_request_is_a_span_of_three_attributes(api: Api, spans: InMemorySpanExporter) -> None:
    headers = api.key() | {"traceparent": TRACEPARENT}
    api.classify(headers, "a good film")
    api.client.get("/unlearn-requests/" + "req_" + "0" * 28, headers=headers)
    [classified] = named(spans, "POST /classify")
    assert attributes(classified) == {
        "http.request.method": "POST",
        "http.route": "/classify",
        "http.response.status_code": 200,
    }
    assert classified.kind == SpanKind.SERVER and classified.status.status_code == StatusCode.UNSET
    assert classified.context is not None and f"{classified.context.trace_id:032x}" == TRACE
    assert classified.parent is not None and f"{classified.parent.span_id:016x}" == PARENT
    assert classified.resource.attributes["service.name"] == "letheon-test"
    [missing] = named(spans, "GET /unlearn-requests/{request_id}")
    assert attributes(missing)["http.response.status_code"] == 404


def test_probes_make_no_spans(api: Api, spans: InMemorySpanExporter) -> None:
    for path in ("/livez", "/readyz", "/metrics"):
        assert api.client.get(path, headers=api.key()).status_code == 200
    assert spans.get_finished_spans() == ()


def test_parts_waits_and_links(spans: InMemorySpanExporter) -> None:
    """As serving uses them: a request waits in a queue, a thread runs the batch it ends up in."""
    with tracing.span("request"):
        mark = tracing.here()
        with tracing.span("part", texts=3, share=0.5):
            pass
        assert mark is not None

    def model_thread() -> None:
        assert tracing.here() is None, "another thread has no span around it"
        tracing.past("queue", 0.25, mark, texts=3)
        with tracing.span("batch", links=[mark], texts=64):
            pass

    thread = threading.Thread(target=model_thread)
    thread.start()
    thread.join()
    [request], [part], [queue], [batch] = (named(spans, name) for name in ("request", "part", "queue", "batch"))
    assert request.context is not None and request.context.span_id == mark.span_id
    for child in (part, queue):
        assert child.parent is not None and child.parent.span_id == mark.span_id
    assert attributes(part) == {"letheon.texts": 3, "letheon.share": 0.5}
    assert queue.start_time is not None and queue.end_time is not None
    assert (queue.end_time - queue.start_time) / 1e9 == pytest.approx(0.25)
    assert abs(queue.end_time / 1e9 - time.time()) < 10
    assert batch.parent is None and [link.context.span_id for link in batch.links] == [mark.span_id]


def test_what_fails_says_its_kind_only(api: Api, spans: InMemorySpanExporter) -> None:
    with pytest.raises(RuntimeError), tracing.span("part"):
        raise RuntimeError(f"about {MARKER}")
    [part] = named(spans, "part")
    assert attributes(part) == {"error.type": "RuntimeError"}
    assert (part.status.status_code, part.status.description, part.events) == (StatusCode.ERROR, None, ())

    @api.app.get("/boom")
    def boom() -> None:
        raise RuntimeError(f"about {MARKER}")

    assert_problem(api.client.get("/boom"), 500, "internal")
    [failed] = named(spans, "GET /boom")
    assert attributes(failed)["error.type"] == "500" and failed.events == ()
    assert (failed.status.status_code, failed.status.description) == (StatusCode.ERROR, None)


@pytest.mark.parametrize("value", [MARKER, "positive", "", "prm_" + "0" * 27, "prm_" + "0" * 28 + "\n"])
def test_a_text_cannot_be_an_attribute(spans: InMemorySpanExporter, value: str) -> None:
    with pytest.raises(ValueError, match="label is neither a number nor an id"), tracing.span("part", label=value):
        pass
    with tracing.span("part", prompt="prm_" + "0" * 28):
        pass
    [part] = named(spans, "part")
    assert attributes(part) == {"letheon.prompt": "prm_" + "0" * 28}


def test_no_text_in_any_span(
    api: Api, spans: InMemorySpanExporter, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A canary in every place that a client can write to, on an installation that asks for headers to be captured."""
    for side in ("REQUEST", "RESPONSE"):
        monkeypatch.setenv(f"OTEL_INSTRUMENTATION_HTTP_CAPTURE_HEADERS_SERVER_{side}", ".*")
    monkeypatch.setenv("OTEL_SEMCONV_STABILITY_OPT_IN", "http/dup")
    dirty = {
        "User-Agent": CANARY,
        "X-Request-ID": CANARY,
        "Host": CANARY,
        "X-Forwarded-Proto": CANARY,
        "Cookie": CANARY,
        "traceparent": TRACEPARENT,
        "tracestate": f"a={CANARY}",
        "baggage": f"a={CANARY}",
    }
    headers = api.key() | dirty
    api.classify(headers, f"{MARKER} is a good film")
    api.submit(headers, f"{MARKER} is awful")
    api.client.post(f"/classify?q={CANARY}", json={"text": f"{CANARY} " * 100, CANARY: CANARY}, headers=headers)
    api.client.get(f"/unlearn-requests?state={CANARY}&cursor={CANARY}", headers=headers)
    api.client.get(f"/unlearn-requests/{CANARY}?{CANARY}={CANARY}", headers=headers)
    api.client.get(f"/{CANARY}?q={CANARY}", headers=headers | {"traceparent": CANARY})
    api.client.request(CANARY, f"/{CANARY}", headers=headers)
    api.client.post("/classify", content=f"{{{CANARY}", headers=headers | {"Content-Type": CANARY})
    finished = spans.get_finished_spans()
    assert len(finished) == 10
    assert sorted(span.name for span in finished if span.name.startswith("letheon.")) == [
        "letheon.batch",
        "letheon.queue",
    ]
    assert [span.name for span in finished][-3:] == ["GET (no route)", "(other) (no route)", "POST /classify"]
    for span in finished:
        said = span.to_json() + repr(span.context) + repr(span.parent) + repr(span.links) + repr(span.events)
        assert CANARY not in said and "Quillfeather" not in said
        assert set(attributes(span)) <= {
            "http.request.method",
            "http.route",
            "http.response.status_code",
            "letheon.texts",
            "letheon.active_set_version",
        }


def test_off_it_is_nothing() -> None:
    assert tracing.here() is None
    first, second = tracing.span("batch", texts=1), tracing.span("queue", label="whatever")
    assert first is second, "one object for all: nothing is made"
    with first, second:
        tracing.past("queue", 1.0, None)


@pytest.mark.parametrize("absent", ["opentelemetry.sdk", "opentelemetry.exporter"])
def test_on_without_the_extra_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, absent: str
) -> None:
    for name in [name for name in sys.modules if name == absent or name.startswith(absent + ".")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, absent, None)
    with pytest.raises(MissingExtra, match=r"LETHEON_TRACES is on, .* pip install 'letheon\[otel\]'"):
        create_app(make_settings("", tmp_path, traces=True), tiny_llm())
    create_app(make_settings("", tmp_path), tiny_llm())


def run_script(code: str, *arguments: str, **environment: str) -> str:
    """What a process of its own prints."""
    command = [sys.executable, "-c", code, *arguments]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_service_runs_without_the_extra() -> None:
    code = (
        "import sys; sys.modules['opentelemetry.sdk'] = sys.modules['opentelemetry.exporter'] = None\n"
        "import app.main, worker.main\n"
        "from app import tracing\n"
        "with tracing.span('batch', texts=1): pass\n"
        "assert tracing.here() is None\n"
        "print('ran')"
    )
    assert run_script(code) == "ran\n"


GLOBAL_PROVIDERS = """
import sys, tempfile
from pathlib import Path
from opentelemetry import metrics, trace, _logs
from opentelemetry.sdk._logs import LoggerProvider
from opentelemetry.sdk._logs.export import InMemoryLogRecordExporter, SimpleLogRecordProcessor
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

spans, logs, reader = InMemorySpanExporter(), InMemoryLogRecordExporter(), InMemoryMetricReader()
tracers, loggers = TracerProvider(), LoggerProvider()
tracers.add_span_processor(SimpleSpanProcessor(spans))
loggers.add_log_record_processor(SimpleLogRecordProcessor(logs))
trace.set_tracer_provider(tracers)
_logs.set_logger_provider(loggers)
metrics.set_meter_provider(MeterProvider([reader]))
from fastapi import FastAPI
from fastapi.testclient import TestClient
from api_kit import running
plain = FastAPI()

@plain.get("/boom")
def boom():
    raise RuntimeError("about Zyxomma")

with TestClient(plain, raise_server_exceptions=False) as client:
    client.get("/boom?q=Zyxomma")
said = "".join(span.to_json() for span in spans.get_finished_spans())
logged = str([dict(data.log_record.attributes) for data in logs.get_finished_logs()])
print("plain", "q=Zyxomma" in said, "about Zyxomma" in logged)
spans.clear(), logs.clear()
with tempfile.TemporaryDirectory() as folder, running(f"sqlite:///{folder}/letheon.db", Path(folder)) as api:
    api.app.get("/boom")(boom)
    api.client.get("/boom?q=Zyxomma")
    api.client.post("/classify?q=Zyxomma", json={"text": "Zyxomma"}, headers=api.key())
    api.client.post("/classify", json={"Zyxomma": "Zyxomma"}, headers=api.key())
measured = str(reader.get_metrics_data())
print("letheon", len(spans.get_finished_spans()), len(logs.get_finished_logs()), "Zyxomma" in measured)
"""


def test_providers_that_somebody_else_set_up_hear_nothing() -> None:
    """FastAPI speaks to them of its own accord, with queries and messages; ours does not."""
    said = run_script(GLOBAL_PROVIDERS, FASTAPI_OTEL_AUTO_CONFIGURE="true")
    assert said.splitlines() == ["plain True True", "letheon 0 0 False"]


class Collector(HTTPServer):
    """The receiving end of OTLP over HTTP, as far as it is needed to read what was sent."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Receive)
        self.received: list[tuple[str, bytes]] = []
        threading.Thread(target=self.serve_forever, daemon=True).start()


class _Receive(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        assert isinstance(self.server, Collector)
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.received.append((self.path, body))
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Quiet."""


def test_by_setting_to_a_real_collector(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    collector = Collector()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{collector.server_port}")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "none")
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "600000")  # all in one message, at the end
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment=test")
    try:
        with running(f"sqlite:///{tmp_path}/letheon.db", tmp_path, traces=True) as api:
            dirty = {"tracestate": f"a={CANARY}", "traceparent": TRACEPARENT, "User-Agent": CANARY}
            api.classify(new_key(api.service) | dirty, f"{MARKER} is a good film")
        assert tracing.here() is None and tracing.span("a") is tracing.span("b"), "the stop has switched it off"
    finally:
        collector.shutdown()
        collector.server_close()
    [(path, body)] = collector.received
    assert path == "/v1/traces"
    assert CANARY.encode() not in body and b"Quillfeather" not in body
    [group] = ExportTraceServiceRequest.FromString(body).resource_spans
    resource = {item.key: item.value.string_value for item in group.resource.attributes}
    assert (resource["service.name"], resource["deployment.environment"]) == ("letheon-api", "test")
    spans = {span.name: span for span in group.scope_spans[0].spans}
    assert set(spans) == {"POST /classify", "letheon.queue", "letheon.batch"}
    whole, wait, batch = (spans[name] for name in ("POST /classify", "letheon.queue", "letheon.batch"))
    assert (whole.trace_id.hex(), whole.trace_state) == (TRACE, "")
    assert (wait.trace_id, wait.parent_span_id) == (whole.trace_id, whole.span_id)
    assert [(link.trace_id, link.span_id) for link in batch.links] == [(whole.trace_id, whole.span_id)]


def test_a_collector_that_is_away_delays_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    with running(f"sqlite:///{tmp_path}/letheon.db", tmp_path, traces=True) as api:
        headers = api.key()
        for _ in range(20):
            api.classify(headers, "a good film")


def test_an_attempt_of_the_worker_is_a_trace(
    sessions: sessionmaker[Session], vault: Vault, tmp_path: Path, spans: InMemorySpanExporter
) -> None:
    llm = FrozenLLM.load(str(make_tiny_model(tmp_path / "model")), quantization="none", device="cpu")
    settings = Settings(
        _env_file=None,
        home=tmp_path / "home",
        num_virtual_tokens=4,
        max_steps=4,
        max_tries=1,
        check_retain_rows=16,
        min_forget_abstain=0,
        max_retain_drop=1,
        max_class_drop=1,
        max_neighbour_drop=1,
    )
    retain = read_examples(str(write_retain(tmp_path / "retain.jsonl")), labels=settings.labels)
    context = Context(settings=settings, sessions=sessions, vault=vault, llm=llm, retain=retain)
    with sessions.begin() as session:
        request_id = lifecycle.create_request(
            session,
            vault,
            texts=forget_texts(),
            reason=MARKER,
            options={},
            fingerprint=llm.fingerprint,
            api_key_id=None,
        ).id
    assert run_job(context, request_id)
    with sessions() as session:
        assert lifecycle.get_request(session, request_id).state == "active"
    [attempt] = named(spans, "letheon.attempt")
    assert attributes(attempt) == {"letheon.request": request_id, "letheon.attempt": 1}
    for name in ("letheon.gate", "letheon.train", "letheon.checks"):
        [part] = named(spans, name)
        assert part.parent is not None and attempt.context is not None
        assert part.parent.span_id == attempt.context.span_id
    assert CANARY not in "".join(span.to_json() for span in spans.get_finished_spans())
