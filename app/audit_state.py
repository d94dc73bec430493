"""The state held against the log: what requests, prompts, active sets and API keys are has to follow from the entries.

The chain (``app.audit``) shows an entry that was altered; this shows a row that was, where an entry tells of it. All is
read as of one moment and in order, a request at a time, so nothing that moves meanwhile looks altered and a long log
takes no memory. What an older entry does not state is not compared.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Generator, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from typing import Any, NamedTuple

from sqlalchemy import Row, Select, Text, cast, exists, or_, select
from sqlalchemy.exc import DataError
from sqlalchemy.orm import Session

from app import active_set, audit, audit_keys, db, entry_facts
from app.audit_chain import AuditBroken
from app.entry_facts import json_digest, time_or_none
from app.errors import NotReady
from app.signing import PublicKey
from app.tables import (
    OPEN,
    ActiveSetMember,
    ActiveSetVersion,
    AuditEntry,
    ForgetDigest,
    Prompt,
    UnlearnRequest,
)
from app.told import Told
from app.tracebacks import where

log = logging.getLogger(__name__)

_PAGE = 1000
_NO_VALUE = (ValueError, TypeError, DataError)
"""While a row is read: a time that is none, JSON that is none."""
_NO_SHAPE = (ValueError, TypeError, LookupError, AttributeError, OverflowError)
"""While what was read is taken apart: JSON of another shape, a time at the end of all times."""

_REQUEST = (
    *(UnlearnRequest.id, UnlearnRequest.state, UnlearnRequest.api_key_id, UnlearnRequest.num_texts),
    *(UnlearnRequest.fingerprint, UnlearnRequest.set_digest, UnlearnRequest.cancel_requested),
    *(UnlearnRequest.created_at, UnlearnRequest.received_at, UnlearnRequest.due_at, UnlearnRequest.expires_at),
    *(UnlearnRequest.approval_required, UnlearnRequest.approved_by, UnlearnRequest.approved_at),
    *(UnlearnRequest.finished_at, UnlearnRequest.shred_at),
    or_(UnlearnRequest.wrapped_key.is_not(None), UnlearnRequest.sealed_texts.is_not(None)).label("has_texts"),
)
_REQUEST_JSON = (UnlearnRequest.options, UnlearnRequest.metrics, UnlearnRequest.failure)
_PROMPT = (
    *(Prompt.id, Prompt.state, Prompt.digest, Prompt.activated_at),
    *(Prompt.revoked_at, Prompt.revoked_by, Prompt.revoke_code),
    *(getattr(Prompt, name) for name in entry_facts.ACTIVATED),
)
_ENTRY = (AuditEntry.seq, AuditEntry.at, AuditEntry.actor, AuditEntry.action, AuditEntry.detail)


def verify(session: Session, public_key: PublicKey | None = None) -> int:
    """``audit.verify``, and the state held against the log, both as of one moment. Raises AuditBroken.

    It sees what is committed, and not what ``session`` is about to write.
    """
    with db.snapshot(session) as still:
        return verify_at(still, public_key)


def verify_at(still: Session, public_key: PublicKey | None = None) -> int:
    """The same, with a session that reads as of one moment (``db.snapshot``)."""
    entries = audit.verify(still, public_key)
    hold(still)
    return entries


def hold(session: Session) -> None:
    """Requests, prompts, active sets and API keys against the log, which was verified. Raises AuditBroken.

    The session has to read as of one moment.
    """
    _hold_requests(session)
    lost = select(AuditEntry.subject).where(
        AuditEntry.action == "request.created", ~exists().where(UnlearnRequest.id == AuditEntry.subject)
    )
    if (request_id := session.scalar(lost.limit(1))) is not None:
        raise _broken(request_id, "its row is missing")
    _hold_active_set(session)
    _hold_versions(session)
    audit_keys.hold(session)


def hold_request(session: Session, request_id: str) -> None:
    """One request and its prompt against the entries about them. Raises AuditBroken.

    The session has to read as of one moment. Each of the entries has to be what its own hash says, and to hang between
    its neighbours; the digest of the set that the prompt came into force with is held against them, too. That the rest
    of the chain holds, and that no entry is missing from it, is for ``verify``.
    """
    prompt_id = session.scalar(select(Prompt.id).where(Prompt.request_id == request_id))
    with _readable(request_id, _NO_VALUE):
        audit.check_about(session, request_id, *([prompt_id] if prompt_id else []))
    told = _hold_one_alone(session, request_id)
    if told is not None and told.came_with is not None:
        version, digest = told.came_with
        if session.scalar(select(ActiveSetVersion.digest).where(ActiveSetVersion.version == version)) != digest:
            raise _broken(request_id, f"the digest of active set {version} is not what the log says")


class _Found(NamedTuple):
    """A request, and what is about it in the order of the log."""

    row: Row[Any]
    entries: list[Row[Any]]
    versions: list[tuple[int, int | None]]
    digests: list[bytes]


def _hold_requests(session: Session) -> None:
    last = ""
    with closing(_requests(session)) as found:
        while True:
            try:  # to read, and nothing else: an error in what is done with it is ours, and no alteration
                one = next(found, None)
            except _NO_VALUE as error:
                log.warning("requests after %s cannot be read at once (%s)", last or "the first", where(error))
                break
            if one is None:
                return
            _hold_one(one)
            last = one.row.id
    # Some row of this page, or of the next. One request after another, from where it went well, names whose it is.
    for request_id in session.scalars(
        select(UnlearnRequest.id).where(UnlearnRequest.id > last).order_by(UnlearnRequest.id)
    ):
        _hold_one_alone(session, request_id)


def _hold_one_alone(session: Session, request_id: str) -> Told | None:
    """None where it has no row."""
    with _readable(request_id, _NO_VALUE), closing(_requests(session, only=request_id)) as found:
        one = next(found, None)
    return None if one is None else _hold_one(one)


@contextmanager
def _readable(request_id: str, errors: tuple[type[Exception], ...]) -> Iterator[None]:
    """What nothing raises that was written here is an alteration; were it an error of ours, the log shows where."""
    try:
        yield
    except errors as error:
        log.warning("request %s cannot be read (%s)", request_id, where(error))
        raise _broken(request_id, "it cannot be read") from None


def _requests(session: Session, *, only: str | None = None) -> Generator[_Found]:
    with ExitStack() as stack:

        def rows(query: Select[*tuple[Any, ...]], *then: Any) -> Iterator[Row[Any]]:
            """In the order of the requests, in which one statement follows another."""
            if only is not None:
                query = query.where(UnlearnRequest.id == only)
            query = query.order_by(UnlearnRequest.id, *then).execution_options(yield_per=_PAGE)
            return iter(stack.enter_context(closing(session.execute(query))))

        about, revoked = _Groups(rows(_ENTRIES, AuditEntry.seq)), _Groups(rows(_REVOKED, AuditEntry.seq))
        members, texts = _Groups(rows(_MEMBERS, ActiveSetMember.from_version)), _Groups(rows(_TEXTS))
        for row in rows(_ROWS):
            yield _Found(
                row,
                sorted([*about.of(row.id), *revoked.of(row.id)], key=lambda entry: entry.seq),
                [(member.from_version, member.to_version) for member in members.of(row.id)],
                [found.digest for found in texts.of(row.id)],
            )


_ROWS = select(
    *_REQUEST,
    *(cast(column, Text).label(f"{column.key}_text") for column in _REQUEST_JSON),
    *(column.label(f"prompt_{column.key}") for column in _PROMPT),
    cast(Prompt.metrics, Text).label("prompt_metrics_text"),
).outerjoin(Prompt, Prompt.request_id == UnlearnRequest.id)
_ID = UnlearnRequest.id.label("request_id")
_ENTRIES = select(_ID, *_ENTRY).join(AuditEntry, AuditEntry.subject == UnlearnRequest.id)
_REVOKED = (
    select(_ID, *_ENTRY)
    .join(Prompt, Prompt.request_id == UnlearnRequest.id)
    .join(AuditEntry, AuditEntry.subject == Prompt.id)
    .where(AuditEntry.action.in_(("prompt.revoke_asked", "prompt.revoke_withdrawn", "prompt.revoked")))
)
_MEMBERS = (
    select(_ID, ActiveSetMember.from_version, ActiveSetMember.to_version)
    .join(Prompt, Prompt.request_id == UnlearnRequest.id)
    .join(ActiveSetMember, ActiveSetMember.prompt_id == Prompt.id)
)
_TEXTS = select(_ID, ForgetDigest.digest).join(ForgetDigest, ForgetDigest.request_id == UnlearnRequest.id)


class _Groups:
    """Rows in the order of the requests that are asked for, each for its own."""

    def __init__(self, rows: Iterator[Row[Any]]) -> None:
        self._rows = rows
        self._next = next(rows, None)

    def of(self, request_id: str) -> list[Row[Any]]:
        found = []
        while self._next is not None and self._next.request_id == request_id:
            found.append(self._next)
            self._next = next(self._rows, None)
        return found


def _hold_one(found: _Found) -> Told:
    row, told = found.row, Told(found.row.id)
    with _readable(row.id, _NO_SHAPE):
        for entry in found.entries:
            told.add(entry)
        shown, prompt_shown = _shown(row, found.digests), _prompt_shown(row)
    if not told.request:
        raise _broken(row.id, "the log does not have it")
    if not row.has_texts and told.request.get("shred_at") is not None:
        del told.request["shred_at"]  # they are gone before their time, which keeps nothing
    _same(row.id, "", told.request, shown)
    if told.texts_gone and row.has_texts:
        raise _broken(row.id, "its texts were destroyed, and are there")
    if row.state not in OPEN and row.has_texts and row.shred_at is None:
        raise _broken(row.id, "it is over, and its texts are kept without an end")
    if bool(told.prompt) != (row.prompt_id is not None):
        raise _broken(row.id, "its prompt is missing" if told.prompt else "the log has no prompt of it")
    if told.prompt:
        _same(row.id, "its prompt's ", told.prompt, prompt_shown)
    if told.versions not in (None, found.versions):
        raise _broken(row.id, "the versions of the active set that its prompt is in are not what the log says")
    return told


def _same(request_id: str, whose: str, told: Mapping[str, Any], shown: Mapping[str, Any]) -> None:
    if wrong := [name for name in told if told[name] != shown[name]]:
        raise _broken(
            request_id, f"{whose}{', '.join(wrong)} {'is' if len(wrong) == 1 else 'are'} not what the log says"
        )


def _shown(row: Row[Any], digests: list[bytes]) -> dict[str, Any]:
    failure = _parsed(row.failure_text)
    return {
        "state": row.state,
        "num_texts": row.num_texts,
        "asked_by": row.api_key_id or "system",
        "cancel_requested": row.cancel_requested,
        **{name: time_or_none(getattr(row, name)) for name in ("created_at", "received_at", "due_at", "expires_at")},
        "approval_required": row.approval_required,
        "approved_by": row.approved_by,
        "approved_at": time_or_none(row.approved_at),
        "finished_at": time_or_none(row.finished_at),
        "shred_at": time_or_none(row.shred_at),
        "fingerprint": row.fingerprint,
        "set_digest": row.set_digest.hex() if row.set_digest else None,
        "texts_digest": entry_facts.texts_digest(digests).hex(),
        "options_digest": json_digest(_parsed(row.options_text)),
        "metrics_digest": json_digest(_parsed(row.metrics_text)),
        "failure": None if failure is None else failure["code"],
    }


def _prompt_shown(row: Row[Any]) -> dict[str, Any]:
    return {
        **{name: getattr(row, f"prompt_{name}") for name in ("id", "state", "digest", "revoked_by", "revoke_code")},
        **{name: getattr(row, f"prompt_{name}") for name in entry_facts.ACTIVATED},
        "activated_at": time_or_none(row.prompt_activated_at),
        "revoked_at": time_or_none(row.prompt_revoked_at),
        "metrics_digest": json_digest(_parsed(row.prompt_metrics_text)),
    }


def _parsed(text: str | None) -> Any:
    return None if text is None else json.loads(text)


def _hold_active_set(session: Session) -> None:
    """Its version and digest are those of the newest entry that moved it, and its members are the prompts in force."""
    try:
        view, _ = active_set.read_members(session)
    except NotReady as error:
        raise AuditBroken(error.detail) from None
    with closing(_moves(session, newest_first=True)) as moves:
        newest = next(moves, {"active_set_version": 0})
    if view.version != newest.get("active_set_version"):
        raise AuditBroken("the version of the active set is not what the log says", version=view.version)
    if newest.get("active_set_digest") not in (None, view.digest):
        raise AuditBroken("the digest of the active set is not what the log says", version=view.version)


def _hold_versions(session: Session) -> None:
    """The sets that were in force, each of which can be restored: their digests are what the log says."""
    query = select(ActiveSetVersion.version, ActiveSetVersion.digest).order_by(ActiveSetVersion.version)
    with closing(session.execute(query.execution_options(yield_per=_PAGE))) as found:
        rows = iter(found)
        row = next(rows, None)
        first, latest = row.version if row else None, 0
        if row is not None and row.version == 0 and row.digest != active_set.set_digest(()):
            raise AuditBroken("the digest of active set 0 is not that of no prompts", version=0)
        for detail in _moves(session):
            latest = detail["active_set_version"]
            while row is not None and row.version < latest:
                row = next(rows, None)
            if row is not None and row.version == latest:
                if detail.get("active_set_digest") not in (None, row.digest):
                    raise AuditBroken(f"the digest of active set {latest} is not what the log says", version=latest)
            # A database may be older than its history, and an entry that states the figures is not.
            elif "metrics_digest" in detail or (first is not None and first < latest):
                raise AuditBroken(f"the row of active set {latest} is missing", version=latest)
        while row is not None and row.version <= latest:
            row = next(rows, None)
        if row is not None:
            raise AuditBroken(f"the log has no active set {row.version}", version=row.version)


def _moves(session: Session, *, newest_first: bool = False) -> Generator[dict[str, Any]]:
    """What the entries say that each tell of another active set, or of the same at a revoke of what is suspended."""
    kinds = ("request.active", "prompt.revoked", "active_set.restored")
    query = select(AuditEntry.action, AuditEntry.detail).where(AuditEntry.action.in_(kinds))
    query = query.order_by(AuditEntry.seq.desc() if newest_first else AuditEntry.seq)
    with closing(session.execute(query.execution_options(yield_per=_PAGE))) as rows:
        for action, detail in rows:
            if action != "request.active" or "prompt_digest" in detail:  # else it comes with the restored set
                yield detail


def _broken(request_id: str, what: str) -> AuditBroken:
    return AuditBroken(f"request {request_id}: {what}", request_id=request_id)
