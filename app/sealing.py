"""What comes into force, sealed before the transaction that stores it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

from app.active_set import SealedPrompt, TrainedGate, canaries_aad, gate_aad, prompt_aad
from app.tables import new_id
from app.vault import Vault


def seal_prompt(
    vault: Vault,
    wrapped: bytes,
    *,
    prompt: bytes,
    digest: str,
    gate: TrainedGate | None = None,
    canaries: Sequence[str] = (),
) -> SealedPrompt:
    """For ``active_set.activate``, under a key of ``shredding.prepare_key``. Raises VaultError, KeyStoreAway."""
    if hashlib.sha256(prompt).hexdigest() != digest:
        raise ValueError("digest is not the SHA-256 of the prompt's bytes")
    if gate is not None and hashlib.sha256(gate.data).hexdigest() != gate.digest:
        raise ValueError("digest is not the SHA-256 of the gate's bytes")
    prompt_id, texts = new_id("prm"), json.dumps(list(canaries)).encode()
    return SealedPrompt(
        id=prompt_id,
        wrapped_key=wrapped,
        digest=digest,
        sealed=vault.seal(wrapped, prompt, aad=prompt_aad(prompt_id, digest)),
        gate=gate,
        sealed_gate=vault.seal(wrapped, gate.data, aad=gate_aad(prompt_id, gate.digest)) if gate else None,
        sealed_canaries=vault.seal(wrapped, texts, aad=canaries_aad(prompt_id, digest)) if canaries else None,
    )
