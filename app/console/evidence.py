"""What an auditor asks for: does the log hold together, who signed its head, what receipts are there."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response

from app import audit, lifecycle, receipts
from app.audit_chain import AuditBroken
from app.console.access import AuditorPage
from app.console.pages import render
from app.console.words import STATES
from app.deps import RequestCursor, ServiceDep
from app.errors import VaultError
from app.receipt_format import MEANING
from app.routes import audit as audit_routes
from app.signing import canonical
from app.signing_key import find_public_key, verify_audit

router = APIRouter()

PAGE = 25
ENTRIES = 25


@router.get("/console/evidence")
def evidence_page(
    request: Request,
    caller: AuditorPage,
    service: ServiceDep,
    verify: bool = False,
    before: Annotated[int | None, Query(ge=0, le=2**63 - 1)] = None,
    cursor: RequestCursor = None,
) -> Any:
    """``verify``: walk the whole log, which takes a while where it is long."""
    entries_checked, broken = None, None
    with service.sessions() as session:
        if verify:
            try:
                entries_checked = verify_audit(session, service.vault)
            except (AuditBroken, VaultError) as error:
                broken = error.detail
        point = audit.newest_checkpoint(session)
        public = find_public_key(session, service.vault)
        entries, earlier = audit.list_entries(session, limit=ENTRIES, before=before)
        ended, following = lifecycle.list_requests(
            session, limit=PAGE, cursor=cursor, states=sorted(receipts.AVAILABLE)
        )
    return render(
        request.scope,
        "evidence.html",
        caller=caller,
        verified=verify,
        entries_checked=entries_checked,
        broken=broken,
        point=point,
        public=public,
        entries=entries,
        earlier=earlier,
        ended=ended,
        following=following,
        words=STATES,
        meaning=MEANING,
    )


@router.get("/console/evidence/audit-log")
def export_log(caller: AuditorPage, service: ServiceDep) -> Any:
    """The whole log as a file that `letheon audit verify` reads."""
    response = audit_routes.export_audit_log(caller, service)
    response.headers["Content-Disposition"] = 'attachment; filename="audit-log.ndjson"'
    return response


@router.get("/console/evidence/checkpoint")
def export_checkpoint(request: Request, caller: AuditorPage, service: ServiceDep) -> Any:
    """A signed checkpoint of now, as a file to keep elsewhere."""
    content = canonical(audit_routes.get_audit_checkpoint(caller, service))
    headers = {"Content-Disposition": 'attachment; filename="audit-checkpoint.json"'}
    return Response(content, media_type="application/json", headers=headers)
