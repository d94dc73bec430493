"""Token buckets of one replica, on a clock of the test's own."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from api_kit import Api, assert_problem, running
from hypothesis import example, given
from hypothesis import strategies as st

from app import keys
from app.errors import InvalidInput, RateLimited
from app.rate_limits import RateLimits
from app.settings import Settings


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def limits(clock: Clock, most: int = 100, **values: int) -> RateLimits:
    return RateLimits(Settings(_env_file=None, **values), clock=clock, most=most)


def refusal(take: Callable[..., None], *args: Any) -> dict[str, Any]:
    with pytest.raises(RateLimited) as caught:
        take(*args)
    return caught.value.extra


def test_a_minutes_calls() -> None:
    clock = Clock()
    rates = limits(clock, rate_per_minute=6)
    for _ in range(6):
        rates.take_call("key_a", None)
    assert refusal(rates.take_call, "key_a", None) == {
        "limit": 6,
        "limit_name": "rate_per_minute",
        "retry_after": 10,
    }
    rates.take_call("key_b", None)
    clock.now += 9.5
    assert refusal(rates.take_call, "key_a", None)["retry_after"] == 1
    clock.now += 0.5
    rates.take_call("key_a", None)
    refusal(rates.take_call, "key_a", None)
    clock.now += 3600
    for _ in range(6):  # no more than a minute's worth is saved up
        rates.take_call("key_a", None)
    refusal(rates.take_call, "key_a", None)


def test_texts() -> None:
    clock = Clock()
    rates = limits(clock, classify_texts_per_minute=60)
    rates.take_texts("key_a", None, 50)
    assert refusal(rates.take_texts, "key_a", None, 30)["retry_after"] == 20
    rates.take_texts("key_a", None, 10)  # what was refused took nothing
    with pytest.raises(InvalidInput) as caught:  # waiting would never help
        rates.take_texts("key_b", None, 61)
    assert [(e["field"], e["limit"]) for e in caught.value.extra["errors"]] == [("texts", 60)]
    rates.take_texts("key_b", None, 60)
    rates.take_call("key_a", None)  # another limit, and there is none


def test_a_keys_own_limits_come_first() -> None:
    rates = limits(Clock(), rate_per_minute=1, classify_texts_per_minute=1)
    for _ in range(5):
        rates.take_call("key_a", {"rate_per_minute": 0})
    rates.take_texts("key_a", {"classify_texts_per_minute": 2}, 2)
    refusal(rates.take_texts, "key_a", {"classify_texts_per_minute": 2}, 1)


def test_a_limit_that_is_lowered_holds_at_once() -> None:
    rates = limits(Clock())
    rates.take_call("key_a", {"rate_per_minute": 100})
    rates.take_call("key_a", {"rate_per_minute": 1})
    refusal(rates.take_call, "key_a", {"rate_per_minute": 1})


def test_few_buckets_are_kept() -> None:
    """Those that were used last; and a clock that stands still makes none of them any fuller."""
    rates = limits(Clock(), most=3, rate_per_minute=1)
    for name in ("a", "b", "c"):
        rates.take_call(name, None)
    refusal(rates.take_call, "a", None)  # which makes b the oldest
    rates.take_call("d", None)
    for name in ("a", "c", "d"):
        refusal(rates.take_call, name, None)
    assert len(rates._buckets) == 3
    rates.take_call("b", None)


@given(
    limit=st.integers(1, 50),
    calls=st.lists(st.tuples(st.floats(0, 40), st.integers(1, 60)), max_size=60),
)
@example(limit=1, calls=[(0.2800464363595801, 1), (0.0, 1)])  # the wait rounds to a little less than a token
def test_no_minute_has_more_than_two_allowances(limit: int, calls: list[tuple[float, int]]) -> None:
    """A bucket that is full and then fills: in any minute at most what it held and what came in. Each told wait is
    enough, and none is longer than a minute."""
    clock = Clock()
    rates = limits(clock, classify_texts_per_minute=limit)
    taken: list[tuple[float, int]] = []
    waits: list[int] = []
    too_many: list[int] = []
    for pause, count in calls:
        clock.now += pause
        try:
            rates.take_texts("key_a", None, count)
        except RateLimited as error:
            waits.append(error.extra["retry_after"])
            clock.now += waits[-1]
            rates.take_texts("key_a", None, count)
        except InvalidInput:
            too_many.append(count)
            continue
        taken.append((clock.now, count))
        assert sum(n for at, n in taken if at > clock.now - 60) <= 2 * limit
    assert all(1 <= wait <= 60 for wait in waits)
    assert too_many == [count for _, count in calls if count > limit]


def test_threads_share_a_bucket() -> None:
    rates = limits(Clock(), rate_per_minute=50)
    passed: list[int] = []

    def run() -> None:
        for _ in range(40):
            try:
                rates.take_call("key_a", None)
            except RateLimited:
                continue
            passed.append(1)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(passed) == 50


# --- over HTTP -------------------------------------------------------------------------------------------------------


def with_own(api: Api, limits: dict[str, int], *scopes: str) -> dict[str, str]:
    with api.service.sessions.begin() as session:
        _, plaintext = keys.create_key(session, name="own", scopes=scopes, actor="test", limits=limits)
    return {"Authorization": f"Bearer {plaintext}"}


def test_calls_over_http(tmp_path: Path) -> None:
    with running(f"sqlite:///{tmp_path}/letheon.db", tmp_path, rate_per_minute=4, classify_texts_per_minute=3) as api:
        headers = api.key("requests", "classify", "metrics")
        request_id = api.submit(headers)["id"]  # each call counts once, whether its body is read or not
        assert api.client.post(f"/unlearn-requests/{request_id}/cancel", headers=headers).status_code == 200
        assert api.client.get("/unlearn-requests", headers=headers).status_code == 200
        assert api.client.get("/metrics", headers=headers).status_code == 200
        calls: list[tuple[str, str, Any]] = [
            ("POST", "/unlearn-requests", {"forget_texts": ["a"]}),
            ("POST", f"/unlearn-requests/{request_id}/cancel", None),
            ("GET", f"/unlearn-requests/{request_id}/events", None),
            ("GET", "/unlearn-requests", None),
            ("GET", "/metrics", None),
        ]
        for method, path, body in calls:
            response = api.client.request(method, path, json=body, headers=headers)
            problem = assert_problem(response, 429, "rate-limited")
            assert (problem["limit"], problem["limit_name"]) == (4, "rate_per_minute")
            assert 1 <= int(response.headers["retry-after"]) <= 15
        # No body is read for whoever has had its share, and a key that cannot be opened takes nothing from it.
        malformed = api.client.post("/unlearn-requests", content=b"{", headers=headers)
        assert malformed.status_code == 429
        for _ in range(3):
            assert api.client.post("/classify", json={"text": "good"}, headers=headers).status_code == 200
        response = api.client.post("/classify", json={"texts": ["good"]}, headers=headers)
        assert assert_problem(response, 429, "rate-limited")["limit_name"] == "classify_texts_per_minute"
        response = api.client.post("/classify", json={"texts": ["good"] * 4}, headers=headers)
        assert_problem(response, 422, "invalid-input", field="texts", limit=3)
        for path in ("/livez", "/readyz"):
            assert api.client.get(path).status_code == 200


def test_a_call_that_finds_no_place_uses_up_no_allowance(tmp_path: Path) -> None:
    knobs = {"max_queued_texts": 1, "classify_texts_per_minute": 4}
    with running(f"sqlite:///{tmp_path}/letheon.db", tmp_path, **knobs) as api:
        headers, serving = api.key("classify"), api.service.serving
        ask = partial(api.client.post, "/classify", json={"text": "good"}, headers=headers)
        with serving.place(1, math.inf):
            assert [ask().status_code for _ in range(6)] == [503] * 6
        # Four a minute, whose first was taken a moment ago: the fifth is one too many, unless this takes 15 seconds.
        assert [ask().status_code for _ in range(4)] == [200] * 4
        serving.close()
        assert ask().status_code == 503, "no place is left to ask for"


def test_nobody_uses_up_what_anothers_key_may_ask(tmp_path: Path) -> None:
    with running(f"sqlite:///{tmp_path}/letheon.db", tmp_path, rate_per_minute=1) as api:
        headers = api.key("requests")
        for _ in range(3):
            wrong = {"Authorization": headers["Authorization"][:-43] + "A" * 43}
            assert_problem(api.client.get("/unlearn-requests", headers=wrong), 401, "unauthenticated")
        assert api.client.get("/unlearn-requests", headers=headers).status_code == 200
        generous = with_own(api, {"rate_per_minute": 0}, "requests")
        for _ in range(3):
            assert api.client.get("/unlearn-requests", headers=generous).status_code == 200
