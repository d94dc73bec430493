"""How a report judges figures and deadlines: by hand."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from app import receipts, report, report_view
from app.console import words
from app.errors import ModeMismatch

ROOT = Path(__file__).resolve().parent.parent


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


# --- words for whatever may be stored --------------------------------------------------------------------------------


def test_every_figure_and_count_of_a_receipt_has_words() -> None:
    rates = {name.removesuffix("_before") for name in receipts._RATES}
    assert {*rates, *report.AREAS} == set(report.FIGURES)
    assert set(receipts._COUNTS) == set(report_view._COUNTS)


def sources(*folders: str) -> Iterator[tuple[Path, ast.Module]]:
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield path.relative_to(ROOT), ast.parse(path.read_text(encoding="utf-8"))


def stored_codes() -> Iterator[tuple[Path, ast.expr, ast.Module]]:
    """Where a failure gets its code: what ``JobFailed``, its kinds, ``fail`` and ``end_failed`` are called with."""
    for path, tree in sources("app", "worker"):
        kinds = [c for c in ast.walk(tree) if isinstance(c, ast.ClassDef) and "JobFailed" in map(ast.unparse, c.bases)]
        own = [call for kind in kinds for call in ast.walk(kind) if isinstance(call, ast.Call)]
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            name = ast.unparse(call.func).rpartition(".")[2]
            if name == "JobFailed" or (name == "__init__" and call in own):
                yield path, call.args[0], tree
            elif name in ("end_failed", "fail"):
                yield from ((path, one.value, tree) for one in call.keywords if one.arg == "code")


def test_every_code_that_a_failure_may_have_has_words() -> None:
    codes, handed_on = {ModeMismatch.code}, set()
    for path, value, tree in stored_codes():
        constants = {
            target.id: node.value
            for node in tree.body
            if isinstance(node, ast.Assign)
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        value = constants.get(value.id, value) if isinstance(value, ast.Name) else value
        if isinstance(value, ast.Constant):
            codes.add(value.value)
        else:
            handed_on.add((str(path), ast.unparse(value)))
    # The last is a ModeMismatch's; the others come from calls that are in sight.
    assert handed_on == {
        ("app/lifecycle.py", "code"),
        ("worker/job.py", "failure.code"),
        ("worker/job.py", "error.code"),
    }
    assert {"expired", "key-destroyed", "internal", "checks-failed", "rejected"} <= codes
    assert codes == set(report.FAILURES)


def test_every_action_and_revocation_has_words() -> None:
    text = "".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "app").rglob("*.py")))
    actions = set(re.findall(r'action="([a-z_.]+)"', text))
    assert len(actions) > 10 and actions <= set(words.ACTIONS)
    assert {f"request.{state}" for state in words.EXPLAINED} - {"request.pending"} <= set(words.ACTIONS)
    assert {"expired", "reconciled", *words.REVOKE_CODES} == set(words.REVOKED_BECAUSE)
    about_requests = {name for name in words.ACTIONS if name.startswith(("request.", "prompt."))}
    assert about_requests == set(report.ACTIONS)
