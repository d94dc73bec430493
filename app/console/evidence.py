"""What an auditor asks for: does the log hold together, what did requests leave to look at, are receipts genuine."""

from __future__ import annotations

import threading
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response

from app import audit, evidence, lifecycle, receipts
from app.audit_chain import AuditBroken
from app.auth import Caller
from app.console.access import AuditorPage
from app.console.forms import Form
from app.console.pages import render
from app.console.receipt_check import Verdict, examine
from app.console.words import ACTIONS
from app.deps import RequestCursor, Service, ServiceDep
from app.errors import Overloaded, VaultError
from app.evidence_pictures import DASHED, NO_PROOF, SOLID
from app.receipt_format import MEANING
from app.request_filters import RequestFilter
from app.routes import audit as audit_routes
from app.signing import canonical
from app.signing_key import find_public_key, verify_audit
from app.words import STATES

router = APIRouter()

PAGE = 25
ENTRIES = 25
PICTURES = 6
_verifying = threading.Lock()  # it reads all there is: one at a time, or calls of others would wait


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
    return _page(request, caller, service, verify=verify, before=before, cursor=cursor)


@router.post("/console/evidence/receipt")
def verify_receipt(request: Request, caller: AuditorPage, form: Form, service: ServiceDep) -> Any:
    """Whether a file is a receipt that was given out here, and whether the log still says the same."""
    verdict = Verdict(False, "no file was chosen")
    if form.file is not None:
        with service.sessions() as session:
            try:
                verdict = examine(session, service.vault, form.file[1])
            except VaultError as error:
                verdict = Verdict(False, error.detail)
    return _page(request, caller, service, verdict=verdict)


def _page(
    request: Request,
    caller: Caller,
    service: Service,
    *,
    verify: bool = False,
    before: int | None = None,
    cursor: str | None = None,
    verdict: Verdict | None = None,
) -> Any:
    entries_checked, broken = None, None
    if verify:
        if not _verifying.acquire(blocking=False):
            raise Overloaded("the log is being verified already; try again when that is done", retry_after=10)
        try:
            with service.sessions() as session:
                entries_checked = verify_audit(session, service.vault)
        except (AuditBroken, VaultError) as error:
            broken = error.detail
        finally:
            _verifying.release()
    with service.sessions() as session:
        point = audit.newest_checkpoint(session)
        public = find_public_key(session, service.vault)
        entries, earlier = audit.list_entries(session, limit=ENTRIES, before=before)
        ended, following = lifecycle.list_requests(
            session, limit=PAGE, cursor=cursor, where=RequestFilter(states=sorted(receipts.AVAILABLE))
        )
        sealed = evidence.list_sealed(session, limit=PICTURES)
    return render(
        request.scope,
        "evidence.html",
        caller=caller,
        verified=verify,
        entries_checked=entries_checked,
        broken=broken,
        verdict=verdict,
        point=point,
        public=public,
        entries=entries,
        newest_entries=before is None,
        earlier=earlier,
        ended=ended,
        newest_ended=cursor is None,
        following=following,
        sealed=sealed,
        no_proof=NO_PROOF,
        solid=SOLID,
        dashed=DASHED,
        words=STATES,
        actions=ACTIONS,
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
