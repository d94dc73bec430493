from __future__ import annotations

import csv
import gzip
import json
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from models.errors import DatasetError
from models.examples import Example, collate, digest_examples, length_buckets, read_examples

LABELS = ("negative", "positive")
ROWS = [
    {"text": 'a "quoted", film\nin two lines', "label": "positive"},
    {"text": "schlecht, aber schön", "label": "negative"},
]
WANTED = [Example(r["text"], r["label"]) for r in ROWS]


def _write(path: Path, kind: str) -> Path:
    path = path / f"rows.{kind}"
    if kind.startswith("jsonl"):
        data = "".join(json.dumps(r) + "\n" for r in ROWS).encode()
        path.write_bytes(gzip.compress(data) if kind.endswith("gz") else data)
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    else:
        with path.open("w", newline="", encoding="utf-8") as handle:
            writer = csv.DictWriter(handle, ["text", "label"], delimiter="," if kind == "csv" else "\t")
            writer.writeheader()
            writer.writerows(ROWS)
    return path


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "csv", "tsv", "parquet"])
def test_every_format_reads_the_same(tmp_path: Path, kind: str) -> None:
    assert read_examples(str(_write(tmp_path, kind)), labels=LABELS) == WANTED


def test_labels_may_be_indices_words_or_absent(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"sentence": "a", "label": 1}\n{"sentence": "b", "label": "0"}\n{"sentence": "c"}\n\n')
    assert [e.label for e in read_examples(str(path), labels=LABELS)] == ["positive", "negative", None]


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("", "no rows"),
        ("not json\n", "line 1: not JSON"),
        ("[1]\n", "line 1: not a JSON object"),
        ('{"text": "a"}\n{"text": "  "}\n', "row 2: needs a non-empty text"),
        ('{"text": 3}\n', "row 1: needs a non-empty text"),
        ('{"text": "a", "label": "great"}\n', "row 1: label is none of"),
        ('{"text": "a", "label": 2}\n', "row 1: label is none of"),
        ('{"text": "a", "label": true}\n', "row 1: label is none of"),
    ],
)
def test_bad_files_say_where(tmp_path: Path, content: str, match: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(content)
    with pytest.raises(DatasetError, match=match):
        read_examples(str(path), labels=LABELS)


def test_errors_do_not_quote_texts(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "MARKER-42", "label": "MARKER-43"}\n')
    with pytest.raises(DatasetError) as caught:
        read_examples(str(path), labels=LABELS)
    assert "MARKER" not in str(caught.value)
    assert "MARKER" not in repr(Example("MARKER-42"))


def test_missing_file_and_unknown_format(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="no such file"):
        read_examples(str(tmp_path / "none.jsonl"), labels=LABELS)
    (tmp_path / "x.docx").write_text("hi")
    with pytest.raises(DatasetError, match="unknown format"):
        read_examples(str(tmp_path / "x.docx"), labels=LABELS)
    (tmp_path / "latin.csv").write_bytes("text,label\ncaf\xe9,positive\n".encode("latin-1"))
    with pytest.raises(DatasetError, match="not UTF-8"):
        read_examples(str(tmp_path / "latin.csv"), labels=LABELS)


def test_what_is_no_file_of_its_kind_is_refused(tmp_path: Path) -> None:
    whole = gzip.compress(b'{"text": "MARKER-42"}\n' * 99, mtime=0)
    damaged = bytearray(whole)
    damaged[12:20] = b"\xff" * 8
    broken = {
        "half.jsonl.gz": whole[: len(whole) // 2],
        "damaged.jsonl.gz": bytes(damaged),
        "no.parquet": b"MARKER-42",
        "wide.csv": b"text\n" + b"MARKER-42 " * 20_000,
    }
    for name, data in broken.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "folder.csv").mkdir()
    csv.field_size_limit(2**30)  # as another reader of this process may have left it
    for name in [*broken, "folder.csv"]:
        with pytest.raises(DatasetError, match=name) as caught:
            read_examples(str(tmp_path / name), labels=LABELS)
        assert "MARKER" not in str(caught.value)
        assert caught.value.__cause__ is None


@given(st.lists(st.integers(1, 60), min_size=1, max_size=80), st.integers(1, 16), st.booleans())
def test_buckets_partition_the_indices(lengths: list[int], size: int, seeded: bool) -> None:
    generator = torch.Generator().manual_seed(3) if seeded else None
    buckets = length_buckets(lengths, size, generator)
    assert sorted(i for b in buckets for i in b) == list(range(len(lengths)))
    assert all(1 <= len(b) <= size for b in buckets)
    for left, right in pairwise(buckets):  # jitter is below three tokens
        assert max(lengths[i] for i in left) <= min(lengths[i] for i in right) + 3


@given(st.lists(st.lists(st.integers(1, 99), min_size=1, max_size=9), min_size=1, max_size=9))
def test_collate_pads_on_the_right(rows: list[list[int]]) -> None:
    batch = collate(rows)
    for i, row in enumerate(rows):
        assert batch.input_ids[i, : len(row)].tolist() == row
        assert not batch.input_ids[i, len(row) :].any()
    assert batch.lengths.tolist() == [len(r) for r in rows]


def test_digest_depends_on_texts_labels_and_order() -> None:
    a, b = Example("a", "positive"), Example("b")
    assert len({digest_examples(x) for x in ([a, b], [b, a], [a], [Example("a"), b])}) == 4
