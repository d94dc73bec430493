"""The floor of webhooks: who is told what, in which transaction, and what becomes of a message."""

from __future__ import annotations

import base64
import json
import threading
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from databases import database_kinds, fresh_database
from floor import activate, await_approval, must_take, terms
from floor import submit as floor_submit
from sqlalchemy import func, select, text, update
from sqlalchemy.orm import Session, sessionmaker
from webhook_kit import add_key, add_webhook, deliveries, make_due, sent_long_ago, submit, webhook

from app import active_set, audit, db, keys, lifecycle, webhook_queue, webhooks
from app.errors import Conflict, Forbidden, InvalidInput, NotFound, VaultError
from app.tables import ApiKey, AuditEntry, RequestEvent, Webhook, WebhookDelivery, utcnow
from app.vault import Vault
from app.webhook_queue import PAUSES, DeliveryError, Due, Outcome, pause

Sessions = sessionmaker[Session]
URL = "https://example.com/hook"


def claim(sessions: Sessions, **options: Any) -> list[Due]:
    with sessions.begin() as session:
        return webhook_queue.claim(session, **{"limit": 99, "lease_seconds": 60, "max_attempts": 3, **options})


def record(sessions: Sessions, due: Due, outcome: Outcome, *, attempts: int = 3) -> bool:
    with sessions.begin() as session:
        return webhook_queue.record(session, due, outcome, max_attempts=attempts)


def actions(sessions: Sessions, subject: str) -> list[str]:
    with sessions() as session:
        audit.verify(session)
        return list(session.scalars(select(AuditEntry.action).where(AuditEntry.subject == subject)))


def test_the_signature_is_that_of_the_specification() -> None:
    """The specification's example; its signature worked out by hand with
    ``printf '%s.%s.%s' ID TIME BODY | openssl dgst -sha256 -mac HMAC -macopt hexkey:… -binary | base64``."""
    secret, message, body = (
        "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw",
        "msg_p5jXN8AQM9LWM0D4loKWxJek",
        b'{"test": 2432232314}',
    )
    assert webhooks.sign(secret, message, 1614265330, body) == {
        "webhook-id": message,
        "webhook-timestamp": "1614265330",
        "webhook-signature": "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=",
    }


def test_a_webhook_is_made_once_shown_and_disabled(sessions: Sessions, vault: Vault) -> None:
    key = add_key(sessions)
    hook, secret = add_webhook(sessions, vault, key, URL, states=["failed", "active"])
    row = webhook(sessions, hook)
    assert (row.states, row.all_requests, row.disabled_at) == (["active", "failed"], False, None)
    assert secret.startswith("whsec_") and len(base64.b64decode(secret.removeprefix("whsec_"))) == 32
    assert secret.encode() not in row.sealed_secret
    assert webhooks.open_secret(vault, hook, row.wrapped_key, row.sealed_secret) == secret
    with pytest.raises(VaultError):  # a secret that was moved to another webhook's row does not open
        webhooks.open_secret(vault, "whk_other", row.wrapped_key, row.sealed_secret)
    submit(sessions, vault, key)
    assert deliveries(sessions) == []  # it waits, and of that this webhook does not tell
    for _ in range(2):
        with sessions.begin() as session:
            assert webhooks.disable_webhook(session, hook, of=key, actor=key).disabled_at is not None
    assert actions(sessions, hook) == ["webhook.created", "webhook.disabled"]
    with sessions() as session:
        assert all("example.com" not in json.dumps(detail) for detail in session.scalars(select(AuditEntry.detail)))


def test_what_cannot_be_made(sessions: Sessions, vault: Vault) -> None:
    key = add_key(sessions)
    with pytest.raises(InvalidInput, match="https"):
        add_webhook(sessions, vault, key, "http://example.com", private=False)
    with pytest.raises(InvalidInput, match="one of pending"):
        add_webhook(sessions, vault, key, URL, states=["forgotten"])
    for scopes, everybody in ((["requests"], True), (["classify"], True), (["approve"], False), (["admin"], False)):
        with pytest.raises(Forbidden):
            add_webhook(sessions, vault, key, URL, scopes=scopes, all_requests=everybody)
    made = [add_webhook(sessions, vault, key, URL)[0] for _ in range(webhooks.MAX_PER_KEY - 1)]
    refused: list[Conflict] = []

    def another() -> None:
        try:
            add_webhook(sessions, vault, key, URL)
        except Conflict as error:
            refused.append(error)

    both = [threading.Thread(target=another) for _ in range(2)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    assert [error.extra["limit"] for error in refused] == [webhooks.MAX_PER_KEY]  # one place, and two that asked
    with sessions.begin() as session:
        webhooks.disable_webhook(session, made[0], of=key, actor=key)
    add_webhook(sessions, vault, key, URL)
    add_webhook(sessions, vault, add_key(sessions), URL)


def test_a_webhook_tells_of_what_its_key_may_read(sessions: Sessions, vault: Vault) -> None:
    key, other, auditor = add_key(sessions), add_key(sessions), add_key(sessions, "requests", "auditor")
    mine, _ = add_webhook(sessions, vault, key, URL)
    theirs, _ = add_webhook(sessions, vault, other, URL)
    everything, _ = add_webhook(sessions, vault, auditor, URL, all_requests=True, scopes=["auditor"])
    request_id = submit(sessions, vault, key)
    submit(sessions, vault, None)  # nobody's: only who reads all is told
    assert [row.request_id for row in deliveries(sessions, mine)] == [request_id]
    assert deliveries(sessions, theirs) == []
    assert len(deliveries(sessions, everything)) == 2
    with sessions.begin() as session:  # it was given all, and has lost the scope since
        session.execute(update(ApiKey).where(ApiKey.id == auditor).values(scopes=["requests"]))
        keys.revoke_key(session, key, actor="test")
    submit(sessions, vault, key)
    assert len(deliveries(sessions, everything)) == 2
    assert len(deliveries(sessions, mine)) == 1  # a revoked key reads nothing any more


@pytest.mark.parametrize("scope", keys.READS_ALL)
def test_an_approver_hears_of_what_waits_for_approval(scope: str, sessions: Sessions, vault: Vault) -> None:
    approver = add_key(sessions, scope)
    options = {"all_requests": True, "scopes": [scope], "states": ["awaiting_approval"]}
    add_webhook(sessions, vault, approver, URL, **options)
    request_id = floor_submit(sessions, vault, api_key_id=add_key(sessions), terms=terms(approval=True))
    await_approval(sessions, must_take(sessions, request_id))
    [told] = deliveries(sessions)
    assert (told.request_id, told.payload["type"]) == (request_id, "request.awaiting_approval")


@pytest.mark.parametrize("ended", ["revoked_at", "expires_at"])
def test_what_waits_for_a_key_that_has_ended_is_not_sent(ended: str, sessions: Sessions, vault: Vault) -> None:
    key = add_key(sessions)
    add_webhook(sessions, vault, key, URL)
    submit(sessions, vault, key)
    with sessions.begin() as session:
        session.execute(update(ApiKey).values({ended: utcnow()}))
    assert claim(sessions) == []
    with sessions.begin() as session:
        webhook_queue.clean(session, log_days=30)
    [row] = deliveries(sessions)
    assert (row.state, row.last_error, row.next_at) == ("failed", "disabled", None)


def test_each_change_is_told_and_no_free_text_is_in_it(sessions: Sessions, vault: Vault) -> None:
    key = add_key(sessions)
    add_webhook(sessions, vault, key, URL)
    request_id = submit(sessions, vault, key)
    prompt_id = activate(sessions, vault, must_take(sessions, request_id), version=0)
    with sessions.begin() as session:
        active_set.revoke_prompt(session, prompt_id, actor="admin", reason="asked by Quillfeather")
    failing = must_take(sessions, submit(sessions, vault, key))
    with sessions.begin() as session:
        lifecycle.fail(session, failing, code="diverged", detail="Quillfeather's loss")
    told = [row.payload for row in deliveries(sessions)]
    told.sort(key=lambda payload: payload["data"]["sequence"])
    states = ["pending", "training", "evaluating", "active", "revoked"]
    assert [p["data"]["state"] for p in told] == [*states, "pending", "training", "failed"]
    assert [p["data"]["previous_state"] for p in told[:5]] == [None, *states[:4]]
    assert [p["type"] for p in told] == [f"request.{p['data']['state']}" for p in told]
    assert [p["data"]["active_set_version"] for p in told[:5]] == [0, 0, 0, 1, 2]
    assert told[-1]["data"]["failure_code"] == "diverged" and told[0]["data"]["failure_code"] is None
    assert "Quillfeather" not in json.dumps(told)
    assert set(told[0]["data"]) == {
        *("request_id", "state", "previous_state", "sequence", "failure_code", "active_set_version"),
        *("created_at", "started_at", "finished_at", "due_at", "expires_at"),
    }
    with sessions() as session:
        events = session.scalars(select(RequestEvent.id).where(RequestEvent.type == "state").order_by(RequestEvent.id))
        assert [p["data"]["sequence"] for p in told] == list(events)


def test_no_message_without_its_change(sessions: Sessions, vault: Vault) -> None:
    key = add_key(sessions)
    add_webhook(sessions, vault, key, URL)
    request_id = submit(sessions, vault, key)
    with sessions() as session:
        lifecycle.request_cancel(session, request_id, actor=key)
        assert session.scalar(select(func.count()).select_from(WebhookDelivery)) == 2
        session.rollback()
    assert [row.payload["data"]["state"] for row in deliveries(sessions)] == ["pending"]


def test_a_claim_is_a_lease(sessions: Sessions, vault: Vault) -> None:
    key = add_key(sessions)
    hook, _ = add_webhook(sessions, vault, key, URL)
    submit(sessions, vault, key)
    [first] = claim(sessions)
    assert (first.webhook_id, first.url, first.attempt) == (hook, URL, 1)
    assert URL not in repr(first) and claim(sessions) == []
    make_due(sessions)  # the sender is gone
    [second] = claim(sessions)
    assert (second.id, second.attempt, second.payload) == (first.id, 2, first.payload)
    assert record(sessions, first, Outcome(DeliveryError.TIMEOUT)) is False  # it was not: too late
    assert record(sessions, second, Outcome(status=200)) is True
    [row] = deliveries(sessions)
    assert (row.state, row.attempts, row.last_status, row.last_error, row.next_at) == ("delivered", 2, 200, None, None)
    assert row.delivered_at is not None and claim(sessions) == []


def test_failures_are_tried_again_until_they_are_enough(sessions: Sessions, vault: Vault) -> None:
    key = add_key(sessions)
    add_webhook(sessions, vault, key, URL)
    submit(sessions, vault, key)
    for attempt in (1, 2, 3):
        [due] = claim(sessions)
        assert record(sessions, due, Outcome(DeliveryError.STATUS, 500))
        [row] = deliveries(sessions)
        assert (row.attempts, row.last_status, row.last_error) == (attempt, 500, "status")
        if attempt < 3:
            assert row.state == "pending" and row.next_at is not None and claim(sessions) == []
            make_due(sessions)
    assert (row.state, row.next_at) == ("failed", None)


def test_a_message_that_kills_its_senders_ends(sessions: Sessions, vault: Vault) -> None:
    key = add_key(sessions)
    add_webhook(sessions, vault, key, URL)
    submit(sessions, vault, key)
    for _ in range(3):
        assert len(claim(sessions)) == 1
        make_due(sessions)
    assert claim(sessions) == []
    [row] = deliveries(sessions)
    assert (row.state, row.last_error, row.attempts) == ("failed", "lost", 3)


def test_pauses_grow_are_spread_and_heed_the_receiver() -> None:
    for attempt, seconds in enumerate([*PAUSES, PAUSES[-1]], start=1):
        found = [pause(attempt) for _ in range(50)]
        assert 0.8 * seconds <= min(found) < max(found) <= 1.2 * seconds
    assert pause(1, 100.0) == 100.0
    assert pause(1, 1e9) == PAUSES[-1]
    assert pause(2, 1.0) >= 24.0


def test_one_receiver_or_key_does_not_take_every_place(sessions: Sessions, vault: Vault) -> None:
    busy, other = add_key(sessions), add_key(sessions)
    hooks = [add_webhook(sessions, vault, busy, URL)[0] for _ in range(3)]
    quiet, _ = add_webhook(sessions, vault, other, URL)
    for _ in range(4):
        submit(sessions, vault, busy)
    submit(sessions, vault, other)
    taken = claim(sessions)
    assert sorted(due.webhook_id for due in taken) == sorted([hooks[0]] * 2 + [hooks[1]] * 2 + [quiet])
    assert claim(sessions, in_flight=taken) == []
    assert {due.webhook_id for due in claim(sessions, in_flight=taken[-1:], limit=1)} <= {*hooks}
    left = [due for due in taken if due.webhook_id != hooks[0]]
    assert {due.webhook_id for due in claim(sessions, in_flight=left)} <= {hooks[0], hooks[2]}


def test_gone_disables_the_webhook_and_ends_what_waits(sessions: Sessions, vault: Vault) -> None:
    key = add_key(sessions)
    hook, _ = add_webhook(sessions, vault, key, URL)
    for _ in range(3):
        submit(sessions, vault, key)
    first, second = claim(sessions)
    assert record(sessions, first, Outcome(DeliveryError.GONE, 410))
    assert webhook(sessions, hook).disabled_at is not None
    assert actions(sessions, hook) == ["webhook.created", "webhook.disabled"]
    assert record(sessions, second, Outcome(DeliveryError.TIMEOUT))  # under way meanwhile: not tried again
    rows = {row.id: row for row in deliveries(sessions)}
    assert (rows.pop(first.id).last_error, rows.pop(second.id).last_error) == ("gone", "timeout")
    assert [(row.state, row.last_error) for row in rows.values()] == [("failed", "disabled")]
    submit(sessions, vault, key)
    assert len(deliveries(sessions)) == 3
    for refused in (lambda s: webhooks.redeliver(s, hook, first.id, of=key), lambda s: webhooks.ping(s, hook, of=key)):
        with pytest.raises(Conflict, match="disabled"), sessions.begin() as session:
            refused(session)


def test_redelivery_is_one_more_attempt_under_the_same_id(sessions: Sessions, vault: Vault) -> None:
    key = add_key(sessions)
    hook, _ = add_webhook(sessions, vault, key, URL)
    submit(sessions, vault, key)
    [due] = claim(sessions)
    with pytest.raises(Conflict, match="being sent"), sessions.begin() as session:
        webhooks.redeliver(session, hook, due.id, of=key)
    assert record(sessions, due, Outcome(DeliveryError.CONNECT), attempts=1)
    for outcome, state in ((Outcome(DeliveryError.CONNECT), "failed"), (Outcome(status=200), "delivered")):
        sent_long_ago(sessions)
        with sessions.begin() as session:
            assert webhooks.redeliver(session, hook, due.id, of=None).state == "pending"
        [again] = claim(sessions, max_attempts=1)
        assert again.id == due.id and again.payload == due.payload
        assert record(sessions, again, outcome, attempts=1)
        assert [row.state for row in deliveries(sessions)] == [state]
    with pytest.raises(NotFound), sessions.begin() as session:
        webhooks.redeliver(session, hook, due.id, of="key_other")
    elsewhere, _ = add_webhook(sessions, vault, key, URL)
    with pytest.raises(NotFound), sessions.begin() as session:
        webhooks.redeliver(session, elsewhere, due.id, of=key)


def test_redelivery_cannot_be_used_to_hammer(sessions: Sessions, vault: Vault) -> None:
    key = add_key(sessions)
    hook, _ = add_webhook(sessions, vault, key, URL)
    submit(sessions, vault, key)
    [waits] = deliveries(sessions)
    for _ in range(2):  # what was never sent goes once, however often it is asked for
        with sessions.begin() as session:
            webhooks.redeliver(session, hook, waits.id, of=key)
    for outcome in (Outcome(DeliveryError.CONNECT), Outcome(status=200)):
        [due] = claim(sessions)
        assert record(sessions, due, outcome)
        with pytest.raises(Conflict, match="a moment ago") as refused, sessions.begin() as session:
            webhooks.redeliver(session, hook, due.id, of=key)
        assert 1 <= refused.value.extra["retry_after"] <= PAUSES[0]
        sent_long_ago(sessions)
        with sessions.begin() as session:
            assert webhooks.redeliver(session, hook, due.id, of=key).state == "pending"


def test_a_log_of_many_messages_is_no_way_to_hammer(sessions: Sessions, vault: Vault) -> None:
    key = add_key(sessions)
    hook, _ = add_webhook(sessions, vault, key, URL)
    elsewhere, _ = add_webhook(sessions, vault, key, URL + "/other")
    for _ in range(3):
        submit(sessions, vault, key)
    for _ in range(3):
        for due in claim(sessions):
            assert record(sessions, due, Outcome(status=200))
    of_hook, of_other = ([row.id for row in deliveries(sessions, name)] for name in (hook, elsewhere))
    assert (len(of_hook), len(of_other)) == (3, 3)

    def again(webhook_id: str, delivery_id: str) -> str:
        with sessions.begin() as session:
            return webhooks.redeliver(session, webhook_id, delivery_id, of=key).state

    def refused(delivery_id: str, match: str) -> None:
        with pytest.raises(Conflict, match=match) as error:
            again(hook, delivery_id)
        assert 1 <= error.value.extra["retry_after"] <= PAUSES[0]

    sent_long_ago(sessions)
    assert again(hook, of_hook[0]) == again(hook, of_hook[0]) == again(elsewhere, of_other[0]) == "pending"
    refused(of_hook[1], "another message of the webhook is due")
    for due in claim(sessions):
        assert record(sessions, due, Outcome(status=200))
    refused(of_hook[1], "a moment ago")
    sent_long_ago(sessions)
    assert again(hook, of_hook[1]) == "pending"


def test_a_worker_whose_clock_is_ahead_holds_no_redelivery_up(sessions: Sessions, vault: Vault) -> None:
    key = add_key(sessions)
    hook, _ = add_webhook(sessions, vault, key, URL)
    submit(sessions, vault, key)
    [due] = claim(sessions)
    assert record(sessions, due, Outcome(status=200))
    for ahead, waits in ((PAUSES[0] / 2, True), (3600.0, False)):
        with sessions.begin() as session:
            session.execute(update(WebhookDelivery).values(sent_at=utcnow() + timedelta(seconds=ahead)))
        if waits:
            with pytest.raises(Conflict, match="a moment ago") as refused, sessions.begin() as session:
                webhooks.redeliver(session, hook, due.id, of=key)
            assert refused.value.extra["retry_after"] == PAUSES[0], "told no longer than a pause"
        else:
            with sessions.begin() as session:
                assert webhooks.redeliver(session, hook, due.id, of=key).state == "pending"


def test_a_ping_tells_of_nothing_and_cannot_be_used_to_hammer(sessions: Sessions, vault: Vault) -> None:
    key = add_key(sessions)
    hook, _ = add_webhook(sessions, vault, key, URL)
    with sessions.begin() as session:
        first = webhooks.ping(session, hook, of=key)
        assert (first.request_id, first.payload["type"]) == (None, "ping")
    with pytest.raises(Conflict, match="on its way"), sessions.begin() as session:
        webhooks.ping(session, hook, of=key)
    [due] = claim(sessions)
    assert record(sessions, due, Outcome(status=200))
    with sessions.begin() as session:
        webhooks.ping(session, hook, of=key)


def test_the_log_is_paged_and_others_see_none_of_it(sessions: Sessions, vault: Vault) -> None:
    key = add_key(sessions)
    hook, _ = add_webhook(sessions, vault, key, URL)
    for _ in range(3):
        submit(sessions, vault, key)
    with sessions() as session:
        first, cursor = webhooks.list_deliveries(session, hook, of=key, limit=2)
        second, end = webhooks.list_deliveries(session, hook, of=key, limit=2, cursor=cursor)
        assert (len(first), len(second), end) == (2, 1, None)
        assert sorted(row.id for row in [*first, *second]) == [row.id for row in deliveries(sessions)]
        assert webhooks.list_deliveries(session, hook, of=key, limit=2, state="failed") == ([], None)
        with pytest.raises(InvalidInput):
            webhooks.list_deliveries(session, hook, of=key, limit=2, state="lost")
        for of in ("key_other", ""):
            with pytest.raises(NotFound):
                webhooks.list_deliveries(session, hook, of=of, limit=2)
            with pytest.raises(NotFound):
                webhooks.get_webhook(session, hook, of=of)
            assert webhooks.list_webhooks(session, of=of, limit=9) == ([], None)


def test_old_entries_leave_the_log(sessions: Sessions, vault: Vault) -> None:
    key = add_key(sessions)
    add_webhook(sessions, vault, key, URL)
    gone, _ = add_webhook(sessions, vault, key, URL, states=["revoked"])
    for _ in range(2):
        submit(sessions, vault, key)
    [done, _] = claim(sessions)
    assert record(sessions, done, Outcome(status=200))
    with sessions.begin() as session:
        webhooks.disable_webhook(session, gone, of=key, actor=key)
    for days, entries, hooks in ((31, 2, 2), (29, 1, 1)):
        with sessions.begin() as session:
            webhook_queue.clean(session, log_days=days, now=utcnow() + timedelta(days=30))
            assert session.scalar(select(func.count()).select_from(WebhookDelivery)) == entries
            assert session.scalar(select(func.count()).select_from(Webhook)) == hooks
    assert deliveries(sessions)[0].state == "sending"  # what has not ended stays, however old


@pytest.mark.skipif("postgresql" not in database_kinds(), reason="SQLite has one writer, and locks no rows")
def test_cleaning_up_waits_for_no_other_writer(tmp_path: Path, vault: Vault) -> None:
    """Whoever waits while others wait for its rows is half of a deadlock."""
    with fresh_database("postgresql", tmp_path) as url:
        engine = db.make_engine(url)
        sessions = db.make_sessions(engine)
        key = add_key(sessions)
        kept, gone = (add_webhook(sessions, vault, key, URL)[0] for _ in range(2))
        for _ in range(2):
            submit(sessions, vault, key)
        with sessions.begin() as session:
            webhooks.disable_webhook(session, kept, of=key, actor=key)
            webhooks.disable_webhook(session, gone, of=key, actor=key)
        held = deliveries(sessions, kept)[0].id
        later = {"log_days": 1, "now": utcnow() + timedelta(days=2)}
        with sessions.begin() as other:
            other.get_one(WebhookDelivery, held, with_for_update=True)
            other.get_one(Webhook, kept, with_for_update=True)
            with sessions.begin() as session:
                session.execute(text("SET LOCAL lock_timeout = '10s'"))
                webhook_queue.clean(session, **later)
            assert [row.id for row in deliveries(sessions)] == [held], "what nobody holds is gone"
            with sessions() as session:
                assert session.scalars(select(Webhook.id)).all() == [kept]
        with sessions.begin() as session:
            webhook_queue.clean(session, **later)
        assert deliveries(sessions) == []
        engine.dispose()
