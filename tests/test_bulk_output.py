"""The output of a bulk run: what is written can be read, and whatever is left of it can be taken up."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app import bulk_output
from app.bulk_output import Answer, Layout, OutputError, Syncer, Tally, append, layout_for, open_output, take_up
from app.bulk_rows import ANSWER_FIELDS, Row, RowFormat
from app.errors import InvalidInput

OPTIONS = {"scores": False}
FORMATS = [RowFormat.JSONL, RowFormat.CSV, RowFormat.TSV]
Work = list[tuple[Row, Answer]]


def row(number: int, kept: dict[str, Any]) -> Row:
    return Row(f"line {number}", "x", None, kept, 1, number)


def answered(number: int, label: str = "positive", version: int = 4) -> dict[str, Any]:
    if label == "":
        return {"letheon_error": f'line {number}: not JSON, "or" so'}
    return {"letheon_label": label, "letheon_abstained": False, "letheon_active_set_version": version}


def work(*texts: str) -> Work:
    return [(row(i, {"text": text}), answered(i)) for i, text in enumerate(texts, start=1)]


@contextmanager
def opened(
    path: Path, layout: Layout, rows: Sequence[Row], *, options: Any = OPTIONS, overwrite: bool = False
) -> Iterator[tuple[BinaryIO, list[Row], Tally, int]]:
    tally = Tally()
    with open_output(path, options, overwrite=overwrite) as file:
        rest, cut = take_up(file, path, layout, iter(rows), tally)
        yield file, list(rest), tally, cut


def complete(path: Path, layout: Layout, done: Work) -> tuple[bytes, Tally, int]:
    """A run over all rows: what the file holds then, what was there already, and what was cut."""
    with opened(path, layout, [row for row, _ in done]) as (file, rest, tally, cut):
        for i in range(len(done) - len(rest), len(done)):
            append(file, path, layout.record(*done[i]))
        Syncer(file, path)(now=True)
    return path.read_bytes(), tally, cut


def layout_of(form: RowFormat, columns: tuple[str, ...] = ("text",)) -> Layout:
    return Layout(form, () if form is RowFormat.JSONL else columns)


# --- records ---------------------------------------------------------------------------------------------------------


def test_json_lines_keep_the_row() -> None:
    layout = Layout(RowFormat.JSONL)
    record = layout.record(row(1, {"text": "é\n", "label": "negative", "x": [1.5, None]}), answered(1))
    assert record.endswith(b"}\n") and "é\\n".encode() in record
    assert json.loads(record) == {"text": "é\n", "label": "negative", "x": [1.5, None], **answered(1)}
    assert json.loads(layout.record(row(1, {"\ud800": "\udfff"}), answered(1)))["\ud800"] == "\udfff"


def test_csv_keeps_the_columns_and_adds_some() -> None:
    layout = Layout(RowFormat.CSV, ("id", "text"), scores=True)
    scored = answered(1) | {"letheon_confidence": 0.75, "letheon_scores": {"positive": 0.75}}
    data = layout.header() + layout.record(row(1, {"text": 'a,"b"\r\nc', "id": 7, "more": 1}), scored)
    data += layout.record(row(2, {"id": [1], "text": None}), answered(2, ""))
    table = list(csv.reader(io.StringIO(data.decode(), newline="")))
    assert table == [
        ["id", "text", *ANSWER_FIELDS],
        ["7", 'a,"b"\r\nc', "positive", "false", "0.75", '{"positive": 0.75}', "4", ""],
        ["[1]", "", "", "", "", "", "", 'line 2: not JSON, "or" so'],
    ]
    assert layout.leaves_out(row(1, {"text": "", "more": 1})) and not layout.leaves_out(row(1, {"id": 1}))


def test_the_name_says_the_format() -> None:
    assert layout_for(Path("a.b/out.JSONL"), ("x",), scores=True) == Layout(RowFormat.JSONL, (), True)
    assert layout_for(Path("out.ndjson"), ("x",), scores=False).format is RowFormat.JSONL
    assert layout_for(Path("out.tsv"), ("x",), scores=False) == Layout(RowFormat.TSV, ("x",))
    for name in ("out", "out.txt", "out.lines", "out.jsonl.gz", ".csv"):
        with pytest.raises(InvalidInput, match=r"must end in \.jsonl"):
            layout_for(Path(name), (), scores=False)


# --- taking up -------------------------------------------------------------------------------------------------------

texts = st.text(max_size=6) | st.sampled_from(["", '"', '""', "\r", "\n", 'a,"\n', "\t", "\0", "é\ud800"])
values = texts | st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
kept_rows = st.lists(st.fixed_dictionaries({"text": texts, "a": values | st.lists(values, max_size=2)}), max_size=5)


@settings(deadline=None)
@given(kept=kept_rows, form=st.sampled_from(FORMATS), data=st.data())
def test_cut_anywhere_and_taken_up_the_bytes_are_the_same(
    tmp_path_factory: pytest.TempPathFactory, kept: list[dict[str, Any]], form: RowFormat, data: st.DataObject
) -> None:
    path = tmp_path_factory.getbasetemp() / f"cut.{form}"
    path.unlink(missing_ok=True)
    layout = layout_of(form, ("text", "a"))
    labels = data.draw(st.lists(st.sampled_from(["positive", "unknown", ""]), min_size=len(kept), max_size=len(kept)))
    done = [(row(i, kept[i]), answered(i, labels[i], version=i)) for i in range(len(kept))]
    whole, _, _ = complete(path, layout, done)
    ends = [len(layout.header())]
    for pair in done:
        ends.append(ends[-1] + len(layout.record(*pair)))
    assert ends[-1] == len(whole)

    size = data.draw(st.integers(0, len(whole)))
    zeros = data.draw(st.integers(0, 9))  # a file that had grown, the blocks of which were not written
    path.write_bytes(whole[:size] + b"\0" * zeros)
    again, tally, cut = complete(path, layout, done)
    assert again == whole
    there = sum(end <= size for end in ends[1:])
    assert tally.rows == there
    assert tally.faults == labels[:there].count("")
    assert tally.versions == {i for i in range(there) if labels[i]}
    assert cut == size + zeros - (ends[there] if size >= ends[0] else 0)


@settings(deadline=None)
@given(kept=kept_rows, form=st.sampled_from(FORMATS), data=st.data())
def test_a_hole_anywhere_is_seen(
    tmp_path_factory: pytest.TempPathFactory, kept: list[dict[str, Any]], form: RowFormat, data: st.DataObject
) -> None:
    """Blocks that never reached the disk before a power cut, in the header, in rows, in answers or over several."""
    path = tmp_path_factory.getbasetemp() / f"hole.{form}"
    path.unlink(missing_ok=True)
    layout = layout_of(form, ("text", "a"))
    done = [(row(i, fields), answered(i, "positive", version=i)) for i, fields in enumerate(kept)]
    whole, _, _ = complete(path, layout, done)
    start = data.draw(st.integers(0, len(whole)))
    end = data.draw(st.integers(start, len(whole)))
    path.write_bytes(whole[:start] + b"\0" * (end - start) + whole[end:])
    again, _, _ = complete(path, layout, done)
    assert again == whole


@pytest.mark.parametrize("form", FORMATS)
def test_a_hole_in_the_middle_is_cut_with_all_behind_it(tmp_path: Path, form: RowFormat) -> None:
    path = tmp_path / f"out.{form}"
    done = work("first text", "second text", "third text", "fourth text")
    whole, _, _ = complete(path, layout_of(form), done)
    path.write_bytes(whole.replace(b"second", b"\0" * 6))
    again, tally, cut = complete(path, layout_of(form), done)
    assert (again, tally.rows) == (whole, 1)
    assert cut > 0


@pytest.mark.parametrize("form", FORMATS)
def test_an_input_may_grow(tmp_path: Path, form: RowFormat) -> None:
    path = tmp_path / f"out.{form}"
    complete(path, layout_of(form), work("a", "b"))
    whole, tally, cut = complete(path, layout_of(form), work("a", "b", "c"))
    assert (tally.rows, cut) == (2, 0)
    assert whole.count(b"positive") == 3


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(("other", "why"), [(("a", "x", "c"), "line 2 differs"), (("a",), "it has more rows")])
def test_another_input_is_refused_and_nothing_is_touched(
    tmp_path: Path, form: RowFormat, other: tuple[str, ...], why: str
) -> None:
    path = tmp_path / f"out.{form}"
    before, _, _ = complete(path, layout_of(form), work("a", "b"))
    with pytest.raises(OutputError, match=why) as refused:
        complete(path, layout_of(form), work(*other))
    assert "--overwrite" in refused.value.detail
    assert path.read_bytes() == before


def test_other_columns_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "out.csv"
    complete(path, layout_of(RowFormat.CSV), work("a"))
    with pytest.raises(OutputError, match="columns differ"):
        complete(path, layout_of(RowFormat.CSV, ("text", "id")), work("a"))


def test_other_options_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    layout = layout_of(RowFormat.JSONL)
    before, _, _ = complete(path, layout, work("a"))
    with pytest.raises(OutputError, match=r"other options \(scores\)"), opened(path, layout, [], options={"scores": 1}):
        pass
    assert path.read_bytes() == before
    with opened(path, layout, [], options={"scores": 1}, overwrite=True):
        pass
    assert path.read_bytes() == b""


def test_a_file_of_somebody_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "out.csv"
    path.write_text("precious\n")
    for sidecar in (None, "no JSON", '{"letheon": "other"}'):
        if sidecar is not None:
            bulk_output.options_file(path).write_text(sidecar)
        with pytest.raises(OutputError, match="is there already"), open_output(path, OPTIONS, overwrite=False):
            pass
    assert path.read_text() == "precious\n"
    path.write_text("")  # an empty one holds nothing that could be mixed
    assert complete(path, layout_of(RowFormat.CSV), work("a"))[0].count(b"\n") == 2


def test_two_runs_do_not_write_to_one_file(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    code = (
        "import sys; from pathlib import Path; from app.bulk_output import OutputError, open_output\n"
        "try:\n    open_output(Path(sys.argv[1]), {'scores': False}, overwrite=True).__enter__()\n"
        "except OutputError as error: print(error.detail)"
    )
    command = [sys.executable, "-c", code, str(path)]
    with opened(path, layout_of(RowFormat.JSONL), []) as (file, *_):
        append(file, path, b"kept")
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent)
        assert "another run is writing" in done.stdout
        assert path.read_bytes() == b"kept"


def test_what_cannot_be_written_is_told(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="no regular file"), open_output(Path("/dev/null"), OPTIONS, overwrite=True):
        pass
    path = tmp_path / "full.jsonl"
    with Path("/dev/full").open("r+b", buffering=0) as full, pytest.raises(OutputError, match=r"full\.jsonl: No space"):
        append(full, path, b"x")


def test_a_record_that_is_written_in_pieces_is_whole() -> None:
    class Slow(io.BytesIO):
        write: Callable[..., int] = lambda self, data: io.BytesIO.write(self, data[:3])

    slow = Slow()
    append(slow, Path("slow"), b"0123456789")
    assert slow.getvalue() == b"0123456789"
