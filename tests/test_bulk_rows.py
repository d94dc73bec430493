"""Reading rows: every format, every kind of bad row, and files that would not fit."""

from __future__ import annotations

import csv
import gzip
import io
import json
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app import bulk_rows
from app.bulk_rows import ANSWER_FIELDS, MAX_ROW_BYTES, MAX_TEXT_BYTES, Row, RowFormat
from app.bulk_source import open_rows
from app.errors import InvalidInput
from models import examples

MARKER = "Zyxomma Quillfeather"


def read(path: Path, content: bytes, **options: Any) -> list[Row]:
    path.write_bytes(content)
    with open_rows(path, **options) as source:
        return list(source.rows)


def told(rows: list[Row]) -> list[str | None]:
    return [row.text if row.fault is None else row.told() for row in rows]


def test_texts_are_looked_for_where_a_retain_set_has_them() -> None:
    assert bulk_rows.TEXT_FIELDS == examples.TEXT_FIELDS


def test_json_lines(tmp_path: Path) -> None:
    content = (
        b'\xef\xbb\xbf{"text": "a", "id": 1.5, "letheon_label": "old"}\r\n\n"b"\n{"sentence": "c"} \n{"review": "d"}'
    )
    rows = read(tmp_path / "in.jsonl", content)
    assert told(rows) == ["a", "b", "c", "d"]
    assert [row.kept for row in rows] == [{"text": "a", "id": 1.5}, {"text": "b"}, {"sentence": "c"}, {"review": "d"}]
    assert [row.place for row in rows] == ["line 1", "line 3", "line 4", "line 5"]
    assert rows[-1].end == len(content)
    named = read(tmp_path / "in.jsonl", b'{"text": "a", "body": "b"}\n{"text": "c"}\n"d"\n', text_column="body")
    assert told(named) == ["b", "line 2: needs a text in body", "d"]


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        (b"{" + MARKER.encode(), "not JSON"),
        (b'{"text": NaN}', "not JSON"),
        (b'{"text": "a", "x": 1e999}', "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"text": "a", "x": ' + b"[" * 150 + b"]" * 150 + b"}", "is nested more than 100 levels deep"),
        (b"\xff\xfe", "not UTF-8"),
        (b"[1, 2]", "needs a JSON string or an object with a text"),
        (b'{"txt": "a"}', "needs a text in text or sentence or review or content"),
        (b'{"text": null}', "needs a text in text or sentence or review or content"),
        (b'{"text": 7}', "the text must be a string"),
        (b'{"text": " \\n"}', "the text must not be blank"),
        (b'"\\ud800"', "the text must not contain half a surrogate pair"),
        (json.dumps("x" * (MAX_TEXT_BYTES + 1)).encode(), f"has {MAX_TEXT_BYTES + 1} bytes, the limit"),
        (json.dumps("x" * (MAX_ROW_BYTES + 70_000)).encode(), f"over the limit of {MAX_ROW_BYTES} bytes"),
    ],
)
def test_a_bad_json_line_is_a_row_and_the_next_is_read(tmp_path: Path, line: bytes, fault: str) -> None:
    rows = read(tmp_path / "in.jsonl", b'"before"\n' + line + b'\n"behind"\n')
    assert [rows[0].text, rows[2].text, len(rows)] == ["before", "behind", 3]
    assert rows[1].text is None and fault in rows[1].told() and rows[1].told().startswith("line 2: ")
    assert MARKER not in rows[1].told()
    assert not rows[1].broken


def test_plain_lines_and_what_is_told_by_the_first_line(tmp_path: Path) -> None:
    rows = read(tmp_path / "in.txt", b"\n  one \r\n\r\nt\xff\ntwo")
    assert told(rows) == ["one", "line 4: not UTF-8", "two"]
    assert rows[0].kept == {"text": "one"}
    assert told(read(tmp_path / "in", b'\n"a \\"b\\""\n{"text": "c"}\n')) == ['a "b"', "c"]
    assert told(read(tmp_path / "in", b'"Brilliant", she said.\n"second"\n')) == ['"Brilliant", she said.', '"second"']
    assert told(read(tmp_path / "in", b'{"a": 1}\n', form=RowFormat.LINES)) == ['{"a": 1}']


def test_csv(tmp_path: Path) -> None:
    content = (
        b'id,review,letheon_label\r\n1,"two\nlines, ""quoted""",old\r\n\r\n2,short\r\n3,a,b,c\r\n4,\xff,x\r\n5\r\n'
    )
    content += b"6,a\rb,\r\n7,end,"
    path = tmp_path / "in.csv"
    rows = read(path, content)
    assert told(rows) == [
        'two\nlines, "quoted"',
        "short",
        "line 6: has 4 columns, the header 3",
        "line 7: not UTF-8",
        "line 8: the text must not be blank",
        "line 9: a bare carriage return outside quotes",
        "end",
    ]
    assert rows[0].kept == {"id": "1", "review": 'two\nlines, "quoted"'}
    assert rows[3].kept == {"id": "4", "review": "\ufffd"}
    with open_rows(path) as source:
        assert (source.columns, source.size) == (("id", "review"), len(content))
    assert told(read(tmp_path / "in.tsv", b"id\ttext\n1\ta, b\n")) == ["a, b"]
    assert told(read(path, b"\xef\xbb\xbftext\na\n")) == ["a"]
    assert told(read(path, b'text\n"' + b"x" * 200_000 + b'"\nb\n'))[1:] == ["b"]  # csv's own limit is 131,072


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"id,label\n1,2\n", "no column text or sentence or review or content; --text-column"),
        (MARKER.encode() + b",text," + MARKER.encode() + b"\n", "columns 1 and 3 of the header have the same name"),
        (b"text\xff\na\n", "the header is not UTF-8 CSV"),
        ("text\na\n".encode("utf-16"), "is not UTF-8 text"),
        (b"text,a\rb\n", "the header is not UTF-8 CSV"),
        (b'"text\na\n', "a quote is opened and never closed"),
        (b" \n\n", "is empty"),
        (b"", "is empty"),
        (gzip.compress(b"text\n" * 9, mtime=0)[:12], "gzip data is cut short"),
    ],
)
def test_a_csv_file_that_cannot_be_used_is_refused_at_once(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(InvalidInput, match=message) as refused:
        read(tmp_path / "in.csv", content)
    assert MARKER not in refused.value.detail


def test_where_the_file_breaks_off_the_rows_before_it_are_read(tmp_path: Path) -> None:
    rows = read(tmp_path / "in.csv", b'text\na\n"b\nc\n')
    assert told(rows) == ["a", "line 3: a quote is opened and never closed"]
    assert [row.broken for row in rows] == [False, True]
    endless = b'text\na\n"' + (b"b" * 999 + b"\n") * (MAX_ROW_BYTES // 1000 + 9)
    assert told(read(tmp_path / "in.csv", endless))[1] == (
        f"line 3: over the limit of {MAX_ROW_BYTES} bytes; is a quote not closed?"
    )
    content = "".join(f'"text {i}"\n' for i in range(20_000)).encode()
    half = gzip.compress(content, mtime=0)[:-2000]
    *good, last = read(tmp_path / "in.jsonl.gz", half)
    assert 0 < len(good) < 20_000 and all(row.fault is None for row in good)
    assert last.broken and "the gzip data is cut short or damaged" in last.told()


def test_gzip_and_standard_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = b"text\na\nb\n"
    packed = gzip.compress(content, mtime=0)
    path = tmp_path / "in.csv.gz"
    assert told(read(path, packed)) == ["a", "b"]
    with open_rows(path) as source:
        assert source.size == len(packed)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    with open_rows(Path("-"), form=RowFormat.CSV) as source:
        assert (told(list(source.rows)), source.size, source.name) == (["a", "b"], None, "standard input")


def test_rows_are_read_when_they_are_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'"text"\n' * 200_000)
    with open_rows(path) as source:
        first = list(islice(source.rows, 10))
        assert len(first) == 10 and first[-1].end <= 2**17
        assert sum(1 for _ in source.rows) == 199_990


cells = st.text(st.characters(codec="utf-8"), max_size=8) | st.sampled_from(
    ["", '"', "\r", "\n", "a,b", '"\r\n"', "\0"]
)


@settings(deadline=None)
@given(st.lists(st.lists(cells, min_size=3, max_size=3), max_size=6), st.sampled_from([",", "\t"]))
def test_any_csv_table_is_read_as_it_was_written(
    tmp_path_factory: pytest.TempPathFactory, table: list[list[str]], by: str
) -> None:
    written = io.StringIO(newline="")
    csv.writer(written, delimiter=by, quoting=csv.QUOTE_ALL).writerows([["id", "text", "x"], *table])
    form = RowFormat.CSV if by == "," else RowFormat.TSV
    path = tmp_path_factory.getbasetemp() / "table"
    rows = read(path, written.getvalue().encode(), form=form)
    assert [list(row.kept.values()) for row in rows] == table
    assert [row.text for row in rows] == [cell[1] if cell[1].strip() else None for cell in table]
    assert sum(row.size for row in rows) <= len(written.getvalue().encode())


@settings(deadline=None)
@given(st.binary(max_size=60), st.sampled_from([*RowFormat, None]))
def test_any_bytes_are_rows_or_a_refusal(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, form: RowFormat | None
) -> None:
    path = tmp_path_factory.getbasetemp() / "bytes"
    try:
        rows = read(path, b"text\n" + content if form in (RowFormat.CSV, RowFormat.TSV) else content, form=form)
    except InvalidInput:
        return
    for row in rows:
        assert (row.text is None) != (row.fault is None)
        assert not set(row.kept) & set(ANSWER_FIELDS)
        json.dumps(row.kept, allow_nan=False)
        assert row.text is None or row.text.encode()
