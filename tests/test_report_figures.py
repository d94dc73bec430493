"""How a report judges figures and deadlines: by hand."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from app import report


def rate(name: str, value: float, rows: int | None) -> dict[str, Any]:
    ends = (
        {"low": None, "high": None} if rows is None else {"low": max(0.0, value - 0.1), "high": min(1.0, value + 0.1)}
    )
    return {"name": name, "rate": value, "rows": rows, "approximate": False, **ends}


def test_limits_are_those_of_the_checks() -> None:
    rates = [
        rate("accuracy of class bad, before, after, before", 0.9, 10),
        rate("accuracy of class bad, before, after, after", 0.79, 10),
        rate("retain_accuracy_before", 0.9, 100),
        rate("retain_accuracy", 0.88, 100),
        rate("neighbour_accuracy_before", 0.5, 4),
        rate("neighbour_accuracy", 0.25, 4),
        rate("total_claim_rate", 0.01, 100),
        rate("forget_abstain", 0.94, 50),
        rate("new_rate", 0.5, None),
    ]
    limits = {"min_forget_abstain": 0.95, "max_retain_drop": 0.02, "max_class_drop": 0.06}
    limits |= {"max_neighbour_drop": 0.1, "max_total_claim_rate": 0.001}
    found = {f["name"]: f for f in report.figures({"rates": rates, "limits": limits})}
    assert list(found)[:2] == ["forget_abstain", "retain_accuracy"] and list(found)[-1] == "new_rate"
    judged = {
        name: (f["limit"] and f["limit"]["rate"], f["limit"] and f["limit"]["at_least"], f["kept"])
        for name, f in found.items()
    }
    assert judged == {
        "forget_abstain": (0.95, True, False),
        "retain_accuracy": (0.88, True, True),  # 0.9 − 0.02, exactly met
        "neighbour_accuracy": (0.25, True, True),  # one answer of four is no evidence
        "total_claim_rate": (0.01, False, True),
        "class bad, before, after": (0.8, True, False),  # 0.9 − 1/10, and it fell by 0.11
        "new_rate": (None, None, None),
    }
    assert found["class bad, before, after"]["before"]["rate"] == 0.9 and found["new_rate"]["words"] == "new_rate"
    assert all(f["limit"] is None for f in report.figures({"rates": rates, "limits": None}))


@pytest.mark.parametrize(("days", "said"), [(0, "less than a day"), (1, "1 day"), (9, "9 days")])
def test_a_deadline_that_was_missed_is_said_so(days: int, said: str) -> None:
    due = datetime(2026, 1, 1, tzinfo=UTC)
    request = {"due_at": due.isoformat(), "active_at": (due + timedelta(days=days, hours=1)).isoformat()}
    assert list(report._deadline(request)) == [f"The deadline, 1 January 2026, 00:00:00 UTC, was missed by {said}."]
