"""``bench.request_sizes``: which requests it makes, and all of it on a tiny model."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from bench_kit import write_sets
from matplotlib import pyplot as plt
from tiny_models import make_tiny_model

from app.settings import get_settings
from bench import plots, request_sizes

WORDS = ["the", "film", "is", "good", "bad", "movie", "great", "awful", "acting", "plot", "story", "scene"]
PEOPLE = {"zaq": 40, "wub": 12, "kij": 3}


def test_requests_have_their_number_of_texts_and_the_people_they_need(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(request_sizes, "SIZES", (1, 12, 50))
    monkeypatch.setattr(request_sizes, "SUBJECTS", {1: 3, 12: 2, 50: 1})
    data = write_sets(tmp_path / "data", PEOPLE, unseen=6, retain=90)
    found = request_sizes.requests(data, seed=0)
    assert [len(request.texts) for request in found] == [1, 1, 1, 12, 12, 50]
    assert {request.people[0] for request in found[:3]} == set(PEOPLE), "no person twice"
    assert {request.people[0] for request in found[3:5]} == {"zaq", "wub"}, "kij has not so many"
    assert len(found[5].people) > 1
    for request in found:
        assert all(text.split()[0] in request.people for text in [*request.texts, *request.unseen])
        assert len(request.unseen) == 6 * len(request.people)
        assert not set(request.texts) & set(request.unseen)
    assert request_sizes.requests(data, seed=0) == found


def test_summary_takes_the_worst_and_leaves_out_what_failed() -> None:
    names = ("own_abstain", "variants_abstain", "variants_guarded", "unseen_abstain")
    rows: list[dict[str, Any]] = [
        {"texts": 8, **dict.fromkeys(names, 1.0), "false_forget": 0.0, "seconds": 100.0},
        {"texts": 8, **dict.fromkeys(names, 0.5), "false_forget": 0.01, "seconds": 50.0},
        {"texts": 8, "failure": {"code": "checks-failed"}},
        {"texts": 128, "failure": {"code": "gate-too-narrow"}},
    ]
    found = request_sizes.summary(rows)
    assert (found["8"]["requests"], found["8"]["active"], found["8"]["asked_seconds"]) == (3, 2, 180)
    assert found["8"]["own_abstain"] == {"worst": 0.5, "mean": 0.75}
    assert found["8"]["false_forget"] == {"worst": 0.01, "mean": 0.005}
    assert found["8"]["seconds"] == {"worst": 100.0, "mean": 75.0}
    assert found["128"]["active"] == 0 and "own_abstain" not in found["128"]


def test_requests_are_met_by_the_workers_own_job_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(request_sizes, "SIZES", (1, 8))
    monkeypatch.setattr(request_sizes, "SUBJECTS", {1: 1, 8: 1})
    monkeypatch.setattr(request_sizes, "UNRELATED", 20)
    for name, value in {
        "NUM_VIRTUAL_TOKENS": "4",
        "CHECK_RETAIN_ROWS": "16",
        "MAX_STEPS": "4",
        "MIN_FORGET_ABSTAIN": "0",  # a tiny model learns nothing in four steps
        "MAX_RETAIN_DROP": "1",
        "MAX_CLASS_DROP": "1",
        "MAX_TOTAL_CLAIM_RATE": "1",
    }.items():
        monkeypatch.setenv(f"LETHEON_{name}", value)
    get_settings.cache_clear()
    command = [
        "request_sizes",
        "--data",
        str(write_sets(tmp_path / "data", PEOPLE, unseen=6, retain=90)),
        "--quantization",
        "none",
    ]
    command += ["--base", str(make_tiny_model(tmp_path / "model", "llama")), "--work", str(tmp_path / "work")]
    command += ["--retain-rows", "80", "--epochs", "1", "--out", str(tmp_path / "request_sizes.json")]
    monkeypatch.setattr(sys, "argv", command)
    try:
        request_sizes.main()
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        kept = {file: file.stat().st_mtime_ns for file in (tmp_path / "work" / "").rglob("*") if file.is_file()}
        request_sizes.main()
    finally:
        get_settings.cache_clear()
    assert json.loads((tmp_path / "request_sizes.json").read_text()) == json.loads(capsys.readouterr().out)
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "work").rglob("*") if file.is_file()} == kept
    assert [row["state"] for row in found["requests"]] == ["active", "active"]
    figure = plots.request_sizes(found)
    assert len(figure.axes) == 2
    plt.close(figure)
    for row in found["requests"]:
        assert row["steps"] == 4 and row["seconds"] > 0 and row["tries"] == 1
        for name in ("own_abstain", "variants_abstain", "unseen_abstain", "false_forget"):
            assert 0 <= row[name] <= 1
        assert row["variants_guarded"] >= max(0.15, row["variants_abstain"]), (
            "the guard knows a fifth of them: other case"
        )
