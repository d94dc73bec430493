"""``client/examples/forget_a_person.py`` as it stands, against a real server, with a worker that trains."""

from __future__ import annotations

import runpy
import threading
from pathlib import Path

import pytest
from api_kit import listening
from client_kit import plain_key
from databases import migrated_database
from tiny_models import make_tiny_model
from worker_kit import write_retain

from app import job_queue
from models.examples import read_examples
from models.llm import FrozenLLM
from worker.context import Context
from worker.tasks import run_job

EXAMPLE = Path(__file__).resolve().parent.parent / "client" / "examples" / "forget_a_person.py"


def test_the_example_runs_as_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lax = {
        "retain": str(write_retain(tmp_path / "retain.jsonl", 160)),
        "max_forget_texts": 16,
        "max_classify_texts": 16,
        "num_virtual_tokens": 4,
        "max_steps": 6,
        "min_forget_abstain": 0,
        "max_retain_drop": 1,
        "max_class_drop": 1,
        "max_neighbour_drop": 1,
        "max_total_claim_rate": 1,
    }
    with listening(migrated_database(tmp_path / "one.db"), tmp_path / "home", **lax) as (url, app, _):
        service, ended = app.state.service, threading.Event()
        retain = read_examples(lax["retain"], labels=service.settings.labels)
        model = FrozenLLM.load(str(make_tiny_model(tmp_path / "model")), quantization="none", device="cpu")
        assert model.fingerprint == service.serving.llm.fingerprint  # of its own, as another process would have
        context = Context(service.settings, service.sessions, service.vault, model, retain)

        def work() -> None:
            while not ended.wait(0.05):
                with service.sessions() as session:
                    waiting = job_queue.next_pending(session)
                if waiting is not None:
                    run_job(context, waiting)

        worker = threading.Thread(target=work, daemon=True)
        worker.start()
        monkeypatch.setenv("LETHEON_URL", url)
        monkeypatch.setenv("LETHEON_API_KEY", plain_key(app))
        try:
            found = runpy.run_path(str(EXAMPLE))
        finally:
            ended.set()
            worker.join(60)
    out = capsys.readouterr().out
    assert found["after"]["her"] == ["unknown"] * len(found["texts"])
    assert found["after"]["others"] == found["before"]["others"] == found["restored"]["others"]
    assert "unknown" not in found["before"]["her"]
    assert found["restored"] == found["before"]
    for line in (f"Letheon({url}) ready", "6 different texts", "training", " step ", "is active", "signed:", "True"):
        assert line in out, out
