"""The report of an erasure request, for whoever has to file it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any

from fastapi import APIRouter, Query, Response

from app import report, report_page, report_pdf
from app.audit_chain import AuditBroken
from app.auth import ReaderCaller
from app.deps import RequestId, ServiceDep
from app.errors import Conflict, Forbidden, InvalidInput, NotFound, RateLimited, Unauthenticated
from app.keys import READS_ALL
from app.problems import problems
from app.report_schemas import ReportFormat, ReportOut
from app.signing import canonical

router = APIRouter(tags=["unlearn requests"], responses=problems(Unauthenticated, Forbidden, InvalidInput, RateLimited))

_RENDER: dict[ReportFormat, tuple[str, Callable[[Mapping[str, Any]], bytes]]] = {
    ReportFormat.JSON: ("application/json", canonical),
    ReportFormat.HTML: ("text/html; charset=utf-8", report_page.render),
    ReportFormat.PDF: ("application/pdf", report_pdf.render),
}


@router.get(
    "/unlearn-requests/{request_id}/report",
    response_model=ReportOut,
    responses={
        200: {
            "description": "The report, in the format that was asked for.",
            "content": {
                "text/html": {"schema": {"type": "string"}},
                "application/pdf": {"schema": {"type": "string", "format": "binary"}},
            },
        },
        **problems(NotFound, Conflict, AuditBroken),
    },
)
def get_report(
    caller: ReaderCaller,
    request_id: RequestId,
    service: ServiceDep,
    report_format: Annotated[
        ReportFormat, Query(alias="format", description="`html` and `pdf` are single files, to be kept or printed.")
    ] = ReportFormat.JSON,
) -> Response:
    """What was asked, what was done and how well it works, in plain words and pictures, around the signed receipt.

    The same bytes as long as nothing happens to the request. No text and no reason is in it. 409 while it is open.
    """
    document = report.build(service.sessions, service.vault, request_id, owner=caller.owner(*READS_ALL))
    media_type, render = _RENDER[report_format]
    headers = {"Content-Disposition": f'inline; filename="letheon-report-{request_id}.{report_format.value}"'}
    if report_format == ReportFormat.HTML:
        headers["Content-Security-Policy"] = report_page.POLICY
    return Response(render(document), media_type=media_type, headers=headers)
