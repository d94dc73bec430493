"""``letheon classify --file … --output …`` against the real application, and through everything that interrupts it."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import pty
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from api_kit import MARKER, add_prompt, listening, new_key, soft_prompt, wait_until
from click.testing import Result
from fastapi import FastAPI
from typer.testing import CliRunner
from worker_kit import PYTHONPATH

from app import cli
from app.settings import Mode, get_settings
from letheon_client import Letheon

pytestmark = pytest.mark.slow

LETHEON = [sys.executable, "-m", "app.cli"]


def classify(*arguments: str | Path, given: str | bytes | None = None) -> Result:
    return CliRunner().invoke(cli.app, ["classify", *map(str, arguments)], input=given)


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": PYTHONPATH}


def start(*arguments: str | Path, **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*LETHEON, "classify", *map(str, arguments)],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def finish(process: subprocess.Popen[str], status: int = 0) -> str:
    out, err = process.communicate(timeout=120)
    assert process.returncode == status, err
    assert "Traceback" not in err
    return out + err


def error_line(result: Result) -> str:
    assert result.exit_code == 1, (result.stdout, result.stderr, result.exception)
    assert "Traceback" not in result.stderr
    line = result.stderr.splitlines()[-1]
    assert line.startswith("error: ")
    return line


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("DATABASE_URL", "BROKER_URL", "LETHEON_URL", "LETHEON_API_KEY"):
        monkeypatch.setenv(name, "")  # so that it is absent again behind a test that sets it
        monkeypatch.delenv(name)
    monkeypatch.setenv("LETHEON_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    get_settings.cache_clear()
    yield
    get_settings.cache_clear()


@dataclass
class Live:
    """A running server, and this shell set up to talk to it."""

    url: str
    app: FastAPI
    stop: Callable[[], None]

    def use(self, *scopes: str) -> None:
        os.environ["LETHEON_API_KEY"] = new_key(self.app.state.service, *scopes)["Authorization"].removeprefix(
            "Bearer "
        )


@contextmanager
def serving(tmp_path: Path, **changes: Any) -> Iterator[Live]:
    database = f"sqlite:///{tmp_path / 'server.db'}"
    values = {"mode": Mode.CONCATENATE, "max_classify_texts": 64, "max_body_bytes": 200_000, **changes}
    with listening(database, tmp_path / "server", **values) as (url, app, stop):
        live = Live(url, app, stop)
        os.environ["LETHEON_URL"] = url
        live.use()
        yield live


@pytest.fixture
def live(tmp_path: Path, own_home: None) -> Iterator[Live]:
    with serving(tmp_path) as live:
        yield live


def write_jsonl(path: Path, rows: int) -> Path:
    path.write_text("".join(json.dumps({"id": i, "text": f"the film number {i} is good"}) + "\n" for i in range(rows)))
    return path


def write_csv(path: Path, rows: int) -> Path:
    path.write_text("id,text\n" + "".join(f'{i},"film number {i},\nsaid ""good"""\n' for i in range(rows)))
    return path


# --- what comes out --------------------------------------------------------------------------------------------------


def test_every_row_comes_out_with_its_answer(live: Live, tmp_path: Path) -> None:
    source, out = write_jsonl(tmp_path / "in.jsonl", 150), tmp_path / "out.jsonl"
    result = classify("--file", source, "--output", out)
    assert result.exit_code == 0, result.stderr
    assert (result.stdout, result.stderr) == ("", f"150 rows in {out}; active set 0\n")
    found = records(out)
    assert [row["id"] for row in found] == list(range(150))
    with Letheon(live.url, os.environ["LETHEON_API_KEY"]) as client:
        for row in found[::15]:
            (expected,) = client.classify([row["text"]])["results"]
            assert (row["letheon_label"], row["letheon_abstained"]) == (expected["label"], expected["abstained"])
    assert {row["letheon_active_set_version"] for row in found} == {0}
    assert set(found[0]) == {"id", "text", "letheon_label", "letheon_abstained", "letheon_active_set_version"}
    assert sorted(path.name for path in tmp_path.glob("out*")) == ["out.jsonl", "out.jsonl.run.json"]
    assert "film" not in (tmp_path / "out.jsonl.run.json").read_text()


def test_bad_rows_have_a_reason_and_do_not_stop_the_others(live: Live, tmp_path: Path) -> None:
    source, out = tmp_path / "in.csv", tmp_path / "out.csv"
    long = f"{MARKER} " * 60
    rows = [("a good film",), (" ",), (long,), ("a bad film",), ("x", "y"), ("the end",)]
    source.write_text("review\n" + "".join(",".join(row) + "\n" for row in rows))
    result = classify("--file", source, "--output", out, "--scores")
    assert result.exit_code == 3, result.stderr
    assert "6 rows" in result.stderr and "3 of them not classified" in result.stderr
    assert MARKER not in result.stdout + result.stderr
    found = list(csv.DictReader(io.StringIO(out.read_text())))
    assert [row["review"] for row in found] == ["a good film", " ", long, "a bad film", "x", "the end"]
    assert [bool(row["letheon_label"]) for row in found] == [True, False, False, True, False, True]
    assert found[1]["letheon_error"] == "line 3: the text must not be blank"
    assert found[2]["letheon_error"].startswith("line 4: the text has ")
    assert found[2]["letheon_error"].endswith(" tokens, the limit is 64")
    assert found[4]["letheon_error"] == "line 6: has 2 columns, the header 1"
    assert MARKER not in found[2]["letheon_error"]
    scores = json.loads(found[0]["letheon_scores"])
    assert scores[found[0]["letheon_label"]] == float(found[0]["letheon_confidence"])
    assert out.read_bytes() == (again := out.read_bytes())
    assert classify("--file", source, "--output", out, "--scores").exit_code == 3  # nothing left to do: said again
    assert out.read_bytes() == again


def test_strict_stops_at_the_first_bad_row(live: Live, tmp_path: Path) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('"a"\n"b"\n' + json.dumps(MARKER * 60) + '\n"d"\n')
    line = error_line(result := classify("--file", source, "--output", out, "--strict"))
    assert "in.jsonl, line 3: the text has" in line and MARKER not in result.stderr
    assert len(records(out)) == 2
    assert classify("--file", source, "--output", out).exit_code == 3
    assert len(records(out)) == 4
    assert "line 3: the text has" in error_line(classify("--file", source, "--output", out, "--strict"))


def test_formats_may_differ(live: Live, tmp_path: Path) -> None:
    packed = tmp_path / "in.tsv.gz"
    packed.write_bytes(gzip.compress(b"body\tn\nthe film\t1\nthe plot\t2\n"))
    assert classify("-f", packed, "-o", tmp_path / "a.jsonl", "--text-column", "body").exit_code == 0
    assert [(row["body"], row["n"]) for row in records(tmp_path / "a.jsonl")] == [("the film", "1"), ("the plot", "2")]
    rows = [{"text": "the film", "n": 1}, *[{"text": "a scene", "m": None}] * 99, {"text": "the plot", "late": 2}]
    given = "".join(json.dumps(row) + "\n" for row in rows)
    result = classify("-f", "-", "-o", tmp_path / "b.csv", given=given)
    assert result.exit_code == 0, result.stderr
    assert "1 rows had fields that the first 100 have not" in result.stderr
    table = list(csv.reader(io.StringIO((tmp_path / "b.csv").read_text())))
    assert table[0][:4] == ["text", "n", "m", "letheon_label"]
    assert [row[:3] for row in (table[1], table[-1])] == [["the film", "1", ""], ["the plot", "", ""]]
    # An output is an input: what an earlier run said gives way.
    assert classify("-f", tmp_path / "b.csv", "-o", tmp_path / "c.csv").exit_code == 0
    assert (tmp_path / "c.csv").read_text() == (tmp_path / "b.csv").read_text()


def test_the_limits_of_the_server_are_kept(tmp_path: Path) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps({"text": f"film {i}" + " good" * (i % 7 * 8)}) + "\n" for i in range(200)))
    with serving(tmp_path, max_classify_texts=9, max_body_bytes=1024):
        result = classify("--file", source, "--output", out, "--batch", "256", "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout) == {"output": str(out), "rows": 200, "errors": 0, "active_set_versions": [0]}
    assert [row["text"] for row in records(out)] == [row["text"] for row in records(source)]


def test_each_row_names_the_active_set_that_answered(live: Live, tmp_path: Path) -> None:
    source, out = write_jsonl(tmp_path / "in.jsonl", 20), tmp_path / "out.jsonl"
    assert classify("--file", source, "--output", out).exit_code == 0
    add_prompt(live.app.state.service, soft_prompt(1))
    write_jsonl(source, 30)
    result = classify("--file", source, "--output", out)
    assert result.exit_code == 0, result.stderr
    assert f"{out} has 20 rows: going on behind them" in result.stderr
    assert "the active set changed meanwhile: versions 0, 1" in result.stderr
    assert [row["letheon_active_set_version"] for row in records(out)] == [0] * 20 + [1] * 10


def test_without_output_it_is_a_table_of_few(live: Live, tmp_path: Path) -> None:
    small = tmp_path / "in.csv.gz"
    small.write_bytes(gzip.compress(b"text,n\nthe good film,1\n"))
    assert "the good film" in classify("--file", small).stdout
    document = json.loads(classify("--file", "-", "--format", "csv", "--json", given="text\na\nb\n").stdout)
    assert len(document["results"]) == 2
    large = write_jsonl(tmp_path / "large.jsonl", 1001)
    for arguments in ((), ("--json",)):
        assert "more than 1000 rows: name a file with --output" in error_line(classify("--file", large, *arguments))
    result = classify("--file", large, "--output", "-")
    assert result.exit_code == 0, result.stderr
    assert [json.loads(line)["id"] for line in result.stdout.splitlines()] == list(range(1001))
    bad = tmp_path / "bad.jsonl"
    bad.write_text('"a"\n{' + MARKER)
    line = error_line(classify("--file", bad))
    assert "bad.jsonl, line 2: not JSON" in line and MARKER not in line


def test_a_reader_that_leaves_ends_it_quietly(live: Live, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", 3000)
    process = start("--file", source, "--output", "-")
    assert process.stdout is not None and process.stderr is not None
    assert json.loads(process.stdout.readline())["id"] == 0
    process.stdout.close()
    assert process.wait(60) == 1
    assert "Traceback" not in process.stderr.read()
    process.stderr.close()


# --- what is refused -------------------------------------------------------------------------------------------------


def test_what_cannot_go_together_is_told(live: Live, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", 3)
    out = tmp_path / "out.jsonl"
    assert "goes with --file" in error_line(classify("a text", "--output", out))
    assert "goes with --file" in error_line(classify("a text", "--file", source, "--output", out))
    for options in (("--strict",), ("--overwrite",), ("--batch", "3"), ("--patience", "0"), ("--concurrency", "2")):
        assert "go with --output" in error_line(classify("--file", source, *options))
    assert "must end in .jsonl" in error_line(classify("--file", source, "--output", "out.txt"))
    assert "no --json" in error_line(classify("--file", source, "--output", "-", "--json"))
    before = source.read_bytes()
    assert "the input itself" in error_line(classify("--file", source, "--output", source, "--overwrite"))
    assert source.read_bytes() == before
    out.write_text("precious")
    assert "is there already" in error_line(classify("--file", source, "--output", out))
    assert out.read_text() == "precious"
    assert classify("--file", source, "--output", out, "--overwrite").exit_code == 0
    assert "other options (scores)" in error_line(classify("--file", source, "--output", out, "--scores"))
    write_jsonl(source, 2)
    assert "it has more rows" in error_line(classify("--file", source, "--output", out))
    assert "is empty" in error_line(classify("--file", "-", "--output", tmp_path / "new.csv", given="\n"))
    assert not (tmp_path / "new.csv").exists()


def test_a_wrong_or_weak_key_stops_it_at_once(live: Live, tmp_path: Path) -> None:
    source, out = write_jsonl(tmp_path / "in.jsonl", 3000), tmp_path / "out.jsonl"
    live.use("classify")
    assert "forbidden (403)" in error_line(classify("--file", source, "--output", out, "--scores"))
    os.environ["LETHEON_API_KEY"] = "lth_wrong"
    assert "LETHEON_API_KEY" in error_line(classify("--file", source, "--output", out, "--overwrite"))
    assert out.read_bytes() == b""


def test_a_version_that_the_server_has_not_is_waited_for(live: Live, tmp_path: Path) -> None:
    source, out = write_jsonl(tmp_path / "in.jsonl", 3), tmp_path / "out.jsonl"
    line = error_line(classify("--file", source, "--output", out, "--min-version", "1", "--patience", "0.1"))
    assert "(503)" in line and "below min_version" in line
    assert out.read_bytes() == b""
    process = start("--file", source, "--output", out, "--min-version", "1")
    assert process.stderr is not None and "waiting: " in process.stderr.readline()
    add_prompt(live.app.state.service, soft_prompt(1))
    assert "active set 1" in finish(process)
    assert {row["letheon_active_set_version"] for row in records(out)} == {1}
    assert "other options (min_version)" in error_line(classify("--file", source, "--output", out))


# --- interruptions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["in.jsonl", "in.csv"])
def test_killed_again_and_again_the_output_is_the_same(live: Live, tmp_path: Path, name: str) -> None:
    source = (write_csv if name.endswith("csv") else write_jsonl)(tmp_path / name, 3000)
    whole, out = tmp_path / f"whole-{name}", tmp_path / f"out-{name}"
    finish(start("--file", source, "--output", whole))
    full = whole.stat().st_size

    for part in (0.05, 0.3, 0.5):
        process = start("--file", source, "--output", out)
        wait_until(lambda part=part: out.exists() and out.stat().st_size > part * full, 60)  # type: ignore[misc]
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL, "it was done before it was killed"
        with out.open("r+b") as file:  # a kill falls between two writes; power cuts do not
            file.truncate(max(out.stat().st_size - 7, 0))
    assert out.stat().st_size < full
    told = finish(start("--file", source, "--output", out))
    assert "torn or damaged bytes" in told and "3,000 rows" in told
    assert out.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize(
    ("given", "advice"),
    [
        ((), "the same command again goes on"),
        (("--overwrite",), "the same command again without --overwrite goes on"),  # with it all would be done twice
    ],
)
def test_ctrl_c_says_how_to_go_on(live: Live, tmp_path: Path, given: tuple[str, ...], advice: str) -> None:
    source, out = write_jsonl(tmp_path / "in.jsonl", 3000), tmp_path / "out.jsonl"
    process = start("--file", source, "--output", out, *given)
    wait_until(lambda: out.exists() and out.stat().st_size > 0, 60)
    process.send_signal(signal.SIGINT)
    assert advice in finish(process, 130)
    done = len(records(out))
    assert 0 < done < 3000
    assert f"has {done:,} rows: going on" in finish(start("--file", source, "--output", out))
    assert [row["id"] for row in records(out)] == list(range(3000))


def test_ctrl_c_does_not_wait_for_a_silent_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", 10)
    asked = threading.Event()
    leave = threading.Event()

    class Silent(Answering):
        def do_POST(self) -> None:
            asked.set()
            leave.wait(600)

    with target(Silent) as url:
        monkeypatch.setenv("LETHEON_URL", url)
        process = start("--file", source, "--output", tmp_path / "out.jsonl")
        assert asked.wait(120)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=120)
        assert process.returncode == 130
        leave.set()


def test_a_server_that_goes_away_and_comes_back_is_waited_for(tmp_path: Path) -> None:
    source, out = write_jsonl(tmp_path / "in.jsonl", 3000), tmp_path / "out.jsonl"
    with serving(tmp_path) as live:
        process = start("--file", source, "--output", out)
        wait_until(lambda: out.exists() and out.stat().st_size > 0, 60)
        live.stop()
    done = out.stat().st_size
    time.sleep(1.0)
    assert process.poll() is None
    key = os.environ["LETHEON_API_KEY"]
    with serving(tmp_path, port=int(live.url.rsplit(":", 1)[1])):
        told = finish(process)
        assert "waiting: " in told and "no server answers" in told
        assert done < out.stat().st_size
        assert [row["id"] for row in records(out)] == list(range(3000))
        os.environ["LETHEON_API_KEY"] = key


def test_a_full_server_is_waited_for(tmp_path: Path) -> None:
    source, out = write_jsonl(tmp_path / "in.jsonl", 600), tmp_path / "out.jsonl"
    with serving(tmp_path, max_queued_texts=32):
        process = start("--file", source, "--output", out, "--batch", "32", "--concurrency", "6")
        assert "waiting: overloaded (503)" in finish(process)
    assert [row["id"] for row in records(out)] == list(range(600))


def test_a_full_disk_is_told_and_taken_up(live: Live, tmp_path: Path) -> None:
    source, out, whole = write_jsonl(tmp_path / "in.jsonl", 500), tmp_path / "out.jsonl", tmp_path / "whole.jsonl"
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_001, 20_001))  # noqa: E731
    told = finish(start("--file", source, "--output", out, preexec_fn=limit), 1)
    assert "out.jsonl: File too large" in told
    assert out.stat().st_size == 20_001
    finish(start("--file", source, "--output", out))
    finish(start("--file", source, "--output", whole))
    assert out.read_bytes() == whole.read_bytes()


# --- bar and memory --------------------------------------------------------------------------------------------------


def test_there_is_a_bar_on_a_terminal_only(live: Live, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", 1500)
    assert "rows/s" not in finish(start("--file", source, "--output", tmp_path / "a.jsonl"))
    leader, follower = pty.openpty()
    command = [*LETHEON, "classify", "--file", str(source), "--output", str(tmp_path / "b.jsonl")]
    shell = environment() | {"COLUMNS": "120", "TERM": "xterm"}
    process = subprocess.Popen(command, env=shell, stdout=subprocess.DEVNULL, stderr=follower)
    os.close(follower)
    shown = b""
    while True:
        try:
            shown += os.read(leader, 4096)
        except OSError:  # the other end is closed
            break
    os.close(leader)
    assert process.wait(60) == 0
    text = shown.decode()
    assert "classifying" in text and "rows/s" in text and "100%" in text
    assert "1,500 rows in" in text
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()


class Answering(BaseHTTPRequestHandler):
    """Answers /classify as fast as Python can: a target for load, where the model would take minutes."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_POST(self) -> None:
        texts = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["texts"]
        results = [{"label": "positive", "abstained": False}] * len(texts)
        data = json.dumps({"results": results, "active_set_version": 7}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""


@contextmanager
def target(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


PEAK = (
    "import atexit, re\n"
    "def peak(): print(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])\n"
    "atexit.register(peak)\n"
    "from app.cli import main\n"
    "main()"
)


def peak(*arguments: str | Path) -> int:
    """Peak resident memory of one run, bytes: its own word, since what wait() tells begins with the parent's."""
    command = [sys.executable, "-c", PEAK, "classify", *map(str, arguments)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True, timeout=300)
    return int(done.stdout) * 1024


def test_memory_does_not_grow_with_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = 100_000
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    with source.open("w") as file:
        file.writelines(json.dumps({"id": i, "text": f"film {i}", "more": "x" * 250}) + "\n" for i in range(rows))
    few = tmp_path / "few.jsonl"
    with source.open() as file:
        few.write_text("".join(file.readline() for _ in range(2_000)))
    with target(Answering) as url:
        monkeypatch.setenv("LETHEON_URL", url)
        small = peak("--file", few, "--output", tmp_path / "few-out.jsonl", "--batch", "256")
        large = peak("--file", source, "--output", out, "--batch", "256")
        again = peak("--file", source, "--output", out)  # nothing but reading what is there
    assert source.stat().st_size > 25e6
    print("peaks:", small, large, again)
    assert max(large, again) - small < 8e6
    with out.open() as file:
        assert sum(json.loads(line)["id"] == i for i, line in enumerate(file)) == rows
