"""A slice of ``bench.fuzz``: the OpenAPI document against the real application, and that what is broken is found."""

from __future__ import annotations

from pathlib import Path

import pytest
from api_kit import tiny_llm

from app import lifecycle
from bench.fuzz import Tally, figures, fuzz


def _ran(tally: Tally) -> dict[str, object]:
    """The bench's figures; a failure shows its first request."""
    assert not tally.errors, tally.errors
    assert not tally.failures, "\n\n".join(f"{key}: {text}" for key, (_, text) in tally.failures.items())
    return figures({"one": tally}, seed=0, seconds=0)


def test_every_answer_is_a_documented_one(database_url: str, tmp_path: Path) -> None:
    tally = fuzz(database_url, tmp_path, tiny_llm(), cases=1, seed=1, phases=["examples", "fuzzing", "stateful"])
    found = _ran(tally)
    assert found["operations"] == len({label for label, _ in tally.statuses})
    statuses = {status for _, status in tally.statuses}
    assert {200, 202, 404, 422} <= statuses and 500 not in statuses
    assert tally.phases["stateful"] > 0


def test_every_limit_of_the_document_is_kept_and_broken(tmp_path: Path) -> None:
    tally = fuzz(f"sqlite:///{tmp_path}/one.db", tmp_path, tiny_llm(), cases=1, seed=1, phases=["coverage"])
    _ran(tally)
    assert tally.phases["coverage"] > 400
    assert {401, 405, 415, 422} <= {status for _, status in tally.statuses}


def test_what_is_broken_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError

    monkeypatch.setattr(lifecycle, "list_requests", broken)
    tally = fuzz(f"sqlite:///{tmp_path}/one.db", tmp_path, tiny_llm(), cases=1, seed=1, phases=["fuzzing"])
    found = figures({"one": tally}, seed=0, seconds=0)
    assert found["server_errors"] and found["schema_mismatches"]
    assert {label for _, _, label, _ in tally.failures} == {"GET /unlearn-requests"}
