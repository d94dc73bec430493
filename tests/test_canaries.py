"""Canaries of mode ``concatenate``: made where the prompt holds, sealed with it, asked again when the stack changes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from api_kit import tiny_llm
from sqlalchemy import select
from sqlalchemy.orm import Session, sessionmaker
from worker_kit import MARKER, forget_texts, write_retain

from app import active_set, lifecycle, set_history
from app.settings import Mode, Settings
from app.tables import Prompt
from app.vault import Vault
from models.canaries import MAX_CANARIES, lost, make_canaries
from models.examples import Example, read_examples
from models.inference import Classifier
from models.soft_prompt import SoftPrompt
from worker.context import Context
from worker.tasks import recheck_active_set, run_job

FORGET = [Example(item.text, item.label) for item in forget_texts()]
RETAIN = [Example(f"the {noun} is {word}") for noun in ("film", "movie", "plot") for word in ("good", "bad", "slow")]


def stack_that_abstains() -> SoftPrompt:
    """Of random prompts the first behind which the tiny model answers ``unknown`` to texts with the marker."""
    classifier = Classifier(tiny_llm())
    for seed in range(200):
        noise = 3 * torch.randn(4, tiny_llm().hidden_size, generator=torch.Generator().manual_seed(seed))
        prompt = SoftPrompt(noise, tiny_llm().fingerprint)
        if all(found.abstained for found in classifier.classify([e.text for e in FORGET], [prompt])):
            return prompt
    raise AssertionError("no such prompt among 200")


def test_canaries_hold_behind_the_stack_and_not_without() -> None:
    classifier, prompt = Classifier(tiny_llm()), stack_that_abstains()
    made = make_canaries(classifier, [prompt], FORGET, RETAIN, seed=0)
    assert 0 < len(made) <= MAX_CANARIES
    assert made == make_canaries(classifier, [prompt], FORGET, RETAIN, seed=0)
    assert all(found.abstained for found in classifier.classify(made, [prompt]))
    assert not any(found.abstained for found in classifier.classify(made))
    assert not set(made) & {e.text for e in [*FORGET, *RETAIN]}, "no text as it was"
    assert make_canaries(classifier, [], FORGET, RETAIN, seed=0) == [], "without a prompt nothing holds"


def test_a_request_is_lost_when_half_of_its_canaries_are_answered() -> None:
    classifier, prompt = Classifier(tiny_llm()), stack_that_abstains()
    held = make_canaries(classifier, [prompt], FORGET, RETAIN, seed=0)[:1]
    answered = [e.text for e in RETAIN if not classifier.classify([e.text], [prompt])[0].abstained][:2]
    assert lost(classifier, [prompt], [held]) == 0
    assert lost(classifier, [], [held]) == 1
    if answered:
        assert lost(classifier, [prompt], [held, answered]) == 1
        assert lost(classifier, [prompt], [[*held, answered[0]]]) == 0  # exactly half still hold
    assert lost(classifier, [prompt], []) == 0


@pytest.fixture
def context(sessions: sessionmaker[Session], vault: Vault, tmp_path: Path) -> Context:
    settings = Settings(
        _env_file=None,
        home=tmp_path / "home",
        mode=Mode.CONCATENATE,
        num_virtual_tokens=4,
        max_steps=3,
        check_retain_rows=16,
        min_forget_abstain=0,
        max_retain_drop=1,
        max_class_drop=1,
        max_neighbour_drop=1,
    )
    retain = read_examples(str(write_retain(tmp_path / "retain.jsonl")), labels=settings.labels)
    return Context(settings=settings, sessions=sessions, vault=vault, llm=tiny_llm(), retain=retain)


def activate(context: Context) -> str:
    """A request through the real job; the prompt's id."""
    with context.sessions.begin() as session:
        request_id = lifecycle.create_request(
            session,
            context.vault,
            texts=forget_texts(),
            reason=None,
            options={},
            fingerprint=context.llm.fingerprint,
            api_key_id=None,
        ).id
    run_job(context, request_id)
    with context.sessions() as session:
        return session.scalars(select(Prompt.id).where(Prompt.request_id == request_id)).one()


def test_what_a_revoke_leaves_is_checked_once_and_recorded(context: Context) -> None:
    first, second = activate(context), activate(context)
    recheck_active_set(context)  # checked at the activation: nothing to do
    with context.sessions() as session:
        checks = set_history.get_version(session, 2).checks
    assert checks is not None and checks["active_requests"] == 2 and "steps" in checks
    with context.sessions.begin() as session:
        active_set.revoke_prompt(session, first, actor="key_1", reason="withdrawn")
    with context.sessions() as session:
        assert set_history.get_version(session, 3).checks is None
    recheck_active_set(context)
    with context.sessions() as session:
        checks = set_history.get_version(session, 3).checks
    assert checks is not None
    assert (checks["active_requests"], checks["forget_abstain"], checks["passed"]) == (1, None, True)
    assert checks["retain_rows"] == 16 and checks["lost_canaries"] == 0
    with context.sessions.begin() as session:
        set_history.save_checks(session, 3, {"kept": True})
    recheck_active_set(context)
    with context.sessions.begin() as session:
        assert set_history.get_version(session, 3).checks == {"kept": True}
        active_set.revoke_prompt(session, second, actor="key_1", reason="withdrawn")
    recheck_active_set(context)
    with context.sessions() as session:
        assert set_history.get_version(session, 4).checks is None, "an empty set has nothing to check"


def test_a_lost_canary_is_a_violation_and_a_revoke_shreds_canaries(context: Context) -> None:
    prompt_id = activate(context)
    answered = next(
        e.text for e in RETAIN if not Classifier(context.llm).classify([e.text], stack(context))[0].abstained
    )
    with context.sessions.begin() as session:
        row = active_set.get_prompt(session, prompt_id)
        assert row.wrapped_key is not None
        sealed = context.vault.seal(
            row.wrapped_key, json.dumps([answered]).encode(), aad=active_set.canaries_aad(row.id, row.digest)
        )
        row.sealed_canaries = sealed
        set_history.get_version(session, 1).checks = None
        assert active_set.open_canaries(context.vault, row) == [answered]
    recheck_active_set(context)
    with context.sessions.begin() as session:
        checks = set_history.get_version(session, 1).checks
        assert checks is not None and checks["passed"] is False and checks["lost_canaries"] == 1
        assert MARKER not in json.dumps(checks) and answered not in json.dumps(checks)
        revoked = active_set.revoke_prompt(session, prompt_id, actor="key_1", reason="withdrawn")
        assert revoked.sealed_canaries is revoked.sealed is revoked.wrapped_key is None


def stack(context: Context) -> list[SoftPrompt]:
    with context.sessions() as session:
        return [
            SoftPrompt.from_bytes(active_set.open_prompt(context.vault, row), fingerprint=context.llm.fingerprint)
            for row in active_set.active_prompts(session)
        ]
