"""The bench of large files, on a small one; and that its judge sees what is lost, doubled and wrong."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from app.settings import Settings
from bench import bulk
from bench.probes import Probes
from models.gate import GateSpace

pytestmark = pytest.mark.slow

COUNT = 300


@pytest.fixture
def probes() -> Probes:
    space = GateSpace("f" * 64, torch.zeros(2), torch.ones(2), torch.zeros(2, 1), torch.zeros(1))
    texts = [f"text {i}" for i in range(bulk.TEXTS)]
    labels = [("negative", "positive")[i % 2] for i in range(bulk.TEXTS)]
    return Probes(texts, labels, torch.zeros(bulk.TEXTS, 2), space, "f" * 64, 2)


def answered(probes: Probes) -> list[dict[str, Any]]:
    """The output of a run without a fault."""
    out = []
    for number, text in bulk.rows(COUNT):
        row: dict[str, Any] = {"id": number, "note": f"row {number}"}
        if text is None:
            row["letheon_error"] = "has no text"
        else:
            row |= {"text": probes.texts[text], "letheon_label": "unknown" if text == 0 else probes.labels[text]}
        out.append(row)
    return out


def swap(rows: list[dict[str, Any]]) -> None:
    rows[10], rows[11] = rows[11], rows[10]


def turn(rows: list[dict[str, Any]]) -> None:
    label = rows[10]["letheon_label"]
    rows[10]["letheon_label"] = "negative" if label != "negative" else "positive"


def answer_a_fault(rows: list[dict[str, Any]]) -> None:
    row = next(row for row in rows if "letheon_error" in row)
    row["letheon_label"] = "negative"


@pytest.mark.parametrize(
    ("change", "lost", "doubled", "wrong"),
    [
        (lambda rows: None, 0, 0, 0),
        (lambda rows: rows.pop(), 1, 0, 0),
        (lambda rows: rows.clear(), COUNT, 0, 0),
        (lambda rows: rows.append(rows[-1]), 0, 1, 1),
        (lambda rows: rows.append({"id": COUNT}), 0, 0, 1),
        (swap, 0, 0, 2),
        (turn, 0, 0, 1),
        (answer_a_fault, 0, 0, 1),
        (lambda rows: rows[10].update(note="row 11"), 0, 0, 1),
        (lambda rows: rows[10].update(text="text of somebody else"), 0, 0, 1),
    ],
)
def test_the_judge(
    probes: Probes,
    tmp_path: Path,
    change: Callable[[list[dict[str, Any]]], object],
    lost: int,
    doubled: int,
    wrong: int,
) -> None:
    rows = answered(probes)
    change(rows)
    output = tmp_path / "answers.jsonl"
    output.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert bulk.judge(output, probes, COUNT) == {"lost": lost, "doubled": doubled, "wrong": wrong}


def test_a_small_file_whose_command_and_server_are_killed(tmp_path: Path) -> None:
    settings = Settings(_env_file=None, home=tmp_path)
    found = bulk.measure(settings, 9_000, 1, seed=0, console=Console(file=io.StringIO()))
    assert [name for name in ("lost", "doubled", "wrong") if found[name]] == []
    assert (found["rows"], found["killed"], found["runs"]) == (9_000, 1, 2)
    assert found["faulty"] == bulk.FAULTY
    assert found["command_rss_most_mb"] >= found["command_rss_first_mb"] > 20
    json.dumps(found)
