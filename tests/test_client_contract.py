"""The client against the server's OpenAPI document: every operation, field, parameter and problem, and no more."""

from __future__ import annotations

import importlib.util
import re
import tomllib
import types
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, closing
from datetime import UTC, datetime, timedelta
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NotRequired, Union, get_args, get_origin, get_type_hints, is_typeddict
from urllib.parse import parse_qs

import httpx2
import pytest
from api_kit import MARKER, add_prompt, soft_prompt
from client_kit import KINDS, connect, plain_key, record, server
from floor import await_approval, must_take

import letheon_client
from app import lifecycle
from letheon_client import CODES, ApiError, AsyncLetheon, Conflict, InvalidArgument, Letheon
from letheon_client import types as answers

ROOT = Path(__file__).resolve().parent.parent
METHODS: dict[str, tuple[str, ...]] = {
    "create_unlearn_request": ("submit", "dry_run"),
    "list_unlearn_requests": ("list_requests", "iter_requests"),
    "get_unlearn_request": ("get_request", "wait"),
    "get_receipt": ("receipt",),
    "get_report": ("report", "report_file"),
    "get_evidence": ("evidence",),
    "get_embedding_picture": ("evidence_picture",),
    "get_membership_picture": ("evidence_picture",),
    "cancel_unlearn_request": ("cancel",),
    "stream_unlearn_request_events": ("events",),
    "approve_unlearn_request": ("approve",),
    "reject_unlearn_request": ("reject",),
    "create_webhook": ("create_webhook",),
    "list_webhooks": ("list_webhooks", "iter_webhooks"),
    "get_webhook": ("get_webhook",),
    "disable_webhook": ("disable_webhook",),
    "list_webhook_deliveries": ("list_deliveries", "iter_deliveries"),
    "redeliver": ("redeliver",),
    "ping_webhook": ("ping_webhook",),
    "classify": ("classify", "classify_many"),
    "list_prompts": ("list_prompts", "iter_prompts"),
    "get_prompt": ("get_prompt",),
    "export_prompt": ("export_prompt",),
    "revoke_prompt": ("revoke",),
    "withdraw_revoke": ("withdraw_revoke",),
    "list_active_sets": ("list_active_sets", "iter_active_sets"),
    "get_active_set": ("get_active_set",),
    "restore_active_set": ("restore",),
    "list_audit_entries": ("list_audit", "iter_audit"),
    "export_audit_log": ("export_audit",),
    "get_audit_checkpoint": ("audit_checkpoint",),
    "get_audit_public_key": ("audit_public_key",),
    "livez": ("live",),
    "readyz": ("ready",),
    "scrape": ("metrics",),
}
"""Operation → what calls it; the first one answers as the operation does."""
NOT_JSON = {
    *("stream_unlearn_request_events", "export_audit_log", "livez", "readyz", "scrape"),
    *("export_prompt", "get_embedding_picture", "get_membership_picture"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("servers")


@pytest.fixture(scope="module")
def live(folder: Path) -> Iterator[tuple[str, Any]]:
    with server(folder, export_prompts=True) as (url, app, _):
        yield url, app


@pytest.fixture(scope="module")
def two_admins(folder: Path) -> Iterator[tuple[str, Any]]:
    """A server where a revoke takes two."""
    with server(folder, name="two", revoke_needs_two=True) as (url, app, _):
        yield url, app


@pytest.fixture(scope="module")
def document(live: tuple[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = httpx2.get(f"{live[0]}/openapi.json", trust_env=False).json()
    return found


def operations(document: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Method, path and operation."""
    for path, found in document["paths"].items():
        for method, operation in found.items():
            yield method.upper(), path, operation


# --- the document's words --------------------------------------------------------------------------------------------


def resolve(document: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    name = schema.get("$ref", "").rpartition("/")[2]
    found: dict[str, Any] = document["components"]["schemas"][name] if name else schema
    return found


def differences(document: dict[str, Any], schema: dict[str, Any], kind: Any, at: str) -> list[str]:
    """Where a Python type and a JSON schema do not say the same."""
    schema = resolve(document, schema)
    if get_origin(kind) is NotRequired:
        kind = get_args(kind)[0]
    if "anyOf" in schema:
        schemas = [resolve(document, part) for part in schema["anyOf"]]
        optional = {"type": "null"} in schemas
        rest = [part for part in schemas if part != {"type": "null"}]
        if [part.get("type") for part in rest] == ["number", "integer"]:
            rest = rest[:1]  # an integer is a number
        kinds = list(get_args(kind)) if get_origin(kind) in (Union, types.UnionType) else [kind]
        if optional != (type(None) in kinds):
            return [f"{at}: null {'may' if optional else 'cannot'} come"]
        kinds = [part for part in kinds if part is not type(None)]
        if len(rest) != len(kinds):
            return [f"{at}: {len(rest)} kinds, not {len(kinds)}"]
        return [d for part, one in zip(rest, kinds, strict=True) for d in differences(document, part, one, at)]
    if "enum" in schema or "const" in schema:
        values = set(schema.get("enum", [schema.get("const")]))
        same = get_origin(kind) is Literal and set(get_args(kind)) == values
        return [] if same else [f"{at}: one of {sorted(values)}, not {kind}"]
    if "prefixItems" in schema:  # a pair
        plain_pair = [{"type": "number"}] * 2
        return [] if schema["prefixItems"] == plain_pair and kind == list[float] else [f"{at}: a pair, not {kind}"]
    if schema.get("type") == "array":
        if get_origin(kind) is not list:
            return [f"{at}: a list, not {kind}"]
        return differences(document, schema["items"], get_args(kind)[0], f"{at}[]")
    if "properties" in schema:
        return object_differences(document, schema, kind, at)
    if schema.get("type") == "object":
        more = schema.get("additionalProperties")
        value = float if isinstance(more, dict) and more.get("type") == "number" else Any
        return [] if kind == dict[str, value] else [f"{at}: an object, not {kind}"]
    plain = {"string": str, "integer": int, "number": float, "boolean": bool}
    return [] if plain[schema["type"]] is kind else [f"{at}: {schema['type']}, not {kind}"]


def object_differences(document: dict[str, Any], schema: dict[str, Any], kind: Any, at: str) -> list[str]:
    if not is_typeddict(kind):
        return [f"{at}: an object with named fields, not {kind}"]
    hints = get_type_hints(kind, include_extras=True)
    fields = schema["properties"]
    found = [f"{at}: lacks {name}" for name in set(fields) - set(hints)]
    found += [f"{at}: has {name}, which the server has not" for name in set(hints) - set(fields)]
    optional = set(kind.__optional_keys__) | {n for n, hint in hints.items() if get_origin(hint) is NotRequired}
    may_lack = set(fields) - set(schema.get("required", ()))
    found += [f"{at}.{name}: there or not?" for name in (optional ^ may_lack) & set(fields) & set(hints)]
    for name in set(fields) & set(hints):
        found += differences(document, fields[name], hints[name], f"{at}.{name}")
    return found


def returned(method: str) -> Any:
    return get_type_hints(getattr(Letheon, method))["return"]


def success(operation: dict[str, Any]) -> list[dict[str, Any]]:
    """The schemas of its good answers."""
    return [
        answer["content"]["application/json"]["schema"]
        for status, answer in operation["responses"].items()
        if status.startswith("2")
    ]


def test_the_comparison_sees_what_differs(document: dict[str, Any]) -> None:
    class Wrong(answers.Prompt):
        more: int

    schema = {"$ref": "#/components/schemas/PromptOut"}
    assert differences(document, schema, answers.Prompt, "p") == []
    assert differences(document, schema, Wrong, "p") == ["p: has more, which the server has not"]
    revoked = differences(document, {"$ref": "#/components/schemas/RevokedOut"}, answers.Prompt, "p")
    assert revoked == ["p: lacks active_set_version"]
    assert differences(document, {"type": "string"}, int, "x") == [f"x: string, not {int}"]
    assert differences(document, {"anyOf": [{"type": "string"}, {"type": "null"}]}, str, "x") == ["x: null may come"]


def test_every_operation_has_a_method(document: dict[str, Any]) -> None:
    assert {operation["operationId"] for _, _, operation in operations(document)} == set(METHODS)
    public = {name for name in vars(Letheon) if not name.startswith("_")} - {"base_urls", "close"}
    assert {name for names in METHODS.values() for name in names} == public


def test_every_answer_is_typed_as_it_is_documented(document: dict[str, Any]) -> None:
    wrong = []
    for _, _, operation in operations(document):
        name = operation["operationId"]
        if name in NOT_JSON | {"create_unlearn_request"}:
            continue
        for schema in success(operation):
            wrong += differences(document, schema, returned(METHODS[name][0]), name)
        for method in METHODS[name][1:]:
            if method.startswith("iter_"):
                (items,) = get_args(returned(method))
                assert returned(METHODS[name][0]).__annotations__["items"].__forward_arg__ == f"list[{items.__name__}]"
    assert wrong == []


def test_a_submission_is_a_request_or_a_dry_run_and_says_what_its_headers_say(document: dict[str, Any]) -> None:
    operation = document["paths"]["/unlearn-requests"]["post"]
    made, (first, second) = operation["responses"]["202"], success(operation)[1]["anyOf"]
    assert differences(document, success(operation)[0], answers.UnlearnRequest, "made") == []
    assert differences(document, first, answers.UnlearnRequest, "there") == []
    assert differences(document, second, returned("dry_run"), "dry") == []
    assert returned("submit") is answers.Submitted
    more = set(get_type_hints(answers.Submitted)) - set(get_type_hints(answers.UnlearnRequest))
    assert more == {"duplicate", "replayed"}
    headers = set(made["headers"]) | set(operation["responses"]["200"]["headers"])
    assert headers == {"Location", "Letheon-Duplicate", "Idempotency-Replayed"}


def test_what_is_sent_is_typed_as_it_is_documented(document: dict[str, Any]) -> None:
    schemas = document["components"]["schemas"]
    words = document["components"]["schemas"]["ForgetTextIn"]["properties"]["label"]["anyOf"][0]
    plain = {**schemas["ForgetTextIn"], "properties": {**schemas["ForgetTextIn"]["properties"]}}
    plain["properties"]["label"] = {"anyOf": [{**words, "enum": None}, {"type": "null"}]}
    del plain["properties"]["label"]["anyOf"][0]["enum"]  # a server's own words
    assert differences(document, plain, answers.ForgetText, "text") == []
    options = schemas["TrainingOptions"]
    assert differences(document, options, answers.TrainingOptions, "options") == []
    codes = schemas["RevokeIn"]["properties"]["code"]["enum"]
    assert set(codes) == set(get_args(answers.RevokeCode))


def test_problems_and_health_are_typed_as_they_are_documented(document: dict[str, Any]) -> None:
    for name, kind in (
        ("Problem", answers.Problem),
        ("FieldError", answers.FieldError),
        ("Health", answers.Health),
        ("Failure", answers.Failure),
    ):
        assert differences(document, document["components"]["schemas"][name], kind, name) == []


def test_every_problem_has_an_exception(document: dict[str, Any]) -> None:
    told = {
        code: int(status)
        for _, _, operation in operations(document)
        for status, answer in operation["responses"].items()
        for code in answer.get("content", {}).get("application/problem+json", {}).get("examples", {})
    }
    assert set(told) == set(CODES)
    for code, status in told.items():
        assert CODES[code] is not ApiError and issubclass(CODES[code], ApiError)
        same_status = {CODES[other] for other, its in told.items() if its == status}
        if status not in (409, 429):  # where a family tells more than its status
            assert len(same_status) == 1, (status, same_status)


# --- one version, two clients ----------------------------------------------------------------------------------------


def test_versions_agree(document: dict[str, Any]) -> None:
    projects = [
        tomllib.loads((ROOT / name).read_text())["project"] for name in ("pyproject.toml", "client/pyproject.toml")
    ]
    versions = {project["version"] for project in projects}
    assert versions == {letheon_client.__version__} == {document["info"]["version"]}
    dependency = projects[1]["dependencies"]
    assert len(dependency) == 1 and dependency[0] in projects[0]["dependencies"]


def test_the_synchronous_client_is_made_of_the_other() -> None:
    spec = importlib.util.spec_from_file_location("make_sync", ROOT / "client" / "make_sync.py")
    assert spec is not None and spec.loader is not None
    make_sync = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_sync)
    for name, made in make_sync.MODULES.items():
        source = (make_sync.PACKAGE / name).read_text()
        assert make_sync.synchronous(source, name) == (make_sync.PACKAGE / made).read_text(), (
            f"run make_sync.py: {made}"
        )
    assert {n for n in vars(Letheon) if n[0] != "_"} - {"close"} == {n for n in vars(AsyncLetheon) if n[0] != "_"} - {
        "aclose"
    }


# --- the calls themselves --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_operation_is_called_as_it_is_documented(
    kind: str, live: tuple[str, Any], two_admins: tuple[str, Any], document: dict[str, Any]
) -> None:
    calls: list[httpx2.Request] = []
    with ExitStack() as stack:

        def client(place: tuple[str, Any], *scopes: str) -> Any:
            found = stack.enter_context(connect(kind, place[0], plain_key(place[1], *scopes)))
            record(found, calls)
            return found

        requests(client(live), client(live, "approve"), live[1])
        classify(client(live))
        prompts_and_sets(client(live), live[1])
        two = client(two_admins)
        asked = two.revoke(add_prompt(two_admins[1].state.service, soft_prompt(1)), reason="harm done", code="harm")
        assert (asked["state"], asked["active_set_version"]) == ("active", asked["active_set_version"])
        assert two.withdraw_revoke(asked["id"])["revoke_asked_by"] is None
        audit(client(live))
        webhooks(client(live))
        health(client(live))
    assert_documented(document, calls)


def requests(client: Any, approver: Any, app: Any) -> None:
    text = f"{MARKER} is a bad film {datetime.now(UTC).isoformat()}"
    made = client.submit(
        [text, {"text": text, "label": "negative"}],
        reason="case 12",
        options={"max_steps": 3},
        received_at=datetime.now(UTC) - timedelta(days=2),
        expires_at="2099-01-01T00:00:00Z",
        require_approval=True,
        idempotency_key=f"case-12-{text[-20:]}",
    )
    assert (made["state"], made["num_texts"], made["duplicate"], made["replayed"]) == ("pending", 2, False, False)
    assert (made["options"], made["approval_required"]) == ({"max_steps": 3}, True)
    assert made["received_at"] < made["created_at"] and made["expires_at"].startswith("2099")
    again = client.submit(text)
    assert client.submit(text)["duplicate"] is True  # another key, the same texts
    assert client.get_request(again["id"])["num_texts"] == 1
    report = client.dry_run(text, options={"seed": 1}, require_approval=True)
    assert report["forget"]["texts"] == 1

    page = client.list_requests(limit=1, state="pending")
    assert [found["id"] for found in page["items"]] == [again["id"]]
    older = client.list_requests(limit=1, state="pending", cursor=page["next_cursor"])
    assert [found["id"] for found in older["items"]] == [made["id"]]
    assert [found["id"] for found in islice(client.iter_requests(state="pending", page_size=1), 2)] == [
        again["id"],
        made["id"],
    ]
    with app.state.service.sessions() as session:
        asked_by = lifecycle.get_request(session, made["id"]).api_key_id
    yesterday = datetime.now(UTC) - timedelta(days=1)
    narrow = {"received_from": yesterday - timedelta(days=9), "due_before": "2099-01-01T00:00:00Z"}
    narrow |= {"id_prefix": made["id"][:9], "api_key_id": asked_by}
    assert [r["id"] for r in client.list_requests(**narrow)["items"]] == [again["id"], made["id"]]
    assert [r["id"] for r in client.iter_requests(received_before=yesterday, **narrow)] == [made["id"]]
    with pytest.raises(TypeError, match="due_befor"):
        client.list_requests(due_befor=yesterday)
    with pytest.raises(InvalidArgument, match="needs its zone"):
        client.list_requests(due_before=yesterday.replace(tzinfo=None))

    with closing(client.events(made["id"])) as events:
        first = next(events)
    assert (first.type, first.data["state"]) == ("state", "pending")
    with pytest.raises(Conflict):
        client.receipt(again["id"])
    assert client.cancel(again["id"])["state"] == "cancelled"
    assert client.receipt(again["id"])["receipt"]["request"]["id"] == again["id"]
    assert client.report(again["id"])["request_id"] == again["id"]
    assert client.report_file(again["id"], "pdf").startswith(b"%PDF")
    with pytest.raises(Conflict, match="has no evidence"):
        client.evidence(again["id"])
    for picture in ("embedding", "membership"):
        with pytest.raises(Conflict):
            client.evidence_picture(again["id"], picture)
    assert [event.data["state"] for event in client.events(again["id"], after=first.id)] == ["pending", "cancelled"]

    await_approval(app.state.service.sessions, must_take(app.state.service.sessions, made["id"]))
    assert approver.approve(made["id"])["approved_by"]
    other = client.submit(f"{text} again", require_approval=True)
    await_approval(app.state.service.sessions, must_take(app.state.service.sessions, other["id"]))
    assert approver.reject(other["id"], reason="not hers")["failure"]["code"] == "rejected"


def classify(client: Any) -> None:
    one = client.classify("a good film")
    assert len(one["results"]) == 1 and "scores" not in one["results"][0]
    two = client.classify(["a good film", "a bad film"], scores=True, min_version=0, timeout_seconds=20)
    assert two["results"][0]["label"] == one["results"][0]["label"]
    assert sum(two["results"][0]["scores"].values()) == pytest.approx(1, abs=1e-3)
    many = client.classify_many(["a good film", "a bad film"], batch=1)
    assert [r["label"] for r in many["results"]] == [r["label"] for r in two["results"]]


def prompts_and_sets(client: Any, app: Any) -> None:
    before = client.list_active_sets(limit=1)["items"][0]["version"]
    first, second = (add_prompt(app.state.service, soft_prompt(seed)) for seed in (1, 2))
    page = client.list_prompts(limit=1, state="active")
    assert [found["id"] for found in page["items"]] == [second]
    assert client.list_prompts(limit=1, state="active", cursor=page["next_cursor"])["items"][0]["id"] == first
    assert [p["id"] for p in islice(client.iter_prompts(state="active", page_size=1), 2)] == [second, first]
    assert client.get_prompt(first)["num_virtual_tokens"] == 4
    assert client.export_prompt(first, "peft").startswith(b"PK")
    restored = client.restore(before + 1, reason="too much")
    assert (restored["version"], restored["reason"]) == (before + 3, "too much")
    assert client.get_active_set(before + 1)["digest"] == restored["digest"]
    assert client.list_active_sets(limit=5, before=before + 2)["items"][0]["version"] == before + 1
    versions = [entry["version"] for entry in client.iter_active_sets(page_size=2)]
    assert versions == list(range(before + 3, -1, -1))
    gone = client.revoke(first, reason="she changed her mind", code="withdrawn")
    assert (gone["state"], gone["revoke_code"], gone["active_set_version"]) == ("revoked", "withdrawn", before + 4)


def audit(client: Any) -> None:
    newest = client.list_audit(limit=1)
    subject = newest["items"][0]["subject"]
    older = client.list_audit(limit=1, before=newest["next_before"], subject=subject)
    assert all(entry["seq"] < newest["items"][0]["seq"] for entry in older["items"])
    entries = list(client.iter_audit(page_size=3))
    assert [entry["seq"] for entry in entries] == list(range(entries[0]["seq"], 0, -1))
    checkpoint, key = client.audit_checkpoint(), client.audit_public_key()
    assert checkpoint["public_key"] == key["public_key"]
    lines = b"".join(client.export_audit()).splitlines()
    assert len(lines) > len(entries) and key["key_id"].encode() in lines[-1]


def webhooks(client: Any) -> None:
    made = client.create_webhook("https://example.com/hook", states=["active"], all_requests=True)
    assert made["secret"].startswith("whsec_") and made["states"] == ["active"]
    assert client.get_webhook(made["id"])["url"] == "https://example.com/hook"
    other = client.create_webhook("https://example.com/other")
    page = client.list_webhooks(limit=1)
    assert client.list_webhooks(limit=1, cursor=page["next_cursor"])["items"][0]["id"] == made["id"]
    assert [hook["id"] for hook in islice(client.iter_webhooks(page_size=1), 2)] == [other["id"], made["id"]]
    request = client.submit(f"{MARKER} is told of {datetime.now(UTC).isoformat()}")
    sent = [client.list_deliveries(other["id"])["items"][0]["id"], client.ping_webhook(other["id"])["id"]]
    log = client.list_deliveries(other["id"], limit=1, state="pending")
    older = client.list_deliveries(other["id"], cursor=log["next_cursor"])["items"]
    assert [(found["id"], found["request_id"]) for found in older] == [(sent[0], request["id"])]
    assert [found["id"] for found in client.iter_deliveries(other["id"], state="pending", page_size=1)] == sent[::-1]
    assert client.redeliver(other["id"], sent[0])["id"] == sent[0]
    assert client.disable_webhook(made["id"])["disabled_at"]


def health(client: Any) -> None:
    assert client.ready() is True and client.live() is True
    assert "letheon_" in client.metrics()


def assert_documented(document: dict[str, Any], calls: list[httpx2.Request]) -> None:
    """Every operation was called, and with every parameter and field that it has, and with no other."""
    sent: dict[str, set[str]] = defaultdict(set)
    for call in calls:
        operation = next(
            operation
            for method, path, operation in operations(document)
            if method == call.method and re.fullmatch(re.sub(r"\{\w+\}", "[^/]+", path), call.url.path)
        )
        names = sent[operation["operationId"]]
        names |= {f"query {name}" for name in parse_qs(call.url.query.decode())}
        names |= {f"header {name}" for name in ("Idempotency-Key", "Last-Event-ID") if name in call.headers}
        if call.content:
            assert call.headers["Content-Type"] == "application/json"
            names |= {f"body {name}" for name in httpx2.Response(200, content=call.content).json()}
        assert re.fullmatch(r"letheon-client/\d+\.\d+\.\d+ python/\S+ httpx2/\S+", call.headers["User-Agent"])
        assert call.headers["Authorization"].startswith("Bearer lth_")
    for _, _, operation in operations(document):
        told = {f"{p['in']} {p['name']}" for p in operation.get("parameters", []) if p["in"] != "path"}
        if "requestBody" in operation:
            schema = resolve(document, operation["requestBody"]["content"]["application/json"]["schema"])
            told |= {f"body {name}" for name in schema["properties"]}
        assert sent.get(operation["operationId"]) == told, operation["operationId"]
