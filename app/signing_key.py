"""The deployment's signing key: made on first use, kept among its secrets, named by the log. Nothing here commits."""

from __future__ import annotations

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from app import audit, audit_state, db
from app.audit_chain import AuditBroken
from app.deployment_secrets import add, find, load_or_create
from app.signing import PublicKey, Signer, new_private_key
from app.tables import AuditCheckpoint
from app.vault import Vault

SIGNING = "signing"


def load_signer(session: Session, vault: Vault) -> Signer:
    """The key that signs checkpoints and receipts, made on first use, which the log tells. Raises VaultError.

    The caller commits, and has appended nothing to the log yet: rows first, the chain last.
    """
    found = find(session, vault, SIGNING)
    if found is None:
        made = new_private_key()
        if add(session, vault, SIGNING, made):
            signer = Signer(made)  # not read back: the key store is not asked behind the log's lock
            detail = {"key_id": signer.public.key_id, "public_key": signer.public.hex()}
            audit.append(session, actor="system", action="signing_key.created", subject=SIGNING, detail=detail)
            return signer
        found = load_or_create(session, vault, SIGNING, new_private_key)
    return Signer(found)


def find_public_key(session: Session, vault: Vault) -> PublicKey | None:
    """None while nothing was ever signed. Raises VaultError."""
    found = find(session, vault, SIGNING)
    return None if found is None else Signer(found).public


def verify_audit(session: Session, vault: Vault) -> int:
    """``audit_state.verify`` with the deployment's own key, of what is committed. Raises AuditBroken, VaultError.

    ``session`` should have read nothing yet: it takes long, and should not hold two connections for as long.
    """
    with db.snapshot(session) as still:
        public = find_public_key(still, vault)
        first = still.scalar(select(func.min(AuditCheckpoint.seq)))
        if public is None and first is not None:
            raise AuditBroken("there are signed checkpoints, and the key that signed them is gone", seq=first)
        return audit_state.verify_at(still, public)
