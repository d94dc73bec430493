"""A request that is really trained, behind the HTTP application of ``api_kit``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from api_kit import Api, make_settings, tiny_llm
from worker_kit import write_retain

from app.settings import Mode
from models.examples import read_examples
from worker.context import Context
from worker.tasks import run_job


def train(api: Api, folder: Path, mode: Mode, texts: list[str], **changes: Any) -> str:
    """A request that the worker's own job puts in force; lax checks and few steps, unless ``changes`` say otherwise."""
    request_id: str = api.submit(api.key(), *texts)["id"]
    lax = {
        "min_forget_abstain": 0,
        "max_retain_drop": 1,
        "max_class_drop": 1,
        "max_neighbour_drop": 1,
        "max_total_claim_rate": 1,
    }
    knobs = {"mode": mode, "num_virtual_tokens": 4, "max_steps": 4, "max_tries": 1, "check_retain_rows": 16}
    settings = make_settings("", folder, **{"quantization": "none", **lax, **knobs, **changes})
    retain = read_examples(str(write_retain(folder / "retain.jsonl")), labels=settings.labels)
    run_job(Context(settings, api.service.sessions, api.service.vault, tiny_llm(), retain), request_id)
    return request_id
