"""What was answered in the last minutes, by a clock that the test moves."""

from __future__ import annotations

from app.metrics import Metrics
from app.recent import BUCKET_SECONDS, BUCKETS, Bucket, Recent


def test_stretches_fill_and_pass() -> None:
    now = 1000.0
    recent = Recent(clock=lambda: now)
    assert recent.read() == [Bucket(0, 0)] * BUCKETS
    recent.add(3, 1)
    recent.add(2, 0)
    assert recent.read()[-1] == Bucket(0, 0), "the one that is still running"
    now += BUCKET_SECONDS
    assert recent.read()[-1] == Bucket(5, 1)
    now += 2 * BUCKET_SECONDS
    recent.add(1, 1)
    now += BUCKET_SECONDS
    assert recent.read()[-4:] == [Bucket(5, 1), Bucket(0, 0), Bucket(0, 0), Bucket(1, 1)]
    for _ in range(2 * BUCKETS):
        recent.add(1, 0)
        now += BUCKET_SECONDS
    assert recent.read() == [Bucket(1, 0)] * BUCKETS
    now += BUCKETS * BUCKET_SECONDS
    assert recent.read() == [Bucket(0, 0)] * BUCKETS


def test_metrics_tell_it_how_texts_were_answered() -> None:
    metrics = Metrics()
    seen: list[tuple[int, int]] = []
    metrics.recent.add = lambda texts, unknown: seen.append((texts, unknown))  # type: ignore[method-assign]
    metrics.answers(base=5, claimed=4, prompted_abstained=3, certain=2, guarded=1)
    assert seen == [(15, 6)]
