"""The audit log, its signed checkpoints and its export; for the scopes `auditor` and `admin`."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query
from fastapi.responses import StreamingResponse

from app import audit
from app.audit_chain import AuditBroken
from app.audit_schemas import AuditCheckpointOut, AuditPage, PublicKeyOut
from app.auth import AuditorCaller
from app.deps import Limit, ServiceDep
from app.errors import Forbidden, InvalidInput, KeyStoreAway, RateLimited, Unauthenticated
from app.problems import problems
from app.signing_key import load_signer

router = APIRouter(tags=["audit"], responses=problems(Unauthenticated, Forbidden, InvalidInput, RateLimited))


@router.get("/admin/audit", response_model=AuditPage)
def list_audit_entries(
    caller: AuditorCaller,
    service: ServiceDep,
    limit: Limit = 50,
    before: Annotated[int | None, Query(ge=0, le=2**63 - 1, description="Entries below this one.")] = None,
    subject: Annotated[
        # PostgreSQL refuses a NUL in a parameter.
        str | None, Query(max_length=40, pattern=r"^[ -~]+$", description="Only of this id.")
    ] = None,
) -> Any:
    """Entries, newest first."""
    with service.sessions() as session:
        items, next_before = audit.list_entries(session, limit=limit, before=before, subject=subject)
    return {"items": items, "next_before": next_before}


@router.get(
    "/admin/audit/export",
    response_class=StreamingResponse,
    responses={
        200: {"content": {"application/x-ndjson": {"schema": {"type": "string"}}}},
        **problems(AuditBroken, KeyStoreAway),
    },
)
def export_audit_log(caller: AuditorCaller, service: ServiceDep) -> StreamingResponse:
    """The whole log: a JSON object a line, the last one signed. `letheon audit verify` needs this file and no server.

    Without its last line it is not complete: the connection broke.
    """
    with service.sessions.begin() as session:  # before the first byte, after which no problem can be sent
        signer = load_signer(session, service.vault)
        head = audit.checkpoint(session, signer)
    return StreamingResponse(audit.export(service.sessions, signer, head), media_type="application/x-ndjson")


@router.get("/admin/audit/checkpoint", response_model=AuditCheckpointOut, responses=problems(AuditBroken, KeyStoreAway))
def get_audit_checkpoint(caller: AuditorCaller, service: ServiceDep) -> Any:
    """The newest signed checkpoint, of the log as it is now. Kept elsewhere, it proves a later cut or rewrite."""
    with service.sessions.begin() as session:
        signer = load_signer(session, service.vault)
        return audit.checkpoint_document(audit.checkpoint(session, signer), signer.public)


@router.get("/admin/audit/public-key", response_model=PublicKeyOut, responses=problems(KeyStoreAway))
def get_audit_public_key(caller: AuditorCaller, service: ServiceDep) -> Any:
    """The key that checkpoints, exports and receipts are signed by."""
    with service.sessions.begin() as session:
        public = load_signer(session, service.vault).public
    return {"algorithm": "Ed25519", "key_id": public.key_id, "public_key": public.hex()}
