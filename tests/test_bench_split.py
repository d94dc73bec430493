"""``bench.split``: what is asked is forgotten, nothing is in two sets, the same seed makes the same files."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import split
from models.examples import Example, read_examples

ROWS: list[dict[str, Any]] = [
    {"text": "word " * (1 + i % 9) + str(i), "label": ("positive", "negative")[i % 2], "category": "ABC"[i % 3]}
    for i in range(60)
]
MARKED = [(Example(row["text"], row["label"]), row["category"] == "B") for row in ROWS]


def test_what_is_marked_is_forgotten_and_a_fifth_is_held_out() -> None:
    found = split.split(MARKED, max_words=None, seed=0)
    assert {name: len(rows) for name, rows in found.items()} == {
        "test_forget": 4,
        "train_forget": 16,
        "test_retain": 8,
        "train_retain": 32,
    }
    again = [*MARKED, (MARKED[1][0], False), (MARKED[2][0], True), MARKED[0]]
    repeated = split.split(again, max_words=None, seed=0)
    texts = [row.text for rows in repeated.values() for row in rows]
    assert len(set(texts)) == len(texts) == 60
    assert sum(len(repeated[f"{side}_forget"]) for side in ("train", "test")) == 21, "a text that is both goes"
    marked = {row.text for row, forget in MARKED if forget}
    assert all((row.text in marked) == ("forget" in name) for name, rows in found.items() for row in rows)
    assert len({row.text for rows in found.values() for row in rows}) == 60
    assert split.split(MARKED, max_words=None, seed=1) != found
    short = split.split(MARKED, max_words=4, seed=0)
    assert {len(row.text.split()) for rows in short.values() for row in rows} == {2, 3, 4}


def test_the_files_are_what_the_benches_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "reviews.jsonl.gz"
    file.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in ROWS).encode()))

    def run(*options: str) -> None:
        monkeypatch.setattr(sys, "argv", ["split", str(file), *options])
        split.main()

    for out in ("once", "twice"):
        run("--category", "A", "--out", str(tmp_path / out))
    names = sorted(path.name for path in (tmp_path / "once").iterdir())
    assert names == [f"{side}_{kind}.jsonl.gz" for side in ("test", "train") for kind in ("forget", "retain")]
    for name in names:
        assert (tmp_path / "once" / name).read_bytes() == (tmp_path / "twice" / name).read_bytes()
        assert read_examples(str(tmp_path / "once" / name), labels=("negative", "positive"))
    run("--matching", r"WORD 1\d$", "--out", str(tmp_path / "matching"))
    forget = [
        row
        for side in ("train", "test")
        for row in read_examples(str(tmp_path / "matching" / f"{side}_forget.jsonl.gz"), labels=split.LABELS)
    ]
    assert sorted(row.text for row in forget) == sorted(row["text"] for row in ROWS[10:20])
    for options, said in (
        (("--category", "D"), "of category there are A, B, C"),
        (("--matching", "nowhere"), "no row to forget"),
        (("--matching", "("), "--matching: "),
        (("--matching", "word 17$"), "too few rows"),
        (("--matching", "."), "too few rows"),
    ):
        with pytest.raises(SystemExit, match=said):
            run(*options, "--out", str(tmp_path / "none"))
    numbered = "".join(json.dumps({**row, "category": i % 3}) + "\n" for i, row in enumerate(ROWS))
    file.write_bytes(gzip.compress(numbered.encode()))
    run("--category", "0", "--out", str(tmp_path / "numbered"))
    assert len(read_examples(str(tmp_path / "numbered" / "train_forget.jsonl.gz"), labels=split.LABELS)) == 16
    file.write_bytes(gzip.compress(b'{"text": "x", "label": "odd"}'))
    with pytest.raises(SystemExit, match="row 1: label is none of"):
        run("--category", "A", "--out", str(tmp_path / "none"))
