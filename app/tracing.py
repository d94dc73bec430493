"""OpenTelemetry traces, where they are switched on: what took how long, never what was said.

Every span is made here, of numbers, route templates and ids, so that a text has no way in. (What FastAPI brings along,
and the published instrumentation, record queries, hosts and the client's ``tracestate``; both stay off.)
Off, ``span`` costs a function call. Where spans go, and how many, is said by the standard ``OTEL_…`` variables.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING

from opentelemetry.trace import (
    Link,
    NonRecordingSpan,
    Span,
    SpanContext,
    SpanKind,
    StatusCode,
    Tracer,
    get_current_span,
    set_span_in_context,
)
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from app.errors import MissingExtra

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter

Value = int | float | str
Ended = Callable[[str, str, int], None]
"""To be told a request's method, route template and status."""

_ID = re.compile(r"[a-z]{3}_[0-9a-f]{28}")
_NOTHING: AbstractContextManager[None] = nullcontext()
_UNTRACED: AbstractContextManager[Ended] = nullcontext(lambda method, route, status: None)
_PROBES = frozenset({"/livez", "/readyz", "/metrics"})  # every few seconds, and always the same

_PROPAGATOR = TraceContextTextMapPropagator()

_tracer: Tracer | None = None


def require() -> None:
    """Raises MissingExtra."""
    try:
        import opentelemetry.exporter.otlp.proto.http.trace_exporter
        import opentelemetry.sdk.trace  # noqa: F401
    except ModuleNotFoundError as error:
        raise MissingExtra(
            f"LETHEON_TRACES is on, but {error.name} is not installed: pip install 'letheon[otel]'"
        ) from None


def start(service: str, exporter: SpanExporter | None = None) -> Callable[[], None]:
    """Trace this process from now on, as ``service`` unless the environment says otherwise; returns what ends that.

    Without an ``exporter`` spans go out in the background, by OTLP over HTTP. Raises MissingExtra.
    """
    require()
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import SERVICE_NAME, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor

    global _tracer
    resource = Resource.create()
    if str(resource.attributes[SERVICE_NAME]).startswith("unknown_service"):
        resource = resource.merge(Resource({SERVICE_NAME: service}))
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    processor = BatchSpanProcessor(OTLPSpanExporter()) if exporter is None else SimpleSpanProcessor(exporter)
    provider.add_span_processor(processor)
    tracer = _tracer = provider.get_tracer("letheon")

    def stop() -> None:
        global _tracer
        if _tracer is tracer:
            _tracer = None
        provider.shutdown()  # sends what is left

    return stop


def span(name: str, *, links: Sequence[SpanContext] = (), **attributes: Value) -> AbstractContextManager[None]:
    """Times the ``with`` block, as a part of the span that surrounds it in this thread or task.

    ``attributes`` are numbers, and ids of this service; anything else raises ValueError. ``links``: spans of other
    traces that this one worked for.
    """
    return _NOTHING if _tracer is None else _recorded(_tracer, name, links, attributes)


def here() -> SpanContext | None:
    """The span around the caller, to be handed to another thread; None when nothing is traced."""
    if _tracer is None:
        return None
    found = get_current_span().get_span_context()
    return found if found.is_valid else None


def past(name: str, seconds: float, parent: SpanContext | None, **attributes: Value) -> None:
    """A span that ends now and began ``seconds`` ago, as a part of ``parent``: a wait is known when it is over."""
    if _tracer is None or parent is None:
        return
    now = time.time_ns()
    made = _tracer.start_span(
        name,
        context=set_span_in_context(NonRecordingSpan(parent)),
        attributes=_checked(attributes),
        start_time=now - int(seconds * 1e9),
    )
    made.end(now)


def request(path: str, traceparent: str | None) -> AbstractContextManager[Ended]:
    """The span of an HTTP request, continuing the client's trace; gives what is to be told how the request ended.

    Of the client's context only the two ids and the sampling flag are taken: ``tracestate`` may hold anything.
    """
    return _UNTRACED if _tracer is None or path in _PROBES else _server(_tracer, traceparent)


@contextmanager
def _recorded(tracer: Tracer, name: str, links: Sequence[SpanContext], attributes: dict[str, Value]) -> Iterator[None]:
    with tracer.start_as_current_span(
        name,
        attributes=_checked(attributes),
        links=[Link(link) for link in links],
        record_exception=False,  # its message may quote a text
        set_status_on_exception=False,
    ) as made:
        try:
            yield
        except BaseException as error:
            _fail(made, type(error).__name__)
            raise


@contextmanager
def _server(tracer: Tracer, traceparent: str | None) -> Iterator[Ended]:
    context = _PROPAGATOR.extract({"traceparent": traceparent} if traceparent else {})
    with tracer.start_as_current_span(
        "HTTP", context=context, kind=SpanKind.SERVER, record_exception=False, set_status_on_exception=False
    ) as made:

        def ended(method: str, route: str, status: int) -> None:
            made.update_name(f"{method} {route}")
            made.set_attribute("http.request.method", method)
            made.set_attribute("http.route", route)
            if status:
                made.set_attribute("http.response.status_code", status)
            if status >= 500 or not status:
                _fail(made, str(status) if status else "disconnected")

        yield ended


def _fail(made: Span, kind: str) -> None:
    made.set_attribute("error.type", kind)
    made.set_status(StatusCode.ERROR)


def _checked(attributes: dict[str, Value]) -> dict[str, Value]:
    for name, value in attributes.items():
        if isinstance(value, str) and not _ID.fullmatch(value):
            raise ValueError(f"the span attribute {name} is neither a number nor an id")
    return {f"letheon.{name}": value for name, value in attributes.items()}
