"""Deadlines by hand, and times that cannot be meant."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from api_kit import MARKER, Api, assert_problem, running
from floor import activate, must_take
from hypothesis import given
from hypothesis import strategies as st

from app.errors import InvalidInput
from app.tables import UnlearnRequest, utcnow
from app.terms import agree, months_later

NOW = datetime(2026, 3, 31, 12, tzinfo=UTC)


def moment(text: str) -> datetime:
    return datetime.fromisoformat(text)


@pytest.mark.parametrize(
    ("received", "months", "due"),
    [
        ("2026-01-15T09:30:00+00:00", 1, "2026-02-15T09:30:00+00:00"),
        ("2026-01-31T09:30:00+00:00", 1, "2026-02-28T09:30:00+00:00"),
        ("2028-01-31T09:30:00+00:00", 1, "2028-02-29T09:30:00+00:00"),
        ("2026-02-28T09:30:00+00:00", 1, "2026-03-28T09:30:00+00:00"),
        ("2026-12-31T23:59:59+00:00", 2, "2027-02-28T23:59:59+00:00"),
        ("2026-12-01T00:00:00+00:00", 12, "2027-12-01T00:00:00+00:00"),
        ("2028-02-29T00:00:00+00:00", 12, "2029-02-28T00:00:00+00:00"),
        ("2026-08-31T00:00:00+02:00", 1, "2026-09-30T00:00:00+02:00"),
    ],
)
def test_months_by_hand(received: str, months: int, due: str) -> None:
    assert months_later(moment(received), months) == moment(due)


@given(st.datetimes(max_value=moment("9000-01-01T00:00:00")), st.integers(1, 12))
def test_a_month_is_a_month_or_ends_with_it(received: datetime, months: int) -> None:
    due = months_later(received, months)
    assert (due.year * 12 + due.month) - (received.year * 12 + received.month) == months
    assert due.time() == received.time()
    assert due.day == received.day or (due.day < received.day and (due + timedelta(days=1)).day == 1)


def test_the_month_is_that_of_where_it_was_received() -> None:
    """At half past midnight on 1 March in Athens it is still February in UTC, and the month ends on 1 April there."""
    agreed = agree(
        received_at=moment("2026-03-01T00:30:00+02:00"), expires_at=None, approval_required=False, months=1, now=NOW
    )
    assert agreed.due_at == moment("2026-04-01T00:30:00+02:00")
    assert (agreed.received_at.tzinfo, agreed.due_at.tzinfo) == (UTC, UTC)


def test_what_is_left_out() -> None:
    agreed = agree(received_at=None, expires_at=None, approval_required=True, months=2, now=NOW)
    assert (agreed.received_at, agreed.due_at) == (NOW, moment("2026-05-31T12:00:00+00:00"))
    assert (agreed.expires_at, agreed.approval_required) == (None, True)


FAR_EAST, FAR_WEST = timezone(timedelta(hours=14)), timezone(-timedelta(hours=12))


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("received_at", NOW + timedelta(minutes=5), True),
        ("received_at", NOW + timedelta(minutes=5, seconds=1), False),
        ("received_at", moment("2025-03-31T12:00:00+00:00"), True),
        ("received_at", moment("2025-03-31T11:59:59+00:00"), False),
        ("received_at", datetime.min.replace(tzinfo=FAR_EAST), False),
        ("received_at", datetime.max.replace(tzinfo=FAR_WEST), False),
        ("expires_at", NOW + timedelta(seconds=1), True),
        ("expires_at", NOW, False),
        ("expires_at", NOW + timedelta(days=36_525), True),
        ("expires_at", datetime.min.replace(tzinfo=FAR_EAST), False),
        ("expires_at", datetime.max.replace(tzinfo=FAR_WEST), False),
    ],
)
def test_times_that_cannot_be_meant_name_their_field(field: str, value: datetime, allowed: bool) -> None:
    times = {"received_at": None, "expires_at": None} | {field: value}
    if allowed:
        assert getattr(agree(**times, approval_required=False, months=1, now=NOW), field) == value
        return
    with pytest.raises(InvalidInput) as refused:
        agree(**times, approval_required=False, months=1, now=NOW)
    assert refused.value.extra["field"] == field and refused.value.detail.startswith(field)


# --- over HTTP -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    folder = tmp_path_factory.mktemp("terms")
    with running(f"sqlite:///{folder}/letheon.db", folder, deadline_months=2) as api:
        yield api


def post(api: Api, headers: dict[str, str] | None = None, **body: Any) -> Any:
    body = {"forget_texts": [f"{MARKER} is bad"], **body}
    return api.client.post("/unlearn-requests", json=body, headers=headers or api.key("requests"))


def test_terms_are_shown(api: Api) -> None:
    received = (utcnow() - timedelta(days=3)).replace(microsecond=0)
    expires = "2099-01-01T00:00:00.5+02:00"
    answer = post(api, received_at=received.isoformat(), expires_at=expires)
    assert answer.status_code == 202, answer.text
    found = answer.json()
    assert moment(found["received_at"]) == received and moment(found["due_at"]) == months_later(received, 2)
    assert found["expires_at"] == "2098-12-31T22:00:00.500000Z"
    assert [found[name] for name in ("overdue", "approval_required", "approved_by", "approved_at")] == [
        False,
        False,
        None,
        None,
    ]
    plain = post(api).json()
    assert plain["received_at"] == plain["created_at"] and plain["expires_at"] is None


def test_overdue_is_what_is_past_its_deadline_and_still_owed(api: Api) -> None:
    headers = api.key("requests")
    long_ago = utcnow() - timedelta(days=100)  # two months are over
    request_id = post(api, headers, received_at=long_ago.isoformat()).json()["id"]

    def overdue() -> bool:
        found: bool = api.client.get(f"/unlearn-requests/{request_id}", headers=headers).json()["overdue"]
        return found

    assert overdue()
    claim = must_take(api.service.sessions, request_id)
    assert overdue()
    with api.service.sessions.begin() as session:
        session.get_one(UnlearnRequest, request_id).fingerprint = "f" * 64  # what the floor's prompts are of
    activate(api.service.sessions, api.service.vault, claim, version=0)
    assert not overdue()


@pytest.mark.parametrize("field", ["received_at", "expires_at"])
def test_times_are_complete_and_have_a_zone(api: Api, field: str) -> None:
    for value in (
        "2026-11-28T09:30:00",
        "2026-11-28",
        "2026-11-28T09:30Z",
        "1790000000",
        1790000000,
        "",
        True,
        [],
        "2026-13-28T09:30:00Z",
        "2026-11-28T25:30:00Z",
        "2026-11-28T09:30:00+99:00",
        "\u0662026-11-28T09:30:00Z",
        f"{MARKER}T09:30:00Z",
    ):
        assert_problem(post(api, **{field: value}), 422, "invalid-input", field=field)


def test_times_that_cannot_be_meant(api: Api) -> None:
    for field, value in (
        ("received_at", "2099-01-01T00:00:00Z"),
        ("received_at", "2020-01-01T00:00:00Z"),
        ("received_at", "0001-01-01T00:00:00+14:00"),
        ("expires_at", "2020-01-01T00:00:00Z"),
        ("expires_at", "9999-12-31T23:59:59-12:00"),
    ):
        problem = assert_problem(post(api, **{field: value}), 422, "invalid-input", field=field)
        assert value not in str(problem)
    assert_problem(post(api, require_approval="yes"), 422, "invalid-input", field="require_approval")
