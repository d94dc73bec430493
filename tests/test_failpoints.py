"""Failpoints: they do nothing unless armed, each stands where it says, and a typo is refused."""

from __future__ import annotations

import ast
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from worker_kit import ROOT

from app import failpoints
from app.failpoints import NAMES, VARIABLE, BadFailpoint, arm, failpoint
from app.main import create_app
from app.settings import Settings
from worker.main import run


@pytest.fixture(autouse=True)
def disarmed() -> Iterator[None]:
    yield
    arm({})


def sites(source: str) -> Iterator[str]:
    """The points that this source passes: ``failpoint("name")``, and both of a ``commit(…, at="name")``."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if called == "failpoint" and node.args and isinstance(node.args[0], ast.Constant):
            yield str(node.args[0].value)
        for keyword in node.keywords:
            if called == "commit" and keyword.arg == "at" and isinstance(keyword.value, ast.Constant):
                yield from (f"{keyword.value.value}.{side}" for side in ("before_commit", "after_commit"))


def test_every_name_has_one_place() -> None:
    files = [path for folder in ("app", "worker", "models") for path in (ROOT / folder).rglob("*.py")]
    found = Counter(name for path in files for name in sites(path.read_text()))
    assert found == Counter(NAMES)
    assert len(set(NAMES)) == len(NAMES)


def test_unarmed_nothing_happens() -> None:
    arm({})
    for name in NAMES:
        failpoint(name)
    assert failpoints._armed is None


def test_errors_come_from_the_nth_time_on() -> None:
    arm({VARIABLE: "train.step:3=memory"})
    for _ in range(2):
        failpoint("train.step")
        failpoint("texts.read")
    for _ in range(2):
        with pytest.raises(MemoryError):
            failpoint("train.step")
    arm({VARIABLE: "checkpoint.before_commit=enospc"})
    with pytest.raises(OSError, match="No space left"):
        failpoint("checkpoint.before_commit")


@pytest.mark.parametrize(
    ("said", "left"),
    [("activate.after_commit", 1), ("activate.after_commit:1=kill", 1), ("activate.after_commit:3", 3)],
)
def test_a_process_dies_at_its_point(said: str, left: int) -> None:
    code = (
        "import os\nfrom app.failpoints import arm, failpoint\narm(os.environ)\n"
        "for i in range(5):\n    failpoint('activate.before_commit'); print(i, flush=True)\n"
        "    failpoint('activate.after_commit')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ | {VARIABLE: said}, capture_output=True
    )
    assert done.returncode == -signal.SIGKILL
    assert done.stdout.split() == [str(i).encode() for i in range(left)]


@pytest.mark.parametrize(
    "said",
    ["activate.after_comit", "activate", "train.step:0", "train.step:x", "train.step=explode", "train.step ", "="],
)
def test_a_typo_is_refused_at_the_start(said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadFailpoint, match=VARIABLE):
        arm({VARIABLE: said})
    monkeypatch.setenv(VARIABLE, said)
    settings = Settings(_env_file=None, home=tmp_path)
    with pytest.raises(BadFailpoint):
        run(settings)
    with pytest.raises(BadFailpoint):
        create_app(settings)
    assert not any(tmp_path.iterdir())
