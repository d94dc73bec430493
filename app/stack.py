"""From rows to tensors: the prompts and gates in force, as API and worker both use them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from sqlalchemy.orm import Session

from app import active_set
from app.active_set import ActiveSetView, Member
from app.errors import KeyStoreAway, ModeMismatch, NotReady
from app.settings import Mode
from app.tables import Prompt
from app.tracebacks import where
from app.vault import Vault
from models.errors import FingerprintMismatch, InvalidPrompt
from models.gate import Gate, GateSpace
from models.routing import Route, Routes
from models.soft_prompt import SoftPrompt

log = logging.getLogger(__name__)

_TRIES = 5


@dataclass(frozen=True, repr=False)
class Stack:
    """One active set. ``prompts`` in order of activation; ``routes`` the same with their gates, in mode ``routed``."""

    view: ActiveSetView
    members: tuple[Member, ...]
    prompts: tuple[SoftPrompt, ...]
    routes: Routes | None

    @property
    def widest(self) -> int:
        """The most virtual tokens that a text may stand behind."""
        tokens = [prompt.num_virtual_tokens for prompt in self.prompts]
        return sum(tokens) if self.routes is None else max(tokens, default=0)


class StackReader:
    """Reads the active set; what the last one already held is not read again, and what it held alone is let go.

    ``device``: where the gates are scored.
    """

    def __init__(self, vault: Vault, *, fingerprint: str, mode: Mode, device: torch.device | str = "cpu") -> None:
        self._vault, self._fingerprint, self._mode, self._device = vault, fingerprint, mode, device
        self._stack: Stack | None = None
        self._held: dict[str, tuple[SoftPrompt, Gate | None]] = {}
        self._spaces: dict[str, GateSpace] = {}

    def read(self, session: Session) -> Stack:
        """Usually one indexed query. Raises NotReady, VaultError, ModelError: then nothing of the set may be used.

        A prompt that is shredded between two statements belongs to a set that is no longer in force, which is then read
        instead.
        """
        if self._stack is not None and active_set.read_active_set(session) == self._stack.view:
            return self._stack
        for _ in range(_TRIES):
            view, members = active_set.read_members(session)
            stack = self._load(session, view, members)
            if stack is not None:
                self._stack = stack
                return stack
        raise NotReady("the active set changes faster than it can be read")

    @property
    def held(self) -> set[str]:
        """Digests of the prompts in memory."""
        return {prompt.digest for prompt, _ in self._held.values()}

    def _load(self, session: Session, view: ActiveSetView, members: Sequence[Member]) -> Stack | None:
        # What is not in this set is let go, also when the rest cannot be loaded.
        self._stack = None
        self._held = {m.id: self._held[m.id] for m in members if m.id in self._held}
        other = next((m for m in members if m.mode != self._mode), None)
        if other is not None:
            raise ModeMismatch(
                f"prompt {other.id} is of mode {other.mode}, and this service runs in mode {self._mode}: "
                "revoke it, or change LETHEON_MODE"
            )
        held = dict(self._held)
        missing = [member.id for member in members if member.id not in held]
        rows = {row.id: row for row in active_set.read_prompts(session, missing)}
        if any(found not in rows or rows[found].sealed is None for found in missing):
            return None
        for found in missing:
            held[found] = self._open(rows[found])
        wanted = {member.gate_space for member in members if member.gate_space is not None}
        spaces = {digest: self._space(session, digest) for digest in wanted}
        prompts = tuple(held[member.id][0] for member in members)
        routes = None
        if self._mode == Mode.ROUTED:
            gates = [held[member.id][1] for member in members]
            pairs = [Route(prompt, gate) for prompt, gate in zip(prompts, gates, strict=True) if gate is not None]
            routes = Routes(pairs, spaces, fingerprint=self._fingerprint, device=self._device)
        self._held = held
        self._spaces = spaces
        return Stack(view, tuple(members), prompts, routes)

    def _open(self, row: Prompt) -> tuple[SoftPrompt, Gate | None]:
        """Raises NotReady, which names the prompt."""
        try:
            data = active_set.open_prompt(self._vault, row)
            prompt = SoftPrompt.from_bytes(data, fingerprint=self._fingerprint, digest=row.digest)
            if tuple(prompt.embeddings.shape) != (row.num_virtual_tokens, row.hidden_size):
                raise InvalidPrompt("its tensor is not of the shape that its record says")
            if self._mode == Mode.CONCATENATE:
                return prompt, None
            return prompt, Gate.from_bytes(active_set.open_gate(self._vault, row), digest=row.gate_digest)
        except FingerprintMismatch as error:  # the worker tells it from other failures
            raise FingerprintMismatch(f"prompt {row.id} cannot be loaded: {error}") from error
        except (MemoryError, KeyStoreAway):
            raise  # no fault of the prompt's
        except Exception as error:
            log.error("prompt %s does not load: %s", row.id, where(error))
            raise NotReady(f"prompt {row.id} cannot be loaded ({type(error).__name__})") from error

    def _space(self, session: Session, digest: str) -> GateSpace:
        if digest in self._spaces:
            return self._spaces[digest]
        data = active_set.read_gate_space(session, digest)
        return GateSpace.from_bytes(data, fingerprint=self._fingerprint, digest=digest)
