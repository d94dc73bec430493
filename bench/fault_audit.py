"""An audit log whose rows somebody with the database's password has edited, deleted, reordered or cut off, or whose
log is whole and the state another than it says (``bench.fault_state``).

What the chain itself cannot show (a log that was cut, or rewritten with all its hashes) has to show against a signed
checkpoint that was taken earlier and kept elsewhere; the tamperer removes those in the database.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from sqlalchemy import delete, insert, select
from sqlalchemy.orm import Session

from app import audit, audit_export, audit_state, job_queue, lifecycle
from app.audit import GENESIS, AuditBroken, entry_hash
from app.signing_key import load_signer
from app.tables import AuditCheckpoint, AuditEntry
from bench.fault_judge import Outcome
from bench.fault_site import Site
from bench.fault_state import ALTERATIONS, Grower

REQUESTS = 12
Row = dict[str, Any]
Rows = list[Row]
_COLUMNS = ("at", "actor", "action", "subject", "detail", "prev_hash", "hash")


def edited(rows: Rows, draw: random.Random) -> Rows:
    """One value of one row is another, by as little as there is."""
    return change(rows, draw.randrange(len(rows)), draw)


def edited_and_hashed(rows: Rows, draw: random.Random) -> Rows:
    """The row's own hash is made to fit, those after it are not."""
    at = draw.randrange(len(rows) - 1)
    made = change(rows, at, draw, columns=_COLUMNS[:5])
    made[at]["hash"] = hash_of(made[at], made[at]["prev_hash"])
    return made


def deleted(rows: Rows, draw: random.Random) -> Rows:
    at = draw.randrange(len(rows) - 1)
    return rows[:at] + rows[at + 1 :]


def deleted_and_numbered(rows: Rows, draw: random.Random) -> Rows:
    """So that no number is missing."""
    return [{**row, "seq": seq} for seq, row in enumerate(deleted(rows, draw), start=1)]


def reordered(rows: Rows, draw: random.Random) -> Rows:
    """Two rows change places."""
    made = [dict(row) for row in rows]
    one, two = draw.sample(range(len(rows)), 2)
    made[one], made[two] = {**rows[two], "seq": rows[one]["seq"]}, {**rows[one], "seq": rows[two]["seq"]}
    return made


def inserted(rows: Rows, draw: random.Random) -> Rows:
    """A row that is a copy of another one, in the middle."""
    at = draw.randrange(len(rows) - 1)
    made = [*rows[: at + 1], dict(rows[draw.randrange(len(rows))]), *rows[at + 1 :]]
    return [{**row, "seq": seq} for seq, row in enumerate(made, start=1)]


def truncated(rows: Rows, draw: random.Random) -> Rows:
    """The end is cut off, or all of it."""
    return rows[: draw.choice((0, draw.randrange(len(rows)), len(rows) - 1))]


def rewritten(rows: Rows, draw: random.Random) -> Rows:
    """A row is edited and every hash from there on is made anew: a perfect chain, of another history."""
    return rehash(change(rows, draw.randrange(len(rows)), draw, columns=_COLUMNS[:5]))


def cut_out(rows: Rows, draw: random.Random) -> Rows:
    """A row is deleted, and the rest is numbered and hashed anew."""
    return rehash(deleted_and_numbered(rows, draw))


BY_CHAIN: tuple[Callable[[Rows, random.Random], Rows], ...] = (
    edited,
    deleted,
    reordered,
    edited_and_hashed,
    deleted_and_numbered,
    inserted,
)
BY_CHECKPOINT: tuple[Callable[[Rows, random.Random], Rows], ...] = (truncated, rewritten, cut_out)
KINDS = (edited, deleted, reordered, truncated, edited_and_hashed, deleted_and_numbered, inserted, rewritten, cut_out)


def change(rows: Rows, at: int, draw: random.Random, columns: tuple[str, ...] = _COLUMNS) -> Rows:
    made = [dict(row) for row in rows]
    row, name = made[at], draw.choice(columns)
    if name == "at":
        row["at"] += timedelta(microseconds=draw.choice((-1, 1)))
    elif name == "detail":
        detail = json.loads(json.dumps(row["detail"]))
        if detail and draw.random() < 0.5:
            key = draw.choice(sorted(detail))
            if draw.random() < 0.5:
                del detail[key]
            else:
                detail[key] = str(detail[key]) + "x"
        else:
            detail["x"] = draw.choice((None, 0, "", [], {}))
        row["detail"] = detail
    else:
        value = row[name]
        place = draw.randrange(len(value))
        row[name] = value[:place] + ("0" if value[place] != "0" else "1") + value[place + 1 :]
    return made


def rehash(rows: Rows) -> Rows:
    made, last = [dict(row) for row in rows], GENESIS
    for row in made:
        row["prev_hash"], row["hash"] = last, hash_of(row, last)
        last = row["hash"]
    return made


def hash_of(row: Row, prev_hash: str) -> str:
    names = ("seq", "at", "actor", "action", "subject", "detail")
    return entry_hash(prev_hash, **{name: row[name] for name in names})


# --- the trial -------------------------------------------------------------------------------------------------------


def tamper(site: Site, number: int, draw: random.Random) -> Outcome:
    return tamper_as(site, KINDS[number // 2 % len(KINDS)], draw)


def alter_state(site: Site, number: int, draw: random.Random) -> Outcome:
    """The next way of altering rows of the state while the log is left as it is; it must be found."""
    names = sorted(ALTERATIONS)
    return alter_state_as(site, names[number // 2 % len(names)], draw)


def alter_state_as(site: Site, name: str, draw: random.Random) -> Outcome:
    outcome = Outcome(kind="state")
    if "rows" not in site.shared:
        make_log(site)
    with site.sessions() as session:
        ALTERATIONS[name](session, draw)
        outcome.missed = int(not broken(lambda: audit_state.hold(session)))
        session.rollback()
    if outcome.missed:
        outcome.reasons.append(f"state, {name}: not found")
    if broken(lambda: site.read(audit_state.verify)):
        outcome.reasons.append("the state is not as it was")
    return outcome


def tamper_as(site: Site, kind: Callable[[Rows, random.Random], Rows], draw: random.Random) -> Outcome:
    """One alteration in the database itself; it must be found, and the log as it was must be sound."""
    outcome = Outcome(kind=kind.__name__)
    if "rows" not in site.shared:
        make_log(site)
    rows: Rows = site.shared["rows"]
    altered = kind(rows, draw)
    if altered == rows:
        raise AssertionError("nothing was altered")
    if kind in BY_CHAIN:
        with site.sessions() as session:
            write_log(session, altered)
            session.flush()
            outcome.missed = int(not broken(lambda: audit.verify(session)))
            session.rollback()
    else:
        with site.sessions.begin() as session:
            checkpoints = [dict(row) for row in session.execute(select(AuditCheckpoint.__table__)).mappings()]
            session.execute(delete(AuditCheckpoint))
            write_log(session, altered)
        outcome.missed = int(not broken(lambda: verify_with_copy(site)))
        with site.sessions.begin() as session:
            session.execute(delete(AuditCheckpoint))
            write_log(session, rows)
            if checkpoints:
                session.execute(insert(AuditCheckpoint), checkpoints)
    if outcome.missed:
        outcome.reasons.append(f"{kind.__name__}: not found")
    if site.read(audit.verify) != len(rows):
        outcome.reasons.append("the log is not as it was")
    return outcome


def make_log(site: Site) -> None:
    """Requests through the floor's own functions; then a checkpoint, of which a copy is kept here."""
    Grower(site.sessions, site.vault, fingerprint=site.fingerprint, api_key_id=site.key_id).grow()
    for i in range(REQUESTS):
        request_id = site.submit(ring=False)
        with site.sessions.begin() as session:
            claim = job_queue.claim(session, request_id, owner="bench", lease_seconds=60, max_attempts=3)
        assert claim is not None
        with site.sessions.begin() as session:
            if i % 3 == 0:
                lifecycle.release(session, claim)
            elif i % 3 == 1:
                lifecycle.start_evaluating(session, claim)
            else:
                lifecycle.fail(session, claim, code="diverged", detail="the loss became infinite")
    with site.sessions.begin() as session:
        signer = load_signer(session, site.vault)
    with site.sessions.begin() as session:
        document = audit.checkpoint_document(audit.checkpoint(session, signer), signer.public)
    site.shared["signer"], site.shared["copy"] = signer, audit_export.to_lines([document]).splitlines(keepends=True)
    with site.sessions() as session:
        query = select(AuditEntry.__table__).order_by(AuditEntry.seq)
        site.shared["rows"] = [dict(row) for row in session.execute(query).mappings()]


def write_log(session: Session, rows: Rows) -> None:
    session.execute(delete(AuditEntry), execution_options={"synchronize_session": False})
    if rows:
        session.execute(insert(AuditEntry), rows)


def verify_with_copy(site: Site) -> None:
    """What an auditor does who has an earlier checkpoint: has the log exported, and holds it against that.

    Raises AuditBroken, and NotFound for a log that is empty now.
    """
    signer = site.shared["signer"]
    with site.sessions() as session:
        audit.verify(session)
    with site.sessions.begin() as session:
        head = audit.checkpoint(session, signer)
    lines = list(audit.export(site.sessions, signer, head))
    whole = b"".join(lines).splitlines(keepends=True)
    audit_export.verify_lines(whole, signer.public, site.shared["copy"])


def broken(verify: Callable[[], object]) -> bool:
    try:
        verify()
    except AuditBroken:
        return True
    except Exception as error:
        # An emptied log has no head that could be signed: as loud as a broken one.
        if getattr(error, "code", "") == "not-found":
            return True
        raise
    return False
