"""Receipts: the same bytes from every process, nothing in them that was typed, and no byte that can be another."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from api_kit import MARKER, assert_problem, listening, new_key, running, tiny_llm
from click.testing import Result
from databases import migrated_database
from floor import activate, must_take, submit
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import select
from sqlalchemy.orm import Session, sessionmaker
from training_kit import train
from typer.testing import CliRunner
from worker_kit import forget_texts

from app import active_set, cli, db, lifecycle, receipts
from app.audit_export import verify_lines
from app.errors import Conflict, InvalidInput
from app.receipt_format import ReceiptInvalid, sign, verify, wilson
from app.settings import Mode, get_settings
from app.signing import PublicKey, Signer, canonical, new_private_key
from app.signing_key import load_signer
from app.tables import ForgetDigest, UnlearnRequest
from app.terms import agree
from app.vault import Vault
from models import metrics

Sessions = sessionmaker[Session]


def make_receipt(sessions: Sessions, vault: Vault, request_id: str) -> dict[str, Any]:
    return receipts.build(sessions, vault, request_id)


@pytest.mark.parametrize(
    ("rate", "rows", "low", "high"),
    [
        # z² = 3.841459; rate ± 0 at the ends: n/(n + z²) = 10/13.841459, z²/(n + z²) = 3.841459/23.841459
        (1.0, 10, 0.722467, 1.0),
        (0.0, 20, 0.0, 0.161125),
        # middle 0.5; half = 1.959964/1.03841459 · √(0.0025 + 3.841459/40000) = 1.887458 · 0.0509513 = 0.0961683
        (0.5, 100, 0.403832, 0.596168),
        # middle (0.8 + 0.19207/5)/(1 + 0.768292) = (0.8 + 0.384146)/1.768292 = 0.669656
        # half = 1.959964/1.768292 · √(0.16/5 + 3.841459/100) = 1.108394 · 0.265358 = 0.294121
        (0.8, 5, 0.375535, 0.963777),
    ],
)
def test_wilson_by_hand(rate: float, rows: int, low: float, high: float) -> None:
    assert wilson(rate, rows) == pytest.approx((low, high), abs=2e-6)


@pytest.mark.parametrize("rows", [1, 7, 1000])
def test_the_receipts_interval_is_that_of_the_core(rows: int) -> None:
    for hits in {0, 1, rows // 2, rows}:
        found = metrics.wilson(hits, rows)
        assert wilson(hits / rows, rows) == pytest.approx((found.low, found.high), abs=1e-6)


def test_wilson_holds_the_rate_and_narrows() -> None:
    for rate in (0.0, 0.01, 0.3, 0.999, 1.0):
        widths = [high - low for low, high in (wilson(rate, rows) for rows in (1, 10, 100, 10_000))]
        assert widths == sorted(widths, reverse=True)
        low, high = wilson(rate, 7)
        assert 0 <= low <= rate <= high <= 1
    for bad in ((0.5, 0), (-0.1, 5), (1.1, 5), (float("nan"), 5)):
        with pytest.raises(InvalidInput):
            wilson(*bad)


# --- of every end that a request can have ----------------------------------------------------------------------------


def test_there_is_none_before_the_end(sessions: Sessions, vault: Vault) -> None:
    request_id = submit(sessions, vault)
    with pytest.raises(Conflict, match="pending"):
        make_receipt(sessions, vault, request_id)
    must_take(sessions, request_id)
    with pytest.raises(Conflict, match="training"):
        make_receipt(sessions, vault, request_id)


def test_of_a_cancelled_and_of_a_failed_request(sessions: Sessions, vault: Vault) -> None:
    cancelled, failed = submit(sessions, vault), submit(sessions, vault)
    with sessions.begin() as session:
        lifecycle.request_cancel(session, cancelled, actor="key_1")
    claim = must_take(sessions, failed)
    tried = {"missed": ["forget"], "alpha": 0.3, "forget_abstain": 0.5}
    with sessions.begin() as session:
        lifecycle.start_evaluating(session, claim)
    with sessions.begin() as session:
        lifecycle.start_again(session, claim, tried)
    with sessions.begin() as session:
        lifecycle.fail(session, claim, code="diverged", detail=f"not for receipts: {MARKER}")
    found = make_receipt(sessions, vault, cancelled)["receipt"]
    assert (found["request"]["state"], found["prompt"], found["checks"]) == ("cancelled", None, None)
    assert (found["active_set"], found["revocation"], found["failure"]) == (None, None, None)
    assert [entry["action"] for entry in found["audit"]] == ["request.created", "request.cancelled"]
    found = make_receipt(sessions, vault, failed)
    assert found["receipt"]["failure"] == {"code": "diverged"} and found["receipt"]["earlier_tries"] == [tried]
    assert MARKER not in json.dumps(found)


def test_of_an_active_a_suspended_and_a_revoked_request(sessions: Sessions, vault: Vault) -> None:
    first, second = submit(sessions, vault, "one", "two"), submit(sessions, vault, "three")
    activate(sessions, vault, must_take(sessions, first), data=b"a", version=0)
    prompt_id = activate(sessions, vault, must_take(sessions, second), data=b"b", version=1)
    active = make_receipt(sessions, vault, second)["receipt"]
    assert (active["request"]["state"], active["prompt"]["id"]) == ("active", prompt_id)
    assert active["prompt"]["digest"] == hashlib.sha256(b"b").hexdigest()
    assert active["active_set"]["version"] == 2 and active["active_set"]["in_force"] == [{"from": 2, "before": None}]
    with sessions() as session:
        assert active["active_set"]["digest"] == active_set.read_active_set(session).digest
    assert active["model"]["identity"] is None  # of a request from before that was kept
    assert active["checks"]["rates"] == [
        {"name": "forget_abstain", "rate": 1.0, "rows": 1, "low": 0.206549, "high": 1.0, "approximate": False}
    ]
    with sessions.begin() as session:
        active_set.restore(session, 1, mode="concatenate", fingerprint="f" * 64, actor="key_2", reason=MARKER)
    suspended = make_receipt(sessions, vault, second)["receipt"]
    assert suspended["request"]["state"] == "suspended"
    assert suspended["active_set"]["in_force"] == [{"from": 2, "before": 3}]
    assert suspended["active_set"]["digest"] == active["active_set"]["digest"]
    with sessions.begin() as session:
        active_set.revoke_prompt(session, prompt_id, actor="key_3", reason=MARKER, code="withdrawn")
    revoked = make_receipt(sessions, vault, second)
    gone = revoked["receipt"]["revocation"]
    assert (gone["code"], gone["by"]) == ("withdrawn", "key_3") and datetime.fromisoformat(gone["at"]).tzinfo == UTC
    assert [entry["action"] for entry in revoked["receipt"]["audit"]] == [
        "request.created",
        "request.training",
        "request.evaluating",
        "request.active",
        "request.suspended",
        "prompt.revoked",
        "request.revoked",
    ]
    assert MARKER not in json.dumps(revoked)


def test_estimates_have_an_interval_where_it_is_known_of_how_many_texts_they_are(
    sessions: Sessions, vault: Vault
) -> None:
    metrics = {"unseen_claimed": 0.8, "unseen_certain": 0.0, "unseen_rows": 5}

    def rates(known: dict[str, Any]) -> dict[str, dict[str, Any]]:
        request_id = submit(sessions, vault)
        with sessions() as session:
            version = active_set.read_active_set(session).version
        activate(sessions, vault, must_take(sessions, request_id), version=version, metrics=known)
        made = make_receipt(sessions, vault, request_id)["receipt"]["checks"]["rates"]
        return {rate.pop("name"): rate for rate in made}

    # 4 of 5 by hand above; 0 of 5: 3.841459 / 8.841459
    assert rates(metrics) == {
        "unseen_claimed": {"rate": 0.8, "rows": 5, "low": 0.375535, "high": 0.963776, "approximate": True},
        "unseen_certain": {"rate": 0.0, "rows": 5, "low": 0.0, "high": 0.434482, "approximate": True},
    }
    held_out = {"held_out_accuracy": 0.8, "held_out_accuracy_before": 0.0, "held_out_rows": 5}
    assert rates(held_out) == {
        "held_out_accuracy": {"rate": 0.8, "rows": 5, "low": 0.375535, "high": 0.963776, "approximate": False},
        "held_out_accuracy_before": {"rate": 0.0, "rows": 5, "low": 0.0, "high": 0.434482, "approximate": False},
    }
    older = {"rate": 0.8, "rows": None, "low": None, "high": None, "approximate": True}
    assert rates({"unseen_claimed": 0.8}) == {"unseen_claimed": older}
    assert rates({"unseen_claimed": None, "unseen_certain": None, "unseen_rows": 0}) == {}


def test_when_the_persons_request_was_received(sessions: Sessions, vault: Vault) -> None:
    received = datetime(2026, 1, 31, 9, 30, tzinfo=timezone(timedelta(hours=1)))
    agreed = agree(
        received_at=received, expires_at=None, approval_required=False, months=1, now=received + timedelta(days=3)
    )
    ids = [submit(sessions, vault, terms=terms) for terms in (agreed, None)]
    with sessions.begin() as session:
        for request_id in ids:
            lifecycle.request_cancel(session, request_id, actor="key_1")
    dated, older = (make_receipt(sessions, vault, request_id)["receipt"]["request"] for request_id in ids)
    assert (dated["received_at"], dated["due_at"]) == (
        "2026-01-31T08:30:00.000000+00:00",
        "2026-02-28T08:30:00.000000+00:00",
    )
    assert older["received_at"] is older["due_at"] is None


def test_the_digest_of_the_set(sessions: Sessions, vault: Vault) -> None:
    ids = [submit(sessions, vault, *texts) for texts in (("a", "b"), ("b", "a"), ("a", "c"))]
    ids.append(submit(sessions, vault, set_digest=b"s" * 32))
    with sessions.begin() as session:
        for request_id in ids:
            lifecycle.request_cancel(session, request_id, actor="key_1")
    digests = [make_receipt(sessions, vault, i)["receipt"]["request"]["set_digest"] for i in ids]
    assert digests[0] == digests[1] != digests[2]
    with sessions.begin() as session:
        own = sorted(session.scalars(select(ForgetDigest.digest).where(ForgetDigest.request_id == ids[0])))
        assert digests[0] == hashlib.sha256(b"letheon set v1\0" + own[0] + own[1]).hexdigest()
    assert digests[3] == (b"s" * 32).hex()


def test_what_moves_while_it_is_made_is_not_in_it_by_half(
    sessions: Sessions, vault: Vault, monkeypatch: pytest.MonkeyPatch
) -> None:
    request_id = submit(sessions, vault)
    prompt_id = activate(sessions, vault, must_take(sessions, request_id), version=0)
    before = make_receipt(sessions, vault, request_id)
    read, calls = lifecycle.get_request, 0

    def then_revoke(session: Session, wanted: str, **named: Any) -> UnlearnRequest:
        nonlocal calls
        calls += 1
        found = read(session, wanted, **named)
        if calls == 1:  # what comes after it is read after the revoke
            with sessions.begin() as other:
                active_set.revoke_prompt(other, prompt_id, actor="key_1", reason=None)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(lifecycle, "get_request", then_revoke)
        assert make_receipt(sessions, vault, request_id) == before and calls == 1
    found = make_receipt(sessions, vault, request_id)["receipt"]
    assert found["request"]["state"] == "revoked" and found["revocation"] is not None


# --- of a real training, over HTTP -----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", list(Mode))
def test_the_same_bytes_from_two_servers_and_nothing_typed(database_url: str, tmp_path: Path, mode: Mode) -> None:
    texts = [item.text for item in forget_texts(5)]
    with running(database_url, tmp_path / "a", mode=mode) as api, running(database_url, tmp_path / "b") as other:
        headers = api.key("requests", "auditor")  # trained below for another key
        pending = api.submit(headers)["id"]
        assert_problem(api.client.get(f"/unlearn-requests/{pending}/receipt", headers=headers), 409, "conflict")
        unknown = f"/unlearn-requests/req_{'0' * 28}/receipt"
        assert_problem(api.client.get(unknown, headers=headers), 404, "not-found")
        request_id = train(api, tmp_path / "a", mode, texts)
        path = f"/unlearn-requests/{request_id}/receipt"
        assert_problem(api.client.get(path), 401, "unauthenticated")
        assert_problem(api.client.get(path, headers=api.key("classify")), 403, "forbidden")

        answers = [server.client.get(path, headers=headers) for server in (api, other, api)]
        assert {answer.status_code for answer in answers} == {200}
        [data] = {answer.content for answer in answers}
        audit_headers = api.key("auditor")
        key = PublicKey.from_hex(api.client.get("/admin/audit/public-key", headers=audit_headers).json()["public_key"])
        found, signed_by = verify(data, key)
        assert signed_by == key and MARKER not in data.decode() and "Quillfeather" not in data.decode()

        assert found["request"]["num_texts"] == 5 and found["request"]["state"] == "active"
        assert found["model"]["fingerprint"] == tiny_llm().fingerprint
        identity = found["model"]["identity"]
        assert (identity["quantization"], identity["template"]) == ("none", tiny_llm().template.source)
        assert identity["labels"] == ["negative", "positive"] and identity["base"] == tiny_llm().identity["base"]
        assert found["checks"]["passed"] is True and found["checks"]["limits"]["max_retain_drop"] == 1
        rates = {rate["name"]: rate for rate in found["checks"]["rates"]}
        counts = found["checks"]["counts"]
        expected = {"forget_abstain": 5, "retain_accuracy": counts["retain_rows"]}
        estimated = [name for name in ("unseen_claimed", "unseen_certain") if name in rates]
        if mode == Mode.ROUTED:
            expected |= {"prompt_abstain": 5, "gate_recall": 5}
            expected |= dict.fromkeys(estimated, counts["unseen_rows"])
            expected |= dict.fromkeys(
                ("false_claim_rate", "total_claim_rate", "false_abstain_rate"), counts["check_rows"]
            )
            assert found["prompt"]["gate_digest"] is not None
        for name, rows in expected.items():
            low, high = wilson(rates[name]["rate"], rows)
            assert rates[name]["rows"] == rows
            assert (rates[name]["low"], rates[name]["high"]) == pytest.approx((low, high), abs=1e-5)
        assert [name for name, rate in rates.items() if rate["approximate"]] == [
            *estimated,
            "retain_accuracy",
            "retain_accuracy_before",
        ]
        assert {name for name in rates if name.startswith("accuracy of class")}

        exported = api.client.get("/admin/audit/export", headers=audit_headers).content.splitlines()
        verify_lines(exported, key)
        entries = {entry["seq"]: entry for entry in map(json.loads, exported) if entry["kind"] == "entry"}
        assert found["audit"] and all(entries[entry["seq"]]["hash"] == entry["hash"] for entry in found["audit"])


# --- offline ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[bytes, Signer]]:
    engine = db.make_engine(migrated_database(tmp_path_factory.mktemp("receipt") / "made.db"))
    sessions, vault = db.make_sessions(engine), Vault(bytes(range(32)))
    request_id = submit(sessions, vault)
    activate(sessions, vault, must_take(sessions, request_id), version=0)
    with sessions.begin() as session:
        signer = load_signer(session, vault)
    yield canonical(make_receipt(sessions, vault, request_id)), signer
    engine.dispose()


@settings(max_examples=300, deadline=None)
@given(at=st.integers(min_value=0), bit=st.integers(0, 7))
def test_a_flipped_bit_is_refused(made: tuple[bytes, Signer], at: int, bit: int) -> None:
    data = bytearray(made[0] + b"\n")
    data[at % len(data)] ^= 1 << bit
    for key in (made[1].public, None):
        with pytest.raises(ReceiptInvalid):
            verify(bytes(data), key)


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data[:-1],
        lambda data: data + b" ",
        lambda data: data + b"\n\n",
        lambda data: b"\n" + data,
        lambda data: json.dumps(json.loads(data)).encode(),
        lambda data: json.dumps(json.loads(data), indent=2).encode(),
        lambda data: data.replace(b'"signature":', b'"signature":"","signature":'),
        lambda data: data.replace(b'"num_texts":1', b'"num_texts":2,"num_texts":1'),
        lambda data: data.replace(b'"rate":1.0', b'"rate":1.00'),
        lambda data: data.replace(b'"kind"', b'"\\u006bind"'),
        lambda data: data[: data.rindex(b'"') - 128] + data[-130:].upper(),
        lambda data: b"",
        lambda data: b"[]",
        lambda data: b"1",
        lambda data: b'{"receipt":{},"signature":""}',
        lambda data: b'{"receipt":{"key":{"public_key":1}},"signature":""}',
        lambda data: b'{"receipt":[],"signature":null}',
        lambda data: b"[" * 100_000,
        lambda data: b"\xff",
    ],
)
def test_another_spelling_is_refused(made: tuple[bytes, Signer], change: Any) -> None:
    data, signer = made
    assert change(data) != data
    for key in (signer.public, None):
        with pytest.raises(ReceiptInvalid):
            verify(change(data), key)


def test_what_another_key_signed_is_refused_where_the_key_is_known(made: tuple[bytes, Signer]) -> None:
    data, signer = made
    assert verify(data + b"\n", signer.public) == verify(data) == (json.loads(data)["receipt"], signer.public)
    forger = Signer(new_private_key())
    receipt = json.loads(data)["receipt"]
    receipt["key"] = {"algorithm": "Ed25519", "id": forger.public.key_id, "public_key": forger.public.hex()}
    forged = canonical(sign(receipt, forger))
    assert verify(forged)[1] == forger.public  # under its own key it is right, which is what the command warns of
    with pytest.raises(ReceiptInvalid, match="another key"):
        verify(forged, signer.public)
    receipt["key"]["id"] = signer.public.key_id
    with pytest.raises(ReceiptInvalid, match="names another key"):
        verify(canonical(sign(receipt, forger)))


def test_a_receipt_of_the_first_version_still_verifies(made: tuple[bytes, Signer]) -> None:
    data, signer = made
    receipt = json.loads(data)["receipt"]
    assert receipt.pop("version") == 2
    del receipt["request"]["received_at"]
    older = {**receipt, "version": 1}
    assert verify(canonical(sign(older, signer)), signer.public) == (older, signer.public)


def test_the_signed_bytes_can_be_cut_out_of_the_file(made: tuple[bytes, Signer]) -> None:
    """What the documentation tells authors of other verifiers."""
    data, signer = made
    begin, end = b'{"receipt":', b',"signature":"'
    assert data.startswith(begin) and data[-130 - len(end) :].startswith(end)
    body, signature = data[len(begin) : -130 - len(end)], bytes.fromhex(data[-130:-2].decode())
    signer.public._key.verify(signature, b"letheon receipt v1\0" + body)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, list(arguments))


def test_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with listening(migrated_database(tmp_path / "cli.db"), tmp_path / "home") as (url, app, _):
        service = app.state.service
        monkeypatch.setenv("LETHEON_URL", url)
        monkeypatch.setenv("LETHEON_API_KEY", new_key(service)["Authorization"].removeprefix("Bearer "))
        get_settings.cache_clear()
        with service.sessions.begin() as session:
            request_id = lifecycle.create_request(
                session,
                service.vault,
                texts=forget_texts(2),
                reason=None,
                options={},
                fingerprint=tiny_llm().fingerprint,
                api_key_id=None,
            ).id
        early = run("receipt", "get", request_id)
        assert early.exit_code == 1 and "has no receipt yet" in early.stderr
        with service.sessions.begin() as session:
            lifecycle.request_cancel(session, request_id, actor="key_1")
            key = load_signer(session, service.vault).public.hex()
        got = run("receipt", "get", request_id)
        assert got.exit_code == 0, got.stderr
    (tmp_path / "receipt.json").write_bytes(got.stdout_bytes)
    (tmp_path / "bad.json").write_bytes(got.stdout_bytes.replace(b'"cancelled"', b'"revoked"', 1))
    good = run("receipt", "verify", "receipt.json", "--public-key", key)  # the server is gone by now
    assert good.exit_code == 0 and f"{request_id}, cancelled, 2 texts" in good.stderr and "own" not in good.stderr
    assert json.loads(run("receipt", "verify", "receipt.json", "--json").stdout)["request"]["id"] == request_id
    assert "the file's own" in run("receipt", "verify", "receipt.json").stderr
    for arguments in (["bad.json"], ["receipt.json", "--public-key", "0" * 64]):
        failed = run("receipt", "verify", *arguments)
        assert failed.exit_code == 1 and failed.stdout == "" and "error:" in failed.stderr
