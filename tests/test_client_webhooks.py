"""``letheon_client.verify_webhook`` on what a real sender delivers, and on everything that must not pass for it."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from typing import Any

import pytest
from databases import migrated_database
from webhook_kit import Received, add_key, add_webhook, receiving, sender, submit

from app import db, lifecycle, webhooks
from app.vault import Vault
from letheon_client import InvalidArgument, InvalidWebhook, LetheonClientError, WebhookMessage, verify_webhook
from letheon_client import _webhooks as helper

NOW = 1_900_000_000
SECRET = "whsec_" + base64.b64encode(bytes(range(32))).decode()
BODY = json.dumps({"type": "ping", "timestamp": "2030-03-17T17:46:40+00:00", "data": {"webhook_id": "whk_1"}}).encode()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    def is_now(seconds: float) -> None:
        monkeypatch.setattr(helper.time, "time", lambda: seconds)

    is_now(NOW)
    return is_now


def signed(body: bytes = BODY, **changes: str) -> dict[str, str]:
    """Headers as the server makes them."""
    return {**webhooks.sign(SECRET, "dlv_1", NOW, body), **changes}


@pytest.fixture(scope="module")
def delivered(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, list[Received]]:
    """A webhook's secret, the request it was told of, and what came: two states and a ping."""
    folder = tmp_path_factory.mktemp("webhooks")
    engine = db.make_engine(migrated_database(folder / "letheon.db"))
    sessions, vault = db.make_sessions(engine), Vault(bytes(range(32)))
    key = add_key(sessions)
    with receiving() as receiver:
        webhook_id, secret = add_webhook(sessions, vault, key, receiver.url())
        request_id = submit(sessions, vault, key)
        with sessions.begin() as session:
            lifecycle.request_cancel(session, request_id, actor=key)
        with sessions.begin() as session:
            webhooks.ping(session, webhook_id, of=key)
        sender(sessions, vault).work()
    engine.dispose()
    return secret, request_id, receiver.received


def test_what_the_server_sends_is_believed(delivered: tuple[str, str, list[Received]]) -> None:
    secret, request_id, received = delivered
    messages = [verify_webhook(secret, got.headers, got.body) for got in received]
    assert sorted(message.type for message in messages) == ["ping", "request.cancelled", "request.pending"]
    [cancelled] = [message for message in messages if message.type == "request.cancelled"]
    assert cancelled.data["request_id"] == request_id and cancelled.data["previous_state"] == "pending"
    assert {message.id for message in messages} == {got.id for got in received}
    got = received[0]
    shouting = {name.upper(): value for name, value in got.headers.items()}
    assert verify_webhook([SECRET, secret], shouting, got.body) == messages[0], "while a secret is exchanged"
    with pytest.raises(InvalidWebhook, match="no signature"):
        verify_webhook(SECRET, got.headers, got.body)


def test_a_vector_of_the_specifications_own_libraries(clock: Callable[[float], None]) -> None:
    """Its body is no message of ours: it is signed, and refused as such."""
    clock(1614265330)
    headers = {
        "Webhook-Id": "msg_p5jXN8AQM9LWM0D4loKWxJek",
        "Webhook-Timestamp": "1614265330",
        "Webhook-Signature": "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=",
    }
    for body, why in (
        (b'{"test": 2432232314}', "is signed, and no message"),
        (b'{"test": 2432232315}', "no signature"),
    ):
        with pytest.raises(InvalidWebhook, match=why):
            verify_webhook("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", headers, body)


@pytest.mark.usefixtures("clock")
def test_one_good_signature_among_others_is_enough() -> None:
    good = signed()["webhook-signature"]
    for signatures in (good, f"v1,AAAA {good}", f"{good} v1a,AAAA", f" {good} "):
        found = verify_webhook(SECRET, signed(**{"webhook-signature": signatures}), BODY)
        assert found == WebhookMessage("dlv_1", "ping", "2030-03-17T17:46:40+00:00", {"webhook_id": "whk_1"})


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {name: value for name, value in signed().items() if name != "webhook-id"},
        signed(**{"webhook-id": "dlv_2"}),
        signed(**{"webhook-timestamp": str(NOW + 1)}),
        signed(**{"webhook-timestamp": f" {NOW}"}),
        signed(**{"webhook-timestamp": "-1"}),
        signed(**{"webhook-timestamp": "٣"}),
        signed(**{"webhook-signature": ""}),
        signed(**{"webhook-signature": "v1,"}),
        signed(**{"webhook-signature": "é"}),
        signed(**{"webhook-signature": "\udcff"}),
        signed(**{"webhook-id": "\udcff"}),
        signed(**{"webhook-signature": signed()["webhook-signature"].replace("v1,", "v2,")}),
        signed(**{"webhook-signature": signed()["webhook-signature"][:-1]}),
        signed(BODY + b" "),
    ],
)
@pytest.mark.usefixtures("clock")
def test_what_is_not_to_be_believed(headers: dict[str, str]) -> None:
    with pytest.raises(InvalidWebhook) as caught:
        verify_webhook(SECRET, headers, BODY)
    assert isinstance(caught.value, LetheonClientError)
    assert "whk_1" not in str(caught.value) and SECRET[6:] not in str(caught.value)


def test_an_old_message_is_not_believed_and_nor_is_one_of_the_future(clock: Callable[[float], None]) -> None:
    for seconds, tolerance, good in (
        (300, 300, True),
        (-300, 300, True),
        (301, 300, False),
        (-301, 300, False),
        (5, 4, 0),
    ):
        clock(NOW + seconds)
        if good:
            verify_webhook(SECRET, signed(), BODY, tolerance=tolerance)
            continue
        with pytest.raises(InvalidWebhook, match="too long ago"):
            verify_webhook(SECRET, signed(), BODY, tolerance=tolerance)


@pytest.mark.parametrize("body", [b"", b"[]", b"{}", b'{"type": "ping"}', b"\xff", b"[" * 100_000, b"1"])
@pytest.mark.usefixtures("clock")
def test_what_is_signed_and_no_message(body: bytes) -> None:
    with pytest.raises(InvalidWebhook, match="is signed, and no message"):
        verify_webhook(SECRET, signed(body), body)


@pytest.mark.parametrize(
    "wrong",
    [
        {"secret": ""},
        {"secret": "whsec_"},
        {"secret": "whsec_not base64!"},
        {"secret": []},
        {"body": BODY.decode()},
        {"tolerance": -1},
        {"tolerance": float("nan")},
    ],
)
@pytest.mark.usefixtures("clock")
def test_what_cannot_be_meant(wrong: dict[str, Any]) -> None:
    given: dict[str, Any] = {"secret": SECRET, "headers": signed(), "body": BODY, **wrong}
    with pytest.raises(InvalidArgument) as caught:
        verify_webhook(**given)
    assert "not base64" not in str(caught.value)
