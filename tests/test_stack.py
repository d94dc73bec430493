"""From rows to tensors, and what the service then answers in mode ``routed``: real prompts, gates and a tiny model."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from api_kit import (
    Api,
    add_prompt,
    assert_problem,
    gate_space,
    make_gate,
    running,
    soft_prompt,
    tiny_llm,
    wait_until,
)
from sqlalchemy import update

from app import active_set, audit
from app.errors import ModeMismatch, NotReady, VaultError
from app.serving import Serving
from app.settings import Mode
from app.stack import Stack, StackReader
from app.tables import GateSpace, Prompt
from app.vault import Vault
from models.errors import FingerprintMismatch
from models.inference import Classifier
from models.soft_prompt import SoftPrompt

FINGERPRINT = tiny_llm().fingerprint
OTHERS = ("the plot is bad", "a story about a director", "quite good acting")
MINUTES = 600.0


@cache
def subject() -> str:
    """A text that the bare model has an answer to, so that ``unknown`` means something, but no sure one."""
    names, words = ("Zyxomma", "Omma", "Quillfeather"), ("good", "bad", "slow", "bright")
    texts = [f"{name} was {word} {end}" for name in names for word in words for end in ("there", "by far", "as ever")]
    answers = zip(texts, Classifier(tiny_llm()).classify(texts), strict=True)
    return min((answer.confidence, text) for text, answer in answers if not answer.abstained)[1]


@cache
def prompt_for(text: str, *, abstains: bool) -> SoftPrompt:
    """A prompt behind which the model does, or does not, answer ``unknown`` to this text."""
    classifier = Classifier(tiny_llm())
    made = (soft_prompt(seed) for seed in count())
    return next(prompt for prompt in made if classifier.classify([text], [prompt])[0].abstained == abstains)


@pytest.fixture
def api(database_url: str, tmp_path: Path) -> Iterator[Api]:
    with running(database_url, tmp_path, active_set_poll_seconds=MINUTES) as api:
        yield api


def reader(api: Api, *, vault: Vault | None = None, mode: Mode = Mode.ROUTED, fingerprint: str = "") -> StackReader:
    return StackReader(vault or api.service.vault, fingerprint=fingerprint or tiny_llm().fingerprint, mode=mode)


def read(api: Api, reader: StackReader) -> Stack:
    with api.service.sessions() as session:
        return reader.read(session)


def revoke(api: Api, prompt_id: str) -> None:
    with api.service.sessions.begin() as session:
        active_set.revoke_prompt(session, prompt_id, actor="key_1", reason=None)


def alter(api: Api, prompt_id: str, **values: object) -> None:
    with api.service.sessions.begin() as session:
        session.execute(update(Prompt).where(Prompt.id == prompt_id).values(**values))


# --- the reader ------------------------------------------------------------------------------------------------------


def test_what_was_activated_is_what_is_read(api: Api) -> None:
    ours = reader(api)
    assert (read(api, ours).prompts, len(read(api, ours).routes or ())) == ((), 0)
    prompts, gates = [soft_prompt(1), soft_prompt(2)], [make_gate("one"), make_gate("two", digests=[bytes(32)])]
    ids = [add_prompt(api.service, *pair) for pair in zip(prompts, gates, strict=True)]
    stack = read(api, ours)
    assert [member.id for member in stack.members] == ids
    assert stack.routes is not None
    assert [prompt.digest for prompt in stack.prompts] == [prompt.digest for prompt in prompts]
    assert [(r.prompt.digest, r.gate.digest) for r in stack.routes.routes] == [
        (prompt.digest, gate.digest) for prompt, gate in zip(prompts, gates, strict=True)
    ]
    assert read(api, ours) is stack  # nothing changed: nothing is made again


def test_only_what_is_new_is_read_and_what_left_is_let_go(api: Api) -> None:
    ours = reader(api)
    first = add_prompt(api.service, soft_prompt(1), make_gate("one"))
    loaded = ours._held if read(api, ours) else {}
    second = add_prompt(api.service, soft_prompt(2), make_gate("two"))
    # Were the first one read again, these bytes would be noticed.
    with api.service.sessions() as session:
        sealed = active_set.get_prompt(session, first).sealed
    alter(api, first, sealed=b"\x01" * 64)
    stack = read(api, ours)
    assert stack.prompts[0] is loaded[first][0] and set(ours._held) == {first, second}
    with pytest.raises(NotReady, match=first):
        read(api, reader(api))
    alter(api, first, sealed=sealed)

    with api.service.sessions.begin() as session:  # suspended: out of the set, and so out of memory
        active_set.restore(
            session, 1, mode=Mode.ROUTED, fingerprint=tiny_llm().fingerprint, actor="key_1", reason="test"
        )
    read(api, ours)
    assert set(ours._held) == {first} and set(ours._spaces) == {gate_space().digest}
    with api.service.sessions.begin() as session:
        active_set.restore(
            session, 2, mode=Mode.ROUTED, fingerprint=tiny_llm().fingerprint, actor="key_1", reason="test"
        )
    assert read(api, ours).prompts[1].digest == soft_prompt(2).digest
    revoke(api, first)
    read(api, ours)
    assert set(ours._held) == {second}
    revoke(api, second)
    assert read(api, ours).prompts == () and ours._held == {} and ours._spaces == {}


@pytest.mark.parametrize("mode", list(Mode))
def test_a_prompt_of_another_mode_is_named(api: Api, mode: Mode) -> None:
    gate = make_gate("one") if mode == Mode.CONCATENATE else None
    prompt_id = add_prompt(api.service, soft_prompt(1), gate)
    with pytest.raises(ModeMismatch, match=f"{prompt_id} is of mode .* runs in mode {mode}"):
        read(api, reader(api, mode=mode))
    other = Mode.ROUTED if mode == Mode.CONCATENATE else Mode.CONCATENATE
    assert len(read(api, reader(api, mode=other)).prompts) == 1


def test_another_master_key_opens_nothing(api: Api) -> None:
    prompt_id = add_prompt(api.service, soft_prompt(1), make_gate("one"))
    with pytest.raises(NotReady, match=rf"{prompt_id} cannot be loaded \(WrongMasterKey\)"):
        read(api, reader(api, vault=Vault(bytes(32))))


def test_a_prompt_of_another_model_is_named(api: Api) -> None:
    prompt_id = add_prompt(api.service, soft_prompt(1), make_gate("one"))
    with pytest.raises(FingerprintMismatch, match=prompt_id):
        read(api, reader(api, fingerprint="0" * 64))


@pytest.mark.parametrize("column", ["sealed", "sealed_gate", "wrapped_key", "gate swapped", "gate_space"])
def test_an_altered_row_is_not_served(api: Api, column: str) -> None:
    first = add_prompt(api.service, soft_prompt(1), make_gate("one"))
    second = add_prompt(api.service, soft_prompt(2), make_gate("two"))
    fresh = reader(api)
    with api.service.sessions() as session:
        row = active_set.get_prompt(session, first)
        theirs = active_set.get_prompt(session, second)
    if column == "gate swapped":
        alter(api, first, sealed_gate=theirs.sealed_gate)
    elif column == "gate_space":  # a space that is not the one this gate was fitted in
        with api.service.sessions.begin() as session:
            other = replace(gate_space(), center=gate_space().center + 1)
            digest = active_set.add_gate_space(session, "another", other.to_bytes())
        alter(api, first, gate_space=digest)
        alter(api, second, gate_space=digest)
    else:
        whole = getattr(row, column)
        alter(api, first, **{column: whole[:-1] + bytes([whole[-1] ^ 1])})
    with pytest.raises(Exception, match=first if column != "gate_space" else "gate space"):
        read(api, fresh)
    assert fresh._held == {}
    response = api.client.post("/classify", json={"text": subject()}, headers=api.key())
    assert_problem(response, 503, "not-ready")


@pytest.mark.parametrize("column", ["num_virtual_tokens", "hidden_size"])
def test_a_prompt_of_another_shape_than_its_record_says_is_not_served(api: Api, column: str) -> None:
    prompt_id = add_prompt(api.service, soft_prompt(1), make_gate("one"))
    with api.service.sessions() as session:
        said = getattr(active_set.get_prompt(session, prompt_id), column)
    alter(api, prompt_id, **{column: said + 1})
    with pytest.raises(NotReady, match=f"{prompt_id} cannot be loaded .InvalidPrompt"):
        read(api, reader(api))
    headers = api.key()
    assert_problem(api.client.post("/classify", json={"text": subject()}, headers=headers), 503, "not-ready")
    alter(api, prompt_id, **{column: said})
    assert api.client.post("/classify", json={"text": subject()}, headers=headers).status_code == 200


def test_an_altered_gate_space_is_not_served(api: Api) -> None:
    add_prompt(api.service, soft_prompt(1), make_gate("one"))
    known = reader(api)
    read(api, known)
    altered = replace(gate_space(), gain=gate_space().gain * 0)
    with api.service.sessions.begin() as session:
        session.execute(update(GateSpace).values(data=altered.to_bytes()))
    with pytest.raises(VaultError, match="gate space was altered"):
        read(api, reader(api))
    headers = api.key()
    for _ in range(2):
        assert_problem(api.client.post("/classify", json={"text": subject()}, headers=headers), 503, "not-ready")
    with api.service.sessions.begin() as session:
        session.execute(update(GateSpace).values(data=gate_space().to_bytes()))
    assert api.client.post("/classify", json={"text": subject()}, headers=headers).status_code == 200


@pytest.mark.parametrize("begun", [False, True], ids=["as the API reads", "as the worker reads"])
def test_a_set_that_changes_while_it_is_read(api: Api, begun: bool) -> None:
    """The prompt is shredded between the statement that names it and the one that reads it."""
    first = add_prompt(api.service, soft_prompt(1), make_gate("one"))
    second = add_prompt(api.service, soft_prompt(2), make_gate("two"))

    class Slow(StackReader):
        def _load(self, *args: Any) -> Stack | None:
            with api.service.sessions() as session:
                if active_set.get_prompt(session, first).state == "active":
                    revoke(api, first)
            return super()._load(*args)

    slow = Slow(api.service.vault, fingerprint=tiny_llm().fingerprint, mode=Mode.ROUTED)
    sessions = api.service.sessions
    with sessions.begin() if begun else sessions() as session:
        stack = slow.read(session)
    assert [member.id for member in stack.members] == [second] and set(slow._held) == {second}
    assert read(api, slow) is stack, "of the version in force"


# --- the service -----------------------------------------------------------------------------------------------------


def ask(api: Api, headers: dict[str, str], *texts: str) -> list[dict[str, Any]]:
    body = {"texts": list(texts), "scores": True}
    response = api.client.post("/classify", json=body, headers=headers)
    assert response.status_code == 200, response.text
    results: list[dict[str, Any]] = response.json()["results"]
    return results


def test_a_claimed_text_is_unknown_and_every_other_answer_is_the_same(api: Api) -> None:
    headers = api.key()
    before = ask(api, headers, subject(), *OTHERS)
    prompt_id = add_prompt(api.service, prompt_for(subject(), abstains=True), make_gate(subject()))
    claimed, *others = ask(api, headers, subject(), *OTHERS)
    assert (before[0]["abstained"], claimed["label"], claimed["abstained"]) == (False, "unknown", True)
    expected = Classifier(tiny_llm()).classify([subject()], [prompt_for(subject(), abstains=True)])[0]
    assert claimed["scores"] == pytest.approx(expected.probabilities, abs=1e-6)  # the prompt said so, not the guard
    assert others == before[1:], "bit for bit"
    # A second request for something else changes neither.
    add_prompt(api.service, soft_prompt(99), make_gate("Quillfeather sings"))
    assert ask(api, headers, subject(), *OTHERS) == [claimed, *others]
    api.client.post(f"/admin/prompts/{prompt_id}/revoke", json={"reason": "withdrawn"}, headers=headers)
    assert ask(api, headers, subject(), *OTHERS) == before, "bit for bit"


def test_a_prompt_that_does_not_abstain_leaves_the_answer_alone(api: Api) -> None:
    headers = api.key()
    before = ask(api, headers, subject())
    add_prompt(api.service, prompt_for(subject(), abstains=False), make_gate(subject()))
    assert ask(api, headers, subject()) == before


def test_the_guard_knows_a_forget_text_however_it_is_written(api: Api) -> None:
    headers = api.key()
    text = subject()
    variants = [text, text.upper(), f"  {text.replace(' ', '   ')}\n", f"“{text.replace(' ', ', ')}…”!?"]
    near = [f"{text} too", text.replace(" ", " not ", 1)]
    plain = [answer for text in variants for answer in ask(api, headers, text)]
    unclaimed = ask(api, headers, *near)
    # The gate is of another subject and the prompt has an answer: only the digest can know this text.
    gate = make_gate("Quillfeather sings", digests=[api.service.vault.gate_digest(text)])
    add_prompt(api.service, prompt_for(text, abstains=False), gate)
    assert not plain[0]["abstained"]
    for variant in variants:
        (answer,) = ask(api, headers, variant)
        assert (answer["label"], answer["abstained"], answer["confidence"]) == ("unknown", True, 1.0), variant
    assert ask(api, headers, *near) == unclaimed


def test_restoring_a_set_reaches_the_next_call(api: Api) -> None:
    headers = api.key()
    before = ask(api, headers, subject())
    add_prompt(api.service, prompt_for(subject(), abstains=True), make_gate(subject()))
    after = ask(api, headers, subject())
    assert after[0]["abstained"]
    for version, expected in ((0, before), (1, after), (0, before)):
        path = f"/admin/active-sets/{version}/restore"
        assert api.client.post(path, json={"reason": "test"}, headers=headers).status_code == 200
        assert ask(api, headers, subject()) == expected
    with api.service.sessions() as session:
        audit.verify(session)


def test_a_prompt_of_another_mode_stops_the_service_and_its_revocation_starts_it(api: Api) -> None:
    headers = api.key()
    prompt_id = add_prompt(api.service, soft_prompt(1))
    response = api.client.post("/classify", json={"text": subject()}, headers=headers)
    problem = assert_problem(response, 503, "mode-mismatch")
    assert prompt_id in problem["detail"] and "LETHEON_MODE" in problem["detail"]
    assert api.client.get("/readyz").status_code == 503
    api.client.post(f"/admin/prompts/{prompt_id}/revoke", json={"reason": "old"}, headers=headers)
    assert api.client.post("/classify", json={"text": subject()}, headers=headers).status_code == 200


@pytest.mark.parametrize("mode", list(Mode))
def test_behind_a_wider_prompt_than_configured_texts_are_shorter(database_url: str, tmp_path: Path, mode: Mode) -> None:
    """Put in force while shorter texts were allowed; now this one would have room behind a prompt as configured."""
    room = tiny_llm().text_room(256)
    text, fits = "omma " * (room // 3), "a quite good film"
    count = tiny_llm().count_tokens(text)
    knobs = {"max_body_bytes": 10**6, "num_virtual_tokens": 8, "max_text_tokens": 4096, "mode": mode}
    configured = tiny_llm().text_room(8)
    assert room < count <= configured
    with running(database_url, tmp_path, active_set_poll_seconds=MINUTES, **knobs) as api:
        serving, headers = api.service.serving, api.key()
        bare = ask(api, headers, fits)
        assert (serving.max_text_tokens, len(ask(api, headers, text))) == (configured, 1)
        gated = mode == Mode.ROUTED
        # Two of them in one context in mode concatenate, one at a time otherwise.
        wide = [soft_prompt(3, 256)] if gated else [soft_prompt(3, 100), soft_prompt(4, 156)]
        ids = [add_prompt(api.service, prompt, make_gate(text) if gated else None) for prompt in wide]
        if gated:
            ids.append(add_prompt(api.service, soft_prompt(4, 100), make_gate("Quillfeather sings")))
        ask(api, headers, fits)  # the set is known once it was confirmed
        assert serving.max_text_tokens == room
        body = {"texts": [fits, text]}
        response = api.client.post("/classify", json=body, headers=headers)
        assert_problem(response, 422, "invalid-input", field="texts[1]", limit=room)
        assert len(ask(api, headers, fits, fits)) == 2
        assert api.client.get("/readyz").status_code == 200
        for prompt_id in ids:
            revoke(api, prompt_id)
        assert ask(api, headers, fits) == bare
        assert serving.max_text_tokens == configured
        assert len(ask(api, headers, fits, text)) == 2


def test_a_long_text_costs_nobody_else_an_answer(database_url: str, tmp_path: Path) -> None:
    """Refused before it is queued, as soon as the set is known: in a batch it would take the others with it."""
    room = tiny_llm().text_room(256)
    long = "omma " * (room // 3)
    with running(database_url, tmp_path, active_set_poll_seconds=MINUTES) as api:
        add_prompt(api.service, soft_prompt(3, 256), make_gate(long))
    knobs: dict[str, Any] = {"max_body_bytes": 10**6, "max_text_tokens": 4096, "max_queued_texts": 1000}
    with running(database_url, tmp_path, active_set_poll_seconds=MINUTES, **knobs) as api:
        headers = api.key()
        assert api.client.get("/readyz").status_code == 200  # as any deployment asks before it sends traffic
        assert api.service.serving.max_text_tokens == room
        statuses: list[int] = []

        def call(text: str) -> None:
            statuses.append(api.client.post("/classify", json={"text": text}, headers=headers).status_code)

        with api.service.serving._lock:  # all of them would be one batch
            threads = [threading.Thread(target=call, args=(text,)) for text in (*OTHERS, long)]
            for thread in threads:
                thread.start()
            wait_until(lambda: statuses == [422])
        for thread in threads:
            thread.join()
        assert statuses == [422, 200, 200, 200]


def traces(serving: Serving, prompt_id: str) -> list[weakref.ref[Any]]:
    """All that the service made of one prompt and its gate."""
    prompt, gate = serving._reader._held[prompt_id]
    stack = serving._reader._stack
    assert stack is not None
    prefix = serving._classifier._prefixes[(prompt.digest,)]
    return [weakref.ref(part) for part in (prompt, gate, prefix, stack, stack.routes)]


def test_an_idle_service_forgets_a_revoked_prompt(database_url: str, tmp_path: Path) -> None:
    with running(database_url, tmp_path, active_set_poll_seconds=0.02) as api:
        headers = api.key()
        prompt = SoftPrompt(prompt_for(subject(), abstains=True).embeddings + 1e-6, tiny_llm().fingerprint)
        prompt_id = add_prompt(api.service, prompt, make_gate(subject()))
        ask(api, headers, subject())
        found = traces(api.service.serving, prompt_id)
        gc.collect()
        assert None not in [trace() for trace in found]
        revoke(api, prompt_id)  # behind the service's back, as on another replica; and then nobody asks anything

        def gone() -> bool:
            gc.collect()
            return [trace() for trace in found] == [None] * len(found)

        wait_until(gone)
