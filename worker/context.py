"""What a worker holds for all its jobs, and what it asks before it takes one."""

from __future__ import annotations

import os
import shutil
import socket
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session, sessionmaker

from app import active_set
from app.errors import ModeMismatch, NotReady, VaultError
from app.settings import Mode, Settings
from app.stack import StackReader
from app.tracebacks import where
from app.vault import Vault
from models.errors import FingerprintMismatch, ModelError
from models.examples import Example
from models.gate_rows import space_source
from models.llm import FrozenLLM
from models.row_cache import CacheFolder
from worker.concatenated import open_all_canaries
from worker.failures import JobFailed

UNREADABLE = (NotReady, VaultError, ModelError)
"""What a ``StackReader`` says of a set that cannot be read."""


@dataclass(frozen=True, repr=False)
class Context:
    """What one worker process holds for all its jobs. ``stop`` is set when the process is to end."""

    settings: Settings
    sessions: sessionmaker[Session]
    vault: Vault
    llm: FrozenLLM
    retain: Sequence[Example]
    held_out: Sequence[Example] = ()
    stop: threading.Event = field(default_factory=threading.Event)
    owner: str = field(default_factory=lambda: f"{socket.gethostname()}:{os.getpid()}")
    retain_digests: Sequence[bytes] = field(init=False)

    @property
    def max_text_tokens(self) -> int:
        """The longest text that the service takes, as ``app.serving`` has it."""
        return self.llm.text_limit(self.settings.max_text_tokens, self.settings.num_virtual_tokens)

    @cached_property
    def space_source(self) -> str:
        """Names the gate space that this worker's requests are fitted in."""
        return space_source(self.llm, self.retain, self.settings.gate_rows)

    @cached_property
    def cache(self) -> CacheFolder:
        """What this host keeps of retain rows, named by digests that nobody can test without the deployment's key."""
        shutil.rmtree(self.settings.home / "teacher", ignore_errors=True)  # of before: there they had plain ones
        return CacheFolder(self.settings.home / "rows", self.vault.key_for("row cache"))

    @cached_property
    def held_out_digests(self) -> Sequence[bytes]:
        return [self.vault.digest(example.text) for example in self.held_out]

    def __post_init__(self) -> None:
        object.__setattr__(self, "retain_digests", [self.vault.digest(example.text) for example in self.retain])


def unforgotten(context: Context, forgotten: set[bytes]) -> list[Example]:
    """The retain set without the texts of these digests."""
    pairs = zip(context.retain, context.retain_digests, strict=True)
    return [example for example, digest in pairs if digest not in forgotten]


def retain_set(context: Context, forgotten: set[bytes], forget: Sequence[Example]) -> list[Example]:
    """The operator's retain set without any text that was ever to be forgotten (promise 9). Raises JobFailed.

    Nor one that the guard takes for a text of this request: to answer it is not to be taught either.
    """
    guarded = {context.vault.gate_digest(example.text) for example in forget}
    retain = [
        example for example in unforgotten(context, forgotten) if context.vault.gate_digest(example.text) not in guarded
    ]
    texts = len({example.text for example in retain})
    if texts < context.settings.min_retain_rows:
        detail = (
            f"{texts} different texts of the {len(context.retain)} rows of the retain set were never to be "
            f"forgotten; {context.settings.min_retain_rows} are needed"
        )
        raise JobFailed("too-few-retain-rows", detail)
    return retain


def why_unreadable(context: Context) -> str | None:
    """What keeps the set in force or the key store from being read, if anything: no fault of the request that waits.

    A set of another mode or model reads well, and the job tells the client of it. Raises SQLAlchemyError.
    """
    try:
        if context.vault.keystore is not None:
            context.vault.keystore.ping()  # also where nothing is in force: its texts would not open
        with context.sessions() as session:
            stack = stack_reader(context).read(session)
            if context.settings.mode == Mode.CONCATENATE:
                open_all_canaries(session, vault=context.vault, stack=stack)
            elif (space := active_set.find_gate_space(session, context.space_source)) is not None:
                active_set.read_gate_space(session, space)
    except (ModeMismatch, FingerprintMismatch):
        return None
    except UNREADABLE as error:
        return str(error)
    except SQLAlchemyError:
        raise
    except Exception as error:  # a bug there, too, must neither end requests nor the worker
        return where(error)
    return None


def stack_reader(context: Context) -> StackReader:
    """One for each reading: a worker keeps nothing of other people's prompts, which may be revoked meanwhile."""
    return StackReader(context.vault, fingerprint=context.llm.fingerprint, mode=context.settings.mode)
