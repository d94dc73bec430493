from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from app.watchdog import EXIT_STATUS

SCRIPT = """
import sys, threading
from pathlib import Path
from api_kit import running
from app.watchdog import end_when_stuck

home = Path(sys.argv[1])
with running(f"sqlite:///{home / 'letheon.db'}", home) as api:
    serving = api.service.serving
    if sys.argv[2] == "dead":
        serving._batcher.close()
    asked = threading.Event()

    def check():
        serving.check_alive()
        asked.set()

    done = end_when_stuck(check, every=0.01)
    assert asked.wait(60), "never asked"
    done.set()
print("ended in order")
"""


def run(home: Path, how: str) -> subprocess.CompletedProcess[str]:
    here = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": f"{here.parent}:{here}"}
    return subprocess.run(
        [sys.executable, "-c", SCRIPT, str(home), how],
        env=environment,
        cwd=home,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_a_process_whose_model_thread_has_ended_ends(tmp_path: Path) -> None:
    found = run(tmp_path, "dead")
    assert found.returncode == EXIT_STATUS, found.stderr
    assert "ended in order" not in found.stdout
    assert "the model thread is not running" in found.stderr


def test_a_sound_process_goes_on(tmp_path: Path) -> None:
    found = run(tmp_path, "alive")
    assert (found.returncode, found.stdout.strip()) == (0, "ended in order"), found.stderr
