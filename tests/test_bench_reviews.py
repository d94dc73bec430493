"""``bench.reviews``: a category is forgotten, nothing is in two sets, the same seed makes the same files."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import reviews
from models.examples import read_examples

ROWS: list[dict[str, Any]] = [
    {"text": "word " * (1 + i % 9) + str(i), "label": ("positive", "negative")[i % 2], "category": "ABC"[i % 3]}
    for i in range(60)
]


def test_a_category_is_forgotten_and_a_fifth_is_held_out() -> None:
    found = reviews.split(ROWS, "B", max_words=None, seed=0)
    assert {name: len(rows) for name, rows in found.items()} == {
        "test_forget": 4,
        "train_forget": 16,
        "test_retain": 8,
        "train_retain": 32,
    }
    again = [*ROWS, {**ROWS[1], "category": "C"}, {**ROWS[2], "category": "B"}, ROWS[0]]
    repeated = reviews.split(again, "B", max_words=None, seed=0)
    texts = [row["text"] for rows in repeated.values() for row in rows]
    assert len(set(texts)) == len(texts) == 60
    assert sum(len(repeated[f"{side}_forget"]) for side in ("train", "test")) == 21, "a text of two categories goes"
    assert all((row["category"] == "B") == ("forget" in name) for name, rows in found.items() for row in rows)
    texts = [row["text"] for rows in found.values() for row in rows]
    assert len(set(texts)) == len(texts) == 60
    assert reviews.split(ROWS, "B", max_words=None, seed=1) != found
    short = reviews.split(ROWS, "B", max_words=4, seed=0)
    assert {len(row["text"].split()) for rows in short.values() for row in rows} == {2, 3, 4}


def test_the_files_are_what_the_benches_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "reviews.jsonl.gz"
    file.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in ROWS).encode()))
    command = ["reviews", str(file), "--category", "A", "--out"]
    for out in ("once", "twice"):
        monkeypatch.setattr(sys, "argv", [*command, str(tmp_path / out)])
        reviews.main()
    names = sorted(path.name for path in (tmp_path / "once").iterdir())
    assert names == [f"{side}_{kind}.jsonl.gz" for side in ("test", "train") for kind in ("forget", "retain")]
    for name in names:
        assert (tmp_path / "once" / name).read_bytes() == (tmp_path / "twice" / name).read_bytes()
        assert read_examples(str(tmp_path / "once" / name), labels=("negative", "positive"))
    monkeypatch.setattr(sys, "argv", ["reviews", str(file), "--category", "D", "--out", str(tmp_path / "none")])
    with pytest.raises(SystemExit, match="there are A, B, C"):
        reviews.main()
