"""Named points at which a process can be made to die, stop or fail, so that tests can do it at the worst moment.

``LETHEON_FAILPOINT`` names one: ``activate.after_commit`` kills the process there (SIGKILL), ``train.step:7`` at the
seventh time, ``train.step:7=stop`` stops it instead (SIGSTOP), ``=enospc`` and ``=memory`` raise what a full disk and a
used-up memory raise, from then on every time. Unset, as it is anywhere but in a test, a point costs one comparison.
"""

from __future__ import annotations

import errno
import os
import re
import signal
import threading
from collections.abc import Mapping
from typing import ClassVar

from app.errors import LetheonError

VARIABLE = "LETHEON_FAILPOINT"
COMMITS = (
    "claim",
    "checkpoint",
    "evaluating",
    "again",
    "activate",
    "fail",
    "cancel",
    "release",
    "reap",
    "ring",
    "keep",  # the finished training, where somebody has to approve it
    "await_approval",
    "expire",
    "webhook_claim",
    "webhook_record",
    "create",
    "revoke",  # also the ask, where that takes two persons
    "approve",
    "reject",
    "request_cancel",  # by the client; "cancel" is the worker's part
    "restore",
    "reconcile",
    "rotate",
)
"""Transactions with a point before their commit and one after it."""
STEPS = (
    "texts.read",  # the forget texts are in the worker's memory
    "train.step",
    "train.done",  # not yet said to anyone
    "prompt.sealed",  # its key's share is made, and nothing is in force yet
    "create.rung",  # the broker has the message, the client no answer yet
    "shares.pending",  # what shreds is committed, and its key shares are not destroyed yet
    "shares.destroyed",  # and the database still says that they are to be
)
NAMES = (*STEPS, *(f"{name}.{side}" for name in COMMITS for side in ("before_commit", "after_commit")))
ACTIONS = ("kill", "stop", "enospc", "memory")
_FORM = re.compile(r"(?P<name>[a-z_.]+)(:(?P<hit>[1-9][0-9]{0,8}))?(=(?P<action>[a-z]+))?")


class BadFailpoint(LetheonError):
    """A point or an action that does not exist would test nothing."""

    code: ClassVar[str] = "bad-failpoint"
    title: ClassVar[str] = "No such failpoint"


class _Armed:
    def __init__(self, name: str, hit: int, action: str) -> None:
        self.name, self.action = name, action
        self._left = hit
        self._lock = threading.Lock()

    def reached(self) -> None:
        with self._lock:
            self._left -= 1
            left = self._left
        if self.action == "enospc" and left <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if self.action == "memory" and left <= 0:
            raise MemoryError
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL if self.action == "kill" else signal.SIGSTOP)


_armed: _Armed | None = None


def failpoint(name: str) -> None:
    """Nothing, unless this point is the one that was armed."""
    if _armed is not None and _armed.name == name:
        _armed.reached()


def arm(environment: Mapping[str, str]) -> None:
    """What ``LETHEON_FAILPOINT`` says, from now on in this process. Raises BadFailpoint."""
    global _armed
    said = environment.get(VARIABLE, "")
    if not said:
        _armed = None
        return
    found = _FORM.fullmatch(said)
    if found is None or found["name"] not in NAMES:
        raise BadFailpoint(f"{VARIABLE} must be NAME, NAME:HIT or NAME:HIT=ACTION, with a NAME of {', '.join(NAMES)}")
    action = found["action"] or "kill"
    if action not in ACTIONS:
        raise BadFailpoint(f"{VARIABLE}: the action must be one of {', '.join(ACTIONS)}")
    _armed = _Armed(found["name"], int(found["hit"] or 1), action)
