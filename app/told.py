"""What the entries about one request say of its row and of its prompt's, read from the first to the last."""

from __future__ import annotations

from typing import Any, Protocol

from app import entry_facts
from app.audit_chain import AuditBroken, iso
from app.tables import RequestState
from app.terms import CLOCKS_DIFFER

_STATES = {f"request.{state.value}": state for state in RequestState}
_EXPIRED = "expired"


class Entry(Protocol):
    """A row of the log, as columns or as an object."""

    seq: Any
    at: Any
    actor: Any
    action: Any
    detail: Any


class Told:
    """``request`` and ``prompt`` by name of the fact, ``prompt`` empty where there is none. What no entry states, or an
    older one did not, is missing. ``versions``: of the active set, in which the prompt was in force, from and before;
    None where that is not known. ``came_with``: version and digest of the set that it came into force with.

    ``texts_gone``: they were destroyed, and nothing brings them back. Until the request ends they are there; after that
    ``shred_at`` says until when, where the entry does.
    """

    def __init__(self, request_id: str) -> None:
        self.id = request_id
        self.request: dict[str, Any] = {}
        self.prompt: dict[str, Any] = {}
        self.versions: list[tuple[int, int | None]] | None = None
        self.came_with: tuple[int, str] | None = None
        self.texts_gone = False
        self._asked: str | None = None  # who asked to revoke the prompt
        self._waiting: str | None = None  # the digest of the prompt that was last left to another's approval

    def add(self, entry: Entry) -> None:
        """The next one. Raises AuditBroken where it tells of what could not have happened on rows as they were."""
        if entry.action == "request.cancel_requested":
            self.request["cancel_requested"] = True
        elif entry.action == "request.created":
            self._created(entry)
        elif entry.action == "request.shredded":
            self.request["shred_at"], self.texts_gone = None, True
        elif entry.action == "prompt.revoke_asked":
            self._asked = entry.actor[:40]
        elif entry.action == "prompt.revoke_withdrawn":
            self._asked = None
        elif entry.action == "prompt.revoked":
            self._revoked(entry)
        elif entry.action in _STATES:
            self._moved(entry, _STATES[entry.action])

    def _created(self, entry: Entry) -> None:
        detail = entry.detail
        self.request = {"state": "pending", "num_texts": detail["num_texts"]}
        self.request |= {"cancel_requested": False, "approved_by": None, "shred_at": None}
        if "options_digest" in detail:
            self.request |= {name: detail[name] for name in entry_facts.CREATED}
            self.request |= {"asked_by": entry.actor, "approved_at": None, "finished_at": None}
            self.request |= {"metrics_digest": None, "failure": None}

    def _moved(self, entry: Entry, state: RequestState) -> None:
        detail = entry.detail
        self.request["state"] = state.value
        if "finished_at" in detail or state in (RequestState.FAILED, RequestState.CANCELLED):
            self._ended(detail)
        if state == RequestState.PENDING and detail.get("why") == "approved":
            if entry.actor == self.request.get("asked_by"):
                raise self._broken("it was approved by who asked for it")
            self.request["approved_by"] = entry.actor[:40]
            self._take(detail, "approved_at")
        elif state == RequestState.AWAITING_APPROVAL:
            self.request["approved_by"] = self.request["approved_at"] = None
            if "approval_required" in self.request:
                self.request["approval_required"] = True  # by now: a worker may want one of every request
            self._take(detail, "metrics_digest")
            self._waiting = detail["prompt_digest"]
        elif state == RequestState.FAILED:
            self._failed(entry)
        elif state == RequestState.ACTIVE and "prompt_digest" in detail:
            self._activated(detail)
        elif state == RequestState.ACTIVE:
            self.prompt["state"] = "active"
            if self.versions is not None:
                self.versions.append((detail["active_set_version"], None))
        elif state == RequestState.SUSPENDED:
            self.prompt["state"] = "suspended"
            self._leave(detail["active_set_version"])

    def _activated(self, detail: dict[str, Any]) -> None:
        if self.request["cancel_requested"]:
            raise self._broken("it came into force after it was cancelled")
        if self.request.get("approval_required"):
            if self.request["approved_by"] is None:
                raise self._broken("it came into force, and nobody had approved it")
            if self._waiting != detail["prompt_digest"]:
                raise self._broken("another prompt came into force than was approved")
        self._ended(detail)
        self._take(detail, "metrics_digest")
        self.prompt = {"id": detail["prompt_id"], "state": "active", "digest": detail["prompt_digest"]}
        if "active_set_digest" in detail:
            self.prompt |= {name: detail[name] for name in (*entry_facts.ACTIVATED, "metrics_digest")}
            self.prompt |= {"activated_at": detail["finished_at"], "revoked_at": None, "revoked_by": None}
            self.versions = [(detail["active_set_version"], None)]
            self.came_with = (detail["active_set_version"], detail["active_set_digest"])

    def _ended(self, detail: dict[str, Any]) -> None:
        self._take(detail, "finished_at")
        self._take(detail, "shred_at")
        self.texts_gone = "shred_at" in detail and detail["shred_at"] is None

    def _revoked(self, entry: Entry) -> None:
        detail = entry.detail
        if detail.get("asked_by") not in (None, self._asked):
            raise self._broken("its prompt was revoked on an ask that nobody made")
        if self.prompt["state"] == "active":
            self._leave(detail["active_set_version"])
        self.prompt |= {"state": "revoked", "revoked_by": entry.actor[:40]}
        self.prompt.pop("revoked_at", None)
        self.prompt |= {name: detail[name] for name in ("revoked_at",) if name in detail}
        if "code" in detail:
            self.prompt["revoke_code"] = detail["code"]
        self._check_expiry(entry)

    def _failed(self, entry: Entry) -> None:
        self.request["failure"] = entry.detail.get("code")
        if entry.detail.get("metrics_digest", "") is not None:  # None: no figures came with it
            self._take(entry.detail, "metrics_digest")
        self._check_expiry(entry)

    def _check_expiry(self, entry: Entry) -> None:
        if entry.detail.get("code") == _EXPIRED and "expires_at" in self.request:
            end = self.request["expires_at"]
            # A clock may have been set back between the two.
            if end is None or end > iso(entry.at + CLOCKS_DIFFER):
                raise self._broken("it was ended as expired before its time")

    def _leave(self, version: int) -> None:
        if self.versions is not None:
            self.versions[-1] = (self.versions[-1][0], version)

    def _take(self, detail: dict[str, Any], name: str) -> None:
        """What the entry states from now on holds; where it states nothing, nothing does."""
        self.request.pop(name, None)
        if name in detail:
            self.request[name] = detail[name]

    def _broken(self, what: str) -> AuditBroken:
        return AuditBroken(f"request {self.id}: {what}", request_id=self.id)
