"""Rows of the state that somebody with the database's password has altered, while the log is left as it is.

Each way is one that the entries tell against. What no entry states (leases, progress, events, evidence) is not among
them.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from sqlalchemy import Table, delete, insert, inspect, select, update
from sqlalchemy.orm import Session, sessionmaker

from app import active_set, approval, db, job_queue, keys, lifecycle, shredding
from app.active_set import TrainedGate
from app.lifecycle import Claim, ForgetText
from app.sealing import seal_prompt
from app.settings import Mode
from app.tables import (
    ActiveSet,
    ActiveSetMember,
    ActiveSetVersion,
    ApiKey,
    Base,
    ForgetDigest,
    Prompt,
    PromptState,
    RequestState,
    UnlearnRequest,
    utcnow,
)
from app.terms import Terms
from app.vault import Vault

Sessions = sessionmaker[Session]
Alteration = Callable[[Session, random.Random], None]

HELD: dict[type[Base], tuple[str, ...]] = {
    UnlearnRequest: (
        *("state", "api_key_id", "num_texts", "options", "fingerprint", "set_digest", "cancel_requested"),
        *("created_at", "received_at", "due_at", "expires_at", "finished_at", "shred_at"),
        *("approval_required", "approved_by", "approved_at", "metrics", "failure"),
    ),
    ForgetDigest: ("digest",),
    Prompt: (
        *("state", "digest", "mode", "fingerprint", "num_virtual_tokens", "hidden_size", "gate_digest", "gate_space"),
        *("metrics", "activated_at", "revoked_at", "revoked_by", "revoke_code"),
    ),
    ActiveSet: ("version", "digest"),
    ActiveSetVersion: ("version", "digest"),
    ActiveSetMember: ("from_version", "to_version"),
    ApiKey: ("name", "scopes", "digest", "limits", "created_at", "expires_at", "revoked_at"),
}
"""Columns of which the log says what is in them."""


# --- a deployment with something of everything -----------------------------------------------------------------------


class Grower:
    """Requests in every state, through the floor's own functions."""

    def __init__(self, sessions: Sessions, vault: Vault, *, fingerprint: str, api_key_id: str | None) -> None:
        self.sessions, self.vault = sessions, vault
        self.fingerprint, self.api_key_id = fingerprint, api_key_id
        self.made, self.space = 0, ""

    def grow(self) -> dict[str, str]:
        """Their ids, by what became of them."""
        with self.sessions.begin() as session:
            self.space = active_set.add_gate_space(session, "bench", b"space")
            end, limits = utcnow() + timedelta(days=90), {"rate_per_minute": 60}
            keys.create_key(session, name="limited", scopes=["classify"], actor="bench", expires_at=end, limits=limits)
            ended, _ = keys.create_key(session, name="ended", scopes=["requests", "admin"], actor="bench")
            keys.revoke_key(session, ended.id, actor="bench")
        ids = {
            name: self.ask()
            for name in ("pending", "training", "evaluating", "cancelling", "cancelled", "failed", "kept")
        }
        ids |= {name: self.ask(approval=True) for name in ("waiting", "approved", "rejected")}
        claims = {name: self.claim(ids[name]) for name in ("training", "evaluating", "cancelling", "failed")}
        self.evaluate(claims["evaluating"])
        with self.sessions.begin() as session:
            lifecycle.request_cancel(session, ids["cancelling"], actor="bench")
        with self.sessions.begin() as session:
            lifecycle.request_cancel(session, ids["cancelled"], actor="bench")
        with self.sessions.begin() as session:
            session.info[db.KEEP_TEXTS] = timedelta(days=30)
            lifecycle.request_cancel(session, ids["kept"], actor="bench")
        with self.sessions.begin() as session:
            metrics = {"passed": False, "forget_abstain": 0.25}
            lifecycle.fail(session, claims["failed"], code="checks-failed", detail="missed", metrics=metrics)
        for name in ("waiting", "approved", "rejected"):
            self.wait(self.claim(ids[name]))
        with self.sessions.begin() as session:
            approval.reject(session, ids["rejected"], actor="second", reason="not theirs")
        with self.sessions.begin() as session:
            approval.approve(session, ids["approved"], actor="second")
        ids["agreed"] = self.ask(approval=True)  # approved, and in force
        self.wait(self.claim(ids["agreed"]))
        with self.sessions.begin() as session:
            approval.approve(session, ids["agreed"], actor="second")
        self.activate(ids["agreed"])
        ids |= {name: self.ask() for name in ("active", "revoked", "suspended", "revoked later")}
        self.activate(ids["active"])
        last = self.activate(ids["revoked"])
        with self.sessions.begin() as session:
            active_set.revoke_prompt(session, last, actor="bench", reason="test", code="harm")
        before = self.version()
        self.activate(ids["suspended"])
        last = self.activate(ids["revoked later"])
        self.restore(before)
        with self.sessions.begin() as session:
            active_set.revoke_prompt(session, last, actor="bench", reason="test", code="mistake")
        for version in (1, before):  # out of force and back
            self.restore(version)
        return ids

    def ask(self, *, approval: bool = False) -> str:
        self.made += 1
        now, month = utcnow(), timedelta(days=30)
        with self.sessions.begin() as session:
            return lifecycle.create_request(
                session,
                self.vault,
                texts=[ForgetText(f"text {self.made} {place}", "negative") for place in range(2)],
                reason=None,
                options={"alpha": 0.3, "learning_rate": 1e-05, "seed": self.made},
                fingerprint=self.fingerprint,
                api_key_id=self.api_key_id,
                terms=Terms(now - timedelta(days=1), now + month, now + 12 * month, approval),
                set_digest=hashlib.sha256(str(self.made).encode()).digest(),
            ).id

    def claim(self, request_id: str) -> Claim:
        with self.sessions.begin() as session:
            found = job_queue.claim(session, request_id, owner="bench", lease_seconds=600, max_attempts=3)
        assert found is not None
        return found

    def evaluate(self, claim: Claim) -> None:
        with self.sessions.begin() as session:
            lifecycle.start_evaluating(session, claim)

    def wait(self, claim: Claim) -> None:
        self.evaluate(claim)
        digest, gate = hashlib.sha256(claim.request_id.encode()).hexdigest(), self.gate(claim.request_id)
        metrics = {"forget_abstain": 1.0}
        with self.sessions.begin() as session:
            approval.await_approval(session, claim, metrics=metrics, prompt_digest=digest, gate_digest=gate.digest)

    def gate(self, request_id: str) -> TrainedGate:
        data = f"gate of {request_id}".encode()
        return TrainedGate(data, hashlib.sha256(data).hexdigest(), self.space)

    def activate(self, request_id: str) -> str:
        """The prompt's id."""
        claim, data, gate = self.claim(request_id), request_id.encode(), self.gate(request_id)
        self.evaluate(claim)
        key = shredding.prepare_key(self.sessions, self.vault)
        sealed = seal_prompt(self.vault, key, prompt=data, digest=hashlib.sha256(data).hexdigest(), gate=gate)
        version = self.version()
        with self.sessions.begin() as session:
            return active_set.activate(
                session,
                claim,
                sealed,
                fingerprint=self.fingerprint,
                num_virtual_tokens=4,
                hidden_size=32,
                metrics={"passed": True, "forget_abstain": 1.0, "retain_accuracy": 0.9375, "retain_rows": 16},
                expected_version=version,
            ).id

    def version(self) -> int:
        with self.sessions() as session:
            return active_set.read_active_set(session).version

    def restore(self, version: int) -> None:
        how = {"mode": Mode.ROUTED, "fingerprint": self.fingerprint, "actor": "bench", "reason": "test"}
        with self.sessions.begin() as session:
            active_set.restore(session, version, **how)


# --- what is done to it ----------------------------------------------------------------------------------------------


def one_value(table: type[Base], name: str) -> Alteration:
    """One value of one row is another, by as little as there is."""

    def alter(session: Session, draw: random.Random) -> None:
        mapped = inspect(table).local_table
        assert isinstance(mapped, Table)
        keys = list(mapped.primary_key.columns)
        rows = [dict(row) for row in session.execute(select(mapped).order_by(*keys)).mappings()]
        if name == "revoke_code":  # before, it is that of a revoke that somebody asks for
            rows = [row for row in rows if row["state"] == PromptState.REVOKED]
        if name == "gate_space":
            rows = [row for row in rows if row[name]]
        row = draw.choice(rows)
        where = [key == row[key.name] for key in keys]
        value = another(name, row[name], mapped.c[name].type.python_type, draw)
        session.execute(update(mapped).where(*where).values({name: value}))

    return alter


def another(name: str, value: Any, kind: type, draw: random.Random) -> Any:
    if name == "state":
        states = PromptState if value in list(PromptState) and draw.random() < 0.5 else RequestState
        return draw.choice([state.value for state in states if state.value != value])
    if name in ("api_key_id", "gate_space") and value is not None:
        return None  # there are no others
    if kind is bool:
        return not value
    if name.endswith("_at"):
        return utcnow() if value is None else value + timedelta(microseconds=draw.choice((-1, 1)))
    if kind is int:
        return 10**6 if value is None or name == "version" else value + draw.choice((-1, 1))
    if name in ("options", "metrics", "failure", "limits"):
        return another_document(name, value, draw)
    if name == "scopes":
        changed = draw.choice(keys.SCOPES)  # one more, or one less
        return [scope for scope in keys.SCOPES if (scope in value) != (scope == changed)]
    if value is None:
        return b"x" * 32 if kind is bytes else "x"
    place = draw.randrange(len(value))
    if kind is bytes:
        return value[:place] + bytes([value[place] ^ 1]) + value[place + 1 :]
    return value[:place] + ("0" if value[place] != "0" else "1") + value[place + 1 :]


def another_document(name: str, value: dict[str, Any] | None, draw: random.Random) -> dict[str, Any]:
    if name == "failure":
        return {"code": "other" if value is None else value["code"] + "x", "detail": ""}
    if not value:
        return {"passed": True}
    key = draw.choice(sorted(value))
    return {**value, key: f"{value[key]}x"} if draw.random() < 0.5 else {**value, "x": draw.choice((None, 0, "", []))}


def unforgotten(session: Session, draw: random.Random) -> None:
    """A prompt is taken out of force, and the active set is made to fit it: every replica serves without it."""
    prompt = draw.choice(in_force(session))
    session.execute(update(Prompt).where(Prompt.id == prompt.id).values(state=draw.choice(("suspended", "revoked"))))
    fit_active_set(session)


def unforgotten_with_its_request(session: Session, draw: random.Random) -> None:
    prompt = draw.choice(in_force(session))
    state = draw.choice(("suspended", "revoked"))
    session.execute(update(Prompt).where(Prompt.id == prompt.id).values(state=state))
    session.execute(update(UnlearnRequest).where(UnlearnRequest.id == prompt.request_id).values(state=state))
    fit_active_set(session)


def back_in_force(session: Session, draw: random.Random) -> None:
    """What was suspended by a restored set is served again."""
    session.execute(update(Prompt).where(Prompt.state == PromptState.SUSPENDED).values(state="active"))
    session.execute(update(UnlearnRequest).where(UnlearnRequest.state == "suspended").values(state="active"))
    fit_active_set(session)


def in_another_order(session: Session, draw: random.Random) -> None:
    """Two prompts change places: in mode ``concatenate`` another context. The set is made to fit."""
    one, two = draw.sample(in_force(session), 2)
    for prompt, position in ((one, two.position), (two, one.position)):
        session.execute(update(Prompt).where(Prompt.id == prompt.id).values(position=position))
    fit_active_set(session)


def approved_by_nobody(session: Session, draw: random.Random) -> None:
    values = {"approved_by": "second", "approved_at": utcnow(), "state": RequestState.PENDING}
    session.execute(update(UnlearnRequest).where(UnlearnRequest.state == "awaiting_approval").values(values))


def request_deleted(session: Session, draw: random.Random) -> None:
    """With all that points to it, one that has no prompt."""
    prompts = select(Prompt.request_id)
    query = select(UnlearnRequest.id).where(UnlearnRequest.id.not_in(prompts)).order_by(UnlearnRequest.id)
    request_id = draw.choice(session.scalars(query).all())
    session.execute(delete(UnlearnRequest).where(UnlearnRequest.id == request_id))


def texts_kept_for_ever(session: Session, draw: random.Random) -> None:
    far = utcnow() + timedelta(days=36500)
    session.execute(update(UnlearnRequest).where(UnlearnRequest.shred_at.is_not(None)).values(shred_at=far))


def texts_put_back(session: Session, draw: random.Random) -> None:
    """From a copy, into a request whose texts were destroyed when it ended."""
    query = select(UnlearnRequest.id).where(UnlearnRequest.wrapped_key.is_(None)).order_by(UnlearnRequest.id)
    request_id = draw.choice(session.scalars(query).all())
    values = {"wrapped_key": draw.randbytes(60), "sealed_texts": draw.randbytes(60)}
    session.execute(update(UnlearnRequest).where(UnlearnRequest.id == request_id).values(values))


def prompt_deleted(session: Session, draw: random.Random) -> None:
    prompt_id = draw.choice(session.scalars(select(Prompt.id).order_by(Prompt.id)).all())
    session.execute(delete(ActiveSetMember).where(ActiveSetMember.prompt_id == prompt_id))
    session.execute(delete(Prompt).where(Prompt.id == prompt_id))
    fit_active_set(session)


def text_deleted(session: Session, draw: random.Random) -> None:
    """A later request's retain set may hold it, and teach it."""
    query = select(ForgetDigest.digest).order_by(ForgetDigest.request_id, ForgetDigest.digest)
    session.execute(delete(ForgetDigest).where(ForgetDigest.digest == draw.choice(session.scalars(query).all())))


def version_deleted(session: Session, draw: random.Random) -> None:
    query = select(ActiveSetVersion.version).order_by(ActiveSetVersion.version)
    version = draw.choice(session.scalars(query).all()[1:])  # the first is that of the migration
    session.execute(delete(ActiveSetVersion).where(ActiveSetVersion.version == version))


def version_added(session: Session, draw: random.Random) -> None:
    """One that nobody made, to be restored some day."""
    row = dict(session.execute(select(ActiveSetVersion.__table__)).mappings().first() or {})
    session.execute(insert(ActiveSetVersion).values({**row, "version": 10**6}))


def member_deleted(session: Session, draw: random.Random) -> None:
    table = ActiveSetMember
    row = draw.choice(session.execute(select(table.prompt_id, table.from_version).order_by(table.from_version)).all())
    one = (table.prompt_id == row.prompt_id, table.from_version == row.from_version)
    session.execute(delete(table).where(*one))


def key_added(session: Session, draw: random.Random) -> None:
    """One that its maker knows the secret of, with every scope."""
    row = dict(session.execute(select(ApiKey.__table__)).mappings().first() or {})
    added = {"id": f"key_{draw.randbytes(8).hex()}", "scopes": list(keys.SCOPES), "digest": draw.randbytes(32)}
    session.execute(insert(ApiKey).values({**row, **added}))


def key_deleted(session: Session, draw: random.Random) -> None:
    """One that asked for nothing: who it was cannot be looked up any more."""
    asked = select(UnlearnRequest.api_key_id).where(UnlearnRequest.api_key_id.is_not(None))
    query = select(ApiKey.id).where(ApiKey.id.not_in(asked), ApiKey.name.in_(("limited", "ended"))).order_by(ApiKey.id)
    session.execute(delete(ApiKey).where(ApiKey.id == draw.choice(session.scalars(query).all())))


ALTERATIONS: dict[str, Alteration] = {
    **{f"{table.__tablename__}.{name}": one_value(table, name) for table, names in HELD.items() for name in names},
    **{
        alter.__name__: alter
        for alter in (
            *(unforgotten, unforgotten_with_its_request, back_in_force, in_another_order, approved_by_nobody),
            *(request_deleted, prompt_deleted, text_deleted, version_deleted, version_added, member_deleted),
            *(texts_kept_for_ever, texts_put_back, key_added, key_deleted),
        )
    },
}


def in_force(session: Session) -> list[Any]:
    columns = (Prompt.id, Prompt.request_id, Prompt.position)
    rows = session.execute(select(*columns).where(Prompt.state == PromptState.ACTIVE).order_by(Prompt.position))
    return list(rows.all())


def fit_active_set(session: Session) -> None:
    """The digest of the prompts that are in force now, under the next version: nobody who serves sees a difference."""
    query = select(Prompt.id, Prompt.digest, Prompt.gate_digest, Prompt.gate_space, Prompt.mode)
    rows = session.execute(query.where(Prompt.state == PromptState.ACTIVE).order_by(Prompt.position))
    digest = active_set.set_digest(active_set.Member(*row).name for row in rows)
    session.execute(update(ActiveSet).where(ActiveSet.id == 1).values(version=ActiveSet.version + 1, digest=digest))
