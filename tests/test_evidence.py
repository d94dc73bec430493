"""A request's evidence: made by a real job, kept as long as what it is about, shown to whom the request is shown."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from api_kit import Api, add_prompt, assert_problem, make_settings, running, soft_prompt, tiny_llm
from databases import migrated_database
from floor import activate, await_approval, must_take, submit, terms
from sqlalchemy import select, update
from sqlalchemy.orm import Session, sessionmaker
from worker_kit import MARKER, forget_texts, write_retain

from app import active_set, approval, evidence, lifecycle
from app.database_metrics import observe
from app.errors import Conflict, VaultError
from app.evidence import Found
from app.evidence_pictures import DASHED, NO_PROOF, SOLID, embedding_svg, membership_svg
from app.security_headers import API_POLICY
from app.settings import Mode
from app.tables import Evidence, Prompt, UnlearnRequest, utcnow
from app.vault import Vault
from models.errors import DatasetError
from models.examples import Example, read_examples
from worker.context import Context
from worker.evidence import unrelated
from worker.main import read_fitting
from worker.tasks import run_job

Sessions = sessionmaker[Session]
SVG = "{http://www.w3.org/2000/svg}"
CURVE = [[0, 0], [0.5, 1], [1, 1]]
DOCUMENT: dict[str, Any] = {
    "version": 1,
    "mode": "routed",
    "prompt_digest": "d" * 64,
    "seed": 0,
    "embedding": {
        "moved": 1,
        "clusters": [
            {"set": "forget", "label": "negative", "base": [[0, 0]], "served": [[4, 1]]},
            {"set": "retain", "label": None, "base": [[1, 2], [2, 2]], "served": [[1, 2], [2, 2]]},
        ],
    },
    "membership": {
        "score": "true label",
        "non_members": "held out",
        "members": 1,
        "others": 2,
        "base": {"auc": 0.75, "low": 0.1, "high": 0.98, "roc": CURVE},
        "served": {"auc": 0.25, "low": 0.02, "high": 0.9, "roc": CURVE},
    },
    "software": {"torch": "2"},
    "seconds": 0.1,
}


def keep(sessions: Sessions, vault: Vault, request_id: str, found: Found | None = None) -> None:
    """As the worker does, under the prompt's key where there is one."""
    with sessions.begin() as session:
        prompt = session.scalars(select(Prompt).where(Prompt.request_id == request_id)).one_or_none()
        wrapped = prompt.wrapped_key if prompt else lifecycle.get_request(session, request_id).wrapped_key
        assert wrapped is not None
        sealed = evidence.seal(vault, request_id, wrapped, found or Found(DOCUMENT))
        evidence.save(session, request_id, sealed)


def look(sessions: Sessions, vault: Vault, request_id: str) -> dict[str, Any] | str:
    """The document, or why there is none."""
    with sessions() as session:
        try:
            return evidence.read(session, vault, lifecycle.get_request(session, request_id))
        except Conflict as none:
            return str(none.extra["why"])


def row(sessions: Sessions, request_id: str) -> Evidence | None:
    with sessions() as session:
        return session.get(Evidence, request_id)


# --- as long as what it is about -------------------------------------------------------------------------------------


def test_it_is_gone_with_the_prompt(sessions: Sessions, vault: Vault) -> None:
    request_id = submit(sessions, vault)
    assert look(sessions, vault, request_id) == "not-yet"
    prompt_id = activate(sessions, vault, must_take(sessions, request_id), version=0)
    assert look(sessions, vault, request_id) == "not-made"
    keep(sessions, vault, request_id)
    found = look(sessions, vault, request_id)
    assert isinstance(found, dict) and found.items() >= DOCUMENT.items() and found["request_id"] == request_id
    stored = row(sessions, request_id)
    assert stored is not None and stored.sealed is not None and b"forget" not in stored.sealed
    with sessions.begin() as session:
        active_set.restore(session, 0, mode="concatenate", fingerprint="f" * 64, actor="key_1", reason="test")
    assert look(sessions, vault, request_id) == found, "out of force, and it can come back"
    with sessions.begin() as session:
        active_set.revoke_prompt(session, prompt_id, actor="key_1", reason=None)
    assert look(sessions, vault, request_id) == "shredded" and row(sessions, request_id) is None
    with sessions.begin() as session:  # a row of a backup: its key is gone all the same
        session.add(Evidence(request_id=request_id, created_at=utcnow(), sealed=stored.sealed, absent=None))
    assert look(sessions, vault, request_id) == "shredded"


@pytest.mark.parametrize("end", ["rejected", "cancelled"])
def test_it_is_there_for_whoever_decides_and_gone_with_a_no(sessions: Sessions, vault: Vault, end: str) -> None:
    request_id = submit(sessions, vault, terms=terms(approval=True))
    await_approval(sessions, must_take(sessions, request_id))
    keep(sessions, vault, request_id)
    assert isinstance(look(sessions, vault, request_id), dict)
    with sessions.begin() as session:
        if end == "rejected":
            approval.reject(session, request_id, actor="key_2", reason="no")
        else:
            lifecycle.request_cancel(session, request_id, actor="key_1")
    assert look(sessions, vault, request_id) == "ended" and row(sessions, request_id) is None


def test_what_was_sealed_for_one_request_does_not_open_for_another(sessions: Sessions, vault: Vault) -> None:
    first, second = submit(sessions, vault), submit(sessions, vault)
    for version, request_id in enumerate((first, second)):
        activate(sessions, vault, must_take(sessions, request_id), data=request_id.encode(), version=version)
        keep(sessions, vault, request_id)
    taken = row(sessions, first)
    assert taken is not None
    with sessions.begin() as session:
        session.execute(update(Evidence).where(Evidence.request_id == second).values(sealed=taken.sealed))
        keys = dict(session.execute(select(Prompt.request_id, Prompt.wrapped_key)).all())
        session.execute(update(Prompt).where(Prompt.request_id == second).values(wrapped_key=keys[first]))
    with pytest.raises(VaultError):
        look(sessions, vault, second)


def test_what_could_not_be_made_is_counted_and_said(sessions: Sessions, vault: Vault) -> None:
    kept, absent, off = (submit(sessions, vault) for _ in range(3))
    keep(sessions, vault, kept)
    keep(sessions, vault, absent, Found(None, "OutOfMemoryError"))
    assert look(sessions, vault, absent) == "could-not" and Found(None, "OutOfMemoryError").figures == {
        "membership": None
    }
    with sessions() as session:
        assert observe(session, utcnow()).evidence == {"kept": 1, "absent": 1}
    with sessions.begin() as session:
        evidence.save(session, kept, evidence.seal(vault, kept, vault.new_key(), None))
    assert row(sessions, kept) is None and row(sessions, off) is None


# --- a real job, over HTTP -------------------------------------------------------------------------------------------


def worker_of(api: Api, folder: Path, mode: Mode, held_out: list[Example], **knobs: Any) -> Context:
    """Lax checks, few steps; the model, database and vault of the running service."""
    lax = {"min_forget_abstain": 0, "max_retain_drop": 1, "max_class_drop": 1, "max_neighbour_drop": 1}
    few = {"max_total_claim_rate": 1, "num_virtual_tokens": 4, "max_steps": 4, "max_tries": 1, "check_retain_rows": 16}
    settings = make_settings("", folder, mode=mode, quantization="none", **{**lax, **few, **knobs})
    retain = read_examples(str(write_retain(folder / "retain.jsonl")), labels=settings.labels)
    return Context(settings, api.service.sessions, api.service.vault, tiny_llm(), retain, held_out)


def ask(api: Api, headers: Mapping[str, str]) -> str:
    texts = [{"text": item.text, "label": item.label} for item in forget_texts(5)]
    answer = api.client.post("/unlearn-requests", json={"forget_texts": texts}, headers=dict(headers))
    assert answer.status_code == 202, answer.text
    request_id: str = answer.json()["id"]
    return request_id


@pytest.mark.parametrize("mode", list(Mode))
def test_of_a_real_request(tmp_path: Path, mode: Mode, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    held_out = [Example(f"a {word} evening {i}", ("positive", "negative")[i % 2]) for i, word in enumerate("abcdefgh")]
    with running(migrated_url(tmp_path), tmp_path, mode=mode) as api:
        mine, auditor = api.key("requests"), api.key("auditor", "admin")
        request_id = ask(api, mine)
        path = f"/unlearn-requests/{request_id}/evidence"
        assert assert_problem(api.client.get(path, headers=mine), 409, "conflict")["why"] == "not-yet"
        run_job(worker_of(api, tmp_path, mode, held_out), request_id)

        answer = api.client.get(path, headers=mine)
        assert answer.status_code == 200, answer.text
        found = answer.json()
        assert api.client.get(path, headers=auditor).content == answer.content
        assert_problem(api.client.get(path, headers=api.key("requests")), 404, "not-found")
        attack, shown = found["membership"], found["embedding"]["clusters"]
        assert (attack["members"], attack["others"], attack["non_members"]) == (5, len(held_out), "held out")
        assert attack["score"] == "true label" and found["mode"] == mode
        counts = {(one["set"], one["label"]): len(one["base"]) for one in shown}
        assert (counts["forget", "positive"], counts["forget", "negative"]) == (3, 2)
        assert {one for one, _ in counts} == {"forget", "retain"}
        pairs = [pair for one in shown for pair in zip(one["base"], one["served"], strict=True)]
        stayed = sum(base == served for base, served in pairs)
        assert found["embedding"]["moved"] == len(pairs) - stayed
        assert stayed == 0 if mode == Mode.CONCATENATE else stayed > 0

        metrics = api.client.get(f"/unlearn-requests/{request_id}", headers=mine).json()["metrics"]
        assert metrics["membership"]["after"] == {name: attack["served"][name] for name in ("auc", "low", "high")}
        assert metrics["held_out_rows"] == len(held_out)
        assert 0 <= metrics["held_out_accuracy"] <= 1 and 0 <= metrics["held_out_accuracy_before"] <= 1
        receipt = api.client.get(f"/unlearn-requests/{request_id}/receipt", headers=mine).json()["receipt"]
        rates = {rate["name"]: rate for rate in receipt["checks"]["rates"]}
        assert (rates["membership_auc"]["rate"], rates["membership_auc"]["rows"]) == (attack["served"]["auc"], 5)
        assert rates["membership_auc_before"]["high"] == attack["base"]["high"]
        assert any("membership_auc" in line for line in receipt["meaning"])

        for name, said in (("embedding.svg", "A picture is no proof"), ("membership.svg", "guessing")):
            picture = api.client.get(f"{path}/{name}", headers=mine)
            assert (picture.status_code, picture.headers["content-type"]) == (200, "image/svg+xml")
            assert picture.headers["content-security-policy"] == API_POLICY
            assert picture.headers["x-content-type-options"] == "nosniff"
            assert ElementTree.fromstring(picture.content).tag == f"{SVG}svg"
            assert said in picture.text and "style=" not in picture.text and MARKER not in picture.text
            assert_problem(api.client.get(f"{path}/{name}", headers=api.key("requests")), 404, "not-found")
        assert MARKER not in answer.text + json.dumps(receipt) + caplog.text

        with api.service.sessions() as session:
            prompt_id = session.scalars(select(Prompt.id).where(Prompt.request_id == request_id)).one()
        revoked = api.client.post(f"/admin/prompts/{prompt_id}/revoke", json={"reason": "asked"}, headers=auditor)
        assert revoked.status_code == 200, revoked.text
        for name in ("", "/embedding.svg", "/membership.svg"):
            problem = assert_problem(api.client.get(path + name, headers=mine), 409, "conflict")
            assert problem["why"] == "shredded"
        after = api.client.get(f"/unlearn-requests/{request_id}/receipt", headers=mine).json()["receipt"]
        assert after["checks"] == receipt["checks"], "what is filed stays as it was"


def migrated_url(folder: Path) -> str:
    return migrated_database(folder / "evidence.db")


def test_a_request_comes_into_force_without_evidence(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    too_long = [Example("film " * 5000, "positive")]
    with running(migrated_url(tmp_path), tmp_path) as api:
        mine = api.key("requests")
        broken, off = ask(api, mine), ask(api, api.key("requests"))
        run_job(worker_of(api, tmp_path, Mode.ROUTED, too_long), broken)
        run_job(worker_of(api, tmp_path, Mode.ROUTED, [], evidence_texts=0), off)
        older = add_prompt(api.service, soft_prompt(1))
        with api.service.sessions() as session:
            old = session.get_one(Prompt, older).request_id
            requests = [session.get_one(UnlearnRequest, one) for one in (broken, off, old)]
            assert [one.state for one in requests] == ["active"] * 3
            assert requests[0].metrics is not None and requests[0].metrics["membership"] is None
            assert "held_out_rows" not in requests[0].metrics
            assert requests[1].metrics is not None and "membership" not in requests[1].metrics
        assert "no evidence, and it goes on without: TextTooLong" in caplog.text
        for request_id, why in ((broken, "could-not"), (off, "not-made"), (old, "not-made")):
            answer = api.client.get(f"/unlearn-requests/{request_id}/evidence", headers=api.key("auditor"))
            problem = assert_problem(answer, 409, "conflict")
            assert problem["why"] == why and ("TextTooLong" in problem["detail"]) == (why == "could-not")
        receipt = api.client.get(f"/unlearn-requests/{broken}/receipt", headers=mine).json()["receipt"]
        assert not [rate for rate in receipt["checks"]["rates"] if rate["name"].startswith("membership")]
        assert not any("membership_auc" in line for line in receipt["meaning"])


# --- what it is made from --------------------------------------------------------------------------------------------


def test_held_out_rows_are_nothing_that_is_to_be_forgotten(sessions: Sessions, vault: Vault, tmp_path: Path) -> None:
    held_out = [Example(text, "positive") for text in ("A fine film", "of another request", "Mine!", "left over")]
    settings = make_settings("", tmp_path)
    context = Context(settings, sessions, vault, tiny_llm(), [], held_out)
    forgotten = {vault.digest("of another  REQUEST")}
    forget = [Example("mine"), Example("a fine... film")]
    assert [e.text for e in unrelated(context, forgotten, forget)] == ["left over"]


def test_rows_that_are_too_long_are_left_out(tmp_path: Path) -> None:
    path, settings = tmp_path / "held_out.jsonl", make_settings("", tmp_path)
    long = {"text": "film " * 200, "label": "positive"}
    path.write_text(json.dumps(long) + "\n" + json.dumps({"text": "short", "label": 0}) + "\n", encoding="utf-8")
    found = read_fitting(settings, tiny_llm(), str(path), "held-out")
    assert [(row.text, row.label) for row in found] == [("short", "negative")]
    path.write_text(json.dumps(long), encoding="utf-8")
    with pytest.raises(DatasetError, match="every row of the held-out set"):
        read_fitting(settings, tiny_llm(), str(path), "held-out")


# --- pictures --------------------------------------------------------------------------------------------------------


def test_pictures_say_what_they_show() -> None:
    picture = embedding_svg(DOCUMENT)
    assert picture == embedding_svg(json.loads(json.dumps(DOCUMENT)))
    for said in (
        "Left: the base model",
        "1 of the 3 texts",
        "no proof",
        "forget, negative (1)",
        "retain, no label (2)",
    ):
        assert said in picture, said
    picture = membership_svg(DOCUMENT)
    for said in ("1 forget texts against 2 held-out", "AUC 0.750 (95 %: 0.100 to 0.980)", "AUC 0.250", "guessing"):
        assert said in picture, said


def test_labels_differ_by_shape_and_not_by_colour_alone() -> None:
    document = json.loads(json.dumps(DOCUMENT))
    document["embedding"]["clusters"] += [
        {"set": "forget", "label": "positive", "base": [[3, 3]], "served": [[4, 3]]},
        {"set": "retain", "label": "positive", "base": [[5, 5]], "served": [[5, 5]]},
    ]
    shapes = re.findall(r'<g transform[^>]*><path class="c-s\d" d="M[\d.]+ -?[\d.]+([^"]+)"', embedding_svg(document))
    assert len(shapes) == 4 == len(set(shapes))


def test_the_attack_is_solid_before_and_dashed_after() -> None:
    first, second = re.findall(
        r'<path class="c-s([12])" d="M[^"]*"[^>]*?(stroke-dasharray[^/]*)?/>', membership_svg(DOCUMENT, small=True)
    )
    assert (first[0], second[0]) == ("1", "2") and not first[1] and second[1]
    assert SOLID.startswith("solid: before") and DASHED.startswith("dashed: after")


def test_small_pictures_show_the_same_without_words() -> None:
    for draw in (embedding_svg, membership_svg):
        whole, small = draw(DOCUMENT), draw(DOCUMENT, small=True)
        assert "<text" not in small and "<text" in whole and len(small) < len(whole)
        assert small.partition("<title>")[2].partition("</title>")[0] in whole
    assert NO_PROOF in embedding_svg(DOCUMENT, small=True), "for whoever cannot see it"
    assert "ZM320 " in embedding_svg(DOCUMENT, small=True)


def test_a_text_that_stayed_is_in_the_same_place_of_both_halves() -> None:
    """The halves are one scale and a shift: the two retain points lie as far apart on the right as on the left."""
    drawn = [e.get("d") or "" for e in ElementTree.fromstring(embedding_svg(DOCUMENT)).iter(f"{SVG}path")]
    assert len([path for path in drawn if path.startswith("M1 ") and "ZM320 " in path]) == 1, "a line between them"
    retain = next(path for path in drawn if "a3 3" in path and path.count("M") == 4)
    forget = next(path for path in drawn if path.count("M") == 2 and "l6 6" in path)
    spots = [tuple(map(float, spot)) for spot in re.findall(r"M(\S+) ([\d.]+)a", retain)]
    (a, b, c, d), heights = [x + 3 for x, _ in spots], {y for _, y in spots}  # a ring begins at its left
    assert b - a == pytest.approx(d - c, abs=0.11) and a < b < 320 < c < d and len(heights) == 1
    # Its crosses begin three to the left of their middle; this one has moved beyond the others.
    before, after = (float(cross.split()[0]) + 3 for cross in forget.removeprefix("M").split("M"))
    assert before < a and after > d
